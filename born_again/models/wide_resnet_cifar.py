"""Pre-activation Wide-ResNet for 32x32 images, registered with timm.

`Wide Residual Networks` (Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146) gives the network, `Born Again Neural
Networks` (Furlanello et al., ICML 2018, arXiv 1805.04770) the sizes. The file needs torch and timm only, so that it
can travel beside the weights.
"""

# No `from __future__ import annotations`: TorchScript reads no annotation that is text.

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from born_again.models.cifar_network import BlockGroup, CifarNetwork, WideBlock, cifar_cfg, create_network

__all__ = ["WideResNetCifar"]


class WideResNetCifar(CifarNetwork):
    """Wide-ResNet for small images: a 3x3 stem, three groups at full, half and quarter resolution, a linear head.

    Convolutions start from He's normal distribution over fan-out, BatchNorm at weight 1 and bias 0, the classifier's
    bias at 0, as in the Torch implementation of the authors.

    Args:
        depth: Depth 6n + 4 for n blocks in every group.
        width: Factor w of the widths of the groups (base_width x w, 2 x base_width x w, 4 x base_width x w).
        base_width: Channels of the stem; 16 in the paper.
        num_classes: Number of classes; 0 removes the classifier.
        in_chans: Channels of the image.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout probability before the classifier.
        proj_drop_rate: Dropout probability between the two convolutions of every block; 0.3 where 1605.07146 uses it.
        device: Device of the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        ValueError: If depth is not 6n + 4 with n of 1 or more, or a width is below 1.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 1,
        base_width: int = 16,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth} is not 6n + 4 for n blocks per group; give 10, 16, 22, 28, 34, 40, ...")
        if width < 1 or base_width < 1:
            raise ValueError(f"width={width} and base_width={base_width} count channels; give 1 or more for both.")
        dd = {"device": device, "dtype": dtype}

        chans = base_width
        self.stem = nn.Conv2d(in_chans, chans, 3, padding=1, bias=False, **dd)
        for i in (1, 2, 3):
            out_chans = base_width * width * 2 ** (i - 1)
            blocks = [WideBlock(chans, out_chans, 1 if i == 1 else 2, proj_drop_rate, **dd)]
            blocks += [WideBlock(out_chans, out_chans, 1, proj_drop_rate, **dd) for _ in range((depth - 4) // 6 - 1)]
            self.add_module(f"group{i}", BlockGroup(*blocks))
            chans = out_chans
            if i < 3:
                self.feature_info.append({"num_chs": chans, "reduction": 2 ** (i - 1), "module": f"group{i}"})
        self._add_head(chans, global_pool, **dd)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters from input to output, by group or (not coarse) by block."""
        pattern = r"^group(\d+)" if coarse else r"^group(\d+)\.(\d+)"
        # 99999 puts the final norm into the group before it.
        return {"stem": r"^stem", "blocks": [(pattern, None), (r"^norm", (99999,))]}

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images (batch, in_chans, height, width) to features (batch, num_features, height // 4, width // 4)."""
        x = self.stem(x)  # (b, base_width, h, w)
        x = self.group3(self.group2(self.group1(x)))  # (b, num_features, h // 4, w // 4)
        return self.norm(x)


_SIZES = {
    "wide_resnet28_1_cifar": {"depth": 28, "width": 1},
    "wide_resnet28_2_cifar": {"depth": 28, "width": 2},
    "wide_resnet28_5_cifar": {"depth": 28, "width": 5},
    "wide_resnet28_10_cifar": {"depth": 28, "width": 10},
    "wide_resnet16_1_cifar": {"depth": 16, "width": 1},
    "test_wide_resnet_cifar": {"depth": 16, "width": 1, "base_width": 8},
}

default_cfgs = generate_default_cfgs({name: cifar_cfg() for name in _SIZES})


_create = partial(create_network, WideResNetCifar, _SIZES)


@register_model
def wide_resnet28_1_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNetCifar:
    """Wide-ResNet-28-1 of 1605.07146 (0.37 M parameters; 0.38 M in 1805.04770, table 1)."""
    return _create("wide_resnet28_1_cifar", pretrained, **kwargs)


@register_model
def wide_resnet28_2_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNetCifar:
    """Wide-ResNet-28-2 of 1605.07146 (1.47 M parameters; 1.48 M in 1805.04770, table 1)."""
    return _create("wide_resnet28_2_cifar", pretrained, **kwargs)


@register_model
def wide_resnet28_5_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNetCifar:
    """Wide-ResNet-28-5 of 1605.07146 (9.1 M parameters; 9.16 M in 1805.04770, table 1)."""
    return _create("wide_resnet28_5_cifar", pretrained, **kwargs)


@register_model
def wide_resnet28_10_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNetCifar:
    """Wide-ResNet-28-10 of 1605.07146 (36.5 M parameters; 36 M in 1805.04770, table 1)."""
    return _create("wide_resnet28_10_cifar", pretrained, **kwargs)


@register_model
def wide_resnet16_1_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNetCifar:
    """Wide-ResNet-16-1 of 1605.07146, 0.18 M parameters: small enough to train on a CPU."""
    return _create("wide_resnet16_1_cifar", pretrained, **kwargs)


@register_model
def test_wide_resnet_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNetCifar:
    """A Wide-ResNet of 44,274 parameters with every part of the large ones, for tests."""
    return _create("test_wide_resnet_cifar", pretrained, **kwargs)
