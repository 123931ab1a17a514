"""How far each script's step is from the limit of its machine.

    python tests/benchmark.py                       # this machine's GPU, or its CPU where there is none
    python tests/benchmark.py --quick --json FILE   # fewer cases and repeats, within 5 minutes
    python tests/benchmark.py --only advaa          # the cases whose names hold this word

A case runs a script's own main() on random images. After every few optimiser steps the script is held, and
the work that its step can't do without, the limit, is timed in the same process; ours and limit alternate, so
both see the same machine. Seconds are medians over these rounds, warm-up left out; ratio = limit / ours.

    GrETTA      the classifier's forward pass of 2·P·B images, the policy's forward and backward pass of B
    AdvAA       forward pass, backward pass and optimiser step of M·B images that are on the device already
    ANT         forward and backward pass of the classifier for the generator, its own training step
    test time   the classifier alone
    training    advaa.py --policy none and trivial against a bare loop: shuffle, forward, backward, step
    views       AdvAA's, of 128 images of CIFAR's size (CPU: 16), 8 each, against a tenth of their training step
    start       --help against `import torch`; the first training step after the command against 8 s

The limit's precision (float32, or bfloat16 autocast), layout (channels_last or not) and, for the classifier's
forward pass, number of images at a time are the fastest of those tried here. Peak memory is that of the process
so far (CPU), or of what torch allocated in a case (GPU).
"""

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
import unittest.mock
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


class Done(BaseException):
    """Enough steps were timed."""


class Timer:
    """Alternates rounds of a script's steps with rounds of the limit; a hook after every optimiser step of
    one class."""

    def __init__(
        self, optimizer: type, limit: Work, device: torch.device, steps: int, rounds: int, warm_up: int
    ):
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


def peak_memory_mb(device: torch.device) -> float:
    return common.peak_memory_mb(common.Machine(device))


# ---------- Limits ----------


class Setting(NamedTuple):
    """How the work of a limit is done."""

    dtype: torch.dtype | None  # of autocast
    layout: torch.memory_format
    part: int = 10**9  # images at a time, of a forward pass
    affine: bool = False  # batch norm in eval mode as x·scale + shift, which the script does on a CPU

    def __str__(self) -> str:
        words = [str(self.dtype or torch.float32), str(self.layout)] + ["affine batch norm"] * self.affine
        words = [word.removeprefix("torch.").removesuffix("_format") for word in words]
        return ", ".join(words + [f"by {self.part}"] * (self.part < 10**9))

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
    bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtypes = (None, torch.bfloat16 if bfloat16 else torch.float16)
    layouts = (torch.contiguous_format, torch.channels_last)
    return [Setting(dtype, layout) for dtype in dtypes for layout in layouts]


def random_batch(case: Case, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(count, 3, case.size, case.size, device=device)
    return images, torch.randint(case.classes, (count,), device=device)


def build(case: Case, device: torch.device, layout: torch.memory_format) -> nn.Module:
    model = common.build_model(case.model, case.classes, case.dataset).to(device, memory_format=layout)
    if "--compile" in case.flags:
        model.compile()
    return model


def training_step(case: Case, device: torch.device) -> Make:
    """Forward pass, backward pass and optimiser step."""

    def make(setting: Setting, count: int) -> Work:
        model = build(case, device, setting.layout).train()
        settings = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
        optimizer = torch.optim.SGD(model.parameters(), **settings)
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
    import game_of_noise

    def make(setting: Setting, count: int) -> Work:
        model = build(case, device, setting.layout).eval()
        images, labels = random_batch(case, count, device)
        images = images.contiguous(memory_format=setting.layout).requires_grad_()
        machine = common.Machine(device)

        def work() -> None:
            with setting.autocast(device), contextlib.ExitStack() as stack:
                if setting.affine:
                    stack.enter_context(game_of_noise.affine_batch_norm(model, machine))
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
    """The least work that the case's step can be done with: its parts' settings, tried on some of the images,
    and one call of all."""
    settings = all_settings(device)
    # Of slim models few images would not tell settings apart
    tried, repeats = (16, 2) if quick and case.dataset != "digits" else (64, 3)
    if case.script == "gretta":
        queries = 2 * case.factor * case.batch
        parts = [(forward_pass(case, device), queries, settings)]
        parts.append((policy_pass(case, device), case.batch, settings))
    elif case.script == "advaa":
        parts = [(training_step(case, device), case.factor * case.batch, settings)]
    else:
        affine = [setting._replace(affine=True) for setting in settings if device.type == "cpu"]
        parts = [(gradient_of_images(case, device), case.batch, settings + affine)]
        parts.append((training_step(case, device), case.batch, settings))
    chosen = [fastest(make, choice, min(count, tried), device, repeats) for make, count, choice in parts]
    if case.script == "gretta":
        make, count, _ = parts[0]
        sizes = (16, 64) if quick else (8, 16, 32, 64, 128)
        sizes = (4096, 16384) if device.type == "cuda" else sizes
        tries = [chosen[0]] + [chosen[0]._replace(part=size) for size in sizes if size < count]
        chosen[0] = fastest(make, tries, count, device, repeats)
    works = [make(setting, count) for setting, (make, count, _) in zip(chosen, parts)]
    return chosen, lambda: [work() for work in works]


# ---------- Cases ----------

OPTIMIZERS = {"gretta": torch.optim.Adam, "advaa": torch.optim.SGD, "game_of_noise": torch.optim.SGD}
SCRIPTS = ("gretta", "advaa", "game_of_noise")


def script_flags(case: Case) -> str:
    dataset = "digits" if case.dataset == "digits" else "fake"
    data = f"--dataset {dataset} --model {case.model} --batch-size {case.batch}"
    own = {
        "gretta": f"--num-samples {case.factor}",
        "advaa": f"--M {case.factor}",
        "game_of_noise": "--fresh-iterations 1",
    }
    return f"{data} {own[case.script]} --epochs 1000 {case.flags}"


def cases_of(device: torch.device, quick: bool) -> dict[str, Case]:
    cases, cuda = {}, device.type == "cuda"
    for flags in ("", "--compile") if cuda else ():
        gretta = Case("gretta", flags, "wideresnet", 100, 32, "cifar100", 256, 12)
        cases[f"gretta vanilla, wideresnet {flags}"] = gretta
        advaa = Case("advaa", flags, "wresnet28_10", 10, 32, "cifar10", 128, 8)
        cases[f"advaa M=8, WRN-28-10 {flags}"] = advaa
        cases[f"ANT, ResNet-50 {flags}"] = Case("game_of_noise", flags, "resnet50", 1000, 224, "imagenet", 70)
    few, several = (4, 16) if quick else (16, 64)
    for model in ("wideresnet", "resnext") if not cuda else ():
        cases[f"gretta vanilla, {model}"] = Case("gretta", "", model, 100, 32, "cifar100", few, 12)
        cases[f"advaa M=8, {model}"] = Case("advaa", "", model, 10, 32, "cifar10", few, 8)
        cases[f"ANT, {model}"] = Case("game_of_noise", "", model, 10, 32, "cifar10", several)
    for model in ("resnext", "wideresnet") if not cuda else ():
        digits, first = ("", model, 10, 32, "digits"), model == "resnext"
        cases[f"gretta vanilla, digits {model}"] = Case("gretta", *digits, 24, 12, quick=first)
        cases[f"advaa M=8, digits {model}"] = Case("advaa", *digits, 50, 8, quick=first)
        cases[f"ANT, digits {model}"] = Case("game_of_noise", *digits, 50, quick=first)
    model = "wresnet28_10" if cuda else "wideresnet"
    for policy in ("none", "trivial"):
        training = Case("advaa", f"--policy {policy}", model, 10, 32, "cifar10", 128, 1)
        cases[f"training, --policy {policy}"] = training
    return {name.strip(): case for name, case in cases.items() if case.quick or not quick}


def figures_of(seconds: float, limit_seconds: float, limit: str, **more: object) -> dict:
    figures = {"seconds": seconds, "limit_seconds": limit_seconds, "ratio": limit_seconds / seconds}
    return figures | {"limit": limit} | more


def measure(case: Case, device: torch.device, quick: bool) -> dict:
    """Seconds per step, ours and limit; throughput, peak memory."""
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
    largest = chosen[-1 if case.script == "game_of_noise" else 0]  # part of the limit: ours is run as it
    amp = largest.dtype is not None
    images = (steps * rounds + warm_up + 1) * case.batch
    with unittest.mock.patch.object(common, "FAKE_SHAPE", (images, case.classes, case.size, case.size)):
        run_main(case.script, script_flags(case._replace(flags=case.flags + " --amp" * amp)), device, timer)
    ours, least = statistics.median(timer.ours), statistics.median(timer.limits)
    images = case.batch * {"gretta": 2 * case.factor, "advaa": case.factor, "game_of_noise": 1}[case.script]
    more = {"images_per_second": images / ours, "peak_memory_mb": timer.memory, "rounds": rounds, "amp": amp}
    return figures_of(ours, least, "; ".join(map(str, chosen)), **more)


def run_main(script: str, flags: str, device: torch.device, timer: Timer) -> None:
    """Run the script's main() until the timer has enough; what it prints goes nowhere."""
    module = importlib.import_module(script)
    handle = register_optimizer_step_post_hook(timer)
    argv, sys.argv = sys.argv, [str(ROOT / f"{script}.py"), *flags.split(), "--device", device.type]
    sys.argv += ["--data-root", str(ROOT / "data")]
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
    classifier = common.build_model("resnext", 100, "cifar100").eval()
    classifier.to(device, memory_format=machine.weight_layout)
    policy = gretta.Policy("resnet18", 4, False, "zero").to(device, memory_format=machine.weight_layout)
    data = common.Images(*common.fake_images(200 if device.type == "cpu" else 20_000, 100, 32, 32), machine)

    def predict(name: str) -> Work:
        return lambda: gretta.evaluate_predictors(classifier, policy, data, "geometry", 1, machine, (name,))

    ours, limit = predict("gretta"), predict("none")
    ours(), limit()
    reset_peak_memory(device)
    rounds = [(seconds_of(ours, device), seconds_of(limit, device)) for _ in range(3 if quick else 9)]
    seconds, least = (statistics.median(column) for column in zip(*rounds))
    more = {"images_per_second": len(data) / seconds, "peak_memory_mb": peak_memory_mb(device)}
    return figures_of(seconds, least, "the classifier alone", **more, rounds=len(rounds))


def views(device: torch.device, quick: bool) -> dict:
    """AdvAA's views from uniform policies, with pad-crop, flip and Cutout."""
    import advaa

    model, batch = ("wresnet28_10", 128) if device.type == "cuda" else ("wideresnet", 16)
    images = common.fake_images(batch, 10, 32, 32)[0].to(device)
    policies = (torch.rand(8, 5, 2, 2) * torch.tensor([len(advaa.OPS), advaa.MAGNITUDES])).long()
    menu, rows = advaa.menu_of("random", policies, 8, "cifar10", 32), torch.arange(batch)
    draws = torch.rand(batch, 8, advaa.DRAWS, dtype=torch.float64)
    work = lambda: advaa.augment(images, images, rows, draws, menu, 4, 16)
    chosen, step = limit_of(Case("advaa", "", model, 10, 32, "cifar10", batch, 8), device, quick)
    for warm in (work, step) * 2:
        warm()
    reset_peak_memory(device)
    rounds = [(seconds_of(work, device, 10), seconds_of(step, device) / 10) for _ in range(3)]
    seconds, least = (statistics.median(column) for column in zip(*rounds))
    more = {"images_per_second": batch * 8 / seconds, "peak_memory_mb": peak_memory_mb(device)}
    return figures_of(seconds, least, f"a tenth of a step: {chosen[0]}", **more, rounds=len(rounds))


def start_up(device: torch.device, quick: bool) -> dict[str, dict]:
    """Seconds of --help beside those of `import torch`, and from the command to the end of the first training
    step."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    figures = {}

    def seconds(*command: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, **quiet)
        return time.perf_counter() - begun

    for script in SCRIPTS:
        pair = lambda: (seconds(f"{script}.py", "--help"), seconds("-c", "import torch"))  # noqa: B023
        rounds = [pair() for _ in range(2 if quick else 5)]
        ours, least = (statistics.median(column) for column in zip(*rounds))
        figures[f"start, {script} --help"] = figures_of(ours, least, "import torch")
    for script in SCRIPTS:
        with tempfile.TemporaryDirectory() as directory:
            log = Path(directory) / "run" / "log.jsonl"
            flags = f"--log-every 1 --device {device.type} --run-dir {log.parent}".split()
            begun = time.perf_counter()
            process = subprocess.Popen([sys.executable, f"{script}.py", *flags], **quiet)
            while process.poll() is None and not (log.is_file() and log.stat().st_size):
                time.sleep(0.01)
            ours = time.perf_counter() - begun
            process.kill()
            process.wait()
        figures[f"start, {script} first step"] = figures_of(ours, 8.0, "8 s")
    return figures


def print_row(name: str, figures: dict) -> None:
    cells = [f"{figures['seconds']:10.4f}", f"{figures['limit_seconds']:10.4f}", f"{figures['ratio']:7.2f}"]
    for key, width, form in (("images_per_second", 11, ".0f"), ("peak_memory_mb", 9, ".0f")):
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
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--quick", action="store_true", help="fewer cases and repeats")
    add(
        "--json", metavar="FILE", help="write the figures as JSON, {case: {seconds, limit_seconds, ratio, …}}"
    )
    add("--only", metavar="WORD", default="", help="cases whose names hold this word")
    args = parser.parse_args()
    device = common.start_machine(args.device).device
    print(f"{device_name(device)}, torch {torch.__version__}\n")
    print(f"{'':36s}{'s/step':>10s}{'limit':>10s}{'ratio':>7s}{'images/s':>11s}{'MB':>9s}  limit's setting")
    works = {}
    for name, case in cases_of(device, args.quick).items():
        works[name] = lambda case=case: {"": measure(case, device, args.quick)}
    works["test time, gretta resnext"] = lambda: {"": test_time(device, args.quick)}
    works["views"] = lambda: {"": views(device, args.quick)}
    works["start"] = lambda: start_up(device, args.quick)
    machine, table = {"device": device_name(device), "torch": torch.__version__}, {}
    for name, work in works.items():
        if args.only not in name:
            continue
        for inner, figures in work().items():
            table[inner or name] = figures | machine
            print_row(inner or name, figures)
        if args.json:
            Path(args.json).write_text(json.dumps(table, indent=1) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
