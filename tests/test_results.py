"""Results files: valid, whole, and read as they were written."""

import json
import math
import subprocess

import pytest
from rich.console import Console

from hf_thinktok import results
from hf_thinktok.results import print_task, read_json, write_json, written_whole


def test_figures_that_are_no_numbers_are_null_and_come_back(tmp_path):
    write_json(tmp_path / "r.json", {"gain": {"bits_per_token": 0.5, "low": math.nan, "high": math.inf}, "list": [math.nan, 1], "option": None})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    found = read_json(tmp_path / "r.json")
    assert math.isnan(found["gain"]["low"])
    assert math.isnan(found["gain"]["high"])
    assert found["gain"]["bits_per_token"] == 0.5
    assert found["list"] == [None, 1]
    assert found["option"] is None


def test_an_installed_package_has_no_commit_of_the_repository_it_lies_in(tmp_path, monkeypatch):
    assert results._commit() is None or len(results._commit().removesuffix("-changed")) == 40
    package = tmp_path / ".venv" / "lib"
    package.mkdir(parents=True)
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "own"], check=True)
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    assert results._commit() is None


def test_files_that_are_written_side_by_side_are_kept_apart(tmp_path):
    """Names that differ behind their last dot alone."""
    with written_whole(tmp_path / "bias_0.5") as one, written_whole(tmp_path / "bias_0.7") as other:
        one.write(b"5")
        other.write(b"7")
    assert [(tmp_path / name).read_bytes() for name in ("bias_0.5", "bias_0.7")] == [b"5", b"7"]


def test_a_file_that_was_not_finished_leaves_what_was_there(tmp_path):
    (tmp_path / "r.json").write_text("before")

    def half():
        with written_whole(tmp_path / "r.json") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert (tmp_path / "r.json").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_star_is_at_levels_that_no_run_came_to():
    run = {"seed": 0, "seconds": 1.0, "steps": 10, "accuracy": {"think": dict.fromkeys("1234", 1.0)}}
    results = {"task": "walk", "control": "none", "chance": 0.1, "config": {}, "levels": [1, 2, 3], "shortcut": dict.fromkeys("1234", 0.1)}

    def stars(*levels):
        console = Console(record=True, width=100)
        print_task(results | {"runs": [run | {"curve": [{"step": 5, "accuracy": 1.0, "level": level}]} for level in levels]}, console)
        header = next(line for line in console.export_text().splitlines() if "thoughts" in line)
        return [cell.strip() for cell in header.split("┃")[3:-1]]

    assert stars(1, 2) == ["1", "2", "3*", "4*"]
    assert stars(2, 3) == stars(None) == ["1", "2", "3", "4*"], "without a curriculum all levels of the data are trained on"
