"""Watching and steering thoughts in plain `model.generate`: budgets, the streamer, the command line."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from commands import ENVIRONMENT
from models import save_tiny, tiny_model, tiny_tokenizer, with_own_code
from peft import LoraConfig, get_peft_model
from plain_rows import thinker
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from hf_thinktok import add_thinking_tokens
from hf_thinktok.cli import main
from hf_thinktok.forks import marker_ids
from hf_thinktok.generation import StopsInText, ThinkingBudget, ThinkingStreamer, think_while_reading
from hf_thinktok.peft import save_adapter
from hf_thinktok.tokens import ThinkingVocabulary

ALWAYS = 1e4  # a bias in nats that decides alone


def make_model(think_mass: float = 0.6):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    model = tiny_model("llama", vocab_size=len(tokenizer), tie=False, seed=1)
    return model, tokenizer, add_thinking_tokens(model, tokenizer, 4, think_mass=think_mass)


@pytest.fixture(scope="module")
def parts():
    return make_model()


def encode(tokenizer, prompts):
    return tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)


def generate(parts, budget=None, prompts=("the cat", "3 + 4 = 7, and so", "def"), seed=0, **options):
    """What the model adds to each prompt of a left-padded batch, up to its end token; `ids` replaces the prompts."""
    model, tokenizer, _ = parts
    ids = options.pop("ids", None)
    inputs = encode(tokenizer, list(prompts)) if ids is None else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(seed)
    options = {"do_sample": True, "max_new_tokens": 60} | options
    output = model.generate(**inputs, **options, logits_processor=[budget] if isinstance(budget, LogitsProcessor) else budget)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]


def runs(row, vocabulary):
    """Lengths of the thoughts before each real token, and of one that the row ends with."""
    lengths, length = [], 0
    for token in row:
        length = length + 1 if token in vocabulary.ids else (lengths.append(length), 0)[1]
    return lengths, length


def numbers(row, vocabulary):
    """The thoughts of a row, as 0 to N-1."""
    return [token - vocabulary.first_id for token in row if token in vocabulary.ids]


def thinks(row, vocabulary):
    return len(numbers(row, vocabulary))


# --- thinking needs none of it


def test_vanilla_generate_thinks():
    parts = make_model(think_mass=0.3)
    for do_sample in (True, False):
        assert all(thinks(row, parts[2]) > 0 for row in generate(parts, do_sample=do_sample, prompts=["the cat sat"]))


# --- the budget


def test_no_bounds_and_no_bias_change_nothing(parts):
    assert generate(parts, ThinkingBudget(parts[2])) == generate(parts)
    scores = torch.randn(2, 384)
    torch.testing.assert_close(ThinkingBudget(parts[2])(torch.zeros(2, 3, dtype=torch.long), scores), scores, rtol=0, atol=0)


def test_thoughts_are_as_long_as_the_bounds_allow(parts):
    vocabulary = parts[2]
    free = [max(runs(row, vocabulary)[0]) for row in generate(parts)]
    assert max(free) > 3, "the bound would not bind"
    for low, high in ((0, 3), (1, 3), (2, 2), (0, 0), (2, None)):
        for row in generate(parts, ThinkingBudget(vocabulary, min_think_length=low, max_think_length=high)):
            complete, last = runs(row, vocabulary)
            assert min(complete) >= low
            assert max([*complete, last]) <= (math.inf if high is None else high)


def test_the_total_counts_the_new_thoughts_of_each_sequence(parts):
    vocabulary = parts[2]
    thoughtful = torch.tensor([[310, *list(vocabulary.ids) * 2, 303]])
    for prompt in ({"ids": thoughtful}, {}):
        for row in generate(parts, ThinkingBudget(vocabulary, max_total_think=5, think_bias=3.0), **prompt):
            assert thinks(row, vocabulary) == 5
    for row in generate(parts, ThinkingBudget(vocabulary, min_think_length=2, max_think_length=2, max_total_think=5)):
        assert runs(row, vocabulary)[0][:4] == [2, 2, 1, 0], "where nothing is left, the model speaks"


def test_one_budget_serves_one_generation_after_another(parts):
    vocabulary = parts[2]
    budget = ThinkingBudget(vocabulary, max_total_think=5, think_bias=3.0)
    rows = generate(parts, budget)
    assert generate(parts, budget) == rows, "the same prompts"
    assert [thinks(row, vocabulary) for row in generate(parts, budget, prompts=["a thought is", "a"])] == [5, 5], "another batch"
    first = generate(parts, budget, ids=torch.tensor([[310]]), max_new_tokens=10)[0]
    chat = torch.tensor([[310, *first, 65, 66]])
    assert thinks(first, vocabulary) == 5
    assert thinks(generate(parts, budget, ids=chat)[0], vocabulary) == 5, "a conversation that goes on has new thoughts"
    budget.reset()
    whole = torch.tensor([[310, *generate(parts, budget, ids=torch.tensor([[310]]), max_new_tokens=10)[0]]])
    assert thinks(generate(parts, budget, ids=whole)[0], vocabulary) == 0, "what was returned looks like its own next step"
    budget.reset()
    assert thinks(generate(parts, budget, ids=whole)[0], vocabulary) == 5


def test_the_total_holds_for_beams_and_for_assisted_decoding(parts):
    vocabulary = parts[2]
    rows = generate(parts, ThinkingBudget(vocabulary, max_think_length=3, max_total_think=4, think_bias=3.0), num_beams=3)
    assert [thinks(row, vocabulary) for row in rows] == [4, 4, 4]
    ids = torch.tensor([[310, 303, 317, 310, 303, 317]])
    budget = ThinkingBudget(vocabulary, max_total_think=4, think_bias=3.0, prompt_length=ids.shape[1])
    assert thinks(generate(parts, budget, ids=ids, prompt_lookup_num_tokens=3, do_sample=False)[0], vocabulary) == 4


def test_a_thought_at_the_end_of_the_prompt_goes_on(parts):
    vocabulary = parts[2]
    prompt = torch.tensor([[310, *vocabulary.ids[:2]]])
    assert runs(generate(parts, ThinkingBudget(vocabulary, 3, 3), ids=prompt)[0], vocabulary)[0][:3] == [1, 3, 3]


def test_a_large_bias_always_or_never_thinks_within_the_bounds(parts):
    vocabulary = parts[2]
    for bias, budget, expected in ((ALWAYS, {"max_think_length": 3}, 3), (-ALWAYS, {"min_think_length": 1, "max_think_length": 3}, 1), (-ALWAYS, {}, 0)):
        for row in generate(parts, ThinkingBudget(vocabulary, think_bias=bias, **budget)):
            assert set(runs(row, vocabulary)[0]) == {expected}
    assert all(thinks(row, vocabulary) == len(row) == 60 for row in generate(parts, ThinkingBudget(vocabulary, think_bias=ALWAYS)))


def test_bias_multiplies_the_odds_of_thinking(parts):
    vocabulary, scores = parts[2], torch.randn(2, 384)

    def log_odds(scores):
        think = scores[:, vocabulary.ids].logsumexp(-1)
        return think - torch.cat([scores[:, : vocabulary.first_id], scores[:, vocabulary.guard_id :]], -1).logsumexp(-1)

    before = scores.clone()
    after = ThinkingBudget(vocabulary, think_bias=1.5)(torch.zeros(2, 3, dtype=torch.long), scores)
    torch.testing.assert_close(log_odds(after) - log_odds(scores), torch.full((2,), 1.5))
    torch.testing.assert_close(scores, before, rtol=0, atol=0, msg="the model's own logits are not written to")


def test_without_sampling_the_gate_says_whether_to_think(parts):
    """One of many thoughts may be less likely than a word where all of them together are likelier than all words."""
    vocabulary, ids = parts[2], torch.zeros(3, 2, dtype=torch.long)
    scores = torch.full((3, 384), -20.0)
    scores[:, 7] = 0.0
    for row, nats in enumerate((-1.0, -1.6, -math.inf)):  # four thoughts, e^-1 and e^-1.6 each
        scores[row, list(vocabulary.ids)] = nats
    assert scores.argmax(-1).tolist() == [7, 7, 7]
    found = [ThinkingBudget(vocabulary, by_gate=True, **bounds)(ids, scores).argmax(-1) for bounds in ({}, {"max_think_length": 0}, {"min_think_length": 1})]
    assert [vocabulary.is_thought(row).tolist() for row in found] == [[True, False, False], [False] * 3, [True] * 2 + [False]]
    assert not ThinkingBudget(vocabulary, by_gate=True)(ids, scores)[:2, 7].isfinite().all()


def test_the_end_waits_for_the_thought_as_well(parts):
    class Ends(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, parts[1].eos_token_id] += ALWAYS
            return scores

    for row in generate(parts, [Ends(), ThinkingBudget(parts[2], min_think_length=2)]):
        assert len(row) == 3
        assert runs(row, parts[2]) == ([2], 0)


def test_suppressed_rows_stay_suppressed(parts):
    """The guard's and the padding rows have -inf from the generation config; neither bias nor masks may bring them back."""
    model, tokenizer, vocabulary = parts
    budget = ThinkingBudget(vocabulary, min_think_length=1, think_bias=5.0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
    output = model.generate(**encode(tokenizer, ["the"]), logits_processor=[budget], **options)
    assert torch.stack(output.scores)[..., vocabulary.guard_id :].eq(-math.inf).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": None}, "must be a ThinkingVocabulary"),
        ({"min_think_length": -1}, "min_think_length must be"),
        ({"max_think_length": 1.5}, "max_think_length must be"),
        ({"max_total_think": -1}, "max_total_think must be"),
        ({"prompt_length": -1}, "prompt_length must be"),
        ({"min_think_length": 3, "max_think_length": 2}, "at least 3 and at most 2"),
        ({"min_think_length": 3, "max_total_think": 2}, "at least 3 .* does not fit into 2"),
        ({"think_bias": math.inf}, "bias must be a number of nats, 10,000 at most; got inf"),
        ({"think_bias": 1e39}, "bias must be a number of nats, 10,000 at most"),
    ],
)
def test_a_wrong_budget_is_refused(parts, arguments, message):
    with pytest.raises(ValueError, match=message):
        ThinkingBudget(**{"vocabulary": parts[2]} | arguments)


# --- stop strings


def test_stop_strings_are_found_in_what_is_said_and_not_in_thoughts(parts):
    model, tokenizer, vocabulary = parts
    thoughts = list(vocabulary.ids)[:2]
    sat, on = tokenizer(" sat", add_special_tokens=False)["input_ids"], tokenizer(" on", add_special_tokens=False)["input_ids"]
    stops = StopsInText(tokenizer, ["sat on", ">"], vocabulary)

    def stopped(*rows):
        width = max(map(len, rows))
        padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        return stops(padded, None).tolist()

    assert stopped([*sat, *thoughts, *on], [*sat, *thoughts], [*on, *thoughts, *sat]) == [True, False, False]
    assert stopped([*sat, *on, *thoughts]) == [False], "a prompt may end with it, and be thought behind"
    assert stopped([*sat, *on], [*on, *on]) == [True, False]
    assert stopped(thoughts) == [False], "nothing is said yet"
    behind = StopsInText(tokenizer, "sat on", vocabulary, prompt_length=len(sat))
    assert behind(torch.tensor([[*sat, *on]]), None).tolist() == [False], "half of it is the prompt's"
    assert behind(torch.tensor([[*sat, *sat, *thoughts, *on]]), None).tolist() == [True]
    row = generate(parts, ThinkingBudget(vocabulary, 1, 1), prompts=("the cat",), stopping_criteria=[StopsInText(tokenizer, "e", vocabulary)])[0]
    said = tokenizer.decode([token for token in row if not vocabulary.is_thought(torch.tensor(token))])
    assert said.count("e") == 1
    assert said.endswith("e") or "e" in tokenizer.decode(row[-1:])


# --- the streamer


def stream(tokenizer, ids, prompt=(310, 303), **options):
    """What the streamer prints for a prompt and ids that come one by one, on a narrow console."""
    screen = io.StringIO()
    streamer = ThinkingStreamer(tokenizer, console=Console(file=screen, width=20), **options)
    for value in (torch.tensor([list(prompt)]), *(torch.tensor([i]) for i in ids)):
        streamer.put(value)
    streamer.end()
    return screen.getvalue()


def mixed(tokenizer, vocabulary, text):
    """The text's ids with thoughts everywhere, also inside words and characters, and other special tokens."""
    ids, thoughts = [], list(vocabulary.ids)
    for n, token in enumerate(tokenizer(text)["input_ids"]):
        ids += thoughts[: n % 3] + [token] + [1] * (n % 2)
    return [*ids, thoughts[3]]


TEXT = "the cat said:\n\tça va, naïve 東京 café? 🙂👩‍🚀 and looked at the moon. \ufffd ok\r\n  "


def test_streamed_text_is_the_decoded_text(parts):
    _, tokenizer, vocabulary = parts
    ids = mixed(tokenizer, vocabulary, TEXT)
    assert stream(tokenizer, ids, thoughts="hide") == TEXT + "\n"
    shown = stream(tokenizer, ids)
    assert re.sub("‹[0-3 ]+›", "", shown) == TEXT + "\n"
    assert [int(i) for thought in re.findall("‹(.*?)›", shown) for i in thought.split(" ")] == numbers(ids, vocabulary)
    assert stream(tokenizer, ids, prompt=ids[:20], thoughts="hide", skip_prompt=False) == tokenizer.decode(ids[:20] + ids, skip_special_tokens=True) + "\n"
    cut = tokenizer("ok 🙂")["input_ids"][:-1]
    assert stream(tokenizer, cut) == tokenizer.decode(cut) + "\n" == "ok \ufffd\n", "the end of a generation may cut a character"


def test_thoughts_stand_where_they_were_thought(parts):
    _, tokenizer, vocabulary = parts
    the, cat = tokenizer("the cat")["input_ids"][0], tokenizer("the cat")["input_ids"][1:]
    a, b, *_ = vocabulary.ids
    assert stream(tokenizer, [a, the, b, a, b, *cat, b]) == "‹0›the‹1 0 1› cat‹1›\n"


def test_text_of_a_tokenizer_with_leading_spaces():
    """As in Llama 2: decoding drops the first space, and characters without a token of their own are spelled in bytes."""
    pieces = ["<unk>", "▁the", "▁cat", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    ids = [1, 2, 3, 4, *(5 + byte for byte in "é🙂".encode()), 2, 0, 1]
    assert stream(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True) + "\n" == "the cats é🙂 cat the\n"


def test_a_generation_is_streamed_in_colour(parts):
    model, tokenizer, vocabulary = parts
    screen = io.StringIO()
    streamer = ThinkingStreamer(tokenizer, vocabulary, console=Console(file=screen, force_terminal=True, color_system="standard"))
    for seed in (0, 1):
        screen.seek(0)
        screen.truncate()
        row = generate(parts, ThinkingBudget(vocabulary, max_think_length=3), ["the moon"], seed, streamer=streamer)[0]
        pieces = re.findall(r"\x1b\[(3[46])m(.*?)\x1b\[0m", screen.getvalue(), re.DOTALL)
        assert "".join(text for colour, text in pieces if colour == "34") == tokenizer.decode(row, skip_special_tokens=True) + "\n"
        assert [int(number) for colour, text in pieces if colour == "36" for number in re.findall(r"\d", text)] == numbers(row, vocabulary)
        assert 0 < thinks(row, vocabulary) < len(row)


def test_the_streamer_refuses_batches_and_unknown_modes(parts):
    _, tokenizer, _ = parts
    with pytest.raises(ValueError, match="batch of 2"):
        ThinkingStreamer(tokenizer).put(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="show, hide; got 'loud'"):
        ThinkingStreamer(tokenizer, thoughts="loud")


# --- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("thinker")
    model, tokenizer, _ = make_model()
    # What the command has to get along with, as it streams.
    model.generation_config.update(num_beams=2, stop_strings=["@@@"], return_dict_in_generate=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: exit code, standard output, standard error."""
    verbosity = transformers_logging.get_verbosity()

    def run(*argv):
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield run
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def test_the_command_in_a_process_of_its_own(folder, tmp_path):
    def start(path, characters="utf-8"):
        options = ["--device", "cpu", "--max_new_tokens", "12", "--min_think_length", "2", "--max_think_length", "2", "--seed", "1"]
        environment = os.environ | ENVIRONMENT | {"PYTHONIOENCODING": characters}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([sys.executable, "-m", "hf_thinktok.cli", "generate", path, *options], encoding="utf-8", env=environment, **pipes)

    good, bad, narrow = start(folder), start(tmp_path / "missing"), start(folder, "ascii")  # at the same time: most of it is importing
    output, error = good.communicate("the cat sat\n", timeout=120)
    assert good.returncode == 0, error
    assert len(re.findall(r"‹\d \d›", output)) == 4
    assert re.fullmatch(r"4 tokens spoken, 8 thought, [\d.]+ per second\n", error)
    output, error = bad.communicate("the cat sat\n", timeout=120)
    assert (bad.returncode, output) == (2, "")
    assert re.fullmatch(r"thinktok: .*missing is neither a folder nor .*\n", error)
    written, error = narrow.communicate("the cat sat\n", timeout=120)
    assert narrow.returncode == 0, error
    assert len(re.findall(r"\\u2039\d \d\\u203a", written)) == 4, "what a terminal cannot show comes as an escape"


def test_the_command_does_what_generate_does(folder, run, parts, tmp_path):
    _, tokenizer, vocabulary = parts
    common = (folder, "--device", "cpu", "--max_new_tokens", 20, "--max_think_length", 1)
    greedy = (*common, "--greedy", "--thoughts", "hide")

    def expected(ids, by_gate=True):
        budget = ThinkingBudget(vocabulary, max_think_length=1, by_gate=by_gate)
        row = generate(parts, budget, ids=torch.tensor([ids]), do_sample=False, max_new_tokens=20)[0]
        return tokenizer.decode(row, skip_special_tokens=True) + "\n"

    plain = expected(tokenizer("the cat sat")["input_ids"])
    (tmp_path / "prompt.txt").write_text("the cat sat\n", encoding="utf-8")
    assert run("generate", *greedy, "the cat sat")[:2] == run("generate", *greedy, "--file", tmp_path / "prompt.txt")[:2] == (0, plain)
    chat = expected(tokenizer("<|im_start|>user\nthe cat sat<|im_end|>\n")["input_ids"])
    assert run("generate", *greedy, "the cat sat", "--chat")[1] == chat != plain

    def sample(*options):
        return run("generate", *common, "the cat sat", "--thoughts", "hide", "--temperature", 0.7, "--seed", 3, *options)

    assert sample()[1] == sample()[1] != sample("--think_bias", 4)[1]
    likeliest = expected(tokenizer("the cat sat")["input_ids"], by_gate=False)
    assert sample("--top_k", 1)[1] == sample("--top_p", 1e-6)[1] == likeliest
    assert sample("--temperature", 1e-4)[1] == likeliest
    assert sample("--think_bias", 50, "--max_total_think", 5)[2].startswith("15 tokens spoken, 5 thought")
    assert "‹" in sample("--think_bias", 50, "--thoughts", "show")[1]
    assert "must be a number above 0.000001" in sample("--temperature", 1e-40)[2]
    assert "think_bias must be a number of nats" in sample("--think_bias", 1e39)[2]
    counts = sample("--max_new_tokens", 1000)[2]
    assert sum(map(int, re.findall(r"(\d+) (?:tokens|thought)", counts))) == 256 - 3, "it ends where the model's context ends"


def test_thoughts_while_reading_are_the_likeliest_where_they_stand(parts):
    model, tokenizer, vocabulary = parts
    ids = tokenizer("3 + 4 = 7, 2 + 5 = 7, 1 + 1 =", return_tensors="pt")["input_ids"]
    read = think_while_reading(model, ids, vocabulary, marker_ids([" ="], tokenizer), 2, do_sample=False)
    assert read[0][~vocabulary.is_thought(read[0])].tolist() == ids[0].tolist()
    before, behind = runs(read[0].tolist(), vocabulary)
    assert [length for length in before if length] == [2, 2]
    assert behind == 0, "none where the prompt ends"
    marker = tokenizer(" =", add_special_tokens=False)["input_ids"][-1]
    for place in vocabulary.is_thought(read[0]).nonzero().flatten().tolist():
        assert read[0, place - 1] == marker or vocabulary.is_thought(read[0, place - 1])
        logits = model(input_ids=read[:, :place]).logits[0, -1]
        assert logits[list(vocabulary.ids)].argmax() == read[0, place] - vocabulary.first_id
    with pytest.raises(ValueError, match="one prompt at a time and got a batch of 2"):
        think_while_reading(model, ids.expand(2, -1), vocabulary, [[marker]], 2)


def test_the_command_thinks_while_it_reads_where_it_is_told_or_was_trained_to(folder, run, tmp_path):
    greedy, prompt = ("--device", "cpu", "--max_new_tokens", 1, "--max_think_length", 0, "--greedy"), "3 + 4 = 7, 2 + 5 = 7, 1 + 1 ="
    code, told, error = run("generate", folder, *greedy, prompt, "--think_after", " =")
    assert code == 0, error
    assert re.match(r"3 \+ 4 =‹\d( \d)*› 7, 2 \+ 5 =‹\d( \d)*› 7, 1 \+ 1 =", told)
    shutil.copytree(folder, trained := tmp_path / "trained")
    config = json.loads((folder / "config.json").read_text())
    for memory, reads in {"none": False, "persistent": True}.items():  # whether thoughts stay in the text, and so in a prompt
        config["thinktok"] |= {"fork_markers": [" ="], "memory": memory}
        (trained / "config.json").write_text(json.dumps(config))
        code, said, _ = run("generate", trained, *greedy, prompt)
        assert code == 0
        assert (said == told) is reads
        assert ("‹" in said) is reads
    assert "‹" not in run("generate", folder, *greedy, prompt)[1]
    make_model(think_mass=0.02)[0].save_pretrained(trained)
    for stop, thinks in {"fixed": True, "learned": False, "sampled": False}.items():  # its gate would rather speak
        config["thinktok"]["stop"] = stop
        (trained / "config.json").write_text(json.dumps(config))
        assert ("‹" in run("generate", trained, *greedy, prompt)[1]) == thinks
    code, _, error = run("generate", folder, *greedy, prompt, "--think_after", "zebra")
    assert code == 2
    assert "None of --think_after 'zebra' ends within the prompt" in error


def test_thoughts_while_reading_end_where_the_gate_would(parts):
    """A real token that it would rather say is no part of the prompt."""
    model, tokenizer, vocabulary = parts
    ids = tokenizer("3 + 4 = 7, 2 + 5 =", return_tensors="pt")["input_ids"]
    read = think_while_reading(model, ids, vocabulary, marker_ids([" ="], tokenizer), 6, 0, do_sample=True)
    assert torch.equal(read[:, ~vocabulary.is_thought(read[0])], ids)
    torch.manual_seed(0)
    every = [[token] for token in ids[0].unique().tolist()]  # at few of them its gate is neither shut nor open
    lengths = {length for _ in range(4) for length in runs(think_while_reading(model, ids, vocabulary, every, 6, 0, top_k=50)[0].tolist(), vocabulary)[0]}
    assert len(lengths) > 2
    assert max(lengths) <= 6


def test_wrong_inputs_are_told_in_one_sentence(folder, run, tmp_path, monkeypatch):
    thoughtless = tmp_path / "thoughtless"
    thoughtless.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config.pop("thinktok")
    (thoughtless / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder, broken := tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    for argv, message in (
        ([thoughtless, "hi"], "has no thinking tokens"),
        ([tmp_path / "missing", "hi"], "is neither a folder nor a Hub repository"),
        ([tmp_path / "empty", "hi"], "cannot be loaded"),
        ([folder, ""], "The prompt is empty."),
        ([folder], "The prompt is empty."),
        ([folder, "hi", "--file", "x"], "not both"),
        ([folder, "--file", tmp_path / "missing"], "cannot be read"),
        ([folder, "--file", tmp_path / "latin"], "not text in UTF-8"),
        ([folder, "caf\udce9 hi"], "The prompt on the command line is not text in UTF-8"),
        ([broken, "hi", "--chat"], "The model's chat template does not take the prompt: no users here"),
        ([folder, "hi", "--greedy", "--top_k", 5], "leave out --top_k"),
        ([folder, "hi", "--min_think_length", 2, "--max_think_length", 1], "at least 2 and at most 1"),
        ([folder, "hi", "--device", "abacus"], "abacus is not available"),
        ([folder, "hi", "--device", "meta"], "meta is not available"),
        ([folder, "word " * 300], "no room in the model's context of 256"),
    ):
        code, output, error = run("generate", *argv)
        assert (code, output) == (2, ""), argv
        assert re.fullmatch(r"thinktok: .*\n", error), "one line"
        assert message in error
    generate_hi = ("generate", folder, "hi")
    for argv in ([], ["generate"], [*generate_hi, "--top_p", 2], [*generate_hi, "--max_new_tokens", 0], [*generate_hi, "--temperature", "nan"]):
        code, _, error = run(*argv)
        assert code == 2
        assert "error: " in error.splitlines()[-1]


@pytest.mark.parametrize("words", [["--help"], ["eval", "--seed", "x", "model"], ["push", "--help"]], ids="-".join)
def test_help_and_mistyped_options_wait_for_no_library(words):
    says_what_was_loaded = "atexit.register(lambda: print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules]))"
    code = f"import atexit, sys; {says_what_was_loaded}; from hf_thinktok.cli import main; main({words})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "usage: thinktok" in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_option(run):
    code, output, _ = run("generate", "--help")
    assert code == 0
    sampling, thinking = "max_new_tokens temperature top_p top_k greedy seed", "thoughts min_think_length max_think_length max_total_think think_bias"
    for option in f"{sampling} {thinking} chat file dtype device".split():
        assert f"--{option}" in output
    assert "generate" in run("--help")[1]


def test_an_adapter_is_read_with_its_base(folder, run, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    save_adapter(model, str(tmp_path / "adapter"))
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "merged")[0] == 0
    for command, *words in (("generate", "the cat", "--seed", 0), ("inspect", "the cat sat on")):
        adapted, merged, plain = (run(command, name, *words) for name in (tmp_path / "adapter", tmp_path / "merged", folder))
        assert adapted[0] == 0, adapted[2]
        assert adapted[1] == merged[1] != plain[1]


def test_a_model_with_code_of_its_own_is_read_where_that_is_trusted(run, tmp_path):
    base = with_own_code(save_tiny(tmp_path / "base", think_tokens=4))
    model, adapter = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True), tmp_path / "adapter"
    save_adapter(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")), str(adapter))
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    for words in (("generate", base, "the cat"), ("inspect", base, "the cat sat on"), ("merge", adapter, tmp_path / "merged")):
        code, output, error = run(*words)
        assert (code, output, len(error.splitlines())) == (2, "", 1)
        assert error.endswith("Where you trust it, give --trust_remote_code.\n")
        code, _, error = run(*words, "--trust_remote_code")
        assert code == 0, error
    assert run("generate", tmp_path / "merged", "the cat", "--trust_remote_code")[0] == 0


def test_an_adapter_whose_base_is_not_there(folder, run, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "outputs/x/merged"
    save_adapter(model, str(tmp_path / "adapter"))
    for words in (("merge", tmp_path / "adapter", tmp_path / "new"), ("generate", tmp_path / "adapter", "hi")):
        code, output, error = run(*words)
        assert (code, output, len(error.splitlines())) == (2, "", 1)
        assert "base 'outputs/x/merged' is neither a folder here nor a model on the Hub that can be read from here" in error


def test_what_cannot_be_merged(folder, run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    shutil.copytree(folder, tmp_path / "half")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.model.config.thinktok |= {"policies": "split"}
    for place in ("half", "half/speaker"):
        save_adapter(model, str(tmp_path / place))
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / place)
    (tmp_path / "half" / "adapter_model.safetensors").unlink()  # the speaker's is there
    for adapter, output, words in [
        (tmp_path / "half", tmp_path / "new", "cannot be merged into its base"),
        (tmp_path / "missing", tmp_path / "new", "is neither a folder nor a Hub repository"),
        (folder, tmp_path / "full", "exists: name a new folder"),
        (folder, tmp_path / "new", "is no adapter: it can be used as it is"),
    ]:
        code, output, error = run("merge", adapter, output)
        assert (code, output) == (2, "")
        assert error.startswith("thinktok: ")
        assert words in error
        assert len(error.splitlines()) == 1
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


def test_a_new_prompt_of_the_next_length_is_a_new_generation():
    vocabulary = ThinkingVocabulary(320, 4, 324)
    budget, scores = ThinkingBudget(vocabulary, max_total_think=2), torch.zeros(1, 384)
    used_up = lambda *ids: budget(torch.tensor([ids]), scores)[0, vocabulary.first_id].isinf().item()
    assert [used_up(5, 6), used_up(5, 6, 320), used_up(5, 6, 320, 320)] == [False, False, True]
    assert not used_up(7, 8, 320, 320, 9), "what a prompt holds is not counted"


def test_what_others_rule_out_is_not_asked_for():
    """A row without any finite score cannot be drawn from."""
    _, vocabulary = thinker()
    thinking = vocabulary.is_thought(torch.arange(vocabulary.guard_id))
    for banned, bounds in ((thinking, {"min_think_length": 2}), (~thinking, {"max_think_length": 0})):
        scores = torch.zeros(1, vocabulary.guard_id).masked_fill(banned, -torch.inf)
        allowed = ThinkingBudget(vocabulary, **bounds)(torch.tensor([[5]]), scores)
        assert torch.equal(allowed > -torch.inf, ~banned[None])


def test_a_prompt_is_read_by_the_gate_unless_sampled():
    """Plain `generate` samples where it is told to, and so does this."""
    model, vocabulary = thinker(scale=1.0)
    inputs, markers = torch.tensor([[7, 9, 5, 11, 9, 13, 9]]), [[9]]
    count = lambda *lengths: int(vocabulary.is_thought(think_while_reading(model, inputs, vocabulary, markers, *lengths)).sum())
    assert (count(2), count(0)) == (4, 0), "after the prompt's last marker there is none"
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    with torch.no_grad():  # each of many thoughts is less likely than the likeliest word, and all together are likelier than words
        head.weight.zero_()
        head.bias[:] = -20.0
        head.bias[vocabulary.first_id : vocabulary.guard_id] = 0.0
        head.bias[5] = 0.1
    assert count(2, 0) == 4
