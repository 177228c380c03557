"""Files whole or not at all, when a write fails at any place; errors that name the file."""

import errno
import os
import stat

import numpy as np
import pytest

from fibldm import disk
from fibldm.disk import (
    StoredRows,
    create_rows,
    keep,
    naming,
    replace_text,
    write_atomically,
)


@pytest.mark.parametrize("place", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(place, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    replace_text(path, "old")
    assert path.read_text() == "old"

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(temporary):
        temporary.write_text("half")
        if place == "write":
            fail()

    if place != "write":
        monkeypatch.setattr(disk.os, place, fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"):
        write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_errors_get_the_name_of_the_file_they_lack(tmp_path):
    with pytest.raises(OSError, match=r"requested and 5 written: 'x\.npy'"), naming("x.npy"):
        raise OSError("9 requested and 5 written")  # as NumPy has it
    with pytest.raises(FileNotFoundError, match="other"), naming("x.npy"):
        (tmp_path / "other").read_text()


def test_a_kept_file_outlives_the_one_it_was(tmp_path, monkeypatch):
    path, kept = tmp_path / "last.pth", tmp_path / "step_1.pth"
    path.write_text("one")
    keep(path, kept)
    keep(path, kept)
    replace_text(path, "two")
    assert (path.read_text(), kept.read_text()) == ("two", "one")

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(disk.os, "link", no_links)
    keep(path, kept)
    assert kept.read_text() == "two" and set(tmp_path.iterdir()) == {path, kept}


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "u1", ">i8"])
def test_stored_rows_are_those_of_the_file(dtype, tmp_path):
    array = np.random.default_rng(0).integers(0, 200, (9, 2, 3, 4)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    rows = StoredRows(tmp_path / "a.npy")
    assert len(rows) == 9 and rows.shape == array.shape and rows.dtype == array.dtype
    for index in (3, -1, [4, 2, 2], slice(5, 8), slice(None), np.array([1, 8])):
        assert np.array_equal(rows[index], array[index])
    assert rows[[]].shape == (0, 2, 3, 4)
    with pytest.raises(IndexError):
        rows[9]


@pytest.mark.parametrize("shape", [(9, 2, 3, 4), (9, 5), (0, 3)])
def test_rows_that_are_written_are_there(shape, tmp_path):
    rows = create_rows(tmp_path / "a.npy", np.float16, shape)
    array = np.zeros(shape, np.float16)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for index in ([7, 2], slice(4, 6), 8) if len(array) else ([],):
        rows[index] = values[index] if len(array) else values
        array[index] = values[index] if len(array) else values
    rows.flush()
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)
    assert np.array_equal(StoredRows(tmp_path / "a.npy")[:], array)


def test_reads_and_writes_go_on_where_the_system_stops(tmp_path, monkeypatch):
    """Some file systems read and write less than they are asked to."""
    rows = create_rows(tmp_path / "a.npy", np.float32, (3, 10))
    read, write, values = os.preadv, os.pwrite, np.arange(30, dtype=np.float32).reshape(3, 10)
    monkeypatch.setattr(os, "preadv", lambda file, to, at: read(file, [to[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda file, of, at: write(file, of[:7], at))
    rows[:] = values
    assert np.array_equal(rows[:], values) and np.array_equal(np.load(tmp_path / "a.npy"), values)


def test_other_files_hold_no_rows(tmp_path):
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.zeros((2, 3, 4, 5))))
    np.save(tmp_path / "words.npy", np.full((1, 1), "a"))
    np.save(tmp_path / "number.npy", np.float32(1))
    np.savez(tmp_path / "many.npz", a=np.zeros(3))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"{path.stem}\.npy: (expected|its last axis)"):
            StoredRows(path)


def test_room_is_asked_for_before_rows_are_written(tmp_path, monkeypatch):
    usage = disk.shutil.disk_usage(tmp_path)._replace(free=2**17)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"No space .* 0\.2 MiB, 0\.1 are free: '.*a\.npy'") as error:
        create_rows(tmp_path / "a.npy", np.float32, (50, 1000))
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_without_locks_and_flushes_of_folders_it_goes_on_with_a_warning(
    tmp_path, monkeypatch, capsys
):
    """As on Lustre without flock, and on CIFS; other errors of these calls are errors."""
    real = os.fsync

    def refuse(number: int):
        def call(handle: int, *rest: object) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(number, os.strerror(number))
            real(handle)

        monkeypatch.setattr(disk.fcntl, "flock", call)
        monkeypatch.setattr(disk.os, "fsync", call)

    for number in (errno.ENOSYS, errno.EINVAL):
        refuse(number)
        folder = tmp_path / str(number)
        with disk.locked(folder):
            for name in ("a", "b"):
                disk.replace_text(folder / name, "text")
        said = capsys.readouterr().out
        assert said.count("has no locks") == said.count("cannot flush folders") == 1
        assert (folder / "b").read_text() == "text"
    refuse(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), disk.locked(tmp_path):
        pass
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.sync_folder(tmp_path)
