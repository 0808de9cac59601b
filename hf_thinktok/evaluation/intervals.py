"""How sure a mean over tokens is, counted in documents."""

import math
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
# Weights of documents are drawn so many at a time, 64 MiB.
NUMBERS = 2**23
# Fewer documents have no interval: it would hold the truth far less often than it says.
FEWEST = 5


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t. Exact for one and two degrees of freedom, then Cornish and Fisher's expansion (right to 1 % at 0.975)."""
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z, v = NormalDist().inv_cdf(probability), freedom
    second, third = (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + (z**3 + z) / (4 * v) + second / v**2 + third / v**3


def ratio_interval(sums_D: np.ndarray, counts_D: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The interval of `sum(sums) / sum(counts)` if other documents had been drawn: a bootstrap over documents, with percentiles as far out as few documents
    need (the expanded percentile interval of Hesterberg 2015, https://arxiv.org/abs/1411.5279).

    Tokens of one document are alike, so documents are what is drawn anew. For a difference between two arms `sums_D` holds the differences, which
    pairs them.

    Args:
        sums_D, counts_D: one number for each document.

    Returns:
        The lower and the upper end; NaN for fewer than five documents.
    """
    if (documents := len(sums_D)) < FEWEST:
        return float("nan"), float("nan")
    generator, at_once = np.random.default_rng(seed), max(1, NUMBERS // documents)
    resampled = []
    for begin in range(0, RESAMPLES, at_once):
        weights_RD = generator.multinomial(documents, np.full(documents, 1 / documents), size=min(at_once, RESAMPLES - begin))
        resampled.append((weights_RD @ sums_D, weights_RD @ counts_D))
    sums_R, counts_R = np.concatenate(resampled, axis=1)
    ratios_R = sums_R[counts_R > 0] / counts_R[counts_R > 0]
    tail = NormalDist().cdf(-t_quantile((1 + level) / 2, documents - 1) * math.sqrt(documents / (documents - 1)))
    lower, upper = np.quantile(ratios_R, [tail, 1 - tail])
    return float(lower), float(upper)


def bits_per_token(nats_F: np.ndarray, documents_F: np.ndarray, tokens_F: np.ndarray) -> dict[str, float]:
    """Nats summed over the judged tokens of each place, as bits per token, and the 95 % interval over documents."""
    _, document_F = np.unique(documents_F, return_inverse=True)
    sums_D, counts_D = np.bincount(document_F, nats_F) / math.log(2), np.bincount(document_F, tokens_F)
    low, high = ratio_interval(sums_D, counts_D)
    return {"bits_per_token": float(sums_D.sum() / counts_D.sum()), "low": low, "high": high}
