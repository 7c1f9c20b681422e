"""The same function as a plain BERT, for software that knows nothing else.

A sliced model has D hidden dimensions, heads of width d, and layers that lack blocks or
differ in their widths. It becomes a dense one, which transformers calls `model_type:
bert`: L' equal layers, D' hidden dimensions, n heads of width d' = D' / n, F' units.

1. Pack. The blocks that are left are put, in their order, into pairs of attention and
   feed-forward, a pair for each layer. The half of a pair that stays empty has zero
   weights, so that it is its LayerNorm alone. This takes over the scale and bias of the
   LayerNorm before it, which gets (1, 0): N_{s,b}(N_{1,0}(x)) = N_{s,b}(x).

2. Pad. Heads and units are filled up with zeros. Scores are divided by sqrt(d') where
   they were by sqrt(d), so queries are multiplied by sqrt(d' / d).

3. Widen. Where D does not do for D' (n heads must fill it, the pooler is square), A =
   D' - D dimensions are added. With m(x) the mean of x, what a LayerNorm reads becomes

       lift(x) = [x - m(x), (v . x) w]    with m(x - m(x)) = 0 and sum(w) = 0

   Its mean is 0 and, for v = 0, its variance is D / D' of that of x. So a scale of
   sqrt(D / D') s, and an epsilon of D / D' as much, give the same output in the first D
   dimensions. A LayerNorm reads the sum of what a block writes and of the residual, and
   both must have this form, but for a mean that all D' dimensions share:

   - A block writes lift(W y + c): its matrix and bias are lifted.
   - The residual of a feed-forward block is [x, 0]. The block itself adds what lacks,
     lift(x) - [x, 0]. It is linear, and four units hold it, because each of our
     activations has f(u) - f(-u) = u.
   - The residual of an attention block is to be [x, m(x), ..., m(x)], since attention
     cannot add it. The LayerNorm before puts this out: for x = s * u + b, with u what
     is normalised, m(x) = v . u + m(b) where v = (s - m(s)) / D. The added dimensions
     go in as (v . u) w and are scaled by 1 / w.

   Only here is v not 0, and (v . x)^2 |w|^2 adds to the variance. It is the one thing
   that is not exact. w is so small that this is at most `_EXCESS` of the variance.

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
_MULTIPLE, _WIDEST = (
    8,
    128,
)  # GPU kernels want heads of such multiples, at most this wide
_LINEAR = 4  # the units that add lift(x) - [x, 0]


def stock_config(config: EncoderConfig) -> EncoderConfig:
    """Returns the sizes of the smallest plain BERT that computes what `config` does."""
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
    """Returns the plain BERT's matrix weights over those of the sliced encoder.

    This is roughly the ratio of times, too. It is infinite for a model without a block.
    """
    weights = _matrix_weights(config)
    return _matrix_weights(stock_config(config)) / weights if weights else math.inf


def _matrix_weights(config):
    attention = 4 * config.head_size * sum(config.heads)
    return config.hidden_size * (attention + 2 * sum(config.intermediate))


def _geometry(config):
    """Returns D' and d'; this D' is the least that fits."""
    heads = max(config.heads, default=0)
    narrowest = config.head_size if heads else 1

    def widths(hidden):  # Those of heads, the best first.
        counts = [n for n in range(max(heads, 1), hidden + 1) if hidden % n == 0]
        fit = [hidden // n for n in counts if hidden // n >= narrowest]
        return sorted(fit, key=lambda d: (d % _MULTIPLE > 0, d > _WIDEST, -d))

    hidden = config.hidden_size
    if hidden >= config.pooler_size and widths(hidden):
        return hidden, widths(hidden)[0]
    # Weights w with the sum 0 take two added dimensions at least.
    for wider in itertools.count(max(hidden + 2, config.pooler_size)):
        if fit := [d for d in widths(wider) if d % _MULTIPLE == 0]:
            return wider, fit[0]


def _pairs(config):
    """Packs blocks: for each layer of the plain BERT the two layers it has them from.

    A layer of attention 3 and no feed-forward block is [3, None].
    """
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
    """Returns a dense model of the same function whose sizes BERT can have.

    Args:
      params: the parameters of a model, sliced or dense.
      config: its sizes; of RoBERTa's family too, for padding on the right.
      dtype: the dtype of the result, which is computed in float64.

    Returns:
      The parameters (NumPy) and sizes, `stock_config(config)`.
    """
    params, sliced = bert_form(params, config)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    stock, pairs = stock_config(config), _pairs(sliced)
    added = stock.hidden_size - sliced.hidden_size
    # Attention reads every second LayerNorm, the first of which is the embeddings'.
    packed = enumerate(_pack_norms(params, pairs))
    wide = [_widen(norm, added, feeds_attention=i % 2 == 0) for i, norm in packed]
    embeddings = dict(params["embeddings"])
    del embeddings["norm"]
    norm, lift = wide[0]
    dense = {"embeddings": jax.tree.map(lift, embeddings) | {"norm": norm}}
    for i, (attention, ffn) in enumerate(pairs):
        (attention_norm, lift), (ffn_norm, second_lift) = wide[2 * i + 1 : 2 * i + 3]
        dense[f"layer_{i}"] = {
            "attention": _attention(params, attention, sliced, stock, lift),
            "attention_norm": attention_norm,
            "ffn": _ffn(params, ffn, sliced, stock, second_lift),
            "ffn_norm": ffn_norm,
        }
    inner, classes = stock.hidden_size, stock.num_labels
    if "pooler" in params:
        dense["pooler"] = _pad(params["pooler"], kernel=(inner, inner), bias=inner)
    head = params["classifier"]
    dense["classifier"] = _pad(head, kernel=(inner, classes), bias=classes)
    return jax.tree.map(lambda x: x.astype(dtype), dense), stock


@dataclasses.dataclass(frozen=True)
class _Lift:
    """The function `lift` of the module's docstring, with v (D,) and w (D' - D,)."""

    v: np.ndarray
    w: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Lifts x, from (..., D) to (..., D')."""
        if not len(self.w):
            return x
        added = (x @ self.v)[..., None] * self.w
        return np.concatenate([x - x.mean(-1, keepdims=True), added], -1)


def _pack_norms(params, pairs):
    """Returns all LayerNorms of width D in their order, the embeddings' first."""
    norms = [params["embeddings"]["norm"]]
    for pair in pairs:
        for name, layer in zip(("attention_norm", "ffn_norm"), pair, strict=True):
            if layer is None:  # This LayerNorm takes over the scale of the one before.
                norms.append(norms[-1])
                scale, bias = norms[-1]["scale"], norms[-1]["bias"]
                norms[-2] = {"scale": np.ones_like(scale), "bias": np.zeros_like(bias)}
            else:
                norms.append(params[f"layer_{layer}"][name])
    return norms


def _widen(norm, added, feeds_attention):
    """Returns a LayerNorm with `added` dimensions more, and the lift of its input."""
    scale, bias = norm["scale"], norm["bias"]
    width = len(scale)
    v, w = np.zeros(width), np.zeros(added)
    added_scale, added_bias = np.zeros(added), np.zeros(added)
    if feeds_attention and added:
        v = (scale - scale.mean()) / width
        signs = np.resize([1.0, -1.0], added)
        if added % 2:
            signs[-3:] = 1, 1, -2
        # What w = signs would add to the variance, relative to it, at the worst input.
        excess = np.square(v).sum() * np.square(signs).sum()
        w = signs / max(1, math.sqrt(excess / _EXCESS))
        added_scale, added_bias = 1 / w, np.full(added, bias.mean())
    shrink = math.sqrt(width / (width + added))
    return {
        "scale": shrink * np.concatenate([scale, added_scale]),
        "bias": np.concatenate([bias, added_bias]),
    }, _Lift(v, w)


def _attention(params, layer, sliced, stock, lift):
    """Pads and lifts the attention of a layer of the sliced model, or of none."""
    heads, width, hidden = stock.heads[0], stock.head_size, stock.hidden_size
    nodes = params[f"layer_{layer}"]["attention"] if layer is not None else {}

    def scaled(name, factor):
        return {leaf: array * factor for leaf, array in nodes.get(name, {}).items()}

    factors = {"query": math.sqrt(width / sliced.head_size), "key": 1, "value": 1}
    dense = {
        name: _pad(
            scaled(name, factor), kernel=(hidden, heads, width), bias=(heads, width)
        )
        for name, factor in factors.items()
    }
    output = jax.tree.map(lift, nodes.get("output", {}))
    dense["output"] = _pad(output, kernel=(heads, width, hidden), bias=hidden)
    return dense


def _ffn(params, layer, sliced, stock, lift):
    """Does so with a feed-forward block, and adds what the residual lacks."""
    units, hidden = stock.intermediate[0], stock.hidden_size
    nodes = params[f"layer_{layer}"]["ffn"] if layer is not None else {}
    up = _pad(nodes.get("up", {}), kernel=(hidden, units), bias=units)
    down = jax.tree.map(lift, nodes.get("down", {}))
    down = _pad(down, kernel=(units, hidden), bias=hidden)
    width = sliced.hidden_size
    if hidden > width:
        # Two numbers are read, -m(x) of the first dimensions and v . x for the others.
        read = np.stack([np.full(width, 1 / width), lift.v])
        written = np.zeros((2, hidden))
        written[0, :width], written[1, width:] = -1, lift.w
        up["kernel"][:width, -_LINEAR:] = np.concatenate([read, -read]).T
        down["kernel"][-_LINEAR:] = np.concatenate([written, -written])
    return {"up": up, "down": down}


def _pad(node, **shapes):
    """Returns zeros of `shapes`, which begin with the arrays of `node`."""
    dense = {name: np.zeros(shape) for name, shape in shapes.items()}
    for name, array in node.items():
        dense[name][tuple(map(slice, array.shape))] = array
    return dense


def write(
    folder: Path, params: dict, config: EncoderConfig, labels: Sequence[str]
) -> None:
    """Writes `config.json` and `model.safetensors`: see `Format.write`.

    Raises:
      UserError: where there is not one label for each class.
    """
    tensors, fields = to_hugging_face(*to_stock(params, config), labels)
    # A plain BERT has no offset of positions, from which this one follows.
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
