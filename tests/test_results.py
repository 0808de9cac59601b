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


def test_a_star_is_at_what_was_not_trained_on():
    """At a level that no run came to, and at figures of a run that ended before the others."""
    run = {"seconds": 1.0, "steps": 10, "accuracy": {"think": dict.fromkeys("1234", 1.0)}}
    results = {"task": "walk", "control": "none", "chance": 0.1, "config": {}, "levels": [1, 2, 3], "shortcut": dict.fromkeys("1234", 0.1)}

    def table(*levels):
        console = Console(record=True, width=100)
        runs = [run | {"seed": seed, "curve": [{"step": 5, "accuracy": 1.0, "level": level}]} for seed, level in enumerate(levels)]
        print_task(results | {"runs": runs}, console)
        lines = console.export_text().splitlines()
        rows = [[cell.strip() for cell in line.replace("┃", "│").split("│")[3:-1]] for line in lines if "thoughts" in line or "its own" in line]
        return *rows, any("* never trained on" in line for line in lines)

    assert table(1, 2) == (["1", "2", "3*", "4*"], ["100", "100*", "100", "100"], ["100", "100", "100", "100"], True)
    assert table(2, 3) == (["1", "2", "3", "4*"], ["100", "100", "100*", "100"], ["100", "100", "100", "100"], True)
    run["level"] = 3  # it came there after its last check
    assert table(1)[0] == ["1", "2", "3", "4*"]
    del run["level"]
    assert table(None) == (["1", "2", "3", "4*"], ["100", "100", "100", "100"], True), "without a curriculum all levels of the data are trained on"
    results["shortcut"].pop("4")
    run["accuracy"]["think"].pop("4")
    assert table(3, 2)[0] == ["1", "2", "3"]
    assert table(3, 2)[3], "what the stars say is said where no level has one"
    assert not table(3, 3)[3]
