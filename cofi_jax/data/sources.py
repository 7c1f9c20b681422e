"""Rows of a task, read from the hub or from files; every row is checked."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cofi_jax import errors
from cofi_jax.data import toy
from cofi_jax.data.problems.base import WrongLabel
from cofi_jax.data.tasks import GLUE, Task

if TYPE_CHECKING:  # slow to import: a wrong flag should fail before that
    import pyarrow

FORMATS = ("parquet", "csv", "tsv", "json", "jsonl")

Columns = dict[str, Any]  # a list of texts by column, and the labels as an array


def load(task: Task, splits: Sequence[str]) -> tuple[Task, dict[str, Columns]]:
    """Reads splits of the task, and checks every row.

    The demo task is generated. Where `task.path` is a folder, it and its subfolder of
    the task's name are searched for `{split}.parquet`, `.csv`, `.tsv` (without quoting,
    as GLUE's own), `.json` (a list, or one object a line) or `.jsonl`. Any other path
    is a name on the hub. The rows of `task.extra_file` follow those of `train`.

    Returns:
      The task, with the names of its classes, which are read off the training rows
      where they were not given; and by split the texts and the encoded labels.

    Raises:
      UserError: a source is missing or cannot be read, or its rows are not the task's.
    """
    parts = {split: [_checked(task, _read_split(task, split))] for split in splits}
    if task.extra_file and "train" in splits:
        field = "data.extra_file", task.extra_file
        part = _read_file(field, task, pathlib.Path(task.extra_file))
        parts["train"].append(_checked(task, part))
    # The order of names that were read off the rows is nobody's choice.
    numbered = bool(task.labels)
    if task.problem.names_classes and not task.labels:
        task = _with_labels(task, parts["train"])
    return task, {split: _join(task, p, numbered) for split, p in parts.items()}


class _Part(NamedTuple):
    """Some rows of a split."""

    field: tuple[str, str]  # the config field that named the source, and its value
    source: Any  # the file or the split
    table: "pyarrow.Table"


def _read_split(task: Task, split: str) -> _Part:
    import pyarrow

    field = "data.path", task.path
    if task.name == "demo":
        return _Part(field, split, pyarrow.table(toy.demo_rows(split)))
    if pathlib.Path(task.path or "?").expanduser().is_dir():
        return _read_file(field, task, _find_file(task, split))
    return _Part(field, split, _load_from_hub(task, split))


def _find_file(task: Task, split: str) -> pathlib.Path:
    top = pathlib.Path(task.path).expanduser()
    folders = [folder for folder in (top, top / task.name) if folder.is_dir()]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    names = [f"{split}.{suffix}" for suffix in FORMATS]
    found = [file for file in files if file.name in names]
    if len(found) == 1:
        return found[0]
    here = ", ".join(str(file.relative_to(top)) for file in (found or files)[:20])
    legal = f"must hold one of {names}, itself or in its folder {task.name}"
    legal += f"; {len(found)} found, among: {here or 'no files'}"
    raise errors.reject("data.path", task.path, legal)


def _read_file(field: tuple[str, str], task: Task, file: pathlib.Path) -> _Part:
    if file.suffix.removeprefix(".") not in FORMATS:
        raise errors.reject(*field, f"must be a file of one of the formats {FORMATS}")
    file = file.expanduser()
    try:
        return _Part(field, file, _read_table(task, file))
    except Exception as error:  # Each parser has its own ways to refuse a file.
        problem = f"cannot read {file} ({type(error).__name__}: {error})"
        raise errors.reject(*field, problem) from error


def _read_table(task: Task, file: pathlib.Path) -> "pyarrow.Table":
    import pyarrow
    from pyarrow import csv, parquet

    if file.suffix == ".parquet":
        return parquet.read_table(file, partitioning=None)  # a=b/ adds no column
    if file.suffix in (".csv", ".tsv"):
        parse = csv.ParseOptions(newlines_in_values=True)
        if file.suffix == ".tsv":
            parse = csv.ParseOptions(delimiter="\t", quote_char=False)
        # An empty cell is missing; the word NA, or a number, is text.
        texts = [*task.columns]
        if task.problem.names_classes:
            texts.append(task.label_column)
        convert = csv.ConvertOptions(
            column_types=dict.fromkeys(texts, pyarrow.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        return csv.read_csv(file, parse_options=parse, convert_options=convert)
    # Not pyarrow's reader, which turns texts that look like dates into dates.
    text = file.read_text(encoding="utf-8-sig").strip()
    if not text.startswith("["):  # one object a line
        text = "[" + ",".join(filter(str.strip, text.split("\n"))) + "]"
    return pyarrow.Table.from_pylist(json.loads(text))


def _load_from_hub(task: Task, split: str) -> "pyarrow.Table":
    import datasets

    instead = "give a local folder with train.parquet and validation.parquet: "
    instead += "--config.data.path=path/to/folder (train.py), --data (eval.py)"
    field = "data.path", task.path
    path = task.path or task.hub
    hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)
    if not hub_name or pathlib.Path(path).exists():
        raise errors.reject(*field, f"is neither a folder nor a hub name; {instead}")
    datasets.disable_progress_bars()
    try:
        subset = task.name if path == task.hub == GLUE else None
        if task.hub and path != task.hub:  # somebody's copy, perhaps of this task alone
            names = datasets.get_dataset_config_names(path)
            subset = task.name if task.name in names else None
        found = datasets.load_dataset(path, subset, split=split)
        return found.with_format("arrow")[:]
    except Exception as error:  # no network, no such name, no such split, a bad cache
        problem = f"no such folder, and the hub's {path} gave no {split} rows of "
        problem += f"{task.name} ({type(error).__name__}: {error}); {instead}"
        raise errors.reject(*field, problem) from error


def _checked(task: Task, part: _Part) -> _Part:
    """The part, unless a column is missing or a text is none: a UserError."""
    if problem := next(_problems(task, part.table), None):
        raise errors.reject(*part.field, f"{part.source}{problem}")
    return part


def _problems(task: Task, table: "pyarrow.Table") -> Iterator[str]:
    if not len(table):
        yield " has no rows; at least 1 is needed"
    for column in (*task.columns, task.label_column):
        if column not in table.column_names:
            there = ", ".join(table.column_names)
            yield f" needs a column {column!r}; it has {there}"
        if table.column_names.count(column) > 1:
            yield f" has several columns {column!r}; must be one"
    for column in task.columns:
        texts = table.column(column)
        if texts.null_count:
            row = np.argmax(texts.is_null())
            yield f", row {row} (the first is 0) has no text in {column!r}"
        if str(texts.type) not in ("string", "large_string"):
            yield f": {column!r} is {texts.type}, must be text"


def _with_labels(task: Task, parts: list[_Part]) -> Task:
    """The task with the classes that stand in the training rows."""
    column = task.label_column
    cells = [cell for p in parts for cell in p.table.column(column).to_pylist()]
    names = task.problem.class_names(cells, column)
    if "f1" in task.metrics and len(names) != 2:
        legal = f"f1 is for two classes, {column!r} has {len(names)}"
        raise errors.reject("data.metrics", task.metrics, legal)
    return dataclasses.replace(task, labels=names)


def _join(task: Task, parts: list[_Part], numbered: bool) -> Columns:
    """The columns of all parts of a split, labels encoded."""
    columns: Columns = {
        name: [text for part in parts for text in part.table.column(name).to_pylist()]
        for name in task.columns
    }
    labels = []
    for part in parts:
        cells = part.table.column(task.label_column).to_pylist()
        try:
            labels.append(task.problem.encode(cells, task.labels, numbered=numbered))
        except WrongLabel as error:
            row = f"{part.source}, row {error.row} (the first is 0)"
            cell = f"{task.label_column}={cells[error.row]!r}"
            problem = f"{row} has {cell}; {error}"
            raise errors.reject(*part.field, problem) from error
    return columns | {task.label_column: np.concatenate(labels)}
