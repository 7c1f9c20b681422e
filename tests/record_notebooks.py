"""Runs the notebooks and keeps their outputs in them.

    python tests/record_notebooks.py

They run in a temporary copy, one after another as their numbers say, so the runs of
the checkout are neither used nor changed. A digest of the code is kept, too: it tells
whether a cell was changed after it was run. Text may be.
"""

import hashlib
import os
import pathlib
import shutil
import tempfile

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def copy(folder):
    """A checkout to run notebooks in, which shares this one's code."""
    for name in ("cofi_jax", "configs", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "notebooks").mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, folder / "notebooks")


def execute(path, start):
    """The notebook at `path`, run by this Python from the folder `start`.

    Raises:
      CellExecutionError: where a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    # Kernels that are installed for the user may be of another Python.
    specs = KernelSpecManager(kernel_dirs=[])
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    environment = os.environ | {
        "IPYTHONDIR": str(start / ".ipython"),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # of bars that are not shown
    }
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=1800,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(start)}},
    )
    return client.execute(env=environment, cleanup_kc=True)  # ends the kernel


def digest(notebook):
    """Of the code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    sources = "\0".join(code)
    return hashlib.sha256(sources.encode()).hexdigest()


def noise(notebook):
    """What cells wrote to stderr, progress bars left out."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                lines = output.text.replace("\r", "\n").splitlines()
                yield from (line for line in lines if line and "step" not in line)


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        copy(folder)
        for path in NOTEBOOKS:
            print(path.name, flush=True)
            notebook = execute(folder / "notebooks" / path.name, folder)
            if lines := list(noise(notebook)):
                raise SystemExit(f"{path.name}: {lines}")
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs = [
                        o for o in cell.outputs if o.get("name") != "stderr"
                    ]
            notebook.metadata["digest"] = digest(notebook)
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
