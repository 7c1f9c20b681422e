"""Prunes a model: teacher, prune, slice, fine-tune, score, measure, save.

    python train.py --config configs/sst2_95.py
    python train.py --config configs/sst2_95.py --config.data.path=path/to/sst2

Killed at any moment, the same command goes on where it was. All devices of the machine
are used; those of several machines, with --distributed on each (docs/devices.md).
"""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import json
import logging
import pathlib
import platform
import sys
import time

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
    parallel,
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
_USAGE = (
    "python train.py --config configs/demo.py [--workdir DIR] [--distributed] "
    "[--config.X=Y]"
)
_BOOLEANS = ("true", "false", "t", "f", "1", "0")  # what absl takes
_LEGAL_CONFIG = "must be a file whose get_config() returns a cofi_jax.Config"


def run(config: Config, workdir: pathlib.Path) -> dict:
    """All stages, or those that are left: the content of `report.json`.

    Raises:
      UserError: for what the user can mend; then nothing was written over.
    """
    with parallel.together():
        validation.validate(config)
        if config.tensorboard:
            events.check()
    parallel.check_same("the config", lambda: config_lib.to_json(config))
    if finished := parallel.first(lambda: _finished(config, workdir)):
        return finished
    with parallel.together():
        parallel.check_sizes(config)
        task, examples, teacher, params, tokenizer = _load(config)
    arrays = params, [(some.input_ids, some.labels) for some in examples.values()]
    parallel.check_same("rows and model", lambda: parallel.digest(arrays))
    train = examples.pop("train")
    with contextlib.ExitStack() as held:
        node, token = parallel.first(lambda: _begin(config, workdir, held))
        with parallel.together():
            lock = workdir / ".lock"
            if not lock.exists() or lock.read_text() != token:
                legal = "must be one folder that all processes see"
                raise reject("workdir", str(workdir), legal)
        # A restarted run need not compile again what the one before had compiled.
        if not jax.config.jax_compilation_cache_dir:
            jax.config.update(
                "jax_compilation_cache_dir",
                str((workdir / f"compiled-{node}").absolute()),
            )
            # The many small programs too: together they take as long as a large one.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        log = parallel.Silence()
        if parallel.is_first():
            folder = workdir / "tensorboard"
            mirror = events.Events(folder) if config.tensorboard else None
            log = report.MetricsLog(workdir / "metrics.jsonl", mirror)
        shared = stages.Run(config, workdir, task, train, examples, log)
        return _stages(shared, teacher, params, tokenizer)


def _finished(config, workdir):
    """The report of a run that is complete."""
    inputs.check_workdir(config, workdir)
    path = workdir / "report.json"
    return json.loads(path.read_text()) if path.exists() else None


def _load(config):
    """Task, rows by split, and what the run starts from."""
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
    inputs.check_rows(config, examples["train"])
    inputs.check_lessons(config, teacher.config, examples["train"])
    return task, examples, teacher, params, tokenizer


def _begin(config, workdir, held):
    """Locks the folder for as long as `held` is, and says what it will hold.

    Returns:
      The machine's name, and what now stands in the lock.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context(open(workdir / ".lock", "a"))
    except OSError as error:
        reason = f"must be a folder that can be written ({error.strerror})"
        raise reject("workdir", str(workdir), reason) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise reject("workdir", str(workdir), "another run is at work") from error
    inputs.check_workdir(config, workdir)  # another run may have begun meanwhile
    report.write_atomically(workdir / "config.json", config_lib.to_json(config))
    token = f"{platform.node()} {time.time_ns()}"
    lock.truncate(0)
    lock.write(token)
    lock.flush()
    return platform.node(), token


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
    saved = parallel.first((workdir / "teacher").exists)
    known = checkpoint.read_about(workdir / "teacher")[2] if saved else {}
    teacher_scores = known.get("scores")  # where the run goes on
    if not teacher_scores:
        teacher_scores = run.scores(training.make_predict(model), params)
    if not saved:
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
    # On one device, while the others rest.
    measured = parallel.first(
        lambda: benchmark.inference(
            {"dense": (model, params), "pruned": (small, sliced)},
            batch_size=config.benchmark.batch_size,
            seq_length=config.benchmark.seq_length,
            repeats=config.benchmark.repeats,
        )
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
    if not parallel.first((workdir / "pruned").exists):
        about |= {"dense": dataclasses.asdict(model.config), "sparsity": removed}
        checkpoint.save_model(
            workdir / "pruned",
            sliced,
            small.config,
            spec,
            tokenizer=tokenizer,
            about=about | {"report": result},
        )
    return parallel.first(lambda: _write(run, result))


def _write(run, result):
    """Pictures, pages and the report, which is last."""
    config, workdir = run.config, run.workdir
    # Where the run was killed just after it had saved, the figures of then stay.
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


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    # Beneath a damaged file the storage library prints hundreds of lines there.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        config, workdir, distributed = parse(argv)
        if distributed:
            parallel.start()
    except UserError as error:
        return _refuse(error)
    with parallel.one_voice():
        try:
            result = run(config, workdir)
        except UserError as error:
            return _refuse(error)
        text = f"Written to {workdir}: report.html, pruned/"
        print(f"\n{report.table(result)}\n\n{text}")
    return 0


def _refuse(error):
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
