"""Removing for real: masks and weights in, a smaller model of the same function out.

`fold` multiplies each soft gate into the weights that carry it, `take` gathers the
rows and columns whose gates are open. For every mask

    model(config)(params, masks) == model(spec.config(config))(prune(params, masks))
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning.masks import Masks
from cofi_jax.pruning.transforms import drop_empty


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

    def masks(self, config: EncoderConfig) -> Masks:
        """Hard gates of all kinds on a dense model of `config` that keep just this."""

        def row(kept, size):
            return np.isin(np.arange(size), kept).astype(np.float32)

        def rows(kept, sizes):
            return np.stack([row(units, max(sizes)) for units in kept])

        gates = {
            "head": rows(self.heads, config.heads),
            "intermediate": rows(self.intermediate, config.intermediate),
            "hidden": row(self.hidden, config.hidden_size),
        }
        gates |= {"mha": gates["head"].max(-1), "ffn": gates["intermediate"].max(-1)}
        return {kind: jnp.asarray(gate) for kind, gate in gates.items()}

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

    def gather(path, array):
        for axis, kept in enumerate(_kept(path, params, spec)):
            if kept is not None:
                array = jnp.take(array, np.asarray(kept), axis=axis)
        return array

    present = {}
    for name, node in params.items():
        if name.startswith("layer_"):
            i = int(name.removeprefix("layer_"))
            units = {"attention": spec.heads[i], "ffn": spec.intermediate[i]}
            node = {k: v for k, v in node.items() if units[k.removesuffix("_norm")]}
        if node:
            present[name] = node
    return jax.tree_util.tree_map_with_path(gather, present)


def expand(params: dict, spec: PrunedSpec, dense: dict) -> dict:
    """The inverse of `take`: NumPy arrays of the dense shapes, 0 where nothing stayed.

    With them and `spec.masks` the dense model computes what the sliced one does.

    Args:
      params: of the sliced model.
      spec: what it kept of the dense one.
      dense: the dense parameters, or what `abstract_params` says of them.
    """
    sliced = dict(jax.tree_util.tree_leaves_with_path(params))

    def scatter(path, like):
        whole = np.zeros(like.shape, like.dtype)
        if path in sliced:
            kept = zip(_kept(path, dense, spec), whole.shape, strict=True)
            index = np.ix_(*(np.arange(n) if k is None else k for k, n in kept))
            whole[index] = sliced[path]
        return whole

    return jax.tree_util.tree_map_with_path(scatter, dense)


# What the axes of a kernel and of a bias run over; * is not cut.
_AXES = {
    "query": ("DH*", "H*"),
    "key": ("DH*", "H*"),
    "value": ("DH*", "H*"),
    "output": ("H*D", "D"),
    "up": ("DF", "F"),
    "down": ("FD", "D"),
    "norm": ("D", "D"),
    "attention_norm": ("D", "D"),
    "ffn_norm": ("D", "D"),
    "embeddings": ("*D", ""),
}


def _kept(path, params, spec):
    """The indices that stay on each axis of the array at `path`; None for all."""
    top, *_, module, leaf = (path[0].key, *(entry.key for entry in path))
    # The first layer of the head reads the hidden states.
    first = "pooler" if "pooler" in params else "classifier"
    kernel, bias = _AXES.get(module, ("D*" if module == first else "**", "*"))
    kept = {"*": None, "D": spec.hidden}
    if top.startswith("layer_"):
        i = int(top.removeprefix("layer_"))
        kept |= {"H": spec.heads[i], "F": spec.intermediate[i]}
    return [kept[axis] for axis in (bias if leaf == "bias" else kernel)]


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
