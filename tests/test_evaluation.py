"""What is measured is what a plain model says on ordinary rows, and controls are what they say they are."""

import copy
import json
import math
import shutil
import subprocess

import evaluate
import numpy as np
import pytest
import torch
from commands import ROOT, captured
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CORPUS, save_tiny, tiny_model, tiny_tokenizer, tokenizer_of_kind
from peft import LoraConfig, PeftModel, get_peft_model
from plain_rows import thinker
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer, add_thinking_tokens
from hf_thinktok.cli import main
from hf_thinktok.engine import ReplicatedEngine
from hf_thinktok.evaluation import Evaluation, evaluate_thinking
from hf_thinktok.evaluation.inspection import inspect_text
from hf_thinktok.evaluation.intervals import ratio_interval, t_quantile
from hf_thinktok.evaluation.tables import evaluation_says, evaluation_verdict, print_evaluation
from hf_thinktok.evaluation.thinking import CONTROLS, _rows, control_sources, kind_of, pieces
from hf_thinktok.forks import choose_forks, eligible_forks
from hf_thinktok.results import as_text, read_json
from hf_thinktok.rollout import Rollout, Sampling, sample_thoughts
from hf_thinktok.text import TextArguments, load_parts, unseen_text
from hf_thinktok.tokens import GUARD
from hf_thinktok.tree import Branching

TEXT = [{"text": f"{text} {i * 7} {text[::2]}"} for i, text in enumerate(CORPUS[:6])]


@pytest.fixture
def model():
    """A model with thinking tokens that it thinks now and then, and a tokenizer."""
    return thinker(scale=1.0)[0], tiny_tokenizer()


def logps_of(model, ids: list[int]) -> torch.Tensor:
    """Of real tokens, after each place of an ordinary row."""
    logits = type(model).forward(model, input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return logits[:, : model.config.thinktok["first_id"]].log_softmax(-1)


@torch.no_grad()
def test_fillers_are_as_many_as_the_gate_says(model):
    """For one judged token their number is summed out, for three it is drawn."""
    model, tokenizer = model
    model.config.thinktok |= {"thoughts": "filler", "stop": "sampled"}
    summed, drawn = (evaluate_thinking(model, tokenizer, TEXT, num_forks=8, num_samples=64, max_think_length=2, lookahead=lookahead) for lookahead in (1, 3))
    assert drawn.lengths_F.std() > 0
    assert drawn.lengths_F.mean() == pytest.approx(summed.lengths_F.mean(), abs=0.05)
    assert set(drawn.logps) == {"no_think", "think", "think_random", "always", "random"}


@pytest.mark.parametrize("blind", [False, True], ids=["", "blind"])
@pytest.mark.parametrize("lookahead", [1, 3])
@torch.no_grad()
def test_text_and_thoughts_are_scored_as_ordinary_rows(model, lookahead, blind):
    """A blind model speaks from its thought alone, and always has one."""
    model, tokenizer = model
    model.config.thinktok |= {"blind": blind}
    ids = tokenizer(TEXT[0]["text"])["input_ids"][:40]
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    head.bias[torch.tensor(ids).bincount().topk(3).indices] = 4.0  # so that it is right now and then
    found = evaluate_thinking(model, tokenizer, [{"text": tokenizer.decode(ids)}], num_forks=9, num_samples=2, max_think_length=3, lookahead=lookahead, seed=5)
    ids = tokenizer(tokenizer.decode(ids))["input_ids"]
    tokens_BT, documents_BT = torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.long)
    forks_BK = choose_forks(eligible_forks(tokens_BT, documents_BT), 9, "stride", torch.Generator())
    branching, vocabulary = Branching(2, 3, lookahead), thinker(scale=1.0)[1]
    generator = torch.Generator().manual_seed(5)
    drawn = sample_thoughts(ReplicatedEngine(), model, tokens_BT, documents_BT, forks_BK, branching, Sampling(), vocabulary, generator)
    random_BKSL = control_sources(drawn, documents_BT, vocabulary, generator)["random"][0]

    def gate(row: list[int]) -> float:
        """How likely it is that a thinking token follows."""
        logits = type(model).forward(model, input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].float()
        return logits[: vocabulary.guard_id].softmax(-1)[vocabulary.first_id :].sum().item()

    for k, fork in enumerate(forks_BK[0].tolist()):
        following = ids[fork + 1 : fork + 1 + lookahead]

        def score(thought: list[int], fork=fork, following=following) -> float:
            return judged(thought, fork, following)[0]

        def judged(thought: list[int], fork=fork, following=following) -> tuple[float, int]:
            row = thought if blind and thought else ids[: fork + 1] + thought
            logps = logps_of(model, row + following)[len(row) - 1 :]
            said = [(logps[h, token].item(), int(logps[h].argmax() == token)) for h, token in enumerate(following)]
            return tuple(map(sum, zip(*said)))

        def ended(own: list[list[int]], put: list[list[int]], fork=fork, score=score) -> float:
            """What is put in the place of thoughts, ended where the model ends its own: a mean over thoughts of log sum_l p(l) p(following | l tokens)."""
            sums = []
            for thought, there in zip(own, put, strict=True):
                goes_on, terms = 1.0, []
                for length in range(4):
                    stops = 1.0 if length == 3 else 0.0 if blind and not length else 1 - gate(ids[: fork + 1] + thought[:length])
                    terms.append(math.log(goes_on * stops) + score(there[:length]) if goes_on * stops else -math.inf)
                    goes_on *= 1 - stops
                sums.append(np.logaddexp.reduce(terms))
            return np.mean(sums)

        thoughts = drawn.thoughts_BKGL[0, k].tolist()
        assert found.tokens_F[k] == len(following)
        assert found.logps["no_think"][k] == pytest.approx(score([]), abs=1e-4)
        assert found.logps["always"][k] == pytest.approx(np.mean([score(thought) for thought in thoughts]), abs=1e-4)
        assert found.marginal["always"][k] == pytest.approx(np.logaddexp(*(score(thought) for thought in thoughts)) - math.log(2), abs=1e-4)
        other = drawn.thoughts_BKGL[0, k - 9 // 2].tolist() if k >= 9 // 2 else []
        if other:
            assert found.logps["earlier"][k] == pytest.approx(np.mean([score(thought) for thought in other]), abs=1e-4)
        else:
            assert math.isnan(found.logps["earlier"][k])
        if lookahead == 1:  # lengths are summed out, and random tokens are as many as the model's own
            assert found.logps["think"][k] == pytest.approx(ended(thoughts, thoughts), abs=1e-4)
            at_random = random_BKSL[0, k].tolist()
            assert found.logps["think_random"][k] == pytest.approx(ended(thoughts, at_random), abs=1e-4)
            assert found.logps["random"][k] == pytest.approx(np.mean([score(thought) for thought in at_random]), abs=1e-4)
        for arm, put in (("no_think", [[]]), ("always", thoughts), *([("earlier", other)] if other else [])):
            assert found.correct[arm][k] == pytest.approx(np.mean([judged(thought)[1] for thought in put]))
        plain = logps_of(model, ids)[fork]
        assert found.entropy_F[k] == pytest.approx(-(plain.exp() * plain).sum().item(), abs=1e-4)
    assert 0 < found.correct["always"].sum() < found.tokens_F.sum()
    judging = [token for fork in forks_BK[0].tolist() for token in ids[fork + 1 : fork + 1 + lookahead]]
    assert found.bytes_F.sum() == sum(len(tokenizer.decode(token).encode()) for token in judging)
    assert (found.lengths_F >= 1).all() or not blind


def test_a_model_is_evaluated_as_its_config_says_that_it_was_trained(model):
    model, tokenizer = model
    model.config.thinktok |= {"max_think_length": 3, "lookahead": 2, "stop": "fixed"}
    found = evaluate_thinking(model, tokenizer, TEXT[:2], num_forks=2, num_samples=1)
    assert {name: found.settings[name] for name in ("max_think_length", "lookahead", "stop")} == {"max_think_length": 3, "lookahead": 2, "stop": "fixed"}
    assert found.tokens_F.max() == 2


@pytest.mark.parametrize("lookahead", [1, 2])
def test_a_shut_gate_is_no_thought_and_an_open_one_is_always(model, lookahead):
    model, tokenizer = model
    first, guard = model.config.thinktok["first_id"], model.config.thinktok["guard_id"]
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    for bias, same, length in ((-50.0, "no_think", 0), (50.0, "always", 3)):
        with torch.no_grad():
            head.bias[first:guard] = bias
        found = evaluate_thinking(model, tokenizer, TEXT, num_forks=4, num_samples=1, max_think_length=3, lookahead=lookahead)
        close = 1e-4 if lookahead == 1 or same == "no_think" else 5
        np.testing.assert_allclose(found.logps["think"], found.logps[same], atol=close)
        np.testing.assert_allclose(found.logps["think_random"], found.logps["random" if length else "no_think"], atol=close)
        assert (np.abs(found.logps["think_random"] - found.logps["think"]).max() > 0.01) == (length > 0)
        np.testing.assert_allclose(found.lengths_F, length, atol=1e-6)


def test_without_thoughts_nothing_depends_on_batches_or_samples(model):
    model, tokenizer = model
    one = evaluate_thinking(model, tokenizer, TEXT, max_length=16, num_forks=4, batch_size=1, num_samples=1)
    two = evaluate_thinking(model, tokenizer, TEXT, max_length=16, num_forks=4, batch_size=5, num_samples=3, seed=1)
    np.testing.assert_array_equal(one.documents_F, two.documents_F)
    np.testing.assert_allclose(one.logps["no_think"], two.logps["no_think"], atol=1e-4)
    np.testing.assert_array_equal(one.kinds_F, two.kinds_F)
    assert "other_document" not in one.logps  # a batch of one row has none
    first = evaluate_thinking(model, tokenizer, TEXT, max_length=16, rows_per_document=1, num_forks=4, num_samples=1)
    assert len(first.documents_F) == 4 * len(TEXT) < len(one.documents_F)
    assert np.isfinite(two.logps["other_document"]).any()


def test_a_model_that_was_not_trained_is_judged_by_one_token(model):
    """And not by all that follows, in a tree of each row for each of its places."""
    assert evaluate_thinking(*model, TEXT[:2], num_forks=2, num_samples=1).tokens_F.tolist() == [1] * 4


def test_more_places_than_a_row_has_are_all_of_them(model):
    """And cost no more: a tree of ten thousand places would not end."""
    model, tokenizer = model
    every, more = (evaluate_thinking(model, tokenizer, TEXT[:2], max_length=16, num_forks=forks, num_samples=1) for forks in (16, 10_000))
    assert len(more.documents_F) > 16
    for arm in ("no_think", "always", "random"):
        np.testing.assert_allclose(more.logps[arm], every.logps[arm], atol=1e-6)


def test_it_is_judged_behind_markers_where_it_was_trained_to_think_there(model):
    """At all such places of a row, or as many as are asked for; elsewhere where that is asked for."""
    model, tokenizer = model
    texts = ["3 + 4 = 7, and 7 + 5 = 12; so 3 = 3", "no sum at all", "5 + 7 = 12"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    marker = tokenizer(" =")["input_ids"][0]
    places = [(row, place) for row, ids in enumerate(rows) for place, token in enumerate(ids[:-1]) if token == marker]
    assert [row for row, _ in places] == [0, 0, 0, 2]
    told = evaluate_thinking(model, tokenizer, texts, num_samples=1, num_forks=16, fork_markers=[" ="])
    assert told.documents_F.tolist() == [0, 0, 0, 2]
    wanted = [logps_of(model, rows[row])[place, rows[row][place + 1]].item() for row, place in places]
    assert told.logps["no_think"].tolist() == pytest.approx(wanted, abs=1e-4)
    model.config.thinktok |= {"fork_positions": "markers", "fork_markers": [" ="]}
    assert evaluate_thinking(model, tokenizer, texts, num_samples=1).summary()["arms"] == told.summary()["arms"]
    assert evaluate_thinking(model, tokenizer, texts, num_samples=1, num_forks=1).documents_F.tolist() == [0, 2]
    assert set(evaluate_thinking(model, tokenizer, texts, num_samples=1, fork_markers=[]).documents_F) == {0, 1, 2}
    with pytest.raises(ValueError, match="None of fork_markers=.' zebra'. ends in the text"):
        evaluate_thinking(model, tokenizer, texts, fork_markers=[" zebra"])
    with pytest.raises(ValueError, match="fork_markers=.''. has one without text"):
        evaluate_thinking(model, tokenizer, texts, fork_markers=[""])
    with pytest.raises(ValueError, match="fork_markers=' =' is one text: give a list"):
        evaluate_thinking(model, tokenizer, texts, fork_markers=" =")


def test_a_model_of_16_bits_with_hidden_states_of_32_is_inspected(tokenizer):
    model = tiny_model("mamba", vocab_size=len(tokenizer))
    vocabulary = add_thinking_tokens(model, tokenizer, 4)
    ids = tokenizer("the cat sat")["input_ids"]
    (first, *_) = inspect_text(model.bfloat16(), tokenizer, "the cat sat", max_think_length=2)
    told = logps_of(model, ids[:1])[0].softmax(-1).topk(5).values
    assert [probability for _, probability in first.top_before] == pytest.approx(told.tolist(), abs=1e-3)
    assert len(first.top_before) == 5 < vocabulary.num_real


def test_what_is_measured_is_left_as_it_was():
    """Somebody else may go on with the model, and pass it on."""
    tokenizer = tiny_tokenizer()
    plain = tiny_model("llama", vocab_size=len(tokenizer))
    add_thinking_tokens(plain, tokenizer, 4)
    before = dict(vars(plain))
    for _ in range(2):
        evaluate_thinking(plain, tokenizer, CORPUS[:2], num_forks=2, num_samples=1)
        inspect_text(plain, tokenizer, CORPUS[0])
    assert vars(plain).keys() == before.keys()


def test_without_samples_nothing_is_compared(model):
    found = evaluate_thinking(*model, TEXT[:2], num_forks=2, num_samples=0).summary()
    assert set(found["arms"]) == {"no_think"}
    assert evaluation_says(found) == "Nothing was thought, so there is nothing to compare."
    print_evaluation({"evaluation": found})


def test_controls_are_what_they_say():
    vocabulary = thinker()[1]
    forks_BK = torch.tensor([[2, 5, 9], [1, 4, -1], [3, -1, -1], [-1, -1, -1]])
    documents_BT = torch.tensor([0, 0, 1, 2])[:, None].expand(4, 12)
    rollout = Rollout.empty(forks_BK, Branching(2, 3, 1))
    rollout.thoughts_BKGL = torch.arange(4 * 3 * 2 * 3).view(4, 3, 2, 3)
    found = control_sources(rollout, documents_BT, vocabulary, torch.Generator().manual_seed(0))
    assert set(found) == set(CONTROLS["always"])
    thoughts, origin_of = rollout.thoughts_BKGL, lambda thoughts: thoughts[..., 0, 0] // 6  # its place in [B, K]
    shuffled, there_BK = found["shuffled"]
    assert torch.equal(shuffled.sort(-1).values, thoughts)
    assert not torch.equal(shuffled, thoughts)
    assert torch.equal(there_BK, forks_BK >= 0)
    earlier, there_BK = found["earlier"]
    assert there_BK.tolist() == [[False, True, True], [False, True, False], [False] * 3, [False] * 3], "a later thought would have read what judges"
    assert origin_of(earlier)[0, 1:].tolist() == [0, 1]
    assert origin_of(earlier)[1, 1] == 3
    other, there_BK = found["other_document"]
    assert origin_of(other)[:2].tolist() == [[6, 6, 6]] * 2  # the only fork of the next row of another document
    assert origin_of(other)[2, 0] == 0
    assert torch.equal(there_BK, forks_BK >= 0)
    random, _ = found["random"]
    assert vocabulary.is_thought(random).all()


@pytest.mark.parametrize("length", [2, 3])
def test_a_shuffled_thought_is_in_another_order(length):
    forks_BK = torch.arange(64).expand(2, 64)
    rollout = Rollout.empty(forks_BK, Branching(2, length, 1))
    rollout.thoughts_BKGL = torch.arange(length).expand(2, 64, 2, length)
    shuffled, _ = control_sources(rollout, torch.zeros(2, 65, dtype=torch.long), thinker()[1], torch.Generator().manual_seed(0))["shuffled"]
    assert (shuffled != rollout.thoughts_BKGL).any(-1).all()


def test_bytes_are_those_of_the_tokens_that_judge(model):
    """Bits per byte divide the bits of the judged tokens by their own bytes: rows of longer words do not lend theirs, and an end of text has none."""
    model, tokenizer = model
    ends = copy.deepcopy(tokenizer)
    ends.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {ends.eos_token}", special_tokens=[(ends.eos_token, ends.eos_token_id)])
    texts = ["é" * 3, TEXT[0]["text"] * 2]
    rows = [ends(text)["input_ids"] for text in texts]
    found = evaluate_thinking(model, ends, texts, num_forks=max(map(len, rows)), num_samples=0, lookahead=1)
    assert len(found.documents_F) == sum(len(ids) - 1 for ids in rows), "each token but the first is judged once"
    first = sum(len(ends.decode(ids[0]).encode()) for ids in rows if not ends.decode(ids[0]).endswith("\N{REPLACEMENT CHARACTER}"))
    assert found.bytes_F.sum() == (sum(len(text.encode()) for text in texts) - first)


def test_every_row_of_a_text_begins_as_the_text_does(model):
    """Models that were trained with a begin of text everywhere predict badly without."""
    begins = copy.deepcopy(model[1])
    begins.bos_token = begins.eos_token
    begins.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begins.eos_token} $A", special_tokens=[(begins.eos_token, begins.eos_token_id)])
    ids = begins(TEXT[0]["text"])["input_ids"]
    for limit in (None, 2):
        rows = [row for _, row in _rows(begins, [TEXT[0]["text"]], 8, limit)]
        assert {row[0] for row in rows} == {begins.bos_token_id}
        assert [token for row in rows for token in row[1:]] == ids[1 : None if limit is None else 1 + 7 * limit]
        assert max(map(len, rows)) == 8


def evaluation(**changes) -> Evaluation:
    """Two documents of three and one forks."""
    made = {
        "documents_F": np.array([0, 0, 0, 1]), "tokens_F": np.array([1, 2, 1, 2]),
        "logps": {"no_think": np.array([-1.0, -2, -3, -4]), "think": np.array([-0.5, -2, -2, -4]), "always": np.array([-1.0, -1, -1, -1]),
                  "random": np.array([-2.0, -2, np.nan, -2])},
        "marginal": {"think": np.array([-0.4, -2, -2, -4]), "always": np.array([-1.0, -1, -1, -1])},
        "correct": {arm: np.array([1.0, 1, 0, 2]) for arm in ("no_think", "think", "always", "random")}, "entropy_F": np.array([0.1, 0.2, 0.3, 0.4]),
        "kinds_F": np.array(["number", "other", "number", "other"]), "lengths_F": np.array([1.0, 0, 3, 0]), "bytes_F": np.array([1.0, 2.0, 4.0, 1.0]),
        "settings": {"num_samples": 2},
    }  # fmt: skip
    return Evaluation(**made | changes)


def test_summary_of_known_figures():
    found = evaluation().summary()
    assert found["arms"]["no_think"]["bits_per_token"] == pytest.approx(10 / 6 / math.log(2))
    assert found["arms"]["no_think"]["bits_per_byte"] == pytest.approx(10 / 8 / math.log(2))
    assert found["arms"]["no_think"]["accuracy"] == pytest.approx(4 / 6)
    assert found["arms"]["think"]["bits_per_token_marginal"] == pytest.approx(8.4 / 6 / math.log(2))
    assert found["arms"]["random"]["bits_per_token"] == pytest.approx(6 / 5 / math.log(2))  # where there was something to put
    assert found["arms"]["random"]["bits_per_byte"] == pytest.approx(6 / 4 / math.log(2))
    assert found["gains"]["think over no_think"]["bits_per_token"] == pytest.approx(1.5 / 6 / math.log(2))
    assert found["gains"]["always over random"]["bits_per_token"] == pytest.approx(3 / 5 / math.log(2))
    assert found["by_kind"]["number"]["mean_think_length"] == 2
    assert found["by_kind"]["other"]["think over no_think"]["bits_per_token"] == 0
    assert [one["mean_entropy_bits"] * math.log(2) for one in found["by_entropy"]] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (found["documents"], found["forks"], found["judged_tokens"], found["mean_think_length"]) == (2, 4, 6, 1.0)
    json.dumps(found)


@pytest.mark.parametrize(
    ("gain", "over_random", "always_over_random", "words"),
    [
        (
            (0.1, 0.3),
            (0.1, 0.2),
            (0.1, 0.2),
            "They are shown to do more than random tokens. Those that it is made to think everywhere are shown to do more than",
        ),
        (
            (0.1, 0.3),
            (0.1, 0.2),
            (-0.1, 0.2),
            "They are shown to do more than random tokens. Those that it is made to think everywhere are not shown to do more than random tokens.",
        ),
        (
            (0.1, 0.3),
            (-0.1, 0.2),
            (0.1, 0.2),
            "They are not shown to do more than random tokens. Those that it is made to think everywhere are shown to do more than random tokens.",
        ),
        ((0.1, 0.3), (-0.1, 0.2), (-0.2, 0.1), "They are not shown to do more than random tokens. Those that it is made to think everywhere are not shown"),
        ((-0.1, 0.3), (0.1, 0.2), (0.1, 0.2), "told from zero"),
        ((-0.3, -0.1), (0.1, 0.2), (0.1, 0.2), "hurts"),
        ((math.nan, math.nan), (math.nan, math.nan), (math.nan, math.nan), "told from zero"),
    ],
)
def test_the_verdict_is_what_the_intervals_carry(gain, over_random, always_over_random, words):
    gains = {"think over no_think": gain, "think over think_random": over_random, "always over no_think": (1, 1), "always over random": always_over_random}
    found = {name: {"bits_per_token": 0.0, "low": low, "high": high} for name, (low, high) in gains.items()}
    assert words in evaluation_verdict({"gains": found, "settings": {}})
    if gain[0] > 0:
        assert "the time, or any change of its input" in evaluation_verdict({"gains": found, "settings": {"thoughts": "filler"}})


def test_an_interval_has_the_width_that_theory_gives():
    sums_D = np.random.default_rng(0).normal(1.0, 2.0, 400)
    low, high = ratio_interval(sums_D, np.ones(400))
    error = sums_D.std(ddof=1) / 20
    assert (low, high) == (pytest.approx(sums_D.mean() - 1.96 * error, abs=0.25 * error), pytest.approx(sums_D.mean() + 1.96 * error, abs=0.25 * error))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 9)), min_size=5, max_size=30), st.floats(0.1, 10))
def test_intervals_scale_and_hold_all_documents(rows, scale):
    sums_D, counts_D = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    low, high = ratio_interval(sums_D, counts_D)
    ratios_D = sums_D / counts_D
    assert ratios_D.min() - 1e-9 <= low <= high <= ratios_D.max() + 1e-9
    np.testing.assert_allclose(ratio_interval(scale * sums_D, counts_D), (scale * low, scale * high), atol=1e-9)


def test_intervals_of_many_documents_are_drawn_in_parts(monkeypatch):
    sums_D, counts_D = np.random.default_rng(0).normal(size=50), np.arange(1.0, 51.0)
    whole = ratio_interval(sums_D, counts_D)
    monkeypatch.setattr("hf_thinktok.evaluation.intervals.NUMBERS", 50 * 7)
    assert ratio_interval(sums_D, counts_D) == pytest.approx(whole, abs=1e-12)


def test_few_documents_have_no_interval():
    assert all(map(math.isnan, ratio_interval(np.arange(4.0), np.ones(4))))


@pytest.mark.parametrize("documents", [5, 12])
def test_intervals_of_few_documents_hold_the_truth_as_often_as_they_say(documents):
    """Percentiles alone hold it in 84 and 90 % of cases."""
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        counts_D = random.integers(8, 17, documents).astype(float)
        low, high = ratio_interval(random.normal(0.0, 1.0, documents) * np.sqrt(counts_D), counts_D)
        held += low <= 0 <= high
    assert 0.91 <= held / 400 <= 0.98


def test_students_quantiles():
    for freedom, wanted in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228, 47: 2.012}.items():
        assert t_quantile(0.975, freedom) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"thoughts": "continuous"}, "thoughts=continuous"), ({"memory": "persistent"}, "memory=persistent"), ({"policies": "split"}, "policies=split")],
)
def test_what_cannot_be_evaluated_is_said(model, change, words):
    model, tokenizer = model
    model.config.thinktok |= change
    with pytest.raises(ValueError, match=words):
        evaluate_thinking(model, tokenizer, TEXT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stop": "learned"}, "Where it decides, it thinks "),
        ({"stop": "fixed", "max_think_length": 3}, "It was trained to think 3 tokens everywhere"),
        ({"stop": "learned", "fork_positions": "markers"}, "It was trained to think behind markers, and these places are others"),
        ({"stop": "learned", "fork_positions": "markers", "fork_markers": [" the"]}, "The places are those behind ' the'."),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_how_and_where_it_was_trained_to_think_is_said(model, change, words):
    model, tokenizer = model
    model.config.thinktok |= {"stop": "learned"} | change
    says = evaluation_says(evaluate_thinking(model, tokenizer, TEXT).summary())
    assert words in says
    assert ("markers" in words) == ("behind markers" in says)


def test_what_has_no_thoughts_or_no_text_is_refused(model):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="no thinking tokens"):
        evaluate_thinking(tiny_model(vocab_size=len(tokenizer)), tokenizer, TEXT)
    plain = tiny_model(vocab_size=len(tokenizer))
    add_thinking_tokens(plain, tokenizer, 4)
    for text in ("a", GUARD * 4):
        with pytest.raises(ValueError, match="no document has two tokens"):
            evaluate_thinking(plain, tokenizer, [{"text": text}])
    with pytest.raises(ValueError, match="max_think_length=255 leaves no room for text in the model's 256 positions"):
        evaluate_thinking(*model, TEXT, max_think_length=255)


def test_arguments_and_data_that_cannot_be_evaluated(model):
    for options in ({"num_forks": 0}, {"max_length": -5}, {"max_think_length": -1}, {"batch_size": 0}, {"lookahead": 0}, {"rows_per_document": 0}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
            evaluate_thinking(*model, TEXT, **options)
    for data, sentence in (
        ([{"body": "a b c"}], "Document 0 has no text in 'text' .it has body.: name the column"),
        ([TEXT[0], {"text": None}], "Document 1 has no text"),
        ([7], "Document 0 has no text"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluate_thinking(*model, data)
    texts = [row["text"] for row in TEXT]
    for same in (texts, texts[0]):
        rows = TEXT if same is texts else TEXT[:1]
        assert evaluate_thinking(*model, same, num_samples=1).summary()["arms"] == evaluate_thinking(*model, rows, num_samples=1).summary()["arms"]


def test_a_trainers_model_is_measured_as_its_checkpoint_is_and_goes_on(tmp_path):
    """Training leaves autocast around it, under which its logits are other ones."""
    options = {"bf16": True, "use_cpu": True, "max_length": 48, "max_steps": 1, "num_think_tokens": 4, "num_forks": 2, "num_generations": 2}
    args = ThinkTokConfig(str(tmp_path), report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, **options)
    text = Dataset.from_list(TEXT)
    trainer = ThinkTokTrainer(save_tiny(tmp_path / "base"), args, train_dataset=text, eval_dataset=text)
    trainer.train()
    trainer.save_model()
    before = trainer.evaluate()["eval_loss"]
    measured, loaded = (
        evaluate_thinking(model, trainer.processing_class, TEXT, num_forks=4, num_samples=1).logps
        for model in (trainer.model, AutoModelForCausalLM.from_pretrained(tmp_path))
    )
    for arm, logps_F in loaded.items():
        np.testing.assert_allclose(measured[arm], logps_F, atol=1e-5, err_msg=arm)
    assert len(inspect_text(trainer.model, trainer.processing_class, TEXT[0]["text"])) > 0
    assert trainer.evaluate()["eval_loss"] == before


def test_an_adapter_is_evaluated_on_a_base_that_has_thinking_tokens(model, tmp_path):
    adapted = get_peft_model(model[0], LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    assert evaluate_thinking(adapted, model[1], TEXT[:1], num_forks=2, num_samples=1).summary()["forks"] == 2
    with pytest.raises(ValueError, match="load_whole"):
        evaluate_thinking(PeftModel.from_pretrained(tiny_model(vocab_size=len(model[1])), tmp_path), model[1], TEXT)


@pytest.mark.parametrize("kind", ["bytes", "prepend", "metaspace"])
def test_words_begin_where_there_is_a_space(kind):
    tokenizer = tokenizer_of_kind(kind)
    model = tiny_model(vocab_size=len(tokenizer))
    add_thinking_tokens(model, tokenizer, 4)
    text = "q a q a q a q"
    found = evaluate_thinking(model, tokenizer, [{"text": text}], num_forks=len(text), num_samples=1)
    words = sum(token.startswith(("▁", "Ġ")) and len(token) > 1 for token in tokenizer.tokenize(text)[1:])
    assert (found.kinds_F == "word begins").sum() == words > 2


def test_the_metric_loads_from_its_folder():
    metric = evaluate.load(str(ROOT / "hf_thinktok" / "evaluation" / "think_gain"))
    with_thoughts, without, documents = [-0.5, -1.0, -2.0], [-1.5, -2.0, -2.0], ["a", "a", "b"]
    found = metric.compute(predictions=with_thoughts, references=without, documents=documents)
    assert found["think_gain"] == pytest.approx(2 / 3 / math.log(2))
    assert (found["documents"], found["tokens"]) == (2, 3)
    assert math.isnan(found["low"])
    assert metric.compute(predictions=[-0.5] * 5, references=[-1.5] * 5, documents=[*"abcde"])["low"] == pytest.approx(1 / math.log(2))
    assert metric.compute(predictions=with_thoughts, references=without, tokens=[2, 2, 4])["think_gain"] == pytest.approx(2 / 8 / math.log(2))
    with pytest.raises(ValueError, match="documents has 1 entries for 3 predictions"):
        metric.compute(predictions=with_thoughts, references=without, documents=[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny(path, think_tokens=4)
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, TEXT)))
    (path / "recipe.yaml").write_text(f"data_files: [{path / 'data.jsonl'}]\nheld_out_documents: 2\nlearning_rate: 1.0e-3\n")
    return path


def thinktok(*words) -> subprocess.CompletedProcess:
    return captured(lambda: main([*map(str, words)]))


def test_the_command_evaluates_text_or_what_a_recipe_held_out(folder, tmp_path):
    asked = {"num_forks": 4, "num_samples": 3, "max_think_length": 2, "lookahead": 1, "seed": 7, "batch_size": 3, "rows_per_document": 1}
    few = [word for name, value in asked.items() for word in (f"--{name}", value)]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": f"{row['text']} again"}) for row in TEXT[:3]))
    (tmp_path / "compare.yaml").write_text((folder / "recipe.yaml").read_text() + f"test_files: [{tmp_path / 'test.jsonl'}]\nseeds: [0, 1]\n")
    for source, documents in (
        (("--data_files", folder / "data.jsonl"), 6),
        (("--data_files", folder / "data.jsonl", "--held_out_documents", 2), 2),
        (("--data_files", folder / "data.jsonl", "--test_documents=3", "--data_split_seed", 1), 3),
        (("--data_files", folder / "data.jsonl", "--held-out-documents", 2, "--data-split-seed=1"), 2),
        (("--config", folder / "recipe.yaml"), 2),
        ((f"--config={folder / 'recipe.yaml'}",), 2),
        (("--config", tmp_path / "compare.yaml"), 3),  # a comparison's: what it chose settings on is not what it reports on
    ):
        done = thinktok("eval", folder, *source, *few, "--output", tmp_path / "found.json")
        assert done.returncode == 0, done.stderr[-2000:]
        results = read_json(tmp_path / "found.json")
        assert results["evaluation"]["documents"] == documents
        assert results["evaluation"]["settings"].items() >= asked.items()
        assert {"versions", "hardware", "commit"} <= set(results)
        for text in ("a thought everywhere", "95 % intervals", "Where it decides, it thinks"):
            assert text in done.stdout
            assert text in as_text(results)
    done = thinktok("eval", folder, "--data_files", folder / "data.jsonl", *few, "--fork_markers", " =", " the", "--output", tmp_path / "found.json")
    assert "The places are those behind ' =', ' the'." in " ".join(done.stdout.split())
    assert read_json(tmp_path / "found.json")["evaluation"]["settings"]["fork_markers"] == [" =", " the"]


def test_documents_that_chose_the_checkpoint_carry_no_verdict(folder, tmp_path):
    shutil.copytree(folder, chosen := tmp_path / "chosen")
    few, data = ("--num_forks", 2, "--num_samples", 1, "--max_think_length", 1), ("--data_files", folder / "data.jsonl")
    says = "The same documents chose this checkpoint, the best of 3 evaluations"
    for best_of, own, flatters in (
        (3, ("--held_out_documents", 2), True),
        (1, ("--held_out_documents", 2), False),
        (3, ("--test_documents", 2), False),
        (3, (), False),
    ):
        (chosen / "results.json").write_text(json.dumps({"best_of": best_of}))
        said = " ".join(thinktok("eval", chosen, *data, *own, *few).stdout.split())
        assert (says in said) is flatters
        assert ("thinking" in said.partition("tokens at a place.")[2].lower()) is not flatters


def test_what_is_reported_on_was_not_trained_on_word_for_word(tmp_path, caplog):
    texts = [f"document {i % 8}" for i in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    script = TextArguments(data_files=[str(tmp_path / "text.jsonl")], held_out_documents=2, test_documents=2)
    parts = load_parts(script)
    test, held_out, train = (set(part["text"]) for part in (parts.test, parts.held_out, parts.train))
    assert not test & (held_out | train)
    assert not held_out & train
    assert "documents are word for word among the 2 of test_documents, and are left out" in caplog.text
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (*train, "another")))
    assert unseen_text(script, [str(tmp_path / "own.jsonl")])["text"][:] == ["another"]
    assert len(unseen_text(TextArguments(), [str(tmp_path / "own.jsonl")])) == len(train) + 1  # of a text alone nothing was trained on
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in train))
    with pytest.raises(ValueError, match="are word for word among those to train on: give text"):
        unseen_text(script, [str(tmp_path / "own.jsonl")])


def test_documents_that_repeat_each_other_are_one(tmp_path, caplog):
    """Copies are no further evidence: the interval is that of the documents."""
    model, _ = thinker()
    texts = [row["text"] for row in TEXT[:4]]
    once, again = (
        evaluate_thinking(model, tiny_tokenizer(), given, num_forks=4, num_samples=1, max_think_length=2) for given in (texts, texts + texts[:2] * 9)
    )
    assert repr(once.summary()) == repr(again.summary())
    assert "18 of 22 documents repeat others word for word" in caplog.text
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ["the same"] * 30 + ["another", "a third"]))
    for streams in (False, True):
        script = TextArguments(data_files=[str(tmp_path / "text.jsonl")], held_out_documents=20, dataset_streaming=streams)
        held_out = load_parts(script).held_out["text"][:]
        assert len(held_out) == len(set(held_out)) < 20
    assert "documents of held_out_documents repeat others word for word" in caplog.text


def test_documents_that_a_run_held_out_in_another_number_are_told_of(folder, tmp_path):
    shutil.copytree(folder, run := tmp_path / "run")
    few, data = ("--num_forks", 2, "--num_samples", 1, "--max_think_length", 1), ("--data_files", folder / "data.jsonl")
    trained = {"data_files": ["elsewhere/data.jsonl"], "held_out_documents": 2, "test_documents": 3}
    for config, own, other in (
        (trained, ("--held_out_documents", 2, "--test_documents", 3), None),
        (trained, ("--held_out_documents", 3), "test_documents=3"),
        (trained, ("--held_out_documents", 3, "--test_documents", 3), None),
        (trained, ("--test_documents", 3, "--data_split_seed", 1), "data_split_seed=0"),
        (trained | {"data_files": ["other.jsonl"]}, ("--held_out_documents", 3), None),
    ):
        (run / "results.json").write_text(json.dumps({"config": config}))
        said = " ".join(thinktok("eval", run, *data, *own, *few).stderr.split())
        assert ("may be among those it was trained on" in said) is (other is not None)
        assert other is None or f"was trained with {other}:" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "There is no text"),
        (("--data_files", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--dataset_name", "nowhere", "--colour", "red"), "the option colour, which is not known"),
        (("--batch_sise", "2"), "the option batch_sise, which is not known; did you mean batch_size?"),
        (("--revision", "old", "--data_files", "{folder}/data.jsonl"), "--revision is of a Hub repository"),
        (("--num_forks", "0"), "must be a whole number, 1 or more"),
        (("--seed", "5000000000"), "must be a whole number, 0 to 4294967295"),
        (("--data_files", "{folder}/data.jsonl", "--output", "{folder}"), "is a folder: name a file"),
        (("--data_files", "{folder}/data.jsonl", "--output", "{folder}/data.jsonl/found.json"), "nothing can be written to"),
        (("--data_files", "{folder}/data.jsonl", "--max_think_length", "256"), "max_think_length=256 leaves no room"),
        (("--data_files", "{folder}/data.jsonl", "--data_split_seed", "1"), "--data_split_seed has no effect"),
        (("--data_files", "{folder}/data.jsonl", "--test_files", "{folder}/data.jsonl"), "--data_files and --test_files each name the text"),
    ],
)
def test_wrong_words_are_told_in_a_sentence(folder, words, sentence):
    done = thinktok("eval", folder, *(word.format(folder=folder) for word in words))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_the_model_comes_first(folder):
    """Else the option's value would be taken for it."""
    done = thinktok("eval", "--data_files", folder / "data.jsonl", folder)
    assert (done.returncode, done.stderr) == (2, "thinktok: MODEL comes first: thinktok eval MODEL --data_files held_out.jsonl\n")


def test_the_help_has_all_that_the_text_can_be_told(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    said = capsys.readouterr().out
    for name in ("--data_files", "--text_template", "--max_documents", "--test_files", "--config", "--num_samples"):
        assert name in said


def test_each_place_is_of_the_kind_of_what_follows_it():
    model, tokenizer = thinker(scale=1.0)[0], tiny_tokenizer()
    text = "the cat sat on 12 mats, and 3 + 4 = 7"
    ids = tokenizer(text)["input_ids"]
    found = evaluate_thinking(model, tokenizer, [text], num_forks=len(ids) - 1, num_samples=0)
    assert found.kinds_F.tolist() == [kind_of(piece) for piece in pieces(tokenizer, ids)[1:]]


@torch.no_grad()
def test_accuracy_is_that_of_the_first_choice():
    model, tokenizer = thinker(scale=1.0)[0], tiny_tokenizer()
    with torch.no_grad():  # what was said last is said again
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.zero_()
    text = "aaabbbbcddddd"
    ids = tokenizer(text)["input_ids"]
    found = evaluate_thinking(model, tokenizer, [text], num_forks=len(ids) - 1, num_samples=0, lookahead=1)
    logits = type(model).forward(model, input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1, : model.config.thinktok["first_id"]]
    hits = (logits.argmax(-1) == torch.tensor(ids[1:])).tolist()
    assert found.correct["no_think"].tolist() == hits
    assert 0 < sum(hits) < len(hits)


def test_what_is_reported_on_is_what_nothing_was_tuned_on(tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(30)))
    script = TextArguments(data_files=[str(tmp_path / "text.jsonl")], held_out_documents=5, test_documents=7)
    parts = load_parts(script)
    assert unseen_text(script, None)["text"] == parts.test["text"]
    script.test_documents = 0
    assert len(unseen_text(script, None)) == 5
