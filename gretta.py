"""GrETTA: Gradient-Estimation Test-Time data Augmentation (Wang, Yang & Lin).

A policy network looks at one test image and returns K levels in [0, 1]; each level drives one differentiable transform; the
transformed image goes to a frozen classifier. The policy learns to make the classifier's loss fall. The classifier is a black box:
its gradient is estimated from differences of losses under perturbed levels (evolution strategies, or guided by a student).

    python gretta.py --model resnext --est vanilla                  # ES on modified digits: everything needed is in the repository
    python gretta.py --model wideresnet --est surrogate             # Guided ES: a distilled student points the way
    python gretta.py --model resnext --est whitebox                 # the true gradient, for comparison
    python gretta.py --model resnext --train-on augmented           # train images under strong augmentation, tested on digits-C
    python gretta.py --evaluate --run-dir RUN_DIR --steps 2         # apply a trained policy twice
    python gretta.py --predict FOLDER --run-dir RUN_DIR             # your own pictures
    torchrun --nproc_per_node 2 gretta.py --model resnext --est vanilla

Reaches, when 20 % of the target domain train the policy (modified digits, 2,980 images, accuracy in %, seeds 0-2, two CPU cores):
resnext 63.4 → 94.8 ± 0.3 (vanilla), 95.1 ± 0.5 (surrogate), 93.0 ± 0.6 (whitebox); wideresnet 73.9 → 96.5 ± 1.0, 96.7 ± 0.4, 97.2 ± 0.1.

Differs from the paper's code: a loss difference per image and perturbation instead of one per batch, the policy in eval mode when tested,
contrast about the mean, one warp for all geometric transforms, levels clipped to [0, 1]. README.md has the whole list.
"""

import argparse
import csv
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import InputError, number

SCRIPT = Path(__file__).stem  # a copy of this file, changed, reports under its own name

# Settings by data set; a flag left out takes its value from here. "updates" is the number of steps that --epochs defaults to.
# Tuned on the modified validation digits (--target-split val); the true gradient is rougher than the estimates, which smooth it, and
# costs 24 times fewer queries a step, hence its smaller steps and more of them.
SETTINGS = {
    "digits": {
        "vanilla": {"opt": "adam", "lr": 5e-4, "batch_size": 24, "train_on": "target", "updates": 120},
        "surrogate": {"opt": "adam", "lr": 5e-4, "batch_size": 24, "train_on": "target", "updates": 120},
        "whitebox": {"opt": "adam", "lr": 2e-4, "batch_size": 24, "train_on": "target", "updates": 300},
    }
}

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
TRANSFORM_SETS = {"geometry": list(TRANSFORMS)[:4], "color": list(TRANSFORMS)[4:], "full": list(TRANSFORMS)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=number(int, 0), default=0, help="of everything random in the method")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    add("--amp", action="store_true", help="mixed precision: bfloat16, or float16 on GPUs without it")
    add("--compile", action="store_true", help="torch.compile the policy and the classifier")
    add("--run-dir", metavar="DIR", help="where the run is written (default: runs/gretta/…)")
    add("--resume", action="store_true", help="continue what --run-dir holds")
    add("--checkpoint-every", type=number(int, 1), metavar="EPOCHS", help="epochs between checkpoints (default: a tenth of the run)")
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
    add("--dry-run", action="store_true", help="one small step of every phase, same outputs")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=tuple(SETTINGS), default="digits", help="digits comes with the repository")
    add("--data-root", default="data", metavar="DIR", help="where the data sets lie")
    add("--workers", type=number(int, 0), default=0, help="loader processes; the sets that live on the device need none")
    add(
        "--train-on",
        choices=("target", "augmented"),
        help="target: --proportion of the labelled target domain; augmented: the training set under strong augmentation, then a corruption set (default: target for digits)",
    )
    add(
        "--proportion",
        type=number(float, 0, 1, True, True),
        default=0.2,
        help="share of the target domain that trains the policy (--train-on target)",
    )
    add("--target-split", choices=("val", "test"), default="test", help="digits the target domain is made from; val is for tuning")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="resnext", help="the frozen classifier: resnext, wideresnet, or a torchvision model by its name")
    add("--weights", metavar="FILE", help="the classifier's checkpoint (default: the one shipped in weights/)")
    add("--weights-policy", metavar="FILE", help="a trained policy for --evaluate and --predict (a run's checkpoint.pt)")
    add("--student", metavar="FILE", help="checkpoint of a student for --est surrogate (default: the one shipped in weights/, else distilled first)")
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
    add = parser.add_argument_group("optimiser").add_argument
    add("--opt", choices=tuple(OPTIMIZERS), help="optimiser of the policy (default: by data set)")
    add("--lr", type=number(float, 0, open_low=True), help="learning rate, cosine to zero (default: by data set)")
    add(
        "--epochs",
        type=number(int, 1),
        help="passes over the training part (default: by data set and --est; for digits as many as make 120 steps, whitebox 300)",
    )
    add("--batch-size", type=number(int, 1), help="images per step over all ranks (default: by data set)")
    args = parser.parse(argv, lambda given: SETTINGS[given.dataset][given.est])
    if args.reg not in ("none", "test", *common.CORRUPTIONS, *common.EXTRA_CORRUPTIONS):
        parser.error(f"--reg {args.reg}: choose none, test or a corruption: {', '.join(common.CORRUPTIONS + common.EXTRA_CORRUPTIONS)}")
    return args


OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}

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
    if levels.shape != (len(images), len(names)):
        raise InputError(f"levels are {tuple(levels.shape)}, but '{transform}' needs ({len(images)}, {len(names)}) for these images")
    low, high = levels.new_tensor([TRANSFORMS[name] for name in names]).T
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


def strong_augmentation(images: torch.Tensor, generator: torch.Generator, flip: bool) -> torch.Tensor:
    """The augmentation of the published training run, per image: flip, rotation ±30°, translation ±half the side, zoom 0.7..1.3,
    pad-crop 4, then brightness, contrast and saturation 0.5..1.5 and hue ±half a turn. images (B, 3, H, W) in [0, 1].

    Flips and hues are left out where they would change the class (`flip` is False for digits, whose grey has no hue anyway).
    """
    draw = torch.rand(len(images), 12, generator=generator, device=generator.device).to(images.device) * 2 - 1
    side = images.new_tensor([images.shape[-1], images.shape[-2]])
    zoom = (1 + 0.3 * draw[:, :1]).repeat(1, 2)
    if flip:
        zoom = zoom * torch.stack([draw[:, 1].sign(), torch.ones_like(zoom[:, 0])], dim=1)
    translation = (draw[:, 2:4] * 0.5 * side).round() + (draw[:, 4:6] * 4.5).trunc()
    images = common.affine_warp(images, common.affine_matrix(zoom, translation, 30 * draw[:, 6]))
    brightness, contrast, saturation = (1 + 0.5 * draw[:, column, None, None, None] for column in (7, 8, 9))
    images = common.adjust_contrast((images * brightness).clamp(0, 1), contrast.flatten())
    grey = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    images = (grey + saturation * (images - grey)).clamp(0, 1)
    return rotate_hue(images, math.pi * draw[:, 10]) if flip else images


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


def true_gradient(loss: Loss, levels: torch.Tensor) -> torch.Tensor:
    """The gradient (B, K) of each row's loss by backpropagation."""
    with torch.enable_grad():
        levels = levels.detach().requires_grad_()
        return torch.autograd.grad(loss(levels).sum(), levels)[0]


def consistency_loss(policy: nn.Module, images: torch.Tensor, levels: torch.Tensor, transform: str) -> torch.Tensor:
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
    """A frozen classifier: images in [0, 1] to logits, the images it was shown are counted. No gradient flows unless `whitebox`."""

    def __init__(self, classifier: nn.Module, machine: common.Machine, whitebox: bool):
        self.classifier = classifier.eval().requires_grad_(False)
        self.machine, self.whitebox, self.queries = machine, whitebox, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.queries += len(images)
        with torch.set_grad_enabled(self.whitebox and torch.is_grad_enabled()), self.machine.autocast():
            return self.classifier(self.machine.layout(images)).float()


def level_loss(query: Callable, images: torch.Tensor, labels: torch.Tensor, transform: str, chunk: int, totals: torch.Tensor | None = None) -> Loss:
    """The function from levels (P·B, K) to cross entropies (P·B,) of the transformed images, asked for in chunks.

    totals (3 or more,) accumulates the sum of cross entropies, the number of correct answers and the number of rows.
    """

    def loss(levels: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(levels), device=levels.device) % len(images)
        losses = []
        for index, part in zip(rows.split(chunk), levels.split(chunk)):
            logits = query(transform_images(images[index], part, transform))
            losses.append(F.cross_entropy(logits, labels[index], reduction="none"))
            if totals is not None:
                correct = (logits.detach().argmax(1) == labels[index]).sum()
                totals[:3] += torch.stack([losses[-1].detach().sum(), correct, torch.ones_like(index).sum()])
        return torch.cat(losses)

    return loss


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
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    steps = epochs * (len(images) // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    progress = tqdm(total=steps, desc="distil the student", unit="step", disable=not machine.is_main)
    for _ in range(epochs):
        for index in common.epoch_batches(len(images), batch_size, generator):
            batch = strong_augmentation(common.to_float(images[index]), generator, flip=dataset != "digits")
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


def crop_scores(query: Callable, images: torch.Tensor, flips: bool) -> torch.Tensor:
    """Mean softmax over five (or ten) crops."""
    return torch.stack([query(crop).softmax(1) for crop in crops(images, flips)]).mean(0)


def adapt_batch_norm(classifier: nn.Module) -> nn.Module:
    """A copy of the classifier whose batch-norm layers use the statistics of the test batch (Nado et al. 2020, Schneider et al. 2020)."""
    import copy

    adapted = copy.deepcopy(classifier)
    for module in adapted.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return adapted


def evaluate_predictors(
    classifier: nn.Module,
    policy: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    transform: str,
    steps: int,
    machine: common.Machine,
    names: tuple[str, ...] = ("none", "five_crop", "ten_crop", "bn_adapt", "gretta"),
) -> dict[str, float]:
    """Top-1 accuracy in percent of each named predictor on uint8 images (N, 3, H, W); with steps > 1 also after each step (gretta_1, …)."""
    # Batch statistics must not see one class only: the images come shuffled, always alike.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order].to(machine.device)
    predictors = {
        "none": classifier,
        "five_crop": lambda batch: crop_scores(classifier, batch, flips=False),
        "ten_crop": lambda batch: crop_scores(classifier, batch, flips=True),
        "bn_adapt": adapt_batch_norm(classifier),
    }
    accuracy = {}
    policy.eval()
    for name in names:
        if name == "bn_adapt":  # every rank sees whole batches of the same size, so that the statistics do not depend on the machine
            alone = machine._replace(rank=0, world_size=1)
            accuracy[name] = common.accuracy(common.predict_logits(predictors[name], images, alone, chunk=200), labels)
        elif name != "gretta":
            accuracy[name] = common.accuracy(common.predict_logits(predictors[name], images, machine), labels)
    if "gretta" in names:

        def after_each_step(batch: torch.Tensor) -> torch.Tensor:
            seen, _ = gretta_steps(policy, batch, transform, steps)
            return torch.stack([classifier(image).float() for image in seen[1:]], dim=1)  # (B, steps, classes)

        scores = common.predict_logits(after_each_step, images, machine)
        accuracy["gretta"] = common.accuracy(scores[:, -1], labels)
        if steps > 1:
            accuracy |= {f"gretta_{step + 1}": common.accuracy(scores[:, step], labels) for step in range(steps)}
    return accuracy


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
    machine: common.Machine,
) -> None:
    """A grid, one row per image: the original and the image after each step, the predicted class and confidence above, the levels beside it."""
    import matplotlib.figure

    policy.eval()
    seen, levels = gretta_steps(policy, common.to_float(images.to(machine.device)), transform, steps)
    confidences, classes = torch.stack([classifier(image).float().softmax(1) for image in seen]).cpu().max(2)  # (steps + 1, B)
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
            title = f"{predicted} ({100 * confidences[step, row]:.0f} %)"
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


def read_folder(folder: str, size: int) -> tuple[list[Path], torch.Tensor]:
    """The picture files of a folder, sorted by name, and their pixels as (N, 3, size, size) uint8: RGB, the shorter side scaled, the centre cut out."""
    import numpy as np
    from PIL import Image, ImageOps

    if not Path(folder).is_dir():
        raise InputError(f"--predict {folder}: no such folder")
    files = sorted(file for file in Path(folder).iterdir() if file.suffix.lower() in common.IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"--predict {folder}: no pictures in it (looked for {', '.join(common.IMAGE_SUFFIXES)})")
    images = []
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a picture is said below, in one line
    for file in files:
        try:
            with common.warnings_off(), Image.open(file) as image:
                # to 32 px or so: the box filter of thumbnails would alias, bicubic with antialiasing is PIL's default
                fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
                images.append(torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1))
        except Exception as error:  # a damaged picture raises whatever its decoder meets
            raise InputError(f"--predict: {file} is not a readable image ({error}): remove it from the folder") from error
    return files, torch.stack(images)


@torch.no_grad()
def predict_folder(
    files: list[Path],
    images: torch.Tensor,
    directory: Path,
    classifier: nn.Module,
    policy: nn.Module,
    transform: str,
    steps: int,
    machine: common.Machine,
) -> None:
    """predictions.csv (class and confidence before and after), and under predictions/ each picture as the classifier saw it, before and after."""
    from PIL import Image

    policy.eval()
    alone = machine._replace(rank=0, world_size=1)  # only one rank predicts
    transformed = []
    for chunk in images.split(machine.chunk):
        transformed.append(common.to_uint8(gretta_steps(policy, common.to_float(chunk.to(machine.device)), transform, steps)[0][-1]).cpu())
    transformed = torch.cat(transformed)
    before, after = (common.predict_logits(classifier, shown, alone).softmax(1).cpu().max(1) for shown in (images, transformed))
    (directory / "predictions").mkdir(exist_ok=True)
    with open(directory / "predictions.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "class_before", "confidence_before", "class_after", "confidence_after"])
        for row, file in enumerate(files):
            confidences = (f"{before.values[row]:.4f}", f"{after.values[row]:.4f}")
            writer.writerow([file.name, before.indices[row].item(), confidences[0], after.indices[row].item(), confidences[1]])
            for name, pixels in (("original", images[row]), ("transformed", transformed[row])):
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(directory / "predictions" / f"{file.name}-{name}.png")
    draw_examples(directory / "predictions.png", classifier, policy, images[:10], None, transform, steps, machine)


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def target_domain(split: str, proportion: float, data_root: str, variants: int = 10) -> tuple[torch.Tensor, ...]:
    """Modified digits as two disjoint parts: `proportion` of all images to train the policy on, and the part it is evaluated on.

    The split goes by digit, stratified: no digit has images in both parts. Half of the digits (more where proportion > 1/2) are
    set aside for training, and proportion · N of their images are drawn, different digits first; the evaluation part is every image of the
    other digits, so it is the same for every proportion up to 1/2. Returns images, labels of the training part, images, labels of the
    evaluation part, and the training part's digits' images that were not drawn (for --reg test, which needs no labels).
    """
    images, labels, source = common.modified_digits(split, data_root, variants)
    generator = torch.Generator().manual_seed(0)
    digit_labels = labels[: len(labels) // variants]
    order = torch.randperm(len(digit_labels), generator=generator)
    for_training = torch.zeros(len(order), dtype=torch.bool)
    for label in digit_labels.unique():
        members = order[digit_labels[order] == label]
        for_training[members[: min(len(members) - 1, math.ceil(max(0.5, proportion) * len(members)))]] = True
    # Variant by variant, so that the first images drawn are of different digits.
    pool = torch.cat([v * len(order) + order[for_training[order]] for v in range(variants)])
    drawn, unlabelled = pool[: round(proportion * len(labels))], pool
    held_out = torch.nonzero(~for_training[source])[:, 0]
    return images[drawn], labels[drawn], images[held_out], labels[held_out], images[unlabelled]


def load_sets(train_on: str, dataset: str, proportion: float, target_split: str, data_root: str, reg: str) -> dict:
    """Everything the run needs, as uint8 images and labels on the CPU.

    train: what the policy learns from; test: {name: set} it is evaluated on; val: shifted validation images for the curves;
    reg: unlabelled images for the regulariser, or None.
    """
    generator = torch.Generator().manual_seed(0)
    val_images, val_labels = common.load_split(dataset, "val", data_root)
    reg_images = None
    if train_on == "target":
        train_images, train_labels, test_images, test_labels, reg_images = target_domain(target_split, proportion, data_root)
        test = {"modified": (test_images, test_labels)}
        val = common.modified_digits("val", data_root, variants=2)[:2]
    else:
        train_images, train_labels = common.load_split(dataset, "train", data_root)
        images, labels = common.load_split(dataset, target_split, data_root)
        test = {
            f"{name}-{severity}": (common.to_uint8(common.corrupt(common.to_float(images), name, severity, seed=0)), labels)
            for name in common.CORRUPTIONS
            for severity in range(1, 6)
        }
        strong = strong_augmentation(common.to_float(val_images).repeat(2, 1, 1, 1), generator, flip=dataset != "digits")
        val = (common.to_uint8(strong), val_labels.repeat(2))
        if reg == "test":
            shifted = [common.corrupt(common.to_float(val_images), name, 3, seed=1) for name in common.CORRUPTIONS]
            reg_images = common.to_uint8(torch.cat(shifted))
    if reg == "none":
        reg_images = None
    elif reg != "test":
        reg_images = common.to_uint8(common.corrupt(common.to_float(train_images), reg, 3, seed=1))
    return {"train": (train_images, train_labels), "test": test, "val": val, "reg": reg_images}


def main() -> None:
    started = time.perf_counter()
    args = parse_args()
    machine = common.start_machine(args.device, args.amp, args.seed)
    num_classes, num_levels = common.NUM_CLASSES[args.dataset], len(TRANSFORM_SETS[args.transform])
    use_policy = bool(args.evaluate or (args.predict and (args.run_dir or args.weights_policy)))  # a trained one: nothing is trained
    if use_policy and not args.weights_policy and not args.run_dir:
        raise InputError("--evaluate needs a trained policy: name its run with --run-dir, or its file with --weights-policy")

    # Data: everything is read and checked before the first file is written.
    files, pictures = read_folder(args.predict, 32) if args.predict else ([], None)
    sets = load_sets(args.train_on, args.dataset, args.proportion, args.target_split, args.data_root, args.reg)
    if args.dry_run:
        few = max(8, 64 // len(sets["test"]))
        sets["test"] = {name: (images[:few], labels[:few]) for name, (images, labels) in sets["test"].items()}
        sets["train"], sets["val"] = (tuple(part[: args.batch_size] for part in sets["train"]), tuple(part[:64] for part in sets["val"]))
        args.epochs, args.num_samples = 1, min(args.num_samples, 2)
    train_images, train_labels = (part.to(machine.device) for part in sets["train"])
    sets["test"] = {name: (images.to(machine.device), labels) for name, (images, labels) in sets["test"].items()}
    steps_per_epoch = len(train_labels) // args.batch_size
    if steps_per_epoch == 0 and not use_policy:
        raise InputError(
            f"{len(train_labels)} images to train the policy on are fewer than a batch of {args.batch_size}: lower --batch-size or raise --proportion"
        )
    if args.batch_size < machine.world_size:
        raise InputError(f"--batch-size {args.batch_size} is smaller than the {machine.world_size} processes")
    if args.epochs is None:
        args.epochs = math.ceil(SETTINGS[args.dataset][args.est]["updates"] / max(steps_per_epoch, 1))
    if args.checkpoint_every is None:
        args.checkpoint_every = max(1, args.epochs // 10)
    n_eval = sum(len(labels) for _, labels in sets["test"].values())

    # Models.
    classifier = common.build_model(args.model, num_classes, args.dataset)
    common.check_input_size(classifier, args.model, train_images.shape[-1])
    if args.weights:
        weights = Path(args.weights)
        common.load_weights(classifier, weights)
    else:
        weights = common.load_digits_weights(classifier, args.model, machine, args.data_root, args.dry_run)
    classifier.to(machine.device, memory_format=machine.weight_layout)
    black_box = BlackBox(classifier, machine, args.est == "whitebox")
    policy = Policy(args.policy, num_levels, args.sigmoid, args.init).to(machine.device)
    optimizer = OPTIMIZERS[args.opt](policy.parameters(), lr=args.lr)
    scaler = common.grad_scaler(machine)
    generator = torch.Generator(machine.device).manual_seed(args.seed)  # alike on every rank: order, noise, augmentation
    student, queries_distillation = None, 0
    shipped_student = common.WEIGHTS / f"digits-{args.model}-student.pt"
    distilled_before = Path(args.run_dir) / "student.pt" if args.run_dir else None  # by the run that is resumed
    if args.est == "surrogate" and not use_policy:
        for file in (args.student, None if args.weights else shipped_student, distilled_before):
            if student is None and file is not None and (file == args.student or file.is_file()):
                student = common.load_weights(common.build_model("student", num_classes, args.dataset), file)
                student.to(machine.device, memory_format=machine.weight_layout).eval().requires_grad_(False)

    # The run's directory, and what it holds already.
    directory = Path(args.run_dir) if use_policy and args.run_dir else None
    saved = None
    if use_policy:
        saved = common.load_tensors(args.weights_policy or directory / "checkpoint.pt", "give the checkpoint.pt of a finished run")
        common.load_weights(policy, args.weights_policy or directory / "checkpoint.pt")
        saved = saved if "history" in saved else None  # a bare state dict says nothing of its run
    elif args.resume and args.run_dir and (Path(args.run_dir) / "checkpoint.pt").is_file():
        saved = common.load_tensors(Path(args.run_dir) / "checkpoint.pt", "remove the directory to start afresh")
        common.load_weights(policy, Path(args.run_dir) / "checkpoint.pt")
        if "optimizer" not in saved:
            raise InputError(f"{args.run_dir}/checkpoint.pt holds a policy but no run to continue: evaluate it with --evaluate")
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{args.run_dir}/checkpoint.pt does not continue with --opt {args.opt}: {error}") from error
    if saved is not None and not use_policy and saved["finished"]:
        results = common.read_results(Path(args.run_dir))
        if machine.is_main:
            print(f"{args.run_dir} holds a finished run:")
            print_results(results, Path(args.run_dir))
        return
    in_place = use_policy and directory is not None and not args.weights_policy
    if not in_place:
        directory = common.run_directory(SCRIPT, vars(args), args.est, machine)
    arguments = vars(args) | {"run_dir": str(directory)}
    run = common.Run(directory, machine, None if in_place else arguments, saved["step"] if saved and not args.weights_policy else None, started)
    if machine.is_main:
        print(" ".join(f"{name}={value}" for name, value in arguments.items()))
        print(
            f"{len(train_labels)} images train the policy, {n_eval} evaluate it; {num_levels} levels, {args.batch_size * args.num_samples * 2} queries per step"
        )
        print(f"classifier: {weights}")
        if args.resume and saved is None:
            print(f"{directory} holds no checkpoint: starting afresh")

    # Without a student at hand, distil one from the classifier's outputs.
    if args.est == "surrogate" and student is None and not use_policy:
        images = common.load_split(args.dataset, "train", args.data_root)[0].to(machine.device)
        student = distil_student(black_box, images, args.dataset, num_classes, machine, 1 if args.dry_run else 100, 100, seed=0)
        queries_distillation, black_box.queries = black_box.queries, 0
        if machine.is_main:
            keep = args.weights is None and not args.dry_run
            common.save_atomically(student.state_dict(), shipped_student if keep else directory / "student.pt")
        machine.barrier()

    # Training.
    train_policy = common.distribute(policy, machine)
    if args.compile:
        train_policy, black_box.classifier = torch.compile(train_policy), torch.compile(black_box.classifier)
    step = queries = epoch = 0
    history: list[dict] = []
    state = saved
    if saved is not None:
        step, queries, epoch, history = saved["step"], saved["queries"], saved["epoch"], saved["history"]
        queries_distillation = saved["queries_distillation"]
    if saved is not None and not use_policy:
        scaler.load_state_dict(saved["scaler"])
        generator.set_state(saved["generator"])
        torch.set_rng_state(saved["torch_random"])
    val_none = 0.0 if use_policy else common.evaluate(classifier, *sets["val"], machine)["top1_accuracy"]
    reg_images = None if sets["reg"] is None else sets["reg"].to(machine.device)
    total_steps = args.epochs * steps_per_epoch
    progress = tqdm(total=total_steps, initial=step, desc="train the policy", unit="step", disable=not machine.is_main or use_policy)
    resumed_at, clock = queries, time.perf_counter()
    while epoch < args.epochs and not use_policy:
        policy.train()
        totals = torch.zeros(4, device=machine.device)  # sums over the epoch: cross entropy, correct, rows of the queries; the objective
        for index in common.epoch_batches(len(train_labels), args.batch_size, generator):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * step / total_steps))
            images = common.to_float(train_images[index])
            if args.train_on == "augmented":
                images = strong_augmentation(images, generator, flip=args.dataset != "digits")
            # Randomness is drawn for the global batch on every rank alike; each rank takes its rows, so ranks change nothing.
            noise = torch.randn(args.batch_size, args.num_samples, num_levels + 1, generator=generator, device=machine.device)
            images, labels = machine.own_rows(images), machine.own_rows(train_labels[index])  # (b, 3, H, W), (b,)
            noise = machine.own_rows(noise).transpose(0, 1)  # (P, b, K + 1)
            with machine.autocast():
                levels = train_policy(images)  # (b, K)
            loss = level_loss(black_box, images, labels, args.transform, machine.chunk, totals)
            detached = levels.detach()
            if args.est == "whitebox":
                gradient = args.beta * true_gradient(loss, detached)
            elif args.est == "surrogate":
                student_gradient = true_gradient(
                    level_loss(lambda batch: student(machine.layout(batch)), images, labels, args.transform, machine.chunk), detached
                )
                gradient = guided_gradient(loss, detached, student_gradient, args.num_samples, args.sigma, args.alpha, args.beta, noise)
            else:
                gradient = vanilla_gradient(loss, detached, args.num_samples, args.sigma, args.beta, noise[..., :num_levels])
            # ⟨g, v⟩ has the gradient g with respect to v; DDP averages over ranks, hence the world size.
            objective = (gradient * levels).sum() * machine.world_size / args.batch_size
            if reg_images is not None:
                rows = torch.randint(len(reg_images), (args.batch_size,), generator=generator, device=machine.device)
                applied = 0.25 + 0.5 * torch.rand(args.batch_size, num_levels, generator=generator, device=machine.device)
                unlabelled = common.to_float(machine.own_rows(reg_images[rows]))
                consistency = consistency_loss(train_policy, unlabelled, machine.own_rows(applied), args.transform)
                objective = objective + args.reg_weight * consistency.sum() * machine.world_size / args.batch_size
            totals[3] += objective.detach()
            optimizer.zero_grad()
            scaler.scale(objective).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
            if step % args.log_every == 0 or step == total_steps:
                loss_now, correct, rows_now, _ = common.finite_totals(machine.all_sum(totals.clone()), step, args.lr, directory)
                shown = {"loss": loss_now / rows_now, "accuracy": 100 * correct / rows_now}
                run.log(step, **shown, lr=group["lr"], queries=queries + int(rows_now))
                speed = (queries + rows_now - resumed_at) / (time.perf_counter() - clock)
                progress.set_postfix_str(f"loss {shown['loss']:.3f}, accuracy {shown['accuracy']:.1f} %, {speed:.0f} queries/s", refresh=False)
                progress.update(step - progress.n)
        epoch += 1
        loss_sum, correct, rows, _ = common.finite_totals(machine.all_sum(totals), step, args.lr, directory)
        queries += int(rows)
        if epoch % args.checkpoint_every != 0 and epoch != args.epochs:
            continue
        val_accuracy = evaluate_predictors(classifier, policy, *sets["val"], args.transform, 1, machine, ("gretta",))["gretta"]
        history.append({"epoch": epoch, "queries": queries, "loss": loss_sum / rows, "accuracy": 100 * correct / rows, "val_accuracy": val_accuracy})
        run.log(step, **history[-1])
        state = {"state_dict": policy.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        state |= {"generator": generator.get_state(), "torch_random": torch.get_rng_state(), "finished": False}
        state |= {"step": step, "epoch": epoch, "queries": queries, "queries_distillation": queries_distillation, "history": history}
        if machine.is_main:
            common.save_atomically(state, directory / "checkpoint.pt")
    progress.close()

    # The test set is read once, here.
    if machine.is_main:
        print(f"evaluating on {n_eval} images …", flush=True)
    per_set = {}
    for name, (images, labels) in tqdm(sets["test"].items(), desc="evaluate", unit="set", disable=not machine.is_main or len(sets["test"]) == 1):
        per_set[name] = evaluate_predictors(classifier, policy, images, labels, args.transform, args.steps, machine)

    def mean_over(names: list[str], predictor: str) -> float:  # the sets are equally large
        return sum(per_set[name][predictor] for name in names) / len(names)

    accuracy = {predictor: mean_over(list(per_set), predictor) for predictor in per_set[next(iter(per_set))]}
    corruptions = {}
    if args.train_on == "augmented":
        for name in common.CORRUPTIONS:
            severities = [f"{name}-{severity}" for severity in range(1, 6)]
            corruptions[name] = {predictor: 100 - mean_over(severities, predictor) for predictor in ("none", "gretta")}
        for_all = {predictor: sum(errors[predictor] for errors in corruptions.values()) / len(corruptions) for predictor in ("none", "gretta")}
        corruptions = {"corruptions": corruptions | {"mean": for_all}}
    results = {
        "script": SCRIPT,
        "dataset": args.dataset,
        "model": args.model,
        "method": args.est,
        "seed": args.seed,
        "n_train": len(train_labels),
        "n_eval": n_eval,
        "protocol": protocol_line(
            args.dataset, args.target_split, args.train_on, args.proportion, args.transform, args.steps, len(train_labels), n_eval
        ),
        "train_on": args.train_on,
        "proportion": args.proportion if args.train_on == "target" else None,
        "transform": args.transform,
        "policy": args.policy,
        "queries": queries,
        "queries_distillation": queries_distillation,
        "accuracy": accuracy,
        **corruptions,
    }
    if machine.is_main:
        shown, shown_labels = next(iter(sets["test"].values()))
        draw_examples(directory / "examples.png", classifier, policy, shown[:8], shown_labels[:8], args.transform, max(args.steps, 2), machine)
        if not use_policy:
            draw_curves(directory / "curves.png", history, val_none, f"GrETTA ({args.est}) on {args.dataset}, {args.model}, seed {args.seed}")
        if args.predict:
            predict_folder(files, pictures, directory, classifier, policy, args.transform, args.steps, machine)
    run.log(step, **{f"test_{name}": value for name, value in accuracy.items()})
    results = run.finish(results)
    if machine.is_main and not use_policy:
        common.save_atomically(state | {"finished": True}, directory / "checkpoint.pt")
    if machine.is_main:
        print_results(results, directory)


def protocol_line(dataset: str, split: str, train_on: str, proportion: float, transform: str, steps: int, n_train: int, n_eval: int) -> str:
    """One line that says how the figures were measured."""
    if train_on == "target":
        source = f"modified {dataset} made from the {split} images, 10 variants each; policy trained on {100 * proportion:g} % ({n_train} images)"
        return f"{source}, evaluated on {n_eval} images of other digits; {transform}, {steps} step{'s' * (steps > 1)}; top-1 accuracy, inputs normalised by 0.5/0.5"
    source = f"{dataset}-C generated from the {split} images, 15 corruptions x severities 1-5, {n_eval} images; policy trained on {n_train} augmented training images"
    return f"{source}; {transform}, {steps} step{'s' * (steps > 1)}; top-1 accuracy and error, mean over severities, inputs normalised by 0.5/0.5"


NAMES = {"none": "no augmentation", "five_crop": "five-crop", "ten_crop": "ten-crop", "bn_adapt": "bn_adapt", "gretta": "GrETTA"}


def print_results(results: dict, directory: Path) -> None:
    """The closing table."""
    print(f"\n{'':24s}accuracy (%)")
    for name, value in results["accuracy"].items():
        label = NAMES.get(name) or f"GrETTA, step {name.removeprefix('gretta_')}"
        print(f"{label + (' (' + results['method'] + ')' if name == 'gretta' else ''):24s}{value:12.2f}")
    if "corruptions" in results:
        print(f"\n{'top-1 error (%)':24s}{'none':>12s}{'GrETTA':>12s}")
        for name, errors in results["corruptions"].items():
            print(f"{name:24s}{errors['none']:12.2f}{errors['gretta']:12.2f}")
    print(f"\n{results['protocol']}")
    print(
        f"n_eval {results['n_eval']}, {results['queries']:,} queries to train, {results['wall_seconds']} s, {results['peak_memory_mb']:.0f} MB; results in {directory}"
    )


if __name__ == "__main__":
    common.run_script(main)
