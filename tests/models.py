"""Tiny random models of many architectures, and a tokenizer, made on the spot."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_thinktok import add_thinking_tokens

CORPUS = [
    "the cat sat on the mat and looked at the moon. ",
    "3 + 4 = 7, and 7 + 5 = 12; so 3 + 4 + 5 = 12. ",
    "def add(a, b):\n    return a + b\n",
    "a thought is a token that nobody reads aloud. ",
] * 8

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256}
HEAD = {"head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
# Four experts, two of them at a time, under the names that families give them.
MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}

# What makes each family's tiny model; the vocabulary size comes from the tokenizer.
TINY: dict[str, dict] = {
    **dict.fromkeys(
        "llama qwen2 gpt_neox olmo olmo2 phi stablelm nemotron arcee apertus falcon diffllama nanochat starcoder2 olmo3 exaone exaone4 apertus1p5_text".split(),
        BASE,
    ),
    **dict.fromkeys("qwen3 gemma ernie4_5 hunyuan_v1_dense seed_oss helium".split(), BASE | HEAD),
    **dict.fromkeys("phi3 glm glm4".split(), BASE | HEAD | {"pad_token_id": 0}),
    "smollm3": BASE | {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": GPT2 | {"rotary_dim": 4},
    "codegen": GPT2 | {"rotary_dim": 4},
    "openai-gpt": GPT2,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 256,
        "max_position_embeddings": 256,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
    },
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 256, "dropout": 0.0, "attention_dropout": 0.0},
    "granite": BASE | {"logits_scaling": 4.0},
    "cohere": BASE | {"logit_scale": 0.25},
    "cohere2": BASE | {"sliding_window": 256, "logit_scale": 0.25},
    "mistral": BASE | HEAD | {"sliding_window": None},
    "gemma2": BASE | HEAD | {"sliding_window": 256, "query_pre_attn_scalar": 8},
    "gemma3_text": BASE | HEAD | {"sliding_window": 256, "query_pre_attn_scalar": 8},
    "gemma4_text": BASE
    | HEAD
    | {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 0, "sliding_window": 256},
    "gemma3n_text": BASE
    | HEAD
    | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "sliding_window": 256,
        "layer_types": ["full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.95, 0.0],
    },
    "modernbert-decoder": BASE | {"cls_token_id": 0, "sep_token_id": 0, "pad_token_id": 0},
    **dict.fromkeys("mixtral qwen3_moe olmoe granitemoe phimoe minimax_m2".split(), BASE | HEAD | MOE),
    "qwen2_moe": BASE | MOE | {"shared_expert_intermediate_size": 16},
    "deepseek_v2": BASE | MOE | DEEPSEEK | {"first_k_dense_replace": 1, "topk_method": "greedy"},
    "deepseek_v3": BASE | MOE | DEEPSEEK | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "minicpm3": BASE | DEEPSEEK,
    "glm4_moe": BASE | HEAD | MOE | {"n_group": 1, "topk_group": 1, "pad_token_id": 0},
    "sarvam_moe": BASE | HEAD | MOE | {"pad_token_id": 0},
    "sarvam_mla": BASE | MOE | DEEPSEEK | {"q_lora_rank": None},
    "ernie4_5_moe": BASE | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "hunyuan_v1_moe": BASE | HEAD | {"num_experts": 4, "moe_topk": 2},
    "gpt_oss": BASE | HEAD | MOE | {"sliding_window": 256},
    "llama4_text": BASE | HEAD | MOE | {"attention_chunk_size": 256, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0]},
    "jetmoe": BASE | MOE | {"kv_channels": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
    "xlstm": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 8},
    "jamba": BASE | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False},
    "bamba": BASE | MAMBA2 | {"attn_layer_indices": [1]},
    "falcon_h1": BASE | MAMBA2,
    "zamba2": BASE | {"layers_block_type": ["linear_attention", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 4, "chunk_size": 8, "num_key_value_heads": 4},
    "nemotron_h": BASE
    | {"layers_block_type": ["mamba", "attention"], "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "granitemoehybrid": BASE | MOE | MAMBA2 | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "recurrent_gemma": BASE | {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "lru_width": 32},
    "lfm2": BASE | {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": BASE | HEAD | MOE | DELTA | LINEAR | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": BASE | HEAD | DELTA | LINEAR,
    "olmo_hybrid": BASE | LINEAR | {"pad_token_id": 0},
    "kimi_linear": BASE | MOE | DEEPSEEK | LINEAR | {"linear_head_dim": 8, "linear_num_heads": 4, "pad_token_id": 0},
    "minimax": BASE | MOE | LINEAR,
    "lara_mini": BASE | HEAD | MOE | DELTA | LINEAR | {"shared_expert_intermediate_size": 16},
    "inkling2_loop_text": BASE
    | HEAD
    | MOE
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 256, "rel_extent": 64}
    | {"layer_types": ["hybrid_sliding", "hybrid"], "n_layers_per_attn_res_block": 1, "loop_gate_rank": 4, "unpadded_vocab_size": 320}
    | {"loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2},
    "dory": BASE | HEAD | {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "sliding_window": 256},
    **dict.fromkeys(["bert", "bert-generation"], BASE | {"is_decoder": True}),
}
TINY = {family: options for family, options in TINY.items() if family in CONFIG_MAPPING}  # without those that this transformers does not know yet

# Constants of hf_thinktok.revival with which whatever is said is split, and whatever is said less than the others is free: a few steps are enough.
EAGER_REVIVAL = {"TIMES_THE_MEAN": 0.0, "LEAST_WRONG": 0.0, "LEAST_SAID": 1, "RARE": 1.0}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with chat markers."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=template)


def has_sdpa(family: str) -> bool:
    """Whether transformers offers sdpa for a family."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]._supports_sdpa


def tiny_model(
    family: str = "llama", attn: str = "sdpa", tie: bool = True, vocab_size: int = 320, seed: int = 0, scale: float = 1.0, **changes
) -> torch.nn.Module:
    """A random model in fp32. Weights are scaled up so that attention matters. Where there is no sdpa, attention is eager."""
    options = TINY[family] | {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tie} | changes
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn if has_sdpa(family) else "eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0 * scale)
    return model


def tokenizer_of_kind(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers that treat text differently before it is split: byte-level BPE under a normalizer, or SentencePiece-like BPE with byte fallback."""
    rewriting = {
        "bytes": None,
        "nfc": normalizers.NFC(),
        "nfkc": normalizers.NFKC(),
        "lowercase": normalizers.Lowercase(),
        "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        "bert": normalizers.BertNormalizer(),
    }
    if kind in rewriting:
        tokenizer = tiny_tokenizer()
        if kind != "bytes":
            tokenizer.backend_tokenizer.normalizer = rewriting[kind]
        return tokenizer
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    strip = []
    if kind == "prepend":  # Llama 2
        bpe.normalizer, strip = normalizers.Sequence([normalizers.Prepend("▁"), space]), [decoders.Strip(" ", 1, 0)]
    elif kind == "replace":  # Gemma
        bpe.normalizer = space
    elif kind == "metaspace":  # Llama 2, not legacy
        bpe.pre_tokenizer, strip = pre_tokenizers.Metaspace(prepend_scheme="first", split=False), [decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=[*special, *bytes_], show_progress=False))
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template)


def save_tiny(folder, think_tokens: int = 0) -> str:
    """A tiny model and its tokenizer in a folder, with thinking tokens or without."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    if think_tokens:
        add_thinking_tokens(model, tokenizer, think_tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(folder) -> str:
    """A saved Llama made into a model whose architecture comes with it, as `trust_remote_code` is for."""
    (Path(folder) / "modeling_own.py").write_text(OWN_CODE)
    config = json.loads((Path(folder) / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (Path(folder) / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": classes}))
    return str(folder)
