"""What was saved comes back bit for bit; what was damaged is noticed."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

import cofi_jax
from cofi_jax import distributed
from cofi_jax.checkpoints import saved_model as saved_model_lib
from cofi_jax.checkpoints.state import Checkpoints
from cofi_jax.data.toy import demo_tokenizer
from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import slicing
from cofi_jax.pruning.masks import mask_shapes
from cofi_jax.training import step as step_lib

# What the storage library's own tasks leave behind when a file is damaged.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)


# Resumable states


def state_at(step, seed=0):
    """A state of every kind of leaf, all of them random."""
    rates = {k: step_lib.learning_rate(0.1, "linear", 9) for k in ("weights", "masks")}
    state = step_lib.create_state(
        {"embeddings": np.zeros(5), "layer": {"kernel": np.zeros((30, 20))}},
        seed=seed,
        stage="test",
        rates=rates,
        freeze_embeddings=True,
        log_alpha={"ffn": np.zeros(3)},
        multipliers={"linear": 0.0, "quadratic": 0.0},
    )
    rng = np.random.default_rng((seed, step))

    def fill(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if leaf.dtype == jnp.int32:
            return jnp.array(rng.integers(0, 99, leaf.shape), jnp.int32)
        return jnp.array(rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, state).replace(step=jnp.int32(step))


def blank():
    return state_at(0, seed=99)


def identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    a, b = (s.replace(key=jax.random.key_data(s.key)) for s in (a, b))
    return all(
        x.dtype == y.dtype and x.weak_type == y.weak_type and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def steps_kept(path):
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = state_at(7)
    with Checkpoints(tmp_path / "prune") as saved:
        saved.save(state)
    with Checkpoints(tmp_path / "prune") as saved:
        restored = saved.restore(blank())
        assert saved.skipped == []
    assert identical(restored, state)
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)
    # It goes on as the original would have.
    draws = [jax.random.normal(jax.random.fold_in(s.key, 7)) for s in (state, restored)]
    assert draws[0] == draws[1]


def test_nothing_saved_is_none(tmp_path):
    with Checkpoints(tmp_path / "prune") as saved:
        assert saved.restore(blank()) is None
        assert saved.skipped == []


def test_the_newest_two_are_kept(tmp_path):
    with Checkpoints(tmp_path) as saved:
        for step in (2, 4, 10, 100):
            saved.save(state_at(step))
    assert steps_kept(tmp_path) == [10, 100]
    with Checkpoints(tmp_path) as saved:
        assert identical(saved.restore(blank()), state_at(100))


def test_donating_after_a_save_does_not_reach_the_file(tmp_path):
    """The write goes on in the background while the next step reuses the memory."""
    state = state_at(3)
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0, s.trainable), donate_argnums=0
    )
    with Checkpoints(tmp_path) as saved:
        saved.save(state)
        overwrite(state)
    with Checkpoints(tmp_path) as saved:
        assert identical(saved.restore(blank()), state_at(3))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(path) as saved:
        for step in (4, 8):
            saved.save(state_at(step))
    return path


def remove(file):
    file.unlink()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", [remove, truncate, flip])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    two_checkpoints, tmp_path, damage
):
    """For each of its files: the newest state exactly, or the one before exactly."""
    fell_back = 0
    for i, name in enumerate(files_of(two_checkpoints / "8")):
        path = tmp_path / str(i)
        shutil.copytree(two_checkpoints, path)
        damage(path / name.relative_to(two_checkpoints))
        with Checkpoints(path) as saved:
            restored = saved.restore(blank())
            if identical(restored, state_at(8)):
                assert saved.skipped == []
                continue
            fell_back += 1
            assert identical(restored, state_at(4))
            (line,) = saved.skipped
            assert f"{path}/8 is damaged" in line and "\n" not in line
            # The resumed run comes to step 8 once more.
            saved.save(state_at(8, seed=1))
        with Checkpoints(path) as saved:
            assert identical(saved.restore(blank()), state_at(8, seed=1))
            assert saved.skipped == []
    assert fell_back > 0


def test_a_checkpoint_without_its_folders(two_checkpoints, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(two_checkpoints, path)
    shutil.rmtree(path / "8" / "state")
    with Checkpoints(path) as saved:
        assert identical(saved.restore(blank()), state_at(4))
        assert "/8 is damaged" in saved.skipped[0]


def test_all_damaged_is_none_and_says_so(two_checkpoints, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(two_checkpoints, path)
    for step in ("4", "8"):
        truncate(
            max(files_of(path / step / "state" / "d"), key=lambda p: p.stat().st_size)
        )
    with Checkpoints(path) as saved:
        assert saved.restore(blank()) is None
        assert [line.split(" is ")[0] for line in saved.skipped] == [
            f"{path}/8",
            f"{path}/4",
        ]


# Saved models


ABOUT = {"task": "demo", "labels": ["blame", "praise"], "data": {"max_length": 9}}


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


@pytest.fixture(scope="module")
def pruned(tiny, tiny_params):
    """A sliced model with an absent block, a narrower width and soft gates."""
    masks = {k: np.ones(shape, np.float32) for k, shape in mask_shapes(tiny).items()}
    masks["hidden"][[0, 3]] = 0
    masks["head"][0, 1], masks["head"][1] = 0, 0.5
    masks["ffn"][0] = 0
    params, spec = slicing.prune(tiny_params, masks, tiny)
    return params, spec.config(tiny), spec


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory, pruned, tokenizer):
    path = tmp_path_factory.mktemp("models") / "pruned"
    saved_model_lib.save_model(path, *pruned, tokenizer=tokenizer, about=ABOUT)
    return path


@pytest.fixture
def copy(saved_model, tmp_path):
    shutil.copytree(saved_model, tmp_path / "copy")
    return tmp_path / "copy"


def assert_trees_identical(ours, others):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b, strict=True), ours, others
    )


def test_a_dense_model_comes_back(tiny, tiny_params, tokenizer, tmp_path):
    path = tmp_path / "some" / "folder" / "teacher"
    saved_model_lib.save_model(
        path, tiny_params, tiny, tokenizer=tokenizer, about=ABOUT
    )
    model, params, spec = saved_model_lib.load_model(path)
    assert model == Encoder(tiny) and spec is None
    assert_trees_identical(params, tiny_params)
    assert saved_model_lib.read_about(path) == (tiny, None, ABOUT)


def test_a_pruned_model_comes_back(pruned, saved_model):
    params, config, spec = pruned
    model, loaded, loaded_spec = saved_model_lib.load_model(str(saved_model))
    assert model == Encoder(config)
    assert loaded_spec == spec
    assert spec.hidden == (1, 2, *range(4, 16)) and spec.intermediate[0] == ()
    assert_trees_identical(loaded, params)
    sizes = {p.name for p in saved_model.iterdir()}
    assert sizes == {"README.md", "model.json", "params", "tokenizer"}


def test_the_tokenizer_comes_back(saved_model, tokenizer):
    text = "the film was not good"
    loaded = saved_model_lib.load_tokenizer(saved_model)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_model_without_its_tokenizer(copy):
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        saved_model_lib.load_tokenizer(copy)


def test_a_fresh_process_needs_one_line(pruned, saved_model, tiny_batch):
    params, config, _ = pruned
    program = """
import json, sys
import cofi_jax, numpy as np
model, params, spec = cofi_jax.load_model(sys.argv[1])
batch = {k: np.array(v, np.int32) for k, v in json.load(sys.stdin).items()}
print(json.dumps(model.apply({"params": params}, batch).logits.tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(saved_model)],
        input=json.dumps({k: v.tolist() for k, v in tiny_batch.items()}),
        capture_output=True,
        text=True,
        check=True,
    )
    expected = Encoder(config).apply({"params": params}, tiny_batch).logits
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-5)


def test_nothing_is_written_over(pruned, saved_model, tokenizer, tmp_path):
    before = {f: f.read_bytes() for f in files_of(saved_model)}
    (tmp_path / "file").write_text("precious")
    for path in (saved_model, tmp_path / "file"):
        with pytest.raises(UserError, match=f"{path.name}.*exists"):
            saved_model_lib.save_model(path, *pruned, tokenizer=tokenizer, about={})
    assert before == {f: f.read_bytes() for f in files_of(saved_model)}
    assert (tmp_path / "file").read_text() == "precious"


def test_a_killed_save_leaves_no_model_and_is_done_again(pruned, tmp_path, tokenizer):
    class Killed(Exception):
        pass

    class Killer:
        def save_pretrained(self, path):
            raise Killed

    path = tmp_path / "model"
    with pytest.raises(Killed):
        saved_model_lib.save_model(path, *pruned, tokenizer=Killer(), about={})
    assert not path.exists() and not saved_model_lib.is_model(path)
    saved_model_lib.save_model(path, *pruned, tokenizer=tokenizer, about={})
    assert_trees_identical(saved_model_lib.load_model(path)[1], pruned[0])
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("found", ["nothing", r"\['note.txt'\]"])
def test_not_a_model_says_what_there_is(tmp_path, found):
    path = tmp_path / "x"
    if found != "nothing":
        path.mkdir()
        (path / "note.txt").touch()
    with pytest.raises(UserError, match=f"x'.*model.json.*{found}"):
        saved_model_lib.load_model(path)


def rewrite(path, **changes):
    file = path / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_newer_format_is_refused(copy):
    rewrite(copy, format=2)
    with pytest.raises(UserError, match="copy'.*format 2.*newer.*up to 1"):
        saved_model_lib.load_model(copy)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"format": "1"}', b'{"format": 1', b'{"format": 1}\xff\xfe'],
)
def test_a_damaged_description(copy, content):
    (copy / "model.json").write_bytes(content)
    with pytest.raises(UserError, match="copy'.*model.json is damaged") as caught:
        saved_model_lib.load_model(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"heads": None}, {"no_such_field": 1}, {"hidden_size": 15}]
)
def test_a_description_of_another_model(copy, change):
    config = json.loads((copy / "model.json").read_text())["config"]
    rewrite(copy, config=config | change)
    with pytest.raises(UserError, match="copy'.*damaged"):
        saved_model_lib.load_model(copy)


@pytest.mark.parametrize("damage", [remove, truncate, flip])
def test_damaged_parameters(pruned, saved_model, tmp_path, damage):
    """For each file of the parameters: a clear refusal, or exactly what was saved."""
    refused = 0
    for i, name in enumerate(files_of(saved_model / "params")):
        path = tmp_path / str(i)
        shutil.copytree(saved_model, path)
        file = path / name.relative_to(saved_model)
        if damage is flip and not file.stat().st_size:
            continue
        damage(file)
        try:
            assert_trees_identical(saved_model_lib.load_model(path)[1], pruned[0])
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "damaged" in str(error)
            assert "\n" not in str(error)
    assert refused > 0


def test_flipped_values_are_noticed(tiny, tmp_path, tokenizer, monkeypatch):
    """The storage format itself lets some flips of plain data pass."""
    params = random_params(tiny, 0)
    monkeypatch.setattr(distributed, "digest", lambda tree: 0)
    saved_model_lib.save_model(
        tmp_path / "m", params, tiny, tokenizer=tokenizer, about=ABOUT
    )
    monkeypatch.undo()
    with pytest.raises(UserError, match="params are damaged"):
        saved_model_lib.load_model(tmp_path / "m")


def test_the_package_exposes_them():
    for name in ("load_model", "save_model", "load_tokenizer", "read_about"):
        assert getattr(cofi_jax, name) is getattr(saved_model_lib, name)
