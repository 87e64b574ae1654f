"""What the first process raises, every process raises; none is left waiting for it."""

from pathlib import Path

import pytest
from processes import found_by

from born_again.lineage.machine import on_first_process

SCRIPT = Path(__file__).parents[1] / "support" / "two_failing_processes.py"


@pytest.mark.slow
def test_an_error_of_the_first_process_reaches_the_other(tmp_path):
    first, second = found_by(SCRIPT, tmp_path / "two", processes=2)
    assert first["done"] == "[0]" and second["done"] == "[]"
    assert first["due"] == second["due"] == "[False, True]"  # by the clock of one of them, where they agree on it
    assert first["OSError"] == "OSError: [Errno 28] No space left on device: 'lineage.json'"
    assert first["ValueError"] == "ValueError: a wrong value"
    assert first["HubError"] == "HubError: hub_namespace: cannot be published to"
    assert first["publisher"] == "ValueError: no token" and first["write_card"] == "ValueError: no card"
    for place in ("save_student", "sync"):
        assert first[place].startswith(f"LineageError: output_dir: {tmp_path}")
    assert first.pop("TwoArguments") == "TwoArguments: value is 3"
    assert second.pop("TwoArguments") == "RuntimeError: the first process failed: TwoArguments: value is 3"
    assert first.pop("KeyboardInterrupt") == "KeyboardInterrupt: "
    assert second.pop("KeyboardInterrupt") == "RuntimeError: the first process failed: KeyboardInterrupt: "
    assert {**first, "done": ""} == {**second, "done": ""}


def test_one_process_raises_what_was_raised():
    error = ValueError("a wrong value")

    def step():
        raise error

    with pytest.raises(ValueError) as caught:
        on_first_process(step)
    assert caught.value is error
