"""The package is built of wings, and each imports only from those before it."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "cofi_jax"
# Some are single modules. Each may import whatever stands before it here, which also
# rules out cycles between wings.
ORDER = (
    *("errors", "files", "commands", "distributed", "models", "config", "pruning"),
    *("data", "training", "checkpoints", "evaluation", "report", "export"),
    *("run", "sweep", "benchmarks"),
)


def modules():
    """Yields the wing, the dotted name and the imported names of each module."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",) or "hub_code" in parts:  # the public names; exported
            continue
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        yield parts[0], ".".join(parts), found


def test_each_wing_imports_only_from_those_before_it():
    for wing, name, imported in modules():
        for other in imported:
            if (
                other.startswith("cofi_jax.")
                and (target := other.split(".")[1]) in ORDER
            ):
                assert ORDER.index(target) <= ORDER.index(wing), f"{name}: {other}"


def test_orbax_stays_in_the_checkpoints_wing_and_pickle_out():
    for wing, name, imported in modules():
        libraries = {other.split(".")[0] for other in imported}
        assert "orbax" not in libraries or wing == "checkpoints", name
        assert "pickle" not in libraries, name
