"""Files that are whole at every moment: whoever else writes, reads, links or is killed in the middle."""

import errno
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstlib import files
from dstlib.errors import StateError
from dstlib.files import locked, make_folder, read_whole, write_json, write_whole

OURS = f".dstlib-{files._MACHINE}-0123456789abcdef.tmp"
THEIRS = ".dstlib-01234567-0123456789abcdef.tmp"


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def refuse(error: OSError) -> None:
    raise StateError(f"refused: {error.strerror}")


def killed_while_it_writes(path: Path) -> None:
    """Lets a process die between the content and the name."""
    pid = os.fork()
    if pid == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_whole(path, b"half")
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_writers_of_one_path_each_write_a_whole_file(tmp_path):
    """Processes and threads; of the build before, a third of what was read was torn."""
    path, contents = tmp_path / "file", [bytes([65 + i]) * (300_000 + 200_000 * i) for i in range(4)]
    write_whole(path, contents[0])
    until, pids = time.time() + 1.5, []
    for pair in (contents[:2], contents[2:]):
        pid = os.fork()
        if pid == 0:
            failed: list[BaseException] = []

            def write(content: bytes, failed: list[BaseException] = failed) -> None:
                try:
                    while time.time() < until:
                        write_whole(path, content)
                except BaseException as error:
                    failed.append(error)

            threads = [threading.Thread(target=write, args=(content,)) for content in pair]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os._exit(len(failed))
        pids.append(pid)
    read = []
    while time.time() < until:
        read.append(path.read_bytes())
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert all(content in contents for content in read)
    assert len({*read}) > 1
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_cleared_by_the_next_writer(tmp_path):
    write_whole(tmp_path / "file", b"old")
    killed_while_it_writes(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    write_whole(tmp_path / "other", b"new")
    assert names(tmp_path) == ["file", "other"]


@pytest.mark.parametrize(
    ("name", "days", "is_cleared"),
    [(OURS, 0, True), (THEIRS, 0, False), (THEIRS, 2, True), ("file.tmp", 2, False), (f"a{OURS}", 2, False)],
)
def test_only_files_of_our_own_that_are_surely_dead_are_cleared(name, days, is_cleared, tmp_path):
    (tmp_path / name).touch()
    os.utime(tmp_path / name, times=(time.time() - days * 86400,) * 2)
    write_whole(tmp_path / "file", b"")
    assert (tmp_path / name).exists() != is_cleared


def test_what_another_process_writes_at_the_moment_is_not_cleared(tmp_path, monkeypatch):
    real = os.replace

    def replace(source, target):
        os.utime(source, times=(0, 0))  # however old it looks
        monkeypatch.setattr(os, "replace", real)
        write_whole(tmp_path / "other", b"other")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_whole(tmp_path / "file", b"file")
    assert (tmp_path / "file").read_bytes() == b"file"


def test_where_there_are_no_locks_only_what_is_old_is_cleared(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / OURS).touch()
    write_whole(tmp_path / "file", b"file")
    assert names(tmp_path) == [OURS, "file"]
    os.utime(tmp_path / OURS, times=(0, 0))
    write_whole(tmp_path / "file", b"again")
    assert names(tmp_path) == ["file"]
    with pytest.raises(StateError, match="refused: No locks"), locked(tmp_path, if_held=print, refuse=refuse):
        pytest.fail("nothing is held")


def test_a_temporary_file_that_another_clears_at_once_is_made_anew(tmp_path, monkeypatch):
    real, made = files._hold, []

    def hold(file, **options):
        made.append(file.name)
        if len(made) <= 2:  # before this one holds it: once the name is gone, once it is held
            [temporary] = [each for each in tmp_path.iterdir() if each.name.endswith(".tmp")]
            temporary.unlink()
            return len(made) == 1
        return real(file, **options)

    monkeypatch.setattr(files, "_hold", hold)
    write_whole(tmp_path / "file", b"file")
    assert (len(made), names(tmp_path)) == (3, ["file"])


def victim(folder: Path) -> Path:
    (folder / "outside").mkdir()
    (folder / "outside" / "victim").write_text("precious")
    (folder / "outside" / "victim").chmod(0o640)
    return folder / "outside" / "victim"


def test_a_link_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path):
    (tmp_path / "file").symlink_to(victim(tmp_path))
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "outside" / "victim").read_text() == "precious"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_no_link_that_looks_as_ours_is_followed(tmp_path):
    for name in (OURS, ".lock", "file.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "outside" / "victim")
    (tmp_path / f"{OURS[:-5]}0.tmp").mkdir()
    os.mkfifo(tmp_path / f"{OURS[:-5]}1.tmp")
    victim(tmp_path)
    write_whole(tmp_path / "file", b"new")
    with pytest.raises(StateError, match=r"refused: one whose \.lock is a link"):  # noqa: SIM117
        with locked(tmp_path, if_held=print, refuse=refuse):
            pytest.fail("it is held by a link")
    assert (tmp_path / "outside" / "victim").read_text() == "precious"
    assert (tmp_path / OURS).is_symlink()


def test_a_folder_on_another_disk_is_written_to_through_its_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    write_whole(tmp_path / "runs" / "file", b"new")
    assert names(tmp_path / "scratch") == ["file"]


def test_a_lock_keeps_what_is_in_it(tmp_path):
    (tmp_path / ".lock").write_text("whatever")
    with locked(tmp_path, if_held=print, refuse=refuse):
        assert (tmp_path / ".lock").read_text() == "whatever"
    assert (tmp_path / ".lock").read_text() == "whatever"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_new_files_and_a_replaced_one_its_own(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "new", b"")
        for mode in (0o600, 0o664, 0o444):
            (tmp_path / f"{mode}").touch()
            (tmp_path / f"{mode}").chmod(mode)
            write_whole(tmp_path / f"{mode}", b"secret")
            assert stat.S_IMODE((tmp_path / f"{mode}").stat().st_mode) == mode
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


def test_a_secret_is_no_more_readable_while_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch(0o600)
    modes, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (modes.append(stat.S_IMODE(os.fstat(number).st_mode)), real(number))
    )
    write_whole(tmp_path / "file", b"secret")
    assert modes[0] == 0o600


def test_the_folder_is_put_on_the_disk_after_the_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda n: (done.append("d" if os.path.isdir(f"/proc/self/fd/{n}") else "f"), sync(n))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("r"), replace(a, b)))
    write_whole(tmp_path / "file", b"new")
    assert done == ["f", "r", "d"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (
            errno.ENOSPC,
            r"No space left on device.*Make room, then repeat the command \(with --resume, if it has that option\)\.",
        ),
        (errno.EDQUOT, "Disk quota exceeded.*Make room, then repeat"),
        (errno.EROFS, "Read-only file system.*Choose a folder that you may write to"),
        (errno.EACCES, "Permission denied.*Choose a folder that you may write to"),
        (errno.EIO, "Input/output error.*Repair what the system says"),
    ],
)
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_what_the_system_refuses_is_one_error_and_leaves_the_old_file(call, number, text, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    write_whole(tmp_path / "file", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refused)
        with pytest.raises(StateError, match=rf"file of folder .*: expected a disk to write to, got .*{text}"):
            write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a" * 256, "File name too long.*Choose a shorter name"),
        ("a\0b", "No file can have this name"),
        ("folder", "Another thing than a file has that name"),
        ("pipe", "Another thing than a file has that name"),
        ("none/file", "No such file or directory"),
    ],
)
def test_what_is_no_place_for_a_file_is_one_error(name, text, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StateError, match=text):
        write_whole(tmp_path / name, b"")
    assert names(tmp_path) == ["folder", "pipe"]


@pytest.mark.parametrize("name", ["a" * 255, os.fsdecode(b"caf\xe9"), "日本", " ", "a\x1b[2J\nb"])
def test_every_name_that_the_system_takes_can_be_written(name, tmp_path):
    write_whole(tmp_path / name, b"new")
    assert read_whole(tmp_path / name, max_bytes=3) == b"new"
    with pytest.raises(StateError) as refused:
        write_whole(tmp_path / name / "below", b"new")
    assert str(refused.value).isprintable()
    str(refused.value).encode()


@settings(max_examples=30, deadline=None)
@given(old=st.binary(max_size=50) | st.none(), new=st.binary(max_size=50))
def test_what_is_written_is_read(old, new, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "file"
    for content in (old, new):
        if content is not None:
            write_whole(path, memoryview(content))
            assert read_whole(path, max_bytes=50) == content


def test_what_is_longer_than_it_may_be_is_not_read(tmp_path):
    write_whole(tmp_path / "file", b"12345")
    with pytest.raises(OSError, match="5 bytes, of 4 at most"):
        read_whole(tmp_path / "file", max_bytes=4)


def test_json_that_is_no_json_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_a_folder_without_a_possible_name_is_refused(tmp_path):
    with pytest.raises(StateError, match="No file can have this name"):
        make_folder(tmp_path / "a\0b")


def test_a_lock_is_no_program(tmp_path):
    with locked(tmp_path, if_held=refuse, refuse=refuse):
        assert not (tmp_path / ".lock").stat().st_mode & 0o111


@pytest.mark.parametrize("is_full", [False, True])
def test_where_no_open_file_is_renamed_or_removed_it_is_closed_first(is_full, tmp_path, monkeypatch):
    """As on Windows, where nothing could be written otherwise."""

    def refuse_open(path: str | Path) -> None:
        descriptors = (Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        if any(os.readlink(each) == str(path) for each in descriptors if each.is_symlink()):
            raise PermissionError(errno.EACCES, "in use", str(path))

    replace, unlink = os.replace, Path.unlink
    monkeypatch.setattr(files, "_REPLACES_OPEN", False)
    monkeypatch.setattr(os, "replace", lambda a, b: (refuse_open(a), replace(a, b)))
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (refuse_open(path), unlink(path, **options)))
    if is_full:
        monkeypatch.setattr(os, "fsync", lambda number: os.close(-1))
        with pytest.raises(StateError, match="whole"):
            write_whole(tmp_path / "file", b"new")
    else:
        write_whole(tmp_path / "file", b"new")
    assert names(tmp_path) == [] if is_full else ["file"]
