"""DenseNet-BC for 32x32 images, in the depth-growth form of Born Again Neural Networks, registered with timm.

`Densely Connected Convolutional Networks` (Huang et al., CVPR 2017, arXiv 1608.06993) gives the network, `Born Again
Neural Networks` (Furlanello et al., ICML 2018, arXiv 1805.04770) the sizes. The file needs torch and timm only, so
that it can travel beside the weights.
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

__all__ = ["DenseNetCifar"]


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


def _concatenated(module: nn.Module, *features: Tensor) -> Tensor:
    return module(features[0] if len(features) == 1 else torch.cat(features, 1))


def _recomputed(module: nn.Module, *features: Tensor) -> Tensor:
    """Runs `module` on concatenated features without keeping its activations; backward runs it a second time.

    The second run must not move the running statistics of BatchNorm again, else a network trained with gradient
    checkpointing would differ from one trained without. A compiler sees one run only, and takes no context function.
    """
    run = partial(_concatenated, module)
    if torch.compiler.is_compiling():
        return checkpoint(run, *features, use_reentrant=False)
    return checkpoint(run, *features, use_reentrant=False, context_fn=partial(_contexts, module))


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
                features.append(_recomputed(layer, *features))
            return torch.cat(features, 1)  # (b, in_chans + depth * k, h, w)
        # One running concatenation rather than a list: each layer then receives its gradient in one addition, not in
        # as many as there are layers after it.
        for layer in self:
            x = torch.cat((x, layer(x)), 1)  # k more channels
        return x


class Transition(nn.Sequential):
    """BN-ReLU-conv1x1 that compresses the channels, with 2x2 average pooling unless it is the last of the network."""

    def __init__(self, in_chans: int, out_chans: int, pool: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.norm = BatchNormAct2d(in_chans, device=device, dtype=dtype)
        self.conv = nn.Conv2d(in_chans, out_chans, 1, bias=False, device=device, dtype=dtype)
        if pool:
            self.pool = nn.AvgPool2d(2)


class DenseNetCifar(nn.Module):
    """DenseNet-BC for small images: a 3x3 stem, dense blocks at full, half and quarter resolution, a linear head.

    Convolutions start from He's normal distribution over fan-out, BatchNorm at weight 1 and bias 0, the classifier's
    bias at 0, as in the Torch implementation of the DenseNet authors.

    Args:
        depth: Nominal depth; every block has (depth - 4) // 6 layers, 14 for 90, as the counts of 1805.04770 imply.
        growth_rate: Channels k that each layer adds; the stem has 2k, a bottleneck 4k.
        final_compression: Whether a third 1x1 compression, without pooling, follows the last block. The parameter
            counts that 1805.04770 (table 1) gives for 90-60, 80-80 and 80-120 need it.
        compression: Share of the channels that a compression keeps, above 0 and at most 1.
        num_classes: Number of classes; 0 removes the classifier.
        in_chans: Channels of the image.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout probability before the classifier.
        device: Device of the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        ValueError: If depth is below 10, growth_rate below 1, or compression outside (0, 1].
    """

    def __init__(
        self,
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
        super().__init__()
        if depth < 10:
            raise ValueError(f"depth={depth} leaves a dense block without layers; give 10 or more.")
        if growth_rate < 1:
            raise ValueError(f"growth_rate={growth_rate} adds no channels; give 1 or more.")
        if not 0 < compression <= 1:
            raise ValueError(f"compression={compression} is the share of channels kept; give a number in (0, 1].")
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        block_depth = (depth - 4) // 6
        chans = 2 * growth_rate
        self.feature_info = []
        self.stem = nn.Conv2d(in_chans, chans, 3, padding=1, bias=False, **dd)
        for i in (1, 2, 3):
            self.add_module(f"block{i}", DenseBlock(block_depth, chans, growth_rate, **dd))
            chans += block_depth * growth_rate
            if i < 3:
                self.feature_info.append({"num_chs": chans, "reduction": 2 ** (i - 1), "module": f"block{i}"})
            if i < 3 or final_compression:
                self.add_module(f"transition{i}", Transition(chans, int(chans * compression), pool=i < 3, **dd))
                chans = int(chans * compression)
        self.norm = BatchNormAct2d(chans, **dd)
        self.feature_info.append({"num_chs": chans, "reduction": 4, "module": "norm"})
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
        """Patterns by which timm groups parameters from input to output, by block or (not coarse) by layer."""
        # 99999 puts what it matches into the group before: a transition into that of the last layer of its block.
        pattern = r"^(?:block|transition)(\d+)" if coarse else r"^block(\d+)\.(\d+)"
        return {
            "stem": r"^stem",
            "blocks": [(pattern, None), (r"^transition(\d+)", (99999,)), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns recomputing the dense layers in backward on or off, for memory; values and gradients stay the same."""
        for module in self.modules():
            if isinstance(module, DenseBlock):
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
        x = self.stem(x)  # (b, 2k, h, w)
        x = self.transition1(self.block1(x))  # (b, any channels, h // 2, w // 2)
        x = self.transition2(self.block2(x))  # (b, any channels, h // 4, w // 4)
        x = self.block3(x)
        if hasattr(self, "transition3"):
            x = self.transition3(x)
        return self.norm(x)  # (b, num_features, h // 4, w // 4)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Computes features together with the outputs of blocks 1 and 2 and of the final norm (indices 0, 1 and 2).

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
    "densenet112_33_cifar": {"depth": 112, "growth_rate": 33, "final_compression": False},
    "densenet106_33_cifar": {"depth": 106, "growth_rate": 33, "final_compression": False},
    "densenet90_60_cifar": {"depth": 90, "growth_rate": 60},
    "densenet80_80_cifar": {"depth": 80, "growth_rate": 80},
    "densenet80_120_cifar": {"depth": 80, "growth_rate": 120},
    "test_densenet_cifar": {"depth": 16, "growth_rate": 8},
}

default_cfgs = generate_default_cfgs({name: _cfg() for name in _SIZES})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> DenseNetCifar:
    return build_model_with_cfg(
        DenseNetCifar,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2)},
        **{**_SIZES[variant], **kwargs},
    )


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
