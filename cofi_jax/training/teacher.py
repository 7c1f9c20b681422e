"""The teacher's outputs for each batch, and the cache that keeps them between epochs.

    batch["teacher_outputs"] = teacher_forward(teacher's params, batch)

The teacher never changes, and its outputs for a row do not depend on the other rows of
the batch: outputs that were kept have the same bits as outputs that are computed again.
They do depend on the padded length. So only batches whose rows are all in their own
bucket are kept; a batch with a row that `epoch_plan` moved up is computed each time.
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
    """Makes the jitted `teacher_forward(params, batch)`.

    Its result holds what `distill` needs: `logits`, which are those of the model, and
    `states` (B, T, K, D), the outputs of the taught layers, or of all layers where the
    taught ones are drawn at random.
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
    """A teacher and what it has said about the training rows.

    Args:
      teacher: the module.
      params: its parameters.
      distill: the outputs that are needed; `cache` says where they are kept: "none",
        "host" or "device".
    """

    def __init__(self, teacher: Encoder, params: dict, distill: Distill):
        self._teach = make_teacher_forward(teacher, distill)
        self._params, self._cache = distributed.replicate(params), distill.cache
        self._key: Any = None
        self._store: Any = None

    def of(
        self, examples: batches.Examples, buckets: Sequence[int], batch_size: int
    ) -> Callable[[np.ndarray, Batch], TeacherOutputs]:
        """`(rows, batch) -> teacher_outputs` for batches of `examples`, on the device.

        Stages of the same rows and the same batch size share what is kept (a batch of
        another shape may be rounded otherwise); for others, it is forgotten.
        """
        if self._cache == "none":
            return lambda rows, batch: self._teach(self._params, batch)
        key = distributed.digest(examples.input_ids), len(examples), batch_size
        if key != self._key:
            places = _Places(self._teach, self._params, examples)
            # The memory of the stage before is freed first.
            self._key, self._store = key, None
            make_store = _DeviceStore if self._cache == "device" else _HostStore
            kept = np.zeros(len(examples), bool)
            self._store = places, make_store(places.shapes()), kept
        places, store, kept = self._store
        own_bucket = np.asarray(buckets)[np.searchsorted(buckets, examples.lengths)]

        def teacher_outputs(rows, batch):
            fits = (own_bucket[rows] == batch["input_ids"].shape[1]).all()
            if fits and kept[rows].all():
                return store.read(places.of(rows, batch))
            outputs = self._teach(self._params, batch)
            if fits:
                store.write(places.of(rows, batch), outputs)
                kept[rows] = True
            return outputs

        return teacher_outputs


def check_teacher_cache(
    config: Config, sizes: EncoderConfig, train: batches.Examples
) -> None:
    """Checks that the teacher's outputs fit into memory, and prints their size.

    Those of one stage are kept at a time, so the stage that needs the most decides.

    Args:
      config: the run's.
      sizes: those of the teacher.
      train: the training rows that the stages choose from.

    Raises:
      UserError: where less memory is free.
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
        arrays = _Places(teach, params, rows).shapes().values()
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
    """Bytes that can still be had, as far as the system says."""
    stats = jax.local_devices()[0].memory_stats()
    if where == "device" and stats:  # a CPU has none: its memory is the host's
        return stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
    free = psutil.virtual_memory().available
    # A container may have less, as version 2 or 1 of Linux's control groups says.
    for group, limit, used, prefix in (
        ("memory", "max", "current", ""),
        ("memory/memory", "limit_in_bytes", "usage_in_bytes", "total_"),
    ):
        try:
            # The kernel counts the page cache as used, but gives it up when it must.
            parts = dict(map(str.split, _group(f"{group}.stat").splitlines()))
            cache = (parts[f"{prefix}{kind}_file"] for kind in ("inactive", "active"))
            used = int(_group(f"{group}.{used}")) - sum(map(int, cache))
            free = min(free, int(_group(f"{group}.{limit}")) - used)
        except (OSError, ValueError, KeyError):  # no such group, or no limit
            continue
    return free


def _group(name):
    return pathlib.Path("/sys/fs/cgroup", name).read_text()


class _Places:
    """Where outputs stand in arrays of all N rows or, if of tokens, of all tokens.

    There is one place more than there are tokens: padding is written to and read from
    it. It has weight 0 in every loss, but must be finite.
    """

    def __init__(self, teach, params, examples):
        self._lengths = examples.lengths
        self._starts = np.cumsum(self._lengths, dtype=np.int64) - self._lengths
        self._tokens = int(self._lengths.sum())
        length, row = int(self._lengths[0]), np.zeros(1, np.int32)
        batch = batches.make_batch(examples, row, length=length, batch_size=1)
        self._like = jax.eval_shape(teach, params, batch)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays that hold all outputs, by name."""

        def of_all(x):
            if x.ndim > 2:
                return x.update(shape=(self._tokens + 1, *x.shape[2:]))
            return x.update(shape=(len(self._lengths), *x.shape[1:]))

        return {name: of_all(x) for name, x in self._like.items()}

    def of(self, rows: np.ndarray, batch: Batch) -> dict[str, np.ndarray]:
        """The index of a batch's outputs in these arrays, (B,) or (B, T)."""
        size, length = batch["input_ids"].shape
        rows, column = batches.fill_up(rows, size), np.arange(length)
        tokens = self._starts[rows][:, None] + column
        tokens[column >= self._lengths[rows][:, None]] = self._tokens
        return {name: tokens if x.ndim > 2 else rows for name, x in self._like.items()}


class _HostStore:
    """Outputs in the host's memory."""

    def __init__(self, shapes):
        self._arrays = {n: np.zeros(x.shape, x.dtype) for n, x in shapes.items()}
        self._pending = None

    def read(self, index):
        """The outputs at `index`, on the device."""
        self._fetch_pending()
        return distributed.shard({n: x[index[n]] for n, x in self._arrays.items()})

    def write(self, index, outputs):
        """Keeps the outputs; they are waited for when the device works on the step."""
        self._fetch_pending()
        self._pending = index, outputs

    def _fetch_pending(self):
        if self._pending:
            index, outputs = self._pending
            for name, values in distributed.fetch(outputs).items():
                self._arrays[name][index[name]] = values
            self._pending = None


class _DeviceStore:
    """Outputs in the memory of every device."""

    def __init__(self, shapes):
        self._arrays = distributed.replicate(
            {n: np.zeros(x.shape, x.dtype) for n, x in shapes.items()}
        )
        self._set = jax.jit(
            _set, donate_argnums=0, out_shardings=distributed.replicated()
        )

    def read(self, index):
        """The outputs at `index`."""
        return distributed.shard(_get(self._arrays, distributed.replicate(index)))

    def write(self, index, outputs):
        """Keeps the outputs."""
        self._arrays = self._set(self._arrays, distributed.replicate(index), outputs)


@jax.jit
def _get(arrays, index):
    return {name: x[index[name]] for name, x in arrays.items()}


def _set(arrays, index, outputs):
    return {name: x.at[index[name]].set(outputs[name]) for name, x in arrays.items()}
