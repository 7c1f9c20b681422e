"""What a run starts from, checked before anything is written."""

import dataclasses
import math
import pathlib
import sys
from typing import Any

import jax

from cofi_jax import checkpoint, grammar, hard_concrete, pretrained, sparsity, stages
from cofi_jax import config as config_lib
from cofi_jax import data as data_lib
from cofi_jax.config import Config, reject
from cofi_jax.model import Encoder, EncoderConfig, init_params


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Raises UserError unless `workdir` is new or holds a run of this very config."""
    path = workdir / "config.json"
    if not path.exists():
        if workdir.is_file() or (workdir.is_dir() and any(workdir.iterdir())):
            if not (workdir / ".lock").exists():
                raise reject("workdir", str(workdir), "must be a new or a run's folder")
        return
    try:
        there = config_lib.flatten(path.read_text())
    except (AttributeError, ValueError) as error:  # not an object; not JSON
        raise reject("workdir", str(workdir), "its config.json is damaged") from error
    here = config_lib.flatten(config)
    for field in sorted(there.keys() | here.keys()):
        if there.get(field) != here.get(field):
            raise reject(
                "workdir",
                str(workdir),
                f"holds a run with {field}={there.get(field)!r}, not "
                f"{here.get(field)!r}; choose another --workdir or the same config",
            )


def load_teacher(config: Config) -> tuple[Encoder, dict, Any]:
    """The module, its parameters (to be trained without `teacher.path`), tokenizer.

    Raises:
      UserError: for a model that is not there, damaged, or of another task.
    """
    key = jax.random.key(config.seed)
    if config.data.task not in data_lib.TASKS:
        legal = f"must be one of {', '.join(data_lib.TASKS)}"
        raise reject("data.task", config.data.task, legal)
    task = data_lib.TASKS[config.data.task]
    if config.teacher.path:
        return _load_trained(config, len(task.labels))
    if config.model.path:
        folder = pretrained.resolve(config.model.path, "model.path")
        sizes, params = pretrained.load_encoder(
            folder,
            field="model.path",
            num_labels=len(task.labels),
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
        num_labels=len(task.labels),
        max_positions=config.data.max_length,
        dropout=model.dropout,
        dtype=model.dtype,
    )
    return Encoder(sizes), init_params(sizes, key), tokenizer


def _load_trained(config, num_labels):
    path = config.teacher.path
    if checkpoint.is_model(path):
        model, params, spec = checkpoint.load_model(path, field="teacher.path")
        if spec is not None:
            raise reject("teacher.path", path, "is a pruned model; give a dense one")
        sizes = dataclasses.replace(
            model.config, dropout=config.model.dropout, dtype=config.model.dtype
        )
        tokenizer = checkpoint.load_tokenizer(path)
    else:
        folder = pretrained.resolve(path, "teacher.path")
        sizes, params = pretrained.load_classifier(
            folder, field="teacher.path", model=config.model
        )
        tokenizer = pretrained.load_tokenizer(folder, "teacher.path")
    if sizes.num_labels != num_labels:
        raise reject(
            "teacher.path",
            path,
            f"has {sizes.num_labels} classes, task {config.data.task} has {num_labels}",
        )
    return Encoder(sizes), params, tokenizer


def check_model(config: Config, sizes: EncoderConfig, tokenizer: Any) -> None:
    """Raises UserError where lengths, vocabulary or target do not fit the model."""
    for field in ("data.max_length", "benchmark.seq_length"):
        value = config_lib.flatten(config)[field]
        if value > sizes.max_positions:
            legal = f"must be at most {sizes.max_positions}, the model's positions"
            raise reject(field, value, legal)
    if len(tokenizer) > sizes.vocab_size:
        raise reject(
            "teacher.path" if config.teacher.path else "model.path",
            config.teacher.path or config.model.path,
            f"its tokenizer has {len(tokenizer)} tokens, its weights "
            f"{sizes.vocab_size}",
        )
    highest = sparsity.max_sparsity(sizes, config.prune.kinds)
    if config.prune.target_sparsity > highest:
        raise reject(
            "prune.target_sparsity",
            config.prune.target_sparsity,
            f"gates of {tuple(config.prune.kinds)} reach at most {highest:.3f}",
        )


def check_rows(config: Config, train: data_lib.Examples) -> None:
    """Raises UserError where rows are too few; warns where gates cannot close."""
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
