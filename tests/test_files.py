"""Files that appear whole or not at all, whatever ends the process or the power."""

import os
import stat

import pytest

from halfstep.errors import RunError
from halfstep.files import appearing, are_one, write_whole


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        done.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        fsync(handle)

    def renamed(old, new):
        done.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "new" / "file", b"content")
    assert done == ["sync file", "rename", "sync folder"]
    assert (tmp_path / "new" / "file").read_bytes() == b"content"


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("error", [Killed, ValueError])
def test_what_is_not_finished_leaves_what_was_there(tmp_path, error):
    write_whole(tmp_path / "file", b"before")

    def half():
        with appearing(tmp_path / "file") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        half()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    write_whole(tmp_path / "file", b"")
    with pytest.raises(RunError, match=r"cannot write .*file/in: .*; choose a directory you own, with space"):
        write_whole(tmp_path / "file" / "in", b"")


def test_paths_are_one_where_both_lead_to_a_file_that_is_there(tmp_path):
    file, link, gone = (tmp_path / name for name in ("file", "link", "gone"))
    file.touch()
    link.symlink_to(file)
    assert are_one(file, link) and are_one(link, file)
    assert not (are_one(file, gone) or are_one(gone, file) or are_one(gone, gone))
    gone.touch()
    assert not are_one(file, gone)
