"""gretta.py as a user runs it, on digits with small settings, and the figures in the files it writes."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused, results_of, run_here, run_script, without_times
from PIL import Image

import common
import gretta

# 170 images to evaluate on, 7 steps an epoch
SMALL = ("--target-split", "val", "--proportion", "0.9", "--batch-size", "240", "--num-samples", "1", "--epochs", "2", "--checkpoint-every", "1")


def log_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def policy_of(directory: Path) -> dict:
    return torch.load(directory / "checkpoint.pt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One small run that several tests look at, in a process of its own."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    run_script("gretta.py", "--model", "resnext", "--est", "vanilla", *SMALL, "--run-dir", directory, "--seed", 3)
    return directory


def test_a_run_writes_what_the_readme_says(run):
    results, arguments, log = results_of(run), json.loads((run / "args.json").read_text()), log_of(run)
    expected = {"script": "gretta", "dataset": "digits", "model": "resnext", "method": "vanilla", "seed": 3, "n_train": 1773, "n_eval": 170}
    expected |= {"transform": "geometry", "train_on": "target", "proportion": 0.9, "queries": 2 * 7 * 240 * 2, "queries_distillation": 0}
    assert {key: results[key] for key in expected} == expected
    assert set(results["accuracy"]) == {"none", "five_crop", "ten_crop", "bn_adapt", "gretta"}
    assert all(0 <= value <= 100 and value * 1.7 == pytest.approx(round(value * 1.7)) for value in results["accuracy"].values())  # of 170 images
    assert (
        results["wall_seconds"] > 0
        and results["peak_memory_mb"] > 100
        and "modified digits" in results["protocol"]
        and results["device"].startswith("cpu")
    )
    assert (
        arguments["lr"] == 5e-4
        and arguments["opt"] == "adam"
        and arguments["world_size"] == 1
        and arguments["versions"]["torch"] == torch.__version__.split("+")[0]
    )
    assert [entry["epoch"] for entry in log if "epoch" in entry] == [1, 2]
    assert all({"step", "loss", "accuracy", "queries"} <= entry.keys() for entry in log[:-1])
    assert log[-2]["queries"] == results["queries"] and log[-1]["test_gretta"] == results["accuracy"]["gretta"]
    assert (run / "gretta.py").read_bytes() == (ROOT / "gretta.py").read_bytes()
    assert list(run.glob("events.out.tfevents.*"))
    for name, size in (("examples.png", (1040, 1400)), ("curves.png", (1000, 400))):
        with Image.open(run / name) as picture:
            assert picture.size == size and len(picture.convert("RGB").getcolors(2**20)) > 50


def test_figures_in_results_are_those_of_the_saved_policy(run):
    """The accuracy without and with the policy, computed here from the checkpoint."""
    _, _, images, labels, _ = gretta.target_domain("val", 0.9, "data")
    classifier = common.load_weights(common.build_model("resnext", 10, "digits"), common.WEIGHTS / "digits-resnext.pt").eval()
    policy = common.load_weights(gretta.Policy("resnet18", 4, False, "zero"), run / "checkpoint.pt").eval()
    with torch.no_grad():
        images = common.to_float(images)
        none = (classifier(images).argmax(1) == labels).double().mean() * 100
        with_policy = (classifier(gretta.transform_images(images, policy(images), "geometry")).argmax(1) == labels).double().mean() * 100
    accuracy = results_of(run)["accuracy"]
    assert accuracy["none"] == pytest.approx(none.item(), abs=0.6) and accuracy["gretta"] == pytest.approx(with_policy.item(), abs=0.6)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results(run, tmp_path):
    run_here("gretta", *SMALL, "--run-dir", tmp_path / "again", "--seed", 3)
    assert without_times(results_of(tmp_path / "again")) == without_times(results_of(run))
    assert all(torch.equal(value, policy_of(run)[key]) for key, value in policy_of(tmp_path / "again").items())


def test_evaluate_repeats_the_accuracy_and_applies_more_steps(run, tmp_path):
    before = results_of(run)
    run_here("gretta", "--evaluate", "--run-dir", run)
    assert results_of(run) == before  # the times too are those of the run
    assert sum("test_gretta" in line for line in log_of(run)) == 1
    run_here("gretta", "-e", "True", "--weights-policy", run / "checkpoint.pt", *SMALL, "--steps", 2, "--run-dir", tmp_path / "two")
    refuse = (("--target-split", "test"), ("--steps", 2), ("--dry-run",), ("--proportion", 0.5), ("--est", "whitebox"), ("--seed", 4))
    refuse += (("--weights", ROOT / "weights/digits-resnext.pt"),)  # the run's own were not named
    for flags in refuse:  # the run's results are its own
        refused(run, "gretta.py", "--evaluate", "--run-dir", run, *flags, names=(f"{flags[0]} ", "would overwrite the results of", run))
    refused(run, "gretta.py", "-e", "--weights-policy", run / "checkpoint.pt", *SMALL, "--sigmoid", names=("--sigmoid was False",))
    lower = run_here("gretta", *SMALL, "--seed", 3, "--resume", "--run-dir", run, "--lr", 1e-5)  # as is advised where a loss is not finite
    assert "holds a finished run" in lower
    accuracy = results_of(tmp_path / "two")["accuracy"]
    assert accuracy["gretta_1"] == before["accuracy"]["gretta"] and accuracy["gretta_2"] == accuracy["gretta"]


def test_predict_a_folder_of_pictures(run, tmp_path):
    """Ten pictures of any size and kind: the csv's classes and confidences are the classifier's on the pictures saved beside each other."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    images, _ = common.load_split("digits", "test")
    for i in range(10):
        picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        picture.resize((32 + 8 * i, 32 + 4 * i)).convert("L" if i % 2 else "RGB").save(folder / f"{i}.{'jpg' if i % 3 else 'png'}")
    (folder / "notes.txt").write_text("no picture")
    before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    text = run_here("gretta", "--predict", folder, "--run-dir", run, "--data-root", tmp_path / "none")  # it takes no data set
    assert "10 pictures" in text and {file: file.read_bytes() for file in before} == before  # and evaluates nothing
    with open(run / "predictions.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == sorted(file.name for file in folder.iterdir() if file.suffix != ".txt")
    classifier = common.load_weights(common.build_model("resnext", 10, "digits"), common.WEIGHTS / "digits-resnext.pt").eval()
    for row in rows:
        for state, name in (("before", "original"), ("after", "transformed")):
            with Image.open(run / "predictions" / f"{row['file']}-{name}.png") as picture:
                pixels = torch.from_numpy(__import__("numpy").array(picture)).permute(2, 0, 1)[None]
            confidence, label = classifier(common.to_float(pixels)).softmax(1).max(1)
            assert int(row[f"class_{state}"]) == label.item() and float(row[f"confidence_{state}"]) == pytest.approx(confidence.item(), abs=2e-3)
    assert (run / "predictions.png").is_file() and sorted(file.name for file in folder.iterdir())[0] == "0.png"
    run_here("gretta", "--predict", folder, "--weights-policy", run / "checkpoint.pt", "--run-dir", tmp_path / "own")
    assert (tmp_path / "own/predictions.csv").read_text() == (run / "predictions.csv").read_text() and (tmp_path / "own/args.json").is_file()
    assert not (tmp_path / "own/results.json").exists()


@pytest.mark.parametrize("est, transform, extra", [("vanilla", "full", ["--sigmoid", "--opt", "rmsprop"]), ("surrogate", "geometry", ["--alpha", "0.2"]), ("surrogate", "color", ["--reg", "test"]), ("whitebox", "full", ["--reg", "gaussian_noise", "--opt", "sgd"]), ("whitebox", "color", ["--init", "stochastic", "--model", "wideresnet"])])  # fmt: skip
def test_each_estimator_and_transform_set(est, transform, extra, tmp_path):
    run_here("gretta", "--dry-run", "--est", est, "--transform", transform, *extra, "--run-dir", tmp_path / "run")
    results = results_of(tmp_path / "run")
    assert results["method"] == est and results["transform"] == transform and results["n_eval"] == 64
    assert results["queries"] == 24 * (1 if est == "whitebox" else 4)
    assert (tmp_path / "run/examples.png").is_file() and (tmp_path / "run/curves.png").is_file()
    head = policy_of(tmp_path / "run")["backbone.fc.weight"]
    assert head.shape[0] == len(gretta.TRANSFORM_SETS[transform]) and head.abs().sum() > 0  # it learned something


def test_policy_backbones_run(tmp_path):
    run_here("gretta", "--dry-run", "--policy", "efficientnet-b0", "--run-dir", tmp_path / "run")
    assert results_of(tmp_path / "run")["policy"] == "efficientnet-b0"


def test_augmented_training_is_tested_on_every_corruption(tmp_path):
    run_here("gretta", "--dry-run", "--train-on", "augmented", "--run-dir", tmp_path / "run")
    results = results_of(tmp_path / "run")
    assert list(results["corruptions"]) == [*common.CORRUPTIONS, "mean"] and results["n_eval"] == 75
    errors = [results["corruptions"][name]["none"] for name in common.CORRUPTIONS]
    assert results["corruptions"]["mean"]["none"] == pytest.approx(sum(errors) / 15)
    assert 100 - results["accuracy"]["none"] == pytest.approx(sum(errors) / 15) and "digits-C" in results["protocol"]


def test_a_missing_student_is_distilled_from_the_classifiers_outputs(tmp_path):
    """With one's own --weights there is no student at hand: its phase runs, is counted apart, and is kept in the run's directory."""
    torch.save(torch.load(common.WEIGHTS / "digits-resnext.pt", weights_only=True), tmp_path / "own.pt")
    run_here("gretta", "--dry-run", "--est", "surrogate", "--weights", tmp_path / "own.pt", "--run-dir", tmp_path / "run")
    results = results_of(tmp_path / "run")
    assert results["queries_distillation"] == 1000 and results["queries"] == 96
    common.load_weights(common.build_model("student", 10, "digits"), tmp_path / "run/student.pt")


@pytest.mark.parametrize("est", ["vanilla", "surrogate"])
def test_the_classifier_is_a_black_box_and_queries_are_what_it_was_shown(est, tmp_path, monkeypatch):
    """The classifier, wrapped: no call ever has a gradient, and the images shown outside of evaluation equal `queries`."""
    shown = {"training": 0, "evaluation": 0}
    phase = ["training"]

    class Watched(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            assert not images.requires_grad and not torch.is_grad_enabled()
            shown[phase[0]] += len(images)
            logits = self.model(images)
            assert not logits.requires_grad
            return logits

    def not_training(function):
        def wrapped(*arguments, **keywords):
            phase[0] = "evaluation"
            try:
                return function(*arguments, **keywords)
            finally:
                phase[0] = "training"

        return wrapped

    build, load = common.build_model, common.load_weights
    monkeypatch.setattr(common, "build_model", lambda name, *rest: Watched(build(name, *rest)) if name == "resnext" else build(name, *rest))
    monkeypatch.setattr(
        common, "load_weights", lambda model, file: load(getattr(model, "model", model) if isinstance(model, Watched) else model, file)
    )
    outside = ((gretta, "evaluate_predictors"), (gretta, "draw_examples"), (common, "evaluate"), (common, "check_input_size"))
    for module, name in (*outside, (common, "forward_chunk")):
        monkeypatch.setattr(module, name, not_training(getattr(module, name)))
    directory = tmp_path / "run"
    arguments = [
        "gretta.py",
        "--est",
        est,
        "--target-split",
        "val",
        "--proportion",
        "0.9",
        "--batch-size",
        "500",
        "--epochs",
        "1",
        "--num-samples",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--weights", str(common.WEIGHTS / "digits-resnext.pt"), "--student", str(common.WEIGHTS / "digits-resnext-student.pt"), "--run-dir", str(directory)])  # fmt: skip
    gretta.main()
    assert shown["training"] == results_of(directory)["queries"] == 3 * 500 * 4
    assert shown["evaluation"] > 170 * 18


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(run, tmp_path):
    """SIGKILL after the first checkpoint, then --resume: the same weights, results and log as the run that was never killed."""
    directory = tmp_path / "killed"
    command = [sys.executable, "gretta.py", *SMALL, "--run-dir", str(directory), "--seed", "3"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (directory / "checkpoint.pt").is_file() and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (directory / "results.json").exists()
    run_here("gretta", "--resume", "--run-dir", directory)
    assert without_times(results_of(directory)) == without_times(results_of(run))
    assert all(torch.equal(value, policy_of(run)[key]) for key, value in policy_of(directory).items())
    assert [entry for entry in log_of(directory) if "epoch" in entry] == [entry for entry in log_of(run) if "epoch" in entry]
    again = run_here("gretta", "--resume", "--run-dir", directory)
    assert "holds a finished run" in again and "five-crop" in again


def test_resume_of_an_empty_directory_starts_afresh_and_says_so(tmp_path):
    printed = run_here("gretta", "--dry-run", "--resume", "--run-dir", tmp_path)
    assert "holds no checkpoint: starting afresh" in printed and (tmp_path / "results.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batch_and_give_the_same_policy(processes, tmp_path):
    """torchrun (gloo) with the same global batch: the policy of one process to 1e-5; batch norm sees the statistics of the global batch."""
    # Small steps, and few: rounding differs between sums over ranks, and larger steps amplify it about tenfold each.
    flags = ["--target-split", "val", "--proportion", "0.9", "--batch-size", "500", "--num-samples", "1", "--epochs", "1", "--opt", "sgd", "--lr", "1e-3"]  # fmt: skip
    run_here("gretta", *flags, "--run-dir", tmp_path / "one")
    run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "gretta.py", *flags, "--run-dir", tmp_path / "many", OMP_NUM_THREADS="1")  # fmt: skip
    one, many = policy_of(tmp_path / "one"), policy_of(tmp_path / "many")
    assert one["backbone.fc.weight"].abs().max() > 5e-4  # from zero, 50 times the tolerance
    assert max((one[key].double() - many[key].double()).abs().max().item() for key in one) < 1e-5
    first, second = results_of(tmp_path / "one"), results_of(tmp_path / "many")
    assert (
        first["queries"] == second["queries"]
        and first["n_eval"] == second["n_eval"]
        and first["accuracy"] == pytest.approx(second["accuracy"], abs=0.6)
    )


def test_mixed_precision_and_both_spellings(tmp_path):
    run_here("gretta", "--dry-run", "--amp", "--num_samples", 1, "--run_dir", tmp_path / "run")
    assert results_of(tmp_path / "run")["queries"] == 48 and json.loads((tmp_path / "run/args.json").read_text())["amp"] is True


def test_a_diverging_run_stops_and_keeps_the_last_checkpoint(tmp_path):
    done = run_script("gretta.py", *SMALL, "--beta", "1e38", "--opt", "sgd", "--run-dir", tmp_path / "run", expect=2)
    assert done.stderr.rstrip().splitlines()[-1].startswith("gretta.py: error: the loss is not finite at step 7 ")
    assert not (tmp_path / "run/results.json").exists()


def test_mixed_precision_is_for_the_networks_not_for_the_transforms(tmp_path, monkeypatch):
    """In training, in the regulariser and in evaluation alike; bfloat16 coordinates would be off by a part of a pixel."""
    seen, transform = [], gretta.transform_images

    def watched(*arguments: object) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return transform(*arguments)

    monkeypatch.setattr(gretta, "transform_images", watched)
    run_here("gretta", "--dry-run", "--amp", "--device", "cpu", "--reg", "test", "--run-dir", tmp_path / "run")
    assert len(seen) > 3 and not any(seen)


def test_the_readmes_worked_example(tmp_path):
    """The copy with its new estimator, put together from the README's own blocks: it runs, under its own name, and its smoothed gradient is the mean
    of true gradients at perturbed levels."""
    readme = (ROOT / "README.md").read_text().split("## Copy a script and change it")[1]
    function, line = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[:2]
    replaced = re.search(r"in place of the line `(.*)`", readme)[1]
    text = (ROOT / "gretta.py").read_text()
    assert text.count(replaced) == 1 and text.count("def consistency_loss") == 1
    text = text.replace(replaced, line.strip()).replace("def consistency_loss", f"{function}\n\ndef consistency_loss")
    for name in ("common.py", "weights", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mine.py").write_text(text)
    flags = ("--est", "whitebox", "--dry-run", "--lr", "5e-4", "--run-dir", tmp_path / "runs" / "mine")
    run_script("mine.py", *flags, cwd=tmp_path)
    assert results_of(tmp_path / "runs" / "mine")["script"] == "mine"
    mine = {}
    exec(compile("from gretta import *\n" + function, "mine", "exec"), mine)
    levels, epsilon = torch.rand(3, 4), torch.randn(5, 3, 4)
    found = mine["smoothed_gradient"](lambda rows, start: rows.pow(3).sum(1), levels, epsilon, 4)
    torch.testing.assert_close(found, (3 * (levels + epsilon) ** 2).mean(0))
