"""The classifiers of common.py: sizes as published, shapes, Shake-Shake, ShakeDrop, ResNet-D, slim models."""

import re

import pytest
import torch
import torch.nn.functional as F

import common

CIFAR = ("wresnet40_2", "wresnet28_10", "shake26_2x32d", "shake26_2x96d", "shake26_2x112d", "pyramid272")
IMAGENET = ("resnet50", "resnet50d", "resnet200")


@pytest.mark.parametrize(
    "name, millions",
    [
        ("wresnet40_2", 2.24),
        ("wresnet28_10", 36.5),
        ("shake26_2x32d", 2.9),
        ("shake26_2x96d", 26.2),
        ("shake26_2x112d", 35.6),
        ("pyramid272", 26.0),
        ("resnet50", 25.6),
        ("resnet50d", 25.6),
        ("resnet200", 64.7),
    ],
)
def test_full_models_are_as_large_as_published_and_take_odd_sizes(name, millions):
    classes, dataset = (1000, "imagenet") if name in IMAGENET else (10, "cifar10")
    with torch.device("meta"):  # shapes without numbers
        model = common.build_model(name, classes, dataset)
        for side in (64, 71) if name in IMAGENET else (32, 33):
            for train in (True, False):
                assert model.train(train)(torch.rand(2, 3, side, side)).shape == (2, classes)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    # GlobalBatchNorm2d takes the place of this very class
    assert {type(module) for module in model.modules() if "BatchNorm" in type(module).__name__} == {torch.nn.BatchNorm2d}


@pytest.mark.parametrize("name", ["wresnet28_10", "shake26_2x96d", "pyramid272", "resnet50d", "resnet200"])
def test_full_models_see_the_whole_image(name):
    """Finite logits of a real forward pass, on the smallest sensible image, and a gradient from every part of it."""
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    model = common.build_model(name, 10, "imagenet" if name in IMAGENET else "cifar10").eval()
    logits = model(image)
    (gradient,) = torch.autograd.grad(logits.square().sum(), image)
    assert logits.shape == (1, 10) and logits.isfinite().all() and gradient.isfinite().all() and (gradient != 0).float().mean() > 0.99


@pytest.mark.parametrize("name", CIFAR + IMAGENET)
def test_slim_models_learn_and_evaluate_deterministically(name, tmp_path):
    """A few steps on one batch lower its loss; evaluation draws nothing; a checkpoint brings the model back."""
    images, labels = common.load_split("digits", "train")
    index = (labels < 2).nonzero()[:32, 0]  # zeros and ones: told apart in a few steps
    batch, labels = common.to_float(images[index]), labels[index]
    model = common.build_model(name, 10, "digits").train()
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        logits = model(batch)
        assert torch.equal(model(batch), logits) and torch.equal(torch.get_rng_state(), state)
        common.save_atomically(model.state_dict(), tmp_path / "model.pt")
        again = common.load_weights(common.build_model(name, 10, "digits"), tmp_path / "model.pt").eval()
        assert torch.equal(again(batch), logits)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(common.InputError) as error:
        common.build_model("shake26_2x33d", 10, "cifar10")
    assert set(common.MODELS) == set(common.DIGITS_MODELS) and {*CIFAR, *IMAGENET} <= set(common.MODELS)
    assert all(re.search(rf"\b{name}\b", str(error.value)) for name in common.MODELS)


# --------------------------------------------------------------------------------------------------------- Shake-Shake


def test_shake_even_mixes_each_image_by_its_own_draw_and_sends_half_of_the_gradient_each_way():
    one, other = torch.randn(64, 3, 5, 5, requires_grad=True), torch.randn(64, 3, 5, 5, requires_grad=True)
    mixed = common.shake_even(one, other, training=True)
    alpha = ((mixed - other) * (one - other)).sum((1, 2, 3)) / (one - other).square().sum((1, 2, 3))
    alpha = alpha.detach()[:, None, None, None]
    torch.testing.assert_close(mixed, alpha * one + (1 - alpha) * other)  # one number per image
    assert 0 <= alpha.min() < 0.2 and 0.8 < alpha.max() <= 1 and alpha.unique().numel() == 64
    upstream = torch.randn_like(mixed)
    for gradient in torch.autograd.grad(mixed, (one, other), upstream):
        assert torch.equal(gradient, upstream / 2)
    assert not torch.equal(common.shake_even(one, other, training=True), mixed)
    assert torch.equal(common.shake_even(one, other, training=False), (one + other) / 2)
    draws = torch.stack([common.shake_even(torch.ones(200, 1, 1, 1), torch.zeros(200, 1, 1, 1), True) for _ in range(50)])
    assert draws.mean() == pytest.approx(0.5, abs=0.01) and draws.var() == pytest.approx(1 / 12, abs=0.005)


def test_shake_shake_skip_path_sees_shifted_pixels():
    """Both halves take every second pixel of ReLU(x): the first from the corner on, the second one right and down, with zeros before the edge."""
    block = common.ShakeShakeBlock(4, 6, 2).eval()
    x = torch.randn(2, 4, 8, 7)
    active = x.relu()
    shifted = torch.zeros_like(active)
    shifted[:, :, 1:, 1:] = active[:, :, :-1, :-1]
    halves = [
        torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], image[:, :, ::2, ::2])
        for conv, image in ((block.skip1, active), (block.skip2, shifted))
    ]
    expected = block.bn_skip(torch.cat(halves, 1)) + (block.branch1(active) + block.branch2(active)) / 2
    torch.testing.assert_close(block(x), expected)
    assert common.ShakeShakeBlock(4, 4, 1).bn_skip is None


def test_shake_shake_blocks_draw_each_their_own(monkeypatch):
    alphas, shake_even = [], common.shake_even

    def recorded(one, other, training):
        mixed = shake_even(one, other, training)
        alphas.append(((mixed - other) / (one - other)).flatten(1).median(1).values.detach())
        return mixed

    monkeypatch.setattr(common, "shake_even", recorded)
    model = common.build_model("shake26_2x32d", 10, "digits").train()
    images = torch.rand(4, 3, 32, 32)
    first = model(images)
    drawn = torch.cat(alphas)
    assert len(alphas) == len(model.blocks) and (drawn[:, None] - drawn[None]).abs().fill_diagonal_(1).min() > 1e-5
    assert not torch.equal(model(images), first)


# ----------------------------------------------------------------------------------------------------------- ShakeDrop


def test_shake_drop_expectation_is_the_evaluation_factor():
    torch.manual_seed(1)
    layer = common.ShakeDrop(0.3)
    x = torch.ones(16, 1, 1, 1)
    draws = torch.stack([layer.train()(x) for _ in range(4000)]).view(4000, 16)
    alive = (draws == 1).all(1)
    assert (alive == (draws == 1).any(1)).all()  # one gate for the whole batch
    assert alive.float().mean() == pytest.approx(0.7, abs=0.03)
    dead = draws[~alive]
    assert dead.min() < -0.99 and 0.99 < dead.max() < 1 and dead.mean() == pytest.approx(0, abs=0.02)  # α ~ U(-1, 1), one per image
    assert dead.var() == pytest.approx(1 / 3, abs=0.02) and dead[0].unique().numel() > 1
    torch.testing.assert_close(layer.eval()(x), torch.full_like(x, 0.7))
    assert draws.mean() == pytest.approx(0.7, abs=0.03)


def test_shake_drop_sends_the_gradient_through_beta():
    torch.manual_seed(1)
    layer = common.ShakeDrop(0.5).train()
    forward, backward = [], []
    for _ in range(400):
        x = torch.full((8, 2, 3, 3), 2.0, requires_grad=True)
        out = layer(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        for values, kept in ((out / 2, forward), (gradient, backward)):
            assert (values == values[:, :1, :1, :1]).all()  # one number per image
            kept.append(values[:, 0, 0, 0].detach())
    forward, backward = torch.stack(forward), torch.stack(backward)
    alive = (forward == 1).all(1)
    assert 0.4 < alive.float().mean() < 0.6 and (backward[alive] == 1).all()
    beta = backward[~alive]
    assert beta.min() >= 0 and beta.max() < 1 and beta.mean() == pytest.approx(0.5, abs=0.03) and beta.var() == pytest.approx(1 / 12, abs=0.01)
    assert abs(torch.corrcoef(torch.stack([forward[~alive].flatten(), beta.flatten()]))[0, 1]) < 0.1  # drawn independently of α


def test_death_rates_grow_linearly_and_channels_additively():
    with torch.device("meta"):
        model = common.build_model("pyramid272", 10, "cifar10")
    rates = [block.shake_drop.death_rate for block in model.blocks]
    assert len(rates) == 90 and rates == pytest.approx([0.5 * number / 90 for number in range(1, 91)])
    channels = [block.conv2.out_channels for block in model.blocks]
    assert channels[:3] == [18, 20, 22] and channels[44] == 116 and channels[-1] == 216
    assert [number for number, block in enumerate(model.blocks) if block.conv2.stride == (2, 2)] == [30, 60]
    assert model.fc.in_features == 4 * 216


def test_pyramid_shortcut_pools_and_pads_with_zeros():
    block = common.PyramidBottleneck(4, 3, 2, 0.0).eval()
    torch.nn.init.zeros_(block.bn4.weight)  # nothing but the shortcut
    x = torch.randn(2, 4, 5, 6)
    out = block(x)
    torch.testing.assert_close(out[:, :4, :2], F.avg_pool2d(x[:, :, :4], 2))
    torch.testing.assert_close(out[:, :4, 2:], F.avg_pool2d(x[:, :, 4:], (1, 2)))  # an odd row is averaged alone
    assert out.shape == (2, 12, 3, 3) and (out[:, 4:] == 0).all()


# ------------------------------------------------------------------------------------------------------------- ResNets


def test_resnet50_is_torchvisions():
    from torchvision.models import resnet50

    torch.manual_seed(3)
    model = common.build_model("resnet50", 7, "imagenet")
    torch.manual_seed(3)
    plain = resnet50(num_classes=7)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", IMAGENET)
def test_resnets_normalise_inside(name):
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    seen = []
    for dataset, expected in (("imagenet", (images - mean) / std), ("digits", images * 2 - 1)):
        model = common.build_model(name, 10, dataset).eval()
        first = model.conv1 if name != "resnet50d" else model.conv1[0]
        first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model(images)
        torch.testing.assert_close(seen.pop(), expected)
        assert "normalisation" not in model.state_dict()


def test_resnet50d_downsamples_as_described():
    with torch.device("meta"):
        model = common.build_model("resnet50d", 1000, "imagenet")
    stem = [(module.out_channels, module.stride[0]) for module in model.conv1 if isinstance(module, torch.nn.Conv2d)]
    assert stem == [(32, 2), (32, 1), (64, 1)] and all(module.kernel_size == (3, 3) for module in model.conv1[::3])
    for stage in (model.layer2, model.layer3, model.layer4):
        pool, conv, _ = stage[0].downsample
        assert pool.kernel_size == 2 and conv.stride == (1, 1) and stage[0].conv1.stride == (1, 1) and stage[0].conv2.stride == (2, 2)
    assert isinstance(model.layer1[0].downsample[0], torch.nn.Identity)


# ---------------------------------------------------------------------------------------- mixed precision, compilation


@pytest.mark.parametrize("name", ["wresnet28_10", "shake26_2x32d", "pyramid272", "resnet50d"])
def test_models_keep_channels_last_and_take_mixed_precision(name):
    """Everything between the blocks stays channels_last and bfloat16, forward and backward."""
    model = common.build_model(name, 10, "digits").train()
    blocks = [
        module for module in model.modules() if type(module).__name__ in ("WideResNetBlock", "ShakeShakeBlock", "PyramidBottleneck", "Bottleneck")
    ]
    outputs = []
    for block in blocks:
        block.register_forward_hook(lambda module, inputs, out: outputs.append(out))
    images = torch.rand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).float().square().mean()
    loss.backward()
    assert len(outputs) == len(blocks) > 0
    assert all(out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.bfloat16 for out in outputs)
    assert all(parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    "build", [lambda: common.ShakeShake(10, width=4, depth=8), lambda: common.PyramidNet(10, depth=20, widening=6, width=4)], ids=["shake", "pyramid"]
)
def test_shaken_models_compile_to_one_graph(build):
    """fullgraph: a host synchronisation or a Python branch on a draw would break the graph."""
    model = build().train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.rand(4, 3, 32, 32)
    first, second = compiled(images), compiled(images)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model.eval(), backend="aot_eager", fullgraph=True)(images), model(images))
