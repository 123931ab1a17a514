"""Tests of Adversarial AutoAugment's image operations: against Pillow bit for bit, batches against single images, speed."""

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision.transforms import functional as TF

import advaa as A
from advaa import IDENTITY, OPS, RANGES, apply_op, apply_ops, crop_flip_cutout, op_values
from common import InputError, example_pictures, load_split

SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def pictures(count=8, height=32, width=32, seed=0):
    return (example_pictures(count, max(height, width), seed)[..., :height, :width] * 255).round().byte()


def odd_images():
    """One level, two levels, a narrow range of levels, all levels at random, black, white."""
    generator = torch.Generator().manual_seed(0)
    images = torch.full((6, 3, 32, 32), 77, dtype=torch.uint8)
    images[1, :, 10:20, 5:9] = 78
    images[2] = torch.randint(100, 120, (3, 32, 32), generator=generator)
    images[3] = torch.randint(0, 256, (3, 32, 32), generator=generator)
    images[4], images[5] = 0, 255
    return images


BATCHES = {
    "pictures": lambda: pictures(8),
    "not square": lambda: pictures(4, 40, 27),
    "40 px": lambda: pictures(4, 40, 40, 1),
    "digits": lambda: load_split("digits", "val")[0][:8],
    "odd": odd_images,
    "tiny": lambda: pictures(3, 2, 7),
}


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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
    "Contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "Color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "Brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "Sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
}


def pil_op(image, name, value, partner=None, centre=None):
    if name == "Cutout":
        return pil_cutout(image, value * image.width, centre)
    return Image.blend(image, partner, value) if name == "SamplePairing" else PIL_OPS[name](image, value)


def value_of(name, magnitude, sign=1):
    """In Python's floats, as published code computes it."""
    low, high = RANGES[name]
    return (low + (high - low) * magnitude / 9) * (sign if name in SIGNED else 1)


def random_policy(count, generator, numbers=16):
    ops = torch.randint(0, numbers, (count,), generator=generator)
    return ops, op_values(ops, torch.randint(0, 10, (count,), generator=generator), 1 - 2 * torch.randint(0, 2, (count,), generator=generator))


# ------------------------------------------------------------------ one operation
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", OPS)
def test_pil(name, batch):
    """Every magnitude and sign, exactly Pillow's pixels; the input is left as it is."""
    images = BATCHES[batch]()
    before, centres = images.clone(), torch.rand(len(images), 2)
    pil = [to_pil(image) for image in images]
    for magnitude in range(10):
        for sign in (1, -1):
            result = apply_op(images, name, magnitude, sign, centres=centres)
            assert result.dtype == torch.uint8 and result.shape == images.shape and result.data_ptr() != images.data_ptr()
            value = value_of(name, magnitude, sign)
            expected = [pil_op(image, name, value, pil[i - 1], centres[i].tolist()) for i, image in enumerate(pil)]
            assert torch.equal(result, torch.stack([from_pil(image) for image in expected])), (magnitude, sign)
    assert torch.equal(images, before)


WIDE = {  # beyond RANGES, TrivialAugmentWide's among them
    "ShearX": (-0.99, -0.5, 0.33, 0.99, 2.5),
    "ShearY": (-0.99, -0.5, 0.33, 0.99, 2.5),
    "TranslateX": (-1, -0.71, 0.015625, 0.5, 1, 3),
    "TranslateY": (-1, -0.71, 0.015625, 0.5, 1, 3),
    "Rotate": (-135, -90, -45, 0, 45, 60, 90, 123.4, 135, 180, 270, 360, 400),
    "Solarize": (0, 0.5, 127.5, 128, 255, 256, 300),
    "Posterize": (1, 2, 3.99, 7, 8),
    "Contrast": (0, 0.01, 0.5, 1, 1.37, 1.99, 5),
    "Color": (0, 0.01, 0.5, 1, 1.37, 1.99, 5),
    "Brightness": (0, 0.01, 0.5, 1, 1.37, 1.99, 5),
    "Sharpness": (0, 0.01, 0.5, 1, 1.37, 1.99, 5),
    "Cutout": (0.01, 0.5, 0.77, 1),
    "SamplePairing": (0, 0.5, 0.99, 1),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_values(name):
    for images in (pictures(3), pictures(3, 24, 41), odd_images()):
        for value in WIDE[name]:
            value = float(torch.tensor(value, dtype=torch.float32))
            count = len(images)
            centres, partners = torch.rand(count, 2), torch.randint(0, count, (count,))
            result = apply_ops(images, torch.full((count,), OPS.index(name)), torch.full((count,), value), centres, images, partners)
            for i in range(count):
                expected = pil_op(to_pil(images[i]), name, value, to_pil(images[partners[i]]), centres[i].tolist())
                assert torch.equal(result[i], from_pil(expected)), (value, i)


def test_random_angles_and_shears():
    """Where the rounding of fixed-point coefficients shows."""
    images = pictures(4, 48, 48).repeat(50, 1, 1, 1)
    for name, reach in (("ShearX", 0.99), ("ShearY", 0.99), ("TranslateX", 1), ("TranslateY", 1), ("Rotate", 360)):
        values = (2 * torch.rand(len(images)) - 1) * reach
        result = apply_ops(images, torch.full((len(images),), OPS.index(name)), values)
        for image, value, got in zip(images, values.tolist(), result):
            assert torch.equal(got, from_pil(PIL_OPS[name](to_pil(image), value))), (name, value)


def test_torchvision():
    """Torchvision's own kernels for tensors: equal where these are exact, within a level where they round otherwise."""
    images = torch.cat([pictures(8), odd_images()])
    run = lambda name, value=0.0: apply_ops(images, torch.full((len(images),), OPS.index(name)), torch.full((len(images),), value))
    assert torch.equal(run("Invert"), TF.invert(images)) and torch.equal(run("Equalize"), TF.equalize(images))
    assert torch.equal(run("Solarize", 100.0), TF.solarize(images, 100)) and torch.equal(run("Posterize", 3.0), TF.posterize(images, 3))
    kernels = {"Contrast": TF.adjust_contrast, "Color": TF.adjust_saturation, "Brightness": TF.adjust_brightness, "Sharpness": TF.adjust_sharpness}
    for name, kernel in kernels.items():
        for value in (0.01, 0.5, 1.5, 1.99):
            assert (run(name, value).int() - kernel(images, value).int()).abs().max() <= 2, name
    assert (run("AutoContrast").int() - TF.autocontrast(images).int()).abs().max() <= 1


def test_cutout_is_a_square():
    """A grey square of ceil(side) px from the pixel that holds the corner; the magnitudes at 32 px by hand."""
    for magnitude, side in enumerate((0, 1, 2, 3, 3, 4, 5, 5, 6, 7)):
        changed = (apply_op(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "Cutout", magnitude, centres=torch.tensor([[0.5, 0.25]])) == 128)[0, 0]
        corner = 0.2 * 32 * magnitude / 9 / 2
        expected = torch.zeros(32, 32, dtype=torch.bool)
        expected[int(8 - corner) : int(8 - corner) + side, int(16 - corner) : int(16 - corner) + side] = True
        assert torch.equal(changed, expected)
    black = torch.zeros(64, 3, 40, 40, dtype=torch.uint8)
    areas = (apply_op(black, "Cutout", 9) == 128).float().sum((1, 2, 3)) / 3  # 8 px wide; centres drawn at random
    assert areas.max() == 64 and areas.min() >= 16 and len(areas.unique()) > 3
    torch.manual_seed(3)
    first = apply_op(black, "Cutout", 9)
    torch.manual_seed(3)
    assert torch.equal(first, apply_op(black, "Cutout", 9))


def test_sample_pairing_partners():
    images = pictures(6)
    partners = images.flip(0)
    expected = [Image.blend(to_pil(a), to_pil(b), 0.4 * 5 / 9) for a, b in zip(images, partners)]
    assert torch.equal(apply_op(images, "SamplePairing", 5, partners=partners), torch.stack([from_pil(image) for image in expected]))
    assert torch.equal(apply_op(images, "SamplePairing", 5), apply_op(images, "SamplePairing", 5, partners=images.roll(1, 0)))
    assert torch.equal(apply_op(images, "SamplePairing", 0), images)


# ------------------------------------------------------------------ batches
def test_op_values():
    assert len(OPS) == 16 and IDENTITY == 16 and OPS[: A.GEOMETRIC] == SIGNED
    ops = torch.arange(17).repeat_interleave(20)
    magnitudes, signs = torch.arange(10).repeat(34), torch.tensor([1, -1]).repeat_interleave(10).repeat(17)
    values = op_values(ops, magnitudes, signs)
    assert values.dtype == torch.float32 and values.shape == ops.shape
    expected = [value_of(OPS[op], m, s) if op < 16 else 0 for op, m, s in zip(ops.tolist(), magnitudes.tolist(), signs.tolist())]
    assert torch.equal(values, torch.tensor(expected, dtype=torch.float64).float())
    assert torch.equal(op_values(ops.view(17, 20), magnitudes.view(17, 20), signs.view(17, 20)), values.view(17, 20))
    table = {"ShearX": 0.3, "TranslateY": 0.45, "Rotate": 30, "Solarize": 256, "Posterize": 8, "Color": 1.9, "Cutout": 0.2, "SamplePairing": 0.4}
    assert all(RANGES[name][1] == high for name, high in table.items())
    bits = [int(v) for v in op_values(torch.full((10,), OPS.index("Posterize")), torch.arange(10), torch.ones(10).long())]
    assert bits == [4, 4, 4, 5, 5, 6, 6, 7, 7, 8]


@pytest.mark.parametrize("height, width", [(32, 32), (20, 33)])
def test_mixed_batch_is_one_by_one(height, width):
    """Whatever else is in the batch, and in whatever memory format."""
    generator = torch.Generator().manual_seed(1)
    count = 400
    images = pictures(16, height, width)[torch.randint(0, 16, (count,), generator=generator)]
    ops, values = random_policy(count, generator, 17)
    centres, partners = torch.rand(count, 2, generator=generator), torch.randint(0, 16, (count,), generator=generator)
    pool, before = pictures(16, height, width, 5), images.clone()
    result = apply_ops(images, ops, values, centres, pool, partners)
    assert torch.equal(images, before) and torch.equal(pool, pictures(16, height, width, 5)) and len(ops.unique()) == 17
    for i in range(count):
        at = slice(i, i + 1)
        assert torch.equal(result[at], apply_ops(images[at], ops[at], values[at], centres[at], pool, partners[at])), ops[i]
    assert torch.equal(result[ops == IDENTITY], images[ops == IDENTITY])
    assert torch.equal(apply_ops(images.to(memory_format=torch.channels_last), ops, values, centres, pool, partners), result)
    both = torch.stack([images, images], 1)[:, 1]  # not contiguous
    assert torch.equal(apply_ops(both, ops, values, centres, pool, partners), result)


def test_apply_op_with_tensors():
    images = pictures(10)
    magnitudes, signs = torch.arange(10), torch.tensor([1, -1] * 5)
    for name in OPS:
        centres = torch.rand(10, 2)
        result = apply_op(images, name, magnitudes, signs, images.flip(0), centres)
        for i in range(10):
            at = slice(i, i + 1)
            assert torch.equal(result[at], apply_op(images[at], name, i, int(signs[i]), images.flip(0)[at], centres[at])), name


def test_identity_and_empty():
    images = pictures(5)
    result = apply_ops(images, torch.full((5,), IDENTITY), torch.zeros(5))
    assert torch.equal(result, images) and result.data_ptr() != images.data_ptr()
    none = torch.zeros(0, dtype=torch.long)
    assert apply_ops(images[:0], none, none.float()).shape == (0, 3, 32, 32)
    assert crop_flip_cutout(images[:0], none.view(0, 2), none.bool(), none.view(0, 2), 8).shape == (0, 3, 32, 32)
    for name in OPS:
        assert apply_op(images[:0], name, 3).shape == (0, 3, 32, 32)


def test_no_number_is_read_off_the_device():
    """The meta device holds no data: reading a number off it, or mixing it with the CPU, would raise. (Blocking copies to it are not seen.)"""
    generator = torch.Generator().manual_seed(0)
    images, pool = torch.zeros(200, 3, 32, 32, dtype=torch.uint8, device="meta"), torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    ops, values = random_policy(200, generator, 17)
    result = apply_ops(images, ops, values, torch.rand(200, 2), pool, torch.randint(0, 4, (200,)))
    result = crop_flip_cutout(result, torch.randint(-4, 5, (200, 2)), torch.rand(200) < 0.5, torch.randint(0, 32, (200, 2)), 16)
    assert result.shape == images.shape and result.dtype == torch.uint8 and result.device.type == "meta"


# ------------------------------------------------------------------ crop, flip, Cutout
@pytest.mark.parametrize("height, width", [(32, 32), (24, 37)])
@pytest.mark.parametrize("cutout", [0, 1, 7, 16, 80])
def test_crop_flip_cutout(height, width, cutout):
    count = 64
    images = pictures(count, height, width)
    before = images.clone()
    offsets, flips = torch.randint(-4, 5, (count, 2)), torch.rand(count) < 0.5
    centres = torch.stack([torch.randint(0, width, (count,)), torch.randint(0, height, (count,))], 1)
    result = crop_flip_cutout(images, offsets, flips, centres if cutout else None, cutout)
    for i in range(count):
        dx, dy = offsets[i].tolist()
        expected = F.pad(images[i], (4, 4, 4, 4))[:, 4 + dy : 4 + dy + height, 4 + dx : 4 + dx + width]
        expected = (expected.flip(-1) if flips[i] else expected).clone()
        x, y = centres[i].tolist()
        before_it, after_it = cutout // 2, (cutout + 1) // 2
        expected[:, max(y - before_it, 0) : y + after_it, max(x - before_it, 0) : x + after_it] = 128
        assert torch.equal(result[i], expected)
    assert torch.equal(images, before) and result.is_contiguous()
    still = crop_flip_cutout(images, torch.zeros(count, 2).long(), torch.zeros(count).bool())
    assert torch.equal(still, images) and still.data_ptr() != images.data_ptr()


# ------------------------------------------------------------------ bad input
def test_errors_are_one_line():
    images, ones = pictures(2), torch.ones(2).long()
    for arguments in (
        (images, "Blur", 1, 1),
        (images, "Rotate", 10, 1),
        (images, "Rotate", -1, 1),
        (images, "Rotate", 2.5, 1),
        (images, "Rotate", True, 1),
        (images, "Rotate", 11 * ones, 1),
        (images, "Rotate", torch.ones(3).long(), 1),
        (images, "Rotate", 1, 0),
        (images, "Rotate", 1, torch.tensor([1, 2])),
        (images.float(), "Rotate", 1, 1),
        (images[0], "Rotate", 1, 1),
        (images[:, :1], "Rotate", 1, 1),
        (images.numpy(), "Rotate", 1, 1),
        (images, "SamplePairing", 1, 1, images[:1]),
        (images, "SamplePairing", 1, 1, images.float()),
        (images, "Cutout", 1, 1, None, torch.rand(3, 2)),
        (images, "Cutout", 1, 1, None, torch.ones(2, 2)),
        (images, "Cutout", 1, 1, None, torch.full((2, 2), math.nan)),
        (images, "Cutout", 1, 1, None, torch.zeros(2, 2).long()),
    ):
        with pytest.raises(InputError) as caught:
            apply_op(*arguments)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ speed
def test_three_times_as_fast_as_pil():
    """Two random operations, crop, flip and Cutout of 1,024 views: one thread of ours against the same, image by image, in Pillow."""
    generator, views = torch.Generator().manual_seed(0), 1024
    pool = pictures(128)
    images = pool.repeat(8, 1, 1, 1)
    stages = [(*random_policy(views, generator), torch.rand(views, 2), torch.randint(0, 128, (views,))) for _ in range(2)]
    offsets, flips, squares = torch.randint(-4, 5, (views, 2)), torch.rand(views) < 0.5, torch.randint(0, 32, (views, 2))

    def ours():
        result = images
        for ops, values, centres, partners in stages:
            result = apply_ops(result, ops, values, centres, pool, partners)
        return crop_flip_cutout(result, offsets, flips, squares, 16)

    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    plans = [[part.tolist() for part in stage] for stage in stages]
    places = list(zip(offsets.tolist(), flips.tolist(), squares.tolist()))

    def pillows():
        result = np.empty_like(arrays)
        others = [Image.fromarray(array) for array in arrays[:128]]
        for i, ((dx, dy), flip, (x, y)) in enumerate(places):
            image = Image.fromarray(arrays[i])
            for ops, values, centres, partners in plans:
                image = pil_op(image, OPS[ops[i]], values[i], others[partners[i]], centres[i])
            image = image.crop((dx, dy, dx + 32, dy + 32))
            result[i] = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
            result[i, max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8] = 128
        return result

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert np.array_equal(ours().permute(0, 2, 3, 1).numpy(), pillows())
        best = [math.inf, math.inf]
        for _ in range(5):
            for i, run in enumerate((ours, pillows)):
                started = time.perf_counter()
                run()
                best[i] = min(best[i], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    print(f"views/s, one thread: {views / best[0]:.0f}, Pillow {views / best[1]:.0f}")
    assert best[1] > 3 * best[0]
