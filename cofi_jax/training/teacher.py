"""The teacher's outputs for each batch, and a cache that keeps them between epochs.

    batch["teacher_outputs"] = forward(teacher's params, batch)

The teacher never changes, and its outputs for a row do not depend on the other rows of
the batch, so kept outputs have the same bits as recomputed ones. They do depend on the
padded length. So only batches are kept whose rows are all padded to the bucket of their
own length; a batch with a row that `batches.epoch_plan` moved up is computed again.
"""

import math
import pathlib
from collections.abc import Callable, Sequence

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
    """Returns the jitted `forward(params, batch)` with the outputs that are imitated.

    The outputs are `logits`, as the model's, and `states` (B, T, K, D), those of the
    taught layers, or of all layers if the taught ones are drawn at random. A term of
    weight 0 is left out.
    """
    layers = len(teacher.config.heads)
    taught = taught_layers(layers, distill.num_layers)
    if distill.taught == "random":
        taught = range(layers)

    @jax.jit
    def forward(params, batch):
        output, found = teacher.apply({"params": params}, batch), {}
        if distill.logits:
            found["logits"] = output.logits
        if distill.layers:
            found["states"] = jnp.stack(
                [output.hidden_states[k + 1] for k in taught], 2
            )
        return found

    return forward


class TeacherCache:
    """A teacher that gives its outputs for batches of the training rows.

    Args:
      teacher: the module.
      params: its parameters.
      distill: the terms that are imitated; `cache` says where outputs are kept: none,
        host or device.
    """

    def __init__(self, teacher: Encoder, params: dict, distill: Distill):
        self._forward = make_teacher_forward(teacher, distill)
        self._params, self._cache = distributed.replicate(params), distill.cache
        self._key, self._rows = None, None

    def of(
        self, examples: batches.Examples, buckets: Sequence[int], batch_size: int
    ) -> Callable[[np.ndarray, Batch], TeacherOutputs]:
        """Returns `(rows, batch) -> outputs` for batches of `examples`, on the device.

        Stages with the same rows and batch size share what is kept, because sums of
        other shapes may be rounded differently. With other rows or another size, the
        outputs that were kept are forgotten.
        """
        if self._cache == "none":
            return lambda rows, batch: self._forward(self._params, batch)
        key = distributed.digest(examples.input_ids), len(examples), batch_size
        if key != self._key:
            like = _output_of_a_row(self._forward, self._params, examples)
            self._key, self._rows = key, None  # The old arrays go before new ones come.
            self._rows = _Rows(like, examples, buckets, self._cache)
        kept = self._rows

        def outputs(rows, batch):
            found = kept.read(rows, batch)
            if found is None:
                found = self._forward(self._params, batch)
                kept.write(rows, batch, found)
            return found

        return outputs


class _Rows:
    """The outputs of rows, or of their real tokens, in a store on host or device."""

    def __init__(self, like, examples, buckets, cache):
        lengths = examples.lengths
        self._lengths = lengths
        self._starts = np.cumsum(lengths, dtype=np.int64) - lengths
        self._own = np.asarray(buckets)[np.searchsorted(buckets, lengths)]
        self._kept = np.zeros(len(lengths), bool)
        self._of_tokens = {name: x.ndim > 2 for name, x in like.items()}
        shapes = _shapes(like, examples)
        arrays = {n: np.zeros(shapes[n], x.dtype) for n, x in like.items()}
        self._store = (_DeviceStore if cache == "device" else _HostStore)(arrays)

    def read(self, rows, batch):
        """Returns the outputs, or None where those of a row are not kept."""
        if not self._kept[rows].all() or not self._in_own_bucket(rows, batch):
            return None
        return self._store.read(self._index(rows, batch))

    def write(self, rows, batch, outputs):
        """Keeps the outputs, if all of the rows are in their own bucket."""
        if self._in_own_bucket(rows, batch):
            self._store.write(self._index(rows, batch), outputs)
            self._kept[rows] = True

    def _in_own_bucket(self, rows, batch):
        return (self._own[rows] == batch["input_ids"].shape[1]).all()

    def _index(self, rows, batch):
        """Returns the places of each output: (B,) for rows, (B, T) for tokens."""
        size, length = batch["input_ids"].shape
        rows = batches.fill_up(rows, size)
        column = np.arange(length)
        tokens = self._starts[rows][:, None] + column
        tokens[column >= self._lengths[rows][:, None]] = self._lengths.sum()
        of_tokens = self._of_tokens.items()
        return {name: tokens if is_token else rows for name, is_token in of_tokens}


class _HostStore:
    """NumPy arrays. A write waits until the next call, while the device is at work."""

    def __init__(self, arrays):
        self._arrays, self._pending = arrays, None

    def read(self, index):
        self._finish_write()
        found = {name: x[index[name]] for name, x in self._arrays.items()}
        return distributed.shard(found)

    def write(self, index, outputs):
        self._finish_write()
        self._pending = index, outputs

    def _finish_write(self):
        if self._pending:
            index, outputs = self._pending
            for name, values in distributed.fetch(outputs).items():
                self._arrays[name][index[name]] = values
            self._pending = None


class _DeviceStore:
    """Arrays on the device, a copy on each; a write takes their place."""

    def __init__(self, arrays):
        self._arrays = distributed.replicate(arrays)
        placement = distributed.replicated()
        self._set = jax.jit(_set, donate_argnums=0, out_shardings=placement)

    def read(self, index):
        return distributed.shard(_get(self._arrays, distributed.replicate(index)))

    def write(self, index, outputs):
        self._arrays = self._set(self._arrays, distributed.replicate(index), outputs)


@jax.jit
def _get(arrays, index):
    return {name: x[index[name]] for name, x in arrays.items()}


def _set(arrays, index, outputs):
    return {name: x.at[index[name]].set(outputs[name]) for name, x in arrays.items()}


def check_teacher_cache(
    config: Config, sizes: EncoderConfig, train: batches.Examples
) -> None:
    """Prints the memory that the cache needs for the rows of the largest stage.

    Args:
      config: the run's config.
      sizes: those of the teacher.
      train: the training rows.

    Raises:
      UserError: where less memory is free.
    """
    stages = {}
    for field in ("prune", "finetune"):
        stage = getattr(config, field)
        rows = batches.first_rows(train, stage.train_rows, field=f"{field}.train_rows")
        stages[len(rows), stage.batch_size] = rows
    check_memory(sizes, config.distill, list(stages.values()))


def check_memory(
    teacher: EncoderConfig, distill: Distill, examples: Sequence[batches.Examples]
) -> None:
    """Prints the memory for the outputs of all rows of `examples`, if they are kept.

    Args:
      teacher: its sizes.
      distill: the terms, and `cache`.
      examples: the rows of each stage; the outputs of one stage are kept at a time.

    Raises:
      UserError: where less memory is free.
    """
    if distill.cache == "none" or not (distill.logits or distill.layers):
        return
    forward = make_teacher_forward(Encoder(teacher), distill)
    params = abstract_params(teacher)

    def size_of(rows):
        like = _output_of_a_row(forward, params, rows)
        shapes = _shapes(like, rows).items()
        return sum(math.prod(shape) * like[n].dtype.itemsize for n, shape in shapes)

    most = max(examples, key=size_of)
    size, count, tokens = size_of(most), len(most), int(most.lengths.sum())
    if distill.cache == "device" and jax.process_count() > 1:
        legal = "must be host or none where a run has several processes"
        raise reject("distill.cache", distill.cache, legal)
    free = _free_memory(distill.cache)
    if size > free:
        legal = f"the teacher's outputs need {size / 1e9:.2f} GB, "
        raise reject(
            "distill.cache", distill.cache, f"{legal}{free / 1e9:.2f} are free"
        )
    print(
        f"teacher's outputs: {count:,} rows of {tokens:,} tokens take up to "
        f"{size / 1e9:.2f} GB of the {distill.cache}'s memory",
        flush=True,
    )


def _free_memory(where):
    """Returns the bytes that can still be had, as far as the system knows."""
    stats = jax.local_devices()[0].memory_stats()
    if where == "device" and stats:  # A CPU has none: its memory is the host's.
        return stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
    free, group = psutil.virtual_memory().available, pathlib.Path("/sys/fs/cgroup")
    for limit, used, stat, prefix in (  # the two versions of control groups
        ("memory.max", "memory.current", "memory.stat", ""),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_",
        ),
    ):
        try:
            most = int((group / limit).read_text())
            taken = int((group / used).read_text())
            lines = (group / stat).read_text().split("\n")
            pages = dict(line.split() for line in lines if line)
        except (OSError, ValueError):  # There is no such file, or no limit.
            continue
        # The kernel gives up pages of files, its cache, before it refuses memory.
        cache = sum(
            int(pages.get(f"{prefix}{k}_file", 0)) for k in ("active", "inactive")
        )
        free = min(free, most - taken + cache)
    return free


def _output_of_a_row(forward, params, examples):
    """Returns the shapes and dtypes of the outputs for one row."""
    length, rows = int(examples.lengths[0]), np.zeros(1, np.int32)
    batch = batches.make_batch(examples, rows, length=length, batch_size=1)
    return jax.eval_shape(forward, params, batch)


def _shapes(like, examples):
    """Returns the shapes of arrays for the outputs of all rows or of all tokens."""
    tokens, rows = int(examples.lengths.sum()), len(examples)
    # There is one more place than there are tokens: padding is written to it and read
    # from it. Padding has weight 0 in every loss, but it must be finite.
    return {
        name: (tokens + 1, *x.shape[2:]) if x.ndim > 2 else (rows, *x.shape[1:])
        for name, x in like.items()
    }
