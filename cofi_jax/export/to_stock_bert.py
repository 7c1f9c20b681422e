"""The same function as a plain BERT, for software that knows nothing else.

A sliced model is turned into a dense one, L' equal layers of D' hidden dimensions,
n heads of width d' = D' / n and F' units, which transformers calls `model_type: bert`:

- The blocks that are left are packed, in their order, into pairs of attention and
  feed-forward. The half of a pair that stays empty has zero weights. Its LayerNorm
  gets the scale and bias of the one before, which becomes (1, 0): to normalise what
  is normal changes nothing, and nothing reads the stream in between.
- Heads and units are padded with zeros, queries scaled by sqrt(d' / d).
- Where D does not do for D' (n heads must fill it, the pooler is square), dimensions
  are added. Before each LayerNorm they are to lie at the mean of the others: the
  mean then stays, and the variance is D / D' of what it was. So the model writes to
  the stream centred, and a feed-forward block, which can hold a linear map as
  f(u) - f(-u) = u for each of our activations f, centres the residual too.
  Attention cannot. There the added dimensions hold the residual's mean already, put
  out by the LayerNorm before, a linear function of what this one normalises: small
  values of both signs go in, large scales make them equal. These small values add
  to the variance; it is the one thing here that is not exact, and is at most
  `_EXCESS` of it.

LayerNorm's epsilon makes normalising twice inexact, too, by epsilon in the variance.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from cofi_jax.checkpoints.hf_names import bert_form, to_hugging_face
from cofi_jax.checkpoints.huggingface import write_tensors
from cofi_jax.export.formats import Format
from cofi_jax.export.to_transformers import load
from cofi_jax.models.config import EncoderConfig

_EXCESS = 2.0**-30  # less than float32 can tell


_MULTIPLE = 8  # of which GPU kernels want the width of a head to be one


_WIDEST = 128  # and what they take


_LINEAR = 4  # units that centre the residual and fill the added dimensions


def stock_config(config: EncoderConfig) -> EncoderConfig:
    """The sizes of the smallest plain BERT that can compute what `config` does."""
    hidden, head_size = _geometry(config)
    layers, units = len(_pairs(config)), max(config.intermediate, default=0)
    if hidden > config.hidden_size:
        units += _LINEAR
    return dataclasses.replace(
        config,
        model_type="bert",
        max_positions=config.longest,
        position_offset=0,
        hidden_size=hidden,
        heads=(hidden // head_size,) * layers,
        head_size=head_size,
        intermediate=(max(units, 1),) * layers,
        pooler_size=0 if config.reads_every_token else hidden,
        layer_norm_eps=config.layer_norm_eps * (config.hidden_size / hidden),
    )


def price(config: EncoderConfig) -> float:
    """How many times the sliced encoder's matrix weights the plain BERT's are.

    Roughly the factor in time, too; infinite for a model without a block.
    """
    weights = _matrix_weights(config)
    return _matrix_weights(stock_config(config)) / weights if weights else math.inf


def _matrix_weights(config):
    attention = 4 * config.head_size * sum(config.heads)
    return config.hidden_size * (attention + 2 * sum(config.intermediate))


def _geometry(config):
    """D' and d', the D' that fits with the least padding."""
    heads = max(config.heads, default=0)
    narrowest = config.head_size if heads else 1

    def widths(hidden):  # of heads, the best first
        counts = [n for n in range(max(heads, 1), hidden + 1) if hidden % n == 0]
        fit = [hidden // n for n in counts if hidden // n >= narrowest]
        return sorted(fit, key=lambda d: (d % _MULTIPLE > 0, d > _WIDEST, -d))

    hidden = config.hidden_size
    if hidden >= config.pooler_size and widths(hidden):
        return hidden, widths(hidden)[0]
    # Signs that cancel take two added dimensions.
    for wider in itertools.count(max(hidden + 2, config.pooler_size)):
        if fit := [d for d in widths(wider) if d % _MULTIPLE == 0]:
            return wider, fit[0]


def _pairs(config):
    """Per layer of the plain BERT, whose attention and feed-forward it holds."""
    pairs = []
    for i, (heads, units) in enumerate(
        zip(config.heads, config.intermediate, strict=True)
    ):
        if heads:
            pairs.append([i, None])
        if units and pairs and pairs[-1][1] is None:
            pairs[-1][1] = i
        elif units:
            pairs.append([None, i])
    return pairs or [[None, None]]


def to_stock(
    params: dict, config: EncoderConfig, dtype: str = "float32"
) -> tuple[dict, EncoderConfig]:
    """A dense model of the same function whose sizes BERT can have.

    Args:
      params: of a model, sliced or dense.
      config: its sizes; of RoBERTa's family too, for padding on the right.
      dtype: of the result; it is computed in float64.

    Returns:
      Parameters (NumPy) and sizes, `stock_config(config)`.
    """
    params, sliced = bert_form(params, config)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    stock, pairs = stock_config(config), _pairs(sliced)
    norms, lifts = _norms(params, pairs, stock.hidden_size)
    tables = {k: v for k, v in params["embeddings"].items() if k != "norm"}
    dense = {"embeddings": jax.tree.map(lifts[0], tables) | {"norm": norms[0]}}
    for i, (attention, ffn) in enumerate(pairs):
        # The LayerNorms of this layer, the embeddings' being the first.
        first, second = 2 * i + 1, 2 * i + 2
        dense[f"layer_{i}"] = {
            "attention": _attention(params, attention, sliced, stock, lifts[first]),
            "attention_norm": norms[first],
            "ffn": _ffn(params, ffn, sliced, stock, lifts[second]),
            "ffn_norm": norms[second],
        }
    inner = stock.hidden_size
    if "pooler" in params:
        dense["pooler"] = _corner(params["pooler"], kernel=(inner, inner), bias=inner)
    classes = stock.num_labels
    dense["classifier"] = _corner(
        params["classifier"], kernel=(inner, classes), bias=classes
    )
    return jax.tree.map(lambda x: x.astype(dtype), dense), stock


@dataclasses.dataclass(frozen=True)
class _Lift:
    """From vectors of width D that are written to the stream to ones of width D'.

    `values` (D,) is the linear function that the added dimensions hold, `weights`
    (D' - D,), with the sum 0, what each of them multiplies it by.
    """

    values: np.ndarray
    weights: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if not len(self.weights):
            return x
        added = (x @ self.values)[..., None] * self.weights
        return np.concatenate([x - x.mean(-1, keepdims=True), added], -1)


def _norms(params, pairs, hidden):
    """All LayerNorms of width D', the embeddings' first, and what writes to each."""
    norms = [params["embeddings"]["norm"]]
    width = len(norms[0]["scale"])
    for pair in pairs:
        for name, layer in zip(("attention_norm", "ffn_norm"), pair, strict=True):
            if layer is None:
                norms.append(norms[-1])
                norms[-2] = {"scale": np.ones(width), "bias": np.zeros(width)}
            else:
                norms.append(params[f"layer_{layer}"][name])
    # Attention reads every second one; where it is absent, one of (1, 0), mean 0.
    added = hidden - width
    wide = [_wide(norm, added, i % 2 == 0) for i, norm in enumerate(norms)]
    return [norm for norm, _ in wide], [lift for _, lift in wide]


def _wide(norm, added, feeds_attention):
    """A LayerNorm with `added` dimensions more, and what writes to its input."""
    scale, bias = norm["scale"], norm["bias"]
    width = len(scale)
    values, weights = np.zeros(width), np.zeros(added)
    scales, biases = np.zeros(added), np.zeros(added)
    if feeds_attention and added:
        # mean(scale * normal + bias) = values @ normal + mean(bias), where |normal|^2
        # is D at most, so that the largest excess has the closed form below.
        values = (scale - scale.mean()) / width
        signs = np.resize([1.0, -1.0], added)
        if added % 2:
            signs[-3:] = 1, 1, -2
        excess = np.square(values).sum() * np.square(signs).sum()
        weights = signs / max(1, math.sqrt(excess / _EXCESS))
        scales, biases = 1 / weights, np.full(added, bias.mean())
    shrink = math.sqrt(width / (width + added))  # as the variance does
    return {
        "scale": shrink * np.concatenate([scale, scales]),
        "bias": np.concatenate([bias, biases]),
    }, _Lift(values, weights)


def _attention(params, layer, sliced, stock, lift):
    heads, width, hidden = stock.heads[0], stock.head_size, stock.hidden_size
    nodes = params[f"layer_{layer}"]["attention"] if layer is not None else {}

    def scaled(name, factor):
        return {leaf: array * factor for leaf, array in nodes.get(name, {}).items()}

    factors = {"query": math.sqrt(width / sliced.head_size), "key": 1, "value": 1}
    dense = {
        name: _corner(
            scaled(name, factor), kernel=(hidden, heads, width), bias=(heads, width)
        )
        for name, factor in factors.items()
    }
    output = jax.tree.map(lift, nodes.get("output", {}))
    dense["output"] = _corner(output, kernel=(heads, width, hidden), bias=hidden)
    return dense


def _ffn(params, layer, sliced, stock, lift):
    units, hidden = stock.intermediate[0], stock.hidden_size
    nodes = params[f"layer_{layer}"]["ffn"] if layer is not None else {}
    up = _corner(nodes.get("up", {}), kernel=(hidden, units), bias=units)
    down = jax.tree.map(lift, nodes.get("down", {}))
    down = _corner(down, kernel=(units, hidden), bias=hidden)
    width = sliced.hidden_size
    if hidden > width:
        read = np.stack([np.full(width, 1 / width), lift.values])
        added = np.zeros((2, hidden))
        added[0, :width], added[1, width:] = -1, lift.weights
        up["kernel"][:width, -_LINEAR:] = np.concatenate([read, -read]).T
        down["kernel"][-_LINEAR:] = np.concatenate([added, -added])
    return {"up": up, "down": down}


def _corner(node, **shapes):
    """Zeros of `shapes`, with the arrays of `node` in their first rows and columns."""
    dense = {name: np.zeros(shape) for name, shape in shapes.items()}
    for name, array in node.items():
        dense[name][tuple(map(slice, array.shape))] = array
    return dense


def write(
    folder: Path, params: dict, config: EncoderConfig, labels: Sequence[str]
) -> None:
    """Writes `config.json` and `model.safetensors` of a plain BERT.

    Args:
      folder: an empty one that exists.
      params: of a model, sliced or dense.
      config: its sizes.
      labels: names of the classes; () for LABEL_0, ...

    Raises:
      UserError: where `labels` are not as many as the classes.
    """
    tensors, fields = to_hugging_face(*to_stock(params, config), labels)
    # BERT's form has lost it with the rows of the position table.
    fields["pad_token_id"] = config.pad_token_id
    write_tensors(folder, tensors, fields)


def _facts(config):
    blocks = any(config.heads + config.intermediate)
    return {"matrix_weights_ratio": price(config)} if blocks else {}


FORMAT = Format(
    "stock",
    write,
    load,  # No code of ours is in the folder: transformers alone runs it.
    packages=("torch",),
    extra="torch",
    facts=_facts,
)
