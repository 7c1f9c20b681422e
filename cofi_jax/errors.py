"""The one shape of every complaint that a user can mend."""

from typing import Any


class UserError(ValueError):
    """Something the user can mend, said in one line; programs exit with 2."""


def reject(field: str, value: Any, legal: str) -> UserError:
    """The one shape of every complaint: the field, its value, what is legal.

    What is legal may quote the message of another error, whose lines become one.
    """
    return UserError(f"{field}={value!r}: {' '.join(legal.split())}")
