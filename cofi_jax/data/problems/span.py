"""Extractive question answering: the start and the end of an answer."""

import jax.numpy as jnp
import numpy as np

from cofi_jax.data import squad
from cofi_jax.data.problems.base import Problem, WrongLabel


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

    def num_outputs(self, labels):
        return 2

    def encode(self, cells, labels, *, numbered):
        """(N,) the answers as they are, which `tokenise` looks for in the tokens."""
        for row, cell in enumerate(cells):
            fields = cell if isinstance(cell, dict) else {}
            texts, starts = fields.get("text"), fields.get("answer_start")
            if not (
                isinstance(texts, list)
                and isinstance(starts, list)
                and len(texts) == len(starts)
                and all(isinstance(text, str) for text in texts)
                and all(type(start) is int for start in starts)
            ):
                legal = "must hold lists `text` of texts and `answer_start` of "
                legal += "integers, equally long"
                raise WrongLabel(row, legal)
        return np.array(cells, object)

    def unlabelled(self, count):
        return np.full(count, None, object)

    def tokenise(self, columns, task, tokenizer, *, training):
        """Makes as many windows of each context as it takes, see `squad.windows`."""
        return squad.windows(
            columns, tokenizer, max_length=task.max_length, training=training
        )

    def choices(self, logits, batch):
        """Two choices among T tokens for each row."""
        real = batch["attention_mask"][:, None] > 0
        logits = jnp.where(real, jnp.swapaxes(logits, 1, 2), -1e9)  # (B, 2, T)
        return logits.reshape(-1, logits.shape[-1])

    def weights(self, batch):
        return jnp.repeat(batch["weight"], 2)

    def decode(self, logits, examples, labels):
        answers = squad.best_answers(logits, examples.uncut)
        return [{"answer": answer} for answer in answers]

    def decision(self, answer):
        return answer["answer"]

    def per_example(self, logits, examples, metrics):
        questions = examples.uncut
        texts = squad.best_answers(logits, questions)
        return {
            name: np.array([*map(squad.METRICS[name], texts, questions.answers)])
            for name in metrics
        }

    def scorer(self, logits, examples, metrics):
        values = self.per_example(logits, examples, metrics)
        return len(examples.uncut.answers), lambda chosen: {
            name: float(np.mean(value[chosen])) for name, value in values.items()
        }
