"""One of several classes for each row."""

import dataclasses
import math
import re
import sys

import jax
import numpy as np
import optax
from scipy.special import softmax

from cofi_jax.data.batches import Examples
from cofi_jax.data.metrics import rates
from cofi_jax.data.problems import names as names_lib
from cofi_jax.data.problems.base import Problem, WrongLabel
from cofi_jax.errors import reject

# A probability may be so far outside of [0, 1] by the rounding of what computed it.
_BEYOND = 1e-6
_ROUNDING = 0.1  # that the sum of probabilities may be off, written with few digits


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

    A cell may also be a list of what another model says of each class, in the order of
    the names, which must be given: probabilities, or logits where some are not in
    [0, 1]. They are what is learnt, and the largest one is the class for the metrics.
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
            if nested:
                legal += (
                    "; lists of a number for each class need data.labels, their names"
                )
            raise reject("data.label_column", column, legal)
        return tuple(names)

    def encode(self, cells, labels, *, numbered):
        """(N,) int32 class numbers, or (N, C) float32 probabilities."""
        if any(isinstance(cell, list) for cell in cells):
            return _probabilities(cells, len(labels))
        texts = [names_lib.text(cell) for cell in cells]
        numbers, legal = names_lib.numbering(texts, labels, numbered=numbered)
        for row, text in enumerate(texts):
            if cells[row] is None or text not in numbers:
                raise WrongLabel(row, legal)
        return np.array([numbers[text] for text in texts], np.int32)

    def loss(self, logits, batch):
        labels = batch["labels"]
        if labels.ndim == 1:
            return super().loss(logits, batch)
        return self.mean(optax.softmax_cross_entropy(logits, labels), batch)

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

    def per_example(self, logits, examples, metrics):
        return super().per_example(logits, _with_classes(examples), metrics)

    def scorer(self, logits, examples, metrics):
        return super().scorer(logits, _with_classes(examples), metrics)

    def by_class(self, logits, examples, labels):
        given, gold = np.argmax(logits, -1), _with_classes(examples).labels
        counts = (
            np.bincount(numbers, minlength=len(labels))
            for numbers in (gold[given == gold], given, gold)
        )
        return rates(labels, *counts)


def _probabilities(cells, count) -> np.ndarray:
    """(N, C) float32 probabilities of lists of C numbers, all of them of one kind."""
    for row, cell in enumerate(cells):
        numbers = cell if isinstance(cell, list) else []
        if len(numbers) != count or not all(map(_is_finite, numbers)):
            legal = f"must be a list of {count} finite numbers, one for each class, as "
            raise WrongLabel(row, f"{legal}other labels are lists")
    found = np.array(cells, np.float64)
    if (abs(found - 0.5) > 0.5 + _BEYOND).any():
        return np.float32(softmax(found, -1))
    found = found.clip(0, 1)
    sums = found.sum(-1)
    if (wrong := abs(sums - 1) > _ROUNDING).any():
        row = int(wrong.argmax())
        legal = (
            f"the sum is {sums[row]:.3g}; must be probabilities, or logits of which "
        )
        raise WrongLabel(row, f"{legal}some are not in [0, 1]")
    return np.float32(found / sums[:, None])


def _is_finite(number) -> bool:
    """Whether it is a number that float64 holds; JSON has integers that it does not."""
    most = sys.float_info.max
    return isinstance(number, int | float) and abs(number) <= most  # false for nan


def _with_classes(examples) -> Examples:
    """The examples with the most likely classes where labels are probabilities."""
    if examples.labels.ndim == 1:
        return examples
    return dataclasses.replace(examples, labels=examples.labels.argmax(-1))


def _is_nan(text) -> bool:
    return _is_number(text) and math.isnan(float(text))


def _is_number(text) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
