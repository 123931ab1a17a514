"""Classifiers of common.py as published, what shakes in them, checkpoints of every layout, warps."""

import argparse
import datetime
import hashlib
import json
import math
import re
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_equal_weights, refused, results_of, run_here, run_script, state_of
from PIL import Image, ImageEnhance
from torch import nn
from torchvision.models import get_model

import common
from common import InputError, build_model, load_weights

MACHINE = common.Machine(torch.device("cpu"))
slim = partial(build_model, num_classes=10, dataset="digits")
MILLIONS = {"resnext": 6.8, "wideresnet": 2.24, "wresnet40_2": 2.24, "wresnet28_10": 36.5, "student": 11.2}
MILLIONS |= {"shake26_2x32d": 2.9, "shake26_2x96d": 26.2, "shake26_2x112d": 35.6, "pyramid272": 26.0}
MILLIONS |= {"resnet50": 25.6, "resnet50d": 25.6, "resnet200": 64.7}


def load(name: str, dataset: str, weights=None, dry_run=False, classes=10) -> tuple[nn.Module, str]:
    model = build_model(name, classes, dataset)
    return model, common.load_classifier(model, name, dataset, weights, MACHINE, "data", dry_run)


@pytest.mark.parametrize("name", ["resnext", "wideresnet"])
def test_keys_shapes_and_logits_are_those_of_augmixs_checkpoints(name, tmp_path):
    reference = json.loads((ROOT / "tests" / "augmix_checkpoints.json").read_text())[name]
    model, state = build_model(name, 100, "cifar100").eval(), {}
    shapes = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert shapes == reference["state_dict"]
    for k, (key, shape) in enumerate(shapes):  # the weights that the logits were computed with
        v = torch.from_numpy(np.cos(0.37 * np.arange(math.prod(shape)) + k)).float().view(shape)
        v = v * math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 1 + 0.1 * v
        state[f"module.{key}"] = v - 1 if key.endswith(("running_mean", "bias")) else v
    torch.save({"epoch": 199, "best_acc": 0.78, "state_dict": state}, tmp_path / "w.pt")
    images = torch.from_numpy(0.5 + 0.5 * np.cos(0.11 * np.arange(6144)).reshape(2, 3, 32, 32)).float()
    logits = load_weights(model, tmp_path / "w.pt")(images)  # normalises by 0.5/0.5 itself
    assert (logits - torch.tensor(reference.get("logits", logits.tolist()))).abs().max() < 1e-4


@pytest.mark.parametrize("name", MILLIONS)
def test_full_models_are_as_large_as_published_and_take_odd_sizes(name):
    classes, dataset = (1000, "imagenet") if name in common.RESNETS else (10, "cifar10")
    with torch.device("meta"):  # shapes without numbers
        model = build_model(name, classes, dataset)
        assert all(model(torch.rand(2, 3, side, side)).shape == (2, classes) for side in (64, 71))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.05)
    with pytest.raises(InputError, match=rf"unknown model 'resnet19': choose .*\b{name}\b"):
        build_model("resnet19", 10, "cifar10")


@pytest.mark.parametrize("name", common.MODELS)
def test_slim_models_learn_see_everything_and_evaluate_deterministically(name):
    images, labels = common.load_split("digits", "train")
    index, model = (labels < 2).nonzero()[:32, 0], slim(name)  # zeros and ones: told apart in a few steps
    batch, labels = common.to_float(images[index]), labels[index]
    assert sum(p.numel() for p in model.parameters()) < 200_000 and name in MILLIONS
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), []
    for _ in range(10):
        losses.append(F.cross_entropy(model(batch), labels))
        common.descend(losses[-1], optimizer, MACHINE.scaler())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    logits, state = model.eval()(batch.requires_grad_()), torch.get_rng_state()
    assert torch.equal(model(batch), logits) and torch.equal(torch.get_rng_state(), state)
    (gradient,) = torch.autograd.grad(logits.square().sum(), batch)
    assert gradient.isfinite().all() and (gradient.abs().amax((0, 1)) > 0).float().mean() > 0.95


@pytest.mark.parametrize("name", ["resnet50", "resnet50d", "resnet18", "googlenet"])
def test_models_normalise_inside_and_keep_torchvisions_keys(name):
    images, seen, model = torch.rand(2, 3, 64, 64), [], build_model(name, 7, "imagenet").eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    torch.testing.assert_close(seen[0], images * 2 - 1 if name == "googlenet" else (images - mean) / std)
    if name in ("resnet18", "resnet50"):
        assert list(model.state_dict()) == list(get_model(name, num_classes=7).state_dict())
    elif name == "resnet50d":
        stem = [(layer.kernel_size[0], layer.out_channels, layer.stride[0]) for layer in model.conv1[::3]]
        assert stem == [(3, 32, 2), (3, 32, 1), (3, 64, 1)]
        firsts = [stage[0] for stage in (model.layer2, model.layer3, model.layer4)]
        assert {(block.downsample[0].kernel_size, block.conv2.stride) for block in firsts} == {(2, (2, 2))}


def test_shake_shake_mixes_each_image_by_its_own_draw_and_its_skip_path_sees_shifted_pixels():
    one, other = torch.randn(2, 64, 3, 5, 5, requires_grad=True)
    mixed, upstream = common.shake_even(one, other, training=True), torch.randn(64, 3, 5, 5)
    alpha = ((mixed - other) / (one - other)).flatten(1).median(1).values.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, alpha * one + (1 - alpha) * other)  # one number per image
    assert all(torch.equal(half, upstream / 2) for half in torch.autograd.grad(mixed, (one, other), upstream))
    assert torch.equal(common.shake_even(one, other, training=False), (one + other) / 2)
    draws = common.shake_even(torch.ones(9999, 1, 1, 1), torch.zeros(9999, 1, 1, 1), True)
    assert draws.mean() == pytest.approx(0.5, abs=0.01) and draws.var() == pytest.approx(1 / 12, abs=0.005)
    # Skip path: every second pixel of ReLU(x), for half of the channels from one up and left, zeros there
    block, x = common.ShakeShakeBlock(4, 6, 2).eval(), torch.randn(2, 4, 8, 7)
    halves = (block.skip1, x.relu()), (block.skip2, F.pad(x.relu(), (1, 0, 1, 0))[:, :, :-1, :-1])
    skip = [torch.einsum("oc,bchw->bohw", c.weight[..., 0, 0], half[..., ::2, ::2]) for c, half in halves]
    one, other = block.branch1(x.relu()), block.branch2(x.relu())
    torch.testing.assert_close(block(x), block.bn_skip(torch.cat(skip, 1)) + (one + other) / 2)


def test_shake_drop_scales_forward_by_alpha_and_backward_by_beta():
    """One gate per batch, α ~ U(-1, 1) and β ~ U(0, 1) per image; evaluation takes the expectation."""
    layer, factors = common.ShakeDrop(0.3), []
    for _ in range(3000):
        x = torch.ones(16, 2, 1, 1, requires_grad=True)
        out = layer.train()(x)
        factors.append(torch.stack([out.detach(), *torch.autograd.grad(out.sum(), x)]).squeeze())
    factors = torch.stack(factors)  # draws, ways, images, channels
    alive = (factors == 1).flatten(1).all(1)
    assert torch.equal(alive, (factors == 1).flatten(1).any(1)) and (factors[..., 0] == factors[..., 1]).all()
    assert alive.float().mean() == pytest.approx(0.7, abs=0.03) == factors[:, 0].mean().item()
    torch.testing.assert_close(layer.eval()(x), 0.7 * x)
    draws = factors[~alive, ..., 0].transpose(0, 1).flatten(1)  # α and β
    assert -1 <= draws[0].min() < -0.99 and 0 <= draws[1].min() < 0.01 and (draws.amax(1) > 0.99).all()
    assert draws.mean(1).tolist() == pytest.approx([0, 0.5], abs=0.02) and draws.max() < 1
    assert draws.var(1).tolist() == pytest.approx([1 / 3, 1 / 12], abs=0.02)


def test_pyramid_net_grows_linearly_and_its_shortcut_pools_and_pads_with_zeros():
    with torch.device("meta"):
        blocks = build_model("pyramid272", 10, "cifar10").blocks
    assert [block.residual[-1].death_rate for block in blocks] == pytest.approx(np.arange(1, 91) / 180)
    assert [block.residual[4].out_channels for block in blocks] == [16 + 200 * n // 90 for n in range(1, 91)]
    assert [n for n, block in enumerate(blocks) if block.residual[4].stride == (2, 2)] == [30, 60]
    block, x = common.PyramidBottleneck(4, 3, 2, 0.0).eval(), torch.randn(2, 4, 6, 6)
    nn.init.zeros_(block.residual[-2].weight)  # nothing but the shortcut
    torch.testing.assert_close(block(x), F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 8)))


@pytest.mark.parametrize("name", ["wresnet28_10", "shake26_2x32d", "pyramid272", "resnet50d"])
def test_models_keep_channels_last_and_bfloat16_and_compile_to_one_graph(name):
    """fullgraph: a host synchronisation or a Python branch on a draw would break the graph."""
    model, outputs, layout = slim(name), [], {"memory_format": torch.channels_last}
    for module in model.modules():
        if type(module).__name__.endswith(("Block", "Bottleneck")):
            module.register_forward_hook(lambda _, inputs, out: outputs.append(out))
    images = torch.rand(4, 3, 32, 32).contiguous(**layout)
    with torch.autocast("cpu", torch.bfloat16):
        model(images).float().square().mean().backward()
    assert {(out.dtype, out.is_contiguous(**layout)) for out in outputs} == {(torch.bfloat16, True)}
    assert all(p.grad.isfinite().all() for p in model.parameters())
    build = {"shake26_2x32d": common.ShakeShake(10, 4, 8), "pyramid272": common.PyramidNet(10, 20, 6, 4)}
    if name in build:
        compiled = torch.compile(build[name], backend="aot_eager", fullgraph=True)
        assert not torch.equal(compiled(images), compiled(images))


def layouts(state: dict) -> dict[str, dict]:
    """How other training code saves a state dict."""
    several = {key: value + 1 for key, value in state.items()}  # a moving average
    args = argparse.Namespace(lr=0.1, data=Path("/data"), when=datetime.datetime.now())
    step = np.float64(93.5)
    prefixed = lambda prefix: {prefix + key: value for key, value in state.items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    hyper = OrderedDict(width=4, schedule=np.arange(3.0), kind=np.dtype("f4"))
    return {
        "bare": state,
        "nested": {"optimizer": {"scale": {"x": torch.zeros(3)}}, "state_dict_ema": several}
        | {"weights": {"optimizer": optimizer, "model": prefixed("resnet.")}, "epoch": 3},
        "pytorch-cifar": {"net": prefixed("module."), "acc": step, "epoch": 3},
        "torchvision": {"model": state, "optimizer": optimizer, "epoch": 3, "args": args}
        | {"model_ema": {"n_averaged": torch.tensor(3)} | {f"module.{key}": several[key] for key in several}},
        "timm": {"epoch": 3, "arch": "resnext", "state_dict_ema": several, "state_dict": state, "args": args},
        "lightning": {
            "state_dict": prefixed("model."),
            "hyper_parameters": hyper,
            "callbacks": {"best": step},
        },
        "fairseq": {"model_state": prefixed("backbone."), "best_acc": np.float32(0.9), "ok": np.bool_(True)},
        "compiled": {"state_dict": prefixed("module._orig_mod."), "best": np.int64(3)},
    }


@pytest.mark.parametrize("kind", layouts({}))
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_other_training_code(kind, zipped, tmp_path):
    saved, file, model = slim("resnext").state_dict(), tmp_path / "checkpoint.pth", slim("resnext")
    torch.save(layouts(saved)[kind], file, _use_new_zipfile_serialization=zipped)
    origin = common.load_best_state(model, file)
    assert_equal_weights(model.state_dict(), saved)
    several = {"timm": " (state_dict, not state_dict_ema)", "torchvision": " (model, not model_ema)"}
    several["nested"] = " (weights.model, not state_dict_ema)"
    assert origin == f"{file}{several.get(kind, '')}"


def test_safetensors_load_where_the_package_is(tmp_path, monkeypatch):
    saved, file = slim("resnext").state_dict(), tmp_path / "model.safetensors"
    safetensors.torch.save_file({f"model.{key}": value for key, value in saved.items()}, file)
    assert_equal_weights(load_weights(slim("resnext"), file).state_dict(), saved)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="model.safetensors needs a package: pip install safetensors"):
        load_weights(slim("resnext"), file)


def test_robustbench_names_and_normalisation(tmp_path):
    state, file = slim("wideresnet").state_dict(), tmp_path / "file.pt"
    named = {key.replace("conv_shortcut", "convShortcut"): value for key, value in state.items()}
    torch.save({"state_dict": named | {key: torch.full((1, 3, 1, 1), 0.5) for key in ("mu", "sigma")}}, file)
    assert_equal_weights(load_weights(slim("wideresnet"), file).state_dict(), state)


def test_what_does_not_fit_or_carries_code_is_refused_and_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, model, weight, bias = Path("file.pt"), nn.Linear(3, 4), torch.zeros(4, 3), torch.zeros(4)
    trap = type("Trap", (), {"__reduce__": lambda self: (Path.touch, (Path("made"),))})()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for content, reason in (
        (None, "file.pt does not exist: give the path"),
        ((common.WEIGHTS / "digits-resnext.pt").read_bytes()[:50_000], "truncated or no checkpoint"),
        ({"state_dict": {"weight": trap}}, "getattr, which is more than tensors (no code is run)"),
        ({"state_dict": {}, "epoch": 3, 0: weight}, "holds no state dict"),
        ({"weight": weight.to(torch.cfloat), "bias": bias}, "holds no state dict"),
        ({"weight": weight}, "missing bias; choose the --model and --dataset it was trained for"),
        ({"weight": weight, "bias": bias, "extra": bias}, "file.pt does not fit this model: unexpected ext"),
        ({"weight": weight[:, :2], "bias": bias}, "misshaped weight is (4, 2), not (4, 3)"),
        ({"module.weight": weight, "bias": bias}, "missing weight; unexpected module.weight"),
    ):
        for zipped in (True, False):
            if isinstance(content, bytes):
                file.write_bytes(content)
            elif content is not None:
                torch.save(content, file, _use_new_zipfile_serialization=zipped)
            with pytest.raises(InputError, match=re.escape(reason)):
                load_weights(model, file)
            assert_equal_weights(model.state_dict(), before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.pt"]


def test_shipped_weights_and_published_names_are_those_of_the_readme():
    """Digits' classifiers: at least 98 % right on the clean test digits; their students 97 %."""
    readme = (common.WEIGHTS / "README.md").read_text()
    test = common.Images(*common.load_split("digits", "test"), MACHINE)
    for name in ("resnext", "wideresnet", "resnext-student", "wideresnet-student"):
        file, student = common.WEIGHTS / f"digits-{name}.pt", "student" in name
        model, source = load("student" if student else name, "digits", str(file) if student else None)
        assert source == str(file) and hashlib.sha256(file.read_bytes()).hexdigest() in readme
        assert common.evaluate([model], test)[0]["top1_accuracy"] >= 98 - student
    for file in common.WEIGHTS.glob("fashion_mnist-*.pt"):
        shipped = file.stem.removesuffix("-student").endswith("resnext") or "wideresnet" in file.stem
        assert not shipped or hashlib.sha256(file.read_bytes()).hexdigest() in readme, file
    for name, url in common.PUBLISHED_WEIGHTS.items():
        assert f"| `{name}` |" in readme and url.removeprefix(common.DRIVE) in readme


def test_a_missing_classifier_is_trained_and_kept(tmp_path, monkeypatch, capsys):
    few, file = [part[:100] for part in common.load_split("digits", "train")], tmp_path / "digits-resnext.pt"
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    monkeypatch.setattr(common, "load_split", lambda *_: few)
    assert load("resnext", "digits", dry_run=True)[1].startswith("untrained: a dry") and not file.exists()
    model, source = load("resnext", "digits")
    assert source == str(file) and "is missing: training resnext" in capsys.readouterr().out
    assert common.evaluate([model], common.Images(*few, MACHINE))[0]["top1_accuracy"] > 20
    assert_equal_weights(load("resnext", "digits")[0].state_dict(), model.state_dict())
    assert not capsys.readouterr().out  # nothing is trained again
    few[0] = few[0].flip(3)  # other pictures under the same name
    other, source = load("resnext", "digits")
    assert re.fullmatch(r"digits-resnext-[0-9a-f]{8}.pt", Path(source).name) and file.is_file()
    assert not torch.equal(other.classifier.weight, model.classifier.weight)


OWN = """import torch
def net(classes):
    return torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(192, classes))
def wrong(classes):
    return torch.nn.Flatten()
def broken(classes):
    return torch.nn.Linear(1, 1)
"""


def test_a_model_of_ones_own_is_trained_plainly_and_used_by_every_script(tmp_path):
    """Stopped within an epoch and resumed it is, to the last bit, the one that was never stopped."""
    (tmp_path / "mine.py").write_text(OWN)
    model, runs = f"{tmp_path / 'mine.py'}:net", [tmp_path / "one", tmp_path / "two"]
    train = ("common", "--train-weights", model, "--epochs", 2, "--checkpoint-minutes", 1e-9, "--run-dir")
    run_here(*train, runs[0])
    evaluate, common_evaluate = [], common.evaluate

    def stopping(*arguments):
        evaluate.append(1)
        if len(evaluate) == 2:
            raise KeyboardInterrupt
        return common_evaluate(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "evaluate", stopping)
        run_here(*train, runs[1])
    assert state_of(runs[1])["step"] == 39
    printed = run_here(*train, runs[1], "--resume")
    states = [torch.load(run / "weights.pt", weights_only=True)["state_dict"] for run in runs]
    assert_equal_weights(*states)
    accuracy = results_of(runs[0])["test_accuracy"]
    assert accuracy == results_of(runs[1])["test_accuracy"] > 50 and f"{accuracy:.2f} % of the 600" in printed
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "common.py")
    run_script(*launch, *train[1:], tmp_path / "ranks")
    for key, value in torch.load(tmp_path / "ranks/weights.pt", weights_only=True)["state_dict"].items():
        torch.testing.assert_close(value, states[0][key], atol=1e-5, rtol=0)
    flags = ("--dry-run", "--model", model, "--weights", runs[0] / "weights.pt", "--run-dir")
    for script in ("gretta", "advaa", "game_of_noise"):
        run_here(script, *flags, tmp_path / script)
        assert "the model itself" in results_of(tmp_path / script)["protocol"]
    for name, words in {"wrong": "gives (2, 3072)", "broken": "32 px", "absent": "absent"}.items():
        refused(tmp_path, "advaa.py", "--model", f"{tmp_path / 'mine.py'}:{name}", names=(words, "mine.py"))
    refused(tmp_path, "gretta.py", "--model", model, names=("--weights", "--train-weights"))


def test_published_checkpoints_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "WEIGHTS", tmp_path / "weights")
    saved, file = build_model("resnext", 100, "cifar100"), tmp_path / "weights" / "gretta-resnext.pth"
    common.save_atomically({"state_dict": saved.state_dict()}, tmp_path / "published")
    monkeypatch.setitem(common.PUBLISHED_WEIGHTS, "gretta-resnext", (tmp_path / "published").as_uri())
    assert load("resnext", "cifar100", "gretta-resnext", dry_run=True)[1].startswith("untrained")
    assert load("resnext", "cifar100", dry_run=True)[1].startswith("untrained") and not file.parent.exists()
    for weights, dry_run in ((None, False), ("gretta-resnext", True)):  # AugMix's is what comes for CIFAR-100
        model, source = load("resnext", "cifar100", weights, dry_run, classes=100)
        assert source == str(file)
        assert_equal_weights(model.state_dict(), saved.state_dict())
    with pytest.raises(InputError, match="gretta-resnext.pth does not fit this model: misshaped"):
        load("resnext", "digits", "gretta-resnext")
    with pytest.raises(InputError, match="no weights of resnext for cifar10 are known: .*--weights"):
        load("resnext", "cifar10")
    assert load("resnext", "fake")[1] == "untrained"


def test_imagenet_weights_are_torchvisions(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    assert load("resnet18", "folder", dry_run=True)[1].startswith("untrained")
    saved = build_model("resnet18", 1000, "imagenet").state_dict()
    common.save_atomically({key: saved[key] for key in saved if "tracked" not in key}, file)  # as of 2016
    model, source = load("resnet18", "imagenet", classes=1000)
    assert source == str(file) and torch.equal(model.fc.weight, saved["fc.weight"])
    model, source = load("resnet18", "folder")
    assert source == f"{file}, but for fc.weight, fc.bias (another number of classes)"
    assert model.fc.weight.shape == (10, 512) and torch.equal(model.conv1.weight, saved["conv1.weight"])
    with pytest.raises(InputError, match="torchvision has no weights of 'resnet50d': .*--weights"):
        load("resnet50d", "folder")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{file}: truncated.*remove it"):
        load("resnet18", "folder")


def test_affine_warp_and_contrast_agree_with_pil():
    """Rotation, anisotropic zoom and translation at once, about the same centre."""
    images = F.interpolate(torch.rand(3, 3, 8, 8), size=(40, 32), mode="bicubic").clamp(0, 1)
    scale = torch.tensor([[1.2, 0.8], [0.9, 1.1], [1.0, 1.3]])
    translation, degrees = torch.tensor([[3, -2], [0.5, 1.5], [-4, 2]]), torch.tensor([20.0, -30, 0])
    warped = common.affine_warp(images, common.affine_matrix(scale, translation, degrees))
    for image, result, s, t, d in zip(images, warped, scale, translation, degrees.deg2rad().tolist()):
        rotation = np.array([[math.cos(d), math.sin(d)], [-math.sin(d), math.cos(d)]])
        inverse, centre = np.linalg.inv(rotation @ np.diag(s)), np.array([16, 20])  # the corner pixel's: 0.5
        x, y = centre - inverse @ (centre + t.numpy())
        how = Image.Transform.AFFINE, (*inverse[0], x, *inverse[1], y), Image.Resampling.BILINEAR
        expected = [np.array(Image.fromarray(plane).transform((32, 40), *how)) for plane in image.numpy()]
        difference = np.abs(np.stack(expected) - result.numpy())[:, 8:-8, 8:-8]
        assert difference.max() < 2e-3  # borders are treated otherwise
    images, factors = common.to_float((images * torch.tensor([[[255]], [[150]], [[50]]])).byte()), scale[:, 1]
    for image, result, factor in zip(images, common.adjust_contrast(images, factors), factors.tolist()):
        pil = Image.fromarray(common.to_uint8(image).permute(1, 2, 0).numpy())
        expected = np.array(ImageEnhance.Contrast(pil).enhance(factor)) / 255
        assert np.abs(expected - result.permute(1, 2, 0).numpy()).max() < 1.6 / 255


def test_light_augmentation():
    """CIFAR: up to 4 px and mirrored; Fashion-MNIST: 2; digits: ±1 px, zoom, ±5°; pictures on disk: nothing."""
    images, draws = torch.rand(3, 3, 32, 32), torch.tensor([[0, 0, -0.1], [0.99, 0, 0.1], [0, -0.99, 0.1]])
    assert common.light_augmentation(images, "folder", draws) is images
    expected = images[0].flip(2), F.pad(images[1], (4, -4)), F.pad(images[2], (0, 0, -4, 4))
    done = common.light_augmentation(images, "cifar10", draws)
    torch.testing.assert_close(done, torch.stack(expected), atol=1e-4, rtol=0)
    expected = images[0].flip(2), F.pad(images[1], (2, -2)), F.pad(images[2], (0, 0, -2, 2))
    done = common.light_augmentation(images, "fashion_mnist", draws)
    torch.testing.assert_close(done, torch.stack(expected), atol=1e-4, rtol=0)
    zoom, shift, degrees = torch.tensor([[1.05, 0.95]]), torch.tensor([[1.0, -1]]), torch.tensor([5.0])
    done = common.light_augmentation(images[:1], "mnist", torch.tensor([[1.0, -1, 1, -1, 1]]))
    matrix = common.affine_matrix(zoom, shift, degrees)
    torch.testing.assert_close(done, common.affine_warp(images[:1], matrix))
