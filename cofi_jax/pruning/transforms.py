"""Transforms, which are functions from masks to masks.

A transform that opens masks takes the sizes of the model if its layers differ in width.
The masks then have padding (see `masks`), which stays closed and does not count.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import INNER, check_kinds
from cofi_jax.pruning.masks import Masks, real_positions

MaskTransform = Callable[[Masks], Masks]

# A mask of this value is open, but what it scales is too small to change a float32 sum.
_TINY = 1e-12


def chain(*transforms: MaskTransform) -> MaskTransform:
    """Applies the transforms from left to right; `chain()` is the identity."""
    return lambda masks: functools.reduce(lambda m, f: f(m), transforms, dict(masks))


def only(*kinds: str) -> MaskTransform:
    """Keeps the named kinds; the other kinds are then not pruned."""
    check_kinds("kinds", kinds)
    return lambda masks: {k: v for k, v in masks.items() if k in kinds}


def without(*kinds: str) -> MaskTransform:
    """Drops the named kinds, which are then not pruned."""
    check_kinds("kinds", kinds)
    return lambda masks: {k: v for k, v in masks.items() if k not in kinds}


def harden() -> MaskTransform:
    """Sets every open mask to 1."""
    return lambda masks: {k: (v > 0).astype(v.dtype) for k, v in masks.items()}


def drop_empty() -> MaskTransform:
    """Closes each block whose inner masks are all 0, and all masks in closed blocks.

    The outputs of the model do not change, and exactly those masks are then closed that
    slicing removes.
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
    """Opens masks until each row of a kind has at least the given number of open ones.

    An example is `keep_at_least(hidden=8)`. The first closed masks of a row are set to
    1. For `mha` and `ffn`, whose arrays are one row, the number is that of the layers.

    Args:
      config: the sizes of the model that is pruned, if its layers differ in width.
      **counts: the least number of open masks by kind.

    Raises:
      UserError: if a kind is unknown or if there is none.
    """
    check_kinds("kinds", tuple(counts))
    return _open_more(config, lambda kind, number: counts[kind] - number, counts, 1.0)


def keep_most(config: EncoderConfig | None = None, **counts: int) -> MaskTransform:
    """Closes all but the most open masks of each row of a kind.

    An example is `keep_most(head=6, intermediate=512)`, applied to the `ranks` of
    importance. Masks that stay open keep their value; of equally open ones, the first
    stay. For `mha` and `ffn`, whose arrays are one row, the number is that of layers.

    Args:
      config: the sizes of the model that is pruned, if its layers differ in width.
      **counts: the number of masks by kind that stay open in each row, where so many
        are open.

    Raises:
      UserError: if a kind is unknown, if there is none, or if a number is not a whole
        number above 0.
    """
    check_kinds("kinds", tuple(counts))
    for kind, number in counts.items():
        if type(number) is not int or number < 1:
            raise reject(kind, number, "must be a whole number above 0")

    def apply(masks):
        masks, real = dict(masks), real_positions(config) if config else {}
        for kind, number in counts.items():
            if kind in masks:
                there = masks[kind] * real.get(kind, 1.0)
                place = jnp.argsort(jnp.argsort(-there, -1, stable=True), -1)
                masks[kind] = jnp.where(place < number, there, 0)
        return masks

    return apply


def round_to_multiple(
    config: EncoderConfig | None = None, **multiples: int
) -> MaskTransform:
    """Opens masks until the number of open masks of each row is a multiple, or all.

    An example is `round_to_multiple(intermediate=64, head=2)`, for hardware that likes
    such widths. A row without an open mask stays closed, so an absent block stays
    absent.

    The first closed masks of a row are set to 1e-12. Their heads and units then remain
    for fine-tuning but contribute nothing, so the outputs of the model do not change.
    With `hidden` they do, because LayerNorm computes its statistics over all open
    dimensions: k more beside n change them by about k / 2n, and the model needs
    fine-tuning. If masks are to be hardened, `harden` comes before this transform.

    Args:
      config: the sizes of the model that is pruned, if its layers differ in width.
      **multiples: the number by kind that each row is rounded to a multiple of.

    Raises:
      UserError: if a kind is not `head`, `intermediate` or `hidden`, or if a multiple
        is not a whole number above 0.
    """
    check_kinds("kinds", tuple(multiples))
    for kind, multiple in multiples.items():
        if kind in INNER:
            legal = "a block is there or absent; only widths can be multiples"
            raise reject(kind, multiple, legal)
        if type(multiple) is not int or multiple < 1:
            raise reject(kind, multiple, "must be a whole number above 0")

    def missing(kind, number):
        return -number % multiples[kind]  # This is 0 for a row without an open mask.

    return _open_more(config, missing, multiples, _TINY)


def _open_more(config, missing, kinds, value):
    """Sets the first `missing(kind, number)` closed masks of each row to `value`.

    Here `number` is the number of open masks of each row, (..., 1).
    """

    def apply(masks):
        masks, real = dict(masks), real_positions(config) if config else {}
        for kind in kinds:
            if kind in masks:
                mask, there = masks[kind], real.get(kind, True)
                number = jnp.sum((mask * there) > 0, -1, keepdims=True)
                closed = (mask <= 0) & there
                opens = closed & (jnp.cumsum(closed, -1) <= missing(kind, number))
                masks[kind] = jnp.where(opens, value, mask)
        return masks

    return apply


# The multiples by platform. A GPU multiplies matrices in tiles, which multiples of 64
# fill; a CPU runs all widths equally well. Heads are not rounded, as slicing does not
# change their width, nor are hidden dimensions, as opening some changes the outputs.
WIDTHS = {"gpu": {"intermediate": 64}}


def round_to_device(
    platform: str = "", config: EncoderConfig | None = None
) -> MaskTransform:
    """Rounds widths to those in `WIDTHS`, which the device runs well, without a loss.

    Args:
      platform: the platform as JAX names it, "gpu" or "cpu"; if empty, the one in use.
      config: the sizes of the model that is pruned, if its layers differ in width.
    """
    multiples = WIDTHS.get(platform or jax.default_backend())
    return round_to_multiple(config, **multiples) if multiples else chain()


def keep_layers(*layers: int) -> MaskTransform:
    """Closes all layers but the named ones, counted from 0, as `drop_layers` does."""
    return _close_layers(layers, named=False)


def drop_layers(*layers: int) -> MaskTransform:
    """Closes both blocks of the named layers, which count from 0 (in reports, from 1).

    The masks of the blocks close, and so do all masks inside them. If the masks have
    neither kind for one of the blocks, its outer kind (`mha` or `ffn`) is added; it is
    open for the other layers.

    Raises:
      UserError: if no layer is named or if a layer is not a whole number from 0 on;
        when the transform is applied, if the masks do not have the layer or if none of
        their kinds tells the number of layers.
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
