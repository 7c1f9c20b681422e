"""A saved model as a function from texts to answers."""

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cofi_jax import errors
from cofi_jax.checkpoints import saved_model, tokenizers
from cofi_jax.data import formats
from cofi_jax.data.tasks import Task
from cofi_jax.evaluation import predict as predict_lib

Text = str | tuple[str, str]


def pipeline(
    path: str | Path, *, dtype: str = "", batch_size: int = 32
) -> Callable[[Sequence[Text]], list[dict]]:
    """Loads a saved model as a function from texts to an answer for each.

    A program is compiled for each padded length and each power of two of texts that
    come together, up to `batch_size`, when they first come.

    Args:
      path: a folder that `save_model` wrote.
      dtype: of parameters and matrix work, as in `load_model`.
      batch_size: the most texts in a batch.

    Returns:
      A function of a list of texts, or of pairs where the task has two columns (for
      SQuAD a question and its context). For each it gives a dict: the `label` and its
      probability, the `score`; or all `labels` above their thresholds, with their
      `scores`; or the `value` of a regression; or the `score` of a passage; or the
      `vector` of a text; or the `answer`; or the `entities`, each with its `type`,
      `text`, `score` and, in characters, `start` and `end`. It warns where the
      tokenizer knows little of the first texts that it is given.

    Raises:
      UserError: where there is no such model, or no text fits into a batch; the
        function, for other inputs.
    """
    if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        legal = "must be a whole number above 0"
        raise errors.reject("batch_size", batch_size, legal)
    task = saved_model.saved_task(str(path))
    model, params, _ = saved_model.load_model(path, dtype=dtype)
    tokenizer = saved_model.load_tokenizer(path)
    predict = predict_lib.make_predict(model)

    source = {"field": "path", "path": str(path)}
    tokenizers.check_tokenizer(tokenizer, model.config, **source)
    checked = False

    def run(texts: Sequence[Text]) -> list[dict]:
        nonlocal checked
        if not (parts := _parts(texts, len(task.columns))):
            return []
        columns = _columns(parts, task)
        examples = task.tokenise(columns, tokenizer)
        if not checked:  # The first texts tell whether it is the tokenizer for them.
            options = {"refuse": False, **source}
            tokenizers.check_texts(tokenizer, examples, columns, task, **options)
            checked = True
        logits = predict_lib.logits(
            predict, params, task, examples, batch_size=batch_size, shrink=True
        )
        return task.problem.decode(logits, examples, task.labels)

    return run


def _parts(texts: Sequence[Text], wanted: int) -> list[Sequence[str]]:
    """The one or two texts of each input.

    Raises:
      UserError: where they are no texts, or not as many as are `wanted`.
    """
    legal = f"must be a list of {'texts' if wanted == 1 else 'pairs of texts'}"
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise errors.reject("texts", texts, legal)
    parts = [text if isinstance(text, (tuple, list)) else (text,) for text in texts]
    for part in parts:
        if len(part) != wanted or not all(isinstance(text, str) for text in part):
            raise errors.reject("texts", part, legal)
        if not all(map(formats.is_whole, part)):
            half = "holds half of a surrogate pair, which is no text"
            raise errors.reject("texts", part, half)
    return parts


def _columns(parts: Sequence[Sequence[str]], task: Task) -> dict[str, Any]:
    """The columns that `sources.load` would have read, with no real labels."""
    columns = dict(zip(task.columns, map(list, zip(*parts, strict=True)), strict=True))
    return columns | {task.label_column: task.problem.unlabelled(len(parts))}
