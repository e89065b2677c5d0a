import os
import stat

import pytest

from steadynorm.report import ensure_writable, write_text
from steadynorm.report.files import replacing


def test_a_file_is_written_with_its_folders(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "grün\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "grün\n".encode()
    assert os.listdir(tmp_path / "a") == ["b.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800 of it")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"half {1 // 0}")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_the_usual_permissions_apply(tmp_path):
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "report.html", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == 0o644


def test_a_link_keeps_pointing_to_its_target(tmp_path):
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "target.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "target.txt").read_text() == "new"


def test_a_device_is_written_to_and_not_replaced():
    write_text("/dev/null", "text")
    ensure_writable("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_finding_out_leaves_nothing_behind(tmp_path):
    ensure_writable(tmp_path / "new" / "folder" / "report.html")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("act", [ensure_writable, lambda path: write_text(path, "")])
def test_what_cannot_be_written_is_an_os_error(tmp_path, act):
    (tmp_path / "file").write_text("")
    with pytest.raises(IsADirectoryError):
        act(tmp_path)
    with pytest.raises((NotADirectoryError, FileExistsError)):
        act(tmp_path / "file" / "report.html")
    # A file system that takes no files, whoever asks: permission bits do not stop the superuser.
    with pytest.raises(OSError, match="proc"):
        act("/proc/report.html")
    assert os.listdir(tmp_path) == ["file"]
