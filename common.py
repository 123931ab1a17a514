"""What the scripts of CleanAug share. Read it in this order:

    constants     data sets, corruptions, paths, InputError
    data          load_split, digits, modified digits, CIFAR and CIFAR-C, batches, affine_warp, mild_augmentation
    folders       Folder: class folders of pictures such as ImageNet's, check_classes, image_batches, gather_images
    corruptions   CORRUPTIONS, corrupt, contact_sheet
    models        ResNeXt-29, Wide ResNet, Shake-Shake, PyramidNet with ShakeDrop, ResNet-50-D and -200, build_model,
                  load_weights, digits' and ImageNet's weights, download
    machine       device, mixed precision, processes, seeds
    checkpoints   atomic files
    evaluation    predict_logits, evaluate, evaluate_folder, evaluate_models, evaluate_corruptions
    results       command line, run directory, logs, results.json, the table over seeds

Nothing happens on import. As a program it prints a Markdown table of mean ± std over seeds, trains a classifier for
digits, draws what the corruptions look like, or gets a data set:

    python common.py RUN_DIR [RUN_DIR ...]
    python common.py --train-weights resnext
    python common.py --contact-sheet out.png
    python common.py --download CIFAR-10-C
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import http.client
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
WEIGHTS = ROOT / "weights"

NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}

# Archives that `python common.py --download NAME` gets: address, md5, and the folder that each unpacks to
ARCHIVES = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"),
    "CIFAR-10-C": ("https://zenodo.org/record/2535967/files/CIFAR-10-C.tar", "56bf5dcef84df0e2308c6dcbcbbd8499", "CIFAR-10-C"),
    "CIFAR-10-P": ("https://zenodo.org/record/2535967/files/CIFAR-10-P.tar", "125d6775afc5846ea84584d7524dedff", "CIFAR-10-P"),
    "CIFAR-100-C": ("https://zenodo.org/record/3555552/files/CIFAR-100-C.tar", "11f0ed0f1191edbf9fa23466ae6021d3", "CIFAR-100-C"),
}
SPLITS = ("train", "val", "test")


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do. `run_script` turns it into exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Data: small sets are uint8 tensors that live on the device; a batch is an index into them, there are no loader workers
# ---------------------------------------------------------------------------------------------------------------------


def load_split(dataset: str, split: str, data_root: str | Path = "data") -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) uint8 and labels (N,) int64 of one split of a set that fits in memory.

    dataset: "digits", "cifar10", "cifar100"; split: "train", "val" or "test". Raises InputError where the files are missing or damaged.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split '{split}': choose from {', '.join(SPLITS)}")
    if dataset == "digits":
        return load_digits(split, data_root)
    if dataset in ("cifar10", "cifar100"):
        return load_cifar(dataset, split, data_root)
    raise InputError(f"unknown data set '{dataset}': choose {', '.join(NUM_CLASSES)}")


def load_digits(split: str, data_root: str | Path = "data") -> tuple[torch.Tensor, torch.Tensor]:
    """UCI digits (Alpaydin & Kaynak 1998) as 3×32×32: 1,000 training, 197 validation, 600 test images.

    The 8×8 integers 0..16 are enlarged bilinearly to 20 px and stand in the middle of a black 32 px canvas. The split is
    stored in the file: stratified, drawn once (data/README.md says how). Returns uint8 (N, 3, 32, 32) and int64 (N,).
    """
    file = find_data("digits.npz", data_root)
    try:
        with np.load(file, allow_pickle=False) as archive:
            images, labels, splits = archive["images"], archive["labels"], archive["split"]
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
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): uint8 (N, 3, 32, 32) and int64 (N,); 45,000 training, 5,000 validation, 10,000 test images.

    The published training set has no validation part: every tenth image of each class is "val" here, the others are "train".
    """
    from torchvision import datasets

    name, folder = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}[dataset], ARCHIVES[dataset][2]
    try:
        data = getattr(datasets, name)(str(data_root), train=split != "test", download=False)  # checks md5 before it unpickles
    except Exception as error:
        raise InputError(
            f"{Path(data_root) / folder} is missing or damaged: {how_to_get(dataset, data_root)}, or name another --data-root"
        ) from error
    images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
    if split == "test":
        return images, labels
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(NUM_CLASSES[dataset]):
        held_out[(labels == label).nonzero()[9::10, 0]] = True
    chosen = held_out if split == "val" else ~held_out
    return images[chosen], labels[chosen]


def load_cifar_corruption(dataset: str, name: str, severity: int, data_root: str | Path = "data") -> tuple[torch.Tensor, torch.Tensor]:
    """One severity of one corruption of CIFAR-10-C or CIFAR-100-C: uint8 (10000, 3, 32, 32) and int64 (10000,), in the test set's order.

    The files are `<corruption>.npy`, (5·N, 32, 32, 3) uint8, severity after severity, and `labels.npy`, in <data_root>/CIFAR-10-C.
    """
    directory = cifar_c(dataset, data_root)
    images, labels = read_array(directory / f"{name}.npy"), read_array(directory / "labels.npy")
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) % 5 or labels.shape != images.shape[:1]:
        raise InputError(f"{directory / name}.npy is {images.dtype} {images.shape} and labels.npy {labels.shape}: expected uint8 (5·N, 32, 32, 3)")
    count = len(images) // 5
    rows = slice((severity - 1) * count, severity * count)
    return torch.from_numpy(images[rows].copy()).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[rows].astype(np.int64))


def cifar_c(dataset: str, data_root: str | Path, kind: str = "C") -> Path:
    """Where CIFAR-10-C, CIFAR-100-C or (kind "P") CIFAR-10-P lies, once unpacked."""
    return Path(data_root) / f"{dataset.upper().replace('CIFAR', 'CIFAR-')}-{kind}"


def read_array(file: Path) -> np.ndarray:
    """An array file, mapped rather than read; never unpickled."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} is missing or damaged ({error}): unpack the data set again") from error


def find_data(name: str, data_root: str | Path) -> Path:
    """The file `name` under data_root; the default "data" is also looked for beside this file, for scripts run from elsewhere."""
    candidates = [Path(data_root) / name] + ([ROOT / "data" / name] if str(data_root) == "data" else [])
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(f"{candidates[0]} is missing: it comes with the repository (git checkout data/{name}), or name its folder with --data-root")


def modified_digits(split: str, data_root: str | Path = "data", variants: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Modified digits: every digit of the split `variants` times, each with its own shift, zoom, gamma and contrast.

    After GrETTA's modified MNIST. Zoom 0.6..1 in x and in y about the centre, then a translation of up to ±8 px in x and in y;
    gamma 2/3..3/2 (log-uniform), then contrast 0.8..1.2; all uniform and drawn from `seed`, so the set is always the same.
    Returns images (variants·N, 3, 32, 32) uint8, labels (variants·N,) int64, and source (variants·N,) int64, the number of the
    digit that each image was made from; images are ordered variant by variant.
    """
    images, labels = load_split("digits", split, data_root)
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
    size = matrix.new_tensor([width, height])
    # grid_sample looks up, for every output pixel, where it comes from (the inverse map), in units of half the image.
    linear, shift = matrix[:, :, :2], matrix[:, :, 2]
    determinant = linear[:, 0, 0] * linear[:, 1, 1] - linear[:, 0, 1] * linear[:, 1, 0]
    adjugate = torch.stack([linear[:, 1, 1], -linear[:, 0, 1], -linear[:, 1, 0], linear[:, 0, 0]], dim=1).view(-1, 2, 2)
    inverse = adjugate / determinant[:, None, None]
    shift = -(inverse @ shift[:, :, None])[:, :, 0]
    theta = torch.cat([inverse * (size[None, None, :] / size[None, :, None]), (shift * 2 / size)[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def adjust_contrast(images: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """m + contrast·(x − m), clipped to [0, 1], with m the mean of the image's luma (0.299, 0.587, 0.114), as PIL's ImageEnhance.Contrast.

    images (B, 3, H, W) in [0, 1]; contrast (B,), 1 is the identity.
    """
    luma = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    mean = (images * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
    return (mean + contrast.view(-1, 1, 1, 1) * (images - mean)).clamp(0, 1)


def mild_augmentation(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What the shipped digits classifiers were trained under: ±1 px, zoom 0.95..1.05, ±5°, per image. images (B, 3, H, W) in [0, 1]."""
    draw = torch.rand(len(images), 5, generator=generator, device=generator.device).to(images.device) * 2 - 1
    return affine_warp(images, affine_matrix(1 + 0.05 * draw[:, :2], draw[:, 2:4], 5 * draw[:, 4]))


# ---------------------------------------------------------------------------------------------------------------------
# Folders: class folders of pictures too many for memory; decoded and cropped by loader processes
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def class_folders(directory: str | Path, advice: str) -> list[str]:
    """The sorted names of the class folders in a directory; InputError, ending in `advice`, where there is no such directory or none in it."""
    if not Path(directory).is_dir():
        raise InputError(f"{directory} is missing: {advice}")
    with os.scandir(directory) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"{directory} holds no class folders: {advice}")
    return classes


def check_classes(directory: str | Path, classes: list[str], expected: list[str], where: str | Path) -> None:
    """InputError, naming the first that differ, unless the class folders in `directory` are those in `where`, and for one that is empty."""
    missing, unexpected = sorted(set(expected) - set(classes)), sorted(set(classes) - set(expected))
    faults = [
        f"{kind} {', '.join(names[:3])}{' …' * (len(names) > 3)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
    ]
    if faults:
        raise InputError(f"{directory} has other classes than {where}: {'; '.join(faults)}")
    for name in classes:
        with os.scandir(Path(directory) / name) as entries:
            if next(entries, None) is None:
                raise InputError(f"{Path(directory) / name} is empty: copy or unpack it again")


class Folder(torch.utils.data.Dataset):
    """Pictures `<directory>/<class>/…` as uint8 (3, size, size) and the number of their class among the sorted `classes`.

    An item is (number, key): a key seeds that picture's random crop (8 % to all of it, sides 3:4 to 4:3) and flip, whatever worker
    does it; None scales the shorter side to `resize` and cuts the centre out. Raises InputError for a folder without pictures and, when
    it is read, for a picture that is damaged, naming it.
    """

    def __init__(self, directory: str | Path, classes: list[str], size: int = 224, resize: int = 256):
        from torchvision.transforms import v2

        self.files, labels = [], []
        for label, name in enumerate(classes):
            with os.scandir(Path(directory) / name) as entries:
                found = sorted(entry.path for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES))
            if not found:
                raise InputError(f"{Path(directory) / name} holds no pictures (looked for {', '.join(IMAGE_SUFFIXES)})")
            self.files += found
            labels += [label] * len(found)
        # Bytes in one array: millions of Python strings would be copied into every worker as their reference counts change.
        self.files = np.array([os.fsencode(file) for file in self.files])
        self.labels = torch.tensor(labels)
        self.random_crop = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
        self.centre_crop = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image
        from torchvision.transforms.v2.functional import pil_to_tensor

        number, key = item
        file = os.fsdecode(self.files[number])
        try:
            with warnings_off(), Image.open(file) as opened:
                picture = opened.convert("RGB")
        except Exception as error:  # a damaged picture raises whatever its decoder meets
            raise InputError(f"{file} is not a readable picture ({error}): restore it, or remove it") from error
        if key is None:
            return pil_to_tensor(self.centre_crop(picture)), self.labels[number]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)  # the CPU's alone: torch.manual_seed would reseed a GPU's too
            return pil_to_tensor(self.random_crop(picture)), self.labels[number]

    def keep(self, most: int) -> "Folder":
        """A folder of at most `most` of these pictures, evenly spaced through them."""
        return self.part(evenly_spaced(most, len(self)))

    def part(self, chosen: torch.Tensor) -> "Folder":
        """A folder of the pictures with these numbers."""
        kept = copy.copy(self)
        kept.files, kept.labels = self.files[chosen.numpy()], self.labels[chosen]
        return kept

    def batches(self, items: Iterable[list[tuple[int, int | None]]], workers: int, machine: "Machine") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of items as uint8 images (b, 3, size, size) and labels (b,), on the device."""
        loader = torch.utils.data.DataLoader(self, batch_sampler=items, num_workers=workers, pin_memory=machine.device.type == "cuda")
        try:
            for images, labels in loader:
                yield images.to(machine.device, non_blocking=True), labels.to(machine.device, non_blocking=True)
        except InputError as error:  # one raised in a worker comes with the worker's traceback before it
            raise InputError(str(error).strip().splitlines()[-1].removeprefix("common.InputError: ")) from error

    def random_batches(
        self, batch_size: int, generator: torch.Generator, workers: int, machine: "Machine"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One shuffled epoch, this rank's part of each batch, randomly cropped and flipped; order and keys are drawn on every rank alike."""
        numbers = epoch_batches(len(self), batch_size, generator)
        keys = torch.randint(2**62, numbers.shape, generator=generator, device=generator.device)
        items = (list(zip(machine.own_rows(row).tolist(), machine.own_rows(key).tolist())) for row, key in zip(numbers.cpu(), keys.cpu()))
        return self.batches(items, workers, machine)

    def all_batches(self, batch_size: int, workers: int, machine: "Machine") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's part of all pictures, in order, centres cut out."""
        numbers = machine.own_rows(torch.arange(len(self))).tolist()
        items = [(number, None) for number in numbers]
        return self.batches([items[start : start + batch_size] for start in range(0, len(items), batch_size)], workers, machine)


Data = tuple[torch.Tensor, torch.Tensor] | Folder  # uint8 images (N, 3, H, W) and labels (N,), or pictures on disk


def count_images(data: Data | None) -> int:
    return 0 if data is None else len(data) if isinstance(data, Folder) else len(data[1])


def imagenet_c(directory: Path, classes: list[str], where: Path, advice: str, dry_run: bool) -> Callable[[str, int], Folder]:
    """ImageNet-C's pictures by name and severity, once all of its folders are found to have the classes of `where` (InputError, ending in
    `advice`, otherwise); one picture of each in a dry run."""
    for name in CORRUPTIONS:
        class_folders(directory / name, advice)
        for severity in range(1, 6):
            folder = directory / name / str(severity)
            check_classes(folder, class_folders(folder, advice), classes, where)

    def corrupted(name: str, severity: int) -> Folder:
        data = Folder(directory / name / str(severity), classes, resize=224)  # published at 224 px already
        return data.keep(1) if dry_run else data

    return corrupted


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


def image_batches(
    data: Data, batch_size: int, generator: torch.Generator, machine: "Machine", workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One shuffled and augmented epoch, batch by batch: this rank's rows as float images (b, 3, H, W) in [0, 1] and labels (b,).

    data: uint8 images and labels on the device (mild augmentation), or a Folder (random crops and flips). batch_size is over all ranks;
    order and augmentation are drawn from `generator` on every rank alike. Pictures left over by the last whole batch wait for the next epoch.
    """
    if isinstance(data, Folder):
        for images, labels in data.random_batches(batch_size, generator, workers, machine):
            yield to_float(images), labels
    else:
        images, labels = data
        for index in epoch_batches(len(labels), batch_size, generator):
            batch = mild_augmentation(to_float(images[index]), generator)
            yield machine.own_rows(batch), machine.own_rows(labels[index])


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
def corrupt(images, name, severity, seed):
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


# Each function below takes images (B, 3, H, W), float32, keys (B,) and one severity's constants. It returns
# (B, 3, H, W) before clamping. Streams 0, 1, 2... keep the random draws of one function apart.


def gaussian_noise(images, keys, deviation):
    return images + deviation * normals(keys, 0, images.shape[1:])


def speckle_noise(images, keys, deviation):
    return images + images * deviation * normals(keys, 0, images.shape[1:])


def shot_noise(images, keys, photons):
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


def impulse_noise(images, keys, amount):
    """Salt and pepper: every channel of every pixel on its own, half black and half white."""
    draws = uniforms(keys, 0, images.shape[1:])
    return torch.where(draws < amount / 2, 0.0, torch.where(draws > 1 - amount / 2, 1.0, images))


def gaussian_blur(images, keys, deviation):
    return blur(images, deviation)


def defocus_blur(images, keys, radius, softness):
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


def glass_blur(images, keys, deviation, reach, rounds):
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


def motion_blur(images, keys, radius, deviation):
    """A one-sided Gaussian streak at an angle drawn per image from -45..45 degrees."""
    return streak(images, radius, deviation, 90 * uniforms(keys, 0, (1,)) - 45)


def zoom_blur(images, keys, count, step):
    """The mean of the image and its enlargements by 1, 1 + step, ..., count of them."""
    height, width = images.shape[-2:]
    total = images.double()
    for i in range(count):
        factor = 1 + i * ((1 + step) - 1)  # numpy.arange's rounding, which decides some sizes of the crop
        total = total + separable(images, zoom_matrix(height, factor), zoom_matrix(width, factor))
    return (total / (count + 1)).float()


def snow(images, keys, mean, deviation, zoom, threshold, radius, streak_deviation, keep):
    """Enlarged, thresholded noise, streaked towards the ground, over a whitened image."""
    height, width = images.shape[-2:]
    flakes = mean + deviation * normals(keys, 0, (1, height, width))
    flakes = separable(flakes, zoom_matrix(height, zoom), zoom_matrix(width, zoom)).float()
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = streak(flakes, radius, streak_deviation, -90 * uniforms(keys, 1, (1,)) - 45)
    grey = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]
    white = torch.maximum(images, 1.5 * grey + 0.5)
    return keep * images + (1 - keep) * white + flakes + flakes.flip(2, 3)


def frost(images, keys, keep, strength, scale):
    """keep * x + strength * ice. Differs from the paper: its ice is six photographs, ours a procedural texture."""
    return keep * images + strength * ice(keys, *images.shape[-2:], scale)


def fog(images, keys, strength, decay):
    """Adds a plasma fractal, then rescales so that the brightest value keeps its place."""
    height, width = images.shape[-2:]
    brightest = images.amax((1, 2, 3), keepdim=True)
    haze = plasma(keys, 2 ** math.ceil(math.log2(max(height, width))), decay)[:, None, :height, :width]
    return (images + strength * haze) * brightest / (brightest + strength)


def brightness(images, keys, shift):
    """Adds to the HSV value; hue and saturation stay, so the channels grow by one common factor."""
    value = images.amax(1, keepdim=True)
    raised = (value + shift).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp(min=1e-8)), raised)


def contrast(images, keys, factor):
    means = images.double().mean((2, 3), keepdim=True).float()
    return (images - means) * factor + means


def saturate(images, keys, factor, shift):
    """Scales and shifts the HSV saturation. Grey has hue 0, so a shift turns it reddish, as it did when published."""
    value = images.amax(1, keepdim=True)
    distance = value - images  # hue fixes the ratios of the channels' distances to V
    spread = distance.amax(1, keepdim=True)
    red = torch.tensor([0.0, 1.0, 1.0], device=images.device).view(1, 3, 1, 1)
    direction = torch.where(spread > 0, distance / spread.clamp(min=1e-8), red)
    saturation = (spread / value.clamp(min=1e-8) * factor + shift).clamp(0, 1)
    return value * (1 - saturation * direction)


def elastic_transform(images, keys, amplitude, smoothness, jitter):
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


def pixelate(images, keys, factor):
    """PIL's resize with BOX down to int(side * factor) and up again."""
    rows, columns = ((box_matrix(int(side * factor), side) @ box_matrix(side, int(side * factor))) for side in images.shape[-2:])
    return separable(images, rows, columns).float()


def jpeg_compression(images, keys, quality):
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


def spatter(images, keys, mean, deviation, smoothness, threshold, strength, mud):
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


def scramble(bits):
    """splitmix64's finaliser on int64, in place. torch shifts signed numbers, hence the masks; products wrap."""
    bits ^= (bits >> 30).bitwise_and_((1 << 34) - 1)
    bits *= -0x40A7B892E31B1A47
    bits ^= (bits >> 27).bitwise_and_((1 << 37) - 1)
    bits *= -0x6B2FB644ECCEEE15
    bits ^= (bits >> 31).bitwise_and_((1 << 33) - 1)
    return bits


def image_keys(images, label):
    """One 64-bit key per image: (B, 3, H, W) in [0, 1] -> (B,) int64. Integer sums: exact in any order."""
    pixels = (images * 255).round().long().flatten(1)
    weights = scramble(torch.arange(1, pixels.shape[1] + 1, device=images.device))
    salt = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little", signed=True)
    return scramble((pixels * weights).sum(1) + salt)


def uniforms(keys, stream, shape):
    """(B, *shape) float32, uniform on the open interval (0, 1) in steps of 2^-23; two from each 64-bit hash."""
    count = math.prod(shape)
    counters = scramble(torch.arange((count + 1) // 2, device=keys.device) + (stream << 40) + 1)
    bits = scramble(keys[:, None] + counters)
    halves = torch.cat([bits >> 41, bits >> 18], 1).bitwise_and_((1 << 23) - 1)[:, :count]
    return ((halves.float() + 0.5) * 2.0**-23).view(-1, *shape)


def normals(keys, stream, shape):
    """(B, *shape) float32, standard normal (Box-Muller)."""
    half = (math.prod(shape) + 1) // 2
    draws = uniforms(keys, stream, (2, half))
    length, angle = (-2 * draws[:, 0].log()).sqrt(), 2 * math.pi * draws[:, 1]
    return torch.cat([length * angle.cos(), length * angle.sin()], 1)[:, : math.prod(shape)].view(-1, *shape)


def plasma(keys, side, decay):
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


def ice(keys, height, width, scale):
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


def separable(images, rows, columns):
    """rows (H', H) @ image @ columns (W', W) transposed, for (B, C, H, W): (B, C, H', W') float64."""
    return rows.to(images.device) @ (images.double() @ columns.T.to(images.device))


def blur(images, deviation, truncate=4, mirrored=False):
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


def zoom_matrix(side, factor):
    """(side, side): the middle ceil(side / factor) pixels, linearly enlarged with their ends kept, cut to side."""
    crop = math.ceil(side / factor)
    zoomed = round(crop * factor)
    positions = (torch.arange(side, dtype=torch.float64) + (zoomed - side) // 2) * (crop - 1) / (zoomed - 1)
    return (1 - (positions[:, None] + (side - crop) // 2 - torch.arange(side)).abs()).clamp(min=0)


def box_matrix(side, resized):
    """(resized, side): PIL's BOX filter, the mean of the pixels whose centres fall in the box."""
    ratio = side / resized
    centres = (torch.arange(resized, dtype=torch.float64) + 0.5) * ratio
    distance = (torch.arange(side) + 0.5 - centres[:, None]) / max(ratio, 1)
    inside = ((distance > -0.5) & (distance <= 0.5)).double()
    return inside / inside.sum(1, keepdim=True)


def dct_matrix(side):
    """(side, side): orthonormal 8-point DCT-II on every run of 8."""
    angles = torch.outer(torch.arange(8), 2 * torch.arange(8) + 1).double() * math.pi / 16
    basis = angles.cos() / 2
    basis[0] /= math.sqrt(2)
    return torch.block_diag(*[basis] * (side // 8))


def round_away(values):
    """Nearest integer, halves away from zero as in libjpeg; the nudge keeps rounding noise from deciding ties."""
    return values.sign() * (values.abs() + 0.5 + 1e-9).floor()


def box_mean(images):
    return F.avg_pool2d(F.pad(images, [1] * 4, mode="reflect"), 3, 1)


def sample(images, x, y, align_corners):
    """Bilinear look-up at pixel positions x, y (B, H, W); outside, mirrored about border pixels' centres or edges."""
    height, width = images.shape[-2:]
    if align_corners:
        grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    else:
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=align_corners)


def streak(images, radius, deviation, degrees):
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


def example_pictures(count, side, seed=0):
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


def contact_sheet(path):
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
                axis.imshow(image[0].permute(1, 2, 0), interpolation="nearest")
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
    dataset: its image statistics are used for normalisation, and "digits" takes the slim widths. Raises InputError for an unknown name.
    """
    # torchvision's Inception and GoogLeNet were trained on inputs normalised by 0.5/0.5, its other ImageNet models by ImageNet's statistics.
    imagenet = dataset.startswith("imagenet") and name not in ("googlenet", "inception_v3")
    statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if imagenet else ((0.5,) * 3, (0.5,) * 3)
    models = DIGITS_MODELS if dataset == "digits" else MODELS
    if name not in models:
        return torchvision_model(name, num_classes, *statistics)
    model = models[name](num_classes)
    return normalise_inside(model, *statistics) if name.startswith("resnet") else model  # the others do it themselves


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


def check_input_size(model: nn.Module, name: str, size: int) -> None:
    """Raise InputError where the model does not take square images of this size: some of torchvision's need 224 px."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"model '{name}' does not take {size} px images: {str(error).splitlines()[0]}; choose another --model") from error
    model.train(training)


def normalise_input(model: nn.Module, inputs: tuple) -> tuple:
    mean, std = model.normalisation.to(inputs[0].dtype).split(1)
    return ((inputs[0] - mean) / std,)


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_weights(model: nn.Module, file: str | Path) -> nn.Module:
    """Load a checkpoint into `model` and return it.

    The file holds a state dict, alone or under `state_dict`, `model_state_dict` or `weights`, with or without `module.` (or
    `_orig_mod.`, `resnet.`) before every key. Only tensors are unpickled (`weights_only=True`). Raises InputError for a missing, truncated
    or unsafe file, and for one that does not fit, naming the keys.
    """
    state = load_tensors(file, "give the path of a checkpoint")
    for key in ("state_dict", "model_state_dict", "weights"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) and isinstance(state[key], torch.Tensor) for key in state):
        raise InputError(f"{file} holds no state dict (nor one under state_dict, model_state_dict, weights)")
    for prefix in ("module.", "_orig_mod.", "resnet."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return load_state(model, state, f"{file} does not fit this model", "choose the --model and --dataset it was trained for")


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
    model.load_state_dict(state, strict=False)
    return model


def load_digits_weights(model: nn.Module, name: str, machine: "Machine", data_root: str | Path = "data", dry_run: bool = False) -> Path:
    """Load the shipped digits classifier `name` (weights/digits-<name>.pt) into `model`; where the file is missing, train it first and keep it."""
    file = WEIGHTS / f"digits-{name}.pt"
    if not file.is_file():
        if machine.is_main:
            print(f"{file} is missing: training {name} on the 1,000 training digits first", flush=True)
        trained = train_classifier(name, machine, data_root, epochs=1 if dry_run else 30)  # alike on every rank
        if dry_run:  # one epoch makes no classifier worth keeping
            model.load_state_dict(trained.state_dict())
            return file
        if machine.is_main:
            save_atomically(trained.state_dict(), file)
        machine.barrier()
    load_weights(model, file)
    return file


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
    if machine.is_main:
        download(url, file, Path(url).stem.split("-")[-1])
    machine.barrier()
    again = "remove it, so that it is downloaded again"
    state = load_tensors(file, again)
    wanted = model.state_dict()
    # Auxiliary heads are for training from scratch; a head of another number of classes gives way to the model's own.
    state = {key: value for key, value in state.items() if key in wanted or not key.lower().startswith("aux")}
    head = [key for key in state if key in wanted and state[key].shape[:1] == (1000,) and wanted[key].shape[:1] != (1000,)]
    load_state(model, state | {key: wanted[key] for key in head}, f"{file} does not fit {name}", again)
    return f"{file}" + (f", but for {', '.join(head)} (another number of classes)" if head else "")


def download(url: str, file: Path, sha256_prefix: str | None = None, md5: str | None = None) -> Path:
    """Fetch `url` to `file` unless it is there. The file appears whole or not at all; InputError says what went wrong, and what to do.

    What came before a connection broke off waits in `<file>.part`, and the next call goes on from there where the server can (a Range request).
    sha256_prefix (the first digits of the checksum, as in torchvision's file names) or md5: a file of another checksum is removed.
    """
    if file.is_file():
        return file
    from tqdm import tqdm

    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = part.stat().st_size if part.is_file() else 0
        print(f"downloading {url} to {file}" + (f", from byte {held:,} on" if held else ""), flush=True)
        with open_url(url, held) as answer:
            held = held if answer.status == 206 else 0  # 200: the server sends the whole of it
            size = held + int(answer.headers["Content-Length"]) if answer.headers["Content-Length"] else None
            with (
                open(part, "ab" if held else "wb") as stream,
                tqdm(total=size, initial=held, unit="B", unit_scale=True, desc=file.name, disable=None) as bar,
            ):
                while chunk := answer.read(2**20):
                    stream.write(chunk)
                    bar.update(len(chunk))
        if size is not None and part.stat().st_size != size:
            raise OSError(f"the connection broke off after {part.stat().st_size:,} of {size:,} bytes; the same command goes on from there")
        for name, wanted in (("sha256", sha256_prefix), ("md5", md5)):
            found = hashlib.new(name)
            with open(part, "rb") as stream:
                while wanted and (chunk := stream.read(2**20)):
                    found.update(chunk)
            if wanted and not found.hexdigest().startswith(wanted):
                part.unlink()
                raise OSError(f"its {name} is {found.hexdigest()}, not {wanted}…, so it was removed")
        os.replace(part, file)
    except (OSError, ValueError, http.client.HTTPException) as error:  # no network, no such file, another checksum
        raise InputError(f"cannot download {url} ({error}): try again, or put the file at {file} yourself") from error
    return file


def open_url(url: str, held: int) -> http.client.HTTPResponse:
    """The server's answer for a file of which the first `held` bytes are here; a server that knows no more of it sends the whole."""
    headers = {"User-Agent": "CleanAug"}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers | ({"Range": f"bytes={held}-"} if held else {})), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable
            raise
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)


def how_to_get(name: str, data_root: str | Path) -> str:
    """The command and the address that get one of ARCHIVES."""
    root = "" if str(data_root) == "data" else f" --data-root {data_root}"
    return f"get it with python common.py --download {name}{root}, or unpack {ARCHIVES[name][0]} in {data_root}"


def fetch_archive(name: str, data_root: str | Path) -> Path:
    """Download and unpack one of ARCHIVES, unless its folder is there, and return the folder. The archive is removed once it is unpacked."""
    url, md5, folder = ARCHIVES[name]
    directory = Path(data_root) / folder
    if not directory.exists():
        archive = download(url, Path(data_root) / url.rsplit("/", 1)[1], md5=md5)
        unpack(archive, Path(data_root), folder)
        archive.unlink()
    return directory


def unpack(archive: Path, root: Path, folder: str) -> None:
    """Unpack a tar archive of one `folder` into `root`, where it appears whole or not at all. InputError, naming the member, for one that holds
    anything but files and directories inside that folder, before anything is written; and for a damaged one."""
    import tarfile
    import zlib

    waiting = root / f".{folder}.unpacking"
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                inside = os.path.normpath(member.name).split(os.sep)[0] == folder and ".." not in Path(member.name).parts
                if not inside or not (member.isfile() or member.isdir()):
                    raise InputError(f"{archive} holds {member.name!r}, which is no file in {folder}/: nothing was unpacked; remove the archive")
            shutil.rmtree(waiting, ignore_errors=True)
            tar.extractall(waiting, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.11.4 brought it
        os.replace(waiting / folder, root / folder)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"{archive} cannot be unpacked ({error}): remove it, and get it again") from error
    finally:
        shutil.rmtree(waiting, ignore_errors=True)


def train_classifier(
    name: str, machine: "Machine", data_root: str | Path = "data", epochs: int = 30, batch_size: int = 50, lr: float = 0.1, seed: int = 0
) -> nn.Module:
    """A digits classifier: SGD with Nesterov momentum 0.9, weight decay 5e-4, one-cycle learning rate, label smoothing 0.1, mild augmentation."""
    from tqdm import tqdm

    with torch.random.fork_rng(devices=[]):  # the caller's random state must not depend on whether a file was at hand
        torch.manual_seed(seed)
        model = build_model(name, 10, "digits").to(machine.device, memory_format=machine.weight_layout)
    images, labels = (tensor.to(machine.device) for tensor in load_split("digits", "train", data_root))
    validation = load_split("digits", "val", data_root)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
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
# Machine: device, mixed precision, processes, seeds
# ---------------------------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """Where a script runs. One process and torchrun take the same path: rank 0 of world size 1 is a process on its own."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    amp_dtype: torch.dtype | None = None  # None: float32

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def chunk(self) -> int:
        """Images in one forward pass without gradient: on a CPU what stays in its cache, which is faster than larger batches."""
        return 128 if self.device.type == "cpu" else 4096

    def layout(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in the layout to train in: channels_last, which is faster, but for odd batches on a CPU, where oneDNN's backward
        pass through narrow convolutions writes outside its memory (torch 2.15, more than one thread; weights must not be channels_last either)."""
        odd = self.device.type == "cpu" and len(images) % 2 == 1
        return images.contiguous(memory_format=torch.contiguous_format if odd else torch.channels_last)

    @property
    def weight_layout(self) -> torch.memory_format:
        return torch.contiguous_format if self.device.type == "cpu" else torch.channels_last

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None)

    def own_rows(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor whose first dimension is the global batch; parts differ by one row where they must."""
        size = len(batch)
        return batch[self.rank * size // self.world_size : (self.rank + 1) * size // self.world_size]

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on every rank."""
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
        dist.init_process_group("nccl" if use_cuda else "gloo")
    amp_dtype = None
    if amp:
        amp_dtype = torch.float16 if use_cuda and not torch.cuda.is_bf16_supported() else torch.bfloat16
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return Machine(chosen, rank, world_size, amp_dtype)


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


def save_atomically(content: object, file: str | Path) -> None:
    """Write a checkpoint of tensors and plain values beside `file`, flush it to disk, then rename it: readers see the old one or the new one."""
    file = Path(file)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        beside.unlink(missing_ok=True)
        raise InputError(f"cannot write {file}: {error}") from error


def load_tensors(file: str | Path, advice: str) -> object:
    """Unpickle tensors and plain values only. Raises InputError for a missing, truncated or unsafe file."""
    if not Path(file).is_file():
        raise InputError(f"{file} does not exist: {advice}")
    try:
        with warnings_off():
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile, EOF and runtime errors, as torch.load meets them
        reason = "it holds more than tensors (code is never unpickled)" if "weights_only" in str(error).lower() else "truncated or no checkpoint"
        raise InputError(f"cannot read {file}: {reason}; {advice}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_logits(model: Callable, images: torch.Tensor, machine: Machine, chunk: int | None = None) -> torch.Tensor:
    """Logits (N, classes) float32 of uint8 images (N, 3, H, W), each image on one rank exactly once, in chunks. `model` maps [0, 1] images to logits."""
    logits = []
    for part in machine.own_rows(images).split(chunk or machine.chunk):
        with machine.autocast():
            batch = to_float(part.to(machine.device)).contiguous(memory_format=torch.channels_last)
            logits.append(model(batch).float())
    return machine.all_rows(torch.cat(logits))


def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, machine: Machine) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and mean cross entropy, in eval mode; the model's mode is restored."""
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
    models: list[nn.Module], corrupted: Callable[[str, int], Data], batch_size: int, workers: int, machine: Machine
) -> list[dict[str, list[float]]]:
    """For each model {corruption: [accuracy (%) at severity 1, …, 5]}; `corrupted(name, severity)` makes, or reads, every set once."""
    from tqdm import tqdm

    found = [{name: [] for name in CORRUPTIONS} for _ in models]
    progress = tqdm(total=5 * len(CORRUPTIONS), desc="corruptions", unit="set", disable=not machine.is_main)
    for name in CORRUPTIONS:
        for severity in range(1, 6):
            figures = evaluate_models(models, corrupted(name, severity), batch_size, workers, machine)
            for values, figure in zip(found, figures):
                values[name].append(figure["top1_accuracy"])
            progress.update()
    progress.close()
    return found


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
        sys.stderr.write(f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")
        sys.exit(2)

    def parse(self, argv: list[str] | None, published: Callable[[argparse.Namespace], dict]) -> argparse.Namespace:
        """Parse argv; a flag left out takes the value of the run continued, then that of the --load-conf file, then `published(args)`'s, then its default.

        published: from what is given so far (data set and model among it) to a dict of the values published for it.
        """
        argv = sys.argv[1:] if argv is None else argv
        argv = [self.hyphenate(word) for word in argv]
        given = self.parse_args(argv)
        configurations = [given.load_conf] if given.load_conf else []
        if given.run_dir and (given.resume or given.evaluate or getattr(given, "predict", None)):
            earlier = Path(given.run_dir) / "args.json"  # the run that is continued or used: its own settings go before those of --load-conf
            configurations += [earlier] if earlier.is_file() else []
        for configuration in configurations:
            self.set_defaults(**self.read_configuration(configuration))
        given = self.parse_args(argv)
        for name, value in published(given).items():
            if getattr(given, name, "") is None:
                setattr(given, name, value)
        return given

    @staticmethod
    def hyphenate(word: str) -> str:
        name, equals, value = word.partition("=")
        return name.replace("_", "-") + equals + value if word.startswith("--") else word

    def read_configuration(self, file: str | Path) -> dict:
        try:
            values = json.loads(Path(file).read_text())
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError) as error:
            self.error(f"--load-conf {file}: {error}")
        actions = {action.dest: action for action in self._actions}
        # What an earlier run's args.json says of that run, not of the method.
        skipped = set(ENVIRONMENT_KEYS) | {"run_dir", "resume", "load_conf", "evaluate", "predict", "dry_run"}
        values = {key.replace("-", "_"): value for key, value in values.items()}
        unknown = sorted(set(values) - set(actions) - skipped)
        if unknown:
            self.error(f"--load-conf {file}: unknown settings {', '.join(unknown)}")
        defaults = {}
        for key, value in values.items():
            if key in skipped:
                continue
            action = actions[key]
            switch = isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction, argparse.BooleanOptionalAction))
            if switch and not isinstance(value, bool):
                self.error(f"--load-conf {file}: {key} is true or false, not {value!r}")
            if value is None and action.default is not None:
                self.error(f"--load-conf {file}: {key} is null, but needs a value")
            if value is not None and not switch:
                try:  # the same checks as on the command line
                    value = self._get_value(action, str(value))
                    self._check_value(action, value)
                except argparse.ArgumentError as error:
                    self.error(f"--load-conf {file}: {error}")
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
    """Run `main`; bad input ends in one line on stderr and exit code 2."""
    try:
        main()
        if dist.is_initialized():  # ranks leave together: one that closes its connections while another still works may abort it
            with contextlib.suppress(RuntimeError):
                dist.barrier()
    except (InputError, OSError) as error:  # an OSError names the file and what the system said
        if "tqdm" in sys.modules:  # bars that are still open would be drawn over the line
            for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
                bar.close()
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


ENVIRONMENT_KEYS = ("git_commit", "versions", "device_name", "world_size", "command")


class Run:
    """A run's directory: args.json, log.jsonl, TensorBoard events, a copy of the script. Only rank 0 writes."""

    def __init__(self, directory: Path, machine: Machine, arguments: dict | None, resume_step: int | None, started: float):
        self.directory, self.machine, self.started = directory, machine, started
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


def argument_of_run(directory: Path, name: str) -> object:
    """An argument that a run was started with; None where there is no such run."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((directory / "args.json").read_text()).get(name)
    return None


def read_results(directory: Path) -> dict:
    """The results.json of a finished run."""
    try:
        return json.loads((directory / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / 'results.json'}: no results of a finished run ({error})") from error


def run_directory(script: str, arguments: dict, method: str, machine: Machine) -> Path:
    """--run-dir, or runs/<script>/<dataset>-<model>-<method>-s<seed>-<time>; InputError for one that is in use, unless --resume."""
    answer = ["", ""]  # directory, error: rank 0 looks, and all ranks hear the same
    if machine.is_main:
        name = f"{arguments['dataset']}-{arguments['model']}-{method}-s{arguments['seed']}-{time.strftime('%Y%m%d-%H%M%S')}"
        directory = Path(arguments["run_dir"] or Path("runs") / script / name)
        for suffix in range(2, 1000):
            if arguments["run_dir"] or not directory.exists():
                break
            directory = directory.with_name(f"{name}-{suffix}")
        answer[0] = str(directory)
        if directory.exists() and not directory.is_dir():
            answer[1] = f"{directory} is not a directory: choose another with --run-dir"
        elif directory.is_dir() and any(directory.iterdir()) and not arguments["resume"]:
            answer[1] = f"{directory} is not empty: continue it with --resume, or choose another with --run-dir"
    if machine.world_size > 1:
        dist.broadcast_object_list(answer)
    if answer[1]:
        raise InputError(answer[1])
    return Path(answer[0])


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
    """Drop the lines after `step`: a resumed run writes them again."""
    lines = file.read_text().splitlines() if file.is_file() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a run that was killed may leave half a line
            if json.loads(line)["step"] <= step:
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
        setting = f"{100 * results['proportion']:g} %" if results.get("proportion") else results.get("train_on", "all")
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
        elif name in ("corruptions", "shifted") and isinstance(value, dict):
            for key in value if name == "shifted" else [key for key in value if key.startswith("mean")]:
                yield section, method, f"{name} {key}", value[key]


def table(directories: list[str | Path]) -> str:
    """A Markdown table per script, data set and model: rows are methods, columns figures, cells mean ± std over the runs' seeds."""
    cells: dict[str, dict[str, dict[str, dict]]] = {}
    for directory in directories:
        file = Path(directory) / "results.json"
        try:
            results = read_results(Path(directory))
            for section, row, column, value in table_cells(results):
                # A baseline is the same figure in every run of its seed and setting: one value per seed counts.
                values = cells.setdefault(section, {}).setdefault(row, {}).setdefault(column, {})
                if row == results["method"] and column != "wall_seconds" and values.get(results["seed"], value) != value:
                    raise InputError(f"{file}: {row} with seed {results['seed']} is there twice, with other settings: make a table for each")
                values[results["seed"]] = value
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: no results of a finished run ({type(error).__name__}: {error})") from error
    lines = []
    for section, rows in cells.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        with contextlib.suppress(ValueError):
            columns.sort(key=lambda column: float(column.removesuffix(" %")))
        seeds = max(len(values) for row in rows.values() for values in row.values())
        lines += [
            f"**{section}** (mean ± std over {seeds} seed{'s' * (seeds > 1)})",
            "",
            f"| | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        order = ("none", "five_crop", "ten_crop", "bn_adapt", "vanilla", "surrogate", "whitebox")  # rows as in the papers
        order += ("clean", "Speckle", "Gauss_single", "Gauss_mult", "ANT", "ANT3x3")
        order += ("random", "trivial", "autoaugment", "advaa", "replay")
        for row, values in sorted(rows.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)):
            lines.append(f"| {row} | {' | '.join(mean_and_std(list(values.get(column, {}).values())) for column in columns)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def mean_and_std(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[-1].strip())
    parser.add_argument("run_dirs", nargs="*", metavar="RUN_DIR", help="directories of finished runs: print their results, mean ± std over seeds")
    parser.add_argument("--train-weights", metavar="MODEL", help="train this classifier on digits and write weights/digits-MODEL.pt")
    parser.add_argument("--contact-sheet", metavar="PNG", help="draw every corruption at every severity")
    parser.add_argument("--download", choices=tuple(ARCHIVES), metavar="SET", help=f"get a data set: {', '.join(ARCHIVES)}")
    parser.add_argument("--data-root", default="data", metavar="DIR", help="where --download unpacks it")
    args = parser.parse_args()
    if args.download:
        print(f"{fetch_archive(args.download, args.data_root)} is there")
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
        print(table(args.run_dirs))
    else:
        parser.error("name at least one run directory")


if __name__ == "__main__":
    run_script(main)
