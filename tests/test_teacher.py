"""Labels drawn from a teacher, on the data's text and on the model's own, against the teacher on ordinary rows."""

import numpy as np
import pytest
import torch
from models import CORPUS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_thinktok.teacher import own_text, real_tokens_only, taught

T = 24


@pytest.fixture
def make(make_trainer, tmp_path):
    """A student and its teacher, another model of the same tokenizer."""

    def build(rollout="free", repeats=False, **options):
        tokenizer = tiny_tokenizer()
        teacher = tiny_model(vocab_size=len(tokenizer), seed=5, scale=1.0 if repeats else 4.0)
        if repeats:
            with torch.no_grad():  # one that repeats what was said last, which a student can learn in no time
                for name, parameter in teacher.named_parameters():
                    parameter.mul_(0.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 6.0 if name == "model.norm.weight" else 1.0)
        folder = tmp_path / "teacher"
        teacher.save_pretrained(folder), tokenizer.save_pretrained(folder)
        options = {"max_length": T, "teacher": str(folder), "rollout": rollout, "num_forks": 2} | ({"prompt_length": 4} if rollout == "free" else {}) | options
        return make_trainer(**options), teacher

    return build


def test_labels_are_drawn_as_the_teacher_predicts(make):
    """Over many draws, at every place of every packed document; what carried no label carries none."""
    trainer, teacher = make("fork")
    ids = torch.randint(10, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, -1, -1]])
    labels = ids.where(documents >= 0, -100)
    labels[0, 2] = -100
    inputs = {name: rows.repeat(500, 1) for name, rows in {"input_ids": ids, "documents": documents, "labels": labels}.items()}
    generator = torch.Generator().manual_seed(1)
    drawn = torch.cat([taught(trainer.teacher, inputs, trainer.vocabulary, generator)["labels"].view(-1, *ids.shape) for _ in range(8)])
    starts = {(0, 0), (0, 4), (1, 0)}
    for row, place in np.ndindex(2, 9):
        if documents[row, place] < 0 or (row, place) in starts or (row, place) == (0, 2):
            assert (drawn[:, row, place] == -100).all()
            continue
        start = 4 if row == 0 and place > 4 else 0
        probabilities = teacher(ids[None, row, start:place]).logits[0, -1, : trainer.vocabulary.num_real].softmax(-1)
        counts = torch.bincount(drawn[:, row, place], minlength=len(probabilities)) / len(drawn)
        assert ((counts - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / len(drawn)).sqrt() + 2e-3).all()


def test_packed_documents_cost_the_teacher_no_more_than_their_own_length(make):
    trainer, _ = make("fork")
    documents = torch.arange(12).repeat_interleave(3)[None]
    widths = []
    trainer.teacher.register_forward_pre_hook(lambda model, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    ids = torch.randint(10, 200, documents.shape)
    taught(trainer.teacher, {"input_ids": ids, "documents": documents, "labels": ids}, trainer.vocabulary, torch.Generator())
    nothing = torch.full_like(documents, -1)
    taught(trainer.teacher, {"input_ids": ids, "documents": nothing, "labels": torch.full_like(ids, -100)}, trainer.vocabulary, torch.Generator())
    assert widths == [(12, 3), (1, 1)], "and a rank without text makes its pass"


def test_a_text_that_looks_like_a_thought_has_a_teacher(make):
    """Its tokenizer has the guard for it, of which the teacher has no row."""
    trainer, teacher = make("fork")
    rows = torch.tensor([[10, 11, trainer.vocabulary.guard_id, 12], [10, 11, 0, 12]])
    labels = rows.where(rows < trainer.vocabulary.num_real, -100)
    assert teacher.get_input_embeddings().num_embeddings <= trainer.vocabulary.guard_id
    found = [
        taught(trainer.teacher, {"input_ids": row, "documents": torch.zeros_like(row), "labels": labels[:1]}, trainer.vocabulary, torch.Generator())["labels"]
        for row in rows[:, None]
    ]
    assert torch.equal(*found)
    assert (found[0] >= 0).tolist() == [[False, True, False, True]]


def test_own_text_is_what_the_model_writes_without_its_thoughts(make):
    trainer, _ = make()
    with torch.no_grad():  # think about as often as speak
        trainer.model.get_output_embeddings().weight[list(trainer.vocabulary.ids)] *= 6.0
    inputs = trainer.data_collator([{"input_ids": trainer._tokenizer(text)["input_ids"][: T - i]} for i, text in enumerate(CORPUS[:3])])
    trainer.model.generation_config.repetition_penalty = 50.0  # must have no part in it
    plain = trainer.model.generation_config
    written = []
    generate = trainer.model.generate
    trainer.model.generate = lambda **kwargs: written.append(generate(**kwargs)) or written[-1]
    before = torch.random.get_rng_state()
    texts = [own_text(trainer.model, inputs, 4, trainer.vocabulary, trainer._tokenizer.eos_token_id, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert trainer.vocabulary.is_thought(written[0]).any(), "the model must think to be a test"
    assert trainer.model.generation_config is plain
    assert torch.equal(texts[0]["input_ids"], texts[1]["input_ids"])
    assert not torch.equal(texts[0]["input_ids"], texts[2]["input_ids"])
    assert len(set((inputs["documents"] >= 0).sum(1).tolist())) > 1, "rows of several lengths"
    inputs["labels"][1, :6] = -100
    texts.append(own_text(trainer.model, inputs, 4, trainer.vocabulary, None, torch.Generator().manual_seed(2)))
    for text, raw in zip(texts, written, strict=True):
        assert torch.equal(text["input_ids"][:, :4], inputs["input_ids"][:, :4])
        for row in range(3):
            length = int((inputs["documents"][row] >= 0).sum())
            said = [i for i in raw[row].tolist() if i < trainer.vocabulary.num_real][:length]
            there = text["documents"][row] >= 0
            assert text["input_ids"][row][there].tolist() == said
            assert there.tolist() == [True] * len(said) + [False] * (len(there) - len(said))
            silent = 6 if row == 1 and text is texts[-1] else 0
            assert text["labels"][row][there].tolist() == [-100] * silent + said[silent:]


def test_a_row_of_one_token_is_not_written_on(make):
    trainer, _ = make()
    ids = torch.tensor([[5]])
    inputs = {"input_ids": ids, "labels": ids, "documents": ids * 0}
    assert own_text(trainer.model, inputs, 4, trainer.vocabulary, None, torch.Generator())["input_ids"].tolist() == [[5]]


def test_a_student_is_given_as_much_of_the_text_as_asked(make, monkeypatch):
    given = []
    monkeypatch.setattr("hf_thinktok.trainer.own_text", lambda model, inputs, length, *others: given.append(length) or own_text(model, inputs, length, *others))
    make(max_steps=1)[0].train()
    assert set(given) == {4}


def test_a_student_learns_what_its_teacher_says_about_its_own_text(make):
    """On text of its own the student's prediction moves towards the teacher's, and thoughts are rewarded meanwhile."""
    trainer, teacher = make(repeats=True, max_steps=80, learning_rate=1e-2, per_device_train_batch_size=8)

    def divergence():
        ids = torch.randint(10, 200, (8, T), generator=torch.Generator().manual_seed(2))
        own = own_text(trainer.model, {"input_ids": ids, "labels": ids, "documents": ids * 0}, 4, trainer.vocabulary, 0, torch.Generator().manual_seed(3))
        with torch.no_grad():
            theirs, ours = (model(own["input_ids"]).logits[..., : trainer.vocabulary.num_real].log_softmax(-1) for model in (teacher, trainer.model.eval()))
        return (theirs.exp() * (theirs - ours)).sum(-1)[own["documents"] >= 0].mean().item()

    before = divergence()
    trainer.train()
    assert divergence() < 0.3 * before
    assert all("reward" in entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("rollout", ["free", "fork"])
def test_resumes_bit_for_bit(make, resumed, rollout):
    resumed(lambda **options: make(rollout, **options)[0])


def test_a_teacher_may_be_given_as_a_model_and_stays_as_it_is(make):
    trainer, teacher = make(max_steps=2)
    before = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    assert torch.equal(real_tokens_only(teacher, trainer.vocabulary)(torch.arange(5)[None]).logits, trainer.teacher(torch.arange(5)[None]).logits)


def test_teachers_that_do_not_fit(make, make_trainer, tmp_path):
    with pytest.raises(ValueError, match="needs a teacher"):
        make_trainer(rollout="free")
    with pytest.raises(ValueError, match="no teacher at"):
        make(teacher=str(tmp_path / "nowhere"))
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(tiny_model(vocab_size=320).config).save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="another tokenizer"):
        make(teacher=str(other))
    small = tiny_model(vocab_size=300)
    with pytest.raises(ValueError, match="The teacher has 300 tokens"):
        real_tokens_only(small, make()[0].vocabulary)


def test_own_text_is_drawn_from_the_whole_softmax(make_trainer):
    trainer = make_trainer(max_length=24)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(1e-4)  # all tokens nearly alike
    ids = torch.full((600, 2), 5)
    text = own_text(trainer.model, {"input_ids": ids, "labels": ids, "documents": ids * 0}, 1, trainer.vocabulary, None, torch.Generator().manual_seed(0))
    assert len(text["input_ids"].unique()) > 200
