"""Text of others, wherever it is shown, breaks no line and repaints no terminal."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import spoilt
from test_report import evaluated, evaluation, make_metrics, make_report

import eval
import train
from cofi_jax import commands, config, errors
from cofi_jax.checkpoints import huggingface, saved_model, tokenizers
from cofi_jax.checkpoints.foreign import UnsupportedCheckpoint
from cofi_jax.data import sources, squad, tasks, toy
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report import compare, figures, html, model_card, pages, tables
from cofi_jax.run import sweep

FOREIGN = {
    "a line break": "tea\nerror: cup",
    "Windows' line break": "tea\r\ncup",
    "a return": "tea\rcup",
    "a line of Unicode": "tea\u2028cup\u2029\x85",
    "a tab and others": "tea\tcup\x0b\x0c\x1c\x1d\x1e\x1f",
    "a color": "tea\x1b[31mcup",
    "a cleared screen": "\x1b[2J\x1b[H",
    "a title": "\x1b]0;tea\x07",
    "one byte for it": "tea\x9b2Jcup",
    "backspaces": "tea\x08\x08\x08cup\x7f",
    "nothing": "tea\x00cup",
    "another direction": "tea\u202ecup\u2066",
    "what nobody sees": "tea\u200bcup\ufeff\u00ad",
    "half a pair": "tea\ud800cup",
    "a byte of a path": "tea\udcffcup",
    "a private letter": "tea\ue000cup",
}


every_text = pytest.mark.parametrize("text", FOREIGN.values(), ids=list(FOREIGN))


def is_clean(shown, lines=None):
    """Whether each line is printable and can be written to a file."""
    shown.encode()
    found = shown.removesuffix("\n").split("\n")
    return all(map(str.isprintable, found)) and lines in (None, len(found))


def caught(call, *arguments, **options):
    with pytest.raises(errors.UserError) as found:
        call(*arguments, **options)
    return str(found.value)


@given(st.text() | st.text(st.characters(max_codepoint=0xFF)))
@settings(max_examples=300, deadline=None)
def test_any_text_is_one_printable_line(text):
    shown = errors.printable(text)
    assert is_clean(shown, lines=1)
    assert errors.printable(shown) == shown
    if text.isprintable() and text == text.strip():
        assert shown == text


def test_what_is_printable_is_spelled_as_python_spells_it():
    assert errors.printable("a\x1b[2J\u202e\ud800\u00e9\u65e5") == (
        r"a\x1b[2J\u202e\ud800" + "\u00e9\u65e5"
    )
    assert errors.printable(" a \n\n  b\r\nc ") == "a b c"


# Messages. Each place is a function of the text that gives what is shown.


def of_row(row):
    """The message about a file whose only row is what `row` makes of the text."""

    def place(folder, text, capsys):
        (folder / "train.json").write_text(json.dumps(row(text)))
        data = config.Data(task="own", path=str(folder), columns=("text",))
        return caught(sources.load, tasks.find(data), ["train"])

    return place


def of_classes(folder, text, capsys):
    """What is said of classes that look like mistakes, or the complaint about one."""
    names = f"{text}b", f"{text}B", f"'{text}'"
    rows = [{"text": "a", "label": name} for name in names]
    (folder / "train.json").write_text(json.dumps(rows))
    data = config.Data(task="own", path=str(folder), columns=("text",))
    try:
        sources.load(tasks.find(data), ["train"])
    except errors.UserError as error:
        return str(error)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    return " ".join(said)


def of_folder(folder, text, capsys):
    """The message about a folder and a file of this name, as far as it can be one."""
    kind = "surrogateescape" if "\udcff" in text else "replace"
    name = text.replace("\0", "0").encode("utf-8", kind)
    path = os.path.join(os.fsencode(folder), name)
    os.mkdir(path)
    with open(os.path.join(path, name), "w") as file:
        file.write("x")
    data = config.Data(path=os.fsdecode(path))
    return caught(sources.load, tasks.find(data), ["train"])


def program_of(error):
    """What a program prints where it ends with this error."""

    def place(folder, text, capsys):
        @commands.program
        def main():
            raise error(text)

        assert main() == 2
        return capsys.readouterr().err

    return place


def command(program, *arguments):
    def place(folder, text, capsys):
        given = [argument.replace("TEXT", text) for argument in arguments]
        assert program(["x.py", *given]) == 2
        found = capsys.readouterr()
        assert found.out == ""
        return found.err

    return place


def warned(folder, text, capsys):
    errors.warn(f"{text}: {text}")
    return capsys.readouterr().err


def answered(folder, text, capsys):
    rows = {"question": ["x"], "context": ["y"]}
    rows["answers"] = [{"text": ["\n"], "answer_start": [text]}]
    options = {"max_length": 9, "training": False}
    return caught(squad.windows, rows, toy.demo_tokenizer(), **options)


DEMO = "--config=configs/demo.py"


MESSAGES = {
    "a complaint": lambda folder, text, capsys: str(errors.reject(text, text, text)),
    "a warning": warned,
    "an error of the user": program_of(lambda text: errors.UserError(text)),
    "a file's error": program_of(lambda text: FileNotFoundError(2, text, text)),
    "a flag": command(train.main, DEMO, "--TEXT"),
    "a word": command(train.main, DEMO, "TEXT"),
    "a field": command(train.main, DEMO, "--config.data.TEXT=1"),
    "a value": command(train.main, DEMO, "--config.seed=TEXT"),
    "a choice": command(train.main, DEMO, "--config.prune.constraint=TEXT"),
    "a task": command(train.main, DEMO, "--config.data.task=TEXT"),
    "a config": command(train.main, "--config=TEXT.py"),
    "a model": command(eval.main, "--model=./TEXT"),
    "a flag of eval": command(eval.main, "--model=x", "--TEXT"),
    "a number of eval": command(eval.main, "--model=x", "--repeats=TEXT"),
    "a report": command(pages.main, "TEXT", "--to=x"),
    "a sweep": command(sweep.main, "--config=TEXT", "--workdir=x"),
    "the folder of rows": of_folder,
    "another column": of_row(lambda text: {text: 1}),
    "a cell": of_row(lambda text: {"text": [text], "label": 1}),
    "a label": of_row(lambda text: {"text": "a", "label": text}),
    "classes": of_classes,
    "an answer": answered,
}


PATHS = ("a config", "a model", "a report", "a sweep")


@every_text
@pytest.mark.parametrize("place", MESSAGES)
def test_messages_are_one_printable_line(place, text, tmp_path, capsys):
    if {"\0", "\ud800"} & {*text} and place in PATHS:
        pytest.skip("no operating system passes it on")
    shown = MESSAGES[place](tmp_path, text, capsys)
    assert shown and is_clean(shown, lines=1)


# Files of a foreign folder, with a byte that is not UTF-8 at every place


def everything(folder):
    """A folder with each of the files, all of them short."""
    for name, fields in {
        "config.json": {"hidden_size": 8, "id2label": {"0": "caf\u00e9"}},
        "tokenizer.json": {"model": {"vocab": {"caf\u00e9": 0}}, "added_tokens": []},
        "tokenizer_config.json": {"cls_token": "[CLS]", "added_tokens_decoder": {}},
        "special_tokens_map.json": {"cls_token": {"content": "caf\u00e9"}},
        "added_tokens.json": {"caf\u00e9": 7},
        "vocab.json": {"<s>": 0, "caf\u00e9": 1},
        "model.safetensors.index.json": {"weight_map": {"a": "b"}},
        "model.json": {"format": 1, "config": {}, "about": {}},
    }.items():
        (folder / name).write_text(json.dumps(fields, ensure_ascii=False))
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\ncaf\u00e9\n##s\n")
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nf \u00e9\n")


def read_weights(folder, field):
    try:
        huggingface._open_parts(folder / "model.safetensors.index.json")
    except UnsupportedCheckpoint as error:
        raise errors.reject(field, str(folder), str(error)) from error


READERS = {
    **dict.fromkeys(
        (
            *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt"),
            *("config.json", "special_tokens_map.json", "added_tokens.json"),
            "vocab.json",
        ),
        lambda folder, field: tokenizers.load_tokenizer(folder, field),
    ),
    "config.json of a model": lambda folder, field: huggingface.read_config(
        folder, field, 2, config.Model()
    ),
    "model.safetensors.index.json": read_weights,
    "model.json": lambda folder, field: saved_model.read_about(folder, field=field),
}


@pytest.mark.parametrize("name", READERS)
def test_a_byte_that_is_not_utf_8_at_every_place(name, tmp_path, capfd):
    """The file is named before any library makes something else of it."""
    everything(tmp_path)
    file, reader = name.partition(" ")[0], READERS[name]
    data = (tmp_path / file).read_bytes()
    for _, wrong in spoilt(data):
        (tmp_path / file).write_bytes(wrong)
        shown = caught(reader, tmp_path, "model")
        assert is_clean(shown, lines=1)
        assert f"{file} cannot be read ('utf-8' codec can't decode byte" in shown
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("key", ["hidden_act", "id2label", "0", "entailment"])
def test_keys_that_come_twice(key, tmp_path):
    """Wherever they stand: one of both values would be taken silently."""
    everything(tmp_path)
    fields = json.dumps(
        {"hidden_act": "relu", "id2label": {"0": "entailment"}, "entailment": 1}
    )
    (tmp_path / "config.json").write_text(
        fields.replace(f'"{key}": ', f'"{key}": null, "{key}": ')
    )
    for name in ("config.json", "config.json of a model"):
        shown = caught(READERS[name], tmp_path, "model")
        assert f"config.json cannot be read (names '{key}' twice)" in shown


# Markdown, HTML, pictures and code


def report_of(text):
    report = make_report() | {"task": text, "metric": text}
    report["benchmark"]["device"] = text
    report["versions"] = {text: text}
    for model in ("teacher", "pruned"):
        report[model]["scores"] = {text: {text: 0.5}, "b": {text: 0.5}}
    return report


def of_sweep(text):
    members = [{"config": text, "workdir": text, "state": "failed", "error": text}]
    row = {"config": text, "seeds": 0, "failed": 1, "waiting": 0, "paper": None}
    return sweep.markdown({"rows": [row | {"metric": text}], "members": members})


def card_of(text):
    sizes = EncoderConfig(8, 8, (1,), 8, (8,), pooler_size=0, num_labels=2)
    how = {"device": text, "dtype": "float32", "batch_size": 1, "seq_length": 8}
    check = {"rows": 1, "bytes": 1, "max_abs_difference": 0.0, "scores": {text: 0.5}}
    check |= {"checked_against": "it", "speedup": 1.0, "speedup_spread": [1.0, 1.0]}
    about = {"labels": [text, text * 2], "scores": {"validation": {text: 0.5}}}
    about |= {"task": "own", "base_model": text, "data": {"columns": [text]}}
    return model_card.text(sizes, about, {"": check | {"benchmark": how}})


def page_of(text):
    table = compare.table(compare.points([(text, report_of(text))]))
    return html.page(f"# {tables.escape(text)}\n\n{table}", {})


PAGES = {
    "a table": lambda text: str(tables.Table("<>", ["a", text], [[text, "b"]])),
    "a table for terminals": lambda text: tables.table(report_of(text)),
    "a report": lambda text: pages.markdown(
        report_of(text), make_metrics(), config.to_json(config.Config())
    ),
    "a config": lambda text: pages.markdown(
        make_report(),
        [],
        config.to_json(config.Config(data=config.Data(path=text, labels=(text,)))),
    ),
    "an evaluation": lambda text: tables.evaluation(
        evaluation(evaluated(text), evaluated(text + "b")) | {"data": text}
    ),
    "a sweep": of_sweep,
    "a model card": card_of,
    "a comparison": page_of,
    "a picture's words": lambda text: html._charts(
        [figures.Chart(text, lambda axes: None, (), text)]
    ),
    "a legend": figures.plain,
}


@every_text
@pytest.mark.parametrize("place", PAGES)
def test_pages_hold_printable_lines_alone(place, text):
    shown = PAGES[place](text)
    assert is_clean(shown)
    if "\x1b" in text:
        assert r"\x1b" in shown or r"\u001b" in shown or r"\\x1b" in shown


@every_text
def test_a_table_has_the_rows_that_it_was_given(text):
    shown = str(tables.Table("<>", ["a", text], [[text, "b"], [text, "c"]]))
    assert is_clean(shown, lines=4)


def test_a_run_says_where_it_wrote_to_in_one_line(capsys, monkeypatch, tmp_path):
    for text in FOREIGN.values():
        monkeypatch.setattr(train, "run", lambda *_: make_report())
        command = [DEMO, "--workdir", str(tmp_path / "x") + text]
        assert train.main(["train.py", *command]) == 0
        assert is_clean(capsys.readouterr().out)


def test_pictures_of_foreign_text_can_be_drawn(recwarn):
    """Of one text with all of them, since drawing is slow."""
    text = "".join(FOREIGN.values())
    report = report_of(text)
    charts = compare.trades(compare.points([(text, report)]))
    assert len(figures.svg(figures.draw(charts[:1]))) > 1000
    assert not [w for w in recwarn if "Glyph" not in str(w.message)]
    assert np.isfinite(report["speedup"])
