"""The task table: a classification task of the hub's GLUE is one row of `TASKS`."""

import dataclasses
from typing import Any

import numpy as np

from cofi_jax import config, errors
from cofi_jax.data import squad
from cofi_jax.data.metrics import METRICS

GLUE = "nyu-mll/glue"


OWN = "own"  # the task that `config.Data` itself describes


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of the task table."""

    columns: tuple[str, ...]  # of text: one sentence, or a pair
    labels: tuple[str, ...]  # the name of class 0, 1, ...; () where there are none
    metrics: tuple[str, ...]  # of metrics.METRICS, or squad.score; the first decides
    max_length: int = 128  # tokens
    problem: str = "classification"  # or regression, span
    label_column: str = "label"
    validation: tuple[str, ...] = ("validation",)  # splits; the first one decides
    hub: str = GLUE

    @property
    def num_outputs(self) -> int:
        """The width of the logits."""
        widths = {"classification": len(self.labels), "regression": 1, "span": 2}
        return widths[self.problem]


_PAIR = ("sentence1", "sentence2")


TASKS = {
    "demo": Task(("sentence",), ("blame", "praise"), ("accuracy",)),
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",)),
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "mrpc": Task(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": Task(
        ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")
    ),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": Task(
        ("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)
    ),
    "rte": Task(_PAIR, ("entailment", "not_entailment"), ("accuracy",)),
    "wnli": Task(_PAIR, ("not_entailment", "entailment"), ("accuracy",)),
    "stsb": Task(_PAIR, (), ("spearman", "pearson"), problem="regression"),
    "squad": Task(
        ("question", "context"),
        (),
        ("f1", "exact_match"),
        max_length=384,
        problem="span",
        label_column="answers",
        hub="rajpurkar/squad",
    ),
}


_OWN_METRICS = {
    "classification": ("accuracy", "matthews", "f1"),
    "regression": ("spearman", "pearson"),
}


def find(data: config.Data) -> Task:
    """The task that `data` names, or for `own` the one that its fields describe.

    Raises:
      UserError: for an unknown task, and for fields that do not describe one.
    """
    if data.task != OWN:
        if data.task not in TASKS:
            legal = f"must be one of {', '.join(TASKS)}, or {OWN}"
            raise errors.reject("data.task", data.task, legal)
        for field in ("columns", "label_column", "problem", "labels", "metrics"):
            value = getattr(data, field)
            if value != getattr(config.Data(), field):
                legal = f"only the task {OWN} takes it, not {data.task}"
                raise errors.reject(f"data.{field}", value, legal)
        return TASKS[data.task]
    if len(data.columns) not in (1, 2):
        legal = "the task own needs the names of one or two columns of text"
        raise errors.reject("data.columns", data.columns, legal)
    if len({*data.columns, data.label_column}) <= len(data.columns):
        legal = (
            f"names a column twice, data.label_column={data.label_column!r} included"
        )
        raise errors.reject("data.columns", data.columns, legal)
    if len(set(data.labels)) != len(data.labels):
        raise errors.reject("data.labels", data.labels, "names a class twice")
    if len(data.labels) == 1 or (data.labels and data.problem == "regression"):
        legal = "must name two classes or more; for regression, none"
        raise errors.reject("data.labels", data.labels, legal)
    if data.problem not in _OWN_METRICS:
        legal = f"must be one of {', '.join(_OWN_METRICS)}"
        raise errors.reject("data.problem", data.problem, legal)
    legal = _OWN_METRICS[data.problem]
    if not set(data.metrics) <= set(legal):
        raise errors.reject("data.metrics", data.metrics, f"must be among {legal}")
    if "f1" in data.metrics and len(data.labels) > 2:
        raise errors.reject("data.metrics", data.metrics, "f1 is for two classes")
    return Task(
        columns=tuple(data.columns),
        labels=tuple(data.labels),
        metrics=tuple(data.metrics) or legal[:1],
        problem=data.problem,
        label_column=data.label_column,
        hub="",
    )


def max_length(data: config.Data) -> int:
    """The most tokens in a row: `data.max_length`, or the task's own."""
    return data.max_length or find(data).max_length


def scores(task: Task, logits: np.ndarray, examples: Any) -> dict[str, float]:
    """Each of the task's metrics, the one that decides first; higher is better.

    Args:
      task: a row of the table.
      logits: (N, C), or (N, T, 2) for spans.
      examples: the N `data.Examples`.
    """
    if task.problem == "span":
        return squad.score(logits, examples.questions)
    return {name: METRICS[name](logits, examples.labels) for name in task.metrics}
