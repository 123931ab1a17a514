"""GrETTA: Gradient-Estimation Test-Time data Augmentation (Wang, Yang & Lin).

A policy network looks at one test image and returns K levels in [0, 1]; each drives one differentiable
transform; the image then goes to a frozen classifier, whose loss the policy learns to lower. It is a black
box: its gradient is estimated from differences of losses under perturbed levels.

    python gretta.py --model resnext --est vanilla           # ES on modified digits: nothing to download
    python gretta.py --model wideresnet --est surrogate      # Guided ES: a distilled student points the way
    python gretta.py --model resnext --est whitebox          # the true gradient, for comparison
    python gretta.py --model resnext --train-on augmented    # augmented training images, tested on digits-C
    python gretta.py --evaluate --run-dir RUN_DIR            # evaluate a trained policy again
    python gretta.py --predict FOLDER --run-dir RUN_DIR      # your own pictures
    torchrun --nproc_per_node 2 gretta.py --model resnext --est vanilla

Reaches, when 20 % of the target domain train the policy (modified digits, 2,980 images, accuracy in %, seeds
0-2, two CPU cores): resnext 63.4 → 95.7 ± 0.2 (vanilla), 95.4 ± 0.3 (surrogate), 93.2 ± 0.5 (whitebox).

Differs from the paper's code: a loss difference per image and perturbation, not one per batch; orthogonal
perturbations; the policy in eval mode when tested; contrast about the mean; one warp for all geometry.
"""

import argparse
import copy
import csv
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import Data, InputError, Machine, number

# By data set. "updates": the steps that --epochs defaults to. CIFAR's are published, others were tuned on
# modified validation images; the true gradient costs 24 times fewer queries, and is rougher.
TARGET = {"opt": "adam", "lr": 5e-4, "batch_size": 24, "updates": 120, "train_on": "target"}
TARGET |= {"model": "resnext", "workers": 0}
PUBLISHED = TARGET | {"lr": 1e-6, "batch_size": 256, "epochs": 2, "train_on": "augmented"}
PICTURES = {"model": "resnet50", "workers": 16}
SETTINGS = {
    "digits": TARGET,
    "mnist": TARGET,
    "fashion_mnist": TARGET | {"updates": 400},
    "cifar10": PUBLISHED,
    "cifar100": PUBLISHED,
    "imagenet": PUBLISHED | PICTURES,
    "chexpert": PUBLISHED | PICTURES | {"train_on": "target", "model": "densenet121"},
    "folder": TARGET | PICTURES | {"lr": 1e-4},
    "fake": PUBLISHED | {"batch_size": 64},
}
WHITEBOX = {"digits": {"lr": 2e-4, "updates": 300}, "fashion_mnist": {"lr": 5e-5}}
TARGETS = (*common.SMALL, "chexpert", "folder")  # have a labelled target domain
OPTIMIZERS = {  # fused: one pass over all weights, four to eight times as fast on a CPU
    "adam": partial(torch.optim.Adam, fused=True),
    "sgd": partial(torch.optim.SGD, fused=True),
    "rmsprop": torch.optim.RMSprop,
}
# name: (value at level 0, value at level 1), in the order of their application; level 0.5 is the identity
TRANSFORMS = {
    "translate_x": (-20.0, 20.0),  # px, positive to the right
    "translate_y": (-20.0, 20.0),  # px, positive downwards
    "zoom_x": (0.7, 1.3),  # factor, > 1 enlarges
    "zoom_y": (0.7, 1.3),
    "gamma": (0.0, 2.0),
    "contrast": (0.5, 1.5),
    "hue": (-1.0, 1.0),  # radians
}
NAMES = tuple(TRANSFORMS)
TRANSFORM_SETS = {"geometry": NAMES[:4], "color": NAMES[4:], "full": NAMES}
BACKBONES = ("resnet18", "resnet34", *(f"efficientnet-b{number}" for number in range(4)))
ESTIMATORS = ("vanilla", "surrogate", "whitebox")
REG_WEIGHT = 0.1  # of the consistency regulariser
REG_IMAGES, CURVE_IMAGES = 3000, 250  # that it, and the curves, are computed on, at most
# Of CheXpert, those that are scored
FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(SETTINGS, description=__doc__)
    # fmt: off
    add = parser.run.add_argument
    add("--predict", metavar="FOLDER",
        help="only classify its pictures, with and without the policy: predictions.csv")
    add("--export", metavar="FILE.pt2", help="write policy, transforms, classifier as a torch.export program")
    add = parser.data.add_argument
    add("--train-on", choices=("target", "augmented"), help="the target domain, or augmented training images")
    add("--proportion", type=number(float, 0, 1, True, True), default=0.2, help="share of it to train on")
    add("--uncertain", choices=("ones", "zeros", "ignore"), default="ones", help="what CheXpert's count as")
    add = parser.add_argument_group("model").add_argument
    add("--model", help="the frozen classifier: resnext, …, a name of torchvision's, or FILE.py:function")
    add("--weights", metavar="FILE", help="its checkpoint, or a name of weights/README.md")
    add("--blackbox", metavar="FILE",
        help="a program in its place: FILE.py:function, ONNX, torch.export (.pt2), TorchScript; it is run")
    add("--weights-policy", metavar="FILE", help="a run's checkpoint.pt to start from, or to --evaluate")
    add("--student", metavar="FILE", help="of --est surrogate (default: shipped, else distilled)")
    add("--policy", choices=BACKBONES, default="resnet18", help="backbone of the policy")
    add("--init", choices=("zero", "stochastic"), default="zero",
        help="the policy's head: zero starts as the identity")
    add("--sigmoid", action=argparse.BooleanOptionalAction, default=False, help="squash levels, not clip them")
    add = parser.add_argument_group("method").add_argument
    add("--est", choices=ESTIMATORS, default="vanilla", help="antithetic ES, Guided ES, or the true gradient")
    add("--transform", choices=tuple(TRANSFORM_SETS), default="geometry",
        help="geometry: 4 levels, color: 3, full: 7")
    add("--num-samples", type=number(int, 1), default=12, metavar="P", help="antithetic pairs per image")
    add("--perturbations", choices=("gaussian", "orthogonal"), default="orthogonal",
        help="of the levels; orthogonal to each other within an image")
    add("--sigma", type=number(float, 0, open_low=True), default=0.1, help="scale of the perturbations")
    add("--alpha", type=number(float, 0, 1), default=0.5, help="surrogate: share of isotropic noise")
    add("--beta", type=number(float, 0, open_low=True), default=1.0, help="scale of the estimated gradient")
    add("--reg", choices=("none", "test", *common.CORRUPTIONS), default="none", metavar="none|test|CORRUPTION",
        help="target images, or a corruption, to be consistent on")
    add("--max-queries", type=number(int, 1), metavar="N", help="end the training when so many images are asked")
    add("--steps", type=number(int, 1, 16), default=1, help="times the policy is applied at test time")
    add = parser.add_argument_group("optimiser", "defaults by data set").add_argument
    add("--opt", choices=tuple(OPTIMIZERS), help="optimiser of the policy")
    add("--lr", type=number(float, 0, open_low=True), help="cosine to zero")
    add("--epochs", type=number(int, 1), help="passes over the training part")
    add("--batch-size", type=number(int, 1), help="images per step over all ranks")
    # fmt: on
    args = parser.parse(argv, lambda given: settings(given.dataset, given.est), from_source)
    for message in mistakes(args):
        parser.error(message)
    args.model = Path(args.blackbox).stem if args.blackbox else args.model  # names the run
    return args


def settings(dataset: str, est: str) -> dict:
    return SETTINGS[dataset] | (WHITEBOX.get(dataset, {}) if est == "whitebox" else {})


def mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Flags that do not go together."""
    target, using, program = args.train_on == "target", args.evaluate or args.predict, args.blackbox
    if args.dataset not in TARGETS if target else args.dataset == "chexpert":
        yield f"--train-on {args.train_on}: {args.dataset} has no such set; choose the other"
    if target and (args.corruptions_path or args.generate_corruptions):
        yield "--corruptions-path and --generate-corruptions belong to --train-on augmented"
    if args.dataset in ("folder", "chexpert") and not (args.weights or program):
        yield f"--dataset {args.dataset} needs a classifier: give --weights or --blackbox"
    if program and (args.weights or args.export or args.est == "whitebox"):
        yield f"--blackbox {program} has its own weights and no gradients: no --weights, whitebox, --export"
    if using and not args.weights_policy and not common.has_checkpoint(args.run_dir):
        file = Path(args.run_dir or "RUN") / "checkpoint.pt"
        yield f"{file} does not exist: name a trained run with --run-dir, or a policy with --weights-policy"
    file = Path(args.export or "new.pt2")
    if file.suffix != ".pt2" or file.exists() or not os.access(file.parent, os.W_OK):
        yield f"--export {file}: name a new file that ends in .pt2, in a directory that can be written to"


def from_source(values: dict, given: argparse.Namespace) -> dict:
    """A configuration of the published code (CIFAR-100) as flags; others stay as they are."""
    if "cifarc" not in values:
        return values
    old = {"augmix", "checkpoints", "paths", "student_paths", "cifar", "cifarc"}
    model, student = values.get("model", "resnext"), values.get("est") == "surrogate"
    found = {"dataset": "cifar100", "data_root": values.get("cifar"), "corruptions_path": values["cifarc"]}
    found["weights"] = values.get("paths", {}).get(given.model or model) if not given.blackbox else None
    found["student"] = values.get("student_paths", {}).get(given.model or model) if student else None
    return {name: value for name, value in values.items() if name not in old} | found


# ---------- Transforms and policy: images → levels (B, K) in [0, 1] → transformed images ----------


def transform_images(images: Tensor, levels: Tensor, transform: str) -> Tensor:
    """Apply each image's own levels, in the order of TRANSFORMS; differentiable in both, 0.5 is the identity.

    images (B, 3, H, W) in [0, 1]; levels (B, K), clipped to it; transform: "geometry" (K = 4), "color" (3) or
    "full" (7). Returns (B, 3, H, W) in [0, 1]. Translation, then zoom about the centre: one bilinear warp,
    black outside; gamma is x^γ; contrast spreads about the mean luma; hue turns the colour circle.
    """
    names = TRANSFORM_SETS.get(transform)
    if names is None:
        raise InputError(f"unknown transform '{transform}': choose from {', '.join(TRANSFORM_SETS)}")
    if levels.shape != (images.shape[0], len(names)):  # len(images) would be a constant to torch.export
        needed = f"'{transform}' needs ({len(images)}, {len(names)}) here"
        raise InputError(f"levels are {tuple(levels.shape)}: {needed}")
    low, high = common.constant(tuple(TRANSFORMS[name] for name in names), levels).T
    values = dict(zip(names, (low + (high - low) * levels.clamp(0, 1)).unbind(1)))  # name: (B,)
    if transform != "color":
        zoom = torch.stack([values["zoom_x"], values["zoom_y"]], dim=1)
        translation = torch.stack([values["translate_x"], values["translate_y"]], dim=1)
        images = common.affine_warp(images, common.affine_matrix(zoom, zoom * translation))
    if transform != "geometry":
        images = images.clamp(1e-6, 1) ** values["gamma"][:, None, None, None]  # finite slope at black
        images = rotate_hue(common.adjust_contrast(images, values["contrast"]), values["hue"])
    return images


def rotate_hue(images: Tensor, radians: Tensor) -> Tensor:
    """Turn the hue of images (B, 3, H, W) in [0, 1] by an angle (B,) each, in HSV."""
    from kornia.enhance import adjust_hue  # takes a second to import

    return adjust_hue(images, radians).clamp(0, 1)


def strong_augmentation(images: Tensor, draws: Tensor, dataset: str) -> Tensor:
    """The published training run's: rotation ±30°, translation ±half the side, zoom 0.7..1.3, pad-crop 4,
    brightness, contrast and saturation 0.5..1.5; flip and hue ±half a turn where they leave the class alone.
    images (B, 3, H, W) in [0, 1]; draws (B, 11), uniform in −1..1, say how much of each."""
    flip = dataset not in ("digits", "mnist", "chexpert")
    zoom = (1 + 0.3 * draws[:, :1]).repeat(1, 2)
    if flip:
        zoom = zoom * torch.stack([draws[:, 1].sign(), torch.ones_like(zoom[:, 0])], dim=1)
    side = common.constant((images.shape[-1], images.shape[-2]), images)
    translation = (draws[:, 2:4] * 0.5 * side).round() + (draws[:, 4:6] * 4.5).round()
    images = common.affine_warp(images, common.affine_matrix(zoom, translation, 30 * draws[:, 6]))
    brightness, contrast, saturation = (1 + 0.5 * draws[:, column, None, None, None] for column in (7, 8, 9))
    images = common.adjust_contrast((images * brightness).clamp(0, 1), contrast.flatten())
    grey = (images * common.constant(common.LUMA, images).view(1, 3, 1, 1)).sum(1, keepdim=True)
    images = (grey + saturation * (images - grey)).clamp(0, 1)
    return rotate_hue(images, math.pi * draws[:, 10]) if flip else images


class Policy(nn.Module):
    """v = π(x): images (B, 3, H, W) in [0, 1] to levels (B, K), at first about 0.5 (`init` zero: just so)."""

    def __init__(self, backbone: str, num_levels: int, sigmoid: bool, init: str):
        super().__init__()
        self.sigmoid = sigmoid
        if backbone.startswith("efficientnet"):
            from efficientnet_pytorch import EfficientNet

            self.backbone = EfficientNet.from_name(backbone, num_classes=num_levels)
        else:
            self.backbone = common.torchvision_model(backbone, num_levels, (0.5,) * 3, (0.5,) * 3)
        *_, head = (module for module in self.backbone.modules() if isinstance(module, nn.Linear))
        if init == "zero":
            nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, 0.0 if sigmoid else 0.5)

    def forward(self, images: Tensor) -> Tensor:
        levels = self.backbone(images).float()
        return levels.sigmoid() if self.sigmoid else levels


class AugmentedClassifier(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to logits (B, classes), after `steps` applications of the policy."""

    def __init__(self, policy: Callable, classifier: Callable, transform: str, steps: int):
        super().__init__()
        self.policy, self.classifier, self.transform, self.steps = policy, classifier, transform, steps

    def trace(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The images after 0, 1, …, `steps` applications, and the levels of each application."""
        seen, levels = [images], []
        for _ in range(self.steps):
            levels.append(self.policy(seen[-1]))
            seen.append(transform_images(seen[-1], levels[-1], self.transform))
        return seen, levels

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.trace(images)[0][-1]).float()


# ---------- Estimators: the gradient of each image's loss by its levels, from losses alone ----------


def vanilla_gradient(
    loss: Callable, levels: Tensor, num_samples: int, sigma: float, beta: float, noise: Tensor | None = None
) -> Tensor:
    """Antithetic ES: g = mean over P samples of β/(2σ²)·(L(v+ε) − L(v−ε))·ε, ε ~ N(0, σ²/n·I), n = K.

    loss maps levels (P·B, K) to each row's loss (P·B,); row p·B + b is of image b. levels (B, K) → gradient
    (B, K), in expectation β/K times the true one (to second order in σ). noise: (P, B, K) standard normal.
    """
    noise = torch.randn(num_samples, *levels.shape, device=levels.device) if noise is None else noise
    return antithetic_gradient(loss, levels, sigma / math.sqrt(levels.shape[1]) * noise, sigma, beta)


def guided_gradient(
    loss: Callable,
    levels: Tensor,
    student_gradient: Tensor,
    num_samples: int,
    sigma: float,
    alpha: float,
    beta: float,
    noise: Tensor | None = None,
) -> Tensor:
    """Guided ES (Maheswaranathan et al. 2019, eq. 3): the same with ε = σ·√(α/n)·z + σ·√((1−α)/k)·w·q, k = 1.

    q is student_gradient (B, K), normalised per image, so ε has covariance σ²·(α/n·I + (1−α)·q·qᵀ). noise: z
    and w, (P, B, K + 1) standard normal. Where q is zero, only z remains.
    """
    num_levels = levels.shape[1]
    if noise is None:
        noise = torch.randn(num_samples, len(levels), num_levels + 1, device=levels.device)
    z, w = noise[..., :num_levels], noise[..., num_levels:]
    q = F.normalize(student_gradient, dim=1, eps=1e-30)
    epsilon = sigma * (math.sqrt(alpha / num_levels) * z + math.sqrt(1 - alpha) * w * q)
    return antithetic_gradient(loss, levels, epsilon, sigma, beta)


def orthogonal_blocks(noise: Tensor) -> Tensor:
    """Of standard normal (P, B, K + 1): an image's z, the first K columns, orthogonal to each other in blocks of
    K, of norm √K, which lowers the variance of ES (Choromanski et al. 2018, structured evolution)."""
    z, num_levels = noise[..., :-1], noise.shape[2] - 1
    blocks = (torch.linalg.qr(block.permute(1, 2, 0)).Q.permute(2, 0, 1) for block in z.split(num_levels))
    return torch.cat([math.sqrt(num_levels) * torch.cat([*blocks]), noise[..., -1:]], dim=2)


PERTURBATIONS = {"gaussian": lambda noise: noise, "orthogonal": orthogonal_blocks}


def antithetic_gradient(loss: Callable, levels: Tensor, epsilon: Tensor, sigma: float, beta: float) -> Tensor:
    """mean over P of β/(2σ²)·(L(v+ε) − L(v−ε))·ε for perturbations epsilon (P, B, K) of levels (B, K)."""
    plus = loss((levels + epsilon).flatten(0, 1)).view(epsilon.shape[:2])  # (P, B)
    minus = loss((levels - epsilon).flatten(0, 1)).view(epsilon.shape[:2])
    return (beta / (2 * sigma**2) * (plus - minus)[:, :, None] * epsilon).mean(0)


def true_gradient(loss: Callable, levels: Tensor) -> Tensor:
    """The gradient (B, K) of each row's loss, by backpropagation."""
    with torch.enable_grad():
        levels = levels.detach().requires_grad_()
        return torch.autograd.grad(loss(levels).sum(), levels)[0]


def consistency_loss(policy: Callable, images: Tensor, levels: Tensor, transform: str) -> Tensor:
    """Sum over images (B, 3, H, W) of the mean squared deviation of π(T(x, u)) from π(x) − (u − 0.5): a copy
    moved by u, the levels (B, K), asks for that much less."""
    with torch.no_grad():
        moved = transform_images(images, levels, transform)
    return (policy(moved) - (policy(images) - (levels - 0.5))).square().mean(1).sum()


def level_loss(
    query: Callable, images: Tensor, labels: Tensor, transform: str, chunk: int, sums: Tensor | None = None
) -> Callable:
    """The function from levels (P·B, K) to losses (P·B,) of the transformed images, queried in chunks.
    sums (3 or more,) counts losses, correct answers and rows."""

    def loss(levels: Tensor) -> Tensor:
        rows, losses = torch.arange(len(levels), device=levels.device) % len(images), []
        for index, part in zip(rows.split(chunk), levels.split(chunk)):
            logits = query(transform_images(images[index], part, transform))
            found, correct = losses_and_answers(logits, labels[index])
            losses.append(found)
            if sums is not None:
                sums[:3] += torch.stack([found.detach().sum(), correct.sum(), torch.ones_like(index).sum()])
        return torch.cat(losses)

    return loss


def losses_and_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's loss (B,), and whether it is right (B,): cross entropy with classes (B,) int64; or, with
    findings (B, L) in {0, 1}, means of the binary ones, and of right answers, over those that are not NaN."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels
    known, truth = labels.isfinite(), labels.nan_to_num()
    losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    both = (losses, (logits > 0) == (truth > 0.5))
    return tuple((values * known).sum(1) / known.sum(1).clamp_min(1) for values in both)


# ---------- The classifier as a black box, and its student ----------


class BlackBox:
    """A frozen classifier, images in [0, 1] to logits; no gradient flows through it unless `whitebox`."""

    def __init__(self, classifier: nn.Module, machine: Machine, whitebox: bool, size: int):
        self.classifier = classifier.eval().requires_grad_(False)
        self.machine, self.whitebox = machine, whitebox
        self.chunk = machine.chunk(size, size)  # images at a time; on a CPU layers' outputs stay within 16 MB
        if machine.device.type == "cpu" and not isinstance(classifier, common.Program):
            self.chunk = max(1, min(self.chunk, 2**22 // largest_output(classifier, size)))

    def __call__(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.whitebox and torch.is_grad_enabled()), self.machine.autocast():
            return self.classifier(self.machine.layout(images)).float()


@torch.no_grad()
def largest_output(model: nn.Module, size: int) -> int:
    """Numbers in the largest output of a layer for one image."""
    sizes = []
    measure = lambda _module, _inputs, output: sizes.append(getattr(output, "numel", lambda: 1)())
    handle = nn.modules.module.register_module_forward_hook(measure)
    model(torch.zeros(1, 3, size, size))
    handle.remove()
    return max(sizes)


def load_model(
    name: str,
    weights: str | None,
    program: str | None,
    dataset: str,
    sets: "DataSets",
    machine: Machine,
    *where,
) -> tuple[nn.Module, str]:
    """A frozen model, or program, and where it is from. where: data_root, dry_run."""
    if program:
        model = common.Program(program, len(sets.classes), sets.size, machine.device)
        return model, model.origin
    model = common.build_model(name, len(sets.classes), dataset)
    origin = common.load_classifier(model, name, dataset, weights, machine, *where)
    return model.to(machine.device, memory_format=machine.weight_layout).eval().requires_grad_(False), origin


def find_student(given: str | None, run_dir: str | None, origin: str) -> str | None:
    """The student that is given, else of the run that goes on, else beside the classifier's file, or published
    like it; None: one has to be distilled."""
    name, file = f"{Path(origin).stem}-student", Path(origin)
    files = [given, Path(run_dir or "runs", "student.pt"), file.with_name(f"{name}.pt"), name]
    known = lambda file: file == given or file in common.PUBLISHED_WEIGHTS or Path(file).is_file()
    return next((str(file) for file in files if file and known(file)), None)


DISTIL_BATCH = 100


def distil_student(
    black_box: BlackBox, images: Tensor, dataset: str, num_classes: int, steps: int
) -> nn.Module:
    """A student that imitates the classifier's logits on strongly augmented uint8 images (N, 3, H, W): mean
    squared error, Adam, one cycle up to 3e-3; alike on every rank."""
    alone, batch_size = black_box.machine._replace(rank=0, world_size=1), min(DISTIL_BATCH, len(images))
    torch.manual_seed(0)
    student = common.build_model("student", num_classes, dataset)
    student.to(alone.device, memory_format=alone.weight_layout)
    optimizer, scaler = torch.optim.Adam(student.parameters(), fused=True), Machine(alone.device).scaler()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="distil", unit="step", disable=not black_box.machine.is_main)
    for step, (_, numbers) in zip(bar, common.batch_numbers(len(images), batch_size, 0, 0)):
        draws = alone.uniform((batch_size, 11), alone.generator("student", step))
        batch = strong_augmentation(common.to_float(images[numbers.to(images.device)]), draws, dataset)
        common.descend(F.mse_loss(student(alone.layout(batch)), black_box(batch)), optimizer, scaler)
        scheduler.step()
    return student


# ---------- Evaluation: GrETTA and what it is compared with ----------

PREDICTORS = ("none", "five_crop", "ten_crop", "bn_adapt", "gretta")


def crops(images: Tensor, flips: bool) -> Tensor:
    """Corners and centre at 7/8 of the side (and mirror images), enlarged: (crops, B, 3, H, W)."""
    height, width = images.shape[-2:]
    h, w = height * 7 // 8, width * 7 // 8
    y, x = height - h, width - w
    cut = [images[..., i : i + h, j : j + w] for i, j in ((0, 0), (0, x), (y, 0), (y, x), (y // 2, x // 2))]
    cut = torch.stack([F.interpolate(part, size=(height, width), mode="bilinear") for part in cut])
    return torch.cat([cut, cut.flip(-1)]) if flips else cut


def probabilities(logits: Tensor, findings: bool) -> Tensor:
    """(…, classes) of classes that exclude each other, or of findings that don't."""
    return logits.float().sigmoid() if findings else logits.float().softmax(-1)


def adapt_batch_norm(classifier: nn.Module) -> nn.Module:
    """A copy with the batch norm of the test batch (Nado et al. 2020, Schneider et al. 2020)."""
    adapted = copy.deepcopy(classifier)
    for module in adapted.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return adapted


@torch.no_grad()
def evaluate_predictors(
    classifier: nn.Module,
    policy: nn.Module,
    data: Data,
    transform: str,
    steps: int,
    machine: Machine,
    names=(),
) -> dict[str, dict[str, float]]:
    """The figures of each named predictor (default: all). Each image is evaluated on one rank, in an order
    always alike: batch statistics must not see one class only."""
    findings, policy = data.labels.dim() > 1, policy.eval()

    def ask(model: nn.Module, images: Tensor) -> Tensor:
        with machine.autocast():  # for the networks, not for the transforms
            return model(images.contiguous(memory_format=torch.channels_last)).float()

    def over_crops(images: Tensor, flips: bool) -> Tensor:
        return torch.stack([probabilities(none(crop), findings) for crop in crops(images, flips)]).mean(0)

    def bn_adapt(images: Tensor) -> Tensor:  # one alone goes in twice: a single value has no statistics
        return ask(adapted, images.repeat(1 + (len(images) == 1), 1, 1, 1))[: len(images)]

    none, names = partial(ask, classifier), names or PREDICTORS
    adapted = adapt_batch_norm(classifier) if "bn_adapt" in names else None
    gretta = AugmentedClassifier(partial(ask, policy), none, transform, steps)
    five_crop, ten_crop = partial(over_crops, flips=False), partial(over_crops, flips=True)
    predictors = dict(zip(PREDICTORS, (none, five_crop, ten_crop, bn_adapt, gretta)))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    answers, kept = [torch.empty(0)], {name: [torch.empty(0)] for name in names}  # a rank may have no batch
    for images, labels in data.read(order.split(200)[machine.rank :: machine.world_size]):
        answers.append(labels.cpu())
        for name in names:
            most = len(images) if name == "bn_adapt" else machine.chunk(*images.shape[2:])
            scores = torch.cat([predictors[name](part) for part in common.to_float(images).split(most)])
            kept[name].append((scores if findings else (scores.argmax(1) == labels).double()).cpu())
    answers = machine.all_rows(torch.cat(answers))
    return {name: figures(machine.all_rows(torch.cat(rows)), answers) for name, rows in kept.items()}


def figures(outcomes: Tensor, labels: Tensor) -> dict[str, float]:
    """{"accuracy": percent of outcomes (N,) that are right}; or, of scores (N, L), the mean AUROC (%) and
    that of each finding; one that every or no image has is left out."""
    if labels.dim() == 1:
        return {"accuracy": 100 * outcomes.mean().item()}
    found = {}
    for name, scores, truth in zip(FINDINGS, outcomes.T, labels.T):
        if (truth == 1).any() and (truth == 0).any():
            found[name] = 100 * auroc(scores[truth == 1], scores[truth == 0])
    return {"accuracy": sum(found.values()) / len(found) if found else math.nan} | found


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The share of pairs of a positive (P,) and a negative (N,) score in right order; ties count half."""
    ordered = negative.double().sort().values
    below = [torch.searchsorted(ordered, positive.double(), right=right).sum() for right in (False, True)]
    return (sum(below) / (2 * len(positive) * len(negative))).item()


def evaluate_sets(evaluate: Callable, sets: "DataSets", machine: Machine) -> dict:
    """results.json's n_eval, accuracy, corruptions and AUROC. Each test set is read once, here."""
    found, n_eval = {}, 0  # by name, of each severity; the sets are equally large
    for (name, _), read in tqdm(sets.tests.items(), desc="evaluate", unit="set", disable=not machine.is_main):
        found.setdefault(name, []).append(evaluate(data := read()))
        n_eval += len(data)

    def means(parts: list[dict]) -> dict[str, float]:
        return {key: sum(part[key]["accuracy"] for part in parts) / len(parts) for key in parts[0]}

    results = {"n_eval": n_eval, "accuracy": means(sum(found.values(), []))}
    if sets.corruptions:
        rows = {name: means(parts) for name, parts in found.items()} | {"mean": results["accuracy"]}
        errors = {name: {key: 100 - row[key] for key in ("none", "gretta")} for name, row in rows.items()}
        results["corruptions"] = errors
    (first, *_), *_ = found.values()
    names = [name for name in first["none"] if name in FINDINGS]
    if names:
        aurocs = {name: {key: figures[name] for key, figures in first.items()} for name in names}
        results |= {"metric": "mean AUROC", "auroc": aurocs}
    return results


def evaluate_run(
    run: common.Run, evaluate: Callable, model: AugmentedClassifier, sets: "DataSets", progress: dict
) -> dict:
    """Figures for results.json; on the way examples.png and, after training, curves.png."""
    of_program = isinstance(model.classifier, common.Program)  # whose batch norm nobody sees
    names = [name for name in PREDICTORS if name != "bn_adapt" or not of_program]
    results = evaluate_sets(partial(evaluate, steps=model.steps, names=names), sets, run.machine)
    run.log(run.step, **{f"test_{name}": value for name, value in results["accuracy"].items()})
    baseline = 0 if run.using else evaluate(sets.val, steps=1, names=("none",))["none"]["accuracy"]
    images, labels = next(iter(sets.tests.values()))().take(8).tensors()
    if run.machine.is_main:
        draw_examples(run.directory / "examples.png", model, sets.classes, images, labels)
    if run.machine.is_main and not run.using:
        draw_curves(run.directory / "curves.png", progress["history"], baseline)
    return results | {name: progress[name] for name in ("queries", "queries_distillation")}


# ---------- Pictures, one's own pictures, and the whole as one program ----------


@torch.no_grad()
def draw_examples(
    file: Path, model: AugmentedClassifier, classes: list[str], images: Tensor, labels: Tensor | None = None
) -> None:
    """A row per uint8 image (N, 3, H, W): as it is and after each step, answers above, levels beside it."""
    seen, levels = model.trace(common.to_float(images))
    logits = torch.stack([model.classifier(image) for image in seen]).float().cpu()  # (steps + 1, N, classes)
    best, known = logits.softmax(2).max(2), labels is not None and labels.dim() == 1
    names, widths = TRANSFORM_SETS[model.transform], [1, *[1, 1.1] * model.steps]
    size = (1.9 * len(widths) + 0.9, 1.75 * len(images))
    with common.figure(file, len(images), len(widths), size, width_ratios=widths) as axes:
        for (row, line), step in product(enumerate(axes), range(len(seen))):
            found, share = best.indices[step, row].item(), 100 * best.values[step, row]
            color = "black" if not known else "tab:green" if found == labels[row] else "tab:red"
            title = f"{classes[found]} ({share:.0f} %)"
            common.show(line[max(0, 2 * step - 1)], seen[step][row], title, color)
            if step:
                axis, values = line[2 * step], levels[step - 1][row].clamp(0, 1).cpu().numpy()
                axis.barh(names, values - 0.5, left=0.5)
                axis.axvline(0.5, color="black", linewidth=0.8)
                axis.set(xlim=(0, 1), title=f"levels of step {step}" if row == 0 else "")
                axis.invert_yaxis()


def draw_curves(file: Path, history: list[dict], baseline: float) -> None:
    """Training loss and validation accuracy against the images shown to the classifier."""
    with common.figure(file, 1, 2, (10, 4)) as ((left, right),):
        common.curves(left, history, {"loss": ""}, "queries", ylabel="loss", title="training")
        labels = {"ylabel": "accuracy (%)", "title": "shifted validation images"}
        common.curves(right, history, {"val_accuracy": "GrETTA"}, "queries", **labels)
        right.axhline(baseline, color="grey", linestyle="--", label="no augmentation")
        right.legend()


def read_folder(folder: str, size: int, dataset: str, machine: Machine) -> tuple[list[str], Tensor]:
    """A folder's pictures, by name, (N, 3, size, size) uint8: the shorter side scaled, the centre cut out."""
    names = sorted(filter(common.is_picture, files := os.listdir(folder)))
    if not names:
        raise InputError(f"--predict {folder}: no pictures in it ({', '.join(common.IMAGE_SUFFIXES)})")
    if len(names) < len(files):
        print(f"passed over in {folder}, as no pictures: {len(files) - len(names)}")
    resize = size if dataset in common.NUM_CLASSES else 256  # as they are evaluated
    files = [os.path.join(folder, name) for name in names]
    pictures = common.Pictures(files, torch.zeros(len(files)), machine, 0, resize)
    pictures.size = size
    return names, pictures.tensors()[0]


@torch.no_grad()
def predict_folder(
    directory: Path,
    model: AugmentedClassifier,
    classes: list[str],
    names: list[str],
    images: Tensor,
    machine: Machine,
) -> None:
    """predictions.csv (class and confidence before and after), and predictions/: what the classifier saw."""
    from torchvision.transforms.v2.functional import to_pil_image

    parts, findings = images.split(machine.chunk(*images.shape[2:])), tuple(classes) == FINDINGS
    moved = torch.cat([common.to_uint8(model.trace(common.to_float(part))[0][-1]) for part in parts])
    (directory / "predictions").mkdir(exist_ok=True)
    table = {"file": names}
    for state, kind, pixels in (("before", "original", images), ("after", "transformed", moved)):
        scores = probabilities(common.predict_logits(model.classifier, pixels, machine), findings)
        shares, best = (values.tolist() for values in scores.max(1))
        table |= {f"class_{state}": best, f"name_{state}": [classes[number] for number in best]}
        table[f"confidence_{state}"] = [f"{share:.4f}" for share in shares]
        for name, picture in zip(names, pixels.cpu()):
            to_pil_image(picture).save(directory / "predictions" / f"{name}-{kind}.png")
    with open(directory / "predictions.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([table, *zip(*table.values())])
    draw_examples(directory / "predictions.png", model, classes, images[:10])
    print(f"{len(names)} pictures: predictions.csv, predictions.png and predictions/ in {directory}")


def export_program(file: str, model: AugmentedClassifier, size: int) -> None:
    """Write the model as a torch.export program (CPU, float32, any batch). InputError where that fails."""
    model = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format).requires_grad_(False)
    if hasattr(model.policy.backbone, "set_swish"):
        model.policy.backbone.set_swish(memory_efficient=False)  # the other is a Python function
    example, batch = torch.zeros(2, 3, size, size), torch.export.Dim("batch", min=1, max=2**20)
    try:
        with common.warnings_off():  # an example of two: a size of one would be taken for a constant
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
            torch.export.save(program, file)
    except Exception as error:  # whatever torch.export meets in a model
        reason = common.short_reason(error)
        raise InputError(f"--export {file}: {reason}; the policy is in the run's checkpoint.pt") from error


# ---------- Data ----------


class DataSets(NamedTuple):
    """What a run learns from and is tested on."""

    train: Data | None = None
    val: Data | None = None  # shifted validation images, for the curves
    pool: Data | None = None  # unlabelled, for --reg test
    clean: Data | None = None  # for a student
    tests: dict[tuple, Callable[[], Data]] = {}  # by name and severity
    source: str = ""  # for the protocol
    corruptions: common.Corruptions | None = None
    classes: list[str] = []
    size: int = 224
    notes: list[str] = []


def target_sets(
    dataset: str, proportion: float, uncertain: str, split: str, machine: Machine, dry_run: bool, **where
) -> DataSets:
    """A labelled target domain in disjoint parts: `proportion` of it trains the policy, another evaluates it.
    Modified digits and the like: no digit is in both; CheXpert: its validation set; folder: test pictures.
    where: data_root, workers."""
    small, root = dataset in common.SMALL, where["data_root"]
    if dataset == "chexpert":
        pictures, test = load_chexpert(uncertain, machine, **where)
        train, pool = split_patients(pictures, proportion)
        val, clean, classes, notes = pool, pool, [*FINDINGS], []
        source = f"CheXpert, uncertain labels: {uncertain}"
    else:
        options = {"split": split, "corruptions": None, "dry_run": dry_run and small}
        options |= {"train": small, "validation": small or split == "val"}
        found = common.load_sets(dataset, machine=machine, **options, **where)
        data, originals, source = found.test, torch.arange(len(found.test)), f"{split} images of {root}"
        if small:
            variants = 10 if dataset == "digits" else 1
            *modified, originals = common.modified_digits(split, root, variants, dataset=dataset)
            data, source = common.Images(*modified, machine), f"modified {dataset} ({split} images)"
        numbers, held_out = split_domain(data.labels.cpu(), originals, proportion)
        drawn, classes, notes = round(proportion * len(data)), found.classes, found.notes
        train, pool, test = data.part(numbers[:drawn]), data.part(numbers), data.part(held_out)
        val, clean = data.part(numbers[drawn:]) if drawn < len(numbers) else pool, train
        if small:
            *val, _ = common.modified_digits("val", root, min(2, variants), dataset=dataset)
            val, clean = common.Images(*val, machine), found.train
    source += f": {len(train)} ({100 * proportion:g} %) train the policy, {len(test)} others evaluate it"
    tests, val = {("target", 0): lambda: test}, val.take(2 * CURVE_IMAGES)
    return DataSets(train, val, pool, clean, tests, source, None, classes, test.size, notes)


def split_domain(labels: Tensor, originals: Tensor, proportion: float) -> tuple[Tensor, Tensor]:
    """Numbers of the images (N,) that may train, different originals (N,) first, and of those that evaluate:
    half the originals of each class are for training (more where proportion > 1/2, never all)."""
    count = int(originals.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(count, dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        chosen[members[: min(len(members) - 1, math.ceil(max(0.5, proportion) * len(members)))]] = True
    first, starts = order[chosen[order]], range(0, len(labels), count)
    return torch.cat([first + start for start in starts]), (~chosen[originals]).nonzero()[:, 0]


def augmented_sets(
    dataset: str, train: bool, folder: str | None, generate: bool, machine: Machine, **where
) -> DataSets:
    """Training images (strongly augmented later), tested on a corruption set. where: of common.load_sets."""
    where |= {"corruptions": "needed", "corrupted_directory": folder, "generate": generate}
    found = common.load_sets(dataset, machine=machine, train=train, **where)
    val, pool, of = None, None, found.corruptions
    if train:
        pool, alone = (found.val or found.test).take(CURVE_IMAGES), machine._replace(rank=0, world_size=1)
        images, labels = pool.tensors()
        draws = alone.uniform((len(images), 11), machine.generator("curves"))
        images = strong_augmentation(common.to_float(images), draws, dataset)
        val = common.Images(common.to_uint8(images), labels, machine)
    tests = {key: partial(of.read, *key) for key in product(of.names, of.severities)}
    source, about = f"{of.protocol}; policy trained on augmented images", (found.classes, found.test.size)
    return DataSets(found.train, val, pool, found.train, tests, source, of, *about, found.notes)


def shortened(sets: DataSets) -> DataSets:
    """For a dry run."""
    tests = {key: partial(lambda read: read().take(64), read) for key, read in sets.tests.items()}
    train, val = (part and part.take(32) for part in sets[:2])
    return sets._replace(train=train, val=val, tests=tests, clean=sets.clean and sets.clean.take(64))


def training_steps(most: int, max_queries: int | None, queries: int) -> int:
    """As many as ask for at most `max_queries` images, `queries` each."""
    if max_queries and max_queries < queries:
        raise InputError(f"--max-queries {max_queries}: a step asks for {queries} images")
    return min(most, max_queries // queries) if max_queries else most


def check_batch_size(batch_size: int, n_train: int, world_size: int) -> None:
    least = max(2, world_size)
    if not least <= batch_size <= n_train:
        rule = f"at least {least} and at most the {n_train} images that train the policy"
        raise InputError(f"--batch-size {batch_size} must be {rule}: change it, or raise --proportion")


def regulariser_images(sets: DataSets, reg: str) -> Tensor | None:
    """uint8 (N, 3, H, W): unlabelled ones of the target domain, or of training images under corruptions."""
    if reg == "none":
        return None
    images, _ = (sets.pool if reg == "test" else sets.train).take(REG_IMAGES).tensors()
    if reg == "test" and sets.corruptions is None:
        return images
    names = common.CORRUPTIONS if reg == "test" else (reg,)
    return torch.cat([common.corrupt_uint8(images, name, 3, seed=1) for name in names])


def load_chexpert(uncertain: str, machine: Machine, data_root: str, workers: int) -> list[common.Pictures]:
    """CheXpert's train.csv and valid.csv (Irvin et al. 2019, arXiv 1901.07031), in CheXpert-v1.0-small or the
    like of data_root, or there; labels (N, 5) float: 1, 0 (or empty), an uncertain one (-1) 1, 0 or NaN."""
    places = [Path(data_root) / name for name in ("CheXpert-v1.0-small", "CheXpert-v1.0", "chexpert", "")]
    root = next((place for place in places if (place / "train.csv").is_file()), places[0])
    values = {"1": 1.0, "0": 0.0, "": 0.0, "-1": {"ones": 1.0, "zeros": 0.0, "ignore": math.nan}[uncertain]}
    advice = "get it from https://stanfordmlgroup.github.io/competitions/chexpert, and name --data-root"
    found = []
    for file in (root / "train.csv", root / "valid.csv"):
        try:
            rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
            labels = [[values[row[name].removesuffix(".0")] for name in FINDINGS] for row in rows]
            # Paths begin with the name of the published folder, whatever its name is here.
            files = [str(root / row["Path"].partition("/")[2]) for row in rows]
        except (OSError, LookupError, AttributeError, ValueError, csv.Error) as error:
            raise InputError(f"{file} is missing or damaged ({error!r}): {advice}") from error
        found.append(common.Pictures(files, torch.tensor(labels), machine, workers))
    return found


def split_patients(pictures: common.Pictures, proportion: float) -> tuple[common.Pictures, common.Pictures]:
    """Pictures of `proportion` of the patients, drawn alike in every run, and those of the others."""
    patients = [os.fsdecode(file).rpartition("patient")[2].partition("/")[0] for file in pictures.files]
    names = sorted(set(patients))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    chosen = {names[i] for i in order[: min(max(1, round(proportion * len(names))), len(names) - 1)]}
    inside = torch.tensor([patient in chosen for patient in patients])
    return tuple(pictures.part(rows.nonzero()[:, 0]) for rows in (inside, ~inside))


# ---------- Main ----------


def main() -> None:
    args = parse_args()
    machine = common.start_machine(args.device, args.amp, args.seed)
    using, num_levels = bool(args.evaluate or args.predict), len(TRANSFORM_SETS[args.transform])
    only_predict = args.predict and not (args.evaluate or args.export)

    # All is looked for before the first file is written
    where = {"data_root": args.data_root, "machine": machine, "split": args.eval_split}
    where |= {"dry_run": args.dry_run, "workers": 0 if args.dry_run else machine.workers(args.workers)}
    if only_predict and not args.weights_policy:  # a run knows what its classifier takes: no data are needed
        known = common.read_checkpoint(Path(args.run_dir))["progress"]
        sets = DataSets(classes=known["classes"], size=known["size"])
    elif args.train_on == "target":
        sets = target_sets(args.dataset, args.proportion, args.uncertain, **where)
    else:
        corrupted = (args.corruptions_path, args.generate_corruptions)
        sets = augmented_sets(args.dataset, not using, *corrupted, **where)
    pictures = read_folder(args.predict, sets.size, args.dataset, machine) if args.predict else None
    sets = shortened(sets) if args.dry_run else sets
    n_train = len(sets.train or ())
    if args.dry_run:
        args.epochs, args.num_samples = 1, min(args.num_samples, 2)
        args.batch_size = min(args.batch_size, n_train or args.batch_size)
    check_batch_size(args.batch_size, args.batch_size if using else n_train, machine.world_size)
    steps_per_epoch = max(1, n_train // args.batch_size)
    args.epochs = args.epochs or math.ceil(settings(args.dataset, args.est)["updates"] / steps_per_epoch)
    args.checkpoint_every = args.checkpoint_every or max(1, args.epochs // 10)
    queries = args.batch_size * (1 if args.est == "whitebox" else 2 * args.num_samples)  # of a step
    total = training_steps(args.epochs * steps_per_epoch, args.max_queries, queries)
    unlabelled = None if using else regulariser_images(sets, args.reg)

    on = (args.dataset, sets, machine, args.data_root, args.dry_run)
    classifier, origin = load_model(args.model, args.weights, args.blackbox, *on)
    black_box = BlackBox(classifier, machine, args.est == "whitebox", sets.size)
    surrogate = args.est == "surrogate" and not using
    found = find_student(args.student, args.run_dir, origin) if surrogate else None
    student = load_model("student", found, None, *on)[0] if found else None
    torch.manual_seed(common.mix("policy", args.seed))  # whatever the classifier drew
    policy = Policy(args.policy, num_levels, args.sigmoid, args.init).to(machine.device)
    if args.weights_policy:
        common.load_weights(policy, args.weights_policy)
    optimizer = OPTIMIZERS[args.opt](policy.parameters(), lr=args.lr)
    scaler, totals = machine.scaler(), common.Totals(4, machine)  # loss, right answers, queries; objective
    run = common.Run(args, machine, args.est)
    progress = {"queries": 0, "queries_distillation": 0, "history": []}
    progress |= {"classes": sets.classes, "size": sets.size}
    run.track(progress, policy=policy, optimizer=optimizer, scaler=scaler, totals=totals)
    if run.finished:
        return machine.on_main(lambda: print_results(common.read_results(run.directory), run.directory))
    run.say(f"{n_train} images train the policy, {steps_per_epoch} steps per epoch; {origin}", *sets.notes)
    if surrogate and student is None:
        images, steps = sets.clean.take(10_000).tensors()[0], 1 if args.dry_run else 1000
        student = distil_student(black_box, images, args.dataset, len(sets.classes), steps)
        progress["queries_distillation"] = steps * min(DISTIL_BATCH, len(images))
        machine.on_main(lambda: common.save_atomically(student.state_dict(), run.directory / "student.pt"))
    guide = BlackBox(student, machine, True, sets.size) if surrogate else None
    trained = common.distribute(policy, machine)
    if args.compile:
        trained = torch.compile(trained)
        black_box.classifier = classifier if args.blackbox else torch.compile(classifier)
    ask_policy = machine.autocast()(trained)  # which is for the networks, not for the transforms
    evaluate = partial(evaluate_predictors, classifier, policy, transform=args.transform, machine=machine)
    batches = sets.train.batches(args.batch_size, args.seed, run.step) if n_train else ()
    for step, (images, labels, _) in run.steps(batches, total, steps_per_epoch):
        draws = machine.generator(args.seed, step)  # alike on every rank; each takes its rows
        policy.train()
        images = common.to_float(images)  # (b, 3, H, W)
        if args.train_on == "augmented":
            images = strong_augmentation(images, machine.uniform((args.batch_size, 11), draws), args.dataset)
        shape = (args.batch_size, args.num_samples, num_levels + 1)
        noise = PERTURBATIONS[args.perturbations](machine.normal(shape, draws).transpose(0, 1))
        levels = ask_policy(images)  # (b, K); noise: (P, b, K + 1)
        start, asked = levels.detach(), (images, labels, args.transform)
        loss = level_loss(black_box, *asked, black_box.chunk, totals.own)
        if args.est == "vanilla":
            gradient = vanilla_gradient(loss, start, args.num_samples, args.sigma, args.beta, noise[..., :-1])
        elif args.est == "surrogate":
            q = true_gradient(level_loss(guide, *asked, guide.chunk), start)
            scales = (args.num_samples, args.sigma, args.alpha, args.beta)
            gradient = guided_gradient(loss, start, q, *scales, noise)
        else:
            gradient = args.beta * true_gradient(loss, start)
        objective = (gradient * levels).sum()  # ⟨g, v⟩ has the gradient g with respect to v
        if unlabelled is not None:
            rows = torch.randint(len(unlabelled), (args.batch_size,), generator=draws, device=machine.device)
            moves = 0.5 + 0.25 * machine.uniform((args.batch_size, num_levels), draws)
            images = common.to_float(unlabelled[machine.own_rows(rows)])
            objective = objective + REG_WEIGHT * consistency_loss(ask_policy, images, moves, args.transform)
        objective = objective * machine.world_size / args.batch_size
        totals.own[3] += objective.detach()
        lr = args.lr * 0.5 * (1 + math.cos(math.pi * step / total))
        common.descend(objective, optimizer, scaler, lr)
        epoch = math.ceil((step + 1) / steps_per_epoch)
        ends = (step + 1) % steps_per_epoch == 0 or step + 1 == total
        if ends or (step + 1) % args.log_every == 0:
            loss, correct, rows, _ = totals.read(step + 1)
            queries = progress["queries"] + int(rows)
            entry = {"queries": queries, "loss": loss / rows, "accuracy": 100 * correct / rows}
            run.log(step + 1, lr=lr, **entry)
        if ends:
            progress["queries"] = queries
            totals.own.zero_()
        if ends and (epoch % args.checkpoint_every == 0 or step + 1 == total):
            val = evaluate(sets.val, steps=1, names=("gretta",))["gretta"]["accuracy"]
            progress["history"].append({"epoch": epoch, **entry, "val_accuracy": val})
            run.log(step + 1, **progress["history"][-1])

    model = AugmentedClassifier(policy.eval(), classifier, args.transform, args.steps)
    if args.predict:
        machine.on_main(lambda: predict_folder(run.directory, model, sets.classes, *pictures, machine))
    if args.export:
        machine.on_main(lambda: export_program(args.export, model, sets.size))
    if only_predict:
        return
    inputs = "in [0, 1], of a black box" if args.blackbox else common.normalisation(args.dataset, args.model)
    protocol = f"{sets.source}; {args.transform}, {args.steps} step(s); inputs {inputs}"
    about = {"n_train": n_train, "protocol": protocol, "train_on": args.train_on, "transform": args.transform}
    about |= {"proportion": args.proportion if args.train_on == "target" else None, "policy": args.policy}
    results = run.finish(about | evaluate_run(run, evaluate, model, sets, progress))
    machine.on_main(lambda: print_results(results, run.directory))


def print_results(results: dict, directory: Path) -> None:
    print(f"\n{'':24s}{results.get('metric', 'accuracy')} (%)")
    shown = {"none": "no augmentation", "gretta": f"GrETTA ({results['method']})"}
    for name, value in results["accuracy"].items():
        print(f"{shown.get(name, name):24s}{value:12.2f}")
    if "corruptions" in results:
        print(f"\n{'top-1 error (%)':24s}{'none':>12s}{'GrETTA':>12s}")
    for name, errors in results.get("corruptions", {}).items():
        print(f"{name:24s}{errors['none']:12.2f}{errors['gretta']:12.2f}")
    print(f"\n{results['protocol']}\n{results['queries']:,} queries, {results['wall_seconds']} s", end="; ")
    print(directory)


if __name__ == "__main__":
    common.run_script(main)
