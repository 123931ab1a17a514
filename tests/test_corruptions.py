"""Corruptions: contract, growth with severity, and each against PIL, SciPy, ImageMagick or a closed form."""

import colorsys
import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from formats import example_pictures
from PIL import Image
from scipy import ndimage, stats

import common as C
from common import CORRUPTIONS, SEVERITIES, InputError, corrupt

FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")  # no draws
LEVELS = (1, 2, 3, 4, 5)
ROWS = [(table, severity) for table in (0, 1) for severity in LEVELS]  # CIFAR-10-C's constants, ImageNet-C's


def pictures(count=8, side=32, seed=0):
    """8-bit photograph-like images as floats."""
    return (example_pictures(count, side, seed) * 255).round() / 255


def digits(count=64, side=32):
    """Sparse white strokes on black."""
    grid, image = torch.arange(side) / side, torch.zeros(count, side, side)
    for _ in range(3):
        ends = 0.2 + 0.6 * torch.rand(count, 4, 1, 1)
        for t in torch.linspace(0, 1, 20):
            x, y = ends[:, 0] * t + ends[:, 1] * (1 - t), ends[:, 2] * t + ends[:, 3] * (1 - t)
            distance = ((grid - x) ** 2 + (grid[:, None] - y) ** 2).sqrt()
            image = torch.maximum(image, (1.6 - side * distance).clamp(0, 1))
    return ((image * 255).round() / 255)[:, None].expand(-1, 3, -1, -1).contiguous()


def constants(name, table, severity):
    return SEVERITIES[name][table][severity - 1]


def keys(count):
    return C.scramble(torch.arange(count) + 12345)


def through_pil(images, change, *how):
    """A batch whose images were changed one by one, as 8-bit pictures of PIL's."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    changed = np.stack([change(Image.fromarray(image), *how) for image in pixels])
    return torch.from_numpy(changed).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("shape", [(2, 28, 28), (5, 32, 32), (3, 40, 56), (2, 130, 97), (1, 224, 224)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_contract(name, shape):
    count, height, width = shape
    images = pictures(count, max(shape))[..., :height, :width]
    before = images.clone()
    for severity in LEVELS:
        result = corrupt(images, name, severity, 0)
        assert result.shape == images.shape and 0 <= result.min() <= result.max() <= 1  # so no NaN either
        assert (name, severity) == ("glass_blur", 1) or not torch.equal(result, images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_other_types_flat_images_and_no_images(name):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        result = corrupt(pictures(2).to(dtype), name, 3, 0)
        assert result.dtype == dtype and 0 <= result.min() <= result.max() <= 1
    flat = torch.tensor([0, 0.5, 1]).view(3, 1, 1, 1)
    for table, severity in ROWS:
        result = corrupt(flat.expand(3, 3, *[96 if table else 32] * 2), name, severity, 0)
        assert 0 <= result.min() <= result.max() <= 1
    if name != "defocus_blur":  # MKL's FFT refuses an empty batch
        assert corrupt(torch.zeros(0, 3, 32, 32), name, 1, 0).shape == (0, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = corrupt(pictures(4), name, 3, 0)
    assert torch.equal(inside, corrupt(pictures(4), name, 3, 0))


@pytest.mark.parametrize("side, count", [(32, 37), (96, 11)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_batch_size_and_position_do_not_matter(name, side, count):
    """Bit for bit, on one device, whatever the number of threads, the memory format or the order."""
    images = pictures(count, side)
    for severity in LEVELS:
        whole = corrupt(images, name, severity, 7)
        for start, stop in ((0, 1), (2, count), (count - 1, count)):
            assert torch.equal(corrupt(images[start:stop], name, severity, 7), whole[start:stop])
        assert torch.equal(corrupt(images.flip(0), name, severity, 7).flip(0), whole)
    assert torch.equal(corrupt(images.to(memory_format=torch.channels_last), name, severity, 7), whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    again = corrupt(images, name, severity, 7)
    torch.set_num_threads(threads)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_seed_and_content_choose_the_randomness(name):
    images = pictures(4)
    changed = (corrupt(images, name, 4, 0) != corrupt(images, name, 4, 1)).flatten(1).any(1)
    assert changed.tolist() == [name not in FIXED] * 4
    twins = images[:1].repeat(3, 1, 1, 1)
    twins[2, 0, 0, 0] = (twins[2, 0, 0, 0] * 255 + 1) % 256 / 255  # one pixel, one level
    one, same, other = corrupt(twins, name, 4, 0)
    assert torch.equal(one, same) and (name != "gaussian_noise" or (one != other).float().mean() > 0.9)


def test_uint8_images_are_corrupted_in_parts_and_rounded():
    images = C.to_uint8(pictures(20, 260))  # 15 of them make a million pixels
    result = C.corrupt_uint8(images, "fog", 3, 0)
    assert result.dtype == torch.uint8 and result.shape == images.shape
    assert torch.equal(result, C.to_uint8(corrupt(C.to_float(images), "fog", 3, 0)))


def test_errors_are_one_line():
    images = pictures(1)
    for batch, name, severity, said in (
        (images, "rain", 1, "unknown corruption 'rain'; choose from gaussian_noise, "),
        (images, "fog", 0, "severity must be 1, 2, 3, 4 or 5, not 0"),
        (images, "fog", 2.5, "not 2.5"),
        (images, "fog", "3", "not '3'"),
        (images[0], "fog", 1, "must be floating (B, 3, H, W), not torch.float32 (3, 32, 32)"),
        (images[:, :1], "fog", 1, "(1, 1, 32, 32)"),
        (C.to_uint8(images), "fog", 1, "not torch.uint8"),
    ):
        with pytest.raises(InputError) as caught:
            corrupt(batch, name, severity, 0)
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_light_import():
    heavy = "{'kornia', 'matplotlib', 'scipy', 'torchvision', 'skimage'}"
    code = f"import sys, common; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Steps s -> s + 1 at which the published constants do not promise a larger L2 distance.
NOT_GROWING = {
    ("frost", 0): (3,),  # as much ice, and less of the picture, which ice is brighter than
    ("frost", 1): (3,),
    # Between 1 and 3 only the blur around the same one-pixel shuffle grows, which takes some of the shuffle's
    # distance back (0.05, 0.25, 0.4; the first two blur nothing); 4 -> 5 is the same after two shuffles.
    ("glass_blur", 0): (1, 2, 4),
    ("glass_blur", 1): (1, 3),  # (0.7, 1 px, 2 rounds) -> (0.9, 2 px, 1); 3 rounds of 2 px -> 2 of 3 px
    ("motion_blur", 0): (3,),  # (6, 2) and (8, 2): the same Gaussian to 1e-9, so equal in distribution
    ("elastic_transform", 0): (1, 2, 3, 4),  # the jitter shrinks 0.08 -> 0.03 faster than the waves grow
    ("elastic_transform", 1): (2,),  # the jitter falls from 0.2 to 0.02
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_distance_grows_with_severity(name):
    for images in (pictures(256), pictures(64, 64), pictures(64, 96), digits()):
        results = [corrupt(images, name, severity, 0) for severity in LEVELS]
        found = [(result - images).flatten(1).norm(dim=1).mean().item() for result in results]
        falls = {step for step in (1, 2, 3, 4) if found[step] <= found[step - 1]}
        assert found[4] > 0 and falls <= {*NOT_GROWING.get((name, int(images.shape[3] > 64)), ())}, found


def test_uniforms_normals_and_keys():
    draws = C.uniforms(keys(40), 0, (3, 32, 32))
    assert draws.min() > 0 and draws.max() < 1
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(draws[:, 0, 0, 0].numpy(), "uniform").pvalue > 1e-3  # over images as well
    normal = C.normals(keys(40), 0, (3, 33, 31)).flatten().numpy()  # an odd count
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    flat = draws.flatten(1)
    for other in (flat.roll(1, 0), flat.roll(1, 1), flat.roll(1536, 1), C.uniforms(keys(40), 1, (3072,))):
        assert abs(np.corrcoef(flat.flatten(), other.flatten())[0, 1]) < 0.01
    unit = torch.eye(3072).view(-1, 3, 32, 32) / 255
    images = torch.cat([torch.zeros(1, 3, 32, 32), unit, pictures(64)])
    found = C.image_keys(images, "a")
    assert len(found.unique()) == len(images) and not (found == C.image_keys(images, "b")).any()


@pytest.mark.parametrize("table, severity", ROWS)
def test_gaussian_and_impulse_noise_at_mid_grey(table, severity):
    level, side = 128 / 255, 96 if table else 32
    images = torch.full((64, 3, side, side), level)
    images[:, 0, 0, 0] = torch.arange(64) / 255  # 64 different images
    inner = lambda name: corrupt(images, name, severity, 0)[..., 1:, 1:].double().numpy().ravel()
    x = np.linspace(-8, 8, 20001)
    y, w = np.clip(level + constants("gaussian_noise", table, severity) * x, 0, 1), stats.norm.pdf(x)
    deviation = math.sqrt((w * y**2).sum() / w.sum() - ((w * y).sum() / w.sum()) ** 2)  # of a clipped normal
    assert inner("gaussian_noise").std() == pytest.approx(deviation, rel=0.02)
    assert inner("gaussian_noise").mean() == pytest.approx(level, abs=0.005)

    changed, fraction = inner("impulse_noise"), constants("impulse_noise", table, severity)
    assert (np.abs(changed - level) > 0.1).mean() == pytest.approx(fraction, rel=0.06)
    assert (changed == 0).sum() == pytest.approx((changed == 1).sum(), rel=0.15)


@pytest.mark.parametrize("photons", sum(SEVERITIES["shot_noise"], ()))
@pytest.mark.parametrize("value", [0, 1, 30, 128, 255])
def test_shot_noise_is_poisson(photons, value):
    drawn = C.shot_noise(torch.full((30, 3, 32, 32), value / 255), keys(30), photons).flatten().double()
    counts = (drawn * photons).round().long().numpy()
    assert np.abs(drawn.numpy() * photons - counts).max() < 1e-4
    observed = np.bincount(counts, minlength=2000)[:2000]
    expected = stats.poisson.pmf(np.arange(2000), photons * value / 255) * len(counts)
    keep = expected > 5
    if keep.sum() > 1:
        scale = observed[keep].sum() / expected[keep].sum()
        assert stats.chisquare(observed[keep], expected[keep] * scale).pvalue > 1e-3
    else:
        assert observed[keep].sum() > 0.99 * len(counts)


@pytest.mark.parametrize("deviation", [0.05, 0.4, 0.7, 1.5, 6, 170])  # up to kernels wider than the image
def test_gaussian_blur_is_scipys(deviation):
    images = pictures(2, 48)[..., :40, :]
    for mirrored, mode, truncate in ((False, "nearest", 4), (True, "reflect", 3)):
        axes = (0, 0, deviation, deviation)
        expected = ndimage.gaussian_filter(images.double().numpy(), axes, mode=mode, truncate=truncate)
        assert np.abs(C.blur(images, deviation, truncate, mirrored).numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("table, severity", ROWS)
def test_defocus_is_a_soft_disk(table, severity):
    radius, softness = constants("defocus_blur", table, severity)
    reach = max(8, radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = (x**2 + y**2 <= radius**2).astype(float)
    taps = np.exp(-0.5 * (np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)) ** 2 / softness**2)
    for axis in (0, 1):
        kernel = ndimage.correlate1d(kernel, taps / taps.sum(), axis, mode="mirror")
    kernel /= (x**2 + y**2 <= radius**2).sum()
    images = pictures(2, 96 if table else 32)
    expected = np.clip(ndimage.correlate(images.double().numpy(), kernel[None, None], mode="mirror"), 0, 1)
    assert np.abs(corrupt(images, "defocus_blur", severity, 0).numpy() - expected).max() < 1e-6


def test_streak_is_imagemagicks():
    images = pictures(6)
    degrees = torch.tensor([[-45.0], [-20], [0], [10], [45], [-110]])
    radius, sigma = 8, 2.5
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / sigma) ** 2)
    expected, rows = np.zeros(images.shape), np.arange(32)
    for b, angle in enumerate(np.deg2rad(degrees[:, 0].numpy())):
        for i, weight in enumerate(weights / weights.sum()):
            down = np.clip(rows + math.ceil(i * math.sin(angle) - 0.5), 0, 31)
            right = np.clip(rows + math.ceil(i * math.cos(angle) - 0.5), 0, 31)
            expected[b] += weight * images[b].numpy()[:, down][:, :, right]
    assert np.abs(C.streak(images, radius, sigma, degrees).numpy() - expected).max() < 1e-5


def test_motion_blur_angles_differ_per_image():
    images = torch.zeros(200, 3, 65, 65)
    images[:, :, 32, 32] = 1
    images[:, 0, 0, 0] = torch.arange(200) / 255
    result = corrupt(images, "motion_blur", 5, 0)[:, 1].double()
    offsets = torch.arange(65) - 32.0
    right, down = (result * offsets).sum((1, 2)), (result * offsets[:, None]).sum((1, 2))
    angles = np.rad2deg(torch.atan2(-down, -right).numpy())  # of the way back: a streak reads from the right
    assert np.abs(angles).max() < 48 and stats.kstest(angles, stats.uniform(-45, 90).cdf).pvalue > 1e-3


@pytest.mark.parametrize("table, severity", ROWS)
def test_zoom_blur_is_scipys(table, severity):
    ranges = ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))
    ranges += ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
    factors = np.arange(1, *ranges[5 * table + severity - 1])
    image = pictures(1, 96 if table else 32)[0].double().numpy()
    side, total = image.shape[1], image.copy()
    for factor in factors:
        crop = math.ceil(side / factor)
        top = (side - crop) // 2
        cut = image[:, top : top + crop, top : top + crop]
        zoomed = ndimage.zoom(cut, (1, factor, factor), order=1)
        trim = (zoomed.shape[1] - side) // 2
        total += zoomed[:, trim : trim + side, trim : trim + side]
    result = corrupt(torch.from_numpy(image)[None].float(), "zoom_blur", severity, 0)[0].numpy()
    assert np.abs(result - total / (len(factors) + 1)).max() < 1e-5


@pytest.mark.parametrize("deviation, reach, rounds", [(0.4, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.5, 4, 2)])
def test_glass_blur_is_the_published_loop(deviation, reach, rounds):
    """The sequential loop, with the aliasing of NumPy's views, on the same draws."""
    count, side = 3, 48
    images = pictures(count, side)
    result = C.glass_blur(images, keys(count), deviation, reach, rounds)
    for b in range(count):
        pixels = C.blur(images, deviation)[b].permute(1, 2, 0).numpy().copy()  # (H, W, 3)
        for i in range(rounds):
            draws = (C.uniforms(keys(count), i, (2, side, side))[b] * 2 * reach).long() - reach
            for y in range(side - reach, reach, -1):
                for x in range(side - reach, reach, -1):
                    other = y + int(draws[0, y, x]), x + int(draws[1, y, x])
                    pixels[y, x], pixels[other] = pixels[other], pixels[y, x]  # views: no swap
        expected = C.blur(torch.from_numpy(pixels).permute(2, 0, 1)[None], deviation)[0]
        assert (result[b] - expected).abs().max() < 1e-6


PHOTOGRAPHS = (  # the published ice: mean R, G, B; percentiles 1, 10, 50, 90, 99; within a crop of 224 px
    # deviation and mean difference of pixels 1, 8 and 32 px apart; all of 255
    ((78, 149, 166), (37, 61, 145, 177, 196), (15, 7.3, 11.0, 13.5)),
    ((201, 205, 214), (140, 177, 210, 233, 247), (20, 8.3, 16.0, 17.6)),
    ((201, 205, 214), (140, 177, 210, 233, 247), (20, 8.3, 16.0, 17.6)),
    ((138, 153, 165), (78, 113, 152, 190, 237), (27, 14.8, 24.6, 26.0)),
    ((112, 123, 135), (41, 69, 120, 184, 238), (36, 19.0, 31.9, 36.4)),
)


def spread(ice: torch.Tensor, *steps: int) -> torch.Tensor:
    """Deviation within crops, and mean differences of pixels so far apart."""
    found = [ice.flatten(2).std(2).mean()]
    for k in steps:
        across, down = ice[..., k:] - ice[..., :-k], ice[..., k:, :] - ice[..., :-k, :]
        found.append((across.abs().mean() + down.abs().mean()) / 2)
    return torch.stack(found)


def test_frost_is_a_blend_with_ice_that_has_the_photographs_statistics():
    images, many = pictures(8), keys(400)
    textured = C.frost(images, keys(8), 0.75, 0.45, 0.2) - 0.75 * images
    assert torch.allclose(textured, 0.45 * C.ice(keys(8), 32, 32, 0.2), atol=1e-6)
    kinds = (5 * C.uniforms(many, 0, (1,))).long()[:, 0]
    assert (kinds.bincount(minlength=5) - 80).abs().max() < 32  # four deviations: equal chances
    sizes = (224, 224, 1.0), (32, 32, 0.2)  # as the photographs were, and shrunk
    ice, small = (255 * torch.cat([C.ice(part, *size) for part in many.split(50)]) for size in sizes)
    shrunk = torch.nn.functional.avg_pool2d(ice[..., :220, :220], 5)[..., :32, :32]  # as for CIFAR-10-C
    for kind, (colour, percentiles, within) in enumerate(PHOTOGRAPHS):
        crops = ice[kinds == kind]
        assert (crops.mean((0, 2, 3)) - torch.tensor(colour)).abs().max() < 4
        found = np.percentile(crops.numpy(), (1, 10, 50, 90, 99))
        assert np.abs(found - percentiles).max() < 10
        assert (spread(crops, 1, 8, 32) / torch.tensor(within) - 1).abs().max() < 0.15
        ours, theirs = small[kinds == kind], shrunk[kinds == kind]
        assert abs(ours.mean() - theirs.mean()) < 4
        assert (spread(ours, 1, 4) / spread(theirs, 1, 4) - 1).abs().max() < 0.3
    dark = torch.arange(60.0)[:, None, None, None].expand(60, 3, 224, 224) / 255
    assert 255 * (corrupt(dark, "frost", 1, 0) - dark).mean() == pytest.approx(0.4 * 164, abs=6)


def test_snow_only_adds_light_and_fog_brightens_within_the_brightest():
    dark = pictures(32) * 0.4
    for severity in LEVELS:
        snowy, foggy = (corrupt(dark, name, severity, 0) for name in ("snow", "fog"))
        assert (snowy - dark).min() > -1e-6 and (snowy - dark).max() > 0.3
        assert foggy.mean() > dark.mean() and (foggy.amax((1, 2, 3)) <= dark.amax((1, 2, 3)) + 1e-6).all()
    hazes = [C.plasma(keys(64), 64, decay) for decay in (3, 2, 1.5)]
    for haze in hazes:
        assert (haze.amin((1, 2)) == 0).all() and (haze.amax((1, 2)) == 1).all() and 0.35 < haze.mean() < 0.65
    smooth, middle, rough = (haze.diff(dim=2).abs().mean() for haze in hazes)
    assert smooth < middle < rough


@pytest.mark.parametrize("table, severity", ROWS)
def test_brightness_and_contrast(table, severity):
    image = pictures(1, 65 if table else 64)[0, :, :60]  # the longer side decides on the table
    image[:, :4] = image[:1, :4]  # some greys
    image[:, 4:6] = 0  # and black
    shift, factor = (constants(name, table, severity) for name in ("brightness", "contrast"))
    colours = [colorsys.rgb_to_hsv(*pixel) for pixel in image.flatten(1).T.tolist()]
    raised = torch.tensor([colorsys.hsv_to_rgb(h, s, min(v + shift, 1)) for h, s, v in colours])
    bright = corrupt(image[None], "brightness", severity, 0)[0]
    assert torch.allclose(bright, raised.T.reshape(image.shape), atol=1e-5)
    means = image.mean((1, 2), keepdim=True)
    faint = corrupt(image[None], "contrast", severity, 0)[0]
    assert torch.allclose(faint, (image - means) * factor + means, atol=1e-5)


@pytest.mark.parametrize("table, severity", ROWS)
def test_elastic_transform_is_scipys(table, severity):
    count, side = 2, 96 if table else 32
    settings, unit = constants("elastic_transform", table, severity), side * 244 / 224 if table else side
    images = pictures(count, side)
    result = C.elastic_transform(images, keys(count), *settings).numpy()
    amplitude, smoothness, jitter = (number * unit for number in settings)
    moves = jitter * (2 * C.uniforms(keys(count), 0, (3, 2)).double().numpy() - 1)
    draws = 2 * C.uniforms(keys(count), 1, (2, side, side)).double().numpy() - 1
    rows, columns = np.mgrid[:side, :side].astype(float)
    points = side // 2 + side // 3 * np.array([[1, 1], [1, -1], [-1, -1]])  # (x, y)
    for b in range(count):
        # Solve for the map that takes the moved points back to where they were.
        back = np.linalg.solve(np.c_[points + moves[b], np.ones(3)], points)  # (3, 2)
        x, y = np.moveaxis(np.stack([columns, rows, np.ones_like(rows)], -1) @ back, -1, 0)
        axes = (0, smoothness, smoothness)
        right, down = amplitude * ndimage.gaussian_filter(draws[b], axes, mode="reflect", truncate=3)
        places = rows + down, columns + right
        for channel, plane in zip(result[b], images[b].double().numpy()):
            warped = ndimage.map_coordinates(plane, (y, x), order=1, mode="mirror")
            expected = ndimage.map_coordinates(warped, places, order=1, mode="reflect")
            assert np.abs(channel - expected).max() < 2e-3 and np.abs(channel - expected).mean() < 5e-5


@pytest.mark.parametrize("table, severity", ROWS)
def test_pixelate_is_pils(table, severity):
    pixelated = lambda image, few, upwards: image.resize((few, few), Image.BOX).resize(image.size, upwards)
    for side in (96, 224) if table else (32, 64):
        images, few = pictures(2, side), int(side * constants("pixelate", table, severity))
        result = corrupt(images, "pixelate", severity, 0)
        for upwards in (Image.NEAREST, Image.BOX):  # the same
            expected = through_pil(images, pixelated, few, upwards)
            assert (result - expected).abs().max() < 1.01 / 255  # PIL rounds twice


@pytest.mark.parametrize("quality", [80, 65, 58, 50, 40, 25, 18, 15, 10, 7])
def test_jpeg_is_pils(quality):
    def saved(image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    for height, width in ((32, 32), (96, 96), (40, 56), (33, 47)):
        images, strokes = pictures(8, max(height, width)), digits(8, max(height, width))
        for batch in (images, (images + 0.1 * torch.randn_like(images)).clamp(0, 1), strokes):
            batch = batch[..., :height, :width]
            result = C.jpeg_compression(batch, None, quality).clamp(0, 1)
            error = (result - through_pil(batch, saved)).abs() * 255
            # Where libjpeg's integer transform rounds a coefficient the other way, a block differs.
            assert error.mean() < 0.4 and (error > 8).float().mean() < 0.02
