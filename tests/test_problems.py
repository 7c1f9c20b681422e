"""A kind of output is one class: nothing else in the package knows of it."""

import ast
import json
import pathlib

import jax
import numpy as np
import pytest

import cofi_jax as cofi
from cofi_jax import config as config_lib
from cofi_jax.checkpoints import huggingface
from cofi_jax.data import tasks
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import UserError
from cofi_jax.export import to_onnx, to_stock_bert, to_transformers
from cofi_jax.models.config import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

PACKAGE = pathlib.Path(cofi.__file__).parent

LABELS = ("a", "b", "c")


def test_no_other_module_names_a_kind():
    """But for the kinds of the table's tasks, and for the one that is the default."""
    known = {task.problem.name for task in tasks.TASKS.values()}
    kinds = PROBLEMS.keys() - known
    assert {"multilabel", "entities", "ranking"} <= kinds
    for path in PACKAGE.rglob("*.py"):
        if path.parent != PACKAGE / "data" / "problems":
            tree = ast.walk(ast.parse(path.read_text()))
            said = {node.value for node in tree if isinstance(node, ast.Constant)}
            assert not kinds & {x for x in said if isinstance(x, str)}, path


def model_of(kind):
    """The sizes and parameters of a small model, a batch, and what it gives."""
    problem = PROBLEMS[kind]
    every = problem.head == "every"
    config = EncoderConfig(
        vocab_size=30,
        hidden_size=16,
        heads=(2,),
        head_size=8,
        intermediate=(16,),
        pooler_size=0 if every else 16,
        num_labels=problem.num_outputs(LABELS),
        max_positions=24,
        dropout=0.0,
        problem=kind,
        head="every" if every else "",
    )
    params = cofi.init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(3 * x), params)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    logits = cofi.Encoder(config).apply({"params": params}, batch).logits
    assert np.std(logits) > 0.01
    return config, params, batch, logits


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("multilabel", to_onnx),
        ("entities", to_onnx),
        pytest.param("multilabel", to_transformers, marks=pytest.mark.torch),
        pytest.param("multilabel", to_stock_bert, marks=pytest.mark.torch),
        pytest.param("entities", to_transformers, marks=pytest.mark.torch),
        pytest.param("entities", to_stock_bert, marks=pytest.mark.torch),
    ],
)
def test_a_kind_in_other_runtimes(kind, runtime, tmp_path, code_cache):
    config, params, batch, expected = model_of(kind)
    assert expected.shape == ((2, 6, 3) if kind == "entities" else (2, 3))
    runtime.write(tmp_path, params, config, LABELS)
    fields = json.loads((tmp_path / "config.json").read_text())
    (architecture,) = fields["architectures"]
    assert architecture.endswith(f"For{PROBLEMS[kind].auto_model}")
    assert fields["problem_type"] == PROBLEMS[kind].problem_type
    if runtime is to_onnx:
        pytest.importorskip("onnxruntime")
    found = runtime.load(tmp_path)(batch)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("runtime", [to_transformers, to_stock_bert])
@pytest.mark.parametrize("kind", ["multilabel", "entities"])
def test_the_loss_of_labels_is_that_of_transformers(
    kind, runtime, tmp_path, code_cache
):
    import torch

    config, params, batch, logits = model_of(kind)
    labels = np.array([[1, 0, 1], [0, 0, 0]], np.float32)
    theirs = torch.tensor(labels)
    if kind == "entities":  # Transformers has -100 where we have -1: no label.
        labels = np.array([[-1, 2, 0, -1, 1, -1], [-1, 1, 0, 2, 2, -1]], np.int16)
        theirs = torch.tensor(np.where(labels < 0, -100, np.int64(labels)))
    runtime.write(tmp_path, params, config, LABELS)
    model = to_transformers.load_torch(tmp_path)
    inputs = {k: torch.tensor(np.asarray(v, np.int64)) for k, v in batch.items()}
    theirs = model(**inputs, labels=theirs).loss.item()
    rows = batch | {"labels": labels, "weight": np.ones(2, np.float32)}
    ours = PROBLEMS[kind].loss(logits, rows)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)


@pytest.mark.parametrize("kind", ["multilabel", "entities"])
def test_labels_go_to_hugging_face_and_back(kind, tmp_path):
    config, params, *_ = model_of(kind)
    cofi.save_hugging_face(tmp_path / "hub", params, config, labels=LABELS)
    how = {"field": "model", "labels": LABELS, "model": config_lib.Model(dropout=0.0)}
    how["label_order"] = ("c", "a", "b")  # as if it were; so a is its second
    again, found = huggingface.load_classifier(tmp_path / "hub", problem=kind, **how)
    assert again == config
    kernel = params["classifier"]["kernel"]
    np.testing.assert_array_equal(found["classifier"]["kernel"], kernel[:, [1, 2, 0]])
    said = "problem_type is 'multi_label_classification'|fine-tuned for class"
    with pytest.raises(UserError, match=said):
        huggingface.load_classifier(tmp_path / "hub", problem="classification", **how)
