"""What the scripts of CleanAug share: data, corruptions, models, machine, run, evaluation, results, files.

Nothing happens on import. As a program:

    python common.py RUN_DIR [RUN_DIR ...]          # a Markdown table of finished runs, mean ± std over seeds
    python common.py --train-weights resnext --dataset fashion_mnist       # train a classifier plainly
    python common.py --download cifar10-c           # or another data set, or a published checkpoint
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent
WEIGHTS = ROOT / "weights"
SPLITS = ("train", "val", "test")
# The sets that fit in memory, and what torchvision calls those of them that it reads
NUM_CLASSES = {"digits": 10, "mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
TORCHVISION["cifar100"] = "CIFAR100"
IDX = ("images-idx3-ubyte", "labels-idx1-ubyte")  # how MNIST's files are named, after train- or t10k-
SMALL = ("digits", "mnist", "fashion_mnist")  # grey: slim models, trained here where none is shipped
GENERATED = ("digits", "fashion_mnist", "fake")  # whose corruptions nobody has published
FAKE_SHAPE = (256, 10, 32, 32)  # of the data set "fake": training images, classes, height, width


class InputError(ValueError):
    """Bad input: one line that says what is wrong, where, and what to do. run_script makes it exit code 2."""

    def __init__(self, message: object = ""):
        super().__init__(one_line(str(message)))


class MissingData(InputError):
    """A set is not on disk, rather than damaged or half there."""


def one_line(text: str) -> str:
    """One printable line of whatever a message quotes, cut in the middle."""
    text = text if len(text) <= 4000 else f"{text[:2000]} … {text[-2000:]}"
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


# ---------- Data: images in memory, or pictures on disk, with the same methods ----------


def batch_numbers(size: int, batch_size: int, seed: int, start: int) -> Iterator[tuple[int, Tensor]]:
    """Epoch and image numbers (batch_size,) of batch `start`, start + 1, … without end. An epoch's order is a
    function of (seed, epoch); images left over by its last whole batch wait for the next."""
    steps = size // batch_size
    while True:
        epoch, first = divmod(start, steps)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(mix("order", seed, epoch)))
        yield from ((epoch, numbers) for numbers in order.split(batch_size)[first:steps])
        start = (epoch + 1) * steps


class Data:
    """Labelled images; labels (N,) int64, or (N, L) float. Images and Pictures add

    part(numbers): those images; corrupted(name, severity): all of them, corrupted with seed 0; read(batches
    of numbers): uint8 images (b, 3, H, W) and labels, batch by batch, on the device; batches(batch_size,
    seed, start, crop): shuffled batches without end: this rank's images and labels, and those that
    SamplePairing may take partners from: the global batch's, or (pictures, cropped and mirrored by `crop`)
    the rank's.
    """

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, most: int) -> "Data":
        """At most `most` of the images, evenly spaced through them."""
        return self.part(torch.linspace(0, len(self) - 1, min(most, len(self))).round().long())

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of all images, in order."""
        return self.read(self.machine.own_rows(torch.arange(len(self))).split(batch_size))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images and labels, in memory on every rank alike."""
        images, labels = zip(*self.read(torch.arange(len(self)).split(128)))
        return torch.cat(images), torch.cat(labels)


class Images(Data):
    """Images in memory, uint8 (N, 3, H, W), on the device: a batch is an index into them."""

    def __init__(self, images: Tensor, labels: Tensor, machine: "Machine"):
        self.images, self.labels = images.to(machine.device), labels.to(machine.device)
        self.machine, self.size = machine, min(images.shape[-2:])

    def part(self, numbers: Tensor) -> "Images":
        return Images(*next(self.read([numbers])), self.machine)

    def corrupted(self, name: str, severity: int) -> "Images":
        return Images(corrupt_uint8(self.images, name, severity, seed=0), self.labels, self.machine)

    def read(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for numbers in batches:
            numbers = numbers.to(self.images.device)
            yield self.images[numbers], self.labels[numbers]

    def batches(self, batch_size: int, seed: int, start: int = 0, crop: bool = False) -> Iterator[tuple]:
        own = self.machine.own_rows
        drawn = batch_numbers(len(self), batch_size, seed, start)
        for pool, labels in self.read(numbers for _, numbers in drawn):
            yield own(pool), own(labels), pool


class Pictures(Data, torch.utils.data.Dataset):
    """Pictures on disk, decoded by torch's DataLoader to RGB, 224 × 224.

    An item is (number, key): a key seeds a random crop and flip as torchvision's; None scales the shorter
    side to `resize` and cuts the centre out. InputError names a damaged picture when it is read.
    """

    size = 224

    def __init__(
        self, files: Sequence[str], labels: Tensor, machine: "Machine", workers: int, resize: int = 256
    ):
        # Bytes in one array: counting references to millions of strings would copy them into every worker
        self.files, self.labels = np.array([os.fsencode(file) for file in files]), labels
        self.machine, self.workers, self.resize = machine, workers, resize
        self.corruption: tuple[str, int] | None = None  # made on the device, batch by batch

    def part(self, numbers: Tensor) -> "Pictures":
        part = copy.copy(self)
        part.files, part.labels = self.files[numbers.numpy()], self.labels[numbers]
        return part

    def corrupted(self, name: str, severity: int) -> "Pictures":
        changed = copy.copy(self)
        changed.corruption = (name, severity)
        return changed

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[Tensor, Tensor]:
        from torchvision.transforms import v2

        number, key = item
        file = os.fsdecode(self.files[number])
        try:
            picture = v2.functional.pil_to_tensor(open_picture(file))
        except Exception as error:  # a damaged picture raises whatever its decoder meets
            raise InputError(f"{file} is not a readable picture ({error}): restore or remove it") from error
        if key is None:
            whole = v2.functional.resize(picture, self.resize, antialias=True)
            return v2.functional.center_crop(whole, self.size), self.labels[number]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key)
            crop = v2.RandomResizedCrop(self.size, antialias=True)(picture)
            return v2.RandomHorizontalFlip()(crop), self.labels[number]

    def load(self, items: Iterable[list]) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.machine.device
        more = {"prefetch_factor": 4, "worker_init_fn": leave_signals} if self.workers else {}
        more |= {"num_workers": self.workers, "pin_memory": device.type == "cuda"}
        try:
            for batch in torch.utils.data.DataLoader(self, batch_sampler=items, **more):
                images, labels = (part.to(device, non_blocking=True) for part in batch)
                yield corrupt_uint8(images, *self.corruption, seed=0) if self.corruption else images, labels
        except InputError as error:  # one raised in a worker comes behind the worker's traceback
            raise InputError(str(error).rpartition("common.InputError: ")[2]) from error

    def read(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return self.load([[(number, None) for number in batch.tolist()] for batch in batches if len(batch)])

    def batches(self, batch_size: int, seed: int, start: int = 0, crop: bool = False) -> Iterator[tuple]:
        drawn = batch_numbers(len(self), batch_size, seed, start)
        key = (lambda *place: mix("crop", seed, *place)) if crop else (lambda *place: None)
        own = ((epoch, self.machine.own_rows(numbers).tolist()) for epoch, numbers in drawn)
        for images, labels in self.load([(row, key(epoch, row)) for row in rows] for epoch, rows in own):
            yield images, labels, images


def leave_signals(_number: int) -> None:
    """In a loader process: Ctrl-C is the script's business; SIGTERM is how torch ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


CHECKED = 500  # of a set with at most so many pictures, each is read before a run
VALPREP = "https://github.com/soumith/imagenetloader.torch/blob/master/valprep.sh"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def is_picture(file: str) -> bool:
    return file.lower().endswith(IMAGE_SUFFIXES) and os.path.basename(file)[0] != "."


def open_picture(file: str | Path):
    """A PIL image in RGB; grey of 16 bits or floats (X-rays) is scaled where `convert` would clip it."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        upright = ImageOps.exif_transpose(opened)
        if upright.mode[0] not in "IF":
            return upright.convert("RGB")
        pixels = np.asarray(upright, dtype=np.float64)
        tops = (65535,) if upright.mode[0] == "I" else (1, 255, 65535)
        largest = next((top for top in tops if pixels.max() <= top), pixels.max())
        return Image.fromarray((pixels * 255 / largest).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def class_folder(
    place: Path,
    machine: "Machine",
    workers: int,
    advice: str,
    like: Pictures | None = None,
    resize: int = 256,
) -> Pictures:
    """The pictures `<place>/<class>/…`, classes in alphabetical order. MissingData, ending in `advice`, for
    no such directory, InputError for classes other than those of `like`, or without pictures."""
    from torchvision.datasets.folder import find_classes, make_dataset

    if not place.is_dir():
        raise MissingData(f"{place} is missing: {advice}")
    skipped = []
    try:
        names = [name for name in find_classes(place)[0] if name[0] != "."]
        if like is not None and names != like.classes:
            different = sorted({*names} ^ {*like.classes})
            raise ValueError(f"other classes than {like.place}: {', '.join(different[:6])}")
        numbers = {name: number for number, name in enumerate(names)}
        keep = lambda file: is_picture(file) or skipped.append(file)
        files, labels = zip(*make_dataset(place, numbers, is_valid_file=keep))
    except (OSError, ValueError) as error:
        if any(is_picture(file.name) for file in place.iterdir()):  # as ImageNet's archive unpacks val/
            advice = f"torchvision.datasets.ImageNet, or {VALPREP}, sorts ImageNet's into folders; {advice}"
        raise InputError(f"{place} must hold a folder of pictures per class ({error}): {advice}") from error
    pictures = Pictures(files, torch.tensor(labels), machine, workers, resize)
    pictures.classes, pictures.place, pictures.skipped = names, place, len(skipped)
    return pictures


def load_split(
    dataset: str, split: str, data_root: str | Path = "data", download: bool = True
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) uint8 and labels (N,) int64 of one split of a set that fits in memory.

    dataset: one of NUM_CLASSES, downloaded where missing (`download`). split: "train", "val" or "test"; where
    no "val" is published it is every tenth training image of each class. Raises InputError for missing or
    damaged files.
    """
    if split not in SPLITS or dataset not in NUM_CLASSES:
        choices = f"{', '.join(NUM_CLASSES)} and from {', '.join(SPLITS)}"
        raise InputError(f"no {dataset} {split}: choose from {choices}")
    if dataset == "digits":
        return load_digits(split, data_root)
    images, labels = read_published(dataset, split != "test", data_root, download)
    if split == "test":
        return images, labels
    chosen = held_out(labels) if split == "val" else ~held_out(labels)
    return images[chosen], labels[chosen]


def held_out(labels: Tensor) -> Tensor:
    """Which training images are for validation, (N,) bool: every tenth of each class (of few, the last)."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        chosen[(labels == label).nonzero()[9::10, 0]] = True
    chosen[-1] |= not chosen.any()
    return chosen


def load_digits(split: str, data_root: str | Path) -> tuple[Tensor, Tensor]:
    """UCI digits (Alpaydin & Kaynak 1998): 1,000 training, 197 validation, 600 test images; the split is in
    the file.

    The 8×8 integers 0..16 are enlarged bilinearly to 20 px in the middle of a black 32 px canvas.
    """
    file = Path(data_root) / "digits.npz"
    if not file.is_file() and str(data_root) == "data":  # for scripts that are run from elsewhere
        file = ROOT / "data" / "digits.npz"
    try:
        with np.load(file, allow_pickle=False) as archive:
            chosen = archive["split"] == SPLITS.index(split)
            images, labels = (torch.from_numpy(archive[name][chosen]) for name in ("images", "labels"))
        images = F.interpolate(images.float()[:, None] / 16, (20, 20), mode="bilinear", align_corners=False)
        return to_uint8(F.pad(images, (6, 6, 6, 6))).repeat(1, 3, 1, 1), labels.long()
    except Exception as error:  # zipfile, zlib, numpy and missing keys each raise their own
        advice = "git checkout data/digits.npz brings it back; --data-root names its folder"
        raise InputError(f"{file} is missing or damaged ({error}): {advice}") from error


def read_published(dataset: str, train: bool, data_root: str | Path, download: bool) -> tuple[Tensor, Tensor]:
    """All training or test images of (Fashion-)MNIST or CIFAR, as torchvision reads them: (N, 3, 32, 32),
    (N,).

    MNIST's files, gzipped or not, may also lie in <data_root>/<dataset> or in data_root itself; 28 px images
    get a black border of 2 px. CIFAR's must have their published checksums.
    """
    from torchvision import datasets

    read, folder = getattr(datasets, TORCHVISION[dataset]), Path(data_root) / TORCHVISION[dataset] / "raw"
    try:
        if dataset.startswith("cifar"):
            folder = Path(data_root) / read.base_folder
            found = read(data_root, train=train, download=download)
            return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)
        name, own = "train" if train else "t10k", folder
        places = (own, Path(data_root) / dataset, Path(data_root))
        folder = next((place for place in places if list(place.glob(f"{name}-{IDX[0]}*"))), own)
        if download and not list(folder.glob(f"{name}-{IDX[0]}*")):
            read(data_root, download=True)
        images, labels = (read_idx(folder / f"{name}-{kind}") for kind in IDX)
        if images.shape != (len(labels), 28, 28) or labels.max() >= NUM_CLASSES[dataset]:
            raise ValueError(f"images {tuple(images.shape)}, {len(labels)} labels up to {labels.max()}")
        return as_32_px(images), labels.long()
    except Exception as error:  # no network, a damaged archive, a checksum, a header: each raises its own
        advice = "remove it and " * folder.is_dir() + how_to_get(dataset, data_root)
        raise InputError(f"{folder} is missing or damaged ({error}): {advice}") from error


def class_names(dataset: str, data_root: str | Path) -> list[str]:
    """Of one of NUM_CLASSES, as torchvision has them; digits are their numbers."""
    from torchvision import datasets

    if dataset.startswith("cifar"):
        return getattr(datasets, TORCHVISION[dataset])(data_root, train=False).classes
    digits = [str(number) for number in range(NUM_CLASSES[dataset])]
    return datasets.FashionMNIST.classes if dataset == "fashion_mnist" else digits


def read_idx(file: Path) -> Tensor:
    """A file of MNIST's format, gzipped (.gz) or not."""
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
    from torchvision.datasets.utils import extract_archive

    if file.is_file():
        return read_sn3_pascalvincent_tensor(str(file))
    with tempfile.TemporaryDirectory() as directory:  # a package's folder cannot be written to
        return read_sn3_pascalvincent_tensor(extract_archive(f"{file}.gz", directory))


def as_32_px(images: Tensor) -> Tensor:
    """uint8 (N, 28, 28) → (N, 3, 32, 32), black around."""
    return F.pad(images, (2, 2, 2, 2))[:, None].repeat(1, 3, 1, 1)


class Corruptions(NamedTuple):
    """A corrupted test set. `read(name, severity)` makes or reads one part of it."""

    read: Callable[[str, int], Data]
    source: str
    names: tuple[str, ...]
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)

    @property
    def protocol(self) -> str:
        severities = f" x severities 1-{len(self.severities)}" * (len(self.severities) > 1)
        return f"{self.source}, {len(self.names)} corruptions{severities}"


# Mu & Gilmer 2019, arXiv 1906.02337; one severity
MNIST_C = ("shot_noise", "impulse_noise", "glass_blur", "motion_blur", "shear", "scale", "rotate")
MNIST_C += ("brightness", "translate", "stripe", "fog", "spatter", "dotted_line", "zigzag", "canny_edges")


def array_corruptions(
    folder: Path, dataset: str, labels: Tensor, machine: "Machine", advice: str
) -> Corruptions:
    """CIFAR-10-C, CIFAR-100-C or MNIST-C as published, whose labels must be the test set's `labels`.

    CIFAR-C: `<corruption>.npy`, uint8 (5·N, 32, 32, 3), severity after severity, and `labels.npy` (5·N,).
    MNIST-C: `<corruption>/test_{images,labels}.npy`, uint8 (N, 28, 28, 1).
    """
    names, parts, shape, images_of, labels_of = CORRUPTIONS, 5, (32, 32, 3), "{}.npy", "labels.npy"
    if dataset == "mnist":
        names, parts, shape = MNIST_C, 1, (28, 28, 1)
        images_of, labels_of = "{}/test_images.npy", "{}/test_labels.npy"

    def read(name: str, severity: int) -> Images:
        file = folder / images_of.format(name)
        try:
            files = (file, folder / labels_of.format(name))
            arrays = [np.split(np.lib.format.open_memmap(path, mode="r"), parts) for path in files]
            images, found = (torch.from_numpy(array[severity - 1].copy()) for array in arrays)
            if images.dtype != torch.uint8 or images.shape[1:] != shape:
                raise ValueError(f"it holds {images.dtype} {tuple(images.shape)}")
            if len(images) != len(found) or not torch.equal(found.long(), labels):
                raise ValueError(f"its labels are not those of the {len(labels)} test images")
        except Exception as error:  # a damaged header raises what NumPy, Python's parser and mmap meet
            raise InputError(f"{file} is missing or damaged ({error}): {advice}") from error
        images = as_32_px(images[..., 0]) if parts == 1 else images.permute(0, 3, 1, 2).contiguous()
        return Images(images, found.long(), machine)

    for name in names:
        read(name, parts)
    return Corruptions(read, f"{folder.name} as published", names, tuple(range(1, parts + 1)))


def picture_corruptions(folder: Path, clean: Pictures, workers: int, advice: str) -> Corruptions:
    """ImageNet-C's pictures, `<corruption>/<severity>/<class>/…`, with the classes of `clean` in every
    folder, and as many pictures."""
    found = {}
    for name, severity in [(name, severity) for name in CORRUPTIONS for severity in range(1, 6)]:
        try:  # published at 224 px already
            place = folder / name / str(severity)
            found[name, severity] = class_folder(place, clean.machine, workers, advice, clean, resize=224)
        except MissingData as error:
            raise InputError(str(error)) from error
    least, most = (choose(found.values(), key=len) for choose in (min, max))
    if len(least) < len(most):
        raise InputError(f"{least.place} is half copied: {len(least)} pictures, others have {len(most)}")
    return Corruptions(lambda *key: found[key], f"{folder.name} as published", CORRUPTIONS)


class Sets(NamedTuple):
    """What a run needs of a data set, whatever its kind. See load_sets."""

    train: Data | None
    val: Data | None
    test: Data
    corruptions: Corruptions | None
    classes: list[str]  # their names
    notes: list[str]  # what is left out for want of files


def dataset_name(text: str) -> str:
    """An argparse type: "cifar10-c" and the like are evaluated with the set that they are made from."""
    return text.removesuffix("-c")


def load_sets(
    dataset: str,
    data_root: str,
    machine: "Machine",
    *,
    workers: int = 0,
    split: str = "test",
    validation: bool = True,
    train: bool = True,
    corruptions: str | None = "if there",
    generate: bool = False,
    clean_directory: str | None = None,
    corrupted_directory: str | None = None,
    dry_run: bool = False,
) -> Sets:
    """Look for all that a run needs of a data set, before a file is written; InputError says what is missing.

    dataset: one of NUM_CLASSES, "imagenet", "folder" or "fake". split: what is evaluated, "test", or "val" to
    tune on. validation: hold validation images out of the training images. corruptions: "needed", "if there"
    or None; those of GENERATED are made, others with `generate`. A dry run takes few, and downloads nothing.
    """
    if dataset == "fake":
        count, num_classes, *shape = FAKE_SHAPE
        parts = [Images(*fake_images(size, num_classes, *shape), machine) for size in (count, 32, 32)]
        classes = [*map(str, range(num_classes))]
    elif dataset in NUM_CLASSES:
        machine.on_main(lambda: load_split(dataset, "test", data_root, not dry_run))  # downloads
        parts = [Images(*load_split(dataset, part, data_root, False), machine) for part in SPLITS]
        classes = class_names(dataset, data_root)
        if not validation and dataset != "digits":  # as published: all training images
            parts[0] = Images(*map(torch.cat, zip(parts[0].tensors(), parts[1].tensors())), machine)
    else:
        parts = find_folders(dataset, data_root, clean_directory, machine, workers, train or split == "val")
        classes = parts[2].classes
        if parts[1] is None and parts[0] is not None and validation:
            chosen = held_out(parts[0].labels)
            parts[:2] = [parts[0].part(rows.nonzero()[:, 0]) for rows in (~chosen, chosen)]
    clean, evaluated = parts[2], parts[SPLITS.index(split)]
    if evaluated is None:
        raise InputError(f"{dataset} has no validation images, and none are held out of its training images")
    parts = [parts[0], parts[1] if validation else None, evaluated]
    if dry_run:
        parts = [part and part.take(most) for part, most in zip(parts, (64, 64, 16))]
    skipped = {part.place: part.skipped for part in parts if part and getattr(part, "skipped", 0)}
    notes = [f"passed over in {place}, as no pictures: {count}" for place, count in skipped.items()]
    found, made = None, dataset in GENERATED
    try:
        if corruptions:
            found = find_corruptions(dataset, split, data_root, clean, corrupted_directory, workers)
    except MissingData as missing:
        if corrupted_directory or (corruptions == "needed" and not generate and not made):
            raise InputError(f"{missing}; or make them with --generate-corruptions") from missing
        without = [f"{missing}; corruptions are not evaluated (--generate-corruptions makes them)"]
        if generate or made:
            source = f"{dataset}-C generated from the {len(parts[2])} {split} images"
            found, without = Corruptions(parts[2].corrupted, source, CORRUPTIONS), []
        notes += without
    if found and dry_run:
        found = found._replace(read=lambda name, severity, read=found.read: read(name, severity).take(1))
    return Sets(*parts, found, classes, notes)


def fake_images(count: int, num_classes: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Random pixels, uint8 (count, 3, height, width), and labels in turn."""
    draws = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 3, height, width), generator=draws, dtype=torch.uint8)
    return images, torch.arange(count) % num_classes


def find_folders(
    dataset: str, data_root: str, named: str | None, machine: "Machine", workers: int, train: bool
) -> list[Pictures | None]:
    """Training, validation and test pictures, of the same classes, of "imagenet" or one's own "folder".

    In train/, and test/ or val/ (of both, val/ is for validation; ImageNet's val/ is its test set), of the
    folder `named`, <data_root>/imagenet or data_root; to evaluate, that may hold the classes itself.
    """
    root = Path(named or data_root)
    flag = "--datadir-clean" if named else "--data-root"
    advice = f"name the folder that holds train/, and test/ or val/, with {flag}"
    if dataset == "imagenet":
        advice = f"ImageNet is had from https://image-net.org/download.php; {advice}"
        root = root if named or (root / "val").is_dir() else root / "imagenet"
    train_place, val_place, test_place = root / "train", root / "val", root / "test"
    if dataset == "imagenet" or not test_place.is_dir():
        val_place, test_place = None, val_place
    elif not val_place.is_dir():
        val_place = None
    if not train and not test_place.is_dir() and not train_place.is_dir() and root.is_dir():
        test_place = root
    test = class_folder(test_place, machine, workers, advice)
    places = [train_place if train or train_place.is_dir() else None, val_place]
    found = [place and class_folder(place, machine, workers, advice, like=test) for place in places] + [test]
    for pictures in found:
        for number in range(len(pictures) if pictures and len(pictures) <= CHECKED else 0):
            pictures[number, None]  # InputError where it is damaged
    return found


def find_corruptions(
    dataset: str, split: str, data_root: str, clean: Data, directory: str | None, workers: int
) -> Corruptions:
    """The published corruptions of the test images `clean`. Raises MissingData where there are none."""
    archives = ARCHIVES.get(f"{dataset}-c")
    if dataset in GENERATED or split == "val":
        raise MissingData(f"no corruptions of {dataset}'s {split} images are published")
    if not directory and not archives:
        raise MissingData(f"no corrupted test set of {dataset} is known: name it with --corruptions-path")
    folder = Path(directory or Path(data_root) / ("imagenet-c" if dataset == "imagenet" else archives[0][2]))
    advice = f"{how_to_get(f'{dataset}-c', data_root)}; name its folder with --corruptions-path"
    if not folder.is_dir():
        raise MissingData(f"{folder} is missing: {advice}")
    if dataset in NUM_CLASSES:
        return array_corruptions(folder, dataset, clean.labels.cpu(), clean.machine, advice)
    return picture_corruptions(folder, clean, workers, advice)


# ---------- Images: warps, contrast, the augmentation that classifiers are trained under ----------


def modified_digits(
    split: str, data_root: str | Path = "data", variants: int = 10, seed: int = 0, dataset: str = "digits"
) -> tuple[Tensor, Tensor, Tensor]:
    """Modified digits (or another of SMALL), after GrETTA's modified MNIST: every image of the split
    `variants` times.

    Zoom 0.6..1 in x and y about the centre, then a translation of up to ±8 px in x and y; gamma 2/3..3/2
    (log-uniform), then contrast 0.8..1.2; uniform, drawn from `seed`. Returns uint8 images (variants·N, 3,
    32, 32), variant by variant, int64 labels, and the number (variants·N,) of each one's original.
    """
    images, labels = load_split(dataset, split, data_root)
    generator = torch.Generator().manual_seed(seed * len(SPLITS) + SPLITS.index(split))
    source = torch.arange(len(labels)).repeat(variants)

    def uniform(low: float, high: float, columns: int) -> Tensor:
        return low + (high - low) * torch.rand(len(source), columns, generator=generator)

    zoom, translation = uniform(0.6, 1.0, 2), uniform(-8, 8, 2)
    gamma, contrast = uniform(-math.log(1.5), math.log(1.5), 1).exp(), uniform(0.8, 1.2, 1)
    modified = affine_warp(to_float(images)[source], affine_matrix(zoom, translation))
    modified = adjust_contrast(modified.clamp_min(0) ** gamma[:, :, None, None], contrast[:, 0])
    return to_uint8(modified), labels[source], source


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 → float32 in [0, 1]."""
    return images.float().div_(255)


def to_uint8(images: Tensor) -> Tensor:
    """float in [0, 1] → uint8, rounded."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def constant(values: tuple, like: Tensor) -> Tensor:
    """A small tensor like `like`, made once: a copy to a GPU in every step would hold it up."""
    if torch.compiler.is_compiling():  # torch.compile and torch.export keep it themselves
        return like.new_tensor(values)
    return kept_tensor(values, like.dtype, like.device)


@functools.cache
@torch.inference_mode(False)
def kept_tensor(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def affine_matrix(scale: Tensor, translation: Tensor, degrees: Tensor | None = None) -> Tensor:
    """Forward maps (B, 2, 3) in pixels about the image centre: p → R(degrees)·diag(scale)·p + translation.

    scale (B, 2) in x and y, > 1 enlarges; translation (B, 2) in px, positive right and down; degrees (B,),
    positive counter-clockwise as seen on the screen.
    """
    angle = torch.zeros_like(scale[:, 0]) if degrees is None else torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale[:, 0], sin * scale[:, 1], translation[:, 0]], dim=1)
    row_y = torch.stack([-sin * scale[:, 0], cos * scale[:, 1], translation[:, 1]], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def affine_warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Warp images (B, C, H, W) by forward maps (B, 2, 3) of affine_matrix; one bilinear interpolation, black
    outside, differentiable in both."""
    height, width = images.shape[-2:]
    size = constant((width, height), matrix)
    # grid_sample looks up, for every output pixel, where it comes from (the inverse map), in units of half
    # the image.
    linear, shift = matrix[:, :, :2], matrix[:, :, 2]

    a, b, c, d = linear.flatten(1).unbind(1)
    adjugate = torch.stack([d, -b, -c, a], dim=1).view(-1, 2, 2)
    inverse = adjugate / (a * d - b * c)[:, None, None]
    shift = -(inverse @ shift[:, :, None])[:, :, 0]
    theta = torch.cat([inverse * (size / size[:, None]), (shift * 2 / size)[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


LUMA = (0.299, 0.587, 0.114)


def adjust_contrast(images: Tensor, contrast: Tensor) -> Tensor:
    """m + contrast·(x − m) in [0, 1], m the mean of the image's luma, as PIL's ImageEnhance.Contrast.

    images (B, 3, H, W) in [0, 1]; contrast (B,), 1 is the identity.
    """
    luma = constant(LUMA, images).view(1, 3, 1, 1)
    mean = (images * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
    return (mean + contrast.view(-1, 1, 1, 1) * (images - mean)).clamp(0, 1)


def light_augmentation(images: Tensor, dataset: str, draws: Tensor) -> Tensor:
    """What classifiers are trained under: images (B, 3, H, W) in [0, 1], draws (B, 5) uniform in −1..1.

    CIFAR: shifted by up to 4 px, black outside, and mirrored; Fashion-MNIST: by up to 2; digits: ±1 px, zoom
    0.95..1.05, ±5°; pictures on disk were cropped and mirrored as they were read.
    """
    if dataset in ("imagenet", "folder", "chexpert"):
        return images
    if dataset in ("digits", "mnist", "fake"):
        return affine_warp(images, affine_matrix(1 + 0.05 * draws[:, :2], draws[:, 2:4], 5 * draws[:, 4]))
    flips = torch.stack([draws[:, 2].sign(), torch.ones_like(draws[:, 2])], dim=1)
    reach = 2.5 if dataset == "fashion_mnist" else 4.5
    return affine_warp(images, affine_matrix(flips, (reach * draws[:, :2]).round()))


# ---------- Corruptions: ImageNet-C's 15, batched; randomness is a function of an image's pixels ----------

# Severities 1..5 as published (make_cifar_c.py and make_imagenet_c.py of github.com/hendrycks/robustness):
# the first row of each name made CIFAR-10-C, the second ImageNet-C. The functions below name the numbers.
# fmt: off
SEVERITIES = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
                     ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
                   ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
                    ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    # Counts are those of numpy.arange(1, 1.06, 0.01) and so on, which sometimes includes its end.
    "zoom_blur": (((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
                  ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03))),
    "snow": (((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
              (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
              (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
             ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
              (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55))),
    # The last number is the photographs' scale: they were shrunk to a fifth for CIFAR-10-C.
    "frost": (((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
              ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1))),
    "fog": (((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
            ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    # In units of the image's side, which was 32, and for ImageNet-C 244 (elastic_transform rescales from 224)
    "elastic_transform": (((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05),
                           (0.1, 0.03, 0.03)),
                          ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02),
                           (0.12, 0.01, 0.02))),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
# fmt: on
CORRUPTIONS = tuple(SEVERITIES)  # in the standard order


@torch.no_grad()
def corrupt(images: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Corrupt a batch as ImageNet-C does (Hendrycks & Dietterich 2019, arXiv 1903.12261).

    images: floating (B, 3, H, W) in [0, 1], on any device, sides of 28 or more. CIFAR-10-C's constants up to
    64 px on the longer side, ImageNet-C's above; kernels given in pixels stay as published. Returns the same
    shape, dtype and device, in [0, 1], not quantised. An image's randomness is a function of (seed, name,
    severity, its own 8-bit pixels): the batch around it changes nothing. Raises InputError for an unknown
    name or severity, or another shape.
    """
    if name not in CORRUPTIONS:
        raise InputError(f"unknown corruption {name!r}; choose from {', '.join(CORRUPTIONS)}")
    if severity not in (1, 2, 3, 4, 5):
        raise InputError(f"severity must be 1, 2, 3, 4 or 5, not {severity!r}")
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(f"images must be floating (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    constants = SEVERITIES[name][0 if max(images.shape[-2:]) <= 64 else 1][int(severity) - 1]
    constants = constants if isinstance(constants, tuple) else (constants,)
    pixels = images.float().contiguous()
    keys = image_keys(pixels, f"{name} {int(severity)} {int(seed)}")
    function = globals()[name]  # one of those below
    return function(pixels, keys, *constants).clamp(0, 1).to(images.dtype)


def corrupt_uint8(images: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """As `corrupt`, for uint8 images (N, 3, H, W), as many at a time as make a million pixels; returns
    uint8."""
    parts = images.split(max(1, 2**20 // (images.shape[2] * images.shape[3])))
    return torch.cat([to_uint8(corrupt(to_float(part), name, severity, seed)) for part in parts])


# Each function below takes images (B, 3, H, W), float32, keys (B,) and one severity's constants. It returns
# (B, 3, H, W) before clamping. Streams 0, 1, 2... keep the random draws of one function apart.


def gaussian_noise(images: Tensor, keys: Tensor, deviation: float) -> Tensor:
    return images + deviation * normals(keys, 0, images.shape[1:])


def shot_noise(images: Tensor, keys: Tensor, photons: int) -> Tensor:
    """Poisson counts with mean photons * x, by inversion of an exact table over the 256 pixel values."""
    most = photons + int(10 * math.sqrt(photons)) + 10
    counts = torch.arange(most, dtype=torch.float64)
    means = photons * torch.arange(256, dtype=torch.float64)[:, None] / 255
    probabilities = torch.exp(torch.xlogy(counts, means) - means - torch.lgamma(counts + 1))
    # Row v of the table is shifted to [v, v + 1], so that one sorted list serves every pixel value.
    table = probabilities.cumsum(1).clamp(max=1) + torch.arange(256)[:, None]
    values = (images * 255).round()
    draws = values + uniforms(keys, 0, images.shape[1:]).double()
    drawn = torch.searchsorted(table.flatten().to(images.device), draws)
    return (drawn - values.long() * most).float() / photons


def impulse_noise(images: Tensor, keys: Tensor, amount: float) -> Tensor:
    """Salt and pepper: every channel of every pixel on its own, half black and half white."""
    draws = uniforms(keys, 0, images.shape[1:])
    return torch.where(draws < amount / 2, 0.0, torch.where(draws > 1 - amount / 2, 1.0, images))


def defocus_blur(images: Tensor, keys: Tensor, radius: float, softness: float) -> Tensor:
    """A disk, smoothed by a Gaussian; mirrored borders. Computed as a product of spectra."""
    reach = min(int(radius) + 2, 8) if radius <= 8 else int(radius)
    offsets = torch.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).double()
    taps = torch.arange(-1, 2) if radius <= 8 else torch.arange(-2, 3)
    window = torch.exp(-0.5 * (taps / softness).double() ** 2)
    window = torch.outer(window, window) / window.sum() ** 2
    disk = F.pad((disk / disk.sum())[None, None], [len(taps) // 2] * 4, mode="reflect")
    kernel = F.conv2d(disk, window[None, None])[0, 0].to(images.device)
    padded = F.pad(images.double(), [reach] * 4, mode="reflect")
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernel, s=padded.shape[-2:]).conj()
    return torch.fft.irfft2(spectrum, s=padded.shape[-2:])[..., : images.shape[2], : images.shape[3]].float()


def glass_blur(images: Tensor, keys: Tensor, deviation: float, reach: int, rounds: int) -> Tensor:
    """Blur, move pixels about, blur.

    The published loop means to swap each pixel with a random neighbour, but its two NumPy views alias: it
    copies the neighbour. One that reads a pixel not yet visited takes the original; else what that one took.
    Following these references for all pixels at once, by pointer jumping, gives exactly the loop's result.
    """
    count, _, height, width = images.shape
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    visited = (rows > reach) & (rows <= height - reach) & (columns > reach) & (columns <= width - reach)
    here = rows * width + columns  # (H, W)
    blurred = blur(images, deviation).flatten(2)
    for i in range(rounds):
        draws = (uniforms(keys, i, (2, height, width)) * 2 * reach).long() - reach  # in -reach..reach-1
        draws = torch.where(visited, draws, 0)
        target = (here + draws[:, 0] * width + draws[:, 1]).flatten(1)  # (B, H*W)
        chained = (target > here.flatten()) & visited.flatten()[target]
        final = torch.where(chained, target, here.flatten())
        for _ in range(6 if reach > 1 else 0):  # 2^6 references; a chain goes on half the time at most
            final = final.gather(1, final)
        source = target.gather(1, final)
        blurred = blurred.gather(2, source[:, None].expand(-1, 3, -1))
    return blur(blurred.view(images.shape), deviation)


def motion_blur(images: Tensor, keys: Tensor, radius: int, deviation: float) -> Tensor:
    """A one-sided Gaussian streak at an angle drawn per image from -45..45 degrees."""
    return streak(images, radius, deviation, 90 * uniforms(keys, 0, (1,)) - 45)


def zoom_blur(images: Tensor, keys: Tensor, count: int, step: float) -> Tensor:
    """The mean of the image and its enlargements by 1, 1 + step, ..., count of them."""
    height, width = images.shape[-2:]
    total = images.double()
    for i in range(count):
        factor = 1 + i * ((1 + step) - 1)  # numpy.arange's rounding, which decides some sizes of the crop
        total = total + separable(images, zoom_matrix(height, factor), zoom_matrix(width, factor))
    return (total / (count + 1)).float()


def snow(
    images: Tensor,
    keys: Tensor,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: float,
    streak_deviation: float,
    keep: float,
) -> Tensor:
    """Enlarged, thresholded noise, streaked towards the ground, over a whitened image."""
    height, width = images.shape[-2:]
    flakes = mean + deviation * normals(keys, 0, (1, height, width))
    flakes = separable(flakes, zoom_matrix(height, zoom), zoom_matrix(width, zoom)).float()
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = streak(flakes, radius, streak_deviation, -90 * uniforms(keys, 1, (1,)) - 45)
    grey = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]
    white = torch.maximum(images, 1.5 * grey + 0.5)
    return keep * images + (1 - keep) * white + flakes + flakes.flip(2, 3)


def frost(images: Tensor, keys: Tensor, keep: float, strength: float, scale: float) -> Tensor:
    """keep * x + strength * ice. Differs from the paper: its ice is photographs, ours is generated like them."""
    return keep * images + strength * ice(keys, *images.shape[-2:], scale)


def fog(images: Tensor, keys: Tensor, strength: float, decay: float) -> Tensor:
    """Adds a plasma fractal, then rescales so that the brightest value keeps its place."""
    height, width = images.shape[-2:]
    brightest = images.amax((1, 2, 3), keepdim=True)
    haze = plasma(keys, 2 ** math.ceil(math.log2(max(height, width))), decay)[:, None, :height, :width]
    return (images + strength * haze) * brightest / (brightest + strength)


def brightness(images: Tensor, keys: Tensor, shift: float) -> Tensor:
    """Adds to the HSV value; hue and saturation stay, so the channels grow by one common factor."""
    value = images.amax(1, keepdim=True)
    raised = (value + shift).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp(min=1e-8)), raised)


def contrast(images: Tensor, keys: Tensor, factor: float) -> Tensor:
    means = images.double().mean((2, 3), keepdim=True).float()
    return (images - means) * factor + means


def elastic_transform(
    images: Tensor, keys: Tensor, amplitude: float, smoothness: float, jitter: float
) -> Tensor:
    """A random affine map (three points moved by up to jitter), then a smooth displacement of every pixel."""
    height, width = images.shape[-2:]
    unit = max(height, width) * (244 / 224 if max(height, width) > 64 else 1)
    rows = torch.arange(height, device=images.device)[:, None].float()
    columns = torch.arange(width, device=images.device).float()
    # The points are (centre_x, centre_y) + (arm, arm), (arm, -arm), (-arm, -arm), each moved by its (x, y).
    arm, centre_x, centre_y = min(height, width) // 3, width // 2, height // 2
    moves = jitter * unit * (2 * uniforms(keys, 0, (3, 2)) - 1)
    (x0, y0), (x1, y1), (x2, y2) = moves.permute(1, 2, 0)[..., None, None]  # (B, 1, 1) each
    a, b = 1 + (x1 - x2) / (2 * arm), (x0 - x1) / (2 * arm)
    c, d = (y1 - y2) / (2 * arm), 1 + (y0 - y1) / (2 * arm)
    right, down = columns - centre_x - arm - x0, rows - centre_y - arm - y0
    # Every pixel reads where the inverse of [[a, b], [c, d]] takes it; mirrored about border pixels' centres
    x = (d * right - b * down) / (a * d - b * c) + centre_x + arm
    y = (a * down - c * right) / (a * d - b * c) + centre_y + arm
    warped = sample(images, x, y, align_corners=True)
    shifts = blur(2 * uniforms(keys, 1, (2, height, width)) - 1, smoothness * unit, truncate=3, mirrored=True)
    shifts = amplitude * unit * shifts  # (B, 2, H, W)
    return sample(warped, columns + shifts[:, 0], rows + shifts[:, 1], align_corners=False)  # about edges


def pixelate(images: Tensor, keys: Tensor, factor: float) -> Tensor:
    """PIL's resize with BOX down to int(side * factor) and up again."""
    pairs = ((side, int(side * factor)) for side in images.shape[-2:])
    rows, columns = (box_matrix(few, side) @ box_matrix(side, few) for side, few in pairs)
    return separable(images, rows, columns).float()


def jpeg_compression(images: Tensor, keys: Tensor, quality: int) -> Tensor:
    """libjpeg's baseline round trip at PIL's quality: 4:2:0 chroma, smooth upsampling, all its roundings."""
    height, width = images.shape[-2:]
    device = images.device
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    to_ycc = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]],
        dtype=torch.float64,
        device=device,
    )
    centre = torch.tensor([0.0, 128, 128], dtype=torch.float64, device=device).view(3, 1, 1)
    pixels = F.pad((images * 255).round().double(), (0, -width % 16, 0, -height % 2), mode="replicate")
    ycc = round_away((to_ycc @ pixels.flatten(2)).view(pixels.shape) + centre)
    odd = torch.arange(pixels.shape[-1], device=device) % 2  # chroma's halves are rounded up, down by turns
    chroma = (F.avg_pool2d(ycc[:, 1:], 2) + (1 + odd[: len(odd) // 2]) / 4).floor()
    decoded = []
    for plane, table in ((ycc[:, :1], JPEG_LUMINANCE), (chroma, JPEG_CHROMINANCE)):
        plane = F.pad(plane - 128, (0, 0, 0, -plane.shape[-2] % 8), mode="replicate")
        table = ((torch.tensor(table, device=device).view(8, 8) * percent + 50) // 100).clamp(1, 255).double()
        table = table.repeat(plane.shape[-2] // 8, plane.shape[-1] // 8)
        rows, columns = dct_matrix(plane.shape[-2]), dct_matrix(plane.shape[-1])
        eighths = round_away(8 * separable(plane, rows, columns))
        plane = separable(round_away(eighths / (8 * table)) * table, rows.T, columns.T)
        decoded.append(round_away(plane + 128).clamp(0, 255))
    chroma = decoded[1][..., : (height + 1) // 2, : (width + 1) // 2]
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    chroma = (chroma + (8 - odd[:width]) / 16).floor()
    ycc = torch.cat([decoded[0][..., :height, :width], chroma], 1) - centre
    rgb = (torch.linalg.inv(to_ycc) @ ycc.flatten(2)).view(ycc.shape)
    return (round_away(rgb) / 255).float()


# Random numbers: a counter hashed with the image's key. No generator, so no order of drawing.


def scramble(bits: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, in place; products wrap, and shifts of signed numbers need masks."""
    bits ^= (bits >> 30).bitwise_and_((1 << 34) - 1)
    bits *= -0x40A7B892E31B1A47
    bits ^= (bits >> 27).bitwise_and_((1 << 37) - 1)
    bits *= -0x6B2FB644ECCEEE15
    bits ^= (bits >> 31).bitwise_and_((1 << 33) - 1)
    return bits


def image_keys(images: Tensor, label: str) -> Tensor:
    """One 64-bit key per image: (B, 3, H, W) in [0, 1] -> (B,) int64. Integer sums: exact in any order."""
    pixels = (images * 255).round().long().flatten(1)
    weights = scramble(torch.arange(1, pixels.shape[1] + 1, device=images.device))
    salt = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little", signed=True)
    return scramble((pixels * weights).sum(1) + salt)


def uniforms(keys: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """(B, *shape) float32, uniform in the open interval (0, 1), steps of 2^-23; two from each 64-bit hash."""
    count = math.prod(shape)
    counters = scramble(torch.arange((count + 1) // 2, device=keys.device) + (stream << 40) + 1)
    bits = scramble(keys[:, None] + counters)
    halves = torch.cat([bits >> 41, bits >> 18], 1).bitwise_and_((1 << 23) - 1)[:, :count]
    return ((halves.float() + 0.5) * 2.0**-23).view(-1, *shape)


def normals(keys: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """(B, *shape) float32, standard normal (Box-Muller)."""
    half = (math.prod(shape) + 1) // 2
    draws = uniforms(keys, stream, (2, half))
    length, angle = (-2 * draws[:, 0].log()).sqrt(), 2 * math.pi * draws[:, 1]
    return torch.cat([length * angle.cos(), length * angle.sin()], 1)[:, : math.prod(shape)].view(-1, *shape)


def plasma(keys: Tensor, side: int, decay: float) -> Tensor:
    """Diamond-square fractal on a torus: (B, side, side) in [0, 1]; side a power of two."""
    field = torch.zeros(len(keys), side, side, device=keys.device)
    step, amplitude = side, 1.0
    while step >= 2:
        half = step // 2
        noise = amplitude * (2 * uniforms(keys, step, (3, side // step, side // step)) - 1)
        corners = field[:, ::step, ::step]
        right, below = corners.roll(-1, 2), corners.roll(-1, 1)
        middles = (corners + right + below + right.roll(-1, 1)) / 4 + noise[:, 0]
        field[:, half::step, half::step] = middles
        field[:, ::step, half::step] = (corners + right + middles + middles.roll(1, 1)) / 4 + noise[:, 1]
        field[:, half::step, ::step] = (corners + below + middles + middles.roll(1, 2)) / 4 + noise[:, 2]
        step, amplitude = half, amplitude / decay**2  # published: wibble * U(-wibble, wibble), squared
    field -= field.amin((1, 2), keepdim=True)
    return field / field.amax((1, 2), keepdim=True)


# Ice as the five photographs that the published frost draws from: mean R, G, B, all of 255; deviation of a
# crop's mean; of four octaves of needles, ICE_WAVES px wide and twice as long; and how skewed the sum is
ICE_WAVES = (1, 4, 30, 100)
ICE = (
    (79, 150, 167, 10, 8.8, 5.0, 7.5, 11.0, -0.003),
    (201, 205, 214, 8, 9.7, 11.2, 4.0, 17.0, -0.006),
    (201, 205, 214, 8, 9.7, 11.2, 4.0, 17.0, -0.006),
    (138, 153, 165, 12, 17.2, 14.5, 4.0, 19.0, 0.0016),
    (112, 124, 136, 17, 22.5, 18.5, 18.0, 18.5, 0.002),
)
ICE_SHRUNK = (0.2, 0.9, 1.0, 1.0)  # what the mean of 5 x 5 px leaves of each octave


def ice(keys: Tensor, height: int, width: int, scale: float) -> Tensor:
    """Frost on glass, (B, 3, H, W) in [0, 1], of one of five kinds; scale 1, or 0.2 for small images.

    Per kind it has the photographs' mean, colour and percentiles and, within a crop of 224 px, of a channel,
    their deviation and mean differences of pixels 1, 8 and 32 px apart.
    """
    rows = torch.arange(height, device=keys.device)[:, None].float() - height / 2
    columns = torch.arange(width, device=keys.device).float() - width / 2
    kinds = (len(ICE) * uniforms(keys, 0, (1,))).long()[:, 0]
    table = torch.tensor(ICE, device=keys.device)[kinds][..., None, None]  # (B, 9, 1, 1)
    tilt = 2 * math.pi * uniforms(keys, 1, (1, 1))
    total, variance = table[:, 3] * normals(keys, 2, (1, 1)), table[:, 3].square()
    for i, (wave, left) in enumerate(zip(ICE_WAVES, ICE_SHRUNK)):
        wave, deviation = max(wave * scale, 1), table[:, 4 + i] * (left if scale < 1 else 1)
        cosine, sine = (tilt + i * math.pi / 3).cos(), (tilt + i * math.pi / 3).sin()  # (B, 1, 1)
        middle = int(0.75 * max(height, width) / wave) + 1
        lattice = uniforms(keys, 3 + i, (1, 2 * middle + 1, 2 * middle + 1))
        along, across = (columns * cosine + rows * sine) / 2, rows * cosine - columns * sine
        needles = sample(lattice, along / wave + middle, across / wave + middle, align_corners=True)[:, 0]
        total, variance = total + deviation * (needles - 0.5) / 0.1925, variance + deviation.square()
    total = total + table[:, 8] * (total.square() - variance)
    return ((table[:, :3] + total[:, None]) / 255).clamp(0, 1)


# Linear maps along rows and columns, as float64 matrices: exact to rounding whatever the batch size, and
# neither TF32 nor autocast touches them.


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows (H', H) @ image @ columns (W', W) transposed, for (B, C, H, W): (B, C, H', W') float64."""
    return rows.to(images.device) @ (images.double() @ columns.T.to(images.device))


def blur(images: Tensor, deviation: float, truncate: float = 4, mirrored: bool = False) -> Tensor:
    """Gaussian blur, cut at `truncate` deviations; borders repeat the last pixel, or mirror at the edge."""
    matrices = []
    for side in images.shape[-2:]:
        reach = int(truncate * deviation + 0.5)
        offsets = torch.arange(-reach, reach + 1)
        weights = torch.exp(-0.5 * (offsets.double() / max(deviation, 1e-8)) ** 2)
        positions = torch.arange(side)[:, None] + offsets
        if mirrored:
            positions = positions % (2 * side)
            positions = torch.minimum(positions, 2 * side - 1 - positions)
        matrix = torch.zeros(side, side, dtype=torch.float64)
        weights = (weights / weights.sum()).expand(positions.shape)
        matrices.append(matrix.scatter_add_(1, positions.clamp(0, side - 1), weights))
    return separable(images, *matrices).float()


def zoom_matrix(side: int, factor: float) -> Tensor:
    """(side, side): the middle ceil(side / factor) pixels, linearly enlarged, ends kept, and cut to side."""
    crop = math.ceil(side / factor)
    zoomed = round(crop * factor)
    positions = (torch.arange(side, dtype=torch.float64) + (zoomed - side) // 2) * (crop - 1) / (zoomed - 1)
    return (1 - (positions[:, None] + (side - crop) // 2 - torch.arange(side)).abs()).clamp(min=0)


def box_matrix(side: int, resized: int) -> Tensor:
    """(resized, side): PIL's BOX filter, the mean of the pixels whose centres fall in the box."""
    ratio = side / resized
    centres = (torch.arange(resized, dtype=torch.float64) + 0.5) * ratio
    distance = (torch.arange(side) + 0.5 - centres[:, None]) / max(ratio, 1)
    inside = ((distance > -0.5) & (distance <= 0.5)).double()
    return inside / inside.sum(1, keepdim=True)


def dct_matrix(side: int) -> Tensor:
    """(side, side): orthonormal 8-point DCT-II on every run of 8."""
    angles = torch.outer(torch.arange(8), 2 * torch.arange(8) + 1).double() * math.pi / 16
    basis = angles.cos() / 2
    basis[0] /= math.sqrt(2)
    return torch.block_diag(*[basis] * (side // 8))


def round_away(values: Tensor) -> Tensor:
    """Nearest integer, halves away from zero as in libjpeg; a nudge, lest rounding noise decide ties."""
    return values.sign() * (values.abs() + 0.5 + 1e-9).floor()


def sample(images: Tensor, x: Tensor, y: Tensor, align_corners: bool) -> Tensor:
    """Bilinear look-up at positions x, y (B, H, W) in px; mirrored about border pixels' centres, or edges."""
    height, width = images.shape[-2:]
    if align_corners:
        grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    else:
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=align_corners)


def streak(images: Tensor, radius: int, deviation: float, degrees: Tensor) -> Tensor:
    """ImageMagick's motion blur: Gaussian weights at whole pixels along the angle (B, 1); borders repeat."""
    height, width = images.shape[-2:]
    weights = torch.exp(-0.5 * (torch.arange(2 * radius + 1, dtype=torch.float64) / deviation) ** 2)
    radians = degrees * math.pi / 180
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    total = torch.zeros_like(images)
    for i, weight in enumerate((weights / weights.sum()).tolist()):
        if weight > 1e-6:  # the far end of a wide kernel is nil
            down = (rows + (i * radians.sin() - 0.5).ceil().long()).clamp(0, height - 1)  # (B, H)
            right = (columns + (i * radians.cos() - 0.5).ceil().long()).clamp(0, width - 1)  # (B, W)
            source = (down[:, :, None] * width + right[:, None]).flatten(1)[:, None]  # (B, 1, H*W)
            source = source.expand(-1, images.shape[1], -1)
            total += weight * images.flatten(2).gather(2, source).view(images.shape)
    return total


# Annex K of the JPEG standard (ITU-T T.81), tables K.1 and K.2.
# fmt: off
JPEG_LUMINANCE = (16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57,
                  69, 56, 14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64,
                  81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99)
JPEG_CHROMINANCE = (17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99,
                    99, 99, 47, 66, 99, 99, 99, 99, 99, 99) + (99,) * 32
# fmt: on


# ---------- Models: images in [0, 1], (B, 3, H, W) → logits (B, num_classes) ----------


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


class ResNeXtBottleneck(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, cardinality: int, group_width: int, stride: int):
        super().__init__()
        channels = cardinality * group_width
        self.conv_reduce, self.bn_reduce = conv(in_channels, channels, 1), nn.BatchNorm2d(channels)
        self.conv_conv, self.bn = conv(channels, channels, 3, stride, cardinality), nn.BatchNorm2d(channels)
        self.conv_expand, self.bn_expand = conv(channels, out_channels, 1), nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            shortcut = conv(in_channels, out_channels, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn_reduce(self.conv_reduce(x)), inplace=True)
        out = F.relu(self.bn(self.conv_conv(out)), inplace=True)
        out = self.bn_expand(self.conv_expand(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNeXt(nn.Module):
    """ResNeXt-29 (4×32d) for 32 px (Xie et al. 2017, section 5.3), with the key names of AugMix's checkpoints;
    width: channels of the first convolution, 64 as published."""

    def __init__(self, num_classes: int, width: int = 64):
        super().__init__()
        self.conv_1_3x3, self.bn_1 = conv(3, width, 3), nn.BatchNorm2d(width)
        channels = width
        for stage in range(3):
            planes, blocks = width * 2**stage, []
            for block in range(3):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResNeXtBottleneck(channels, 4 * planes, 4, planes // 2, stride))
                channels = 4 * planes
            self.add_module(f"stage_{stage + 1}", nn.Sequential(*blocks))
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn_1(self.conv_1_3x3(images * 2 - 1)), inplace=True)  # mean and std 0.5, as AugMix
        return self.classifier(self.stage_3(self.stage_2(self.stage_1(x))).mean((2, 3)))


class WideResNetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), conv(in_channels, out_channels, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out_channels), conv(out_channels, out_channels, 3)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True)) + shortcut


class WideResNet(nn.Module):
    """Wide ResNet (Zagoruyko & Komodakis 2016) for 32 px, with the key names of AugMix's checkpoints; width:
    channels of the first convolution, 16 as published."""

    def __init__(self, num_classes: int, depth: int = 40, widen_factor: int = 2, width: int = 16):
        super().__init__()
        self.conv1, channels = conv(3, width, 3), width
        for stage in range(3):
            out_channels, blocks = width * widen_factor * 2**stage, nn.Sequential()
            for block in range((depth - 4) // 6):
                blocks.append(WideResNetBlock(channels, out_channels, 2 if stage > 0 and block == 0 else 1))
                channels = out_channels
            self.add_module(f"block{stage + 1}", nn.ModuleDict({"layer": blocks}))
        self.bn1, self.fc = nn.BatchNorm2d(channels), nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images * 2 - 1)  # mean and std 0.5, as AugMix
        for block in (self.block1, self.block2, self.block3):
            x = block["layer"](x)
        return self.fc(F.relu(self.bn1(x), inplace=True).mean((2, 3)))


class ShakeShakeBlock(nn.Module):
    """A skip path plus the mix of two residual branches, each ReLU-Conv-BN-ReLU-Conv-BN.

    To more channels the skip path is ReLU, two 1×1 convolutions for half of them each, one of which sees the
    image shifted by one right and down, and BN.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.branch1, self.branch2 = (
            nn.Sequential(
                conv(in_channels, out_channels, 3, stride),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
                conv(out_channels, out_channels, 3),
                nn.BatchNorm2d(out_channels),
            )
            for _ in range(2)
        )
        self.skip1 = self.skip2 = self.bn_skip = None
        if in_channels != out_channels:
            self.skip1 = conv(in_channels, out_channels // 2, 1, stride)
            self.skip2 = conv(in_channels, out_channels - out_channels // 2, 1, stride)
            self.bn_skip = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(x)
        if self.bn_skip is not None:
            x = self.bn_skip(torch.cat([self.skip1(active), self.skip2(F.pad(active, (1, -1, 1, -1)))], 1))
        return x + shake_even(self.branch1(active), self.branch2(active), self.training)


def shake_even(one: Tensor, other: Tensor, training: bool) -> Tensor:
    """α·one + (1 - α)·other, α ~ U(0, 1) per image (else their mean), with the gradient of the mean."""
    mean = (one + other) / 2
    if not training:
        return mean
    alpha = torch.rand(len(one), 1, 1, 1, device=one.device)
    return mean + ((alpha - 0.5).to(one.dtype) * (one - other)).detach()


class ShakeShake(nn.Module):
    """Shake-Shake 26 2×{width}d for 32 px images (Gastaldi 2017, arXiv 1705.07485), "Shake-Even-Image":
    shake_even, with an α per block and image. width: of the first stage, 32, 96 or 112 as published."""

    def __init__(self, num_classes: int, width: int, depth: int = 26):
        super().__init__()
        self.stem, channels = nn.Sequential(conv(3, 16, 3), nn.BatchNorm2d(16)), 16
        self.blocks = nn.Sequential()
        for stage in range(3):
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(ShakeShakeBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.blocks(self.stem(images * 2 - 1)), inplace=True).mean((2, 3)))


class ShakeDrop(nn.Module):
    """ShakeDrop (Yamada et al. 2018, arXiv 1802.02375): scales a branch differently forward and backward.

    In training by b + α - bα, its gradient by b + β - bβ; else by the expectation of the former, P(b = 1) = 1
    - death_rate. b is one per layer and batch, as in stochastic depth; α ~ U(-1, 1) and β ~ U(0, 1) are one
    per layer and image.
    """

    def __init__(self, death_rate: float):
        super().__init__()
        self.death_rate = death_rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * (1 - self.death_rate)
        b = torch.rand(1, 1, 1, 1, device=x.device) >= self.death_rate
        alpha, beta = torch.rand(2, len(x), 1, 1, 1, device=x.device)
        ahead, back = (torch.where(b, 1.0, factor).to(x.dtype) for factor in (2 * alpha - 1, beta))
        return back * x + ((ahead - back) * x).detach()


class PyramidBottleneck(nn.Module):
    """BN-Conv1×1-BN-ReLU-Conv3×3-BN-ReLU-Conv1×1-BN and ShakeDrop beside a shortcut without weights: average
    pooling for stride 2, zeros for new channels."""

    def __init__(self, in_channels: int, channels: int, stride: int, death_rate: float):
        super().__init__()
        self.stride, layers = stride, [nn.BatchNorm2d(in_channels), conv(in_channels, channels, 1)]
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv(channels, channels, 3, stride)]
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv(channels, 4 * channels, 1)]
        self.residual = nn.Sequential(*layers, nn.BatchNorm2d(4 * channels), ShakeDrop(death_rate))

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        return out + F.pad(x, (0, 0, 0, 0, 0, out.shape[1] - x.shape[1]))


class PyramidNet(nn.Module):
    """PyramidNet-272 (α̃ = 200) for 32 px images (Han et al. 2017, arXiv 1610.02915) with ShakeDrop.

    Block l of L has ⌊width + widening·l/L⌋ channels (rounded down: the published 26.0 M parameters), four
    times as many at its end, and the death rate death_rate·l/L.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 272,
        widening: int = 200,
        width: int = 16,
        death_rate: float = 0.5,
    ):
        super().__init__()
        self.stem, self.blocks = nn.Sequential(conv(3, width, 3), nn.BatchNorm2d(width)), nn.Sequential()
        in_channels, stage_blocks = width, (depth - 2) // 9
        total = 3 * stage_blocks
        for block in range(1, total + 1):
            channels = width + widening * block // total
            stride = 2 if block in (stage_blocks + 1, 2 * stage_blocks + 1) else 1
            self.blocks.append(PyramidBottleneck(in_channels, channels, stride, death_rate * block / total))
            in_channels = 4 * channels
        self.bn, self.fc = nn.BatchNorm2d(in_channels), nn.Linear(in_channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.blocks(self.stem(images * 2 - 1))), inplace=True).mean((2, 3)))


def bottleneck_resnet(num_classes: int, layers: tuple[int, ...], width: int = 64) -> nn.Module:
    """torchvision's ResNet of bottlenecks, and its key names; width: of the first stage's bottlenecks."""
    from torchvision.models.resnet import Bottleneck, ResNet  # takes a second to import

    class SlimResNet(ResNet):
        def _make_layer(self, block: type, planes: int, *arguments, **settings) -> nn.Sequential:
            return super()._make_layer(block, planes * width // 64, *arguments, **settings)

    model = SlimResNet(Bottleneck, list(layers), num_classes)
    model.fc = model.fc if width == 64 else nn.Linear(model.inplanes, num_classes)
    return model


def deep_resnet(num_classes: int, layers: tuple[int, ...], width: int = 64) -> nn.Module:
    """ResNet-D (He et al. 2019, arXiv 1812.01187): three 3×3 convolutions instead of one 7×7, average pooling
    before the 1×1 convolution of shortcuts that downsample; those names are timm's."""
    model, stem = bottleneck_resnet(num_classes, layers, width), []
    for in_channels, out_channels, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
        stem += [conv(in_channels, out_channels, 3, stride), nn.BatchNorm2d(out_channels), nn.ReLU()]
    model.conv1 = nn.Sequential(*stem[:-2])  # the last BN and ReLU are the model's own
    initialise(model.conv1)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        shortcut, norm = stage[0].downsample
        pool = nn.Identity() if shortcut.stride == (1, 1) else nn.AvgPool2d(2, ceil_mode=True)
        shortcut.stride = (1, 1)
        stage[0].downsample = nn.Sequential(pool, shortcut, norm)
    return model


def initialise(model: nn.Module) -> None:
    """He initialisation by fan-out for convolutions, zero biases (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


# Models by name: constructor, its settings as published, and those for SMALL pictures on two CPU cores
WRN_SLIM = {"depth": 10, "widen_factor": 4, "width": 4}
MODELS = {
    "resnext": (ResNeXt, {}, {"width": 4}),
    "wideresnet": (WideResNet, {}, {"width": 4}),
    "wresnet40_2": (WideResNet, {}, {"width": 4}),
    "wresnet28_10": (WideResNet, {"depth": 28, "widen_factor": 10}, WRN_SLIM),
    "shake26_2x32d": (ShakeShake, {"width": 32}, {"width": 4, "depth": 14}),
    "shake26_2x96d": (ShakeShake, {"width": 96}, {"width": 8, "depth": 14}),
    "shake26_2x112d": (ShakeShake, {"width": 112}, {"width": 10, "depth": 14}),
    "pyramid272": (PyramidNet, {}, {"depth": 20, "widening": 16, "width": 4, "death_rate": 0.1}),
    "resnet50": (bottleneck_resnet, {"layers": (3, 4, 6, 3)}, {"layers": (2, 2, 2, 2), "width": 4}),
    "resnet50d": (deep_resnet, {"layers": (3, 4, 6, 3)}, {"layers": (2, 2, 2, 2), "width": 4}),
    "resnet200": (bottleneck_resnet, {"layers": (3, 24, 36, 3)}, {"layers": (2, 4, 6, 2), "width": 4}),
    "student": (WideResNet, {}, {"depth": 16, "width": 4}),  # of others a ResNet-18
}
RESNETS = ("resnet50", "resnet50d", "resnet200")  # are normalised as torchvision's
STATISTICS = {
    "0.5/0.5": ((0.5,) * 3, (0.5,) * 3),
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def build_model(name: str, num_classes: int, dataset: str) -> nn.Module:
    """An untrained classifier from images in [0, 1], (B, 3, H, W), to logits (B, num_classes).

    name: a key of MODELS, a classification model of torchvision, or FILE.py:function, from the number of
    classes to a module that normalises its input itself. dataset: whose statistics normalise the input; those
    of SMALL take slim widths. Raises InputError for an unknown name, and a model that does not fit.
    """
    own, statistics = ".py:" in name, STATISTICS.get(normalisation(dataset, name))
    if own or name not in MODELS or (name == "student" and dataset not in SMALL):
        torchvisions = "resnet18" if name == "student" else name
        side = 32 if dataset in NUM_CLASSES else FAKE_SHAPE[-1] if dataset == "fake" else 224
        try:
            make = load_function(name) if own else None
            model = make(num_classes) if own else torchvision_model(torchvisions, num_classes, *statistics)
            with torch.no_grad():
                given = tuple(model.eval()(torch.zeros(2, 3, side, side)).shape)
        except InputError:
            raise
        except Exception as error:  # whatever a model raises
            what = f"model '{name}' does not take {side} px images ({error!r})"
            raise InputError(f"{what}: choose another") from error
        if given != (2, num_classes):
            raise InputError(f"model '{name}' gives {given} for 2 images, not logits {(2, num_classes)}")
        return model.train()
    constructor, published, slim = MODELS[name]
    model = constructor(num_classes, **(slim if dataset in SMALL else published))
    return normalise_inside(model, *statistics) if name in RESNETS else model  # the others do it themselves


def normalisation(dataset: str, name: str) -> str:
    """How a classifier's inputs are normalised, for the protocol."""
    if ".py:" in name:
        return "the model itself"
    # torchvision's Inception and GoogLeNet were trained on inputs normalised by 0.5/0.5
    halves = ("googlenet", "inception_v3", *[model for model in MODELS if model not in RESNETS])
    pictures = dataset in ("imagenet", "folder", "chexpert") and name not in halves
    return "ImageNet's mean and std" if pictures else "0.5/0.5"


def torchvision_model(name: str, num_classes: int, mean: tuple, std: tuple) -> nn.Module:
    """A torchvision model with random weights, and torchvision's key names, that normalises its input."""
    from torchvision import models  # takes a second to import, so only when asked for

    if name not in models.list_models(module=models):
        raise InputError(f"unknown model '{name}': choose {', '.join(MODELS)}, or one of torchvision's")
    inception = name in ("googlenet", "inception_v3")
    more = {"aux_logits": False, "transform_input": False} if inception else {}
    with warnings_off():
        model = models.get_model(name, weights=None, num_classes=num_classes, **more)
    return normalise_inside(model, mean, std)


def normalise_inside(model: nn.Module, mean: tuple, std: tuple) -> nn.Module:
    """The model, which from now on normalises its input: by a hook, so that its keys stay as published."""
    statistics = torch.tensor([mean, std]).view(2, 3, 1, 1)
    model.register_buffer("normalisation", statistics, persistent=False)
    model.register_forward_pre_hook(normalise_input)
    return model


def normalise_input(model: nn.Module, inputs: tuple) -> tuple:
    mean, std = model.normalisation.to(inputs[0].dtype)
    return ((inputs[0] - mean) / std,)


def load_weights(model: nn.Module, file: str | Path) -> nn.Module:
    """Load a checkpoint into `model` and return it.

    Its state dict is found by what it is: a table of tensors that fits the model, at the top or within other
    tables, with anything (`module.`, `resnet.`, …) before every key; weights rather than their moving
    average. Only tensors and plain values are unpickled; .safetensors needs that package. Raises InputError
    for a missing, truncated or unsafe file, and for one that does not fit, naming the keys.
    """
    load_best_state(model, file)
    return model


def load_best_state(model: nn.Module, file: str | Path) -> str:
    """load_weights, which returns the file and, where several state dicts fit, which was taken."""
    content = load_tensors(file, "give the path of a checkpoint")
    found = {place: as_named_here(model, state) for place, state in state_dicts(content).items()}
    if not found:
        raise InputError(f"{file} holds no state dict: a table of tensors by name")
    wanted = model.state_dict().keys()
    fitting = {place: len(wanted & state.keys()) for place, state in found.items()}
    best, *others = [place for place in found if fitting[place] == max(fitting.values())]
    advice = "choose the --model and --dataset it was trained for"
    load_state(model, found[best], f"{file} does not fit this model", advice)
    return f"{file}" + f" ({best}, not {', '.join(others)})" * bool(others)


def state_dicts(content: object, place: str = "", depth: int = 3) -> dict[str, dict[str, Tensor]]:
    """The tables of plain tensors (dense, real, with values) in a checkpoint, by their place."""

    def plain(value: object) -> bool:
        usual = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        return usual and not (value.is_nested or value.is_quantized or value.is_complex())

    if not isinstance(content, dict) or not content or not depth:
        return {}
    if all(isinstance(key, str) and plain(value) for key, value in content.items()):
        return {place: content}
    tables = sorted(content.items(), key=lambda item: "ema" in str(item[0]))  # a moving average comes last
    parts = (state_dicts(value, f"{place}.{key}".strip("."), depth - 1) for key, value in tables)
    return {name: state for part in parts for name, state in part.items()}


def as_named_here(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what stands before every key, until keys are the model's. Of RobustBench's: with
    our name of shortcuts, and without the statistics `mu` and `sigma` where they are this model's."""
    wanted, state = model.state_dict().keys(), {**state}
    state.pop("n_averaged", None)  # of torch's AveragedModel
    while not wanted & state.keys() and all("." in key for key in state):
        if len({key.partition(".")[0] for key in state}) > 1:
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    state = {key.replace("convShortcut", "conv_shortcut"): value for key, value in state.items()}
    own = getattr(model, "normalisation", torch.full((2, 3), 0.5)).flatten(1).cpu()
    for key, value in zip(("mu", "sigma"), own):
        given = state.get(key, torch.zeros(0)).flatten().float()
        if given.shape == value.shape and torch.allclose(given, value):
            del state[key]
    return state


def load_state(model: nn.Module, state: dict[str, Tensor], complaint: str, advice: str) -> nn.Module:
    """Put a state dict into `model` and return it. InputError: complaint, keys that are wrong, advice."""
    wanted = model.state_dict()
    faults = {
        # Counters are not in every checkpoint (torch < 0.4.1 had none) and nothing depends on them here.
        "missing": [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in wanted],
        "misshaped": [
            f"{key} is {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
            for key in wanted.keys() & state.keys()
            if state[key].shape != wanted[key].shape
        ],
    }
    found = [f"{kind} {', '.join(keys[:3])}{' …' * (len(keys) > 3)}" for kind, keys in faults.items() if keys]
    if found:
        raise InputError(f"{complaint}: {'; '.join(found)}; {advice}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # numbers of a type that does not become the model's
        raise InputError(f"{complaint}: {error}; {advice}") from error
    return model


def load_classifier(
    model: nn.Module,
    name: str,
    dataset: str,
    weights: str | None,
    machine: "Machine",
    data_root: str,
    dry_run: bool,
) -> str:
    """Give `model` the --weights, else what comes for its name and the data set; returns where they are from.

    weights: a checkpoint, or a name of PUBLISHED_WEIGHTS. Without: shipped, or (SMALL) trained first and
    kept; cifar100: AugMix's; imagenet, folder: torchvision's. A dry run downloads and trains nothing.
    InputError where there are none.
    """
    if weights is None and dataset == "fake":
        return "untrained"
    if weights is None and dataset in ("imagenet", "folder"):
        return load_imagenet_weights(model, name, machine, dry_run)
    file = Path(weights or WEIGHTS / f"{dataset}-{name}.pt")
    if weights is None and dataset == "cifar100" and f"gretta-{name}" in PUBLISHED_WEIGHTS:
        weights = f"gretta-{name}"
    if weights in PUBLISHED_WEIGHTS:
        file = published_file(weights, machine, dry_run)
    elif weights is None and dataset in SMALL and ".py:" not in name:
        file = kept_classifier(name, dataset, machine, data_root, dry_run)
    elif weights is None and not file.is_file():
        how = f"or train some with python common.py --train-weights {name} --dataset {dataset}"
        raise InputError(f"no weights of {name} for {dataset} are known: give some with --weights, {how}")
    if dry_run and not weights and not (file and file.is_file()) or file is None:
        return "untrained: a dry run neither downloads nor trains a classifier first"
    return load_best_state(model, file)


def kept_classifier(name: str, dataset: str, machine: "Machine", data_root: str, dry_run: bool) -> Path:
    """weights/<dataset>-<name>.pt; where it is missing, or was made for other data of that name, one that is
    trained first, alike on every rank, and kept."""
    file, alone = WEIGHTS / f"{dataset}-{name}.pt", machine._replace(rank=0, world_size=1)
    made_for = load_tensors(file, "remove it").get("data", "any") if file.is_file() else None
    try:
        train, val = (Images(*load_split(dataset, part, data_root, False), alone) for part in SPLITS[:2])
    except InputError:
        if made_for:  # to predict, no data are needed
            return file
        raise
    if made_for not in ("any", None, fingerprint(train)):
        file = file.with_stem(f"{file.stem}-{fingerprint(train)}")
    if file.is_file() or dry_run:
        return file
    if machine.is_main:
        print(f"{file} is missing: training {name} on the training images of {dataset}", flush=True)
    torch.manual_seed(0)
    trained = build_model(name, NUM_CLASSES[dataset], dataset)
    trained.to(machine.device, memory_format=machine.weight_layout)
    train_classifier(trained, dataset, train, val, RECIPES[dataset])
    content = {"state_dict": trained.state_dict(), "data": fingerprint(train)}
    machine.on_main(lambda: save_atomically(content, file))
    return file


def fingerprint(data: Images) -> str:
    """Ties a classifier that is kept to the data that it was trained on."""
    pixels = data.images[:: max(1, len(data) // 500)].cpu().numpy().tobytes()
    return hashlib.sha256(pixels + data.labels.cpu().numpy().tobytes()).hexdigest()[:8]


def load_imagenet_weights(model: nn.Module, name: str, machine: "Machine", dry_run: bool) -> str:
    """torchvision's IMAGENET1K_V1 weights; a last layer for another number of classes stays untrained."""
    from torchvision import models

    try:
        weights = models.get_model_weights(name).IMAGENET1K_V1
    except (ValueError, AttributeError) as error:
        raise InputError(f"torchvision has no weights of '{name}': give some with --weights") from error
    file, wanted = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name, model.state_dict()
    if not file.is_file() and dry_run:
        return "untrained: a dry run downloads nothing"
    machine.on_main(lambda: download(weights.url, file, checksum=file.stem.split("-")[-1]))
    found = state_dicts(load_tensors(file, "remove it, so that it is downloaded again")).get("", {})
    head = [key for key in wanted if key in found and found[key].shape != wanted[key].shape]
    state = {key: found[key] for key in found if key in wanted} | {key: wanted[key] for key in head}
    load_state(model, state, f"{file} does not fit {name}", "remove it")
    return f"{file}" + f", but for {', '.join(head)} (another number of classes)" * bool(head)


# Of a plain training: epochs, images per step over all ranks, largest learning rate, weight decay
RECIPES = {"digits": (30, 50, 0.1, 5e-4), "mnist": (5, 100, 0.1, 5e-4), "fashion_mnist": (30, 100, 0.1, 5e-4)}
RECIPES |= dict.fromkeys(("cifar10", "cifar100"), (200, 128, 0.1, 5e-4)) | {"folder": (90, 256, 0.1, 1e-4)}


def train_classifier(
    model: nn.Module,
    dataset: str,
    train: Data,
    val: Data,
    recipe: tuple,
    run: "Run | None" = None,
    seed: int = 0,
) -> None:
    """Train plainly: SGD with Nesterov momentum 0.9, one cycle of the learning rate (up for 30 % of the
    steps, then a cosine to zero), label smoothing 0.1, light augmentation. recipe: a row of RECIPES. run:
    where it is logged, and resumed."""
    from tqdm import tqdm

    machine, (epochs, batch_size, top, decay) = train.machine, recipe
    optimizer = torch.optim.SGD(model.parameters(), top, 0.9, weight_decay=decay, nesterov=True, fused=True)
    scaler, totals, steps_per_epoch = machine.scaler(), Totals(2, machine), len(train) // batch_size
    if run:
        run.track({}, classifier=model, optimizer=optimizer, scaler=scaler, totals=totals)
    trained, total = distribute(model, machine), epochs * steps_per_epoch
    batches = train.batches(batch_size, seed, run.step if run else 0, crop=True)
    alone = tqdm(range(total), desc="train", unit="step", disable=bool(run) or not machine.is_main)
    steps = run.steps(batches, total, steps_per_epoch) if run else zip(alone, batches)
    for step, (images, labels, _) in steps:
        moves = machine.uniform((batch_size, 5), machine.generator(seed, step))
        images = light_augmentation(to_float(images), dataset, moves)
        with machine.autocast():
            logits = trained.train()(machine.layout(images)).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1) / batch_size
        done = (step + 1) / total
        lr = top * (done / 0.3 if done < 0.3 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.3) / 0.7))
        descend(loss * machine.world_size, optimizer, scaler, lr)
        totals.add(loss, (logits.argmax(1) == labels).sum())
        if run and (step + 1) % steps_per_epoch == 0:
            loss, right = totals.read(step + 1)
            figures = {"loss": loss / steps_per_epoch, "accuracy": 100 * right / steps_per_epoch / batch_size}
            totals.own.zero_()
            figures["val_accuracy"] = evaluate([model], val)[0]["top1_accuracy"]
            run.log(step + 1, epoch=(step + 1) // steps_per_epoch, **figures)


# ---------- Black boxes: programs of which only the answers are known ----------


class Program(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to logits (B, num_classes), by a program, asked in float32 without gradients.

    file: FILE.py:function, from a NumPy array to one, ONNX, torch.export (.pt2) or TorchScript. Probabilities
    are recognised, and their logarithm taken; a batch size that the file fixes is kept to. Raises InputError
    where it cannot be loaded, and for a query that fails.
    """

    def __init__(self, file: str, num_classes: int, size: int, device: torch.device):
        super().__init__()
        self.file, self.num_classes, self.batch_size, self.probabilities = file, num_classes, None, False
        place, colon, _ = file.rpartition(":")
        if not Path(place if colon else file).is_file():
            raise InputError(f"--blackbox {file}: no such file")
        kinds = {".onnx": self.load_onnx, ".pt2": self.load_exported}
        load = self.load_python if colon else kinds.get(Path(file).suffix, self.load_torchscript)
        try:
            with warnings_off():
                self.query = load(file, device)
        except InputError as error:
            raise InputError(f"--blackbox {error}") from error
        except Exception as error:  # each library has errors of its own
            advice = "a checkpoint goes to --weights"
            reason = f"cannot be loaded: {short_reason(error)}"
            raise InputError(f"--blackbox {file} {reason}; {advice}") from error
        for count in (2, 3):  # two batch sizes: a program may be made for one
            draws = torch.Generator().manual_seed(0)
            answers = self(torch.rand(count, 3, size, size, generator=draws))
        self.probabilities = bool((answers >= 0).all() and (answers.sum(1) - 1).abs().max() < 1e-3)
        self.origin = file + ", which answers probabilities: their logarithm is taken" * self.probabilities

    def load_python(self, place: str, _: torch.device) -> Callable:
        return load_function(place)

    def load_onnx(self, file: str, device: torch.device) -> Callable:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # its errors are raised too
        cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and device.type == "cuda"
        providers = [("CUDAExecutionProvider", {"device_id": device.index})] * cuda + ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(file, options, providers=providers)
        given = session.get_inputs()[0]
        self.batch_size = given.shape[0] if isinstance(given.shape[0], int) else None
        last, integer = given.shape[-1] == 3 != given.shape[1], given.type == "tensor(uint8)"

        def query(images: np.ndarray) -> np.ndarray:
            images = (images * 255).round().astype(np.uint8) if integer else images
            images = np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if last else images
            answers, wanted = session.run(None, {given.name: images}), (len(images), self.num_classes)
            return next((answer for answer in answers if answer.shape == wanted), answers[0])

        return query

    def load_exported(self, file: str, device: torch.device) -> Callable:
        from torch.export.passes import move_to_device_pass

        logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it logs what it then raises
        program = move_to_device_pass(torch.export.load(file), str(device))
        name = program.graph_signature.user_inputs[0]
        (count,) = (node.meta["val"].shape[0] for node in program.graph.nodes if node.name == name)
        self.batch_size = count if isinstance(count, int) else None
        module = program.module()
        return lambda images: module(torch.from_numpy(images).to(device)).cpu().numpy()

    def load_torchscript(self, file: str, device: torch.device) -> Callable:
        module = torch.jit.load(file, map_location=device).eval()
        return lambda images: module(torch.from_numpy(images).to(device)).cpu().numpy()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        given, found = images.float().contiguous().cpu().numpy(), []
        count = self.batch_size or len(given)
        for start in range(0, len(given), count):
            part = given[start : start + count]
            part, wanted = part[np.arange(count) % len(part)], (count, self.num_classes)  # filled up
            try:
                with torch.autocast(images.device.type, enabled=False):
                    answers = np.asarray(self.query(part), dtype=np.float32)
                if answers.shape != wanted or not np.isfinite(answers).all():
                    nans = ", not all finite" * (not np.isfinite(answers).all())
                    raise ValueError(f"it gives {answers.shape}{nans}, not logits {wanted}")
            except Exception as error:  # whatever it raises, time-outs too
                asked = f"asked for {count} images ({', '.join(map(str, part.shape[1:]))})"
                raise InputError(f"--blackbox {self.file}, {asked}: {short_reason(error)}") from error
            found.append(torch.from_numpy(answers[: len(given) - start]))
        logits = torch.cat(found).to(images.device)
        return logits.clamp_min(1e-12).log() if self.probabilities else logits


def load_function(place: str) -> Callable:
    """The function that FILE.py:function names; the file is run. Raises InputError."""
    file, _, name = place.rpartition(":")
    try:
        sys.path.append(str(Path(file).resolve().parent))  # for what it imports
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:  # whatever the file raises
        raise InputError(f"{place} is not FILE.py:function ({error!r})") from error


def short_reason(error: Exception) -> str:
    """The line of a library's error that says why: the first, but the last of TorchScript's traces."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1 if "TorchScript interpreter" in lines[0] else 0]


# ---------- Machine: device, mixed precision, processes; randomness is a function of (seed, step) ----------


def mix(*parts: int | str) -> int:
    """A seed of 63 bits (SHA-256): neighbouring numbers give unrelated streams."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Machine(NamedTuple):
    """Where a script runs; one process on its own is rank 0 of world size 1."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    amp_dtype: torch.dtype | None = None  # None: float32
    started: float = 0.0  # time.perf_counter()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def generator(self, *parts: int | str) -> torch.Generator:
        """Seeded by (seed, step) or the like, alike on every rank: draws are made for the global batch."""
        return torch.Generator(self.device).manual_seed(mix(*parts))

    def uniform(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """This rank's rows of numbers drawn for the global batch, uniform in −1..1."""
        return self.own_rows(torch.rand(*shape, generator=generator, device=self.device) * 2 - 1)

    def normal(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """This rank's rows of standard normal numbers drawn for the global batch."""
        return self.own_rows(torch.randn(*shape, generator=generator, device=self.device))

    def chunk(self, height: int, width: int) -> int:
        """Images of this size in one forward pass without gradient: on a CPU what stays in its cache."""
        most, least = (64, 8) if self.device.type == "cpu" else (4096, 1)
        return max(least, most * 32 * 32 // max(32 * 32, height * width))

    def layout(self, images: Tensor) -> Tensor:
        """channels_last, which is faster, but for odd batches on a CPU, where oneDNN's backward pass through
        narrow convolutions writes outside its memory (torch 2.15; nor may weights be)."""
        odd = self.device.type == "cpu" and len(images) % 2 == 1
        return images.contiguous(memory_format=torch.contiguous_format if odd else torch.channels_last)

    @property
    def weight_layout(self) -> torch.memory_format:
        return torch.contiguous_format if self.device.type == "cpu" else torch.channels_last

    def workers(self, wanted: int) -> int:
        """Of the wanted processes that decode pictures, as many as this rank's share of the cores allows."""
        return min(wanted, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)))

    def autocast(self) -> torch.autocast:
        dtype = self.amp_dtype or torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.amp_dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for float16; passes everything through otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    def own_rows(self, batch: Tensor) -> Tensor:
        """This rank's part of what has the global batch as first dimension."""
        size = len(batch)
        return batch[self.rank * size // self.world_size : (self.rank + 1) * size // self.world_size]

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank; in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_rows(self, rows: Tensor) -> Tensor:
        """The whole tensor whose parts `own_rows` gave out."""
        if self.world_size == 1:
            return rows
        parts = [None] * self.world_size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def on_main(self, work: Callable[[], object]) -> object:
        """What rank 0 returns, or the InputError it raises, on every rank."""
        answer = [None, None]
        if self.is_main:
            try:
                answer[0] = work()
            except InputError as error:
                answer[1] = str(error)
        if self.world_size > 1:
            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise InputError(answer[1])
        return answer[0]


def start_machine(device: str = "auto", amp: bool = False, seed: int = 0) -> Machine:
    """Read torchrun's environment, choose the device ("auto": a GPU where there is one), join the other
    processes, seed torch. amp: bfloat16 where the device has it, else float16."""
    started, cuda = time.perf_counter(), device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise InputError("--device cuda: no CUDA device is available: use --device cpu, or see nvidia-smi")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world_size, local_rank = (int(os.environ.get(name, 0)) for name in names)
    chosen, amp_dtype = torch.device("cpu"), torch.bfloat16 if amp else None
    if cuda:
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if amp and not torch.cuda.is_bf16_supported(including_emulation=False):
            amp_dtype = torch.float16
    if world_size > 1 and not dist.is_initialized():
        # torchrun's store outlives a restart: an attempt must not read the addresses of the one before
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size)
    torch.manual_seed(seed)  # alike on every rank, for the weights that models start with
    return Machine(chosen, rank, max(1, world_size), amp_dtype, started)


def descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float | None = None
) -> None:
    """One step of the optimiser, at the learning rate `lr` where it is given, down the gradient of a loss."""
    for group in optimizer.param_groups if lr is not None else ():
        group["lr"] = lr
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def distribute(model: nn.Module, machine: Machine) -> nn.Module:
    """The model to train with: DistributedDataParallel, with batch-norm statistics of the global batch, on
    several ranks. DDP averages gradients over ranks, so a rank's loss is its rows' sum × world size / global
    batch size."""
    if machine.world_size == 1:
        return model
    if machine.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():  # torch's SyncBatchNorm takes no CPU tensors
            if type(module) is nn.BatchNorm2d:
                module.__class__ = GlobalBatchNorm2d
    with warnings_off():  # torch 2.14 renames the argument
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the global batch of all ranks, of any backend, whose parts may differ."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce  # differentiable

        dtype, x = x.dtype, x.float()  # sums and running statistics are float32 under autocast too
        count = x.numel() / x.shape[1]
        totals = all_reduce(torch.cat([x.sum((0, 2, 3)), x.new_tensor([count])]))
        mean = totals[:-1] / totals[-1]
        centred = x - mean[None, :, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / totals[-1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * totals[-1] / (totals[-1] - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[None, :, None, None] + self.bias[None, :, None, None]).to(dtype)


# ---------- Command line ----------

# What an args.json says of one invocation; what may be another when a run is used again; what only a run that
# goes on heeds. Everything else is what the run is made of.
INVOCATION = ("git_commit", "versions", "device_name", "world_size", "command")
INVOCATION += ("run_dir", "resume", "load_conf", "evaluate", "predict", "export")
CHANGEABLE = ("device", "amp", "compile", "workers", "data_root", "datadir_clean", "datadir_sin")
CHANGEABLE += ("corruptions_path", "checkpoint_every", "checkpoint_minutes", "log_every")
CHANGEABLE += ("test_batch_size", "local_rank", *INVOCATION)
RATES = ("lr", "weight_decay", "controller_lr", "generator_lr")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in the help, and two spellings: --num-samples,
    --num_samples. With the names of `datasets`: the flags that all scripts share, in the groups `run` and
    `data`, to which a script adds its own."""

    def __init__(self, datasets: Iterable[str] = (), **keywords):
        formatter = functools.partial(HelpFormatter, max_help_position=34, width=110)
        keywords = {"usage": "%(prog)s [flags]", "allow_abbrev": False} | keywords
        super().__init__(formatter_class=formatter, **keywords)
        if not datasets:
            return
        # fmt: off
        self.run, self.data = self.add_argument_group("run"), self.add_argument_group("data")
        add = self.run.add_argument
        add("--seed", type=number(int, 0), default=0, help="of everything random in the method")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
        add("--amp", action="store_true", help="mixed precision: bfloat16, or float16 on GPUs without it")
        add("--compile", action="store_true", help="torch.compile the networks")
        add("--run-dir", "--logdir", metavar="DIR", help="where the run is written (default: runs/…)")
        add("--resume", action="store_true", help="continue what --run-dir holds")
        add("--checkpoint-every", type=number(int, 1), metavar="EPOCHS", help="epochs between checkpoints")
        add("--checkpoint-minutes", type=number(float, 0, open_low=True), default=10.0, metavar="MIN",
            help="and minutes, within an epoch")
        add("--log-every", type=number(int, 1), default=10, metavar="STEPS",
            help="steps between lines of log.jsonl")
        add("--load-conf", metavar="FILE", help="defaults: an earlier run's args.json, or any JSON of flags")
        add("-e", "--evaluate", nargs="?", const=True, default=False, type=boolean,
            help="only evaluate: the run of --run-dir, or the weights that are given")
        add("--dry-run", action="store_true", help="one small step of every phase, same outputs")
        add("--local-rank", type=int, help=argparse.SUPPRESS)  # torch.distributed.launch
        add = self.data.add_argument
        add("--dataset", choices=tuple(datasets), type=dataset_name, default="digits",
            help="digits comes with the repository")
        add("--data-root", default="data", metavar="DIR",
            help="where the data sets lie; of --dataset folder your train/ and val/ or test/")
        add("--corruptions-path", "--imagenetc-path", metavar="DIR",
            help="the corrupted test set (default: CIFAR-10-C, imagenet-c, … in --data-root)")
        add("--generate-corruptions", action="store_true",
            help="make the 15 corruptions where the published ones are not on disk")
        add("-j", "--workers", type=number(int, 0),
            help="processes that decode pictures, at most one per core")
        add("--eval-split", "--target-split", choices=("val", "test"), default="test",
            help="what is evaluated; val: to tune on")
        # fmt: on

    def error(self, message: str):
        sys.stderr.write(f"{self.prog}: error: {one_line(message)} (see --help)\n")
        sys.exit(2)

    def parse(self, argv: list[str] | None, published: Callable, translate: Callable = lambda conf, _: conf):
        """A flag left out takes the value of the run that is used again, then that of the --load-conf file
        (`translate` turns a configuration into flags), then that of `published(args)`, then its default.
        What contradicts the run is refused here."""
        argv = [self.hyphenate(word) for word in (sys.argv[1:] if argv is None else argv)]
        given, earlier, words = self.parse_args(argv), {}, []
        if given.load_conf:
            words = self.words(given.load_conf, lambda values: translate(values, given))
        again = given.resume or given.evaluate or getattr(given, "predict", None)
        file = Path(given.run_dir or "") / "args.json"
        if again and given.run_dir and file.is_file():
            of_run = self.words(file)
            words, earlier = words + of_run, vars(self.parse_args(of_run))

        args = self.parse_args(words + argv)
        for name, value in published(args).items():
            if getattr(args, name, "") is None:
                setattr(args, name, value)
        for name, before in earlier.items() if has_checkpoint(given.run_dir) else ():
            if before != getattr(args, name) and name not in CHANGEABLE + RATES * args.resume:
                what = f"{given.run_dir} is of a run with --{name.replace('_', '-')} {before}"
                self.error(f"{what}: leave it so, or choose another --run-dir")
        return args

    @staticmethod
    def hyphenate(word: str) -> str:
        name, equals, value = word.partition("=")
        return name.replace("_", "-") + equals + value if word.startswith("--") else word

    def words(self, file: str | Path, translate: Callable = dict) -> list[str]:
        """The settings in a JSON file as words of a command line, which argparse checks as such."""
        try:
            values = json.loads(Path(file).read_text())
            if not isinstance(values, dict):
                raise ValueError("it holds no JSON object")
            values = translate(values)
            values = {f"--{key.replace('_', '-')}": values[key] for key in values if key not in INVOCATION}
        except (OSError, ValueError, AttributeError, TypeError) as error:  # of another form than expected
            self.error(f"{file}: {error}")
        given = {key: value for key, value in values.items() if value is not None and value is not False}
        words = [key if value is True else f"{key}={value}" for key, value in given.items()]
        offs = [key.replace("--", "--no-", 1) for key, value in values.items() if value is False]
        return words + [word for word in offs if word in self._option_string_actions]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default not in (None, argparse.SUPPRESS, False, []) and "default" not in text
        return text + " (default: %(default)s)" * shown


def number(kind: type, low: float, high=math.inf, open_low=False, open_high=False) -> Callable:
    """An argparse type: an int or a float within bounds, finite."""

    def parse(text: str):
        value = kind(text)
        outside = value < low or value > high or (open_low and value == low) or (open_high and value == high)
        if outside or not math.isfinite(value) or (kind is int and value >= 2**63):  # torch takes no more
            bounds = f"{'>' if open_low else '≥'} {low:g}"
            bounds += f" and {'<' if open_high else '≤'} {high:g}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    parse.__name__ = kind.__name__
    return parse


def boolean(text: str) -> bool:
    """An argparse type, for flags that older commands give a value (-e True)."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text}: true or false")
    return text.lower() in ("true", "1")


# ---------- Run: a directory, its log and checkpoints, signals, the loop's counting ----------


class Interrupted(BaseException):
    """SIGTERM (Slurm, torchrun) or SIGINT (Ctrl-C) ended the run: exit code 143 or 130."""


class Stop:
    """What signal handlers know: must a step be finished first, does a signal wait, the run's directory."""

    deferred, signum, directory = False, 0, None


def on_signal(signum: int, _frame: object) -> None:
    if not Stop.deferred or Stop.signum:  # nothing to finish, or asked a second time
        raise Interrupted(signum)
    Stop.signum = signum


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; bad input ends in one line and exit code 2, a signal in a line that says how to go on."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_signal)
    script = Path(sys.argv[0]).name
    try:
        main()
        if dist.is_initialized():  # ranks leave together: one that left may abort one that works
            with contextlib.suppress(RuntimeError):
                dist.barrier()
            leave(0)
    except (InputError, OSError) as error:  # an OSError names the file and what the system said
        close_bars()
        sys.stderr.write(f"{script}: error: {one_line(str(error))}\n")
        leave(2) if dist.is_initialized() else sys.exit(2)
    except Interrupted as stopped:
        close_bars()
        signum = stopped.args[0]
        again = f"; continue with --resume --run-dir {Stop.directory}" if Stop.directory else ""
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{script}: stopped by {signal.Signals(signum).name}{again}\n")
        leave(128 + signum)
    finally:  # with a traceback
        if dist.is_initialized():
            dist.destroy_process_group()


def leave(code: int) -> None:
    """End at once: others may be busy, and a thread of gloo's may abort Python's own way out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def close_bars() -> None:
    """Progress bars that are still open would be drawn over the last line."""
    for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())) if "tqdm" in sys.modules else ():
        bar.close()


class Totals:
    """Sums over an epoch, (n,) float64, of this rank's rows. A checkpoint holds those of every rank."""

    def __init__(self, size: int, machine: Machine):
        self.own, self.machine = torch.zeros(size, dtype=torch.float64, device=machine.device), machine

    def add(self, *values: Tensor) -> None:
        self.own += torch.cat([value.detach().reshape(-1).to(self.own) for value in values])

    def read(self, step: int) -> list[float]:
        """The sums over all ranks after a step; InputError where one is not finite."""
        values = self.machine.all_sum(self.own.clone()).tolist()
        if not all(map(math.isfinite, values)):
            good = f"the last checkpoint in {Stop.directory} is good"
            raise InputError(f"the loss is not finite at step {step}: lower --lr; {good}")
        return values

    def state_dict(self) -> dict:
        return {"rows": self.machine.all_rows(self.own[None])}

    def load_state_dict(self, state: dict) -> None:
        rows, machine = state["rows"], self.machine
        same = len(rows) == machine.world_size  # else the first rank gets them all
        self.own.copy_(rows[machine.rank] if same else rows.sum(0) * machine.is_main)


class Run:
    """A run's directory (args.json, log.jsonl, TensorBoard events, checkpoints, a copy of the script) and the
    counting of its loop. Only rank 0 writes; nothing is written before `track` has found that all fits.

    step: optimiser steps done. using: nothing is trained. in_place: a run that is there is used. finished.
    """

    def __init__(self, args: argparse.Namespace, machine: Machine, method: str):
        self.args, self.machine, self.method, self.script = args, machine, method, Path(sys.argv[0]).stem
        self.using = bool(args.evaluate or getattr(args, "predict", None))
        holds = has_checkpoint(args.run_dir) and (args.resume or self.using)
        self.directory = Path(args.run_dir) if holds else machine.on_main(self.new_directory)
        self.saved = read_checkpoint(self.directory) if holds else None
        self.in_place, self.step, self.finished, self.log_file = bool(holds and self.using), 0, False, None

    def new_directory(self) -> Path:
        args = self.args
        model = Path(args.model).name.replace(".py:", "-")
        name = f"{args.dataset}-{model}-{self.method}-s{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        directory = Path(args.run_dir or Path("runs") / self.script / name)
        while not args.run_dir and directory.exists():  # begun in the same second
            directory = directory.with_name(directory.name + "-2")
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is not a directory: choose another with --run-dir")
        if directory.is_dir() and any(directory.iterdir()) and not args.resume:
            raise InputError(f"{directory} is not empty: continue it with --resume, or choose another")
        return directory

    def track(self, progress: dict, **parts: object) -> dict:
        """All that a checkpoint holds: `progress`, a dict of plain values, which is returned, and whatever
        has state_dict and load_state_dict; filled from the run's checkpoint. Rates stay as given now."""
        self.parts, self.progress = parts, progress
        file, advice = self.directory / "checkpoint.pt", "use the settings of the run"
        try:
            if self.saved is not None:
                self.step, total = self.saved["step"], self.saved["total_steps"]
                progress.update({key: self.saved["progress"][key] for key in progress})
                ended = self.step >= total and (self.directory / "results.json").is_file()
                self.finished = ended and not self.using
            for name, part in parts.items() if self.saved is not None else ():
                if isinstance(part, nn.Module):
                    load_state(part, self.saved[name], f"{name} in {file} does not fit", advice)
                elif isinstance(part, torch.optim.Optimizer):
                    given = [dict(group, params=None) for group in part.param_groups]
                    part.load_state_dict(self.saved[name])
                    for group, own in zip(part.param_groups, given):
                        group.update(own, params=group["params"])
                elif self.saved[name]:  # a scaler of a run without mixed precision has none
                    part.load_state_dict(self.saved[name])
        except (RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{file} does not continue here ({error!r}): {advice}") from error
        Stop.directory = self.directory
        if self.machine.is_main and not self.finished:
            self.open()
        return progress

    def open(self) -> None:
        arguments, log = vars(self.args) | {"run_dir": str(self.directory)}, self.directory / "log.jsonl"
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.in_place:
            write_json(self.directory / "args.json", arguments | environment(self.machine))
            if Path(sys.argv[0]).suffix == ".py":
                shutil.copy(sys.argv[0], self.directory)
        only_predicts = self.using and not self.args.evaluate
        kept = []  # of the log of a run that goes on: nothing after this step, nor of the test
        for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line of a run that was killed
                if json.loads(line)["step"] <= self.step and ('"test_' not in line or only_predicts):
                    kept.append(line + "\n")
        log.write_text("".join(kept))
        from torch.utils.tensorboard import SummaryWriter

        self.log_file = open(log, "a")
        self.writer = SummaryWriter(self.directory, purge_step=self.step + 1 if self.saved else None)
        print(" ".join(f"{key}={value}" for key, value in arguments.items()))
        if self.args.resume and self.saved is None:
            print(f"{self.directory} holds no checkpoint: starting afresh")

    def say(self, *lines: str) -> None:
        """Lines about the run, before it starts."""
        if self.log_file is not None:
            print("\n".join(lines), flush=True)

    def steps(self, batches: Iterable, total: int, steps_per_epoch: int) -> Iterator[tuple[int, tuple]]:
        """(step, batch) from where the run is to `total`; none where nothing is trained.

        When the loop's body is through, the step counts: a checkpoint is written when one is due, or a
        signal asked the run to stop. What models draw themselves is seeded by (seed, step, rank).
        """
        from tqdm import tqdm

        args, machine, batches = self.args, self.machine, iter(batches)
        if self.using:
            return
        self.bar = tqdm(total=total, initial=self.step, unit="step", disable=not machine.is_main)
        self.bar.set_description(f"train {self.method}")
        saved_at, Stop.deferred = time.monotonic(), True
        try:
            while self.step < total:
                batch = next(batches)
                torch.manual_seed(mix("model", args.seed, self.step, machine.rank))
                yield self.step, batch
                self.step += 1
                self.bar.update()
                regular = self.step == total or self.step % (args.checkpoint_every * steps_per_epoch) == 0
                signum, late = Stop.signum, time.monotonic() - saved_at > 60 * args.checkpoint_minutes
                if machine.world_size > 1:  # every rank must hear the same, and asks now and then
                    asked = torch.tensor([signum, late], dtype=torch.int, device=machine.device)
                    if regular or self.step % args.log_every == 0:
                        dist.all_reduce(asked, dist.ReduceOp.MAX)
                        signum, late = asked.tolist()
                    else:
                        signum, late = 0, False
                if regular or signum or late:
                    self.save(total)
                    saved_at = time.monotonic()
                if signum:
                    machine.barrier()  # until rank 0 has written
                    raise Interrupted(signum)
            if total == 0 and self.saved is None:
                self.save(total)
        finally:
            Stop.deferred = False
            self.bar.close()

    def save(self, total_steps: int) -> None:
        """checkpoint.pt, the one before it kept; InputError where a model is not finite."""
        state = {name: part.state_dict() for name, part in self.parts.items()}  # Totals gather
        if not self.machine.is_main:
            return
        for name, part in self.parts.items():
            values = state[name].values() if isinstance(part, nn.Module) else ()
            if not all(value.isfinite().all() for value in values):
                what = f"the {name} is not finite at step {self.step}: lower --lr"
                raise InputError(f"{what}; the last checkpoint in {self.directory} is good")
        state |= {"step": self.step, "total_steps": total_steps, "progress": self.progress}
        save_atomically(state, self.directory / "checkpoint.pt", keep_previous=True)

    def log(self, step: int, **values: object) -> None:
        """One JSON line, and the numbers among it to TensorBoard and the progress bar."""
        if self.log_file is None:
            return
        self.log_file.write(json.dumps({"step": step, **values}) + "\n")
        self.log_file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        if Stop.deferred:
            kept = (name for name in numbers if name not in ("lr", "queries", "epoch"))
            shown = ", ".join(f"{name} {numbers[name]:.3g}" for name in kept)
            self.bar.set_postfix_str(shown, refresh=False)

    def finish(self, results: dict) -> dict:
        """Write results.json with the keys that every script has, and return it. A run that is evaluated
        again keeps its times, and the number of images that it was trained on, which may be gone."""
        args, machine, file = self.args, self.machine, self.directory / "results.json"
        first = {"script": self.script, "dataset": args.dataset, "model": args.model, "method": self.method}
        last = {"wall_seconds": round(time.perf_counter() - machine.started, 2)}
        last |= {"peak_memory_mb": round(peak_memory_mb(machine)), "device": device_name(machine)}
        results = first | {"seed": args.seed} | results | last
        if self.in_place and file.is_file():
            earlier = read_results(self.directory)
            results |= {key: earlier[key] for key in (*last, "n_train") if key in earlier}
        if machine.is_main:
            write_json(file, results)
            self.writer.close()
            self.log_file.close()
        return results


def environment(machine: Machine) -> dict:
    """What made a number: git commit, library versions, device, processes, command."""
    import subprocess
    from importlib.metadata import version

    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
        commit = asked.stdout.strip() or None
    versions = {"python": sys.version.split()[0]}
    versions |= {package: version(package) for package in ("torch", "torchvision", "kornia", "numpy")}
    values = (commit, versions, device_name(machine), machine.world_size, " ".join(sys.argv))
    return dict(zip(INVOCATION, values))


def device_name(machine: Machine) -> str:
    cuda = machine.device.type == "cuda"
    return torch.cuda.get_device_name(machine.device) if cuda else f"cpu ({torch.get_num_threads()} threads)"


def peak_memory_mb(machine: Machine) -> float:
    """Peak memory of this process in MiB: of the GPU where one is used, else resident memory."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(machine.device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def write_json(file: Path, values: dict) -> None:
    write_atomically(file, json.dumps(values, indent=2).encode() + b"\n")


def save_atomically(content: object, file: Path, keep_previous: bool = False) -> None:
    """torch.save, through memory: on a full disk it would raise an error that does not say so."""
    stream = io.BytesIO()
    torch.save(content, stream)
    write_atomically(file, stream.getbuffer(), keep_previous)


def write_atomically(file: Path, content: bytes | memoryview, keep_previous: bool = False) -> None:
    """Readers see the old file or the new one; keep_previous: the old one stays as <name>.previous.<suffix>.
    Raises InputError where it cannot be written."""
    beside = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if keep_previous and file.is_file():
            os.replace(file, previous_of(file))
        os.replace(beside, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise InputError(f"cannot write {file}: {error}; what it held before is still there") from error


def previous_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}.previous{file.suffix}")


def has_checkpoint(directory: str | Path | None) -> bool:
    file = Path(directory or "") / "checkpoint.pt"
    return bool(directory) and (file.is_file() or previous_of(file).is_file())


def read_checkpoint(directory: Path) -> dict:
    """A run's checkpoint; where the newest is damaged, the one before it, with a warning."""
    file, advice = directory / "checkpoint.pt", "remove the directory to start afresh"
    try:
        return load_tensors(file, advice)
    except InputError as error:
        if not previous_of(file).is_file():
            raise
        state = load_tensors(previous_of(file), advice)
        sys.stderr.write(f"warning: {error}; going on from {previous_of(file)}\n")
        return state


def load_tensors(file: str | Path, advice: str) -> object:
    """Unpickle tensors and plain values only. Raises InputError for a missing, truncated or unsafe file."""
    try:
        with warnings_off(), torch.serialization.safe_globals(harmless_classes()):
            if Path(file).suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(file)
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist: {advice}") from error
    except ImportError as error:
        raise InputError(f"{file} needs a package: pip install safetensors") from error
    except Exception as error:  # as torch.load meets them
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{name[1]}, which is " if name else ""
        unsafe = name or "weights_only" in str(error).lower()
        reason = "truncated or no checkpoint"
        if unsafe:
            reason = f"it holds {what}more than tensors (no code is run)"
        raise InputError(f"cannot read {file}: {reason}; {advice}") from error


@functools.cache
def harmless_classes() -> list:
    """What other training code keeps beside tensors, under the names of older and newer libraries too."""
    import datetime
    import pathlib

    found = [argparse.Namespace, list, dict, set, np.dtype, np.ndarray]
    for make in (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]):  # of a scalar, of an array
        found += [(make, f"numpy.{core}.multiarray.{make.__name__}") for core in ("core", "_core")]
    found += {type(np.dtype(code)) for code in np.typecodes["All"]}
    found += [getattr(datetime, name) for name in ("date", "datetime", "time", "timedelta", "timezone")]
    for kind, path in (("Posix", pathlib.PurePosixPath), ("Windows", pathlib.PureWindowsPath)):
        names = [f"pathlib{local}.{pure}{kind}Path" for local in ("", "._local") for pure in ("", "Pure")]
        found += [(path, name) for name in names]
    return found


def read_results(directory: Path) -> dict:
    """The results.json of a finished run."""
    try:
        return dict(json.loads((directory / "results.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{directory / 'results.json'}: no results of a finished run ({error})") from error


# ---------- Evaluation ----------


@torch.no_grad()
def predict_logits(model: Callable, images: Tensor, machine: Machine) -> Tensor:
    """Logits (N, classes) float32 of images (N, 3, H, W), uint8 or in [0, 1], on this rank, in chunks."""
    logits = []
    for part in images.split(machine.chunk(*images.shape[2:])):
        part = to_float(part) if part.dtype == torch.uint8 else part
        with machine.autocast():
            logits.append(model(part.contiguous(memory_format=torch.channels_last)).float())
    return torch.cat(logits)


@torch.no_grad()
def evaluate(models: list[nn.Module], data: Data, batch_size: int = 256) -> list[dict[str, float]]:
    """Of each model {"top1_accuracy", "top5_accuracy": percent, "loss": mean cross entropy}, in eval mode
    (its mode is restored). Each image is read once, on one rank; all ranks get the figures."""
    machine, modes = data.machine, [model.training for model in models]
    totals = torch.zeros(len(models), 4, device=machine.device, dtype=torch.float64)
    for images, labels in data.eval_batches(batch_size):
        for total, model in zip(totals, models):
            logits = predict_logits(model.eval(), images, machine)
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            total += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.ones_like(labels).sum()])
    for model, mode in zip(models, modes):
        model.train(mode)
    sums, keys = machine.all_sum(totals).tolist(), ("top1_accuracy", "top5_accuracy", "loss")
    return [dict(zip(keys, (100 * a / count, 100 * b / count, loss / count))) for a, b, loss, count in sums]


def evaluate_corruptions(
    models: list[nn.Module], corruptions: Corruptions, machine: Machine, batch_size: int = 256
) -> list[dict[str, list[float]]]:
    """For each model {corruption: [accuracy (%) at each severity]}; every set is made, or read, once."""
    from tqdm import tqdm

    found = [{name: [] for name in corruptions.names} for _ in models]
    sets = [(name, severity) for name in corruptions.names for severity in corruptions.severities]
    for name, severity in tqdm(sets, desc="corruptions", unit="set", disable=not machine.is_main):
        for values, figures in zip(found, evaluate(models, corruptions.read(name, severity), batch_size)):
            values[name].append(figures["top1_accuracy"])
    return found


# ---------- Results: pictures, the table over seeds ----------


@contextlib.contextmanager
def figure(file: Path, rows: int, columns: int, size: tuple, title: str = "", **grid) -> Iterator:
    """Axes (rows, columns) to draw on, of a figure of `size` inches that is written to `file` at the end."""
    import matplotlib.figure

    drawing = matplotlib.figure.Figure(figsize=size, dpi=100, layout="constrained")
    yield drawing.subplots(rows, columns, squeeze=False, **grid)
    drawing.suptitle(title)
    drawing.savefig(file)


def show(axis, image: Tensor, title: str = "", color: str = "black") -> None:
    """An image (3, H, W), uint8 or in [0, 1], without ticks."""
    image = image / 255 if image.dtype == torch.uint8 else image
    axis.imshow(image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9, color=color)


def curves(axis, history: list[dict], keys: dict[str, str], x: str = "epoch", **labels) -> None:
    """Lines over `x` of what the history's entries hold under these keys, {key: label}."""
    for key, label in keys.items():
        entries = [entry for entry in history if key in entry]
        points = [entry[x] for entry in entries], [entry[key] for entry in entries]
        axis.plot(*points, ".-", label=label if entries else None)
    axis.set(xlabel=x, **labels)
    axis.grid(alpha=0.3)
    if len(keys) > 1:
        axis.legend(fontsize=8)


NO_FIGURES = "seed n_train n_eval peak_memory_mb epsilon clean_top5_accuracy proportion severities before"
NO_FIGURES += " auroc flip_probability best_on_validation entropy_first queries_distillation"


def leaves(results: dict, above: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of the figures of a results.json; of corruptions the means alone."""
    for key, value in results.items():
        name = f"{above} {key}".strip()
        if key in NO_FIGURES.split() or (above.startswith("corruptions") and "mean" not in name):
            continue
        if isinstance(value, dict):
            yield from leaves(value, name)
        elif type(value) in (int, float):  # neither words nor truths
            yield name, value


def table(directories: list[str | Path], by: Sequence[str] = ()) -> str:
    """A Markdown table per script, data set and model: rows are methods, columns figures, cells mean ± std
    over seeds.

    by: settings (as args.json names them) that tell runs of one method apart. InputError for two runs of one
    seed that differ.
    """
    found: dict[str, dict[str, dict[str, dict[int, float]]]] = {}  # section, row, column, seed
    for directory in map(Path, directories):
        results = read_results(directory)
        try:
            settings = json.loads((directory / "args.json").read_text()) if by else {}
            row = ", ".join([results["method"], *(f"{name} {settings[name]}" for name in by)])
            section = " ".join(results[key] for key in ("script", "dataset", "model"))
            columns = found.setdefault(section, {}).setdefault(row, {})
            for name, value in leaves(results):
                known = columns.setdefault(name, {}).setdefault(results["seed"], value)
                if known != value and name != "wall_seconds":
                    raise InputError(f"{directory}: {row} with this seed is there twice: use --by")
        except (OSError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{directory}: no results of a finished run ({error!r})") from error
    lines = []
    for section, rows in found.items():
        names = list(dict.fromkeys(name for columns in rows.values() for name in columns))
        seeds = max(len(values) for columns in rows.values() for values in columns.values())
        lines += [f"**{section}** (mean ± std over {seeds} seeds)", "", f"| | {' | '.join(names)} |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for row, columns in rows.items():
            cells = [mean_and_std([*columns.get(name, {}).values()]) for name in names]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def mean_and_std(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}" if values else ""


# ---------- Files from elsewhere: data sets and published checkpoints ----------

# What `--download NAME` unpacks: files of Zenodo's, their md5, and a folder that they hold
ZENODO = "https://zenodo.org/record/"
ARCHIVES = {
    "cifar10-c": [("2535967/files/CIFAR-10-C.tar", "56bf5dcef84df0e2308c6dcbcbbd8499", "CIFAR-10-C")],
    "cifar10-p": [("2535967/files/CIFAR-10-P.tar", "125d6775afc5846ea84584d7524dedff", "CIFAR-10-P")],
    "cifar100-c": [("3555552/files/CIFAR-100-C.tar", "11f0ed0f1191edbf9fa23466ae6021d3", "CIFAR-100-C")],
    "imagenet-c": [
        ("2235448/files/noise.tar", "e80562d7f6c3f8834afb1ecf27252745", "shot_noise"),
        ("2235448/files/blur.tar", "2d8e81fdd8e07fef67b9334fa635e45c", "zoom_blur"),
        ("2235448/files/weather.tar", "33ffea4db4d93fe4a428c40a6ce0c25d", "snow"),
        ("2235448/files/digital.tar", "89157860d7b10d5797849337ca2e5c03", "pixelate"),
    ],
    "mnist-c": [("3239543/files/mnist_c.zip", "4b34b33045869ee6d424616cd3a65da3", "mnist_c")],
}

# Checkpoints that others published, by the names that --weights and --download take (weights/README.md):
# GrETTA's classifiers for CIFAR-100, trained with AugMix, and their students; Game of Noise's
GAME_OF_NOISE = "https://github.com/bethgelab/game-of-noise/releases/download/v1.0/"
RELEASES = ("ANT", "ANT+SIN", "ANT3x3", "ANT3x3+SIN", "Speckle", "Gauss_mult", "Gauss_sigma_0.5")
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
PUBLISHED_WEIGHTS = {
    "gretta-resnext": f"{DRIVE}13WhxEVrh23cV22URtAuJytBgG2cvgP0h",
    "gretta-wideresnet": f"{DRIVE}19fHZG4ZVcli0L8nmXCdf8YZvu6wHwHFx",
    "gretta-resnext-student": f"{DRIVE}1MQs0Vx4Mjv6w5Rs5Qnr31YrLy6xTNMJj",
    "gretta-wideresnet-student": f"{DRIVE}1ycNtxRtewRs81myG6Hn3YI9ds2aufM_p",
    **{name: f"{GAME_OF_NOISE}{name.replace('+', '_')}_Model.pth" for name in RELEASES},
}


def published_file(name: str, machine: Machine, dry_run: bool = False) -> Path | None:
    """weights/<name>.pth of PUBLISHED_WEIGHTS, downloaded if it is missing; in a dry run None then."""
    file = WEIGHTS / f"{name}.pth"
    if dry_run and not file.is_file():
        return None
    machine.on_main(lambda: download(PUBLISHED_WEIGHTS[name], file))
    return file


def download(url: str, file: Path, checksum: str = "") -> Path:
    """Fetch `url` to `file` unless it is there; it appears whole or not at all. Raises InputError.

    What came before a connection broke off waits in `<file>.part`, and the next call goes on from there where
    the server can. checksum: an md5, or the first digits of a sha256; a file of another one is removed.
    """
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    from tqdm import tqdm

    if file.is_file():
        return file
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = part.stat().st_size if part.is_file() else 0
        print(f"downloading {url} to {file}" + f", from byte {held:,} on" * bool(held), flush=True)
        headers = {"User-Agent": "CleanAug"} | ({"Range": f"bytes={held}-"} if held else {})
        with urlopen(Request(url, headers=headers), timeout=60) as answer:
            held = held if answer.status == 206 else 0  # 200: the server sends the whole of it
            size = held + int(answer.headers["Content-Length"] or 0)
            if answer.headers.get_content_type() == "text/html":
                raise OSError("it answered with a page, not the file (quota?): fetch it in a browser")
            shown = {"total": size, "initial": held, "desc": file.name, "disable": None}
            with open(part, "ab" if held else "wb") as stream:
                with tqdm.wrapattr(stream, "write", **shown) as writer:
                    shutil.copyfileobj(answer, writer, 2**20)
        if part.stat().st_size < size:
            came = f"{part.stat().st_size:,} of {size:,} bytes"
            raise OSError(f"broken off after {came}; it goes on from there")
        with open(part, "rb") as stream:
            found = hashlib.file_digest(stream, "md5" if len(checksum) == 32 else "sha256").hexdigest()
        if not found.startswith(checksum):
            part.unlink()
            raise OSError(f"its checksum is {found}, not {checksum}, so it was removed")
        os.replace(part, file)
        return file
    except (OSError, HTTPException) as error:  # no network, no such file, another checksum
        if getattr(error, "code", 0) == 416:  # the server has no more than what is here: from the beginning
            part.unlink()
        raise InputError(f"cannot download {url} ({error}): try again, or put it at {file}") from error


def how_to_get(name: str, data_root: str | Path) -> str:
    """The command and the address that get a data set."""
    root = f" --data-root {data_root}" * (str(data_root) != "data")
    unpack = f", or unpack {ZENODO}{ARCHIVES[name][0][0]} there" if name in ARCHIVES else ""
    return f"get it with python common.py --download {name}{root}{unpack}"


def fetch(name: str, data_root: str | Path) -> Path:
    """Download and unpack what is missing of a data set, and return its folder. An archive is checked before
    it is unpacked, and removed after it. InputError for what cannot be had: what came so far waits."""
    if name in TORCHVISION:
        read_published(name, True, data_root, download=True)
        return Path(data_root)
    directory = Path(data_root) / (name if name == "imagenet-c" else "")
    for address, md5, member in ARCHIVES[name]:
        if (directory / member).exists():
            continue
        file = download(ZENODO + address, directory / Path(address).name, md5)
        waiting = directory / f".{file.name}.unpacking"
        try:
            shutil.rmtree(waiting, ignore_errors=True)
            shutil.unpack_archive(file, waiting)
            for inner in sorted(waiting.iterdir(), key=lambda inner: inner.name == member):  # that last
                if not (directory / inner.name).exists():
                    os.replace(inner, directory / inner.name)
            file.unlink()
        except Exception as error:  # of the archive, its compression, the disk
            raise InputError(f"{file} cannot be unpacked ({error}): make room, or remove it") from error
        finally:
            shutil.rmtree(waiting, ignore_errors=True)
    return directory / ARCHIVES[name][0][2] if len(ARCHIVES[name]) == 1 else directory


# ---------- As a program ----------


def train_weights(args: argparse.Namespace) -> None:
    """--train-weights: a run that leaves weights.pt, also as weights/DATASET-MODEL.pt where that is missing."""
    machine = start_machine(args.device, args.amp, args.seed)
    where = {"workers": 0 if args.dry_run else machine.workers(args.workers), "dry_run": args.dry_run}
    sets = load_sets(args.dataset, args.data_root, machine, corruptions=None, **where)
    args.epochs, args.batch_size = 1 if args.dry_run else args.epochs, min(args.batch_size, len(sets.train))
    model = build_model(args.model, len(sets.classes), args.dataset)
    model.to(machine.device, memory_format=machine.weight_layout)
    run = Run(args, machine, "plain")
    recipe = (args.epochs, args.batch_size, args.lr, args.weight_decay)
    train_classifier(model, args.dataset, sets.train, sets.val, recipe, run, args.seed)
    val, test = (evaluate([model], data)[0]["top1_accuracy"] for data in (sets.val, sets.test))
    if not run.finished:
        about = {"n_train": len(sets.train), "n_eval": len(sets.test), "protocol": "accuracy, clean images"}
        run.finish(about | {"val_accuracy": val, "test_accuracy": test})
    small = isinstance(sets.train, Images) and ".py:" not in args.model and not args.dry_run
    files = [run.directory / "weights.pt", WEIGHTS / f"{args.dataset}-{args.model}.pt"][: 1 + small]
    content = {"state_dict": model.state_dict()} | ({"data": fingerprint(sets.train)} if small else {})
    for file in files:
        if file.parent == run.directory or not file.is_file():
            machine.on_main(lambda file=file: save_atomically(content, file))
    if machine.is_main:
        print(f"{files[0]}: {val:.2f} % of validation, {test:.2f} % of the {len(sets.test)} test images")


def main() -> None:
    names = (*TORCHVISION, *ARCHIVES, *PUBLISHED_WEIGHTS)
    usage = "%(prog)s [flags] [RUN_DIR ...]"
    parser = Parser(RECIPES, usage=usage, description=__doc__.split("\n\n")[-1].rstrip())
    add = parser.add_argument
    add("run_dirs", nargs="*", metavar="RUN_DIR", help="finished runs: print mean ± std over their seeds")
    add("--by", action="append", default=[], metavar="SETTING", help="rows by this setting too, such as M")
    add("--download", choices=names, metavar="NAME", help=f"get one of {', '.join(names)}")
    add = parser.add_argument_group("training", "defaults by data set").add_argument
    add("--train-weights", "--model", dest="model", metavar="MODEL", help="train it plainly on --dataset")
    add("--epochs", type=number(int, 1), help="passes over the training set")
    add("--batch-size", type=number(int, 2), help="images per step over all ranks")
    add("--lr", type=number(float, 0, open_low=True), help="at the top of its one cycle")
    add("--weight-decay", type=number(float, 0), help="of SGD")
    parser.set_defaults(checkpoint_every=1, workers=0)
    names = ("epochs", "batch_size", "lr", "weight_decay")
    args = parser.parse(None, lambda given: dict(zip(names, RECIPES[given.dataset])))
    if args.download in PUBLISHED_WEIGHTS:
        print(published_file(args.download, Machine(torch.device("cpu"))))
    elif args.download:
        print(f"{fetch(args.download, args.data_root)} is there")
    elif args.model:
        for name in ("run_dirs", "by", "download"):  # say nothing of a training
            delattr(args, name)
        train_weights(args)
    elif args.run_dirs:
        print(table(args.run_dirs, args.by))
    else:
        parser.error("name at least one run directory")


if __name__ == "__main__":
    run_script(main)
