"""The importance of each mask: the mean squared gradient of a loss by it."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from cofi_jax.data.problems import PROBLEMS
from cofi_jax.models.bert import Batch, Encoder
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning.masks import Masks, mask_shapes, without_padding


def importance(
    model: Encoder,
    params: dict,
    batches: Iterable[Batch],
    *,
    kinds: Sequence[str] = KINDS,
    labels: bool = True,
) -> Masks:
    """Measures what each mask means to a model, without dropout and at masks of 1.

    The result goes to `ranks`, which makes masks of it whose order is that of
    importance, or to `seed_log_alpha`.

    Args:
      model: the module, dense or sliced.
      params: its parameters.
      batches: as of `data.batches.stream`, without the row numbers. About 40 batches of
        32 rows are enough.
      kinds: the kinds of masks.
      labels: whether the loss is the task's own. Otherwise the labels are not read: the
        loss is the distance of the logits from themselves with unit normal noise on
        them, whose mean squared gradient is that of distillation from the model itself
        (that loss alone is 0 there, and so is its gradient).

    Returns:
      For each kind an array of the masks' shape, float32, at least 0, 0 for padding.

    Raises:
      UserError: for an unknown kind, or none.
      ValueError: where there is no batch.
    """
    config = dataclasses.replace(model.config, dropout=0.0)
    shapes = mask_shapes(config, kinds)
    ones = {kind: jnp.ones(shape) for kind, shape in shapes.items()}
    total, count = None, 0
    for count, batch in enumerate(batches, start=1):
        key = jax.random.fold_in(jax.random.key(0), count)
        found = _squared_gradient(Encoder(config), labels, params, ones, batch, key)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("batches: there must be at least one")
    mean = {kind: value / count for kind, value in total.items()}
    return without_padding(mean, config)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squared_gradient(model, labels, params, ones, batch, key):
    problem = PROBLEMS[model.config.problem]

    def loss(masks):
        logits = model.apply({"params": params, "masks": masks}, batch).logits
        if labels:
            return problem.loss(logits, batch)
        noisy = logits + jax.random.normal(key, logits.shape)
        return problem.distill(logits, jax.lax.stop_gradient(noisy), batch, 1.0)

    return jax.tree.map(jnp.square, jax.grad(loss)(ones))
