"""What each of two processes raises where the first one fails, and saves, in test_first_process.py.

torchrun --nproc_per_node N tests/two_failing_processes.py FOLDER
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from processes import leave
from tiny_lineage import runner, spec

from born_again.hub.client import HubError
from born_again.lineage.callbacks import SaveByTime
from born_again.lineage.machine import on_first_process


class TwoArguments(Exception):
    """Pickle cannot make it again."""

    def __init__(self, name: str, value: int) -> None:
        super().__init__(f"{name} is {value}")


ERRORS = {
    "OSError": OSError(28, "No space left on device", "lineage.json"),
    "ValueError": ValueError("a wrong value"),
    "HubError": HubError("hub_namespace: cannot be published to"),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "TwoArguments": TwoArguments("value", 3),
}


def raised(call) -> str:
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fail(error: BaseException):
    def step(*_, **__):
        raise error

    return step


def failing_lineage(folder: Path, where: str) -> str:
    """A lineage of one generation, whose first process fails in one of the places where it works alone."""
    changes = {"ddp_backend": "gloo", "use_cpu": True}
    options = {"spec": spec(generations=0), "changes": changes}
    if where == "save_student":
        options["save_student"] = fail(OSError(28, "No space left on device", str(folder / "weights")))
    if where == "write_card":
        options["write_card"] = fail(ValueError("no card"))
    lineage = runner(folder, **options)
    if where == "publisher":

        class Publisher:
            start = staticmethod(fail(ValueError("no token")))
            detach = staticmethod(lambda: None)

        lineage.publisher = Publisher()
    if where == "sync" and PartialState().is_main_process:
        import born_again.lineage.callbacks as callbacks

        callbacks.sync_checkpoint = fail(OSError(5, "Input/output error", str(folder / "checkpoint")))
    return raised(lineage.run)


def main(folder: Path) -> None:
    processes = PartialState(cpu=True, backend="gloo", timeout=timedelta(seconds=60))
    results = {name: raised(lambda error=error: on_first_process(fail(error))) for name, error in ERRORS.items()}
    done: list[int] = []
    on_first_process(lambda: done.append(processes.process_index))
    results["done"] = str(done)
    saver = SaveByTime(1e-9 if processes.is_main_process else 1e9)
    results["due"] = str([saver._is_due(step) for step in (7, 8)])
    for where in ("publisher", "save_student", "write_card", "sync"):
        results[where] = failing_lineage(folder / where, where)
    leave(results, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
