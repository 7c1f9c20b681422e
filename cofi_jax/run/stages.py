"""The stages of a run: calls of the same `fit` with another objective.

teacher -> prepruning -> prune -> (slice, reconstruct) -> finetune

With several targets, all from prune on run once for each of them, like the steps of a
stair: each cuts the model that the one before has made. In a stage without a step,
prune takes the masks that follow from the seeds, or a structure given by hand; they are
0 or 1.
"""

import dataclasses
import functools
import io
import itertools
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cofi_jax import config as config_lib
from cofi_jax import distributed, files
from cofi_jax.checkpoints import state as state_lib
from cofi_jax.data import batches, tasks
from cofi_jax.data.metrics import main_score
from cofi_jax.errors import warn
from cofi_jax.evaluation import latency_table, predict
from cofi_jax.export import certificate
from cofi_jax.models.bert import Batch, Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import KINDS, blocks
from cofi_jax.pruning import constraint, latency, transforms
from cofi_jax.pruning import masks as masks_lib
from cofi_jax.pruning.cost import PARAMETERS, Cost, exact_sparsity
from cofi_jax.pruning.importance import magnitude, seed_log_alpha
from cofi_jax.pruning.masks import LogAlpha, Masks
from cofi_jax.pruning.slicing import spec_of
from cofi_jax.pruning.speedup import Pass
from cofi_jax.run import artefacts, speed, structure
from cofi_jax.training import (
    importance,
    loop,
    objectives,
    reconstruction,
    step,
    surgeon,
)
from cofi_jax.training import log as log_lib
from cofi_jax.training.objectives import whole_params
from cofi_jax.training.teacher import TeacherCache

# The final masks may miss the target by this much, see `constraint.final_masks`.
_TOLERANCE = 1e-3
# The names of arrays beside the masks, see the functions of these names.
_PASSES, _FOR_PARAMETERS = "passes", "for_parameters"


class Stair(NamedTuple):
    """One of the models that a run makes.

    Attributes:
      target: the sparsity, as a fraction of the dense model's cost.
      suffix: what follows the names of its stages and files: "-60", or "-8x" for a
        speedup, or "" where the run makes one model only.
      last: whether no smaller model follows.
      speedup: how many times as fast it is to be; 0 where parameters are the cost.
    """

    target: float
    suffix: str
    last: bool
    speedup: float = 0.0

    @property
    def tolerance(self) -> float:
        """By how much final masks may miss the target."""
        return _TOLERANCE * ((1 - self.target) if self.speedup else 1)

    def least(self, epsilon: float) -> float:
        """The least sparsity that counts as the target, to `epsilon`."""
        if not self.speedup:
            return self.target - epsilon
        return latency.sparsity_of(self.speedup ** (1 - epsilon))


def stairs(targets: Sequence[float], speedups: Sequence[float] = ()) -> list[Stair]:
    """The models of a run in the order in which they are made.

    Args:
      targets: their sparsities, which are not read where there are speedups.
      speedups: how many times as fast as the dense model they are to be.
    """
    if speedups:
        many = len(speedups) > 1
        return [
            Stair(
                latency.sparsity_of(each),
                f"-{each:g}x" if many else "",
                each == speedups[-1],
                each,
            )
            for each in speedups
        ]
    many = len(targets) > 1
    return [
        Stair(target, f"-{100 * target:g}" if many else "", target == targets[-1])
        for target in targets
    ]


def saved_as(workdir: pathlib.Path, stair: Stair) -> pathlib.Path:
    """The folder of one of the models that a run makes."""
    return workdir / f"pruned{stair.suffix}"


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages share.

    Attributes:
      config: the settings.
      workdir: the folder of the run.
      task: the task.
      dense: the sizes of the dense model.
      train: the training rows that the stages choose from.
      validation: the rows of each validation split; the first one decides.
      log: the run's log.
      inputs: a digest of the config, of the rows and of the model that was loaded.
      times: the content of the table of times, see `evaluation.latency_table`; None
        where parameters are the cost.
      judge: the task with the settings of the teacher, whose answers are the labels;
        None where rows have labels.
    """

    config: config_lib.Config
    workdir: pathlib.Path
    task: tasks.Task
    dense: EncoderConfig
    train: batches.Examples
    validation: dict[str, batches.Examples]
    log: log_lib.MetricsLog | distributed.NullLog
    inputs: int = 0
    times: dict[str, Any] | None = None
    judge: tasks.Task | None = None

    @functools.cached_property
    def table(self) -> latency.Table | None:
        """The table of times; None where parameters are the cost."""
        return self.times and latency_table.table(self.times)

    @functools.cached_property
    def cost(self) -> Cost:
        """What the targets are fractions of."""
        return latency.cost(self.table) if self.table else PARAMETERS

    @functools.cached_property
    def buckets(self) -> tuple[int, ...]:
        """The padded lengths, which suit the mean of the stages that have steps.

        Each of them compiles its step for each length.
        """
        prune = self.config.prune
        stages = [] if self.config.teacher.path else ["teacher"]
        stages.append("prepruning")
        for stair in stairs(prune.targets, prune.target_speedup):
            stages += [f"prune{stair.suffix}", f"finetune{stair.suffix}"]
        seen = [
            steps * self._settings(stage).batch_size
            for stage in stages
            if (steps := self.steps(stage))
        ]
        epochs = sum(seen) / len(seen) / len(self.train)
        return batches.bucket_lengths(self.task, self.train.lengths, epochs)

    def made_from(self, *trees: Any) -> int:
        """A digest of the run's inputs and of arrays, see `artefacts`."""
        return zlib.crc32(f"{self.inputs} {distributed.digest(trees)}".encode())

    def reached(
        self, model: Encoder, params: dict, by: tasks.Task | None = None
    ) -> dict[str, Any]:
        """What a model reaches on the validation rows, and by which settings.

        Args:
          model: the module.
          params: its parameters.
          by: the task as it was fitted to the model; None to fit it on training rows.

        Returns:
          `scores`    each of the task's metrics, by validation split
          `by_class`  what `metrics.rates` says, on the split that decides
          `settings`  what `Problem.fit` chose for the model
          The last two are left out where the problem has none.
        """
        task = by or self._fitted(model, params, None, self.train)
        scores, by_class = {}, {}
        for split, rows in self.validation.items():
            logits = self._logits(model, params, None, rows)
            scores[split] = task.scores(logits, rows)
            by_class = by_class or task.problem.by_class(logits, rows, task.labels)
        more = {"by_class": by_class, "settings": dict(task.problem.settings)}
        return {"scores": scores} | {name: part for name, part in more.items() if part}

    def answers(
        self, model: Encoder, params: dict, by: tasks.Task | None = None
    ) -> certificate.Result:
        """What a model answers on the split that decides, to compare it with others.

        The arguments are those of `reached`.
        """
        task = by or self._fitted(model, params, None, self.train)
        rows = next(iter(self.validation.values()))
        logits = self._logits(model, params, None, rows)
        return certificate.result(task, rows, logits)

    def score(self, model: Encoder, params: dict, masks: Masks | None = None) -> float:
        """The metric that decides, on the split that decides.

        What the problem chooses on training rows it chooses on a part of them.
        """
        task = self._fitted(model, params, masks, self._some_rows)
        rows = next(iter(self.validation.values()))
        return main_score(task.scores(self._logits(model, params, masks, rows), rows))

    @functools.cached_property
    def _some_rows(self) -> batches.Examples:
        """As many training rows as there are validation rows on the split that decides.

        So they at most double the time of an evaluation.
        """
        count = len(next(iter(self.validation.values())))
        count = min(count, len(self.train))
        return batches.first_rows(self.train, count, field="data.path")

    def _fitted(self, model, params, masks, rows) -> tasks.Task:
        """The task with what its problem chooses for a model on training rows."""
        if not self.task.problem.fits:
            return self.task
        logits = self._logits(model, params, masks, rows)
        problem = self.task.problem.fit(logits, rows, self.task.metrics)
        return dataclasses.replace(self.task, problem=problem)

    def exact_logits(
        self, model: Encoder, params: dict, masks: Masks | None = None
    ) -> np.ndarray:
        """The logits (N, ...) on the split that decides, in full float32."""
        exact = Encoder(dataclasses.replace(model.config, dtype="float32"))
        rows = next(iter(self.validation.values()))
        # A CPU has one precision for float32. To ask for it by another name would
        # compile anew what scores have compiled already.
        precision = None if jax.default_backend() == "cpu" else "highest"
        with jax.default_matmul_precision(precision):
            return self._logits(exact, params, masks, rows)

    def _logits(self, model, params, masks, rows):
        return predict.predict_all(
            predict.make_predict(model),
            *distributed.replicate((params, masks or {})),
            rows,
            batch_size=self.config.eval_batch_size,
            buckets=self.buckets,
            put=distributed.shard,
        )

    def fit(
        self,
        stage: str,
        model: Encoder,
        params: dict,
        objective: objectives.Objective,
        *,
        teacher: TeacherCache | None = None,
        rates: dict[str, step.Rate] | None = None,
        context: dict[str, Any] | None = None,
        evaluate: Callable[[dict, dict], loop.Evaluation] | None = None,
        **trainable: Any,
    ) -> tuple[step.TrainState, float]:
        """Runs a stage, or what is left of it.

        Args:
          stage: its name.
          model: the module.
          params: the parameters that the stage starts from.
          objective: what it minimises.
          teacher: what it imitates, or None.
          rates: the learning rates of what is not a weight, see `step.create_state`.
          context: what the objective reads beside parameters and batch.
          evaluate: maps (trainable, frozen) to an evaluation; by default the score.
          **trainable: what is trained beside the parameters, see `step.create_state`.

        Returns:
          The last state, and the seconds that the stage took.
        """
        config, settings = self.config, self._settings(stage)
        rows, steps = self._rows(stage), self.steps(stage)
        # The decay of pre-pruning is that of the whole pruning, which is cut short: it
        # starts afresh, from the full rate, when the masks begin to move.
        scheduled = steps
        if stage == "prepruning":
            scheduled = self.steps(stage, settings.epochs)
        warmup_steps = config.teacher.warmup_steps if stage == "teacher" else 0
        rate = step.learning_rate(
            settings.learning_rate, settings.schedule, scheduled, warmup_steps
        )
        state = step.create_state(
            params,
            seed=config.seed,
            stage=stage,
            rates={"weights": rate} | (rates or {}),
            freeze_embeddings=settings.freeze_embeddings,
            **trainable,
        )
        # A teacher's start follows from the run's inputs. Its parameters are not
        # compared: those drawn at random differ between kinds of devices.
        context = context or {}
        start = () if stage == "teacher" else (params, context.get("table"))
        made_from = self.made_from(*start)
        folder = self.workdir / "checkpoints" / stage
        with state_lib.Checkpoints(folder, made_from) as saved:
            stage_loop = loop.Loop(
                stage=stage,
                step=step.make_step(objective, settings.micro_batches),
                context=distributed.replicate(context),
                batches=functools.partial(
                    batches.stream,
                    rows,
                    batch_size=settings.batch_size,
                    buckets=self.buckets,
                    seed=config.seed,
                    stage=stage,
                ),
                total_steps=steps,
                evaluate=evaluate or functools.partial(self._evaluate, model),
                checkpoints=saved,
                log=self.log,
                every=loop.Every(
                    config.log_every, config.eval_every, config.checkpoint_every
                ),
                teacher_outputs=teacher
                and teacher.of(rows, self.buckets, settings.batch_size),
                # The start of pruning is dense, but where masks are not learned it is
                # all there is; and pre-pruning returns its last state.
                start_counts=_kind(stage) in ("teacher", "finetune")
                or (_kind(stage) == "prune" and not steps),
            )
            state, seconds = loop.fit(distributed.replicate(state), stage_loop)
        return distributed.local(state), seconds

    def steps(self, stage: str, epochs: int | None = None) -> int:
        """The optimizer steps in all of a stage's epochs, or in so many."""
        settings, prune = self._settings(stage), self.config.prune
        if epochs is None:
            between = stage.startswith("finetune-") and not stage.endswith(self._last)
            epochs = {
                "prepruning": prune.prepruning_epochs,
                "prune": prune.epochs - prune.prepruning_epochs,
                "finetune": between and prune.recover_epochs or settings.epochs,
            }.get(_kind(stage), settings.epochs)
        rows = settings.train_rows or len(self.train)
        return epochs * batches.steps_per_epoch(rows, settings.batch_size)

    @property
    def _last(self) -> str:
        prune = self.config.prune
        return stairs(prune.targets, prune.target_speedup)[-1].suffix

    def _settings(self, stage) -> config_lib.Stage:
        return getattr(self.config, _section(stage))

    def _rows(self, stage) -> batches.Examples:
        field = f"{_section(stage)}.train_rows"
        rows = self._settings(stage).train_rows
        return batches.first_rows(self.train, rows, field=field)

    def _evaluate(self, model, trainable, frozen) -> loop.Evaluation:
        return loop.Evaluation(self.score(model, whole_params(trainable, frozen)))


def _kind(stage: str) -> str:
    """The name of a stage without its target."""
    return stage.partition("-")[0]


def _section(stage: str) -> str:
    """The section of the config that a stage's settings are in."""
    return "prune" if stage == "prepruning" else _kind(stage)


class Student(NamedTuple):
    """A student's parameters and the map from its width to the teacher's."""

    params: dict
    projection: jax.Array  # (D', D)


def train_teacher(run: Run, model: Encoder, params: dict) -> tuple[dict, float]:
    """Learns the task from its labels: the best parameters, and the seconds taken."""
    objective = objectives.task_objective(model)
    state, seconds = run.fit("teacher", model, params, objective)
    return whole_params(state.best, state.frozen), seconds


def preprune(
    run: Run, model: Encoder, params: dict, teacher: TeacherCache | None
) -> tuple[Student, float]:
    """Distills before any mask moves, from a copy of the teacher's parameters.

    Returns:
      The student, and the seconds that the stage took.
    """
    objective = objectives.DistillationObjective(model, run.config.distill)
    projection = jnp.eye(model.config.hidden_size)
    state, seconds = run.fit(
        "prepruning",
        model,
        params,
        objective,
        teacher=teacher,
        distill_projection=projection,
    )
    params = whole_params(state.trainable, state.frozen)
    return Student(params, state.trainable["distill_projection"]), seconds


def learn_masks(
    run: Run,
    stair: Stair,
    model: Encoder,
    student: Student,
    teacher: TeacherCache | None,
) -> tuple[Student, Masks, dict[str, float]]:
    """Prunes `model` to its target.

    Where the target before removed so much that this one is met too, nothing closes.

    Returns:
      The student, masks that meet the target, and the seconds of the stage, and of the
      importance that the seeds need, by their names.
    """
    settings, stage = run.config.prune, f"prune{stair.suffix}"
    steps = run.steps(stage)
    share = float(run.cost.exact({}, model.config) / run.cost.exact({}, run.dense))
    if share < 1 and 1 - share >= stair.target:
        _leave(run, stair, share)
        return student, {"hidden": jnp.ones(model.config.hidden_size)}, {stage: 0.0}
    rates = {"masks": (settings.mask_learning_rate, settings.mask_schedule)}
    trainable: dict[str, Any] = {}
    if settings.constraint == "lagrangian":
        rates["multipliers"] = (
            settings.multiplier_learning_rate,
            settings.multiplier_schedule,
        )
        trainable["multipliers"] = {"linear": 0.0, "quadratic": 0.0}
    cut = _Cut(run, stair, model, share)
    log_alpha, taken = _first_log_alpha(run, stair, model, student.params)
    state, taken[stage] = run.fit(
        stage,
        model,
        student.params,
        objectives.PruningObjective(model, run.config.distill),
        teacher=teacher,
        rates={k: step.learning_rate(*rate, steps) for k, rate in rates.items()},
        context={
            "target_sparsity": np.float32(stair.target),
            "warmup_steps": np.int32(run.steps(stage, settings.warmup_epochs)),
            "share": np.float32(share),
        }
        | ({"table": jax.tree.map(np.float32, run.table)} if run.table else {}),
        evaluate=cut.evaluate,
        distill_projection=student.projection,
        log_alpha=log_alpha,
        **trainable,
    )
    best = state.best
    if not jnp.isfinite(state.best_score):
        best = state.trainable
        _warn_of_last_masks(stair, settings.sparsity_epsilon)
    masks = _final_masks(cut, best["log_alpha"])
    params = whole_params(best, state.frozen)
    return Student(params, best["distill_projection"]), masks, taken


def _leave(run, stair, share):
    """Leaves a model as it is, since the target before removed enough."""
    distributed.on_process_zero(lambda: files.remove(_masks_path(run, stair)))
    if stair.speedup:
        warn(
            f"prune{stair.suffix}: by the table of times, the model before is "
            f"{1 / share:.4g}x as fast already; nothing more is pruned, or timed to "
            "choose masks"
        )


def _warn_of_last_masks(stair, epsilon):
    kind = "removed time" if stair.speedup else "sparsity"
    warn(
        f"prune{stair.suffix}: no evaluation found a {kind} of "
        f"{stair.least(epsilon):.4g} or more; the last masks are shifted to the "
        "target. More epochs would do, or higher rates of masks and multipliers where "
        "there are multipliers"
    )


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How the log-alphas of a stage become masks that meet its target.

    Attributes:
      run: the run.
      stair: the model that the stage makes.
      model: the module that is pruned.
      share: the fraction of the dense model's cost that it has.
    """

    run: Run
    stair: Stair
    model: Encoder
    share: float

    def evaluate(self, trainable: dict, frozen: dict) -> loop.Evaluation:
        """Scores the model with the masks of a state, which may be on its way."""
        log_alpha = distributed.local(trainable["log_alpha"])
        masks, settings = self._masks(log_alpha), self.run.config.prune
        removed = self.removed(masks)
        met = removed >= self.stair.least(settings.sparsity_epsilon)
        score = self.run.score(self.model, whole_params(trainable, frozen), masks)
        return loop.Evaluation(score, met, {"sparsity": removed})

    def removed(self, masks: Masks) -> float:
        """Returns the fraction of the dense model's cost that masks remove."""
        removed = exact_sparsity(masks, self.model.config, self.run.cost)
        return constraint.of_whole(removed, self.share)

    def final(self, log_alpha: LogAlpha) -> tuple[Masks, list[Pass]]:
        """Returns the masks that slicing uses, and the passes that measured them."""
        run, sizes, settings = self.run, self.model.config, self.run.config.prune
        if settings.by_hand:
            return self._by_hand(log_alpha), []
        if not run.table:
            return self.for_parameters(log_alpha, self._target), []
        if settings.constraint == "exact":
            log_alpha = self._at_target(log_alpha, self._target, run.cost)
        how = self.stair.speedup, run.table, self._settle
        found = speed.search(run.config, run.dense, sizes, log_alpha, *how)
        return found.masks, [found.chosen, *found.passes]

    def for_parameters(self, log_alpha: LogAlpha, target: float) -> Masks:
        """Returns masks that remove this fraction of the parameters of the model."""
        sizes, settings = self.model.config, self.run.config.prune
        if settings.constraint == "exact":
            log_alpha = self._at_target(log_alpha, target, PARAMETERS)
        transform = self._settle
        if settings.round_widths:
            rounded = transforms.round_to_device(config=sizes)
            transform = transforms.chain(transform, rounded)
        return constraint.final_masks(log_alpha, sizes, target, transform)

    def _masks(self, log_alpha):
        settings = self.run.config.prune
        if settings.by_hand:
            return self._by_hand(log_alpha)
        if settings.constraint == "lagrangian":
            return masks_lib.evaluation_masks(log_alpha)
        # Any state can be cut to the target, also while that still rises.
        log_alpha = self._at_target(log_alpha, self._target, self.run.cost)
        aim = self._target, self.stair.tolerance, self.run.cost
        masks = constraint.target_masks(log_alpha, self.model.config, *aim)
        return self._settle(masks)

    def _by_hand(self, log_alpha):
        keep = structure.transform(self.run.config.prune.structure, self.model.config)
        # The order is all that counts; far below 0, probabilities would be 0 and equal.
        return keep({k: 1 / (1 + v.max() - v) for k, v in log_alpha.items()})

    @property
    def _target(self):
        """The fraction of the cost of the model that is pruned."""
        return constraint.of_part(self.stair.target, self.share)

    @functools.cached_property
    def _at_target(self):
        """Compiles the bisection once for each cost, not at each evaluation."""
        return jax.jit(
            lambda log_alpha, target, cost: constraint.at_target(
                log_alpha, self.model.config, target, cost
            ),
            static_argnums=2,
        )

    @functools.cached_property
    def _settle(self):
        """Soft values are learned. Those of seeds would only shrink what stays."""
        learned = self.run.steps(f"prune{self.stair.suffix}")
        return transforms.chain() if learned else transforms.harden()


def _first_log_alpha(run, stair, model, params) -> tuple[LogAlpha, dict[str, float]]:
    """What the masks start from, and the seconds of what was measured for it."""
    settings, taken = run.config.prune, {}
    # An earlier target may have removed all that a kind of masks could close. A
    # structure that is given by hand may cut any kind.
    kinds = KINDS if settings.by_hand else settings.kinds
    kinds = masks_lib.kinds_left(model.config, kinds)
    if settings.seeds == "equal":
        key = jax.random.key(run.config.seed)
        return masks_lib.init_log_alpha(model.config, key, kinds), taken
    if settings.seeds == "magnitude":
        found = magnitude(params, model.config, kinds)
    else:
        name = f"importance{stair.suffix}"
        measure = functools.partial(_importance, run, stair, model, params, kinds)
        found, taken[name] = _made_once(run, name, (params,), measure)
    # The Lagrangian's log-alphas have bounds, which leave no room for later ones.
    later = {"blocks_later": 0.0} if settings.constraint == "lagrangian" else {}
    straight = latency.cost(run.table.straight()) if run.table else PARAMETERS
    how = {"spread": settings.seed_spread, "cost": straight}
    return seed_log_alpha(found, model.config, **how, **later), taken


def _importance(run, stair, model, params, kinds) -> Masks:
    settings, found = run.config.prune, {}
    measure = importance.importance
    if settings.seeds == "compensated":
        measure = surgeon.compensated_importance
        if "hidden" in kinds:  # A structure that is given by hand keeps them all.
            found["hidden"] = np.ones(model.config.hidden_size)
            kinds = tuple(kind for kind in kinds if kind != "hidden")
    return found | measure(
        model,
        distributed.replicate(params),
        _some_batches(run, f"importance of prune{stair.suffix}", settings.seed_batches),
        kinds=kinds,
        labels=bool(run.task.label_column),  # It has no loss by its own answers.
    )


def _some_batches(run, purpose, count) -> Iterator[Batch]:
    """The first batches of an epoch of the rows of pruning, without row numbers.

    They are so few that rows of a sentence or two share one padded length.
    """
    settings, rows = run.config.prune, run._rows("prune")
    batch_size = settings.batch_size // settings.micro_batches
    epochs = count * batch_size / len(rows)
    stream = batches.stream(
        rows,
        batch_size=batch_size,
        buckets=batches.bucket_lengths(run.task, rows.lengths, epochs),
        seed=run.config.seed,
        stage=purpose,
    )
    return (distributed.shard(batch) for _, batch in itertools.islice(stream, count))


def _final_masks(cut: _Cut, log_alpha: LogAlpha) -> Masks:
    """The content of `masks.npz`.

    They are always read from the file: the widths that they are rounded to depend on
    the kind of device, and a run may go on on another kind.
    """
    run, stair = cut.run, cut.stair
    path = _masks_path(run, stair)

    def make():
        found, passes = cut.final(log_alpha)
        removed = cut.removed(found)
        if not (stair.speedup or removed >= stair.target - _TOLERANCE):
            text = f"masks of sparsity {removed:.4f} miss target {stair.target}"
            raise RuntimeError(text)
        beside = {}
        if passes:
            sizes = cut.model.config
            other = cut.for_parameters(log_alpha, exact_sparsity(found, sizes))
            sizes = spec_of(other, sizes).config(sizes)
            widths = [block.sizes(sizes) for block in blocks(sizes)]
            beside = {_PASSES: passes, _FOR_PARAMETERS: widths}
        arrays = found | {k: np.array(v) for k, v in beside.items()}
        _write_arrays(path, arrays)

    artefacts.settle(
        path,
        run.made_from(log_alpha, run.table),
        lambda: distributed.on_process_zero(make),
    )
    with np.load(path) as file:
        return {kind: jnp.asarray(file[kind]) for kind in log_alpha}


def _masks_path(run, stair):
    return run.workdir / f"masks{stair.suffix}.npz"


def passes(run: Run, stair: Stair) -> list[Pass]:
    """The passes of the search for a speedup: the one that was chosen, then all.

    There are none where the model before was fast enough by the table.
    """
    return [Pass(*each) for each in _beside(run, stair, _PASSES)]


def for_parameters(run: Run, stair: Stair) -> dict[str, tuple[int, ...]]:
    """What would be left of the layers if parameters were the cost, not the time.

    It follows from the log-alphas that the masks follow from, and leaves as many
    parameters. There is none where `passes` has none.
    """
    rows = zip(blocks(run.dense), _beside(run, stair, _FOR_PARAMETERS), strict=False)
    return {block.widths: tuple(row) for block, row in rows}


def _beside(run, stair, name):
    """The rows of an array beside the masks, as lists; there may be none."""
    path = _masks_path(run, stair)
    if not path.exists():
        return []
    with np.load(path) as file:
        return file[name].tolist() if name in file else []


def reconstruct(
    run: Run,
    stair: Stair,
    model: Encoder,
    params: dict,
    whole: tuple[Encoder, dict],
) -> tuple[dict, dict[str, float]]:
    """Fits the sliced `model` to the one before, a module and its parameters.

    Returns:
      The parameters, and the seconds that the fit took, by its name.
    """
    name = f"reconstruction{stair.suffix}"
    count = run.config.prune.reconstruction_batches

    def fitted():
        found = reconstruction.reconstruct(
            model,
            distributed.replicate(params),
            whole[0],
            distributed.replicate(whole[1]),
            _some_batches(run, name, count),
        )
        layers = {k: v for k, v in found.items() if k.startswith("layer_")}
        return traverse_util.flatten_dict(layers, sep="/")

    arrays, seconds = _made_once(run, name, (params, whole[1]), fitted)
    params = params | traverse_util.unflatten_dict(arrays, sep="/")
    return params, {name: seconds}


def _made_once(run, name, made_from, make) -> tuple[dict[str, np.ndarray], float]:
    """The arrays that `make` returns, which a file keeps, and the seconds that it took.

    As with masks, the arrays are always read from the file, since they depend in their
    last bits on the kind of device.
    """
    path = run.workdir / f"{name}.npz"

    def write():
        arrays = distributed.fetch(make())
        distributed.on_process_zero(lambda: _write_arrays(path, arrays))

    seconds = artefacts.settle(path, run.made_from(*made_from), write)
    with np.load(path) as file:
        return dict(file), seconds


def _write_arrays(path, arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    files.write_atomically(path, file.getvalue())


def finetune(
    run: Run,
    stair: Stair,
    model: Encoder,
    student: Student,
    teacher: TeacherCache | None,
) -> tuple[Student, float]:
    """Distills into the sliced `model`: the best student, and the seconds taken."""
    state, seconds = run.fit(
        f"finetune{stair.suffix}",
        model,
        student.params,
        objectives.DistillationObjective(model, run.config.distill),
        teacher=teacher,
        distill_projection=student.projection,
    )
    params = whole_params(state.best, state.frozen)
    return Student(params, state.best["distill_projection"]), seconds
