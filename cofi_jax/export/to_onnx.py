"""A model as an ONNX graph, for runtimes that know neither JAX nor PyTorch.

The folder holds the graph and what those runtimes read beside it:

    model.onnx        opset 17, any batch and length; int64 in, float32 logits out
    model.onnx.data   the parameters of a large model, else empty
    config.json       reads as an ordinary BERT's, for servers that look at it
    export.json       for `transformers.exporters.ExportedModel`

The graph is written node by node from the arrays. Hidden states are matrices of all
tokens, (B * T, D), for two reasons: each linear layer is a single Gemm, and onnxruntime
does not fuse the residual's Add with its LayerNormalization, as it does for three axes.
On a CPU the fused node takes several times as long. Where the head reads the first
token alone, nothing else is computed behind the last attention block.

Shapes: B batch, T tokens, D hidden dimensions, H heads, d width of a head.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cofi_jax.checkpoints.hf_config import UnsupportedCheckpoint, to_fields
from cofi_jax.checkpoints.hf_names import bert_form, to_torch
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import reject
from cofi_jax.export.formats import Format
from cofi_jax.models.bert import Batch
from cofi_jax.models.config import EncoderConfig

_OPSET, _IR = 17, 8  # Both are of 2022.
_LARGE = 1_500_000_000  # In bytes; a protobuf holds at most 2**31.
_DIMS = ["batch_size", "sequence_length"]


def write(
    folder: Path, params: dict, config: EncoderConfig, labels: Sequence[str]
) -> None:
    """Writes the graph and the files that describe it: see `Format.write`.

    Raises:
      UserError: where there is not one label for each class.
    """
    folder = Path(folder)
    pad = config.pad_token_id  # BERT's form would have another one.
    params, config = bert_form(params, config)
    fields = _describe(config, labels) | {"pad_token_id": pad}
    graph, inputs, outputs = _encoder(params, config)
    _save(graph, inputs, outputs, folder / "model.onnx")
    manifest = _manifest(fields["architectures"][0], inputs, outputs, config)
    for name, content in (("config", fields), ("export", manifest)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def load(folder: Path, *, threads: int = 0) -> Callable[[Batch], np.ndarray]:
    """Opens the graph in onnxruntime on the CPU: see `Format.load`.

    Args:
      folder: what `write` wrote.
      threads: the number of threads; 0 for onnxruntime's choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    path, providers = Path(folder) / "model.onnx", ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    names = [each.name for each in session.get_inputs()]

    def predict(batch: Batch) -> np.ndarray:
        feed = {name: np.asarray(batch[name]).astype(np.int64) for name in names}
        logits = session.run(None, feed)
        return logits[0] if len(logits) == 1 else np.stack(logits, -1)

    return predict


class _Graph:
    """The nodes of a graph in their order, and the constants that they read."""

    def __init__(self, constants: dict[str, np.ndarray]):
        self.constants = constants
        self.nodes: list[tuple] = []

    def __call__(self, op, *inputs, name="", to=(), **attributes):
        """Adds a node and returns the name of its output, or the names of several.

        Args:
          op: the operator.
          *inputs: names of tensors, or arrays, which become constants.
          name: of the node; "" for a new one.
          to: names of the outputs; () for one that is called like the node.
          **attributes: those of the operator.
        """
        name = name or f"{op}_{len(self.nodes)}"
        inputs = [
            each if isinstance(each, str) else self.constant(f"{name}.{i}", each)
            for i, each in enumerate(inputs)
        ]
        to = to or (name,)
        self.nodes.append((op, inputs, list(to), name, attributes))
        return to[0] if len(to) == 1 else to

    def constant(self, name, value):
        self.constants[name] = np.asarray(value)
        return name


def _encoder(params, config):
    """Returns the graph, the names of its inputs, and its outputs' shapes by name."""
    tensors = to_torch(params, config, "bert.")
    graph = _Graph({k: np.asarray(v, np.float32) for k, v in tensors.items()})
    inputs = ["input_ids", "attention_mask", "token_type_ids"]
    if config.type_vocab_size == 1:
        inputs.pop()
    lengths = graph("Shape", "input_ids")  # (B, T)
    x = _embed(graph, config, lengths)
    mask = graph("Greater", "attention_mask", np.int64(0))
    mask = graph("Where", mask, np.float32(0), np.float32(-1e9))
    mask = graph("Unsqueeze", mask, np.array([1, 2]))  # (B, 1, 1, T)

    def first(x):  # The first token of each text: from (B * T, D) to (B, D).
        shape = graph("Concat", lengths, np.array([config.hidden_size]), axis=0)
        return graph("Gather", graph("Reshape", x, shape), np.int64(0), axis=1)

    attending = [i for i, heads in enumerate(config.heads) if heads]
    last = attending[-1] if attending and not config.reads_every_token else None
    widths = zip(config.heads, config.intermediate, strict=True)
    for i, (heads, width) in enumerate(widths):
        at = f"bert.encoder.layer.{i}"
        if heads:
            rows = first(x) if i == last else x
            y = _attend(graph, f"{at}.attention", x, rows, lengths, mask, config, heads)
            x = _norm(graph, f"{at}.attention.output", graph("Add", rows, y), config)
        if width:
            y = _linear(graph, f"{at}.intermediate.dense", x)
            y = _ACTIVATIONS[config.activation](graph, y)
            y = _linear(graph, f"{at}.output.dense", y)
            x = _norm(graph, f"{at}.output", graph("Add", x, y), config)
    problem = PROBLEMS[config.problem]
    if config.reads_every_token:
        y = _linear(graph, problem.classifier, x)  # (B * T, C)
        if len(problem.outputs) == 1:
            shape = graph("Concat", lengths, np.array([config.num_labels]), axis=0)
            graph("Reshape", y, shape, to=problem.outputs)
            return graph, inputs, {problem.outputs[0]: [*_DIMS, config.num_labels]}
        outputs = dict.fromkeys(problem.outputs, _DIMS)
        columns = graph("Split", y, axis=1, to=[f"{name}_column" for name in outputs])
        for column, name in zip(columns, outputs, strict=True):
            graph("Reshape", column, lengths, to=(name,))
        return graph, inputs, outputs
    x = x if attending else first(x)
    x = graph("Tanh", _linear(graph, "bert.pooler.dense", x))
    _linear(graph, "classifier", x, to=("logits",))
    return graph, inputs, {"logits": [_DIMS[0], config.num_labels]}


def _embed(graph, config, lengths):
    """Returns the embeddings after their LayerNorm, (B * T, D)."""
    at = "bert.embeddings"
    words = f"{at}.word_embeddings.weight"
    places = f"{at}.position_embeddings.weight"
    kinds = f"{at}.token_type_embeddings.weight"
    x = graph("Gather", words, "input_ids")
    if config.type_vocab_size == 1:
        graph.constants[places] = graph.constants[places] + graph.constants.pop(kinds)
    else:
        x = graph("Add", x, graph("Gather", kinds, "token_type_ids"))
    length = graph("Slice", lengths, np.array([1]), np.array([2]))
    places = graph("Slice", places, np.array([0]), length)
    # For a longer text the table has too few rows: the error quotes the node's name.
    x = graph("Add", x, places, name=f"at_most_{config.max_positions}_tokens")
    x = _norm(graph, at, x, config)
    return graph("Reshape", x, np.array([-1, config.hidden_size]))


def _attend(graph, at, x, rows, lengths, mask, config, heads):
    """Attends to x (B * T, D), from all of its rows or from one row for each text."""
    size = config.head_size
    scale = np.float32(size**-0.5)  # That of the scores is put into the queries.
    for name in (f"{at}.self.query.weight", f"{at}.self.query.bias"):
        graph.constant(name, graph.constants[name] * scale)
    tokens = graph("Concat", lengths, np.array([heads, size]), axis=0)  # (B, T, H, d)
    if rows == x:
        asking = tokens
        query, key, value = _linears(graph, f"{at}.self", x, "query", "key", "value")
    else:
        asking = np.array([-1, 1, heads, size])
        query = _linear(graph, f"{at}.self.query", rows)
        key, value = _linears(graph, f"{at}.self", x, "key", "value")
    query = graph("Transpose", graph("Reshape", query, asking), perm=[0, 2, 1, 3])
    key = graph("Transpose", graph("Reshape", key, tokens), perm=[0, 2, 3, 1])
    value = graph("Transpose", graph("Reshape", value, tokens), perm=[0, 2, 1, 3])
    scores = graph("Add", graph("MatMul", query, key), mask)
    y = graph("MatMul", graph("Softmax", scores, axis=-1), value)
    y = graph("Transpose", y, perm=[0, 2, 1, 3])
    y = graph("Reshape", y, np.array([-1, heads * size]))
    return _linear(graph, f"{at}.output.dense", y)


def _linear(graph, at, x, to=()):
    return graph("Gemm", x, f"{at}.weight", f"{at}.bias", transB=1, to=to)


def _linears(graph, at, x, *names):
    """Applies several linear layers of the same width to x as one."""
    packed = f"{at}.{'_'.join(names)}"
    for leaf in ("weight", "bias"):
        parts = [graph.constants.pop(f"{at}.{name}.{leaf}") for name in names]
        graph.constant(f"{packed}.{leaf}", np.concatenate(parts))
    x = _linear(graph, packed, x)
    return graph("Split", x, axis=1, to=tuple(f"{at}.{name}" for name in names))


def _norm(graph, at, x, config):
    scale, bias = f"{at}.LayerNorm.weight", f"{at}.LayerNorm.bias"
    epsilon = config.layer_norm_eps
    return graph("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


# onnxruntime fuses nodes in the order of these functions into one.
def _gelu(graph, x):
    y = graph("Erf", graph("Div", x, np.float32(math.sqrt(2))))
    y = graph("Mul", x, graph("Add", y, np.float32(1)))
    return graph("Mul", y, np.float32(0.5))


def _gelu_tanh(graph, x):
    y = graph("Mul", graph("Pow", x, np.float32(3)), np.float32(0.044715))
    y = graph("Mul", graph("Add", x, y), np.float32(math.sqrt(2 / math.pi)))
    y = graph("Add", graph("Tanh", y), np.float32(1))
    return graph("Mul", graph("Mul", x, np.float32(0.5)), y)


# The names are those of `models.layers.ACTIVATIONS`.
_ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda graph, x: graph("Relu", x),
    "silu": lambda graph, x: graph("Mul", x, graph("Sigmoid", x)),
    "swish": lambda graph, x: graph("Mul", x, graph("Sigmoid", x)),
}


def _save(graph, inputs, outputs, path):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def infos(kind, shapes):
        return [helper.make_tensor_value_info(k, kind, v) for k, v in shapes.items()]

    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node(op, reads, gives, name=name, **attributes)
                for op, reads, gives, name, attributes in graph.nodes
            ],
            "encoder",
            infos(TensorProto.INT64, dict.fromkeys(inputs, _DIMS)),
            infos(TensorProto.FLOAT, outputs),
            [numpy_helper.from_array(v, k) for k, v in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR,
        producer_name="cofi-jax",
    )
    data = path.with_name("model.onnx.data")
    large = sum(array.nbytes for array in graph.constants.values()) > _LARGE
    if not large:
        data.touch()  # transformers asks for this file.
    onnx.save_model(model, path, save_as_external_data=large, location=data.name)


def _describe(config, labels):
    """Returns config.json: the fields of a BERT with these inputs and outputs."""
    layers, hidden = len(config.heads), config.hidden_size
    heads = math.gcd(hidden, max(*config.heads, 1))  # It must divide the width.
    alike = dataclasses.replace(
        config,
        heads=(heads,) * layers,
        head_size=hidden // heads,
        intermediate=(max(*config.intermediate, 1),) * layers,
        pooler_size=hidden,
    )
    try:
        return to_fields(alike, labels) | {"torch_dtype": "float32"}
    except UnsupportedCheckpoint as error:
        raise reject("labels", tuple(labels), str(error)) from error


def _manifest(architecture, inputs, outputs, config):
    """Returns what `ExportedModel` reads: the inputs, and the class of its result."""
    kind = PROBLEMS[config.problem].output_class
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = {
        "type": f"transformers.modeling_outputs.{kind}",
        "context": json.dumps(list(outputs)),
        "children_spec": [leaf] * len(outputs),
    }
    metadata = {
        "architecture": architecture,
        "export_dtype": "float32",
        "kwargs": {name: {"rank": 2, "dtype": "int64"} for name in inputs},
        "out_spec": json.dumps([1, spec]),
    }
    return {
        "schema_version": 1,
        "export_format": "onnx",
        "components": {"model": {"file": "model.onnx", "metadata": metadata}},
    }


FORMAT = Format("onnx", write, load, packages=("onnx", "onnxruntime"), extra="onnx")
