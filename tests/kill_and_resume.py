"""Kills a run at random moments, restarts it, and compares with an undisturbed one.

python tests/kill_and_resume.py --config configs/demo.py --kills 20
"""

import argparse
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from cofi_jax import load_model

ROOT = pathlib.Path(__file__).parents[1]


def start(config, workdir, log):
    command = [sys.executable, "train.py", "--config", config, "--workdir", workdir]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
    )


def logged(workdir):
    """(stage, step) of each line that is whole, in order."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        found.append((values["stage"], values["step"]))
    return found


def as_before(stage, whole, workdir):
    """Copies a finished run without the results of a stage and of all that follow."""
    stages = list(dict.fromkeys(name for name, _ in logged(whole)))
    undone = stages[stages.index(stage) :]
    suffixes = {name.partition("-")[1] + name.partition("-")[2] for name in undone}
    names = [f"checkpoints/{name}" for name in undone]
    names += [f"{name}{suffix}" for suffix in suffixes for name in ("pruned", "masks")]
    shutil.copytree(whole, workdir)
    for path in [path for name in names for path in workdir.glob(f"{name}*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (workdir / "report.json").unlink()
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(x for x in lines if json.loads(x)["stage"] not in undone))


def moments_of(workdir, kills, rng):
    """Random moments of a finished run, in its order; each stage has some."""
    lines = list(dict.fromkeys(logged(workdir)))
    stages = list(dict.fromkeys(stage for stage, _ in lines))
    per_stage = [[p for p in lines if p[0] == stage] for stage in stages]
    moments = [rng.choice(per_stage[i % len(stages)]) for i in range(kills)]
    return sorted(moments, key=lines.index)


def run_with_kills(config, workdir, moments, rng, log):
    """Kills the run each time it has come to the next moment, and a little more."""
    for moment in moments:
        process = start(config, workdir, log)
        while process.poll() is None and moment not in logged(workdir):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(config, workdir, log).wait() == 0


def differing(one, other):
    """Names of the parameters of two saved models that are not bit-identical."""
    first, second = (load_model(path)[1] for path in (one, other))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(first),
        jax.tree.leaves(second),
        strict=True,
    )
    return [
        jax.tree_util.keystr(path)
        for (path, a), b in leaves
        if np.asarray(a).tobytes() != np.asarray(b).tobytes()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as top, open(f"{top}/log", "w") as log:
        rng = random.Random(args.seed)
        whole, pieces = f"{top}/whole", f"{top}/pieces"
        assert start(args.config, whole, log).wait() == 0, open(f"{top}/log").read()
        moments = moments_of(whole, args.kills, rng)
        run_with_kills(args.config, pieces, moments, rng, log)
        print("killed at", *(f"{stage} {n}" for stage, n in moments), sep="\n  ")
        for path in sorted(pathlib.Path(whole).glob("*/params")):
            model = path.parent.name
            names = differing(f"{whole}/{model}", f"{pieces}/{model}")
            print(f"{model}:", f"DIFFERS in {names}" if names else "bit-identical")


if __name__ == "__main__":
    main()
