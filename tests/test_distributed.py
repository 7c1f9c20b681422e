"""Several devices and several processes do what one does."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pruning_steps
import pytest
from kill_and_resume import as_before, differing, logged

import train
from cofi_jax import load_model
from cofi_jax.config import Config
from cofi_jax.errors import UserError
from cofi_jax.run import setup
from cofi_jax.training import log

ROOT = pathlib.Path(__file__).parents[1]


TINY = """
from configs import demo


def get_config():
    config = demo.get_config()
    config.model.num_layers = 1
    config.model.num_heads = 2
    config.model.hidden_size = 16
    config.model.intermediate_size = 32
    config.teacher.train_rows = 320
    config.teacher.epochs = 1
    config.prune.train_rows = 320
    config.prune.epochs = 5
    config.prune.prepruning_epochs = 0
    config.prune.kinds = ("head", "mha", "intermediate", "ffn")
    config.prune.constraint = "exact"
    config.prune.seeds = "compensated"
    config.prune.seed_batches = config.prune.reconstruction_batches = 2
    config.prune.targets = (0.6,)
    config.finetune.train_rows = 320
    config.finetune.epochs = 1
    config.benchmark.repeats = 3
    config.log_every = 5
    config.eval_every = 10
    config.checkpoint_every = 10
    return config
"""


pytestmark = pytest.mark.usefixtures("quick_compile")


# Two devices of one process


@pytest.fixture(scope="module")
def steps(tmp_path_factory, quick_compile):
    """What pruning came to: on one device, on two, and begun on the other number."""
    top = tmp_path_factory.mktemp("steps")
    one = pruning_steps.learn(top / "one")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    command = [sys.executable, "tests/pruning_steps.py", top / "two", top / "one"]
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return {
        "one": one,
        "two": np.load(top / "two" / "end.npz"),
        "one, then two": np.load(top / "two" / "resumed.npz"),
        "two, then one": pruning_steps.resume(top / "two" / "run", top / "back"),
    }


@pytest.mark.parametrize("how", ["two", "one, then two", "two, then one"])
def test_two_devices_prune_like_one(steps, how):
    one, other = steps["one"], steps[how]
    assert set(one) == set(other)
    kinds = {"params", "log_alpha", "multipliers", "distill_projection", "gates"}
    assert kinds <= {name.split("'")[1] for name in one}
    for name in one:
        # A softmax does not see the bias of the keys: its gradient is rounding alone,
        # which Adam blows up to whole steps.
        if "'key']['bias']" not in name:
            np.testing.assert_allclose(other[name], one[name], atol=1e-5, err_msg=name)


def test_every_kind_has_moved(steps):
    """Else the comparison would be of constants."""
    one = steps["one"]
    assert abs(one["['multipliers']['linear']"]) > 0.1
    assert np.ptp(one["['log_alpha']['head']"]) > 0.1
    for seeds in ("importance", "compensated"):
        assert np.ptp(one[f"['{seeds}']['intermediate']"]) > 0.1


# Two processes


def start_two(*commands, out):
    """Starts Python twice; what they print goes to `out` and a number."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    processes = []
    for index, command in enumerate(commands):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            # Under it transformers logs through the root logger, which others set up.
            "CI": "true",
        }
        with open(f"{out}{index}", "w") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    return processes


def wait(processes):
    """Their exit statuses; that they end at all is part of the tests."""
    try:
        return [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()


def train_two(config, workdir, *, flags=((), ())):
    command = ["train.py", "--distributed", "--config", config, "--workdir", workdir]
    commands = ([*command, *some] for some in flags)
    return start_two(*commands, out=f"{workdir}.out")


def said(out, index):
    """What a process printed, but for what a library prints beneath Python."""
    lines = pathlib.Path(f"{out}{index}").read_text().splitlines()
    return [line for line in lines if not line.startswith("[Gloo]")]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory, quick_compile):
    workdir = tmp_path_factory.mktemp("two") / "run"
    assert wait(train_two(config_file, workdir)) == [0, 0]
    return workdir


@pytest.fixture(scope="module")
def killed(config_file, finished, tmp_path_factory, quick_compile):
    """The folder of two processes that were killed while they pruned."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    as_before("prune", finished, workdir)
    processes = train_two(config_file, workdir)
    saved = workdir / "checkpoints" / "prune" / "10"
    while not (saved.exists() and ("prune", 15) in logged(workdir)):
        assert processes[0].poll() is None
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    wait(processes)
    return workdir


def test_only_the_first_process_speaks_and_writes(finished):
    assert any("accuracy" in line for line in said(f"{finished}.out", 0))
    other = said(f"{finished}.out", 1)
    assert other == ["waiting for all processes to start"]
    lines = log.read_metrics(finished / "metrics.jsonl")
    steps = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    starts = {(stage, 0) for stage in ("teacher", "finetune")}
    assert starts < set(logged(finished))  # scored, but not trained
    assert len(steps) == len(set(steps)) == len(set(logged(finished)) - starts)
    assert {"teacher", "pruned", "report.json"} <= {p.name for p in finished.iterdir()}


def test_killed_processes_end_with_the_same_bits(finished, killed, config_file):
    pieces = shutil.copytree(killed, killed.with_name("again"))
    assert wait(train_two(config_file, pieces)) == [0, 0]
    for model in ("teacher", "pruned"):
        assert not differing(finished / model, pieces / model)
    names = {path.name for path in pieces.iterdir()}
    assert names == {path.name for path in finished.iterdir()}
    assert not [path for path in pieces.rglob("*") if "damaged" in path.name]


@pytest.mark.slow
def test_one_process_goes_on_and_learns_the_same(finished, killed, config_file):
    alone = shutil.copytree(killed, killed.with_name("alone"))
    argv = ["train.py", "--config", str(config_file), "--workdir", str(alone)]
    assert train.main(argv) == 0
    for name in ("teacher", "pruned"):
        model, params, spec = load_model(finished / name)
        same_model, same_params, same_spec = load_model(alone / name)
        assert model.config == same_model.config and spec == same_spec
        for two, one in zip(*map(jax.tree.leaves, (params, same_params)), strict=True):
            np.testing.assert_allclose(two, one, atol=1e-5)
    two, one = (
        json.loads((path / "report.json").read_text()) for path in (finished, alone)
    )
    for field in ("sparsity", "kept", "teacher", "params"):
        assert two[field] == one[field]


def test_processes_of_two_configs(config_file, tmp_path):
    flags = ((), ("--config.seed=1",))
    assert wait(train_two(config_file, tmp_path / "run", flags=flags)) == [2, 2]
    line = "error: --distributed=True: the config must be the same in all processes"
    assert said(tmp_path / "run.out", 0)[-1] == line
    assert not (tmp_path / "run").exists()


TOGETHER = """
import jax
import numpy as np

from cofi_jax import distributed
from cofi_jax.errors import UserError

distributed.start()
me = jax.process_index()


def refused(function):
    try:
        function()
    except (UserError, RuntimeError) as error:
        return str(error)


def reject(text):
    raise UserError(text)


def check():
    with distributed.raise_together():
        if me == 1:
            reject("of the second")


assert refused(check) == "of the second"
assert distributed.on_process_zero(lambda: [me, "a" * 3000]) == [0, "a" * 3000]
fails = lambda: reject(f"of {me}")  # noqa: E731
assert refused(lambda: distributed.on_process_zero(fails)) == "of 0"
with distributed.raise_together():
    pass
distributed.check_same("this", lambda: 1)
legal = "--distributed=True: that must be the same in all processes"
assert refused(lambda: distributed.check_same("that", lambda: me)) == legal

batch = {"x": np.arange(12).reshape(4, 3), "y": np.arange(4)}
batch = jax.tree.map(np.float32, batch)
there = distributed.shard(batch)
mine = there["x"].addressable_shards
assert [shard.data.shape for shard in mine] == [(2, 3)]
np.testing.assert_array_equal(mine[0].data, batch["x"][2 * me : 2 * me + 2])
jax.tree.map(np.testing.assert_array_equal, distributed.fetch(there), batch)
state = {"key": jax.random.key(3), "x": batch["x"], "scalar": np.float32(2)}
everywhere = distributed.replicate(state)
assert distributed.digest(everywhere) == distributed.digest(state)
again = distributed.replicate(everywhere)
assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (again, everywhere))))
assert distributed.digest(distributed.local(everywhere)) == distributed.digest(state)
assert "processes disagree" in refused(lambda: distributed.replicate(np.array(me)))
"""


def test_what_processes_tell_each_other(tmp_path):
    processes = start_two(*[["-c", TOGETHER]] * 2, out=tmp_path / "out")
    assert wait(processes) == [0, 0], (tmp_path / "out0").read_text()


@pytest.mark.parametrize(
    "victim, end", [(0, "os.kill(os.getpid(), 9)"), (1, "raise ValueError('this')")]
)
def test_one_that_dies_ends_the_other(victim, end, tmp_path):
    program = f"""
import jax, os
from cofi_jax import distributed

distributed.start()
with distributed.only_process_zero_prints():
    distributed.on_process_zero(lambda: 1)
    if jax.process_index() == {victim}:
        {end}
    distributed.on_process_zero(lambda: 2)
"""
    statuses = wait(start_two(*[["-c", program]] * 2, out=tmp_path / "out"))
    assert 0 not in statuses
    if "raise" in end:
        assert "ValueError: this" in said(tmp_path / "out", victim)


# What is wrong with a command


@pytest.mark.parametrize("stage", ["teacher", "prune", "finetune", None])
def test_batches_that_cannot_be_dealt_out(stage, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    config, field = Config(eval_batch_size=66), "eval_batch_size"
    for part in (config.teacher, config.prune, config.finetune):
        part.batch_size = 66
    setup.check_batch_sizes(config)
    if stage:
        field = f"{stage}.batch_size"
        getattr(config, stage).batch_size = 32
    else:
        config.eval_batch_size = 32
    legal = "=32: must be a multiple of 3, the number of devices$"
    with pytest.raises(UserError, match=field + legal):
        setup.check_batch_sizes(config)


def test_parts_of_batches_that_cannot_be_dealt_out(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    config = Config()
    config.prune.micro_batches = 8
    setup.check_batch_sizes(config)
    config.prune.micro_batches = 16
    legal = "must be a multiple of 64, the number of devices times micro_batches"
    with pytest.raises(UserError, match=f"prune.batch_size=32: {legal}"):
        setup.check_batch_sizes(config)


def test_such_batches_leave_nothing_behind(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    argv = ["train.py", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    assert train.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: teacher.batch_size=64: must be a multiple of 3")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, value, legal",
    [
        ("JAX_COORDINATOR_ADDRESS", "here", "must be host:port"),
        ("JAX_COORDINATOR_ADDRESS", "1234", "must be host:port"),
        ("JAX_COORDINATOR_ADDRESS", "", "must be host:port"),
        ("JAX_NUM_PROCESSES", "two", "must be a whole number"),
        ("JAX_PROCESS_ID", "-1", "must be a whole number"),
    ],
)
def test_an_environment_that_makes_no_sense(name, value, legal, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert train.main(["train.py", "--config=configs/demo.py", "--distributed"]) == 2
    assert capsys.readouterr().err == f"error: {name}={value!r}: {legal}\n"


def test_an_environment_that_says_nothing(tmp_path):
    left_out = "JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID".split()
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    command = ["train.py", "--config=configs/demo.py", "--distributed"]
    done = subprocess.run(
        [sys.executable, *command, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: --distributed=True: needs SLURM, MPI or")
    assert "JAX_COORDINATOR_ADDRESS=host:port" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--distributed=perhaps", "--distributed=2"])
def test_a_flag_that_makes_no_sense(flag, capsys):
    assert train.main(["train.py", "--config=configs/demo.py", flag]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "distributed" in error and "usage" in error
