"""Timings of several calls that take turns in one run.

A machine speeds up and slows down over minutes. Here turns alternate, A B A B, so the
i-th turns of A and B were taken under the same conditions:

    speedup = median over i of A_i / B_i,    spread = their 5th and 95th percentile

A turn is a short burst of calls, and A_i the median of their times. If single calls
alternated, a small model would always find the caches full of the large one's data.
"""

import contextlib
import dataclasses
import gc
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from cofi_jax.errors import reject

_TURN_MS = 50.0
SPREAD = (50, 5, 95)  # A figure with its spread is these percentiles, in this order.


@dataclasses.dataclass(frozen=True)
class Timing:
    """The milliseconds of each call: a tuple for each turn, in the order of turns."""

    turns: tuple[tuple[float, ...], ...]

    @property
    def by_turn(self) -> np.ndarray:
        """The median of each turn, (repeats,)."""
        return np.array([np.median(times) for times in self.turns])

    @property
    def median_ms(self) -> float:
        """The time that half of the calls stayed below; every turn weighs the same."""
        return self.percentile_ms(50)

    @property
    def spread_ms(self) -> list[float]:
        """The median, the 5th and the 95th percentile of the calls."""
        return [self.percentile_ms(percent) for percent in SPREAD]

    def percentile_ms(self, percent: float) -> float:
        """Returns the time that `percent` of the calls stayed below.

        Every turn weighs the same. Otherwise slow moments would hardly count, because
        few calls fit into a turn then.
        """
        weights = np.concatenate([[1 / len(turn)] * len(turn) for turn in self.turns])
        calls = {"weights": weights, "method": "inverted_cdf"}
        return float(np.percentile(np.concatenate(self.turns), percent, **calls))


def side_by_side(
    calls: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int = 3,
    turn_ms: float = _TURN_MS,
    rest_ms: float = 0.0,
) -> dict[str, Timing]:
    """Times the calls in turn, each until its result is ready.

    Args:
      calls: functions of no arguments by name, each of which returns arrays.
      repeats: the turns of each.
      warmup: untimed calls of each beforehand; the first one compiles.
      turn_ms: the time after which a turn ends; it has at least one call. The first
        call fills the caches anew and counts only where no other follows.
      rest_ms: a pause before each turn, in which the threads of other runtimes stop
        waiting for work.
    """
    for call in calls.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    turns = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()  # A collection would fall into one call or another.
    try:
        for _ in range(repeats):
            for name, call in calls.items():
                time.sleep(rest_ms / 1e3)
                turns[name].append(_turn(call, turn_ms))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(found)) for name, found in turns.items()}


def _turn(call, turn_ms):
    times, total = [], 0.0
    while not times or total < turn_ms:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e3)
        total += times[-1]
    return tuple(times[1:] or times)


def speedup(dense: Timing, pruned: Timing) -> list[float]:
    """Returns how many times as fast `pruned` is, and the spread of that.

    Both come from one `side_by_side`, so their i-th turns belong together. The result
    is the median of the ratios turn by turn, and their 5th and 95th percentile.
    """
    return np.percentile(dense.by_turn / pruned.by_turn, SPREAD).tolist()


def speedup_error(dense: Timing, pruned: Timing) -> float:
    """Returns the standard error of `speedup`, as a fraction of it.

    That of a median is 1.25 times that of a mean. The deviation of a turn is taken from
    the quartiles, so a few turns in which the machine was busy hardly count.
    """
    low, middle, high = np.percentile(dense.by_turn / pruned.by_turn, (25, 50, 75))
    deviation = (high - low) / 1.349
    return float(1.2533 * deviation / middle / np.sqrt(len(dense.turns)))


def describe(device: jax.Device) -> str:
    """Names the device, such as `NVIDIA H200` or `cpu: AMD EPYC, 2 cores`."""
    if device.platform != "cpu":
        return device.device_kind
    # platform.processor() returns nothing on Linux.
    info = pathlib.Path("/proc/cpuinfo")
    found = info.exists() and re.search(r"model name\s*: (.+)", info.read_text())
    name = found[1] if found else platform.processor() or platform.machine()
    return f"cpu: {name}, {cores()} cores"


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def memory_suffices(batch_size: int, seq_length: int) -> Iterator[None]:
    """Turns a lack of memory into a UserError about these sizes."""
    try:
        yield
    # The errors of jax and of PyTorch are RuntimeErrors.
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        lack = re.search("RESOURCE_EXHAUSTED|out of memory|allocate", text)
        if not (lack or isinstance(error, MemoryError)):
            raise
        legal = f"too much for the memory, with sequences of {seq_length}"
        raise reject("batch_size", batch_size, legal) from error
