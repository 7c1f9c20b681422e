"""What is run when speed is measured: sizes, a sliced model like the paper's, batches.

Batches have a task's own lengths: those of an epoch as it is planned for training,
each bucket as often as it comes there; or all the same length.
"""

import argparse
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from cofi_jax import checkpoint, pretrained, rivals, rows, sparsity, tasks
from cofi_jax import data as data_lib
from cofi_jax.config import DTYPES, Data, Model, reject
from cofi_jax.data import Examples
from cofi_jax.model import EncoderConfig, init_params

Plan = list[tuple[int, np.ndarray]]  # padded length and rows of each batch

# Of the paper's models at 95 %: three of twelve blocks of each kind, with 2 to 5 of 12
# heads and 100 to 700 of 3072 units, and 760 of 768 dimensions.
_BLOCKS, _HEADS, _UNITS, _HIDDEN = 3 / 12, (5, 2, 12), (700, 100, 3072), 760 / 768


class Subject(NamedTuple):
    """A dense model and one sliced from its like, in the same dtype."""

    dense: EncoderConfig
    sliced: EncoderConfig
    dense_params: dict
    sliced_params: dict
    tokenizer: Any  # or None


def subject(
    path: str, sizes: EncoderConfig, *, task: tasks.Task, dtype: str
) -> Subject:
    """The models to measure.

    Args:
      path: a Hugging Face encoder's folder or name, or a saved model, dense or sliced;
        with "" a random one of these `sizes`. Of a saved sliced model the dense one
        beside it is random; of a dense one the sliced one is.
      sizes: of the dense model without a path.
      task: gives a Hugging Face encoder its head.
      dtype: of the matrix work; parameters are float32.

    Raises:
      UserError: for a path without a model.
    """
    if dtype not in DTYPES:
        raise reject("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    key, params, tokenizer, sliced = jax.random.key(0), None, None, None
    if path and checkpoint.is_model(path):
        model, params, spec = checkpoint.load_model(path)
        tokenizer, sizes = checkpoint.load_tokenizer(path), model.config
        if spec is not None:
            about = checkpoint.read_about(path)[2]
            if "dense" not in about:
                raise reject("model", path, "saved without its dense sizes")
            sliced = (sizes, params)
            sizes, params = EncoderConfig.from_json(about["dense"]), None
    elif path:
        folder = pretrained.resolve(path, "model")
        sizes, params = pretrained.load_encoder(
            folder,
            field="model",
            num_labels=task.num_outputs,
            problem=task.problem,
            model=Model(),
            key=key,
        )
        tokenizer = pretrained.load_tokenizer(folder, "model")
    dense = dataclasses.replace(sizes, dtype=dtype)
    if params is None:
        params = init_params(dense, key)
    if sliced is None:
        small = like_the_paper(dense)
        sliced = (small, init_params(small, key))
    small = dataclasses.replace(sliced[0], dtype=dtype)
    return Subject(dense, small, params, sliced[1], tokenizer)


def sizes(options: argparse.Namespace, *, longest: int, vocab_size: int):
    """The dense `EncoderConfig` of `layers`, `hidden`, `heads` and `intermediate`.

    Raises:
      UserError: where the heads do not divide the hidden size.
    """
    if options.hidden % options.heads:
        legal = f"must be a multiple of heads={options.heads}"
        raise reject("hidden", options.hidden, legal)
    return EncoderConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden,
        heads=(options.heads,) * options.layers,
        head_size=options.hidden // options.heads,
        intermediate=(options.intermediate,) * options.layers,
        pooler_size=options.hidden,
        num_labels=2,
        max_positions=max(longest, 512),
    )


def like_the_paper(dense: EncoderConfig) -> EncoderConfig:
    """Sizes with about 95 % of the blocks' parameters gone, as the paper's have them.

    A quarter of the blocks of each kind stays, evenly spaced, those of the one kind
    between those of the other; the first ones are the widest.
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


def rounded(sliced: EncoderConfig, dense: EncoderConfig, multiple: int):
    """`sliced` with hidden and feed-forward widths raised to multiples, if not `dense`.

    An absent block stays absent.
    """

    def up(width, full):
        return min(-(-width // multiple) * multiple, full)

    return dataclasses.replace(
        sliced,
        hidden_size=up(sliced.hidden_size, dense.hidden_size),
        intermediate=tuple(map(up, sliced.intermediate, dense.intermediate)),
    )


def described(config: EncoderConfig, dense: EncoderConfig) -> dict[str, Any]:
    """Widths, encoder parameters and sparsity of a model, for the JSON."""
    params = sparsity.num_params({}, config)
    removed = 1 - params / sparsity.num_params({}, dense)
    return config.widths() | {"encoder_params": params, "sparsity": removed}


def check_length(length: int, config: EncoderConfig) -> None:
    """Raises UserError where the model has no positions for `length` tokens."""
    if length > config.longest:
        legal = f"must be at most {config.longest}, the model's positions"
        raise reject("seq_length", length, legal)


def training_work(
    options: argparse.Namespace, *, batches: int
) -> tuple[Subject, Examples, Plan]:
    """The models, rows and batches that a command line asks for.

    Args:
      options: `model` or `layers`, `hidden`, `heads`, `intermediate` and `vocab`;
        `data`, `task`, `seq_length`, `batch_size`, `dtype`.
      batches: how many there are to be.

    Raises:
      UserError: for what is not legal or is not there.
    """
    if options.torch_dtype not in ("", *DTYPES):
        legal = f"must be one of {', '.join(DTYPES)}"
        raise reject("torch_dtype", options.torch_dtype, legal)
    for field in ("torch_dtype", "torch_compile"):
        if getattr(options, field):
            rivals.require(field, getattr(options, field))
    settings = Data(options.task, options.data, max_length=options.seq_length)
    task, tokenizer, length = tasks.find(settings), None, options.seq_length or 64
    if options.data:
        length = tasks.max_length(settings)
    if options.vocab and not options.model:
        folder = pretrained.resolve(options.vocab, "vocab")
        tokenizer = pretrained.load_tokenizer(folder, "vocab")
    words = len(tokenizer) if tokenizer else 30522
    fallback = sizes(options, longest=length, vocab_size=words)
    found = subject(options.model, fallback, task=task, dtype=options.dtype)
    check_length(length, found.dense)
    if not options.data:
        count = batches * options.batch_size
        examples = random_rows(count, length, found.dense.vocab_size)
        chosen = np.arange(count).reshape(batches, -1)
        return found, examples, [(length, rows) for rows in chosen]
    tokenizer = found.tokenizer or tokenizer
    if tokenizer is None:
        raise reject("vocab", "", "must name a tokenizer's folder, or give --model")
    _, columns = rows.load(settings, ("train",))
    examples = data_lib.tokenise(
        columns["train"], task, tokenizer, max_length=length, training=True
    )
    plan = data_lib.epoch_plan(
        examples.lengths,
        batch_size=options.batch_size,
        buckets=data_lib.bucket_lengths(settings),
        seed=0,
        epoch=0,
    )
    return found, examples, sampled_plan(plan, batches, batch_size=options.batch_size)


def random_rows(count: int, length: int, vocab_size: int) -> Examples:
    """Rows of random tokens, all of one length, of class 0."""
    rng = np.random.default_rng(0)
    ids = rng.integers(vocab_size, size=(count, length), dtype=np.int32)
    labels = np.zeros(count, np.int32)
    return Examples([*ids], [*np.zeros_like(ids)], labels)


def sampled_plan(plan: Plan, count: int, *, batch_size: int) -> Plan:
    """`count` full batches of an epoch's plan, each length as often as it comes there.

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
    return [full[place] for place in sorted(chosen)]  # the plan is in random order


def at_random(plan: Plan, lengths: np.ndarray) -> Plan:
    """The same rows in batches drawn at random, each as long as its longest row."""
    every = np.concatenate([chosen for _, chosen in plan])
    batches = np.random.default_rng(0).permutation(every).reshape(len(plan), -1)
    return [(int(lengths[chosen].max()), chosen) for chosen in batches]
