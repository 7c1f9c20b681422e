"""The common part of all programs: flags, exit statuses, and errors in one line."""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NoReturn

from cofi_jax.errors import UserError, printable


class Parser(argparse.ArgumentParser):
    """A parser of a command line whose complaints are UserErrors.

    Names of flags are not abbreviated, and its description is shown as it is written.
    """

    def __init__(self, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=form, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises a UserError that ends with the usage."""
        usage = f"usage: {self.usage}" if self.usage else f"see {self.prog} --help"
        raise UserError(f"{message}; {usage}")


def program(main: Callable[..., int]) -> Callable[..., int]:
    """Makes `main` return 2, after a line on stderr, where a user must mend something.

    This is the case for a UserError, and where the disk is full or a folder cannot be
    written.
    """

    @functools.wraps(main)
    def wrapped(*args):
        try:
            return main(*args)
        except (UserError, OSError) as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            return 2

    return wrapped


def positive(text: str) -> int:
    """The whole number above 0 that is the value of a flag."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above 0")
    return int(text)


def count(text: str) -> int:
    """The whole number that is the value of a flag."""
    return 0 if text == "0" else positive(text)


def positives(text: str) -> tuple[int, ...]:
    """The numbers of a flag like `1,32`."""
    return tuple(map(positive, text.split(",")))


def words(text: str) -> tuple[str, ...]:
    """The words of a flag like `a,b`."""
    return tuple(filter(None, text.split(",")))
