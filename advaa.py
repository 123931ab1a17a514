"""Adversarial AutoAugment (Zhang, Wang, Zhang & Zhong 2020, arXiv 1912.11188).

A controller emits M augmentation policies per epoch; the classifier trains on M views of every image, one by
each. A policy's reward is the mean loss: the controller learns what is hard, the classifier to bear it.

    python advaa.py  # digits: all that is needed is here
    python advaa.py --policy trivial  # or random, autoaugment, none: baselines
    python advaa.py --replay RUN_DIR/policies.jsonl --model resnext  # one run's policies train another model
    python advaa.py --dataset cifar10 --model wresnet28_10 --amp  # the published settings
    python advaa.py --evaluate --run-dir RUN_DIR  # evaluate a run again
    torchrun --nproc_per_node 2 advaa.py --M 8 --amp

Reaches, on digits (100 training images; top-1 error in % on clean, modified and corrupted test digits; seeds
0-2, two CPU cores, 85 s): none 7.9, 67.9, 35.9; random 2.5 ± 1.3, 15.7 ± 1.6, 5.3 ± 1.6; advaa 1.7 ± 0.9,
14.6 ± 1.7, 5.8 ± 2.4: no better than random.

Differs from the published code: 16 operations, not 15; the last epoch is reported, not the best on the test
set; one process works as several do; runs resume.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import common
from common import Data, InputError, Machine, number

# Published for CIFAR and ImageNet; for digits, tuned on validation digits
PUBLISHED = {"M": 8, "Q": 5, "controller_lr": 3.5e-4, "entropy_penalty": 1e-5, "lr_schedule": "cosine"}
PUBLISHED |= {"validation": False, "cutout": 16, "workers": 0}
GREY = {"cutout": 0, "controller_lr": 0.01, "entropy_penalty": 0.2}


def row(*values: float, **others) -> dict:
    return PUBLISHED | dict(zip(("batch_size", "lr", "weight_decay", "epochs"), values)) | others


WRN, MNIST = row(128, 0.1, 5e-4, 200, lr_schedule="step"), row(128, 0.1, 5e-4, 20, **GREY)
SHAKE = dict.fromkeys(("shake26_2x32d", "shake26_2x96d", "shake26_2x112d"), row(128, 0.2, 1e-4, 600))
CIFAR_100 = {"shake26_2x96d": row(128, 0.1, 5e-4, 1200), "pyramid272": row(128, 0.5, 1e-4, 1200)}
SETTINGS = {
    "digits": {"wresnet28_10": row(10, 0.1, 5e-4, 120, num_train=100, validation=True, **GREY)},
    "mnist": {"wresnet28_10": MNIST},
    "fashion_mnist": {"wresnet28_10": MNIST},
    "cifar10": {"wresnet28_10": WRN, **SHAKE, "pyramid272": row(128, 0.1, 1e-4, 600)},
    "cifar100": {"wresnet28_10": WRN, **CIFAR_100},
    "imagenet": dict.fromkeys(common.RESNETS, row(2048, 0.8, 1e-4, 120, cutout=0, workers=16)),
    "folder": {"resnet50": row(256, 0.1, 1e-4, 120, cutout=0, workers=16)},
    "fake": {"wresnet28_10": row(128, 0.1, 5e-4, 2)},
}


def published(given: argparse.Namespace) -> dict:
    rows = SETTINGS[given.dataset]
    model = given.model if given.model in rows else next(iter(rows))
    return {"model": model, "policy": "replay" if given.replay else "advaa"} | rows[model]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(SETTINGS, description=__doc__)
    parser.set_defaults(checkpoint_every=10)
    # fmt: off
    add = parser.data.add_argument
    add("--num-train", type=number(int, 1), metavar="N", help="balanced over classes (digits: 100, else all)")
    add("--validation", action=argparse.BooleanOptionalAction, help="hold out a tenth (default: digits)")
    add = parser.add_argument_group("model").add_argument
    add("--model", help="wresnet28_10, resnet50, …, a name of torchvision's, or FILE.py:function")
    add("--weights", metavar="FILE", help="to start from, or evaluate: a file, or a published name")
    add = parser.add_argument_group("method").add_argument
    add("--policy", choices=("advaa", "random", "trivial", "autoaugment", "none", "replay"),
        help="what makes the views: the controller, uniform draws, TrivialAugment (wide), … (default: advaa)")
    add("--replay", metavar="FILE", help="policies.jsonl of a run, epoch by epoch (transfer)")
    add("--M", type=number(int, 1), help="views of every image, by M policies (default: 8)")
    add("--Q", type=number(int, 1), help="sub-policies in a policy; each view draws one (default: 5)")
    add("--controller-lr", type=number(float, 0, open_low=True), help="Adam's (default: 3.5e-4; grey 0.01)")
    add("--entropy-penalty", type=number(float, 0), help="weight of entropy (default: 1e-5; grey 0.2)")
    add("--carry-hidden", action=argparse.BooleanOptionalAction, default=True, help="between sub-policies")
    add("--collapse-guard", action="store_true", help="mix uniform choices into the controller's")
    add("--cutout", type=number(int, 0), metavar="PX", help="of every view (default: CIFAR 16, else 0)")
    add = parser.add_argument_group("optimiser", "defaults by data set and model").add_argument
    add("--lr", type=number(float, 0, open_low=True), help="of SGD with Nesterov momentum 0.9")
    add("--weight-decay", type=number(float, 0), help="of the classifier")
    add("--lr-schedule", choices=("cosine", "step"), help="to zero, or ×0.2 at 30, 60 and 80 %%")
    add("--epochs", type=number(int, 1), help="passes over the training set")
    add("--batch-size", type=number(int, 1), help="images per step over all ranks, each in M views")
    # fmt: on
    args = parser.parse(argv, published)
    if (args.policy == "replay") != (args.replay is not None):
        parser.error("--policy replay and --replay FILE go together")
    if args.policy == "advaa" and args.M == 1 and not args.evaluate:
        parser.error("--M 1: rewards are normalised across the policies: raise --M")
    if args.eval_split == "val" and not args.validation:
        parser.error("--eval-split val needs images held out: add --validation")
    if args.evaluate and not args.weights and not common.has_checkpoint(args.run_dir):
        parser.error("--evaluate needs a run in --run-dir, or a --model with --weights")
    return args


# ---------- Image operations ----------

# Pillow's, bit for bit, on batches of uint8 images on any device. What is decided per image (operation,
# value, place) stays on the CPU, so nothing waits for the device.

# fmt: off
RANGES = {  # the value at magnitude 0 and at magnitude 9, linear between them
    "ShearX": (0, 0.3), "ShearY": (0, 0.3), "TranslateX": (0, 0.45), "TranslateY": (0, 0.45),  # of the side
    "Rotate": (0, 30),  # degrees, counter-clockwise
    "AutoContrast": (0, 0), "Invert": (0, 0), "Equalize": (0, 0),  # no value
    "Solarize": (0, 256), "Posterize": (4, 8),  # levels from here on are inverted; bits kept, truncated
    "Contrast": (0.1, 1.9), "Color": (0.1, 1.9), "Brightness": (0.1, 1.9), "Sharpness": (0.1, 1.9),
    "Cutout": (0, 0.2), "SamplePairing": (0, 0.4),  # of the width; weight of the other image
}
# fmt: on
OPS, IDENTITY, MAGNITUDES = tuple(RANGES), len(RANGES), 10  # IDENTITY: the number of no operation
GEOMETRIC = 5  # the first so many operations move pixels, and have a sign


def op_values(ops: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """Values, float32, of numbers in OPS (or IDENTITY) at magnitudes 0..9, geometric ones times signs ±1."""
    low, high = torch.tensor([*RANGES.values(), (0, 0)], dtype=torch.float64).unbind(1)
    values = low[ops] + (high - low)[ops] * magnitudes / (MAGNITUDES - 1)
    return torch.where(ops < GEOMETRIC, values * signs, values).float()


def apply_op(images: Tensor, name: str, magnitude: int | Tensor, sign: int | Tensor = 1) -> Tensor:
    """uint8 (B, 3, H, W), anew. magnitude 0..9, sign ±1: one, or (B,). Partners are the batch rolled by one,
    Cutout's places random. Raises InputError."""
    count, given = len(images), f"{name} {magnitude} {sign} of {images.dtype} {tuple(images.shape)}"
    magnitudes, signs = (torch.as_tensor(value).cpu().expand(count) for value in (magnitude, sign))
    known = name in OPS and {*magnitudes.tolist()} <= {*range(10)} and {*signs.tolist()} <= {-1, 1}
    if not known or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"{given}: expected one of {', '.join(OPS)}, 0 to 9, -1 or 1, uint8 (B, 3, H, W)")
    ops, before = torch.full((count,), OPS.index(name)), torch.arange(count).roll(1)
    return apply_ops(images, ops, op_values(ops, magnitudes, signs), torch.rand(count, 2), images, before)


def apply_ops(
    images: Tensor, ops: Tensor, values: Tensor, centres: Tensor, pool: Tensor, partners: Tensor
) -> Tensor:
    """Each of uint8 (V, 3, H, W) under its own op and value, anew. On the CPU: ops int64 (V,), numbers in OPS
    or IDENTITY; values (V,); centres (V, 2) of Cutout, (x, y) in [0, 1); partners int64 (V,), numbers in
    pool, uint8 (P, 3, H, W)."""
    order = ops.argsort(stable=True)  # one operation side by side; one copy in, one out
    result = images.index_select(0, beside(images, order))
    names = ("geometric", *OPS[GEOMETRIC:])
    sizes = (ops - GEOMETRIC + 1).clamp_min(0).bincount(minlength=len(names) + 1).tolist()
    for name, rows, group in zip(names, order.split(sizes), result.split(sizes)):
        value = values[rows]
        if not len(rows):
            continue
        if name == "geometric":
            changed = nearest_affine(group, affine_coefficients(ops[rows], value, *images.shape[2:]))
        elif name == "Cutout":
            changed = fill_boxes(group, cutout_boxes(centres[rows], value, *images.shape[2:]))
        elif name == "SamplePairing":
            changed = blend(group, pool.index_select(0, beside(images, partners[rows])), value)
        else:
            changed = KERNELS[name](group, value)
        group.copy_(changed)
    return result.index_select(0, beside(images, order.argsort()))


def beside(images: Tensor, values: Tensor) -> Tensor:
    return values.to(images.device, non_blocking=True)


def affine_coefficients(ops: Tensor, values: Tensor, height: int, width: int) -> Tensor:
    """Output to input pixels, int32 (n, 6) in 1/65536 px: column = a·x + b·y + c, row = …"""
    parts = (torch.where(ops == i, values.double(), 0.0) for i in range(GEOMETRIC))
    shear_x, shear_y, move_x, move_y, turn = parts
    angle, x, y = -torch.deg2rad(turn % 360), width / 2, height / 2
    a, sin = angle.cos().round(decimals=15), angle.sin().round(decimals=15)
    b, d = sin + shear_x, shear_y - sin
    c = x - (a * x + sin * y) + (move_x * width + 0.5).floor() + (a * 0.5 + b * 0.5)
    f = y - (a * y - sin * x) + (move_y * height + 0.5).floor() + (d * 0.5 + a * 0.5)
    return (torch.stack([a, b, c, d, a, f], dim=1) * 65536 + 0.5).floor().int()


def nearest_affine(images: Tensor, coefficients: Tensor) -> Tensor:
    """Nearest neighbours by affine_coefficients, black outside."""
    height, width = images.shape[2:]
    a, b, c, d, e, f = beside(images, coefficients)[:, :, None, None].unbind(1)  # (n, 1, 1)
    x, y = pixels(images)[0], pixels(images)[1][:, None]
    column, row = (a * x + (b * y + c)) >> 16, (d * x + (e * y + f)) >> 16  # (n, H, W)
    near_column, near_row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    inside = (near_column == column) & (near_row == row)
    index = near_row.mul_(width).add_(near_column).flatten(1)[:, None].long()
    moved = images.flatten(2).gather(2, index.expand(-1, 3, -1)).view_as(images)
    return moved.mul_(inside[:, None].view(torch.uint8))


def pixels(images: Tensor) -> list[Tensor]:
    """Columns (W,) and rows (H,), int32."""
    return [torch.arange(side, dtype=torch.int32, device=images.device) for side in images.shape[:1:-1]]


# Kernels take images uint8 (n, 3, H, W) and values (n,) on the CPU


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    levels = images.flatten(2)
    low, high = levels.amin(2, keepdim=True).double(), levels.amax(2, keepdim=True).double()  # (n, 3, 1)
    ramp = torch.arange(256, dtype=torch.float64, device=images.device)
    # Pillow's order, as truncation shows; 255 / tensor would be 255 times its reciprocal
    scale = torch.full_like(low, 255) / (high - low).clamp_min(1)
    tables = torch.where(high > low, (ramp * scale + -low * scale).clamp(0, 255), ramp)
    return tables.to(torch.uint8).gather(2, levels.long()).view_as(images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import equalize_image

    return equalize_image(images)  # as Pillow's to the last bit


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    bright = images >= per_pixel(images, thresholds.ceil().short())
    return images ^ bright.view(torch.uint8) * 255


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & per_pixel(images, (0xFF00 >> bits.int().clamp(0, 8) & 0xFF).to(torch.uint8))


def per_pixel(images: Tensor, values: Tensor) -> Tensor:
    return beside(images, values).view(-1, 1, 1, 1)


def blend(start: Tensor, images: Tensor, weights: Tensor) -> Tensor:
    """start + weight·(images − start), truncated and clipped; unfused, as in Pillow."""
    start = start.float()
    blended = (images.float() - start).mul_(per_pixel(images, weights.float())).add_(start).clamp_(0, 255)
    return blended.short().byte()  # in two steps, four times as fast


def luma(images: Tensor) -> Tensor:
    """Pillow's grey, float32 (n, 1, H, W): exact, as sums are whole and below 2^24."""
    red, green, blue = images.float().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471).add_(32768).mul_(1 / 65536).floor_()


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    pixels = images[0, 0].numel()
    total = luma(images).int().sum((1, 2, 3), keepdim=True)  # int64
    return blend((2 * total + pixels) // (2 * pixels), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """From the image smoothed by 3×3 weights 1, 5 in the middle, but for its border."""
    smooth = images.float()
    inner = smooth[..., 1:-1, 1:-1]
    rows = smooth[..., :-2] + smooth[..., 1:-1] + smooth[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :] + 4 * inner
    inner.copy_((total / 13 + 0.5).floor_())  # a thirteenth of a whole number is never close to a half
    return blend(smooth, images, factors)


KERNELS = {
    "AutoContrast": auto_contrast,
    "Invert": lambda images, _: ~images,
    "Equalize": equalize,
    "Solarize": solarize,
    "Posterize": posterize,
    "Contrast": contrast,
    "Color": lambda images, factors: blend(luma(images), images, factors),
    "Brightness": lambda images, factors: blend(images.new_zeros(()), images, factors),
    "Sharpness": sharpness,
}


def cutout_boxes(centres: Tensor, sides: Tensor, height: int, width: int) -> Tensor:
    """Squares of side·width px about centres (n, 2), as far as they reach, none below half a pixel: int32 (n,
    4), left, right, top, bottom, exclusive."""
    side = (sides.double() * width)[:, None]
    first = (centres.double() * torch.tensor([width, height]) - side / 2).clamp_min(0).floor()  # (n, 2)
    last = torch.where(side < 0.5, first, first + (side - 1e-4).ceil())  # float32 makes 8 px 8.0000001
    return torch.stack([first, last], dim=2).flatten(1).int()


def fill_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Grey boxes, as of cutout_boxes, which may stick out, in place."""
    left, right, top, bottom = beside(images, boxes)[:, :, None].unbind(1)  # 4 × (n, 1)
    x, y = pixels(images)
    rows, columns = ((y >= top) & (y < bottom)).byte() * 255, ((x >= left) & (x < right)).byte() * 255
    cover = rows[:, None, :, None] & columns[:, None, None]  # (n, 1, H, W)
    return images.bitwise_and_(~cover).bitwise_or_(cover & 128)


def crop_flip_cutout(images: Tensor, offsets: Tensor, flips: Tensor, centres: Tensor, cutout: int) -> Tensor:
    """CIFAR's augmentation of uint8 (V, 3, H, W). On the CPU: offsets int64 (V, 2), (dx, dy) of the output in
    the input; flips bool (V,); centres int64 (V, 2) of grey squares of side `cutout`."""
    height, width = images.shape[2:]
    reach = int(offsets.abs().max()) if offsets.numel() else 0
    windows = F.pad(images, (reach,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (V, 3, dy, dx, H, W)
    row, dx, dy = beside(images, torch.stack([torch.arange(len(images)), *(offsets + reach).T]))
    result = windows[row, :, dy, dx]
    result = torch.where(per_pixel(images, flips), result.flip(3), result)
    boxes = torch.stack([centres - cutout // 2, centres + (cutout + 1) // 2], dim=2).flatten(1)
    return fill_boxes(result, boxes) if cutout else result


# ---------- Views ----------

CROP = {"cifar10": 4, "cifar100": 4, "fake": 4, "fashion_mnist": 2}  # px, with flips; pictures have theirs
DRAWS = 16  # numbers that a view draws


def augment(
    images: Tensor, pool: Tensor, rows: Tensor, draws: Tensor, menu: list[Tensor], crop: int, cutout: int
) -> Tensor:
    """Of each of uint8 (b, 3, H, W) M views, (b·M, 3, H, W), side by side. SamplePairing's partners are in
    pool, uint8 (P, 3, H, W), where rows (b,) are the images. draws: (b, M, DRAWS) in [0, 1), on the CPU.
    crop, cutout: px."""
    M = torch.arange(draws.shape[1])
    chosen, signs, chances, partners, centres, offsets, flips, holes = draws.split(
        (1, 2, 2, 2, 4, 2, 1, 2), dim=2
    )
    ops, shares, values = (part[M, (chosen[..., 0] * part.shape[1]).long()] for part in menu)  # (b, M, …)
    ops = torch.where(chances < shares, ops, IDENTITY).flatten(0, 1)
    values = values.gather(3, (signs[..., None] * 2).long()).flatten(0, 2).view_as(ops)
    images, rows = images.repeat_interleave(len(M), 0), rows.repeat_interleave(len(M))
    partners, centres = (partners * (len(pool) - 1)).long().flatten(0, 1), centres.flatten(0, 1)
    for i in range(2):
        others = (rows + 1 + partners[:, i]) % len(pool)  # never the image itself, unless alone
        images = apply_ops(images, ops[:, i], values[:, i], centres[:, 2 * i : 2 * i + 2], pool, others)
    offsets, flips = (offsets * (2 * crop + 1)).long() - crop, (flips < 0.5) & (crop > 0)
    holes = (holes * min(images.shape[2:])).long()
    return crop_flip_cutout(images, offsets.flatten(0, 1), flips.flatten(), holes.flatten(0, 1), cutout)


def menu_of(policy: str, policies: Tensor | None, M: int, dataset: str, size: int) -> list[Tensor]:
    """What views of side `size` choose from: n sub-policies of each of policies (M, n, 2, 2), or of a
    baseline as torchvision has it: ops (M, n, 2), their probabilities, values by sign (M, n, 2, 2)."""
    if policies is not None:
        ops, magnitudes = policies.unbind(-1)
        values = [op_values(ops, magnitudes, torch.tensor(sign)) for sign in (1, -1)]
        return [ops, torch.ones_like(values[0]), torch.stack(values, dim=-1)]
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy, TrivialAugmentWide

    space, none = TrivialAugmentWide()._augmentation_space(31), ("Identity", 1.0, 0)
    pairs = [((name, 1.0, i), none) for name in space for i in range(31)]
    pairs = pairs if policy == "trivial" else [(none, none)]
    if policy == "autoaugment":
        kinds = dict.fromkeys(common.SMALL, "svhn") | {"imagenet": "imagenet", "folder": "imagenet"}
        source = AutoAugment(AutoAugmentPolicy(kinds.get(dataset, "cifar10")))
        space, pairs, size = source._augmentation_space(10, (32, 32)), source.policies, 32
    ops, shares, values = [], [], []
    for name, share, strength in sum(pairs, ()):
        magnitudes, signed = space[name]
        value = magnitudes[strength].item() if magnitudes.ndim else 0.0
        value /= size if name.startswith("Translate") else 1  # px as a share of the side
        start = float(name in ("Brightness", "Color", "Contrast", "Sharpness"))  # torchvision counts from 1
        ops.append(OPS.index(name) if name in OPS else IDENTITY)
        shares.append(share)
        values.append((start + value, start + value * (-1) ** signed))
    parts = (torch.tensor(part).unflatten(0, (-1, 2)) for part in (ops, shares, values))
    return [part.expand(M, *part.shape) for part in parts]


# ---------- Controller: small, on the CPU of every rank alike ----------

GUARD_SHARE = 0.3  # of uniform choices
COLLAPSED = 0.25  # below this share of the largest entropy


class Controller(nn.Module):
    """An LSTM that emits policies: 4·Q choices, op, magnitude, op …, each seen by the next, at first nearly
    uniform. Mixed with 0.3 uniform choices, the entropy stays above 0.48 of the largest."""

    def __init__(self, Q: int, carry_hidden: bool = True, uniform_share: float = 0.0):
        super().__init__()
        self.Q, self.carry_hidden, self.uniform_share = Q, carry_hidden, uniform_share
        self.cell, self.embedding = nn.LSTMCell(32, 100), nn.Embedding(len(OPS) + MAGNITUDES, 32)
        self.heads = nn.ModuleList([nn.Linear(100, len(OPS)), nn.Linear(100, MAGNITUDES)])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
        for head in self.heads:
            nn.init.zeros_(head.bias)

    def forward(self, M: int, draws: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """M policies (M, Q, 2, 2), log p of each (M,), and each choice's entropy in nats (M, Q, 2, 2)."""
        found = []  # of each choice: its number, log p, entropy
        for position in range(4 * self.Q):
            if position == 0 or (position % 4 == 0 and not self.carry_hidden):
                token, state = self.embedding.weight.new_zeros(M, 32), None
            kind = position % 2  # 0: an op, 1: its magnitude
            state = self.cell(token, state)
            probabilities = self.heads[kind](state[0]).softmax(1)
            uniform = self.uniform_share / probabilities.shape[1]
            probabilities = (1 - self.uniform_share) * probabilities + uniform
            choice = torch.multinomial(probabilities.detach(), 1, generator=draws)
            logs = probabilities.clamp_min(1e-30).log()
            found.append((choice[:, 0], logs.gather(1, choice)[:, 0], -(probabilities * logs).sum(1)))
            token = self.embedding(choice[:, 0] + kind * len(OPS))
        choices, logs, entropies = (torch.stack(part, 1) for part in zip(*found))
        return choices.view(M, self.Q, 2, 2), logs.sum(1), entropies.view(M, self.Q, 2, 2)


def normalised_rewards(losses: Tensor) -> Tensor:
    """(L − mean)/(std + 1e-5), losses (M,)."""
    return (losses - losses.mean()) / (losses.std() + 1e-5)


def reinforce_loss(log_probabilities: Tensor, rewards: Tensor, entropies: Tensor, penalty: float) -> Tensor:
    """−(mean over M of R·log p) − penalty · mean entropy of a policy: REINFORCE (Williams 1992)."""
    return -(rewards * log_probabilities).mean() - penalty * entropies.flatten(1).sum(1).mean()


def normalised_entropy(entropies: Tensor) -> float:
    """Mean over all choices of entropy / largest entropy (log 16 of an op, log 10 of a magnitude)."""
    return (entropies / torch.tensor([len(OPS), MAGNITUDES]).log()).mean().item()


def policy_record(epoch: int, policies: Tensor, losses: list[float]) -> dict:
    """A line of policies.jsonl: {"epoch", "policies": [[[[op, magnitude], …2], …Q], …M], "losses": […M]}."""
    named = [[[[OPS[op], m] for op, m in pair] for pair in policy] for policy in policies.tolist()]
    return {"epoch": epoch, "policies": named, "losses": losses}


def policies_of(record: dict) -> Tensor:
    named = record["policies"]
    return torch.tensor([[[[OPS.index(op), m] for op, m in pair] for pair in policy] for policy in named])


def read_policies(file: str, epochs: int, M: int, Q: int) -> list[Tensor]:
    found, shape = [], (M, Q, 2, 2)
    try:
        for line in Path(file).read_text().splitlines()[:epochs]:
            policies = policies_of(json.loads(line))
            if policies.shape != shape or not {*policies[..., 1].flatten().tolist()} <= {*range(10)}:
                raise ValueError(f"policies are {tuple(policies.shape)}, not {shape} of 0 to 9")
            found.append(policies)
    except OSError as error:
        raise InputError(f"--replay {file}: {error.strerror}; name the policies.jsonl of a run") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        where = f"--replay {file}, line {len(found) + 1}"
        raise InputError(f"{where}: {error}; ops are {', '.join(OPS)}") from error
    if len(found) < epochs:
        raise InputError(f"--replay {file} holds {len(found)} epochs, not {epochs}: lower --epochs")
    return found


# ---------- Data, evaluation, pictures ----------

PERTURBATIONS = ("gaussian_noise", "shot_noise", "motion_blur", "zoom_blur", "snow")  # CIFAR-10-P's
PERTURBATIONS += ("brightness", "translate", "rotate", "tilt", "scale")


def balanced_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """`count` numbers of images, as many of each class as can be."""
    if count > len(labels):
        raise InputError(f"--num-train {count}: there are {len(labels)} training images")
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # class by class
    before = labels.bincount().cumsum(0) - labels.bincount()
    rank = torch.arange(len(labels)) - before[labels[order]]  # within its class
    return order[rank.argsort(stable=True)][:count].sort().values


def further_sets(
    dataset: str, data_root: str, machine: Machine, split: str, most: int, notes: list[str]
) -> tuple[dict[str, Data], dict[str, np.ndarray]]:
    """At most so many modified images; CIFAR-10-P's sequences, uint8 (N, frames, 32, 32, 3), not yet read."""
    shifted, perturbed, folder = {}, {}, Path(data_root) / "CIFAR-10-P"
    if dataset in common.SMALL:
        made = common.modified_digits(split, data_root, 10 if dataset == "digits" else 1, dataset=dataset)
        shifted["modified"] = common.Images(*made[:2], machine).take(most)
    if dataset != "cifar10" or split != "test":
        return shifted, perturbed
    advice = common.how_to_get("cifar10-p", data_root)
    if not folder.is_dir():
        notes.append(f"{folder} is missing: {advice}")
    for file in (folder / f"{name}.npy" for name in PERTURBATIONS * folder.is_dir()):
        try:
            perturbed[file.stem] = frames = np.lib.format.open_memmap(file, mode="r")[:most]
            if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[2:] != (32, 32, 3):
                raise ValueError(f"it holds {frames.dtype} {frames.shape}")
        except Exception as error:  # as NumPy, its parser, mmap meet
            raise InputError(f"{file} is missing or damaged ({error}): {advice}") from error
    return shifted, perturbed


def flip_probability(predictions: Tensor, noise: bool) -> float:
    """Percent of (N, frames) that differ from the one before, for noise from the first."""
    before = predictions[:, :1] if noise else predictions[:, :-1]
    return 100 * (predictions[:, 1:] != before).double().mean().item()


def top1_error(model: nn.Module, data: Data) -> float:
    return 100 - common.evaluate([model], data)[0]["top1_accuracy"]


def evaluate_classifier(
    model: nn.Module, sets: common.Sets, shifted: dict[str, Data], perturbed: dict, machine: Machine
) -> dict:
    mean = lambda values: values and values | {"mean": sum(values.values()) / len(values)}
    clean = common.evaluate([model], sets.test)[0]
    results = {f"{top}_error": 100 - clean[f"{top}_accuracy"] for top in ("top1", "top5")}
    results["shifted"] = {name: top1_error(model, data) for name, data in shifted.items()}
    found = common.evaluate_corruptions([model], sets.corruptions, machine)[0] if sets.corruptions else {}
    results["corruptions"] = mean({name: 100 - sum(part) / len(part) for name, part in found.items()})
    flips = {}
    for name, frames in perturbed.items():
        images = torch.from_numpy(frames.copy()).flatten(0, 1).permute(0, 3, 1, 2).to(machine.device)
        predictions = common.predict_logits(model.eval(), images, machine).argmax(1)
        flips[name] = flip_probability(predictions.view(frames.shape[:2]), "noise" in name)
    return results | ({"flip_probability": mean(flips)} if flips else {})


def protocol_line(dataset: str, model: str, split: str, sets: common.Sets, shifted: dict[str, Data]) -> str:
    parts = [f"{dataset} {split} ({len(sets.test)} images)"]
    parts += [f"modified {dataset} made from them ({len(data)} images)" for data in shifted.values()]
    parts += [f"{sets.corruptions.protocol}, mean over severities"] if sets.corruptions else []
    return f"{', '.join(parts)}; top-1 error (%); inputs normalised by {common.normalisation(dataset, model)}"


def print_results(results: dict, directory: Path) -> None:
    rows = {"clean, top-1": results["top1_error"], "clean, top-5": results["top5_error"]} | results["shifted"]
    for kind in ("corruptions", "flip_probability"):
        rows |= {f"{kind}, {name}": error for name, error in results.get(kind, {}).items()}
    print(f"\n{results['method']} ({results['model']}), error (%)\n")
    for name, error in rows.items():
        print(f"{name:32s}{error:8.2f}")
    first, last, collapsed = results["controller"].values()
    if last is not None:
        print(f"\nentropy {first:.2f} → {last:.2f} of the largest: {'' if collapsed else 'not '}collapsed")
    print(f"\n{results['protocol']}\n{results['wall_seconds']} s; {directory}")


def draw_pictures(
    directory: Path, title: str, history: list, records: list, images: Tensor | None, M: int, *how: object
) -> None:
    """curves.png; views.png of images uint8 (b, 3, H, W), augmented with `how`; policies.png: each op's
    share and strength."""
    with common.figure(directory / "curves.png", 1, 2, (10, 4), title) as ((left, right),):
        common.curves(left, history, {"entropy": "entropy, of the largest", "loss": "training loss"})
        errors = {"train_error": "training views", "val_error": "validation images"}
        common.curves(right, history, errors, ylabel="top-1 error (%)")
    if images is not None:
        draws = torch.rand(len(images), M, DRAWS, generator=Generator().manual_seed(0))
        views = augment(images, images, torch.arange(len(images)), draws, *how)
        grid = torch.cat([images[:, None], views.unflatten(0, (len(images), M))], dim=1)
        tiles = F.pad(grid, (1, 1, 1, 1), value=255).permute(2, 0, 3, 1, 4)  # (3, b, H + 2, 1 + M, W + 2)
        with common.figure(directory / "views.png", 1, 1, (1 + M, 0.5 + len(images)), title) as axes:
            common.show(axes[0, 0], tiles.flatten(3).flatten(1, 2))
    if not records:
        return
    policies = [policies_of(record).flatten(0, 2).T for record in records]
    counts = torch.stack([ops.bincount(minlength=16) for ops, _ in policies], 1)
    means = torch.stack([ops.bincount(magnitudes, 16) for ops, magnitudes in policies], 1) / counts
    panels = {
        "share of an epoch's choices": counts / counts.sum(0),
        "mean magnitude (white: did not occur)": means,
    }
    extent = (0.5, len(records) + 0.5, len(OPS) - 0.5, -0.5)
    with common.figure(directory / "policies.png", 1, 2, (13, 4.8), title) as axes:
        for axis, (label, values) in zip(axes[0], panels.items()):
            image = axis.imshow(values.numpy(), aspect="auto", extent=extent, vmin=0)
            axis.set_yticks(range(len(OPS)), OPS, fontsize=9)
            axis.set(title=label, xlabel="epoch")
            axis.figure.colorbar(image, ax=axis)


def lr_factor(schedule: str, step: int, total_steps: int) -> float:
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return 0.2 ** sum(step >= share * total_steps for share in (0.3, 0.6, 0.8))


def epoch_figures(totals: list[float]) -> dict:
    """Means from sums: loss of each policy, wrong views, views."""
    *losses, wrong, count = totals
    means = [loss * len(losses) / count for loss in losses]
    return {"loss": sum(losses) / count, "train_error": 100 * wrong / count, "losses": means}


def keep_epoch(directory: Path, entry: dict, best: dict, records: list[dict], model: nn.Module) -> None:
    if entry.get("val_error", math.inf) < best.get("val_error", math.inf):
        best.update(epoch=entry["epoch"], val_error=entry["val_error"])
        common.save_atomically(best | {"state_dict": model.state_dict()}, directory / "best.pt")
    if records:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        common.write_atomically(directory / "policies.jsonl", lines.encode())


def main() -> None:
    args = parse_args()
    machine = common.start_machine(args.device, args.amp, args.seed)
    workers, M = 0 if args.dry_run else machine.workers(args.workers), args.M

    # All is looked for before the first file is written
    where, split = (args.dataset, args.data_root, machine), args.eval_split
    how = {"workers": workers, "split": split, "validation": args.validation, "train": not args.evaluate}
    how |= {"generate": args.generate_corruptions, "corrupted_directory": args.corruptions_path}
    sets = common.load_sets(*where, **how, dry_run=args.dry_run)
    if args.num_train and sets.train and not args.dry_run:
        chosen = balanced_subset(sets.train.labels.cpu(), args.num_train, args.seed)
        sets = sets._replace(train=sets.train.part(chosen))
    shifted, perturbed = further_sets(*where, split, 16 if args.dry_run else 10**9, sets.notes)
    n_train, size, crop = len(sets.train or ()), sets.test.size, CROP.get(args.dataset, 0)
    if args.dry_run:
        args.batch_size, args.epochs = min(args.batch_size, 16), 2
    args.batch_size = min(args.batch_size, n_train or args.batch_size)  # few: all of them
    if args.batch_size < machine.world_size:
        raise InputError(f"--batch-size {args.batch_size}: fewer than the {machine.world_size} processes")
    steps_per_epoch = 1 if args.dry_run else n_train // args.batch_size
    replays = args.replay and not args.evaluate
    replayed = read_policies(args.replay, args.epochs, M, args.Q) if replays else []

    method, origin, file = args.policy, "untrained", Path(args.weights or "")
    classifier = common.build_model(args.model, len(sets.classes), args.dataset)
    if args.weights and not common.has_checkpoint(args.run_dir):
        how = (args.weights, machine, args.data_root, args.dry_run)
        origin = common.load_classifier(classifier, args.model, args.dataset, *how)
        if args.evaluate:
            method = f"{file.resolve().parent.name}-" * (file.stem in ("checkpoint", "best")) + file.stem
    classifier.to(machine.device, memory_format=machine.weight_layout).train()
    controller = Controller(args.Q, args.carry_hidden, GUARD_SHARE * args.collapse_guard)
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.SGD(classifier.parameters(), args.lr, **settings)
    controller_optimizer = torch.optim.Adam(controller.parameters(), args.controller_lr, fused=True)
    scaler, totals = machine.scaler(), common.Totals(M + 2, machine)  # as epoch_figures takes them
    run = common.Run(args, machine, method)
    parts = {"classifier": classifier, "optimizer": optimizer, "scaler": scaler, "totals": totals}
    parts |= {"controller": controller, "controller_optimizer": controller_optimizer}
    progress = {"history": [], "records": [], "best": {}, "n_train": n_train}
    history, records, best, n_train = run.track(progress, **parts).values()
    if run.finished:
        return machine.is_main and print_results(common.read_results(run.directory), run.directory)
    run.say(
        f"{n_train} training images, {steps_per_epoch} steps of {args.batch_size} × {M} views per epoch",
        f"{args.model}: {sum(p.numel() for p in classifier.parameters()):,} parameters, {origin}",
        *sets.notes,
    )
    if args.compile:
        classifier.compile()  # in place: its keys stay
    trained = common.distribute(classifier, machine)

    sampled, places = None, torch.arange(args.batch_size)
    batches = sets.train.batches(args.batch_size, args.seed, run.step, crop=True) if sets.train else ()
    for step, (images, labels, pool) in run.steps(batches, args.epochs * steps_per_epoch, steps_per_epoch):
        epoch, batch = divmod(step, steps_per_epoch)
        if epoch != sampled:  # as (seed, epoch) and the controller have it
            sampled, draws = epoch, Generator().manual_seed(common.mix("policies", args.seed, epoch))
            policies, log_probabilities, entropies = controller(M, draws)
            uniform = (torch.rand(policies.shape, generator=draws) * torch.tensor([16, 10])).long()
            policies = {"advaa": policies, "random": uniform}.get(args.policy)
            policies = replayed[epoch] if replayed else policies
            menu = menu_of(args.policy, policies, M, args.dataset, size)
        draws = Generator().manual_seed(common.mix(args.seed, step))
        draws = torch.rand(args.batch_size, M, DRAWS, generator=draws, dtype=torch.float64)
        rows = machine.own_rows(places) if len(pool) == len(places) else torch.arange(len(pool))
        views = augment(images, pool, rows, machine.own_rows(draws), menu, crop, args.cutout)
        inputs = machine.layout(common.to_float(views))  # (b·M, 3, H, W)
        with machine.autocast():
            logits = trained(inputs).float()
        targets = labels.repeat_interleave(M)
        losses = F.cross_entropy(logits, targets, reduction="none")
        lr = args.lr * lr_factor(args.lr_schedule, step, args.epochs * steps_per_epoch)
        loss = losses.sum() * machine.world_size / (args.batch_size * M)
        common.descend(loss, optimizer, scaler, lr)
        wrong = (logits.argmax(1) != targets).sum()
        totals.add(losses.view(-1, M).sum(0), wrong, torch.full_like(wrong, len(targets)))
        if (step + 1) % args.log_every == 0:
            loss, error, _ = epoch_figures(totals.read(step + 1)).values()
            run.log(step + 1, loss=loss, train_error=error, lr=lr)
        if batch < steps_per_epoch - 1:
            continue
        entry = {"epoch": epoch + 1, **epoch_figures(totals.read(step + 1))}
        totals.own.zero_()
        if policies is not None:
            records.append(policy_record(epoch + 1, policies, entry["losses"]))
        if args.policy == "advaa":
            rewards = normalised_rewards(torch.tensor(entry["losses"]))
            objective = reinforce_loss(log_probabilities, rewards, entropies, args.entropy_penalty)
            common.descend(objective, controller_optimizer, torch.amp.GradScaler(enabled=False))
            entry["entropy"] = normalised_entropy(entropies)
        if sets.val:
            entry["val_error"] = top1_error(classifier, sets.val)
        if machine.is_main:
            keep_epoch(run.directory, entry, best, records, classifier)
        history.append(entry)
        run.log(step + 1, **entry)

    line = protocol_line(args.dataset, args.model, split, sets, shifted)
    if history:
        line += f"; {n_train} training images, {M} views of each, the last of {len(history)} epochs"
    results = {"n_train": n_train, "n_eval": len(sets.test), "protocol": line}
    results |= evaluate_classifier(classifier, sets, shifted, perturbed, machine)
    entropy = [entry["entropy"] for entry in history if "entropy" in entry] or [None]
    collapsed = entropy != [None] and min(entropy) < COLLAPSED
    results["controller"] = {"entropy_first": entropy[0], "entropy_last": entropy[-1], "collapsed": collapsed}
    results |= {"best_on_validation": best} if best else {}
    run.log(run.step, test_error=results["top1_error"], test_corruptions=results["corruptions"].get("mean"))
    if machine.is_main and history:
        images = sets.train.take(6).tensors()[0] if sets.train else None
        title = f"{method} on {args.dataset}, {args.model}, seed {args.seed}"
        last = policies_of(records[-1]) if records else None
        how = (menu_of(args.policy, last, M, args.dataset, size), crop, args.cutout)
        draw_pictures(run.directory, title, history, records, images, M, *how)
    results = run.finish(results)
    if machine.is_main:
        print_results(results, run.directory)


if __name__ == "__main__":
    common.run_script(main)
