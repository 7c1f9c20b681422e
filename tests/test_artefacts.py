"""What a run finds in its folder decides only if it is what this run would make."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import cofi_jax as cofi
import train
from cofi_jax.checkpoints import saved_model, state
from cofi_jax.checkpoints.state import Checkpoints
from cofi_jax.data import toy
from cofi_jax.pruning import constraint, slicing
from cofi_jax.run import artefacts, cli, run, setup

# What the storage library's own tasks leave behind when a file is damaged.
pytestmark = [
    pytest.mark.usefixtures("quick_compile", "without_pictures"),
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
    ),
]

ROOT = pathlib.Path(__file__).parents[1]
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
    config.prune.targets = (0.5,)
    config.prune.epochs = 3
    config.prune.warmup_epochs = 1
    config.prune.mask_learning_rate = 2.0
    config.distill.layers = 0.0
    config.finetune.epochs = 1
    config.benchmark.repeats = 2
    config.log_every = 2
    config.eval_every = 2
    config.checkpoint_every = 4
    return config
"""
TIMES = {"latency_ms", "speedup", "speedup_spread", "benchmark", "seconds"}


@pytest.fixture(scope="module")
def config(tmp_path_factory, quick_compile, without_pictures):
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
    flags = "--config.seed=1", "--config.prune.targets=0.2"
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


@pytest.mark.parametrize("stage", ["teacher", "finetune"])
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
    flags = "--config.seed=1", "--config.prune.targets=0.2"
    assert main(config, begun, *flags) == 0
    assert_same(begun, other)


def test_a_sparsity_that_misses_the_target_is_not_saved(config, begun, monkeypatch):
    """Should the method fail, then loudly."""
    (begun / "masks.npz").unlink()
    found = constraint.final_masks

    def opened(*arguments, **options):
        return jax.tree.map(np.ones_like, found(*arguments, **options))

    monkeypatch.setattr(constraint, "final_masks", opened)
    with pytest.raises(RuntimeError, match="sparsity 0.0.*target"):
        main(config, begun)
    left = {path.name for path in begun.iterdir()}
    assert not left & {"masks.npz", "pruned", "report.json"}


def test_an_artefact_is_made_once_and_keeps_its_seconds(tmp_path, monkeypatch):
    path, moments = tmp_path / "masks.npz", iter((10.0, 12.5, 20.0, 20.5))
    monkeypatch.setattr(artefacts.time, "monotonic", lambda: next(moments))
    written = []

    def make():
        written.append(path.write_text("here"))

    assert artefacts.settle(path, 1, make) == artefacts.settle(path, 1, make) == 2.5
    assert artefacts.settle(path, 2, make) == 0.5 and len(written) == 2
    known = json.loads((tmp_path / "made_from.json").read_text())
    del known["masks.npz"]["seconds"]  # as it was once
    (tmp_path / "made_from.json").write_text(json.dumps(known))
    assert artefacts.settle(path, 2, make) == 0.0 and len(written) == 2


# Damage


def truncate(content):
    return content[: len(content) // 2]


def flip(content):
    content = bytearray(content)
    for place in (len(content) // 3, len(content) // 2, -1):
        content[place] ^= 0x10
    return bytes(content)


def said(config, workdir, capsys):
    """The one line that a run is refused by, or None where it comes to its end."""
    capsys.readouterr()
    status = main(config, workdir)
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    assert (status, len(errors)) in ((0, 0), (2, 1))
    return errors[0] if errors else None


def is_refusal(line, workdir, name):
    """Whether a line names the file, or else its folder, and a way on."""
    ways = "without", "remove", "another --workdir"
    return str(workdir) in line and name in line and any(way in line for way in ways)


class Kept:
    """Checkpoints in memory: reading each from the disk is tested elsewhere, slowly."""

    states = {}

    def __init__(self, path, made_from):
        self.stage, self.skipped = path.name, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def restore(self, like):
        return self.states[self.stage]


@pytest.fixture
def quick(config, begun, monkeypatch):
    """The run up to its masks goes on in no time: rows and states are in memory."""
    restore, load = Checkpoints.restore, setup.load_inputs
    inputs = []

    def restore_and_keep(self, like):
        Kept.states[self._path.name] = restore(self, like)
        return Kept.states[self._path.name]

    def load_and_keep(config):
        inputs[:] = inputs or [load(config)]
        return inputs[0]

    monkeypatch.setattr(slicing, "prune", stop)
    monkeypatch.setattr(setup, "load_inputs", load_and_keep)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore", restore_and_keep)
        assert main(config, begun) == 2
    monkeypatch.setattr(state, "Checkpoints", Kept)
    shutil.rmtree(begun / "checkpoints")
    return begun


def teacher_and_masks(workdir):
    with np.load(workdir / "masks.npz") as masks:
        arrays = {name: masks[name] for name in masks}
    arrays["teacher"] = cofi.load_model(workdir / "teacher")[1]
    tokenizer = cofi.load_tokenizer(workdir / "teacher")
    return arrays, tokenizer("the film was not good")["input_ids"]


@pytest.mark.parametrize("damage", [truncate, flip])
def test_each_file_of_half_a_run(damage, config, quick, tmp_path, capsys):
    undisturbed = shutil.copytree(quick, tmp_path / "undisturbed")
    arrays, words = teacher_and_masks(undisturbed)
    refused = set()
    for path in sorted(undisturbed.rglob("*")):
        if not path.is_file() or not path.stat().st_size:
            continue
        shutil.rmtree(quick)
        shutil.copytree(undisturbed, quick)
        name = path.relative_to(undisturbed)
        (quick / name).write_bytes(damage(path.read_bytes()))
        line = said(config, quick, capsys)
        if line == "error: stopped":
            found, same = teacher_and_masks(quick)
            jax.tree.map(np.testing.assert_array_equal, found, arrays)
            assert same == words
        else:
            assert is_refusal(line, quick, name.name)
            refused.add(name.name)
    assert "config.json" in refused
    assert refused <= {"config.json", "metrics.jsonl"}


@pytest.mark.parametrize("damage", [truncate, flip])
def test_each_file_of_a_finished_run(damage, config, finished, whole, capsys):
    report = json.loads((whole / "report.json").read_text())
    for path in sorted(finished.rglob("*")):
        if not path.is_file() or not path.stat().st_size:
            continue
        name, content = path.relative_to(finished), path.read_bytes()
        path.write_bytes(damage(content))
        line = said(config, finished, capsys)
        if line:
            assert is_refusal(line, finished, name.name)
            assert name.name == "config.json"
        elif str(name) in ("report.json", "pruned/model.json"):
            assert_same(finished, whole)
            shutil.rmtree(finished)
            shutil.copytree(whole, finished)
        else:  # What is only shown again need not be read.
            assert json.loads((finished / "report.json").read_text()) == report
        path.write_bytes(content)


def test_no_checkpoint_can_be_read(config, begun, capsys):
    for path in (begun / "checkpoints" / "prune").rglob("*"):
        if path.is_file():
            path.write_bytes(truncate(path.read_bytes()))
    line = said(config, begun, capsys)
    assert is_refusal(line, begun, "checkpoints/prune")


def test_runs_in_one_process_keep_what_each_compiled(config, tmp_path, monkeypatch):
    """And leave jax as they found it, with or without a cache of the user's own."""

    def stages(run, inputs):
        for length in range(1, 3):
            jax.jit(lambda x: x * 2 + 1)(np.ones((length, run.config.seed)))
        return {}

    def programs(*folders):
        return [sum(f.is_file() for f in folder.rglob("*")) for folder in folders]

    monkeypatch.setattr(run, "_stages", stages)
    kept, own = jax.config.jax_compilation_cache_dir, tmp_path / "own"
    try:
        for seed, cache in ((57, None), (58, None), (59, str(own)), (60, None)):
            compilation_cache.reset_cache()
            jax.config.update("jax_compilation_cache_dir", cache)
            settings = cli.load(str(config), {"seed": seed})
            before = dict(jax.config.values)
            run.run(settings, tmp_path / str(seed))
            assert dict(jax.config.values) == before
            folders = [*tmp_path.glob(f"{seed}/compiled-*"), *([own] if cache else [])]
            (found,) = programs(*folders)
            assert found > 0
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", kept)


NOISY = """
import sys
import warnings

import absl.logging
import transformers

import train
from cofi_jax.data import toy
from cofi_jax.run import stages

toy.SIZES.update(train=100, validation=20)
finetune = stages.finetune


def noisy(*arguments):
    warnings.warn("of Python")
    absl.logging.warning("of absl")
    transformers.logging.get_logger("transformers").warning("of transformers")
    return finetune(*arguments)


stages.finetune = noisy
sys.exit(train.main(["train.py", *sys.argv[1:]]))
"""


def test_stdout_holds_results_and_stderr_all_warnings(config, tmp_path):
    flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    flags.append("--config.prune.mask_learning_rate=0.01")  # too low: a warning of ours
    done = subprocess.run(
        [sys.executable, "-c", NOISY, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for source in ("of Python", "of absl", "of transformers", "prune.mask_learning"):
        assert source in done.stderr and source not in done.stdout
    starts = ("teacher: ", "sliced: ", "|", "Latency on ", "Written to ")
    lines = list(filter(None, done.stdout.splitlines()))
    assert all(line.startswith(starts) for line in lines)
    assert {line[:1] for line in lines} == {"t", "s", "|", "L", "W"}
