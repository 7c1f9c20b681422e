"""What is minimised: the task's loss, imitation of a teacher, or the pruning game.

    distillation = a * distill(logits) + b * sum_k mse(t_k, W s_m(k))
    pruning      = distillation under sampled gates + lagrangian(s, target)

t_k is the output of the k-th taught teacher layer, s_m(k) that of the student
layer it is matched with, W a learned D x D map (paper, section 3.2). With a and b 0
there is no teacher: the task's own loss takes the place of distillation.

An `Objective` maps (trainable, frozen, context, batch, key) to (loss, metrics). Trainable
holds what is trained, `frozen` the embeddings where they are not; `context` is the
pytree of everything else that the loss needs, so that nothing is a constant of the
compiled program.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cofi_jax.config import Distill
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import constraint
from cofi_jax.pruning import cost as cost_lib
from cofi_jax.pruning import masks as masks_lib
from cofi_jax.training.losses import (
    _layers,
    distill_layers,
    draw_layers,
    taught_layers,
)

Metrics = dict[str, jax.Array]


Objective = Callable[..., tuple[jax.Array, Metrics]]


def whole_params(trainable: dict, frozen: dict) -> dict:
    """The model's parameters from the trained and the frozen part."""
    return {**trainable["params"], **frozen}


def _noise(key, batch):
    # Each part of a batch has its own; the gates and the taught layers are the same.
    return {
        "dropout": jax.random.fold_in(key, 2 + batch["part"])
        if "part" in batch
        else key
    }


def task_objective(model: Encoder) -> Objective:
    """The loss of the labels: how the teacher is trained."""
    problem = PROBLEMS[model.config.problem]

    def objective(trainable, frozen, context, batch, key, masks=None):
        del context
        variables = {"params": whole_params(trainable, frozen), "masks": masks or {}}
        output = model.apply(variables, batch, train=True, rngs=_noise(key, batch))
        loss = problem.loss(output.logits, batch)
        return loss, {"loss_task": loss}

    return objective


def distillation_objective(student: Encoder, distill: Distill) -> Objective:
    """Imitation of the teacher by a dense or sliced student.

    The batch has a `teacher_outputs`, see `teacher_cache.make_teacher_forward`. Trainable: `params` and, for the
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

    def objective(trainable, frozen, context, batch, key, masks=None):
        del context
        masks, teacher_outputs = masks or {}, batch["teacher_outputs"]
        variables = {"params": whole_params(trainable, frozen), "masks": masks}
        output = student.apply(variables, batch, train=True, rngs=_noise(key, batch))
        loss, metrics = 0.0, {}
        if distill.logits:
            metrics["loss_logits"] = PROBLEMS[config.problem].distill(
                output.logits,
                teacher_outputs["logits"],
                batch,
                distill.temperature,
            )
            loss += distill.logits * metrics["loss_logits"]
        if distill.layers:
            taught = taught_layers(*layers)
            states = jnp.moveaxis(teacher_outputs["states"], 2, 0)
            if distill.taught == "random":
                taught = draw_layers(jax.random.fold_in(key, 1), *layers)
                states = _layers(states, taught)
            outputs = [output.hidden_states[i + 1] for i in present]
            metrics["loss_layers"] = distill_layers(
                jnp.stack(outputs),
                states.astype(jnp.float32),
                trainable["distill_projection"],
                batch["attention_mask"] * batch["weight"][:, None],
                masks_lib.alive_layers(config, masks)[jnp.array(present)],
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
    cost: cost_lib.Cost = cost_lib.PARAMETERS,
) -> Objective:
    """Imitation under sampled gates, and the Lagrangian of the sparsity constraint.

    Context: the scalars `target_sparsity`, `warmup_steps` and `step`. Batch and trainable
    as in `distillation_objective`; trainable has `log_alpha` and `multipliers` too.
    """
    imitate = distillation_objective(student, distill)

    def objective(trainable, frozen, context, batch, key):
        mask_key, dropout_key = jax.random.split(key)
        masks = masks_lib.sample(trainable["log_alpha"], mask_key)
        loss, metrics = imitate(trainable, frozen, context, batch, dropout_key, masks)
        expected = constraint.expected_sparsity(
            trainable["log_alpha"], student.config, cost
        )
        target = constraint.target_at(
            context["step"], context["target_sparsity"], context["warmup_steps"]
        )
        penalty = constraint.lagrangian(expected, target, trainable["multipliers"])
        metrics |= {
            "loss_lagrangian": penalty,
            "expected_sparsity": expected,
            "target_sparsity": target,
            "multiplier_linear": trainable["multipliers"]["linear"],
            "multiplier_quadratic": trainable["multipliers"]["quadratic"],
        }
        return loss + penalty, metrics

    return objective
