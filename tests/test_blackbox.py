"""gretta.py --blackbox (a classifier that is a program) and --export (all as one program)."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import refused, results_of, run_here
from torch import Tensor, nn

import common
import gretta

STUDENT = common.WEIGHTS / "digits-resnext-student.pt"
DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=2**20)},)
CPU = torch.device("cpu")


def resnext() -> nn.Module:
    model = common.build_model("resnext", 10, "digits")
    return common.load_weights(model, common.WEIGHTS / "digits-resnext.pt").eval()


def write_program(model: nn.Module, file: Path, shapes: tuple | None = DYNAMIC) -> Path:
    """By the suffix; shapes None: for two images only."""
    images = torch.rand(2, 3, 32, 32)
    with common.warnings_off():
        if file.suffix == ".pt":
            torch.jit.trace(model, images).save(str(file))
        elif file.suffix == ".pt2":
            torch.export.save(torch.export.export(model, (images,), dynamic_shapes=shapes), file)
        else:
            torch.onnx.export(model, (images,), str(file), dynamo=True, dynamic_shapes=shapes)
    return file


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("programs")
    return {suffix: write_program(resnext(), directory / f"mine{suffix}") for suffix in SUFFIXES}


SUFFIXES = (".pt", ".pt2", ".onnx")


class Of(nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_program_gives_the_classifiers_logits(suffix, programs, tmp_path):
    """For every batch size and layout, in float32 even under autocast, without a gradient; images stay."""
    program = gretta.load_blackbox(str(programs[suffix]), 10, 32, CPU).eval()
    for count in (1, 3, 8):
        images = torch.rand(count, 3, 32, 32).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = program(images.requires_grad_())
        assert logits.dtype == torch.float32 and not logits.requires_grad
        assert (logits - resnext()(images)).abs().max() < 1e-5 and not list(program.parameters())
    if suffix != ".onnx":
        in_place, before = Of(lambda images: images.sub_(0.5).flatten(1)[:, :10]), images.detach().clone()
        write_program(in_place, tmp_path / f"in{suffix}")
        program = gretta.load_blackbox(str(tmp_path / f"in{suffix}"), 10, 32, CPU)
        assert torch.equal(program(images), before.flatten(1)[:, :10] - 0.5) and torch.equal(images, before)


def test_a_run_with_a_program_gives_the_figures_of_the_built_in_model(programs, tmp_path):
    """And is evaluated again; a student is distilled from its answers, as no shipped one is its own."""
    run_here("gretta", "--dry-run", "--run-dir", tmp_path / "built-in")
    expected = results_of(tmp_path / "built-in")["accuracy"]
    for suffix, file in programs.items():
        run = tmp_path / suffix
        run_here("gretta", "--dry-run", "--blackbox", file, "--run-dir", run)
        run_here("gretta", "--evaluate", "--run-dir", run)
        results = results_of(run)
        assert results["accuracy"] == {name: expected[name] for name in expected if name != "bn_adapt"}
        assert results["model"] == "mine" and results["queries"] == 96 and "black box" in results["protocol"]
    run = tmp_path / "distilled"
    run_here("gretta", "--dry-run", "--est", "surrogate", "--blackbox", file, "--run-dir", run)
    assert results_of(run)["queries_distillation"] == 64
    common.load_weights(common.build_model("student", 10, "digits"), run / "student.pt")


BROKEN = {  # its function, and what is said of it
    "five": (lambda images: images.flatten(1)[:, :5], "gives (2, 5)", "(2, 10)"),
    "pair": (lambda images: (images, images), "not logits (2, 10)"),
    "two": (lambda images: images.flatten().view(2, -1)[:, :10], "(3, 3, 32, 32)", "dynamic batch dimension"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_programs_that_are_refused(suffix, programs, tmp_path):
    def refuse(file: Path, *words: object, flags: tuple = ()) -> None:
        flags = ("--dry-run", "--blackbox", file, "--run-dir", tmp_path / "run", *flags)
        refused(tmp_path, "gretta.py", *flags, names=("--blackbox", *words))

    refuse(tmp_path / f"none{suffix}", "no such file")
    refuse(programs[suffix], "--est whitebox", flags=("--est", "whitebox"))
    refuse(programs[suffix], "--weights", flags=("--weights", STUDENT))
    for name, (function, *words) in BROKEN.items():
        shapes = DYNAMIC if name != "two" else None
        refuse(write_program(Of(function), tmp_path / f"{name}{suffix}", shapes), *words)
    (tmp_path / f"cut{suffix}").write_bytes(programs[suffix].read_bytes()[:5000])
    refuse(tmp_path / f"cut{suffix}", "cannot be read", "--weights")
    if suffix != ".pt2":
        refuse(programs[suffix], "torch.export", flags=("--export", tmp_path / "policy.pt2"))


ELSEWHERE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
torch.save([program(images) for images in torch.load(sys.argv[2])], sys.argv[3])
"""


def test_an_exported_policy_needs_no_repository(tmp_path):
    """At batch sizes 1, 3 and 8, in an isolated process; an untrained policy that moves images."""
    file, files = tmp_path / "policy.pt2", [tmp_path / "batches.pt", tmp_path / "logits.pt"]
    flags = ("--transform", "full", "--model", "wideresnet", "--steps", 2, "--sigmoid", "--export", file)
    run_here("gretta", "--dry-run", "--init", "stochastic", *flags, "--run-dir", tmp_path / "run")
    policy = gretta.Policy("resnet18", 7, True, "stochastic")
    classifier = common.build_model("wideresnet", 10, "digits")
    common.load_weights(policy, tmp_path / "run/checkpoint.pt")
    common.load_weights(classifier, common.WEIGHTS / "digits-wideresnet.pt")
    model = gretta.AugmentedClassifier(policy, classifier, "full", 2).eval()
    batches = common.to_float(common.modified_digits("val")[0][:12]).split([1, 3, 8])
    torch.save(batches, files[0])
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, file, *files], cwd=tmp_path, check=True)
    for images, logits in zip(batches, torch.load(files[1])):
        assert (logits - model(images)).abs().max() < 1e-5 and not logits.requires_grad
        assert (logits - classifier(images)).abs().max() > 1e-2


def test_export_takes_in_a_program_and_leaves_the_policy_as_it_is(programs, tmp_path):
    """What torch.export cannot hold is one line, and leaves no half of a file."""
    policy = gretta.Policy("efficientnet-b0", 4, False, "stochastic").eval()
    images, kind = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), type(policy.backbone._swish)
    program = gretta.load_blackbox(str(programs[".pt2"]), 10, 32, CPU)
    model = gretta.AugmentedClassifier(policy, program, "geometry", 1)
    assert gretta.export_program(tmp_path / "policy.pt2", model, images) < 1e-5
    assert type(policy.backbone._swish) is kind and all(part.requires_grad for part in policy.parameters())
    model.classifier = resnext()
    model.classifier.register_forward_hook(lambda _module, _images, logits: logits + float(logits.sum() > 0))
    with pytest.raises(common.InputError, match="--export .*other.pt2"):
        gretta.export_program(tmp_path / "other.pt2", model, images)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.pt2"]
