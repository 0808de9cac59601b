"""A report shows what was measured, in a real browser, and an inspected text is what the model says of ordinary rows."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, captured
from models import CORPUS, save_tiny, tiny_model, tiny_tokenizer, tokenizer_of_kind, with_own_code
from plain_rows import thinker
from rich.console import Console

from hf_thinktok import add_thinking_tokens
from hf_thinktok.cli import main
from hf_thinktok.evaluation import evaluate_thinking
from hf_thinktok.evaluation.inspection import InspectedToken, inspect_text, print_inspection
from hf_thinktok.report import Run, as_cells, for_page, inspect_texts, write_page, write_report
from hf_thinktok.report.charts import as_image, draw_costs, draw_curves, draw_intervals
from hf_thinktok.results import environment, run_table

TEXT = CORPUS[0] + ' <b>& "quoted"</b> </script><script>window.broken = true</script>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder: a model, its results and its log."""
    path = tmp_path_factory.mktemp("run")
    save_tiny(path, think_tokens=4)
    (path / "data.jsonl").write_text("\n".join(json.dumps({"text": f"{TEXT} {i}"}) for i in range(8)))
    log = [{"step": step, "loss": 4 - step / 10, "think_length": step / 20} for step in range(1, 6)]
    (path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    results = {
        "bits_per_token": {"base": 5.0, "no_think": 4.5, "think": 4.25, "random_thought": 4.625}, "gain": 0.25, "gain_stderr": 0.0625,
        "gain_over_random": 0.375, "gain_over_random_stderr": 0.125, "mean_think_length": 1.5, "steps_per_second": 0.5, "documents": 40, "judged_tokens": 64,
        "config": {"data_files": [str(path / "data.jsonl")], "held_out_documents": 4, "max_length": 32}, **environment(),
    }  # fmt: skip
    (path / "results.json").write_text(json.dumps(results))
    return path


def test_names_are_no_formulas_and_every_run_is_in_the_legend(monkeypatch):
    drawn = []
    monkeypatch.setattr("hf_thinktok.report.charts.as_image", lambda figure: drawn.append(figure) or as_image(figure))
    gain = {"bits_per_token": 0.1, "low": 0.0, "high": 0.2}
    names = ["f_$1_$2", "_baseline", "$x$"]
    assert draw_costs([(name, 1.0, gain) for name in names]).startswith("data:image")
    assert [text.get_text().strip() for text in drawn[0].axes[0].get_legend().get_texts()] == names
    assert draw_intervals(dict.fromkeys(names, gain), "bits").startswith("data:image")
    assert draw_curves({name: [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}] for name in names}).startswith("data:image")
    assert [text.get_text().strip() for text in drawn[2].legends[0].get_texts()] == names


def test_places_that_are_equally_uncertain_each_have_their_interval(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr("hf_thinktok.report.draw_intervals", lambda gains, label: drawn.append(gains))
    model, _ = thinker()
    found = evaluate_thinking(model, tiny_tokenizer(), CORPUS[:4], num_forks=4, num_samples=1, max_think_length=2).summary()
    found["by_entropy"] = [bucket | {"mean_entropy_bits": 0.04} for bucket in found["by_entropy"]]
    Run(folder, {"evaluation": found} | environment()).page(0)
    assert [len(gains) for gains in drawn if "bits of entropy" in next(iter(gains))] == [4]


@torch.no_grad()
def test_a_model_that_thinks_everywhere_has_no_gate_to_show(tmp_path, capsys):
    """With given lengths it was taught nothing, and says where nothing would be thought."""
    model, _ = thinker(scale=1.0)
    model.config.thinktok |= {"stop": "fixed"}
    found = inspect_text(model, tiny_tokenizer(), CORPUS[1], max_length=12, max_think_length=2)
    assert all(token.gate == 1.0 and token.own == token.after for token in found)
    print_inspection("a", found)
    assert "where it wants to" not in capsys.readouterr().out
    for name, one in (("fixed", found), ("learned", [replace(token, own=0.0) for token in found])):
        write_page(
            tmp_path / f"{name}.html", [{"name": "a", "number": 0, "texts": [for_page(one, tiny_tokenizer(), CORPUS[1]) | {"title": "a"}], "settings": ""}]
        )
        assert ("where it wants to think" in (tmp_path / f"{name}.html").read_text()) is (name == "learned")


@torch.no_grad()
def test_an_inspected_blind_model_speaks_from_its_thought_alone():
    model, vocabulary = thinker(scale=1.0)
    model.config.thinktok |= {"blind": True}
    ids = tiny_tokenizer()(CORPUS[1])["input_ids"][:12]
    found = inspect_text(model, tiny_tokenizer(), CORPUS[1], max_length=12, max_think_length=2)
    for place in (0, 5, 10):
        thought = [vocabulary.first_id + z for z in found[place].thought]
        logits = type(model).forward(model, input_ids=torch.tensor([thought]), use_cache=False).logits[0, -1, : vocabulary.first_id].float()
        assert found[place].after == pytest.approx(logits.log_softmax(-1)[ids[place + 1]].item(), abs=1e-4)


@pytest.mark.parametrize("length", [1, 3])
@torch.no_grad()
def test_an_inspected_text_is_scored_as_ordinary_rows(length):
    model, vocabulary = thinker(scale=1.0)
    tokenizer = tiny_tokenizer()
    found = inspect_text(model, tokenizer, CORPUS[1], max_length=20, max_think_length=length, top=3)
    ids = tokenizer(CORPUS[1])["input_ids"][:20]
    assert len(found) == 19
    assert "".join(token.text for token in found) in CORPUS[1]

    def logits_of(row: list[int]) -> torch.Tensor:
        return type(model).forward(model, input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].float()

    def check(pairs, logps):
        chosen = logps.exp().topk(3)
        assert [word for word, _ in pairs] == [tokenizer.decode([i]) for i in chosen.indices.tolist()]
        np.testing.assert_allclose([p for _, p in pairs], chosen.values, atol=1e-5)

    first, guard = vocabulary.first_id, vocabulary.guard_id
    for place in (0, 7, 18):
        token, row, total, stay = found[place], ids[: place + 1], 0.0, 1.0
        weighted = []
        for depth in range(length + 1):
            logits = logits_of(row)
            real = logits[:first].log_softmax(-1)
            gate = logits[first:guard].logsumexp(-1).sub(logits[:first].logsumexp(-1)).sigmoid().item() if depth < length else 0.0
            weighted.append(stay * (1 - gate) * real[ids[place + 1]].exp().item())
            if depth == 0:
                assert token.gate == pytest.approx(gate, abs=1e-5)
                assert token.before == pytest.approx(real[ids[place + 1]].item(), abs=1e-4)
                check(token.top_before, real)
            if depth == length:
                assert token.after == pytest.approx(real[ids[place + 1]].item(), abs=1e-4)
                check(token.top_after, real)
                break
            thinking = logits[first:guard].log_softmax(-1)
            best = int(thinking.argmax())  # the likeliest
            assert token.thought[depth] == best
            total, stay, row = total + thinking[best].item(), stay * gate, [*row, first + best]
        assert token.thought_logp == pytest.approx(total, abs=1e-4)
        assert token.own == pytest.approx(np.log(sum(weighted)), abs=1e-4)


@pytest.mark.parametrize("kind", ["bytes", "prepend", "metaspace"])
def test_inspected_tokens_are_the_text(kind):
    """Whatever a tokenizer does to spaces at the begin of a text, and to characters of several tokens."""
    tokenizer = tokenizer_of_kind(kind)
    model = tiny_model(vocab_size=len(tokenizer))
    add_thinking_tokens(model, tokenizer, 4)
    text = "é a café on a mat, 日本 \N{ROBOT FACE} a"
    inspected = inspect_text(model, tokenizer, text, top=len(tokenizer) - 5)
    shown = for_page(inspected, tokenizer, text)
    assert shown["first"] + "".join(token["text"] for token in shown["tokens"]) == text
    assert all(token.text in dict(token.top_before) for token in inspected if token.text)


def test_tokens_are_no_markup():
    """Mistral's begin and end of an instruction are tags to rich."""
    console = Console(record=True, width=200)
    print_inspection("[INST]", [InspectedToken("[/INST]", [0], -0.1, 0.5, -1.0, -0.5, -0.6, [], [])], console)
    text, table = console.export_text().split("Where thinking does most")
    assert "[INST][/INST]" in text
    assert "[/INST]" in table


def test_without_text_or_thinking_tokens_there_is_nothing_to_inspect(folder):
    with pytest.raises(ValueError, match="fewer than two tokens"):
        inspect_text(thinker()[0], tiny_tokenizer(), "")
    with pytest.raises(ValueError, match="no thinking tokens"):
        inspect_text(tiny_model(), tiny_tokenizer(), CORPUS[0])


def test_tables_of_the_terminal_are_those_of_the_page(folder):
    results = json.loads((folder / "results.json").read_text())
    cells = as_cells(run_table(results))
    assert cells["rows"][2] == [("trained, thinking", "left"), ("4.2500", "right")]
    write_report([Run.read(folder, documents=0, max_length=16)], folder / "plain.html")
    page = (folder / "plain.html").read_text()
    for _, cell in (row for row in cells["rows"]):
        assert f">{cell[0]}<" in page
    assert "predicts better with its thoughts than without them. They do better than random ones" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)  # nothing from elsewhere


def test_whatever_a_text_or_a_name_holds_is_shown_and_not_run(tmp_path):
    nasty = "<img src=x onerror=alert(1)></script>"
    token = InspectedToken(nasty, [1], -1.0, 0.5, -1.0, -2.0, -1.5, [(nasty, 0.5)], [(nasty, 0.5)])
    write_page(
        tmp_path / "page.html", [{"name": nasty, "number": 0, "texts": [{"title": nasty, "first": nasty, "tokens": [asdict(token)]}], "settings": nasty}]
    )
    assert "<img" not in (tmp_path / "page.html").read_text()


def test_several_runs_make_one_page(folder, tmp_path):
    model, tokenizer = thinker(scale=1.0)[0], tiny_tokenizer()
    for name, length in (("short", 1), ("long", 2)):
        found = evaluate_thinking(model, tokenizer, [{"text": text} for text in CORPUS], num_forks=3, num_samples=1, max_think_length=length, max_length=32)
        (tmp_path / f"{name}.json").write_text(json.dumps({"evaluation": found.summary(), "model": name, **environment()}, default=float))
    assert (
        main(["report", str(folder), str(tmp_path / "short.json"), str(tmp_path / "long.json"), "--documents", "0", "--output", str(tmp_path / "r.html")]) == 0
    )
    page = (tmp_path / "r.html").read_text()
    assert page.count("<section>") == 4  # three runs, and what they cost
    assert "What thinking costs and brings" in page


def test_what_thinking_costs_is_drawn_of_every_evaluation(tmp_path, monkeypatch):
    """Of comparisons with the same arms and seeds, and of files of one name; with thoughts as the run is judged by them, of given length where it has one."""
    paths = [tmp_path / folder / "found.json" for folder in ("a", "b")]
    found = json.loads((ROOT / "docs" / "results" / "quickstart_eval.json").read_text())
    for path, stop in zip(paths, ("learned", "fixed"), strict=True):
        found["evaluation"]["settings"]["stop"] = stop
        path.parent.mkdir()
        path.write_text(json.dumps(found))
    comparisons = [ROOT / "docs" / "results" / f"compare_{name}.json" for name in ("gsm8k", "wikitext")]
    drawn = []
    monkeypatch.setattr("hf_thinktok.report.draw_costs", lambda points: drawn.extend(points) or draw_costs(points))
    runs = [Run.read(path, documents=0, max_length=16) for path in (*paths, *comparisons)]
    write_report(runs, tmp_path / "report.html")
    gains, length = found["evaluation"]["gains"], found["evaluation"]["settings"]["max_think_length"]
    assert drawn[0] == ("a/found", found["evaluation"]["mean_think_length"], gains["think over no_think"])
    assert drawn[1] == ("b/found", length, gains["always over no_think"])
    drawn = [name for name, *_ in drawn]
    assert len(set(drawn)) == 14
    assert {"compare_gsm8k: think, seed 0", "compare_wikitext: think, seed 0"} < set(drawn)
    page = (tmp_path / "report.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in ("a/found", "b/found", "compare_gsm8k"))
    assert "a/found: where it wants to, by how uncertain" in page
    assert "b/found: a thought everywhere, by how uncertain" in page


def test_text_that_cannot_be_read_is_said_and_the_rest_is_shown(folder, tmp_path):
    results = json.loads((folder / "results.json").read_text())
    results["config"]["data_files"] = ["/nowhere/data.jsonl"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report([Run.read(tmp_path, documents=1, max_length=16)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "The text is not shown" in page
    assert "4.2500" in page


def test_texts_are_inspected_anew_where_they_or_the_weights_changed(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    texts = lambda documents, length: Run.read(tmp_path, documents, length).texts
    one, two = texts(1, 16), texts(2, 24)
    assert [len(text["tokens"]) for text in one + two] == [15, 23, 23]
    monkeypatch.setattr("hf_thinktok.report.inspect_texts", lambda *_: pytest.fail("inspected again"))
    assert texts(2, 24) == json.loads(json.dumps(two))
    monkeypatch.undo()
    model = tiny_model(vocab_size=len(tiny_tokenizer()), seed=1)
    add_thinking_tokens(model, tiny_tokenizer(), 4)
    model.save_pretrained(tmp_path)
    assert texts(2, 24)[0]["tokens"][0]["before"] != two[0]["tokens"][0]["before"]


def test_a_run_is_shown_where_its_folder_cannot_be_written_to(folder, tmp_path, monkeypatch):
    def refuse(path, _):  # root may write anywhere
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("hf_thinktok.report.write_json", refuse)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("inspection.json"))
    run = Run.read(tmp_path, documents=1, max_length=16)
    assert [len(text["tokens"]) for text in run.texts] == [15]
    assert not run.note


def test_curves_of_a_run_with_checkpoints_are_drawn(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    run = Run.read(tmp_path, documents=0, max_length=16)
    assert [len(log) for log in run.logs.values()] == [5]
    assert [title for title, _ in run.page(0)["pictures"]] == ["Training"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report", "nowhere"], "There is no nowhere"),
        (["report", "{}/other.json"], "other.json is of another kind"),
        (["inspect", "{}", " "], "The prompt is empty"),
        (["inspect", "{}", "a", "--file", "b"], "not both"),
        (["inspect", "nowhere", "text"], "neither a folder nor a Hub repository"),
        (["inspect", "{}", "some text", "--max_think_length", "255"], "max_think_length=255 leaves no room"),
        (["inspect", "{}", "some text", "--output", "{}"], "is a folder: name a file"),
        (["generate", "{}", "some text", "--seed", "5000000000"], "must be a whole number, 0 to 4294967295"),
    ],
)
def test_wrong_words_are_told_in_a_sentence(folder, words, sentence):
    (folder / "other.json").write_text(json.dumps({"cells": []}))
    done = captured(lambda: main([word.format(folder) for word in words]))
    assert done.returncode == 2
    assert sentence in done.stderr


def test_weights_that_are_not_whole_are_told_in_a_sentence(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for command in ("inspect", "generate"):
        assert main([command, str(tmp_path), "some text"]) == 2
        assert f"{tmp_path} cannot be loaded" in capsys.readouterr().err
    assert "The text is not shown" in Run.read(tmp_path, documents=1, max_length=16).note


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def page(folder):
    """The report of the folder, opened in Chromium."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("there is no Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    assert main(["report", str(folder), "--documents", "1", "--max_length", "24", "--output", str(folder / "report.html")]) == 0
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        context = browser.new_context(offline=True, color_scheme="light")
        opened = context.new_page()
        opened.problems = []
        opened.on("pageerror", lambda error: opened.problems.append(str(error)))
        opened.goto((folder / "report.html").as_uri())
        yield opened
        browser.close()


def test_hovering_a_token_shows_its_thought(page, folder):
    token = json.loads((folder / "inspection.json").read_text())["texts"][0]["tokens"][5]
    page.locator(".token").nth(5).hover()
    panel = page.locator(".panel").inner_text()
    assert " ".join(map(str, token["thought"])) in panel
    assert f"{100 * token['top_before'][0][1]:.1f} %" in panel
    assert page.locator(".token[aria-selected=true]").count() == 1
    assert not page.problems


def test_the_text_is_shown_as_it_is(page, folder):
    text = page.locator(".text").inner_text()
    inspected = json.loads((folder / "inspection.json").read_text())["texts"][0]
    assert "".join(text.split()) == "".join((inspected["first"] + "".join(token["text"] for token in inspected["tokens"])).split())
    assert page.evaluate("window.broken") is None


def test_keys_move_through_the_text(page):
    page.locator(".token").first.focus()
    for key, index in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 22), ("Home", 0)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.i") == str(index)
        assert page.locator(".token[aria-selected=true]").get_attribute("data-i") == str(index)


def test_a_thought_everywhere_is_another_colour_and_figure(page):
    page.locator(".token").nth(3).hover()
    before = page.locator(".panel").inner_text()
    strength = "[...document.querySelectorAll('.token')].map(token => token.style.getPropertyValue('--much')).join()"
    own = page.evaluate(strength)
    page.get_by_role("button", name="a thought everywhere").click()
    assert page.evaluate(strength) != own
    assert page.locator(".panel").inner_text() != before
    page.get_by_role("button", name="where it wants to think").click()
    assert page.evaluate(strength) == own


def test_light_and_dark(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) == "rgb(13, 17, 23)"
    page.get_by_role("button", name="switch between light and dark").click()
    assert page.evaluate(ground) == "rgb(255, 255, 255)"


def test_the_inspection_is_printed(folder, capsys):
    assert main(["inspect", str(folder), CORPUS[0], "--max_length", "12", "--output", str(folder / "one.html")]) == 0
    printed = capsys.readouterr().out
    text = printed.split("Where thinking does most")[0].strip()
    assert text
    assert CORPUS[0].startswith(text)
    assert "Over 11 tokens thinking saves" in printed
    assert "likeliest after the thought" in (folder / "one.html").read_text()


def test_what_thinking_saves_is_printed():
    console = Console(record=True, width=200)
    tokens = [InspectedToken(text, [0], -0.1, 0.5, -1.0, *logps, [], []) for text, logps in (("b", (-0.5, -0.6)), ("c", (-2.0, -1.0)))]
    print_inspection("a", tokens, console)
    assert "Over 2 tokens thinking saves +0.2885 bits a token where it wants to, -0.3607 everywhere." in console.export_text()


def test_text_of_a_model_with_code_of_its_own_is_shown_where_it_is_trusted(tmp_path):
    folder = Path(with_own_code(save_tiny(tmp_path / "own", think_tokens=4)))
    with pytest.raises(ValueError, match="give --trust_remote_code"):
        inspect_texts(folder, ["the cat sat"], 16)
    (text,) = inspect_texts(folder, ["the cat sat"], 16, trust_remote_code=True)
    assert text["tokens"]
