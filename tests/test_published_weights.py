"""Published checkpoints by name, against a server on this machine that serves stand-ins in the published formats; their recorded checksums."""

import hashlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Handler, contents, results_of

import advaa
import common
import game_of_noise
import gretta

HTML = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
CIFAR = [name for name, published in common.PUBLISHED_WEIGHTS.items() if published.dataset != "imagenet"]
NORMALISATION = {"mu": torch.full((1, 3, 1, 1), 0.5), "sigma": torch.full((1, 3, 1, 1), 0.5)}


def build(name: str) -> torch.nn.Module:
    """The model that a name is a checkpoint of, with BatchNorm statistics of its own."""
    published = common.PUBLISHED_WEIGHTS[name]
    model = common.build_model(published.model, {"imagenet": 1000}.get(published.dataset) or common.NUM_CLASSES[published.dataset], published.dataset)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def as_published(name: str, model: torch.nn.Module) -> dict:
    state = model.state_dict()
    if name.endswith("-student"):
        return {"weights": state, "epoch": 3}
    if name.startswith("gretta-"):
        return {"epoch": 199, "best_acc": 0.78, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    if name.startswith("robustbench-"):
        state = {key.replace("conv_shortcut", "convShortcut"): value for key, value in state.items()}
        return {"state_dict": {f"module.{key}": value for key, value in (NORMALISATION | state).items()}}
    return {"model_state_dict": state}


def to_bytes(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.fixture
def machine() -> common.Machine:
    return common.start_machine("cpu")


@pytest.fixture
def serve(address, tmp_path, monkeypatch) -> Callable:
    """serve(name, content, path="/…"): the published file of that name is these bytes; the weights' folder is one of the test's own."""
    monkeypatch.setattr(common, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(Handler, "archives", {})
    monkeypatch.setattr(Handler, "kinds", {})

    def serve(name: str, content: bytes | None, path: str | None = None, kind: str = "application/octet-stream") -> Path:
        published = common.PUBLISHED_WEIGHTS[name]
        path = path or f"/{published.file}?id=1&confirm=t"
        if content is not None:
            Handler.archives[path] = content
        Handler.kinds[path] = kind
        monkeypatch.setitem(common.PUBLISHED_WEIGHTS, name, published._replace(url=address + path))
        return tmp_path / "weights" / published.file

    return serve


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# ----------------------------------------------------------------------------------------------------------- The table


def test_the_table_and_its_description_agree():
    files = [published.file for published in common.PUBLISHED_WEIGHTS.values()]
    assert len(set(files)) == len(files) == 15
    readme = (common.WEIGHTS / "README.md").read_text()
    for name, published in common.PUBLISHED_WEIGHTS.items():
        assert f"| `{name}` " in readme and f"`{published.file}`" in readme
        assert Path(published.file).name == published.file and published.model in common.MODELS
        identity = re.fullmatch(r"https://drive\.usercontent\.google\.com/download\?id=([\w-]{33})&export=download&confirm=t", published.url)
        assert identity or published.url == f"https://github.com/bethgelab/game-of-noise/releases/download/v1.0/{published.file}"
        assert (identity[1] if identity else published.url) in readme
    releases = ("ANT", "ANT+SIN", "ANT3x3", "ANT3x3+SIN", "Speckle", "Gauss_mult", "Gauss_sigma_0.5")
    assert game_of_noise.MODEL_NAMES == ("clean", *releases, "ANT-SIN", "Gauss_single")


def test_default_checkpoints_are_augmix_on_cifar():
    for model in ("resnext", "wideresnet"):
        assert common.default_checkpoint("cifar100", model) == f"gretta-{model}"
        assert common.default_checkpoint("cifar10", model) == f"robustbench-cifar10-{model}"
    others = (("digits", "resnext"), ("cifar10", "wresnet28_10"), ("cifar100", "student"), ("cifar100", "resnext-student"), ("imagenet", "resnet50"))
    assert [common.default_checkpoint(*pair) for pair in others] == [None] * len(others)


# ------------------------------------------------------------------------------------------------- Fetching and loading


@pytest.mark.parametrize("name", [*CIFAR, "Gauss_sigma_0.5"])
def test_a_published_checkpoint_is_fetched_by_name_and_gives_the_same_logits(name, serve, machine):
    model = build(name)
    content = to_bytes(as_published(name, model))
    file = serve(name, content)
    images = torch.rand(2, 3, 32, 32)
    again = build(name)
    assert common.load_checkpoint(again, name, machine) == file and file.read_bytes() == content
    with torch.no_grad():
        logits = model(images)
        assert logits.isfinite().all() and logits.std() > 0 and torch.equal(again(images), logits)
    assert common.find_checkpoint(name, machine) == file and len(Handler.asked) == 1
    assert json.loads((file.parent / "sha256.json").read_text()) == {file.name: hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name, kept", [("robustbench-cifar10-wideresnet", ()), ("robustbench-cifar10-resnext", ("mu", "sigma"))])
def test_robustbench_normalisation_may_be_left_out_and_must_be_the_models(name, kept, tmp_path):
    state = build(name).state_dict()
    file = tmp_path / "file.pt"
    torch.save({key: NORMALISATION[key] for key in kept} | state, file)
    model = common.load_weights(build(name), file)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for key, other in (("mu", [0.4914, 0.4822, 0.4465]), ("sigma", [0.5])):
        torch.save(NORMALISATION | {key: torch.tensor(other)} | state, file)
        with pytest.raises(common.InputError, match=f"was trained on inputs normalised otherwise: its {key} is {other[0]:.4g}.*model's 0.5;"):
            common.load_weights(build(name), file)


def test_normalisation_is_compared_with_that_of_the_model(tmp_path):
    """ImageNet's models take ImageNet's statistics; a model that has a mu of its own loads it."""
    model = common.build_model("resnet18", 10, "imagenet")
    torch.save(NORMALISATION | model.state_dict(), tmp_path / "file.pt")
    with pytest.raises(common.InputError, match="its mu is 0.5, 0.5, 0.5, this model's 0.485"):
        common.load_weights(model, tmp_path / "file.pt")
    own = torch.nn.Module()
    own.register_buffer("mu", torch.zeros(2))
    torch.save({"mu": torch.ones(2)}, tmp_path / "file.pt")
    assert common.load_weights(own, tmp_path / "file.pt").mu.tolist() == [1, 1]


def test_a_checkpoint_of_another_model_or_data_set_is_refused_as_any_file_is(serve, machine):
    serve("gretta-wideresnet", to_bytes(as_published("gretta-wideresnet", build("gretta-wideresnet"))))
    for model, dataset in (("resnext", "cifar100"), ("wideresnet", "cifar10")):
        with pytest.raises(common.InputError, match="gretta-wideresnet.pth does not fit this model.*--dataset it was trained for"):
            common.load_checkpoint(common.build_model(model, common.NUM_CLASSES[dataset], dataset), "gretta-wideresnet", machine)


def test_a_path_stays_a_path(machine):
    assert common.find_checkpoint("somewhere/model.pt", machine) == Path("somewhere/model.pt")
    assert common.find_checkpoint("./ANT", machine, True) == Path("ANT")


# -------------------------------------------------------------------------------------------------------- Checksums


def test_what_was_used_first_is_what_is_used_later(serve, machine):
    file = serve("ANT", b"first")
    assert common.published_file("ANT", machine) == file
    other = serve("Speckle", b"second")
    other.write_bytes(b"put there by hand")  # as the errors advise
    common.published_file("Speckle", machine)
    recorded = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (file, other)}
    record = file.parent / "sha256.json"
    assert json.loads(record.read_text()) == recorded and names(file.parent) == sorted([file.name, other.name, "sha256.json"])

    file.write_bytes(b"changed")
    changed = hashlib.sha256(b"changed").hexdigest()
    for dry_run in (False, True):
        with pytest.raises(common.InputError) as caught:
            common.published_file("ANT", machine, dry_run)
        line = str(caught.value)
        for part in (changed, recorded[file.name], f"remove {file} to fetch it again, or its line in {record} if the change was meant"):
            assert part in line
    assert json.loads(record.read_text()) == recorded and file.read_bytes() == b"changed"

    file.unlink()  # fetched again
    assert common.published_file("ANT", machine).read_bytes() == b"first"
    file.write_bytes(b"changed")  # and the change was meant
    common.write_json(record, {other.name: recorded[other.name]})
    common.published_file("ANT", machine)
    assert json.loads(record.read_text()) == recorded | {file.name: changed}


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_record_is_named(text, serve, machine):
    file = serve("ANT", b"first")
    file.parent.mkdir()
    record = file.parent / "sha256.json"
    record.write_text(text)
    with pytest.raises(common.InputError, match=re.escape(str(record)) + ".*remove it"):
        common.published_file("ANT", machine)
    assert record.read_text() == text


# ------------------------------------------------------------------------------------------------- Faults of the server


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_drives_page_is_refused_and_nothing_is_left(kind, serve, machine):
    file = serve("gretta-resnext", HTML, kind=kind)
    with pytest.raises(
        common.InputError, match=re.escape(f"answered with a page, not the file (quota?): fetch it in a browser and put it at {file}")
    ):
        common.published_file("gretta-resnext", machine)
    assert names(file.parent) == []


def test_a_missing_file_is_named_and_nothing_is_left(serve, machine):
    file = serve("gretta-resnext", None)
    with pytest.raises(common.InputError, match="404.*put the file at " + re.escape(str(file))):
        common.published_file("gretta-resnext", machine)
    assert names(file.parent) == []


def test_a_broken_off_download_goes_on(serve, machine):
    name = "gretta-wideresnet"  # 9 MB
    model = build(name)
    file = serve(name, to_bytes(as_published(name, model)), path="/broken/wideresnet")
    with pytest.raises(common.InputError, match="broke off after 2,000,000"):
        common.published_file(name, machine)
    assert names(file.parent) == [file.name + ".part"]  # nothing is recorded
    again = build(name)
    common.load_checkpoint(again, name, machine)
    assert [wanted for _, wanted in Handler.asked] == [None, "bytes=2000000-"] and names(file.parent) == [file.name, "sha256.json"]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_dry_run_downloads_nothing(serve, machine, capsys):
    file = serve("ANT", b"file")
    assert common.published_file("ANT", machine, dry_run=True) is None and common.find_checkpoint("ANT", machine, True) is None
    assert Handler.asked == [] and names(file.parent) == []
    assert f"ANT: {file} is not there, and a dry run downloads nothing: the model stays untrained" in capsys.readouterr().out
    common.published_file("ANT", machine)
    assert common.published_file("ANT", machine, dry_run=True) == file and len(Handler.asked) == 1


def test_other_ranks_download_nothing(serve, monkeypatch):
    """They wait for rank 0, and read its file."""
    waited = []
    monkeypatch.setattr(common.dist, "broadcast_object_list", waited.append)
    rank = common.Machine(torch.device("cpu"), rank=1, world_size=2)
    file = serve("ANT", b"file")
    assert common.published_file("ANT", rank) == file and waited == [[None, None]] and Handler.asked == [] and names(file.parent) == []


# --------------------------------------------------------------------------------------------------------- The programs


def call(monkeypatch, module: object, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
    module.main()


def test_download_takes_a_name(serve, monkeypatch, capsys):
    file = serve("ANT+SIN", b"file")
    call(monkeypatch, common, "--download", "ANT+SIN")
    assert capsys.readouterr().out.splitlines()[-1] == str(file) and file.read_bytes() == b"file"


DIGITS_RUNS = {
    gretta: ("--est", "surrogate", "--target-split", "val", "--batch-size", 16, "--student", "gretta-resnext-student"),
    advaa: ("--model", "resnext", "--evaluate"),
    game_of_noise: ("--evaluate",),
}


@pytest.mark.parametrize("module", DIGITS_RUNS, ids=lambda module: module.__name__)
def test_a_dry_run_of_a_script_takes_names(module, serve, tmp_path, monkeypatch, capsys):
    """Nothing on disk: it runs, untrained. A file that does not fit this model: the usual error. One that fits: it is what the run starts from."""
    monkeypatch.chdir(tmp_path)  # game_of_noise.py writes Results/ there
    name = "gretta-resnext"
    file, student = (serve(which, b"never asked for") for which in (name, "gretta-resnext-student"))
    flags = (*DIGITS_RUNS[module], "--dry-run", "--device", "cpu", "--data-root", ROOT / "data", "--weights", name)
    call(monkeypatch, module, *flags, "--run-dir", tmp_path / "first")
    out = capsys.readouterr().out
    assert f"{name}: {file} is not there, and a dry run downloads nothing: the model stays untrained" in out and ", from" not in out
    assert ("gretta-resnext-student: " in out) == (module is gretta)
    results_of(tmp_path / "first")
    assert json.loads((tmp_path / "first" / "args.json").read_text())["weights"] == name
    assert Handler.asked == [] and names(file.parent) == []

    file.parent.mkdir()
    file.write_bytes(to_bytes(as_published(name, build(name))))
    before = contents(tmp_path / "first")
    with pytest.raises(common.InputError, match="gretta-resnext.pth does not fit this model"):
        call(monkeypatch, module, *flags, "--run-dir", tmp_path / "second")
    assert names(tmp_path / "second") == [] and contents(tmp_path / "first") == before
    if module is not game_of_noise:  # the slowest; it loads the file in the same way
        (file.parent / "sha256.json").unlink()
        torch.save({"state_dict": {f"module.{key}": value for key, value in common.build_model("resnext", 10, "digits").state_dict().items()}}, file)
        torch.save({"weights": common.build_model("student", 10, "digits").state_dict()}, student)
        call(monkeypatch, module, *flags, "--run-dir", tmp_path / "second")
        assert str(file) in capsys.readouterr().out
        results_of(tmp_path / "second")
    assert Handler.asked == []


@pytest.mark.parametrize("module", [game_of_noise, advaa], ids=lambda module: module.__name__)
def test_a_run_goes_by_the_whole_name_of_its_checkpoint(module, serve, monkeypatch):
    def stop(script: str, arguments: dict, method: str, machine: common.Machine) -> None:
        raise InterruptedError(method)

    serve("Gauss_sigma_0.5", None)
    monkeypatch.setattr(common, "run_directory", stop)
    with pytest.raises(InterruptedError, match="^Gauss_sigma_0.5$"):  # not _0, the stem of a file of that name
        call(monkeypatch, module, "--evaluate", "--model", "resnext", "--dry-run", "--device", "cpu", "--weights", "Gauss_sigma_0.5")
