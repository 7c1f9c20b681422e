"""The one shape of every complaint and of every warning, each in one line."""

import math
import sys
from typing import Any


class UserError(ValueError):
    """Something the user can mend, said in one line; programs exit with 2."""


def printable(text: object) -> str:
    r"""Text that others wrote, as one line that does nothing but to be read.

    Lines are joined by spaces. Characters that are not printable are spelled as `repr`
    spells them: an escape that repaints a terminal becomes `\x1b`, a mark that turns
    the direction of writing `\u202e`, and half a surrogate pair, which no file can
    hold, `\ud800`.
    """
    line = " ".join(filter(None, map(str.strip, str(text).splitlines())))
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def reject(field: str, value: Any, legal: str) -> UserError:
    """The one shape of every complaint: the field, its value, what is legal.

    What is legal may quote the message of another error, or text of a file.
    """
    return UserError(f"{printable(field)}={value!r}: {printable(legal)}")


def at_most(highest: float) -> str:
    """Names the largest legal value with four digits, rounded down.

    What a complaint names is then legal itself.
    """
    unit = 10.0 ** (math.floor(math.log10(highest)) - 3) if highest > 0 else 1.0
    return f"at most {math.floor(highest / unit) * unit:.4g}"


def warn(text: str) -> None:
    """Says something in one line on stderr; the program goes on."""
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)
