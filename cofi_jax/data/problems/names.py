"""The names of classes, as cells of rows call them."""

import decimal
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

WHOLE = r"[+-]?\d+"
MOST = 1000  # more classes are numbers to be predicted, or a mistake


def text(cell: Any) -> str:
    """The name that a cell spells, where 1.0 is 1.

    pandas makes floats of integers where another cell is empty.
    """
    return re.sub(rf"^({WHOLE})\.0$", r"\1", str(cell))


def in_order(found: Iterable[str]) -> list[str]:
    """Different names in the order of the alphabet, or of the numbers that all are.

    Those of one number, as 1 and +1, keep their order.
    """
    names = dict.fromkeys(found)
    whole = all(re.fullmatch(WHOLE, name) for name in names)
    # Of any number of digits, where Python's integers have a limit.
    return sorted(names, key=decimal.Decimal if whole else None)


def numbering(
    texts: Collection[str], labels: Sequence[str], *, numbered: bool
) -> tuple[dict[str, int], str]:
    """The number of each class by what cells call it, and what is legal there.

    Args:
      texts: what the cells call the classes.
      labels: the names of the classes in their order.
      numbered: whether cells may hold the number of a class instead of its name. They
        do where none of them holds a name, and no name is a number itself.
    """
    numbers = {name: number for number, name in enumerate(labels)}
    legal = f"must be among {', '.join(labels)}"
    if numbered and not any(re.fullmatch(WHOLE, name) for name in labels):
        legal = f"must be an integer among {dict(enumerate(labels))}, or one of "
        legal += "these names (hub test splits hold only -1)"
        if not any(name in numbers for name in texts):
            numbers = {str(number): number for number in numbers.values()}
    return numbers, legal
