"""advaa.py as a user runs it, on digits and on tiny CIFAR and ImageNet files, and the figures it writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_equal_weights, refused, results_of, run_here, run_script, state_of, without_times
from formats import make_cifar, make_imagenet, make_perturbed
from PIL import Image

import advaa
import common

SMALL = "--eval-split val --num-train 30 --epochs 3 --batch-size 10 --M 3 --Q 2 --log-every 2 --seed 3"
FAST = f"{SMALL} --controller-lr 0.05"  # policies change within three epochs
KINDS = ["--policy trivial", "--policy none", "--policy autoaugment --cutout 8"]
KINDS += ["--policy random --M 1 --model shake26_2x32d --lr-schedule step"]
KINDS += ["--no-carry-hidden --amp --M 2 --Q 1 --model pyramid272"]
MACHINE = common.Machine(torch.device("cpu"))


def run_advaa(flags: str, directory: Path) -> str:
    return run_here("advaa", *flags.split(), "--run-dir", directory)


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def model_of(file: Path, name: str = "wresnet28_10", dataset: str = "digits") -> torch.nn.Module:
    return common.load_weights(common.build_model(name, 10, dataset), file).eval()


def error_of(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return advaa.top1_error(model, common.Images(images, labels, MACHINE))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    run_advaa(FAST, directory)
    return directory


def test_what_a_run_writes(run):
    results = results_of(run)
    said = [results[key] for key in ("script", "dataset", "method", "seed", "n_train", "n_eval")]
    assert said == ["advaa", "digits", "advaa", 3, 30, 197]
    assert [*results["corruptions"], *results["shifted"]] == [*common.CORRUPTIONS, "mean", "modified"]
    for name in ("policies.png", "views.png"):
        with Image.open(run / name) as picture:
            assert picture.width > 300 and len(np.unique(np.asarray(picture))) > 50, name
    assert list(run.glob("events.out.tfevents*")) and (run / "advaa.py").is_file()
    records, log = lines_of(run / "policies.jsonl"), lines_of(run / "log.jsonl")
    epochs, steps = [line for line in log if "epoch" in line], [line for line in log if "lr" in line]
    assert [record["epoch"] for record in records] == [line["epoch"] for line in epochs] == [1, 2, 3]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    assert steps[0]["lr"] == pytest.approx(0.1 * 0.5 * (1 + np.cos(np.pi / 9)))
    for record, line in zip(records, epochs):
        assert advaa.policies_of(record).shape == (3, 2, 2, 2) and record["losses"] == line["losses"]
        assert line["loss"] == pytest.approx(sum(record["losses"]) / 3) and len(set(record["losses"])) == 3
    entropies = (epochs[0]["entropy"], epochs[2]["entropy"])
    assert (*results["controller"].values(),) == (*entropies, False) and entropies[0] > 0.99 > entropies[1]


def test_figures_are_those_of_the_last_and_of_the_best_classifier(run):
    results, model, val = results_of(run), model_of(run / "checkpoint.pt"), common.load_split("digits", "val")
    history, best = state_of(run)["progress"]["history"], results["best_on_validation"]
    assert results["top1_error"] == history[-1]["val_error"] == pytest.approx(error_of(model, *val))
    modified = error_of(model, *common.modified_digits("val")[:2])
    assert results["shifted"]["modified"] == pytest.approx(modified)
    corrupted = [common.corrupt_uint8(val[0], "contrast", severity, seed=0) for severity in range(1, 6)]
    errors = [error_of(model, images, val[1]) for images in corrupted]
    assert results["corruptions"]["contrast"] == pytest.approx(sum(errors) / 5)
    least = min(history, key=lambda entry: entry["val_error"])
    assert best == {key: least[key] for key in ("epoch", "val_error")}
    assert best["val_error"] == pytest.approx(error_of(model_of(run / "best.pt"), *val))


def test_a_replay_reproduces_the_run_and_an_evaluation_its_figures(run, tmp_path):
    run_advaa(f"{SMALL} --replay {run}/policies.jsonl", tmp_path / "replay")
    assert lines_of(tmp_path / "replay" / "policies.jsonl") == lines_of(run / "policies.jsonl")
    assert_equal_weights(state_of(tmp_path / "replay")["classifier"], state_of(run)["classifier"])
    results = results_of(tmp_path / "replay")
    assert results["method"] == "replay" and results["controller"]["entropy_first"] is None
    shutil.copytree(run, tmp_path / "run")
    run_advaa("--evaluate", tmp_path / "run")
    assert without_times(results_of(tmp_path / "run")) == without_times(results_of(run))
    run_advaa(f"-e true --weights {run}/checkpoint.pt --eval-split val", tmp_path / "again")
    again = results_of(tmp_path / "again")
    assert again["method"] == "run-checkpoint" and not (tmp_path / "again" / "checkpoint.pt").exists()
    for key in ("top1_error", "top5_error", "shifted", "corruptions"):
        assert again[key] == results_of(run)[key]


def test_killed_in_the_middle_of_an_epoch_it_continues_as_if_never_stopped(run, tmp_path, monkeypatch):
    directory, factor = tmp_path / "run", advaa.lr_factor
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(advaa, "lr_factor", lambda *at: factor(*at) if at[1] != 5 else 1 / 0)
        run_advaa(f"{FAST} --resume --checkpoint-minutes 1e-9", directory)
    assert state_of(directory)["step"] == 5 and not (directory / "results.json").exists()
    torch.manual_seed(99)
    run_advaa("--resume", directory)  # the rest is in its args.json
    for part in ("classifier", "controller"):
        assert_equal_weights(state_of(directory)[part], state_of(run)[part])
    assert without_times(results_of(directory)) == without_times(results_of(run))
    for name in ("policies.jsonl", "log.jsonl"):
        assert lines_of(directory / name) == lines_of(run / name)
    assert "error (%)" in run_advaa("--resume", directory)  # it had finished


@pytest.mark.parametrize("flags", KINDS)
def test_each_policy(flags, tmp_path):
    run_advaa(f"--dry-run {flags}", tmp_path / "run")
    results, history = results_of(tmp_path / "run"), state_of(tmp_path / "run")["progress"]["history"]
    method = flags.split()[1] if flags.startswith("--policy") else "advaa"
    written = [(tmp_path / "run" / name).exists() for name in ("policies.jsonl", "policies.png")]
    assert results["method"] == method and written == [method in ("advaa", "random")] * 2
    assert len(history) == 2 and ("entropy" in history[0]) == (method == "advaa")
    if method == "none":  # and without crops on digits, all views are the image
        assert max(history[0]["losses"]) == pytest.approx(min(history[0]["losses"]), rel=1e-5)


def test_transfer_and_collapse(run, tmp_path):
    """One run's policies train another model; a controller of one certain choice collapses, unless guarded."""
    run_advaa(f"--dry-run --replay {run}/policies.jsonl --M 3 --Q 2 --model resnet50", tmp_path / "transfer")
    records = zip(lines_of(tmp_path / "transfer" / "policies.jsonl"), lines_of(run / "policies.jsonl"))
    assert all(found["policies"] == other["policies"] for found, other in records)
    for guard in ("", " --collapse-guard"):
        run_advaa(f"--dry-run --controller-lr 30{guard}", tmp_path / f"collapse{guard}")
        controller = results_of(tmp_path / f"collapse{guard}")["controller"]
        assert controller["collapsed"] == (not guard) == (controller["entropy_last"] < advaa.COLLAPSED)


@pytest.mark.slow
def test_several_processes_play_the_same_game(tmp_path):
    """But for rounding, of which Adam makes parts of a step (1e-2); 10 images go to 3 ranks unevenly."""
    flags = "--num-train 20 --batch-size 10 --epochs 2 --M 2 --Q 2 --lr 1e-3 --cutout 8 --eval-split val"
    run_advaa(flags, tmp_path / "1")
    one, records = state_of(tmp_path / "1"), lines_of(tmp_path / "1" / "policies.jsonl")
    for processes in (2, 3):
        directory = tmp_path / f"{processes}"
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "advaa.py")
        run_script(*launch, *flags.split(), "--run-dir", directory)
        for record, other in zip(records, lines_of(directory / "policies.jsonl"), strict=True):
            assert record["policies"] == other["policies"]
            assert other["losses"] == pytest.approx(record["losses"], rel=1e-5)
        many = state_of(directory)
        torch.testing.assert_close(many["classifier"], one["classifier"], rtol=1e-3, atol=5e-5)
        torch.testing.assert_close(many["controller"], one["controller"], rtol=0, atol=2e-2)
        assert results_of(directory)["top1_error"] == results_of(tmp_path / "1")["top1_error"]


@pytest.mark.slow
def test_the_commands_of_the_source_and_mixed_precision(tmp_path):
    """Its main.py and evaluate.py, renamed; the configuration is a JSON of flags."""
    conf, logs = tmp_path / "conf.json", tmp_path / "logs"
    conf.write_text(json.dumps({"batch_size": 10, "epochs": 1, "num_train": 20, "eval_split": "val"}))
    command = ("advaa.py", "--load_conf", conf, "--logdir", logs, "--seed", 0)
    run_script("-m", "torch.distributed.launch", "--nproc_per_node", 2, *command, "--M", 4, "--amp")
    first = results_of(logs)
    assert first["n_train"] == 20 and "4 views of each" in first["protocol"]
    run_script(*command, "--evaluate")
    assert results_of(logs)["protocol"] == first["protocol"] and results_of(logs)["n_train"] == 20


def test_cifar10_with_its_corrupted_and_perturbed_sets(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # of made-up files
    data, directory = tmp_path / "data", tmp_path / "run"
    make_cifar(data, "cifar10", 200, 20, 20)
    make_perturbed(data, advaa.PERTURBATIONS)
    flags = f"--dataset cifar10 --data-root {data} --model wideresnet --M 2 --dry-run"
    run_advaa(flags, directory)
    results, model = results_of(directory), model_of(directory / "checkpoint.pt", "wideresnet", "cifar10")
    assert len(results["corruptions"]) == 16 and "best_on_validation" not in results
    for name, noise in (("gaussian_noise", True), ("tilt", False)):
        frames = torch.from_numpy(np.load(data / f"CIFAR-10-P/{name}.npy")).permute(0, 1, 4, 2, 3)
        predictions = common.predict_logits(model, frames.flatten(0, 1), MACHINE).argmax(1).view(3, 5)
        assert results["flip_probability"][name] == pytest.approx(advaa.flip_probability(predictions, noise))
    tilt, other = data / "CIFAR-10-P/tilt.npy", ("--run-dir", tmp_path / "other")
    np.save(tilt, np.zeros((3, 32, 32, 3), np.uint8))
    refused(tmp_path, "advaa.py", *flags.split(), *other, names=(tilt, "(3, 32, 32, 3)", "cifar10-p"))
    tilt.unlink()
    refused(tmp_path, "advaa.py", *flags.split(), *other, names=(tilt, "missing", "cifar10-p"))
    for name in ("CIFAR-10-C", "CIFAR-10-P"):  # without them the clean figures remain, and notes
        shutil.rmtree(data / name)
    printed, results = run_advaa(f"{flags} --validation", tmp_path / "alone"), results_of(tmp_path / "alone")
    assert all(f"CIFAR-10-{kind} is missing" in printed for kind in "CP") and results["best_on_validation"]
    assert results["corruptions"] == {} and "flip_probability" not in results


def test_imagenet_folders(tmp_path):
    make_imagenet(tmp_path / "data", corrupted=0)
    flags = f"--dataset imagenet --data-root {tmp_path}/data --model resnet18 --batch-size 4 --M 2"
    run_advaa(f"{flags} --dry-run", tmp_path / "run")
    results = results_of(tmp_path / "run")
    assert (results["n_train"], results["n_eval"], results["corruptions"]) == (12, 4, {})
    shutil.rmtree(tmp_path / "data" / "imagenet" / "train")  # to evaluate, the validation folder will do
    run_advaa(f"{flags} --evaluate --weights {tmp_path}/run/checkpoint.pt", tmp_path / "again")
    assert results_of(tmp_path / "again")["top1_error"] == results["top1_error"]


MISTAKES = {
    "--M 1": ("--M 1", "raise --M"),
    "--Q 0": ("--Q", "see --help"),
    "--policy replay": ("--replay FILE",),
    "--replay none.jsonl": ("none.jsonl",),
    "--num-train 1001": ("--num-train 1001", "1000"),
    "--model resnext999": ("resnext999",),
    "--dataset cifar10 --eval-split val": ("--validation",),
    "--evaluate": ("--weights",),
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_natural_mistakes(flags, tmp_path):
    refused(tmp_path, "advaa.py", *flags.split(), "--run-dir", tmp_path / "run", names=MISTAKES[flags])


def test_a_run_is_not_overwritten_or_mixed_with_another(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    mixed = {"--seed 3": "not empty", "--resume --policy random": "--policy advaa", "--resume --M 4": "--M 3"}
    mixed |= {"--evaluate --eval-split test": "--eval-split val", "--evaluate --dry-run": "--dry-run"}
    for flags, said in mixed.items():
        refused(tmp_path, "advaa.py", *flags.split(), "--run-dir", tmp_path / "run", names=(said,))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    factor = advaa.lr_factor
    monkeypatch.setattr(advaa, "lr_factor", lambda *at: factor(*at) * (float("nan") if at[1] == 4 else 1))
    with pytest.raises(common.InputError, match="not finite at step 6.*lower --lr"):
        run_advaa(f"{SMALL} --checkpoint-every 1", tmp_path / "run")
    assert all(value.isfinite().all() for value in state_of(tmp_path / "run")["classifier"].values())
    assert len(lines_of(tmp_path / "run" / "policies.jsonl")) == 1
