"""Tasks: what is read, predicted and scored; GLUE's and SQuAD are rows of a table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cofi_jax import config, errors
from cofi_jax.data.batches import Examples
from cofi_jax.data.problems import PROBLEMS, Problem
from cofi_jax.data.problems.base import Scorer

GLUE = "nyu-mll/glue"
OWN = "own"  # the task that `config.Data` itself describes


@dataclasses.dataclass(frozen=True)
class Task:
    """A row of the table below; `find` fills in what the config says beside it."""

    columns: tuple[str, ...]  # of text: one sentence, or a pair
    labels: tuple[str, ...]  # the name of class 0, 1, ...; () where there are none
    metrics: tuple[str, ...]  # that the problem can score; the first one decides
    problem: Problem = PROBLEMS["classification"]
    max_length: int = 128  # tokens of a row at most, special ones included
    label_column: str = "label"  # "" where a model's answers take the place of labels
    group_column: str = ""  # of rows that belong together; "" where that is not said
    validation: tuple[str, ...] = ("validation",)  # splits; the first one decides
    hub: str = GLUE  # the data set's name; "" where there is none

    name: str = ""
    path: str = ""  # a folder, or another name on the hub; "" for `hub`
    extra_file: str = ""  # more training rows
    pairs: str = ""  # of vectors, as in `config.Data`
    retrieval: str = ""  # likewise
    quoting: bool = True  # of the cells of csv and tsv, as in `config.Data`
    buckets: tuple[int, ...] = ()  # padded lengths; () to choose them for the rows

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns that the labels are read from; most problems have one."""
        if not self.label_column:
            return ()
        return self.problem.label_columns(self.label_column)

    @property
    def scored_by_answers(self) -> bool:
        """Whether metrics of labels are those of a model's answers instead."""
        return not self.label_column and not self.problem.pools

    def lacks_labels(self, columns: Mapping[str, Any]) -> bool:
        """Whether a model's answers are to take the place of labels of rows.

        `columns` are those that `sources.load` read. Texts that are joined to pairs or
        to a retrieval set have what they are scored by.
        """
        return not self.label_column and "uncut" not in columns

    @property
    def num_outputs(self) -> int:
        """The width of the logits (C)."""
        return self.problem.num_outputs(self.labels)

    def tokenise(
        self, columns: dict[str, Any], tokenizer: Any, *, training: bool = False
    ) -> Examples:
        """The rows that `sources.load` read, as ids of a transformers tokenizer.

        With `training`, rows that nothing can be learnt from are left out: questions
        whose answer is not in their context.
        """
        return self.problem.tokenise(columns, self, tokenizer, training=training)

    def at(self, path: str) -> "Task":
        """The task with the rows that models are scored on at another path."""
        return dataclasses.replace(self, **{"pairs" if self.pairs else "path": path})

    def with_label_column(self, column: str) -> "Task":
        """The task with its labels elsewhere in the rows; "" for rows without any.

        Raises:
          UserError: for a task of the table and for one without labels, and where the
            rows have something else in that column.
        """
        field = "data.label_column", column
        if self.name != OWN:
            legal = f"only the task {OWN} takes it, not {self.name}"
            raise errors.reject(*field, legal)
        if self.problem.pools:
            legal = f"is not for {self.problem.name}, which are scored without labels"
            raise errors.reject(*field, legal)
        _check_names(self.columns, self.group_column, self.problem, column)
        return dataclasses.replace(self, label_column=column)

    def with_settings(self, settings: Mapping[str, Any]) -> "Task":
        """The task as the problem was fitted to a model, see `Problem.fit`.

        Raises:
          ValueError: for settings that are not the problem's.
        """
        problem = self.problem.with_settings(settings, self.labels)
        return dataclasses.replace(self, problem=problem)

    def scorer(self, logits: np.ndarray, examples: Examples) -> tuple[int, Scorer]:
        """The number of examples, and the metrics as a function of a choice of them."""
        return self.problem.scorer(logits, examples, self.metrics)

    def scores(self, logits: np.ndarray, examples: Examples) -> dict[str, float]:
        """Each of the task's metrics, the one that decides first; higher is better.

        Logits are (N, C), or (N, T, C) where the head reads every token.
        """
        count, score = self.scorer(logits, examples)
        return score(np.arange(count))


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
    "stsb": Task(_PAIR, (), ("spearman", "pearson"), PROBLEMS["regression"]),
    "squad": Task(
        ("question", "context"),
        (),
        ("f1", "exact_match"),
        PROBLEMS["span"],
        max_length=384,
        label_column="answers",
        hub="rajpurkar/squad",
    ),
}


def find(data: config.Data) -> Task:
    """The task that `data` names, or for `own` the one that its fields describe.

    Raises:
      UserError: for an unknown task, and for fields that do not describe one.
    """
    task = _own(data) if data.task == OWN else _of_the_table(data)
    task = dataclasses.replace(
        task,
        max_length=data.max_length or task.max_length,
        name=data.task,
        path=data.path,
        extra_file=data.extra_file,
        pairs=data.pairs,
        retrieval=data.retrieval,
        quoting=data.quoting,
        buckets=tuple(data.buckets),
    )
    return task.problem.described(task)


def _of_the_table(data):
    if data.task not in TASKS:
        legal = f"must be one of {', '.join(TASKS)}, or {OWN}"
        raise errors.reject("data.task", data.task, legal)
    described = "columns label_column group_column problem labels metrics"
    for field in described.split():
        value = getattr(data, field)
        if value != getattr(config.Data(), field):
            legal = f"only the task {OWN} takes it, not {data.task}"
            raise errors.reject(f"data.{field}", value, legal)
    return TASKS[data.task]


def _own(data):
    problems = {name: each for name, each in PROBLEMS.items() if each.own_metrics}
    if data.problem not in problems:
        legal = f"must be one of {', '.join(problems)}"
        raise errors.reject("data.problem", data.problem, legal)
    problem = problems[data.problem]
    least, most = problem.least_columns, problem.most_columns
    if not least <= len(data.columns) <= most:
        many = {(1, 2): "one or two columns", (2, 2): "two columns"}.get((least, most))
        legal = f"the task own needs the names of {many} of text, as "
        legal += "--config.data.columns=title,body"
        if most == 1:
            legal = f"needs the name of one column, each cell {problem.text_form}"
        raise errors.reject("data.columns", data.columns, legal)
    if data.group_column and not problem.grouped:
        legal = f"must be empty for data.problem={data.problem}"
        raise errors.reject("data.group_column", data.group_column, legal)
    _check_names(data.columns, data.group_column, problem, data.label_column)
    if len(set(data.labels)) != len(data.labels):
        raise errors.reject("data.labels", data.labels, "names a class twice")
    if len(data.labels) == 1 or (data.labels and not problem.names_classes):
        legal = "must name two classes or more; for values such as a regression's, none"
        raise errors.reject("data.labels", data.labels, legal)
    if not set(data.metrics) <= set(problem.own_metrics):
        legal = f"must be among {problem.own_metrics}"
        raise errors.reject("data.metrics", data.metrics, legal)
    if data.labels:
        problem.check_metrics(data.metrics, data.labels)
    return Task(
        columns=tuple(data.columns),
        labels=tuple(data.labels),
        metrics=tuple(data.metrics) or problem.own_metrics[:1],
        problem=problem,
        label_column=data.label_column,
        group_column=data.group_column,
        hub="",
    )


def _check_names(columns, group_column, problem, label_column):
    """Raises UserError where a column of the rows is to be read as two things."""
    read = [*columns, *filter(None, [group_column])]
    if label_column:
        read += problem.label_columns(label_column)
    if len(set(read)) < len(read):
        legal = f"names one twice, data.label_column={label_column!r} included"
        raise errors.reject("data.columns", columns, legal)
