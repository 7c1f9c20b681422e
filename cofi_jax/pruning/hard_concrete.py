"""The hard-concrete distribution (Louizos et al., 2018), arrays to arrays.

In training, a mask is a random variable. Its distribution has one parameter, the
location `log_alpha`: with noise `u` that is uniform in (0, 1),

    s = sigmoid((ln u - ln(1 - u) + log_alpha) / TEMPERATURE)
    mask = clip(low + (high - low) * s, 0, 1),      (low, high) = STRETCH

so a mask is exactly 0, and exactly 1, with a probability above 0. Every function here
works element by element, on arrays of any shape.
"""

import math

import jax
import jax.numpy as jnp

TEMPERATURE = 2 / 3
STRETCH = _LOW, _HIGH = (-0.1, 1.1)

# Log-alphas stay in this range. Beyond it the gradient of P(mask > 0) vanishes, so a
# closed mask would never open again and training would miss the sparsity target.
LOG_ALPHA_RANGE = (math.log(1e-2), math.log(1e2))

# The log-alpha of a mask with P(mask > 0) = 1/2.
_HALF_OPEN = TEMPERATURE * math.log(-_LOW / _HIGH)

# The distance from fully open to P(mask > 0) = 1/2, about 6.2. Adam covers at most the
# learning rate in a step, so this bounds the steps that closing a mask takes.
CLOSING_DISTANCE = LOG_ALPHA_RANGE[1] - _HALF_OPEN


def quantile(u: jax.Array, log_alpha: jax.Array) -> jax.Array:
    """Returns the masks in [0, 1] that uniform noise `u` in (0, 1) gives."""
    s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / TEMPERATURE)
    return jnp.clip(_LOW + (_HIGH - _LOW) * s, 0.0, 1.0)


def prob_active(log_alpha: jax.Array) -> jax.Array:
    """Returns the probability that a mask is above 0."""
    return jax.nn.sigmoid(log_alpha - _HALF_OPEN)


def deterministic(log_alpha: jax.Array) -> jax.Array:
    """Returns the soft value in (0, 1) of a mask that stays open at evaluation.

    The formula is that of the original implementation; it is neither the mean nor the
    median of the distribution.
    """
    return jax.nn.sigmoid(0.8 / TEMPERATURE * log_alpha)


def clamp(log_alpha: jax.Array) -> jax.Array:
    """Clips `log_alpha` to `LOG_ALPHA_RANGE`."""
    return jnp.clip(log_alpha, *LOG_ALPHA_RANGE)
