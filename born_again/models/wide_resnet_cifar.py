"""Pre-activation Wide-ResNet for 32x32 images, registered with timm.

`Wide Residual Networks` (Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146) gives the network, `Born Again Neural
Networks` (Furlanello et al., ICML 2018, arXiv 1805.04770) the sizes. The file needs torch and timm only, so that it
can travel beside the weights.
"""

# No `from __future__ import annotations`: TorchScript reads no annotation that is text.

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["WideResNetCifar"]


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    # Momentum 0 rather than track_running_stats=False: both runs have to save the same tensors for backward.
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros((), dtype=torch.long)
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


def _contexts(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _frozen_statistics(module)


def _recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """Runs `module` without keeping its activations; backward runs it a second time.

    The second run must not move the running statistics of BatchNorm again, else a network trained with gradient
    checkpointing would differ from one trained without. A compiler sees one run only, and takes no context function.
    """
    if torch.compiler.is_compiling():
        return checkpoint(module, x, use_reentrant=False)
    return checkpoint(module, x, use_reentrant=False, context_fn=partial(_contexts, module))


class WideBlock(nn.Module):
    """BN-ReLU-conv3x3, BN-ReLU-dropout-conv3x3, added to the shortcut (1605.07146, section 2 and figure 1d).

    Dropout stands where the authors' Torch implementation has it, after the ReLU and before the second convolution.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        stride: int = 1,
        proj_drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = BatchNormAct2d(in_chans, **dd)
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm2 = BatchNormAct2d(out_chans, **dd)
        self.drop = nn.Dropout(proj_drop_rate) if proj_drop_rate else nn.Identity()
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False, **dd)
        self.shortcut = None
        if in_chans != out_chans or stride != 1:
            self.shortcut = nn.Conv2d(in_chans, out_chans, 1, stride=stride, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_chans, height, width) to (batch, out_chans, height // stride, width // stride)."""
        y = self.norm1(x)
        # Where the shape changes both branches start from the activated input; an identity passes the raw one on.
        skip = x if self.shortcut is None else self.shortcut(y)  # (b, out_chans, h // stride, w // stride)
        y = self.conv1(y)  # (b, out_chans, h // stride, w // stride)
        return skip + self.conv2(self.drop(self.norm2(y)))


class BlockGroup(nn.Sequential):
    """The blocks of one width; the first one changes channels and resolution."""

    def __init__(
        self,
        depth: int,
        in_chans: int,
        out_chans: int,
        stride: int,
        proj_drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        shared = {"proj_drop_rate": proj_drop_rate, "device": device, "dtype": dtype}
        super().__init__(
            WideBlock(in_chans, out_chans, stride, **shared),
            *(WideBlock(out_chans, out_chans, **shared) for _ in range(depth - 1)),
        )
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_chans, height, width) to (batch, out_chans, height // stride, width // stride)."""
        for block in self:
            if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
                x = _recomputed(block, x)
            else:
                x = block(x)
        return x


class WideResNetCifar(nn.Module):
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
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth} is not 6n + 4 for n blocks per group; give 10, 16, 22, 28, 34, 40, ...")
        if width < 1 or base_width < 1:
            raise ValueError(f"width={width} and base_width={base_width} count channels; give 1 or more for both.")
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        chans = base_width
        self.feature_info = []
        self.stem = nn.Conv2d(in_chans, chans, 3, padding=1, bias=False, **dd)
        for i in (1, 2, 3):
            out_chans = base_width * width * 2 ** (i - 1)
            group = BlockGroup((depth - 4) // 6, chans, out_chans, 1 if i == 1 else 2, proj_drop_rate, **dd)
            self.add_module(f"group{i}", group)
            chans = out_chans
            # The last feature map is taken after the final norm, without which its scale means little.
            tap = f"group{i}" if i < 3 else "norm"
            self.feature_info.append({"num_chs": chans, "reduction": 2 ** (i - 1), "module": tap})
        self.norm = BatchNormAct2d(chans, **dd)
        self.num_features = chans
        self.head = ClassifierHead(chans, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = chans * self.head.global_pool.feat_mult()
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters from input to output, by group or (not coarse) by block."""
        pattern = r"^group(\d+)" if coarse else r"^group(\d+)\.(\d+)"
        # 99999 puts the final norm into the group before it.
        return {"stem": r"^stem", "blocks": [(pattern, None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns recomputing the blocks in backward on or off, for memory; values and gradients stay the same."""
        for module in self.modules():
            if isinstance(module, BlockGroup):
                module.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity when num_classes is 0."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the network a new classifier, and another global pooling where one is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        if isinstance(self.head.fc, nn.Linear):
            nn.init.zeros_(self.head.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images (batch, in_chans, height, width) to features (batch, num_features, height // 4, width // 4)."""
        x = self.stem(x)  # (b, base_width, h, w)
        x = self.group3(self.group2(self.group1(x)))  # (b, num_features, h // 4, w // 4)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Computes features together with the outputs of groups 1 and 2 and of the final norm (indices 0, 1 and 2).

        Args:
            x: Images of (batch, in_chans, height, width).
            indices: Which of the three to return: the last so many, a list of indices, or all (None).
            norm: Without effect: the last of the three is normalised, the others never are.
            stop_early: Whether to leave out what comes after the last of the wanted outputs.
            output_fmt: "NCHW" is the one format there is.
            intermediates_only: Whether to return the list alone.

        Returns:
            The list of intermediate outputs, or (features, list).

        Raises:
            ValueError: If output_fmt is another than "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not available for a convolutional network; give 'NCHW'.")
        take, last = feature_take_indices(len(self.feature_info), indices)
        taps = [info["module"] for info in self.feature_info]
        intermediates = []
        for name, module in self.named_children():
            if name == "head":
                break
            x = module(x)
            if name in taps and taps.index(name) in take:
                intermediates.append(x)
            if stop_early and name == taps[last]:
                break
        return intermediates if intermediates_only else (x, intermediates)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps features to logits (batch, num_classes), with pre_logits to their pooled (batch, head_hidden_size)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (batch, in_chans, height, width) to logits (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10's training images
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "stem",
        "classifier": "head.fc",
        **kwargs,
    }


_SIZES = {
    "wide_resnet28_1_cifar": {"depth": 28, "width": 1},
    "wide_resnet28_2_cifar": {"depth": 28, "width": 2},
    "wide_resnet28_5_cifar": {"depth": 28, "width": 5},
    "wide_resnet28_10_cifar": {"depth": 28, "width": 10},
    "wide_resnet16_1_cifar": {"depth": 16, "width": 1},
    "test_wide_resnet_cifar": {"depth": 16, "width": 1, "base_width": 8},
}

default_cfgs = generate_default_cfgs({name: _cfg() for name in _SIZES})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> WideResNetCifar:
    return build_model_with_cfg(
        WideResNetCifar,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2)},
        **{**_SIZES[variant], **kwargs},
    )


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
