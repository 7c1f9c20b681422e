"""Files of rows: bytes that are no text, quotes, odd rows, and what is said of them."""

import bz2
import codecs
import decimal
import gzip
import json
import lzma
import re

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from cofi_jax import config, errors
from cofi_jax.data import formats, sources, tasks

FORMATS = ("csv", "tsv", "json", "jsonl", "parquet")


def load(folder, **fields):
    data = config.Data(**{"task": "own", "columns": ("text",)} | fields)
    data.path = str(folder)
    task, columns = sources.load(tasks.find(data), ["train"])
    return task, columns["train"]


def outcome(folder, capsys, **fields):
    """The task and its rows, or the message; and what was said on stderr."""
    try:
        found = load(folder, **fields)
    except errors.UserError as error:
        found = str(error)
        assert found.isprintable()
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") and line.isprintable() for line in said)
    return found, said


def write(folder, name, content):
    (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    return folder


def texts_of(folder, **fields):
    return load(folder, **fields)[1]["text"]


@pytest.mark.parametrize("gap", [" ", "\t", "  _ X "])
def test_columns_of_words(gap, tmp_path):
    """A word, what is between, and last its label; with tabs words may have spaces."""
    words = ["Ada", "New York" if gap == "\t" else "York"]
    lines = ["-DOCSTART- -X- O", "", f"{words[0]}{gap}B-PER ", "", " \t", "was O"]
    lines += [f"{words[1]}{gap}B-LOC", ""]
    write(tmp_path, "train.conll", "\ufeff" + "\r\n".join(lines))
    found = formats.read(tmp_path / "train.conll", ["ner_tags", "tokens"])
    assert found.names == ["tokens", "ner_tags"] and found.rows == 2
    assert found.cells["tokens"] == [["Ada"], ["was", words[1]]]
    assert found.cells["ner_tags"] == [["B-PER"], ["O", "B-LOC"]]
    write(tmp_path, "train.conll", "Ada B-PER\n\nin O\nLondon\n")
    said = r"line 4 \(row 1, the first is 0\) must have a word .*, has one column"
    with pytest.raises(formats.Unreadable, match=said):
        formats.read(tmp_path / "train.conll", ["tokens"])
    write(tmp_path, "train.conll", b"Ada B-PER\n\nin O\nM\xfcnchen B-LOC\n")
    said = r"byte 0xfc in line 4 \(row 1, the first is 0\), looks like Windows-1252"
    with pytest.raises(formats.Unreadable, match=said):
        formats.read(tmp_path / "train.conll", ["tokens"])


# Bytes that are not UTF-8, at every position of every format

PLACES = ("used name", "other name", "text", "other cell", "label")


def table_with(place, mark):
    """The names and two rows of a table that has a mark at one place of the second."""

    def at(name, value):
        return value + mark if name == place else value

    names = [at("used name", "text"), at("other name", "spare"), "label"]
    second = [at("text", "cold cup"), at("other cell", "y"), at("label", "no")]
    return names, [["warm tea", "x", "yes"], second]


MARK = "ZQZ"


def file_of(suffix, names, rows, path):
    if suffix == "parquet":
        columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        # The bytes lie in the file as they are, and it has no second copy of them.
        options = {"compression": "none", "use_dictionary": False}
        options |= {"write_statistics": False, "store_schema": False}
        parquet.write_table(pyarrow.table(columns), path, **options)
        return path.read_bytes()
    if suffix in ("csv", "tsv"):
        delimiter = formats.DELIMITED[f".{suffix}"]
        return "".join(delimiter.join(row) + "\n" for row in [names, *rows]).encode()
    objects = [dict(zip(names, row, strict=True)) for row in rows]
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in objects).encode()
    return json.dumps(objects, indent=1).encode()


WRONG = {
    "Latin-1": (b"Z\xe9Z", "0xe9", "Windows-1252 or Latin-1"),
    "Windows-1252": (b"Z\x80Z", "0x80", "Windows-1252 or Latin-1"),
    "no first byte": (b"\xff\xfeZ", "0xff", "looks like"),
    "a surrogate": (b"\xed\xa0\x80", "0xed", "looks like"),
    "too long a form": (b"\xc0\xafZ", "0xc0", "looks like"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_byte_that_is_not_utf_8(suffix, place, wrong, tmp_path, capsys):
    path = tmp_path / f"train.{suffix}"
    data = file_of(suffix, *table_with(place, MARK), path)
    replaced, byte, likely = WRONG[wrong]
    path.write_bytes(data.replace(MARK.encode(), replaced))
    found, said = outcome(tmp_path, capsys)
    assert said == []
    if suffix == "parquet" and place == "other cell":  # It is not even read.
        assert found[1]["text"] == ["warm tea", "cold cup"]
        return
    assert found.startswith(f"data.path={str(tmp_path)!r}: cannot read {path}: ")
    assert f"must be UTF-8; byte {byte} in " in found and likely in found
    if suffix == "parquet" and place.endswith("name"):
        assert "the name of a column" in found
    elif suffix in ("csv", "tsv") and place.endswith("name"):
        assert "line 1 (the header)" in found
    elif suffix in ("json", "jsonl") and place.endswith("name"):
        assert "row 0" in found
    else:
        assert "row 1" in found


def spoilt(data):
    """The data with a byte that is not UTF-8, at each place and in three ways."""
    for place in range(len(data) + 1):
        yield place, data[:place] + b"\xff" + data[place + 1 :]
        for byte in (b"\xe9", b"\x80"):
            yield place, data[:place] + byte + data[place:]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "squad", "txt"])
def test_a_byte_that_is_not_utf_8_at_every_place(suffix, end, tmp_path, capsys):
    """In names, in cells that are read and that are not, in labels and between them."""
    if suffix == "squad":
        content = {"version": "th\xe9", "data": [official(ME[:1])]}
        data = json.dumps(content, ensure_ascii=False).encode() + b"\n"
        path, fields = tmp_path / "train.json", {"task": "squad", "columns": ()}
    else:
        table = (
            ["text", "spare", "label"],
            [["tea\u2028", "x", "yes"], ["", "\xe9", "no"]],
        )
        data = file_of("csv" if suffix == "txt" else suffix, *table, None)
        path, fields = tmp_path / f"train.{suffix}", {}
    data = data.replace(b"\n", end.encode())
    for place, wrong in spoilt(data):
        path.write_bytes(wrong)
        found, said = outcome(tmp_path, capsys, **fields)
        assert said == []
        if suffix == "txt":  # It is not even looked at.
            assert "must hold one of ['train.parquet', " in found
            continue
        # A letter that lost its first byte is wrong a byte later.
        lines = {1 + wrong[: place + k].count(b"\n") for k in (0, 1)}
        line = int(re.search(r"must be UTF-8; byte 0x.. in line (\d+)", found)[1])
        assert line in lines and f"cannot read {path}: " in found


OTHER = "an encoding of another script than the Latin one"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize(
    "encoding, likely",
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-16"),  # which also has many zero bytes
        ("latin-1", "Windows-1252 or Latin-1"),
        ("cp1251", OTHER),
        ("gb18030", OTHER),
        ("shift_jis", OTHER),
    ],
)
def test_a_file_of_another_encoding(suffix, encoding, likely, tmp_path, capsys):
    foreign = {"cp1251": "холодная чашка", "gb18030": "冷たいお茶です冷たい"}
    text = foreign.get(encoding, foreign["gb18030"] if "jis" in encoding else "thé")
    rows = [[f"{text}{i}", "x", label] for i, label in enumerate(("yes", "no"))]
    data = file_of(suffix, ["text", "spare", "label"], rows, None)
    if suffix.startswith("json"):
        data = data.decode("unicode_escape").encode()
    write(tmp_path, f"train.{suffix}", data.decode().encode(encoding))
    found, _ = outcome(tmp_path, capsys)
    assert re.search(r"must be UTF-8; byte 0x.. in line \d", found)
    assert f"looks like {likely}" in found


def test_a_file_that_was_cut_off_within_a_letter(tmp_path, capsys):
    data = "text,label\nthé,yes\ncafé".encode()[:-1]
    found, _ = outcome(write(tmp_path, "train.csv", data), capsys)
    assert "byte 0xc3 in line 3 (row 1, the first is 0)" in found
    assert found.endswith("looks like UTF-8 that was cut off")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
def test_a_mark_at_the_start_of_utf_8_is_no_part_of_a_name(suffix, tmp_path):
    data = file_of(suffix, *table_with("", ""), None)
    write(tmp_path, f"train.{suffix}", codecs.BOM_UTF8 + data)
    assert texts_of(tmp_path) == ["warm tea", "cold cup"]


# Files that are not what their names say

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
TEXT = b"text,label\nwarm tea,yes\ncold cup,no\n"


def parquet_bytes(folder):
    path = folder / "other"
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [0, 1]}), path)
    return path.read_bytes()


DISGUISED = {
    "a pointer": (lambda folder: POINTER, "a pointer of Git LFS"),
    "a page": (lambda folder: b"\n<!DOCTYPE html><html>", "a page of HTML"),
    "an old page": (lambda folder: b"<HTML><body>404</body>", "a page of HTML"),
    "gzip": (lambda folder: gzip.compress(TEXT), "compressed by gzip"),
    "bzip2": (lambda folder: bz2.compress(TEXT), "compressed by bzip2"),
    "xz": (lambda folder: lzma.compress(TEXT), "compressed by xz"),
    "zstd": (
        lambda folder: pyarrow.compress(TEXT, "zstd", asbytes=True),
        "compressed by zstd",
    ),
    "a workbook": (lambda folder: b"PK\x03\x04" + bytes(99), "a zip archive"),
    "parquet": (parquet_bytes, "a parquet file under another name"),
}


@pytest.mark.parametrize("kind", DISGUISED)
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_is_not_what_its_name_says(suffix, kind, tmp_path, capsys):
    content, said = DISGUISED[kind]
    write(tmp_path, f"train.{suffix}", content(tmp_path))
    found, _ = outcome(tmp_path, capsys)
    if suffix == kind:
        assert found[1]["text"] == ["a", "b"]
    else:
        assert f"cannot read {tmp_path}/train.{suffix}: is {said}" in found


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
def test_zero_bytes_at_the_end_are_not_of_utf_16(suffix, tmp_path, capsys):
    data = file_of(suffix, *table_with("", ""), None)
    write(tmp_path, f"train.{suffix}", data + bytes(99))
    found, _ = outcome(tmp_path, capsys)
    assert found.endswith("ends in 99 zero bytes; it was not written whole")


# Quotes

CELLS = st.text(st.sampled_from("ab \"',\t\n\ré\u2028\x1b"), max_size=6)


def delimited(rows, suffix, always):
    """The file by one rule: quotes around a cell, and doubled within."""
    delimiter = formats.DELIMITED[f".{suffix}"]

    def cell(text):
        odd = any(c in text for c in f'{delimiter}"\n\r')
        quoted = '"' + text.replace('"', '""') + '"'
        return quoted if always or odd or not text else text

    return "".join(delimiter.join(map(cell, row)) + "\n" for row in rows)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5),
    st.sampled_from(("csv", "tsv")),
    st.booleans(),
)
def test_what_is_quoted_is_read_as_it_was(tmp_path_factory, rows, suffix, always):
    path = tmp_path_factory.getbasetemp() / f"quoted.{suffix}"
    path.write_bytes(delimited([("text", "b"), *rows], suffix, always).encode())
    table = formats.read(path, ("b", "text"))
    assert table.names == ["text", "b"] and table.rows == len(rows)
    assert [*zip(table.cells["text"], table.cells["b"], strict=True)] == rows


PLAIN = st.text(st.sampled_from("ab \"',é\u2028\x1b"), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=5), st.sampled_from("\n\r")
)
def test_without_quoting_every_character_counts(tmp_path_factory, rows, end):
    path = tmp_path_factory.getbasetemp() / "plain.tsv"
    lines = ["\t".join(row) for row in [("text", "b"), *rows]]
    path.write_text(end.join(lines), newline="")
    table = formats.read(path, ("text", "b"), quoting=False)
    assert [*zip(table.cells["text"], table.cells["b"], strict=True)] == rows


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize(
    "first, second, row",
    [
        ('"warm" tea', "cup", 0),  # it goes on after the quote
        ("tea", '"cold cup', 1),  # it has no end
        ("tea", '"cold" "cup"', 1),
        ('"a "warm" tea"', "cup", 0),
    ],
)
def test_quotes_by_no_rule(suffix, first, second, row, tmp_path, capsys):
    tab = formats.DELIMITED[f".{suffix}"]
    text = f"text{tab}label\n{first}{tab}yes\n{second}{tab}no\n"
    write(tmp_path, f"train.{suffix}", text)
    found, _ = outcome(tmp_path, capsys)
    assert f"row {row} (the first is 0) has a cell that begins with a quote" in found
    assert "--config.data.quoting=false" in found
    assert texts_of(tmp_path, quoting=False) == [first, second]


def test_quotes_within_a_cell_are_characters(tmp_path):
    write(tmp_path, "train.tsv", 'text\tlabel\nso "warm"\tyes\n5" cup\tno\n')
    assert texts_of(tmp_path) == ['so "warm"', '5" cup']


def test_rows_that_quotes_have_swallowed_are_said(tmp_path, capsys):
    lines = ["text\tlabel", '"tea\tyes', 'cup"\tno', "pot\tyes"]
    write(tmp_path, "train.tsv", "\n".join(lines))
    (_, rows), (said,) = outcome(tmp_path, capsys)
    assert rows["text"] == ["tea\tyes\ncup", "pot"]
    assert "1 rows hold both tabs and line breaks, as in row 0 " in said
    assert "--config.data.quoting=false" in said


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_cell_of_any_size(suffix, tmp_path):
    rows = [["tea " * 2_000_000, "x", "yes"], ["cup", "y", "no"]]
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(file_of(suffix, ["text", "spare", "label"], rows, path))
    assert texts_of(tmp_path) == [rows[0][0], "cup"]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_an_empty_cell_is_missing_and_a_quoted_one_is_not(suffix, tmp_path, capsys):
    tab = formats.DELIMITED[f".{suffix}"]
    write(tmp_path, f"train.{suffix}", f'text{tab}label\n""{tab}yes\n{tab}no\n')
    found, _ = outcome(tmp_path, capsys)
    assert "row 1 (the first is 0) has no text in 'text'" in found


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
def test_ends_of_lines(end, last, tmp_path):
    text = f"text,label\n\nwarm,yes\ncold,no{last}".replace("\n", end)
    write(tmp_path, "train.csv", text)
    assert texts_of(tmp_path) == ["warm", "cold"]


def test_lines_end_where_those_of_tables_do(tmp_path):
    """Other letters that part lines or paragraphs in Unicode stand within texts."""
    (tmp_path / "a.txt").write_bytes("a\u2028b\x85\nc\x0c d\r\ne\rf".encode())
    assert formats.lines(tmp_path / "a.txt") == ["a\u2028b\x85", "c\x0c d", "e", "f"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("text,label\na,yes\nb\n", "row 1 (the first is 0) has 1 cells, the header 2"),
        ("text,label\na,b,yes\n", "row 0 (the first is 0) has 3 cells, the header 2"),
        ("text;label\na;yes\n", "needs a column 'text'; it has text;label"),
        ("text, label\na,yes\n", "needs a column 'label'; it has text, ' label'"),
        ('"text,label\na,yes\n', "the header has a cell that begins with a quote"),
        ("", "must begin with the names of the columns"),
        ("\n\n", "must begin with the names of the columns"),
        ("te\x1b[2Jxt,label\na,yes\n", r"it has te\x1b[2Jxt, label"),
    ],
)
def test_tables_that_are_none(text, said, tmp_path, capsys):
    found, _ = outcome(write(tmp_path, "train.csv", text), capsys)
    assert said in found


# JSON

ROWS = [{"text": "warm", "label": "yes"}, {"text": "cold", "label": "no"}]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n".join(map(json.dumps, ROWS)),
        "\r\n\r\n".join(map(json.dumps, ROWS)) + "\r\n",
        "\n".join(json.dumps(row, indent=2) for row in ROWS),  # as jq writes them
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1", "data": ROWS}, indent=1),
        " \n" + json.dumps(ROWS) + " \n",
    ],
    ids=range(8),
)
def test_rows_of_json(suffix, content, tmp_path):
    write(tmp_path, f"train.{suffix}", content)
    assert texts_of(tmp_path) == ["warm", "cold"]


@pytest.mark.parametrize(
    "content, said",
    [
        ('[{"text": "a"}, 3]', "row 1 (the first is 0) must be an object"),
        ('"a"', "row 0 (the first is 0) must be an object"),
        ('{"text": "a"}\n{"text" "b"}', "row 1 (the first is 0) is no JSON"),
        ('[{"text": "a"}, {"text": "b" 3}]', "row 1 (the first is 0) is no JSON"),
        ('[{"text": "a"} {"text": "b"}]', "row 0 (the first is 0) is not followed by"),
        ('[{"text": "a"}', "row 0 (the first is 0) is not followed by"),
        ('[{"text": "a"},', "is cut off after 1 rows"),
        ("[", "is cut off after 0 rows"),
        ('{"text": "a"},\n{"text": "b"}', "row 1 (the first is 0) is no JSON"),
        ('{"a": ' * 99_999, "row 0 (the first is 0) is nested too deeply"),
        ("[" * 99_999, "row 0 (the first is 0) is nested too deeply"),
        ('{"text": ["a"], "label": ["x"]}', "row 0 (the first is 0) has text=['a']"),
        (
            '{"text": "a", "label": 1}\n{"label": 1}',
            "row 1 (the first is 0) has no text",
        ),
        ('{"text": "a", "label": 1}\n{"text": 7}', "row 1 (the first is 0) has text=7"),
        ('{"text": "\\udc80", "label": 1}', "row 0 (the first is 0) has half of a"),
        ('{"text": "", "label": "\\ud800"}', "row 0 (the first is 0) has half of a"),
        ('{"te\\ud800\\u001bxt": ""}', r"it has te\ud800\x1bxt"),
        ("[]", "has no rows"),
        ("", "has no rows"),
        ('{"text": "a", "text": "b", "label": 1}', "row 0 (the first is 0) is no JSON"),
        ('[{"text": "a"}, {"x": {"y": 1, "y": 2}}]', "names 'y' twice"),
        ('{"data": [], "data": []}', "names 'data' twice"),
        ('{"text": "a"}\n{"n": %s}' % ("9" * 5000), "row 1 (the first is 0) is no"),
    ],
    ids=range(23),
)
def test_json_that_is_no_table(content, said, tmp_path, capsys):
    found, _ = outcome(write(tmp_path, "train.json", content), capsys)
    assert said in found and len(found) < 700


# Only the columns of the task


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_columns_that_nobody_asked_for_may_hold_anything(suffix, tmp_path):
    rows = [
        {"text": "warm", "label": "yes", "id": 7, "more": {"a": 1}, "time": "x"},
        {"text": "cold", "label": "no", "id": "8b", "more": [1], "few": None},
    ]
    if suffix == "parquet":
        columns = {
            "text": ["warm", "cold"],
            "label": ["yes", "no"],
            "id": pyarrow.array([b"\xff\xfe", None]),
            "text.raw": [decimal.Decimal("1.5"), None],
            "more": pyarrow.array([[1], []], pyarrow.list_(pyarrow.int8())),
            "time": pyarrow.array([0, 2**50], pyarrow.timestamp("ms")),  # no date
        }
        parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    else:
        lines = "\n".join(map(json.dumps, rows))
        write(tmp_path, f"train.{suffix}", lines)
    assert texts_of(tmp_path) == ["warm", "cold"]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_other_columns_of_delimited_text_may_hold_anything(suffix, tmp_path):
    rows = [["id", "text", "id", "", "label"]]
    rows += [
        ["7", "warm", "2001-13-45", "", "yes"],
        ["", "cold", "nan", "9" * 99, "no"],
    ]
    write(tmp_path, f"train.{suffix}", delimited(rows, suffix, always=False))
    assert texts_of(tmp_path) == ["warm", "cold"]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
    ],
    ids=str,
)
def test_every_type_of_text_of_parquet(kind, tmp_path):
    texts = ["warm", "cold", "warm"]
    if pyarrow.types.is_dictionary(kind):
        column = pyarrow.array(texts).dictionary_encode().cast(kind)
    else:
        column = pyarrow.array(texts, kind)
    columns = {"text": column, "label": column}
    parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    task, rows = load(tmp_path)
    assert rows["text"] == texts and task.labels == ("cold", "warm")
    assert rows["label"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("problem", ["classification", "regression"])
@pytest.mark.parametrize(
    "kind",
    [
        *(pyarrow.int8(), pyarrow.uint64(), pyarrow.float16(), pyarrow.float64()),
        *(pyarrow.decimal128(5, 2), pyarrow.decimal256(50, 2)),
    ],
    ids=str,
)
def test_every_type_of_number_of_parquet(kind, problem, tmp_path):
    numbers = pyarrow.array([3.0, 1.0, 3.0], pyarrow.float32()).cast(kind)
    table = pyarrow.table({"text": ["a", "b", "c"], "label": numbers})
    parquet.write_table(table, tmp_path / "train.parquet")
    task, rows = load(tmp_path, problem=problem)
    if problem == "regression":
        assert rows["label"].tolist() == [3.0, 1.0, 3.0]
    else:
        assert task.labels == ("1", "3") and rows["label"].tolist() == [1, 0, 1]


def test_decimals_of_more_digits_than_a_float_has(tmp_path):
    """Two classes that are the same float stay two."""
    ids = [decimal.Decimal(10**30 + last) for last in (1, 2, 1)]
    numbers = pyarrow.array(ids, pyarrow.decimal128(38, 0))
    table = pyarrow.table({"text": ["a", "b", "c"], "label": numbers})
    parquet.write_table(table, tmp_path / "train.parquet")
    task, rows = load(tmp_path)
    assert task.labels == tuple(map(str, ids[:2]))
    assert rows["label"].tolist() == [0, 1, 0]


def test_classes_of_pandas(tmp_path):
    labels = pyarrow.array([7, 3, 7]).dictionary_encode()
    table = pyarrow.table({"text": ["a", "b", "c"], "label": labels})
    parquet.write_table(table, tmp_path / "train.parquet")
    task, rows = load(tmp_path)
    assert task.labels == ("3", "7") and rows["label"].tolist() == [1, 0, 1]


# Files as the hub gives them


def write_shards(folder, names):
    """A row in each file, in the order of the names."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, name in enumerate(names):
        label = ("yes", "no")[row % 2]
        table = pyarrow.table({"text": [f"text {row}"], "label": [label]})
        parquet.write_table(table, folder / name)


@pytest.mark.parametrize("below", ["", "data", "own", "plain_text"])
@pytest.mark.parametrize("shards", [2, 11])
@pytest.mark.parametrize("ends", ["", "-0123456789abcdef"])
def test_files_in_parts(below, shards, ends, tmp_path):
    names = [f"train-{i:05}-of-{shards:05}{ends}.parquet" for i in range(shards)]
    write_shards(tmp_path / below, names)
    write_shards(tmp_path / below, ["validation-00000-of-00001.parquet"])
    (tmp_path / ".git").mkdir()
    assert texts_of(tmp_path) == [f"text {i}" for i in range(shards)]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00001-of-00002.parquet"],
        ["train-00000-of-00002.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00003.parquet"],
        ["train-00000-of-00001.parquet", "train.parquet"],
        ["data/train.parquet", "train.parquet"],
        ["a/train.parquet", "b/train.parquet"],
        ["train-0-of-1.parquet.bak"],
        ["training-00000-of-00001.parquet"],
    ],
)
def test_parts_that_are_missing_or_too_many(names, tmp_path, capsys):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shards((tmp_path / name).parent, [(tmp_path / name).name])
    found, _ = outcome(tmp_path, capsys)
    assert "must hold one of ['train.parquet'" in found and " found, among: " in found


def test_the_row_of_a_mistake_in_one_of_the_parts(tmp_path, capsys):
    write_shards(tmp_path, ["train-00000-of-00002.parquet"])
    table = pyarrow.table({"text": ["a", None], "label": ["yes", "no"]})
    parquet.write_table(table, tmp_path / "train-00001-of-00002.parquet")
    found, _ = outcome(tmp_path, capsys)
    assert "train-00001-of-00002.parquet, row 1 (the first is 0) has no text" in found


# SQuAD's own files


def official(*answers, **more):
    asked = [
        {"id": str(i), "question": f"q{i}", "answers": answer, **more}
        for i, answer in enumerate(answers)
    ]
    paragraph = {"context": "it was me", "qas": asked}
    return {"title": "t", "paragraphs": [paragraph, paragraph]}


ME = [{"text": "me", "answer_start": 7}, {"text": "was me", "answer_start": 3}]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("version", [{"version": "1.1"}, {}, None])
def test_the_official_files_of_squad(suffix, version, tmp_path):
    articles = [official(ME, ME[:1]), official(ME)]
    content = articles if version is None else version | {"data": articles}
    write(tmp_path, f"train.{suffix}", json.dumps(content))
    _, rows = load(tmp_path, task="squad", columns=())
    assert rows["question"] == ["q0", "q1", "q0", "q1", "q0", "q0"]
    assert rows["context"] == ["it was me"] * 6
    assert rows["answers"][0] == {"text": ["me", "was me"], "answer_start": [7, 3]}
    assert rows["answers"][1] == {"text": ["me"], "answer_start": [7]}


def test_questions_of_version_2_have_no_answers(tmp_path):
    """Nor those that only look plausible; what becomes of them is said later."""
    more = {"is_impossible": True, "plausible_answers": ME}
    content = {"version": "v2.0", "data": [official([], **more)]}
    write(tmp_path, "train.json", json.dumps(content))
    _, rows = load(tmp_path, task="squad", columns=())
    assert rows["answers"].tolist() == [{"text": [], "answer_start": []}] * 2


@pytest.mark.parametrize(
    "article",
    [
        {"paragraphs": 3},
        {"paragraphs": [{"context": "x"}]},
        {"paragraphs": [{"context": "x", "qas": [{"question": "q", "answers": [3]}]}]},
        {"paragraphs": [{"qas": [{"question": "q", "answers": []}]}]},
        {"paragraphs": [3]},
        {"paragraphs": [{"context": "x", "qas": ["q"]}]},
        {"title": "t"},
    ],
    ids=str,
)
def test_articles_that_are_none(article, tmp_path, capsys):
    write(tmp_path, "train.json", json.dumps({"data": [official(ME), article]}))
    found, _ = outcome(tmp_path, capsys, task="squad", columns=())
    assert "must have the articles of SQuAD" in found
    assert "article 1 (the first is 0)" in found


@pytest.mark.parametrize("paragraphs", [3, None, ["a", "b"], [], [{"text": "a"}]])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_column_of_that_name_is_none_of_squad(paragraphs, rows, tmp_path):
    """Nobody asked for it, in some rows or in all."""
    more = {"paragraphs": paragraphs}
    content = [
        {"text": "tea", "label": n} | (more if n < rows else {}) for n in range(2)
    ]
    write(tmp_path, "train.jsonl", "\n".join(map(json.dumps, content)))
    task, found = load(tmp_path)
    assert task.labels == ("0", "1") and found["text"] == ["tea", "tea"]


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["me"], "answer_start": [7.0]},
        {"text": ["me"], "answer_start": ["7"]},
        {"text": "me", "answer_start": 7},
        [{"text": "me", "answer_start": 7}],
        None,
    ],
    ids=str,
)
def test_answers_of_another_form(answers, tmp_path, capsys):
    row = {"question": "q", "context": "it was me", "answers": answers}
    write(tmp_path, "train.jsonl", json.dumps(row))
    found, _ = outcome(tmp_path, capsys, task="squad", columns=())
    assert "row 0 (the first is 0) has answers=" in found
    assert "lists `text` of texts and `answer_start` of integers" in found


# What is said of texts and labels


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "labels, said",
    [
        (["good", "bad", "good "], ["['good', 'good '] are different classes"]),
        (["good", "bad", "Good"], ["['Good', 'good'] are different classes"]),
        (["a b", "bad", "a  b"], ["['a  b', 'a b'] are different classes"]),
        (["good", "bad", "nan"], ["the class 'nan' looks like a missing one"]),
        (["good", "bad", "None"], ["the class 'None' looks like a missing one"]),
        (["good", "bad", "N/A"], ["the class 'N/A' looks like a missing one"]),
        (["good", "bad", "'x'"], ["the class \"'x'\" looks like a word with quotes"]),
        (["good", "bad", "good"], []),
        (["good", "bad", "go\u200bod"], ["are different classes"]),
        (["good", "bad", "\ufeffgood"], ["are different classes"]),
        (["good", "bad", "go\x00od"], ["are different classes"]),
        (["good", "bad", "\uff47ood"], ["are different classes"]),
        (["caf\xe9", "bad", "cafe\u0301"], ["are different classes"]),
        (["0", "1", "+1"], ["['1', '+1'] are different classes"]),
        (["0", "1", "-0"], ["['0', '-0'] are different classes"]),
        (["0", "1", "01"], ["are different classes"]),
        (["0", "1", "-1"], ["the class '-1' looks like a missing one"]),
        (["1", "-1", "1"], []),
        (["0", "1", "yes"], ["the class 'yes' is no number, as others are"]),
        (["False", "1", "0"], ["the class 'False' is no number, as others are"]),
        (["1", "2", "9" * 5000], []),
        (["1_2", "12", "yes"], ["the class '1_2' is no number, as others are"]),
    ],
)
def test_classes_that_look_like_mistakes(suffix, labels, said, tmp_path, capsys):
    rows = [["a", "x", label] for label in labels]
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(file_of(suffix, ["text", "spare", "label"], rows, path))
    (task, _), lines = outcome(tmp_path, capsys)
    assert set(task.labels) == set(labels)
    for line, part in zip(lines, said, strict=True):
        assert part in line and f"{path}, row " in line
        named = "row 2 (the first is 0)" in line or "'good'" in line
        assert named or (labels[0] in part and "row 0 (the first is 0)" in line)
    # Names that somebody gave are meant.
    assert outcome(tmp_path, capsys, labels=task.labels)[1] == []


@pytest.mark.parametrize("word", ["nan", "NaN"])
@pytest.mark.parametrize("numbers", [["1", "0"], ["1.0", "0.0"], ["-1", "7"]])
def test_nan_among_numbers_is_a_missing_label(word, numbers, tmp_path, capsys):
    rows = "".join(f"a,{label}\n" for label in [*numbers, word])
    write(tmp_path, "train.csv", f"text,label\n{rows}")
    found, _ = outcome(tmp_path, capsys)
    assert f"train.csv, row 2 (the first is 0) has label='{word}'; must be" in found


@pytest.mark.parametrize(
    "texts, said",
    [
        (['"warm"', "cold"], "1 of 2 texts"),
        (["cold", "'warm tea'", "'x'"], "2 of 3 texts"),
        ([' "warm" ', "b"], "1 of 2 texts"),
        (['"', "b"], None),
        (['"warm" tea', 'a "cup"'], None),
        (["'twas", "dogs'"], None),
    ],
)
def test_texts_in_quotes_are_said(texts, said, tmp_path, capsys):
    table = {"text": texts, "label": ["yes", "no", "no"][: len(texts)]}
    parquet.write_table(pyarrow.table(table), tmp_path / "train.parquet")
    (_, rows), lines = outcome(tmp_path, capsys)
    assert rows["text"] == texts  # They are said, not changed.
    assert len(lines) == bool(said)
    for line in lines:
        row = [text.strip()[0] in "\"'" for text in texts].index(True)
        assert said in line and f"as in row {row} (the first is 0)" in line


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("cell", ["1_0", "4,5", "x", "nan", "", "1e39"])
def test_the_row_of_what_is_no_number(suffix, cell, tmp_path, capsys):
    rows = [["text", "label"], ["a", "2.5"], ["b", " 3 "], ["c", cell]]
    text = delimited(rows, suffix, always=False).replace('""', "")
    write(tmp_path, f"train.{suffix}", text)
    found, _ = outcome(tmp_path, capsys, problem="regression")
    assert re.search(r"row 2 \(the first is 0\) has label=.*; must be a finite", found)


def test_a_long_cell_is_shortened_in_a_message(tmp_path, capsys):
    write(tmp_path, "train.json", json.dumps([{"text": ["x"] * 9999, "label": 1}]))
    found, _ = outcome(tmp_path, capsys)
    assert "row 0 (the first is 0) has text=['x', 'x'" in found and len(found) < 600


def test_bytes_of_parquet_that_are_no_text(tmp_path, capsys):
    texts = pyarrow.array([b"warm", None, b"caf\xe9"])
    table = pyarrow.table({"text": ["a", "b", "c"], "label": texts})
    parquet.write_table(table, tmp_path / "train.parquet")
    found, _ = outcome(tmp_path, capsys)
    assert "byte 0xe9 in row 2 (the first is 0) in 'label'" in found
