"""Losses of labels and of a teacher's outputs, against closed forms and float64."""

import jax
import numpy as np
import pytest
from scipy.special import expit, log_softmax, rel_entr, softmax

from cofi_jax.data import problems
from cofi_jax.data.problems.base import weighted_mean

LN2 = float(np.log(2))


PROBLEMS = ("classification", "regression", "span", "multilabel")


B, C, T = 4, 3, 6


LENGTHS = (6, 3, 1, 4)


WEIGHT = np.array([1, 1, 0, 1], np.float32)


pytestmark = pytest.mark.usefixtures("quick_compile")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def batch_of(problem):
    """Four rows, of which the third only fills the batch."""
    labels = {
        "classification": np.array([0, 2, 1, 1], np.int32),
        "regression": np.array([0.5, -1, 99, 4], np.float32),
        "span": np.array([[1, 5], [2, 2], [0, 0], [0, 3]], np.int32),
        "multilabel": np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], "f4"),
    }
    mask = np.arange(T) < np.array(LENGTHS)[:, None]
    return {
        "labels": labels[problem],
        "weight": WEIGHT,
        "attention_mask": mask.astype(np.int32),
    }


def logits_of(problem, seed=0):
    shapes = {"regression": (B, 1), "span": (B, T, 2)}
    return 2 * draw(*shapes.get(problem, (B, C)), seed=seed)


def choices(problem, logits):
    """(row, side of a span, logits of the choices in float64), of rows that count."""
    for row in np.flatnonzero(WEIGHT):
        if problem == "classification":
            yield row, None, np.float64(logits[row])
        else:
            for side in (0, 1):
                yield row, side, np.float64(logits[row, : LENGTHS[row], side])


def task_loss_by_hand(problem, logits, batch):
    if problem == "regression":
        return np.mean([(logits[i, 0] - batch["labels"][i]) ** 2 for i in (0, 1, 3)])
    if problem == "multilabel":
        labels, chances = np.float64(batch["labels"]), expit(np.float64(logits))
        right = np.where(labels == 1, chances, 1 - chances)
        return -np.mean(np.log(right[WEIGHT > 0]))
    terms = []
    for row, side, values in choices(problem, logits):
        label = batch["labels"][row] if side is None else batch["labels"][row, side]
        terms.append(-log_softmax(values)[label])
    return np.mean(terms)


def distill_by_hand(problem, student, teacher, temperature):
    if problem == "regression":
        return np.mean([(student[i, 0] - teacher[i, 0]) ** 2 for i in (0, 1, 3)])
    if problem == "multilabel":
        s, t = (expit(np.float64(x) / temperature) for x in (student, teacher))
        divergence = (rel_entr(t, s) + rel_entr(1 - t, 1 - s)).sum(-1)
        return temperature**2 * np.mean(divergence[WEIGHT > 0])
    terms = [
        rel_entr(softmax(t / temperature), softmax(s / temperature)).sum()
        for (*_, s), (*_, t) in zip(
            choices(problem, student), choices(problem, teacher), strict=True
        )
    ]
    return temperature**2 * np.mean(terms)


def task_loss(problem, *args):
    return problems.PROBLEMS[problem].loss(*args)


def distill(problem, *args):
    return problems.PROBLEMS[problem].distill(*args)


_task_loss = jax.jit(jax.value_and_grad(task_loss, 1), static_argnums=0)


_distill = jax.jit(jax.value_and_grad(distill, 1), static_argnums=0)


def test_weighted_mean_of_nothing_is_zero():
    assert weighted_mean(np.ones(3), np.zeros(3)) == 0


def test_weighted_mean_by_hand():
    mean = weighted_mean(np.array([1.0, 5, 9]), np.array([1.0, 3, 0]))
    np.testing.assert_allclose(mean, 4, rtol=1e-6)


# The labels


def test_class_loss_by_hand():
    """Probabilities 1/2 and 1/4 of the label: ln 2 and 2 ln 2."""
    logits = np.array([[0, 0], np.log([3, 1]), [7, -7]], np.float32)
    batch = {"labels": np.array([0, 1, 1]), "weight": np.array([1.0, 1.0, 0.0])}
    loss = task_loss("classification", logits, batch)
    np.testing.assert_allclose(loss, 1.5 * LN2, rtol=1e-6)
    batch["weight"] = np.array([0.0, 1.0, 0.0])
    loss = task_loss("classification", logits, batch)
    np.testing.assert_allclose(loss, 2 * LN2, rtol=1e-6)


def test_value_loss_by_hand():
    """Off by 1 and by 3: the mean of 1 and 9."""
    logits = np.array([[1.5], [1.0], [8.0]], np.float32)
    batch = {
        "labels": np.array([2.5, -2.0, 0.0], np.float32),
        "weight": np.array([1.0, 1.0, 0.0]),
    }
    np.testing.assert_allclose(task_loss("regression", logits, batch), 5)


def test_span_loss_by_hand():
    """Starts: 1/2 of 2 tokens, 1/4; ends: 1/4, 1. So (1 + 2 + 2 + 0) / 4 times ln 2."""
    start = [[0, 0, 50], [0, np.log(3), 50]]
    end = [[np.log(3), 0, 50], [99, 0, 50]]
    logits = np.stack([start, end], -1).astype(np.float32)
    batch = {
        "labels": np.array([[0, 1], [0, 0]]),
        "weight": np.ones(2, np.float32),
        "attention_mask": np.array([[1, 1, 0]] * 2),
    }
    loss = task_loss("span", logits, batch)
    np.testing.assert_allclose(loss, 5 / 4 * LN2, rtol=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_task_loss_in_float64(problem):
    batch = batch_of(problem)
    for seed in range(3):
        logits = logits_of(problem, seed)
        loss, _ = _task_loss(problem, logits, batch)
        expected = task_loss_by_hand(problem, logits, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_task_loss_gradient(problem):
    """Probability minus label over the choices, or 2 (prediction - value) / rows."""
    batch, logits = batch_of(problem), logits_of(problem)
    expected = np.zeros_like(logits)
    if problem == "regression":
        expected[:, 0] = 2 * (logits[:, 0] - batch["labels"]) * WEIGHT / 3
    elif problem == "multilabel":
        expected[:] = (expit(logits) - batch["labels"]) * WEIGHT[:, None] / 3 / C
    else:
        many = 3 if problem == "classification" else 6
        for row, side, values in choices(problem, logits):
            gradient = softmax(values)
            label = batch["labels"][row] if side is None else batch["labels"][row, side]
            gradient[label] -= 1
            where = (row,) if side is None else (row, slice(LENGTHS[row]), side)
            expected[where] = gradient / many
    _, gradient = _task_loss(problem, logits, batch)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_a_certain_span_costs_nothing():
    batch = batch_of("span")
    logits = np.zeros((B, T, 2), np.float32)
    for row, label in zip(logits, batch["labels"], strict=True):
        row[label, [0, 1]] = 1e4
    loss, gradient = _task_loss("span", logits, batch)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


# The teacher


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_distill_logits_in_float64(problem, temperature):
    """T^2 KL(teacher || student), of several labels their sum; values: the error."""
    student, teacher = logits_of(problem), logits_of(problem, seed=1)
    loss, _ = _distill(problem, student, teacher, batch_of(problem), temperature)
    expected = distill_by_hand(problem, student, teacher, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("problem", ["classification", "span"])
def test_distill_logits_has_a_direction(problem):
    """Teacher (1/2, 1/2), student (1/4, 3/4): KL = ln(2 / sqrt 3).

    The other way round it would be 3/4 ln 3 - ln 2.
    """
    student, teacher = np.log(np.float32([[1, 3]])), np.zeros((1, 2), np.float32)
    batch = {"weight": np.ones(1, np.float32)}
    if problem == "span":  # of two real tokens and a third that is not
        student, teacher = (
            np.pad(x[..., None].repeat(2, -1), ((0, 0), (0, 1), (0, 0)))
            for x in (student, teacher)
        )
        batch["attention_mask"] = np.array([[1, 1, 0]])
    loss = distill(problem, student, teacher, batch, 1.0)
    np.testing.assert_allclose(loss, np.log(2 / np.sqrt(3)), rtol=1e-6)
    loss = distill(problem, teacher, student, batch, 1.0)
    np.testing.assert_allclose(loss, 0.75 * np.log(3) - LN2, rtol=1e-6)


def test_both_ends_of_a_span_count_alike():
    """Starts as above, ends as the teacher's: half of it."""
    student, teacher = np.zeros((2, 1, 2, 2), np.float32)
    student[0, :, 0] = np.log([1, 3])
    batch = {"weight": np.ones(1, np.float32), "attention_mask": np.ones((1, 2))}
    for swapped in (1, -1):
        loss = distill("span", student[..., ::swapped], teacher, batch, 1.0)
        np.testing.assert_allclose(loss, np.log(2 / np.sqrt(3)) / 2, rtol=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_distill_logits_of_equals_is_zero(problem):
    logits, batch = logits_of(problem), batch_of(problem)
    loss, gradient = _distill(problem, logits, logits, batch, 2.0)
    assert abs(loss) < 1e-6
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    if problem in ("classification", "span"):  # What is added to all is not seen.
        loss, gradient = _distill(problem, logits, logits + 5, batch, 2.0)
        assert abs(loss) < 1e-5
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("problem", ["classification", "span"])
def test_distill_logits_gradient_is_t_times_the_gap(problem):
    """d/ds T^2 KL = T (softmax(s / T) - softmax(t / T)), a mean over the choices."""
    student, teacher, temperature = logits_of(problem), logits_of(problem, 1), 3.0
    expected = np.zeros_like(student)
    pairs = zip(choices(problem, student), choices(problem, teacher), strict=True)
    for (row, side, s), (*_, t) in pairs:
        gap = softmax(s / temperature) - softmax(t / temperature)
        where = (row,) if side is None else (row, slice(LENGTHS[row]), side)
        expected[where] = temperature * gap / (3 if side is None else 6)
    _, gradient = _distill(problem, student, teacher, batch_of(problem), temperature)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_labels_are_taught_as_choices_of_their_own(temperature):
    """Each of them is a choice between two classes; one that agrees adds nothing."""
    student, teacher = logits_of("multilabel"), logits_of("multilabel", seed=1)
    batch = batch_of("multilabel")
    expected = 0
    for label in range(C):
        pair = (
            np.stack([0 * x[:, label], x[:, label]], -1) for x in (student, teacher)
        )
        expected += distill("classification", *pair, batch, temperature)
    found = distill("multilabel", student, teacher, batch, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    student, teacher = (np.insert(x, 1, 7.0, axis=1) for x in (student, teacher))
    found = distill("multilabel", student, teacher, batch, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_values_are_taught_where_a_divergence_would_be_blind():
    """The softmax of a single logit is 1, whatever it is."""
    student, teacher = logits_of("regression"), logits_of("regression", seed=1)
    batch = batch_of("regression")
    loss, gradient = _distill("classification", student, teacher, batch, 2.0)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)
    expected = 2 * (student - teacher) * WEIGHT[:, None] / 3
    assert (np.abs(expected[WEIGHT > 0]) > 0.01).all()
    for temperature in (1.0, 2.0):  # which has no say in values
        _, gradient = _distill("regression", student, teacher, batch, temperature)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)


# What is not looked at


def both_losses(problem, student, teacher, batch):
    task, task_gradient = _task_loss(problem, student, batch)
    distill, distill_gradient = _distill(problem, student, teacher, batch, 2.0)
    return np.array([task, distill]), np.stack([task_gradient, distill_gradient])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_rows_of_weight_zero_are_not_looked_at(problem):
    student, teacher = logits_of(problem), logits_of(problem, seed=1)
    batch = batch_of(problem)
    values, gradients = both_losses(problem, student, teacher, batch)
    np.testing.assert_array_equal(gradients[:, 2], 0)
    student[2], teacher[2] = 77, -55
    others = both_losses(problem, student, teacher, batch)
    np.testing.assert_array_equal(others[0], values)
    np.testing.assert_array_equal(others[1], gradients)
    # Nor is their number.
    kept = {k: v[WEIGHT > 0] for k, v in batch.items()}
    fewer = both_losses(problem, student[WEIGHT > 0], teacher[WEIGHT > 0], kept)
    np.testing.assert_allclose(fewer[0], values, rtol=1e-6)
    batch["weight"] = np.zeros(B, np.float32)
    values, gradients = both_losses(problem, student, teacher, batch)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(gradients, 0)


@pytest.mark.parametrize("more", [1, 10])
def test_the_padding_of_spans_is_not_looked_at(more):
    student, teacher, batch = logits_of("span"), logits_of("span", 1), batch_of("span")
    values, gradients = both_losses("span", student, teacher, batch)
    padding = batch["attention_mask"] == 0
    np.testing.assert_array_equal(gradients[:, padding], 0)
    student[padding], teacher[padding] = 99, -99
    student, teacher = (
        np.concatenate([x, 99 * draw(B, more, 2, seed=more)], axis=1)
        for x in (student, teacher)
    )
    batch["attention_mask"] = np.pad(batch["attention_mask"], ((0, 0), (0, more)))
    longer = both_losses("span", student, teacher, batch)
    np.testing.assert_allclose(longer[0], values, rtol=1e-6)
    np.testing.assert_allclose(longer[1][:, :, :T], gradients, atol=1e-7)
    np.testing.assert_array_equal(longer[1][:, :, T:], 0)
