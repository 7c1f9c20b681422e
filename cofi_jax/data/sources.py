"""Rows of a task, read from the hub or from files; every row is checked."""

import collections
import dataclasses
import decimal
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cofi_jax import errors
from cofi_jax.data import embedding_sets, formats, toy
from cofi_jax.data.formats import FORMATS, Table
from cofi_jax.data.problems.base import WrongLabel
from cofi_jax.data.tasks import GLUE, Task

Columns = dict[str, Any]  # a list of texts by column, and the labels as an array

# Of texts without labels, one of so many is held out, and so many at most.
_HELD_OUT, _MOST_HELD_OUT = 10, 1000
_LEAST_HELD_OUT = 3  # of two, each has the other as its nearest by any vectors

_OF_TEXTS = *FORMATS, "txt"  # the formats of texts that need no labels


def load(task: Task, splits: Sequence[str]) -> tuple[Task, dict[str, Columns]]:
    """Reads splits of the task, and checks every row.

    The demo task is generated. Where `task.path` is a folder, it is searched for
    `{split}` in one of the `FORMATS`, or in several files that are named as on the hub,
    `{split}-00000-of-00002.parquet`. They stand in the folder itself, or below it in
    `data`, in a folder of the task's name or in the only folder there is. Any other
    path is a name on the hub. The rows of `task.extra_file` follow those of `train`.

    For vectors, rows are the `texts` of the folder or the file. Some are held out for
    validation, unless there are files of that name, or pairs with similarities.

    What may be wrong with texts and classes is said on stderr: quotes around them, and
    classes that hardly differ or look like missing ones.

    Returns:
      The task, with the names of its classes, which are read off the training rows
      where they were not given; and by split the texts and the encoded labels. Where
      `task.label_column` is empty, others stand in for these.

    Raises:
      UserError: a source is missing or cannot be read, or its rows are not the task's.
    """
    if task.problem.pools:
        return task, _texts_alone(task, splits)
    parts = {
        split: [_checked(task, part) for part in _read_split(task, split)]
        for split in splits
    }
    if task.extra_file and "train" in splits:
        field = "data.extra_file", task.extra_file
        part = _read_file(field, task, pathlib.Path(task.extra_file))
        parts["train"].append(_checked(task, part))
    # The order of names that were read off the rows is nobody's choice.
    numbered = bool(task.labels)
    if task.problem.names_classes and not task.labels:
        task = _with_labels(task, parts["train"])
        _warn_of_classes(task, parts["train"])
    for part in parts.values():
        _warn_of_quotes(task, part)
    columns = {split: _join(task, p, numbered) for split, p in parts.items()}
    task.problem.check_splits(columns, task)
    return task, columns


class _Part(NamedTuple):
    """Some rows of a split."""

    field: tuple[str, str]  # the config field that named the source, and its value
    source: Any  # the file or the split
    table: Table


def _read_split(task: Task, split: str) -> list[_Part]:
    field = "data.path", task.path
    if task.name == "demo":
        rows = toy.demo_rows(split)
        return [_Part(field, split, Table([*rows], rows, len(rows[task.label_column])))]
    if pathlib.Path(task.path or "?").expanduser().is_dir():
        return [_read_file(field, task, file) for file in _find_files(task, split)]
    return [_Part(field, split, _load_from_hub(task, split))]


def _wanted(task):
    return *task.columns, *task.label_columns, *_groups(task)


def _groups(task):
    return [task.group_column] if task.group_column else []


def _find_files(
    task: Task, split: str, suffixes: Sequence[str] = FORMATS
) -> list[pathlib.Path]:
    """The file of a split, or all of those that it is spread over."""
    top = pathlib.Path(task.path).expanduser()
    found, files = _of_split(task, split, suffixes)
    numbers = [int(match["number"] or 0) for match in found.values()]
    kinds = {(f.parent, f.suffix, int(m["count"] or 1)) for f, m in found.items()}
    if len(kinds) == 1 and numbers == [*range(max(kinds)[2])]:
        return [*found]
    here = ", ".join(str(file.relative_to(top)) for file in ([*found] or files)[:20])
    names = [f"{split}.{suffix}" for suffix in suffixes]
    legal = f"must hold one of {names}, or all parts of {split}-00000-of-0000N, itself "
    legal += f"or in its folder {task.name} or data"
    legal += f"; {len(found)} found, among: {here or 'no files'}"
    raise errors.reject("data.path", task.path, legal)


def _of_split(task, split, suffixes):
    """The files of a split, each with the match of its name; and those looked at."""
    top = pathlib.Path(task.path).expanduser()
    name = re.compile(
        rf"{re.escape(split)}(-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?)?"
        rf"\.({'|'.join(suffixes)})"
    )

    def matched(files):
        return {file: match for file in files if (match := name.fullmatch(file.name))}

    below = [file for file in top.iterdir() if file.is_dir() and file.name[0] != "."]
    named = [folder for folder in below if folder.name in (task.name, "data")]
    files = [file for folder in (top, *named) for file in sorted(folder.iterdir())]
    found = matched(files)
    if not found and not named and len(below) == 1:
        found = matched(sorted(below[0].iterdir()))
    return found, files


def _read_file(field: tuple[str, str], task: Task, file: pathlib.Path) -> _Part:
    if file.suffix.removeprefix(".") not in FORMATS:
        raise errors.reject(*field, f"must be a file of one of the formats {FORMATS}")
    file = file.expanduser()
    with formats.readable(field, file):
        table = formats.read(file, _wanted(task), quoting=task.quoting)
    if file.suffix in formats.DELIMITED:  # Only there is everything a text.
        for column in {*task.label_columns} & {*table.cells}:
            table.cells[column] = [
                cell if cell is None else task.problem.spelled(cell)
                for cell in table.cells[column]
            ]
    return _Part(field, file, table)


def texts(path: str, task: Task, *, field: str) -> list[str]:
    """Reads texts that need no labels, as they are met where a model is used.

    Args:
      path: a file, or a folder whose files are all read, those below it included. The
        files with other endings than those of `FORMATS` and `.txt` are passed over.
        Of rows, the task's columns are read that the file has; each line of a `.txt` is
        a text.
      task: the task.
      field: what messages call the path.

    Returns:
      The texts in their order, each once and without those that are blank or missing.

    Raises:
      UserError: where there is no such file, one of them cannot be read or has none of
        the columns, a cell is no text, or no text is left.
    """
    named, top = (field, path), pathlib.Path(path).expanduser()
    suffixes = {f".{suffix}" for suffix in _OF_TEXTS}
    legal = f"must be a file or a folder of texts in {', '.join(sorted(suffixes))}"
    files = [top] if top.is_file() else sorted(f for f in top.rglob("*") if f.is_file())
    if not (files := [file for file in files if file.suffix in suffixes]):
        raise errors.reject(*named, legal)
    found: dict[str, None] = {}  # in order
    for file in files:
        for text in _texts_of(named, task, file):
            if text.strip():
                found[text] = None
    if not found:
        raise errors.reject(*named, f"{legal}; all texts there are blank or missing")
    return [*found]


def _texts_alone(task: Task, splits: Sequence[str]) -> dict[str, Columns]:
    """The columns of splits of a task of vectors, see `load`.

    `uncut` holds what joins the texts of pairs, or those of a retrieval set.
    """
    found: dict[str, Columns] = {}
    for split in splits:
        if split == "retrieval":
            uncut = embedding_sets.retrieval(task.retrieval, quoting=task.quoting)
        elif split == "validation" and task.pairs:
            uncut = embedding_sets.pairs(task.pairs, quoting=task.quoting)
        else:
            uncut = None
        rows = uncut.contexts if uncut else _texts_of_split(task, split)
        labels = task.problem.unlabelled(len(rows))
        columns = {task.columns[0]: rows, task.label_column: labels}
        found[split] = columns | ({"uncut": uncut} if uncut else {})
    return found


def _texts_of_split(task: Task, split: str) -> list[str]:
    """The texts to learn from, or those that are held out for validation."""
    field, top = ("data.path", task.path), pathlib.Path(task.path).expanduser()
    if not task.path:  # It would be the folder of the process.
        raise errors.reject(*field, "must be a file or a folder of texts")
    named = [
        x
        for x in ("train", "validation")
        if top.is_dir() and _of_split(task, x, _OF_TEXTS)[0]
    ]
    if named:  # A missing train.* is an error, a missing validation.* is not.
        wanted = split if split in named else "train"
        files = _find_files(task, wanted, _OF_TEXTS)
        found = dict.fromkeys(text for f in files for text in _texts_of(field, task, f))
        rows = [text for text in found if text.strip()]
        least = {"train": 1, "validation": _LEAST_HELD_OUT}[wanted]
        if len(rows) < least:
            legal = f"must hold {least} or more texts that are not blank"
            raise errors.reject(*field, f"{files[0].name} {legal}")
    else:
        rows = texts(task.path, task, field=field[0])
    if "validation" in named:
        return rows[:_MOST_HELD_OUT] if split == "validation" else rows
    if split == "train" and task.pairs:
        return rows
    held_out = rows[::_HELD_OUT][:_MOST_HELD_OUT]
    if len(held_out) < _LEAST_HELD_OUT:
        least = _HELD_OUT * (_LEAST_HELD_OUT - 1) + 1
        legal = f"must hold {least} texts or more, of which some are held out"
        raise errors.reject(*field, legal)
    if split == "validation":
        return held_out
    held_out = set(held_out)
    return [text for text in rows if text not in held_out]


def _texts_of(field, task, file):
    """Yields the texts of one file, blank ones included."""
    with formats.readable(field, file):
        if file.suffix == ".txt":
            table = Table(["text"], {"text": formats.lines(file)}, 0)
        else:
            table = formats.read(file, task.columns, quoting=task.quoting)
    if not table.cells:
        there, wanted = ", ".join(table.names), " or ".join(task.columns)
        problem = f"{file} needs a column {wanted}; it has {there}"
        raise errors.reject(*field, problem)
    for column, cells in table.cells.items():
        for row, cell in enumerate(cells):
            if cell is None:
                continue
            found = (cell,) if isinstance(cell, str) else task.problem.texts(cell)
            if found is None or not all(map(formats.is_whole, found)):
                where = f"{file}, row {row} (the first is 0)"
                problem = f"{where} has {column}={_short(cell)}, must be text"
                raise errors.reject(*field, problem)
            yield " ".join(found)


def _load_from_hub(task: Task, split: str) -> Table:
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
        return formats.from_arrow(found.with_format("arrow")[:], _wanted(task))
    except Exception as error:  # no network, no such name, no such split, a bad cache
        problem = f"no such folder, and the hub's {path} gave no {split} rows of "
        problem += f"{task.name} ({type(error).__name__}: {error}); {instead}"
        raise errors.reject(*field, problem) from error


def _checked(task: Task, part: _Part) -> _Part:
    """The part, unless a column is missing or a text is none: a UserError.

    Where several columns hold the labels, it gets one of their values by column.
    """
    if problem := next(_problems(task, part.table), None):
        raise errors.reject(*part.field, f"{part.source}{problem}")
    names, cells = task.label_columns, part.table.cells
    if len(names) > 1:
        rows = zip(*map(cells.__getitem__, names), strict=True)
        cells[task.label_column] = [dict(zip(names, r, strict=True)) for r in rows]
    return part


def _problems(task: Task, table: Table) -> Iterator[str]:
    if not table.rows:
        yield " has no rows; at least 1 is needed"
    for column in _wanted(task):
        if column not in table.names:
            there = ", ".join(n if n == n.strip() else repr(n) for n in table.names)
            yield f" needs a column {column!r}; it has {there}"
        if table.names.count(column) > 1:
            yield f" has several columns {column!r}; must be one"
    for column in task.columns:
        for row, text in enumerate(table.cells[column]):
            if text is None:
                yield f", row {row} (the first is 0) has no text in {column!r}"
            elif task.problem.texts(text) is None:
                legal = f"{column}={_short(text)}, must be {task.problem.text_form}"
                yield f", row {row} (the first is 0) has {legal}"
    for column in _groups(task):
        if None in table.cells[column]:
            row = table.cells[column].index(None)
            yield f", row {row} (the first is 0) has no value in {column!r}"
    for column in _wanted(task):
        for row, cell in enumerate(table.cells[column]):
            texts = cell if isinstance(cell, list) else [cell]
            if not all(formats.is_whole(x) for x in texts if isinstance(x, str)):
                where = f", row {row} (the first is 0) has half of a surrogate pair"
                yield f"{where} in {column!r}, which is no text"


def _short(cell: Any) -> str:
    """How a cell is shown in a message."""
    shown = repr(cell)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _with_labels(task: Task, parts: list[_Part]) -> Task:
    """The task with the classes that stand in the training rows."""
    column = task.label_column
    cells = [cell for part in parts for cell in part.table.cells[column]]
    names = task.problem.class_names(cells, column)
    task.problem.check_metrics(task.metrics, names)
    return dataclasses.replace(task, labels=names)


# How a missing value is often spelled. A class may be called so, too.
_MISSING = {"", "na", "n/a", "<na>", "nan", "nat", "none", "null"}


def _warn_of_classes(task: Task, parts: list[_Part]) -> None:
    """Says which of the classes that were read off the rows look like mistakes."""
    names, column = task.labels, task.label_column
    first: dict[str, str] = {}
    for part in parts:
        for row, cell in enumerate(part.table.cells[column]):
            for name in task.problem.named(cell):
                where = f"{part.source}, row {row} (the first is 0)"
                first.setdefault(str(name), where)
    alike = collections.defaultdict(list)
    words = []
    for name in names:
        alike[plain := _plain(name)].append(name)
        words += [name] * isinstance(plain, str)
        for doubtful, like in (
            (name.strip().casefold() in _MISSING, "a missing one"),
            # The hub's data sets have it for rows without a class, numbered from 0.
            (name == "-1" and "0" in names, "a missing one"),
            (_in_quotes(name), "a word with quotes that do not belong to it"),
        ):
            if doubtful:
                where = first.get(name, column)
                errors.warn(f"{where}: the class {_short(name)} looks like {like}")
    if 0 < len(words) < len(names):
        where = first.get(words[0], column)
        legal = f"the class {_short(words[0])} is no number, as others are"
        errors.warn(f"{where}: {legal}")
    for group in alike.values():
        if len(group) > 1:
            where = [first[cell] for cell in first if cell in group][-1:]
            legal = "are different classes, but differ in spaces, case, letters that "
            legal += "nobody sees or the spelling of a number alone"
            errors.warn(f"{''.join(where) or column}: {_short(group)} {legal}")


def _plain(name: str) -> str | decimal.Decimal:
    """The number or text that a class spells; equal for those that hardly differ."""
    seen = "".join(
        letter if letter.isprintable() else " " * letter.isspace()
        for letter in unicodedata.normalize("NFKC", name)
    )
    text = " ".join(seen.split()).casefold()
    try:
        number = decimal.Decimal(text)  # A float would round, and overflow.
    except decimal.InvalidOperation:
        return text
    # Python alone reads 1_2 as 12.
    return number if number.is_finite() and "_" not in text else text


def _in_quotes(text: Any) -> bool:
    if not isinstance(text, str):  # Quotes are words of their own in a list of words.
        return False
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"


def _warn_of_quotes(task: Task, parts: Iterable[_Part]) -> None:
    """Says how many texts begin and end with a quote, which may not belong to them."""
    for part in parts:
        for column in task.columns:
            texts = part.table.cells[column]
            if quoted := [row for row, text in enumerate(texts) if _in_quotes(text)]:
                errors.warn(
                    f"{part.source}: {len(quoted)} of {len(texts)} texts in {column!r} "
                    f"begin and end with a quote, as in row {quoted[0]} (the first is "
                    "0); the quotes are taken as parts of them"
                )


def _join(task: Task, parts: list[_Part], numbered: bool) -> Columns:
    """The columns of all parts of a split, labels encoded."""
    columns: Columns = {
        name: [text for part in parts for text in part.table.cells[name]]
        for name in (*task.columns, *_groups(task))
    }
    labels = []
    for part in parts:
        if not task.label_column:
            labels.append(task.problem.unlabelled(part.table.rows))
            continue
        cells = part.table.cells[task.label_column]
        try:
            texts = part.table.cells[task.columns[0]]
            task.problem.check_labels(texts, cells)
            labels.append(task.problem.encode(cells, task.labels, numbered=numbered))
        except WrongLabel as error:
            row = f"{part.source}, row {error.row} (the first is 0)"
            cell = f"{task.label_column}={_short(cells[error.row])}"
            problem = f"{row} has {cell}; {error}"
            raise errors.reject(*part.field, problem) from error
    if len({part.shape[1:] for part in labels}) > 1:
        legal = f"{parts[-1].source} has other labels than {parts[0].source}: numbers "
        legal += "for each class, and classes"
        raise errors.reject(*parts[-1].field, legal)
    return columns | {task.label_column: np.concatenate(labels)}
