"""The operations between the matrix products.

The activations and LayerNorm keep only their inputs for the backward pass, because to
compute a result again is faster than to write it to memory and to read it back. The
gradient of LayerNorm is a custom VJP, so it has no forward-mode derivative (`jax.jvp`).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """Computes GELU, x times the normal distribution function at x, to within 1e-6.

    The computation is in float32 and uses erf, as PyTorch does. That is twice as fast
    as `jax.nn.gelu`, which uses erfc to be more exact far below 0.
    """
    wide = x.astype(jnp.float32)
    return (wide * 0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


# The activation functions by their names in Hugging Face configs.
ACTIVATIONS = jax.tree.map(
    jax.checkpoint,
    {
        "gelu": gelu,
        "gelu_new": nn.gelu,
        "gelu_pytorch_tanh": nn.gelu,
        "relu": nn.relu,
        "silu": nn.silu,
        "swish": nn.silu,
    },
)


class Dropout(nn.Module):
    """Dropout with a rate that is rounded to a multiple of 1 / 65,536.

    Drawing random bits takes most of the time of dropout, so each word of 32 bits
    decides for two elements, n and n + N / 2 of the last axis of length N.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Zeroes elements at random and scales the others by 1 / (1 - rate).

        Args:
          x: an array (..., N).
          train: whether dropout is applied; if not, `x` is returned.

        Returns:
          An array of the same shape and dtype.
        """
        threshold = min(round(self.rate * 2**16), 2**16 - 1)
        if not train or not threshold:
            return x
        shape = (*x.shape[:-1], -(-x.shape[-1] // 2))
        words = jax.random.bits(self.make_rng("dropout"), shape, jnp.uint32)
        halves = (half >= threshold for half in (words >> 16, words & 0xFFFF))
        kept = jnp.concatenate([*halves], -1)[..., : x.shape[-1]]
        return _drop(1 - threshold / 2**16, kept, x)


# Without the checkpoint, the backward pass would also keep an array of zeros.
@functools.partial(jax.checkpoint, static_argnums=0)
def _drop(share, kept, x):
    return jnp.where(kept, x.astype(jnp.float32) / share, 0).astype(x.dtype)


class Norm(nn.Module):
    """LayerNorm over the open hidden dimensions, multiplied by their masks.

    Each dimension has a share s of the statistics: 0 if it is closed, else 1 divided by
    the number of open dimensions. The input x must be 0 in the closed dimensions. The
    forward pass and, with g = scale * dy, the backward pass are

        mean = sum(s x)    variance = sum(s (x - mean)^2)
        n = (x - mean) / sqrt(variance + epsilon)    y = n scale + bias
        dx = (g - s (sum(g) + n sum(g n))) / sqrt(variance + epsilon)
    """

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, masks: jax.Array | None) -> jax.Array:
        """Normalises the last axis; the statistics are computed in float32.

        Args:
          x: (..., D), 0 in the closed dimensions.
          masks: the masks of the hidden dimensions, (D,), or None.

        Returns:
          (..., D) in the dtype of the module.
        """
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        open_ = None
        if masks is not None:
            open_ = masks > 0
            # To scale these two, as slicing does, is cheaper than to scale the result.
            scale, bias = scale * masks, bias * masks
        x = x.astype(jnp.float32)
        return _normalise(x, open_, scale, bias, self.epsilon).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalise(x, open_, scale, bias, epsilon):
    return _forward(x, open_, scale, bias, epsilon)[0]


def _forward(x, open_, scale, bias, epsilon):
    count = x.shape[-1] if open_ is None else jnp.maximum(open_.sum(), 1)
    # The plain sum is that of the open dimensions, as x is 0 in the closed ones.
    mean = x.sum(-1, keepdims=True) / count  # (..., 1)
    centred = x - mean if open_ is None else jnp.where(open_, x - mean, 0)
    variance = jnp.square(centred).sum(-1, keepdims=True) / count
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (x - mean) * inverse * scale + bias  # (..., D)
    return y, (x, open_, scale, mean, inverse, count)


def _backward(epsilon, residuals, dy):
    del epsilon
    x, open_, scale, mean, inverse, count = residuals
    share = 1 / count if open_ is None else open_ / count
    n = (x - mean) * inverse  # (..., D)
    batch_axes = tuple(range(x.ndim - 1))
    dscale, dbias = (dy * n).sum(batch_axes), dy.sum(batch_axes)  # (D,), (D,)
    g = dy * scale
    sum_g = g.sum(-1, keepdims=True)
    sum_gn = (g * n).sum(-1, keepdims=True)
    dx = inverse * (g - share * (sum_g + n * sum_gn))
    return dx, None, dscale, dbias


_normalise.defvjp(_forward, _backward)
