"""Any number of several labels for each row."""

import ast
import json
import warnings
from collections.abc import Sequence

import jax
import numpy as np
import optax
from scipy.special import expit, logit

from cofi_jax.data.metrics import rates
from cofi_jax.data.problems import names as names_lib
from cofi_jax.data.problems.base import Problem, WrongLabel
from cofi_jax.errors import reject


class MultiLabel(Problem):
    """A row has each label whose probability is above the label's threshold.

    The probability is the sigmoid of the label's logit. The thresholds are chosen on
    training rows, by `fit`; before that they are a half.

    The labels of a row are the list in its cell, which may be empty. Or each label has
    a column of its own, which holds 0 or 1, or another model's probability: then
    `data.label_column` is the names of these columns with commas between them. The
    probabilities are what is learnt; for metrics, a row has the labels above a half.
    """

    name = "multilabel"
    own_metrics = ("micro_f1", "macro_f1")
    names_classes = True
    fits = True
    problem_type = "multi_label_classification"

    def __init__(self, thresholds: Sequence[float] = ()):
        """The thresholds of the labels in their order; () for a half for all."""
        if thresholds:
            self.settings = {"thresholds": [*thresholds]}

    def label_columns(self, column):
        return tuple(column.split(","))

    def spelled(self, text):
        """A list as JSON or Python writes it, or a number."""
        try:  # Its escapes are others than Python's.
            return json.loads(text)
        except (RecursionError, ValueError):
            pass
        with warnings.catch_warnings():  # of escapes that Python does not know
            warnings.simplefilter("ignore")
            try:
                return ast.literal_eval(text.strip())
            except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
                return text

    def named(self, cell):
        return cell if isinstance(cell, list | dict) else ()

    def num_outputs(self, labels):
        return len(labels)

    def class_names(self, cells, column):
        """The columns of the labels, or what stands in the lists, in sorted order."""
        if isinstance(cells[0], dict):
            names = [*map(names_lib.text, cells[0])]
        else:
            found = [name for cell in cells for name in map(_text, self.named(cell))]
            names = names_lib.in_order(name for name in found if name is not None)
        if not 2 <= len(names) <= names_lib.MOST:
            some = ", ".join(names[:5])
            legal = f"has {len(names)} different labels in its lists ({some}); must "
            legal += f"hold lists of 2 to {names_lib.MOST}, or be the "
            legal += "names of as many columns of 0 and 1, with commas between them"
            raise reject("data.label_column", column, legal)
        return tuple(names)

    def encode(self, cells, labels, *, numbered):
        """(N, C) float32, 1 where a row has a label and else 0, or probabilities."""
        rows = [_chances(row, cell) for row, cell in enumerate(cells)]
        texts = {name for names in rows for name in names}
        numbers, legal = names_lib.numbering(texts, labels, numbered=numbered)
        found = np.zeros((len(cells), len(labels)), np.float32)
        for row, names in enumerate(rows):
            for name, chance in names.items():
                if name not in numbers:
                    raise WrongLabel(row, f"each label {legal}")
                found[row, numbers[name]] = chance
            if isinstance(cells[row], dict) and len(names) < len(labels):
                there = {numbers[name] for name in names}
                lacking = [x for k, x in enumerate(labels) if k not in there]
                legal = f"there is none for {', '.join(lacking[:5])}"
                raise WrongLabel(row, f"each label needs a value, {legal}")
        return found

    def answers(self, logits, examples):
        return np.float32(self._margins(logits) > 0)

    def loss(self, logits, batch):
        losses = optax.sigmoid_binary_cross_entropy(logits, batch["labels"])
        return self.mean(losses.mean(-1), batch)

    def distill(self, student, teacher, batch, temperature):
        """T^2 times the KL divergence of the labels, which are independent choices.

        That of a row is the sum of those of its labels.
        """
        p, q = teacher / temperature, student / temperature
        divergence = sum(
            jax.nn.sigmoid(sign * p)
            * (jax.nn.log_sigmoid(sign * p) - jax.nn.log_sigmoid(sign * q))
            for sign in (1, -1)
        )
        return temperature**2 * self.mean(divergence.sum(-1), batch)

    def fit(self, logits, examples, metrics):
        """Chooses the thresholds at which the metric is largest, of a hundredth each.

        The macro F1 is so where the F1 of each label is. The micro F1 is a ratio of two
        sums over the labels, 2 * right / (given + gold), and Dinkelbach's method finds
        the largest: the largest sum of 2 * right - F * given, label by label, has a
        larger ratio than F, until F is the largest of all. Of several thresholds that
        are as good, the one nearest to a half is chosen.
        """
        chances, gold = expit(np.float64(logits)), examples.labels > 0.5
        tried = sorted(np.arange(1, 100) / 100, key=lambda x: abs(x - 0.5))
        given = np.array([(chances > x).sum(0) for x in tried])  # (99, C)
        right = np.array([((chances > x) & gold).sum(0) for x in tried])
        sizes, labels = given + gold.sum(0), np.arange(gold.shape[1])
        best = np.argmax(2 * right / np.maximum(sizes, 1), axis=0)
        if metrics[0] == "micro_f1":
            f1, more = -1.0, 0.0
            while more > f1:
                f1 = more
                best = np.argmax(2 * right - f1 * given, axis=0)
                chosen = best, labels
                more = 2 * right[chosen].sum() / max(sizes[chosen].sum(), 1)
        return MultiLabel([float(tried[place]) for place in best])

    def with_settings(self, settings, labels):
        if not settings:
            return self
        thresholds = settings["thresholds"]
        if len(thresholds) != len(labels) or not all(0 < x < 1 for x in thresholds):
            raise ValueError("must have a threshold between 0 and 1 for each label")
        return MultiLabel(thresholds)

    def describe(self, labels):
        said = "A text has the labels whose probability, the sigmoid of the logit, is "
        if not self.settings:
            return f"{said}above 0.5."
        pairs = zip(labels, self.settings["thresholds"], strict=True)
        each = ", ".join(f"{name} {threshold:g}" for name, threshold in pairs)
        return f"{said}above its threshold: {each}."

    def decode(self, logits, examples, labels):
        answers = []
        for row, given in zip(logits, self._margins(logits) > 0, strict=True):
            names = [labels[number] for number in np.flatnonzero(given)]
            chances = expit(np.float64(row[given])).tolist()
            answers.append({"labels": names, "scores": chances})
        return answers

    def decision(self, answer):
        return answer["labels"]

    def per_example(self, logits, examples, metrics):
        return {}

    def by_class(self, logits, examples, labels):
        given, gold = self._margins(logits) > 0, examples.labels > 0.5
        counts = (each.sum(0) for each in (given & gold, given, gold))
        return rates(labels, *counts)

    def scorer(self, logits, examples, metrics):
        return super().scorer(self._margins(logits), examples, metrics)

    def _margins(self, logits):
        """(N, C) logits less those of the thresholds; a label above 0 is given."""
        return np.float64(logits) - logit(self.settings.get("thresholds", 0.5))


def _chances(row, cell):
    """The probability of each label of a row, by name: 1 for all that a list has."""
    if isinstance(cell, dict):
        if not all(isinstance(x, int | float) and 0 <= x <= 1 for x in cell.values()):
            raise WrongLabel(row, "each must be 0 or 1, or a probability between them")
        return {names_lib.text(name): chance for name, chance in cell.items()}
    if not isinstance(cell, list):
        raise WrongLabel(row, "must be a list of labels, [] for none")
    return dict.fromkeys(map(_text, cell), 1)


def _text(name):
    return None if name is None else names_lib.text(name)
