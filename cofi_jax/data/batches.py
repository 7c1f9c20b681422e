"""Padded batches of tokenised rows.

    Task.tokenise -> epoch_plan(seed, epoch) -> make_batch

An epoch is a pure function of (seed, epoch), so that a resumed run recomputes its
batches. Each batch is padded to one of a few lengths, the buckets, so that a step is
compiled only a few times. The lengths are chosen for the rows at hand.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cofi_jax import errors

if TYPE_CHECKING:
    from cofi_jax.data.tasks import Task

# One more padded length has to save this part of the tokens, and this many of them in a
# stage, or its programs do not pay. With an encoder of 6 layers, these take a core of a
# CPU 20 to 50 seconds, in which it trains a model of 80 % on as many tokens.
_LEAST_GAIN, _LEAST_SAVED = 0.05, 50_000


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N tokenised rows that are not padded yet, or N windows of longer texts."""

    input_ids: list[np.ndarray]  # N int32 arrays, one of the length of each row
    token_type_ids: list[np.ndarray]  # N int32 arrays of the same lengths
    labels: np.ndarray  # (N, ...): (N,) int32 classes, or whatever the problem encodes
    pad_id: int = 0
    # Of rows that are scored together, what they belong to. Of windows it is what they
    # were cut from: it has `contexts`, a list of texts, `of_row`, (N,) int32, the text
    # of each row, and what their problem needs to join them.
    uncut: Any = None

    def __len__(self) -> int:  # noqa: D105
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int32 numbers of tokens."""
        return np.array([len(ids) for ids in self.input_ids], np.int32)

    def take(self, rows: np.ndarray) -> "Examples":
        """The examples at `rows`, in that order."""
        return dataclasses.replace(
            self,
            input_ids=[self.input_ids[row] for row in rows],
            token_type_ids=[self.token_type_ids[row] for row in rows],
            labels=self.labels[rows],
        )


def first_rows(examples: Examples, rows: int, *, field: str) -> Examples:
    """A fixed random choice of `rows` examples, or with 0 all of them in their order.

    A smaller choice is the beginning of a larger one.

    Raises:
      UserError: there are fewer; it names the `field` that asked for them.
    """
    if rows == 0:
        return examples
    if rows > len(examples):
        raise errors.reject(field, rows, f"must be at most {len(examples)}, or 0: all")
    return examples.take(np.random.default_rng(0).permutation(len(examples))[:rows])


def bucket_lengths(
    task: "Task", lengths: np.ndarray, epochs: float = np.inf
) -> tuple[int, ...]:
    """The padded lengths in use; the last one is the longest that a row may have.

    They are `task.buckets`, or where there are none chosen for rows of `lengths` (N,)
    that are read in so many epochs, see `choose_buckets`.
    """
    longest = task.max_length
    buckets = task.buckets or choose_buckets(lengths, longest, epochs)
    return (*(b for b in buckets if b < longest), longest)


def choose_buckets(
    lengths: np.ndarray, longest: int, epochs: float = np.inf
) -> tuple[int, ...]:
    """Padded lengths for rows of `lengths` (N,), each a multiple of 8 or `longest`.

    A step is compiled for each of them, so there is one more only where it saves 5 % of
    the tokens, and 50,000 of them in all `epochs`. Of all choices of that many lengths,
    this one pads least.
    """
    multiples = np.minimum(-(-np.asarray(lengths) // 8) * 8, longest)
    widths, counts = np.unique(multiples, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])  # rows shorter than each width
    # tokens[e] is the fewest tokens that the rows up to widths[e - 1] take, and
    # chosen[e] are the lengths that achieve it, all by dynamic programming.
    tokens, chosen = np.full(len(before), np.inf), [()] * len(before)
    tokens[0], best = 0, (np.inf, ())
    for _ in widths:
        new, ways = np.full(len(before), np.inf), [()] * len(before)
        for e in range(1, len(before)):
            costs = tokens[:e] + widths[e - 1] * (before[e] - before[:e])
            start = int(np.argmin(costs))
            new[e], ways[e] = costs[start], (*chosen[start], int(widths[e - 1]))
        tokens, chosen = new, ways
        saved, least = best[0] - tokens[-1], best[0] * _LEAST_GAIN
        if best[1] and (saved <= least or saved * epochs < _LEAST_SAVED):
            break
        best = tokens[-1], chosen[-1]
    return best[1]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """The number of batches in every `epoch_plan`, the short one included."""
    return -(-rows // batch_size)


def epoch_plan(
    lengths: np.ndarray,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    stage: str,
    epoch: int,
) -> list[tuple[int, np.ndarray]]:
    """Decides which rows make up which batch, as a pure function of its arguments.

    Each row goes to the smallest bucket that holds it, and each bucket is cut into full
    batches; the rows that are left over move up to the next bucket. So each row comes
    once and at most one batch is short.

    Args:
      lengths: (N,) tokens of each row, none above the last bucket.
      batch_size: rows in a full batch.
      buckets: the padded lengths in rising order.
      seed: the run's.
      stage: its name gives each stage an order of its own.
      epoch: its number.

    Returns:
      `steps_per_epoch(N, batch_size)` pairs (padded length, rows), in random order.
    """
    rng = np.random.default_rng((seed, zlib.crc32(stage.encode()), epoch))
    order = rng.permutation(len(lengths))
    bucket_of = np.searchsorted(buckets, lengths)[order]
    plan, rest = [], order[:0]
    for bucket in range(bucket_of.max() + 1):
        rows = np.concatenate([rest, order[bucket_of == bucket]])
        full = len(rows) - len(rows) % batch_size
        plan += [(buckets[bucket], r) for r in rows[:full].reshape(-1, batch_size)]
        rest = rows[full:]
    if len(rest):
        plan.append((buckets[bucket], rest))
    return [plan[i] for i in rng.permutation(len(plan))]


def fill_up(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """(B,) `rows`, followed by copies of the first where they are fewer than B."""
    return np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])


def make_batch(
    examples: Examples, rows: np.ndarray, *, length: int, batch_size: int
) -> dict[str, np.ndarray]:
    """Pads the examples at `rows` to one (B, T) batch.

    Fewer than B rows are filled up with copies of the first, at weight 0; blank rows
    would not do, since a softmax over nothing is nan. No row may be longer than T.

    Returns:
      `input_ids`, `attention_mask`, `token_type_ids` (B, T) int32, `labels` (B, ...)
      as in `Examples`, and `weight` (B,) float32.
    """
    filled = fill_up(rows, batch_size)
    ids = np.full((batch_size, length), examples.pad_id, np.int32)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for i, row in enumerate(filled):
        tokens = len(examples.input_ids[row])
        ids[i, :tokens] = examples.input_ids[row]
        mask[i, :tokens] = 1
        types[i, :tokens] = examples.token_type_ids[row]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "labels": examples.labels[filled],
        "weight": (np.arange(batch_size) < len(rows)).astype(np.float32),
    }


def eval_batches(
    examples: Examples, *, batch_size: int, buckets: Sequence[int], shrink: bool = False
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields (rows, batch) over all examples once, by rising length.

    `scores[rows] = logits[: len(rows)]` puts a batch's logits where they belong. With
    `shrink` the last batch is filled up to a power of two only, not to `batch_size`.
    """
    lengths = examples.lengths
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        size = batch_size
        if shrink:
            size = min(batch_size, 1 << (len(rows) - 1).bit_length())
        length = buckets[np.searchsorted(buckets, lengths[rows[-1]])]
        yield rows, make_batch(examples, rows, length=length, batch_size=size)


def stream(
    examples: Examples,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    stage: str,
    first_step: int = 0,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields (rows, batch) without end, epoch after epoch, from `first_step` on.

    The other arguments are those of `epoch_plan` and `make_batch`.
    """
    epoch, skip = divmod(first_step, steps_per_epoch(len(examples), batch_size))
    sizes = {"batch_size": batch_size}
    while True:
        order = {"seed": seed, "stage": stage, "epoch": epoch}
        plan = epoch_plan(examples.lengths, buckets=buckets, **sizes, **order)
        for length, rows in plan[skip:]:
            yield rows, make_batch(examples, rows, length=length, **sizes)
        epoch, skip = epoch + 1, 0
