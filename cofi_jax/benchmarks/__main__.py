"""Measurements of speed and memory, always beside baselines.

    python -m cofi_jax.benchmarks step --model path/to/encoder --data path/to/sst2
    python -m cofi_jax.benchmarks inference --batch_size 1,32 --seq_length 64,128
    python -m cofi_jax.benchmarks startup
    python -m cofi_jax.benchmarks memory

Each prints a table and, with `--json FILE`, writes all its figures.
"""

import importlib.metadata
import os
import pathlib
import sys
from typing import Any

import jax

from cofi_jax import commands, files
from cofi_jax.benchmarks import baselines, inference, memory, startup, workload
from cofi_jax.benchmarks import step as step_lib
from cofi_jax.benchmarks.workload import Subject
from cofi_jax.data import tasks
from cofi_jax.errors import reject
from cofi_jax.evaluation import latency, timing
from cofi_jax.models.bert import Encoder

Measured = tuple[Subject, dict[str, Any], str]  # the models, figures, their table


@commands.program
def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(argv[1:])
    target = pathlib.Path(options.json).absolute() if options.json else None
    if target and (target.exists() or not target.parent.is_dir()):
        legal = "must be a new file in a folder that exists"
        raise reject("json", options.json, legal)
    if target and not os.access(target.parent, os.W_OK):
        raise reject("json", options.json, "its folder cannot be written")
    if jax.device_count() > 1:
        legal = "one is measured; hide the others, for example by CUDA_VISIBLE_DEVICES"
        raise reject("devices", jax.device_count(), legal)
    # The number of processes that wanted a core in the last minute.
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    subject, result, table = options.run(options)
    conditions = latency.conditions({"dense": (Encoder(subject.dense), None)})
    print(f"{options.command} on {conditions['device']}, {options.dtype}\n\n{table}")
    for name, reason in result.get("left_out", {}).items():
        print(f"left out: {name}: {reason}")
    if load_average > timing.cores() / 4:
        print("warning: other processes were at work on these cores", file=sys.stderr)
    if target:
        settings = {k: v for k, v in vars(options).items() if k != "run"}
        packages = ("jax", "torch", "transformers", "onnxruntime")
        there = [name for name in packages if not baselines.missing(name)]
        about = {
            "load_average": load_average,
            "versions": {name: importlib.metadata.version(name) for name in there},
            "dense": workload.described(subject.dense, subject.dense),
            "sliced": workload.described(subject.sliced, subject.dense),
        }
        files.write_json(target, settings | conditions | about | result)
    return 0


def _step(options) -> Measured:
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
    return subject, result, step_lib.table(result)


def _inference(options) -> Measured:
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
    return subject, result, inference.table(result)


def _startup(options) -> Measured:
    subject, task = workload.to_start(options)
    sizes = {"batch_size": options.batch_size, "repeats": options.repeats}
    result = startup.measure(subject, task, **sizes)
    return subject, result | {"task": task.name}, startup.table(result)


def _memory(options) -> Measured:
    subject, _, plan = workload.training_work(options)
    sizes = options.batch_size, max(length for length, _ in plan)
    with timing.memory_suffices(*sizes):
        result = memory.measure(
            subject,
            batch_size=sizes[0],
            seq_length=sizes[1],
            steps=options.repeats,
            torch_dtype=options.torch_dtype or options.dtype,
        )
    return subject, result, memory.table(result)


_COMMANDS = {  # what runs, the default of --repeats, what these are, what is printed
    "step": (_step, 5, "turns of each step", "training steps, examples a second"),
    "inference": (_inference, 10, "turns of each model", "forward passes, in ms"),
    "startup": (_startup, 3, "starts of each kind", "time to the first step"),
    "memory": (_memory, 3, "steps of PyTorch", "memory of training steps, MiB"),
}
_SIZES = {"layers": 12, "hidden": 768, "heads": 12, "intermediate": 3072}


def _parser() -> commands.Parser:
    name = "python -m cofi_jax.benchmarks"
    parser = commands.Parser(prog=name, description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (run, repeats, what, printed) in _COMMANDS.items():
        command = subparsers.add_parser(name, help=printed)
        command.set_defaults(run=run)

        def add(name, default, text, kind=str, command=command):
            command.add_argument(f"--{name}", type=kind, default=default, help=text)

        add("model", "", "an encoder or a saved model")
        for size, default in _SIZES.items():
            text = f"of a random model, without --model (default: {default})"
            add(size, default, text, commands.positive)
        add("dtype", "float32", "float32 or bfloat16")
        add("repeats", repeats, f"{what} (default: {repeats})", commands.positive)
        add("json", "", "a new file for all figures")
        if name == "inference":
            add("batch_size", (), "for example 1,32", commands.positives)
            add("seq_length", (), "for example 64,128", commands.positives)
        else:
            add("data", "", "the rows: a folder or a name on the hub")
            add("task", "sst2", "the task of the data")
            add("vocab", "", "a folder with a tokenizer for --data, without --model")
            add("batch_size", 32, "sequences in a batch", commands.positive)
            text = (
                "tokens of all rows, 64 if not given; with --data, where rows are cut"
            )
            add("seq_length", 0, text, commands.positive)
            add("torch_dtype", "", "of PyTorch's matrix products; else that of --dtype")
        if name == "step":
            add("batches", 8, "batches in a turn", commands.positive)
        if name in ("step", "inference"):
            text = "PyTorch also with torch.compile"
            command.add_argument("--torch_compile", action="store_true", help=text)
    return parser


if __name__ == "__main__":
    # PyTorch needs room on the device, too. Only this process's environment changes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(main(sys.argv))
