"""Named entities: a label such as B-PER for each word of a text.

    words with labels -> tokens in windows -> logits of each word -> entities -> F1

The labels are those of BIO, IO, BILOU or BIOES: B and S (U) begin an entity of a type,
E (L) and S (U) end it, I goes on with it, and O is a part of none. A word is read off
the first of its tokens; the tokens that follow have no label.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from cofi_jax import errors
from cofi_jax.data import squad
from cofi_jax.data.batches import Examples
from cofi_jax.data.metrics import rates
from cofi_jax.data.problems import names as names_lib
from cofi_jax.data.problems.base import Problem, WrongLabel, check_room

_STRIDE = 128  # tokens that a window repeats, but at most half of it, as for questions
_TAG = re.compile(r"O|[BILUES](-.+)?")
_LEGAL = "O, or a letter of BIO, IO, BILOU or BIOES and a type, as in B-PER and I-PER"
_SAME = {"L": "E", "U": "S"}  # BILOU's letters for what BIOES calls so


@dataclasses.dataclass(frozen=True, eq=False)
class Sentences:
    """The Q texts that N windows were cut from, and the M words of all of them."""

    contexts: list[str]  # Q texts
    of_row: np.ndarray  # (N,) int32: the text of each window
    names: tuple[str, ...]  # those of the classes
    text: np.ndarray  # (M,) int: the text of each word
    places: np.ndarray  # (M, 2) int32: its first character, and the one after its last
    labels: np.ndarray  # (M,) int32: its class, 0 where that is not known
    row: np.ndarray  # (M,) int: the window that it is read in, -1 where it has no token
    token: np.ndarray  # (M,) int: its first token there


class Entities(Problem):
    """Each word has a class; an entity is a run of words with classes of one type.

    A text is a list of words, and its label a list of as many names of classes. The
    texts of `pipeline` are whole; they are cut into words by `_words`.
    """

    name = "entities"
    head = "every"
    own_metrics = ("f1", "precision", "recall")
    names_classes = True
    text_form = "a list of words"
    most_columns = 1
    auto_model = "TokenClassification"
    pipeline_tag = "token-classification"
    output_class = "TokenClassifierOutput"
    example = ("Ada Lovelace lived in London.", "It is worth seeing.")

    def check_metrics(self, metrics, labels):
        if "O" not in labels or not all(map(_TAG.fullmatch, labels)):
            legal = f"must have O among them, and each must be {_LEGAL}"
            raise errors.reject("data.labels", tuple(labels), legal)

    def texts(self, cell):
        words = isinstance(cell, list) and all(isinstance(word, str) for word in cell)
        return cell if words else None

    def check_labels(self, texts, cells):
        for row, (words, labels) in enumerate(zip(texts, cells, strict=True)):
            if not isinstance(labels, list):
                raise WrongLabel(row, "must be a list of labels, one for each word")
            if len(labels) != len(words):
                legal = f"these are {len(labels)} labels, must be one for each of the "
                raise WrongLabel(row, f"{legal}{len(words)} words")

    def named(self, cell):
        return cell if isinstance(cell, list) else ()

    def num_outputs(self, labels):
        return len(labels)

    def class_names(self, cells, column):
        """O, and of each type all labels of the scheme, whether they occur or not."""
        found = {names_lib.text(name) for cell in cells for name in self.named(cell)}
        tags = {name for name in found if _TAG.fullmatch(name)} - {"O"}
        letters, scheme = {name[0] for name in tags}, "I"
        if letters != {"I"}:
            ends = [pair for pair in ("LU", "ES") if letters & {*pair}]
            scheme = "".join(["BI", *ends])
        types = sorted({name[1:] for name in tags})
        names = ["O", *(letter + kind for kind in types for letter in scheme)]
        if not 2 <= len(names) <= names_lib.MOST:
            some = ", ".join(sorted(found)[:5])
            legal = f"has {len(types)} types of entities in its lists ({some}); the "
            legal += f"lists must hold labels, each {_LEGAL}; integers need the names "
            legal += "of all labels, as --config.data.labels=O,B-PER,I-PER"
            raise errors.reject("data.label_column", column, legal)
        return tuple(names)

    def encode(self, cells, labels, *, numbered):
        """(N,) arrays of int32 class numbers, one for each word.

        An I- that begins an entity becomes a B-, where there is such a class.
        """
        rows = [[*map(names_lib.text, cell)] for cell in cells]
        texts = {name for names in rows for name in names}
        numbers, legal = names_lib.numbering(texts, labels, numbered=numbered)
        for row, names in enumerate(rows):
            for name in names:
                if name not in numbers:
                    tag = numbered or _TAG.fullmatch(name)
                    legal = legal if tag else f"must be {_LEGAL}"
                    raise WrongLabel(row, f"not {name!r}: each {legal}")
        sizes = [*map(len, rows)]
        found = np.array([numbers[name] for names in rows for name in names], np.int32)
        text = np.repeat(np.arange(len(rows)), sizes)
        at = {name: number for number, name in enumerate(labels)}
        first = [at.get("B" + n[1:], k) if n[0] == "I" else k for n, k in at.items()]
        mended = np.where(_begins(found, text, labels), np.array(first)[found], found)
        if (lost := mended != found).any():
            errors.warn(
                f"{lost.sum()} labels that begin with I- have no B- before them, as in "
                f"row {text[lost.argmax()]} (the first is 0) of {len(rows)}; they are "
                "read as B-"
            )
        arrays = np.empty(len(rows), object)
        ends = np.cumsum(sizes)
        for row, (end, size) in enumerate(zip(ends, sizes, strict=True)):
            arrays[row] = mended[end - size : end].astype(np.int32)
        return arrays

    def unlabelled(self, count):
        return np.full(count, None, object)

    def answers(self, logits, examples):
        texts, found = examples.uncut, self.unlabelled(len(examples.uncut.contexts))
        classes = np.int32(_read(logits, texts)[0])
        ends = np.searchsorted(texts.text, np.arange(1, len(found)))
        found[:] = np.split(classes, ends)
        return found

    def tokenise(self, columns, task, tokenizer, *, training):
        """Makes as many windows of each text as it takes.

        Where windows overlap, a word is read in the one that shows most of what is
        around it, and only there it has a label.

        Returns:
          N windows, whose labels are (N, `task.max_length`) int16: at the first token
          of a word its class, and -1 elsewhere.
        """
        del training
        _check_fast(tokenizer)
        check_room(tokenizer, task.max_length, pair=False)
        cut = [_words(cell) for cell in columns[task.columns[0]]]
        contexts, places = [text for text, _ in cut], [words for _, words in cut]
        ids, types, of_row, seats = [], [], [], []
        for number, tokens in enumerate(_tokenise(tokenizer, contexts)):
            inside = np.array([part == 0 for part in tokens.sequence_ids], bool)
            first = _first_tokens(np.array(tokens.offsets), inside, places[number])
            part = np.where(inside, 1, np.nan)
            windows = [*squad.cut(part, task.max_length, 0, _STRIDE)]
            window, token = _seats(first, inside, windows)
            seats.append((np.where(window < 0, -1, window + len(ids)), token))
            ids += [np.array(tokens.ids, np.int32)[here] for here in windows]
            types += [np.array(tokens.type_ids, np.int32)[here] for here in windows]
            of_row += [number] * len(windows)
        known = [gold for gold in columns[task.label_column] if gold is not None]
        sizes = [*map(len, places)]
        row, token = np.concatenate(seats, axis=1)
        uncut = Sentences(
            contexts=contexts,
            of_row=np.array(of_row, np.int32),
            names=task.labels,
            text=np.repeat(np.arange(len(sizes)), sizes),
            places=np.concatenate(places),
            labels=np.concatenate(known) if known else np.zeros(sum(sizes), np.int32),
            row=row,
            token=token,
        )
        read = row >= 0
        labels = np.full((len(ids), task.max_length), -1, np.int16)
        labels[row[read], token[read]] = uncut.labels[read]
        if known and not read.all():
            errors.warn(
                f"{(~read).sum()} words have no token of their own, as in row "
                f"{uncut.text[read.argmin()]} (the first is 0) of {len(sizes)}; they "
                "are taken for O"
            )
        return Examples(ids, types, labels, tokenizer.pad_token_id, uncut)

    def choices(self, logits, batch):
        return logits.reshape(-1, logits.shape[-1])

    def targets(self, batch):
        return jnp.maximum(_labels(batch), 0).reshape(-1)

    def weights(self, batch):
        """Each word counts once, whatever text it is in, as in transformers."""
        return ((_labels(batch) >= 0) * batch["weight"][:, None]).reshape(-1)

    def decode(self, logits, examples, labels):
        texts = examples.uncut
        classes, chances = _read(logits, texts)
        kinds = _kinds(labels)
        answers = [{"entities": []} for _ in texts.contexts]
        for first, last, kind in _entities(classes, texts.text, labels):
            number = texts.text[first]
            start, stop = int(texts.places[first, 0]), int(texts.places[last, 1])
            answers[number]["entities"].append(
                {
                    "type": kinds[kind],
                    "text": texts.contexts[number][start:stop],
                    "start": start,
                    "end": stop,
                    "score": float(chances[first : last + 1].mean()),
                }
            )
        return answers

    def decision(self, answer):
        return [(x["type"], x["start"], x["end"]) for x in answer["entities"]]

    def per_example(self, logits, examples, metrics):
        return {}

    def by_class(self, logits, examples, labels):
        kinds = _kinds(labels)
        counts = (
            np.bincount(found[:, 2], minlength=len(kinds))
            for found in _compared(logits, examples.uncut)
        )
        return rates(kinds, *counts)

    def scorer(self, logits, examples, metrics):
        """The metrics are those of all entities together; an example is a text."""
        texts = examples.uncut
        count = len(texts.contexts)
        counts = [
            np.bincount(texts.text[found[:, 0]], minlength=count)
            for found in _compared(logits, texts)
        ]

        def score(chosen):
            sums = ([each[chosen].sum()] for each in counts)
            found = rates(["all"], *sums)["all"]
            return {name: found[name] for name in metrics}

        return count, score


def _labels(batch):
    """(B, T) the batch's labels, which are as long as its longest row may be."""
    return batch["labels"][:, : batch["attention_mask"].shape[1]]


# Words and tokens


def _words(cell: str | Sequence[str]) -> tuple[str, np.ndarray]:
    """A text and the places of its words, (W, 2) int32 as in `Sentences`.

    Words that were given are joined by spaces. A whole text is cut as is usual where
    texts are labelled: at spaces, and at signs such as brackets and commas, each of
    which is a word. Points, hyphens and the like between letters, and commas between
    digits, do not part words. Each Chinese character and each kana is a word.
    """
    if isinstance(cell, str):
        kinds = "".join(map(_kind_of_letter, cell))
        places = [match.span() for match in _WORD.finditer(kinds)]
        return cell, np.array(places, np.int32).reshape(-1, 2)
    sizes = np.array([*map(len, cell)], np.int32)
    stops = np.cumsum(sizes + 1, dtype=np.int32) - 1
    return " ".join(cell), np.stack([stops - sizes, stops], -1)


_WORD = re.compile(r"c|[ld]+(?:j[ld]+|(?<=d),d[ld]*)*|[^s]")
_JOINING = "-\N{EN DASH}.'\N{RIGHT SINGLE QUOTATION MARK}&/@"


def _kind_of_letter(letter: str) -> str:
    """What `_WORD` calls it: c, d, j, l, o, s, or a comma."""
    if letter == ",":
        return letter
    if letter in _JOINING:
        return "j"
    category = unicodedata.category(letter)
    if letter.isspace() or category == "Cc":
        return "s"
    if "\u3040" <= letter <= "\u30ff" or "\u3400" <= letter <= "\u9fff":
        return "c"  # kana and Chinese characters
    if category[0] in "LM" or category == "Cf":  # marks, and what joins letters
        return "l"
    return "d" if category[0] == "N" else "o"


def _check_fast(tokenizer: Any) -> None:
    """Raises UserError where words could not be found in the tokens."""
    if not getattr(tokenizer, "is_fast", False):
        legal = "must come with a fast tokenizer (tokenizer.json) for this task"
        raise errors.reject("model.path", tokenizer.name_or_path, legal)


def _tokenise(tokenizer: Any, contexts: Sequence[str]) -> Iterator[Any]:
    """Each text as an Encoding of the library tokenizers, not cut."""
    for first in range(0, len(contexts), 1000):  # not all at once: lists are large
        yield from tokenizer(
            contexts[first : first + 1000],
            truncation=False,
            padding=False,
            verbose=False,  # longer than the model's longest: cut later
        ).encodings


def _first_tokens(
    offsets: np.ndarray, inside: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """(W,) the first token of each word, -1 where it has none.

    A token is of the word that its last character is in: some tokenizers count the
    space before a word as a part of its first token.

    Args:
      offsets: (T, 2) the first character of each token, and the one after its last.
      inside: (T,) bool, whether a token is one of the text.
      places: (W, 2) the same for the words, in their order.
    """
    found = np.full(len(places), -1)
    if not len(places):
        return found
    last = offsets[:, 1] - 1
    word = np.searchsorted(places[:, 0], last, side="right") - 1
    held = inside & (offsets[:, 0] <= last) & (word >= 0) & (last < places[word, 1])
    tokens = np.flatnonzero(held)
    words, at = np.unique(word[tokens], return_index=True)
    found[words] = tokens[at]
    return found


def _seats(
    first: np.ndarray, inside: np.ndarray, windows: Iterable[np.ndarray]
) -> np.ndarray:
    """(2, W) the window that each word is read in and its token there, or -1 and -1.

    It is the window with the most tokens before or behind the word, whichever is less.

    Args:
      first: (W,) the first token of each word, or -1.
      inside: (T,) bool, whether a token is one of the text.
      windows: (T,) bool, the tokens of each window.
    """
    found, most = np.full((2, len(first)), -1), np.full(len(first), -1)
    for number, here in enumerate(windows):
        shown = np.flatnonzero(here & inside)
        if not len(shown):
            continue
        around = np.minimum(first - shown[0], shown[-1] - first)
        better = (first >= 0) & (around > most)
        most[better] = around[better]
        found[0, better] = number
        found[1, better] = (np.cumsum(here) - 1)[first[better]]
    return found


# Classes and entities


def _read(logits: np.ndarray, texts: Sentences) -> tuple[np.ndarray, np.ndarray]:
    """(M,) the most likely class of each word, O without a token; and its chance."""
    read = texts.row >= 0
    chances = np.zeros((len(read), len(texts.names)))
    chances[:, texts.names.index("O")] = 1
    words = np.float64(logits[texts.row[read], texts.token[read]])
    chances[read] = softmax(words, axis=-1)
    return chances.argmax(-1), chances.max(-1)


def _kinds(names: Sequence[str]) -> list[str]:
    """The types of entities that the classes have."""
    return sorted({name[2:] or "_" for name in names if name != "O"})


def _begins(classes: np.ndarray, text: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """(M,) bool, whether an entity begins with each word, by seqeval's rule.

    A word that is a part of one begins one where its letter says so, where the word
    before it in the text is O, ends an entity or is of another type, or where there is
    none.

    Args:
      classes: (M,) those of the words.
      text: (M,) the texts that they are in.
      names: those of the classes.
    """
    letters = np.array([_SAME.get(name[0], name[0]) for name in names])[classes]
    kinds = np.array([name[1:] for name in names])[classes]
    goes_on = np.zeros(len(classes), bool)
    goes_on[1:] = (
        (text[1:] == text[:-1])
        & (kinds[1:] == kinds[:-1])
        & np.isin(letters[1:], ("I", "E"))
        & np.isin(letters[:-1], ("B", "I"))
    )
    return (letters != "O") & ~goes_on


def _entities(
    classes: np.ndarray, text: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """(E, 3) the first and the last word of each entity, and the place of its type.

    The arguments are those of `_begins`; the places are those in `_kinds`.
    """
    begins = _begins(classes, text, names)
    inside = classes != names.index("O")
    ends = inside & np.append((begins | ~inside)[1:], True)
    kinds = _kinds(names)
    kind = np.array([0 if n == "O" else kinds.index(n[2:] or "_") for n in names])
    first, last = np.flatnonzero(begins), np.flatnonzero(ends)
    return np.stack([first, last, kind[classes[first]]], -1)


def _compared(
    logits: np.ndarray, texts: Sentences
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The entities that are given and right, all that are given, and the right ones."""
    classes, _ = _read(logits, texts)
    given = _entities(classes, texts.text, texts.names)
    gold = _entities(texts.labels, texts.text, texts.names)
    there = np.full((len(classes), 2), -1)  # of the one that begins with each word
    there[gold[:, 0]] = gold[:, 1:]
    return given[(there[given[:, 0]] == given[:, 1:]).all(-1)], given, gold
