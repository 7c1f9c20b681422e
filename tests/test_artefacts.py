"""What a run finds in its folder decides only if it is what this run would make."""

import json
import shutil

import jax
import numpy as np
import pytest

import cofi_jax as cofi
import train
from cofi_jax.checkpoints import saved_model
from cofi_jax.data import toy
from cofi_jax.pruning import slicing

# What the storage library's own tasks leave behind when a file is damaged.
pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
    ),
]

TARGET = 0.5
TINY = """
from configs import demo


def get_config():
    config = demo.get_config()
    config.model.num_layers = 1
    config.model.num_heads = 2
    config.model.hidden_size = 8
    config.model.intermediate_size = 16
    for stage in (config.teacher, config.prune, config.finetune):
        stage.train_rows = 64
        stage.batch_size = 16
    config.teacher.epochs = 2
    config.prune.target_sparsity = 0.5
    config.prune.epochs = 3
    config.prune.warmup_epochs = 1
    config.prune.mask_learning_rate = 2.0
    config.distill.layers = 0.0
    config.finetune.epochs = 1
    config.benchmark.repeats = 2
    config.log_every = 2
    config.eval_every = 2
    config.checkpoint_every = 2
    return config
"""
TIMES = {"latency_ms", "speedup", "speedup_spread", "benchmark", "seconds"}


@pytest.fixture(scope="module")
def config(tmp_path_factory, quick_compile):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy.SIZES, "train", 100)
        patch.setitem(toy.SIZES, "validation", 20)
        yield path


def main(config, workdir, *flags):
    flags = [f"--config={config}", f"--workdir={workdir}", *flags]
    return train.main(["train.py", *flags])


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert main(config, workdir) == 0
    return workdir


def stop(*_):
    raise cofi.UserError("stopped")


@pytest.fixture(scope="module")
def half(config, tmp_path_factory):
    """The folder of a run that was killed when its masks were settled."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slicing, "prune", stop)
        assert main(config, workdir) == 2
    assert (workdir / "masks.npz").exists()
    return workdir


@pytest.fixture(scope="module")
def other(config, tmp_path_factory):
    """The folder of a run of another seed and target."""
    workdir = tmp_path_factory.mktemp("other") / "run"
    flags = "--config.seed=1", "--config.prune.target_sparsity=0.2"
    assert main(config, workdir, *flags) == 0
    return workdir


@pytest.fixture
def finished(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "finished")


@pytest.fixture
def begun(half, tmp_path):
    return shutil.copytree(half, tmp_path / "begun")


def replace(workdir, other, name):
    if (workdir / name).is_dir():
        shutil.rmtree(workdir / name)
        shutil.copytree(other / name, workdir / name)
    else:
        shutil.copy(other / name, workdir / name)


def result_of(workdir):
    """All that a run leaves, but for the time that it took."""
    report = json.loads((workdir / "report.json").read_text())
    with np.load(workdir / "masks.npz") as masks:
        arrays = {name: masks[name] for name in masks}
    for name in ("teacher", "pruned"):
        about = cofi.read_about(workdir / name)
        arrays[name] = cofi.load_model(workdir / name)[1]
        tokenizer = cofi.load_tokenizer(workdir / name)
        arrays[f"{name}'s words"] = tokenizer("the film was not good")["input_ids"]
    assert about[2]["report"] == report
    rest = {name: value for name, value in report.items() if name not in TIMES}
    return arrays, rest | {"about": about[:2]}


def assert_same(workdir, whole):
    (arrays, rest), (expected, same) = result_of(workdir), result_of(whole)
    assert rest == same
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)


# Artefacts of something else


def test_old_masks_do_not_decide(config, begun, whole):
    """The way on that the program names is to remove the folder of a stage."""
    with np.load(begun / "masks.npz") as masks:
        opened = {kind: np.ones_like(masks[kind]) for kind in masks}
    np.savez(begun / "masks.npz", **opened)
    shutil.rmtree(begun / "checkpoints" / "prune")
    assert main(config, begun) == 0
    report = json.loads((begun / "report.json").read_text())
    assert report["sparsity"] >= TARGET - 1e-3
    assert_same(begun, whole)


def test_an_old_teacher_and_its_scores_do_not_decide(config, begun, whole, other):
    replace(begun, other, "teacher")
    model, params, _ = cofi.load_model(begun / "teacher")
    shutil.rmtree(begun / "teacher")
    about = {"scores": {"validation": {"accuracy": 0.125}}}
    tokenizer = toy.demo_tokenizer()
    saved_model.save_model(
        begun / "teacher", params, model.config, tokenizer=tokenizer, about=about
    )
    assert main(config, begun) == 0
    assert_same(begun, whole)


def test_an_old_pruned_model_and_its_figures_do_not_decide(
    config, finished, whole, other
):
    (finished / "report.json").unlink()
    replace(finished, other, "pruned")
    assert main(config, finished) == 0
    assert_same(finished, whole)


@pytest.mark.parametrize("named", ["report.json", "pruned"])
def test_an_old_report_does_not_decide(named, config, finished, whole, other):
    """Neither one of another run nor one of a model that is gone."""
    if named == "pruned":
        shutil.rmtree(finished / "pruned")
    else:
        replace(finished, other, named)
    assert main(config, finished) == 0
    assert_same(finished, whole)


@pytest.mark.parametrize("stage", ["teacher", "prepruning", "prune", "finetune"])
def test_a_stage_of_other_parameters_starts_over(
    stage, config, finished, whole, other, capsys
):
    for name in ("report.json", "pruned", "teacher", "masks.npz"):
        replace(finished, other, name)
    (finished / "report.json").unlink()
    replace(finished, other, f"checkpoints/{stage}")
    assert main(config, finished) == 0
    assert f"checkpoints/{stage}" in capsys.readouterr().err
    assert_same(finished, whole)


def test_nothing_of_another_config_decides(config, begun, other):
    (begun / "config.json").unlink()
    flags = "--config.seed=1", "--config.prune.target_sparsity=0.2"
    assert main(config, begun, *flags) == 0
    assert_same(begun, other)


def test_a_sparsity_that_misses_the_target_is_not_saved(config, begun, monkeypatch):
    """Should the method fail, then loudly."""
    from cofi_jax.pruning import constraint

    (begun / "masks.npz").unlink()
    found = constraint.final_masks

    def opened(*arguments, **options):
        return jax.tree.map(np.ones_like, found(*arguments, **options))

    monkeypatch.setattr(constraint, "final_masks", opened)
    with pytest.raises(RuntimeError, match="sparsity 0.0.*target"):
        main(config, begun)
    left = {path.name for path in begun.iterdir()}
    assert not left & {"masks.npz", "pruned", "report.json"}


# Damage


def truncate(content):
    return content[: len(content) // 2]


def flip(content):
    content = bytearray(content)
    for place in (len(content) // 3, len(content) // 2, -1):
        content[place] ^= 0x10
    return bytes(content)


def files_of(workdir):
    """All but what is only shown, and what another test file damages."""
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir)
        if path.is_file() and path.stat().st_size:
            yield name


def outcome(config, workdir, capsys):
    """The status of a run; where it is 2, it is refused in one line."""
    capsys.readouterr()
    status = main(config, workdir)
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (status == 2) and status in (0, 2)
    assert "Traceback" not in err
    return errors
