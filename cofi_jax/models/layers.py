"""Activations, dropout and LayerNorm, which act between the matrix products.

For the backward pass an activation and a LayerNorm keep their input alone: it is faster
to compute their results again than to write and read them. The backward pass of
LayerNorm is written down, so forward-mode differentiation (`jax.jvp`) does not work.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """The product of x and the cumulative normal distribution at x, to 1e-6.

    It is computed in float32 by erf, as in PyTorch. Far below 0, erfc would be more
    exact, but it takes twice as long.
    """
    wide = x.astype(jnp.float32)
    return (wide * 0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


# The keys are the names of Hugging Face.
ACTIVATIONS = {
    name: jax.checkpoint(activation)
    for name, activation in {
        "gelu": gelu,
        "gelu_new": nn.gelu,
        "gelu_pytorch_tanh": nn.gelu,
        "relu": nn.relu,
        "silu": nn.silu,
        "swish": nn.silu,
    }.items()
}


class Dropout(nn.Module):
    """Sets a fraction `rate` of the elements to 0 and scales the others up.

    The rate is rounded to a multiple of 2^-16, so that each random word serves two
    elements, those at n and n + N/2 of the last axis: most of the time that dropout
    takes goes into drawing words.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Drops elements of x, (..., N), if `train`; returns x itself otherwise."""
        threshold = min(round(self.rate * 2**16), 2**16 - 1)
        if not train or not threshold:
            return x
        shape = (*x.shape[:-1], -(-x.shape[-1] // 2))  # (..., N / 2)
        words = jax.random.bits(self.make_rng("dropout"), shape, jnp.uint32)
        halves = (half >= threshold for half in (words >> 16, words & 0xFFFF))
        kept = jnp.concatenate([*halves], -1)[..., : x.shape[-1]]  # (..., N)
        return _drop(1 - threshold / 2**16, kept, x)


# Without the checkpoint, the zeros would be kept for the backward pass as well.
@functools.partial(jax.checkpoint, static_argnums=0)
def _drop(share, kept, x):
    return jnp.where(kept, x.astype(jnp.float32) / share, 0).astype(x.dtype)


class Norm(nn.Module):
    """LayerNorm over the open hidden dimensions, times the hidden mask.

    With s the share of a dimension in the statistics, 1 / D or that of the open ones,

        mean = sum(s x)    variance = sum(s (x - mean)^2)
        n = (x - mean) / sqrt(variance + epsilon)    y = n scale + bias
        dx = (g - s (sum(g) + n sum(g n))) / sqrt(variance + epsilon),  g = scale dy

    and x is 0 in the closed dimensions, so that its plain sum is that of the open ones.
    """

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Normalises x, (..., D), under a mask (D,) or none; statistics in float32."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        open_ = None
        if mask is not None:
            open_ = mask > 0
            # It is folded into D numbers here, as slicing folds it into the parameters.
            scale, bias = scale * mask, bias * mask
        x = x.astype(jnp.float32)
        return _normalise(x, open_, scale, bias, self.epsilon).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalise(x, open_, scale, bias, epsilon):
    return _forward(x, open_, scale, bias, epsilon)[0]


def _forward(x, open_, scale, bias, epsilon):
    count = x.shape[-1] if open_ is None else jnp.maximum(open_.sum(), 1)
    mean = x.sum(-1, keepdims=True) / count
    centred = x - mean if open_ is None else jnp.where(open_, x - mean, 0)
    variance = jnp.square(centred).sum(-1, keepdims=True) / count
    inverse = jax.lax.rsqrt(variance + epsilon)
    result = (x - mean) * inverse * scale + bias
    return result, (x, open_, scale, mean, inverse, count)


def _backward(epsilon, kept, gradient):
    del epsilon
    x, open_, scale, mean, inverse, count = kept
    share = 1 / count if open_ is None else open_ / count
    normal = (x - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    of_scale, of_bias = (gradient * normal).sum(rows), gradient.sum(rows)
    scaled = gradient * scale
    of_mean = scaled.sum(-1, keepdims=True)
    of_spread = (scaled * normal).sum(-1, keepdims=True)
    of_x = inverse * (scaled - share * (of_mean + normal * of_spread))
    return of_x, None, of_scale, of_bias


_normalise.defvjp(_forward, _backward)
