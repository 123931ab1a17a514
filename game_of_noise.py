"""Adversarial Noise Training (Rusak, Schott, Zimmermann et al. 2020, arXiv 2001.06057), the "Game of Noise".

A small generator g learns the noise of a given L2 norm that hurts a classifier f most; f learns to bear it:
min over f, max over g of E[CE(f(clip(x + η·g(z))), y)], z ~ N(0, I), with η such that the distance to x is ε.
g never sees x. Gaussian and speckle noise are the baselines; corrupted images and ε* measure what was won.

    python game_of_noise.py                              # ANT on digits: all that is needed is here
    python game_of_noise.py --mode ANT --ng-type 3x3     # locally correlated noise
    python game_of_noise.py --mode Gauss_single          # or Gauss_mult, Speckle, clean
    python game_of_noise.py --mode ANT+SIN --datadir-clean DIR --imagenetc-path DIR --datadir-sin DIR
    python game_of_noise.py -e --run-dir RUN_DIR         # evaluate a run again
    python game_of_noise.py -e --model-name ANT3x3+SIN --datadir-clean DIR --imagenetc-path DIR
    torchrun --nproc_per_node 2 game_of_noise.py --mode ANT

Reaches, on digits (accuracy in %, clean and on digits-C, and ε*; seeds 0-2, two CPU cores): clean 99.7, 83.8,
9.3 ± 0.1; Gauss_mult 99.3, 92.2 ± 0.4, 8.3 ± 0.1; ANT 98.8, 94.8 ± 0.6, 13.8 ± 0.2.

Differs from the published code: the generator that is trained is the one that the classifier meets, earlier
ones are replayed from memory, the clean half of a batch stays clean, the norm after clipping is exactly ε.
"""

import argparse
import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

import common
from common import InputError, Machine, number

# What a flag left out takes. ImageNet's values are the paper's; digits' were tuned on validation digits (ε of
# the same root mean square, 19.3, is more than the norm of a digit on black, about 15), others not at all.
NAMES = "model epsilon std_gauss lr lr_step generator_lr fresh_lr fresh_iterations star_iterations epochs"
NAMES += " batch_size workers"
ROWS = {
    "digits": ("resnext", 12.0, 0.3, 0.02, 10, 1e-2, 1e-2, 10, 100, 20, 50, 0),
    "mnist": ("resnext", 12.0, 0.3, 0.02, 2, 1e-2, 1e-2, 100, 200, 3, 100, 0),
    "cifar10": ("wideresnet", 19.3, 0.5, 1e-2, 20, 1e-4, 5e-4, 1000, 1000, 40, 128, 0),
    "imagenet": ("resnet50", 135.0, 0.5, 1e-3, 60, 1e-4, 5e-4, 1000, 1000, 120, 70, 30),
    "fake": ("wideresnet", 19.3, 0.5, 1e-2, 20, 1e-4, 5e-4, 10, 10, 2, 128, 0),
}
ROWS |= {"fashion_mnist": ROWS["mnist"], "cifar100": ROWS["cifar10"], "folder": ROWS["imagenet"]}
SETTINGS = {dataset: dict(zip(NAMES.split(), row)) for dataset, row in ROWS.items()}

MODES = ("ANT", "ANT+SIN", "Gauss_single", "Gauss_mult", "Speckle", "clean")
SIGMAS = {"Gauss_mult": (0.08, 0.12, 0.18, 0.26, 0.38), "Speckle": (0.15, 0.2, 0.35, 0.45, 0.6)}
CLEAN_SHARE, REPLAY_SHARE = 0.5, 0.2  # of a batch: stays clean, meets two earlier generators
SIN_IMAGES, STAR_IMAGES = 15, 1000  # stylised beside a batch of 70; at most so many give ε*
# AlexNet's errors (%) on ImageNet-C, mean over severities (Hendrycks & Dietterich 2019): an mCE of 100
ALEXNET = (88.6428, 89.4468, 92.264, 81.988, 82.6268, 78.5948, 79.836, 86.6816)
ALEXNET += (82.6572, 81.9324, 56.4592, 85.3204, 64.6056, 71.784, 60.65)
ALEXNET_ERRORS = dict(zip(common.CORRUPTIONS, ALEXNET))


def published(given: argparse.Namespace) -> dict:
    folders = given.datadir_clean or given.corruptions_path or given.datadir_sin
    dataset = given.dataset or ("imagenet" if folders else "digits")
    return {"dataset": dataset} | SETTINGS[dataset] | ({"epochs": 0} if given.mode == "clean" else {})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, count = common.Parser(SETTINGS, description=__doc__), number(int, 1)
    positive = number(float, 0, open_low=True)
    parser.set_defaults(checkpoint_every=1, dataset=None)
    # fmt: off
    add = parser.data.add_argument
    add("--datadir-clean", metavar="DIR", help="ImageNet (default: imagenet in --data-root), --dataset's default")
    add("--datadir-sin", metavar="DIR", help="Stylized-ImageNet (default: sin in --data-root)")
    add("-tb", "--test-batch-size", type=count, default=256, help="images per batch of an evaluation")
    add = parser.add_argument_group("model").add_argument
    add("--model", "--arch", type=lambda name: name.replace("inceptionV3", "inception_v3"),
        help="resnext, resnet50, …, a name of torchvision's, or FILE.py:function")
    add("--weights", metavar="FILE", help="to start from, or evaluate: a file, or a published name")
    add("--blackbox", metavar="FILE.py:function", help="or ONNX, .pt2, TorchScript: a program to evaluate instead")
    add("--model-name", choices=("clean", *common.RELEASES, "Gauss_single"), help="to evaluate (default: clean)",
        type=lambda name: name.replace("-", "+"))  # ANT-SIN
    add = parser.add_argument_group("method", "defaults by data set").add_argument
    add("--mode", choices=MODES, default="ANT",
        help="noise in training; SIN adds stylised images; clean evaluates the weights as they are")
    add("--ng-type", choices=("1x1", "3x3"), default="1x1", help="noise: uncorrelated, or locally correlated")
    add("--epsilon", type=positive, help="L2 norm of the noise after clipping, pixels in [0, 1]")
    add("--std-gauss", type=positive, help="σ of Gauss_single")
    add("--fresh-iterations", type=count, help="steps of every epoch's fresh generator")
    add("--star-iterations", type=count, help="steps of the generators for ε*")
    add = parser.add_argument_group("optimiser", "defaults by data set").add_argument
    add("--lr", type=positive, help="of SGD with momentum 0.9")
    add("--lr-step", type=count, metavar="EPOCHS", help="between falls of --lr to a tenth")
    add("--generator-lr", type=positive, help="Adam's, of the generator in the game")
    add("--fresh-lr", type=positive, help="Adam's, of a fresh generator")
    add("--epochs", type=number(int, 0), help="passes over the training set")
    add("--batch-size", type=number(int, 2), help="images per step over all ranks, clean and noisy")
    # fmt: on
    args = parser.parse(argv, published)
    given = f"--model-name {args.model_name}" if args.model_name else f"--blackbox {args.blackbox}"
    if (args.model_name or args.blackbox) and not args.evaluate:
        parser.error(f"{given} says what to evaluate: add --evaluate")
    args.model = Path(args.blackbox).name.replace(".py:", "-") if args.blackbox else args.model
    if args.mode == "clean" and args.epochs:
        parser.error(f"--mode clean trains nothing: leave out --epochs {args.epochs}")
    if "SIN" in args.mode and not args.evaluate and args.dataset not in ("imagenet", "folder"):
        parser.error(f"--mode {args.mode}: no stylised {args.dataset}; see --datadir-clean, --datadir-sin")
    named = args.model_name or args.weights or common.has_checkpoint(args.run_dir or ".")
    if args.evaluate and args.run_dir and not (named or args.blackbox):
        parser.error(f"{args.run_dir} holds no checkpoint: give --model-name or --weights")
    return args


# ---------- Noise: of a given norm after clipping, from a generator or from a distribution ----------


def project(images: Tensor, noise: Tensor, epsilon: float | Tensor) -> Tensor:
    """clip(x + η·δ, 0, 1) with, per image, the η ≥ 0 for which its L2 distance to x is ε.

    images (B, 3, H, W) in [0, 1]; noise likewise, of any scale; epsilon > 0, a number or (B,). Differentiable
    in images and noise. Where ε is beyond reach every pixel with noise is at 0 or 1. Raises InputError for a
    number ε ≤ 0 and for shapes that differ.

    With s = η² the squared distance is Σ min(s·δᵢ², mᵢ²), mᵢ the room that pixel i has in its direction:
    piecewise linear and concave in s. Newton's method reaches its root from the left, faster than sorting.
    """
    if images.shape != noise.shape:
        raise InputError(f"noise is {tuple(noise.shape)}, but the images are {tuple(images.shape)}")
    if not isinstance(epsilon, Tensor) and not epsilon > 0:
        raise InputError(f"epsilon is {epsilon}, but a norm is > 0")
    epsilon = torch.as_tensor(epsilon, dtype=images.dtype, device=images.device).expand(len(images))
    rows = max(1, 2**19 // max(1, images.shape[1:].numel()))
    if images.device.type == "cpu" and len(images) > rows:  # parts that stay in the cache: 3 times as fast
        return torch.cat([project(*part) for part in zip(*(x.split(rows) for x in (images, noise, epsilon)))])
    x, delta, target = images.flatten(1), noise.flatten(1).to(images.dtype), epsilon.square()  # (B, D), (B,)
    largest = torch.linalg.vector_norm(delta.detach(), math.inf, dim=1, keepdim=True)
    delta = delta * largest.clamp_min(torch.finfo(x.dtype).tiny).reciprocal()  # no square overflows
    room = torch.where(delta > 0, 1 - x, x).square()
    with torch.no_grad():
        power = delta.square()
        s = newton_root(power, room, target, target / power.sum(1))
        saturated, reached = power * s[:, None] >= room, s.isfinite()
    # One more step, with gradients: η through the pixels that are not clipped. Where hardly any are left,
    # rounding is larger than what it would change: s stays.
    slope = (delta.square() * ~saturated).sum(1)
    squared = (target - (room * saturated).sum(1)) / torch.where(reached & (slope > 0), slope, 1.0)
    trusted = reached & (slope > 0) & (squared > 0.999 * s)
    eta = torch.where(trusted, squared, torch.where(reached, s, 1.0)).sqrt()
    if images.device.type != "cpu" or not reached.all():  # beyond reach: the saturated image; NaN stays NaN
        delta = torch.where(reached[:, None], delta, delta.sign() + 0 * delta)
    return (x + eta[:, None] * delta).clamp(0, 1).view(images.shape)


def newton_root(power: Tensor, room: Tensor, target: Tensor, s: Tensor) -> Tensor:
    """s (B,) with Σ min(s·power, room) = target over rows (B, D), to 5e-5 of √target, or inf."""
    lowest = torch.zeros_like(s)  # the first step may come from the right; then s grows, but for rounding
    for iteration in range(100):  # finite, and in practice 3 to 6
        saturated = power * s[:, None] >= room
        slope = (power * ~saturated).sum(1)
        new = torch.maximum((target - (room * saturated).sum(1)) / slope, lowest)
        new = torch.where(slope > 0, new, math.inf)  # nothing is left that could grow
        moving = (new - s).abs() > 1e-4 * s
        s, lowest = new, 0.999 * new
        if (s.device.type == "cpu" or iteration % 4 == 3) and not moving.any():  # a GPU has to wait for it
            break
    return s


class NoiseGenerator(nn.Module):
    """δ = g(z) + z, z ~ N(0, I), g convolutions 3→20→20→20→3 with ReLU between, which start at N(0, 0.01²).

    "1x1" keeps pixels independent; "3x3", whose second convolution is 3×3, takes z one pixel wider all round.
    """

    def __init__(self, ng_type: str, draws: Generator | None = None):
        super().__init__()
        self.border = {"1x1": 0, "3x3": 1}[ng_type]
        channels, kernels = (3, 20, 20, 20, 3), (1, 1 + 2 * self.border, 1, 1)
        self.convolutions = nn.ModuleList(nn.Conv2d(*channels[i : i + 2], kernels[i]) for i in range(4))
        for convolution in self.convolutions:
            nn.init.normal_(convolution.weight, 0, 0.01, generator=draws)
            nn.init.zeros_(convolution.bias)

    def forward(self, z: Tensor) -> Tensor:  # (B, 3, H + 2·border, W + 2·border) → (B, 3, H, W)
        x = z
        for convolution in self.convolutions[:-1]:
            x = F.relu(convolution(x))
        return self.convolutions[-1](x) + F.pad(z, [-self.border] * 4)  # cuts the border off

    def inputs(self, count: int, images: Tensor, draws: Generator, machine: Machine) -> Tensor:
        """This rank's rows of z for noise on `count` images of such a size."""
        return machine.normal((count, 3, *(side + 2 * self.border for side in images.shape[-2:])), draws)


def share_counts(batch_size: int, earlier: bool, machine: Machine) -> list[int]:
    """How many of this rank's images stay clean, meet the current generator, and each of two earlier ones."""
    clean, replay = round(batch_size * CLEAN_SHARE), round(batch_size * REPLAY_SHARE / 2) * earlier
    counts = torch.tensor([clean, batch_size - clean - 2 * replay, replay, replay])
    return machine.own_rows(torch.arange(4).repeat_interleave(counts)).bincount(minlength=4).tolist()


@torch.no_grad()
def mixed_batch(images: Tensor, z: Tensor, generators: list, counts: list[int], epsilon: float) -> Tensor:
    """A copy of images (B, 3, H, W): counts[0] as they are, counts[1] under generators[0]'s noise, …"""
    clean, *rest = images.split(counts)
    parts = z.contiguous(memory_format=torch.channels_last).split(counts)[1:]  # faster: the layers are narrow
    noise = [generate(part).float() for generate, part in zip(generators, parts) if len(part)]
    return torch.cat([clean, project(torch.cat(rest), torch.cat(noise), epsilon)]) if noise else clean.clone()


def baseline_batch(
    images: Tensor, mode: str, std: float, batch_size: int, clean: int, draws: Generator, machine: Machine
) -> Tensor:
    """A copy of images (B, 3, H, W): `clean` as they are, the others x + σ·z or, mode Speckle, x + x·σ·z."""
    sigmas = common.constant(SIGMAS.get(mode, (std,)), images)
    chosen = torch.randint(len(sigmas), (batch_size,), generator=draws, device=machine.device)
    z = machine.normal((batch_size, *images.shape[1:]), draws)
    noise = sigmas[machine.own_rows(chosen)][:, None, None, None] * z * (images if mode == "Speckle" else 1)
    return torch.cat([images[:clean], (images + noise)[clean:].clamp(0, 1)])


# ---------- Objective of the generator, and the distance ε* ----------


@contextlib.contextmanager
def affine_batch_norm(model: nn.Module, machine: Machine) -> Iterator[None]:
    """On a CPU, batch norm in eval mode as x·scale + shift, for passes whose gradient goes to the images
    alone: 2.4 times faster through the digits models, as ATen's backward is slow."""
    modules = model.modules() if machine.device.type == "cpu" else ()
    layers = [layer for layer in modules if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.forward = partial(affine_batch_norm_forward, layer)  # an attribute hides the method
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def affine_batch_norm_forward(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    scale = layer.weight.detach() * (layer.running_var + layer.eps).rsqrt()
    shift = layer.bias.detach() - layer.running_mean * scale
    return torch.addcmul(shift[None, :, None, None].to(x.dtype), x, scale[None, :, None, None].to(x.dtype))


class Game(NamedTuple):  # what is the same for every step of a generator
    classifier: nn.Module
    dataset: str
    epsilon: float
    batch_size: int
    machine: Machine


ADAM = partial(torch.optim.Adam, maximize=True, fused=True)


def ascend(game: Game, player: tuple, images: Tensor, labels: Tensor, draws: Generator) -> Tensor:
    """One step of a generator up the mean of CE(f(clip(x + η·g(z))), y) over the global batch; f, in eval
    mode, gets no gradient. player: generator, optimiser, scaler. Returns this rank's loss and right answers,
    (2,)."""
    machine, (generator, optimizer, scaler) = game.machine, player
    z = machine.layout(generator.inputs(game.batch_size, images, draws, machine))
    with machine.autocast():
        noise = generator(z)
    noisy = machine.layout(project(images, noise.float(), game.epsilon))
    with machine.autocast(), affine_batch_norm(game.classifier.eval(), machine):
        logits = game.classifier(noisy).float()
    loss, parameters = F.cross_entropy(logits, labels, reduction="sum"), list(generator.parameters())
    gradients = torch.autograd.grad(scaler.scale(loss / game.batch_size), parameters)
    flat = machine.all_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, gradient in zip(parameters, flat.split([part.numel() for part in parameters])):
        parameter.grad = gradient.view_as(parameter)
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([loss.detach(), (logits.argmax(1) == labels).sum()])


def train_fresh_generator(
    game: Game, ng_type: str, data: common.Data, steps: int, lr: float, key: tuple
) -> tuple[NoiseGenerator, float]:
    """A generator trained from scratch against the frozen classifier, and the accuracy (%) that this keeps
    over the last tenth of the steps. All that is random is a function of `key`."""
    machine, seed, sums = game.machine, common.mix(*key), []
    draws, fresh = machine.generator(*key), NoiseGenerator(ng_type, Generator().manual_seed(seed))
    player = (fresh.to(machine.device), ADAM(fresh.parameters(), lr), machine.scaler())
    bar = tqdm(range(steps), "fresh generator", leave=False, disable=not machine.is_main)
    for _, (images, labels, _) in zip(bar, data.batches(game.batch_size, seed, crop=True)):
        moves = machine.uniform((game.batch_size, 5), draws)
        images = common.light_augmentation(common.to_float(images), game.dataset, moves)
        sums.append(ascend(game, player, images, labels, draws))
    losses, right = (machine.all_sum(torch.stack(sums)) / game.batch_size).T.tolist()
    broken = [step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss)]
    if broken:
        what = f"the loss of a fresh generator is not finite at its step {broken[0]} (--fresh-lr {lr:g})"
        raise InputError(f"{what}: lower --fresh-lr or --lr")
    last = max(1, steps // 10)
    return fresh, 100 * sum(right[-last:]) / last


@torch.no_grad()
def epsilon_star(model: Callable, images: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """The smallest L2 distance (B,) along each image's noise, clipped to [0, 1], at which the model is wrong.

    model maps images (B, 3, H, W) in [0, 1] to logits; labels (B,); noise as images. Doubled from √D/1024
    until it is wrong, the last interval then halved twelve times. 0 where it is wrong without noise, D =
    3·H·W where it stays right however strong the noise. The paper's ε* is the median over images.
    """
    if not len(images):
        return labels.float()
    dimension = images[0].numel()
    right = model(images).argmax(1) == labels
    low, high = torch.zeros(2, len(images), device=images.device)
    high += math.inf
    saturated = project(images, noise, float(dimension))
    reach = (saturated - images).flatten(1).norm(dim=1)

    def narrow(rows: Tensor, distances: Tensor) -> Tensor:
        wrong = model(project(images[rows], noise[rows], distances)).argmax(1) != labels[rows]
        high[rows] = torch.where(wrong, distances, high[rows])
        low[rows] = torch.where(wrong, low[rows], distances)
        return wrong

    active, epsilon = right.nonzero()[:, 0], math.sqrt(dimension) / 1024
    while len(active):  # only images not yet bracketed are asked for
        distances = reach[active].clamp(max=epsilon)
        active = active[~narrow(active, distances) & (distances < reach[active])]
        epsilon *= 2
    active = high.isfinite().nonzero()[:, 0]
    for _ in range(12 if len(active) else 0):
        narrow(active, (low[active] + high[active]) / 2)
    found = torch.where(right, high.clamp(max=dimension), 0.0)
    return found + 0 * noise.flatten(1).sum(1)  # NaN for noise that is not finite


# ---------- Evaluation ----------


def evaluate_stars(game: Game, sets: common.Sets, steps: int, lr: float, seed: int) -> tuple[dict, dict]:
    """ε* by results.json's keys, the median over test images along the noise of generators trained from
    scratch on training images (without these, on test images); and the generators, by name."""
    stars, generators, machine = {}, {}, game.machine
    model, own = partial(common.predict_logits, game.classifier, machine=machine), machine.own_rows
    images, labels = sets.test.take(STAR_IMAGES).tensors()
    for ng_type, name in (("1x1", "epsilon_star"), ("3x3", "epsilon_star_3x3")):
        key, found = ("star", seed, ng_type), []
        generator, _ = train_fresh_generator(game, ng_type, sets.train or sets.test, steps, lr, key)
        z = generator.inputs(len(labels), images, machine.generator("median", *key), machine)
        rows = min(machine.chunk(*images.shape[2:]), 256)
        for x, y, part in zip(*(part.split(rows) for part in (own(images), own(labels), z))):
            found.append(epsilon_star(model, common.to_float(x), y, generator(part).detach().float()))
        stars[name], generators[f"fresh {ng_type}"] = torch.cat(found), generator
    return {name: machine.all_rows(found).median().item() for name, found in stars.items()}, generators


def mean_accuracies(severities: dict[str, list[float]], names: tuple[str, ...]) -> dict[str, float]:
    """Accuracy per corruption, mean over severities; their `mean`, and that of those not called noise."""
    means = {name: sum(severities[name]) / len(severities[name]) for name in names}
    groups = {"mean": names, "mean_without_noises": [name for name in names if not name.endswith("_noise")]}
    return means | {key: sum(means[name] for name in group) / len(group) for key, group in groups.items()}


def mean_corruption_error(accuracy: dict[str, float], reference_errors: dict, smallest: float) -> float:
    """mCE (%): the mean over corruptions of our error over the reference's (Hendrycks & Dietterich 2019). A
    reference with less than half the `smallest` error (%) that a set can show counts so, and we beside it."""
    ratios = []
    for name, reference in reference_errors.items():
        least = smallest / 2 if reference < smallest / 2 else 0
        ratios.append(max(100 - accuracy[name], least) / max(reference, least))
    return 100 * sum(ratios) / len(ratios)


def evaluate_classifier(models: list, sets: common.Sets, batch_size: int, against_alexnet: bool) -> dict:
    """By results.json's keys: accuracy (%) of models[0] on clean and corrupted test images, and mCE, against
    AlexNet or models[1], the classifier before training, if that is known."""
    clean = common.evaluate(models, sets.test, batch_size)
    severities = common.evaluate_corruptions(models, sets.corruptions, sets.test.machine, batch_size)
    means = [mean_accuracies(values, sets.corruptions.names) for values in severities]
    results = {"clean_accuracy": clean[0]["top1_accuracy"], "clean_top5_accuracy": clean[0]["top5_accuracy"]}
    results |= {"corruptions": means[0], "severities": severities[0], "mce": None, "mce_reference": None}
    if models[1:]:
        results["before"] = {"clean_accuracy": clean[1]["top1_accuracy"], "corruptions": means[1]}
    if models[1:] or against_alexnet:
        errors = {name: 100 - means[-1][name] for name in sets.corruptions.names}
        smallest = 100 / len(sets.test) / len(sets.corruptions.severities)
        errors = ALEXNET_ERRORS if against_alexnet else errors
        results["mce"] = mean_corruption_error(means[0], errors, smallest)
        results["mce_reference"] = "alexnet" if against_alexnet else "clean model"
    return results


def print_results(results: dict, directory: Path) -> str:
    """The closing table, which is returned too."""
    before = results.get("before", {"clean_accuracy": math.nan, "corruptions": {}})
    rows = {"clean": (results["clean_accuracy"], before["clean_accuracy"])}
    for name, mean in results["corruptions"].items():
        rows[name] = (mean, before["corruptions"].get(name, math.nan), *results["severities"].get(name, ()))
    rows["clean, top-5"] = (results["clean_top5_accuracy"],)
    rows[f"mCE, {results['mce_reference']} 100"] = (results["mce"],)
    rows["ε*, along 1x1 and 3x3"] = (results["epsilon_star"], results["epsilon_star_3x3"])
    lines = [f"{results['method']} ({results['model']}), accuracy (%): mean, before, by severity"]
    for name, cells in rows.items():
        lines.append(f"{name:22}" + "".join(f"{math.nan if cell is None else cell:8.2f}" for cell in cells))
    lines.append(results["protocol"])
    lines.append(f"{results['wall_seconds']} s, {results['peak_memory_mb']} MB; {directory}")
    print("", *lines, sep="\n")
    return "\n".join(lines) + "\n"


def learned_generators(like: NoiseGenerator, memory: list[dict]) -> dict[str, NoiseGenerator]:
    """Those of the first, the middle and the last epoch, and an untrained one, by name."""
    found = {"Gaussian": NoiseGenerator("1x1").to(like.convolutions[0].weight)}
    for epoch in sorted({1, len(memory) // 2 + 1, len(memory)}) if memory else ():
        found[f"epoch {epoch}"] = copy.deepcopy(like)
        found[f"epoch {epoch}"].load_state_dict(memory[epoch - 1])
    return found


@torch.no_grad()
def draw_noises(
    directory: Path, game: Game, classes: list[str], generators: dict, images: Tensor, labels: Tensor
) -> None:
    """noise.png: of each generator the density of its noise, mean over colours, in units of the root mean
    square, and patches; examples.png: images (B, 3, H, W) under it, with the classifier's answer."""
    alone, rows = game.machine._replace(rank=0, world_size=1), {"clean": images}
    draws, bins, size = alone.generator("pictures"), torch.linspace(-4, 4, 81), 1.6 * len(generators)
    with common.figure(directory / "noise.png", len(generators), 6, (12, size)) as axes:
        for axis, (name, generator) in zip(axes, generators.items()):
            noise = generator(generator.inputs(64, images, draws, alone)).float()
            rows[name], noise = project(images, noise[: len(images)], game.epsilon), noise.cpu()
            grey = (noise.mean(1) / noise.mean(1).square().mean().sqrt()).flatten()
            axis[0].plot(bins[1:] - 0.05, torch.histogram(grey, bins, density=True).hist)
            axis[0].set_ylabel(name)
            for place, patch in zip(axis[1:], noise[..., :28, :28] / noise.std() / 4 + 0.5):
                common.show(place, patch)
    with common.figure(directory / "examples.png", len(rows), len(images), (10, 1.6 + size)) as axes:
        for axis, (name, shown) in zip(axes, rows.items()):
            seen = common.predict_logits(game.classifier.eval(), shown, alone).argmax(1)
            for place, image, label, right in zip(axis, shown, seen.tolist(), seen == labels):
                common.show(place, image, classes[label], "tab:green" if right else "tab:red")
            axis[0].set_ylabel(name)


def draw_curves(file: Path, results: dict, history: list[dict], title: str) -> None:
    """Loss and accuracy over the epochs, and accuracy per corruption before and after."""
    keys = {"val_accuracy": "clean validation images", "accuracy_clean": "training, clean share"}
    keys |= {"accuracy_noisy": "training, noisy share", "robust_accuracy": "fresh generator, at first"}
    with common.figure(file, 1, 3, (16, 4.5), title) as axes:
        left, middle, right = axes[0]
        if history:
            common.curves(left, history, {"loss": "loss"}, ylabel="cross entropy in training")
            common.curves(middle, history, keys, ylabel="accuracy (%)")
        bars = {"after": results["corruptions"], "before": results.get("before", {}).get("corruptions", {})}
        for (label, values), height in zip(bars.items(), (0.8, 0.3)):
            right.barh([*values], [*values.values()], height, label=label)
        right.set(xlabel="accuracy (%), mean over severities", xlim=(0, 100))
        right.legend(loc="lower left")


# ---------- Main ----------


def stylised_images(
    folder: Path, like: common.Data, batch_size: int, workers: int
) -> tuple[common.Data, int]:
    """Stylized-ImageNet, with the classes of the clean pictures; and how many of it go to a batch."""
    advice = "made with https://github.com/rgeirhos/Stylized-ImageNet, named with --datadir-sin"
    data = common.class_folder(folder / "train", like.machine, workers, advice, like)
    count = max(math.ceil(SIN_IMAGES * batch_size / 70), like.machine.world_size)
    if len(data) < count:
        raise InputError(f"{folder} holds {len(data)} pictures, a batch takes {count}: {advice}")
    return data, count


def named_model(dataset: str, model: str, name: str | None, weights: str | None) -> tuple[str, str | None]:
    """What is evaluated, if no run: its name and its weights (None: what training starts from)."""
    file = Path(weights or "clean")
    own = file.name.removesuffix(".pt").removesuffix(".pth")
    name = name or (file.resolve().parent.name if own == "checkpoint" else own)
    if weights or name == "clean":
        return name, weights
    released = dataset == "imagenet" and name in common.RELEASES
    return name, name if released else str(common.WEIGHTS / f"{dataset}-{model}-{name}.pt")


def epoch_figures(totals: list[float], steps: int, batch_size: int) -> dict[str, float]:
    """Means from sums over steps: of the loss, of right answers on the clean and on the noisy share."""
    (loss, right, noisy), clean = totals, round(batch_size * CLEAN_SHARE)
    figures = {"loss": loss, "accuracy_clean": 100 * right / clean}
    figures["accuracy_noisy"] = 100 * noisy / (batch_size - clean)
    return {name: value / steps for name, value in figures.items()}


def protocol_line(dataset: str, split: str, sets: common.Sets, inputs: str, epsilon: float | None) -> str:
    """One line that says how the figures were measured; epsilon: None without ε*."""
    source = f"{dataset} {split} ({len(sets.test)} images), {sets.corruptions.protocol}"
    line = f"{source}; inputs {inputs}; top-1 accuracy (%)"
    if epsilon is None:
        return line
    trained = f"generators trained at {epsilon:g} on {'training' if sets.train else 'test'} images"
    return f"{line}; epsilon* along the noise of {trained}, median of at most {STAR_IMAGES} images"


def evaluate_program(args: argparse.Namespace, sets: common.Sets, machine: Machine) -> None:
    """Accuracy of a black box; ε*, whose noise is learned with its gradients, is left out."""
    program = common.Program(args.blackbox, len(sets.classes), sets.test.size, machine.device)
    run = common.Run(args, machine, "blackbox")
    run.track({})
    run.say(program.origin, "ε* is left out: its noise is learned with gradients; a program has none")
    results = {"n_train": 0, "n_eval": len(sets.test)}
    results["protocol"] = protocol_line(args.dataset, args.eval_split, sets, "in [0, 1]", None)
    results |= dict.fromkeys(("epsilon", "epsilon_star", "epsilon_star_3x3"))
    results |= evaluate_classifier([program], sets, args.test_batch_size, args.dataset == "imagenet")
    report(run, run.finish(results), args.evaluate)


def report(run: common.Run, results: dict, evaluated: bool) -> None:
    text = run.machine.is_main and print_results(results, run.directory)
    if evaluated and text:
        file = Path("Results") / f"{results['method']}_evaluation_results.txt"
        common.write_atomically(file, text.encode())


def main() -> None:
    args = parse_args()
    machine = common.start_machine(args.device, args.amp, args.seed)
    workers = 0 if args.dry_run else machine.workers(args.workers)
    ant, sin = args.mode.startswith("ANT"), "SIN" in args.mode and not args.evaluate

    # All is looked for before the first file is written
    how = {"workers": workers, "split": args.eval_split, "train": not args.evaluate, "corruptions": "needed"}
    how |= {"clean_directory": args.datadir_clean, "corrupted_directory": args.corruptions_path}
    how["validation"] = args.dataset not in ("imagenet", "folder") or args.eval_split == "val"
    how |= {"generate": args.generate_corruptions, "dry_run": args.dry_run}
    sets = common.load_sets(args.dataset, args.data_root, machine, **how)
    n_train = len(sets.train or ())
    if args.dry_run:
        args.batch_size, args.epochs = min(args.batch_size, 6), min(args.epochs, 2)
        args.fresh_iterations = args.star_iterations = 1
    args.batch_size = min(args.batch_size, n_train or len(sets.test))  # few: all of them
    if args.batch_size < machine.world_size:
        raise InputError(f"--batch-size {args.batch_size}: fewer than the {machine.world_size} processes")
    if args.blackbox:
        return evaluate_program(args, sets, machine)
    steps_per_epoch, stylised, sin_size = 1 if args.dry_run else n_train // args.batch_size, (), 0
    if sin:
        folder = Path(args.datadir_sin or f"{args.data_root}/sin")
        stylised, sin_size = stylised_images(folder, sets.train, args.batch_size, workers)

    # The classifier, and the one before training, which mCE refers to: of a checkpoint it is known for digits
    method, final = args.mode.replace("ANT", "ANT3x3") if args.ng_type == "3x3" else args.mode, None
    named = args.evaluate and not common.has_checkpoint(args.run_dir)  # not a run
    if named:
        method, final = named_model(args.dataset, args.model, args.model_name, args.weights)
    has_before, about = not named or args.dataset == "digits", (machine, args.data_root, args.dry_run)
    classifier = common.build_model(args.model, len(sets.classes), args.dataset)
    classifier.to(machine.device, memory_format=machine.weight_layout)
    load = partial(common.load_classifier, classifier, args.model, args.dataset)
    origin = load(None if named else args.weights, *about) if has_before or not final else None
    models = [classifier, copy.deepcopy(classifier)][: 1 + has_before]
    origin = load(final, *about) if final else args.run_dir if args.evaluate and not named else origin
    optimizer = torch.optim.SGD(classifier.parameters(), args.lr, momentum=0.9, fused=True)
    current, scaler = NoiseGenerator(args.ng_type).to(machine.device), machine.scaler()
    player = (current, ADAM(current.parameters(), args.generator_lr), scaler)
    totals = common.Totals(3, machine)  # as epoch_figures takes them
    run = common.Run(args, machine, method)
    parts = {"classifier": classifier, "optimizer": optimizer, "scaler": scaler, "totals": totals}
    parts |= {"generator": current, "generator_optimizer": player[1]}
    progress = run.track({"history": [], "memory": [], "robust": {}}, **parts)
    history, memory = progress["history"], progress["memory"]  # memory: generators of earlier epochs
    memory[:] = [{name: value.to(machine.device) for name, value in state.items()} for state in memory]
    if run.finished:
        return machine.is_main and print_results(common.read_results(run.directory), run.directory)
    about = f"{n_train} training images, {steps_per_epoch} steps per epoch; {args.model}: {origin}"
    run.say(about, *sets.notes)
    if args.compile:
        classifier.compile()  # in place: its keys stay
    game = Game(classifier, args.dataset, args.epsilon, args.batch_size, machine)
    trained = common.distribute(classifier, machine)

    batches = sets.train.batches(args.batch_size, args.seed, run.step, crop=True) if sets.train else ()
    if sin:
        stylised = stylised.batches(sin_size, common.mix("sin", args.seed), run.step, crop=True)
    for step, (images, labels, _) in run.steps(batches, args.epochs * steps_per_epoch, steps_per_epoch):
        epoch, batch = divmod(step, steps_per_epoch)
        if batch == 0 and ant:  # how robust is the classifier now? The generator that found out plays on
            how = (args.fresh_iterations, args.fresh_lr, ("fresh", args.seed, epoch))
            fresh, left = train_fresh_generator(game, args.ng_type, sets.train, *how)
            current.load_state_dict(fresh.state_dict())
            player[1].state.clear()
            progress["robust"] = {"robust_accuracy": left}
        draws = machine.generator(args.seed, step)
        moves = machine.uniform((args.batch_size, 5), draws)
        images = common.light_augmentation(common.to_float(images), args.dataset, moves)  # (b, 3, H, W)
        own = share_counts(args.batch_size, bool(memory), machine)
        if ant:  # max over the generator, on the whole batch; then min over the classifier
            ascend(game, player, images, labels, draws)
            picks = [common.mix("replay", number, args.seed, step) for number in range(2 * bool(memory))]
            earlier = [memory[pick % len(memory)] for pick in picks]
            replayed = [partial(torch.func.functional_call, current, state) for state in earlier]
            z = current.inputs(args.batch_size, images, draws, machine)
            mixed = mixed_batch(images, z, [current, *replayed], own, args.epsilon)
        else:
            how = (args.mode, args.std_gauss, args.batch_size, own[0], draws, machine)
            mixed = baseline_batch(images, *how)
        if sin:
            extra, extra_labels, _ = next(stylised)
            mixed, labels = torch.cat([mixed, common.to_float(extra)]), torch.cat([labels, extra_labels])
        with machine.autocast():
            logits = trained.train()(machine.layout(mixed)).float()
        loss = F.cross_entropy(logits, labels, reduction="sum") / (args.batch_size + sin_size)
        lr = args.lr * 0.1 ** (epoch // args.lr_step)
        common.descend(loss * machine.world_size, optimizer, scaler, lr)
        right = (logits.argmax(1) == labels)[: len(images)]
        totals.add(loss, right[: own[0]].sum(), right[own[0] :].sum())
        if (step + 1) % args.log_every == 0:
            run.log(step + 1, **epoch_figures(totals.read(step + 1), batch + 1, args.batch_size), lr=lr)
        if batch < steps_per_epoch - 1:
            continue
        figures = epoch_figures(totals.read(step + 1), steps_per_epoch, args.batch_size)
        entry = {"epoch": epoch + 1, **figures, **progress["robust"]}
        totals.own.zero_()
        memory += [{name: value.clone() for name, value in current.state_dict().items()}] * ant
        for val in common.evaluate([classifier], sets.val, args.test_batch_size) if sets.val else ():
            entry["val_accuracy"] = val["top1_accuracy"]
        history.append(entry)
        run.log(step + 1, **entry)

    # The test set is read once, here.
    results = {"n_train": n_train, "n_eval": len(sets.test), "epsilon": args.epsilon}
    inputs = f"normalised by {common.normalisation(args.dataset, args.model)}"
    results["protocol"] = protocol_line(args.dataset, args.eval_split, sets, inputs, args.epsilon)
    stars, testers = evaluate_stars(game, sets, args.star_iterations, args.fresh_lr, args.seed)
    results |= evaluate_classifier(models, sets, args.test_batch_size, args.dataset == "imagenet") | stars
    images, labels = sets.test.take(8).tensors()
    if machine.is_main:
        title = f"{method} on {args.dataset}, {args.model}, seed {args.seed}"
        draw_curves(run.directory / "curves.png", results, history, title)
        shown = learned_generators(current, memory) | testers
        draw_noises(run.directory, game, sets.classes, shown, common.to_float(images), labels)
    tested = {"test_clean": results["clean_accuracy"], "test_corruptions": results["corruptions"]["mean"]}
    run.log(run.step, **tested, mce=results["mce"], epsilon_star=results["epsilon_star"])
    report(run, run.finish(results), args.evaluate)


if __name__ == "__main__":
    common.run_script(main)
