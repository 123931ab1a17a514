"""game_of_noise.py as a user runs it: on digits, on tiny ImageNet folders, on bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_equal_weights, refused, results_of, run_here, run_script, state_of
from conftest import without_times as plain
from formats import make_imagenet
from PIL import Image

import common
import game_of_noise

GAME = "game_of_noise.py"
SMALL = "--eval-split val --epochs 2 --batch-size 100 --fresh-iterations 2 --star-iterations 2"
FOLDERS = "--datadir-clean imagenet --imagenetc-path imagenet-c"
MODES = ("Gauss_single --std_gauss 0.2", "Gauss_mult", "Speckle", "clean", "ANT --ng_type 3x3")
MODES += ("ANT --model wideresnet --amp", "clean -e True --model_name clean")
SOURCE = ("ANT", "ANT+SIN --ng_type 3x3 --datadir-sin sin", "Gauss_single --std_gauss 0.5")


def play(flags: str, cwd: Path = ROOT) -> str:
    return run_here("game_of_noise", *flags.split(), cwd=cwd)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    play(f"{SMALL} --run-dir {directory} --seed 3")
    return directory


@pytest.mark.slow
def test_a_run_writes_what_it_says(run):
    results, lines = results_of(run), (run / "log.jsonl").read_text().splitlines()
    expected = {"script": "game_of_noise", "dataset": "digits", "model": "resnext", "method": "ANT"}
    expected |= {"seed": 3, "n_train": 1000, "n_eval": 197, "mce_reference": "clean model", "epsilon": 12.0}
    assert {key: results[key] for key in expected} == expected
    means, before = results["corruptions"], results["before"]["corruptions"]
    assert list(means) == [*common.CORRUPTIONS, "mean", "mean_without_noises"]
    for name, values in results["severities"].items():
        assert means[name] == pytest.approx(sum(values) / 5)
    errors = {name: 100 - before[name] for name in common.CORRUPTIONS}
    assert results["mce"] == game_of_noise.mean_corruption_error(means, errors, 100 / (5 * 197))
    assert 0 < results["epsilon_star"] < 3072 and 0 < results["epsilon_star_3x3"] < 3072
    epochs = [entry for entry in map(json.loads, lines) if "epoch" in entry]
    assert [(entry["epoch"], entry["step"]) for entry in epochs] == [(1, 10), (2, 20)]
    keys = {"loss", "accuracy_clean", "accuracy_noisy", "val_accuracy", "robust_accuracy"}
    assert all(keys <= entry.keys() for entry in epochs) and json.loads(lines[-1])["mce"] == results["mce"]
    assert (run / GAME).read_bytes() == (ROOT / GAME).read_bytes()
    for name in ("noise.png", "examples.png", "curves.png"):
        with Image.open(run / name) as picture:
            assert picture.size[0] >= 900 and len(picture.convert("RGB").getcolors(2**20)) > 50, name


def test_figures_are_the_saved_classifiers_and_memory_is_of_the_trained_generator(run, tmp_path):
    model, results, state = common.build_model("resnext", 10, "digits"), results_of(run), state_of(run)
    common.load_weights(model, run / "checkpoint.pt").eval()
    images, labels = common.load_split("digits", "val")
    told = {("clean", 0): results["clean_accuracy"], ("fog", 3): results["severities"]["fog"][2]}
    for (name, severity), accuracy in told.items():
        shown = common.corrupt_uint8(images, name, severity, 0) if severity else images
        right = model(common.to_float(shown)).argmax(1) == labels
        assert accuracy == pytest.approx(100 * right.double().mean().item(), abs=0.6), name
    memory = state["progress"]["memory"]
    assert_equal_weights(memory[1], state["generator"])
    assert len(memory) == 2 and not torch.equal(*(part["convolutions.3.bias"] for part in memory))
    play(f"-e --dry-run --weights {run}/checkpoint.pt --run-dir other --data-root {ROOT}/data", tmp_path)
    assert results_of(tmp_path / "other")["method"] == "run"


@pytest.mark.slow
def test_stopped_in_the_middle_of_an_epoch_is_as_never_stopped(run, tmp_path, monkeypatch):
    """Figures and weights, bit for bit: so the same seed gives the same results, too."""
    ascend, left = game_of_noise.ascend, iter(range(2 + 10 + 2 + 3, -1, -1))  # fresh and game, twice
    monkeypatch.setattr(game_of_noise, "ascend", lambda *step: ascend(*step) if next(left, True) else 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a checkpoint at every step
        play(f"{SMALL} --seed 3 --run-dir {tmp_path}/run --checkpoint-minutes 1e-9")
    assert state_of(tmp_path / "run")["step"] == 13
    play(f"--resume --run-dir {tmp_path}/run")
    assert plain(results_of(tmp_path / "run")) == plain(results_of(run))
    for part in ("classifier", "generator"):
        assert_equal_weights(state_of(tmp_path / "run")[part], state_of(run)[part])
    assert "ANT (resnext)" in play(f"--resume --run-dir {tmp_path}/run")  # it had finished


@pytest.mark.parametrize("flags", MODES)
def test_each_mode(flags, tmp_path):
    play(f"--dry-run --mode {flags} --run-dir run --data-root {ROOT}/data", tmp_path)
    results, method = results_of(tmp_path / "run"), "ANT3x3" if "3x3" in flags else flags.split()[0]
    assert results["method"] == method and results["n_eval"] == 16 and results["before"]
    assert results["mce"] == pytest.approx(100) or method != "clean"
    if "-e" not in flags:
        trained = state_of(tmp_path / "run")["classifier"]
        shipped = common.load_tensors(common.WEIGHTS / f"digits-{results['model']}.pt", "")
        assert (method == "clean") == all(torch.equal(trained[key], shipped[key]) for key in shipped)
        play(f"-e --run-dir run --data-root {ROOT}/data", tmp_path)
        assert results_of(tmp_path / "run") == results
        report = (tmp_path / "Results" / f"{method}_evaluation_results.txt").read_text()
        figures = (results["mce"], results["epsilon_star"], *results["corruptions"].values())
        assert all(f"{figure:.2f}" in report for figure in (*figures, *results["severities"]["fog"]))


@pytest.mark.slow
def test_several_processes_play_the_same_game(tmp_path):
    """But for rounding, of which Adam makes parts of a step, here small (1e-4); 5 images on 3 ranks."""
    flags = "--dry-run --batch-size 5 --lr 1e-3 --generator-lr 1e-4 --fresh-lr 1e-4 --run-dir"
    play(f"{flags} {tmp_path}/1")
    one, accuracy = state_of(tmp_path / "1"), results_of(tmp_path / "1")["clean_accuracy"]
    for processes in (2, 3):
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {processes} {GAME} {flags}"
        run_script(*torchrun.split(), tmp_path / f"{processes}", OMP_NUM_THREADS="1")
        many = state_of(tmp_path / f"{processes}")
        torch.testing.assert_close(many["classifier"], one["classifier"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(many["generator"], one["generator"], rtol=0, atol=5e-5)
        assert results_of(tmp_path / f"{processes}")["clean_accuracy"] == accuracy


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    make_imagenet(root := tmp_path_factory.mktemp("imagenet"), stylised=2)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("flags", SOURCE)
def test_training_commands_of_the_source(flags, imagenet, tmp_path):
    """As a dry run: 224 px, two small epochs, every folder of ImageNet-C; the first with ResNet-50."""
    arch = "" if flags == "ANT" else "--arch resnet18"
    play(f"--mode {flags} {FOLDERS} {arch} --dry-run --run-dir {tmp_path}/run", imagenet)
    results, arguments = results_of(tmp_path / "run"), json.loads((tmp_path / "run/args.json").read_text())
    expected = {"dataset": "imagenet", "n_train": 12, "n_eval": 4, "mce_reference": "alexnet"}
    expected |= {"epsilon": 135, "lr": 1e-3, "std_gauss": 0.5, "corruptions_path": "imagenet-c"}
    assert {key: (arguments | results)[key] for key in expected} == expected
    assert len(state_of(tmp_path / "run")["progress"]["memory"]) == (2 if "ANT" in flags else 0)
    if "Gauss" in flags:  # a machine without the training images evaluates it, too
        shutil.copytree(imagenet, tmp_path / "here", ignore=shutil.ignore_patterns("train"))
        play(f"-e --run-dir {tmp_path}/run", tmp_path / "here")
        after = results_of(tmp_path / "run")
        assert after["corruptions"] == results["corruptions"] and after["n_train"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("name, prefix", [("Speckle", ""), ("ANT3x3+SIN", "resnet.")])
def test_evaluation_commands_of_the_source(name, prefix, imagenet, tmp_path, monkeypatch):
    """A published file by its name, in both of its layouts; what it says of val/ is computed here, too."""
    model = common.build_model("resnet50", 2, "imagenet")
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / f"{name}.pth")
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    given = name.replace("+", "-")
    play(f"-e True --model_name {given} {FOLDERS} --dry-run --run-dir {tmp_path}/run", imagenet)
    results, machine = results_of(tmp_path / "run"), common.start_machine("cpu")
    val = common.class_folder(imagenet / "imagenet/val", machine, 0, "")
    assert results["method"] == name and (imagenet / f"Results/{name}_evaluation_results.txt").is_file()
    assert results["clean_accuracy"] == pytest.approx(common.evaluate([model], val)[0]["top1_accuracy"])


MISTAKES = {
    "--epsilon 0": ("--epsilon", "> 0"),
    "--std_gauss -1": ("--std-gauss", "-1"),
    "--batch-size 1": ("--batch-size", "≥ 2"),
    "--mode ANT+SIN": ("ANT+SIN", "--datadir-sin"),
    "--blackbox mine.py:answer": ("mine.py:answer", "--evaluate"),
    "--mode clean --epochs 2": ("--mode clean", "--epochs 2"),
    "--model-name clean": ("--model-name clean", "--evaluate"),
    "-e": ("holds no checkpoint", "--model-name", "--weights"),
    "-e --model-name ANT": ("digits-resnext-ANT.pt", "does not exist"),
    "-e --weights weights/digits-wideresnet.pt": ("digits-wideresnet.pt", "does not fit", "conv_1_3x3"),
    "--weights none.pt": ("none.pt", "does not exist"),
    "--imagenetc-path nowhere": ("imagenet", "is missing", "--data-root"),
    "--datadir-clean nowhere": ("nowhere", "is missing", "--datadir-clean"),
}
TOO_LARGE = {"--fresh-lr 1e18": r"fresh generator is not finite at its step 2 \(--fresh-lr 1e\+18\)"}
TOO_LARGE |= {"--mode Gauss_single --lr 1e18": "not finite at step 10: lower --lr"}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes(flags, tmp_path):
    refused(tmp_path, GAME, "--dry-run", "--run-dir", tmp_path / "run", *flags.split(), names=MISTAKES[flags])


@pytest.mark.parametrize("flags", TOO_LARGE)
def test_a_loss_that_is_not_finite_is_named(flags, tmp_path):
    with pytest.raises(common.InputError, match=TOO_LARGE[flags]):
        play(f"{SMALL} {flags} --run-dir {tmp_path}/run")
    assert not list(tmp_path.rglob("results.json"))


def test_more_processes_than_images_in_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "start_machine", lambda *_: common.Machine(torch.device("cpu"), 0, 3))
    monkeypatch.setattr(common.Machine, "on_main", lambda _, work: work())
    flags = ("--batch-size", 2, "--run-dir", tmp_path / "run")
    refused(tmp_path, GAME, *flags, names=("--batch-size 2: fewer than the 3 processes",))


def test_a_run_is_continued_and_evaluated_as_it_was_made(run):
    for flags in ("--eval-split test", "--epsilon 3", "--fresh-lr 0.5", "--seed 5", "--dry-run"):
        for use in ("--evaluate", "--resume"):
            refused(run, GAME, use, "--run-dir", run, *flags.split(), names=(f"{flags.split()[0]} ", run))


@pytest.mark.parametrize("damaged", ["imagenet/train", "imagenet-c/fog/3", "sin/train"])
def test_folders_that_are_not_whole(damaged, imagenet, tmp_path):
    sets = shutil.copytree(imagenet, tmp_path / "sets")
    flags = f"--datadir-clean {sets}/imagenet --imagenetc-path {sets}/imagenet-c --datadir-sin {sets}/sin"
    flags = f"--arch resnet18 --mode ANT+SIN {flags} --dry-run --run-dir {tmp_path}/run".split()
    (sets / damaged / "n01443537").rename(sets / damaged / "horse")
    refused(tmp_path, GAME, *flags, names=(sets / damaged, "other classes", "horse"))
    shutil.rmtree(sets / damaged)
    refused(tmp_path, GAME, *flags, names=(sets / damaged, "is missing"))


def test_a_black_box_is_scored_on_corruptions(tmp_path):
    """As the classifier that it holds is; what needs gradients is left out, and said."""
    (tmp_path / "mine.py").write_text("""import common, torch
model = common.build_model("resnext", 10, "digits").eval()
common.load_weights(model, common.WEIGHTS / "digits-resnext.pt")
def answer(images):
    return model(torch.from_numpy(images)).softmax(1).detach().numpy()
""")
    printed = play("-e --dry-run --run-dir black --blackbox mine.py:answer", tmp_path)
    play("-e --dry-run --run-dir model --model-name clean", tmp_path)
    black, model = results_of(tmp_path / "black"), results_of(tmp_path / "model")
    for key in ("clean_accuracy", "corruptions", "severities"):
        assert black[key] == model[key]
    assert black["epsilon_star"] is None and black["mce"] is None and black["model"] == "mine-answer"
    assert "ε* is left out" in printed and "probabilities" in printed
    assert "mine-answer" in (tmp_path / "Results/blackbox_evaluation_results.txt").read_text()
