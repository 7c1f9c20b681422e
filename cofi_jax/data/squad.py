"""Extractive question answering: rows of SQuAD to windows, logits back to answers.

    windows(rows) -> logits of each token as a start and as an end -> score

A context that is too long for the model is cut into overlapping windows, each of them
with the question in front. The answer is a span of the context, the best one of those
of all windows.
"""

import collections
import dataclasses
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cofi_jax import errors
from cofi_jax.data.batches import Examples

if TYPE_CHECKING:
    import tokenizers

LONGEST_QUESTION = 64  # tokens, as in BERT's own recipe for SQuAD


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """The questions, by which the logits of N windows become answers to Q questions.

    A token's offsets are its first character in the context and the one after its last.
    Those of the question's tokens and of special ones are -1 and -1.
    """

    contexts: list[str]  # Q texts
    answers: list[list[str]]  # Q lists of gold texts; to match one of them suffices
    of_row: np.ndarray  # (N,) int32: the question of each window
    offsets: list[np.ndarray]  # N (T_n, 2) int32 arrays: the offsets of each token


def windows(
    rows: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int,
    stride: int = 128,
    training: bool,
) -> Examples:
    """Tokenises questions and contexts, and finds the answers' tokens.

    The windows are those of Hugging Face's recipe (the question first, stripped on its
    left; `truncation="only_second"`), but they are cut here, so that no length has to
    be refused: the first 64 tokens of a question are kept, as in BERT's recipe, or as
    many as fit in half of a short window.

    A label is the first and the last of the tokens that share a character with the
    first gold answer, and (0, 0) where the window does not hold all of these.

    Args:
      rows: columns `question` and `context` of text and `answers`, each of which is
        `{"text": [...], "answer_start": [...]}`, the latter counted in characters.
      tokenizer: a fast one of Hugging Face's transformers, of any template.
      max_length: tokens of a window at most, special ones included.
      stride: tokens of the context that a window repeats from the one before it; at
        most half of those it has room for.
      training: leave out, with a warning, a row without an answer or whose first one is
        not at its place in the context. Else each row is a question.

    Returns:
      N windows, those of a question together, whose labels are (N, 2) int32.

    Raises:
      UserError: the tokenizer is not a fast one; no token of a context would fit.
    """
    if not getattr(tokenizer, "is_fast", False):
        legal = "must come with a fast tokenizer (tokenizer.json) for this task"
        raise errors.reject("model.path", tokenizer.name_or_path, legal)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length <= special:
        legal = f"must be above {special}, the special tokens of a question"
        raise errors.reject("data.max_length", max_length, legal)
    longest_question = min(LONGEST_QUESTION, (max_length - special) // 2)
    asked, contexts, golds = (rows[c][:] for c in ("question", "context", "answers"))
    ids, types, labels, of_row, offsets = [], [], [], [], []
    kept = []  # rows
    for row, tokens in enumerate(_tokenise(tokenizer, asked, contexts)):
        # The part is 0 for the question, 1 for the context, and nan for neither.
        part = np.array(tokens.sequence_ids, np.float32)
        places = np.array(tokens.offsets, np.int32).reshape(-1, 2)
        places[part != 1] = -1
        start, stop = _characters(contexts[row], golds[row])
        answer = np.flatnonzero((places[:, 0] < stop) & (places[:, 1] > start))
        if training and not len(answer):
            continue
        for here in _cut(part, max_length, longest_question, stride):
            label = [0, 0]
            if len(answer) and here[answer].all():
                label = [here[:i].sum() for i in answer[[0, -1]]]
            ids.append(np.array(tokens.ids, np.int32)[here])
            types.append(np.array(tokens.type_ids, np.int32)[here])
            labels.append(label)
            of_row.append(len(kept))
            offsets.append(places[here])
        kept.append(row)
    if skipped := len(contexts) - len(kept):
        warning = "questions skipped: their answer is not in their context"
        print(f"warning: {skipped} {warning}", file=sys.stderr)
    questions = Questions(
        [contexts[row] for row in kept],
        [list(golds[row]["text"]) for row in kept],
        np.array(of_row, np.int32),
        offsets,
    )
    labels = np.array(labels, np.int32).reshape(-1, 2)
    return Examples(ids, types, labels, tokenizer.pad_token_id, questions)


def _tokenise(
    tokenizer: Any, questions: list[str], contexts: list[str]
) -> Iterator["tokenizers.Encoding"]:
    """Each question with its context, not cut."""
    for first in range(0, len(contexts), 1000):  # not all at once: lists are large
        yield from tokenizer(
            [question.lstrip() for question in questions[first : first + 1000]],
            contexts[first : first + 1000],
            truncation=False,
            padding=False,
            return_offsets_mapping=True,
            verbose=False,  # longer than the model's longest: cut later
        ).encodings


def _cut(
    part: np.ndarray, max_length: int, longest_question: int, stride: int
) -> Iterator[np.ndarray]:
    """For each window which of the T tokens it holds, (T,) bool."""
    always, context = part != 1, np.flatnonzero(part == 1)
    always[np.flatnonzero(part == 0)[longest_question:]] = False
    room = max_length - always.sum()
    step = room - min(stride, room // 2)
    for first in range(0, max(len(context) - room, 0) + step, step):
        here = always.copy()
        here[context[first : first + room]] = True
        yield here


def _characters(context: str, gold: Mapping[str, Sequence]) -> tuple[int, int]:
    """The offsets of the first answer; (0, 0) if it is not at its place."""
    if not len(gold["text"]) or not len(gold["answer_start"]):
        return 0, 0
    text, start = gold["text"][0], gold["answer_start"][0]
    if start < 0 or context[start : start + len(text)] != text or not text.strip():
        return 0, 0
    start += len(text) - len(text.lstrip())  # A space may belong to the next word.
    return start, start + len(text.strip())


def best_answers(
    logits: np.ndarray, questions: Questions, *, n_best: int = 20, max_tokens: int = 30
) -> list[str]:
    """Reads the most likely answer to each question off its windows.

    In each window the tokens of the context with the `n_best` largest start logits are
    paired with those with the `n_best` largest end logits, where the end is not before
    the start and the answer at most `max_tokens` tokens long. Of all these pairs that
    with the largest sum wins, the first one found if several have it.

    Args:
      logits: (N, T, 2), start and end; what is beyond a window's own tokens is padding.
      questions: Q questions with N windows.
      n_best: as `max_tokens`, by default that of Hugging Face's recipe.
      max_tokens: the longest answer.

    Returns:
      Q texts, cut from the contexts; "" where there is no such pair.
    """
    best = np.full(len(questions.contexts), -np.inf)
    texts = [""] * len(best)
    for row, scores, characters in zip(
        questions.of_row, logits, questions.offsets, strict=True
    ):
        scores = np.array(scores[: len(characters)], np.float64)
        scores[characters[:, 0] < 0] = -np.inf
        starts, ends = np.argsort(-scores, axis=0, kind="stable")[:n_best].T
        sums = scores[starts, 0][:, None] + scores[ends, 1]
        length = ends - starts[:, None] + 1
        sums[(length < 1) | (length > max_tokens)] = -np.inf
        start, end = np.unravel_index(np.argmax(sums), sums.shape)
        if sums[start, end] > best[row]:
            best[row] = sums[start, end]
            begin, stop = characters[starts[start], 0], characters[ends[end], 1]
            texts[row] = questions.contexts[row][begin:stop]
    return texts


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the gold texts, up to `normalise`; else 0."""
    return float(normalise(prediction) in map(normalise, answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The F1 of the words shared with the gold text that shares most, in [0, 1].

    Words count as often as they occur; no shared word gives 0, even if both texts are
    empty once they are normalised. This and `exact_match` are the rule of the official
    script of SQuAD v1.1 (Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250).
    """
    words = collections.Counter(normalise(prediction).split())

    def against(answer):
        gold = collections.Counter(normalise(answer).split())
        return 2 * (words & gold).total() / max((words + gold).total(), 1)

    return max(map(against, answers), default=0.0)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case without ASCII punctuation, then without a, an, the; single spaces."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


METRICS = {"f1": f1, "exact_match": exact_match}  # from an answer and the gold texts
