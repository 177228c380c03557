"""Files whole or not at all, when a write fails at any place; errors that name the file."""

import errno
import os

import numpy as np
import pytest

from fibldm import disk
from fibldm.disk import create_array, keep, naming, replace_text, write_atomically


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


def test_an_array_takes_its_room_at_once(tmp_path, monkeypatch):
    """Sparse files would fail at any time while they are written."""
    path = tmp_path / "a.npy"
    made = create_array(path, np.float32, (50, 1000))
    assert path.stat().st_blocks * 512 >= made.nbytes == 200_000
    made[3] = 1
    made.flush()
    assert np.array_equal(np.load(path)[3], np.ones(1000)) and not np.load(path)[4].any()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    path = tmp_path / "b.npy"
    with pytest.raises(OSError, match=r"device for 0\.2 MiB, .* MiB are free: '.*b\.npy'"):
        create_array(path, np.float32, (50, 1000))
    assert not path.exists()
