"""The inputs of a run, all of which are checked before anything is written."""

import dataclasses
import math
import pathlib
import re
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from cofi_jax import distributed
from cofi_jax.checkpoints import huggingface, saved_model, tokenizers
from cofi_jax.checkpoints.load import load_hugging_face
from cofi_jax.config import Config, Model, flatten
from cofi_jax.data import batches, sources, tasks, toy
from cofi_jax.data.tasks import Task
from cofi_jax.errors import at_most, reject, warn
from cofi_jax.evaluation import predict
from cofi_jax.models.bert import Encoder, init_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import constraint, hard_concrete, slicing
from cofi_jax.run import speed, structure
from cofi_jax.training import teacher as teacher_lib

# A run may go on with other values of these, which change how it works, not its result.
HOW_NOT_WHAT = ("tensorboard", "distill.cache")


class Inputs(NamedTuple):
    """What a run starts from.

    Attributes:
      task: the task.
      examples: the rows of each split, "train" first.
      model: the dense module.
      params: its parameters; those of the teacher with `teacher.path`, else to train.
      tokenizer: the Hugging Face tokenizer.
      judge: the task with the settings of the teacher, whose answers are the labels;
        None where rows have labels.
    """

    task: Task
    examples: dict[str, batches.Examples]
    model: Encoder
    params: dict
    tokenizer: Any
    judge: Task | None = None


def load_inputs(config: Config) -> Inputs:
    """Reads rows and model, and checks whether they fit the config.

    Raises:
      UserError: for what is not there, is damaged, or does not fit.
    """
    check_batch_sizes(config)
    task = find_task(config)
    splits = ("train", *task.validation)
    task, columns = sources.load(task, splits)
    model, params, tokenizer = load_teacher(config, task)
    if task.problem.pools and config.prune.cuts_hidden:
        params, sizes = slicing.keep_width(params, model.config)
        model = Encoder(sizes)
    _check_model(config, task, model.config, tokenizer)
    examples, judge = {}, None if task.label_column else _as_the_teacher(config, task)
    for split in splits:
        texts = columns.pop(split)
        if split != "train" or not task.problem.pools:  # Vectors are not learned so.
            texts = predict.answered(
                predict.make_predict(model),
                params,
                judge or task,
                texts,
                tokenizer,
                batch_size=config.eval_batch_size,
            )
        examples[split] = task.tokenise(texts, tokenizer, training=split == "train")
        if len(examples[split]):
            where = _source(config)
            tokenizers.check_texts(tokenizer, examples[split], texts, task, **where)
    _check_rows(config, examples["train"])
    teacher_lib.check_teacher_cache(config, model.config, examples["train"])
    return Inputs(task, examples, model, params, tokenizer, judge)


def find_task(config: Config) -> Task:
    """The task; where rows have no labels, its classes are those of the teacher.

    Raises:
      UserError: for a task that there is not, and for no labels and no teacher.
    """
    task, path = tasks.find(config.data), config.teacher.path
    if task.label_column:
        return task
    if not path and task.problem.pools:
        legal = "must be a folder of sentence-transformers, whose vectors are imitated"
        raise reject("teacher.path", "", legal)
    if not path:
        legal = "rows without labels need a teacher.path, the model whose answers take "
        raise reject("data.label_column", "", f"{legal}their place")
    given = task.labels or config.teacher.labels
    if not task.problem.names_classes:
        return task
    if saved_model.is_model(path):  # Its settings are those of its classes in order.
        about = saved_model.read_about(path, field="teacher.path")[2]
        labels = tuple(about.get("labels", ()))
        if not labels:
            legal = f"names no classes, which data.problem={config.data.problem} needs"
            raise reject("teacher.path", path, legal)
        if task.labels not in ((), labels):
            legal = f"must be those of {path} in its order, {labels}, or none"
            raise reject("data.labels", task.labels, legal)
    elif given:
        labels = given
    else:
        folder = huggingface.resolve(path, "teacher.path")
        labels = huggingface.class_names(folder, "teacher.path")
    return tasks.find(dataclasses.replace(config.data, labels=labels))


def _as_the_teacher(config, task):
    """The task with the settings that were chosen for the teacher."""
    path = config.teacher.path
    if not saved_model.is_model(path):
        return task
    own = saved_model.saved_task(path, field="teacher.path")
    return task.with_settings(own.problem.settings)


def digest(config: Config, inputs: Inputs) -> int:
    """A digest of what decides a run's result: settings, rows and loaded parameters.

    Parameters that are drawn at random are left out. They follow from the seed, but
    differ in their last bits between kinds of devices, and a run may change its device.
    So are labels that are the teacher's answers.
    """
    params = inputs.params if config.teacher.path or config.model.path else {}
    if not config.teacher.path:
        drawn = ("pooler", "classifier")
        params = {name: part for name, part in params.items() if name not in drawn}
    rows = [
        (np.concatenate(part.input_ids), part.lengths, _given(part, inputs.task))
        for part in inputs.examples.values()
    ]
    settings = {k: v for k, v in flatten(config).items() if k not in HOW_NOT_WHAT}
    return zlib.crc32(f"{settings} {distributed.digest((params, rows))}".encode())


def _given(part, task):
    """What rows come with besides their tokens, as arrays; no answers of a teacher."""
    if task.label_column:
        return part.labels
    if part.uncut is None:
        return ()
    return part.uncut.of_row, getattr(part.uncut, "judgements", ())


def load_teacher(config: Config, task: Task) -> tuple[Encoder, dict, Any]:
    """The module, its parameters (to be trained without `teacher.path`), tokenizer.

    Raises:
      UserError: for a model that is not there, damaged, or of another task.
    """
    key = jax.random.key(config.seed)
    if task.problem.pools:
        _check_teacher_alone(config)
    if config.teacher.path:
        return _load_trained(config, task)
    if config.teacher.labels:
        legal = "goes with teacher.path; without it the task gives the order"
        raise reject("teacher.labels", config.teacher.labels, legal)
    if config.model.path:
        folder = huggingface.resolve(config.model.path, "model.path")
        sizes, params = huggingface.load_encoder(
            folder,
            field="model.path",
            num_labels=task.num_outputs,
            problem=task.problem.name,
            model=config.model,
            key=key,
        )
        tokenizer = tokenizers.load_tokenizer(folder, "model.path")
        return Encoder(sizes), params, tokenizer
    if config.data.task != "demo":
        legal = "must name an encoder; only the demo task brings its own tokenizer"
        raise reject("model.path", "", legal)
    tokenizer = toy.demo_tokenizer()
    settings = dataclasses.asdict(config.model)
    del settings["path"]
    sizes = EncoderConfig.dense(
        **settings,
        vocab_size=len(tokenizer),
        num_labels=task.num_outputs,
        max_positions=task.max_length,
    )
    return Encoder(sizes), init_params(sizes, key), tokenizer


def _check_teacher_alone(config):
    """Raises UserError unless the teacher alone says what is learned."""
    others = "", Model().path, config.teacher.path
    if config.model.path not in others:
        legal = "must be empty: the student starts from teacher.path, whose tokenizer "
        raise reject("model.path", config.model.path, f"{legal}both of them have")
    if not config.distill.logits:
        legal = "must be above 0, since there are no labels"
        raise reject("distill.logits", config.distill.logits, legal)


def _load_trained(config, task):
    path, order = config.teacher.path, config.teacher.labels
    pruned = reject("teacher.path", path, "is a pruned model; give a dense one")
    if saved_model.is_model(path):
        if order:
            legal = "is for Hugging Face folders; a saved model knows its own"
            raise reject("teacher.labels", order, legal)
        model, params, spec = saved_model.load_model(path, field="teacher.path")
        if spec is not None:
            raise pruned
        sizes = dataclasses.replace(
            model.config, dropout=config.model.dropout, dtype=config.model.dtype
        )
        tokenizer = saved_model.load_tokenizer(path, field="teacher.path")
        params = _in_order(params, saved_model.read_about(path)[2], task, path)
    else:
        found = load_hugging_face(
            path, task, field="teacher.path", labels=order, model=config.model
        )
        sizes, params, tokenizer = found.model.config, found.params, found.tokenizer
        if sizes.widths() != found.dense.widths():
            raise pruned
    found = sizes.problem, sizes.num_labels
    if found != (task.problem.name, task.num_outputs or sizes.num_labels):
        legal = f"is made for {found[0]} with {found[1]} outputs, task "
        legal += f"{config.data.task} for {task.problem.name} with {task.num_outputs}"
        raise reject("teacher.path", path, legal)
    return Encoder(sizes), params, tokenizer


def base_model(config: Config) -> str:
    """The name on the hub of the model that the run starts from, or ""."""
    path = config.teacher.path or config.model.path
    if saved_model.is_model(path):
        return saved_model.read_about(path)[2].get("base_model", "")
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


def _check_model(
    config: Config, task: Task, sizes: EncoderConfig, tokenizer: Any
) -> None:
    """Raises UserError where lengths, vocabulary or target do not fit the model."""
    for field, value in (
        ("data.max_length", task.max_length),
        ("benchmark.seq_length", config.benchmark.seq_length),
    ):
        if value > sizes.longest:
            legal = f"must be at most {sizes.longest}, the model's positions"
            raise reject(field, value, legal)
    source = _source(config)
    tokenizers.check_tokenizer(tokenizer, sizes, **source)
    tokenizers.check_writable(tokenizer, sizes, **source)
    prune = config.prune
    speed.check(config, sizes)
    if prune.target_speedup:
        return
    if prune.by_hand:
        structure.targets(prune, sizes)  # It raises where no layer is left.
        return
    bounds = {"lowest": -math.inf} if prune.constraint == "exact" else {}
    highest = min(
        constraint.max_sparsity(sizes, prune.kinds, **bounds),
        constraint.most_removable(sizes, prune.kinds),
    )
    if config.prune.targets[-1] > highest:
        raise reject(
            "prune.targets",
            config.prune.targets,
            f"masks of {tuple(config.prune.kinds)} reach {at_most(highest)}",
        )


def _source(config):
    """The field that named the model's folder, and its value."""
    field = "teacher.path" if config.teacher.path else "model.path"
    return {"field": field, "path": config.teacher.path or config.model.path}


def _check_rows(config: Config, train: batches.Examples) -> None:
    """Raises UserError where rows are too few; warns where masks cannot close."""
    if not len(train):
        legal = "holds no training question whose answer is in its context"
        raise reject("data.path", config.data.path, legal)
    for field in ("teacher", "finetune", "prune"):
        rows = getattr(config, field).train_rows
        rows = batches.first_rows(train, rows, field=f"{field}.train_rows")
    prune = config.prune
    if prune.constraint == "exact":  # A common offset closes masks.
        return
    steps = batches.steps_per_epoch(len(rows), prune.batch_size)
    steps *= prune.epochs - prune.prepruning_epochs
    if not steps:  # A structure is given by hand.
        return
    if prune.mask_schedule == "linear":  # which covers half the way
        steps /= 2
    enough = hard_concrete.CLOSING_DISTANCE / steps
    if prune.mask_learning_rate < enough:
        unit = 10.0 ** (math.floor(math.log10(enough)) - 1)
        enough = math.ceil(enough / unit) * unit  # two digits, never too few
        warn(
            f"prune.mask_learning_rate={prune.mask_learning_rate}: too low for masks "
            f"to close in the schedule's steps; {enough:.2g} or more would do"
        )


def check_batch_sizes(config: Config) -> None:
    """Raises UserError unless every batch can be dealt out evenly."""
    count = jax.device_count()
    for field in ("teacher", "prune", "finetune"):
        stage = getattr(config, field)
        if stage.batch_size % (count * stage.micro_batches):
            legal = f"must be a multiple of {count * stage.micro_batches}, the number "
            legal += "of devices" + " times micro_batches" * (stage.micro_batches > 1)
            raise reject(f"{field}.batch_size", stage.batch_size, legal)
    if config.eval_batch_size % count:
        legal = f"must be a multiple of {count}, the number of devices"
        raise reject("eval_batch_size", config.eval_batch_size, legal)
