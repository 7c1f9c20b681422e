"""The kinds of output that a model can have; a new kind is a file here and an entry."""

from cofi_jax.data.problems.base import Problem
from cofi_jax.data.problems.classification import Classification
from cofi_jax.data.problems.entities import Entities
from cofi_jax.data.problems.multilabel import MultiLabel
from cofi_jax.data.problems.ranking import Ranking
from cofi_jax.data.problems.regression import Regression
from cofi_jax.data.problems.span import Span
from cofi_jax.data.problems.vectors import Vectors

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Classification(),
        Regression(),
        MultiLabel(),
        Entities(),
        Ranking(),
        Vectors(),
        Span(),
    )
}
