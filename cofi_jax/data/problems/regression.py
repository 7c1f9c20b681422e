"""One number for each row."""

import jax.numpy as jnp
import numpy as np

from cofi_jax.data.problems.base import Problem, WrongLabel


class Regression(Problem):
    """The one logit of a row is the prediction of its value."""

    name = "regression"
    own_metrics = ("spearman", "pearson")
    problem_type = "regression"

    def num_outputs(self, labels):
        return 1

    def encode(self, cells, labels, *, numbered):
        most = float(np.finfo(np.float32).max)
        for row, cell in enumerate(cells):
            real = isinstance(cell, int | float) and not isinstance(cell, bool)
            if not (real and abs(cell) <= most):  # which is false for nan
                raise WrongLabel(row, "must be a finite number")
        return np.array(cells, np.float32)

    def answers(self, logits, examples):
        return np.float32(logits[:, 0])

    def loss(self, logits, batch):
        return self.distill(logits, batch["labels"][:, None], batch, 1.0)

    def distill(self, student, teacher, batch, temperature):
        """The mean squared error: the KL divergence of a single logit would be 0."""
        squares = jnp.square(student - teacher)[:, 0]
        return self.mean(squares, batch)

    def decode(self, logits, examples, labels):
        return [{"value": float(value)} for (value,) in logits]
