"""Measurements of speed and memory, always beside baselines.

    python -m cofi_jax.benchmarks step --model path/to/encoder --data path/to/sst2
    python -m cofi_jax.benchmarks inference --batch_size 1,32 --seq_length 64,128
    python -m cofi_jax.benchmarks memory --batch_size 32 --seq_length 128
    python -m cofi_jax.benchmarks latency --model path/to/encoder --table latency.json
    python -m cofi_jax.benchmarks startup -- --config=configs/demo.py

Each prints its conditions and a table, and writes both with `--json FILE`. A figure
with a spread is the median, and in brackets the 5th and 95th percentile.
"""

import importlib.metadata
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from cofi_jax import commands, files
from cofi_jax.benchmarks import baselines, inference, latency, memory, startup, step
from cofi_jax.config import DTYPES
from cofi_jax.errors import reject, warn
from cofi_jax.evaluation import latency_table, timing
from cofi_jax.export import runtimes

_PACKAGES = ("jax", "torch", "transformers", "onnxruntime")


@commands.program
def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    settings = vars(_parser().parse_args(argv[1:]))
    measure, target = settings.pop("measure"), settings.pop("json")
    if target and (os.path.exists(target) or not pathlib.Path(target).parent.is_dir()):
        raise reject("json", target, "must be a new file in a folder that exists")
    if target:
        try:
            files.check_writable(target)
        except OSError as error:
            legal = f"its folder cannot be written ({error.strerror})"
            raise reject("json", target, legal) from error
    if settings.get("torch_compile") and baselines.missing("torch"):
        raise reject("torch_compile", True, "needs PyTorch: pip install torch")
    if jax.device_count() > 1:
        legal = "one is measured; hide the others, for example by CUDA_VISIBLE_DEVICES"
        raise reject("devices", jax.device_count(), legal)
    # The number of processes that wanted a core in the last minute.
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found, rows = measure(**{k: v for k, v in settings.items() if k != "command"})
    there = [name for name in _PACKAGES if not baselines.missing(name)]
    conditions = {
        "device": timing.describe(jax.devices()[0]),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "load_average": load_average,
        "versions": {name: importlib.metadata.version(name) for name in there},
    }
    result = settings | conditions | found
    lines = [f"{name}: {value}" for name, value in result.items()]
    print("\n".join([*lines, "", table(rows)]))
    if load_average > timing.cores() / 4:
        warn("other processes were at work on these cores")
    if target:
        files.write_json(target, result | {"rows": rows})
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows with the same keys as lines below these keys, in aligned columns.

    A list is printed as a figure with its spread: the median, 5th and 95th percentile.
    """

    def cell(value):
        if isinstance(value, list):
            middle, low, high = map(cell, value)
            return f"{middle} ({low} to {high})"
        if isinstance(value, float):
            return np.format_float_positional(value, 4, fractional=False, trim="-")
        return str(value)

    cells = [[*rows[0]], *([*map(cell, row.values())] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


_RANDOM = "of a random model, without --model"
_MODEL = {  # flag: its default, the type of its value, its help
    "model": ("", str, "a Hugging Face encoder or a saved model"),
    "layers": (12, commands.positive, _RANDOM),
    "hidden": (768, commands.positive, _RANDOM),
    "heads": (12, commands.positive, _RANDOM),
    "intermediate": (3072, commands.positive, _RANDOM),
}
_BATCH = {"batch_size": (32, commands.positive, "sequences in a batch")}
_ROWS = {
    "seq_length": (0, commands.positive, "tokens of random rows (64), or the most"),
    "batches": (8, commands.positive, "batches in a turn"),
    "data": ("", str, "the rows, with --model: a folder or a name on the hub"),
    "task": ("sst2", str, "the task of the data"),
}
_SIZES = {
    "batch_size": ("1,32", commands.positives, "sequences in a batch"),
    "seq_length": ("64,128", commands.positives, "tokens of a sequence"),
}
_LENGTH = {"seq_length": (64, commands.positive, "tokens of a sequence")}
_TABLE = {
    "runtime": ("jax", str, f"one of {', '.join(runtimes.NAMES)}"),
    "table": ("latency.json", str, "the file: read where it is there, or made"),
    "structures": (0, commands.count, "random ones that check the table; 0: show it"),
}
_COMMANDS = {  # what is measured, by what, the default of --repeats, flags
    "step": ("training steps", step.measure, 5, _MODEL | _BATCH | _ROWS),
    "inference": ("forward passes", inference.measure, 10, _MODEL | _SIZES),
    "memory": ("memory of steps", memory.measure, 3, _MODEL | _BATCH | _LENGTH),
    "latency": (
        "a table of times",
        latency.measure,
        latency_table.REPEATS,
        _MODEL | _BATCH | _LENGTH | _TABLE,
    ),
    "startup": ("time to the first step", startup.measure, 3, {}),
}


def _parser() -> commands.Parser:
    name = "python -m cofi_jax.benchmarks"
    parser = commands.Parser(prog=name, description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (measured, measure, repeats, flags) in _COMMANDS.items():
        command = subparsers.add_parser(name, help=measured)
        command.set_defaults(measure=measure)
        turns = {"repeats": (repeats, commands.positive, "how often each is measured")}
        turns["json"] = ("", str, "a new file for all figures")
        for flag, (default, kind, text) in (turns | flags).items():
            text = f"{text} (default: {default or 'none'})"
            command.add_argument(f"--{flag}", default=default, type=kind, help=text)
        if flags:
            command.add_argument("--dtype", choices=DTYPES, default="float32")
        if name in ("step", "inference"):
            text = "PyTorch also with torch.compile"
            command.add_argument("--torch_compile", action="store_true", help=text)
        if name == "startup":
            text = "after --, the flags of train.py (default: the demo's)"
            command.add_argument("flags", nargs="*", help=text)
    return parser


if __name__ == "__main__":
    # PyTorch needs room on the device, too. Only this process's environment changes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(main(sys.argv))
