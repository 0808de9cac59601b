"""The table in docs/architectures.md and its counts, found out on tiny random models: `python tests/architectures_table.py` writes them."""

import re
from pathlib import Path
from unittest import mock

import torch
from models import has_sdpa
from plain_rows import T, Text, close, sample, thinker, thought_mask

from hf_thinktok import engine
from hf_thinktok.rollout import Sampling, thought_logps
from hf_thinktok.tree import Branching

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architectures.md"
PAGES = [PAGE, ROOT / "README.md"]
BLOCK = re.compile(r"(<!-- (?P<what>table|counts) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)

WINDOW = {"sliding_window": 8}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
QWEN_MIXED = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
PADDED = {"vocab_size": 576}
# Family, what is particular about it, and the changes to its tiny model. Windows are shorter than the rows.
MODELS: list[tuple[str, str, dict]] = [
    ("llama", "tied embeddings", {}),
    ("llama", "untied embeddings", {"tie": False}),
    ("llama", "padded vocabulary", PADDED),
    *((family, "", {}) for family in "qwen2 qwen3 gemma olmo olmo2 seed_oss hunyuan_v1_dense ernie4_5 arcee".split()),
    *((family, "", {}) for family in "apertus apertus1p5_text exaone helium nemotron xglm opt gpt2 gpt_bigcode gptj codegen diffllama".split()),
    *((family, "partial rotary positions", {}) for family in "phi stablelm gpt_neox glm glm4".split()),
    ("smollm3", "layers without positions", {}),
    ("minicpm3", "latent attention", {}),
    ("granite", "scaled logits", {}),
    ("cohere", "scaled logits", {}),
    ("nanochat", "soft-capped logits", {}),
    ("falcon", "rotary positions", {}),
    ("bert-generation", "as a decoder", {}),
    *((family, "window", WINDOW) for family in "mistral phi3 starcoder2".split()),
    ("qwen2", "window in some layers", QWEN_MIXED),
    ("qwen3", "window in some layers", QWEN_MIXED),
    *((family, "window in some layers", MIXED) for family in "gemma3_text gemma4_text cohere2 olmo3 exaone4".split()),
    ("gemma3n_text", "window in some layers, per-layer embeddings, soft-capped logits", MIXED),
    ("gemma2", "window in some layers, soft-capped attention and logits", MIXED),
    ("modernbert-decoder", "window in some layers", {"local_attention": 8}),
    ("gpt_oss", "window in some layers, attention sinks, experts", MIXED),
    ("llama4_text", "chunked attention, experts", {"attention_chunk_size": 8, "attn_temperature_tuning": False}),
    ("llama4_text", "chunked attention, experts, attention temperature tuning", {"attention_chunk_size": 8}),
    *((family, "experts", {}) for family in "mixtral qwen2_moe qwen3_moe olmoe granitemoe phimoe glm4_moe sarvam_moe".split()),
    *((family, "experts", {}) for family in "ernie4_5_moe hunyuan_v1_moe minimax_m2 jetmoe".split()),
    ("dbrx", "experts", {"tie": False}),
    *((family, "experts, latent attention", {}) for family in "deepseek_v2 deepseek_v3 sarvam_mla".split()),
    ("gpt_neo", "window in some layers", {"window_size": 8}),
    ("openai-gpt", "", {}),
    ("bloom", "alibi", {}),
    ("mpt", "alibi", {}),
    ("falcon", "alibi", {"alibi": True}),
    *((family, "state space", {}) for family in ("mamba", "mamba2", "falcon_mamba")),
    *((family, "state space and attention", {}) for family in "jamba bamba falcon_h1 zamba2 nemotron_h granitemoehybrid".split()),
    *((family, "linear attention and attention", {}) for family in "qwen3_next qwen3_5_text olmo_hybrid kimi_linear minimax".split()),
    ("lara_mini", "linear attention and attention, experts", {}),
    ("inkling2_loop_text", "convolutions and attention, looped layers, experts", {"sliding_window_size": 8}),
    ("recurrent_gemma", "recurrent layers and attention", {}),
    ("lfm2", "convolutions and attention", {}),
    ("rwkv", "recurrent", {"tie": False}),
    ("xlstm", "recurrent, padded vocabulary", PADDED),
    ("xlstm", "recurrent", {}),
    ("dory", "looped layers, a scale for each logit", {}),
    ("apertus1p5_text", "ids that are only read", {"output_vocab_size": 300, "tie": False}),
    ("bert", "as a decoder", {}),
    ("bert-generation", "as an encoder", {"is_decoder": False}),
]


def outcome(family: str, attn: str, changes: dict) -> tuple[str, str]:
    """The path that a family's tiny model takes, and why it is not the tree.

    Raises:
        AssertionError: the path is not exact.
    """
    if attn == "sdpa" and not has_sdpa(family):
        return "–", ""
    try:
        model, vocabulary = thinker(family, attn, scale=1.0, **changes)
        with mock.patch.object(engine.logger, "warning") as warning:
            chosen = engine.choose_engine(model, vocabulary, Branching(2, 3, 3), T, 3)
    except ValueError as error:
        return "refused", str(error).split(":")[0]
    # These rows are shorter than a run's: blocks as short as that.
    check_exact(engine.TreeEngine(7) if getattr(chosen, "run_length", None) else chosen, model, vocabulary)
    reason = warning.call_args.args[2] if warning.called else ""
    return chosen.name, re.sub(r" by \S+ standard deviations", "", re.sub(r"^\w+Error: .*", "a tree's mask is an error", reason))


@torch.no_grad()
def check_exact(chosen: engine.Engine, model, vocabulary) -> None:
    """All scores of a tree of sampled thoughts against ordinary rows, and the log-probabilities that they were sampled with against these scores."""
    text = Text(vocabulary, True, Branching(2, 3, 3))
    rollout = sample(chosen, model, vocabulary, text, Sampling(temperature=0.7, draw_stops=True, min_length=1))
    text.thoughts_BKGL, text.lengths_BKG = rollout.thoughts_BKGL, rollout.lengths_BKG
    out = text.scores(chosen, model)
    text.check(out, model, vocabulary)
    logps_BKGL = thought_logps(text.think_logits(out), rollout.thoughts_BKGL, vocabulary, temperature=0.7)
    mask_BKGL = thought_mask(text, rollout)
    close(rollout.logps_BKGL[mask_BKGL], logps_BKGL[mask_BKGL], 1e-5)


def line(family: str, note: str, changes: dict) -> str:
    """One line of the table."""
    (sdpa, why_not_sdpa), (eager, why_not_eager) = (outcome(family, attn, changes) for attn in ("sdpa", "eager"))
    return f"| {family} | {note} | {sdpa} | {eager} | {why_not_sdpa or why_not_eager} |"


def lines_of(page: str) -> list[str]:
    """The lines of a page's table."""
    return next(match["text"].splitlines()[2:] for match in BLOCK.finditer(page) if match["what"] == "table")


def rendered(page: str, lines: list[str]) -> str:
    """A page with its table and its counts made from lines. A family counts as the best of its lines."""
    paths: dict[str, set[str]] = {}
    for one in lines:
        _, family, _, *cells, _, _ = (cell.strip() for cell in one.split("|"))
        paths.setdefault(family, set()).update(cells)
    best = [next(path for path in ("tree", "replicated", "refused") if path in found) for found in paths.values()]
    tree, replicated, refused = (best.count(path) for path in ("tree", "replicated", "refused"))
    texts = {
        "table": "\n".join(["| `model_type` | | sdpa | eager | why not the tree |", "|---|---|---|---|---|", *lines, ""]),
        "counts": f"Of {len(best)} families {tree} run as one packed tree, {replicated} as ordinary rows, which is slower, and {refused} are refused.\n",
    }
    return BLOCK.sub(lambda match: match[1] + texts[match["what"]] + match[4], page)


if __name__ == "__main__":
    lines = [line(*one) for one in MODELS]
    for path in PAGES:
        path.write_text(rendered(path.read_text(), lines))
