"""The embedded default as a user runs it; minutes long, so only run when asked for.

python -m pytest -m slow
"""

import json

import pytest

import train


@pytest.mark.slow
def test_demo_keeps_its_promises(tmp_path):
    argv = ["train.py", "--config", "configs/demo.py", "--workdir", str(tmp_path / "d")]
    assert train.main(argv) == 0
    result = json.loads((tmp_path / "d" / "report.json").read_text())
    assert result["teacher"]["score"] >= 0.95
    assert result["pruned"]["score"] >= result["teacher"]["score"] - 0.03
    assert result["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert result["masked_vs_sliced_max_abs_diff"] <= 1e-4
    assert result["speedup"] >= 3
