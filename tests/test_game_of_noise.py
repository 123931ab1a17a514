"""The pieces of game_of_noise.py against closed forms, finite differences and a sort-based solution."""

import math
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import game_of_noise
from game_of_noise import NoiseGenerator, epsilon_star, mixed_batch, project, share_counts

MACHINE = common.start_machine("cpu")


def distances(noisy: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return (noisy.double() - images.double()).flatten(1).norm(dim=1)


def reach(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    room = torch.where(noise > 0, 1 - images, images) * (noise != 0)
    return room.double().flatten(1).norm(dim=1)


def project_by_sorting(images: torch.Tensor, noise: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The same η from all breakpoints in order: D·log D."""
    x, delta = images.flatten(1), noise.flatten(1)
    room = torch.where(delta > 0, 1 - x, x)
    breakpoints, order = (room / delta.abs()).sort(1)
    power, room = delta.square().gather(1, order), room.square().gather(1, order)
    clipped = room.cumsum(1) - room
    rest = power.flip(1).cumsum(1).flip(1)
    reached = clipped + breakpoints.square() * rest
    index = (reached < epsilon**2).sum(1, keepdim=True).clamp(max=x.shape[1] - 1)
    eta = ((epsilon**2 - clipped.gather(1, index)) / rest.gather(1, index)).sqrt()
    return (x + eta * delta).clamp(0, 1).view(images.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The projection
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 1, 1), (3, 8, 8), (3, 32, 32), (3, 224, 224)])
@pytest.mark.parametrize("share", [1e-3, 0.05, 0.5, 0.9, 0.99, 0.9999])
def test_the_distance_is_epsilon(size, share):
    """From a thousandth of the largest reachable distance to almost all of it; pixels at 0 and 1 among them, tails heavy and light."""
    images = torch.rand(6, *size)
    images[1] = images[1].round()  # every pixel at a border
    images[2] = 0.0
    images[3] = 0.5
    noise = torch.randn(6, *size)
    noise[4] = torch.distributions.StudentT(1.5).sample(size)
    noise[5] *= 10.0 ** torch.randint(-6, 7, size).float()
    target = reach(images, noise) * share
    noisy = project(images, noise, target.float())
    assert noisy.min() >= 0 and noisy.max() <= 1
    possible = reach(images, noise) > 0  # in a tiny image all noise may point outwards
    torch.testing.assert_close(distances(noisy, images)[possible], target[possible], rtol=1e-4, atol=0)
    assert torch.equal(noisy[~possible], images[~possible])


def test_the_scale_of_the_noise_is_of_no_matter():
    images, noise = torch.rand(3, 3, 16, 16), torch.randn(3, 3, 16, 16)
    expected = project(images, noise, 5.0)
    for scale in (1e-30, 1e-3, 1e6, 1e30):
        torch.testing.assert_close(project(images, noise * scale, 5.0), expected, rtol=1e-4, atol=1e-6)


def test_each_pixel_moves_along_its_noise_or_is_clipped():
    """y = clip(x + η·δ) with one η per image: where y is inside (0, 1), (y − x)/δ is that η, elsewhere it is no more."""
    images, noise = torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    noisy = project(images, noise, 25.0)
    ratio = ((noisy - images) / noise).flatten(1)
    inside = ((noisy > 0) & (noisy < 1)).flatten(1)
    for row in range(4):
        eta = ratio[row][inside[row]]
        assert 0 < inside[row].sum() < inside[row].numel()
        assert eta.max() - eta.min() < 1e-9 and (ratio[row][~inside[row]] <= eta.max() + 1e-9).all() and (ratio[row] >= 0).all()


def test_it_equals_the_sort_based_solution():
    images, noise = torch.rand(8, 3, 40, 40, dtype=torch.float64), torch.randn(8, 3, 40, 40, dtype=torch.float64)
    for epsilon in (0.1, 5.0, 24.0, 35.0):
        torch.testing.assert_close(project(images, noise, epsilon), project_by_sorting(images, noise, epsilon), rtol=0, atol=1e-4)


def test_beyond_reach_is_the_saturated_image():
    images, noise = torch.rand(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    noise[0, :, :4] = 0
    saturated = torch.where(noise > 0, 1.0, torch.where(noise < 0, 0.0, images))
    assert torch.equal(project(images, noise, 1e4), saturated)
    assert torch.equal(project(images, noise, float(images[0].numel())), saturated)


@pytest.mark.parametrize("size", [8, 32, 224])
def test_at_the_edge_of_reach_the_distance_still_holds(size):
    """ε just below, at and above the distance of the saturated image, on 8-bit pixels, where rounding decides what is reached."""
    images, noise = (torch.rand(20, 3, size, size) * 255).round() / 255, torch.randn(20, 3, size, size)
    farthest = reach(images, noise)
    for share in (1 - 1e-3, 1 - 1e-4, 1 - 2e-5, 1 - 1e-6, 1.0, 1 + 1e-6, 1.1):
        target = (farthest * share).float()
        torch.testing.assert_close(distances(project(images, noise, target), images), farthest * min(share, 1), rtol=1e-4, atol=0)


def test_zero_noise_and_images_without_room_stay_as_they_are():
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(project(images, torch.zeros_like(images), 3.0), images)
    white = torch.ones(2, 3, 8, 8)
    assert torch.equal(project(white, torch.rand_like(white), 3.0), white)  # all noise points outwards
    assert torch.equal(project(images, torch.randn_like(images), torch.zeros(2)), images)


def test_each_image_has_its_own_epsilon_and_ignores_its_neighbours():
    images, noise, epsilon = torch.rand(5, 3, 32, 32), torch.randn(5, 3, 32, 32), torch.tensor([0.5, 5.0, 20.0, 30.0, 1e3])
    together = project(images, noise, epsilon)
    alone = torch.cat([project(images[i : i + 1], noise[i : i + 1], epsilon[i].item()) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_broken_noise_stays_broken():
    """NaN noise must not pass for no noise: the loss that it leads to is not finite, and training stops."""
    images, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    noise[0, 0, 0, 0] = math.nan
    noisy = project(images, noise, 2.0)
    assert noisy[0].isnan().any() and noisy[1].isfinite().all()


def test_bad_epsilon_and_shapes_are_refused():
    images = torch.rand(2, 3, 8, 8)
    for epsilon in (0.0, -1.0, math.nan):
        with pytest.raises(common.InputError, match="epsilon"):
            project(images, torch.randn_like(images), epsilon)
    with pytest.raises(common.InputError, match="noise is"):
        project(images, torch.randn(2, 3, 8, 9), 1.0)


@pytest.mark.parametrize("epsilon", [0.8, 2.5, 4.5])
def test_the_gradient_is_that_of_finite_differences(epsilon):
    """In noise and images, with part of the pixels clipped and (4.5) some images beyond reach."""
    images = torch.rand(3, 3, 4, 4, dtype=torch.float64) * 0.9 + 0.05
    images[2, :, :, :2] = 0.5
    noise = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    target = torch.minimum(reach(images, noise) * 0.97, torch.tensor(epsilon)).double()
    clipped = project(images, noise, target)
    assert epsilon < 2 or ((clipped == 0) | (clipped == 1)).any()
    # a weight per value, so that no two errors cancel
    assert torch.autograd.gradcheck(
        lambda x, n: project(x, n, target), (images.requires_grad_(), noise.requires_grad_()), eps=1e-7, atol=1e-4, rtol=1e-3
    )


def test_beyond_reach_the_gradient_is_zero_not_nan():
    images, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noise[1] *= 0
    noise.requires_grad_()
    project(images, noise, 100.0).sum().backward()
    assert torch.equal(noise.grad, torch.zeros_like(noise))


def test_projection_is_faster_than_sorting():
    """64 images, the fastest of interleaved repeats: at least 1.5 times as fast at 3×224×224, and no slower at 3×32×32."""
    for size, least, repeats in ((224, 1.5, 5), (32, 1.0, 100)):
        images, noise = torch.rand(64, 3, size, size), torch.randn(64, 3, size, size)
        epsilon, seconds = 0.348 * math.sqrt(images[0].numel()), {project: [], project_by_sorting: []}
        for _ in range(repeats):
            for function, taken in seconds.items():
                start = time.perf_counter()
                function(images, noise, epsilon)
                taken.append(time.perf_counter() - start)
        assert min(seconds[project_by_sorting]) >= least * min(seconds[project]), (size, seconds)


# ---------------------------------------------------------------------------------------------------------------------
# The generator
# ---------------------------------------------------------------------------------------------------------------------


def test_an_untrained_generator_is_gaussian_noise():
    for ng_type, border in (("1x1", 0), ("3x3", 1)):
        generator = NoiseGenerator(ng_type)
        z = torch.randn(4, 3, 16 + 2 * border, 16 + 2 * border)
        noise = generator(z)
        inner = z[..., border : border + 16, border : border + 16]
        assert noise.shape == (4, 3, 16, 16) and (noise - inner).abs().max() < 1e-3
        weights = torch.cat([convolution.weight.detach().flatten() for convolution in generator.convolutions])
        assert weights.std() == pytest.approx(0.01, rel=0.15) and all(convolution.bias.eq(0).all() for convolution in generator.convolutions)
        kernels = [convolution.kernel_size for convolution in generator.convolutions]
        assert kernels == [(1, 1), (1 + 2 * border,) * 2, (1, 1), (1, 1)] and [c.in_channels for c in generator.convolutions] == [3, 20, 20, 20]


def test_1x1_noise_is_uncorrelated_and_3x3_reaches_one_pixel():
    for ng_type, reaches in (("1x1", 0), ("3x3", 1)):
        generator = NoiseGenerator(ng_type)
        for convolution in generator.convolutions:
            nn.init.normal_(convolution.weight)
        z = torch.randn(1, 3, 9 + 2 * reaches, 9 + 2 * reaches, requires_grad=True)
        generator(z)[0, :, 4, 4].sum().backward()
        touched = (z.grad[0] != 0).any(0).nonzero()
        centre = 4 + reaches
        assert touched.min() == centre - reaches and touched.max() == centre + reaches


# ---------------------------------------------------------------------------------------------------------------------
# The game
# ---------------------------------------------------------------------------------------------------------------------


def test_shares_are_exact():
    assert share_counts(70, 0.5, 0.2, True) == [35, 21, 7, 7]
    assert share_counts(70, 0.5, 0.2, False) == [35, 35, 0, 0]  # the first epoch
    assert share_counts(100, 0.5, 0.2, True) == [50, 30, 10, 10] and share_counts(10, 0.5, 0.2, True) == [5, 3, 1, 1]
    assert share_counts(70, 0.0, 1.0, True) == [0, 0, 35, 35] and share_counts(70, 1.0, 0.0, True) == [70, 0, 0, 0]
    for batch_size in range(2, 80):
        for clean_share, replay_share in ((0.5, 0.2), (0.3, 0.7), (0.9, 0.1), (0.0, 0.5)):
            counts = share_counts(batch_size, clean_share, replay_share, True)
            assert sum(counts) == batch_size and min(counts) >= 0 and abs(counts[0] - clean_share * batch_size) <= 0.5


def test_ranks_take_their_part_of_every_share():
    for counts in ([35, 21, 7, 7], [5, 3, 1, 1], [1, 1, 0, 0]):
        for world_size in (1, 2, 3):
            if sum(counts) < world_size:
                continue
            machines = [MACHINE._replace(rank=rank, world_size=world_size) for rank in range(world_size)]
            own = [game_of_noise.own_counts(counts, machine) for machine in machines]
            assert [sum(parts) for parts in zip(*own)] == counts
            assert [sum(parts) for parts in own] == [len(machine.own_rows(torch.zeros(sum(counts)))) for machine in machines]


def test_a_mixed_batch_leaves_its_images_and_their_clean_half_alone():
    """Each stretch is under its own generator's noise, at distance ε; the batch it was made from is not written to."""
    images, z = torch.rand(20, 3, 8, 8), torch.randn(20, 3, 8, 8)
    original = images.clone()
    generators = [lambda z: z, lambda z: z.abs(), lambda z: -z.abs()]
    mixed = mixed_batch(images, z, generators, [10, 6, 2, 2], 3.0)
    assert torch.equal(images, original) and torch.equal(mixed[:10], original[:10]) and mixed.data_ptr() != images.data_ptr()
    torch.testing.assert_close(distances(mixed[10:], images[10:]), torch.full((10,), 3.0, dtype=torch.float64), rtol=1e-4, atol=0)
    assert ((mixed - images)[16:18] >= 0).all() and ((mixed - images)[18:] <= 0).all()
    assert ((mixed - images)[10:16] < 0).any() and ((mixed - images)[10:16] > 0).any()
    assert torch.equal(mixed_batch(images, z, generators, [20, 0, 0, 0], 3.0), original)


def test_baselines_have_the_noise_they_name():
    images, z = torch.full((400, 3, 8, 8), 0.5), torch.randn(400, 3, 8, 8)
    sigma = torch.tensor([0.05, 0.1]).repeat(200)
    gaussian, speckle = (game_of_noise.baseline_batch(images, z, sigma, mode, 200) for mode in ("Gauss_mult", "Speckle"))
    assert torch.equal(gaussian[:200], images[:200])
    for start, expected in ((200, 0.05), (201, 0.1)):
        assert (gaussian - images)[start::2].std().item() == pytest.approx(expected, rel=0.02)
        assert (speckle - images)[start::2].std().item() == pytest.approx(expected / 2, rel=0.02)


def test_ascending_raises_the_loss_and_leaves_the_classifier_alone():
    """The step is Adam's up the gradient of the loss, as finite differences see it, in the generator's parameters alone."""
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 4)).double().eval()
    generator = NoiseGenerator("3x3").double()
    for convolution in generator.convolutions:
        nn.init.normal_(convolution.weight, 0, 0.3)
    images, labels, z = torch.rand(5, 3, 6, 6).double(), torch.tensor([0, 1, 2, 3, 0]), torch.randn(5, 3, 8, 8).double()

    def loss() -> torch.Tensor:
        noisy = project(images, generator(z), 2.0)
        return F.cross_entropy(classifier(noisy), labels, reduction="sum")

    analytic = torch.autograd.grad(loss(), list(generator.parameters()))
    for parameter, gradient in zip(generator.parameters(), analytic):
        place = gradient.abs().flatten().argmax()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.view(-1)[place] += sign * 1e-6
                values.append(loss().item())
                parameter.view(-1)[place] -= sign * 1e-6
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient.flatten()[place].item(), rel=1e-4)
    before, weights = loss().item(), [parameter.clone() for parameter in classifier.parameters()]
    optimizer = game_of_noise.adam(generator, 1e-3)
    for _ in range(5):
        game_of_noise.ascend(loss(), generator, optimizer, common.grad_scaler(MACHINE), MACHINE)
    assert loss().item() > before
    assert all(parameter.grad is None and torch.equal(parameter, weight) for parameter, weight in zip(classifier.parameters(), weights))


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return common.load_weights(common.build_model("resnext", 10, "digits"), common.WEIGHTS / "digits-resnext.pt").eval()


def test_a_trained_generator_hurts_more_than_gaussian_noise(classifier):
    """Against the frozen, shipped classifier, on validation digits, at the same ε."""
    images, labels = common.load_split("digits", "val")
    train = common.load_split("digits", "train")
    random = torch.Generator().manual_seed(0)
    epsilon = 8.0
    weights = {key: value.clone() for key, value in classifier.state_dict().items()}
    generator, losses, left = game_of_noise.train_fresh_generator(
        classifier, "1x1", lambda: common.image_batches(train, 50, random, MACHINE), epsilon, 1e-2, 30, 50, random, MACHINE, ""
    )
    z = torch.randn(len(labels), 3, 32, 32, generator=random)
    with torch.no_grad():
        gaussian, learned = (common.accuracy(classifier(project(common.to_float(images), noise, epsilon)), labels) for noise in (z, generator(z)))
    assert learned < gaussian - 5 and left < gaussian - 5, (gaussian, learned, left)
    assert len(losses) == 30 and sum(losses[-5:]) > sum(losses[:5])
    assert all(torch.equal(value, weights[key]) for key, value in classifier.state_dict().items())  # frozen, batch statistics too


# ---------------------------------------------------------------------------------------------------------------------
# ε* and the mean corruption error
# ---------------------------------------------------------------------------------------------------------------------


def test_epsilon_star_of_a_linear_classifier_is_the_closed_form():
    """Two classes, divided at w·x + b = 0: along δ the plane is ‖δ‖·(w·x + b)/(−w·δ) away, while no pixel is clipped."""
    dimension = 3 * 8 * 8
    model = nn.Sequential(nn.Flatten(), nn.Linear(dimension, 2))
    images, noise = 0.4 + 0.2 * torch.rand(60, 3, 8, 8), torch.randn(60, 3, 8, 8)
    with torch.no_grad():
        w = model[1].weight[1] - model[1].weight[0]
        model[1].bias.copy_(torch.tensor([0.0, -(images.flatten(1) @ w).mean().item()]))
        score = model(images).diff(dim=1)[:, 0]  # w·x + b
        noise -= 0.3 * (score.sign()[:, None] * w.sign()).view_as(noise)  # most move towards the other class
        expected = noise.flatten(1).norm(dim=1) * score / -(noise.flatten(1) @ w)
    found = epsilon_star(model, images, (score > 0).long(), noise)
    unclipped = (expected > 0) & (expected < 2.0)  # well below where the first pixel is clipped
    assert unclipped.sum() >= 30
    torch.testing.assert_close(found[unclipped], expected[unclipped], rtol=1e-3, atol=1e-4)
    assert (found[~unclipped] > 1.9).all()


def test_epsilon_star_of_wrong_and_of_unshakeable_answers():
    images, labels, noise = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), torch.randn(4, 3, 8, 8)

    def constant(batch):
        return torch.tensor([[1.0, 0.0]]).expand(len(batch), 2)

    assert torch.equal(epsilon_star(constant, images, labels, noise), torch.tensor([192.0, 0.0, 192.0, 0.0]))
    assert torch.equal(epsilon_star(constant, images, labels, 0 * noise), torch.tensor([192.0, 0.0, 192.0, 0.0]))


def test_epsilon_star_of_no_images_and_of_broken_noise():
    def constant(batch):
        return torch.tensor([[1.0, 0.0]]).expand(len(batch), 2)

    empty = torch.zeros(0, 3, 8, 8)
    assert epsilon_star(constant, empty, torch.zeros(0, dtype=torch.long), empty).shape == (0,)
    images, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    noise[0, 0, 0, 0] = math.nan
    found = epsilon_star(constant, images, torch.tensor([0, 0]), noise)
    assert found[0].isnan() and found[1] == 192  # not the best possible distance


def test_epsilon_star_stops_when_all_are_bracketed_and_respects_clipping():
    """A classifier of the mean: bright noise on dark images crosses 0.5 when √D·0.5 is reached at the latest; asked for few passes."""
    images, noise = torch.full((3, 3, 8, 8), 0.1), torch.rand(3, 3, 8, 8) + 0.5
    asked = []

    def model(batch):
        asked.append(len(batch))
        mean = batch.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)

    found = epsilon_star(model, images, torch.zeros(3, dtype=torch.long), noise)
    at = project(images, noise, found)
    assert ((at.flatten(1).mean(1) - 0.5).abs() < 1e-3).all()
    assert len(asked) <= 1 + math.ceil(math.log2(1024 * 0.5)) + 1 + 12 and sum(asked) <= 3 * len(asked)


def test_mean_corruption_error_by_hand():
    reference = {"a": 50.0, "b": 25.0}
    assert game_of_noise.mean_corruption_error({"a": 75.0, "b": 90.0}, reference, 0.1) == pytest.approx(100 * (0.5 + 0.4) / 2)
    assert game_of_noise.mean_corruption_error({"a": 50.0, "b": 75.0}, reference, 0.1) == pytest.approx(100)
    # a reference that makes no error counts as half an image
    perfect = {"a": 50.0, "b": 0.0}
    assert game_of_noise.mean_corruption_error({"a": 50.0, "b": 100.0}, perfect, 0.1) == pytest.approx(100)
    assert game_of_noise.mean_corruption_error({"a": 50.0, "b": 99.9}, perfect, 0.1) == pytest.approx(150)


def test_the_published_models_get_their_published_mce():
    """AlexNet itself is 100; the table's order is the standard one, and 'without noises' leaves out the three noises."""
    assert tuple(game_of_noise.ALEXNET_ERRORS) == common.CORRUPTIONS
    alexnet = {name: 100 - error for name, error in game_of_noise.ALEXNET_ERRORS.items()}
    assert game_of_noise.mean_corruption_error(alexnet, game_of_noise.ALEXNET_ERRORS, 0) == pytest.approx(100)
    means = game_of_noise.mean_accuracies({name: [number] * 5 for number, name in enumerate(common.CORRUPTIONS)}, common.CORRUPTIONS)
    assert means["mean"] == 7 and means["mean_without_noises"] == sum(range(3, 15)) / 12


def test_names_of_modes():
    names = [game_of_noise.method_name(mode, ng_type) for mode in ("ANT", "ANT+SIN", "Speckle") for ng_type in ("1x1", "3x3")]
    assert names[:4] == ["ANT", "ANT3x3", "ANT+SIN", "ANT3x3+SIN"] and names[4] == "Speckle"
