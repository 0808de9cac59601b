"""Small algorithmic questions as text, each with the thought that a step-by-step algorithm would write.

The same rows serve tiny transformers with a tokenizer of whole words (`word_tokenizer`) and pretrained models with a tokenizer of their own. Columns:

- `prompt`, `completion`: the latter begins with a space, except in `pointer_chasing`, where it goes on inside a word (`4>` then `6`). Make the tokens
  of prompt and completion separately: a tokenizer of whole words does not know `4>6`.
  In `walk` both are lists, as a row may ask several questions, and a thought's tokens stand in the prompt: `think_length` has a list of their places.
- `level`: the difficulty. `inputs`: the question as integers. `answer`: the number of the answer.
- `think_length`, `thoughts`: a thought that is enough, as ids 0..N-1: the states on the way, so that the last one and a single step give the answer.
  It is empty at level 1, except in `mod_add`; `three_sat` begins at level 4.

No question of `test` is in `train`, nor with its facts in another order. Sides are a hash of the question: a test set is new to models of other seeds
too. In `mod_add` they are random instead, and the same without `held_out`.

`Task.shortcut` says what can be had without serial steps. It is 1 where threshold circuits of constant depth (TC0) are known to solve the task: sums,
parity, sorting, the solvable group S3. There, thoughts may help to learn, and are not needed to compute. Each task says how the rest is found.

Letters of shapes: R rows, C integers of a question, L thinking tokens, M nodes, E edges, G group elements, N clauses, A assignments.
"""

import difflib
import inspect
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.table import InMemoryTable
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .questions import TASKS
from .recipe import Questions, Recipe, check_whole, held_back, joined, span

FEATURES = Features(
    {"prompt": Value("string"), "completion": Value("string"), "level": Value("int64"), "think_length": Value("int64")}
    | {"thoughts": List(Value("int64")), "answer": Value("int64"), "inputs": List(Value("int64"))}
)
# Where rows may ask several questions prompts and completions are lists, and each place of a prompt has a length of its own.
SEVERAL = Features(FEATURES | {"prompt": List(Value("string")), "completion": List(Value("string")), "think_length": List(Value("int64"))})
# A level with fewer questions has none to spare: all are trained on, and it is not tested.
MIN_QUESTIONS = 64
# How often questions are drawn before a level is given up.
MAX_BATCHES = 400


@dataclass(frozen=True)
class Task:
    """A task's rows, and what accuracies on them are to be compared with."""

    name: str
    train: Dataset
    test: Dataset
    chance: float  # accuracy of a uniformly random answer
    shortcut: dict[int, float]  # for each level, the best accuracy known to be reachable without serial steps; chance where none is known
    stepwise: bool  # a thought's tokens are what is known after each step, and not a code of the answer
    words: tuple[str, ...]  # all that may stand between whitespace in prompts and completions, sorted, also of levels only tested
    asked_by_length: bool = False  # how many thoughts there are is part of the question, which is none without them


def matched(rng: np.random.Generator, asked: Questions, hints_R: np.ndarray) -> Questions:
    """As many questions of each of two answers for each value of the hint, which then tells nothing, in random order."""
    cells_R = 2 * hints_R + asked.answers_R
    order_R = cells_R.argsort(kind="stable")
    rank_R = np.empty_like(order_R)
    rank_R[order_R] = np.arange(len(order_R)) - np.searchsorted(cells_R[order_R], cells_R[order_R])
    both = np.bincount(cells_R, minlength=2 * hints_R.max() + 2).reshape(-1, 2).min(1)
    return asked.at(rng.permutation((rank_R < both[hints_R]).nonzero()[0]))


def questions(recipe: Recipe, seeds: list[int], level: int, rows: int, test: bool) -> Questions:
    """Random questions of a level, of the test side or of the training side. Of two answers, both are equally frequent."""
    if recipe.every:
        rng = np.random.default_rng(seeds)
        order_R = rng.permutation(recipe.count(level))
        if recipe.held_out:
            order_R = order_R[_spare(recipe, rng)[order_R] == test]
        return recipe.every.at(order_R[:rows])
    rng, both = np.random.default_rng([*seeds, level, test]), len(recipe.answers) == 2
    wanted, kept = [rows - rows // 2, rows // 2] if both else [rows], []
    for _ in range(MAX_BATCHES):
        drawn = (recipe.draw_tests or recipe.draw if test else recipe.draw)(rng, level)
        if recipe.count(level) >= MIN_QUESTIONS:
            drawn = drawn.at(held_back(recipe.key(drawn.inputs_RC)) == test)
        if recipe.hint and len(drawn.answers_R):
            drawn = matched(rng, drawn, recipe.hint(drawn.inputs_RC))
        for answer, missing in enumerate(wanted):
            kept.append((drawn.at(drawn.answers_R == answer) if both else drawn).at(slice(missing)))
            wanted[answer] -= len(kept[-1].answers_R)
        if not any(wanted):
            return Questions(*map(np.concatenate, zip(*kept))).at(rng.permutation(rows))
    raise ValueError(f"Level {level} has too few questions with the answer{recipe.answers[wanted.index(max(wanted))]} for these options.")


def _spare(recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Which of all questions are only tested: about as many as are to be held out, those that are the same question together."""
    assert recipe.every is not None
    _, same_R, sizes_K = np.unique(recipe.key(recipe.every.inputs_RC), axis=0, return_inverse=True, return_counts=True)
    order_K = rng.permutation(len(sizes_K))
    before_K = sizes_K[order_K].cumsum() - sizes_K[order_K]
    spare_K = np.zeros(len(sizes_K), dtype=bool)
    spare_K[order_K[before_K < round(recipe.held_out * len(same_R))]] = True
    return spare_K[same_R.reshape(-1)]


def dataset(recipe: Recipe, seeds: list[int], levels: list[int], rows: int, test: bool) -> Dataset:
    """Rows of all levels, which take turns, so that the first rows are of each."""
    tables, completions = [], recipe.completions or (lambda asked: joined(recipe.answers, asked.answers_R[:, None]))
    for level in levels:
        asked = questions(recipe, seeds, level, rows, test)
        prompts = recipe.prompts(np.random.default_rng([*seeds, level, 2 + test]), level, asked.inputs_RC)
        count, length = asked.thoughts_RL.shape
        integers = [part.tolist() for part in (asked.thoughts_RL, asked.answers_R, asked.inputs_RC)]
        columns = [prompts, completions(asked), [level] * count, [length] * count]
        if recipe.again:
            turns = 1 if test else max(recipe.together // level, 1)
            texts, latest = [columns[:2]], asked
            for turn in range(turns - 1):
                latest, more = recipe.again(np.random.default_rng([*seeds, level, 4 + turn]), level, latest)
                texts.append([more, completions(latest)])
            columns[:2] = ([list(row) for row in zip(*column)] for column in zip(*texts))
            columns[3] = [([1] * length + [0]) * turns] * count
        tables.append([*columns, *integers])
    rows_of = {name: [row for turn in zip(*parts) for row in turn] for name, parts in zip(FEATURES, zip(*tables))}
    features = SEVERAL if recipe.again else FEATURES
    return Dataset(InMemoryTable.from_pydict(rows_of, schema=features.arrow_schema))  # Dataset.from_dict is slow with lists


def check_levels(name: str, option: str, levels, low: int, high: float) -> list[int]:
    """The levels as a list, or a ValueError."""
    whole = isinstance(levels, Collection) and all(isinstance(level, Integral) and low <= int(level) <= high for level in levels)
    if not whole or not 0 < len(set(levels)) == len(levels):
        raise ValueError(f"{option}={levels!r} must be different whole numbers {span(low, high)}; that is how far {name} goes with these options.")
    return [int(level) for level in levels]


def make_task(name: str, seed: int = 0, *, levels=None, test_levels=None, train_rows=None, test_rows=None, **options) -> Task:
    """Draws a task's rows; the same name, seed and options give the same rows, whatever the other levels.

    Args:
        name: one of `TASKS`; the function of that name has the task's own options.
        levels: the levels trained on; by default the four easiest.
        test_levels: the levels tested, untrained ones too; by default those of `levels` that have questions to spare.
        train_rows, test_rows: of each level, 10,000 and 1,000 by default; questions repeat where a level has fewer. Of `mod_add` at most 100,000, once.

    Raises:
        ValueError: an unknown name or option (the nearest known one is suggested), or options that cannot be.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"There is no task {name!r}; did you mean {near!r}? Known: {', '.join(TASKS)}.")
    known = [*inspect.signature(TASKS[name]).parameters, "levels", "test_levels", "train_rows", "test_rows"]
    if unknown := [option for option in options if option not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        raise ValueError(f"The task {name} has no option {unknown[0]!r}; did you mean {near!r}? Known: {', '.join(known)}.")
    recipe = TASKS[name](**options)
    train_rows = (100_000 if recipe.every else 10_000) if train_rows is None else train_rows
    test_rows = (100_000 if recipe.every else 1_000) if test_rows is None else test_rows
    check_whole(0, seed=seed)
    check_whole(1, train_rows=train_rows, test_rows=test_rows)
    low, high = recipe.levels
    trained = check_levels(name, "levels", range(low, int(min(low + 3, high)) + 1) if levels is None else levels, low, high)
    tested = check_levels(name, "test_levels", trained if test_levels is None else test_levels, low, high)
    small = [level for level in tested if recipe.count(level) < MIN_QUESTIONS and not recipe.every]
    if small and (test_levels is not None or small == tested):
        raise ValueError(f"Level {small[0]} of {name} has {recipe.count(small[0])} questions, too few to hold some back: name harder test_levels.")
    tested = [level for level in tested if level not in small]
    every_level, seeds = sorted({*trained, *tested}), [int(seed), zlib.crc32(name.encode())]
    return Task(
        name=name,
        train=dataset(recipe, seeds, trained, train_rows, False),
        test=dataset(recipe, seeds, tested, test_rows, True),
        chance=recipe.chance(tested) if recipe.chance else 1 / len(recipe.answers),
        shortcut={level: recipe.shortcut(level) for level in every_level},
        stepwise=recipe.stepwise,
        words=tuple(sorted({word for text in (*recipe.words(every_level), *recipe.answers) for word in text.split()})),
        asked_by_length=recipe.asked_by_length,
    )


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word, and `<pad>`, `<unk>`, `<eos>`. Text is split at whitespace, and decoded with a space between words."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<unk>", "<eos>", *words]))}
    if broken := [word for word in vocabulary if word.split() != [word]]:
        raise ValueError(f"{broken[0]!r} is not one word between whitespace.")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Cleaning up would take the space before a question mark away.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", clean_up_tokenization_spaces=False)
