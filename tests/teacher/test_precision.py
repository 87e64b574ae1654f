"""A folded network says what the network says."""

import logging
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune

import born_again  # noqa: F401
from born_again.models.image_classifier import create_image_classifier
from born_again.teacher.precision import fold_and_cast, folded_copy


def trained(network):
    """Statistics and scales as a training leaves them: none of them 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return network.double().eval()


def norms(network):
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def pixels(rows=2):
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "left"),
    [("wide_resnet16_1_cifar", 7), ("test_wide_resnet_cifar", None), ("test_densenet_cifar", None), ("resnet18", 0)],
)
def test_the_outputs_are_those_of_the_network(name, left):
    network = trained(timm.create_model(name, num_classes=10))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = folded_copy(network, {"x": pixels()})
    with torch.no_grad():
        torch.testing.assert_close(folded(pixels()), network(pixels()), rtol=1e-10, atol=1e-12)
    assert norms(folded) < norms(network) if left is None else norms(folded) == left
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not folded.training and not any(parameter.requires_grad for parameter in folded.parameters())


def test_a_classifier_of_transformers_and_a_smaller_dtype():
    labels = [str(label) for label in range(10)]
    network = trained(create_image_classifier("wide_resnet16_1_cifar", labels, [0.5] * 3, [0.25] * 3))
    inputs = {"pixel_values": pixels(16)}
    folded = folded_copy(network, inputs)
    with torch.no_grad():
        expected = network(**inputs).logits
        torch.testing.assert_close(folded(**inputs).logits, expected, rtol=1e-10, atol=1e-12)
        small = folded_copy(network, inputs, torch.bfloat16)(**inputs).logits
    assert small.dtype == torch.bfloat16
    # bfloat16 has 8 bits of precision; 16 layers add up their rounding.
    assert (small.double() - expected).abs().max() < 0.05 * expected.abs().max()


class Shared(nn.Module):
    """A convolution that someone else reads too, one that runs twice, and a norm of a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        x = x + self.norms[0](x)
        x = self.norms[1](self.twice(x))
        x = self.norms[2](self.twice(x))
        return self.norms[3](x)


def test_what_cannot_be_folded_stays():
    network = trained(Shared())
    folded = folded_copy(network, {"x": pixels()})
    assert norms(folded) == 4
    assert torch.equal(folded(pixels()), network(pixels()))


def test_a_network_without_convolutions_is_copied():
    network = nn.Linear(3, 2).eval()
    folded = folded_copy(network, {"input": torch.ones(1, 3)})
    assert folded is not network and torch.equal(folded(torch.ones(1, 3)), network(torch.ones(1, 3)))


def test_train_mode_is_refused():
    with pytest.raises(ValueError, match="network: is in train mode, expected eval mode"):
        folded_copy(nn.Conv2d(3, 4, 1), {"input": pixels()})


# ---- Layers that are not what their class says ----


class Pair(nn.Module):
    """A convolution, BatchNorm, and what tells one class from another."""

    def __init__(self, kind=nn.Conv2d, norm=nn.BatchNorm2d, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = kind(3, 8, 3, **settings)
        self.norm = norm(8)
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        return self.out(self.norm(self.convolution(x)).relu().mean((2, 3)))


class Forgetful(nn.BatchNorm2d):
    """A BatchNorm that does something else after all."""

    def forward(self, x):
        return super().forward(x) * 2


def scaled(network):
    network.convolution.register_forward_hook(lambda module, args, output: output * 3)
    return network


def prepared(network):
    network.norm.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    return network


def wrapped(network):
    forward = network.convolution.forward
    network.convolution.forward = lambda x: forward(x) * 3  # as accelerate and others wrap a layer
    return network


def of_the_batch(network):
    network.norm = nn.BatchNorm2d(8, track_running_stats=False)
    return network


def in_train_mode(network):
    network.norm.eval = network.norm.train = lambda *args: network.norm  # one that is kept fresh on purpose
    network.norm.training = True
    return network


def reparametrized(by, *args):
    network = Pair()
    by(network.convolution, *args)
    return network


UNFOLDED = {
    "standardised": lambda: Pair(StdConv2d),
    "scaled and standardised": lambda: Pair(ScaledStdConv2d),
    "weight_norm": lambda: reparametrized(parametrizations.weight_norm),
    "weight_norm by a hook": lambda: reparametrized(nn.utils.weight_norm),
    "spectral_norm": lambda: reparametrized(parametrizations.spectral_norm),
    "pruned": lambda: reparametrized(prune.l1_unstructured, "weight", 0.5),
    "hook of the convolution": lambda: scaled(Pair()),
    "hook of the norm": lambda: prepared(Pair()),
    "wrapped forward": lambda: wrapped(Pair()),
    "another norm": lambda: Pair(norm=Forgetful),
    "statistics of the batch": lambda: of_the_batch(Pair()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", UNFOLDED)
def test_a_layer_that_computes_more_than_its_class_says_is_left_alone(name, caplog):
    network = trained(UNFOLDED[name]()).requires_grad_(False)
    expected = network(pixels(4))
    with caplog.at_level(logging.WARNING):
        folded = folded_copy(network, {"x": pixels(4)})
    assert norms(folded) == 1 and not caplog.records
    assert torch.equal(folded(pixels(4)), expected)


def test_a_norm_that_goes_on_learning_is_left_alone():
    network = in_train_mode(trained(Pair()))
    assert norms(folded_copy(network, {"x": pixels(4)})) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": Conv2dSame, "stride": 2},
        {"padding": 1, "padding_mode": "reflect", "bias": False},
        {"padding": "same", "padding_mode": "circular"},
        {"norm": BatchNormAct2d},
        {"norm": partial(nn.BatchNorm2d, affine=False)},
    ],
    ids=str,
)
def test_convolutions_of_every_padding_are_folded(settings):
    network = Pair(**settings).double().eval()
    network.norm.running_mean.normal_(0, 0.3)
    network.norm.running_var.uniform_(0.5, 2.0)
    folded = folded_copy(network, {"x": pixels()})
    assert norms(folded) == 0
    torch.testing.assert_close(folded(pixels()), network(pixels()), rtol=1e-10, atol=1e-12)


def test_a_network_of_timm_with_standardised_convolutions():
    small = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_chs": 8, "num_classes": 10}
    plain = trained(timm.create_model("resnetv2_50", **small))
    assert norms(folded_copy(plain, {"x": pixels()})) < norms(plain)
    network = trained(timm.create_model("resnetv2_50", **small, conv_layer=StdConv2d))
    folded = folded_copy(network, {"x": pixels()})
    assert norms(folded) == norms(network) and torch.equal(folded(pixels()), network(pixels()))


def test_a_norm_in_two_places_is_replaced_in_both():
    network = Pair()
    network.before = nn.ModuleDict({"norm": network.norm})  # found first, while forward calls the other
    network._modules = {"before": network._modules.pop("before"), **network._modules}
    network = trained(network)
    folded = folded_copy(network, {"x": pixels()})
    assert norms(folded) == 0
    torch.testing.assert_close(folded(pixels()), network(pixels()), rtol=1e-10, atol=1e-12)


def test_a_norm_that_is_called_by_keyword_stays():
    class Named(Pair):
        def forward(self, x):
            return self.out(self.norm(input=self.convolution(x)).relu().mean((2, 3)))

    network = trained(Named())
    assert torch.equal(folded_copy(network, {"x": pixels()})(pixels()), network(pixels()))


class Sneaky(Pair):
    """Uses the convolution's weight behind the convolution's back."""

    def forward(self, x):
        return super().forward(x) + F.conv2d(x, self.convolution.weight).mean((1, 2, 3))[:, None] * 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_where_outputs_would_differ_nothing_is_folded_and_a_warning_names_the_network(caplog, dtype):
    network, x = trained(Sneaky()).to(dtype), pixels(4).to(dtype)
    expected = network(x)
    with caplog.at_level(logging.WARNING):
        folded = folded_copy(network, {"x": x})
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("BatchNorm of Sneaky is not folded into its convolutions: the outputs would differ by ")
    assert norms(folded) == 1 and torch.equal(folded(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(folded.parameters(), network.parameters(), strict=True))


def test_what_is_not_a_number_is_a_difference(caplog):
    network = trained(Pair()).half()
    with torch.no_grad():
        network.norm.running_var.zero_()  # the folded weight overflows, while what BatchNorm reads is small
        network.convolution.weight.mul_(1000)
    x = pixels(4).half() * 1e-3
    folded = folded_copy(network, {"x": x})
    assert norms(folded) == 1 and len(caplog.records) == 1
    assert torch.equal(folded(x), network(x)) and folded(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "wide_resnet28_1_cifar", "tf_efficientnet_b0"])
def test_rounding_is_no_difference(caplog, name, dtype):
    network = trained(timm.create_model(name, num_classes=10)).to(dtype)
    folded = folded_copy(network, {"x": pixels().to(dtype)})
    assert norms(folded) < norms(network) and not caplog.records


def test_what_is_among_nested_outputs_has_a_reader():
    class Nested(Pair):
        def forward(self, x):
            features = self.convolution(x)
            return {"logits": self.out(self.norm(features).relu().mean((2, 3))), "hidden": [(features,)]}

    network = trained(Nested())
    folded = folded_copy(network, {"x": pixels()})
    assert norms(folded) == 1
    assert torch.equal(folded(pixels())["hidden"][0][0], network(pixels())["hidden"][0][0])


def test_the_weights_of_an_lstm_in_bfloat16_are_flattened_for_cudnn(monkeypatch):
    """torch skips bfloat16, which cuDNN computes in: for the time of the call it must not."""
    seen, known = [], torch.backends.cudnn.CUDNN_TENSOR_DTYPES
    network = nn.ModuleDict({"rnn": nn.LSTM(3, 4, batch_first=True)}).eval()
    network.forward = lambda x: network["rnn"](x)[0]
    before = set(known)
    monkeypatch.setattr(
        nn.RNNBase,
        "flatten_parameters",
        lambda self: seen.append((self.weight_hh_l0.dtype, torch.bfloat16 in known)),
    )
    fold_and_cast(network, {"x": torch.randn(2, 5, 3)}, torch.bfloat16)
    assert seen == [(torch.bfloat16, True)]
    assert known == before


@pytest.mark.gpu
def test_cudnn_has_no_warning_for_an_lstm_in_bfloat16(recwarn):
    network = nn.ModuleDict({"rnn": nn.LSTM(3, 4, batch_first=True)}).cuda().eval()
    network.forward = lambda x: network["rnn"](x)[0]
    folded = fold_and_cast(network, {"x": torch.randn(2, 5, 3, device="cuda")}, torch.bfloat16)
    folded(x=torch.randn(2, 5, 3, device="cuda"))
    assert not [warning for warning in recwarn if "contiguous chunk" in str(warning.message)]
    assert len({weight.untyped_storage().data_ptr() for weight in network.parameters()}) == 1
