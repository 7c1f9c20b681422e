"""Slicing: parameters and masks become a smaller model that computes the same.

First `fold` multiplies each mask into the parameters that carry it. Then `take` gathers
the rows and columns whose masks are open. For all masks,

    small_params, spec = prune(params, masks, config)
    model(config)(params, masks) == model(spec.config(config))(small_params)
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import Place, blocks, place
from cofi_jax.pruning.masks import Masks, present_blocks

_LINEAR = ("kernel", "bias")  # the parameters of a linear module


@dataclasses.dataclass(frozen=True)
class PrunedSpec:
    """The heads, feed-forward units and hidden dimensions of a model that stay.

    Attributes:
      heads: for each layer the indices of the heads that stay; () is an absent block.
      intermediate: for each layer the indices of the feed-forward units, likewise.
      hidden: the indices of the hidden dimensions that stay.
    """

    heads: tuple[tuple[int, ...], ...]
    intermediate: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]

    def config(self, config: EncoderConfig) -> EncoderConfig:
        """Returns the sizes of the sliced model, given those of the dense one."""
        return dataclasses.replace(
            config,
            hidden_size=len(self.hidden),
            heads=tuple(map(len, self.heads)),
            intermediate=tuple(map(len, self.intermediate)),
        )

    def masks(self, config: EncoderConfig) -> Masks:
        """Returns masks of all kinds that are 1 at what stays, and 0 elsewhere."""

        def row(kept, size):  # (size,)
            return np.isin(np.arange(size), kept).astype(np.float32)

        masks = {"hidden": row(self.hidden, config.hidden_size)}
        for block in blocks(config):
            width = max(block.sizes(config))
            rows = [row(kept, width) for kept in getattr(self, block.widths)]
            masks[block.inner] = np.stack(rows)
            masks[block.outer] = masks[block.inner].max(-1, initial=0)
        return {kind: jnp.asarray(mask) for kind, mask in masks.items()}

    def compose(self, second: "PrunedSpec") -> "PrunedSpec":
        """Returns the spec that slices like this one and then `second` on the result.

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
        """Inverts `dataclasses.asdict`, whose tuples JSON has turned into lists."""
        nested = {k: tuple(map(tuple, fields[k])) for k in ("heads", "intermediate")}
        return cls(hidden=tuple(fields["hidden"]), **nested)


def spec_of(masks: Masks, config: EncoderConfig) -> PrunedSpec:
    """Returns what `masks` leave of a model with the sizes `config`.

    Raises:
      ValueError: if no hidden dimension is left.
    """
    hidden = _open(masks.get("hidden", np.ones(config.hidden_size)))
    if not hidden:
        raise ValueError("masks['hidden']: at least one dimension must stay open")
    present, kept = present_blocks(masks, config), {}
    for block in blocks(config):
        rows = masks.get(block.inner, 1) * block.real(config)[block.inner]  # (L, W)
        kept[block.widths] = tuple(map(_open, rows * present[block.name][:, None]))
    return PrunedSpec(hidden=hidden, **kept)


def _open(masks):
    """Returns the indices of the open masks of a row."""
    return tuple(np.flatnonzero(np.asarray(masks) > 0).tolist())


def fold(params: dict, masks: Masks, config: EncoderConfig) -> dict:
    """Multiplies every mask into the parameters, whose shapes do not change.

    The masks of heads and of attention blocks scale the kernel of the attention output,
    and the latter also its bias. Likewise, the masks of feed-forward units and blocks
    scale the kernel of the down projection, and the latter also its bias. The masks of
    hidden dimensions scale whatever writes to the hidden states: the embeddings, both
    output projections, and the scale and bias of each LayerNorm.
    """
    flat = _flat(params)
    for path, array in flat.items():
        axes, layer, block = place(path, flat)
        if not axes.endswith("D"):
            continue
        if block is not None and path[1] == block.name:  # It is not the LayerNorm.
            if block.inner in masks and block.unit in axes:
                units = masks[block.inner][layer][: block.sizes(config)[layer]]
                array = array * units.reshape(-1, *(1,) * (len(axes) - 1))
            if block.outer in masks:
                array = array * masks[block.outer][layer]
        flat[path] = array * masks.get("hidden", 1.0)
    return traverse_util.unflatten_dict(flat)


def _flat(params: dict) -> dict[tuple[str, ...], Any]:
    """Returns the parameters by their paths."""
    return dict(traverse_util.flatten_dict(params))


def take(params: dict, spec: PrunedSpec) -> dict:
    """Gathers the rows and columns of the parameters that stay, as new arrays."""
    flat, kept = _flat(params), {}
    for path, array in flat.items():
        of = place(path, flat)
        indices = _indices(spec, of)
        if of.block is not None and not len(indices[of.block.unit]):
            continue  # The block is absent.
        for axis, letter in enumerate(of.axes):
            if letter in indices:
                array = jnp.take(array, indices[letter], axis=axis)
        kept[path] = array
    return traverse_util.unflatten_dict(kept)


def expand(params: dict, spec: PrunedSpec, dense: dict) -> dict:
    """Inverts `take`: puts sliced parameters back to their places in the dense ones.

    With the result and `spec.masks`, the dense model computes what the sliced one does.

    Args:
      params: the parameters of the sliced model.
      spec: what the sliced model has of the dense one.
      dense: the parameters of the dense model, or their `abstract_params`.

    Returns:
      NumPy arrays of the dense shapes, 0 at everything that was cut.
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
    """Returns the indices that stay of the prunable axes at a place, by letter."""
    kept = {"D": spec.hidden}
    if of.block is not None:
        kept[of.block.unit] = getattr(spec, of.block.widths)[of.layer]
    return {letter: np.asarray(indices, int) for letter, indices in kept.items()}


def prune(params: dict, masks: Masks, config: EncoderConfig) -> tuple[dict, PrunedSpec]:
    """Slices a model to a smaller one that computes the same as the masked model.

    Args:
      params: the parameters of the model, which may have been sliced before.
      masks: masks in [0, 1] of any subset of the kinds.
      config: the sizes of the model.

    Returns:
      The parameters of the sliced model, and the spec; `spec.config(config)` gives the
      sizes of the sliced model.

    Raises:
      ValueError: if no hidden dimension is left.
    """
    spec = spec_of(masks, config)
    return take(fold(params, masks, config), spec), spec


def keep_width(params: dict, config: EncoderConfig) -> tuple[dict, EncoderConfig]:
    """Adds a linear layer that changes nothing behind the pooled vector.

    Slicing cuts the rows of its matrix, the identity, like the hidden dimensions that
    these read. So vectors keep their width, and training can fill the cut dimensions.

    Args:
      params: the parameters of a model that pools.
      config: its sizes.

    Returns:
      Those of a model that computes the same. A model that has such a layer stays as it
      is.
    """
    if config.output_activation:
        return params, config
    width = config.hidden_size
    layer = {"output_activation": "identity", "output_bias": False, "num_labels": width}
    config = dataclasses.replace(config, **layer)
    return params | {"classifier": {"kernel": jnp.eye(width)}}, config


def drop_zero_units(params: dict, config: EncoderConfig) -> tuple[dict, PrunedSpec]:
    """Cuts the heads and the feed-forward units that contribute nothing.

    Some pruners set weights to 0 and keep the shapes. A unit contributes nothing if the
    weights behind it are all 0, or if all that lead to its value are 0, biases too,
    because every activation function maps 0 to 0. One unit of each block stays: the
    block may still add its bias, and normalises.

    Args:
      params: the parameters of the model.
      config: the sizes of the model.

    Returns:
      The parameters of a model that computes the same, and what they were cut to.
    """
    masks: dict[str, Any] = {}
    for block in blocks(config):
        before, behind = ("value", "output") if block.unit == "H" else ("up", "down")
        rows = []
        for layer, width in enumerate(block.sizes(config)):
            row = np.zeros(max(block.sizes(config)), np.float32)
            if width:
                module = params[f"layer_{layer}"][block.name]
                kernel, bias = (np.asarray(module[before][k]) for k in _LINEAR)
                inputs = np.abs(np.concatenate([kernel, bias[None]]))  # (D + 1, units)
                outputs = np.abs(np.asarray(module[behind]["kernel"]))  # (units, D)
                alive = inputs.reshape(len(inputs), width, -1).max((0, 2)) > 0
                alive &= outputs.reshape(width, -1).max(-1) > 0
                row[:width] = alive
                row[0] = max(row[0], not alive.any())
            rows.append(row)
        masks[block.inner] = np.stack(rows)
    spec = spec_of(masks, config)
    return take(params, spec), spec
