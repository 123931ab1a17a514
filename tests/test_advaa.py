"""The pieces of advaa.py but for its operations: views, controller, rewards, policies on file, settings."""

import json
import math

import pytest
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, TrivialAugmentWide

import advaa
import common
from advaa import COLLAPSED, DRAWS, GUARD_SHARE, IDENTITY, MAGNITUDES, OPS, Controller


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_policies(M: int = 8, Q: int = 5, seed: int = 0) -> torch.Tensor:
    parts = [torch.randint(most, (M, Q, 2), generator=generator(seed)) for most in (len(OPS), MAGNITUDES)]
    return torch.stack(parts, dim=-1)


def draws(count: int, M: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, M, DRAWS, generator=generator(seed), dtype=torch.float64)


def views(images, policies=None, crop=0, cutout=0, M=3, seed=0):
    M, rows = M if policies is None else len(policies), torch.arange(len(images))
    given = (draws(len(images), M, seed), advaa.menu_of("none", policies, M, "digits", 32), crop, cutout)
    return advaa.augment(images, images, rows, *given).unflatten(0, (len(images), -1))


def test_each_view_draws_a_sub_policy_of_its_policy_and_its_own_signs(monkeypatch):
    policies, asked = random_policies(M=3, Q=4), []
    monkeypatch.setattr(advaa, "apply_ops", lambda images, *what: asked.append(what[:2]) or images)
    policies[0, 0] = torch.tensor([[OPS.index("Rotate"), 5], [OPS.index("ShearX"), 3]])
    views(torch.zeros(4000, 3, 1, 1, dtype=torch.uint8), policies)
    ops, values = (torch.stack(part, -1).view(4000, 3, 2) for part in zip(*asked))  # values: signed
    for m, policy in enumerate(policies):
        strengths = advaa.op_values(policy[..., 0], policy[..., 1], torch.ones(4, 2))
        expected = [(*pair[:, 0].tolist(), *strength.tolist()) for pair, strength in zip(policy, strengths)]
        drawn = list(zip(*ops[:, m].T.tolist(), *values[:, m].abs().T.tolist()))
        shares = torch.tensor([drawn.count(pair) for pair in expected]) / len(drawn)
        assert set(drawn) == set(expected) and (shares - 0.25).abs().max() < 0.03
    signed = (ops < 5) & (values != 0)
    assert abs((values[signed] > 0).float().mean() - 0.5) < 0.03 and (values[~signed] >= 0).all()
    both = signed.all(2)  # the two signs of a view are drawn apart
    assert abs((values[both].sign().prod(1) > 0).float().mean() - 0.5) < 0.05


def test_partners_are_other_images_of_the_batch():
    """Images of one level each, paired with weight 0.4: what comes out says with which."""
    levels, pairing = torch.tensor([0, 50, 100, 150, 200]), OPS.index("SamplePairing")
    images = levels.byte().view(5, 1, 1, 1).expand(5, 3, 32, 32).contiguous()
    pairs = torch.tensor([[pairing, 9], [pairing, 0]]).expand(400, 1, 2, 2)
    found = ((views(images, pairs)[..., 0, 0, 0] - 0.6 * levels[:, None]) / 20).round()  # (5, 400)
    shares = torch.stack([(found == i).float().mean(1) for i in range(5)], 1)
    assert (shares.diagonal() == 0).all() and (shares + 0.25 * torch.eye(5) - 0.25).abs().max() < 0.08
    assert torch.equal(views(images[:1], pairs)[0], images[:1].expand(400, 3, 32, 32))  # alone, with itself


def test_crop_flip_and_cutout_of_a_view():
    images = torch.randint(1, 256, (200, 3, 32, 32), dtype=torch.uint8)
    shown = views(images, crop=4, cutout=16, M=2)
    assert torch.equal(views(images)[:, 1], images)  # nothing of it all on digits, without a policy
    offsets, flips, holes = draws(200, 2)[..., 11:].split((2, 1, 2), dim=2)
    offsets, holes = (offsets * 9).long() - 4, (holes * 32).long()
    assert set(offsets.unique().tolist()) == {*range(-4, 5)} and set(holes.unique().tolist()) == {*range(32)}
    for m in range(2):
        expected = advaa.crop_flip_cutout(images, offsets[:, m], flips[:, m, 0] < 0.5, holes[:, m], 16)
        assert torch.equal(shown[:, m], expected)


def test_baselines_are_torchvisions():
    ops, shares, values = (part[0] for part in advaa.menu_of("trivial", None, 3, "digits", 224))
    space = TrivialAugmentWide()._augmentation_space(31)
    assert (ops[:, 1] == IDENTITY).all() and (shares == 1).all() and len(ops) == 31 * len(space)
    for i, (name, (magnitudes, signed)) in enumerate(space.items()):
        expected = magnitudes.float().expand(31) / (224 if name.startswith("Translate") else 1)
        middle = name in ("Brightness", "Color", "Contrast", "Sharpness")
        either = torch.stack([expected, -expected if signed else expected], -1) + middle
        assert torch.allclose(values[31 * i : 31 * i + 31, 0], either), name
        assert (ops[31 * i : 31 * i + 31, 0] == (OPS.index(name) if name in OPS else IDENTITY)).all()
    for dataset, policy in {"cifar10": "CIFAR10", "digits": "SVHN", "folder": "IMAGENET"}.items():
        ops, shares, _ = advaa.menu_of("autoaugment", None, 2, dataset, 32)
        pairs = AutoAugment(AutoAugmentPolicy[policy]).policies
        names = [[name for name, _, _ in pair] for pair in pairs]
        assert [[OPS[op] for op in pair] for pair in ops[1].tolist()] == names
        assert torch.equal(shares[1], torch.tensor([[share for _, share, _ in pair] for pair in pairs]))


def test_an_untrained_controller_chooses_nearly_uniformly_from_the_whole_space():
    policies, log_probabilities, entropies = Controller(5)(400, generator())
    assert policies.shape == entropies.shape == (400, 5, 2, 2) and log_probabilities.shape == (400,)
    assert (log_probabilities + 10 * math.log(len(OPS)) + 10 * math.log(MAGNITUDES)).abs().max() < 1.0
    assert 0.99 < advaa.normalised_entropy(entropies) <= 1
    for column, size in ((0, 16), (1, 10)):
        counts = torch.bincount(policies[..., column].flatten(), minlength=size) / 4000
        assert len(counts) == size and (counts - 1 / size).abs().max() < 0.03


@pytest.mark.parametrize("carry_hidden", [True, False])
def test_sampling_follows_the_probabilities(carry_hidden):
    """The policy that is drawn most is as likely as it says; over samples, -E[log p] is the entropy."""
    controller = Controller(1, carry_hidden)
    with torch.no_grad():
        for head in controller.heads:
            head.bias.copy_(2 * torch.randn(len(head.bias)))  # far from uniform
        policies, log_probabilities, entropies = controller(20000, generator())
    found, place, counts = policies.flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
    said = log_probabilities[place == counts.argmax()][0].exp().item()
    assert counts.max() > 200 and counts.max().item() / 20000 == pytest.approx(said, rel=0.2)
    entropy = entropies.flatten(1).sum(1).mean().item()
    assert -log_probabilities.mean().item() == pytest.approx(entropy, abs=0.1)


def test_a_state_that_starts_anew_makes_sub_policies_draws_of_one_distribution():
    for carry_hidden in (True, False):
        controller = Controller(3, carry_hidden)
        for head in controller.heads:
            torch.nn.init.uniform_(head.weight, -1, 1)
        entropies = controller(1, generator())[2][0, :, 0, 0]  # of the first choice of each sub-policy
        assert torch.allclose(entropies, entropies[0].expand(3), atol=1e-5) != carry_hidden


def test_the_guards_floor():
    """However sure the controller is, the entropy stays above 0.48 of the largest, and so above COLLAPSED."""
    for share in (0.0, GUARD_SHARE):
        controller = Controller(5, uniform_share=share)
        for head in controller.heads:
            torch.nn.init.constant_(head.bias[3:4], 100)
        policies, log_probabilities, entropies = controller(8, generator())
        entropy = advaa.normalised_entropy(entropies)
        assert (0.5 > entropy > 0.48 > COLLAPSED) if share else (entropy < 1e-6 and (policies == 3).all())
        assert log_probabilities.isfinite().all()


def test_reinforce_and_rewards_in_closed_form():
    rewards, equal = advaa.normalised_rewards(torch.tensor([1.0, 2.0, 3.0])), torch.full((4,), 2.5)
    assert torch.allclose(rewards, torch.tensor([-1.0, 0.0, 1.0]), atol=1e-4)
    assert torch.equal(advaa.normalised_rewards(equal), torch.zeros(4))
    given = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, -1.0]), torch.full((2, 1, 2, 2), 0.5)
    assert advaa.reinforce_loss(*given, 0.1).item() == pytest.approx(-(-1 + 2) / 2 - 0.1 * 2)


@pytest.mark.parametrize("carry_hidden", [True, False])
def test_the_controller_learns_which_operation_hurts(carry_hidden):
    """A stub classifier minds bright images only, so of the operations Invert: digits are white on black."""
    controller, shares, seeds = Controller(5, carry_hidden), [], generator()
    images = common.load_split("digits", "train")[0][:16]
    optimizer = torch.optim.Adam(controller.parameters(), 0.02)
    for epoch in range(60):
        policies, log_probabilities, entropies = controller(8, seeds)
        shares.append((policies[..., 0] == OPS.index("Invert")).float().mean().item())
        shown = common.to_float(views(images, policies, seed=epoch)).flatten(2)
        rewards = advaa.normalised_rewards((shown.mean(2) > 0.5).float().mean(0))  # of each policy's loss
        optimizer.zero_grad()
        advaa.reinforce_loss(log_probabilities, rewards, entropies, 1e-5).backward()
        optimizer.step()
    assert shares[0] < 0.2 and sum(shares[-5:]) / 5 > 0.4, shares  # uniform is 1/16


def test_policies_survive_the_file_and_damage_is_named(tmp_path):
    file, epochs = tmp_path / "p.jsonl", [random_policies(2, 1, seed) for seed in range(3)]
    lines = [json.dumps(advaa.policy_record(i, part, [0.5] * 2)) + "\n" for i, part in enumerate(epochs, 1)]
    file.write_text("".join(lines))
    assert all(map(torch.equal, advaa.read_policies(file, 2, 2, 1), epochs))
    op = json.dumps(json.loads(lines[0])["policies"][0][0][0])
    changes = {'["Blur", 3]': "Posterize", '["Invert", 10]': "0 to 9", "3": "line 2"}
    cases = [(lines[0] + lines[0].replace(op, bad, 1), message) for bad, message in changes.items()]
    cases += [(lines[0], "holds 1 epochs"), ("[" * 100000, "line"), ("[1]\n", "line"), ("not json\n", "line")]
    for content, message in cases:
        file.write_text(content)
        with pytest.raises(common.InputError) as caught:
            advaa.read_policies(file, 2, 2, 1)
        assert message in str(caught.value) and str(file) in str(caught.value)


def test_published_settings():
    wrn, shake = (128, 0.1, 5e-4, 200, "step"), (128, 0.2, 1e-4, 600, "cosine")
    rows = {("cifar10", "wresnet28_10"): wrn, ("cifar100", "wresnet28_10"): wrn}
    rows |= {("cifar10", f"shake26_2x{width}d"): shake for width in (32, 96, 112)}
    rows |= {("imagenet", name): (2048, 0.8, 1e-4, 120, "cosine") for name in common.RESNETS}
    rows[("cifar100", "shake26_2x96d")] = (128, 0.1, 5e-4, 1200, "cosine")
    rows[("cifar10", "pyramid272")] = (128, 0.1, 1e-4, 600, "cosine")
    rows[("cifar100", "pyramid272")] = (128, 0.5, 1e-4, 1200, "cosine")
    for (dataset, model), expected in rows.items():
        args = advaa.parse_args(["--dataset", dataset, "--model", model])
        assert (args.batch_size, args.lr, args.weight_decay, args.epochs, args.lr_schedule) == expected
        cutout = 16 * (dataset != "imagenet")
        assert (args.M, args.Q, args.controller_lr, args.cutout) == (8, 5, 3.5e-4, cutout)
    args = advaa.parse_args("--dataset cifar10 --model resnext --no-carry-hidden --logdir x".split())
    assert (args.model, args.epochs, args.carry_hidden, args.run_dir) == ("resnext", 200, False, "x")
    steps, factors = (0, 59, 60, 119, 120, 159, 160, 199), [1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008]
    assert [advaa.lr_factor("step", step, 200) for step in steps] == pytest.approx(factors)
    assert [advaa.lr_factor("cosine", step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def test_a_balanced_subset_and_flip_probability():
    labels = common.load_split("digits", "train")[1]
    chosen = advaa.balanced_subset(labels, 153, 0)
    counts = torch.bincount(labels[chosen], minlength=10)
    assert len(chosen.unique()) == 153 and counts.min() == 15 and counts.max() == 16
    predictions = torch.tensor([[1, 2, 2, 2], [3, 3, 3, 3]])
    assert advaa.flip_probability(predictions, noise=True) == pytest.approx(50)
    assert advaa.flip_probability(predictions, noise=False) == pytest.approx(100 / 6)
