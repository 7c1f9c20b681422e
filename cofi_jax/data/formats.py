"""Files of rows as people have them: parquet, csv, tsv, json, jsonl and conll.

    read(file, columns) -> the names of all columns, and the cells of those asked for

Columns that nobody asked for are neither read nor checked, but for one thing: a file of
text must be UTF-8 throughout. csv and tsv have one rule. A cell that begins with a
quote ends with one, and may hold delimiters, line breaks, and quotes that are doubled;
an empty cell without quotes is missing. Where quoting is off, quotes are characters
like all others.
"""

import codecs
import contextlib
import decimal
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cofi_jax import files
from cofi_jax.errors import reject, warn

if TYPE_CHECKING:  # slow to import: a wrong flag should fail before that
    import pyarrow

FORMATS = ("parquet", "csv", "tsv", "json", "jsonl", "conll")
DELIMITED = {".csv": ",", ".tsv": "\t"}


class Table(NamedTuple):
    """Some columns of a file, as lists of Python values; None is a missing one."""

    names: list[str]  # of all columns of the file
    cells: dict[str, list]  # of the columns that were asked for, where there are such
    rows: int


class Unreadable(ValueError):
    """A file that cannot be read; the message says why and where."""


def read(file: pathlib.Path, columns: Sequence[str], *, quoting: bool = True) -> Table:
    """Reads some columns of a file in the format that its name says.

    Raises:
      Exception: each library has its own for a file that it cannot read.
    """
    parquet = file.suffix == ".parquet"
    if said := files.disguise(file, own=b"par1" if parquet else b""):
        raise Unreadable(said)
    if parquet:
        return _read_parquet(file, columns)
    if file.suffix in DELIMITED:
        return _read_delimited(file, columns, DELIMITED[file.suffix], quoting)
    parse = _sentences if file.suffix == ".conll" else _objects
    rows = _of_text(file, parse, header=0)
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = {c: [row.get(c) for row in rows] for c in columns if c in names}
    return Table(names, cells, len(rows))


def lines(file: pathlib.Path) -> list[str]:
    """Reads the lines of a file of plain text.

    Raises:
      Unreadable: where it is not UTF-8, or a file of another kind.
    """
    if said := files.disguise(file):
        raise Unreadable(said)
    return _of_text(file, _lines, header=0)


def _lines(text: str) -> list[str]:
    found = re.split(r"\r\n|\r|\n", text)
    return found if found[-1] else found[:-1]


@contextlib.contextmanager
def readable(field: tuple[str, str], file: pathlib.Path) -> Iterator[None]:
    """A block that reads a file; whatever it raises becomes a UserError.

    Args:
      field: the config field that named the file, and its value.
      file: the file.
    """
    try:
        yield
    except Unreadable as error:
        raise reject(*field, f"cannot read {file}: {error}") from error
    except Exception as error:  # Each parser has its own ways to refuse a file.
        problem = f"cannot read {file} ({type(error).__name__}: {error})"
        raise reject(*field, problem) from error


def from_arrow(table: "pyarrow.Table", columns: Sequence[str]) -> Table:
    """The columns of a table of pyarrow, of whichever of its types of text."""
    names = table.column_names
    cells = {c: _values(table.column(c), c) for c in columns if names.count(c) == 1}
    return Table(names, cells, len(table))


def _values(column, name):
    """The cells of a column as Python's values.

    Some programs store text as bytes, and numbers as decimals of a fixed scale.
    """

    def text(value):
        if isinstance(value, decimal.Decimal):  # Integers may be too long for a float.
            return int(value) if value == int(value) else float(value)
        return value.decode() if isinstance(value, bytes) else value

    try:
        return [*map(text, column.to_pylist())]
    except UnicodeDecodeError:
        for row, cell in enumerate(column):
            try:
                text(cell.as_py())
            except UnicodeDecodeError as error:
                where = f"row {row} (the first is 0) in {name!r}"
                raise Unreadable(_not_utf8(error, where)) from error
        raise


def _read_parquet(file, columns):
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
        names = opened.schema_arrow.names
    except UnicodeDecodeError as error:
        raise Unreadable(_not_utf8(error, "the name of a column")) from error
    with opened:
        wanted = [name for name in columns if names.count(name) == 1]
        cells = from_arrow(opened.read(columns=wanted), wanted).cells
        return Table(names, cells, opened.metadata.num_rows)


# Files of text


def _of_text(file: pathlib.Path, parse: Callable[[str], list], header: int) -> list:
    """The rows that `parse` makes of a file, all of which must be UTF-8.

    Args:
      file: the file.
      parse: from its text to its rows.
      header: 1 where the first of these is the header, else 0.
    """
    data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    zeros = len(data) - len(data.rstrip(b"\0"))
    if zeros > 3:  # as many as end a letter of UTF-32
        raise Unreadable(f"ends in {zeros} zero bytes; it was not written whole")
    try:
        text = data.decode()
        if _looks_like_utf16(data):  # Then each letter is followed by a zero byte.
            place = data.index(0)
            raise UnicodeDecodeError("utf-8", data, place, place + 1, "a zero byte")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        where = f"line {line}{_row_of_bad_byte(data, parse, header)}"
        raise Unreadable(_not_utf8(error, where)) from error
    return parse(text)


def _row_of_bad_byte(data, parse, header):
    """Says which row the first byte is in that is not UTF-8, where that is known."""
    try:
        rows = parse(data.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return ""
    for number, row in enumerate(rows):
        if re.search(r"\\udc[89a-f]", repr(row)):
            row = number - header
            return " (the header)" if row < 0 else f" (row {row}, the first is 0)"
    return ""


def _not_utf8(error: UnicodeDecodeError, where: str) -> str:
    """Names the byte and its place, and the encoding that it is likely to be of."""
    data, start = error.object, error.start
    near = data[start : start + 4096]
    high = [place for place, byte in enumerate(near[:-1]) if byte > 127]
    together = [place for place in high if near[place + 1] > 127]
    likely = "Windows-1252 or Latin-1"
    if _looks_like_utf16(data):
        likely = "UTF-16"
    elif error.reason == "unexpected end of data" and not data[:start].isascii():
        likely = "UTF-8 that was cut off"
    elif len(together) > max(4, len(high) / 3):  # Accents stand alone.
        likely = "an encoding of another script than the Latin one"
    return f"must be UTF-8; byte 0x{data[start]:02x} in {where}, looks like {likely}"


def _looks_like_utf16(data):
    marks = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
    start = data[:4096]
    return data.startswith(marks) or start.count(0) > len(start) / 5


def _read_delimited(file, columns, delimiter, quoting):
    header, *rows = _of_text(
        file, lambda text: _delimited(text, delimiter, quoting), header=1
    )
    header = [name or "" for name in header]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            legal = f"row {number} (the first is 0) has {len(row)} cells, the header "
            raise Unreadable(f"{legal}{len(header)}")
    swallowed = [row for row, cells in enumerate(rows) if _swallows(cells, delimiter)]
    if swallowed and delimiter == "\t":  # A comma beside a line break is usual.
        warn(
            f"{file}: quoted cells of {len(swallowed)} rows hold both tabs and line "
            f"breaks, as in row {swallowed[0]} (the first is 0); where quotes belong "
            "to the texts, set --config.data.quoting=false"
        )
    places = {c: header.index(c) for c in columns if header.count(c) == 1}
    cells = {name: [row[place] for row in rows] for name, place in places.items()}
    return Table(header, cells, len(rows))


def _swallows(row, delimiter):
    """Whether a cell holds what ends cells and what ends rows."""
    return any(cell and delimiter in cell and "\n" in cell for cell in row)


def _delimited(text: str, delimiter: str, quoting: bool) -> list[list[str | None]]:
    """The cells of the header and of each row; lines without any cell are left out."""
    plain = rf"[^{delimiter}\r\n]*+"
    if quoting:
        plain = rf'"(?P<quoted>[^"]*+(?:""[^"]*+)*+)"|(?!"){plain}'
    cell = re.compile(rf"({plain})(?P<end>{delimiter}|\r\n|\r|\n|\Z)")
    rows, row, place = [], [], 0
    while place < len(text) or row:
        match = cell.match(text, place)
        if not match:
            raise Unreadable(_bad_quotes(text, place, len(rows) - 1))
        quoted = match["quoted"] if quoting else None
        row.append(match[1] or None if quoted is None else quoted.replace('""', '"'))
        place = match.end()
        if match["end"] != delimiter:
            rows += [row] if row != [None] else []
            row = []
    if not rows:
        raise Unreadable("is empty; must begin with the names of the columns")
    return rows


def _bad_quotes(text, place, row):
    where = f"row {row} (the first is 0)" if row >= 0 else "the header"
    start = text[place : place + 20].splitlines()[0]
    return (
        f"{where} has a cell that begins with a quote, {start!r}, and does not end "
        "with one (a quote within it must be doubled); with "
        "--config.data.quoting=false quotes are characters like any other"
    )


def _sentences(text: str) -> list[dict]:
    """The rows of CoNLL's columns: a line for each word, a blank one between sentences.

    The first column holds the words and the last one the labels, which become the lists
    `tokens` and `ner_tags`. Between columns are tabs or else spaces.
    """
    rows, words, labels = [], [], []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        line = line.strip(" \t\r")
        columns = [*filter(None, line.split("\t" if "\t" in line else " "))]
        if columns and columns[0] != "-DOCSTART-":  # That is how documents begin.
            if len(columns) == 1:
                where = f"line {number} (row {len(rows)}, the first is 0)"
                legal = "must have a word and in the last column its label"
                raise Unreadable(f"{where} {legal}, has one column")
            words.append(columns[0])
            labels.append(columns[-1])
        elif words:
            rows.append({"tokens": words, "ner_tags": labels})
            words, labels = [], []
    return rows


_BLANKS = re.compile(r"[ \t\r\n]*")  # JSON's white space


def _objects(text: str) -> list[dict]:
    """The rows of JSON: a list of objects, or one object after another.

    An object whose `data` are a list of objects stands for these. The articles of the
    official files of SQuAD become their questions.
    """
    rows = list(_json_values(text))
    if len(rows) == 1 and _all_objects(rows[0].get("data")):
        rows = rows[0]["data"]
    if not any(map(_is_article, rows)):
        return rows
    found = []
    for number, row in enumerate(rows):
        try:
            found += _questions(row)
        except (AttributeError, KeyError, TypeError) as error:
            legal = "must have the articles of SQuAD, each with `paragraphs`, `qas`, "
            where = f"article {number} (the first is 0)"
            raise Unreadable(f"{legal}`answers`; {where}: {error!r}") from error
    return found


def _is_article(row):
    """Whether it has paragraphs with questions, and not just a column of that name."""
    paragraphs = row.get("paragraphs")
    return isinstance(paragraphs, list) and any(
        isinstance(each, dict) and "qas" in each for each in paragraphs
    )


def _all_objects(values):
    return isinstance(values, list) and all(isinstance(x, dict) for x in values)


def _json_values(text: str) -> Iterator[dict]:
    """The objects, one after another or in a list."""
    decoder = json.JSONDecoder(object_pairs_hook=files.unique)
    place = _BLANKS.match(text).end()
    listed = text[place : place + 1] == "["
    place, number = place + listed, 0
    while (place := _BLANKS.match(text, place).end()) < len(text):
        if listed and text[place] == "]" and not text[place + 1 :].strip():
            return
        where = f"row {number} (the first is 0)"
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError as error:  # also of numbers that are too long for Python
            legal = f"{where} is no JSON that can be read: {error}"
            raise Unreadable(legal) from error
        except RecursionError as error:
            raise Unreadable(f"{where} is nested too deeply") from error
        if not isinstance(value, dict):
            legal = "must be an object with the names and cells of the columns"
            raise Unreadable(f"{where} {legal}")
        yield value
        number += 1
        if listed:
            place = _BLANKS.match(text, place).end()
            if text[place : place + 1] not in (",", "]"):
                raise Unreadable(f"{where} is not followed by a comma or the list's ]")
            place += text[place] == ","
    if listed:
        raise Unreadable(f"is cut off after {number} rows")


def _questions(article: dict) -> Iterator[dict[str, Any]]:
    """The rows of an article of the official SQuAD, as the hub has them."""
    for paragraph in article["paragraphs"]:
        for asked in paragraph["qas"]:
            answers = asked.get("answers", ())
            yield {
                "id": asked.get("id"),
                "question": asked["question"],
                "context": paragraph["context"],
                "answers": {
                    "text": [answer["text"] for answer in answers],
                    "answer_start": [answer["answer_start"] for answer in answers],
                },
            }


def is_whole(text: str) -> bool:
    """Whether a text can be encoded: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
