"""How fast things are, always beside others: in a run's report, and from the shell.

    python -m cofi_jax.benchmarks step --model path/to/encoder --data path/to/sst2
    python -m cofi_jax.benchmarks inference --batch_size 1,32 --seq_length 64,128
    python -m cofi_jax.benchmarks startup
    python -m cofi_jax.benchmarks memory

Each prints a table and, with `--json FILE`, writes all its figures.
"""

import argparse
import importlib
import logging
import os
import pathlib
import sys
from typing import Any, NoReturn

import jax

from cofi_jax import files
from cofi_jax.benchmarks import baselines, inference, memory, startup, workload
from cofi_jax.benchmarks import step as step_lib
from cofi_jax.data import tasks
from cofi_jax.errors import UserError, reject
from cofi_jax.evaluation import timing


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    # Beneath a damaged file the storage library prints hundreds of lines there.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Others need room on the device too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        options = _parser().parse_args(argv[1:])
        target = pathlib.Path(options.json).absolute() if options.json else None
        if target and (target.exists() or not target.parent.is_dir()):
            legal = "must be a new file in a folder that exists"
            raise reject("json", options.json, legal)
        if target and not os.access(target.parent, os.W_OK):
            raise reject("json", options.json, "its folder cannot be written")
        if jax.device_count() > 1:
            legal = "one is measured; hide the others, by CUDA_VISIBLE_DEVICES say"
            raise reject("devices", jax.device_count(), legal)
        busy = _busy()
        result, text = options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {"command": options.command} | _machine(options) | busy | result
    print(f"{options.command} on {result['device']}, {options.dtype}\n\n{text}")
    if busy["load_average"] > timing.cores() / 4:
        print("warning: other processes were at work on these cores", file=sys.stderr)
    if target:
        files.write_json(target, result)
    return 0


def _busy():
    """How many processes wanted a core in the last minute, before anything is run."""
    return {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0}


def _machine(options):
    packages = ("jax", "torch", "transformers", "onnxruntime")
    return {
        "device": timing.describe(jax.devices()[0]),
        "dtype": options.dtype,
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "versions": {
            name: importlib.import_module(name).__version__
            for name in packages
            if not baselines.missing(name)
        },
    }


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m cofi_jax.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="training steps, examples a second")
    step.set_defaults(run=_step)
    _common(step, repeats=5)
    _training(step)
    step.add_argument("--batches", type=_positive, default=8, help="in a turn")
    text = "PyTorch also with torch.compile"
    step.add_argument("--torch_compile", action="store_true", help=text)

    passes = commands.add_parser("inference", help="forward passes, milliseconds")
    passes.set_defaults(run=_inference)
    _common(passes, repeats=10)
    passes.add_argument("--batch_size", type=_numbers, default=(), help="1,32 say")
    passes.add_argument("--seq_length", type=_numbers, default=(), help="64,128 say")
    passes.add_argument("--torch_compile", action="store_true", help=text)

    start = commands.add_parser("startup", help="until the end of the first step")
    start.set_defaults(run=_startup)
    _common(start, repeats=3)
    _training(start)

    memory_of = commands.add_parser("memory", help="of training steps, MiB")
    memory_of.set_defaults(run=_memory)
    _common(memory_of, repeats=3)
    _training(memory_of)
    for each in (parser, *commands.choices.values()):
        each.error = _refuse
    return parser


def _refuse(message) -> NoReturn:
    raise UserError(f"{message}; see python -m cofi_jax.benchmarks --help")


def _common(parser, *, repeats):
    """Options that every command has."""
    parser.add_argument("--model", default="", help="encoder or saved model")
    for name, size in (
        ("layers", 12),
        ("hidden", 768),
        ("heads", 12),
        ("intermediate", 3072),
    ):
        text = f"of a random model, where there is no --model (default: {size})"
        parser.add_argument(f"--{name}", type=_positive, default=size, help=text)
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    text = f"turns of each contestant (default: {repeats})"
    parser.add_argument("--repeats", type=_positive, default=repeats, help=text)
    parser.add_argument("--json", default="", help="a new file for all figures")


def _training(parser):
    """Options of what trains."""
    text = "rows whose lengths the batches have: folder or name on the hub"
    parser.add_argument("--data", default="", help=text)
    parser.add_argument("--task", default="sst2", help="of the data")
    text = "folder with a tokenizer for --data, where there is no --model"
    parser.add_argument("--vocab", default="", help=text)
    parser.add_argument("--batch_size", type=_positive, default=32)
    text = "tokens of all rows, 64 if not given; of --data, where rows are cut"
    parser.add_argument("--seq_length", type=_positive, default=0, help=text)
    text = "of PyTorch's matrix work, that of --dtype if not given"
    parser.add_argument("--torch_dtype", default="", help=text)


def _positive(text):
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above 0")
    return int(text)


def _numbers(text):
    return tuple(map(_positive, text.split(",")))


def _step(options) -> tuple[dict[str, Any], str]:
    subject, examples, plan = workload.training_work(options, batches=options.batches)
    with timing.memory_suffices(options.batch_size, max(n for n, _ in plan)):
        result = step_lib.measure(
            subject,
            examples,
            plan,
            repeats=options.repeats,
            torch_dtype=options.torch_dtype or options.dtype,
            torch_compile=options.torch_compile,
        )
    result |= {
        "batch_size": options.batch_size,
        "dense": workload.described(subject.dense, subject.dense),
        "sliced": workload.described(subject.sliced, subject.dense),
    }
    return result, step_lib.table(result)


def _inference(options) -> tuple[dict[str, Any], str]:
    on_cpu = jax.default_backend() == "cpu"
    batch_sizes = options.batch_size or ((1, 32) if on_cpu else (1, 32, 128))
    seq_lengths = options.seq_length or ((64, 128) if on_cpu else (64, 128, 384))
    subject = workload.load(options, task=tasks.TASKS["sst2"], longest=max(seq_lengths))
    result = inference.measure(
        subject,
        batch_sizes=batch_sizes,
        seq_lengths=seq_lengths,
        repeats=options.repeats,
        torch_compile=options.torch_compile,
    )
    return result, inference.table(result)


def _startup(options) -> tuple[dict[str, Any], str]:
    subject, task = workload.to_start(options)
    result = startup.measure(
        subject.dense,
        subject.dense_params,
        subject.tokenizer,
        task,
        batch_size=options.batch_size,
        repeats=options.repeats,
    )
    sizes = workload.described(subject.dense, subject.dense)
    result |= {"batch_size": options.batch_size, "task": task.name, "dense": sizes}
    return result, startup.table(result)


def _memory(options) -> tuple[dict[str, Any], str]:
    subject, _, plan = workload.training_work(options)
    kinds, left_out = memory.KINDS, {}
    if reason := baselines.unfit(subject.dense):
        kinds, left_out = kinds[:-1], {"pytorch": reason}
    settings = {k: v for k, v in vars(options).items() if k != "run"}
    longest, repeats = max(length for length, _ in plan), options.repeats
    result = memory.measure(settings, length=longest, kinds=kinds, repeats=repeats)
    sizes = workload.described(subject.dense, subject.dense)
    result |= {"batch_size": options.batch_size, "dense": sizes, "left_out": left_out}
    return result, memory.table(result)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
