"""Bad input to game_of_noise.py: exit code 2, one line on stderr that says what is wrong and where, and nothing written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import contents, refused, run_here, run_script
from PIL import Image

import common
import game_of_noise

CLASSES = ("cat", "cow", "dog")


@pytest.fixture
def refuses(refuses_here, tmp_path) -> Callable:
    """game_of_noise.py with a new run directory must refuse these flags in a line that holds all of `names`."""
    command = ("game_of_noise.py", "--dry-run", "--run-dir", tmp_path / "run")
    return lambda *flags, names=(): refuses_here(game_of_noise.main, *command, *flags, names=names)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """imagenet/, imagenet-c/ and sin/ with three classes and nothing wrong."""
    root = tmp_path_factory.mktemp("whole")
    folders = [root / "imagenet" / "train", root / "imagenet" / "val", root / "sin" / "train"]
    folders += [root / "imagenet-c" / name / str(severity) for name in common.CORRUPTIONS for severity in range(1, 6)]
    for folder in folders:
        for number, name in enumerate(CLASSES):
            (folder / name).mkdir(parents=True)
            Image.new("RGB", (64, 64), (80 * number, 90, 120)).save(folder / name / "picture.JPEG")
    return root


@pytest.fixture
def imagenet(whole, tmp_path) -> Path:
    """A copy of `whole` that a test may damage."""
    shutil.copytree(whole, tmp_path / "sets")
    return tmp_path / "sets"


def folders(root: Path, *more: object) -> tuple:
    return ("--arch", "resnet18", "--datadir-clean", root / "imagenet", "--imagenetc-path", root / "imagenet-c", *more)


# ------------------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "flag, value",
    [
        *(("--epsilon", value) for value in ("0", "-1", "nan", "inf", "large")),
        *(("--clean-share", value) for value in ("-0.1", "1.1", "nan")),
        ("--replay-share", "2"),
        ("--std-gauss", "0"),
        ("--std_gauss", "-1"),
        ("--batch-size", "1"),
        ("--fresh-iterations", "0"),
        ("--lr-step", "0"),
        *((flag, "nonsense") for flag in ("--mode", "--ng-type", "--model-name", "--dataset", "--eval-split", "-e")),
    ],
)
def test_values_out_of_range(flag, value, refuses):
    refuses(flag, value, names=(flag.replace("_", "-") if flag.startswith("--") else flag, value))


def test_epsilon_below_zero_in_a_process_of_its_own(tmp_path):
    refused(tmp_path, "game_of_noise.py", "--epsilon", "-3", "--run-dir", tmp_path / "run", names=("--epsilon", "-3", "> 0"))


def test_shares_over_one(refuses):
    refuses("--clean-share", "0.7", "--replay-share", "0.4", names=("--clean-share 0.7", "--replay-share 0.4", "more than 1"))


def test_stylised_digits_do_not_exist(refuses):
    refuses("--mode", "ANT+SIN", names=("ANT+SIN", "--datadir-sin"))


def test_unknown_models(imagenet, refuses):
    refuses("--model", "resnext999", names=("resnext999",))
    refuses("--model", "vit_b_16", names=("vit_b_16", "32 px"))
    refuses(*folders(imagenet), "--arch", "nonsense", names=("nonsense",))


def test_more_processes_than_images_in_a_batch(tmp_path):
    command = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        3,
        "game_of_noise.py",
        "--batch-size",
        2,
        "--run-dir",
        tmp_path / "run",
    )
    line = run_script(*command, expect=1, OMP_NUM_THREADS="1").stderr  # torchrun's own code
    assert "game_of_noise.py: error: a batch of 2 is smaller than the 3 processes" in line and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.slow
def test_whole_folders_are_not_refused(imagenet, tmp_path):
    """What the tests below damage works undamaged."""
    run_here("game_of_noise", "--dry-run", "--mode", "Speckle", *folders(imagenet), "--run-dir", tmp_path / "run")


@pytest.mark.parametrize("part", ["train", "val"])
def test_imagenet_without_train_or_val(part, imagenet, refuses):
    shutil.rmtree(imagenet / "imagenet" / part)
    refuses(*folders(imagenet), names=(imagenet / "imagenet" / part, "--datadir-clean", "image-net.org"))
    (imagenet / "imagenet" / part).mkdir()
    refuses(*folders(imagenet), names=(imagenet / "imagenet" / part, "no class folders"))


def test_evaluation_needs_val(imagenet, refuses):
    shutil.rmtree(imagenet / "imagenet" / "val")
    refuses("-e", "--model-name", "clean", *folders(imagenet), names=(imagenet / "imagenet" / "val", "is missing"))


def test_no_imagenet_at_all(tmp_path, refuses):
    refuses("--datadir-clean", tmp_path / "nowhere", names=(tmp_path / "nowhere", "is missing", "--datadir-clean"))
    refuses("--dataset", "imagenet", "--data-root", tmp_path, names=(tmp_path / "imagenet" / "val", "is missing"))


def test_an_empty_class_folder_of_imagenet_c_is_found_before_training(imagenet, refuses):
    (imagenet / "imagenet-c" / "jpeg_compression" / "5" / "dog" / "picture.JPEG").unlink()
    refuses(*folders(imagenet), names=(imagenet / "imagenet-c" / "jpeg_compression" / "5" / "dog", "holds no pictures"))


@pytest.mark.parametrize("missing", ["fog", "fog/3", "jpeg_compression/5/dog"])
def test_missing_parts_of_imagenet_c(missing, imagenet, refuses):
    shutil.rmtree(imagenet / "imagenet-c" / missing)
    parent, name = (missing.rsplit("/", 1)[0], "dog") if missing.endswith("dog") else (missing, "")
    refuses(*folders(imagenet), names=(imagenet / "imagenet-c" / parent, name))


def test_missing_stylised_images(imagenet, refuses):
    shutil.rmtree(imagenet / "sin" / "train")
    flags = folders(imagenet, "--mode", "ANT+SIN", "--datadir-sin", imagenet / "sin")
    refuses(*flags, names=(imagenet / "sin" / "train", "--datadir-sin", "Stylized-ImageNet"))


def test_classes_that_differ(imagenet, refuses):
    (imagenet / "imagenet" / "train" / "cow").rename(imagenet / "imagenet" / "train" / "horse")
    refuses(*folders(imagenet), names=(imagenet / "imagenet" / "train", "missing cow", "unexpected horse", imagenet / "imagenet" / "val"))


def test_a_class_without_pictures(imagenet, refuses):
    (imagenet / "imagenet" / "train" / "dog" / "picture.JPEG").rename(imagenet / "imagenet" / "train" / "dog" / "picture.txt")
    refuses(*folders(imagenet), names=(imagenet / "imagenet" / "train" / "dog", "no pictures"))


@pytest.mark.parametrize("where", ["imagenet/train", "imagenet/val", "imagenet-c/snow/2"])
def test_a_damaged_picture_is_named(where, imagenet, tmp_path):
    """It is met when it is read, after training for the test sets: the run directory stays, and the line is one line."""
    file = imagenet / where / "cat" / "picture.JPEG"  # the first: a dry run reads no more of ImageNet-C
    file.write_bytes(file.read_bytes()[:200])
    flags = folders(imagenet, "--mode", "Speckle", "--batch-size", 3)
    line = run_script("game_of_noise.py", "--dry-run", *flags, "--run-dir", tmp_path / "run", expect=2).stderr.splitlines()[-1]
    assert line.startswith("game_of_noise.py: error: ") and str(file) in line and "Traceback" not in line
    if where != "imagenet/train":
        assert (tmp_path / "run" / "checkpoint.pt").is_file()  # restore the picture, and --resume


# ------------------------------------------------------------------------------------------------------- checkpoints, runs


def test_checkpoints_that_do_not_fit(imagenet, tmp_path, refuses):
    wideresnet = common.WEIGHTS / "digits-wideresnet.pt"
    refuses("--weights", wideresnet, names=(wideresnet, "does not fit", "missing conv_1_3x3"))
    refuses("-e", "--weights", wideresnet, names=(wideresnet, "does not fit"))
    refuses("--weights", tmp_path / "none.pt", names=(tmp_path / "none.pt", "does not exist"))
    (tmp_path / "cut.pt").write_bytes(wideresnet.read_bytes()[:1000])
    refuses("--weights", tmp_path / "cut.pt", names=(tmp_path / "cut.pt", "truncated"))
    torch.save({"model_state_dict": common.build_model("resnet18", 5, "imagenet").state_dict()}, tmp_path / "five.pth")
    refuses(*folders(imagenet), "-e", "--weights", tmp_path / "five.pth", names=("five.pth", "fc.weight is (5, 512), not (3, 512)"))


def test_models_that_were_not_published(imagenet, refuses):
    refuses("-e", "--model-name", "ANT", names=("digits-resnext-ANT.pt", "--run-dir", "--weights"))
    refuses("-e", "--model-name", "Speckle", *folders(imagenet), names=("Speckle", "resnet50", "--weights"))


def test_evaluation_of_what_is_not_there(tmp_path, refuses):
    refuses("-e", names=(tmp_path / "run" / "checkpoint.pt", "does not exist", "--model-name"))
    refuses("--model-name", "clean", names=("--model-name clean", "--evaluate"))
    refuses("--mode", "clean", "--epochs", "2", names=("--mode clean", "--epochs 2"))


def test_a_model_without_published_weights(imagenet, refuses):
    refuses("--dataset", "imagenet", *folders(imagenet), "--arch", "wideresnet", names=("wideresnet", "--weights"))


def test_any_folder_of_imagenets_means_imagenet(tmp_path, refuses):
    refuses("--imagenetc-path", tmp_path, names=("imagenet", "--datadir-clean"))


@pytest.mark.parametrize("lr", ["1e30"])
def test_a_generator_that_diverges_is_named(lr, tmp_path):
    flags = ("--eval-split", "val", "--epochs", 1, "--fresh-iterations", 4, "--run-dir", tmp_path / "run")
    line = run_script("game_of_noise.py", *flags, "--fresh-lr", lr, expect=2).stderr.splitlines()[-1]
    assert "fresh generator is not finite at its step" in line and "--fresh-lr 1e+30" in line


def test_resume_with_another_method(tmp_path, refuses):
    (tmp_path / "run").mkdir()
    torch.save({"script": "game_of_noise", "method": "Speckle", "step": 1, "epoch": 1, "history": [], "memory": []} | {"state_dict": common.load_tensors(common.WEIGHTS / "digits-resnext.pt", "")}, tmp_path / "run" / "checkpoint.pt")  # fmt: skip
    refuses("--resume", "--mode", "ANT", names=("checkpoint.pt", "no run of game_of_noise with ANT"))


def test_a_run_directory_in_use(tmp_path, refuses):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refuses(names=(tmp_path / "run", "not empty", "--resume"))


def test_resume_of_another_scripts_run(tmp_path, refuses):
    (tmp_path / "run").mkdir()
    torch.save({"state_dict": {}, "history": []}, tmp_path / "run" / "checkpoint.pt")
    refuses("--resume", names=("checkpoint.pt", "no run of game_of_noise"))


def test_a_diverging_run_stops_and_keeps_the_last_checkpoint(tmp_path):
    """The step and the learning rate are named."""
    flags = ("--eval-split", "val", "--mode", "Gauss_single", "--epochs", 3, "--run-dir", tmp_path / "run")
    line = run_script("game_of_noise.py", *flags, "--lr", "1e30", expect=2).stderr.splitlines()[-1]
    assert "not finite at step 10" in line and "1e+30" in line and "--lr" in line
    assert "results.json" not in [file.name for file in contents(tmp_path)]


def test_a_damaged_picture_is_named_by_a_worker_too(imagenet):
    file = imagenet / "imagenet" / "val" / "dog" / "picture.JPEG"
    file.write_bytes(file.read_bytes()[:200])
    folder = common.class_folder(imagenet / "imagenet" / "val", list(CLASSES))
    for workers in (0, 2):
        with pytest.raises(common.InputError) as raised:
            list(folder.all_batches(2, workers, common.start_machine("cpu")))
        assert str(raised.value).startswith(f"{file} is not a readable picture") and "Traceback" not in str(raised.value)
