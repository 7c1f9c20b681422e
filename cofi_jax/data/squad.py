"""Extractive question answering: rows of SQuAD to windows, logits back to answers.

    windows(rows) -> logits of each token as a start and as an end -> score

A context that is too long for the model is cut into overlapping windows, each of them
with the question in front. The answer is a span of the context, the best one of those
of all windows.
"""

import collections
import dataclasses
import itertools
import re
import string
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
    first gold answer, and (0, 0) where the window does not hold all of these. Where a
    tokenizer's offsets leave out characters, see `_mend`; what cannot be mended is
    counted, and said on stderr.

    Args:
      rows: columns `question` and `context` of text and `answers`, each of which is
        `{"text": [...], "answer_start": [...]}`, the latter counted in characters, or
        None where the answer is not known.
      tokenizer: a fast one of Hugging Face's transformers, of any template.
      max_length: tokens of a window at most, special ones included.
      stride: tokens of the context that a window repeats from the one before it; at
        most half of those it has room for.
      training: leave out, with a warning, a row without an answer or whose first one is
        not found in the tokens at its place. Else each row is a question.

    Returns:
      N windows, those of a question together, whose labels are (N, 2) int32.

    Raises:
      UserError: the tokenizer is not a fast one; no token of a context would fit; a
        question has no answer, and it is not training.
    """
    longest_question = _longest_question(tokenizer, max_length)
    asked, contexts, golds = (rows[c][:] for c in ("question", "context", "answers"))
    if not training:
        _check_answerable(golds)
    ids, types, labels, of_row, offsets = [], [], [], [], []
    kept = []  # rows
    doubts: dict[str, list[int]] = collections.defaultdict(list)
    for row, tokens in enumerate(_tokenise(tokenizer, asked, contexts)):
        # The part is 0 for the question, 1 for the context, and nan for neither.
        part = np.array(tokens.sequence_ids, np.float32)
        places = np.array(tokens.offsets, np.int32).reshape(-1, 2)
        places[part == 1] = _mend(places[part == 1], contexts[row])
        places[part != 1] = -1
        start, stop = _characters(contexts[row], golds[row])
        answer = np.flatnonzero((places[:, 0] < stop) & (places[:, 1] > start))
        if doubt := _doubt(contexts[row], golds[row], (start, stop), places[answer]):
            doubts[doubt].append(row)
            if training and doubt != _WIDER:
                continue
        for here in cut(part, max_length, longest_question, stride):
            label = [0, 0]
            if len(answer) and here[answer].all():
                label = [here[:i].sum() for i in answer[[0, -1]]]
            ids.append(np.array(tokens.ids, np.int32)[here])
            types.append(np.array(tokens.type_ids, np.int32)[here])
            labels.append(label)
            of_row.append(len(kept))
            offsets.append(places[here])
        kept.append(row)
    _warn(doubts, len(contexts), training)
    questions = Questions(
        [contexts[row] for row in kept],
        [list((golds[row] or _UNKNOWN)["text"]) for row in kept],
        np.array(of_row, np.int32),
        offsets,
    )
    labels = np.array(labels, np.int32).reshape(-1, 2)
    return Examples(ids, types, labels, tokenizer.pad_token_id, questions)


def _longest_question(tokenizer, max_length):
    """The most tokens of a question in windows of this length, or a UserError."""
    if not getattr(tokenizer, "is_fast", False):
        legal = "must come with a fast tokenizer (tokenizer.json) for this task"
        raise errors.reject("model.path", tokenizer.name_or_path, legal)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length <= special:
        legal = f"must be above {special}, the special tokens of a question"
        raise errors.reject("data.max_length", max_length, legal)
    return min(LONGEST_QUESTION, (max_length - special) // 2)


_UNKNOWN = {"text": (), "answer_start": ()}  # the answer to a question of `pipeline`

# What can be wrong with an answer.
_NONE = "they have no answer"
_MISPLACED = "their answer is not in their context at the place that is given for it"
_LOST = "the text of their tokens, by the tokenizer's offsets, lacks a part of it"
_WIDER = "the tokens of their answer hold other words, too, by the tokenizer's offsets"
_MANY = 0.05  # the share of wider answers from which it is no matter of single words


def _check_answerable(golds: Sequence[Mapping[str, Sequence] | None]) -> None:
    """Raises UserError where a question has no answer that could be found."""
    known = [row for row, gold in enumerate(golds) if gold is not None]
    none = [row for row in known if not any(map(str.strip, golds[row]["text"]))]
    if none:
        legal = f"{len(none)} of {len(golds)} questions have no answer, as in row "
        legal += f"{none[0]} (the first is 0); unanswerable questions, as in SQuAD v2, "
        legal += "cannot be scored here: leave them out"
        raise errors.reject("answers", golds[none[0]], legal)


def _doubt(context, gold, span, places):
    """What is wrong with an answer, given the offsets (n, 2) of its tokens; or ""."""
    if gold is None:
        return ""
    if not any(map(str.strip, gold["text"])):
        return _NONE
    start, stop = span
    if start == stop:
        return _MISPLACED
    if not len(places) or places[0, 0] > start or places[-1, 1] < stop:
        return _LOST
    held = normalise(context[places[0, 0] : places[-1, 1]])
    return "" if held == normalise(context[start:stop]) else _WIDER


def _warn(doubts: Mapping[str, Sequence[int]], rows: int, training: bool) -> None:
    """Says on stderr how many of the answers are in doubt."""
    for doubt, where in doubts.items():
        if doubt == _WIDER and len(where) < _MANY * rows:
            continue
        left_out = " skipped" if training and doubt != _WIDER else ""
        first = f"as in row {where[0]} (the first is 0) of {rows}"
        errors.warn(f"{len(where)} questions{left_out}: {doubt}, {first}")


def _mend(places: np.ndarray, context: str) -> np.ndarray:
    """Offsets that leave out no visible character between tokens.

    Some tokenizers count a space before a word that is not there, and trim the word's
    first letter for it. Characters between two tokens go to the second one, or to the
    first one if a space follows them.

    Args:
      places: (T, 2) offsets of the context's tokens.
      context: the context.

    Returns:
      (T, 2) offsets; the same where only spaces and invisible characters are between
      tokens.
    """
    mended = np.append(places, np.full((1, 2), len(context), np.int32), axis=0)
    reached = np.append(0, np.maximum.accumulate(places[:, 1]))
    for token in np.flatnonzero(mended[:, 0] > reached):
        gap = context[reached[token] : mended[token, 0]]
        if gap.isspace():
            continue
        ends = reversed(gap), gap
        before, after = (len([*itertools.takewhile(_visible, end)]) for end in ends)
        if token and (after < len(gap) or token == len(places)):
            mended[token - 1, 1] += after
        mended[token, 0] -= before
    return mended[:-1]


def _visible(character: str) -> bool:
    return character.isprintable() and not character.isspace()


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


def cut(
    part: np.ndarray, max_length: int, longest_question: int, stride: int
) -> Iterator[np.ndarray]:
    """For each window which of the T tokens it holds, (T,) bool.

    Args:
      part: (T,) float, 1 for tokens of the text that is cut, 0 for those of a question
        before it, nan for special ones.
      max_length: as `stride`, see `windows`.
      longest_question: the tokens of the question that every window holds.
      stride: the tokens that a window repeats.
    """
    always, context = part != 1, np.flatnonzero(part == 1)
    always[np.flatnonzero(part == 0)[longest_question:]] = False
    room = max_length - always.sum()
    step = room - min(stride, room // 2)
    for first in range(0, max(len(context) - room, 0) + step, step):
        here = always.copy()
        here[context[first : first + room]] = True
        yield here


def _characters(context: str, gold: Mapping[str, Sequence] | None) -> tuple[int, int]:
    """The offsets of the first answer; (0, 0) if it is not at its place.

    Blanks around it do not count: a space may belong to the next word. They may have
    been removed from the answer alone, or from its place.
    """
    texts, starts = (list((gold or _UNKNOWN)[key]) for key in ("text", "answer_start"))
    if not texts or not starts or not (text := texts[0].strip()) or starts[0] < 0:
        return 0, 0
    place = starts[0]
    blanks = len(context[place:]) - len(context[place:].lstrip())
    for start in (place + texts[0].index(text), place, place + blanks):
        if context.startswith(text, start):
            return start, start + len(text)
    return 0, 0


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
