"""What leaves in an export: model and tokenizer agree, in old and new runtimes."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time

import foreign_folders as folders
import numpy as np
import pytest
from foreign_folders import ROBERTA, change, make, write

import cofi_jax as cofi
import eval as eval_program
from cofi_jax import files
from cofi_jax.checkpoints import huggingface, saved_model, tokenizers
from cofi_jax.config import Data
from cofi_jax.errors import UserError
from cofi_jax.export import export

pytestmark = pytest.mark.usefixtures("quick_compile", "code_cache")

OLD = os.environ.get("COFI_JAX_TRANSFORMERS_4", "")
LENGTH = 12


def save(top, files, columns=("text",), settings=None, **sizes):
    """A saved model of an own task, and its two validation rows."""
    params, config = make(top / "encoder", **sizes)
    write(top / "encoder", files)
    if settings:
        change(top / "encoder", "tokenizer_config.json", **settings)
    head = ",".join([*columns, "label"])
    rows = ["warm tea,x", "cold cup,y"]
    if len(columns) == 2:
        rows = ["warm tea,cup,x", "cold cup,tea,y"]
    (top / "validation.csv").write_text("\n".join([head, *rows]) + "\n")
    data = Data(
        task="own",
        path=str(top),
        columns=columns,
        labels=("x", "y"),
        max_length=LENGTH,
    )
    about = {"task": "own", "labels": ["x", "y"], "data": dataclasses.asdict(data)}
    tokenizer = tokenizers.load_tokenizer(top / "encoder", "model.path")
    path = top / "model"
    saved_model.save_model(path, params, config, tokenizer=tokenizer, about=about)
    return path


def run(path, *formats):
    return export.export(path, formats, repeats=1)


# The families of model and tokenizer, each paired with another one.
PAIRS = {
    "one type, a tokenizer of two": (
        folders.wordpiece_files,
        {"tokenizer_class": "BertTokenizer"},
        ROBERTA,
    ),
    "two types, a tokenizer of one": (
        folders.bpe_files,
        {"tokenizer_class": "RobertaTokenizer"},
        {},
    ),
    "in Python": (folders.wordpiece_files, folders.JAPANESE, {}),
}


def available(*names):
    """Those of the formats whose packages are here."""
    there = importlib.util.find_spec
    return [name for name in names if all(map(there, export.FORMATS[name].packages))]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "formats",
    [
        ("onnx", "onnx-int8", "stablehlo"),
        pytest.param(("transformers",), marks=pytest.mark.torch),
    ],
)
def test_lines_of_the_card_run_with_any_tokenizer(tmp_path, pair, formats):
    make_files, settings, sizes = PAIRS[pair]
    path = save(tmp_path, make_files(), ("a", "b"), settings, **sizes)
    checks = run(path, *available(*formats))
    del checks[""]
    for name, check in checks.items():
        said = json.loads((path / name / "tokenizer_config.json").read_text())
        assert ("token_type_ids" in said["model_input_names"]) == (not sizes)
        assert said["model_max_length"] == LENGTH
        assert ("tokenizer" in check) == (pair == "in Python")
    card = (path / "README.md").read_text()
    assert ("BertJapaneseTokenizer, in Python" in card) == (pair == "in Python")


def test_lines_of_the_card_that_fail(tmp_path, monkeypatch):
    """Nothing is written, whether they raise or answer something else."""
    path = save(tmp_path, folders.wordpiece_files())
    form = export.FORMATS["stablehlo"]
    for was, now, reason in (
        ("model(", "model.gone(", "has no attribute 'gone'); not written"),
        ("truncation=True", "truncation=False", "give something else than the saved"),
    ):
        part = form.card._replace(snippet=form.card.snippet.replace(was, now))
        changed = dataclasses.replace(form, card=part)
        monkeypatch.setitem(export.FORMATS, "stablehlo", changed)
        with pytest.raises(UserError) as caught:
            run(path, "stablehlo")
        assert reason in str(caught.value)
        assert not (path / "stablehlo").exists()


@pytest.mark.torch
def test_texts_are_cut_where_pipeline_cuts_them(tmp_path):
    """At the task's length, not at the longest input of the model."""
    import transformers

    path = save(tmp_path, folders.wordpiece_files())
    run(path, "stock")
    folder = path / "stock"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    texts = ["warm tea " * 30, "cold " * 9 + "cup " * 30]
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, return_tensors="pt")
        assert inputs["input_ids"].shape == (1, LENGTH)
        logits = model(**inputs).logits.detach()
        found.append(float(logits.softmax(-1).max()))
    ours = [answer["score"] for answer in cofi.pipeline(path)(texts)]
    np.testing.assert_allclose(found, ours, rtol=1e-5)


def test_two_exports_wait_for_each_other(tmp_path, capfd):
    order = []

    def second():
        with files.locked(tmp_path):
            order.append("second")

    with files.locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert capfd.readouterr().err.startswith("warning: ")
    assert not list(tmp_path.iterdir())


def test_export_holds_the_lock(tmp_path, monkeypatch):
    path = save(tmp_path, folders.wordpiece_files())
    held = []

    def inside(*_):
        import fcntl

        handle = os.open(path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        held.append(True)
        return {}

    monkeypatch.setattr(export, "_export", inside)
    run(path)
    assert held == [True]


@pytest.mark.parametrize(
    "target", ["/proc/out.json", "none/out.json", ".", "x" * 300 + ".json", "a.txt/b"]
)
def test_result_that_cannot_be_written(tmp_path, monkeypatch, capsys, target):
    """It is refused before anything is measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    monkeypatch.setattr(eval_program, "evaluate", lambda *_, **__: pytest.fail())
    assert eval_program.main(["eval.py", "--model", "any", "--json", target]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("error: --json=")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# transformers 4, the oldest that the card names

_LOAD = """
import json, sys
import transformers
found = {"version": transformers.__version__}
for name, folder in json.loads(sys.argv[1]).items():
    kinds = transformers.AutoTokenizer, transformers.AutoModelForSequenceClassification
    options = {"trust_remote_code": True}
    tokenizer, model = (kind.from_pretrained(folder, **options) for kind in kinds)
    found[name] = []
    for texts in json.loads(sys.argv[2]):
        inputs = tokenizer(*texts, truncation=True, return_tensors="pt")
        logits = model(**inputs).logits.tolist()
        found[name].append([inputs["input_ids"].tolist(), logits])
print(json.dumps(found))
"""

SPECIAL = {"extra_special_tokens": ["[FROM]", "[TO]"]}
LAYOUTS = {
    "WordPiece": (folders.wordpiece_files, {}, {}),
    "special tokens": (
        folders.wordpiece_files,
        {"tokenizer_class": "BertTokenizer", "additional_special_tokens": ["[FROM]"]},
        {},
    ),
    "more of them": (
        folders.wordpiece_files,
        {"tokenizer_class": "BertTokenizer"} | SPECIAL,
        {},
    ),
    "BPE": (
        folders.bpe_files,
        SPECIAL | {"tokenizer_class": "RobertaTokenizer"},
        ROBERTA,
    ),
    "Unigram": (folders.unigram_files, {}, ROBERTA | {"model_type": "xlm-roberta"}),
    "in Python": (folders.wordpiece_files, folders.JAPANESE, {}),
}


@pytest.mark.torch
@pytest.mark.skipif(not OLD, reason="COFI_JAX_TRANSFORMERS_4 names no transformers 4")
def test_old_and_new_transformers_load_the_same(tmp_path):
    """Ids and logits of every layout of tokenizers, stock and with code of the hub."""
    where = {}
    for row, (layout, (make_files, settings, sizes)) in enumerate(LAYOUTS.items()):
        (top := tmp_path / str(row)).mkdir()
        params, config = make(top / "encoder", **sizes)
        write(top / "encoder", make_files())
        if settings:
            change(top / "encoder", "tokenizer_config.json", **settings)
        for name in ("stock", "transformers"):  # as an export writes them
            tokenizer = tokenizers.load_tokenizer(top / "encoder", "model")
            (top / name).mkdir()
            export.FORMATS[name].write(top / name, params, config, ("x", "y"))
            tokenizers.write(tokenizer, top / name, config, max_length=LENGTH)
            where[f"{layout}, {name}"] = str(top / name)
    params, config = make(tmp_path / "dense")  # the encoder that a teacher would be
    write(tmp_path / "dense", folders.wordpiece_files())
    change(tmp_path / "dense", "tokenizer_config.json", **SPECIAL)
    tokenizer = tokenizers.load_tokenizer(tmp_path / "dense", "model")
    huggingface.save_hugging_face(
        tmp_path / "saved", params, config, tokenizer=tokenizer
    )
    where["saved"] = str(tmp_path / "saved")
    texts = [["warm tea"], ["warm tea", "cup"], ["cold " * 40], ["[FROM] cold"]]
    found = []
    for number, old in enumerate((OLD, "")):
        paths = [*filter(None, [old, os.environ.get("PYTHONPATH", "")])]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HOME": str(tmp_path / f"hub{number}"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-c", _LOAD, json.dumps(where), json.dumps(texts)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    old, new = found
    assert old.pop("version").startswith("4.57.") and new.pop("version")[0] == "5"
    assert old.keys() == new.keys() == where.keys()
    for name in where:
        for theirs, ours in zip(old[name], new[name], strict=True):
            assert theirs[0] == ours[0], name
            np.testing.assert_allclose(theirs[1], ours[1], atol=1e-5)
