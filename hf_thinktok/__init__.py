"""Teaches pretrained language models to think in tokens of their own."""

from .config import ThinkTokConfig
from .tokens import ThinkingVocabulary, add_thinking_tokens
from .trainer import ThinkTokTrainer

__version__ = "0.1.0"
__all__ = ["ThinkTokConfig", "ThinkTokTrainer", "ThinkingVocabulary", "__version__", "add_thinking_tokens"]
