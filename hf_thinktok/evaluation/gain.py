"""Held-out likelihood without thinking, with thinking, and with a random thought, at the same places of the same text."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_ARMS = ("no_think", "think", "random_thought")


@dataclass
class GainByDocument:
    """Sums over documents, so that the standard error counts documents and not tokens.

    Tokens of one document are alike; a standard error over tokens would be too small.
    """

    rows: list[list[float]] = field(default_factory=list)

    @staticmethod
    def collect(documents_BK: Tensor, tokens_BK: Tensor, logps_BK: dict[str, Tensor], lengths_BK: Tensor) -> list[list[list[float]]]:
        """Sums per document of each row: judged tokens, summed log-probability of each arm (nats), forks, summed thought lengths."""
        present_BK = tokens_BK > 0
        columns = [tokens_BK.float(), *(logps_BK[arm] for arm in _ARMS), present_BK.float(), lengths_BK]
        values_BKC = torch.stack([torch.where(present_BK, column, 0.0) for column in columns], -1).cpu().double()  # not every device has them
        documents_BK = documents_BK.cpu()
        num_documents = int(documents_BK.max()) + 1 if documents_BK.numel() else 0
        sums_BDC = values_BKC.new_zeros(len(values_BKC), max(num_documents, 1), values_BKC.shape[-1])
        sums_BDC.scatter_add_(1, documents_BK.clamp(min=0)[..., None].expand_as(values_BKC), values_BKC)
        return [[document for document in row if document[0] > 0] for row in sums_BDC.tolist()]

    def summary(self) -> dict[str, float]:
        """Bits per token of each arm, gains, and the gain's standard error over documents (ratio estimator)."""
        if not self.rows:
            return {}
        sums_DC = torch.tensor(self.rows, dtype=torch.float64)
        tokens_D, forks_D, lengths_D = sums_DC[:, 0], sums_DC[:, 4], sums_DC[:, 5]
        logps = {arm: sums_DC[:, 1 + i] for i, arm in enumerate(_ARMS)}
        bits = {arm: (-values.sum() / tokens_D.sum()).item() / math.log(2) for arm, values in logps.items()}
        gain, stderr = self._gain(logps["think"] - logps["no_think"], tokens_D)
        over_random, over_random_stderr = self._gain(logps["think"] - logps["random_thought"], tokens_D)
        return {
            **{f"bits_{arm}": value for arm, value in bits.items()},
            "gain": gain,
            "gain_stderr": stderr,
            "gain_over_random": over_random,
            "gain_over_random_stderr": over_random_stderr,
            "mean_think_length": (lengths_D.sum() / forks_D.sum()).item(),
            "documents": float(len(self.rows)),
            "judged_tokens": tokens_D.sum().item(),
        }

    @staticmethod
    def _gain(nats_D: Tensor, tokens_D: Tensor) -> tuple[float, float]:
        count = len(nats_D)
        gain = nats_D.sum() / tokens_D.sum()
        if count < 2:
            return gain.item() / math.log(2), math.nan
        residual = (nats_D - gain * tokens_D).square().sum() * count / (count - 1)
        return gain.item() / math.log(2), (residual.sqrt() / tokens_D.sum()).item() / math.log(2)
