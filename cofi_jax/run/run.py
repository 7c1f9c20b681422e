"""A whole run, from a config to a report."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import pathlib
import platform
import time

import jax
import numpy as np

import cofi_jax
from cofi_jax import config as config_lib
from cofi_jax import distributed, files
from cofi_jax.checkpoints import saved_model
from cofi_jax.config import Config
from cofi_jax.data import metrics as metrics_lib
from cofi_jax.data import tasks
from cofi_jax.errors import reject
from cofi_jax.evaluation import latency, predict
from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import cost, slicing
from cofi_jax.report import figures, model_card, pages
from cofi_jax.run import setup, stages
from cofi_jax.run.setup import load_inputs
from cofi_jax.training import log as log_lib
from cofi_jax.training import teacher as teacher_lib

_HOW_NOT_WHAT = {"tensorboard", "distill.cache"}  # a run may go on with another


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
        raise reject("workdir", str(workdir), "its config.json is damaged") from error
    here, ignored = config_lib.flatten(config), set(_HOW_NOT_WHAT)
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


# float32 sums in another order; more than this is a bug, not rounding.
_MAX_DIFFERENCE = 1e-3


def run(config: Config, workdir: pathlib.Path) -> dict:
    """All stages, or those that are left: the content of `report.json`.

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
        setup.check_sizes(config)
        task, examples, teacher, params, tokenizer = load_inputs(config)
    arrays = params, [(some.input_ids, some.labels) for some in examples.values()]
    distributed.check_same("rows and model", lambda: distributed.digest(arrays))
    train = examples.pop("train")
    with contextlib.ExitStack() as held:
        node, token = distributed.on_process_zero(lambda: _begin(config, workdir, held))
        with distributed.raise_together():
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
        log = distributed.NullLog()
        if distributed.is_first():
            folder = workdir / "tensorboard"
            mirror = log_lib.Events(folder) if config.tensorboard else None
            log = log_lib.MetricsLog(workdir / "metrics.jsonl", mirror)
        shared = stages.Run(config, workdir, task, train, examples, log)
        return _stages(shared, teacher, params, tokenizer)


def _finished(config, workdir):
    """The report of a run that is complete."""
    check_workdir(config, workdir)
    path = workdir / "report.json"
    return json.loads(path.read_text()) if path.exists() else None


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
    check_workdir(config, workdir)  # another run may have begun meanwhile
    files.write_atomically(workdir / "config.json", config_lib.to_json(config))
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
    if base := setup.base_model(config):
        about["base_model"] = base
    seconds = {"teacher": 0.0}
    if not config.teacher.path:
        params, seconds["teacher"] = stages.train_teacher(run, model, params)
    params = jax.device_put(params)
    saved = distributed.on_process_zero((workdir / "teacher").exists)
    known = saved_model.read_about(workdir / "teacher")[2] if saved else {}
    teacher_scores = known.get("scores")  # where the run goes on
    if not teacher_scores:
        teacher_scores = run.scores(predict.make_predict(model), params)
    if not saved:
        saved_model.save_model(
            workdir / "teacher",
            params,
            model.config,
            tokenizer=tokenizer,
            about=(described := about | {"scores": teacher_scores}),
            readme=model_card.text(model.config, described, {}),
        )
    teacher_score = metrics_lib.main_score(teacher_scores)
    print(f"teacher: {metric} {teacher_score:.4f}", flush=True)

    distill, teaching = config.distill, None
    if distill.logits or distill.layers:
        teaching = teacher_lib.TeacherCache(model, params, distill)
    student, seconds["prepruning"] = stages.preprune(run, model, params, teaching)
    student, masks, seconds["prune"] = stages.learn_masks(run, model, student, teaching)
    masked = run.exact_logits(model, student.params, masks)
    sliced, spec = slicing.prune(student.params, masks, model.config)
    small = Encoder(spec.config(model.config))
    difference = np.abs(run.exact_logits(small, sliced) - masked).max()
    if not difference <= _MAX_DIFFERENCE * max(1.0, np.abs(masked).max()):
        raise RuntimeError(f"masked and sliced model differ by {difference}")
    before = run.score(predict.make_predict(small), sliced)
    removed = cost.exact_sparsity(masks, model.config)
    print(
        f"sliced: sparsity {removed:.4f}, {metric} {before:.4f}, differs from the "
        f"masked model by at most {difference:.1e}",
        flush=True,
    )

    hidden = np.asarray(spec.hidden)
    student = stages.Student(sliced, student.projection[hidden])
    sliced, seconds["finetune"] = stages.finetune(run, small, student, teaching)
    scores = run.scores(predict.make_predict(small), sliced)
    # On one device, while the others rest.
    measured = distributed.on_process_zero(
        lambda: latency.inference(
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
            "score": metrics_lib.main_score(scores),
            "score_before_finetune": before,
            "scores": scores,
        },
        "sparsity": removed,
        "target_sparsity": config.prune.target_sparsity,
        "params": {
            "encoder": {
                "dense": cost.num_params({}, model.config),
                "pruned": cost.num_params({}, small.config),
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
    if not distributed.on_process_zero((workdir / "pruned").exists):
        about |= {"dense": dataclasses.asdict(model.config), "sparsity": removed}
        saved_model.save_model(
            workdir / "pruned",
            sliced,
            small.config,
            spec,
            tokenizer=tokenizer,
            about=(described := about | {"report": result}),
            readme=model_card.text(small.config, described, {}),
        )
    return distributed.on_process_zero(lambda: _write(run, result))


def _write(run, result):
    """Pictures, pages and the report, which is last."""
    config, workdir = run.config, run.workdir
    # Where the run was killed just after it had saved, the figures of then stay.
    *_, saved = saved_model.read_about(workdir / "pruned")
    result = saved.get("report", result)
    metrics, settings = log_lib.read_metrics(run.log.path), config_lib.to_json(config)
    figures.plot_sparsity(metrics, workdir / "sparsity.png")
    figures.plot_structure(result, workdir / "structure.png")
    text = pages.markdown(result, metrics, settings)
    files.write_atomically(workdir / "report.md", text)
    text = pages.run_page(result, metrics, settings)
    files.write_atomically(workdir / "report.html", text)
    # Last: its presence says that the run is complete.
    files.write_json(workdir / "report.json", result)
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
