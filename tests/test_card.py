"""A card says what a results file says, and what it tells its reader to do can be done."""

import json
import re
from pathlib import Path

import pytest
import yaml
from models import save_tiny
from peft import LoraConfig
from transformers import AutoTokenizer

from hf_thinktok.card import render_card
from hf_thinktok.cli import main
from hf_thinktok.results import as_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
OF_MODELS = sorted(path.stem for path in (ROOT / "model_cards").glob("*.md"))


@pytest.mark.parametrize("name", OF_MODELS)
def test_figures_options_and_commit_are_those_of_the_file(name):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    card = render_card(results, "me/model")
    assert as_text(results) in card
    assert results["commit"] in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "thinktok" in header["tags"]
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert {"max_steps": results["config"]["max_steps"], "learning_rate": results["config"]["learning_rate"]}.items() <= options.items()
    assert "output_dir" not in options
    assert f"<|think_{results['config']['num_think_tokens'] - 1 if 'num_think_tokens' in results['config'] else 15}|>" in card


def test_a_card_names_the_text_that_was_read():
    """A file comes before the data set that a config names."""
    said = lambda **options: render_card(QUICKSTART | {"config": QUICKSTART["config"] | options}, "me/x")
    wikitext = {"dataset_name": "Salesforce/wikitext", "dataset_config": "wikitext-103-v1"}
    assert "wikitext-103-v1" in said(**wikitext)
    assert "WikiText-2" not in said(**wikitext)
    assert yaml.safe_load(said(**wikitext).split("---")[1])["datasets"] == ["Salesforce/wikitext"]
    of_file = said(**wikitext, data_files=["/data/mail.jsonl"])
    assert "`mail.jsonl`, given in place of [WikiText]" in of_file
    assert "datasets" not in yaml.safe_load(of_file.split("---")[1])
    assert "standard library" not in said(data_files=["mail.jsonl"], dataset_name=None)


@pytest.mark.parametrize("name", OF_MODELS)
def test_the_recipe_of_the_command_exists_and_takes_the_options(name):
    card = render_card(json.loads((RESULTS / f"{name}.json").read_text()), "me/model")
    recipe = re.search(r"(recipes/\w+\.py) --config config.yaml", card)[1]
    source = (ROOT / recipe).read_text()
    assert "read_options" in source
    compile(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], "card", "exec")


def test_an_adapter_is_loaded_as_one():
    card = render_card(json.loads((RESULTS / "serial_smollm2.json").read_text()), "me/model")
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/model")' in card
    assert "from peft import AutoPeftModelForCausalLM" in card
    assert 'model.generation_config = GenerationConfig.from_pretrained("me/model")' in card
    assert "`thinktok merge me/model FOLDER` makes one plain checkpoint of both" in card
    assert "thinktok merge" not in render_card(QUICKSTART, "me/model")


def test_the_card_of_an_adapter_is_for_peft():
    """A Hub that offered `AutoModelForCausalLM` and `pipeline` would offer what fails."""
    config = QUICKSTART["config"] | {"use_peft": True}
    card = render_card(QUICKSTART | {"config": config}, "me/model")
    assert "library_name: peft" in card
    assert "an ordinary causal LM" not in card
    assert "beside a base in" not in card
    assert "a base in 4 bits: give `from_pretrained` the same `quantization_config`" in render_card(
        QUICKSTART | {"config": config | {"load_in_4bit": True}}, "a/b"
    )
    split = render_card(QUICKSTART | {"config": config | {"policies": "split"}}, "me/model")
    assert "The second one is in the folder `speaker`" in split
    assert "model.generate(" not in split


def test_a_card_does_not_tell_where_files_lie():
    files = {"model_name_or_path": "/home/me/base", "data_files": ["/home/me/a.jsonl"], "dataset_name": "/home/me/data"}
    card = render_card(QUICKSTART | {"config": QUICKSTART["config"] | files}, "me/model")
    assert "/home" not in card
    assert "base_model" not in card
    assert "a.jsonl" in card
    for name, more in (("compare_quick", {}), ("mod_add_100", {"task_options": {"file": "/home/me/steps.jsonl"}})):
        results = json.loads((RESULTS / f"{name}.json").read_text())
        assert "/home" not in render_card(results | {"config": results["config"] | files} | more, "me/model")


def test_options_that_load_a_model_are_shown_without_a_token():
    config = QUICKSTART["config"] | {"model_init_kwargs": {"token": "hf_secret", "revision": "v1"}, "hub_token": "hf_secret"}
    card = render_card(QUICKSTART | {"config": config}, "me/model")
    assert "hf_secret" not in card
    assert "revision: v1" in card


def test_the_command_writes_a_card_or_says_why_not(tmp_path, capsys):
    assert main(["card", str(RESULTS / "quickstart.json"), "me/model", "--title", "A title", "--output", str(tmp_path / "card.md")]) == 0
    assert "# A title\n" in (tmp_path / "card.md").read_text()
    assert main(["card", str(RESULTS / "bench_cpu.json"), "me/model"]) == 2
    assert "results are of another kind" in capsys.readouterr().err
    assert main(["card", str(tmp_path), "me/model"]) == 2
    assert "has no results.json" in capsys.readouterr().err
    assert main(["card", str(RESULTS / "quickstart.json"), "me/model", "--output", str(tmp_path / "new" / "card.md")]) == 0
    assert (tmp_path / "new" / "card.md").read_text().startswith("---")
    assert main(["card", str(RESULTS / "quickstart.json"), "me/model", "--output", str(tmp_path / "new" / "card.md")]) == 0, "a card is replaced"
    (tmp_path / "README.md").write_text("# Mine\n")
    assert main(["card", str(RESULTS / "quickstart.json"), "me/model", "--output", str(tmp_path / "README.md")]) == 2
    assert "no model card: name another file" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    with pytest.raises(SystemExit):
        main(["card", str(RESULTS / "quickstart.json"), "me/model", "--output", str(tmp_path)])
    assert "is a folder: name a file" in capsys.readouterr().err


@pytest.mark.parametrize("folder", [".", "think-seed0", "seed-3"])
def test_a_card_counts_the_tokens_that_the_model_has(tmp_path, capsys, folder):
    """The options may leave them to the model; of a comparison the card is of its arm `think`."""
    results = json.loads((RESULTS / "quickstart.json").read_text())
    results["config"].pop("num_think_tokens", None)
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "config.json").write_text(json.dumps({"thinktok": {"first_id": 100, "num_tokens": 5, "guard_id": 105}}))
    assert main(["card", str(tmp_path), "me/model"]) == 0
    assert "<|think_4|>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "question"),
    [("serial_smollm2", r"k10\n(\d>\d\n){10}\d>"), ("s5", r"([abcd] ){16}="), ("quickstart", "Once upon a time")],
)
def test_a_card_goes_on_with_what_its_model_reads(name, question):
    card = render_card(json.loads((RESULTS / f"{name}.json").read_text()), "me/model")
    (prompt,) = re.findall(r"tokenizer\((\".*\"), return_tensors", card)
    assert re.fullmatch(question, json.loads(prompt))


@pytest.mark.parametrize(("name", "length"), [("serial_smollm2", 9), ("serial_smollm2_no_think", 0), ("serial_smollm2_stop", 0)])
def test_a_card_makes_a_model_think_as_long_as_it_was_told_to(name, length, tmp_path):
    """Whose gate was taught, thinks by itself, and a control does not."""
    save_tiny(tmp_path, think_tokens=4)
    results = json.loads((RESULTS / f"{name}.json").read_text())
    results["config"] |= {"use_peft": False}
    code = re.search(r"```python\n(.*?)```", render_card(results, "me/model"), re.DOTALL)[1].replace('"me/model"', repr(str(tmp_path)))
    assert ("ThinkingBudget" in code) == (length > 0)
    if length:
        exec(code, found := {})
        said = found["output"][0, found["inputs"]["input_ids"].shape[1] :]
        assert found["vocabulary"].is_thought(said).tolist() == [True] * length + [False]


def test_what_thinks_for_a_second_model_is_not_shown_to_generate():
    assert "```python" not in render_card(json.loads((RESULTS / "mod_add_100.json").read_text()), "me/model")


QUICKSTART = json.loads((RESULTS / "quickstart.json").read_text())


@pytest.mark.parametrize("thoughts", ["filler", "gumbel", "continuous"])
def test_a_card_says_nothing_of_rewards_where_there_were_none(thoughts):
    given = "more probable than after"
    assert given in render_card(QUICKSTART, "me/model")
    card = render_card(QUICKSTART | {"config": QUICKSTART["config"] | {"thoughts": thoughts, "stop": "fixed"}}, "me/model")
    assert given not in card
    assert ("thinks where the model samples" not in card) == ("`thinktok generate" not in card) == (thoughts == "continuous")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "Nobody said what a thinking token means."),
        ({"think_init_words": ["0", "1"]}, "began as a noisy copy of one of 2 words"),
        ({"supply_thoughts": True}, "the text was learned after these."),
        ({"supply_thoughts": True, "thought_ce_weight": 1.0}, "cross-entropy taught it to think them."),
    ],
)
def test_a_card_says_who_gave_a_thought_its_meaning(options, said):
    card = render_card(QUICKSTART | {"config": QUICKSTART["config"] | options}, "me/model")
    assert said in card
    assert ("Nobody said" in card) == (not options)


@pytest.mark.parametrize("base", ["/data/my models/base: v1", "outputs/base"])
def test_a_folder_is_no_base_in_the_header(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    header = lambda name: yaml.safe_load(render_card(QUICKSTART | {"config": QUICKSTART["config"] | {"model_name_or_path": name}}, "me/x").split("---")[1])
    assert "base_model" not in header(base)
    assert header("me/base")["base_model"] == "me/base"


def test_options_with_backticks_stay_in_their_block():
    """As a text template for code has them."""
    template = "{question}\n```python\n{answer}\n````\n"
    card = render_card(QUICKSTART | {"config": QUICKSTART["config"] | {"text_template": template}}, "me/model")
    fence, block = re.search(r"^(`+)yaml\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE).groups()
    assert yaml.safe_load(block)["text_template"] == template
    assert fence not in block


def test_a_folder_is_no_data_set_in_the_header(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "rows").mkdir(parents=True)
    header = lambda name: yaml.safe_load(render_card(QUICKSTART | {"config": QUICKSTART["config"] | {"dataset_name": name}}, "me/x").split("---")[1])
    assert "datasets" not in header("my/rows")
    assert header("me/rows")["datasets"] == ["me/rows"]


@pytest.mark.parametrize("name", ["", "me/my model", "a/b/c"])
def test_a_card_is_for_a_name_that_the_hub_takes(name, capsys):
    assert main(["card", str(RESULTS / "quickstart.json"), name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"thoughts": "continuous", "stop": "fixed", "num_generations": 1}, "its thoughts are hidden states (thoughts=continuous)"),
        ({"thoughts": "text", "stop": "fixed", "max_think_length": 4}, "between the first and the last thinking token (thoughts=text)"),
        ({"policies": "split"}, "said by a second model or adapter (policies=split)"),
        ({"blind": True}, "said without the text (blind=True)"),
    ],
    ids=str,
)
def test_a_model_that_cannot_generate_as_it_was_trained_promises_nothing(make_trainer, tmp_path, capsys, options, why):
    trainer = make_trainer(**options)
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Plain `generate` does not do what it was trained to: " in card
    assert why in card
    assert "hides that" not in card
    (tmp_path / "out" / "model.safetensors").unlink()  # said before weights are read
    assert main(["generate", str(tmp_path / "out"), "the cat"]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "can"), [({}, True), ({"memory": "persistent", "stop": "sampled"}, False), ({"thoughts": "gumbel", "stop": "fixed"}, False)]
)
def test_a_card_names_commands_that_take_the_model(make_trainer, tmp_path, options, can):
    trainer = make_trainer(**options)
    trainer.save_model()
    trainer.create_model_card()
    assert ("thinktok inspect" in (tmp_path / "out" / "README.md").read_text()) == can
    assert (main(["inspect", str(tmp_path / "out"), "the cat sat", "--device", "cpu"]) == 0) == can


def test_a_card_has_the_repository_s_whole_name(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.hub_model_id = "me/mine"  # as transformers makes it of the user and a bare name
    trainer.create_model_card()
    assert 'from_pretrained("me/mine")' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("command", ["card", "report"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("3", "is no results file"),
        ("null", "is no results file"),
        ("not JSON", "is no results file"),
        ('{"cells": []}', "of another kind"),
        ('{"bits_per_token": 1}', "lacks what a run writes"),
        (json.dumps({name: value for name, value in QUICKSTART.items() if name != "commit"}), "'commit'"),
    ],
)
def test_what_is_no_results_file_is_told_in_a_sentence(tmp_path, capsys, command, content, sentence):
    (tmp_path / "found.json").write_text(content)
    where = ["me/model"] if command == "card" else ["--output", str(tmp_path / "report.html")]
    assert main([command, str(tmp_path / "found.json"), *where]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"accuracy": 0.5}', '{"bits_per_token": 0.5}', "[1]", json.dumps(QUICKSTART)], ids=["other", "not whole", "list", "ours"])
def test_checkpoints_have_a_card_without_the_figures_of_what_lay_there(make_trainer, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(content)
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = tmp_path / "out" / "README.md"
    assert "`<|think_0|>` to `<|think_3|>`" in card.read_text()
    assert "gain from thinking" not in card.read_text()
    trainer.create_model_card()  # as a push after training does
    assert "gain from thinking" not in card.read_text()
    (tmp_path / "out" / "results.json").write_text(content)  # as a recipe writes it, after training
    trainer.create_model_card()
    assert ("gain from thinking" in card.read_text()) == (content == json.dumps(QUICKSTART))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_card_of_a_checkpoint_shows_how_to_use_it(make_trainer, tmp_path, adapter):
    """Whatever TRL's own card assumes: a name on the Hub, a template for chats."""
    model, tokenizer = save_tiny(tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "base")
    trainer = make_trainer(model=str(model), tokenizer=tokenizer, peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None)
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "None" not in card
    assert '{"role"' not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"out"', repr(str(tmp_path / "out")))
    exec(code, {})


def test_an_adapter_that_no_recipe_trained_says_so(make_trainer, tmp_path):
    make_trainer(peft_config=LoraConfig(r=2, target_modules=["q_proj"]), hub_model_id="me/mine").create_model_card()
    assert "`thinktok merge me/mine FOLDER` makes one plain checkpoint" in (tmp_path / "out" / "README.md").read_text()
    make_trainer().create_model_card()
    assert "thinktok merge" not in (tmp_path / "out" / "README.md").read_text()


def test_a_card_says_that_plain_generation_hardly_thinks_where_the_gate_was_left_alone():
    said = {stop: render_card(QUICKSTART | {"config": QUICKSTART["config"] | {"stop": stop}}, "me/model") for stop in ("fixed", "sampled")}
    assert "`thinktok generate --min_think_length N` does" in said["fixed"]
    assert "min_think_length" not in said["sampled"]


def test_a_card_says_where_generation_is_not_what_was_measured():
    """By default a thought is forgotten again, and `generate` keeps it."""
    said = "generation keeps it"
    assert said in render_card(QUICKSTART, "me/model")
    assert said not in render_card(QUICKSTART | {"config": QUICKSTART["config"] | {"memory": "persistent"}}, "me/model")
    assert said not in render_card(QUICKSTART | {"config": QUICKSTART["config"] | {"blind": True}}, "me/model"), "it cannot generate so at all"


def test_a_card_counts_the_steps_that_were_taken():
    by_epochs = {name: value for name, value in QUICKSTART["config"].items() if name != "max_steps"} | {"num_train_epochs": 2}
    assert "One seed, 17 steps," in render_card(QUICKSTART | {"config": by_epochs, "steps": 17}, "me/model")
    assert f"One seed, {QUICKSTART['config']['max_steps']} steps," in render_card(QUICKSTART, "me/model")
