"""Networks for 32x32 images under their timm names; importing this package registers them, and does nothing else."""

from . import densenet_cifar, wide_resnet_cifar

__all__ = ["densenet_cifar", "wide_resnet_cifar"]
