"""Run a script again and again, killing it with SIGKILL at random moments: lives.py SCRIPT SEED KILLS FLAGS…

Every life is a fork of one process that has imported everything, so that none is spent on importing. Writing is
slowed down, and every fourth time the moment is that of writing a checkpoint. The run's directory is that of
--run-dir with -0 behind it; where it finished before it was killed often enough, -1 is next, and so on. The last
line printed is JSON: the directories, how often each was killed, how many kills left a half-written checkpoint.
"""

import importlib
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402


class SlowFile(io.FileIO):
    def write(self, content: bytes) -> int:
        half = len(content) // 2
        super().write(content[:half])
        time.sleep(0.15)
        return half + super().write(content[half:])


def slow_open(file: str | Path, mode: str = "r", **more: object) -> io.IOBase:
    return SlowFile(file, "w") if mode == "wb" else open(file, mode, **more)


def live(script: str, flags: list[str]) -> None:
    """One life, in a forked process."""
    log = os.open("/dev/null", os.O_WRONLY)
    os.dup2(log, 1)
    sys.argv = [f"{script}.py", *flags]
    common.open = slow_open
    common.run_script(importlib.import_module(script).main)


def main() -> None:
    script, seed, kills, *flags = sys.argv[1:]
    moments, place, left = random.Random(int(seed)), flags.index("--run-dir") + 1, int(kills)
    base, killed, torn = flags[place], [], 0
    importlib.import_module(script)
    while left or killed[-1][1] is None:
        if not killed or killed[-1][1] is not None:
            killed.append([f"{base}-{len(killed)}", None, 0])
        flags[place] = killed[-1][0]
        child = os.fork()
        if child == 0:
            try:
                live(script, flags)
            finally:
                sys.stderr.flush()
                os._exit(3 if sys.exc_info()[0] else 0)
        in_writing = left and left % 4 == 0  # every fourth time the moment is that of writing a checkpoint
        deadline = time.monotonic() + (120 if in_writing else moments.uniform(0.3, 4) if left else 1e9)
        ended, status = 0, 0
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.003)
            if in_writing and any(Path(flags[place]).glob(".checkpoint.pt.*")):
                break
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            left -= 1
            killed[-1][2] += 1
            torn += any(Path(killed[-1][0]).glob(".checkpoint.pt.*"))
        elif status == 0:
            killed[-1][1] = True
        else:
            sys.exit(f"{script} ended with {os.waitstatus_to_exitcode(status)}")
    print(json.dumps({"runs": [[directory, count] for directory, _, count in killed], "torn": torn}))


if __name__ == "__main__":
    main()
