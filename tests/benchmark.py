"""How far each script's step is from the limit of its machine.

    python tests/benchmark.py                       # this machine's CPU, or GPU where there is one; some 40 minutes on 2 cores
    python tests/benchmark.py --quick --json FILE   # fewer cases and repeats, within 5 minutes
    python tests/benchmark.py --only advaa          # the cases whose names hold this word

A case runs a script's own main() on random images. After every few optimiser steps the script is held, and the work that its step can't do
without, the limit, is timed in the same process; ours and limit alternate, so both see the same machine. Seconds are medians over these
rounds, warm-up left out; ratio = limit / ours.

    GrETTA      the classifier's forward pass of 2·P·B images, the policy's forward and backward pass of B
    AdvAA       forward pass, backward pass and optimiser step of M·B images that are on the device already
    ANT         forward and backward pass of the classifier for the generator (in eval mode, gradients to the images), its own training step
    test time   the classifier alone
    training    advaa.py --policy none and trivial against a bare loop: shuffle, forward, backward, step
    start       --help against `import torch`; the first training step after the command, against a limit of 8 s

The limit's precision (float32, or bfloat16 autocast), layout (channels_last or not) and, for the classifier's forward pass, number of images
at a time are the fastest of those tried on this machine. Peak memory is the process's (CPU) or what torch allocated (GPU). "theirs" is the same
step done as the published implementations do it: GrETTA with two forward passes of P·B images, a warp per transform; AdvAA with Pillow, picture by picture; ANT
in float32 with earlier generators read from disk for every batch.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import common  # noqa: E402

Work = Callable[[], object]


class Case(NamedTuple):
    """One line of the table: a script's flags, and what the limit is made of."""

    script: str
    flags: str
    model: str
    classes: int
    size: int  # of the images, px
    dataset: str  # whose models are built
    batch: int  # images of the training set per step
    factor: int = 1  # M, or P
    quick: bool = True
    theirs: bool = False


class Done(BaseException):
    """Enough steps were timed."""


class Timer:
    """Alternates rounds of a script's steps with rounds of the limit; a hook after every optimiser step of one class."""

    def __init__(self, optimizer: type, limit: Work, device: torch.device, steps: int, rounds: int, warm_up: int):
        self.optimizer, self.limit, self.device = optimizer, limit, device
        self.steps, self.rounds, self.warm_up = steps, rounds, warm_up
        self.seen, self.ours, self.limits, self.memory, self.busy = 0, [], [], 0.0, False

    def __call__(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self.busy or not isinstance(optimizer, self.optimizer):  # busy: the limit has an optimiser too
            return
        self.seen += 1
        if self.seen < self.warm_up or (self.seen - self.warm_up) % self.steps:
            return
        synchronize(self.device)
        if self.seen > self.warm_up:
            self.ours.append((time.perf_counter() - self.begun) / self.steps)
            self.memory = max(self.memory, peak_memory_mb(self.device))
            self.busy = True
            self.limits.append(seconds_of(self.limit, self.device, self.steps))
            self.busy = False
        if len(self.ours) == self.rounds:
            raise Done
        reset_peak_memory(self.device)
        self.begun = time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Work, device: torch.device, times: int = 1) -> float:
    """Seconds of one call."""
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - begun) / times


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux alone
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Of what torch allocated on a GPU; of the process, since the last reset, on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
    return float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """How the work of a limit is done."""

    dtype: torch.dtype | None  # of autocast
    layout: torch.memory_format
    part: int = 10**9  # images at a time, of a forward pass
    affine: bool = False  # batch norm in eval mode as x·scale + shift, which the script does on a CPU

    def __str__(self) -> str:
        words = [str(self.dtype or torch.float32), str(self.layout)] + ["affine batch norm"] * self.affine
        return ", ".join(word.removeprefix("torch.").removesuffix("_format") for word in words) + f", by {self.part}" * (self.part < 10**9)

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)


Make = Callable[[Setting, int], Work]  # the work of so many images


def fastest(make: Make, settings: list[Setting], count: int, device: torch.device, repeats: int) -> Setting:
    """The setting that takes the least time for `count` images."""
    works = [make(setting, count) for setting in settings]
    for work in works:
        work()
    times = [[seconds_of(work, device) for work in works] for _ in range(repeats)]
    best = [min(column) for column in zip(*times)]
    return settings[best.index(min(best))]


def all_settings(device: torch.device) -> list[Setting]:
    half = torch.bfloat16 if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return [Setting(dtype, layout) for dtype in (None, half) for layout in (torch.contiguous_format, torch.channels_last)]


def random_batch(case: Case, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(count, 3, case.size, case.size, device=device)
    return images, torch.randint(case.classes, (count,), device=device)


def build(case: Case, device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    model = common.build_model(case.model, case.classes, case.dataset).to(device, memory_format=layout)
    if "--compile" in case.flags:
        model.compile()
    return model


def training_step(case: Case, device: torch.device) -> Make:
    """Forward pass, backward pass and optimiser step."""

    def make(setting: Setting, count: int) -> Work:
        model = build(case, device, setting.layout).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
        images, labels = random_batch(case, count, device)
        images = images.contiguous(memory_format=setting.layout)
        scaler = torch.amp.GradScaler(device.type, enabled=setting.dtype == torch.float16)

        def work() -> None:
            with setting.autocast(device):
                loss = F.cross_entropy(model(images).float(), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        return work

    return make


def gradient_of_images(case: Case, device: torch.device) -> Make:
    """Forward and backward pass in eval mode, of which the images alone get a gradient."""

    def make(setting: Setting, count: int) -> Work:
        model = build(case, device, setting.layout).eval()
        images, labels = random_batch(case, count, device)
        images = images.contiguous(memory_format=setting.layout).requires_grad_()
        machine = common.Machine(device)

        def work() -> None:
            with setting.autocast(device), common.affine_batch_norm(model, machine) if setting.affine else contextlib.nullcontext():
                loss = F.cross_entropy(model(images).float(), labels)
            torch.autograd.grad(loss, images)

        return work

    return make


def forward_pass(case: Case, device: torch.device) -> Make:
    def make(setting: Setting, count: int) -> Work:
        model = build(case, device, setting.layout).eval().requires_grad_(False)
        images = random_batch(case, count, device)[0].contiguous(memory_format=setting.layout)

        @torch.no_grad()
        def work() -> None:
            for part in images.split(min(setting.part, count)):
                with setting.autocast(device):
                    model(part)

        return work

    return make


def policy_pass(case: Case, device: torch.device) -> Make:
    """Forward and backward pass of GrETTA's policy."""
    import gretta

    def make(setting: Setting, count: int) -> Work:
        policy = gretta.Policy("resnet18", 4, False, "zero").to(device, memory_format=setting.layout).train()
        if "--compile" in case.flags:
            policy.compile()
        images = random_batch(case, count, device)[0].contiguous(memory_format=setting.layout)
        gradient = torch.randn(count, 4, device=device)

        def work() -> None:
            with setting.autocast(device):
                levels = policy(images)
            policy.zero_grad()
            (gradient * levels).sum().backward()

        return work

    return make


def limit_of(case: Case, device: torch.device, quick: bool) -> tuple[list[Setting], Work]:
    """The least work that the case's step can be done with: its parts' settings, tried on some of the images, and one call of all."""
    settings = all_settings(device)
    tried, repeats = (16, 2) if quick and case.dataset != "digits" else (64, 3)  # slim models: few images would not tell settings apart
    if case.script == "gretta":
        parts = [(forward_pass(case, device), 2 * case.factor * case.batch, settings), (policy_pass(case, device), case.batch, settings)]
    elif case.script == "advaa":
        parts = [(training_step(case, device), case.factor * case.batch, settings)]
    else:
        affine = [setting._replace(affine=True) for setting in settings if device.type == "cpu"]
        parts = [(gradient_of_images(case, device), case.batch, settings + affine), (training_step(case, device), case.batch, settings)]
    chosen = [fastest(make, choice, min(count, tried), device, repeats) for make, count, choice in parts]
    if case.script == "gretta":
        make, count, _ = parts[0]
        sizes = (16, 64) if quick else (8, 16, 32, 64, 128)
        if device.type == "cuda":
            sizes = (4096, 16384)
        chosen[0] = fastest(make, [chosen[0]] + [chosen[0]._replace(part=size) for size in sizes if size < count], count, device, repeats)
    works = [make(setting, count) for setting, (make, count, _) in zip(chosen, parts)]
    return chosen, lambda: [work() for work in works]


# ---------------------------------------------------------------------------------------------------------------------
# The same step as the published implementations do it
# ---------------------------------------------------------------------------------------------------------------------


def their_gretta(case: Case, device: torch.device) -> Work:
    """Two forward passes in float32, of the P·B images with all perturbations added and with all taken away; every transform is a warp of its own."""
    import gretta

    model = build(case, device).eval()
    policy = gretta.Policy("resnet18", 4, False, "zero").to(device).train()
    images, labels = random_batch(case, case.batch, device)

    def loss(levels: torch.Tensor) -> torch.Tensor:
        batch = images.repeat(case.factor, 1, 1, 1)
        for number in range(levels.shape[1]):
            alone = torch.full_like(levels, 0.5)
            alone[:, number] = levels[:, number]
            batch = gretta.transform_images(batch, alone, "geometry")
        return F.cross_entropy(model(batch), labels.repeat(case.factor))

    def work() -> None:
        levels = policy(images)
        with torch.no_grad():
            noise = 0.05 * torch.randn(case.factor * len(images), levels.shape[1], device=device)
            repeated = levels.repeat(case.factor, 1)
            gradient = ((loss(repeated + noise) - loss(repeated - noise)) * noise).view(case.factor, *levels.shape).mean(0)
        (gradient * levels).sum().backward()

    return work


def their_advaa(case: Case, device: torch.device) -> Work:
    """Every view of every image through Pillow, one after the other (one worker), pad-crop, flip and Cutout; then the training step in float32."""
    import numpy as np
    from PIL import Image
    from test_advaa_ops import pil_op, value_of

    import advaa

    pictures = [Image.fromarray(array) for array in np.random.default_rng(0).integers(0, 256, (case.batch, case.size, case.size, 3), np.uint8)]
    draws = np.random.default_rng(0)
    names = [name for name in advaa.OPS if name != "SamplePairing"]  # the published code has fifteen operations
    train = training_step(case, device)(Setting(None, torch.contiguous_format), case.factor * case.batch)

    def view(picture: Image.Image) -> torch.Tensor:
        for name in draws.choice(names, 2):
            value = value_of(name, int(draws.integers(10)), int(draws.choice((-1, 1))))
            picture = pil_op(picture, name, value, None, tuple(draws.random(2)))
        array = np.pad(np.asarray(picture), ((4, 4), (4, 4), (0, 0)))
        x, y = draws.integers(9, size=2)
        array = array[y : y + case.size, x : x + case.size][:, :: draws.choice((-1, 1))].copy()
        x, y = draws.integers(case.size, size=2)
        array[max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = 128
        return torch.from_numpy(array).permute(2, 0, 1).float() / 255

    def work() -> None:
        torch.stack([view(picture) for _ in range(case.factor) for picture in pictures]).to(device)
        train()

    return work


def their_ant(case: Case, device: torch.device) -> Work:
    """The same two passes in float32, two earlier generators read from disk, every part of the batch under its own projection."""
    import game_of_noise

    model = build(case, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    noise = game_of_noise.NoiseGenerator("1x1").to(device)
    ascent = torch.optim.Adam(noise.parameters(), lr=1e-4, maximize=True)
    images, labels = random_batch(case, case.batch, device)
    folder = Path(tempfile.mkdtemp())
    for number in range(2):
        torch.save(noise.state_dict(), folder / f"{number}.pt")
    counts = game_of_noise.share_counts(case.batch, 0.5, 0.2, True)

    def work() -> None:
        model.eval()
        loss = F.cross_entropy(model(game_of_noise.project(images, noise(torch.randn_like(images)), 12.0)), labels)
        ascent.zero_grad()
        loss.backward()
        ascent.step()
        model.train()
        clean, *parts = images.split(counts)
        with torch.no_grad():
            noisy = []
            for number, part in enumerate(parts):
                player = noise
                if number:
                    player = game_of_noise.NoiseGenerator("1x1").to(device)
                    player.load_state_dict(torch.load(folder / f"{number - 1}.pt", map_location=device, weights_only=True))
                noisy.append(game_of_noise.project(part, player(torch.randn_like(part)), 12.0))
        optimizer.zero_grad()
        F.cross_entropy(model(torch.cat([clean, *noisy])), labels).backward()
        optimizer.step()

    return work


THEIRS = {"gretta": their_gretta, "advaa": their_advaa, "game_of_noise": their_ant}

# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------

OPTIMIZERS = {"gretta": torch.optim.Adam, "advaa": torch.optim.SGD, "game_of_noise": torch.optim.SGD}
SCRIPTS = ("gretta", "advaa", "game_of_noise")


def fake(case: Case, steps: int) -> str:
    return f"--dataset fake --fake-shape {steps * case.batch},{case.classes},{case.size},{case.size} --model {case.model} --batch-size {case.batch}"


def script_flags(case: Case, steps: int) -> str:
    data = f"--dataset digits --model {case.model}" if case.dataset == "digits" else fake(case, steps)
    own = {"gretta": f"--num-samples {case.factor}", "advaa": f"--M {case.factor}", "game_of_noise": "--fresh-iterations 1"}[case.script]
    return f"{data} {own} --epochs 1000 --log-every 10 {case.flags}"


def cpu_cases(quick: bool = False) -> dict[str, Case]:
    cases = {}
    few, several = (4, 16) if quick else (16, 64)
    for model in ("wideresnet", "resnext"):
        cases[f"gretta vanilla, {model}"] = Case("gretta", "", model, 100, 32, "cifar100", few, 12, theirs=model == "wideresnet")
        cases[f"advaa M=8, {model}"] = Case("advaa", "", model, 10, 32, "cifar10", few, 8, theirs=model == "wideresnet")
        cases[f"ANT, {model}"] = Case("game_of_noise", "", model, 10, 32, "cifar10", several, theirs=model == "wideresnet")
    for model in ("resnext", "wideresnet"):
        cases[f"gretta vanilla, digits {model}"] = Case("gretta", "--batch-size 24", model, 10, 32, "digits", 24, 12, quick=model == "resnext")
        cases[f"advaa M=8, digits {model}"] = Case("advaa", "--batch-size 50", model, 10, 32, "digits", 50, 8, quick=model == "resnext")
        cases[f"ANT, digits {model}"] = Case("game_of_noise", "--batch-size 50", model, 10, 32, "digits", 50, quick=model == "resnext")
    for policy in ("none", "trivial"):
        cases[f"training, --policy {policy}"] = Case("advaa", f"--policy {policy}", "wideresnet", 10, 32, "cifar10", 128, 1)
    for M in (1, 2, 4, 16):
        cases[f"growth, advaa M={M}"] = Case("advaa", "--reward moving" if M == 1 else "", "wideresnet", 10, 32, "cifar10", 16, M, quick=False)
    for P in (3, 6, 24):
        cases[f"growth, gretta P={P}"] = Case("gretta", "", "wideresnet", 100, 32, "cifar100", 16, P, quick=False)
    for batch in (8, 32):
        cases[f"growth, gretta batch={batch}"] = Case("gretta", "", "wideresnet", 100, 32, "cifar100", batch, 12, quick=False)
    for batch in (16, 32, 128):
        cases[f"growth, ANT batch={batch}"] = Case("game_of_noise", "", "wideresnet", 10, 32, "cifar10", batch, quick=False)
    for size in (48, 64):
        cases[f"growth, advaa size={size}"] = Case("advaa", "", "wideresnet", 10, size, "cifar10", 16, 4, quick=False)
        cases[f"growth, ANT size={size}"] = Case("game_of_noise", "", "wideresnet", 10, size, "cifar10", 32, quick=False)
    return cases


def cuda_cases() -> dict[str, Case]:
    cases = {}
    for compiled in ("", " --compile"):
        more = compiled
        cases[f"gretta vanilla, wideresnet{compiled}"] = Case("gretta", more, "wideresnet", 100, 32, "cifar100", 256, 12, theirs=not compiled)
        cases[f"advaa M=8, WRN-28-10{compiled}"] = Case("advaa", more, "wresnet28_10", 10, 32, "cifar10", 128, 8, theirs=not compiled)
        cases[f"ANT, ResNet-50{compiled}"] = Case("game_of_noise", more, "resnet50", 1000, 224, "imagenet", 70, theirs=not compiled)
    for policy in ("none", "trivial"):
        cases[f"training, --policy {policy}"] = Case("advaa", f"--policy {policy}", "wresnet28_10", 10, 32, "cifar10", 128, 1)
    for M in (1, 2, 4, 16):
        cases[f"growth, advaa M={M}"] = Case("advaa", "--reward moving" if M == 1 else "", "wresnet28_10", 10, 32, "cifar10", 128, M, quick=False)
    for P in (3, 6, 24):
        cases[f"growth, gretta P={P}"] = Case("gretta", "", "wideresnet", 100, 32, "cifar100", 256, P, quick=False)
    for batch in (64, 128, 512):
        cases[f"growth, gretta batch={batch}"] = Case("gretta", "", "wideresnet", 100, 32, "cifar100", batch, 12, quick=False)
    for size in (128, 160):
        cases[f"growth, ANT size={size}"] = Case("game_of_noise", "", "resnet50", 1000, size, "imagenet", 70, quick=False)
    return cases


def measure(case: Case, device: torch.device, quick: bool) -> dict:
    """Seconds per step, ours, limit and theirs; throughput, peak memory."""
    if device.type == "cpu":
        steps, rounds, warm_up = (1, 3, 1) if quick else (1, 5, 2)
        if case.dataset == "digits":
            steps, rounds = (2, 3) if quick else (2, 7)
    else:
        steps, rounds, warm_up = (5, 4, 10) if quick else (10, 7, 20)
    chosen, limit = limit_of(case, device, quick)
    for _ in range(2):
        limit()
    timer = Timer(OPTIMIZERS[case.script], limit, device, steps, rounds, warm_up)
    amp = chosen[-1 if case.script == "game_of_noise" else 0].dtype is not None  # ours is run as the largest part of the limit
    run_main(case.script, script_flags(case._replace(flags=case.flags + " --amp" * amp), steps * rounds + warm_up + 1), device, timer)
    ours, least = statistics.median(timer.ours), statistics.median(timer.limits)
    images = case.batch * {"gretta": 2 * case.factor, "advaa": case.factor, "game_of_noise": 1}[case.script]
    figures = {
        "seconds": ours,
        "limit_seconds": least,
        "ratio": least / ours,
        "limit": "; ".join(map(str, chosen)),
        "images_per_second": images / ours,
    }
    figures |= {"peak_memory_mb": timer.memory, "rounds": rounds, "amp": amp}
    if case.theirs:
        del limit, timer
        theirs = THEIRS[case.script](case, device)
        theirs()
        figures["theirs_seconds"] = statistics.median(seconds_of(theirs, device) for _ in range(2 if quick else 3))
    return figures


def run_main(script: str, flags: str, device: torch.device, timer: Timer) -> None:
    """Run the script's main() until the timer has enough; what it prints goes nowhere."""
    module = importlib.import_module(script)
    handle = register_optimizer_step_post_hook(timer)
    argv, sys.argv = sys.argv, [str(ROOT / f"{script}.py"), *flags.split(), "--device", device.type, "--data-root", str(ROOT / "data")]
    try:
        with tempfile.TemporaryDirectory() as directory, io.StringIO() as said:
            sys.argv += ["--run-dir", directory + "/run"]
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    module.main()
                    reason = f"ended after {timer.seen} steps, before enough were timed"
                except Done:
                    reason = ""
                    common.close_bars()
                except SystemExit:  # refused in one line
                    reason = said.getvalue().strip().rpartition("\n")[2]
            if reason:
                raise SystemExit(f"{script} {flags}: {reason}")
    finally:
        handle.remove()
        sys.argv = argv


def test_time(device: torch.device, quick: bool) -> dict:
    """GrETTA at test time beside the classifier alone: seconds for the same images."""
    import gretta

    machine = common.start_machine(device.type, amp=True)
    classifier = common.build_model("resnext", 100, "cifar100").to(device, memory_format=machine.weight_layout).eval()
    policy = gretta.Policy("resnet18", 4, False, "zero").to(device, memory_format=machine.weight_layout)
    data = common.fake_images(200 if device.type == "cpu" else 20_000, 100, 32, 32, 0)
    data = tuple(tensor.to(device) for tensor in data)

    def predict(name: str) -> Work:
        return lambda: gretta.evaluate_predictors(classifier, policy, data, "geometry", 1, machine, (name,))

    ours, limit = predict("gretta"), predict("none")
    ours(), limit()
    reset_peak_memory(device)
    rounds = [(seconds_of(ours, device), seconds_of(limit, device)) for _ in range(3 if quick else 9)]
    seconds, least = (statistics.median(column) for column in zip(*rounds))
    figures = {"seconds": seconds, "limit_seconds": least, "ratio": least / seconds, "limit": "the classifier alone"}
    return figures | {"images_per_second": len(data[0]) / seconds, "peak_memory_mb": peak_memory_mb(device), "rounds": len(rounds)}


def start_up(device: torch.device, quick: bool) -> dict[str, dict]:
    """Seconds of --help beside those of `import torch`, and from the command to the end of the first training step."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    figures = {}

    def seconds(*command: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, **quiet)
        return time.perf_counter() - begun

    for script in SCRIPTS:
        rounds = [(seconds(f"{script}.py", "--help"), seconds("-c", "import torch")) for _ in range(2 if quick else 5)]
        ours, least = (statistics.median(column) for column in zip(*rounds))
        figures[f"start, {script} --help"] = {"seconds": ours, "limit_seconds": least, "ratio": least / ours, "limit": "import torch"}
    for script in SCRIPTS:
        with tempfile.TemporaryDirectory() as directory:
            log = Path(directory) / "run" / "log.jsonl"
            command = [sys.executable, f"{script}.py", "--log-every", "1", "--device", device.type, "--run-dir", str(log.parent)]
            begun = time.perf_counter()
            process = subprocess.Popen(command, **quiet)
            while process.poll() is None and not (log.is_file() and log.stat().st_size):
                time.sleep(0.01)
            ours = time.perf_counter() - begun
            process.kill()
            process.wait()
        figures[f"start, {script} first step"] = {"seconds": ours, "limit_seconds": 8.0, "ratio": 8 / ours, "limit": "8 s"}
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Memory: counted, so that it can be told for a GPU that is not at hand
# ---------------------------------------------------------------------------------------------------------------------

GPUS = (16, 24, 80)  # GB


def bytes_for_backward(case: Case, count: int) -> int:
    """What autograd keeps of a forward pass of `count` images in bfloat16 autocast, weights apart."""
    model = build(case, torch.device("cpu"), torch.channels_last).train()
    images, labels = random_batch(case, count, torch.device("cpu"))
    weights, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)).float(), labels)
    assert loss.isfinite()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


def bytes_of_forward(case: Case, count: int) -> int:
    """The most that a layer's input and output take together in bfloat16 autocast, without gradient, and the images."""
    model, most = build(case, torch.device("cpu"), torch.channels_last).eval(), [0]
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, given, out: most.append(given[0].nbytes + out.nbytes))
    images = random_batch(case, count, torch.device("cpu"))[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images.contiguous(memory_format=torch.channels_last))
    return max(most) + images.nbytes


def print_memory() -> None:
    """How many images fit into a GPU: what a pass keeps of each image is counted on the CPU; 12 bytes a weight (weight, gradient, momentum) and
    two fifths of the memory are left for the rest."""
    print("images of one forward and backward pass, and of one forward pass without gradient (--amp), that fit: counted, not tried\n")
    heads = "".join(f"{f'{size} GB':>9s}" for size in GPUS)
    print(f"{'':28s}{'MB/image':>10s}{heads}{'forward: MB':>14s}{heads}")
    cases = (("wideresnet", "cifar10", 32), ("resnext", "cifar10", 32), ("wresnet28_10", "cifar10", 32), ("shake26_2x96d", "cifar10", 32))
    for model, dataset, size in (*cases, ("resnet50", "imagenet", 224)):
        case = Case("advaa", "", model, 10, size, dataset, 1)
        weights = 12 * sum(parameter.numel() for parameter in build(case, torch.device("cpu")).parameters())
        cells = []
        for bytes_of, width in ((bytes_for_backward, 10), (bytes_of_forward, 14)):
            each = (bytes_of(case, 4) - bytes_of(case, 2)) / 2
            cells.append(f"{each / 1e6:{width}.2f}" + "".join(f"{int((0.6 * size * 2**30 - weights) / each):9,d}" for size in GPUS))
        print(f"{f'{model}, {size} px':28s}{''.join(cells)}", flush=True)


def print_row(name: str, figures: dict) -> None:
    cells = [f"{figures['seconds']:10.4f}", f"{figures['limit_seconds']:10.4f}", f"{figures['ratio']:7.2f}"]
    for key, width, form in (("images_per_second", 11, ".0f"), ("peak_memory_mb", 9, ".0f"), ("theirs_seconds", 10, ".3f")):
        cells.append(f"{figures[key]:{width}{form}}" if key in figures else " " * width)
    print(f"{name:36s}{''.join(cells)}  {figures['limit']}", flush=True)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        found = next(line for line in open("/proc/cpuinfo") if line.startswith("model name"))
        return f"{found.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON, {case: {seconds, limit_seconds, ratio, …}}")
    parser.add_argument("--only", metavar="WORD", default="", help="cases whose names hold this word")
    parser.add_argument("--memory", action="store_true", help="print how many images fit into GPUs of 16, 24 and 80 GB, and leave")
    args = parser.parse_args()
    if args.memory:
        return print_memory()
    device = common.start_machine(args.device).device
    print(f"{device_name(device)}, torch {torch.__version__}\n")
    print(f"{'':36s}{'s/step':>10s}{'limit':>10s}{'ratio':>7s}{'images/s':>11s}{'MB':>9s}{'theirs':>10s}  limit's setting")
    cases = {name: case for name, case in cases_of(device, args.quick).items() if case.quick or not args.quick}
    works = {name: (lambda case=case: {"": measure(case, device, args.quick)}) for name, case in cases.items()}
    works |= {"test time, gretta resnext": lambda: {"": test_time(device, args.quick)}, "start": lambda: start_up(device, args.quick)}
    machine, table = {"device": device_name(device), "torch": torch.__version__}, {}
    for name, work in sorted(works.items(), key=lambda item: item[0].startswith("growth")):  # those last
        if args.only not in name:
            continue
        for inner, figures in work().items():
            table[inner or name] = figures | machine
            print_row(inner or name, figures)
        if args.json:
            Path(args.json).write_text(json.dumps(table, indent=1) + "\n")
        gc.collect()


def cases_of(device: torch.device, quick: bool) -> dict[str, Case]:
    return cuda_cases() if device.type == "cuda" else cpu_cases(quick)


if __name__ == "__main__":
    main()
