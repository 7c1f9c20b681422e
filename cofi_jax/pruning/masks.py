"""Masks at five granularities, as one dict of stacked arrays.

    head (L, H)   mha (L,)   intermediate (L, F)   ffn (L,)   hidden (D,)

Log-alphas, probabilities, samples and gradients all have this structure. A kind that
is missing is not pruned. H and F are the widths of the widest layer: the rows of
narrower layers are padded at their end, and the masks of absent blocks are padding as
well. The log-alpha of padding is -inf, so its probability, its samples and its
evaluation mask are 0, and whatever knows the model's sizes ignores what masks hold
there.
"""

import functools
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import INNER, KINDS, blocks, check_kinds
from cofi_jax.pruning import hard_concrete

Masks = Mapping[str, jax.Array | np.ndarray]
LogAlpha = Mapping[str, jax.Array]

# The mean is just inside the clamp, so that the noise which breaks ties survives it.
_INIT_MEAN, _INIT_STD = 4.5, 0.01

_UNIFORM_MARGIN = 1e-6


def mask_shapes(
    config: EncoderConfig, kinds: Sequence[str] = KINDS
) -> dict[str, tuple[int, ...]]:
    """The shape of each kind's array.

    Args:
      config: the sizes of the model that is pruned.
      kinds: the kinds that are pruned.

    Raises:
      UserError: for an unknown kind, or none.
    """
    check_kinds("kinds", kinds)
    shapes: dict[str, tuple[int, ...]] = {"hidden": (config.hidden_size,)}
    for block in blocks(config):
        sizes = block.sizes(config)
        shapes[block.outer] = (len(sizes),)
        shapes[block.inner] = (len(sizes), max(sizes, default=0))
    return {kind: shapes[kind] for kind in KINDS if kind in kinds}


def padded(config: EncoderConfig) -> dict[str, np.ndarray]:
    """The kinds whose masks have padding, each with booleans that are False there."""
    real = {k: v for block in blocks(config) for k, v in block.real(config).items()}
    return {kind: there for kind, there in real.items() if not there.all()}


def without_padding(masks: Masks, config: EncoderConfig) -> dict:
    """The masks with 0 in place of padding."""
    real = padded(config)
    return {k: v * real[k] if k in real else v for k, v in masks.items()}


def present_blocks(masks: Masks, config: EncoderConfig) -> dict[str, jax.Array]:
    """Which layers have a block that is not absent: (L,) booleans by block's name.

    A block is absent when its own mask is 0, or all masks of its units are.
    """
    masks, present = without_padding(masks, config), {}
    for block in blocks(config):
        present[block.name] = jnp.asarray(block.sizes(config)) > 0
        if block.outer in masks:
            present[block.name] &= masks[block.outer] > 0
        if block.inner in masks:
            present[block.name] &= (masks[block.inner] > 0).any(-1)
    return present


def init_log_alpha(
    config: EncoderConfig, key: jax.Array, kinds: Sequence[str] = KINDS
) -> LogAlpha:
    """Log-alphas of open masks: normal around 4.5 with deviation 0.01, float32."""
    log_alpha = _init(key, tuple(mask_shapes(config, kinds).items()))
    real = padded(config)
    return {
        k: jnp.where(real[k], v, -jnp.inf) if k in real else v
        for k, v in log_alpha.items()
    }


@functools.partial(jax.jit, static_argnames="shapes")
def _init(key, shapes):
    return {
        kind: _INIT_MEAN + _INIT_STD * jax.random.normal(_named(key, kind), shape)
        for kind, shape in shapes
    }


def clamp(log_alpha: LogAlpha) -> LogAlpha:
    """The log-alphas kept in `hard_concrete.LOG_ALPHA_RANGE`; padding stays -inf."""
    return {
        kind: jnp.where(jnp.isneginf(value), value, hard_concrete.clamp(value))
        for kind, value in log_alpha.items()
    }


@jax.jit
def sample(log_alpha: LogAlpha, key: jax.Array) -> Masks:
    """One draw of every mask, shared by the whole batch.

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
    """The probability that each mask is above 0."""
    return jax.tree.map(hard_concrete.prob_active, dict(log_alpha))


@jax.jit
def evaluation_masks(log_alpha: LogAlpha) -> Masks:
    """The deterministic masks that evaluation and slicing use.

    In each row of n masks the round(n - sum of P(mask > 0)) smallest become 0, of
    equals the one with the lowest index first; the rest keep their soft value. The
    mask of a whole block (mha, ffn) is a row of one: it closes when P < 1/2.
    """
    return {kind: _evaluate(kind, la) for kind, la in log_alpha.items()}


def _evaluate(kind, log_alpha):
    rows = log_alpha[:, None] if kind in INNER else jnp.atleast_2d(log_alpha)
    padding = jnp.isneginf(rows)  # closed in any case, so it does not compete
    expected = jnp.where(padding, 0, 1 - hard_concrete.prob_active(rows))
    closed = jnp.round(jnp.sum(expected, -1, keepdims=True))
    closed += jnp.sum(padding, -1, keepdims=True)
    rank = jnp.argsort(jnp.argsort(rows, axis=-1, stable=True), axis=-1)
    values = jnp.where(rank < closed, 0.0, hard_concrete.deterministic(rows))
    return values.reshape(log_alpha.shape)
