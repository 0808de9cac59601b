"""Runs side by side on the same held-out places: a thinking model against what its compute, its text and its length alone would have brought."""

from typing import Any

import numpy as np

from .intervals import bits_per_token
from .thinking import RANDOM, Evaluation, own_arm

# The arms of a comparison, in the order of its table, and what each is trained with.
ARMS = {
    "base": "not trained",
    "cpt": "the same text",
    "cpt_flops": "as much compute",
    "filler": "thoughts all alike",
    "think": "thoughts",
}
# What takes part besides: a thinking model that does not think now, or reads random tokens where it would.
SILENT = " without thoughts"
AT_RANDOM = " with random thoughts"


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
        found = {}
        for seed, one in self.evaluations[arm.removesuffix(SILENT).removesuffix(AT_RANDOM)].items():
            own = own_arm(one.settings)
            there = "no_think" if arm.endswith(SILENT) or own not in one.logps else RANDOM[own] if arm.endswith(AT_RANDOM) else own
            found[seed] = one.logps[there]
        return found

    def over_seeds(self, nats: dict[int, np.ndarray]) -> dict[str, Any]:
        """Bits per token of nats by seed: the mean over seeds with its interval over documents, and each seed's."""

        def bits(nats_F: np.ndarray) -> dict[str, float]:
            return bits_per_token(nats_F, self.first.documents_F, self.first.tokens_F)

        return bits(np.mean(list(nats.values()), 0)) | {"seeds": {str(seed): bits(nats_F) for seed, nats_F in nats.items()}}

    def gain(self, arm: str, other: str) -> dict[str, Any]:
        """Bits per token that an arm saves over another."""
        ours, theirs = self.logps(arm), self.logps(other)
        return self.over_seeds({seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs})

    def summary(self) -> dict[str, Any]:
        """Bits per token of each arm, what the thinking one gains over each other, and each run's own figures."""
        shown = [*self.evaluations, *(f"{arm}{SILENT}" for arm, seeds in self.evaluations.items() if self._thinks(seeds))]
        thinking = self.evaluations.get("think", {}).values()
        if thinking and all(RANDOM[own_arm(one.settings)] in one.logps for one in thinking):
            shown.append(f"think{AT_RANDOM}")
        pairs = [("think", other) for other in shown if other != "think"] + [(f"think{SILENT}", "cpt"), ("filler", "cpt"), ("cpt_flops", "cpt")]
        return {
            "arms": {arm: self.over_seeds({seed: -logps_F for seed, logps_F in self.logps(arm).items()}) for arm in shown},
            "gains": {f"{arm} over {other}": self.gain(arm, other) for arm, other in pairs if arm in shown and other in shown},
            "runs": {arm: {str(seed): one.summary() for seed, one in seeds.items()} for arm, seeds in self.evaluations.items()},
            "documents": len(np.unique(self.first.documents_F)),
            "judged_tokens": int(self.first.tokens_F.sum()),
        }

    @staticmethod
    def _thinks(seeds: dict[int, Evaluation]) -> bool:
        return "always" in next(iter(seeds.values())).logps
