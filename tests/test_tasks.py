"""Each row of the task table is whole; what `own` describes is checked as well."""

import dataclasses
import types

import numpy as np
import pytest

from cofi_jax import config, errors
from cofi_jax.data import batches, squad, tasks
from cofi_jax.data import metrics as metrics_lib

ONE_QUESTION = squad.Questions(
    contexts=["a bc d"],
    answers=[["bc"]],
    of_row=np.zeros(1, np.int32),
    offsets=[np.array([[-1, -1], [0, 1], [2, 4], [5, 6]], np.int32)],
)


def own(**fields):
    return config.Data(task="own", **{"columns": ("text",)} | fields)


def labelled(*labels, dtype=np.int32):
    ids = [np.zeros(1, np.int32)] * len(labels)
    return batches.Examples(ids, ids, np.array(labels, dtype))


def complaint(data):
    with pytest.raises(errors.UserError) as caught:
        tasks.find(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The table


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_row_of_the_table(name):
    task = tasks.find(config.Data(task=name))
    assert task == dataclasses.replace(tasks.TASKS[name], name=name)
    assert name != tasks.OWN
    assert len(task.columns) in (1, 2) and len(set(task.columns)) == len(task.columns)
    assert task.label_column not in task.columns
    assert task.metrics and task.validation and task.hub
    assert task.max_length >= 3
    assert task.problem.name in ("classification", "regression", "span")
    if task.problem.name == "classification":
        assert len(set(task.labels)) == len(task.labels) >= 2
        assert task.num_outputs == len(task.labels)
    else:
        assert task.labels == ()
        assert task.num_outputs == {"regression": 1, "span": 2}[task.problem.name]
    if "f1" in task.metrics and task.problem.name == "classification":
        assert len(task.labels) == 2


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_can_be_scored(name):
    """By its own metrics, in their order; a model that is right has 1 in each."""
    task = tasks.TASKS[name]
    if task.problem.name == "span":
        logits = np.zeros((1, 7, 2))
        logits[0, 2] = 1
        examples = types.SimpleNamespace(uncut=ONE_QUESTION)
    elif task.problem.name == "regression":
        logits = np.array([[0.5], [3.0], [4.5]])
        examples = labelled(0.5, 3.0, 4.5, dtype=np.float32)
    else:
        assert set(task.metrics) <= set(metrics_lib.METRICS)
        logits = np.eye(len(task.labels))
        examples = labelled(*range(len(task.labels)))
    scores = task.scores(logits, examples)
    assert tuple(scores) == task.metrics
    assert scores == pytest.approx(dict.fromkeys(task.metrics, 1.0))
    assert {type(score) for score in scores.values()} == {float}


def test_scores_by_hand():
    # Of 4 rows 3 are right; class 1: 2 found, 1 too many, 0 missed.
    logits = np.array([[0, 1], [0, 1], [0, 1], [1, 0]])
    scores = tasks.TASKS["mrpc"].scores(logits, labelled(1, 1, 0, 0))
    assert scores == pytest.approx({"accuracy": 3 / 4, "f1": 4 / 5})
    # The order is kept, the distances are not.
    values, labels = np.array([[1.0], [2.0], [4.0], [8.0]]), [0.0, 1.0, 2.0, 3.0]
    scores = tasks.TASKS["stsb"].scores(values, labelled(*labels, dtype=float))
    pearson = 11.5 / np.sqrt(28.75 * 5)  # covariance, variances: times 4
    assert scores == pytest.approx({"spearman": 1, "pearson": pearson})
    # Of "bc" and "bc d" one word of two is shared.
    logits = np.zeros((1, 4, 2))
    logits[0, 2, 0] = logits[0, 3, 1] = 1
    examples = types.SimpleNamespace(uncut=ONE_QUESTION)
    scores = tasks.TASKS["squad"].scores(logits, examples)
    assert scores == pytest.approx({"f1": 2 / 3, "exact_match": 0})


def test_unknown_task():
    message = complaint(config.Data(task="sst3"))
    assert message.startswith("data.task='sst3'")
    assert all(name in message for name in (*tasks.TASKS, "own"))


@pytest.mark.parametrize(
    "field, value",
    [
        ("columns", ("sentence",)),
        ("label_column", "label2"),
        ("problem", "regression"),
        ("labels", ("a", "b")),
        ("metrics", ("f1",)),
    ],
)
def test_a_task_of_the_table_is_not_described_again(field, value):
    for name in ("sst2", "squad"):
        message = complaint(config.Data(task=name, **{field: value}))
        assert message.startswith(f"data.{field}={value!r}")
        assert "own" in message and name in message
    found = getattr(tasks.find(own(**{field: value})), field)
    assert getattr(found, "name", found) == value


# The task that the config describes


@pytest.mark.parametrize("columns", [("text",), ("first", "second")])
def test_own_has_one_or_two_columns(columns):
    task = tasks.find(own(columns=columns))
    assert task.columns == columns
    assert task.labels == () and task.label_column == "label"
    assert task.problem.name == "classification" and task.metrics == ("accuracy",)
    assert task.validation == ("validation",)
    # A config that was read from JSON may hold lists.
    assert tasks.find(own(columns=list(columns))) == task


@pytest.mark.parametrize("columns", [(), ("a", "b", "c")])
def test_own_has_no_other_number_of_columns(columns):
    assert complaint(own(columns=columns)).startswith(f"data.columns={columns!r}")


@pytest.mark.parametrize(
    "problem, metrics, expected",
    [
        ("classification", (), ("accuracy",)),
        ("classification", ("matthews", "accuracy"), ("matthews", "accuracy")),
        ("classification", ("f1",), ("f1",)),
        ("regression", (), ("spearman",)),
        ("regression", ("pearson", "spearman"), ("pearson", "spearman")),
    ],
)
def test_metrics_of_own(problem, metrics, expected):
    assert tasks.find(own(problem=problem, metrics=metrics)).metrics == expected


@pytest.mark.parametrize(
    "problem, metrics, legal",
    [
        ("classification", ("bleu",), "matthews"),
        ("classification", ("accuracy", "pearson"), "matthews"),
        ("classification", ("exact_match",), "accuracy"),
        ("regression", ("accuracy",), "spearman"),
        ("regression", ("spearman", "f1"), "pearson"),
    ],
)
def test_metrics_that_own_has_not(problem, metrics, legal):
    message = complaint(own(problem=problem, metrics=metrics))
    assert message.startswith(f"data.metrics={metrics!r}") and legal in message


@pytest.mark.parametrize("columns", [("text", "text"), ("label",), ("text", "label")])
def test_a_column_is_named_once(columns):
    assert complaint(own(columns=columns)).startswith("data.columns=")


def test_f1_needs_two_classes():
    task = tasks.find(own(labels=("no", "yes"), metrics=("f1",)))
    assert task.scores(np.eye(2), labelled(0, 1)) == {"f1": 1}
    message = complaint(own(labels=("no", "yes", "both"), metrics=("accuracy", "f1")))
    assert message.startswith("data.metrics=")


@pytest.mark.parametrize(
    "problem, labels, problem_said",
    [
        ("classification", ("a", "b", "a"), "twice"),
        ("classification", ("a",), "two classes or more"),
        ("regression", ("a", "b"), "none"),
        ("regression", ("a",), "none"),
    ],
)
def test_labels_that_own_cannot_have(problem, labels, problem_said):
    message = complaint(own(problem=problem, labels=labels))
    assert message.startswith(f"data.labels={labels!r}") and problem_said in message


def test_outputs_of_own():
    assert tasks.find(own(labels=("a", "b", "c"))).num_outputs == 3
    assert tasks.find(own(problem="regression")).num_outputs == 1


def test_max_length():
    assert tasks.find(config.Data(task="sst2")).max_length == 128
    assert tasks.find(config.Data(task="squad")).max_length == 384
    assert tasks.find(own()).max_length == 128
    for task in ("sst2", "squad"):
        assert tasks.find(config.Data(task=task, max_length=50)).max_length == 50
