"""Data sets in their published formats, images in memory and pictures on disk, downloads."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONTENT, ROOT, Handler, refused, run_here
from formats import make_cifar, make_imagenet, make_mnist, make_pictures, random_pixels
from PIL import Image
from torchvision import datasets

import common
from common import InputError

CPU = common.Machine(torch.device("cpu"))
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load_sets(dataset: str, root: Path, **how: object) -> common.Sets:
    return common.load_sets(dataset, str(root), CPU, **how)


def fails(said: str, function: Callable, *given: object, **how: object) -> None:
    with pytest.raises(InputError, match=said):
        function(*given, **how)


def make_checked_cifar(patch: pytest.MonkeyPatch, root: Path, dataset: str, *counts: int) -> None:
    """make_cifar, whose md5s take the place of the published ones, which torchvision checks."""
    make_cifar(root, dataset, *counts)
    kind = getattr(datasets, common.TORCHVISION[dataset])
    files = (root / kind.base_folder).iterdir()
    md5s = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in files}
    for part in ("train_list", "test_list"):
        patch.setattr(kind, part, [[name, md5s[name]] for name, _ in getattr(kind, part)])
    patch.setattr(kind, "meta", kind.meta | {"md5": md5s[kind.meta["filename"]]})


# ---------- Sets that fit in memory ----------


def test_digits_are_the_published_integers_with_a_fixed_stratified_split():
    file = ROOT / "data" / "digits.npz"
    with np.load(file) as archive:
        integers, split = archive["images"], archive["split"]
    counts = {}
    for number, name in enumerate(common.SPLITS):
        images, labels = common.load_split("digits", name)
        counts[name] = len(labels)
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32) and labels.dtype == torch.int64
        assert torch.bincount(labels).min() > 0.08 * len(labels) and images[..., :6, :].max() == 0
        inner = torch.from_numpy(integers[split == number]).float().mean((1, 2)) / 16
        assert (images[:, 0, 6:26, 6:26].float().mean((1, 2)) / 255 - inner).abs().max() < 0.003
    assert counts == {"train": 1000, "val": 197, "test": 600}
    assert hashlib.sha256(file.read_bytes()).hexdigest() in (ROOT / "data" / "README.md").read_text()


def test_modified_digits_are_always_the_same_and_differ_from_image_to_image():
    images, labels, source = common.modified_digits("val", variants=2)
    again = common.modified_digits("val", variants=2)[0]
    assert images.shape == (394, 3, 32, 32) and torch.equal(images, again) and source.max() == 196
    assert torch.equal(labels[:197], labels[197:]) and not torch.equal(images[:197], images[197:])
    assert not torch.equal(images, common.modified_digits("val", variants=2, seed=1)[0])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["{folder}/raw", "{name}", "."])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnists_files_are_read_where_they_lie(name, place, zipped, tmp_path):
    make_mnist(tmp_path / "made", 100, 20, zipped=zipped)
    root = tmp_path / "root"
    target = root / place.format(folder=common.TORCHVISION[name], name=name)
    target.parent.mkdir(parents=True, exist_ok=True)
    before = names((tmp_path / "made" / "MNIST" / "raw").rename(target))
    images, labels = common.load_split(name, "test", root, download=False)
    assert images.shape == (20, 3, 32, 32) and labels.tolist() == [i % 10 for i in range(20)]
    assert images[:, :, 2:-2, 2:-2].float().mean() > 5 and images[..., :2, :].max() == 0
    sizes = [len(common.load_split(name, split, root, download=False)[1]) for split in ("train", "val")]
    assert sizes == [90, 10] and names(target) == before


@pytest.mark.skipif(not list(FASHION.glob("*.gz")), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist_as_debian_installs_it():
    images, labels = common.load_split("fashion_mnist", "test", FASHION, download=False)
    assert len(labels) == 10_000 and torch.bincount(labels).tolist() == [1000] * 10
    assert images[:, 0, 2:-2, 2:-2].float().mean().item() == pytest.approx(73.15, abs=0.05)


def test_held_out_images_are_every_tenth_of_each_class():
    labels = torch.arange(60) % 3
    assert common.held_out(labels).nonzero()[:, 0].tolist() == [27, 28, 29, 57, 58, 59]
    assert common.held_out(torch.arange(5)).tolist() == [False] * 4 + [True]


def test_cifar_with_its_corruptions(tmp_path, monkeypatch):
    make_checked_cifar(monkeypatch, tmp_path, "cifar100", 1100, 200, 200)
    found = load_sets("cifar100", tmp_path, corruptions="needed")
    assert (len(found.train), len(found.val), len(found.test), len(found.classes)) == (1000, 100, 200, 100)
    assert found.classes[42] == "class 42"
    assert len(load_sets("cifar100", tmp_path, validation=False).train) == 1100
    fog, labels = (tmp_path / "CIFAR-100-C" / name for name in ("fog.npy", "labels.npy"))
    expected = torch.from_numpy(np.load(fog)[400:600]).permute(0, 3, 1, 2)
    assert torch.equal(found.corruptions.read("fog", 3).images, expected)
    assert found.corruptions.protocol == "CIFAR-100-C as published, 15 corruptions x severities 1-5"
    fog.write_bytes(b"half")
    said = "CIFAR-100-C/fog.npy is missing or damaged .*--download cifar100-c"
    fails(said, load_sets, "cifar100", tmp_path, corruptions="needed")
    np.save(labels, np.zeros(1000, int))
    said = "CIFAR-100-C.*npy is missing or damaged .*its labels are not those of the 200 test images"
    fails(said, load_sets, "cifar100", tmp_path, corruptions="needed")
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"x")
    fails("cifar-100-python is missing or damaged", common.load_split, "cifar100", "test", tmp_path, False)


def test_mnist_c(tmp_path):
    make_mnist(tmp_path, 100, 20, corrupted=True)
    found = load_sets("mnist", tmp_path, corruptions="needed").corruptions
    assert found.names == common.MNIST_C and found.protocol == "mnist_c as published, 15 corruptions"
    array = np.load(tmp_path / "mnist_c" / "zigzag" / "test_images.npy")
    assert torch.equal(found.read("zigzag", 1).images[:, 0, 2:-2, 2:-2], torch.from_numpy(array[..., 0]))


def test_generated_corruptions_take_the_place_of_files_only_where_there_are_none(tmp_path, monkeypatch):
    make_checked_cifar(monkeypatch, tmp_path, "cifar10", 100, 20)
    said = "CIFAR-10-C is missing: .*--download cifar10-c.*--generate-corruptions"
    fails(said, load_sets, "cifar10", tmp_path, corruptions="needed")
    found = load_sets("cifar10", tmp_path, generate=True)
    source = "cifar10-C generated from the 20 test images"
    assert found.corruptions.protocol == f"{source}, 15 corruptions x severities 1-5"
    made = found.corruptions.read("contrast", 2).images
    assert torch.equal(made, common.corrupt_uint8(found.test.images, "contrast", 2, seed=0))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_are_a_function_of_seed_and_epoch_whatever_the_start_and_the_ranks(world_size):
    images, labels = common.fake_images(23, 23, 2, 2)
    machines = [CPU._replace(rank=i, world_size=world_size) for i in range(world_size)]
    ranks = [common.Images(images, labels, machine) for machine in machines]

    def batches(start: int, count: int, seed: int = 0) -> list[torch.Tensor]:
        streams = [rank.batches(5, seed, start) for rank in ranks]
        return [torch.cat([next(stream)[1] for stream in streams]) for _ in range(count)]

    whole = batches(0, 12)  # three epochs of four
    assert all(torch.equal(*pair) for pair in zip(whole[3:], batches(3, 9)))
    assert all(torch.cat(whole[i : i + 4]).unique().numel() == 20 for i in (0, 4, 8))
    assert not torch.equal(torch.cat(whole[:4]), torch.cat(whole[4:8]))
    assert not torch.equal(whole[0], batches(0, 1, seed=1)[0])
    own, own_labels, pool = next(ranks[0].batches(5, 0))
    assert torch.equal(pool[: len(own)], own) and len(pool) == 5 and len(own_labels) == len(own)
    shares = [torch.cat([part for _, part in rank.eval_batches(4)]) for rank in ranks]
    assert torch.equal(torch.cat(shares), labels) and max(map(len, shares)) - min(map(len, shares)) <= 1
    few = [machine.own_rows(torch.arange(2)) for machine in machines]  # fewer than three ranks
    assert torch.equal(torch.cat(few), torch.arange(2)) and max(map(len, few)) == max(1, 2 // world_size)


def test_parts_of_images():
    data = common.Images(*common.fake_images(23, 23, 2, 2), CPU)
    assert data.take(5).labels.tolist() == [0, 6, 11, 16, 22] and len(data.take(99)) == 23
    assert torch.equal(data.part(torch.tensor([4, 2])).images, data.images[[4, 2]]) and data.size == 2
    assert torch.equal(data.tensors()[0], data.images)


# ---------- Pictures on disk ----------


def test_imagenet_and_imagenet_c(tmp_path):
    make_imagenet(tmp_path, train=20)
    imagenet, imagenet_c = tmp_path / "imagenet", tmp_path / "imagenet-c"
    for root in (tmp_path, imagenet):
        found = load_sets("imagenet", root, corrupted_directory=str(imagenet_c))
        assert (len(found.train), len(found.val), len(found.test), found.test.size) == (36, 4, 4, 224)
    # To evaluate, the classes' folder will do
    found = load_sets("imagenet", tmp_path, clean_directory=str(imagenet / "val"), train=False)
    snow = found.corruptions.read("snow", 5)
    assert found.train is None and len(found.test) == 4 and snow.resize == 224
    assert next(snow.eval_batches(9))[0].shape == (2, 3, 224, 224)
    assert found.corruptions.source == "imagenet-c as published"
    make_pictures(imagenet_c / "fog" / "3" / "n01440764", 2, 0)
    fails("is half copied: 2 pictures, others have 3", load_sets, "imagenet", tmp_path)


def test_folders_of_ones_own(tmp_path):
    for split, count in (("train", 10), ("val", 3)):
        for number, name in enumerate(("cat", "dog")):
            make_pictures(tmp_path / split / name, count, number, suffix="png")
    (tmp_path / "train" / "cat" / "._picture.png").write_bytes(b"not one")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not one")
    (tmp_path / "train" / ".hidden").mkdir()
    found = load_sets("folder", tmp_path)
    assert (len(found.train), len(found.val), len(found.test)) == (18, 2, 6) and found.corruptions is None
    assert {*found.train.files}.isdisjoint(found.val.files) and "--corruptions-path" in found.notes[1]
    assert found.notes[0] == f"passed over in {tmp_path / 'train'}, as no pictures: 2"
    for number, name in enumerate(("cat", "dog")):  # with a test/ of its own, val/ is for validation
        make_pictures(tmp_path / "test" / name, 4, 5 + number, suffix="png")
    found = load_sets("folder", tmp_path, generate=True)
    assert (len(found.train), len(found.val), len(found.test)) == (20, 6, 8)
    assert found.classes == ["cat", "dog"]
    made, clean = found.corruptions.read("fog", 3).tensors()[0], found.test.tensors()[0]
    assert torch.equal(made, common.corrupt_uint8(clean, "fog", 3, seed=0))
    (tmp_path / "val" / "bird").mkdir()
    fails("val must hold .*other classes than .*test: bird", load_sets, "folder", tmp_path)


def pictures(folder: Path, workers: int = 0, machine: common.Machine = CPU) -> common.Pictures:
    return common.class_folder(folder, machine, workers, "give a folder")


def test_random_crops_are_a_function_of_the_seed_whatever_process_reads_them(tmp_path):
    make_pictures(tmp_path / "cat", 8, 0)

    def first(workers: int, seed: int, start: int = 0, crop: bool = True) -> torch.Tensor:
        stream = pictures(tmp_path, workers).batches(3, seed, start, crop)
        return torch.stack([next(stream)[0] for _ in range(3 - start)])

    expected = first(0, 0)
    assert torch.equal(first(2, 0), expected) and torch.equal(first(0, 0, start=1), expected[1:])
    assert not torch.equal(first(0, 1), expected) and not torch.equal(first(0, 0, crop=False), expected)
    ranks = [pictures(tmp_path, 0, CPU._replace(rank=rank, world_size=2)) for rank in range(2)]
    parts = [next(rank.batches(3, 0, 0, True))[0] for rank in ranks]
    assert torch.equal(torch.cat(parts), expected[0])


def test_a_picture_of_16_bits_or_floats_looks_as_its_8_bit_twin(tmp_path):
    values = random_pixels(0, 40, 50)
    twins = {"8.png": values, "F.tif": values.astype(np.float32), "one.tif": np.float32(values / 255)}
    twins |= {"16.png": values.astype(np.uint16) * 257, "I.tif": values.astype(np.int32) * 257}
    for name, pixels in twins.items():
        Image.fromarray(pixels).save(tmp_path / name)
        shown = np.asarray(common.open_picture(tmp_path / name))
        assert shown.shape == (40, 50, 3) and np.array_equal(shown, np.stack([values] * 3, 2)), name


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named(workers, tmp_path):
    make_pictures(tmp_path / "cat", 3, 0)
    file = tmp_path / "cat" / "picture_1.JPEG"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match=f"^{file} is not a readable picture") as caught:
        pictures(tmp_path, workers).tensors()
    assert "Traceback" not in str(caught.value)


def test_a_small_set_is_read_before_a_run_and_a_flat_one_says_what_sorts_it(tmp_path):
    make_imagenet(tmp_path, corrupted=0)
    val = tmp_path / "imagenet" / "val"
    file = val / "n01440764" / "picture_1.JPEG"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    fails("picture_1.JPEG is not a readable picture", load_sets, "imagenet", tmp_path)
    shutil.rmtree(val)
    make_pictures(val, 2, 0)
    said = "val must hold a folder of pictures per class.*valprep.sh, sorts"
    fails(said, load_sets, "imagenet", tmp_path)


# ---------- Natural mistakes ----------


@pytest.mark.parametrize("script", ["gretta.py", "advaa.py", "game_of_noise.py"])
@pytest.mark.parametrize(
    "flags, names",
    [
        ("--dataset cifar10 --dry-run", ("cifar-10-batches-py", "--download cifar10")),
        ("--dataset mnist --dry-run", ("MNIST/raw", "--download mnist")),
        ("--dataset imagenet", ("imagenet/val", "image-net.org")),
        ("--dataset folder --weights x.pt", ("train/, and test/ or val/",)),
        ("--dataset digits", ("digits.npz", "git checkout")),
        ("--dataset nonsense", ("nonsense",)),
    ],
)
def test_a_missing_set_is_named_with_its_place_and_where_it_is_had(script, flags, names, tmp_path):
    places = ("--data-root", tmp_path / "none", "--run-dir", tmp_path / "run")
    refused(tmp_path, script, *flags.split(), *places, names=names)


# ---------- Downloads ----------


def test_a_file_arrives_whole_and_is_asked_for_once(address, tmp_path):
    file, md5 = tmp_path / "sub" / "weights.pth", hashlib.md5(CONTENT).hexdigest()
    for _ in range(2):
        assert common.download(f"{address}/file", file, md5) == file and file.read_bytes() == CONTENT
    assert Handler.asked == [("/file", None)] and names(file.parent) == ["weights.pth"]


def test_a_broken_off_download_goes_on_where_it_stopped_or_begins_again(address, tmp_path, capsys):
    file = tmp_path / "set.tar"
    said = "broken off after 2,000,000 of 5,120,000 bytes"
    fails(said, common.download, f"{address}/broken", file)
    assert (tmp_path / "set.tar.part").read_bytes() == CONTENT[:2_000_000] and not file.exists()
    common.download(f"{address}/broken", file, hashlib.sha256(CONTENT).hexdigest()[:8])
    assert file.read_bytes() == CONTENT and names(tmp_path) == ["set.tar"]
    assert Handler.asked == [("/broken", None), ("/broken", "bytes=2000000-")]
    assert "from byte 2,000,000 on" in capsys.readouterr().out
    (tmp_path / "whole.tar.part").write_bytes(CONTENT[:1000])  # of a server that cannot go on
    assert common.download(f"{address}/whole", tmp_path / "whole.tar").read_bytes() == CONTENT
    (tmp_path / "other.tar.part").write_bytes(CONTENT + b"more")
    fails("416", common.download, f"{address}/file", tmp_path / "other.tar")
    assert common.download(f"{address}/file", tmp_path / "other.tar").read_bytes() == CONTENT


def test_what_is_not_the_file_is_refused(address, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "archives", {"/page": b"<html>"})
    monkeypatch.setattr(Handler, "kinds", {"/page": "text/html"})
    for url, checksum, said in (
        (f"{address}/file", "0" * 32, "its checksum is .*, not 00000000"),
        (f"{address}/nothing", "", "404"),
        ("http://127.0.0.1:9/set.tar", "", "cannot download http://127.0.0.1:9/"),
        (f"{address}/page", "", "a page, not the file"),
    ):
        fails(said, common.download, url, tmp_path / "set.tar", checksum)
    assert names(tmp_path) == []


def test_imagenet_c_comes_in_parts_and_goes_on_with_the_missing_ones(address, tmp_path, monkeypatch):
    make_imagenet(tmp_path / "made")
    place, packed, entries = tmp_path / "data" / "imagenet-c", {}, []
    for name in ("fog", "snow"):
        file = Path(shutil.make_archive(tmp_path / name, "tar", tmp_path / "made" / "imagenet-c", name))
        packed[f"/{name}.tar"] = file.read_bytes()
        entries.append((file.name, hashlib.md5(file.read_bytes()).hexdigest(), name))
    monkeypatch.setitem(common.ARCHIVES, "imagenet-c", entries)
    monkeypatch.setattr(common, "ZENODO", f"{address}/")
    command = ("common", "--download", "imagenet-c", "--data-root", place.parent)
    monkeypatch.setattr(Handler, "archives", {"/fog.tar": packed["/fog.tar"]})
    fails("snow.tar.*404", run_here, *command)
    assert names(place) == ["fog"]
    monkeypatch.setattr(Handler, "archives", packed)
    assert "is there" in run_here(*command) and names(place) == ["fog", "snow"]
    assert [path for path, _ in Handler.asked].count("/fog.tar") == 1
    shutil.rmtree(place)
    monkeypatch.setattr(Handler, "archives", {"/fog.tar": b"no archive"})
    monkeypatch.setitem(common.ARCHIVES, "imagenet-c", [("fog.tar", "", "fog")])
    fails("fog.tar cannot be unpacked", run_here, *command)
    assert names(place) == ["fog.tar"]


def test_a_dry_run_downloads_nothing(address, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/file")
    flags = ("--dataset", "cifar10", "--data-root", tmp_path, "--run-dir", tmp_path / "run")
    fails("cifar-10-batches-py", run_here, "advaa", "--dry-run", *flags)
    assert Handler.asked == [] and names(tmp_path) == []
