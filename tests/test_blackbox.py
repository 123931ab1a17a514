"""gretta.py --blackbox (a classifier that is a program) and --export (all as one program)."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Handler, refused, results_of, run_here, state_of
from torch import Tensor, nn

import common
import gretta

SUFFIXES = (".pt", ".pt2", ".onnx")


def shipped(name: str = "resnext") -> nn.Module:
    model = common.build_model(name, 10, "digits").eval()
    return common.load_weights(model, common.WEIGHTS / f"digits-{name}.pt")


class Of(nn.Module):
    """A function of images as a module; `parts` are what the function asks."""

    def __init__(self, function: Callable, *parts: nn.Module):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def write_program(model: nn.Module, file: Path, fixed: Tensor | None = None) -> Path:
    """By the suffix; for any number of images, or for batches like `fixed` only."""
    images = torch.rand(2, 3, 32, 32) if fixed is None else fixed
    shapes = ({0: torch.export.Dim("batch", min=1, max=2**20)},) if fixed is None else None
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
    return {suffix: write_program(shipped(), directory / f"mine{suffix}") for suffix in SUFFIXES}


def load(file: object) -> common.Program:
    return common.Program(str(file), 10, 32, torch.device("cpu"))


def python(directory: Path, body: str) -> str:
    """FILE.py:answer, whose body it is."""
    lines = ["import json, urllib.request", "import numpy as np, torch, common", "", "def answer(images):"]
    (directory / "mine.py").write_text("\n".join([*lines, *(f"    {line}" for line in body.splitlines())]))
    return f"{directory / 'mine.py'}:answer"


@pytest.mark.parametrize("end", [".detach().numpy()", ".softmax(1).detach().numpy()", ".tolist()"])
def test_a_function_gives_logits_or_probabilities(end, tmp_path):
    call = """model = common.build_model("resnext", 10, "digits").eval()
return common.load_weights(model, common.WEIGHTS / "digits-resnext.pt")(torch.from_numpy(images))"""
    program, images, shares = load(python(tmp_path, call + end)), torch.rand(5, 3, 32, 32), "softmax" in end
    expected = shipped()(images).log_softmax(1) if shares else shipped()(images)
    assert (program(images) - expected).abs().max() < 1e-4
    assert ("probabilities" in program.origin) == shares == program.probabilities


@pytest.mark.parametrize("name", ["program.pt2", "bytes.onnx", "last.onnx", "bytes-last.onnx"])
def test_a_program_is_given_what_it_declares_so_many_at_a_time_as_it_fixes(name, tmp_path):
    """ONNX files declare bytes, channels last, two outputs."""
    integers, last = "bytes" in name, "last" in name

    def answer(images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        images = images.permute(0, 3, 1, 2) if last else images
        images = images.float() / 255 if integers else images
        return (images.mean((2, 3)), model(images)) if "onnx" in name else model(images)

    model, images = shipped(), common.to_float(common.load_split("digits", "val")[0][:6])
    fixed = torch.rand(4, 32, 32, 3) if last else torch.rand(4, 3, 32, 32)
    fixed = (fixed * 255).to(torch.uint8) if integers else fixed
    program = load(write_program(Of(answer, model), tmp_path / name, fixed))
    assert program.batch_size == 4 and (program(images) - shipped()(images)).abs().max() < 1e-5


@pytest.mark.slow
def test_a_web_service_whose_failure_leaves_the_last_checkpoint(address, tmp_path, monkeypatch):
    """It answers none after the first epoch, of which the checkpoint stays; then all."""
    left = [2 + 3 * 2 + 8 + 3]  # two to look, an epoch of 3 steps, its validation images, half an epoch

    def do_POST(handler: Handler) -> None:
        """JSON images in, JSON probabilities out."""
        images = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        left[0] -= 1
        if left[0] < 0:
            return handler.send_error(503)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(json.dumps(shipped()(torch.tensor(images)).softmax(1).tolist()).encode())

    monkeypatch.setattr(Handler, "do_POST", do_POST, raising=False)
    call = f"""request = urllib.request.Request({address!r}, method="POST")
request.data = json.dumps(images.tolist()).encode()
return json.load(urllib.request.urlopen(request, timeout=30))"""
    flags = ("--blackbox", python(tmp_path, call), "--run-dir", tmp_path / "run", "--num-samples", 1)
    flags += ("--eval-split", "val", "--proportion", 0.1, "--batch-size", 60, "--lr", 1e-5)
    flags += ("--max-queries", 240 * 3, "--checkpoint-every", 1)
    with pytest.raises(common.InputError, match="mine.py:answer, asked for 60 images .*503"):
        run_here("gretta", *flags)
    assert state_of(tmp_path / "run")["step"] == 3
    left[0] = 10**9
    run_here("gretta", "--resume", *flags)
    assert results_of(tmp_path / "run")["queries"] == 720 and state_of(tmp_path / "run")["step"] == 6


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_program_gives_the_classifiers_logits(suffix, programs, tmp_path):
    """For every batch size and layout, in float32 even under autocast, without a gradient; images stay."""
    program = load(programs[suffix]).eval()
    for count in (1, 3, 8):
        images = torch.rand(count, 3, 32, 32).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = program(images.requires_grad_())
        assert logits.dtype == torch.float32 and not logits.requires_grad
        assert (logits - shipped()(images)).abs().max() < 1e-5 and not list(program.parameters())
    if suffix != ".onnx":
        in_place, before = Of(lambda images: images.sub_(0.5).flatten(1)[:, :10]), images.detach().clone()
        program = load(write_program(in_place, tmp_path / f"in{suffix}"))
        assert torch.equal(program(images), before.flatten(1)[:, :10] - 0.5) and torch.equal(images, before)


def test_a_run_with_a_program_gives_the_figures_of_the_built_in_model(programs, tmp_path):
    """And is evaluated again; a student is distilled from its answers, as no shipped one is its own."""
    run_here("gretta", "--dry-run", "--run-dir", tmp_path / "built-in")
    expected = results_of(tmp_path / "built-in")["accuracy"]
    del expected["bn_adapt"]
    for suffix, file in programs.items():
        run = tmp_path / suffix
        run_here("gretta", "--dry-run", "--blackbox", file, "--run-dir", run)
        run_here("gretta", "--evaluate", "--run-dir", run)
        results = results_of(run)
        assert results["accuracy"] == expected and results["queries"] == 96
        assert results["model"] == "mine" and "black box" in results["protocol"]
    run = tmp_path / "distilled"
    run_here("gretta", "--dry-run", "--est", "surrogate", "--blackbox", file, "--run-dir", run)
    assert results_of(run)["queries_distillation"] == 64
    common.load_weights(common.build_model("student", 10, "digits"), run / "student.pt")


def refuse(directory: Path, file: object, *words: object, flags: tuple = ()) -> None:
    flags = ("--dry-run", "--blackbox", file, "--run-dir", directory / "run", *flags)
    refused(directory, "gretta.py", *flags, names=("--blackbox", Path(file).name, *words))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_programs_that_are_refused(suffix, programs, tmp_path):
    refuse(tmp_path, tmp_path / f"none{suffix}", "no such file")
    for flags in (("--est", "whitebox"), ("--weights", "mine.pt"), ("--export", tmp_path / "policy.pt2")):
        refuse(tmp_path, programs[suffix], "no --weights, whitebox, --export", flags=flags)
    write = lambda function: write_program(Of(function), tmp_path / f"broken{suffix}")
    refuse(tmp_path, write(lambda images: images.flatten(1)[:, :5]), "gives (2, 5)", "(2, 10)")
    refuse(tmp_path, write(lambda images: images.flatten(1)[:, :10] * torch.nan), "not all finite")
    (tmp_path / f"cut{suffix}").write_bytes(programs[suffix].read_bytes()[:5000])
    refuse(tmp_path, tmp_path / f"cut{suffix}", "cannot be loaded", "--weights")


def test_functions_that_are_refused(tmp_path):
    refuse(tmp_path, python(tmp_path, "raise TimeoutError('no answer in 30 s')"), "no answer in 30 s")
    refuse(tmp_path, python(tmp_path, "return np.zeros((len(images), 7))"), "(2, 7)", "(2, 10)")
    refuse(tmp_path, python(tmp_path, "return np.full((len(images), 10), np.nan)"), "not all finite")
    refuse(tmp_path, python(tmp_path, "return 'cat'"), "could not convert")
    refuse(tmp_path, python(tmp_path, ")"), "SyntaxError")
    refuse(tmp_path, f"{tmp_path}/mine.py:other", "is not FILE.py:function")


def test_an_exported_policy_needs_no_repository(tmp_path):
    """At batch sizes 1, 3 and 8, in an isolated process; an untrained policy that moves images."""
    file, files = tmp_path / "policy.pt2", [tmp_path / "batches.pt", tmp_path / "logits.pt"]
    flags = ("--transform", "full", "--model", "wideresnet", "--steps", 2, "--sigmoid", "--export", file)
    run_here("gretta", "--dry-run", "--init", "stochastic", *flags, "--run-dir", tmp_path / "run")
    policy = common.load_weights(gretta.Policy("resnet18", 7, True, "zero"), tmp_path / "run/checkpoint.pt")
    classifier = shipped("wideresnet")
    model = gretta.AugmentedClassifier(policy, classifier, "full", 2).eval()
    batches = common.to_float(common.modified_digits("val")[0][:12]).split([1, 3, 8])
    torch.save(batches, files[0])
    elsewhere = """import sys, torch
program = torch.export.load(sys.argv[1]).module()
torch.save([program(images) for images in torch.load(sys.argv[2])], sys.argv[3])"""
    subprocess.run([sys.executable, "-I", "-c", elsewhere, file, *files], cwd=tmp_path, check=True)
    for images, logits in zip(batches, torch.load(files[1])):
        assert (logits - model(images)).abs().max() < 1e-5 and not logits.requires_grad
        assert (logits - classifier(images)).abs().max() > 1e-2


def test_export_leaves_the_policy_as_it_is(tmp_path):
    """What torch.export cannot hold is one line, and leaves no half of a file."""
    policy, file = gretta.Policy("efficientnet-b0", 4, False, "stochastic").eval(), tmp_path / "policy.pt2"
    model, kind = gretta.AugmentedClassifier(policy, shipped(), "geometry", 1), type(policy.backbone._swish)
    gretta.export_program(str(file), model, 32)
    images = torch.rand(4, 3, 32, 32)
    assert (torch.export.load(file).module()(images) - model(images)).abs().max() < 1e-5
    assert type(policy.backbone._swish) is kind and all(part.requires_grad for part in policy.parameters())
    model.classifier.register_forward_hook(lambda _module, _images, logits: logits + float(logits.sum() > 0))
    with pytest.raises(common.InputError, match="--export .*other.pt2"):
        gretta.export_program(str(tmp_path / "other.pt2"), model, 32)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.pt2"]
