"""The importance of units if those that stay are fitted to make up for them.

It is the optimal brain surgeon (Hassibi & Stork, 1993) with the curvature of LLM
Surgeon (van der Ouderaa et al., ICLR 2024). If the kernel and the bias W of the
projection that writes a block's output change by V, the mean loss of a row grows, to
second order and with the Fisher information in place of the Hessian, by

    1/2 tr(V^T A V H),    A = sum |g|^2 u u^T / sum |g|^2,    H = sum g g^T / rows

with sums over all tokens, where u are the outputs of the units and 1, and g is the
gradient of a row's loss with respect to the sum in front of the LayerNorm. A part of
its mean is added to the diagonal of A. Of all V that remove the unit j, the best leaves

    1/2 tr(W_j^T ([A^-1]_jj)^-1 W_j H)

where W_j are the unit's rows of W. Then the other rows have made up for what they can,
which is what `reconstruct` lets them do after the cut.

Shapes: B batch, T tokens, D hidden dimensions, n units of d outputs each, N = n d.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax import distributed
from cofi_jax.errors import reject
from cofi_jax.models.bert import Batch, Encoder, Projection
from cofi_jax.models.layers import Norm
from cofi_jax.models.spec import Block, blocks
from cofi_jax.pruning.masks import Masks, mask_shapes
from cofi_jax.training.importance import own_loss, summed
from cofi_jax.training.step import quick_to_compile

# What is added to the diagonal of A, as a fraction of its mean.
_DAMPING = 1e-2
# Of the units that are left, this part is removed before the others are measured anew.
_AT_ONCE = 1 / 32


def compensated_importance(
    model: Encoder,
    params: dict,
    batches: Iterable[Batch],
    *,
    kinds: Sequence[str] = ("head", "mha", "intermediate", "ffn"),
    labels: bool = True,
) -> Masks:
    """Measures what each unit is worth if the others make up for it.

    Units are removed one after the other, in each block on its own, and those that are
    left make up for each. So a unit that another one can stand in for is worth little
    as long as the other one is there. The result takes the place of that of
    `importance`, which measures each mask alone and without any compensation.

    Args:
      model: the module, dense or sliced.
      params: its parameters.
      batches: the batches of `data.batches.stream`, without the row numbers. About 16
        batches of 32 rows are enough for the order of the units.
      kinds: the kinds of masks that are measured, all but `hidden`.
      labels: whether the loss is that of the task, as in `importance`.

    Returns:
      For each kind a float array of the shape of its masks, at least 0, and 0 at
      padding. The value of a unit is twice the estimate of the loss that its removal
      adds, and never below that of one that was removed before. The estimate is for the
      rows that it was measured on; on others, more is lost. That of a whole block is
      the sum over its units.

    Raises:
      UserError: if a kind is unknown or `hidden`, or if there is none.
      ValueError: if there is no batch, or if a gradient is not finite.
    """
    config = dataclasses.replace(model.config, dropout=0.0)
    found = {k: np.zeros(shape) for k, shape in mask_shapes(config, kinds).items()}
    if "hidden" in found:
        raise reject("kinds", "hidden", "has no units that could make up for others")
    measure = _moments(Encoder(config), labels, tuple(kinds))
    (rows, sums), _ = summed(functools.partial(measure, params), batches)
    rows = float(distributed.fetch(rows))
    for (layer, block), moments in zip(_places(config, kinds), sums, strict=True):
        outputs, gradients = map(np.float64, distributed.fetch(moments))
        if not np.isfinite(outputs).all():
            raise ValueError(f"layer_{layer}/{block.name}: a gradient is not finite")
        kernel = params[f"layer_{layer}"][block.name][block.output]["kernel"]
        kernel = np.float64(distributed.fetch(kernel)).reshape(-1, len(gradients))
        if not (total_gradient := np.trace(gradients)):
            continue  # Nothing depends on the block.
        outputs /= total_gradient
        units = block.sizes(config)[layer]
        added = _added_losses(outputs, kernel @ _root(gradients / rows), units)
        if block.inner in found:
            found[block.inner][layer, :units] = added
        if block.outer in found:
            found[block.outer][layer] = added.sum()
    return found


def _places(config, kinds) -> list[tuple[int, Block]]:
    """The layers and the blocks that are there and have masks of these kinds."""
    return [
        (layer, block)
        for layer in range(len(config.heads))
        for block in blocks(config)
        if block.sizes(config)[layer] and {block.inner, block.outer} & {*kinds}
    ]


@functools.cache
def _moments(model, labels, kinds):
    """Returns the jitted function of (params, batch, key).

    It gives the number of rows and, for each of the `_places`, the sums over tokens of
    |g|^2 u u^T, which is (N + 1, N + 1), and of g g^T, which is (D, D).
    """
    config, places = model.config, _places(model.config, kinds)
    numbers = {
        (f"layer_{layer}", name): number
        for number, (layer, block) in enumerate(places)
        for name in (block.name, block.norm)
    }

    def loss(shifts, params, batch, key):
        units = [jnp.zeros(())] * len(shifts)

        def watch(call, args, kwargs, context):
            module = context.module
            number = numbers.get(module.path[:2])
            if number is not None and isinstance(module, Projection):
                units[number] = args[0]
            elif number is not None and isinstance(module, Norm):
                args = (args[0] + shifts[number], *args[1:])
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            logits = model.apply({"params": params}, batch).logits
        return own_loss(config.problem, logits, batch, key, labels), units

    def moments(params, batch, key):
        shape = (*batch["attention_mask"].shape, config.hidden_size)  # (B, T, D)
        shifts = [jnp.zeros(shape) for _ in places]
        gradients, units = jax.grad(loss, has_aux=True)(shifts, params, batch, key)
        rows = batch["weight"].sum()  # The loss is the mean over them.
        real = (batch["attention_mask"] > 0) * batch["weight"][:, None]  # (B, T)
        return rows, [
            _of_block(each, gradient * (rows * real)[..., None])
            for each, gradient in zip(units, gradients, strict=True)
        ]

    return jax.jit(moments, compiler_options=quick_to_compile())


def _of_block(units, gradients):
    """The two sums of a block with `units` (B, T, ...) and `gradients` (B, T, D)."""
    units = units.reshape(*gradients.shape[:2], -1).astype(jnp.float32)
    units = jnp.concatenate([units, jnp.ones((*gradients.shape[:2], 1))], -1)
    units = units * jnp.linalg.norm(gradients, axis=-1, keepdims=True)
    products = functools.partial(jnp.einsum, "btu,btv->uv", precision="highest")
    return products(units, units), products(gradients, gradients)


def _root(matrix):
    """Returns R with R R^T = `matrix`, which is symmetric and has no negative part."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0))


def _added_losses(outputs, kernel, units):
    """Removes all units, those that add least first, and returns what each adds, (n,).

    Args:
      outputs: A, (N + 1, N + 1), of which the last row and column are those of the
        bias, which always stays.
      kernel: W R with R R^T = H, (N, D).
      units: the number n of units.
    """
    damping = _DAMPING * np.trace(outputs) / len(outputs)
    inverse = np.linalg.inv(outputs + damping * np.eye(len(outputs)))[:-1, :-1]
    width, left = len(kernel) // units, np.arange(units)
    added, most = np.zeros(units), 0.0
    while len(left):
        # (n', d, d): of each unit, the part of the inverse that is its own.
        own = inverse.reshape(len(left), width, len(left), width)
        own = np.diagonal(own, axis1=0, axis2=2).transpose(2, 0, 1)
        rows = kernel.reshape(len(left), width, -1)
        losses = (rows * np.linalg.solve(own, rows)).sum((1, 2))
        first = np.argsort(losses, kind="stable")[: max(1, int(len(left) * _AT_ONCE))]
        added[left[first]] = np.maximum(losses[first], most)
        most = max(most, losses[first[-1]])
        gone = (first[:, None] * width + np.arange(width)).ravel()
        stay = np.setdiff1d(np.arange(len(kernel)), gone)
        # The rows that stay make up for those that go, and A loses those.
        shares = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone][:, stay])
        kernel = kernel[stay] - shares.T @ kernel[gone]
        inverse = inverse[np.ix_(stay, stay)] - inverse[stay][:, gone] @ shares
        left = np.delete(left, first)
    return added
