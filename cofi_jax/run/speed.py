"""Speedups in a run: the table of times, what it can reach, the search by the clock."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from cofi_jax import distributed
from cofi_jax.config import Config
from cofi_jax.errors import at_most, reject, warn
from cofi_jax.evaluation import latency as timed
from cofi_jax.evaluation import latency_table, timing
from cofi_jax.export import runtimes
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import constraint, cost, latency, speedup, transforms
from cofi_jax.pruning.masks import LogAlpha
from cofi_jax.pruning.slicing import spec_of
from cofi_jax.pruning.transforms import MaskTransform

_FIELD, _TABLE = "prune.target_speedup", "prune.latency_table"
_PRECISE = 0.0025  # A speedup with a standard error below this is measured well enough.
_LEAST_TURNS = 10  # Fewer say little of their own error; of a single one it would be 0.
_ROUNDS = 5  # of `benchmark.repeats` turns at most


def check(config: Config, sizes: EncoderConfig) -> None:
    """Checks what is known of the times before anything is written.

    Args:
      config: the settings.
      sizes: the sizes of the dense model.

    Raises:
      UserError: for a runtime that cannot be used, for a table that cannot be read or
        is of another key, and for a speedup that is out of reach by this table.
    """
    runtimes.timed(config.benchmark.runtime, "benchmark.runtime")
    needed = config.prune.target_speedup and config.prune.latency_table
    if needed and distributed.is_first():  # which is the one that measures
        _read(config, sizes, pathlib.Path(config.prune.latency_table), _TABLE)


def table_of(
    config: Config, sizes: EncoderConfig, workdir: pathlib.Path
) -> dict[str, Any] | None:
    """Returns the content of the run's table, which it makes where there is none.

    All processes call this at the same time, and the first one measures.

    Args:
      config: the settings.
      sizes: the sizes of the dense model.
      workdir: the folder of the run; a table of its own is `latency.json` there.

    Raises:
      UserError: as `check` does.
    """
    if not config.prune.target_speedup:
        return None
    path = pathlib.Path(config.prune.latency_table or workdir / "latency.json")

    def made_or_read():
        if not path.exists():
            make()
        field = _TABLE if config.prune.latency_table else "workdir"
        return _read(config, sizes, path, field)

    def make():
        runtime = config.benchmark.runtime
        opener = runtimes.timed(runtime, "benchmark.runtime")
        content = latency_table.measure(
            sizes, opener, _key(config, sizes), rest_ms=runtimes.rest_ms(runtime)
        )
        latency_table.write(path, content)
        print(
            f"{path.name}: a table of times, measured in {content['seconds']:.0f} s; "
            f"the dense model takes {content['dense_ms']:.4g} ms, "
            f"{content['additivity']:.3f} times what its parts add up to",
            flush=True,
        )

    # The other processes may run on machines with another key.
    return distributed.on_process_zero(made_or_read)


def _key(config, sizes):
    how = config.benchmark
    return latency_table.key_of(
        sizes,
        runtime=how.runtime,
        batch_size=how.batch_size,
        seq_length=how.seq_length,
    )


def _read(config, sizes, path, field):
    content = latency_table.read(path, field)
    latency_table.check_key(content, _key(config, sizes), field, path)
    prune, table = config.prune, latency_table.table(content)
    bounds = {"lowest": -math.inf} if prune.constraint == "exact" else {}
    removed = constraint.max_sparsity(sizes, prune.kinds, latency.cost(table), **bounds)
    highest = speedup.largest(sizes, prune.kinds, table)
    if removed < 1:
        highest = min(highest, latency.speedup_of(removed))
    if prune.target_speedup[-1] > highest:
        legal = f"masks of {tuple(prune.kinds)} reach {at_most(highest)} by the table "
        raise reject(_FIELD, prune.target_speedup, f"{legal}of times")
    return content


def search(
    config: Config,
    dense: EncoderConfig,
    sizes: EncoderConfig,
    log_alpha: LogAlpha,
    asked: float,
    table: latency.Table,
    settle: MaskTransform,
) -> speedup.Found:
    """Finds masks whose sliced model is as fast as was asked for.

    Args:
      config: the settings.
      dense: the sizes of the dense model.
      sizes: the sizes of the model that is pruned.
      log_alpha: the log-alphas that were learned.
      asked: the speedup over the dense model.
      table: the times.
      settle: what becomes of soft masks.
    """
    time = latency.cost(table)
    share = float(time.exact({}, sizes) / time.exact({}, dense))
    # Rounded upwards, it would be out of reach.
    highest = (1 - 1e-9) * speedup.largest(sizes, [*log_alpha], table) / share
    multiple = 1
    if config.prune.round_widths:
        liked = transforms.WIDTHS.get(jax.default_backend(), {})
        multiple = liked.get("intermediate", 1)

    def choose(aim):
        target = constraint.of_part(latency.sparsity_of(min(aim, highest)), share)
        masks = speedup.masks_at(log_alpha, sizes, target, time, settle, multiple)
        removed = cost.exact_sparsity(masks, sizes, time)
        return masks, latency.speedup_of(constraint.of_whole(removed, share))

    clock = Clock(config, dense)

    def measure(masks):
        return clock.speedup(_sliced(masks, sizes))

    found = speedup.reach(asked, choose, measure)
    chosen, passes = found.chosen, len(found.passes)
    print(
        f"asked for {asked:g}x: measured {chosen.measured:.4g}x, standard error "
        f"{100 * chosen.error:.2g} %; by the table of times {chosen.predicted:.4g}x; "
        f"after {passes} pass{'es' if passes > 1 else ''}",
        flush=True,
    )
    if chosen.miss(asked) > speedup.TOLERANCE / 2:
        noise = chosen.miss(asked) <= chosen.allowed
        reason = "that is as close as the noise allows" if noise else "no more passes"
        warn(f"{asked:g}x was asked for, {chosen.measured:.4g}x was measured: {reason}")
    return found


def _sliced(masks, sizes):
    """The sizes of the sliced model."""
    return spec_of(masks, sizes).config(sizes)


class Clock:
    """Measures speedups over the dense model, as the run's benchmark does."""

    def __init__(self, config: Config, dense: EncoderConfig):
        self._how = config.benchmark
        self._opener = runtimes.timed(self._how.runtime, "benchmark.runtime")
        self._vocab_size = dense.vocab_size
        self._dense = self._open(dense)

    def _open(self, sizes):
        with timing.memory_suffices(self._how.batch_size, self._how.seq_length):
            # The time does not depend on what the parameters are.
            return self._opener(latency_table.random_params(sizes), sizes)

    def speedup(self, sizes: EncoderConfig) -> tuple[float, float]:
        """Returns the speedup of a model, and its standard error as a fraction of it.

        Turns are added until the error is small, or until there are many.
        """
        calls = {"dense": self._dense, "pruned": self._open(sizes)}
        turns: dict[str, Sequence[Any]] = dict.fromkeys(calls, ())
        for _ in range(_ROUNDS):
            timings = timed.passes(
                calls,
                self._vocab_size,
                batch_size=self._how.batch_size,
                seq_length=self._how.seq_length,
                repeats=self._how.repeats,
                rest_ms=runtimes.rest_ms(self._how.runtime),
            )
            turns = {name: (*turns[name], *timings[name].turns) for name in calls}
            pair = [timing.Timing(tuple(turns[name])) for name in calls]
            error = timing.speedup_error(*pair)
            if error <= _PRECISE and len(turns["dense"]) >= _LEAST_TURNS:
                break
        return timing.speedup(*pair)[0], error
