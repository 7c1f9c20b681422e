"""Task metrics: `METRICS[name](logits, labels)` is one float, higher is better.

Logits are (N, C), labels (N,); the prediction is the class with the largest logit.
"""

from collections.abc import Callable

import numpy as np


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows whose prediction is the label, in [0, 1]."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, np.argmax(logits, axis=-1)))


def matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation coefficient in [-1, 1]; 0 for a constant prediction."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, np.argmax(logits, axis=-1)))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
}
