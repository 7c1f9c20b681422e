import doctest
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def test_snippet_runs_as_it_stands():
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert failed == 0
    assert tried >= 12
