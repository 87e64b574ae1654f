"""Networks under their timm and transformers names; importing this package registers them, and does nothing else."""

from . import densenet_cifar, language_configs, resnet_students, wide_resnet_cifar

__all__ = ["densenet_cifar", "language_configs", "resnet_students", "wide_resnet_cifar"]
