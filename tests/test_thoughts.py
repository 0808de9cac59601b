"""Thoughts that are vectors, against loops over ordinary rows: no tree, no shared pass, one fork at a time."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import tiny_model, tiny_tokenizer
from peft import LoraConfig

from hf_thinktok.answers import answer
from hf_thinktok.engine import ReplicatedEngine, TreeEngine
from hf_thinktok.thoughts import swapped

N, L = 4, 3


def texts(lengths=(7, 9)):
    random = np.random.default_rng(0)
    return Dataset.from_list([{"input_ids": random.integers(10, 200, length).tolist()} for length in lengths])


def questions(count=12):
    """Rows with one answer each; thoughts of 0, 1 or 2 nodes."""
    random = np.random.default_rng(1)
    rows = [random.integers(10, 200, 6).tolist() for _ in range(count)]
    return Dataset.from_list([{"input_ids": ids, "labels": [-100] * 5 + ids[5:], "think_length": i % 3} for i, ids in enumerate(rows)])


@pytest.fixture
def make(make_trainer):
    def build(rows=None, **options):
        defaults = {"stop": "fixed", "num_forks": 2, "max_think_length": L, "num_think_tokens": N, "lookahead": 2, "text_ce_weight": 0.0}
        return make_trainer(train_dataset=texts() if rows is None else rows, **defaults | options)

    return build


class Loop:
    """The definition: what a thought reads and what is said after it, from whole rows of input embeddings on models with their own forward.

    Args:
        noise_BKGLN: of the draws, and `thoughts_BKGL` what was drawn, for `gumbel`.
    """

    def __init__(self, trainer, rollout=None):
        self.args, self.vocabulary = trainer.args, trainer.vocabulary
        self.peft = hasattr(trainer.model, "get_base_model")
        self.twin = copy.deepcopy(trainer.model).train()
        self.thinker = self.twin.get_base_model() if self.peft else self.twin
        self.speaker = self.thinker.speaker if trainer.args.policies == "split" else self.thinker
        for model in {self.thinker, self.speaker}:
            del model.forward
        self.rollout = rollout

    def embed(self, model, ids):
        return model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))[0]

    def run(self, model, row_PD):
        """Logits, all hidden states, and what entered the LM head."""
        entered = []
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        out = model(inputs_embeds=row_PD[None], output_hidden_states=True, use_cache=False)
        hook.remove()
        return out.logits[0], out.hidden_states, entered[0][0]

    def read(self, model, thought):
        """One thought node's input embedding."""
        if self.args.thoughts == "continuous":
            return thought[None]
        return thought[None] @ self.embed(model, list(self.vocabulary.ids))

    def think(self, ids, where=None, length=L):
        """Hidden states, or straight-through one-hot vectors, of one thought after `ids`; `where` is its row, fork and generation."""
        thoughts = []
        for depth in range(length):
            row = torch.cat([self.embed(self.thinker, ids), *[self.read(self.thinker, thought) for thought in thoughts]])
            logits, hidden, entered = self.run(self.thinker, row)
            if self.args.thoughts == "continuous":
                thoughts.append(entered[-1] if self.args.continuous_layer == -1 else hidden[self.args.continuous_layer][0, -1])
                continue
            think = logits[-1, self.vocabulary.first_id : self.vocabulary.guard_id] + self.rollout.noise_BKGLN[where][depth]
            soft = (think / self.args.temperature).softmax(-1)
            hard = torch.nn.functional.one_hot(self.rollout.thoughts_BKGL[where][depth] - self.vocabulary.first_id, N)
            assert think.argmax() == hard.argmax()
            thoughts.append(hard + soft - soft.detach())
        return thoughts

    def say(self, ids, thoughts, after):
        """log p of each token that follows."""
        start = [] if self.args.blind else [self.embed(self.speaker, ids)]
        row = torch.cat([*start, *[self.read(self.speaker, thought) for thought in thoughts], self.embed(self.speaker, after[:-1])])
        logps = self.run(self.speaker, row)[0][-len(after) :, : self.vocabulary.num_real].log_softmax(-1)
        return logps[range(len(after)), after]

    def loss(self, rows, rollout):
        """How the tokens after the thoughts fare, minus the sum over forks for each token of the text."""
        batch, forks, groups = rollout.lengths_BKG.shape
        total = 0.0
        for b, k in np.ndindex(batch, forks):
            fork, ids = int(rollout.forks_BK[b, k]), rows[b]["input_ids"]
            if fork < 0:
                continue
            after = ids[fork + 1 : fork + 1 + self.args.lookahead]
            said = torch.stack([self.say(ids[: fork + 1], self.think(ids[: fork + 1], (b, k, g)), after).mean() for g in range(groups)])
            total = total - (said.logsumexp(0) if self.args.objective == "marginal" else said.mean())
        return total / sum(len(row["input_ids"]) - 1 for row in rows)


def check_against_loop(trainer, rows, tolerance=2e-5):
    """The loss and every gradient of the trainer are the loop's; gives the largest of these."""
    with torch.no_grad():
        if trainer.args.policies == "split":  # a copy of the thinker would hide a mix-up
            for parameter in trainer.model.speaker.parameters():
                parameter.mul_(1.2)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zeros would hide what goes through the adapter
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    trainer.model.train()
    inputs = trainer.data_collator(list(rows))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    loop = Loop(trainer, trainer._rollouts[0])
    loop.twin.zero_grad()
    expected = loop.loss(rows, trainer._rollouts[0])
    expected.backward()
    if trainer.args.objective == "expected":
        assert loss.item() == pytest.approx(expected.item(), abs=2e-5)
    largest = max(b.grad.abs().max() for b in loop.twin.parameters() if b.grad is not None)
    for (name, a), b in zip(trainer.model.named_parameters(), loop.twin.parameters(), strict=True):
        ours, theirs = (torch.zeros_like(a) if p.grad is None else p.grad for p in (a, b))
        torch.testing.assert_close(ours, theirs, atol=tolerance * max(1.0, largest.item()), rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    return loop


# ---------------------------------------------------------------- continuous


CONTINUOUS = [
    ("llama", {"continuous_layer": -1, "num_generations": 1}),
    ("llama", {"continuous_layer": 1, "num_generations": 2}),
    ("llama", {"blind": True, "num_generations": 1}),
    ("llama", {"blind": True, "policies": "split", "continuous_layer": -2}),
    ("llama", {"policies": "split"}),
    ("llama", {"engine": "replicated", "blind": True}),
    ("gpt2", {"continuous_layer": -1, "num_generations": 1}),
    ("gpt2", {"continuous_layer": 1, "blind": True}),
    ("gemma3_text", {"continuous_layer": -1}),
    ("gemma3_text", {"continuous_layer": 0, "blind": True}),
    ("mamba", {"continuous_layer": -1}),
    ("mamba", {"continuous_layer": 0, "blind": True}),
    ("bloom", {"continuous_layer": 1, "num_generations": 1}),
]


@pytest.mark.parametrize(("family", "options"), CONTINUOUS, ids=lambda case: case if isinstance(case, str) else "-".join(map(str, case.values())))
def test_hidden_states_are_fed_back_as_in_a_loop_over_rows(make, family, options):
    rows = texts()
    trainer = make(rows, family=family, thoughts="continuous", **options)
    replicated = family in ("mamba", "bloom") or "engine" in options
    assert isinstance(trainer.engine, ReplicatedEngine if replicated else TreeEngine)
    check_against_loop(trainer, rows, tolerance=1e-4 if family == "mamba" else 2e-5)  # its recurrence multiplies rounding errors


def test_hidden_states_go_through_an_adapter(make):
    rows = texts()
    check_against_loop(make(rows, thoughts="continuous", peft_config=LoraConfig(r=2, target_modules="all-linear")), rows)


# ---------------------------------------------------------------- gumbel


GUMBEL = [
    ("llama", {"temperature": 0.7}),
    ("llama", {"temperature": 2.0, "blind": True}),
    ("llama", {"objective": "marginal", "lookahead": 1, "num_generations": 3}),
    ("llama", {"policies": "split", "blind": True}),
    ("llama", {"policies": "split"}),
    ("gpt2", {"num_generations": 1}),
    ("gemma3_text", {}),
    ("bloom", {"temperature": 0.7}),
    ("mamba", {"blind": True}),
]


@pytest.mark.parametrize(("family", "options"), GUMBEL, ids=lambda case: case if isinstance(case, str) else "-".join(map(str, case.values())))
def test_the_gradient_is_that_of_the_soft_mixture(make, family, options):
    rows = texts()
    check_against_loop(make(rows, family=family, thoughts="gumbel", **options), rows)


def test_the_mixture_has_the_rows_of_an_adapter(make):
    rows = texts()
    trainer = make(rows, thoughts="gumbel", peft_config=LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():  # as the base model's, they would hide which of the two is read
        for name, parameter in trainer.model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.mul_(1.5)
    check_against_loop(trainer, rows)


@pytest.mark.parametrize("engine", ["tree", "replicated"])
def test_the_forward_is_that_of_the_tokens(make, engine):
    """With the same tokens a discrete tree says the same, bit for bit."""
    rows = texts()
    trainer = make(rows, thoughts="gumbel", engine=engine)
    inputs = trainer.data_collator(list(rows))
    labels = trainer._labels(inputs)
    drawn = trainer._rollout(trainer.model, inputs, labels, 0, trainer._schedule_step(inputs))
    soft = trainer._think(trainer.model, inputs, drawn)
    assert soft.soft_BKGLX is not None
    tree = trainer._tree(inputs, drawn)
    a, b = (trainer._score(trainer.model, tree, inputs["input_ids"], labels, rollout) for rollout in (soft, drawn))
    assert torch.equal(a.logps_BKGH, b.logps_BKGH)
    assert torch.equal(a.think_logps_BKGLN, b.think_logps_BKGLN)
    with torch.no_grad():
        assert trainer._think(trainer.model, inputs, drawn).soft_BKGLX is None, "without a gradient the passes would be for nothing"


def test_tokens_are_drawn_from_their_softmax(make):
    """Whatever the temperature, which is the mixture's."""
    rows = Dataset.from_list([{"input_ids": texts()[0]["input_ids"], "labels": [-100] * 6 + [20]}])
    trainer = make(rows, thoughts="gumbel", num_generations=6000, max_think_length=1, num_forks=1, lookahead=1, temperature=0.2)
    inputs = trainer.data_collator(list(rows))
    rollout = trainer._rollout(trainer.model, inputs, trainer._labels(inputs), 0, trainer._schedule_step(inputs))
    torch.manual_seed(7)  # draws are the step's own, whatever else drew before
    assert torch.equal(trainer._rollout(trainer.model, inputs, trainer._labels(inputs), 0, trainer._schedule_step(inputs)).noise_BKGLN, rollout.noise_BKGLN)
    choices = rollout.thoughts_BKGL.flatten() - trainer.vocabulary.first_id
    logits = trainer.model(input_ids=torch.tensor([rows[0]["input_ids"][:6]])).logits[0, -1]
    expected = logits[trainer.vocabulary.first_id : trainer.vocabulary.guard_id].softmax(-1)
    assert (torch.bincount(choices, minlength=N) / len(choices) - expected).abs().max() < 0.03
    torch.testing.assert_close(rollout.logps_BKGL.flatten().exp(), expected[choices], atol=1e-5, rtol=0)


def test_balance_and_servo_reach_soft_thoughts(make):
    rows = texts()
    trainer = make(rows, thoughts="gumbel", balance_coef=[1.0], thought_entropy_target=[0.5])
    plain = make(rows, thoughts="gumbel")
    inputs = trainer.data_collator(list(rows))
    values = [one.compute_loss(one.model.train(), dict(inputs)).item() for one in (trainer, plain)]
    assert values[0] < values[1] - 0.1
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, dict(inputs))
    trainer.log({})
    assert trainer.state.log_history[-1]["mean_choice_entropy"]


# ---------------------------------------------------------------- training, evaluation, answers


@pytest.mark.parametrize("options", [{"thoughts": "gumbel"}, {"thoughts": "continuous"}, {"thoughts": "continuous", "continuous_layer": 1}])
def test_checkpointed_activations_have_the_same_gradient(make, options):
    rows = texts()
    gradients = []
    for checkpointed in (False, True):
        trainer = make(rows, **options)
        trainer.model.train()
        if checkpointed:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.compute_loss(trainer.model, trainer.data_collator(list(rows))).backward()
        gradients.append([parameter.grad for parameter in trainer.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def hidden_kinds(kinds, count=64):
    """The answer is the question's last token, one of a few kinds: nobody who sees no thought has less than ln(kinds) nats."""
    random = np.random.default_rng(2)
    rows = [[*random.integers(10, 200, 4).tolist(), 20 + kind] for kind in random.permutation(np.arange(count) % kinds).tolist()]
    return Dataset.from_list([{"input_ids": [*ids, ids[-1]], "labels": [-100] * 5 + ids[-1:]} for ids in rows])


@pytest.mark.parametrize(("kind", "options", "kinds"), [("gumbel", {"num_generations": 4}, 2), ("continuous", {"num_generations": 1}, 4)])
def test_a_blind_speaker_learns_what_only_the_thought_knows(make, kind, options, kinds):
    rows = hidden_kinds(kinds)
    common = {"blind": True, "num_forks": 1, "lookahead": 1, "max_think_length": 1, "per_device_train_batch_size": 16, "max_steps": 150}
    trainer = make(rows, thoughts=kind, learning_rate=5e-3, lr_scheduler_type="constant", logging_steps=20, **common | options)
    trainer.train()
    said, other = answer(trainer, rows), answer(trainer, rows, "random")
    assert -said.logps_D.mean() < 0.3 * math.log(kinds)
    assert said.accuracy == 1
    assert other.accuracy < 0.7
    assert -other.logps_D.mean() > math.log(kinds)


@pytest.mark.parametrize("kind", ["gumbel", "continuous"])
def test_resumes_bit_for_bit(make, resumed, kind):
    _, again = resumed(make, thoughts=kind, learning_rate=1e-2)
    written = again.model.config.thinktok
    assert written["thoughts"] == kind
    assert ("continuous_layer" in written) == (kind == "continuous")


def test_evaluation_compares_with_thoughts_from_elsewhere(make):
    """Each held-out fork is judged after its own hidden states, and after those of another fork."""
    rows = texts((8, 8))
    trainer = make(rows, thoughts="continuous", eval_dataset=rows, num_forks=1, num_generations=1, lookahead=1, per_device_eval_batch_size=2)
    result = trainer.evaluate()
    loop, generator = Loop(trainer), trainer._generator(1, 0)
    inputs = trainer.data_collator(list(rows))
    forks = trainer._forks(trainer.model, inputs, trainer._labels(inputs), generator, "random")[:, 0].tolist()
    contexts = [row["input_ids"][: fork + 1] for row, fork in zip(rows, forks, strict=True)]
    thoughts, next_ones = [loop.think(ids) for ids in contexts], [row["input_ids"][fork + 1] for row, fork in zip(rows, forks, strict=True)]

    def bits(order):
        return -np.mean([loop.say(contexts[i], thoughts[j], [next_ones[i]]).item() for i, j in enumerate(order)]) / math.log(2)

    assert result["eval_bits_think"] == pytest.approx(bits([0, 1]), abs=1e-4)
    assert result["eval_bits_random_thought"] == pytest.approx(bits([1, 0]), abs=1e-4)


def test_gumbel_is_evaluated_and_answers_as_tokens(make):
    rows = questions()
    options = {"num_forks": 1, "lookahead": 1, "max_think_length": 2, "eval_dataset": rows}
    soft, hard = make(rows, thoughts="gumbel", temperature=0.5, **options), make(rows, **options)
    for how in ("think", "random", "none"):
        a, b = answer(soft, rows, how), answer(hard, rows, how)
        assert np.array_equal(a.thoughts_DL, b.thoughts_DL)
        assert np.allclose(a.logps_D, b.logps_D, atol=1e-6)
    assert {"eval_bits_think", "eval_bits_random_thought"} <= set(soft.evaluate())


def test_answers_of_hidden_states(make):
    """Thoughts of given lengths; a `random` thought is another row's, cut or thought on to this row's length."""
    rows = questions(6)
    trainer = make(rows, thoughts="continuous", num_forks=1, lookahead=1, max_think_length=2)
    loop = Loop(trainer)
    said = {how: answer(trainer, rows, how) for how in ("think", "random", "none")}
    by_length = np.argsort(rows["think_length"], kind="stable")
    for place, i in enumerate(by_length.tolist()):
        ids, length, other = rows[i]["input_ids"], rows[i]["think_length"], rows[int(by_length[(place + 1) % 6])]["input_ids"]
        for how, thinker, steps in (("think", ids, length), ("random", other, length), ("none", ids, 0)):
            expected = loop.say(ids[:5], loop.think(thinker[:5], length=steps), ids[5:])
            assert said[how].logps_D[i] == pytest.approx(expected.item(), abs=1e-4), (how, i)
    assert said["think"].lengths_D.tolist() == rows["think_length"]
    assert (said["think"].thoughts_DL == -1).all()


def test_swapped_thoughts_are_of_another_row():
    """One of the row itself may have read the tokens that judge."""
    forks_BK = torch.tensor([[3, 5, -1], [2, -1, -1], [-1, -1, -1], [0, 4, 6]])
    soft_BKGLX = torch.arange(12.0).view(4, 3, 1, 1, 1)
    other_BK = swapped(soft_BKGLX, forks_BK)[..., 0, 0, 0]
    assert [other_BK[row, forks_BK[row] >= 0].tolist() for row in range(4)] == [[3.0, 3.0], [9.0], [], [0.0, 1.0, 0.0]]
    assert not swapped(soft_BKGLX[3:] + 1, forks_BK[3:]).any(), "there is no other row"


# ---------------------------------------------------------------- what does not fit


REFUSED = [
    ({"stop": "learned"}, "stop=fixed"),
    ({"stop": "sampled"}, "stop=fixed"),
    ({"memory": "persistent"}, "memory=none"),
    ({"think_ce_weight": 0.0}, "think_ce_weight above 0"),
    ({"search": 4}, r"search=\[4\.0\] has no effect"),
    ({"coverage_coef": [0.1]}, "coverage_coef"),
    ({"epsilon_greedy": [0.1]}, "epsilon_greedy"),
    ({"supply_thoughts": True, "num_forks": 1, "num_generations": 3}, "supply_thoughts=True has no effect"),
    ({"beta": 0.1}, "beta=0.1 has no effect"),
    ({"num_iterations": 2}, "num_iterations=2 has no effect"),
    ({"think_loss_weight": 0.5}, "think_loss_weight=0.5 has no effect"),
    ({"think_loss_type": "cispo"}, "think_loss_type"),
    ({"advantage": "loo"}, "advantage"),
    ({"reward_funcs": ["accuracy"]}, "reward_funcs"),
    ({"scale_rewards": "group"}, "scale_rewards"),
    ({"freeze": "thinker"}, "freeze"),
    ({"alternate": [1, 1]}, "alternate"),
    ({"top_k": 2}, "top_k=2 has no effect"),
]
REFUSED_CONTINUOUS = [
    ({"objective": "marginal"}, "objective='marginal' has no effect"),
    ({"balance_coef": [0.1]}, "balance_coef"),
    ({"thought_entropy_target": [0.5]}, "thought_entropy_target"),
    ({"temperature": 0.5}, "temperature=0.5 has no effect"),
    ({"log_completions": True}, "log_completions"),
]
CASES = [
    *((kind, options, words) for kind in ("gumbel", "continuous") for options, words in REFUSED),
    *(("continuous", options, words) for options, words in REFUSED_CONTINUOUS),
    ("gumbel", {"continuous_layer": 1}, "continuous_layer=1 has no effect here; it needs thoughts=continuous"),
    ("discrete", {"continuous_layer": 0}, "continuous_layer=0 has no effect here; it needs thoughts=continuous"),
]


@pytest.mark.parametrize(("kind", "options", "words"), CASES, ids=lambda case: case if isinstance(case, str) else next(iter(case)))
def test_what_would_do_nothing_is_an_error(make, kind, options, words):
    with pytest.raises(ValueError, match=words) as error:
        make(thoughts=kind, **options)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there(make, layer):
    with pytest.raises(ValueError, match=rf"continuous_layer={layer} is no layer: this model has hidden states 0 to 2"):
        make(thoughts="continuous", continuous_layer=layer)


def test_hidden_states_must_fit_input_embeddings(make):
    def start(layer):
        tokenizer = tiny_tokenizer()
        model = tiny_model("opt", vocab_size=len(tokenizer), word_embed_proj_dim=16)
        return make(model=model, tokenizer=tokenizer, thoughts="continuous", continuous_layer=layer)

    assert start(-1), "the last one is projected back"
    with pytest.raises(ValueError, match="hidden state of 32 numbers.*input embedding of 16.*another continuous_layer"):
        start(1)


def test_rewards_for_soft_thoughts(make_trainer):
    with pytest.raises(ValueError, match="reward_funcs has no effect here; it needs thoughts=discrete"):
        make_trainer(thoughts="gumbel", stop="fixed", reward_funcs=lambda **kwargs: 0)
