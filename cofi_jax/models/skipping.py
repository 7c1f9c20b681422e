"""Blocks that are traced once, and on a CPU skipped where they are absent.

`call_blocks(layer, ...)` computes what `layer(...)` computes where all blocks are
present. It is the only place that knows of the following two savings, and `layer(...)`
with a `jnp.where` around each block can take its place.

Trace: all blocks of the same widths share one trace, which halves the time that the
trace of a whole model takes.

Skip: on a CPU a branch is chosen at run time, forward and back. The branches of a
`lax.cond` must return the same arrays, and what JAX would hand from its forward to its
backward branch includes copies of the weights, so both passes are written down:

               present                            absent
    forward    y, computed = vjp of block(x)      y, computed = x, zeros
                  |
                  |  kept: `computed`, and the operands themselves, which are not copied
                  v
    backward   put the pullback together          dx = dy
               again and call it on dy            d(others) = 0
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cofi_jax.models.spec import BERT, Architecture


def call_blocks(
    layer: nn.Module,
    x: jax.Array,
    attention_mask: jax.Array,
    masks: dict[str, jax.Array],
    *,
    train: bool,
    architecture: Architecture = BERT,
) -> jax.Array:
    """Calls the present blocks of a layer; the absent ones pass x on.

    Args:
      layer: a submodule of the encoder, with a width for each block and `config`.
      x: (B, T, D).
      attention_mask: (B, T), 1 for real tokens and 0 for padding.
      masks: of this layer, see `bert.Layer`.
      train: whether dropout acts.
      architecture: the table of the layer's blocks.

    Returns:
      (B, T, D).
    """
    if layer.is_initializing():
        return layer(x, attention_mask, masks, train=train)
    for block in architecture.blocks:
        if not (width := getattr(layer, block.widths)):
            continue
        params = {name: layer.variables["params"][name] for name in block.modules}
        noise = {"dropout": layer.parent.make_rng("dropout")} if train else {}
        widths = {other.widths: 0 for other in architecture.blocks}
        widths[block.widths] = width
        alone = type(layer)(config=layer.config, parent=None, **widths)
        own = {k: v for k, v in masks.items() if k in (*block.kinds, "hidden")}
        x = _traced_once(
            alone, block.kinds, train, params, own, noise, x, attention_mask
        )
    return x


@functools.partial(jax.jit, static_argnames=("layer", "kinds", "train"))
def _traced_once(layer, kinds, train, params, masks, noise, x, attention_mask):
    """A layer of one block, or x where a mask of its own kinds says it is absent."""

    def run(fixed, x, params, masks):
        noise, attention_mask = fixed
        variables = {"params": params}
        return layer.apply(variables, x, attention_mask, masks, train=train, rngs=noise)

    inputs = (noise, attention_mask), x, params, masks
    open_ = [(masks[kind] > 0).any() for kind in kinds if kind in masks]
    if not open_:
        return run(*inputs)
    return if_present(functools.reduce(jnp.logical_and, open_), run, *inputs)


@jax.tree_util.register_static
class _Recipe:
    """The instructions to put a pullback together again.

    Attributes:
      structure: its tree.
      places: for each of its arrays the number of the operand that it is, or None.
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

        # It is traced once, for the shapes of its results and for the branch.
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
