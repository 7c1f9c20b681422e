"""The importance of masks: the mean squared gradient of a loss with respect to each."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cofi_jax.data.problems import PROBLEMS
from cofi_jax.models.bert import Batch, Encoder
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning.masks import Masks, mask_shapes, without_padding
from cofi_jax.training.step import quick_to_compile


def importance(
    model: Encoder,
    params: dict,
    batches: Iterable[Batch],
    *,
    kinds: Sequence[str] = KINDS,
    labels: bool = True,
) -> Masks:
    """Measures the importance of each mask, at masks of 1 and without dropout.

    `pruning.importance` turns the result into `ranks`, which are masks in the order of
    importance, or into log-alphas, by `seed_log_alpha`.

    Args:
      model: the module, dense or sliced.
      params: its parameters.
      batches: the batches of `data.batches.stream`, without the row numbers. About 40
        batches of 32 rows are enough.
      kinds: the kinds of masks that are measured.
      labels: whether the loss is that of the task. If not, the labels are not read, and
        the loss is the distance of the logits from the same logits with noise, see
        `Problem.noisy`. Its mean squared gradient is that of distillation from the
        model itself, a loss whose own gradient is 0 here.

    Returns:
      For each kind a float32 array of the shape of its masks, at least 0, and 0 at
      padding.

    Raises:
      UserError: if a kind is unknown or if there is none.
      ValueError: if there is no batch.
    """
    config = dataclasses.replace(model.config, dropout=0.0)
    shapes = mask_shapes(config, kinds)
    ones = {kind: jnp.ones(shape) for kind, shape in shapes.items()}
    measure = functools.partial(
        _squared_gradient(Encoder(config), labels), ones, params
    )
    total, count = summed(measure, batches)
    return without_padding(jax.tree.map(lambda x: x / count, total), config)


def summed(measure: Callable, batches: Iterable[Batch]) -> tuple[Any, int]:
    """Returns the sum of `measure(batch, key)` over batches, and their number.

    Raises:
      ValueError: if there is no batch.
    """
    total, count = None, 0
    for count, batch in enumerate(batches, start=1):
        found = measure(batch, jax.random.fold_in(jax.random.key(0), count))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("batches: there must be at least one")
    return total, count


def own_loss(
    problem: str, logits: jax.Array, batch: Batch, key: jax.Array, labels: bool
) -> jax.Array:
    """Returns the loss whose gradients tell what a part of a model is worth.

    Args:
      problem: the name of the model's problem.
      logits: the answers of the model.
      batch: the batch that they are of.
      key: the key of the noise.
      labels: whether the loss is that of the task. If not, it is the distance of the
        logits from the same logits with noise.
    """
    known = PROBLEMS[problem]
    if labels:
        return known.loss(logits, batch)
    noisy = known.noisy(logits, key)
    return known.distill(logits, jax.lax.stop_gradient(noisy), batch, 1.0)


@functools.cache
def _squared_gradient(model, labels):
    """Returns the jitted function of (masks of 1, params, batch, key)."""

    def loss(masks, params, batch, key):
        logits = model.apply({"params": params, "masks": masks}, batch).logits
        return own_loss(model.config.problem, logits, batch, key, labels)

    def squared_gradient(*arguments):
        return jax.tree.map(jnp.square, jax.grad(loss)(*arguments))

    return jax.jit(squared_gradient, compiler_options=quick_to_compile())
