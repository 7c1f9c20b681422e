"""Prunes a model: teacher, prune, slice, fine-tune, score, measure, save.

    python train.py --config configs/sst2_95.py
    python train.py --config configs/sst2_95.py --config.data.path=path/to/sst2

Killed at any moment, the same command goes on where it was.
"""

import dataclasses
import fcntl
import functools
import importlib.metadata
import json
import logging
import pathlib
import platform
import sys

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

import cofi_jax
from cofi_jax import (
    benchmark,
    checkpoint,
    events,
    inputs,
    lessons,
    page,
    plots,
    report,
    rows,
    slicing,
    sparsity,
    stages,
    tasks,
    training,
    validation,
)
from cofi_jax import config as config_lib
from cofi_jax import data as data_lib
from cofi_jax.config import Config, UserError, reject
from cofi_jax.model import Encoder

# float32 sums in another order; more than this is a bug, not rounding.
_MAX_DIFFERENCE = 1e-3
_USAGE = "python train.py --config configs/demo.py [--workdir DIR] [--config.X=Y]"
_BOOLEANS = ("true", "false", "t", "f", "1", "0")  # what absl takes
_LEGAL_CONFIG = "must be a file whose get_config() returns a cofi_jax.Config"


def run(config: Config, workdir: pathlib.Path) -> dict:
    """All stages, or those that are left: the content of `report.json`.

    Raises:
      UserError: for what the user can mend; then nothing was written over.
    """
    validation.validate(config)
    if config.tensorboard:
        events.check()
    inputs.check_workdir(config, workdir)
    if (workdir / "report.json").exists():
        return json.loads((workdir / "report.json").read_text())
    splits = ("train", *tasks.find(config.data).validation)
    task, columns = rows.load(config.data, splits)
    teacher, params, tokenizer = inputs.load_teacher(config, task)
    inputs.check_model(config, teacher.config, tokenizer)
    examples = {
        split: data_lib.tokenise(
            columns.pop(split),
            task,
            tokenizer,
            max_length=tasks.max_length(config.data),
            training=split == "train",
        )
        for split in splits
    }
    train = examples.pop("train")
    inputs.check_rows(config, train)
    inputs.check_lessons(config, teacher.config, train)

    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w")
    except OSError as error:
        reason = f"must be a folder that can be written ({error.strerror})"
        raise reject("workdir", str(workdir), reason) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise reject("workdir", str(workdir), "another run is at work") from error
        inputs.check_workdir(config, workdir)  # another run may have begun meanwhile
        # A restarted run need not compile again what the one before had compiled.
        if not jax.config.jax_compilation_cache_dir:
            jax.config.update(
                "jax_compilation_cache_dir",
                str((workdir / f"compiled-{platform.node()}").absolute()),
            )
            # The many small programs too: together they take as long as a large one.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        report.write_atomically(workdir / "config.json", config_lib.to_json(config))
        mirror = events.Events(workdir / "tensorboard") if config.tensorboard else None
        log = report.MetricsLog(workdir / "metrics.jsonl", mirror)
        shared = stages.Run(config, workdir, task, train, examples, log)
        return _stages(shared, teacher, params, tokenizer)


def _stages(run: stages.Run, model: Encoder, params: dict, tokenizer) -> dict:
    config, workdir, task = run.config, run.workdir, run.task
    metric = task.metrics[0]
    data = dataclasses.asdict(config.data)
    if config.data.task == tasks.OWN:
        data["labels"] = task.labels  # read off the training rows, perhaps
    data["buckets"] = run.buckets  # likewise
    about = {"task": config.data.task, "labels": list(task.labels), "data": data}
    if base := inputs.base_model(config):
        about["base_model"] = base
    seconds = {"teacher": 0.0}
    if not config.teacher.path:
        params, seconds["teacher"] = stages.train_teacher(run, model, params)
    params = jax.device_put(params)
    if (workdir / "teacher").exists():  # the run goes on: its scores stay
        teacher_scores = checkpoint.read_about(workdir / "teacher")[2]["scores"]
    else:
        teacher_scores = run.scores(training.make_predict(model), params)
        checkpoint.save_model(
            workdir / "teacher",
            params,
            model.config,
            tokenizer=tokenizer,
            about=about | {"scores": teacher_scores},
        )
    teacher_score = stages.main_score(teacher_scores)
    print(f"teacher: {metric} {teacher_score:.4f}", flush=True)

    distill, teaching = config.distill, None
    if distill.logits or distill.layers:
        teaching = lessons.Lessons(model, params, distill)
    student, seconds["prepruning"] = stages.prepare(run, model, params, teaching)
    student, masks, seconds["prune"] = stages.learn_masks(run, model, student, teaching)
    masked = run.exact_logits(model, student.params, masks)
    sliced, spec = slicing.prune(student.params, masks, model.config)
    small = Encoder(spec.config(model.config))
    difference = np.abs(run.exact_logits(small, sliced) - masked).max()
    if not difference <= _MAX_DIFFERENCE * max(1.0, np.abs(masked).max()):
        raise RuntimeError(f"masked and sliced model differ by {difference}")
    before = run.score(training.make_predict(small), sliced)
    removed = sparsity.exact_sparsity(masks, model.config)
    print(
        f"sliced: sparsity {removed:.4f}, {metric} {before:.4f}, differs from the "
        f"masked model by at most {difference:.1e}",
        flush=True,
    )

    hidden = np.asarray(spec.hidden)
    student = stages.Student(sliced, student.projection[hidden])
    sliced, seconds["finetune"] = stages.finetune(run, small, student, teaching)
    scores = run.scores(training.make_predict(small), sliced)
    measured = benchmark.inference(
        {"dense": (model, params), "pruned": (small, sliced)},
        batch_size=config.benchmark.batch_size,
        seq_length=config.benchmark.seq_length,
        repeats=config.benchmark.repeats,
    )
    result = {
        "task": config.data.task,
        "metric": metric,
        "seed": config.seed,
        "teacher": {"score": teacher_score, "scores": teacher_scores},
        "pruned": {
            "score": stages.main_score(scores),
            "score_before_finetune": before,
            "scores": scores,
        },
        "sparsity": removed,
        "target_sparsity": config.prune.target_sparsity,
        "params": {
            "encoder": {
                "dense": sparsity.num_params({}, model.config),
                "pruned": sparsity.num_params({}, small.config),
            },
            "total": {"dense": _size(params), "pruned": _size(sliced)},
        },
        "dense": model.config.widths(),
        "kept": small.config.widths(),
        "masked_vs_sliced_max_abs_diff": float(difference),
        **measured,
        "seconds": seconds,
        "versions": _versions(),
    }
    if not (workdir / "pruned").exists():
        about |= {"dense": dataclasses.asdict(model.config), "sparsity": removed}
        checkpoint.save_model(
            workdir / "pruned",
            sliced,
            small.config,
            spec,
            tokenizer=tokenizer,
            about=about | {"report": result},
        )
    else:  # killed just after: the figures that were measured stay
        *_, saved = checkpoint.read_about(workdir / "pruned")
        result = saved.get("report", result)
    metrics, settings = report.read_metrics(run.log.path), config_lib.to_json(config)
    plots.plot_sparsity(metrics, workdir / "sparsity.png")
    plots.plot_structure(result, workdir / "structure.png")
    report.write_atomically(workdir / "report.md", report.markdown(result, settings))
    text = page.run_page(result, metrics, settings)
    report.write_atomically(workdir / "report.html", text)
    # Last: its presence says that the run is complete.
    report.write_json(workdir / "report.json", result)
    return result


def _size(params):
    return sum(x.size for x in jax.tree.leaves(params))


def _versions():
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {
        "cofi-jax": cofi_jax.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def parse(argv: list[str]) -> tuple[Config, pathlib.Path]:
    """The config and the workdir that a command line asks for.

    Raises:
      UserError: for flags, files and fields that do not exist or do not fit.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "default: runs/<config>", flag_values=values)
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
    return config, pathlib.Path(values.workdir or f"runs/{name_of(path)}")


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


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    # Beneath a damaged file the storage library prints hundreds of lines there.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        config, workdir = parse(argv)
        result = run(config, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{report.table(result)}\n\nWritten to {workdir}: report.html, pruned/")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
