"""Adversarial Noise Training (Rusak, Schott, Zimmermann et al. 2020, arXiv 2001.06057), the "Game of Noise".

A small generator learns the noise of a given L2 norm that hurts a classifier most; the classifier learns to bear it:
min over the classifier, max over the generator g, of E[CE(f(clip(x + η·g(z))), y)], z ~ N(0, I), with η such that the distance to x is ε.
The generator never sees the image. Gaussian and speckle noise are the baselines; ImageNet-C and ε* measure what was won.

    python game_of_noise.py                                             # ANT on digits: everything needed is in the repository
    python game_of_noise.py --mode ANT --ng-type 3x3                    # locally correlated noise
    python game_of_noise.py --mode Gauss_single                         # or Gauss_mult, Speckle, clean
    python game_of_noise.py --mode ANT+SIN --datadir-clean IMAGENET --imagenetc-path IMAGENET_C --datadir-sin STYLIZED_IMAGENET
    python game_of_noise.py -e --run-dir RUN_DIR                        # evaluate a run again
    python game_of_noise.py -e --model-name ANT3x3+SIN --datadir-clean IMAGENET --imagenetc-path IMAGENET_C      # a published model
    torchrun --nproc_per_node 2 game_of_noise.py --mode ANT

Reaches, on digits (accuracy in % on the 600 clean test digits, on digits-C, and ε*; seeds 0-2, two CPU cores): clean 99.7, 87.4, 9.3;
Gauss_single 99.1 ± 0.3, 93.0 ± 0.2, 8.8 ± 0.3; ANT 99.1 ± 0.3, 95.3 ± 0.7, 14.0 ± 0.2; ANT3x3 99.1 ± 0.1, 95.7 ± 0.3, 14.0 ± 0.5.

Differs from the published code: the generator that is trained is the one that the classifier meets, earlier ones are replayed from memory, the
clean half of a batch stays clean, and the norm after clipping is exactly ε. README.md has the whole list.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import Data, InputError, number

SCRIPT = Path(__file__).stem  # a copy of this file, changed, reports under its own name

# Settings by data set; a flag left out takes its value from here. ImageNet's are the paper's; those of digits were tuned on
# validation digits (--eval-split val). ε = 135 at 3×224×224 is a root mean square of 0.348 per value, which at 3×32×32 is 19.3: more
# than the norm of a digit on its black ground (about 15), which noise below zero can then wipe out; ε* is larger with 12.
SETTINGS = {
    "digits": {
        "model": "resnext",
        "epsilon": 12.0,
        "std_gauss": 0.3,
        "lr": 0.02,
        "lr_step": 10,
        "generator_lr": 1e-2,
        "fresh_lr": 1e-2,
        "fresh_iterations": 10,
        "star_iterations": 100,
        "epochs": 20,
        "batch_size": 50,
        "workers": 0,
    },
    "imagenet": {
        "model": "resnet50",
        "epsilon": 135.0,
        "std_gauss": 0.5,
        "lr": 1e-3,
        "lr_step": 60,
        "generator_lr": 1e-4,
        "fresh_lr": 5e-4,
        "fresh_iterations": 1000,
        "star_iterations": 1000,
        "epochs": 120,
        "batch_size": 70,
        "workers": 30,
    },
}
# Not in the paper, and not tuned: MNIST as digits, CIFAR at the ε of constant RMS, one's own pictures as ImageNet.
SETTINGS["mnist"] = SETTINGS["digits"] | {"epochs": 3, "lr_step": 2, "batch_size": 100, "fresh_iterations": 100, "star_iterations": 200}
SETTINGS["cifar10"] = SETTINGS["imagenet"] | {
    "model": "wideresnet",
    "epsilon": 19.3,
    "lr": 1e-2,
    "lr_step": 20,
    "epochs": 40,
    "batch_size": 128,
    "workers": 0,
}
SETTINGS["cifar100"] = SETTINGS["cifar10"]
SETTINGS["folder"] = SETTINGS["imagenet"]
SETTINGS["fake"] = SETTINGS["cifar10"] | {"fresh_iterations": 10, "star_iterations": 10, "epochs": 2}

MODES = ("ANT", "ANT+SIN", "Gauss_single", "Gauss_mult", "Speckle", "clean")
ARCHITECTURES = {"inceptionV3": "inception_v3"}  # the published code's name: torchvision's
SIGMAS = {"Gauss_mult": (0.08, 0.12, 0.18, 0.26, 0.38), "Speckle": (0.15, 0.2, 0.35, 0.45, 0.6)}  # drawn per image
SIN_IMAGES = 15  # stylised images that --mode ANT+SIN adds to a batch of 70

# The models that were published with the paper
RELEASES = tuple(name for name, published in common.PUBLISHED_WEIGHTS.items() if published.url.startswith(common.GAME_OF_NOISE))
MODEL_NAMES = ("clean", *RELEASES, "ANT-SIN", "Gauss_single")

# Errors (%) of AlexNet on ImageNet-C, mean over severities (Hendrycks & Dietterich 2019): what an mCE of 100 is
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}


def by_data_set(name: str) -> str:
    """The part of a help text that shows a setting's defaults."""
    return "(default: " + ", ".join(f"{SETTINGS[dataset][name]:g} for {dataset}" for dataset in ("digits", "imagenet")) + ")"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(description=__doc__)
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=number(int, 0), default=0, help="of everything random in the method")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    add("--amp", action="store_true", help="mixed precision: bfloat16, or float16 on GPUs without it")
    add("--compile", action="store_true", help="torch.compile the classifier")
    add("--run-dir", metavar="DIR", help="where the run is written (default: runs/game_of_noise/…)")
    add("--resume", action="store_true", help="continue what --run-dir holds")
    add("--checkpoint-every", type=number(int, 1), default=1, metavar="EPOCHS", help="epochs between checkpoints")
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
        help="only evaluate: the run in --run-dir, --weights, or the model named by --model-name; also writes Results/<method>_evaluation_results.txt",
    )
    add("--model-name", choices=MODEL_NAMES, help="what to evaluate: clean, or (imagenet) a model published with the paper (default: clean)")
    add("--dry-run", action="store_true", help="one small step of every phase, same outputs; downloads nothing")
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        choices=tuple(SETTINGS),
        type=common.dataset_name,
        help="digits comes with the repository (default: digits; imagenet where one of its folders is named)",
    )
    add("--data-root", default="data", metavar="DIR", help="where the data sets lie; with --dataset folder, your train/ and val/ or test/")
    add("--fake-shape", type=common.fake_shape, default=common.FAKE_SHAPE, metavar="N,CLASSES,H,W", help="of --dataset fake: random images")
    add("--datadir-clean", metavar="DIR", help="ImageNet: a folder with train/ and val/ (default: <data-root>/imagenet)")
    add(
        "--imagenetc-path",
        "--corruptions-path",
        metavar="DIR",
        help="ImageNet-C, <corruption>/<severity>/<class>/, or another corrupted test set (default: CIFAR-10-C, imagenet-c, … in --data-root)",
    )
    add("--generate-corruptions", action="store_true", help="make the 15 corruptions of the test images where the published ones are not on disk")
    add("--datadir-sin", metavar="DIR", help="Stylized-ImageNet: a folder with train/, for --mode ANT+SIN (default: <data-root>/sin)")
    add("-j", "--workers", type=number(int, 0), help=f"processes that decode pictures, at most one per core {by_data_set('workers')}")
    add("-tb", "--test-batch-size", type=number(int, 1), default=256, help="images per batch when pictures on disk are evaluated")
    add("--eval-split", choices=("val", "test"), default="test", help="images that are evaluated; val is for tuning")
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        "--arch",
        help="digits: resnext, wideresnet; imagenet: resnet18, resnet50, resnet152, inceptionV3, or another model of torchvision (default: resnext, resnet50)",
    )
    add(
        "--weights",
        metavar="FILE",
        help="a checkpoint, or a name of weights/README.md, to start from or to evaluate (default: shipped in weights/ for digits, torchvision's for imagenet)",
    )
    add = parser.add_argument_group("method").add_argument
    add("--mode", choices=MODES, default="ANT", help="noise in training; SIN adds stylised images; clean evaluates the weights as they are")
    add("--ng-type", choices=("1x1", "3x3"), default="1x1", help="generator of uncorrelated or of locally correlated noise")
    add("--epsilon", type=number(float, 0, open_low=True), help=f"L2 norm of the noise after clipping, pixels in [0, 1] {by_data_set('epsilon')}")
    add("--std-gauss", type=number(float, 0, open_low=True), help=f"σ of --mode Gauss_single {by_data_set('std_gauss')}")
    add("--clean-share", type=number(float, 0, 1), default=0.5, help="share of a batch that stays clean")
    add(
        "--replay-share",
        type=number(float, 0, 1),
        default=0.2,
        help="share under two earlier generators, from the second epoch on; the rest meets the current one",
    )
    add(
        "--reset-generator",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the fresh generator of every epoch replaces the current one, as in the paper",
    )
    add(
        "--generator-epochs",
        type=number(int, 0),
        metavar="EPOCHS",
        help="epochs after which the generator of the game is trained no more (default: never; with 1 and --no-reset-generator, the published code's fault)",
    )
    add(
        "--fresh-iterations",
        type=number(int, 1),
        help=f"steps that train a fresh generator against the frozen classifier {by_data_set('fresh_iterations')}",
    )
    add("--star-iterations", type=number(int, 1), help=f"steps that train the generator for ε*, at the end {by_data_set('star_iterations')}")
    add = parser.add_argument_group("optimiser").add_argument
    add("--lr", type=number(float, 0, open_low=True), help=f"of the classifier: SGD, momentum 0.9 {by_data_set('lr')}")
    add("--lr-step", type=number(int, 1), metavar="EPOCHS", help=f"epochs after which --lr falls to a tenth {by_data_set('lr_step')}")
    add("--generator-lr", type=number(float, 0, open_low=True), help=f"of the generator in the game: Adam {by_data_set('generator_lr')}")
    add("--fresh-lr", type=number(float, 0, open_low=True), help=f"of a fresh generator: Adam {by_data_set('fresh_lr')}")
    add("--epochs", type=number(int, 0), help=f"passes over the training set; --mode clean trains none {by_data_set('epochs')}")
    add("--batch-size", type=number(int, 2), help=f"images per step over all ranks, clean and noisy {by_data_set('batch_size')}")

    def published(given: argparse.Namespace) -> dict:
        folders = given.datadir_clean or given.imagenetc_path or given.datadir_sin
        dataset = given.dataset or ("imagenet" if folders else "digits")
        return {"dataset": dataset} | SETTINGS[dataset] | ({"epochs": 0} if given.mode == "clean" else {})

    args = parser.parse(argv, published)
    if args.clean_share + args.replay_share > 1:
        parser.error(f"--clean-share {args.clean_share:g} and --replay-share {args.replay_share:g} are more than 1 together")
    if args.model_name and not args.evaluate:
        parser.error(f"--model-name {args.model_name} says what to evaluate: add --evaluate")
    if args.mode == "clean" and args.epochs:
        parser.error(f"--mode clean evaluates the weights as they are: leave out --epochs {args.epochs}, or choose a noise")
    if args.model_name == "ANT-SIN":
        args.model_name = "ANT+SIN"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Noise: of a given norm after clipping, from a generator or from a distribution
# ---------------------------------------------------------------------------------------------------------------------


def project(images: torch.Tensor, noise: torch.Tensor, epsilon: float | torch.Tensor) -> torch.Tensor:
    """clip(x + η·δ, 0, 1) with, per image, the η ≥ 0 for which its L2 distance to x is ε: the paper's constraint, solved exactly.

    images (B, 3, H, W) in [0, 1]; noise the same shape, its scale is of no matter; epsilon > 0, a number or (B,). Returns noisy images,
    differentiable in images and noise. Where ε is beyond reach every pixel whose noise is not zero is at 0 or 1 (no noise: the image
    itself). Raises InputError for a number ε ≤ 0 and for shapes that differ.

    With s = η² the squared distance is Σ min(s·δᵢ², mᵢ²), mᵢ the room that pixel i has in its direction: piecewise linear and concave in s.
    Newton's method reaches its root from the left without overshooting, in a few passes where sorting all breakpoints would take more.
    """
    if images.shape != noise.shape:
        raise InputError(f"noise is {tuple(noise.shape)}, but the images are {tuple(images.shape)}")
    if not isinstance(epsilon, torch.Tensor) and not epsilon > 0:
        raise InputError(f"epsilon is {epsilon}, but a norm is > 0")
    epsilon = torch.as_tensor(epsilon, dtype=images.dtype, device=images.device).expand(len(images))
    rows = max(1, 2**19 // max(1, images.shape[1:].numel()))
    if images.device.type == "cpu" and len(images) > rows:  # parts that stay in the cache are 2 to 3 times faster
        return torch.cat([project(*part) for part in zip(images.split(rows), noise.split(rows), epsilon.split(rows))])
    x, delta = images.flatten(1), noise.flatten(1).to(images.dtype)  # (B, D)
    target = epsilon.square()
    with torch.no_grad():  # the largest |δᵢ| becomes 1, so that no square overflows
        scale = torch.linalg.vector_norm(delta, math.inf, dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).reciprocal()
    delta = delta * scale
    room = torch.where(delta > 0, 1 - x, x).square()
    with torch.no_grad():
        power = delta.square()
        s = target / power.sum(1)
        if power.shape[1] >= 4096:  # start near the root: that of every 16th pixel
            few = newton_root(power[:, ::16].contiguous(), room[:, ::16].contiguous(), target / 16, s)
            s = torch.where(few.isfinite(), few, s)
        s = newton_root(power, room, target, s)
        saturated = power * s[:, None] >= room
        reached = s.isfinite()
    # One more step of Newton's, this time with gradients: η through the pixels that are not clipped. Where hardly any are left, rounding is larger than
    # what it would change: s stays.
    slope = (delta.square() * ~saturated).sum(1)
    squared = (target - (room * saturated).sum(1)) / torch.where(reached & (slope > 0), slope, 1.0)
    trusted = reached & (slope > 0) & (squared > 0.999 * s)
    eta = torch.where(trusted, squared, torch.where(reached, s, 1.0)).sqrt()
    if images.device.type != "cpu" or not reached.all():  # beyond reach: the saturated image; NaN stays NaN, whose sign is 0
        delta = torch.where(reached[:, None], delta, delta.sign() + 0 * delta)
    return (x + eta[:, None] * delta).clamp(0, 1).view(images.shape)


def newton_root(power: torch.Tensor, room: torch.Tensor, target: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The s (B,) with Σ min(s·power, room) = target over the rows of power and room (B, D), to 5e-5 of √target; inf where there is none."""
    lowest = torch.zeros_like(s)  # the first step may come from the right; from then on s only grows, but for rounding
    for iteration in range(100):  # finite, and in practice 3 to 6
        saturated = power * s[:, None] >= room
        slope = (power * ~saturated).sum(1)
        new = torch.maximum((target - (room * saturated).sum(1)) / slope, lowest)
        new = torch.where(slope > 0, new, math.inf)  # nothing is left that could grow
        moving = (new - s).abs() > 1e-4 * s
        s, lowest = new, 0.999 * new
        if (s.device.type == "cpu" or iteration % 4 == 3) and not moving.any():  # a GPU is asked seldom, as it has to stop for the answer
            break
    return s


class NoiseGenerator(nn.Module):
    """δ = g(z), z ~ N(0, I): convolutions 3→20→20→20→3 with ReLU between, and z added (Rusak et al. 2020).

    "1x1" keeps pixels independent; "3x3", whose second convolution is 3×3, correlates neighbours and takes z one pixel wider on each side.
    Weights start at N(0, 0.01²), biases at 0, so the noise starts as Gaussian noise.
    """

    def __init__(self, ng_type: str, generator: torch.Generator | None = None):
        super().__init__()
        self.border = {"1x1": 0, "3x3": 1}[ng_type]
        kernels = (1, 1 + 2 * self.border, 1, 1)
        channels = (3, 20, 20, 20, 3)
        self.convolutions = nn.ModuleList(nn.Conv2d(*channels[i : i + 2], kernels[i]) for i in range(4))
        for convolution in self.convolutions:
            nn.init.normal_(convolution.weight, 0, 0.01, generator=generator)
            nn.init.zeros_(convolution.bias)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = z  # (B, 3, H + 2·border, W + 2·border)
        for convolution in self.convolutions[:-1]:
            x = F.relu(convolution(x))
        border = self.border
        return self.convolutions[-1](x) + z[..., border : z.shape[-2] - border, border : z.shape[-1] - border]  # (B, 3, H, W)


def draw_z(count: int, images: torch.Tensor, border: int, generator: torch.Generator) -> torch.Tensor:
    """Standard normal input (count, 3, H + 2·border, W + 2·border) for noise on images of that size; alike on every rank."""
    height, width = images.shape[-2:]
    return torch.randn(count, 3, height + 2 * border, width + 2 * border, generator=generator, device=images.device)


def share_counts(batch_size: int, clean_share: float, replay_share: float, earlier: bool) -> list[int]:
    """How many images of a batch are clean, meet the current generator, and two earlier ones (none in the first epoch)."""
    clean = round(batch_size * clean_share)
    replay = round(batch_size * replay_share / 2) if earlier else 0
    replay = min(replay, (batch_size - clean) // 2)
    return [clean, batch_size - clean - 2 * replay, replay, replay]


def own_counts(counts: list[int], machine: common.Machine) -> list[int]:
    """This rank's part of consecutive stretches of a batch, where `machine.own_rows` takes its part of the batch."""
    total, edge, own = sum(counts), 0, []
    low, high = machine.rank * total // machine.world_size, (machine.rank + 1) * total // machine.world_size
    for count in counts:
        own.append(max(0, min(edge + count, high) - max(edge, low)))
        edge += count
    return own


@torch.no_grad()
def mixed_batch(images: torch.Tensor, z: torch.Tensor, generators: list[Callable], counts: list[int], epsilon: float) -> torch.Tensor:
    """The first counts[0] images as they are, the next counts[1] under generators[0]'s noise, and so on; (B, 3, H, W), a new tensor.

    images (B, 3, H, W) in [0, 1], z (B, 3, H + 2·border, W + 2·border), counts one longer than generators, with sum B.
    """
    clean, *rest = images.split(counts)
    parts = z.contiguous(memory_format=torch.channels_last).split(counts)[1:]  # several times as fast through the generators' narrow convolutions
    noise = [generate(part).float() for generate, part in zip(generators, parts) if len(part)]
    if not noise:
        return clean.clone()
    return torch.cat([clean, project(torch.cat(rest), torch.cat(noise), epsilon)])


@torch.no_grad()
def baseline_batch(images: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, mode: str, clean: int) -> torch.Tensor:
    """The first `clean` images as they are, the others under Gaussian noise x + σ·z or, mode Speckle, x + x·σ·z, clipped; sigma (B,)."""
    noise = sigma[clean:, None, None, None] * z[clean:]
    noisy = images[clean:] + (noise * images[clean:] if mode == "Speckle" else noise)
    return torch.cat([images[:clean], noisy.clamp(0, 1)])


# ---------------------------------------------------------------------------------------------------------------------
# Objective of the generator, and the distance ε*
# ---------------------------------------------------------------------------------------------------------------------


def noise_loss(
    classifier: nn.Module, generate: Callable, images: torch.Tensor, labels: torch.Tensor, z: torch.Tensor, epsilon: float, machine: common.Machine
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of CE(f(clip(x + η·g(z))), y) that the generator maximises, and the number of answers that are still right. The classifier is in
    eval mode."""
    with machine.autocast():
        noise = generate(machine.layout(z))
    noisy = machine.layout(project(images, noise.float(), epsilon))
    with machine.autocast(), common.affine_batch_norm(classifier, machine):
        logits = classifier(noisy).float()
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.detach().argmax(1) == labels).sum()


def ascend(
    loss: torch.Tensor, noise_generator: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, machine: common.Machine
) -> None:
    """One step up the gradient of `loss`, summed over ranks, in the generator's parameters alone: the classifier's get none."""
    parameters = list(noise_generator.parameters())
    gradients = torch.autograd.grad(scaler.scale(loss), parameters)
    flat = machine.all_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, gradient in zip(parameters, flat.split([parameter.numel() for parameter in parameters])):
        parameter.grad = gradient.view_as(parameter)
    scaler.step(optimizer)
    scaler.update()


def adam(noise_generator: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(noise_generator.parameters(), lr=lr, maximize=True, fused=True)


def train_fresh_generator(
    classifier: nn.Module,
    ng_type: str,
    batches: Callable[[], Iterator],
    epsilon: float,
    lr: float,
    iterations: int,
    batch_size: int,
    generator: torch.Generator,
    machine: common.Machine,
    description: str,
) -> tuple[NoiseGenerator, list[float], float]:
    """A generator trained from scratch against the frozen classifier (in eval mode): it, the loss at every step, and the accuracy (%) that
    the classifier keeps over the last tenth of the steps. `batches` gives one shuffled epoch of images and labels each time it is called."""
    training = classifier.training
    classifier.eval()
    fresh = NoiseGenerator(
        ng_type, generator=torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
    )
    fresh.to(machine.device)
    optimizer, scaler = adam(fresh, lr), common.grad_scaler(machine)
    losses = torch.zeros(iterations, device=machine.device)
    right = torch.zeros(iterations, device=machine.device)
    epoch = iter(())
    for iteration in tqdm(range(iterations), desc=description, unit="step", leave=False, disable=not machine.is_main):
        images, labels = next(epoch, (None, None))
        if images is None:
            epoch = batches()
            images, labels = next(epoch)
        z = machine.own_rows(draw_z(batch_size, images, fresh.border, generator))
        loss, correct = noise_loss(classifier, fresh, images, labels, z, epsilon, machine)
        ascend(loss / batch_size, fresh, optimizer, scaler, machine)
        losses[iteration], right[iteration] = loss.detach() / batch_size, correct / batch_size
    classifier.train(training)
    last = max(1, iterations // 10)
    losses = machine.all_sum(losses).tolist()
    for iteration, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise InputError(f"the loss of a fresh generator is not finite at its step {iteration + 1} (--fresh-lr {lr:g}): lower --fresh-lr or --lr")
    return fresh, losses, 100 * machine.all_sum(right)[-last:].mean().item()


@torch.no_grad()
def epsilon_star(model: Callable, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The smallest L2 distance (B,) along each image's noise, clipped to [0, 1], at which the classifier is wrong (ε* of Rusak et al. 2020).

    model maps images (B, 3, H, W) in [0, 1] to logits; labels (B,); noise as images. The distance is doubled from √D/1024 until the answer is
    wrong, then the last interval is halved twelve times. 0 where the answer is wrong without noise; D = 3·H·W where it stays right however
    strong the noise. The paper's ε* is the median over test images.
    """
    if not len(images):
        return labels.float()
    dimension = images[0].numel()
    right = model(images).argmax(1) == labels
    low = torch.zeros(len(images), device=images.device)
    high = torch.full_like(low, math.inf)
    # Doubling; only images not yet bracketed are asked for, and when none is left it ends.
    active = right.nonzero()[:, 0]
    reach = (project(images, noise, float(dimension)) - images).flatten(1).norm(dim=1)  # to the saturated image
    epsilon = math.sqrt(dimension) / 1024
    while len(active):
        distances = reach[active].clamp(max=epsilon)
        wrong = model(project(images[active], noise[active], distances)).argmax(1) != labels[active]
        high[active] = torch.where(wrong, distances, math.inf)
        low[active] = torch.where(wrong, low[active], distances)
        active = active[~wrong & (distances < reach[active])]
        epsilon *= 2
    # Bisection of all brackets together.
    active = high.isfinite().nonzero()[:, 0]
    for _ in range(12 if len(active) else 0):
        middle = (low[active] + high[active]) / 2
        wrong = model(project(images[active], noise[active], middle)).argmax(1) != labels[active]
        high[active] = torch.where(wrong, middle, high[active])
        low[active] = torch.where(wrong, low[active], middle)
    distances = torch.where(high.isfinite(), high, float(dimension))
    return torch.where(right, distances, 0.0) + 0 * noise.flatten(1).sum(1)  # NaN for noise that is not finite


# ---------------------------------------------------------------------------------------------------------------------
# Data and evaluation
# ---------------------------------------------------------------------------------------------------------------------


def stylised_images(directory: Path, dataset: str, clean: str | Path | None, data_root: str) -> Data:
    """Stylized-ImageNet's train/, once its classes are found to be those of the clean pictures. Raises InputError."""
    advice = "Stylized-ImageNet is made with https://github.com/rgeirhos/Stylized-ImageNet; name its folder, which holds train/, with --datadir-sin"
    (_, _, where), classes = common.find_folders(dataset, Path(clean or data_root), clean is not None, False)
    common.check_classes(directory / "train", common.class_folders(directory / "train", advice), classes, where)
    return common.class_folder(directory / "train", classes)


def mean_accuracies(severities: dict[str, list[float]], names: tuple[str, ...]) -> dict[str, float]:
    """Accuracy per named corruption, mean over severities; then `mean`, and `mean_without_noises`, which leaves out those called noise."""
    means = {name: sum(severities[name]) / len(severities[name]) for name in names}
    others = [name for name in names if not name.endswith("_noise")]
    return means | {"mean": sum(means.values()) / len(means), "mean_without_noises": sum(means[name] for name in others) / len(others)}


def mean_corruption_error(accuracy: dict[str, float], reference_errors: dict[str, float], smallest: float) -> float:
    """mCE (%): the mean over corruptions of our error over the reference's, both means over severities (Hendrycks & Dietterich 2019).

    smallest: the least error (%) that a set can show, one image; a reference without an error counts as half of that, and so do we beside it.
    """
    ratios = []
    for name, reference in reference_errors.items():
        error = 100 - accuracy[name]
        if reference < smallest / 2:
            error, reference = max(error, smallest / 2), smallest / 2
        ratios.append(error / reference)
    return 100 * sum(ratios) / len(ratios)


EPSILON_STAR_IMAGES = 1000  # ε* is the median over so many test images at most


def median_epsilon_star(
    classifier: nn.Module, noise_generator: NoiseGenerator, data: Data, workers: int, generator: torch.Generator, machine: common.Machine
) -> float:
    """ε*: the median over test images of `epsilon_star` along a generator's noise."""
    images, labels = common.gather_images(data, EPSILON_STAR_IMAGES, workers, machine)
    z = draw_z(len(labels), images, noise_generator.border, generator)
    images, labels, z = (machine.own_rows(part) for part in (images, labels, z))

    def model(batch: torch.Tensor) -> torch.Tensor:
        with machine.autocast():
            return classifier(batch.contiguous(memory_format=torch.channels_last)).float()

    classifier.eval()
    distances = []
    chunk = min(machine.chunk(*images.shape[2:]), 256)
    for part, part_labels, part_z in zip(images.split(chunk), labels.split(chunk), z.split(chunk)):
        with torch.no_grad():
            noise = noise_generator(part_z).float()
        distances.append(epsilon_star(model, common.to_float(part), part_labels, noise))
    return machine.all_rows(torch.cat(distances)).median().item()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_noise(file: Path, generators: dict[str, NoiseGenerator], size: int, generator: torch.Generator, device: torch.device) -> None:
    """The densities of the noise that the generators learned, of the mean over colours and of each colour, beside a Gaussian. Each noise is divided by its
    root mean square, which the projection sets anyway."""
    import matplotlib.figure

    bins = torch.linspace(-4, 4, 81)
    middles = (bins[1:] + bins[:-1]) / 2
    figure = matplotlib.figure.Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2)
    blank = torch.zeros(1, 3, size, size, device=device)
    for position, (name, noise_generator) in enumerate(generators.items()):
        noise = noise_generator(draw_z(max(1, 2**18 // size**2), blank, noise_generator.border, generator)).float().cpu()
        noise = noise / noise.square().mean().sqrt()
        grey = noise.mean(1) * math.sqrt(3)
        style = {"color": f"C{position}", "linewidth": 1.4}
        axes[0].plot(middles, torch.histogram(grey.flatten(), bins, density=True).hist, label=name, **style)
        for channel, dashes in enumerate(("-", "--", ":")):
            density = torch.histogram(noise[:, channel].flatten(), bins, density=True).hist
            axes[1].plot(middles, density, linestyle=dashes, label=name if channel == 0 else None, **style)
    gaussian = (-(middles**2) / 2).exp() / math.sqrt(2 * math.pi)
    for axis, title in zip(axes, ("mean over colours, times √3", "red (solid), green (dashed), blue (dotted)")):
        axis.fill_between(middles, gaussian, color="0.85", label="Gaussian")
        axis.set(xlabel="noise per pixel / root mean square", ylabel="density", title=title)
        axis.legend(fontsize=8)
    figure.suptitle("What the generators learned")
    figure.savefig(file)


@torch.no_grad()
def draw_examples(
    file: Path,
    classifier: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    rows: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    machine: common.Machine,
) -> None:
    """Images (columns) clean and under each noise (rows), with the class that the classifier sees, green where it is right."""
    import matplotlib.figure

    classifier.eval()
    figure = matplotlib.figure.Figure(figsize=(1.35 * len(images) + 1, 1.6 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for row, (name, change) in enumerate(rows.items()):
        shown = change(common.to_float(images))
        with machine.autocast():
            classes = classifier(shown.contiguous(memory_format=torch.channels_last)).argmax(1)
        distances = (shown - common.to_float(images)).flatten(1).norm(dim=1)
        for column, axis in enumerate(axes[row]):
            axis.imshow(shown[column].permute(1, 2, 0).cpu().numpy(), vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            right = classes[column] == labels[column]
            axis.set_title(f"{classes[column].item()}", fontsize=9, color="tab:green" if right else "tab:red", pad=2)
        axes[row, 0].set_ylabel(f"{name}\nε = {distances.mean().item():.1f}" if row else name, fontsize=9)
    figure.savefig(file)


@torch.no_grad()
def draw_patches(file: Path, generators: dict[str, NoiseGenerator], generator: torch.Generator, device: torch.device) -> None:
    """28 px patches of the noise, one row per generator, from its 1st to its 99th percentile, with Gaussian noise below."""
    import matplotlib.figure

    rows = dict(generators) | {"Gaussian": None}
    figure = matplotlib.figure.Figure(figsize=(9.5, 1.35 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), 6, squeeze=False)
    blank = torch.zeros(1, 3, 28, 28, device=device)
    for row, (name, noise_generator) in enumerate(rows.items()):
        z = draw_z(6, blank, noise_generator.border if noise_generator else 0, generator)
        noise = (noise_generator(z) if noise_generator else z).float().cpu()
        low, high = torch.quantile(noise.flatten(), torch.tensor([0.01, 0.99]))
        for axis, patch in zip(axes[row], ((noise - low) / (high - low)).clamp(0, 1)):
            axis.imshow(patch.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name, fontsize=9)
    figure.savefig(file)


def draw_corruptions(file: Path, accuracy: dict[str, dict[str, float]], title: str) -> None:
    """Accuracy per corruption, before and after, as bars."""
    import matplotlib.figure

    names = list(next(iter(accuracy.values())))
    figure = matplotlib.figure.Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(accuracy)
    for position, (label, values) in enumerate(reversed(accuracy.items())):
        places = [number + width * (position - (len(accuracy) - 1) / 2) for number in range(len(names))]
        axis.bar(places, [values[name] for name in names], width, label=label, color=("0.65", "tab:blue")[position - len(accuracy)])
    axis.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=7)
    axis.set(ylabel="accuracy (%), mean over severities", ylim=(0, 100), title=title)
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(file)


def draw_curves(file: Path, history: list[dict], title: str) -> None:
    """Per epoch: the loss; the accuracy on clean validation images and on training images under the noise, and what a fresh generator leaves of it."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = {
        "val_accuracy": "clean validation images",
        "accuracy_clean": "training, clean share",
        "accuracy_noisy": "training, noisy share",
        "robust_accuracy": "fresh generator, before the epoch",
    }
    epochs = [entry["epoch"] for entry in history]
    left.plot(epochs, [entry["loss"] for entry in history], color="black", marker="o", markersize=3)  # the legend's colours are the right one's
    left.set(xlabel="epoch", ylabel="cross entropy", title="training loss, mean of each epoch")
    for key, label in curves.items():
        if key in history[0]:
            right.plot(epochs, [entry[key] for entry in history], marker="o", markersize=3, label=label)
    right.set(xlabel="epoch", ylabel="accuracy (%)", title="accuracy")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.locator_params(axis="x", integer=True)
    figure.legend(loc="outside lower right", ncols=4, fontsize=9)
    figure.suptitle(title)
    figure.savefig(file)


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def method_name(mode: str, ng_type: str) -> str:
    """The paper's name of a mode: ANT with 3×3 generators is ANT3x3."""
    return mode.replace("ANT", "ANT3x3") if ng_type == "3x3" else mode


def find_weights(dataset: str, model: str, name: str, dry_run: bool, machine: common.Machine) -> Path | None:
    """The file of the model that --model-name names (None for `clean`, which is what training starts from, and in a dry run that lacks it)."""
    if name == "clean":
        return None
    if dataset != "imagenet":
        file = common.WEIGHTS / f"{dataset}-{model}-{name}.pt"
        if not file.is_file():
            raise InputError(f"{file} does not exist: name a run with --run-dir, or a checkpoint with --weights")
        return file
    if name not in RELEASES or model != "resnet50":
        raise InputError(f"--model-name {name}: published are {', '.join(RELEASES)}, as resnet50; give any other model's checkpoint with --weights")
    return common.published_file(name, machine, dry_run)


def main() -> None:
    started = time.perf_counter()
    args = parse_args()
    machine = common.start_machine(args.device, args.amp, args.seed)
    ant = args.mode.startswith("ANT")
    checkpoint = Path(args.run_dir or "") / "checkpoint.pt"
    named = args.model_name or args.weights != common.arguments_of_run(checkpoint.parent).get("weights")  # to evaluate something else
    use_run = common.has_checkpoint(args.run_dir) and (args.resume or (args.evaluate and not named))
    in_place = bool(use_run and args.evaluate)  # the run's own directory is evaluated again
    if args.evaluate and args.run_dir and not (in_place or args.model_name or args.weights):
        raise InputError(f"{checkpoint} does not exist: name a run of {SCRIPT} with --run-dir, or what to evaluate with --model-name or --weights")
    if in_place:
        names = ("dataset", "model", "mode", "ng_type", "seed", "eval_split", "epsilon", "fresh_lr", "star_iterations", "batch_size")
        names += ("generate_corruptions",)
        asked = {name: getattr(args, name) for name in names}
        common.check_in_place(checkpoint.parent, asked, args.dry_run, f"evaluate --weights {checkpoint} instead")
    method = method_name(args.mode, args.ng_type)
    if args.evaluate and not in_place:
        file = Path(args.weights or "clean")  # a run's checkpoint goes by the name of its directory, a published one by its own
        published = args.weights if args.weights in common.PUBLISHED_WEIGHTS else None
        method = args.model_name or published or (file.resolve().parent.name if file.name == "checkpoint.pt" else file.stem)

    # Data: everything is looked for before the first file is written.
    in_folders = args.dataset in ("imagenet", "folder")
    if "SIN" in args.mode and not args.evaluate and not in_folders:
        raise InputError(
            f"--mode {args.mode} needs ImageNet (--datadir-clean) and Stylized-ImageNet (--datadir-sin): there is no stylised {args.dataset}"
        )
    sets = common.load_sets(
        args.dataset,
        args.data_root,
        machine,
        split=args.eval_split,
        validation=not in_folders or args.eval_split == "val",
        train=not args.evaluate,
        corruptions="needed",
        generate=args.generate_corruptions,
        clean_directory=args.datadir_clean,
        corrupted_directory=args.imagenetc_path,
        fake_shape=args.fake_shape,
        dry_run=args.dry_run,
    )
    stylised_data = None
    if "SIN" in args.mode and not args.evaluate:
        stylised_data = stylised_images(Path(args.datadir_sin or Path(args.data_root) / "sin"), args.dataset, args.datadir_clean, args.data_root)
    augmentation = common.crop_and_flip if args.dataset.startswith("cifar") else common.mild_augmentation
    n_train, n_test = common.count_images(sets.train), common.count_images(sets.test)
    if args.dry_run:
        args.batch_size, args.epochs, args.fresh_iterations, args.star_iterations = min(args.batch_size, 6), min(args.epochs, 2), 1, 1
    args.batch_size = min(args.batch_size, n_train or n_test)  # a small set of one's own: the whole of it is a batch
    if args.batch_size < machine.world_size:
        raise InputError(f"a batch of {args.batch_size} is smaller than the {machine.world_size} processes: raise --batch-size")
    sin_size = max(math.ceil(SIN_IMAGES * args.batch_size / 70), machine.world_size) if stylised_data is not None else 0
    if common.count_images(stylised_data) < sin_size:
        raise InputError(f"{common.count_images(stylised_data)} stylised images are fewer than the {sin_size} that a batch takes: see --datadir-sin")
    workers = 0 if args.dry_run else machine.workers(args.workers)
    steps_per_epoch = (1 if args.dry_run else n_train // args.batch_size) if n_train else 0
    directory = Path(args.run_dir) if in_place else common.run_directory(SCRIPT, vars(args), method, machine)

    # What a run cannot change when it is continued: the meaning of its history, its place in the schedule, its images.
    names = ("dataset", "model", "mode", "ng_type", "seed", "epsilon", "batch_size", "epochs", "eval_split")
    names += ("clean_share", "replay_share", "reset_generator", "generator_epochs", "std_gauss", "weights")
    fixed = {key: getattr(args, key) for key in names}
    saved = common.read_checkpoint(directory, "remove the directory to start afresh") if use_run else None
    if saved is not None and (saved.get("script") != "game_of_noise" or saved.get("method") != method):
        raise InputError(f"{checkpoint} holds no run of {SCRIPT} with {method}: choose another --run-dir, or evaluate it with --weights")
    if saved is not None:
        common.check_run(saved, checkpoint, step=int, epoch=int, history=list, memory=list, finished=bool, fixed=dict)
    if saved is not None and not in_place:
        common.check_unchanged(saved, fixed, checkpoint)

    # Models.
    architecture = ARCHITECTURES.get(args.model, args.model)
    classifier = common.build_model(architecture, sets.num_classes, args.dataset)
    common.check_input_size(classifier, args.model, sets.size)
    final = checkpoint if use_run else None  # what takes the place of what training starts, or started, from
    if args.evaluate and not use_run and args.weights:
        final = common.find_checkpoint(args.weights, machine, args.dry_run)
    elif args.evaluate and not use_run:
        final = find_weights(args.dataset, args.model, method, args.dry_run, machine)
    lacking = args.evaluate and final is None and method != "clean"  # a dry run without the file: the model stays untrained
    # The model before training is evaluated too, and is what mCE refers to (on ImageNet that is AlexNet). Of a checkpoint, that is not known.
    has_before = not args.evaluate or args.dataset == "digits" or (in_place and args.dataset != "imagenet")
    origin = None
    if args.weights and (has_before if in_place else not args.evaluate):
        origin = common.load_checkpoint(classifier, args.weights, machine, args.dry_run)
    elif (has_before or final is None) and not lacking:
        origin = common.load_pretrained(classifier, architecture, args.dataset, machine, args.data_root, args.dry_run)
    before = copy.deepcopy(classifier) if has_before else None
    if saved is not None:
        common.load_content(classifier, saved, checkpoint)
    elif final is not None:
        common.load_weights(classifier, final)
    for model in filter(None, (classifier, before)):
        model.to(machine.device, memory_format=machine.weight_layout)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=args.lr, momentum=0.9, fused=True)
    scaler = common.grad_scaler(machine)
    generator = torch.Generator(machine.device).manual_seed(args.seed)  # alike on every rank: order, augmentation, noise
    current = generator_optimizer = None  # the generator of the game
    memory: list[dict] = []  # the parameters of the generator at the end of every earlier epoch
    step = epoch = 0
    history: list[dict] = []
    place, robust, chosen = common.EPOCH_START, {}, []  # within an epoch: what the fresh generator left, which earlier generators meet each batch
    totals = torch.zeros(5, device=machine.device)  # sums over the epoch: loss, right and rows of the clean share, of the noisy share

    # What the run's directory holds already.
    if saved is not None:
        step, epoch, history = saved["step"], saved["epoch"], saved["history"]
        with common.reading_run(checkpoint, "choose another --run-dir"):
            memory = [{key: value.to(machine.device) for key, value in parameters.items()} for parameters in saved["memory"]]
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
            if saved["current"] is not None:
                current = NoiseGenerator(args.ng_type).to(machine.device)
                current.load_state_dict(saved["current"])
                generator_optimizer = adam(current, args.generator_lr)
                generator_optimizer.load_state_dict(saved["generator_optimizer"])
                generator_optimizer.param_groups[0]["lr"] = args.generator_lr  # it may be another from now on, as --lr
            scaler.load_state_dict(saved["scaler"])
            place, totals = common.restore_place(saved, generator), common.restore_totals(saved["totals"], machine)
            robust, chosen = saved["robust"], saved["chosen"]
            common.restore_random_states(saved["random_states"], machine)
    arguments = vars(args) | {"run_dir": str(directory)}
    run = common.Run(directory, machine, None if in_place else arguments, step if saved else None, started)
    if machine.is_main:
        print(" ".join(f"{key}={value}" for key, value in arguments.items()))
        counts = share_counts(args.batch_size, args.clean_share, args.replay_share, True)
        shares = f"{counts[0]} clean, {counts[1]} current, {counts[2]} + {counts[3]} earlier noise" if ant else f"{counts[0]} clean"
        print(f"{n_train} training images, {steps_per_epoch} steps per epoch, batches of {args.batch_size} ({shares}); {n_test} test images")
        print(f"classifier: {final or origin or 'untrained'}")
        if args.resume and saved is None:
            print(f"{directory} holds no checkpoint: starting afresh")

    def checkpoint_state(batches: int = 0, finished: bool = False) -> dict:
        """After so many batches of the epoch; on every rank alike but for the random states, which are gathered."""
        state = {"script": "game_of_noise", "method": method, "fixed": fixed, "finished": finished, "step": step, "epoch": epoch, "history": history}
        state |= {"state_dict": classifier.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "memory": memory}
        state |= {"current": current.state_dict() if current else None}
        state |= {"generator_optimizer": generator_optimizer.state_dict() if current else None, "robust": robust, "chosen": chosen}
        state |= {"batches": batches, "epoch_start": epoch_start, "generator": generator.get_state()}
        return state | {"totals": machine.all_rows(totals.clone()[None]), "random_states": common.random_states(machine)}

    # Training.
    if args.compile:
        classifier.compile()  # in place: the keys of its state dict stay
    distributed = common.distribute(classifier, machine)
    epoch_start = saved["epoch_start"] if place.batches else None  # the generator's state when the epoch's order was drawn

    def epoch_of_batches(data: Data, place: common.Place = common.EPOCH_START) -> Iterator:
        return common.image_batches(data, args.batch_size, generator, machine, workers, augmentation, place)

    def stylised_batches(epoch: int, start: int) -> Iterator:
        """Stylised images without end, from batch `start` of the epoch on; their order is the epoch's own."""
        draws = torch.Generator(machine.device).manual_seed((args.seed * 1_000_003 + epoch) % 2**63)
        while True:
            whole = common.count_images(stylised_data) // sin_size
            yield from common.image_batches(stylised_data, sin_size, draws, machine, workers, place=common.Place(min(start, whole)))
            start -= min(start, whole)

    epochs = 0 if args.evaluate else args.epochs
    progress = tqdm(total=epochs * steps_per_epoch, initial=step, desc=f"train {method}", unit="step", disable=not machine.is_main or not epochs)
    pace = common.Pace(args.checkpoint_minutes, args.log_every, machine)
    while epoch < epochs:
        if place.batches:
            pass  # the epoch's generators came with the checkpoint
        elif ant:  # how robust is the classifier now? The generator that found out plays on
            fresh, _, robust_accuracy = train_fresh_generator(
                classifier,
                args.ng_type,
                lambda: epoch_of_batches(sets.train),
                args.epsilon,
                args.fresh_lr,
                args.fresh_iterations,
                args.batch_size,
                generator,
                machine,
                "fresh generator",
            )
            robust = {"robust_accuracy": robust_accuracy}
            if current is None or args.reset_generator:
                current, generator_optimizer = fresh, adam(fresh, args.generator_lr)
        lr = args.lr * 0.1 ** (epoch // args.lr_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        counts = share_counts(args.batch_size, args.clean_share, args.replay_share, bool(memory))
        pace.begin()
        own, done = own_counts(counts, machine), place.batches
        plays = args.generator_epochs is None or epoch < args.generator_epochs  # else it is stale
        stylised = stylised_batches(epoch, done) if sin_size else None
        if not done:
            chosen = torch.randint(max(1, len(memory)), (steps_per_epoch, 2), generator=generator, device=machine.device).tolist()
            epoch_start = generator.get_state()
        for earlier, (images, labels) in zip(chosen[done:], epoch_of_batches(sets.train, place)):
            z = machine.own_rows(draw_z(args.batch_size, images, current.border if ant else 0, generator))
            if ant:
                # max over the generator, on the whole batch; the classifier in eval mode, so that its batch statistics are left alone
                if plays:
                    classifier.eval()
                    loss, _ = noise_loss(classifier, current, images, labels, z, args.epsilon, machine)
                    ascend(loss / args.batch_size, current, generator_optimizer, scaler, machine)
                # min over the classifier: clean, the current generator, two earlier ones
                replayed = [partial(torch.func.functional_call, current, memory[old]) for old in earlier] if memory else [current] * 2
                z = machine.own_rows(draw_z(args.batch_size, images, current.border, generator))
                mixed = mixed_batch(images, z, [current, *replayed], own, args.epsilon)
            else:
                sigmas = common.constant(SIGMAS.get(args.mode, (args.std_gauss,)), z)
                drawn = torch.randint(len(sigmas), (args.batch_size,), generator=generator, device=machine.device)
                mixed = baseline_batch(images, z, sigmas[machine.own_rows(drawn)], args.mode, own[0])
            if sin_size:
                extra = next(stylised)
                mixed, labels = torch.cat([mixed, extra[0]]), torch.cat([labels, extra[1]])
            classifier.train()
            with machine.autocast():
                logits = distributed(machine.layout(mixed)).float()
            losses = F.cross_entropy(logits, labels, reduction="none")
            optimizer.zero_grad()
            # DDP averages over ranks, hence the world size.
            scaler.scale(losses.sum() * machine.world_size / (args.batch_size + sin_size)).backward()
            scaler.step(optimizer)
            scaler.update()
            right = (logits.detach().argmax(1) == labels).float()
            clean, noisy = right[: own[0]], right[own[0] : len(images)]
            totals += torch.stack(
                [losses.detach().mean() * len(images), clean.sum(), clean.new_full((), len(clean)), noisy.sum(), noisy.new_full((), len(noisy))]
            )
            step, done = step + 1, done + 1
            if step % args.log_every == 0:
                shown = epoch_figures(common.finite_totals(machine.all_sum(totals.clone()), step, lr, directory))
                run.log(step, **shown, lr=lr)
                progress.set_postfix_str(", ".join(f"{key} {value:.3g}" for key, value in (shown | robust).items()), refresh=False)
                progress.update(step - progress.n)
            if done < steps_per_epoch and pace.due(step):
                common.save_run(checkpoint_state(done), directory, machine)
                pace.saved()
        epoch += 1
        if ant:
            memory.append({key: value.detach().clone() for key, value in current.state_dict().items()})
        figures = epoch_figures(common.finite_totals(machine.all_sum(totals), step, lr, directory))
        if sets.val is not None:
            figures["val_accuracy"] = common.evaluate_models([classifier], sets.val, args.test_batch_size, workers, machine)[0]["top1_accuracy"]
        history.append({"epoch": epoch} | figures | robust)
        run.log(step, **history[-1])
        place, totals, robust, chosen = common.EPOCH_START, torch.zeros_like(totals), {}, []
        due = pace.due(step, now=True)
        if due or epoch % args.checkpoint_every == 0 or epoch == epochs:
            common.save_run(checkpoint_state(), directory, machine)
            pace.saved()
        pace.end()
    progress.update(step - progress.n)
    progress.close()

    # The test set is read once, here.
    generator = torch.Generator(machine.device).manual_seed(args.seed)  # evaluation does not depend on what training drew
    trained = final is not None or epoch > 0
    models = [classifier, before] if has_before and trained else [classifier]
    clean = common.evaluate_models(models, sets.test, args.test_batch_size, workers, machine)
    severities = common.evaluate_corruptions(models, sets.corruptions, args.test_batch_size, workers, machine)
    corruptions = [mean_accuracies(values, sets.corruptions.names) for values in severities]
    extra = {name: sum(severities[0][name]) / len(severities[0][name]) for name in sets.corruptions.extra}
    against_alexnet = args.dataset == "imagenet"
    reference_errors = ALEXNET_ERRORS if against_alexnet else {key: 100 - corruptions[-1][key] for key in sets.corruptions.names}
    has_reference = against_alexnet or has_before
    smallest = 100 / (len(sets.corruptions.severities) * n_test)  # one image
    stars, evaluators = {}, {}
    attacked = sets.train if sets.train is not None else sets.test
    for ng_type in ("1x1", "3x3"):
        evaluators[ng_type], _, _ = train_fresh_generator(
            classifier,
            ng_type,
            lambda: epoch_of_batches(attacked),
            args.epsilon,
            args.fresh_lr,
            args.star_iterations,
            args.batch_size,
            generator,
            machine,
            f"generator for ε* ({ng_type})",
        )
        stars[ng_type] = median_epsilon_star(classifier, evaluators[ng_type], sets.test, workers, generator, machine)
    results = {
        "script": SCRIPT,
        "dataset": args.dataset,
        "model": args.model,
        "method": method,
        "seed": args.seed,
        "n_train": n_train,
        "n_eval": n_test,
        "protocol": protocol_line(args.dataset, architecture, args.eval_split, sets, args.epsilon, has_reference),
        "clean_accuracy": clean[0]["top1_accuracy"],
        "clean_top5_accuracy": clean[0]["top5_accuracy"],
        "corruptions": corruptions[0],
        "mce": mean_corruption_error(corruptions[0], reference_errors, smallest) if has_reference else None,
        "mce_reference": "alexnet" if against_alexnet else "clean model" if has_reference else None,
        "epsilon_star": stars["1x1"],
        "epsilon_star_3x3": stars["3x3"],
        "epsilon": args.epsilon,
        "severities": severities[0],
    }
    results |= {"extra_corruptions": extra} if extra else {}
    if has_before:
        results["before"] = {"clean_accuracy": clean[-1]["top1_accuracy"], "corruptions": corruptions[-1]}
    if in_place:
        # What is not on disk any more to be trained on, once was.
        results |= common.kept_results(directory, "n_train", *(() if has_before else ("before",)))
    if machine.is_main:
        title = f"{method} on {args.dataset}, {args.model}, seed {args.seed}"
        shown, shown_labels = common.gather_images(sets.test, 8, 0, machine)
        learned = {}
        for index in sorted({0, len(memory) // 2, len(memory) - 1} if memory else ()):
            learned[f"epoch {index + 1}"] = NoiseGenerator(args.ng_type).to(machine.device)
            learned[f"epoch {index + 1}"].load_state_dict(memory[index])
        learned |= {f"fresh ({kind})": evaluator for kind, evaluator in evaluators.items() if not memory or kind == args.ng_type}

        def under(noise_generator: NoiseGenerator | None) -> Callable[[torch.Tensor], torch.Tensor]:
            def change(images: torch.Tensor) -> torch.Tensor:
                z = draw_z(len(images), images, noise_generator.border if noise_generator else 0, generator)
                return project(images, noise_generator(z).float() if noise_generator else z, args.epsilon)

            return change

        rows = {"clean": lambda images: images, "Gaussian": under(None)} | {label: under(noise) for label, noise in learned.items()}
        draw_noise(directory / "noise.png", learned, sets.size, generator, machine.device)
        draw_examples(directory / "examples.png", classifier, shown, shown_labels, rows, machine)
        draw_patches(directory / "patches.png", learned, generator, machine.device)
        draw_corruptions(directory / "corruptions.png", dict(zip((method, "before"), corruptions)), title)
        if history:
            draw_curves(directory / "curves.png", history, title)
    run.log(
        step, test_clean=results["clean_accuracy"], test_corruptions=results["corruptions"]["mean"], mce=results["mce"], epsilon_star=stars["1x1"]
    )
    results = run.finish(results)
    if not args.evaluate:
        common.save_run(checkpoint_state(finished=True), directory, machine)
    if machine.is_main:
        report = print_results(results, directory)
        if args.evaluate:
            write_report(Path("Results") / f"{method}_evaluation_results.txt", report)


def epoch_figures(totals: list[float]) -> dict[str, float]:
    """Means from an epoch's sums: loss, right and rows of the clean share, right and rows of the noisy share."""
    loss, clean_right, clean_rows, noisy_right, noisy_rows = totals
    figures = {"loss": loss / (clean_rows + noisy_rows)}
    figures |= {"accuracy_clean": 100 * clean_right / clean_rows} if clean_rows else {}
    return figures | ({"accuracy_noisy": 100 * noisy_right / noisy_rows} if noisy_rows else {})


def protocol_line(dataset: str, model: str, split: str, sets: common.Sets, epsilon: float, has_reference: bool) -> str:
    """One line that says how the figures were measured."""
    crop = ", centre crop 224" if isinstance(sets.test, common.Folder) else ""
    source = f"{dataset} {split} ({common.count_images(sets.test)} images{crop}), {sets.corruptions.protocol}"
    source += f"; inputs normalised by {common.normalisation(dataset, model)}"
    source += f"; mCE against {'AlexNet' if dataset == 'imagenet' else 'the clean model'}" if has_reference else ""
    star = f"epsilon* along the noise of a generator trained from scratch at epsilon {epsilon:g} on {'test' if sets.train is None else 'training'} images"
    return f"{source}; top-1 accuracy (%), mean over severities; {star}, median over at most {EPSILON_STAR_IMAGES} images"


def print_results(results: dict, directory: Path) -> str:
    """The closing table; returned as text too."""
    before = results.get("before")
    lines = [f"{results['method']} ({results['model']}), accuracy (%)", ""]
    lines.append(f"{'clean, top-1':24s}{results['clean_accuracy']:8.2f}" + (f"   (before {before['clean_accuracy']:.2f})" if before else ""))
    lines.append(f"{'clean, top-5':24s}{results['clean_top5_accuracy']:8.2f}")
    columns = max(len(values) for values in results["severities"].values())
    heads = "".join(f"{severity:8d}" for severity in range(1, columns + 1))
    lines += ["", f"{'severity':24s}{heads}{'mean':>8s}" + (f"{'before':>8s}" if before else "")]
    means = results["corruptions"] | results.get("extra_corruptions", {})
    for name, values in results["severities"].items():
        figures = [*values, means[name]] + ([before["corruptions"][name]] if before and name in before["corruptions"] else [])
        lines.append(f"{name:24s}" + "".join(f"{value:8.2f}" for value in figures))
    for key, label in (("mean", "mean"), ("mean_without_noises", "mean without noises")):
        lines.append(f"{label:24s}{' ' * 8 * columns}{means[key]:8.2f}" + (f"{before['corruptions'][key]:8.2f}" if before else ""))
    lines += ["", f"{'mCE (%)':24s}{results['mce']:8.2f}   (reference: {results['mce_reference']})"] if results["mce"] is not None else [""]
    lines += [f"{'ε*':24s}{results['epsilon_star']:8.2f}   (correlated noise, 3x3: {results['epsilon_star_3x3']:.2f})"]
    lines += ["", results["protocol"], f"{results['wall_seconds']} s, {results['peak_memory_mb']:.0f} MB; results in {directory}"]
    print("\n" + "\n".join(lines))
    return "\n".join(lines) + "\n"


def write_report(file: Path, text: str) -> None:
    """The closing table as a file, as the published code leaves it."""
    file.parent.mkdir(exist_ok=True)
    common.write_text(file, text)
    print(f"written to {file}")


if __name__ == "__main__":
    common.run_script(main)
