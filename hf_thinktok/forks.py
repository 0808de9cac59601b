"""Where in a text the model may think.

Shape suffixes as in tree.py.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .config_checks import OF_THOUGHTS
from .models import has_position_table, longest_row
from .tree import document_ends, document_lengths, document_positions, next_labels

if TYPE_CHECKING:
    from .config import ThinkTokConfig

logger = logging.getLogger(__name__)
# Rows in which a marker is looked for.
CHECKED_ROWS = 10_000


def eligible_forks(labels_BT: Tensor, documents_BT: Tensor, unlabelled: bool = False) -> Tensor:
    """Positions whose next token is in the same document and carries a label, `[B, T]` bool.

    Args:
        unlabelled: with or without a label.
    """
    if unlabelled:
        return ~document_ends(documents_BT) & (documents_BT >= 0)
    return next_labels(labels_BT, documents_BT) >= 0


def judged_places(labels_BT: Tensor, documents_BT: Tensor, lookahead: int) -> Tensor:
    """Positions after which one of the next H tokens of the same document carries a label, `[B, T]` bool."""
    time_T, end = torch.arange(labels_BT.shape[1], device=labels_BT.device), labels_BT.shape[1]
    here_BT = torch.where(labels_BT >= 0, time_T, end)
    next_BT = torch.nn.functional.pad(here_BT[:, 1:], (0, 1), value=end).flip(1).cummin(1).values.flip(1)
    same_BT = documents_BT.gather(1, next_BT.clamp(max=end - 1)) == documents_BT
    return (next_BT < end) & (next_BT - time_T <= lookahead) & same_BT & (documents_BT >= 0)


def given_lengths(given: Tensor, marked_BT: Tensor) -> Tensor:
    """Thinking tokens at each place, `[B, T]`, as the data says: one number for all places of a row, `[B]`, or one for each that is marked, `[B, J]`."""
    if given.ndim == 1:
        return given[:, None].expand_as(marked_BT)
    given = torch.nn.functional.pad(given, (0, 1))  # a row may have no such place
    number_BT = (marked_BT.cumsum(1) - 1).clamp(0, given.shape[1] - 1)
    return given.gather(1, number_BT) * marked_BT


def choose_forks(eligible_BT: Tensor, num_forks: int, how: str, generator: torch.Generator, entropy_BT: Tensor | None = None) -> Tensor:
    """Picks up to K forks a row.

    Args:
        how: `random` and `markers`: uniform, without repetition. `entropy`: where `entropy_BT` is largest. `stride`: evenly spaced. `all`: every one.

    Returns:
        forks_BK: ascending positions, then -1 for those that a row has no place for.
    """
    batch, trunk_length = eligible_BT.shape
    if how == "all" and num_forks:
        num_forks = max(trunk_length - 1, 1)  # a row of one token has a fork that is not there, as other processes have theirs
    if how == "stride":
        order_BT = eligible_BT.cumsum(1)
        count_B1 = order_BT[:, -1:]
        index_K = torch.arange(num_forks, device=eligible_BT.device)
        rank_BK = torch.where(count_B1 >= num_forks, ((index_K + 0.5) * count_B1 / num_forks).floor().long(), index_K)
        forks_BK = torch.searchsorted(order_BT, rank_BK + 1)
        return torch.where(rank_BK < count_B1, forks_BK, -1)
    if how == "entropy":
        assert entropy_BT is not None
        rank_BT = entropy_BT
    else:
        rank_BT = torch.rand(eligible_BT.shape, generator=generator, device=eligible_BT.device)
    best = rank_BT.masked_fill(~eligible_BT, -torch.inf).topk(min(num_forks, trunk_length), dim=1)
    forks_BK = torch.where(best.values > -torch.inf, best.indices, trunk_length).sort(1).values
    return torch.where(forks_BK < trunk_length, forks_BK, -1)


def room_for(places: int) -> int:
    """How many places a batch has room for, of whose rows none has more than so many: a power of two, as passes of other shapes cannot be replayed."""
    return 1 << max(places - 1, 0).bit_length()


def has_room(args: "ThinkTokConfig", model: PreTrainedModel, documents_BT: Tensor) -> Tensor:
    """Places where a thought and what judges it have positions, `[B, T]` bool: to the end of their document, or as far as `lookahead` goes. Where thoughts stay
    in the text it is the document with all of them."""
    lengths_BT, positions = document_lengths(documents_BT), longest_row(model)
    if args.memory == "persistent":
        thoughts = lengths_BT - 1 if args.fork_positions == "all" and args.num_forks else args.num_forks  # none after the last token
        return lengths_BT + thoughts * args.max_think_length <= positions
    room = positions - args.max_think_length
    fits_BT = lengths_BT <= room
    return fits_BT if args.lookahead is None else fits_BT | (document_positions(documents_BT) + args.lookahead <= room)


def may_think(args: "ThinkTokConfig", model: PreTrainedModel, inputs: dict[str, Tensor], labels_BT: Tensor, markers: list[list[int]]) -> Tensor:
    """Where a batch's rows may have forks, `[B, T]` bool.

    Args:
        inputs: `input_ids`, `documents`, and where the data has them `think_length`.
        markers: as of `marker_ids`.
    """
    eligible_BT = eligible_forks(labels_BT, inputs["documents"], unlabelled=args.reads_thinking) & has_room(args, model, inputs["documents"])
    if args.fork_positions != "markers":
        return eligible_BT
    marked_BT = ends_of(markers, inputs["input_ids"], inputs["documents"])
    if "think_length" in inputs and inputs["think_length"].ndim > 1:  # a number for each marked place, and none where it is 0
        marked_BT &= given_lengths(inputs["think_length"], marked_BT) > 0
    return eligible_BT & marked_BT


def count_forks(args: "ThinkTokConfig", model: PreTrainedModel, inputs: dict[str, Tensor], labels_BT: Tensor, markers: list[list[int]]) -> Tensor:
    """How many of the forks that `choose_forks` picks in each row are judged, `[B]`: where it has to choose, as many as are to be expected. Arguments as of
    `may_think`."""
    eligible_BT = may_think(args, model, inputs, labels_BT, markers)
    judged_BT = eligible_BT & judged_places(labels_BT, inputs["documents"], args.branching(labels_BT.shape[1]).lookahead)
    counts_B = eligible_BT.sum(1)
    picked_B = counts_B if args.fork_positions == "all" else counts_B.clamp(max=args.num_forks)
    return picked_B * (judged_BT.sum(1) / counts_B.clamp(min=1))


def check_positions(args: "ThinkTokConfig", model: PreTrainedModel) -> None:
    """Refuses rows for which the model has too few positions.

    Raises:
        ValueError: a row of `max_length` has more tokens, or leaves no room for a thought.
    """
    if (longest := args.max_length) is None:  # rows are as long as they are
        return
    positions = longest_row(model)
    if longest > positions and has_position_table(model):
        raise ValueError(f"max_length={longest} exceeds the {positions} positions that the model has learned: lower max_length.")
    if has_room(args, model, torch.zeros(1, longest, dtype=torch.long)).any():
        return
    if args.memory == "persistent":
        fewer = "" if args.fork_positions == "all" else " or num_forks"
        raise ValueError(
            f"With memory=persistent a row of max_length={longest} and its thoughts exceeds the model's {positions} positions: lower max_length{fewer}."
        )
    lower = "max_think_length" if positions - args.max_think_length < 2 else "max_length or lookahead"
    raise ValueError(
        f"max_length={longest} and a thought of max_think_length={args.max_think_length} with its lookahead exceed the model's {positions} positions: "
        f"lower {lower}."
    )


def marker_ids(markers: Iterable[str], tokenizer) -> list[list[int]]:
    """Token id sequences of texts, each as at the beginning, behind a space and behind a letter: a tokenizer may have other tokens for each. One of a single
    token is also found at the end of a token that begins with other punctuation, as `=` in `)=`."""
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    letter, found = ids("a"), []
    for marker in markers:
        behind = ids("a" + marker)
        found += [ids(marker), ids(" " + marker), behind[len(letter) :] if behind[: len(letter)] == letter else behind]
    if single := [marker for marker in markers if len(ids(marker)) == 1]:
        added = set(tokenizer.get_added_vocab().values())
        for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)):
            ends = (marker for marker in single if text.endswith(marker))
            found += [[i] for marker in ends if i not in added and not any(map(str.isalnum, text.removesuffix(marker)))]
    return [list(one) for one in dict.fromkeys(map(tuple, found)) if one]


def check_markers(markers: list[list[int]], args: "ThinkTokConfig", datasets: Mapping[str, Any], may_think: Callable[[dict], bool]) -> None:
    """Refuses rows in which nothing could be thought after a marker, and warns of a data set to evaluate on whose rows are such, unless its thoughts choose
    the best model; and lists of lengths that do not fit.

    Args:
        datasets: by name, as they are trained and evaluated on.
        may_think: whether the model can think at any place of a row.

    Raises:
        ValueError: no marker ends within the first rows, or none where it can think; or as `check_given_lengths`.
    """
    assert args.fork_markers is not None
    for name, rows in datasets.items():
        check_given_lengths(markers, args.fork_markers, rows, may_think)
        if (why := nothing_marked(markers, args.fork_markers, name, rows, may_think)) is None:
            continue
        best = (args.metric_for_best_model or "").removeprefix("eval_").removeprefix(f"{name}_")
        if name == "train" or (args.chooses_best and best in OF_THOUGHTS):
            raise ValueError(why)
        logger.warning(why)


def check_given_lengths(markers: list[list[int]], texts: list[str], rows, may_think: Callable[[dict], bool]) -> None:
    """Lists of lengths have one for each end of a marker, and ask for thoughts where there can be some.

    Args:
        may_think: whether the model can where a row asks it to.

    Raises:
        ValueError: one of the first rows has more or fewer; or they ask for thoughts, and at none of these places the model can think.
    """
    asks = able = False
    for number, row in enumerate(itertools.islice(rows, CHECKED_ROWS)):
        if not isinstance(given := row.get("think_length"), list):
            return
        if len(given) != (count := int(ends_of(markers, torch.as_tensor(row["input_ids"])[None]).sum())):
            raise ValueError(
                f"Row {number} has the lengths of {len(given)} thoughts in think_length, and {count} ends of fork_markers={texts}: give one for each "
                "(a row that is cut at max_length has lost its last ones)."
            )
        if any(given) and not able:
            asks, able = True, may_think(row)
    if asks and not able:
        raise ValueError(
            "Where think_length asks for thoughts the next token is none to predict, so nothing would be thought: set memory=persistent, with which thoughts "
            "stay in prompts, or ask for them where an answer begins."
        )


def nothing_marked(markers: list[list[int]], texts: list[str], name: str, rows, may_think: Callable[[dict], bool]) -> str | None:
    """Why nothing would be thought in a data set, if so. How long the data would have the model think at a place is not asked."""
    ends = False
    for row in itertools.islice(rows, CHECKED_ROWS):
        if ends_of(markers, torch.as_tensor(row["input_ids"])[None]).any():
            ends = True
            if may_think({column: value for column, value in row.items() if column != "think_length"}):
                return None
    there = f"in the first {CHECKED_ROWS:,} rows of the {name} data set, so nothing would be thought"
    if ends:
        return (
            f"After none of fork_markers={texts} the next token is one to predict, {there}: let a marker end where the answer begins, for example "
            "'### Response:\\n' for '### Response:'."
        )
    return f"None of fork_markers={texts} ends anywhere {there}: look at how they are written."


def ends_of(markers: list[list[int]], tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
    """Positions where one of the markers (token id sequences) ends, `[B, T]` bool: within a document, where rows have several."""
    place_BT = document_positions(torch.zeros_like(tokens_BT) if documents_BT is None else documents_BT)
    single = [token for token, *more in markers if not more]
    found_BT = torch.isin(tokens_BT, torch.tensor(single, dtype=tokens_BT.dtype, device=tokens_BT.device))  # there may be many
    for marker in markers:
        if len(marker) == 1:
            continue
        matches_BT = torch.ones_like(found_BT)
        for back, token in enumerate(reversed(marker)):
            matches_BT &= (tokens_BT.roll(back, 1) == token) & (place_BT >= back)
        found_BT |= matches_BT
    return found_BT
