"""The operations between the matrix products, and the skipping of absent blocks.

For the backward pass an activation and a LayerNorm keep only what they were given:
computing their results again is faster than writing and reading them. The backward pass
of LayerNorm is written down, so forward mode (`jax.jvp`) does not work.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """The product of x and the normal distribution function at x, to 1e-6.

    It is computed in float32 by erf, as in PyTorch, which is twice as fast as by erfc
    and less exact far below 0.
    """
    wide = x.astype(jnp.float32)
    return (wide * 0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


# The activations by their names in Hugging Face configs.
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
    """Dropout whose rate is rounded to a 65,536th.

    Drawing random words is what dropout costs, so each word of 32 bits serves two
    numbers: those at n and n + N/2 of the last axis, which has N.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Zeroes a fraction `rate` of `x` and scales up the rest.

        Args:
          x: an array of one axis or more.
          train: if False, `x` is returned as it is.

        Returns:
          An array of the shape and the dtype of `x`.
        """
        threshold = min(round(self.rate * 2**16), 2**16 - 1)
        if not train or not threshold:
            return x
        shape = (*x.shape[:-1], -(-x.shape[-1] // 2))
        words = jax.random.bits(self.make_rng("dropout"), shape, jnp.uint32)
        halves = (half >= threshold for half in (words >> 16, words & 0xFFFF))
        kept = jnp.concatenate([*halves], -1)[..., : x.shape[-1]]
        return _drop(1 - threshold / 2**16, kept, x)


# Without the checkpoint an array of zeros would be kept for the backward pass, too.
@functools.partial(jax.checkpoint, static_argnums=0)
def _drop(share, kept, x):
    return jnp.where(kept, x.astype(jnp.float32) / share, 0).astype(x.dtype)


class Norm(nn.Module):
    """LayerNorm over the open hidden dimensions, times the hidden masks.

    With s the share of a dimension in the statistics, 1 / D or that of the open ones,

        mean = sum(s x)    variance = sum(s (x - mean)^2)
        n = (x - mean) / sqrt(variance + epsilon)    y = n scale + bias
        dx = (g - s (sum(g) + n sum(g n))) / sqrt(variance + epsilon),  g = scale dy

    and x is 0 in the closed dimensions, so that its plain sum is that of the open ones.
    """

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, masks: jax.Array | None) -> jax.Array:
        """Normalises the last axis, with statistics in float32.

        Args:
          x: (..., D).
          masks: (D,) hidden masks, or None.

        Returns:
          (..., D) of the module's dtype.
        """
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        open_ = None
        if masks is not None:
            open_ = masks > 0
            # Folding them here costs D products; slicing folds them likewise.
            scale, bias = scale * masks, bias * masks
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


# Skipping on a CPU. `if_present` and what it uses serve `bert._skip_absent` alone.
#
# jax.lax.cond by itself would hand everything that the backward pass needs, copies of
# the parameters among it, from one branch to the other. Here only what the block
# computes is handed over:
#
#                     present                          absent
#
#   forward     x ---> block ---> y              x ----------------> y
#                        |                                 zeros
#                        v computed (activations)            |
#                        |                                   v
#                 - - - - - - - - kept from here to there - - - - - - - -
#                        |        x, params, masks: as they are
#                        v
#   backward   dx <--- block's <--- dy          dx <---------------- dy
#              dparams pullback                 dparams = dmasks = 0
#              dmasks
#
# The pullback of `jax.vjp` is a pytree: its arrays are either operands of the block or
# computed by it. A `_Recipe` says which, so that the other branch can rebuild it.


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Recipe:
    """The way to put a pullback together again.

    Attributes:
      structure: its tree.
      places: for each of its arrays which operand it is, or None if it was computed.
    """

    structure: Any
    places: tuple[int | None, ...]


def if_present(
    present: jax.Array, block: Callable, fixed: Any, x: jax.Array, *operands: Any
) -> jax.Array:
    """`block(fixed, x, *operands)`, or x where `present` is False.

    Args:
      present: () bool.
      block: keeps the shape and dtype of x; captures nothing that is differentiated.
      fixed: a pytree that is not differentiated.
      x: a floating point array.
      *operands: pytrees of such arrays.
    """
    if jax.default_backend() != "cpu":  # a GPU would wait for the host at a branch
        return jnp.where(present, block(fixed, x, *operands), x)

    @jax.custom_vjp
    def run(present, fixed, *operands):
        return jax.lax.cond(present, block, lambda fixed, x, *_: x, fixed, *operands)

    def forward(present, fixed, *operands):
        recipes = []

        def there(fixed, *operands):
            out, pull = jax.vjp(lambda *operands: block(fixed, *operands), *operands)
            arrays, structure = jax.tree.flatten(pull)
            place_of = {id(x): i for i, x in enumerate(jax.tree.leaves(operands))}
            places = tuple(place_of.get(id(x)) for x in arrays)
            recipes.append(_Recipe(structure, places))
            return out, [x for x, i in zip(arrays, places, strict=True) if i is None]

        # Under jit it is traced once, for both its shapes and the branch.
        there = jax.jit(there, inline=True)

        def absent(fixed, x, *_):
            return x, [jnp.zeros(like.shape, like.dtype) for like in likes]

        _, likes = jax.eval_shape(there, fixed, *operands)
        out, computed = jax.lax.cond(present, there, absent, fixed, *operands)
        return out, (recipes[-1], present, computed, operands)

    def backward(kept, gradient):
        recipe, present, computed, operands = kept

        def there(gradient, computed, operands):
            given, rest = jax.tree.leaves(operands), iter(computed)
            arrays = [next(rest) if i is None else given[i] for i in recipe.places]
            return jax.tree.unflatten(recipe.structure, arrays)(gradient)

        def absent(gradient, computed, operands):
            return gradient, *jax.tree.map(jnp.zeros_like, operands[1:])

        found = jax.lax.cond(present, there, absent, gradient, computed, operands)
        return None, None, *found

    run.defvjp(forward, backward)
    return run(present, fixed, x, *operands)
