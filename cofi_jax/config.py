"""What a run is told: plain dataclasses, checked once at the start.

A file in `configs/` returns a `Config`; the command line overrides single
fields (`--config.prune.target_sparsity=0.9`); the run writes the result to
`config.json`. Nothing changes a config after `validation.validate`.
"""

import dataclasses
import json
import typing
from typing import Any

from cofi_jax.errors import reject
from cofi_jax.models.spec import KINDS, check_kinds

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
class Model:
    """The pretrained encoder; with an empty `path`, a new one of these sizes."""

    path: str = "bert-base-uncased"  # hub name or folder
    num_layers: int = 12
    num_heads: int = 12
    hidden_size: int = 768
    intermediate_size: int = 3072
    dropout: float = 0.1
    dtype: str = "float32"  # of the matrix work: float32 or bfloat16


@dataclasses.dataclass
class Data:
    """The task and where its rows come from."""

    task: str = "sst2"  # a row of tasks.TASKS, or own
    path: str = ""  # folder with train.* and validation.*, or hub name; "": the task's
    extra_file: str = ""  # more training rows, augmented ones say, in the same columns
    max_length: int = 0  # tokens, special ones included; 0: the task's
    buckets: tuple[int, ...] = ()  # padded lengths; (): chosen for the training rows
    # What the table says of its tasks, for the task "own":
    columns: tuple[str, ...] = ()  # of text, one or two
    label_column: str = "label"
    problem: str = "classification"  # or regression
    labels: tuple[str, ...] = ()  # names of class 0, 1, ...; (): the training rows'
    metrics: tuple[str, ...] = ()  # the first is the score; (): accuracy, or spearman


@dataclasses.dataclass
class Teacher:
    """The model to imitate: loaded from `path`, or trained when that is empty."""

    path: str = ""  # a saved model or a Hugging Face folder with a classifier
    labels: tuple[str, ...] = ()  # that folder's classes in its order; (): the task's
    train_rows: int = 0  # 0: all
    epochs: int = 3
    batch_size: int = 32
    micro_batches: int = 1  # parts that a batch is worked through in, to save memory
    learning_rate: float = 2e-5
    schedule: str = "linear"  # linear decay to 0, or constant
    warmup_steps: int = 0
    freeze_embeddings: bool = False


@dataclasses.dataclass
class Distill:
    """How the student imitates the teacher (paper, section 3.2)."""

    logits: float = 0.1  # weight of the logit term; 0 turns it off
    layers: float = 0.9  # weight of the layer term; both 0: the task's own loss
    temperature: float = 2.0
    match: str = "closest"  # ordered: likewise, in order; fixed: one to one
    num_layers: int = 4  # teacher layers to imitate
    taught: str = "even"  # which: evenly spaced; random: one of each of equal windows
    cache: str = "none"  # keep what the teacher says of a row on the host, the device


@dataclasses.dataclass
class Prune:
    """The pruning stage (paper, section 3.1 and appendix A)."""

    kinds: tuple[str, ...] = KINDS
    target_sparsity: float = 0.95
    round_widths: bool = True  # up to what the device likes, see masks.round_to_device
    sparsity_epsilon: float = 0.01  # a checkpoint this close to the target may be best
    train_rows: int = 0
    epochs: int = 20  # prepruning_epochs included
    prepruning_epochs: int = 1  # distillation alone, before any gate moves
    warmup_epochs: int = 2  # the target rises linearly from 0 meanwhile
    batch_size: int = 32
    micro_batches: int = 1  # parts that a batch is worked through in, to save memory
    learning_rate: float = 2e-5
    schedule: str = "linear"
    mask_learning_rate: float = 0.01
    mask_schedule: str = "constant"
    multiplier_learning_rate: float = 0.01
    multiplier_schedule: str = "constant"
    freeze_embeddings: bool = True


@dataclasses.dataclass
class Finetune:
    """Training of the sliced model, with the same distillation."""

    train_rows: int = 0
    epochs: int = 20
    batch_size: int = 32
    micro_batches: int = 1  # parts that a batch is worked through in, to save memory
    learning_rate: float = 2e-5
    schedule: str = "constant"
    freeze_embeddings: bool = True


@dataclasses.dataclass
class Benchmark:
    """The dense and the pruned model, timed in turn on the run's device."""

    batch_size: int = 128
    seq_length: int = 128
    repeats: int = 30


@dataclasses.dataclass
class Config:
    """A whole run: teacher, prune, slice, fine-tune, measure."""

    seed: int = 57
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    teacher: Teacher = dataclasses.field(default_factory=Teacher)
    distill: Distill = dataclasses.field(default_factory=Distill)
    prune: Prune = dataclasses.field(default_factory=Prune)
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    benchmark: Benchmark = dataclasses.field(default_factory=Benchmark)
    eval_batch_size: int = 64
    log_every: int = 50  # steps
    eval_every: int = 500  # steps
    checkpoint_every: int = 500  # steps
    tensorboard: bool = False  # also write event files, with tensorboardX


def to_json(config: Config) -> str:
    """The exact config as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def flatten(config: Config | str) -> dict[str, Any]:
    """`{"prune.target_sparsity": 0.95, ...}` of a config or of its JSON."""

    def walk(node, prefix):
        for name, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    text = config if isinstance(config, str) else to_json(config)
    return dict(walk(json.loads(text), ""))


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
