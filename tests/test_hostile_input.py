"""Hostile files: random bytes, truncations, flipped bytes and headers made to blow up memory. Every loader gives a valid result or one line that
names the file (InputError, or argparse's exit code 2): never another exception, never a hang, never a heap of memory."""

import contextlib
import functools
import gzip
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from formats import make_chexpert, make_cifar, make_mnist, make_perturbed, random_pixels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import advaa
import common
import game_of_noise
import gretta

SCRIPTS = {"gretta": gretta, "advaa": advaa, "game_of_noise": game_of_noise}
SECONDS, MEGABYTES = 15, 500  # the most that any one call may take


class Hung(BaseException):
    """Not an Exception, so that no loader takes it for a damaged file."""


def examples(count: int) -> settings:
    ignored = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(derandomize=True, deadline=None, max_examples=count, suppress_health_check=ignored, database=None)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """A loader that asks for 4 GB more than this process has gets a MemoryError, so that a failure here does not take the machine with it."""
    if not Path("/proc/self/statm").is_file():
        yield
        return
    torch.randn(2, 3, 64, 64)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * 2**30, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limit)


def peak_megabytes(reset: bool = False) -> float:
    """The most memory this process has had, on Linux since it was last reset."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return common.peak_memory_mb(common.Machine(torch.device("cpu")))


def check_line(line: str, path: Path | str | None) -> None:
    assert line.strip() and len(line) < 10_000 and len(line.splitlines()) == 1 and line.isprintable(), line
    assert path is None or str(path) in line, line


def attempt(call: Callable, path: Path | str | None) -> object:
    """What the call returns; None where it refuses in one line that holds `path`. Warnings count as exceptions."""

    def hung(*_: object) -> None:
        raise Hung(f"more than {SECONDS} s")

    before, handler = peak_megabytes(reset=True), signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    stderr = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(stderr):
            warnings.simplefilter("error")
            return call()
    except common.InputError as error:
        check_line(str(error), path)
    except SystemExit as stopped:  # argparse's
        assert stopped.code == 2
        check_line(stderr.getvalue().removesuffix("\n"), path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        assert peak_megabytes() - before < MEGABYTES
    return None


def damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    """Random bytes; or a valid file cut off, with a byte or a few changed (mostly near its ends, where headers are), or with random bytes put in."""
    last = len(valid) - 1
    places = st.one_of(st.integers(0, min(last, 200)), st.integers(max(0, last - 300), last), st.integers(0, last))

    def changed(changes: list[tuple[int, int]]) -> bytes:
        content = bytearray(valid)
        for place, value in changes:
            content[place] = value
        return bytes(content)

    return st.one_of(
        st.binary(max_size=300),
        places.map(lambda place: valid[:place]),
        st.tuples(places, st.integers(0, 255)).map(lambda change: changed([change])),
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=2, max_size=5).map(changed),
        st.tuples(places, st.binary(min_size=1, max_size=20)).map(lambda put: valid[: put[0]] + put[1] + valid[put[0] :]),
        st.tuples(places, places).map(lambda cut: valid[: min(cut)] + valid[max(cut) :]),
    )


def throw(strategy: Callable[[bytes], st.SearchStrategy[bytes]], file: Path, call: Callable, valid: Callable[[object], None], count: int = 80,
          named: Path | str | None = "") -> None:  # fmt: skip
    """Write damaged versions of a file and load each: `valid` judges what comes back. The whole file must load."""
    whole = file.read_bytes()
    result = attempt(call, None)
    assert result is not None
    valid(result)

    @examples(count)
    @given(strategy(whole))
    def one(content: bytes) -> None:
        file.write_bytes(content)
        result = attempt(call, file if named == "" else named)
        if result is not None:
            valid(result)

    try:
        one()
    finally:
        file.write_bytes(whole)


def images_and_labels(num_classes: int) -> Callable:
    def valid(result: tuple[torch.Tensor, torch.Tensor]) -> None:
        images, labels = result
        assert images.dtype == torch.uint8 and images.shape == (len(labels), 3, 32, 32) and images.is_contiguous() and len(labels) > 0
        assert labels.dtype == torch.int64 and 0 <= labels.min() <= labels.max() < num_classes

    return valid


# ---------------------------------------------------------------------------------------------------------------------
# The sources
# ---------------------------------------------------------------------------------------------------------------------


def test_nothing_in_the_sources_runs_what_a_file_says():
    forbidden = r"weights_only\s*=\s*False|pickle\.loads?\(|(?<![.\w])eval\(|(?<![.\w])exec\(|os\.system|os\.popen|shell\s*=\s*True|yaml"
    forbidden += r"|allow_pickle\s*=\s*True|marshal|shelve"
    for file in sorted(ROOT.glob("*.py")):
        found = [line for line in file.read_text().splitlines() if re.search(forbidden, line)]
        assert found == [], f"{file}: {found}"
        for line in file.read_text().splitlines():
            assert not re.search(r"(torch|np)\.load\(", line) or "weights_only=True" in line or "allow_pickle=False" in line, line


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


def test_digits(tmp_path):
    file = tmp_path / "digits.npz"
    file.write_bytes((ROOT / "data/digits.npz").read_bytes())
    throw(damaged, file, lambda: common.load_split("digits", "val", tmp_path), images_and_labels(10))


def npz(file: Path, **arrays: np.ndarray) -> None:
    np.savez_compressed(file, **arrays)


def test_digits_of_other_types_and_a_bomb(tmp_path):
    with np.load(ROOT / "data/digits.npz") as archive:
        good = dict(archive)
    file = tmp_path / "digits.npz"
    for name in good:
        for kind in (">i2", "u8", "f8", "f2", "c16", "O", "S3", "U3", "M8[s]", "m8[s]", [("a", "u1")], "?"):
            with contextlib.suppress(TypeError, ValueError):
                npz(file, **good | {name: good[name].astype(kind)})
                result = attempt(lambda: common.load_digits("test", tmp_path), file)
                if result is not None:
                    images_and_labels(10)(result)
    npz(file, **good | {"images": np.full((1797, 8, 8), np.nan)})
    assert attempt(lambda: common.load_digits("test", tmp_path), file) is None
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:  # 1 GB of zeros in a few MB
        with archive.open("images.npy", "w") as stream:
            stream.write(npy_header("|u1", (2**30,)))
            for _ in range(2**10):
                stream.write(bytes(2**20))
    assert attempt(lambda: common.load_digits("test", tmp_path), file) is None


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar(dataset, tmp_path):
    make_cifar(tmp_path, dataset, 50, 4)
    file = tmp_path / {"cifar10": "cifar-10-batches-py/test_batch", "cifar100": "cifar-100-python/test"}[dataset]
    throw(damaged, file, lambda: common.load_split(dataset, "test", tmp_path, download=False), images_and_labels(common.NUM_CLASSES[dataset]),
          150, named=tmp_path)  # fmt: skip


class Calls:
    def __init__(self, function: Callable, *arguments: object):
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


@functools.cache
def cifar_pickles() -> dict[str, bytes]:
    """Pickles that name code, or are made to use up memory or time."""
    pixels = random_pixels(0, 4, 3072)
    good = pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3]}, protocol=2)
    tuples = b"".join(b"(h\x00h\x00tq\x00" for _ in range(60))  # each holds the one before twice: hashing the last takes 2^60 steps
    tower = b"\x85" * 3_000_000  # a tuple in a tuple in a tuple …
    objects = pickle.dumps({"data": np.array([[None] * 3072] * 4), "labels": [0] * 4}, protocol=2)
    strided = (np.ndarray, (2**40, 3072), "u1", b"\0", 0, (0, 0))
    nested: list = [0]
    for _ in range(100):
        nested = [nested, nested]
    return {
        "code": pickle.dumps({"data": Calls(os.getcwd), "labels": []}, protocol=2),
        "eval": pickle.dumps({"data": Calls(eval, "1"), "labels": []}, protocol=2),
        "numpy's own": pickle.dumps({"data": Calls(np.load, "x"), "labels": []}, protocol=2),
        "memo": good[:-1] + b"r\xff\xff\xff\x7f.",
        "memo, as text": good[:-1] + b"p4000000000\n.",
        "bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b".",
        "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**36) + b".",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
        "hash": b"\x80\x02}(K\x01q\x00" + tuples + b"K\x01u.",
        "doubled": b"\x80\x02}()" + b"2\x86" * 60 + b"K\x01u.",
        "tower": b"\x80\x02})" + tower + b"K\x01s.",
        "lists": b"\x80\x02" + b"]" * 3_000_000 + b"a" * 2_999_999 + b".",
        "many": b"\x80\x02(" + b"}" * 20_000_000 + b"l.",
        "objects": objects,
        "object of a type": objects.replace(b"O8", b"u1"),
        "strides": pickle.dumps({"data": Calls(*strided), "labels": Calls(np.ndarray, (2**40,), "u1", b"\0", 0, (0,))}, protocol=2),
        "sparse objects": pickle.dumps({"data": Calls(np.ndarray, (2**34, 3072), "O"), "labels": []}, protocol=2),
        "shape": good.replace(pickle.dumps((4, 3072), 2)[2:-3], b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"),
        "negative shape": good.replace(b"K\x04M\x00\x0c", b"J\xff\xff\xff\xffJ\x00\xd0\xff\xff"),
        "nested labels": pickle.dumps({"data": pixels, "labels": [nested] * 4}, protocol=2),
        "large labels": pickle.dumps({"data": pixels, "labels": [10**30] * 4}, protocol=2),
        "labels of another type": pickle.dumps({"data": pixels, "labels": "abcd"}, protocol=2),
        "labels that are data": pickle.dumps({"data": pixels, "labels": pixels}, protocol=2),
        "fractions": pickle.dumps({"data": pixels, "labels": [0.5] * 4}, protocol=2),
        "no table": pickle.dumps([pixels], protocol=2),
        "a number": pickle.dumps(5),
        "nothing": b".",
        "empty": pickle.dumps({"data": pixels[:0], "labels": []}, protocol=2),
    }


@pytest.mark.parametrize("name", cifar_pickles())
def test_hostile_pickles_of_cifar(name, tmp_path):
    make_cifar(tmp_path, "cifar10", 50, 4)
    file = tmp_path / "cifar-10-batches-py/test_batch"
    file.write_bytes(cifar_pickles()[name])
    assert attempt(lambda: common.load_split("cifar10", "test", tmp_path, download=False), tmp_path) is None


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_mnist(name, tmp_path):
    make_mnist(tmp_path, 10, 10, zipped=name.endswith("gz"))
    throw(damaged, tmp_path / "MNIST/raw" / name, lambda: common.load_split("mnist", "test", tmp_path, download=False), images_and_labels(10),
          named=tmp_path)  # fmt: skip


def test_idx_headers(tmp_path):
    make_mnist(tmp_path, 10, 10, zipped=False)
    raw = tmp_path / "MNIST/raw"
    for shape in ((2**32 - 1,) * 3, (0, 2**32 - 1, 2**32 - 1), (0, 28, 28), (2**31, 1, 1), (10, 28, 0)):
        (raw / "t10k-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">III", *shape))
        assert attempt(lambda: common.load_split("mnist", "test", tmp_path, download=False), tmp_path) is None
    (raw / "t10k-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">III", 0, 28, 28))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1)) + struct.pack(">I", 0))
    assert attempt(lambda: common.load_split("mnist", "test", tmp_path, download=False), tmp_path) is None
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).unlink()
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip_bomb(2**32))
    assert attempt(lambda: common.load_split("mnist", "test", tmp_path, download=False), raw) is None


@functools.cache
def gzip_bomb(size: int) -> bytes:
    """Zeros, a thousandth of their size: so many members, each of 64 MB."""
    return gzip.compress(bytes(2**26)) * (size // 2**26)


def npy_header(descr: object, shape: object, version: bytes = b"\x01\x00") -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header) + 1)
    return b"\x93NUMPY" + version + length + header + b"\n"


@functools.cache
def npy_files() -> dict[str, bytes]:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(3))
    deep = b"(" * 9000 + b")" * 9000
    headers = {
        "empty": b"{}",
        "no header": b"",
        "deep": b"(" * 4000 + b")" * 4000,
        "minus": b"-" * 9000 + b"1",
        "open": b"{'descr': '|u1', 'fortran_order': False, 'shape': (",
        "indented": b"  {\n 1",
        "number": b"9" * 9000,
        "bytes": bytes(range(128, 256)),
        "type": b"{'descr': 'nonsense', 'fortran_order': False, 'shape': (20,)}",
        "deep type": b"{'descr': " + b"[('a'," * 500 + b"'u1'" + b")]" * 500 + b", 'fortran_order': False, 'shape': (20,)}",
    }
    files = {name: b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header for name, header in headers.items()}
    for name, shape in {
        "absurd": (2**40, 32, 32, 3),
        "beyond 64 bits": (2**70, 32, 32, 3),
        "product beyond 64 bits": (2**62, 2**62, 32, 3),
        "negative": (-5, 32, 32, 3),
        "truths": (True, 32, 32, 3),
        "none": (),
        "zero": (0, 2**40, 32, 3),
        "zero images": (0, 32, 32, 3),
        "many": (1,) * 100,
        "text": "20",
    }.items():
        files[name] = npy_header("|u1", shape) + bytes(100)
    files["objects"] = npy_header("|O", (20, 32, 32, 3)) + pickle.dumps(np.array([Calls(os.getcwd)], object))
    files["wide"] = npy_header("|V2147483647", (20,)) + bytes(100)
    files["long header"] = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(deep)) + deep
    files["absurd header"] = b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"
    files["a version of its own"] = b"\x93NUMPY\x09\x00" + bytes(100)
    files["a zip"] = stream.getvalue()
    files["half a zip"] = stream.getvalue()[:40]
    files["a pickle"] = pickle.dumps(Calls(os.getcwd))
    return files


@pytest.mark.parametrize("name", npy_files())
def test_hostile_arrays(name, tmp_path):
    make_cifar(tmp_path, "cifar10", 50, 4, 4)
    for file in (tmp_path / "CIFAR-10-C/fog.npy", tmp_path / "CIFAR-10-C/labels.npy"):
        whole = file.read_bytes()
        file.write_bytes(npy_files()[name])
        assert attempt(lambda: common.corruption_files("cifar10", tmp_path), file.parent) is None
        file.write_bytes(whole)
    make_perturbed(tmp_path, advaa.PERTURBATIONS)
    (tmp_path / "CIFAR-10-P/snow.npy").write_bytes(npy_files()[name])
    assert attempt(lambda: advaa.read_frames(tmp_path / "CIFAR-10-P", "snow"), tmp_path / "CIFAR-10-P/snow.npy") is None


@pytest.mark.parametrize("name", ["fog.npy", "labels.npy"])
def test_cifar_c(name, tmp_path):
    make_cifar(tmp_path, "cifar10", 50, 4, 4)

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        found = common.corruption_files("cifar10", tmp_path)
        parts = [found.read("fog", severity) for severity in found.severities]
        return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])

    throw(damaged, tmp_path / "CIFAR-10-C" / name, read, images_and_labels(10), 60, named=tmp_path / "CIFAR-10-C")


@pytest.mark.parametrize("name", ["fog/test_images.npy", "fog/test_labels.npy"])
def test_mnist_c(name, tmp_path):
    make_mnist(tmp_path, 10, 10, corrupted=True)
    throw(damaged, tmp_path / "mnist_c" / name, lambda: common.corruption_files("mnist", tmp_path).read("fog", 1), images_and_labels(10), 60,
          named=tmp_path / "mnist_c")  # fmt: skip


def test_cifar_p(tmp_path):
    make_perturbed(tmp_path, advaa.PERTURBATIONS)

    def valid(frames: np.ndarray) -> None:
        assert frames.ndim == 5 and frames.shape[2:] == (32, 32, 3) and frames.shape[0] > 0 and frames.dtype == np.uint8

    file = tmp_path / "CIFAR-10-P/snow.npy"
    throw(damaged, file, lambda: advaa.read_frames(file.parent, "snow"), valid, 60)


def chexpert_valid(folders: tuple[common.Folder, common.Folder]) -> None:
    for folder in folders:
        labels = folder.labels
        assert len(folder) == len(labels) > 0 and labels.shape[1] == 5 and labels.dtype == torch.float32
        assert ((labels == 0) | (labels == 1) | labels.isnan()).all()


@pytest.mark.parametrize("name", ["train.csv", "valid.csv"])
def test_chexpert(name, tmp_path):
    make_chexpert(tmp_path, 3, 2)
    throw(damaged, tmp_path / "CheXpert-v1.0-small" / name, lambda: common.load_chexpert(tmp_path, "ignore"), chexpert_valid)


def test_hostile_csv(tmp_path):
    make_chexpert(tmp_path, 3, 2)
    file = tmp_path / "CheXpert-v1.0-small/valid.csv"
    header, *rows = file.read_text().splitlines()
    picture = rows[0].partition(",")[0]
    findings = ",".join(common.FINDINGS)
    for content in (
        b"",
        b"\n\n\n",
        f"{findings},Path\n1,1\n".encode(),  # a row without its path
        f"Path,{findings}\n{'x' * 5000},1,1,1,1,1\n".encode(),  # a name longer than any file's
        f"Path,{findings}\n{'x/' * 50_000},1,1,1,1,1\n".encode(),
        f"Path,{findings}\na\0b,1,1,1,1,1\n".encode(),
        f'Path,{findings}\n"a\nb\x1b[2J",1,1,1,1,1\n'.encode(),
        f"Path,{findings}\n,1,1,1,1,1\n".encode(),
        f"Path,{findings}\n/dev/zero,1,1,1,1,1\n".encode(),
        f"Path,{findings}\n{picture},{'9' * 100_000},1,1,1,1\n".encode(),
        f'Path,{findings}\n"{"x" * 10_000_000}'.encode(),  # a quotation that never ends
        f"Path,{findings}\n".encode() + b"," * 1_000_000,
        b"Path," * 1_000_000,
        header.encode("utf-16"),
        b"\xff" * 1000,
    ):
        file.write_bytes(content)
        assert attempt(lambda: common.load_chexpert(tmp_path), file) is None
    file.unlink()
    file.mkdir()
    assert attempt(lambda: common.load_chexpert(tmp_path), file) is None


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def folder_of(file: Path) -> common.Folder:
    return common.Folder([str(file)], torch.zeros(1, dtype=torch.int64), 32, 40)


def picture_valid(pictures: list[torch.Tensor]) -> None:
    for picture in pictures:
        assert picture.dtype == torch.uint8 and picture.shape == (3, 32, 32)


def read_all_ways(file: Path) -> list[torch.Tensor]:
    folder = folder_of(file)
    return [folder[0, None][0], folder[0, 3][0], gretta.read_pictures(gretta.picture_files(str(file.parent)), 32)[0]]


KINDS = {"png": {}, "jpg": {}, "gif": {}, "bmp": {}, "webp": {}, "tiff": {"compression": "tiff_lzw"}}


@pytest.mark.parametrize("suffix", KINDS)
def test_pictures(suffix, tmp_path, capfd):
    file = tmp_path / f"picture.{suffix}"
    Image.fromarray(random_pixels(0, 24, 40, 3)).save(file, **KINDS[suffix])
    throw(damaged, file, lambda: read_all_ways(file), picture_valid, 100)
    assert capfd.readouterr().err == "" or suffix == "tiff"  # libtiff prints what it meets


def png(width: int, height: int, depth: int = 8, color: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@functools.cache
def picture_bombs() -> dict[str, bytes]:
    zeros = zlib.compress(bytes(2**27))
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 5)
    for tag, value in ((256, 60_000), (257, 60_000), (258, 8), (262, 1), (273, 8)):
        tiff += struct.pack("<HHII", tag, 4, 1, value)
    palette = bytes(6)
    bomb = b"zTXtk\0\0" + zlib.compress(bytes(2**28))
    comment = struct.pack(">I", len(bomb) - 4) + bomb + struct.pack(">I", zlib.crc32(bomb))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n(ran) print\nshowpage\n%%EOF\n"
    return {
        "60000x60000": png(60_000, 60_000, data=zeros),
        "13000x13000, where PIL only warns": png(13_000, 13_000, depth=1, color=0, data=zeros),
        "1x60000000": png(1, 60_000_000, depth=8, color=0, data=zeros),
        "60000000x1": png(60_000_000, 1, depth=1, color=0, data=zeros),
        "0x0": png(0, 0),
        "0x5": png(0, 5),
        "comment": png(8, 8, data=zlib.compress(bytes(8 * 25)), extra=comment),
        "gif": b"GIF89a"
        + struct.pack("<HH", 60_000, 60_000)
        + b"\x80\0\0"
        + palette
        + b"\x2c"
        + struct.pack("<HHHH", 0, 0, 60_000, 60_000)
        + b"\0\x02\x02\x4c\x01\0;",
        "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(10),
        "tiff": tiff + bytes(20),
        "postscript": postscript,
        "portable pixels": b"P6 60000 60000 255\n",
        "icon": b"\0\0\1\0\1\0" + bytes(16),
        "empty": b"",
    }


@pytest.mark.parametrize("name", picture_bombs())
def test_picture_bombs(name, tmp_path, capfd):
    file = tmp_path / "picture.png"
    file.write_bytes(picture_bombs()[name])
    for call in (
        lambda: folder_of(file)[0, None],
        lambda: folder_of(file)[0, 3],
        lambda: gretta.read_pictures(gretta.picture_files(str(tmp_path)), 32),
    ):
        result = attempt(call, file)
        assert result is None or name == "comment"
    assert capfd.readouterr().err == ""


def test_large_and_long_pictures_are_read(tmp_path):
    for size in ((2828, 2320), (2000, 30)):  # CheXpert's originals; a strip
        Image.new("L", size).save(tmp_path / "picture.png")
        picture_valid(attempt(lambda: read_all_ways(tmp_path / "picture.png"), tmp_path))


def test_a_picture_that_is_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "picture.png")
    assert attempt(lambda: folder_of(tmp_path / "picture.png")[0, None], tmp_path) is None


@examples(50)
@given(
    st.lists(st.binary(min_size=1, max_size=30).filter(lambda name: not set(name) & {0, 47} and name not in (b".", b"..")), min_size=1, max_size=4)
)
def test_odd_names(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("odd")
    for name in {*names, b"class\n\x1b[2J"}:
        folder = os.path.join(os.fsencode(root), name)
        os.mkdir(folder)
        with open(os.path.join(folder, name + b".png"), "wb") as stream:
            stream.write(b"no picture")
    classes = common.class_folders(root, "none")
    folder = common.class_folder(root, classes)
    assert len(folder) == len(classes) and all(attempt(lambda number=number: folder[number, None], root) is None for number in range(len(folder)))
    assert attempt(lambda: common.check_classes(root, classes, ["other"], root), root) is None


# ---------------------------------------------------------------------------------------------------------------------
# Archives
# ---------------------------------------------------------------------------------------------------------------------


def tar_of(kind: str, *members: tuple[str, bytes], **changes: object) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zip_of(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def unpacked(archive: Path, directory: Path) -> list[str]:
    directory.mkdir(exist_ok=True)
    common.unpack(archive, directory, ["set"])
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_archives(kind, tmp_path):
    members = (("set/one", b"one" * 100), ("set/deep/two", b"two" * 300))
    packed = {"tar": tar_of("w", *members), "tar.gz": tar_of("w:gz", *members), "zip": zip_of(*members, compression=8)}
    file = tmp_path / f"archive.{kind}"
    file.write_bytes(packed[kind])
    number = iter(range(10**6))

    def unpack() -> list[str]:
        directory = tmp_path / f"to-{next(number)}"
        try:
            return unpacked(file, directory)
        except common.InputError:
            assert list(directory.iterdir()) == []  # whole or not at all
            raise

    def valid(names: list[str]) -> None:
        assert names and all(name == "set" or name.startswith("set/") for name in names)

    throw(damaged, file, unpack, valid, 100)
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"to", file.name}


@functools.cache
def hostile_archives() -> dict[str, bytes]:
    def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
        block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
        block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    def sized(number: int) -> bytes:
        return (b"\x80" + number.to_bytes(11, "big")) if number >= 0 else (number + 2**96).to_bytes(12, "big")

    end = bytes(1024)
    pax = b"".join(b"%d %s\n" % (len(text) + 3, text) for text in (b"size=-99999",))
    sparse = b"".join(b"%d %s\n" % (len(text) + 4, text) for text in (b"GNU.sparse.major=1", b"GNU.sparse.minor=0"))
    stored = zip_of(("set/one", bytes(1000)))
    declared = bytearray(stored)
    for place in (stored.rindex(b"PK\1\2") + 24, 22):  # uncompressed size
        declared[place : place + 4] = struct.pack("<I", 2**32 - 2)
    repeated = zip_of(("set/one", bytes(1000)))
    entry = repeated[repeated.index(b"PK\1\2") : repeated.index(b"PK\5\6")]
    overlapped = repeated[: repeated.index(b"PK\1\2")] + entry * 5000
    overlapped += b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 5000, 5000, len(entry) * 5000, repeated.index(b"PK\1\2"), 0)
    return {
        "a tar member beyond the end": header("set/one", sized(2**40)) + end,
        "a tar member of 2^80 bytes": header("set/one", sized(2**80)) + end,
        "a tar member of a negative size": header("set/one", sized(-512)) + end,
        "a tar member that leads back": header("set/one", b"0" * 12) + header("set/two", sized(-1536)) + end,
        "a negative size in a pax header": header("x", b"%011o\0" % len(pax), b"x") + pax.ljust(512, b"\0") + header("set/one", b"0" * 12) + end,
        "a name of 2^40 bytes": header("././@LongLink", sized(2**40), b"L") + end,
        "a pax header of 2^40 bytes": header("x", sized(2**40), b"x") + end,
        "sparse": header("x", b"%011o\0" % len(sparse), b"x") + sparse.ljust(512, b"\0") + header("set/one", b"%011o\0" % 512) + b"9" * 512 + end,
        "gnu sparse": header("set/one", sized(2**40), b"S") + end,
        "a gzip bomb in a member": gzip.compress(header("set/one", sized(2**33))) + gzip_bomb(2**33),
        "a gzip bomb in a name": gzip.compress(header("././@LongLink", sized(2**31), b"L")) + gzip_bomb(2**31),
        "a link": tar_of("w", ("set/link", b""), type=tarfile.SYMTYPE, linkname="/etc"),
        "a hard link": tar_of("w", ("set/link", b""), type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        "a device": tar_of("w", ("set/null", b""), type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        "a pipe": tar_of("w", ("set/pipe", b""), type=tarfile.FIFOTYPE),
        "outside": tar_of("w", ("set/../../outside", b"x")),
        "absolute": tar_of("w", ("/tmp/outside", b"x")),
        "a file within a file": tar_of("w", ("set/one", b"x"), ("set/one/two", b"x")),
        "another folder": tar_of("w", ("elsewhere/one", b"x")),
        "nothing": tar_of("w"),
        "a long name": tar_of("w", ("set/" + "x" * 300, b"x")),
        "an odd name": tar_of("w", ("else\n\x1b[2J\udcff", b"x")),
        "a zip bomb": zip_of(("set/one", bytes(2**28)), compression=8),
        "a zip bomb of lzma": zip_of(("set/one", bytes(2**26)), compression=14),
        "a zip bomb of bz2": zip_of(("set/one", bytes(2**26)), compression=12),
        "a zip of a larger size than it says": bytes(declared),
        "a zip of one member many times": overlapped,
        "a zip with an odd name": zip_of(("else\n\x1b[2J", b"x")),
        "a zip of nothing": zip_of(),
        "bz2": tar_of("w:bz2", ("elsewhere/one", bytes(2**20))),
        "xz": tar_of("w:xz", ("elsewhere/one", bytes(2**20))),
        "empty": b"",
    }


@pytest.mark.parametrize("name", hostile_archives())
def test_hostile_archives(name, tmp_path):
    file = tmp_path / "archive"
    file.write_bytes(hostile_archives()[name])
    assert attempt(lambda: unpacked(file, tmp_path / "to"), file) is None
    assert list((tmp_path / "to").iterdir()) == [] and sorted(path.name for path in tmp_path.iterdir()) == ["archive", "to"]


def test_an_archive_that_does_not_fit_on_the_disk(tmp_path, monkeypatch):
    file = tmp_path / "archive"
    file.write_bytes(tar_of("w", ("set/one", bytes(5000))))
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: (10**9, 10**9 - 4999, 4999))
    assert attempt(lambda: unpacked(file, tmp_path / "to"), file) is None


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and programs
# ---------------------------------------------------------------------------------------------------------------------


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def model_valid(model: torch.nn.Module) -> None:
    fresh = small_model().state_dict()
    assert {key: (value.shape, value.dtype) for key, value in model.state_dict().items()} == {
        key: (value.shape, value.dtype) for key, value in fresh.items()
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints(zipped, tmp_path):
    file = tmp_path / "model.pt"
    torch.save({"state_dict": small_model().state_dict(), "step": 5}, file, _use_new_zipfile_serialization=zipped)
    throw(damaged, file, lambda: common.load_weights(small_model(), file), model_valid, 150)


@functools.cache
@common.warnings_off()  # prototypes of PyTorch's
def hostile_states() -> dict[str, object]:
    state = small_model().state_dict()
    weight = state["0.weight"]
    return {
        "code": {"0.weight": Calls(os.getcwd)},
        "a list": [weight],
        "a tensor": weight,
        "a number": 5,
        "nothing": None,
        "an empty table": {},
        "text under state_dict": {"state_dict": "x"},
        "numbers under state_dict": {"state_dict": {"0.weight": 5}},
        "numbers as keys": {5: weight},
        "a tensor of 2^50 numbers": state | {"0.weight": torch.zeros(1).expand(2**25, 2**25)},
        "a mean of 2^50 numbers": state | {"mu": torch.zeros(1).expand(2**50)},
        "a mean of text": state | {"mu": "x"},
        "a mean without numbers": state | {"sigma": torch.zeros(0)},
        "complex": state | {"0.weight": weight.to(torch.complex64)},
        "sparse": state | {"0.weight": weight.to_sparse()},
        "sparse of 2^50 numbers": state | {"0.weight": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (2**25, 2**25))},
        "nested": state | {"0.weight": torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])},
        "meta": state | {"0.weight": torch.zeros(2, 3, device="meta")},
        "quantised": state | {"0.weight": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)},
        "no axis": state | {"0.weight": torch.tensor(1.0)},
        "odd names": state | {"\n\x1b[2J\udcff": weight},
        "many names": state | {f"{number}" * 1000: weight for number in range(1000)},
    }


@pytest.mark.parametrize("name", hostile_states())
def test_hostile_states(name, tmp_path, monkeypatch):
    file = tmp_path / "model.pt"
    with common.warnings_off():
        torch.save(hostile_states()[name], file)
    result = attempt(lambda: common.load_weights(small_model(), file), file)
    assert result is None
    # The same as torchvision's weights, and in a run's directory that is continued.
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    hub = tmp_path / "checkpoints/resnet18-f37072fd.pth"
    file.rename(hub)
    assert attempt(lambda: common.load_imagenet_weights(small_model(), "resnet18", common.Machine(torch.device("cpu"))), hub) is None


def test_checkpoint_bombs(tmp_path):
    file, stream = tmp_path / "model.pt", io.BytesIO()
    torch.save(torch.zeros(2**20), stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for info in source.infolist():
            content = source.read(info)
            if "/data/" in info.filename:  # 1 GB of zeros in a few MB
                with target.open(info.filename, "w") as zeros:
                    for _ in range(2**8):
                        zeros.write(content)
            else:
                for number in (b"J\0\0\x10\0t", b"J\0\0\x10\0\x85"):  # 2^20 numbers, now 2^28
                    content = content.replace(number, b"J\0\0\0\x10" + number[5:])
                target.writestr(info.filename, content)
    for content in (
        file.read_bytes(),
        b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.\x80\x02]r\xff\xff\xff\x7f.",  # a legacy file
        zip_of(("model/data.pkl", b"\x80\x02" + b"(" * 300_000), ("model/version", b"3")),
        zip_of(("model/data.pkl", b"\x80\x02]" + b"\x85" * 100_000 + b"."), ("model/version", b"3")),
        zip_of(("model/data.pkl", b"c__builtin__\neval\n(S'1'\ntR."), ("model/version", b"3")),
        zip_of(("model/version", b"3")),
        gzip_bomb(2**28),
    ):
        file.write_bytes(content)
        assert attempt(lambda: common.load_weights(small_model(), file), file) is None


def test_programs(tmp_path):
    machine = common.Machine(torch.device("cpu"))
    model = torch.nn.Flatten()
    files = {"torchscript": tmp_path / "a.pt", "torch.export": tmp_path / "a.pt2", "onnx": tmp_path / "a.onnx"}
    with common.warnings_off():
        torch.jit.trace(model, torch.rand(2, 3, 4, 4)).save(str(files["torchscript"]))
        with open(files["torch.export"], "wb") as stream:
            torch.export.save(torch.export.export(model, (torch.rand(2, 3, 4, 4),)), stream)
        torch.onnx.export(model, (torch.rand(2, 3, 4, 4),), str(files["onnx"]), dynamo=True)

    def only_cut(valid: bytes) -> st.SearchStrategy[bytes]:  # a program is trusted, and is run: changed bytes are another program
        return st.one_of(st.binary(max_size=300), st.integers(0, len(valid) - 1).map(lambda place: valid[:place]))

    def valid(program: torch.nn.Module) -> None:
        assert isinstance(program, gretta.Program)

    for kind, file in files.items():
        assert gretta.program_kind(file) == kind
        throw(only_cut, file, lambda file=file: gretta.load_blackbox(file, machine), valid, 20)
        throw(damaged, file, lambda file=file: gretta.program_kind(file), lambda kind: kind in files, 60)


# ---------------------------------------------------------------------------------------------------------------------
# JSON and flags
# ---------------------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000
HOSTILE_JSON = [b"", b"\xff\xfe", b"null", b"5", b"[]", b'"x"', b"{", b"{}\0", DEEP.encode(), b'{"a":' * 100_000, b"NaN", b"9" * 10_000, b'{"": {}}']


@pytest.mark.parametrize("script", SCRIPTS)
def test_configurations(script, tmp_path):
    file = tmp_path / "conf.json"
    values = {"seed": 3, "dataset": "fake", "fake_shape": [20, 2, 32, 32], "batch_size": 5, "lr": 0.1, "dry_run": True, "amp": False}
    file.write_text(json.dumps(values))
    module = SCRIPTS[script]

    def valid(args: object) -> None:
        assert isinstance(args.seed, int) and args.seed >= 0 and len(args.fake_shape) == 4 and isinstance(args.amp, bool)

    throw(damaged, file, lambda: module.parse_args(["--load-conf", str(file)]), valid, 100)
    for content in HOSTILE_JSON:
        file.write_bytes(content)
        assert attempt(lambda: module.parse_args(["--load-conf", str(file)]), file) is None


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=10)
json_values |= st.sampled_from([10**400, -(10**400), 2**64, 1e308, 1e-320, "9" * 5000, "1e999", "\0", "\ud800", "a\nb", "x" * 20_000])


def names_of_flags(module: object) -> list[str]:
    return sorted(vars(module.parse_args([])))


@pytest.mark.parametrize("script", SCRIPTS)
def test_values_of_every_flag(script, tmp_path):
    file, module = tmp_path / "conf.json", SCRIPTS[script]
    names = names_of_flags(module) + ["paths", "student_paths", "checkpoints", "cifar", "cifarc", "augmix"]

    @examples(250)
    @given(st.dictionaries(st.sampled_from(names), json_values, min_size=1, max_size=3))
    def one(values: dict) -> None:
        file.write_text(json.dumps(values))
        attempt(lambda: module.parse_args(["--load-conf", str(file)]), None)

    one()
    for name in names:
        for value in (10**400, "9" * 5000, "1e999", float("nan"), float("inf"), 2**64, -1, [], {}, [[]], "\0", "\ud800", "a\nb"):
            file.write_text(json.dumps({name: value}))
            args = attempt(lambda: module.parse_args(["--load-conf", str(file)]), None)
            numbers = [] if args is None else [number for number in vars(args).values() if isinstance(number, (int, float))]
            assert all(np.isfinite(float(number)) and (isinstance(number, float) or abs(number) < 2**63) for number in numbers)


@examples(100)
@given(
    st.text(max_size=30)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["9" * 400, "-" + "9" * 400, "9" * 5000, "1e999", "٣", "1_0"])
)
def test_types_of_flags(text):
    for kind in (common.number(int, 0), common.number(float, 0, 1, True, True), common.number(int, 1, 16), common.boolean, common.fake_shape,
                 common.dataset_name):  # fmt: skip
        parser = common.Parser(prog="script.py")
        parser.add_argument("--flag", type=kind)
        attempt(lambda parser=parser: parser.parse_args([f"--flag={text}"]), None)


def test_fake_images_larger_than_the_memory():
    for shape in ("1000000000,10,100000,100000", "1,1000000000000,32,32", f"{10**30},1,1,1", "256,10,32,99999999999999"):
        parser = common.Parser(prog="script.py")
        parser.add_argument("--fake-shape", type=common.fake_shape)
        assert attempt(lambda parser=parser, shape=shape: parser.parse_args(["--fake-shape", shape]), "--fake-shape") is None


def test_seeds_that_torch_takes():
    with torch.random.fork_rng():
        for seed in (0, 2**31, 2**62):
            common.start_machine("cpu", seed=common.number(int, 0)(str(seed)))
            assert torch.initial_seed() == seed


def test_policies(tmp_path):
    file = tmp_path / "policies.jsonl"
    policies = torch.zeros(2, 2, 2, 2, dtype=torch.int64)
    file.write_text("".join(json.dumps(advaa.policy_record(epoch, policies, [1.0, 2.0])) + "\n" for epoch in (1, 2)))

    def valid(result: torch.Tensor) -> None:
        assert result.shape == (2, 2, 2, 2, 2) and result.dtype == torch.int64 and result.min() >= 0
        assert result[..., 0].max() < len(advaa.OPS) and result[..., 1].max() < advaa.MAGNITUDES

    throw(damaged, file, lambda: advaa.read_policies(file, 2, 2, 2), valid, 100)
    for content in HOSTILE_JSON:
        file.write_bytes(content)
        assert attempt(lambda: advaa.read_policies(file, 2, 2, 2), file) is None

    @examples(60)
    @given(json_values)
    def one(value: object) -> None:
        file.write_text(json.dumps({"epoch": 1, "policies": value}))
        assert attempt(lambda: advaa.read_policies(file, 1, 2, 2), file) is None

    one()


RESULTS = {
    "advaa": {"script": "advaa", "dataset": "fake", "model": "resnext", "method": "advaa", "seed": 0, "top1_error": 5.0, "corruptions": {"mean": 3.0}},
    "gretta": {"script": "gretta", "dataset": "fake", "model": "resnext", "method": "vanilla", "seed": 0, "accuracy": {"none": 5.0, "gretta": 6.0},
               "proportion": 0.2, "corruptions": {"fog": {"none": 3.0, "gretta": 2.0}}},
}  # fmt: skip


@pytest.mark.parametrize("script", RESULTS)
def test_results(script, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(RESULTS[script], indent=2))
    throw(damaged, file, lambda: common.table([tmp_path]), lambda text: isinstance(text, str), 100)
    for content in HOSTILE_JSON:
        file.write_bytes(content)
        assert attempt(lambda: common.table([tmp_path]), file) is None
        (tmp_path / "args.json").write_bytes(content)
        assert isinstance(common.arguments_of_run(tmp_path), dict)

    @examples(200)
    @given(st.dictionaries(st.sampled_from([*RESULTS["gretta"], "train_on", "top1_error"]), json_values, min_size=1, max_size=3))
    def one(values: dict) -> None:
        file.write_text(json.dumps(RESULTS[script] | values))
        result = attempt(lambda: common.table([tmp_path]), file)
        assert result is None or isinstance(result, str)

    one()
    for name in (*RESULTS["gretta"], "train_on", "top1_error"):
        for value in (10**400, "x", [], {}, [5], {"a": "b"}, {"a": []}, {"a": {"b": "c"}}, None, True, float("nan")):
            file.write_text(json.dumps(RESULTS[script] | {name: value}))
            attempt(lambda: common.table([tmp_path]), file)


def test_logs(tmp_path):
    file = tmp_path / "log.jsonl"

    def kept() -> list[dict]:
        common.keep_log(file, 2)
        return [json.loads(line) for line in file.read_text().splitlines()]

    def valid(lines: list[dict]) -> None:
        assert all(line["step"] <= 2 for line in lines)

    file.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3)))
    throw(damaged, file, kept, valid, 100)
    for content in [*HOSTILE_JSON, b'{"step": null}\n{"step": "x"}\n{"step": []}\n[5]\n{"step": NaN}\n{"step": 1}\n']:
        file.write_bytes(content)
        valid(attempt(kept, file))
    assert file.read_bytes() == b'{"step": 1}\n'


def test_recorded_checksums(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"model")
    record = tmp_path / "sha256.json"
    common.check_recorded(tmp_path / "model.pt")
    throw(damaged, record, lambda: common.check_recorded(tmp_path / "model.pt") or record, lambda _: None, 80)
    for content in HOSTILE_JSON[:-1]:
        record.write_bytes(content)
        assert attempt(lambda: common.check_recorded(tmp_path / "model.pt") or record, record) is None


def test_what_a_run_left_behind_is_checked_before_it_is_used(tmp_path):
    good = {"step": 1, "history": [], "finished": True}
    common.check_run(good, tmp_path, step=int, history=list, finished=bool)
    for wrong in ({"step": "x"}, {"step": None}, {"history": {}}, {"finished": 5}):
        assert attempt(lambda wrong=wrong: common.check_run(good | wrong, tmp_path, step=int, history=list, finished=bool) or 1, tmp_path) is None
    for script in SCRIPTS.values():
        for results in ({}, {"accuracy": 5}, {"method": [], "model": 5, "top1_error": "x", "top5_error": "x", "shifted": {}, "corruptions": {}}):

            def print_results(script: object = script, results: dict = results) -> None:
                with contextlib.redirect_stdout(io.StringIO()), common.reading_run(tmp_path / "results.json", "evaluate the run again"):
                    script.print_results(results, tmp_path)

            assert attempt(print_results, tmp_path / "results.json") is None


def test_a_refusal_is_one_printable_line(monkeypatch, capsys):
    def main() -> None:
        raise common.InputError("bad\n\x1b[2J\udcff file" + "x" * 100_000 + " and advice")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit):
        common.run_script(main)
    line = capsys.readouterr().err.removesuffix("\n")
    check_line(line, "script.py: error: bad ")
    assert line.endswith("and advice")
