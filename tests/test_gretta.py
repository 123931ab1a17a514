"""The pieces of gretta.py: transforms, estimators, black box, target domain, baselines."""

import colorsys
import math

import pytest
import torch
import torch.nn.functional as F

import common
import gretta

MACHINE = common.Machine(torch.device("cpu"))


def pictures(count: int = 4, side: int = 32) -> torch.Tensor:
    """Smooth random colour images in [0.1, 0.9]."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    return F.interpolate(coarse, size=(side, side), mode="bilinear")


def transform_by(image: torch.Tensor, transform: str, **values: float) -> torch.Tensor:
    """At levels of 0.5 but for the named transforms, given by their value (px, factor, …)."""
    levels = torch.full((1, len(gretta.TRANSFORM_SETS[transform])), 0.5)
    for name, value in values.items():
        low, high = gretta.TRANSFORMS[name]
        levels[0, gretta.TRANSFORM_SETS[transform].index(name)] = (value - low) / (high - low)
    return gretta.transform_images(image, levels, transform)


def test_geometry_moves_by_pixels_and_zooms_about_the_centre_after_that():
    """A dot moves right and down; a bright square moved 4 px: centre and width are scaled, in x alone."""
    dot, image, positions = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 64, 64), torch.arange(64) + 0.5
    dot[..., 16, 16] = image[..., 22:42, 22:42] = 1
    for dx, dy in ((5, 0), (-7, 0), (0, 4), (0, -9), (3, -2)):
        moved = transform_by(dot, "geometry", translate_x=dx, translate_y=dy)
        assert (moved - dot.roll((dy, dx), (2, 3))).abs().max() < 1e-3
    for zoom in (0.7, 1.3):
        found = transform_by(image, "geometry", translate_x=4, zoom_x=zoom)[0, 0]
        across, along = found.sum(0), found.sum(1)
        assert (across * positions).sum() / across.sum() == pytest.approx(32 + 4 * zoom, abs=0.2)
        assert (along * positions).sum() / along.sum() == pytest.approx(32, abs=1e-2)
        assert found[32].sum() == pytest.approx(20 * zoom, abs=0.6) and (along > 0.01).sum() == 20


@pytest.mark.parametrize("value", [0.6, 0.8, 1.3])
def test_colour_is_a_power_a_spread_about_the_mean_luma_and_a_turn_of_the_circle(value):
    """The last as colorsys has it; grey has no hue to turn."""
    images, grey, pixel = pictures(1), torch.full((1, 3, 8, 8), 0.4), torch.tensor([0.8, 0.3, 0.1])
    assert (transform_by(images, "color", gamma=value) - images**value).abs().max() < 1e-4
    mean = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1).mean()
    spread = (mean + value * (images - mean)).clamp(0, 1)
    assert (transform_by(images, "color", contrast=value) - spread).abs().max() < 1e-4
    h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
    expected = torch.tensor(colorsys.hsv_to_rgb((h + 0.9 / (2 * math.pi)) % 1, s, v))
    turned = transform_by(pixel.view(1, 3, 1, 1).expand(1, 3, 8, 8), "color", hue=0.9)
    assert (turned[0, :, 0, 0] - expected).abs().max() < 1e-3
    assert (transform_by(grey, "color", hue=0.9) - grey).abs().max() < 1e-4


def test_every_image_has_its_own_levels_of_which_one_half_is_the_identity():
    images = torch.cat([torch.zeros(1, 3, 33, 33), torch.ones(1, 3, 33, 33), pictures(3, 33)])
    total, levels = lambda v: gretta.transform_images(images, v, "full").sum((1, 2, 3)), torch.rand(5, 7)
    alone = [gretta.transform_images(images[[i]], levels[[i]], "full") for i in range(5)]
    torch.testing.assert_close(gretta.transform_images(images, levels, "full"), torch.cat(alone))
    for level in (0.0, 0.5, 1.0):  # black pixels and the ends too
        assert gretta.true_gradient(total, torch.full((5, 7), level)).isfinite().all()
    same = gretta.transform_images(images, torch.full((5, 7), 0.5), "full")
    assert (same - images).abs().max() < 1e-4
    with pytest.raises(common.InputError, match=r"\(2, 3\).*'geometry' needs \(2, 4\)"):
        gretta.transform_images(pictures(2), torch.rand(2, 3), "geometry")
    with pytest.raises(common.InputError, match="unknown transform 'shear'"):
        gretta.transform_images(pictures(2), torch.rand(2, 4), "shear")


@pytest.mark.parametrize("transform", ["geometry", "color", "full"])
def test_gradient_in_the_levels_agrees_with_finite_differences(transform):
    images, weight = pictures(6).double().split(3)
    generator = torch.Generator().manual_seed(3)
    levels = 0.35 + 0.3 * torch.rand(3, len(gretta.TRANSFORM_SETS[transform]), generator=generator).double()

    def value(levels: torch.Tensor) -> torch.Tensor:
        return (gretta.transform_images(images, levels, transform) * weight).sum((1, 2, 3))

    gradient = gretta.true_gradient(value, levels)
    assert gradient.abs().min() > 0
    for k, step in enumerate(1e-6 * torch.eye(levels.shape[1]).double()):
        numeric = (value(levels + step) - value(levels - step)) / 2e-6
        torch.testing.assert_close(gradient[:, k], numeric, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("guided, beta, sigma", [(False, 1.0, 0.1), (False, 2.0, 0.4), (True, 1.0, 0.1)])
def test_estimators_are_unbiased_up_to_their_covariance(guided, beta, sigma):
    """On a quadratic: β/n, or β·(α/n·I + (1−α)·q·qᵀ), times the true gradient; each image by itself."""
    root, (levels, centres) = torch.randn(4, 4).double(), torch.rand(2, 3, 4).double()
    curvature = root @ root.T
    gradient = (levels - centres) @ curvature

    def loss(rows: torch.Tensor) -> torch.Tensor:
        centred = rows - centres.repeat(len(rows) // 3, 1)
        return 0.5 * torch.einsum("ri,ij,rj->r", centred, curvature, centred)

    student, alpha, scales = torch.randn(3, 4).double(), 0.3, torch.tensor([1.0, 50, -3]).double()

    def estimate(loss, noise: torch.Tensor) -> torch.Tensor:
        if guided:
            return gretta.guided_gradient(loss, levels, student, 10, sigma, alpha, beta, noise)
        return gretta.vanilla_gradient(loss, levels, 10, sigma, beta, noise)

    parts = torch.randn(2000, 10, 3, 4 + guided, dtype=torch.float64)
    draws = torch.stack([estimate(loss, noise) for noise in parts])  # (2000, B, K)
    q = F.normalize(student, dim=1)
    along = alpha / 4 * gradient + (1 - alpha) * q * (q * gradient).sum(1, keepdim=True)
    expected = beta * (along if guided else gradient / 4)
    assert ((draws.mean(0) - expected) / (draws.std(0) / math.sqrt(len(draws)))).abs().max() < 3.5
    scaled = estimate(lambda rows: scales.repeat(10) * loss(rows), parts[0])
    torch.testing.assert_close(scaled, scales[:, None] * draws[0])


@pytest.mark.parametrize("num_samples", [2, 4, 12, 13])
def test_orthogonal_perturbations(num_samples):
    """Of norm √K, in blocks of K; any direction is as likely; K give a linear loss's gradient exactly."""
    noise = torch.randn(num_samples, 5000, 5, dtype=torch.float64)
    z, last = gretta.orthogonal_blocks(noise).split([4, 1], dim=2)
    assert torch.equal(last, noise[..., 4:])
    for block in z.split(4):
        products = torch.einsum("pbk,qbk->bpq", block, block)
        torch.testing.assert_close(products, 4 * torch.eye(len(block)).double().expand_as(products))
    covariance = torch.einsum("pbk,pbl->kl", z, z) / z[..., 0].numel()
    assert (covariance - torch.eye(4)).abs().max() < 0.05
    slope, levels = torch.randn(5000, 4).double(), torch.full((5000, 4), 0.5).double()
    loss = lambda rows: (rows.view(-1, 5000, 4) * slope).sum(2).flatten()
    estimate = gretta.vanilla_gradient(loss, levels, num_samples, 0.1, 1.0, z)
    if num_samples in (4, 12):
        torch.testing.assert_close(estimate, slope / 4)
    assert (estimate.mean(0) - slope.mean(0) / 4).abs().max() < 0.1


def test_level_loss_pairs_rows_with_their_images_whatever_the_chunk():
    """Row p·B + b belongs to image b; sums and gradients are those of all rows at once."""
    images, labels, levels = pictures(5).double(), torch.arange(5), 0.3 + 0.4 * torch.rand(5, 4).double()
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).double()
    alone = [gretta.transform_images(images[[i]], levels[[i]], "geometry") for i in range(5)]
    expected = torch.cat([F.cross_entropy(linear(alone[i]), labels[[i]])[None] for i in range(5)]).repeat(2)
    gradients = []
    for chunk in (2, 7, 1000):
        totals, asked = torch.zeros(4, dtype=torch.float64), []
        query = lambda batch, asked=asked: asked.append(len(batch)) or linear(batch)
        loss = gretta.level_loss(query, images, labels, "geometry", chunk, totals)
        torch.testing.assert_close(loss(levels.repeat(2, 1)), expected)
        torch.testing.assert_close(totals[0], expected.sum().detach())
        assert totals[2] == 10 and max(asked) <= chunk
        gradients.append(gretta.true_gradient(loss, levels))
        torch.testing.assert_close(gradients[0], gradients[-1])


def test_findings_that_are_not_known_do_not_count():
    nan, logits = math.nan, torch.tensor([[3.0, -2, 1, -1, 4], [0.3, 1, -0.2, 2, -3]])
    labels = torch.tensor([[1.0, 0, 1, 0, 1], [1, nan, 0, nan, nan]])
    losses, right = gretta.losses_and_answers(logits, labels)
    expected = F.binary_cross_entropy_with_logits(logits[1, [0, 2]], labels[1, [0, 2]])
    assert losses[1].item() == pytest.approx(expected.item()) and right[0] == 1
    labels[1] = nan
    assert gretta.losses_and_answers(logits, labels)[0][1] == 0
    scores = torch.tensor([0.1, 0.4, 0.4, 0.8])
    assert gretta.auroc(scores[[1, 3]], scores[[0, 2]]) == pytest.approx(3.5 / 4)  # of 4 pairs one is a tie


@pytest.mark.parametrize("backbone", gretta.BACKBONES)
def test_an_untrained_policy_is_the_identity(backbone):
    for sigmoid in (False, True):
        policy = gretta.Policy(backbone, 7, sigmoid, "zero").eval()
        assert torch.equal(policy(pictures(2)), torch.full((2, 7), 0.5))
    assert gretta.Policy("resnet18", 7, False, "stochastic").eval()(pictures(2)).std() > 0


@pytest.mark.parametrize("proportion", [0.01, 0.5, 0.999])
def test_no_digit_is_both_trained_on_and_evaluated(proportion):
    where = {"data_root": "data", "machine": MACHINE, "split": "val", "workers": 0, "dry_run": False}
    sets = gretta.target_sets("digits", proportion, "ones", **where)
    images, labels, source = common.modified_digits("val")
    lookup = {image.numpy().tobytes(): digit.item() for image, digit in zip(images, source)}
    tested, tested_labels = sets.tests["target", 0]().tensors()
    evaluated = {lookup[image.numpy().tobytes()] for image in tested}
    for data in (sets.train, sets.pool):
        assert not evaluated & {lookup[image.numpy().tobytes()] for image in data.tensors()[0]}
    assert len(sets.train) == min(round(proportion * len(labels)), len(sets.pool))
    assert tested_labels.unique().numel() == 10
    if proportion <= 0.5:
        other = gretta.target_sets("digits", 0.3, "ones", **where)
        assert torch.equal(tested, other.tests["target", 0]().tensors()[0])


def test_crops_are_corners_centre_and_their_mirror_images():
    images = pictures(2)
    ten = gretta.crops(images, flips=True)
    assert ten.shape == (10, 2, 3, 32, 32) and torch.equal(ten[5:], ten[:5].flip(-1))
    for crop, (top, left) in zip(ten, ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))):
        part = images[..., top : top + 28, left : left + 28]
        assert torch.equal(crop, F.interpolate(part, size=(32, 32), mode="bilinear", align_corners=False))


def test_predictors_are_what_their_names_say():
    """On one batch, so that its order does not matter; with two steps, and of a single image."""
    classifier = common.build_model("resnext", 10, "digits").eval()
    common.load_weights(classifier, common.WEIGHTS / "digits-resnext.pt")
    policy = gretta.Policy("resnet18", 4, False, "zero").eval()
    torch.nn.init.constant_(policy.backbone.fc.bias, 0.6)
    images, labels, _ = common.modified_digits("val", variants=1)
    data, shown = common.Images(images, labels, MACHINE), common.to_float(images)
    found = gretta.evaluate_predictors(classifier, policy, data, "geometry", 2, MACHINE)
    move = lambda images: gretta.transform_images(images, torch.full((len(images), 4), 0.6), "geometry")
    with torch.no_grad():
        scores = {"none": classifier(shown), "gretta": classifier(move(move(shown)))}
        scores["bn_adapt"] = gretta.adapt_batch_norm(classifier)(shown)
        for name, flips in (("five_crop", False), ("ten_crop", True)):
            scores[name] = sum(classifier(crop).softmax(1) for crop in gretta.crops(shown, flips))
    assert len(labels) < 200 and scores.keys() == found.keys()
    for name, value in scores.items():
        accuracy = 100 * (value.argmax(1) == labels).double().mean().item()
        assert found[name]["accuracy"] == pytest.approx(accuracy, abs=0.6), name
    one = common.Images(images[:1], labels[:1], MACHINE)
    assert gretta.evaluate_predictors(classifier, policy, one, "geometry", 1, MACHINE, ("bn_adapt",))
