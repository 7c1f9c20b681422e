"""Results as text for people."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of equally many cells as lines, each column as wide as its widest.

    The first column stands to the left, the others to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    )


def times(ratio: float, spread: Sequence[float]) -> str:
    """Returns a ratio and its spread, such as `2.00x (1.90x to 2.10x)`."""
    return f"{ratio:.2f}x ({spread[0]:.2f}x to {spread[1]:.2f}x)"
