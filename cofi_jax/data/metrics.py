"""Task metrics: `METRICS[name](logits, labels)` is one float, higher is better.

For classes logits are (N, C) and labels (N,); the prediction is the class with the
largest logit. For numbers logits are (N, 1), the prediction itself, and labels (N,).
"""

import warnings
from collections.abc import Callable

import numpy as np


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows whose prediction is the label, in [0, 1]."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, np.argmax(logits, axis=-1)))


def f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """The F1 of class 1 of two, in [0, 1]; 0 where it is in neither of the two."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, np.argmax(logits, axis=-1), zero_division=0))


def matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation coefficient in [-1, 1]; 0 for a constant prediction."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():  # of a single class
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
    with warnings.catch_warnings():  # of a constant prediction, whose result is nan
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
    """The first value in `scores`, which may be grouped by split."""
    first = next(iter(scores.values()))
    return main_score(first) if isinstance(first, dict) else first
