"""Tiny random models of many architectures, and a tokenizer, made on the spot."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "the cat sat on the mat and looked at the moon. ",
    "3 + 4 = 7, and 7 + 5 = 12; so 3 + 4 + 5 = 12. ",
    "def add(a, b):\n    return a + b\n",
    "a thought is a token that nobody reads aloud. ",
] * 8

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

# What makes each family's tiny model; the vocabulary size comes from the tokenizer.
TINY: dict[str, dict] = {
    "llama": BASE,
    "qwen2": BASE,
    "qwen3": BASE | {"head_dim": 8},
    "gpt2": GPT2,
    "gpt_neox": BASE,
    "mistral": BASE | {"sliding_window": None, "head_dim": 8},
    "gemma2": BASE | {"head_dim": 8, "sliding_window": 256, "query_pre_attn_scalar": 8},
    "gemma3_text": BASE | {"head_dim": 8, "sliding_window": 256, "query_pre_attn_scalar": 8},
    "phi3": BASE | {"pad_token_id": 0},
    "olmo2": BASE,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "granite": BASE | {"logits_scaling": 4.0},
    "cohere2": BASE | {"sliding_window": 256, "logit_scale": 0.25},
    "phi": BASE,
}


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


def tiny_model(
    family: str = "llama", attn: str = "sdpa", tie: bool = True, vocab_size: int = 320, seed: int = 0, scale: float = 1.0, **changes
) -> torch.nn.Module:
    """A random model in fp32. Weights are scaled up so that attention matters."""
    options = TINY[family] | {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0} | changes
    if family not in ("bloom", "mamba", "opt", "gpt2"):
        options["tie_word_embeddings"] = tie
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    kwargs = {} if family in ("bloom", "mamba") else {"attn_implementation": attn}
    model = AutoModelForCausalLM.from_config(config, **kwargs).eval()
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
