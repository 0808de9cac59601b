"""Results files: valid, whole, and read as they were written."""

import json
import math

import pytest

from hf_thinktok.results import read_json, write_json, written_whole


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
