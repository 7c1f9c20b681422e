"""The objectives: distillation from a teacher, the loss of the task, and pruning.

    distillation = a * distill(logits) + b * sum_k mse(t_k, W s_m(k))
    pruning      = distillation under sampled masks + lagrangian(s, target)

Here t_k is the output of the k-th taught layer of the teacher, s_m(k) the output of the
student layer that is matched with it, and W a learned D x D map (paper, section 3.2).
If the weights a and b are both 0, there is no teacher, and the loss of the task takes
the place of distillation.

An `Objective` maps (trainable, frozen, context, batch, key) to (loss, metrics). The
dict `trainable` holds everything that is trained, and `frozen` holds the embeddings if
they are not. The pytree `context` holds the numbers that vary between steps and runs:
constants of the compiled program would need a new compilation for each value. The
teacher's outputs are `batch["teacher_outputs"]`, so that a batch is split into parts
together with them.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cofi_jax.config import Distill
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.models.bert import Batch, Encoder
from cofi_jax.pruning import constraint, latency
from cofi_jax.pruning import masks as masks_lib
from cofi_jax.pruning.cost import PARAMETERS
from cofi_jax.training.losses import (
    MATCHERS,
    alive_layers,
    distill_layers,
    draw_layers,
    take_layers,
    taught_layers,
)

Metrics = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, Metrics]]


def whole_params(trainable: dict, frozen: dict) -> dict:
    """Joins the trained and the frozen parameters to those of the whole model."""
    return {**trainable["params"], **frozen}


def key_for(key: jax.Array, use: str) -> jax.Array:
    """Derives the random key for one use in a step: "masks", "layers" or "dropout".

    The key depends on the name alone, so a draw does not depend on which others are
    made.
    """
    return jax.random.fold_in(key, zlib.crc32(use.encode()))


@dataclasses.dataclass(frozen=True, eq=False)  # jax.jit hashes it by identity
class DistillationObjective:
    """The distillation of a teacher into a dense or a sliced student.

    If both weights of `distill` are 0, the loss is that of the task. The dict
    `trainable` holds `params` and, for the distillation of layers, the map
    `distill_projection` (D', D) from the student's width D' to the teacher's width D.

    Attributes:
      student: the module that is trained.
      distill: the weights of the two terms, and the settings of distillation.
    """

    student: Encoder
    distill: Distill

    def __call__(
        self,
        trainable: dict,
        frozen: dict,
        context: dict,
        batch: Batch,
        key: jax.Array,
        masks: masks_lib.Masks | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Computes the loss of a batch, and as metrics its terms without weights."""
        del context
        config, distill, masks = self.student.config, self.distill, masks or {}
        # Each part of a batch has its own dropout. The parts share the draws of the
        # masks and of the taught layers.
        dropout = key_for(key, "dropout")
        if "part" in batch:
            dropout = jax.random.fold_in(dropout, batch["part"])
        output: Any = self.student.apply(
            {"params": whole_params(trainable, frozen), "masks": masks},
            batch,
            train=True,
            rngs={"dropout": dropout},
        )
        problem = PROBLEMS[config.problem]
        if distill.logits == distill.layers == 0:
            loss = problem.loss(output.logits, batch)
            return loss, {"loss_task": loss}
        loss, metrics = jnp.zeros(()), {}
        if distill.logits:
            metrics["loss_logits"] = problem.distill(
                output.logits,
                batch["teacher_outputs"]["logits"],
                batch,
                distill.temperature,
            )
            loss += distill.logits * metrics["loss_logits"]
        if distill.layers:
            metrics["loss_layers"] = self._layers_loss(
                output.hidden_states[1:],
                trainable["distill_projection"],
                batch,
                alive_layers(config, masks),
                key_for(key, "layers"),
            )
            loss += distill.layers * metrics["loss_layers"]
        return loss, metrics

    def _layers_loss(self, outputs, projection, batch, alive, key):
        """Computes the loss of the L layers, whose `outputs` are (B, T, D') each."""
        config, distill = self.student.config, self.distill
        weight, total = token_weight(batch), None
        if "whole" in batch:
            total = token_weight(batch["whole"]).sum() / batch["parts"]
        states = jnp.moveaxis(batch["teacher_outputs"]["states"], 2, 0)  # (K, B, T, D)
        count = len(outputs), distill.num_layers
        taught = jnp.asarray(taught_layers(*count))  # (K,)
        if distill.taught == "random":  # The teacher's outputs are those of all layers.
            taught = draw_layers(key, *count)
            states = take_layers(states, taught)
        present = list(range(len(outputs)))
        if distill.match != "fixed":
            # A layer that slicing has emptied is never matched, so it is left out.
            widths = enumerate(zip(config.heads, config.intermediate, strict=True))
            present = [i for i, width in widths if any(width)] or [0]
        return distill_layers(
            jnp.stack([outputs[i] for i in present]),
            states.astype(jnp.float32),
            projection,
            weight,
            alive[jnp.array(present)],
            taught,
            match=MATCHERS[distill.match],
            total=total,
        )


def token_weight(batch: Batch) -> jax.Array:
    """Returns the weights (B, T) of the tokens, 0 for padding."""
    return batch["attention_mask"] * batch["weight"][:, None]


def task_objective(model: Encoder) -> DistillationObjective:
    """Returns the objective of the task alone, by which the teacher is trained."""
    return DistillationObjective(model, Distill(logits=0.0, layers=0.0))


@dataclasses.dataclass(frozen=True, eq=False)  # jax.jit hashes it by identity
class PruningObjective:
    """Distillation under sampled masks whose expected sparsity follows a target.

    If `trainable` holds `multipliers`, the Lagrangian of the paper is the constraint.
    Otherwise a common offset of all log-alphas is, see `constraint.at_target`. The
    context holds the scalars `step`, `target_sparsity`, `warmup_steps` and `share`. As
    sparsity always refers to the dense model, `share` is the fraction of the cost of
    the dense model that the student has.

    If the context holds a `table`, a `latency.Table`, the cost is the time by it. It
    falls geometrically then, and the Lagrangian takes sparsities on a logarithmic
    scale, see `constraint.on_log_scale`.

    Attributes:
      student: the module that is pruned.
      distill: the settings of distillation.
    """

    student: Encoder
    distill: Distill

    def __call__(
        self, trainable: dict, frozen: dict, context: dict, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Computes the loss; the metrics add the constraint and `masks.decisions`."""
        config, share = self.student.config, context["share"]
        log_alpha, multipliers = trainable["log_alpha"], trainable.get("multipliers")
        whole, timed = context["target_sparsity"], "table" in context
        cost = latency.cost(context["table"]) if timed else PARAMETERS
        target = constraint.target_at(
            context["step"],
            whole,
            context["warmup_steps"],
            start=1 - share,
            geometric=timed,
        )
        if multipliers is None:
            own_target = constraint.of_part(target, share)
            log_alpha = constraint.at_target(log_alpha, config, own_target, cost)
        masks = masks_lib.sample(log_alpha, key_for(key, "masks"))
        distillation = DistillationObjective(self.student, self.distill)
        loss, metrics = distillation(trainable, frozen, context, batch, key, masks)
        expected = constraint.expected_sparsity(log_alpha, config, cost)
        expected = constraint.of_whole(expected, share)
        metrics |= {"expected_sparsity": expected, "target_sparsity": target}
        metrics |= masks_lib.decisions(log_alpha, config)
        if multipliers is None:
            return loss, metrics
        if timed:
            expected, target = (
                constraint.on_log_scale(sparsity, whole)
                for sparsity in (expected, target)
            )
        penalty = constraint.lagrangian(expected, target, multipliers)
        return loss + penalty, metrics | {
            "loss_lagrangian": penalty,
            "multiplier_linear": multipliers["linear"],
            "multiplier_quadratic": multipliers["quadratic"],
        }
