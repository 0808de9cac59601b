"""Everything that trains and reads a model where its tensors are not the CPU's: a device in main memory (`other_device`) that refuses what a GPU would."""

import json
from pathlib import Path

import pytest
import torch.utils.backend_registration
from commands import started
from models import save_tiny

pytestmark = [
    pytest.mark.skipif(
        not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch cannot have a device of Python alone"
    ),
    pytest.mark.timeout(900),  # all runs are one process
]

ANSWERED = {"questions": True, "stop": "fixed", "num_forks": 1, "then": ["answer"]}
RESUMED = {"save_strategy": "steps", "save_steps": 2, "then": ["resume"]}
MARKERS = {"fork_positions": "markers", "fork_markers": [" ="], "memory": "persistent", "stop": "sampled"}
RUNS = {
    "as it is": {"then": ["use", "harness"]},
    "longer thoughts at more places": {"max_think_length": 6, "num_forks": 8},
    "checkpointed": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "num_iterations": 2} | RESUMED,
    "value": {"advantage": "value", "num_generations": 1, "stop": "sampled", "scale_rewards": "batch"} | RESUMED,
    "persistent": {"memory": "persistent", "stop": "sampled", "lookahead": 3, "packing": True, "fork_positions": "entropy", "beta": 0.1},
    "markers": MARKERS,
    "rows": {"engine": "replicated", "fork_positions": "all", "num_forks": 16, "epsilon_greedy": 0.1, "top_k": 3, "top_p": 0.9},
    "text": {"thoughts": "text", "stop": "fixed", "max_think_length": 4, "lookahead": None},
    "fillers": {"thoughts": "filler", "stop": "sampled", "then": ["use"]},
    "gumbel": {"thoughts": "gumbel", "stop": "fixed", "num_generations": 4},
    "hidden states": {"thoughts": "continuous", "num_generations": 1, "policies": "split"} | ANSWERED,
    "adapter": {"adapter": True, "tie": False, "beta": 0.1, "then": ["use"]},
    "two adapters": {"adapter": True, "policies": "split", "blind": True},
    "teacher": {"rollout": "free", "prompt_length": 4},  # it and the model of the next one are named in the fixture
    "by its name": {"stop": "fixed", "advantage": "token"},
    "supplied": {"supply_thoughts": True, "thought_ce_weight": 1.0, "reward_funcs": ["exact", "information_gain"], "num_generations": 3} | ANSWERED,
    "a language": {
        "objective": "marginal", "search": 8, "search_changes": 1, "coverage_coef": 0.3, "balance_coef": 0.3, "balance_given": "token", "revive_every": 1,
        "thought_entropy_target": 0.3, "markovian_share": 0.5, "num_generations": 4, "curriculum_threshold": 0.0, "num_think_tokens": 8,
    } | ANSWERED | RESUMED,
    "blind search": {"objective": "marginal", "search": 8, "blind": True, "policies": "split", "coverage_coef": 0.3, "coverage_where": "unsolved"} | ANSWERED,
}  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str | dict[str, int]]:
    """What became of each run."""
    folder = tmp_path_factory.mktemp("elsewhere")
    RUNS["teacher"]["teacher"] = RUNS["by its name"]["model_folder"] = save_tiny(folder / "a model")
    words: list[str | Path] = []
    for name, options in RUNS.items():
        (folder / name).mkdir()
        words += folder / name, json.dumps(options)
    done = started(Path(__file__).parent / "run_elsewhere.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(run).name: result for run, result in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("name", RUNS)
def test_trains_and_is_used_on_a_device_of_its_own(told, name):
    assert isinstance(told[name], dict), told[name]


def test_the_host_waits_as_often_for_long_thoughts_as_for_short_ones(told):
    short, long = told["as it is"], told["longer thoughts at more places"]
    assert short == long
    assert short["rollout.py"] == 1, "in the first of three steps, which nothing was captured of yet"


@pytest.mark.parametrize(("name", "graphs"), [("as it is", 2), ("adapter", 2), ("two adapters", 2), ("supplied", 2), ("persistent", 0), ("text", 0)])
def test_decoding_passes_hold_nothing_that_a_graph_cannot(told, name, graphs):
    assert told[name]["graphs"] == graphs
