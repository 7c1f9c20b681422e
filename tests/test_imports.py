"""The architecture of the design, read off the source."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = {f.stem: f for f in (ROOT / "cofi_jax").glob("*.py") if f.stem != "__init__"}
FILES = PACKAGE | {name: ROOT / f"{name}.py" for name in ("train", "eval", "sweep")}
LONGEST = 310  # lines; a file past about 300 is asking to be two

# Who may import it, at the top or inside a function.
ONLY = {
    "absl": {"train", "eval"},
    "ml_collections": {"train"},
    "orbax": {"checkpoint"},
    "datasets": {"rows"},
    "pyarrow": {"rows"},
    "huggingface_hub": {"pretrained"},
    "safetensors": {"pretrained", "to_stock", "to_transformers"},
    "transformers": {
        "pretrained",
        "grammar",
        "rivals",
        "to_stock",
        "to_transformers",
    },
    "sklearn": {"metrics"},
    "scipy": {"metrics"},
    "matplotlib": {"compare", "plots"},
    "pickle": set(),
    "torch": {"pretrained", "rivals", "to_stock", "to_transformers"},
    "onnx": {"to_onnx"},
    "onnxruntime": {"to_onnx"},
    "tensorboardX": {"events"},
}


def imports(path):
    """(module, name) of each import; of `import x.y`, (x.y, None)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def of_project(path):
    """The modules of cofi_jax that a file imports, with the names it takes."""
    found = {}
    for module, name in imports(path):
        if module == "cofi_jax" and name in PACKAGE:
            found.setdefault(name, set())
        elif module.startswith("cofi_jax."):
            found.setdefault(module.split(".")[1], set()).add(name)
    return found


@pytest.mark.parametrize(
    "name", ["hard_concrete", "metrics", "config", "sizes", "pointwise", "skip"]
)
def test_stands_alone(name):
    assert not of_project(PACKAGE[name])


@pytest.mark.parametrize("name", ["masks", "sparsity", "slicing"])
def test_knows_of_the_model_only_its_config(name):
    found = of_project(PACKAGE[name])
    assert found.pop("model", set()) <= {"EncoderConfig"}
    assert set(found) <= {"config", "hard_concrete", "masks"}


def test_model_knows_nothing_of_masks():
    assert set(of_project(PACKAGE["model"])) <= {
        "config",
        "sizes",
        "pointwise",
        "skip",
    }


def test_libraries_stay_where_they_belong():
    users = {library: set() for library in ONLY}
    for name, path in FILES.items():
        for module, _ in imports(path):
            users.get(module.split(".")[0], set()).add(name)
    assert users == ONLY


def test_no_cycles():
    graph = {name: set(of_project(path)) for name, path in PACKAGE.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_file_is_long():
    long = {n: len(p.read_text().splitlines()) for n, p in PACKAGE.items()}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST}
