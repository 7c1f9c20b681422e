"""Texts in, answers out: a saved model as a function."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from cofi_jax import errors
from cofi_jax.checkpoints import saved_model
from cofi_jax.data import batches, squad, tasks
from cofi_jax.evaluation import predict as predict_lib

Text = str | tuple[str, str]


def pipeline(
    path: str | Path, *, dtype: str = "", batch_size: int = 32
) -> Callable[[Sequence[Text]], list[dict]]:
    """A saved model as a function from texts to what it says of each.

    Args:
      path: a folder that `save_model` wrote.
      dtype: as of `load_model`.
      batch_size: texts at a time; the last batch is filled up.

    Returns:
      Takes a list of texts, or of pairs where the task has two columns (of SQuAD
      question and context), and gives for each `label` and `score`, its probability;
      the `value` of a regression; the `answer` to a question.

    Raises:
      UserError: where there is no such model; its function, for other inputs.
    """
    data = saved_model.saved_data(str(path))
    task = tasks.find(data)
    model, params, _ = saved_model.load_model(path, dtype=dtype)
    tokenizer = saved_model.load_tokenizer(path)
    predict = predict_lib.make_predict(model)

    def run(texts: Sequence[Text]) -> list[dict]:
        examples = batches.tokenise(
            _columns(texts, task),
            task,
            tokenizer,
            max_length=tasks.max_length(data),
        )
        logits = predict_lib.predict_all(
            predict,
            params,
            {},
            examples,
            batch_size=batch_size,
            buckets=batches.bucket_lengths(data, examples.lengths),
        )
        if task.problem == "span":
            answers = squad.best_answers(logits, examples.questions)
            return [{"answer": answer} for answer in answers]
        if task.problem == "regression":
            return [{"value": float(value)} for (value,) in logits]
        scores = np.asarray(jax.nn.softmax(logits.astype(np.float32)))
        best = scores.argmax(-1)
        return [
            {"label": task.labels[k], "score": float(row[k])}
            for k, row in zip(best, scores, strict=True)
        ]

    return run


def _columns(texts, task):
    """The texts as `rows.load` would have read them, without labels."""
    wanted = len(task.columns)
    legal = f"must be a list of {'texts' if wanted == 1 else 'pairs of texts'}"
    given = [] if isinstance(texts, str) else list(texts)
    if not given:
        raise errors.reject("texts", texts, legal)
    parts = [text if isinstance(text, (tuple, list)) else (text,) for text in given]
    for part in parts:
        if len(part) != wanted or not all(isinstance(text, str) for text in part):
            raise errors.reject("texts", part, legal)
    columns = dict(zip(task.columns, map(list, zip(*parts, strict=True)), strict=True))
    none = [{"text": [], "answer_start": []}] * len(parts)
    labels = none if task.problem == "span" else np.zeros(len(parts), np.int32)
    return columns | {task.label_column: labels}
