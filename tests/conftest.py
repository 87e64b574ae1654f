"""Settings that must be in force before any library is imported, and fixtures that several folders share."""

import gc
import os

# Never a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Test processes share the cores: threads of one that wait for work must not keep those of another from working.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

pytest_plugins = ["hub_fixtures"]


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items):
    for item in items:
        fast = item.get_closest_marker("slow_but_for")
        if fast is not None and item.callspec.id not in fast.args:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def two_threads():
    """The sums of a convolution depend on how many threads share it."""
    torch.set_num_threads(2)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def frozen_imports():
    """accelerate collects garbage at the start of every training, ten times as long as one of ours takes otherwise."""
    gc.collect()
    gc.freeze()
