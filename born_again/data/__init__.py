"""Data as tensors: images read once into uint8 and augmented by the batch, text as streams of token ids.

Import from the modules: `born_again.data.images` reads an image dataset, `born_again.data.image_dataset` serves it in
batches, `born_again.data.augment` names and renders the augmented views.
"""
