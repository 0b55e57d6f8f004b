import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ticketfind import TicketfindError, files
from ticketfind.tensorfile import read_tensors, save_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    files.write_text(path, "old")
    with files.whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename within one file system is atomic
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, TicketfindError])
def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(error), files.whole(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a.txt", "")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, reason in [(tmp_path / "file" / "a", "Not a directory|File exists"), (tmp_path / "folder", "directory")]:
        with pytest.raises(TicketfindError, match=f"{path}: cannot write: .*({reason})"):
            files.write_text(path, "x")
    assert names(tmp_path) == ["file", "folder"]


def test_a_folder_that_has_gone_is_not_begun_anew(tmp_path):
    root = tmp_path / "run"
    for path in (root / "finished", root / "init" / "deep" / "0.safetensors"):
        with pytest.raises(TicketfindError, match=f"{path}: cannot write: No such file or directory"):
            files.write_text(path, "", root)
    assert names(tmp_path) == []
    root.mkdir()
    files.write_text(root / "init" / "deep" / "0.safetensors", "", root)
    assert names(root / "init" / "deep") == ["0.safetensors"]


def test_new_names_are_on_disk_and_folders_too(tmp_path, monkeypatch):
    """Each folder is flushed after what is new in it has got its name."""
    synced = []
    monkeypatch.setattr(files, "_sync", lambda path: synced.append((path.name, names(path) if path.is_dir() else None)))
    (tmp_path / "a").mkdir()
    files.write_text(tmp_path / "a" / "b" / "c" / "d.txt", "")
    temporary = synced.pop(2)
    assert temporary[0].startswith(".d.txt.") and temporary[1] is None
    assert synced == [("a", ["b"]), ("b", ["c"]), ("c", ["d.txt"])]


def test_the_first_error_is_told_though_nothing_can_be_removed(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    with pytest.raises(ValueError, match="the reason"), files.whole(tmp_path / "a.txt"):
        monkeypatch.setattr(Path, "unlink", fail)
        raise ValueError("the reason")


def test_a_name_may_be_as_long_as_the_system_allows_and_no_longer(tmp_path):
    files.write_text(tmp_path / ("ä" * 127), "x")
    assert (tmp_path / ("ä" * 127)).read_text() == "x"
    for path in (tmp_path / ("a" * 256), tmp_path / ("b" * 256) / "c"):
        with pytest.raises(TicketfindError, match="cannot write: File name too long"):
            files.write_text(path, "x")
    assert names(tmp_path) == ["ä" * 127]


# ------------------------------------------------------------------------------------------------ tensors


def test_tensors_of_any_kind_come_back_bit_for_bit(tmp_path):
    shared = torch.randn(4, 6)
    tensors = {
        "float": shared,
        "transposed": shared.T,
        "part of it": shared[1:3, ::2],
        "bool": shared > 0,
        "bfloat16": shared.bfloat16(),
        "int": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "nan": torch.tensor([float("nan"), -0.0]),
        "leaf": torch.nn.Parameter(torch.ones(2)),
    }
    save_tensors(tmp_path / "t.safetensors", tensors, {"key": "ä"})
    found, metadata = read_tensors(tmp_path / "t.safetensors", "mask")
    assert metadata == {"key": "ä"}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(found["nan"][1])


def test_files_are_plain_safetensors(tmp_path):
    save_tensors(tmp_path / "t.safetensors", {"w": torch.arange(3.0)})
    assert load_file(tmp_path / "t.safetensors")["w"].tolist() == [0, 1, 2]
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert not file.metadata()


def test_a_tensor_file_that_fails_is_not_written(tmp_path):
    with pytest.raises(TicketfindError, match=r"cannot write"):
        save_tensors(tmp_path, {"w": torch.ones(2)})
    assert names(tmp_path) == []


def damaged(folder: Path, how: str) -> Path:
    path = folder / "t.safetensors"
    save_tensors(path, {"w": torch.ones(100)})
    raw = path.read_bytes()
    contents = {
        "empty": b"",
        "half": raw[: len(raw) // 2],
        "one byte short": raw[:-1],
        "one byte long": raw + b"x",
        "a web page": b"<!DOCTYPE html><title>404</title>" * 9,
        "a huge header": b"\xff" * 8 + raw[8:],
    }
    path.write_bytes(contents[how])
    return path


@pytest.mark.parametrize("how", ["empty", "half", "one byte short", "one byte long", "a web page", "a huge header"])
def test_damaged_files_are_named(tmp_path, how):
    path = damaged(tmp_path, how)
    with pytest.raises(TicketfindError, match=f"ticket {path}: expected a safetensors file; reading it failed: "):
        read_tensors(path, "ticket")


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(TicketfindError, match=r"ticket .*: no such file"):
        read_tensors(tmp_path / name, "ticket")
