"""Tiny data sets in the exact formats of the published ones, made anew by the tests."""

import csv
import gzip
import math
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common

WNIDS = ("n01440764", "n01443537")


def random_pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_cifar(root: Path, dataset: str, train: int, test: int, corrupted: int = 0) -> None:
    """The archive's pickles with `train` and `test` images; CIFAR-C with `corrupted` images a severity,
    labels those of the first test images."""
    classes = common.NUM_CLASSES[dataset]
    folder = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[dataset]
    folder.mkdir(parents=True)
    parts = {
        "cifar10": {f"data_batch_{number}": train // 5 for number in range(1, 6)} | {"test_batch": test},
        "cifar100": {"train": train, "test": test},
    }
    for seed, (name, count) in enumerate(parts[dataset].items()):
        key = "labels" if dataset == "cifar10" else "fine_labels"
        content = {"data": random_pixels(seed, count, 3072), key: [i % classes for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    metas = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}
    meta, key = metas[dataset]
    (folder / meta).write_bytes(pickle.dumps({key: [f"class {i}" for i in range(classes)]}, protocol=2))
    if corrupted:
        directory = root / f"{dataset.upper().replace('CIFAR', 'CIFAR-')}-C"
        directory.mkdir()
        for seed, name in enumerate(common.CORRUPTIONS):
            np.save(directory / f"{name}.npy", random_pixels(100 + seed, 5 * corrupted, 32, 32, 3))
        np.save(directory / "labels.npy", np.tile(np.arange(corrupted) % classes, 5))


def make_perturbed(root: Path, names: tuple[str, ...]) -> None:
    """CIFAR-10-P: 3 sequences of 5 frames."""
    (root / "CIFAR-10-P").mkdir()
    for seed, name in enumerate(names):
        np.save(root / "CIFAR-10-P" / f"{name}.npy", random_pixels(seed, 3, 5, 32, 32, 3))


def make_mnist(root: Path, train: int, test: int, corrupted: bool = False, zipped: bool = True) -> None:
    """The four idx files as torchvision keeps them, gzipped or not; MNIST-C of the test images."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for kind, count in (("train", train), ("t10k", test)):
        images, labels = digits(count), np.arange(count, dtype=np.uint8) % 10
        for name, array in ((f"{kind}-images-idx3-ubyte", images), (f"{kind}-labels-idx1-ubyte", labels)):
            content = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            (folder / f"{name}{'.gz' * zipped}").write_bytes(gzip.compress(content) if zipped else content)
    for seed, name in enumerate(common.MNIST_C if corrupted else ()):
        (root / "mnist_c" / name).mkdir(parents=True)
        for split, count in (("train", train), ("test", test)):
            np.save(root / "mnist_c" / name / f"{split}_images.npy", random_pixels(seed, count, 28, 28, 1))
            np.save(root / "mnist_c" / name / f"{split}_labels.npy", np.arange(count) % 10)


def digits(count: int) -> np.ndarray:
    """UCI digits in turn, (count, 28, 28): what a classifier can tell apart."""
    images, labels = common.load_split("digits", "train")
    members = [(labels == label).nonzero()[:, 0] for label in range(10)]
    chosen = torch.stack([members[i % 10][i // 10 % len(members[i % 10])] for i in range(count)])
    return images[chosen, 0, 2:-2, 2:-2].numpy()


def example_pictures(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Photograph-like pictures, (count, 3, side, side) in [0, 1]: soft light, texture, hard edges."""
    keys = common.scramble(torch.arange(count) + (seed << 32) + 1)
    size = 2 ** math.ceil(math.log2(side))
    light = torch.stack([common.plasma(keys + i, size, 1.5) for i in range(4)], 1)[..., :side, :side]
    pictures = 0.6 * light[:, :1] + 0.4 * light[:, 1:]
    grid = (torch.arange(side) + 0.5) / side
    for i in range(8):  # ellipses and boxes, every other pair striped
        place = common.uniforms(keys, 100 + i, (10,))[..., None, None]
        x = (grid - place[:, 0]) / (0.1 + 0.2 * place[:, 1])
        y = (grid[:, None] - place[:, 2]) / (0.1 + 0.2 * place[:, 3])
        inside = x**2 + y**2 < 1 if i % 2 else (x.abs() < 0.8) & (y.abs() < 0.8)
        stripes = (i // 2 % 2) * ((2 * (x + y))[:, None] % 2 < 1)
        shade = (0.7 + 0.6 * (light[:, :1] - 0.5)) * (1 - 0.5 * stripes)
        pictures = torch.where(inside[:, None], place[:, 4:7] * shade, pictures)
    return pictures.clamp(0, 1)


def make_pictures(folder: Path, count: int, seed: int, side: int = 64, suffix: str = "JPEG") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(common.to_uint8(example_pictures(count, side, seed))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"picture_{number}.{suffix}")


def make_imagenet(root: Path, train: int = 6, test: int = 2, corrupted: int = 1, stylised: int = 0) -> None:
    """imagenet/{train,val}/<wnid>/, imagenet-c/<corruption>/<severity>/<wnid>/ and sin/train/<wnid>/ with two
    classes; pictures per class."""
    for number, name in enumerate(WNIDS):
        make_pictures(root / "imagenet" / "train" / name, train, number)
        make_pictures(root / "imagenet" / "val" / name, test, 10 + number)
        if stylised:
            make_pictures(root / "sin" / "train" / name, stylised, 20 + number)
        for corruption in common.CORRUPTIONS if corrupted else ():
            for severity in range(1, 6):
                make_pictures(root / "imagenet-c" / corruption / str(severity) / name, corrupted, 30 + number)


def make_chexpert(root: Path, patients: int = 40, valid: int = 12) -> None:
    """CheXpert-v1.0-small/{train,valid}.csv with its columns, two pictures a patient in train, one in valid;
    every kind of label occurs."""
    columns = (
        "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation"
    )
    columns += ",Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
    columns = columns.split(",")
    folder, draw = root / "CheXpert-v1.0-small", np.random.default_rng(0)
    for split, count, views in (("train", patients, 2), ("valid", valid, 1)):
        folder.mkdir(exist_ok=True, parents=True)
        with open(folder / f"{split}.csv", "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *columns])
            for patient in range(count):
                kinds = ["1.0", "0.0", "-1.0", ""] if split == "train" else ["1.0", "0.0"]
                labels = [kinds[(patient + draw.integers(2)) % len(kinds)] for _ in columns]
                for view in range(1, views + 1):
                    path = f"CheXpert-v1.0-small/{split}/patient{patient:05d}/study1/view{view}_frontal.jpg"
                    (root / path).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(random_pixels(patient, 40, 48)).save(root / path)
                    writer.writerow([path, "Female", "68", "Frontal", "AP", *labels])
