"""SIGTERM and SIGINT while a lineage is trained: noted, and agreed on by all processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on to its processes what the terminal has sent to all of them already: that is one request.
ONE_REQUEST_SECONDS = 2.0


class Interrupted(SystemExit):
    """A training that was asked to stop, and has saved where it is.

    As a SystemExit it ends a program that does not catch it with the exit status of its signal, 143 or 130.

    Args:
        signum: of the signal.
        message: how to go on.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(128 + signum)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interruption:
    """Notes SIGTERM and SIGINT while its block runs; the handlers that were there come back after it.

    A second signal, two seconds or more after the first, raises KeyboardInterrupt at once. Python lets the main thread
    alone handle signals: in another one nothing is installed, and signals do what they did.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._processes = PartialState()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for signum, handler in self._before.items():
            # None: a handler that was not installed from Python, and cannot be put back from it.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
            if self._processes.is_main_process:
                name = signal.Signals(signum).name
                # Printing and logging may be what was interrupted, and cannot be entered twice.
                os.write(2, f"\n{name}: finishing the step and saving; once more to stop at once.\n".encode())
        elif time.monotonic() - self._since >= ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt

    def agreed(self) -> int | None:
        """The signal that any of the processes got, or None; every process must call this at the same place.

        It costs one number sent between processes, and nothing where there is one.
        """
        if self._processes.num_processes > 1:
            device = self._processes.device
            found = torch.tensor(self.signum or 0, device=device)
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
            self.signum = int(found.item()) or None
        return self.signum
