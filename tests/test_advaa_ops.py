"""Adversarial AutoAugment's image operations: Pillow bit for bit, batches as single images."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formats import example_pictures
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from advaa import GEOMETRIC, IDENTITY, OPS, RANGES, apply_op, apply_ops, crop_flip_cutout, op_values
from common import InputError, load_split

ENHANCEMENTS = ("Contrast", "Color", "Brightness", "Sharpness")
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def pictures(count=8, height=32, width=32, seed=0):
    return (example_pictures(count, max(height, width), seed)[..., :height, :width] * 255).round().byte()


def odd_images():
    """One level, two levels, a narrow range of levels, all levels at random, black, white."""
    images = torch.full((6, 3, 32, 32), 77, dtype=torch.uint8)
    images[1, :, 10:20, 5:9] = 78
    images[2] = torch.randint(100, 120, (3, 32, 32))
    images[3] = torch.randint(0, 256, (3, 32, 32))
    images[4], images[5] = 0, 255
    return images


BATCHES = {
    "pictures": lambda: pictures(8),
    "not square": lambda: pictures(4, 40, 27),
    "digits": lambda: load_split("digits", "val")[0][:8],
    "odd": odd_images,
    "tiny": lambda: pictures(3, 2, 7),
}


def pil_affine(image, *coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


def pil_cutout(image, side, centre):
    """Pixels x0 ≤ x < x0 + side: an ImageDraw.rectangle, whose last pixels are drawn."""
    if side < 0.5:
        return image
    x, y = (int(max(0, place * length - side / 2)) for place, length in zip(centre, image.size))
    last = math.ceil(side - 1e-4) - 1
    image = image.copy()
    ImageDraw.Draw(image).rectangle((x, y, x + last, y + last), (128, 128, 128))
    return image


PIL_OPS = {
    "ShearX": lambda image, v: pil_affine(image, 1, v, 0, 0, 1, 0),
    "ShearY": lambda image, v: pil_affine(image, 1, 0, 0, v, 1, 0),
    "TranslateX": lambda image, v: pil_affine(image, 1, 0, v * image.width, 0, 1, 0),
    "TranslateY": lambda image, v: pil_affine(image, 1, 0, 0, 0, 1, v * image.height),
    "Rotate": lambda image, v: image.rotate(v),
    "AutoContrast": lambda image, v: ImageOps.autocontrast(image),
    "Invert": lambda image, v: ImageOps.invert(image),
    "Equalize": lambda image, v: ImageOps.equalize(image),
    "Solarize": lambda image, v: ImageOps.solarize(image, v),
    "Posterize": lambda image, v: ImageOps.posterize(image, int(v)),
}


def pil_op(image, name, value, partner, centre):
    if name == "Cutout":
        return pil_cutout(image, value * image.width, centre)
    if name in ENHANCEMENTS:
        return getattr(ImageEnhance, name)(image).enhance(value)
    return Image.blend(image, partner, value) if name == "SamplePairing" else PIL_OPS[name](image, value)


def value_of(name, magnitude, sign=1):
    """In Python's floats, as published code computes it."""
    low, high = RANGES[name]
    return (low + (high - low) * magnitude / 9) * (sign if name in SIGNED else 1)


def random_ops(count):
    ops, magnitudes, signs = (torch.randint(n, (count,)) for n in (17, 10, 2))
    return ops, op_values(ops, magnitudes, 1 - 2 * signs)


def assert_pillows(images, name, value):
    """The operation at random places, on partners of the same batch, gives exactly Pillow's pixels."""
    count, centres = len(images), torch.rand(len(images), 2)
    ops, values = torch.full((count,), OPS.index(name)), torch.full((count,), value)
    result = apply_ops(images, ops, values, centres, images, torch.arange(count).roll(1))
    pil = [Image.fromarray(pixels) for pixels in images.permute(0, 2, 3, 1).numpy()]
    expected = [pil_op(pil[i], name, value, pil[i - 1], centres[i].tolist()) for i in range(count)]
    assert np.array_equal(result.permute(0, 2, 3, 1), np.stack(expected)), value
    return result


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", OPS)
def test_pil(name, batch):
    images = BATCHES[batch]()
    before = images.clone()
    for magnitude, sign in itertools.product(range(10), (1, -1)):
        result = assert_pillows(images, name, value_of(name, magnitude, sign))
        assert result.dtype == torch.uint8 and result.data_ptr() != images.data_ptr()
        signs = torch.full((len(images),), sign)
        assert name == "Cutout" or torch.equal(result, apply_op(images, name, magnitude, signs))
    assert torch.equal(images, before)


ROTATE = (-135.0, -90.0, -45.0, 0.0, 45.0, 60.0, 90.0, 123.4, 135.0, 180.0, 270.0, 360.0, 400.0)
WIDE = {  # beyond RANGES, TrivialAugmentWide's among them
    **dict.fromkeys(("ShearX", "ShearY"), (-0.99, -0.5, 0.33, 0.99, 2.5)),
    **dict.fromkeys(("TranslateX", "TranslateY"), (-1.0, -0.71, 0.015625, 0.5, 1.0, 3.0)),
    **dict.fromkeys(ENHANCEMENTS, (0.0, 0.01, 0.5, 1.0, 1.37, 1.99, 5.0)),
    **{"Solarize": (0.0, 0.5, 127.5, 128.0, 255.0, 256.0, 300.0), "Posterize": (1.0, 2.0, 3.99, 7.0, 8.0)},
    **{"Cutout": (0.01, 0.5, 0.77, 1.0), "SamplePairing": (0.0, 0.5, 0.99, 1.0), "Rotate": ROTATE},
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_values(name):
    """And random angles and shears, where the rounding of fixed-point coefficients shows."""
    reach = {"ShearX": 0.99, "ShearY": 0.99, "TranslateX": 1, "TranslateY": 1, "Rotate": 360}.get(name, 0)
    for images in (pictures(3), pictures(3, 24, 41), odd_images(), pictures(4, 48, 48)):
        more = (2 * torch.rand(40 * bool(reach)) - 1) * reach
        for value in torch.cat([torch.tensor(WIDE[name]), more]).tolist():
            assert_pillows(images, name, value)


def test_op_values():
    assert len(OPS) == 16 == IDENTITY and OPS[:GEOMETRIC] == SIGNED
    ops, magnitudes = torch.arange(17).repeat_interleave(20), torch.arange(10).repeat(34)
    signs = torch.tensor([1, -1]).repeat_interleave(10).repeat(17)
    rows = zip(ops.tolist(), magnitudes.tolist(), signs.tolist())
    expected = torch.tensor([value_of(OPS[op], m, s) if op < 16 else 0 for op, m, s in rows]).double().float()
    assert torch.equal(op_values(ops, magnitudes, signs), expected)
    high = [0.3, 0.3, 0.45, 0.45, 30, 0, 0, 0, 256, 8, 1.9, 1.9, 1.9, 1.9, 0.2, 0.4]
    assert [most for _, most in RANGES.values()] == high


@pytest.mark.parametrize("height, width", [(32, 32), (20, 33)])
def test_mixed_batch_is_one_by_one(height, width):
    """Whatever else is in the batch, and in whatever memory format."""
    images, (ops, values) = pictures(16, height, width)[torch.randint(0, 16, (400,))], random_ops(400)
    centres, partners = torch.rand(400, 2), torch.randint(0, 16, (400,))
    pool, before = pictures(16, height, width, 5), images.clone()
    result = apply_ops(images, ops, values, centres, pool, partners)
    assert torch.equal(images, before) and torch.equal(pool, pictures(16, height, width, 5))
    rows = zip(*(part.split(1) for part in (images, ops, values, centres, partners, result)))
    for image, op, value, centre, partner, found in rows:
        assert torch.equal(found, apply_ops(image, op, value, centre, pool, partner)), op
    assert len(ops.unique()) == 17 and torch.equal(result[ops == IDENTITY], images[ops == IDENTITY])
    for other in (images.to(memory_format=torch.channels_last), torch.stack([images, images], 1)[:, 1]):
        assert torch.equal(apply_ops(other, ops, values, centres, pool, partners), result)


def test_no_number_is_read_off_the_device():
    """The meta device holds no data: reading a number off it, or mixing it with the CPU, would raise."""
    images, pool = (torch.zeros(n, 3, 32, 32, dtype=torch.uint8, device="meta") for n in (200, 4))
    ops, values = random_ops(200)
    result = apply_ops(images, ops, values, torch.rand(200, 2), pool, torch.randint(0, 4, (200,)))
    places = torch.randint(-4, 5, (200, 2)), torch.rand(200) < 0.5, torch.randint(0, 32, (200, 2))
    result = crop_flip_cutout(result, *places, 16)
    assert result.shape == images.shape and result.dtype == torch.uint8 and result.device.type == "meta"


@pytest.mark.parametrize("height, width", [(32, 32), (24, 37)])
@pytest.mark.parametrize("cutout", [0, 1, 7, 16, 80])
def test_crop_flip_cutout(height, width, cutout):
    count, images = 64, pictures(64, height, width)
    offsets, flips = torch.randint(-4, 5, (count, 2)), torch.rand(count) < 0.5
    centres = torch.stack([torch.randint(0, width, (count,)), torch.randint(0, height, (count,))], 1)
    result = crop_flip_cutout(images, offsets, flips, centres, cutout)
    for i in range(count):
        (dx, dy), (x, y) = offsets[i].tolist(), centres[i].tolist()
        expected = F.pad(images[i], (4, 4, 4, 4))[:, 4 + dy : 4 + dy + height, 4 + dx : 4 + dx + width]
        expected = (expected.flip(-1) if flips[i] else expected).clone()
        before_it, after_it = cutout // 2, (cutout + 1) // 2
        expected[:, max(y - before_it, 0) : y + after_it, max(x - before_it, 0) : x + after_it] = 128
        assert torch.equal(result[i], expected)


def test_errors_are_one_line():
    images, more = pictures(2), ((11 * torch.ones(2).long(), 1), (1, torch.tensor([1, 2])), (2.5, 1))
    bad = [(images, "Rotate", *rest) for rest in ((10, 1), (-1, 1), (1, 0), *more)] + [(images, "Blur", 1)]
    bad += [(part, "Rotate", 1) for part in (images.float(), images[0], images[:, :1], images.numpy())]
    for arguments in bad:
        with pytest.raises(InputError, match=r"\A.+\Z"):
            apply_op(*arguments)
