"""Steps that the first of several processes takes, while the others wait for what comes of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def on_first_process(step: Callable[[], Any]) -> None:
    """Takes a step on the first process; what it raises is raised on every process, so that none waits for ever.

    Every process must call it at the same place. It ends on all of them when the step has ended.

    Args:
        step: called without arguments on the first process alone; what it returns is dropped.

    Raises:
        Exception: what the step raised. On the other processes a RuntimeError with its type and text where it cannot
            be sent to them.
    """
    processes = PartialState()
    failure: list[Exception | None] = [None]
    if processes.is_main_process:
        try:
            step()
        except Exception as error:
            if processes.num_processes == 1:
                raise
            broadcast_object_list([_as_sent(error)])
            raise
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def _as_sent(error: Exception) -> Exception:
    """An error that the other processes can read: itself, unless pickle loses it or cannot make it again."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and str(again) == str(error):
            return error
    except Exception:  # whatever an __init__ or __reduce__ of its own raises
        pass
    return RuntimeError(f"the first process failed: {type(error).__name__}: {error}")
