"""The encoder: one linen module is the dense, the masked and the sliced model.

Post-LayerNorm: BERT, and RoBERTa, which differs in the row of the position table that
the first token takes. With masks in the collection `masks` (any subset of the kinds;
the hidden mask z acts on every vector of width D), a layer computes

    e  = norm(z * (word + position + type))
    y  = norm(x + z * mha_l * attention(x))          or x where the block is absent
    x' = norm(y + z * ffn_l * down(int_l * gelu(up(y))))       or y, likewise

where `norm` takes its statistics over the open hidden dimensions and multiplies its
result by z, and the head masks multiply the heads' outputs before the output
projection. A block is absent when its own mask or all masks inside it are 0.

Shapes: B batch, T tokens, D hidden, L layers, H heads, d head width, F intermediate,
P pooler, C classes. In a sliced model H and F differ from layer to layer.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.layers import ACTIVATIONS, Dropout, Norm
from cofi_jax.models.skipping import call_blocks
from cofi_jax.models.spec import BERT, KINDS

Batch = dict[str, jax.Array]

_INIT = nn.initializers.normal(0.02)


class Output(NamedTuple):
    """The results of a forward pass.

    Attributes:
      logits: (B, C), or (B, T, C) where the head reads every token.
      hidden_states: L + 1 arrays (B, T, D), of which the first are the embeddings.
    """

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...]


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, normalised."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, batch: Batch, hidden_mask: jax.Array | None, *, train: bool
    ) -> jax.Array:
        """Embeds a batch.

        Args:
          batch: `input_ids` and `token_type_ids`, each (B, T) int32.
          hidden_mask: (D,).
          train: whether dropout acts.

        Returns:
          The embeddings, (B, T, D).
        """
        config = self.config
        ids, start = batch["input_ids"], config.position_offset

        def table(name, rows):
            return self.param(name, _INIT, (rows, config.hidden_size))

        x = (
            table("word", config.vocab_size)[ids]  # (B, T, D)
            + table("position", config.max_positions)[start : start + ids.shape[1]]
            + table("type", config.type_vocab_size)[batch["token_type_ids"]]
        )
        if hidden_mask is not None:
            x = x * hidden_mask
        x = Norm(config.layer_norm_eps, config.dtype, name="norm")(x, hidden_mask)
        return Dropout(config.dropout)(x, train=train)


class Projection(nn.Module):
    """The masked projection of a block's units back to the hidden dimensions.

    The inner mask acts on the kernel in float32, as it does in slicing: the kernel is
    smaller than what the tokens of a batch have inside a block.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        inner_mask: jax.Array | None,
        outer_mask: jax.Array | None,
    ) -> jax.Array:
        """Projects the units of each token.

        Args:
          x: (B, T, H, d) or (B, T, F).
          inner_mask: of the units, (H,) or (F,).
          outer_mask: of the result, (D,) or a scalar.

        Returns:
          (B, T, D), in float32 where there is an outer mask.
        """
        dtype, inner = self.config.dtype, x.shape[2:]
        kernel = self.param("kernel", _INIT, (*inner, self.config.hidden_size))
        bias = self.param("bias", nn.initializers.zeros, (self.config.hidden_size,))
        if inner_mask is not None:
            kernel = kernel * inner_mask.reshape(-1, *(1,) * len(inner))
        axes = tuple(range(2, x.ndim)), tuple(range(len(inner)))
        x = jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), (axes, ((), ())))
        x = x + bias.astype(dtype)  # (B, T, D)
        return x if outer_mask is None else x * outer_mask


class Attention(nn.Module):
    """Self-attention whose heads are masked."""

    heads: int
    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        attention_mask: jax.Array,
        head_mask: jax.Array | None,
        outer_mask: jax.Array | None,
        *,
        train: bool,
    ) -> jax.Array:
        """Lets each token attend to the real tokens of its row.

        Args:
          x: (B, T, D).
          attention_mask: (B, T), 1 for real tokens and 0 for padding.
          head_mask: (H,).
          outer_mask: of the result, (D,) or a scalar.
          train: whether dropout acts.

        Returns:
          (B, T, D).
        """
        config = self.config

        def project(name):
            return nn.DenseGeneral(
                (self.heads, config.head_size),
                dtype=config.dtype,
                kernel_init=_INIT,
                name=name,
            )(x)

        query, key, value = project("query"), project("key"), project("value")
        scale = config.head_size**-0.5
        scores = jnp.einsum("bthd,bshd->bhts", query, key) * scale  # (B, H, T, T)
        padding = jnp.where(attention_mask > 0, 0.0, -1e9)[:, None, None, :]
        scores = scores.astype(jnp.float32) + padding
        weights = jax.nn.softmax(scores).astype(config.dtype)  # (B, H, T, T)
        weights = Dropout(config.dropout)(weights, train=train)
        context = jnp.einsum("bhts,bshd->bthd", weights, value)  # (B, T, H, d)
        return Projection(config, name="output")(context, head_mask, outer_mask)


class FeedForward(nn.Module):
    """Two projections, and masked units between them."""

    width: int
    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        unit_mask: jax.Array | None,
        outer_mask: jax.Array | None,
    ) -> jax.Array:
        """Transforms each token by itself.

        Args:
          x: (B, T, D).
          unit_mask: (F,).
          outer_mask: of the result, (D,) or a scalar.

        Returns:
          (B, T, D).
        """
        dtype = self.config.dtype
        x = nn.Dense(self.width, dtype=dtype, kernel_init=_INIT, name="up")(x)
        x = ACTIVATIONS[self.config.activation](x)  # (B, T, F)
        return Projection(self.config, name="down")(x, unit_mask, outer_mask)


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
        masks: dict[str, jax.Array],
        *,
        train: bool,
    ) -> jax.Array:
        """Applies both blocks, also where masks say that one is absent.

        Args:
          x: (B, T, D).
          attention_mask: (B, T), 1 for real tokens and 0 for padding.
          masks: of this layer: head (H,), mha (), intermediate (F,), ffn (), and
            hidden (D,), or any subset.
          train: whether dropout acts.

        Returns:
          (B, T, D).
        """

        def join(x, y, name):
            y = Dropout(self.config.dropout)(y, train=train).astype(jnp.float32)
            norm = Norm(self.config.layer_norm_eps, self.config.dtype, name=name)
            return norm(x + y, masks.get("hidden"))

        def outer(kind):
            given = [masks[k] for k in (kind, "hidden") if k in masks]
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


class Encoder(nn.Module):
    """An encoder with a head on the first token or on every token."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Output:
        """Runs `apply({"params": params, "masks": masks}, batch)`.

        Args:
          batch: `input_ids`, `attention_mask` and `token_type_ids`, each (B, T) int32.
          train: whether dropout acts; it takes `rngs={"dropout": key}`.

        Returns:
          The logits and all hidden states.

        Raises:
          ValueError: for a kind of mask that does not exist.
        """
        config, masks = self.config, self.variables.get("masks", {})
        if unknown := set(masks) - set(KINDS):
            raise ValueError(f"masks {sorted(unknown)}: kinds are {KINDS}")
        x = Embeddings(config, name="embeddings")(
            batch, masks.get("hidden"), train=train
        )
        states = [x]  # (B, T, D) each
        for i, widths in enumerate(zip(config.heads, config.intermediate, strict=True)):
            own = {k: v if k == "hidden" else v[i] for k, v in masks.items()}
            for block, width in zip(BERT.blocks, widths, strict=True):
                if block.inner in own:  # what is beyond the layer's width is padding
                    own[block.inner] = own[block.inner][:width]
            layer = Layer(*widths, config, name=f"layer_{i}")
            x = call_blocks(layer, x, batch["attention_mask"], own, train=train)
            states.append(x)
        if not config.reads_every_token:
            first = nn.Dense(
                config.pooler_size, dtype=config.dtype, kernel_init=_INIT, name="pooler"
            )(x[:, 0])
            x = Dropout(config.dropout)(jnp.tanh(first), train=train)  # (B, P)
        logits = nn.Dense(config.num_labels, kernel_init=_INIT, name="classifier")(
            x.astype(jnp.float32)
        )
        return Output(logits, tuple(states))


def _example() -> Batch:
    ids = jnp.zeros((1, 2), jnp.int32)
    return {"input_ids": ids, "attention_mask": ids + 1, "token_type_ids": ids}


def init_params(config: EncoderConfig, key: jax.Array) -> dict:
    """Fresh parameters: normal(0, 0.02) kernels, zero biases, float32."""
    return jax.jit(Encoder(config).init)(key, _example())["params"]


@functools.cache
def abstract_params(config: EncoderConfig) -> dict:
    """The shapes and dtypes of the parameters; nothing is allocated."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(Encoder(config).init, key, _example())["params"]
