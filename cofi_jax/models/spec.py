"""The kinds of gates."""

from collections.abc import Sequence

from cofi_jax.errors import reject

KINDS = ("head", "mha", "intermediate", "ffn", "hidden")


def check_kinds(field: str, kinds: Sequence[str]) -> None:
    """Raises UserError unless `kinds` are known, at least one and none twice."""
    if isinstance(kinds, str) or not kinds:
        raise reject(field, kinds, f"must be a tuple of one or more of {KINDS}")
    for kind in kinds:
        if kind not in KINDS:
            raise reject(field, kind, f"unknown mask kind; must be among {KINDS}")
    if len(set(kinds)) != len(kinds):
        raise reject(field, tuple(kinds), "names a kind twice")
