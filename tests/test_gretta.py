"""The pieces of gretta.py: transforms, estimators, black box, target domain, baselines."""

import math

import pytest
import torch
import torch.nn.functional as F

import common
import gretta

MACHINE = common.Machine(torch.device("cpu"))


def pictures(count: int = 4, side: int = 32) -> torch.Tensor:
    """Smooth random colour images in [0.1, 0.9]."""
    generator = torch.Generator().manual_seed(1)
    return F.interpolate(torch.rand(count, 3, 6, 6, generator=generator), size=(side, side), mode="bilinear").clamp(0, 1) * 0.8 + 0.1


def dot(x: int, y: int, side: int = 32) -> torch.Tensor:
    image = torch.zeros(1, 3, side, side)
    image[..., y, x] = 1
    return image


def levels_for(transform: str, **values: float) -> torch.Tensor:
    """One row of levels: 0.5 but for the named transforms, given by their value (px, factor, …)."""
    levels = torch.full((1, len(gretta.TRANSFORM_SETS[transform])), 0.5)
    for name, value in values.items():
        low, high = gretta.TRANSFORMS[name]
        levels[0, gretta.TRANSFORM_SETS[transform].index(name)] = (value - low) / (high - low)
    return levels


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("transform", ["geometry", "color", "full"])
@pytest.mark.parametrize("side", [32, 33])
def test_level_one_half_is_the_identity(transform, side):
    images = torch.cat([pictures(3, side), common.to_float(common.load_split("digits", "val")[0][:3]) if side == 32 else pictures(1, side)])
    levels = torch.full((len(images), len(gretta.TRANSFORM_SETS[transform])), 0.5)
    assert (gretta.transform_images(images, levels, transform) - images).abs().max() < 1e-4


@pytest.mark.parametrize("dx, dy", [(5, 0), (-7, 0), (0, 4), (0, -9), (3, -2)])
def test_translation_moves_by_pixels_to_the_right_and_down(dx, dy):
    moved = gretta.transform_images(dot(16, 16), levels_for("geometry", translate_x=dx, translate_y=dy), "geometry")
    assert (moved - dot(16 + dx, 16 + dy)).abs().max() < 1e-3


def test_translation_of_level_0_and_1_is_20_pixels():
    assert gretta.transform_images(dot(4, 10), torch.tensor([[1.0, 0.5, 0.5, 0.5]]), "geometry")[0, 0, 10, 24] > 0.999
    assert gretta.transform_images(dot(24, 10), torch.tensor([[0.0, 0.5, 0.5, 0.5]]), "geometry")[0, 0, 10, 4] > 0.999


@pytest.mark.parametrize("zoom", [0.7, 1.3])
def test_zoom_is_about_the_centre_and_above_one_enlarges(zoom):
    """A bright square's edges move to zoom times their distance from the centre, in the one direction alone."""
    image = torch.zeros(1, 3, 64, 64)
    image[..., 22:42, 22:42] = 1
    for name, across, along in (("zoom_x", 2, 1), ("zoom_y", 1, 2)):
        zoomed = gretta.transform_images(image, levels_for("geometry", **{name: zoom}), "geometry")[0, 0]
        profile, other = zoomed.sum(across - 1) / 20, zoomed.sum(along - 1) / 20
        profile, other = (zoomed[32], zoomed[:, 32]) if name == "zoom_x" else (zoomed[:, 32], zoomed[32])
        assert profile.sum() == pytest.approx(20 * zoom, abs=0.05) and other.sum() == pytest.approx(20, abs=0.05)
        positions = torch.arange(64) + 0.5
        assert (profile * positions).sum() / profile.sum() == pytest.approx(32, abs=1e-3)


def test_translation_comes_before_zoom():
    """A dot 4 px right of the centre, moved 4 px, then zoomed by 1.25 lies 1.25·8 = 10 px right of it."""
    moved = gretta.transform_images(dot(20, 16, 33), levels_for("geometry", translate_x=4, zoom_x=1.25, zoom_y=1.25), "geometry")[0, 0]
    positions = torch.arange(33.0)
    assert (moved.sum(0) * positions).sum() / moved.sum() == pytest.approx(16 + 10, abs=0.05)
    assert (moved.sum(1) * positions).sum() / moved.sum() == pytest.approx(16, abs=0.05)


@pytest.mark.parametrize("gamma", [0.25, 0.8, 1.7])
def test_gamma_is_a_power(gamma):
    images = pictures(1)
    assert (gretta.transform_images(images, levels_for("color", gamma=gamma), "color") - images**gamma).abs().max() < 1e-4


@pytest.mark.parametrize("contrast", [0.5, 0.8, 1.3])
def test_contrast_spreads_about_the_mean_luma(contrast):
    images = pictures(1)
    mean = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1).mean()
    expected = (mean + contrast * (images - mean)).clamp(0, 1)
    assert (gretta.transform_images(images, levels_for("color", contrast=contrast), "color") - expected).abs().max() < 1e-4


def test_hue_turns_the_colour_circle():
    """Red turned by π/3 of a radian scale is checked against colorsys; grey has no hue to turn."""
    import colorsys

    angle = 0.9
    pixel = torch.tensor([0.8, 0.3, 0.1]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    h, s, v = colorsys.rgb_to_hsv(0.8, 0.3, 0.1)
    expected = torch.tensor(colorsys.hsv_to_rgb((h + angle / (2 * math.pi)) % 1, s, v))
    turned = gretta.transform_images(pixel, levels_for("color", hue=angle), "color")
    assert (turned[0, :, 0, 0] - expected).abs().max() < 1e-3
    grey = torch.full((1, 3, 8, 8), 0.4)
    assert (gretta.transform_images(grey, levels_for("color", hue=angle), "color") - grey).abs().max() < 1e-4


def test_every_image_has_its_own_levels():
    images, levels = pictures(5), torch.rand(5, 7)
    together = gretta.transform_images(images, levels, "full")
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], gretta.transform_images(images[i : i + 1], levels[i : i + 1], "full"))


@pytest.mark.parametrize("transform", ["geometry", "color", "full"])
def test_gradient_in_the_levels_agrees_with_finite_differences(transform):
    images = pictures(3).double()
    weight = F.interpolate(torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(2)), size=(32, 32), mode="bicubic").double()
    generator = torch.Generator().manual_seed(3)
    levels = 0.35 + 0.3 * torch.rand(3, len(gretta.TRANSFORM_SETS[transform]), generator=generator).double()

    def value(levels: torch.Tensor) -> torch.Tensor:
        return (gretta.transform_images(images, levels, transform) * weight).sum((1, 2, 3))

    gradient = gretta.true_gradient(lambda rows, _: value(rows), levels, 3)
    assert gradient.abs().min() > 0
    for k in range(levels.shape[1]):
        step = torch.zeros_like(levels)
        step[:, k] = 1e-6
        numeric = (value(levels + step) - value(levels - step)) / 2e-6
        torch.testing.assert_close(gradient[:, k], numeric, rtol=2e-3, atol=2e-3)


def test_gradients_are_finite_at_black_pixels_and_extreme_levels():
    images = torch.cat([torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32), dot(3, 3)])
    for level in (0.0, 0.5, 1.0):
        levels = torch.full((3, 7), level)
        gradient = gretta.true_gradient(lambda rows, _: gretta.transform_images(images, rows, "full").sum((1, 2, 3)), levels, 3)
        assert gradient.isfinite().all()


def test_wrong_levels_are_refused():
    with pytest.raises(common.InputError, match=r"\(2, 3\).*'geometry' needs \(2, 4\)"):
        gretta.transform_images(pictures(2), torch.rand(2, 3), "geometry")
    with pytest.raises(common.InputError, match="unknown transform 'shear'"):
        gretta.transform_images(pictures(2), torch.rand(2, 4), "shear")


# ----------------------------------------------------------------------------------------------------------- estimators


def quadratic(levels: torch.Tensor, curvature: torch.Tensor, rows: torch.Tensor) -> tuple:
    """L(v) = ½ (v − c)ᵀ A (v − c) with its own c for every image; and its gradient at `levels`."""

    def loss(rows_of_levels: torch.Tensor) -> torch.Tensor:
        centred = rows_of_levels - rows.repeat(len(rows_of_levels) // len(rows), 1)
        return 0.5 * torch.einsum("ri,ij,rj->r", centred, curvature, centred)

    return loss, (levels - rows) @ curvature


def quadratic_problem() -> tuple:
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    levels, centres = torch.rand(3, 4, generator=generator, dtype=torch.float64), torch.rand(3, 4, generator=generator, dtype=torch.float64)
    return levels, *quadratic(levels, root @ root.T, centres)


@pytest.mark.parametrize("beta, sigma", [(1.0, 0.1), (2.0, 0.4)])
def test_vanilla_es_is_unbiased_up_to_beta_over_k(beta, sigma):
    levels, loss, gradient = quadratic_problem()
    noise = torch.randn(20000, 3, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    draws = torch.stack([gretta.vanilla_gradient(loss, levels, 10, sigma, beta, part) for part in noise.split(10)])  # (2000, B, K)
    error = (draws.mean(0) - beta / 4 * gradient) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.abs().max() < 3
    assert gretta.vanilla_gradient(loss, levels, 7, sigma, beta).shape == (3, 4)


def test_guided_es_is_unbiased_up_to_its_covariance():
    """On a quadratic the expectation is β·(α/n·I + (1−α)·q·qᵀ) times the true gradient."""
    levels, loss, gradient = quadratic_problem()
    student, alpha = torch.randn(3, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64), 0.3
    q = student / student.norm(dim=1, keepdim=True)
    noise = torch.randn(20000, 3, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    draws = torch.stack([gretta.guided_gradient(loss, levels, student, 10, 0.1, alpha, 1.0, part) for part in noise.split(10)])
    expected = alpha / 4 * gradient + (1 - alpha) * q * (q * gradient).sum(1, keepdim=True)
    assert ((draws.mean(0) - expected) / (draws.std(0) / math.sqrt(len(draws)))).abs().max() < 3


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_guided_es_perturbs_with_the_published_covariance(alpha):
    """The perturbations themselves, caught in the loss: covariance σ²·(α/n·I + (1−α)·q·qᵀ)."""
    seen = []

    def loss(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows)
        return rows.sum(1)

    student, sigma = torch.tensor([[3.0, 0.0, 4.0, 0.0]]), 0.2
    gretta.guided_gradient(loss, torch.zeros(1, 4), student, 40000, sigma, alpha, 1.0)
    q = torch.tensor([0.6, 0.0, 0.8, 0.0])
    expected = sigma**2 * (alpha / 4 * torch.eye(4) + (1 - alpha) * torch.outer(q, q))
    assert (torch.cov(seen[0].T) - expected).abs().max() < 0.03 * sigma**2
    assert torch.equal(seen[0], -seen[1])


def test_vanilla_es_perturbs_by_sigma_over_root_n():
    seen = []
    gretta.vanilla_gradient(lambda rows: seen.append(rows) or rows.sum(1), torch.zeros(1, 4), 40000, 0.2, 1.0)
    assert seen[0].std(0).sub(0.1).abs().max() < 0.002 and torch.equal(seen[0], -seen[1])


def test_antithetic_pairs_cancel_an_even_function():
    levels = torch.zeros(3, 4)
    even = lambda rows: rows.square().sum(1) + rows.cos().prod(1)
    assert torch.equal(gretta.vanilla_gradient(even, levels, 12, 0.1, 1.0), torch.zeros(3, 4))
    assert torch.equal(gretta.guided_gradient(even, levels, torch.randn(3, 4), 12, 0.1, 0.5, 1.0), torch.zeros(3, 4))


def test_a_student_without_gradient_leaves_isotropic_noise():
    levels, loss, _ = quadratic_problem()
    assert gretta.guided_gradient(loss, levels, torch.zeros(3, 4, dtype=torch.float64), 12, 0.1, 0.5, 1.0).isfinite().all()


def test_credit_is_per_sample():
    """An image's estimate does not change with the losses of the others."""
    levels, noise = torch.rand(3, 4), torch.randn(12, 3, 4)
    scale = torch.tensor([1.0, 1.0, 1.0]).repeat(12)
    one = gretta.vanilla_gradient(lambda rows: scale * rows.square().sum(1), levels, 12, 0.1, 1.0, noise)
    scale = torch.tensor([1.0, 50.0, -3.0]).repeat(12)
    other = gretta.vanilla_gradient(lambda rows: scale * rows.square().sum(1), levels, 12, 0.1, 1.0, noise)
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(other[1], 50 * one[1])
    torch.testing.assert_close(other[2], -3 * one[2])


def test_shared_credit_is_one_scalar_per_batch():
    """--credit batch: the mean of all P·B losses, of both ranks', stands in for each; the estimate is that one difference times the mean perturbation."""
    levels, noise = torch.rand(3, 4), torch.randn(12, 3, 4)
    scale = torch.tensor([1.0, 50.0, -3.0]).repeat(12)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return scale * rows.square().sum(1)

    shared = gretta.shared_loss(loss, 3, 3, MACHINE)
    assert torch.equal(shared(noise.flatten(0, 1)), loss(noise.flatten(0, 1)).mean().expand(36))
    plus, minus = (loss((levels + sign * 0.05 * noise).flatten(0, 1)).mean() for sign in (1, -1))  # σ/√K = 0.1/2
    expected = (plus - minus) / (2 * 0.1**2) * 0.05 * noise.mean(0)
    torch.testing.assert_close(gretta.vanilla_gradient(shared, levels, 12, 0.1, 1.0, noise), expected)

    class Doubled(common.Machine):
        def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:  # as if another rank held the same losses
            return 2 * tensor

    assert torch.equal(gretta.shared_loss(loss, 3, 6, Doubled(torch.device("cpu")))(noise.flatten(0, 1)), shared(noise.flatten(0, 1)))


def test_level_loss_pairs_rows_with_their_images():
    """Row p·B + b belongs to image b, whatever the chunk; the sums are those of all rows."""
    images, labels = pictures(3), torch.tensor([0, 1, 2])
    model = common.build_model("resnext", 10, "digits").eval()
    levels, totals = torch.rand(12, 4), torch.zeros(3)
    with torch.no_grad():
        losses = gretta.level_loss(model, images, labels, "geometry", 5, totals)(levels)
        for row in range(12):
            image, label = images[row % 3 : row % 3 + 1], labels[row % 3 : row % 3 + 1]
            expected = F.cross_entropy(model(gretta.transform_images(image, levels[row : row + 1], "geometry")), label)
            assert losses[row] == pytest.approx(expected.item(), abs=1e-4)
    assert totals[0] == pytest.approx(losses.sum().item(), rel=1e-5) and totals[2] == 12


# ------------------------------------------------------------------------------------------- policy, black box, baselines


@pytest.mark.parametrize("backbone", list(gretta.POLICIES))
def test_an_untrained_policy_is_the_identity(backbone):
    for sigmoid in (False, True):
        policy = gretta.Policy(backbone, 7, sigmoid, "zero").eval()
        assert torch.equal(policy(pictures(2)), torch.full((2, 7), 0.5))
    assert not torch.equal(gretta.Policy("resnet18", 7, False, "stochastic").eval()(pictures(2)), torch.full((2, 7), 0.5))


def test_no_gradient_flows_through_the_black_box():
    model = common.build_model("resnext", 10, "digits")
    images = pictures(4).requires_grad_()
    for whitebox in (False, True):
        black_box = gretta.BlackBox(model, MACHINE, whitebox)
        assert black_box(images).requires_grad == whitebox
        assert black_box.queries == 4 and not any(parameter.requires_grad for parameter in model.parameters())


def test_consistency_holds_for_a_policy_that_undoes_translations():
    """A policy that reads the dot's position and centres it has no consistency loss; one that ignores the image has."""

    def centring(images: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(32.0) - 15.5
        x = (images[:, 0].sum(1) * positions).sum(1) / images[:, 0].sum((1, 2))
        return torch.stack([0.5 - x / 40, *[torch.full_like(x, 0.5)] * 3], dim=1)

    applied = levels_for("geometry", translate_x=5)
    assert gretta.consistency_loss(centring, dot(12, 16), applied, "geometry") < 1e-8
    constant = lambda images: torch.full((len(images), 4), 0.5)
    assert gretta.consistency_loss(constant, dot(12, 16), applied, "geometry") == pytest.approx((5 / 40) ** 2 / 4, rel=1e-4)


@pytest.mark.parametrize("proportion", [0.01, 0.2, 0.5, 0.8, 0.999])
def test_no_digit_is_both_trained_on_and_evaluated(proportion):
    train_images, train_labels, test_images, test_labels, unlabelled = gretta.target_domain("val", proportion, "data")
    images, labels, source = common.modified_digits("val")
    lookup = {image.numpy().tobytes(): digit.item() for image, digit in zip(images, source)}
    trained = {lookup[image.numpy().tobytes()] for image in torch.cat([train_images, unlabelled])}
    evaluated = {lookup[image.numpy().tobytes()] for image in test_images}
    assert not trained & evaluated and evaluated
    assert len(train_labels) == min(round(proportion * len(labels)), len(unlabelled)) and test_labels.unique().numel() == 10
    if proportion <= 0.5:
        assert torch.equal(test_images, gretta.target_domain("val", 0.3, "data")[2])


def test_crops_are_corners_centre_and_their_mirror_images():
    images = pictures(2)
    ten = gretta.crops(images, flips=True)
    assert ten.shape == (10, 2, 3, 32, 32) and torch.equal(ten[5:], ten[:5].flip(-1))
    corner = F.interpolate(images[..., :28, 4:], size=(32, 32), mode="bilinear", align_corners=False)
    assert torch.equal(ten[1], corner)
    scores = gretta.crop_scores(lambda batch: torch.stack([batch.mean((1, 2, 3)), torch.zeros(2)], dim=1), images, "digits", flips=False)
    torch.testing.assert_close(scores.sum(1), torch.ones(2))


def test_batch_norm_adaptation_uses_the_batch_and_leaves_the_classifier_alone():
    model = common.build_model("resnext", 10, "digits").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = gretta.adapt_batch_norm(model)
    images = pictures(16)
    with torch.no_grad():
        assert not torch.allclose(adapted(images), model(images))
        expected = model.train()(images)
        torch.testing.assert_close(adapted(images), expected)
        model.eval().load_state_dict(before)
        assert torch.allclose(adapted(images * 0.5 + 0.25), adapted(images), atol=1e-3)  # the first layer's statistics absorb a change of contrast


def test_batch_norm_adaptation_of_a_single_image():
    """torch refuses the statistics of a single value, which is what the last maps (1×1) of a small image leave."""
    images = pictures(1)
    for name in ("resnext", "resnet18"):
        model = common.build_model(name, 10, "fake").eval()
        scores = gretta.adapt_batch_norm(model)(torch.cat([images, images])).detach()
        if name == "resnext":  # its last maps are larger
            torch.testing.assert_close(gretta.adapt_batch_norm(model)(images).detach(), scores[:1], rtol=1e-3, atol=1e-4)
        for label in (scores[0].argmax(), scores[0].argmin()):
            data = (common.to_uint8(images), label[None])
            accuracy = gretta.evaluate_predictors(model, gretta.Policy("resnet18", 4, False, "zero"), data, "geometry", 1, MACHINE, ("bn_adapt",))
            assert accuracy["bn_adapt"]["accuracy"] == (100 if label == scores[0].argmax() else 0)


def test_the_policy_in_front_of_batch_norm_adaptation():
    """gretta_bn_adapt: bn_adapt itself for the identity, and for another policy bn_adapt of the images that it transforms."""
    model = common.load_weights(common.build_model("resnext", 10, "digits"), common.WEIGHTS / "digits-resnext.pt").eval()
    policy = gretta.Policy("resnet18", 4, False, "zero").eval()
    data = common.modified_digits("val", variants=1)[:2]
    names = ("bn_adapt", "gretta_bn_adapt")
    found = gretta.evaluate_predictors(model, policy, data, "geometry", 1, MACHINE, names)
    assert found["bn_adapt"] == found["gretta_bn_adapt"] and 60 < found["bn_adapt"]["accuracy"] < 95
    torch.nn.init.constant_(policy.backbone.fc.bias, 0.7)
    found = gretta.evaluate_predictors(model, policy, data, "geometry", 1, MACHINE, names)
    assert len(data[1]) < 200  # one batch, so that its order does not matter
    with torch.no_grad():
        images = common.to_float(data[0])
        moved = gretta.transform_images(images, torch.full((len(images), 4), 0.7), "geometry")
        expected = 100 * (gretta.adapt_batch_norm(model)(moved).argmax(1) == data[1]).double().mean().item()
    assert found["gretta_bn_adapt"]["accuracy"] == pytest.approx(expected, abs=0.6) and abs(expected - found["bn_adapt"]["accuracy"]) > 2


def test_strong_augmentation_is_per_image_and_stays_in_range():
    images = pictures(1).repeat(6, 1, 1, 1)
    for flip in (False, True):
        augmented = gretta.strong_augmentation(images, gretta.strong_draws(6, torch.Generator().manual_seed(0)), flip)
        assert augmented.min() >= 0 and augmented.max() <= 1 and augmented.shape == images.shape
        assert len({image.numpy().tobytes() for image in augmented}) == 6
        assert torch.equal(augmented, gretta.strong_augmentation(images, gretta.strong_draws(6, torch.Generator().manual_seed(0)), flip))


def test_results_do_not_depend_on_the_images_in_one_forward():
    """--query-batch: losses, their gradient by ES and the true gradient, asked for 7 rows at a time or all at once."""
    torch.manual_seed(0)
    images, labels = pictures(5), torch.arange(5)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).double()
    levels, noise = 0.3 + 0.4 * torch.rand(5, 4, dtype=torch.float64), torch.randn(6, 5, 4, dtype=torch.float64)
    asked = []

    def query(batch: torch.Tensor) -> torch.Tensor:
        asked.append(len(batch))
        return model(batch)

    found = []
    for chunk in (2, 7, 1000):
        asked.clear()
        loss = gretta.level_loss(query, images.double(), labels, "geometry", chunk)
        found.append((gretta.vanilla_gradient(loss, levels, 6, 0.1, 1.0, noise), gretta.true_gradient(loss, levels, chunk)))
        assert max(asked) <= chunk
    for estimate, gradient in found[1:]:
        assert torch.allclose(estimate, found[0][0], atol=1e-12) and torch.allclose(gradient, found[0][1], atol=1e-12)


def test_pad_crop_shifts_are_uniform():
    """−4..4 px, each a ninth of the time: of the draw that leaves everything else alone."""
    draw = torch.zeros(9000, 11)
    draw[:, 4] = torch.linspace(-1, 1, 9000)
    image = dot(16, 16)[:, :, 12:21, 8:25].repeat(9000, 1, 1, 1)
    shifted = gretta.strong_augmentation(image, draw, False)[:, 0, 4]  # (9000, 17): the row of the dot
    counts = torch.bincount(shifted.argmax(1) - 8 + 4, minlength=9)
    assert len(counts) == 9 and (counts - 1000).abs().max() <= 2
