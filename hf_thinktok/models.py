"""What is asked of a model, whatever its architecture and whatever is wrapped around it."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel

logger = logging.getLogger(__name__)

# How a model must have been trained for its thoughts to be judged one by one.
EVALUABLE = {"thoughts": ("discrete", "filler"), "memory": ("none",), "policies": ("shared",)}


def unwrapped(model):
    """The model itself, without a launcher's wrapping and without an adapter's."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """Eval mode and no gradients, for sampling and checks. In training mode gradient checkpointing would silently drop the cache."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def as_loaded(model):
    """A model that was trained before in this process, without the autocast that accelerate leaves around its `forward`."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=False)


@contextlib.contextmanager
def without_autocast(model) -> Iterator[None]:
    """Makes a model for a while as it is loaded; see `as_loaded`."""
    inner = extract_model_from_parallel(model)
    wrapped = {name: vars(inner)[name] for name in ("forward", "_original_forward") if name in vars(inner)}
    as_loaded(inner)
    try:
        yield
    finally:
        vars(inner).update(wrapped)


def dropouts(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """Every probability of dropping something, as a module and the name it has there: those of layers, and numbers that modules give to a function."""
    found = []
    for module in model.modules():
        names = ["p"] if isinstance(module, torch.nn.modules.dropout._DropoutNd) else [name for name in vars(module) if "drop" in name]
        found += [(module, name) for name in names if isinstance(value := getattr(module, name), float) and value > 0]
    return found


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every probability of dropping something to 0, and says so. The config keeps what it says, and so does a checkpoint's."""
    for module, name in (found := dropouts(model)):
        setattr(module, name, 0.0)
    if found and not any(parameter.is_meta for parameter in model.parameters()):  # a dry run has nothing to say
        logger.warning("Dropout is off in %d places (disable_dropout=False keeps it): thoughts are compared, and each would have another mask.", len(found))


def lm_head(model, what: str = "model") -> torch.nn.Module:
    """A model's LM head.

    Args:
        what: it is, for the sentence that it has none.
    """
    if (head := model.get_output_embeddings()) is None:
        raise ValueError(f"The {what} is a {type(model).__name__}, which has no LM head: load it with AutoModelForCausalLM.")
    return head


def untie(model) -> None:
    """Gives the LM head rows of its own, which begin as those of the embedding that it shared them with; nothing where it has them."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


@contextlib.contextmanager
def cast_at_every_use(model) -> Iterator[None]:
    """For a while autocast keeps no copies of this model's weights, as it does of those that need a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def products_in(precision: str | None, backend: Any) -> Iterator[None]:
    """Products of fp32 matrices in another precision for a while: `ieee`, `tf32` or `bf16`; `None` as it is. Older PyTorch has no such choice."""
    before = getattr(backend, "fp32_precision", None)
    if precision is None or before is None:
        yield
        return
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, parameters: Iterable[torch.Tensor]) -> None:
    """A rate of their own for some of an optimizer's parameters, in groups of their own. What is set already stays so."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        theirs = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if 0 < len(theirs) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.param_groups.append({**group, "params": theirs, "lr": rate})
        elif theirs:
            group["lr"] = rate


def longest_row(model) -> int:
    """How many positions a model has, or a very large number where nothing limits them."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 2**31  # the second is MPT's


def has_position_table(model) -> bool:
    """Whether positions are looked up in a learned table, as GPT-2's and OPT's are: a row cannot be longer than that."""
    rows = longest_row(model)
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings())
    return any(rows <= table.num_embeddings <= rows + 2 for table in tables)  # OPT's has two rows more


def fits_in_fp32(model) -> bool:
    """Whether its weights can be made fp32 where they are for a while: there is room for as many numbers again, and they are no packed ones."""
    if getattr(model, "is_quantized", False):
        return False
    return model.dtype == torch.float32 or model.device.type != "cuda" or torch.cuda.mem_get_info(model.device)[0] > 4 * model.num_parameters()
