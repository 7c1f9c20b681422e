"""The models that are measured: a dense one, and one sliced like the paper's."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from cofi_jax.checkpoints import huggingface, saved_model, tokenizers
from cofi_jax.config import Model
from cofi_jax.data import tasks
from cofi_jax.data.batches import Examples
from cofi_jax.errors import reject
from cofi_jax.models.bert import init_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import cost


class Subject(NamedTuple):
    """A dense model and one sliced from its like, in the same dtype."""

    dense: EncoderConfig
    sliced: EncoderConfig
    dense_params: dict
    sliced_params: dict
    tokenizer: Any = None  # or None


def load(
    path: str,
    *,
    dtype: str,
    longest: int,
    layers: int,
    hidden: int,
    heads: int,
    intermediate: int,
    task: tasks.Task | None = None,
) -> Subject:
    """Loads the models that a command line asks for.

    Args:
      path: of a Hugging Face encoder, or of a saved model, dense or sliced. With "" the
        model is a random one. Beside a saved sliced model stands a random dense one,
        beside a dense model a random sliced one.
      dtype: of the matrix products.
      longest: the tokens of the longest row.
      layers: of a random model.
      hidden: its hidden size.
      heads: its heads in a layer, which divide the hidden size.
      intermediate: its feed-forward units in a layer.
      task: the task whose head a Hugging Face encoder gets, with its tokenizer; None
        for a head of two classes, without one.

    Raises:
      UserError: for sizes that do not fit, a path without a model, or one without that
        many positions.
    """
    key, params, tokenizer = jax.random.key(0), None, None
    sliced, sliced_params = None, None
    if not path:
        if hidden % heads:
            raise reject("hidden", hidden, f"must be a multiple of heads={heads}")
        dense = EncoderConfig.dense(
            num_layers=layers,
            num_heads=heads,
            hidden_size=hidden,
            intermediate_size=intermediate,
            vocab_size=30522,
            num_labels=2,
            max_positions=max(longest, 512),
        )
    elif saved_model.is_model(path):
        model, params, spec = saved_model.load_model(path)
        dense, tokenizer = model.config, None
        if task:
            tokenizer = saved_model.load_tokenizer(path)
        if spec:
            sliced, sliced_params, params = dense, params, None
            dense = EncoderConfig.from_json(saved_model.read_about(path)[2]["dense"])
    else:
        folder = huggingface.resolve(path, "model")
        of = task or tasks.TASKS["sst2"]
        head = {"num_labels": of.num_outputs, "problem": of.problem.name}
        dense, params = huggingface.load_encoder(
            folder, field="model", **head, model=Model(), key=key
        )
        tokenizer = tokenizers.load_tokenizer(folder, "model") if task else None
    if longest > dense.longest:
        legal = f"must be at most {dense.longest}, the model's positions"
        raise reject("seq_length", longest, legal)
    dense = dataclasses.replace(dense, dtype=dtype)
    sliced = dataclasses.replace(sliced or like_the_paper(dense), dtype=dtype)
    return Subject(
        dense,
        sliced,
        params or init_params(dense, key),
        sliced_params or init_params(sliced, key),
        tokenizer,
    )


def random_rows(count: int, length: int, vocab_size: int) -> Examples:
    """Returns rows of random tokens, all of one length and of class 0."""
    rng = np.random.default_rng(0)
    ids = rng.integers(vocab_size, size=(count, length), dtype=np.int32)
    return Examples([*ids], [*np.zeros_like(ids)], np.zeros(count, np.int32))


def like_the_paper(dense: EncoderConfig) -> EncoderConfig:
    """Returns sizes without about 95 % of the blocks' parameters, as in the paper.

    The paper's models keep three of twelve blocks of each kind, with 2 to 5 of 12 heads
    and 100 to 700 of 3072 units, and 760 of 768 dimensions. Here a quarter of the
    blocks of each kind stays, evenly spaced, those of the one kind between those of the
    other. The first ones are the widest.
    """
    layers = len(dense.heads)
    blocks = max(1, round(layers * 3 / 12))

    def widths(full, first, most, least):
        found = [0] * layers
        places = np.linspace(first, layers - 1, blocks + 1)[:-1].astype(int)
        for place, share in zip(places, np.linspace(most, least, blocks), strict=True):
            found[place] = max(1, round(share * full))
        return tuple(found)

    second, units = min(1, layers - 1), dense.intermediate[0]
    return dataclasses.replace(
        dense,
        hidden_size=max(1, round(760 / 768 * dense.hidden_size)),
        heads=widths(dense.heads[0], 0, 5 / 12, 2 / 12),
        intermediate=widths(units, second, 700 / 3072, 100 / 3072),
    )


def described(config: EncoderConfig, dense: EncoderConfig) -> dict[str, Any]:
    """Returns the widths, encoder parameters and sparsity of a model."""
    params = cost.num_params({}, config)
    removed = 1 - params / cost.num_params({}, dense)
    return config.widths() | {"encoder_params": params, "sparsity": removed}
