"""The loop around the step, which evaluates, saves checkpoints and writes the log."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cofi_jax import distributed
from cofi_jax.errors import UserError, printable
from cofi_jax.training.step import TrainState


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
      score: the number that the best result is chosen by.
      counts: whether the result may become the best.
      values: further values for the log.
    """

    score: float
    counts: bool = True
    values: dict[str, float] = {}


class Every(NamedTuple):
    """The steps between log lines, evaluations and checkpoints, all due at the end."""

    log: int
    evaluation: int
    checkpoint: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """Everything that makes a stage of a run, except its state.

    Attributes:
      stage: the name of the stage, in the log and on the progress bar.
      step: the jitted step, from `step.make_step`.
      context: the pytree that the objective reads, on the device.
      batches: a function from `first_step` to the batches from that step on, such as
        `data.batches.stream`.
      total_steps: the number of steps of the stage.
      evaluate: a function from (trainable, frozen) to an `Evaluation`.
      checkpoints: the `checkpoints.state.Checkpoints` of the stage.
      log: the `log.MetricsLog` of the run.
      every: the steps between log lines, evaluations and checkpoints.
      teacher_outputs: a function from (rows, batch) to the outputs of the teacher, from
        `teacher.TeacherCache`; None if there is no teacher.
      start_counts: whether the state at step 0 is evaluated and may be the best. This
        must hold if that state is a legal result, so that a stage never returns a worse
        model than it was given.
    """

    stage: str
    step: Callable
    context: dict
    batches: Callable[..., Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]]
    total_steps: int
    evaluate: Callable[[dict, dict], Evaluation]
    checkpoints: Any
    log: Any
    every: Every
    teacher_outputs: Callable | None = None
    start_counts: bool = False

    def due(self, now: int, every: int) -> bool:
        """Returns whether something that is due every `every` steps is due now."""
        return now % every == 0 or now == self.total_steps


def fit(state: TrainState, loop: Loop) -> tuple[TrainState, float]:
    """Runs a stage to its end, from its newest checkpoint if it has one.

    Args:
      state: the state of the stage at step 0.
      loop: the stage.

    Returns:
      The last state, and the seconds that the stage took, including earlier attempts.

    Raises:
      UserError: if a metric is not finite, in which case the last good checkpoint
        stays, or if there are checkpoints but none can be read.
    """
    # A stage that is resumed ends with the same bits as if it had never been
    # interrupted. This needs four things in this order:
    # 1. The state is that of the newest checkpoint that can be read.
    # 2. The log forgets the lines after the step of the state.
    # 3. The batches follow from the step, and the random keys from the state.
    # 4. Only a stage that starts over evaluates its start, which is in the state later.
    stage, log, every = loop.stage, loop.log, loop.every
    restored = _restore(state, loop)
    state = state if restored is None else restored
    first = int(jax.device_get(state.step))
    seconds = log.rewind(stage, -1 if restored is None else first)
    started = time.perf_counter() - seconds
    if restored is None and loop.start_counts:
        state = _evaluate(state, loop, 0)
    window, window_started = [], time.perf_counter()
    batches = loop.batches(first_step=first)
    with _progress_bar(stage, first, loop.total_steps) as bar:
        for now in range(first + 1, loop.total_steps + 1):
            rows, batch = next(batches)
            batch = distributed.shard(batch)
            if loop.teacher_outputs:
                batch["teacher_outputs"] = loop.teacher_outputs(rows, batch)
            state, metrics = loop.step(state, loop.context, batch)
            window.append(metrics)
            bar.update()
            if not any(loop.due(now, n) for n in every):
                continue
            window = jax.device_get(window)
            _check_finite(stage, now - len(window), window)
            last = {name: float(value) for name, value in window[-1].items()}
            now_seconds = time.perf_counter()
            rows_done = len(batch["weight"]) * len(window)
            log.write(
                stage=stage,
                step=now,
                seconds=now_seconds - started,
                examples_per_second=rows_done / (now_seconds - window_started),
                **last,
            )
            shown = ("loss", "expected_sparsity", "target_sparsity")
            bar.set_postfix({n: f"{last[n]:.4g}" for n in shown if n in last})
            if loop.due(now, every.evaluation):
                state = _evaluate(state, loop, now)
            if loop.due(now, every.checkpoint):
                loop.checkpoints.save(state)
            window, window_started = [], time.perf_counter()
    if first == loop.total_steps:
        return state, seconds
    return state, time.perf_counter() - started


def _restore(state, loop):
    """Returns the newest state that can be read, or None if the stage has none."""
    restored, skipped = loop.checkpoints.restore(state), loop.checkpoints.skipped
    if skipped and restored is None:
        raise UserError(
            f"{loop.stage}: {'; '.join(skipped)}: none can be read; remove "
            "their folder to start the stage over"
        )
    for line in skipped:
        text = f"warning: {printable(line)}; falling back to the one before"
        tqdm.write(text, file=sys.stderr)
    return restored


def _progress_bar(stage, first, total_steps):
    interval = 0.5 if sys.stderr.isatty() else 20  # Seconds; a file would fill up.
    return tqdm(
        total=total_steps,
        initial=first,
        desc=stage,
        unit="step",
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=interval,
        disable=first == total_steps,
    )


def _evaluate(state, loop, now):
    """Evaluates the state, logs the result, and returns the state with its best."""
    found = loop.evaluate(state.trainable, state.frozen)
    values = found.values if found.counts else {**found.values, "counts": 0}
    loop.log.write(stage=loop.stage, step=now, score=found.score, **values)
    return _with_best(state, found)


def _with_best(state, found):
    # Scores are compared in the float32 that they are stored in. A float64 could seem
    # to be above an equal score that was rounded down.
    score = np.float32(found.score)
    if not (found.counts and score > jax.device_get(state.best_score)):
        return state
    # The next step donates `trainable`, so the best is a copy. The new score is a
    # maximum, to have the sharding of the old one: with another sharding, JAX would
    # compile the step again.
    return state.replace(
        best=jax.tree.map(jnp.copy, state.trainable),
        best_score=jnp.maximum(state.best_score, jax.device_put(score)),
    )


def _check_finite(stage, before, window):
    """Raises a UserError at the first step with a value that is not finite."""
    for number, metrics in enumerate(window, start=before + 1):
        # The terms of the loss come first, as they are what makes a sum not finite.
        for name in sorted(metrics, key=lambda n: n in ("loss", "gradient_norm")):
            if not np.isfinite(metrics[name]):
                raise UserError(
                    f"{stage}: {name}={float(metrics[name])} at step {number} is not "
                    "finite; the last good checkpoint is kept: try a lower learning "
                    "rate, in a new --workdir"
                )
