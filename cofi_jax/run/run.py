"""A whole run, from a config to a report."""

import contextlib
import dataclasses
import fcntl
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from cofi_jax import config as config_lib
from cofi_jax import distributed, files
from cofi_jax.checkpoints import saved_model
from cofi_jax.config import Config
from cofi_jax.data import batches, tasks
from cofi_jax.data.metrics import main_score
from cofi_jax.errors import reject
from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import cost, slicing
from cofi_jax.report import model_card
from cofi_jax.report.tables import read_report
from cofi_jax.run import artefacts, results, setup, speed, stages, structure
from cofi_jax.training import log as log_lib
from cofi_jax.training.teacher import TeacherCache

# float32 sums in another order; more than this is a bug, not rounding.
_MAX_DIFFERENCE = 1e-3


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all stages, or those that are left: the content of `report.json`.

    Raises:
      UserError: for what the user can mend; then nothing was written over.
    """
    with distributed.raise_together():
        config_lib.validate(config)
        if config.tensorboard:
            log_lib.check()
    distributed.check_same("the config", lambda: config_lib.to_json(config))
    if finished := distributed.on_process_zero(lambda: _finished(config, workdir)):
        return finished
    with distributed.raise_together():
        inputs = setup.load_inputs(config)
    digest = setup.digest(config, inputs)
    distributed.check_same("rows and model", lambda: digest)
    with contextlib.ExitStack() as held:
        node, token = distributed.on_process_zero(lambda: _begin(workdir, held))
        with distributed.raise_together():
            lock = workdir / ".lock"
            if not lock.exists() or lock.read_text() != token:
                legal = "must be one folder that all processes see"
                raise reject("workdir", str(workdir), legal)
        table = speed.table_of(config, inputs.model.config, workdir)
        # From here on the folder is of this config. A speedup that the table refuses
        # leaves nothing but the table, for the run that asks for a legal one.
        text = config_lib.to_json(config)
        distributed.on_process_zero(
            lambda: files.write_atomically(workdir / "config.json", text)
        )
        held.enter_context(compiled_in(workdir / f"compiled-{node}"))
        log = distributed.NullLog()
        if distributed.is_first():
            folder = workdir / "tensorboard"
            mirror = log_lib.Events(folder) if config.tensorboard else None
            log = log_lib.MetricsLog(workdir / "metrics.jsonl", mirror)
        validation = dict(inputs.examples)
        train = validation.pop("train")
        shared = stages.Run(
            config,
            workdir,
            inputs.task,
            inputs.model.config,
            train,
            validation,
            log,
            digest,
            table,
            inputs.judge,
        )
        return _stages(shared, inputs)


@contextlib.contextmanager
def compiled_in(folder: pathlib.Path) -> Iterator[None]:
    """A block whose programs are kept in `folder`, to be compiled once only.

    A cache that jax has already, which the user chose, stays as it is.
    """
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    options = {
        "jax_compilation_cache_dir": str(folder.absolute()),
        # The many small programs too: together they take as long as a large one.
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # jax opens a cache once and keeps to it.
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Raises UserError unless `workdir` is new or holds a run of this very config."""
    path = workdir / "config.json"
    if not path.exists():
        if workdir.is_file() or (workdir.is_dir() and any(workdir.iterdir())):
            if not (workdir / ".lock").exists():
                raise reject("workdir", str(workdir), "must be a new or a run's folder")
        return
    try:
        # A field that is younger than the run had its default.
        there = config_lib.flatten(Config()) | config_lib.flatten(path.read_text())
    except (AttributeError, ValueError) as error:  # not an object; not JSON
        legal = "its config.json is damaged; without the file the run starts over"
        raise reject("workdir", str(workdir), legal) from error
    here, ignored = config_lib.flatten(config), set(setup.HOW_NOT_WHAT)
    if (workdir / "report.json").exists():
        ignored.add("data.buckets")  # whose default was another once
    for field in sorted((there.keys() | here.keys()) - ignored):
        if there.get(field) != here.get(field):
            raise reject(
                "workdir",
                str(workdir),
                f"holds a run with {field}={there.get(field)!r}, not "
                f"{here.get(field)!r}; choose another --workdir or the same config",
            )


def _finished(config, workdir) -> dict[str, Any] | None:
    """The report of a run that is complete: those of the models beside it."""
    check_workdir(config, workdir)
    stairs = stages.stairs(config.prune.targets, config.prune.target_speedup)
    saved = []
    try:
        report = read_report(workdir / "report.json", "workdir")
        for stair in stairs:
            path = stages.saved_as(workdir, stair)
            saved.append(saved_model.read_about(path)[2]["report"])
            if not results.kept(saved[-1]):  # It was the last one.
                break
    except (OSError, ValueError, KeyError):  # not there, or damaged
        return None
    return report if report == results.of_run(saved) else None


def _begin(workdir, held) -> tuple[str, str]:
    """Locks the folder for as long as `held` is.

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
    token = f"{platform.node()} {time.time_ns()}"
    lock.truncate(0)
    lock.write(token)
    lock.flush()
    return platform.node(), token


def _stages(run: stages.Run, inputs: setup.Inputs) -> dict[str, Any]:
    config, dense, params = run.config, inputs.model, inputs.params
    seconds = {"teacher": 0.0}
    if not config.teacher.path:
        params, seconds["teacher"] = stages.train_teacher(run, dense, params)
    params = jax.device_put(params)
    reached = _save_teacher(run, inputs, params)
    teacher = None
    if config.distill.logits or config.distill.layers:
        teacher = TeacherCache(dense, params, config.distill)
    student, seconds["prepruning"] = stages.preprune(run, dense, params, teacher)
    model, spec, reports = dense, None, []
    targets = structure.targets(config.prune, dense.config)
    for stair in stages.stairs(targets, config.prune.target_speedup):
        whole = model, student.params
        student, masks, taken = stages.learn_masks(run, stair, model, student, teacher)
        seconds |= taken
        model, student, cut, figures = _slice(run, stair, whole, student, masks)
        seconds |= figures.seconds
        spec = cut if spec is None else spec.compose(cut)
        student, seconds[f"finetune{stair.suffix}"] = stages.finetune(
            run, stair, model, student, teacher
        )
        models = {"dense": (dense, params), "pruned": (model, student.params)}
        reports.append(
            _save_pruned(run, stair, inputs, models, spec, reached, figures, seconds)
        )
        if not results.kept(reports[-1]):
            break
    report = results.of_run(reports)
    distributed.on_process_zero(lambda: results.write(run, report))
    return report


def _save_pruned(run, stair, inputs, models, spec, reached, figures, seconds):
    """Saves one of the run's models: the report that stands in it."""
    (dense, _), (model, params) = models["dense"], models["pruned"]
    path = stages.saved_as(run.workdir, stair)

    def save():
        both = {"dense": reached, "pruned": run.reached(model, params)}
        report = results.collect(run, stair, models, both, figures, seconds)
        if allowed := run.config.prune.max_drop:
            before = run.answers(*models["dense"], by=run.judge)
            after = run.answers(*models["pruned"])
            report["drop"] = results.drop(report["metric"], before, after, allowed)
        about = {
            "dense": dataclasses.asdict(dense.config),
            "sparsity": report["sparsity"],
            "report": report,
        }
        if settings := both["pruned"].get("settings"):
            about["settings"] = settings
        _save(run, path.name, params, model.config, spec, inputs.tokenizer, about)

    made_from = run.made_from(models["dense"][1], params, run.table)
    artefacts.settle(path, made_from, save)
    return saved_model.read_about(path)[2]["report"]


def _save_teacher(run, inputs, params) -> dict[str, Any]:
    """What `Run.reached` says of the teacher, which `teacher/` holds too."""
    model, path = inputs.model, run.workdir / "teacher"

    def save():
        about = run.reached(model, params, by=run.judge)
        _save(run, "teacher", params, model.config, None, inputs.tokenizer, about)

    artefacts.settle(path, run.made_from(params), save)
    about = saved_model.read_about(path)[2]
    reached = {k: about[k] for k in ("scores", "by_class", "settings") if k in about}
    score = main_score(reached["scores"])
    print(f"teacher: {run.task.metrics[0]} {score:.4f}", flush=True)
    return reached


def _slice(run, stair, whole, student, masks):
    """The smaller model, which computes what the masked one does until it is fitted.

    Args:
      run: the run.
      stair: the model that is made.
      whole: the module that is cut, with its parameters before masks were learned.
      student: the parameters that the masks were learned with.
      masks: the final masks.

    Returns:
      The module, the student with its parameters, what was kept of `whole`, and the
      part of the report that is known before fine-tuning.
    """
    model, _ = whole
    masked = run.exact_logits(model, student.params, masks)
    params, spec = slicing.prune(student.params, masks, model.config)
    small = Encoder(spec.config(model.config))
    difference = np.abs(run.exact_logits(small, params) - masked).max()
    if not difference <= _MAX_DIFFERENCE * max(1.0, np.abs(masked).max()):
        raise RuntimeError(f"masked and sliced model differ by {difference}")
    left = cost.num_params({}, small.config)
    removed = 1 - left / cost.num_params({}, run.dense)
    metric, score = run.task.metrics[0], run.score(small, params)
    print(
        f"sliced{stair.suffix}: sparsity {removed:.4f}, {metric} {score:.4f}, differs "
        f"from the masked model by at most {difference:.1e}",
        flush=True,
    )
    # A model that stays as it is has recovered already, with LayerNorms of its own.
    seconds: dict[str, float] = {}
    if run.config.prune.reconstruction_batches and small != model:
        params, seconds = stages.reconstruct(run, stair, small, params, whole)
        score = run.score(small, params)
        print(f"reconstructed{stair.suffix}: {metric} {score:.4f}", flush=True)
    student = stages.Student(params, student.projection[np.asarray(spec.hidden)])
    figures = results.Slicing(removed, score, float(difference), seconds)
    return small, student, spec, figures


def _save(run, name, params, config, spec, tokenizer, about):
    """Saves a model with what the run says of it, and its card."""
    task, data = run.task, dataclasses.asdict(run.config.data)
    if run.config.data.task == tasks.OWN:
        data["labels"] = task.labels  # which may have been read off the rows
    # Those of the run suit its length, not the use of the model.
    data["buckets"] = batches.bucket_lengths(task, run.train.lengths)
    about = {"task": task.name, "labels": list(task.labels), "data": data} | about
    if base := setup.base_model(run.config):
        about["base_model"] = base
    saved_model.save_model(
        run.workdir / name,
        params,
        config,
        spec,
        tokenizer=tokenizer,
        about=about,
        readme=model_card.text(config, about, {}),
    )
