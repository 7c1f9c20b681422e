"""What eval.py says of a saved model is what its parameters say by hand."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import random_params

import eval as program  # the name of a built-in
from cofi_jax import checkpoint, grammar, masks, slicing
from cofi_jax.config import KINDS
from cofi_jax.model import EncoderConfig

ROOT = pathlib.Path(__file__).parents[1]
ROWS = grammar.generate(70, seed=3)  # more than a batch of the scoring
DENSE = EncoderConfig(
    vocab_size=len(grammar.demo_tokenizer()),
    hidden_size=16,
    heads=(2, 2),
    head_size=8,
    intermediate=(32, 32),
    pooler_size=16,
    num_labels=2,
    max_positions=20,
)
ABOUT = {"task": "sst2", "metric": "accuracy", "max_length": 20, "buckets": [8, 20]}


def removal():
    """A head, all of a feed-forward block, half of another, three dimensions."""
    gates = {k: np.ones(s) for k, s in masks.mask_shapes(DENSE, KINDS).items()}
    gates["head"][0, 1] = 0
    gates["ffn"][1] = 0
    gates["intermediate"][0, ::2] = 0
    gates["hidden"][[3, 4, 9]] = 0
    return gates


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Folders that command lines name: `{dense}`, `{pruned}`, `{data}`, ..."""
    top = tmp_path_factory.mktemp("there")
    (top / "data").mkdir()
    lines = [f"{sentence}\t{label}\n" for sentence, label in ROWS]
    (top / "data" / "validation.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    (top / "notes").mkdir()
    (top / "notes" / "todo.txt").write_text("not a model")

    params = random_params(DENSE, seed=0)
    small, spec = slicing.prune(params, removal(), DENSE)
    short = dataclasses.replace(DENSE, max_positions=9)
    more = {"data_path": str(top / "data"), "dense": dataclasses.asdict(DENSE)}
    for name, model, sizes, kept, about in (
        ("dense", params, DENSE, None, ABOUT | more),
        ("pruned", small, spec.config(DENSE), spec, ABOUT | more),
        ("bare", params, DENSE, None, {}),
        ("strange", params, DENSE, None, ABOUT | more | {"task": "chess"}),
        ("homeless", params, DENSE, None, ABOUT),
        ("short", random_params(short, seed=0), short, None, {}),
    ):
        checkpoint.save_model(
            top / name,
            model,
            sizes,
            kept,
            tokenizer=grammar.demo_tokenizer(),
            about=about,
        )
    for name, damage in (("damaged", damage_params), ("nameless", damage_about)):
        shutil.copytree(top / "dense", top / name)
        damage(top / name)
    return {path.name: str(path) for path in top.iterdir()} | {
        "none": str(top / "none")
    }


def damage_params(folder):
    for file in (folder / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_about(folder):
    (folder / "model.json").write_text('{"format": 1')


def run(capsys, *arguments):
    status = program.main(["eval.py", *arguments])
    return status, *capsys.readouterr()


def encoder_size(params):
    """Weights and biases of attention and feed-forward blocks, counted one by one."""
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if {"attention", "ffn"} & {key.key for key in path}
    )


def accuracy_by_hand(path):
    model, params, _ = checkpoint.load_model(path)
    tokenizer = checkpoint.load_tokenizer(path)
    sentences, labels = zip(*ROWS, strict=True)
    batch = tokenizer(list(sentences), padding="max_length", max_length=20)
    batch = {name: np.array(rows, np.int32) for name, rows in batch.items()}
    logits = jax.jit(model.apply)({"params": params}, batch).logits
    return np.mean(np.argmax(logits, -1) == np.array(labels))


@pytest.mark.parametrize("name", ["dense", "pruned"])
def test_numbers(name, there, tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--repeats=3", "--batch_size=2", "--seq_length=12", f"--json={file}"]
    status, out, err = run(capsys, f"--model={there[name]}", *arguments)
    assert (status, err) == (0, "")
    result = json.loads(file.read_text())

    params = checkpoint.load_model(there[name])[1]
    size = encoder_size(params)
    dense_size = encoder_size(checkpoint.load_model(there["dense"])[1])
    assert result["score"] == pytest.approx(accuracy_by_hand(there[name]))
    assert 0.2 < result["score"] < 0.8  # of a random model: neither class alone
    assert result["examples"] == len(ROWS)
    assert result["params"] == {
        "encoder": size,
        "total": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    assert result["sparsity"] == pytest.approx(1 - size / dense_size)
    assert (result["sparsity"] > 0.3) == (name == "pruned")
    how = result["benchmark"]
    assert (how["batch_size"], how["seq_length"], how["repeats"]) == (2, 12, 3)
    assert how["dtype"] == "float32"
    assert how["device"].startswith("cpu") or jax.default_backend() != "cpu"
    assert result["latency_ms"]["model"] > 0
    assert "speedup" not in result

    for text in (
        there[name],
        f"{result['score']:.4f} of 70 examples",
        f"{100 * result['sparsity']:.1f} %",
        "latency of a batch",
        f"on {how['device']}, float32, batches of 2 x 12 tokens, median of 3",
    ):
        assert text in out
    heads = "1 2" if name == "pruned" else "2 2"
    assert [heads in line for line in out.splitlines() if "heads" in line] == [True]


def test_kept_widths_are_those_of_the_masks(there):
    result = program.evaluate(there["pruned"], batch_size=1, repeats=1)
    kept = {"hidden": 13, "heads": [1, 2], "intermediate": [16, 0]}
    assert result["kept"] == kept
    # By default as long as the model can read, where that is shorter.
    assert result["benchmark"]["seq_length"] == 20


def test_against_adds_the_speedup(there, capsys):
    arguments = [f"--against={there['dense']}", "--repeats=3", "--batch_size=1"]
    status, out, err = run(capsys, f"--model={there['pruned']}", *arguments)
    assert (status, err) == (0, "")
    assert "| speedup " in out
    assert f"{accuracy_by_hand(there['pruned']):.4f} of 70" in out


def test_other_data(there, tmp_path, capsys):
    tsv = pathlib.Path(there["data"], "validation.tsv").read_text().splitlines()
    (tmp_path / "validation.tsv").write_text("\n".join(tsv[:6]) + "\n")
    arguments = [f"--data={tmp_path}", "--repeats=1", "--batch_size=1"]
    status, out, err = run(capsys, f"--model={there['homeless']}", *arguments)
    assert (status, err) == (0, "")
    assert "of 5 examples" in out


# name: (arguments, what the line must say)
BAD = {
    "no model": ([], ["--model=None", "usage"]),
    "no such path": (["--model={none}"], ["model='{none}'", "model.json", "nothing"]),
    "not a model": (["--model={notes}"], ["model='{notes}'", "todo.txt"]),
    "damaged": (["--model={damaged}"], ["model='{damaged}'", "params are damaged"]),
    "model.json": (["--model={nameless}"], ["model='{nameless}'", "model.json"]),
    "from a notebook": (["--model={bare}"], ["model='{bare}'", "max_length", "task"]),
    "unknown task": (["--model={strange}"], ["'chess'", "demo, sst2, cola"]),
    "too long": (["--model={dense}", "--seq_length=21"], ["seq_length=21", "most 20"]),
    "too long for the other": (
        ["--model={dense}", "--against={short}", "--seq_length=10"],
        ["seq_length=10", "most 9"],
    ),
    "no such rival": (["--model={dense}", "--against={none}"], ["'{none}'"]),
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
    "unknown flag": (["--model={dense}", "--modle=x"], ["'modle'", "usage"]),
    "stray": (["{dense}"], ["'{dense}'", "usage"]),
    "no number": (["--model={dense}", "--repeats=x"], ["repeats=x", "usage"]),
    "negative": (["--model={dense}", "--batch_size=-1"], ["batch_size=-1", "usage"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, there, capsys):
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
