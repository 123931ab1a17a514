"""advaa.py as a user runs it, on digits and on tiny CIFAR and ImageNet files, and the figures in the files it writes."""

import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_equal_weights, results_of, run_here, run_script, state_of, without_times
from formats import make_cifar, make_perturbed
from PIL import Image

import advaa
import common

SMALL = ("--eval-split", "val", "--num-train", "30", "--epochs", "3", "--batch-size", "10", "--M", "3", "--Q", "2", "--checkpoint-every", "1", "--log-every", "2")  # fmt: skip
FAST_CONTROLLER = ("--controller-lr", "0.05")  # policies change within three epochs


run_advaa = partial(run_here, "advaa")


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One small run that several tests look at."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    run_advaa(*SMALL, *FAST_CONTROLLER, "--run-dir", directory, "--seed", 3)
    return directory


def test_a_run_writes_what_the_readme_says(run):
    results, arguments = results_of(run), json.loads((run / "args.json").read_text())
    expected = {"script": "advaa", "dataset": "digits", "model": "wresnet28_10", "method": "advaa", "seed": 3, "n_train": 30, "n_eval": 197}
    assert {key: results[key] for key in expected} == expected
    assert list(results["corruptions"]) == [*common.CORRUPTIONS, "mean"]
    assert results["corruptions"]["mean"] == pytest.approx(sum(results["corruptions"][name] for name in common.CORRUPTIONS) / 15)
    assert results["top5_error"] <= results["top1_error"] and set(results["shifted"]) == {"modified"}
    assert (arguments["M"], arguments["Q"], arguments["lr_schedule"], arguments["world_size"]) == (3, 2, "cosine", 1)
    assert (run / "advaa.py").read_bytes() == (ROOT / "advaa.py").read_bytes()
    for name in ("policies.png", "curves.png", "views.png"):
        with Image.open(run / name) as picture:
            assert picture.width > 400 and picture.height > 300 and len(np.unique(np.asarray(picture))) > 50, name
    assert list(run.glob("events.out.tfevents*"))


def test_policies_losses_and_histograms_agree(run):
    records, state = lines_of(run / "policies.jsonl"), state_of(run)
    epochs = [line for line in lines_of(run / "log.jsonl") if "epoch" in line]
    steps = [line for line in lines_of(run / "log.jsonl") if "lr" in line]
    assert [record["epoch"] for record in records] == [line["epoch"] for line in epochs] == [1, 2, 3] and records == state["records"]
    assert [line["step"] for line in steps] == [2, 4, 6, 8] and steps[0]["lr"] == pytest.approx(0.1 * 0.5 * (1 + np.cos(np.pi / 9)))
    for record, line in zip(records, epochs):
        policies = torch.tensor([[[[advaa.OPS.index(op), m] for op, m in pair] for pair in policy] for policy in record["policies"]])
        assert policies.shape == (3, 2, 2, 2) and advaa.histograms(policies) == {key: line[key] for key in ("ops", "magnitudes")}
        assert record["losses"] == line["losses"] and line["loss"] == pytest.approx(sum(record["losses"]) / 3, rel=1e-5)
        assert len(set(record["losses"])) == 3  # each policy has its own
        assert 0 < line["entropy"] <= 1 and 0 <= line["val_error"] <= 100
    controller = results_of(run)["controller"]
    assert (controller["entropy_first"], controller["entropy_last"]) == (epochs[0]["entropy"], epochs[2]["entropy"]) and not controller["collapsed"]
    assert controller["entropy_first"] > 0.99 and controller["entropy_last"] < controller["entropy_first"]


def test_figures_in_results_are_those_of_the_last_epochs_classifier(run):
    results, machine = results_of(run), common.start_machine("cpu")
    model = common.load_weights(common.build_model("wresnet28_10", 10, "digits"), run / "checkpoint.pt").eval()
    images, labels = common.load_split("digits", "val")
    figures = common.evaluate(model, images, labels, machine)
    assert results["top1_error"] == pytest.approx(100 - figures["top1_accuracy"]) and results["top5_error"] == pytest.approx(
        100 - figures["top5_accuracy"]
    )
    modified = common.evaluate(model, *common.modified_digits("val")[:2], machine)
    assert results["shifted"]["modified"] == pytest.approx(100 - modified["top1_accuracy"])
    errors = []
    for severity in range(1, 6):
        corrupted = common.to_uint8(common.corrupt(common.to_float(images), "contrast", severity, seed=0))
        errors.append(100 - common.evaluate(model, corrupted, labels, machine)["top1_accuracy"])
    assert results["corruptions"]["contrast"] == pytest.approx(sum(errors) / 5)
    assert [entry["val_error"] for entry in state_of(run)["history"]][-1] == pytest.approx(results["top1_error"])  # val is what it was tested on here


def test_the_best_on_validation_is_kept_beside(run):
    best, history = results_of(run)["best_on_validation"], state_of(run)["history"]
    assert best["val_error"] == min(entry["val_error"] for entry in history) == history[best["epoch"] - 1]["val_error"]
    model = common.load_weights(common.build_model("wresnet28_10", 10, "digits"), run / "best.pt").eval()
    accuracy = common.evaluate(model, *common.load_split("digits", "val"), common.start_machine("cpu"))["top1_accuracy"]
    assert best["val_error"] == pytest.approx(100 - accuracy)


def test_a_replay_reproduces_the_stream_of_views(run, tmp_path):
    """Same seed and model: the same images under the same policies, signs, places and partners, so the same losses to the last bit."""
    run_advaa(*SMALL, "--replay", run / "policies.jsonl", "--run-dir", tmp_path / "replay", "--seed", 3)
    assert lines_of(tmp_path / "replay" / "policies.jsonl") == lines_of(run / "policies.jsonl")
    assert_equal_weights(state_of(tmp_path / "replay")["state_dict"], state_of(run)["state_dict"])
    results = results_of(tmp_path / "replay")
    assert results["method"] == "replay" and results["controller"] == {"entropy_first": None, "entropy_last": None, "collapsed": False}
    assert results["corruptions"] == results_of(run)["corruptions"]


def test_a_killed_run_continues_as_if_nothing_had_happened(run, tmp_path, monkeypatch, capsys):
    save, directory = common.save_atomically, tmp_path / "run"

    def save_and_die(content, file, **how):
        save(content, file, **how)
        if content.get("epoch") == 2 and "optimizer" in content:
            raise KeyboardInterrupt

    flags = (*SMALL, *FAST_CONTROLLER, "--run-dir", directory, "--seed", 3, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_atomically", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run_advaa(*flags)
    assert "starting afresh" in capsys.readouterr().out and not (directory / "results.json").exists() and state_of(directory)["epoch"] == 2
    torch.manual_seed(99)
    run_advaa(*flags)
    assert_equal_weights(state_of(directory)["state_dict"], state_of(run)["state_dict"])
    assert_equal_weights(state_of(directory)["controller"], state_of(run)["controller"])
    assert without_times(results_of(directory)) == without_times(results_of(run))
    assert (directory / "policies.jsonl").read_text() == (run / "policies.jsonl").read_text()
    assert lines_of(directory / "log.jsonl") == lines_of(run / "log.jsonl")
    # finished: reported again, nothing is trained
    before = (directory / "checkpoint.pt").read_bytes()
    run_advaa(*flags)
    assert "holds a finished run" in capsys.readouterr().out and (directory / "checkpoint.pt").read_bytes() == before


def test_a_model_that_draws_continues_with_the_same_draws(tmp_path, monkeypatch):
    """Shake-Shake draws in every pass: its random state is resumed too; so is a controller whose state starts anew."""
    flags = ("--dry-run", "--M", 2, "--model", "shake26_2x32d", "--reset-hidden", "--checkpoint-every", 1, "--run-dir")
    run_advaa(*flags, tmp_path / "whole")
    save = common.save_atomically

    def save_and_die(content, file, **how):
        save(content, file, **how)
        if content.get("epoch") == 1 and "optimizer" in content:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_atomically", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run_advaa(*flags, tmp_path / "cut")
    shutil.copytree(tmp_path / "cut", tmp_path / "lower")
    torch.manual_seed(99)
    run_advaa("--dry-run", "--resume", "--run-dir", tmp_path / "cut")  # the rest is in its args.json
    assert_equal_weights(state_of(tmp_path / "cut")["state_dict"], state_of(tmp_path / "whole")["state_dict"])
    assert json.loads((tmp_path / "cut" / "args.json").read_text())["carry_hidden"] is False
    # Rates may be others from there on.
    run_advaa("--dry-run", "--resume", "--run-dir", tmp_path / "lower", "--lr", 0.01, "--weight-decay", 0.002, "--controller-lr", 0.003)
    groups = {name: state_of(tmp_path / "lower")[name]["param_groups"][0] for name in ("optimizer", "controller_optimizer")}
    assert groups["optimizer"]["weight_decay"] == 0.002 and groups["controller_optimizer"]["lr"] == 0.003


def test_transfer_and_collapse(run, tmp_path):
    """One run's policies train another model; and a controller of which one choice is certain has collapsed, unless it is guarded."""
    run_advaa(*SMALL, "--replay", run / "policies.jsonl", "--model", "resnet50", "--dry-run", "--batch-size", 10, "--run-dir", tmp_path / "transfer")
    records, others = lines_of(tmp_path / "transfer" / "policies.jsonl"), lines_of(run / "policies.jsonl")
    assert [record["policies"] for record in records] == [record["policies"] for record in others[:2]] and records[0]["losses"] != others[0]["losses"]
    for flags, collapsed in (((), True), (("--collapse-guard",), False)):
        directory = tmp_path / f"collapse{len(flags)}"
        run_advaa("--dry-run", "--controller-lr", 30, "--run-dir", directory, *flags)
        controller = results_of(directory)["controller"]
        assert controller["collapsed"] == collapsed and (controller["entropy_last"] < advaa.COLLAPSED) == collapsed


def test_the_checkpoint_knows_the_epoch_of_best(tmp_path, monkeypatch):
    """A run that goes on from an earlier checkpoint, with another learning rate, would else report the best epoch of the one it left."""
    events, save_run, save_atomically = [], common.save_run, common.save_atomically

    def watch_best(state: dict, file: Path, **options: object) -> None:
        events.append(("best.pt", state["epoch"]) if file.name == "best.pt" else ("other", 0))
        save_atomically(state, file, **options)

    def watch_run(state: dict, *where: object) -> None:
        events.append(("checkpoint", state["best"]["epoch"]))
        save_run(state, *where)

    monkeypatch.setattr(common, "save_atomically", watch_best)
    monkeypatch.setattr(common, "save_run", watch_run)
    run_advaa("--dry-run", "--M", 2, "--checkpoint-every", 100, "--run-dir", tmp_path / "run")
    written = [index for index, event in enumerate(events) if event[0] == "best.pt"]
    assert written and all(next(event for event in events[index:] if event[0] == "checkpoint")[1] == events[index][1] for index in written)
    assert sum(event[0] == "checkpoint" for event in events) >= len(written) + 1  # that of the end


def test_evaluate_repeats_the_figures(run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(run, directory)
    with pytest.raises(common.InputError, match="--dry-run would overwrite the results of"):
        run_advaa("--evaluate", "--dry-run", "--run-dir", directory)
    run_advaa("--evaluate", "--run-dir", directory)
    assert without_times(results_of(directory)) == without_times(results_of(run))
    run_advaa("-e", "true", "--weights", run / "checkpoint.pt", "--eval-split", "val", "--run-dir", tmp_path / "again")
    again = results_of(tmp_path / "again")
    for key in ("top1_error", "top5_error", "shifted", "corruptions"):
        assert again[key] == results_of(run)[key]
    assert again["method"] == "run-checkpoint" and not (tmp_path / "again" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--policy", "random"),
        ("--policy", "trivial"),
        ("--policy", "autoaugment"),
        ("--policy", "none"),
        ("--policy", "random", "--M", "1", "--model", "shake26_2x32d", "--lr-schedule", "step"),
        ("--M", "1", "--reward", "moving", "--label-smoothing", "0.1", "--cutout", "8"),
        ("--policy", "random", "--num-ops", "15"),
        ("--reset-hidden", "--collapse-guard", "--num-ops", "15", "--amp", "--M", "2", "--Q", "1", "--model", "pyramid272"),
    ],
)
def test_each_policy(flags, tmp_path):
    run_advaa("--dry-run", *flags, "--run-dir", tmp_path / "run")
    results, history = results_of(tmp_path / "run"), state_of(tmp_path / "run")["history"]
    assert results["method"] == (flags[1] if flags[0] == "--policy" else "advaa")
    has_policies = results["method"] in ("advaa", "random")
    assert (tmp_path / "run" / "policies.jsonl").exists() == (tmp_path / "run" / "policies.png").exists() == has_policies
    assert len(history) == 2 and ("entropy" in history[0]) == (results["method"] == "advaa")
    if "--num-ops" in flags:
        assert "SamplePairing" not in (tmp_path / "run" / "policies.jsonl").read_text()


def test_every_policy_trains_on_as_many_views(tmp_path, monkeypatch):
    seen, forward = [], common.WideResNet.forward

    def count(model, images):
        if model.training:
            seen.append(len(images))
        return forward(model, images)

    monkeypatch.setattr(common.WideResNet, "forward", count)
    for policy in ("none", "trivial", "autoaugment", "random", "advaa"):
        seen.clear()
        run_advaa("--dry-run", "--M", 3, "--batch-size", 10, "--policy", policy, "--run-dir", tmp_path / policy)
        assert seen == [30, 30]  # two epochs of one step: 10 images in 3 views
    losses = state_of(tmp_path / "none")["history"][0]["losses"]
    assert max(losses) == pytest.approx(min(losses), rel=1e-5)  # without a policy, and without crops on digits, all views are the image


WORKER = """
import json, sys
import advaa

heard, loss = [], advaa.reinforce_loss
controllers, make = [], advaa.Controller

def listen(log_probabilities, rewards, entropies, penalty):
    heard.append([log_probabilities.tolist(), rewards.tolist()])
    return loss(log_probabilities, rewards, entropies, penalty)

def keep(*arguments):
    controllers.append(make(*arguments))
    return controllers[-1]

advaa.reinforce_loss, advaa.Controller = listen, keep
advaa.main()
import os
state = {key: value.tolist() for key, value in controllers[0].state_dict().items()}
json.dump({"heard": heard, "controller": state}, open(sys.argv[2] + "-rank" + os.environ.get("RANK", "0"), "w"))
"""


@pytest.mark.slow
def test_several_processes_play_the_same_game(tmp_path):
    """Both ranks have the same policies, rewards and controller, and, to rounding, those of one process; 10 images go to 3 ranks unevenly."""
    (tmp_path / "worker.py").write_text(WORKER)
    flags = ("--num-train", 20, "--batch-size", 10, "--epochs", 2, "--M", 2, "--Q", 2, "--lr", "1e-3", "--cutout", 8, "--eval-split", "val")
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run_script(tmp_path / "worker.py", "--run-dir", tmp_path / "1", *flags, **environment)
    one = json.loads((tmp_path / "1-rank0").read_text())
    records = lines_of(tmp_path / "1" / "policies.jsonl")
    for processes in (2, 3):
        directory = tmp_path / f"{processes}"
        command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, tmp_path / "worker.py", "--run-dir", directory)
        run_script(*command, *flags, **environment)
        ranks = [json.loads((tmp_path / f"{processes}-rank{rank}").read_text()) for rank in range(processes)]
        assert all(rank == ranks[0] for rank in ranks[1:])
        many = lines_of(directory / "policies.jsonl")
        for record, other in zip(records, many, strict=True):
            assert record["policies"] == other["policies"] and other["losses"] == pytest.approx(record["losses"], rel=1e-5)
        for key, value in one["controller"].items():
            difference = (torch.tensor(ranks[0]["controller"][key]) - torch.tensor(value)).abs()  # Adam turns rounding into parts of a step, 1e-2
            assert difference.max() < 2e-2 and (difference > 1e-3).float().mean() < 1e-3, key
        for key, value in state_of(tmp_path / "1")["state_dict"].items():
            torch.testing.assert_close(state_of(directory)["state_dict"][key], value, rtol=1e-3, atol=5e-5)
        assert results_of(directory)["top1_error"] == results_of(tmp_path / "1")["top1_error"]
        assert json.loads((directory / "args.json").read_text())["world_size"] == processes


def test_several_processes_in_mixed_precision(tmp_path):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "advaa.py", "--dry-run", "--M", 8, "--amp")
    run_script(*command, "--run-dir", tmp_path / "run", OMP_NUM_THREADS="1")
    history = state_of(tmp_path / "run")["history"]
    run_advaa("--dry-run", "--M", 8, "--amp", "--run-dir", tmp_path / "one")
    assert history[0]["losses"] == pytest.approx(state_of(tmp_path / "one")["history"][0]["losses"], rel=2e-2)  # of bfloat16


@pytest.mark.slow
def test_the_commands_of_the_source(tmp_path):
    """Its main.py and evaluate.py, renamed; the configuration is a JSON of flags."""
    conf = tmp_path / "conf.json"
    conf.write_text(json.dumps({"dataset": "digits", "model": "wresnet28_10", "batch_size": 10, "epochs": 1, "num_train": 20, "eval_split": "val"}))
    logs = tmp_path / "logs"
    launch = ("-m", "torch.distributed.launch", "--nproc_per_node", 1)
    flags = ("--load_conf", conf, "--logdir", logs, "--M", 4, "--seed", 0, "--amp")
    run_script(*launch, "advaa.py", *flags, OMP_NUM_THREADS="1")
    first = results_of(logs)
    assert first["n_train"] == 20 and "4 views of each" in first["protocol"] and json.loads((logs / "args.json").read_text())["M"] == 4
    run_script("advaa.py", "--evaluate", "--load_conf", conf, "--logdir", logs, "--seed", 0, OMP_NUM_THREADS="1")
    assert without_times(results_of(logs)) == without_times(first)  # the run's own --M 4 goes before the configuration


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR and ImageNet as they lie on disk
# ---------------------------------------------------------------------------------------------------------------------


def make_cifar10(root: Path) -> None:
    """200 training and 20 test images, CIFAR-10-C with 4 images a severity, CIFAR-10-P with 3 sequences of 5 frames."""
    make_cifar(root, "cifar10", 200, 20, 4)
    make_perturbed(root, advaa.PERTURBATIONS)


def test_cifar10_with_its_corrupted_and_perturbed_sets(tmp_path):
    make_cifar10(tmp_path / "data")
    train, val, test = (common.load_split("cifar10", split, tmp_path / "data") for split in ("train", "val", "test"))
    assert (len(train[1]), len(val[1]), len(test[1])) == (180, 20, 20) and torch.bincount(val[1]).tolist() == [2] * 10
    batch = pickle.loads((tmp_path / "data/cifar-10-batches-py/test_batch").read_bytes())
    assert torch.equal(test[0][7], torch.from_numpy(batch["data"][7].reshape(3, 32, 32))) and test[1].tolist() == batch["labels"]
    directory = tmp_path / "run"
    flags = ("--dataset", "cifar10", "--data-root", tmp_path / "data", "--model", "wideresnet", "--M", 2)
    run_advaa(*flags, "--dry-run", "--run-dir", directory)
    results, machine = results_of(directory), common.start_machine("cpu")
    model = common.load_weights(common.build_model("wideresnet", 10, "cifar10"), directory / "checkpoint.pt").eval()
    images = np.load(tmp_path / "data/CIFAR-10-C/fog.npy")
    errors = []
    for severity in range(5):
        part = torch.from_numpy(images[4 * severity : 4 * severity + 1]).permute(0, 3, 1, 2)  # a dry run's share
        errors.append(100 - common.evaluate(model, part, torch.arange(1), machine)["top1_accuracy"])
    assert results["corruptions"]["fog"] == pytest.approx(sum(errors) / 5) and results["n_train"] == 64
    for name, noise in (("gaussian_noise", True), ("tilt", False)):
        frames = torch.from_numpy(np.load(tmp_path / f"data/CIFAR-10-P/{name}.npy")).permute(0, 1, 4, 2, 3)
        predictions = common.predict_logits(model, frames.flatten(0, 1), machine).argmax(1).view(3, 5)
        assert results["flip_probability"][name] == pytest.approx(advaa.flip_probability(predictions, noise))
    flips = results["flip_probability"]
    assert flips["mean"] == pytest.approx(sum(flips[name] for name in advaa.PERTURBATIONS) / 10)
    assert "best_on_validation" not in results  # as published: all training images train
    # Without the corrupted sets the clean figures remain, and a note says what is missing. With --validation a tenth is held out.
    shutil.rmtree(tmp_path / "data/CIFAR-10-C")
    shutil.rmtree(tmp_path / "data/CIFAR-10-P")
    run_advaa(*flags, "--dry-run", "--validation", "--run-dir", tmp_path / "alone")
    results = results_of(tmp_path / "alone")
    assert results["corruptions"] == {} and "flip_probability" not in results and "best_on_validation" in results
    sets = common.load_sets("cifar10", tmp_path / "data", machine, validation=True)
    images = torch.cat([sets.train[0], sets.val[0]]).flatten(1)
    assert (len(sets.train[1]), len(sets.val[1])) == (180, 20) and len(images.unique(dim=0)) == 200  # no image is in both
    sets = common.load_sets("cifar10", tmp_path / "data", machine, validation=False)
    assert len(sets.train[1]) == 200 and sets.val is None
    notes = sets.notes + advaa.find_perturbed("cifar10", "test", tmp_path / "data")[1]
    assert [all(word in note for word in (kind, "https://zenodo.org/record/2535967")) for note, kind in zip(notes, ("CIFAR-10-C", "CIFAR-10-P"))]


def test_imagenet_folders(tmp_path):
    for split, count in (("train", 6), ("val", 2)):
        for number, name in enumerate(("n01440764", "n01443537")):
            folder = tmp_path / "data" / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i, picture in enumerate(common.to_uint8(common.example_pictures(count, 64, number))):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.JPEG")
    flags = ("--dataset", "imagenet", "--data-root", tmp_path / "data", "--model", "resnet18", "--batch-size", 4, "--M", 2)
    run_advaa(*flags, "--dry-run", "--run-dir", tmp_path / "run")
    results = results_of(tmp_path / "run")
    assert (results["n_train"], results["n_eval"], results["corruptions"]) == (12, 4, {})
    folder = common.class_folder(tmp_path / "data/imagenet/val", ["n01440764", "n01443537"])
    model = common.load_weights(common.build_model("resnet18", 2, "imagenet"), tmp_path / "run" / "checkpoint.pt")
    accuracy = common.evaluate_folder([model], folder, 2, 0, common.start_machine("cpu"))[0]["top1_accuracy"]
    assert results["top1_error"] == pytest.approx(100 - accuracy)
    assert len(lines_of(tmp_path / "run" / "policies.jsonl")) == 2
    sets = common.load_sets("imagenet", tmp_path / "data", common.start_machine("cpu"), split="val")
    assert (len(sets.train), len(sets.val), len(sets.test)) == (11, 1, 1) and set(sets.train.files).isdisjoint(sets.val.files)
    # To evaluate, the validation folder will do.
    shutil.rmtree(tmp_path / "data" / "imagenet" / "train")
    run_advaa(*flags, "--evaluate", "--weights", tmp_path / "run" / "checkpoint.pt", "--run-dir", tmp_path / "again")
    assert results_of(tmp_path / "again")["top1_error"] == results["top1_error"]


@pytest.mark.slow
def test_a_view_batch_of_any_size_gives_the_same_run(tmp_path):
    """--view-batch: policy by policy, so that only so many images are in one forward; one policy's must fit."""
    sizes = []

    def watch(module: torch.nn.Module, inputs: tuple) -> None:
        if module.training:
            sizes.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: watch(module, inputs) if type(module).__name__ == "WideResNet" else None
    )
    try:
        for size in (10, 25):
            run_advaa(*SMALL, *FAST_CONTROLLER, "--view-batch", size, "--run-dir", tmp_path / str(size))
            assert set(sizes) == {10}
        first, second = (state_of(tmp_path / str(size)) for size in (10, 25))
        assert_equal_weights(first["state_dict"], second["state_dict"])
        assert first["records"] == second["records"]
        sizes.clear()
        run_advaa(*SMALL, *FAST_CONTROLLER, "--run-dir", tmp_path / "all")
        assert set(sizes) == {30}
    finally:
        hook.remove()
    with pytest.raises(common.InputError, match="--view-batch 9 is smaller than one policy's 10 views"):
        run_advaa(*SMALL, "--view-batch", 9, "--run-dir", tmp_path / "small")
    # Two processes could have trained with it; one process evaluates what they made.
    figures = results_of(tmp_path / "10")
    common.write_json(tmp_path / "10" / "args.json", json.loads((tmp_path / "10" / "args.json").read_text()) | {"view_batch": 5})
    run_advaa("--evaluate", "--run-dir", tmp_path / "10")
    assert results_of(tmp_path / "10") == figures
