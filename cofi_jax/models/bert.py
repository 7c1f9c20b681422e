"""The encoder: one linen module is the dense, the masked and the sliced model.

Post-LayerNorm: BERT, and RoBERTa, which differs in the row of the position table
that the first token takes. With the gates of the collection `masks` (any subset of the
kinds; hidden gates z act on every vector of width D):

    e  = norm(z * (word + position + type))
    y  = norm(x + z * mha_l * attention(x))          or x where the block is absent
    x' = norm(y + z * ffn_l * down(int_l * gelu(up(y))))       or y, likewise

where `norm` takes its statistics over the open hidden dimensions and multiplies
its result by z, and head gates multiply the heads' outputs before the output
projection. A block is absent when its own gate or all gates inside it are 0.

Shapes: B batch, T tokens, D hidden, L layers, H heads, d head width, F
intermediate, C classes.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.layers import ACTIVATIONS, Dropout, Norm, if_present
from cofi_jax.models.spec import KINDS

Batch = dict[str, jax.Array]


_INIT = nn.initializers.normal(0.02)


class Output(NamedTuple):
    """Logits and L + 1 hidden states (B, T, D), the embeddings' first.

    Logits are (B, C), or (B, T, C) where the head reads every token.
    """

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...]


class Projection(nn.Module):
    """The gated way back to the hidden dimensions, (B, T, *inner) to (B, T, D).

    Inner gates act on the kernel, in its float32, as in slicing: it is smaller than
    what a batch's tokens have inside a block. Outer gates act on the result.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, x, inner_gates, outer_gates):
        dtype, inner = self.config.dtype, x.shape[2:]
        kernel = self.param("kernel", _INIT, (*inner, self.config.hidden_size))
        bias = self.param("bias", nn.initializers.zeros, (self.config.hidden_size,))
        if inner_gates is not None:
            kernel = kernel * inner_gates.reshape(-1, *(1,) * len(inner))
        axes = tuple(range(2, x.ndim)), tuple(range(len(inner)))
        x = jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), (axes, ((), ())))
        x = x + bias.astype(dtype)
        return x if outer_gates is None else x * outer_gates  # in float32


class Attention(nn.Module):
    """Self-attention with gated heads, (B, T, D) to (B, T, D)."""

    heads: int
    config: EncoderConfig

    @nn.compact
    def __call__(self, x, attention_mask, head_gates, outer_gates, *, train):
        config = self.config

        def project(name):
            return nn.DenseGeneral(
                (self.heads, config.head_size),
                dtype=config.dtype,
                kernel_init=_INIT,
                name=name,
            )(x)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("bthd,bshd->bhts", query, key) * config.head_size**-0.5
        padding = jnp.where(attention_mask > 0, 0.0, -1e9)[:, None, None, :]
        scores = scores.astype(jnp.float32) + padding
        weights = jax.nn.softmax(scores).astype(config.dtype)
        weights = Dropout(config.dropout)(weights, train=train)
        context = jnp.einsum("bhts,bshd->bthd", weights, value)
        return Projection(config, name="output")(context, head_gates, outer_gates)


class FeedForward(nn.Module):
    """Two projections with gated units between, (B, T, D) to (B, T, D)."""

    width: int
    config: EncoderConfig

    @nn.compact
    def __call__(self, x, unit_gates, outer_gates):
        dtype = self.config.dtype
        x = nn.Dense(self.width, dtype=dtype, kernel_init=_INIT, name="up")(x)
        x = ACTIVATIONS[self.config.activation](x)
        return Projection(self.config, name="down")(x, unit_gates, outer_gates)


class Layer(nn.Module):
    """One Transformer layer, or one block of it where the other's width is 0.

    `gates` holds this layer's rows of the masks; its blocks are there.
    """

    heads: int
    width: int
    config: EncoderConfig

    @nn.compact
    def __call__(self, x, attention_mask, gates, *, train):
        def join(x, y, name):
            y = Dropout(self.config.dropout)(y, train=train).astype(jnp.float32)
            norm = Norm(self.config.layer_norm_eps, self.config.dtype, name=name)
            return norm(x + y, gates.get("hidden"))

        def outer(block):
            there = [gates[kind] for kind in (block, "hidden") if kind in gates]
            return functools.reduce(jnp.multiply, there) if there else None

        if self.heads:
            y = Attention(self.heads, self.config, name="attention")(
                x, attention_mask, gates.get("head"), outer("mha"), train=train
            )
            x = join(x, y, "attention_norm")
        if self.width:
            y = FeedForward(self.width, self.config, name="ffn")(
                x, gates.get("intermediate"), outer("ffn")
            )
            x = join(x, y, "ffn_norm")
        return x


@functools.partial(jax.jit, static_argnames=("layer", "train"))
def _traced_once(layer, train, params, gates, noise, x, attention_mask):
    """A layer of one block, or x where that is absent.

    One trace for all blocks of the same width: half the time of a whole trace.
    """

    def block(fixed, x, params, gates):
        noise, attention_mask = fixed
        variables = {"params": params}
        return layer.apply(variables, x, attention_mask, gates, train=train, rngs=noise)

    kinds = ("mha", "head") if layer.heads else ("ffn", "intermediate")
    gates = {k: v for k, v in gates.items() if k in (*kinds, "hidden")}
    there = [(gates[kind] > 0).any() for kind in kinds if kind in gates]
    inputs = (noise, attention_mask), x, params, gates
    if not there:
        return block(*inputs)
    return if_present(functools.reduce(jnp.logical_and, there), block, *inputs)


class Encoder(nn.Module):
    """An encoder with a head on the first token or on every token.

    `apply({"params": params, "masks": masks}, batch)` with `batch` of
    input_ids, attention_mask and token_type_ids, each (B, T) int32; `masks` may be
    left out. With `train=True` pass `rngs={"dropout": key}`.

    Raises:
      ValueError: for a kind of mask that does not exist.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Output:
        config = self.config
        masks = self.variables.get("masks", {})
        if unknown := set(masks) - set(KINDS):
            raise ValueError(f"masks {sorted(unknown)}: kinds are {KINDS}")
        hidden = masks.get("hidden")
        x = Embeddings(config, name="embeddings")(batch, hidden, train=train)
        states = [x]
        for i, (heads, width) in enumerate(
            zip(config.heads, config.intermediate, strict=True)
        ):
            gates = {k: v if k == "hidden" else v[i] for k, v in masks.items()}
            name, attention_mask = f"layer_{i}", batch["attention_mask"]
            if self.is_initializing():
                layer = Layer(heads, width, config, name=name)
                x = layer(x, attention_mask, gates, train=train)
            for block, *widths in (("attention", heads, 0), ("ffn", 0, width)):
                if self.is_initializing() or not any(widths):
                    continue
                params = self.variables["params"][name]
                params = {k: params[k] for k in (block, f"{block}_norm")}
                noise = {"dropout": self.make_rng("dropout")} if train else {}
                layer = Layer(*widths, config, parent=None)
                x = _traced_once(layer, train, params, gates, noise, x, attention_mask)
            states.append(x)
        if not config.reads_every_token:
            first = nn.Dense(
                config.pooler_size, dtype=config.dtype, kernel_init=_INIT, name="pooler"
            )(x[:, 0])
            x = Dropout(config.dropout)(jnp.tanh(first), train=train)
        logits = nn.Dense(config.num_labels, kernel_init=_INIT, name="classifier")(
            x.astype(jnp.float32)
        )
        return Output(logits, tuple(states))


class Embeddings(nn.Module):
    """Word, position and token type embeddings, normalised: (B, T, D)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, batch, hidden, *, train):
        config = self.config
        ids, start = batch["input_ids"], config.position_offset

        def table(name, rows):
            return self.param(name, _INIT, (rows, config.hidden_size))

        x = (
            table("word", config.vocab_size)[ids]
            + table("position", config.max_positions)[start : start + ids.shape[1]]
            + table("type", config.type_vocab_size)[batch["token_type_ids"]]
        )
        if hidden is not None:
            x = x * hidden
        x = Norm(config.layer_norm_eps, config.dtype, name="norm")(x, hidden)
        return Dropout(config.dropout)(x, train=train)


def _example() -> Batch:
    ids = jnp.zeros((1, 2), jnp.int32)
    return {"input_ids": ids, "attention_mask": ids + 1, "token_type_ids": ids}


def init_params(config: EncoderConfig, key: jax.Array) -> dict:
    """Fresh parameters: normal(0, 0.02) kernels, zero biases, float32."""
    return jax.jit(Encoder(config).init)(key, _example())["params"]


@functools.cache
def abstract_params(config: EncoderConfig) -> dict:
    """Shapes and dtypes of the parameters, nothing allocated."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(Encoder(config).init, key, _example())["params"]
