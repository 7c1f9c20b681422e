"""Least squares for what slicing left: output projections that make up for the rest.

Heads, units and whole blocks that are cut leave their share of the hidden states
missing. Much of it can be computed from what stayed, without a step of training. Block
by block, from the first to the last, the kernel W and the bias b of the projection that
writes to the hidden states are replaced by the solution of

    min  sum over tokens of a |x + u W + b - s|^2  +  r |(W, b) - (W, b)_before|^2

where u are the outputs of the units that stayed, x is the hidden state in front of the
block, both in the sliced model with all blocks before it fitted already, and s is the
sum in front of the LayerNorm at the same place of the model that was cut. So a block
also makes up for what the blocks before it have lost, as in K-Prune (Park et al., ICLR
2024). The penalty, which K-Prune does not have, keeps the weights that the tokens say
nothing of. The weight a of a token is 1; where the model reads nothing but the first
token of what a block writes, that token weighs like all others of its row together.

Shapes: B batch, T tokens, D hidden dimensions, U outputs of the units of a block.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax import distributed
from cofi_jax.models.bert import Batch, Embeddings, Encoder, Layer, Projection
from cofi_jax.models.layers import Norm
from cofi_jax.models.spec import Block, blocks
from cofi_jax.training.step import quick_to_compile

# The penalty r, as a fraction of the mean over u and 1 of their sums of squares.
_PENALTY = 1e-2


class _Seen(NamedTuple):
    """What a block computes for a batch: u (B, T, ...), and x + u W + b (B, T, D)."""

    units: jax.Array
    total: jax.Array


def reconstruct(
    model: Encoder,
    params: dict,
    whole: Encoder,
    whole_params: dict,
    batches: Iterable[Batch],
) -> dict:
    """Fits a sliced model to the hidden states of the model that it was cut from.

    What changes are the output projections and the LayerNorms. Where blocks behind a
    block are gone, the block is fitted to the sum in front of the LayerNorm of the last
    one of them, and takes over that LayerNorm.

    Args:
      model: the module of the sliced model.
      params: its parameters, cut from `whole_params` and perhaps trained since.
      whole: the module before slicing, of as many layers and hidden dimensions.
      whole_params: its parameters.
      batches: the batches of `data.batches.stream`, without the row numbers, of which
        labels are not read. About 16 batches of 32 rows are enough; their hidden states
        are held on the device.

    Returns:
      The parameters; those that were fitted are NumPy arrays.

    Raises:
      ValueError: if there is no batch, or if the models differ in the number of layers
        or of hidden dimensions.
    """
    batches = list(batches)
    one, other = model.config, whole.config
    if (len(one.heads), one.hidden_size) != (len(other.heads), other.hidden_size):
        raise ValueError("whole: must have the layers and hidden dimensions of model")
    if not batches:
        raise ValueError("batches: there must be at least one")
    before = enumerate(_sums(whole, whole_params, batches))
    reached, sums = -1, []
    states, params = _embedded(model, params, batches), dict(params)
    places = _places(model, whole)
    attending = np.flatnonzero(model.config.heads)
    for layer in range(len(model.config.heads)):
        name, run = f"layer_{layer}", _layer_of(model, layer)
        # Behind the last attention, nothing but the first token may be read.
        first = model.config.reads_one_token and layer >= attending.max(initial=0)
        for block, (last, behind) in places[layer]:
            while reached < last:
                reached, sums = next(before)
            moments = np.float64(0), np.float64(0)
            for x, target, batch in zip(states, sums, batches, strict=True):
                _, seen = run(params[name], x, batch["attention_mask"])
                both = seen[block.name], target[behind.name]
                found = distributed.fetch(_moments(*both, batch, first=first))
                moments = tuple(map(np.add, moments, found))
            own, output = params[name][block.name], block.output
            params[name] = params[name] | {
                block.name: own | {output: _fitted(own[output], *moments)},
                block.norm: whole_params[f"layer_{last}"][behind.norm],
            }
        if places[layer]:
            states = [
                run(params[name], x, batch["attention_mask"])[0]
                for x, batch in zip(states, batches, strict=True)
            ]
    return params


def _places(model, whole) -> list[list[tuple[Block, tuple[int, Block]]]]:
    """Returns for each layer its blocks, and where in `whole` each is fitted."""
    found: list[list] = []
    latest: list = []  # of the layer with the last block so far
    for layer in range(len(model.config.heads)):
        found.append([])
        for block in blocks(model.config):
            if block.sizes(model.config)[layer]:
                latest = found[-1]
                latest.append((block, (layer, block)))
            elif block.sizes(whole.config)[layer] and latest:
                # It is gone, so the block before it is fitted here.
                latest[-1] = latest[-1][0], (layer, block)
    return found


def _sums(model, params, batches) -> Iterator[list[dict[str, jax.Array]]]:
    """Yields the sums in front of the LayerNorms of each layer, for each batch."""
    states = _embedded(model, params, batches)
    for layer in range(len(model.config.heads)):
        run, own = _layer_of(model, layer), params.get(f"layer_{layer}", {})
        sums = []
        for i, batch in enumerate(batches):
            states[i], seen = run(own, states[i], batch["attention_mask"])
            sums.append({name: each.total for name, each in seen.items()})
        yield sums


def _weights(batch, first):
    """Returns the weights of the tokens, (B, T): 0 for padding and for filled-up rows.

    All others weigh alike, or the first one weighs like all others of its row together.
    """
    real = (batch["attention_mask"] > 0) * batch["weight"][:, None]
    return real.at[:, 0].mul(jnp.maximum(real.sum(-1) - 1, 1)) if first else real


def _embedded(model, params, batches):
    embed = _embeddings(model.config)
    return [embed(params["embeddings"], batch) for batch in batches]


@functools.cache
def _embeddings(config):
    """Returns the jitted function (params, batch) -> (B, T, D)."""

    def embed(params, batch):
        module = Embeddings(config)
        return module.apply({"params": params}, batch, None, train=False)

    return jax.jit(embed)


def _layer_of(model, layer):
    config = model.config
    return _layer(config.heads[layer], config.intermediate[layer], config)


@functools.cache
def _layer(heads, intermediate, config):
    """Returns the jitted (params, x, attention mask) -> (x', what is seen by block)."""

    def run(params, x, attention_mask):
        seen: dict[str, Any] = {}

        def watch(call, args, kwargs, context):
            result, module = call(*args, **kwargs), context.module
            if isinstance(module, Projection):  # It comes before the LayerNorm.
                seen[module.path[0]] = args[0]
            elif isinstance(module, Norm):
                name = module.path[0].removesuffix("_norm")
                seen[name] = _Seen(seen[name], args[0])
            return result

        module = Layer(heads, intermediate, config)
        with nn.intercept_methods(watch):
            x = module.apply({"params": params}, x, attention_mask, {}, train=False)
        return x, seen

    return jax.jit(run, compiler_options=quick_to_compile())


@functools.partial(jax.jit, static_argnames="first")
def _moments(seen, target, batch, *, first):
    """Returns the sums over tokens of (u, 1)^T (u, 1) and of (u, 1)^T missing.

    What is missing is s - x - u W - b. It gives the change of the weights, which is 0
    where nothing is missing, whatever the rounding errors are.
    """
    weights = _weights(batch, first)
    units = seen.units.reshape(*weights.shape, -1).astype(jnp.float32)
    ones, roots = jnp.ones((*weights.shape, 1)), jnp.sqrt(weights)[..., None]
    units = jnp.concatenate([units, ones], -1) * roots  # (B, T, U + 1)
    missing = (target - seen.total) * roots
    products = functools.partial(jnp.einsum, "btu,btv->uv", precision="highest")
    return products(units, units), products(units, missing)


def _fitted(module, squares, products):
    """Returns the kernel and the bias of least squares."""
    penalty = _PENALTY * np.trace(squares) / len(squares)
    change = np.linalg.solve(squares + penalty * np.eye(len(squares)), products)
    change = {"kernel": change[:-1], "bias": change[-1]}
    return {
        name: (array + change[name].reshape(array.shape)).astype(np.float32)
        for name, array in distributed.fetch(dict(module)).items()
    }
