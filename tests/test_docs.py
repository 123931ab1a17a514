"""Every command that the README and the pages print is run as printed, with --dry-run, on stand-ins for what
they name: RUN_DIR, FOLDER, IMAGENET, mine.onnx, … Blocks that begin with `git checkout` are of other commits."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import formats
import pytest
import torch
from conftest import ROOT, run_here

import common

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights" / "README.md"]
LAUNCHERS = ("python", "torchrun", "srun")
OWN = {"mine": "gretta"}  # what the pages copy
VALUED = {"--seed", "--run-dir"}  # flags without which two commands are the same


def shell_blocks(page: Path) -> list[str]:
    """Indented blocks, and code spans, that hold a command."""
    text = re.sub(r"```python.*?```", "", page.read_text(), flags=re.S)
    blocks = re.findall(r"(?:^(?: {4,}).*\n)+", text, flags=re.M) + re.findall(r"`([^`\n]+)`", text)
    starts = r"\s*(for |export |cp |python |torchrun |srun |[a-z]+=\S+ python )"
    return [block for block in blocks if re.search(starts, block)]


def commands(block: str) -> list[list[str]]:
    """What bash would launch, its loops, variables and line ends worked out by bash itself, which finds no
    other program."""
    stubs = [f"{name}() {{ printf '%q ' \"$@\" >&3; echo >&3; }}" for name in LAUNCHERS]
    stubs += ["command_not_found_handle() { :; }", "PATH=/nowhere; set -f; exec 3>&1 >/dev/null"]
    script = "\n".join([*stubs, block])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert "syntax error" not in done.stderr, f"{block}\n{done.stderr}"
    return [shlex.split(line) for line in done.stdout.splitlines() if line.strip()]


def printed(page: Path) -> list[list[str]]:
    """The commands of our scripts, ["gretta", flag, …], once each, whatever the seed and where it is written."""
    found = {}
    for block in shell_blocks(page):
        for words in commands(block) if not block.strip().startswith("git checkout") else ():
            names = [i for i, word in enumerate(words) if re.fullmatch(r"(?!tests/)\w+\.py", word)]
            if not names or "…" in "".join(words):  # left to the reader
                continue
            command = [words[names[0]].removesuffix(".py"), *words[names[0] + 1 :]]
            same = [word for before, word in zip(["", *command], command) if not {before, word} & VALUED]
            found.setdefault(tuple(same), command)
    return [*found.values()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_the_pages_print_can_be_read(page):
    names = {command[0] for command in printed(page)}
    assert names <= {"gretta", "advaa", "game_of_noise", "common", "mine"}
    assert names


@pytest.fixture
def place(tmp_path_factory, monkeypatch) -> Path:
    """A folder that holds all that the commands name; models are slim, as on digits."""
    for name, (constructor, _, slim) in common.MODELS.items():
        monkeypatch.setitem(common.MODELS, name, (constructor, slim, slim))
    root = tmp_path_factory.mktemp("docs")
    (root / "data").mkdir()
    shutil.copy(ROOT / "data" / "digits.npz", root / "data")
    for dataset in ("cifar10", "cifar100"):
        formats.make_cifar(root / "data", dataset, 100, 20, 20)
    formats.make_mnist(root / "data", 400, 200)
    shutil.copytree(root / "data" / "MNIST", root / "data" / "FashionMNIST")
    shutil.copytree(root / "data" / "MNIST" / "raw", root / "data" / "fewer")
    formats.make_imagenet(root / "data", train=20, stylised=2)
    formats.make_chexpert(root / "data")
    for kind in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            formats.make_pictures(root / "mine" / kind / name, 40, number)
    formats.make_pictures(root / "FOLDER", 3, 5)
    models = {"mine.pt": ("resnext", 100, "cifar100"), "FILE": ("densenet121", 5, "chexpert")}
    for file, model in models.items():
        torch.save(common.build_model(*model).state_dict(), root / file)
    (root / "mine.py").write_text(
        "import numpy as np\nimport common\n"
        "def net(num_classes):\n    return common.build_model('resnext', num_classes, 'cifar100')\n"
        "def answer(images):\n    return np.eye(10, dtype=np.float32)[images.reshape(len(images), -1).argmax(1) % 10]\n"
        "function = answer\n"
    )
    digits = common.build_model("resnext", 10, "digits").eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    with common.warnings_off():
        example = (torch.zeros(2, 3, 32, 32),)
        torch.onnx.export(digits, example, str(root / "mine.onnx"), dynamo=True, dynamic_shapes=shapes)
    (root / "conf.json").write_text('{"model": "resnext", "est": "vanilla", "cifar": "data", "cifarc": null}')
    return root


def stand_in(root: Path, script: str) -> dict[str, str]:
    """What the names in capitals stand for; RUN_DIR is a new run of the script."""
    run = root / f"finished-{script}"
    if not run.is_dir():
        run_here("gretta" if script == "common" else script, "--dry-run", "--run-dir", run, cwd=root)
    names = {"RUN_DIR": run, "IMAGENET_C": "data/imagenet-c", "STYLIZED_IMAGENET": "data/sin"}
    names |= {"IMAGENET": "data/imagenet", "DIR": root / "data", "DATA": root / "data"}
    return {name: str(value) for name, value in names.items()}


@pytest.mark.slow
def test_what_the_pages_print_runs(place, monkeypatch):
    """In the order of the pages, so that one command finds what another wrote."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # of made-up files
    for script, *flags in (command for page in PAGES for command in printed(page)):
        script, seeds = OWN.get(script, script), [b for a, b in zip(flags, flags[1:]) if a == "--seed"]
        if {"--help", "--download"} & {*flags} or seeds not in ([], ["0"]):
            continue
        names = stand_in(place, script)
        flags = [re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], flag) for flag in flags]  # noqa: B023
        if script == "common" and "--train-weights" not in flags:
            by = [word for before, word in zip(["", *flags], flags) if "--by" in (before, word)]
            assert "mean ± std" in run_here("common", *by, names["RUN_DIR"], cwd=place), flags
            continue
        new = "--run-dir" in flags and not {"--resume", "--evaluate", "-e", "--predict"} & {*flags}
        if not (new and (place / flags[flags.index("--run-dir") + 1]).exists()):
            run_here(script, *flags, "--dry-run", cwd=place)
