"""Removing for real: masks and weights in, a smaller model of the same function out.

`fold` multiplies each soft gate into the weights that carry it, `take` gathers the
rows and columns whose gates are open. For every mask

    model(config)(params, masks) == model(spec.config(config))(prune(params, masks))
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from cofi_jax.masks import Masks, drop_empty
from cofi_jax.model import EncoderConfig


@dataclasses.dataclass(frozen=True)
class PrunedSpec:
    """Which heads, feed-forward units and hidden dimensions of the dense model stay."""

    heads: tuple[tuple[int, ...], ...]  # per layer; () is an absent block
    intermediate: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]

    def config(self, config: EncoderConfig) -> EncoderConfig:
        """The sizes of the smaller model cut from a dense one of `config`."""
        return dataclasses.replace(
            config,
            hidden_size=len(self.hidden),
            heads=tuple(map(len, self.heads)),
            intermediate=tuple(map(len, self.intermediate)),
        )

    @classmethod
    def from_json(cls, fields: dict) -> "PrunedSpec":
        """The inverse of `dataclasses.asdict` after a passage through JSON."""
        nested = {k: tuple(map(tuple, fields[k])) for k in ("heads", "intermediate")}
        return cls(hidden=tuple(fields["hidden"]), **nested)


def spec_of(masks: Masks, config: EncoderConfig) -> PrunedSpec:
    """What `masks` keep of a dense model of `config`.

    Raises:
      ValueError: where no hidden dimension is left.
    """
    masks = {k: np.asarray(v) for k, v in drop_empty()(masks).items()}

    def kept(inner, block, sizes):
        for layer, size in enumerate(sizes):
            absent = block in masks and masks[block][layer] <= 0
            gates = masks[inner][layer] if inner in masks else np.ones(size)
            yield () if absent else _open(gates)

    hidden = _open(masks.get("hidden", np.ones(config.hidden_size)))
    if not hidden:
        raise ValueError("masks['hidden']: at least one dimension must stay open")
    return PrunedSpec(
        heads=tuple(kept("head", "mha", config.heads)),
        intermediate=tuple(kept("intermediate", "ffn", config.intermediate)),
        hidden=hidden,
    )


def _open(gates):
    return tuple(np.flatnonzero(gates > 0).tolist())


def fold(params: dict, masks: Masks, config: EncoderConfig) -> dict:
    """`params` with every gate multiplied into them; shapes stay.

    head and mha go into the attention output kernel (mha also its bias),
    intermediate and ffn into the down kernel (ffn also its bias), hidden into the
    embeddings, both output projections and the scale and bias of each LayerNorm.
    """
    hidden = masks.get("hidden", 1.0)

    def scaled(node, gate=1.0, units=1.0):
        return {
            "kernel": node["kernel"] * units * gate * hidden,
            "bias": node["bias"] * gate * hidden,
        }

    def norm(node):
        return {name: value * hidden for name, value in node.items()}

    def gate(kind, layer):
        return masks[kind][layer] if kind in masks else 1.0

    embeddings = params["embeddings"]
    folded = dict(params) | {
        "embeddings": {
            name: norm(node) if name == "norm" else node * hidden
            for name, node in embeddings.items()
        }
    }
    for i in range(len(config.heads)):
        layer = dict(params.get(f"layer_{i}", {}))
        if "attention" in layer:
            heads = masks["head"][i][:, None, None] if "head" in masks else 1.0
            output = scaled(layer["attention"]["output"], gate("mha", i), heads)
            layer["attention"] = dict(layer["attention"]) | {"output": output}
            layer["attention_norm"] = norm(layer["attention_norm"])
        if "ffn" in layer:
            units = masks["intermediate"][i][:, None] if "intermediate" in masks else 1
            down = scaled(layer["ffn"]["down"], gate("ffn", i), units)
            layer["ffn"] = dict(layer["ffn"]) | {"down": down}
            layer["ffn_norm"] = norm(layer["ffn_norm"])
        if layer:
            folded[f"layer_{i}"] = layer
    return folded


def take(params: dict, spec: PrunedSpec) -> dict:
    """The rows and columns of `params` that `spec` keeps, as new arrays."""
    hidden = np.asarray(spec.hidden)

    def gather(node, **axes):
        """`gather(node, kernel=(rows, columns), bias=(rows,))`, None for all."""
        result = {}
        for name, keep in axes.items():
            array = node[name]
            for axis, rows in enumerate(keep):
                if rows is not None:
                    array = jnp.take(array, np.asarray(rows), axis=axis)
            result[name] = array
        return result

    def norm(node):
        return gather(node, scale=(hidden,), bias=(hidden,))

    embeddings = params["embeddings"]
    tables = {name: (None, hidden) for name in embeddings if name != "norm"}
    taken = dict(params) | {
        "embeddings": gather(embeddings, **tables) | {"norm": norm(embeddings["norm"])},
    }
    # The first layer of the head reads the hidden states.
    head = "pooler" if "pooler" in params else "classifier"
    taken[head] = gather(params[head], kernel=(hidden,), bias=())
    for i, (heads, units) in enumerate(zip(spec.heads, spec.intermediate, strict=True)):
        layer, kept = taken.pop(f"layer_{i}", {}), {}
        if heads:
            attention = {
                name: gather(node, kernel=(hidden, heads), bias=(heads,))
                for name, node in layer["attention"].items()
                if name != "output"
            }
            attention["output"] = gather(
                layer["attention"]["output"],
                kernel=(heads, None, hidden),
                bias=(hidden,),
            )
            kept["attention"] = attention
            kept["attention_norm"] = norm(layer["attention_norm"])
        if units:
            up, down = layer["ffn"]["up"], layer["ffn"]["down"]
            kept["ffn"] = {
                "up": gather(up, kernel=(hidden, units), bias=(units,)),
                "down": gather(down, kernel=(units, hidden), bias=(hidden,)),
            }
            kept["ffn_norm"] = norm(layer["ffn_norm"])
        if kept:
            taken[f"layer_{i}"] = kept
    return taken


def prune(params: dict, masks: Masks, config: EncoderConfig) -> tuple[dict, PrunedSpec]:
    """A smaller model that computes what `params` under `masks` compute.

    Args:
      params: the dense model's parameters.
      masks: gates in [0, 1], any subset of the kinds.
      config: the dense model's sizes.

    Returns:
      The smaller model's parameters and the spec; `spec.config(config)` are its sizes.

    Raises:
      ValueError: where no hidden dimension is left.
    """
    spec = spec_of(masks, config)
    return take(fold(params, masks, config), spec), spec
