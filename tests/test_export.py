"""The other formats: checked, complete, and each loaded by what it needs alone."""

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import types

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from conftest import WITHOUT_US, printed_without, random_params
from pyarrow import parquet
from scipy.special import expit, softmax
from test_glue import moods, names, questions, values
from test_report import make_report

import cofi_jax as cofi
from cofi_jax.checkpoints import saved_model
from cofi_jax.config import Data
from cofi_jax.data import tasks
from cofi_jax.data.toy import demo_tokenizer
from cofi_jax.errors import UserError
from cofi_jax.export import __main__ as export_lib
from cofi_jax.export import export, verify
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import slicing
from cofi_jax.report import model_card

pytestmark = pytest.mark.usefixtures("quick_compile")


ROOT = pathlib.Path(__file__).parents[1]


ROWS = 40


WHERE = "path/to/this/folder"


NEEDS = {
    "": (),
    "stablehlo": (),
    "onnx": ("onnx", "onnxruntime"),
    "onnx-int8": ("onnx", "onnxruntime"),
    "transformers": ("torch",),
    "stock": ("torch",),
}


NAMES = [
    pytest.param(name, marks=pytest.mark.torch if "torch" in packages else ())
    for name, packages in NEEDS.items()
]


# What must not be needed.
WITHOUT = {
    "": ("torch", "onnx", "onnxruntime"),
    "stablehlo": ("cofi_jax", "flax", "torch"),
    "onnx": ("cofi_jax", "jax", "torch", "onnx"),
    "onnx-int8": ("cofi_jax", "jax", "torch", "onnx"),
    "transformers": WITHOUT_US,
    "stock": WITHOUT_US,
}


LOSSY = ("onnx-int8",)


@pytest.fixture(scope="module", autouse=True)
def processes(code_cache):
    """Processes that a test starts share its cache, and ask no hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(pathlib.Path(code_cache).parent))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def save(path, data, labels=(), settings=None, **sizes):
    """A sliced model with absent blocks and a narrower width, at `path`."""
    tokenizer = demo_tokenizer()
    dense = EncoderConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "heads": (4, 4, 4),
            "head_size": 4,
            "intermediate": (24, 24, 24),
            "pooler_size": 16,
            "num_labels": 2,
            "max_positions": 32,
        }
        | sizes
    )
    masks = {
        "head": [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]],
        "intermediate": np.arange(72).reshape(3, 24) % 5 > 2,
        "mha": [1, 1, 1],
        "ffn": [1, 0, 1],
        "hidden": np.arange(16) % 4 < 3,
    }
    masks = {kind: jnp.asarray(gates, jnp.float32) for kind, gates in masks.items()}
    params, spec = slicing.prune(random_params(dense, seed=3), masks, dense)
    about = {
        "task": data.task,
        "labels": list(labels),
        "data": dataclasses.asdict(data),
        "dense": dataclasses.asdict(dense),
        "sparsity": 0.5,
    }
    if settings:
        about["settings"] = settings
    config = spec.config(dense)
    saved_model.save_model(
        path,
        params,
        config,
        spec,
        tokenizer=tokenizer,
        about=about,
        readme=model_card.text(config, about, {}),
    )
    return path


DEMO = Data(task="demo", max_length=32)


LABELS = tasks.TASKS["demo"].labels


THRESHOLDS = {"thresholds": [0.3, 0.5, 0.6]}  # of a model of three labels
TAGS = ("O", "B-great", "I-great", "B-poor", "I-poor")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(tmp_path_factory.mktemp("export") / "pruned", DEMO, LABELS)


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory):
    """The one that `exported` adds to."""
    return shutil.copytree(plain, tmp_path_factory.mktemp("exported") / "pruned")


@pytest.fixture
def copy(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "pruned")


def run(path, *formats, **others):
    # At the shape of the comparison there is nothing more to compile.
    settings = {"num_rows": ROWS, "repeats": 2, "batch_size": 32, "seq_length": 16}
    return export.export(path, formats, **settings | others)


def tree(path):
    """All that is in a folder: the content of its files, None for folders."""
    return {
        str(p.relative_to(path)): None if p.is_dir() else p.read_bytes()
        for p in path.rglob("*")
    }


def available():
    """The formats whose packages are here."""

    def there(package):
        try:
            return __import__(package)
        except ImportError:
            return False

    return [name for name in export.FORMATS if all(map(there, NEEDS[name]))]


@pytest.fixture(scope="module")
def exported(saved):
    return run(saved, *available())


def logits_of(path, *texts):
    """Of one text, or one pair."""
    model, params, _ = cofi.load_model(path)
    tokens = cofi.load_tokenizer(path)(*texts)
    batch = {name: jnp.asarray([ids], jnp.int32) for name, ids in tokens.items()}
    return np.asarray(jax.jit(model.apply)({"params": params}, batch).logits)


def loaded(path, name, *texts):
    """The logits of the format's own runtime."""
    tokens = cofi.load_tokenizer(path)(*texts)
    batch = {name: np.array([ids], np.int32) for name, ids in tokens.items()}
    return export.FORMATS[name].load(path / name)(batch)


@pytest.fixture(scope="module")
def expected(saved):
    """The logits of the sentence that the model card asks about."""
    return logits_of(saved, "A gripping film.")


@pytest.mark.parametrize("name", NAMES)
def test_check_says_what_was_found(name, saved, exported):
    if name not in exported:
        pytest.skip(f"needs {NEEDS[name]}")
    check = json.loads((saved / name / "check.json").read_text())
    assert check == exported[name]
    if lossy := name in LOSSY:
        assert 1e-5 < check["max_abs_difference"] < 0.1
    else:
        assert 0 <= check["max_abs_difference"] <= 1e-5 < check["tolerance"]
    assert check["rows"] == ROWS and check["split"] == "validation"
    assert check["checked_against"] == "the masked model"
    assert lossy or check["scores"] == check["reference_scores"]
    assert check["speedup"] > 0
    assert check["benchmark"]["dtype"] == ("int8" if lossy else "float32")
    assert set(NEEDS[name]) <= set(check["versions"])
    folder = saved / name
    beside = {*export.FORMATS, "README.md", "check.json"}
    if name:
        beside = {"check.json"}
    files = {
        file: content
        for file, content in tree(folder).items()
        if content is not None and file.split("/")[0] not in beside
    }
    assert set(check["sha256"]) == set(files)
    for file, digest in check["sha256"].items():
        assert hashlib.sha256(files[file]).hexdigest() == digest
    assert check["bytes"] == sum(map(len, files.values()))


def snippets(text):
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert all(WHERE in block for block in blocks)
    named = {name: f"{WHERE}/{name}" for name in NEEDS if name}
    return {
        next((n for n, where in named.items() if f'{where}"' in block), ""): block
        for block in blocks
    }


def test_no_path_of_this_machine_is_in_the_file(saved, exported):
    program = (saved / "stablehlo" / "model.stablehlo").read_bytes()
    for path in (ROOT, saved.parent, sys.prefix, "site-packages"):
        assert str(path).encode() not in program


@pytest.mark.parametrize("name", NAMES)
def test_the_lines_of_the_card_run(name, saved, exported, expected, code_cache):
    """In a fresh process, without what they must not need."""
    if name not in exported:
        pytest.skip(f"needs {NEEDS[name]}")
    *lines, last = (
        snippets((saved / "README.md").read_text())[name]
        .replace(WHERE, str(saved))
        .splitlines()
    )
    assert last.startswith("print(") and last.endswith(")")
    program = [
        "import json",
        *lines,
        f"found = {last.removeprefix('print')}",
        "found = getattr(found, 'logits', found)",
        "found = found if isinstance(found, list) else found.tolist()",
        "found = [getattr(x, 'tolist', lambda: x)() for x in found]",
        "print(json.dumps(found))",
    ]
    found = printed_without(WITHOUT[name], "\n".join(program), code_cache)
    if name in LOSSY:
        expected = loaded(saved, name, "A gripping film.")
    if name:
        np.testing.assert_allclose(np.ravel(found), expected[0], atol=1e-5)
    else:
        scores = np.exp(expected[0]) / np.exp(expected[0]).sum()
        label = tasks.TASKS["demo"].labels[scores.argmax()]
        assert found[0]["label"] == label
        np.testing.assert_allclose(found[0]["score"], scores.max(), rtol=1e-5)


def test_the_lines_of_a_card_load_its_model_once(monkeypatch, tmp_path):
    """However many texts they are run on, and each text gets its own answer."""
    calls = []
    counted = types.SimpleNamespace(load=lambda: calls.append("load"))
    counted.answer = lambda *texts: calls.append(texts) or np.array([[len(texts), 0.0]])
    monkeypatch.setitem(sys.modules, "counted", counted)
    lines = "import counted\ncounted.load()\nwith open('/dev/null') as file:\n    {}\n"
    lines = lines.format("texts = ({texts},)") + "print(counted.answer(*texts))"
    card = model_card.Part("nobody", "nothing", lines)
    form = types.SimpleNamespace(name="counted", card=card)

    def predict(batch):  # A row of two texts has two types of tokens.
        return np.array([[1.0 + batch["token_type_ids"].max(), 0.0]])

    config = EncoderConfig(
        *(len(demo_tokenizer()), 8, (1,), 8, (8,), 8), num_labels=2, max_positions=24
    )
    model = verify.Model({}, config, predict)
    task = tasks.find(Data(task="demo"))
    verify.run_card(form, tmp_path, model, task, demo_tokenizer())
    assert [len(call) for call in calls] == [len("load"), 1, 2, 2]
    assert len(set(calls)) == 4


def test_the_card_of_a_saved_model(copy):
    """Is there before anything is exported, and names what lies beside it."""
    text = (copy / "README.md").read_text()
    assert set(snippets(text)) == {""}
    assert "What was checked" not in text
    run(copy, "stablehlo")
    text = (copy / "README.md").read_text()
    assert set(snippets(text)) == {"", "stablehlo"}
    assert text.startswith("---\n") and "What was checked" in text
    assert str(copy.parent) not in text
    (copy / "stablehlo" / "left over").touch()
    run(copy, "stablehlo")  # written anew
    assert not (copy / "stablehlo" / "left over").exists()
    assert not list(copy.glob(".*"))


def spoil(monkeypatch):
    """From now on the written weights are a little off."""
    form = export.FORMATS["stablehlo"]

    def spoilt(folder, params, config, labels):
        form.write(folder, jax.tree.map(lambda x: x * 1.01, params), config, labels)

    changed = dataclasses.replace(form, write=spoilt)
    monkeypatch.setitem(export.FORMATS, "stablehlo", changed)


@pytest.mark.parametrize("before", [True, False])
def test_what_fails_its_check_is_not_written(copy, monkeypatch, before):
    if before:
        run(copy, "stablehlo")
    there = tree(copy)
    assert ("stablehlo" in there) == before
    spoil(monkeypatch)
    with pytest.raises(UserError, match="stablehlo.*differ from the masked.*not writ"):
        run(copy, "stablehlo", num_rows=ROWS // 2 + 3)  # a prime: another score
    now = tree(copy)
    ours = {"README.md", "check.json"}  # of this folder alone, which was checked anew
    assert {k: now[k] for k in now if k not in ours} == {
        k: there[k] for k in there if k not in ours
    }
    check = json.loads((copy / "check.json").read_text())
    lines = (copy / "README.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    (row,) = (cells for cells in table if cells[:1] == ["this folder"])
    assert str(check["rows"]) in row
    assert f"{check['max_abs_difference']:.1e}" in row
    assert f"accuracy {check['scores']['accuracy']:.4f}" in row
    assert any(cells[:1] == ["stablehlo"] for cells in table) == before


def test_a_folder_of_someone_elses_stays(copy):
    (copy / "stablehlo").mkdir()
    (copy / "stablehlo" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="formats='stablehlo': .*not an export"):
        run(copy, "stablehlo")
    assert tree(copy / "stablehlo") == {"notes.txt": b"mine"}
    assert not list(copy.glob(".*"))


def test_a_teacher_is_exported(tmp_path, saved):
    """A dense model is its own reference; there is no speedup to speak of."""
    _, _, about = saved_model.read_about(saved)
    dense = EncoderConfig.from_json(about.pop("dense"))
    params, path = random_params(dense, 1), tmp_path / "teacher"
    del about["sparsity"]
    tokenizer = saved_model.load_tokenizer(saved)
    saved_model.save_model(path, params, dense, tokenizer=tokenizer, about=about)
    check = run(path, "stablehlo")["stablehlo"]
    assert "speedup" not in check and check["checked_against"] == "the saved model"
    assert check["scores"] == check["reference_scores"]


def test_a_package_that_is_missing(copy, monkeypatch):
    there = tree(copy)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, extra in (
        ("onnx", "onnx"),
        ("onnx-int8", "onnx"),
        ("transformers", "torch"),
    ):
        with pytest.raises(UserError, match=rf"pip install 'cofi-jax\[{extra}\]'"):
            run(copy, name)
    assert tree(copy) == there


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--formats tflite", "formats='tflite': must be among transformers"),
        ("--formats= --dtype float16", "dtype='float16': must be one of"),
        ("--dtype bfloat16", "dtype='bfloat16': is for the formats transformers alone"),
        ("--formats= --dtype bfloat16", "dtype='bfloat16': is for the formats trans"),
        *(
            (f"--formats {formats} --dtype bfloat16", "dtype='bfloat16': is for")
            for formats in ("onnx", "stablehlo", "stock", "transformers,stablehlo")
        ),
        (
            "--formats=onnx --max_loss 1",
            "max_loss=1.0: is for the formats onnx-int8 al",
        ),
        ("--formats=onnx-int8 --max_loss=-1", "max_loss=-1.0: must be a number, 0 or"),
        ("--formats=onnx-int8 --max_loss nan", "max_loss=nan: must be a number, 0 or"),
        ("--formats= --seq_length 33", "seq_length=33: must be at most 32"),
        ("--formats= --rows=-1", "--rows=-1: must be 0 or more"),
        ("--formats= --data nowhere/at/all", "data.path='nowhere/at/all'"),
        ("--format onnx", "unrecognized arguments"),
        ("--formats= --model nowhere", "model='.*nowhere': must be a folder with"),
    ],
)
def test_bad_input(flags, message, copy, capsys):
    config = json.loads((copy / "model.json").read_text())
    if "--data" in flags:  # the demo's are generated
        config["about"]["data"]["task"] = "sst2"
        (copy / "model.json").write_text(json.dumps(config))
    there = tree(copy)
    argv = ["export.py", f"--model={copy}", *flags.split()]
    assert export_lib.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert re.match(f"error: .*{message}", err)
    assert tree(copy) == there


def test_command(copy, capsys):
    flags = "--formats=stablehlo --rows=20 --repeats=1 --batch_size=1 --seq_length=4"
    assert export_lib.main(["export.py", f"--model={copy}", *flags.split()]) == 0
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")] for line in out.splitlines()]
    assert any(row[1:3] == ["stablehlo", "20"] for row in cells) and "cpu" in out


def test_a_dtype_is_taken_or_refused():
    """The formats of other dtypes than float32, and no others, are told which."""
    for form in export.FORMATS.values():
        told = ["dtype"] if set(form.dtypes) > {"float32"} else []
        named = [*inspect.signature(form.write).parameters]
        assert named == ["folder", "params", "config", "labels", *told]


@pytest.mark.torch
def test_bfloat16_weights(copy, expected, capsys):
    """They are rounded first: what is computed with them is exact."""
    checks = run(copy, "transformers", dtype="bfloat16")
    assert checks["transformers"]["max_abs_difference"] <= 1e-5
    assert checks["transformers"]["weights"] == "bfloat16"
    weights = copy / "transformers" / "model.safetensors"
    with safetensors.safe_open(weights, framework="np") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}
    assert kinds == {"BF16"}
    tokens = cofi.load_tokenizer(copy)("A gripping film.")
    batch = {name: np.array([ids], np.int32) for name, ids in tokens.items()}
    found = export.FORMATS["transformers"].load(copy / "transformers")(batch)
    assert np.abs(found - expected).max() > 1e-4
    assert "[y/N]" not in capsys.readouterr().out  # whether to trust our own code


def test_a_format_brings_its_own_check(copy, monkeypatch):
    """What it finds is in check.json, and it alone decides what is written."""
    spoil(monkeypatch)

    def check(form, folder, subject):
        model = subject.model._replace(predict=form.load(folder))
        found = verify.compare(form.name, model, subject.rows, tolerance=1.0)
        return found | {"lost": 0.25}

    form = export.FORMATS["stablehlo"]
    form = dataclasses.replace(form, check=check, lossy=True)
    monkeypatch.setitem(export.FORMATS, "stablehlo", form)
    found = run(copy, "stablehlo")["stablehlo"]
    assert found["lost"] == 0.25 and found["max_abs_difference"] > 1e-4
    assert found == json.loads((copy / "stablehlo" / "check.json").read_text())


# Models of other kinds


@pytest.fixture(
    scope="module",
    params=[
        ("questions", "stablehlo", "onnx"),
        pytest.param(("questions", "transformers", "stock"), marks=pytest.mark.torch),
        ("pairs", "stablehlo"),
        ("moods", "stablehlo"),
        ("names", "stablehlo"),
        pytest.param(("names", "transformers", "stock"), marks=pytest.mark.torch),
        ("roberta", "stablehlo"),
    ],
    ids="-".join,
)
def other(request, tmp_path_factory):
    """Its kind, path, checks and pipeline; of questions, in all formats."""
    kind, *formats = request.param
    top = tmp_path_factory.mktemp(kind)
    where = {"path": str(top), "max_length": 24, "buckets": (24,)}
    rng = random.Random(kind)
    if kind == "roberta":
        sizes = {"position_offset": 2, "max_positions": 34, "type_vocab_size": 1}
        save(top / "pruned", DEMO, LABELS, model_type="roberta", **sizes)
    elif kind == "pairs":
        parquet.write_table(values(rng, "validation"), top / "validation.parquet")
        data = Data(task="stsb", **where)
        save(top / "pruned", data, problem="regression", num_labels=1)
        formats += LOSSY if {*LOSSY} <= {*available()} else ()
    elif kind == "moods":
        parquet.write_table(moods(rng, "validation"), top / "validation.parquet")
        labels, more = ("great", "poor", "short"), {"columns": ("text",)}
        data = Data(task="own", problem="multilabel", labels=labels, **more, **where)
        more = {"problem": "multilabel", "num_labels": 3, "settings": THRESHOLDS}
        save(top / "pruned", data, labels, **more)
        formats += LOSSY if {*LOSSY} <= {*available()} else ()
    elif kind == "names":
        parquet.write_table(names(rng, "validation"), top / "validation.parquet")
        more = {"columns": ("tokens",), "label_column": "ner_tags", "labels": TAGS}
        data = Data(task="own", problem="entities", **more, **where)
        more = {"problem": "entities", "head": "every", "pooler_size": 0}
        save(top / "pruned", data, TAGS, num_labels=len(TAGS), **more)
        formats += LOSSY if {*LOSSY} <= {*available()} else ()
        formats = [name for name in formats if name in available()]
    else:
        parquet.write_table(questions(rng, "validation"), top / "validation.parquet")
        data = Data(task="squad", **where)
        save(top / "pruned", data, problem="span", pooler_size=0)
        formats = [name for name in formats if name in available()]
    checks = run(top / "pruned", *formats, batch_size=32, seq_length=24)
    return kind, top / "pruned", checks, cofi.pipeline(top / "pruned")


def test_checks_of_other_kinds(other):
    """Their scores are those of the answers, which `pipeline` gives without labels."""
    kind, path, checks, answer = other
    for name, check in checks.items():
        if name in LOSSY:
            assert 1e-5 < check["max_abs_difference"] < 0.1
            continue
        assert 0 <= check["max_abs_difference"] <= 1e-5 < check["tolerance"]
        assert check["scores"] == pytest.approx(check["reference_scores"], abs=1e-5)
    if kind == "roberta":
        return
    task = saved_model.saved_task(str(path))
    if kind == "moods":
        rows = parquet.read_table(path.parent / "validation.parquet").to_pylist()
        found = answer([row["text"] for row in rows])
        pairs = zip((each["labels"] for each in found), rows, strict=True)
        both = sum(len({*given} & {*row["label"]}) for given, row in pairs)
        sizes = sum(len(each["labels"]) for each in found)
        sizes += sum(len(row["label"]) for row in rows)
        assert checks[""]["scores"] == {"micro_f1": pytest.approx(2 * both / sizes)}
        return
    if kind == "names":
        rows = parquet.read_table(path.parent / "validation.parquet").to_pylist()
        found = answer([" ".join(row["tokens"]) for row in rows])
        given = sum(len(each["entities"]) for each in found)
        gold = sum(tag[0] == "B" for row in rows for tag in row["ner_tags"])
        assert [*checks[""]["scores"]] == ["f1"]
        f1 = checks[""]["scores"]["f1"]
        both = f1 * (given + gold) / 2  # the entities that are right
        assert 0 < both < given and both == pytest.approx(round(both))
        return
    rows = parquet.read_table(path.parent / "validation.parquet").to_pylist()
    found = answer([tuple(row[column] for column in task.columns) for row in rows])
    found = [value for each in found for value in each.values()]
    assert len(found) == len(rows)
    if kind == "pairs":
        metric, score = "pearson", np.corrcoef(found, [r["label"] for r in rows])[0, 1]
    else:
        assert all(x and x in r["context"] for x, r in zip(found, rows, strict=True))
        gold = [row["answers"]["text"][0] for row in rows]
        metric, score = "exact_match", np.mean([*map(str.__eq__, found, gold)])
    assert list(checks[""]["scores"]) == list(task.metrics)
    assert checks[""]["scores"][metric] == pytest.approx(score, abs=1e-6)


def test_pipeline_of_other_kinds(other):
    kind, path, _, answer = other
    pair = ("the film was", "a dull plot , but the cast is great")
    if kind == "moods":
        found = answer(list(pair))
        chances = expit(np.float64(logits_of(path, pair[0])[0]))
        given = chances > THRESHOLDS["thresholds"]
        assert found[0]["labels"] == [*np.array(["great", "poor", "short"])[given]]
        assert found[0]["scores"] == pytest.approx(chances[given], rel=1e-5)
        return
    if kind == "names":
        (found, _), text = answer(list(pair)), pair[0]
        chances = softmax(np.float64(logits_of(path, text)[0, 1:-1]), axis=-1)
        parts = [TAGS[k] != "O" for k in chances.argmax(-1)]
        inside = " ".join(x["text"] for x in found["entities"])
        expected = [w for w, part in zip(text.split(), parts, strict=True) if part]
        assert inside.split() == expected
        return
    if kind == "roberta":
        found = answer(list(pair))
        scores = np.asarray(jax.nn.softmax(logits_of(path, pair[0])[0]))
        assert found[0]["score"] == pytest.approx(scores.max(), rel=1e-5)
        assert [set(x) for x in found] == [{"label", "score"}] * 2
        return
    found = answer([pair, list(pair)])
    assert len(found) == 2 and found[0] == found[1]
    if kind == "pairs":
        (value,) = logits_of(path, *pair)[0]
        assert found[0] == {"value": pytest.approx(value, abs=1e-5)}
    else:
        assert set(found[0]) == {"answer"} and found[0]["answer"] in pair[1]
    assert answer([]) == []
    for wrong in ("a text", pair, list(pair), [(*pair, "c")], [("a", 3)]):
        with pytest.raises(UserError, match="texts=.*must be a list of pairs of texts"):
            answer(wrong)


def test_card_of_other_kinds(other):
    """Its lines run, here in this process, and give the model's logits."""
    kind, path, checks, answer = other
    blocks = snippets((path / "README.md").read_text())
    assert set(blocks) == set(checks)
    (asked,) = ast.literal_eval(re.search(r"model\((\[.*\])\)", blocks[""])[1])
    texts = [asked] if isinstance(asked, str) else asked
    expected = logits_of(path, *texts)
    for name, block in blocks.items():
        printed = []
        exec(block.replace(WHERE, str(path)), {"print": printed.append})
        (found,) = printed
        if not name:
            assert found == answer([asked])
            continue
        if hasattr(found, "values"):  # of transformers
            found = [x.detach().numpy() for x in found.values()]
        if isinstance(found, list):  # one array, or starts and ends
            found = found[0] if len(found) == 1 else np.stack(found, -1)
        wanted = loaded(path, name, *texts) if name in LOSSY else expected
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_front_matter_of_other_kinds(other):
    kind, path, *_ = other
    hub = {
        "questions": ("question-answering", ["rajpurkar/squad"]),
        "pairs": ("text-classification", ["nyu-mll/glue"]),
        "roberta": ("text-classification", None),  # the demo's rows are generated
        "moods": ("text-classification", None),
        "names": ("token-classification", None),
    }
    card = huggingface_hub.ModelCard.load(path / "README.md").data
    assert (card.pipeline_tag, card.datasets) == hub[kind]
    assert card.library_name == "cofi-jax" and card.eval_results is None
    assert str(path.parent) not in str(card)


@pytest.mark.parametrize(
    "task, ids",
    [
        ("sst2", ["accuracy"]),
        ("cola", ["matthews_correlation"]),
        ("stsb", ["spearmanr", "pearsonr"]),
        ("mrpc", ["accuracy", "f1"]),
        ("squad", ["f1", "exact_match"]),
    ],
)
def test_results_that_the_hub_shows(copy, task, ids):
    """By the names that it knows metrics by."""
    row = tasks.TASKS[task]
    scores = {metric: 0.9 - i / 8 for i, metric in enumerate(row.metrics)}
    result = make_report() | {"task": task, "metric": row.metrics[0]}
    for model in ("teacher", "pruned"):
        result[model]["scores"] = {"validation": scores}
    fields = json.loads((copy / "model.json").read_text())
    fields["config"]["problem"] = row.problem.name
    fields["about"] |= {"task": task, "labels": list(row.labels), "report": result}
    fields["about"]["data"]["task"] = task
    (copy / "model.json").write_text(json.dumps(fields))
    export.write_card(copy)
    card = huggingface_hub.ModelCard.load(copy / "README.md").data
    assert card.datasets == [row.hub] and card.metrics == ids
    found = {x.metric_type: x.metric_value for x in card.eval_results}
    assert found == dict(zip(ids, scores.values(), strict=True))
    for x in card.eval_results:
        assert (x.dataset_type, x.dataset_split) == (row.hub, "validation")
        assert x.dataset_config == (task if row.hub == tasks.GLUE else None)
        assert x.task_type == card.pipeline_tag


# The other ways to load


def test_at_another_dtype(saved):
    model, params, _ = cofi.load_model(saved)
    half_model, half, _ = cofi.load_model(saved, dtype="bfloat16")
    assert half_model.config == dataclasses.replace(model.config, dtype="bfloat16")
    for ours, whole in zip(jax.tree.leaves(half), jax.tree.leaves(params), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, whole.astype(jnp.bfloat16))
    with pytest.raises(UserError, match="dtype='int8': must be one of float32"):
        cofi.load_model(saved, dtype="int8")


TWO_DEVICES = """
import jax, numpy as np, cofi_jax as cofi
assert len(jax.devices()) == 2
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
model, params, _ = cofi.load_model({path!r}, sharding=everywhere)
_, single, _ = cofi.load_model({path!r})
for both, one in zip(jax.tree.leaves(params), jax.tree.leaves(single), strict=True):
    assert both.sharding == everywhere and len(both.addressable_shards) == 2
    np.testing.assert_array_equal(both, one)
"""


def test_on_two_devices(saved, monkeypatch):
    two = "--xla_force_host_platform_device_count=2"
    monkeypatch.setenv("XLA_FLAGS", two, prepend=" ")
    program = TWO_DEVICES.format(path=str(saved))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_pipeline(saved, expected):
    classify = cofi.pipeline(saved)
    sentences = ["A gripping film.", "", "A gripping film. " * 40]  # cut at 32 tokens
    found = classify(sentences)
    assert len(found) == 3
    scores = np.asarray(jax.nn.softmax(expected[0]))
    assert found[0] == {
        "label": tasks.TASKS["demo"].labels[scores.argmax()],
        "score": pytest.approx(scores.max(), rel=1e-5),
    }
    assert classify([sentences[0]])[0]["score"] == pytest.approx(found[0]["score"])


@pytest.mark.parametrize("texts", ["a text", [("a", "b")], [3], [None]])
def test_pipeline_of_what_is_no_text(saved, texts):
    with pytest.raises(UserError, match="texts=.*must be a list of texts"):
        cofi.pipeline(saved)(texts)
