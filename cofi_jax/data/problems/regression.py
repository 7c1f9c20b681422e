"""One number for each row."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.data.batches import Examples
from cofi_jax.data.problems.base import Problem, WrongLabel, mean_over_rows
from cofi_jax.models.bert import Batch


class Regression(Problem):
    """The one logit of a row is the prediction of its value."""

    name = "regression"
    own_metrics = ("spearman", "pearson")
    problem_type = "regression"

    def num_outputs(self, labels: Sequence[str]) -> int:
        return 1

    def encode(
        self, cells: Sequence[Any], labels: Sequence[str], *, numbered: bool
    ) -> np.ndarray:
        most = float(np.finfo(np.float32).max)
        for row, value in enumerate(cells):
            real = isinstance(value, int | float) and not isinstance(value, bool)
            if not (real and abs(value) <= most):  # which is false for nan
                raise WrongLabel(row, "must be a finite number")
        return np.array(cells, np.float32)

    def loss(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The squared error, see `Problem.loss`."""
        squares = jnp.square(logits[:, 0] - batch["labels"])
        return mean_over_rows(squares, batch["weight"], batch)

    def distill(
        self, student: jax.Array, teacher: jax.Array, batch: Batch, temperature: float
    ) -> jax.Array:
        """The squared error: the KL divergence of a single logit would be 0."""
        squares = jnp.square(student - teacher)[:, 0]
        return mean_over_rows(squares, batch["weight"], batch)

    def decode(
        self, logits: np.ndarray, examples: Examples, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        return [{"value": float(value)} for (value,) in logits]
