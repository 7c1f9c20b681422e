"""Objectives: imitation of a teacher, the task's own loss, and the pruning game.

    distillation = a * distill(logits) + b * sum_k mse(t_k, W s_m(k))
    pruning      = distillation under sampled masks + lagrangian(s, target)

t_k is the output of the k-th taught teacher layer, s_m(k) that of the student layer
which it is matched with, and W a learned D x D map (paper, section 3.2). Where a and b
are both 0 there is no teacher, and the task's own loss takes the place of distillation.

An `Objective` maps (trainable, frozen, context, batch, key) to (loss, metrics).
`trainable` holds what is trained, and `frozen` the embeddings where they are not
trained. `context` is the pytree of everything else that the loss needs, so that
nothing of it is a constant of the compiled program. `batch["teacher_outputs"]` holds
the teacher's outputs for the batch: they are split among its parts as the rows are.
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
from cofi_jax.pruning import constraint
from cofi_jax.pruning import masks as masks_lib
from cofi_jax.pruning.cost import PARAMETERS, Cost
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
    """The model's parameters, put together from the trained and the frozen part."""
    return {**trainable["params"], **frozen}


def key_for(key: jax.Array, use: str) -> jax.Array:
    """The random key of one use in a step: "masks", "layers" or "dropout".

    Keys are derived by name, so that a draw does not depend on which others are made.
    """
    return jax.random.fold_in(key, zlib.crc32(use.encode()))


@dataclasses.dataclass(frozen=True, eq=False)  # jax.jit hashes what it compiles
class DistillationObjective:
    """The imitation of a teacher by a dense or a sliced student.

    Where both weights of `distill` are 0, the loss is that of the labels. `trainable`
    holds `params` and, for the layer term, `distill_projection` (D', D).
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
        """The loss of a batch, and its terms before they are weighted."""
        del context
        config, distill, masks = self.student.config, self.distill, masks or {}
        # Each part of a batch has dropout of its own; masks and taught layers are
        # drawn once for all parts.
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
        config, distill = self.student.config, self.distill
        states = jnp.moveaxis(batch["teacher_outputs"]["states"], 2, 0)  # (K, B, T, D)
        count = len(outputs), distill.num_layers
        taught = jnp.asarray(taught_layers(*count))
        if distill.taught == "random":
            taught = draw_layers(key, *count)
            states = take_layers(states, taught)
        present = list(range(len(outputs)))
        if distill.match != "fixed":
            # Layers that slicing has emptied are never matched: no need to compare.
            widths = enumerate(zip(config.heads, config.intermediate, strict=True))
            present = [i for i, width in widths if any(width)] or [0]
        return distill_layers(
            jnp.stack([outputs[i] for i in present]),
            states.astype(jnp.float32),
            projection,
            batch["attention_mask"] * batch["weight"][:, None],
            alive[jnp.array(present)],
            taught,
            match=MATCHERS[distill.match],
            total=batch["total"]["tokens"] if "total" in batch else None,
        )


def task_objective(model: Encoder) -> DistillationObjective:
    """The loss of the labels alone, by which the teacher is trained."""
    return DistillationObjective(model, Distill(logits=0.0, layers=0.0))


@dataclasses.dataclass(frozen=True, eq=False)  # jax.jit hashes what it compiles
class PruningObjective:
    """Imitation under sampled masks whose expected sparsity is held at a target.

    Where `trainable` holds `multipliers`, the Lagrangian of the paper holds it there;
    otherwise a common offset of all log-alphas does, see `constraint.at_target`. The
    context holds the scalars `step`, `target_sparsity`, `warmup_steps`, and `share`:
    the part of the dense model's cost that the student has, as sparsity is always that
    of the dense model.
    """

    student: Encoder
    distill: Distill
    cost: Cost = PARAMETERS

    def __call__(
        self, trainable: dict, frozen: dict, context: dict, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a batch; its terms, the sparsity and the multipliers."""
        config, share = self.student.config, context["share"]
        log_alpha, multipliers = trainable["log_alpha"], trainable.get("multipliers")
        target = constraint.target_at(
            context["step"],
            context["target_sparsity"],
            context["warmup_steps"],
            start=1 - share,
        )
        if multipliers is None:
            own_target = constraint.of_part(target, share)
            log_alpha = constraint.at_target(log_alpha, config, own_target, self.cost)
        masks = masks_lib.sample(log_alpha, key_for(key, "masks"))
        imitate = DistillationObjective(self.student, self.distill)
        loss, metrics = imitate(trainable, frozen, context, batch, key, masks)
        expected = constraint.expected_sparsity(log_alpha, config, self.cost)
        expected = constraint.of_whole(expected, share)
        metrics |= {"expected_sparsity": expected, "target_sparsity": target}
        if multipliers is None:
            return loss, metrics
        penalty = constraint.lagrangian(expected, target, multipliers)
        return loss + penalty, metrics | {
            "loss_lagrangian": penalty,
            "multiplier_linear": multipliers["linear"],
            "multiplier_quadratic": multipliers["quadratic"],
        }
