"""tests/benchmark.py as the README names it, on one case, and what keeps steps fast."""

import json

import pytest
import torch
from conftest import ROOT, run_script

import common


@pytest.mark.slow
def test_a_quick_benchmark_writes_its_table_as_json(tmp_path):
    flags = ("--quick", "--only", "digits resnext", "--json", tmp_path / "figures.json")
    done = run_script(ROOT / "tests" / "benchmark.py", *flags, cwd=tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    names = ("gretta vanilla, digits resnext", "advaa M=8, digits resnext", "ANT, digits resnext")
    assert tuple(figures) == names
    images = dict(zip(figures, (2 * 12 * 24, 8 * 50, 50)))
    for name, case in figures.items():
        assert case["ratio"] == case["limit_seconds"] / case["seconds"] > 0 and case["rounds"] == 3
        assert case["images_per_second"] == pytest.approx(images[name] / case["seconds"])
        assert case["peak_memory_mb"] > 100
        assert case["torch"] == torch.__version__ and "float" in case["limit"]
        assert case["ratio"] > 0.4, "two tests at a time share this machine; alone it is 0.75 or more"
        assert f"{name:36s}{case['seconds']:10.4f}{case['limit_seconds']:10.4f}" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_constants_are_made_once_and_can_be_trained_through():
    with torch.inference_mode():
        first = common.constant((1.0, 2.0), torch.rand(3))
    assert common.constant((1.0, 2.0), torch.rand(7)) is first and not first.is_inference()
    assert first.tolist() == [1, 2]
    assert common.constant((1.0, 2.0), torch.rand(3).double()).dtype == torch.float64
    x = torch.ones(2, requires_grad=True)
    (x * first).sum().backward()
    assert x.grad.tolist() == [1, 2]
