"""Forks a process for each command that it reads, so that tests can kill many and nothing is imported twice.

A line of its input is JSON: {"publish": [OUTPUT_DIR, NAMESPACE], "log": FILE}, or {"train": [WORD, ...], "log": FILE}
with the words of examples/run_cifar.py. It answers with the process id of the child, and when that has ended with its
exit status (128 + the signal's number where it was killed).
"""

from __future__ import annotations

import os

# Before torch is imported: a process that is forked must have one thread.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
os.environ.update(JE_ARROW_MALLOC_CONF="background_thread:false", CUDA_VISIBLE_DEVICES="")

import gc  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

TESTS = Path(__file__).parents[1]


class Children:
    """The tests' side.

    Args:
        environment: of the children, such as that of a HubServer.
        log: to which they write.
    """

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._errors = open(log, "a")
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env={**environment, "PYTHONPATH": str(TESTS.parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.pid: int | None = None

    def start(self, **command: list[str]) -> None:
        self.pid = None
        self._server.stdin.write(json.dumps({**command, "log": str(self.log)}) + "\n")
        self._server.stdin.flush()
        self.pid = int(self._server.stdout.readline())

    def wait(self) -> int:
        """The exit status of the child."""
        return int(self._server.stdout.readline())

    def run(self, **command: list[str]) -> int:
        self.start(**command)
        return self.wait()

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        self._errors.close()


def serve() -> None:
    sys.path.insert(0, str(TESTS.parent / "examples"))
    run_cifar = importlib.import_module("run_cifar")
    publishing = importlib.import_module("born_again.hub.publishing")
    commands: dict[str, Callable[[list[str]], int]] = {
        "publish": lambda words: len(publishing.publish_lineage(*words)),
        "train": run_cifar.start,
    }
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        log = asked.pop("log")
        ((name, words),) = asked.items()
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            raise RuntimeError(f"threads: there are {threads}, expected 1: a fork would copy locks of the others.")
        child = os.fork()
        if child == 0:
            _child(commands[name], words, log)
        print(child, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status if status >= 0 else 128 - status, flush=True)


def _child(command: Callable[[list[str]], int], words: list[str], log: str) -> None:
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        print(f"---- {words}", flush=True)
        code = command(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
