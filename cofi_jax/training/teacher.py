"""The teacher's outputs for each batch, and the cache that keeps them between epochs.

The teacher never changes, and its outputs for a row do not depend on the other rows of
the batch. Therefore cached outputs have the same bits as computed ones. The outputs do
depend on the padded length, so the cache keeps only batches whose rows are all in their
own bucket. A batch with a row that `epoch_plan` has moved to a longer bucket is
computed every time.
"""

import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from cofi_jax import distributed
from cofi_jax.config import Config, Distill
from cofi_jax.data import batches
from cofi_jax.errors import reject
from cofi_jax.models.bert import Batch, Encoder, abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.training.losses import taught_layers

TeacherOutputs = dict[str, jax.Array]


def make_teacher_forward(
    teacher: Encoder, distill: Distill
) -> Callable[[dict, Batch], TeacherOutputs]:
    """Returns the jitted `teacher_forward(params, batch)`.

    Its result holds the outputs that `distill` needs: `logits`, as in `bert.Output`,
    and `states` (B, T, K, D), the outputs of the K taught layers, or of all layers if
    the taught layers are drawn at random.
    """
    layers = len(teacher.config.heads)
    taught = taught_layers(layers, distill.num_layers)
    if distill.taught == "random":
        taught = range(layers)

    @jax.jit
    def teacher_forward(params, batch):
        output: Any = teacher.apply({"params": params}, batch)
        outputs = {}
        if distill.logits:
            outputs["logits"] = output.logits
        if distill.layers:
            states = [output.hidden_states[k + 1] for k in taught]
            outputs["states"] = jnp.stack(states, 2)
        return outputs

    return teacher_forward


class TeacherCache:
    """A teacher, and its outputs for the training rows so far."""

    def __init__(self, teacher: Encoder, params: dict, distill: Distill):
        """Starts with an empty cache.

        Args:
          teacher: the module.
          params: its parameters.
          distill: the settings of distillation, which say what outputs are needed, and
            by `cache` where they are kept: "none", "host" or "device".
        """
        self._teach = make_teacher_forward(teacher, distill)
        self._params, self._cache = distributed.replicate(params), distill.cache
        self._key: Any = None
        self._store: Any = None

    def of(
        self, examples: batches.Examples, buckets: Sequence[int], batch_size: int
    ) -> Callable[[np.ndarray, Batch], TeacherOutputs]:
        """Returns a function from (rows, batch) to the outputs, on the device.

        Stages with the same examples and batch size share the cached outputs. Other
        stages start with an empty cache, because the outputs in a batch of another
        shape may be rounded differently.

        Args:
          examples: the N rows that the batches are made of.
          buckets: the padded lengths in rising order.
          batch_size: the number B of rows of a batch.
        """
        if self._cache == "none":
            return lambda rows, batch: self._teach(self._params, batch)
        key = distributed.digest(examples.input_ids), len(examples), batch_size
        if key != self._key:
            layout = _Layout(self._teach, self._params, examples)
            # The memory of the previous stage is freed before the new arrays are made.
            self._key, self._store = key, None
            make_store = _DeviceStore if self._cache == "device" else _HostStore
            kept = np.zeros(len(examples), bool)
            self._store = layout, make_store(layout.shapes()), kept
        layout, store, kept = self._store
        own_bucket = np.asarray(buckets)[np.searchsorted(buckets, examples.lengths)]

        def teacher_outputs(rows, batch):
            fits = (own_bucket[rows] == batch["input_ids"].shape[1]).all()
            if fits and kept[rows].all():
                return store.read(layout.index(rows, batch))
            outputs = self._teach(self._params, batch)
            if fits:
                store.write(layout.index(rows, batch), outputs)
                kept[rows] = True
            return outputs

        return teacher_outputs


def check_teacher_cache(
    config: Config, sizes: EncoderConfig, train: batches.Examples
) -> None:
    """Checks that the outputs of the teacher fit into memory, and prints their size.

    Only the outputs of one stage are kept at a time, so the largest stage decides.

    Args:
      config: the configuration of the run.
      sizes: the sizes of the teacher.
      train: the training rows that the stages choose from.

    Raises:
      UserError: if less memory is free than that, or if the cache is on the device in a
        run of several processes.
    """
    distill = config.distill
    if distill.cache == "none" or not (distill.logits or distill.layers):
        return
    if distill.cache == "device" and jax.process_count() > 1:
        legal = "must be host or none where a run has several processes"
        raise reject("distill.cache", distill.cache, legal)
    teach = make_teacher_forward(Encoder(sizes), distill)
    params, needs = abstract_params(sizes), []
    for field in ("prune", "finetune"):
        count = getattr(config, field).train_rows
        rows = batches.first_rows(train, count, field=f"{field}.train_rows")
        arrays = _Layout(teach, params, rows).shapes().values()
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
        needs.append((size, len(rows), int(rows.lengths.sum())))
    (size, count, tokens), free = max(needs), _free_memory(distill.cache)
    if size > free:
        needed, free = f"{size / 1e9:.2f}", f"{free / 1e9:.2f}"
        legal = f"the teacher outputs need {needed} GB, {free} GB are free"
        raise reject("distill.cache", distill.cache, legal)
    print(
        f"distill.cache: {count:,} rows of {tokens:,} tokens take up to "
        f"{size / 1e9:.2f} GB of the {distill.cache}'s memory",
        file=sys.stderr,
        flush=True,
    )


def _free_memory(where):
    """Returns the number of free bytes, as far as the system knows it."""
    stats = jax.local_devices()[0].memory_stats()
    if where == "device" and stats:  # A CPU has none; its memory is the host's.
        return stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
    free = psutil.virtual_memory().available
    # The limit of a container is in the control groups of Linux, version 2 or 1.
    for group, limit, used, prefix in (
        ("memory", "max", "current", ""),
        ("memory/memory", "limit_in_bytes", "usage_in_bytes", "total_"),
    ):
        try:
            # The page cache counts as used, but the kernel frees it when it must.
            parts = dict(map(str.split, _group(f"{group}.stat").splitlines()))
            cache = (parts[f"{prefix}{kind}_file"] for kind in ("inactive", "active"))
            used = int(_group(f"{group}.{used}")) - sum(map(int, cache))
            free = min(free, int(_group(f"{group}.{limit}")) - used)
        except (OSError, ValueError, KeyError):
            continue  # There is no such group, or it has no limit.
    return free


def _group(name):
    return pathlib.Path("/sys/fs/cgroup", name).read_text()


class _Layout:
    """The layout of the arrays that hold the outputs of all N rows or all their tokens.

    The arrays for tokens have one more position than there are tokens. All padding is
    written to it and read from it. Padding has weight 0 in every loss, but it must be
    finite.
    """

    def __init__(self, teach, params, examples):
        self._lengths = examples.lengths
        self._starts = np.cumsum(self._lengths, dtype=np.int64) - self._lengths
        self._tokens = int(self._lengths.sum())
        length, row = int(self._lengths[0]), np.zeros(1, np.int32)
        batch = batches.make_batch(examples, row, length=length, batch_size=1)
        self._like = jax.eval_shape(teach, params, batch)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the arrays by the names of the outputs."""

        def of_all(x):
            if x.ndim > 2:
                return x.update(shape=(self._tokens + 1, *x.shape[2:]))
            return x.update(shape=(len(self._lengths), *x.shape[1:]))

        return {name: of_all(x) for name, x in self._like.items()}

    def index(self, rows: np.ndarray, batch: Batch) -> dict[str, np.ndarray]:
        """Returns where the outputs of a batch are in the arrays, (B,) or (B, T)."""
        size, length = batch["input_ids"].shape
        rows, column = batches.fill_up(rows, size), np.arange(length)
        tokens = self._starts[rows][:, None] + column
        tokens[column >= self._lengths[rows][:, None]] = self._tokens
        return {name: tokens if x.ndim > 2 else rows for name, x in self._like.items()}


class _HostStore:
    """A store of outputs in the memory of the host."""

    def __init__(self, shapes):
        self._arrays = {n: np.zeros(x.shape, x.dtype) for n, x in shapes.items()}
        self._pending = None

    def read(self, index):
        """Returns the outputs at `index`, on the device."""
        self._fetch_pending()
        return distributed.shard({n: x[index[n]] for n, x in self._arrays.items()})

    def write(self, index, outputs):
        """Keeps the outputs; the next call copies them, while the device is at work."""
        self._fetch_pending()
        self._pending = index, outputs

    def _fetch_pending(self):
        if self._pending:
            index, outputs = self._pending
            for name, values in distributed.fetch(outputs).items():
                self._arrays[name][index[name]] = values
            self._pending = None


class _DeviceStore:
    """A store of outputs in the memory of each device."""

    def __init__(self, shapes):
        self._arrays = distributed.replicate(
            {n: np.zeros(x.shape, x.dtype) for n, x in shapes.items()}
        )
        self._set = jax.jit(
            _set, donate_argnums=0, out_shardings=distributed.replicated()
        )

    def read(self, index):
        """Returns the outputs at `index`."""
        return distributed.shard(_get(self._arrays, distributed.replicate(index)))

    def write(self, index, outputs):
        """Keeps the outputs."""
        self._arrays = self._set(self._arrays, distributed.replicate(index), outputs)


@jax.jit
def _get(arrays, index):
    return {name: x[index[name]] for name, x in arrays.items()}


def _set(arrays, index, outputs):
    return {name: x.at[index[name]].set(outputs[name]) for name, x in arrays.items()}
