"""The loop around the step: batches in; evaluations, checkpoints and log lines out."""

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
from cofi_jax.errors import UserError
from cofi_jax.training.step import TrainState


class Evaluation(NamedTuple):
    """The result of an evaluation; only one that `counts` may become the best."""

    score: float
    counts: bool = True
    values: dict[str, float] = {}


class Every(NamedTuple):
    """The steps between log lines, evaluations and checkpoints; each ends a stage."""

    log: int
    evaluation: int
    checkpoint: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """A stage of a run, but for its state.

    Attributes:
      stage: its name, in the log and on the progress bar.
      step: the jitted step, from `step.make_step`.
      context: the pytree that the objective reads, on the device.
      batches: maps `first_step` to the batches from there on: a `data.batches.stream`.
      total_steps: the step at which the stage ends.
      evaluate: maps (trainable, frozen) to an `Evaluation`.
      checkpoints: the `state.Checkpoints` of the stage.
      log: a `log.MetricsLog`.
      every: how often to log, to evaluate and to save.
      teacher_outputs: maps (rows, batch) to the teacher's outputs, see `teacher`; None
        where there is no teacher.
      start_counts: whether the start is evaluated and may be the best: wherever it is
        a legal result, so that a stage never returns a worse model than it was given.
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
        """Whether something is due after step `now` that is due `every` so often."""
        return now % every == 0 or now == self.total_steps


def fit(state: TrainState, loop: Loop) -> tuple[TrainState, float]:
    """Runs a stage to its end, from its newest checkpoint where it has one.

    Args:
      state: the stage's state at step 0.
      loop: the stage.

    Returns:
      The last state, and the seconds that the stage took, restarts included.

    Raises:
      UserError: at a loss that is not finite (the last good checkpoint stays), and
        where there are checkpoints but none can be read.
    """
    # A stage goes on in this order, to end with the same bits as if it had never been
    # interrupted:
    # 1. The newest checkpoint that can be read gives the state.
    # 2. The log forgets the lines after the state's step.
    # 3. The batches follow from the step; random keys follow from state and step.
    # 4. Only a stage that starts over evaluates its start; else it is in the state.
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
    """The newest state that can be read, or None where the stage has none."""
    restored, skipped = loop.checkpoints.restore(state), loop.checkpoints.skipped
    if skipped and restored is None:
        raise UserError(
            f"{loop.stage}: {'; '.join(skipped)}: none can be read; remove "
            "their folder to start the stage over"
        )
    for line in skipped:
        text = f"warning: {line}; falling back to the one before"
        tqdm.write(text, file=sys.stderr)
    return restored


def _progress_bar(stage, first, total_steps):
    interval = 0.5 if sys.stderr.isatty() else 20  # seconds; a file would fill up
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
    """Evaluates and logs the state; returns it with the best that is now known."""
    found = loop.evaluate(state.trainable, state.frozen)
    loop.log.write(stage=loop.stage, step=now, score=found.score, **found.values)
    return _with_best(state, found)


def _with_best(state, found):
    # Scores are compared as they are stored: a float64 might seem to be above an equal
    # one that was rounded down.
    score = np.float32(found.score)
    if not (found.counts and score > jax.device_get(state.best_score)):
        return state
    # The next step donates `trainable`, so the best is a copy. The score is written by
    # a maximum, whose result lies where the old score lay: jax would compile the step
    # again for an array that is placed otherwise.
    return state.replace(
        best=jax.tree.map(jnp.copy, state.trainable),
        best_score=jnp.maximum(state.best_score, jax.device_put(score)),
    )


def _check_finite(stage, before, window):
    """Raises at the first step of the window with a term that is not finite."""
    for number, metrics in enumerate(window, start=before + 1):
        # The terms come first: they are the cause where the sums are not finite.
        for name in sorted(metrics, key=lambda n: n in ("loss", "gradient_norm")):
            if not np.isfinite(metrics[name]):
                raise UserError(
                    f"{stage}: {name}={float(metrics[name])} at step {number} is not "
                    "finite; the last good checkpoint is kept: try a lower learning "
                    "rate, in a new --workdir"
                )
