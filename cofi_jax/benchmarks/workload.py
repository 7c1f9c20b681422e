"""The work that is measured: sizes, a sliced model like the paper's, and batches.

The rows of a batch are as long as a task's own: the batches are those of an epoch as it
is planned for training, each length as often as it comes there. Without a task all rows
have one length.
"""

import argparse
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from cofi_jax.benchmarks import baselines
from cofi_jax.checkpoints import huggingface, saved_model
from cofi_jax.config import DTYPES, Data, Model
from cofi_jax.data import batches as batches_lib
from cofi_jax.data import sources, tasks, toy
from cofi_jax.data.batches import Examples
from cofi_jax.errors import reject
from cofi_jax.models.bert import init_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import cost

_VOCAB_SIZE, _SEQ_LENGTH = 30522, 64  # the defaults

Plan = list[tuple[int, np.ndarray]]  # the padded length and the rows of each batch


class Subject(NamedTuple):
    """A dense model and one sliced from its like, in the same dtype."""

    dense: EncoderConfig
    sliced: EncoderConfig
    dense_params: dict
    sliced_params: dict
    tokenizer: Any  # or None


def load(
    options: argparse.Namespace,
    *,
    task: tasks.Task,
    longest: int,
    tokenizer: Any = None,
    texts: bool = False,
) -> Subject:
    """Loads the models that a command line asks for.

    Args:
      options: has `dtype` and `model`, which names a Hugging Face encoder, or a saved
        model, dense or sliced; with "" the model is a random one of `layers`, `hidden`,
        `heads` and `intermediate`. Beside a saved sliced model stands a random dense
        one, beside a dense model a random sliced one.
      task: the task whose head a Hugging Face encoder gets.
      longest: the tokens of the longest row.
      tokenizer: the tokenizer of a random model.
      texts: whether the tokenizer of another model is needed.

    Raises:
      UserError: for a path without a model, or one without that many positions.
    """
    path, dtype, key = options.model, options.dtype, jax.random.key(0)
    for field in ("torch_dtype", "torch_compile"):
        if value := getattr(options, field, ""):
            baselines.require(field, value)
    if dtype not in DTYPES:
        raise reject("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    params, sliced = None, None
    if not path:
        sizes = dense(
            layers=options.layers,
            hidden=options.hidden,
            heads=options.heads,
            intermediate=options.intermediate,
            vocab_size=len(tokenizer) if tokenizer else _VOCAB_SIZE,
            longest=longest,
        )
    elif saved_model.is_model(path):
        model, params, spec = saved_model.load_model(path)
        tokenizer = saved_model.load_tokenizer(path) if texts else None
        sizes = model.config
        if spec is not None:
            about = saved_model.read_about(path)[2]
            if "dense" not in about:
                raise reject("model", path, "saved without the sizes it was cut from")
            sliced = sizes, params
            sizes, params = EncoderConfig.from_json(about["dense"]), None
    else:
        folder = huggingface.resolve(path, "model")
        sizes, params = huggingface.load_encoder(
            folder,
            field="model",
            num_labels=task.num_outputs,
            problem=task.problem.name,
            model=Model(),
            key=key,
        )
        tokenizer = huggingface.load_tokenizer(folder, "model") if texts else None
    if longest > sizes.longest:
        legal = f"must be at most {sizes.longest}, the model's positions"
        raise reject("seq_length", longest, legal)
    sizes = dataclasses.replace(sizes, dtype=dtype)
    if params is None:
        params = init_params(sizes, key)
    if sliced is None:
        small = like_the_paper(sizes)
        sliced = small, init_params(small, key)
    small = dataclasses.replace(sliced[0], dtype=dtype)
    return Subject(sizes, small, params, sliced[1], tokenizer)


def training_work(
    options: argparse.Namespace, *, batches: int = 0
) -> tuple[Subject, Examples, Plan]:
    """Loads the models, rows and batches that a command line asks for.

    Args:
      options: has the options of `load`, and `data`, `task`, `vocab`, `seq_length`,
        `batch_size` and `torch_dtype`.
      batches: how many; 0 for all of an epoch, or for one where there is no `data`.

    Raises:
      UserError: for options that are not legal and for files that do not exist.
    """
    if dtype := options.torch_dtype:
        if dtype not in DTYPES:
            raise reject("torch_dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    task, tokenizer = _asked(options)
    length = options.seq_length or _SEQ_LENGTH
    if options.data:
        length = task.max_length
    found = load(
        options,
        task=task,
        longest=length,
        tokenizer=tokenizer,
        texts=bool(options.data),
    )
    if not options.data:
        batches = batches or 1
        count = batches * options.batch_size
        examples = random_rows(count, length, found.dense.vocab_size)
        chosen = np.arange(count).reshape(batches, -1)
        return found, examples, [(length, rows) for rows in chosen]
    tokenizer = found.tokenizer or tokenizer
    task, columns = sources.load(task, ("train",))
    examples = task.tokenise(columns["train"], tokenizer, training=True)
    plan = batches_lib.epoch_plan(
        examples.lengths,
        batch_size=options.batch_size,
        buckets=batches_lib.bucket_lengths(task, examples.lengths),
        seed=0,
        stage="",
        epoch=0,
    )
    if batches:
        plan = sampled_plan(plan, batches, batch_size=options.batch_size)
    return found, examples, plan


def to_start(options: argparse.Namespace) -> tuple[Subject, tasks.Task]:
    """Loads the models, with a tokenizer, and the task of a run, by default the demo.

    Raises:
      UserError: as `training_work`.
    """
    task, tokenizer = _asked(options)
    if not options.data:
        task = tasks.find(Data("demo", max_length=options.seq_length))
        tokenizer = toy.demo_tokenizer()
        if options.model:
            raise reject("model", options.model, "needs --data, a folder of a task")
    found = load(
        options, task=task, longest=task.max_length, tokenizer=tokenizer, texts=True
    )
    return found._replace(tokenizer=found.tokenizer or tokenizer), task


def _asked(options):
    """Returns the task, and the tokenizer in `vocab` or None."""
    data = Data(options.task, options.data, max_length=options.seq_length)
    task, tokenizer = tasks.find(data), None
    if options.vocab:
        folder = huggingface.resolve(options.vocab, "vocab")
        tokenizer = huggingface.load_tokenizer(folder, "vocab")
    elif options.data and not options.model:
        raise reject("vocab", "", "must name a tokenizer's folder, or give --model")
    return task, tokenizer


def random_rows(count: int, length: int, vocab_size: int) -> Examples:
    """Returns rows of random tokens, all of one length and of class 0."""
    rng = np.random.default_rng(0)
    ids = rng.integers(vocab_size, size=(count, length), dtype=np.int32)
    labels = np.zeros(count, np.int32)
    return Examples([*ids], [*np.zeros_like(ids)], labels)


def sampled_plan(plan: Plan, count: int, *, batch_size: int) -> Plan:
    """Takes `count` full batches of an epoch's plan, each length in proportion.

    Shares are rounded by largest remainder, so a rare length may be missing.

    Raises:
      UserError: where there are fewer full batches.
    """
    full = [each for each in plan if len(each[1]) == batch_size]
    if count > len(full):
        legal = f"must be at most {len(full)}, the full batches of an epoch"
        raise reject("batches", count, legal)
    lengths = np.array([length for length, _ in full])
    kinds, often = np.unique(lengths, return_counts=True)
    shares = often * count / len(full)
    quota = np.floor(shares).astype(int)
    short = count - quota.sum()
    quota[np.argsort(quota - shares, kind="stable")[:short]] += 1
    chosen = [
        place
        for kind, number in zip(kinds, quota, strict=True)
        for place in np.flatnonzero(lengths == kind)[:number]
    ]
    return [full[place] for place in sorted(chosen)]  # The plan is in random order.


def at_random(plan: Plan, lengths: np.ndarray) -> Plan:
    """Returns the rows in batches drawn at random, each as long as its longest row."""
    every = np.concatenate([chosen for _, chosen in plan])
    batches = np.random.default_rng(0).permutation(every).reshape(len(plan), -1)
    return [(int(lengths[chosen].max()), chosen) for chosen in batches]


# The paper's models at 95 % keep three of twelve blocks of each kind, with 2 to 5 of 12
# heads and 100 to 700 of 3072 units, and 760 of 768 dimensions.
_BLOCKS, _HEADS, _UNITS, _HIDDEN = 3 / 12, (5, 2, 12), (700, 100, 3072), 760 / 768


def dense(
    *,
    layers: int,
    hidden: int,
    heads: int,
    intermediate: int,
    vocab_size: int,
    longest: int,
) -> EncoderConfig:
    """Returns a dense classifier's sizes, with positions for 512 tokens or `longest`.

    Raises:
      UserError: where the heads do not divide the hidden size.
    """
    if hidden % heads:
        raise reject("hidden", hidden, f"must be a multiple of heads={heads}")
    return EncoderConfig.dense(
        num_layers=layers,
        num_heads=heads,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocab_size,
        num_labels=2,
        max_positions=max(longest, 512),
    )


def like_the_paper(dense: EncoderConfig) -> EncoderConfig:
    """Returns sizes without about 95 % of the blocks' parameters, as in the paper.

    A quarter of the blocks of each kind stays, evenly spaced, those of the one kind
    between those of the other. The first ones are the widest.
    """
    layers = len(dense.heads)
    blocks = max(1, round(_BLOCKS * layers))

    def widths(full, first, shape):
        most, least, of = shape
        found = [0] * layers
        places = np.linspace(first, layers - 1, blocks + 1)[:-1].astype(int)
        shares = np.linspace(most, least, blocks) / of
        for place, share in zip(places, shares, strict=True):
            found[place] = max(1, round(share * full))
        return tuple(found)

    return dataclasses.replace(
        dense,
        hidden_size=max(1, round(_HIDDEN * dense.hidden_size)),
        heads=widths(dense.heads[0], 0, _HEADS),
        intermediate=widths(dense.intermediate[0], min(1, layers - 1), _UNITS),
    )


def rounded(
    sliced: EncoderConfig, dense: EncoderConfig, multiple: int
) -> EncoderConfig:
    """Returns `sliced` with feed-forward widths raised to multiples.

    They are at most those of `dense`, and an absent block stays absent.
    """

    def up(width, full):
        return min(-(-width // multiple) * multiple, full)

    return dataclasses.replace(
        sliced,
        intermediate=tuple(map(up, sliced.intermediate, dense.intermediate)),
    )


def described(config: EncoderConfig, dense: EncoderConfig) -> dict[str, Any]:
    """Returns widths, encoder parameters and sparsity of a model, for the JSON."""
    params = cost.num_params({}, config)
    removed = 1 - params / cost.num_params({}, dense)
    return config.widths() | {"encoder_params": params, "sparsity": removed}
