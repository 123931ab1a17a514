"""Downloads against a server on this machine: whole files, broken-off ones, wrong checksums, servers that are not there; hostile archives."""

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import CONTENT, Handler

import common


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_is_asked_for_once(address, tmp_path):
    file = tmp_path / "sub" / "weights.pth"
    for _ in range(2):
        checks = {"sha256_prefix": hashlib.sha256(CONTENT).hexdigest()[:8], "md5": hashlib.md5(CONTENT).hexdigest()}
        assert common.download(f"{address}/file", file, **checks) == file and file.read_bytes() == CONTENT
    assert Handler.asked == [("/file", None)] and names(file.parent) == ["weights.pth"]


def test_a_broken_off_download_goes_on_where_it_stopped(address, tmp_path, capsys):
    file = tmp_path / "set.tar"
    with pytest.raises(common.InputError, match="broke off after 2,000,000 of 5,120,000 bytes; the same command goes on"):
        common.download(f"{address}/broken", file)
    assert names(tmp_path) == ["set.tar.part"] and (tmp_path / "set.tar.part").read_bytes() == CONTENT[:2_000_000]
    common.download(f"{address}/broken", file, md5=hashlib.md5(CONTENT).hexdigest())
    assert file.read_bytes() == CONTENT and names(tmp_path) == ["set.tar"]
    assert Handler.asked == [("/broken", None), ("/broken", "bytes=2000000-")]
    assert "from byte 2,000,000 on" in capsys.readouterr().out


@pytest.mark.parametrize("path, held", [("/whole", CONTENT[:1000]), ("/file", CONTENT + b"more")])
def test_a_server_that_cannot_go_on_sends_the_whole(path, held, address, tmp_path):
    (tmp_path / "set.tar.part").write_bytes(held)
    assert common.download(f"{address}{path}", tmp_path / "set.tar").read_bytes() == CONTENT and names(tmp_path) == ["set.tar"]


@pytest.mark.parametrize("checks", [{"md5": "0" * 32}, {"sha256_prefix": "01234567"}])
def test_a_file_of_another_checksum_is_removed(checks, address, tmp_path):
    with pytest.raises(common.InputError, match=r"set.tar yourself") as caught:
        common.download(f"{address}/file", tmp_path / "set.tar", **checks)
    assert next(iter(checks)).removesuffix("_prefix") in str(caught.value) and next(iter(checks.values())) in str(caught.value)
    assert names(tmp_path) == []


def test_what_is_not_there_is_named(address, tmp_path):
    with pytest.raises(common.InputError, match="cannot download .*/nothing .*404.*put the file at"):
        common.download(f"{address}/nothing", tmp_path / "set.tar")
    with pytest.raises(common.InputError, match="cannot download http://127.0.0.1:9/"):
        common.download("http://127.0.0.1:9/set.tar", tmp_path / "set.tar")
    assert names(tmp_path) == []


@pytest.mark.parametrize("held", [b"", CONTENT[:1000]])
@pytest.mark.parametrize("kind, page", [("text/html; charset=utf-8", b"quota exceeded"), (None, b"\n<!DOCTYPE html><html>...")])
def test_a_page_in_place_of_the_file_is_refused(kind, page, held, address, tmp_path, monkeypatch):
    """What an earlier call fetched stays: the page says nothing about it."""
    monkeypatch.setattr(Handler, "archives", {"/whole/page": page})
    monkeypatch.setattr(Handler, "kinds", {"/whole/page": kind} if kind else {})
    if held:
        (tmp_path / "set.tar.part").write_bytes(held)
    with pytest.raises(common.InputError) as caught:
        common.download(f"{address}/whole/page", tmp_path / "set.tar")
    file = tmp_path / "set.tar"
    assert str(caught.value) == f"{address}/whole/page answered with a page, not the file (quota?): fetch it in a browser and put it at {file}"
    assert names(tmp_path) == (["set.tar.part"] if held else [])
    assert not held or (tmp_path / "set.tar.part").read_bytes() == held


# ---------------------------------------------------------------------------------------------------------------------
# Archives
# ---------------------------------------------------------------------------------------------------------------------


def make_tar(members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def serve(address, monkeypatch):
    def serve(content: bytes, md5: str | None = None) -> None:
        monkeypatch.setattr(Handler, "archives", {"/CIFAR-10-C.tar": content})
        entry = (f"{address}/CIFAR-10-C.tar", md5 or hashlib.md5(content).hexdigest(), ["CIFAR-10-C"])
        monkeypatch.setitem(common.ARCHIVES, "cifar10-c", ("", [entry]))

    return serve


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_data_set_is_fetched_and_unpacked_once(mode, serve, tmp_path, monkeypatch, capsys):
    serve(make_tar({"CIFAR-10-C/fog.npy": b"fog", "CIFAR-10-C/labels.npy": b"labels"}, mode))
    monkeypatch.setattr(sys, "argv", ["common.py", "--download", "CIFAR-10-C", "--data-root", str(tmp_path / "data")])
    for _ in range(2):
        common.main()
    assert str(tmp_path / "data" / "CIFAR-10-C") in capsys.readouterr().out and len(Handler.asked) == 1
    assert names(tmp_path / "data") == ["CIFAR-10-C"] and names(tmp_path / "data" / "CIFAR-10-C") == ["fog.npy", "labels.npy"]
    assert (tmp_path / "data" / "CIFAR-10-C" / "fog.npy").read_bytes() == b"fog"


@pytest.mark.parametrize(
    "member, content",
    [
        ("../outside", b"x"),
        ("CIFAR-10-C/../../outside", b"x"),
        ("/outside", b"x"),
        ("other/file", b"x"),
        ("CIFAR-10-C/link", link("CIFAR-10-C/link", "/etc")),
        ("CIFAR-10-C/hard", link("CIFAR-10-C/hard", "../../outside", tarfile.LNKTYPE)),
        ("CIFAR-10-C/pipe", link("CIFAR-10-C/pipe", "", tarfile.FIFOTYPE)),
    ],
)
def test_a_hostile_archive_is_refused_and_nothing_is_written(member, content, serve, tmp_path):
    serve(make_tar({"CIFAR-10-C/fog.npy": b"fog", member: content}))
    with pytest.raises(common.InputError) as caught:
        common.fetch("cifar10-c", tmp_path / "deep" / "data")
    assert member in str(caught.value) and "nothing was unpacked" in str(caught.value)
    assert names(tmp_path / "deep" / "data") == ["CIFAR-10-C.tar"] and names(tmp_path / "deep") == ["data"] and names(tmp_path) == ["deep"]


def test_a_damaged_or_another_archive(serve, tmp_path):
    whole = make_tar({"CIFAR-10-C/fog.npy": bytes(range(256)) * 1000}, "w:gz")
    serve(whole[: len(whole) // 2])
    with pytest.raises(common.InputError, match="cannot be unpacked .*remove it"):
        common.fetch("cifar10-c", tmp_path)
    assert names(tmp_path) == ["CIFAR-10-C.tar"]
    (tmp_path / "CIFAR-10-C.tar").unlink()
    serve(whole, md5="0" * 32)
    with pytest.raises(common.InputError, match="its md5 is .*so it was removed"):
        common.fetch("cifar10-c", tmp_path)
    assert names(tmp_path) == []


def test_published_archives_are_those_of_torchvision():
    from torchvision.datasets import CIFAR10, CIFAR100, MNIST

    for name, data in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        assert common.ARCHIVES[name] == ("", [(data.url, data.tgz_md5, [data.base_folder])])
    target, files = common.ARCHIVES["mnist"]
    assert target == "MNIST/raw" and [(Path(url).name, md5) for url, md5, _ in files] == MNIST.resources
    assert all(url.startswith(tuple(MNIST.mirrors)) and members == [Path(url).name] for url, _, members in files)
