"""game_of_noise.py as a user runs it, on digits, on tiny ImageNet folders, and the figures in the files it writes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TIMES, Handler, assert_equal_weights, refused, results_of, run_here, run_script, state_of, without_times
from PIL import Image

import common
import game_of_noise

SMALL = ("--eval-split", "val", "--epochs", "2", "--batch-size", "100", "--fresh-iterations", "2", "--star-iterations", "2")
PICTURES = ("noise.png", "examples.png", "patches.png", "corruptions.png", "curves.png")
CLASSES = ("n01440764", "n01443537", "n01484850")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One small ANT run that several tests look at, in a process of its own."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    run_script("game_of_noise.py", *SMALL, "--run-dir", directory, "--seed", 3)
    return directory


def test_a_run_writes_what_the_readme_says(run):
    results, arguments = results_of(run), json.loads((run / "args.json").read_text())
    expected = {"script": "game_of_noise", "dataset": "digits", "model": "resnext", "method": "ANT", "seed": 3, "n_train": 1000, "n_eval": 197}
    expected |= {"mce_reference": "clean model"}
    assert {key: results[key] for key in expected} == expected
    corruptions = results["corruptions"]
    assert list(corruptions) == [*common.CORRUPTIONS, "mean", "mean_without_noises"]
    assert corruptions["mean"] == pytest.approx(sum(corruptions[name] for name in common.CORRUPTIONS) / 15)
    assert corruptions["mean_without_noises"] == pytest.approx(sum(corruptions[name] for name in common.CORRUPTIONS[3:]) / 12)
    assert all(corruptions[name] == pytest.approx(sum(values) / 5) for name, values in results["severities"].items())
    errors = {name: 100 - results["before"]["corruptions"][name] for name in common.CORRUPTIONS}
    assert results["mce"] == pytest.approx(game_of_noise.mean_corruption_error(corruptions, errors, 100 / (5 * 197)))
    assert 0 < results["epsilon_star"] < 3072 and 0 < results["epsilon_star_3x3"] < 3072
    assert "digits-C" in results["protocol"] and "clean model" in results["protocol"] and "197 val images" in results["protocol"]
    assert arguments["epsilon"] == game_of_noise.SETTINGS["digits"]["epsilon"] and arguments["world_size"] == 1
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    epochs = [entry for entry in log if "epoch" in entry]
    assert [entry["epoch"] for entry in epochs] == [1, 2] and [entry["step"] for entry in epochs] == [10, 20]
    assert all({"loss", "accuracy_clean", "accuracy_noisy", "val_accuracy", "robust_accuracy"} <= entry.keys() for entry in epochs)
    assert log[-1]["test_clean"] == results["clean_accuracy"] and log[-1]["epsilon_star"] == results["epsilon_star"]
    assert (run / "game_of_noise.py").read_bytes() == (ROOT / "game_of_noise.py").read_bytes() and list(run.glob("events.out.tfevents.*"))
    for name in PICTURES:
        with Image.open(run / name) as picture:
            assert picture.size[0] >= 900 and len(picture.convert("RGB").getcolors(2**20)) > 50, name


def test_figures_in_results_are_those_of_the_saved_classifier(run):
    """Clean accuracy and two corruptions, computed here from the checkpoint."""
    classifier = common.load_weights(common.build_model("resnext", 10, "digits"), run / "checkpoint.pt").eval()
    images, labels = common.load_split("digits", "val")
    results = results_of(run)
    sets = {("clean", None): images}
    sets |= {(name, 3): common.to_uint8(common.corrupt(common.to_float(images), name, 3, 0)) for name in ("fog", "gaussian_noise")}
    for (name, severity), shown in sets.items():
        with torch.no_grad():
            accuracy = 100 * (classifier(common.to_float(shown)).argmax(1) == labels).double().mean().item()
        told = results["clean_accuracy"] if severity is None else results["severities"][name][severity - 1]
        assert told == pytest.approx(accuracy, abs=0.6), name


def test_the_generator_that_is_trained_is_the_one_in_memory(run):
    """Two epochs, two memories, and each epoch's generator differs from the other and from where it started."""
    state = state_of(run)
    assert len(state["memory"]) == 2
    assert_equal_weights(state["memory"][-1], state["current"])
    assert not torch.equal(state["memory"][0]["convolutions.3.bias"], state["memory"][1]["convolutions.3.bias"])
    assert state["current"]["convolutions.3.bias"].abs().sum() > 0


def test_without_reset_the_generator_plays_on(tmp_path):
    """With --no-reset-generator the second epoch starts from the first one's generator: one small step away, where a fresh one is far."""
    distance = {}
    for flag in ("--reset-generator", "--no-reset-generator"):
        run_here("game_of_noise", "--dry-run", flag, "--generator-lr", "1e-5", "--run-dir", tmp_path / flag)
        first, second = state_of(tmp_path / flag)["memory"]
        distance[flag] = (first["convolutions.0.weight"] - second["convolutions.0.weight"]).abs().max().item()
    assert distance["--no-reset-generator"] <= 1.1e-5 < 1e-3 < distance["--reset-generator"]


def test_a_stale_generator_is_trained_no_more(tmp_path):
    """--generator-epochs 1 --no-reset-generator, as the published code: the second epoch's is the first one's, bit for bit; yet the first was trained."""
    for flags in ((), ("--generator-epochs", "1"), ("--generator-epochs", "0")):
        run_here("game_of_noise", "--dry-run", "--no-reset-generator", *flags, "--run-dir", tmp_path / "-".join(("run", *flags)))
    states = {file.name: state_of(file)["memory"] for file in tmp_path.iterdir()}
    first, second = states["run---generator-epochs-1"]
    assert_equal_weights(first, second)
    assert_equal_weights(first, states["run"][0])
    assert not torch.equal(first["convolutions.0.weight"], states["run"][1]["convolutions.0.weight"])
    assert not torch.equal(first["convolutions.0.weight"], states["run---generator-epochs-0"][0]["convolutions.0.weight"])


@pytest.mark.slow
def test_a_killed_run_continues_as_if_nothing_had_happened(run, tmp_path):
    """Weights and figures of a run that was never killed, bit for bit; so the same seed gives the same results too."""
    directory = tmp_path / "run"
    command = [sys.executable, ROOT / "game_of_noise.py", *SMALL, "--seed", "3", "--run-dir", directory]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (directory / "checkpoint.pt").is_file() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state_of(directory)["epoch"] == 1 and not (directory / "results.json").exists()
    run_here("game_of_noise", "--resume", "--run-dir", directory)
    assert without_times(results_of(directory)) == without_times(results_of(run))
    assert_equal_weights(state_of(directory)["state_dict"], state_of(run)["state_dict"])
    steps = [json.loads(line)["step"] for line in (directory / "log.jsonl").read_text().splitlines() if '"epoch"' in line]
    assert steps == [10, 20]
    again = run_here("game_of_noise", "--resume", "--run-dir", directory)
    assert "finished run" in again


@pytest.mark.slow
def test_evaluate_repeats_the_figures_and_writes_the_report(run, tmp_path):
    before = results_of(run)
    shutil.copytree(run, tmp_path / "run")
    run_here("game_of_noise", "-e", "--run-dir", "run", "--data-root", ROOT / "data", cwd=tmp_path)
    assert without_times(results_of(tmp_path / "run")) == without_times(before)
    report = (tmp_path / "Results" / "ANT_evaluation_results.txt").read_text()
    for figure in (before["clean_accuracy"], before["mce"], before["epsilon_star"], *before["corruptions"].values(), *before["severities"]["fog"]):
        assert f"{figure:.2f}" in report
    assert all(name in report for name in common.CORRUPTIONS)


def test_an_evaluation_in_place_is_of_the_runs_own_settings(run):
    for flags in (("--eval-split", "test"), ("--epsilon", "3"), ("--star-iterations", "5"), ("--fresh-lr", "0.5"), ("--seed", "5"), ("--dry-run",)):
        names = (f"{flags[0]} ", "would overwrite the results of", run)
        refused(run, "game_of_noise.py", "--evaluate", "--run-dir", run, *flags, names=names)


@pytest.mark.slow
def test_a_run_from_other_weights_is_evaluated_as_itself(run, tmp_path):
    """What it started from is the reference; the run's own directory is used, and its time stays."""
    flags = ("--mode", "Speckle", "--eval-split", "val", "--weights", run / "checkpoint.pt")
    run_here("game_of_noise", "--dry-run", *flags, "--run-dir", tmp_path / "run")
    before = results_of(tmp_path / "run")
    again = run_here("game_of_noise", "--resume", "--run-dir", tmp_path / "run")
    assert "finished run" in again
    run_here("game_of_noise", "-e", "--run-dir", "run", "--data-root", ROOT / "data", cwd=tmp_path)
    after = results_of(tmp_path / "run")
    assert after["n_eval"] == 197 and after["method"] == "Speckle" and {key: after[key] for key in TIMES} == {key: before[key] for key in TIMES}
    assert after["before"]["corruptions"] == results_of(run)["corruptions"]


@pytest.mark.slow
def test_evaluate_the_clean_model(tmp_path):
    """Its own reference: an mCE of 100, and nothing is trained."""
    flags = ("--eval-split", "val", "--star-iterations", "2")
    run_here("game_of_noise", "-e", "True", "--model_name", "clean", *flags, "--run-dir", "out", cwd=tmp_path)
    results = results_of(tmp_path / "out")
    assert results["method"] == "clean" and results["mce"] == pytest.approx(100) and results["corruptions"] == results["before"]["corruptions"]
    assert not (tmp_path / "out" / "checkpoint.pt").exists() and (tmp_path / "Results" / "clean_evaluation_results.txt").is_file()
    images, labels = common.load_split("digits", "val")
    shipped = common.load_weights(common.build_model("resnext", 10, "digits"), common.WEIGHTS / "digits-resnext.pt").eval()
    accuracy = common.evaluate(shipped, images, labels, common.start_machine("cpu"))["top1_accuracy"]
    assert results["clean_accuracy"] == pytest.approx(accuracy, abs=0.6)


@pytest.mark.parametrize("flags", [("--mode", "Gauss_single", "--std_gauss", "0.2"), ("--mode", "Gauss_mult"), ("--mode", "Speckle"), ("--mode", "clean"), ("--mode", "ANT", "--ng_type", "3x3"), ("--model", "wideresnet", "--amp")], ids=" ".join)  # fmt: skip
def test_each_mode(flags, tmp_path):
    run_here("game_of_noise", "--dry-run", *flags, "--run-dir", tmp_path / "run")
    results = results_of(tmp_path / "run")
    assert results["method"] == {"3x3": "ANT3x3", "--amp": "ANT"}.get(flags[-1], flags[1]) and results["n_eval"] == 16
    shipped = torch.load(common.WEIGHTS / f"digits-{results['model']}.pt", weights_only=True)
    if results["method"] == "clean":
        assert results["mce"] == pytest.approx(100)
        assert_equal_weights(state_of(tmp_path / "run")["state_dict"], shipped)
    else:
        trained = state_of(tmp_path / "run")["state_dict"]
        assert any(not torch.equal(trained[key], shipped[key]) for key in shipped if key.endswith("weight"))


@pytest.mark.slow
def test_several_processes_play_the_same_game(tmp_path):
    """The same classifier and generator as one process, but for rounding, which a few small steps do not let grow; 5 images on 3 ranks."""
    flags = ("--dry-run", "--batch-size", 5, "--lr", "1e-3", "--generator-lr", "1e-4", "--fresh-lr", "1e-4", "--run-dir")
    run_here("game_of_noise", *flags, tmp_path / "1")
    one = state_of(tmp_path / "1")
    for processes in (2, 3):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "game_of_noise.py", *flags]
        run_script(*command, tmp_path / f"{processes}", OMP_NUM_THREADS="1")
        many = state_of(tmp_path / f"{processes}")
        for key, value in one["state_dict"].items():
            if value.is_floating_point():
                torch.testing.assert_close(many["state_dict"][key], value, rtol=1e-3, atol=1e-5)
        for key, value in one["current"].items():
            torch.testing.assert_close(many["current"][key], value, rtol=0, atol=5e-5)  # Adam turns rounding into parts of a step, 1e-4
        assert results_of(tmp_path / f"{processes}")["clean_accuracy"] == results_of(tmp_path / "1")["clean_accuracy"]
        assert json.loads((tmp_path / f"{processes}/args.json").read_text())["world_size"] == processes


# ---------------------------------------------------------------------------------------------------------------------
# Tiny ImageNet, ImageNet-C and Stylized-ImageNet folders
# ---------------------------------------------------------------------------------------------------------------------


def make_pictures(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    pictures = common.to_uint8(common.example_pictures(count, 64, seed))
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{folder.name}_{number}.JPEG")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """imagenet/{train,val}, imagenet-c and sin, three classes of 64 px JPEGs; and a copy of the scripts, with weights/ and no data."""
    root = tmp_path_factory.mktemp("imagenet")
    for number, name in enumerate(CLASSES):
        make_pictures(root / "imagenet" / "train" / name, 6, number)
        make_pictures(root / "imagenet" / "val" / name, 2, 10 + number)
        make_pictures(root / "sin" / "train" / name, 2, 20 + number)
        for corruption in common.CORRUPTIONS:
            for severity in range(1, 6):
                make_pictures(root / "imagenet-c" / corruption / str(severity) / name, 1, 30 + number)
    (root / "weights").mkdir()
    for script in ("game_of_noise.py", "common.py"):
        shutil.copy(ROOT / script, root)
    return root


# The commands of the published code's README, with its main.py renamed
TRAIN_COMMANDS = {
    "ANT": "--mode ANT --datadir-clean imagenet --imagenetc-path imagenet-c",
    "ANT3x3": "--mode ANT --ng_type 3x3 --datadir-clean imagenet --imagenetc-path imagenet-c",
    "ANT+SIN": "--mode ANT+SIN --datadir-clean imagenet --imagenetc-path imagenet-c --datadir-sin sin",
    "Gauss_single": "--mode Gauss_single --std_gauss 0.5 --datadir-clean imagenet --imagenetc-path imagenet-c",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAIN_COMMANDS)
def test_training_commands_of_the_source(method, imagenet, tmp_path):
    """As a dry run, which needs no network: 224 px, two small epochs, every ImageNet-C folder. The first with the ResNet-50 that is the default, the
    others with a ResNet-18, for time's sake."""
    model = "resnet50" if method == "ANT" else "resnet18"
    command = TRAIN_COMMANDS[method] + (f" --arch {model}" if method != "ANT" else "")
    run_script("game_of_noise.py", *command.split(), "--dry-run", "--run-dir", tmp_path / "run", cwd=imagenet)
    results, arguments = results_of(tmp_path / "run"), json.loads((tmp_path / "run" / "args.json").read_text())
    expected = {"dataset": "imagenet", "model": model, "method": method, "n_train": 18, "n_eval": 6, "mce_reference": "alexnet"}
    assert {key: results[key] for key in expected} == expected
    assert arguments["epsilon"] == 135 and arguments["std_gauss"] == 0.5 and arguments["lr"] == 1e-3
    assert set(results["severities"]) == set(common.CORRUPTIONS) and all(len(values) == 5 for values in results["severities"].values())
    assert len(state_of(tmp_path / "run")["memory"]) == (2 if method.startswith("ANT") else 0)
    if method == "Gauss_single":  # a machine without the training images evaluates it, too
        train, away = imagenet / "imagenet" / "train", imagenet / "away"
        train.rename(away)
        try:
            run_script("game_of_noise.py", "-e", "--dry-run", "--run-dir", tmp_path / "run", cwd=imagenet)
        finally:
            away.rename(train)
        assert results_of(tmp_path / "run")["n_train"] == 18


@pytest.mark.slow
@pytest.mark.parametrize("name, file, flags", [("Speckle", "Speckle_Model.pth", ""), ("ANT3x3+SIN", "ANT3x3_SIN_Model.pth", "--ng_type 3x3")])
def test_evaluation_commands_of_the_source(name, file, flags, imagenet, tmp_path):
    """A published file by its name, in both of its layouts (with and without `resnet.` before the keys); the folder is val/ itself the first time."""
    model = common.build_model("resnet50", 3, "imagenet")
    prefix = "resnet." if flags else ""
    torch.save({"model_state_dict": {prefix + key: value for key, value in model.state_dict().items()}}, imagenet / "weights" / file)
    clean = "imagenet" if flags else "imagenet/val"
    command = ["-e", "True", "--model_name", name, *flags.split(), "--datadir-clean", clean, "--imagenetc-path", "imagenet-c"]
    run_script("game_of_noise.py", *command, "--dry-run", "--run-dir", tmp_path / "run", cwd=imagenet)
    (imagenet / "weights" / file).unlink()
    results = results_of(tmp_path / "run")
    assert results["method"] == name and results["n_eval"] == 6 and results["mce_reference"] == "alexnet"
    assert (imagenet / "Results" / f"{name}_evaluation_results.txt").is_file()
    # what the file's model says of val/, computed here
    folder = common.class_folder(imagenet / "imagenet" / "val", list(CLASSES))
    images = torch.stack([folder[number, None][0] for number in range(6)])
    accuracy = common.evaluate(model.eval(), images, folder.labels, common.start_machine("cpu"))["top1_accuracy"]
    assert results["clean_accuracy"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_a_whole_run_on_folders(imagenet, tmp_path):
    """ResNet-18 without --dry-run, and its corruption figures from the folders; two workers change nothing but the speed."""
    weights = tmp_path / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(common.build_model("resnet18", 3, "imagenet").state_dict(), weights)
    flags = ["--arch", "resnet18", "--weights", weights, "--datadir-clean", "imagenet", "--imagenetc-path", "imagenet-c", "--epochs", "1"]
    flags += ["--batch-size", "9", "--fresh-iterations", "1", "--star-iterations", "1"]
    for workers in (0, 2):
        run_script("game_of_noise.py", *flags, "--workers", workers, "--run-dir", tmp_path / f"run{workers}", cwd=imagenet)
    results = results_of(tmp_path / "run2")
    assert without_times(results) == without_times(results_of(tmp_path / "run0"))
    assert_equal_weights(state_of(tmp_path / "run0")["state_dict"], state_of(tmp_path / "run2")["state_dict"])
    model = common.load_weights(common.build_model("resnet18", 3, "imagenet"), tmp_path / "run2" / "checkpoint.pt").eval()
    folder = common.class_folder(imagenet / "imagenet-c" / "fog" / "4", list(CLASSES), resize=224)
    accuracy = common.evaluate_folder([model], folder, 2, 0, common.start_machine("cpu"))[0]["top1_accuracy"]
    assert results["severities"]["fog"][3] == pytest.approx(accuracy) and results["n_train"] == 18


def test_a_folder_is_read_as_torchvision_reads_it(imagenet):
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    folder = common.class_folder(imagenet / "imagenet" / "train", list(CLASSES))
    theirs = ImageFolder(
        imagenet / "imagenet" / "train", transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    )
    assert len(folder) == len(theirs) == 18 and folder.labels.tolist() == theirs.targets
    for number in (0, 7, 17):
        assert torch.equal(folder[number, None][0], theirs[number][0])
    first, again, other = (folder[3, key][0] for key in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (3, 224, 224) and first.dtype == torch.uint8


def test_an_epoch_of_a_folder_shows_every_picture_once_on_one_rank(imagenet):
    folder = common.class_folder(imagenet / "imagenet" / "train", list(CLASSES))
    machines = [common.start_machine("cpu")._replace(rank=rank, world_size=2) for rank in (0, 1)]
    labels, images = [], []
    for machine in machines:
        batches = list(common.image_batches(folder, 5, torch.Generator().manual_seed(0), machine))
        assert len(batches) == 3 and [len(part) for _, part in batches] == [2 + machine.rank] * 3
        labels.append([part for _, part in batches])
        images.append([part for part, _ in batches])
    whole = list(common.image_batches(folder, 5, torch.Generator().manual_seed(0), common.start_machine("cpu")))
    for number, (together, together_labels) in enumerate(whole):
        assert torch.equal(together, torch.cat([images[0][number], images[1][number]]))
        assert torch.equal(together_labels, torch.cat([labels[0][number], labels[1][number]]))


def test_pretrained_weights_are_torchvisions_and_another_number_of_classes_keeps_the_rest(tmp_path, monkeypatch):
    """A stand-in for the downloaded file, in torch.hub's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, file, head in (("resnet18", "resnet18-f37072fd.pth", "fc.weight"), ("inception_v3", "inception_v3_google-0cc3c7bd.pth", "fc.weight")):
        from torchvision import models

        extra = {"aux_logits": True, "init_weights": False} if name == "inception_v3" else {}
        published = models.get_model(name, weights=None, **extra).state_dict()
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
        torch.save(published, tmp_path / "hub" / "checkpoints" / file)
        model = common.build_model(name, 3, "imagenet")
        own_head = model.state_dict()[head].clone()
        origin = common.load_imagenet_weights(model, name, common.start_machine("cpu"))
        loaded = model.state_dict()
        assert file in origin and "fc.weight" in origin and torch.equal(loaded[head], own_head)
        assert all(torch.equal(value, published[key]) for key, value in loaded.items() if not key.startswith("fc."))
        whole = common.build_model(name, 1000, "imagenet")
        common.load_imagenet_weights(whole, name, common.start_machine("cpu"))
        assert torch.equal(whole.state_dict()[head], published[head])


def test_published_models_are_downloaded_from_their_address(address, tmp_path, monkeypatch):
    """A server on this machine in place of the address: the file arrives whole; a missing one gives one line, and no file."""
    monkeypatch.setattr(Handler, "archives", {"/ANT_Model.pth": b"stand-in" * 1000})
    monkeypatch.setattr(common, "WEIGHTS", tmp_path / "weights")
    for name in ("ANT", "Speckle"):
        published = common.PUBLISHED_WEIGHTS[name]
        monkeypatch.setitem(common.PUBLISHED_WEIGHTS, name, published._replace(url=f"{address}/{published.file}"))
    machine = common.start_machine("cpu")
    for _ in range(2):
        file = game_of_noise.find_weights("imagenet", "resnet50", "ANT", False, machine)
        assert file == tmp_path / "weights" / "ANT_Model.pth" and file.read_bytes() == b"stand-in" * 1000
    assert Handler.asked == [("/ANT_Model.pth", None)]  # kept: asked for once
    with pytest.raises(common.InputError, match="cannot download .*Speckle_Model.pth.*404.*put the file at"):
        game_of_noise.find_weights("imagenet", "resnet50", "Speckle", False, machine)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["ANT_Model.pth", "sha256.json"]
