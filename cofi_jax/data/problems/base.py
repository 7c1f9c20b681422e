"""The interface of a kind of output, with the defaults that most kinds share."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cofi_jax.data.batches import Examples
from cofi_jax.data.metrics import METRICS
from cofi_jax.errors import reject
from cofi_jax.models.bert import Batch

if TYPE_CHECKING:
    from cofi_jax.data.tasks import Task

Scorer = Callable[[np.ndarray], dict[str, float]]  # from example numbers to metrics


class WrongLabel(ValueError):
    """A label that cannot be encoded; the message says what is legal."""

    def __init__(self, row: int, legal: str):
        super().__init__(legal)
        self.row = row


class Problem:
    """One kind of output, from the label column up to the exported head.

    The defaults are those of a choice among classes, made once per row. Logits are
    (N, C), or (N, T, C) where the head reads every token. Subclasses say only what is
    particular to them: their methods have the arguments and results described here.
    """

    name: str  # the value of `data.problem` and of a saved model's `problem`
    # The tokens that the head reads, unless a folder says otherwise.
    head: Literal["first", "every", "mean"] = "first"
    own_metrics: tuple[str, ...] = ()  # that `own` may ask for; (): `own` has no such
    names_classes: bool = False  # the labels name classes, which have an order
    fits: bool = False  # whether `fit` chooses anything
    pools: bool = False  # whether logits are vectors of pooled hidden states
    text_form: str = "text"  # what a cell of a column of text must be, in words
    least_columns: int = 1  # of text
    most_columns: int = 2
    grouped: bool = False  # rows belong together, by `data.group_column` perhaps
    settings: Mapping[str, Any] = types.MappingProxyType({})  # what it chose, for JSON
    # The batch size and the length that are timed where the user asks for none.
    timed_on_cpu: tuple[int, int] = (32, 64)
    timed_on_gpu: tuple[int, int] = (128, 128)  # as in the paper
    # These are Hugging Face's words for the head, its config and its task.
    auto_model: str = "SequenceClassification"  # or "" for a model without a head
    pipeline_tag: str = "text-classification"
    problem_type: str | None = None
    classifier: str = "classifier"  # the linear layer that gives the logits
    output_class: str = "SequenceClassifierOutput"  # or "" where it has none
    outputs: tuple[str, ...] = ("logits",)  # or one name for each column of the logits
    hub_fields: Mapping[str, Any] = types.MappingProxyType({})  # more of config.json
    example: tuple[str, str] = ("A gripping film.", "It is worth seeing.")

    def check_metrics(self, metrics: Sequence[str], labels: Sequence[str]) -> None:
        """Raises UserError where one of `metrics` is not for these classes.

        It also does where these are no classes of such a problem.
        """

    def class_of(self, family: str) -> str:
        """Hugging Face's class of such a model of a family."""
        return f"{family}For{self.auto_model}" if self.auto_model else f"{family}Model"

    @property
    def auto_class(self) -> str:
        """Hugging Face's class that opens such a model of any family."""
        return f"AutoModelFor{self.auto_model}" if self.auto_model else "AutoModel"

    def described(self, task: "Task") -> "Task":
        """The task with what it is scored on, which may follow from the data.

        Raises:
          UserError: for sets that are not for this problem.
        """
        for field in ("pairs", "retrieval"):
            if value := getattr(task, field):
                raise reject(f"data.{field}", value, f"is not for {self.name}")
        return task

    def label_columns(self, column: str) -> tuple[str, ...]:
        """The columns that hold the labels, given the value of `data.label_column`.

        Where there are several, the cell of a row is a dict of its values by column.
        """
        return (column,)

    def texts(self, cell: Any) -> Sequence[str] | None:
        """The texts in a cell of a column of text, or None where it is no such cell."""
        return (cell,) if isinstance(cell, str) else None

    def check_labels(self, texts: Sequence[Any], cells: Sequence[Any]) -> None:
        """Raises WrongLabel where a row's label cannot be that of its text.

        Args:
          texts: the cells of the first column of text.
          cells: those of the label column.
        """

    def check_splits(self, splits: Mapping[str, Any], task: "Task") -> None:
        """Warns where rows of different splits should not be in both.

        Args:
          splits: the columns of each split that was read, by its name.
          task: the task.
        """

    def spelled(self, text: str) -> Any:
        """The label that a cell of csv or tsv spells: a number, or else the text."""
        try:
            return text if "_" in text else float(text)
        except ValueError:
            return text

    def named(self, cell: Any) -> Sequence[Any]:
        """The classes that a cell of the label column names."""
        return (cell,)

    def num_outputs(self, labels: Sequence[str]) -> int:
        """The width of the logits (C), given the names of the classes.

        It is 0 where these are not known yet, or where the teacher's model decides.
        """
        raise NotImplementedError

    def class_names(self, cells: Sequence[Any], column: str) -> tuple[str, ...]:
        """Reads the names of the classes off the label column, or raises UserError."""
        raise NotImplementedError

    def encode(
        self, cells: Sequence[Any], labels: Sequence[str], *, numbered: bool
    ) -> np.ndarray:
        """Turns N cells of the label column into an array whose first axis is N.

        With `numbered` a cell may hold the number of a class instead of its name, one
        of `labels`. The first cell that cannot be encoded raises WrongLabel.
        """
        raise NotImplementedError

    def unlabelled(self, count: int) -> np.ndarray:
        """Labels that stand in for those of `count` rows that have none."""
        return np.zeros(count, np.int32)

    def answers(self, logits: np.ndarray, examples: Examples) -> np.ndarray:
        """A model's answers to all rows, as `encode` gives labels of these rows."""
        raise NotImplementedError

    def tokenise(
        self, columns: dict[str, Any], task: "Task", tokenizer: Any, *, training: bool
    ) -> Examples:
        """Tokenises rows, each cut at `task.max_length` tokens, see `Task.tokenise`.

        Raises:
          UserError: where special tokens alone are as many.
        """
        del training
        check_room(tokenizer, task.max_length, pair=len(task.columns) > 1)
        labels, ids, types = columns[task.label_column], [], []
        for first in range(0, len(labels), 1000):  # lists of all rows would be large
            encoded = tokenizer(
                *(columns[name][first : first + 1000] for name in task.columns),
                truncation=True,
                max_length=task.max_length,
                return_token_type_ids=True,
                return_attention_mask=False,
            )
            ids += [np.array(row, np.int32) for row in encoded["input_ids"]]
            types += [np.array(row, np.int32) for row in encoded["token_type_ids"]]
        return Examples(ids, types, labels, tokenizer.pad_token_id)

    def choices(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The logits (K, C') of the choices that B rows make; K is a multiple of B."""
        return logits

    def targets(self, batch: Batch) -> jax.Array:
        """(K,) int: which is the right one, for each of the choices."""
        return batch["labels"].reshape(-1)

    def weights(self, batch: Batch) -> jax.Array:
        """(K,) float32: the weight of each of the choices, 0 where it does not count.

        Where each row has one loss, it has one weight, too.
        """
        return batch["weight"]

    def mean(self, values: jax.Array, batch: Batch) -> jax.Array:
        """The mean of (K,) values under the weights.

        The mean of those of the parts of a batch is that of the whole batch.
        """
        total = None
        if "whole" in batch:
            total = self.weights(batch["whole"]).sum() / batch["parts"]
        return weighted_mean(values, self.weights(batch), total)

    def loss(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The loss of the batch's labels, a mean over the choices that count.

        Args:
          logits: (B, C), or (B, T, C) where the head reads every token.
          batch: `labels`, whose first axis is B, `weight` (B,) and `attention_mask`
            (B, T). One of several `parts` of a larger batch also has these three of the
            `whole` batch, from which the denominator follows.
        """
        losses = optax.softmax_cross_entropy_with_integer_labels(
            self.choices(logits, batch), self.targets(batch)
        )
        return self.mean(losses, batch)

    def distill(
        self, student: jax.Array, teacher: jax.Array, batch: Batch, temperature: float
    ) -> jax.Array:
        """The distance of the student's logits from the teacher's, a mean like `loss`.

        It is T^2 * KL(teacher || student) at temperature T. This is the direction of
        the authors' code; the paper (section 3.2) writes the other one.

        Args:
          student: logits, as in `loss`.
          teacher: of the same shape.
          batch: as in `loss`; its labels only say which choices count.
          temperature: T.
        """
        student, teacher = (self.choices(x, batch) for x in (student, teacher))
        p = jax.nn.log_softmax(teacher / temperature)
        q = jax.nn.log_softmax(student / temperature)
        divergence = jnp.sum(jnp.exp(p) * (p - q), -1)
        return temperature**2 * self.mean(divergence, batch)

    def noisy(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Logits nearby, whose distance `distill` tells, to measure importance by."""
        return logits + jax.random.normal(key, logits.shape)

    def fit(
        self, logits: np.ndarray, examples: Examples, metrics: Sequence[str]
    ) -> "Problem":
        """The problem with what it chooses for a model by its logits of training rows.

        It aims at the first of `metrics`. `decode` and the metrics go by these
        `settings`, which saved models hold.
        """
        return self

    def with_settings(
        self, settings: Mapping[str, Any], labels: Sequence[str]
    ) -> "Problem":
        """The problem as `fit` gave it; ValueError where it cannot have done so."""
        if settings:
            raise ValueError(f"a {self.name} has no settings")
        return self

    def describe(self, labels: Sequence[str]) -> str:
        """What the model card says of the settings, in full sentences."""
        return ""

    def decode(
        self, logits: np.ndarray, examples: Examples, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The answer to each text, as `pipeline` gives it."""
        raise NotImplementedError

    def decision(self, answer: dict[str, Any]) -> Any:
        """What one of `decode`'s answers decides on, a class say; None for numbers.

        Two models' answers are compared by it.
        """
        return None

    def per_example(
        self, logits: np.ndarray, examples: Examples, metrics: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The values of all examples, for those `metrics` that are means of them."""
        if "accuracy" not in metrics:
            return {}
        return {"accuracy": np.argmax(logits, axis=-1) == examples.labels}

    def by_class(
        self, logits: np.ndarray, examples: Examples, labels: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """What `metrics.rates` says of each class; {} where there are no classes."""
        return {}

    def scorer(
        self, logits: np.ndarray, examples: Examples, metrics: Sequence[str]
    ) -> tuple[int, Scorer]:
        """The number of examples, and the `metrics` as a function of a choice of them.

        An example is what is scored as one: a row or, where rows are windows of a
        context, a question.
        """
        return len(examples), lambda chosen: {
            name: METRICS[name](logits[chosen], examples.labels[chosen])
            for name in metrics
        }


def check_room(tokenizer: Any, max_length: int, *, pair: bool) -> None:
    """Raises UserError where no token of a text, or of a pair of them, would fit."""
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        what = "a pair of texts" if pair else "a text"
        legal = f"must be above {special}, the special tokens of {what}"
        raise reject("data.max_length", max_length, legal)


def weighted_mean(
    values: jax.Array, weights: jax.Array, total: jax.Array | None = None
) -> jax.Array:
    """Mean under non-negative weights; `total` takes the place of the weights' sum."""
    total = jnp.sum(weights) if total is None else total
    return jnp.sum(values * weights) / jnp.maximum(total, 1e-9)
