"""The loop around the step: it feeds batches, evaluates, saves checkpoints and logs."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cofi_jax import distributed
from cofi_jax.data import batches
from cofi_jax.errors import UserError
from cofi_jax.training.step import TrainState


class Evaluation(NamedTuple):
    """The result of an evaluation; only one that `counts` may become the best."""

    score: float
    counts: bool = True
    values: dict[str, float] = {}


@dataclasses.dataclass(frozen=True)
class Loop:
    """One stage of training, without its state.

    Attributes:
      stage: the name, in the log, on the progress bar and in the order of the rows.
      step: the function that `step.make_step` returns.
      context: the pytree that the objective reads, on the device.
      examples: the training rows.
      batch_size: the rows of a batch (B).
      buckets: the padded lengths.
      seed: the run's seed, for the order of the rows.
      total_steps: the number of steps after which the stage ends.
      evaluate: maps (trainable, frozen) to an `Evaluation`; the trainable of the best
        one is kept.
      checkpoints: a `checkpoints.state.Checkpoints`.
      log: a `log.MetricsLog`.
      log_every: the steps between two lines of the log.
      eval_every: the steps between two evaluations; there is one more at the end.
      checkpoint_every: the steps between two checkpoints; there is one more at the end.
      start_counts: whether the state at step 0 is evaluated as well. Then the stage
        cannot end with a worse model than it was given.
      teacher_outputs: maps (rows, batch) to the teacher's outputs, see `teacher`; None
        where there is no teacher.
    """

    stage: str
    step: Callable
    context: dict
    examples: batches.Examples
    batch_size: int
    buckets: Sequence[int]
    seed: int
    total_steps: int
    evaluate: Callable[[dict, dict], Evaluation]
    checkpoints: Any
    log: Any
    log_every: int
    eval_every: int
    checkpoint_every: int
    start_counts: bool = False
    teacher_outputs: Callable | None = None

    def due(self, now: int, every: int) -> bool:
        """Whether something that is done `every` so many steps is done after `now`."""
        return now % every == 0 or now == self.total_steps


def fit(state: TrainState, loop: Loop) -> tuple[TrainState, float]:
    """Runs a stage to its end, from its newest checkpoint where it has one.

    A stage is resumed in this order:

    1. The newest checkpoint that can be read replaces `state`.
    2. The log forgets what was written after that checkpoint.
    3. The start is evaluated if there was no checkpoint and the start counts.
    4. The batches continue with the one after the checkpoint's step.

    Args:
      state: the state of the stage at step 0.
      loop: everything else.

    Returns:
      The last state, and the seconds that the stage took, restarts included.

    Raises:
      UserError: for a loss that is not finite; the last good checkpoint stays.
    """
    restored = _restore(state, loop)
    state = state if restored is None else restored
    first = int(jax.device_get(state.step))
    seconds = loop.log.rewind(loop.stage, -1 if restored is None else first)
    started = time.perf_counter() - seconds
    if restored is None and loop.start_counts:
        state = _evaluate(state, loop, 0)
    window, window_started = [], time.perf_counter()
    stream = batches.stream(
        loop.examples,
        batch_size=loop.batch_size,
        buckets=loop.buckets,
        seed=loop.seed,
        stage=loop.stage,
        first_step=first,
    )
    with _progress_bar(loop, first) as bar:
        for now in range(first + 1, loop.total_steps + 1):
            rows, batch = next(stream)
            batch = distributed.shard(batch)
            if loop.teacher_outputs:
                batch["teacher_outputs"] = loop.teacher_outputs(rows, batch)
            state, metrics = loop.step(state, loop.context, batch)
            window.append(metrics)
            bar.update()
            intervals = loop.log_every, loop.eval_every, loop.checkpoint_every
            if not any(loop.due(now, every) for every in intervals):
                continue
            window = jax.device_get(window)
            _check_finite(loop.stage, now - len(window), window)
            last = {name: float(value) for name, value in window[-1].items()}
            time_now = time.perf_counter()
            loop.log.write(
                stage=loop.stage,
                step=now,
                seconds=time_now - started,
                examples_per_second=loop.batch_size
                * len(window)
                / (time_now - window_started),
                **last,
            )
            shown = ("loss", "expected_sparsity", "target_sparsity")
            bar.set_postfix({n: f"{last[n]:.4g}" for n in shown if n in last})
            if loop.due(now, loop.eval_every):
                state = _evaluate(state, loop, now)
            if loop.due(now, loop.checkpoint_every):
                loop.checkpoints.save(state)
            window, window_started = [], time.perf_counter()
    if first == loop.total_steps:
        return state, seconds
    return state, time.perf_counter() - started


def _restore(state, loop):
    """Returns the newest state that can be read, or None; warns of the others."""
    restored = loop.checkpoints.restore(state)
    skipped = loop.checkpoints.skipped
    if skipped and restored is None:
        raise UserError(
            f"{loop.stage}: {'; '.join(skipped)}: none can be read; remove "
            "their folder to start the stage over"
        )
    for line in skipped:
        text = f"warning: {line}; falling back to the one before"
        tqdm.write(text, file=sys.stderr)
    return restored


def _progress_bar(loop, first):
    # A file that holds the standard error would fill up with a bar of every moment.
    interval = 0.5 if sys.stderr.isatty() else 20  # seconds
    return tqdm(
        total=loop.total_steps,
        initial=first,
        desc=loop.stage,
        unit="step",
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=interval,
        disable=first == loop.total_steps,
    )


def _evaluate(state, loop, now):
    """Logs an evaluation of the state, which is returned with the best one in it."""
    found = loop.evaluate(state.trainable, state.frozen)
    loop.log.write(stage=loop.stage, step=now, score=found.score, **found.values)
    return _with_best(state, found)


def _with_best(state, found):
    # The score is stored in float32; a float64 would seem to exceed an equal score.
    score = np.float32(found.score)
    if not (found.counts and score > jax.device_get(state.best_score)):
        return state
    # The next step donates the trainable arrays, so the best ones are copies. A new
    # array for the score would have another placement than a restored one, for which
    # jax would compile the step again; the maximum keeps the placement.
    return state.replace(
        best=jax.tree.map(jnp.copy, state.trainable),
        best_score=jnp.maximum(state.best_score, score),
    )


def _check_finite(stage, before, window):
    """Raises UserError at the first step of the window with an infinite term."""
    for number, metrics in enumerate(window, start=before + 1):
        # The terms come first: they are the cause where the sums are not finite.
        for name in sorted(metrics, key=lambda n: n in ("loss", "gradient_norm")):
            if not np.isfinite(metrics[name]):
                raise UserError(
                    f"{stage}: {name}={float(metrics[name])} at step {number} is not "
                    "finite; the last good checkpoint is kept: try a lower learning "
                    "rate, in a new --workdir"
                )
