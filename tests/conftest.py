import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two tests run at a time (.pytest.ini)

import contextlib
import importlib
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


def run_script(*command: object, expect: int = 0, cwd: Path = ROOT, **environment: str):
    """Run `python COMMAND…` in the repository (or in `cwd`) as a user does; returns the finished process."""
    how = {"capture_output": True, "text": True, "timeout": 900, "env": os.environ | environment}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, **how)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_here(script: str, *flags: object, cwd: Path = ROOT) -> str:
    """`python SCRIPT.py FLAGS…` in this process, which spares the imports: returns what it printed, raises
    what its main() raises."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *map(str, flags)])
        try:
            with contextlib.redirect_stdout(printed):
                importlib.import_module(script).main()
        finally:
            print(printed.getvalue(), end="")
    return printed.getvalue()


TIMES = ("wall_seconds", "peak_memory_mb")


def results_of(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def without_times(results: dict) -> dict:
    return {key: value for key, value in results.items() if key not in TIMES}


def state_of(directory: Path) -> dict:
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def assert_equal_weights(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def contents(directory: Path) -> dict:
    """Everything below a directory: {path: bytes, or None for a directory}."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def check(line: str, script: str, names: tuple) -> None:
    assert line.count("\n") == 1 and line.endswith("\n") and f"{script}: error: " in line, line
    assert [name for name in names if str(name) not in line] == [], line


def refused(directory: Path, script: str, *flags: object, names: tuple = ()) -> str:
    """Run the script, here, which must be refused in one line that holds all of `names` and must leave
    `directory` as it is; returns the line."""
    before, main = contents(directory), importlib.import_module(script.removesuffix(".py")).main
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(io.StringIO()) as said,
        pytest.raises(SystemExit) as stopped,
    ):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        common.run_script(main)
    assert stopped.value.code == 2
    check(said.getvalue(), script, names)
    assert contents(directory) == before
    return said.getvalue()


CONTENT = bytes(range(256)) * 20_000  # 5 MB


class Handler(BaseHTTPRequestHandler):
    """CONTENT as /file; /broken: the first answer ends after 2 MB; /whole: ranges are ignored; asked: kept."""

    asked: list = []
    archives: dict = {}  # further paths and their bytes
    kinds: dict = {}  # the Content-Type of a path

    def do_GET(self) -> None:
        wanted, content = self.headers.get("Range"), Handler.archives.get(self.path, CONTENT)
        Handler.asked.append((self.path, wanted))
        if self.path not in ("/file", "/broken", "/whole", *Handler.archives):
            return self.send_error(404)
        ranged = wanted and not self.path.startswith("/whole")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if ranged else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if self.path in Handler.kinds:
            self.send_header("Content-Type", Handler.kinds[self.path])
        self.end_headers()
        broken = self.path.startswith("/broken") and not start
        self.wfile.write(content[start : 2_000_000 if broken else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    """A server on this machine (Handler)."""
    Handler.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serve = {"target": server.serve_forever, "args": (0.05,)}  # looks that often (s) whether it should stop
    threading.Thread(**serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
