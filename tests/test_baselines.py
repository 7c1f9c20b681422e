"""Models whose structure is given by hand or follows from one look at the gradients."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from cofi_jax import config as config_lib
from cofi_jax.checkpoints import saved_model
from cofi_jax.config import Prune, Structure
from cofi_jax.data import batches, tasks, toy
from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import cost, slicing, transforms
from cofi_jax.pruning.importance import magnitude
from cofi_jax.pruning.masks import mask_shapes
from cofi_jax.run import run as run_lib
from cofi_jax.run import stages, structure
from cofi_jax.training import log as log_lib
from configs import baselines, demo

pytestmark = pytest.mark.usefixtures("quick_compile", "without_pictures")

SIZES = EncoderConfig.dense(
    num_layers=6,
    num_heads=4,
    hidden_size=16,
    intermediate_size=20,
    vocab_size=5,
    num_labels=2,
)


# Which masks stay


def test_keep_most_keeps_the_largest_of_each_row():
    masks = {
        "head": jnp.array([[0.1, 0.9, 0.5], [0.0, 0.2, 0.2], [0.0, 0.0, 0.0]]),
        "mha": jnp.array([0.3, 0.0, 0.6]),
        "hidden": jnp.array([0.2, 0.1, 0.4, 0.3]),
    }
    kept = transforms.keep_most(head=2, hidden=3, mha=1)(masks)
    rows = [[0.0, 0.9, 0.5], [0.0, 0.2, 0.2], [0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(kept["head"], np.float32(rows))
    np.testing.assert_array_equal(kept["mha"], np.float32([0, 0, 0.6]))
    np.testing.assert_array_equal(kept["hidden"], np.float32([0.2, 0, 0.4, 0.3]))
    one = transforms.keep_most(head=1)(masks)["head"]
    np.testing.assert_array_equal(one[1], np.float32([0, 0.2, 0]))  # the first of two


def test_keep_most_does_not_count_padding(tiny):
    ragged = dataclasses.replace(tiny, heads=(3, 1))
    masks = {"head": jnp.array([[0.1, 0.2, 0.3], [0.4, 0.9, 0.9]])}
    kept = transforms.keep_most(ragged, head=2)(masks)["head"]
    np.testing.assert_array_equal(kept > 0, [[False, True, True], [True, False, False]])


@pytest.mark.parametrize("number", [0, -1, 2.0, True])
def test_numbers_that_keep_most_refuses(number):
    with pytest.raises(UserError, match="head=.*must be a whole number above 0"):
        transforms.keep_most(head=number)


@pytest.mark.parametrize(
    "layers, left",
    [
        (":", range(6)),
        (":2", [0, 1]),
        ("-2:", [4, 5]),
        ("::2", [0, 2, 4]),
        ("2::3", [2, 5]),
    ],
)
def test_layers_of_a_structure_are_those_of_a_slice(layers, left):
    given = Structure(layers=layers, head=0.5, intermediate=0.1, hidden=0.3)
    ones = {kind: jnp.ones(shape) for kind, shape in mask_shapes(SIZES).items()}
    spec = slicing.spec_of(structure.transform(given, SIZES)(ones), SIZES)
    assert [i for i, heads in enumerate(spec.heads) if heads] == [*left]
    assert {len(heads) for heads in spec.heads} <= {0, 2}
    assert {len(units) for units in spec.intermediate} <= {0, 2}
    assert len(spec.hidden) == 5
    # Counted by hand: 2 heads of width 4 and 2 units in each layer, 5 dimensions.
    attention = 3 * (5 * 8 + 8) + 8 * 5 + 5
    ffn = 5 * 2 + 2 + 2 * 5 + 5
    (target,) = structure.targets(Prune(structure=given), SIZES)
    assert target == 1 - len(left) * (attention + ffn) / cost.num_params({}, SIZES)


@pytest.mark.parametrize("given", [{"layers": ":20"}, {"intermediate": 0.999}])
def test_a_structure_must_cut_something(given):
    prune = Prune(structure=Structure(**given))
    with pytest.raises(UserError, match="structure.layers=.* leaves all .* 6 layers"):
        structure.targets(prune, SIZES)


@pytest.mark.parametrize("layers", ["6:", ":0", "3:2"])
def test_a_structure_must_leave_a_layer(layers):
    prune = Prune(structure=Structure(layers=layers))
    with pytest.raises(UserError, match="structure.layers=.* none of the model's 6"):
        structure.targets(prune, SIZES)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layers": "1,2"}, "prune.structure.layers='1,2': must be a slice"),
        ({"layers": "::0"}, "prune.structure.layers='::0': must be a slice"),
        ({"hidden": 0.0}, "prune.structure.hidden=0.0: must be in (0, 1]"),
        ({"head": 1.5}, "prune.structure.head=1.5: must be in (0, 1]"),
    ],
)
def test_structures_that_make_no_sense(change, said):
    config = baselines.get_config("stsb,every,2")
    vars(config.prune.structure).update(change)
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    assert str(caught.value).startswith(said)


def test_a_structure_goes_with_masks_that_are_not_learned():
    config = baselines.get_config("stsb,every,2")
    config.prune.epochs = 2
    with pytest.raises(UserError, match="prune.epochs=2: must be prune.prepruning"):
        config_lib.validate(config)
    config = baselines.get_config("stsb,every,2")
    config.prune.targets = (0.5, 0.8)
    with pytest.raises(UserError, match="prune.targets=.*a single one"):
        config_lib.validate(config)
    config = baselines.get_config("stsb,one_shot,0.8")
    config.prune.constraint, config.prune.seeds = "lagrangian", "equal"
    with pytest.raises(UserError, match="prune.epochs=0: must be at least 1 with"):
        config_lib.validate(config)


def test_a_fit_needs_all_hidden_dimensions():
    """A structure by hand does not read the kinds of masks, among which they may be."""
    config = baselines.get_config("stsb,every,2")
    config.prune.reconstruction_batches, config.prune.kinds = 2, ("hidden",)
    config_lib.validate(config)
    config.prune.structure.hidden = 0.5
    with pytest.raises(UserError, match="prune.reconstruction_batches=2: must be 0"):
        config_lib.validate(config)


def test_magnitude_is_the_squares_that_slicing_takes_away(tiny):
    """Each mask is closed alone, and the parameters of the blocks are counted."""
    params = random_params(tiny, seed=3)

    def squares(params):
        blocks = [
            node
            for name, layer in params.items()
            if name.startswith("layer_")
            for part, node in layer.items()
            if not part.endswith("norm")
        ]
        return sum(float(np.square(x).sum()) for x in jax.tree.leaves(blocks))

    found = magnitude(params, tiny)
    for kind, shape in mask_shapes(tiny).items():
        assert found[kind].shape == shape
        for index in np.ndindex(shape):
            closed = {kind: jnp.ones(shape).at[index].set(0)}
            small, _ = slicing.prune(params, closed, tiny)
            taken = squares(params) - squares(small)
            np.testing.assert_allclose(found[kind][index], taken, rtol=1e-5)


# Whole runs


def shrunk(config):
    """The demo's task on a tiny model, with the pruning of a baseline."""
    small = demo.get_config()
    small.model = dataclasses.replace(
        small.model, num_layers=2, num_heads=2, hidden_size=16, intermediate_size=32
    )
    small.teacher.train_rows = small.finetune.train_rows = 64
    small.teacher.epochs = small.finetune.epochs = 1
    small.benchmark.repeats = 1
    small.prune = config.prune
    small.prune.train_rows, small.prune.seed_batches = 64, 2
    return small


@pytest.fixture
def few_rows(monkeypatch):
    """A demo of few rows, which are tokenised and scored sooner."""
    monkeypatch.setitem(toy.SIZES, "train", 100)
    monkeypatch.setitem(toy.SIZES, "validation", 40)


def test_every_second_layer_of_the_teacher(tmp_path, few_rows, capsys, monkeypatch):
    """The model is fitted before it trains; only a damaged fit is made anew."""
    config = shrunk(baselines.get_config("stsb,every,2"))
    config.prune.reconstruction_batches = 2
    fit = tmp_path / "reconstruction.npz"

    def saved():
        report = run_lib.run(config, tmp_path)
        _, params, spec = saved_model.load_model(tmp_path / "pruned")
        return report, jax.device_get(params), spec

    report, params, spec = saved()
    assert report["kept"] == {
        "hidden": 16,
        "heads": [2, 0],
        "intermediate": [32, 0],
    }
    assert report["sparsity"] == report["target_sparsity"] == pytest.approx(0.5)
    assert report["masked_vs_sliced_max_abs_diff"] < 1e-4
    assert spec.heads == ((0, 1), ())
    (line,) = re.findall(r"reconstructed: .* (\S+)\n", capsys.readouterr().out)
    before = report["pruned"]["score_before_finetune"]
    assert float(line) == pytest.approx(before, abs=1e-4)
    kept = fit.read_bytes()
    fit.write_bytes(kept[:-100])
    (tmp_path / "report.json").unlink()
    monkeypatch.delattr(stages.importance, "importance")  # What it found is kept.
    again, same, _ = saved()
    names = "teacher", "prepruning", "importance", "prune", "reconstruction", "finetune"
    assert tuple(again["seconds"]) == names
    assert again["seconds"]["importance"] == report["seconds"]["importance"] > 0
    assert again["pruned"] == report["pruned"] and fit.read_bytes() == kept
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_model_of_which_nothing_is_cut_is_not_fitted_anew(tiny, monkeypatch):
    """It has recovered from the cuts before, which a fit would undo in part."""
    params, config = random_params(tiny, 0), config_lib.Config()
    config.prune.reconstruction_batches = 2
    monkeypatch.setattr(stages.Run, "score", lambda *_: 0.0)
    monkeypatch.setattr(stages.Run, "exact_logits", lambda *_: np.zeros((1, 3)))
    task = tasks.find(config.data)
    run = stages.Run(config, None, task, tiny, None, {}, None)
    student = stages.Student(params, jnp.eye(tiny.hidden_size))
    model, masks = Encoder(tiny), {"hidden": jnp.ones(tiny.hidden_size)}
    (stair,) = stages.stairs((0.5,))
    same, left, *_ = run_lib._slice(run, stair, (model, params), student, masks)
    assert same == model
    jax.tree.map(np.testing.assert_array_equal, left.params, params)


def masks_of_no_step(config, workdir, monkeypatch):
    """The masks of a model of SIZES that trains for no step, and what they remove."""
    config.data.task, config.data.max_length, config.data.buckets = "demo", 9, (9,)
    config.prune.train_rows, config.prune.batch_size = 0, 6
    sizes = dataclasses.replace(SIZES, vocab_size=17, max_positions=9)
    model, params = Encoder(sizes), jax.device_put(random_params(sizes, 0))
    ids = [np.arange(1, length, dtype=np.int32) for length in (5, 9, 3) * 6]
    types, labels = [np.zeros_like(row) for row in ids], np.arange(18) % 2
    rows = batches.Examples(ids, types, labels.astype(np.int32))
    monkeypatch.setattr(stages.Run, "score", lambda *_: 0.0)
    log = log_lib.MetricsLog(workdir / "metrics.jsonl")
    task = tasks.find(config.data)
    run = stages.Run(config, workdir, task, sizes, rows, {"validation": rows}, log)
    (target,) = structure.targets(config.prune, sizes)
    (stair,) = stages.stairs((target,))
    student = stages.Student(params, jnp.eye(16))
    same, masks, _ = stages.learn_masks(run, stair, model, student, None)
    jax.tree.map(np.testing.assert_array_equal, same.params, params)
    return sizes, target, masks


@pytest.mark.parametrize(
    "argument, kinds",
    [
        ("heads,0.2", {"head"}),
        ("ffn,0.3", {"intermediate"}),
        ("one_shot,0.7", {"head", "intermediate"}),
        ("tinybert", {"head", "intermediate", "hidden"}),
    ],
)
def test_what_a_baseline_cuts(argument, kinds, tmp_path, monkeypatch):
    config = shrunk(baselines.get_config(f"stsb,{argument}"))
    sizes, target, masks = masks_of_no_step(config, tmp_path, monkeypatch)
    # What stays is as it was: no step could have learned that a soft mask is better.
    assert all(np.isin(mask, (0, 1)).all() for mask in masks.values())
    spec = slicing.spec_of(masks, sizes)
    kept = {"head": spec.heads, "intermediate": spec.intermediate}
    dense = {"head": 6 * 4, "intermediate": 6 * 20}
    cut = {kind for kind in kept if sum(map(len, kept[kind])) < dense[kind]}
    assert cut | ({"hidden"} if len(spec.hidden) < 16 else set()) == kinds
    removed = cost.exact_sparsity(masks, sizes)
    # The last head to close, which weighs 0.025, may overshoot.
    assert -1e-3 <= removed - target < 0.03
    log = tmp_path / "metrics.jsonl"
    (line,) = [x for x in log_lib.read_metrics(log) if x["stage"] == "prune"]
    assert line["sparsity"] == pytest.approx(removed, abs=0.03)


@pytest.mark.parametrize(
    "constraint, spread", [("exact", 0.0), ("exact", 400.0), ("lagrangian", 9.0)]
)
def test_a_structure_is_met_whatever_its_seeds(
    constraint, spread, tmp_path, monkeypatch
):
    config = shrunk(baselines.get_config("stsb,tinybert"))
    config.prune.constraint, config.prune.seeds = constraint, "magnitude"
    config.prune.seed_spread = spread
    config_lib.validate(config)
    sizes, target, masks = masks_of_no_step(config, tmp_path, monkeypatch)
    assert cost.exact_sparsity(masks, sizes) == target


def test_a_structure_keeps_the_units_that_others_cannot_make_up_for(
    tmp_path, monkeypatch
):
    """Hidden dimensions, which are not measured, all stay."""
    config = shrunk(baselines.get_config("stsb,every,2"))
    config.prune.structure.layers, config.prune.structure.intermediate = ":", 0.5
    config.prune.seeds = "compensated"
    config_lib.validate(config)
    sizes, target, masks = masks_of_no_step(config, tmp_path, monkeypatch)
    assert cost.exact_sparsity(masks, sizes) == target
    assert np.all(masks["hidden"] == 1)
    config.prune.structure.hidden = 0.5
    with pytest.raises(UserError, match="prune.seeds='compensated': must be"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    "argument, said",
    [
        ("stsb,half", "baseline='half': must be one of first, every, tinybert"),
        ("stsb,first,many", "size='many': must be a whole number of layers"),
        ("stsb,every", "size='': must be a whole number of layers"),
        ("stsb,tinybert,4", "size='4': must be left out"),
        ("stsb,heads,few", "size='few': must be the fraction"),
        ("nothing,first,2", "task='nothing': must be one of"),
    ],
)
def test_arguments_that_make_no_sense(argument, said):
    with pytest.raises(UserError) as caught:
        baselines.get_config(argument)
    assert str(caught.value).startswith(said)
