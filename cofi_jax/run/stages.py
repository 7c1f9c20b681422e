"""The stages of a run: calls of the same `fit` with another objective.

teacher -> prepruning -> prune -> (slice) -> finetune
"""

import dataclasses
import functools
import io
import pathlib
import sys
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax import config as config_lib
from cofi_jax import distributed, files
from cofi_jax.checkpoints import state as state_lib
from cofi_jax.data import batches, tasks
from cofi_jax.data.metrics import main_score
from cofi_jax.evaluation import predict as predict_lib
from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import constraint, cost, transforms
from cofi_jax.pruning import masks as masks_lib
from cofi_jax.pruning.masks import Masks
from cofi_jax.run import artefacts
from cofi_jax.training import log as log_lib
from cofi_jax.training import loop, objectives, step
from cofi_jax.training.objectives import whole_params
from cofi_jax.training.teacher import TeacherCache

# The final masks may miss the target by this much, see `constraint.final_masks`.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages share: the settings, the rows, and where to write.

    Attributes:
      config: the settings of all stages.
      workdir: the folder of the run.
      task: the task.
      train: the training rows that the stages choose from.
      validation: the rows of each validation split; the first one decides.
      log: the run's log.
      inputs: a digest of the config, of the rows and of the model that was loaded.
    """

    config: config_lib.Config
    workdir: pathlib.Path
    task: tasks.Task
    train: batches.Examples
    validation: dict[str, batches.Examples]
    log: log_lib.MetricsLog | distributed.NullLog
    inputs: int = 0

    @functools.cached_property
    def buckets(self) -> tuple[int, ...]:
        """The padded lengths."""
        return batches.bucket_lengths(self.task, self.train.lengths)

    def made_from(self, *trees: Any) -> int:
        """A digest of the run's inputs and of arrays, see `artefacts`."""
        return zlib.crc32(f"{self.inputs} {distributed.digest(trees)}".encode())

    def examples(self, section: str) -> batches.Examples:
        """The training rows of the stage that `section` of the config sets."""
        rows = getattr(self.config, section).train_rows
        return batches.first_rows(self.train, rows, field=f"{section}.train_rows")

    def scores(
        self, model: Encoder, params: dict, masks: Masks | None = None
    ) -> dict[str, dict[str, float]]:
        """Each of the task's metrics, by validation split."""
        predict = predict_lib.make_predict(model)
        return {
            split: self.task.scores(
                self._logits(predict, params, masks, examples), examples
            )
            for split, examples in self.validation.items()
        }

    def score(self, model: Encoder, params: dict, masks: Masks | None = None) -> float:
        """The metric that decides, on the split that decides."""
        examples = next(iter(self.validation.values()))
        predict = predict_lib.make_predict(model)
        logits = self._logits(predict, params, masks, examples)
        return main_score(self.task.scores(logits, examples))

    def exact_logits(
        self, model: Encoder, params: dict, masks: Masks | None = None
    ) -> np.ndarray:
        """The logits (N, ...) on the split that decides, in full float32."""
        exact = Encoder(dataclasses.replace(model.config, dtype="float32"))
        examples = next(iter(self.validation.values()))
        with jax.default_matmul_precision("highest"):
            predict = predict_lib.make_predict(exact)
            return self._logits(predict, params, masks, examples)

    def _logits(self, predict, params, masks, examples):
        return predict_lib.predict_all(
            predict,
            *distributed.replicate((params, masks or {})),
            examples,
            batch_size=self.config.eval_batch_size,
            buckets=self.buckets,
            put=distributed.shard,
        )


class Student(NamedTuple):
    """A student's parameters and the map from its width to the teacher's."""

    params: dict
    projection: jax.Array  # (D', D)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage that can be run, or gone on with.

    Attributes:
      run: what it shares with the other stages.
      name: its name in the log and among the checkpoints.
      section: the part of the config that sets it, `prune` for pre-pruning too.
      epochs: the passes over its rows.
      teacher: the teacher that it imitates, or None.
    """

    run: Run
    name: str
    section: str
    epochs: int
    teacher: TeacherCache | None = None

    @property
    def settings(self) -> config_lib.Stage:
        """The section of the config."""
        return getattr(self.run.config, self.section)

    @functools.cached_property
    def examples(self) -> batches.Examples:
        """The training rows."""
        return self.run.examples(self.section)

    @property
    def steps_per_epoch(self) -> int:
        """The optimizer steps in one pass over the rows."""
        return steps_per_epoch(self.examples, self.settings)

    def weight_rate(self, epochs: int, warmup_steps: int = 0) -> step.Rate:
        """The learning rate of the weights, scheduled over so many epochs."""
        return step.learning_rate(
            self.settings.learning_rate,
            self.settings.schedule,
            epochs * self.steps_per_epoch,
            warmup_steps,
        )

    def fit(
        self,
        model: Encoder,
        params: dict,
        objective: objectives.Objective,
        rates: dict[str, step.Rate],
        context: dict[str, Any] | None = None,
        **trainable: Any,
    ) -> tuple[step.TrainState, float]:
        """Runs the stage, or what is left of it.

        Args:
          model: the module.
          params: the parameters that the stage starts from.
          objective: what it minimises.
          rates: the learning rates, see `step.create_state`.
          context: what the objective reads beside batch and parameters.
          **trainable: what is trained beside the parameters, see `step.create_state`.

        Returns:
          The last state, and the seconds that the stage took.
        """
        run, config, settings = self.run, self.run.config, self.settings
        state = step.create_state(
            params,
            seed=config.seed,
            stage=self.name,
            rates=rates,
            freeze_embeddings=settings.freeze_embeddings,
            **trainable,
        )
        # The inputs of the run decide what a teacher starts from. Its parameters are
        # not compared: those drawn at random differ between kinds of devices.
        made_from = run.made_from(*(() if self.name == "teacher" else (params,)))
        folder = run.workdir / "checkpoints" / self.name
        with state_lib.Checkpoints(folder, made_from) as saved:
            stage_loop = loop.Loop(
                step=step.make_step(objective, settings.micro_batches),
                context=distributed.replicate(context or {}),
                batches=loop.Batches(
                    self.examples,
                    settings.batch_size,
                    run.buckets,
                    config.seed,
                    self.name,
                ),
                total_steps=self.epochs * self.steps_per_epoch,
                evaluate=self._evaluation(model),
                checkpoints=saved,
                log=run.log,
                every=loop.Every(
                    config.log_every, config.eval_every, config.checkpoint_every
                ),
                teacher_outputs=self.teacher
                and self.teacher.of(self.examples, run.buckets, settings.batch_size),
                # The start of pruning is dense, and pre-pruning returns its last state.
                start_counts=self.name in ("teacher", "finetune"),
            )
            state, seconds = loop.fit(distributed.replicate(state), stage_loop)
        return distributed.local(state), seconds

    def _evaluation(self, model) -> Callable[[dict, dict], loop.Evaluation]:
        prune = self.run.config.prune
        least = prune.target_sparsity - prune.sparsity_epsilon

        def evaluate(trainable, frozen):
            params = whole_params(trainable, frozen)
            if "log_alpha" not in trainable:
                return loop.Evaluation(self.run.score(model, params))
            masks = masks_lib.evaluation_masks(
                distributed.local(trainable["log_alpha"])
            )
            removed = cost.exact_sparsity(masks, model.config)
            score = self.run.score(model, params, masks)
            return loop.Evaluation(score, removed >= least, {"sparsity": removed})

        return evaluate


def steps_per_epoch(examples: batches.Examples, settings: config_lib.Stage) -> int:
    """The optimizer steps in one pass over `examples`."""
    return batches.steps_per_epoch(len(examples), settings.batch_size)


def train_teacher(run: Run, model: Encoder, params: dict) -> tuple[dict, float]:
    """Learns the task from its labels: the best parameters, and the seconds taken."""
    settings = run.config.teacher
    stage = Stage(run, "teacher", "teacher", settings.epochs)
    rates = {"weights": stage.weight_rate(stage.epochs, settings.warmup_steps)}
    state, seconds = stage.fit(model, params, objectives.task_objective(model), rates)
    return whole_params(state.best, state.frozen), seconds


def preprune(
    run: Run, model: Encoder, teacher: dict, teacher_cache: TeacherCache | None
) -> tuple[Student, float]:
    """Distills before any mask moves: a student that began as a copy of the teacher.

    Returns:
      The student, and the seconds that the stage took.
    """
    settings = run.config.prune
    stage = Stage(run, "prepruning", "prune", settings.prepruning_epochs, teacher_cache)
    state, seconds = stage.fit(
        model,
        teacher,
        objectives.DistillationObjective(model, run.config.distill),
        # The linear decay is that of the whole pruning, which is cut short here: it
        # starts afresh, from the full rate, when the masks begin to move.
        {"weights": stage.weight_rate(settings.epochs)},
        distill_projection=jnp.eye(model.config.hidden_size),
    )
    params = whole_params(state.trainable, state.frozen)
    return Student(params, state.trainable["distill_projection"]), seconds


def learn_masks(
    run: Run, model: Encoder, student: Student, teacher_cache: TeacherCache | None
) -> tuple[Student, Masks, float]:
    """Prunes: the dense student, masks that meet the target, and the seconds taken."""
    settings = run.config.prune
    epochs = settings.epochs - settings.prepruning_epochs
    stage = Stage(run, "prune", "prune", epochs, teacher_cache)

    def rate(peak, schedule):
        return step.learning_rate(peak, schedule, epochs * stage.steps_per_epoch)

    state, seconds = stage.fit(
        model,
        student.params,
        objectives.PruningObjective(model, run.config.distill),
        {
            "weights": stage.weight_rate(epochs),
            "masks": rate(settings.mask_learning_rate, settings.mask_schedule),
            "multipliers": rate(
                settings.multiplier_learning_rate, settings.multiplier_schedule
            ),
        },
        context={
            "target_sparsity": np.float32(settings.target_sparsity),
            "warmup_steps": np.int32(settings.warmup_epochs * stage.steps_per_epoch),
        },
        distill_projection=student.projection,
        log_alpha=masks_lib.init_log_alpha(
            model.config, jax.random.key(run.config.seed), settings.kinds
        ),
        multipliers={"linear": 0.0, "quadratic": 0.0},
    )
    trainable = state.best
    if not jnp.isfinite(state.best_score):
        trainable = state.trainable
        least = settings.target_sparsity - settings.sparsity_epsilon
        print(
            f"warning: prune: no evaluation found a sparsity of {least:.4g} or more; "
            "the last masks are shifted to the target. More epochs or higher rates "
            "of masks and multipliers would do",
            file=sys.stderr,
        )
    masks = _final_masks(run, model, trainable["log_alpha"])
    params = whole_params(trainable, state.frozen)
    return Student(params, trainable["distill_projection"]), masks, seconds


def _final_masks(run, model, log_alpha) -> Masks:
    """The content of `masks.npz`.

    They are read from the file, because rounding depends on the kind of device, and a
    run may go on on another one.
    """
    settings, path = run.config.prune, run.workdir / "masks.npz"
    rounded = settings.round_widths

    def make(path):
        found = constraint.final_masks(
            log_alpha,
            model.config,
            settings.target_sparsity,
            transforms.round_to_device(config=model.config)
            if rounded
            else transforms.chain(),
        )
        removed = cost.exact_sparsity(found, model.config)
        if not removed >= settings.target_sparsity - _TOLERANCE:
            raise RuntimeError(
                f"masks of sparsity {removed:.4f} miss the target of "
                f"{settings.target_sparsity}"
            )
        file = io.BytesIO()
        np.savez(file, **found)
        files.write_atomically(path, file.getvalue())

    artefacts.settle(
        path,
        run.made_from(log_alpha),
        lambda path: distributed.on_process_zero(lambda: make(path)),
    )
    with np.load(path) as file:
        return {kind: jnp.asarray(file[kind]) for kind in log_alpha}


def finetune(
    run: Run, model: Encoder, student: Student, teacher_cache: TeacherCache | None
) -> tuple[dict, float]:
    """Distills into the sliced `model`: its best parameters, and the seconds taken."""
    stage = Stage(
        run, "finetune", "finetune", run.config.finetune.epochs, teacher_cache
    )
    state, seconds = stage.fit(
        model,
        student.params,
        objectives.DistillationObjective(model, run.config.distill),
        {"weights": stage.weight_rate(stage.epochs)},
        distill_projection=student.projection,
    )
    return whole_params(state.best, state.frozen), seconds
