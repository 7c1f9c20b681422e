import numpy as np
import pytest

from cofi_jax.metrics import METRICS


def logits_of(predictions, classes=2):
    return np.eye(classes)[predictions] * 3 - 1


def test_accuracy_by_hand():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 0.1, 0.2], [5.0, 9.0, 1.0], [1, 0, 0]])
    assert METRICS["accuracy"](logits, np.array([0, 2, 1, 2])) == 3 / 4


def test_matthews_by_hand():
    # TP 3, TN 2, FP 1, FN 1: (3 * 2 - 1 * 1) / sqrt(4 * 4 * 3 * 3) = 5 / 12.
    labels = np.array([1, 1, 1, 1, 0, 0, 0])
    predictions = np.array([1, 1, 1, 0, 0, 0, 1])
    got = METRICS["matthews"](logits_of(predictions), labels)
    assert got == pytest.approx(5 / 12)


@pytest.mark.parametrize("flip, value", [(0, 1.0), (1, -1.0)])
def test_matthews_at_its_ends(flip, value):
    labels = np.array([0, 1, 1, 0, 1])
    got = METRICS["matthews"](logits_of(labels ^ flip), labels)
    assert got == pytest.approx(value)


def test_matthews_of_a_constant_prediction_is_zero():
    labels = np.array([0, 1, 1, 0])
    assert METRICS["matthews"](logits_of(np.ones(4, int)), labels) == 0


@pytest.mark.parametrize("name", METRICS)
def test_is_a_plain_float(name):
    assert type(METRICS[name](logits_of(np.array([0, 1])), np.array([0, 1]))) is float
