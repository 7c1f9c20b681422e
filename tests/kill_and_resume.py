"""Kills a run at random moments, restarts it, and compares with an undisturbed one.

python tests/kill_and_resume.py --config configs/demo.py --kills 20
"""

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from cofi_jax import load_model

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ("teacher", "prepruning", "prune", "finetune")


def start(config, workdir, log):
    command = [sys.executable, "train.py", "--config", config, "--workdir", workdir]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
    )


def position(workdir):
    """The last logged (stage, step); ("", 0) before the first line."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    for line in reversed(path.read_text().splitlines() if path.exists() else []):
        try:
            found = json.loads(line)
            return found["stage"], found["step"]
        except ValueError:
            continue
    return "", 0


def run_with_kills(config, workdir, kills, rng, delay, log):
    """Restarts until the run ends; where each kill fell.

    A kill comes `rng.uniform(*delay)` seconds after the process started to log new
    lines, so that every start makes some progress.
    """
    killed_at = []
    while True:
        before = position(workdir)
        process = start(config, workdir, log)
        if len(killed_at) == kills:
            assert process.wait() == 0
            return killed_at
        while process.poll() is None and position(workdir) == before:
            time.sleep(0.02)
        try:
            status = process.wait(rng.uniform(*delay))
            assert status == 0, f"exit status {status}"
            return killed_at
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed_at.append(position(workdir))


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
    parser.add_argument("--delay", type=float, nargs=2, default=(0, 6))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as top, open(f"{top}/log", "w") as log:
        rng = random.Random(args.seed)
        whole, pieces = f"{top}/whole", f"{top}/pieces"
        assert start(args.config, whole, log).wait() == 0, open(f"{top}/log").read()
        killed_at = run_with_kills(
            args.config, pieces, args.kills, rng, args.delay, log
        )
        print(f"killed {len(killed_at)} times, at", *killed_at, sep="\n  ")
        for stage in STAGES:
            print(f"{stage}: {sum(where == stage for where, _ in killed_at)} kills")
        for model in ("teacher", "pruned"):
            names = differing(f"{whole}/{model}", f"{pieces}/{model}")
            print(f"{model}:", f"DIFFERS in {names}" if names else "bit-identical")


if __name__ == "__main__":
    main()
