"""Masks of five kinds, as one dict of stacked arrays.

    head (L, H)   mha (L,)   intermediate (L, F)   ffn (L,)   hidden (D,)

Log-alphas, probabilities, samples and gradients all have this structure. A kind that
is missing is not pruned. Each element is one gate, which is closed where it is 0.

In a model that was sliced before, the widths differ from layer to layer. H and F are
then those of the widest layer, and the elements beyond a layer's own width, as well as
the gates of absent blocks, are padding: -inf in log-alphas and -1 in masks. Whatever
else stands there is not counted, and nothing here or in `transforms` opens padding.
"""

import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import INNER, KINDS, architecture_of, check_kinds
from cofi_jax.pruning import hard_concrete

Masks = Mapping[str, jax.Array]
LogAlpha = Mapping[str, jax.Array]

ALL = KINDS
PADDING = -1.0  # in masks; -inf in log-alphas

# The mean is just inside the clamp, so that the noise which breaks ties survives it.
_INIT_MEAN, _INIT_STD = 4.5, 0.01

_UNIFORM_MARGIN = 1e-6


def real_gates(
    config: EncoderConfig, kinds: Sequence[str] = ALL
) -> dict[str, np.ndarray]:
    """Booleans in the shape of each kind's array: False where it is padding.

    Raises:
      UserError: for an unknown kind, or none.
    """
    check_kinds("kinds", kinds)
    real = {"hidden": np.ones(config.hidden_size, bool)}
    for block in architecture_of(config).blocks:
        widths = np.array(getattr(config, block.widths))
        real[block.outer] = widths > 0  # (L,)
        real[block.inner] = (
            np.arange(widths.max()) < widths[:, None]
        )  # (L, H) or (L, F)
    return {kind: real[kind] for kind in KINDS if kind in kinds}


def mask_shapes(
    config: EncoderConfig, kinds: Sequence[str] = ALL
) -> dict[str, tuple[int, ...]]:
    """The shape of each kind's array for a dense or a sliced model.

    Raises:
      UserError: for an unknown kind, or none.
    """
    return {kind: real.shape for kind, real in real_gates(config, kinds).items()}


def without_padding(masks: Masks, config: EncoderConfig) -> Masks:
    """`masks` with 0 in place of padding; without any, the same arrays."""
    real = real_gates(config)
    return {
        kind: gates if real[kind].all() else gates * real[kind]
        for kind, gates in masks.items()
    }


def init_log_alpha(
    config: EncoderConfig, key: jax.Array, kinds: Sequence[str] = ALL
) -> LogAlpha:
    """Log-alphas of open gates: normal around 4.5 with deviation 0.01, float32."""
    return _init(key, real_gates(config, kinds))


@jax.jit
def _init(key, real):
    def draw(kind, real):
        noise = jax.random.normal(_named(key, kind), real.shape)
        return jnp.where(real, _INIT_MEAN + _INIT_STD * noise, -jnp.inf)

    return {kind: draw(kind, there) for kind, there in real.items()}


@jax.jit
def sample(log_alpha: LogAlpha, key: jax.Array) -> Masks:
    """One draw of every gate, shared by the whole batch; padding is 0.

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


def clamp(log_alpha: LogAlpha) -> LogAlpha:
    """Log-alphas within `hard_concrete.LOG_ALPHA_RANGE`; padding stays padding."""
    return {
        kind: jnp.where(jnp.isneginf(la), la, hard_concrete.clamp(la))
        for kind, la in log_alpha.items()
    }


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
    rows = log_alpha[:, None] if kind in INNER else jnp.atleast_2d(log_alpha)
    real = ~jnp.isneginf(rows)
    closed = jnp.where(real, 1 - hard_concrete.prob_active(rows), 0)
    closed = jnp.round(jnp.sum(closed, -1, keepdims=True))
    closed += jnp.sum(~real, -1, keepdims=True)  # padding ranks first
    rank = jnp.argsort(jnp.argsort(rows, axis=-1, stable=True), axis=-1)
    values = jnp.where(rank < closed, 0.0, hard_concrete.deterministic(rows))
    return jnp.where(real, values, PADDING).reshape(log_alpha.shape)


def alive_layers(config: EncoderConfig, masks: Masks) -> jax.Array:
    """The layers that have a block which is not absent, (L,) booleans."""
    masks = without_padding(masks, config)
    alive = jnp.zeros(len(config.heads), bool)
    for block in architecture_of(config).blocks:
        present = jnp.asarray(getattr(config, block.widths)) > 0
        if block.outer in masks:
            present &= masks[block.outer] > 0
        if block.inner in masks:
            present &= (masks[block.inner] > 0).any(-1)
        alive |= present
    return alive
