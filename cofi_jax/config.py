"""What a run is told: plain dataclasses, checked once at the start.

A file in `configs/` returns a `Config`; the command line overrides single
fields (`--config.prune.target_sparsity=0.9`); the run writes the result to
`config.json`. Nothing changes a config after `validation.validate`.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

KINDS = ("head", "mha", "intermediate", "ffn", "hidden")
DTYPES = ("float32", "bfloat16")


class UserError(ValueError):
    """Something the user can mend, said in one line; programs exit with 2."""


def reject(field: str, value: Any, legal: str) -> UserError:
    """The one shape of every complaint: the field, its value, what is legal."""
    return UserError(f"{field}={value!r}: {legal}")


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


def check_kinds(field: str, kinds: Sequence[str]) -> None:
    """Raises UserError unless `kinds` are known, at least one and none twice."""
    if isinstance(kinds, str) or not kinds:
        raise reject(field, kinds, f"must be a tuple of one or more of {KINDS}")
    for kind in kinds:
        if kind not in KINDS:
            raise reject(field, kind, f"unknown mask kind; must be among {KINDS}")
    if len(set(kinds)) != len(kinds):
        raise reject(field, tuple(kinds), "names a kind twice")
