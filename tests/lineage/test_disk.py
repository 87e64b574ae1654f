"""A disk that takes no more is recognised behind what each library raises, and nothing else is taken for it."""

import errno
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from born_again.lineage.disk import disk_problem
from born_again.lineage.manifest import LineageError

LIMIT = 4096  # bytes; a write beyond fails in Python, C++ and Rust alike, as it would on a full disk
FULL = "no room, over quota, or a file-size limit"  # where the library tells no more
TOO_LARGE = "the file-size limit is reached, see ulimit -f"

# Each of these writes more than the limit, or to a device that is always full.
FAILURES = """
import json, resource, sys
from pathlib import Path
import tokenizers, torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification
from born_again.lineage.disk import disk_problem
from born_again._files import write_atomically

folder, text = Path(sys.argv[1]), "x" * 100_000
weights = {"a": torch.zeros(20_000)}
network = BertForSequenceClassification(BertConfig(vocab_size=500, hidden_size=16, num_hidden_layers=1,
                                                   num_attention_heads=2, intermediate_size=16))
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"word{index}": index for index in range(2000)}))

def save_to_file_object():
    with open(folder / "object.pt", "wb") as file:
        torch.save(weights, file)

def save_words():
    words.save(str(folder / "tokenizer.json"))

def save_after_another_failure():
    try:
        torch.save(weights, folder / "again.pt")
    except RuntimeError as error:
        raise ValueError("the callback failed") from error

def in_a_network():  # the words of torch.save, where nothing was saved
    raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")

class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("PytorchStreamWriter failed writing file of mine")

CASES = {
    "torch.save": lambda: torch.save(weights, folder / "a.pt"),
    "torch.save, text path": lambda: torch.save(weights, str(folder / "a.pt")),
    "torch.save, file object": save_to_file_object,
    "torch.save, older format": lambda: torch.save(weights, folder / "b.pt", _use_new_zipfile_serialization=False),
    "torch.save, full": lambda: torch.save(weights, "/dev/full"),
    "torch.save, little, full": lambda: torch.save(1, "/dev/full"),
    "torch.save, chained": save_after_another_failure,
    "safetensors": lambda: save_file(weights, folder / "a.safetensors"),
    "save_pretrained": lambda: network.save_pretrained(folder / "network"),
    "tokenizers": save_words,
    "write_atomically": lambda: write_atomically(folder / "lineage.json", text),
    "write_text": lambda: (folder / "README.md").write_text(text),
    "write_text, full": lambda: Path("/dev/full").write_text("x"),
    "no saving": in_a_network,
    "what is saved": lambda: torch.save(Unpicklable(), folder / "c.pt"),
    "no such folder": lambda: torch.save(weights, folder / "nowhere" / "a.pt"),
    "no such folder, safetensors": lambda: save_file(weights, folder / "nowhere" / "a.safetensors"),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for name, write in CASES.items():
    try:
        write()
        found = "nothing was raised"
    except Exception as error:
        found = disk_problem(error, folder)
    print(json.dumps([name, found]))
(folder / "little.json").write_text("{}")  # the limit is one of length, not of writing at all
print(json.dumps(["left", sorted(path.name for path in folder.iterdir() if path.name.startswith("."))]))
"""


def notices_a_cut_write() -> bool:
    """Whether torch.save looks at what closing the file gave."""
    try:
        torch.save(1, "/dev/full")
    except RuntimeError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_what_the_libraries_raise_when_a_write_fails(tmp_path):
    command = [sys.executable, "-c", FAILURES, str(tmp_path), str(LIMIT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # DeepSpeed, which saving a model imports where it is installed, logs to the standard output.
    lines = [line for line in done.stdout.splitlines() if line.startswith('["')]
    assert dict(json.loads(line) for line in lines) == {
        "torch.save": FULL,
        "torch.save, text path": FULL,
        "torch.save, file object": TOO_LARGE,
        "torch.save, older format": TOO_LARGE,
        "torch.save, full": FULL,
        "torch.save, little, full": FULL if notices_a_cut_write() else "nothing was raised",
        "torch.save, chained": FULL,
        "safetensors": TOO_LARGE,
        "save_pretrained": TOO_LARGE,
        "tokenizers": TOO_LARGE,
        "write_atomically": TOO_LARGE,
        "write_text": TOO_LARGE,
        "write_text, full": "no space left on device",  # a write does not say of which file
        "no saving": None,
        "what is saved": None,
        "no such folder": None,
        "no such folder, safetensors": None,
        "left": [],
    }


def caught(function, *args):
    with pytest.raises(Exception) as raised:  # noqa: B017
        function(*args)
    return raised.value


def raises(error):
    raise error


def save(error):
    """A function that saves, by its name."""
    raise error


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left on device"),
        (errno.EDQUOT, "disk quota exceeded"),
        (errno.EFBIG, TOO_LARGE),
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "operation not permitted"),
        (errno.EIO, "input/output error of the disk"),
    ],
)
def test_the_system_names_the_problem_and_the_file(tmp_path, code, words):
    inside, outside = tmp_path / "out" / "gen0" / "config.json", tmp_path / "cache"
    folder = tmp_path / "out"
    assert disk_problem(OSError(code, "said by the system", str(inside)), folder) == f"{words}: gen0/config.json"
    assert disk_problem(OSError(code, "said", str(outside)), folder) is None
    assert disk_problem(OSError(code, "said", str(tmp_path / "out-of-it" / "x")), folder) is None
    assert disk_problem(caught(save, OSError(code, "said")), folder) == words
    # Such as a full /dev/shm, or a cache of the data's.
    assert disk_problem(caught(raises, OSError(code, "said")), folder) is None


def test_a_library_that_hides_the_number_is_read(tmp_path):
    full = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert disk_problem(SafetensorError(full), tmp_path) == "no space left on device"
    at = f'Error while serializing: I/O error: Read-only file system (os error 30) at path "{tmp_path}/gen0/.tmpaBc"'
    assert disk_problem(SafetensorError(at), tmp_path) == "read-only file system: gen0/.tmpaBc"
    assert disk_problem(SafetensorError(at), tmp_path / "another") is None
    for other in (
        "Error while deserializing header: incomplete metadata, file not fully covered",
        "Error while serializing: I/O error: No such file or directory (os error 2)",
        "Error while deserializing: I/O error: Permission denied (os error 13)",
    ):
        assert disk_problem(SafetensorError(other), tmp_path) is None


@pytest.mark.skipif(
    "strerror" not in str(caught(torch.save, {}, tempfile.gettempdir())),
    reason="this torch does not tell why a file cannot be opened",
)
def test_torch_tells_why_a_file_cannot_be_opened(tmp_path):
    is_a_folder = caught(torch.save, {}, tmp_path)
    assert "open file failed with strerror: Is a directory" in str(is_a_folder)
    assert disk_problem(is_a_folder, tmp_path) is None
    if not Path("/sys").is_dir():
        pytest.skip("needs Linux")
    error = caught(torch.save, {}, "/sys/a.pt")  # where not even root makes a file
    assert "open file failed with strerror" in str(error)
    assert disk_problem(error, tmp_path) in ("permission denied", "operation not permitted", "read-only file system")


def test_what_an_exception_came_from_counts(tmp_path):
    full = OSError(errno.ENOSPC, "said", str(tmp_path / "x"))
    assert disk_problem(caught(chain, full, False), tmp_path) == "no space left on device: x"
    assert disk_problem(caught(chain, full, True), tmp_path) is None
    error = ValueError("in a circle")
    error.__context__, full.__cause__ = full, error
    assert disk_problem(error, tmp_path) == "no space left on device: x"
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert disk_problem(one, tmp_path) is None


def chain(error, from_nothing):
    try:
        raise error
    except OSError:
        if from_nothing:
            raise KeyError("another matter") from None
        raise KeyError("in an except block")  # noqa: B904


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("write(): fd 3 failed with No space left on device"),
        RuntimeError("unable to write to file </torch_12_34_0>: No space left on device (28)"),  # shared memory
        RuntimeError("No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
        FloatingPointError("weights: not finite after step 4 of 6"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "gen0"),
        OSError("100000 requested and 8176 written"),
        ValueError("disk"),
        MemoryError(),
    ],
)
def test_other_failures_are_none(tmp_path, error):
    assert disk_problem(error, tmp_path) is None
    assert disk_problem(caught(raises, error), tmp_path) is None


def test_what_says_itself_what_is_wrong_is_left_alone(tmp_path):
    full = OSError(errno.ENOSPC, "said", str(tmp_path / "x"))
    for error in (LineageError("output_dir: in use"), KeyboardInterrupt(), SystemExit(143)):
        error.__cause__ = full
        assert disk_problem(error, tmp_path) is None


def test_a_cut_write_on_a_disk_without_room_says_so(tmp_path, monkeypatch):
    class Full:
        f_bavail, f_frsize = 3, 4096

    if not Path("/dev/full").exists():
        pytest.skip("needs Linux")
    if not notices_a_cut_write():
        pytest.skip("this torch does not notice that the little it wrote was cut")
    error = caught(torch.save, {"a": torch.zeros(9)}, "/dev/full")
    assert disk_problem(error, tmp_path) == FULL
    monkeypatch.setattr("os.statvfs", lambda folder: Full)
    assert disk_problem(error, tmp_path) == "no space left on device"
    assert disk_problem(error, tmp_path / "nowhere") == "no space left on device"
