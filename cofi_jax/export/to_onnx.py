"""A model as an ONNX graph, for runtimes that know neither JAX nor PyTorch.

The folder holds the graph and what those runtimes read beside it:

    model.onnx        opset 17, any batch and length; int64 in, float32 logits out, or
                      vectors: then pooling and all that follows are in the graph
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

from cofi_jax.checkpoints.hf_config import to_fields
from cofi_jax.checkpoints.hf_names import bert_form, to_torch
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.export.base import INPUTS, Format
from cofi_jax.models.bert import Batch
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report.model_card import Part

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
    pad = config.pad_token_id  # BERT's form would have another one.
    params, config = bert_form(params, config)
    fields = _describe(config, labels) | {"pad_token_id": pad}
    inputs = INPUTS if config.type_vocab_size > 1 else INPUTS[:2]
    graph = _Graph(params, config)
    outputs = graph.head(graph.layers(graph.embeddings()))
    _save(graph, inputs, outputs, folder / "model.onnx")
    described = {"config": fields}
    if PROBLEMS[config.problem].output_class:
        architecture = fields["architectures"][0]
        described["export"] = _manifest(architecture, inputs, outputs, config)
    for name, content in described.items():
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
    path, providers = folder / "model.onnx", ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    names = [each.name for each in session.get_inputs()]

    def predict(batch: Batch) -> np.ndarray:
        feed = {name: np.asarray(batch[name]).astype(np.int64) for name in names}
        logits = session.run(None, feed)
        return logits[0] if len(logits) == 1 else np.stack(logits, -1)

    return predict


class _Graph:
    """The nodes of an encoder's graph in their order, and the constants they read.

    Each method adds nodes and returns the name of the tensor that they compute.
    """

    def __init__(self, params, config):
        tensors = to_torch(params, config)
        if config.output_activation:  # It follows the pooling.
            for name, leaf in params["classifier"].items():
                weight = name == "kernel"
                key = f"classifier.{'weight' if weight else 'bias'}"
                tensors[key] = leaf.T if weight else leaf
        self.constants = {k: np.asarray(v, np.float32) for k, v in tensors.items()}
        self.config, self.nodes = config, []
        self.lengths = self("Shape", "input_ids")  # (B, T)
        self.shapes = {(): self.lengths}  # (B, T, *sizes) by sizes

    def __call__(self, op, *inputs, name="", to=(), **attributes):
        """Adds one node.

        Args:
          op: the operator.
          *inputs: names of tensors, or arrays, which become constants.
          name: of the node; "" for a new one.
          to: names of the outputs; () for one that is called like the node.
          **attributes: those of the operator.

        Returns:
          The name of the node's output, or the names of several.
        """
        from onnx import helper

        name = name or f"{op}_{len(self.nodes)}"
        reads = [
            x if isinstance(x, str) else f"{name}.{i}" for i, x in enumerate(inputs)
        ]
        arrays = {k: v for k, v in zip(reads, inputs, strict=True) if k is not v}
        self.constants |= {k: np.asarray(v) for k, v in arrays.items()}
        to = to or (name,)
        self.nodes.append(helper.make_node(op, reads, to, name, **attributes))
        return to[0] if len(to) == 1 else to

    def linear(self, at, x, to=()):
        return self("Gemm", x, f"{at}.weight", f"{at}.bias", transB=1, to=to)

    def linears(self, at, x, *names):
        """Applies several linear layers of the same width to x as one."""
        packed = f"{at}.{'_'.join(names)}"
        for leaf in ("weight", "bias"):
            parts = [self.constants.pop(f"{at}.{name}.{leaf}") for name in names]
            self.constants[f"{packed}.{leaf}"] = np.concatenate(parts)
        to = tuple(f"{at}.{name}" for name in names)
        return self("Split", self.linear(packed, x), axis=1, to=to)

    def norm(self, at, x):
        names, epsilon = (f"{at}.weight", f"{at}.bias"), self.config.layer_norm_eps
        return self("LayerNormalization", x, *names, axis=-1, epsilon=epsilon)

    def by_token(self, x, *sizes, to=()):
        """Reshapes x, (B * T, ...), to (B, T, *sizes)."""
        if sizes not in self.shapes:
            shape = self("Concat", self.lengths, np.array(sizes), axis=0)
            self.shapes[sizes] = shape
        return self("Reshape", x, self.shapes[sizes], to=to)

    def first(self, x):
        """The first token of each text, from (B * T, D) to (B, D)."""
        x = self.by_token(x, self.config.hidden_size)
        return self("Gather", x, np.int64(0), axis=1)

    def embeddings(self):
        """The embeddings after their LayerNorm, (B * T, D)."""
        at, config = "bert.embeddings", self.config
        words, places, kinds = (
            f"{at}.{name}_embeddings.weight"
            for name in ("word", "position", "token_type")
        )
        x = self("Gather", words, "input_ids")
        if config.type_vocab_size == 1:
            self.constants[places] = self.constants[places] + self.constants.pop(kinds)
        else:
            x = self("Add", x, self("Gather", kinds, "token_type_ids"))
        length = self("Slice", self.lengths, np.array([1]), np.array([2]))
        places = self("Slice", places, np.array([0]), length)
        # For a longer text the table has too few rows: the error quotes this name.
        x = self("Add", x, places, name=f"at_most_{config.max_positions}_tokens")
        x = self.norm(f"{at}.LayerNorm", x)
        return self("Reshape", x, np.array([-1, config.hidden_size]))

    def layers(self, x):
        """All blocks, (B * T, D), or (B, D) where the head reads one token."""
        config = self.config
        mask = self("Greater", "attention_mask", np.int64(0))
        mask = self("Where", mask, np.float32(0), np.float32(-1e9))
        mask = self("Unsqueeze", mask, np.array([1, 2]))  # (B, 1, 1, T)
        attending = [i for i, heads in enumerate(config.heads) if heads]
        last = attending[-1] if attending and config.reads_one_token else None
        widths = zip(config.heads, config.intermediate, strict=True)
        for i, (heads, width) in enumerate(widths):
            at = f"bert.encoder.layer.{i}"
            if heads:
                rows = self.first(x) if i == last else x
                y = self.attention(f"{at}.attention", x, rows, mask, heads)
                x = self("Add", rows, y)
                x = self.norm(f"{at}.attention.output.LayerNorm", x)
            if width:
                y = self.linear(f"{at}.intermediate.dense", x)
                y = _ACTIVATIONS[config.activation](self, y)
                x = self("Add", x, self.linear(f"{at}.output.dense", y))
                x = self.norm(f"{at}.output.LayerNorm", x)
        return self.first(x) if config.reads_one_token and not attending else x

    def attention(self, at, x, rows, mask, heads):
        """Attends to x (B * T, D), from all of its rows or from one for each text."""
        size = self.config.head_size
        scale = np.float32(size**-0.5)  # That of the scores is put into the queries.
        for leaf in ("weight", "bias"):
            name = f"{at}.self.query.{leaf}"
            self.constants[name] = self.constants[name] * scale
        if rows == x:
            query, key, value = self.linears(f"{at}.self", x, "query", "key", "value")
            query = self.by_token(query, heads, size)
        else:
            query = self.linear(f"{at}.self.query", rows)
            query = self("Reshape", query, np.array([-1, 1, heads, size]))
            key, value = self.linears(f"{at}.self", x, "key", "value")
        query = self("Transpose", query, perm=[0, 2, 1, 3])  # (B, H, T or 1, d)
        key = self("Transpose", self.by_token(key, heads, size), perm=[0, 2, 3, 1])
        value = self("Transpose", self.by_token(value, heads, size), perm=[0, 2, 1, 3])
        scores = self("Add", self("MatMul", query, key), mask)
        y = self("MatMul", self("Softmax", scores, axis=-1), value)
        y = self("Transpose", y, perm=[0, 2, 1, 3])
        y = self("Reshape", y, np.array([-1, heads * size]))
        return self.linear(f"{at}.output.dense", y)

    def head(self, x):
        """The logits; returns the shapes of the outputs by name."""
        problem, labels = PROBLEMS[self.config.problem], self.config.num_labels
        if self.config.pooling:
            return self.vector(x, problem.outputs)
        if self.config.has_pooler:
            activation = self.config.pooler_activation.capitalize()  # Tanh or Relu
            x = self(activation, self.linear("bert.pooler.dense", x))
            self.linear("classifier", x, to=("logits",))
            return {"logits": [_DIMS[0], labels]}
        x, names = self.linear(problem.classifier, x), problem.outputs  # (B * T, C)
        if len(names) == 1:
            self.by_token(x, labels, to=names)
            return {names[0]: [*_DIMS, labels]}
        columns = self("Split", x, axis=1, to=[f"{name}_column" for name in names])
        for column, name in zip(columns, names, strict=True):
            self.by_token(column, to=(name,))
        return dict.fromkeys(names, _DIMS)

    def vector(self, x, to):
        """The vector of each text, normalised perhaps, as `bert.Encoder` makes it."""
        config = self.config
        if config.pooling != "cls":
            x = self.by_token(x, config.hidden_size)
            real = self("Greater", "attention_mask", np.int64(0))
            real = self("Unsqueeze", real, np.array([2]))  # (B, T, 1)
        if config.pooling == "mean":
            real = self("Where", real, np.float32(1), np.float32(0))
            axis = np.array([1])
            count = self("ReduceSum", real, axis, keepdims=0)
            x = self("ReduceSum", self("Mul", x, real), axis, keepdims=0)
            x = self("Div", x, self("Max", count, np.float32(1)))
        elif config.pooling == "max":
            x = self("Where", real, x, np.float32(-1e9))
            x = self("ReduceMax", x, axes=[1], keepdims=0)
        if config.output_activation:
            biases = ["classifier.bias"] if config.output_bias else []
            x = self("Gemm", x, "classifier.weight", *biases, transB=1)
            op = config.output_activation.capitalize()  # Identity, Tanh or Relu
            x = self(op, x)
        if config.normalize:
            length = self("ReduceL2", x, axes=[1], keepdims=1)
            x = self("Div", x, self("Max", length, np.float32(1e-12)))
        self("Identity", x, to=to)
        return {to[0]: [_DIMS[0], config.num_labels]}


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
            graph.nodes,
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
        pooler_activation="tanh",
    )
    return to_fields(alike, labels) | {"torch_dtype": "float32"}


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


_CARD = Part(
    "onnxruntime",
    "an ONNX graph, any batch and length",
    """\
import onnxruntime
from transformers import AutoTokenizer
folder = "path/to/this/folder/onnx"
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
inputs = dict(tokenizer({texts}, truncation=True, return_tensors="np"))
print(session.run(None, inputs))""",
)

_PACKAGES = ("onnx", "onnxruntime")

FORMAT = Format("onnx", write, load, _CARD, packages=_PACKAGES, extra="onnx")
