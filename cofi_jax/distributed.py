"""Many devices, one program: every process runs all of it, the first one writes.

    batch         rows dealt out to the devices of all processes
    all the rest  a copy on every device

XLA sees the whole batch and adds up the gradients across devices by itself. What is
decided by looking at a disk is decided by the first process and told to the others,
because processes that took different branches would wait for each other forever.

On one device, and with one process, everything here does nothing.
"""

import contextlib
import functools
import json
import logging
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cofi_jax.errors import UserError, reject

_NEEDED = (
    "needs SLURM, MPI or a cloud's environment, or JAX_COORDINATOR_ADDRESS=host:port, "
    "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
)


def start() -> None:
    """Joins the processes of a run; returns when all are there.

    Raises:
      UserError: where the environment does not say who they are.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    host, _, port = (address or ":").rpartition(":")
    if address is not None and not (host and port.isdecimal()):
        raise reject("JAX_COORDINATOR_ADDRESS", address, "must be host:port")
    # jax reads the address itself, and these two only from a cluster's variables.
    count, index = map(_number, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    # With it a SIGTERM would be noted for later, and the run would not end.
    jax.config.update("jax_enable_preemption_service", False)
    print("waiting for all processes to start", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except (ValueError, TypeError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise reject("--distributed", True, f"{_NEEDED}: {said}") from error


def _number(name):
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise reject(name, text, "must be a whole number")
    return text and int(text)


@functools.cache
def _sharding(*spec) -> NamedSharding:
    shape = (jax.device_count(),)
    mesh = jax.make_mesh(shape, ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated() -> NamedSharding | None:
    """Where `replicate` puts arrays; None with one device."""
    return _sharding() if jax.device_count() > 1 else None


def shard(batch: Any) -> Any:
    """The arrays on the devices, each of which has some rows (of the first axis)."""
    if jax.device_count() == 1:
        return jax.device_put(batch)
    sharding = _sharding("data")
    if not _several():
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), batch
    )


def replicate(tree: Any) -> Any:
    """The arrays with a copy on every device of every process.

    Raises:
      RuntimeError: where processes hold different values.
    """
    if jax.device_count() == 1:
        return jax.device_put(tree)
    sharding = _sharding()
    if not _several():
        return jax.device_put(tree, sharding)
    there = [x for x in jax.tree.leaves(tree) if not _is_global(x)]
    if there and not _same(digest(there)):
        raise RuntimeError("processes disagree: are their machines of one kind?")

    def to_every_device(x):
        if _is_global(x):
            return x
        every = [jax.device_put(x, device) for device in jax.local_devices()]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, every)

    return jax.tree.map(to_every_device, tree)


def _is_global(x):
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def local(tree: Any) -> Any:
    """What `replicate` spread, as arrays of one device of this process again."""
    if jax.device_count() == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def fetch(arrays: Any) -> Any:
    """NumPy arrays, whole in every process, of any that `shard` led to."""
    if _several():
        arrays = jax.tree.map(lambda x: _gather()(x) if _is_global(x) else x, arrays)
    return jax.device_get(arrays)


@functools.cache
def _gather():
    return jax.jit(lambda x: x, out_shardings=_sharding())


def is_first() -> bool:
    """Whether this is the process that writes."""
    return not _several() or jax.process_index() == 0


def _several():
    return jax.distributed.is_initialized() and jax.process_count() > 1


def on_process_zero(function: Callable[[], Any]) -> Any:
    """Calls `function` in the first process only; all return what it returned.

    The others wait, so what it has written is there for them. The result is
    JSON-able; a UserError is raised in all.
    """
    if not _several():
        return function()
    outcome = {}
    if is_first():
        try:
            outcome["value"] = function()
        except UserError as error:
            outcome["error"] = str(error)
    outcome = json.loads(_exchange(json.dumps(outcome))[0])
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """Within it each process works for itself; a UserError of one is one of all."""
    error = None
    try:
        yield
    except UserError as found:
        error = found
    if _several():
        for said in filter(None, _exchange(str(error or ""))):
            raise UserError(said) from error
    if error:
        raise error


def check_same(what: str, find: Callable[[], Any]) -> None:
    """Raises UserError unless `find` finds the same, in words, in all processes."""
    if _several() and not _same(find()):
        raise UserError(f"--distributed=True: {what} must be the same in all processes")


def _same(value):
    return len(set(_exchange(str(value)))) == 1


def _exchange(text: str) -> list[str]:
    """What each process said, in all processes."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(-(-sizes.max() // 1024) * 1024 or 1, np.uint8)
    padded[: data.size] = data
    every = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(every, sizes, strict=True)]


def digest(tree: Any) -> int:
    """The CRC-32 of all arrays, one after the other."""
    found = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found = zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).data, found)
    return found


class NullLog:
    """The `report.MetricsLog` of processes that do not write."""

    def rewind(self, stage: str, step: int) -> float:
        """Nothing has been logged."""
        del stage, step
        return 0.0

    def write(self, **values: Any) -> None:
        """Forgets the line."""


@contextlib.contextmanager
def only_process_zero_prints() -> Iterator[None]:
    """Within it only the first process prints, and a crash of one ends all.

    Left to itself, a process that fails would wait at its end for the others, who
    wait for it.
    """
    if not _several():
        yield
        return
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
                # Handlers made before have kept the stream that they write to.
                stack.callback(logging.disable, logging.root.manager.disable)
                logging.disable(logging.WARNING)
            yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
