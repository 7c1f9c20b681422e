"""Slicing: masks and weights in, a smaller model of the same function out.

`fold` multiplies each soft gate into the weights that carry it, `take` gathers the
rows and columns whose gates are open. For every mask

    model(config)(params, masks) == model(spec.config(config))(prune(params, masks))

The model may have been sliced before: `PrunedSpec.compose` then gives the spec of the
result in terms of the first one. What the axes of an array run over is read from the
table in `models.spec`.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import BERT, Architecture, architecture_of, layer_of
from cofi_jax.pruning.masks import PADDING, Masks, real_gates, without_padding
from cofi_jax.pruning.transforms import drop_empty


@dataclasses.dataclass(frozen=True)
class PrunedSpec:
    """The heads, intermediate units and hidden dimensions of a model that stay."""

    heads: tuple[tuple[int, ...], ...]  # per layer; () is an absent block
    intermediate: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]

    def config(self, config: EncoderConfig) -> EncoderConfig:
        """The sizes of the smaller model cut from one of `config`."""
        return dataclasses.replace(
            config,
            hidden_size=len(self.hidden),
            heads=tuple(map(len, self.heads)),
            intermediate=tuple(map(len, self.intermediate)),
        )

    def masks(self, config: EncoderConfig) -> Masks:
        """Hard masks of all kinds on a model of `config` that keep just this."""
        real = real_gates(config)
        hard = {"hidden": np.isin(np.arange(config.hidden_size), self.hidden)}
        for block in architecture_of(config).blocks:
            ids = np.arange(real[block.inner].shape[-1])
            rows = [np.isin(ids, kept) for kept in getattr(self, block.widths)]
            hard[block.inner] = np.stack(rows)
            hard[block.outer] = hard[block.inner].any(-1)
        return {
            kind: jnp.asarray(np.where(real[kind], open_, PADDING), jnp.float32)
            for kind, open_ in hard.items()
        }

    def compose(self, second: "PrunedSpec") -> "PrunedSpec":
        """The spec of a slice of a slice: `take` by it is `take` by self, by `second`.

        Args:
          second: what stays of the model that this spec leaves.
        """

        def rows(first, second):
            return tuple(map(_pick, first, second))

        return PrunedSpec(
            heads=rows(self.heads, second.heads),
            intermediate=rows(self.intermediate, second.intermediate),
            hidden=_pick(self.hidden, second.hidden),
        )

    @classmethod
    def from_json(cls, fields: dict) -> "PrunedSpec":
        """The inverse of `dataclasses.asdict` after a passage through JSON."""
        nested = {k: tuple(map(tuple, fields[k])) for k in ("heads", "intermediate")}
        return cls(hidden=tuple(fields["hidden"]), **nested)


def _pick(ids, places):
    return tuple(ids[place] for place in places)


def spec_of(masks: Masks, config: EncoderConfig) -> PrunedSpec:
    """The spec of what `masks` keep of a model of `config`.

    Raises:
      ValueError: where no hidden dimension is left.
    """
    masks = drop_empty()(without_padding(masks, config))
    kept = {"hidden": _open(masks.get("hidden", np.ones(config.hidden_size)))}
    if not kept["hidden"]:
        raise ValueError("masks['hidden']: at least one dimension must stay open")
    for block in architecture_of(config).blocks:
        rows = []
        for layer, width in enumerate(getattr(config, block.widths)):
            gates = np.ones(width)
            if block.inner in masks:
                gates = masks[block.inner][layer]
            if block.outer in masks and masks[block.outer][layer] <= 0:
                gates = np.zeros(width)
            rows.append(_open(gates))
        kept[block.widths] = tuple(rows)
    return PrunedSpec(**kept)


def _open(gates):
    return tuple(np.flatnonzero(np.asarray(gates) > 0).tolist())


def fold(params: dict, masks: Masks, config: EncoderConfig) -> dict:
    """`params` with every gate multiplied into them; shapes stay.

    head and mha go into the attention output kernel (mha also its bias),
    intermediate and ffn into the down kernel (ffn also its bias), hidden into the
    embeddings, both output projections and the scale and bias of each LayerNorm.
    """
    architecture = architecture_of(config)

    def scale(path, array, axes):
        if not axes.endswith("D"):
            return array
        layer, module = layer_of(path[0].key), path[min(1, len(path) - 1)].key
        for block in architecture.blocks:
            if layer is None or block.name != module:
                continue
            if block.inner in masks and block.unit in axes:
                axis = axes.index(block.unit)
                gates = masks[block.inner][layer, : array.shape[axis]]
                others = [other for other in range(array.ndim) if other != axis]
                array = array * jnp.expand_dims(gates, others)
            if block.outer in masks:
                array = array * masks[block.outer][layer]
        return array * masks["hidden"] if "hidden" in masks else array

    return jax.tree_util.tree_map_with_path(scale, params, architecture.axes(params))


def take(params: dict, spec: PrunedSpec, architecture: Architecture = BERT) -> dict:
    """The rows and columns of `params` that `spec` keeps, as new arrays."""

    def gather(path, array, axes):
        for axis, kept in enumerate(_kept(path, axes, spec, architecture)):
            if kept is not None:
                array = jnp.take(array, np.asarray(kept, int), axis=axis)
        return array

    present = {}
    for name, node in params.items():
        if (layer := layer_of(name)) is not None:
            for block in architecture.blocks:
                if not getattr(spec, block.widths)[layer]:
                    node = {k: v for k, v in node.items() if k not in block.modules}
        if node:
            present[name] = node
    return jax.tree_util.tree_map_with_path(gather, present, architecture.axes(present))


def expand(
    params: dict, spec: PrunedSpec, dense: dict, architecture: Architecture = BERT
) -> dict:
    """The inverse of `take`: NumPy arrays of the dense shapes, 0 where nothing stayed.

    With them and `spec.masks` the dense model computes what the sliced one does.

    Args:
      params: of the sliced model.
      spec: what it kept of the dense one.
      dense: the dense parameters, or what `abstract_params` says of them.
      architecture: the table of the model's prunable axes.
    """
    sliced = dict(jax.tree_util.tree_leaves_with_path(params))

    def scatter(path, like, axes):
        whole = np.zeros(like.shape, like.dtype)
        if path in sliced:
            kept = _kept(path, axes, spec, architecture)
            kept = zip(kept, whole.shape, strict=True)
            index = np.ix_(*(np.arange(n) if k is None else k for k, n in kept))
            whole[index] = sliced[path]
        return whole

    return jax.tree_util.tree_map_with_path(scatter, dense, architecture.axes(dense))


def _kept(path, axes, spec, architecture) -> Sequence[tuple[int, ...] | None]:
    """The indices that stay on each axis of the array at `path`; None for all."""
    kept: Mapping = {"D": spec.hidden}
    if (layer := layer_of(path[0].key)) is not None:
        kept |= {b.unit: getattr(spec, b.widths)[layer] for b in architecture.blocks}
    return [kept.get(axis) for axis in axes]


def prune(params: dict, masks: Masks, config: EncoderConfig) -> tuple[dict, PrunedSpec]:
    """A smaller model that computes what `params` under `masks` compute.

    Args:
      params: the model's parameters.
      masks: values in [0, 1], any subset of the kinds.
      config: the model's sizes.

    Returns:
      The smaller model's parameters and the spec; `spec.config(config)` are its sizes.

    Raises:
      ValueError: where no hidden dimension is left.
    """
    spec = spec_of(masks, config)
    return take(fold(params, masks, config), spec, architecture_of(config)), spec
