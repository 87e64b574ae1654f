"""A folded network says what the network says."""

import pytest
import timm
import torch
from torch import nn

import born_again  # noqa: F401
from born_again.inference_form import inference_form
from born_again.models.image_classifier import create_image_classifier


def trained(network):
    """Statistics and scales as a training leaves them: none of them 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
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
    folded = inference_form(network, {"x": pixels()})
    with torch.no_grad():
        torch.testing.assert_close(folded(pixels()), network(pixels()), rtol=1e-10, atol=1e-12)
    assert norms(folded) < norms(network) if left is None else norms(folded) == left
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not folded.training and not any(parameter.requires_grad for parameter in folded.parameters())


def test_a_classifier_of_transformers_and_a_smaller_dtype():
    labels = [str(label) for label in range(10)]
    network = trained(create_image_classifier("wide_resnet16_1_cifar", labels, [0.5] * 3, [0.25] * 3))
    inputs = {"pixel_values": pixels(16)}
    folded = inference_form(network, inputs)
    with torch.no_grad():
        expected = network(**inputs).logits
        torch.testing.assert_close(folded(**inputs).logits, expected, rtol=1e-10, atol=1e-12)
        small = inference_form(network, inputs, torch.bfloat16)(**inputs).logits
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
    folded = inference_form(network, {"x": pixels()})
    assert norms(folded) == 4
    assert torch.equal(folded(pixels()), network(pixels()))


def test_a_network_without_convolutions_is_copied():
    network = nn.Linear(3, 2).eval()
    folded = inference_form(network, {"input": torch.ones(1, 3)})
    assert folded is not network and torch.equal(folded(torch.ones(1, 3)), network(torch.ones(1, 3)))


def test_train_mode_is_refused():
    with pytest.raises(ValueError, match="network: is in train mode, expected eval mode"):
        inference_form(nn.Conv2d(3, 4, 1), {"input": pixels()})
