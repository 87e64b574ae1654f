"""What the networks for 32x32 images have in common: blocks, timm's interface, initialisation, gradient checkpointing.

The file needs torch and timm only, so that it can travel beside the weights.
"""

# No `from __future__ import annotations`: TorchScript reads no annotation that is text.

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, ClassifierHead
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


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


def recomputed(module: nn.Module, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Computes `run(*inputs)` without keeping its activations; backward computes it a second time.

    The second run must not move the running statistics of BatchNorm again, else a network trained with gradient
    checkpointing would differ from one trained without. A compiler sees one run only, and takes no context function.

    Args:
        module: what `run` calls.
        run: the module itself, or a function of it.
        inputs: of `run`, of any shape.
    """
    if torch.compiler.is_compiling():
        return checkpoint(run, *inputs, use_reentrant=False)
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=partial(_contexts, module))


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
    """Residual blocks, of which the first may change channels and resolution."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_chans, height, width) to the output of the last block."""
        for block in self:
            if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
                x = recomputed(block, block, x)
            else:
                x = block(x)
        return x


class Transition(nn.Sequential):
    """BN-ReLU-conv1x1 that compresses the channels, with 2x2 average pooling unless it is the last of the network."""

    def __init__(self, in_chans: int, out_chans: int, pool: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.norm = BatchNormAct2d(in_chans, device=device, dtype=dtype)
        self.conv = nn.Conv2d(in_chans, out_chans, 1, bias=False, device=device, dtype=dtype)
        if pool:
            self.pool = nn.AvgPool2d(2)


class CifarNetwork(nn.Module):
    """A network with a 3x3 stem, features at full, half and quarter resolution, a final BatchNorm and a linear head.

    A subclass adds its blocks and the entries of `feature_info` for the first two resolutions, calls `_add_head`, and
    defines `forward_features`.

    Args:
        num_classes: Number of classes; 0 removes the classifier.
        in_chans: Channels of the image.
        drop_rate: Dropout probability before the classifier.
    """

    num_features: int

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.feature_info: list[dict[str, Any]] = []

    def _add_head(self, chans: int, global_pool: str, device: Any, dtype: Any) -> None:
        """Adds final norm and classifier, and initialises the weights of the whole network.

        Convolutions start from He's normal distribution over fan-out, BatchNorm at weight 1 and bias 0, the
        classifier's bias at 0, as in the Torch implementations of DenseNet's and Wide-ResNet's authors.
        """
        self.norm = BatchNormAct2d(chans, device=device, dtype=dtype)
        # The last feature map is taken after the final norm, without which its scale means little.
        self.feature_info.append({"num_chs": chans, "reduction": 4, "module": "norm"})
        self.num_features = chans
        self.head = ClassifierHead(
            chans, self.num_classes, pool_type=global_pool, drop_rate=self.drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = chans * self.head.global_pool.feat_mult()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns recomputing the blocks in backward on or off, for memory; values and gradients stay the same."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
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
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Computes features together with those at full and half resolution and after the final norm (0, 1 and 2).

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

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what comes after the last of the wanted outputs of `forward_intermediates`.

        Args:
            indices: as there.
            prune_norm: Without effect: the final norm is one of the outputs, dropped like the others.
            prune_head: Whether to drop pooling and classifier too.

        Returns:
            The indices that were taken.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        names = [name for name, _ in self.named_children() if name != "head"]
        for name in names[names.index(self.feature_info[last]["module"]) + 1 :]:
            setattr(self, name, nn.Identity())
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps features to logits (batch, num_classes), with pre_logits to their pooled (batch, head_hidden_size)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (batch, in_chans, height, width) to logits (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))


def create_network(
    network: type[nn.Module], sizes: dict[str, dict[str, Any]], variant: str, pretrained: bool, **kwargs: Any
) -> Any:
    """Builds a registered network.

    Args:
        network: the class.
        sizes: of its variants, the arguments by name.
        variant: one of them.
        pretrained: as timm's functions take it.
        kwargs: take precedence over the sizes.
    """
    return build_model_with_cfg(
        network, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **{**sizes[variant], **kwargs}
    )


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's default configuration of a network for CIFAR."""
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
