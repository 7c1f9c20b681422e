"""A vector for each text, which is learned from a teacher's vectors, without labels."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax import errors
from cofi_jax.data.metrics import METRICS, TOP, gains
from cofi_jax.data.problems.base import Problem

_TINY = 1e-12

# The terms of the loss are of the same size with it: similarities are hardly wrong
# where vectors are wrong by much.
_SIMILARITIES = 10.0

# The size of the noise that importance is measured with, relative to a vector's length.
_NOISE = 0.1


class Pairs(NamedTuple):
    """N pairs of texts with similarities: rows 2 i and 2 i + 1 are those of pair i.

    Attributes:
      contexts: the texts of all rows.
      of_row: (2 N,) int32, the text of each row, which is that of its number.
      similarities: (N,) float32.
    """

    contexts: list[str]
    of_row: np.ndarray
    similarities: np.ndarray

    metrics = ("spearman", "pearson")

    @property
    def judgements(self) -> np.ndarray:
        """What the texts are scored by."""
        return self.similarities

    def values(self, logits: np.ndarray) -> np.ndarray:
        """The cosines (N,) of the vectors of each pair."""
        ends = _directions(logits).reshape(len(self.similarities), 2, -1)
        return ends.prod(1).sum(-1)


class Retrieval(NamedTuple):
    """Q queries, which are the first rows, and the documents that they are to find.

    Attributes:
      contexts: the texts of all rows.
      of_row: (Q + M,) int32, the text of each row, which is that of its number.
      relevant: of each query a dict from numbers of documents to their relevance,
        which is above 0.
      own: of each query the number of the document that is the query itself, or -1;
        it is not found unless it is relevant. () for none at all.
    """

    contexts: list[str]
    of_row: np.ndarray
    relevant: list[dict[int, float]]
    own: Sequence[int] = ()

    metrics = ("ndcg_at_10", "recall_at_10")

    @property
    def judgements(self) -> np.ndarray:
        """What the texts are scored by: rows of a query, a document, its relevance."""
        return np.array(
            [
                (query, document, relevance)
                for query, documents in enumerate(self.relevant)
                for document, relevance in documents.items()
            ]
        )

    def values(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric of each query, (Q,), as trec_eval defines them."""
        directions, count = _directions(logits), len(self.relevant)
        own = self.own or [-1] * count
        found: dict[str, list[float]] = {name: [] for name in self.metrics}
        for row, relevant in enumerate(self.relevant):
            similarities = directions[count:] @ directions[row]
            if own[row] >= 0 and own[row] not in relevant:
                similarities[own[row]] = -np.inf
            first = _nearest(similarities)
            gained = np.array([relevant.get(int(number), 0.0) for number in first])
            best = np.sort([*relevant.values()])[::-1]
            given, ideal = (gains(x, np.arange(len(x))).sum() for x in (gained, best))
            found["ndcg_at_10"].append(given / ideal)
            found["recall_at_10"].append((gained > 0).sum() / len(relevant))
        return {name: np.array(values) for name, values in found.items()}


class Vectors(Problem):
    """A text is a vector, the pooled hidden states, perhaps mapped and normalised.

    There are no labels: a teacher's vectors are to be imitated. A model is scored by
    pairs of texts that have similarities, or by how far its vectors of held-out texts
    agree with the teacher's, and besides by what it retrieves.

    Metrics:
      agreement: of the ten other texts that are nearest to a text by the teacher's
        vectors, the share that is also among the ten nearest by the model's. Where
        there are fewer than 20 others, half of them take the place of the ten.
      cosine: that of the model's and the teacher's vector of a text.
      spearman, pearson: the correlations of the cosines of pairs with similarities.
      ndcg_at_10, recall_at_10: of the ten documents that are nearest to a query.
    """

    name = "vectors"
    head = "mean"
    pools = True
    own_metrics = ("agreement",)
    most_columns = 1
    auto_model = ""
    pipeline_tag = "sentence-similarity"
    output_class = ""
    outputs = ("sentence_embedding",)

    _metrics = ("agreement", "cosine")  # of texts alone

    def described(self, task):
        if task.extra_file:
            raise errors.reject(
                "data.extra_file", task.extra_file, "is for labelled rows"
            )
        splits = ("validation", "retrieval") if task.retrieval else ("validation",)
        metrics = Pairs.metrics if task.pairs else self._metrics
        return dataclasses.replace(
            task, validation=splits, metrics=metrics, label_column=""
        )

    def num_outputs(self, labels):
        """0, since the width of the vectors is the teacher's."""
        return 0

    def tokenise(self, columns, task, tokenizer, *, training):
        """Cuts texts at `task.max_length` tokens, and says how many are longer."""
        examples = super().tokenise(columns, task, tokenizer, training=training)
        texts = columns[task.columns[0]]
        full = np.flatnonzero(examples.lengths == task.max_length)
        whole = [texts[row] for row in full]
        ids = tokenizer(whole, verbose=False)["input_ids"] if whole else []
        if longer := sum(len(row) > task.max_length for row in ids):
            errors.warn(
                f"{longer:,} of {len(texts):,} texts are longer than "
                f"data.max_length={task.max_length} tokens; they are cut"
            )
        return dataclasses.replace(examples, uncut=columns.get("uncut"))

    def loss(self, logits, batch):
        raise NotImplementedError("there is no loss without a teacher")

    def distill(self, student, teacher, batch, temperature):
        """How far vectors, and the similarities of texts of a batch, are the teacher's.

        The sum of three terms for each text, s being the student's vector and t the
        teacher's: 1 - cos(s, t); |s - t|^2 / |t|^2; and ten times the mean, over the
        other texts, of the squared difference of the cosines with them. The temperature
        is not read. In a batch that is worked through in parts, the other texts are
        those of the same part.
        """
        s, t = _unit(student), _unit(teacher)
        error = jnp.square(student - teacher).sum(-1)
        error /= jnp.maximum(jnp.square(teacher).sum(-1), _TINY)
        others = batch["weight"] * (1 - jnp.eye(len(s)))  # (B, B)
        gaps = jnp.square(s @ s.T - t @ t.T) * others
        gaps = gaps.sum(-1) / jnp.maximum(others.sum(-1), 1)
        values = 1 - (s * t).sum(-1) + error + _SIMILARITIES * gaps
        return self.mean(values, batch)

    def noisy(self, logits, key):
        """The noise is a tenth as long as the vectors, of which similarities are."""
        size = _NOISE * jnp.linalg.norm(logits, axis=-1, keepdims=True)
        noise = jax.random.normal(key, logits.shape) / logits.shape[-1] ** 0.5
        return logits + jax.lax.stop_gradient(size) * noise

    def answers(self, logits, examples):
        return np.float32(logits)

    def decode(self, logits, examples, labels):
        return [{"vector": row.tolist()} for row in logits]

    def per_example(self, logits, examples, metrics):
        if isinstance(examples.uncut, Pairs):
            return {}
        if isinstance(examples.uncut, Retrieval):
            return examples.uncut.values(logits)
        ours, theirs = _directions(logits), _directions(examples.labels)
        if ours.shape != theirs.shape:
            legal = f"must be {theirs.shape[-1]}, that of the model to agree with"
            raise errors.reject("width of vectors", ours.shape[-1], legal)
        shares = []
        for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            near = (_nearest(each, but=row) for each in (ours @ a, theirs @ b))
            shares.append(np.intersect1d(*near).size / _count(len(ours)))
        return {"agreement": np.array(shares), "cosine": (ours * theirs).sum(-1)}

    def scorer(self, logits, examples, metrics):
        """The metrics are those of the kind of rows, whichever are asked for."""
        if isinstance(examples.uncut, Pairs):
            cosines = examples.uncut.values(logits)[:, None]
            gold = examples.uncut.similarities
            return len(gold), lambda chosen: {
                name: METRICS[name](cosines[chosen], gold[chosen])
                for name in Pairs.metrics
            }
        values = self.per_example(logits, examples, metrics)
        return len(next(iter(values.values()))), lambda chosen: {
            name: float(np.mean(each[chosen])) for name, each in values.items()
        }


def _unit(x):
    """Vectors (N, C) of length 1; the gradient is finite also at 0."""
    squares = jnp.square(x).sum(-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squares, _TINY**2))


def _directions(vectors):
    """The same in NumPy, in float64."""
    vectors = np.float64(vectors)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, _TINY)


def _count(texts):
    """How many of the other texts are near; all of them would always agree."""
    return max(min(TOP, (texts - 1) // 2), 1)


def _nearest(similarities, but=None):
    """The numbers of the ten largest of (N,), of equal ones the first, in that order.

    With `but`, the number of one of them, it is `_count(N)` of the others.
    """
    if but is not None:
        similarities[but] = -np.inf
    count = TOP if but is None else _count(len(similarities))
    return np.argsort(-similarities, kind="stable")[:count]
