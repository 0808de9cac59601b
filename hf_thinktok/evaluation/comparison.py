"""Runs side by side on the same held-out places: a thinking model against what its compute, its text and its length alone would have brought."""

import math
from typing import Any

import numpy as np

from .intervals import ratio_interval
from .thinking import Evaluation

# The arms of a comparison, in the order of its table, and what each is trained with.
ARMS = {
    "base": "not trained",
    "cpt": "the same text",
    "cpt_flops": "as much compute",
    "filler": "thoughts all alike",
    "think": "thoughts",
}
# What takes part besides: a thinking model that does not think now.
SILENT = " without thoughts"


class Comparison:
    """Evaluations of several runs at the same places.

    Args:
        evaluations: by arm and seed. All of the same text with the same settings; what was not trained is the same for each seed.

    Raises:
        ValueError: the runs were not evaluated at the same places.
    """

    def __init__(self, evaluations: dict[str, dict[int, Evaluation]]):
        self.evaluations = evaluations
        every = [(arm, one) for arm, seeds in evaluations.items() for one in seeds.values()]
        self.first = every[0][1]
        for arm, one in every:
            same = all(np.array_equal(getattr(one, name), getattr(self.first, name)) for name in ("documents_F", "tokens_F"))
            if not same:
                raise ValueError(f"The arm {arm} was evaluated at other places than {every[0][0]}: evaluate all arms on the same text, with the same settings.")

    def logps(self, arm: str) -> dict[int, np.ndarray]:
        """Log-probability of the judged tokens by seed, `[F]`, nats, with thoughts as the arm was trained to have them."""
        name, silent = arm.removesuffix(SILENT), arm.endswith(SILENT)
        found = {}
        for seed, one in self.evaluations[name].items():
            own = "always" if one.settings["stop"] == "fixed" else "think"
            found[seed] = one.logps["no_think" if silent or own not in one.logps else own]
        return found

    def bits(self, nats_F: np.ndarray) -> dict[str, float]:
        """Bits per token of a sum of nats, and its 95 % interval over documents."""
        _, document_F = np.unique(self.first.documents_F, return_inverse=True)
        sums_D = np.bincount(document_F, nats_F) / math.log(2)
        counts_D = np.bincount(document_F, self.first.tokens_F)
        low, high = ratio_interval(sums_D, counts_D)
        return {"bits_per_token": float(sums_D.sum() / counts_D.sum()), "low": low, "high": high}

    def gain(self, arm: str, other: str) -> dict[str, Any]:
        """Bits per token that an arm saves over another: the mean over seeds with its interval over documents, and each seed's."""
        ours, theirs = self.logps(arm), self.logps(other)
        differences = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
        return self.bits(np.mean(list(differences.values()), 0)) | {"seeds": {str(seed): self.bits(nats_F) for seed, nats_F in differences.items()}}

    def summary(self) -> dict[str, Any]:
        """Bits per token of each arm, what the thinking one gains over each other, and each run's own figures."""
        shown = [*self.evaluations, *(f"{arm}{SILENT}" for arm, seeds in self.evaluations.items() if self._thinks(seeds))]
        arms: dict[str, dict[str, Any]] = {arm: self.bits(-np.mean(list(self.logps(arm).values()), 0)) | {"seeds": {}} for arm in shown}
        for arm in shown:
            arms[arm]["seeds"] = {str(seed): self.bits(-nats_F) for seed, nats_F in self.logps(arm).items()}
        pairs = [("think", other) for other in shown if other != "think"] + [(f"think{SILENT}", "cpt"), ("filler", "cpt"), ("cpt_flops", "cpt")]
        return {
            "arms": arms,
            "gains": {f"{arm} over {other}": self.gain(arm, other) for arm, other in pairs if arm in shown and other in shown},
            "runs": {arm: {str(seed): one.summary() for seed, one in seeds.items()} for arm, seeds in self.evaluations.items()},
            "documents": len(np.unique(self.first.documents_F)),
            "judged_tokens": int(self.first.tokens_F.sum()),
        }

    @staticmethod
    def _thinks(seeds: dict[int, Evaluation]) -> bool:
        return "always" in next(iter(seeds.values())).logps
