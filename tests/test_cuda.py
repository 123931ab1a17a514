"""What only a CUDA GPU can show; tests/device.sh runs it there. The figures are printed: python -m pytest -n 0 -s."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, results_of, run_here, run_script, state_of, without_times
from formats import example_pictures

import advaa
import common
import game_of_noise
import gretta

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
DEVICE = "cuda"
# Small runs that are over in seconds
RUNS = {
    "gretta": "--proportion 0.5 --batch-size 240 --num-samples 2 --epochs 2 --eval-split val",
    "advaa": "--epochs 4 --M 4 --num-train 200 --batch-size 50 --eval-split val",
    "game_of_noise": "--epochs 2 --fresh-iterations 3 --star-iterations 3 --eval-split val",
}


def run(script: str, directory, *flags: object) -> dict:
    given = (*RUNS[script].split(), "--device", DEVICE, "--run-dir", directory, *flags)
    run_here(script, *given)
    return results_of(directory)


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", common.CORRUPTIONS)
def test_corruptions_are_the_cpus(name, side):
    images = example_pictures(4, side)
    ours = common.corrupt(images.to(DEVICE), name, 3, seed=0).cpu()
    difference = (ours - common.corrupt(images, name, 3, seed=0)).abs()
    assert (difference > 1 / 255).float().mean() < 1e-3, difference.max()  # ties of rounding, sorting


@pytest.mark.parametrize("name", advaa.OPS)
def test_operations_are_the_cpus(name):
    images = common.to_uint8(example_pictures(32, 32))
    places = {"magnitude": torch.arange(32) % 10, "sign": torch.tensor([1, -1]).repeat(16)}
    made = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        made.append(advaa.apply_op(images.to(device), name, **places).cpu())
    assert torch.equal(*made)


def test_transforms_and_projection_are_the_cpus():
    images, levels = example_pictures(8, 32), torch.rand(8, 7)
    ours = gretta.transform_images(images.to(DEVICE), levels.to(DEVICE), "full").cpu()
    assert (ours - gretta.transform_images(images, levels, "full")).abs().max() < 1e-3
    noise = torch.randn(8, 3, 32, 32)
    moved = game_of_noise.project(images.to(DEVICE), noise.to(DEVICE), 5.0).cpu()
    assert (moved - images).flatten(1).norm(dim=1).sub(5).abs().max() < 1e-4


@pytest.mark.parametrize("flags", ["", "--amp", "--amp --compile"])
@pytest.mark.parametrize("script", RUNS)
def test_a_run_ends_with_the_gpus_name(script, flags, tmp_path):
    results = run(script, tmp_path / "run", *flags.split())
    assert results["device"] == torch.cuda.get_device_name() and results["peak_memory_mb"] > 0
    log = (tmp_path / "run" / "log.jsonl").read_text()
    print(script, flags, results["wall_seconds"], "s", results["peak_memory_mb"], "MB")
    assert "NaN" not in log and json.loads(log.splitlines()[-1])["step"] > 0


@pytest.mark.parametrize("script", RUNS)
def test_float16_scales_the_loss(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    run(script, tmp_path / "run", "--amp")
    scaler = state_of(tmp_path / "run")["scaler"]
    assert scaler["scale"] >= 1 and "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize("script", RUNS)
def test_killed_and_resumed_is_as_if_never_killed(script, tmp_path):
    """Equal, or as near as two runs that nothing happened to: cuDNN's sums have no fixed order."""
    results = [run(script, tmp_path / name) for name in ("one", "two")]
    flags = (*RUNS[script].split(), "--device", DEVICE, "--resume", "--run-dir", tmp_path / "killed")
    done = run_script(ROOT / "tests" / "lives.py", script, 0, 2, *flags, "--checkpoint-every", 1)
    killed = Path(json.loads(done.stdout.splitlines()[-1])["runs"][-1][0])
    part = "policy" if script == "gretta" else "classifier"
    first, *others = (state_of(place)[part] for place in (tmp_path / "one", tmp_path / "two", killed))
    again, resumed = (
        max((value.double() - other[key].double()).abs().max().item() for key, value in first.items())
        for other in others
    )
    print(f"{script}: largest difference of two runs {again:.2g}, of one that was killed {resumed:.2g}")
    assert resumed <= max(10 * again, 1e-6)
    assert without_times(results[0]).keys() == without_times(results_of(killed)).keys()


@pytest.mark.skipif(sys.platform != "linux", reason="nccl")
def test_one_process_of_torchrun(tmp_path):
    command = ("-m", "torch.distributed.run", "--nproc_per_node", 1, "advaa.py", *RUNS["advaa"].split())
    run_script(*command, "--amp", "--run-dir", tmp_path / "run")
    assert results_of(tmp_path / "run")["device"] == torch.cuda.get_device_name()
