"""The encoder: one linen module is the dense, the masked and the sliced model.

It is a post-LayerNorm encoder: BERT, and RoBERTa, which differs in the row of the
position table that the first token takes. The collection `masks` has any subset of the
kinds of masks; the hidden masks z act on every vector of width D:

    e  = norm(z * (word + position + type))
    y  = norm(x + z * mha_l * attention(x))          or x where the block is absent
    x' = norm(y + z * ffn_l * down(int_l * gelu(up(y))))       or y, likewise

where `norm` takes its statistics over the open hidden dimensions and multiplies its
result by z, and the head masks multiply the heads' outputs before the output
projection. A block is absent when its own mask or all masks inside it are 0.

Shapes: B batch, T tokens, D hidden, L layers, H heads, d head width, F intermediate,
C classes. H and F differ from layer to layer in a sliced model.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.layers import ACTIVATIONS, Dropout, Norm, if_present
from cofi_jax.models.spec import KINDS, blocks

Batch = dict[str, jax.Array]
LayerMasks = dict[
    str, jax.Array
]  # one layer's rows: head (H,), mha (), hidden (D,) ...

_INIT = nn.initializers.normal(0.02)


class Output(NamedTuple):
    """The logits and the L + 1 hidden states, the embeddings' first.

    Attributes:
      logits: (B, C), or (B, T, C) where the head reads every token.
      hidden_states: each (B, T, D).
    """

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...]


class Projection(nn.Module):
    """The masked projection from a block's units back to the hidden dimensions.

    The inner masks act on the kernel, in its float32, as they do in slicing: the kernel
    is smaller than what a batch's tokens have inside a block.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, inner: jax.Array | None, outer: jax.Array | None
    ) -> jax.Array:
        """Projects every token; returns (B, T, D), in float32 under outer masks.

        Args:
          x: (B, T, H, d) or (B, T, F), what the units computed.
          inner: (H,) or (F,), the masks of the units.
          outer: () or (D,), the mask of the block times those of the hidden dimensions.
        """
        dtype, units = self.config.dtype, x.shape[2:]
        kernel = self.param("kernel", _INIT, (*units, self.config.hidden_size))
        bias = self.param("bias", nn.initializers.zeros, (self.config.hidden_size,))
        if inner is not None:
            kernel = kernel * inner.reshape(-1, *(1,) * len(units))
        axes = tuple(range(2, x.ndim)), tuple(range(len(units)))
        x = jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), (axes, ((), ())))
        x = x + bias.astype(dtype)  # (B, T, D)
        return x if outer is None else x * outer


class Attention(nn.Module):
    """Self-attention with masked heads."""

    heads: int
    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        attention_mask: jax.Array,
        head_masks: jax.Array | None,
        outer: jax.Array | None,
        *,
        train: bool,
    ) -> jax.Array:
        """Attends from every token to all real tokens of its row; returns (B, T, D).

        Args:
          x: (B, T, D).
          attention_mask: (B, T), 0 for padding.
          head_masks: (H,).
          outer: () or (D,), see `Projection`.
          train: whether there is dropout.
        """
        config = self.config

        def project(name):
            shape, dtype = (self.heads, config.head_size), config.dtype
            return nn.DenseGeneral(shape, dtype=dtype, kernel_init=_INIT, name=name)(x)

        query, key, value = project("query"), project("key"), project("value")
        # Each of the three is (B, T, H, d); the scores are (B, H, T, T).
        scores = jnp.einsum("bthd,bshd->bhts", query, key) * config.head_size**-0.5
        padding = jnp.where(attention_mask > 0, 0.0, -1e9)[:, None, None, :]
        scores = scores.astype(jnp.float32) + padding
        weights = jax.nn.softmax(scores).astype(config.dtype)
        weights = Dropout(config.dropout)(weights, train=train)
        context = jnp.einsum("bhts,bshd->bthd", weights, value)  # (B, T, H, d)
        return Projection(config, name="output")(context, head_masks, outer)


class FeedForward(nn.Module):
    """Two projections with masked units between them."""

    width: int
    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, unit_masks: jax.Array | None, outer: jax.Array | None
    ) -> jax.Array:
        """Works on each token by itself; returns (B, T, D).

        Args:
          x: (B, T, D).
          unit_masks: (F,).
          outer: () or (D,), see `Projection`.
        """
        dtype = self.config.dtype
        x = nn.Dense(self.width, dtype=dtype, kernel_init=_INIT, name="up")(x)
        x = ACTIVATIONS[self.config.activation](x)  # (B, T, F)
        return Projection(self.config, name="down")(x, unit_masks, outer)


class Layer(nn.Module):
    """One Transformer layer, without the blocks whose width is 0."""

    heads: int
    intermediate: int
    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        attention_mask: jax.Array,
        masks: LayerMasks,
        *,
        train: bool,
    ) -> jax.Array:
        """Adds what each block computes to `x` and normalises; returns (B, T, D).

        Args:
          x: (B, T, D).
          attention_mask: (B, T), 0 for padding.
          masks: this layer's rows; blocks that they close are computed all the same.
          train: whether there is dropout.
        """

        def join(x, y, name):
            y = Dropout(self.config.dropout)(y, train=train).astype(jnp.float32)
            norm = Norm(self.config.layer_norm_eps, self.config.dtype, name=name)
            return norm(x + y, masks.get("hidden"))

        def outer(block):
            given = [masks[kind] for kind in (block, "hidden") if kind in masks]
            return functools.reduce(jnp.multiply, given) if given else None

        if self.heads:
            y = Attention(self.heads, self.config, name="attention")(
                x, attention_mask, masks.get("head"), outer("mha"), train=train
            )
            x = join(x, y, "attention_norm")
        if self.intermediate:
            y = FeedForward(self.intermediate, self.config, name="ffn")(
                x, masks.get("intermediate"), outer("ffn")
            )
            x = join(x, y, "ffn_norm")
        return x


def _skip_absent(
    layer: Layer,
    x: jax.Array,
    attention_mask: jax.Array,
    masks: LayerMasks,
    *,
    train: bool,
    make_rng: Callable[[str], jax.Array],
) -> jax.Array:
    """`layer(x, attention_mask, masks, train=train)`, but skips its absent blocks.

    All skipping passes through here: without it the encoder would call its layers also
    when their parameters are there. Each block runs as a layer of its own, which is
    traced once for all layers that have it in the same width: that halves the time of a
    whole trace.
    """
    parts = blocks(layer.config)
    for block in parts:
        others: dict[str, Any] = {
            other.widths: 0 for other in parts if other.name != block.name
        }
        alone = layer.clone(parent=None, name=None, **others)
        if getattr(alone, block.widths):
            params = layer.variables["params"]
            params = {name: params[name] for name in (block.name, block.norm)}
            kinds = (block.outer, block.inner)
            given = {k: v for k, v in masks.items() if k in (*kinds, "hidden")}
            noise = {"dropout": make_rng("dropout")} if train else {}
            x = _run(alone, kinds, train, params, given, noise, x, attention_mask)
    return x


@functools.partial(jax.jit, static_argnames=("layer", "kinds", "train"))
def _run(layer, kinds, train, params, masks, noise, x, attention_mask):
    def block(fixed, x, params, masks):
        noise, attention_mask = fixed
        variables = {"params": params}
        return layer.apply(variables, x, attention_mask, masks, train=train, rngs=noise)

    inputs = (noise, attention_mask), x, params, masks
    open_ = [(masks[kind] > 0).any() for kind in kinds if kind in masks]
    if not open_:
        return block(*inputs)
    return if_present(functools.reduce(jnp.logical_and, open_), block, *inputs)


class Encoder(nn.Module):
    """An encoder with a head on the first token or on every token."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Output:
        """Called as `apply({"params": params, "masks": masks}, batch)`.

        Args:
          batch: `input_ids`, `attention_mask` and `token_type_ids`, each (B, T) int32.
          train: whether there is dropout; pass `rngs={"dropout": key}` then.

        The masks are those of `masks.mask_shapes`, or any subset of the kinds; the
        collection may be left out.

        Raises:
          ValueError: for a kind of mask that does not exist, and for heads or units
            that are not the model's.
        """
        config, attention_mask = self.config, batch["attention_mask"]
        masks = self.variables.get("masks", {})
        if unknown := set(masks) - set(KINDS):
            raise ValueError(f"masks {sorted(unknown)}: kinds are {KINDS}")
        for block in blocks(config):
            shape = block.real(config).shape
            if block.inner in masks and masks[block.inner].shape != shape:
                raise ValueError(f"masks[{block.inner!r}]: the shape must be {shape}")
        hidden = masks.get("hidden")
        x = Embeddings(config, name="embeddings")(batch, hidden, train=train)
        states = [x]
        for i, widths in enumerate(zip(config.heads, config.intermediate, strict=True)):
            layer = Layer(*widths, config, name=f"layer_{i}")
            own = {k: v if k == "hidden" else v[i] for k, v in masks.items()}
            for block in blocks(config):
                if block.inner in own:  # without the row's padding
                    own[block.inner] = own[block.inner][: block.sizes(config)[i]]
            if self.is_initializing():
                x = layer(x, attention_mask, own, train=train)
            else:
                arguments = layer, x, attention_mask, own
                x = _skip_absent(*arguments, train=train, make_rng=self.make_rng)
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
    """The normalised sum of word, position and token type embeddings."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, batch: Batch, hidden: jax.Array | None, *, train: bool
    ) -> jax.Array:
        """Looks the tokens up; returns (B, T, D).

        Args:
          batch: as the encoder's.
          hidden: (D,), the masks of the hidden dimensions.
          train: whether there is dropout.
        """
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
    """Fresh float32 parameters: kernels from normal(0, 0.02), biases of zero."""
    return jax.jit(Encoder(config).init)(key, _example())["params"]


@functools.cache
def abstract_params(config: EncoderConfig) -> dict:
    """The shapes and dtypes of the parameters; nothing is allocated."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(Encoder(config).init, key, _example())["params"]
