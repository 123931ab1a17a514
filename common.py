"""What the scripts of CleanAug share. Read it in this order:

    constants     paths, classes, where data sets are downloaded from, InputError
    data          load_split, digits, modified digits, MNIST, CIFAR, their corrupted sets, CheXpert, batches, affine_warp
    folders       Folder: pictures on disk such as ImageNet's, class_folder, imagenet_c, plain_batches, image_batches
    sets          load_sets: what a run needs of a data set, whatever its kind
    corruptions   CORRUPTIONS, corrupt, contact_sheet
    models        ResNeXt-29, Wide ResNet, Shake-Shake, PyramidNet with ShakeDrop, ResNet-50-D and -200, build_model,
                  load_weights, digits' and ImageNet's weights
    machine       device, mixed precision, processes, seeds, signals
    checkpoints   atomic files, the one before the newest, continuing
    evaluation    predict_logits, evaluate, evaluate_folder, evaluate_models, evaluate_corruptions
    results       command line, run directory, logs, results.json, the table over seeds
    files         published checkpoints, download, unpack, CIFAR's pickles read safely

Nothing happens on import. As a program it prints a Markdown table of mean ± std over seeds, trains a classifier for
digits, draws what the corruptions look like, or gets a data set or a published checkpoint:

    python common.py RUN_DIR [RUN_DIR ...]
    python common.py --train-weights resnext
    python common.py --contact-sheet out.png
    python common.py --download cifar10-c
    python common.py --download gretta-resnext
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import pickletools
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

if TYPE_CHECKING:
    from PIL import Image

# ---------------------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
WEIGHTS = ROOT / "weights"

NUM_CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100}  # the sets that fit in memory
SPLITS = ("train", "val", "test")

# What `python common.py --download NAME` gets: the folder under --data-root to unpack in, and the files: address, md5, what the archive holds
ZENODO, MNIST_MIRROR = "https://zenodo.org/record/", "https://ossci-datasets.s3.amazonaws.com/mnist/"
ARCHIVES = {
    "cifar10": ("", [("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", ["cifar-10-batches-py"])]),
    "cifar100": ("", [("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", ["cifar-100-python"])]),
    "cifar10-c": ("", [(f"{ZENODO}2535967/files/CIFAR-10-C.tar", "56bf5dcef84df0e2308c6dcbcbbd8499", ["CIFAR-10-C"])]),
    "cifar10-p": ("", [(f"{ZENODO}2535967/files/CIFAR-10-P.tar", "125d6775afc5846ea84584d7524dedff", ["CIFAR-10-P"])]),
    "cifar100-c": ("", [(f"{ZENODO}3555552/files/CIFAR-100-C.tar", "11f0ed0f1191edbf9fa23466ae6021d3", ["CIFAR-100-C"])]),
    "imagenet-c": (
        "imagenet-c",
        [
            (f"{ZENODO}2235448/files/noise.tar", "e80562d7f6c3f8834afb1ecf27252745", ["gaussian_noise", "shot_noise", "impulse_noise"]),
            (f"{ZENODO}2235448/files/blur.tar", "2d8e81fdd8e07fef67b9334fa635e45c", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur"]),
            (f"{ZENODO}2235448/files/weather.tar", "33ffea4db4d93fe4a428c40a6ce0c25d", ["snow", "frost", "fog", "brightness"]),
            (
                f"{ZENODO}2235448/files/digital.tar",
                "89157860d7b10d5797849337ca2e5c03",
                ["contrast", "elastic_transform", "pixelate", "jpeg_compression"],
            ),
            (f"{ZENODO}2235448/files/extra.tar", "d492dfba5fc162d8ec2c3cd8ee672984", ["speckle_noise", "gaussian_blur", "spatter", "saturate"]),
        ],
    ),
    "mnist": (
        "MNIST/raw",
        [
            (f"{MNIST_MIRROR}train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", ["train-images-idx3-ubyte.gz"]),
            (f"{MNIST_MIRROR}train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", ["train-labels-idx1-ubyte.gz"]),
            (f"{MNIST_MIRROR}t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", ["t10k-images-idx3-ubyte.gz"]),
            (f"{MNIST_MIRROR}t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", ["t10k-labels-idx1-ubyte.gz"]),
        ],
    ),
    "mnist-c": ("", [(f"{ZENODO}3239543/files/mnist_c.zip", "4b34b33045869ee6d424616cd3a65da3", ["mnist_c"])]),
}


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do. `run_script` turns it into exit code 2.

    What a message quotes of a file or of a library may hold anything: it becomes one line of characters that can be printed.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """Text without line breaks and control characters; where it is very long, its ends, which name the file and say what to do."""
    text = text if len(text) <= 4000 else f"{text[:2000]} … {text[-2000:]}"
    return "".join(char if char.isprintable() else " " if char.isspace() else ascii(char)[1:-1] for char in text)


class MissingData(InputError):
    """A set is not on disk, rather than damaged or half there."""


# ---------------------------------------------------------------------------------------------------------------------
# Data: small sets are uint8 tensors that live on the device; a batch is an index into them, there are no loader workers
# ---------------------------------------------------------------------------------------------------------------------


def load_split(dataset: str, split: str, data_root: str | Path = "data", download: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) uint8 and labels (N,) int64 of one split of a set that fits in memory.

    dataset: "digits", "mnist", "cifar10" or "cifar100", the last three downloaded where they are missing (`download`); or "mnist-c", "cifar10-c",
    "cifar100-c": every corruption at every severity, one after the other, test only. split: "train", "val" or "test"; MNIST and CIFAR have no
    published validation part: every tenth training image of each class is "val", the others are "train". Raises InputError where the files are
    missing or damaged.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split '{split}': choose from {', '.join(SPLITS)}")
    if dataset == "digits":
        return load_digits(split, data_root)
    if dataset in ("cifar10-c", "cifar100-c", "mnist-c"):
        if split != "test":
            raise InputError(f"{dataset} has no '{split}' split: it is a test set")
        corruptions = corruption_files(dataset.removesuffix("-c"), data_root)
        parts = [corruptions.read(name, severity) for name in corruptions.names for severity in corruptions.severities]
        return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
    if dataset not in NUM_CLASSES:
        raise InputError(f"unknown data set '{dataset}': choose {', '.join(NUM_CLASSES)}, mnist-c, cifar10-c or cifar100-c")
    if download and dataset in ARCHIVES:
        fetch(dataset, data_root)
    images, labels = load_mnist(split, data_root) if dataset == "mnist" else load_cifar(dataset, split, data_root)
    if len(labels) == 0:
        raise InputError(f"{dataset} in {data_root} has no {split} images: get it again")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES[dataset]:
        raise InputError(f"{dataset} in {data_root} has labels {labels.min()}..{labels.max()}, not 0..{NUM_CLASSES[dataset] - 1}: get it again")
    if split == "test":
        return images, labels
    chosen = held_out(labels) if split == "val" else ~held_out(labels)
    return images[chosen], labels[chosen]


def held_out(labels: torch.Tensor) -> torch.Tensor:
    """Which training images are kept for validation, (N,) bool: every tenth of each class; of a tiny set, which has no tenth, the last."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        chosen[(labels == label).nonzero()[9::10, 0]] = True
    chosen[-1] |= not chosen.any()
    return chosen


def load_digits(split: str, data_root: str | Path = "data") -> tuple[torch.Tensor, torch.Tensor]:
    """UCI digits (Alpaydin & Kaynak 1998) as 3×32×32: 1,000 training, 197 validation, 600 test images.

    The 8×8 integers 0..16 are enlarged bilinearly to 20 px and stand in the middle of a black 32 px canvas. The split is
    stored in the file: stratified, drawn once (data/README.md says how). Returns uint8 (N, 3, 32, 32) and int64 (N,).
    """
    file = find_data("digits.npz", data_root)
    try:
        with np.load(file, allow_pickle=False) as archive:
            if sum(member.file_size for member in archive.zip.infolist()) > 2**20:  # the set has 120 kB: a bomb ends here
                raise ValueError("it holds more than the set")
            images, labels, splits = archive["images"], archive["labels"], archive["split"]
        if {images.dtype, labels.dtype, splits.dtype} != {np.dtype(np.uint8)}:
            raise ValueError(f"images {images.dtype}, labels {labels.dtype}, split {splits.dtype}")
        if images.shape != (1797, 8, 8) or labels.shape != (1797,) or splits.shape != (1797,):
            raise ValueError(f"images {images.shape}, labels {labels.shape}, split {splits.shape}")
        if set(labels.tolist()) != set(range(10)) or set(splits.tolist()) != {0, 1, 2} or not 0 <= images.min() <= images.max() <= 16:
            raise ValueError("labels, splits or pixels out of range")
    except Exception as error:  # zipfile, zlib, numpy and missing keys each raise their own
        raise InputError(f"{file} is damaged ({error}): restore it from the repository (git checkout data/digits.npz)") from error
    chosen = splits == SPLITS.index(split)
    images = torch.from_numpy(images[chosen]).float()[:, None] / 16  # (N, 1, 8, 8) in [0, 1]
    images = F.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    images = F.pad(images, (6, 6, 6, 6))  # (N, 1, 32, 32)
    images = (images * 255).round().to(torch.uint8).repeat(1, 3, 1, 1)
    return images, torch.from_numpy(labels[chosen].astype(np.int64))


def load_cifar(dataset: str, split: str, data_root: str | Path = "data") -> tuple[torch.Tensor, torch.Tensor]:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) as published: all training or all test images, uint8 (N, 3, 32, 32), and labels int64 (N,).

    A file with as many images as published must have its md5. One with fewer (one's own part of the set, in the same format) is taken as it is.
    """
    from torchvision.datasets import CIFAR10, CIFAR100  # their lists of files and checksums

    published = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    folder = Path(data_root) / published.base_folder
    images, labels = [], []
    for name, md5 in published.test_list if split == "test" else published.train_list:
        file = folder / name
        try:
            if file.stat().st_size > 2**28:  # the largest has 155 MB
                raise ValueError(f"it has {file.stat().st_size} bytes")
            content = unpickle_cifar(file.read_bytes())
            data = content["data"].pixels()
            found = content["labels" if dataset == "cifar10" else "fine_labels"]
            if type(found) is not list or not all(type(label) is int for label in found):
                raise ValueError("its labels are no list of whole numbers")
            if data.shape != (len(found), 3072):
                raise ValueError(f"its data is {data.shape}, its labels are {len(found)}")
            if len(found) >= (10_000 if dataset == "cifar10" or split == "test" else 50_000) and file_hash(file, "md5") != md5:
                raise ValueError(f"its md5 is not {md5}")
            labels.append(torch.tensor(found, dtype=torch.int64))
            images.append(torch.from_numpy(data).view(-1, 3, 32, 32))
        except Exception as error:  # a damaged pickle raises anything
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{file} is missing or damaged ({what}): {how_to_get(dataset, data_root, folder)}") from error
    return torch.cat(images), torch.cat(labels)


def load_mnist(split: str, data_root: str | Path = "data") -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST (LeCun et al. 1998) as 3×32×32: all training or all test images, uint8 (N, 3, 32, 32), and labels int64 (N,).

    The idx files, gzipped or not, lie in <data_root>/MNIST/raw (as torchvision has them), <data_root>/mnist or <data_root>. 28 px images get a
    black border of 2 px.
    """
    kind = "t10k" if split == "test" else "train"
    images, labels = read_idx(f"{kind}-images-idx3-ubyte", 3, data_root), read_idx(f"{kind}-labels-idx1-ubyte", 1, data_root)
    if images.shape != (len(labels), 28, 28):
        raise InputError(f"MNIST in {data_root} is damaged: {len(labels)} labels, images {images.shape}; {how_to_get('mnist', data_root)}")
    return as_32_px(images), torch.from_numpy(labels.astype(np.int64))


def as_32_px(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, 28, 28) → (N, 3, 32, 32), black around."""
    return F.pad(torch.from_numpy(images), (2, 2, 2, 2))[:, None].repeat(1, 3, 1, 1)


def mnist_file(name: str, data_root: str | Path) -> Path:
    """Where one of MNIST's files lies, gzipped or not; else where it would be."""
    folders = (Path(data_root) / "MNIST" / "raw", Path(data_root) / "mnist", Path(data_root))
    files = [folder / f"{name.removesuffix('.gz')}{suffix}" for folder in folders for suffix in ("", ".gz")]
    return next((file for file in files if file.is_file()), files[0])


def read_idx(name: str, dimensions: int, data_root: str | Path) -> np.ndarray:
    """MNIST's format: two zero bytes, 8 for uint8, the number of dimensions, each as a big-endian 32-bit integer, then the values."""
    import gzip

    file = mnist_file(name, data_root)
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            content = stream.read(2**28)  # MNIST has 47 MB; a bomb ends here
        shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
        if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != 4 + 4 * dimensions + math.prod(shape):
            raise ValueError(f"its header says {shape}, it has {len(content)} bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{file} is missing or damaged ({error}): {how_to_get('mnist', data_root, file)}") from error


FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")  # the five of CheXpert's that are scored


def load_chexpert(data_root: str | Path, uncertain: str = "ones") -> tuple["Folder", "Folder"]:
    """CheXpert (Irvin et al. 2019, arXiv 1901.07031), train.csv and valid.csv, with labels (N, 5) float of FINDINGS: 1, 0, or NaN for "ignore".

    They lie in <data_root>/CheXpert-v1.0-small, …/CheXpert-v1.0, …/chexpert or data_root itself. An empty label counts 0; an uncertain one (-1) as
    `uncertain` says: "ones", "zeros" or "ignore". Raises InputError for a csv that is missing, lacks columns or names pictures that are not there.
    """
    import csv

    root = Path(data_root)
    if not (root / "train.csv").is_file():
        root = first_directory(root, ("CheXpert-v1.0-small", "CheXpert-v1.0", "chexpert"))
    values = {"1": 1.0, "0": 0.0, "": 0.0, "-1": {"ones": 1.0, "zeros": 0.0, "ignore": math.nan}[uncertain]}
    folders = []
    for name in ("train.csv", "valid.csv"):
        file, labels, paths = root / name, [], []
        try:
            with open(file, newline="", encoding="utf-8") as stream:
                rows = csv.DictReader(stream)
                missing = [column for column in ("Path", *FINDINGS) if column not in (rows.fieldnames or ())]
                if missing:
                    raise InputError(f"{file} has no column {', '.join(missing)}: take CheXpert's own")
                for row in rows:
                    labels.append([values[(row[finding] or "").strip().removesuffix(".0")] for finding in FINDINGS])
                    paths.append(row["Path"] or "")
        except OSError as error:
            advice = "CheXpert is had from https://stanfordmlgroup.github.io/competitions/chexpert; name its folder with --data-root"
            raise MissingData(f"{file} is missing ({error.strerror}): {advice}") from error
        except (KeyError, UnicodeDecodeError, csv.Error) as error:
            what = f"a label is {error}, not 1, 0, -1 or empty" if isinstance(error, KeyError) else error
            raise InputError(f"{file}, line {len(labels) + 2}: {what}") from error
        if not paths:
            raise InputError(f"{file} names no pictures: take CheXpert's own")
        # Paths begin with the name of the published folder, whatever its name is here.
        bases = [base for base in (root.parent, root) if os.path.isfile(base / paths[0])]
        files = [str(bases[0] / path) for path in paths] if bases else [str(root.joinpath(*Path(path).parts[1:])) for path in paths]
        absent = next((path for path in files if not os.path.isfile(path)), None)
        if absent is not None:
            raise InputError(f"{file} names {absent}, which is missing: unpack the pictures beside it")
        folders.append(Folder(files, torch.tensor(labels)))
    return folders[0], folders[1]


def split_patients(pictures: "Folder", proportion: float) -> tuple["Folder", "Folder"]:
    """Pictures of `proportion` of the patients, drawn at random but always alike, and those of the others; a path names its patient."""
    patients = [next((part for part in Path(os.fsdecode(file)).parts if part.startswith("patient")), os.fsdecode(file)) for file in pictures.files]
    names = sorted(set(patients))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = {names[number] for number in order[: min(max(1, round(proportion * len(names))), len(names) - 1)]}
    inside = torch.tensor([patient in chosen for patient in patients])
    return pictures.part(inside.nonzero()[:, 0]), pictures.part((~inside).nonzero()[:, 0])


def fake_images(count: int, num_classes: int, height: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pixels, uint8 (count, 3, height, width), and labels in turn, int64 (count,): for measuring speed and trying things out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8), torch.arange(count) % num_classes


class Corruptions(NamedTuple):
    """A corrupted test set. `read(name, severity)` makes or reads one part of it."""

    read: Callable[[str, int], "Data"]
    names: tuple[str, ...]  # the mean is taken over these
    extra: tuple[str, ...]  # reported beside
    severities: tuple[int, ...]
    source: str

    @property
    def protocol(self) -> str:
        severities = f" x severities 1-{len(self.severities)}" if len(self.severities) > 1 else ""
        return f"{self.source}, {len(self.names)} corruptions{severities}"


# Mu & Gilmer 2019, arXiv 1906.02337; one severity
MNIST_C = (
    *("shot_noise", "impulse_noise", "glass_blur", "motion_blur", "shear", "scale", "rotate", "brightness"),
    *("translate", "stripe", "fog", "spatter", "dotted_line", "zigzag", "canny_edges"),
)


def corruption_files(
    dataset: str, data_root: str | Path, clean_labels: torch.Tensor | None = None, directory: str | Path | None = None
) -> Corruptions:
    """CIFAR-10-C, CIFAR-100-C or MNIST-C as published, in `directory` (default: <data_root>/CIFAR-10-C and so on). Raises InputError for what is
    damaged or not all there, MissingData where there is nothing.

    CIFAR-C: `<corruption>.npy`, uint8 (5·N, 32, 32, 3), severity after severity, and `labels.npy` (5·N,), in the test set's order; the four extra
    corruptions where they are there. MNIST-C: `<corruption>/test_{images,labels}.npy`, uint8 (N, 28, 28, 1). Arrays are mapped, not read; never
    unpickled. clean_labels: the test set's, which those of a corrupted set of the same size must equal.
    """
    if f"{dataset}-c" not in ARCHIVES:
        raise MissingData(f"no corrupted test set of {dataset} is published")
    published = {"mnist": "MNIST-C", "cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}[dataset]
    directory = Path(directory or Path(data_root) / ARCHIVES[f"{dataset}-c"][1][0][2][0])
    again = how_to_get(f"{dataset}-c", data_root, directory)
    if not directory.is_dir():
        raise MissingData(f"{directory} is missing: {again}")
    names, severities = (MNIST_C, (1,)) if dataset == "mnist" else (CORRUPTIONS, (1, 2, 3, 4, 5))
    parts, shape = len(severities), (28, 28, 1) if dataset == "mnist" else (32, 32, 3)

    def arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
        files = [directory / f"{name}.npy", directory / "labels.npy"]
        if dataset == "mnist":
            files = [directory / name / "test_images.npy", directory / name / "test_labels.npy"]
        images, labels = (read_array(file, again) for file in files)
        if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) % parts or len(images) == 0:
            raise InputError(f"{files[0]} is {images.dtype} {images.shape}: expected uint8 ({f'{parts}·' * (parts > 1)}N, {str(shape)[1:]}; {again}")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise InputError(f"{files[1]} is {labels.dtype} {labels.shape}, but {files[0]} is {images.shape}: {again}")
        return images, labels

    extra = () if dataset == "mnist" else tuple(name for name in EXTRA_CORRUPTIONS if (directory / f"{name}.npy").is_file())
    for name in names + extra:
        images, labels = arrays(name)
        repeated = labels.reshape(parts, -1)
        expected = repeated[0] if clean_labels is None or len(clean_labels) != repeated.shape[1] else clean_labels.numpy()
        if (repeated != expected).any() or repeated.min() < 0 or repeated.max() >= NUM_CLASSES[dataset]:
            raise InputError(f"the labels of {directory} ({name}) do not match {dataset}'s test labels: {again}")

    def read(name: str, severity: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = arrays(name)
        count = len(images) // parts
        rows = slice((severity - 1) * count, severity * count)
        images, labels = images[rows].copy(), torch.from_numpy(labels[rows].astype(np.int64))
        return (as_32_px(images[..., 0]) if dataset == "mnist" else torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()), labels

    return Corruptions(read, names, extra, severities, f"{published} as published")


def read_array(file: Path, advice: str) -> np.ndarray:
    """An array file, mapped rather than read; never unpickled."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):  # an archive of arrays, whatever its name
            raise ValueError("it is no array file")
        return array
    except Exception as error:  # a hostile header raises what NumPy, Python's parser and mmap meet: SyntaxError, OverflowError, RecursionError …
        raise InputError(f"{file} is missing or damaged ({error}): {advice}") from error


def find_data(name: str, data_root: str | Path) -> Path:
    """The file `name` under data_root; the default "data" is also looked for beside this file, for scripts run from elsewhere."""
    candidates = [Path(data_root) / name] + ([ROOT / "data" / name] if str(data_root) == "data" else [])
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(f"{candidates[0]} is missing: it comes with the repository (git checkout data/{name}), or name its folder with --data-root")


def modified_digits(
    split: str, data_root: str | Path = "data", variants: int = 10, seed: int = 0, dataset: str = "digits"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Modified digits (or modified "mnist"): every digit of the split `variants` times, each with its own shift, zoom, gamma and contrast.

    After GrETTA's modified MNIST. Zoom 0.6..1 in x and in y about the centre, then a translation of up to ±8 px in x and in y;
    gamma 2/3..3/2 (log-uniform), then contrast 0.8..1.2; all uniform and drawn from `seed`, so the set is always the same.
    Returns images (variants·N, 3, 32, 32) uint8, labels (variants·N,) int64, and source (variants·N,) int64, the number of the
    digit that each image was made from; images are ordered variant by variant.
    """
    images, labels = load_split(dataset, split, data_root)
    generator = torch.Generator().manual_seed(seed * len(SPLITS) + SPLITS.index(split))
    source = torch.arange(len(labels)).repeat(variants)

    def uniform(low: float, high: float, columns: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(source), columns, generator=generator)

    zoom, translation = uniform(0.6, 1.0, 2), uniform(-8, 8, 2)
    gamma, contrast = uniform(-math.log(1.5), math.log(1.5), 1).exp(), uniform(0.8, 1.2, 1)
    modified = affine_warp(to_float(images)[source], affine_matrix(zoom, translation))
    modified = adjust_contrast(modified.clamp_min(0) ** gamma[:, :, None, None], contrast[:, 0])
    return to_uint8(modified), labels[source], source


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 → float32 in [0, 1]."""
    return images.float().div_(255)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float in [0, 1] → uint8, rounded."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def epoch_batches(size: int, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """One epoch's shuffled batches, (steps, batch_size) indices; the images left over by the last whole batch wait for the next epoch.

    The permutation is drawn on every rank alike; `own_rows` takes a rank's part of a batch.
    """
    steps = size // batch_size
    return torch.randperm(size, generator=generator, device=generator.device)[: steps * batch_size].view(steps, batch_size)


def constant(values: tuple, like: torch.Tensor) -> torch.Tensor:
    """A small tensor of numbers, of the dtype and on the device of `like`; made once, as a copy to a GPU in every step would hold it up."""
    if torch.compiler.is_compiling():  # torch.compile and torch.export keep it themselves
        return like.new_tensor(values)
    return kept_tensor(values, like.dtype, like.device)


@functools.cache
@torch.inference_mode(False)
def kept_tensor(values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def affine_matrix(scale: torch.Tensor, translation: torch.Tensor, degrees: torch.Tensor | None = None) -> torch.Tensor:
    """Forward maps (B, 2, 3) in pixels about the image centre: p → R(degrees)·diag(scale)·p + translation.

    scale (B, 2) in x and y, > 1 enlarges; translation (B, 2) in px, positive right and down; degrees (B,), positive
    counter-clockwise as seen on the screen.
    """
    angle = torch.zeros_like(scale[:, 0]) if degrees is None else torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale[:, 0], sin * scale[:, 1], translation[:, 0]], dim=1)
    row_y = torch.stack([-sin * scale[:, 0], cos * scale[:, 1], translation[:, 1]], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def affine_warp(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Warp each image by its own forward map; one bilinear interpolation, black outside, differentiable in both arguments.

    images (B, C, H, W) float; matrix (B, 2, 3) in pixels about the centre, as `affine_matrix` makes them.
    """
    height, width = images.shape[-2:]
    size = constant((width, height), matrix)
    # grid_sample looks up, for every output pixel, where it comes from (the inverse map), in units of half the image.
    linear, shift = matrix[:, :, :2], matrix[:, :, 2]
    determinant = linear[:, 0, 0] * linear[:, 1, 1] - linear[:, 0, 1] * linear[:, 1, 0]
    adjugate = torch.stack([linear[:, 1, 1], -linear[:, 0, 1], -linear[:, 1, 0], linear[:, 0, 0]], dim=1).view(-1, 2, 2)
    inverse = adjugate / determinant[:, None, None]
    shift = -(inverse @ shift[:, :, None])[:, :, 0]
    theta = torch.cat([inverse * (size[None, None, :] / size[None, :, None]), (shift * 2 / size)[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


LUMA = (0.299, 0.587, 0.114)


def adjust_contrast(images: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """m + contrast·(x − m), clipped to [0, 1], with m the mean of the image's luma (0.299, 0.587, 0.114), as PIL's ImageEnhance.Contrast.

    images (B, 3, H, W) in [0, 1]; contrast (B,), 1 is the identity.
    """
    luma = constant(LUMA, images).view(1, 3, 1, 1)
    mean = (images * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
    return (mean + contrast.view(-1, 1, 1, 1) * (images - mean)).clamp(0, 1)


def mild_augmentation(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What the shipped digits classifiers were trained under: ±1 px, zoom 0.95..1.05, ±5°, per image. images (B, 3, H, W) in [0, 1]."""
    draw = torch.rand(len(images), 5, generator=generator, device=generator.device).to(images.device) * 2 - 1
    return affine_warp(images, affine_matrix(1 + 0.05 * draw[:, :2], draw[:, 2:4], 5 * draw[:, 4]))


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What CIFAR is trained under: shifted by up to 4 px in x and y, black outside, mirrored every other time. images (B, 3, H, W) in [0, 1]."""
    shift = torch.randint(-4, 5, (len(images), 2), generator=generator, device=generator.device).to(images)
    flip = torch.rand(len(images), generator=generator, device=generator.device).to(images.device) < 0.5
    scale = torch.stack([torch.where(flip, -1.0, 1.0), torch.ones_like(shift[:, 0])], dim=1)
    return affine_warp(images, affine_matrix(scale, shift))


# ---------------------------------------------------------------------------------------------------------------------
# Folders: class folders of pictures too many for memory; decoded and cropped by loader processes
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def class_folders(directory: str | Path, advice: str) -> list[str]:
    """The sorted names of the class folders in a directory; MissingData, ending in `advice`, where there is no such directory or none in it."""
    if not Path(directory).is_dir():
        raise MissingData(f"{directory} is missing: {advice}")
    with os.scandir(directory) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise MissingData(f"{directory} holds no class folders: {advice}")
    return classes


def check_classes(directory: str | Path, classes: list[str], expected: list[str], where: str | Path) -> int:
    """The number of pictures in all class folders of a directory. InputError, naming the first that differ, unless its classes are those in
    `where`, and for one that is empty."""
    missing, unexpected = sorted(set(expected) - set(classes)), sorted(set(classes) - set(expected))
    faults = [
        f"{kind} {', '.join(names[:3])}{' …' * (len(names) > 3)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
    ]
    if faults:
        raise InputError(f"{directory} has other classes than {where}: {'; '.join(faults)}")
    total = 0
    for name in classes:
        count = sum(file.lower().endswith(IMAGE_SUFFIXES) and file[0] != "." for file in os.listdir(Path(directory) / name))
        if count == 0:
            raise InputError(f"{Path(directory) / name} holds no pictures: copy or unpack it again")
        total += count
    return total


def class_folder(directory: str | Path, classes: list[str], size: int = 224, resize: int = 256) -> "Folder":
    """The pictures `<directory>/<class>/…`, labelled by the number of their class among the sorted `classes`. InputError for a class without any."""
    files, labels = [], []
    for label, name in enumerate(classes):
        with os.scandir(Path(directory) / name) as entries:
            found = sorted(entry.path for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES))
        if not found:
            raise InputError(f"{Path(directory) / name} holds no pictures (looked for {', '.join(IMAGE_SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    return Folder(files, torch.tensor(labels), size, resize)


class Folder(torch.utils.data.Dataset):
    """Pictures on disk as uint8 (3, size, size), and their labels: numbers of classes (N,) int64, or several per picture (N, L) float.

    An item is (number, key): a key seeds that picture's random crop (8 % to all of it, sides 3:4 to 4:3) and flip, whatever worker
    does it; None scales the shorter side to `resize` and cuts the centre out. Raises InputError, when it is read, for a picture that is damaged,
    naming it.
    """

    def __init__(self, files: list[str], labels: torch.Tensor, size: int = 224, resize: int = 256):
        # Bytes in one array: millions of Python strings would be copied into every worker as their reference counts change.
        self.files = np.array([os.fsencode(file) for file in files])
        self.labels, self.size, self.resize = labels, size, resize
        self.corruption: tuple[str, int] | None = None  # name and severity, made on the device, batch by batch

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[torch.Tensor, torch.Tensor]:
        number, key = item
        file = os.fsdecode(self.files[number])
        try:
            picture = read_picture(file, self.size, self.resize) if key is None else read_crop(file, self.size, key)
        except Exception as error:  # a damaged picture raises whatever its decoder meets
            raise InputError(f"{file} is not a readable picture ({error}): restore it, or remove it") from error
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).contiguous(), self.labels[number]

    def keep(self, most: int) -> "Folder":
        """A folder of at most `most` of these pictures, evenly spaced through them."""
        return self.part(evenly_spaced(most, len(self)))

    def part(self, chosen: torch.Tensor) -> "Folder":
        """A folder of the pictures with these numbers."""
        kept = copy.copy(self)
        kept.files, kept.labels = self.files[chosen.numpy()], self.labels[chosen]
        return kept

    def corrupted(self, name: str, severity: int) -> "Folder":
        """A folder of these pictures, corrupted on the device as they are read, with seed 0."""
        changed = copy.copy(self)
        changed.corruption = (name, severity)
        return changed

    def batches(self, items: Iterable[list[tuple[int, int | None]]], workers: int, machine: "Machine") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of items as uint8 images (b, 3, size, size) and labels (b,) or (b, L), on the device."""
        ahead = {"prefetch_factor": 4, "worker_init_fn": leave_signals} if workers else {}
        pinned, own = machine.device.type == "cuda", torch.Generator()  # else it would draw from torch's, whose state is part of a run
        loader = torch.utils.data.DataLoader(self, batch_sampler=items, num_workers=workers, pin_memory=pinned, generator=own, **ahead)
        try:
            for images, labels in loader:
                images, labels = images.to(machine.device, non_blocking=True), labels.to(machine.device, non_blocking=True)
                if self.corruption is not None:
                    images = corrupt_uint8(images, *self.corruption, seed=0)
                yield images, labels
        except InputError as error:  # one raised in a worker comes with the worker's traceback before it
            raise InputError(str(error).rpartition("common.InputError: ")[2].strip()) from error

    def random_batches(
        self, batch_size: int, generator: torch.Generator, workers: int, machine: "Machine", crop: bool = True, start: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One shuffled epoch from batch `start` on, this rank's part of each batch, randomly cropped and flipped (without `crop`: centres cut out);
        order and keys are drawn on every rank alike."""
        numbers = epoch_batches(len(self), batch_size, generator)
        keys = torch.randint(2**62, numbers.shape, generator=generator, device=generator.device)
        numbers, keys = numbers[start:], keys[start:]
        drawn = ((machine.own_rows(row).tolist(), machine.own_rows(key).tolist()) for row, key in zip(numbers.cpu(), keys.cpu()))
        return self.batches((list(zip(row, key if crop else [None] * len(row))) for row, key in drawn), workers, machine)

    def all_batches(self, batch_size: int, workers: int, machine: "Machine") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's part of all pictures, in order, centres cut out."""
        return self.numbered_batches(machine.own_rows(torch.arange(len(self))).split(batch_size), workers, machine)

    def numbered_batches(self, batches: Iterable[torch.Tensor], workers: int, machine: "Machine") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The pictures with these numbers, batch by batch, centres cut out."""
        return self.batches([[(number, None) for number in batch.tolist()] for batch in batches if len(batch)], workers, machine)


def leave_signals(_number: int) -> None:
    """In a loader process: Ctrl-C goes to all of them, and is the script's business; SIGTERM is how torch ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def open_picture(file: str | Path) -> Iterator["Image.Image"]:
    """A picture whose header alone is read so far. Only of the formats that IMAGE_SUFFIXES names, and none so large or so long that decoding or
    scaling it would fill the memory: at most PIL's 89 million pixels, sides of at most 1:100."""
    import logging
    import warnings

    from PIL import Image

    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a picture is said in one line, by who reads it
    if not os.path.isfile(file):  # to open a pipe would wait for ever
        raise FileNotFoundError("there is no such file")
    with warnings_off():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")) as opened:
            if max(opened.size) > 100 * min(opened.size):
                raise ValueError(f"it has {opened.size[0]} x {opened.size[1]} pixels")
            yield opened


def read_picture(file: str, size: int, resize: int) -> "Image.Image":
    """An RGB picture, the shorter side scaled to `resize`, the centre (size, size) cut out, as torchvision's Resize and CenterCrop do."""
    from torchvision.transforms.v2 import functional

    with open_picture(file) as opened:
        picture = functional.resize(opened.convert("RGB"), resize, antialias=True)
    return functional.center_crop(picture, size)


def random_box(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part of a picture, as torchvision's RandomResizedCrop draws it: 8 % to 100 % of the area, sides 3:4 to
    4:3, at most ten tries, then the largest centre of such sides."""
    for _ in range(10):
        area, ratio = draw.uniform(0.08, 1) * width * height, math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, width - w), draw.randint(0, height - h), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def read_crop(file: str, size: int, key: int) -> "Image.Image":
    """A random part of a picture, scaled to (size, size), RGB, mirrored every other time; all of it drawn from the key.

    A JPEG is decoded at half, a quarter or an eighth of its size where the part still has more pixels than are asked for.
    """
    from PIL import Image

    draw = random.Random(key)
    with open_picture(file) as opened:
        width, height = opened.size
        left, top, w, h = random_box(width, height, draw)
        opened.draft("RGB", (math.ceil(width * size / w), math.ceil(height * size / h)))  # nothing but for JPEGs
        x, y = opened.size[0] / width, opened.size[1] / height
        picture = opened if opened.mode == "RGB" else opened.convert("RGB")
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left * x, top * y, (left + w) * x, (top + h) * y))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else picture


Data = tuple[torch.Tensor, torch.Tensor] | Folder  # uint8 images (N, 3, H, W) and labels (N,), or pictures on disk


def count_images(data: Data | None) -> int:
    return 0 if data is None else len(data) if isinstance(data, Folder) else len(data[1])


def keep_some(data: Data | None, most: int) -> Data | None:
    """At most `most` of the images: the first ones of tensors, evenly spaced pictures of a folder."""
    return data.keep(most) if isinstance(data, Folder) else data and tuple(part[:most] for part in data)


def imagenet_c(directory: str | Path, classes: list[str], where: Path) -> Corruptions:
    """ImageNet-C's pictures, `<corruption>/<severity>/<class>/…`, once all folders are found to have the classes of `where` and as many pictures as
    each other; the four extra corruptions where they are there. Raises InputError naming corruption and severity, MissingData for none at all."""
    directory = Path(directory)
    advice = "ImageNet-C is had with python common.py --download imagenet-c, or from https://zenodo.org/record/2235448; name its folder with --corruptions-path"
    if not directory.is_dir():
        raise MissingData(f"{directory} is missing: {advice}")
    extra = tuple(name for name in EXTRA_CORRUPTIONS if (directory / name).is_dir())
    counts = {}
    for name in CORRUPTIONS + extra:
        for severity in range(1, 6):
            folder = directory / name / str(severity)
            try:
                counts[name, severity] = check_classes(folder, class_folders(folder, advice), classes, where)
            except MissingData as error:
                raise InputError(str(error)) from error
    whole = max(counts.values())
    for (name, severity), count in counts.items():
        if count < whole:
            raise InputError(f"{directory / name / str(severity)} is half copied: {count} pictures, others have {whole}; copy or unpack it again")

    def read(name: str, severity: int) -> Folder:
        return class_folder(directory / name / str(severity), classes, resize=224)  # published at 224 px already

    return Corruptions(read, CORRUPTIONS, extra, (1, 2, 3, 4, 5), "ImageNet-C as published")


def evenly_spaced(most: int, size: int) -> torch.Tensor:
    """At most `most` of the numbers 0…size − 1, evenly spaced: (min(most, size),) int64."""
    return torch.linspace(0, size - 1, min(most, size)).round().long()


def gather_images(data: Data, most: int, workers: int, machine: "Machine") -> tuple[torch.Tensor, torch.Tensor]:
    """At most `most` images and labels of a set, evenly spaced through it, on the device of every rank alike: uint8 (n, 3, H, W), (n,)."""
    if isinstance(data, Folder):
        data = data.keep(most)
        images, labels = zip(*data.all_batches(128, workers, machine._replace(rank=0, world_size=1)))
        return torch.cat(images), torch.cat(labels)
    chosen = evenly_spaced(most, len(data[1]))
    return data[0][chosen.to(data[0].device)].to(machine.device), data[1][chosen.to(data[1].device)].to(machine.device)


class Place(NamedTuple):
    """Where an epoch is continued: after `batches` of its batches, with the generator's state of that moment."""

    batches: int = 0
    state: torch.Tensor | None = None

    def restore(self, generator: torch.Generator) -> None:
        """To be called once the epoch's order is drawn (again)."""
        if self.state is not None:
            generator.set_state(self.state)


EPOCH_START = Place()


def plain_batches(
    data: Data, batch_size: int, generator: torch.Generator, machine: "Machine", workers: int = 0, place: Place = EPOCH_START
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One shuffled epoch, batch by batch, as it is: this rank's rows as uint8 images (b, 3, H, W) and labels. batch_size is over all ranks."""
    if isinstance(data, Folder):
        batches = data.random_batches(batch_size, generator, workers, machine, crop=False, start=place.batches)
        place.restore(generator)
        yield from batches
    else:
        numbers = epoch_batches(len(data[1]), batch_size, generator)
        place.restore(generator)
        for index in numbers[place.batches :]:
            own = machine.own_rows(index)
            yield data[0][own], data[1][own]


def numbered_batches(data: Data, batches: Iterable[torch.Tensor], workers: int, machine: "Machine") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The images with these numbers, batch by batch: uint8 images (b, 3, H, W) and labels, on the device."""
    if isinstance(data, Folder):
        yield from data.numbered_batches(batches, workers, machine)
    else:
        for index in batches:
            index = index.to(data[0].device)
            yield data[0][index].to(machine.device), data[1][index].to(machine.device)


def image_batches(
    data: Data,
    batch_size: int,
    generator: torch.Generator,
    machine: "Machine",
    workers: int = 0,
    augmentation: Callable = mild_augmentation,
    place: Place = EPOCH_START,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One shuffled and augmented epoch, batch by batch: this rank's rows as float images (b, 3, H, W) in [0, 1] and labels (b,).

    data: uint8 images and labels on the device (under `augmentation`), or a Folder (random crops and flips). batch_size is over all ranks;
    order and augmentation are drawn from `generator` on every rank alike. Pictures left over by the last whole batch wait for the next epoch.
    """
    if isinstance(data, Folder):
        batches = data.random_batches(batch_size, generator, workers, machine, start=place.batches)
        place.restore(generator)
        for images, labels in batches:
            yield to_float(images), labels
    else:
        images, labels = data
        numbers = epoch_batches(len(labels), batch_size, generator)
        place.restore(generator)
        for index in numbers[place.batches :]:
            batch = augmentation(to_float(images[index]), generator)
            yield machine.own_rows(batch), machine.own_rows(labels[index])


# ---------------------------------------------------------------------------------------------------------------------
# Sets: what a run needs of a data set, whatever its kind
# ---------------------------------------------------------------------------------------------------------------------


class Sets(NamedTuple):
    """What a run needs of a data set; tensors are on the device. See load_sets."""

    train: Data | None
    val: Data | None
    test: Data
    corruptions: Corruptions | None
    num_classes: int
    size: int  # of the images, the shorter side in px
    notes: list[str]  # what is left out for want of files


FAKE_SHAPE = (256, 10, 32, 32)  # training images, classes, height, width


def dataset_name(text: str) -> str:
    """An argparse type: a data set; "cifar10-c" and the like are evaluated with the set that they are made from."""
    return text.removesuffix("-c")


def fake_shape(text: str) -> tuple[int, ...]:
    """An argparse type: IMAGES,CLASSES,HEIGHT,WIDTH."""
    try:
        values = tuple(int(part) for part in text.strip("()[]").split(","))
    except ValueError:
        values = ()
    if len(values) != 4 or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text}: four whole numbers, images, classes, height and width, such as 256,10,32,32")
    if 3 * values[0] * values[2] * values[3] > 2**36 or values[1] > 10**6:
        raise argparse.ArgumentTypeError(f"{text}: at most 64 GB of images and a million classes")
    return values


def load_sets(
    dataset: str,
    data_root: str | Path,
    machine: "Machine",
    *,
    split: str = "test",
    validation: bool = True,
    train: bool = True,
    corruptions: str | None = "if there",
    generate: bool = False,
    clean_directory: str | Path | None = None,
    corrupted_directory: str | Path | None = None,
    fake_shape: tuple[int, ...] = FAKE_SHAPE,
    download: bool = True,
    dry_run: bool = False,
) -> Sets:
    """Look for everything that a run needs of a data set, before the first file is written; InputError says what is missing and how to get it.

    dataset: one of NUM_CLASSES, "imagenet", "folder" or "fake". split: what is evaluated, "test", or "val" to tune on. validation: hold
    validation images out of the training images (digits have their own, which are never trained on). train: False where the test images
    suffice. corruptions: "needed", "if there" (a note says what is missing) or None; they are generated for digits and fake, and, with
    `generate`, for any set that has none on disk. clean_directory, corrupted_directory: where ImageNet or a folder, and the corrupted set, lie
    (default: in data_root). download: get MNIST and CIFAR where they are missing. A dry run takes a few images of each, and downloads nothing.
    """
    clean_labels = classes = test_folder = None
    if dataset in NUM_CLASSES:
        if download and not dry_run and dataset in ARCHIVES:
            machine.on_main(lambda: fetch(dataset, data_root))
        parts = [load_split(dataset, part, data_root, download=False) for part in ("train", "val", split)]
        if not validation and dataset != "digits":  # as published: all training images
            parts[0] = tuple(torch.cat(pair) for pair in zip(*parts[:2]))
        num_classes, clean_labels = NUM_CLASSES[dataset], parts[2][1]
    elif dataset == "fake":
        count, num_classes, height, width = fake_shape
        few = max(1, count // 4)
        parts = [fake_images(size, num_classes, height, width, seed) for seed, size in enumerate((count, few, few))]
    else:
        folders, classes = find_folders(dataset, Path(clean_directory or data_root), clean_directory is not None, train or split == "val")
        num_classes, test_folder = len(classes), folders[2]
        parts = [None if folder is None else class_folder(folder, classes) for folder in folders]
        if parts[1] is None and parts[0] is not None and validation:
            chosen = held_out(parts[0].labels)
            parts[0], parts[1] = (parts[0].part(rows.nonzero()[:, 0]) for rows in (~chosen, chosen))
        if split == "val":
            if parts[1] is None:
                raise InputError(f"{dataset} has no validation images of its own, and none are held out of its training images")
            parts[2] = parts[1]
    parts[1] = parts[1] if validation else None
    if dry_run:
        parts = [keep_some(part, most) for part, most in zip(parts, (64, 64, 16))]
    parts = [tuple(tensor.to(machine.device) for tensor in part) if isinstance(part, tuple) else part for part in parts]
    test, notes, found = parts[2], [], None
    if corrupted_directory and (dataset in ("digits", "fake") or split == "val"):
        raise InputError(f"--corruptions-path {corrupted_directory}: the corruptions of {dataset}'s {split} images are generated; leave it out")
    if corrupted_directory and not Path(corrupted_directory).is_dir():
        raise InputError(f"--corruptions-path {corrupted_directory} is missing")
    if corruptions:
        generate = generate or dataset in ("digits", "fake")
        try:
            if split == "val" or dataset in ("digits", "fake"):
                raise MissingData(f"published corruptions are of {dataset}'s test images")
            if dataset == "folder" and not corrupted_directory:
                raise MissingData("a folder's corrupted set is named with --corruptions-path")
            if dataset == "folder":
                found = imagenet_c(corrupted_directory, classes, test_folder)._replace(source=str(corrupted_directory))
            elif dataset == "imagenet":
                found = imagenet_c(corrupted_directory or first_directory(Path(data_root), ("imagenet-c", "ImageNet-C")), classes, test_folder)
            else:
                found = corruption_files(dataset, data_root, clean_labels, corrupted_directory)
        except MissingData as missing:
            if not generate and corruptions == "needed":
                raise InputError(f"{missing}; or add --generate-corruptions") from missing
            if not generate:
                notes.append(f"{missing}; corruptions are not evaluated (--generate-corruptions makes them)")
            else:
                found = generated_corruptions(test, f"{dataset}-C generated from the {count_images(test)} {split} images")
    if found is not None and dry_run:
        read = found.read
        found = found._replace(read=lambda name, severity: keep_some(read(name, severity), 1))
    return Sets(*parts, found, num_classes, min(test[0].shape[-2:]) if isinstance(test, tuple) else test.size, notes)


def generated_corruptions(test: Data, source: str) -> Corruptions:
    """ImageNet-C's 15 corruptions made from test images as they are asked for, with seed 0."""

    def read(name: str, severity: int) -> Data:
        if isinstance(test, Folder):
            return test.corrupted(name, severity)
        return corrupt_uint8(test[0], name, severity, seed=0), test[1]

    return Corruptions(read, CORRUPTIONS, (), (1, 2, 3, 4, 5), source)


def first_directory(root: Path, names: tuple[str, ...]) -> Path:
    """The first of these that is a directory in root; else where the first would be."""
    return next((root / name for name in names if (root / name).is_dir()), root / names[0])


def find_folders(dataset: str, root: Path, named: bool, train_needed: bool) -> tuple[list[Path | None], list[str]]:
    """The folders of training, validation and test pictures of "imagenet" or of one's own "folder", and their classes, which must agree.

    ImageNet: train/ and val/ (its test images) in <root>/imagenet or in root itself; to evaluate, val/ will do, or, where it is `named`, the folder
    of classes itself. One's own: train/, and test/ or val/ in root; where both are there, val/ is for validation. Raises InputError.
    """
    if dataset == "imagenet":
        advice = "ImageNet is had from https://image-net.org/download.php; name its folder, which holds train/ and val/, with "
        advice += "--datadir-clean" if named else "--data-root (in game_of_noise.py also --datadir-clean)"
        base = root if named or (root / "val").is_dir() else first_directory(root, ("imagenet", "ImageNet"))
        train, val, test = base / "train", None, base / "val"
        if named and not train_needed and base.is_dir() and not test.is_dir() and not train.is_dir():
            test = base
    else:
        advice = "name the folder that holds train/, and test/ or val/, each with a folder of pictures per class, with --data-root"
        train, val, test = root / "train", root / "val", root / "test"
        val, test = (val if val.is_dir() else None, test) if test.is_dir() else (None, val)
    classes = class_folders(test, advice)
    for other in (train, val):
        if other is not None and (other.is_dir() or (train_needed and other == train)):
            check_classes(other, class_folders(other, advice), classes, test)
    return [train if train.is_dir() else None, val, test], classes


# ---------------------------------------------------------------------------------------------------------------------
# Corruptions: ImageNet-C's 15 and 4 more, batched, each image's randomness a function of its own pixels
# ---------------------------------------------------------------------------------------------------------------------

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

# Severities 1..5 as published (make_cifar_c.py and make_imagenet_c.py of github.com/hendrycks/robustness): the first
# row of each name made CIFAR-10-C, the second ImageNet-C. The functions below name the numbers.
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
    "snow": (((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
              (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
             ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
              (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55))),
    # The last number is the photographs' scale: they were shrunk to a fifth for CIFAR-10-C.
    "frost": (((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
              ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1))),
    "fog": (((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
            ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    # In units of the image's side, which was 32, and for ImageNet-C 244 (written for 224: elastic_transform rescales).
    "elastic_transform": (((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
                          ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "speckle_noise": ((0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    "spatter": (((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
                 (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)),
                ((0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
                 (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1))),
    "saturate": (((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
                 ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
}
# fmt: on


@torch.no_grad()
def corrupt(images: torch.Tensor, name: str, severity: int, seed: int) -> torch.Tensor:
    """Corrupt a batch as ImageNet-C does (Hendrycks & Dietterich 2019, arXiv 1903.12261).

    images: floating (B, 3, H, W) in [0, 1], on any device, sides of 28 or more. CIFAR-10-C's constants up to 64 px on
    the longer side, ImageNet-C's above; kernels given in pixels stay as published whatever the size.
    name: one of CORRUPTIONS or EXTRA_CORRUPTIONS; severity: 1..5; seed: any integer.
    Returns a tensor of the same shape, dtype and device, in [0, 1], not quantised to 8 bits.
    An image's randomness is a function of (seed, name, severity, its own 8-bit pixels): neither the batch around it
    nor its position in it changes the result. Raises InputError for an unknown name or severity, or another shape.
    """
    functions = {
        "gaussian_noise": gaussian_noise,
        "shot_noise": shot_noise,
        "impulse_noise": impulse_noise,
        "defocus_blur": defocus_blur,
        "glass_blur": glass_blur,
        "motion_blur": motion_blur,
        "zoom_blur": zoom_blur,
        "snow": snow,
        "frost": frost,
        "fog": fog,
        "brightness": brightness,
        "contrast": contrast,
        "elastic_transform": elastic_transform,
        "pixelate": pixelate,
        "jpeg_compression": jpeg_compression,
        "speckle_noise": speckle_noise,
        "gaussian_blur": gaussian_blur,
        "spatter": spatter,
        "saturate": saturate,
    }
    if name not in functions:
        raise InputError(f"unknown corruption {name!r}; choose from {', '.join(functions)}")
    if severity not in (1, 2, 3, 4, 5):
        raise InputError(f"severity must be 1, 2, 3, 4 or 5, not {severity!r}")
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(f"images must be floating (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    constants = SEVERITIES[name][0 if max(images.shape[-2:]) <= 64 else 1][int(severity) - 1]
    constants = constants if isinstance(constants, tuple) else (constants,)
    pixels = images.float().contiguous()
    keys = image_keys(pixels, f"{name} {int(severity)} {int(seed)}")
    return functions[name](pixels, keys, *constants).clamp(0, 1).to(images.dtype)


def corrupt_uint8(images: torch.Tensor, name: str, severity: int, seed: int) -> torch.Tensor:
    """As `corrupt`, for uint8 images (N, 3, H, W), as many at a time as make a million pixels; returns uint8."""
    parts = images.split(max(1, 2**20 // (images.shape[2] * images.shape[3])))
    return torch.cat([to_uint8(corrupt(to_float(part), name, severity, seed)) for part in parts])


# Each function below takes images (B, 3, H, W), float32, keys (B,) and one severity's constants. It returns
# (B, 3, H, W) before clamping. Streams 0, 1, 2... keep the random draws of one function apart.


def gaussian_noise(images: torch.Tensor, keys: torch.Tensor, deviation: float) -> torch.Tensor:
    return images + deviation * normals(keys, 0, images.shape[1:])


def speckle_noise(images: torch.Tensor, keys: torch.Tensor, deviation: float) -> torch.Tensor:
    return images + images * deviation * normals(keys, 0, images.shape[1:])


def shot_noise(images: torch.Tensor, keys: torch.Tensor, photons: int) -> torch.Tensor:
    """Poisson counts with mean photons * x, by inversion of an exact table over the 256 pixel values."""
    most = photons + int(10 * math.sqrt(photons)) + 10
    counts = torch.arange(most, dtype=torch.float64)
    means = photons * torch.arange(256, dtype=torch.float64)[:, None] / 255
    probabilities = torch.exp(torch.xlogy(counts, means) - means - torch.lgamma(counts + 1))
    # Row v of the table is shifted to [v, v + 1], so that one sorted list serves every pixel value.
    table = probabilities.cumsum(1).clamp(max=1) + torch.arange(256)[:, None]
    values = (images * 255).round()
    drawn = torch.searchsorted(table.flatten().to(images.device), values + uniforms(keys, 0, images.shape[1:]).double())
    return (drawn - values.long() * most).float() / photons


def impulse_noise(images: torch.Tensor, keys: torch.Tensor, amount: float) -> torch.Tensor:
    """Salt and pepper: every channel of every pixel on its own, half black and half white."""
    draws = uniforms(keys, 0, images.shape[1:])
    return torch.where(draws < amount / 2, 0.0, torch.where(draws > 1 - amount / 2, 1.0, images))


def gaussian_blur(images: torch.Tensor, keys: torch.Tensor, deviation: float) -> torch.Tensor:
    return blur(images, deviation)


def defocus_blur(images: torch.Tensor, keys: torch.Tensor, radius: float, softness: float) -> torch.Tensor:
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


def glass_blur(images: torch.Tensor, keys: torch.Tensor, deviation: float, reach: int, rounds: int) -> torch.Tensor:
    """Blur, move pixels about, blur.

    The published loop visits pixels from the bottom right to the top left and means to swap each with a random
    neighbour, but its two NumPy views alias: it copies the neighbour over the pixel. We do what it does. A pixel
    that reads one not yet visited takes the original; else it takes whatever that one took. Following these
    references for all pixels at once, by pointer jumping, gives exactly the loop's result.
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
        for _ in range(6 if reach > 1 else 0):  # 2^6 references; a chain goes on with probability below a half
            final = final.gather(1, final)
        source = target.gather(1, final)
        blurred = blurred.gather(2, source[:, None].expand(-1, 3, -1))
    return blur(blurred.view(images.shape), deviation)


def motion_blur(images: torch.Tensor, keys: torch.Tensor, radius: int, deviation: float) -> torch.Tensor:
    """A one-sided Gaussian streak at an angle drawn per image from -45..45 degrees."""
    return streak(images, radius, deviation, 90 * uniforms(keys, 0, (1,)) - 45)


def zoom_blur(images: torch.Tensor, keys: torch.Tensor, count: int, step: float) -> torch.Tensor:
    """The mean of the image and its enlargements by 1, 1 + step, ..., count of them."""
    height, width = images.shape[-2:]
    total = images.double()
    for i in range(count):
        factor = 1 + i * ((1 + step) - 1)  # numpy.arange's rounding, which decides some sizes of the crop
        total = total + separable(images, zoom_matrix(height, factor), zoom_matrix(width, factor))
    return (total / (count + 1)).float()


def snow(
    images: torch.Tensor,
    keys: torch.Tensor,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: float,
    streak_deviation: float,
    keep: float,
) -> torch.Tensor:
    """Enlarged, thresholded noise, streaked towards the ground, over a whitened image."""
    height, width = images.shape[-2:]
    flakes = mean + deviation * normals(keys, 0, (1, height, width))
    flakes = separable(flakes, zoom_matrix(height, zoom), zoom_matrix(width, zoom)).float()
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = streak(flakes, radius, streak_deviation, -90 * uniforms(keys, 1, (1,)) - 45)
    grey = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]
    white = torch.maximum(images, 1.5 * grey + 0.5)
    return keep * images + (1 - keep) * white + flakes + flakes.flip(2, 3)


def frost(images: torch.Tensor, keys: torch.Tensor, keep: float, strength: float, scale: float) -> torch.Tensor:
    """keep * x + strength * ice. Differs from the paper: its ice is six photographs, ours a procedural texture."""
    return keep * images + strength * ice(keys, *images.shape[-2:], scale)


def fog(images: torch.Tensor, keys: torch.Tensor, strength: float, decay: float) -> torch.Tensor:
    """Adds a plasma fractal, then rescales so that the brightest value keeps its place."""
    height, width = images.shape[-2:]
    brightest = images.amax((1, 2, 3), keepdim=True)
    haze = plasma(keys, 2 ** math.ceil(math.log2(max(height, width))), decay)[:, None, :height, :width]
    return (images + strength * haze) * brightest / (brightest + strength)


def brightness(images: torch.Tensor, keys: torch.Tensor, shift: float) -> torch.Tensor:
    """Adds to the HSV value; hue and saturation stay, so the channels grow by one common factor."""
    value = images.amax(1, keepdim=True)
    raised = (value + shift).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp(min=1e-8)), raised)


def contrast(images: torch.Tensor, keys: torch.Tensor, factor: float) -> torch.Tensor:
    means = images.double().mean((2, 3), keepdim=True).float()
    return (images - means) * factor + means


def saturate(images: torch.Tensor, keys: torch.Tensor, factor: float, shift: float) -> torch.Tensor:
    """Scales and shifts the HSV saturation. Grey has hue 0, so a shift turns it reddish, as it did when published."""
    value = images.amax(1, keepdim=True)
    distance = value - images  # hue fixes the ratios of the channels' distances to V
    spread = distance.amax(1, keepdim=True)
    red = torch.tensor([0.0, 1.0, 1.0], device=images.device).view(1, 3, 1, 1)
    direction = torch.where(spread > 0, distance / spread.clamp(min=1e-8), red)
    saturation = (spread / value.clamp(min=1e-8) * factor + shift).clamp(0, 1)
    return value * (1 - saturation * direction)


def elastic_transform(images: torch.Tensor, keys: torch.Tensor, amplitude: float, smoothness: float, jitter: float) -> torch.Tensor:
    """A random affine map (three points moved by up to jitter), then a smooth displacement of every pixel."""
    height, width = images.shape[-2:]
    unit = max(height, width) * (244 / 224 if max(height, width) > 64 else 1)
    rows = torch.arange(height, device=images.device)[:, None].float()
    columns = torch.arange(width, device=images.device).float()
    # The points are (centre_x, centre_y) + (arm, arm), (arm, -arm), (-arm, -arm), each moved by its (x, y).
    arm, centre_x, centre_y = min(height, width) // 3, width // 2, height // 2
    moves = jitter * unit * (2 * uniforms(keys, 0, (3, 2)) - 1)
    (x0, y0), (x1, y1), (x2, y2) = moves.permute(1, 2, 0)[..., None, None]  # (B, 1, 1) each
    a, b, c, d = 1 + (x1 - x2) / (2 * arm), (x0 - x1) / (2 * arm), (y1 - y2) / (2 * arm), 1 + (y0 - y1) / (2 * arm)
    right, down = columns - centre_x - arm - x0, rows - centre_y - arm - y0
    # Every pixel reads where the inverse of [[a, b], [c, d]] takes it; mirrored about the border pixels' centres.
    x = (d * right - b * down) / (a * d - b * c) + centre_x + arm
    y = (a * down - c * right) / (a * d - b * c) + centre_y + arm
    warped = sample(images, x, y, align_corners=True)
    shifts = blur(2 * uniforms(keys, 1, (2, height, width)) - 1, smoothness * unit, truncate=3, mirrored=True)
    shifts = amplitude * unit * shifts  # (B, 2, H, W)
    return sample(warped, columns + shifts[:, 0], rows + shifts[:, 1], align_corners=False)  # and about the edges


def pixelate(images: torch.Tensor, keys: torch.Tensor, factor: float) -> torch.Tensor:
    """PIL's resize with BOX down to int(side * factor) and up again."""
    rows, columns = ((box_matrix(int(side * factor), side) @ box_matrix(side, int(side * factor))) for side in images.shape[-2:])
    return separable(images, rows, columns).float()


def jpeg_compression(images: torch.Tensor, keys: torch.Tensor, quality: int) -> torch.Tensor:
    """libjpeg's baseline round trip at PIL's quality: 4:2:0 chroma, smooth upsampling, its roundings at every stage."""
    height, width = images.shape[-2:]
    device = images.device
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    to_ycc = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]], dtype=torch.float64, device=device
    )
    centre = torch.tensor([0.0, 128, 128], dtype=torch.float64, device=device).view(3, 1, 1)
    pixels = F.pad((images * 255).round().double(), (0, -width % 16, 0, -height % 2), mode="replicate")
    ycc = round_away((to_ycc @ pixels.flatten(2)).view(pixels.shape) + centre)
    odd = torch.arange(pixels.shape[-1], device=device) % 2  # chroma's halves are rounded up and down by turns
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


def spatter(
    images: torch.Tensor, keys: torch.Tensor, mean: float, deviation: float, smoothness: float, threshold: float, strength: float, mud: int
) -> torch.Tensor:
    """Drops where smoothed noise passes a threshold: shaded pale water, or opaque brown mud.

    Differs from the paper in the water's shading, which follows the distance to the drops' edges: our edges are the
    drops' outlines instead of Canny's, and the distance is counted in chessboard moves instead of Euclidean.
    """
    height, width = images.shape[-2:]
    liquid = blur(mean + deviation * normals(keys, 0, (1, height, width)), smoothness)
    if mud:
        cover = blur((liquid > threshold).float(), strength)
        cover = torch.where(cover < 0.8, 0.0, cover)
        return images * (1 - cover) + cover * torch.tensor([63, 42, 20], device=images.device).view(3, 1, 1) / 255
    liquid = torch.where(liquid < threshold, 0.0, liquid)
    drops = (liquid > 0).float()
    reached = drops + F.max_pool2d(-drops, 3, 1, 1)  # the outlines, 1 px wide
    distance = torch.zeros_like(drops)  # to the nearest outline, at most 20
    for _ in range(20):
        distance += 1 - reached
        reached = F.max_pool2d(reached, 3, 1, 1)
    distance = box_mean(distance).long()  # 0..20
    histogram = torch.zeros(len(images), 21, device=images.device)
    histogram.scatter_add_(1, distance.flatten(1), torch.ones_like(drops).flatten(1))
    cumulative = histogram.cumsum(1)
    lowest = cumulative.gather(1, distance.flatten(1).amin(1, keepdim=True))
    equalised = ((cumulative - lowest) / (height * width - lowest).clamp(min=1) * 255).round()
    relief = equalised.gather(1, distance.flatten(1)).view(distance.shape)
    emboss = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=torch.float64, device=images.device)
    relief = F.conv2d(F.pad(relief, [1] * 4, mode="reflect").double(), emboss[None, None]).float().clamp(0, 255)
    cover = liquid * box_mean(relief)
    cover = strength * cover / cover.amax((1, 2, 3), keepdim=True).clamp(min=1e-8)
    return images + cover * torch.tensor([175, 238, 238], device=images.device).view(3, 1, 1) / 255


# Random numbers: a counter hashed with the image's key. No generator, so no order of drawing.


def scramble(bits: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64, in place. torch shifts signed numbers, hence the masks; products wrap."""
    bits ^= (bits >> 30).bitwise_and_((1 << 34) - 1)
    bits *= -0x40A7B892E31B1A47
    bits ^= (bits >> 27).bitwise_and_((1 << 37) - 1)
    bits *= -0x6B2FB644ECCEEE15
    bits ^= (bits >> 31).bitwise_and_((1 << 33) - 1)
    return bits


def image_keys(images: torch.Tensor, label: str) -> torch.Tensor:
    """One 64-bit key per image: (B, 3, H, W) in [0, 1] -> (B,) int64. Integer sums: exact in any order."""
    pixels = (images * 255).round().long().flatten(1)
    weights = scramble(torch.arange(1, pixels.shape[1] + 1, device=images.device))
    salt = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little", signed=True)
    return scramble((pixels * weights).sum(1) + salt)


def uniforms(keys: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    """(B, *shape) float32, uniform on the open interval (0, 1) in steps of 2^-23; two from each 64-bit hash."""
    count = math.prod(shape)
    counters = scramble(torch.arange((count + 1) // 2, device=keys.device) + (stream << 40) + 1)
    bits = scramble(keys[:, None] + counters)
    halves = torch.cat([bits >> 41, bits >> 18], 1).bitwise_and_((1 << 23) - 1)[:, :count]
    return ((halves.float() + 0.5) * 2.0**-23).view(-1, *shape)


def normals(keys: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    """(B, *shape) float32, standard normal (Box-Muller)."""
    half = (math.prod(shape) + 1) // 2
    draws = uniforms(keys, stream, (2, half))
    length, angle = (-2 * draws[:, 0].log()).sqrt(), 2 * math.pi * draws[:, 1]
    return torch.cat([length * angle.cos(), length * angle.sin()], 1)[:, : math.prod(shape)].view(-1, *shape)


def plasma(keys: torch.Tensor, side: int, decay: float) -> torch.Tensor:
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
        step, amplitude = half, amplitude / decay**2  # published: wibble * U(-wibble, wibble), hence the square
    field -= field.amin((1, 2), keepdim=True)
    return field / field.amax((1, 2), keepdim=True)


def ice(keys: torch.Tensor, height: int, width: int, scale: float) -> torch.Tensor:
    """Frost on a dark window: patches of bright needles in three directions. (B, 3, H, W) in [0, 1].

    scale: a needle is about 4 * scale px wide and 20 * scale px long; the mean is about 0.13.
    """
    rows = torch.arange(height, device=keys.device)[:, None].float()
    columns = torch.arange(width, device=keys.device).float()
    tilt = 2 * math.pi * uniforms(keys, 0, (1, 1))
    needles = 0
    for i in range(3):
        cosine, sine = (tilt + i * math.pi / 3).cos(), (tilt + i * math.pi / 3).sin()  # (B, 1, 1)
        along = (columns * cosine + rows * sine) / (20 * scale)
        across = (rows * cosine - columns * sine) / (4 * scale)
        lattice = uniforms(keys, 1 + i, (1, 32, 32))
        needles = needles + (3.6 * sample(lattice, along + 16, across + 16, align_corners=True) - 2.2).clamp(0, 1)
    patches = plasma(keys, 2 ** math.ceil(math.log2(max(height, width))), 1.3)[:, None, :height, :width]
    bright = 0.03 + (8 * patches - 4.8).clamp(0, 1) * (0.3 + 0.67 * needles.clamp(max=1))
    return bright * torch.tensor([0.86, 0.94, 1.0], device=keys.device).view(3, 1, 1)


# Linear maps along rows and columns, as float64 matrices: exact to rounding whatever the batch size, and neither
# TF32 nor autocast touches them.


def separable(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """rows (H', H) @ image @ columns (W', W) transposed, for (B, C, H, W): (B, C, H', W') float64."""
    return rows.to(images.device) @ (images.double() @ columns.T.to(images.device))


def blur(images: torch.Tensor, deviation: float, truncate: float = 4, mirrored: bool = False) -> torch.Tensor:
    """Gaussian blur, cut at `truncate` deviations; borders repeat the last pixel, or mirror about the edge."""
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


def zoom_matrix(side: int, factor: float) -> torch.Tensor:
    """(side, side): the middle ceil(side / factor) pixels, linearly enlarged with their ends kept, cut to side."""
    crop = math.ceil(side / factor)
    zoomed = round(crop * factor)
    positions = (torch.arange(side, dtype=torch.float64) + (zoomed - side) // 2) * (crop - 1) / (zoomed - 1)
    return (1 - (positions[:, None] + (side - crop) // 2 - torch.arange(side)).abs()).clamp(min=0)


def box_matrix(side: int, resized: int) -> torch.Tensor:
    """(resized, side): PIL's BOX filter, the mean of the pixels whose centres fall in the box."""
    ratio = side / resized
    centres = (torch.arange(resized, dtype=torch.float64) + 0.5) * ratio
    distance = (torch.arange(side) + 0.5 - centres[:, None]) / max(ratio, 1)
    inside = ((distance > -0.5) & (distance <= 0.5)).double()
    return inside / inside.sum(1, keepdim=True)


def dct_matrix(side: int) -> torch.Tensor:
    """(side, side): orthonormal 8-point DCT-II on every run of 8."""
    angles = torch.outer(torch.arange(8), 2 * torch.arange(8) + 1).double() * math.pi / 16
    basis = angles.cos() / 2
    basis[0] /= math.sqrt(2)
    return torch.block_diag(*[basis] * (side // 8))


def round_away(values: torch.Tensor) -> torch.Tensor:
    """Nearest integer, halves away from zero as in libjpeg; the nudge keeps rounding noise from deciding ties."""
    return values.sign() * (values.abs() + 0.5 + 1e-9).floor()


def box_mean(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(images, [1] * 4, mode="reflect"), 3, 1)


def sample(images: torch.Tensor, x: torch.Tensor, y: torch.Tensor, align_corners: bool) -> torch.Tensor:
    """Bilinear look-up at pixel positions x, y (B, H, W); outside, mirrored about border pixels' centres or edges."""
    height, width = images.shape[-2:]
    if align_corners:
        grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    else:
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=align_corners)


def streak(images: torch.Tensor, radius: int, deviation: float, degrees: torch.Tensor) -> torch.Tensor:
    """ImageMagick's motion blur: whole-pixel steps along the angle (B, 1), Gaussian weights, borders repeated."""
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
            total += weight * images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view(images.shape)
    return total


# Annex K of the JPEG standard (ITU-T T.81), tables K.1 and K.2.
# fmt: off
JPEG_LUMINANCE = (16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
                  14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
                  49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99)
JPEG_CHROMINANCE = (17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
                    47, 66, 99, 99, 99, 99, 99, 99) + (99,) * 32
# fmt: on


def example_pictures(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Procedural photograph-like pictures, (count, 3, side, side) in [0, 1]: soft light, texture, hard edges."""
    keys = scramble(torch.arange(count) + (seed << 32) + 1)
    size = 2 ** math.ceil(math.log2(side))
    light = torch.stack([plasma(keys + i, size, 1.5) for i in range(4)], 1)[..., :side, :side]
    pictures = 0.6 * light[:, :1] + 0.4 * light[:, 1:]
    grid = (torch.arange(side) + 0.5) / side
    for i in range(8):  # ellipses and boxes, every other pair striped
        place = uniforms(keys, 100 + i, (10,))[..., None, None]
        x = (grid - place[:, 0]) / (0.1 + 0.2 * place[:, 1])
        y = (grid[:, None] - place[:, 2]) / (0.1 + 0.2 * place[:, 3])
        inside = x**2 + y**2 < 1 if i % 2 else (x.abs() < 0.8) & (y.abs() < 0.8)
        shade = (0.7 + 0.6 * (light[:, :1] - 0.5)) * (1 - (i // 2 % 2) * 0.5 * ((2 * (x + y))[:, None] % 2 < 1))
        pictures = torch.where(inside[:, None], place[:, 4:7] * shade, pictures)
    return pictures.clamp(0, 1)


def contact_sheet(path: str | Path) -> None:
    """Draw every corruption at every severity to a PNG: 96 px (ImageNet-C's constants), 32 px (CIFAR-10-C's)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, sides = CORRUPTIONS + EXTRA_CORRUPTIONS, (96, 32)
    figure, axes = pyplot.subplots(len(names), 12, figsize=(15, 23.5), dpi=100)
    for row, name in zip(axes, names, strict=True):
        for i, side in enumerate(sides):
            clean = example_pictures(1, side, seed=3)
            for severity in range(6):
                axis = row[6 * i + severity]
                image = corrupt(clean, name, severity, seed=0) if severity else clean
                axis.imshow(image[0].permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                if name == names[0]:
                    axis.set_title(f"{side} px, " + (f"severity {severity}" if severity else "clean"), fontsize=9)
        row[0].set_ylabel(name.replace("_", "\n"), fontsize=9, rotation=0, ha="right", va="center")
    figure.subplots_adjust(0.07, 0.005, 0.998, 0.985, 0.02, 0.03)
    figure.savefig(path)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Models: images in [0, 1], (B, 3, H, W) → logits (B, num_classes); normalisation happens inside
# ---------------------------------------------------------------------------------------------------------------------


class ResNeXtBottleneck(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, cardinality: int, group_width: int, stride: int):
        super().__init__()
        channels = cardinality * group_width
        self.conv_reduce = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(channels)
        self.conv_conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=cardinality, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.conv_expand = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn_reduce(self.conv_reduce(x)), inplace=True)
        out = F.relu(self.bn(self.conv_conv(out)), inplace=True)
        out = self.bn_expand(self.conv_expand(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNeXt(nn.Module):
    """ResNeXt-29 (4×32d) for 32 px images (Xie et al. 2017, section 5.3), with the key names of AugMix's CIFAR checkpoints.

    width is the number of channels of the first convolution: 64 as published, 4 for digits.
    """

    def __init__(self, num_classes: int, depth: int = 29, cardinality: int = 4, base_width: int = 32, width: int = 64):
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(width)
        channels = width
        for stage in range(3):
            planes = width * 2**stage
            blocks = []
            for block in range((depth - 2) // 9):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResNeXtBottleneck(channels, 4 * planes, cardinality, planes * base_width // 64, stride))
                channels = 4 * planes
            self.add_module(f"stage_{stage + 1}", nn.Sequential(*blocks))
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn_1(self.conv_1_3x3(images * 2 - 1)), inplace=True)  # mean and std 0.5, as AugMix
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        return self.classifier(x.mean((2, 3)))


class WideResNetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True))
        return out + shortcut


class WideResNet(nn.Module):
    """Wide ResNet (Zagoruyko & Komodakis 2016) for 32 px images, with the key names of AugMix's CIFAR checkpoints.

    width is the number of channels of the first convolution: 16 as published, 4 for digits.
    """

    def __init__(self, num_classes: int, depth: int = 40, widen_factor: int = 2, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        channels = width
        for stage in range(3):
            out_channels = width * widen_factor * 2**stage
            blocks = nn.Sequential()
            for block in range((depth - 4) // 6):
                blocks.append(WideResNetBlock(channels, out_channels, 2 if stage > 0 and block == 0 else 1))
                channels = out_channels
            self.add_module(f"block{stage + 1}", nn.ModuleDict({"layer": blocks}))
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv1(images * 2 - 1)  # mean and std 0.5, as AugMix
        for block in (self.block1, self.block2, self.block3):
            x = block["layer"](x)
        return self.fc(F.relu(self.bn1(x), inplace=True).mean((2, 3)))


class ShakeShakeBlock(nn.Module):
    """A skip path plus the mix of two residual branches, each ReLU-Conv-BN-ReLU-Conv-BN.

    Where the number of channels changes, the skip path is ReLU, two 1×1 convolutions for half of the channels each, and BN: one convolution sees
    every stride-th pixel, the other the same pixels of the image shifted by one right and down.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.branch1, self.branch2 = (
            nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )
            for _ in range(2)
        )
        self.skip1 = self.skip2 = self.bn_skip = None
        if in_channels != out_channels:
            self.skip1 = nn.Conv2d(in_channels, out_channels // 2, 1, stride, bias=False)
            self.skip2 = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, stride, bias=False)
            self.bn_skip = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(x)
        if self.bn_skip is not None:
            x = self.bn_skip(torch.cat([self.skip1(active), self.skip2(F.pad(active, (1, -1, 1, -1)))], 1))
        return x + shake_even(self.branch1(active), self.branch2(active), self.training)


def shake_even(one: torch.Tensor, other: torch.Tensor, training: bool) -> torch.Tensor:
    """α·one + (1 - α)·other with α ~ U(0, 1) per image in training, their mean in evaluation; the gradient is the mean's ("Shake-Even-Image")."""
    mean = (one + other) / 2
    if not training:
        return mean
    alpha = torch.rand(len(one), 1, 1, 1, device=one.device)
    return mean + ((alpha - 0.5).to(one.dtype) * (one - other)).detach()


class ShakeShake(nn.Module):
    """Shake-Shake 26 2×{width}d for 32 px images (Gastaldi 2017, arXiv 1705.07485), "Shake-Even-Image": see shake_even.

    Every block draws its own α for every image, from torch's generator of the device. width is the number of channels of the first stage: 32,
    96 or 112 as published, 4 to 10 for digits.
    """

    def __init__(self, num_classes: int, width: int, depth: int = 26):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential()
        channels = 16
        for stage in range(3):
            for block in range((depth - 2) // 6):
                self.blocks.append(ShakeShakeBlock(channels, width * 2**stage, 2 if stage > 0 and block == 0 else 1))
                channels = width * 2**stage
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.bn(self.conv(images * 2 - 1)))
        return self.fc(F.relu(x, inplace=True).mean((2, 3)))


class ShakeDrop(nn.Module):
    """ShakeDrop (Yamada et al. 2018, arXiv 1802.02375): the scale of a residual branch F is disturbed, forward and backward differently.

    In training F is multiplied by b + α - bα going forward and its gradient by b + β - bβ going backward; in evaluation F is multiplied by the
    expectation of the former, P(b = 1) = 1 - death_rate. b ~ Bernoulli is one gate per layer for the whole batch (a rank's own), as in
    stochastic depth (Huang et al. 2016), on which this builds, and as Fast AutoAugment's code draws it; α ~ U(-1, 1) and β ~ U(0, 1) are one per
    layer and image. All come from torch's generator of the device.
    """

    def __init__(self, death_rate: float):
        super().__init__()
        self.death_rate = death_rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x * (1 - self.death_rate)
        b = torch.rand(1, 1, 1, 1, device=x.device) >= self.death_rate
        alpha, beta = torch.rand(2, len(x), 1, 1, 1, device=x.device)
        ahead, back = (torch.where(b, 1.0, factor).to(x.dtype) for factor in (2 * alpha - 1, beta))
        return back * x + ((ahead - back) * x).detach()

    def extra_repr(self) -> str:
        return f"death_rate={self.death_rate:g}"


class PyramidBottleneck(nn.Module):
    """BN-Conv1×1-BN-ReLU-Conv3×3-BN-ReLU-Conv1×1-BN beside a shortcut without weights: average pooling for stride 2, zeros for new channels."""

    def __init__(self, in_channels: int, channels: int, stride: int, death_rate: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(4 * channels)
        self.shake_drop = ShakeDrop(death_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn2(self.conv1(self.bn1(x))), inplace=True)
        out = F.relu(self.bn3(self.conv2(out)), inplace=True)
        out = self.shake_drop(self.bn4(self.conv3(out)))
        if self.conv2.stride != (1, 1):
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return out + F.pad(x, (0, 0, 0, 0, 0, out.shape[1] - x.shape[1]))


class PyramidNet(nn.Module):
    """PyramidNet-272 (α̃ = 200) of bottlenecks for 32 px images (Han et al. 2017, arXiv 1610.02915) with ShakeDrop.

    Block l of L has ⌊width + widening·l/L⌋ channels, four times as many at its end, and the death rate death_rate·l/L. Rounding down gives the
    published 26.0 M parameters, rounding to the nearest 26.2 M. width is the number of channels of the first convolution: 16 as published, 4 for
    digits, where death_rate is 0.1: 0.5 is for 90 blocks, and keeps 6 narrow ones from learning.
    """

    def __init__(self, num_classes: int, depth: int = 272, widening: int = 200, width: int = 16, death_rate: float = 0.5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential()
        in_channels, stage_blocks = width, (depth - 2) // 9
        total = 3 * stage_blocks
        for block in range(1, total + 1):
            channels = width + widening * block // total
            stride = 2 if block in (stage_blocks + 1, 2 * stage_blocks + 1) else 1
            self.blocks.append(PyramidBottleneck(in_channels, channels, stride, death_rate * block / total))
            in_channels = 4 * channels
        self.bn2 = nn.BatchNorm2d(in_channels)
        self.fc = nn.Linear(in_channels, num_classes)
        initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.bn1(self.conv1(images * 2 - 1)))
        return self.fc(F.relu(self.bn2(x), inplace=True).mean((2, 3)))


def bottleneck_resnet(num_classes: int, layers: tuple[int, ...], deep_stem: bool = False, width: int = 64) -> nn.Module:
    """torchvision's ResNet of bottlenecks with so many `layers` per stage, and its key names; the input's normalisation is left to build_model.

    deep_stem makes it ResNet-D (He et al. 2019, arXiv 1812.01187): three 3×3 convolutions instead of one 7×7, and in the shortcuts that downsample
    2×2 average pooling before a 1×1 convolution of stride 1; the names of those are timm's. width is the number of channels of the first
    stage's bottlenecks: 64 as published, 4 for digits.
    """
    from torchvision.models.resnet import Bottleneck, ResNet  # takes a second to import, so only when asked for

    class SlimResNet(ResNet):
        def _make_layer(self, block: type, planes: int, *arguments, **settings) -> nn.Sequential:
            return super()._make_layer(block, planes * width // 64, *arguments, **settings)

    model = (ResNet if width == 64 else SlimResNet)(Bottleneck, list(layers), num_classes)
    if width != 64:
        model.fc = nn.Linear(model.inplanes, num_classes)
    if deep_stem:
        stem = []
        for in_channels, out_channels, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
            stem += [nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
        model.conv1 = nn.Sequential(*stem[:-2])  # the last BN and ReLU are the model's own
        for module in model.conv1:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            conv, norm = stage[0].downsample
            pool = nn.Identity() if conv.stride == (1, 1) else nn.AvgPool2d(2, ceil_mode=True)
            conv.stride = (1, 1)
            stage[0].downsample = nn.Sequential(pool, conv, norm)
    return model


def initialise(model: nn.Module) -> None:
    """He initialisation by fan-out for convolutions, zero biases (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


# Models by name. On digits the same constructors are slim and shallow, so that two CPU cores suffice; a student is a small white-box stand-in.
MODELS = {
    "resnext": lambda num_classes: ResNeXt(num_classes),
    "wideresnet": lambda num_classes: WideResNet(num_classes),
    "wresnet40_2": lambda num_classes: WideResNet(num_classes),
    "wresnet28_10": lambda num_classes: WideResNet(num_classes, depth=28, widen_factor=10),
    "shake26_2x32d": lambda num_classes: ShakeShake(num_classes, width=32),
    "shake26_2x96d": lambda num_classes: ShakeShake(num_classes, width=96),
    "shake26_2x112d": lambda num_classes: ShakeShake(num_classes, width=112),
    "pyramid272": lambda num_classes: PyramidNet(num_classes),
    "resnet50": lambda num_classes: bottleneck_resnet(num_classes, (3, 4, 6, 3)),
    "resnet50d": lambda num_classes: bottleneck_resnet(num_classes, (3, 4, 6, 3), deep_stem=True),
    "resnet200": lambda num_classes: bottleneck_resnet(num_classes, (3, 24, 36, 3)),
    "student": lambda num_classes: torchvision_model("resnet18", num_classes, (0.5,) * 3, (0.5,) * 3),
}
DIGITS_MODELS = {
    "resnext": lambda num_classes: ResNeXt(num_classes, width=4),
    "wideresnet": lambda num_classes: WideResNet(num_classes, width=4),
    "wresnet40_2": lambda num_classes: WideResNet(num_classes, width=4),
    "wresnet28_10": lambda num_classes: WideResNet(num_classes, depth=10, widen_factor=4, width=4),
    "shake26_2x32d": lambda num_classes: ShakeShake(num_classes, width=4, depth=14),
    "shake26_2x96d": lambda num_classes: ShakeShake(num_classes, width=8, depth=14),
    "shake26_2x112d": lambda num_classes: ShakeShake(num_classes, width=10, depth=14),
    "pyramid272": lambda num_classes: PyramidNet(num_classes, depth=20, widening=16, width=4, death_rate=0.1),
    "resnet50": lambda num_classes: bottleneck_resnet(num_classes, (2, 2, 2, 2), width=4),
    "resnet50d": lambda num_classes: bottleneck_resnet(num_classes, (2, 2, 2, 2), deep_stem=True, width=4),
    "resnet200": lambda num_classes: bottleneck_resnet(num_classes, (2, 4, 6, 2), width=4),
    "student": lambda num_classes: WideResNet(num_classes, depth=16, width=4),
}


def build_model(name: str, num_classes: int, dataset: str) -> nn.Module:
    """An untrained classifier from images in [0, 1], (B, 3, H, W), to logits (B, num_classes).

    name: a key of MODELS, or any classification model of torchvision by its name there ("resnet50", "convnext_tiny", …).
    dataset: its image statistics are used for normalisation; "digits" and "mnist" take the slim widths. Raises InputError for an unknown name.
    """
    imagenet = normalisation(dataset, name) == IMAGENET_STATISTICS
    statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if imagenet else ((0.5,) * 3, (0.5,) * 3)
    models = DIGITS_MODELS if dataset in ("digits", "mnist") else MODELS
    if name not in models:
        return torchvision_model(name, num_classes, *statistics)
    model = models[name](num_classes)
    return normalise_inside(model, *statistics) if name in RESNETS else model  # the others do it themselves


RESNETS = ("resnet50", "resnet50d", "resnet200")  # of MODELS: normalise as torchvision's do
IMAGENET_STATISTICS = "ImageNet's mean and std"


def normalisation(dataset: str, name: str) -> str:
    """How a classifier's inputs are normalised, for the protocol."""
    # torchvision's Inception and GoogLeNet were trained on inputs normalised by 0.5/0.5, its other ImageNet models by ImageNet's statistics.
    imagenet = dataset in ("imagenet", "folder", "chexpert") and name not in ("googlenet", "inception_v3") and (name not in MODELS or name in RESNETS)
    return IMAGENET_STATISTICS if imagenet else "0.5/0.5"


def torchvision_model(name: str, num_classes: int, mean: tuple, std: tuple) -> nn.Module:
    """A torchvision classification model with random weights that normalises its input itself; its key names are torchvision's."""
    from torchvision import models  # takes a second to import, so only when asked for

    if name not in models.list_models(module=models):
        raise InputError(f"unknown model '{name}': choose {', '.join(MODELS)}, or a classification model of torchvision such as resnet50")
    auxiliary = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    auxiliary |= {"transform_input": False} if auxiliary else {}
    with warnings_off():
        model = models.get_model(name, weights=None, num_classes=num_classes, **auxiliary)
    return normalise_inside(model, mean, std)


def normalise_inside(model: nn.Module, mean: tuple, std: tuple) -> nn.Module:
    """The model, which from now on normalises its input itself."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    # A hook rather than a wrapping module: the state dict keeps torchvision's keys, so that published weights load as they are.
    model.register_buffer("normalisation", torch.cat([mean, std]), persistent=False)
    model.register_forward_pre_hook(normalise_input)
    return model


def normalise_input(model: nn.Module, inputs: tuple) -> tuple:
    mean, std = model.normalisation.to(inputs[0].dtype).split(1)
    return ((inputs[0] - mean) / std,)


def check_input_size(model: nn.Module, name: str, size: int) -> None:
    """Raise InputError where the model does not take square images of this size: some of torchvision's need 224 px."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"model '{name}' does not take {size} px images: {str(error).splitlines()[0]}; choose another --model") from error
    model.train(training)


def load_weights(model: nn.Module, file: str | Path) -> nn.Module:
    """Load a checkpoint into `model` and return it.

    The file holds a state dict, alone or under `state_dict`, `model_state_dict` or `weights`, with or without `module.` (or
    `_orig_mod.`, `resnet.`) before every key. RobustBench's names are taken too: `convShortcut`, and `mu` and `sigma`, the statistics its
    models normalise their input by, which must be this model's. Only tensors are unpickled (`weights_only=True`). Raises InputError for a
    missing, truncated or unsafe file, and for one that does not fit, naming the keys.
    """
    return load_content(model, load_tensors(file, "give the path of a checkpoint"), file)


def load_content(model: nn.Module, state: object, file: str | Path) -> nn.Module:
    """As load_weights, from what the file held."""
    for key in ("state_dict", "model_state_dict", "weights"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not is_state_dict(state):
        raise InputError(f"{file} holds no state dict (nor one under state_dict, model_state_dict, weights)")
    for prefix in ("module.", "_orig_mod.", "resnet."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    wanted = model.state_dict()
    for key in [key for key in state if key not in wanted and key.replace("convShortcut", "conv_shortcut") in wanted]:
        state[key.replace("convShortcut", "conv_shortcut")] = state.pop(key)
    # The CIFAR models, which have no such buffer, normalise by 0.5/0.5.
    for key, own in zip(("mu", "sigma"), dict(model.named_buffers(recurse=False)).get("normalisation", torch.full((2, 3), 0.5)).flatten(1).cpu()):
        if key in state and key not in wanted:
            value = state.pop(key)
            if value.numel() != own.numel() or not torch.allclose(value.flatten().float(), own):
                rounded = ", ".join(f"{number:.4g}" for number in value.flatten().tolist()) if value.numel() <= 3 else f"{tuple(value.shape)}"
                raise InputError(
                    f"{file} was trained on inputs normalised otherwise: its {key} is {rounded}, this model's {own[0]:.4g}; choose another checkpoint"
                )
    return load_state(model, state, f"{file} does not fit this model", "choose the --model and --dataset it was trained for")


def is_state_dict(state: object) -> bool:
    """Whether this is a table of plain tensors: none that is sparse, nested, complex, quantised, or a shape without values."""

    def plain(value: object) -> bool:
        usual = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        return usual and not (value.is_nested or value.is_quantized or value.is_complex())

    return isinstance(state, dict) and bool(state) and all(isinstance(key, str) and plain(value) for key, value in state.items())


def load_state(model: nn.Module, state: dict[str, torch.Tensor], complaint: str, advice: str) -> nn.Module:
    """Put a state dict into `model` and return it. InputError, naming the keys, between `complaint` and `advice`, for one that does not fit."""
    wanted = model.state_dict()
    # Counters are not in every checkpoint (torch < 0.4.1 had none) and nothing depends on them here.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    misshaped = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    faults = [
        f"{kind} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if keys
    ]
    if faults:
        raise InputError(f"{complaint}: {'; '.join(faults)}; {advice}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # numbers of a type that does not become the model's
        raise InputError(f"{complaint}: {error}; {advice}") from error
    return model


def load_pretrained(model: nn.Module, name: str, dataset: str, machine: "Machine", data_root: str | Path = "data", dry_run: bool = False) -> str:
    """Give `model` the weights that come for a data set, and say where they are from.

    digits, mnist: shipped, or trained first and kept (load_small_weights); cifar10, cifar100: AugMix's, published (default_checkpoint); imagenet and
    folder: torchvision's (load_imagenet_weights); fake: none. Raises InputError where there are none: --weights gives them.
    """
    if dataset in ("digits", "mnist"):
        return load_small_weights(model, name, dataset, machine, data_root, dry_run)
    if dataset in ("imagenet", "folder"):
        return load_imagenet_weights(model, name, machine, dry_run)
    if dataset == "fake":
        return "untrained"
    published = default_checkpoint(dataset, name)
    if published is None:
        raise InputError(f"no weights of {name} for {dataset} are published that are known here: give a checkpoint with --weights")
    return str(load_checkpoint(model, published, machine, dry_run) or "untrained")


def load_small_weights(model: nn.Module, name: str, dataset: str, machine: "Machine", data_root: str | Path = "data", dry_run: bool = False) -> str:
    """Load the classifier `name` of digits or mnist (weights/<dataset>-<name>.pt; some of digits are shipped) into `model`, and say where it is
    from; where the file is missing, train it first and keep it, but not in a dry run."""
    file = WEIGHTS / f"{dataset}-{name}.pt"
    if not file.is_file() and dry_run:
        return "untrained: a dry run trains no classifier first"
    if not file.is_file():
        if machine.is_main:
            print(f"{file} is missing: training {name} on the training images of {dataset} first", flush=True)
        epochs, batch_size = (30, 50) if dataset == "digits" else (3, 100)
        # The caller's random state must not depend on whether a file was at hand.
        with torch.random.fork_rng(devices=[machine.device] if machine.device.type == "cuda" else []):
            trained = train_classifier(name, machine, data_root, epochs=epochs, batch_size=batch_size, dataset=dataset)  # alike on every rank
        machine.on_main(lambda: save_atomically(trained.state_dict(), file))
    load_weights(model, file)
    return str(file)


def load_imagenet_weights(model: nn.Module, name: str, machine: "Machine", dry_run: bool = False) -> str:
    """Load torchvision's ImageNet weights (IMAGENET1K_V1) into a model of torchvision's and say where they came from.

    They are downloaded once (torch.hub's cache, checksum in the file name). A model with another number of classes keeps its own, untrained
    last layer. A dry run downloads nothing: where the file is not on disk, the model stays untrained.
    """
    from torchvision import models

    try:
        url = models.get_model_weights(name).IMAGENET1K_V1.url
    except (ValueError, AttributeError) as error:
        raise InputError(f"torchvision has no IMAGENET1K_V1 weights of '{name}': give a checkpoint with --weights") from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not file.is_file() and dry_run:
        return "untrained: a dry run downloads nothing"
    machine.on_main(lambda: download(url, file, Path(url).stem.split("-")[-1]))
    again = "remove it, so that it is downloaded again"
    state = load_tensors(file, again)
    if not is_state_dict(state):
        raise InputError(f"{file} holds no state dict: {again}")
    wanted = model.state_dict()
    # Auxiliary heads are for training from scratch; a head of another number of classes gives way to the model's own.
    state = {key: value for key, value in state.items() if key in wanted or not key.lower().startswith("aux")}
    head = [key for key in state if key in wanted and state[key].shape[:1] == (1000,) and wanted[key].shape[:1] != (1000,)]
    load_state(model, state | {key: wanted[key] for key in head}, f"{file} does not fit {name}", again)
    return f"{file}" + (f", but for {', '.join(head)} (another number of classes)" if head else "")


def train_classifier(
    name: str, machine: "Machine", data_root: str | Path = "data", epochs: int = 30, batch_size: int = 50, dataset: str = "digits"
) -> nn.Module:
    """A classifier of digits or mnist: SGD with Nesterov momentum 0.9, weight decay 5e-4, one-cycle learning rate, label smoothing 0.1, mild
    augmentation."""
    from tqdm import tqdm

    lr, seed = 0.1, 0
    torch.manual_seed(seed)
    model = build_model(name, 10, dataset).to(machine.device, memory_format=machine.weight_layout)
    images, labels = (tensor.to(machine.device) for tensor in load_split(dataset, "train", data_root))
    validation = load_split(dataset, "val", data_root)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    steps = epochs * (len(labels) // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator(machine.device).manual_seed(seed)
    progress = tqdm(range(epochs), desc=f"train {name}", unit="epoch", disable=not machine.is_main)
    for _ in progress:
        model.train()
        for index in epoch_batches(len(labels), batch_size, generator):
            batch = machine.layout(mild_augmentation(to_float(images[index]), generator))
            loss = F.cross_entropy(model(batch), labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        progress.set_postfix(val_accuracy=f"{evaluate(model, *validation, machine)['top1_accuracy']:.1f}")
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Machine: device, mixed precision, processes, seeds, signals
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Machine(NamedTuple):
    """Where a script runs. One process and torchrun take the same path: rank 0 of world size 1 is a process on its own."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    amp_dtype: torch.dtype | None = None  # None: float32

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def chunk(self, height: int, width: int) -> int:
        """Images of this size in one forward pass without gradient: on a CPU what stays in its cache, which is faster than larger batches."""
        most, least = (64, 8) if self.device.type == "cpu" else (4096, 1)
        return max(least, most * 32 * 32 // max(32 * 32, height * width))

    def layout(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in the layout to train in: channels_last, which is faster, but for odd batches on a CPU, where oneDNN's backward
        pass through narrow convolutions writes outside its memory (torch 2.15, more than one thread; weights must not be channels_last either)."""
        odd = self.device.type == "cpu" and len(images) % 2 == 1
        return images.contiguous(memory_format=torch.contiguous_format if odd else torch.channels_last)

    @property
    def weight_layout(self) -> torch.memory_format:
        return torch.contiguous_format if self.device.type == "cpu" else torch.channels_last

    def workers(self, wanted: int) -> int:
        """Of the wanted processes that decode pictures, as many as this process's share of the machine's cores allows."""
        return min(wanted, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None)

    def own_rows(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor whose first dimension is the global batch; parts differ by one row where they must."""
        size = len(batch)
        return batch[self.rank * size // self.world_size : (self.rank + 1) * size // self.world_size]

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on every rank; with several, in place of `tensor`'s own values."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_rows(self, rows: torch.Tensor) -> torch.Tensor:
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
        """Rank 0 does the work while the others wait: what it returns, on every rank; an InputError of its is raised on every rank."""
        answer = [None, None]  # what the work returned, its error
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
    """Read torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK), choose the device, join the other processes, seed everything.

    device: "auto" takes a GPU where there is one. amp: bfloat16 where the device has it, else float16 (with `grad_scaler`).
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu, or check the driver with nvidia-smi")
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    use_cuda = device != "cpu" and torch.cuda.is_available()
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world_size > 1 and not dist.is_initialized():
        # torchrun's store outlives a restart: without a prefix of its own, an attempt may read the addresses of the one before
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if use_cuda else "gloo", store=store, rank=rank, world_size=world_size)
    amp_dtype = None
    if amp:
        amp_dtype = torch.float16 if use_cuda and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits
    torch.manual_seed(seed)
    return Machine(chosen, rank, world_size, amp_dtype)


class Interrupted(BaseException):
    """SIGTERM (Slurm, torchrun) or SIGINT (Ctrl-C) ended the run; run_script turns it into exit code 143 or 130."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Stop:
    """What run_script's signal handlers know: whether a step must be finished first, whether a signal waits, and the run's directory."""

    deferred, signum, directory = False, 0, None


def on_signal(signum: int, _frame: object) -> None:
    if not Stop.deferred or Stop.signum:  # nothing to finish, or asked a second time
        raise Interrupted(signum)
    Stop.signum = signum


class Pace:
    """When a checkpoint is due before the epoch is over: after so many minutes, or because a signal asked the run to stop.

    From `begin` to `end`, a signal waits for the step to be finished. Every rank hears the same: on several, they ask each other every `every` steps.
    """

    def __init__(self, minutes: float, every: int, machine: Machine):
        self.seconds, self.every, self.machine = 60 * minutes, every, machine
        self.since, self.signum = time.monotonic(), 0

    def begin(self) -> None:
        Stop.deferred = True

    def due(self, step: int, now: bool = False) -> bool:
        """`now`: whatever the step."""
        late = time.monotonic() - self.since > self.seconds
        self.signum = Stop.signum
        if self.machine.world_size > 1:
            if step % self.every and not now:
                return False
            asked = torch.tensor([self.signum, int(late)], device=self.machine.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.signum, late = asked.tolist()
        return bool(self.signum or late)

    def saved(self) -> None:
        """A checkpoint was written: time starts anew, and a run that was asked to stop ends here."""
        self.since = time.monotonic()
        if self.signum:
            self.machine.barrier()
            raise Interrupted(self.signum)

    def end(self) -> None:
        """The epoch is over: from now on a signal ends the run at once, and one that waits does so now."""
        Stop.deferred = False
        if Stop.signum:
            raise Interrupted(Stop.signum)


def random_states(machine: Machine) -> list[list[torch.Tensor]]:
    """random_state of every rank, on every rank."""
    states = [random_state(machine)]
    if machine.world_size > 1:
        states = [None] * machine.world_size
        dist.all_gather_object(states, random_state(machine))
    return states


def restore_random_states(states: list[list[torch.Tensor]], machine: Machine) -> None:
    """This rank's own; with another number of ranks than before, the first's for the first, and the others go on from their seeds."""
    if len(states) == machine.world_size or machine.is_main:
        restore_random_state(states[machine.rank], machine)


def restore_totals(saved: torch.Tensor, machine: Machine) -> torch.Tensor:
    """The sums (n,) that this rank goes on adding to, of the saved ones of all ranks (ranks, n): its own; where the number of ranks
    has changed, the first gets them all."""
    own = saved[machine.rank] if len(saved) == machine.world_size else saved.sum(0) * machine.is_main
    return own.to(machine.device)


def random_state(machine: Machine) -> list[torch.Tensor]:
    """The states of torch's own generators: the CPU's and, where one is used, the GPU's."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(machine.device)] if machine.device.type == "cuda" else [])


def restore_random_state(state: list[torch.Tensor], machine: Machine) -> None:
    torch.set_rng_state(state[0])
    if machine.device.type == "cuda":
        torch.cuda.set_rng_state(state[1], machine.device)


def grad_scaler(machine: Machine) -> torch.amp.GradScaler:
    """Loss scaling for float16; passes everything through otherwise."""
    return torch.amp.GradScaler(machine.device.type, enabled=machine.amp_dtype == torch.float16)


def distribute(model: nn.Module, machine: Machine) -> nn.Module:
    """The model to train with: itself on one rank, else DistributedDataParallel with batch-norm statistics of the global batch.

    DDP averages gradients over ranks, so a rank's loss is its rows' sum × world size / global batch size.
    """
    if machine.world_size == 1:
        return model
    if machine.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():  # torch's SyncBatchNorm takes no CPU tensors
            if type(module) is nn.BatchNorm2d:
                module.__class__ = GlobalBatchNorm2d
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the global batch of all ranks, on any backend; the parts may differ in size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce  # differentiable

        dtype, x = x.dtype, x.float()  # sums over many pixels, and the running statistics, are float32 under autocast too
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


@contextlib.contextmanager
def affine_batch_norm(model: nn.Module, machine: Machine) -> Iterator[None]:
    """Within it, batch norm in eval mode is computed as x·scale + shift, for passes whose gradient goes to the images alone.

    On a CPU that makes forward and backward through the digits models 2.4 times faster, because ATen's own backward is slow there; elsewhere
    nothing is changed.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)] if machine.device.type == "cpu" else []
    for layer in layers:
        layer.forward = functools.partial(affine_batch_norm_forward, layer)  # an attribute of the instance hides the method
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def affine_batch_norm_forward(layer: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    scale = layer.weight.detach() * (layer.running_var + layer.eps).rsqrt()
    shift = layer.bias.detach() - layer.running_mean * scale
    return torch.addcmul(shift[None, :, None, None].to(x.dtype), x, scale[None, :, None, None].to(x.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def save_atomically(content: object, file: str | Path, keep_previous: bool = False) -> None:
    """Write a checkpoint of tensors and plain values beside `file`, flush it to disk, then rename it: readers see the old one or the new one.

    keep_previous: the old one stays as <name>.previous.<suffix>, for read_checkpoint. Raises InputError where it cannot be written: the old one stays.
    """
    file = Path(file)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if keep_previous and file.is_file():
            older = previous_of(file)
            older.unlink(missing_ok=True)
            try:
                os.link(file, older)  # at every moment one of the two is whole
            except OSError:  # a file system without links
                os.replace(file, older)
        os.replace(beside, file)
        with contextlib.suppress(OSError):  # the renaming itself to disk; not every file system can
            descriptor = os.open(file.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        # On a full disk torch.save raises an error of its own ("unexpected pos"), over the one that says why.
        reason = error.__context__ if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError) else error
        raise InputError(f"cannot write {file}: {reason}; what it held before is still there") from error


def previous_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}.previous{file.suffix}")


def save_run(state: dict, directory: Path, machine: "Machine") -> None:
    """A run's checkpoint.pt, by rank 0, the one before it kept; InputError, and nothing written, where the model's weights are not finite."""
    if not machine.is_main:
        return
    file = directory / "checkpoint.pt"
    bad = next((key for key, value in state["state_dict"].items() if value.is_floating_point() and not value.isfinite().all()), None)
    if bad is not None:
        raise InputError(f"{bad} is not finite at step {state['step']}: lower --lr; the last good checkpoint is {file}")
    for beside in directory.glob(".*.pt.*"):  # of a run that was killed while it wrote
        beside.unlink(missing_ok=True)
    save_atomically(state, file, keep_previous=True)


def check_unchanged(saved: dict, fixed: dict, file: Path) -> None:
    """InputError, naming them, for settings of the run that is continued (its "fixed") that are others now."""
    before = saved.get("fixed", {})
    changed = [f"--{name.replace('_', '-')} was {before.get(name)}" for name in fixed if before.get(name) != fixed[name]]
    if changed:
        raise InputError(f"{file} is of a run with other settings ({', '.join(changed)}): leave them as they were, or choose another --run-dir")


@contextlib.contextmanager
def continues(file: Path) -> Iterator[None]:
    """Within it a checkpoint's parts are put in their places; InputError where one does not fit."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{file} does not continue here: {error}; use the settings, --device and --amp that it was begun with") from error


def restore_place(saved: dict, generator: torch.Generator) -> "Place":
    """Set the generator to where the checkpoint's epoch began, and return the place in it; between two epochs, to where it was."""
    if saved["batches"] == 0:
        generator.set_state(saved["generator"])
        return EPOCH_START
    generator.set_state(saved["epoch_start"])
    return Place(saved["batches"], saved["generator"])


def has_checkpoint(directory: str | Path | None) -> bool:
    """Whether a run's directory holds a checkpoint to continue from."""
    file = Path(directory or "") / "checkpoint.pt"
    return bool(directory) and (file.is_file() or previous_of(file).is_file())


def read_checkpoint(directory: str | Path, advice: str) -> dict:
    """A run's checkpoint; where the newest one is damaged, the one before it, with a warning. Raises InputError where neither can be read."""
    file = Path(directory) / "checkpoint.pt"
    try:
        state = load_tensors(file, advice)
    except InputError as error:
        if not previous_of(file).is_file():
            raise
        state = load_tensors(previous_of(file), advice)
        sys.stderr.write(f"warning: {error}; going on from {previous_of(file)}\n")
    if not isinstance(state, dict):
        raise InputError(f"{file} holds no run: {advice}")
    return state


def load_tensors(file: str | Path, advice: str) -> object:
    """Unpickle tensors and plain values only. Raises InputError for a missing, truncated or unsafe file."""
    import zipfile

    if not Path(file).is_file():
        raise InputError(f"{file} does not exist: {advice}")
    try:
        if zipfile.is_zipfile(file):  # torch compresses nothing: more than the file's size is built to fill the memory
            with zipfile.ZipFile(file) as archive:
                if sum(member.file_size for member in archive.infolist()) > Path(file).stat().st_size:
                    raise ValueError("it holds more than its own size")
        with warnings_off():
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile, EOF and runtime errors, as torch.load meets them
        reason = "it holds more than tensors (code is never unpickled)" if "weights_only" in str(error).lower() else "truncated or no checkpoint"
        raise InputError(f"cannot read {file}: {reason}; {advice}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward_chunk(model: nn.Module, size: int, machine: Machine) -> int:
    """As Machine.chunk, for a model that is asked often: on a CPU at most so many images that its largest layer's output stays within 16 MB."""
    if machine.device.type != "cpu":
        return machine.chunk(size, size)
    largest = 1

    def measure(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal largest
        largest = max(largest, output.numel() if isinstance(output, torch.Tensor) else 1)

    hooks = [module.register_forward_hook(measure) for module in model.modules()]
    model(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return max(1, min(machine.chunk(size, size), 2**22 // largest))


@torch.no_grad()
def predict_logits(model: Callable, images: torch.Tensor, machine: Machine) -> torch.Tensor:
    """Logits (N, classes) float32 of uint8 images (N, 3, H, W), each image on one rank exactly once, in chunks. `model` maps [0, 1] images to logits."""
    logits = []
    for part in machine.own_rows(images).split(machine.chunk(*images.shape[2:])):
        with machine.autocast():
            batch = to_float(part.to(machine.device)).contiguous(memory_format=torch.channels_last)
            logits.append(model(batch).float())
    return machine.all_rows(torch.cat(logits))


def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, machine: Machine) -> dict[str, float]:
    """{"top1_accuracy", "top5_accuracy": percent, "loss": mean cross entropy} of a model on the machine's device, on uint8 images (N, 3, H, W) with
    labels (N,) int64, in eval mode; the model's mode is restored."""
    training = model.training
    model.eval()
    logits, labels = predict_logits(model, images, machine), labels.to(machine.device)
    model.train(training)
    return {"top1_accuracy": accuracy(logits, labels), "top5_accuracy": accuracy(logits, labels, 5), "loss": F.cross_entropy(logits, labels).item()}


@torch.no_grad()
def evaluate_folder(models: list[nn.Module], folder: Folder, batch_size: int, workers: int, machine: Machine) -> list[dict[str, float]]:
    """As `evaluate`, for pictures that are read as they are needed, once for all models."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    totals = torch.zeros(len(models), 4, device=machine.device, dtype=torch.float64)
    for images, labels in folder.all_batches(batch_size, workers, machine):
        batch = to_float(images).contiguous(memory_format=torch.channels_last)
        for total, model in zip(totals, models):
            with machine.autocast():
                logits = model(batch).float()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            total += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.ones_like(labels).sum()]).to(totals.dtype)
    for model, mode in zip(models, training):
        model.train(mode)
    keys = ("top1_accuracy", "top5_accuracy", "loss")
    return [dict(zip(keys, (100 * top1 / count, 100 * top5 / count, loss / count))) for top1, top5, loss, count in machine.all_sum(totals).tolist()]


def evaluate_models(models: list[nn.Module], data: Data, batch_size: int, workers: int, machine: Machine) -> list[dict[str, float]]:
    """Top-1 and top-5 accuracy (%) and loss of each model on tensors or pictures."""
    if isinstance(data, Folder):
        return evaluate_folder(models, data, batch_size, workers, machine)
    return [evaluate(model, *data, machine) for model in models]


def evaluate_corruptions(
    models: list[nn.Module], corruptions: Corruptions, batch_size: int, workers: int, machine: Machine
) -> list[dict[str, list[float]]]:
    """For each model {corruption: [accuracy (%) at each severity]}, the extra corruptions last; every set is made, or read, once."""
    from tqdm import tqdm

    names = corruptions.names + corruptions.extra
    found = [{name: [] for name in names} for _ in models]
    progress = tqdm(total=len(names) * len(corruptions.severities), desc="corruptions", unit="set", disable=not machine.is_main)
    for name in names:
        for severity in corruptions.severities:
            figures = evaluate_models(models, corruptions.read(name, severity), batch_size, workers, machine)
            for values, figure in zip(found, figures):
                values[name].append(figure["top1_accuracy"])
            progress.update()
    progress.close()
    return found


def auroc(scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """The area under the ROC curve of scores (N,) for labels (N,) of 0 and 1: the share of pairs of a positive and a negative whose order is right,
    ties counting half. None where all labels are alike."""
    positive = labels > 0.5
    count = int(positive.sum())
    if count in (0, len(labels)):
        return None
    values, place, equals = scores.double().unique(return_inverse=True, return_counts=True)
    last = equals.cumsum(0).double()
    ranks = (last - (equals - 1) / 2)[place]  # 1…N, equal scores share their mean
    return ((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(labels) - count))).item()


def accuracy(logits: torch.Tensor, labels: torch.Tensor, top: int = 1) -> float:
    """Percent of rows of logits (N, classes) whose label (N,) is among the `top` largest."""
    correct = (logits.topk(min(top, logits.shape[1]), dim=1).indices == labels.to(logits.device)[:, None]).any(1)
    return 100 * correct.double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Results: command line, run directory, logs, the table over seeds
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in the help, and both spellings of a flag (--num-samples, --num_samples)."""

    def __init__(self, **keywords):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **keywords)

    def error(self, message: str):
        sys.stderr.write(f"{self.prog}: error: {' '.join(one_line(message).split())} (see --help)\n")
        sys.exit(2)

    def parse(
        self,
        argv: list[str] | None,
        published: Callable[[argparse.Namespace], dict],
        translate: Callable[[dict, argparse.Namespace], dict] = lambda values, given: values,
    ) -> argparse.Namespace:
        """Parse argv; a flag left out takes the value of the run continued, then that of the --load-conf file, then `published(args)`'s, then its default.

        published: from what is given so far (data set and model among it) to a dict of the values published for it. translate: from the values of
        a configuration, and what is given, to flags.
        """
        argv = sys.argv[1:] if argv is None else argv
        argv = [self.hyphenate(word) for word in argv]
        given = self.parse_args(argv)
        configurations = [given.load_conf] if given.load_conf else []
        if given.run_dir and (given.resume or given.evaluate or getattr(given, "predict", None)):
            earlier = Path(given.run_dir) / "args.json"  # the run that is continued or used: its own settings go before those of --load-conf
            configurations += [earlier] if earlier.is_file() else []
        for configuration in configurations:
            label = f"--load-conf {configuration}" if configuration == given.load_conf else str(configuration)
            self.set_defaults(**self.read_configuration(configuration, label, functools.partial(translate, given=given)))
        given = self.parse_args(argv)
        for name, value in published(given).items():
            if getattr(given, name, "") is None:
                setattr(given, name, value)
        return given

    @staticmethod
    def hyphenate(word: str) -> str:
        name, equals, value = word.partition("=")
        return name.replace("_", "-") + equals + value if word.startswith("--") else word

    def read_configuration(self, file: str | Path, label: str, translate: Callable[[dict], dict]) -> dict:
        """The flags that a JSON file sets, checked as on the command line; an error begins with the label."""
        try:
            values = json.loads(Path(file).read_text())
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
            values = translate(values)
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:  # of another form than expected
            self.error(f"{label}: {error}")
        actions = {action.dest: action for action in self._actions}
        # What an earlier run's args.json says of that run, not of the method.
        skipped = set(ENVIRONMENT_KEYS) | {"run_dir", "resume", "load_conf", "evaluate", "predict", "export", "dry_run"}
        values = {key.replace("-", "_"): value for key, value in values.items()}
        unknown = sorted(set(values) - set(actions) - skipped)
        if unknown:
            self.error(f"{label}: unknown settings {', '.join(unknown)}")
        defaults = {}
        for key, value in values.items():
            if key in skipped:
                continue
            action = actions[key]
            switch = isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction, argparse.BooleanOptionalAction))
            if switch and not isinstance(value, bool):
                self.error(f"{label}: {key} is true or false, not {value!r}")
            if isinstance(value, str) and not value.isprintable():
                self.error(f"{label}: {key} holds characters that cannot be printed")
            if value is None and action.default is not None:
                self.error(f"{label}: {key} is null, but needs a value")
            if value is not None and not switch:
                try:  # the same checks as on the command line
                    value = self._get_value(action, str(value))
                    self._check_value(action, value)
                except argparse.ArgumentError as error:
                    self.error(f"{label}: {error}")
            defaults[key] = value
        return defaults


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=120)

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, argparse.SUPPRESS, False) and "default" not in (action.help or "")
        return (action.help or "") + (" (default: %(default)s)" if shown else "")


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or a float within bounds, finite."""

    def parse(text: str):
        value = kind(text)
        if kind is int and abs(value) >= 2**63:  # more than torch takes for a seed
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be below 2^63")
        inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
        if not inside or not math.isfinite(value):
            below = "" if high == math.inf else f" and {'<' if open_high else '≤'} {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {'>' if open_low else '≥'} {low:g}{below}")
        return value

    parse.__name__ = kind.__name__
    return parse


def boolean(text: str) -> bool:
    """An argparse type: true or false, for flags that older commands give a value (-e True)."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text}: true or false")
    return text.lower() in ("true", "1")


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; bad input ends in one line on stderr and exit code 2, SIGTERM in 143 and SIGINT in 130, with a line that says how to go on."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_signal)
    script = Path(sys.argv[0]).name
    try:
        main()
        if dist.is_initialized():  # ranks leave together: one that closes its connections while another still works may abort it
            with contextlib.suppress(RuntimeError):
                dist.barrier()
    except (InputError, OSError) as error:  # an OSError names the file and what the system said
        close_bars()
        sys.stderr.write(f"{script}: error: {' '.join(one_line(str(error)).split())}\n")
        sys.exit(2)
    except Interrupted as stopped:
        close_bars()
        if os.environ.get("RANK", "0") == "0":
            again = f"; continue with --resume --run-dir {Stop.directory}" if Stop.directory else ""
            sys.stderr.write(f"{script}: stopped by {signal.Signals(stopped.signum).name}{again}\n")
        sys.stderr.flush()
        os._exit(128 + stopped.signum)  # the other ranks may be in the middle of anything: nobody waits for anybody
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def close_bars() -> None:
    """Progress bars that are still open would be drawn over the last line."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


ENVIRONMENT_KEYS = ("git_commit", "versions", "device_name", "world_size", "command")


class Run:
    """A run's directory: args.json, log.jsonl, TensorBoard events, a copy of the script. Only rank 0 writes."""

    def __init__(self, directory: Path, machine: Machine, arguments: dict | None, resume_step: int | None, started: float):
        self.directory, self.machine, self.started = directory, machine, started
        Stop.directory = directory
        self.log_file = self.writer = None
        if not machine.is_main:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if arguments is not None:  # None: a finished run is looked at again
                write_json(directory / "args.json", arguments | environment(machine))
                if Path(sys.argv[0]).suffix == ".py":
                    shutil.copy(sys.argv[0], directory)
            if resume_step is not None:
                keep_log(directory / "log.jsonl", resume_step)
            self.log_file = open(directory / "log.jsonl", "a" if resume_step is not None else "w")
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(directory, purge_step=None if resume_step is None else resume_step + 1)
        except OSError as error:
            raise InputError(f"cannot write the run directory {directory}: {error}; choose another with --run-dir") from error

    def log(self, step: int, **values: float) -> None:
        """One JSON line, and the numbers among it to TensorBoard."""
        if self.log_file is None:
            return
        self.log_file.write(json.dumps({"step": step, **values}) + "\n")
        self.log_file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def finish(self, results: dict) -> dict:
        """Write results.json with the keys that every script has (`results` may bring those of the run that is evaluated again), and return it."""
        own = {
            "wall_seconds": round(time.perf_counter() - self.started, 2),
            "peak_memory_mb": round(peak_memory_mb(self.machine)),
            "device": device_name(self.machine),
        }
        results = results | {key: results.get(key, value) for key, value in own.items()}
        if self.machine.is_main:
            write_json(self.directory / "results.json", results)
            self.writer.close()
            self.log_file.close()
        return results


def arguments_of_run(directory: Path) -> dict:
    """What a run was started with, its args.json; nothing where there is no such run."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads((directory / "args.json").read_text()))
    return {}


def check_in_place(directory: Path, settings: dict, dry_run: bool, instead: str) -> None:
    """Before a run is evaluated in its own directory: InputError, ending in `instead`, where that would replace its results by those of other
    settings, or of a dry run."""
    held = arguments_of_run(directory)
    if dry_run and not held.get("dry_run"):
        raise InputError(f"--dry-run would overwrite the results of {directory}: leave it out")
    for name, value in settings.items():
        if name in held and value != held[name]:
            raise InputError(f"--{name.replace('_', '-')} {value} would overwrite the results of {directory}: {instead}")


def kept_results(directory: Path, *names: str) -> dict:
    """Of the results.json of a run that is evaluated again: what does not change (device, times), and `names`; nothing where it had not finished."""
    with contextlib.suppress(InputError):
        earlier = read_results(directory)
        return {key: earlier[key] for key in ("wall_seconds", "peak_memory_mb", "device", *names) if key in earlier}
    return {}


def read_results(directory: Path) -> dict:
    """The results.json of a finished run."""
    try:
        results = json.loads((directory / "results.json").read_text())
        if not isinstance(results, dict):
            raise ValueError("not a JSON object")
        return results
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{directory / 'results.json'}: no results of a finished run ({error})") from error


def check_run(saved: dict, file: str | Path, **kinds: type) -> None:
    """InputError, naming what is not there, unless a run's checkpoint holds all of these, each of its type."""
    wrong = [name for name, kind in kinds.items() if not isinstance(saved.get(name), kind)]
    if wrong:
        raise InputError(f"{file} holds no run, or a damaged one (look at {', '.join(wrong)}): choose another")


@contextlib.contextmanager
def reading_run(file: Path, advice: str) -> Iterator[None]:
    """InputError, ending in `advice`, where a run's file turns out, as it is used, to hold something else."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ValueError) as error:
        raise InputError(f"{file} is damaged or was begun otherwise ({type(error).__name__}: {error}): {advice}") from error


def run_directory(script: str, arguments: dict, method: str, machine: Machine) -> Path:
    """--run-dir, or runs/<script>/<dataset>-<model>-<method>-s<seed>-<time>; InputError for one that is in use, unless --resume."""

    def find() -> Path:
        name = f"{arguments['dataset']}-{arguments['model']}-{method}-s{arguments['seed']}-{time.strftime('%Y%m%d-%H%M%S')}"
        directory = Path(arguments["run_dir"] or Path("runs") / script / name)
        for suffix in range(2, 1000):
            if arguments["run_dir"] or not directory.exists():
                break
            directory = directory.with_name(f"{name}-{suffix}")
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is not a directory: choose another with --run-dir")
        if directory.is_dir() and any(directory.iterdir()) and not arguments["resume"]:
            raise InputError(f"{directory} is not empty: continue it with --resume, or choose another with --run-dir")
        return directory

    return machine.on_main(find)  # rank 0 looks, and all ranks hear the same


def finite_totals(totals: torch.Tensor, step: int, lr: float, directory: Path) -> list[float]:
    """Training's sums as numbers; InputError where one is not finite."""
    values = totals.tolist()
    if not all(math.isfinite(value) for value in values):
        raise InputError(f"the loss is not finite at step {step} (lr {lr:g}): lower --lr; the last good checkpoint is {directory / 'checkpoint.pt'}")
    return values


def write_json(file: Path, values: dict) -> None:
    write_text(file, json.dumps(values, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Readers see the old text or the new one."""
    beside = file.with_name(f".{file.name}")
    beside.write_text(text)
    os.replace(beside, file)


def keep_log(file: Path, step: int) -> None:
    """Drop the lines after `step`, and of the test, which is evaluated again: a resumed run writes them anew."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # a run that was killed may leave half a line
            entry = json.loads(line)
            if entry["step"] <= step and not any(key.startswith("test_") for key in entry):
                kept.append(line + "\n")
    file.write_text("".join(kept))


def environment(machine: Machine) -> dict:
    """What made a number: git commit (None outside a checkout), library versions, device, processes, command."""
    import importlib.metadata

    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True, timeout=10)
        commit = asked.stdout.strip() or None
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "kornia", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "git_commit": commit,
        "versions": versions,
        "device_name": device_name(machine),
        "world_size": machine.world_size,
        "command": " ".join(sys.argv),
    }


def device_name(machine: Machine) -> str:
    if machine.device.type == "cuda":
        return torch.cuda.get_device_name(machine.device)
    return f"cpu ({torch.get_num_threads()} threads)"


def peak_memory_mb(machine: Machine) -> float:
    """Peak memory of this process in MiB: of the GPU where one is used, else resident memory."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(machine.device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def table_cells(results: dict) -> Iterator[tuple[str, str, str, float]]:
    """(section, row, column, value) of one results.json: what the table over seeds shows of it."""
    section = f"{results['script']} {results['dataset']} {results['model']}"
    method = str(results["method"])
    if isinstance(results.get("accuracy"), dict):  # gretta: baselines are rows beside the method
        setting = f"{100 * results['proportion']:g} %" if results.get("proportion") else str(results.get("train_on", "all"))
        if "corruptions" in results:
            for corruption, errors in results["corruptions"].items():
                for name, value in errors.items():
                    yield f"{section}, top-1 error", method if name == "gretta" else name, corruption, value
        for name, value in results["accuracy"].items():
            yield f"{section}, accuracy", method if name == "gretta" else name, setting, value
        return
    for name, value in results.items():
        if name in ("seed", "n_train", "n_eval", "peak_memory_mb", "epsilon", "clean_top5_accuracy") or isinstance(value, bool):
            continue
        if isinstance(value, (int, float)):
            yield section, method, name, value
        elif name == "controller" and value["entropy_last"] is not None:
            yield section, method, "entropy_last", value["entropy_last"]
        elif name in ("corruptions", "shifted") and isinstance(value, dict):
            for key in value if name == "shifted" else [key for key in value if key.startswith("mean")]:
                yield section, method, f"{name} {key}", value[key]


def table(directories: list[str | Path], by: Sequence[str] = ()) -> str:
    """A Markdown table per script, data set and model: rows are methods, columns figures, cells mean ± std over the runs' seeds.

    by: settings (as args.json names them) whose values tell runs of one method apart: a row for each.
    """
    cells: dict[str, dict[str, dict[str, dict]]] = {}
    for directory in directories:
        file = Path(directory) / "results.json"
        try:
            results = read_results(Path(directory))
            settings = json.loads((Path(directory) / "args.json").read_text()) if by else {}
            if unknown := [name for name in by if name not in settings]:
                raise InputError(f"--by {unknown[0]}: {directory}/args.json has no such setting")
            method = results["method"] = ", ".join([str(results["method"]), *(f"{name} {settings[name]}" for name in by)])
            for section, row, column, value in table_cells(results):
                # A baseline is the same figure in every run of its seed and setting, to rounding: one value per seed counts.
                if not isinstance(value, (int, float)):
                    raise TypeError(f"{column} is {value!r}, not a number")
                value = float(value)
                values = cells.setdefault(section, {}).setdefault(row, {}).setdefault(column, {})
                other = abs(values.get(results["seed"], value) - value)
                if other > (0 if row == method else 0.1) and column != "wall_seconds":
                    how = "tell them apart with --by" if row == method else "give each a table of its own"
                    raise InputError(f"{file}: {row} with seed {results['seed']} is there twice, with other settings: {how}")
                values[results["seed"]] = value
        except InputError:
            raise
        except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(f"{file}: no results of a finished run ({type(error).__name__}: {error})") from error
    lines = []
    for section, rows in cells.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        with contextlib.suppress(ValueError):
            columns.sort(key=lambda column: float(column.removesuffix(" %")))
        counts = {len(values) for row in rows.values() for values in row.values()}
        seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
        lines += [
            f"**{section}** (mean ± std over {seeds} seed{'s' * (max(counts) > 1)})",
            "",
            f"| | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        order = ("none", "five_crop", "ten_crop", "bn_adapt", "vanilla", "surrogate", "whitebox")  # rows as in the papers
        order += ("clean", "Speckle", "Gauss_single", "Gauss_mult", "ANT", "ANT+SIN", "ANT3x3", "ANT3x3+SIN")
        order += ("random", "trivial", "autoaugment", "advaa", "replay")
        rank = {name: position for position, name in enumerate(order)}
        for row, values in sorted(rows.items(), key=lambda item: rank.get(item[0].split(",")[0], len(order))):
            lines.append(f"| {row} | {' | '.join(mean_and_std(list(values.get(column, {}).values())) for column in columns)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def mean_and_std(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


# ---------------------------------------------------------------------------------------------------------------------
# Files from elsewhere: published checkpoints, downloads, archives, CIFAR's pickles
# ---------------------------------------------------------------------------------------------------------------------


class Published(NamedTuple):
    url: str
    file: str  # its name under weights/
    dataset: str
    model: str


def on_drive(identity: str) -> str:
    """The address of a public file on Google Drive; confirm=t: without the page that says it was not scanned for viruses."""
    return f"https://drive.usercontent.google.com/download?id={identity}&export=download&confirm=t"


GAME_OF_NOISE = "https://github.com/bethgelab/game-of-noise/releases/download/v1.0/"

# Checkpoints that others published, by the names that --weights and --download take; weights/README.md says what each of them scores.
PUBLISHED_WEIGHTS = {
    # GrETTA (Wang, Yang & Lin; github.com/agil27/GrETTA): classifiers trained with AugMix, and the students distilled from them
    "gretta-resnext": Published(on_drive("13WhxEVrh23cV22URtAuJytBgG2cvgP0h"), "gretta-resnext.pth", "cifar100", "resnext"),
    "gretta-wideresnet": Published(on_drive("19fHZG4ZVcli0L8nmXCdf8YZvu6wHwHFx"), "gretta-wideresnet.pth", "cifar100", "wideresnet"),
    "gretta-resnext-student": Published(on_drive("1MQs0Vx4Mjv6w5Rs5Qnr31YrLy6xTNMJj"), "gretta-resnext-student.pth", "cifar100", "student"),
    "gretta-wideresnet-student": Published(on_drive("1ycNtxRtewRs81myG6Hn3YI9ds2aufM_p"), "gretta-wideresnet-student.pth", "cifar100", "student"),
    # AugMix (Hendrycks et al. 2020), as RobustBench (github.com/RobustBench/robustbench) keeps it
    "robustbench-cifar10-resnext": Published(on_drive("1uGP3nZbL3LC160kOsxwkkt6tDd4qbZT1"), "robustbench-cifar10-resnext.pt", "cifar10", "resnext"),
    "robustbench-cifar10-wideresnet": Published(
        on_drive("1wy7gSRsUZzCzj8QhmTbcnwmES_2kkNph"), "robustbench-cifar10-wideresnet.pt", "cifar10", "wideresnet"
    ),
    "robustbench-cifar100-resnext": Published(
        on_drive("1ocnHbvDdOBLvgNr6K7vEYL08hUdkD1Rv"), "robustbench-cifar100-resnext.pt", "cifar100", "resnext"
    ),
    "robustbench-cifar100-wideresnet": Published(
        on_drive("1XpFFdCdU9LcDtcyNfo6_BV1RZHKKkBVE"), "robustbench-cifar100-wideresnet.pt", "cifar100", "wideresnet"
    ),
    # Game of Noise (Rusak et al. 2020; github.com/bethgelab/game-of-noise)
    "ANT": Published(GAME_OF_NOISE + "ANT_Model.pth", "ANT_Model.pth", "imagenet", "resnet50"),
    "ANT+SIN": Published(GAME_OF_NOISE + "ANT_SIN_Model.pth", "ANT_SIN_Model.pth", "imagenet", "resnet50"),
    "ANT3x3": Published(GAME_OF_NOISE + "ANT3x3_Model.pth", "ANT3x3_Model.pth", "imagenet", "resnet50"),
    "ANT3x3+SIN": Published(GAME_OF_NOISE + "ANT3x3_SIN_Model.pth", "ANT3x3_SIN_Model.pth", "imagenet", "resnet50"),
    "Speckle": Published(GAME_OF_NOISE + "Speckle_Model.pth", "Speckle_Model.pth", "imagenet", "resnet50"),
    "Gauss_mult": Published(GAME_OF_NOISE + "Gauss_mult_Model.pth", "Gauss_mult_Model.pth", "imagenet", "resnet50"),
    "Gauss_sigma_0.5": Published(GAME_OF_NOISE + "Gauss_sigma_0.5_Model.pth", "Gauss_sigma_0.5_Model.pth", "imagenet", "resnet50"),
}


def default_checkpoint(dataset: str, model: str) -> str | None:
    """The name of the published AugMix classifier for a CIFAR set; None where there is none."""
    names = [name for name, published in PUBLISHED_WEIGHTS.items() if (published.dataset, published.model) == (dataset, model)]
    return names[0] if names and dataset.startswith("cifar") and model != "student" else None  # GrETTA's own before RobustBench's


def find_checkpoint(given: str, machine: "Machine", dry_run: bool = False) -> Path | None:
    """The file that --weights means: a name of PUBLISHED_WEIGHTS (see published_file), or a path, which is returned as it is. None: a dry run lacks it."""
    return published_file(given, machine, dry_run) if given in PUBLISHED_WEIGHTS else Path(given)


def published_file(name: str, machine: "Machine", dry_run: bool = False) -> Path | None:
    """The file of one of PUBLISHED_WEIGHTS, downloaded by rank 0 if it is missing. A dry run downloads nothing: None where it is missing."""
    published = PUBLISHED_WEIGHTS[name]
    file = WEIGHTS / published.file
    if dry_run and not file.is_file():
        if machine.is_main:
            print(f"{name}: {file} is not there, and a dry run downloads nothing: the model stays untrained", flush=True)
        return None

    def get() -> None:
        download(published.url, file)
        check_recorded(file)

    machine.on_main(get)
    return file


def check_recorded(file: Path) -> None:
    """Record the file's sha256 in sha256.json beside it, {file name: hex}, or compare it with the one that is there.

    For files without a published checksum: what was used first is what is used later. Raises InputError for a file that differs.
    """
    record = file.with_name("sha256.json")
    try:
        known = json.loads(record.read_text()) if record.is_file() else {}
        recorded = known.get(file.name)
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{record} does not hold checksums by file name ({error}): remove it, and they are recorded anew") from error
    found = file_hash(file, "sha256")
    if recorded is None:
        write_json(record, known | {file.name: found})
    elif found != recorded:
        raise InputError(
            f"{file} has sha256 {found}, but {record} recorded {recorded} when it was first used: "
            f"remove {file} to fetch it again, or its line in {record} if the change was meant"
        )


def load_checkpoint(model: nn.Module, given: str, machine: "Machine", dry_run: bool = False) -> Path | None:
    """Load the checkpoint that find_checkpoint finds into `model` and return its file; None: a dry run left the model untrained."""
    file = find_checkpoint(given, machine, dry_run)
    if file is not None:
        load_weights(model, file)
    return file


def download(url: str, file: Path, sha256_prefix: str | None = None, md5: str | None = None) -> Path:
    """Fetch `url` to `file` unless it is there. The file appears whole or not at all; InputError says what went wrong, and what to do.

    A server that answers with a page (Google Drive, when many asked for a file or it is gone) is refused before anything is written. What came
    before a connection broke off waits in `<file>.part`, and the next call goes on from there where the server can (a Range request).
    sha256_prefix (the first digits of the checksum, as in torchvision's file names) or md5: a file of another checksum is removed.
    """
    if file.is_file():
        return file
    from tqdm import tqdm

    part = file.with_name(f"{file.name}.part")
    try:
        held = part.stat().st_size if part.is_file() else 0
        print(f"downloading {url} to {file}" + (f", from byte {held:,} on" if held else ""), flush=True)
        with open_url(url, held) as answer:
            held = held if answer.status == 206 else 0  # 200: the server sends the whole of it
            size = held + int(answer.headers["Content-Length"]) if answer.headers["Content-Length"] else None
            chunk = answer.read(2**20)
            if answer.headers.get_content_type() == "text/html" or (not held and chunk[:100].lstrip().startswith(b"<")):
                raise InputError(f"{url} answered with a page, not the file (quota?): fetch it in a browser and put it at {file}")
            file.parent.mkdir(parents=True, exist_ok=True)
            with (
                open(part, "ab" if held else "wb") as stream,
                tqdm(total=size, initial=held, unit="B", unit_scale=True, desc=file.name, disable=None) as bar,
            ):
                while chunk:
                    stream.write(chunk)
                    bar.update(len(chunk))
                    chunk = answer.read(2**20)
        if size is not None and part.stat().st_size != size:
            raise OSError(f"the connection broke off after {part.stat().st_size:,} of {size:,} bytes; the same command goes on from there")
        for name, wanted in (("sha256", sha256_prefix), ("md5", md5)):
            found = file_hash(part, name) if wanted else ""
            if wanted and not found.startswith(wanted):
                part.unlink()
                raise OSError(f"its {name} is {found}, not {wanted}…, so it was removed")
        os.replace(part, file)
    except InputError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # no network, no such file, another checksum
        raise InputError(f"cannot download {url} ({error}): try again, or put the file at {file} yourself") from error
    return file


def file_hash(file: Path, name: str) -> str:
    """A file's "md5" or "sha256", in hexadecimal digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, name).hexdigest()


def open_url(url: str, held: int) -> http.client.HTTPResponse:
    """The server's answer for a file of which the first `held` bytes are here; a server that knows no more of it sends the whole."""
    headers = {"User-Agent": "CleanAug"}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers | ({"Range": f"bytes={held}-"} if held else {})), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable
            raise
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)


def how_to_get(name: str, data_root: str | Path, damaged: Path | None = None) -> str:
    """The command and the address that get one of ARCHIVES; what is `damaged` must be removed before, or it would be taken for whole."""
    root = "" if str(data_root) == "data" else f" --data-root {data_root}"
    target, files = ARCHIVES[name]
    address = next((url for url, _, _ in files if damaged is not None and damaged.name.startswith(Path(url).stem)), files[0][0])
    remove = f"remove {damaged} and " if damaged is not None and damaged.exists() else ""
    return f"{remove}get it with python common.py --download {name}{root}, or unpack {address} in {Path(data_root) / target}"


def fetch(name: str, data_root: str | Path) -> Path:
    """Download and unpack what is missing of one of ARCHIVES, and return its folder. An archive is removed once it is unpacked. InputError for
    what cannot be had: what was downloaded so far waits for the next call."""
    target, files = ARCHIVES[name]
    directory = Path(data_root) / target
    for url, md5, members in files:
        if all((directory / member).exists() or (name == "mnist" and mnist_file(member, data_root).is_file()) for member in members):
            continue
        packed = Path(url).name not in members
        try:
            file = download(url, directory / Path(url).name, md5=md5)
        except InputError as error:
            raise InputError(f"{directory / members[0]} is missing: {error}") from error
        if packed:
            unpack(file, directory, members)
            file.unlink()
    return directory / files[0][2][0] if len(files) == 1 else directory


def unpack(archive: Path, directory: Path, members: list[str]) -> None:
    """Unpack a tar (gzipped or not) or zip archive of these folders into `directory`, where they appear whole or not at all. InputError, naming the
    member, for one that holds anything but files and directories inside these folders, or far more than its own size, before anything is written;
    and for a damaged one."""
    import gzip
    import tarfile
    import zipfile

    waiting = directory / f".{archive.name}.unpacking"
    most = 10 * archive.stat().st_size + 2**20  # of what the published ones hold: at most 4 times their own size (MNIST-C)
    try:
        is_zip = zipfile.is_zipfile(archive)
        with open(archive, "rb") as stream:
            is_gzip = not is_zip and stream.read(2) == b"\x1f\x8b"
        if is_gzip:  # tarfile reads long names whole: to look through the archive would do
            held = 0
            with gzip.open(archive) as stream:
                while chunk := stream.read(2**20):
                    held += len(chunk)
                    if held > most:
                        raise InputError(f"{archive} unpacks to more than {most:,} bytes: nothing was unpacked; remove the archive")
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive, "r:gz" if is_gzip else "r:") as opened:
            held = 0
            for member in opened.infolist() if is_zip else opened:
                name, size = (member.filename, member.file_size) if is_zip else (member.name, member.size)
                inside = os.path.normpath(name).split(os.sep)[0] in members and ".." not in Path(name).parts
                kind = member.external_attr >> 28 if is_zip else 0  # of a zip's member made on Unix: 8 a file, 4 a directory, 10 a link
                plain = kind in (0, 4, 8) if is_zip else (member.isfile() or member.isdir()) and not member.issparse()
                if not inside or not plain:
                    allowed = f"{members[0]}/" if len(members) == 1 else f"one of {', '.join(members)}"
                    raise InputError(f"{archive} holds {name!r}, which is no file in {allowed}: nothing was unpacked; remove the archive")
                held += size
                if size < 0 or held > most:  # before tarfile looks for the next one behind it
                    raise InputError(f"{archive} holds {name!r} of {size:,} bytes, too many for it: nothing was unpacked; remove the archive")
            free = shutil.disk_usage(directory).free
            if held > free:
                raise InputError(f"{archive} holds {held:,} bytes, but {directory} has room for {free:,}: make room, and the same command goes on")
            shutil.rmtree(waiting, ignore_errors=True)
            opened.extractall(waiting, **({"filter": "data"} if not is_zip and hasattr(tarfile, "data_filter") else {}))  # since Python 3.11.4
        for member in members:
            if not (directory / member).exists():  # some were there before
                os.replace(waiting / member, directory / member)
    except InputError:
        raise
    except Exception as error:  # of the archive, its compression, the disk: each library has errors of its own
        raise InputError(f"{archive} cannot be unpacked ({error}): remove it, and get it again") from error
    finally:
        shutil.rmtree(waiting, ignore_errors=True)


class PickledArray:
    """What a pickle says of an array, none of which numpy is trusted with: it would follow pointers in the bytes of an object array."""

    def __init__(self, *content: object):
        self.content = content

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) == 5:  # of an array: version, shape, type, Fortran order, bytes
            self.content = (state[4], state[2], state[1], state[3])

    def pixels(self) -> np.ndarray:
        """The array, if it is of uint8."""
        content, kind, shape, fortran = self.content
        if not isinstance(kind, PickledArray) or kind.content[0] not in ("u1", "uint8"):
            raise ValueError("its data is not uint8")
        content = content.encode("latin1") if isinstance(content, str) else content  # pickled by Python 2
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran in (True, "F") else "C").copy()


class CifarUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists and strings, and arrays as PickledArray; whatever else a pickle names is refused, so no code in it is ever run."""

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("numpy") and name in ("_reconstruct", "_frombuffer", "ndarray", "dtype"):
            return PickledArray
        if (module, name) == ("_codecs", "encode"):  # how Python 3 pickles bytes for Python 2
            return encode_latin1
        raise pickle.UnpicklingError(f"it names {module}.{name}, and no code is unpickled")


def encode_latin1(text: str, *_: object) -> bytes:
    return text.encode("latin1")


def unpickle_cifar(content: bytes) -> dict:
    """What one of CIFAR's pickles holds. Raises ValueError, before anything is unpickled, for one built to use up memory or time."""
    made, kept, memo = 0, set(), 0  # tuples made, the numbers they are kept under, how many numbers there are
    last = ""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        made += name.startswith("TUPLE")
        number = memo if name == "MEMOIZE" else argument
        if "PUT" in name or name == "MEMOIZE":
            memo += 1
            kept |= {number} if last.startswith("TUPLE") else set()
        # CIFAR's pickles take a third of these steps, and have some ten tuples that occur once: to hash one within another within another, each
        # twice, would take for ever. A large number of a PUT would make the unpickler allocate room for all those below it.
        strange = name in ("DUP", "FROZENSET") or ("PUT" in name and number > len(content)) or ("GET" in name and number in kept)
        if strange or made > 40 or count > 2**20:
            raise ValueError(f"{name} at step {count}: not as CIFAR is pickled")
        last = name
    return CifarUnpickler(io.BytesIO(content), encoding="latin1").load()


# ---------------------------------------------------------------------------------------------------------------------
# As a program
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[-1].strip())
    parser.add_argument("run_dirs", nargs="*", metavar="RUN_DIR", help="directories of finished runs: print their results, mean ± std over seeds")
    parser.add_argument("--by", action="append", default=[], metavar="SETTING", help="rows by this setting too, as args.json names it, for example M")
    parser.add_argument("--train-weights", metavar="MODEL", help="train this classifier on digits and write weights/digits-MODEL.pt")
    parser.add_argument("--contact-sheet", metavar="PNG", help="draw every corruption at every severity")
    names = (*ARCHIVES, *PUBLISHED_WEIGHTS)
    parser.add_argument(
        "--download",
        type=lambda name: name if name in names else name.lower().replace("cifar-", "cifar"),  # CIFAR-10-C is cifar10-c
        choices=names,
        metavar="NAME",
        help=f"get a data set or a checkpoint: {', '.join(names)}",
    )
    parser.add_argument("--data-root", default="data", metavar="DIR", help="where --download unpacks a data set")
    args = parser.parse_args()
    if args.download in PUBLISHED_WEIGHTS:
        print(published_file(args.download, Machine(torch.device("cpu"))))
    elif args.download:
        print(f"{fetch(args.download, args.data_root)} is there")
    elif args.contact_sheet:
        contact_sheet(args.contact_sheet)
    elif args.train_weights:
        machine = start_machine()
        model = train_classifier(args.train_weights, machine)
        file = WEIGHTS / f"digits-{args.train_weights}.pt"
        save_atomically(model.state_dict(), file)
        test = evaluate(model, *load_split("digits", "test"), machine)
        print(f"{file}: {test['top1_accuracy']:.2f} % of the 600 clean test digits, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")
    elif args.run_dirs:
        print(table(args.run_dirs, args.by))
    else:
        parser.error("name at least one run directory")


if __name__ == "__main__":
    run_script(main)
