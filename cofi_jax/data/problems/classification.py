"""One of several classes for each row."""

import decimal
import math
import re

import jax
import numpy as np

from cofi_jax.data.problems.base import Problem, WrongLabel
from cofi_jax.errors import reject

_WHOLE = r"[+-]?\d+"
_MOST_CLASSES = 1000  # more are numbers to be predicted, or a mistake


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
    is compared as a text, and 1.0 as 1: pandas makes floats of integers where another
    cell is empty.
    """

    name = "classification"
    own_metrics = ("accuracy", "matthews", "f1")
    names_classes = True
    problem_type = "single_label_classification"

    def num_outputs(self, labels):
        return len(labels)

    def class_names(self, cells, column):
        """The classes in sorted order, unless the cells look like values instead."""
        there = [cell for cell in cells if cell is not None and cell == cell]  # nan
        found = {_text(cell): cell for cell in there}
        words = {name for name in found if not re.fullmatch(_WHOLE, name)}
        if words < found.keys() and all(map(_is_nan, words)):  # It is a missing number.
            found = {name: cell for name, cell in found.items() if name not in words}
        whole = all(re.fullmatch(_WHOLE, name) for name in found)
        # Of any number of digits, where Python's integers have a limit.
        names = sorted(found, key=decimal.Decimal if whole else None)
        fractions = not whole and all(map(_is_number, found))
        nested = any(isinstance(cell, list | dict) for cell in found.values())
        if fractions or nested or not 2 <= len(names) <= _MOST_CLASSES:
            some = ", ".join(names[:5])
            legal = f"has {len(names)} different values ({some}, ...); must be 2 to "
            legal += f"{_MOST_CLASSES} classes, or set data.problem=regression"
            raise reject("data.label_column", column, legal)
        return tuple(names)

    def encode(self, cells, labels, *, numbered):
        """(N,) int32 class numbers."""
        texts = [_text(cell) for cell in cells]
        numbers = {name: number for number, name in enumerate(labels)}
        legal = f"must be among {', '.join(labels)}"
        # Names that are numbers themselves leave no doubt.
        if numbered and not any(re.fullmatch(_WHOLE, name) for name in labels):
            legal = f"must be an integer among {dict(enumerate(labels))}, or one of "
            legal += "these names (hub test splits hold only -1)"
            if not any(text in numbers for text in texts):
                numbers = {str(number): number for number in numbers.values()}
        for row, text in enumerate(texts):
            if cells[row] is None or text not in numbers:
                raise WrongLabel(row, legal)
        return np.array([numbers[text] for text in texts], np.int32)

    def decode(self, logits, examples, labels):
        scores = np.asarray(jax.nn.softmax(logits.astype(np.float32)))
        best = scores.argmax(-1)
        return [
            {"label": labels[k], "score": float(row[k])}
            for k, row in zip(best, scores, strict=True)
        ]


def _text(cell) -> str:
    return re.sub(rf"^({_WHOLE})\.0$", r"\1", str(cell))


def _is_nan(text) -> bool:
    return _is_number(text) and math.isnan(float(text))


def _is_number(text) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
