"""Runs that are killed, stopped, or meet a damaged file or a full disk: what they leave, and that continuing ends as if nothing had happened."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, results_of, run_here, run_script, state_of, without_times

import advaa
import common
import game_of_noise
import gretta

SCRIPTS = {"gretta": gretta, "advaa": advaa, "game_of_noise": game_of_noise}
# Small runs of some seconds, on validation digits, with a checkpoint within the epochs after half a second (--checkpoint-minutes 0.008)
SMALL = {
    "gretta": "--target-split val --proportion 0.1 --batch-size 20 --num-samples 2 --epochs 6 --checkpoint-every 2 --log-every 3 --opt sgd --lr 0.01 --reg test --checkpoint-minutes 0.008",
    "advaa": "--eval-split val --num-train 60 --epochs 8 --batch-size 10 --M 3 --Q 2 --controller-lr 0.05 --checkpoint-every 2 --log-every 4 "
    "--model shake26_2x32d --checkpoint-minutes 0.008",  # Shake-Shake draws from torch's own generator
    "game_of_noise": "--eval-split val --epochs 3 --batch-size 100 --fresh-iterations 2 --star-iterations 3 --log-every 4 --checkpoint-every 2 --checkpoint-minutes 0.008",
}  # fmt: skip


def same(first: object, second: object) -> bool:
    """Equality of nested dicts and lists of tensors and plain values, to the last bit."""
    if isinstance(first, dict):
        return isinstance(second, dict) and first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def assert_same_run(directory: Path, reference: Path) -> None:
    assert without_times(results_of(directory)) == without_times(results_of(reference))
    state, expected = state_of(directory), state_of(reference)
    assert [key for key in expected if not same(state[key], expected[key])] == []
    assert (directory / "log.jsonl").read_text() == (reference / "log.jsonl").read_text()
    if (reference / "policies.jsonl").exists():
        assert (directory / "policies.jsonl").read_text() == (reference / "policies.jsonl").read_text()
        assert same(common.load_tensors(directory / "best.pt", ""), common.load_tensors(reference / "best.pt", ""))
    assert not list(directory.glob(".*")), "half-written files stay behind"


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, Path]:
    """Runs that nothing happened to, made when they are asked for."""

    class References(dict):
        def __missing__(self, script: str) -> Path:
            self[script] = tmp_path_factory.mktemp("reference") / script
            run_script(f"{script}.py", *SMALL[script].split(), "--run-dir", self[script])
            return self[script]

    return References()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_twenty_random_moments(script, references, tmp_path):
    """SIGKILL, 20 times, also while a checkpoint is written; every life continues the one before."""
    flags = [*SMALL[script].split(), "--resume", "--run-dir", str(tmp_path / "run")]
    found = json.loads(run_script(ROOT / "tests" / "lives.py", script, 7, 20, *flags).stdout.splitlines()[-1])
    assert sum(count for _, count in found["runs"]) == 20 and found["torn"] > 0
    for directory, _ in found["runs"]:
        assert_same_run(Path(directory), references[script])


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, signum, code", [("gretta", signal.SIGTERM, 143), ("advaa", signal.SIGINT, 130), ("game_of_noise", signal.SIGTERM, 143)]
)
def test_a_signal_finishes_the_step_and_says_how_to_go_on(script, signum, code, references, tmp_path):
    directory = tmp_path / "run"
    flags = SMALL[script].replace("--checkpoint-minutes 0.008", "--checkpoint-minutes 1000")
    command = [sys.executable, f"{script}.py", *flags.split(), "--run-dir", str(directory)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:  # into the second epoch, or as far as the log tells
        if (directory / "log.jsonl").is_file() and (directory / "log.jsonl").read_text().count("\n") >= 2:
            break
        time.sleep(0.01)
    process.send_signal(signum)
    errors = process.communicate(timeout=120)[1]
    line = [line for line in re.split(r"[\n\r]", errors) if "stopped by" in line]
    assert process.returncode == code, errors[-2000:]
    assert line == [f"{script}.py: stopped by {signum.name}; continue with --resume --run-dir {directory}"]
    state = state_of(directory)
    assert not state["finished"] and (state["batches"] > 0 or state["epoch"] > 0) and not (directory / "results.json").exists()
    run_here(script, *SMALL[script].split(), "--resume", "--run-dir", directory)
    assert_same_run(directory, references[script])


def test_a_second_signal_does_not_wait():
    code = "import common, signal, os, time\n"
    code += "def main():\n  common.Pace(1, 1, common.Machine(None)).begin()\n  os.kill(os.getpid(), 2)\n  print('waits', flush=True)\n  os.kill(os.getpid(), 2)\n  time.sleep(9)\n"
    done = subprocess.run([sys.executable, "-c", code + "common.run_script(main)"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stdout == "waits\n" and done.stderr.endswith("stopped by SIGINT\n")


def test_a_signal_outside_of_the_training_ends_the_run_at_once():
    code = "import common, os, time\ndef main():\n  os.kill(os.getpid(), 15)\n  time.sleep(9)\ncommon.run_script(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143 and "stopped by SIGTERM" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


MACHINE = common.start_machine("cpu")


def state(step: int) -> dict:
    return {"state_dict": {"weight": torch.full((3,), float(step))}, "step": step}


def test_the_one_before_is_kept_and_takes_the_place_of_a_damaged_one(tmp_path, capsys):
    for step in (1, 2, 3):
        common.save_run(state(step), tmp_path, MACHINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert common.read_checkpoint(tmp_path, "")["step"] == 3
    newest = tmp_path / "checkpoint.pt"
    whole = newest.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\0" * len(whole)):
        newest.write_bytes(damaged)
        assert common.read_checkpoint(tmp_path, "start afresh")["step"] == 2
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and f"cannot read {newest}" in warning and f"going on from {tmp_path / 'checkpoint.previous.pt'}" in warning
    newest.unlink()
    assert common.has_checkpoint(tmp_path) and common.read_checkpoint(tmp_path, "")["step"] == 2
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"")
    with pytest.raises(common.InputError, match="checkpoint.previous.pt: truncated"):
        common.read_checkpoint(tmp_path, "start afresh")


@pytest.mark.parametrize("moment", ["fsync", "replace", "link"])
def test_a_full_disk_leaves_the_last_good_checkpoint(moment, tmp_path, monkeypatch):
    for step in (1, 2):
        common.save_run(state(step), tmp_path, MACHINE)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, full)
        if moment == "link":  # a file system without links: nothing is lost
            common.save_run(state(3), tmp_path, MACHINE)
        else:
            with pytest.raises(
                common.InputError, match="cannot write .*checkpoint.pt: .*No space left on device; what it held before is still there"
            ):
                common.save_run(state(3), tmp_path, MACHINE)
    assert common.read_checkpoint(tmp_path, "")["step"] == (3 if moment == "link" else 2)
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_is_full_within_the_run(tmp_path):
    """No file may grow beyond 20 MB: the first checkpoint (45 MB) does not fit. One line, and the run's directory as it was."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))

    command = [sys.executable, "gretta.py", "--dry-run", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    line = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(line) == 1, done.stderr[-2000:]
    reason = f"cannot write {tmp_path / 'run' / 'checkpoint.pt'}: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}; "
    assert reason in line[0], line
    assert "Traceback" not in done.stderr and not list((tmp_path / "run").glob("*checkpoint*"))


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    common.save_run(state(1), tmp_path, MACHINE)
    with pytest.raises(common.InputError, match="weight is not finite at step 2: lower --lr; the last good checkpoint is"):
        common.save_run({"state_dict": {"weight": torch.tensor([1.0, float("nan")])}, "step": 2}, tmp_path, MACHINE)
    assert common.read_checkpoint(tmp_path, "")["step"] == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_settings_are_refused_on_resume(script, tmp_path):
    run_here(script, "--dry-run", "--run-dir", tmp_path / "run")
    with pytest.raises(common.InputError, match=r"checkpoint.pt is of a run with other settings \(--seed was 0\): leave them"):
        run_here(script, "--dry-run", "--resume", "--seed", "3", "--run-dir", tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_restarts_after_a_worker_was_killed(tmp_path):
    """--max-restarts: a worker is killed in the middle of an epoch; the others end, all start again and continue from the checkpoint."""
    flags = (
        "--eval-split val --num-train 60 --epochs 6 --batch-size 10 --M 3 --Q 2 --checkpoint-every 1 --log-every 1 --checkpoint-minutes 0.005".split()
    )

    def start(directory: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *more, "advaa.py", *flags]
        return subprocess.Popen(
            [*command, "--resume", "--run-dir", str(directory)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    process = start(tmp_path / "killed", "--max-restarts", "1")
    deadline = time.time() + 200
    while time.time() < deadline and not common.has_checkpoint(tmp_path / "killed"):
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    errors = process.communicate(timeout=400)[1]
    assert process.returncode == 0, errors[-3000:]
    undisturbed = start(tmp_path / "whole")
    assert undisturbed.communicate(timeout=400) and undisturbed.returncode == 0
    killed, whole = state_of(tmp_path / "killed"), state_of(tmp_path / "whole")
    assert killed["finished"] and same(killed["state_dict"], whole["state_dict"]) and killed["records"] == whole["records"]
    assert without_times(results_of(tmp_path / "killed")) == without_times(results_of(tmp_path / "whole"))


def test_a_restarted_worker_does_not_meet_the_addresses_of_the_attempt_before(tmp_path):
    """Rank 0 of the second attempt comes late: rank 1 must wait for its new address, torchrun's store still holds the old one."""
    script = tmp_path / "late.py"
    script.write_text(
        f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport common\n"
        "at = os.environ['TORCHELASTIC_RESTART_COUNT'], os.environ['RANK']\n"
        "time.sleep(3 * (at == ('1', '0')))\n"
        "machine = common.start_machine('cpu')\n"
        "machine.barrier()\n"
        "if at == ('0', '1'):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "machine.barrier()\n"
        f"open({str(tmp_path)!r} + '/done' + ''.join(at), 'w').close()\n"
    )
    run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1", script)
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done10", "done11"]


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_the_run_continues_with_another_number_of_processes(tmp_path):
    flags = [*SMALL["game_of_noise"].split(), "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "game_of_noise.py", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 200
    while time.time() < deadline and not common.has_checkpoint(tmp_path / "run"):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode != 0 and f"game_of_noise.py: stopped by SIGTERM; continue with --resume --run-dir {tmp_path / 'run'}" in errors
    assert not state_of(tmp_path / "run")["finished"]
    run_here("game_of_noise", "--resume", *flags)
    assert state_of(tmp_path / "run")["finished"] and results_of(tmp_path / "run")["clean_accuracy"] > 50
