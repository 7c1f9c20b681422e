"""The resumable state of a stage, in numbered checkpoints of which two are kept.

A checkpoint appears under its name only once it is complete. Where a run has several
processes, each of them calls `Checkpoints`, as the storage library wants it, and each
loads by itself.
"""

import contextlib
import gc
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from cofi_jax import distributed
from cofi_jax.checkpoints import foreign
from cofi_jax.errors import UserError, warn

_KEEP = 2


class Checkpoints:
    """The states of one stage, copied off the device and written in the background.

    Attributes:
      skipped: one line for each checkpoint that could not be read.
    """

    def __init__(self, path: Path, made_from: int | None = None):
        """Opens a folder, which may not exist yet.

        Args:
          path: the folder.
          made_from: a digest of what the stage starts from. Checkpoints of a stage that
            started from something else are removed; None leaves them all.
        """
        self.skipped: list[str] = []
        self._path, self._made_from = Path(path).absolute(), made_from
        self.skipped += distributed.on_process_zero(self._sort_out)
        self._manager = ocp.training.Checkpointer(
            self._path,
            preservation_policy=ocp.training.preservation_policies.LatestN(_KEEP),
            cleanup_tmp_directories=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def _sort_out(self) -> list[str]:
        """Removes checkpoints of other starts and sets unreadable ones aside.

        The storage library would not open any where one of them is unreadable.

        Returns:
          A line for each unreadable one.
        """
        skipped, removed = [], 0
        found = self._path.iterdir() if self._path.is_dir() else ()
        for step in [path for path in found if path.name.isdigit()]:
            try:
                about = ocp.metadata(step).custom_metadata or {}
            except Exception as error:
                skipped.append(self._damaged(step.name, type(error).__name__))
                aside = self._path / f"damaged-{step.name}"
                shutil.rmtree(aside, ignore_errors=True)
                step.rename(aside)
                continue
            if about.get("made_from", self._made_from) != self._made_from is not None:
                shutil.rmtree(step)
                removed += 1
        if removed:
            warn(
                f"{self._path} held {removed} checkpoints of a stage that started from "
                "something else; they are removed"
            )
        return skipped

    def _damaged(self, step, reason):
        return f"{self._path}/{step} is damaged ({reason})"

    def save(self, state: Any) -> None:
        """Starts to write `state` under its `step`; waits for the write before."""
        # Checksums of our own: the storage format finds truncation, not every flip.
        digest = distributed.digest(_storable(state))
        self._manager.save_async(
            int(jax.device_get(state.step)),
            _storable(state),
            force=True,
            overwrite=True,  # a damaged one may stand there
            custom_metadata={"crc32": digest, "made_from": self._made_from},
        )

    def restore(self, like: Any) -> Any | None:
        """The newest state that can be read, or None; `like` gives tree and shapes.

        What could not be read is reported in `skipped`.
        """
        abstract = abstract_like(_storable(like), lambda x: x.sharding)
        steps = distributed.on_process_zero(
            lambda: [c.step for c in self._manager.checkpoints]
        )
        for step in sorted(steps, reverse=True):
            try:
                with distributed.raise_together():
                    stored = read(self._manager, step, abstract)
            except UserError as error:
                self.skipped.append(self._damaged(step, error))
            else:
                impl = jax.random.key_impl(like.key)
                key = jax.random.wrap_key_data(stored.key, impl=impl)
                return stored.replace(key=key)
        return None


def _storable(state):
    return state.replace(key=jax.random.key_data(state.key))


def abstract_like(tree: Any, sharding: Callable[[Any], jax.sharding.Sharding]) -> Any:
    """The shapes and dtypes of `tree`, with the sharding that each array is to have."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), tree
    )


def read(store: Any, where: Any, abstract: Any) -> Any:
    """What lies in the storage library's `store`, if it is as it was saved.

    Raises:
      UserError: that says what is wrong with it.
    """
    stored, digest, reason = None, None, ""
    try:
        with _quiet(), alone():
            stored = store.load(where, abstract)
            digest = store.metadata(where).custom_metadata["crc32"]
    # A damaged file can raise anything inside the storage library.
    except Exception as error:
        reason = foreign.reason(error)
    if reason:
        # Reads that nobody waits for warn when they are collected, which is only once
        # the error is gone: it refers to them.
        with warnings.catch_warnings(action="ignore"):
            gc.collect()
        raise UserError(reason)
    if distributed.digest(stored) != digest:
        raise UserError("checksum mismatch")
    return stored


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block in which the storage library does not say what is wrong with a file.

    After its first failure it reads on in the background, and what it finds there would
    be hundreds of lines, some of them after the block. So two filters stay.
    """
    logging.getLogger("asyncio").addFilter(_is_not_of_storage)
    if not isinstance(sys.unraisablehook, _WithoutLateReads):
        sys.unraisablehook = _WithoutLateReads(sys.unraisablehook)
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_not_of_storage(record: logging.LogRecord) -> bool:
    """Whether a record of asyncio is of others than reads that nobody waits for."""
    return "exception was never retrieved" not in record.getMessage()


class _WithoutLateReads:
    """An unraisable hook that ignores reads which end when their loop is closed."""

    def __init__(self, before: Callable[[Any], Any]):
        self._before = before

    def __call__(self, raised: Any) -> None:
        late = isinstance(raised.exc_value, RuntimeError)
        if not (late and str(raised.exc_value) == "Event loop is closed"):
            self._before(raised)


def alone() -> contextlib.AbstractContextManager:
    """A block in which each process loads by itself.

    No process then waits for another one whose file is damaged.
    """
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    options, me = ocp.Context(), jax.process_index()
    options.multiprocessing.primary_host = me
    options.multiprocessing.active_processes = {me}
    options.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
    return options
