"""What the commands write, and that nothing else is written over."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
from commands import ROOT
from datasets import Dataset, DatasetDict
from models import CORPUS, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_thinktok.cli import main
from hf_thinktok.evaluation import evaluate_thinking
from hf_thinktok.evaluation.harness import ThinkTokLM
from hf_thinktok.evaluation.inspection import inspect_text
from hf_thinktok.evaluation.tables import comparison_tables, print_comparison, print_evaluation
from hf_thinktok.report import as_cells
from hf_thinktok.results import print_ablation, read_json, write_json

RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny(path, think_tokens=4)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer()


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Runs a command line in which `{0}` is a folder of texts and `{model}` the model's: exit code and standard error."""
    (tmp_path / "text.txt").write_text("\n".join(CORPUS))
    (tmp_path / "recipe.yaml").write_text(f"data_files: [{tmp_path}/text.txt]\n")
    for name, results in (("eval", "quickstart_eval"), ("run", "quickstart")):
        (tmp_path / f"{name}.json").write_text((RESULTS / f"{results}.json").read_text())

    def run(words: str) -> tuple[int, str]:
        try:
            return main(words.format(tmp_path, model=folder).split()), capsys.readouterr().err
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("eval {model} --data_files {0}/text.txt --output {0}/text.txt", "{0}/text.txt"),
        ("eval {model} --data_files {0}/t*.txt --output {0}/text.txt", "{0}/text.txt"),
        ("eval {model} --config={0}/recipe.yaml --output {0}/recipe.yaml", "{0}/recipe.yaml"),
        ("eval {model} --data_files {0}/text.txt --output {model}/config.json", "{model}/config.json"),
        ("inspect {model} --file {0}/text.txt --output {0}/text.txt", "{0}/text.txt"),
        ("inspect {model} text --output {model}/config.json", "{model}/config.json"),
        ("report {0}/eval.json --output {0}/eval.json", "{0}/eval.json"),
        ("card {0}/run.json me/model --output {0}/recipe.yaml", "{0}/recipe.yaml"),
    ],
)
def test_an_output_takes_the_place_of_nothing_that_is_read(run, folder, tmp_path, words, written):
    if words.startswith("card"):
        (tmp_path / "recipe.yaml").write_text("---\nmine: 1\n")
    path = Path(written.format(tmp_path, model=folder))
    before = path.read_bytes()
    code, said = run(words)
    assert code == 2, said
    assert "name another file" in said
    assert path.read_bytes() == before


def test_what_a_command_wrote_is_written_anew_also_beside_what_it_reads(run, folder):
    for words in (
        "inspect {model} text --max_length 4 --output {model}/page.html",
        "eval {model} --data_files {0}/text.txt --num_forks 1 --num_samples 1 --max_length 8 --output {model}/eval.json",
    ):
        assert run(words)[0] == run(words)[0] == 0
    assert (folder / "page.html").read_text().startswith("<!doctype html>")


def test_links_and_devices_stay_what_they_are(run, tmp_path):
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert run("report {0}/eval.json --documents 0 --output {0}/link.html")[0] == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    write_json(tmp_path / "pipe", {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    assert not (tmp_path / "pipe").is_file()


def test_whoever_reads_along_may_end(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["card", str(RESULTS / "quickstart.json"), "me/model"]) == 141


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("generate {model} hi --temperature 1e39", "at most 1000000"),
        ("generate {model} hi --min_think_length 9999999999999999999999999", "must be at most 2147483647"),
        ("push {model} me/x/y", "Repo id must be in the form"),
        ("plan --model {model} --max_length 100000000000", "can't allocate memory"),
    ],
)
def test_numbers_and_names_that_are_too_large_are_told_in_a_sentence(run, words, sentence):
    code, said = run(words)
    assert code == 2
    assert sentence in said


OTHERS = {"top_h": 0.1, "guidance_scale": 2.0, "prompt_lookup_num_tokens": 3, "token_healing": True}


def test_a_command_speaks_as_the_model_would_whatever_its_own_settings(folder, tmp_path, capsys):
    texts = []
    for settings in ({}, {"num_return_sequences": 2, "typical_p": 0.1, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1}, OTHERS):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.generation_config.update(do_sample=True, **settings)
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        assert main(["generate", str(tmp_path / "model"), "the cat", "--seed", "1", "--max_new_tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_parts_and_columns_are_no_texts(model):
    rows = Dataset.from_dict({"text": [f"{i} {text}" for i, text in enumerate(CORPUS)]})
    for data in (DatasetDict(test=rows, train=rows), {"text": CORPUS}, rows.to_pandas()):
        with pytest.raises(ValueError, match="in parts or columns .(test, train|text).: give one of them"):
            evaluate_thinking(*model, data)
    assert len(evaluate_thinking(*model, rows.to_pandas()["text"], num_samples=1, num_forks=1).documents_F) == len(CORPUS)


def test_no_thought_is_of_no_tokens(model):
    for length in (0, "3", 1.5):
        for ask in (
            lambda length: inspect_text(*model, CORPUS[0], max_think_length=length),
            lambda length: ThinkTokLM(model[0], tokenizer=model[1], max_think_length=length),
        ):
            with pytest.raises(ValueError, match="must be at least 1, a whole number"):
                ask(length)
    with pytest.raises(ValueError, match="think_bias must be a number of nats"):
        ThinkTokLM(model[0], tokenizer=model[1], think_bias="x")


def test_tokens_without_text_have_no_bits_per_byte(model, tmp_path, capsys):
    found = evaluate_thinking(*model, [model[1].eos_token * 5] * 6, num_samples=1)
    assert math.isnan(found.summary()["arms"]["think"]["bits_per_byte"])
    write_json(tmp_path / "found.json", {"evaluation": found.summary()})
    print_evaluation(read_json(tmp_path / "found.json"))
    assert "nan" not in capsys.readouterr().out


def test_names_are_no_markup(capsys):
    results = read_json(RESULTS / "compare_quick.json")
    comparison = results["comparison"]
    comparison["arms"]["[bold]x[/nope]"] = comparison["arms"]["cpt"]
    comparison["gains"]["think over [bold]x[/nope]"] = comparison["gains"]["think over cpt"]
    print_comparison(results)
    cells = [str(row) for table in comparison_tables(comparison, results["seeds"]) for row in as_cells(table)["rows"]]
    assert sum("'[bold]x[/nope]'" in row or "'think, over [bold]x[/nope]'" in row for row in cells) == 2, "of the page"
    ablation = read_json(RESULTS / "s5_deep.json")
    print_ablation(ablation | {"ablation": {"[bold]x[/nope]": ablation["ablation"]["none, 2 layers"]}})
    assert capsys.readouterr().out.count("[bold]x[/nope]") == 3
