"""Data parallelism: every process runs the whole program, and the first one writes.

    batch            its rows are divided among the devices of all processes
    everything else  a copy on every device

XLA sees the whole batch and adds up the gradients across devices by itself. Where the
program looks at a disk, the first process decides and tells the others: processes that
took different branches would wait for each other forever.

With one device and one process, nothing here does anything.
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
    """Joins the processes of a run, and returns when all have started.

    Raises:
      UserError: where the environment does not describe the processes.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    host, _, port = (address or ":").rpartition(":")
    if address is not None and not (host and port.isdecimal()):
        raise reject("JAX_COORDINATOR_ADDRESS", address, "must be host:port")
    # jax itself reads the address, but these two only from a cluster's variables.
    count, index = map(_number, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    # The service would only take note of a SIGTERM, and the run would not end.
    jax.config.update("jax_enable_preemption_service", False)
    print("waiting for all processes to start", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except (ValueError, TypeError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise reject("--distributed", True, f"{_NEEDED}: {said}") from error


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise reject(name, text, "must be a whole number")
    return None if text is None else int(text)


@functools.cache
def _sharding(*spec) -> NamedSharding | None:
    if jax.device_count() == 1:
        return None
    shape = (jax.device_count(),)
    mesh = jax.make_mesh(shape, ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated() -> NamedSharding | None:
    """The sharding of what `replicate` returns; None with one device."""
    return _sharding()


def shard(batch: Any) -> Any:
    """Puts arrays on the devices, each of which gets some rows of the first axis."""
    sharding = _sharding("data")
    if not _several():
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), batch
    )


def replicate(tree: Any) -> Any:
    """Puts a copy of the arrays on every device of every process.

    Raises:
      RuntimeError: where the processes hold different values.
    """
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
    """The arrays that `replicate` returned, on one device of this process again."""
    if jax.device_count() == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def fetch(arrays: Any) -> Any:
    """The arrays as NumPy's, whole in every process, however they were sharded."""

    def whole(x):
        return multihost_utils.process_allgather(x, tiled=True) if _is_global(x) else x

    return jax.device_get(jax.tree.map(whole, arrays))


def is_first() -> bool:
    """Returns whether this is the process that writes."""
    return not _several() or jax.process_index() == 0


def _several():
    return jax.distributed.is_initialized() and jax.process_count() > 1


def on_process_zero(function: Callable[[], Any]) -> Any:
    """Calls `function` in the first process only; all processes return its result.

    The others wait, so that what it writes is there for them. The result can be
    written as JSON; a UserError is raised in all processes.
    """
    value = None
    with raise_together():
        if is_first():
            value = function()
    return json.loads(_broadcast(json.dumps(value), 0)) if _several() else value


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """A block in which a UserError of one process is raised in all of them."""
    error = None
    try:
        yield
    except UserError as found:
        error = found
    if _several():
        failed = multihost_utils.process_allgather(np.bool(error is not None))
        if failed.any():
            raise UserError(_broadcast(str(error), int(failed.argmax()))) from error
    elif error:
        raise error


def check_same(what: str, find: Callable[[], Any]) -> None:
    """Raises a UserError unless `find` returns the same, as text, in all processes."""
    if _several() and not _same(zlib.crc32(str(find()).encode())):
        raise UserError(f"--distributed=True: {what} must be the same in all processes")


def _same(number):
    return len(set(multihost_utils.process_allgather(np.uint32(number)).tolist())) == 1


def _broadcast(text, source):
    """The text of the process `source`, in all processes."""
    is_source = jax.process_index() == source
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size), is_source))
    # Each size is compiled for, so there are few of them; the rest is filled up.
    filled = np.resize(data, -(-size // 1024) * 1024)
    filled = multihost_utils.broadcast_one_to_all(filled, is_source)
    return filled[:size].tobytes().decode()


def digest(tree: Any) -> int:
    """The CRC-32 of all arrays of the tree, one after the other."""
    found = 0
    for leaf in jax.tree.leaves(tree):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found = zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).data, found)
    return found


class NullLog:
    """The `log.MetricsLog` of the processes that do not write."""

    def rewind(self, stage: str, step: int) -> float:
        """Returns 0 seconds, because nothing has been logged."""
        del stage, step
        return 0.0

    def write(self, **values: Any) -> None:
        """Ignores the line."""


@contextlib.contextmanager
def only_process_zero_prints() -> Iterator[None]:
    """A block in which only the first process prints, and the crash of one ends all.

    A process that fails would otherwise wait at its end for the others, which wait for
    it.
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
                # Handlers that exist already write to the stream they began with.
                stack.callback(logging.disable, logging.root.manager.disable)
                logging.disable(logging.WARNING)
            yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
