"""One of several classes for each row."""

import math
import re

import jax
import numpy as np

from cofi_jax.data.metrics import rates
from cofi_jax.data.problems import names as names_lib
from cofi_jax.data.problems.base import Problem, WrongLabel
from cofi_jax.errors import reject


class Classification(Problem):
    """A row has one class, the one with the largest of its C logits.

    The names of the classes may be numbers themselves, and so may the cells:

        names                   cells             each cell is
        ----------------------  ----------------  ------------------------------
        given: no, yes          yes, no, no       a name
        given: no, yes          1, 0, 0           a class number
        given: no, yes          yes, 0, no        a name; the second one is wrong
        given: 1, 2             1, 2, 2           a name
        read off rows, as 3, 7  7, 3, 3           a name

    The order of names that were given is somebody's choice, so it numbers them. A cell
    is compared as a text, see `names.text`.
    """

    name = "classification"
    own_metrics = ("accuracy", "matthews", "f1")
    names_classes = True
    problem_type = "single_label_classification"

    def check_metrics(self, metrics, labels):
        if "f1" in metrics and len(labels) != 2:
            legal = f"f1 is for two classes, there are {len(labels)}"
            raise reject("data.metrics", metrics, legal)

    def spelled(self, text):
        return text  # A class may be called 007.

    def num_outputs(self, labels):
        return len(labels)

    def class_names(self, cells, column):
        """The classes in sorted order, unless the cells look like values instead."""
        there = [cell for cell in cells if cell is not None and cell == cell]  # nan
        found = {names_lib.text(cell): cell for cell in there}
        words = {name for name in found if not re.fullmatch(names_lib.WHOLE, name)}
        if words < found.keys() and all(map(_is_nan, words)):  # It is a missing number.
            found = {name: cell for name, cell in found.items() if name not in words}
        names = names_lib.in_order(found)
        fractions = bool(words & found.keys()) and all(map(_is_number, found))
        nested = any(isinstance(cell, list | dict) for cell in found.values())
        if fractions or nested or not 2 <= len(names) <= names_lib.MOST:
            some = ", ".join(names[:5])
            legal = f"has {len(names)} different values ({some}, ...); must be 2 to "
            legal += f"{names_lib.MOST} classes, or set data.problem=regression"
            raise reject("data.label_column", column, legal)
        return tuple(names)

    def encode(self, cells, labels, *, numbered):
        """(N,) int32 class numbers."""
        texts = [names_lib.text(cell) for cell in cells]
        numbers, legal = names_lib.numbering(texts, labels, numbered=numbered)
        for row, text in enumerate(texts):
            if cells[row] is None or text not in numbers:
                raise WrongLabel(row, legal)
        return np.array([numbers[text] for text in texts], np.int32)

    def answers(self, logits, examples):
        return np.argmax(logits, -1).astype(np.int32)

    def decode(self, logits, examples, labels):
        scores = np.asarray(jax.nn.softmax(logits.astype(np.float32)))
        best = scores.argmax(-1)
        return [
            {"label": labels[k], "score": float(row[k])}
            for k, row in zip(best, scores, strict=True)
        ]

    def decision(self, answer):
        return answer["label"]

    def by_class(self, logits, examples, labels):
        given, gold = np.argmax(logits, -1), examples.labels
        counts = (
            np.bincount(numbers, minlength=len(labels))
            for numbers in (gold[given == gold], given, gold)
        )
        return rates(labels, *counts)


def _is_nan(text) -> bool:
    return _is_number(text) and math.isnan(float(text))


def _is_number(text) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
