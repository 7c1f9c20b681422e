"""Whether a config says something that can be done, as far as it tells by itself."""

import dataclasses
import typing
from typing import Any

from cofi_jax.config import DTYPES, Config, check_kinds, flatten, reject


def validate(config: Config) -> None:
    """Checks what can be known without reading data or model.

    Raises:
      UserError: names the first field that is wrong, its value and what is legal.
    """
    _check_types(config, Config(), "")
    prune, data = config.prune, config.data
    if not 0 <= prune.target_sparsity < 1:
        raise reject(
            "prune.target_sparsity", prune.target_sparsity, "must be in [0, 1)"
        )
    check_kinds("prune.kinds", prune.kinds)
    choices = {
        "model.dtype": DTYPES,
        "teacher.schedule": ("linear", "constant"),
        "prune.schedule": ("linear", "constant"),
        "prune.mask_schedule": ("linear", "constant"),
        "prune.multiplier_schedule": ("linear", "constant"),
        "finetune.schedule": ("linear", "constant"),
        "distill.match": ("closest", "ordered", "fixed"),
        "distill.taught": ("even", "random"),
        "distill.cache": ("none", "host", "device"),
        "data.problem": ("classification", "regression"),
    }
    flat = flatten(config)
    for field, legal in choices.items():
        if flat[field] not in legal:
            raise reject(field, flat[field], f"must be one of {', '.join(legal)}")
    for field, value in flat.items():
        name = field.rsplit(".", 1)[-1]
        if name in _AT_LEAST_ONE and value < 1:
            raise reject(field, value, "must be at least 1")
        if name in _NOT_NEGATIVE and value < 0:
            raise reject(field, value, "must not be negative")
        if type(value) is int and value >= 2**31:
            raise reject(field, value, "must be below 2**31")
        if name.endswith("learning_rate") and not 0 < value < 100:
            raise reject(field, value, "must be in (0, 100)")
    for field in ("teacher", "prune", "finetune"):
        size, parts = (flat[f"{field}.{n}"] for n in ("batch_size", "micro_batches"))
        if size % parts:
            legal = f"must divide {field}.batch_size={size}"
            raise reject(f"{field}.micro_batches", parts, legal)
    if not 0 <= config.model.dropout < 1:
        raise reject("model.dropout", config.model.dropout, "must be in [0, 1)")
    if config.distill.temperature <= 0:
        raise reject(
            "distill.temperature", config.distill.temperature, "must be above 0"
        )
    if config.model.hidden_size % config.model.num_heads:
        raise reject(
            "model.hidden_size",
            config.model.hidden_size,
            f"must be a multiple of model.num_heads={config.model.num_heads}",
        )
    if prune.epochs <= prune.prepruning_epochs:
        raise reject(
            "prune.epochs",
            prune.epochs,
            f"must be above prune.prepruning_epochs={prune.prepruning_epochs}",
        )
    if prune.prepruning_epochs + prune.warmup_epochs > prune.epochs:
        raise reject(
            "prune.warmup_epochs",
            prune.warmup_epochs,
            f"must be at most {prune.epochs - prune.prepruning_epochs}, the epochs "
            "left after prune.prepruning_epochs",
        )
    buckets = tuple(data.buckets)
    if buckets != tuple(sorted(set(buckets))) or min(buckets, default=1) < 1:
        legal = "must be lengths >= 1 in rising order, or (): chosen for the rows"
        raise reject("data.buckets", buckets, legal)
    if data.max_length and data.max_length < 3:
        legal = "must be at least 3, or 0: the task's own length"
        raise reject("data.max_length", data.max_length, legal)


def section(kind: type, fields: dict[str, Any], *, field: str, path: str) -> Any:
    """One of the dataclasses above, `kind`, from its part of a JSON.

    Raises:
      UserError: for fields that `kind` does not have; `field` and `path` say where.
    """
    try:
        items = dict(fields).items()
        node = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in items})
        _check_types(node, kind(), "")
    except (TypeError, ValueError) as error:
        legal = f"its description does not fit this version: {error}"
        raise reject(field, path, legal) from error
    return node


_AT_LEAST_ONE = {
    "num_layers",
    "num_heads",
    "hidden_size",
    "intermediate_size",
    "batch_size",
    "micro_batches",
    "eval_batch_size",
    "seq_length",
    "repeats",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "epochs",
}
_NOT_NEGATIVE = {
    "seed",
    "train_rows",
    "warmup_steps",
    "prepruning_epochs",
    "warmup_epochs",
    "sparsity_epsilon",
    "logits",
    "layers",
}


def _check_types(node: Any, like: Any, prefix: str) -> None:
    for name, value in vars(node).items():  # an assignment may be misspelt
        if name not in vars(like):
            legal = f"no such field; the legal ones are {', '.join(vars(like))}"
            raise reject(prefix + name, value, legal)
    for field in dataclasses.fields(like):
        name, value = prefix + field.name, getattr(node, field.name)
        want = getattr(like, field.name)
        if dataclasses.is_dataclass(want):
            if type(value) is not type(want):
                raise reject(name, value, f"must be a {type(want).__name__}")
            _check_types(value, want, name + ".")
        elif isinstance(want, tuple):
            item = typing.get_args(field.type)[0]
            if not isinstance(value, tuple | list) or not all(
                type(x) is item for x in value
            ):
                raise reject(name, value, f"must be a tuple of {item.__name__}")
        elif isinstance(want, float):
            if type(value) not in (int, float) or value - value != 0:  # inf, nan
                raise reject(name, value, "must be a finite number")
        elif type(value) is not type(want):
            raise reject(name, value, f"must be of type {type(want).__name__}")
