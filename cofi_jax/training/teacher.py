"""What the teacher says of each batch, and how it is kept from one epoch to the next.

    teacher_outputs = teach(teacher's params, batch)
    batch["teacher_outputs"] = teacher_outputs

The teacher never changes, and its outputs for a row do not depend on the other rows of
the batch, so kept outputs have the same bits as recomputed ones. They do depend on the
padded length, so only batches whose rows are all in their own bucket are
kept; one with a row that `epoch_plan` moved up is computed again.
"""

import math
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax import distributed
from cofi_jax.config import Config, Distill
from cofi_jax.data import batches
from cofi_jax.errors import reject
from cofi_jax.models.bert import Batch, Encoder, abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.training.losses import taught_layers

_CGROUP = ("max", "current")


TeacherOutputs = dict[str, jax.Array]


def make_teacher_forward(
    teacher: Encoder, distill: Distill
) -> Callable[[dict, Batch], TeacherOutputs]:
    """Returns the jitted `teach(params, batch) -> teacher_outputs` that `distill` needs.

    Returns:
      A function to a dict with `logits`, as the model's, and `states` (B, T, K, D),
      the outputs of the taught layers; of all layers where they are drawn at random.
    """
    layers = len(teacher.config.heads)
    taught = taught_layers(layers, distill.num_layers)
    if distill.taught == "random":
        taught = range(layers)

    @jax.jit
    def teach(params, batch):
        output = teacher.apply({"params": params}, batch)
        teacher_outputs = {}
        if distill.logits:
            teacher_outputs["logits"] = output.logits
        if distill.layers:
            states = [output.hidden_states[k + 1] for k in taught]
            teacher_outputs["states"] = jnp.stack(states, 2)
        return teacher_outputs

    return teach


class TeacherCache:
    """A teacher that is asked about batches of the training rows.

    Args:
      teacher: the module.
      params: its parameters.
      distill: what is asked; `cache` says where answers are kept: none, host, device.
    """

    def __init__(self, teacher: Encoder, params: dict, distill: Distill):
        self._teach = make_teacher_forward(teacher, distill)
        self._params, self._cache = distributed.replicate(params), distill.cache
        self._key, self._store = None, None

    def of(
        self, examples: batches.Examples, buckets: Sequence[int], batch_size: int
    ) -> Callable[[np.ndarray, Batch], TeacherOutputs]:
        """`(rows, batch) -> teacher_outputs` for batches of `examples`, on the device.

        Stages of the same rows and batch size share what is kept (sums of other shapes
        may be rounded otherwise); with others, what was kept is forgotten.
        """
        if self._cache == "none":
            return lambda rows, batch: self._teach(self._params, batch)
        key = distributed.digest(examples.input_ids), len(examples), batch_size
        if key != self._key:
            like = _example(self._teach, self._params, examples)
            self._key, self._store = key, None  # first that of the stage before goes
            self._store = _Store(like, examples, buckets, self._cache)
        store = self._store

        def teacher_outputs(rows, batch):
            kept = store.read(rows, batch)
            if kept is not None:
                return distributed.shard(kept)
            new = self._teach(self._params, batch)
            store.write(rows, batch, new)
            return new

        return teacher_outputs


def check_memory(
    teacher: EncoderConfig, distill: Distill, examples: Sequence[batches.Examples]
) -> None:
    """Prints the memory that the outputs for all rows of `examples` need, beforehand.

    Args:
      teacher: its sizes.
      distill: with `cache`; nothing is said where that is none.
      examples: the rows of each stage; one stage's outputs are kept at a time.

    Raises:
      UserError: where less memory is free.
    """
    if distill.cache == "none" or not (distill.logits or distill.layers):
        return
    teach, params = (
        make_teacher_forward(Encoder(teacher), distill),
        abstract_params(teacher),
    )

    def size_of(rows):
        like = _example(teach, params, rows)
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
        legal += f"{free / 1e9:.2f} GB are free"
        raise reject("distill.cache", distill.cache, legal)
    print(
        f"teacher's outputs: {count:,} rows of {tokens:,} tokens take up to "
        f"{size / 1e9:.2f} GB "
        f"of the {distill.cache}'s memory",
        flush=True,
    )


def _free_memory(where):
    """Bytes that can still be had, as far as the system says."""
    stats = jax.local_devices()[0].memory_stats()
    if where == "device" and stats:  # a CPU has none: its memory is the host's
        return stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s*(\d+) kB", text)[1]) * 1024
    except (OSError, TypeError):
        return np.inf
    try:  # what a batch system allows may be less
        group = pathlib.Path("/sys/fs/cgroup")
        most, used = (int((group / f"memory.{n}").read_text()) for n in _CGROUP)
        return min(free, most - used)
    except (OSError, ValueError):
        return free


def _example(teach, params, examples):
    """Shapes and dtypes of the teacher_outputs of one row."""
    length, rows = int(examples.lengths[0]), np.zeros(1, np.int32)
    batch = batches.make_batch(examples, rows, length=length, batch_size=1)
    return jax.eval_shape(teach, params, batch)


def _shapes(like, examples):
    """Of arrays for what all rows or, where it is of tokens, all tokens are told."""
    tokens, rows = int(examples.lengths.sum()), len(examples)
    # One place more than there are tokens: padding is written to and read from it.
    # What stands there has weight 0 in every loss, but must be finite.
    return {
        name: (tokens + 1, *x.shape[2:]) if x.ndim > 2 else (rows, *x.shape[1:])
        for name, x in like.items()
    }


class _Store:
    """TeacherCache by row, or by token where they are of tokens: real tokens alone."""

    def __init__(self, teacher_outputs, examples, buckets, cache):
        lengths = examples.lengths
        self._lengths, self._cache, self._pending = lengths, cache, None
        self._starts = np.cumsum(lengths, dtype=np.int64) - lengths
        self._own = np.asarray(buckets)[np.searchsorted(buckets, lengths)]
        self._kept = np.zeros(len(lengths), bool)
        self._of_tokens = {name: x.ndim > 2 for name, x in teacher_outputs.items()}
        shapes = _shapes(teacher_outputs, examples)
        arrays = {n: np.zeros(shapes[n], x.dtype) for n, x in teacher_outputs.items()}
        self._arrays = distributed.replicate(arrays) if cache == "device" else arrays
        self._write = jax.jit(
            _set, donate_argnums=0, out_shardings=distributed.replicated()
        )

    def read(self, rows, batch):
        """The teacher_outputs, or None where the batch has a row that is not kept."""
        self._flush()
        if not self._kept[rows].all() or not self._at_home(rows, batch).all():
            return None
        index = self._index(rows, batch)
        if self._cache == "device":
            return _read(self._arrays, distributed.replicate(index))
        return {name: x[index[name]] for name, x in self._arrays.items()}

    def write(self, rows, batch, teacher_outputs):
        """Keeps what the rows were told, if all of them are in their own bucket."""
        if not self._at_home(rows, batch).all():
            return
        index = self._index(rows, batch)
        self._kept[rows] = True
        if self._cache == "device":
            self._arrays = self._write(
                self._arrays, distributed.replicate(index), teacher_outputs
            )
        else:  # waited for when the device has begun with the step
            self._pending = index, teacher_outputs

    def _flush(self):
        if self._pending:
            index, teacher_outputs = self._pending
            for name, values in distributed.fetch(teacher_outputs).items():
                self._arrays[name][index[name]] = values
            self._pending = None

    def _at_home(self, rows, batch):
        return self._own[rows] == batch["input_ids"].shape[1]

    def _index(self, rows, batch):
        """Returns the places of each output: (B,) for rows, (B, T) for tokens."""
        size, length = batch["input_ids"].shape
        rows = batches.fill_up(rows, size)
        column = np.arange(length)
        tokens = self._starts[rows][:, None] + column
        tokens[column >= self._lengths[rows][:, None]] = self._lengths.sum()
        of_tokens = self._of_tokens.items()
        return {name: tokens if is_token else rows for name, is_token in of_tokens}


@jax.jit
def _read(arrays, index):
    return {name: x[index[name]] for name, x in arrays.items()}


def _set(arrays, index, teacher_outputs):
    return {
        name: x.at[index[name]].set(teacher_outputs[name]) for name, x in arrays.items()
    }


def check_teacher_cache(
    config: Config, sizes: EncoderConfig, train: batches.Examples
) -> None:
    """Says what a cache of teacher outputs needs; UserError where memory is short."""
    taught = {}
    for field in ("prune", "finetune"):
        stage = getattr(config, field)
        rows = batches.first_rows(train, stage.train_rows, field=f"{field}.train_rows")
        taught[len(rows), stage.batch_size] = rows
    check_memory(sizes, config.distill, list(taught.values()))
