"""Metrics of rows: `METRICS[name](logits, labels)` is a float, and higher is better.

Labels are (N,). For classes logits are (N, C), and the class with the largest one is
the prediction; for values logits are (N, 1), and they are the predictions themselves.
For any number of labels, both are (N, C), and labels whose logit is above 0 are given.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

TOP = 10  # the ranks, or the nearest texts, that metrics of rankings look at

Metric = Callable[[np.ndarray, np.ndarray], float]


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of right classes.

    It is computed here because most runs need no other metric, and importing
    scikit-learn takes about a second.
    """
    return float(np.mean(np.argmax(logits, axis=-1) == labels))


def _of_classes(name: str, **options) -> Metric:
    """A metric of scikit-learn, which is only imported where it is used."""

    def metric(logits, labels):
        import sklearn.metrics

        rule = getattr(sklearn.metrics, name)
        with warnings.catch_warnings():  # It warns where there is a single class.
            warnings.simplefilter("ignore")
            return float(rule(labels, np.argmax(logits, axis=-1), **options))

    return metric


def _of_labels(average: str) -> Metric:
    """The F1 of scikit-learn over several labels; 0 for one that is never involved."""

    def metric(logits, labels):
        import sklearn.metrics

        options = {"average": average, "zero_division": 0}
        return float(sklearn.metrics.f1_score(labels > 0.5, logits > 0, **options))

    return metric


def _of_values(name: str) -> Metric:
    """A correlation of SciPy; 0 where it is not defined, as of constant predictions."""

    def metric(logits, labels):
        import scipy.stats

        if len(labels) < 2:
            return 0.0
        rule = getattr(scipy.stats, name)
        with warnings.catch_warnings():  # It warns that a constant one's result is nan.
            warnings.simplefilter("ignore")
            result = rule(np.float64(logits[:, 0]), np.float64(labels))
        return float(np.nan_to_num(result.statistic))

    return metric


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,  # in [0, 1]
    # Of class 1 of two, in [0, 1]; 0 where no row has or is given class 1.
    "f1": _of_classes("f1_score", zero_division=0),
    "micro_f1": _of_labels("micro"),  # of all labels together, in [0, 1]
    "macro_f1": _of_labels("macro"),  # the mean over the labels
    # In [-1, 1]; 0 for a constant prediction.
    "matthews": _of_classes("matthews_corrcoef"),
    "pearson": _of_values("pearsonr"),  # in [-1, 1], as the next
    "spearman": _of_values("spearmanr"),
}


def gains(relevance: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(N,) what texts of some relevance add to the discounted gain at their ranks.

    It is the relevance over log2(rank + 2), as trec_eval has it, and 0 from the rank
    `TOP` on; the ranks begin with 0. NDCG is the sum of all gains over the largest sum
    that any order gives.
    """
    return np.where(ranks < TOP, relevance / np.log2(ranks + 2), 0)


def rates(
    names: Sequence[str], right: np.ndarray, given: np.ndarray, there: np.ndarray
) -> dict[str, dict[str, float]]:
    """The precision, the recall and the F1 of each of C classes, and its `count`.

    Args:
      names: those of the classes.
      right: (C,) how often each was given where it was the right one.
      given: (C,) how often it was given.
      there: (C,) how often it was the right one, which is the `count`.

    Returns:
      The numbers by the name of the class. A rate of nothing is 0.
    """
    found = {}
    for name, *numbers in zip(names, right, given, there, strict=True):
        hits, said, count = map(int, numbers)
        found[name] = {
            "precision": hits / max(said, 1),
            "recall": hits / max(count, 1),
            "f1": 2 * hits / max(said + count, 1),
            "count": count,
        }
    return found


def main_score(scores: dict) -> float:
    """The first value in `scores`, which may be grouped by split: it decides."""
    first = next(iter(scores.values()))
    return main_score(first) if isinstance(first, dict) else first
