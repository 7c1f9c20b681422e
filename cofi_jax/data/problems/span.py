"""Extractive question answering: the start and the end of an answer."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.data import squad
from cofi_jax.data.batches import Examples
from cofi_jax.data.problems.base import Problem, Scorer, WrongLabel
from cofi_jax.models.bert import Batch

if TYPE_CHECKING:
    from cofi_jax.data.tasks import Task


class Span(Problem):
    """Two choices among the real tokens of a row: where the answer starts and ends.

    A row is a window of a context, so the answer to a question is the best of those of
    several rows.
    """

    name = "span"
    head = "every"
    auto_model = "QuestionAnswering"
    pipeline_tag = "question-answering"
    classifier = "qa_outputs"
    output_class = "QuestionAnsweringModelOutput"
    outputs = ("start_logits", "end_logits")
    example = ("Who wrote it?", "It was written by a sailor.")
    timed_on_cpu = (8, 384)
    timed_on_gpu = (128, 384)

    def num_outputs(self, labels: Sequence[str]) -> int:
        return 2

    def encode(
        self, cells: Sequence[Any], labels: Sequence[str], *, numbered: bool
    ) -> np.ndarray:
        """(N,) the answers as they are, which `tokenise` looks for in the tokens."""
        for row, value in enumerate(cells):
            value = value if isinstance(value, dict) else {}
            texts, starts = value.get("text"), value.get("answer_start")
            lists = isinstance(texts, list) and isinstance(starts, list)
            if not (
                lists
                and len(texts) == len(starts)
                and all(isinstance(text, str) for text in texts)
                and all(type(start) is int for start in starts)
            ):
                legal = "must hold lists `text` and `answer_start`, equally long"
                raise WrongLabel(row, legal)
        return np.array(cells, object)

    def unlabelled(self, count: int) -> np.ndarray:
        return np.array([{"text": [], "answer_start": []}] * count, object)

    def tokenise(
        self, columns: dict[str, Any], task: "Task", tokenizer: Any, *, training: bool
    ) -> Examples:
        """Makes as many windows of each context as it takes, see `squad.windows`."""
        found = squad.windows(
            columns, tokenizer, max_length=task.max_length, training=training
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

    def choices(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Two choices among T tokens for each row, see `Problem.choices`."""
        real = batch["attention_mask"][:, None] > 0
        logits = jnp.where(real, jnp.swapaxes(logits, 1, 2), -1e9)  # (B, 2, T)
        return logits.reshape(-1, logits.shape[-1]), jnp.repeat(batch["weight"], 2)

    def decode(
        self, logits: np.ndarray, examples: Examples, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        answers = squad.best_answers(logits, examples.questions)
        return [{"answer": answer} for answer in answers]

    def scorer(
        self, logits: np.ndarray, examples: Examples, metrics: Sequence[str]
    ) -> tuple[int, Scorer]:
        questions = examples.questions
        texts = squad.best_answers(logits, questions)
        values = {
            name: np.array([*map(squad.METRICS[name], texts, questions.answers)])
            for name in metrics
        }
        return len(texts), lambda chosen: {
            name: float(np.mean(value[chosen])) for name, value in values.items()
        }
