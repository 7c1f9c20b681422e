"""The ONNX graph: our model's logits, what runtimes fuse, what servers ask."""

import collections
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import random_params
from transformers import AutoConfig, BertConfig

from cofi_jax.errors import UserError
from cofi_jax.export import to_onnx
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.layers import ACTIVATIONS

onnx = pytest.importorskip("onnx")


ort = pytest.importorskip("onnxruntime")


pytestmark = pytest.mark.usefixtures("quick_compile")


LONGEST = 12


# Heads and feed-forward units of each layer.
STRUCTURES = {
    "dense": [(3, 16), (3, 16)],
    "ragged": [(3, 5), (1, 0), (0, 0), (2, 16)],
    "last attention in the middle": [(0, 7), (2, 0), (0, 6), (0, 3)],
    "nothing in the last layer": [(1, 4), (3, 0), (0, 0)],
    "no attention": [(0, 5), (0, 0)],
    "nothing at all": [(0, 0), (0, 0)],
}


def sizes(structure="ragged", family="bert", problem="classification", **others):
    layers = STRUCTURES[structure] if isinstance(structure, str) else structure
    offset = 0 if family == "bert" else 2
    return EncoderConfig(
        **{
            "vocab_size": 31,
            "hidden_size": 22,
            "heads": tuple(heads for heads, _ in layers),
            "head_size": 8,
            "intermediate": tuple(width for _, width in layers),
            "pooler_size": 0 if problem == "span" else 24,  # the dense model's width
            "num_labels": {"span": 2, "regression": 1}.get(problem, 3),
            "max_positions": LONGEST + offset,
            "type_vocab_size": 2 if family == "bert" else 1,
            "layer_norm_eps": 1e-12 if family == "bert" else 1e-5,
            "problem": problem,
            "model_type": family,
            "position_offset": offset,
        }
        | others
    )


def drawn(seed):
    """A random structure of up to five layers, each block absent one time in three."""
    rng = np.random.default_rng(seed)
    present = rng.random((rng.integers(1, 6), 2)) < 2 / 3
    widths = rng.integers(1, (5, 18), present.shape)
    return [tuple(map(int, row)) for row in present * widths]


def batch_of(config, rows=3, length=7, seed=0):
    """Pairs of texts, the last padded to less than half, the first full."""
    rng = np.random.default_rng(seed)
    real = np.arange(length) < np.linspace(length, max(length // 3, 1), rows)[:, None]
    pairs = (np.arange(length) > length // 3) & (config.type_vocab_size > 1)
    return {
        "input_ids": np.where(real, rng.integers(3, 31, real.shape), 1).astype("int32"),
        "attention_mask": real.astype("int32"),
        "token_type_ids": (real & pairs).astype("int32"),
    }


def logits_of(config, params, batch):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(Encoder(config).apply)({"params": params}, batch)[0])


def written(folder, config, seed=0, labels=()):
    params = random_params(config, seed)
    folder.mkdir(exist_ok=True)
    to_onnx.write(folder, params, config, labels)
    return params


def assert_same(folder, config, seed=0, shapes=((3, 7),)):
    params = written(folder, config, seed)
    predict = to_onnx.load(folder)
    for shape in shapes:
        batch = batch_of(config, *shape, seed)
        expected = logits_of(config, params, batch)
        found = predict(batch)
        assert found.dtype == np.float32
        assert expected.std() > 0.01
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, strict=True)


# The function.


@pytest.mark.parametrize(
    ("structure", "family", "problem"),
    [
        *((structure, "bert", "classification") for structure in STRUCTURES),
        ("ragged", "roberta", "classification"),
        ("ragged", "bert", "span"),
        ("no attention", "bert", "span"),
        ("last attention in the middle", "roberta", "span"),
    ],
)
def test_computes_what_our_model_does(tmp_path, structure, family, problem):
    assert_same(tmp_path, sizes(structure, family, problem))


def test_a_distilbert(tmp_path):
    distilbert = {"type_vocab_size": 1, "pooler_activation": "relu"}
    assert_same(
        tmp_path, sizes("ragged", "distilbert", position_offset=0, **distilbert)
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_structures(tmp_path, seed):
    family = ("bert", "xlm-roberta")[seed % 2]
    problem = ("classification", "span", "regression")[seed % 3]
    assert_same(tmp_path, sizes(drawn(seed), family, problem), seed)


@pytest.mark.parametrize("problem", ["classification", "span"])
def test_any_batch_and_length_in_one_session(tmp_path, problem):
    shapes = [(1, 1), (3, 7), (2, LONGEST), (1, 1)]
    assert_same(tmp_path, sizes(problem=problem), shapes=shapes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(tmp_path, activation):
    assert_same(tmp_path, sizes([(1, 7)], activation=activation))


def test_a_row_of_padding_alone(tmp_path):
    """Servers pad batches so; as in our model, it then attends to everything."""
    config = sizes()
    params, batch = written(tmp_path, config), batch_of(config)
    batch["attention_mask"][1] = 0
    expected = logits_of(config, params, batch)
    np.testing.assert_allclose(
        to_onnx.load(tmp_path)(batch), expected, rtol=0, atol=1e-5
    )


def test_padding_does_not_matter(tmp_path):
    config = sizes()
    written(tmp_path, config)
    predict, batch = to_onnx.load(tmp_path), batch_of(config, 1, 5)
    batch["attention_mask"][:] = 1
    longer = {k: np.pad(v, ((0, 0), (0, 6))) for k, v in batch.items()}
    longer["input_ids"][:, 5:] = 9
    np.testing.assert_allclose(predict(longer), predict(batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_longer_texts_than_the_position_table_are_refused(tmp_path, family):
    config = sizes(family=family)
    written(tmp_path, config)
    batch = batch_of(config, 2, LONGEST + 1)
    with pytest.raises(Exception, match=f"at_most_{LONGEST}_tokens"):
        to_onnx.load(tmp_path)(batch)


def test_the_parameters_stay_as_they_are(tmp_path):
    config = sizes()
    params, untouched = written(tmp_path, config), random_params(config, 0)
    jax.tree.map(np.testing.assert_array_equal, params, untouched)


def test_jax_arrays_give_the_same_bytes(tmp_path):
    config = sizes()
    params = written(tmp_path / "numpy", config)
    (tmp_path / "jax").mkdir()
    to_onnx.write(tmp_path / "jax", jax.device_put(params), config, ())
    numpys, jaxs = (tmp_path / name / "model.onnx" for name in ("numpy", "jax"))
    assert numpys.read_bytes() == jaxs.read_bytes()


# The file.


@pytest.mark.parametrize("problem", ["classification", "regression", "span"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_graph_is_legal_and_has_the_names_that_servers_ask(
    tmp_path, family, problem
):
    config = sizes(family=family, problem=problem)
    written(tmp_path, config)
    path = tmp_path / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert model.ir_version == 8
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
    session = ort.InferenceSession(path)
    shape = ["batch_size", "sequence_length"]
    names = ["input_ids", "attention_mask", "token_type_ids"]
    assert [(x.name, x.type, x.shape) for x in session.get_inputs()] == [
        (name, "tensor(int64)", shape) for name in names[: 3 - (family == "roberta")]
    ]
    outputs = [(x.name, x.type, x.shape) for x in session.get_outputs()]
    single = ["batch_size", config.num_labels]
    assert outputs == (
        [(f"{end}_logits", "tensor(float)", shape) for end in ("start", "end")]
        if problem == "span"
        else [("logits", "tensor(float)", single)]
    )


def test_every_constant_is_read_once_written(tmp_path):
    """Of the sizes of our parameters; nothing is stored that no node reads."""
    config = sizes("ragged")
    params = written(tmp_path, config)
    graph = onnx.load(tmp_path / "model.onnx").graph
    read = {name for node in graph.node for name in node.input}
    constants = {each.name: each for each in graph.initializer}
    assert set(constants) <= read
    stored = sum(
        np.prod(x.dims)
        for x in constants.values()
        if x.data_type == onnx.TensorProto.FLOAT and x.dims
    )
    assert stored == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_large_model_lies_beside_its_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx, "_LARGE", 1000)
    config = sizes()
    params = written(tmp_path, config)
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    assert data.stat().st_size > 31 * 22 * 4
    graph = onnx.load(path, load_external_data=False).graph
    words = next(
        x for x in graph.initializer if x.name.endswith("word_embeddings.weight")
    )
    assert not words.raw_data
    onnx.checker.check_model(str(path), full_check=True)
    batch = batch_of(config)
    np.testing.assert_allclose(
        to_onnx.load(tmp_path)(batch), logits_of(config, params, batch), atol=1e-5
    )


def test_runs_where_there_is_only_onnxruntime(tmp_path):
    config = sizes()
    params, batch = written(tmp_path, config), batch_of(config)
    np.savez(tmp_path / "batch.npz", **{k: v.astype("int64") for k, v in batch.items()})
    program = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
numpy.save("logits.npy", session.run(["logits"], dict(numpy.load("batch.npz")))[0])
assert not {"jax", "flax", "torch", "onnx", "cofi_jax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), logits_of(config, params, batch), atol=1e-5
    )


# What onnxruntime makes of it.


def optimised(path, **lengths):
    """How many nodes of each kind a session of the default settings runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # of the file that it writes
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    for name, length in lengths.items():
        options.add_free_dimension_override_by_name(name, length)
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path.with_name("optimised.onnx")).graph
    return collections.Counter(node.op_type for node in graph.node)


FIXED = [{}, {"sequence_length": 7}, {"batch_size": 3, "sequence_length": 7}]


@pytest.mark.parametrize("lengths", FIXED, ids=str)
def test_residuals_and_layer_norms_stay_apart(tmp_path, lengths):
    """Joined, they are several times as slow on a CPU."""
    for problem in ("classification", "span"):
        written(tmp_path, sizes("dense", problem=problem))
        found = optimised(tmp_path / "model.onnx", **lengths)
        assert found["LayerNormalization"] == 5
        assert not [name for name in found if "Skip" in name]


def test_onnxruntime_joins_them_in_other_graphs(tmp_path):
    """So the test above can fail: the same two nodes, of three axes."""
    helper, kinds = onnx.helper, onnx.TensorProto
    shape = ["batch_size", "sequence_length", 22]

    def infos(*names):
        return [helper.make_tensor_value_info(x, kinds.FLOAT, shape) for x in names]

    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "one", "one"], ["z"]),
    ]
    one = onnx.numpy_helper.from_array(np.ones(22, np.float32), "one")
    graph = helper.make_graph(nodes, "joined", infos("x", "y"), infos("z"), [one])
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.save_model(model, tmp_path / "model.onnx")
    assert optimised(tmp_path / "model.onnx")["SkipLayerNormalization"] == 1


@pytest.mark.parametrize(
    ("activation", "joined"),
    [
        ("gelu", "Gelu"),
        ("gelu_new", "FastGelu"),
        ("relu", "FusedGemm"),
        ("silu", "QuickGelu"),
    ],
)
def test_activations_become_one_node(tmp_path, activation, joined):
    written(tmp_path, sizes("dense", activation=activation))
    found = optimised(tmp_path / "model.onnx")
    assert found[joined] >= 2
    assert not found["Erf"] + found["Pow"] + found["Sigmoid"] + found["Div"]
    assert found["Gemm"] + found["FusedGemm"] == 2 * 4 + 1 + 2  # the last: 2 packs


def test_few_nodes(tmp_path):
    """17 for attention and its LayerNorm, 5 for the feed-forward block and its own."""
    counts = []
    for layers in (2, 3):
        written(tmp_path, sizes([(3, 16)] * layers))
        counts.append(optimised(tmp_path / "model.onnx").total())
    assert counts[1] - counts[0] <= 22


# What lies beside the graph.


def described(folder):
    return json.loads((folder / "config.json").read_text())


def test_files(tmp_path):
    written(tmp_path, sizes())
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "config.json",
        "export.json",
    }
    assert not (tmp_path / "model.onnx.data").stat().st_size


@pytest.mark.parametrize(
    ("structure", "family"),
    [*((structure, "bert") for structure in STRUCTURES), ("ragged", "camembert")],
)
def test_config_is_what_text_embeddings_inference_reads(tmp_path, structure, family):
    """Its router's required fields and their types, and how it finds a classifier."""
    labels = ("no", "perhaps", "yes")
    config = sizes(structure, family)
    written(tmp_path, config, labels=labels)
    fields = described(tmp_path)
    required = {
        "architectures": list,
        "model_type": str,
        "max_position_embeddings": int,
        "hidden_size": int,
        "num_hidden_layers": int,
        "num_attention_heads": int,
        "intermediate_size": int,
        "pad_token_id": int,
        "vocab_size": int,
        "id2label": dict,
        "label2id": dict,
    }
    for name, kind in required.items():
        assert type(fields[name]) is kind, name
    assert fields["model_type"] == "bert"  # adds no offset to the longest input
    assert fields["max_position_embeddings"] == config.longest == LONGEST
    assert fields["num_hidden_layers"] == len(config.heads)
    assert fields["architectures"][0].endswith("Classification")
    assert fields["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
    assert fields["label2id"] == {"no": 0, "perhaps": 1, "yes": 2}
    assert fields["problem_type"] == "single_label_classification"
    assert fields["torch_dtype"] == "float32"
    assert "auto_map" not in fields
    # It is legal to transformers, too.
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, BertConfig)
    assert theirs.id2label == dict(enumerate(labels))


def test_a_dense_model_is_described_as_it_is(tmp_path):
    config = sizes("dense", hidden_size=24)
    written(tmp_path, config)
    fields = described(tmp_path)
    assert fields["num_attention_heads"] == 3
    assert fields["intermediate_size"] == 16
    assert fields["hidden_size"] == 24


@pytest.mark.parametrize(
    ("problem", "architecture", "kind"),
    [
        ("regression", "BertForSequenceClassification", "regression"),
        ("span", "BertForQuestionAnswering", None),
    ],
)
def test_other_problems_in_the_config(tmp_path, problem, architecture, kind):
    written(tmp_path, sizes(problem=problem))
    fields = described(tmp_path)
    assert fields["architectures"] == [architecture]
    assert fields["problem_type"] == kind


def test_labels_of_another_task(tmp_path):
    with pytest.raises(UserError, match="^labels=.*3 classes, labels has 2") as caught:
        written(tmp_path, sizes(), labels=("no", "yes"))
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.torch
@pytest.mark.parametrize("problem", ["classification", "span"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_transformers_runs_it(tmp_path, family, problem):
    import torch

    pytest.importorskip("onnxscript")
    exporters = pytest.importorskip("transformers.exporters")
    config = sizes(family=family, problem=problem)
    params, batch = written(tmp_path, config), batch_of(config)
    model = exporters.ExportedModel.from_pretrained(tmp_path)
    tensors = {k: torch.from_numpy(v.astype(np.int64)) for k, v in batch.items()}
    found = model(**tensors)
    if problem == "span":
        found = torch.stack([found.start_logits, found.end_logits], -1)
    else:
        found = found.logits
    expected = logits_of(config, params, batch)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
