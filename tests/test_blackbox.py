"""gretta.py --blackbox (a classifier that is a program) and --export (policy, transforms and classifier as one program)."""

import copy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, contents, results_of

import common
import gretta

STUDENT = common.WEIGHTS / "digits-resnext-student.pt"
KINDS = ("torchscript", "torch.export", "onnx")
SUFFIXES = {"torchscript": ".pt", "torch.export": ".pt2", "onnx": ".onnx"}


def resnext() -> nn.Module:
    return common.load_weights(common.build_model("resnext", 10, "digits"), common.WEIGHTS / "digits-resnext.pt").eval()


def write_program(model: nn.Module, kind: str, file: Path, dynamic: bool = True, side: int = 32) -> Path:
    """As README.md's "Bring your own classifier"; not `dynamic`: for two images only."""
    images = torch.rand(2, 3, side, side)
    shapes = ({0: torch.export.Dim("batch", min=1, max=2**20)},) if dynamic else None
    with common.warnings_off():
        if kind == "torchscript":
            torch.jit.trace(model, images).save(str(file))
        elif kind == "torch.export":
            with open(file, "wb") as stream:
                torch.export.save(torch.export.export(model, (images,), dynamic_shapes=shapes), stream)
        else:
            torch.onnx.export(model, (images,), str(file), dynamo=True, dynamic_shapes=shapes)
    return file


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    """The shipped digits classifier as a program of each kind."""
    directory = tmp_path_factory.mktemp("programs")
    return {kind: write_program(resnext(), kind, directory / f"mine{SUFFIXES[kind]}") for kind in KINDS}


def run_here(directory: Path, *flags: object, draw: bool = False) -> dict:
    """`python gretta.py --dry-run FLAGS…` without a new process, and without its pictures unless `draw`; returns its results.

    The policy starts from a seed of its own: building a classifier draws random numbers before it, loading a program draws none.
    """

    def seeded_policy(*arguments: object) -> nn.Module:
        torch.manual_seed(5)
        return policy_class(*arguments)

    policy_class = gretta.Policy
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(gretta, "Policy", seeded_policy)
        for name in () if draw else ("draw_examples", "draw_curves"):
            patch.setattr(gretta, name, lambda *arguments: None)
        patch.setattr(sys, "argv", [str(ROOT / "gretta.py"), "--dry-run", "--device", "cpu", "--run-dir", str(directory), *map(str, flags)])
        gretta.main()
    return results_of(directory)


@pytest.fixture
def refuses(refuses_here, tmp_path):
    return lambda *flags, names=(): refuses_here(gretta.main, "gretta.py", "--dry-run", "--run-dir", tmp_path / "run", *flags, names=names)


# --------------------------------------------------------------------------------------------------------------- black box


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_gives_the_classifiers_logits(kind, programs):
    """For every batch size and layout, in float32 even under autocast, and without a gradient."""
    machine = common.Machine(torch.device("cpu"))
    assert gretta.program_kind(programs[kind]) == kind
    program, classifier = gretta.load_blackbox(programs[kind], machine), resnext()
    assert list(program.parameters()) == [] and program.eval() is program
    for count in (1, 3, 8):
        images = torch.rand(count, 3, 32, 32).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = program(images.requires_grad_())
        assert logits.dtype == torch.float32 and not logits.requires_grad
        assert (logits - classifier(images)).abs().max() < 1e-5


class InPlace(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.sub_(0.5).flatten(1)[:, :10]


@pytest.mark.parametrize("kind", ["torchscript", "torch.export"])
def test_a_program_that_normalises_in_place_leaves_the_images_alone(kind, tmp_path):
    program = gretta.load_blackbox(write_program(InPlace(), kind, tmp_path / "in-place"), common.Machine(torch.device("cpu")))
    images = torch.rand(4, 3, 32, 32)
    before = images.clone()
    assert torch.equal(program(images), before.flatten(1)[:, :10] - 0.5) and torch.equal(images, before)


@pytest.mark.parametrize("est", ["vanilla", "surrogate"])
def test_a_run_with_a_program_gives_the_figures_of_the_built_in_model(est, programs, tmp_path, capsys):
    flags = ["--est", est, *(["--student", STUDENT] if est == "surrogate" else [])]
    expected = run_here(tmp_path / "built-in", *flags)["accuracy"]
    del expected["bn_adapt"]
    for kind, file in programs.items():
        results = run_here(tmp_path / kind, *flags, "--blackbox", file)
        assert results["accuracy"] == expected and list(results["accuracy"]) == ["none", "five_crop", "ten_crop", "gretta"]
        assert results["model"] == "mine" and results["queries"] == 96 and "black box" in results["protocol"]
        assert "bn_adapt is left out" in capsys.readouterr().out
    assert "normalised by 0.5/0.5" in results_of(tmp_path / "built-in")["protocol"]


def test_a_student_is_distilled_from_the_programs_outputs_and_no_gradient_reaches_it(programs, tmp_path, monkeypatch):
    """--model resnext does not make the shipped student this program's; nothing is written beside the shipped ones."""
    loaded, load = [], gretta.load_torchscript
    monkeypatch.setattr(gretta, "load_torchscript", lambda *arguments: loaded.append(load(*arguments)) or loaded[-1])
    shipped = contents(common.WEIGHTS)
    file = shutil.copy(programs["torchscript"], tmp_path / "resnext.pt")
    results = run_here(tmp_path / "run", "--est", "surrogate", "--blackbox", file, "--reg", "test")
    assert results["queries_distillation"] == 1000 and results["queries"] == 96
    common.load_weights(common.build_model("student", 10, "digits"), tmp_path / "run/student.pt")
    assert contents(common.WEIGHTS) == shipped
    parameters = list(loaded[0].parameters())
    assert parameters and all(parameter.requires_grad and parameter.grad is None for parameter in parameters)


def test_mixed_precision_and_compile_leave_the_program_alone(programs, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    seen, load = [], gretta.load_exported

    def watched(file, device):
        program = load(file, device)
        return lambda images: seen.append((images.dtype, torch.is_autocast_enabled("cpu"), images.is_contiguous())) or program(images)

    monkeypatch.setattr(gretta, "load_exported", watched)
    run_here(tmp_path / "run", "--amp", "--compile", "--blackbox", programs["torch.export"])
    assert [type(model) for model in compiled] == [gretta.Policy]
    assert set(seen) == {(torch.float32, False, True)}


def test_evaluate_and_predict_remember_the_program(programs, tmp_path):
    first = run_here(tmp_path / "run", "--blackbox", programs["onnx"], draw=True)["accuracy"]
    assert run_here(tmp_path / "run", "--evaluate")["accuracy"] == first
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    images, _ = common.load_split("digits", "test")
    from PIL import Image

    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(pictures / "0.png")
    run_here(tmp_path / "run", "--predict", pictures, draw=True)
    assert all((tmp_path / "run" / name).is_file() for name in ("examples.png", "curves.png", "predictions.png"))
    assert len((tmp_path / "run/predictions.csv").read_text().splitlines()) == 2


def test_flags_that_do_not_go_together(programs, refuses):
    file = programs["torchscript"]
    refuses("--blackbox", file, "--est", "whitebox", names=("--blackbox", "--est whitebox"))
    refuses("--blackbox", file, "--weights", common.WEIGHTS / "digits-resnext.pt", names=("--blackbox", "--weights"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_with_another_number_of_outputs(kind, refuses, tmp_path):
    file = write_program(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), kind, tmp_path / f"five{SUFFIXES[kind]}")
    refuses("--blackbox", file, names=(file, "gives 5 outputs, but digits has 10 classes"))


class TwoOnly(nn.Module):
    """Its answer has the rows of a batch of two, whatever the batch."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten().view(2, -1)[:, :10]


class Pair(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1)[:, :10], images.mean((1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_for_one_batch_size(kind, refuses, tmp_path):
    file = write_program(TwoOnly(), kind, tmp_path / f"fixed{SUFFIXES[kind]}", dynamic=False)
    refuses("--blackbox", file, names=(file, "3", "dynamic batch dimension"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_with_two_results_or_for_other_images(kind, refuses, tmp_path):
    file = write_program(Pair(), kind, tmp_path / f"pair{SUFFIXES[kind]}")
    refuses("--blackbox", file, names=(file, "it must "))
    file = write_program(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10)), kind, tmp_path / f"large{SUFFIXES[kind]}", side=64)
    line = refuses("--blackbox", file, names=(file, "(2, 3, 32, 32)"))
    assert "interpreter" not in line  # TorchScript's first line, which gives no reason


def test_files_that_hold_no_program(programs, refuses, tmp_path):
    machine = common.Machine(torch.device("cpu"))

    def unreadable(file: Path, *words: str) -> None:
        with pytest.raises(common.InputError) as raised:
            gretta.load_blackbox(file, machine)
        assert all(word in str(raised.value) for word in (f"--blackbox {file}", *words)), raised.value

    refuses("--blackbox", tmp_path / "absent.onnx", names=("absent.onnx", "no such file"))
    unreadable(tmp_path, "no such file")
    unreadable(common.WEIGHTS / "digits-resnext.pt", "a checkpoint goes to --weights")
    for kind, file in programs.items():
        for name, content in (("garbage", b"not a program " * 50), ("empty", b""), ("truncated", file.read_bytes()[:5000])):
            (tmp_path / f"{name}{file.suffix}").write_bytes(content)
            unreadable(tmp_path / f"{name}{file.suffix}")
        damaged = tmp_path / f"damaged{file.suffix}"
        if kind == "onnx":
            damaged.write_bytes(file.read_bytes().replace(b"Conv", b"Gone"))
        else:
            with zipfile.ZipFile(file) as old, zipfile.ZipFile(damaged, "w") as new:
                for name in old.namelist():
                    new.writestr(name, b"?" if name.endswith(("model.json", "data.pkl")) else old.read(name))
        refuses("--blackbox", damaged, names=(damaged, f"cannot be read as {kind}"))  # nothing of the library's own on stderr


def test_without_onnxruntime(programs, refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refuses("--blackbox", programs["onnx"], names=(programs["onnx"], "pip install onnxruntime"))


# ------------------------------------------------------------------------------------------------------------------ export

ELSEWHERE = """
import sys, torch
try:
    import common
except ImportError:
    program = torch.export.load(sys.argv[1]).module()
    torch.save([program(images) for images in torch.load(sys.argv[2])], sys.argv[3])
else:
    raise SystemExit("the repository can be imported here")
"""


def logits_elsewhere(program: Path, batches: list[torch.Tensor], directory: Path) -> list[torch.Tensor]:
    """The program's answers, asked by an isolated process in an empty directory that cannot import this repository."""
    (directory / "empty").mkdir()
    torch.save(batches, directory / "batches.pt")
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(program), str(directory / "batches.pt"), str(directory / "logits.pt")]
    done = subprocess.run(command, cwd=directory / "empty", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(directory / "logits.pt")


def batches_of(*counts: int) -> list[torch.Tensor]:
    images, _, _ = common.modified_digits("val")
    return [common.to_float(part) for part in images[: sum(counts)].split(counts)]


@pytest.mark.parametrize("flags", [["--transform", "geometry"], ["--transform", "full"], pytest.param(["--policy", "efficientnet-b0", "--steps", 2, "--sigmoid"], marks=pytest.mark.slow), ["--transform", "color", "--model", "wideresnet"]])  # fmt: skip
def test_an_exported_policy_needs_no_repository(flags, tmp_path, capsys):
    """The whole of a run, whose policy moves images by more than nothing, at batch sizes 1, 3 and 8."""
    results = run_here(tmp_path / "run", "--init", "stochastic", *flags, "--export", tmp_path / "policy.pt2")
    printed = capsys.readouterr().out.splitlines()[-1]
    assert str(tmp_path / "policy.pt2") in printed and float(printed.split()[-1]) < 1e-5
    given = dict(zip(flags[::2], flags[1::2]))
    transform, steps, model = given.get("--transform", "geometry"), given.get("--steps", 1), results["model"]
    policy = gretta.Policy(results["policy"], len(gretta.TRANSFORM_SETS[transform]), "--sigmoid" in flags, "stochastic")
    common.load_weights(policy, tmp_path / "run/checkpoint.pt").eval()
    classifier = common.load_weights(common.build_model(model, 10, "digits"), common.WEIGHTS / f"digits-{model}.pt").eval()
    batches = batches_of(1, 3, 8)
    for images, logits in zip(batches, logits_elsewhere(tmp_path / "policy.pt2", batches, tmp_path), strict=True):
        with torch.no_grad():
            expected = classifier(gretta.gretta_steps(policy, images, transform, steps)[0][-1])
            assert (logits - expected).abs().max() < 1e-5 and not logits.requires_grad
            assert (logits - classifier(images)).abs().max() > 1e-2


@pytest.mark.slow
def test_evaluate_exports_a_trained_policy_and_a_torch_export_black_box_is_part_of_it(programs, tmp_path):
    """The run's own --export is not remembered: evaluating it again must not write it again."""
    first, second = tmp_path / "first.pt2", tmp_path / "second.pt2"
    run_here(tmp_path / "run", "--blackbox", programs["torch.export"], "--export", first)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    run_here(tmp_path / "run", "--evaluate")
    run_here(tmp_path / "copy", "--evaluate", "--export", second)
    (images,) = batches_of(5)
    programs_of_run = [torch.export.load(file).module() for file in (first, second)]
    assert torch.equal(*(program(images) for program in programs_of_run))
    policy = common.load_weights(gretta.Policy("resnet18", 4, False, "zero"), tmp_path / "run/checkpoint.pt").eval()
    with torch.no_grad():
        expected = resnext()(gretta.gretta_steps(policy, images, "geometry", 1)[0][-1])
    assert (programs_of_run[0](images) - expected).abs().max() < 1e-5


def test_export_leaves_the_policy_as_it_is(tmp_path):
    """efficientnet's swish is replaced in a copy; what torch.export cannot hold is one line, and leaves no half of a file."""
    policy, classifier = gretta.Policy("efficientnet-b0", 4, False, "stochastic"), resnext()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    before, kind = copy.deepcopy(policy.state_dict()), type(policy.backbone._swish)
    assert gretta.export_program(tmp_path / "policy.pt2", policy, classifier, "geometry", 1, images) < 1e-5
    assert type(policy.backbone._swish) is kind and all(torch.equal(value, before[key]) for key, value in policy.state_dict().items())
    assert all(parameter.requires_grad for parameter in policy.parameters())
    classifier.register_forward_hook(lambda module, inputs, logits: logits + float(logits.sum() > 0))
    with pytest.raises(common.InputError, match="--export .*other.pt2"):
        gretta.export_program(tmp_path / "other.pt2", policy, classifier, "geometry", 1, images)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.pt2"]


def test_exports_that_are_refused_before_the_run(programs, refuses, tmp_path):
    (tmp_path / "there.pt2").write_text("mine")
    refuses("--export", tmp_path / "there.pt2", names=("--export", "there.pt2", "exists: choose another"))
    refuses("--export", tmp_path / "nowhere/policy.pt2", names=("--export", "there is no directory", tmp_path / "nowhere"))
    refuses("--export", tmp_path / "policy.pt", names=("policy.pt", "must end in .pt2"))
    for kind in ("torchscript", "onnx"):
        refuses("--blackbox", programs[kind], "--export", tmp_path / "policy.pt2", names=("--export", "--blackbox", programs[kind]))


def test_resuming_a_finished_run_exports_nothing_and_says_so(refuses_here, tmp_path, capfd):
    run_here(tmp_path / "run")
    capfd.readouterr()
    flags = ["--resume", "--run-dir", tmp_path / "run", "--export", tmp_path / "policy.pt2"]
    refuses_here(gretta.main, "gretta.py", *flags, names=("holds a finished run", "--evaluate"))
