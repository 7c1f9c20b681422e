"""Rankings: how relevant each of some passages is to a query.

    rows (query, passage) -> a logit for each -> ranks among those of a query -> NDCG

The labels of a batch are (B, 3): the relevance of each row, the logit that it should
have, nan where that is not known, and the number of its query.
"""

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import expit

from cofi_jax import errors
from cofi_jax.data.metrics import TOP, gains
from cofi_jax.data.problems import names as names_lib
from cofi_jax.data.problems.base import Problem, WrongLabel
from cofi_jax.models.bert import Batch

_MOST_QUERIES = 2**24  # numbers that float32 still tells apart
_SIGMOID = "torch.nn.modules.activation.Sigmoid"


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """The Q queries of N rows, each of which is a query and one of its passages."""

    contexts: list[str]  # Q texts
    of_row: np.ndarray  # (N,) int32: the query of each row


class Ranking(Problem):
    """The sigmoid of the one logit of a row is how relevant its passage is.

    The label of a row is a number. It is a relevance, which is 0 or 1 or a grade; where
    one of those of a split is above 1, all are divided by the highest. Or it is another
    model's score: a probability is a relevance, too. But where a number of a split is
    negative, all are logits, and the relevances are their sigmoids.

    The rows of a query have the same value in `data.group_column`, or the same text.
    """

    name = "ranking"
    own_metrics = ("ndcg_at_10", "mrr_at_10", "recall_at_10")
    least_columns = 2
    grouped = True
    pipeline_tag = "text-ranking"
    example = ("Who wrote it?", "It was written by a sailor.")
    hub_fields = types.MappingProxyType(
        {"sentence_transformers": {"activation_fn": _SIGMOID}}
    )

    def num_outputs(self, labels):
        return 1

    def encode(self, cells, labels, *, numbered):
        """(N,) float32, the numbers as they are; `tokenise` knows all of a split."""
        most = float(np.finfo(np.float32).max)
        for row, cell in enumerate(cells):
            if not (isinstance(cell, int | float) and abs(cell) <= most):
                legal = "must be a finite number: 0 or 1, a grade, or a model's score"
                raise WrongLabel(row, legal)
        return np.array(cells, np.float32)

    def unlabelled(self, count):
        return np.full(count, np.nan, np.float32)

    def answers(self, logits, examples):
        """(N, 2) float32: the relevance and the logit of each row."""
        return np.stack([expit(np.float32(logits[:, 0])), logits[:, 0]], -1)

    def check_splits(self, splits, task):
        """Warns of queries in training rows that are also in others."""
        train = set(splits.get("train", {}).get(task.columns[0], ()))
        for name, columns in splits.items():
            queries = dict.fromkeys(columns[task.columns[0]])
            both = [query for query in queries if query in train]
            if both and name != "train":
                errors.warn(
                    f"{len(both)} of the {len(queries)} queries of {name} are also in "
                    f"the training rows, as {both[0][:100]!r}"
                )

    def tokenise(self, columns, task, tokenizer, *, training):
        """Makes the labels of batches, and says which queries cannot be scored.

        Returns:
          N rows, whose labels are (N, 3), those of a batch.
        """
        examples = super().tokenise(columns, task, tokenizer, training=training)
        texts = columns[task.columns[0]]
        keys = columns.get(task.group_column or task.columns[0], texts)
        groups = _numbers([*map(names_lib.text, keys)])
        queries = dict(zip(groups.tolist(), texts, strict=True))
        if len(queries) > _MOST_QUERIES:
            legal = f"has {len(queries)} queries, must have at most {_MOST_QUERIES}"
            raise errors.reject("data.path", task.path, legal)
        given = examples.labels  # (N,), or (N, 2) the answers of a model
        known = given.T if given.ndim > 1 else _relevance(given)
        labels = np.stack([*known, np.float32(groups)], -1)
        if not (training or np.isnan(labels[:, 0]).all()):
            _check(labels, task)
        uncut = Queries([*queries.values()], groups)
        return dataclasses.replace(examples, labels=labels, uncut=uncut)

    def loss(self, logits, batch):
        """The cross-entropy of the relevance; where logits are known, their distance.

        That is the one of `distill`.
        """
        relevance, known, _ = jnp.moveaxis(batch["labels"], -1, 0)
        scored = ~jnp.isnan(known)
        cross = optax.sigmoid_binary_cross_entropy(logits[:, 0], relevance)
        gaps = logits[:, 0] - jnp.where(scored, known, 0)  # No gradient may be nan.
        squares = _squares(gaps, batch, scored)
        return self.mean(jnp.where(scored, squares, cross), batch)

    def distill(self, student, teacher, batch, temperature):
        """The mean squared error of the logits and of their margins within queries.

        The margins of a row are the differences to the other rows of its query that
        are in the batch; their error is a mean over these, and 0 where there are none.
        What all logits of a query have in common does not count in it.
        """
        return self.mean(_squares((student - teacher)[:, 0], batch), batch)

    def describe(self, labels):
        return "The score of a passage is the sigmoid of the logit."

    def decode(self, logits, examples, labels):
        return [{"score": float(score)} for (score,) in expit(np.float64(logits))]

    def per_example(self, logits, examples, metrics):
        found = _metrics(logits[:, 0], examples.labels[:, 0], examples.labels[:, 2])
        return {name: found[name] for name in metrics}

    def scorer(self, logits, examples, metrics):
        """The metrics are means over queries; an example is one that can be scored."""
        values = self.per_example(logits, examples, metrics)
        return len(values[metrics[0]]), lambda chosen: {
            name: float(np.mean(value[chosen])) for name, value in values.items()
        }


def _numbers(keys: Sequence[str]) -> np.ndarray:
    """(N,) int32 numbers of the N keys, in the order in which they first come."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], np.int32)


def _relevance(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The relevance of each row of a split, and its logit or nan; each (N,) float32."""
    if (values < 0).any():
        errors.warn(
            f"{(values < 0).sum()} of {len(values)} labels are negative, as in row "
            f"{(values < 0).argmax()} (the first is 0); so all are taken for logits"
        )
        return expit(values), values
    return values / np.maximum(values.max(), 1), np.full_like(values, np.nan)


def _check(labels: np.ndarray, task: Any) -> None:
    """Raises UserError where no query can be scored; warns where some cannot."""
    best = _best(labels[:, 0], np.int64(labels[:, 2]))
    if not best.any():
        legal = f"must have a query with a passage whose {task.label_column} is above 0"
        raise errors.reject("data.path", task.path, legal)
    if lacking := (best == 0).sum():
        errors.warn(
            f"{lacking} of {len(best)} queries have no relevant passage; the scores "
            "leave them out"
        )


def _squares(
    gaps: jax.Array, batch: Batch, counted: jax.Array | bool = True
) -> jax.Array:
    """(B,) squared errors of logits and of their margins, see `Ranking.distill`.

    Args:
      gaps: (B,) the logits less those that they should be.
      batch: `labels` (B, 3) and `weight` (B,).
      counted: (B,) bool, whether a row has such a logit.
    """
    groups, counts = batch["labels"][:, 2], (batch["weight"] > 0) & counted
    same = (groups[:, None] == groups) & counts[:, None] & counts  # (B, B)
    same &= ~jnp.eye(len(groups), dtype=bool)
    margins = jnp.square(gaps[:, None] - gaps) * same
    return jnp.square(gaps) + margins.sum(1) / jnp.maximum(same.sum(1), 1)


def _best(relevance: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(Q,) the highest relevance of each query."""
    best = np.zeros(groups.max() + 1)
    np.maximum.at(best, groups, relevance)
    return best


def _metrics(
    logits: np.ndarray, relevance: np.ndarray, groups: np.ndarray
) -> dict[str, np.ndarray]:
    """Each metric of the queries that have a relevant passage, in their order.

    The gain of a passage is its relevance. Relevant are those passages of a query that
    have at least half of the highest relevance there: all above 0 where the labels are
    0 and 1. Of passages with equal logits, the least relevant one comes first.

    Args:
      logits: (N,).
      relevance: (N,) at least 0.
      groups: (N,) the number of the query of each passage.
    """
    relevance, groups = np.float64(relevance), np.int64(groups)
    best = _best(relevance, groups)

    def ranks(*keys):  # (N,) from 0, among the passages of the query
        order = np.lexsort((*keys, groups))
        found, there = np.empty(len(order), np.int64), groups[order]
        found[order] = np.arange(len(order)) - np.searchsorted(there, there)
        return found

    def sums(values):  # (Q,)
        return np.bincount(groups, values, len(best))[best > 0]

    def gain(rank):  # (Q,)
        return sums(gains(relevance, rank))

    given, ideal = ranks(relevance, -np.float64(logits)), ranks(-relevance)
    relevant = (relevance > 0) & (relevance >= best[groups] / 2)
    first = np.full(len(best), np.inf)
    np.minimum.at(first, groups[relevant], given[relevant])
    first = first[best > 0]
    return {
        "ndcg_at_10": gain(given) / gain(ideal),
        "mrr_at_10": np.where(first < TOP, 1 / (first + 1), 0),
        "recall_at_10": sums(relevant & (given < TOP)) / sums(relevant),
    }
