"""Small encoder-decoders and an XLNet, and sentences for them."""

import torch
from helpers import WORDS, sentences
from transformers import BartConfig, T5Config, T5ForConditionalGeneration, XLNetConfig, XLNetLMHeadModel

BART = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "num_labels": 4,
}


def bart(kind, seed, **changes):
    torch.manual_seed(seed)
    return kind(BartConfig(**{**BART, **changes})).double()


def t5(seed):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double()


def xlnet(seed):
    torch.manual_seed(seed)
    return XLNetLMHeadModel(
        XLNetConfig(vocab_size=WORDS, d_model=16, n_layer=1, n_head=2, d_inner=16, dropout=0.0)
    ).double()


def data_of(labels, rows=8):
    data = sentences(labels, rows)
    for row in data:
        row["input_ids"][3] = 2  # BART classifies by the last end of sequence
        row["input_ids"][4:] = row["input_ids"][4:].where(row["input_ids"][4:] != 2, 3)
        row["input_ids"][:3] = row["input_ids"][:3].where(row["input_ids"][:3] != 2, 3)
    return data
