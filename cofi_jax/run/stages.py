"""The stages of a run: calls of the same `fit` with another objective.

teacher -> prepruning -> prune -> (slice) -> finetune
"""

import dataclasses
import functools
import io
import pathlib
import sys
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
from cofi_jax.pruning import constraint, cost, masks, transforms
from cofi_jax.training import loop, objectives, step
from cofi_jax.training.objectives import whole_params
from cofi_jax.training.teacher import TeacherCache


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages share: the settings, the rows, and where to write."""

    config: config_lib.Config
    workdir: pathlib.Path
    task: tasks.Task
    train: batches.Examples
    validation: dict[str, batches.Examples]  # by split; the first one decides
    log: Any  # report.MetricsLog

    @functools.cached_property
    def buckets(self) -> tuple[int, ...]:
        """Padded lengths."""
        return batches.bucket_lengths(self.task, self.train.lengths)

    def examples(self, field: str) -> batches.Examples:
        """The training rows of the stage that the config calls `field`."""
        rows = getattr(self.config, field).train_rows
        return batches.first_rows(self.train, rows, field=f"{field}.train_rows")

    def scores(
        self, predict, params: dict, gates: masks.Masks | None = None
    ) -> dict[str, dict[str, float]]:
        """Each of the task's metrics, by validation split."""
        return {
            split: self.task.scores(
                self._logits(predict, params, gates, examples), examples
            )
            for split, examples in self.validation.items()
        }

    def score(self, predict, params: dict, gates: masks.Masks | None = None) -> float:
        """The metric that decides, on the split that decides."""
        examples = next(iter(self.validation.values()))
        logits = self._logits(predict, params, gates, examples)
        return main_score(self.task.scores(logits, examples))

    def exact_logits(
        self, model: Encoder, params: dict, gates: masks.Masks | None = None
    ) -> np.ndarray:
        """Logits on the first validation split in full float32."""
        exact = Encoder(dataclasses.replace(model.config, dtype="float32"))
        examples = next(iter(self.validation.values()))
        with jax.default_matmul_precision("highest"):
            predict = predict_lib.make_predict(exact)
            return self._logits(predict, params, gates, examples)

    def _logits(self, predict, params, gates, examples):
        return predict_lib.predict_all(
            predict,
            *distributed.replicate((params, gates or {})),
            examples,
            batch_size=self.config.eval_batch_size,
            buckets=self.buckets,
            put=distributed.shard,
        )

    def fit(
        self,
        stage: str,
        model: Encoder,
        params: dict,
        loss: objectives.Objective,
        *,
        settings: Any,
        epochs: int,
        examples: batches.Examples,
        rates: dict[str, step.Rate],
        context: dict | None = None,
        teacher_cache: TeacherCache | None = None,
        **trainable: Any,
    ) -> tuple[step.TrainState, float]:
        """Runs one stage, or what is left of it: the last state, and its seconds."""
        config = self.config
        state = step.create_state(
            params,
            seed=config.seed,
            stage=stage,
            rates=rates,
            freeze_embeddings=settings.freeze_embeddings,
            **trainable,
        )
        predict = predict_lib.make_predict(model)
        least = config.prune.target_sparsity - config.prune.sparsity_epsilon

        def evaluate(trainable, frozen):
            params = whole_params(trainable, frozen)
            if "log_alpha" not in trainable:
                return loop.Evaluation(self.score(predict, params))
            gates = masks.evaluation_masks(distributed.local(trainable["log_alpha"]))
            removed = cost.exact_sparsity(gates, model.config)
            score = self.score(predict, params, gates)
            return loop.Evaluation(score, removed >= least, {"sparsity": removed})

        with state_lib.Checkpoints(self.workdir / "checkpoints" / stage) as saved:
            stage_loop = loop.Loop(
                stage=stage,
                step=step.make_step(loss, settings.micro_batches),
                context=distributed.replicate(context or {}),
                batches=functools.partial(
                    batches.stream,
                    examples,
                    batch_size=settings.batch_size,
                    buckets=self.buckets,
                    seed=config.seed,
                    stage=stage,
                ),
                total_steps=epochs * steps_per_epoch(examples, settings),
                evaluate=evaluate,
                checkpoints=saved,
                log=self.log,
                every=loop.Every(
                    config.log_every, config.eval_every, config.checkpoint_every
                ),
                teacher_outputs=teacher_cache
                and teacher_cache.of(examples, self.buckets, settings.batch_size),
                # The start of pruning is dense, and pre-pruning returns its last state.
                start_counts=stage in ("teacher", "finetune"),
            )
            state, seconds = loop.fit(distributed.replicate(state), stage_loop)
        return distributed.local(state), seconds


class Student(NamedTuple):
    """A student's parameters and the map from its width to the teacher's."""

    params: dict
    projection: jax.Array  # (D', D)


def steps_per_epoch(examples: batches.Examples, settings: Any) -> int:
    """Optimizer steps in one pass over `examples`."""
    return batches.steps_per_epoch(len(examples), settings.batch_size)


def train_teacher(run: Run, model: Encoder, params: dict) -> tuple[dict, float]:
    """Learns the task from its labels: the best parameters, and the seconds taken."""
    settings, examples = run.config.teacher, run.examples("teacher")
    steps = settings.epochs * steps_per_epoch(examples, settings)
    rate = step.learning_rate(
        settings.learning_rate, settings.schedule, steps, settings.warmup_steps
    )
    state, seconds = run.fit(
        "teacher",
        model,
        params,
        objectives.task_objective(model),
        settings=settings,
        epochs=settings.epochs,
        examples=examples,
        rates={"weights": rate},
    )
    return whole_params(state.best, state.frozen), seconds


def preprune(
    run: Run, model: Encoder, teacher: dict, teacher_cache: TeacherCache | None
) -> tuple[Student, float]:
    """Distillation before any gate moves, from a copy of the teacher."""
    settings, examples = run.config.prune, run.examples("prune")
    epochs = settings.prepruning_epochs
    # The linear decay is that of the whole pruning, which is cut short here: it
    # starts afresh, from the full rate, when the gates begin to move.
    steps = settings.epochs * steps_per_epoch(examples, settings)
    rate = step.learning_rate(settings.learning_rate, settings.schedule, steps)
    state, seconds = run.fit(
        "prepruning",
        model,
        teacher,
        objectives.DistillationObjective(model, run.config.distill),
        settings=settings,
        epochs=epochs,
        examples=examples,
        rates={"weights": rate},
        teacher_cache=teacher_cache,
        distill_projection=jnp.eye(model.config.hidden_size),
    )
    params = whole_params(state.trainable, state.frozen)
    return Student(params, state.trainable["distill_projection"]), seconds


def learn_masks(
    run: Run, model: Encoder, student: Student, teacher_cache: TeacherCache | None
) -> tuple[Student, masks.Masks, float]:
    """Pruning: the dense student, masks that meet the target, and the seconds taken."""
    settings, examples = run.config.prune, run.examples("prune")
    epochs = settings.epochs - settings.prepruning_epochs
    per_epoch = steps_per_epoch(examples, settings)

    def rate(peak, schedule):
        return step.learning_rate(peak, schedule, epochs * per_epoch)

    state, seconds = run.fit(
        "prune",
        model,
        student.params,
        objectives.PruningObjective(model, run.config.distill),
        settings=settings,
        epochs=epochs,
        examples=examples,
        rates={
            "weights": rate(settings.learning_rate, settings.schedule),
            "masks": rate(settings.mask_learning_rate, settings.mask_schedule),
            "multipliers": rate(
                settings.multiplier_learning_rate, settings.multiplier_schedule
            ),
        },
        context={
            "target_sparsity": np.float32(settings.target_sparsity),
            "warmup_steps": np.int32(settings.warmup_epochs * per_epoch),
        },
        teacher_cache=teacher_cache,
        distill_projection=student.projection,
        log_alpha=masks.init_log_alpha(
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
            "the last gates are shifted to the target. More epochs or higher rates "
            "of masks and multipliers would do",
            file=sys.stderr,
        )
    path = run.workdir / "masks.npz"

    def settle():
        if path.exists():  # what a device likes, the next one may not
            return
        transform = (
            transforms.round_to_device(config=model.config)
            if settings.round_widths
            else transforms.chain()
        )
        file = io.BytesIO()
        found = constraint.final_masks(
            trainable["log_alpha"], model.config, settings.target_sparsity, transform
        )
        np.savez(file, **found)
        files.write_atomically(path, file.getvalue())

    distributed.on_process_zero(settle)
    with np.load(path) as file:
        gates = {kind: jnp.asarray(file[kind]) for kind in trainable["log_alpha"]}
    params = whole_params(trainable, state.frozen)
    return Student(params, trainable["distill_projection"]), gates, seconds


def finetune(
    run: Run, model: Encoder, student: Student, teacher_cache: TeacherCache | None
) -> tuple[dict, float]:
    """Distillation into the sliced `model`: its best parameters, the seconds taken."""
    settings, examples = run.config.finetune, run.examples("finetune")
    steps = settings.epochs * steps_per_epoch(examples, settings)
    rate = step.learning_rate(settings.learning_rate, settings.schedule, steps)
    state, seconds = run.fit(
        "finetune",
        model,
        student.params,
        objectives.DistillationObjective(model, run.config.distill),
        settings=settings,
        epochs=settings.epochs,
        examples=examples,
        rates={"weights": rate},
        teacher_cache=teacher_cache,
        distill_projection=student.projection,
    )
    return whole_params(state.best, state.frozen), seconds
