"""LSTMs where the machine has none in the dtype that is asked for: computed in float32, rounded to that dtype."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from born_again import LstmLMConfig, LstmLMForCausalLM
from born_again.models import lstm_precision
from born_again.models.char_cnn_lstm import CharCnnLstmForCausalLM
from born_again.models.lstm_lm import LstmLayer
from born_again.models.lstm_precision import computes_lstm, requested_dtype

TESTS = Path(__file__).parents[1]
CPU = torch.device("cpu")
NARROW = [torch.bfloat16, torch.float16]
ROWS, TIME, WORDS = 3, 6, 11


def model(**config) -> LstmLMForCausalLM:
    torch.manual_seed(0)
    return LstmLMForCausalLM(LstmLMConfig(vocab_size=WORDS, hidden_size=8, initializer_range=0.5, **config))


def ids() -> torch.Tensor:
    return torch.randint(WORDS, (ROWS, TIME), generator=torch.Generator().manual_seed(1))


def layer(dropconnect: float = 0.0) -> tuple[LstmLayer, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return LstmLayer(5, 6, dropconnect), torch.randn(ROWS, TIME, 5), tuple(torch.randn(2, ROWS, 6))


@pytest.fixture
def without(monkeypatch):
    """A machine that has no narrow LSTM."""
    monkeypatch.setattr(lstm_precision, "_try", lambda *args: False)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", NARROW)
def test_what_is_tried_is_what_torch_does(dtype, grad):
    plain, raises = nn.LSTM(4, 4, batch_first=True), False
    try:
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
            out = plain(torch.ones(2, 3, 4))[0]
            if grad:
                out.sum().backward()
    except RuntimeError:
        raises = True
    assert computes_lstm(CPU, dtype, grad) is not raises


def test_it_is_tried_once_and_never_for_wide_dtypes(monkeypatch):
    computes_lstm(CPU, torch.bfloat16, True)
    before = lstm_precision._try.cache_info()
    computes_lstm(CPU, torch.bfloat16, True)
    after = lstm_precision._try.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)
    monkeypatch.setattr(lstm_precision, "_try", None)  # whose call would fail
    assert all(computes_lstm(CPU, dtype, True) for dtype in (torch.float32, torch.float64))
    assert computes_lstm(torch.device("meta"), torch.bfloat16, True)


def test_trying_moves_no_generator_and_sees_no_mode_of_the_caller():
    expected = computes_lstm(CPU, torch.bfloat16, True)
    lstm_precision._try.cache_clear()
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.float16):
        assert computes_lstm(CPU, torch.bfloat16, True) is expected
    assert torch.equal(torch.get_rng_state(), state)


def test_asked_dtype():
    x = torch.ones(1)
    assert requested_dtype(x) == torch.float32 and requested_dtype(x.half()) == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert requested_dtype(x) == requested_dtype(x.half()) == torch.bfloat16
        assert requested_dtype(x.double()) == torch.float64  # autocast leaves it
        assert requested_dtype(torch.ones(1, device="meta")) == torch.float32


@pytest.mark.parametrize("dropconnect", [0.0, 0.5])
@pytest.mark.parametrize("dtype", NARROW)
def test_autocast_gives_the_float32_layer_rounded(without, dtype, dropconnect):
    own, x, state = layer(dropconnect)
    gradients = []
    for enabled in (False, True):
        own.zero_grad()
        torch.manual_seed(3)  # of the weights that are dropped
        with torch.autocast("cpu", dtype, enabled=enabled):
            out, (h, c) = own(x, state)
        out.float().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in own.parameters()])
        if not enabled:
            expected = [out, h, c]
    assert [part.dtype for part in (out, h, c)] == [dtype] * 3
    assert all(torch.equal(found, want.to(dtype)) for found, want in zip((out, h, c), expected, strict=True))
    assert all(torch.equal(found, want) for found, want in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_weights_give_the_widened_layer_rounded(without, dtype):
    own, x, state = layer()
    own, x, state = own.to(dtype), x.to(dtype), tuple(part.to(dtype) for part in state)
    out, (h, c) = own(x, state)
    out.sum().backward()
    wide, _, _ = layer()
    wide.load_state_dict({name: value.float() for name, value in own.state_dict().items()})
    expected, (expected_h, expected_c) = wide(x.float(), tuple(part.float() for part in state))
    expected.sum().backward()
    assert torch.equal(out, expected.to(dtype)) and out.dtype == dtype
    assert torch.equal(h, expected_h.to(dtype)) and torch.equal(c, expected_c.to(dtype))
    for found, want in zip(own.parameters(), wide.parameters(), strict=True):
        assert found.grad.dtype == dtype and torch.equal(found.grad, want.grad.to(dtype))


def test_every_recurrent_model_carries_its_state_in_the_dtype_that_was_asked_for(without):
    for make in (model, lambda: CharCnnLstmForCausalLM.from_words([chr(97 + i) for i in range(WORDS)])):
        network = make().eval()
        plain = network(ids()).logits
        with torch.autocast("cpu", torch.bfloat16):
            first = network(ids()[:, :4])
            second = network(ids()[:, 4:], state=first.state)
        assert {part.dtype for part in (*first.state, *second.state)} == {torch.bfloat16}
        found = torch.cat([first.logits, second.logits], dim=1)
        torch.testing.assert_close(found.float(), plain, rtol=0, atol=2**-6 * plain.abs().max().item())


# ---- The machine itself, in a process whose oneDNN may use AVX2 alone ----

CHILD = """
import json, sys
import torch
from torch import nn

sys.path[:0] = [sys.argv[2], f"{sys.argv[2]}/support"]
from helpers import arguments
from models.test_lstm_precision import CPU, ids, model
from born_again import BornAgainTrainer
from born_again.lineage.machine import has_fast_bf16, describe_computation
from born_again.models.lstm_precision import computes_lstm

found, folder = {}, sys.argv[1]


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x, labels=None):
        logits = self.out(self.lstm(x)[0][:, -1])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


rows = [{"x": torch.ones(3, 4), "labels": torch.tensor(1)}] * 8
args = arguments(folder, bf16=True, max_steps=1)
for name, change in (("with a teacher", {"teacher": Reader()}), ("alone", {})):
    trainer = BornAgainTrainer(Reader(), args, train_dataset=rows, eval_dataset=rows, **change)
    for call in (trainer.train, trainer.evaluate):
        try:
            call()
        except RuntimeError as error:
            found[f"{name}, {call.__name__}"] = [str(error), *getattr(error, "__notes__", [])]

found["computes"] = [computes_lstm(CPU, dtype, True) for dtype in (torch.float32, torch.bfloat16)]
found["fast bf16"] = has_fast_bf16()
found["line"] = describe_computation(args, model())
found["line without"] = describe_computation(args, nn.Linear(1, 1))
torch.manual_seed(0)
results = {}
for name in ("eager", "compiled"):
    network = model()
    called = network if name == "eager" else torch.compile(network, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = called(ids(), labels=ids())
    out.loss.backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    results[name] = [out.logits, *out.state, *gradients]
network = model().bfloat16()
out = network(ids())
results["weights"] = [out.logits, *out.state]
torch.save(results, folder + "/results.pt")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(folder), str(TESTS)],
        cwd=TESTS.parent,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), torch.load(folder / "results.pt")


@pytest.mark.slow
def test_such_a_machine_is_recognised(machine):
    found, _ = machine
    assert found["computes"] == [True, False] and not found["fast bf16"]
    assert found["line"].startswith("bf16 autocast (LSTMs in fp32: this machine has none in bf16), contiguous, ")
    assert found["line without"].startswith("bf16 autocast, contiguous, ")


@pytest.mark.parametrize("name", ["eager", "compiled", "weights"])
def test_values_and_gradients_there_are_those_of_float32_within_rounding(machine, name):
    results = machine[1][name]
    exact = model().double()
    if name == "weights":
        exact.load_state_dict({key: value.bfloat16().double() for key, value in exact.state_dict().items()})
    out = exact(ids(), labels=ids())
    out.loss.backward()
    gradients = [] if name == "weights" else [parameter.grad for parameter in exact.parameters()]
    assert [part.dtype for part in results[:5]] == [torch.bfloat16] * 5
    assert len(results) == 5 + len(gradients)
    for part, want in zip(results, [out.logits, *out.state, *gradients], strict=True):
        # Two layers and a matrix product round to the 8 bits of bfloat16.
        assert (part.double() - want).norm() < 2**-7 * want.norm()


def test_a_compiler_changes_nothing_there(machine):
    results = machine[1]
    assert all(torch.equal(found, want) for found, want in zip(results["compiled"], results["eager"], strict=True))


@pytest.mark.parametrize("how", ["with a teacher", "alone"])
@pytest.mark.parametrize("call", ["train", "evaluate"])
def test_a_users_own_lstm_is_told_which_argument_it_cannot_have(machine, how, call):
    error, note = machine[0][f"{how}, {call}"]
    assert "could not create a primitive descriptor" in error
    assert note.startswith("bf16: got True, expected False for a network with a torch.nn.LSTM, which this machine ")
    assert "; give bf16=False, or have the network call its LSTM with float32 inputs inside torch.autocast(" in note
