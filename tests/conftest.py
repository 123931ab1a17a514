import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run_script(*command: object, expect: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run `python COMMAND…` in the repository as a user does, and return the finished process."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | environment)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
