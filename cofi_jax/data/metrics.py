"""Metrics of rows: `METRICS[name](logits, labels)` is a float, and higher is better.

Labels are (N,). For classes logits are (N, C), and the class with the largest one is
the prediction; for values logits are (N, 1), and they are the predictions themselves.
"""

import warnings
from collections.abc import Callable

import numpy as np


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows whose prediction is the label, in [0, 1]."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, np.argmax(logits, axis=-1)))


def f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """The F1 of class 1 of two, in [0, 1]; 0 where no row has or is given class 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, np.argmax(logits, axis=-1), zero_division=0))


def matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation coefficient in [-1, 1]; 0 for a constant prediction."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():  # It warns where there is a single class.
        warnings.simplefilter("ignore")
        return float(matthews_corrcoef(labels, np.argmax(logits, axis=-1)))


def pearson(logits: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation with the labels in [-1, 1]; 0 where it is not defined."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, logits, labels)


def spearman(logits: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation in [-1, 1]; 0 where it is not defined."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, logits, labels)


def _correlation(rule: Callable, logits: np.ndarray, labels: np.ndarray) -> float:
    if len(labels) < 2:
        return 0.0
    with warnings.catch_warnings():  # It warns that a constant one's result is nan.
        warnings.simplefilter("ignore")
        result = rule(np.float64(logits[:, 0]), np.float64(labels))
    return float(np.nan_to_num(result.statistic))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def main_score(scores: dict) -> float:
    """The first value in `scores`, which may be grouped by split: it decides."""
    first = next(iter(scores.values()))
    return main_score(first) if isinstance(first, dict) else first
