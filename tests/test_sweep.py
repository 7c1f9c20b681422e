"""Several runs in one command: the table, resuming, failing, and bad flags."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from cofi_jax.config import Config
from cofi_jax.data import toy
from cofi_jax.report import pages
from cofi_jax.run import run as run_lib
from cofi_jax.run import stages, sweep

ROOT = pathlib.Path(__file__).parents[1]


# The table, from hand-made reports


def report(score, sparsity=0.95, heads=(2, 0, 1), ffn=(8, 0, 0), hidden=12, speedup=4):
    return {
        "task": "demo",
        "seed": 1,
        "target_sparsity": 0.95,
        "speedup_spread": [speedup, speedup],
        "benchmark": {
            "device": "cpu",
            "dtype": "float32",
            "batch_size": 32,
            "seq_length": 64,
        },
        "metric": "accuracy",
        "teacher": {"score": 0.9},
        "pruned": {"score": score},
        "sparsity": sparsity,
        "params": {"encoder": {"dense": 20_000, "pruned": 1_000}},
        "dense": {"heads": [4, 4, 4], "intermediate": [16] * 3, "hidden": 16},
        "kept": {"heads": heads, "intermediate": ffn, "hidden": hidden},
        "speedup": speedup,
    }


def members(*names, task="demo", seeds=(1, 2, 3)):
    found = []
    for name in names:
        for seed in seeds:
            config = Config(seed=seed)
            config.data.task = task
            folder = pathlib.Path("runs") / f"{name}-seed{seed}"
            found.append(sweep.Member(name, config, folder))
    return found


def table(content):
    """The cells of `table.md` by heading, and what stands below the table."""
    text = sweep.markdown(content)
    grid, _, below = text.partition("\n\n")
    assert len(set(map(len, grid.splitlines()))) == 1  # it lines up on a terminal
    lines = [line.strip("|").split("|") for line in grid.splitlines()]
    lines = [[cell.strip() for cell in line] for line in lines]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert all(re.fullmatch("--+[-:]", cell) for cell in lines[1])
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]], below


def test_means_and_deviations_are_those_of_a_hand():
    group = members("demo")
    reports = [
        report(0.80, speedup=4.0, heads=(2, 0, 1), hidden=12),
        report(0.82, speedup=5.0, heads=(2, 0, 0), hidden=14),
        report(0.87, speedup=9.0, heads=(4, 4, 0), hidden=16, sparsity=0.953),
    ]
    content = sweep.summary(
        group, {m.workdir: r for m, r in zip(group, reports, strict=True)}
    )
    (row,) = content["rows"]
    # Mean 0.83; deviations -0.03, -0.01, 0.04: squares sum to 0.0026, over 2.
    assert row["score"]["mean"] == pytest.approx(0.83)
    assert row["score"]["sd"] == pytest.approx(0.0013**0.5)
    assert row["score"]["values"] == [0.80, 0.82, 0.87]
    assert row["speedup"]["mean"] == pytest.approx(6)
    assert row["speedup"]["sd"] == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert row["paper"] is None
    assert [m["state"] for m in content["members"]] == ["finished"] * 3
    assert [m["seed"] for m in content["members"]] == [1, 2, 3]
    (cells,), below = table(content)
    assert cells == {
        "config": "demo",
        "seeds": "3",
        "metric": "accuracy",
        "teacher": "0.9000",
        "score": "0.8300",
        "sd": "0.0361",
        "paper: score": "-",
        "sparsity": "0.9510",
        "encoder parameters": "1,000",
        "attention blocks": "1.667 of 3",
        "feed-forward blocks": "1 of 3",
        "hidden width": "14",
        "speedup": "6.00",
        "speedup sd": "2.65",
        "paper: speedup": "-",
    }
    assert "not measured here" in below


def test_one_seed_has_no_deviation_and_some_are_missing():
    group = members("a", "b", "c")
    outcomes = {
        group[0].workdir: report(0.5),
        group[1].workdir: "data.path='x': no such folder",
        group[3].workdir: "data.path='y': no such folder",
    }
    content = sweep.summary(group, outcomes)
    (a, b, c), below = table(content)
    assert a["seeds"] == "1, 1 failed, 1 waiting"
    assert (a["score"], a["sd"], a["speedup sd"]) == ("0.5000", "-", "-")
    assert b["seeds"] == "0, 1 failed, 2 waiting"
    assert c["seeds"] == "0, 3 waiting"
    assert {b[key] for key in b} - {"b", b["seeds"]} == {"-"}
    assert "- a-seed2: failed, data.path='x': no such folder" in below
    assert "- b-seed1: failed, data.path='y'" in below
    states = [m["state"] for m in content["members"]]
    assert states == ["finished", "failed", "waiting", "failed", *["waiting"] * 5]
    assert json.loads(json.dumps(content)) == content


def test_papers_figures_stand_beside_and_name_their_source():
    group = members("short-mnli-0.95", task="mnli", seeds=(1,))
    (cells,), below = table(sweep.summary(group, {group[0].workdir: report(0.7)}))
    assert (cells["paper: score"], cells["paper: speedup"]) == ("0.806", "12.1")
    assert "- paper, short-mnli-0.95: table 1" in below


# The whole program on tiny runs

TINY = """
from configs import demo


def get_config(argument):
    config = demo.get_config()
    config.model.num_layers = 1
    config.model.num_heads = 2
    config.model.hidden_size = 8
    config.model.intermediate_size = 8
    for stage in (config.teacher, config.prune, config.finetune):
        stage.train_rows = 64
        stage.batch_size = 16
    config.teacher.epochs = 1
    config.prune.epochs = 2
    config.prune.prepruning_epochs = 0
    config.prune.warmup_epochs = 1
    config.prune.mask_learning_rate = 2.0
    config.prune.targets = (0.5,)
    config.distill.layers = 0.0
    config.finetune.epochs = 1
    config.benchmark.repeats = 2
    if argument == "lost":
        config.teacher.path = "./no-such-folder"
    return config
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, quick_compile, without_pictures):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy.SIZES, "train", 100)
        patch.setitem(toy.SIZES, "validation", 20)
        yield path


def tree(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_killed_sweep_goes_on_and_failed_members_are_said(tiny, tmp_path, capsys):
    top = tmp_path / "runs" / "ablation"
    plain = f"--config={tiny}:plain"
    flags = ["--seeds=1,2", f"--workdir={top}", "--config.eval_batch_size", "20"]
    whole = ["sweep.py", plain, "--config", f"{tiny}:lost", *flags]

    prepare, calls = stages.preprune, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prepare(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "preprune", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep.main(whole)
    rows, _ = table(json.loads((top / "sweep.json").read_text()))
    assert [row["seeds"] for row in rows] == ["1, 1 waiting", "0, 2 waiting"]
    first = tree(top / "tiny-plain-seed1")
    broken = top / "tiny-plain-seed2"
    teacher = tree(broken / "teacher")
    assert teacher and not (broken / "report.json").exists()

    capsys.readouterr()
    assert sweep.main(whole) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [e.split(":")[1] for e in errors] == [" tiny-lost-seed1", " tiny-lost-seed2"]
    assert "teacher.path='./no-such-folder'" in errors[0]
    assert tree(top / "tiny-plain-seed1") == first
    assert tree(broken / "teacher") == teacher  # not trained again
    assert not (top / "tiny-lost-seed1").exists()
    text = (top / "table.md").read_text()
    assert text in out
    content = json.loads((top / "sweep.json").read_text())
    assert text == sweep.markdown(content)
    rows, below = table(content)
    assert [row["seeds"] for row in rows] == ["2", "0, 2 failed"]
    assert "- tiny-lost-seed2: failed, teacher.path=" in below

    reports = []
    for seed in (1, 2):
        folder = top / f"tiny-plain-seed{seed}"
        config = json.loads((folder / "config.json").read_text())
        assert (config["seed"], config["eval_batch_size"]) == (seed, 20)
        reports.append(json.loads((folder / "report.json").read_text()))
    row = content["rows"][0]
    assert row["score"]["values"] == [r["pruned"]["score"] for r in reports]
    assert row["sparsity"]["values"] == [r["sparsity"] for r in reports]

    before = tree(top)
    assert sweep.main(["sweep.py", plain, *flags]) == 0
    after = tree(top)
    changed = {path for path in after if before.get(path) != after[path]}
    written = ("table.md", "sweep.json", "compare.html")
    written += ("tradeoff.png", "structures.png")
    assert changed == {top / name for name in written}


def test_members_share_what_was_compiled(tiny, tmp_path, monkeypatch):
    seen = []

    def run(config, workdir):
        seen.append(jax.config.jax_compilation_cache_dir)
        return report(0.5)

    monkeypatch.setattr(run_lib, "run", run)
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    command = ["sweep.py", f"--config={tiny}:plain", "--seeds=1,2", "--workdir=top"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert sweep.main(command) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    (folder,) = set(seen)
    assert pathlib.Path(folder).parent == tmp_path / "top"


def test_pictures_of_others_stop_a_sweep_before_its_first_member(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run_lib, "run", None)
    (tmp_path / "tradeoff.png").write_text("mine")
    command = ["sweep.py", f"--config={tiny}:plain", f"--workdir={tmp_path}"]
    assert sweep.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --workdir=") and "has a tradeoff.png" in line
    assert [path.name for path in tmp_path.iterdir()] == ["tradeoff.png"]


@pytest.mark.parametrize("error", [KeyError("x"), OSError(28, "No space left")])
def test_a_page_that_fails_does_not_end_a_sweep(
    error, tiny, tmp_path, monkeypatch, capsys
):
    def compare_page(runs):
        raise error

    monkeypatch.setattr(run_lib, "run", lambda *_: report(0.5))
    monkeypatch.setattr(pages, "compare_page", compare_page)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    command = ["sweep.py", f"--config={tiny}:plain", f"--workdir={tmp_path / 'top'}"]
    assert sweep.main(command) == 0
    out, err = capsys.readouterr()
    assert "warning: no compare.html" in err and "--to" not in err
    assert "| tiny-plain |" in out and out.endswith(": table.md, sweep.json\n")


# What a user gets wrong: one line, exit status 2, nothing written

BAD = {
    "no config": (["--seeds=1"], ["--config", "usage: python -m cofi_jax.sweep"]),
    "no workdir": (["--config={tiny}:plain", None], ["--workdir", "usage"]),
    "no such file": (["--config={tiny}:plain", "--config=no.py"], ["'no.py'"]),
    "argument": (["--config=configs/paper.py:sst2,0.9,foo"], ["ablation='foo'"]),
    "not a seed": (["--config={tiny}:plain", "--seeds=1,x"], ["--seeds='1,x'"]),
    "no seed": (["--config={tiny}:plain", "--seeds="], ["--seeds=''", "whole numbers"]),
    "seed twice": (["--config={tiny}:plain", "--seeds=1,1"], ["--seeds", "twice"]),
    "seed overridden": (
        ["--config={tiny}:plain", "--config.seed=3"],
        ["--config.seed", "--seeds"],
    ),
    "seed too large": (["--config={tiny}:plain", "--seeds=2147483648"], ["2**31"]),
    "config twice": (
        ["--config={tiny}:plain", "--config={tiny}:plain"],
        ["tiny-plain", "share a folder"],
    ),
    "flag": (["--config={tiny}:plain", "--target=0.9"], ["'--target=0.9'", "usage"]),
    "abbreviated": (["--config={tiny}:plain", "--seed=1"], ["'--seed=1'", "usage"]),
    "stray": (["--config={tiny}:plain", "0.9"], ["'0.9'"]),
    "field": (["--config={tiny}:plain", "--config.foo=1"], ["config.foo='1'"]),
    "value": (
        ["--config={tiny}:plain", "--config.prune.targets=2"],
        ["prune.targets=", "[0, 1)"],
    ),
    "task": (["--config={tiny}:plain", "--config.data.task=x"], ["data.task='x'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, tiny, tmp_path, capsys):
    flags, fragments = BAD[case]
    command = ["sweep.py", *(f.format(tiny=tiny) for f in flags if f)]
    if None not in flags:
        command.append(f"--workdir={tmp_path / 'top'}")
    assert sweep.main(command) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    for fragment in fragments:
        assert fragment in line
    assert not (tmp_path / "top").exists()
    assert out == ""


def test_folders_that_are_something_else(tiny, tmp_path, capsys):
    command = ["sweep.py", f"--config={tiny}:plain", "--seeds=1"]
    (tmp_path / "file").write_text("x")
    assert sweep.main([*command, f"--workdir={tmp_path / 'file'}"]) == 2
    assert "must be a folder that can be written" in capsys.readouterr().err
    member = tmp_path / "top" / "tiny-plain-seed1"
    member.mkdir(parents=True)
    (member / "notes.txt").write_text("not a run")
    assert sweep.main([*command, f"--workdir={tmp_path / 'top'}"]) == 2
    assert "must be a new or a run's folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "top").iterdir()] == [member.name]


def test_process_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "cofi_jax.sweep", "--config", "configs/demo.py"]
    command += ["--workdir", str(tmp_path / "top"), "--seeds", "-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def test_a_member_that_breaks_does_not_end_the_sweep(tmp_path, monkeypatch, capsys):
    def run(config, workdir):
        if config.seed == 1:
            raise RuntimeError("out of memory\nat all")
        return report(0.8)

    monkeypatch.setattr(run_lib, "run", run)
    found = [
        sweep.Member("demo", Config(seed=seed), tmp_path / f"demo-seed{seed}")
        for seed in (1, 2)
    ]
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    content, written = sweep.run(found, tmp_path)
    assert written == ["table.md", "sweep.json", "compare.html"]
    assert [m["state"] for m in content["members"]] == ["failed", "finished"]
    assert content["members"][0]["error"] == "RuntimeError: out of memory at all"
    assert "Traceback" in capsys.readouterr().err
    assert "1, 1 failed" in (tmp_path / "table.md").read_text()
