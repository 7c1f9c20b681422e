"""What eval.py says of a saved model is what its parameters say by hand."""

import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import random_params
from safetensors.numpy import save_file

import eval
from cofi_jax.checkpoints import huggingface, saved_model
from cofi_jax.config import Data
from cofi_jax.data import tasks, toy
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import UserError
from cofi_jax.evaluation import evaluate as evaluate_lib
from cofi_jax.evaluation import latency
from cofi_jax.export import runtimes
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning import masks, slicing

ROOT = pathlib.Path(__file__).parents[1]


ROWS = toy.generate(70, seed=3)  # more than a batch of the scoring


DENSE = EncoderConfig(
    vocab_size=len(toy.demo_tokenizer()),
    hidden_size=16,
    heads=(2, 2),
    head_size=8,
    intermediate=(32, 32),
    pooler_size=16,
    num_labels=2,
    max_positions=20,
)


THREE = dataclasses.replace(DENSE, num_labels=3)


MNLI = tasks.TASKS["mnli"]


OTHER_ORDER = [2, 0, 1]  # of its classes


def about(task, path, **more):
    data = Data(task=task, path=str(path), max_length=20, buckets=(8, 20))
    labels = list(tasks.TASKS[task].labels)
    return {"task": task, "labels": labels, "data": dataclasses.asdict(data)} | more


def own(*labels):
    """Somebody's own task."""
    fields = {"columns": ("sentence",), "labels": labels, "task": "own"}
    described = about("sst2", "")
    return described | {"data": described["data"] | fields}


def removal():
    """A head, all of a feed-forward block, half of another, three dimensions."""
    gates = {k: np.ones(s) for k, s in masks.mask_shapes(DENSE, KINDS).items()}
    gates["head"][0, 1] = 0
    gates["ffn"][1] = 0
    gates["intermediate"][0, ::2] = 0
    gates["hidden"][[3, 4, 9]] = 0
    return gates


pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Folders that command lines name: `{dense}`, `{pruned}`, `{data}`, ..."""
    top = tmp_path_factory.mktemp("there")
    (top / "data").mkdir()
    lines = [f"{sentence}\t{label}\n" for sentence, label in ROWS]
    (top / "data" / "validation.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    (top / "mnli").mkdir()
    for number, split in enumerate(MNLI.validation):
        rows = [("premise", "hypothesis", "label")]
        for i, (sentence, label) in enumerate(ROWS[: 40 + number]):
            rows.append((sentence, ROWS[i - number - 1][0], str((i + label) % 3)))
        text = "".join("\t".join(row) + "\n" for row in rows)
        (top / "mnli" / f"{split}.tsv").write_text(text)
    (top / "notes").mkdir()
    (top / "notes" / "todo.txt").write_text("not a model")

    params = random_params(DENSE, seed=0)
    small, spec = slicing.prune(params, removal(), DENSE)
    short = dataclasses.replace(DENSE, max_positions=9)
    sst2 = about("sst2", top / "data")
    more = {"dense": dataclasses.asdict(DENSE), "sparsity": 0.5}
    chess = {"data": sst2["data"] | {"task": "chess"}}
    unknown = {"data": sst2["data"] | {"tokens": 20}}
    nine = {"data": sst2["data"] | {"max_length": 9}}
    three = random_params(THREE, seed=3)
    small_three, spec_three = slicing.prune(three, removal(), THREE)
    mnli = about("mnli", top / "mnli")
    more_three = {"dense": dataclasses.asdict(THREE), "sparsity": 0.5}
    for name, model, sizes, kept, described in (
        ("dense", params, DENSE, None, sst2),
        ("pruned", small, spec.config(DENSE), spec, sst2 | more),
        ("bare", params, DENSE, None, {}),
        ("rootless", small, spec.config(DENSE), spec, sst2),
        ("strange", params, DENSE, None, sst2 | chess),
        ("newer", params, DENSE, None, sst2 | unknown),
        ("homeless", params, DENSE, None, about("sst2", "")),
        ("own", params, DENSE, None, own("yes", "no")),
        ("own_turned", params, DENSE, None, own("no", "yes")),
        ("short", random_params(short, seed=0), short, None, sst2 | nine),
        ("three", three, THREE, None, mnli),
        ("small", small_three, spec_three.config(THREE), spec_three, mnli | more_three),
    ):
        saved_model.save_model(
            top / name,
            model,
            sizes,
            kept,
            tokenizer=toy.demo_tokenizer(),
            about=described,
        )
    for name, damage in (("damaged", damage_params), ("nameless", damage_about)):
        shutil.copytree(top / "dense", top / name)
        damage(top / name)

    rest = {"tokenizer": toy.demo_tokenizer()}
    labels = [name.upper() for name in MNLI.labels]
    huggingface.save_hugging_face(top / "hf", three, THREE, labels=labels, **rest)
    turned = three | {
        "classifier": {k: v[..., OTHER_ORDER] for k, v in three["classifier"].items()}
    }
    labels = [labels[i] for i in OTHER_ORDER]
    huggingface.save_hugging_face(
        top / "hf_named", turned, THREE, labels=labels, **rest
    )
    huggingface.save_hugging_face(top / "hf_nameless", turned, THREE, **rest)
    shutil.copytree(top / "hf", top / "hf_small")
    save_file(torch_tensors(small_three), top / "hf_small" / "model.safetensors")
    return {path.name: str(path) for path in top.iterdir()} | {
        "none": str(top / "none")
    }


def damage_params(folder):
    for file in (folder / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_about(folder):
    (folder / "model.json").write_text('{"format": 1')


def torch_tensors(params):
    """A sliced model as its authors published theirs, absent blocks' LayerNorms too."""
    tensors = {}

    def linear(name, node, inputs):
        kernel = np.asarray(node["kernel"])
        matrix = kernel.reshape(np.prod(kernel.shape[:inputs]), -1)
        tensors[f"{name}.weight"] = np.ascontiguousarray(matrix.T)
        tensors[f"{name}.bias"] = np.asarray(node["bias"]).reshape(-1)

    def norm(name, node):
        tensors[f"{name}.weight"] = np.asarray(node["scale"])
        tensors[f"{name}.bias"] = np.asarray(node["bias"])

    embeddings = params["embeddings"]
    for ours, theirs in (
        ("word", "word"),
        ("position", "position"),
        ("type", "token_type"),
    ):
        name = f"bert.embeddings.{theirs}_embeddings.weight"
        tensors[name] = np.asarray(embeddings[ours])
    norm("bert.embeddings.LayerNorm", embeddings["norm"])
    width = len(embeddings["norm"]["bias"])
    left_behind = dict.fromkeys(("scale", "bias"), np.ones(width, np.float32))
    for i in range(len(DENSE.heads)):
        layer, top = params.get(f"layer_{i}", {}), f"bert.encoder.layer.{i}"
        if "attention" in layer:
            for part in ("query", "key", "value"):
                name = f"{top}.attention.self.{part}"
                linear(name, layer["attention"][part], inputs=1)
            name = f"{top}.attention.output.dense"
            linear(name, layer["attention"]["output"], inputs=2)
        if "ffn" in layer:
            linear(f"{top}.intermediate.dense", layer["ffn"]["up"], inputs=1)
            linear(f"{top}.output.dense", layer["ffn"]["down"], inputs=1)
        name = f"{top}.attention.output.LayerNorm"
        norm(name, layer.get("attention_norm", left_behind))
        norm(f"{top}.output.LayerNorm", layer.get("ffn_norm", left_behind))
    linear("bert.pooler.dense", params["pooler"], inputs=1)
    linear("classifier", params["classifier"], inputs=1)
    return tensors


def run(capsys, *arguments):
    status = eval.main(["eval.py", *arguments])
    return status, *capsys.readouterr()


def encoder_size(params):
    """Weights and biases of attention and feed-forward blocks, counted one by one."""
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if {"attention", "ffn"} & {key.key for key in path}
    )


def accuracy_by_hand(path):
    model, params, _ = saved_model.load_model(path)
    tokenizer = saved_model.load_tokenizer(path)
    sentences, labels = zip(*ROWS, strict=True)
    batch = tokenizer(list(sentences), padding="max_length", max_length=20)
    batch = {name: np.array(rows, np.int32) for name, rows in batch.items()}
    logits = jax.jit(model.apply)({"params": params}, batch).logits
    return np.mean(np.argmax(logits, -1) == np.array(labels))


def stored_bytes(path):
    return sum(f.stat().st_size for f in (path / "params").rglob("*") if f.is_file())


@pytest.mark.parametrize("name", ["dense", "pruned"])
def test_numbers(name, there, tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--repeats=3", "--batch_size=2", "--seq_length=12", f"--json={file}"]
    status, out, err = run(capsys, f"--model={there[name]}", *arguments)
    assert (status, err) == (0, "")
    result = json.loads(file.read_text())
    (found,) = result["models"]

    params = saved_model.load_model(there[name])[1]
    size = encoder_size(params)
    dense_size = encoder_size(saved_model.load_model(there["dense"])[1])
    score = accuracy_by_hand(there[name])
    assert found["score"] == pytest.approx(score)
    assert 0.2 < score < 0.8  # of a random model: neither class alone
    assert found["scores"] == {"validation": {"accuracy": found["score"]}}
    error = found["standard_errors"]["validation"]["accuracy"]
    assert error == pytest.approx(np.sqrt(score * (1 - score) / len(ROWS)), rel=0.2)
    assert result["examples"] == {"validation": len(ROWS)}
    assert (result["task"], result["metric"]) == ("sst2", "accuracy")
    assert result["data"] == there["data"]
    assert found["params"] == {
        "encoder": size,
        "total": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    assert found["sparsity"] == pytest.approx(1 - size / dense_size)
    assert (found["sparsity"] > 0.3) == (name == "pruned")
    assert found["bytes"] == stored_bytes(pathlib.Path(there[name])) > 4 * size
    how = result["benchmark"]
    assert (how["repeats"], how["dtype"]) == (3, "float32")
    assert how["matmul_precision"] == "default"
    assert how["device"].startswith("cpu") or jax.default_backend() != "cpu"
    (cell,) = result["grid"]
    assert (cell["batch_size"], cell["seq_length"], cell["model"]) == (2, 12, name)
    assert 0 < cell["latency_ms"] <= cell["latency_p95_ms"]
    assert cell["examples_per_second"] == pytest.approx(2000 / cell["latency_ms"])
    assert (cell["speedup"], cell["speedup_spread"]) == (1, [1, 1])

    for text in (
        there[name],
        f"| {score:.4f} ± {error:.4f} |",
        f"Scores on 70 examples ({there['data']})",
        f"{100 * found['sparsity']:.1f} %",
        "| 2 x 12 |",
        f"on {how['device']};\nfloat32, matrix precision default, in 3 turns.",
    ):
        assert text in out
    heads = {"pruned": ["1, 16", "2, none"], "dense": ["2, 32", "2, 32"]}[name]
    layers = [line.split("|")[2].strip() for line in out.splitlines() if "FFN" in line]
    assert layers == heads
    assert "speedup" not in out and "difference" not in out


def test_kept_widths_are_those_of_the_masks(there):
    result = evaluate_lib.evaluate([there["pruned"]], batch_sizes=[1], repeats=1)
    (found,) = result["models"]
    kept = {"hidden": 13, "heads": [1, 2], "intermediate": [16, 0]}
    assert found["kept"] == kept
    # By default as long as the model can read, where that is shorter.
    assert [cell["seq_length"] for cell in result["grid"]] == [20]
    attention = 20 * 13 * 8 * 3 * 4 + 2 * 20 * 20 * 8 * 3
    head = (13 + 2) * 16
    expected = attention + 2 * 20 * 13 * 16 + head
    assert found["multiply_adds"] == {"20": expected}


def test_models_side_by_side_at_every_size(there, tmp_path, capsys):
    file = tmp_path / "x.json"
    arguments = [f"--model={there[name]}" for name in ("dense", "pruned", "dense")]
    arguments += ["--batch_size=1,3", "--seq_length=4,8", "--repeats=2"]
    status, out, err = run(capsys, *arguments, f"--json={file}")
    assert (status, err) == (0, "")
    result = json.loads(file.read_text())
    dense, pruned, again = result["models"]
    names = ["dense", "pruned", "dense #2"]
    assert [model["name"] for model in result["models"]] == names
    assert [cell["model"] for cell in result["grid"]] == names * 4
    sizes = [(cell["batch_size"], cell["seq_length"]) for cell in result["grid"][::3]]
    assert sizes == [(1, 4), (1, 8), (3, 4), (3, 8)]
    for cell in result["grid"]:
        low, high = cell["speedup_spread"]
        assert 0 < low <= cell["speedup"] <= high
    assert set(pruned["multiply_adds"]) == {"4", "8"}

    gap = accuracy_by_hand(there["pruned"]) - accuracy_by_hand(there["dense"])
    assert pruned["differences"]["validation"]["accuracy"] == pytest.approx(gap)
    error = pruned["difference_errors"]["validation"]["accuracy"]
    assert 0.02 < error < 0.12  # of 70 rows
    assert f"{gap:+.4f} ± {error:.4f}" in out
    # On the same rows, the same model makes the same mistakes.
    assert again["scores"] == dense["scores"]
    assert again["standard_errors"] == dense["standard_errors"]
    assert again["difference_errors"] == {"validation": {"accuracy": 0}}
    for text in (" speedup |", f"{dense['score']:.4f}", "1 x 4", "3 x 8", "dense #2"):
        assert text in out
    assert max(map(len, out.split("\n\n", 1)[1].splitlines())) <= 100


def test_models_in_several_runtimes(there, tmp_path, capsys):
    file = tmp_path / "x.json"
    arguments = [f"--model={there[name]}" for name in ("dense", "pruned")]
    arguments += ["--batch_size=2", "--seq_length=4", "--repeats=1", f"--json={file}"]
    status, out, err = run(capsys, *arguments, "--runtime=jax,onnx,onnx-int8")
    assert (status, err) == (0, "")
    result = json.loads(file.read_text())
    found = {model["name"]: model for model in result["models"]}
    runtimes = ("jax", "onnx", "onnx-int8")
    assert [*found] == [f"{n}, {r}" for r in runtimes for n in ("dense", "pruned")]
    assert [cell["model"] for cell in result["grid"]] == [*found]
    for name in ("dense", "pruned"):
        by_hand = accuracy_by_hand(there[name])
        for runtime in ("jax", "onnx"):
            assert found[f"{name}, {runtime}"]["score"] == pytest.approx(by_hand)
        sizes = [found[f"{name}, {runtime}"]["bytes"] for runtime in runtimes]
        assert len({*sizes}) == 3  # Each has files of its own.
    assert "pruned, onnx-int8" in out


@pytest.mark.parametrize("names", [("onnx",), ("jax", "onnx-int8")])
def test_other_runtimes_are_for_the_cpu(names, monkeypatch):
    """The result would say that onnxruntime was timed on a GPU."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match=f"'{names[-1]}': runs on the CPU; set JAX"):
        runtimes.openers(names, "--runtime")


def test_beside_other_runtimes_models_compute_in_float32(there, tmp_path):
    shutil.copytree(there["dense"], tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    described = json.loads(path.read_text())
    described["config"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(described))

    def opener(loaded, folder):
        assert loaded.model.config.dtype == "float32"
        return latency.call(loaded.model, loaded.params)

    options = {"batch_sizes": [1], "seq_lengths": [4], "repeats": 1}
    for opened_in, dtype in (
        (evaluate_lib.JAX, "bfloat16"),
        ({"jax": None, "other": opener}, "float32"),
    ):
        found = evaluate_lib.evaluate([path.parent], **options, runtimes=opened_in)
        assert found["benchmark"]["dtype"] == dtype


@pytest.mark.parametrize(
    "backend, problem, longest, expected",
    [
        ("gpu", "regression", 512, (128, 128)),
        ("gpu", "span", 512, (128, 384)),
        ("cpu", "regression", 512, (32, 64)),
        ("cpu", "span", 512, (8, 384)),
        ("cpu", "span", 256, (8, 256)),
        ("gpu", "regression", 20, (128, 20)),
    ],
)
def test_usual_sizes(backend, problem, longest, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert evaluate_lib.usual_sizes(PROBLEMS[problem], longest) == expected


def test_each_model_has_its_own_tokenizer_and_length(there, tmp_path):
    """A model cut to 9 positions reads 9 tokens, beside one that reads 20."""
    alone = evaluate_lib.evaluate([there["short"]], batch_sizes=[1], repeats=1)
    both = evaluate_lib.evaluate(
        [there["dense"], there["short"]], batch_sizes=[1], repeats=1
    )
    assert both["models"][1]["scores"] == alone["models"][0]["scores"]
    assert both["models"][0]["score"] == accuracy_by_hand(there["dense"])
    assert {cell["seq_length"] for cell in both["grid"]} == {9}


@pytest.mark.parametrize("name", ["dense", "hf"])
def test_dtype(name, there):
    options = {"batch_sizes": [1], "repeats": 1, "dtype": "bfloat16"}
    if name == "hf":
        options |= {"task": "mnli", "data_path": there["mnli"]}
    result = evaluate_lib.evaluate([there[name]], **options)
    assert result["benchmark"]["dtype"] == "bfloat16"
    assert 0 < result["models"][0]["score"] < 1


def test_other_data(there, tmp_path, capsys):
    tsv = pathlib.Path(there["data"], "validation.tsv").read_text().splitlines()
    (tmp_path / "validation.tsv").write_text("\n".join(tsv[:6]) + "\n")
    arguments = [f"--data={tmp_path}", "--repeats=1", "--batch_size=1"]
    status, out, err = run(capsys, f"--model={there['homeless']}", *arguments)
    assert (status, err) == (0, "")
    assert f"Scores on 5 examples ({tmp_path})" in out


# Hugging Face folders


@pytest.fixture(scope="module")
def evaluated(there):
    """What is said of one of the models for MNLI, and of what becomes of them."""

    def evaluate(name, **options):
        if name.startswith("hf"):
            options |= {"task": "mnli", "data_path": there["mnli"]}
        result = evaluate_lib.evaluate(
            [there[name]], batch_sizes=[1], repeats=1, **options
        )
        return result | result["models"][0]

    return functools.cache(evaluate)


def test_every_split_has_its_score(evaluated):
    result = evaluated("three")
    for part in ("scores", "standard_errors", "differences", "difference_errors"):
        assert list(result[part]) == list(MNLI.validation)
    first, second = (scores["accuracy"] for scores in result["scores"].values())
    assert 0.1 < first < 0.7 and 0.1 < second < 0.7 and first != second
    assert result["score"] == first
    assert list(result["examples"].values()) == [40, 41]


@pytest.mark.parametrize("ours, theirs", [("three", "hf"), ("small", "hf_small")])
def test_hugging_face_folder(ours, theirs, evaluated, there):
    """Dense, and sliced with nothing but the dense sizes beside it."""
    first, second = evaluated(ours), evaluated(theirs)
    for key in ("task", "metric", "score", "scores", "examples", "params", "kept"):
        assert first[key] == second[key]
    assert first["multiply_adds"] == second["multiply_adds"]
    assert first["sparsity"] == pytest.approx(second["sparsity"])
    assert (second["sparsity"] > 0.3) == (ours == "small")
    weights = pathlib.Path(there[theirs], "model.safetensors")
    assert second["bytes"] == weights.stat().st_size


def test_labels_say_what_the_classes_are(evaluated):
    order = tuple(MNLI.labels[i] for i in OTHER_ORDER)
    whole = evaluated("three")["scores"]
    assert evaluated("hf_nameless", labels=order)["scores"] == whole
    assert evaluated("hf_nameless")["scores"] != whole
    assert evaluated("hf_named")["scores"] == whole  # its config.json tells
    assert evaluated("hf_named", labels=MNLI.labels)["scores"] != whole


def test_hugging_face_on_the_command_line(there, tmp_path, capsys):
    order = ",".join(MNLI.labels[i] for i in OTHER_ORDER)
    arguments = [f"--model={there[name]}" for name in ("hf_nameless", "hf_named")]
    arguments += ["--task=mnli", f"--labels={order}", f"--data={there['mnli']}"]
    arguments += ["--repeats=1", "--batch_size=1", f"--json={tmp_path / 'x.json'}"]
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "x.json").read_text())
    first, second = result["models"]
    assert first["scores"] == second["scores"]  # the order is that of both
    for split in MNLI.validation:
        assert f"| accuracy, {split} " in out
        assert f"{first['scores'][split]['accuracy']:.4f}" in out
    assert " speedup |" in out


def test_a_task_of_ones_own(there, tmp_path, capsys, evaluated):
    """It is described as for train.py; here by the columns of a task of the table."""
    for split in MNLI.validation[:1]:
        shutil.copy(pathlib.Path(there["mnli"], f"{split}.tsv"), tmp_path)
    text = (tmp_path / "validation_matched.tsv").read_text()
    text = text.replace(
        "premise\thypothesis\tlabel", "my premise\t2nd, text\tits class"
    )
    (tmp_path / "validation.tsv").write_text(text)
    arguments = ["--task=own", f"--data={tmp_path}", "--repeats=1", "--batch_size=1"]
    arguments += [f"--json={tmp_path / 'x.json'}", f"--model={there['hf']}"]
    arguments += ["--config.data.columns=('my premise', '2nd, text')"]
    arguments += ["--config.data.label_column", "its class"]
    arguments += [f"--config.data.labels={','.join(MNLI.labels)}"]
    arguments += ["--config.data.max_length=20"]
    status, _, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    found = json.loads((tmp_path / "x.json").read_text())["models"][0]
    its = evaluated("hf")["scores"]["validation_matched"]
    assert found["scores"] == {"validation": its}


def test_quotes_of_other_data(there, tmp_path, capsys):
    text = 'sentence\tlabel\n"fine" film\t1\n"dull\t0\n'
    (tmp_path / "validation.tsv").write_text(text)
    arguments = [f"--model={there['dense']}", f"--data={tmp_path}", "--repeats=1"]
    status, _, err = run(capsys, *arguments)
    assert status == 2 and "row 0 (the first is 0) has a cell that begins with" in err
    (flag,) = [word for word in err.split() if word.startswith("--config.")]
    status, out, err = run(capsys, *arguments, "--batch_size=1", flag)
    assert status == 0 and "Scores on 2 examples" in out
    assert err.count("\n") == 1 and "unknown to its tokenizer" in err  # quotes are


@pytest.mark.parametrize(
    "first, second, task",
    [
        ("small", "hf", ""),
        ("hf_small", "three", ""),
        ("hf", "small", "mnli"),
        ("hf", "hf_small", "mnli"),
    ],
)
def test_beside_each_other(first, second, task, evaluated, there):
    """A saved model brings the task and the rows for those of Hugging Face."""
    data = "" if {first, second} & {"small", "three"} else there["mnli"]
    result = evaluate_lib.evaluate(
        [there[first], there[second]],
        task=task,
        data_path=data,
        batch_sizes=[1],
        repeats=1,
    )
    for name, model in zip((first, second), result["models"], strict=True):
        assert model["scores"] == evaluated(name)["scores"]
    assert result["data"] == there["mnli"]


# name: (arguments, what the line must say)
BAD = {
    "no model": ([], ["--model", "required", "usage"]),
    "a second that is none": (
        ["--model={dense}", "--model={none}"],
        ["model='{none}'", "no such folder"],
    ),
    "no such path": (["--model={none}"], ["model='{none}'", "model.json", "nothing"]),
    "not a model": (["--model={notes}"], ["model='{notes}'", "todo.txt"]),
    "damaged": (["--model={damaged}"], ["model='{damaged}'", "params are damaged"]),
    "model.json": (["--model={nameless}"], ["model='{nameless}'", "model.json"]),
    "from a notebook": (["--model={bare}"], ["model='{bare}'", "without data"]),
    "pruned by hand": (["--model={rootless}"], ["'{rootless}'", "without dense"]),
    "a field to come": (["--model={newer}"], ["model='{newer}'", "tokens"]),
    "task of ours": (
        ["--model={dense}", "--task=sst2"],
        ["task='sst2'", "a saved model knows its own"],
    ),
    "labels of ours": (
        ["--model={dense}", "--labels=negative,positive"],
        ["labels=('negative', 'positive')", "a saved model knows its own"],
    ),
    "no task": (["--model={hf}"], ["task=''", "{hf}", "mnli", "squad"]),
    "no such task": (["--model={hf}", "--task=chess"], ["'chess'", "mnli"]),
    "nothing": (["--model={notes}", "--task=mnli"], ["'{notes}'", "todo.txt"]),
    "nowhere": (["--model={none}", "--task=mnli"], ["'{none}'", "no such folder"]),
    "labels missing": (
        ["--model={hf}", "--task=mnli", "--labels=neutral,entailment"],
        ["('neutral', 'entailment')", "permutation", "contradiction"],
    ),
    "labels misspelt": (
        ["--model={hf}", "--task=mnli", "--labels=neutral,entailment,no"],
        ["('neutral', 'entailment', 'no')", "permutation", "contradiction"],
    ),
    "labels of values": (
        ["--model={hf}", "--task=stsb", "--labels=low,high"],
        ["'{hf}'", "problem_type is 'single_label_classification'"],
    ),
    "classes": (["--model={hf}", "--task=sst2"], ["'{hf}'", "3 classes", "has 2"]),
    "no spans": (["--model={hf}", "--task=squad"], ["'{hf}'", "qa_outputs"]),
    "other classes": (
        ["--model={dense}", "--model={hf}"],
        ["model='{hf}'", "3 classes", "has 2"],
    ),
    "another task": (
        ["--model={dense}", "--model={three}"],
        ["model='{three}'", "'mnli'", "{dense} 'sst2'", "must be of one task"],
    ),
    "another task for the other": (
        ["--model={dense}", "--model={hf}", "--task=mnli"],
        ["model='{hf}'", "'mnli'", "{dense} 'sst2'", "must be of one task"],
    ),
    "task of both": (
        ["--model={dense}", "--model={pruned}", "--task=sst2"],
        ["task='sst2'", "a saved model knows its own"],
    ),
    "labels of neither": (
        ["--model={own}", "--model={own_turned}"],
        ["model='{own_turned}'", "('no', 'yes')", "('yes', 'no')", "one task"],
    ),
    "unknown task": (["--model={strange}"], ["'chess'", "demo, sst2, cola"]),
    "too long": (["--model={dense}", "--seq_length=21"], ["seq_length=21", "most 20"]),
    "too long for the other": (
        ["--model={dense}", "--model={short}", "--seq_length=4,10"],
        ["seq_length=10", "most 9", "{short}"],
    ),
    "no such data": (
        ["--model={dense}", "--data={none}"],
        ["'{none}'", "local folder", "--data"],
    ),
    "data without rows": (["--model={dense}", "--data={notes}"], ["'{notes}'", "todo"]),
    "data of nowhere": (["--model={homeless}"], ["data.path=''", "--data"]),
    "json of nowhere": (
        ["--model={dense}", "--json={none}/x.json"],
        ["--json='{none}/x.json'", "folder that exists"],
    ),
    "unknown flag": (["--model={dense}", "--modle=x"], ["--modle=x", "usage"]),
    "stray": (["--model={dense}", "{none}"], ["{none}", "usage"]),
    "no number": (["--model={dense}", "--repeats=x"], ["--repeats: 'x'", "usage"]),
    "no turns": (["--model={dense}", "--repeats=0"], ["--repeats: '0'", "usage"]),
    "negative": (
        ["--model={dense}", "--batch_size=1,-1"],
        ["--batch_size: '-1'", "above 0"],
    ),
    "no batch": (["--model={dense}", "--batch_size=0"], ["--batch_size: '0'"]),
    "no list": (
        ["--model={dense}", "--seq_length=4;8"],
        ["--seq_length: '4;8'", "above 0"],
    ),
    "too large": (["--model={dense}", "--batch_size=4294967296"], ["4294967296"]),
    "dtype": (
        ["--model={dense}", "--dtype=float16"],
        ["dtype='float16'", "float32, bfloat16"],
    ),
    "runtime": (
        ["--model={dense}", "--runtime=onnx,tensorrt"],
        ["--runtime='tensorrt'", "jax, onnx, onnx-int8"],
    ),
    "dtype of another runtime": (
        ["--model={dense}", "--runtime=onnx", "--dtype=bfloat16"],
        ["--dtype='bfloat16'", "--runtime jax alone"],
    ),
    "own without columns": (
        ["--model={hf}", "--task=own"],
        ["data.columns=()", "--config.data.columns=title,body"],
    ),
    "own without classes": (
        ["--model={hf}", "--task=own", "--config.data.columns=a"],
        ["data.labels=()", "--config.data.labels=no,yes"],
    ),
    "own of other classes": (
        [
            "--model={hf}",
            "--task=own",
            "--config.data.columns=a",
            "--config.data.labels=x,y,z",
        ],
        ["'{hf}'", "names its classes", "in the order of the model: labels"],
    ),
    "own with a task of the table": (
        ["--model={hf}", "--task=mnli", "--config.data.columns=a"],
        ["data.columns=('a',)", "only the task own takes it, not mnli"],
    ),
    "own of a saved model": (
        ["--model={own}", "--config.data.columns=a"],
        ["--config.data.columns=('a',)", "a saved model knows its own"],
    ),
    "labels elsewhere for a task of the table": (
        ["--model={dense}", "--config.data.label_column=gold"],
        ["data.label_column='gold'", "only the task own takes it, not sst2"],
    ),
    "own with a wrong length": (
        ["--model={hf}", "--task=mnli", "--config.data.max_length=2"],
        ["data.max_length=2", "at least 3"],
    ),
    "task twice": (
        ["--model={hf}", "--config.data.task=own"],
        ["--config.data.task='own'", "is --task here"],
    ),
    "rows of training": (
        ["--model={dense}", "--config.data.extra_file=x.csv"],
        ["--config.data.extra_file='x.csv'", "not for eval.py"],
    ),
    "a field of training": (
        ["--model={dense}", "--config.seed=1"],
        ["--config.seed=1", "not for eval.py"],
    ),
    "no such field": (
        ["--model={hf}", "--config.data.column=a"],
        ["--config.data.column='a'", "no such field", "columns"],
    ),
    "of old": (["--model={dense}", "--against={dense}"], ["--against=", "usage"]),
}


@pytest.fixture
def offline(monkeypatch):
    import datasets
    import huggingface_hub

    for library in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, there, capsys, offline):
    arguments, fragments = BAD[case]
    status, out, err = run(capsys, *(a.format(**there) for a in arguments))
    assert (status, out) == (2, "")
    (line,) = [text for text in err.splitlines() if text.startswith("error: ")]
    assert "Traceback" not in err
    for fragment in fragments:
        assert fragment.format(**there) in line


def test_process_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, "eval.py", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: model='{tmp_path / 'none'}': must be")
    assert done.stdout == ""
