"""How sure a mean over tokens is, counted in documents."""

import numpy as np

RESAMPLES = 2000


def ratio_interval(sums_D: np.ndarray, counts_D: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The interval of `sum(sums) / sum(counts)` if other documents had been drawn: a percentile bootstrap over documents.

    Tokens of one document are alike, so documents are what is drawn anew. For a difference between two arms `sums_D` holds the differences, which
    pairs them.

    Args:
        sums_D, counts_D: one number for each document.

    Returns:
        The lower and the upper end; NaN for fewer than two documents.
    """
    if len(sums_D) < 2:
        return float("nan"), float("nan")
    weights_RD = np.random.default_rng(seed).multinomial(len(sums_D), np.full(len(sums_D), 1 / len(sums_D)), size=RESAMPLES)
    counts_R = weights_RD @ counts_D
    ratios_R = (weights_RD @ sums_D)[counts_R > 0] / counts_R[counts_R > 0]
    lower, upper = np.quantile(ratios_R, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)
