"""Disks that are full and folders that cannot be written: one clear error, and what was there before is whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

import dbattn
from dbattn.cli import main
from dbattn.files import cache_folder, check_output, disk_errors, write_json
from dbattn.snapshot import describe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def full_disk(monkeypatch):
    """What safetensors does on one (measured on a tmpfs): half of the file, and an error of its own."""

    def save_file(tensors, path):
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    return lambda: monkeypatch.setattr(safetensors.torch, "save_file", save_file)


def test_a_save_to_a_full_disk_is_an_os_error_that_names_the_folder(full_disk, tmp_path):
    db = dbattn.AttentionDB(2, 16)
    db.insert(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16))
    db.save(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    db.insert(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16))
    full_disk()
    with pytest.raises(OSError, match=r"No space left on device .*make room.*: '.*/a'") as caught:
        db.save(tmp_path / "a")
    assert caught.value.errno == 28
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_an_ingest_to_a_full_disk_ends_with_1_and_one_line(full_disk, model_folder, tmp_path, capsys):
    book, out = tmp_path / "book.txt", tmp_path / "book.dbattn"
    book.write_text("A short text. " * 40)
    words = ["ingest", str(book), "--out", str(out), "--model", str(model_folder), "--quiet"]
    assert main([*words, "--tokens", "50"]) == 0
    full_disk()
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert str(out) in line
    assert describe(out).rows == 50


def test_errors_of_libraries_about_the_disk_become_os_errors_and_others_stay_theirs(tmp_path):
    for raised in (Exception("No space left on device (os error 28)"), OSError(28, "No space left on device")):
        with pytest.raises(OSError, match=f"make room .*: '{tmp_path}'"), disk_errors(tmp_path):
            raise raised
    with pytest.raises(PermissionError, match=f"'{tmp_path}'"), disk_errors(tmp_path):
        raise SafetensorError("Permission denied (os error 13)")
    for other in (SafetensorError("header too large"), OSError("ours"), FileNotFoundError(2, "none", "elsewhere")):
        with pytest.raises(type(other)) as caught, disk_errors(tmp_path):
            raise other
        assert caught.value is other


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_json_to_a_full_device_names_it_and_leaves_the_device_as_it_is(tmp_path):
    with pytest.raises(OSError, match=r"No space left .*'/dev/full'"):
        write_json(Path("/dev/full"), {"a": 1})
    write_json(Path(os.devnull), {"a": 1})
    assert Path(os.devnull).is_char_device()
    assert Path("/dev/full").is_char_device()


def test_a_result_may_go_to_a_pipe(tmp_path):
    read, write = os.pipe()
    write_json(Path(f"/dev/fd/{write}"), {"a": 1})
    assert os.read(read, 100) == b'{\n  "a": 1\n}\n'
    os.close(read)
    os.close(write)


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    check_output("--json", tmp_path / "a.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=f"--json {tmp_path}/a.json: {tmp_path} cannot be written"):
        check_output("--json", tmp_path / "a.json")


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    for name in ("DBATTN_CACHE", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null/none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_without_a_home_the_cache_is_a_private_folder_and_a_warning_names_the_variable(no_home, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="/dev/null/none/.cache/dbattn cannot be made.*DBATTN_CACHE.*NUMBA_CACHE_DIR"):
        folder = cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    # Compiled code is read from there: a folder that others can write to is refused.
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="is not this user's alone: set DBATTN_CACHE"):
        cache_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="is not this user's alone: set DBATTN_CACHE"):
        cache_folder()
    monkeypatch.setenv("DBATTN_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"


def test_kernels_of_a_read_only_install_are_cached_elsewhere(no_home, tmp_path):
    """A file in the place of __pycache__ stands for the folder that cannot be written (a test may run as root)."""
    copy = shutil.copytree(
        ROOT / "index_kernels", tmp_path / "site" / "index_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    (copy / "__pycache__").touch()
    code = "import index_kernels._cpu_unseal as kernels; print(kernels.unseal.stats.cache_path, kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy.parent,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert str(copy) in done.stdout
    assert "NUMBA_CACHE_DIR" in done.stderr
    (folder,) = tmp_path.glob("dbattn-*/numba")
    assert any(folder.iterdir())


def test_a_model_that_cannot_be_converted_for_want_of_a_folder_names_the_variable(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "a.gguf").write_bytes(b"GGUF and the rest")
    monkeypatch.setenv("DBATTN_CACHE", str(tmp_path / "file"))
    assert main(["cost", "--model", str(tmp_path / "a.gguf")]) == 2
    assert "set DBATTN_CACHE to a folder that can be written" in capsys.readouterr().err
