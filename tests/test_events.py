"""Event files hold the lines of the log, and after a rewind none of them twice."""

import struct
import sys

import pytest

from cofi_jax.errors import UserError
from cofi_jax.training import log as log_lib

pytest.importorskip("tensorboardX")


def records(path):
    """The events of a file: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def curves(folder):
    """{tag: [(step, value)]} as TensorBoard shows it: a start voids what was before."""
    from tensorboardX.proto.event_pb2 import SessionLog

    points = []
    for path in sorted(folder.iterdir()):
        for event in records(path):
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[1] < event.step]
            points += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    tags = {tag: [] for tag, *_ in points}
    for tag, *point in points:
        tags[tag].append(tuple(point))
    return tags


def expected(path):
    tags = {}
    for line in log_lib.read_metrics(path):
        for key in line.keys() - {"stage", "step"}:
            points = tags.setdefault(f"{line['stage']}/{key}", [])
            points.append((line["step"], pytest.approx(line[key])))
    return tags


def start(folder):
    mirror = log_lib.Events(folder / "tensorboard")
    return log_lib.MetricsLog(folder / "metrics.jsonl", mirror)


def test_every_number_of_a_line_is_a_point_at_once(tmp_path):
    log = start(tmp_path)
    for step in (1, 2):
        log.write(stage="teacher", step=step, loss=1 / step, rate=100 * step)
        assert curves(tmp_path / "tensorboard") == expected(log.path)  # still open
    log.write(stage="teacher", step=2, score=0.75)
    log.write(stage="prune", step=1, loss=3)
    shown = curves(tmp_path / "tensorboard")
    assert shown == expected(log.path)
    assert shown["teacher/score"] == [(2, 0.75)] and shown["prune/loss"] == [(1, 3.0)]


def test_rewound_steps_are_there_once(tmp_path):
    log = start(tmp_path)
    for stage in ("teacher", "prune"):
        log.rewind(stage, -1)  # as a new stage does
        for step in range(1, 9):
            log.write(stage=stage, step=step, loss=step)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # nothing was undone
    resumed = start(tmp_path)
    resumed.rewind("prune", 5)
    for step in range(6, 8):
        resumed.write(stage="prune", step=step, loss=step + 0.5)
    shown = curves(tmp_path / "tensorboard")
    assert shown == expected(resumed.path)
    steps = [1, 2, 3, 4, 5, 6.5, 7.5]
    assert [value for _, value in shown["prune/loss"]] == steps
    resumed.rewind("prune", 6)
    resumed.write(stage="prune", step=7, loss=0)
    assert curves(tmp_path / "tensorboard") == expected(resumed.path)


def test_a_finished_run_that_is_opened_again_writes_nothing(tmp_path):
    start(tmp_path).write(stage="teacher", step=1, loss=1)
    (path,) = (tmp_path / "tensorboard").iterdir()
    before = path.read_bytes()
    start(tmp_path).rewind("teacher", 1)
    assert [path] == list((tmp_path / "tensorboard").iterdir())
    assert path.read_bytes() == before


def test_other_files_are_left_alone(tmp_path):
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    log = start(tmp_path)
    log.write(stage="teacher", step=1, loss=1)
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(p.name[:19] for p in folder.iterdir()) == [
        "events.out.tfevents",
        "notes.txt",
    ]


def test_missing_library_is_said_in_one_line(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError) as caught:
        log_lib.check()
    assert str(caught.value).startswith("tensorboard=True: ")
    assert "pip install 'cofi-jax[tensorboard]'" in str(caught.value)
    assert "\n" not in str(caught.value)
