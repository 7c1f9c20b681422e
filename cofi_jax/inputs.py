"""What a run starts from, checked before anything is written."""

import dataclasses
import math
import pathlib
import re
import sys
from typing import Any

import jax
import numpy as np

from cofi_jax import (
    checkpoint,
    grammar,
    hard_concrete,
    lessons,
    pretrained,
    sparsity,
    stages,
    tasks,
)
from cofi_jax import config as config_lib
from cofi_jax import data as data_lib
from cofi_jax.config import Config, reject
from cofi_jax.model import Encoder, EncoderConfig, init_params
from cofi_jax.tasks import Task

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


def load_teacher(config: Config, task: Task) -> tuple[Encoder, dict, Any]:
    """The module, its parameters (to be trained without `teacher.path`), tokenizer.

    Raises:
      UserError: for a model that is not there, damaged, or of another task.
    """
    key = jax.random.key(config.seed)
    if config.teacher.path:
        return _load_trained(config, task)
    if config.teacher.labels:
        legal = "goes with teacher.path; without it the task gives the order"
        raise reject("teacher.labels", config.teacher.labels, legal)
    if config.model.path:
        folder = pretrained.resolve(config.model.path, "model.path")
        sizes, params = pretrained.load_encoder(
            folder,
            field="model.path",
            num_labels=task.num_outputs,
            problem=task.problem,
            model=config.model,
            key=key,
        )
        tokenizer = pretrained.load_tokenizer(folder, "model.path")
        return Encoder(sizes), params, tokenizer
    if config.data.task != "demo":
        legal = "must name an encoder; only the demo task brings its own tokenizer"
        raise reject("model.path", "", legal)
    tokenizer = grammar.demo_tokenizer()
    model = config.model
    sizes = EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden_size,
        heads=(model.num_heads,) * model.num_layers,
        head_size=model.hidden_size // model.num_heads,
        intermediate=(model.intermediate_size,) * model.num_layers,
        pooler_size=model.hidden_size,
        num_labels=task.num_outputs,
        max_positions=tasks.max_length(config.data),
        dropout=model.dropout,
        dtype=model.dtype,
    )
    return Encoder(sizes), init_params(sizes, key), tokenizer


def _load_trained(config, task):
    path, order = config.teacher.path, config.teacher.labels
    if checkpoint.is_model(path):
        if order:
            legal = "is for Hugging Face folders; a saved model knows its own"
            raise reject("teacher.labels", order, legal)
        model, params, spec = checkpoint.load_model(path, field="teacher.path")
        if spec is not None:
            raise reject("teacher.path", path, "is a pruned model; give a dense one")
        sizes = dataclasses.replace(
            model.config, dropout=config.model.dropout, dtype=config.model.dtype
        )
        tokenizer = checkpoint.load_tokenizer(path)
        params = _in_order(params, checkpoint.read_about(path)[2], task, path)
    else:
        folder = pretrained.resolve(path, "teacher.path")
        sizes, params = pretrained.load_classifier(
            folder,
            field="teacher.path",
            problem=task.problem,
            labels=task.labels,
            label_order=order,
            model=config.model,
        )
        dense = {sizes.hidden_size // sizes.head_size}
        if {*sizes.heads} != dense or len({*sizes.intermediate}) > 1:
            raise reject("teacher.path", path, "is a pruned model; give a dense one")
        tokenizer = pretrained.load_tokenizer(folder, "teacher.path")
    found = sizes.problem, sizes.num_labels
    if found != (task.problem, task.num_outputs):
        legal = f"is made for {found[0]} with {found[1]} outputs, task "
        legal += f"{config.data.task} for {task.problem} with {task.num_outputs}"
        raise reject("teacher.path", path, legal)
    return Encoder(sizes), params, tokenizer


def base_model(config: Config) -> str:
    """The name on the hub of the model that the run starts from, or ""."""
    path = config.teacher.path or config.model.path
    if checkpoint.is_model(path):
        return checkpoint.read_about(path)[2].get("base_model", "")
    named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
    return path if named and not pathlib.Path(path).exists() else ""


def _in_order(params, about, task, path):
    """The parameters with the classes of a saved model in the task's order."""
    classes = about.get("labels", list(task.labels))
    if sorted(classes) != sorted(task.labels):
        legal = f"has classes {classes}, the task has {list(task.labels)}"
        raise reject("teacher.path", path, legal)
    if not classes:
        return params
    rows = np.array([classes.index(name) for name in task.labels])
    classifier = {name: x[..., rows] for name, x in params["classifier"].items()}
    return params | {"classifier": classifier}


def check_model(config: Config, sizes: EncoderConfig, tokenizer: Any) -> None:
    """Raises UserError where lengths, vocabulary or target do not fit the model."""
    for field, value in (
        ("data.max_length", tasks.max_length(config.data)),
        ("benchmark.seq_length", config.benchmark.seq_length),
    ):
        if value > sizes.longest:
            legal = f"must be at most {sizes.longest}, the model's positions"
            raise reject(field, value, legal)
    field = "teacher.path" if config.teacher.path else "model.path"
    path = config.teacher.path or config.model.path
    check_tokenizer(tokenizer, sizes, field=field, path=path)
    highest = sparsity.max_sparsity(sizes, config.prune.kinds)
    if config.prune.target_sparsity > highest:
        raise reject(
            "prune.target_sparsity",
            config.prune.target_sparsity,
            f"gates of {tuple(config.prune.kinds)} reach at most {highest:.3f}",
        )


def check_tokenizer(
    tokenizer: Any, sizes: EncoderConfig, *, field: str, path: str
) -> None:
    """Raises UserError where the tokenizer has tokens that the model has not."""
    if len(tokenizer) > sizes.vocab_size:
        legal = f"its tokenizer has {len(tokenizer)} tokens, its weights "
        raise reject(field, path, legal + str(sizes.vocab_size))


def check_lessons(
    config: Config, sizes: EncoderConfig, train: data_lib.Examples
) -> None:
    """Says what a cache of lessons needs; UserError where the memory is too small."""
    taught = {}
    for field in ("prune", "finetune"):
        stage = getattr(config, field)
        rows = data_lib.first_rows(train, stage.train_rows, field=f"{field}.train_rows")
        taught[len(rows), stage.batch_size] = rows
    lessons.check_memory(sizes, config.distill, list(taught.values()))


def check_rows(config: Config, train: data_lib.Examples) -> None:
    """Raises UserError where rows are too few; warns where gates cannot close."""
    if not len(train):
        legal = "holds no training question whose answer is in its context"
        raise reject("data.path", config.data.path, legal)
    for field in ("teacher", "prune", "finetune"):
        rows = getattr(config, field).train_rows
        data_lib.first_rows(train, rows, field=f"{field}.train_rows")
    prune = config.prune
    rows = data_lib.first_rows(train, prune.train_rows, field="prune.train_rows")
    epochs = prune.epochs - prune.prepruning_epochs
    steps = epochs * stages.steps_per_epoch(rows, prune)
    if prune.mask_schedule == "linear":  # which covers half the way
        steps /= 2
    if prune.mask_learning_rate * steps < hard_concrete.CLOSING_DISTANCE:
        enough = hard_concrete.CLOSING_DISTANCE / steps
        unit = 10.0 ** (math.floor(math.log10(enough)) - 1)
        enough = math.ceil(enough / unit) * unit  # two digits, never too few
        print(
            f"warning: prune.mask_learning_rate={prune.mask_learning_rate}: too low "
            f"for gates to close in the schedule's steps; {enough:.2g} or more would "
            "do",
            file=sys.stderr,
        )
