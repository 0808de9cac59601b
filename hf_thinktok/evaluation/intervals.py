"""How sure a mean over tokens is, counted in documents."""

import math

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


def bits_per_token(nats_F: np.ndarray, documents_F: np.ndarray, tokens_F: np.ndarray) -> dict[str, float]:
    """Nats summed over the judged tokens of each place, as bits per token, and the 95 % interval over documents."""
    _, document_F = np.unique(documents_F, return_inverse=True)
    sums_D, counts_D = np.bincount(document_F, nats_F) / math.log(2), np.bincount(document_F, tokens_F)
    low, high = ratio_interval(sums_D, counts_D)
    return {"bits_per_token": float(sums_D.sum() / counts_D.sum()), "low": low, "high": high}
