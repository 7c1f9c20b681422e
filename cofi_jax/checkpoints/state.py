"""What goes to disk and comes back; the only file that imports orbax.

Two things are stored: a stage's resumable state, in numbered checkpoints of which
the newest two are kept, and saved models,

    <path>/README.md     the model card
    <path>/model.json    sizes, what was kept of the dense model, task and labels
    <path>/params/       orbax
    <path>/tokenizer/    Hugging Face

Both appear under their names only once they are complete. Where a run has several
processes, each of them calls `Checkpoints` and `save_model`, as the storage library
wants it; each loads by itself.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from cofi_jax import distributed
from cofi_jax.errors import UserError

_KEEP = 2


class Checkpoints:
    """The states of one stage, copied off the device and written in the background.

    Attributes:
      skipped: one line for each checkpoint that could not be read.
    """

    def __init__(self, path: Path):
        self.skipped: list[str] = []
        self._path = Path(path).absolute()
        self.skipped += distributed.on_process_zero(self._set_unreadable_aside)
        self._manager = ocp.training.Checkpointer(
            self._path,
            preservation_policy=ocp.training.preservation_policies.LatestN(_KEEP),
            cleanup_tmp_directories=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def _set_unreadable_aside(self):
        """Renames what would keep the storage library from opening the others.

        Returns:
          A line for each of them.
        """
        skipped = []
        steps = self._path.iterdir() if self._path.is_dir() else ()
        for found in [path for path in steps if path.name.isdigit()]:
            try:
                ocp.metadata(found)
            except Exception as error:
                skipped.append(self._damaged(found.name, type(error).__name__))
                aside = self._path / f"damaged-{found.name}"
                shutil.rmtree(aside, ignore_errors=True)
                found.rename(aside)
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
            custom_metadata={"crc32": digest},
        )

    def restore(self, like: Any) -> Any | None:
        """The newest state that can be read, or None; `like` gives tree and shapes.

        What could not be read is reported in `skipped`.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            _storable(like),
        )
        steps = distributed.on_process_zero(
            lambda: [c.step for c in self._manager.checkpoints]
        )
        for step in sorted(steps, reverse=True):
            try:
                with distributed.raise_together(), _alone():
                    stored = self._load(step, abstract)
                return _restored(stored, like)
            except UserError as error:
                self.skipped.append(self._damaged(step, error))
        return None

    def _load(self, step, abstract):
        try:
            stored = self._manager.load(step, abstract)
            digest = self._manager.metadata(step).custom_metadata["crc32"]
        # Whatever a damaged file makes of itself inside the storage library.
        except Exception as error:
            raise UserError(type(error).__name__) from error
        if distributed.digest(stored) != digest:
            raise UserError("checksum mismatch")
        return stored


def _storable(state):
    return state.replace(key=jax.random.key_data(state.key))


def _restored(stored, like):
    key = jax.random.wrap_key_data(stored.key, impl=jax.random.key_impl(like.key))
    return stored.replace(key=key)


def _alone():
    """Within it a process loads by itself: none waits for one whose file is damaged."""
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    options, me = ocp.Context(), jax.process_index()
    options.multiprocessing.primary_host = me
    options.multiprocessing.active_processes = {me}
    options.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
    return options
