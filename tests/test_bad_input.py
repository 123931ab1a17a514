"""Bad input: exit code 2, one line on stderr that says what is wrong and where, and nothing written or overwritten."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, run_here
from PIL import Image

import common
import gretta

RESNEXT = common.WEIGHTS / "digits-resnext.pt"


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def gretta_refuses(directory: Path, *flags: object, names: tuple = ()) -> str:
    """As `refused`, for gretta.py with a new run directory below `directory`; where it is not refused, --dry-run makes it quick."""
    return refused(directory, "gretta.py", "--dry-run", "--run-dir", directory / "run", *flags, names=names)


@pytest.fixture
def gretta_refuses_here(refuses_here, tmp_path):
    """As `gretta_refuses` without a new process, which is quicker where there are many cases."""
    return lambda *flags, names=(): refuses_here(gretta.main, "gretta.py", "--dry-run", "--run-dir", tmp_path / "run", *flags, names=names)


# ------------------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "flag, value",
    [
        *(("--proportion", value) for value in ("0", "1", "-0.1", "nan", "abc")),
        ("--batch-size", "1"),
        *(("--num-samples", value) for value in ("0", "-3")),
        ("--sigma", "0"),
        ("--alpha", "1.5"),
        ("--reg", "nonsense"),
    ],
)
def test_values_out_of_range(flag, value, tmp_path):
    gretta_refuses(tmp_path, flag, value, names=(flag, value))


@pytest.mark.parametrize(
    "flag, value",
    [("--batch-size", "2.5"), ("--lr", "inf"), ("--steps", "0"), *((flag, "nonsense") for flag in ("--est", "--dataset", "--device", "--opt"))],
)
def test_more_values_out_of_range(flag, value, gretta_refuses_here):
    gretta_refuses_here(flag, value, names=(flag, value))


def test_unknown_flag(tmp_path):
    gretta_refuses(tmp_path, "--nonsense", names=("--nonsense",))


@pytest.mark.parametrize("flags", [["--nonsense", "1"], ["nonsense"], ["--num-sample", "3"]])
def test_more_unknown_flags(flags, gretta_refuses_here):
    """Abbreviations are not guessed at."""
    gretta_refuses_here(*flags, names=flags)


def test_a_line_stays_one_line_whatever_was_typed(gretta_refuses_here):
    gretta_refuses_here("--reg", "two\nlines", names=("--reg", "two"))


@pytest.mark.parametrize("flag", ["--weights", "--run-dir", "--predict", "--data-root", "--load-conf"])
def test_names_that_no_file_can_have(flag, gretta_refuses_here):
    gretta_refuses_here(flag, "x" * 300, names=("x" * 300,))


def test_unknown_model(tmp_path):
    gretta_refuses(tmp_path, "--model", "nonsense", names=("model", "nonsense", "resnext", "wideresnet"))


def test_model_that_does_not_take_small_images(gretta_refuses_here):
    gretta_refuses_here("--model", "inception_v3", names=("inception_v3", "32 px"))


def test_cuda_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gretta_refuses(tmp_path, "--device", "cuda", names=("--device cuda",))


@pytest.mark.parametrize("flag, value, images", [("--proportion", "0.001", "6 images"), ("--batch-size", "100000", "1200 images")])
def test_fewer_images_than_a_batch(flag, value, images, tmp_path):
    """Without --dry-run, which takes few images itself."""
    refused(tmp_path, "gretta.py", "--run-dir", tmp_path / "run", flag, value, names=("--batch-size", "--proportion", images))


@pytest.mark.parametrize("flags", [["--num_samples", "1"], ["--num-samples", "1"]])
def test_both_spellings_of_a_flag(flags, tmp_path):
    run_here("gretta", "--dry-run", "--run-dir", tmp_path / "run", *flags)
    assert json.loads((tmp_path / "run/args.json").read_text())["num_samples"] == 1


# ------------------------------------------------------------------------------------------------------------ --load-conf


@pytest.mark.parametrize(
    "text, names",
    [
        (None, ()),
        ("nonsense", ()),
        ('{"nonsense": 1}', ("nonsense",)),
        ('{"batch_size": "many"}', ("--batch-size", "many")),
        ('{"est": "nonsense"}', ("--est", "nonsense")),
    ],
)
def test_load_conf(text, names, tmp_path):
    if text is not None:
        (tmp_path / "conf.json").write_text(text)
    gretta_refuses(tmp_path, "--load-conf", tmp_path / "conf.json", names=("--load-conf", tmp_path / "conf.json", *names))


@pytest.mark.parametrize(
    "text, names",
    [
        ("", ()),
        ("[1, 2]", ()),
        ("\xff\xfe\x00", ()),
        ('{"two\\nlines": 1}', ("two",)),
        ('{"batch_size": 2.5}', ("--batch-size", "2.5")),
        ('{"batch_size": [24]}', ("--batch-size", "[24]")),
        ('{"sigma": null}', ("sigma",)),
        ('{"dataset": null}', ("dataset",)),
        ('{"proportion": 1}', ("--proportion", "1")),
        ('{"amp": "yes"}', ("amp", "yes")),
        ('{"sigmoid": 1}', ("sigmoid", "1")),
    ],
)
def test_more_load_conf(text, names, tmp_path, gretta_refuses_here):
    file = tmp_path / "conf.json"
    file.write_bytes(text.encode("latin-1"))
    gretta_refuses_here("--load-conf", file, names=("--load-conf", file, *names))


# ------------------------------------------------------------------------------------------------------------ checkpoints


def save_trap(file: Path, made: Path, how: str) -> None:
    """A checkpoint that makes a file when it is unpickled without care; tried here."""
    if how == "pickle":
        file.write_bytes(pickle.dumps(Trap(made)))
        pickle.loads(file.read_bytes())
    else:
        torch.save({"state_dict": {"weight": Trap(made)}}, file, _use_new_zipfile_serialization=how == "zip")
        torch.load(file, weights_only=False)
    made.unlink()


@pytest.mark.parametrize("flag", ["--weights", "--weights-policy", "--student"])
def test_a_missing_checkpoint(flag, tmp_path):
    extra = {"--weights": [], "--weights-policy": ["--evaluate"], "--student": ["--est", "surrogate"]}[flag]
    gretta_refuses(tmp_path, flag, tmp_path / "none.pt", *extra, names=(tmp_path / "none.pt", "does not exist"))


@pytest.mark.parametrize("what", ["truncated", "empty", "random bytes"])
def test_a_file_that_is_no_checkpoint(what, tmp_path):
    file, whole = tmp_path / "weights.pt", RESNEXT.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "random bytes": np.random.default_rng(0).bytes(1000)}[what])
    gretta_refuses(tmp_path, "--weights", file, names=(file,))


@pytest.mark.parametrize("model, other", [("resnext", "wideresnet"), ("wideresnet", "resnext")])
def test_checkpoint_of_another_model(model, other, tmp_path):
    """The line names keys of both: missing ones and unexpected ones."""
    file = common.WEIGHTS / f"digits-{other}.pt"
    line = gretta_refuses(tmp_path, "--model", model, "--weights", file, names=(file, "missing", "unexpected"))
    wanted, given = (common.build_model(name, 10, "digits").state_dict().keys() for name in (model, other))
    assert any(key in line for key in wanted - given) and any(key in line for key in given - wanted)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("flag", ["--weights", "--weights-policy"])
def test_a_checkpoint_with_code_in_it_is_not_unpickled(flag, how, tmp_path):
    save_trap(tmp_path / "trap.pt", tmp_path / "made", how)
    gretta_refuses(tmp_path, flag, tmp_path / "trap.pt", *["--evaluate"] * (flag != "--weights"), names=(tmp_path / "trap.pt",))


def test_a_student_that_does_not_fit_is_found_before_anything_is_written(tmp_path):
    gretta_refuses(tmp_path, "--est", "surrogate", "--student", RESNEXT, names=(RESNEXT, "missing"))


@pytest.mark.parametrize("outer", [None, "state_dict", "model_state_dict", "weights"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_weights_takes_state_dicts_as_people_save_them(outer, prefix, tmp_path):
    """All give the same logits as the model they were saved from."""
    saved = common.build_model("resnext", 10, "digits").eval()
    state = {prefix + key: value for key, value in saved.state_dict().items()}
    torch.save({outer: state, "epoch": 3} if outer else state, tmp_path / "weights.pt")
    loaded = common.load_weights(common.build_model("resnext", 10, "digits"), tmp_path / "weights.pt").eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), saved(images)) and saved(images).std() > 0


@pytest.mark.parametrize(
    "content, names",
    [
        (None, ("does not exist",)),
        (torch.zeros(3), ()),
        ([torch.zeros(3)], ()),
        ({}, ()),
        ({"state_dict": {}}, ()),
        ({"weight": 3}, ()),
        ({0: torch.zeros(3)}, ()),
        ({"weight": torch.zeros(4, 3)}, ("missing", "bias")),
        ({"weight": torch.zeros(4, 3), "bias": torch.zeros(4), "extra": torch.zeros(1)}, ("unexpected", "extra")),
        ({"weight": torch.zeros(4, 2), "bias": torch.zeros(4)}, ("weight", "(4, 2)", "(4, 3)")),
        ({"module.weight": torch.zeros(4, 3), "bias": torch.zeros(4)}, ("module.weight",)),
    ],
)
def test_load_weights_refuses_what_does_not_fit(content, names, tmp_path):
    """In one line; the model keeps the weights it had."""
    file, model = tmp_path / "weights.pt", torch.nn.Linear(3, 4)
    if content is not None:
        torch.save(content, file)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(common.InputError) as caught:
        common.load_weights(model, file)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message and all(name in message for name in names), message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_load_weights_unpickles_no_code(how, tmp_path):
    save_trap(tmp_path / "trap.pt", tmp_path / "made", how)
    with pytest.raises(common.InputError) as caught:
        common.load_weights(torch.nn.Linear(3, 4), tmp_path / "trap.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------------------------------ run directories


def test_run_directory_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    gretta_refuses(tmp_path, names=(tmp_path / "run", "--run-dir"))


def test_run_directory_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    gretta_refuses(tmp_path, "--run-dir", tmp_path / "file/run", names=(tmp_path / "file/run", "--run-dir"))


@pytest.mark.parametrize("directory", ["/proc/cleanaug", "/dev/null/x"])
def test_run_directory_where_nobody_can_write(directory, tmp_path):
    """Root ignores permissions, but not these."""
    gretta_refuses(tmp_path, "--run-dir", directory, names=(directory, "--run-dir"))
    assert not Path(directory).exists()


def test_run_directory_in_use(tmp_path):
    """It is not overwritten without --resume, whatever is in it."""
    (tmp_path / "run").mkdir()
    for name in ("args.json", "log.jsonl", "checkpoint.pt", "results.json", "mine.txt"):
        (tmp_path / "run" / name).write_text("mine")
    gretta_refuses(tmp_path, names=(tmp_path / "run", "--resume"))


@pytest.mark.parametrize("what", ["damaged args.json", "damaged checkpoint", "other model's checkpoint", "bare state dict"])
def test_resume_of_a_damaged_run(what, tmp_path, gretta_refuses_here):
    run, state = tmp_path / "run", gretta.Policy("resnet18", 4, False, "zero").state_dict()
    run.mkdir()
    checkpoint = run / "checkpoint.pt"
    if what == "damaged args.json":
        (run / "args.json").write_text('{"seed": ')
    elif what == "damaged checkpoint":
        checkpoint.write_bytes(RESNEXT.read_bytes()[:1000])
    else:
        torch.save(torch.load(RESNEXT, weights_only=True) if what.startswith("other") else state, checkpoint)
    line = gretta_refuses_here("--resume", names=(run / "args.json" if "args" in what else checkpoint,))
    assert "--load-conf" not in line  # which was not given


# ---------------------------------------------------------------------------------------------------- --evaluate, --predict


def test_evaluate_needs_a_policy(tmp_path):
    """Without --run-dir a run would go to runs/; its name has the seed in it."""
    refused(tmp_path, "gretta.py", "--evaluate", "--dry-run", "--seed", "987654", names=("--run-dir", "--weights-policy"))
    assert not list((ROOT / "runs").rglob("*s987654*"))


@pytest.mark.parametrize("exists", [True, False])
def test_evaluate_of_a_run_without_checkpoint(exists, tmp_path):
    if exists:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/args.json").write_text("{}")
    gretta_refuses(tmp_path, "--evaluate", names=(tmp_path / "run/checkpoint.pt", "does not exist"))


def test_evaluate_with_the_policy_of_another_transform_set(tmp_path):
    """The line names the head's key and both its shapes."""
    file = tmp_path / "policy.pt"
    torch.save({"state_dict": gretta.Policy("resnet18", 7, False, "zero").state_dict()}, file)
    gretta_refuses(tmp_path, "--evaluate", "--transform", "geometry", "--weights-policy", file, names=(file, "fc.weight", "(7, 512)", "(4, 512)"))


def test_predict_of_a_missing_or_empty_folder(tmp_path):
    gretta_refuses(tmp_path, "--predict", tmp_path / "none", names=("--predict", tmp_path / "none", "no such folder"))
    (tmp_path / "empty").mkdir()
    gretta_refuses(tmp_path, "--predict", tmp_path / "empty", names=("--predict", tmp_path / "empty"))


@pytest.mark.parametrize("name, keep", [("broken.png", 0), ("broken.png", 600), ("broken.tiff", 60)])
def test_predict_of_an_unreadable_picture(name, keep, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.effect_noise((40, 40), 50).save(folder / "fine.png")
    Image.effect_noise((40, 40), 50).save(folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    torch.save(gretta.Policy("resnet18", 4, False, "zero").state_dict(), tmp_path / "policy.pt")
    gretta_refuses(tmp_path, "--predict", folder, "--weights-policy", tmp_path / "policy.pt", names=("--predict", folder / name))


@pytest.mark.parametrize("suffix", [suffix for suffix in common.IMAGE_SUFFIXES if suffix not in (".jpeg", ".tif")])
def test_pictures_damaged_anywhere_are_refused_by_name(suffix, tmp_path, recwarn, caplog):
    """Cut off, or with bytes changed, at many places: read, or an InputError that names the file, but nothing else."""
    file, generator = tmp_path / f"picture{suffix}", np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(file)
    whole, faults = file.read_bytes(), 0
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        changed = bytearray(whole)
        changed[place : place + 4] = generator.bytes(len(changed[place : place + 4]))
        for damaged in (whole[:place], bytes(changed)):
            file.write_bytes(damaged)
            try:
                gretta.read_pictures(gretta.picture_files(str(tmp_path)), 32)
            except common.InputError as error:
                assert str(file) in str(error)
                faults += 1
    assert faults > 20
    assert [str(warning.message) for warning in recwarn] + caplog.messages == []  # each would be a further line on stderr


# ------------------------------------------------------------------------------------------------------------------- data


def damaged_data(what: str, directory: Path) -> Path:
    """The path of a damaged copy of data/digits.npz."""
    file = directory / "data/digits.npz"
    shutil.copytree(ROOT / "data", directory / "data")
    if what in ("truncated", "empty"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if what == "truncated" else 0])
    else:
        arrays = dict(np.load(file))
        if what == "objects":
            arrays["images"] = np.full((1797, 8, 8), Trap(directory / "made"), dtype=object)
        elif what == "an array missing":
            del arrays["labels"]
        elif what == "wrong shape":
            arrays["images"] = arrays["images"][:100]
        elif what == "labels out of range":
            arrays["labels"] = arrays["labels"] + 7
        else:
            arrays["split"] = np.minimum(arrays["split"], 1)
        np.savez(file, **arrays)
        (directory / "made").unlink(missing_ok=True)
    return file


@pytest.mark.parametrize("what", ["truncated", "objects"])
def test_damaged_data(what, tmp_path):
    """An array of pickled objects is not unpickled."""
    gretta_refuses(tmp_path, "--data-root", tmp_path / "data", names=(damaged_data(what, tmp_path),))


@pytest.mark.parametrize("what", ["empty", "an array missing", "wrong shape", "labels out of range", "no test digits"])
def test_more_damaged_data(what, tmp_path, gretta_refuses_here):
    file = damaged_data(what, tmp_path)
    gretta_refuses_here("--data-root", tmp_path / "data", names=(file,))


@pytest.mark.parametrize("root", ["empty", "none"])
def test_missing_data(root, tmp_path):
    """A folder that is named but holds no data is not replaced by the repository's; the line names the expected file and how to get it."""
    (tmp_path / "empty").mkdir()
    gretta_refuses(tmp_path, "--data-root", tmp_path / root, names=(tmp_path / root / "digits.npz", "missing", "--data-root", "git checkout"))


def test_missing_relative_data_root(gretta_refuses_here):
    gretta_refuses_here("--data-root", "no-such-folder", names=("no-such-folder/digits.npz", "missing", "--data-root"))


# ------------------------------------------------------------------------------------------------------- python common.py


@pytest.mark.parametrize("text", [None, "", '{"script": "gretta", ', "[]", "{}", '{"script": "gretta", "dataset": "digits", "model": "resnext"}'])
def test_table_of_a_run_without_results(text, tmp_path):
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run/results.json").write_text(text)
    refused(tmp_path, "common.py", tmp_path / "run", names=(tmp_path / "run/results.json",))


def test_table_of_no_run(tmp_path):
    refused(tmp_path, "common.py", names=("run directory",))


def test_table_with_an_unknown_flag(tmp_path):
    refused(tmp_path, "common.py", "--nonsense", tmp_path, names=("--nonsense",))
