"""Classes as another model sees them: a number for each, in place of a label."""

import json

import jax
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from cofi_jax import config, errors
from cofi_jax.data import batches, sources, tasks
from cofi_jax.data.problems import PROBLEMS

pytestmark = pytest.mark.usefixtures("quick_compile")

LABELS = ("poor", "fair", "great")


PROBLEM = PROBLEMS["classification"]


def own(path, **more):
    fields = {"columns": ("text",), "labels": LABELS} | more
    return config.Data(task="own", path=str(path), **fields)


def write(folder, cells, name="train.jsonl"):
    rows = ({"text": f"{i}", "label": cell} for i, cell in enumerate(cells))
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder


def load(data):
    return sources.load(tasks.find(data), ("train",))[1]["train"]["label"]


def complaint(data):
    with pytest.raises(errors.UserError) as caught:
        load(data)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_probabilities_are_taken_as_they_are_and_logits_are_not(tmp_path):
    found = load(own(write(tmp_path, [[0.2, 0.5, 0.3], [1, 0, 0]])))
    np.testing.assert_allclose(found, [[0.2, 0.5, 0.3], [1, 0, 0]], rtol=1e-6)
    assert found.dtype == np.float32
    # Of two digits, they may miss a sum of 1; each row then has it.
    found = load(own(write(tmp_path, [[0.33, 0.33, 0.33]])))
    np.testing.assert_allclose(found, [[1 / 3] * 3], rtol=1e-6)
    # By the rounding of what made them, one may be just outside of [0, 1].
    found = load(own(write(tmp_path, [[0.2, 0.5, 0.3], [1 + 1e-7, 0, -1e-7]])))
    np.testing.assert_allclose(found, [[0.2, 0.5, 0.3], [1, 0, 0]], rtol=1e-6)
    for logits in ([[0.2, 0.5, 0.3], [0.3, 0.1, -1]], [[0.2, 0.5, 0.3], [3, 1, 0]]):
        found = load(own(write(tmp_path, logits)))
        np.testing.assert_allclose(found, softmax(logits, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("cells", "more", "said"),
    [
        ([[0.5, 0.5]], {}, ["row 0 ", "a list of 3 finite numbers"]),
        ([[1, 0, 0], "poor"], {}, ["row 1 ", "label='poor'", "a list of 3 finite"]),
        ([[1, 0, 0], None], {}, ["row 1 ", "label=None"]),
        ([[1, 0, None]], {}, ["row 0 ", "a list of 3 finite numbers"]),
        ([[1, 0, float("inf")]], {}, ["row 0 ", "a list of 3 finite numbers"]),
        ([[1, 0, 10**400]], {}, ["row 0 ", "a list of 3 finite numbers"]),
        ([["a", "b", "c"]], {}, ["row 0 ", "a list of 3 finite numbers"]),
        (
            [[1, 0, 0], [0, 0, 0.5]],
            {},
            ["row 1 ", "the sum is 0.5; must be probabilities"],
        ),
        ([[1, 0], [0, 1]], {"labels": ()}, ["label_column", "need data.labels"]),
    ],
)
def test_lists_that_are_no_such_numbers(tmp_path, cells, more, said):
    message = complaint(own(write(tmp_path, cells), **more))
    assert all(part in message for part in said)


def test_all_files_of_a_split_have_labels_of_one_form(tmp_path):
    write(tmp_path, [[1, 0, 0]], "train.jsonl")
    write(tmp_path, ["poor", "great"], "more.jsonl")
    message = complaint(own(tmp_path, extra_file=str(tmp_path / "more.jsonl")))
    assert message.startswith("data.extra_file=") and "has other labels than" in message


def test_the_loss_is_the_cross_entropy_of_the_probabilities():
    """Which is that of the classes where they are certain."""
    rng = np.random.default_rng(0)
    logits = np.float32(rng.standard_normal((4, 3)))
    chances = np.float32(softmax(rng.standard_normal((4, 3)), axis=-1))
    batch = {"labels": chances, "weight": np.float32([1, 1, 0, 1])}
    found, gradient = jax.value_and_grad(PROBLEM.loss)(logits, batch)
    terms = -(chances * log_softmax(np.float64(logits), axis=-1)).sum(-1)
    np.testing.assert_allclose(found, terms[[0, 1, 3]].mean(), rtol=1e-5)
    expected = (softmax(logits, axis=-1) - chances) * batch["weight"][:, None] / 3
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    sure = PROBLEM.loss(logits, batch | {"labels": np.eye(3, dtype="f4")[[0, 2, 1, 1]]})
    classes = PROBLEM.loss(logits, batch | {"labels": np.array([0, 2, 1, 1])})
    np.testing.assert_allclose(sure, classes, rtol=1e-6)


def test_scores_are_those_of_the_most_likely_classes():
    rng = np.random.default_rng(1)
    logits, chances = rng.standard_normal((2, 40, 3))
    rows = [np.zeros(1, np.int32)] * 40
    soft, hard = (
        batches.Examples(rows, rows, labels)
        for labels in (softmax(chances, axis=-1), chances.argmax(-1))
    )
    task = tasks.find(own("", metrics=("accuracy", "matthews")))
    assert task.scores(logits, soft) == task.scores(logits, hard)
    by_class = [PROBLEM.by_class(logits, rows, LABELS) for rows in (soft, hard)]
    assert by_class[0] == by_class[1]
    found, expected = (
        PROBLEM.per_example(logits, rows, ("accuracy",)) for rows in (soft, hard)
    )
    np.testing.assert_array_equal(found["accuracy"], expected["accuracy"])
