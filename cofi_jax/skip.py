"""Blocks that may be absent are skipped, forward and backward.

JAX differentiates `cond` by having its first branch return all that the second one
needs, operands included: a block's parameters would be copied each time. Here only
what was computed on the way is handed over, as a gated kernel is. The price is forward
mode: `jax.jvp` does not go through.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_static
class _Recipe:
    """How a pullback is put together again.

    Attributes:
      structure: its tree.
      places: for each of its arrays which operand it is, or None.
    """

    def __init__(self, structure, places):
        self.structure, self.places = structure, places


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
            places = [place_of.get(id(x)) for x in arrays]
            recipes.append(_Recipe(structure, places))
            return out, [x for x, i in zip(arrays, places, strict=True) if i is None]

        there = jax.jit(
            there, inline=True
        )  # traced once, for its shapes and the branch

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
