"""What advaa.py does with bad input: one line that says what is wrong, where, and what to do; exit code 2; nothing written."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from formats import make_cifar, make_perturbed

import advaa
import common


@pytest.fixture
def refuses(refuses_here, tmp_path):
    def refuse(*flags, names=()):
        return refuses_here(advaa.main, "advaa.py", *flags, "--run-dir", tmp_path / "run", names=names)

    return refuse


def test_one_policy_has_no_normalised_reward(refuses):
    refuses("--M", "1", names=("--M 1", "--reward moving"))


@pytest.mark.parametrize(
    "flags", [("--M", "0"), ("--Q", "0"), ("--controller-lr", "nan"), ("--entropy-penalty", "-1"), ("--label-smoothing", "1"), ("--policy", "best")]
)
def test_values_out_of_range(flags, refuses):
    refuses(*flags, names=(flags[0], "see --help"))


def test_replays(refuses, tmp_path):
    refuses("--policy", "replay", names=("--replay FILE",))
    refuses("--policy", "random", "--replay", "x", names=("--policy replay",))
    refuses("--replay", tmp_path / "none.jsonl", names=("none.jsonl", "policies.jsonl of a run"))
    policies = torch.zeros(8, 5, 2, 2, dtype=torch.long)
    records = [advaa.policy_record(epoch, policies, [1.0] * 8) for epoch in (1, 2)]
    file = tmp_path / "policies.jsonl"
    common.write_text(file, "".join(json.dumps(record) + "\n" for record in records))
    refuses("--replay", file, "--epochs", "3", names=(file, "holds 2 epochs", "3", "--epochs"))
    refuses("--replay", file, "--epochs", "2", "--Q", "4", names=(file, "line 1", "--Q 4"))
    refuses("--replay", file, "--epochs", "2", "--M", "4", names=(file, "line 1", "--M 4"))
    file.write_text(file.read_text().replace("ShearX", "Blur"))
    refuses("--replay", file, "--epochs", "2", names=(file, "line 1", "unknown op 'Blur'", "Posterize"))


def test_batches_and_sizes(refuses, tmp_path):
    refuses("--num-train", "1001", names=("--num-train 1001", "1000"))
    refuses("--model", "resnext999", names=("resnext999", "wresnet28_10"))
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 3, "advaa.py", "--batch-size", 2, "--run-dir", tmp_path / "run")
    line = run_script(*command, expect=1, OMP_NUM_THREADS="1").stderr  # torchrun's own code
    assert "advaa.py: error: a batch of 2 is smaller than the 3 processes" in line and not (tmp_path / "run").exists()


def test_what_fails_on_the_first_process_alone_is_said_by_all(tmp_path):
    """A download, for one: the others wait for it, and must neither wait for ever nor end in a traceback."""
    lines = ["import common", "def fail():", "    raise common.InputError('no such server')"]
    lines += ["common.run_script(lambda: common.start_machine('cpu').on_main(fail))"]
    (tmp_path / "alone.py").write_text("\n".join(lines))
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "alone.py")
    errors = run_script(*command, expect=1, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)).stderr
    assert errors.count("alone.py: error: no such server") == 2 and "[rank" not in errors


def test_missing_data(refuses, tmp_path):
    refuses("--dataset", "cifar10", "--data-root", tmp_path, names=(tmp_path / "cifar-10-batches-py", "cifar-10-python.tar.gz"))
    refuses("--dataset", "cifar100", "--data-root", tmp_path, names=(tmp_path / "cifar-100-python", "https://www.cs.toronto.edu/~kriz/"))
    refuses("--dataset", "imagenet", "--data-root", tmp_path, names=(tmp_path / "imagenet" / "val", "https://image-net.org"))
    refuses("--dataset", "cifar10", "--eval-split", "val", names=("--validation",))


def test_damaged_corrupted_sets(refuses, tmp_path):
    make_cifar(tmp_path / "data", "cifar10", 200, 20, 4)
    make_perturbed(tmp_path / "data", advaa.PERTURBATIONS)
    flags = ("--dataset", "cifar10", "--data-root", tmp_path / "data")
    batch = tmp_path / "data/cifar-10-batches-py/data_batch_3"
    whole = batch.read_bytes()
    for damaged in (whole[:5000], b"", b"not a pickle"):
        batch.write_bytes(damaged)
        refuses(*flags, names=("data_batch_3", "damaged", "--download cifar10"))
    batch.write_bytes(whole)
    (tmp_path / "data/CIFAR-10-P/tilt.npy").rename(tmp_path / "tilt.npy")
    refuses(*flags, names=("tilt.npy", "missing"))
    np.save(tmp_path / "data/CIFAR-10-P/tilt.npy", np.zeros((3, 32, 32, 3), dtype=np.uint8))
    refuses(*flags, names=("tilt.npy", "(3, 32, 32, 3)"))
    (tmp_path / "tilt.npy").rename(tmp_path / "data/CIFAR-10-P/tilt.npy")
    np.save(tmp_path / "data/CIFAR-10-C/fog.npy", np.zeros((20, 32, 32), dtype=np.uint8))
    refuses(*flags, names=("fog.npy", "(20, 32, 32)"))
    np.save(tmp_path / "data/CIFAR-10-C/fog.npy", np.zeros((25, 32, 32, 3), dtype=np.uint8))
    refuses(*flags, names=("fog.npy", "labels.npy is int64 (20,)", "(25, 32, 32, 3)"))
    np.save(tmp_path / "data/CIFAR-10-C/fog.npy", np.array([{}], dtype=object), allow_pickle=True)
    refuses(*flags, names=("fog.npy", "damaged"))
    (tmp_path / "data/CIFAR-10-C/fog.npy").unlink()
    refuses(*flags, names=("fog.npy", "missing"))


def test_nothing_to_evaluate(refuses, tmp_path):
    refuses("--evaluate", names=("checkpoint.pt does not exist", "--weights"))
    refuses("--evaluate", "--weights", tmp_path / "w.pt", names=("w.pt does not exist",))
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "w.pt")
    refuses("--evaluate", "--weights", tmp_path / "w.pt", names=("w.pt does not fit", "missing", "conv1.weight"))


def test_run_directories(refuses_here, tmp_path, monkeypatch, capfd):
    def refuse(*flags, names=()):
        return refuses_here(advaa.main, "advaa.py", *flags, "--run-dir", tmp_path / "run", names=names)

    monkeypatch.setattr(sys, "argv", ["advaa.py", "--dry-run", "--M", "2", "--run-dir", str(tmp_path / "run")])
    monkeypatch.chdir(ROOT)
    advaa.main()
    capfd.readouterr()
    refuse(names=(tmp_path / "run", "not empty", "--resume"))
    refuse("--resume", "--policy", "random", names=("checkpoint.pt", "--policy was advaa", "another --run-dir"))
    refuse("--resume", "--M", "3", "--epochs", "5", names=("--M was 2", "--epochs was 2"))
    refuse("--evaluate", "--eval-split", "val", names=("--eval-split val would overwrite",))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    torch.save(state | {"finished": False, "generator": torch.zeros(3)}, tmp_path / "run" / "checkpoint.pt")
    refuse("--resume", names=("checkpoint.pt", "does not continue"))
    torch.save({"state_dict": state["state_dict"]}, tmp_path / "run" / "checkpoint.pt")
    refuse("--resume", names=("checkpoint.pt", "holds no run of advaa"))
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):  # a damaged newest one alone is no reason to stop
        (tmp_path / "run" / name).write_bytes(b"PK\x03\x04 truncated")
    refuse("--resume", names=("checkpoint.previous.pt", "truncated"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capfd):
    flags = ["--num-train", "20", "--batch-size", "10", "--M", "2", "--epochs", "4", "--log-every", "1", "--checkpoint-every", "1"]
    monkeypatch.setattr(sys, "argv", ["advaa.py", *flags, "--run-dir", str(tmp_path / "run")])
    monkeypatch.chdir(ROOT)
    reward, seen = common.finite_totals, []

    def spoil(totals, step, lr, directory):
        seen.append(step)
        return reward(totals * (float("nan") if step == 4 else 1), step, lr, directory)

    monkeypatch.setattr(common, "finite_totals", spoil)
    with pytest.raises(SystemExit) as stopped:
        common.run_script(advaa.main)
    line = [line for line in capfd.readouterr().err.splitlines() if "error:" in line][-1]
    assert stopped.value.code == 2 and "not finite at step 4" in line and "checkpoint.pt" in line and "lower --lr" in line
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["state_dict"].values())
    assert len((tmp_path / "run" / "policies.jsonl").read_text().splitlines()) == 1


def test_a_configuration_that_does_not_fit(refuses, tmp_path):
    (tmp_path / "conf.json").write_text(json.dumps({"M": "many"}))
    refuses("--load-conf", tmp_path / "conf.json", names=("conf.json", "many"))
    (tmp_path / "conf.json").write_text(json.dumps({"momentum": 0.9}))
    refuses("--load-conf", tmp_path / "conf.json", names=("unknown settings momentum",))
