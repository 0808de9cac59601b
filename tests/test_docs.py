"""What the documents say is what the results files and the code say."""

import ast
import dataclasses
import functools
import importlib
import json
import re

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from commands import ROOT, captured, in_process
from models import tiny_model, tiny_tokenizer

from hf_thinktok import ThinkTokConfig
from hf_thinktok.cli import main as thinktok
from hf_thinktok.config_checks import default_of
from hf_thinktok.data import TASK_COLUMNS
from hf_thinktok.evaluation.tables import evaluation_verdict
from hf_thinktok.results import verdict
from hf_thinktok.tasks import make_task

PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


def test_readme_is_rendered_from_results_files():
    done = in_process(ROOT / "docs" / "render.py", "--check")
    assert done.returncode == 0, done.stderr[-500:]


def test_every_figure_is_rendered(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    rendered = importlib.import_module("render").rendered
    name = "s5_controls_long_7e-4: ablation/none, 7e-4, 3 times as long/0/accuracy/none/16"
    assert "-->37.9%<!-- -->" in rendered(f"<!-- {name} | .1% -->?<!-- -->")
    with pytest.raises(SystemExit, match="not understood.*s5: no format"):
        rendered("<!-- s5: no format -->?<!-- -->")


def test_runs_of_several_files_are_one_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    render = importlib.import_module("render")
    names = ["s5_seed_2", "s5", "s5_seed_1"]
    lines = render.table([f"docs/results/{name}.json" for name in names]).splitlines()
    thinks = [line for line in lines if "its own" in line]
    parts = [json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text()) for name in names]
    assert [line.split("│")[2].strip() for line in thinks] == ["0", "1", "2"]
    assert all(part["commit"][:12] in lines[-2] for part in parts)
    assert f"{parts[0]['runs'][0]['accuracy']['think']['16']:.1%}"[:-1] in thinks[2]
    with pytest.raises(ValueError, match="share no table"):
        render.table(["docs/results/s5.json", "docs/results/pointer_chasing.json"])
    with pytest.raises(ValueError, match="share no table"):
        render.table(["docs/results/serial_smollm2_no_think.json", "docs/results/serial_smollm2_filler.json"])


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "results").glob("*.svg")), ids=lambda path: path.stem)
def test_pictures_are_drawn_from_results_files(picture, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    importlib.import_module("render").draw(picture, drawn := tmp_path / picture.name)
    by = re.compile(r"Matplotlib v[\d.]+")
    if by.search(drawn.read_text())[0] != by.search(picture.read_text())[0]:
        pytest.skip("Another matplotlib draws a little differently.")
    assert drawn.read_bytes() == picture.read_bytes(), "run python docs/render.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_figures_do_not_break_their_page(page):
    """Markdown ends a paragraph at a line that begins with a comment, and a cell of a table at every bar, in a comment too."""
    figure = re.compile(r"<!-- \w+: [^>]*?[^ ]+ -->.+?<!-- -->")
    for line in page.read_text().splitlines():
        assert not re.match(rf" {{0,3}}{figure.pattern}", line), line[:80]
        if line.startswith("|"):
            assert not any(re.search(r"(?<!\\)\|", found) for found in figure.findall(line)), line[:80]


def test_results_say_where_they_come_from():
    for path in (ROOT / "docs" / "results").glob("*.json"):
        results = json.loads(path.read_text())
        assert {"versions", "hardware", "commit"} <= set(results), path
        assert not results["commit"].endswith("-changed"), path


@pytest.mark.parametrize(
    ("gain", "over_random", "words"),
    [
        (0.1, 0.1, "do better than random ones, which"),
        (0.1, 0.01, "not shown to do better than random"),
        (-0.1, 0.1, "hurts"),
        (0.01, 0.1, "told from zero"),
        (0.01, 0.0, "told from zero"),
    ],
)
def test_verdict_needs_two_standard_errors(gain, over_random, words):
    figures = {"gain": gain, "gain_stderr": 0.02, "gain_over_random": over_random, "gain_over_random_stderr": 0.02, "config": {}, "documents": 60}
    assert words in verdict(figures)


@pytest.mark.parametrize(("documents", "gain", "sure"), [(60, 0.041, True), (60, 0.039, False), (8, 0.046, False), (8, 0.048, True), (4, 1.0, False)])
def test_few_documents_need_more(documents, gain, sure):
    """Student's t for 59 and 7 degrees of freedom is 2.00 and 2.36."""
    figures = {"gain": gain, "gain_stderr": 0.02, "gain_over_random": 0.0, "gain_over_random_stderr": 0.02, "config": {}, "documents": documents}
    assert ("predicts better with its thoughts" in verdict(figures)) == sure


def test_no_figures_of_one_model_say_that_what_is_thought_matters():
    """A filler does better than random ones as well, which are unfamiliar, and one token has nothing that differs from it."""
    helps = {"gain": 0.1, "gain_stderr": 0.02, "gain_over_random": 0.1, "gain_over_random_stderr": 0.02, "documents": 60, "config": {"thoughts": "filler"}}
    assert "the time, or any change of its input" in verdict(helps)
    assert "not shown to do better than random" in verdict(helps | {"gain_over_random": 0.0, "gain_over_random_stderr": 0.0, "config": {"num_think_tokens": 1}})
    assert "told from zero" in verdict(helps | {"gain_stderr": float("nan")})
    results = json.loads((ROOT / "docs" / "results" / "compare_wikitext.json").read_text())["comparison"]
    for arm in ("think", "filler"):  # which lose to a twin that never thought
        for run in results["runs"][arm].values():
            assert "matters" not in evaluation_verdict(run)
            assert "Thinking helps" not in evaluation_verdict(run)


def test_plans_on_the_page_are_what_the_code_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    rows = json.loads((ROOT / "docs" / "results" / "plan.json").read_text())["plans"]
    row = next(row for row in rows if (row["model"], row["how"]) == ("SmolLM2-135M", "ZeRO-3, 8 GPUs"))
    now = importlib.import_module("memory").plan_of("SmolLM2-135M", "ZeRO-3, 8 GPUs")
    assert now["nodes"] == row["nodes"]
    assert now["phases"][now["peak_phase"]] == pytest.approx(row["phases"][row["peak_phase"]], rel=0.01), "run python recipes/memory.py plans"


@pytest.mark.parametrize("config", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launcher_s_config_is_one_that_accelerate_reads(config):
    known = {"cpu": "NO", "single_gpu": "NO", "fsdp2": "FSDP"} | {f"zero{stage}": "DEEPSPEED" for stage in (1, 2, 3)}
    assert load_config_from_file(str(config)).distributed_type == known.get(config.stem, "MULTI_GPU")


def test_links_and_images_exist():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_options_in_the_docs_exist():
    text = "".join(page.read_text() for page in [ROOT / "README.md", ROOT / "docs" / "concepts.md"])
    text += re.sub(r"(?m)^\| .*?\|", "", (ROOT / "docs" / "usage.md").read_text())  # but for the first column of tables, which has what is logged
    options = set(re.findall(r"`(\w+_\w+)(?:=[^`]*)?`", text)) & set(re.findall(r"`((?:think|stop|num|max|fork)_\w+)", text))
    options -= {*TASK_COLUMNS, "stop_strings"}  # of the data, or of `generate`
    assert options
    assert all(hasattr(ThinkTokConfig, name) or name in ThinkTokConfig.__dataclass_fields__ for name in options), options


def _commands():
    """Lines of the pages that start a recipe or `thinktok`, continued ones joined: what is started, and its options."""
    for page in PAGES:
        for line in re.sub(r"\\\n\s*", " ", page.read_text()).splitlines():
            if found := re.match(r"(?: {4}|\| `)(?:.*?recipes/(\w+)\.py|thinktok ([\w-]+))\b([^`#]*)", line):
                yield pytest.param(found[1] or found[2], bool(found[1]), re.findall(r"--(\w+)", found[3]), id=f"{page.stem}: {line.strip()[:60]}")


@functools.cache
def _known(name: str, is_recipe: bool) -> set[str]:
    done = in_process(ROOT / "recipes" / f"{name}.py", "--help") if is_recipe else captured(lambda: thinktok([name, "--help"]))
    return set(re.findall(r"--(\w+)", done.stdout))


@pytest.mark.parametrize(("name", "is_recipe", "options"), _commands())
def test_commands_of_the_pages_have_options_that_there_are(name, is_recipe, options):
    assert name == "lm-eval" or set(options) <= _known(name, is_recipe)


@pytest.mark.parametrize(
    "options",
    [
        {"stop": "learned"},
        {"stop": "fixed", "balance_coef": 0.1, "thought_entropy_target": 0.3, "beta": 0.1, "revive_every": 1, "reward_funcs": ["log_prob", "accuracy"]},
    ],
    ids=["learned", "fixed"],
)
def test_what_a_run_logs_is_explained(make_trainer, options):
    page = (ROOT / "docs" / "usage.md").read_text()
    explained = set(re.findall(r"`([\w/]+)`", "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))))
    trainer = make_trainer(max_steps=1, logging_steps=1, **options)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    of_transformers = {"epoch", "step", "grad_norm", "learning_rate", "train_loss", "mean_token_accuracy", "entropy"}
    speeds = re.compile(r"(train|eval)_(runtime|samples_per_second|steps_per_second|step_seconds)")
    logged = {re.sub("^rewards/.*", "rewards/NAME", name) for entry in trainer.state.log_history for name in entry if not speeds.fullmatch(name)}
    assert {"think_gain", "eval_gain"} <= logged
    assert {name for name in logged - of_transformers if name.removesuffix("_stderr") not in explained} == set()


def _examples(page: str) -> list[str]:
    """A page's blocks of Python as they stand, but for the name of the model."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [block.replace('"HuggingFaceTB/SmolLM2-135M"', '"tiny"').replace("max_new_tokens=64", "max_new_tokens=8") for block in blocks]


@pytest.fixture
def tiny_world(tmp_path, monkeypatch, corpus):
    """A folder with a tiny model, where runs are short and the Hub's text is the tests' own."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    questions = make_task("pointer_chasing", nodes=4, levels=[1, 2, 3], train_rows=32, test_rows=4).train
    monkeypatch.setattr("datasets.load_dataset", lambda kind, *args, **kwargs: questions if kind == "json" else corpus)
    short = {"max_steps": 2, "max_length": 48, "use_cpu": True, "bf16": False, "report_to": "none"}
    monkeypatch.setattr("hf_thinktok.ThinkTokConfig", lambda folder, **options: ThinkTokConfig(folder, **options | short))


def test_the_readme_s_examples_train_and_generate(tiny_world, capsys):
    training, use = _examples("README.md")
    space: dict = {}
    exec(training, space)
    assert space["trainer"].state.global_step == 2
    assert space["trainer"].args.packing
    capsys.readouterr()
    exec(use, {})
    with_thoughts, without = capsys.readouterr().out.split("Question: ")[1:]
    assert without.strip() in re.sub(r"<\|think_\d+\|>", "", with_thoughts)


def test_the_examples_of_the_page_on_usage_run(tiny_world):
    task, reward, generation, tokens = _examples("docs/usage.md")
    space: dict = {}
    exec(reward, space)
    space["trainer"].train()
    assert any("rewards/surprise" in entry for entry in space["trainer"].state.log_history)
    space["trainer"].save_model()
    exec(generation, space)
    exec(task, space)
    space["trainer"].train()
    assert space["trainer"].state.global_step == 2
    space["model"], space["tokenizer"] = tiny_model("llama", vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    exec(tokens, space)
    assert space["vocabulary"].num_tokens == 32


def test_the_metric_s_example_runs(monkeypatch):
    (metric,) = _examples("docs/evaluation.md")
    monkeypatch.chdir(ROOT)
    space = {"with_thoughts": [-1.0, -2.0, -1.5, -2.5], "without": [-1.5, -2.5, -2.0, -3.0], "document_ids": [0, 0, 1, 1]}
    exec(metric.replace("think_gain.compute", "found = think_gain.compute"), space)
    assert space["found"]["think_gain"] > 0
    assert set(space["found"]) >= {"think_gain", "low", "high"}


def test_the_help_of_an_option_is_what_the_docstring_says():
    helps = {entry.name: entry.metadata["help"] for entry in dataclasses.fields(ThinkTokConfig) if entry.name in ThinkTokConfig.__annotations__}
    assert [name for name, told in helps.items() if len(told) < 12] == []
    assert helps["top_p"] == helps["temperature"] != helps["beta"], "several are told of at once"
    assert helps["think_cost"].endswith("A schedule: a value, or start, end, steps (and the step it begins at).")
    told = " ".join(in_process(ROOT / "recipes" / "pretrain_think.py", "--help").stdout.split())
    assert all(" ".join(helps[name].split()[:4]) in told for name in ("fork_positions", "thoughts", "freeze"))


def test_defaults_are_those_of_the_docstring():
    said = re.findall(r"(\w+) \([^()]*defaults to `([^`]+)`\)", ThinkTokConfig.__doc__)
    assert len(said) > 50
    for name, default in said:
        assert default_of(ThinkTokConfig, name) == ast.literal_eval(default), name
