"""Recognises errors of the disk (full, over quota, read-only, no permission), also where a library hides errno."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, TracebackType

from safetensors import SafetensorError

from born_again.lineage.checkpoints import last_checkpoint
from born_again.lineage.manifest import LineageError, Manifest

_UNKNOWN_CAUSE = "no room, over quota, or a file-size limit"
_PROBLEMS = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "the file-size limit is reached, see ulimit -f",
    errno.EROFS: "read-only file system",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EIO: "input/output error of the disk",
}
_BY_TEXT = {os.strerror(code): code for code in _PROBLEMS}

# Functions that write files: an OSError without a file name counts if one of them was running.
_WRITE_FUNCTIONS = re.compile(r"_?save(_.*)?|write_(text|bytes|atomically)|sync_(files|folder|checkpoint)")
# From safetensors; tokenizers gives the last part alone.
_RUST = re.compile(r"(Error while serializing: )?.*\(os error (\d+)\)(?: at path \"(.*)\")?", re.DOTALL)
# torch.save, when it opens a file, and when it writes its older format.
_TORCH_NAMED = re.compile(r"(?:.*open file failed with strerror|write\(\): fd \d+ failed with):? (.*)", re.DOTALL)
# torch.save, when a write fails: the C++ stream gives no errno.
_TORCH_CUT = re.compile(
    r"basic_ios::clear: iostream error"
    r"|\[enforce fail at inline_container\.cc:\d+\].*unexpected pos \d+ vs \d+"
    r"|(\[enforce fail at inline_container\.cc:\d+\].*)?PytorchStreamWriter failed writing file.*",
    re.DOTALL,
)


def disk_problem(error: BaseException, folder: Path) -> str | None:
    """Why a folder could not be written, if that caused an exception.

    Its causes and contexts are searched too. torch.save raises plain RuntimeErrors without errno: they are recognised
    by their text, and only if torch.serialization raised them while saving, so that an error of a user's network is
    not mistaken for one. An OSError counts if its file is in the folder or, where it names no file (as after a write),
    if a function that saves was running: a full /dev/shm or a cache elsewhere does not count. Neither does a
    LineageError, which already says what is wrong, nor a request to stop.

    Args:
        error: as caught, with its traceback.
        folder: of the lineage.

    Returns:
        A short text, with the file where it is known: "no space left on device"; None for any other exception.
    """
    if not isinstance(error, Exception) or isinstance(error, LineageError):
        return None
    hidden = None
    for link in _chain(error):
        code, file = _code_and_file(link)
        if code in _PROBLEMS and (file is None or _is_in(file, folder)):
            return _PROBLEMS[code] + (f": {_relative_path(file, folder)}" if file is not None else "")
        if isinstance(link, RuntimeError) and _TORCH_CUT.fullmatch(str(link)) and _torch_was_saving(link):
            hidden = _hidden_problem(folder)  # unless a cause of it tells more
    return hidden


def disk_message(problem: str, manifest: Manifest) -> str:
    """The error message for a lineage whose folder cannot be written: how far it is, and how to resume.

    Args:
        problem: as `disk_problem` gives it.
        manifest: of the lineage, in memory.
    """
    folder, where = manifest.path.parent, "before its first generation"
    if manifest.generations:
        index = manifest.generations[-1]["index"]
        checkpoint = last_checkpoint(folder / "checkpoints" / f"gen{index}")
        kept = "nothing" if checkpoint is None else checkpoint.name
        where = f"in generation {index}; those before it are intact, and of this one {kept} is kept"
    return (
        f"output_dir: {folder} cannot be written ({problem}), {where}. Make room or change its permissions, and give "
        "the same command again: it goes on from there."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, its causes and contexts, as a traceback shows them."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _code_and_file(error: BaseException) -> tuple[int | None, str | None]:
    """The errno of a failed write, and its file if known; (None, None) for any other exception."""
    if isinstance(error, OSError):
        files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return (error.errno, files[0] if files else None) if files or _was_saving(error) else (None, None)
    # tokenizers raises a plain Exception.
    if (isinstance(error, SafetensorError) or type(error) is Exception) and (found := _RUST.fullmatch(str(error))):
        is_write = found[1] is not None or (type(error) is Exception and _was_saving(error))
        return (int(found[2]), found[3]) if is_write else (None, None)
    if isinstance(error, RuntimeError) and (found := _TORCH_NAMED.fullmatch(str(error))) and _torch_was_saving(error):
        return _BY_TEXT.get(found[1].strip()), None
    return None, None


def _was_saving(error: BaseException) -> bool:
    return any(_WRITE_FUNCTIONS.fullmatch(code.co_name) for code in _frames(error.__traceback__))


def _torch_was_saving(error: BaseException) -> bool:
    """Whether torch.save itself raised the exception, and not the object that it was saving."""
    frames = list(_frames(error.__traceback__))
    from_torch = bool(frames) and Path(frames[-1].co_filename).parts[-2:] == ("torch", "serialization.py")
    return from_torch and any(code.co_name == "save" for code in frames)


def _frames(traceback: TracebackType | None) -> Iterator[CodeType]:
    while traceback is not None:
        yield traceback.tb_frame.f_code
        traceback = traceback.tb_next


def _hidden_problem(folder: Path) -> str:
    """The likely cause of a failed write, from the free space of the file system."""
    try:
        status = os.statvfs(folder)
    except (OSError, AttributeError):  # AttributeError: no POSIX system
        return _UNKNOWN_CAUSE
    # A write can fail although a little space is left.
    return _PROBLEMS[errno.ENOSPC] if status.f_bavail * status.f_frsize < 1 << 20 else _UNKNOWN_CAUSE


def _is_in(file: str, folder: Path) -> bool:
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))


def _relative_path(file: str, folder: Path) -> str:
    return os.path.relpath(os.path.realpath(file), os.path.realpath(folder))
