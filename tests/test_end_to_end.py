"""The whole program on a tiny model: what it writes, and what a kill costs."""

import dataclasses
import json
import pathlib
import random

import jax
import numpy as np
import pytest
from kill_and_resume import as_before, differing, logged, run_with_kills

import cofi_jax as cofi
import train
from cofi_jax.pruning import cost
from cofi_jax.run import cli
from cofi_jax.training import log as log_lib

TINY = """
from configs import demo


def get_config():
    config = demo.get_config()
    config.model.num_layers = 1
    config.model.num_heads = 2
    config.model.hidden_size = 16
    config.model.intermediate_size = 32
    config.teacher.train_rows = 640
    config.teacher.epochs = 2
    config.prune.train_rows = 640
    config.prune.epochs = 4
    config.prune.targets = (0.4, 0.6)
    config.prune.constraint = "exact"
    config.prune.seeds = "importance"
    config.prune.recover_epochs = 1
    config.finetune.train_rows = 640
    config.finetune.epochs = 2
    config.benchmark.repeats = 3
    config.eval_every = 10
    config.checkpoint_every = 10
    return config
"""


# The stages in their order, each with its epochs.
EPOCHS = {
    "teacher": 2,
    "prepruning": 1,
    "prune-40": 3,
    "finetune-40": 1,
    "prune-60": 3,
    "finetune-60": 2,
}


pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(
    "config, workdir",
    [
        ("configs/demo.py", "runs/demo"),
        ("configs/paper.py", "runs/paper"),
        ("configs/paper.py:mnli", "runs/paper-mnli"),
        ("configs/paper.py:mnli,0.60,no_hidden", "runs/paper-mnli-0.60-no_hidden"),
    ],
)
@pytest.mark.parametrize("joint", ["=", " "])
def test_default_workdir(config, workdir, joint):
    argv = ["train.py", *f"--config{joint}{config}".split()]
    assert cli.parse(argv)[1] == pathlib.Path(workdir)
    assert cli.parse([*argv[:1], "--workdir=x", *argv[1:]])[1] == pathlib.Path("x")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, quick_compile):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    argv = ["train.py", "--config", str(config_file), "--workdir", str(workdir)]
    assert train.main(argv) == 0
    return workdir, argv


@pytest.mark.parametrize("stage, target", [("prune-40", 0.4), ("prune-60", 0.6)])
def test_the_exact_constraint_is_met_in_every_step_and_evaluation(
    stage, target, finished
):
    lines = log_lib.read_metrics(finished[0] / "metrics.jsonl")
    lines = [line for line in lines if line["stage"] == stage]
    steps = [line for line in lines if "expected_sparsity" in line]
    assert all(
        line["expected_sparsity"] == pytest.approx(line["target_sparsity"], abs=1e-4)
        for line in steps
    )
    scored = [line for line in lines if "score" in line]
    assert scored and not any("counts" in line for line in scored)
    # One unit of this tiny model is more than 0.001 of it.
    assert all(target - 1e-3 <= line["sparsity"] < target + 0.02 for line in scored)


@pytest.mark.parametrize("number, suffix", [(0, "-40"), (1, "-60")])
def test_report_says_what_the_saved_models_are(number, suffix, finished):
    workdir, _ = finished
    whole = json.loads((workdir / "report.json").read_text())
    result = whole["family"][number]
    assert {k: whole[k] for k in result} == whole["family"][-1]
    dense, dense_params, no_spec = cofi.load_model(workdir / "teacher")
    model, params, spec = cofi.load_model(workdir / f"pruned{suffix}")
    assert no_spec is None
    assert spec.config(dense.config) == model.config
    assert result["kept"]["hidden"] == len(spec.hidden)
    assert result["kept"]["heads"] == list(map(len, spec.heads))
    assert result["kept"]["intermediate"] == list(map(len, spec.intermediate))
    blocks = sum(
        x.size
        for name, layer in params.items()
        if name.startswith("layer_")
        for part, node in layer.items()
        if not part.endswith("norm")
        for x in jax.tree.leaves(node)
    )
    assert result["params"]["encoder"]["pruned"] == blocks
    dense_blocks = cost.num_params({}, dense.config)
    assert result["sparsity"] == pytest.approx(1 - blocks / dense_blocks)
    # A unit of the tiny model weighs more than 0.001, so it may be above.
    assert result["sparsity"] >= result["target_sparsity"] - 1e-3
    total = sum(x.size for x in jax.tree.leaves(dense_params))
    assert result["params"]["total"]["dense"] == total
    assert result["masked_vs_sliced_max_abs_diff"] <= 1e-4
    for name in ("teacher", "pruned"):
        score = result[name]["score"]
        assert result[name]["scores"] == {"validation": {"accuracy": score}}
    assert min(result["latency_ms"].values()) > 0
    low, high = result["speedup_spread"]
    assert 0 < low <= result["speedup"] <= high
    stages = ["teacher", "prepruning"]
    for each in ("-40", "-60")[: 1 + number]:
        stages += [f"{kind}{each}" for kind in ("importance", "prune", "finetune")]
    assert list(result["seconds"]) == stages
    assert all(seconds > 0 for seconds in result["seconds"].values())
    for field in ("device", "dtype", "batch_size", "seq_length", "repeats"):
        assert result["benchmark"][field]


def test_saved_models_say_what_they_were_made_of(finished):
    workdir, _ = finished
    config = json.loads((workdir / "config.json").read_text())
    whole = json.loads((workdir / "report.json").read_text())
    said = {
        "task": "demo",
        "labels": ["blame", "praise"],
        "data": config["data"],
    }
    sizes, _, about = cofi.read_about(workdir / "teacher")
    reached = {name: whole["teacher"][name] for name in ("scores", "by_class")}
    assert about == said | reached
    names = ["teacher", "pruned-40", "pruned-60"]
    scores = [whole["teacher"]["score"]]
    for name, result in zip(names[1:], whole["family"], strict=True):
        _, _, about = cofi.read_about(workdir / name)
        assert about == said | {
            "dense": json.loads(json.dumps(dataclasses.asdict(sizes))),
            "sparsity": result["sparsity"],
            "report": result,
        }
        scores.append(result["pruned"]["score"])
    for name, score in zip(names, scores, strict=True):
        card = (workdir / name / "README.md").read_text()
        assert f"{score:.4f}" in card
        assert str(workdir.parent) not in card
    assert "report.html" in {path.name for path in workdir.iterdir()}


def test_every_stage_left_its_lines(finished):
    workdir, _ = finished
    metrics = log_lib.read_metrics(workdir / "metrics.jsonl")
    steps = {stage: [] for stage in EPOCHS}
    for line in metrics:
        if "loss" in line:
            steps[line["stage"]].append(line["step"])
            assert np.isfinite(line["loss"])
    per_epoch = 640 // 64
    assert list(dict.fromkeys(line["stage"] for line in metrics)) == list(EPOCHS)
    for stage, epochs in EPOCHS.items():
        assert steps[stage][-1] == epochs * per_epoch
        assert steps[stage] == sorted(set(steps[stage]))
    followed = [line for line in metrics if "target_sparsity" in line]
    targets = [line["target_sparsity"] for line in followed]
    assert targets == sorted(targets)
    assert targets[-1] == pytest.approx(0.6)
    for line in followed:
        assert line["expected_sparsity"] == pytest.approx(
            line["target_sparsity"], abs=1e-4
        )


def test_checkpoints_are_bounded(finished):
    workdir, _ = finished
    for stage in EPOCHS:
        assert len(list((workdir / "checkpoints" / stage).iterdir())) <= 2


def test_a_finished_run_is_only_shown_again(finished, capsys):
    workdir, argv = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    assert train.main(argv) == 0
    assert "encoder parameters" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    assert before == after


def test_killed_runs_end_with_the_same_bits(config_file, finished, tmp_path):
    """A kill while the masks of the second model are learned."""
    workdir, _ = finished
    pieces, rng = tmp_path / "pieces", random.Random(1)
    as_before("prune-60", workdir, pieces)
    moments = [rng.choice([x for x in logged(workdir) if x[0] == "prune-60"])]
    with open(tmp_path / "log", "w") as log:
        run_with_kills(config_file, pieces, moments, rng, log)
    assert "Traceback" not in (tmp_path / "log").read_text()
    for model in ("teacher", "pruned-40", "pruned-60"):
        assert not differing(workdir / model, pieces / model)
