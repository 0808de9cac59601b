"""Does thinking help, and is it the thoughts? Held-out text with every control at the same places."""

from .gain import GainByDocument
from .thinking import Evaluation, evaluate_thinking

__all__ = ["Evaluation", "GainByDocument", "evaluate_thinking"]
