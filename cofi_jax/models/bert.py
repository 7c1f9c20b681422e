"""The Transformer encoder: one linen module is the dense, masked and sliced model.

The encoder is BERT, which applies LayerNorm after each residual sum. RoBERTa differs
only in the row of the position table that the first token takes, and DistilBERT in the
activation function of the pooler. Masks arrive in the variable collection `masks`,
which may hold any subset of the kinds in `spec.KINDS`. If z denotes the masks of the
hidden dimensions, which scale every vector of width D, then the embeddings e and the
two blocks of layer l compute

    e  = norm(z * (word + position + type))
    y  = norm(x + z * mha_l * attention(x))
    x' = norm(y + z * ffn_l * down(int_l * gelu(up(y))))

where `norm` computes its statistics over the open hidden dimensions only and multiplies
its result by z. The head masks scale the outputs of the heads before the output
projection. A block is absent when its own mask is 0 or when all masks inside it are 0;
its line then reduces to y = x, or x' = y, without a LayerNorm.

Shapes are written with these letters: B batch, T tokens, D hidden dimensions, L layers,
H heads, d width of a head, F feed-forward units, C classes. In a sliced model, H and F
differ from layer to layer.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.layers import ACTIVATIONS, Dropout, Norm
from cofi_jax.models.spec import KINDS, blocks

Batch = dict[str, jax.Array]
# The masks of one layer: head (H,), mha (), intermediate (F,), ffn () and hidden (D,).
LayerMasks = dict[str, jax.Array]

OUTPUT_ACTIVATIONS = {"identity": lambda x: x, "tanh": jnp.tanh, "relu": nn.relu}

_INIT = nn.initializers.normal(0.02)


class Output(NamedTuple):
    """The result of a forward pass.

    Attributes:
      logits: float32, (B, C), or (B, T, C) if the classifier reads every token. Where
        tokens are pooled, it is the vector of each text, (B, C).
      hidden_states: the embeddings and the outputs of the L layers, each (B, T, D).
    """

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...]


class Projection(nn.Module):
    """The masked projection from the units of a block to the hidden dimensions.

    The masks of the units scale the kernel instead of the activations. The kernel is
    the smaller array, and slicing multiplies the masks into it in the same way.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, inner: jax.Array | None, outer: jax.Array | None
    ) -> jax.Array:
        """Projects every token.

        Args:
          x: the outputs of the units, (B, T, H, d) or (B, T, F).
          inner: the masks of the units, (H,) or (F,).
          outer: the mask of the block times the masks of the hidden dimensions, () or
            (D,).

        Returns:
          (B, T, D) in the dtype of the model, or in float32 if `outer` is given.
        """
        dtype, units = self.config.dtype, x.shape[2:]  # (H, d) or (F,)
        kernel = self.param("kernel", _INIT, (*units, self.config.hidden_size))
        bias = self.param("bias", nn.initializers.zeros, (self.config.hidden_size,))
        if inner is not None:
            kernel = kernel * inner.reshape(-1, *(1,) * len(units))  # (H, d, D), (F, D)
        axes = tuple(range(2, x.ndim)), tuple(range(len(units)))
        x = jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), (axes, ((), ())))
        x = x + bias.astype(dtype)  # (B, T, D)
        return x if outer is None else x * outer


class Attention(nn.Module):
    """Multi-head self-attention with masked heads."""

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
        """Lets every token attend to all tokens of its row that are not padding.

        Args:
          x: the hidden states, (B, T, D).
          attention_mask: (B, T), 0 for padding.
          head_masks: (H,).
          outer: the masks of the output, () or (D,), as in `Projection`.
          train: whether dropout is applied.

        Returns:
          The output of the block before the residual sum, (B, T, D).
        """
        config = self.config

        def project(name):  # (B, T, D) -> (B, T, H, d)
            shape, dtype = (self.heads, config.head_size), config.dtype
            return nn.DenseGeneral(shape, dtype=dtype, kernel_init=_INIT, name=name)(x)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("bthd,bshd->bhts", query, key) * config.head_size**-0.5
        padding = jnp.where(attention_mask > 0, 0.0, -1e9)[:, None, None, :]
        scores = scores.astype(jnp.float32) + padding  # (B, H, T, T)
        weights = jax.nn.softmax(scores).astype(config.dtype)
        weights = Dropout(config.dropout)(weights, train=train)
        context = jnp.einsum("bhts,bshd->bthd", weights, value)  # (B, T, H, d)
        return Projection(config, name="output")(context, head_masks, outer)


class FeedForward(nn.Module):
    """A feed-forward block with masked units between its two projections."""

    width: int
    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, unit_masks: jax.Array | None, outer: jax.Array | None
    ) -> jax.Array:
        """Transforms each token independently of the others.

        Args:
          x: the hidden states, (B, T, D).
          unit_masks: (F,).
          outer: the masks of the output, () or (D,), as in `Projection`.

        Returns:
          The output of the block before the residual sum, (B, T, D).
        """
        dtype = self.config.dtype
        x = nn.Dense(self.width, dtype=dtype, kernel_init=_INIT, name="up")(x)
        x = ACTIVATIONS[self.config.activation](x)  # (B, T, F)
        return Projection(self.config, name="down")(x, unit_masks, outer)


class Layer(nn.Module):
    """One Transformer layer; a block of width 0 has no parameters and is left out."""

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
        """Adds the output of each block to `x` and normalises the sum.

        Args:
          x: the hidden states, (B, T, D).
          attention_mask: (B, T), 0 for padding.
          masks: the masks of this layer. A block that they close is computed
            nevertheless, and its result is not used: on an accelerator a branch would
            take longer.
          train: whether dropout is applied.

        Returns:
          The hidden states after the layer, (B, T, D).
        """
        attention, ffn = blocks(self.config)

        def add_and_norm(x, y, block):  # (B, T, D), (B, T, D) -> (B, T, D)
            y = Dropout(self.config.dropout)(y, train=train).astype(jnp.float32)
            norm = Norm(self.config.layer_norm_eps, self.config.dtype, name=block.norm)
            y = norm(x + y, masks.get("hidden"))
            kinds = [kind for kind in (block.outer, block.inner) if kind in masks]
            if not kinds:
                return y
            present = jnp.stack([(masks[kind] > 0).any() for kind in kinds]).all()
            return jnp.where(present, y, x)

        def outer(block):  # () or (D,)
            kinds = (block.outer, "hidden")
            given = [masks[kind] for kind in kinds if kind in masks]
            return functools.reduce(jnp.multiply, given) if given else None

        if self.heads:
            y = Attention(self.heads, self.config, name="attention")(
                x, attention_mask, masks.get("head"), outer(attention), train=train
            )
            x = add_and_norm(x, y, attention)
        if self.intermediate:
            y = FeedForward(self.intermediate, self.config, name="ffn")(
                x, masks.get("intermediate"), outer(ffn)
            )
            x = add_and_norm(x, y, ffn)
        return x


class Encoder(nn.Module):
    """An encoder with a classifier on the first or every token, or with pooling."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Output:
        """Runs the model, as `apply({"params": params, "masks": masks}, batch)`.

        The masks have the shapes of `masks.mask_shapes`. Any subset of the kinds may be
        given, and the collection may be left out.

        Args:
          batch: `input_ids`, `attention_mask` and `token_type_ids`, each (B, T) int32.
          train: whether dropout is applied, which needs `rngs={"dropout": key}`.

        Returns:
          The logits and the hidden states.

        Raises:
          ValueError: if a kind of mask does not exist, or if the masks of heads or
            feed-forward units do not have the shape that the model's sizes ask for.
        """
        config, attention_mask = self.config, batch["attention_mask"]
        masks = self.variables.get("masks", {})
        if unknown := set(masks) - set(KINDS):
            raise ValueError(f"masks {sorted(unknown)}: kinds are {KINDS}")
        for block in blocks(config):
            shape = block.real(config)[block.inner].shape  # (L, H) or (L, F)
            if block.inner in masks and masks[block.inner].shape != shape:
                raise ValueError(f"masks[{block.inner!r}]: the shape must be {shape}")
        hidden = masks.get("hidden")
        x = Embeddings(config, name="embeddings")(batch, hidden, train=train)
        states = [x]
        for i, widths in enumerate(zip(config.heads, config.intermediate, strict=True)):
            layer = Layer(*widths, config, name=f"layer_{i}")
            own = {k: v if k == "hidden" else v[i] for k, v in masks.items()}
            for block in blocks(config):
                if block.inner in own:  # The row of a narrow layer ends with padding.
                    own[block.inner] = own[block.inner][: block.sizes(config)[i]]
            x = layer(x, attention_mask, own, train=train)
            states.append(x)
        if config.pooling:
            return Output(self._vector(x, attention_mask), tuple(states))
        if config.has_pooler:
            first = nn.Dense(
                config.pooler_size, dtype=config.dtype, kernel_init=_INIT, name="pooler"
            )(x[:, 0])
            first = OUTPUT_ACTIVATIONS[config.pooler_activation](first)
            x = Dropout(config.dropout)(first, train=train)  # (B, pooler)
        logits = nn.Dense(config.num_labels, kernel_init=_INIT, name="classifier")(
            x.astype(jnp.float32)
        )  # (B, C) or (B, T, C)
        return Output(logits, tuple(states))

    def _vector(self, x, attention_mask):
        """Pools hidden states (B, T, D) to vectors (B, C), as sentence-transformers."""
        config, x = self.config, x.astype(jnp.float32)
        real = (attention_mask > 0)[..., None]  # (B, T, 1)
        if config.pooling == "mean":
            x = jnp.sum(x * real, 1) / jnp.maximum(jnp.sum(real, 1), 1)
        elif config.pooling == "max":
            x = jnp.max(jnp.where(real, x, -1e9), 1)
        else:
            x = x[:, 0]
        if config.output_activation:
            x = nn.Dense(
                config.num_labels,
                use_bias=config.output_bias,
                kernel_init=_INIT,
                name="classifier",
            )(x)
            x = OUTPUT_ACTIVATIONS[config.output_activation](x)
        if config.normalize:
            squares = jnp.sum(jnp.square(x), -1, keepdims=True)
            x = x / jnp.sqrt(jnp.maximum(squares, 1e-24))  # as PyTorch's normalize
        return x


class Embeddings(nn.Module):
    """The normalised sum of the word, position and token type embeddings."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, batch: Batch, hidden: jax.Array | None, *, train: bool
    ) -> jax.Array:
        """Looks up the embeddings of the tokens.

        Args:
          batch: the batch that `Encoder` takes.
          hidden: the masks of the hidden dimensions, (D,).
          train: whether dropout is applied.

        Returns:
          The first hidden states, (B, T, D).
        """
        config = self.config
        ids, start = batch["input_ids"], config.position_offset

        def table(name, rows):  # (rows, D)
            return self.param(name, _INIT, (rows, config.hidden_size))

        x = (
            table("word", config.vocab_size)[ids]  # (B, T, D)
            + table("position", config.max_positions)[start : start + ids.shape[1]]
            + table("type", config.type_vocab_size)[batch["token_type_ids"]]
        )
        if hidden is not None:
            x = x * hidden
        x = Norm(config.layer_norm_eps, config.dtype, name="norm")(x, hidden)
        return Dropout(config.dropout)(x, train=train)


def _example() -> Batch:
    """Returns a batch of one row of two tokens, from which shapes are inferred."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return {"input_ids": ids, "attention_mask": ids + 1, "token_type_ids": ids}


def init_params(config: EncoderConfig, key: jax.Array) -> dict:
    """Draws new float32 parameters.

    Kernels and embeddings are drawn from a normal distribution with mean 0 and standard
    deviation 0.02, biases are 0, and the scales of the LayerNorms are 1.
    """
    return jax.jit(Encoder(config).init)(key, _example())["params"]


@functools.cache
def abstract_params(config: EncoderConfig) -> dict:
    """Returns the parameters as `jax.ShapeDtypeStruct`s, without allocating memory."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(Encoder(config).init, key, _example())["params"]
