"""The same function as a plain BERT, for software that knows nothing else.

A DistilBERT stays one: it is a BERT but for its pooler's activation function.

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
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cofi_jax.checkpoints import sentence_transformers
from cofi_jax.checkpoints.hf_names import bert_form, to_hugging_face
from cofi_jax.checkpoints.huggingface import write_tensors
from cofi_jax.export.base import Format
from cofi_jax.export.to_transformers import load
from cofi_jax.models.bert import abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report.model_card import Part

_EXCESS = 2.0**-30  # less than float32 can tell
_MULTIPLE, _WIDEST = 8, 128  # GPU kernels want heads of such multiples, at most this
_LINEAR = 4  # the units that add lift(x) - [x, 0]
_BLOCKS = ("attention", "output"), ("ffn", "down")  # and the modules that write


def stock_config(config: EncoderConfig) -> EncoderConfig:
    """Returns the sizes of the smallest plain BERT that computes what `config` does."""
    hidden, head_size = _geometry(config)
    layers, units = len(_packed(config)) // 2, max(config.intermediate, default=0)
    if hidden > config.hidden_size:
        units += _LINEAR
    return dataclasses.replace(
        config,
        model_type="bert" if config.pooler_activation == "tanh" else "distilbert",
        max_positions=config.longest,
        position_offset=0,
        hidden_size=hidden,
        heads=(hidden // head_size,) * layers,
        head_size=head_size,
        intermediate=(max(units, 1),) * layers,
        pooler_size=hidden if config.has_pooler else 0,
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
    heads, hidden = max(config.heads, default=0), config.hidden_size
    # Weights w with the sum 0 take two added dimensions at least.
    for width in itertools.chain([hidden], itertools.count(hidden + 2)):
        sizes = [
            size
            for size in range(config.head_size if heads else 1, width + 1)
            if width % size == 0 and width // size >= heads
            if width == hidden or size % _MULTIPLE == 0
        ]
        if sizes and width >= config.pooler_size:
            best = min(sizes, key=lambda d: (d % _MULTIPLE > 0, d > _WIDEST, -d))
            return width, best


def _packed(config):
    """Packs blocks: the layer each of the plain BERT's comes from, None for a new one.

    Attention and feed-forward take turns; [3, None] is a layer with the attention of
    layer 3 and no feed-forward block.
    """
    packed = []
    widths = zip(config.heads, config.intermediate, strict=True)
    for i, layer in enumerate(widths):
        for turn, width in enumerate(layer):
            if width:
                packed += [None] * (len(packed) % 2 != turn)
                packed.append(i)
    return packed + [None] * (len(packed) % 2 if packed else 2)


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
    stock, packed = stock_config(config), _packed(sliced)
    width, added = sliced.hidden_size, stock.hidden_size - sliced.hidden_size
    # Attention reads every second LayerNorm, the first of which is the embeddings'.
    norms = enumerate(_pack_norms(params, packed))
    wide = [_widen(norm, added, feeds_attention=i % 2 == 0) for i, norm in norms]
    norm, lift = wide.pop(0)
    tables = {k: v for k, v in params["embeddings"].items() if k != "norm"}
    dense = {k: v for k, v in params.items() if k in ("pooler", "classifier")}
    dense["embeddings"] = jax.tree.map(lift, tables) | {"norm": norm}
    for i, (source, (norm, lift)) in enumerate(zip(packed, wide, strict=True)):
        name, writer = _BLOCKS[i % 2]
        layer = dense.setdefault(f"layer_{i // 2}", {})
        layer[f"{name}_norm"] = norm
        if source is not None:
            block = params[f"layer_{source}"][name]
            layer[name] = block | {writer: jax.tree.map(lift, block[writer])}
    dense = _padded(dense, abstract_params(stock))
    for i, (_, lift) in enumerate(wide[1::2]):
        attention, ffn = (dense[f"layer_{i}"][name] for name, _ in _BLOCKS)
        for array in attention["query"].values():
            array *= math.sqrt(stock.head_size / sliced.head_size)
        if added:
            units = np.hstack([lift.read, -lift.read])
            ffn["up"]["kernel"][:width, -_LINEAR:] = units
            ffn["down"]["kernel"][-_LINEAR:] = np.vstack([lift.write, -lift.write])
    return jax.tree.map(lambda x: x.astype(dtype), dense), stock


class _Lift(NamedTuple):
    """The function `lift` of the module's docstring: [x, 0] + x @ read @ write."""

    read: np.ndarray  # (D, 2): two numbers are read of x, m(x) and v . x
    write: np.ndarray  # (2, D')

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Lifts x, from (..., D) to (..., D')."""
        lifted = x @ self.read @ self.write
        lifted[..., : x.shape[-1]] += x
        return lifted


def _pack_norms(params, packed):
    """Returns all LayerNorms of width D in their order, the embeddings' first."""
    norms = [params["embeddings"]["norm"]]
    for i, source in enumerate(packed):
        if source is None:  # This LayerNorm takes over the scale of the one before.
            taken = norms.pop()
            same = np.ones_like(taken["scale"]), np.zeros_like(taken["bias"])
            norms += [dict(zip(("scale", "bias"), same, strict=True)), taken]
        else:
            norms.append(params[f"layer_{source}"][f"{_BLOCKS[i % 2][0]}_norm"])
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
    wide = {
        "scale": shrink * np.concatenate([scale, added_scale]),
        "bias": np.concatenate([bias, added_bias]),
    }
    read, write = np.zeros((width, 2)), np.zeros((2, width + added))
    if added:
        read[:, 0], read[:, 1] = 1 / width, v
        write[0, :width], write[1, width:] = -1, w
    return wide, _Lift(read, write)


def _padded(params, shapes):
    """Returns arrays of `shapes`: those that `params` has, and zeros behind them."""
    given, padded = flatten_dict(params), {}
    for path, like in flatten_dict(shapes).items():
        padded[path] = np.zeros(like.shape)
        if path in given:
            padded[path][tuple(map(slice, given[path].shape))] = given[path]
    return unflatten_dict(padded)


def write(
    folder: Path, params: dict, config: EncoderConfig, labels: Sequence[str]
) -> None:
    """Writes `config.json` and `model.safetensors`: see `Format.write`.

    Raises:
      UserError: where there is not one label for each class.
    """
    dense, stock = to_stock(params, config)
    tensors, fields = to_hugging_face(dense, stock, labels)
    if config.pooling:
        sentence_transformers.write(folder, dense, stock)
    # A plain BERT has no offset of positions, from which this one follows.
    fields["pad_token_id"] = config.pad_token_id
    write_tensors(folder, tensors, fields)


def _facts(config):
    ratio = price(config)
    return {"matrix_weights_ratio": ratio} if ratio < math.inf else {}


def _note(check):
    ratio = check.get("matrix_weights_ratio")
    return ratio and f"`stock/` has {ratio:.1f} times the others' matrix weights."


_CARD = Part(
    "transformers 4.57 or later, servers that know BERT",
    "the same function as a plain BERT: padded, so slower than the others",
    """\
from transformers import {auto}, AutoTokenizer
folder = "path/to/this/folder/stock"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder)
print(model(**tokenizer({texts}, truncation=True, return_tensors="pt")))""",
    _note,
    pooled=(
        "sentence-transformers, servers that know BERT",
        """\
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("path/to/this/folder/stock")
print(model.encode([{texts}]))""",
    ),
)

FORMAT = Format(
    "stock",
    write,
    load,  # No code of ours is in the folder: transformers alone runs it.
    _CARD,
    packages=("torch",),
    extra="torch",
    facts=_facts,
)
