"""Data sets that are missing, damaged or do not fit: exit code 2, one line on stderr that says what is wrong and where, and nothing written."""

import csv
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import WNIDS, make_chexpert, make_cifar, make_imagenet, make_mnist, make_pictures
from PIL import Image

import advaa
import common
import game_of_noise
import gretta

SCRIPTS = {"gretta": gretta, "advaa": advaa, "game_of_noise": game_of_noise}


@pytest.fixture
def refuses(refuses_here, tmp_path) -> Callable:
    """SCRIPT.py on the data in tmp_path must refuse these flags in a line that holds all of `names`."""

    def refuse(script: str, *flags: object, names: tuple = ()) -> str:
        command = (f"{script}.py", "--dry-run", "--data-root", tmp_path, "--run-dir", tmp_path / "run", *flags)
        return refuses_here(SCRIPTS[script].main, *command, names=names)

    return refuse


@pytest.mark.parametrize(
    "dataset, place, source",
    [
        ("cifar10", "cifar-10-batches-py", "python common.py --download cifar10"),
        ("cifar100", "cifar-100-python", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", "python common.py --download mnist"),
        ("imagenet", "imagenet/val", "https://image-net.org/download.php"),
        ("folder", "val", "train/, and test/ or val/"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_set_is_named_with_its_place_and_where_it_is_had(script, dataset, place, source, refuses, tmp_path):
    weights = ("--weights", tmp_path / "none.pt") if dataset == "folder" else ()
    refuses(script, "--dataset", dataset, *weights, names=(tmp_path / place, "is missing", source))


def test_without_a_network_the_place_and_the_address_are_named(refuses_here, tmp_path, monkeypatch):
    monkeypatch.setitem(common.ARCHIVES, "cifar10", ("", [("http://127.0.0.1:9/cifar-10-python.tar.gz", "0" * 32, ["cifar-10-batches-py"])]))
    command = ("advaa.py", "--dataset", "cifar10", "--data-root", tmp_path / "data", "--run-dir", tmp_path / "run")
    names = (tmp_path / "data/cifar-10-batches-py", "is missing", "cannot download http://127.0.0.1:9/", tmp_path / "data/cifar-10-python.tar.gz")
    refuses_here(advaa.main, *command, names=names)


@pytest.mark.parametrize("script", ["gretta", "game_of_noise"])
def test_a_missing_corrupted_set(script, refuses, tmp_path):
    make_cifar(tmp_path, "cifar10", 100, 20)
    names = (
        tmp_path / "CIFAR-10-C",
        "is missing",
        "python common.py --download cifar10-c",
        "https://zenodo.org/record/2535967",
        "--generate-corruptions",
    )
    refuses(script, "--dataset", "cifar10", names=names)
    make_mnist(tmp_path, 100, 20)
    flags = ("--train-on", "augmented") if script == "gretta" else ()
    refuses(script, "--dataset", "mnist", *flags, names=(tmp_path / "mnist_c", "is missing", "--download mnist-c"))
    make_imagenet(tmp_path, corrupted=0)
    refuses(script, "--dataset", "imagenet", names=(tmp_path / "imagenet-c", "is missing", "https://zenodo.org/record/2235448"))
    refuses(script, "--dataset", "imagenet", "--corruptions-path", tmp_path / "elsewhere", names=(tmp_path / "elsewhere", "is missing"))
    refuses(
        script, "--dataset", "mnist", *flags, "--corruptions-path", tmp_path / "elsewhere", "--generate-corruptions", names=("elsewhere", "missing")
    )


def test_a_damaged_cifar_c(refuses, tmp_path):
    make_cifar(tmp_path, "cifar100", 200, 100, 100)
    folder, flags = tmp_path / "CIFAR-100-C", ("gretta", "--dataset", "cifar100")
    images, labels = np.load(folder / "fog.npy"), np.load(folder / "labels.npy")
    for wrong, told in (
        (images[:400], "labels.npy is int64 (500,), but"),  # a wrong length
        (images[:399], "is uint8 (399, 32, 32, 3): expected uint8 (5·N, 32, 32, 3)"),
        (images[:0], "is uint8 (0, 32, 32, 3)"),
        (images.astype(np.float32), "is float32 (500, 32, 32, 3)"),  # a wrong dtype
        (images[:, :28, :28], "is uint8 (500, 28, 28, 3)"),
    ):
        np.save(folder / "fog.npy", wrong)
        refuses(*flags, names=("fog.npy", told, "--download cifar100-c"))
    (folder / "fog.npy").write_bytes(b"\x93NUMPY truncated")
    refuses(*flags, names=("fog.npy", "damaged", f"remove {folder} and get it"))
    with open(folder / "fog.npy", "wb") as stream:
        np.savez(stream, images=images[:5])
    refuses(*flags, names=("fog.npy", "it is no array file"))
    np.save(folder / "fog.npy", images)
    (folder / "snow.npy").rename(tmp_path / "snow.npy")
    refuses(*flags, names=("snow.npy", "missing"))
    (tmp_path / "snow.npy").rename(folder / "snow.npy")
    for wrong in (labels[::-1].copy(), np.roll(labels, 1), labels + 1, np.concatenate([labels[:499], [7]])):  # labels that do not match
        np.save(folder / "labels.npy", wrong)
        refuses(*flags, names=("labels", "do not match cifar100's test labels"))
    np.save(folder / "labels.npy", labels.astype(np.float64))
    refuses(*flags, names=("labels.npy is float64",))


def test_a_half_copied_imagenet_c_is_named_by_corruption_and_severity(refuses, tmp_path):
    make_imagenet(tmp_path, corrupted=2)
    flags = ("game_of_noise", "--dataset", "imagenet", "--model", "resnet18")
    (tmp_path / "imagenet-c/fog/3" / WNIDS[1] / "picture_1.JPEG").unlink()
    refuses(*flags, names=(tmp_path / "imagenet-c/fog/3", "is half copied: 3 pictures, others have 4"))
    shutil.rmtree(tmp_path / "imagenet-c/fog/3" / WNIDS[1])
    refuses(*flags, names=(tmp_path / "imagenet-c/fog/3", "missing", WNIDS[1]))
    shutil.rmtree(tmp_path / "imagenet-c/fog/3")
    refuses(*flags, names=(tmp_path / "imagenet-c/fog/3", "is missing"))
    shutil.rmtree(tmp_path / "imagenet-c/fog")
    refuses(*flags, names=(tmp_path / "imagenet-c/fog/1", "is missing", "--download imagenet-c"))


def test_damaged_mnist(refuses, tmp_path):
    make_mnist(tmp_path, 100, 20)
    file = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for content in (
        b"",
        whole[:-100],
        b"not gzipped",
        gzip.compress(gzip.decompress(whole)[:-1]),
        gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12),  # a header of absurd shape
        gzip.compress(b"\0\0\x0d" + gzip.decompress(whole)[3:]),
    ):
        file.write_bytes(content)
        refuses("advaa", "--dataset", "mnist", names=(file, "damaged", "--download mnist"))
    file.write_bytes(whole)
    labels = file.with_name("t10k-labels-idx1-ubyte.gz")
    kept = labels.read_bytes()
    labels.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x13" + bytes(19)))
    refuses("advaa", "--dataset", "mnist", names=("MNIST", "19 labels", "(20, 28, 28)"))
    labels.write_bytes(kept)
    file.with_name("train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x64" + bytes([11]) * 100))
    refuses("advaa", "--dataset", "mnist", names=("labels 11..11, not 0..9",))


def test_cifar_labels_that_are_not_of_the_set(refuses, tmp_path):
    import pickle

    make_cifar(tmp_path, "cifar10", 100, 20)
    file = tmp_path / "cifar-10-batches-py/test_batch"
    content = pickle.loads(file.read_bytes())
    for wrong, told in (({"labels": [10] * 20}, "labels 10..10, not 0..9"), ({"labels": [0] * 19}, "its labels are 19"),
                        ({"data": content["data"][:, :100]}, "(20, 100)"), ({"labels": ["a"] * 20}, "damaged")):  # fmt: skip
        file.write_bytes(pickle.dumps(content | wrong))
        refuses("advaa", "--dataset", "cifar10", names=(told, "get it"))
    file.write_bytes(pickle.dumps({"data": content["data"]}))
    refuses("advaa", "--dataset", "cifar10", names=("test_batch", "no 'labels'"))


def test_damaged_chexpert(refuses, tmp_path):
    make_chexpert(tmp_path)
    torch.save(common.build_model("resnet18", 5, "chexpert").state_dict(), tmp_path / "weights.pt")
    flags = ("gretta", "--dataset", "chexpert", "--model", "resnet18", "--weights", tmp_path / "weights.pt")
    file = tmp_path / "CheXpert-v1.0-small/valid.csv"
    rows = list(csv.reader(file.read_text().splitlines()))

    def rewrite(rows: list[list[str]]) -> None:
        file.write_text("\n".join(",".join(row) for row in rows) + "\n")

    edema = rows[0].index("Edema")
    rewrite([row[:edema] + row[edema + 1 :] for row in rows])
    refuses(*flags, names=(file, "has no column Edema"))
    rewrite([["File", *rows[0][1:]], *rows[1:]])
    refuses(*flags, names=(file, "has no column Path"))
    rewrite([*rows[:3], [*rows[3][:edema], "maybe", *rows[3][edema + 1 :]], *rows[4:]])
    refuses(*flags, names=(file, "line 4", "'maybe'", "1, 0, -1 or empty"))
    rewrite(rows[:1])
    refuses(*flags, names=(file, "names no pictures"))
    rewrite([[*row[1:], row[0]] for row in rows[:3]] + [rows[3][1:5]])  # a row cut short before its path
    refuses(*flags, names=(file, "is missing"))
    file.write_bytes(b"Path,\xff\xfe\n")
    refuses(*flags, names=(file,))
    rewrite(rows)
    missing = tmp_path / rows[5][0]
    missing.rename(tmp_path / "gone.jpg")
    refuses(*flags, names=(file, missing, "which is missing"))
    (tmp_path / "gone.jpg").rename(missing)
    file.unlink()
    refuses(*flags, names=(file, "is missing", "https://stanfordmlgroup.github.io/competitions/chexpert"))
    shutil.rmtree(file.parent)
    refuses(*flags, names=(tmp_path / "CheXpert-v1.0-small/train.csv", "is missing"))


def test_class_counts_that_do_not_fit_the_model(refuses, tmp_path):
    make_cifar(tmp_path, "cifar100", 200, 100, 100)
    torch.save(common.build_model("wideresnet", 10, "cifar10").state_dict(), tmp_path / "ten.pt")
    for script in SCRIPTS:
        evaluate = ("--evaluate",) if script == "advaa" else ()
        flags = ("--dataset", "cifar100", "--model", "wideresnet", "--weights", tmp_path / "ten.pt", *evaluate)
        refuses(script, *flags, names=("ten.pt does not fit", "fc.weight is (10, 128), not (100, 128)", "--dataset"))
    make_chexpert(tmp_path)
    torch.save(common.build_model("resnet18", 14, "chexpert").state_dict(), tmp_path / "fourteen.pt")
    flags = ("--dataset", "chexpert", "--model", "resnet18", "--weights", tmp_path / "fourteen.pt")
    refuses("gretta", *flags, names=("fourteen.pt does not fit", "(14, 512), not (5, 512)"))


def test_folders_whose_classes_differ(refuses, tmp_path):
    for split, names in (("train", ("cat", "dog")), ("test", ("cat", "fox"))):
        for name in names:
            make_pictures(tmp_path / split / name, 2, 0, suffix="png")
    refuses("advaa", "--dataset", "folder", names=(tmp_path / "train", "other classes than", "missing fox", "unexpected dog"))
    shutil.rmtree(tmp_path / "test/fox")
    (tmp_path / "train/dog").rename(tmp_path / "test/dog")
    (tmp_path / "train/dog").mkdir()
    refuses("advaa", "--dataset", "folder", names=(tmp_path / "train/dog", "holds no pictures"))
    (tmp_path / "train/dog/notes.txt").write_text("no picture")
    refuses("advaa", "--dataset", "folder", names=(tmp_path / "train/dog", "holds no pictures"))


def test_a_damaged_picture_is_named_when_it_is_read(tmp_path):
    make_pictures(tmp_path / "cat", 2, 0)
    (tmp_path / "cat/picture_1.JPEG").write_bytes(b"\xff\xd8\xff no picture")
    folder = common.class_folder(tmp_path, ["cat"])
    for key in (None, 3):
        with pytest.raises(common.InputError, match="picture_1.JPEG is not a readable picture .*restore it, or remove it"):
            folder[1, key]
    Image.new("RGB", (64, 64)).save(tmp_path / "cat/picture_1.JPEG")
    assert folder[1, None][0].shape == (3, 224, 224)


@pytest.mark.parametrize(
    "script, flags, told",
    [
        ("gretta", ("--dataset", "cifar10", "--train-on", "target"), "cifar10 has no labelled target domain"),
        ("gretta", ("--dataset", "chexpert", "--train-on", "augmented"), "CheXpert has no corruption set"),
        ("gretta", ("--dataset", "folder"), "needs a classifier"),
        ("gretta", ("--dataset", "imagenette"), "imagenette"),
        ("advaa", ("--dataset", "fake", "--fake-shape", "10,2"), "four whole numbers"),
        ("advaa", ("--dataset", "fake", "--fake-shape", "10,2,0,32"), "four whole numbers"),
        ("game_of_noise", ("--dataset", "cifar10", "--mode", "ANT+SIN"), "there is no stylised cifar10"),
        ("game_of_noise", ("--dataset", "fake", "--model", "vit_b_16"), "does not take 32 px images"),
    ],
)
def test_flags_that_do_not_go_together(script, flags, told, refuses):
    refuses(script, *flags, names=(told,))


@pytest.mark.parametrize("content, told", [({"paths": 3}, "paths"), ({"cifar": "data", "est": "nonsense"}, "nonsense"), ({"augmix": True, "momentum": 1}, "momentum")])  # fmt: skip
def test_a_source_configuration_that_does_not_fit(content, told, refuses, tmp_path):
    import json

    (tmp_path / "conf.json").write_text(json.dumps(content))
    refuses("gretta", "--load-conf", tmp_path / "conf.json", names=("conf.json", told))


def test_folder_of_a_weight_is_no_dataset(refuses, tmp_path):
    Path(tmp_path / "train").write_text("a file, not a folder")
    refuses("advaa", "--dataset", "folder", names=(tmp_path / "val", "is missing"))
