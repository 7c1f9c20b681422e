"""Gates at five granularities, as one dict of stacked arrays.

    head (L, H)   mha (L,)   intermediate (L, F)   ffn (L,)   hidden (D,)

Log-alphas, probabilities, samples and gradients all have this structure. A kind
that is missing is not pruned. A transform maps masks to masks; `chain` composes.
"""

import functools
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from cofi_jax.models.spec import KINDS, check_kinds
from cofi_jax.pruning import hard_concrete

Masks = Mapping[str, jax.Array]


LogAlpha = Mapping[str, jax.Array]


ALL = KINDS


# Just inside the clamp, so that the noise which breaks ties survives it.
_INIT_MEAN, _INIT_STD = 4.5, 0.01


_UNIFORM_MARGIN = 1e-6


# A block's own gate, and the gates inside the block.
_BLOCKS = {"mha": "head", "ffn": "intermediate"}


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
