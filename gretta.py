"""GrETTA: Gradient-Estimation Test-Time data Augmentation (Wang, Yang & Lin).

A policy network looks at one test image and returns K levels in [0, 1]; each level drives one differentiable transform; the
transformed image goes to a frozen classifier. The policy learns to make the classifier's loss fall. The classifier is a black box:
its gradient is estimated from differences of losses under perturbed levels (evolution strategies, or guided by a student).

    python gretta.py --model resnext --est vanilla                  # ES on modified digits: everything needed is in the repository
    python gretta.py --model wideresnet --est surrogate             # Guided ES: a distilled student points the way
    python gretta.py --model resnext --est whitebox                 # the true gradient, for comparison
    python gretta.py --model resnext --train-on augmented           # train images under strong augmentation, tested on digits-C
    python gretta.py --evaluate --run-dir RUN_DIR                   # evaluate a trained policy again
    python gretta.py --predict FOLDER --run-dir RUN_DIR             # your own pictures
    torchrun --nproc_per_node 2 gretta.py --model resnext --est vanilla

Reaches, when 20 % of the target domain train the policy (modified digits, 2,980 images, accuracy in %, seeds 0-2, two CPU cores):
resnext 63.4 → 94.5 ± 0.3 (vanilla), 94.9 ± 0.2 (surrogate), 93.4 ± 0.7 (whitebox); wideresnet 73.9 → 96.6 ± 0.2, 97.2 ± 0.4, 97.5 ± 0.3.

Differs from the paper's code: a loss difference per image and perturbation instead of one per batch, the policy in eval mode when tested,
contrast about the mean, one warp for all geometric transforms. README.md has the whole list.
"""

import argparse
import contextlib
import copy
import csv
import logging
import math
import os
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import Data, InputError, number

SCRIPT = Path(__file__).stem  # a copy of this file, changed, reports under its own name

# Settings by data set; a flag left out takes its value from here. "updates" is the number of steps that --epochs defaults to where it is not given.
# CIFAR's are published; those of digits were tuned on the modified validation digits (--target-split val): the true gradient is rougher than the
# estimates, which smooth it, and costs 24 times fewer queries a step, hence its smaller steps and more of them. The others are not tuned.
TARGET = {"opt": "adam", "lr": 5e-4, "batch_size": 24, "train_on": "target", "updates": 120, "model": "resnext", "workers": 0}
PUBLISHED = {"opt": "adam", "lr": 1e-6, "batch_size": 256, "train_on": "augmented", "epochs": 2, "model": "resnext", "workers": 0}
SETTINGS = {
    "digits": {"vanilla": TARGET, "surrogate": TARGET, "whitebox": TARGET | {"lr": 2e-4, "updates": 300}},
    "mnist": dict.fromkeys(("vanilla", "surrogate", "whitebox"), TARGET),
    "cifar10": dict.fromkeys(("vanilla", "surrogate", "whitebox"), PUBLISHED),
    "cifar100": dict.fromkeys(("vanilla", "surrogate", "whitebox"), PUBLISHED),
    "imagenet": dict.fromkeys(("vanilla", "surrogate", "whitebox"), PUBLISHED | {"model": "resnet50", "workers": 16}),
    "chexpert": dict.fromkeys(("vanilla", "surrogate", "whitebox"), PUBLISHED | {"train_on": "target", "model": "densenet121", "workers": 16}),
    "folder": dict.fromkeys(("vanilla", "surrogate", "whitebox"), TARGET | {"lr": 1e-4, "model": "resnet50", "workers": 16}),
    "fake": dict.fromkeys(("vanilla", "surrogate", "whitebox"), PUBLISHED | {"batch_size": 64}),
}
TARGETS = ("digits", "mnist", "chexpert", "folder")  # have a labelled target domain; the others are tested on a corruption set

# fused: one pass over all weights, four to eight times as fast as the default on a CPU
OPTIMIZERS = {"adam": partial(torch.optim.Adam, fused=True), "sgd": partial(torch.optim.SGD, fused=True), "rmsprop": torch.optim.RMSprop}

# name: (value at level 0, value at level 1), in the order in which they are applied; level 0.5 is the identity of each
TRANSFORMS = {
    "translate_x": (-20.0, 20.0),  # px, positive to the right
    "translate_y": (-20.0, 20.0),  # px, positive downwards
    "zoom_x": (0.7, 1.3),  # factor, > 1 enlarges
    "zoom_y": (0.7, 1.3),
    "gamma": (0.0, 2.0),
    "contrast": (0.5, 1.5),
    "hue": (-1.0, 1.0),  # radians
}
TRANSFORM_SETS = {"geometry": ["translate_x", "translate_y", "zoom_x", "zoom_y"], "color": ["gamma", "contrast", "hue"], "full": list(TRANSFORMS)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=number(int, 0), default=0, help="of everything random in the method")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    add("--amp", action="store_true", help="mixed precision: bfloat16, or float16 on GPUs without it")
    add("--compile", action="store_true", help="torch.compile the policy and the classifier")
    add("--run-dir", metavar="DIR", help="where the run is written (default: runs/gretta/…)")
    add("--resume", action="store_true", help="continue what --run-dir holds")
    add(
        "--checkpoint-every",
        type=number(int, 1),
        metavar="EPOCHS",
        help="epochs between checkpoints, and points of the curves (default: a tenth of the run)",
    )
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
        help="only evaluate the policy of --run-dir or --weights-policy",
    )
    add(
        "--predict",
        metavar="FOLDER",
        help="classify the images of a folder with and without the policy; writes predictions.csv and the transformed images",
    )
    add("--export", metavar="FILE", help="write policy, transforms and classifier as one torch.export program, FILE.pt2, that needs no repository")
    add("--dry-run", action="store_true", help="one small step of every phase, same outputs")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=tuple(SETTINGS), default="digits", type=common.dataset_name, help="digits comes with the repository")
    add("--data-root", default="data", metavar="DIR", help="where the data sets lie; with --dataset folder, your train/ and val/ or test/")
    add("--fake-shape", type=common.fake_shape, default=common.FAKE_SHAPE, metavar="N,CLASSES,H,W", help="of --dataset fake: random images")
    add("--corruptions-path", metavar="DIR", help="the corrupted test set (default: CIFAR-10-C, imagenet-c, … in --data-root)")
    add("--generate-corruptions", action="store_true", help="make the 15 corruptions of the test images where the published ones are not on disk")
    add("--uncertain", choices=("ones", "zeros", "ignore"), default="ones", help="what CheXpert's uncertain labels (-1) are taken for")
    add("--workers", type=number(int, 0), help="processes that decode pictures, at most one per core; sets that fit in memory live on the device")
    add(
        "--train-on",
        choices=("target", "augmented"),
        help="target: --proportion of the labelled target domain; augmented: the training set under strong augmentation, then a corruption set "
        f"(default: target for {', '.join(TARGETS)})",
    )
    add(
        "--proportion",
        type=number(float, 0, 1, True, True),
        default=0.2,
        help="share of the target domain that trains the policy (--train-on target)",
    )
    add(
        "--target-split",
        choices=("val", "test"),
        default="test",
        help="images that are evaluated, or that the target domain is made from; val is for tuning",
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        help="the frozen classifier: resnext, wideresnet, or a torchvision model by its name (default: by data set, resnext for digits; with --blackbox: "
        "the name of its file)",
    )
    add("--weights", metavar="FILE", help="the classifier: a checkpoint, or a name of weights/README.md (default: what comes for the data set)")
    add(
        "--blackbox",
        metavar="FILE",
        help="the classifier is a program that is only queried (ONNX, TorchScript, torch.export): float32 images in [0, 1] to logits; it is run, so trust its source",
    )
    add("--weights-policy", metavar="FILE", help="a trained policy for --evaluate and --predict (a run's checkpoint.pt)")
    add(
        "--student",
        metavar="FILE",
        help="a student for --est surrogate: a checkpoint, or a name of weights/README.md (default: the one shipped in weights/, else distilled first)",
    )
    add("--policy", choices=tuple(POLICIES), default="resnet18", help="backbone of the policy")
    add("--init", choices=("zero", "stochastic"), default="zero", help="the policy's head: zero starts as the identity")
    add("--sigmoid", action=argparse.BooleanOptionalAction, default=False, help="squash the levels by a sigmoid instead of clipping them")
    add = parser.add_argument_group("method").add_argument
    add(
        "--est",
        choices=("vanilla", "surrogate", "whitebox"),
        default="vanilla",
        help="antithetic ES, Guided ES (Maheswaranathan et al. 2019), or the true gradient",
    )
    add("--transform", choices=tuple(TRANSFORM_SETS), default="geometry", help="geometry: 4 levels, color: 3, full: 7")
    add("--num-samples", type=number(int, 1), default=12, metavar="P", help="antithetic pairs per image and step")
    add(
        "--credit",
        choices=("image", "batch"),
        default="image",
        help="what a perturbation is judged by: its image's own loss, or one mean loss of the batch and its perturbations, as in the published code",
    )
    add(
        "--query-batch",
        type=number(int, 1),
        metavar="N",
        help="images in one forward of the classifier at most, in training (default: what suits the cache of a CPU; a GPU 4096 of 32 px)",
    )
    add("--sigma", type=number(float, 0, open_low=True), default=0.1, help="scale of the perturbation of the levels")
    add("--alpha", type=number(float, 0, 1), default=0.5, help="surrogate: share of isotropic noise; 0 trusts the student alone")
    add("--beta", type=number(float, 0, open_low=True), default=1.0, help="scale of the estimated gradient")
    add(
        "--reg",
        metavar="none|test|CORRUPTION",
        default="none",
        help="consistency regulariser, on unlabelled target images or on training images under a corruption",
    )
    add("--reg-weight", type=number(float, 0), default=0.1, help="weight of the regulariser")
    add("--steps", type=number(int, 1, 16), default=1, help="times the policy is applied at test time")
    add("--on-bn-adapt", action="store_true", help="evaluate the policy in front of bn_adapt too: a row gretta_bn_adapt")
    add = parser.add_argument_group("optimiser").add_argument
    add("--opt", choices=tuple(OPTIMIZERS), help="optimiser of the policy (default: by data set)")
    add("--lr", type=number(float, 0, open_low=True), help="learning rate, cosine to zero (default: by data set)")
    add(
        "--epochs",
        type=number(int, 1),
        help="passes over the training part (default: 2; digits, mnist, folder: as many as make 120 steps; digits' whitebox 300)",
    )
    add("--batch-size", type=number(int, 1), help="images per step over all ranks (default: by data set)")
    args = parser.parse(argv, lambda given: SETTINGS[given.dataset][given.est], from_source)
    if args.train_on == "target" and args.dataset not in TARGETS:
        parser.error(f"--train-on target: {args.dataset} has no labelled target domain; choose --train-on augmented")
    if args.train_on == "target" and (args.corruptions_path or args.generate_corruptions):
        parser.error("--corruptions-path and --generate-corruptions belong to --train-on augmented: the target domain has no corruptions")
    if args.train_on == "augmented" and args.reg == "test" and args.target_split == "val":
        parser.error("--reg test --target-split val: the regulariser would see the images that are evaluated; leave one of them out")
    if args.train_on == "augmented" and args.dataset == "chexpert":
        parser.error("--train-on augmented: CheXpert has no corruption set; choose --train-on target")
    if args.dataset in ("folder", "chexpert") and not (args.weights or args.blackbox):
        parser.error(f"--dataset {args.dataset} needs a classifier: give its checkpoint with --weights, or a program with --blackbox")
    if args.reg not in ("none", "test", *common.CORRUPTIONS, *common.EXTRA_CORRUPTIONS):
        parser.error(f"--reg {args.reg}: choose none, test or a corruption: {', '.join(common.CORRUPTIONS + common.EXTRA_CORRUPTIONS)}")
    if args.credit == "batch" and args.est == "whitebox":
        parser.error("--credit batch: whitebox has no perturbations to credit; choose --est vanilla or surrogate")
    if args.blackbox and args.on_bn_adapt:
        parser.error(f"--on-bn-adapt: --blackbox {args.blackbox} shows no batch norm to adapt")
    if args.blackbox and args.est == "whitebox":
        parser.error(f"--est whitebox needs gradients, which --blackbox {args.blackbox} does not give: choose --est vanilla or surrogate")
    if args.blackbox and args.weights:
        parser.error(f"--weights {args.weights}, but --blackbox {args.blackbox} holds its own: leave one of them out")
    if args.blackbox:
        args.model = Path(args.blackbox).stem  # names the run
    return args


def from_source(values: dict, given: argparse.Namespace) -> dict:
    """A configuration of the published code as flags: its data roots and its paths of checkpoints by model (CIFAR-100). `checkpoints` has no
    counterpart: a run has a directory of its own; `augmix` says how the classifiers were trained. Other configurations stay as they are."""
    source = {key: values[key] for key in ("augmix", "paths", "student_paths", "checkpoints", "cifar", "cifarc") if key in values}
    if not source:
        return values
    for key in ("paths", "student_paths"):
        if not isinstance(source.get(key, {}), dict):
            raise ValueError(f"{key} is not a table of files by model, but {source[key]!r}")
    values = {"dataset": "cifar100"} | {key: value for key, value in values.items() if key not in source}
    model = given.model or values.get("model", "resnext")
    found = {
        "data_root": source.get("cifar"),
        "corruptions_path": source.get("cifarc"),
        "weights": None if given.blackbox else source.get("paths", {}).get(model),
    }
    if "surrogate" in (given.est, values.get("est")):
        found["student"] = source.get("student_paths", {}).get(model)
    return values | {key: value for key, value in found.items() if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Transforms: levels (B, K) in [0, 1] → transformed images
# ---------------------------------------------------------------------------------------------------------------------


def transform_images(images: torch.Tensor, levels: torch.Tensor, transform: str) -> torch.Tensor:
    """Apply each image's own levels, in the order of TRANSFORMS; differentiable in both arguments, 0.5 is the identity.

    images (B, 3, H, W) in [0, 1]; levels (B, K), clipped to [0, 1]; transform: "geometry" (K = 4), "color" (3) or "full" (7).
    Returns (B, 3, H, W) in [0, 1]. Translation (positive right and down) and then zoom about the centre compose into one bilinear warp,
    black outside; gamma is x^γ; contrast spreads the values about the image's mean luma; hue turns the colour circle.
    Raises InputError for an unknown transform or a wrong number of levels.
    """
    if transform not in TRANSFORM_SETS:
        raise InputError(f"unknown transform '{transform}': choose from {', '.join(TRANSFORM_SETS)}")
    names = TRANSFORM_SETS[transform]
    if levels.shape != (images.shape[0], len(names)):  # not len(images), which torch.export takes for a constant
        raise InputError(f"levels are {tuple(levels.shape)}, but '{transform}' needs ({len(images)}, {len(names)}) for these images")
    low, high = common.constant(tuple(TRANSFORMS[name] for name in names), levels).T
    values = dict(zip(names, (low + (high - low) * levels.clamp(0, 1)).unbind(1)))  # name: (B,)
    if transform != "color":
        zoom = torch.stack([values["zoom_x"], values["zoom_y"]], dim=1)
        translation = torch.stack([values["translate_x"], values["translate_y"]], dim=1)
        # First the translation, then the zoom about the centre: p → zoom·(p + translation).
        images = common.affine_warp(images, common.affine_matrix(zoom, zoom * translation))
    if transform != "geometry":
        # 1e-6 keeps the slope of x^γ finite at black pixels.
        images = images.clamp(1e-6, 1) ** values["gamma"][:, None, None, None]
        images = common.adjust_contrast(images, values["contrast"])
        images = rotate_hue(images, values["hue"])
    return images


def rotate_hue(images: torch.Tensor, radians: torch.Tensor) -> torch.Tensor:
    """Turn the hue of images (B, 3, H, W) in [0, 1] by an angle (B,) each, in HSV."""
    from kornia.enhance import adjust_hue  # takes a second to import, so only when asked for

    return adjust_hue(images, radians).clamp(0, 1)


def strong_augmentation(images: torch.Tensor, draw: torch.Tensor, flip: bool) -> torch.Tensor:
    """The augmentation of the published training run, per image: flip, rotation ±30°, translation ±half the side, zoom 0.7..1.3,
    pad-crop 4, then brightness, contrast and saturation 0.5..1.5 and hue ±half a turn. images (B, 3, H, W) in [0, 1]; draw (B, 11), uniform
    in −1..1, says how much of each.

    Flips and hues are left out where they would change the class (`flip` is False for digits, whose grey has no hue anyway).
    """
    side = common.constant((images.shape[-1], images.shape[-2]), images)
    zoom = (1 + 0.3 * draw[:, :1]).repeat(1, 2)
    if flip:
        zoom = zoom * torch.stack([draw[:, 1].sign(), torch.ones_like(zoom[:, 0])], dim=1)
    translation = (draw[:, 2:4] * 0.5 * side).round() + (draw[:, 4:6] * 4.5).round()
    images = common.affine_warp(images, common.affine_matrix(zoom, translation, 30 * draw[:, 6]))
    brightness, contrast, saturation = (1 + 0.5 * draw[:, column, None, None, None] for column in (7, 8, 9))
    images = common.adjust_contrast((images * brightness).clamp(0, 1), contrast.flatten())
    grey = (images * common.constant(common.LUMA, images).view(1, 3, 1, 1)).sum(1, keepdim=True)
    images = (grey + saturation * (images - grey)).clamp(0, 1)
    return rotate_hue(images, math.pi * draw[:, 10]) if flip else images


def strong_draws(count: int, generator: torch.Generator) -> torch.Tensor:
    """What strong_augmentation draws for `count` images: (count, 11), uniform in −1..1."""
    return torch.rand(count, 11, generator=generator, device=generator.device) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Policy
# ---------------------------------------------------------------------------------------------------------------------

POLICIES = {
    "resnet18": lambda num_levels: common.torchvision_model("resnet18", num_levels, (0.5,) * 3, (0.5,) * 3),
    "resnet34": lambda num_levels: common.torchvision_model("resnet34", num_levels, (0.5,) * 3, (0.5,) * 3),
    "efficientnet-b0": lambda num_levels: efficientnet("efficientnet-b0", num_levels),
    "efficientnet-b1": lambda num_levels: efficientnet("efficientnet-b1", num_levels),
    "efficientnet-b2": lambda num_levels: efficientnet("efficientnet-b2", num_levels),
    "efficientnet-b3": lambda num_levels: efficientnet("efficientnet-b3", num_levels),
}


def efficientnet(name: str, num_levels: int) -> nn.Module:
    from efficientnet_pytorch import EfficientNet  # only when asked for

    return EfficientNet.from_name(name, num_classes=num_levels)


class Policy(nn.Module):
    """v = π(x): from images (B, 3, H, W) in [0, 1] to levels (B, K), about 0.5 when untrained (`init` "zero": exactly)."""

    def __init__(self, backbone: str, num_levels: int, sigmoid: bool, init: str):
        super().__init__()
        self.sigmoid = sigmoid
        self.backbone = POLICIES[backbone](num_levels)
        head = self.backbone._fc if hasattr(self.backbone, "_fc") else self.backbone.fc
        if init == "zero":
            nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, 0.0 if sigmoid else 0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        levels = self.backbone(images).float()
        return levels.sigmoid() if self.sigmoid else levels


# ---------------------------------------------------------------------------------------------------------------------
# Estimators: the gradient of each image's loss with respect to its levels, from losses alone
# ---------------------------------------------------------------------------------------------------------------------

Loss = Callable[[torch.Tensor], torch.Tensor]


def vanilla_gradient(
    loss: Loss, levels: torch.Tensor, num_samples: int, sigma: float, beta: float, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Antithetic evolution strategies: g = mean over P of β/(2σ²)·(L(v+ε) − L(v−ε))·ε with ε ~ N(0, σ²/n·I), n = K.

    loss maps levels (P·B, K) to the loss of each row (P·B,); row p·B + b belongs to image b. levels (B, K) → gradient (B, K).
    Every image and every perturbation is credited with its own difference. The expectation is β/K times the true gradient
    (to second order in σ). noise: (P, B, K) standard normal, drawn here where it is None.
    """
    num_levels = levels.shape[1]
    if noise is None:
        noise = torch.randn(num_samples, *levels.shape, device=levels.device)
    return antithetic_gradient(loss, levels, sigma / math.sqrt(num_levels) * noise, sigma, beta)


def guided_gradient(
    loss: Loss,
    levels: torch.Tensor,
    student_gradient: torch.Tensor,
    num_samples: int,
    sigma: float,
    alpha: float,
    beta: float,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Guided ES (Maheswaranathan et al. 2019, equation 3): as vanilla_gradient with ε = σ·√(α/n)·z + σ·√((1−α)/k)·w·q, k = 1.

    q is student_gradient (B, K), normalised per image; z and w are standard normal, so ε has covariance σ²·(α/n·I + (1−α)·q·qᵀ).
    noise: (P, B, K + 1) standard normal, z and w. Where a student's gradient is zero, only z remains.
    """
    num_levels = levels.shape[1]
    if noise is None:
        noise = torch.randn(num_samples, len(levels), num_levels + 1, device=levels.device)
    z, w = noise[..., :num_levels], noise[..., num_levels:]
    q = F.normalize(student_gradient, dim=1, eps=1e-30)
    return antithetic_gradient(loss, levels, sigma * (math.sqrt(alpha / num_levels) * z + math.sqrt(1 - alpha) * w * q), sigma, beta)


def antithetic_gradient(loss: Loss, levels: torch.Tensor, epsilon: torch.Tensor, sigma: float, beta: float) -> torch.Tensor:
    """mean over P of β/(2σ²)·(L(v+ε) − L(v−ε))·ε for perturbations epsilon (P, B, K) of levels (B, K)."""
    plus = loss((levels + epsilon).flatten(0, 1)).view(epsilon.shape[:2])  # (P, B)
    minus = loss((levels - epsilon).flatten(0, 1)).view(epsilon.shape[:2])
    return (beta / (2 * sigma**2) * (plus - minus)[:, :, None] * epsilon).mean(0)


def true_gradient(loss: Callable, levels: torch.Tensor, chunk: int) -> torch.Tensor:
    """The gradient (B, K) of each row's loss by backpropagation, `chunk` rows at a time: of loss(levels of the chunk, number of its first row)."""
    gradients = []
    for start in range(0, len(levels), chunk):
        with torch.enable_grad():
            part = levels[start : start + chunk].detach().requires_grad_()
            gradients.append(torch.autograd.grad(loss(part, start).sum(), part)[0])
    return torch.cat(gradients)


def consistency_loss(policy: Callable, images: torch.Tensor, levels: torch.Tensor, transform: str) -> torch.Tensor:
    """Mean squared deviation, per image (B,), of π(T(x, u)) from π(x) − (u − 0.5): a copy moved by u asks for that much less.

    levels: the u that are applied, (B, K).
    """
    with torch.no_grad():
        moved = transform_images(images, levels, transform)
    return (policy(moved) - (policy(images) - (levels - 0.5))).square().mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# The classifier as a black box, and its student
# ---------------------------------------------------------------------------------------------------------------------


class BlackBox:
    """A frozen classifier, from images in [0, 1] to logits; no gradient flows through it unless `whitebox`.

    It counts the images that it is shown, which is what distillation costs; training counts its own in `totals`.
    """

    def __init__(self, classifier: nn.Module, machine: common.Machine, whitebox: bool):
        self.classifier = classifier.eval().requires_grad_(False)
        self.machine, self.whitebox, self.queries = machine, whitebox, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.queries += len(images)
        with torch.set_grad_enabled(self.whitebox and torch.is_grad_enabled()), self.machine.autocast():
            return self.classifier(self.machine.layout(images)).float()


class Program(nn.Module):
    """A classifier that can only be asked: from images (B, 3, H, W) in [0, 1] to logits (B, classes). It has no parameters to train, move or adapt.

    query is what `file` holds; it takes contiguous float32 images, whatever the layout and precision around it.
    """

    def __init__(self, file: str | Path, query: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.file, self.query = file, query

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, enabled=False):
            # A copy, as a program may normalise in place.
            return self.query(images.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True))


def program_kind(file: str | Path) -> str:
    """What kind of program a file holds: "onnx" by its suffix, "torchscript" or "torch.export" by what is in the archive. InputError for anything else."""
    if not Path(file).is_file():
        raise InputError(f"--blackbox {file}: no such file")
    if Path(file).suffix.lower() == ".onnx":
        return "onnx"
    names = []
    with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:  # a damaged one raises more than BadZipFile
        names = archive.namelist()
    if any(name.endswith("constants.pkl") for name in names):
        return "torchscript"
    if any(name.endswith(("models/model.json", "serialized_exported_program.json")) for name in names):  # the latter up to torch 2.7
        return "torch.export"
    advice = "a checkpoint goes to --weights" if any(name.endswith("data.pkl") for name in names) else "the file may be damaged"
    raise InputError(f"--blackbox {file} is no ONNX (.onnx), TorchScript or torch.export program: {advice}")


def load_blackbox(file: str | Path, machine: common.Machine) -> nn.Module:
    """The program in an ONNX, TorchScript or torch.export file, on the machine's device (ONNX: on a GPU if this onnxruntime has CUDA, else on the CPU).

    Loading runs what is in the file. Raises InputError for a file that is missing or cannot be read, and where onnxruntime is not installed.
    """
    kind = program_kind(file)
    load = {"onnx": load_onnx, "torchscript": load_torchscript, "torch.export": load_exported}[kind]
    try:
        with common.warnings_off():
            program = load(file, machine.device)
    except InputError:
        raise
    except Exception as error:  # each library has errors of its own
        raise InputError(f"--blackbox {file} cannot be read as {kind}: {short_reason(error)}") from error
    return Program(file, lambda images: program(images))  # a closure: as a submodule it would be put into eval mode, which torch.export's refuse


def load_onnx(file: str | Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"--blackbox {file} needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # its errors are raised too; no second line on stderr
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index}))
    session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (session.get_inputs(), session.get_outputs()))
    if len(inputs) != 1 or len(outputs) != 1:
        raise InputError(
            f"--blackbox {file} has inputs {', '.join(inputs)} and outputs {', '.join(outputs)}: it must have one of each, images and logits"
        )
    return lambda images: torch.from_numpy(session.run(outputs, {inputs[0]: images.cpu().numpy()})[0]).to(images.device)


def load_torchscript(file: str | Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.jit.load(file, map_location=device).eval()


def load_exported(file: str | Path, device: torch.device) -> nn.Module:
    from torch.export.passes import move_to_device_pass

    logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it logs what it then raises
    with open(file, "rb") as stream:  # a path would have to end in .pt2
        program = torch.export.load(stream)
    return move_to_device_pass(program, str(device)).module()


def short_reason(error: Exception) -> str:
    """The line of a library's error that says why: the first, but the last of TorchScript's traces."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1 if "TorchScript interpreter" in lines[0] else 0]


def check_blackbox(classifier: Program, file: str | Path, num_classes: int, dataset: str, size: int, device: torch.device) -> None:
    """Ask the program for 2 and for 3 images of this size. Raises InputError where it fails or its answer is not (B, num_classes) numbers."""
    for count in (2, 3):
        shape = (count, 3, size, size)
        try:
            logits = classifier(torch.zeros(shape, device=device))
        except Exception as error:  # each library has errors of its own
            advice = f"it must take images (B, 3, {size}, {size}) for any B: make it with a dynamic batch dimension"
            raise InputError(f"--blackbox {file} fails on a batch {shape}: {short_reason(error)}; {advice}") from error
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            given = f"a tensor {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
            raise InputError(f"--blackbox {file} gives {given} for {count} images: it must give one tensor of logits ({count}, {num_classes})")
        if logits.shape[0] != count:
            raise InputError(f"--blackbox {file} gives {logits.shape[0]} rows for {count} images: make it with a dynamic batch dimension")
        if logits.shape[1] != num_classes:
            raise InputError(f"--blackbox {file} gives {logits.shape[1]} outputs, but {dataset} has {num_classes} classes")


def label_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each row's loss (B,): cross entropy with classes (B,) int64; or the mean binary cross entropy with findings (B, L) in {0, 1}, NaN ignored."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    known = labels.isfinite()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none") * known
    return losses.sum(1) / known.sum(1).clamp_min(1)


def correct_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the class is right, or the share of known findings that are: (B,) float."""
    if labels.dim() == 1:
        return (logits.argmax(1) == labels).float()
    known = labels.isfinite()
    return (((logits > 0) == (labels > 0.5)) & known).sum(1) / known.sum(1).clamp_min(1)


def level_loss(query: Callable, images: torch.Tensor, labels: torch.Tensor, transform: str, chunk: int, totals: torch.Tensor | None = None) -> Loss:
    """The function from levels (P·B, K) to losses (P·B,) of the transformed images, asked for in chunks; labels as label_losses takes them.

    totals (3 or more,) accumulates the sum of losses, the number of correct answers and the number of rows. The function's `start` is the
    number of the first of these rows, where they are a chunk (true_gradient).
    """

    def loss(levels: torch.Tensor, start: int = 0) -> torch.Tensor:
        rows = torch.arange(start, start + len(levels), device=levels.device) % len(images)
        losses = []
        for index, part in zip(rows.split(chunk), levels.split(chunk)):
            logits = query(transform_images(images[index], part, transform))
            losses.append(label_losses(logits, labels[index]))
            if totals is not None:
                correct = correct_answers(logits.detach(), labels[index]).sum()
                totals[:3] += torch.stack([losses[-1].detach().sum(), correct, torch.ones_like(index).sum()])
        return torch.cat(losses)

    return loss


def shared_loss(loss: Loss, count: int, global_count: int, machine: common.Machine) -> Loss:
    """`loss` with every row's value replaced by the mean over all rows, of every rank: one scalar per batch, as in the published code.

    count: images of this rank's batch, global_count: of all ranks' batches.
    """

    def mean(levels: torch.Tensor) -> torch.Tensor:
        total = machine.all_sum(loss(levels).sum())
        return (total / (len(levels) // count * global_count)).expand(len(levels))

    return mean


def load_student(weights: str, dataset: str, num_classes: int, machine: common.Machine, dry_run: bool) -> nn.Module:
    """A student at hand: `weights` is a checkpoint, or a name of weights/README.md. Raises InputError where it is missing or of another model."""
    student = common.build_model("student", num_classes, dataset)
    common.load_checkpoint(student, weights, machine, dry_run)
    return student.to(machine.device, memory_format=machine.weight_layout).eval().requires_grad_(False)


def distil_student(
    black_box: BlackBox, images: torch.Tensor, dataset: str, num_classes: int, machine: common.Machine, epochs: int, batch_size: int, seed: int
) -> nn.Module:
    """A white-box student that imitates the classifier's logits (mean squared error) on the training images under strong augmentation.

    Only the classifier's outputs are used. Adam, one cycle up to 3e-3. The same on every rank, so that the students agree.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = common.build_model("student", num_classes, dataset).to(machine.device, memory_format=machine.weight_layout)
    generator = torch.Generator(machine.device).manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3, fused=True)
    steps = epochs * (len(images) // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    progress = tqdm(total=steps, desc="distil the student", unit="step", disable=not machine.is_main)
    for _ in range(epochs):
        for index in common.epoch_batches(len(images), batch_size, generator):
            batch = strong_augmentation(common.to_float(images[index]), strong_draws(batch_size, generator), has_colour(dataset))
            loss = F.mse_loss(student(machine.layout(batch)), black_box(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            progress.update()
        progress.set_postfix(mse=f"{loss.item():.4f}")
    progress.close()
    return student.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: GrETTA and what it is compared with; every predictor maps images (B, 3, H, W) in [0, 1] to scores (B, classes)
# ---------------------------------------------------------------------------------------------------------------------


def gretta_steps(policy: nn.Module, images: torch.Tensor, transform: str, steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The images after 0, 1, …, `steps` applications of the policy, and the levels of each application."""
    seen, levels = [images], []
    for _ in range(steps):
        levels.append(policy(seen[-1]))
        seen.append(transform_images(seen[-1], levels[-1], transform))
    return seen, levels


def crops(images: torch.Tensor, flips: bool) -> torch.Tensor:
    """Four corners and the centre at 7/8 of the side (and their mirror images: ten-crop), enlarged again: (crops, B, 3, H, W)."""
    height, width = images.shape[-2:]
    h, w = height * 7 // 8, width * 7 // 8
    middle = ((height - h) // 2, (width - w) // 2)
    corners = [(0, 0), (0, width - w), (height - h, 0), (height - h, width - w), middle]
    cut = torch.stack([images[..., top : top + h, left : left + w] for top, left in corners])  # (5, B, 3, h, w)
    cut = F.interpolate(cut.flatten(0, 1), size=(height, width), mode="bilinear", align_corners=False).view(5, *images.shape)
    return torch.cat([cut, cut.flip(-1)]) if flips else cut


def probabilities(logits: torch.Tensor, dataset: str) -> torch.Tensor:
    """Of classes that exclude each other, or (chexpert) of findings that don't: logits (…, classes) → the same shape."""
    return logits.float().sigmoid() if dataset == "chexpert" else logits.float().softmax(-1)


def crop_scores(query: Callable, images: torch.Tensor, dataset: str, flips: bool) -> torch.Tensor:
    """Mean probabilities over five (or ten) crops."""
    return torch.stack([probabilities(query(crop), dataset) for crop in crops(images, flips)]).mean(0)


def adapt_batch_norm(classifier: nn.Module) -> nn.Module:
    """A copy of the classifier whose batch-norm layers use the statistics of the test batch (Nado et al. 2020, Schneider et al. 2020)."""
    adapted = copy.deepcopy(classifier)
    for module in adapted.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return adapted


PREDICTORS = ("none", "five_crop", "ten_crop", "bn_adapt", "gretta")  # and "gretta_bn_adapt": the policy in front of bn_adapt


@torch.no_grad()
def evaluate_predictors(
    classifier: nn.Module,
    policy: nn.Module,
    data: Data,
    transform: str,
    steps: int,
    machine: common.Machine,
    names: tuple[str, ...] = PREDICTORS,
    workers: int = 0,
    dataset: str = "digits",
) -> dict[str, dict[str, float]]:
    """The figures of each named predictor on uint8 images (see `figures`); with steps > 1 also after each step (gretta_1, …).

    Every image is evaluated on one rank.
    """
    # Batch statistics must not see one class only: the images come shuffled, always alike, and every rank sees whole batches.
    order = torch.randperm(common.count_images(data), generator=torch.Generator().manual_seed(0))
    batches = order.split(200)[machine.rank :: machine.world_size]
    policy.eval()

    def query(model: nn.Module, images: torch.Tensor) -> torch.Tensor:  # mixed precision is for the networks, not for the transforms
        with machine.autocast():
            return model(images.contiguous(memory_format=torch.channels_last)).float()

    none, ask_policy = partial(query, classifier), partial(query, policy)
    adapted_model = adapt_batch_norm(classifier) if {"bn_adapt", "gretta_bn_adapt"} & {*names} else None

    def adapted(images: torch.Tensor) -> torch.Tensor:  # one alone goes in twice: the same statistics, which torch won't take of a single value
        return query(adapted_model, torch.cat([images, images]) if len(images) == 1 else images)[: len(images)]

    def after_each_step(images: torch.Tensor) -> torch.Tensor:
        seen, _ = gretta_steps(ask_policy, images, transform, steps)
        return torch.stack([none(image) for image in seen[1:]], dim=1)  # (B, steps, classes)

    predictors = {
        "none": none,
        "five_crop": lambda images: crop_scores(none, images, dataset, flips=False),
        "ten_crop": lambda images: crop_scores(none, images, dataset, flips=True),
        "bn_adapt": adapted,
        "gretta": after_each_step,
        "gretta_bn_adapt": lambda images: adapted(gretta_steps(ask_policy, images, transform, steps)[0][-1]),
    }
    scores, answers = {name: [] for name in names}, []
    for images, labels in common.numbered_batches(data, batches, workers, machine):
        images = common.to_float(images)
        for name in names:
            parts = images.split(len(images) if name.endswith("bn_adapt") else machine.chunk(*images.shape[2:]))
            kept = torch.cat([predictors[name](part) for part in parts])
            if labels.dim() == 1:  # all that is asked of a thousand classes
                kept = (kept.argmax(-1) == labels.view(-1, *[1] * (kept.dim() - 2))).double()
            scores[name].append(kept)
        answers.append(labels)

    def gather(parts: list[torch.Tensor]) -> torch.Tensor:
        return machine.all_rows(torch.cat(parts) if parts else torch.empty(0, device=machine.device))  # a rank may have had no batch

    labels, found = gather(answers), {}
    for name in names:
        values = gather(scores[name])
        if name != "gretta":
            found[name] = figures(values, labels)
            continue
        found[name] = figures(values[:, -1], labels)
        if steps > 1:
            found |= {f"gretta_{step + 1}": figures(values[:, step], labels) for step in range(steps)}
    return found


def figures(outcomes: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """{"accuracy": percent of outcomes (N,) that are right}; or of scores (N, L) {"accuracy": the mean AUROC (%), finding: its AUROC (%)}.

    A finding that every or no image has is left out.
    """
    if labels.dim() == 1:
        return {"accuracy": 100 * outcomes.mean().item()}
    found = {}
    for name, scores, truth in zip(common.FINDINGS, outcomes.T, labels.T):
        known = truth.isfinite()
        value = common.auroc(scores[known], truth[known])
        found |= {name: 100 * value} if value is not None else {}
    return {"accuracy": sum(found.values()) / len(found) if found else math.nan} | found


# ---------------------------------------------------------------------------------------------------------------------
# Policy, transforms and classifier as one program
# ---------------------------------------------------------------------------------------------------------------------


class AugmentedClassifier(nn.Module):
    """From images (B, 3, H, W) in [0, 1] to the classifier's logits (B, classes) after `steps` applications of the policy."""

    def __init__(self, policy: nn.Module, classifier: nn.Module, transform: str, steps: int):
        super().__init__()
        self.policy, self.classifier, self.transform, self.steps = policy, classifier, transform, steps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(gretta_steps(self.policy, images, self.transform, self.steps)[0][-1]).float()


def check_export(file: str | Path, blackbox: str | None) -> None:
    """Raise InputError where --export cannot write: asked before a run, which is long."""
    file = Path(file)
    if file.suffix != ".pt2":
        raise InputError(f"--export {file}: the name must end in .pt2, which torch.export.load asks for")
    if file.exists():
        raise InputError(f"--export {file} exists: choose another name")
    if not file.parent.is_dir():
        raise InputError(f"--export {file}: there is no directory {file.parent}: make it, or choose another")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"--export {file}: {file.parent} is not writable: choose another directory")
    if blackbox and program_kind(blackbox) != "torch.export":
        raise InputError(f"--export cannot put --blackbox {blackbox} into the program: only a torch.export one can be part of it")


@torch.no_grad()
def export_program(file: str | Path, policy: nn.Module, classifier: nn.Module, transform: str, steps: int, images: torch.Tensor) -> float:
    """Write an AugmentedClassifier as a torch.export program (CPU, float32, any batch size) and load it again.

    images (N, 3, H, W) uint8, on the device of policy and classifier. Returns the largest difference between the program's logits of
    these images and those of the modules themselves. A classifier of --blackbox must be a torch.export program. InputError where torch.export fails.
    """
    cpu = torch.device("cpu")
    images = common.to_float(images)
    expected = AugmentedClassifier(policy.eval(), classifier, transform, steps)(images).cpu()
    own_policy = copy.deepcopy(policy).to(cpu, memory_format=torch.contiguous_format).requires_grad_(False)
    if hasattr(own_policy.backbone, "set_swish"):
        own_policy.backbone.set_swish(memory_efficient=False)  # the other is an autograd function of Python's, which no program can hold
    if isinstance(classifier, Program):
        own_classifier = load_exported(classifier.file, cpu)
    else:
        own_classifier = copy.deepcopy(classifier).to(cpu, memory_format=torch.contiguous_format)
    whole = AugmentedClassifier(own_policy, own_classifier, transform, steps)
    beside = Path(file).with_name(f".{os.getpid()}.{Path(file).name}")
    try:
        with common.warnings_off():
            # An example of two: a size of one would be taken for a constant.
            batch = torch.export.Dim("batch", min=1, max=2**20)
            program = torch.export.export(whole, (torch.zeros(2, *images.shape[1:]),), dynamic_shapes=({0: batch},))
            with open(beside, "wb") as stream:
                torch.export.save(program, stream)
            os.replace(beside, file)
            return (torch.export.load(file).module()(images.cpu()) - expected).abs().max().item()
    except OSError:
        raise
    except Exception as error:
        raise InputError(f"--export {file}: {short_reason(error)}; the run is finished, its policy is in its checkpoint.pt") from error
    finally:
        beside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_examples(
    file: Path,
    classifier: nn.Module,
    policy: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    transform: str,
    steps: int,
    dataset: str,
    machine: common.Machine,
) -> None:
    """A grid, one row per image: the original and the image after each step, the predicted class and confidence above, the levels beside it.

    labels (B,), or None where they are not known, or not one per image."""
    import matplotlib.figure

    policy.eval()
    seen, levels = gretta_steps(policy, common.to_float(images.to(machine.device)), transform, steps)
    confidences, classes = torch.stack([probabilities(classifier(image), dataset) for image in seen]).cpu().max(2)  # (steps + 1, B)
    names = TRANSFORM_SETS[transform]
    columns = 1 + 2 * steps
    figure = matplotlib.figure.Figure(figsize=(1.9 * columns + 0.9, 1.75 * len(images)), dpi=100, layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False, width_ratios=[1] + [1, 1.1] * steps)
    for row in range(len(images)):
        for step in range(steps + 1):
            axis = axes[row, max(0, 2 * step - 1)]
            axis.imshow(seen[step][row].permute(1, 2, 0).clamp(0, 1).cpu().numpy(), vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            predicted = classes[step, row].item()
            shown = common.FINDINGS[predicted] if dataset == "chexpert" else predicted
            title = f"{shown} ({100 * confidences[step, row]:.0f} %)"
            color = "black" if labels is None else ("tab:green" if predicted == labels[row] else "tab:red")
            prefix = "original" if step == 0 else f"step {step}"
            axis.set_title(f"{prefix}: {title}" if row == 0 else title, fontsize=10, color=color)
            if step == 0 and labels is not None:
                axis.set_ylabel(f"true {labels[row].item()}", fontsize=10)
        for step in range(steps):
            axis = axes[row, 2 * step + 2]
            values = levels[step][row].clamp(0, 1).cpu().numpy()
            axis.barh(range(len(names)), values - 0.5, left=0.5, color="tab:blue")
            axis.axvline(0.5, color="black", linewidth=0.8)
            axis.set_xlim(0, 1)
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.invert_yaxis()
            axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"] if row == len(images) - 1 else ["", "", ""], fontsize=8)
            if row == 0:
                axis.set_title("levels", fontsize=10)
    figure.savefig(file)


def draw_curves(file: Path, history: list[dict], baseline: float, title: str) -> None:
    """Training loss and validation accuracy against the images shown to the classifier."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    queries = [entry["queries"] for entry in history]
    left.plot(queries, [entry["loss"] for entry in history], marker="o", markersize=3)
    left.set(xlabel="queries (images)", ylabel="cross entropy", title="training loss, mean of each epoch")
    right.plot(queries, [entry["val_accuracy"] for entry in history], marker="o", markersize=3, label="GrETTA")
    right.axhline(baseline, color="grey", linestyle="--", label="no augmentation")
    right.set(xlabel="queries (images)", ylabel="accuracy (%)", title="shifted validation images")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 4))
    figure.suptitle(title)
    figure.savefig(file)


# ---------------------------------------------------------------------------------------------------------------------
# A folder of one's own pictures
# ---------------------------------------------------------------------------------------------------------------------


def picture_files(folder: str) -> list[Path]:
    """The picture files of a folder, sorted by name. Raises InputError where there are none."""
    if not Path(folder).is_dir():
        raise InputError(f"--predict {folder}: no such folder")
    files = sorted(file for file in Path(folder).iterdir() if file.suffix.lower() in common.IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"--predict {folder}: no pictures in it (looked for {', '.join(common.IMAGE_SUFFIXES)})")
    return files


def read_pictures(files: list[Path], size: int, dataset: str = "digits") -> torch.Tensor:
    """Pictures as (N, 3, size, size) uint8: RGB, the shorter side scaled, the centre cut out (for data sets of pictures as these are evaluated).
    Raises InputError for one that cannot be read."""
    import numpy as np
    from PIL import Image, ImageOps

    images = []
    for file in files:
        try:
            if dataset in ("imagenet", "folder", "chexpert"):
                picture = common.read_picture(str(file), size, 256)
            else:
                with common.open_picture(file) as image:
                    # Bicubic, as a large photograph is shrunk to 32 px or so: Pillow's antialiases, and keeps edges sharper than bilinear.
                    picture = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            images.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))
        except Exception as error:  # a damaged picture raises whatever its decoder meets
            raise InputError(f"--predict: {file} is not a readable image ({error}): remove it from the folder") from error
    return torch.stack(images)


@torch.no_grad()
def predict_folder(
    files: list[Path],
    images: torch.Tensor,
    directory: Path,
    classifier: nn.Module,
    policy: nn.Module,
    transform: str,
    steps: int,
    dataset: str,
    machine: common.Machine,
) -> None:
    """predictions.csv (class and confidence before and after), and under predictions/ each picture as the classifier saw it, before and after."""
    from PIL import Image

    policy.eval()
    alone = machine._replace(rank=0, world_size=1)  # only one rank predicts
    transformed = []
    for chunk in images.split(machine.chunk(*images.shape[2:])):
        transformed.append(common.to_uint8(gretta_steps(policy, common.to_float(chunk.to(machine.device)), transform, steps)[0][-1]).cpu())
    transformed = torch.cat(transformed)
    before, after = (probabilities(common.predict_logits(classifier, shown, alone), dataset).cpu().max(1) for shown in (images, transformed))
    (directory / "predictions").mkdir(exist_ok=True)
    with open(directory / "predictions.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "class_before", "confidence_before", "class_after", "confidence_after"])
        for row, file in enumerate(files):
            confidences = (f"{before.values[row]:.4f}", f"{after.values[row]:.4f}")
            writer.writerow([file.name, before.indices[row].item(), confidences[0], after.indices[row].item(), confidences[1]])
            for name, pixels in (("original", images[row]), ("transformed", transformed[row])):
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(directory / "predictions" / f"{file.name}-{name}.png")
    draw_examples(directory / "predictions.png", classifier, policy, images[:10], None, transform, steps, dataset, machine)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def target_domain(split: str, proportion: float, data_root: str, variants: int = 10, dataset: str = "digits") -> tuple[torch.Tensor, ...]:
    """Modified digits (or MNIST) as two disjoint parts: `proportion` of all images to train the policy on, and the part it is evaluated on.

    The split goes by digit, stratified: no digit has images in both parts. Half of the digits (more where proportion > 1/2) are
    set aside for training, and proportion · N of their images are drawn, different digits first; the evaluation part is every image of the
    other digits, so it is the same for every proportion up to 1/2. Returns images, labels of the training part, images, labels of the
    evaluation part, and all images of the digits set aside for training (for --reg test, which needs no labels).
    """
    images, labels, source = common.modified_digits(split, data_root, variants, dataset=dataset)
    for_training, order = set_aside(labels[: len(labels) // variants], proportion)
    # Variant by variant, so that the first images drawn are of different digits.
    pool = torch.cat([v * len(order) + order[for_training[order]] for v in range(variants)])
    drawn = pool[: round(proportion * len(labels))]
    held_out = torch.nonzero(~for_training[source])[:, 0]
    return images[drawn], labels[drawn], images[held_out], labels[held_out], images[pool]


def set_aside(labels: torch.Tensor, proportion: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of N images are for training, (N,) bool: half of each class, more where proportion > 1/2, never all; and a random order of all."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    for_training = torch.zeros(len(order), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        for_training[members[: min(len(members) - 1, math.ceil(max(0.5, proportion) * len(members)))]] = True
    return for_training, order


class TargetSets(NamedTuple):
    """What a run learns from and is tested on; tensors are on the device."""

    train: Data | None  # None where nothing is trained
    test: dict[str, Callable[[], Data]]  # made, or read, when they are asked for
    val: Data | None  # shifted validation images for the curves
    reg: torch.Tensor | None  # unlabelled images (N, 3, H, W) for the regulariser
    source: str  # for the protocol
    corruptions: common.Corruptions | None
    num_classes: int
    size: int


CURVE_IMAGES = 250  # validation images, at most
REG_IMAGES = 2000  # pictures on disk that --reg is computed on, at most


def has_colour(dataset: str) -> bool:
    """Whether images may be mirrored and their hues changed: not digits, nor X-rays."""
    return dataset not in ("digits", "mnist", "chexpert")


def load_sets(
    train_on: str,
    dataset: str,
    proportion: float,
    data_root: str,
    machine: common.Machine,
    *,
    split: str,
    reg: str,
    uncertain: str,
    workers: int,
    train: bool,
    dry_run: bool,
    **where: object,
) -> TargetSets:
    """Everything the run needs; `train`: to train a policy, not only to use one. `where` goes to common.load_sets: corrupted_directory,
    generate, fake_shape. Raises InputError for what is missing."""
    target = train_on == "target"
    corruptions, num_classes, size, reg_images = None, len(common.FINDINGS), 224, None
    in_folders = dataset in ("imagenet", "folder")
    if dataset != "chexpert":
        found = common.load_sets(
            dataset,
            data_root,
            machine,
            split=split,
            validation=not (target and dataset == "folder") or split == "val",
            train=train and not (target and dataset == "folder"),
            corruptions=None if target else "needed",
            download=not dry_run,
            dry_run=dry_run and not target,
            **where,
        )
        num_classes, size, corruptions = found.num_classes, found.size, found.corruptions
    if target and dataset == "chexpert":
        pictures, test = common.load_chexpert(data_root, uncertain)
        learn_from, val = common.split_patients(pictures, proportion)
        reg_images = val
        source = f"CheXpert train ({len(pictures)} images), {100 * proportion:g} % of its patients train the policy ({len(learn_from)} images)"
        source += f", evaluated on CheXpert valid ({len(test)} images, uncertain labels: {uncertain})"
        tests = {"valid": test}
    elif target and dataset == "folder":
        for_training, order = set_aside(found.test.labels, proportion)
        pool, held_out = order[for_training[order]], torch.nonzero(~for_training)[:, 0]
        drawn = round(proportion * len(order))
        learn_from, test = found.test.part(pool[:drawn]), found.test.part(held_out)
        reg_images, val = found.test.part(pool), found.test.part(pool[drawn:] if drawn < len(pool) else pool)
        source = f"{data_root} ({len(order)} {split} images), {100 * proportion:g} % train the policy ({len(learn_from)} images), "
        source += f"evaluated on {len(test)} others"
        tests = {"target": test}
    elif target:
        variants = 10 if dataset == "digits" else 1
        train_images, train_labels, test_images, test_labels, reg_images = target_domain(split, proportion, data_root, variants, dataset)
        learn_from, tests = (train_images, train_labels), {"modified": (test_images, test_labels)}
        val = common.modified_digits("val", data_root, 2 if dataset == "digits" else 1, dataset=dataset)[:2]
        source = f"modified {dataset} made from the {split} images, {variants} variant{'s' * (variants > 1)} each"
        source += f"; policy trained on {100 * proportion:g} % ({len(train_labels)} images), evaluated on {len(test_labels)} images of other digits"
    else:
        learn_from, tests = found.train, {}
        val_images, val_labels = common.gather_images(found.test if found.val is None else found.val, CURVE_IMAGES, workers, machine)
        generator = torch.Generator(machine.device).manual_seed(0)
        doubled = common.to_float(val_images).repeat(2, 1, 1, 1)
        strong = strong_augmentation(doubled, strong_draws(len(doubled), generator), has_colour(dataset))
        val = (common.to_uint8(strong), val_labels.repeat(2))
        if reg == "test":
            reg_images = torch.cat([common.corrupt_uint8(val_images, name, 3, seed=1) for name in common.CORRUPTIONS])
        source = f"{corruptions.protocol}; policy trained on augmented training images"
    if dry_run:
        learn_from, val = common.keep_some(learn_from, 64), common.keep_some(val, 64)
        tests = {name: common.keep_some(test, 64) for name, test in tests.items()}
    tests = {name: partial(on_device, test, machine) for name, test in tests.items()}
    for name in corruptions.names + corruptions.extra if corruptions else ():
        tests |= {f"{name}-{severity}": partial(corruptions.read, name, severity) for severity in corruptions.severities}
    if reg == "none" or not train:
        reg_images = None
    elif reg != "test":
        images = common.gather_images(learn_from, REG_IMAGES, workers, machine)[0] if isinstance(learn_from, common.Folder) else learn_from[0]
        reg_images = common.corrupt_uint8(images.to(machine.device), reg, 3, seed=1)
    elif isinstance(reg_images, common.Folder):
        reg_images = common.gather_images(reg_images, REG_IMAGES, workers, machine)[0]
    if in_folders or dataset == "chexpert":
        val = common.keep_some(val, 2 * CURVE_IMAGES)
    reg_images = None if reg_images is None else reg_images.to(machine.device)
    return TargetSets(on_device(learn_from, machine), tests, on_device(val, machine), reg_images, source, corruptions, num_classes, size)


def on_device(data: Data, machine: common.Machine) -> Data:
    return tuple(part.to(machine.device) for part in data) if isinstance(data, tuple) else data


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    started = time.perf_counter()
    args = parse_args()
    machine = common.start_machine(args.device, args.amp, args.seed)
    num_levels = len(TRANSFORM_SETS[args.transform])
    use_policy = bool(args.evaluate or (args.predict and (args.run_dir or args.weights_policy)))  # a trained one: nothing is trained
    if use_policy and not args.weights_policy and not args.run_dir:
        raise InputError("--evaluate needs a trained policy: name its run with --run-dir, or its file with --weights-policy")
    files = picture_files(args.predict) if args.predict else []
    in_place = use_policy and not args.weights_policy  # the run's own directory is evaluated again, or predicts
    checkpoint = Path(args.run_dir or "") / "checkpoint.pt"
    only_predict = use_policy and args.predict and not args.evaluate and not args.export
    if in_place and not only_predict and common.has_checkpoint(args.run_dir):
        instead = "evaluate it with --weights-policy RUN_DIR/checkpoint.pt"
        names = ("dataset", "model", "weights", "blackbox", "est", "seed", "train_on", "proportion", "target_split", "transform", "policy", "sigmoid")
        names += ("uncertain", "steps", "generate_corruptions")
        common.check_in_place(checkpoint.parent, {name: getattr(args, name) for name in names}, args.dry_run, instead)

    # A trained policy. Its run needs no data set for a folder of pictures: the checkpoint says what the classifier takes and how many classes there are.
    saved = shape = None
    if use_policy:
        advice = "give the checkpoint.pt of a finished run"
        saved = common.load_tensors(args.weights_policy, advice) if args.weights_policy else common.read_checkpoint(Path(args.run_dir), advice)
    if only_predict and in_place and common.arguments_of_run(checkpoint.parent).get("dataset") == args.dataset:
        shape = saved.get("num_classes"), saved.get("size")
        shape = shape if all(isinstance(value, int) and 0 < value <= 4096 for value in shape) else None  # else the data set says it

    # Data: everything is looked for before the first file is written.
    if args.export:
        check_export(args.export, args.blackbox)
    workers = 0 if args.dry_run else machine.workers(args.workers)
    if shape:
        sets = TargetSets(None, {}, None, None, "", None, *shape)
    else:
        sets = load_sets(
            args.train_on,
            args.dataset,
            args.proportion,
            args.data_root,
            machine,
            split=args.target_split,
            reg=args.reg,
            uncertain=args.uncertain,
            workers=workers,
            train=not use_policy,
            dry_run=args.dry_run,
            corrupted_directory=args.corruptions_path,
            generate=args.generate_corruptions,
            fake_shape=args.fake_shape,
        )
    pictures = read_pictures(files, sets.size, args.dataset) if files else None
    if args.dry_run:
        sets = sets._replace(train=common.keep_some(sets.train, min(args.batch_size, 32)))
    n_train = common.count_images(sets.train)
    if args.dry_run:
        args.epochs, args.num_samples, args.batch_size = 1, min(args.num_samples, 2), min(args.batch_size, n_train or args.batch_size)
    steps_per_epoch = n_train // args.batch_size
    if steps_per_epoch == 0 and not use_policy:
        raise InputError(
            f"{n_train} images to train the policy on are fewer than a batch of {args.batch_size}: lower --batch-size or raise --proportion"
        )
    if args.batch_size < machine.world_size:
        raise InputError(f"a batch of {args.batch_size} is smaller than the {machine.world_size} processes: raise --batch-size")
    if args.batch_size == 1 and not use_policy:
        raise InputError("--batch-size 1: the policy's batch norm needs two images; raise it, or --proportion where there is only one")
    if args.epochs is None:
        args.epochs = math.ceil(SETTINGS[args.dataset][args.est]["updates"] / max(steps_per_epoch, 1))
    if args.checkpoint_every is None:
        args.checkpoint_every = max(1, args.epochs // 10)

    # Models.
    if args.blackbox:
        classifier, weights = load_blackbox(args.blackbox, machine), Path(args.blackbox)
        check_blackbox(classifier, weights, sets.num_classes, args.dataset, sets.size, machine.device)
    else:
        classifier = common.build_model(args.model, sets.num_classes, args.dataset)
        common.check_input_size(classifier, args.model, sets.size)
    if args.weights:
        weights = common.load_checkpoint(classifier, args.weights, machine, args.dry_run)
    elif not args.blackbox:
        weights = common.load_pretrained(classifier, args.model, args.dataset, machine, args.data_root, args.dry_run)
    classifier.to(machine.device, memory_format=machine.weight_layout)
    black_box = BlackBox(classifier, machine, args.est == "whitebox")
    query_batch = args.query_batch or (machine.chunk(sets.size, sets.size) if args.blackbox else common.forward_chunk(classifier, sets.size, machine))
    policy = Policy(args.policy, num_levels, args.sigmoid, args.init).to(machine.device)
    optimizer = OPTIMIZERS[args.opt](policy.parameters(), lr=args.lr)
    scaler = common.grad_scaler(machine)
    generator = torch.Generator(machine.device).manual_seed(args.seed)  # alike on every rank: order, noise, augmentation
    shipped_student = common.WEIGHTS / f"{args.dataset}-{args.model}-student.pt"  # kept there once it was distilled
    student = None
    if args.est == "surrogate" and not use_policy:
        # The one that is given; or that the run which is resumed distilled; or that belongs to the classifier. Else it is yet to be distilled.
        own = [str(checkpoint.with_name("student.pt"))] if args.resume and common.has_checkpoint(args.run_dir) else []
        if not args.weights and not args.blackbox:
            own.append(f"gretta-{args.model}-student" if args.dataset == "cifar100" else str(shipped_student))
        own = [file for file in own if file in common.PUBLISHED_WEIGHTS or Path(file).is_file()]
        if args.student or own:
            student = load_student(args.student or own[0], args.dataset, sets.num_classes, machine, args.dry_run)
    queries_distillation = 0

    # What a run cannot change when it is continued: the meaning of its history, its place in the schedule, its images.
    names = ("dataset", "model", "est", "seed", "policy", "sigmoid", "transform", "train_on", "proportion", "target_split", "uncertain", "reg")
    names += ("opt", "epochs", "batch_size", "num_samples", "credit")
    fixed = {key: getattr(args, key) for key in names}

    # What the run's directory holds already.
    directory = Path(args.run_dir) if use_policy and args.run_dir else None
    if use_policy:
        common.load_content(policy, saved, args.weights_policy or checkpoint)
        saved = saved if "history" in saved else None  # a bare state dict says nothing of its run
    elif args.resume and common.has_checkpoint(args.run_dir):
        saved = common.read_checkpoint(args.run_dir, "remove the directory to start afresh")
        common.load_content(policy, saved, checkpoint)
        if "optimizer" not in saved:
            raise InputError(f"{checkpoint} holds a policy but no run to continue: evaluate it with --evaluate")
    if saved is not None:
        file = Path(args.weights_policy or checkpoint)
        numbers = dict.fromkeys(("step", "epoch", "queries", "queries_distillation"), int)
        common.check_run(saved, file, **numbers, history=list, finished=bool, fixed=dict)
        # A trained policy is used as it was trained; a run goes on as it was begun.
        compared = [name for name in ("transform", "policy", "sigmoid") if name in saved["fixed"]] if use_policy else fixed
        common.check_unchanged(saved, {name: fixed[name] for name in compared}, file)
    if saved is not None and not use_policy and saved["finished"]:
        if args.export:
            raise InputError(f"{args.run_dir} holds a finished run: write --export {args.export} with --evaluate instead of --resume")
        results = common.read_results(Path(args.run_dir))
        if machine.is_main:
            print(f"{args.run_dir} holds a finished run:")
            with common.reading_run(checkpoint.with_name("results.json"), "evaluate the run again with --evaluate"):
                print_results(results, Path(args.run_dir))
        return
    if not in_place:
        directory = common.run_directory(SCRIPT, vars(args), args.est, machine)
    arguments = vars(args) | {"run_dir": str(directory)}
    if only_predict:
        if machine.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            if not in_place:
                common.write_json(directory / "args.json", arguments | common.environment(machine))
            predict_folder(files, pictures, directory, classifier, policy, args.transform, args.steps, args.dataset, machine)
            print(f"{len(files)} pictures: predictions.csv, predictions.png and predictions/ in {directory}")
        return
    run = common.Run(directory, machine, None if in_place else arguments, saved["step"] if saved and not args.weights_policy else None, started)
    if machine.is_main:
        print(" ".join(f"{key}={value}" for key, value in arguments.items()))
        print(
            f"{n_train} images train the policy, {len(sets.test)} set{'s' * (len(sets.test) > 1)} evaluate it; {num_levels} levels, "
            f"{args.batch_size * (1 if args.est == 'whitebox' else args.num_samples * 2)} queries per step"
        )
        print(f"classifier: {weights or 'untrained'}")
        if args.blackbox:
            print("bn_adapt is left out: a black box shows no batch norm to adapt")
        if args.resume and saved is None:
            print(f"{directory} holds no checkpoint: starting afresh")

    # Without a student at hand, distil one from the classifier's outputs.
    if args.est == "surrogate" and student is None and not use_policy:
        images = common.gather_images(distilled_from(args.dataset, args.data_root, sets), 10_000, workers, machine)[0]
        epochs = 1 if args.dry_run else math.ceil(1000 / max(1, len(images) // 100))  # a thousand steps
        student = distil_student(black_box, images, args.dataset, sets.num_classes, machine, epochs, min(100, len(images)), seed=0)
        queries_distillation = black_box.queries
        machine.on_main(lambda: common.save_atomically(student.state_dict(), directory / "student.pt"))

    # Training.
    train_policy = common.distribute(policy, machine)
    if args.compile:
        train_policy = torch.compile(train_policy)
        if not args.blackbox:
            black_box.classifier = torch.compile(black_box.classifier)
    step = queries = epoch = 0
    history: list[dict] = []
    place = common.EPOCH_START
    totals = torch.zeros(4, dtype=torch.float64, device=machine.device)  # sums over the epoch; float32 can't count 2²⁴ queries
    if saved is not None:
        step, queries, epoch, history = saved["step"], saved["queries"], saved["epoch"], saved["history"]
        queries_distillation = saved["queries_distillation"]
    if saved is not None and not use_policy:
        with common.continues(directory / "checkpoint.pt"):
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
            place, totals = common.restore_place(saved, generator), common.restore_totals(saved["totals"], machine)
            common.restore_random_states(saved["random_states"], machine)
    epoch_start = saved["epoch_start"] if place.batches else generator.get_state()

    def checkpoint_state(batches: int = 0, finished: bool = False) -> dict:
        """After so many batches of the epoch; on every rank alike but for the random states, which are gathered."""
        state = {"state_dict": policy.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "fixed": fixed}
        state |= {"generator": generator.get_state(), "epoch_start": epoch_start, "batches": batches}
        state |= {"totals": machine.all_rows(totals.clone()[None]), "random_states": common.random_states(machine), "finished": finished}
        state |= {"num_classes": sets.num_classes, "size": sets.size}  # for --predict
        return state | {"step": step, "epoch": epoch, "queries": queries, "queries_distillation": queries_distillation, "history": history}

    def ask_policy(images: torch.Tensor) -> torch.Tensor:  # mixed precision is for the networks, not for the transforms
        with machine.autocast():
            return train_policy(images)

    evaluate = partial(evaluate_predictors, classifier, policy, transform=args.transform, machine=machine, workers=workers, dataset=args.dataset)
    val_none = 0.0 if use_policy else evaluate(sets.val, steps=1, names=("none",))["none"]["accuracy"]
    total_steps = args.epochs * steps_per_epoch
    progress = tqdm(total=total_steps, initial=step, desc="train the policy", unit="step", disable=not machine.is_main or use_policy)
    resumed_at, clock = queries, time.perf_counter()
    pace = common.Pace(args.checkpoint_minutes, args.log_every, machine)
    while epoch < args.epochs and not use_policy:
        policy.train()
        pace.begin()
        done = place.batches  # in this epoch; totals: sums over it of loss, correct answers and rows of the queries, and of the objective
        # This rank's rows: (b, 3, H, W), (b,).
        for images, labels in common.plain_batches(sets.train, args.batch_size, generator, machine, workers, place):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * step / total_steps))
            images = common.to_float(images)
            # Randomness is drawn for the global batch on every rank alike; each rank takes its rows, so ranks change nothing.
            if args.train_on == "augmented":
                images = strong_augmentation(images, machine.own_rows(strong_draws(args.batch_size, generator)), has_colour(args.dataset))
            noise = torch.randn(args.batch_size, args.num_samples, num_levels + 1, generator=generator, device=machine.device)
            noise = machine.own_rows(noise).transpose(0, 1)  # (P, b, K + 1)
            levels = ask_policy(images)  # (b, K)
            loss = level_loss(black_box, images, labels, args.transform, query_batch, totals)
            if args.credit == "batch":
                loss = shared_loss(loss, len(images), args.batch_size, machine)
            detached = levels.detach()
            if args.est == "whitebox":
                gradient = args.beta * true_gradient(loss, detached, query_batch)
            elif args.est == "surrogate":
                ask_student = level_loss(lambda batch: student(machine.layout(batch)), images, labels, args.transform, query_batch)
                student_gradient = true_gradient(ask_student, detached, query_batch)
                gradient = guided_gradient(loss, detached, student_gradient, args.num_samples, args.sigma, args.alpha, args.beta, noise)
            else:
                gradient = vanilla_gradient(loss, detached, args.num_samples, args.sigma, args.beta, noise[..., :num_levels])
            # ⟨g, v⟩ has the gradient g with respect to v; DDP averages over ranks, hence the world size.
            objective = (gradient * levels).sum() * machine.world_size / args.batch_size
            if sets.reg is not None:
                rows = torch.randint(len(sets.reg), (args.batch_size,), generator=generator, device=machine.device)
                applied = 0.25 + 0.5 * torch.rand(args.batch_size, num_levels, generator=generator, device=machine.device)
                unlabelled = common.to_float(machine.own_rows(sets.reg[rows]))
                consistency = consistency_loss(ask_policy, unlabelled, machine.own_rows(applied), args.transform)
                objective = objective + args.reg_weight * consistency.sum() * machine.world_size / args.batch_size
            totals[3] += objective.detach()
            optimizer.zero_grad()
            scaler.scale(objective).backward()
            scaler.step(optimizer)
            scaler.update()
            step, done = step + 1, done + 1
            if step % args.log_every == 0:
                loss_now, correct, rows_now, _ = common.finite_totals(machine.all_sum(totals.clone()), step, args.lr, directory)
                shown = {"loss": loss_now / rows_now, "accuracy": 100 * correct / rows_now}
                run.log(step, **shown, lr=group["lr"], queries=queries + int(rows_now))
                speed = (queries + rows_now - resumed_at) / (time.perf_counter() - clock)
                progress.set_postfix_str(f"loss {shown['loss']:.3f}, accuracy {shown['accuracy']:.1f} %, {speed:.0f} queries/s", refresh=False)
                progress.update(step - progress.n)
            if done < steps_per_epoch and pace.due(step):
                common.save_run(checkpoint_state(done), directory, machine)
                pace.saved()
        epoch += 1
        loss_sum, correct, rows, _ = common.finite_totals(machine.all_sum(totals), step, args.lr, directory)
        queries += int(rows)
        place, totals, epoch_start = common.EPOCH_START, torch.zeros_like(totals), generator.get_state()
        progress.update(step - progress.n)
        regular = epoch % args.checkpoint_every == 0 or epoch == args.epochs
        if regular:
            val_accuracy = evaluate(sets.val, steps=1, names=("gretta",))["gretta"]["accuracy"]
            history.append(
                {"epoch": epoch, "queries": queries, "loss": loss_sum / rows, "accuracy": 100 * correct / rows, "val_accuracy": val_accuracy}
            )
            run.log(step, **history[-1])
        if pace.due(step, now=True) or regular:
            common.save_run(checkpoint_state(), directory, machine)
            pace.saved()
        pace.end()
    progress.close()

    # The test set is read once, here.
    if machine.is_main:
        print(f"evaluating on {len(sets.test)} test set{'s' * (len(sets.test) > 1)} …", flush=True)
    per_set, sizes = {}, {}
    predictors = tuple(name for name in PREDICTORS if name != "bn_adapt" or not args.blackbox)
    predictors += ("gretta_bn_adapt",) if args.on_bn_adapt else ()
    for name, read in tqdm(sets.test.items(), desc="evaluate", unit="set", disable=not machine.is_main or len(sets.test) == 1):
        data = read()
        per_set[name], sizes[name] = evaluate(data, steps=args.steps, names=predictors), common.count_images(data)

    def mean_over(names: list[str], predictor: str) -> float:  # the sets are equally large
        return sum(per_set[name][predictor]["accuracy"] for name in names) / len(names)

    def errors_under(name: str) -> dict[str, float]:
        severities = [f"{name}-{severity}" for severity in sets.corruptions.severities]
        return {predictor: 100 - mean_over(severities, predictor) for predictor in ("none", "gretta")}

    further = {}
    counted = list(per_set)
    if sets.corruptions is not None:
        counted = [f"{name}-{severity}" for name in sets.corruptions.names for severity in sets.corruptions.severities]
        errors = {name: errors_under(name) for name in sets.corruptions.names}
        mean = {predictor: sum(error[predictor] for error in errors.values()) / len(errors) for predictor in ("none", "gretta")}
        further["corruptions"] = errors | {"mean": mean}
        further |= {"extra_corruptions": {name: errors_under(name) for name in sets.corruptions.extra}} if sets.corruptions.extra else {}
    first = per_set[counted[0]]
    accuracy = {predictor: mean_over(counted, predictor) for predictor in first}
    if args.dataset == "chexpert":
        further["metric"] = "mean AUROC"
        further["auroc"] = {finding: {predictor: values[finding] for predictor, values in first.items()} for finding in list(first["none"])[1:]}
    results = {
        "script": SCRIPT,
        "dataset": args.dataset,
        "model": args.model,
        "method": args.est,
        "seed": args.seed,
        "n_train": n_train,
        "n_eval": sum(sizes[name] for name in counted),
        "protocol": protocol_line(sets, args.dataset, args.model, args.transform, args.steps, bool(args.blackbox)),
        "train_on": args.train_on,
        "proportion": args.proportion if args.train_on == "target" else None,
        "transform": args.transform,
        "policy": args.policy,
        "queries": queries,
        "queries_distillation": queries_distillation,
        "accuracy": accuracy,
        **further,
    }
    if machine.is_main:
        test = next(iter(sets.test.values()))()
        shown, shown_labels = common.gather_images(common.keep_some(test, 8), 8, 0, machine)
        shown_labels = shown_labels if shown_labels.dim() == 1 else None
        draw_examples(directory / "examples.png", classifier, policy, shown, shown_labels, args.transform, max(args.steps, 2), args.dataset, machine)
        if not use_policy:
            draw_curves(directory / "curves.png", history, val_none, f"GrETTA ({args.est}) on {args.dataset}, {args.model}, seed {args.seed}")
        if args.predict:
            predict_folder(files, pictures, directory, classifier, policy, args.transform, args.steps, args.dataset, machine)
    run.log(step, **{f"test_{name}": value for name, value in accuracy.items()})
    if in_place:  # what is not on disk any more to be trained on, once was
        results |= common.kept_results(directory, "n_train")
    results = run.finish(results)
    if not use_policy:
        common.save_run(checkpoint_state(finished=True), directory, machine)
    if machine.is_main and not use_policy:
        if queries_distillation and args.dataset in ("digits", "mnist") and not (args.weights or args.blackbox or args.dry_run):
            common.save_atomically(student.state_dict(), shipped_student)  # for later runs
    if machine.is_main:
        print_results(results, directory)
    if machine.is_main and args.export:
        shown = common.gather_images(common.keep_some(next(iter(sets.test.values()))(), 16), 16, 0, machine)[0]
        difference = export_program(args.export, policy, classifier, args.transform, args.steps, shown)
        print(
            f"{args.export}: policy, transforms and classifier; its logits of {len(shown)} images differ from the run's by at most {difference:.1e}"
        )


def distilled_from(dataset: str, data_root: str, sets: TargetSets) -> Data:
    """What a student is distilled on: the training images, clean where there are such (labels are not used)."""
    return common.load_split(dataset, "train", data_root, download=False) if dataset in ("digits", "mnist") else sets.train


def protocol_line(sets: TargetSets, dataset: str, model: str, transform: str, steps: int, blackbox: bool) -> str:
    """One line that says how the figures were measured."""
    metric = "mean AUROC (%) over five findings" if dataset == "chexpert" else "top-1 accuracy"
    metric += " and error, mean over severities" if sets.corruptions else ""
    applied = f"{transform}, {steps} step{'s' * (steps > 1)}"
    inputs = "inputs in [0, 1] to a black box" if blackbox else f"inputs normalised by {common.normalisation(dataset, model)}"
    return f"{sets.source}; {applied}; {metric}, {inputs}"


NAMES = {"none": "no augmentation", "five_crop": "five-crop", "ten_crop": "ten-crop", "gretta": "GrETTA", "gretta_bn_adapt": "GrETTA on bn_adapt"}


def print_results(results: dict, directory: Path) -> None:
    """The closing table."""
    print(f"\n{'':24s}{results.get('metric', 'accuracy')} (%)")
    for name, value in results["accuracy"].items():
        label = NAMES.get(name, name.replace("gretta_", "GrETTA, step "))
        print(f"{label + (' (' + results['method'] + ')' if name == 'gretta' else ''):24s}{value:12.2f}")
    if "corruptions" in results:
        print(f"\n{'top-1 error (%)':24s}{'none':>12s}{'GrETTA':>12s}")
        for name, errors in (results["corruptions"] | results.get("extra_corruptions", {})).items():
            print(f"{name:24s}{errors['none']:12.2f}{errors['gretta']:12.2f}")
    print(f"\n{results['protocol']}")
    print(
        f"n_eval {results['n_eval']}, {results['queries']:,} queries to train, {results['wall_seconds']} s, {results['peak_memory_mb']:.0f} MB; results in {directory}"
    )


if __name__ == "__main__":
    common.run_script(main)
