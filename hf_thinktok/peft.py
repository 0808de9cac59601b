"""Adapters that train thinking rows as well, and a second one that speaks."""

import copy
import logging
import os
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PeftType, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file, find_adapter_config_file

from ._compat import DUMMY_TARGET_MODULES, BaseTunerLayer, check_target_module_exists
from .tokens import ThinkingVocabulary, stored_options

logger = logging.getLogger(__name__)

# The second model of `policies: split`, or the second adapter, and the folder it is saved in.
SPEAKER = "speaker"
# Ways to begin an adapter that take out of the base what they put into it.
WRITE_INTO_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Those of them that do not come to the same when the adapter is loaded onto its base: by chance, or from data that is not there then.
NEVER_THE_SAME = ("pissa_niter", "corda", "lora_ga")


def thinking_tokens_alone() -> LoraConfig:
    """An adapter without layers: the thinking rows of the embeddings are trained, and nothing else. Without thoughts the model says what it said before."""
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type="CAUSAL_LM")


def add_speaker(model: PeftModel, peft_config: Any) -> None:
    """A second adapter of the same shape. Both get gradients; the first one stays active."""
    model.add_adapter(SPEAKER, copy.deepcopy(peft_config))
    for name, parameter in model.named_parameters():
        if is_speaker(name):
            parameter.requires_grad_(True)


def start_in_base(peft_config: Any) -> str | None:
    """How an adapter begins, where that takes out of the base what it puts into it."""
    start = str(getattr(peft_config, "init_lora_weights", ""))
    return start if start.startswith(WRITE_INTO_BASE) else None


def check_adapter(peft_config: Any, split: bool, beta: float) -> None:
    """Refuses kinds of adapters that would be trained for something else than what is run, measured or merged.

    Args:
        split: a second one is to stand on the same base.
        beta: above 0 the base alone is a reference.

    Raises:
        ValueError: the option, and what to do.
    """
    if getattr(peft_config, "alora_invocation_tokens", None):
        raise ValueError("alora_invocation_tokens works by where they are in rows of text, which trees of thoughts are not: leave it out.")
    if getattr(peft_config, "layer_replication", None):
        raise ValueError("layer_replication makes layers of the base's that share weights, and no merge can keep them apart: leave it out.")
    if getattr(peft_config, "peft_type", None) == PeftType.ADALORA:
        raise ValueError("An AdaLoraConfig moves its ranks and its loss by calls that only a training loop of its own makes: use a LoraConfig.")
    start, biases = start_in_base(peft_config), getattr(peft_config, "bias", "none")
    if start and start.startswith(NEVER_THE_SAME):
        raise ValueError(
            f"init_lora_weights={start} changes the base in a way that loading the adapter does not repeat: take another one, such as true or pissa."
        )
    if start and (split or beta > 0):
        needs = "a second adapter (policies=split) stands on" if split else "beta compares with"
        raise ValueError(f"init_lora_weights={start} changes the base that {needs}: take another one, such as true.")
    if biases != "none" and (split or beta > 0):
        needs, without = ("a second adapter (policies=split) stands on", "policies=shared") if split else ("beta compares with", "beta=0")
        raise ValueError(f"bias={biases} trains biases of the base that {needs}: set bias=none, or {without}.")


def check_base(model: PreTrainedModel, revision: str | None) -> None:
    """An adapter is loaded onto what its base's name leads to, which must have the rows and the weights that it was trained beside. Weights in
    several files are not compared.

    Args:
        revision: that of the name, by the adapter's config.
    """
    if not (name := model.config._name_or_path):
        logger.warning("The model was made here, and its adapter can be loaded by no name: save the model first, and give its folder.")
        return
    where = {"revision": revision or getattr(model.config, "_commit_hash", None)}
    try:
        if not os.path.isdir(name) and where["revision"] is None and try_to_load_from_cache(name, CONFIG_NAME) is None:
            logger.warning(
                "%s seems to be loaded from another revision than main, which is not in the cache, and its adapter would be loaded onto main: "
                "name its revision in peft_config, as in LoraConfig(revision=...).", name,
            )  # fmt: skip
        found, _ = PreTrainedConfig.get_config_dict(name, **where)
    except (OSError, HFValidationError):  # it is not there, or no longer
        return
    text = model.config.get_text_config()
    parts = (part for part in (found, *found.values()) if isinstance(part, dict))  # of some models that of the text is one of several
    stated = [part["vocab_size"] for part in parts if "vocab_size" in part] or [type(text)().vocab_size]  # which is not written where it is the default
    other = "tokens" if text.vocab_size not in stated or found.get("thinktok") != getattr(model.config, "thinktok", None) else None
    if other is None and (file := cached_file(name, SAFE_WEIGHTS_NAME, **where, local_files_only=True, _raise_exceptions_for_missing_entries=False)):
        other = "weights" if _differs(model, file) else None
    if other:
        raise ValueError(
            f"The model has {other} that {name} lacks, onto which its adapter would be loaded: save the model and its tokenizer first, and give that folder."
        )


def _differs(model: PreTrainedModel, file: str) -> bool:
    """Whether a tensor of a model differs from that of its name in a file by more than a type's rounding: vectors whole, and of others the first row."""
    mine = dict(model.named_parameters())
    with safe_open(file, "pt") as stored:
        for name in set(stored.keys()) & set(mine):
            saved, have = stored.get_slice(name), mine[name].detach()
            if saved.get_shape() != list(have.shape) or not have.is_floating_point() or have.is_meta:
                continue
            rows = slice(None) if have.ndim == 1 else slice(1)
            if (saved[rows].bfloat16() != have[rows].bfloat16().cpu()).float().mean() > 0.05:
                return True
    return False


def check_mergeable(model: PeftModel) -> None:
    """Refuses an adapter that would be trained and never merged, as whoever uses it here does.

    Raises:
        ValueError: it gives a layer of the base a bias that this does not have.
    """
    for layer in model.modules():
        if any(getattr(layer, "lora_bias", {}).values()) and layer.get_base_layer().bias is None:
            raise ValueError("lora_bias=True gives layers a bias that the base's do not have, and no merge can put there: leave it out.")


def rows_in_fp32(model: PeftModel) -> None:
    """TRL makes all that is trained beside a quantized model bf16, in which most steps of a thinking row are too small to count."""
    for name, parameter in model.named_parameters():
        if is_thinking_row(name):
            parameter.data = parameter.data.float()


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether a model has an adapter, around it or, as `add_adapter` of transformers puts it, in its own modules."""
    return is_peft_model(model) or any(isinstance(module, BaseTunerLayer) for module in model.modules())


def is_thinking_row(parameter: str) -> bool:
    """Whether a parameter of this name holds the thinking rows that are trained beside an adapter."""
    return "trainable_tokens_delta" in parameter


def is_speaker(parameter: str) -> bool:
    """Whether a parameter of this name belongs to the speaker, a model or an adapter."""
    return SPEAKER in parameter.split(".")


def save_adapter(model: PeftModel, folder: str, state_dict: dict[str, Any] | None = None) -> list[str]:
    """Adapter folders that need nothing but the plain base, and a tokenizer: `AutoPeftModelForCausalLM.from_pretrained(folder)` is the thinking model.

    PEFT would put whole embeddings into them. The configs go with it: which ids are thoughts, and which are never to be generated.

    Returns:
        the folders, one for each adapter.
    """
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    base, folders = model.get_base_model(), [os.path.join(folder, SPEAKER) if name == SPEAKER else folder for name in model.peft_config]
    for each in folders:
        base.config.save_pretrained(each)
        base.generation_config.save_pretrained(each)
    return folders


def merge(folder: str, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The plain model, and its tokenizer, that a base and the adapter of a folder or Hub repository make together.

    Args:
        revision: the adapter's; its base's is in its config.
        trust_remote_code: run code that comes with the base.

    Raises:
        ValueError: it is no adapter, or not of a thinking model, or its base is not there.
    """
    if find_adapter_config_file(folder, revision=revision) is None:
        raise ValueError("it is no adapter: it can be used as it is.")
    ThinkingVocabulary.from_pretrained(folder, revision=revision)
    about = PeftConfig.from_pretrained(folder, revision=revision)
    try:
        found, _ = PreTrainedConfig.get_config_dict(base := about.base_model_name_or_path or "", revision=about.revision)
    except OSError as error:
        raise ValueError(f"the adapter's base {base!r} is neither a folder here nor a model on the Hub that can be read from here.") from error
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    trained, _ = PreTrainedConfig.get_config_dict(folder, revision=revision)
    if packed := trained.get("quantization_config"):
        # What was learned beside weights of few bits fits these, and would be rounded away among them.
        how = {} if "quantization_config" in found else {"quantization_config": AutoQuantizationConfig.from_dict(packed)}
        unpacked = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **where | {"revision": about.revision}, **how).dequantize()
        unpacked.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(unpacked, folder, revision=revision).merge_and_unload()
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype, **where).merge_and_unload()
    model.config.thinktok = stored_options(folder, revision=revision)
    model.generation_config = GenerationConfig.from_pretrained(folder, revision=revision)
    return model, tokenizer


def adapters_in(name: str, revision: str | None = None) -> dict[str, str]:
    """The adapters of thinking models that a folder or Hub repository has, by their places in it: the one itself, and of two policies first the speaker's."""
    if stored_options(name, revision=revision).get("policies") != "split":
        return {"": name}
    folder = name if os.path.isdir(name) else snapshot_download(name, revision=revision)
    return {SPEAKER: os.path.join(folder, SPEAKER), "": folder}


def load_whole(name: str, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint and its tokenizer; of an adapter's folder what it and its base make together. The arguments are those of `merge`."""
    if find_adapter_config_file(name, revision=revision) is not None:
        return merge(name, dtype, revision, trust_remote_code)
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **where), AutoTokenizer.from_pretrained(name, **where)


def load_adapters(model: PeftModel, folder: str) -> None:
    """The weights of all adapters, in the precision that they have here, from where `save_pretrained` puts them."""
    for name in model.peft_config:
        weights = load_peft_weights(os.path.join(folder, SPEAKER) if name == SPEAKER else folder, device="cpu")
        set_peft_model_state_dict(model, weights, adapter_name=name)


def add_thinking_rows(peft_config: Any, model: PreTrainedModel, vocabulary: ThinkingVocabulary, revision: str | None = None) -> Any:
    """A copy of a PEFT config that also trains the thinking rows of the input and output embedding; `None` stays `None`.

    Tied embeddings are named once; untied ones both, or PEFT would leave the LM head's rows untrained. The guard's row comes along, so that an adapter
    has all rows that its tokenizer has ids for; no loss trains it.

    Args:
        revision: the base's, which the adapter is to be loaded onto again.

    Raises:
        ValueError: the adapter is for another task, its kind trains no rows, trains whole embeddings, or would lose a bias of the LM head.
    """
    if peft_config is None:
        return None
    peft_config = copy.deepcopy(peft_config)
    if not hasattr(peft_config, "trainable_token_indices"):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}, which cannot train new rows of the vocabulary: use a LoraConfig.")
    if peft_config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"peft_config is for task_type={peft_config.task_type!s}, as which no thinking model can be loaded again: set task_type='CAUSAL_LM'.")
    ids = [*vocabulary.ids, vocabulary.guard_id]
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(outputs, "bias", None) is not None:
        raise ValueError("The LM head of this model has a bias, which PEFT leaves out beside trained rows: train the whole model, without peft_config.")
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise ValueError("Each layer of this model embeds its input anew, with rows that an adapter would lose: train the whole model, without peft_config.")
    paths = {module: name for name, module in model.named_modules()}
    names = {module: paths[module].rsplit(".", 1)[-1] for module in (inputs, outputs)}
    # PEFT looks for these at the ends of names.
    whole = (*(peft_config.modules_to_save or ()), *(one.removesuffix(".weight") for one in getattr(peft_config, "target_parameters", None) or ()))
    for module, name in names.items():
        if paths[module].endswith(whole) or peft_config.target_modules and check_target_module_exists(peft_config, paths[module]):
            raise ValueError(f"peft_config trains all of {name}, of which an adapter trains the thinking rows: take it out of its modules.")
    wanted = {names[inputs]: ids} if inputs.weight is outputs.weight else {names[inputs]: ids, names[outputs]: ids}
    given = peft_config.trainable_token_indices or []
    given = set(given if isinstance(given, list) else (i for rows in given.values() for i in rows))
    if given - set(ids):
        raise ValueError(
            f"trainable_token_indices names other tokens ({sorted(given - set(ids))[:5]}): only thinking tokens can be trained beside an adapter. Leave it out."
        )
    peft_config.trainable_token_indices = wanted
    peft_config.task_type = "CAUSAL_LM"  # else PEFT writes down the model's class, which with a base's own code is of this machine
    peft_config.revision = peft_config.revision or revision
    return peft_config
