"""Failures of several processes: which of them is lost, and one message for what all of them raise."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from torch import distributed

# A process that waited in the same collective fails within this time; so does one that raises the same error.
GRACE_SECONDS = 3.0
_KEY = "born_again"


class LostProcess(RuntimeError):
    """Another process of this training has ended or hangs, so that a step cannot be finished."""


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Inside, the error of a collective that could not be finished says which processes did not take part.

    Raises:
        LostProcess: in place of that error.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostProcess) or not _is_of_collective(error):
            raise
        missing = _missing_processes()
        who = " and ".join(f"process {rank}" for rank in missing) or "another process"
        raise LostProcess(
            f"{who} of {distributed.get_world_size()} did not take part in a step: it has ended, which its own output "
            "then explains, or hangs, and was waited for as long as --ddp_timeout says. The same command resumes from "
            "the last checkpoint."
        ) from error


def _is_of_collective(error: RuntimeError) -> bool:
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()


def _missing_processes() -> list[int]:
    """The processes that have not failed too, where the launcher's store can still be asked."""
    rank, everyone = distributed.get_rank(), range(distributed.get_world_size())
    missing = [other for other in everyone if other != rank]
    with contextlib.suppress(RuntimeError):  # the store went with the process that held it
        store = _store()
        store.set(f"{_KEY}/failed/{rank}", "1")
        deadline = time.monotonic() + GRACE_SECONDS
        while missing and time.monotonic() < deadline:
            time.sleep(0.05)
            missing = [other for other in missing if not store.check([f"{_KEY}/failed/{other}"])]
        return missing
    return []


def exit_with(error: BaseException) -> None:
    """Ends a script with a status of 1 and one line on stderr, which one of the processes that raise the same prints.

    Raises:
        SystemExit: always.
    """
    text = f"{type(error).__name__}: {error}"
    if not (distributed.is_available() and distributed.is_initialized()):
        sys.exit(text)
    with contextlib.suppress(RuntimeError):
        # The launcher ends the other processes as soon as one has left, so the message comes first.
        first = _store().compare_set(f"{_KEY}/said/{text}", "", str(distributed.get_rank())).decode()
        if first != str(distributed.get_rank()):
            time.sleep(GRACE_SECONDS / 10)
            sys.exit(1)
    print(text, file=sys.stderr, flush=True)
    sys.exit(1)


def _store() -> Any:
    """The key-value store by which the processes found each other."""
    return distributed.distributed_c10d._get_default_store()
