"""Data as tensors: images read once into uint8 and augmented by the batch, text as streams of token ids.

Import from the modules. Images: `born_again.data.images` reads a dataset, `born_again.data.image_dataset` serves it in
batches, `born_again.data.augment` names and renders the augmented views. Text: `born_again.data.text` reads a corpus
and makes its tokenizer, `born_again.data.streams` cuts it into windows, `born_again.data.grammar` is the embedded one.
"""
