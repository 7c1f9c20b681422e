"""The table of prunable axes against the formulas that were once written out."""

import jax
import numpy as np
import pytest
from conftest import random_params
from flax import traverse_util

from cofi_jax.models.bert import abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import blocks, place
from cofi_jax.pruning import cost, masks, slicing

pytestmark = pytest.mark.usefixtures("quick_compile")

SEEDS = range(40)


def random_config(rng):
    """Sizes of one to four layers, of which some lack a block or both."""
    layers = rng.integers(1, 5)
    heads = rng.integers(0, 5, layers)
    units = rng.integers(0, 12, layers)
    if rng.random() < 0.5:  # layers of one width
        heads[:], units[:] = heads[0], units[0]
    return EncoderConfig(
        vocab_size=7,
        hidden_size=int(rng.integers(1, 14)),
        heads=tuple(heads.tolist()),
        head_size=int(rng.integers(1, 6)),
        intermediate=tuple(units.tolist()),
        pooler_size=int(rng.integers(1, 9)),
        num_labels=int(rng.integers(1, 5)),
        max_positions=9,
        problem=str(rng.choice(["classification", "span"])),
    )


def random_masks(rng, config, values):
    """Some of the kinds, drawn by `values` from a shape, padding included."""
    shapes = masks.mask_shapes(config).items()
    return {kind: values(shape) for kind, shape in shapes if rng.random() < 0.7}


def formula(given, config):
    """The cost of masks or probabilities, one layer after the other."""
    d, total = config.head_size, 0
    hidden = given["hidden"].sum() if "hidden" in given else config.hidden_size
    for outer, inner, widths, unit in (
        ("mha", "head", config.heads, 4 * d * hidden + 3 * d),
        ("ffn", "intermediate", config.intermediate, 2 * hidden + 1),
    ):
        for layer, width in enumerate(widths):
            row = np.ones(width, int)
            if inner in given:
                row = given[inner][layer, :width]
            any_open = 1 - (1 - row).prod()
            whole = given[outer][layer] if outer in given else 1
            total += whole * (row.sum() * unit + any_open * hidden)
    return total


@pytest.mark.parametrize("seed", SEEDS)
def test_cost_is_that_of_the_formula(seed):
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    hard = random_masks(rng, config, lambda shape: rng.integers(0, 2, shape))
    assert cost.num_params(hard, config) == formula(hard, config)
    assert cost.num_params({}, config) == formula({}, config)
    soft = random_masks(rng, config, lambda shape: rng.random(shape))
    found = cost.PARAMETERS.expected(soft, config)
    assert found == pytest.approx(formula(soft, config), rel=1e-14)
    shapes = masks.mask_shapes(config)
    layers = len(config.heads)
    assert shapes == {
        "head": (layers, max(config.heads)),
        "mha": (layers,),
        "intermediate": (layers, max(config.intermediate)),
        "ffn": (layers,),
        "hidden": (config.hidden_size,),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_multiply_adds_are_those_of_the_formula(seed):
    config = random_config(np.random.default_rng(seed))
    tokens, width = 1 + seed, config.hidden_size
    joined = sum(config.heads) * config.head_size
    total = 4 * tokens * width * joined + 2 * tokens**2 * joined
    total += 2 * tokens * width * sum(config.intermediate)
    if config.problem == "span":
        total += tokens * width * config.num_labels
    else:
        total += (width + config.num_labels) * config.pooler_size
    assert cost.multiply_adds(config, tokens) == total


@pytest.mark.parametrize("seed", SEEDS[:8])
def test_axes_are_those_of_the_parameters(seed):
    config = random_config(np.random.default_rng(seed))
    flat = traverse_util.flatten_dict(abstract_params(config))
    for path, array in flat.items():
        axes, layer, block = place(path, flat)
        sizes = {"D": config.hidden_size, "d": config.head_size}
        if block is not None:
            sizes[block.unit] = block.sizes(config)[layer]
        assert len(axes) == array.ndim
        for letter, size in zip(axes, array.shape, strict=True):
            assert letter == "*" or sizes[letter] == size
    counted = sum(
        array.size
        for path, array in flat.items()
        if any(path[1] == block.name for block in blocks(config))
    )
    assert cost.num_params({}, config) == counted
    with pytest.raises(KeyError, match="layer_0/attention/gate/kernel"):
        place(("layer_0", "attention", "gate", "kernel"), flat)


def fold_by_hand(params, given, config):
    """Every mask into the parameters that carry it, each of them by its name."""
    folded = jax.tree.map(lambda x: np.array(x, np.float64), params)
    hidden = given.get("hidden", np.ones(config.hidden_size))
    for name, node in folded["embeddings"].items():
        for leaf in node.values() if name == "norm" else [node]:
            leaf *= hidden
    for i in range(len(config.heads)):
        layer = folded.get(f"layer_{i}", {})
        for block, last, outer, inner, width in (
            ("attention", "output", "mha", "head", config.heads[i]),
            ("ffn", "down", "ffn", "intermediate", config.intermediate[i]),
        ):
            if not width:
                continue
            for leaf in layer[f"{block}_norm"].values():
                leaf *= hidden
            whole = given[outer][i] if outer in given else 1
            for leaf in layer[block][last].values():
                leaf *= whole * hidden
            for unit in range(width if inner in given else 0):
                layer[block][last]["kernel"][unit] *= given[inner][i, unit]
    return folded


@pytest.mark.parametrize("seed", SEEDS[:8])
def test_folding_is_that_of_the_formula(seed):
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    params = random_params(config, seed)
    given = random_masks(rng, config, lambda shape: rng.random(shape))
    found = slicing.fold(params, given, config)
    expected = fold_by_hand(params, given, config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), found, expected
    )
