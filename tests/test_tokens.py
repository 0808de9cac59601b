"""Thinking tokens on a model and its tokenizer: rows, calibration, plain reloading, and text that tries to write thoughts."""

import contextlib
import copy
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import unicodedata

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import CORPUS, TINY, save_tiny, tiny_model, tiny_tokenizer, tokenizer_of_kind
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, GenerationConfig

from hf_thinktok import ThinkingVocabulary, add_thinking_tokens
from hf_thinktok.architectures import LogitTransform
from hf_thinktok.memory import LiveBytes
from hf_thinktok.tokens import GUARD, LOGIT_SPREAD, SAMPLE_TEXT, THINK_MASS, THOUGHTS_EVERY, initial_rows

EXAMPLES = settings(deadline=None, max_examples=150)


def state(model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_calibration_holds_few_logits_at_a_time():
    """All of 2,048 contexts and a large vocabulary would be gigabytes; one tile of 256 is 20 MB here."""
    hidden_MD, real_VD = torch.randn(2048, 32), torch.randn(20_000, 32)
    with LiveBytes() as live:
        initial_rows(hidden_MD, real_VD, None, LogitTransform(), torch.randn(4, 32), norm=1.0, think_mass=0.1, logit_spread=0.5)
    assert live.peak.total() < 4 * 256 * 20_000 * 4


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("rows", "num_tokens", "expected"),
    [(320, 4, 384), (320, 63, 384), (320, 64, 448), (333, 16, 384), (384, 16, 384), (384, 63, 384), (384, 64, 448), (1000, 16, 1000)],
)
def test_the_vocabulary_grows_to_a_multiple_of_64_and_never_shrinks(rows, num_tokens, expected, tie):
    model, tokenizer = tiny_model(vocab_size=rows, tie=tie), tiny_tokenizer()
    inputs, outputs = (layer.weight.clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    vocabulary = add_thinking_tokens(model, tokenizer, num_tokens)
    # Free rows come first: the first new id is the tokenizer's next one, whatever the model has.
    assert vocabulary == ThinkingVocabulary(320, num_tokens, 320 + num_tokens)
    assert list(vocabulary.ids) == tokenizer.convert_tokens_to_ids(vocabulary.tokens) == list(range(320, 320 + num_tokens))
    assert tokenizer.convert_tokens_to_ids(GUARD) == vocabulary.guard_id
    assert model.config.vocab_size == expected
    for layer, before in ((model.get_input_embeddings(), inputs), (model.get_output_embeddings(), outputs)):
        assert layer.weight.shape == (expected, 32)
        assert torch.equal(layer.weight[:320], before[:320])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tie
    assert model(input_ids=torch.tensor([[1, vocabulary.ids[-1], vocabulary.guard_id]])).logits.isfinite().all()


def test_sixteen_tokens_unless_told():
    assert add_thinking_tokens(tiny_model(), tiny_tokenizer()).num_tokens == 16


def test_a_model_that_thinks_keeps_its_tokens():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    vocabulary = add_thinking_tokens(model, tokenizer, 4)
    before, config, generation = state(model), model.config.to_dict(), model.generation_config.to_dict()
    for num_tokens, seed in ((None, 0), (4, 1)):
        assert add_thinking_tokens(model, tokenizer, num_tokens, seed=seed) == vocabulary
        assert same(state(model), before)
        assert len(tokenizer) == 325
        assert model.config.to_dict() == config
        assert model.generation_config.to_dict() == generation


def test_another_number_of_tokens_is_refused():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    add_thinking_tokens(model, tokenizer, 4)
    before = state(model)
    with pytest.raises(ValueError, match="has 4 thinking tokens and 8 are asked for"):
        add_thinking_tokens(model, tokenizer, 8)
    assert same(state(model), before)
    assert len(tokenizer) == 325


def tokenizer_with(num_thoughts: int, *others: str):
    """A tokenizer that thinks, with some tokens of its own before."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(others))
    if num_thoughts:
        add_thinking_tokens(tiny_model(vocab_size=384), tokenizer, num_thoughts)
    return tokenizer


def mismatched(kind: str) -> tuple:
    thinking = tiny_model()
    add_thinking_tokens(thinking, tiny_tokenizer(), 4)
    return {
        "model without": (tiny_model(vocab_size=384), tokenizer_with(4)),
        "tokenizer without": (thinking, tokenizer_with(0)),
        "other ids": (thinking, tokenizer_with(4, "moonlight")),
        "other first": (thinking, tokenizer_with(3, "moonlight")),
        "other number": (thinking, tokenizer_with(8)),
        "small model": (tiny_model(vocab_size=300), tokenizer_with(0)),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("model without", "tokenizer has thinking tokens but the model has none"),
        ("tokenizer without", "which the tokenizer does not know: load both from the same checkpoint"),
        ("other ids", "which the tokenizer does not know: load both from the same checkpoint"),
        ("other first", "which the tokenizer does not know: load both from the same checkpoint"),
        ("other number", "which the tokenizer does not know: load both from the same checkpoint"),
        ("small model", "ids up to 319 and the model 300 embedding rows"),
    ],
)
def test_a_model_and_a_tokenizer_that_do_not_belong_together_are_refused_untouched(kind, message):
    model, tokenizer = mismatched(kind)
    before, known = state(model), tokenizer.get_vocab()
    with pytest.raises(ValueError, match=message):
        add_thinking_tokens(model, tokenizer, 4)
    assert same(state(model), before)
    assert tokenizer.get_vocab() == known


@pytest.mark.parametrize("num_tokens", [0, -1])
def test_too_few_tokens_are_refused_untouched(num_tokens):
    tokenizer = tiny_tokenizer()
    known = tokenizer.get_vocab()
    with pytest.raises(ValueError, match=f"num_tokens={num_tokens} must be 1 or more"):
        add_thinking_tokens(tiny_model(), tokenizer, num_tokens)
    assert tokenizer.get_vocab() == known


def test_a_sample_may_be_one_text():
    one, listed = tiny_model(tie=False), tiny_model(tie=False)
    text = " ".join(CORPUS)
    for model, sample in ((one, text), (listed, [text])):
        add_thinking_tokens(model, tiny_tokenizer(), 4, sample_text=sample)
    assert torch.equal(one.get_output_embeddings().weight, listed.get_output_embeddings().weight)


def lifelike(family: str = "llama", **options) -> torch.nn.Module:
    """A tiny model whose hidden states have a common direction, as those of trained models do."""
    size = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64}
    model = tiny_model(family, "eager" if family == "gemma2" else "sdpa", **size, **options)
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        rows += rows.std() * torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(1))
    return model


def cosine(rows_ND: Tensor) -> float:
    """The largest between two different rows."""
    cosine_NN = torch.nn.functional.cosine_similarity(rows_ND[:, None], rows_ND, dim=-1)
    return cosine_NN.fill_diagonal_(-1.0).max().item()


def norm_ratio(weight_RD: Tensor, vocabulary) -> Tensor:
    return weight_RD[list(vocabulary.ids)].norm(dim=-1) / weight_RD[: vocabulary.first_id].norm(dim=-1).median()


@torch.no_grad()
def scores(model, tokenizer, vocabulary, texts=SAMPLE_TEXT, thoughts_every: int | None = None) -> tuple[Tensor, Tensor]:
    """Over contexts of some text, with a random thought in the place of one token in so many: log Z of the real logits, and the thinking logits."""
    windows_BT = torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]][:256]).view(-1, 64)
    if thoughts_every is not None:
        generator = torch.Generator().manual_seed(9)
        thoughts_BT = vocabulary.first_id + torch.randint(vocabulary.num_tokens, windows_BT.shape, generator=generator)
        windows_BT = torch.where(torch.rand(windows_BT.shape, generator=generator) < 1 / thoughts_every, thoughts_BT, windows_BT)
    logits_MR = model(input_ids=windows_BT).logits[:, 1:].flatten(0, 1).float()
    return logits_MR[:, : vocabulary.first_id].logsumexp(-1), logits_MR[:, vocabulary.first_id : vocabulary.guard_id]


def think_mass_of(log_z_M: Tensor, think_MN: Tensor) -> Tensor:
    return (think_MN.logsumexp(-1) - log_z_M).sigmoid()


FAMILIES = [
    ("llama", {"tie": True}),
    ("llama", {"tie": False}),
    ("gpt2", {}),
    ("gemma2", {"tie": True}),
    ("gemma2", {"tie": False}),
    ("granite", {"tie": False}),
    ("qwen3", {"tie": True}),
]


@pytest.mark.parametrize("num_tokens", [4, 16])
@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=str)
def test_new_rows_are_distinct_thoughts_of_ordinary_size(family, options, num_tokens):
    model = lifelike(family, **options)
    vocabulary = add_thinking_tokens(model, tokenizer := tiny_tokenizer(), num_tokens)
    inputs, outputs = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    for rows_RD in (inputs, outputs):
        assert cosine(rows_RD[list(vocabulary.ids)]) < 0.9
    if inputs is outputs or inputs.data_ptr() == outputs.data_ptr():
        assert ((norm_ratio(inputs, vocabulary) > 0.5) & (norm_ratio(inputs, vocabulary) < 2.0)).all()
    else:
        torch.testing.assert_close(norm_ratio(inputs, vocabulary), torch.ones(num_tokens), atol=0.05, rtol=0.0)
    log_z_M, think_MN = scores(model, tokenizer, vocabulary)
    assert LOGIT_SPREAD / 4 < think_MN.std(-1).mean() < LOGIT_SPREAD * 2
    mass_M = think_mass_of(log_z_M, think_MN)
    assert THINK_MASS / 3 < mass_M.mean() < THINK_MASS * 3
    assert mass_M.max() < 0.5  # nowhere does the model only think
    # Calibrated on contexts some of which end in a thought.
    assert THINK_MASS / 2 < think_mass_of(*scores(model, tokenizer, vocabulary, thoughts_every=THOUGHTS_EVERY)).mean() < THINK_MASS * 2


def test_tokens_of_the_users_own_that_begin_as_thoughts_do_are_read_as_before_or_refused():
    """The guard is matched in the text as it stands, others in what the normalizer makes of it, and so later."""
    text, own = "a<|think_start|>b", "<|think_start|>"
    for kept in (AddedToken(own, normalized=False), AddedToken(own, special=True, normalized=False)):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([kept])
        before = tokenizer(text)["input_ids"]
        add_thinking_tokens(tiny_model(vocab_size=len(tokenizer)), tokenizer, 4)
        assert tokenizer(text)["input_ids"] == before
    for broken, words in ((own, "normalized=False"), ("<|think_", "already"), ("<|think_3|>", "already")):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([broken])
        size, before = len(tokenizer), tokenizer(text)["input_ids"]
        for _ in range(2):
            with pytest.raises(ValueError, match=re.escape(repr(broken)) + ".*" + words):
                add_thinking_tokens(tiny_model(vocab_size=size), tokenizer, 4)
        assert (len(tokenizer), tokenizer(text)["input_ids"]) == (size, before)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_single_thinking_token_starts_like_one_of_many(tie):
    """It has no others to differ from, and its gate is as open."""
    model, tokenizer = lifelike("llama", tie=tie), tiny_tokenizer()
    vocabulary = add_thinking_tokens(model, tokenizer, 1)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert 0.3 < norm_ratio(weight.detach(), vocabulary).item() < 3.0
    mass_M = think_mass_of(*scores(model, tokenizer, vocabulary))
    assert THINK_MASS / 3 < mass_M.mean() < THINK_MASS * 3
    assert mass_M.max() < 0.5


@pytest.mark.parametrize("family", ["llama", "granite", "cohere2"])
def test_thinking_rises_and_falls_with_the_real_logits(family):
    # Real rows with much in common: log Z swings between contexts, and so would the probability to think.
    model, tokenizer = lifelike(family, tie=False), tiny_tokenizer()
    with torch.no_grad():
        model.get_output_embeddings().weight += 2.0 * torch.randn(64, generator=torch.Generator().manual_seed(4))
    log_z_M, think_MN = scores(model, tokenizer, add_thinking_tokens(model, tokenizer, 8))
    assert log_z_M.std() > 0.7
    assert (think_MN.logsumexp(-1) - log_z_M).std() < 0.75 * log_z_M.std()


@pytest.mark.parametrize("think_mass", [0.005, 0.2])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_think_mass_is_the_one_asked_for(tie, think_mass):
    model, tokenizer = lifelike(tie=tie), tiny_tokenizer()
    vocabulary = add_thinking_tokens(model, tokenizer, 8, think_mass=think_mass)
    mass_M = think_mass_of(*scores(model, tokenizer, vocabulary, thoughts_every=THOUGHTS_EVERY))
    assert think_mass / 2 < mass_M.mean() < think_mass * 2


def test_rows_are_calibrated_on_the_given_text():
    rows = []
    for sample in (SAMPLE_TEXT, ["3 + 4 = 7, and 7 + 5 = 12; so 3 + 4 + 5 = 12. " * 60]):
        model, tokenizer = lifelike(tie=False), tiny_tokenizer()
        vocabulary = add_thinking_tokens(model, tokenizer, 8, sample_text=sample)
        mass_M = think_mass_of(*scores(model, tokenizer, vocabulary, sample, THOUGHTS_EVERY))
        assert THINK_MASS / 2 < mass_M.mean() < THINK_MASS * 2
        rows.append(model.get_output_embeddings().weight[list(vocabulary.ids)])
    assert not torch.allclose(*rows, atol=1e-2)


def test_rows_of_an_untrained_tied_model_are_distinct_and_of_ordinary_size():
    # Training from scratch starts here: initial weights, no direction that hidden states have in common, flat logits.
    model = tiny_model(scale=1 / 3, tie=True)
    vocabulary = add_thinking_tokens(model, tiny_tokenizer(), 4)
    rows_RD = model.get_input_embeddings().weight.detach()
    assert norm_ratio(rows_RD, vocabulary).max() < 3.0
    assert cosine(rows_RD[list(vocabulary.ids)]) < 0.9


WORDS = ["a", "e", "i"]


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_tokens_that_start_as_words_are_read_and_chosen_as_those_are(tie):
    model, tokenizer = lifelike(tie=tie), tiny_tokenizer()
    copied = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS]
    vocabulary = add_thinking_tokens(model, tokenizer, 8, words=WORDS)
    meant = torch.tensor([copied[i % 3] for i in range(8)])
    real, thoughts = torch.arange(vocabulary.first_id), list(vocabulary.ids)
    for rows_RD in (model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()):
        # What all rows have in common is no part of what one means.
        centred_RD = rows_RD - rows_RD[real].mean(0)
        nearest = torch.nn.functional.cosine_similarity(centred_RD[thoughts][:, None], centred_RD[real], dim=-1).argmax(-1)
        assert torch.equal(nearest, meant)
        assert cosine(rows_RD[thoughts]) < 0.995  # two copies of one word are two thoughts
    log_z_M, think_MN = scores(model, tokenizer, vocabulary)
    windows_BT = torch.tensor([i for text in SAMPLE_TEXT for i in tokenizer(text)["input_ids"]][:256]).view(-1, 64)
    words_MN = model(input_ids=windows_BT).logits[:, 1:, meant].flatten(0, 1).float()
    centred = [logits_MN - logits_MN.mean(-1, keepdim=True) for logits_MN in (think_MN, words_MN)]
    assert torch.corrcoef(torch.stack([logits_MN.flatten() for logits_MN in centred]))[0, 1] > 0.8
    assert THINK_MASS / 3 < think_mass_of(log_z_M, think_MN).mean() < THINK_MASS * 3


@pytest.mark.parametrize(
    ("num_tokens", "words", "message"),
    [
        (2, WORDS, "2 thinking tokens cannot be copies of 3 words (think_init_words): give fewer, or raise num_think_tokens."),
        (8, ["a", "harbour"], "The word 'harbour' (think_init_words) is 6 tokens of this tokenizer, and a thinking token is a copy of one."),
        (8, [""], "The word '' (think_init_words) is 0 tokens of this tokenizer"),
    ],
)
def test_words_that_cannot_be_copied_are_refused_untouched(num_tokens, words, message):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before, known = state(model), len(tokenizer)
    with pytest.raises(ValueError, match=re.escape(message)):
        add_thinking_tokens(model, tokenizer, num_tokens, words=words)
    assert same(state(model), before)
    assert len(tokenizer) == known


def test_tokens_that_have_a_meaning_do_not_start_anew():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    add_thinking_tokens(model, tokenizer, 8)
    with pytest.raises(ValueError, match="The model has thinking tokens, which cannot start anew as copies of words"):
        add_thinking_tokens(model, tokenizer, 8, words=WORDS)


def test_a_bias_of_free_rows_does_not_spoil_the_think_mass():
    # Phi-2 and GPT-J: a padded vocabulary, and an LM head whose bias has learned that its free rows never occur.
    model, tokenizer = lifelike("phi", vocab_size=384), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.bias[:320].normal_(generator=torch.Generator().manual_seed(0))
        model.lm_head.bias[320:] = -8.0
    vocabulary = add_thinking_tokens(model, tokenizer, 8)
    assert THINK_MASS / 3 < think_mass_of(*scores(model, tokenizer, vocabulary)).mean() < THINK_MASS * 3


def test_the_seed_decides_the_rows():
    def rows(seed):
        model = tiny_model(tie=False)
        ids = list(add_thinking_tokens(model, tiny_tokenizer(), 4, seed=seed).ids)
        return torch.stack([model.get_input_embeddings().weight[ids], model.get_output_embeddings().weight[ids]])

    assert torch.equal(rows(0), rows(0))
    assert (rows(0) - rows(1)).abs().amax((1, 2)).min() > 1e-2


def test_a_bf16_model_in_training_stays_one():
    model = tiny_model().bfloat16().train()
    add_thinking_tokens(model, tiny_tokenizer(), 4)
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.isfinite().all() and parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("sample", [[], [""], ["a"]], ids=["nothing", "empty", "one token"])
def test_too_little_sample_text_is_refused(sample):
    with pytest.raises(ValueError, match="sample_text"):
        add_thinking_tokens(tiny_model(), tiny_tokenizer(), 4, sample_text=sample)


def test_what_the_model_already_suppressed_stays_suppressed():
    model = tiny_model()
    model.generation_config.suppress_tokens = [7]
    vocabulary = add_thinking_tokens(model, tiny_tokenizer(), 4)
    assert model.generation_config.suppress_tokens == [7, *range(vocabulary.guard_id, 384)]


@pytest.mark.parametrize("family", [family for family in TINY if family not in ("dory", "xlstm")])
def test_every_family_is_the_same_model_when_plain_transformers_loads_it(tmp_path, family):
    model, ids = tiny_model(family, tie=False), torch.tensor([[1, 5, 9, 321, 7, 8, 323, 3]])
    add_thinking_tokens(model, tiny_tokenizer(), 4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits, atol=1e-6, rtol=0)


def test_a_model_without_a_head_is_told():
    with pytest.raises(ValueError, match="LlamaModel, which has no LM head: load it with AutoModelForCausalLM"):
        add_thinking_tokens(tiny_model().model, tiny_tokenizer(), 4)


def test_heads_that_cannot_grow_are_refused_unchanged():
    for family, told, changes in (("dory", "logit_scale", {}), ("apertus1p5_text", "300 rows and its embedding 320", {"output_vocab_size": 300})):
        if family not in TINY:
            pytest.skip("newer than this transformers")
        model, tokenizer = tiny_model(family, tie=False, **changes), tiny_tokenizer()
        before = state(model)
        with pytest.raises(ValueError, match=f"LM head of .*{family} has .*{told}"):
            add_thinking_tokens(model, tokenizer, 4)
        assert same(state(model), before)
        assert len(tokenizer) == 320


@pytest.mark.parametrize(
    "cuts", [{}, {"temperature": 0.1}, {"do_sample": True, "top_k": 5}, {"do_sample": True, "top_p": 0.1}, {"do_sample": True, "min_p": 0.9}], ids=str
)
def test_what_is_saved_thinks_in_generate_without_an_option(tmp_path, cuts):
    """Many thinking tokens share one probability, so each is less likely than many a word."""
    save_tiny(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0} | cuts))
    model, tokenizer = (kind.from_pretrained(tmp_path / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    vocabulary = add_thinking_tokens(model, tokenizer, 60, think_mass=0.1)
    model.save_pretrained(tmp_path / "thinker")
    thinker = AutoModelForCausalLM.from_pretrained(tmp_path / "thinker")
    prompt = {"input_ids": torch.arange(1, 11)[None].repeat(64, 1), "attention_mask": torch.ones(64, 10, dtype=torch.long)}
    torch.manual_seed(0)
    part = vocabulary.is_thought(thinker.generate(**prompt, max_new_tokens=8, min_new_tokens=8)[:, 10:]).float().mean()
    with torch.no_grad():
        first = vocabulary.is_thought(torch.arange(thinker.config.vocab_size))
        mass = thinker(**prompt).logits[0, -1].softmax(-1)[first].sum()
    assert part > 0.5 * mass > 0.02


def test_a_base_whose_generation_config_could_not_be_saved_is_refused_unchanged():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.update(length_penalty=2.0, temperature=0.9)
    before, generation = state(model), model.generation_config.to_dict()
    with pytest.raises(ValueError, match=r"contradict or rule out some .length_penalty.: take them out of generation_config.json"):
        add_thinking_tokens(model, tokenizer, 4)
    assert same(state(model), before)
    assert len(tokenizer) == 320
    assert model.generation_config.to_dict() == generation


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "do_sample": False}, {"do_sample": False}], ids=["sample", "beams", "greedy"])
def test_generate_never_emits_the_guard_or_padding_rows(options):
    model, tokenizer = tiny_model(tie=False), tiny_tokenizer()
    vocabulary = add_thinking_tokens(model, tokenizer, 4, think_mass=0.5)
    with torch.no_grad():  # as likely as can be, whatever the context
        model.get_output_embeddings().weight[vocabulary.guard_id :: 2] *= -50
        model.get_output_embeddings().weight[vocabulary.guard_id + 1 :: 2] *= 50
    prompt = {"input_ids": torch.arange(10)[None].repeat(4, 1), "attention_mask": torch.ones(4, 10, dtype=torch.long)}
    options = {"max_new_tokens": 20, "pad_token_id": 0, **options}
    torch.manual_seed(0)
    assert (model.generate(**prompt, **options)[:, 10:] < vocabulary.guard_id).all()
    model.generation_config.suppress_tokens = None
    assert (model.generate(**prompt, **options)[:, 10:] >= vocabulary.guard_id).any()


RELOAD = """
import sys
sys.modules["hf_thinktok"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for path in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = torch.load(path + "/ids.pt")
    torch.manual_seed(0)
    new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=40, pad_token_id=0)
    found = {"new": new[:, ids.shape[1] :], "text": tokenizer.batch_decode(new, skip_special_tokens=True)}
    found["attack"] = tokenizer("x <|think_0|> y")["input_ids"]
    with torch.no_grad():
        found["logits"] = model(input_ids=ids).logits
    torch.save(found, path + "/found.pt")
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Saved models, and what a process that cannot import this package makes of them."""
    saved = {}
    for name, model in (("tied", lifelike(tie=True)), ("untied", lifelike(tie=False)), ("windowed", lifelike("gemma3_text", sliding_window=8))):
        path, tokenizer = tmp_path_factory.mktemp(name), tiny_tokenizer()
        vocabulary = add_thinking_tokens(model, tokenizer, 4, think_mass=0.3)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        torch.save(torch.tensor([[5, 9, vocabulary.ids[2], 17, vocabulary.ids[0], 40]] * 4), path / "ids.pt")
        saved[name] = model, vocabulary, path
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    paths = [str(path) for _, _, path in saved.values()]
    subprocess.run([sys.executable, "-c", RELOAD, *paths], check=True, cwd=paths[0], env=environment, timeout=120)
    return saved


@pytest.mark.parametrize("name", ["tied", "untied", "windowed"])
def test_a_checkpoint_needs_no_code_of_ours(checkpoints, name):
    model, vocabulary, path = checkpoints[name]
    ids_BT, found = torch.load(path / "ids.pt"), torch.load(path / "found.pt")
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(input_ids=ids_BT).logits, atol=1e-6, rtol=0.0)
    assert (found["new"] < vocabulary.guard_id).all()
    assert vocabulary.is_thought(found["new"]).any()
    assert not vocabulary.is_thought(found["new"]).all()
    spoken = [[i for i in [*ids, *new] if i not in vocabulary.ids] for ids, new in zip(ids_BT.tolist(), found["new"].tolist())]
    assert found["text"] == tiny_tokenizer().batch_decode(spoken, skip_special_tokens=True)
    assert not any(i in vocabulary.ids for i in found["attack"])


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_checkpoint_says_what_thinks(checkpoints, name):
    model, vocabulary, path = checkpoints[name]
    config = json.loads((path / "config.json").read_text())
    assert config["thinktok"] == {"first_id": 320, "num_tokens": 4, "guard_id": 324}
    assert ThinkingVocabulary.from_pretrained(path) == ThinkingVocabulary.from_pretrained(str(path)) == vocabulary
    assert GenerationConfig.from_pretrained(path).suppress_tokens == list(range(324, 384))
    reloaded, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert add_thinking_tokens(reloaded, tokenizer) == vocabulary
    assert same(state(reloaded), state(model))
    assert len(tokenizer) == 325


def test_a_checkpoint_without_thinking_tokens_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no thinking tokens"):
        ThinkingVocabulary.from_pretrained(tmp_path)


def test_is_thought_is_exact():
    vocabulary = ThinkingVocabulary(10, 3, 13)
    assert vocabulary.is_thought(torch.arange(8, 15)).tolist() == [False, False, True, True, True, False, False]
    assert list(vocabulary.ids) == [10, 11, 12]


@functools.cache
def tokenizers(kind: str, reloaded: bool = False) -> tuple:
    """The tokenizer as it was, with thinking tokens, and its vocabulary. The second one may have been saved and loaded."""
    before = tokenizer_of_kind(kind)
    model, after = tiny_model(vocab_size=len(before)), tokenizer_of_kind(kind)
    vocabulary = add_thinking_tokens(model, after, 12)
    if reloaded:
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            after.save_pretrained(folder)
            after = AutoTokenizer.from_pretrained(folder)
    return before, after, vocabulary


def test_skip_special_tokens_hides_thoughts_and_nothing_else():
    _, tokenizer, vocabulary = tokenizers("bytes")
    text = "the cat <|think_0|> sat\n on <|think_ the mat"
    ids = tokenizer(text)["input_ids"]
    with_thoughts = [vocabulary.ids[3], *ids[:4], *vocabulary.ids, *ids[4:], vocabulary.ids[0]]
    assert tokenizer.decode(with_thoughts, skip_special_tokens=True) == text
    shown = tokenizer.decode(with_thoughts)
    assert shown.startswith("<|think_3|>")
    assert all(token in shown for token in vocabulary.tokens)
    assert tokenizer.decode([*tokenizer("<|im_start|>the")["input_ids"], vocabulary.ids[1]], skip_special_tokens=True) == "the"


@pytest.mark.parametrize("kind", ["bytes", "nfc", "prepend", "replace", "metaspace"])
def test_where_skip_special_tokens_cannot_hide_thoughts_it_is_said(kind, caplog):
    tokenizer = tokenizer_of_kind(kind)
    vocabulary = add_thinking_tokens(tiny_model(vocab_size=len(tokenizer)), tokenizer, 4)
    hidden = not tokenizer.decode([*vocabulary.ids], skip_special_tokens=True).strip()
    assert hidden is (kind != "prepend")
    assert ("skip_special_tokens=True shows thoughts with it" in caplog.text) is not hidden


PIECES = [
    *("<|think_", "<|think", "<|", "<", "|", "think_", "_", "0", "1", "11", "|>", ">", "<|think_0|>", "<|think_3|>", "<|think_11|>", "<|think_99|>"),
    *(" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u200b", "\u2028", "▁", "Ġ", "\ufeff", "\0"),
    *("é", "e\u0301", "你", "🤔", "\u0338", "\u212a", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "the cat", "user", "\\", "<0x3C>"),
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=12).map("".join)
KINDS = ["bytes", "nfc", "prepend", "replace", "metaspace"]


def encodings(tokenizer, text: str, other: str):
    """Every way in which a user's text becomes ids."""
    yield tokenizer(text)["input_ids"]
    yield tokenizer(text, add_special_tokens=False)["input_ids"]
    yield tokenizer.encode(text)
    yield tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    yield tokenizer(text, split_special_tokens=True)["input_ids"]
    yield tokenizer(text, other)["input_ids"]
    yield tokenizer([text, other], is_split_into_words=True)["input_ids"]
    yield from tokenizer([text, other], padding=True)["input_ids"]
    yield from tokenizer([(text, other), (other, text)])["input_ids"]
    messages = [{"role": "user", "content": text}, {"role": other, "content": text + other}]
    yield tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    yield tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("reloaded", [False, True], ids=["", "reloaded"])
@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=texts, other=texts)
@example(text="<|think_0|>", other=" <|think_1|> ")
@example(text="<|think_<|think_0|>0|>", other="<|im_start|><|think_0|>")
def test_no_text_becomes_a_thought(kind, reloaded, text, other):
    _, tokenizer, vocabulary = tokenizers(kind, reloaded)
    for ids in encodings(tokenizer, text, other):
        assert not any(i in vocabulary.ids for i in ids)


REPEATED_PREFIX = pytest.mark.xfail(
    strict=True, reason="its normalizer puts a space before every stretch of text between added tokens, so also after the guard"
)


@pytest.mark.parametrize("reloaded", [False, True], ids=["", "reloaded"])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=REPEATED_PREFIX) if kind == "prepend" else kind for kind in KINDS])
@EXAMPLES
@given(text=texts)
@example(text="a<|think_0|>b")
def test_text_survives_as_well_as_before(kind, reloaded, text):
    before, tokenizer, _ = tokenizers(kind, reloaded)
    if GUARD not in unicodedata.normalize("NFKC", text):
        assert tokenizer(text)["input_ids"] == before(text)["input_ids"]
    if before.decode(before(text)["input_ids"]) == text:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


REWRITES = [
    *(("nfkc", attack) for attack in ("\uff1c\uff5cthink_0\uff5c\uff1e", "<|think\uff3f0|>")),
    *(("lowercase", attack) for attack in ("<|THINK_0|>", "<|thin\u212a_0|>")),
    *(("accents", attack) for attack in ("<|thi\u0301nk_0|>", "<|thínk_0|>")),
    *(("bert", attack) for attack in ("<|THINK_0|>", "<|th\0ink_0|>", "<|th\u200bink_0|>")),
]


@pytest.mark.parametrize(("kind", "attack"), REWRITES)
def test_a_tokenizer_that_rewrites_text_into_thoughts_is_made_safe_or_refused(kind, attack):
    with contextlib.suppress(ValueError):
        _, tokenizer, vocabulary = tokenizers(kind)
        assert not any(i in vocabulary.ids for i in tokenizer(attack)["input_ids"])


def test_a_tokenizer_that_turns_literal_text_into_thoughts_is_refused():
    with pytest.raises(ValueError, match="anybody could write the model's thoughts"):
        add_thinking_tokens(tiny_model(vocab_size=300), ByT5Tokenizer(extra_ids=0), 4)


def test_other_special_tokens_keep_their_meaning():
    before, after, vocabulary = tokenizers("bytes")
    after = copy.deepcopy(after)
    assert (after.eos_token_id, after.pad_token_id, after.chat_template) == (before.eos_token_id, before.pad_token_id, before.chat_template)
    assert after("<|im_start|>the<|im_end|>")["input_ids"] == before("<|im_start|>the<|im_end|>")["input_ids"]
    # A thought is written by its id alone.
    assert after.decode([vocabulary.ids[5]]) == "<|think_5|>"
