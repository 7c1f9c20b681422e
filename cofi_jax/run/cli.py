"""The command line."""

import dataclasses
import functools
import pathlib

from absl import flags
from ml_collections import config_flags

from cofi_jax.config import Config
from cofi_jax.errors import UserError, reject

_USAGE = (
    "python train.py --config configs/demo.py [--workdir DIR] [--distributed] "
    "[--config.X=Y]"
)


_BOOLEANS = ("true", "false", "t", "f", "1", "0")  # what absl takes


_LEGAL_CONFIG = "must be a file whose get_config() returns a cofi_jax.Config"


def parse(argv: list[str]) -> tuple[Config, pathlib.Path, bool]:
    """The config, the workdir and `--distributed` that a command line asks for.

    Raises:
      UserError: for flags, files and fields that do not exist or do not fit.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "default: runs/<config>", flag_values=values)
    flags.DEFINE_boolean(
        "distributed", False, "one of several processes", flag_values=values
    )
    path, lists = None, {}
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=True):
        name, equals, value = argument.partition("=")
        name, value = name.lstrip("-"), value if equals else following
        if argument.startswith("-") and name == "config":
            path = value
        elif argument.startswith("-") and name.startswith("config."):
            name = name.removeprefix("config.")
            if _check_override(name, value, bare=not equals) is tuple:
                lists[name] = value
    if path is None:
        raise reject("--config", path, f"{_LEGAL_CONFIG}; usage: {_USAGE}")
    try:
        rest = values(argv)[1:]
        config = values.config
    except Exception as error:  # whatever the user's own file raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if isinstance(error, flags.Error) and len(lines) == 1:
            raise UserError(f"{lines[0]}; usage: {_USAGE}") from error
        text = lines[-1] if lines else ""
        _, ours, said = text.partition(f"{UserError.__name__}: ")
        if ours:
            raise reject("--config", path, said) from error
        if not isinstance(error, flags.Error):  # which quotes a whole traceback
            text = f"{type(error).__name__}: {text}"
        raise reject("--config", path, f"{text}; {_LEGAL_CONFIG}") from error
    if not isinstance(config, Config):
        raise reject("--config", path, _LEGAL_CONFIG)
    for name, value in lists.items():  # a,b is ("a", "b")
        *sections, field = name.split(".")
        node = functools.reduce(getattr, sections, config)
        if getattr(node, field) == (value,) and not value.startswith("("):
            setattr(node, field, tuple(value.split(",")))
    if rest:
        raise UserError(f"{rest[0]!r}: unknown argument; usage: {_USAGE}")
    workdir = pathlib.Path(values.workdir or f"runs/{name_of(path)}")
    return config, workdir, values.distributed


def name_of(path: str) -> str:
    """What a `--config` is called: configs/paper.py:sst2,0.9 is paper-sst2-0.9."""
    file, _, argument = path.partition(":")
    return "-".join([pathlib.Path(file).stem, *filter(None, argument.split(","))])


def _check_override(field, value, *, bare):
    """Says what is legal where the flags library would not; `bare`: has no `=`.

    Returns the type of the field.
    """
    node, parent = Config(), "config"
    for name in field.split("."):
        fields = vars(node) if dataclasses.is_dataclass(node) else {}
        if name not in fields:
            legal = f"no such field; {parent} has {', '.join(fields) or 'no fields'}"
            raise reject(f"--config.{field}", value, legal)
        node, parent = fields[name], name
    if dataclasses.is_dataclass(node):
        legal = f"is a section; give a value to one of {', '.join(vars(node))}"
        raise reject(f"--config.{field}", value, legal)
    kind = type(node)
    if kind is bool and not bare and value.lower() not in _BOOLEANS:
        raise reject(f"--config.{field}", value, "must be true or false")
    if kind in (int, float):
        try:
            kind(value)
        except ValueError as error:
            legal = f"must be of type {kind.__name__}"
            raise reject(f"--config.{field}", value, legal) from error
    return kind
