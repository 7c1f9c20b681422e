"""The functions that are minimised: a task's loss, imitation, and the pruning game.

    distillation = a * distill(logits) + b * sum_k mse(t_k, W s_m(k))
    pruning      = distillation under sampled masks + lagrangian(s, target)

Here t_k is the output of the k-th taught teacher layer, s_m(k) the output of the
student layer that it is matched with, and W a learned D' x D map (paper, section 3.2).
If a and b are 0 there is no teacher, and the task's own loss takes the place of
distillation.

An objective maps (trainable, frozen, context, batch, key) to (loss, metrics).
`trainable` holds what is trained, `frozen` the embeddings where they are not. `context`
is the pytree of everything else that the loss needs, so that nothing becomes a constant
of the compiled program.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from cofi_jax.config import Distill
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.models.bert import Batch, Encoder, Output
from cofi_jax.pruning import constraint
from cofi_jax.pruning import cost as cost_lib
from cofi_jax.pruning import masks as masks_lib
from cofi_jax.training import losses

Metrics = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, Metrics]]
_NO_MASKS: Mapping[str, jax.Array] = {}


def whole_params(trainable: dict, frozen: dict) -> dict:
    """Returns the parameters of the model from its trained and its frozen part."""
    return {**trainable["params"], **frozen}


def _forward(model, trainable, frozen, masks, batch, key) -> Output:
    # Each part of a batch has a dropout of its own; masks and taught layers are shared.
    noise = jax.random.fold_in(key, 2 + batch["part"]) if "part" in batch else key
    variables = {"params": whole_params(trainable, frozen), "masks": masks}
    return model.apply(variables, batch, train=True, rngs={"dropout": noise})


@dataclasses.dataclass(frozen=True, eq=False)
class TaskObjective:
    """The loss of the labels, from which the teacher learns."""

    model: Encoder

    def __call__(
        self,
        trainable: dict,
        frozen: dict,
        context: dict,
        batch: Batch,
        key: jax.Array,
        masks: masks_lib.Masks = _NO_MASKS,
    ) -> tuple[jax.Array, Metrics]:
        """Returns the loss and its terms; see the module for the arguments."""
        output = _forward(self.model, trainable, frozen, masks, batch, key)
        loss = PROBLEMS[self.model.config.problem].loss(output.logits, batch)
        return loss, {"loss_task": loss}


@dataclasses.dataclass(frozen=True, eq=False)
class DistillationObjective:
    """The imitation of the teacher by a dense or a sliced student.

    The batch holds `teacher_outputs`, see `teacher.make_teacher_forward`. The trainable
    has `params` and, for the layer term, `distill_projection` (D', D).
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
        masks: masks_lib.Masks = _NO_MASKS,
    ) -> tuple[jax.Array, Metrics]:
        """Returns the loss and its terms; see the module for the arguments."""
        distill, config = self.distill, self.student.config
        output = _forward(self.student, trainable, frozen, masks, batch, key)
        loss, metrics = jnp.zeros(()), {}
        if distill.logits:
            metrics["loss_logits"] = PROBLEMS[config.problem].distill(
                output.logits,
                batch["teacher_outputs"]["logits"],
                batch,
                distill.temperature,
            )
            loss += distill.logits * metrics["loss_logits"]
        if distill.layers:
            metrics["loss_layers"] = self._layer_loss(
                output, trainable["distill_projection"], batch, key, masks
            )
            loss += distill.layers * metrics["loss_layers"]
        return loss, metrics

    def _layer_loss(self, output, projection, batch, key, masks):
        distill, config = self.distill, self.student.config
        layers = len(config.heads), distill.num_layers
        # Layers that slicing emptied repeat the one below, so they are never matched,
        # except by number.
        widths = enumerate(zip(config.heads, config.intermediate, strict=True))
        present = [i for i, width in widths if any(width)] or [0]
        if distill.match == "fixed":
            present = range(layers[0])
        taught = losses.taught_layers(*layers)
        states = jnp.moveaxis(batch["teacher_outputs"]["states"], 2, 0)  # (K, B, T, D)
        if distill.taught == "random":
            taught = losses.draw_layers(jax.random.fold_in(key, 1), *layers)
            states = losses.pick_layers(states, taught)
        outputs = [output.hidden_states[i + 1] for i in present]
        return losses.distill_layers(
            jnp.stack(outputs),  # (L, B, T, D')
            states.astype(jnp.float32),
            projection,
            batch["attention_mask"] * batch["weight"][:, None],
            losses.alive_layers(config, masks)[jnp.array(present)],
            jnp.asarray(taught),
            match=distill.match,
            total=batch["total"]["tokens"] if "total" in batch else None,
        )


def distillation_objective(
    student: Encoder, distill: Distill
) -> TaskObjective | DistillationObjective:
    """Returns the imitation, or the task's own loss if both of its weights are 0."""
    if distill.logits == distill.layers == 0:
        return TaskObjective(student)
    return DistillationObjective(student, distill)


@dataclasses.dataclass(frozen=True, eq=False)
class PruningObjective:
    """The imitation under sampled masks, and the Lagrangian of the constraint.

    The context has the scalars `target_sparsity`, `warmup_steps` and `step`. The
    trainable has `log_alpha` and `multipliers` besides what distillation needs.
    """

    student: Encoder
    distill: Distill
    cost: cost_lib.Cost = cost_lib.cost

    def __call__(
        self, trainable: dict, frozen: dict, context: dict, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Returns the loss and its terms; see the module for the arguments."""
        log_alpha, multipliers = trainable["log_alpha"], trainable["multipliers"]
        mask_key, dropout_key = jax.random.split(key)
        masks = masks_lib.sample(log_alpha, mask_key)
        imitate = distillation_objective(self.student, self.distill)
        loss, metrics = imitate(trainable, frozen, context, batch, dropout_key, masks)
        expected = constraint.expected_sparsity(
            log_alpha, self.student.config, self.cost
        )
        target = constraint.target_at(
            context["step"], context["target_sparsity"], context["warmup_steps"]
        )
        penalty = constraint.lagrangian(expected, target, multipliers)
        metrics |= {
            "loss_lagrangian": penalty,
            "expected_sparsity": expected,
            "target_sparsity": target,
            "multiplier_linear": multipliers["linear"],
            "multiplier_quadratic": multipliers["quadratic"],
        }
        return loss + penalty, metrics
