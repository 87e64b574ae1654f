"""DenseNet-BC for 32x32 images, in the depth-growth form of Born Again Neural Networks, registered with timm.

`Densely Connected Convolutional Networks` (Huang et al., CVPR 2017, arXiv 1608.06993) gives the network, `Born Again
Neural Networks` (Furlanello et al., ICML 2018, arXiv 1805.04770) the sizes. The file needs torch and timm only, so
that it can travel beside the weights.
"""

# No `from __future__ import annotations`: TorchScript reads no annotation that is text.

from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from born_again.models.cifar_network import CifarNetwork, Transition, cifar_cfg, create_network, recomputed

__all__ = ["DenseNetCifar"]


def _concatenated(module: nn.Module, *features: Tensor) -> Tensor:
    return module(features[0] if len(features) == 1 else torch.cat(features, 1))


class DenseLayer(nn.Module):
    """BN-ReLU-conv1x1 to 4k channels, then BN-ReLU-conv3x3 to k channels."""

    def __init__(self, in_chans: int, growth_rate: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        bottleneck = 4 * growth_rate
        self.norm1 = BatchNormAct2d(in_chans, **dd)
        self.conv1 = nn.Conv2d(in_chans, bottleneck, 1, bias=False, **dd)
        self.norm2 = BatchNormAct2d(bottleneck, **dd)
        self.conv2 = nn.Conv2d(bottleneck, growth_rate, 3, padding=1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_chans, height, width) to the new (batch, growth_rate, height, width)."""
        x = self.conv1(self.norm1(x))  # (b, 4k, h, w)
        return self.conv2(self.norm2(x))  # (b, k, h, w)


class DenseBlock(nn.Sequential):
    """Layers that each see the block's input and everything the layers before them made."""

    def __init__(self, depth: int, in_chans: int, growth_rate: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(
            *(DenseLayer(in_chans + i * growth_rate, growth_rate, device=device, dtype=dtype) for i in range(depth))
        )
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_chans, height, width) to (batch, in_chans + depth * growth_rate, height, width)."""
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
            # The concatenation happens inside the recomputed part, so that what is kept grows linearly with depth.
            features = [x]
            for layer in self:
                features.append(recomputed(layer, partial(_concatenated, layer), *features))
            return torch.cat(features, 1)  # (b, in_chans + depth * k, h, w)
        # One running concatenation rather than a list: each layer then receives its gradient in one addition, not in
        # as many as there are layers after it.
        for layer in self:
            x = torch.cat((x, layer(x)), 1)  # k more channels
        return x


class DenseNetCifar(CifarNetwork):
    """DenseNet-BC for small images: a 3x3 stem, dense blocks at full, half and quarter resolution, a linear head.

    Convolutions start from He's normal distribution over fan-out, BatchNorm at weight 1 and bias 0, the classifier's
    bias at 0, as in the Torch implementation of the DenseNet authors.

    Args:
        depth: Nominal depth; every block has (depth - 4) // 6 layers, 14 for 90, as the counts of 1805.04770 imply.
        growth_rate: Channels k that each layer adds; a bottleneck has 4k.
        final_compression: Whether a third 1x1 compression, without pooling, follows the last block. The parameter
            counts that 1805.04770 (table 1) gives for 90-60, 80-80 and 80-120 need it.
        compression: Share of the channels that a compression keeps, above 0 and at most 1.
        stem_chans: Channels of the stem; None for 2k. With those of another DenseNet, and as many channels added by a
            block, all transitions have the channels of that network (1805.04770, table 4).
        num_classes: Number of classes; 0 removes the classifier.
        in_chans: Channels of the image.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout probability before the classifier.
        device: Device of the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        ValueError: If depth is below 10, growth_rate or stem_chans below 1, or compression outside (0, 1].
    """

    def __init__(
        self,
        depth: int = 90,
        growth_rate: int = 60,
        final_compression: bool = True,
        compression: float = 0.5,
        stem_chans: int | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        if depth < 10:
            raise ValueError(f"depth={depth} leaves a dense block without layers; give 10 or more.")
        if growth_rate < 1:
            raise ValueError(f"growth_rate={growth_rate} adds no channels; give 1 or more.")
        if stem_chans is not None and stem_chans < 1:
            raise ValueError(f"stem_chans={stem_chans} counts channels; give 1 or more, or None for 2 x growth_rate.")
        if not 0 < compression <= 1:
            raise ValueError(f"compression={compression} is the share of channels kept; give a number in (0, 1].")
        dd = {"device": device, "dtype": dtype}

        block_depth = (depth - 4) // 6
        chans = 2 * growth_rate if stem_chans is None else stem_chans
        self.stem = nn.Conv2d(in_chans, chans, 3, padding=1, bias=False, **dd)
        for i in (1, 2, 3):
            self.add_module(f"block{i}", DenseBlock(block_depth, chans, growth_rate, **dd))
            chans += block_depth * growth_rate
            if i < 3:
                self.feature_info.append({"num_chs": chans, "reduction": 2 ** (i - 1), "module": f"block{i}"})
            if i < 3 or final_compression:
                self.add_module(f"transition{i}", Transition(chans, int(chans * compression), pool=i < 3, **dd))
                chans = int(chans * compression)
        self._add_head(chans, global_pool, **dd)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters from input to output, by block or (not coarse) by layer."""
        # 99999 puts what it matches into the group before: a transition into that of the last layer of its block.
        pattern = r"^(?:block|transition)(\d+)" if coarse else r"^block(\d+)\.(\d+)"
        return {
            "stem": r"^stem",
            "blocks": [(pattern, None), (r"^transition(\d+)", (99999,)), (r"^norm", (99999,))],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images (batch, in_chans, height, width) to features (batch, num_features, height // 4, width // 4)."""
        x = self.stem(x)  # (b, stem_chans, h, w)
        x = self.transition1(self.block1(x))  # (b, any channels, h // 2, w // 2)
        x = self.transition2(self.block2(x))  # (b, any channels, h // 4, w // 4)
        x = self.block3(x)
        if hasattr(self, "transition3"):
            x = self.transition3(x)
        return self.norm(x)  # (b, num_features, h // 4, w // 4)


_SIZES = {
    "densenet112_33_cifar": {"depth": 112, "growth_rate": 33, "final_compression": False},
    "densenet106_33_cifar": {"depth": 106, "growth_rate": 33, "final_compression": False},
    "densenet90_60_cifar": {"depth": 90, "growth_rate": 60},
    "densenet80_80_cifar": {"depth": 80, "growth_rate": 80},
    "densenet80_120_cifar": {"depth": 80, "growth_rate": 120},
    "test_densenet_cifar": {"depth": 16, "growth_rate": 8},
}

default_cfgs = generate_default_cfgs({name: cifar_cfg() for name in _SIZES})


_create = partial(create_network, DenseNetCifar, _SIZES)


@register_model
def densenet112_33_cifar(pretrained: bool = False, **kwargs: Any) -> DenseNetCifar:
    """DenseNet-112-33, 6.89 M parameters; the 6.3 M of 1805.04770 (table 1) fit depth 106, which it names as well."""
    return _create("densenet112_33_cifar", pretrained, **kwargs)


@register_model
def densenet106_33_cifar(pretrained: bool = False, **kwargs: Any) -> DenseNetCifar:
    """DenseNet-106-33, 6.27 M parameters: the size that 1805.04770 (table 1) calls 112-33 fits this one."""
    return _create("densenet106_33_cifar", pretrained, **kwargs)


@register_model
def densenet90_60_cifar(pretrained: bool = False, **kwargs: Any) -> DenseNetCifar:
    """DenseNet-90-60 of 1805.04770 (table 1), 16.1 M parameters."""
    return _create("densenet90_60_cifar", pretrained, **kwargs)


@register_model
def densenet80_80_cifar(pretrained: bool = False, **kwargs: Any) -> DenseNetCifar:
    """DenseNet-80-80 of 1805.04770 (table 1), 22.4 M parameters."""
    return _create("densenet80_80_cifar", pretrained, **kwargs)


@register_model
def densenet80_120_cifar(pretrained: bool = False, **kwargs: Any) -> DenseNetCifar:
    """DenseNet-80-120 of 1805.04770 (table 1), 50.4 M parameters."""
    return _create("densenet80_120_cifar", pretrained, **kwargs)


@register_model
def test_densenet_cifar(pretrained: bool = False, **kwargs: Any) -> DenseNetCifar:
    """A DenseNet of 20,650 parameters with every part of the large ones, for tests."""
    return _create("test_densenet_cifar", pretrained, **kwargs)
