"""The notebooks run, on a tiny model; and they are kept as they were run."""

import platform
import re

import nbformat
import pytest
from record_notebooks import NOTEBOOKS, copy, digest, execute, noise

NAMES = [path.stem for path in NOTEBOOKS]
MEGABYTE = 2**20
# Appended to the cell that is tagged "config".
TINY = """
config.model.num_layers = 3
config.model.num_heads = 2
config.model.hidden_size = 16
config.model.intermediate_size = 32
config.teacher.train_rows = 128
config.teacher.epochs = 1
config.prune.train_rows = 128
config.prune.epochs = 7
config.prune.prepruning_epochs = 0
config.prune.targets = (0.6,)
config.finetune.train_rows = 128
config.finetune.epochs = 1
config.benchmark.repeats = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compile):
    folder = tmp_path_factory.mktemp("checkout")
    copy(folder)
    changed = 0
    for path in (folder / "notebooks").iterdir():
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if "config" in cell.metadata.get("tags", ()):
                cell.source += TINY
                changed += 1
        nbformat.write(notebook, path)
    assert changed == 1
    return folder


def test_there_are_notebooks():
    assert [name[:2] for name in NAMES] == ["1_", "2_", "3_"]


@pytest.mark.parametrize(
    "path, start", list(zip(NOTEBOOKS, (".", "notebooks", "."), strict=True)), ids=NAMES
)
def test_runs_from_the_root_and_from_its_folder(path, start, folder):
    if path.name.startswith("3_"):  # a run that is not there is made
        (folder / "runs" / "notebook" / "report.json").unlink()
    result = execute(folder / "notebooks" / path.name, folder / start)
    kept = nbformat.read(path, as_version=4)
    for cell, run in zip(kept.cells, result.cells, strict=True):
        # What is kept is of the same sorts as what comes out now.
        assert sorts(cell) == sorts(run), cell.source


def sorts(cell):
    """stdout, or the types of what was shown; stderr left out."""
    found = [output for output in cell.get("outputs", ()) if not is_stderr(output)]
    return {",".join(sorted(o.get("data", {o.get("name"): 0}))) for o in found}


def is_stderr(output):
    return output.get("name") == "stderr"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_kept_outputs_are_those_of_the_kept_sources(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata["digest"] == digest(notebook), (
        "cells were changed: python tests/record_notebooks.py"
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not list(noise(notebook)) and not any(map(is_stderr, outputs))
    assert {"stream", "display_data", "execute_result"} >= {
        output.output_type for output in outputs
    }
    sizes = [
        len(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", ())
    ]
    assert sizes and len(outputs) >= 6
    assert path.stat().st_size < 0.4 * MEGABYTE


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebooks_tell_nothing_of_the_machine_they_ran_on(path):
    notebook = nbformat.read(path, as_version=4)
    texts = [
        text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        for text in (output.get("text", ""), *output.get("data", {}).values())
        if not re.fullmatch(r"[A-Za-z0-9+/=\s]{1000,}", text)  # a picture
    ]
    for text in texts:
        assert not re.search(r"/(home|root|tmp|usr|work|var|private|Users)\b", text)
        assert platform.node() not in text or len(platform.node()) < 4
        assert "\r" not in text and "\x1b" not in text
