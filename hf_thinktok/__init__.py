"""Teaches pretrained language models to think in tokens of their own."""

import importlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ThinkTokConfig
    from .evaluation.thinking import evaluate_thinking
    from .generation import StopsInText, ThinkingBudget, ThinkingStreamer, think_while_reading
    from .peft import load_whole
    from .tokens import ThinkingVocabulary, add_thinking_tokens
    from .trainer import ThinkTokTrainer

# TRL and PEFT call what transformers 5.23 has renamed, and nobody who uses this can change that.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)

__version__ = "0.1.0"
__all__ = [
    "StopsInText",
    "ThinkTokConfig",
    "ThinkTokTrainer",
    "ThinkingBudget",
    "ThinkingStreamer",
    "ThinkingVocabulary",
    "__version__",
    "add_thinking_tokens",
    "evaluate_thinking",
    "load_whole",
    "think_while_reading",
]

_HOMES = {
    "StopsInText": "generation",
    "ThinkTokConfig": "config",
    "ThinkTokTrainer": "trainer",
    "ThinkingBudget": "generation",
    "ThinkingStreamer": "generation",
    "ThinkingVocabulary": "tokens",
    "add_thinking_tokens": "tokens",
    "evaluate_thinking": "evaluation.thinking",
    "load_whole": "peft",
    "think_while_reading": "generation",
}


def __getattr__(name: str):
    """Loads a public name at its first use: whoever only generates need not wait for the trainer's libraries."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
