"""Pushing to the Hub and loading from it by name, against a local server of its HTTP API, in processes of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import forks
from hub_server import HubServer
from models import CORPUS, save_tiny

HERE = Path(__file__).parent

PUSH = """
import json, sys, torch
from tiny_run import main
trainer = main(sys.argv[1], {"hub_model_id": "me/thinker", "hub_token": "hf_secret"} | json.loads(sys.argv[3]))
with torch.no_grad():
    torch.save(trainer.model.eval()(torch.arange(12)[None]).logits, sys.argv[2])
trainer.push_to_hub()
"""

PULL = """
import sys
sys.modules["hf_thinktok"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained("me/thinker", revision=sys.argv[2]) for kind in (AutoModelForCausalLM, AutoTokenizer))
torch.testing.assert_close(model(torch.arange(12)[None]).logits, torch.load(sys.argv[1]))
assert model.config.thinktok["num_tokens"] == 4
assert "<|think_3|>" in tokenizer.get_vocab()
"""


BASE = """
from models import tiny_model, tiny_tokenizer
tokenizer = tiny_tokenizer()
for revision, seed in ((None, 0), ("v1", 1)):
    for part in (tokenizer, tiny_model(vocab_size=len(tokenizer), seed=seed)):
        part.push_to_hub("me/base", revision=revision)
"""

PUSHES = """
import json, sys
from pathlib import Path
from hf_thinktok.cli import main
folder, base = sys.argv[1:]
assert main(["push", folder, "me/again"]) == 0
print("its base becomes a folder", file=sys.stderr)
config = Path(folder, "adapter_config.json")
config.write_text(config.read_text().replace('"me/base"', json.dumps(base)))
assert main(["push", folder, "me/again"]) == 0
"""

PULL_ADAPTER = """
import sys
sys.modules["hf_thinktok"] = None
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained("me/thinker"), AutoTokenizer.from_pretrained("me/thinker")
torch.testing.assert_close(model(torch.arange(12)[None]).logits, torch.load(sys.argv[1])[..., : len(tokenizer)])
ids = model.generate(**tokenizer("the cat sat", return_tensors="pt"), do_sample=True, max_new_tokens=24)
assert ids.max() < len(tokenizer)
"""


def environment(hub, home) -> dict[str, str]:
    """With the server as its Hub, which libraries read when they are loaded."""
    without = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    of_hub = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": "hf_none"}
    return without | of_hub | {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def pushing(tmp_path_factory):
    """The server, the cache of those who push to it, and what runs their commands."""
    home = tmp_path_factory.mktemp("home")
    with HubServer() as server, forks(**environment(server, home)) as run:
        yield server, home, run


@pytest.fixture
def hub(pushing):
    server, home, _ = pushing
    shutil.rmtree(home, ignore_errors=True)  # where nothing was kept
    server.repos, server.large, server.trouble = {}, {}, []
    return server


@pytest.fixture
def python(hub, pushing):
    """Runs Python on a machine that has pushed before; gives standard error."""

    def run(*command, expect=0):
        done = pushing[2](*command)
        assert done.returncode == expect, done.stderr[-3000:]
        return done.stderr

    return run


def elsewhere(hub, home, *command):
    """Runs Python in a process that has loaded nothing of this package, with an empty cache."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment(hub, home), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_pushed_model_is_loaded_by_name(hub, python, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(HERE.parent / "docs/results/quickstart.json", tmp_path / "out/results.json")
    os.utime(tmp_path / "out/results.json", (time.time() + 600,) * 2)  # as a recipe writes it, when training is done
    python("-c", PUSH, tmp_path / "out", tmp_path / "logits.pt", "{}")
    files = hub.repos["me/thinker"][-1]
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert not any("checkpoint" in path for path in files)
    card = files["README.md"].decode()
    assert "thinktok" in card.split("---")[1], "a tag in the card's head"
    assert "`<|think_0|>` to `<|think_3|>`" in card
    gain = json.loads((tmp_path / "out/results.json").read_text())["gain"]
    assert re.search(rf"gain from thinking, [^│]*│ {re.escape(f'{gain:+.4f}')}", card)
    training = json.loads(files["training.json"])
    assert (training["config"]["num_think_tokens"], training["metrics"]["step"]) == (4, 3)
    assert not [name for name, content in files.items() if b"hf_secret" in content]
    elsewhere(hub, tmp_path / "other", "-c", PULL, tmp_path / "logits.pt", "main")


def test_checkpoints_are_pushed_as_revisions(hub, python, tmp_path):
    options = json.dumps({"save_strategy": "steps", "save_steps": 1, "max_steps": 2})
    python("-c", PUSH, tmp_path / "out", tmp_path / "logits.pt", options)
    python("-m", "hf_thinktok.cli", "push", tmp_path / "out/checkpoint-2", "me/thinker", "--revision", "step-2")
    pushed, last = (hub.repos[name][-1] for name in ("me/thinker@step-2", "me/thinker"))
    assert (tmp_path / "out/checkpoint-1/model.safetensors").read_bytes() != pushed["model.safetensors"] == last["model.safetensors"]
    assert not [name for name in pushed if re.search("optimizer|scheduler|rng_state|_state|complete|args", name)]
    elsewhere(hub, tmp_path / "other", "-c", PULL, tmp_path / "logits.pt", "step-2")


LOADED = """
import functools, sys
from transformers import AutoModelForCausalLM
import tiny_run
by_name = tiny_run.main
tiny_run.main = lambda folder, options: by_name(folder, options | {"model_folder": AutoModelForCausalLM.from_pretrained("me/base", revision="v1")})
if revision := sys.argv[4]:
    tiny_run.LoraConfig = functools.partial(tiny_run.LoraConfig, revision=revision)
"""


@pytest.mark.parametrize("loaded", [False, True], ids=["by name", "loaded"])
def test_a_pushed_adapter_is_loaded_by_name_onto_its_base(hub, python, tmp_path, loaded):
    """Its revision of it, and not another; a base that is not on the Hub is told of."""
    options = {"adapter": True} if loaded else {"adapter": True, "model_folder": "me/base", "model_init_kwargs": {"revision": "v1"}}
    if loaded:
        said = python("-c", BASE + LOADED + PUSH, tmp_path / "out", tmp_path / "logits.pt", json.dumps(options), "")
        assert "me/base seems to be loaded from another revision than main" in said
        shutil.rmtree(tmp_path / "out")
    said = python("-c", BASE * (not loaded) + LOADED * loaded + PUSH, tmp_path / "out", tmp_path / "logits.pt", json.dumps(options), "v1")
    assert "seems to be loaded from another" not in said
    files = hub.repos["me/thinker"][-1]
    assert "model.safetensors" not in files
    assert len(files["adapter_model.safetensors"]) < len(hub.repos["me/base"][-1]["model.safetensors"]) / 2
    elsewhere(hub, tmp_path / "other", "-c", PULL_ADAPTER, tmp_path / "logits.pt")

    (tmp_path / "base").mkdir()
    on_the_hub, here = python("-c", PUSHES, tmp_path / "out", tmp_path / "base").split("its base becomes a folder")
    assert "base is a folder" not in on_the_hub
    assert "base is a folder of this machine" in here
    assert "adapter_model.safetensors" in hub.repos["me/again"][-1]


HELD_OUT = {"inspection.json", "report.html"}


def test_every_save_is_pushed_with_both_models_and_no_held_out_text(hub, python, tmp_path):
    (tmp_path / "out").mkdir()
    for name in HELD_OUT:
        (tmp_path / "out" / name).write_text('{"texts": ["held out"]}')
    options = {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    python("-c", PUSH, tmp_path / "out", tmp_path / "logits.pt", json.dumps(options | {"policies": "split", "stop": "fixed"}))
    _, *during, last = hub.repos["me/thinker"]
    assert during
    for commit in (*during, last):
        assert {"model.safetensors", "speaker/model.safetensors", "speaker/config.json", "tokenizer.json"} <= set(commit)
        assert not HELD_OUT & set(commit)
    assert during[0]["speaker/model.safetensors"] != during[0]["model.safetensors"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_recipe_pushes_once_and_when_everything_else_is_done(hub, python, tmp_path, fails):
    """A push that fails then costs nothing, and the card has the figures."""
    hub.trouble = [("POST", "/commit/", "500")] * 20 if fails else []
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in CORPUS))
    options = {
        "model_name_or_path": save_tiny(tmp_path / "model"), "data_files": tmp_path / "text.jsonl", "output_dir": tmp_path / "out", "max_steps": 1,
        "held_out_documents": 2, "max_length": 48, "num_forks": 3, "num_think_tokens": 4, "per_device_train_batch_size": 2, "use_cpu": "true", "bf16": "false",
        "report_to": "none", "save_strategy": "no", "push_to_hub": "true", "hub_model_id": "me/thinker", "hub_token": "hf_secret",
        "model_init_kwargs": '{"token": "hf_secret"}',
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    said = python(HERE.parent / "recipes" / "pretrain_think.py", *words, expect=int(fails))
    assert {"results.json", "report.html", "trainer_state.json", "model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    pushed = [commit for commit in hub.repos["me/thinker"] if "model.safetensors" in commit]
    assert len(pushed) == (0 if fails else 1)
    if fails:
        assert "is whole, but its upload failed" in said
    else:
        card = pushed[0]["README.md"].decode()
        assert "gain from thinking" in card
        assert card.partition("\n## Thinking tokens\n")[0].count("```") % 2 == 0, "the heading is in no block of code"
        assert card.count("\n## Thinking tokens\n") == 1
        assert not [name for name, content in pushed[0].items() if b"hf_secret" in content]
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name != "training_args.bin" and b"hf_secret" in path.read_bytes()]


@pytest.mark.parametrize("trouble", [("PUT", "/lfs/", "drop"), ("POST", "/commit/", "500")], ids=["dropped", "refused"])
def test_a_push_that_fails_loses_nothing_and_the_next_one_completes(hub, python, tmp_path, trouble):
    hub.trouble = [trouble] * 20  # clients try again
    program = f"import time\ntime.sleep = lambda seconds: None\n{PUSH}"  # and wait before they do
    error = python("-c", program, tmp_path / "out", tmp_path / "logits.pt", "{}", expect=1)
    assert f"{tmp_path / 'out'} is whole, but its upload failed: " in error
    assert hub.repos["me/thinker"] == [{}]
    hub.trouble = []
    python("-m", "hf_thinktok.cli", "push", tmp_path / "out", "me/thinker")
    pushed = hub.repos["me/thinker"][-1]
    assert {"config.json", "tokenizer.json"} <= set(pushed)
    assert pushed["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()


def test_a_name_without_an_owner_is_the_users_own(hub, python, tmp_path):
    (tmp_path / "thinker").mkdir()
    for place in (tmp_path / "thinker", tmp_path / "thinker" / "arm", tmp_path / "thinker" / "arm" / "checkpoint-3"):
        place.mkdir(exist_ok=True)
        (place / "inspection.json").write_text('{"texts": ["held out"]}')
        (place / "notes.txt").write_text("mine")
    program = "import sys; from hf_thinktok.cli import main; assert main(sys.argv[1:] + ['--revision', 'v1']) == main(sys.argv[1:]) == 0"
    python("-c", program, "push", save_tiny(tmp_path / "thinker", think_tokens=4), "my-model")
    assert {"model.safetensors", "tokenizer.json"} <= set(hub.repos["me/my-model"][-1]) & set(hub.repos["me/my-model@v1"][-1])
    pushed = set(hub.repos["me/my-model"][-1])
    assert not HELD_OUT & {Path(name).name for name in pushed}
    assert {name for name in pushed if name.endswith("notes.txt")} == {"notes.txt", "arm/notes.txt"}, "checkpoints stay here"


def test_what_cannot_be_pushed(hub, python, tmp_path):
    (tmp_path / "empty").mkdir()
    error = python("-m", "hf_thinktok.cli", "push", tmp_path / "empty", "me/thinker", expect=2)
    assert "has no thinking tokens" in error or "cannot be loaded" in error
    assert hub.repos == {}
