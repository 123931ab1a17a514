"""Adversarial AutoAugment (Zhang, Wang, Zhang & Zhong 2020, arXiv 1912.11188).

A controller emits M augmentation policies per epoch; the classifier is trained on M views of every image, one by each policy. A policy's reward is the
mean training loss on its views: the controller learns what is hard for the classifier as it is now, and the classifier learns to bear it.
The 16 operations run batched on the device, every view with its own operation, magnitude and sign.

    python advaa.py                                                  # digits, few training images: everything needed is in the repository
    python advaa.py --policy trivial                                 # or random, autoaugment, none: baselines at equal views
    python advaa.py --replay RUN_DIR/policies.jsonl --model resnext  # transfer: one run's policies train another model
    python advaa.py --dataset cifar10 --model wresnet28_10 --amp     # the published settings
    python advaa.py --evaluate --run-dir RUN_DIR                     # evaluate a run again
    torchrun advaa.py --M 8 --amp
    torchrun --nproc_per_node 2 advaa.py --M 8

Reaches, on digits (100 training images, top-1 error in % on clean, modified and corrupted test digits; seeds 0-4, two CPU cores, 84 s a run): none 8.0, 71.4,
32.9; trivial 3.6, 20.2, 12.7; autoaugment 3.9, 20.5, 17.5; random 2.9 ± 1.6, 14.2 ± 3.7, 6.3 ± 1.8; advaa 2.8 ± 0.9, 15.2 ± 3.5, 6.2 ± 1.8: no better than random.

Differs from the published code: all 16 operations (it has 15), validation images of their own instead of the test set, the last epoch is reported, one
process works as several do, views are made on the device, runs resume. README.md has the whole list.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import Data, InputError, number

SCRIPT = Path(__file__).stem  # a copy of this file, changed, reports under its own name

# Settings by data set and model; a flag left out takes its value from here. Those of CIFAR and ImageNet are published (--batch-size is the number of
# images, each in M views; lr_schedule "step" is ×0.2 at 30, 60 and 80 % of the epochs); those of digits were tuned on validation digits.
PUBLISHED = {
    "M": 8,
    "Q": 5,
    "controller_lr": 3.5e-4,
    "entropy_penalty": 1e-5,
    "lr_schedule": "cosine",
    "validation": False,
    "cutout": 16,
    "workers": 0,
}
SETTINGS = {
    "digits": {
        "wresnet28_10": PUBLISHED
        | {"batch_size": 10, "lr": 0.1, "weight_decay": 5e-4, "epochs": 120, "num_train": 100}
        | {"controller_lr": 0.01, "entropy_penalty": 0.2, "validation": True, "cutout": 0}
    },
    "cifar10": {
        "wresnet28_10": PUBLISHED | {"batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "epochs": 200, "lr_schedule": "step"},
        "shake26_2x32d": PUBLISHED | {"batch_size": 128, "lr": 0.2, "weight_decay": 1e-4, "epochs": 600},
        "shake26_2x96d": PUBLISHED | {"batch_size": 128, "lr": 0.2, "weight_decay": 1e-4, "epochs": 600},
        "shake26_2x112d": PUBLISHED | {"batch_size": 128, "lr": 0.2, "weight_decay": 1e-4, "epochs": 600},
        "pyramid272": PUBLISHED | {"batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "epochs": 600},
    },
    "cifar100": {
        "wresnet28_10": PUBLISHED | {"batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "epochs": 200, "lr_schedule": "step"},
        "shake26_2x96d": PUBLISHED | {"batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "epochs": 1200},
        "pyramid272": PUBLISHED | {"batch_size": 128, "lr": 0.5, "weight_decay": 1e-4, "epochs": 1200},
    },
    "imagenet": {
        "resnet50": PUBLISHED | {"batch_size": 2048, "lr": 0.8, "weight_decay": 1e-4, "epochs": 120, "cutout": 0, "workers": 16},
        "resnet50d": PUBLISHED | {"batch_size": 2048, "lr": 0.8, "weight_decay": 1e-4, "epochs": 120, "cutout": 0, "workers": 16},
        "resnet200": PUBLISHED | {"batch_size": 2048, "lr": 0.8, "weight_decay": 1e-4, "epochs": 120, "cutout": 0, "workers": 16},
    },
    # Not in the paper: MNIST with the controller of digits, one's own pictures as ImageNet on one GPU, random images as CIFAR-10.
    "mnist": {
        "wresnet28_10": PUBLISHED
        | {"batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "epochs": 20, "cutout": 0}
        | {"controller_lr": 0.01, "entropy_penalty": 0.2}
    },
    "folder": {"resnet50": PUBLISHED | {"batch_size": 256, "lr": 0.1, "weight_decay": 1e-4, "epochs": 120, "cutout": 0, "workers": 16}},
    "fake": {"wresnet28_10": PUBLISHED | {"batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "epochs": 2}},
}


def settings_of(dataset: str, model: str | None) -> dict:
    """The row of SETTINGS for a data set and model; a model without a row takes that of the data set's first."""
    rows = SETTINGS[dataset]
    first = next(iter(rows))
    return {"model": first, "num_train": None} | rows.get(model, rows[first])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=number(int, 0), default=0, help="of everything random in the method, and of the choice of --num-train images")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    add("--amp", action="store_true", help="mixed precision: bfloat16, or float16 on GPUs without it")
    add("--compile", action="store_true", help="torch.compile the classifier")
    add("--run-dir", "--logdir", dest="run_dir", metavar="DIR", help="where the run is written (default: runs/advaa/…)")
    add("--resume", action="store_true", help="continue what --run-dir holds")
    add("--checkpoint-every", type=number(int, 1), default=10, metavar="EPOCHS", help="epochs between checkpoints")
    add("--checkpoint-minutes", type=number(float, 0, open_low=True), default=10.0, metavar="MINUTES", help="between checkpoints within an epoch")
    add("--log-every", type=number(int, 1), default=10, metavar="STEPS", help="steps between lines of log.jsonl")
    add("--load-conf", metavar="FILE", help="defaults from the args.json of an earlier run, or any JSON of flags")
    add(
        "-e",
        "--evaluate",
        nargs="?",
        const=True,
        default=False,
        type=common.boolean,
        help="only evaluate: the run of --run-dir again, or the --model with --weights",
    )
    add("--dry-run", action="store_true", help="one small step of every phase, same outputs")
    add("--local-rank", type=number(int, 0), default=0, help=argparse.SUPPRESS)  # torch.distributed.launch gives it; the environment says the same
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=tuple(SETTINGS), default="digits", type=common.dataset_name, help="digits comes with the repository")
    add("--data-root", default="data", metavar="DIR", help="where the data sets lie; with --dataset folder, your train/ and val/ or test/")
    add("--fake-shape", type=common.fake_shape, default=common.FAKE_SHAPE, metavar="N,CLASSES,H,W", help="of --dataset fake: random images")
    add("--corruptions-path", metavar="DIR", help="the corrupted test set (default: CIFAR-10-C, imagenet-c, … in --data-root)")
    add("--generate-corruptions", action="store_true", help="make the 15 corruptions of the test images where the published ones are not on disk")
    add("--workers", type=number(int, 0), help="processes that decode pictures, at most one per core; sets that fit in memory live on the device")
    add("--num-train", type=number(int, 1), metavar="N", help="train on so many images, balanced over the classes (default: digits 100, else all)")
    add(
        "--validation",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="hold a tenth of the training images out, to choose on (default: digits, which have 197 of their own; published runs train on all)",
    )
    add("--eval-split", choices=("val", "test"), default="test", help="images that are evaluated; val is for tuning")
    add("--test-batch-size", type=number(int, 1), default=200, help="images per batch when pictures on disk are evaluated")
    add = parser.add_argument_group("model").add_argument
    add("--model", help=f"{', '.join(dict.fromkeys(name for rows in SETTINGS.values() for name in rows))}, resnext, or one of torchvision's")
    add("--weights", metavar="FILE", help="a checkpoint, or a name of weights/README.md, to start from, or with --evaluate to evaluate")
    add = parser.add_argument_group("method").add_argument
    add(
        "--policy",
        choices=("advaa", "random", "trivial", "autoaugment", "none", "replay"),
        help="where the views come from: the controller; policies drawn uniformly; TrivialAugment (wide); AutoAugment's published policy; "
        "no policy; those of --replay (default: advaa)",
    )
    add("--replay", metavar="FILE", help="policies.jsonl of an earlier run: its policies epoch by epoch (the paper's transfer)")
    add("--M", type=number(int, 1), help="views of every image, by M policies (default: 8)")
    add(
        "--view-batch",
        type=number(int, 1),
        metavar="N",
        help="images in one forward at most: the views go through the model policy by policy, and batch norm sees one policy's at a time (default: all views at once)",
    )
    add("--Q", type=number(int, 1), help="sub-policies in a policy; each view draws one (default: 5)")
    add(
        "--num-ops",
        type=int,
        choices=(len(OPS), len(OPS) - 1),
        default=len(OPS),
        help="of controller and random policies; the published code's 15 lack SamplePairing",
    )
    add("--controller-lr", type=number(float, 0, open_low=True), help="Adam, one update per epoch (default: 3.5e-4; digits and mnist 0.01)")
    add(
        "--entropy-penalty",
        type=number(float, 0),
        help="weight of the policies' entropy in the controller's objective (default: 1e-5; digits and mnist 0.2)",
    )
    add(
        "--carry-hidden",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the controller's state through all Q sub-policies; --reset-hidden starts it anew for each",
    )
    add("--reset-hidden", dest="carry_hidden", action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add(
        "--reward",
        choices=("normalised", "moving"),
        default="normalised",
        help="loss normalised across the M policies of the epoch, or above the moving average of earlier epochs (works with --M 1)",
    )
    add("--collapse-guard", action="store_true", help=f"mix {100 * GUARD_SHARE:g} %% of uniform choices into the controller's")
    add("--label-smoothing", type=number(float, 0, 1, open_high=True), default=0.0, help="of the classifier's loss")
    add("--cutout", type=number(int, 0), metavar="PX", help="side of the square cut out of every view, last (default: 16 on CIFAR and fake, else 0)")
    add = parser.add_argument_group("optimiser").add_argument
    add("--lr", type=number(float, 0, open_low=True), help="of SGD with Nesterov momentum 0.9 (default: by data set and model)")
    add("--weight-decay", type=number(float, 0), help="of the classifier (default: by data set and model)")
    add("--lr-schedule", choices=("cosine", "step"), help="cosine to zero, or ×0.2 at 30, 60 and 80 %% (default: by data set and model)")
    add("--epochs", type=number(int, 1), help="passes over the training set (default: by data set and model)")
    add("--batch-size", type=number(int, 1), help="images per step over all ranks, before their M views (default: by data set and model)")
    args = parser.parse(argv, lambda given: settings_of(given.dataset, given.model))
    args.policy = args.policy or ("replay" if args.replay else "advaa")
    if (args.policy == "replay") != (args.replay is not None):
        parser.error("--policy replay and --replay FILE go together")
    if args.policy == "advaa" and args.M == 1 and args.reward == "normalised" and not args.evaluate:
        parser.error("--M 1: rewards are normalised across the policies of an epoch, which takes two; raise --M, or choose --reward moving")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Image operations: what Pillow computes, bit for bit, for whole batches of uint8 images on any device. What is decided per image
# (operation, value, place) stays on the CPU, so nothing waits for the device.
# ---------------------------------------------------------------------------------------------------------------------

RANGES = {  # the value at magnitude 0 and at magnitude 9, linear between them
    "ShearX": (0, 0.3),  # px per px
    "ShearY": (0, 0.3),
    "TranslateX": (0, 0.45),  # of the side
    "TranslateY": (0, 0.45),
    "Rotate": (0, 30),  # degrees, counter-clockwise
    "AutoContrast": (0, 0),  # no value
    "Invert": (0, 0),
    "Equalize": (0, 0),
    "Solarize": (0, 256),  # levels from here on are inverted
    "Posterize": (4, 8),  # bits kept, truncated
    "Contrast": (0.1, 1.9),  # 1 leaves the image
    "Color": (0.1, 1.9),
    "Brightness": (0.1, 1.9),
    "Sharpness": (0.1, 1.9),
    "Cutout": (0, 0.2),  # of the width
    "SamplePairing": (0, 0.4),  # weight of the other image
}
OPS = tuple(RANGES)
IDENTITY = len(OPS)  # the number of the operation that changes nothing
MAGNITUDES = 10
GEOMETRIC = 5  # the first so many operations move pixels, and have a sign
GREY = 128


def op_values(ops: torch.Tensor, magnitudes: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The values of operations, float32: low + (high − low)·magnitude/9, times the sign for shear, translation and rotation.

    ops (numbers in OPS, or IDENTITY), magnitudes 0..9 and signs ±1: int64 of one shape, on the CPU. A translation or the side of
    Cutout stays a fraction of the image's side.
    """
    low, high = torch.tensor([*RANGES.values(), (0, 0)], dtype=torch.float64).unbind(1)
    values = low[ops] + (high - low)[ops] * magnitudes / (MAGNITUDES - 1)
    return torch.where(ops < GEOMETRIC, values * signs, values).float()


def apply_op(
    images: torch.Tensor,
    name: str,
    magnitude: int | torch.Tensor,
    sign: int | torch.Tensor = 1,
    partners: torch.Tensor | None = None,
    centres: torch.Tensor | None = None,
) -> torch.Tensor:
    """One operation on a batch: uint8 (B, 3, H, W) → a new uint8 tensor of that shape, on the same device.

    name: one of OPS; magnitude: int 0..9 or int tensor (B,); sign: ±1 or tensor (B,), for shear, translation and rotation;
    partners: uint8 (B, 3, H, W), the other images of SamplePairing (default: the batch rolled by one); centres: (B, 2) in [0, 1),
    (x, y) as fractions of the sides, of Cutout (default: drawn from torch's generator). Raises InputError for anything else.
    """
    if name not in OPS:
        raise InputError(f"unknown operation '{name}': choose from {', '.join(OPS)}")
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        given = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise InputError(f"{name}: images must be uint8 (B, 3, H, W), not {given}")
    count = len(images)

    def per_image(value: int | torch.Tensor, label: str) -> torch.Tensor:
        value = torch.as_tensor(value).cpu()
        if value.is_floating_point() or value.dtype == torch.bool or value.is_complex() or value.shape not in ((), (count,)):
            raise InputError(f"{name}: {label} must be an integer or an integer tensor ({count},), not {value.dtype} {tuple(value.shape)}")
        return value.long().expand(count)

    magnitudes, signs = per_image(magnitude, "magnitude"), per_image(sign, "sign")
    if ((magnitudes < 0) | (magnitudes >= MAGNITUDES)).any():
        raise InputError(f"{name}: magnitude {magnitude} is out of range: it must be 0..{MAGNITUDES - 1}")
    if (signs.abs() != 1).any():
        raise InputError(f"{name}: sign {sign}: it must be 1 or -1")
    if partners is None:
        partners = images.roll(1, 0) if name == "SamplePairing" else images
    if not isinstance(partners, torch.Tensor) or partners.shape != images.shape or partners.dtype != torch.uint8 or partners.device != images.device:
        raise InputError(f"{name}: partners must be uint8 {tuple(images.shape)} on {images.device}")
    if centres is None:
        centres = torch.rand(count, 2) if name == "Cutout" else torch.zeros(count, 2)
    centres = torch.as_tensor(centres).cpu()
    if centres.shape != (count, 2) or not centres.is_floating_point() or not ((centres >= 0) & (centres < 1)).all():
        raise InputError(f"{name}: centres must be floats ({count}, 2) in [0, 1)")
    ops = torch.full((count,), OPS.index(name))
    return apply_ops(images, ops, op_values(ops, magnitudes, signs), centres, partners, torch.arange(count))


def apply_ops(
    images: torch.Tensor,
    ops: torch.Tensor,
    values: torch.Tensor,
    centres: torch.Tensor | None = None,
    pool: torch.Tensor | None = None,
    partners: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each image under its own operation and value: uint8 (V, 3, H, W) → a new uint8 tensor of that shape, on the same device.

    ops int64 (V,), numbers in OPS or IDENTITY; values float (V,) as of `op_values`, which may lie outside RANGES; centres
    (V, 2), (x, y) in [0, 1), for Cutout; partners int64 (V,), numbers of images in `pool`, for SamplePairing: all on the CPU.
    pool uint8 (P, 3, H, W) is on the device of the images. What no operation of the batch needs may be None.
    """
    order = ops.argsort(stable=True)  # images of one operation side by side; one copy in, one out
    result = images.index_select(0, order.to(images.device, non_blocking=True))
    ends = [0, *itertools.accumulate(ops.bincount(minlength=IDENTITY + 1).tolist())]
    groups = [("geometric", 0, ends[GEOMETRIC])] + [(name, ends[i], ends[i + 1]) for i, name in enumerate(OPS) if i >= GEOMETRIC]
    for name, start, stop in groups:
        if start == stop:
            continue
        rows, group = order[start:stop], result[start:stop]
        value = values[rows]
        if name == "geometric":
            group.copy_(nearest_affine(group, affine_coefficients(ops[rows], value, *images.shape[-2:])))
        elif name == "Cutout":
            fill_boxes(group, cutout_boxes(centres[rows], value, *images.shape[-2:]))
        elif name == "SamplePairing":
            group.copy_(blend(group, pool.index_select(0, partners[rows].to(pool.device, non_blocking=True)), value))
        else:
            group.copy_(KERNELS[name](group, value))
    return result.index_select(0, order.argsort().to(images.device, non_blocking=True))


def per_pixel(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """One number per image, (n,) on the CPU → (n, 1, 1, 1) on the device of the images."""
    return values.view(-1, 1, 1, 1).to(images.device, non_blocking=True)


def affine_coefficients(ops: torch.Tensor, values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Maps from output to input pixels, int32 (n, 6) in units of 1/65536 px: column = c0·x + c1·y + c2, row = c3·x + c4·y + c5.

    x and y count pixels from 0; Pillow looks up an output pixel's centre, and rounds each coefficient as here.
    """
    values = values.double()
    c = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(len(ops), 1)
    shear_x, shear_y, move_x, move_y, turn = (ops == i for i in range(GEOMETRIC))
    c[shear_x, 1] = values[shear_x]
    c[shear_y, 3] = values[shear_y]
    c[move_x, 2] = (values[move_x] * width + 0.5).floor()  # without shear Pillow rounds the shift itself, not to 1/65536
    c[move_y, 5] = (values[move_y] * height + 0.5).floor()
    angle = -torch.deg2rad(values[turn] % 360)
    cos, sin = angle.cos().round(decimals=15), angle.sin().round(decimals=15)
    x, y = width / 2, height / 2
    c[turn] = torch.stack([cos, sin, x - (cos * x + sin * y), -sin, cos, y - (cos * y - sin * x)], dim=1)
    c[:, 2] += c[:, 0] * 0.5 + c[:, 1] * 0.5
    c[:, 5] += c[:, 3] * 0.5 + c[:, 4] * 0.5
    return (c * 65536 + 0.5).floor().int()


def nearest_affine(images: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Nearest neighbour under the maps of `affine_coefficients`, black outside."""
    count, _, height, width = images.shape
    c = coefficients.to(images.device, non_blocking=True)[:, :, None, None].unbind(1)  # 6 × (n, 1, 1)
    x = torch.arange(width, dtype=torch.int32, device=images.device)
    y = torch.arange(height, dtype=torch.int32, device=images.device)[:, None]
    column, row = (c[0] * x + (c[1] * y + c[2])) >> 16, (c[3] * x + (c[4] * y + c[5])) >> 16  # (n, H, W)
    near_column, near_row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    inside = (near_column == column) & (near_row == row)
    index = near_row.mul_(width).add_(near_column).view(count, 1, -1).long()
    moved = images.flatten(2).gather(2, index.expand(-1, 3, -1)).view_as(images)
    return moved.mul_(inside[:, None].view(torch.uint8))


def look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Levels replaced by those of a table per image and channel: images uint8 (n, 3, H, W), tables (n, 3, 256) of numbers 0..255, truncated."""
    return tables.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


# Each kernel takes images uint8 (n, 3, H, W) and the values (n,) of their operation, float on the CPU; it returns a new uint8 tensor of that shape.


def auto_contrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The levels of each channel stretched to 0..255; a flat channel stays."""
    levels = images.flatten(2)
    low, high = levels.amin(2, keepdim=True).double(), levels.amax(2, keepdim=True).double()  # (n, 3, 1)
    ramp = torch.arange(256, dtype=torch.float64, device=images.device)
    # In float64, in Pillow's order: truncation shows the last bit. (255 / tensor would be 255 · its reciprocal.)
    scale = torch.full_like(low, 255) / (high - low).clamp_min(1)
    stretched = (ramp * scale + -low * scale).clamp(0, 255)
    return look_up(images, torch.where(high > low, stretched, ramp))


def equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each channel's histogram flattened, by Pillow's integer rule; a channel with hardly more than one level stays."""
    levels = images.flatten(2).long()
    one = torch.ones(1, dtype=torch.int32, device=images.device)
    histogram = torch.zeros(*levels.shape[:2], 256, dtype=torch.int32, device=images.device).scatter_add_(2, levels, one.expand(levels.shape))
    below = histogram.cumsum(2, dtype=torch.int32) - histogram  # pixels darker than each level
    step = below.gather(2, levels.amax(2, keepdim=True)) // 255  # all but the brightest level's, (n, 3, 1)
    flat = ((step // 2 + below) // step.clamp_min(1)).clamp(max=255)
    ramp = torch.arange(256, dtype=torch.int32, device=images.device)
    return look_up(images, torch.where(step > 0, flat, ramp))


def invert(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """255 minus each level."""
    return ~images


def solarize(images: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Levels from the threshold on inverted."""
    bright = images >= per_pixel(thresholds.ceil().short(), images)
    return images ^ bright.view(torch.uint8) * 255


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The highest bits of each level kept; fractional numbers of bits are truncated."""
    return images & per_pixel((0xFF00 >> bits.int().clamp(0, 8) & 0xFF).to(torch.uint8), images)


def blend(start: torch.Tensor | float, images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """start + weight·(images − start), truncated and clipped: uint8 of the shape of the images.

    start: levels that can be broadcast to the images; weights (n,) on the CPU, also outside 0..1. In float32, one operation at a
    time, as Pillow: a fused multiply-add would truncate some levels differently.
    """
    start = start.float() if isinstance(start, torch.Tensor) else start
    blended = (images.float() - start).mul_(per_pixel(weights.float(), images)).add_(start).clamp_(0, 255)
    return blended.short().byte()  # in two steps, which on the CPU is four times as fast as in one


def luma(images: torch.Tensor) -> torch.Tensor:
    """Pillow's conversion to grey, float32 (n, 1, H, W): whole levels. All sums are whole numbers below 2^24, so exact."""
    red, green, blue = images.float().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471).add_(32768).mul_(1 / 65536).floor_()


def contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Away from, or towards, the image's mean grey."""
    pixels = images[0, 0].numel()
    total = luma(images).int().sum((1, 2, 3), keepdim=True)  # int64
    return blend((2 * total + pixels) // (2 * pixels), images, factors)  # from the mean, rounded


def color(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Away from, or towards, each pixel's own grey."""
    return blend(luma(images), images, factors)


def brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Away from, or towards, black."""
    return blend(0.0, images, factors)


def sharpness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Away from, or towards, the image smoothed by 3×3 weights 1 with 5 in the middle; the border stays."""
    smooth = images.float()
    inner = smooth[..., 1:-1, 1:-1]
    rows = smooth[..., :-2] + smooth[..., 1:-1] + smooth[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :] + 4 * inner
    inner.copy_((total / 13 + 0.5).floor_())  # a thirteenth of a whole number is never close to a half
    return blend(smooth, images, factors)


def cutout_boxes(centres: torch.Tensor, sides: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Squares of side·width px about centres (n, 2), (x, y) in [0, 1): int32 (n, 4) of first and, exclusive, last columns and rows.

    A square starts in the pixel that holds its corner and covers every pixel it reaches; one of less than half a pixel is empty.
    """
    side = (sides.double() * width)[:, None]
    first = (centres.double() * torch.tensor([width, height]) - side / 2).clamp_min(0).floor()  # (n, 2)
    last = torch.where(side < 0.5, first, first + (side - 1e-4).ceil())  # 8 px that float32 makes 8.0000001 are 8
    return torch.stack([first, last], dim=2).view(-1, 4).int()


def fill_boxes(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Boxes filled with grey, in place: boxes int (n, 4) on the CPU, first and, exclusive, last columns and rows; they may stick out."""
    left, right, top, bottom = boxes.to(images.device, non_blocking=True)[:, :, None].unbind(1)  # 4 × (n, 1)
    x, y = (torch.arange(side, device=images.device) for side in (images.shape[3], images.shape[2]))
    rows, columns = ((y >= top) & (y < bottom)).view(torch.uint8) * 255, ((x >= left) & (x < right)).view(torch.uint8) * 255
    cover = rows[:, None, :, None] & columns[:, None, None]  # (n, 1, H, W)
    return images.bitwise_and_(~cover).bitwise_or_(cover & GREY)


KERNELS = {
    "AutoContrast": auto_contrast,
    "Invert": invert,
    "Equalize": equalize,
    "Solarize": solarize,
    "Posterize": posterize,
    "Contrast": contrast,
    "Color": color,
    "Brightness": brightness,
    "Sharpness": sharpness,
}


def crop_flip_cutout(
    images: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor, centres: torch.Tensor | None = None, cutout: int = 0
) -> torch.Tensor:
    """The last stage of CIFAR's augmentation: uint8 (V, 3, H, W) → a new uint8 tensor of that shape, on the same device.

    offsets int64 (V, 2) in px, (dx, dy): output pixel (y, x) is input pixel (y + dy, x + dx), black outside; then flips bool
    (V,), left to right; then a grey square of cutout × cutout px about the pixels `centres`, int64
    (V, 2), (x, y), cut off at the borders; cutout = 0 leaves it out. offsets, flips and centres are on the CPU.
    """
    count, _, height, width = images.shape
    reach = int(offsets.abs().max()) if offsets.numel() else 0
    windows = F.pad(images, (reach,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (V, 3, 2·reach + 1, 2·reach + 1, H, W)
    order, unflipped = flips.long().argsort(stable=True), count - int(flips.sum())  # those to be flipped come last
    number, dx, dy, back = torch.stack([order, *(offsets[order] + reach).unbind(1), order.argsort()]).to(images.device, non_blocking=True)
    result = windows[number, :, dy, dx]
    result[unflipped:] = result[unflipped:].flip(3)
    result = result.index_select(0, back)
    if cutout:
        fill_boxes(result, torch.stack([centres - cutout // 2, centres + (cutout + 1) // 2], dim=2).view(-1, 4))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Views: what happens to each view of a batch is drawn on the CPU, for the global batch, on every rank alike
# ---------------------------------------------------------------------------------------------------------------------


class Views(NamedTuple):
    """The fate of M views of B images, on the CPU. Operations are numbers into OPS (or IDENTITY), two in a row."""

    ops: torch.Tensor  # (M, B, 2) int64
    values: torch.Tensor  # (M, B, 2) float32, signed
    centres: torch.Tensor  # (M, B, 2, 2) in [0, 1): x and y of the op Cutout
    partners: torch.Tensor  # (M, B, 2) int64: images of the batch for SamplePairing
    offsets: torch.Tensor  # (M, B, 2) int64 px: pad-crop
    flips: torch.Tensor  # (M, B) bool
    holes: torch.Tensor  # (M, B, 2) int64 px: centres of the last Cutout


def sample_views(ops: torch.Tensor, values: torch.Tensor, crop: int, flip: bool, size: int, generator: torch.Generator) -> Views:
    """Draw what a policy leaves open: places, partners, pad-crop by up to `crop` px, flips, for images of side `size`."""
    views, count = ops.shape[:2]
    centres = torch.rand(views, count, 2, 2, generator=generator)
    partners = other_images(torch.randint(max(count - 1, 1), (views, count, 2), generator=generator), count)
    offsets = torch.randint(-crop, crop + 1, (views, count, 2), generator=generator)
    flips = (torch.rand(views, count, generator=generator) < 0.5) & flip
    holes = torch.randint(size, (views, count, 2), generator=generator)
    return Views(ops, values, centres, partners, offsets, flips, holes)


def other_images(draws: torch.Tensor, count: int) -> torch.Tensor:
    """Draws (M, count, 2), of any size, to numbers of images of the batch, never the image itself (but in a batch of one)."""
    return (torch.arange(count)[:, None] + 1 + draws % max(count - 1, 1)) % count


def sample_policy_ops(policies: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each of `count` images draws, for each policy, one of its sub-policies, and a sign for each operation.

    policies (M, Q, 2, 2) int64: (op, magnitude) twice. Returns ops and signed values (M, count, 2).
    """
    chosen = torch.randint(policies.shape[1], (len(policies), count), generator=generator)
    drawn = policies[torch.arange(len(policies))[:, None], chosen]  # (M, count, 2, 2)
    signs = 2 * torch.randint(2, drawn.shape[:3], generator=generator) - 1
    return drawn[..., 0], op_values(drawn[..., 0], drawn[..., 1], signs)


@functools.cache
def trivial_space(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torchvision's search space of TrivialAugment (wide): numbers of the ops (n,), and their values by strength and sign (n, 31, 2).

    It moves images by up to 32 px whatever their side, `size` px.
    """
    from torchvision.transforms import TrivialAugmentWide

    space = TrivialAugmentWide()._augmentation_space(31)
    return torch.tensor([op_number(name) for name in space]), torch.stack([signed_values(name, *entry, 31, size) for name, entry in space.items()])


def sample_trivial_ops(M: int, count: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """TrivialAugment (wide): one op per view, of any strength. Returns ops and values (M, count, 2)."""
    numbers, table = trivial_space(size)
    drawn = torch.randint(len(numbers), (M, count), generator=generator)
    strength, sign = torch.randint(31, (M, count), generator=generator), torch.randint(2, (M, count), generator=generator)
    ops, values = torch.full((M, count, 2), IDENTITY), torch.zeros(M, count, 2)
    ops[..., 0], values[..., 0] = numbers[drawn], table[drawn, strength, sign]
    return ops, values


@functools.cache
def autoaugment_space(dataset: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AutoAugment's published policy as torchvision has it: CIFAR's, ImageNet's, and for digits that of the house numbers (SVHN).

    Returns, for its 25 sub-policies of two, numbers of the ops (25, 2), probabilities (25, 2), and values by sign (25, 2, 2).
    """
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    policies = {"digits": AutoAugmentPolicy.SVHN, "mnist": AutoAugmentPolicy.SVHN}
    policies |= {"imagenet": AutoAugmentPolicy.IMAGENET, "folder": AutoAugmentPolicy.IMAGENET}
    policy = AutoAugment(policies.get(dataset, AutoAugmentPolicy.CIFAR10))
    space = policy._augmentation_space(10, (32, 32))
    pairs = [pair for sub_policy in policy.policies for pair in sub_policy]
    ops = torch.tensor([op_number(name) for name, _, _ in pairs])
    probabilities = torch.tensor([probability for _, probability, _ in pairs])
    values = torch.stack([signed_values(name, *space[name], 10, 32)[strength or 0] for name, _, strength in pairs])
    return ops.view(-1, 2), probabilities.view(-1, 2), values.view(-1, 2, 2)


def sample_autoaugment_ops(dataset: str, M: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One of the 25 sub-policies per view, each of its ops with its probability and a random sign. Returns ops and values (M, count, 2)."""
    ops, probabilities, values = autoaugment_space(dataset)
    drawn = torch.randint(len(ops), (M, count), generator=generator)
    applied = torch.rand(M, count, 2, generator=generator) < probabilities[drawn]
    signs = torch.randint(2, (M, count, 2, 1), generator=generator)
    return torch.where(applied, ops[drawn], IDENTITY), values[drawn].gather(3, signs)[..., 0]


def op_number(name: str) -> int:
    return OPS.index(name) if name in OPS else IDENTITY


def signed_values(name: str, magnitudes: torch.Tensor, signed: bool, bins: int, size: int) -> torch.Tensor:
    """(bins, 2): torchvision's magnitudes of an op, for images of side `size`, as values of ours, for the sign drawn as 0 and as 1."""
    values = magnitudes.float().expand(bins)[:, None] * (torch.tensor([1.0, -1.0]) if signed else torch.ones(2))
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):  # torchvision counts from the original
        return 1 + values
    return values / size if name.startswith("Translate") else values  # px as a share of the side


def augment(pool: torch.Tensor, rows: torch.Tensor, views: Views, cutout: int) -> torch.Tensor:
    """M views of the images `rows` of a batch: uint8 (M·b, 3, H, W), view by view; two operations, pad-crop, flip, Cutout.

    pool: uint8 (P, 3, H, W) on the device, of which SamplePairing takes its partners; rows (b,): which of them are wanted, on the CPU;
    views: drawn for these b images; cutout: side in px, 0 for none.
    """
    ops, values, centres, partners, offsets, flips, holes = (part.flatten(0, 1) for part in views)
    images = pool[rows.to(pool.device, non_blocking=True)].repeat(len(views.ops), 1, 1, 1)
    for stage in range(2):
        images = apply_ops(images, ops[:, stage], values[:, stage], centres[:, stage], pool, partners[:, stage])
    return crop_flip_cutout(images, offsets, flips, holes, cutout)


# ---------------------------------------------------------------------------------------------------------------------
# Controller
# ---------------------------------------------------------------------------------------------------------------------

GUARD_SHARE = 0.3  # of uniform choices under --collapse-guard
COLLAPSED = 0.25  # a controller whose entropy is below this share of the largest has collapsed


class Controller(nn.Module):
    """An LSTM that emits policies, op by magnitude by op …: 4·Q choices, each seen by the next (hidden 100, embedding 32, as published).

    Weights start uniform in ±0.1 and the heads' biases at zero, so that choices start nearly uniform. carry_hidden: the state runs through all
    sub-policies, or starts anew for each, which makes them draws of one distribution. uniform_share: the share of uniform choices mixed in;
    with 0.3, no choice has a probability below 0.0187 (op) or 0.03 (magnitude), and the entropy stays above 0.48 of the largest.
    """

    def __init__(
        self,
        num_sub_policies: int,
        carry_hidden: bool = True,
        uniform_share: float = 0.0,
        num_ops: int = len(OPS),
        hidden: int = 100,
        embedding: int = 32,
    ):
        super().__init__()
        self.num_sub_policies, self.carry_hidden, self.uniform_share, self.num_ops = num_sub_policies, carry_hidden, uniform_share, num_ops
        self.cell = nn.LSTMCell(embedding, hidden)
        self.embedding = nn.Embedding(num_ops + MAGNITUDES, embedding)
        self.heads = nn.ModuleList([nn.Linear(hidden, num_ops), nn.Linear(hidden, MAGNITUDES)])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
        for head in self.heads:
            nn.init.zeros_(head.bias)

    def forward(
        self, policies: torch.Tensor | None = None, count: int = 0, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of given policies (M, Q, 2, 2), or of `count` sampled ones: the policies, log p of each (M,), and the entropy of each choice
        (M, Q, 2, 2) in nats."""
        count = count if policies is None else len(policies)
        blank = self.embedding.weight.new_zeros(count, self.cell.input_size)
        start = self.cell.weight_hh.new_zeros(count, self.cell.hidden_size)
        token, state = blank, (start, start)
        choices, log_probability, entropies = [], 0.0, []
        for position in range(4 * self.num_sub_policies):
            if not self.carry_hidden and position % 4 == 0:
                token, state = blank, (start, start)
            kind = position % 2  # 0: an op, 1: its magnitude
            state = self.cell(token, state)
            probabilities = self.heads[kind](state[0]).softmax(1)
            probabilities = (1 - self.uniform_share) * probabilities + self.uniform_share / probabilities.shape[1]
            if policies is None:
                choice = torch.multinomial(probabilities.detach(), 1, generator=generator)[:, 0]
            else:
                choice = policies.flatten(1)[:, position]
            log_probabilities = probabilities.clamp_min(1e-30).log()
            log_probability = log_probability + log_probabilities.gather(1, choice[:, None])[:, 0]
            entropies.append(-(probabilities * log_probabilities).sum(1))
            choices.append(choice)
            token = self.embedding(choice + kind * self.num_ops)
        shape = (count, self.num_sub_policies, 2, 2)
        return torch.stack(choices, 1).view(shape), log_probability, torch.stack(entropies, 1).view(shape)


def normalised_rewards(losses: torch.Tensor) -> torch.Tensor:
    """(L − mean)/(std + 1e-5) over the epoch's M policies, losses (M,)."""
    return (losses - losses.mean()) / (losses.std() + 1e-5)


def reinforce_loss(log_probabilities: torch.Tensor, rewards: torch.Tensor, entropies: torch.Tensor, entropy_penalty: float) -> torch.Tensor:
    """−(mean over M of R·log p) − weight · mean entropy of a policy; its gradient step is REINFORCE (Williams 1992).

    log_probabilities and rewards (M,), entropies (M, Q, 2, 2).
    """
    return -(rewards * log_probabilities).mean() - entropy_penalty * entropies.flatten(1).sum(1).mean()


def normalised_entropy(entropies: torch.Tensor, num_ops: int = len(OPS)) -> float:
    """Mean over all choices of entropy / largest entropy (log of num_ops for an op, log 10 for a magnitude), in [0, 1]."""
    return (entropies / torch.tensor([num_ops, MAGNITUDES]).log()).mean().item()


def histograms(policies: torch.Tensor) -> dict[str, list[int]]:
    """How often each op and each magnitude occurs in policies (M, Q, 2, 2)."""
    ops, magnitudes = policies[..., 0].flatten(), policies[..., 1].flatten()
    return {"ops": torch.bincount(ops, minlength=len(OPS)).tolist(), "magnitudes": torch.bincount(magnitudes, minlength=MAGNITUDES).tolist()}


def policy_record(epoch: int, policies: torch.Tensor, losses: list[float]) -> dict:
    """A line of policies.jsonl: {"epoch", "policies": [[[[op, magnitude], [op, magnitude]], … Q], … M], "losses": [… M]}."""
    named = [[[[OPS[op], magnitude] for op, magnitude in pair] for pair in policy] for policy in policies.tolist()]
    return {"epoch": epoch, "policies": named, "losses": losses}


def policies_of(record: dict) -> torch.Tensor:
    """The policies (M, Q, 2, 2) of a line of policies.jsonl."""
    return torch.tensor([[[[OPS.index(op), magnitude] for op, magnitude in pair] for pair in policy] for policy in record["policies"]])


def read_policies(file: str | Path, epochs: int, M: int, Q: int) -> torch.Tensor:
    """The policies (epochs, M, Q, 2, 2) of a policies.jsonl. InputError, naming the line, for one that is damaged, too short or of another shape."""
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--replay {file}: {error}; give the policies.jsonl of a run") from error
    found = []
    for row, line in enumerate(lines[:epochs], start=1):
        try:
            record = json.loads(line)
            named = record["policies"]
            if record["epoch"] != row:
                raise ValueError(f"it is of epoch {record['epoch']}")
            for op, magnitude in (pair for policy in named for sub_policy in policy for pair in sub_policy):
                if op not in OPS:
                    raise ValueError(f"unknown op {op!r}: choose from {', '.join(OPS)}")
                if type(magnitude) is not int or not 0 <= magnitude < MAGNITUDES:
                    raise ValueError(f"magnitude {magnitude!r} of {op} is not one of 0 to {MAGNITUDES - 1}")
            policies = policies_of(record)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"--replay {file}, line {row}: {reason}") from error
        if policies.shape != (M, Q, 2, 2):
            raise InputError(f"--replay {file}, line {row}: policies of shape {tuple(policies.shape)}, but --M {M} --Q {Q} take {(M, Q, 2, 2)}")
        found.append(policies)
    if len(found) < epochs:
        raise InputError(f"--replay {file} holds {len(found)} epochs, but {epochs} are to be trained: lower --epochs")
    return torch.stack(found)


# ---------------------------------------------------------------------------------------------------------------------
# Data and evaluation
# ---------------------------------------------------------------------------------------------------------------------

# CIFAR-10-P; in the two noise sequences every frame is compared with the first, in the others with the one before
PERTURBATIONS = ("gaussian_noise", "shot_noise", "motion_blur", "zoom_blur", "snow", "brightness", "translate", "rotate", "tilt", "scale")


def balanced_subset(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` of the numbers of images, as equally many of each class as can be, drawn from `seed`. Raises InputError where there are fewer."""
    if count > len(labels):
        raise InputError(f"--num-train {count}: the data set has {len(labels)} training images")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.zeros(len(labels), dtype=torch.long)  # an image's place among those of its class
    for label in labels.unique():
        members = order[labels[order] == label]
        rank[members] = torch.arange(len(members))
    return order[rank[order].argsort(stable=True)][:count]


def shifted_sets(dataset: str, split: str, data_root: str, dry_run: bool) -> dict[str, Data]:
    """Modified digits or modified MNIST, made from the same images that the clean figures are of."""
    if dataset not in ("digits", "mnist"):
        return {}
    variants = 10 if dataset == "digits" else 1
    return {"modified": common.keep_some(common.modified_digits(split, data_root, variants, dataset=dataset)[:2], 16 if dry_run else 10**9)}


def find_perturbed(dataset: str, split: str, data_root: str) -> tuple[Path | None, list[str]]:
    """CIFAR-10-P's folder, once all of its files are found to be whole, or a note that it is not there."""
    if dataset != "cifar10" or split != "test":
        return None, []
    directory = Path(data_root) / "CIFAR-10-P"
    if not directory.is_dir():
        return None, [f"{directory} is missing, so flips are not counted: {common.how_to_get('cifar10-p', data_root)}"]
    for name in PERTURBATIONS:
        read_frames(directory, name)
    return directory, []


def flip_probability(predictions: torch.Tensor, noise: bool) -> float:
    """Percent of frames whose prediction differs from the frame before, or for noise from the first (Hendrycks & Dietterich 2019).

    predictions (N, frames).
    """
    before = predictions[:, :1] if noise else predictions[:, :-1]
    return 100 * (predictions[:, 1:] != before).double().mean().item()


def read_frames(directory: Path, name: str) -> np.ndarray:
    """CIFAR-10-P's sequences of one perturbation, (N, frames, 32, 32, 3) uint8, mapped rather than read."""
    frames = common.read_array(directory / f"{name}.npy", common.how_to_get("cifar10-p", directory.parent))
    if frames.ndim != 5 or frames.shape[2:] != (32, 32, 3) or frames.shape[1] < 2 or frames.dtype != np.uint8:
        raise InputError(f"{directory / name}.npy is {frames.dtype} {frames.shape}: expected uint8 (N, frames, 32, 32, 3)")
    return frames


def evaluate_flips(model: nn.Module, directory: Path, machine: common.Machine, dry_run: bool) -> dict[str, float]:
    """Flip probability (%) on each of CIFAR-10-P's sequences, and their mean."""
    model.eval()
    flips = {}
    for name in tqdm(PERTURBATIONS, desc="CIFAR-10-P", unit="set", disable=not machine.is_main):
        frames, predictions = read_frames(directory, name), []
        for start in range(0, 16 if dry_run else len(frames), 500):
            part = torch.from_numpy(frames[start : start + (16 if dry_run else 500)].copy()).permute(0, 1, 4, 2, 3)
            logits = common.predict_logits(model, part.flatten(0, 1), machine)
            predictions.append(logits.argmax(1).view(part.shape[:2]).cpu())
        flips[name] = flip_probability(torch.cat(predictions), "noise" in name)
    return flips | {"mean": sum(flips.values()) / len(flips)}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def draw_policies(file: Path, records: list[dict], title: str) -> None:
    """Per epoch, how often each op occurs in the policies, and its mean magnitude."""
    import matplotlib.figure

    counts, strengths = torch.zeros(len(OPS), len(records)), torch.zeros(len(OPS), len(records))
    for column, record in enumerate(records):
        for op, magnitude in (pair for policy in record["policies"] for sub_policy in policy for pair in sub_policy):
            counts[OPS.index(op), column] += 1
            strengths[OPS.index(op), column] += magnitude
    figure = matplotlib.figure.Figure(figsize=(13, 4.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    extent = (0.5, len(records) + 0.5, len(OPS) - 0.5, -0.5)
    panels = (
        (left, (100 * counts / counts.sum(0)).numpy(), "share of an epoch's choices (%)", None, "magma"),
        (right, (strengths / counts).numpy(), "mean magnitude (white: did not occur)", MAGNITUDES - 1, "viridis"),
    )
    for axis, values, label, most, colours in panels:
        image = axis.imshow(values, aspect="auto", extent=extent, vmin=0, vmax=most, cmap=colours, interpolation="nearest")
        axis.set_yticks(range(len(OPS)), OPS, fontsize=9)
        axis.set(xlabel="epoch", title=label)
        figure.colorbar(image, ax=axis)
    figure.suptitle(title)
    figure.savefig(file)


def draw_curves(file: Path, history: list[dict], title: str) -> None:
    """The controller's entropy, each policy's loss, and errors, over the epochs."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(14, 4), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    epochs = [entry["epoch"] for entry in history]
    if "entropy" in history[0]:
        left.plot(epochs, [entry["entropy"] for entry in history], marker="o", markersize=3, label="controller")
        left.axhline(COLLAPSED, color="tab:red", linestyle="--", label="collapsed below")
        left.legend()
    else:
        left.text(0.5, 0.5, "no controller", ha="center", va="center", transform=left.transAxes)
    left.set(xlabel="epoch", ylabel="share of the largest entropy", title="entropy of the choices", ylim=(0, 1.05))
    losses = [entry["losses"] for entry in history]
    middle.plot(epochs, losses, linestyle="", marker=".", markersize=4, color="tab:blue", alpha=0.4)
    middle.plot(epochs, [sum(row) / len(row) for row in losses], color="black", label="mean")
    middle.set(xlabel="epoch", ylabel="cross entropy", title="training loss, a dot per policy")
    middle.legend()
    right.plot(epochs, [100 - entry["accuracy"] for entry in history], marker="o", markersize=3, label="training views")
    if "val_error" in history[0]:
        right.plot(epochs, [entry["val_error"] for entry in history], marker="o", markersize=3, label="validation images")
    right.set(xlabel="epoch", ylabel="top-1 error (%)", title="error", ylim=(0, None))
    right.legend()
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file)


def draw_views(file: Path, images: torch.Tensor, views: dict[str, torch.Tensor], title: str) -> None:
    """Images uint8 (b, 3, H, W) and beside each its views: {label: uint8 (M, b, 3, H, W)}."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(1.2 + 1.0 * sum(len(part) + 1 for part in views.values()), 0.9 + 0.95 * len(images)), dpi=100)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(views) + 1, width_ratios=[1, *(len(part) for part in views.values())], squeeze=False)[0]
    height, width = images.shape[-2:]
    for axis, (label, part) in zip(axes, ({"original": images[None]} | views).items()):
        tiles = F.pad(part, (1, 1, 1, 1), value=255).permute(1, 3, 0, 4, 2)  # (b, H + 2, M, W + 2, 3)
        axis.imshow(tiles.reshape(len(images) * (height + 2), len(part) * (width + 2), 3).cpu().numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(label, fontsize=11)
        axis.axis("off")
    figure.suptitle(title)
    figure.savefig(file)


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------

CROP_AND_FLIP = {"cifar10": (4, True), "cifar100": (4, True), "fake": (4, True)}  # the loader of pictures crops and flips them itself


def main() -> None:
    started = time.perf_counter()
    args = parse_args()
    machine = common.start_machine(args.device, args.amp, args.seed)
    checkpoint = Path(args.run_dir or "") / "checkpoint.pt"
    named = args.weights != common.arguments_of_run(checkpoint.parent).get("weights")  # to evaluate something else
    use_run = common.has_checkpoint(args.run_dir) and (args.resume or (args.evaluate and not named))
    in_place = bool(use_run and args.evaluate)  # the run's own directory is evaluated again
    if args.evaluate and not in_place and not args.weights:
        missing = f"{checkpoint} does not exist" if args.run_dir else "--evaluate needs something to evaluate"
        raise InputError(f"{missing}: name a run of {SCRIPT} with --run-dir, or a checkpoint of --model with --weights")
    if in_place:
        # What the results depend on beside the settings that check_unchanged compares.
        asked = {name: getattr(args, name) for name in ("dataset", "model", "eval_split", "generate_corruptions")}
        common.check_in_place(checkpoint.parent, asked, args.dry_run, f"evaluate --weights {checkpoint} instead")
    method = args.policy
    if args.evaluate and not in_place:
        file = Path(args.weights)  # a run's checkpoint goes by the name of its directory, a published one by its own
        method = f"{file.resolve().parent.name}-{file.stem}" if file.name in ("checkpoint.pt", "best.pt") else file.stem
        method = args.weights if args.weights in common.PUBLISHED_WEIGHTS else method

    # Data: everything is looked for before the first file is written.
    if args.eval_split == "val" and not args.validation:
        raise InputError("--eval-split val needs validation images that are not trained on: add --validation")
    sets = common.load_sets(
        args.dataset,
        args.data_root,
        machine,
        split=args.eval_split,
        validation=args.validation,
        train=not args.evaluate,
        generate=args.generate_corruptions,
        corrupted_directory=args.corruptions_path,
        fake_shape=args.fake_shape,
        dry_run=args.dry_run,
    )
    if args.num_train and sets.train is not None and not args.dry_run:
        labels = sets.train.labels if isinstance(sets.train, common.Folder) else sets.train[1].cpu()
        chosen = balanced_subset(labels, args.num_train, args.seed)
        part = sets.train.part(chosen) if isinstance(sets.train, common.Folder) else tuple(tensor[chosen] for tensor in sets.train)
        sets = sets._replace(train=part)
    shifted = shifted_sets(args.dataset, args.eval_split, args.data_root, args.dry_run)
    perturbed, notes = find_perturbed(args.dataset, args.eval_split, args.data_root)
    n_train, n_test = common.count_images(sets.train), common.count_images(sets.test)
    if args.dry_run:
        args.batch_size, args.epochs = min(args.batch_size, 16), 2
    args.batch_size = min(args.batch_size, n_train or args.batch_size)  # a small set of one's own: the whole of it is a batch
    if args.batch_size < machine.world_size:
        raise InputError(f"a batch of {args.batch_size} is smaller than the {machine.world_size} processes: raise --batch-size")
    largest = -(-args.batch_size // machine.world_size)  # images of a rank, and so one policy's views there
    if args.view_batch and args.view_batch < largest and not args.evaluate:
        raise InputError(
            f"--view-batch {args.view_batch} is smaller than one policy's {largest} views: raise it, lower --batch-size, or use more processes"
        )
    steps_per_epoch = 1 if args.dry_run else n_train // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    workers = 0 if args.dry_run else machine.workers(args.workers)
    replayed = read_policies(args.replay, args.epochs, args.M, args.Q) if args.policy == "replay" and not args.evaluate else None
    directory = Path(args.run_dir) if in_place else common.run_directory(SCRIPT, vars(args), method, machine)

    # What a run cannot change when it is continued: the meaning of its history, its place in the schedule, its images.
    names = ("dataset", "model", "policy", "replay", "seed", "M", "Q", "num_ops", "reward", "batch_size", "epochs")
    names += ("num_train", "eval_split", "validation")
    fixed = {key: getattr(args, key) for key in names}
    fixed["view_batch"] = bool(args.view_batch)
    saved = common.read_checkpoint(directory, "remove the directory to start afresh") if use_run else None
    if saved is not None and saved.get("script") != "advaa":
        raise InputError(f"{checkpoint} holds no run of {SCRIPT}: choose another --run-dir, or evaluate it with --weights")
    if saved is not None:
        common.check_run(saved, checkpoint, step=int, epoch=int, history=list, records=list, best=dict, finished=bool, fixed=dict)
        common.check_unchanged(saved, fixed, checkpoint)

    # Models.
    classifier = common.build_model(args.model, sets.num_classes, args.dataset)
    common.check_input_size(classifier, args.model, sets.size)
    final = checkpoint if use_run else None
    if saved is not None:
        common.load_content(classifier, saved, checkpoint)
    elif args.weights:
        final = common.load_checkpoint(classifier, args.weights, machine, args.dry_run)
    classifier.to(machine.device, memory_format=machine.weight_layout)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True)
    scaler = common.grad_scaler(machine)
    # The controller is small and lives on the CPU of every rank alike, as do all draws but the model's own (Shake-Shake, ShakeDrop: per rank).
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        controller = Controller(args.Q, args.carry_hidden, GUARD_SHARE if args.collapse_guard else 0.0, args.num_ops)
    controller_optimizer = torch.optim.Adam(controller.parameters(), args.controller_lr, fused=True)
    torch.manual_seed(args.seed + 1_000_003 * machine.rank)  # for the model's own draws
    generator = torch.Generator().manual_seed(args.seed)  # order of the images, what a policy leaves open
    policy_generator = torch.Generator().manual_seed(args.seed)  # policies: apart, so that a replay sees the same views
    step = epoch = 0
    history: list[dict] = []
    records: list[dict] = []  # the lines of policies.jsonl
    best = {"val_error": math.inf}
    place, policies, entropies = common.EPOCH_START, None, None  # within an epoch: its policies (M, Q, 2, 2), the same on every rank
    totals = torch.zeros(args.M + 2, device=machine.device)  # sums over the epoch: loss of each policy; right views, views

    # What the run's directory holds already.
    if saved is not None:
        step, epoch, history, records, best = (saved[key] for key in ("step", "epoch", "history", "records", "best"))
    if saved is not None and not in_place:
        if saved["finished"]:
            results = common.read_results(directory)
            if machine.is_main:
                print(f"{directory} holds a finished run:")
                with common.reading_run(directory / "results.json", "evaluate the run again with --evaluate"):
                    print_results(results, directory)
            return
        with common.continues(checkpoint):
            optimizer.load_state_dict(saved["optimizer"])
            optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # these may be others from now on, as --lr
            scaler.load_state_dict(saved["scaler"])
            controller.load_state_dict(saved["controller"])
            controller_optimizer.load_state_dict(saved["controller_optimizer"])
            controller_optimizer.param_groups[0]["lr"] = args.controller_lr
            place = common.restore_place(saved, generator)
            policy_generator.set_state(saved["policy_generator"])
            common.restore_random_states(saved["random_states"], machine)
            policies, entropies, totals = saved["policies"], saved["entropies"], common.restore_totals(saved["totals"], machine)
    arguments = vars(args) | {"run_dir": str(directory)}
    del arguments["local_rank"]
    run = common.Run(directory, machine, None if in_place else arguments, step if saved else None, started)
    if machine.is_main:
        print(" ".join(f"{key}={value}" for key, value in arguments.items()))
        count = sum(parameter.numel() for parameter in classifier.parameters())
        print(f"{n_train} training images, {steps_per_epoch} steps of {args.batch_size} images × {args.M} views per epoch; {n_test} test images")
        print(f"{args.model}: {count:,} parameters" + (f", from {final}" if final else ""))
        if args.model not in SETTINGS[args.dataset] and not args.evaluate:
            first = next(iter(SETTINGS[args.dataset]))
            print(f"note: {args.model} has no settings of its own for {args.dataset}; what was not given is as for {first}")
        for note in sets.notes + notes:
            print(f"note: {note}")
        if args.resume and saved is None:
            print(f"{directory} holds no checkpoint: starting afresh")

    def checkpoint_state(batches: int = 0, finished: bool = False) -> dict:
        """After so many batches of the epoch; on every rank alike but for the random states, which are gathered."""
        state = {"script": "advaa", "method": method, "fixed": fixed, "finished": finished}
        state |= {"step": step, "epoch": epoch, "history": history, "records": records, "best": best}
        state |= {"state_dict": classifier.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        state |= {"controller": controller.state_dict(), "controller_optimizer": controller_optimizer.state_dict()}
        state |= {"batches": batches, "epoch_start": epoch_start, "generator": generator.get_state()}
        state |= {
            "totals": machine.all_rows(totals.clone()[None]),
            "policies": policies,
            "entropies": entropies,
            "policy_generator": policy_generator.get_state(),
        }
        return state | {"random_states": common.random_states(machine)}

    # Training.
    if args.compile:
        classifier.compile()  # in place: the keys of its state dict stay
    distributed = common.distribute(classifier, machine)
    epoch_start = saved["epoch_start"] if place.batches else generator.get_state()
    crop, flip = CROP_AND_FLIP.get(args.dataset, (0, False))
    in_memory = isinstance(sets.train, tuple)
    train_images, train_labels = sets.train if in_memory else (None, None)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What is left of a shuffled epoch: a pool of uint8 images, which of them are this rank's, and their labels."""
        if in_memory:
            numbers = common.epoch_batches(n_train, args.batch_size, generator).to(machine.device)
            place.restore(generator)
            for index in numbers[place.batches :]:
                yield train_images[index], machine.own_rows(torch.arange(args.batch_size)), machine.own_rows(train_labels[index])
        else:
            pictures = sets.train.random_batches(args.batch_size, generator, workers, machine, start=place.batches)
            place.restore(generator)
            for images, labels in pictures:
                yield images, torch.arange(len(images)), labels

    def sample_ops(policies: torch.Tensor | None, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        if policies is not None:
            return sample_policy_ops(policies, count, generator)
        if args.policy == "trivial":
            return sample_trivial_ops(args.M, count, sets.size, generator)
        if args.policy == "autoaugment":
            return sample_autoaugment_ops(args.dataset, args.M, count, generator)
        return torch.full((args.M, count, 2), IDENTITY), torch.zeros(args.M, count, 2)

    epochs = 0 if args.evaluate else args.epochs
    progress = tqdm(total=epochs * steps_per_epoch, initial=step, desc=f"train {method}", unit="step", disable=not machine.is_main or not epochs)
    pace = common.Pace(args.checkpoint_minutes, args.log_every, machine)
    while epoch < epochs:
        if place.batches:
            pass  # the epoch's policies came with the checkpoint
        elif args.policy == "advaa":
            with torch.no_grad():
                policies, _, entropies = controller(count=args.M, generator=policy_generator)
        elif args.policy == "random":
            ops = torch.randint(args.num_ops, (args.M, args.Q, 2), generator=policy_generator)
            policies = torch.stack([ops, torch.randint(MAGNITUDES, ops.shape, generator=policy_generator)], dim=-1)
        elif args.policy == "replay":
            policies = replayed[epoch]
        if policies is not None and machine.world_size > 1:
            shared = [policies]
            dist.broadcast_object_list(shared)
            policies = shared[0]
        classifier.train()
        pace.begin()
        done = place.batches
        for pool, rows, labels in batches():
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(args.lr_schedule, step, total_steps)
            ops, values = sample_ops(policies, args.batch_size, generator)
            views = sample_views(ops, values, crop, flip, sets.size, generator)
            own = Views(*(machine.own_rows(part.transpose(0, 1)).transpose(0, 1) for part in views))  # each rank its images
            if len(pool) < args.batch_size:  # pictures from disk: partners are those of this rank
                own = own._replace(partners=other_images(own.partners, len(pool)))
            images = augment(pool, rows, own, args.cutout)  # (M·b, 3, H, W)
            parts = args.M if args.view_batch else 1  # policy by policy, or all views at once
            losses, right = [], []
            optimizer.zero_grad()
            for index, part in enumerate(images.chunk(parts)):
                wait = machine.world_size > 1 and index < parts - 1  # gradients are averaged over ranks once, with the last part
                with distributed.no_sync() if wait else contextlib.nullcontext():
                    with machine.autocast():
                        logits = distributed(machine.layout(common.to_float(part))).float()
                    part_labels = labels.repeat(args.M // parts)
                    part_losses = F.cross_entropy(logits, part_labels, reduction="none", label_smoothing=args.label_smoothing)
                    # DDP averages over ranks, hence the world size.
                    scaler.scale(part_losses.sum() * machine.world_size / (args.M * args.batch_size)).backward()
                losses.append(part_losses.detach())
                right.append((logits.detach().argmax(1) == part_labels).sum())
            scaler.step(optimizer)
            scaler.update()
            losses, right = torch.cat(losses), sum(right)
            totals += torch.cat([losses.view(args.M, -1).sum(1), torch.stack([right, torch.full_like(right, len(losses))])])
            step, done = step + 1, done + 1
            if step % args.log_every == 0:
                shown = epoch_figures(common.finite_totals(machine.all_sum(totals.clone()), step, args.lr, directory))
                del shown["losses"]
                run.log(step, **shown, lr=group["lr"])
                progress.set_postfix_str(", ".join(f"{key} {value:.3g}" for key, value in shown.items()), refresh=False)
                progress.update(step - progress.n)
            if args.dry_run:
                break
            if done < steps_per_epoch and pace.due(step):
                common.save_run(checkpoint_state(done), directory, machine)
                pace.saved()
        epoch += 1
        figures = epoch_figures(common.finite_totals(machine.all_sum(totals), step, args.lr, directory))
        if policies is not None:
            figures |= histograms(policies)
            records.append(policy_record(epoch, policies, figures["losses"]))
        if args.policy == "advaa":
            # The controller is rewarded with the loss that its policies caused.
            losses = torch.tensor(figures["losses"])
            if args.reward == "normalised":
                rewards = normalised_rewards(losses)
            else:
                rewards = losses - moving_average([sum(entry["losses"]) / args.M for entry in history], losses)
            _, log_probabilities, entropies_now = controller(policies)
            objective = reinforce_loss(log_probabilities, rewards, entropies_now, args.entropy_penalty)
            controller_optimizer.zero_grad()
            objective.backward()
            controller_optimizer.step()
            figures["entropy"] = normalised_entropy(entropies, args.num_ops)
            if not math.isfinite(objective.item()):
                raise InputError(f"the controller's objective is not finite at step {step} (--controller-lr {args.controller_lr:g}): lower it")
        if sets.val is not None:
            figures["val_error"] = 100 - common.evaluate_models([classifier], sets.val, args.test_batch_size, workers, machine)[0]["top1_accuracy"]
        history.append({"epoch": epoch} | figures)
        run.log(step, **history[-1])
        place, totals, policies, entropies, epoch_start = common.EPOCH_START, torch.zeros_like(totals), None, None, generator.get_state()
        improved = figures.get("val_error", math.inf) < best["val_error"]
        if improved:
            best = {"epoch": epoch, "val_error": figures["val_error"]}
        if machine.is_main:
            if improved:
                common.save_atomically(best | {"state_dict": classifier.state_dict()}, directory / "best.pt")
            if records:
                common.write_text(directory / "policies.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        due = pace.due(step, now=True)
        if due or improved or epoch % args.checkpoint_every == 0 or epoch == epochs:  # improved: best.pt is of the run that continues
            common.save_run(checkpoint_state(), directory, machine)
            pace.saved()
        pace.end()
    progress.update(step - progress.n)
    progress.close()

    # The test set is read once, here.
    clean = common.evaluate_models([classifier], sets.test, args.test_batch_size, workers, machine)[0]
    shifted_errors = {
        name: 100 - common.evaluate_models([classifier], data, args.test_batch_size, workers, machine)[0]["top1_accuracy"]
        for name, data in shifted.items()
    }
    corruptions, extra = {}, {}
    if sets.corruptions is not None:
        accuracies = common.evaluate_corruptions([classifier], sets.corruptions, args.test_batch_size, workers, machine)[0]
        errors = {name: 100 - sum(values) / len(values) for name, values in accuracies.items()}
        corruptions = {name: errors[name] for name in sets.corruptions.names}
        corruptions["mean"] = sum(corruptions.values()) / len(corruptions)
        extra = {name: errors[name] for name in sets.corruptions.extra}
    kept = common.kept_results(directory, "n_train") if in_place else {}  # what is not on disk any more to be trained on, once was
    n_train = kept.get("n_train", n_train)
    flips = {} if perturbed is None else evaluate_flips(classifier, perturbed, machine, args.dry_run)
    entropy = [entry["entropy"] for entry in history if "entropy" in entry]
    results = {
        "script": SCRIPT,
        "dataset": args.dataset,
        "model": args.model,
        "method": method,
        "seed": args.seed,
        "n_train": n_train,
        "n_eval": n_test,
        "protocol": protocol_line(args.dataset, args.model, args.eval_split, sets, shifted, n_train, epoch, args.epochs, args.M),
        "top1_error": 100 - clean["top1_accuracy"],
        "top5_error": 100 - clean["top5_accuracy"],
        "shifted": shifted_errors,
        "corruptions": corruptions,
        "controller": {
            "entropy_first": entropy[0] if entropy else None,
            "entropy_last": entropy[-1] if entropy else None,
            "collapsed": bool(entropy) and min(entropy) < COLLAPSED,
        },
    }
    results |= {"extra_corruptions": extra} if extra else {}
    results |= {"flip_probability": flips} if flips else {}
    results |= {"best_on_validation": best} if "epoch" in best else {}
    results |= kept
    if machine.is_main:
        title = f"{method} on {args.dataset}, {args.model}, seed {args.seed}"
        if history:
            draw_curves(directory / "curves.png", history, title)
        if history and sets.train is not None:
            shown = common.gather_images(sets.train, 6, 0, machine)[0]
            numbered = {f"epoch {record['epoch']}": policies_of(record) for record in (records[0], records[-1])} if records else {"every epoch": None}
            grids = {}
            for label, drawn in numbered.items():
                draws = torch.Generator().manual_seed(0)
                ops, values = sample_ops(drawn, len(shown), draws)
                views = sample_views(ops[:8], values[:8], crop, flip, sets.size, draws)
                grids[label] = augment(shown, torch.arange(len(shown)), views, args.cutout).view(-1, *shown.shape)
            draw_views(directory / "views.png", shown, grids, title)
        if records:
            draw_policies(directory / "policies.png", records, title)
    run.log(step, test_error=results["top1_error"], **({"test_corruptions": corruptions["mean"]} if corruptions else {}))
    results = run.finish(results)
    if not args.evaluate:
        common.save_run(checkpoint_state(finished=True), directory, machine)
    if machine.is_main:
        print_results(results, directory)


def lr_factor(schedule: str, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied by at a step."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return 0.2 ** sum(step >= share * total_steps for share in (0.3, 0.6, 0.8))


def moving_average(earlier: list[float], losses: torch.Tensor, decay: float = 0.8) -> float:
    """The exponential moving average of earlier epochs' mean losses; before the first, this epoch's."""
    average = earlier[0] if earlier else losses.mean().item()
    for loss in earlier[1:]:
        average = decay * average + (1 - decay) * loss
    return average


def epoch_figures(totals: list[float]) -> dict:
    """Means from an epoch's sums: loss of each policy, right views, views."""
    *losses, right, count = totals
    per_policy = count / len(losses)
    return {"loss": sum(losses) / count, "accuracy": 100 * right / count, "losses": [loss / per_policy for loss in losses]}


def protocol_line(
    dataset: str, model: str, split: str, sets: common.Sets, shifted: dict[str, Data], n_train: int, epoch: int, epochs: int, M: int
) -> str:
    """One line that says how the figures were measured; epoch is 0 for a checkpoint of which nothing more is known."""
    parts = [f"{dataset} {split} ({common.count_images(sets.test)} images)"]
    parts += [f"modified {dataset} made from them ({common.count_images(data)} images)" for data in shifted.values()]
    parts += [sets.corruptions.protocol] if sets.corruptions else []
    severities = ", mean over severities" if sets.corruptions else ""
    line = f"{', '.join(parts)}; top-1 error (%){severities}; inputs normalised by {common.normalisation(dataset, model)}"
    if not epoch:
        return line
    trained = f"epoch {epoch} of" if epoch < epochs else "the last of"
    return f"{line}; {n_train} training images, {M} views of each per epoch; {trained} {epochs} epochs is reported"


def print_results(results: dict, directory: Path) -> None:
    """The closing table."""
    print(f"\n{results['method']} ({results['model']}), error (%)\n")
    rows = {"clean, top-1": results["top1_error"], "clean, top-5": results["top5_error"]} | results["shifted"]
    rows |= {f"  {name}" if name != "mean" else "corruptions, mean": error for name, error in results["corruptions"].items()}
    rows |= {f"  {name} (extra)": error for name, error in results.get("extra_corruptions", {}).items()}
    rows |= {f"flips, {name}": probability for name, probability in results.get("flip_probability", {}).items()}
    for name, error in rows.items():
        print(f"{name:24s}{error:8.2f}")
    controller = results["controller"]
    if controller["entropy_last"] is not None:
        state = "collapsed" if controller["collapsed"] else "did not collapse"
        print(f"\ncontroller's entropy {controller['entropy_first']:.2f} → {controller['entropy_last']:.2f} of the largest: {state}")
    if "best_on_validation" in results:
        best = results["best_on_validation"]
        print(f"best on validation images: epoch {best['epoch']}, {best['val_error']:.2f} % (best.pt)")
    print(f"\n{results['protocol']}\n{results['wall_seconds']} s, {results['peak_memory_mb']:.0f} MB; results in {directory}")


if __name__ == "__main__":
    common.run_script(main)
