"""From rows to padded batches: token ids, epoch plan, batch.

    tokenise -> epoch_plan(seed, epoch) -> make_batch

An epoch is a pure function of (seed, epoch), so resuming is recomputing. Batches are
padded to one of a few bucket lengths, so that a step is compiled a few times only;
which ones, the rows themselves decide.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cofi_jax import config, errors
from cofi_jax.data import squad, tasks

_LEAST_GAIN = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N tokenised rows, not yet padded; of spans, N windows of the contexts."""

    input_ids: list[np.ndarray]  # N int32 arrays
    token_type_ids: list[np.ndarray]  # of the same lengths
    labels: np.ndarray  # (N,) int32 classes or float32 values; (N, 2) int32 of spans
    pad_id: int = 0
    questions: squad.Questions | None = None  # that all N windows belong to

    def __len__(self) -> int:  # noqa: D105
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each row."""
        return np.array([len(ids) for ids in self.input_ids], np.int32)

    def take(self, rows: np.ndarray) -> "Examples":
        """The examples at `rows`, in that order."""
        return dataclasses.replace(
            self,
            input_ids=[self.input_ids[row] for row in rows],
            token_type_ids=[self.token_type_ids[row] for row in rows],
            labels=self.labels[rows],
        )


def tokenise(
    columns: dict[str, Any],
    task: tasks.Task,
    tokenizer: Any,
    *,
    max_length: int,
    training: bool = False,
) -> Examples:
    """The rows that `rows.load` read as token ids.

    Rows are cut at `max_length` tokens; of a question's context as many windows are
    made as it takes. `tokenizer` is one of Hugging Face's transformers. With
    `training` questions are left out whose answer is not in their context.
    """
    if task.problem == "span":
        found = squad.windows(
            columns, tokenizer, max_length=max_length, training=training
        )
        if found.skipped:
            warning = "questions skipped: their answer is not in their context"
            print(f"warning: {found.skipped} {warning}", file=sys.stderr)
        return Examples(
            found.input_ids,
            found.token_type_ids,
            found.labels,
            tokenizer.pad_token_id,
            found.questions,
        )
    labels, ids, types = columns[task.label_column], [], []
    for first in range(0, len(labels), 1000):  # not all at once: lists are large
        encoded = tokenizer(
            *(columns[name][first : first + 1000] for name in task.columns),
            truncation=True,
            max_length=max_length,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        ids += [np.array(row, np.int32) for row in encoded["input_ids"]]
        types += [np.array(row, np.int32) for row in encoded["token_type_ids"]]
    return Examples(ids, types, labels, tokenizer.pad_token_id)


def first_rows(examples: Examples, rows: int, *, field: str) -> Examples:
    """A fixed random choice of `rows` examples; all, in their order, when 0.

    Smaller choices are the beginnings of larger ones. `field` is where `rows` comes
    from, for the UserError when there are fewer.
    """
    if rows == 0:
        return examples
    if rows > len(examples):
        raise errors.reject(field, rows, f"must be at most {len(examples)}, or 0: all")
    return examples.take(np.random.default_rng(0).permutation(len(examples))[:rows])


def bucket_lengths(data: config.Data, lengths: np.ndarray) -> tuple[int, ...]:
    """The padded lengths in use, ending in the longest that a row may have.

    They are `data.buckets`; where none are given, chosen for rows of `lengths` (N,).
    """
    longest = tasks.max_length(data)
    buckets = data.buckets or choose_buckets(lengths, longest)
    return (*(b for b in buckets if b < longest), longest)


def choose_buckets(lengths: np.ndarray, longest: int) -> tuple[int, ...]:
    """Padded lengths for rows of `lengths` (N,), multiples of 8 or `longest`.

    A step is compiled for each of them, so there are as few as may be: one more only
    where it saves 5 % of the tokens. As many as there are, they are the best ones.
    """
    multiples = np.minimum(-(-np.asarray(lengths) // 8) * 8, longest)
    widths, counts = np.unique(multiples, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])  # rows shorter than each width
    # By the end e: the fewest tokens that rows up to widths[e - 1] take, and how.
    tokens, chosen = np.full(len(before), np.inf), [()] * len(before)
    tokens[0], best = 0, (np.inf, ())
    for _ in widths:
        new, ways = np.full(len(before), np.inf), [()] * len(before)
        for e in range(1, len(before)):
            costs = tokens[:e] + widths[e - 1] * (before[e] - before[:e])
            start = int(np.argmin(costs))
            new[e], ways[e] = costs[start], (*chosen[start], int(widths[e - 1]))
        tokens, chosen = new, ways
        if not tokens[-1] < best[0] * (1 - _LEAST_GAIN):
            break
        best = tokens[-1], chosen[-1]
    return best[1]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """The length of every `epoch_plan`: batches, the short one included."""
    return -(-rows // batch_size)


def epoch_plan(
    lengths: np.ndarray,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    epoch: int,
) -> list[tuple[int, np.ndarray]]:
    """Decides which rows make up which batch; a pure function of its arguments.

    Each row goes to the smallest bucket that holds it, each bucket is cut into full
    batches, and what is left of it moves up to the next. So each row comes once, and
    only one batch may be short. No length may be above the last bucket.

    Returns:
      `steps_per_epoch(N, batch_size)` pairs (padded length, rows), in random order.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    bucket_of = np.searchsorted(buckets, lengths)[order]
    plan, rest = [], order[:0]
    for bucket in range(bucket_of.max() + 1):  # longer than all rows: never used
        rows = np.concatenate([rest, order[bucket_of == bucket]])
        full = len(rows) - len(rows) % batch_size
        plan += [(buckets[bucket], r) for r in rows[:full].reshape(-1, batch_size)]
        rest = rows[full:]
    if len(rest):
        plan.append((buckets[bucket], rest))
    return [plan[i] for i in rng.permutation(len(plan))]


def fill_up(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """(B,) `rows`, and where they are fewer than B, copies of the first after them."""
    return np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])


def make_batch(
    examples: Examples, rows: np.ndarray, *, length: int, batch_size: int
) -> dict[str, np.ndarray]:
    """Pads the examples at `rows` to one (B, T) batch.

    Fewer than B rows are filled up with copies of the first at weight 0 (not with
    blank rows: a softmax over nothing is nan). T is at least the longest row's length.

    Returns:
      `input_ids`, `attention_mask`, `token_type_ids` (B, T) int32, `labels` as in
      `Examples`, B of them, and `weight` (B,) float32.
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
    examples: Examples, *, batch_size: int, buckets: Sequence[int]
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields (rows, batch) over all examples once, by rising length.

    `scores[rows] = logits[: len(rows)]` puts a batch's logits where they belong.
    """
    lengths = examples.lengths
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = buckets[np.searchsorted(buckets, lengths[rows[-1]])]
        yield rows, make_batch(examples, rows, length=length, batch_size=batch_size)
