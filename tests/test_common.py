"""Models, data, machine, checkpoints and results of common.py."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script
from PIL import Image

import common

REFERENCE = json.loads((Path(__file__).parent / "augmix_checkpoints.json").read_text())


def filled_state_dict(entries: list) -> dict:
    """The deterministic weights that the reference logits were computed with (entry k holds v = cos(0.37·j + k))."""
    state = {}
    for k, (name, shape) in enumerate(entries):
        v = np.cos(0.37 * np.arange(math.prod(shape)) + k).reshape(shape)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape, np.int64)
        elif name.endswith("running_var"):
            value = 1 + 0.1 * v
        elif name.endswith(("running_mean", "bias")):
            value = 0.1 * v
        elif len(shape) == 1:
            value = 1 + 0.1 * v
        else:
            value = v * math.sqrt(2 / math.prod(shape[1:]))
        state[name] = torch.from_numpy(np.asarray(value)).to(torch.int64 if name.endswith("tracked") else torch.float32)
    return state


@pytest.mark.parametrize("name", ["resnext", "wideresnet"])
def test_key_names_and_shapes_are_those_of_the_published_checkpoints(name):
    model = common.build_model(name, 100, "cifar100")
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == REFERENCE[name]["state_dict"]


def test_wide_resnet_gives_the_reference_logits(tmp_path):
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in filled_state_dict(REFERENCE["wideresnet"]["state_dict"]).items()}}, tmp_path / "w.pt"
    )
    model = common.load_weights(common.build_model("wideresnet", 100, "cifar100"), tmp_path / "w.pt").eval()
    images = torch.from_numpy(0.5 + 0.5 * np.cos(0.11 * np.arange(2 * 3 * 32 * 32))).float().view(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)  # normalises by 0.5/0.5 itself
    assert (logits - torch.tensor(REFERENCE["wideresnet"]["logits"])).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["resnext", "wideresnet", "student"])
def test_shipped_digits_weights(name):
    """Small, safe to load, with the sha256 that weights/README.md gives, and at least 98 % right on the clean test digits."""
    files = [common.WEIGHTS / f"digits-{name}.pt"] if name != "student" else sorted(common.WEIGHTS.glob("digits-*-student.pt"))
    assert files and all(file.is_file() for file in files)
    for file in files:
        assert file.stat().st_size <= 2.5e6
        assert hashlib.sha256(file.read_bytes()).hexdigest() in (common.WEIGHTS / "README.md").read_text()
        assert all(isinstance(value, torch.Tensor) for value in torch.load(file, weights_only=True).values())
        model = common.load_weights(common.build_model(name, 10, "digits"), file)
        assert sum(parameter.numel() for parameter in model.parameters()) <= 600_000
        if name != "student":
            assert common.evaluate(model, *common.load_split("digits", "test"), common.start_machine("cpu"))["top1_accuracy"] >= 98


def test_models_by_name():
    for name, classes, dataset, side in (
        ("resnext", 100, "cifar100", 32),
        ("wideresnet", 10, "cifar10", 32),
        ("resnet18", 7, "imagenet", 64),
        ("student", 10, "digits", 32),
    ):
        assert common.build_model(name, classes, dataset).eval()(torch.rand(2, 3, side, side)).shape == (2, classes)
    with pytest.raises(common.InputError, match="unknown model 'resnet19'"):
        common.build_model("resnet19", 10, "digits")
    with pytest.raises(common.InputError, match="vit_b_16.*32 px"):
        common.check_input_size(common.build_model("vit_b_16", 10, "digits"), "vit_b_16", 32)


def test_torchvision_models_normalise_inside_and_keep_their_keys():
    from torchvision.models import resnet18

    model, plain = common.build_model("resnet18", 5, "imagenet"), resnet18(num_classes=5)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 64, 64)
    normalised = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(model.eval()(images), plain.eval()(normalised))


def test_missing_digits_weights_are_trained_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    train = common.train_classifier
    monkeypatch.setattr(common, "train_classifier", lambda *arguments, **settings: train(*arguments, **settings | {"epochs": 1}))
    model, machine = common.build_model("resnext", 10, "digits"), common.start_machine("cpu")
    file = tmp_path / "digits-resnext.pt"
    assert "untrained" in common.load_small_weights(model, "resnext", "digits", machine, dry_run=True) and not file.exists()
    assert common.load_small_weights(model, "resnext", "digits", machine) == str(file)
    assert "is missing: training resnext" in capsys.readouterr().out
    kept = torch.load(file, weights_only=True)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    stamp = file.stat().st_mtime_ns
    common.load_small_weights(model, "resnext", "digits", machine)
    assert file.stat().st_mtime_ns == stamp and "missing" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------- data


def test_digits_are_the_published_integers_with_a_fixed_stratified_split():
    with np.load(ROOT / "data/digits.npz") as archive:
        assert archive["images"].shape == (1797, 8, 8) and archive["images"].min() == 0 and archive["images"].max() == 16
        assert np.bincount(archive["labels"]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    shares = {}
    for split, size in (("train", 1000), ("val", 197), ("test", 600)):
        images, labels = common.load_split("digits", split)
        assert images.shape == (size, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
        assert images[:, :, :6].sum() == 0 and images[:, :, :, -6:].sum() == 0 and images.max() == 255
        shares[split] = labels.bincount(minlength=10) / size
    assert (shares["train"] - shares["test"]).abs().max() < 0.005 and (shares["train"] - shares["val"]).abs().max() < 0.005


def test_modified_digits_are_always_the_same_and_differ_from_image_to_image():
    images, labels, source = common.modified_digits("val", variants=3)
    again = common.modified_digits("val", variants=3)[0]
    assert images.shape == (591, 3, 32, 32) and torch.equal(images, again)
    assert torch.equal(labels, common.load_split("digits", "val")[1][source])
    assert not torch.equal(images[:197], images[197:394])
    assert not torch.equal(images, common.modified_digits("val", variants=3, seed=1)[0])


def test_affine_warp_agrees_with_pil():
    """Rotation, anisotropic zoom and translation at once, against PIL's bilinear affine transform about the same centre."""
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(4, 3, 8, 8, generator=generator), size=(40, 32), mode="bicubic").clamp(0, 1)
    scale = torch.tensor([[1.0, 1.0], [1.2, 0.8], [0.9, 1.1], [1.0, 1.3]])
    translation, degrees = torch.tensor([[3.0, -2.0], [0.5, 1.5], [0.0, 0.0], [-4.0, 2.0]]), torch.tensor([0.0, 20.0, -30.0, 10.0])
    warped = common.affine_warp(images, common.affine_matrix(scale, translation, degrees))
    centre = np.array([(32 - 1) / 2, (40 - 1) / 2])
    for image, result, s, t, d in zip(images, warped, scale.numpy(), translation.numpy(), np.deg2rad(degrees.numpy())):
        forward = np.array([[np.cos(d), np.sin(d)], [-np.sin(d), np.cos(d)]]) @ np.diag(s)
        inverse = np.linalg.inv(forward)
        offset = centre + 0.5 - inverse @ (centre + 0.5 + t)  # PIL's coordinates put the first pixel's centre at 0.5
        coefficients = (inverse[0, 0], inverse[0, 1], offset[0], inverse[1, 0], inverse[1, 1], offset[1])
        for channel in range(3):
            pil = Image.fromarray(image[channel].numpy()).transform((32, 40), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
            difference = torch.from_numpy(np.asarray(pil).copy()) - result[channel]
            assert difference[8:-8, 8:-8].abs().max() < 2e-3  # borders are treated otherwise


def test_contrast_agrees_with_pil():
    from PIL import ImageEnhance

    images = common.to_float((torch.rand(3, 3, 24, 24) * 255).to(torch.uint8))
    contrast = torch.tensor([0.5, 1.0, 1.4])
    for image, result, factor in zip(images, common.adjust_contrast(images, contrast), contrast):
        pil = ImageEnhance.Contrast(Image.fromarray(common.to_uint8(image).permute(1, 2, 0).numpy())).enhance(factor.item())
        assert (torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255 - result).abs().max() < 1.6 / 255


def test_batches_cover_each_image_at_most_once():
    batches = common.epoch_batches(103, 10, torch.Generator().manual_seed(3))
    assert batches.shape == (10, 10) and batches.unique().numel() == 100 and batches.max() < 103
    assert not torch.equal(batches, common.epoch_batches(103, 10, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("size, world_size", [(10, 1), (10, 3), (2, 3), (7, 4)])
def test_ranks_share_out_every_row_once(size, world_size):
    rows = torch.arange(size)
    parts = [common.Machine(torch.device("cpu"), rank, world_size).own_rows(rows) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), rows) and max(map(len, parts)) - min(map(len, parts)) <= 1


# -------------------------------------------------------------------------------------------------- machine, checkpoints


def test_machine_seeds_everything_and_reads_no_torchrun_environment_alone():
    draws = []
    for _ in range(2):
        machine = common.start_machine("cpu", amp=True, seed=5)
        draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1]
    assert machine.is_main and machine.world_size == 1 and machine.amp_dtype == torch.bfloat16
    with machine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with common.start_machine("cpu").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    common.save_atomically({"step": 1}, file)

    def break_off(content, stream):
        stream.write(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(common.InputError, match="cannot write .*disk full"):
        common.save_atomically({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1} and [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_evaluation_is_in_percent_and_restores_the_mode():
    model = common.build_model("resnext", 10, "digits").train()
    images, labels = common.load_split("digits", "val")
    figures = common.evaluate(model, images, labels, common.start_machine("cpu"))
    logits = model.eval()(common.to_float(images)).detach()
    assert figures["top1_accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert figures["top5_accuracy"] >= figures["top1_accuracy"] and figures["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert model.train().training and common.accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1])) == 50


# --------------------------------------------------------------------------------------------------------------- results


def write_result(directory: Path, seed: int, gretta: float, method: str = "vanilla", proportion: float = 0.2) -> Path:
    directory.mkdir()
    results = {
        "script": "gretta",
        "dataset": "digits",
        "model": "resnext",
        "method": method,
        "seed": seed,
        "train_on": "target",
        "proportion": proportion,
    }
    (directory / "results.json").write_text(json.dumps(results | {"accuracy": {"none": 60.0, "gretta": gretta}}))
    return directory


def test_table_is_mean_and_std_over_seeds(tmp_path):
    runs = [write_result(tmp_path / f"a{seed}", seed, value) for seed, value in enumerate((90.0, 92.0, 94.0))]
    runs += [write_result(tmp_path / "b", 0, 95.0, "whitebox", 0.01), write_result(tmp_path / "c", 1, 97.0, "whitebox", 0.01)]
    printed = run_script("common.py", *runs).stdout
    assert "(mean ± std over 2 to 3 seeds)" in printed
    assert "| vanilla |  | 92.00 ± 2.00 |" in printed and "| whitebox | 96.00 ± 1.41 |  |" in printed
    assert "| | 1 % | 20 % |" in printed and "| none | 60.00 ± 0.00 | 60.00 ± 0.00 |" in printed


def test_a_baseline_of_another_classifier_needs_its_own_table(tmp_path):
    runs = [write_result(tmp_path / "a", 0, 90.0), write_result(tmp_path / "b", 0, 91.0, "surrogate")]
    text = (tmp_path / "b/results.json").read_text()
    (tmp_path / "b/results.json").write_text(text.replace("60.0", "60.05"))  # another machine's rounding
    assert "**gretta digits resnext, accuracy** (mean ± std over 1 seed)" in common.table(runs)
    (tmp_path / "b/results.json").write_text(text.replace("60.0", "62.0"))
    with pytest.raises(common.InputError, match="b/results.json: none with seed 0 is there twice, with other settings: give each a table of its own"):
        common.table(runs)


def test_help_shows_defaults_and_takes_both_spellings():
    printed = run_script("gretta.py", "--help").stdout
    assert "python gretta.py --model resnext --est vanilla" in printed and "(default: 0.1)" in printed and "--num-samples" in printed
    assert common.Parser.hyphenate("--num_samples=3_0") == "--num-samples=3_0" and common.Parser.hyphenate("a_b") == "a_b"


def test_nothing_names_this_machine():
    """The project speaks of itself alone: no absolute home or work folder in any text file."""
    for file in [*ROOT.glob("*.py"), ROOT / "README.md", *ROOT.glob("*/README.md")]:
        assert not re.search(r"/(root|home|work)/", file.read_text()), file


def test_odd_batches_train_on_the_cpu():
    """oneDNN's backward pass through narrow channels_last convolutions wrote outside its memory for odd batches: in a process of its own."""
    program = (
        "import torch, common\n"
        "machine = common.start_machine('cpu')\n"
        "for name in ('wideresnet', 'resnext'):\n"
        "    model = common.build_model(name, 10, 'digits').to(memory_format=machine.weight_layout)\n"
        "    for size in (5, 15, 25):\n"
        "        for _ in range(4):\n"
        "            model(machine.layout(torch.rand(size, 3, 32, 32))).sum().backward()\n"
    )
    run_script("-c", program, OMP_NUM_THREADS="2")


def test_affine_batch_norm_changes_nothing_but_the_time():
    """Logits and the images' gradient as without it, and afterwards everything is as before."""
    machine = common.start_machine("cpu")
    images = torch.rand(6, 3, 32, 32, requires_grad=True)
    for name in ("resnext", "wideresnet"):
        model = common.load_weights(common.build_model(name, 10, "digits"), common.WEIGHTS / f"digits-{name}.pt").eval()
        expected = model(images)
        (gradient,) = torch.autograd.grad(expected.square().sum(), images)
        with common.affine_batch_norm(model, machine):
            logits = model(images)
            (affine_gradient,) = torch.autograd.grad(logits.square().sum(), images)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(affine_gradient, gradient, rtol=1e-3, atol=1e-3)
        assert torch.equal(model(images), expected) and not any("forward" in vars(module) for module in model.modules())


def test_a_table_refuses_two_runs_of_one_seed_that_differ(tmp_path):
    for name, error in (("a", 3.0), ("b", 9.0)):
        (tmp_path / name).mkdir()
        results = {"script": "advaa", "dataset": "digits", "model": "m", "method": "advaa", "seed": 0, "top1_error": error, "wall_seconds": error}
        common.write_json(tmp_path / name / "results.json", results)
    assert "| advaa | 3.00 | 3.00 |" in common.table([tmp_path / "a", tmp_path / "a"])
    with pytest.raises(common.InputError, match="advaa with seed 0 is there twice"):
        common.table([tmp_path / "a", tmp_path / "b"])
    for name, views in (("a", 2), ("b", 8)):
        common.write_json(tmp_path / name / "args.json", {"M": views})
    table = common.table([tmp_path / "b", tmp_path / "a"], ["M"])
    assert "| advaa, M 8 | 9.00 | 9.00 |" in table and "| advaa, M 2 | 3.00 | 3.00 |" in table
    with pytest.raises(common.InputError, match="--by N: .*a/args.json has no such setting"):
        common.table([tmp_path / "a"], ["N"])


def test_a_continued_runs_own_settings_go_before_those_of_a_configuration(tmp_path):
    import advaa

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(json.dumps({"M": 3, "epochs": 7, "git_commit": "x"}))
    (tmp_path / "conf.json").write_text(json.dumps({"M": 5, "Q": 2, "epochs": 9}))
    flags = ["--load-conf", str(tmp_path / "conf.json"), "--run-dir", str(tmp_path / "run")]
    args = advaa.parse_args([*flags, "--resume", "--epochs", "8"])
    assert (args.M, args.Q, args.epochs) == (3, 2, 8)
    assert advaa.parse_args(flags).M == 5
