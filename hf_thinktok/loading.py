"""From the trainer's arguments to a model and a tokenizer, refused with one sentence where they do not fit."""

import contextlib
import copy
import difflib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, str_to_bool
from datasets import Dataset, IterableDataset
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import find_adapter_config_file
from trl import ModelConfig, clone_chat_template

from ._compat import create_model_from_path
from .architectures import check_supported
from .checkpoints import begins_anew
from .config import ThinkTokConfig
from .config_checks import OF_THOUGHTS, POLICY_LEARNS, REWARDED_BY_FUNCTIONS
from .data import MESSAGE_KEYS, STREAMED_ROWS, check_dataset, columns_of_text, named_sets, skips_preparing
from .distributed import check_parallelism, embedding_rows
from .errors import first_line
from .models import as_loaded, lm_head
from .peft import SPEAKER, check_adapter, check_base, has_adapter
from .results import unwritable, weights_in
from .tokens import GUARD, SAMPLE_TEXT, ThinkingVocabulary, check_vocabulary

logger = logging.getLogger(__name__)

# How the options of TRL's that are an adapter's begin.
OF_ADAPTERS = ("lora_", "use_rslora", "use_dora")
# What tokenizers split in different ways: digits, apostrophes, white space, a letter with its accent apart.
SPLIT_TEXT = "It's 12345, isn't it?\n\n  Yes: a b_c\t(x) cafe\u0301 ."


def check_arguments(args, train_dataset, eval_dataset, formatting_func, kwargs: dict[str, Any]) -> None:
    """What can be refused before a model is loaded."""
    if not isinstance(args, ThinkTokConfig):
        raise TypeError(f"args is a {type(args).__name__}; ThinkTokTrainer needs a ThinkTokConfig.")
    if train_dataset is None:
        raise ValueError("train_dataset is missing: pass a datasets.Dataset or IterableDataset of text.")
    for name, dataset in named_sets(train_dataset, eval_dataset).items():
        check_dataset(dataset, name, args, formatting_func)
    if not args.output_dir:
        raise ValueError("output_dir is empty: name a folder.")
    if args.should_save and (there := unwritable(Path(args.output_dir))):  # which else shows once the model is loaded
        raise ValueError(f"output_dir={args.output_dir}: nothing can be written to {there}. Name another folder.")
    best = (args.metric_for_best_model or "").removeprefix("eval_")
    if isinstance(eval_dataset, dict) and best and args.chooses_best and not best.startswith(tuple(f"{name}_" for name in eval_dataset)):
        one = next(iter(eval_dataset), "")
        raise ValueError(f"metric_for_best_model={best} is of no eval_dataset, which are {', '.join(eval_dataset)}: set metric_for_best_model={one}_{best}.")
    if not args.thinks and args.chooses_best and best.endswith(OF_THOUGHTS):
        raise ValueError(f"metric_for_best_model={best} is of thoughts, and this run has none: leave it out, and greater_is_better.")
    near = difflib.get_close_matches(best, ("loss", *OF_THOUGHTS), n=1, cutoff=0.7)  # a trainer of one's own may have more
    if args.thinks and args.chooses_best and not isinstance(eval_dataset, dict) and best not in ("loss", *OF_THOUGHTS) and near:
        raise ValueError(f"metric_for_best_model={args.metric_for_best_model} is not known; did you mean {near[0]}?")
    if skips_preparing(args):
        given = {name: getattr(args, name) for name in ("packing", "eval_packing", "shuffle_dataset", "completion_only_loss")}
        for name, value in ({"formatting_func": formatting_func} | given).items():
            if value:
                raise ValueError(f"{name} has no effect on rows that skip_prepare_dataset leaves as they are: leave one of the two out.")
    if args.thinks and args.num_iterations > 1 and isinstance(train_dataset, IterableDataset):
        raise ValueError("num_iterations > 1 needs batches that can come again: use a map-style data set, or num_iterations=1.")
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if args.num_think_tokens != 0 and kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported with thinking: the logits are never made. Leave it out; evaluate() reports likelihoods and gains.")
    if args.num_think_tokens != 0 and kwargs.get("data_collator") is not None:
        raise ValueError("data_collator is not supported with thinking: the tree needs each row's documents. Leave it out.")
    if args.n_gpu > 1:  # which transformers would make nn.DataParallel of
        logger.warning("%d GPUs are there and one process, which trains on one of them: `accelerate launch --multi_gpu` takes all.", args.n_gpu)
        args._n_gpu = 1
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError("activation_offloading has nowhere to offload from on a CPU: leave it out.")
    if args.enable_jit_checkpoint:
        raise ValueError("enable_jit_checkpoint has no effect here, as SIGTERM saves a checkpoint already: leave it out.")
    check_parallelism(args.parallelism_config)
    if _uses_fsdp(args) and str_to_bool(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")):
        raise ValueError("New rows are calibrated on every process, and only the first would have weights: set fsdp_cpu_ram_efficient_loading: false.")


def check_parts(args: ThinkTokConfig, model, reward_funcs, peft_config, two_adapters: bool, speaker, teacher, quantization_config=None) -> None:
    """What the trainer is given beside its options must have a use there."""
    if reward_funcs is not None and (args.objective == "marginal" or args.advantage == "token"):
        raise ValueError(f"reward_funcs has no effect here; it needs {REWARDED_BY_FUNCTIONS}.")
    if reward_funcs is not None and not args.rewards_draws:
        raise ValueError(f"reward_funcs has no effect here; it needs thoughts=discrete or text ({args.thoughts} has no rewards).")
    if reward_funcs is not None and not args.policy_learns:
        raise ValueError(f"reward_funcs has no effect here; it needs {POLICY_LEARNS}.")
    quantized = quantization_config or (args.model_init_kwargs or {}).get("quantization_config") or getattr(model, "quantization_method", None)
    if quantized and peft_config is None:
        raise ValueError("A quantized model is trained by an adapter beside it: give peft_config (--use_peft).")
    whole = peft_config is None and not (isinstance(model, torch.nn.Module) and has_adapter(model))
    if whole and Path(args.output_dir, "adapter_config.json").exists():
        raise ValueError(f"output_dir={args.output_dir} holds an adapter, which would be loaded in the place of the whole model: name another folder.")
    if not whole and any(not path.name.startswith("adapter_") for path in weights_in(Path(args.output_dir))):
        raise ValueError(f"output_dir={args.output_dir} holds a whole model, which would be loaded as the base of this run's adapter: name another folder.")
    if args.policies != "split" and Path(args.output_dir, SPEAKER).is_dir():
        raise ValueError(f"output_dir={args.output_dir} holds the speaker of an earlier run, which would go with this one's model: name another folder.")
    if peft_config is not None and "subfolder" in (args.model_init_kwargs or {}):
        raise ValueError("model_init_kwargs has a subfolder, which an adapter cannot name its base by: give the model as a folder of its own.")
    if args.think_learning_rate is not None and (peft_config is None or args.num_think_tokens == 0):
        raise ValueError("think_learning_rate is of thinking rows apart from the embedding, as an adapter has them: give peft_config (--use_peft).")
    if speaker is not None and args.policies != "split":
        raise ValueError("A speaker is given and policies=shared has no use for it: set policies=split.")
    if speaker is not None and peft_config is not None:
        raise ValueError("A speaker is given, and with peft_config a second adapter of the model speaks: leave one of the two out.")
    if two_adapters and args.gradient_checkpointing:
        raise ValueError("policies=split with an adapter runs one model as two, which checkpointing would confuse: set gradient_checkpointing=False.")
    if args.rollout == "free" and args.teacher is None and teacher is None:
        raise ValueError("rollout=free needs a teacher, as nobody else says what should follow a text that the model made up: set teacher.")
    if teacher is not None and args.num_think_tokens == 0:
        raise ValueError("A teacher has no effect with num_think_tokens=0: for a student that does not think, set num_forks=0.")
    if teacher is not None and teacher is model:
        raise ValueError("The teacher and the model are the same object, and a teacher stays as it is: load it once more.")
    for what, one in {"speaker": speaker, "teacher": teacher}.items():
        if one is not None and not isinstance(one, torch.nn.Module):
            raise TypeError(f"The {what} is a {type(one).__name__}; it must be a model that is loaded.")
    if not isinstance(model, str | os.PathLike | torch.nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}; it must be a name, a folder, or a model that is loaded.")
    if isinstance(model, torch.nn.Module) and args.model_init_kwargs and args.teacher is None:  # who is loaded with them as well
        raise ValueError("The model is loaded already and model_init_kwargs would do nothing: give its name, or load it with them.")
    for what, one in {"model": model, "speaker": speaker, "teacher": teacher}.items():
        if isinstance(one, PreTrainedModel):
            lm_head(one, what)  # or the sentence that it has none
    if peft_config is not None and isinstance(model, PreTrainedModel):
        check_base(model, getattr(peft_config, "revision", None))
    if args.num_think_tokens != 0:
        check_adapter(peft_config, two_adapters, args.beta)
        _check_plain(model=model, speaker=speaker, teacher=teacher)
    if args.thinks and peft_config is None:
        _check_learners(args, model, speaker)


def _check_plain(**models: Any) -> None:
    """An adapter that is there already, of PEFT's own model or one that transformers put into its own, trains no rows and is not saved with any."""
    instead = {"model": "its base and peft_config", "speaker": "its base", "teacher": "a model that stands alone"}
    for what, one in models.items():
        if isinstance(one, torch.nn.Module) and has_adapter(one):
            raise ValueError(f"The {what} has an adapter, and thinking needs it plain: give {instead[what]}, or merge_and_unload() the adapter with PEFT.")


def _check_learners(args: ThinkTokConfig, model, speaker) -> None:
    """Thinking rows in an embedding that was frozen would never train, and nothing would say so. Whom the options freeze may be frozen before.

    Thoughts are read from the input embedding, made by the thinker's output embedding, and read by the speaker; hidden states go without both.
    """
    if args.thoughts == "continuous":
        return
    thinks, speaks = args.freeze != "thinker", args.freeze != "speaker"
    learners = [("model", model, thinks or args.policies == "shared", thinks), ("speaker", speaker, speaks, False)]
    for what, one, reads, makes in learners:
        if one is None or isinstance(one, str | os.PathLike):  # what is loaded later is not frozen
            continue
        embeddings = {"input": one.get_input_embeddings() if reads else None, "output": one.get_output_embeddings() if makes else None}
        frozen = [name for name, layer in embeddings.items() if layer is not None and not layer.weight.requires_grad]
        if frozen:
            raise ValueError(
                f"The {what}'s {frozen[0]} embedding is frozen, and thinking rows would never train: unfreeze it (requires_grad_(True)), or give peft_config."
            )


def init_kwargs(model: ModelConfig, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """What TRL's model options and `model_init_kwargs` say to `from_pretrained`.

    Raises:
        ValueError: there are options of an adapter, and no adapter; or a revision of a folder.
    """
    if model.model_revision not in (None, "main") and os.path.isdir(model.model_name_or_path or ""):
        raise ValueError(f"model_revision={model.model_revision} has no effect on a folder, {model.model_name_or_path}: leave it out, or give the Hub's name.")
    given = [entry.name for entry in fields(ModelConfig) if entry.name.startswith(OF_ADAPTERS) and getattr(model, entry.name) != entry.default]
    if given and not model.use_peft:
        raise ValueError(f"{given[0]} has no effect without use_peft, which trains an adapter: set use_peft, or leave it out.")
    told = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    return {name: value for name, value in told.items() if value is not None} | (more or {})


def check_unquantized(model: ModelConfig) -> None:
    """For recipes that load models themselves."""
    if model.load_in_4bit or model.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit have no effect here, where models are loaded whole: leave them out.")


def read_mappings(arguments: Any, *names: str) -> None:
    """Options that are mappings in a config file and JSON on a command line."""
    for name in names:
        value = told = getattr(arguments, name)
        if isinstance(told, str):
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(told)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} must be a mapping, as JSON on a command line; got {told!r}.")
        setattr(arguments, name, value)


def fit_to_cpu(args: ThinkTokConfig) -> ThinkTokConfig:
    """The options with bf16 off where the CPU has no instructions for it: what it does instead is many times slower than fp32 (22 times with AVX2).

    Raises:
        ValueError: DeepSpeed has been told so by its launcher, which the options cannot change.
    """
    if not (args.use_cpu and args.bf16):
        return args
    slow = [_seconds_of_product(torch.bfloat16) >= 3 * _seconds_of_product(torch.float32)]
    broadcast_object_list(slow)  # all processes must do the same, and one may have been kept waiting
    if not slow[0]:
        return args
    if str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")) and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        raise ValueError("This CPU has no instructions for bf16, which the launcher's DeepSpeed is set to: launch with --mixed_precision no.")
    logger.warning("This CPU has no instructions for bf16, so the run is in fp32, which is faster here.")
    return replace(args, bf16=False)  # type: ignore[call-arg]


def _seconds_of_product(dtype: torch.dtype) -> float:
    """The fastest of ten, by one thread: two wait for each other where something else keeps a core busy, and a quick product seems as slow as a slow one."""
    matrix, seconds, num_threads = torch.ones(256, 256, dtype=dtype), [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(10):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(num_threads)
    return min(seconds)


def load_model(
    model: str | os.PathLike | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    args: ThinkTokConfig,
    dataset: Dataset | IterableDataset,
    quantization_config: Any = None,
    formatter: Callable[[dict], str] | None = None,
    adapter: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from what was given, refused before weights are loaded where they do not fit.

    Args:
        adapter: whether the model is the base of one.
        formatter: what makes texts of rows, whatever their columns.
    """
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class is a {type(tokenizer).__name__}; it must be a tokenizer that is loaded: leave it out for the model's own.")
    if quantization_config is not None and not isinstance(model, str):
        raise ValueError("The model is loaded already and quantization_config would do nothing: give its name, or load it with quantization_config.")
    options = {"trust_remote_code": args.trust_remote_code, "device_map": placement(args)} | (args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("quantization_config is given to the trainer and in model_init_kwargs: leave one of the two out.")
        options["quantization_config"] = quantization_config
    where = {name: options[name] for name in ("revision", "trust_remote_code", "subfolder") if name in options}
    with there("model", model):
        if isinstance(model, str):
            check_no_adapter(model, **{name: where[name] for name in ("revision", "subfolder") if name in where})
        config = AutoConfig.from_pretrained(model, **where) if isinstance(model, str) else model.config
    if (args.policies != "split" or adapter) and _was_split(config):
        logger.warning("The model was trained with a speaker, which this run has no use for: only the thinker goes on.")
        if hasattr(model, SPEAKER):
            delattr(model, SPEAKER)
    if isinstance(model, str) and Path(model).is_dir():
        place, own = Path(model).resolve(), Path(args.output_dir).resolve()
        if place == own and begins_anew(args.resume_from_checkpoint):
            raise ValueError(f"output_dir={args.output_dir} is the model's own folder, which would be written over: name another.")
        if place.parent == own and place.name.startswith(PREFIX_CHECKPOINT_DIR) and args.save_total_limit:
            raise ValueError(f"{model} is a checkpoint in output_dir, from which save_total_limit={args.save_total_limit} removes it: name another output_dir.")
    check_supported(config)
    if tokenizer is None:
        tokenizer = load_tokenizer(model if isinstance(model, str) else config._name_or_path, **where)
    else:
        _warn_of_another(tokenizer, config, args.trust_remote_code)
        if isinstance(model, str):  # which is loaded anew for each trainer: so it fits the next one as well
            tokenizer = copy.deepcopy(tokenizer)
    if args.eos_token is None:
        _check_ending(dataset, tokenizer)
    if not any((args.eos_token, args.pad_token, tokenizer.eos_token, tokenizer.pad_token)):
        raise ValueError("The tokenizer has neither a padding nor an end token, and rows of a batch are made as long as each other: set pad_token.")
    templated = tokenizer.chat_template is not None or args.chat_template_path is not None or formatter is not None
    if not templated and isinstance(dataset, Dataset) and _is_chat(dataset[0], args.dataset_text_field):
        raise ValueError("The data has chats, and the tokenizer no chat template to make texts of them: set chat_template_path, or tokenizer.chat_template.")
    if args.num_think_tokens != 0:
        check_vocabulary(config, tokenizer, args.num_think_tokens, None if isinstance(model, str) else embedding_rows(model))
    elif ThinkingVocabulary.from_config(config) is not None:
        logger.warning("The model has thinking tokens, and with num_think_tokens=0 the text unlearns them: to leave them as they are set num_forks=0.")
    attention = options.get("attn_implementation", "") if isinstance(model, str) else model.config._attn_implementation
    if args.num_think_tokens != 0:
        check_attention(attention)
    if isinstance(model, str):
        model = create_model_from_path(model, **options)
    else:
        model = as_loaded(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would pack weights at a first evaluation, and has no gradients through them then
            module.support_avx512bf16_for_cpu = False
    if len(devices := set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            f"The model is spread over {', '.join(sorted(map(str, devices)))}, and each process trains on one device: leave device_map out, and for a model "
            "that does not fit take ZeRO-3 or FSDP2."
        )
    _leave_out_router_loss(args, model)
    if _is_tokenizer(args.chat_template_path):
        model, tokenizer = _with_template_of(args.chat_template_path, model, tokenizer, adapter)
    return model, tokenizer


def _with_template_of(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: bool) -> tuple[Any, Any]:
    """The chat template of another tokenizer, and the tokens that it needs, before there are thinking tokens: TRL would put them, and others for the rows
    that are left over, behind those."""
    with there("tokenizer", source):
        other = AutoTokenizer.from_pretrained(source)
    if not (missing := [token.content for token in other.added_tokens_decoder.values() if token.content not in tokenizer.get_vocab()]):
        tokenizer.chat_template, tokenizer.eos_token = other.get_chat_template(), other.eos_token
        model.config.get_text_config().eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        return model, tokenizer
    if adapter:
        raise ValueError(f"chat_template_path={source} needs the tokens {', '.join(missing[:3])}, which an adapter's base has not: add them to the base.")
    return clone_chat_template(model, tokenizer, source)[:2]


@contextlib.contextmanager
def used_by_now(args: ThinkTokConfig) -> Iterator[None]:
    """Hides from SFTTrainer what a model was loaded with: it would warn of the one, and take the other once more."""
    used = {"model_init_kwargs": args.model_init_kwargs}
    if _is_tokenizer(args.chat_template_path):
        used["chat_template_path"] = args.chat_template_path
    try:
        for name in used:
            setattr(args, name, None)
        yield
    finally:
        for name, value in used.items():
            setattr(args, name, value)


def _is_tokenizer(template: str | None) -> bool:
    return template is not None and not template.endswith((".jinja", ".j2"))


def check_no_adapter(name: str, **where: Any) -> None:
    """A name that leads to an adapter would otherwise lead on to its base."""
    if find_adapter_config_file(name, **where):
        raise ValueError(f"{name} is an adapter: make a checkpoint of it and its base with `thinktok merge {name} FOLDER`, and train that.")


def _was_split(config: PreTrainedConfig) -> bool:
    """Whether a model was trained with a speaker."""
    return (getattr(config, "thinktok", None) or {}).get("policies") == "split"


def find_speaker(given: PreTrainedModel | None, model: PreTrainedModel, args: ThinkTokConfig, two_adapters: bool) -> PreTrainedModel | None:
    """The second model of `policies=split`: the one that is given, or that the first was trained with, in this process or in its folder `speaker`.

    Raises:
        ValueError: the first had one, and it is not there.
    """
    if args.policies == "split" and not two_adapters and given is None:
        given = getattr(model, SPEAKER, None)
        if given is None and _was_split(model.config) and (name := model.config._name_or_path):
            more = args.model_init_kwargs or {}
            folder = f"{more['subfolder']}/{SPEAKER}" if "subfolder" in more else SPEAKER
            how = {"trust_remote_code": args.trust_remote_code, "device_map": placement(args)} | more | {"subfolder": folder, "dtype": model.dtype}
            try:
                given = create_model_from_path(name, **how)
            except OSError as error:
                raise ValueError(f"{name} was trained with a speaker, which is not in its folder {folder!r}: pass the trainer's speaker.") from error
    return None if given is None else as_loaded(given)


def _leave_out_router_loss(args: ThinkTokConfig, model: PreTrainedModel) -> None:
    """TRL adds a mixture of experts' own load-balancing loss by default, and in a tree routers' logits are not made. Its config is to say so as well."""
    if args.router_aux_loss_coef is None and getattr(model.config.get_text_config(), "router_aux_loss_coef", None):
        logger.warning("%s trains without its load-balancing loss (router_aux_loss_coef), which thinking does not make.", model.config.model_type)
        args.router_aux_loss_coef = 0.0


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: torch.nn.Module) -> None:
    """Refuses a user's own optimizer that lacks what is to be trained: it was built before the model had thinking rows, an adapter or a speaker."""
    if optimizer is None:
        return
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if lacks := [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in known]:
        raise ValueError(
            f"The optimizer in `optimizers` lacks {lacks[0]} and would not train it ({len(lacks)} in all): pass optimizer_cls_and_kwargs, or call "
            "`add_thinking_tokens` before the optimizer is built."
        )


def load_tokenizer(name: str, **where: Any) -> PreTrainedTokenizerBase:
    """A model's own tokenizer.

    Raises:
        ValueError: it has none.
    """
    try:
        if name:  # a model made here has none
            return AutoTokenizer.from_pretrained(name, **where)
        why = "the model was not loaded from anywhere"
    except (OSError, ValueError) as error:
        why = first_line(error).rstrip(":.")
    raise ValueError(f"There is no tokenizer at {name!r} ({why}): pass processing_class.")


def _warn_of_another(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Says so where `AutoTokenizer` would read another one from the checkpoint: of some model types transformers takes their own class, whatever was saved."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        beside = copy.deepcopy(config)
        beside._name_or_path = folder
        try:
            again = AutoTokenizer.from_pretrained(folder, config=beside, trust_remote_code=trust_remote_code)
            same = again.get_vocab() == tokenizer.get_vocab() and again(SPLIT_TEXT)["input_ids"] == tokenizer(SPLIT_TEXT)["input_ids"]
            how = f"read this tokenizer as a {type(again).__name__}, which splits text otherwise"
        except (OSError, ValueError, TypeError) as error:
            same, how = False, f"not read this tokenizer ({first_line(error).rstrip('.')})"
    if not same:
        logger.warning(
            "Beside a %s config AutoTokenizer would %s: load it from the checkpoint with PreTrainedTokenizerFast, or take the model's own.",
            config.model_type,
            how,
        )


def _check_ending(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """TRL ends every text with the tokenizer's end token; ids and chats stay as they are."""
    if tokenizer.eos_token is not None:  # and no stream is opened once more
        return
    row = next(iter(dataset.take(1)))
    if not {"input_ids", "messages", "conversations"} & set(row) and not isinstance(row.get("prompt"), list):
        raise ValueError("The tokenizer has no end token (eos_token), and each text is to end with it: set eos_token.")


def _is_chat(row: dict[str, Any], text: str) -> bool:
    """Whether TRL makes the row's text from messages."""
    first, *_ = columns_of_text(row, text)
    return first in MESSAGE_KEYS or first == "prompt" and isinstance(row[first], list)


def placement(args: ThinkTokConfig) -> dict[str, torch.device] | None:
    """The device map of a model to be loaded: all of it on this process's device, or nowhere yet where the launcher divides it."""
    divided = is_deepspeed_zero3_enabled() or _uses_fsdp(args)
    return None if divided or args.device.type in ("cpu", "mps") else {"": args.device}


def _uses_fsdp(args: ThinkTokConfig) -> bool:
    """Whether a launcher's config or the trainer's own options say so."""
    return bool(args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def check_attention(name: str | None) -> None:
    if (name or "sdpa") not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation={name} cannot take a tree's mask: use sdpa or eager.")


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase, args: ThinkTokConfig) -> PreTrainedModel:
    """The teacher's model.

    Raises:
        ValueError: there is none of this name, or its tokens are other ones.
    """
    how = {name: value for name, value in (args.model_init_kwargs or {}).items() if name in ("dtype", "attn_implementation", "device_map")}
    with there("teacher", name):
        if find_adapter_config_file(name):
            raise ValueError(f"The teacher {name} is an adapter: make a model of it and its base first, with merge_and_unload() or `thinktok merge`.")
        theirs = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
        teacher = create_model_from_path(name, **{"trust_remote_code": args.trust_remote_code, "device_map": placement(args)} | how)
    own, others = ({word: i for word, i in one.get_vocab().items() if not word.startswith(GUARD)} for one in (tokenizer, theirs))
    if own != others:
        raise ValueError(f"The teacher {name!r} has another tokenizer: it must be a model of the same family, whose tokens mean the same.")
    return teacher


@contextlib.contextmanager
def there(what: str, name: Any) -> Iterator[None]:
    """Makes one sentence of a name that leads nowhere."""
    try:
        yield
    except (OSError, HFValidationError) as error:
        if os.path.exists(os.path.join(str(name), "config.json")):
            raise ValueError(f"The {what} {name!r} cannot be read: {first_line(error)}") from error
        raise ValueError(f"There is no {what} at {name!r}: give a folder with a config.json, or a name on the Hub that this machine can reach.") from error


def sample_text(dataset: Dataset | IterableDataset, column: str, tokenizer: PreTrainedTokenizerBase, formatter: Callable[[dict], str] | None = None):
    """Rows of the training text to calibrate thinking rows on, or the built-in sample where rows are no plain text."""
    rows = [row if formatter is None else {column: formatter(row)} for row in dataset.take(STREAMED_ROWS)]
    if columns_of_text(rows[0], column) == (column,) and isinstance(rows[0].get(column), str):
        return [text[:4096] for row in rows if isinstance(text := row[column], str)]  # another is told of when rows are prepared
    return tokenizer.batch_decode([row["input_ids"][:1024] for row in rows]) if "input_ids" in rows[0] else SAMPLE_TEXT
