"""What is minimised: the task's loss, imitation of a teacher, or the pruning game.

    distillation = a * distill_logits + b * sum_k mse(t_k, W s_m(k))
    pruning      = distillation under sampled gates + lagrangian(s, target)

t_k is the output of the k-th taught teacher layer, s_m(k) that of the student
layer it is matched with, W a learned D x D map (paper, section 3.2). With a and b 0
there is no teacher: the task's own loss takes the place of distillation.

An `Objective` maps (theta, frozen, context, batch, key) to (loss, metrics). Theta
holds what is trained, `frozen` the embeddings where they are not; `context` is the
pytree of everything else that the loss needs, so that nothing is a constant of the
compiled program.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cofi_jax import masks as masks_lib
from cofi_jax import sparsity as sparsity_lib
from cofi_jax.config import Distill
from cofi_jax.losses import distill_logits, task_loss, weighted_mean
from cofi_jax.model import Encoder

Metrics = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, Metrics]]


def taught_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Ids of `count` teacher layers, evenly spaced up to the last (12, 4: 2 5 8 11)."""
    count = min(count, num_layers)
    return tuple(int(num_layers * (k + 1) / count + 0.5) - 1 for k in range(count))


def draw_layers(key: jax.Array, num_layers: int, count: int) -> jax.Array:
    """Ids (K,) of `count` teacher layers, one of each of as many equal windows.

    The windows end where `taught_layers` are (12, 4: 0-2, 3-5, 6-8, 9-11).
    """
    last = jnp.array(taught_layers(num_layers, count))
    first = jnp.concatenate([jnp.zeros(1, last.dtype), last[:-1] + 1])
    return jax.random.randint(key, last.shape, first, last + 1)


def match_layers(costs: jax.Array, alive: jax.Array, *, ordered: bool) -> jax.Array:
    """The student layer that each taught teacher layer is compared with.

    Args:
      costs: (K, L) distance of teacher layer k and student layer l.
      alive: (L,) whether the student layer still has a block.
      ordered: going from the last teacher layer down, only layers below the one
        matched before; with none left, the lowest alive one. Otherwise each teacher
        layer takes the closest alive layer.

    Returns:
      (K,) int32 layer ids; 0 where no layer is alive.
    """
    ids = jnp.arange(costs.shape[1])
    lowest = jnp.argmax(alive)
    if not ordered:
        closest = jnp.argmin(jnp.where(alive, costs, jnp.inf), axis=1)
        return jnp.where(alive.any(), closest, 0).astype(jnp.int32)
    matched, bound = [], costs.shape[1]
    for row in costs[::-1]:
        candidate = alive & (ids < bound)
        closest = jnp.argmin(jnp.where(candidate, row, jnp.inf))
        bound = jnp.where(candidate.any(), closest, lowest)
        matched.append(bound)
    return jnp.stack(matched[::-1]).astype(jnp.int32)


def distill_layers(
    student: jax.Array,
    teacher: jax.Array,
    projection: jax.Array,
    token_weight: jax.Array,
    alive: jax.Array,
    taught: jax.Array,
    *,
    match: str,
    total: jax.Array | None = None,
) -> jax.Array:
    """Sum over teacher layers of the mean squared error to the matched student layer.

    Args:
      student: (L, B, T, D') outputs of the student's layers, in any float dtype.
      teacher: (K, B, T, D) outputs of the taught layers.
      projection: (D', D), from the student's width to the teacher's.
      token_weight: (B, T), 0 for padding.
      alive: (L,) student layers that may be chosen.
      taught: (K,) the numbers of the taught layers.
      match: closest or ordered, see `match_layers`; or fixed: the student's layer of
        the taught layer's number, and nothing where that one is not alive.
      total: takes the place of the token weights' sum.
    """

    # In the states' dtype, to which the teacher's are rounded too; also the way back.
    def project(states, projection):
        return (states @ projection.astype(states.dtype)).astype(jnp.float32)

    def distance(t, s):  # (B, T, D), (B, T, D)
        return weighted_mean(jnp.square(t - s).mean(-1), token_weight, total)

    if match == "fixed":
        matched, counts = taught, alive[taught]
    else:
        # The choice has no gradient, so only the chosen layers are differentiated.
        projected = project(*jax.lax.stop_gradient((student, projection)))
        costs = jax.vmap(lambda t: jax.vmap(lambda s: distance(t, s))(projected))(
            teacher
        )
        matched = match_layers(costs, alive, ordered=match == "ordered")
        counts = jnp.ones(len(matched))
    chosen = project(_layers(student, matched), projection)
    return jnp.sum(jax.vmap(distance)(teacher, chosen) * counts)


def _layers(outputs, ids):
    # Not outputs[ids], whose gradient is a scatter: on a GPU its sums would come in
    # any order, and a resumed run would differ.
    return jnp.stack(
        [jax.lax.dynamic_index_in_dim(outputs, i, keepdims=False) for i in ids]
    )


def alive_layers(config, masks: masks_lib.Masks) -> jax.Array:
    """(L,) booleans: the layer has a block that is not absent."""
    alive = jnp.zeros(len(config.heads), bool)
    for block, inner, widths in (
        ("mha", "head", config.heads),
        ("ffn", "intermediate", config.intermediate),
    ):
        present = jnp.asarray(widths) > 0
        if block in masks:
            present &= masks[block] > 0
        if inner in masks:
            present &= (masks[inner] > 0).any(-1)
        alive |= present
    return alive


def whole_params(theta: dict, frozen: dict) -> dict:
    """The model's parameters from the trained and the frozen part."""
    return {**theta["params"], **frozen}


def _noise(key, batch):
    # Each part of a batch has its own; the gates and the taught layers are the same.
    return {
        "dropout": jax.random.fold_in(key, 2 + batch["part"])
        if "part" in batch
        else key
    }


def task_objective(model: Encoder) -> Objective:
    """The loss of the labels: how the teacher is trained."""
    problem = model.config.problem

    def objective(theta, frozen, context, batch, key, masks=None):
        del context
        variables = {"params": whole_params(theta, frozen), "masks": masks or {}}
        output = model.apply(variables, batch, train=True, rngs=_noise(key, batch))
        loss = task_loss(problem, output.logits, batch)
        return loss, {"loss_task": loss}

    return objective


def distillation_objective(student: Encoder, distill: Distill) -> Objective:
    """Imitation of the teacher by a dense or sliced student.

    The batch has a `lesson`, see `lessons.make_teach`. Theta: `params` and, for the
    layer term, `distill_projection` (D', D).
    """
    if distill.logits == distill.layers == 0:
        return task_objective(student)
    config = student.config
    layers = len(config.heads), distill.num_layers
    # Layers that slicing emptied repeat the one below and are never matched.
    widths = enumerate(zip(config.heads, config.intermediate, strict=True))
    present = [i for i, width in widths if any(width)] or [0]
    if distill.match == "fixed":
        present = range(layers[0])

    def objective(theta, frozen, context, batch, key, masks=None):
        del context
        masks, lesson = masks or {}, batch["lesson"]
        variables = {"params": whole_params(theta, frozen), "masks": masks}
        output = student.apply(variables, batch, train=True, rngs=_noise(key, batch))
        loss, metrics = 0.0, {}
        if distill.logits:
            metrics["loss_logits"] = distill_logits(
                config.problem,
                output.logits,
                lesson["logits"],
                batch,
                distill.temperature,
            )
            loss += distill.logits * metrics["loss_logits"]
        if distill.layers:
            taught = taught_layers(*layers)
            states = jnp.moveaxis(lesson["states"], 2, 0)
            if distill.taught == "random":
                taught = draw_layers(jax.random.fold_in(key, 1), *layers)
                states = _layers(states, taught)
            outputs = [output.hidden_states[i + 1] for i in present]
            metrics["loss_layers"] = distill_layers(
                jnp.stack(outputs),
                states.astype(jnp.float32),
                theta["distill_projection"],
                batch["attention_mask"] * batch["weight"][:, None],
                alive_layers(config, masks)[jnp.array(present)],
                jnp.asarray(taught),
                match=distill.match,
                total=batch["total"]["tokens"] if "total" in batch else None,
            )
            loss += distill.layers * metrics["loss_layers"]
        return loss, metrics

    return objective


def pruning_objective(
    student: Encoder,
    distill: Distill,
    cost: sparsity_lib.Cost = sparsity_lib.cost,
) -> Objective:
    """Imitation under sampled gates, and the Lagrangian of the sparsity constraint.

    Context: the scalars `target_sparsity`, `warmup_steps` and `step`. Batch and theta
    as in `distillation_objective`; theta has `log_alpha` and `multipliers` too.
    """
    imitate = distillation_objective(student, distill)

    def objective(theta, frozen, context, batch, key):
        mask_key, dropout_key = jax.random.split(key)
        masks = masks_lib.sample(theta["log_alpha"], mask_key)
        loss, metrics = imitate(theta, frozen, context, batch, dropout_key, masks)
        expected = sparsity_lib.expected_sparsity(
            theta["log_alpha"], student.config, cost
        )
        target = sparsity_lib.target_at(
            context["step"], context["target_sparsity"], context["warmup_steps"]
        )
        penalty = sparsity_lib.lagrangian(expected, target, theta["multipliers"])
        metrics |= {
            "loss_lagrangian": penalty,
            "expected_sparsity": expected,
            "target_sparsity": target,
            "multiplier_linear": theta["multipliers"]["linear"],
            "multiplier_quadratic": theta["multipliers"]["quadratic"],
        }
        return loss + penalty, metrics

    return objective
