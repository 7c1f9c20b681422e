"""The settings of a run: plain dataclasses whose fields stand with their rules.

A file in `configs/` returns a `Config`; the command line overrides single fields
(`--config.prune.targets=0.9`); the run writes the result to `config.json`.
Nothing changes a config after `validate`.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Callable
from typing import Any

from cofi_jax.errors import reject
from cofi_jax.models.spec import KINDS, check_kinds

DTYPES = ("float32", "bfloat16")

# With the Lagrangian, log-alphas have bounds: from the seed of the most important mask
# to the lower one it is so far.
_BOUNDED_SPREAD = 9.0


def _ruled(default: Any, legal: str, holds: Callable[[Any], bool]) -> Any:
    """A field whose values must satisfy `holds`; messages say that they are `legal`."""
    rule = {"legal": legal, "holds": holds}
    return dataclasses.field(default=default, metadata=rule)


def _count(default: int, least: int = 1) -> Any:
    legal = f"must be at least {least}" if least else "must not be negative"
    return _ruled(default, legal, lambda value: value >= least)


def _weight(default: float) -> Any:
    return _ruled(default, "must not be negative", lambda value: value >= 0)


def _rate(default: float) -> Any:
    return _ruled(default, "must be in (0, 100)", lambda value: 0 < value < 100)


def _fraction(default: float) -> Any:
    return _ruled(default, "must be in [0, 1)", lambda value: 0 <= value < 1)


def _fractions(*default: float) -> Any:
    def holds(values):
        pairs = zip(values, values[1:], strict=False)
        apart = all(after - before >= 1e-4 for before, after in pairs)
        return apart and (not values or 0 <= values[0] and values[-1] < 1)

    legal = "must be one or more rising fractions in [0, 1), 0.0001 or more apart"
    return _ruled(default, legal, holds)


def _speedups() -> Any:
    def holds(values):
        pairs = zip(values, values[1:], strict=False)
        apart = all(after >= 1.01 * before for before, after in pairs)
        return apart and (not values or 1 < values[0] and values[-1] < 1e6)

    return _ruled((), "must be rising numbers above 1, 1 % or more apart", holds)


def _share() -> Any:
    return _ruled(1.0, "must be in (0, 1]", lambda value: 0 < value <= 1)


def _choice(default: str, *others: str) -> Any:
    legal = default, *others
    return _ruled(default, f"must be one of {', '.join(legal)}", legal.__contains__)


def _schedule(default: str) -> Any:
    """The schedule of a rate: "linear" decay to 0, or "constant"."""
    rest = {"linear", "constant"} - {default}
    return _choice(default, *rest)


@dataclasses.dataclass
class Model:
    """The pretrained encoder; with an empty `path`, a new one of these sizes."""

    path: str = "bert-base-uncased"  # a name on the hub, or a folder
    num_layers: int = _count(12)
    num_heads: int = _count(12)
    hidden_size: int = _count(768)
    intermediate_size: int = _count(3072)
    dropout: float = _fraction(0.1)
    dtype: str = _choice(*DTYPES)  # of the matrix products


@dataclasses.dataclass
class Data:
    """The task, and where its rows come from."""

    task: str = "sst2"  # a row of tasks.TASKS, or "own"
    path: str = (
        ""  # a folder with train.* and validation.*, or a hub name; "": the task's
    )
    extra_file: str = ""  # more training rows, augmented ones say, in the same columns
    # Whether a cell of csv or tsv that begins with a quote is a quoted one, in which
    # quotes are doubled; False: quotes are characters like any other.
    quoting: bool = True
    # The most tokens of a row, special ones included; 0: the task's own.
    max_length: int = _ruled(
        0,
        "must be at least 3, or 0: the task's own length",
        lambda value: value == 0 or value >= 3,
    )
    # The padded lengths; (): chosen for the training rows.
    buckets: tuple[int, ...] = _ruled(
        (),
        "must be lengths >= 1 in rising order, or (): chosen for the rows",
        lambda value: [*value] == sorted({*value}) and min(value, default=1) >= 1,
    )
    # The rest describes the task "own", as the table describes its tasks.
    columns: tuple[str, ...] = ()  # the names of one or two columns of text
    # Of a multilabel problem perhaps several, "a,b"; "": the teacher's answers are the
    # labels.
    label_column: str = "label"
    group_column: str = ""  # of a ranking, what its query is known by; "": by its text
    problem: str = "classification"  # a key of data.problems.PROBLEMS
    labels: tuple[str, ...] = ()  # the names of class 0, 1, ...; (): the training rows'
    metrics: tuple[str, ...] = ()  # the first one decides; (): the problem's usual one
    # Of vectors, what they are scored by; see `data.embedding_sets`.
    pairs: str = ""  # pairs of texts with similarities; "": held-out texts
    retrieval: str = ""  # a folder in BEIR's layout, scored once for each model


@dataclasses.dataclass
class Stage:
    """What all stages that train have in common."""

    train_rows: int = _count(0, least=0)  # 0: all
    epochs: int = _count(20)
    batch_size: int = _count(32)
    # The parts that a batch is worked through in, one after another, to save memory.
    micro_batches: int = _count(1)
    learning_rate: float = _rate(2e-5)
    schedule: str = _schedule("linear")
    freeze_embeddings: bool = True


@dataclasses.dataclass
class Teacher(Stage):
    """The model to imitate: loaded from `path`, or trained when that is empty."""

    epochs: int = _count(3)
    freeze_embeddings: bool = False
    path: str = ""  # a saved model, or a Hugging Face folder with a classifier
    labels: tuple[str, ...] = ()  # that folder's classes in its order; (): the task's
    warmup_steps: int = _count(0, least=0)


@dataclasses.dataclass
class Distill:
    """How the student imitates the teacher (paper, section 3.2)."""

    logits: float = _weight(0.1)  # the weight of the logit term; 0 turns it off
    layers: float = _weight(0.9)  # that of the layer term; both 0: the task's own loss
    temperature: float = _ruled(2.0, "must be above 0", lambda value: value > 0)
    # The student layer for each teacher layer: the closest one; the closest ones in the
    # teacher's order; or the one of the same number.
    match: str = _choice("closest", "ordered", "fixed")
    num_layers: int = _count(4)  # the teacher layers to imitate
    # Which: evenly spaced ones, or a random one of each of equal windows.
    taught: str = _choice("even", "random")
    # Where the teacher's outputs for each row are kept between epochs.
    cache: str = _choice("none", "host", "device")


@dataclasses.dataclass
class Structure:
    """What stays of the dense model, where that is given by hand; by default, all.

    Which heads, feed-forward units and hidden dimensions stay follows from
    `prune.seeds`; with "equal", they are drawn at random. The target, the kinds of
    masks and `round_widths` are then not read.
    """

    # The layers, as a slice in Python: ":3" are the first three, "::2" every second.
    layers: str = _ruled(
        ":",
        "must be a slice of layers such as ':3' or '::2'",
        lambda value: re.fullmatch(r"(-?\d+)?:(-?\d+)?(:0*[1-9]\d*)?", value),
    )
    head: float = _share()  # of the heads of each of these layers
    intermediate: float = _share()  # of the feed-forward units of each of these layers
    hidden: float = _share()  # of the hidden dimensions


@dataclasses.dataclass
class Prune(Stage):
    """The pruning stage (paper, section 3.1 and appendix A).

    `epochs` includes `prepruning_epochs`. If both are equal, masks are not learned but
    follow from `seeds`, at the target, or in the structure that is given. They are 0 or
    1 then.
    """

    epochs: int = _count(20, least=0)
    kinds: tuple[str, ...] = KINDS
    # The sparsities of the models to make. Each is cut from the one before, once that
    # has recovered: the stages after pre-pruning run once for each target.
    targets: tuple[float, ...] = _fractions(0.95)
    # Or how many times as fast they are to be, as the benchmark measures it.
    target_speedup: tuple[float, ...] = _speedups()
    # How far the score may fall below the dense model's; 0: as far as it does. No more
    # models are made after the first one whose score falls further.
    max_drop: float = _fraction(0.0)
    latency_table: str = ""  # a file of such times; "": the run makes its own
    # What holds the expected sparsity at its target: the paper's multipliers, or a
    # common offset of all log-alphas, which meets it in every step.
    constraint: str = _choice("lagrangian", "exact")
    structure: Structure = dataclasses.field(default_factory=Structure)
    # Where log-alphas start: all alike as in the paper; by what each mask is worth
    # alone, or if what stays makes up for it; or by the magnitude of the parameters
    # that closing it removes.
    seeds: str = _choice("equal", "importance", "compensated", "magnitude")
    seed_batches: int = _count(40)  # batches that what masks are worth is measured on
    seed_spread: float = _weight(30.0)  # from the most to the least important mask
    round_widths: bool = True  # up to what the device likes: transforms.round_to_device
    # Batches that the output projections of a sliced model are fitted on, before it is
    # fine-tuned; with 0 they are not: training.reconstruction.
    reconstruction_batches: int = _count(0, least=0)
    sparsity_epsilon: float = _weight(0.01)  # so close to the target counts as met
    prepruning_epochs: int = _count(1, least=0)  # distillation before any mask moves
    warmup_epochs: int = _count(2, least=0)  # in which the target rises
    recover_epochs: int = _count(0, least=0)  # fine-tuning between targets; 0: its own
    mask_learning_rate: float = _rate(0.01)
    mask_schedule: str = _schedule("constant")
    multiplier_learning_rate: float = _rate(0.01)
    multiplier_schedule: str = _schedule("constant")

    @property
    def by_hand(self) -> bool:
        """Whether a structure is given by hand."""
        return self.structure != Structure()

    @property
    def cuts_hidden(self) -> bool:
        """Whether hidden dimensions are cut."""
        if self.by_hand:
            return self.structure.hidden < 1
        return "hidden" in self.kinds


@dataclasses.dataclass
class Finetune(Stage):
    """The training of the sliced model, with the same distillation."""

    schedule: str = _schedule("constant")


@dataclasses.dataclass
class Benchmark:
    """The dense and the pruned model, timed in turn on the run's device."""

    runtime: str = _choice("jax", "onnx", "onnx-int8")  # onnxruntime is for CPUs
    batch_size: int = _count(128)
    seq_length: int = _count(128)
    repeats: int = _count(30)


@dataclasses.dataclass
class Config:
    """A whole run: teacher, prune, slice, fine-tune, measure."""

    seed: int = _count(57, least=0)
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    teacher: Teacher = dataclasses.field(default_factory=Teacher)
    distill: Distill = dataclasses.field(default_factory=Distill)
    prune: Prune = dataclasses.field(default_factory=Prune)
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    benchmark: Benchmark = dataclasses.field(default_factory=Benchmark)
    eval_batch_size: int = _count(64)
    log_every: int = _count(50)  # steps
    eval_every: int = _count(500)  # steps
    checkpoint_every: int = _count(500)  # steps
    tensorboard: bool = False  # also write event files, with tensorboardX


def to_json(config: Config) -> str:
    """The exact config as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def flatten(config: Config | str) -> dict[str, Any]:
    """`{"prune.epochs": 20, ...}` of a config or of its JSON."""

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
    _check(config, Config(), "")
    check_kinds("prune.kinds", config.prune.kinds)
    for name in ("teacher", "prune", "finetune"):
        stage = getattr(config, name)
        if stage.batch_size % stage.micro_batches:
            legal = f"must divide {name}.batch_size={stage.batch_size}"
            raise reject(f"{name}.micro_batches", stage.micro_batches, legal)
    model, prune = config.model, config.prune
    _check_targets(prune)
    if model.hidden_size % model.num_heads:
        legal = f"must be a multiple of model.num_heads={model.num_heads}"
        raise reject("model.hidden_size", model.hidden_size, legal)
    if prune.by_hand and prune.epochs != prune.prepruning_epochs:
        legal = f"must be prune.prepruning_epochs={prune.prepruning_epochs} with a "
        raise reject("prune.epochs", prune.epochs, f"{legal}prune.structure")
    if prune.by_hand and len(prune.targets) > 1:
        legal = "must be a single one with a prune.structure, which does not read it"
        raise reject("prune.targets", prune.targets, legal)
    least = prune.prepruning_epochs
    if prune.constraint == "lagrangian" and not prune.by_hand:  # Its masks start open.
        least += 1
    if prune.epochs < least:
        legal = f"must be at least {least} with prune.prepruning_epochs="
        legal += f"{prune.prepruning_epochs} and prune.constraint={prune.constraint!r}"
        raise reject("prune.epochs", prune.epochs, legal)
    if prune.seeds == "compensated" and prune.cuts_hidden:
        legal = "must be equal, importance or magnitude where hidden dimensions are cut"
        raise reject("prune.seeds", prune.seeds, legal)
    if prune.constraint == "lagrangian" and prune.seeds != "equal":
        if prune.seed_spread > _BOUNDED_SPREAD:
            legal = (
                f"must be at most {_BOUNDED_SPREAD} with prune.constraint='lagrangian'"
            )
            raise reject("prune.seed_spread", prune.seed_spread, legal)
    if prune.reconstruction_batches and prune.cuts_hidden:
        legal = "must be 0 where hidden dimensions are cut, which the fit would miss"
        raise reject(
            "prune.reconstruction_batches", prune.reconstruction_batches, legal
        )
    left = prune.epochs - prune.prepruning_epochs
    if prune.warmup_epochs > left:
        legal = f"must be at most {left}, the epochs left after prune.prepruning_epochs"
        raise reject("prune.warmup_epochs", prune.warmup_epochs, legal)


def _check_targets(prune: Prune) -> None:
    speeds, usual = prune.target_speedup, Prune().targets
    if not (speeds or prune.targets):
        legal = "must be one or more where there is no prune.target_speedup"
        raise reject("prune.targets", prune.targets, legal)
    if not speeds:
        if prune.latency_table:
            legal = "is read with prune.target_speedup only"
            raise reject("prune.latency_table", prune.latency_table, legal)
        return
    if tuple(prune.targets) not in ((), usual):
        legal = f"goes without prune.targets, which are {tuple(prune.targets)}; leave "
        legal += "them out, or set --config.prune.targets='()'"
        raise reject("prune.target_speedup", speeds, legal)
    if "hidden" in prune.kinds:
        legal = "must be without 'hidden' with prune.target_speedup, whose times are "
        raise reject("prune.kinds", prune.kinds, f"{legal}those of one hidden size")
    if prune.by_hand:
        legal = "goes without a prune.structure, which does not read it"
        raise reject("prune.target_speedup", speeds, legal)


def section(kind: type, fields: dict[str, Any], *, field: str, path: str) -> Any:
    """One of the dataclasses above, `kind`, from its part of a JSON.

    Raises:
      UserError: for fields that `kind` does not have; `field` and `path` say where.
    """
    try:
        items = dict(fields).items()
        node = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in items})
        _check(node, kind(), "")
    except (TypeError, ValueError) as error:
        legal = f"its description does not fit this version: {error}"
        raise reject(field, path, legal) from error
    return node


def _check(node: Any, like: Any, prefix: str) -> None:
    """Checks the names, types and rules of all fields of a section.

    Args:
      node: the section.
      like: the same with default values, which have the legal types.
      prefix: what stands before the names of its fields in messages.
    """
    for name, value in vars(node).items():  # An assignment may be misspelt.
        if name not in vars(like):
            legal = f"no such field; the legal ones are {', '.join(vars(like))}"
            raise reject(prefix + name, value, legal)
    for field in dataclasses.fields(like):
        name, value = prefix + field.name, getattr(node, field.name)
        want = getattr(like, field.name)
        if dataclasses.is_dataclass(want):
            if type(value) is not type(want):
                raise reject(name, value, f"must be a {type(want).__name__}")
            _check(value, want, name + ".")
            continue
        if isinstance(want, tuple):
            item = typing.get_args(field.type)[0]
            legal = (float, int) if item is float else (item,)
            if not isinstance(value, tuple | list) or not all(
                type(x) in legal for x in value
            ):
                raise reject(name, value, f"must be a tuple of {item.__name__}")
        elif isinstance(want, float):
            if type(value) not in (int, float) or value - value != 0:  # inf, nan
                raise reject(name, value, "must be a finite number")
        elif type(value) is not type(want):
            raise reject(name, value, f"must be of type {type(want).__name__}")
        if type(value) is int and value >= 2**31:
            raise reject(name, value, "must be below 2**31")
        if field.metadata and not field.metadata["holds"](value):
            raise reject(name, value, field.metadata["legal"])
