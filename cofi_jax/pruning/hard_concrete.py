"""The hard-concrete distribution (Louizos et al., 2018), arrays to arrays.

With noise `u` in (0, 1) and location `log_alpha`,

    s = sigmoid((ln u - ln(1 - u) + log_alpha) / TEMPERATURE)
    gate = clip(low + (high - low) * s, 0, 1),      (low, high) = STRETCH

so a gate is exactly 0 or exactly 1 with positive probability.
"""

import math

import jax
import jax.numpy as jnp

TEMPERATURE = 2 / 3
STRETCH = _LOW, _HIGH = (-0.1, 1.1)

# Log-alphas stay in this range: beyond it the gradient of P(gate > 0) vanishes, gates
# never come back, and the sparsity constraint is missed.
LOG_ALPHA_RANGE = (math.log(1e-2), math.log(1e2))

# sigmoid(log_alpha - _CLOSING) = P(gate > 0)
_CLOSING = TEMPERATURE * math.log(-_LOW / _HIGH)

# The way from fully open to P(gate > 0) = 1/2, about 6.2: Adam moves a log-alpha by at
# most its learning rate in a step.
CLOSING_DISTANCE = LOG_ALPHA_RANGE[1] - _CLOSING


def quantile(u: jax.Array, log_alpha: jax.Array) -> jax.Array:
    """Gate values in [0, 1] for uniform noise `u` in (0, 1), elementwise."""
    s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / TEMPERATURE)
    return jnp.clip(_LOW + (_HIGH - _LOW) * s, 0.0, 1.0)


def prob_active(log_alpha: jax.Array) -> jax.Array:
    """P(gate > 0), elementwise."""
    return jax.nn.sigmoid(log_alpha - _CLOSING)


def deterministic(log_alpha: jax.Array) -> jax.Array:
    """The soft value in (0, 1) of a gate that stays open at evaluation.

    The original's `sigmoid(0.8 / TEMPERATURE * log_alpha)`, neither the mean nor
    the median of the distribution.
    """
    return jax.nn.sigmoid(0.8 / TEMPERATURE * log_alpha)


def clamp(log_alpha: jax.Array) -> jax.Array:
    """`log_alpha` kept in `LOG_ALPHA_RANGE`, elementwise."""
    return jnp.clip(log_alpha, *LOG_ALPHA_RANGE)
