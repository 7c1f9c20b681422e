"""The command line of a run: a file with a config, and values for single fields of it.

--config configs/demo.py                  the config that its `get_config()` returns
--config configs/paper.py:sst2,0.95       that of `get_config("sst2,0.95")`
--config.prune.targets=0.9                another value for one of its fields
--config.prune.kinds=head,ffn             the same of several values
"""

import ast
import dataclasses
import functools
import pathlib
import runpy
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from cofi_jax import commands
from cofi_jax.config import Config
from cofi_jax.errors import UserError, reject

_USAGE = (
    "python train.py --config configs/demo.py [--workdir DIR] [--distributed] "
    "[--config.X=Y]"
)
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_LEGAL_CONFIG = "must be a file whose get_config() returns a cofi_jax.Config"


def parse(argv: list[str]) -> tuple[Config, pathlib.Path, bool]:
    """The config, the workdir and `--distributed` that a command line asks for.

    Raises:
      UserError: for flags, files and fields that do not exist or do not fit.
    """
    parser = commands.Parser(usage=_USAGE, description=__doc__)
    parser.add_argument("--config", help="a file, perhaps with an argument")
    parser.add_argument("--workdir", help="default: runs/<config>")
    text = "this is one of several processes"
    parser.add_argument("--distributed", action="store_true", help=text)
    known, rest = parser.parse_known_args(argv[1:])
    values = dict(overrides(rest, _USAGE))
    if known.config is None:
        raise reject("--config", None, f"{_LEGAL_CONFIG}; usage: {_USAGE}")
    config = load(known.config, values)
    workdir = known.workdir or f"runs/{name_of(known.config)}"
    return config, pathlib.Path(workdir), known.distributed


def load(path: str, values: Mapping[str, Any]) -> Config:
    """The config that the `get_config` of a file returns.

    Args:
      path: the file; what follows a colon is the argument of `get_config`.
      values: those that fields get instead of their own, as `{"model.dropout": 0.2}`.

    Raises:
      UserError: for a file that is not there, that fails, or returns something else.
    """
    file, *argument = path.split(":", 1)
    try:
        config = runpy.run_path(file)["get_config"](*argument)
    except UserError as error:
        raise reject("--config", path, str(error)) from error
    except Exception as error:  # The user's own file can raise anything.
        legal = f"{type(error).__name__}: {error}; {_LEGAL_CONFIG}"
        raise reject("--config", path, legal) from error
    if not isinstance(config, Config):
        raise reject("--config", path, _LEGAL_CONFIG)
    for field, value in values.items():
        *sections, name = field.split(".")
        setattr(functools.reduce(getattr, sections, config), name, value)
    return config


def name_of(path: str) -> str:
    """The name of a `--config`: that of configs/paper.py:sst2,0.9 is paper-sst2-0.9."""
    file, _, argument = path.partition(":")
    return "-".join([pathlib.Path(file).stem, *filter(None, argument.split(","))])


def overrides(arguments: Iterable[str], usage: str) -> Iterable[tuple[str, Any]]:
    """Pairs of a field and its value, of arguments like `--config.seed=1`.

    The value may also follow as an argument of its own, and is true for a boolean
    field that stands alone.

    Raises:
      UserError: for other arguments, and for fields or values that are not legal.
    """
    rest = list(arguments)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        field = name.removeprefix("--config.")
        if field == name:
            raise UserError(
                f"{name + equals + text!r}: unknown argument; usage: {usage}"
            )
        kind = _kind(field, text if equals or not rest else rest[0])
        if not equals and kind is bool:
            text = "true"
        elif not equals:
            text = rest.pop(0) if rest else ""
        yield field, _value(field, text, kind)


def _kind(field, text) -> Any:
    """The annotated type of a field of `Config`; `text` is only shown."""
    node, parent = Config, "config"
    for name in field.split("."):
        fields = typing.get_type_hints(node) if dataclasses.is_dataclass(node) else {}
        if name not in fields:
            legal = f"no such field; {parent} has {', '.join(fields) or 'no fields'}"
            raise reject(f"--config.{field}", text, legal)
        node, parent = fields[name], name
    if dataclasses.is_dataclass(node):
        names = ", ".join(typing.get_type_hints(node))
        legal = f"is a section; give a value to one of {names}"
        raise reject(f"--config.{field}", text, legal)
    return node


def _value(field, text, kind) -> Any:
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise reject(f"--config.{field}", text, "must be true or false")
        return _BOOLEANS[text.lower()]
    if typing.get_origin(kind) is tuple:
        texts, words = typing.get_args(kind)[0] is str, tuple(text.split(","))
        # 0,1 are texts where texts are wanted; so names with commas take quotes.
        if texts and text.strip()[:1] not in ("(", "[", "'", '"'):
            return words
        try:
            found = ast.literal_eval(text)
        except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
            return words
        found = tuple(found) if isinstance(found, tuple | list) else (found,)
        return tuple(map(str, found)) if texts else found
    try:
        return kind(text)
    except ValueError as error:
        legal = f"must be of type {kind.__name__}"
        raise reject(f"--config.{field}", text, legal) from error
