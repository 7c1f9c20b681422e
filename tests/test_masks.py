"""Shapes, draws, the evaluation rule row by row in Python, laws of the transforms."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params

from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning import masks, transforms
from cofi_jax.pruning.cost import num_params
from cofi_jax.pruning.slicing import prune, spec_of

pytestmark = pytest.mark.usefixtures("quick_compile")

SUBSETS = [
    subset for size in range(1, 6) for subset in itertools.combinations(KINDS, size)
]


CLOSING = 2 / 3 * math.log(0.1 / 1.1)  # P(z > 0) = 1/2 there


LOW, HIGH = math.log(0.01), math.log(100)


def assert_equal(a, b):
    assert set(a) == set(b)
    for kind in a:
        np.testing.assert_array_equal(a[kind], b[kind], err_msg=kind)


def draw(seed, layers=3, heads=4, width=7, hidden=9):
    """Gates of all kinds, each block and each gate closed often."""
    rng = np.random.default_rng(seed)
    shapes = {
        "head": (layers, heads),
        "mha": (layers,),
        "intermediate": (layers, width),
        "ffn": (layers,),
        "hidden": (hidden,),
    }

    def gates(shape):
        values = rng.uniform(0.01, 1, shape) ** rng.integers(0, 2, shape)
        # The chance of being open differs from row to row: some rows are empty.
        chance = rng.choice([0.0, 0.3, 0.9], shape[:1])
        open_ = rng.random(shape) < chance.reshape(-1, *[1] * (len(shape) - 1))
        return jnp.asarray(values * open_, jnp.float32)

    return {kind: gates(shape) for kind, shape in shapes.items()}


# Shapes and kinds


def test_there_are_31_subsets():
    assert len(SUBSETS) == 31


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_shapes_of_every_subset(kinds):
    config = EncoderConfig(11, 6, (2, 2, 2), 3, (5, 5, 5), 6, 2)
    full = {
        "head": (3, 2),
        "mha": (3,),
        "intermediate": (3, 5),
        "ffn": (3,),
        "hidden": (6,),
    }
    expected = {kind: full[kind] for kind in kinds}
    assert masks.mask_shapes(config, kinds) == expected
    assert masks.mask_shapes(config, kinds[::-1]) == expected
    key = jax.random.key(0)
    log_alpha = masks.init_log_alpha(config, key, kinds)
    for made in (
        log_alpha,
        jax.eval_shape(masks.prob_active, log_alpha),
        jax.eval_shape(masks.sample, log_alpha, key),
        jax.eval_shape(masks.evaluation_masks, log_alpha),
    ):
        assert {kind: value.shape for kind, value in made.items()} == expected
        assert all(value.dtype == jnp.float32 for value in made.values())


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        (("head", "layer"), "'layer'"),
        ((), r"\(\)"),
        (("ffn", "head", "ffn"), "'ffn', 'head', 'ffn'"),
        ("head", "'head'"),
    ],
)
def test_wrong_kinds_are_named(tiny, kinds, named):
    calls = [
        lambda: masks.mask_shapes(tiny, kinds),
        lambda: masks.init_log_alpha(tiny, jax.random.key(0), kinds),
    ]
    if not isinstance(kinds, str):
        calls += [lambda: transforms.only(*kinds), lambda: transforms.without(*kinds)]
    for call in calls:
        with pytest.raises(UserError, match=f"kinds.*{named}"):
            call()


def test_wrong_kinds_of_keep_at_least_are_named():
    with pytest.raises(UserError, match="'layer'"):
        transforms.keep_at_least(hidden=1, layer=2)
    with pytest.raises(UserError, match=r"\(\)"):
        transforms.keep_at_least()


def test_gates_start_open_and_inside_the_clamp():
    config = EncoderConfig(11, 600, (12,) * 4, 50, (900,) * 4, 600, 2)
    log_alpha = masks.init_log_alpha(config, jax.random.key(5))
    for value in log_alpha.values():
        assert LOW < value.min() and value.max() < HIGH
        assert (masks.prob_active({"x": value})["x"] > 0.99).all()
        assert len(np.unique(value)) > 0.1 * value.size  # noise breaks ties


# Sampling


def test_draws_do_not_depend_on_the_other_kinds(tiny):
    key = jax.random.key(7)
    everything = masks.init_log_alpha(tiny, key)
    middling = {kind: value - 4.5 for kind, value in everything.items()}
    sample = masks.sample(middling, key)
    for kinds in SUBSETS:
        part = masks.init_log_alpha(tiny, key, kinds)
        assert_equal(part, {kind: everything[kind] for kind in kinds})
    for kinds in SUBSETS[:5]:
        drawn = masks.sample({kind: middling[kind] for kind in kinds}, key)
        assert_equal(drawn, {kind: sample[kind] for kind in kinds})


def test_same_key_same_draw_other_key_other_draw():
    log_alpha = {"hidden": jnp.zeros(64), "intermediate": jnp.zeros((2, 64))}
    first = masks.sample(log_alpha, jax.random.key(0))
    assert_equal(first, masks.sample(log_alpha, jax.random.key(0)))
    rows = [first["hidden"], *first["intermediate"]]
    rows += masks.sample(log_alpha, jax.random.key(1)).values()
    for a, b in itertools.combinations([np.ravel(r)[:64] for r in rows], 2):
        # Unlike and uncorrelated: |r| < 4 / sqrt(64) would hold by chance.
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.5


@pytest.mark.parametrize("log_alpha", [LOW, CLOSING, 0.0, 2.0, HIGH])
def test_a_sample_follows_the_distribution(log_alpha):
    size = 200_000
    gates = masks.sample({"hidden": jnp.full(size, log_alpha)}, jax.random.key(11))
    gates = np.asarray(gates["hidden"])
    for x in np.linspace(0, 0.999, 38):
        ratio = (x + 0.1) / (1.1 - x)
        below = 1 / (1 + math.exp(log_alpha) * ratio ** (-2 / 3))
        error = 4.5 * math.sqrt(below * (1 - below) / size)
        assert np.mean(gates <= x) == pytest.approx(below, abs=error)


def test_every_gate_has_a_draw_and_a_probability_of_its_own():
    probability = np.linspace(0.05, 0.99, 40).reshape(4, 10)
    log_alpha = jnp.asarray(np.log(probability / (1 - probability)) + CLOSING)
    np.testing.assert_allclose(
        masks.prob_active({"head": log_alpha})["head"], probability, rtol=1e-5
    )
    keys = jax.random.split(jax.random.key(2), 10_000)
    gates = jax.vmap(lambda key: masks.sample({"head": log_alpha}, key)["head"])(keys)
    error = 4.5 * np.sqrt(probability * (1 - probability) / len(keys))
    assert (np.abs(np.mean(gates > 0, axis=0) - probability) < error).all()
    correlation = np.corrcoef(np.asarray(gates > 0).reshape(len(keys), -1).T)
    assert np.abs(correlation - np.eye(40)).max() < 5 / math.sqrt(len(keys))


# Evaluation masks


def evaluate_row(log_alpha):
    """The rule for one row, in plain Python."""
    n = len(log_alpha)
    total = sum(1 / (1 + math.exp(CLOSING - x)) for x in log_alpha)
    number = round(n - total)  # half to even
    order = sorted(range(n), key=lambda i: (log_alpha[i], i))
    return [
        0.0 if i in order[:number] else 1 / (1 + math.exp(-1.2 * log_alpha[i]))
        for i in range(n)
    ]


def evaluate(kind, log_alpha):
    rows = np.asarray(log_alpha, np.float64)
    if kind == "hidden":
        return evaluate_row(rows)
    if kind in ("mha", "ffn"):
        return [evaluate_row([x])[0] for x in rows]
    return [evaluate_row(row) for row in rows]


@pytest.mark.parametrize("seed", range(20))
def test_evaluation_masks_follow_the_rule_row_by_row(seed):
    rng = np.random.default_rng(seed)
    shapes = {
        "head": (4, 5),
        "mha": (9,),
        "intermediate": (4, 40),
        "ffn": (9,),
        "hidden": (33,),
    }
    log_alpha = {}
    for kind, shape in shapes.items():
        values = rng.uniform(LOW, HIGH, shape)
        ties = rng.choice([LOW, -2.0, -1.0, 0.5, HIGH], shape)
        values = np.where(rng.random(shape) < rng.choice([0, 0.5, 1]), ties, values)
        log_alpha[kind] = values.astype(np.float32)
    result = masks.evaluation_masks(log_alpha)
    for kind in KINDS:
        expected = evaluate(kind, log_alpha[kind])
        # Which gates are closed is exact, the soft values are to float32.
        np.testing.assert_allclose(result[kind], expected, rtol=2e-6, err_msg=kind)


def closed(row):
    row = jnp.asarray(row, jnp.float32)
    return np.flatnonzero(masks.evaluation_masks({"hidden": row})["hidden"] == 0)


@pytest.mark.parametrize(
    ("n", "number"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4), (9, 4)]
)
def test_half_a_gate_is_rounded_to_even_and_of_equals_the_first_close(n, number):
    """n gates of P = 1/2: n / 2 close, and 0.5, 1.5, 2.5, 3.5, 4.5 go to even."""
    assert closed([CLOSING] * n).tolist() == list(range(number))


def test_ties_close_the_lowest_index_first():
    # Sum of 1 - P: 3 * .953 + .5 + 2 * .002 = 3.36, so three close.
    assert closed([HIGH, LOW, CLOSING, LOW, HIGH, LOW]).tolist() == [1, 3, 5]
    # 4 * .168 + .002 = .67: of the four lowest the first.
    assert closed([HIGH, 0, 0, 0, 0]).tolist() == [1]


def test_rows_can_close_and_open_altogether():
    for n in (1, 4, 10):  # n * .953 rounds to n up to 10
        assert len(closed([LOW] * n)) == n
    assert len(closed([LOW] * 11)) == 10
    assert len(closed([LOW] * 12)) == 11  # the original: 1 of 12 heads stays
    assert len(closed([LOW] * 3072)) == 3072 - 145
    assert len(closed([HIGH] * 12)) == 0
    assert len(closed([HIGH] * 768)) == 2
    assert len(closed([HIGH] * 3072)) == 6


@pytest.mark.parametrize("kind", ["mha", "ffn"])
def test_layer_gate_closes_exactly_below_one_half(kind):
    row = jnp.array([HIGH, CLOSING + 1e-4, CLOSING, CLOSING - 1e-4, LOW, 0.0])
    gates = np.asarray(masks.evaluation_masks({kind: row})[kind])
    assert (gates > 0).tolist() == [True, True, True, False, False, True]
    assert gates[2] == pytest.approx(0.128, abs=5e-4) and gates[5] == 0.5


# Transforms

TRANSFORMS = {
    "only": transforms.only("head", "mha", "hidden"),
    "without": transforms.without("hidden", "ffn"),
    "harden": transforms.harden(),
    "drop_empty": transforms.drop_empty(),
    "keep_at_least": transforms.keep_at_least(head=2, hidden=4, mha=1, intermediate=3),
    "round_to_multiple": transforms.round_to_multiple(head=2, intermediate=3, hidden=4),
    "keep_layers": transforms.keep_layers(2, 0),
    "drop_layers": transforms.drop_layers(0),
}


PAIRS = list(itertools.permutations(TRANSFORMS, 2))


SEEDS = range(6)


def test_chain_of_nothing_is_the_identity():
    gates = draw(0)
    assert_equal(transforms.chain()(gates), gates)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_chain_applies_from_left_to_right(names):
    first, second = (TRANSFORMS[name] for name in names)
    for seed in SEEDS:
        gates = draw(seed)
        assert_equal(transforms.chain(first, second)(gates), second(first(gates)))


def test_chain_is_associative():
    a, b, c = (TRANSFORMS[n] for n in ("keep_at_least", "drop_empty", "only"))
    gates = draw(3)
    expected = c(b(a(gates)))
    assert_equal(transforms.chain(a, transforms.chain(b, c))(gates), expected)
    assert_equal(transforms.chain(transforms.chain(a, b), c)(gates), expected)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_idempotent_jittable_and_leave_their_input(name):
    transform = TRANSFORMS[name]
    jitted = jax.jit(transform)
    for seed in SEEDS:
        gates = draw(seed)
        before = dict(gates)
        result = transform(gates)
        assert_equal(gates, before)
        assert_equal(transform(result), result)
        assert_equal(jitted(gates), result)
        on_host = transform({k: np.asarray(v) for k, v in gates.items()})
        assert_equal(on_host, result)
        for kind, value in result.items():
            assert value.shape == gates[kind].shape and value.dtype == jnp.float32


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_transforms_take_any_subset_of_kinds(name, kinds):
    gates = {kind: value for kind, value in draw(1).items() if kind in kinds}
    if "layers" in name and kinds == ("hidden",):
        with pytest.raises(UserError, match="do not tell how many layers"):
            TRANSFORMS[name](gates)
        return
    result = TRANSFORMS[name](gates)
    traced = jax.eval_shape(TRANSFORMS[name], gates)
    assert {kind: value.shape for kind, value in traced.items()} == {
        kind: value.shape for kind, value in result.items()
    }
    if "layers" in name:  # each block needs a gate of one sort
        added = {"mha"} - {"mha" if "head" in kinds else ""}
        added |= {"ffn"} - {"ffn" if "intermediate" in kinds else ""}
        assert set(result) == set(kinds) | added
    elif name == "only":
        assert set(result) == set(kinds) & {"head", "mha", "hidden"}
    elif name == "without":
        assert set(result) == set(kinds) - {"hidden", "ffn"}
    else:
        assert set(result) == set(kinds)


def test_only_and_without_are_complements():
    gates = draw(2)
    for kinds in SUBSETS:
        kept, dropped = (
            transforms.only(*kinds)(gates),
            transforms.without(*kinds)(gates),
        )
        assert set(kept) == set(kinds) and not set(kept) & set(dropped)
        assert_equal(kept | dropped, gates)


def test_harden_opens_what_is_open_and_nothing_else():
    for seed in SEEDS:
        gates = draw(seed)
        for kind, value in transforms.harden()(gates).items():
            np.testing.assert_array_equal(value, np.where(gates[kind] > 0, 1.0, 0.0))


def test_drop_empty_closes_blocks_and_their_gates_and_nothing_else():
    for seed in SEEDS:
        gates = {kind: np.asarray(value) for kind, value in draw(seed).items()}
        result = transforms.drop_empty()(gates)
        np.testing.assert_array_equal(result["hidden"], gates["hidden"])
        for block, inner in (("mha", "head"), ("ffn", "intermediate")):
            for layer in range(3):
                empty = gates[block][layer] == 0 or not gates[inner][layer].any()
                keep = 0 if empty else 1
                assert result[block][layer] == keep * gates[block][layer]
                np.testing.assert_array_equal(
                    result[inner][layer], keep * gates[inner][layer]
                )


def draw_tiny(seed):
    """As `draw`, of the model `tiny`; some hidden dimensions stay."""
    gates = draw(seed, layers=2, heads=3, width=6, hidden=16)
    gates["hidden"] = gates["hidden"].at[3:7].set(1.0)
    return gates


def test_drop_empty_leaves_the_model_as_it_is(tiny, tiny_params, tiny_batch):
    @jax.jit
    def outputs(gates):
        variables = {"params": tiny_params, "masks": gates}
        return Encoder(tiny).apply(variables, tiny_batch)

    changed = 0
    for seed in range(10):
        gates = draw_tiny(seed)
        dropped = transforms.drop_empty()(gates)
        changed += any((gates[kind] != dropped[kind]).any() for kind in gates)
        jax.tree.map(np.testing.assert_array_equal, outputs(gates), outputs(dropped))
        assert spec_of(gates, tiny) == spec_of(dropped, tiny)
        assert num_params(gates, tiny) == num_params(dropped, tiny)
    assert changed >= 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_keep_at_least_reaches_the_count_and_closes_nothing(kind, count):
    for seed in SEEDS:
        gates = {name: np.asarray(value) for name, value in draw(seed).items()}
        result = transforms.keep_at_least(**{kind: count})(gates)
        for other in set(KINDS) - {kind}:
            np.testing.assert_array_equal(result[other], gates[other])
        # mha and ffn are counted over the layers, the others in each row.
        before, after = np.atleast_2d(gates[kind]), np.atleast_2d(result[kind])
        for row, new in zip(before, after, strict=True):
            wanted = max((row > 0).sum(), min(count, len(row)))
            assert (new > 0).sum() == wanted
            reopened = np.flatnonzero((row == 0) & (new > 0))
            np.testing.assert_array_equal(
                reopened, np.flatnonzero(row == 0)[: len(reopened)]
            )
            np.testing.assert_array_equal(new[reopened], 1.0)
            np.testing.assert_array_equal(new[row > 0], row[row > 0])


# Widths that are multiples


@pytest.mark.parametrize("kind", ["head", "intermediate", "hidden"])
@pytest.mark.parametrize("multiple", [1, 2, 3, 4, 100])
def test_rounding_opens_as_few_gates_as_it_takes(kind, multiple):
    for seed in SEEDS:
        gates = {name: np.asarray(value) for name, value in draw(seed).items()}
        result = transforms.round_to_multiple(**{kind: multiple})(gates)
        for other in set(KINDS) - {kind}:
            np.testing.assert_array_equal(result[other], gates[other])
        rows = zip(np.atleast_2d(gates[kind]), np.atleast_2d(result[kind]), strict=True)
        for row, new in rows:
            number = int((row > 0).sum())
            wanted = next(n for n in range(number, 999) if n % multiple == 0)
            assert (new > 0).sum() == min(wanted, len(row))
            np.testing.assert_array_equal(new[row > 0], row[row > 0])
            opened = np.flatnonzero((row == 0) & (new > 0))
            np.testing.assert_array_equal(
                opened, np.flatnonzero(row == 0)[: len(opened)]
            )
            assert (new[opened] < 1e-8).all()


@pytest.mark.parametrize(
    "multiples, named",
    [
        ({"mha": 2}, "mha=2"),
        ({"head": 2, "ffn": 1}, "ffn=1"),
        ({"head": 0}, "head=0"),
        ({"hidden": -8}, "hidden=-8"),
        ({"intermediate": 64.0}, "intermediate=64.0"),
        ({"width": 64}, "width"),
        ({}, "kinds"),
    ],
)
def test_wrong_multiples_are_named(multiples, named):
    with pytest.raises(UserError, match=named):
        transforms.round_to_multiple(**multiples)


def test_rounding_heads_and_units_leaves_the_model_as_it_is(
    tiny, tiny_params, tiny_batch
):
    apply = jax.jit(Encoder(tiny).apply)
    transform = transforms.round_to_multiple(head=2, intermediate=4)
    opened = 0
    for seed in range(12):
        gates = draw_tiny(seed)
        rounded = transform(gates)
        opened += sum(int((rounded[kind] > gates[kind]).sum()) for kind in KINDS)
        spec = spec_of(rounded, tiny)
        # An absent block stays absent, the others have legal widths.
        before = spec_of(gates, tiny)
        for was, now, legal in (
            *((a, b, (2, 3)) for a, b in zip(before.heads, spec.heads, strict=True)),
            *(
                (a, b, (4, 6))
                for a, b in zip(before.intermediate, spec.intermediate, strict=True)
            ),
        ):
            assert set(was) <= set(now)
            assert len(now) in legal if was else not now
        with jax.default_matmul_precision("highest"):
            expected = apply({"params": tiny_params, "masks": gates}, tiny_batch)
            masked = apply({"params": tiny_params, "masks": rounded}, tiny_batch)
        for result, like in zip(
            jax.tree.leaves(masked), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(result, like, atol=1e-5, rtol=0)
    assert opened >= 10
    sliced, spec = prune(tiny_params, rounded, tiny)
    with jax.default_matmul_precision("highest"):
        small = jax.jit(Encoder(spec.config(tiny)).apply)(
            {"params": sliced}, tiny_batch
        )
    np.testing.assert_allclose(small.logits, expected.logits, atol=1e-5, rtol=0)


def test_units_that_rounding_opened_can_be_trained(tiny, tiny_params, tiny_batch):
    gates = {"intermediate": jnp.ones((2, 6)).at[:, :3].set(0.0)}
    rounded = transforms.round_to_multiple(intermediate=2)(gates)
    sliced, spec = prune(tiny_params, rounded, tiny)
    assert spec.intermediate == ((0, 3, 4, 5),) * 2

    def loss(params):
        logits = Encoder(spec.config(tiny)).apply({"params": params}, tiny_batch).logits
        return jnp.square(logits - 1).sum()

    gradient = jax.jit(jax.grad(loss))(sliced)["layer_0"]["ffn"]["down"]["kernel"]
    sizes = jnp.abs(gradient).max(-1)
    assert sizes[0] > 0.1 * sizes[1:].min()


@pytest.mark.parametrize("kept", [60, 63])
def test_rounding_hidden_dimensions_changes_the_model_little(kept, tiny):
    wide = dataclasses.replace(
        tiny, hidden_size=96, heads=(4, 4), head_size=24, intermediate=(96, 96)
    )
    rng = np.random.default_rng(kept)
    gates = {"hidden": jnp.asarray(rng.permutation(96) < kept, jnp.float32)}
    rounded = transforms.round_to_multiple(hidden=32)(gates)
    more = int((rounded["hidden"] > 0).sum()) - kept
    assert more == 64 - kept
    params = random_params(wide, seed=1)
    ids = rng.integers(0, wide.vocab_size, (4, 8))
    batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    apply = jax.jit(Encoder(wide).apply)
    before = apply({"params": params, "masks": gates}, batch).hidden_states
    after = apply({"params": params, "masks": rounded}, batch).hidden_states
    for a, b in zip(before, after, strict=True):
        change = jnp.linalg.norm(b - a) / jnp.linalg.norm(a)
        assert 0.3 * more / kept < change < 1.2 * more / kept


def test_rounding_hidden_dimensions_gives_a_model_that_slices(
    tiny, tiny_params, tiny_batch
):
    apply = jax.jit(Encoder(tiny).apply)
    for seed in range(2):
        gates = transforms.round_to_multiple(hidden=8)(draw_tiny(seed))
        sliced, spec = prune(tiny_params, gates, tiny)
        assert len(spec.hidden) in (8, 16)
        with jax.default_matmul_precision("highest"):
            masked = apply({"params": tiny_params, "masks": gates}, tiny_batch)
            small = jax.jit(Encoder(spec.config(tiny)).apply)(
                {"params": sliced}, tiny_batch
            )
        np.testing.assert_allclose(small.logits, masked.logits, atol=1e-5, rtol=1e-5)


# Whole layers

DRAWN = EncoderConfig(11, 9, (4, 4, 4), 3, (7, 7, 7), 9, 2)  # the shapes of `draw`


@pytest.mark.parametrize(
    "kinds", [s for s in SUBSETS if s != ("hidden",)], ids="+".join
)
@pytest.mark.parametrize("dropped", [(0,), (2,), (2, 0), (0, 1, 2)], ids=str)
def test_dropped_layers_are_absent_and_nothing_else(kinds, dropped):
    for seed in SEEDS[:3]:
        gates = {kind: value for kind, value in draw(seed).items() if kind in kinds}
        if "hidden" in gates:
            gates["hidden"] = gates["hidden"].at[4].set(0.5)
        result = transforms.drop_layers(*dropped)(gates)
        before, after = spec_of(gates, DRAWN), spec_of(result, DRAWN)
        assert after.hidden == before.hidden
        for layer in range(3):
            gone = layer in dropped
            assert after.heads[layer] == (() if gone else before.heads[layer])
            units = () if gone else before.intermediate[layer]
            assert after.intermediate[layer] == units
        for kind, value in gates.items():  # open ones keep their values
            np.testing.assert_array_equal(
                result[kind], np.where(result[kind] > 0, value, 0)
            )
        if left := set(range(3)) - set(dropped):
            assert_equal(transforms.keep_layers(*left)(gates), result)


def test_keeping_all_layers_is_the_identity():
    gates = draw(0)
    assert_equal(transforms.keep_layers(0, 1, 2)(gates), gates)
    assert_equal(transforms.keep_layers(*np.arange(3))(gates), gates)


@pytest.mark.parametrize("freed", ["mha", "ffn", "head", "intermediate"])
def test_a_dropped_layer_stays_dropped_without_one_kind_of_its_gates(freed):
    result = transforms.chain(transforms.drop_layers(1), transforms.without(freed))(
        draw(5)
    )
    result["hidden"] = jnp.ones(9)
    spec = spec_of(result, DRAWN)
    assert spec.heads[1] == spec.intermediate[1] == ()


@pytest.mark.parametrize("transform", [transforms.keep_layers, transforms.drop_layers])
@pytest.mark.parametrize(
    "layers, named", [((), r"\(\)"), ((0, -1), "-1"), ((1.0,), "1.0"), (("1",), "'1'")]
)
def test_wrong_layers_are_named(transform, layers, named):
    with pytest.raises(UserError, match=f"layers={named}"):
        transform(*layers)


@pytest.mark.parametrize("transform", [transforms.keep_layers, transforms.drop_layers])
def test_layers_that_the_masks_do_not_have_are_named(transform):
    with pytest.raises(UserError, match="layers=3: must be below 3"):
        transform(0, 3)(draw(0))
    with pytest.raises(UserError, match="masks=.*do not tell how many layers"):
        transform(0)({})


def test_decisions_count_what_is_closed_and_what_is_open_to_doubt():
    config = dataclasses.replace(TINY, heads=(2, 1), intermediate=(3, 0))
    log_alpha = {
        "head": jnp.array([[30.0, CLOSING], [-30.0, -jnp.inf]]),  # open, half, closed
        "ffn": jnp.array([CLOSING + math.log(3), -jnp.inf]),  # open by 3 to 1
        "intermediate": jnp.array([[30.0, 30.0, -30.0], [-jnp.inf] * 3]),
    }
    found = {k: float(v) for k, v in masks.decisions(log_alpha, config).items()}
    want = {"closed_head": 1.5 / 3, "closed_ffn": 0.25, "closed_intermediate": 1 / 3}
    assert found == pytest.approx(want | {"undecided": 2 / 7}, abs=1e-6)
