"""gretta.py as a user runs it, on digits with small settings, and the figures in the files it writes."""

import csv
import json
from pathlib import Path

import formats
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_equal_weights, refused, results_of, run_here, run_script, state_of
from conftest import without_times as plain
from PIL import Image

import common
import gretta

# 170 images to evaluate on, 7 steps an epoch
SMALL = ("--eval-split", "val", "--proportion", 0.9, "--batch-size", 240, "--num-samples", 1, "--epochs", 2)
RESNEXT, STUDENT = "weights/digits-resnext.pt", "weights/digits-resnext-student.pt"


def log_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def classifier() -> torch.nn.Module:
    return common.load_weights(common.build_model("resnext", 10, "digits"), ROOT / RESNEXT).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One small run that several tests look at, in a process of its own."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    run_script("gretta.py", *SMALL, "--checkpoint-every", 1, "--run-dir", directory, "--seed", 3)
    return directory


def test_a_run_writes_what_is_promised(run):
    results, arguments, log = results_of(run), json.loads((run / "args.json").read_text()), log_of(run)
    expected = {"script": "gretta", "dataset": "digits", "model": "resnext", "method": "vanilla", "seed": 3}
    expected |= {"n_train": 1773, "n_eval": 170, "transform": "geometry", "train_on": "target"}
    expected |= {"proportion": 0.9, "queries": 2 * 7 * 240 * 2, "queries_distillation": 0}
    assert {key: results[key] for key in expected} == expected and "modified digits" in results["protocol"]
    assert set(results["accuracy"]) == {"none", "five_crop", "ten_crop", "bn_adapt", "gretta"}
    assert arguments["lr"] == 5e-4 and arguments["opt"] == "adam" and results["wall_seconds"] > 0
    epochs = [entry for entry in log if "epoch" in entry]
    assert [entry["epoch"] for entry in epochs] == [1, 2] and epochs[1]["queries"] == results["queries"]
    assert log[-1]["test_gretta"] == results["accuracy"]["gretta"]
    assert (run / "gretta.py").read_bytes() == (ROOT / "gretta.py").read_bytes()
    for name in ("examples.png", "curves.png"):
        with Image.open(run / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**20)) > 50


def test_figures_in_results_are_those_of_the_saved_policy(run):
    """The accuracy without and with the policy, computed here from the checkpoint."""
    where = {"data_root": "data", "machine": common.Machine(torch.device("cpu")), "split": "val"}
    sets = gretta.target_sets("digits", 0.9, "ones", workers=0, dry_run=False, **where)
    images, labels = sets.tests["target", 0]().tensors()
    policy = common.load_weights(gretta.Policy("resnet18", 4, False, "zero"), run / "checkpoint.pt").eval()
    with torch.no_grad():
        images = common.to_float(images)
        moved = gretta.transform_images(images, policy(images), "geometry")
        for name, shown in (("none", images), ("gretta", moved)):
            accuracy = 100 * (classifier()(shown).argmax(1) == labels).double().mean().item()
            assert results_of(run)["accuracy"][name] == pytest.approx(accuracy, abs=0.6)


def test_evaluate_repeats_the_accuracy_and_applies_more_steps(run, tmp_path):
    before = results_of(run)
    run_here("gretta", "--evaluate", "--run-dir", run)
    assert results_of(run) == before  # the times too are those of the run
    assert sum("test_gretta" in line for line in log_of(run)) == 1
    for flags in (("--eval-split", "test"), ("--steps", 2), ("--est", "whitebox"), ("--weights", RESNEXT)):
        refused(run, "gretta.py", "--evaluate", "--run-dir", run, *flags, names=(f"{flags[0]} ", run))
    again = run_here("gretta", "--resume", "--run-dir", run, "--lr", 1e-5)
    assert "five_crop" in again and results_of(run) == before
    policy = ("--weights-policy", run / "checkpoint.pt", *SMALL, "--steps", 2, "--run-dir", tmp_path / "two")
    run_here("gretta", "-e", "True", *policy)
    two, one = results_of(tmp_path / "two")["accuracy"], before["accuracy"]
    assert two.pop("gretta") != one.pop("gretta") and two == one


def test_predict_a_folder_of_pictures(run, tmp_path):
    """Pictures of any size and kind: the csv's answers are the classifier's on the pictures beside it."""
    folder, images = tmp_path / "pictures", common.load_split("digits", "test")[0]
    predict = ("gretta", "--predict", folder, "--run-dir")
    folder.mkdir()
    for i in range(6):
        picture = Image.fromarray(images[i].permute(1, 2, 0).numpy()).resize((32 + 8 * i, 32 + 4 * i))
        picture.convert("L" if i % 2 else "RGB").save(folder / f"{i}.{'jpg' if i % 3 else 'png'}")
    (folder / "._0.png").write_bytes(b"not one")
    before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    printed = run_here(*predict, run, "--data-root", tmp_path)  # no data set
    assert f"passed over in {folder}, as no pictures: 1\n" in printed
    assert {file: file.read_bytes() for file in before} == before and (run / "predictions.png").is_file()
    rows = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == sorted(file.name for file in folder.glob("[0-9]*"))
    for row in rows:
        for state, name in (("before", "original"), ("after", "transformed")):
            with Image.open(run / "predictions" / f"{row['file']}-{name}.png") as picture:
                pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
            confidence, label = classifier()(common.to_float(pixels)).softmax(1).max(1)
            assert int(row[f"class_{state}"]) == label.item() == int(row[f"name_{state}"])
            assert float(row[f"confidence_{state}"]) == pytest.approx(confidence.item(), abs=2e-3)
    run_here(*predict, tmp_path / "1", "--weights-policy", run / "checkpoint.pt")
    assert (tmp_path / "1/predictions.csv").read_text() == (run / "predictions.csv").read_text()


KINDS = ["vanilla full --sigmoid --opt rmsprop", "surrogate color --reg test --amp --num_samples 2"]
KINDS += ["whitebox full --reg gaussian_noise --opt sgd --policy efficientnet-b0"]
KINDS += ["vanilla geometry --train-on augmented --reg test --model wideresnet"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_estimator_and_transform_set(kind, tmp_path, monkeypatch):
    """The policy learns something, and mixed precision is for the networks, not for the transforms."""
    (est, transform, *extra), seen, apply = kind.split(), [], gretta.transform_images
    watch = lambda *arguments: seen.append(torch.is_autocast_enabled("cpu")) or apply(*arguments)
    monkeypatch.setattr(gretta, "transform_images", watch)
    run_here("gretta", "--dry-run", "--est", est, "--transform", transform, *extra, "--run-dir", tmp_path)
    results, policy = results_of(tmp_path), state_of(tmp_path)["policy"]
    assert results["queries"] == 24 * (1 if est == "whitebox" else 4) and len(seen) > 3 and not any(seen)
    head = policy.get("backbone.fc.weight", policy.get("backbone._fc.weight"))
    assert len(head) == len(gretta.TRANSFORM_SETS[transform]) and head.abs().sum() > 0
    if "augmented" in extra:
        table = results["corruptions"]
        assert list(table) == [*common.CORRUPTIONS, "mean"] and results["n_eval"] == 75
        mean = sum(table[name]["none"] for name in common.CORRUPTIONS) / 15
        assert 100 - results["accuracy"]["none"] == pytest.approx(mean) == table["mean"]["none"]


@pytest.mark.parametrize("est", ["vanilla", "surrogate"])
def test_the_classifier_is_a_black_box_and_queries_are_what_it_was_shown(est, tmp_path, monkeypatch):
    """No call of it ever has a gradient, and the images it is shown to train the policy are `queries`."""
    shown, ask = [], gretta.BlackBox.__call__

    def watched(black_box: gretta.BlackBox, images: torch.Tensor) -> torch.Tensor:
        logits = ask(black_box, images)
        if not black_box.whitebox:  # not the student
            assert not images.requires_grad and not logits.requires_grad
            shown.append(len(images))
        return logits

    monkeypatch.setattr(gretta.BlackBox, "__call__", watched)
    flags = ("--weights", RESNEXT, "--student", STUDENT, "--num-samples", 2, "--epochs", 1, "--est", est)
    run_here("gretta", *SMALL[:4], "--batch-size", 500, *flags, "--run-dir", tmp_path)
    assert sum(shown) == results_of(tmp_path)["queries"] == 3 * 500 * 4


def test_a_run_that_was_stopped_resumes_exactly(run, tmp_path, monkeypatch):
    """Within the second epoch: the same weights, results and log as the run that was never stopped."""
    lives, descend, flags = [9], common.descend, ("--checkpoint-minutes", 1e-9, "--run-dir", tmp_path)

    def stopping(*arguments: object) -> None:
        lives[0] -= 1
        if lives[0] == 0:
            raise KeyboardInterrupt
        descend(*arguments)

    monkeypatch.setattr(common, "descend", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_here("gretta", *SMALL, "--checkpoint-every", 1, "--seed", 3, *flags)
    assert state_of(tmp_path)["step"] == 8 and not (tmp_path / "results.json").exists()
    run_here("gretta", "--resume", *flags)
    assert plain(results_of(tmp_path)) == plain(results_of(run))
    assert_equal_weights(state_of(tmp_path)["policy"], state_of(run)["policy"])
    assert log_of(tmp_path) == log_of(run)


@pytest.mark.slow
def test_processes_share_the_batch_and_give_the_same_policy(tmp_path):
    """1, 2 and 3 (gloo) with the same global batch agree to 1e-5: small steps, and few, as rounding grows."""
    flags = ("--batch-size", 500, "--epochs", 1, "--opt", "sgd", "--lr", 1e-3, "--reg", "test", "--run-dir")
    run_here("gretta", *SMALL, *flags, tmp_path / "1")
    for count in (2, 3):
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, "gretta.py")
        run_script(*launch, *SMALL, *flags, tmp_path / str(count))
        one, many = (state_of(tmp_path / str(number))["policy"] for number in (1, count))
        assert one["backbone.fc.weight"].abs().max() > 5e-4  # from zero, 50 times the tolerance
        assert max((one[key].double() - many[key].double()).abs().max().item() for key in one) < 1e-5
        first, second = (results_of(tmp_path / str(number)) for number in (1, count))
        assert first["queries"] == second["queries"] and first["n_eval"] == second["n_eval"]
        assert first["accuracy"] == pytest.approx(second["accuracy"], abs=0.6)


def test_chexpert_is_scored_by_auroc(tmp_path):
    formats.make_chexpert(tmp_path / "data")
    torch.save(common.build_model("resnet18", 5, "chexpert").state_dict(), tmp_path / "resnet18.pt")
    flags = ("--dataset", "chexpert", "--data-root", tmp_path / "data", "--uncertain", "ignore", "--dry-run")
    flags += ("--model", "resnet18", "--weights", tmp_path / "resnet18.pt", "--batch-size", 4)
    run_here("gretta", *flags, "--run-dir", tmp_path / "run")
    results = results_of(tmp_path / "run")
    values = [figures["gretta"] for figures in results["auroc"].values()]
    assert set(results["auroc"]) <= {*gretta.FINDINGS} and results["metric"] == "mean AUROC"
    assert results["accuracy"]["gretta"] == pytest.approx(sum(values) / len(values))


MISTAKES = {
    "--proportion 1": ("--proportion", "1"),
    "--batch-size 1": ("--batch-size 1 ",),
    "--batch-size 2 --proportion 0.0001": ("--batch-size", "--proportion", "1 image"),
    "--model nonsense": ("nonsense", "resnext"),
    "--max-queries 9": ("--max-queries 9", "96 images"),
    "--model vit_b_16 --dataset fake": ("32 px",),
    "--load-conf README.md": ("README.md",),
    f"--weights {STUDENT}": (STUDENT, "missing", "unexpected"),
    f"--est surrogate --student {RESNEXT}": (RESNEXT, "missing"),
    f"--evaluate --weights-policy {RESNEXT}": (RESNEXT, "missing"),
    "--evaluate": ("checkpoint.pt", "--run-dir", "--weights-policy"),
    f"--predict weights --weights-policy {RESNEXT}": ("--predict", "no pictures"),
    "--export policy.pt": ("--export", ".pt2"),
    "--data-root tests": ("digits.npz", "--data-root"),
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_natural_mistakes(flags, tmp_path):
    given = ("--dry-run", "--run-dir", tmp_path / "run", *flags.split())
    refused(tmp_path, "gretta.py", *given, names=MISTAKES[flags])


def test_the_published_configuration_is_translated():
    source = {"model": "resnext", "augmix": True, "est": "surrogate", "cifar": "cifar", "checkpoints": "c"}
    source |= {"cifarc": "C", "paths": {"resnext": "a"}, "student_paths": {"resnext": "b"}}
    translated = gretta.from_source(source, gretta.parse_args(["--est", "surrogate"]))
    expected = {"dataset": "cifar100", "model": "resnext", "est": "surrogate", "data_root": "cifar"}
    assert translated == expected | {"corruptions_path": "C", "weights": "a", "student": "b"}
