"""Tiny networks of every family of transformers, made of nothing but their configurations' defaults, shrunk."""

from __future__ import annotations

import inspect

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

TASKS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
)
VOCABULARY = 48
PAD, START, END = 0, 1, 2
LARGEST = 50_000_000  # parameters; what stays larger is not built

_TO_16 = """
    hidden_size d_model n_embd dim embed_dim emb_dim intermediate_size d_ff d_inner n_inner ffn_dim hidden_dim
    encoder_ffn_dim decoder_ffn_dim embedding_size d_embed projection_dim moe_intermediate_size
    shared_expert_intermediate_size encoder_hidden_dim output_dim neck_hidden_sizes conv_dim hidden_sizes embed_dims
    dense_intermediate_size lru_width expert_ffn_hidden_size ffn_hidden_size cross_attention_hidden_size
    shared_intermediate_size encoder_hidden_size decoder_hidden_size mamba_d_head intermediate_size_mlp
    hidden_size_per_layer_input audio_hidden_size image_hidden_size d_latents num_latents max_seqlen_blocks
""".split()
_TO_8 = """
    head_dim d_head d_kv v_head_dim kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim state_size mamba_d_state
    global_head_dim swa_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim index_head_dim patch_size
    attention_head_dim window_size mamba_dt_rank rotary_dim qk_head_dim
""".split()
_TO_4 = """
    num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers
    num_experts num_local_experts n_routed_experts moe_num_experts
""".split()
_TO_2 = """
    num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_key_value_heads
    num_experts_per_tok num_experts_per_token moe_topk moe_k n_group depths num_cross_attention_heads
    num_self_attention_heads
    linear_num_key_heads linear_num_value_heads mamba_n_heads swa_num_attention_heads swa_num_key_value_heads
    index_n_heads vision_layers num_block_repeats num_self_attends_per_block
""".split()
# What an attribute becomes where its default is larger, or None; lists entry by entry.
SIZES = {
    **dict.fromkeys(_TO_16, 16),
    **dict.fromkeys(_TO_8, 8),
    **dict.fromkeys(_TO_4, 4),
    **dict.fromkeys(_TO_2, 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("vocab_size", "entity_vocab_size", "vocab_size_per_layer_input", "src_vocab_size"), VOCABULARY),
    "tgt_vocab_size": VOCABULARY,
    "image_size": 32,
    "topk_group": 1,
}
_WHERE_NONE = ("head_dim", "num_key_value_heads", "moe_intermediate_size", "num_experts_per_tok", "n_routed_experts")
_TOKENS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
# Where sizes hang on one another in ways of their own.
OWN = {
    "bit": {"num_groups": 4},
    "blenderbot": {"decoder_layers": 2},
    "bros": {"hidden_size": 64},
    "bailing_hybrid": {"num_group": 1, "n_group": 1},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "cvt": {"depth": [1, 2, 3], "num_heads": [1, 2, 2], "embed_dim": [16, 16, 16]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "donut-swin": {"image_size": 224, "window_size": 7},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "efficientnet": {"hidden_dim": 640, "width_coefficient": 0.5, "depth_coefficient": 0.5},
    "esm": {"vocab_size": VOCABULARY},
    "gemma3n_text": {"intermediate_size": 16, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hgnet_v2": {"hidden_sizes": [256, 512, 1024, 2048]},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4},
    "levit": {"image_size": 224, "patch_size": 16, "hidden_sizes": [128, 256, 384], "num_attention_heads": [4, 8, 12]},
    "lilt": {"hidden_size": 24},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 2},
    "mimo_v2_flash": {"num_attention_heads": 4},
    "mistral4": {"head_dim": 16, "qk_head_dim": 16},
    "neomme": {"head_dim": 16},
    "perceiver": {"num_cross_attention_heads": 1},
    "mobilevitv2": {"image_size": 64},
    "reformer": {"axial_pos_embds": False},
    "swin": {"image_size": 224, "window_size": 7},
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
}


def networks(task: str) -> dict[str, type[PreTrainedModel]]:
    """The classes that transformers' auto class of a task would take, by name."""
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
    flat = [name for entry in names for name in ([entry] if isinstance(entry, str) else entry)]
    return {name: getattr(transformers, name) for name in dict.fromkeys(flat)}


def tiny_config(kind: type[PretrainedConfig], **changes) -> PretrainedConfig:
    default = kind()
    values = {name: _shrunk(name, value) for name, value in default.to_dict().items()}
    values = {name: value for name, value in values.items() if value is not None}
    for name in kind.sub_configs:
        given = getattr(default, name, None)
        if isinstance(given, PretrainedConfig):
            values[name] = tiny_config(type(given)).to_dict()
    if hasattr(default, "output_router_logits"):
        values["output_router_logits"] = True
    if getattr(default, "is_encoder_decoder", False):
        values["decoder_start_token_id"] = START
    values["use_cache"] = False
    return kind(**{**values, **OWN.get(kind.model_type, {}), **changes})


def _shrunk(name: str, value):
    if name in _TOKENS:
        return _TOKENS[name]
    if name.endswith("_token_id"):
        return 3 if _is_large(value, VOCABULARY - 1) else None
    if name not in SIZES:
        return None
    if isinstance(value, list | tuple) and value and all(isinstance(entry, int) for entry in value):
        return [min(entry, SIZES[name]) for entry in value]
    if value is None:
        return SIZES[name] if name in _WHERE_NONE else None
    return SIZES[name] if _is_large(value, SIZES[name]) else None


def _is_large(value, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > most


def build(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A network of a class, or the reason why there is none."""
    config = tiny_config(kind.config_class)
    if kind.__name__ == "ReformerModelWithLMHead":
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return kind(config).float()


def batch_for(network: PreTrainedModel, task: str, rows: int = 2, tokens: int = 16) -> dict[str, torch.Tensor]:
    """What a data set of the task would give this network."""
    names = inspect.signature(network.forward).parameters
    generator = torch.Generator().manual_seed(1)
    config, inputs = network.config, {}
    if "input_ids" in names:
        ids = torch.randint(4, VOCABULARY, (rows, tokens), generator=generator)
        ids[:, -1] = END
        inputs["input_ids"] = ids
        if "attention_mask" in names:
            inputs["attention_mask"] = torch.ones(rows, tokens, dtype=torch.int64)
    elif "pixel_values" in names:
        size = getattr(config, "image_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        inputs["pixel_values"] = torch.randn(rows, channels, height, width, generator=generator)
    if "bbox" in names:
        inputs["bbox"] = torch.zeros(rows, tokens, 4, dtype=torch.int64)
    shape = (rows,) if task in ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION") else (rows, tokens)
    classes = VOCABULARY if task.endswith("LM") else config.num_labels
    return {**inputs, "labels": torch.randint(min(4, classes - 1), classes, shape, generator=generator)}
