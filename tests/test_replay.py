"""Decoding passes on a cache of fixed size, replayed: a CPU has no graphs, so a stand-in runs the captured function again, on the tensors of its capture.

What a graph of CUDA cannot hold is looked for in `test_other_device`.
"""

import contextlib
import gc
import logging
import weakref

import pytest
import torch
from captures import captured
from peft import LoraConfig, get_peft_model
from plain_rows import thinker
from torch.nn.parallel import DistributedDataParallel

from hf_thinktok import architectures, engine, flex, replay, rollout, tree
from hf_thinktok.engine import Engine, ReplicatedEngine, TreeEngine
from hf_thinktok.rollout import Sampling, sample_thoughts
from hf_thinktok.tree import Branching

B, T = 2, 120
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


class Captures(list):
    """Of each capture how many kernels were compiled within it."""

    def __call__(self, run, inputs):
        return captured(run, inputs, self.counted())

    @contextlib.contextmanager
    def counted(self):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield
        self.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)


@pytest.fixture
def captures(monkeypatch) -> Captures:
    made = Captures()
    monkeypatch.setattr(replay, "capture", made)
    monkeypatch.setattr(engine, "REPLAYED", {"cpu"})
    for module in (engine, architectures):  # else FlexAttention is for 16 bits alone
        monkeypatch.setattr(module, "HALF", {torch.float32})
    return made


def think(how: Engine, model, vocabulary, step: int, draw_stops: bool = False, groups: int = 2, top_k: int = 0):
    generator = torch.Generator().manual_seed(step)
    tokens_BT, documents_BT = torch.randint(vocabulary.num_real, (B, T), generator=generator), torch.zeros(B, T, dtype=torch.long)
    documents_BT[1, 9:] = 1
    forks_BK = torch.tensor([[2, 7, 12], [3, 8, -1]] if step % 2 else [[2, 9, T - 2], [3, 11, T - 5]])
    branching, sampling = Branching(groups, 4, 3), Sampling(draw_stops=draw_stops, top_k=top_k)
    return sample_thoughts(how, model, tokens_BT, documents_BT, forks_BK, branching, sampling, vocabulary, generator)


def assert_same_thoughts(found: rollout.Rollout, wanted: rollout.Rollout) -> None:
    assert torch.equal(found.thoughts_BKGL, wanted.thoughts_BKGL)
    assert torch.equal(found.lengths_BKG, wanted.lengths_BKG)
    torch.testing.assert_close(found.logps_BKGL, wanted.logps_BKGL, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "attn", "changes"),
    [("llama", "sdpa", {}), ("gpt2", "eager", {}), ("mistral", "sdpa", {"sliding_window": 8}), ("gemma3_text", "sdpa", MIXED), ("gemma3_text", "eager", MIXED)],
)
@pytest.mark.parametrize("given", [{"run_length": 256}, {"run_length": 128, "flex": True}, {}], ids=["a run", "flex", "whole"])
@pytest.mark.parametrize("draw_stops", [False, True], ids=["fixed", "sampled"])
def test_replayed_passes_draw_the_thoughts_of_a_growing_cache(captures, family, attn, changes, given, draw_stops):
    if given.get("flex") and attn == "eager":
        pytest.skip("eager attention takes the whole mask")
    model, vocabulary = thinker(family, attn, **changes)
    how = TreeEngine(**given)
    for step in range(5):
        assert_same_thoughts(think(how, model, vocabulary, step, draw_stops), think(TreeEngine(7), model, vocabulary, step, draw_stops))
    assert len(captures) == 2, "the pass over the text, and that of all others"


@pytest.mark.parametrize("draw_stops", [False, True], ids=["fixed", "sampled"])
def test_thoughts_drawn_in_parts_take_each_others_places(captures, monkeypatch, draw_stops):
    """Replayed as on a growing cache, which forgets them, and each drawn from what it alone sees: the most likely ones are those of all at once."""
    model, vocabulary = thinker("llama", "sdpa")
    at_once = think(TreeEngine(7), model, vocabulary, 0, top_k=1)
    whole, parted = TreeEngine(256), TreeEngine(256)
    for step in range(2):
        think(whole, model, vocabulary, step, draw_stops)
    monkeypatch.setattr(tree, "MOST_BRANCHES", 4)  # two forks, then the third
    captures.clear()
    for step in range(6):
        assert_same_thoughts(think(parted, model, vocabulary, step, draw_stops), think(TreeEngine(7), model, vocabulary, step, draw_stops))
    assert len(captures) == 3, "the text, and passes of two sizes"
    assert whole.kept_bytes * (T + 4 * 3) / (T + 6 * 3) == pytest.approx(parted.kept_bytes, rel=0.06), "places for four branches and not for six"
    for one in (TreeEngine(7), ReplicatedEngine()):
        assert_same_thoughts(think(one, model, vocabulary, 0, top_k=1), at_once)


def test_a_sharded_model_makes_as_many_passes_for_any_number_of_forks(monkeypatch):
    """Processes gather its layers together, and their rows may have more forks or fewer. Nor has the replicated path any use of parts: it runs every path."""
    model, vocabulary = thinker("llama", "sdpa")
    monkeypatch.setattr(tree, "MOST_BRANCHES", 4)
    passes = []
    model.register_forward_pre_hook(lambda *args: passes.append(1))
    think(TreeEngine(), model, vocabulary, 0)
    assert len(passes) == 1 + 2 * 3, "the text, and three tokens of each of two parts"
    passes.clear()
    think(ReplicatedEngine(), model, vocabulary, 0)
    assert len(passes) == 1 + 3
    passes.clear()
    monkeypatch.setattr(engine, "is_sharded", lambda model: True)
    think(TreeEngine(), model, vocabulary, 0)
    assert len(passes) == 1 + 3


def test_a_capture_compiles_nothing(captures, monkeypatch):
    """A GPU cannot compile a kernel while it captures: inputs have to look to PyTorch's compiler as those of the pass before did."""
    kernel = torch.compile(flex.flex_attention, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(flex, "_kernel", lambda device: kernel)
    model, vocabulary = thinker("llama", "sdpa", head_dim=16)
    how = TreeEngine(128, flex=True)
    for step in range(3):
        think(how, model, vocabulary, step)
    assert captures == [0, 0]


def test_what_cannot_be_captured_is_run_and_said_once(captures, monkeypatch, caplog):
    def refuse(run, inputs):
        captures.append(0)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "capture", refuse)
    model, vocabulary = thinker("llama", "sdpa")
    how = TreeEngine(256)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            assert torch.equal(think(how, model, vocabulary, step).thoughts_BKGL, think(TreeEngine(7), model, vocabulary, step).thoughts_BKGL)
    assert len(captures) == len(caplog.records) == 1
    assert "not permitted when stream is capturing" in caplog.text


def test_a_replay_with_other_scores_is_not_kept(captures, monkeypatch, caplog):
    """Nor are its keys and values."""

    def wrong(run, inputs):
        replayed = captures(run, inputs)
        return lambda inputs: replayed(inputs | {"inputs": inputs["inputs"] | {"position_ids": inputs["inputs"]["position_ids"] + 3}})

    monkeypatch.setattr(replay, "capture", wrong)
    model, vocabulary = thinker("llama", "sdpa")
    how = TreeEngine(256)
    for step in range(4):
        assert torch.equal(think(how, model, vocabulary, step).thoughts_BKGL, think(TreeEngine(7), model, vocabulary, step).thoughts_BKGL)
    assert "it gave other scores" in caplog.text


def test_a_room_that_may_not_stay_is_not_made_again(captures, monkeypatch):
    monkeypatch.setattr(replay, "_stays", lambda *args: False)
    model, vocabulary = thinker("llama", "sdpa")
    how = TreeEngine(256)
    for step in range(5):
        found, wanted = (think(one, model, vocabulary, step) for one in (how, TreeEngine(7)))
        assert torch.equal(found.thoughts_BKGL, wanted.thoughts_BKGL)
    assert len(captures) == 1


def test_what_a_room_held_is_free_at_once():
    """The allocator of a GPU that is full does not wait for Python to look for cycles."""
    gc.collect()
    gc.disable()
    try:
        room = replay.Room(8)
        room.places.places_Q = torch.arange(2)
        keys, _ = room.cache.update(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4), 0)
        held = [weakref.ref(one) for one in (room, keys)]
        del room, keys
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


def test_a_graph_reads_weights_and_no_copies_of_them(captures):
    """Those that autocast keeps from one pass to the next are not there any more when the graph is replayed."""
    model, vocabulary = thinker("llama", "sdpa")
    how = TreeEngine(256)
    with torch.autocast("cpu", torch.bfloat16):
        for step in range(3):
            think(how, model, vocabulary, step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        found = think(how, model, vocabulary, 3)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = think(TreeEngine(7), model, vocabulary, 3)
    assert torch.equal(found.thoughts_BKGL, wanted.thoughts_BKGL)
    torch.testing.assert_close(found.logps_BKGL, wanted.logps_BKGL, atol=0.02, rtol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_waits_for_the_device_in_every_layer_is_not_captured(captures):
    model, vocabulary = thinker("llama", "sdpa")
    model.is_loaded_in_8bit = True
    how = TreeEngine(256)
    for step in range(4):
        think(how, model, vocabulary, step)
    assert not captures


def test_an_adapter_whose_base_reads_ids_in_its_layers_is_not_captured(captures):
    """Passes of adapters are captured with embeddings for ids."""
    model, vocabulary = thinker("llama", "sdpa")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for layers_read, made in ((8, 0), (0, 2)):
        model.config.hidden_size_per_layer_input = layers_read
        how = TreeEngine(256)
        for step in range(4):
            think(how, adapted, vocabulary, step)
        assert len(captures) == made


def test_weights_that_moved_are_captured_again(captures):
    model, vocabulary = thinker("llama", "sdpa")
    how = TreeEngine(256)
    for step in range(3):
        think(how, model, vocabulary, step)
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).clone()
    for step in range(3):
        assert torch.equal(think(how, model, vocabulary, step).thoughts_BKGL, think(TreeEngine(7), model, vocabulary, step).thoughts_BKGL)
    assert len(captures) == 4


def test_rows_of_other_lengths_are_not_replayed(captures):
    model, vocabulary = thinker("llama", "sdpa")
    how = TreeEngine(256)
    for step in range(3):
        think(how, model, vocabulary, step)
    kept = how.kept_bytes
    assert kept == 2 * 2 * B * 2 * 144 * 8 * 4  # keys and values, layers, rows, heads, places, numbers, bytes
    tokens_BT = torch.randint(vocabulary.num_real, (1, 30))
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    given = tokens_BT, torch.zeros_like(tokens_BT), torch.tensor([[4, 20]]), Branching(3, 5, 2), Sampling(), vocabulary
    found, wanted = (sample_thoughts(one, model, *given, generator) for one, generator in zip((how, TreeEngine(7)), generators, strict=True))
    assert torch.equal(found.thoughts_BKGL, wanted.thoughts_BKGL)
    assert len(captures) == 2
    sample_thoughts(how, model, tokens_BT[:, :20], torch.zeros(1, 20, dtype=torch.long), torch.tensor([[4, 11]]), *given[3:], torch.Generator())
    assert how.kept_bytes == 0, "of two other kinds since, neither twice"


def test_rollouts_of_two_kinds_in_turn_are_replayed(captures):
    """A search draws candidates between the policy's own rollouts."""
    model, vocabulary = thinker("llama", "sdpa")
    how = TreeEngine(256)
    for step in range(8):
        for groups in (2, 5):
            found, wanted = (think(one, model, vocabulary, step, groups=groups) for one in (how, TreeEngine(7)))
            assert torch.equal(found.thoughts_BKGL, wanted.thoughts_BKGL)
    assert len(captures) == 4


def test_what_is_not_finite_goes_with_its_rollout(captures):
    model, vocabulary = thinker("llama", "sdpa")
    how = TreeEngine(256)
    for step in range(3):
        think(how, model, vocabulary, step)
    layer = model.model.layers[0]
    hook = layer.register_forward_hook(lambda module, inputs, out: (out[0] if isinstance(out, tuple) else out).fill_(torch.inf))
    how._rooms._rooms.clear()  # a replay would not see the hook
    for step in range(3, 5):
        think(how, model, vocabulary, step)
    assert how.kept_bytes
    hook.remove()
    for step in range(5, 8):
        found, wanted = (think(one, model, vocabulary, step) for one in (how, TreeEngine(7)))
        assert torch.equal(found.thoughts_BKGL, wanted.thoughts_BKGL)


def test_processes_decode_each_by_itself(monkeypatch):
    """DDP's own forward may exchange buffers, and one process may replay a pass that another runs: whoever waits there would wait for ever."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        model, vocabulary = thinker("llama", "sdpa")
        wrapped = DistributedDataParallel(model)
        wanted = think(TreeEngine(256), model, vocabulary, 0).thoughts_BKGL
        monkeypatch.setattr(DistributedDataParallel, "forward", lambda *args, **kwargs: pytest.fail("it asked the others"))
        assert torch.equal(think(TreeEngine(256), wrapped, vocabulary, 0).thoughts_BKGL, wanted)
    finally:
        torch.distributed.destroy_process_group()
