"""Rows of a task: from the hub, or from files of anyone's own; every row is checked."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cofi_jax import config, errors
from cofi_jax.data import tasks, toy

if TYPE_CHECKING:  # slow to import: a wrong flag should fail before that
    import pyarrow


FORMATS = ("parquet", "csv", "tsv", "json", "jsonl")


_WHOLE = r"-?\d+"


_MOST_CLASSES = 1000  # more are numbers to be predicted, or a mistake


Columns = dict[str, Any]  # a list of texts by column; labels as an array


def load(
    data: config.Data, splits: Sequence[str]
) -> tuple[tasks.Task, dict[str, Columns]]:
    """Reads the splits of the task that `data` names, and checks every row.

    The demo task is generated. A folder is searched, and its subfolder of the task's
    name, for `{split}.parquet`, `.csv`, `.tsv` (not quoted, as GLUE's own), `.json` (a
    list, or one object a line) or `.jsonl`. Any other path is a name on the hub. The
    rows of `data.extra_file` follow those of the split `train`.

    Returns:
      The task, with the names of its classes, which are read off the training rows
      where they were not given; and by split the text columns, and the labels: int32
      classes or float32 values, (N,). Spans keep their answers as they are.

    Raises:
      UserError: for all that can be wrong with these.
    """
    task = tasks.find(data)
    parts = {}
    for split in splits:
        parts[split] = [_checked(task, _read_split(data, task, split))]
    if data.extra_file and "train" in splits:
        file = pathlib.Path(data.extra_file).expanduser()
        field = "data.extra_file", data.extra_file
        part = _Part(field, file, _read_file(field, task, file))
        parts["train"].append(_checked(task, part))
    if task.problem == "classification" and not task.labels:
        task = _with_labels(task, parts["train"])
    # Names that were read off the rows are names; their order is nobody's choice.
    numbered = bool(task.hub or data.labels)
    return task, {split: _join(task, p, numbered) for split, p in parts.items()}


class _Part(NamedTuple):
    """Some rows of a split."""

    field: tuple[str, str]  # of the config, and its value
    source: Any  # file or split
    table: "pyarrow.Table"


def _read_split(data, task, split) -> _Part:
    import pyarrow

    field = "data.path", data.path
    if data.task == "demo":
        return _Part(field, split, pyarrow.table(toy.demo_rows(split)))
    if pathlib.Path(data.path or "?").expanduser().is_dir():
        file = _find_file(data, split)
        return _Part(field, file, _read_file(field, task, file))
    return _Part(field, split, _load_from_hub(data, task, split))


def _find_file(data, split) -> pathlib.Path:
    top = pathlib.Path(data.path).expanduser()
    folders = [folder for folder in (top, top / data.task) if folder.is_dir()]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    names = [f"{split}.{suffix}" for suffix in FORMATS]
    found = [file for file in files if file.name in names]
    if len(found) == 1:
        return found[0]
    here = ", ".join(str(file.relative_to(top)) for file in (found or files)[:20])
    legal = f"must hold one of {names}, itself or in its folder {data.task}"
    legal += f"; {len(found)} found, among: {here or 'no files'}"
    raise errors.reject("data.path", data.path, legal)


def _read_file(field, task, file) -> "pyarrow.Table":
    import pyarrow
    from pyarrow import csv, parquet

    if file.suffix.removeprefix(".") not in FORMATS:
        raise _bad(field, f"must be a file of one of the formats {FORMATS}")
    try:
        if file.suffix == ".parquet":
            return parquet.read_table(file, partitioning=None)  # a=b/ adds no column
        if file.suffix in (".csv", ".tsv"):
            parse = csv.ParseOptions(newlines_in_values=True)
            if file.suffix == ".tsv":
                parse = csv.ParseOptions(delimiter="\t", quote_char=False)
            # An empty cell is missing; the word NA, or a number, is text.
            texts = [*task.columns]
            if task.problem == "classification":
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
    except Exception as error:  # each parser has its own ways to refuse a file
        problem = f"cannot read {file} ({type(error).__name__}: {error})"
        raise _bad(field, problem) from error


def _load_from_hub(data, task, split) -> "pyarrow.Table":
    import datasets

    instead = "give a local folder with train.parquet and validation.parquet: "
    instead += "--config.data.path=path/to/folder (train.py), --data (eval.py)"
    field = "data.path", data.path
    path = data.path or task.hub
    hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)
    if not hub_name or pathlib.Path(path).exists():
        raise _bad(field, f"is neither a folder nor a hub name; {instead}")
    datasets.disable_progress_bars()
    subset = data.task if task.hub == tasks.GLUE else None
    try:
        found = datasets.load_dataset(path, subset, split=split)
        return found.with_format("arrow")[:]
    except Exception as error:  # no network, no such name, no such split, a bad cache
        problem = f"no such folder, and the hub's {path} gave no {split} rows of "
        problem += f"{data.task}"
        problem += f" ({type(error).__name__}: {error}); {instead}"
        raise _bad(field, problem) from error


def _checked(task, part) -> _Part:
    """The rows, once their columns are there and their texts are texts."""
    field, source, table = part
    if not len(table):
        raise _bad(field, f"{source} has no rows; at least 1 is needed")
    for column in (*task.columns, task.label_column):
        if column not in table.column_names:
            there = ", ".join(table.column_names)
            raise _bad(field, f"{source} needs a column {column!r}; it has {there}")
        if table.column_names.count(column) > 1:
            raise _bad(field, f"{source} has several columns {column!r}; must be one")
    for column in task.columns:
        texts = table.column(column)
        if texts.null_count:
            where = f"{source}, row {np.argmax(texts.is_null())} (the first is 0)"
            raise _bad(field, f"{where} has no text in {column!r}")
        if str(texts.type) not in ("string", "large_string"):
            raise _bad(field, f"{source}: {column!r} is {texts.type}, must be text")
    return part


def _join(task, parts, numbered) -> Columns:
    """The columns of all parts of a split, labels encoded."""
    columns = {
        name: [text for part in parts for text in part.table.column(name).to_pylist()]
        for name in task.columns
    }
    labels = [_encode(task, part, numbered) for part in parts]
    if task.problem == "span":
        return columns | {task.label_column: sum(labels, [])}
    return columns | {task.label_column: np.concatenate(labels)}


def _with_labels(task, parts) -> tasks.Task:
    """The task with the classes that stand in the training rows, in sorted order."""
    found = {
        _text(value): value
        for part in parts
        for value in part.table.column(task.label_column).to_pylist()
        if value is not None
    }
    whole = all(re.fullmatch(_WHOLE, name) for name in found)
    names = sorted(found, key=int if whole else None)
    fractions = not whole and all(map(_is_number, found))
    nested = any(isinstance(value, list | dict) for value in found.values())
    if fractions or nested or not 2 <= len(names) <= _MOST_CLASSES:
        some = ", ".join(names[:5])
        legal = f"has {len(names)} different values ({some}, ...); must be 2 to "
        legal += f"{_MOST_CLASSES} classes, or set data.problem=regression"
        raise errors.reject("data.label_column", task.label_column, legal)
    if "f1" in task.metrics and len(names) != 2:
        legal = f"f1 is for two classes, {task.label_column!r} has {len(names)}"
        raise errors.reject("data.metrics", task.metrics, legal)
    return dataclasses.replace(task, labels=tuple(names))


def _text(value) -> str:
    # Pandas makes floats of integers where a cell is empty.
    return re.sub(rf"^({_WHOLE})\.0$", r"\1", str(value))


def _is_number(text) -> bool:
    try:
        return bool(float(text) + 1)
    except ValueError:
        return False


def _encode(task, part, numbered):
    """Labels as the losses take them: class numbers, or values, or answers.

    With `numbered`, a class may be told by its number instead of its name.
    """
    values = part.table.column(task.label_column).to_pylist()
    encode = {
        "classification": functools.partial(_class_numbers, numbered=numbered),
        "regression": _values,
        "span": _answers,
    }[task.problem]
    labels, wrong, legal = encode(task, values)
    if wrong is None:
        return labels
    row = f"{part.source}, row {wrong} (the first is 0)"
    problem = f"{row} has {task.label_column}={values[wrong]!r}; {legal}"
    raise _bad(part.field, problem)


def _class_numbers(task, values, numbered):
    """Class numbers; the first wrong row, or None; what is legal."""
    numbers = {name: i for i, name in enumerate(task.labels)}
    texts = [value if value is None else _text(value) for value in values]
    legal = f"must be among {', '.join(task.labels)}"
    # Names that are numbers themselves leave no doubt.
    if numbered and not any(re.fullmatch(_WHOLE, name) for name in task.labels):
        if task.hub:
            legal = f"must be an integer among {dict(enumerate(task.labels))}, or one "
            legal += "of these names (hub test splits hold only -1)"
        if not any(text in numbers for text in texts):
            numbers = {str(i): i for i in range(len(task.labels))}
    wrong = next((i for i, text in enumerate(texts) if text not in numbers), None)
    return np.array([numbers.get(text, 0) for text in texts], np.int32), wrong, legal


def _values(task, values):
    """Float32 values; the first wrong row, or None; what is legal."""

    def number(value):
        real = isinstance(value, int | float) and not isinstance(value, bool)
        return real and abs(value) <= float(np.finfo(np.float32).max)  # not of nan

    wrong = next((i for i, value in enumerate(values) if not number(value)), None)
    labels = None if wrong is not None else np.array(values, np.float32)
    return labels, wrong, "must be a finite number"


def _answers(task, values):
    """The answers as they are; the first wrong row, or None; what is legal."""

    def answers(value):
        value = value if isinstance(value, dict) else {}
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list):
            return False
        right = all(isinstance(x, str) for x in texts)
        right &= all(type(x) is int for x in starts)
        return right and len(texts) == len(starts)

    wrong = next((i for i, value in enumerate(values) if not answers(value)), None)
    return values, wrong, "must hold lists `text` and `answer_start`, equally long"


def _bad(field: tuple[str, str], problem: str) -> errors.UserError:
    one_line = " ".join(problem.split())  # other people's errors may have several
    return errors.reject(*field, one_line)
