"""Residual students of a DenseNet for 32x32 images, registered with timm.

`Born Again Neural Networks` (Furlanello et al., ICML 2018, arXiv 1805.04770), section 4.2 and table 5: each dense
block of the teacher becomes a stack of residual units, between stem, transitions and classifier of the teacher's
sizes, so that stem and classifier can be the teacher's (`born_again.models.shared_ends`). The file needs torch and
timm only, so that it can travel beside the weights.
"""

# No `from __future__ import annotations`: TorchScript reads no annotation that is text.

from functools import partial
from typing import Any

from timm.layers import BatchNormAct2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from born_again.models.cifar_network import BlockGroup, CifarNetwork, Transition, WideBlock, cifar_cfg, create_network

__all__ = ["ResNetStudentCifar"]


class BottleneckBlock(nn.Module):
    """BN-ReLU-conv1x1, BN-ReLU-conv3x3, BN-ReLU-conv1x1, added to the shortcut (He et al. 2016, arXiv 1603.05027)."""

    def __init__(
        self, in_chans: int, bottleneck_chans: int, out_chans: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = BatchNormAct2d(in_chans, **dd)
        self.conv1 = nn.Conv2d(in_chans, bottleneck_chans, 1, bias=False, **dd)
        self.norm2 = BatchNormAct2d(bottleneck_chans, **dd)
        self.conv2 = nn.Conv2d(bottleneck_chans, bottleneck_chans, 3, padding=1, bias=False, **dd)
        self.norm3 = BatchNormAct2d(bottleneck_chans, **dd)
        self.conv3 = nn.Conv2d(bottleneck_chans, out_chans, 1, bias=False, **dd)
        self.shortcut = None
        if in_chans != out_chans:
            self.shortcut = nn.Conv2d(in_chans, out_chans, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_chans, height, width) to (batch, out_chans, height, width)."""
        y = self.norm1(x)
        # Where the channels change both branches start from the activated input; an identity passes the raw one on.
        skip = x if self.shortcut is None else self.shortcut(y)  # (b, out_chans, h, w)
        y = self.conv2(self.norm2(self.conv1(y)))  # (b, bottleneck_chans, h, w)
        return skip + self.conv3(self.norm3(y))


class ResNetStudentCifar(CifarNetwork):
    """A DenseNet for small images whose dense blocks are replaced by stacks of pre-activation residual units.

    Stem, transitions, final norm and classifier have the sizes of the DenseNet given by depth, growth_rate,
    final_compression and compression. With c the channels of a dense block's output after its 1x1 compression, before
    down-sampling, a unit of a stack has

    - without bottleneck two 3x3 convolutions of int(ratio x c) channels (1805.04770, section 4.2);
    - with bottleneck a 3x3 convolution of int(ratio x c / 4) channels between 1x1 convolutions, on int(0.75 x c)
      channels. The paper does not describe its bottleneck units: this is the simplest rule tried that gives both of
      its parameter counts within 1 %. With c instead of 0.75 c the counts are 22 and 15 % above them.

    Args:
        units: Residual units in each of the three stacks.
        ratio: Width ratio of a unit.
        bottleneck: Whether units are bottlenecks.
        depth: Nominal depth of the DenseNet.
        growth_rate: Channels that each of its layers adds.
        final_compression: Whether its last block is followed by a 1x1 compression; here a 1x1 convolution to the width
            of its classifier follows the last stack in any case.
        compression: Share of the channels that its compressions keep, above 0 and at most 1.
        num_classes: Number of classes; 0 removes the classifier.
        in_chans: Channels of the image.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout probability before the classifier.
        device: Device of the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        ValueError: If units is below 1, ratio leaves a convolution without channels, or the DenseNet's sizes are none.
    """

    def __init__(
        self,
        units: int = 4,
        ratio: float = 1.0,
        bottleneck: bool = False,
        depth: int = 90,
        growth_rate: int = 60,
        final_compression: bool = True,
        compression: float = 0.5,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        if units < 1:
            raise ValueError(f"units={units} leaves a stack without residual units; give 1 or more.")
        if depth < 10 or growth_rate < 1 or not 0 < compression <= 1:
            raise ValueError(
                f"depth={depth}, growth_rate={growth_rate} and compression={compression} describe no DenseNet; give "
                "10 or more, 1 or more, and a share in (0, 1]."
            )
        dd = {"device": device, "dtype": dtype}

        dense = 2 * growth_rate
        chans = dense
        self.stem = nn.Conv2d(in_chans, chans, 3, padding=1, bias=False, **dd)
        for i in (1, 2, 3):
            dense += (depth - 4) // 6 * growth_rate
            if i < 3 or final_compression:
                dense = int(dense * compression)
            inner = int(ratio * dense / 4) if bottleneck else int(ratio * dense)
            if inner < 1:
                raise ValueError(f"ratio={ratio} leaves a convolution without channels; give a larger one.")
            blocks: list[nn.Module] = []
            for _ in range(units):
                outer = int(0.75 * dense) if bottleneck else inner
                unit = BottleneckBlock(chans, inner, outer, **dd) if bottleneck else WideBlock(chans, outer, **dd)
                blocks.append(unit)
                chans = outer
            self.add_module(f"group{i}", BlockGroup(*blocks))
            if i < 3:
                self.feature_info.append({"num_chs": chans, "reduction": 2 ** (i - 1), "module": f"group{i}"})
            self.add_module(f"transition{i}", Transition(chans, dense, pool=i < 3, **dd))
            chans = dense
        self._add_head(chans, global_pool, **dd)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters from input to output, by stack or (not coarse) by unit."""
        # 99999 puts what it matches into the group before: a transition into that of the last unit of its stack.
        pattern = r"^(?:group|transition)(\d+)" if coarse else r"^group(\d+)\.(\d+)"
        return {
            "stem": r"^stem",
            "blocks": [(pattern, None), (r"^transition(\d+)", (99999,)), (r"^norm", (99999,))],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images (batch, in_chans, height, width) to features (batch, num_features, height // 4, width // 4)."""
        x = self.stem(x)  # (b, 2k, h, w)
        x = self.transition1(self.group1(x))  # (b, channels of the DenseNet, h // 2, w // 2)
        x = self.transition2(self.group2(x))  # (b, channels of the DenseNet, h // 4, w // 4)
        x = self.transition3(self.group3(x))  # (b, num_features, h // 4, w // 4)
        return self.norm(x)


_SIZES: dict[str, dict[str, Any]] = {
    "resnet_student_pre14_05_cifar": {"units": 14, "ratio": 0.5, "bottleneck": True},
    "resnet_student_pre14_1_cifar": {"units": 14, "ratio": 1.0, "bottleneck": True},
    "resnet_student_wide1_1_cifar": {"units": 1, "ratio": 1.0},
    "resnet_student_wide2_1_cifar": {"units": 2, "ratio": 1.0},
    "resnet_student_wide4_05_cifar": {"units": 4, "ratio": 0.5},
    "resnet_student_wide4_1_cifar": {"units": 4, "ratio": 1.0},
    "test_resnet_student_cifar": {"units": 2, "ratio": 1.0, "bottleneck": True, "depth": 16, "growth_rate": 8},
}

default_cfgs = generate_default_cfgs({name: cifar_cfg() for name in _SIZES})


_create = partial(create_network, ResNetStudentCifar, _SIZES)


@register_model
def resnet_student_pre14_05_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetStudentCifar:
    """Pre-ResNet-14-0.5 of 1805.04770 (table 5), 7.3 M parameters."""
    return _create("resnet_student_pre14_05_cifar", pretrained, **kwargs)


@register_model
def resnet_student_pre14_1_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetStudentCifar:
    """Pre-ResNet-14-1 of 1805.04770 (table 5), 17.8 M parameters; 17.7 M there."""
    return _create("resnet_student_pre14_1_cifar", pretrained, **kwargs)


@register_model
def resnet_student_wide1_1_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetStudentCifar:
    """Wide-ResNet-1-1 of 1805.04770 (table 5), 21.1 M parameters; 20.9 M there."""
    return _create("resnet_student_wide1_1_cifar", pretrained, **kwargs)


@register_model
def resnet_student_wide2_1_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetStudentCifar:
    """Match-Wide-ResNet-2-1 of 1805.04770 (table 5), 43.2 M parameters; 43.1 M there."""
    return _create("resnet_student_wide2_1_cifar", pretrained, **kwargs)


@register_model
def resnet_student_wide4_05_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetStudentCifar:
    """Wide-ResNet-4-0.5 of 1805.04770 (table 5), 24.4 M parameters; 24.3 M there."""
    return _create("resnet_student_wide4_05_cifar", pretrained, **kwargs)


@register_model
def resnet_student_wide4_1_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetStudentCifar:
    """Wide-ResNet-4-1 of 1805.04770 (table 5), 87.4 M parameters; 87.3 M there."""
    return _create("resnet_student_wide4_1_cifar", pretrained, **kwargs)


@register_model
def test_resnet_student_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetStudentCifar:
    """A student of test_densenet_cifar with bottlenecks, for tests."""
    return _create("test_resnet_student_cifar", pretrained, **kwargs)
