"""What thinking is worth on text, as a metric of `evaluate`: `evaluate.load("hf_thinktok/evaluation/think_gain")`."""

import datasets
import evaluate
import numpy as np

from hf_thinktok.evaluation.intervals import bits_per_token

DESCRIPTION = "Bits per token that thinking saves on the same text, with a 95 % interval bootstrapped over documents."
INPUTS = """
Args:
    predictions: log-probabilities of real tokens with thoughts, nats; one number for each token, or their sum for each place.
    references: the same without thoughts, or with a control in their place.
    documents: which document each comes from. Without it each number is a document of its own, which makes the interval too short where tokens of one
        document are alike.
    tokens: how many tokens each number sums up; 1 where not given.

Returns:
    think_gain: bits per token; above 0 where thinking helps.
    low, high: its 95 % interval.
    documents, tokens: how many were counted.

Examples:
    >>> metric = evaluate.load("hf_thinktok/evaluation/think_gain")
    >>> metric.compute(predictions=[-0.5, -1.0], references=[-1.5, -2.0], documents=[0, 1])["think_gain"]
    1.4427
"""


class ThinkGain(evaluate.Metric):
    """See `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("float64")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references, documents=None, tokens=None) -> dict[str, float]:
        nats = np.asarray(predictions) - np.asarray(references)
        counts = np.ones(len(nats)) if tokens is None else np.asarray(tokens, dtype=float)
        names = np.arange(len(nats)) if documents is None else np.asarray(documents)
        for what, values in (("tokens", counts), ("documents", names)):
            if len(values) != len(nats):
                raise ValueError(f"{what} has {len(values)} entries for {len(nats)} predictions: give one for each.")
        found = bits_per_token(nats, names, counts)
        return {"think_gain": found.pop("bits_per_token"), **found, "documents": len(np.unique(names)), "tokens": int(counts.sum())}
