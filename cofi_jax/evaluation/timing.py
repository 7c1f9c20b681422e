"""How time is taken: always things side by side, in turn, in one run.

A machine speeds up and slows down over minutes. Here turns alternate, A B A B, so the
i-th turns of A and B were taken under the same conditions:

    speedup = median over i of A_i / B_i,    spread = their 5th and 95th percentile

A turn is a short burst of calls, A_i the median of their times. Of single calls in
alternation a small model would always find the caches full of the large one.
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


@dataclasses.dataclass(frozen=True)
class Timing:
    """What the calls took, in milliseconds: a tuple for each turn, in their order."""

    turns: tuple[tuple[float, ...], ...]

    @property
    def by_turn(self) -> np.ndarray:
        """(repeats,) the median of each turn."""
        return np.array([np.median(times) for times in self.turns])

    @property
    def median_ms(self) -> float:
        """Half of the calls were faster; every turn weighs the same."""
        return self.percentile_ms(50)

    def percentile_ms(self, percent: float) -> float:
        """`percent` of the calls were faster; every turn weighs the same."""
        # Else slow moments, of few calls, would hardly count.
        weights = np.concatenate([[1 / len(turn)] * len(turn) for turn in self.turns])
        calls = {"weights": weights, "method": "inverted_cdf"}
        return float(np.percentile(np.concatenate(self.turns), percent, **calls))

    @property
    def repeats(self) -> int:
        """How many turns there were."""
        return len(self.turns)


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
      calls: name to function of no arguments; any pytree of arrays comes back.
      repeats: turns of each.
      warmup: untimed calls of each beforehand; the first one compiles.
      turn_ms: a turn ends after this time; it has one call at least. The first call,
        which fills the caches anew, counts only where no other follows.
      rest_ms: before each turn, for other runtimes' threads to stop waiting for work.
    """
    for call in calls.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    turns = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()  # it would strike one call or another
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


def speedup(dense: Timing, pruned: Timing) -> tuple[float, tuple[float, float]]:
    """How many times as fast `pruned` is, and the spread of that.

    Both come from one `side_by_side`, so their i-th turns belong together.

    Returns:
      The median of the ratios turn by turn; their 5th and 95th percentile.
    """
    low, middle, high = np.percentile(dense.by_turn / pruned.by_turn, (5, 50, 95))
    return float(middle), (float(low), float(high))


def describe(device: jax.Device) -> str:
    """The device in words, such as `NVIDIA H200` or `cpu: AMD EPYC, 2 cores`."""
    if device.platform != "cpu":
        return device.device_kind
    info = pathlib.Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    found = info.exists() and re.search(r"model name\s*: (.+)", info.read_text())
    name = found[1] if found else platform.processor() or platform.machine()
    return f"cpu: {name}, {cores()} cores"


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def memory_suffices(batch_size: int, seq_length: int) -> Iterator[None]:
    """Turns a lack of memory into a UserError about these sizes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # jax's is one, PyTorch's too
        text = str(error)
        lack = re.search("RESOURCE_EXHAUSTED|out of memory|allocate", text)
        if not (lack or isinstance(error, MemoryError)):
            raise
        legal = f"too much for the memory, with sequences of {seq_length}"
        raise reject("batch_size", batch_size, legal) from error
