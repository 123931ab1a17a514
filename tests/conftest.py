import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two tests run at a time (.pytest.ini)

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


def run_script(*command: object, expect: int = 0, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `python COMMAND…` in the repository (or in `cwd`) as a user does, and return the finished process."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=900, env=os.environ | environment)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


TIMES = ("wall_seconds", "peak_memory_mb")


def results_of(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def without_times(results: dict) -> dict:
    return {key: value for key, value in results.items() if key not in TIMES}


def state_of(directory: Path) -> dict:
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def assert_equal_weights(first: dict, second: dict) -> None:
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def contents(directory: Path) -> dict:
    """Everything below a directory: {path: bytes, or None for a directory}."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def check(line: str, script: str, names: tuple) -> None:
    assert line.count("\n") == 1 and line.endswith("\n") and f"{script}: error: " in line, line
    assert [name for name in names if str(name) not in line] == [], line


def refused(directory: Path, *command: object, names: tuple = (), **environment: str) -> str:
    """Run the command, which must be refused in one line that holds all of `names` and must leave `directory` as it is; returns the line."""
    before = contents(directory)
    line = run_script(*command, expect=2, **environment).stderr
    check(line, command[0], names)
    assert contents(directory) == before
    return line


@pytest.fixture
def refuses_here(tmp_path, monkeypatch, capfd):
    """As `refused` without a new process: refuses(main, script, *flags, names=…) looks at tmp_path."""

    def refuses(main: Callable, *command: object, names: tuple = ()) -> str:
        before = contents(tmp_path)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as stopped:
            common.run_script(main)
        assert stopped.value.code == 2
        line = capfd.readouterr().err
        check(line, command[0], names)
        assert contents(tmp_path) == before
        return line

    return refuses


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
