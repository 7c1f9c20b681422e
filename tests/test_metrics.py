import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cofi_jax.data import batches
from cofi_jax.data.metrics import METRICS
from cofi_jax.data.problems import PROBLEMS

CORRELATIONS = ("pearson", "spearman")


def logits_of(predictions, classes=2):
    return np.eye(classes)[predictions] * 3 - 1


def correlation(name, predictions, labels):
    """With predictions as a model gives them: (N, 1); warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        column = np.array(predictions, np.float32)[:, None]
        return METRICS[name](column, np.array(labels, np.float32))


def test_accuracy_by_hand():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 0.1, 0.2], [5.0, 9.0, 1.0], [1, 0, 0]])
    assert METRICS["accuracy"](logits, np.array([0, 2, 1, 2])) == 3 / 4


def test_matthews_by_hand():
    # TP 3, TN 2, FP 1, FN 1: (3 * 2 - 1 * 1) / sqrt(4 * 4 * 3 * 3) = 5 / 12.
    labels = np.array([1, 1, 1, 1, 0, 0, 0])
    predictions = np.array([1, 1, 1, 0, 0, 0, 1])
    got = METRICS["matthews"](logits_of(predictions), labels)
    assert got == pytest.approx(5 / 12)


def test_rates_of_each_class_by_hand():
    # a: 2 of 3 found, 1 too many; b: 1 of 2 found, 1 too many; c is never right.
    labels = np.array([0, 0, 0, 1, 1])
    logits = logits_of(np.array([0, 0, 1, 1, 0]), classes=3)
    rows = [np.zeros(1, np.int32)] * 5
    examples = batches.Examples(rows, rows, labels)
    found = PROBLEMS["classification"].by_class(logits, examples, ("a", "b", "c"))
    assert found == {
        "a": {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "count": 3},
        "b": {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "count": 2},
        "c": {"precision": 0, "recall": 0, "f1": 0, "count": 0},
    }
    for problem in ("regression", "span"):
        assert PROBLEMS[problem].by_class(logits, examples, ()) == {}


@pytest.mark.parametrize("flip, value", [(0, 1.0), (1, -1.0)])
def test_matthews_at_its_ends(flip, value):
    labels = np.array([0, 1, 1, 0, 1])
    got = METRICS["matthews"](logits_of(labels ^ flip), labels)
    assert got == pytest.approx(value)


def test_matthews_of_a_constant_prediction_is_zero():
    labels = np.array([0, 1, 1, 0])
    assert METRICS["matthews"](logits_of(np.ones(4, int)), labels) == 0


def test_f1_by_hand():
    # TP 2, FP 2, FN 1, TN 3: precision 2 / 4, recall 2 / 3; of class 0 it is 6 / 9.
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    predictions = np.array([1, 1, 0, 1, 1, 0, 0, 0])
    got = METRICS["f1"](logits_of(predictions), labels)
    assert got == pytest.approx(4 / 7)


@pytest.mark.parametrize("labels", [[0, 0], [0, 1]])
def test_f1_where_class_1_is_never_predicted(labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = METRICS["f1"](logits_of(np.zeros(2, int)), np.array(labels))
    assert got == 0


def test_correlations_by_hand():
    # Deviations (-3, -1, 1, 3) and (-1, -1, -1, 3): 12 / sqrt(20 * 12).
    assert correlation("pearson", [1, 3, 5, 7], [0, 0, 0, 4]) == pytest.approx(
        12 / np.sqrt(240)
    )
    # Ranks (1, 2, 3, 4) and (2, 1, 4, 3): 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15).
    assert correlation("spearman", [1, 2, 4, 8], [0.2, 0.1, 5, 3]) == pytest.approx(0.6)
    # Ties share their mean rank: (1.5, 1.5, 3) against (1, 2, 3).
    assert correlation("spearman", [0, 0, 9], [1, 2, 3]) == pytest.approx(
        1.5 / np.sqrt(1.5 * 2)
    )


@pytest.mark.parametrize("name", CORRELATIONS)
@pytest.mark.parametrize(
    "predictions, labels",
    [
        ([2.5, 2.5, 2.5], [0, 1, 2]),
        ([0.1, 0.2, 0.3], [4, 4, 4]),
        ([0.1] * 1000, np.arange(1000) % 7),
        ([3.0], [3.0]),
        ([np.nan, 1, 2], [1, 2, 3]),
    ],
)
def test_correlation_that_is_not_defined_is_zero(name, predictions, labels):
    assert correlation(name, predictions, labels) == 0


@pytest.mark.parametrize("name", CORRELATIONS)
def test_nearly_constant_predictions_do_not_warn(name):
    one = np.float64(1)
    logits = np.array([[one], [np.nextafter(one, 2)], [one]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert -1 <= METRICS[name](logits, np.array([1.0, 2.0, 3.0])) <= 1


@settings(deadline=None)
@given(hnp.arrays(np.float32, 9, elements=st.integers(-20, 20), unique=True))
def test_correlations_do_not_see_scale_nor_place(labels):
    for name in CORRELATIONS:
        assert correlation(name, 3 * labels + 7, labels) == pytest.approx(1)
        assert correlation(name, -labels, labels) == pytest.approx(-1)
    ranks = np.exp(labels.astype(np.float64) / 9)  # a rising function of them
    assert correlation("spearman", ranks, labels) == pytest.approx(1)


@pytest.mark.parametrize("name", METRICS)
def test_is_a_plain_float(name):
    logits, labels = logits_of(np.array([0, 1])), np.array([0, 1])
    if name in ("micro_f1", "macro_f1"):  # Several labels have a column each.
        labels = np.eye(2)
    assert type(METRICS[name](logits, labels)) is float
