"""Command line, Run, Totals, machine: what a run leaves; going on ends as if nothing had happened."""

import argparse
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, contents, results_of, run_here, run_script, state_of, without_times
from torch import nn

import common
from common import InputError, number

CPU = common.Machine(torch.device("cpu"))


def parse(*words: str) -> argparse.Namespace:
    parser = common.Parser(prog="toy.py")
    add = parser.add_argument
    numbers = {"seed": 0, "epochs": 3, "batch-size": 4, "checkpoint-every": 2, "log-every": 2}
    for name, value in numbers.items():
        add(f"--{name}", type=number(int, 0), default=value, help=f"{name} of the toy")
    add("--lr", type=number(float, 0, open_low=True))
    add("--checkpoint-minutes", type=float, default=10.0)
    add("--state", action=argparse.BooleanOptionalAction, default=True)
    for name in ("resume", "evaluate", "amp"):
        add(f"--{name}", action="store_true")
    for name, value in {"run-dir": None, "load-conf": None, "dataset": "fake", "model": "linear"}.items():
        add(f"--{name}", default=value)
    return parser.parse(list(words), lambda given: {"lr": 0.1})


def toy(*words: object) -> common.Run:
    """A script like the three: dropout draws from torch's own generator, momentum and sums are state."""
    args = parse(*map(str, words))
    machine = common.start_machine("cpu", seed=args.seed)
    data = common.Images(*common.fake_images(21, 3, 4, 4), machine)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 3))
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    scaler, totals = machine.scaler(), common.Totals(2, machine)
    run = common.Run(args, machine, "toy")
    progress = run.track({"history": []}, model=model, optimizer=optimizer, scaler=scaler, totals=totals)
    if run.finished:
        return run
    steps = len(data) // args.batch_size
    batches = data.batches(args.batch_size, args.seed, run.step)
    for step, (images, labels, _) in run.steps(batches, args.epochs * steps, steps):
        draws = machine.generator(args.seed, step)
        noisy = common.to_float(images) + machine.normal((args.batch_size, 1, 1, 1), draws)
        loss = F.cross_entropy(model.train()(noisy), labels)
        common.descend(loss, optimizer, scaler, args.lr)
        totals.add(loss, torch.ones(()))
        if (step + 1) % args.log_every == 0:
            run.log(step + 1, loss=totals.read(step + 1)[0])
        if step % steps == steps - 1:
            progress["history"].append(totals.read(step + 1))
            totals.own.zero_()
    run.finish({"n_train": len(data), "accuracy_now": common.evaluate([model], data)[0]["top1_accuracy"]})
    return run


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch, tmp_path):
    (tmp_path / "toy.py").write_text("# a script\n")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "toy.py")])


def same(first: object, second: object) -> bool:
    """Equality of nested dicts and lists of tensors and plain values, to the last bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def assert_same_run(directory: Path, reference: Path) -> None:
    assert without_times(results_of(directory)) == without_times(results_of(reference))
    state, expected = state_of(directory), state_of(reference)
    assert [key for key in expected if not same(state[key], expected[key])] == []
    for name in ("log.jsonl", "policies.jsonl"):
        if (reference / name).exists():
            assert (directory / name).read_text() == (reference / name).read_text()
    assert not list(directory.glob(".*")), "half-written files stay behind"


class Killed(BaseException):
    pass


def test_a_run_writes_its_directory_and_reports_again(tmp_path, capsys):
    run = toy("--run-dir", tmp_path / "run", "--seed", 5)
    names = {path.name for path in run.directory.iterdir() if not path.name.startswith("events")}
    files = {"args.json", "checkpoint.pt", "checkpoint.previous.pt", "log.jsonl", "results.json", "toy.py"}
    assert names == files and len(list(run.directory.glob("events*"))) == 1
    args = json.loads((run.directory / "args.json").read_text())
    assert args["lr"] == 0.1 and args["world_size"] == 1
    assert torch.__version__.startswith(args["versions"]["torch"])
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", args["git_commit"]) and "toy.py" in args["command"]
    steps = [json.loads(line)["step"] for line in open(run.directory / "log.jsonl")]
    assert steps == [2, 4, 6, 8, 10, 12, 14]
    state = state_of(run.directory)
    assert state["step"] == state["total_steps"] == 15 and len(state["progress"]["history"]) == 3
    results = results_of(run.directory)
    assert list(results)[:5] == ["script", "dataset", "model", "method", "seed"] and results["seed"] == 5
    assert "seed=5" in capsys.readouterr().out
    before = contents(run.directory)
    assert toy("--run-dir", run.directory, "--resume").finished and contents(run.directory) == before
    again = toy("--run-dir", run.directory, "--evaluate")
    assert again.in_place and again.step == 15 and results_of(run.directory) == results


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 7, 14])
def test_killed_after_any_step_and_resumed_equals_never_killed(steps, tmp_path, monkeypatch):
    toy("--run-dir", tmp_path / "whole")
    count = iter(range(steps, -1, -1))

    def descend(*arguments, original=common.descend) -> None:
        if next(count) == 0:
            raise Killed
        original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common, "descend", descend)
        toy("--run-dir", tmp_path / "run", "--checkpoint-minutes", 0)
    toy("--run-dir", tmp_path / "run", "--resume")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_what_a_run_is_made_of_cannot_change_but_rates_can(tmp_path, capsys):
    toy("--run-dir", tmp_path / "run", "--no-state")
    capsys.readouterr()
    for words in (["--resume", "--seed", "1"], ["--evaluate", "--lr", "0.2"], ["--resume", "--state"]):
        with pytest.raises(SystemExit) as stopped:
            parse("--run-dir", str(tmp_path / "run"), *words)
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and words[1] in line and line.count("\n") == 1
    args = parse("--run-dir", str(tmp_path / "run"), "--resume", "--lr", "0.2", "--amp")
    assert args.lr == 0.2 and args.amp and not args.state


def test_settings_come_from_the_run_then_the_configuration_then_what_is_published(tmp_path, capsys):
    conf = tmp_path / "conf.json"
    conf.write_text(json.dumps({"batch_size": 5, "epochs": 9, "state": False, "lr": None, "git_commit": "x"}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(json.dumps({"batch_size": 3, "epochs": 7}))
    args = parse("--load-conf", str(conf), "--run-dir", str(tmp_path / "run"), "--resume", "--epochs", "8")
    assert (args.batch_size, args.epochs, args.state, args.lr) == (3, 8, False, 0.1)
    assert parse("--load-conf", str(conf), "--batch_size", "6").batch_size == 6
    for text in ("", "[]", '{"momentum": 1}', '{"epochs": "x"}', '{"epochs": -1}', '{"lr": 0}'):
        conf.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            parse("--load-conf", str(conf))
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_and_spellings():
    printed = run_script("gretta.py", "--help").stdout
    assert "python gretta.py --model resnext --est vanilla" in printed and "(default: 0.1)" in printed
    assert common.Parser.hyphenate("--num_samples=3_0") == "--num-samples=3_0"
    assert common.Parser.hyphenate("a_b") == "a_b"


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1", "1e999", "x"])
def test_numbers_out_of_range(text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        number(float, 0, 1, open_high=True)(text)
    assert number(float, 0, 1, open_high=True)("0.5") == 0.5 and number(int, 0)("7") == 7


def test_run_directories_in_use(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("used", "file"):
        with pytest.raises(InputError, match=rf"{name} is not .*--run-dir|{name} is not empty: .*--resume"):
            toy("--run-dir", tmp_path / name)
    toy("--run-dir", tmp_path / "used", "--resume")
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"
    with pytest.raises(OSError):
        toy("--run-dir", "/proc/cleanaug")


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    directory = toy("--run-dir", tmp_path / "run").directory
    newest, step = directory / "checkpoint.pt", torch.load(directory / "checkpoint.previous.pt")["step"]
    whole = newest.read_bytes()
    capsys.readouterr()
    for damaged in (b"", whole[: len(whole) // 2], b"\0" * len(whole), None):
        newest.write_bytes(damaged) if damaged is not None else newest.unlink()
        assert common.has_checkpoint(directory) and common.read_checkpoint(directory)["step"] == step == 10
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and str(newest) in warning and "checkpoint.previous.pt" in warning
    (directory / "checkpoint.previous.pt").write_bytes(b"")
    with pytest.raises(InputError, match="checkpoint.previous.pt: truncated"):
        common.read_checkpoint(directory)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_good_checkpoint(moment, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        common.save_atomically({"step": step}, file, keep_previous=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(InputError, match="checkpoint.pt: .*No space left"):
        patch.setattr(os, moment, full)
        common.save_atomically({"step": 3}, file, keep_previous=True)
    assert common.read_checkpoint(tmp_path)["step"] == 2 and not list(tmp_path.glob(".*"))


def test_a_disk_that_is_full_within_the_run(tmp_path):
    """No file may grow beyond 20 MB: the first checkpoint (45 MB) does not fit. One line, no half of a
    file."""
    command = [sys.executable, "gretta.py", "--dry-run", "--run-dir", str(tmp_path / "run")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    line = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(line) == 1 and os.strerror(errno.EFBIG) in line[0], done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "run").glob("*checkpoint*"))


def test_what_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(InputError, match=r"the loss is not finite at step \d+: lower --lr"):
        toy("--run-dir", tmp_path / "run", "--lr", 1e38, "--checkpoint-minutes", 0, "--epochs", 9)
    run = common.Run(parse("--run-dir", str(tmp_path / "other")), CPU, "toy")
    model = nn.Linear(2, 2)
    run.track({}, model=model)
    nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(InputError, match="the model is not finite at step 0: lower --lr"):
        run.save(9)
    assert not (tmp_path / "other" / "checkpoint.pt").exists()


SIGNALLED = """
import os, sys, time
sys.path[:0] = [{root!r}]
import common
def main():
    common.Stop.deferred, common.Stop.directory = {deferred}, "somewhere"
    os.kill(os.getpid(), {signum})
    print("waits", flush=True)
    os.kill(os.getpid(), {signum})
    time.sleep(9)
common.run_script(main)
"""


@pytest.mark.parametrize("deferred, signum, code", [(True, 2, 130), (False, 15, 143)])
def test_a_second_signal_does_not_wait_nor_one_outside_of_training(deferred, signum, code):
    program = SIGNALLED.format(root=str(ROOT), deferred=deferred, signum=signum)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stdout == "waits\n" * deferred
    line = f"stopped by {signal.Signals(signum).name}; continue with --resume --run-dir somewhere\n"
    assert done.stderr.endswith(line) and "Traceback" not in done.stderr


# ---------- Machine ----------


def test_neighbouring_seeds_and_steps_give_unrelated_streams():
    pairs = [(seed, step) for seed in range(6) for step in range(6)]
    draws = {pair: torch.randn(1000, generator=CPU.generator(*pair)) for pair in pairs}
    table = torch.corrcoef(torch.stack(list(draws.values()))) - torch.eye(36)
    assert table.abs().max() < 0.16  # five deviations of 1/√1000
    assert len({common.mix(*pair) for pair in draws}) == 36 and common.mix(1, 2) != common.mix(12)
    assert torch.equal(draws[3, 4], torch.randn(1000, generator=CPU.generator(3, 4)))
    assert common.mix("order", 0, 1) == common.mix("order", 0, 1) < 2**63


def test_totals_of_ranks(monkeypatch):
    totals = common.Totals(3, CPU)
    totals.add(torch.tensor([1.0, 2.0]), torch.tensor(3))
    totals.add(torch.tensor([1.0, 2.0]), torch.tensor(3))
    assert totals.read(1) == [2, 4, 6]
    rows = torch.tensor([[1.0, 2, 3], [10, 20, 30]], dtype=torch.float64)
    for rank, expected in ((0, [1, 2, 3]), (1, [10, 20, 30])):
        other = common.Totals(3, CPU._replace(rank=rank, world_size=2))
        other.load_state_dict({"rows": rows})
        assert other.own.tolist() == expected
    totals.load_state_dict({"rows": rows})  # fewer ranks than before: nothing is lost
    assert totals.read(1) == [11, 22, 33]
    totals.add(torch.tensor([float("inf"), 0]), torch.tensor(0))
    with pytest.raises(InputError, match="not finite at step 7"):
        totals.read(7)


def test_mixed_precision_and_seeds():
    draws = []
    for _ in range(2):
        machine = common.start_machine("cpu", amp=True, seed=5)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] and machine.is_main and machine.amp_dtype == torch.bfloat16
    with machine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda"):
            common.start_machine("cuda")


def test_odd_batches_train_on_the_cpu():
    """oneDNN wrote outside its memory for odd channels_last batches: in a process of its own."""
    program = (
        "import torch, common\n"
        "machine = common.start_machine('cpu')\n"
        "for name in ('wideresnet', 'resnext'):\n"
        "    model = common.build_model(name, 10, 'digits').to(memory_format=machine.weight_layout)\n"
        "    for size in (5, 15, 25):\n"
        "        for _ in range(4):\n"
        "            model(machine.layout(torch.rand(size, 3, 32, 32))).sum().backward()\n"
    )
    run_script("-c", program, OMP_NUM_THREADS="2")


def test_nothing_names_this_machine():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        assert not re.search(r"/(root|home|work)/", file.read_text()), file


# ---------- The table over seeds ----------


def write(directory: Path, **results: object) -> Path:
    directory.mkdir(exist_ok=True)
    common.write_json(directory / "results.json", {"dataset": "digits", "model": "m"} | results)
    return directory


def test_the_table_is_mean_and_std_over_seeds(tmp_path):
    def gretta(name: str, seed: int, value: float, method: str = "vanilla") -> Path:
        more = {"script": "gretta", "method": method, "seed": seed, "proportion": 0.2}
        more["corruptions"] = {"fog": {"gretta": 9}, "mean": {"gretta": 7}}
        return write(tmp_path / name, **more, accuracy={"none": 60.0, "gretta": value})

    runs = [gretta(f"a{seed}", seed, value) for seed, value in enumerate((90.0, 92.0, 94.0))]
    runs += [gretta("b", 0, 95.0, "whitebox"), gretta("c", 1, 97.0, "whitebox")]
    printed = run_script("common.py", *runs).stdout
    assert "**gretta digits m** (mean ± std over 3 seeds)" in printed
    assert "| | corruptions mean gretta | accuracy none | accuracy gretta |" in printed
    assert "| vanilla | 7.00 ± 0.00 | 60.00 ± 0.00 | 92.00 ± 2.00 |" in printed
    assert "| whitebox | 7.00 ± 0.00 | 60.00 ± 0.00 | 96.00 ± 1.41 |" in printed


def test_the_table_refuses_two_runs_of_one_seed_that_differ(tmp_path):
    for name, error in (("a", 3.0), ("b", 9.0)):
        write(tmp_path / name, script="advaa", method="advaa", seed=0, top1_error=error, wall_seconds=error)
    assert "| advaa | 3.00 | 3.00 |" in common.table([tmp_path / "a", tmp_path / "a"])
    with pytest.raises(InputError, match="advaa with this seed is there twice"):
        common.table([tmp_path / "a", tmp_path / "b"])
    for name, views in (("a", 2), ("b", 8)):
        common.write_json(tmp_path / name / "args.json", {"M": views})
    table = common.table([tmp_path / "b", tmp_path / "a"], ["M"])
    assert "| advaa, M 8 | 9.00 | 9.00 |" in table and "| advaa, M 2 | 3.00 | 3.00 |" in table
    for text in ("", "[]", "{}", '{"script": "gretta", '):
        (tmp_path / "a" / "results.json").write_text(text)
        with pytest.raises(InputError, match="a.*: no results of a finished run"):
            common.table([tmp_path / "a"])


# ---------- The scripts: kills, signals, several processes ----------

# Small runs of some seconds, on validation digits, with checkpoints within the epochs
SMALL = {
    "gretta": "--eval-split val --proportion 0.1 --batch-size 20 --num-samples 2 --epochs 6 --log-every 3 "
    "--checkpoint-every 2 --opt sgd --lr 0.01 --reg test --checkpoint-minutes 0.008",
    "advaa": "--eval-split val --num-train 60 --epochs 8 --batch-size 10 --M 3 --Q 2 --controller-lr 0.05 "
    "--checkpoint-every 2 --log-every 4 --model shake26_2x32d --checkpoint-minutes 0.008",
    "game_of_noise": "--eval-split val --epochs 3 --batch-size 100 --fresh-iterations 2 --star-iterations 3 "
    "--log-every 4 --checkpoint-every 2 --checkpoint-minutes 0.008",
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


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
@pytest.mark.parametrize("script", SMALL)
def test_killed_at_twenty_random_moments(script, references, tmp_path):
    """SIGKILL, 20 times, also while a checkpoint is written; every life continues the one before."""
    flags = [*SMALL[script].split(), "--resume", "--run-dir", str(tmp_path / "run")]
    done = run_script(ROOT / "tests" / "lives.py", script, 7, 20, *flags)
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(count for _, count in found["runs"]) == 20 and found["torn"] > 0
    for directory, _ in found["runs"]:
        assert_same_run(Path(directory), references[script])


def start(*command: object) -> subprocess.Popen:
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None and not condition():
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("script, signum", [("gretta", signal.SIGTERM), ("advaa", signal.SIGINT)])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(script, signum, references, tmp_path):
    directory = tmp_path / "run"
    flags = SMALL[script].replace("--checkpoint-minutes 0.008", "--checkpoint-minutes 1000").split()
    process, log = start(f"{script}.py", *flags, "--run-dir", directory), directory / "log.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 2, process)
    process.send_signal(signum)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signum, errors[-2000:]
    line = f"{script}.py: stopped by {signum.name}; continue with --resume --run-dir {directory}"
    assert line in re.split(r"[\n\r]", errors) and "Traceback" not in errors
    assert 0 < state_of(directory)["step"] and not (directory / "results.json").exists()
    run_here(script, "--resume", "--run-dir", directory)
    assert_same_run(directory, references[script])


@pytest.mark.slow
def test_torchrun_restarts_after_a_worker_was_killed(tmp_path):
    flags = "--eval-split val --num-train 60 --epochs 6 --batch-size 10 --M 3 --Q 2 --checkpoint-every 1 "
    flags += "--log-every 1 --checkpoint-minutes 0.005 --resume --run-dir"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(*TORCHRUN, 2, "--max-restarts", 1, "advaa.py", *flags.split(), killed)
    wait_for(lambda: common.has_checkpoint(killed), process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    errors = process.communicate(timeout=400)[1]
    assert process.returncode == 0, errors[-3000:]
    run_script(*TORCHRUN, 2, "advaa.py", *flags.split(), whole)
    first, second = state_of(killed), state_of(whole)
    assert same(first["classifier"], second["classifier"]) and first["progress"] == second["progress"]
    assert without_times(results_of(killed)) == without_times(results_of(whole))


@pytest.mark.slow
def test_sigterm_under_torchrun_and_going_on_with_another_number_of_processes(tmp_path):
    flags = [*SMALL["game_of_noise"].split(), "--run-dir", str(tmp_path / "run")]
    process = start(*TORCHRUN, 2, "game_of_noise.py", *flags)
    wait_for(lambda: common.has_checkpoint(tmp_path / "run"), process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=200)[1]
    line = f"game_of_noise.py: stopped by SIGTERM; continue with --resume --run-dir {tmp_path / 'run'}"
    assert process.returncode != 0 and line in errors
    assert not (tmp_path / "run" / "results.json").exists()
    run_here("game_of_noise", "--resume", "--run-dir", tmp_path / "run")
    assert results_of(tmp_path / "run")["clean_accuracy"] > 50


def test_a_restarted_worker_does_not_meet_the_addresses_of_the_attempt_before(tmp_path):
    """Rank 0 of the second attempt comes late: rank 1 must wait for its new address."""
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
    run_script(*TORCHRUN, 2, "--max-restarts", 1, script)
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done10", "done11"]
