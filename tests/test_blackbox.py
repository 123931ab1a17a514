"""gretta.py --blackbox (a classifier that is a program) and --export (all as one program)."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import refused, results_of, run_here, state_of
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


def python(directory: Path, body: str) -> str:
    """FILE.py:answer, whose body it is; `model` is the digits' classifier."""
    lines = ["import json, urllib.request", "import numpy as np, torch, common", "", "def answer(images):"]
    (directory / "mine.py").write_text("\n".join([*lines, *(f"    {line}" for line in body.splitlines())]))
    return f"{directory / 'mine.py'}:answer"


MODEL = f"""model = common.build_model("resnext", 10, "digits").eval()
common.load_weights(model, {str(common.WEIGHTS / "digits-resnext.pt")!r})
"""
CALLS = {
    "logits": MODEL + "return model(torch.from_numpy(images)).detach().numpy()",
    "probabilities": MODEL + "return model(torch.from_numpy(images)).softmax(1).detach().numpy()",
    "lists": MODEL + "return model(torch.from_numpy(images)).tolist()",
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_function_gives_logits_or_probabilities(kind, tmp_path):
    program, images = common.Program(python(tmp_path, CALLS[kind]), 10, 32, CPU), torch.rand(5, 3, 32, 32)
    logits, expected = program(images), resnext()(images)
    expected = expected.log_softmax(1) if kind == "probabilities" else expected
    assert (logits - expected).abs().max() < 1e-4
    assert ("probabilities" in program.origin) == (kind == "probabilities") == program.probabilities


class Takes(nn.Module):
    """What ONNX files declare: bytes, channels last, two outputs, a batch of four."""

    def __init__(self, model: nn.Module, integers: bool, last: bool):
        super().__init__()
        self.model, self.integers, self.last = model, integers, last

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.permute(0, 3, 1, 2) if self.last else images
        images = images.float() / 255 if self.integers else images
        return images.mean((2, 3)), self.model(images)


@pytest.mark.parametrize("integers, last", [(True, True), (False, True), (True, False)])
def test_onnx_is_given_what_it_declares_so_many_at_a_time_as_it_fixes(integers, last, tmp_path):
    example = torch.rand(4, 32, 32, 3) if last else torch.rand(4, 3, 32, 32)
    example = (example * 255).to(torch.uint8) if integers else example
    file = tmp_path / "mine.onnx"
    with common.warnings_off():
        torch.onnx.export(Takes(resnext(), integers, last).eval(), (example,), str(file), dynamo=True)
    program = common.Program(str(file), 10, 32, CPU)
    images = common.to_float(common.load_split("digits", "val")[0][:6])
    assert program.batch_size == 4 and (program(images) - resnext()(images)).abs().max() < 1e-4


class Server(BaseHTTPRequestHandler):
    """A web service: JSON images in, JSON probabilities out; it breaks down after `left` requests."""

    left = 10**9

    def do_POST(self) -> None:
        images = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.left -= 1
        if Server.left < 0:
            return self.send_error(503)
        with torch.no_grad():
            answer = resnext()(torch.tensor(images)).softmax(1).tolist()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_web_service_is_a_black_box_whose_failure_leaves_the_last_checkpoint(tmp_path):
    """It answers all of a small run; then none after the first epoch, of which the checkpoint stays."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    call = f"""request = urllib.request.Request("http://127.0.0.1:{server.server_port}", method="POST")
request.data = json.dumps(images.tolist()).encode()
return json.load(urllib.request.urlopen(request, timeout=30))"""
    flags = ("--blackbox", python(tmp_path, call), "--run-dir", tmp_path / "run", "--num-samples", 1)
    flags += ("--eval-split", "val", "--proportion", 0.1, "--batch-size", 60, "--lr", 1e-5)
    flags += ("--max-queries", 240 * 3, "--checkpoint-every", 1)
    run_here("gretta", "--dry-run", *flags[:2], "--run-dir", tmp_path / "dry")
    assert "black box" in results_of(tmp_path / "dry")["protocol"]
    Server.left = 2 + 3 * 2 + 8 + 3  # two to look, an epoch of 3 steps, its validation images, half an epoch
    with pytest.raises(common.InputError, match="mine.py:answer, asked for 60 images .*503"):
        run_here("gretta", *flags)
    assert state_of(tmp_path / "run")["step"] == 3
    Server.left = 10**9
    run_here("gretta", "--resume", *flags)
    results = results_of(tmp_path / "run")
    assert results["queries"] == 720 and state_of(tmp_path / "run")["step"] == 6
    server.shutdown()
    server.server_close()


def test_a_program_made_for_two_images_is_asked_for_two_at_a_time(tmp_path):
    program = common.Program(str(write_program(resnext(), tmp_path / "two.pt2", None)), 10, 32, CPU)
    images = torch.rand(5, 3, 32, 32)
    assert program.batch_size == 2 and (program(images) - resnext()(images)).abs().max() < 1e-5


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_program_gives_the_classifiers_logits(suffix, programs, tmp_path):
    """For every batch size and layout, in float32 even under autocast, without a gradient; images stay."""
    program = common.Program(str(programs[suffix]), 10, 32, CPU).eval()
    for count in (1, 3, 8):
        images = torch.rand(count, 3, 32, 32).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = program(images.requires_grad_())
        assert logits.dtype == torch.float32 and not logits.requires_grad
        assert (logits - resnext()(images)).abs().max() < 1e-5 and not list(program.parameters())
    if suffix != ".onnx":
        in_place, before = Of(lambda images: images.sub_(0.5).flatten(1)[:, :10]), images.detach().clone()
        write_program(in_place, tmp_path / f"in{suffix}")
        program = common.Program(str(tmp_path / f"in{suffix}"), 10, 32, CPU)
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
    "nothing": (
        lambda images: images.flatten(1)[:, :10] / 0 - 1 / images.flatten(1)[:, :10] / 0,
        "not all finite",
    ),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_programs_that_are_refused(suffix, programs, tmp_path):
    def refuse(file: object, *words: object, flags: tuple = ()) -> None:
        flags = ("--dry-run", "--blackbox", file, "--run-dir", tmp_path / "run", *flags)
        refused(tmp_path, "gretta.py", *flags, names=("--blackbox", *words))

    refuse(tmp_path / f"none{suffix}", "no such file")
    refuse(programs[suffix], "whitebox", flags=("--est", "whitebox"))
    refuse(programs[suffix], "--weights", flags=("--weights", STUDENT))
    refuse(programs[suffix], "--export", flags=("--export", tmp_path / "policy.pt2"))
    for name, (function, *words) in BROKEN.items():
        refuse(write_program(Of(function), tmp_path / f"{name}{suffix}"), *words)
    (tmp_path / f"cut{suffix}").write_bytes(programs[suffix].read_bytes()[:5000])
    refuse(tmp_path / f"cut{suffix}", "cannot be loaded", "--weights")


def test_functions_that_are_refused(tmp_path):
    def refuse(body: str, *words: str) -> None:
        flags = ("--dry-run", "--blackbox", python(tmp_path, body), "--run-dir", tmp_path / "run")
        refused(tmp_path, "gretta.py", *flags, names=("--blackbox", "mine.py:answer", *words))

    refuse("raise TimeoutError('no answer in 30 s')", "no answer in 30 s")
    refuse("return np.zeros((len(images), 7))", "(2, 7)", "(2, 10)")
    refuse("return np.full((len(images), 10), np.nan)", "not all finite")
    refuse("return 'cat'", "could not convert")
    refuse(")", "SyntaxError")
    refused(tmp_path, "gretta.py", "--blackbox", f"{tmp_path}/mine.py:other", names=("other",))


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


def test_export_leaves_the_policy_as_it_is(tmp_path):
    """What torch.export cannot hold is one line, and leaves no half of a file."""
    policy, file = gretta.Policy("efficientnet-b0", 4, False, "stochastic").eval(), tmp_path / "policy.pt2"
    model, kind = gretta.AugmentedClassifier(policy, resnext(), "geometry", 1), type(policy.backbone._swish)
    gretta.export_program(str(file), model, 32)
    images = torch.rand(4, 3, 32, 32)
    assert (torch.export.load(file).module()(images) - model(images)).abs().max() < 1e-5
    assert type(policy.backbone._swish) is kind and all(part.requires_grad for part in policy.parameters())
    model.classifier.register_forward_hook(lambda _module, _images, logits: logits + float(logits.sum() > 0))
    with pytest.raises(common.InputError, match="--export .*other.pt2"):
        gretta.export_program(str(tmp_path / "other.pt2"), model, 32)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.pt2"]
