"""The pieces of game_of_noise.py against closed forms and finite differences."""

import math

import pytest
import torch
from conftest import assert_equal_weights
from torch import Tensor, nn

import common
import game_of_noise
from game_of_noise import NoiseGenerator, epsilon_star, mixed_batch, project, share_counts

MACHINE = common.start_machine("cpu")
EDGE = (1 - 1e-3, 1 - 1e-4, 1 - 2e-5, 1 - 1e-6, 1.0, 1 + 1e-6, 1.1)  # of the saturated image's distance


def distances(noisy: Tensor, images: Tensor) -> Tensor:
    return (noisy.double() - images.double()).flatten(1).norm(dim=1)


def reach(images: Tensor, noise: Tensor) -> Tensor:
    room = torch.where(noise > 0, 1 - images, images) * (noise != 0)
    return room.double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("size", [(3, 1, 1), (3, 8, 8), (3, 32, 32), (3, 224, 224)])
@pytest.mark.parametrize("share", [1e-3, 0.05, 0.5, 0.9, 0.99, *EDGE])
def test_the_distance_is_epsilon(size, share):
    """For all kinds of tails, and on 8-bit pixels, where rounding decides at the edge of reach."""
    images, noise = torch.rand(26, *size), torch.randn(26, *size)
    images[1], images[2], images[3] = images[1].round(), 0.0, 0.5  # first: every pixel at a border
    images[6:] = (images[6:] * 255).round() / 255
    noise[4] = torch.distributions.StudentT(1.5).sample(size)
    noise[5] *= 10.0 ** torch.randint(-6, 7, size).float()
    farthest = reach(images, noise)
    noisy = project(images, noise, (farthest * share).float())
    assert noisy.min() >= 0 and noisy.max() <= 1
    possible = farthest > 0  # in a tiny image all noise may point outwards
    found, target = distances(noisy, images), farthest * min(share, 1)
    torch.testing.assert_close(found[possible], target[possible], rtol=1e-4, atol=0)
    assert torch.equal(noisy[~possible], images[~possible])


def test_each_pixel_moves_along_its_noise_or_is_clipped_whatever_the_scale():
    """y = clip(x + η·δ), one η per image: inside (0, 1) (y − x)/δ is that η, elsewhere no more."""
    images, noise = torch.rand(4, 3, 40, 40).double(), torch.randn(4, 3, 40, 40).double()
    noisy = project(images, noise, 25.0)
    ratio = ((noisy - images) / noise).flatten(1)
    inside = ((noisy > 0) & (noisy < 1)).flatten(1)
    for row in range(4):
        eta = ratio[row][inside[row]]
        assert 0 < inside[row].sum() < inside[row].numel() and eta.max() - eta.min() < 1e-9
        assert (ratio[row][~inside[row]] <= eta.max() + 1e-9).all() and (ratio[row] >= 0).all()
    for scale in (1e-30, 1e-3, 1e6, 1e30):
        torch.testing.assert_close(project(images, noise * scale, 25.0), noisy, rtol=0, atol=1e-4)


def test_beyond_reach_and_without_noise_or_room():
    images, noise = torch.rand(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    noise[0, :, :4], noise[1] = 0, 0
    saturated = torch.where(noise > 0, 1.0, torch.where(noise < 0, 0.0, images))
    assert torch.equal(project(images, noise, 1e4), saturated)
    assert torch.equal(project(images, noise, torch.zeros(3)), images)
    assert torch.equal(project(torch.ones(3, 3, 8, 8), noise.abs(), 3.0), torch.ones(3, 3, 8, 8))  # outwards
    project(images, noise.requires_grad_(), 100.0).sum().backward()
    assert torch.equal(noise.grad, torch.zeros_like(noise))  # not NaN


def test_each_image_has_its_own_epsilon_and_broken_noise_stays_broken():
    """NaN noise must not pass for no noise: the loss that it leads to is not finite, and training stops."""
    images, noise = torch.rand(5, 3, 32, 32), torch.randn(5, 3, 32, 32)
    epsilon = torch.tensor([0.5, 5.0, 20.0, 30.0, 1e3])
    alone = [project(images[i : i + 1], noise[i : i + 1], epsilon[i].item()) for i in range(5)]
    torch.testing.assert_close(project(images, noise, epsilon), torch.cat(alone), rtol=0, atol=1e-5)
    noise[0, 0, 0, 0] = math.nan
    noisy = project(images, noise, 2.0)
    assert noisy[0].isnan().any() and noisy[1:].isfinite().all()
    for bad in (0.0, math.nan):
        with pytest.raises(common.InputError, match="epsilon"):
            project(images, noise, bad)


@pytest.mark.parametrize("epsilon", [0.8, 2.5, 4.5])
def test_the_gradient_is_that_of_finite_differences(epsilon):
    """In noise and images, with part of the pixels clipped and (4.5) some images beyond reach."""
    images = torch.rand(3, 3, 4, 4).double() * 0.9 + 0.05
    images[2, :, :, :2] = 0.5
    noise = torch.randn(3, 3, 4, 4).double()
    target = torch.minimum(reach(images, noise) * 0.97, torch.tensor(epsilon)).double()
    clipped = project(images, noise, target)
    assert epsilon < 2 or ((clipped == 0) | (clipped == 1)).any()
    function, exact = lambda x, n: project(x, n, target), {"eps": 1e-7, "atol": 1e-4, "rtol": 1e-3}
    assert torch.autograd.gradcheck(function, (images.requires_grad_(), noise.requires_grad_()), **exact)


@pytest.mark.parametrize("ng_type, border", [("1x1", 0), ("3x3", 1)])
def test_a_generator_starts_as_gaussian_noise_and_reaches_as_far_as_its_name_says(ng_type, border):
    generator = NoiseGenerator(ng_type)
    layers, far = generator.convolutions, 2 * border
    z = generator.inputs(4, torch.zeros(1, 3, 16, 16), MACHINE.generator(0), MACHINE)
    assert (generator(z) - z[..., border : border + 16, border : border + 16]).abs().max() < 1e-3
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    assert weights.std() == pytest.approx(0.01, rel=0.15)
    assert [layer.in_channels for layer in layers] == [3, 20, 20, 20]
    for layer in layers:
        nn.init.normal_(layer.weight)
    z = torch.randn(1, 3, 9 + far, 9 + far, requires_grad=True)
    generator(z)[0, :, 4, 4].sum().backward()
    touched = (z.grad[0] != 0).any(0).nonzero()
    assert touched.min() == 4 and touched.max() == 4 + far


def test_shares_are_exact_and_ranks_take_their_part_of_each():
    assert share_counts(70, True, MACHINE) == [35, 21, 7, 7]
    assert share_counts(70, False, MACHINE) == [35, 35, 0, 0]  # the first epoch
    for batch_size in range(2, 80):
        counts = share_counts(batch_size, True, MACHINE)
        assert sum(counts) == batch_size and min(counts) >= 0 and abs(counts[0] - batch_size / 2) <= 0.5
        for world_size in (2, 3):
            machines = [MACHINE._replace(rank=rank, world_size=world_size) for rank in range(world_size)]
            own = [share_counts(batch_size, True, machine) for machine in machines]
            assert [sum(parts) for parts in zip(*own)] == counts
            assert [sum(part) for part in own] == [len(m.own_rows(torch.zeros(batch_size))) for m in machines]


def test_a_mixed_batch_leaves_its_images_and_their_clean_half_alone():
    """Each stretch is under its own generator's noise, at distance ε; what it is made from stays."""
    images, z = torch.rand(20, 3, 8, 8), torch.randn(20, 3, 8, 8)
    original, generators = images.clone(), [lambda z: z, lambda z: z.abs(), lambda z: -z.abs()]
    mixed = mixed_batch(images, z, generators, [10, 6, 2, 2], 3.0)
    assert torch.equal(images, original) and torch.equal(mixed[:10], original[:10])
    found, change = distances(mixed[10:], images[10:]), mixed - images
    torch.testing.assert_close(found, torch.full_like(found, 3.0), rtol=1e-4, atol=0)
    assert (change[16:18] >= 0).all() and (change[18:] <= 0).all()
    assert (change[10:16] < 0).any() and (change[10:16] > 0).any()
    alone = mixed_batch(images, z, generators, [20, 0, 0, 0], 3.0)
    assert torch.equal(alone, original) and alone.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("mode, factor", [("Gauss_single", 1), ("Gauss_mult", 1), ("Speckle", 0.5)])
def test_baselines_have_the_noise_they_name(mode, factor):
    """On a grey of a half; clipping at 0 and 1 shrinks the largest a little."""
    images, sigmas = torch.full((4000, 3, 8, 8), 0.5), torch.tensor(game_of_noise.SIGMAS.get(mode, (0.1,)))
    how = (mode, 0.1, 4000, 2000, MACHINE.generator(0), MACHINE)
    noise = game_of_noise.baseline_batch(images, *how) - images
    assert noise[:2000].eq(0).all() and noise.abs().max() <= 0.5
    deviations = noise[2000:].flatten(1).std(dim=1)
    found = torch.stack([deviations.quantile((i + 0.5) / len(sigmas)) for i in range(len(sigmas))])
    torch.testing.assert_close(found, factor * sigmas, rtol=0.2, atol=0)


def test_steps_of_the_generator_raise_the_loss_and_leave_the_classifier_alone(monkeypatch):
    classifier, generator = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 4)), NoiseGenerator("3x3")
    game, weight = game_of_noise.Game(classifier, "digits", 2.0, 5, MACHINE), classifier[1].weight.clone()
    optimizer, z = game_of_noise.ADAM(generator.parameters(), 1e-3), torch.randn(5, 3, 8, 8)
    monkeypatch.setattr(NoiseGenerator, "inputs", lambda *_: z)
    images, labels = torch.rand(5, 3, 6, 6), torch.arange(5) % 4
    step = (game, (generator, optimizer, MACHINE.scaler()), images, labels, None)
    losses = [game_of_noise.ascend(*step)[0].item() for _ in range(10)]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    assert torch.equal(classifier[1].weight, weight) and classifier[1].weight.grad is None


def test_a_trained_generator_hurts_more_than_gaussian_noise():
    """Against the frozen, shipped classifier, on validation digits, at the same ε."""
    model, z = common.build_model("resnext", 10, "digits"), torch.randn(197, 3, 32, 32)
    start = common.load_weights(model, common.WEIGHTS / "digits-resnext.pt").state_dict()
    train, val = (common.Images(*common.load_split("digits", split), MACHINE) for split in ("train", "val"))
    start = {key: value.clone() for key, value in start.items()}
    how = (game_of_noise.Game(model, "digits", 8.0, 50, MACHINE), "1x1", train, 30, 1e-2, ("a", 0))
    (generator, left), (again, _) = (game_of_noise.train_fresh_generator(*how) for _ in range(2))
    assert_equal_weights(generator.state_dict(), again.state_dict())  # a function of the key alone
    assert_equal_weights(model.state_dict(), start)  # frozen, batch statistics too
    with torch.no_grad():
        noisy = [project(common.to_float(val.images), noise, 8.0) for noise in (z, generator(z))]
        logits = [model.eval()(images) for images in noisy]
        with game_of_noise.affine_batch_norm(model, MACHINE):  # changes nothing
            torch.testing.assert_close(model(noisy[0]), logits[0], rtol=1e-3, atol=1e-3)
    gaussian, learned = (100 * (part.argmax(1) == val.labels).double().mean().item() for part in logits)
    assert learned < gaussian - 5 and left < gaussian - 5, (gaussian, learned, left)


def test_epsilon_star_of_a_linear_classifier_is_the_closed_form():
    """Divided at w·x + b = 0: along δ the plane is ‖δ‖·(w·x + b)/(−w·δ) away, while no pixel is clipped."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    images, noise = 0.4 + 0.2 * torch.rand(60, 3, 8, 8), torch.randn(60, 3, 8, 8)
    with torch.no_grad():
        w = model[1].weight[1] - model[1].weight[0]
        model[1].bias.copy_(torch.tensor([0.0, -(images.flatten(1) @ w).mean().item()]))
        score = model(images).diff(dim=1)[:, 0]  # w·x + b
        noise -= 0.3 * (score.sign()[:, None] * w.sign()).view_as(noise)  # most move towards the other class
        expected = noise.flatten(1).norm(dim=1) * score / -(noise.flatten(1) @ w)
    found = epsilon_star(model, images, (score > 0).long(), noise)
    unclipped = (expected > 0) & (expected < 2.0)  # well below where the first pixel is clipped
    assert unclipped.sum() >= 30 and (found[~unclipped] > 1.9).all()
    torch.testing.assert_close(found[unclipped], expected[unclipped], rtol=1e-3, atol=1e-4)


def test_epsilon_star_of_wrong_of_unshakeable_and_of_no_answers():
    images, labels, noise = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), torch.randn(4, 3, 8, 8)
    model = lambda batch: torch.tensor([[1.0, 0.0]]).expand(len(batch), 2)
    for scale in (1, 0):
        found = epsilon_star(model, images, labels, scale * noise)
        assert torch.equal(found, torch.tensor([192.0, 0.0, 192.0, 0.0]))
    assert epsilon_star(model, images[:0], labels[:0], noise[:0]).shape == (0,)
    noise[0, 0, 0, 0] = math.nan
    found = epsilon_star(model, images, labels, noise)
    assert found[0].isnan() and found[2] == 192  # not the best possible distance


def test_mean_corruption_error_by_hand_and_of_alexnet():
    mce, errors = game_of_noise.mean_corruption_error, game_of_noise.ALEXNET_ERRORS
    reference, perfect = {"a": 50.0, "b": 25.0}, {"a": 50.0, "b": 0.0}
    assert mce({"a": 75.0, "b": 90.0}, reference, 0.1) == pytest.approx(100 * (0.5 + 0.4) / 2)
    assert mce({"a": 50.0, "b": 100.0}, perfect, 0.1) == pytest.approx(100)  # no error: as half an image
    assert mce({"a": 50.0, "b": 99.9}, perfect, 0.1) == pytest.approx(150)
    assert tuple(errors) == common.CORRUPTIONS and errors["fog"] == 81.9324
    assert mce({name: 100 - error for name, error in errors.items()}, errors, 0) == pytest.approx(100)
    accuracies = {name: [number] * 5 for number, name in enumerate(common.CORRUPTIONS)}
    means = game_of_noise.mean_accuracies(accuracies, common.CORRUPTIONS)
    assert means["mean"] == 7 and means["mean_without_noises"] == sum(range(3, 15)) / 12
