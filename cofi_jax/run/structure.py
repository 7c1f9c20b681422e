"""A structure given by hand: what of each model stays, with no mask to be learned."""

import jax.numpy as jnp

from cofi_jax.config import Prune, Structure
from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import blocks
from cofi_jax.pruning import cost, transforms
from cofi_jax.pruning.masks import mask_shapes
from cofi_jax.pruning.transforms import MaskTransform


def targets(prune: Prune, config: EncoderConfig) -> tuple[float, ...]:
    """Returns the sparsities of the models that a run makes.

    Args:
      prune: the settings.
      config: the sizes of the dense model.

    Raises:
      UserError: if a structure that is given by hand leaves no layer, or everything.
    """
    if not prune.by_hand:
        return tuple(prune.targets)
    ones = {kind: jnp.ones(shape) for kind, shape in mask_shapes(config).items()}
    left = transform(prune.structure, config)(ones)
    removed = cost.exact_sparsity(left, config)
    if not removed:
        legal = f"leaves all of the model's {len(config.heads)} layers as they are"
        raise reject("prune.structure.layers", prune.structure.layers, legal)
    return (removed,)


def transform(structure: Structure, config: EncoderConfig) -> MaskTransform:
    """Returns the transform that leaves this structure of masks of all kinds.

    Of the heads, feed-forward units and hidden dimensions, those with the largest masks
    stay. The result is hard: every mask is 0 or 1.

    Args:
      structure: the settings.
      config: the sizes of the dense model.

    Raises:
      UserError: if no layer is left.
    """
    widths = {block.inner: max(block.sizes(config)) for block in blocks(config)}
    widths["hidden"] = config.hidden_size
    counts = {
        kind: max(1, round(getattr(structure, kind) * width))
        for kind, width in widths.items()
    }
    return transforms.chain(
        transforms.keep_layers(*_layers(structure.layers, len(config.heads))),
        transforms.keep_most(**counts),
        transforms.harden(),
    )


def _layers(text, number):
    """The numbers of the layers that stay: those that Python's slice `text` takes."""
    bounds = [int(word) if word else None for word in text.split(":")]
    left = range(number)[slice(*bounds)]
    if not left:
        legal = f"leaves none of the model's {number} layers"
        raise reject("prune.structure.layers", text, legal)
    return left
