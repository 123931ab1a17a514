"""The pieces of advaa.py: views, controller, rewards, policies on file, data. The operations have test_advaa_ops.py."""

import itertools
import json
import math

import pytest
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, TrivialAugmentWide

import advaa
import common
from advaa import COLLAPSED, GUARD_SHARE, IDENTITY, MAGNITUDES, OPS, Controller


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_policies(M: int = 8, Q: int = 5, seed: int = 0) -> torch.Tensor:
    ops = torch.randint(len(OPS), (M, Q, 2), generator=generator(seed))
    return torch.stack([ops, torch.randint(MAGNITUDES, ops.shape, generator=generator(seed + 1))], dim=-1)


def digits(count: int) -> torch.Tensor:
    return common.load_split("digits", "train")[0][:count]


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------


def test_each_view_draws_a_sub_policy_of_its_policy_and_its_own_signs():
    policies = random_policies(M=3, Q=4)
    policies[0, 0] = torch.tensor([[OPS.index("Rotate"), 5], [OPS.index("ShearX"), 3]])
    ops, values = advaa.sample_policy_ops(policies, 4000, generator())
    assert ops.shape == values.shape == (3, 4000, 2)
    for policy, view_ops, view_values in zip(policies, ops, values):
        strengths = advaa.op_values(policy[..., 0], policy[..., 1], torch.ones(4, 2, dtype=torch.long))
        expected = [(*sub_policy[:, 0].tolist(), *strength.tolist()) for sub_policy, strength in zip(policy, strengths)]
        drawn = list(zip(*view_ops.T.tolist(), *view_values.abs().T.tolist()))
        shares = torch.tensor([drawn.count(pair) for pair in expected]) / len(drawn)
        assert set(drawn) == set(expected) and (shares - 0.25).abs().max() < 0.03
    signed = (ops < 5) & (values != 0)
    assert abs((values[signed] > 0).float().mean() - 0.5) < 0.03 and (values[~signed] >= 0).all()
    both = signed.all(2)  # the two signs of a view are drawn apart
    assert abs((values[both].sign().prod(1) > 0).float().mean() - 0.5) < 0.05


def test_partners_are_other_images_of_the_batch():
    blank = torch.full((8, 5, 2), IDENTITY), torch.zeros(8, 5, 2)
    partners = torch.cat([advaa.sample_views(*blank, 0, False, 32, generator(seed)).partners for seed in range(50)])
    counts = torch.zeros(5, 5).index_put_((torch.arange(5)[:, None].expand(partners.shape), partners), torch.tensor(1.0), accumulate=True)
    assert (counts.diagonal() == 0).all() and (counts[~torch.eye(5, dtype=torch.bool)] / 800 - 0.25).abs().max() < 0.06
    within = advaa.other_images(partners, 5)  # as for a rank's own part
    assert (within != torch.arange(5)[:, None]).all() and within.max() == 4
    assert advaa.sample_views(blank[0][:, :1], blank[1][:, :1], 0, False, 32, generator()).partners.unique().tolist() == [0]


def test_no_operation_leaves_the_images_and_views_come_policy_by_policy():
    images = digits(6)
    blank = torch.full((3, 4, 2), IDENTITY), torch.zeros(3, 4, 2)
    views = advaa.sample_views(*blank, 0, False, 32, generator())
    rows = torch.tensor([5, 0, 2, 2])
    assert torch.equal(advaa.augment(images, rows, views, 0), images[rows].repeat(3, 1, 1, 1))
    blank[0][1, :, 0] = OPS.index("Invert")
    views = advaa.sample_views(*blank, 0, False, 32, generator())
    shown = advaa.augment(images, rows, views, 0).view(3, 4, 3, 32, 32)
    assert torch.equal(shown[1], 255 - images[rows]) and torch.equal(shown[2], images[rows])


def test_crop_flip_and_cutout_of_a_view():
    images = torch.randint(1, 256, (200, 3, 32, 32), dtype=torch.uint8)
    blank = torch.full((2, 200, 2), IDENTITY), torch.zeros(2, 200, 2)
    views = advaa.sample_views(*blank, 4, True, 32, generator())
    assert set(views.offsets.unique().tolist()) == set(range(-4, 5)) and 0.4 < views.flips.float().mean() < 0.6
    assert set(views.holes.unique().tolist()) == set(range(32))
    shown = advaa.augment(images, torch.arange(200), views, 16).view(2, 200, 3, 32, 32)
    for m, i in itertools.product(range(2), range(0, 200, 17)):
        dx, dy = views.offsets[m, i].tolist()
        expected = torch.nn.functional.pad(images[i], (4, 4, 4, 4))[:, 4 + dy : 36 + dy, 4 + dx : 36 + dx]
        expected = expected.flip(2) if views.flips[m, i] else expected.clone()
        x, y = views.holes[m, i].tolist()
        expected[:, max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8] = 128
        assert torch.equal(shown[m, i], expected)


def test_a_part_of_a_batch_gets_the_same_views_as_in_the_whole():
    """Randomness is keyed by the image's place in the global batch: what a rank computes for its rows is what one process computes."""
    images = digits(30)
    ops, values = advaa.sample_policy_ops(random_policies(), 30, generator())
    views = advaa.sample_views(ops, values, 4, False, 32, generator(1))
    whole = advaa.augment(images, torch.arange(30), views, 8).view(8, 30, 3, 32, 32)
    for rank in range(4):
        machine = common.Machine(torch.device("cpu"), rank, 4)
        rows = machine.own_rows(torch.arange(30))
        own = advaa.Views(*(machine.own_rows(part.transpose(0, 1)).transpose(0, 1) for part in views))
        assert torch.equal(advaa.augment(images, rows, own, 8).view(8, len(rows), 3, 32, 32), whole[:, rows])


@pytest.mark.parametrize("size", [32, 224])
def test_trivial_augment_is_torchvisions_search_space(size):
    ops, values = advaa.sample_trivial_ops(4, 20000, size, generator())
    assert ops.shape == (4, 20000, 2) and (ops[..., 1] == IDENTITY).all()
    space = TrivialAugmentWide()._augmentation_space(31)
    counts = torch.bincount(ops[..., 0].flatten(), minlength=IDENTITY + 1) / 80000
    for name, (magnitudes, signed) in space.items():
        assert abs(counts[advaa.op_number(name)] - 1 / len(space)) < 0.01, name
        drawn = values[..., 0][ops[..., 0] == advaa.op_number(name)].unique()
        magnitudes = magnitudes.float().view(-1)
        magnitudes = magnitudes / size if name.startswith("Translate") else magnitudes
        magnitudes = torch.cat([magnitudes, -magnitudes]) if signed else magnitudes
        expected = magnitudes + 1 if name in ("Brightness", "Color", "Contrast", "Sharpness") else magnitudes
        assert torch.allclose(drawn, expected.unique(), atol=1e-6), name


@pytest.mark.parametrize("dataset, policy", [("cifar10", AutoAugmentPolicy.CIFAR10), ("digits", AutoAugmentPolicy.SVHN)])
def test_autoaugment_is_torchvisions_policy(dataset, policy):
    ops, _ = advaa.sample_autoaugment_ops(dataset, 4, 20000, generator())
    expected = torch.zeros(2, IDENTITY + 1)
    for sub_policy in AutoAugment(policy).policies:
        for stage, (name, probability, _) in enumerate(sub_policy):
            expected[stage, advaa.op_number(name)] += probability / 25
            expected[stage, IDENTITY] += (1 - probability) / 25
    for stage in range(2):
        counts = torch.bincount(ops[..., stage].flatten(), minlength=IDENTITY + 1) / 80000
        assert (counts - expected[stage]).abs().max() < 0.01


@pytest.mark.parametrize("name", ["ShearX", "TranslateY", "Rotate", "Brightness", "Color", "Solarize", "Posterize", "Equalize"])
def test_values_taken_from_torchvision_do_what_torchvision_does(name):
    """The kernels are Pillow's: torchvision's own, on PIL images, must agree for the value that its magnitude became."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.autoaugment import _apply_op
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    images = (common.example_pictures(4, 32) * 255).round().byte()
    magnitudes, signed = TrivialAugmentWide()._augmentation_space(31)[name]
    values = advaa.signed_values(name, magnitudes, signed, 31, 32)[20]
    magnitude = magnitudes.expand(31)[20].item()
    ours = advaa.apply_ops(images, torch.full((4,), OPS.index(name)), values[:1].expand(4))
    # torchvision counts shears and translations the other way round; both signs are equally likely
    theirs = [
        pil_to_tensor(_apply_op(to_pil_image(image), name, sign * magnitude, InterpolationMode.NEAREST, None))
        for image in images
        for sign in ((1, -1) if signed else (1, 1))
    ]
    theirs = torch.stack(theirs).view(4, 2, 3, 32, 32)
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4)) if signed else (slice(None),) * 4
    equal = max((ours[inner] == theirs[:, sign][inner]).float().mean().item() for sign in range(2))
    assert equal == 1.0 or (name in ("ShearX", "TranslateY") and equal > 0.9), equal


# ---------------------------------------------------------------------------------------------------------------------
# Controller
# ---------------------------------------------------------------------------------------------------------------------


def test_an_untrained_controller_chooses_nearly_uniformly_from_the_whole_space():
    torch.manual_seed(0)
    with torch.no_grad():
        policies, log_probabilities, entropies = Controller(5)(count=400, generator=generator())
    assert policies.shape == entropies.shape == (400, 5, 2, 2) and log_probabilities.shape == (400,)
    uniform = -10 * math.log(len(OPS)) - 10 * math.log(MAGNITUDES)
    assert (log_probabilities - uniform).abs().max() < 1.0
    assert 0.99 < advaa.normalised_entropy(entropies) <= 1
    for column, size in ((0, 16), (1, 10)):
        counts = torch.bincount(policies[..., column].flatten(), minlength=size) / 4000
        assert len(counts) == size and (counts - 1 / size).abs().max() < 0.03


@pytest.mark.parametrize("carry_hidden", [True, False])
def test_probabilities_of_all_policies_sum_to_one_and_sampling_follows_them(carry_hidden):
    torch.manual_seed(0)
    controller = Controller(1, carry_hidden)
    with torch.no_grad():
        for head in controller.heads:
            head.weight.mul_(20)  # far from uniform
        choices = torch.cartesian_prod(*(torch.arange(size) for size in (16, 10, 16, 10))).view(-1, 1, 2, 2)
        probabilities = controller(choices)[1].exp()
        assert probabilities.sum().item() == pytest.approx(1, abs=1e-4)
        policies, log_probabilities, entropies = controller(count=20000, generator=generator())
    first = torch.bincount(policies[:, 0, 0, 0], minlength=16) / 20000
    assert (first - probabilities.view(16, -1).sum(1)).abs().max() < 0.015
    # −E[log p] over samples is the entropy
    assert -log_probabilities.mean().item() == pytest.approx(entropies.flatten(1).sum(1).mean().item(), abs=0.1)


def test_a_space_of_15_operations_lacks_sample_pairing():
    torch.manual_seed(0)
    controller = Controller(5, num_ops=15)
    with torch.no_grad():
        policies, log_probabilities, entropies = controller(count=400, generator=generator())
    assert OPS[15] == "SamplePairing" and policies[..., 0].unique().tolist() == list(range(15))
    assert (log_probabilities + 10 * math.log(15) + 10 * math.log(MAGNITUDES)).abs().max() < 1.0
    assert 0.99 < advaa.normalised_entropy(entropies, 15) <= 1 < advaa.normalised_entropy(torch.full((1, 1, 1, 2), math.log(16)), 15)


def test_reset_hidden_makes_sub_policies_draws_of_one_distribution():
    torch.manual_seed(0)
    policies = random_policies(M=2, Q=3)
    swapped = policies[:, [2, 0, 1]]
    for carry_hidden in (True, False):
        torch.manual_seed(1)
        controller = Controller(3, carry_hidden)
        for head in controller.heads:
            torch.nn.init.uniform_(head.weight, -1, 1)
        with torch.no_grad():
            first, second = controller(policies)[1], controller(swapped)[1]
        assert torch.allclose(first, second, atol=1e-5) != carry_hidden


def test_sampling_again_gives_what_scoring_gives():
    torch.manual_seed(0)
    controller = Controller(5)
    with torch.no_grad():
        policies, log_probabilities, entropies = controller(count=8, generator=generator())
        again = controller(policies)
    assert torch.equal(again[0], policies) and torch.equal(again[1], log_probabilities) and torch.equal(again[2], entropies)


def test_the_guards_floor():
    """However sure the controller is, the entropy stays above 0.48 of the largest, and so above what counts as collapsed."""
    for share in (0.0, GUARD_SHARE):
        controller = Controller(5, uniform_share=share)
        with torch.no_grad():
            for head in controller.heads:
                head.bias[3] = 100
            policies, log_probabilities, entropies = controller(count=8, generator=generator())
        entropy = advaa.normalised_entropy(entropies)
        if share:
            rest = [share / size for size in (16, 10)]
            closed = [-(size - 1) * r * math.log(r) - (1 - share + r) * math.log(1 - share + r) for r, size in zip(rest, (16, 10))]
            expected = (closed[0] / math.log(16) + closed[1] / math.log(10)) / 2
            assert entropy == pytest.approx(expected, abs=1e-4) and entropy > 0.48 > COLLAPSED
            assert len(policies[..., 0].unique()) > 5
        else:
            assert entropy < 1e-6 and (policies == 3).all()
        assert log_probabilities.isfinite().all()


def test_the_objectives_gradient_is_its_finite_difference():
    torch.manual_seed(0)
    controller, policies, rewards = Controller(2).double(), random_policies(M=4, Q=2), torch.randn(4).double()

    def objective() -> torch.Tensor:
        _, log_probabilities, entropies = controller(policies)
        return advaa.reinforce_loss(log_probabilities, rewards, entropies, 0.1)

    objective().backward()
    for parameter, index in ((controller.heads[0].bias, 3), (controller.heads[1].weight, 57), (controller.cell.weight_hh, 999), (controller.embedding.weight, 40)):  # fmt: skip
        with torch.no_grad():
            values, step = parameter.view(-1), 1e-5
            values[index] += step
            above = objective()
            values[index] -= 2 * step
            below = objective()
            values[index] += step
        assert parameter.grad.view(-1)[index].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-4, abs=1e-9)


def test_reinforce_and_rewards_in_closed_form():
    losses = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(advaa.normalised_rewards(losses), torch.tensor([-1.0, 0.0, 1.0]), atol=1e-4)
    assert torch.equal(advaa.normalised_rewards(torch.full((4,), 2.5)), torch.zeros(4))
    log_probabilities, entropies = torch.tensor([-1.0, -2.0]), torch.full((2, 1, 2, 2), 0.5)
    loss = advaa.reinforce_loss(log_probabilities, torch.tensor([1.0, -1.0]), entropies, 0.1)
    assert loss.item() == pytest.approx(-(-1 + 2) / 2 - 0.1 * 2)
    assert advaa.moving_average([], torch.tensor([4.0])) == 4
    assert advaa.moving_average([1.0, 2.0, 3.0], losses) == pytest.approx(0.8 * (0.8 * 1 + 0.2 * 2) + 0.2 * 3)


@pytest.mark.parametrize("carry_hidden", [True, False])
def test_the_controller_learns_which_operation_hurts(carry_hidden):
    """A stub classifier that minds bright images only, so of the operations Invert: digits are white on black. Its probability grows."""
    torch.manual_seed(0)
    controller, images, draws = Controller(5, carry_hidden), digits(16), generator()
    optimizer = torch.optim.Adam(controller.parameters(), 0.02)
    shares = []
    for _ in range(60):
        with torch.no_grad():
            policies, _, _ = controller(count=8, generator=draws)
        shares.append((policies[..., 0] == OPS.index("Invert")).float().mean().item())
        views = advaa.sample_views(*advaa.sample_policy_ops(policies, 16, draws), 0, False, 32, draws)
        shown = common.to_float(advaa.augment(images, torch.arange(16), views, 0)).view(8, 16, -1)
        losses = (shown.mean(2) > 0.5).float().mean(1)  # of each policy
        _, log_probabilities, entropies = controller(policies)
        loss = advaa.reinforce_loss(log_probabilities, advaa.normalised_rewards(losses), entropies, 1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert shares[0] < 0.2 and sum(shares[-5:]) / 5 > 0.4, shares  # uniform is 1/16


# ---------------------------------------------------------------------------------------------------------------------
# Policies on file
# ---------------------------------------------------------------------------------------------------------------------


def write(file, records) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_policies_survive_the_file(tmp_path):
    epochs = [random_policies(seed=seed) for seed in range(3)]
    write(tmp_path / "p.jsonl", [advaa.policy_record(epoch, policies, [0.5] * 8) for epoch, policies in enumerate(epochs, 1)])
    assert torch.equal(advaa.read_policies(tmp_path / "p.jsonl", 3, 8, 5), torch.stack(epochs))
    assert torch.equal(advaa.read_policies(tmp_path / "p.jsonl", 2, 8, 5), torch.stack(epochs[:2]))
    first = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert list(first) == ["epoch", "policies", "losses"] and first["policies"][0][0][0][0] in OPS
    found = advaa.histograms(epochs[0])
    assert sum(found["ops"]) == sum(found["magnitudes"]) == 80 and len(found["ops"]) == 16 and len(found["magnitudes"]) == 10
    assert found["ops"][2] == (epochs[0][..., 0] == 2).sum()


def test_damaged_policies_are_named_with_their_line(tmp_path):
    file = tmp_path / "p.jsonl"
    good = [advaa.policy_record(epoch, random_policies(M=2, Q=1), [1.0, 2.0]) for epoch in (1, 2)]

    def changed(change) -> list[dict]:
        bad = json.loads(json.dumps(good))
        change(bad[1])
        return bad

    cases = [
        (changed(lambda record: record["policies"][0][0].__setitem__(0, ["Blur", 3])), "line 2: unknown op 'Blur'"),
        (changed(lambda record: record["policies"][0][0].__setitem__(0, ["Invert", 10])), "magnitude 10 of Invert is not one of 0 to 9"),
        (changed(lambda record: record["policies"][0][0].__setitem__(0, ["Invert", 2.0])), "magnitude 2.0 of Invert"),
        (changed(lambda record: record["policies"].pop()), "shape (1, 1, 2, 2), but --M 2 --Q 1"),
        (changed(lambda record: record["policies"][0].append([["Invert", 1]])), "line 2"),
        (changed(lambda record: record.pop("policies")), "line 2: no 'policies'"),
        (changed(lambda record: record.__setitem__("epoch", 7)), "line 2: it is of epoch 7"),
        (changed(lambda record: record.__setitem__("policies", 3)), "line 2"),
        (good[:1], "holds 1 epochs, but 2 are to be trained"),
    ]
    for records, message in cases:
        write(file, records)
        with pytest.raises(common.InputError) as caught:
            advaa.read_policies(file, 2, 2, 1)
        assert message in str(caught.value) and str(file) in str(caught.value)
    for content in (b"not json\n", b"\xff\xfe\n", b"[" * 100000, b"[1]\n"):
        file.write_bytes(content)
        with pytest.raises(common.InputError, match="p.jsonl"):
            advaa.read_policies(file, 1, 2, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Settings, data, figures
# ---------------------------------------------------------------------------------------------------------------------


def test_published_settings():
    rows = {
        ("cifar10", "wresnet28_10"): (128, 0.1, 5e-4, 200, "step"),
        ("cifar100", "wresnet28_10"): (128, 0.1, 5e-4, 200, "step"),
        ("cifar10", "shake26_2x32d"): (128, 0.2, 1e-4, 600, "cosine"),
        ("cifar10", "shake26_2x96d"): (128, 0.2, 1e-4, 600, "cosine"),
        ("cifar10", "shake26_2x112d"): (128, 0.2, 1e-4, 600, "cosine"),
        ("cifar100", "shake26_2x96d"): (128, 0.1, 5e-4, 1200, "cosine"),
        ("cifar10", "pyramid272"): (128, 0.1, 1e-4, 600, "cosine"),
        ("cifar100", "pyramid272"): (128, 0.5, 1e-4, 1200, "cosine"),
        **{("imagenet", name): (2048, 0.8, 1e-4, 120, "cosine") for name in ("resnet50", "resnet50d", "resnet200")},
    }
    for (dataset, model), expected in rows.items():
        args = advaa.parse_args(["--dataset", dataset, "--model", model])
        assert (args.batch_size, args.lr, args.weight_decay, args.epochs, args.lr_schedule) == expected
        assert (args.M, args.Q, args.controller_lr, args.entropy_penalty) == (8, 5, 3.5e-4, 1e-5)
        assert (args.cutout, args.validation, args.num_train) == (0 if dataset == "imagenet" else 16, False, None)
    args = advaa.parse_args(["--dataset", "cifar10", "--M", "4", "--epochs", "3", "--reset-hidden", "--logdir", "logs"])
    assert (args.model, args.M, args.epochs, args.carry_hidden, args.run_dir) == ("wresnet28_10", 4, 3, False, "logs")
    assert advaa.parse_args(["--carry-hidden"]).carry_hidden is advaa.parse_args([]).carry_hidden is True


def test_settings_of_an_earlier_run_are_taken_over(tmp_path):
    for carry_hidden in (True, False):
        (tmp_path / "args.json").write_text(
            json.dumps({"dataset": "cifar10", "carry_hidden": carry_hidden, "M": 3, "validation": True, "num_train": None})
        )
        args = advaa.parse_args(["--load-conf", str(tmp_path / "args.json"), "--Q", "2"])
        assert (args.dataset, args.carry_hidden, args.M, args.Q, args.validation, args.epochs) == ("cifar10", carry_hidden, 3, 2, True, 200)


def test_learning_rates():
    assert [advaa.lr_factor("step", step, 200) for step in (0, 59, 60, 119, 120, 159, 160, 199)] == pytest.approx(
        [1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008]
    )
    assert [advaa.lr_factor("cosine", step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def test_a_balanced_subset():
    labels = common.load_split("digits", "train")[1]
    chosen = advaa.balanced_subset(labels, 153, 0)
    counts = torch.bincount(labels[chosen], minlength=10)
    assert len(chosen.unique()) == 153 and counts.min() == 15 and counts.max() == 16
    assert torch.equal(chosen, advaa.balanced_subset(labels, 153, 0)) and not torch.equal(chosen, advaa.balanced_subset(labels, 153, 1))


def test_flip_probability_in_closed_form():
    predictions = torch.tensor([[1, 1, 2, 2, 1], [3, 3, 3, 3, 3]])
    assert advaa.flip_probability(predictions, noise=False) == pytest.approx(100 * 2 / 8)
    assert advaa.flip_probability(predictions, noise=True) == pytest.approx(100 * 2 / 8)
    assert advaa.flip_probability(torch.tensor([[1, 2, 2, 2]]), noise=True) == pytest.approx(100)
    assert advaa.flip_probability(torch.tensor([[1, 2, 2, 2]]), noise=False) == pytest.approx(100 / 3)
