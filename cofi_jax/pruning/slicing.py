"""Slicing: from masks and parameters to a smaller model of the same function.

`fold` multiplies each soft mask into the parameters that carry it, `take` gathers the
rows and columns whose masks are open. For every mask

    model(config)(params, masks) == model(spec.config(config))(prune(params, masks))
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import Place, blocks, place
from cofi_jax.pruning.masks import Masks, present_blocks


@dataclasses.dataclass(frozen=True)
class PrunedSpec:
    """Which heads, feed-forward units and hidden dimensions of a model stay.

    Attributes:
      heads: the heads that stay, per layer; () is an absent block.
      intermediate: the feed-forward units that stay, likewise.
      hidden: the hidden dimensions that stay.
    """

    heads: tuple[tuple[int, ...], ...]
    intermediate: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]

    def config(self, config: EncoderConfig) -> EncoderConfig:
        """The sizes of the smaller model that is cut from one of `config`."""
        return dataclasses.replace(
            config,
            hidden_size=len(self.hidden),
            heads=tuple(map(len, self.heads)),
            intermediate=tuple(map(len, self.intermediate)),
        )

    def masks(self, config: EncoderConfig) -> Masks:
        """Hard masks of all kinds on a model of `config` that keep just this."""

        def row(kept, size):
            return np.isin(np.arange(size), kept).astype(np.float32)

        masks = {"hidden": row(self.hidden, config.hidden_size)}
        for block in blocks(config):
            width = max(block.sizes(config))
            rows = [row(kept, width) for kept in getattr(self, block.widths)]
            masks[block.inner] = np.stack(rows)
            masks[block.outer] = masks[block.inner].max(-1)
        return {kind: jnp.asarray(mask) for kind, mask in masks.items()}

    def compose(self, second: "PrunedSpec") -> "PrunedSpec":
        """What stays of the model that this one cuts when `second` cuts the result.

        `take(take(params, first), second) == take(params, first.compose(second))`.
        """

        def pick(kept, indices):
            return tuple(kept[i] for i in indices)

        return PrunedSpec(
            heads=tuple(map(pick, self.heads, second.heads)),
            intermediate=tuple(map(pick, self.intermediate, second.intermediate)),
            hidden=pick(self.hidden, second.hidden),
        )

    @classmethod
    def from_json(cls, fields: dict) -> "PrunedSpec":
        """The inverse of `dataclasses.asdict` after a passage through JSON."""
        nested = {k: tuple(map(tuple, fields[k])) for k in ("heads", "intermediate")}
        return cls(hidden=tuple(fields["hidden"]), **nested)


def spec_of(masks: Masks, config: EncoderConfig) -> PrunedSpec:
    """What `masks` keep of a model of `config`.

    Raises:
      ValueError: where no hidden dimension is left.
    """
    hidden = _open(masks.get("hidden", np.ones(config.hidden_size)))
    if not hidden:
        raise ValueError("masks['hidden']: at least one dimension must stay open")
    present, kept = present_blocks(masks, config), {}
    for block in blocks(config):
        rows = masks.get(block.inner, 1) * block.real(config)  # (L, W)
        kept[block.widths] = tuple(map(_open, rows * present[block.name][:, None]))
    return PrunedSpec(hidden=hidden, **kept)


def _open(masks):
    return tuple(np.flatnonzero(np.asarray(masks) > 0).tolist())


def fold(params: dict, masks: Masks, config: EncoderConfig) -> dict:
    """`params` with every mask multiplied into them; shapes stay.

    A parameter carries the masks of the axes that it writes to. So head and mha go
    into the attention output kernel (mha also into its bias), intermediate and ffn into
    the down kernel (ffn also into its bias), hidden into the embeddings, both output
    projections and the scale and bias of each LayerNorm.
    """
    flat = _flat(params)
    for path, array in flat.items():
        axes, layer, block = place(path, flat)
        if not axes.endswith("D"):
            continue
        if block is not None and path[1] == block.name:  # not its LayerNorm
            if block.inner in masks and block.unit in axes:
                units = masks[block.inner][layer][: block.sizes(config)[layer]]
                array = array * units.reshape(-1, *(1,) * (len(axes) - 1))
            if block.outer in masks:
                array = array * masks[block.outer][layer]
        flat[path] = array * masks.get("hidden", 1.0)
    return traverse_util.unflatten_dict(flat)


def _flat(params: dict) -> dict[tuple[str, ...], Any]:
    return dict(traverse_util.flatten_dict(params))


def take(params: dict, spec: PrunedSpec) -> dict:
    """The rows and columns of `params` that `spec` keeps, as new arrays."""
    flat, kept = _flat(params), {}
    for path, array in flat.items():
        of = place(path, flat)
        indices = _indices(spec, of)
        if of.block is not None and not len(indices[of.block.unit]):
            continue  # the block is absent
        for axis, letter in enumerate(of.axes):
            if letter in indices:
                array = jnp.take(array, indices[letter], axis=axis)
        kept[path] = array
    return traverse_util.unflatten_dict(kept)


def expand(params: dict, spec: PrunedSpec, dense: dict) -> dict:
    """The inverse of `take`: NumPy arrays of the dense shapes, 0 where nothing stayed.

    With them and `spec.masks` the dense model computes what the sliced one does.

    Args:
      params: of the sliced model.
      spec: what it kept of the dense one.
      dense: the dense parameters, or what `abstract_params` says of them.
    """
    sliced, whole = _flat(params), {}
    flat = _flat(dense)
    for path, like in flat.items():
        whole[path] = np.zeros(like.shape, like.dtype)
        if path in sliced:
            of = place(path, flat)
            axes, indices = zip(of.axes, like.shape, strict=True), _indices(spec, of)
            index = [indices.get(letter, np.arange(size)) for letter, size in axes]
            whole[path][np.ix_(*index)] = sliced[path]
    return traverse_util.unflatten_dict(whole)


def _indices(spec: PrunedSpec, of: Place) -> dict[str, np.ndarray]:
    """What stays of each prunable axis around a parameter, by the axis's letter."""
    kept = {"D": spec.hidden}
    if of.block is not None:
        kept[of.block.unit] = getattr(spec, of.block.widths)[of.layer]
    return {letter: np.asarray(indices, int) for letter, indices in kept.items()}


def prune(params: dict, masks: Masks, config: EncoderConfig) -> tuple[dict, PrunedSpec]:
    """A smaller model that computes what `params` under `masks` compute.

    Args:
      params: the model's parameters; it may be a sliced one itself.
      masks: values in [0, 1], any subset of the kinds.
      config: the model's sizes.

    Returns:
      The smaller model's parameters and the spec; `spec.config(config)` are its sizes.

    Raises:
      ValueError: where no hidden dimension is left.
    """
    spec = spec_of(masks, config)
    return take(fold(params, masks, config), spec), spec
