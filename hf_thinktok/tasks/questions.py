"""What the tasks ask: a `Recipe` for each, by the name of its function. Letters of shapes as in the package."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real

import numpy as np

from .recipe import BATCH, Questions, Recipe, check_flag, check_whole, choose, decimals, edges_of, facts_of, held_back, joined, orders, shuffled


def letters_in_a_row(letters: list[str], answers: list[str], states: Callable, sep: str = " ", end: str = " =", extra: int = 0, **more) -> Recipe:
    """Questions of level + `extra` letters, each of which changes a state; the last of `states` is the answer."""

    def draw(rng, level):
        inputs_RC = rng.integers(len(letters), size=(BATCH, level + extra))
        states_RC = states(inputs_RC)
        return Questions(inputs_RC, states_RC[:, extra:-1], states_RC[:, -1])

    return Recipe(
        **{"draw": draw} | more,
        answers=answers,
        words=lambda levels: [*letters, *sep.split(), end.strip()],
        count=lambda level: len(letters) ** (level + extra),
        prompts=lambda rng, level, inputs_RC: [text + end for text in joined(letters, inputs_RC, sep)],
    )


def ascending(inputs_RC: np.ndarray) -> np.ndarray:
    """What is the same question in whatever order its numbers stand."""
    return np.sort(inputs_RC, 1)


def sums(numbers: list[str], **more) -> Recipe:
    """Level additions modulo how many `numbers` there are, each as it is written."""
    states = lambda inputs_RC: inputs_RC.cumsum(1) % len(numbers)
    return letters_in_a_row(numbers, [f" {n}" for n in numbers], states, " + ", extra=1, key=ascending, **more)


def mod_add_many(modulus: int = 10) -> Recipe:
    """`3 + 4 + 5 =` -> ` 2`: level additions modulo `modulus`. The thought is the sum after each but the last."""
    check_whole(2, modulus=modulus)
    return sums(decimals(modulus))


def mod_add(modulus: int = 100, base: int = 10, slack: int = 1, held_out: float = 0.0, digits: bool = False) -> Recipe:
    """`37 + 58 =` -> ` 95`: one addition modulo `modulus`, for speakers that see only the thought. There is level 1 only.

    The thought is the answer in base `base`, most significant digit first, after `slack` zeros: [0, 9, 5]. All questions are asked, each once, or
    as many as `train_rows` and `test_rows` say.

    Args:
        held_out: the part of the questions that is only tested. With 0 the test asks training questions again, to see how well their thoughts code them.
        digits: a word for each decimal digit and not for each number: `3 7 + 5 8 =` -> ` 9 5`. All numbers have as many.
    """
    check_whole(2, 2000, modulus=modulus)
    check_whole(2, base=base)
    check_whole(0, slack=slack)
    if not isinstance(held_out, Real) or not (held_out == 0 or 0 < round(held_out * modulus**2) < modulus**2):
        raise ValueError(f"held_out={held_out!r} must be 0, or a part of the {modulus**2} questions that leaves some on either side.")
    check_flag(digits=digits)
    inputs_RC = np.stack(np.divmod(np.arange(modulus**2), modulus), 1)
    answers_R, length = inputs_RC.sum(1) % modulus, 0
    while base**length < modulus:
        length += 1
    places = [0 * answers_R] * slack + [answers_R // base**place % base for place in reversed(range(length))]
    numbers = [" ".join(f"{number:0{len(str(modulus - 1))}}") for number in range(modulus)] if digits else decimals(modulus)
    return sums(numbers, levels=(1, 1), every=Questions(inputs_RC, np.stack(places, 1), answers_R), held_out=held_out, stepwise=False)


def permutations(group: str = "S5", pad_to: int = 0, fill: bool = False) -> Recipe:
    """`a c b d =` -> ` g17`: the product of level letters, applied from left to right. The thought is the product so far.

    Elements are numbered in lexicographic order, g0 is the identity. The letters of S3 are its six elements in that order; those of S5 are the
    transposition (0 1), the cycle 0 -> 1 -> 2 -> 3 -> 4 -> 0, its inverse, and the identity. Products in S5 are complete for NC1: not in constant depth
    unless TC0 = NC1. The shortcut is `unordered_accuracy`.

    Args:
        pad_to: with so many letters in every prompt, the missing ones as `.`: the k-th letter is as far from the k-th thought at every level.
        fill: the missing ones as random letters. That they do not count is told by the number of thoughts alone, so no thought knows where the word ends and
            each has to be good for all that may come; without thoughts only words of `pad_to` letters are a question at all.
    """
    check_whole(0, pad_to=pad_to)
    check_flag(fill=fill)
    if fill and not pad_to:
        raise ValueError("fill=True writes letters in place of those that pad_to misses: give pad_to, the number of letters in every prompt.")
    if group not in ("S3", "S5"):
        raise ValueError(f"group={group!r} must be 'S3' or 'S5'.")
    elements = list(itertools.permutations(range(int(group[1]))))
    letters = elements if group == "S3" else [(1, 0, 2, 3, 4), (1, 2, 3, 4, 0), (4, 0, 1, 2, 3), (0, 1, 2, 3, 4)]
    steps_GA = np.array([[elements.index(tuple(letter[i] for i in element)) for letter in letters] for element in elements])

    def states(inputs_RC):
        products = [np.zeros(len(inputs_RC), dtype=np.int64)]
        for letter_R in inputs_RC.T:
            products.append(steps_GA[products[-1], letter_R])
        return np.stack(products[1:], 1)

    shortcut = (lambda level: 1.0) if group == "S3" else (lambda level: unordered_accuracy(steps_GA[:, :3], level))
    recipe = letters_in_a_row(list("abcdef"[: len(letters)]), decimals(len(elements), " g"), states, shortcut=shortcut)
    if not pad_to:
        return recipe

    def prompts(rng, level, inputs_RC):
        missing = pad_to - level
        if fill:
            return recipe.prompts(rng, level, np.concatenate([inputs_RC, rng.integers(len(letters), size=(len(inputs_RC), missing))], 1))
        return [text.replace(" =", " ." * missing + " =") for text in recipe.prompts(rng, level, inputs_RC)]

    words = recipe.words if fill else lambda levels: [*recipe.words(levels), "."]
    return replace(recipe, prompts=prompts, words=words, levels=(1, pad_to), asked_by_length=fill)


def unordered_accuracy(steps_GA: np.ndarray, length: int) -> float:
    """How often the most likely product of a random word is right, for who knows how often each letter is in it and not their order.

    `steps_GA` has the number of each element's product with each of three letters; a fourth letter is the identity.
    """
    # ways[i, j, g]: the chance of i first letters, j second ones and the product g in a word of n letters without the identity.
    ways = np.zeros((length + 1, length + 1, len(steps_GA)))
    ways[0, 0, 0], total = 1.0, 0.0
    for n in range(length + 1):
        total += math.comb(length, n) * 0.75**n * 0.25 ** (length - n) * float(ways.max(-1).sum())
        longer = np.zeros_like(ways)
        longer[1:, :, steps_GA[:, 0]] += ways[:-1] / 3
        longer[:, 1:, steps_GA[:, 1]] += ways[:, :-1] / 3
        longer[:, :, steps_GA[:, 2]] += ways / 3
        ways = longer
    return total


def parity() -> Recipe:
    """`1 0 1 1 =` -> ` odd`: is the number of ones among level bits odd? As many odd rows as even ones. The thought is the parity so far."""
    return letters_in_a_row(["0", "1"], [" even", " odd"], lambda inputs_RC: inputs_RC.cumsum(1) % 2)


def sorting(values: int = 10) -> Recipe:
    """`5 2 9 :` -> ` 2 5 9`: level numbers below `values` in ascending order. The thought is all of them but the last.

    `answer` reads them as digits in base `values`, modulo 2^63. Chance is a random ascending list, on average over the tested levels.
    """
    check_whole(3, values=values)

    def draw(rng, level):
        inputs_RC = rng.integers(values, size=(BATCH, level))
        sorted_RC, answers_R = np.sort(inputs_RC, 1), np.zeros(BATCH, dtype=np.int64)
        for column_R in sorted_RC.T:
            answers_R = (answers_R * values + column_R) & np.int64(2**63 - 1)
        return Questions(inputs_RC, sorted_RC[:, :-1], answers_R)

    completions = lambda asked: joined(decimals(values, " "), np.sort(asked.inputs_RC, 1), "")
    chance = lambda levels: sum(1 / math.comb(values + level - 1, level) for level in levels) / len(levels)
    return letters_in_a_row(decimals(values), decimals(values), np.sort, " ", " :", draw=draw, completions=completions, chance=chance, key=ascending)


def pointer_chasing(nodes: int = 10, offsets: int = 0, pad_to: int = 0, sum_steps: bool = False, copies: int = 1) -> Recipe:
    """Where do level hops lead in a random permutation f of the nodes? The thought is the nodes on the way.

    A line `k2` for the hops, one `a>b` for each node in random order, and the start `4>`, which the completion `6` goes on. `inputs` are the start, then
    f(0), f(1) and so on, then the offsets. The shortcut is `one_hop_accuracy`; sums are given.

    Args:
        offsets: a hop leads from s to f((s + x) mod nodes), with a number x below `offsets` for each hop: a line `+3 +7` before the start. Short cycles then
            do not help, and two hops cannot be made one. 0: no such line.
        pad_to: the line of offsets is as long as at this level everywhere, with `.` for those that are missing: the k-th offset is as far from the k-th
            thought at every level.
        sum_steps: to add a number is a step of its own. Level 1 asks for s + x, level 2 for where that leads, level 3 for that and the next number, and so
            on, with a thought for each step but the last.
        copies: how often the lines `a>b` are written, each time in the same order. A causal model sees from a fact only those before it, so of one copy it
            can make two hops one only where they stand in that order; from the second copy it sees all.
    """
    check_whole(2, nodes=nodes)
    check_whole(1, copies=copies)
    check_whole(0, pad_to=pad_to)
    check_whole(0, nodes, offsets=offsets)
    check_flag(sum_steps=sum_steps)
    if (pad_to or sum_steps) and not offsets:
        option = f"pad_to={pad_to} fills up the line of offsets" if pad_to else "sum_steps=True adds offsets"
        raise ValueError(f"{option}, and there are none: set offsets={nodes}, or leave it out.")
    edges, shifts = edges_of(nodes), decimals(offsets, "+")

    def hops(level: int) -> int:
        return (level + 1) // 2 if sum_steps else level

    def draw(rng, level):
        map_RM = orders(rng, nodes)
        offsets_RK = rng.integers(offsets or 1, size=(BATCH, hops(level)))
        path = [rng.integers(nodes, size=BATCH)]  # then a sum and the node that it leads to, in turn
        for offset_R in offsets_RK.T:
            path.append((path[-1] + offset_R) % nodes)
            path.append(map_RM[np.arange(BATCH), path[-1]])
        steps_RL = np.stack(path[1 : level + 1] if sum_steps else path[2::2], 1)
        inputs_RC = np.concatenate([path[0][:, None], map_RM, offsets_RK[:, : hops(level) * bool(offsets)]], 1)
        return Questions(inputs_RC, steps_RL[:, :-1], steps_RL[:, -1])

    def prompts(rng, level, inputs_RC):
        facts = ["\n".join([fact] * copies) for fact in facts_of(rng, inputs_RC[:, 1 : 1 + nodes])]
        missing = " ." * (hops(pad_to) - hops(level))
        lines = [f"{line}{missing}\n" for line in joined(shifts, inputs_RC[:, 1 + nodes :])] if offsets else [""] * len(facts)
        return [f"k{level}\n{fact}\n{line}{start}>" for fact, line, start in zip(facts, lines, inputs_RC[:, 0].tolist())]

    return Recipe(
        answers=decimals(nodes),
        words=lambda levels: [*(f"k{level}" for level in levels), *edges, *shifts, *["."] * bool(pad_to), *(f"{a}>" for a in range(nodes))],
        count=lambda level: math.factorial(nodes) * nodes,
        draw=draw,
        prompts=prompts,
        key=lambda inputs_RC: inputs_RC[:, : 1 + nodes],
        shortcut=lambda level: one_hop_accuracy(nodes, max(level // 2, 1) if sum_steps else level, offsets > 1),
        levels=(1, pad_to or math.inf),
    )


def walk(nodes: int = 10, together: int = 1, mixed: bool = False, onward: bool = False) -> Recipe:
    """`4 +3 = > > = +9 =` -> `1`: where do level steps lead that are told one after another? The thought is the nodes on the way.

    One line `a>b` for each node of a random permutation f in random order, then the start and its steps, in turn a number to add modulo `nodes` and an arrow
    to follow, written `> >`; either may be the first. Each ends in `=`, and each but the last is a place for a thinking token: `think_length` has a list of
    1 for each of these places and 0 for the last. `inputs` are the start, f(0), f(1) and so on, then the numbers, -1 for an arrow. As another number comes in
    at every other step, no two steps can be made one before they are told. The shortcut is that of who does a single step: of two,
    following the arrow alone is right where the number is 0, and else the answer is one of the other nodes; from three on it is chance.

    Args:
        together: a training row asks again about the same facts, as long as there are no more steps than this in all.
        mixed: in training rows each step is a number or an arrow, whatever was before it.
        onward: each question of a training row but the first starts from the answer before it, and names no start. Maps of tests are new then.
    """
    check_whole(2, nodes=nodes)
    check_whole(1, together=together)
    check_flag(mixed=mixed, onward=onward)
    if onward and together == 1:
        raise ValueError("onward has no effect on rows of one step: set together to 2 or more.")

    def asked(rng, level, map_RM, start_R, mixed=mixed) -> Questions:
        rows = len(start_R)
        arrow_RK = rng.integers(2, size=(rows, level)) if mixed else (rng.integers(2, size=(rows, 1)) + np.arange(level)) % 2
        numbers_RK = np.where(arrow_RK, -1, rng.integers(nodes, size=(rows, level)))
        path = [start_R]
        for number_R in numbers_RK.T:
            path.append(np.where(number_R < 0, map_RM[np.arange(rows), path[-1]], (path[-1] + number_R) % nodes))
        return Questions(np.concatenate([start_R[:, None], map_RM, numbers_RK], 1), np.stack(path[1:], 1)[:, :-1], path[-1])

    def draw(rng, level, mixed=mixed):
        map_RM = orders(rng, nodes)
        return asked(rng, level, map_RM, rng.integers(nodes, size=BATCH), mixed)

    def told(inputs_RC):
        return [" ".join("> > =" if number < 0 else f"+{number} =" for number in row) for row in inputs_RC[:, 1 + nodes :].tolist()]

    def begun(inputs_RC):
        return [f"{start} {steps}" for start, steps in zip(inputs_RC[:, 0].tolist(), told(inputs_RC))]

    def prompts(rng, level, inputs_RC):
        facts = facts_of(rng, inputs_RC[:, 1 : 1 + nodes])
        return [f"{fact}\n{question}" for fact, question in zip(facts, begun(inputs_RC))]

    def again(rng, level, before):
        map_RM = before.inputs_RC[:, 1 : 1 + nodes]
        if onward:
            more = asked(rng, level, map_RM, before.answers_R)
            return more, [f" {steps}" for steps in told(more.inputs_RC)]
        starts_RM = orders(rng, nodes, len(map_RM))
        tested_RM = np.stack([held_back(np.concatenate([starts_RM[:, [i]], map_RM], 1)) for i in range(nodes)], 1)
        more = asked(rng, level, map_RM, starts_RM[np.arange(len(map_RM)), tested_RM.argmin(1)])  # one that is not
        return more, [f"\n{question}" for question in begun(more.inputs_RC)]

    return Recipe(
        answers=decimals(nodes),
        words=lambda levels: [*edges_of(nodes), *decimals(nodes), *decimals(nodes, "+"), ">", "="],
        count=lambda level: math.factorial(nodes) * nodes,
        draw=draw,
        draw_tests=lambda rng, level: draw(rng, level, mixed=False),
        prompts=prompts,
        key=lambda inputs_RC: inputs_RC[:, int(onward) : 1 + nodes],
        shortcut=lambda level: {1: 1.0, 2: 2 / nodes}.get(level, 1 / nodes),
        again=again,
        together=together,
    )


def one_hop_accuracy(nodes: int, hops: int, offsets: bool = False) -> float:
    """How often the best answer is right, for who can look up what leads from the start s and what leads to it, and nothing else.

    On a random permutation the length c of the cycle of s is uniform on 1..nodes. Who sees that it is 1 or 2 is right. Otherwise c is uniform on 3..nodes,
    and the answer is s if c divides hops, f(s) if c divides hops - 1, what leads to s if c divides hops + 1, else any other node alike. As 3 divides one of
    them, one of these is the best answer.

    With offsets only what leads on is counted. Who sees s + x1 go to b knows the second hop if b + x2 = s + x1, one case in `nodes`, and has then one hop
    less to guess. Otherwise the best answer is right with 1 / (nodes - 1) after two hops and 2 / nodes after three, which makes 2 / nodes in both cases.
    From the fourth on chance stands for what it adds, so the figure is a floor (enumeration for 6 nodes: 0.29 and 0.27 at four and five hops, where this
    gives 0.19 and 0.17; with fewer offsets than nodes it is further off: 0.31 and 0.34 at four hops with three and with two of them).
    """
    if hops == 1:
        return 1.0
    if offsets:
        return 2 / nodes if hops <= 3 else (one_hop_accuracy(nodes, hops - 1, True) + (nodes - 1) / nodes) / nodes
    known = min(nodes, 2)
    return (known + max(sum(steps % cycle == 0 for cycle in range(3, nodes + 1)) for steps in (hops - 1, hops, hops + 1))) / nodes


def reachability(nodes: int = 8, edges: int = 12) -> Recipe:
    """Is there a way of at most level steps in a directed graph? As many ` yes` as ` no`; no ` yes` has a shorter way.

    A line `k2` for the steps, one `a>b` for each edge in random order, and the question `0 to 5 ?`. `inputs` are the two ends, then those of each
    edge in order. The thought is the set of nodes within 1, 2, ... steps, node i being bit i. How many edges leave the start and enter the end says
    nothing: either answer is as frequent for each such pair of numbers. Beyond level 1, where one edge is looked up, no other shortcut is counted.
    There are some: a logistic regression on counts over the whole graph (edges into the start and out of the end, nodes without any) is right in 56, 59, 65
    and 72 % of levels 2 to 5 with 8 nodes and 12 edges. Accuracy a little above `shortcut` is no sign of steps.
    """
    check_whole(3, 16, nodes=nodes)
    check_whole(1, nodes * (nodes - 1), edges=edges)
    pairs, one_MM = np.array(list(itertools.permutations(range(nodes), 2))), np.eye(nodes, dtype=bool)
    names = edges_of(nodes)

    def draw(rng, level):
        edges_RE2, starts_R = pairs[choose(rng, len(pairs), edges)], rng.integers(nodes, size=BATCH)
        graph_RMM, rows_R = np.tile(one_MM, (BATCH, 1, 1)), np.arange(BATCH)
        graph_RMM[rows_R[:, None], edges_RE2[:, :, 0], edges_RE2[:, :, 1]] = True
        within = [one_MM[starts_R]]
        for _ in range(level):
            within.append((within[-1][:, :, None] & graph_RMM).any(1))
        answers_R = rng.integers(2, size=BATCH)
        ends_RM = np.where(answers_R[:, None] == 1, within[-1] & ~within[-2], ~within[-1])
        ends_R = (rng.random(ends_RM.shape) * ends_RM).argmax(1)
        inputs_RC = np.concatenate([starts_R[:, None], ends_R[:, None], edges_RE2.reshape(BATCH, -1)], 1)
        sets_RL = np.stack(within, 1) @ (1 << np.arange(nodes))
        return Questions(inputs_RC, sets_RL[:, 1:-1], answers_R).at(ends_RM.any(1))

    def prompts(rng, level, inputs_RC):
        facts = joined(names, shuffled(rng, inputs_RC[:, 2::2] * nodes + inputs_RC[:, 3::2]), "\n")
        return [f"k{level}\n{fact}\n{start} to {end} ?" for fact, (start, end) in zip(facts, inputs_RC[:, :2].tolist())]

    def degrees(inputs_RC):
        leaving_R, entering_R = ((inputs_RC[:, 2 + i :: 2] == inputs_RC[:, i, None]).sum(1) for i in range(2))
        return leaving_R * nodes + entering_R

    return Recipe(
        answers=[" no", " yes"],
        words=lambda levels: ["to", "?", *decimals(nodes), *(names[a * nodes + b] for a, b in pairs), *(f"k{level}" for level in levels)],
        count=lambda level: math.comb(len(pairs), edges) * len(pairs),
        draw=draw,
        prompts=prompts,
        shortcut=lambda level: 1.0 if level == 1 else 0.5,
        hint=degrees,
        levels=(1, nodes - 1),
    )


def three_sat(clauses: int | None = None) -> Recipe:
    """`1 -2 4 ; 2 3 -4 ?` -> ` yes`: can level variables make every clause true? As many ` yes` as ` no`. Levels go from 4 to 6.

    Clauses are different, each of three variables, in random order. The thought tries the assignments 0, 1, 2, ... (variable i is true if bit i - 1
    is set): the first one not yet refused, after each try but the last; it stays where all clauses are true. So it has 2^level - 1 ids. How one-sided
    the signs are, the sum over variables of (positive - negative)^2, says nothing: either answer is as frequent for each such sum. No shortcut is counted.
    There are some: a logistic regression on counts, of which the most is said by how often two variables have the same signs together, is right in 69, 64 and
    63 % of levels 4 to 6.

    Args:
        clauses: by default as many that 0.8 assignments are expected to make all of them true, which makes either answer about equally likely.
    """
    if clauses is not None:
        check_whole(8, 31, clauses=clauses)  # fewer can always be made true, and all 32 on four variables never

    def size(level):
        total = math.comb(level, 3) * 8
        return clauses or round(total * (1 - (0.8 / 2**level) ** (8 / total)))

    def draw(rng, level):
        signs = np.array(list(itertools.product((1, -1), repeat=3)))
        all_N3 = np.concatenate([signs * variables for variables in itertools.combinations(range(1, level + 1), 3)])
        bits_NA3 = np.arange(2**level)[None, :, None] >> (abs(all_N3) - 1)[:, None] & 1
        false_NA = ((bits_NA3 == 1) != (all_N3 > 0)[:, None]).all(-1)
        ids_RC = choose(rng, len(all_N3), size(level))
        chosen_RN = np.zeros((BATCH, len(all_N3)), dtype=np.float32)
        np.put_along_axis(chosen_RN, ids_RC, 1, 1)
        true_RA = chosen_RN @ false_NA.astype(np.float32) == 0
        first_R = np.where(true_RA.any(1), true_RA.argmax(1), 2**level)
        thoughts_RL = np.minimum(first_R[:, None], np.arange(1, 2**level))
        return Questions(all_N3[ids_RC].reshape(BATCH, -1), thoughts_RL, (first_R < 2**level).astype(np.int64))

    def prompts(rng, level, inputs_RC):
        clauses_RC3 = inputs_RC.reshape(len(inputs_RC), -1, 3)
        order_RC = shuffled(rng, np.tile(np.arange(clauses_RC3.shape[1]), (len(inputs_RC), 1)))
        rows = np.take_along_axis(clauses_RC3, order_RC[:, :, None], 1).tolist()
        return [" ; ".join(f"{a} {b} {c}" for a, b, c in row) + " ?" for row in rows]

    return Recipe(
        answers=[" no", " yes"],
        words=lambda levels: [";", "?", *(f"{sign}{v}" for v in range(1, max(levels) + 1) for sign in ("", "-"))],
        count=lambda level: math.comb(math.comb(level, 3) * 8, size(level)),
        draw=draw,
        prompts=prompts,
        shortcut=lambda level: 0.5,
        hint=lambda inputs_RC: sum(((inputs_RC == v).sum(1) - (inputs_RC == -v).sum(1)) ** 2 for v in range(1, abs(inputs_RC).max() + 1)),
        levels=(4, 6),
    )


FUNCTIONS = (mod_add, mod_add_many, permutations, parity, pointer_chasing, walk, reachability, sorting, three_sat)
TASKS: dict[str, Callable[..., Recipe]] = {function.__name__: function for function in FUNCTIONS}
