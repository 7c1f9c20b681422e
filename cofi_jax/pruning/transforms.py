"""Transforms from masks to masks.

Those that open masks take the model's sizes: in a model whose layers differ in width,
the rows of masks are padded (`masks.mask_shapes`), and padding must stay closed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import INNER, check_kinds
from cofi_jax.pruning.masks import Masks, without_padding

MaskTransform = Callable[[Masks], Masks]

# A mask of this value is open for slicing and too little to show in any float32 sum.
_TINY = 1e-12


def chain(*transforms: MaskTransform) -> MaskTransform:
    """Applies `transforms` from left to right; `chain()` is the identity."""
    return lambda masks: functools.reduce(lambda m, f: f(m), transforms, dict(masks))


def only(*kinds: str) -> MaskTransform:
    """Keeps the named kinds; the others are no longer pruned."""
    check_kinds("kinds", kinds)
    return lambda masks: {k: v for k, v in masks.items() if k in kinds}


def without(*kinds: str) -> MaskTransform:
    """Drops the named kinds, which are then no longer pruned."""
    check_kinds("kinds", kinds)
    return lambda masks: {k: v for k, v in masks.items() if k not in kinds}


def harden() -> MaskTransform:
    """Makes every open mask 1."""
    return lambda masks: {k: (v > 0).astype(v.dtype) for k, v in masks.items()}


def drop_empty() -> MaskTransform:
    """Closes a block whose inner masks are all 0, and the masks inside a closed block.

    The model's outputs stay the same; the masks then say what slicing removes.
    """

    def apply(masks):
        masks = dict(masks)
        for outer, inner in INNER.items():
            if inner in masks and outer in masks:
                any_open = (masks[inner] > 0).any(-1)
                masks[outer] = jnp.where(any_open, masks[outer], 0)
                masks[inner] = jnp.where(masks[outer][:, None] > 0, masks[inner], 0)
        return masks

    return apply


def keep_at_least(config: EncoderConfig | None = None, **counts: int) -> MaskTransform:
    """Opens masks (value 1) until each row of a kind has at least the given number.

    The first closed masks of a row are opened, e.g. `keep_at_least(hidden=8)`. For
    mha and ffn, whose rows have one mask, the number counts layers. Layers that differ
    in width need `config`.
    """
    check_kinds("kinds", tuple(counts))

    def apply(masks):
        masks = dict(masks)
        for kind, count in counts.items():
            if kind in masks:
                missing = count - _number_open(masks[kind])
                masks[kind] = _reopen(masks[kind], missing, 1.0)
        return without_padding(masks, config) if config else masks

    return apply


def round_to_multiple(
    config: EncoderConfig | None = None, **multiples: int
) -> MaskTransform:
    """Opens masks until each row's number of open ones is a multiple, up to all of it.

    E.g. `round_to_multiple(intermediate=64, head=2)`, for hardware that likes such
    widths. A row without an open mask stays so: an absent block stays absent. The
    first closed masks of a row are opened, to 1e-12: heads and units then weigh
    nothing, so the model's outputs stay the same, but their weights are there for
    fine-tuning to take up. This is not so with `hidden`: LayerNorm takes its statistics
    over all open dimensions, so k more beside n change what the model computes, by
    about k / 2n of it; fine-tune afterwards. `harden`, if wanted, comes before. Layers
    that differ in width need `config`.

    Raises:
      UserError: for a kind that is not head, intermediate or hidden, and a multiple
        that is not a whole number above 0.
    """
    check_kinds("kinds", tuple(multiples))
    for kind, multiple in multiples.items():
        if kind in INNER:
            legal = "a block is there or absent; only widths can be multiples"
            raise reject(kind, multiple, legal)
        if type(multiple) is not int or multiple < 1:
            raise reject(kind, multiple, "must be a whole number above 0")

    def apply(masks):
        masks = dict(masks)
        for kind, multiple in multiples.items():
            if kind in masks:
                missing = -_number_open(masks[kind]) % multiple  # 0 of an empty row
                masks[kind] = _reopen(masks[kind], missing, _TINY)
        return without_padding(masks, config) if config else masks

    return apply


# Multiples of 64 fill the tiles that a GPU's matrix units work on; a CPU runs all
# widths alike. Heads have the width they have, and no hidden dimension comes for free.
WIDTHS = {"gpu": {"intermediate": 64}}


def round_to_device(
    platform: str = "", config: EncoderConfig | None = None
) -> MaskTransform:
    """`round_to_multiple` of what the device runs well, at no loss: see `WIDTHS`.

    Args:
      platform: as jax names them, gpu or cpu; the one in use if not given.
      config: the sizes of the model that is pruned, where its layers differ in width.
    """
    multiples = WIDTHS.get(platform or jax.default_backend())
    return round_to_multiple(config, **multiples) if multiples else chain()


def _number_open(masks):
    return jnp.sum(masks > 0, -1, keepdims=True)


def _reopen(masks, number, value):
    """Gives `value` to the first `number` closed masks of each row."""
    closed = masks <= 0
    return jnp.where(closed & (jnp.cumsum(closed, -1) <= number), value, masks)


def keep_layers(*layers: int) -> MaskTransform:
    """Closes all layers but the named ones, counted from 0; see `drop_layers`."""
    return _close_layers(layers, named=False)


def drop_layers(*layers: int) -> MaskTransform:
    """Closes both blocks of the named layers, counted from 0 (reports do from 1).

    The masks of the blocks close and all masks inside them. Where there is neither for
    one of the blocks, say attention, its own kind (mha) is added, open for the other
    layers.

    Raises:
      UserError: where no layer is named, or something that is no layer; when
        applied, for a layer that the masks do not have, and for masks of no kind
        that tells how many layers there are.
    """
    return _close_layers(layers, named=True)


def _close_layers(layers, *, named):
    for layer in layers:
        if not isinstance(layer, int | np.integer) or layer < 0:
            raise reject("layers", layer, "must be a whole number, 0 for the first")
    if not layers:
        raise reject("layers", layers, "must name at least one")

    def apply(masks):
        masks = dict(masks)
        depths = [len(value) for kind, value in masks.items() if kind != "hidden"]
        if not depths:
            legal = "do not tell how many layers there are; any other kind would"
            raise reject("masks", tuple(masks), legal)
        if max(layers) >= depths[0]:
            legal = f"must be below {depths[0]}, the number of layers"
            raise reject("layers", max(layers), legal)
        close = np.isin(np.arange(depths[0]), layers) == named
        for outer, inner in INNER.items():
            if outer not in masks and inner not in masks:
                masks[outer] = jnp.ones(depths[0])
            if outer in masks:
                masks[outer] = jnp.where(close, 0, masks[outer])
            if inner in masks:
                masks[inner] = jnp.where(close[:, None], 0, masks[inner])
        return masks

    return apply
