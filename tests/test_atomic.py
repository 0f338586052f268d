"""andromeda.atomic: whatever happens to the writer, the directory is the old one or the new one."""

import errno
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from andromeda import atomic
from andromeda.atomic import atomic_directory, latest, replace_file
from andromeda.errors import AndromedaError

NAMES = ("a", "b", "folder/c")  # the files of a version, all with the same text


def anything(_: Path) -> bool:
    return True


def write(target: Path, text: str) -> None:
    with atomic_directory(target, replaceable=anything) as folder:
        for name in NAMES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


def read(target: Path) -> str:
    """The version that lies there; fails on a mix."""
    folder = latest(target)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == list(NAMES)
    texts = {(folder / name).read_text() for name in NAMES}
    assert len(texts) == 1
    return texts.pop()


def in_child(work: Callable[[], object]) -> int:
    """Runs `work` in a forked process, whose number is returned at once."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def kill_at_step(step: int) -> None:
    """Has this process killed just before its `step`-th call (from now) that touches files."""
    steps = itertools.count()

    def hook(event: str, _: object) -> None:
        if event.startswith(("open", "os.", "shutil.", "fcntl.")) and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.fixture(params=["exchange", "renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Both ways to replace a directory."""
    if request.param == "renames":
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    else:
        for name in ("one", "other"):
            (tmp_path / "probe" / name).mkdir(parents=True)
        if not atomic._exchange(tmp_path / "probe/one", tmp_path / "probe/other"):
            pytest.skip("this file system cannot exchange two directories")
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_a_directory_appears_whole_and_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "parents" / "made" / "run"
    with atomic_directory(target, replaceable=anything) as folder:
        (folder / "stray").touch()
        assert not target.exists()
    target.chmod(0o750)
    write(target, "second")
    assert read(target) == "second"
    assert target.stat().st_mode & 0o777 == 0o750
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.usefixtures("way")
def test_an_exception_leaves_the_old_one_and_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "here" / "run"
    write(target, "old")
    with pytest.raises(ZeroDivisionError), atomic_directory(target, replaceable=anything) as folder:
        (folder / "a").write_text(str(1 / 0))
    assert read(target) == "old"
    assert list(target.parent.iterdir()) == [target]


def test_killed_at_every_step(tmp_path: Path, way: str) -> None:
    target = tmp_path / "here" / "run"
    write(target, "old")
    versions = []
    for step in itertools.count():

        def work(step: int = step) -> None:
            kill_at_step(step)
            write(target, "new")

        _, status = os.waitpid(in_child(work), 0)
        versions.append(read(target))  # old or new, whole
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        write(target, "old")  # as a next writer would: it also clears what the dead one left
        assert list(target.parent.iterdir()) == [target]
    assert len(versions) > 20
    assert versions == sorted(versions, reverse=True)  # old up to some step, new from there on
    assert "old" in versions
    assert versions.count("new") > 1, f"{way}: killed after the replacement as well"


@pytest.mark.parametrize("failing", range(6))
@pytest.mark.usefixtures("way")
def test_a_full_disk_at_every_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Where allocation is delayed, a full disk shows only when files are flushed."""
    target = tmp_path / "here" / "run"
    write(target, "old")
    calls = itertools.count()

    def fsync(_: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    # The directory, its folder and its three files; then, with the new version in its place, the parent.
    version, consequence = ("old", "is unchanged") if failing < 5 else ("new", "is in place")
    with pytest.raises(AndromedaError, match=f"No space left on device.*{consequence}"):
        write(target, "new")
    assert read(target) == version
    assert list(target.parent.iterdir()) == [target]


def test_what_is_written_is_flushed_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name an open file")
    events: list[str] = []
    fsync, exchange, parent = os.fsync, atomic._exchange, tmp_path / "here"

    def noting_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(parent).as_posix())
        fsync(descriptor)

    def noting_exchange(one: Path, other: Path) -> bool:
        events.append("exchange")
        return exchange(one, other)

    write(parent / "run", "old")
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(atomic, "_exchange", noting_exchange)
    write(parent / "run", "new")
    temporary = events[0]
    before = {temporary, f"{temporary}/folder", *(f"{temporary}/{name}" for name in NAMES)}
    assert set(events[: len(before)]) == before
    assert events[len(before) :] == ["exchange", "."]


def test_the_first_rename_is_undone_when_the_second_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "here" / "run"
    write(target, "old")
    rename = os.rename

    def failing_rename(source: Path, destination: Path) -> None:
        if ".tmp-" in source.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, destination)

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", failing_rename)
    with pytest.raises(AndromedaError, match="unchanged"):
        write(target, "new")
    assert read(target) == "old"
    assert list(target.parent.iterdir()) == [target]


def test_a_version_moved_aside_is_found_and_put_back(tmp_path: Path) -> None:
    target = tmp_path / "here" / "run"
    write(target, "old")
    target.rename(target.with_name(".run.old"))
    assert read(target) == "old"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target, replaceable=anything):
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == [target]


def test_leftovers_go_when_their_writer_is_dead(tmp_path: Path) -> None:
    target, here = tmp_path / "run", atomic._machine()
    dead, other_target = tmp_path / f".run.tmp-1-{here}-0123abcd", tmp_path / f".run.tmp-x.tmp-1-{here}-0123abcd"
    elsewhere, long_ago = tmp_path / ".run.tmp-1-00000000-00000001", tmp_path / ".run.tmp-1-00000000-00000002"
    for leftover in (dead, other_target, elsewhere, long_ago):
        leftover.mkdir()
        (leftover / "weights").touch()
    two_days_ago = time.time() - 2 * 86400
    os.utime(long_ago, (two_days_ago, two_days_ago))
    write(target, "new")
    assert set(tmp_path.iterdir()) == {target, other_target, elsewhere}


def test_a_live_writer_keeps_its_directory(tmp_path: Path) -> None:
    target = tmp_path / "here" / "run"
    with atomic_directory(target, replaceable=anything) as folder:
        for name in NAMES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("first to begin")
        write(target, "last to begin")
        assert read(target) == "last to begin"
    assert read(target) == "first to begin"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.usefixtures("way")
def test_several_writers_at_the_same_time(tmp_path: Path) -> None:
    target = tmp_path / "here" / "run"

    def work(name: str) -> None:
        for number in range(20):
            write(target, f"{name}{number}")

    with ThreadPoolExecutor() as pool:
        assert len(list(pool.map(work, "xyz"))) == 3  # none failed
    assert read(target)[1:] == "19"
    assert list(target.parent.iterdir()) == [target]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    for content in ("äöü\r\n", b"\xff"):  # line ends stay as they are
        replace_file(target, content)
        assert target.read_bytes() == (content.encode() if isinstance(content, str) else content)

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        replace_file(target, "new")
    assert target.read_bytes() == b"\xff"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "step-1", "old")
    (tmp_path / "latest").symlink_to("step-1")
    write(tmp_path / "latest", "new")
    assert (tmp_path / "latest").is_symlink()
    assert read(tmp_path / "step-1") == read(tmp_path / "latest") == "new"


def test_what_may_not_be_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(target: Path, match: str) -> None:
        with pytest.raises(AndromedaError, match=match), atomic_directory(target, replaceable=lambda _: False):
            pytest.fail("must not begin")

    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file")
    refused(tmp_path / "file" / "below", "cannot be written")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").touch()
    refused(tmp_path / "home", "holds other files")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    refused(Path(), "current directory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "work")
    refused(tmp_path / "work", "mount point")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "home", "work"}


def test_an_empty_directory_may_always_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with atomic_directory(tmp_path / "run", replaceable=lambda _: False) as folder:
        (folder / "a").touch()
    assert (tmp_path / "run" / "a").exists()
