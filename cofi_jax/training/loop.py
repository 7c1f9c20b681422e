"""The loop around the step: batches in, evaluations, checkpoints and log lines out."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cofi_jax import distributed
from cofi_jax.data import batches as batches_lib
from cofi_jax.errors import UserError
from cofi_jax.training.step import TrainState


class Evaluation(NamedTuple):
    """What an evaluation found; only one that `counts` may become the best."""

    score: float
    counts: bool = True
    values: dict[str, float] = {}


def _batches(
    examples, batch_size, buckets, seed, first_step
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The endless stream of (rows, batch) from `first_step` on."""
    epoch, skip = divmod(
        first_step, batches_lib.steps_per_epoch(len(examples), batch_size)
    )
    while True:
        plan = batches_lib.epoch_plan(
            examples.lengths,
            batch_size=batch_size,
            buckets=buckets,
            seed=seed,
            epoch=epoch,
        )
        for length, rows in plan[skip:]:
            yield (
                rows,
                batches_lib.make_batch(
                    examples, rows, length=length, batch_size=batch_size
                ),
            )
        epoch, skip = epoch + 1, 0


def fit(
    state: TrainState,
    *,
    stage: str,
    step: Callable,
    context: dict,
    examples: batches_lib.Examples,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    total_steps: int,
    evaluate: Callable[[dict, dict], Evaluation],
    checkpoints: Any,
    log: Any,
    log_every: int,
    eval_every: int,
    checkpoint_every: int,
    teacher_outputs: Callable | None = None,
) -> tuple[TrainState, float]:
    """Runs a stage to its end, from its newest checkpoint where it has one.

    Args:
      state: the stage's state at step 0.
      stage: its name, in the log and on the progress bar.
      step: from `training.make_step`.
      context: the pytree that the objective reads, on the device.
      examples: the training rows.
      batch_size: B.
      buckets: padded lengths.
      seed: of the order of the examples.
      total_steps: where the stage ends.
      evaluate: maps (trainable, frozen) to an `Evaluation`; the trainable of the best
        one is kept.
      checkpoints: a `checkpoints.state.Checkpoints`.
      log: a `log.MetricsLog`.
      log_every: steps between lines of the log.
      eval_every: steps between evaluations; one more at the end.
      checkpoint_every: steps between checkpoints; one more at the end.
      teacher_outputs: maps (rows, batch) to the teacher's outputs, see `teacher`; None
        where there is no teacher.

    Returns:
      The last state, and the seconds that the stage took, restarts included.

    Raises:
      UserError: at a loss that is not finite; the last good checkpoint stays.
    """
    resumed = checkpoints.restore(state)
    if checkpoints.skipped and resumed is None:
        raise UserError(
            f"{stage}: {'; '.join(checkpoints.skipped)}: none can be read; remove "
            "their folder to start the stage over"
        )
    for line in checkpoints.skipped:
        text = f"warning: {line}; falling back to the one before"
        tqdm.write(text, file=sys.stderr)
    state = state if resumed is None else resumed
    first = int(jax.device_get(state.step))
    seconds = log.rewind(stage, first if resumed is not None else -1)
    started = time.perf_counter() - seconds

    def due(now, every):
        return now % every == 0 or now == total_steps

    window, window_started = [], time.perf_counter()
    batches = _batches(examples, batch_size, buckets, seed, first)
    interval = 0.5 if sys.stderr.isatty() else 20  # seconds; a file fills up
    bar = tqdm(
        total=total_steps,
        initial=first,
        desc=stage,
        unit="step",
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=interval,
        disable=first == total_steps,
    )
    with bar:
        for now in range(first + 1, total_steps + 1):
            rows, batch = next(batches)
            batch = distributed.shard(batch)
            if teacher_outputs:
                batch["teacher_outputs"] = teacher_outputs(rows, batch)
            state, metrics = step(state, context, batch)
            window.append(metrics)
            bar.update()
            if not any(due(now, n) for n in (log_every, eval_every, checkpoint_every)):
                continue
            window = jax.device_get(window)
            _check_finite(stage, now - len(window), window)
            last = {name: float(value) for name, value in window[-1].items()}
            now_seconds = time.perf_counter()
            rate = batch_size * len(window) / (now_seconds - window_started)
            log.write(
                stage=stage,
                step=now,
                seconds=now_seconds - started,
                examples_per_second=rate,
                **last,
            )
            bar.set_postfix(
                {
                    name: f"{last[name]:.4g}"
                    for name in ("loss", "expected_sparsity", "target_sparsity")
                    if name in last
                }
            )
            if due(now, eval_every):
                found = evaluate(state.trainable, state.frozen)
                state = _with_best(state, found)
                log.write(stage=stage, step=now, score=found.score, **found.values)
            if due(now, checkpoint_every):
                checkpoints.save(state)
            window, window_started = [], time.perf_counter()
    if first == total_steps:
        return state, seconds
    return state, time.perf_counter() - started


def _with_best(state, found):
    # As it is stored: a float64 would seem above an equal that was rounded down.
    score = np.float32(found.score)
    if not (found.counts and score > jax.device_get(state.best_score)):
        return state
    # Copied, because the next step donates trainable; and the maximum, because a new
    # array would lie elsewhere for jax than a restored one, and be compiled for.
    return state.replace(
        best=jax.tree.map(jnp.copy, state.trainable),
        best_score=jnp.maximum(state.best_score, score),
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
