"""Gates at five granularities, as one dict of stacked arrays.

    head (L, H)   mha (L,)   intermediate (L, F)   ffn (L,)   hidden (D,)

Log-alphas, probabilities, samples and gradients all have this structure. A kind
that is missing is not pruned. A transform maps masks to masks; `chain` composes.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax import hard_concrete
from cofi_jax.config import KINDS, check_kinds, reject

Masks = Mapping[str, jax.Array]
LogAlpha = Mapping[str, jax.Array]
MaskTransform = Callable[[Masks], Masks]

ALL = KINDS
# Just inside the clamp, so that the noise which breaks ties survives it.
_INIT_MEAN, _INIT_STD = 4.5, 0.01
_UNIFORM_MARGIN = 1e-6
# A block's own gate, and the gates inside the block.
_BLOCKS = {"mha": "head", "ffn": "intermediate"}
# Open for slicing, and too little to show in any float32 sum.
_TINY = 1e-12


def mask_shapes(config, kinds: Sequence[str] = ALL) -> dict[str, tuple[int, ...]]:
    """The shape of each kind's array for a dense `EncoderConfig`.

    Raises:
      UserError: for an unknown kind, or none.
    """
    check_kinds("kinds", kinds)
    layers = len(config.heads)
    shapes = {
        "head": (layers, max(config.heads)),
        "mha": (layers,),
        "intermediate": (layers, max(config.intermediate)),
        "ffn": (layers,),
        "hidden": (config.hidden_size,),
    }
    return {kind: shapes[kind] for kind in KINDS if kind in kinds}


def init_log_alpha(config, key: jax.Array, kinds: Sequence[str] = ALL) -> LogAlpha:
    """Open gates: normal around 4.5 with deviation 0.01, float32."""
    return _init(key, tuple(mask_shapes(config, kinds).items()))


@functools.partial(jax.jit, static_argnames="shapes")
def _init(key, shapes):
    return {
        kind: _INIT_MEAN + _INIT_STD * jax.random.normal(_named(key, kind), shape)
        for kind, shape in shapes
    }


@jax.jit
def sample(log_alpha: LogAlpha, key: jax.Array) -> Masks:
    """One draw of every gate, shared by the whole batch.

    Keys are derived from the kind's name, so that leaving one kind out does not
    change the draws of the others.
    """
    return {kind: _sample(la, _named(key, kind)) for kind, la in log_alpha.items()}


def _sample(log_alpha, key):
    u = jax.random.uniform(
        key, log_alpha.shape, minval=_UNIFORM_MARGIN, maxval=1 - _UNIFORM_MARGIN
    )
    return hard_concrete.quantile(u, log_alpha)


def _named(key, name):
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def prob_active(log_alpha: LogAlpha) -> Masks:
    """P(gate > 0) of every gate."""
    return jax.tree.map(hard_concrete.prob_active, dict(log_alpha))


@jax.jit
def evaluation_masks(log_alpha: LogAlpha) -> Masks:
    """The deterministic masks that evaluation and slicing use.

    In each row of n gates the round(n - sum of P(gate > 0)) smallest become 0, of
    equals the one with the lowest index first; the rest keep their soft value. A
    layer's own gate (mha, ffn) is a row of one: it closes when P < 1/2.
    """
    return {kind: _evaluate(kind, la) for kind, la in log_alpha.items()}


def _evaluate(kind, log_alpha):
    rows = log_alpha[:, None] if kind in _BLOCKS else jnp.atleast_2d(log_alpha)
    closed = jnp.round(jnp.sum(1 - hard_concrete.prob_active(rows), -1, keepdims=True))
    rank = jnp.argsort(jnp.argsort(rows, axis=-1, stable=True), axis=-1)
    values = jnp.where(rank < closed, 0.0, hard_concrete.deterministic(rows))
    return values.reshape(log_alpha.shape)


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
    """Makes every open gate 1."""
    return lambda masks: {k: (v > 0).astype(v.dtype) for k, v in masks.items()}


def drop_empty() -> MaskTransform:
    """Closes a block whose inner gates are all 0, and the gates of a closed block.

    The model's outputs stay the same; the masks then say what slicing removes.
    """

    def apply(masks):
        masks = dict(masks)
        for block, inner in _BLOCKS.items():
            if inner in masks and block in masks:
                any_open = (masks[inner] > 0).any(-1)
                masks[block] = jnp.where(any_open, masks[block], 0)
                masks[inner] = jnp.where(masks[block][:, None] > 0, masks[inner], 0)
        return masks

    return apply


def keep_at_least(**counts: int) -> MaskTransform:
    """Opens gates (value 1) until each row of a kind has at least the given number.

    The first closed gates of a row are opened, e.g. `keep_at_least(hidden=8)`. For
    mha and ffn, whose rows have one gate, the number counts layers.
    """
    check_kinds("kinds", tuple(counts))

    def apply(masks):
        masks = dict(masks)
        for kind, count in counts.items():
            if kind in masks:
                missing = count - _number_open(masks[kind])
                masks[kind] = _reopen(masks[kind], missing, 1.0)
        return masks

    return apply


def round_to_multiple(**multiples: int) -> MaskTransform:
    """Opens gates until each row's number of open ones is a multiple, up to all of it.

    E.g. `round_to_multiple(intermediate=64, head=2)`, for hardware that likes such
    widths. A row without an open gate stays so: an absent block stays absent. The
    first closed gates of a row are opened, to 1e-12: heads and units then weigh
    nothing, so the model's outputs stay the same, but their weights are there for
    fine-tuning to take up. Not so with `hidden`: LayerNorm takes its statistics over
    all open dimensions, so k more beside n change what the model computes, by about
    k / 2n of it; fine-tune afterwards. `harden`, if wanted, comes before.

    Raises:
      UserError: for a kind that is not head, intermediate or hidden, and a multiple
        that is not a whole number above 0.
    """
    check_kinds("kinds", tuple(multiples))
    for kind, multiple in multiples.items():
        if kind in _BLOCKS:
            legal = "a block is there or absent; only widths can be multiples"
            raise reject(kind, multiple, legal)
        if type(multiple) is not int or multiple < 1:
            raise reject(kind, multiple, "must be a whole number above 0")

    def apply(masks):
        masks = dict(masks)
        for kind, multiple in multiples.items():
            if kind in masks:
                # 0 of an empty row, too.
                missing = -_number_open(masks[kind]) % multiple
                masks[kind] = _reopen(masks[kind], missing, _TINY)
        return masks

    return apply


# Multiples of 64 fill the tiles that a GPU's matrix units work on. A CPU likes all
# widths alike. Heads are as wide as they are, and of hidden dimensions none comes free.
WIDTHS = {"gpu": {"intermediate": 64}}


def round_to_device(platform: str = "") -> MaskTransform:
    """`round_to_multiple` of what the device likes, at no loss: see `WIDTHS`.

    Args:
      platform: as jax names them, gpu or cpu; the one in use if not given.
    """
    multiples = WIDTHS.get(platform or jax.default_backend())
    return round_to_multiple(**multiples) if multiples else chain()


def _number_open(gates):
    return jnp.sum(gates > 0, -1, keepdims=True)


def _reopen(gates, number, value):
    """Gives `value` to the first `number` closed gates of each row."""
    closed = gates <= 0
    return jnp.where(closed & (jnp.cumsum(closed, -1) <= number), value, gates)


def keep_layers(*layers: int) -> MaskTransform:
    """Closes all layers but the named ones, counted from 0; see `drop_layers`."""
    return _close_layers(layers, named=False)


def drop_layers(*layers: int) -> MaskTransform:
    """Closes both blocks of the named layers, counted from 0 (reports do from 1).

    The blocks' own gates close and all gates inside them. Where the masks have
    neither for one of the blocks, say attention, its own gates (mha) are added, open
    for the other layers.

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
        for block, inner in _BLOCKS.items():
            if block not in masks and inner not in masks:
                masks[block] = jnp.ones(depths[0])
            if block in masks:
                masks[block] = jnp.where(close, 0, masks[block])
            if inner in masks:
                masks[inner] = jnp.where(close[:, None], 0, masks[inner])
        return masks

    return apply
