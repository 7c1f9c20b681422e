"""What vectors of texts are scored by: pairs with similarities, and retrieval sets.

A file of pairs has the columns `sentence1`, `sentence2` and `label`, a number that
rises with similarity. A retrieval set is a folder in the layout of BEIR:

    corpus.*             `_id`, `text` and perhaps `title`, which goes before it
    queries.*            `_id`, `text`
    qrels.*              `query-id`, `corpus-id`, `score`; those above 0 are relevant

A query that is in the corpus, too, has the same `_id` there. It is left out of what is
found for it, unless it is judged relevant. The last file may be called `qrels_test.*`,
or be `qrels/test.tsv`. Each may be in any of `formats.FORMATS`.
"""

import collections
import pathlib
from typing import Any

import numpy as np

from cofi_jax import errors
from cofi_jax.data import formats
from cofi_jax.data.problems.vectors import Pairs, Retrieval

_PAIR = ("sentence1", "sentence2", "label")
_QRELS = ("qrels_test", "qrels/test", "qrels")


def pairs(path: str, *, quoting: bool = True) -> Pairs:
    """Reads pairs of texts with similarities.

    Args:
      path: a file, or a folder whose file is called `validation.*`.
      quoting: of the cells of csv and tsv, as in `config.Data`.

    Raises:
      UserError: where there is no such file, or it holds something else.
    """
    field = "data.pairs", path
    top = pathlib.Path(path).expanduser()
    file = top if top.is_file() else _find(field, top, "validation")
    cells = _read(field, file, _PAIR, quoting, number="label")
    texts = [
        text for pair in zip(*map(cells.get, _PAIR[:2]), strict=True) for text in pair
    ]
    similarities = np.array(cells["label"], np.float32)
    return Pairs(texts, np.arange(len(texts), dtype=np.int32), similarities)


def retrieval(path: str, *, quoting: bool = True) -> Retrieval:
    """Reads a retrieval set; queries without a relevant document are left out.

    A document with the id of a query is taken for the query itself, as BEIR does.

    Args:
      path: the folder.
      quoting: as in `pairs`.

    Raises:
      UserError: where a file is missing or holds something else, where an id comes
        twice or is not there, and where no query is left.
    """
    field, top = ("data.retrieval", path), pathlib.Path(path).expanduser()
    corpus = _texts(field, _find(field, top, "corpus"), quoting)
    queries = _texts(field, _find(field, top, "queries"), quoting)
    file, names = _find(field, top, *_QRELS), ("query-id", "corpus-id", "score")
    cells = _read(field, file, names, quoting, number="score")
    numbers = {name: number for number, name in enumerate(corpus)}
    found: dict[str, dict[int, float]] = collections.defaultdict(dict)
    judged = zip(*(cells[name] for name in cells), strict=True)
    for row, (query, document, score) in enumerate(judged):
        for name, known, what in (
            (query, queries, "query"),
            (document, corpus, "text"),
        ):
            if str(name) not in known:
                legal = f"row {row} (the first is 0) names {str(name)!r}, which is no "
                raise errors.reject(*field, f"{file}, {legal}{what} of the set")
        if score > 0:
            found[str(query)][numbers[str(document)]] = float(score)
    if not found:
        raise errors.reject(*field, f"{file} has no score above 0")
    asked = dict.fromkeys(map(str, cells["query-id"]))
    if lost := len(asked) - len(found):
        errors.warn(f"{file}: {lost} queries have no relevant text; they are left out")
    own = [numbers.get(name, -1) for name in found]
    texts = [*(queries[name] for name in found), *corpus.values()]
    rows = np.arange(len(texts), dtype=np.int32)
    return Retrieval(texts, rows, [*found.values()], own)


def _find(field, top, *names):
    """The one file of one of the names, in the order of these."""
    for name in names:
        found = [top / f"{name}.{suffix}" for suffix in formats.FORMATS]
        if there := [file for file in found if file.is_file()]:
            return there[0]
    legal = (
        f"must be a folder with {' or '.join(f'{name}.*' for name in names)}, in one "
    )
    raise errors.reject(*field, f"{legal}of {', '.join(formats.FORMATS)}")


def _texts(field, file, quoting) -> dict[str, str]:
    """The texts of a corpus or of queries by their ids."""
    cells, found = _read(field, file, ("_id", "text"), quoting, maybe=("title",)), {}
    titles = cells.get("title") or [""] * len(cells["text"])
    for name, title, text in zip(cells["_id"], titles, cells["text"], strict=True):
        if str(name) in found:
            raise errors.reject(*field, f"{file} has the _id {str(name)!r} twice")
        found[str(name)] = f"{title or ''} {text}".strip()
    return found


def _read(field, file, wanted, quoting, number="", maybe=()) -> dict[str, list[Any]]:
    """Columns of a file, of which one may be a number and the others are texts."""
    with formats.readable(field, file):
        table = formats.read(file, (*wanted, *maybe), quoting=quoting)
    for name in (*wanted, *maybe):
        if table.names.count(name) > 1:
            raise errors.reject(*field, f"{file} has several columns {name!r}")
    for name in wanted:
        if name not in table.cells:
            legal = f"{file} needs a column {name!r}; it has {', '.join(table.names)}"
            raise errors.reject(*field, legal)
    if not table.rows:
        raise errors.reject(*field, f"{file} has no rows")
    for name, cells in table.cells.items():
        for row, cell in enumerate(cells):
            where = f"{file}, row {row} (the first is 0) has {name}={str(cell)[:200]!r}"
            if name == number:
                if (value := _number(cell)) is None:
                    raise errors.reject(*field, f"{where}, must be a finite number")
                cells[row] = value
            elif name.endswith("id"):
                if not isinstance(cell, str | int) or not formats.is_whole(str(cell)):
                    raise errors.reject(*field, f"{where}, must be an id")
            elif not (isinstance(cell, str) and formats.is_whole(cell)):
                if cell is not None or name not in maybe:
                    raise errors.reject(*field, f"{where}, must be text")
    return table.cells


def _number(cell):
    if isinstance(cell, str) and "_" in cell:  # Python alone reads 1_2 as 12.
        return None
    try:
        value = float(cell)
    except (OverflowError, TypeError, ValueError):
        return None
    most = float(np.finfo(np.float32).max)
    return value if abs(value) <= most and not isinstance(cell, bool) else None
