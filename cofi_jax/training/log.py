"""The log of a run, as JSON lines and, where it is wanted, as TensorBoard events."""

import json
import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any

from cofi_jax.errors import reject
from cofi_jax.files import write_atomically


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`, without one that was cut off at the end.

    Raises:
      UserError: where another line is not what `MetricsLog` writes.
    """
    lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if not isinstance(values["stage"], str) or type(values["step"]) is not int:
                raise TypeError
            metrics.append(values)
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines) or line.endswith(b"\n"):
                legal = f"line {number} is damaged; remove it, or the file to log anew"
                raise reject("metrics.jsonl", str(path), legal) from error
    return metrics


class MetricsLog:
    """Appends to a `metrics.jsonl`, one JSON object on each line.

    Each line goes to the operating system at once, so a killed run loses at most the
    line that it was writing. The next run's `MetricsLog` removes a line that was cut.
    """

    def __init__(self, path: str | os.PathLike, mirror: Any = None):
        """Opens a new or an old log at `path`; `mirror` is an `Events` or None."""
        self.path, self._mirror = pathlib.Path(path), mirror
        self._rewrite(read_metrics(path) if self.path.exists() else [])

    def rewind(self, stage: str, step: int) -> float:
        """Forgets the lines of `stage` after `step`, from which the stage is resumed.

        The lines of `step` itself stay: a run logs a step before it saves the state. A
        stage that starts over passes -1.

        Returns:
          The seconds that the stage had taken at the last line that is left, or 0.
        """
        lines = [
            line
            for line in read_metrics(self.path)
            if line["stage"] != stage or line["step"] <= step
        ]
        self._rewrite(lines)
        return max(
            (line.get("seconds", 0.0) for line in lines if line["stage"] == stage),
            default=0.0,
        )

    def write(self, *, stage: str, step: int, **values: Any) -> None:
        """Adds a line, whose scalars may be Python's, NumPy's or JAX's."""
        line = _line({"stage": stage, "step": step} | values)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
        if self._mirror:
            self._mirror.write(json.loads(line))

    def _rewrite(self, metrics: Iterable[dict[str, Any]]) -> None:
        write_atomically(self.path, "".join(map(_line, metrics)))
        if self._mirror:
            self._mirror.rewrite(metrics)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, default=lambda scalar: scalar.item()) + "\n"


def check() -> None:
    """Raises UserError where tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        legal = "needs tensorboardX: pip install 'cofi-jax[tensorboard]'"
        raise reject("tensorboard", True, legal) from error


class Events:
    """The TensorBoard event files that mirror a `MetricsLog`.

    TensorBoard does not forget what it has read when a file changes or goes. So where
    lines were taken back, or a run is resumed, a new file begins, which declares all
    earlier points void (`purge_step=0`) and repeats the lines that remain.
    """

    def __init__(self, folder: str | os.PathLike):
        """Prepares a mirror in `folder`, which the first `write` creates."""
        check()
        self.folder = pathlib.Path(folder)
        self._lines: list[dict[str, Any]] = []
        self._writer: Any = None

    def rewrite(self, lines: Iterable[dict[str, Any]]) -> None:
        """Makes these the only lines, from the next `write` on."""
        lines = list(lines)
        if self._writer and lines != self._lines:
            self._writer.close()
            self._writer = None
        self._lines = lines

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line, which is on the disk when this returns."""
        self._lines.append(line)
        new = [line]
        if not self._writer:
            from tensorboardX import SummaryWriter

            # File names hold the second; the suffix tells two files of one apart.
            suffix = f".{time.time_ns()}"
            self._writer = SummaryWriter(
                str(self.folder), purge_step=0, filename_suffix=suffix
            )
            new = self._lines
        for each in new:
            for key in each.keys() - {"stage", "step"}:
                tag = f"{each['stage']}/{key}"
                self._writer.add_scalar(tag, float(each[key]), each["step"])
        self._writer.flush()
