"""How files come to be: written aside, and put in their places when all is written.

    with replacing("net.onnx") as temporary:      # one file, with what its writer lays beside it
        temporary.write_bytes(...)

    with together():                              # several files: all of them, or none
        bnfold.fold_file("net.onnx", "net.folded.onnx")
        with replacing("report.json") as temporary: ...

Every file is written in a folder of its own, `.bnfold-*`, on the file system of its target, and renamed. What stands
beside it there (a model's external data) is moved first and the file last, so that every moment shows the old file with
what belongs to it, or the new one: also if the process is killed. A failure puts back what had been moved.

A link       is written through: what it points to is replaced, the link stays. A model with external data is refused
             where the link leads to another folder, since its data could not lie beside both.
A hard link  keeps the old content under its other names: what is replaced is the name that was given.
A device, a pipe, an open file (/dev/null, /dev/stdout, a FIFO) is written to, before any file is renamed. It holds one
             file. A block device, a socket and a pipe that nobody reads are refused.
Permissions  of a file that was there stay, and go for its companions too, its owner and group where that is allowed;
             a new file has those of the umask.

A folder that a killed run left is removed by the next one that writes there, once nobody holds it (`flock`) and it has
not been touched for an hour; the second is for file systems of several machines, whose locks may not reach each other.

Not covered: the loss of power between writing and the disk (nothing is synced), ACLs and extended attributes, and a
reader that opens a model before it is replaced and its data afterwards. Of several files each appears in one step, but
one after the other. Nothing that was written inside `together` can be read back before its end.
"""

from __future__ import annotations

import errno
import filecmp
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from bnfold.errors import InputError

if sys.platform != "win32":
    import fcntl

__all__ = ["check_target", "replacing", "together"]

PREFIX = ".bnfold-"
OLD = 3600
"""A folder that nobody holds and nobody touched for so many seconds was left by a killed run."""

Outdated = Callable[[Path, Sequence[Path]], Sequence[Path]]
"""From the place of a file and those of its companions to the files that are to go once it stands there."""


@dataclass(frozen=True)
class _Output:
    """One file that was written, with its companions, and where it goes.

    Attributes:
        target: where to, as the caller named it.
        temporary: the file, in a folder that holds nothing but it and its companions.
        outdated: see `replacing`.
    """

    target: Path
    temporary: Path
    outdated: Outdated

    @property
    def place(self) -> Path:
        """The target, links followed."""
        return Path(os.path.realpath(self.target))

    def moves(self) -> Iterator[tuple[Path, Path]]:
        """From where to where, the file itself last.

        Raises:
            InputError: there is no folder in which companions would be found.
        """
        folder, place = self.temporary.parent, self.place
        companions = sorted(path for path in folder.rglob("*") if path.is_file() and path != self.temporary)
        if companions and (_is_stream(self.target) or _folder(self.target) != place.parent):
            raise InputError(
                f"{self.target} leads elsewhere, where the model's external data would not be found; name a plain file"
            )
        for path in companions:
            final = place.parent / path.relative_to(folder)
            if not Path(os.path.realpath(final)).is_relative_to(place.parent):
                raise InputError(f"{final} leads out of the model's folder; write elsewhere")
            yield path, final
        yield self.temporary, place

    def inherit(self, paths: Iterable[Path]) -> None:
        """Give new files the mode, owner and group of the file that is replaced."""
        if not self.place.exists() or sys.platform == "win32":
            return
        old = self.place.stat()
        for path in paths:
            for owner in (-1, old.st_uid):
                with suppress(OSError):
                    os.chown(path, owner, old.st_gid)
            path.chmod(stat.S_IMODE(old.st_mode))

    def pour(self) -> None:
        """Write the file into a device, a pipe or an open file.

        Raises:
            InputError: it cannot be opened, or takes no more.
            BrokenPipeError: who read it went away.
        """
        try:
            with self.temporary.open("rb") as content, _open_stream(self.target) as stream:
                shutil.copyfileobj(content, stream)
        except BrokenPipeError:
            raise
        except OSError as error:
            reason = "nobody reads this pipe" if error.errno == errno.ENXIO else error.strerror
            raise InputError(f"{self.target} cannot be written to: {reason}") from error


@dataclass(frozen=True)
class _Batch:
    outputs: list[_Output]
    workspaces: ExitStack


_BATCH: ContextVar[_Batch | None] = ContextVar("batch", default=None)


@contextmanager
def together() -> Iterator[None]:
    """Let all that is written inside appear at the end: every file, or none. Inside another one that one decides.

    Files appear in the order in which they were written.
    """
    with _joining():
        yield


@contextmanager
def replacing(path: str | Path, outdated: Outdated = lambda place, companions: ()) -> Iterator[Path]:
    """Yield a temporary path, with the name of `path`; on success it takes the place of `path`.

    An existing `path` survives every failure. What the writer lays beside the temporary path, or in folders below, goes
    beside `path`, and replaces what has the same name there. Nobody else's file should: companions are best named by
    their content.

    Args:
        path: where to write.
        outdated: asked right before the renames, while no other run of bnfold writes in that folder, which files shall
            be removed after them.

    Raises:
        InputError: no file can be written there.
    """
    path = Path(path)
    check_target(path)
    with _joining() as batch:
        folder = batch.workspaces.enter_context(_workspace(path))
        yield folder / path.name
        if not (folder / path.name).exists():
            raise FileNotFoundError(errno.ENOENT, "nothing was written", str(path))
        batch.outputs.append(_Output(path, folder / path.name, outdated))


def check_target(path: Path) -> None:
    """Raise `InputError` where no file can be written at `path`, before much work has gone into what it would hold."""
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} is no path; it has a NUL in it")
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder; name a file to write")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise InputError(f"{path} is a {'disk' if stat.S_ISBLK(mode) else 'socket'}; name a file to write")
    if _is_stream(path):
        return
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        missing = folder if path.is_symlink() else path.parent
        raise InputError(f"{missing} is no folder; make it first, or write elsewhere")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: nothing can be added to {folder}; write elsewhere")


# ---------------------------------------------------------------- devices, pipes and open files


def _mode(path: Path) -> int:
    """What stands at a path, links followed; 0 for nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _is_stream(path: Path) -> bool:
    mode = _mode(path)
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or (mode != 0 and _descriptor(path) is not None)


def _descriptor(path: Path) -> int | None:
    """The number of the open file that a path such as /dev/stdout or /dev/fd/3 stands for."""
    for _ in range(40):
        if path.name.isdecimal() and os.path.realpath(path.parent) in ("/dev/fd", f"/proc/{os.getpid()}/fd"):
            return int(path.name)
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None


def _open_stream(path: Path) -> BinaryIO:
    """Open it without truncating what an open file holds already, and without waiting for a reader."""
    number = _descriptor(path)
    if number is not None:
        sys.stdout.flush()
        return os.fdopen(os.dup(number), "wb")
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "wb")


# ---------------------------------------------------------------- the folder in which a file is written


def _folder(path: Path) -> Path:
    return Path(os.path.realpath(path.parent))


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """A new folder on the file system of the target, held until it is removed."""
    where = Path(tempfile.gettempdir()) if _is_stream(target) else _folder(Path(os.path.realpath(target)))
    _clear(where)
    try:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}; write elsewhere") from error
    with _locked(path):
        try:
            (path / "new").mkdir()
            yield path / "new"
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what killed runs left in a folder."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if re.fullmatch(re.escape(PREFIX) + "[a-z0-9_]{8}", entry.name) and _is_abandoned(entry):
                shutil.rmtree(entry.path, ignore_errors=True)


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder of ours that nobody holds and nobody touched for long."""
    if sys.platform == "win32" or not entry.is_dir(follow_symlinks=False):
        return False
    if entry.stat().st_uid != os.geteuid():
        return False
    touched = [path.lstat().st_mtime for path in (Path(entry.path), *Path(entry.path).rglob("*"))]
    return time.time() - max(touched) > OLD and not _is_held(entry.path)


def _is_held(folder: str) -> bool:
    """Whether a run holds a folder, or may: on some file systems that cannot be told."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder, where its file system can do that, until the end or the death of the process."""
    if sys.platform == "win32":
        yield
        return
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------- putting files in their places


@contextmanager
def _joining() -> Iterator[_Batch]:
    """The batch that is being written, or a new one that is put in its places at the end."""
    current = _BATCH.get()
    if current is not None:
        yield current
        return
    with ExitStack() as workspaces:
        batch = _Batch([], workspaces)
        token = _BATCH.set(batch)
        try:
            yield batch
        finally:
            _BATCH.reset(token)
        _place(batch.outputs)


def _place(outputs: Sequence[_Output]) -> None:
    """Write to devices and pipes, then rename, then remove what is outdated; no two runs at once in a folder."""
    moves = [(output, list(output.moves())) for output in outputs]
    files = [(output, pairs) for output, pairs in moves if not _is_stream(output.target)]
    for output in outputs:
        if _is_stream(output.target):
            output.pour()
    with ExitStack() as locks:
        for folder in sorted({output.place.parent for output, _ in files}):
            locks.enter_context(_locked(folder))
        outdated: list[Path] = []
        renames: list[tuple[Path, Path]] = []
        for output, pairs in files:
            renames += [pair for pair in pairs[:-1] if not _is_there(*pair)] + pairs[-1:]
            output.inherit(temporary for temporary, _ in pairs)
            outdated += output.outdated(output.place, [final for _, final in pairs[:-1]])
        _rename(renames)
        for path in outdated:
            with suppress(OSError):
                path.unlink()


def _rename(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename all files, or none: if one cannot be, what was in the places of the others comes back."""
    undo = ExitStack()
    try:
        for number, (temporary, final) in enumerate(moves, 1):
            final.parent.mkdir(parents=True, exist_ok=True)
            if number < len(moves):
                undo.callback(_restore(final, temporary.with_name(f"{PREFIX}{number}")))
            temporary.replace(final)
    except BaseException:
        undo.close()
        raise


def _restore(final: Path, kept: Path) -> Callable[[], object]:
    """Keep a copy of what stands at a place, and return what brings it back.

    A copy, no hard link: onnx refuses external data that has one.
    """
    if not final.exists():
        return partial(final.unlink, missing_ok=True)
    shutil.copy2(final, kept)
    return partial(kept.replace, final)


def _is_there(temporary: Path, final: Path) -> bool:
    """Whether a file stands in its place already, with the same content and under no other name."""
    if not final.is_file() or final.is_symlink() or final.stat().st_nlink > 1:
        return False
    return filecmp.cmp(temporary, final, shallow=False)
