"""Every data set in every script, from tiny files in the formats of the published ones, and the figures that come of them."""

import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Handler, results_of, run_here, without_times
from formats import WNIDS, make_chexpert, make_cifar, make_imagenet, make_mnist, make_perturbed, make_pictures, random_pixels
from PIL import Image

import advaa
import common
import gretta

MACHINE = common.start_machine("cpu")


def save_model(file: Path, name: str, num_classes: int, dataset: str) -> torch.nn.Module:
    """An untrained classifier whose checkpoint is written to `file`."""
    torch.manual_seed(0)
    model = common.build_model(name, num_classes, dataset)
    torch.save({"state_dict": model.state_dict()}, file)
    return model.eval()


def error(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 error (%) on uint8 (N, 32, 32, 3)."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return 100 - common.evaluate(model, pixels, torch.from_numpy(labels), MACHINE)["top1_accuracy"]


# ---------------------------------------------------------------------------------------------------------------------
# Loaders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_and_mnist_c(zipped, tmp_path):
    from torchvision.datasets import MNIST

    make_mnist(tmp_path, 200, 30, corrupted=True, zipped=zipped)
    train, val, test = (common.load_split("mnist", split, tmp_path) for split in ("train", "val", "test"))
    assert [tuple(images.shape) for images, _ in (train, val, test)] == [(180, 3, 32, 32), (20, 3, 32, 32), (30, 3, 32, 32)]
    assert torch.bincount(val[1]).tolist() == [2] * 10 and train[0].dtype == torch.uint8 and train[1].dtype == torch.int64
    if not zipped:  # torchvision reads the same files
        theirs = MNIST(tmp_path, train=False)
        assert torch.equal(test[0][:, 1, 2:-2, 2:-2], theirs.data) and torch.equal(test[1], theirs.targets)
    assert test[0][:, :, :2].max() == test[0][:, :, :, -2:].max() == 0 and test[0].max() > 0
    corrupted, labels = common.load_split("mnist-c", "test", tmp_path)
    assert corrupted.shape == (15 * 30, 3, 32, 32) and torch.equal(labels, test[1].repeat(15))
    fog = np.load(tmp_path / "mnist_c/fog/test_images.npy")
    place = common.MNIST_C.index("fog")
    assert torch.equal(corrupted[30 * place : 30 * place + 30, 2, 2:-2, 2:-2], torch.from_numpy(fog[..., 0]))


def test_cifar100_with_its_corruptions_and_the_extra_ones(tmp_path):
    make_cifar(tmp_path, "cifar100", 1000, 100, 100, extra=("spatter", "saturate"))
    found = common.load_sets("cifar100", tmp_path, MACHINE)
    assert (len(found.train[1]), len(found.val[1]), len(found.test[1]), found.num_classes, found.size) == (900, 100, 100, 100, 32)
    assert found.corruptions.names == common.CORRUPTIONS and found.corruptions.extra == ("spatter", "saturate")
    assert found.corruptions.protocol == "CIFAR-100-C as published, 15 corruptions x severities 1-5"
    images, labels = found.corruptions.read("fog", 4)
    stored = np.load(tmp_path / "CIFAR-100-C" / "fog.npy")
    assert torch.equal(images, torch.from_numpy(stored[300:400]).permute(0, 3, 1, 2)) and torch.equal(labels, found.test[1])
    assert len(common.load_split("cifar100-c", "test", tmp_path)[1]) == 75 * 100


def test_a_pickle_that_names_code_is_not_run(tmp_path):
    """Only arrays, dicts, lists and strings are unpickled, whatever the file is; numpy is not asked, as an object array is full of pointers."""
    import os
    import pickle

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    make_cifar(tmp_path, "cifar10", 100, 20)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({"data": Hostile(), "labels": []}))
    with pytest.raises(common.InputError, match="test_batch is missing or damaged .*names posix.mkdir, and no code is unpickled.*--download cifar10"):
        common.load_split("cifar10", "test", tmp_path)
    assert not (tmp_path / "made").exists()
    for data in (np.array([{}] * 20, dtype=object), np.zeros((20, 3072)), np.zeros((20, 3072), dtype="O")):
        (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": [0] * 20}))
        with pytest.raises(common.InputError, match="its data is not uint8"):
            common.load_split("cifar10", "test", tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_of_every_protocol_are_read(protocol, tmp_path):
    import pickle

    make_cifar(tmp_path, "cifar10", 100, 20)
    for order in ("C", "F"):
        data = np.asarray(random_pixels(3, 20, 3072), order=order)
        content = {"data": data, "labels": [i % 10 for i in range(20)]}
        (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content, protocol=protocol))
        images, labels = common.load_split("cifar10", "test", tmp_path)
        assert np.array_equal(images.flatten(1).numpy(), data) and labels.tolist() == content["labels"]


def test_a_whole_cifar_file_must_be_the_published_one(tmp_path):
    """As many images as published, but other bytes: damaged. Fewer are one's own part of the set."""
    make_cifar(tmp_path, "cifar10", 100, 10_000)
    with pytest.raises(common.InputError, match="test_batch is missing or damaged .its md5 is not 40351d587109b95175f43aff81a1287e"):
        common.load_split("cifar10", "test", tmp_path)
    assert len(common.load_split("cifar10", "train", tmp_path)[1]) == 90


@pytest.mark.parametrize("uncertain, value", [("ones", 1.0), ("zeros", 0.0), ("ignore", float("nan"))])
def test_chexpert_labels(uncertain, value, tmp_path):
    import csv

    make_chexpert(tmp_path)
    train, valid = common.load_chexpert(tmp_path, uncertain)
    with open(tmp_path / "CheXpert-v1.0-small" / "train.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(train) == len(rows) == 80 and len(valid) == 12
    expected = [[{"1.0": 1.0, "0.0": 0.0, "": 0.0, "-1.0": value}[row[name]] for name in common.FINDINGS] for row in rows]
    assert torch.allclose(train.labels, torch.tensor(expected), equal_nan=True)
    assert common.FINDINGS == ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
    image, labels = train[5, None]
    assert image.shape == (3, 224, 224) and torch.equal(image[0], image[1]) and torch.allclose(labels, train.labels[5], equal_nan=True)
    for root in (tmp_path / "CheXpert-v1.0-small", tmp_path / "moved"):  # the folder itself will do, under any name
        if not root.exists():
            (tmp_path / "CheXpert-v1.0-small").rename(root)
        assert len(common.load_chexpert(root)[0]) == 80
    for proportion, patients in ((0.01, 1), (0.2, 8)):
        drawn, others = common.split_patients(train, proportion)
        assert len(drawn) == 2 * patients and len(others) == 80 - 2 * patients  # both pictures of a patient are on one side
        assert torch.equal(drawn.labels, common.split_patients(train, proportion)[0].labels) or uncertain == "ignore"


def test_auroc_counts_pairs():
    torch.manual_seed(1)
    scores, labels = torch.randint(6, (60,)).float(), torch.randint(2, (60,)).float()  # many ties
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    assert common.auroc(scores, labels) == pytest.approx(((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item())
    assert common.auroc(labels, labels) == 1 and common.auroc(-labels, labels) == 0 and common.auroc(scores, torch.ones(60)) is None


def test_folders_of_ones_own(tmp_path):
    for split, count in (("train", 10), ("val", 3)):
        for number, name in enumerate(("cat", "dog")):
            make_pictures(tmp_path / split / name, count, number, suffix="png")
    found = common.load_sets("folder", tmp_path, MACHINE)
    assert (len(found.train), len(found.val), len(found.test)) == (18, 2, 6) and found.corruptions is None
    assert set(found.train.files).isdisjoint(found.val.files) and "corruptions are not evaluated" in found.notes[0]
    for number, name in enumerate(("cat", "dog")):  # with a test/ of its own, val/ is for validation
        make_pictures(tmp_path / "test" / name, 4, 5 + number, suffix="png")
    found = common.load_sets("folder", tmp_path, MACHINE, generate=True)
    assert (len(found.train), len(found.val), len(found.test), found.num_classes) == (20, 6, 8, 2)
    made = list(found.corruptions.read("fog", 3).all_batches(8, 0, MACHINE))[0][0]
    clean = list(found.test.all_batches(8, 0, MACHINE))[0][0]
    assert torch.equal(made, common.to_uint8(common.corrupt(common.to_float(clean), "fog", 3, seed=0)))
    assert found.corruptions.source == "folder-C generated from the 8 test images"


def test_every_picture_is_on_one_rank_even_where_there_are_fewer_than_ranks(tmp_path):
    make_pictures(tmp_path / "cat", 2, 0)
    folder = common.class_folder(tmp_path, ["cat"])
    ranks = [list(folder.all_batches(4, 0, MACHINE._replace(rank=rank, world_size=3))) for rank in range(3)]
    assert [sum(len(labels) for _, labels in batches) for batches in ranks] in ([0, 1, 1], [1, 1, 0], [1, 0, 1])


def test_a_folder_to_tune_on(tmp_path):
    """--target-split val: validation images are held out of train/, or are those of val/ where there is a test/ too."""
    for number, name in enumerate(("cat", "dog")):
        make_pictures(tmp_path / "train" / name, 20, number, suffix="png")
        make_pictures(tmp_path / "test" / name, 4, 5 + number, suffix="png")
    options = {"reg": "none", "uncertain": "ones", "workers": 0, "train": True, "dry_run": False}
    sets = gretta.load_sets("target", "folder", 0.5, tmp_path, MACHINE, split="val", **options)
    shown = next(iter(sets.test.values()))()
    assert (len(sets.train), len(shown)) == (2, 2) and {"train"} == {
        Path(file.decode()).parent.parent.name for file in [*sets.train.files, *shown.files]
    }
    assert set(sets.train.files).isdisjoint(shown.files)
    sets = gretta.load_sets("target", "folder", 0.25, tmp_path, MACHINE, split="test", **options)
    shown = next(iter(sets.test.values()))()
    assert (len(sets.train), len(sets.val), len(shown)) == (2, 2, 4)
    names = [set(part.files) for part in (sets.train, sets.val, shown)]
    assert len(names[0] | names[1] | names[2]) == 8  # nothing in two of them


def test_held_out_images_are_every_tenth_of_each_class():
    labels = torch.arange(60) % 3
    chosen = common.held_out(labels)
    assert torch.bincount(labels[chosen]).tolist() == [2, 2, 2] and chosen.nonzero()[:, 0].tolist() == [27, 28, 29, 57, 58, 59]
    assert common.held_out(torch.arange(5)).tolist() == [False] * 4 + [True]


def test_generated_corruptions_take_the_place_of_files_only_where_there_are_none(tmp_path):
    make_cifar(tmp_path, "cifar10", 100, 20)
    with pytest.raises(common.InputError, match="CIFAR-10-C is missing: .*--download cifar10-c.*or add --generate-corruptions"):
        common.load_sets("cifar10", tmp_path, MACHINE, corruptions="needed")
    found = common.load_sets("cifar10", tmp_path, MACHINE, generate=True)
    assert found.corruptions.protocol == "cifar10-C generated from the 20 test images, 15 corruptions x severities 1-5"
    images, labels = found.corruptions.read("contrast", 2)
    assert torch.equal(images, common.to_uint8(common.corrupt(common.to_float(found.test[0]), "contrast", 2, seed=0)))
    make_cifar(tmp_path / "with", "cifar10", 100, 20, 20)
    found = common.load_sets("cifar10", tmp_path / "with", MACHINE, generate=True)
    assert found.corruptions.source == "CIFAR-10-C as published"


def test_imagenet_in_its_folder_or_as_the_root(tmp_path):
    make_imagenet(tmp_path, extra=("spatter",))
    for root in (tmp_path, tmp_path / "imagenet"):
        found = common.load_sets("imagenet", root, MACHINE, validation=False, corrupted_directory=tmp_path / "imagenet-c")
        assert (len(found.train), found.val, len(found.test), found.size) == (12, None, 4, 224) and found.corruptions.extra == ("spatter",)
    assert len(common.load_sets("imagenet", tmp_path, MACHINE).corruptions.read("spatter", 5)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Pictures are decoded as they are asked for
# ---------------------------------------------------------------------------------------------------------------------


def test_a_random_crop_is_the_box_that_its_key_draws(tmp_path):
    import random

    array = random_pixels(0, 60, 90, 3)
    Image.fromarray(array).save(tmp_path / "noise.png")
    flipped = 0
    for key in range(20):
        draw = random.Random(key)
        left, top, width, height = common.random_box(90, 60, draw)
        box = (left, top, left + width, top + height)
        expected = np.asarray(Image.fromarray(array).resize((32, 32), Image.Resampling.BILINEAR, box=box))
        mirrored = draw.random() < 0.5
        flipped += mirrored
        assert np.array_equal(np.asarray(common.read_crop(str(tmp_path / "noise.png"), 32, key)), expected[:, ::-1] if mirrored else expected)
    assert 4 < flipped < 16
    boxes = [common.random_box(400, 300, random.Random(key)) for key in range(2000)]
    shares = np.array([width * height / 120_000 for _, _, width, height in boxes])
    ratios = np.array([width / height for _, _, width, height in boxes])
    assert 0.075 < shares.min() < 0.1 and shares.max() > 0.95 and ratios.min() > 0.74 and ratios.max() < 1.35
    assert all(left >= 0 and top >= 0 and left + width <= 400 and top + height <= 300 for left, top, width, height in boxes)
    assert common.random_box(1000, 10, random.Random(0)) == (493, 0, 13, 10)  # no try fits: the largest centre


def test_a_large_jpeg_is_decoded_at_a_smaller_scale(tmp_path):
    """It looks as the whole of it does, to a few grey levels."""
    picture = common.to_uint8(common.example_pictures(1, 1024, 3))[0].permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "large.jpg", quality=95)
    Image.fromarray(picture).save(tmp_path / "large.png")
    for key in range(5):
        small, whole = (np.asarray(common.read_crop(str(tmp_path / f"large.{suffix}"), 64, key)).astype(int) for suffix in ("jpg", "png"))
        assert np.abs(small - whole).mean() < 3


# ---------------------------------------------------------------------------------------------------------------------
# Downloads: a server on this machine in place of the addresses
# ---------------------------------------------------------------------------------------------------------------------


def packed(folder: Path, kind: str) -> bytes:
    """A folder as a tar or zip archive of it."""
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(fileobj=stream, mode=kind) as archive:
            archive.add(folder, folder.name)
    return stream.getvalue()


@pytest.fixture
def publish(address, monkeypatch):
    def publish(name: str, target: str, files: dict[str, tuple[bytes, list[str]]]) -> None:
        """Serve these files as the data set `name`: {file name: (bytes, what it holds)}."""
        monkeypatch.setattr(Handler, "archives", Handler.archives | {f"/{file}": content for file, (content, _) in files.items()})
        entries = [(f"{address}/{file}", hashlib.md5(content).hexdigest(), holds) for file, (content, holds) in files.items()]
        monkeypatch.setitem(common.ARCHIVES, name, (target, entries))

    return publish


def test_cifar_and_mnist_are_downloaded_where_they_are_missing(publish, tmp_path, capsys):
    make_cifar(tmp_path / "made", "cifar10", 100, 20)
    make_mnist(tmp_path / "made", 100, 20)
    publish("cifar10", "", {"cifar-10-python.tar.gz": (packed(tmp_path / "made/cifar-10-batches-py", "w:gz"), ["cifar-10-batches-py"])})
    raw = sorted((tmp_path / "made/MNIST/raw").iterdir())
    publish("mnist", "MNIST/raw", {file.name: (file.read_bytes(), [file.name]) for file in raw})
    run_here("advaa", "--dataset", "cifar10", "--data-root", tmp_path / "data", "--model", "wideresnet", "--evaluate", "--run-dir", tmp_path / "run",
             "--weights", weights_of("wideresnet", "cifar10", tmp_path))  # fmt: skip
    assert results_of(tmp_path / "run")["n_eval"] == 20 and len(Handler.asked) == 1
    assert len(common.load_split("mnist", "test", tmp_path / "data")[1]) == 20 and len(Handler.asked) == 5
    common.load_split("mnist", "train", tmp_path / "data")
    assert len(Handler.asked) == 5 and sorted(path.name for path in (tmp_path / "data").iterdir()) == ["MNIST", "cifar-10-batches-py"]


def weights_of(model: str, dataset: str, folder: Path, num_classes: int = 10) -> Path:
    save_model(folder / f"{dataset}-{model}.pt", model, num_classes, dataset)
    return folder / f"{dataset}-{model}.pt"


def test_a_dry_run_downloads_nothing(publish, tmp_path, capfd):
    publish("cifar10", "", {"cifar-10-python.tar.gz": (b"", ["cifar-10-batches-py"])})
    with pytest.raises(common.InputError, match="test_batch|data_batch_1"):
        run_here("advaa", "--dataset", "cifar10", "--data-root", tmp_path / "data", "--dry-run", "--run-dir", tmp_path / "run")
    assert Handler.asked == [] and list(tmp_path.iterdir()) == []


def test_imagenet_c_comes_in_parts_and_goes_on_with_the_missing_ones(publish, tmp_path, monkeypatch):
    make_imagenet(tmp_path / "made", extra=common.EXTRA_CORRUPTIONS)
    parts = {}
    for url, _, holds in common.ARCHIVES["imagenet-c"][1]:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name in holds:
                archive.add(tmp_path / "made/imagenet-c" / name, name)
        parts[Path(url).name] = (stream.getvalue(), holds)
    assert sorted(name for _, holds in parts.values() for name in holds) == sorted(common.CORRUPTIONS + common.EXTRA_CORRUPTIONS)
    publish("imagenet-c", "imagenet-c", parts)
    monkeypatch.setattr(sys, "argv", ["common.py", "--download", "imagenet-c", "--data-root", str(tmp_path / "data")])
    monkeypatch.setattr(Handler, "archives", {path: content for path, content in Handler.archives.items() if path != "/weather.tar"})
    with pytest.raises(common.InputError, match="weather.tar.*404"):
        common.main()
    assert {path.name for path in (tmp_path / "data/imagenet-c").iterdir()} == {*parts["noise.tar"][1], *parts["blur.tar"][1]}
    monkeypatch.setattr(Handler, "archives", Handler.archives | {"/weather.tar": parts["weather.tar"][0]})
    common.main()
    assert [path for path, _ in Handler.asked].count("/noise.tar") == 1
    found = common.imagenet_c(tmp_path / "data/imagenet-c", list(WNIDS), tmp_path)
    assert len(found.read("jpeg_compression", 5)) == 2 and found.extra == common.EXTRA_CORRUPTIONS


def test_an_archive_of_which_a_part_is_there_already(publish, tmp_path):
    make_imagenet(tmp_path / "made")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("gaussian_noise", "shot_noise"):
            archive.add(tmp_path / "made/imagenet-c" / name, name)
    publish("imagenet-c", "imagenet-c", {"noise.tar": (stream.getvalue(), ["gaussian_noise", "shot_noise"])})
    (tmp_path / "data/imagenet-c/gaussian_noise").mkdir(parents=True)
    (tmp_path / "data/imagenet-c/gaussian_noise/kept").write_text("mine")
    common.fetch("imagenet-c", tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data/imagenet-c").iterdir()) == ["gaussian_noise", "shot_noise"]
    assert [path.name for path in (tmp_path / "data/imagenet-c/gaussian_noise").iterdir()] == ["kept"]


def test_mnist_c_is_a_zip(publish, tmp_path):
    make_mnist(tmp_path / "made", 20, 10, corrupted=True)
    publish("mnist-c", "", {"mnist_c.zip": (packed(tmp_path / "made/mnist_c", "zip"), ["mnist_c"])})
    assert common.fetch("mnist-c", tmp_path / "data") == tmp_path / "data" / "mnist_c"
    assert len(common.corruption_files("mnist", tmp_path / "data").read("zigzag", 1)[1]) == 10


@pytest.mark.parametrize("member", ["../outside", "mnist_c/../../outside", "/outside", "other/file"])
def test_a_hostile_zip_is_refused_and_nothing_is_written(member, publish, tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("mnist_c/fog/test_images.npy", b"x")
        archive.writestr(member, b"x")
    publish("mnist-c", "", {"mnist_c.zip": (stream.getvalue(), ["mnist_c"])})
    with pytest.raises(common.InputError, match="which is no file in mnist_c/: nothing was unpacked"):
        common.fetch("mnist-c", tmp_path / "deep" / "data")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["deep", "deep/data", "deep/data/mnist_c.zip"]


def test_a_zip_with_a_link_is_refused(publish, tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo("mnist_c/link")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "/etc")
    publish("mnist-c", "", {"mnist_c.zip": (stream.getvalue(), ["mnist_c"])})
    with pytest.raises(common.InputError, match="'mnist_c/link', which is no file"):
        common.fetch("mnist-c", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gretta_with_the_configuration_of_its_source(tmp_path):
    """The arguments printed in the source's README, as JSON, on CIFAR-100 and CIFAR-100-C; WRN-40-2 beside, and a student for `surrogate`."""
    make_cifar(tmp_path / "cifar", "cifar100", 1000, 100)
    make_cifar(tmp_path / "cifar_corrupt", "cifar100", 100, 100, 2)
    for name in ("resnext", "wideresnet"):
        weights_of(name, "cifar100", tmp_path, 100)
    student = save_model(tmp_path / "student.pth", "student", 100, "cifar100")
    torch.save({"weights": student.state_dict()}, tmp_path / "student.pth")
    configuration = {"model": "resnext", "augmix": True, "opt": "adam", "lr": 1e-6, "init": "zero", "epochs": 2, "reg": "none", "policy": "resnet18",
                     "sigmoid": False, "est": "vanilla", "transform": "geometry", "num_samples": 12,
                     "paths": {name: str(tmp_path / f"cifar100-{name}.pt") for name in ("wideresnet", "resnext")},
                     "student_paths": {name: str(tmp_path / "student.pth") for name in ("wideresnet", "resnext")},
                     "checkpoints": "checkpoints", "cifar": str(tmp_path / "cifar"), "cifarc": str(tmp_path / "cifar_corrupt" / "CIFAR-100-C")}  # fmt: skip
    (tmp_path / "conf.json").write_text(json.dumps(configuration))
    run_here("gretta", "--load-conf", tmp_path / "conf.json", "--dry-run", "--run-dir", tmp_path / "resnext")
    arguments, results = json.loads((tmp_path / "resnext" / "args.json").read_text()), results_of(tmp_path / "resnext")
    expected = {"dataset": "cifar100", "model": "resnext", "train_on": "augmented", "lr": 1e-6, "weights": str(tmp_path / "cifar100-resnext.pt")}
    assert {key: arguments[key] for key in expected} == expected and arguments["student"] is None
    assert results["n_train"] == 32 and results["n_eval"] == 75 and list(results["corruptions"]) == [*common.CORRUPTIONS, "mean"]
    assert "CIFAR-100-C as published, 15 corruptions x severities 1-5" in results["protocol"]
    run_here(
        "gretta", "--load-conf", tmp_path / "conf.json", "--model", "wideresnet", "--est", "surrogate", "--dry-run", "--run-dir", tmp_path / "wrn"
    )
    results = results_of(tmp_path / "wrn")
    assert (results["model"], results["method"], results["queries_distillation"]) == ("wideresnet", "surrogate", 0)
    model = common.load_weights(common.build_model("wideresnet", 100, "cifar100"), tmp_path / "cifar100-wideresnet.pt").eval()
    fog, labels = (np.load(tmp_path / "cifar_corrupt/CIFAR-100-C" / name) for name in ("fog.npy", "labels.npy"))
    assert results["corruptions"]["fog"]["none"] == pytest.approx(np.mean([error(model, fog[i : i + 1], labels[i : i + 1]) for i in range(0, 10, 2)]))


def test_published_settings_of_gretta_on_cifar100():
    arguments = gretta.parse_args(["--dataset", "cifar100-c"])
    expected = {"dataset": "cifar100", "model": "resnext", "opt": "adam", "lr": 1e-6, "epochs": 2, "batch_size": 256, "num_samples": 12}
    assert {key: getattr(arguments, key) for key in expected} == expected and arguments.train_on == "augmented"


@pytest.mark.slow
def test_gretta_on_imagenet(tmp_path, monkeypatch):
    """Trained on augmented training images, evaluated on ImageNet-C, here of one corruption; and again on a machine without the training images."""
    monkeypatch.setattr(common, "CORRUPTIONS", ("fog",))
    make_imagenet(tmp_path)
    model = save_model(tmp_path / "resnet18.pth", "resnet18", 2, "imagenet")
    flags = ("--dataset", "imagenet", "--data-root", tmp_path, "--model", "resnet18", "--weights", tmp_path / "resnet18.pth")
    run_here("gretta", *flags, "--epochs", "1", "--batch-size", "5", "--num-samples", "1", "--run-dir", tmp_path / "run")
    results = results_of(tmp_path / "run")
    assert (results["n_train"], results["n_eval"], list(results["corruptions"])) == (11, 10, ["fog", "mean"])  # the twelfth is a validation image
    assert "ImageNet-C as published" in results["protocol"] and "policy trained on augmented training images" in results["protocol"]
    found = [common.class_folder(tmp_path / "imagenet-c" / "fog" / str(severity), list(WNIDS), resize=224) for severity in range(1, 6)]
    errors = [100 - common.evaluate_folder([model], folder, 2, 0, MACHINE)[0]["top1_accuracy"] for folder in found]
    assert results["corruptions"]["fog"]["none"] == pytest.approx(np.mean(errors))
    (tmp_path / "imagenet" / "train").rename(tmp_path / "away")
    run_here("gretta", "--evaluate", "--run-dir", tmp_path / "run")
    assert without_times(results_of(tmp_path / "run")) == without_times(results)


def test_gretta_on_modified_mnist_and_on_mnist_c(tmp_path, monkeypatch):
    make_mnist(tmp_path / "data", 300, 200, corrupted=True)
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    weights_of("resnext", "mnist", tmp_path)
    flags = ("--dataset", "mnist", "--data-root", tmp_path / "data", "--epochs", "1", "--num-samples", "2", "--batch-size", "10")
    run_here("gretta", *flags, "--proportion", "0.05", "--run-dir", tmp_path / "target")
    results = results_of(tmp_path / "target")
    assert (results["n_train"], results["n_eval"], results["proportion"]) == (10, 100, 0.05) and "modified mnist" in results["protocol"]
    model = common.load_weights(common.build_model("resnext", 10, "mnist"), tmp_path / "mnist-resnext.pt").eval()
    _, _, images, labels, _ = gretta.target_domain("test", 0.05, tmp_path / "data", 1, "mnist")
    assert results["accuracy"]["none"] == pytest.approx(common.evaluate(model, images, labels, MACHINE)["top1_accuracy"])
    run_here("gretta", *flags, "--train-on", "augmented", "--dry-run", "--run-dir", tmp_path / "augmented")
    results = results_of(tmp_path / "augmented")
    assert list(results["corruptions"]) == [*common.MNIST_C, "mean"] and "MNIST-C as published, 15 corruptions;" in results["protocol"]


@pytest.mark.slow
def test_gretta_on_chexpert(tmp_path):
    make_chexpert(tmp_path, patients=20)
    model = save_model(tmp_path / "resnet18.pt", "resnet18", 5, "chexpert")
    flags = ("--dataset", "chexpert", "--data-root", tmp_path, "--model", "resnet18", "--weights", tmp_path / "resnet18.pt", "--proportion", "0.2")
    run_here("gretta", *flags, "--batch-size", "4", "--epochs", "1", "--num-samples", "1", "--lr", "1e-3", "--run-dir", tmp_path / "run")
    results, (_, valid) = results_of(tmp_path / "run"), common.load_chexpert(tmp_path)
    assert (results["n_train"], results["n_eval"], results["queries"], results["metric"]) == (8, 12, 16, "mean AUROC")
    images = torch.stack([valid[number, None][0] for number in range(12)])
    scores = common.predict_logits(model, images, MACHINE)
    values = {name: common.auroc(scores[:, i], valid.labels[:, i]) for i, name in enumerate(common.FINDINGS)}
    values = {name: 100 * value for name, value in values.items() if value is not None}
    assert {name: found["none"] for name, found in results["auroc"].items()} == pytest.approx(values) and len(values) >= 4
    assert results["accuracy"]["none"] == pytest.approx(np.mean(list(values.values()))) and set(results["accuracy"]) == set(gretta.PREDICTORS)
    assert "mean AUROC" in results["protocol"] and (tmp_path / "run" / "examples.png").is_file()


def test_findings_are_scored_one_by_one_under_crops():
    """Five independent sigmoids, averaged over the crops; a softmax would let one finding move another."""
    torch.manual_seed(0)
    images, weight = torch.rand(3, 3, 32, 32), torch.randn(3 * 32 * 32, 5) / 10

    def query(batch: torch.Tensor) -> torch.Tensor:
        return batch.flatten(1) @ weight

    expected = torch.stack([query(crop).sigmoid() for crop in gretta.crops(images, True)]).mean(0)
    assert torch.allclose(gretta.crop_scores(query, images, "chexpert", True), expected)
    expected = torch.stack([query(crop).softmax(1) for crop in gretta.crops(images, False)]).mean(0)
    assert torch.allclose(gretta.crop_scores(query, images, "digits", False), expected)


def test_uncertain_findings_do_not_count_in_the_loss():
    logits, labels = torch.tensor([[2.0, -1.0], [0.5, 3.0]]), torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    softplus = torch.nn.functional.softplus
    expected = torch.stack([softplus(torch.tensor(-2.0)), (softplus(torch.tensor(0.5)) + softplus(torch.tensor(-3.0))) / 2])
    assert torch.allclose(gretta.label_losses(logits, labels), expected)
    assert gretta.correct_answers(logits, labels).tolist() == [1, 0.5]


def make_own(root: Path) -> None:
    for split, count in (("train", 8), ("test", 6)):
        for number, name in enumerate(("cat", "dog", "fox")):
            make_pictures(root / split / name, count, number, suffix="png")


@pytest.mark.slow
def test_a_folder_of_ones_own_in_all_three_scripts(tmp_path, monkeypatch):
    """A classifier trained by advaa.py on one's own pictures, then hardened by game_of_noise.py and helped by gretta.py."""
    make_own(tmp_path / "own")
    monkeypatch.setattr(common, "load_imagenet_weights", lambda model, *_: "untrained")
    flags = ("--dataset", "folder", "--data-root", tmp_path / "own", "--model", "resnet18", "--dry-run")
    run_here("advaa", *flags, "--M", "2", "--run-dir", tmp_path / "advaa")
    results = results_of(tmp_path / "advaa")
    assert (results["n_train"], results["n_eval"], results["corruptions"]) == (24, 16, {})
    run_here(
        "game_of_noise",
        *flags,
        "--mode",
        "Speckle",
        "--weights",
        tmp_path / "advaa/checkpoint.pt",
        "--generate-corruptions",
        "--run-dir",
        tmp_path / "game",
    )
    results = results_of(tmp_path / "game")
    assert results["mce_reference"] == "clean model" and "folder-C generated from the 16 test images" in results["protocol"]
    run_here("gretta", *flags, "--weights", tmp_path / "advaa/checkpoint.pt", "--proportion", "0.4", "--run-dir", tmp_path / "gretta")
    results = results_of(tmp_path / "gretta")
    assert (results["n_train"], results["n_eval"]) == (7, 9) and f"{tmp_path / 'own'} (18 test images)" in results["protocol"]


@pytest.mark.slow
def test_fake_images_of_any_shape_in_all_three_scripts(tmp_path):
    for script, flags in (("advaa", ("--M", "2")), ("game_of_noise", ("--mode", "ANT")), ("gretta", ())):
        directory = tmp_path / script
        run_here(
            script, "--dataset", "fake", "--fake-shape", "40,7,40,48", "--model", "shufflenet_v2_x0_5", "--dry-run", *flags, "--run-dir", directory
        )
        results = results_of(directory)
        assert results["dataset"] == "fake" and "fake-C generated" in results["protocol"], script
        assert results["n_eval"] == (10 if script != "gretta" else 75) and results["n_train"] == (32 if script == "gretta" else 40)


def test_game_of_noise_on_cifar10_and_mnist(tmp_path, monkeypatch):
    make_cifar(tmp_path, "cifar10", 100, 20, 4)
    make_mnist(tmp_path, 100, 20, corrupted=True)
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    model = save_model(tmp_path / "robustbench-cifar10-wideresnet.pt", "wideresnet", 10, "cifar10")  # where the published one is kept
    weights_of("resnext", "mnist", tmp_path)
    run_here("game_of_noise", "--dataset", "cifar10", "--data-root", tmp_path, "--mode", "clean", "--star-iterations", "1", "--batch-size", "20",
             "--run-dir", tmp_path / "cifar")  # fmt: skip
    results = results_of(tmp_path / "cifar")
    assert results["mce"] == 100 and results["mce_reference"] == "clean model" and results["n_eval"] == 20
    fog = np.load(tmp_path / "CIFAR-10-C/fog.npy")
    assert results["severities"]["fog"] == pytest.approx([100 - error(model, fog[4 * i : 4 * i + 4], np.arange(4)) for i in range(5)])
    file = weights_of("wresnet40_2", "cifar10", tmp_path)  # of no model that is published: evaluated as it is
    run_here("game_of_noise", "-e", "--dataset", "cifar10", "--data-root", tmp_path, "--model", "wresnet40_2", "--weights", file, "--dry-run",
             "--run-dir", tmp_path / "own")  # fmt: skip
    results = results_of(tmp_path / "own")
    assert results["mce"] is None and results["mce_reference"] is None and "mCE" not in results["protocol"] and "before" not in results
    run_here("game_of_noise", "--dataset", "mnist", "--data-root", tmp_path, "--dry-run", "--run-dir", tmp_path / "mnist")
    results = results_of(tmp_path / "mnist")
    assert list(results["severities"]) == list(common.MNIST_C) and all(len(values) == 1 for values in results["severities"].values())
    others = [results["corruptions"][name] for name in common.MNIST_C if name not in ("shot_noise", "impulse_noise")]
    assert results["corruptions"]["mean_without_noises"] == pytest.approx(np.mean(others))


def test_advaa_on_mnist_and_on_cifar10_with_its_extra_corruptions(tmp_path):
    make_mnist(tmp_path, 100, 20, corrupted=True)
    make_cifar(tmp_path, "cifar10", 100, 20, 4, extra=("saturate",))
    make_perturbed(tmp_path, advaa.PERTURBATIONS)
    run_here("advaa", "--dataset", "mnist", "--data-root", tmp_path, "--dry-run", "--run-dir", tmp_path / "mnist")
    results = results_of(tmp_path / "mnist")
    assert set(results["shifted"]) == {"modified"} and list(results["corruptions"]) == [*common.MNIST_C, "mean"]
    run_here(
        "advaa", "--dataset", "cifar10", "--data-root", tmp_path, "--model", "wideresnet", "--M", "2", "--dry-run", "--run-dir", tmp_path / "cifar"
    )
    results = results_of(tmp_path / "cifar")
    assert list(results["extra_corruptions"]) == ["saturate"] and list(results["corruptions"]) == [*common.CORRUPTIONS, "mean"]
    assert results["corruptions"]["mean"] == pytest.approx(np.mean([results["corruptions"][name] for name in common.CORRUPTIONS]))


def test_a_set_without_published_corruptions(tmp_path):
    """A data set that one adds: the corruptions are made where that is asked for, and else the line says why not."""
    with pytest.raises(common.MissingData, match="no corrupted test set of svhn is published"):
        common.corruption_files("svhn", tmp_path)


def test_pictures_are_read_without_a_draw_from_torchs_own_generator(tmp_path):
    """A run continued within an epoch begins it once more, which must not show in the random states."""
    for number, name in enumerate(("a", "b")):
        make_pictures(tmp_path / "train" / name, 3, number)
    folder, machine = common.class_folder(tmp_path / "train", ["a", "b"]), common.start_machine("cpu")
    state = torch.get_rng_state()
    assert len(list(folder.all_batches(2, 0, machine))) == 3
    assert len(list(folder.random_batches(2, torch.Generator(), 1, machine))) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_no_picture_does_not_count(tmp_path):
    for number, name in enumerate(("a", "b")):
        make_pictures(tmp_path / name, 2, number)
    for name in (".DS_Store", "Thumbs.db", ".hidden.png"):
        (tmp_path / "a" / name).write_bytes(b"x")
    assert common.check_classes(tmp_path, ["a", "b"], ["a", "b"], tmp_path) == 4
    for file in (tmp_path / "b").iterdir():
        file.unlink()
    (tmp_path / "b" / ".DS_Store").write_bytes(b"x")
    with pytest.raises(common.InputError, match="b holds no pictures"):
        common.check_classes(tmp_path, ["a", "b"], ["a", "b"], tmp_path)


def test_the_protocol_names_the_statistics_that_the_model_uses():
    for dataset, name, imagenet in (("folder", "resnet50", True), ("folder", "wresnet28_10", False), ("imagenet", "convnext_tiny", True), ("cifar10", "resnet50", False), ("imagenet", "inception_v3", False)):  # fmt: skip
        assert (common.normalisation(dataset, name) == common.IMAGENET_STATISTICS) == imagenet
