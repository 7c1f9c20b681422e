"""Masks of five kinds, as one dict of stacked arrays.

    head (L, H)   mha (L,)   intermediate (L, F)   ffn (L,)   hidden (D,)

A mask is a number in [0, 1]; it is open if it is above 0, and otherwise closed. The
log-alphas, probabilities, samples and gradients of masks have the same structure. A
kind that is missing is not pruned.

H and F are the widths of the widest layer. The rows of narrower layers end with
padding, and the masks of absent blocks are padding, too. The log-alpha of padding is
-inf, so its probability, its samples and its evaluation mask are 0. A function that
takes the sizes of the model ignores the values of padding.
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

# The mean is just inside `LOG_ALPHA_RANGE`, so that clamping keeps the noise, which
# breaks ties between masks.
_INIT_MEAN, _INIT_STD = 4.5, 0.01

_UNIFORM_MARGIN = 1e-6
_DECIDED = 0.95  # With this probability, a mask counts as open or as closed.


def mask_shapes(
    config: EncoderConfig, kinds: Sequence[str] = KINDS
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of the array of each kind.

    Args:
      config: the sizes of the model that is pruned.
      kinds: the kinds that are pruned.

    Raises:
      UserError: if a kind is unknown or if there is none.
    """
    check_kinds("kinds", kinds)
    shapes: dict[str, tuple[int, ...]] = {"hidden": (config.hidden_size,)}
    for block in blocks(config):
        sizes = block.sizes(config)
        shapes[block.outer] = (len(sizes),)
        shapes[block.inner] = (len(sizes), max(sizes, default=0))
    return {kind: shapes[kind] for kind in KINDS if kind in kinds}


def real_positions(config: EncoderConfig) -> dict[str, np.ndarray]:
    """Returns booleans that are False at padding, for the kinds that have padding."""
    real = {k: v for block in blocks(config) for k, v in block.real(config).items()}
    return {kind: there for kind, there in real.items() if not there.all()}


def kinds_left(config: EncoderConfig, kinds: Sequence[str]) -> tuple[str, ...]:
    """Returns those of the kinds that have a mask of something that is there."""
    real, shapes = real_positions(config), mask_shapes(config, kinds)
    return tuple(
        kind
        for kind in kinds
        if np.broadcast_to(real.get(kind, True), shapes[kind]).any()
    )


def without_padding(masks: Masks, config: EncoderConfig) -> dict:
    """Returns the masks with 0 at padding."""
    real = real_positions(config)
    return {k: v * real[k] if k in real else v for k, v in masks.items()}


def present_blocks(masks: Masks, config: EncoderConfig) -> dict[str, jax.Array]:
    """Returns in which layers each block is present: (L,) booleans by its name.

    A block is absent if its own mask is 0 or if the masks of all its units are 0.
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
    """Draws the log-alphas of open masks.

    Args:
      config: the sizes of the model that is pruned.
      key: the random key.
      kinds: the kinds that are pruned.

    Returns:
      float32 arrays of the shapes of the masks, drawn from a normal distribution with
      mean 4.5 and standard deviation 0.01; -inf at padding.

    Raises:
      UserError: if a kind is unknown or if there is none.
    """
    log_alpha = _init(key, tuple(mask_shapes(config, kinds).items()))
    real = real_positions(config)
    return {k: jnp.where(real.get(k, True), v, -jnp.inf) for k, v in log_alpha.items()}


@functools.partial(jax.jit, static_argnames="shapes")
def _init(key, shapes):
    return {
        kind: _INIT_MEAN + _INIT_STD * jax.random.normal(_key_of(key, kind), shape)
        for kind, shape in shapes
    }


def clamp(log_alpha: LogAlpha) -> LogAlpha:
    """Clips log-alphas to `hard_concrete.LOG_ALPHA_RANGE`; padding stays -inf."""
    return {
        kind: jnp.where(jnp.isneginf(value), value, hard_concrete.clamp(value))
        for kind, value in log_alpha.items()
    }


@jax.jit
def sample(log_alpha: LogAlpha, key: jax.Array) -> Masks:
    """Draws every mask once; a whole batch shares the draw.

    The key of a kind is derived from its name, so the draws of one kind do not depend
    on which other kinds are pruned.

    Args:
      log_alpha: the log-alphas of the pruned kinds.
      key: the random key.

    Returns:
      Masks in [0, 1] of the same shapes.
    """
    return {kind: _sample(v, _key_of(key, kind)) for kind, v in log_alpha.items()}


def _sample(log_alpha, key):
    u = jax.random.uniform(
        key, log_alpha.shape, minval=_UNIFORM_MARGIN, maxval=1 - _UNIFORM_MARGIN
    )
    return hard_concrete.quantile(u, log_alpha)


def _key_of(key, kind):
    return jax.random.fold_in(key, zlib.crc32(kind.encode()))


def prob_active(log_alpha: LogAlpha) -> Masks:
    """Returns the probability that each mask is open."""
    return jax.tree.map(hard_concrete.prob_active, dict(log_alpha))


def decisions(log_alpha: LogAlpha, config: EncoderConfig) -> dict[str, jax.Array]:
    """Returns how far the decision which masks close has come, padding left out.

    Args:
      log_alpha: the log-alphas of the pruned kinds.
      config: the sizes of the model that is pruned.

    Returns:
      Scalars in [0, 1]: for each kind `closed_<kind>`, the expected fraction of its
      masks that is closed, and `undecided`, the fraction of all masks that are neither
      open nor closed with a probability of more than 0.95.
    """
    real, probabilities = real_positions(config), prob_active(log_alpha)
    there = {k: real.get(k, np.ones(v.shape, bool)) for k, v in probabilities.items()}
    found, undecided = {}, jnp.zeros(())
    for kind, probability in probabilities.items():
        closed = jnp.sum((1 - probability) * there[kind])
        found[f"closed_{kind}"] = closed / max(there[kind].sum(), 1)
        between = jnp.abs(probability - 0.5) < _DECIDED - 0.5
        undecided += jnp.sum(between & there[kind])
    total = sum(int(mask.sum()) for mask in there.values())
    return found | {"undecided": undecided / max(total, 1)}


@jax.jit
def evaluation_masks(log_alpha: LogAlpha) -> Masks:
    """Returns the deterministic masks that evaluation and slicing use.

    In each row, as many masks close as are expected to be 0 in a sample, rounded to a
    whole number: those with the smallest log-alphas, and of equal ones those with the
    lowest index. The other masks take their soft value. The mask of a whole block (mha
    or ffn) is a row of its own, which closes if P(mask > 0) < 1/2.
    """
    return {kind: _evaluate(kind, v) for kind, v in log_alpha.items()}


def _evaluate(kind, log_alpha):
    rows = log_alpha[:, None] if kind in INNER else jnp.atleast_2d(log_alpha)
    padding = jnp.isneginf(rows)  # It is closed anyway, besides those counted here.
    expected = jnp.where(padding, 0, 1 - hard_concrete.prob_active(rows))
    closed = jnp.round(jnp.sum(expected, -1, keepdims=True))
    closed += jnp.sum(padding, -1, keepdims=True)
    rank = jnp.argsort(jnp.argsort(rows, axis=-1, stable=True), axis=-1)
    values = jnp.where(rank < closed, 0.0, hard_concrete.deterministic(rows))
    return values.reshape(log_alpha.shape)
