"""The tasks against oracles that read nothing but the prompt."""

import itertools
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from hf_thinktok.tasks import TASKS, Questions, make_task, matched, word_tokenizer
from hf_thinktok.tasks.questions import one_hop_accuracy, permutations, unordered_accuracy
from hf_thinktok.tasks.recipe import TEST_SHARE, held_back

ROWS = {"train_rows": 300, "test_rows": 150}
CASES = {
    "mod_add": ("mod_add", {"modulus": 30, "held_out": 0.3} | ROWS),
    "mod_add base 3": ("mod_add", {"modulus": 30, "base": 3, "slack": 0, "held_out": 0.3} | ROWS),
    "mod_add in digits": ("mod_add", {"modulus": 30, "digits": True, "held_out": 0.3} | ROWS),
    "mod_add_many": ("mod_add_many", {"modulus": 7, "levels": [1, 2, 4], "test_levels": [2, 3, 6]} | ROWS),
    "S3": ("permutations", {"group": "S3", "levels": range(1, 6), "test_levels": [3, 5, 7]} | ROWS),
    "S5": ("permutations", {"levels": [1, 2, 3, 5], "test_levels": [3, 9]} | ROWS),
    "parity": ("parity", {"levels": range(1, 9), "test_levels": [6, 8, 12]} | ROWS),
    "pointers": ("pointer_chasing", {"nodes": 5, "levels": [1, 2, 3], "test_levels": [1, 3, 7]} | ROWS),
    "pointers written twice": ("pointer_chasing", {"nodes": 5, "copies": 2, "levels": [2, 3]} | ROWS),
    "many pointers": ("pointer_chasing", {"nodes": 26, "levels": [1, 4]} | ROWS),
    "offsets": ("pointer_chasing", {"nodes": 5, "offsets": 5, "levels": [1, 2, 3], "test_levels": [3, 5]} | ROWS),
    "padded offsets": ("pointer_chasing", {"nodes": 5, "offsets": 3, "pad_to": 6, "levels": [1, 3], "test_levels": [3, 6]} | ROWS),
    "sums of offsets": ("pointer_chasing", {"nodes": 5, "offsets": 4, "pad_to": 4, "sum_steps": True, "levels": [1, 3], "test_levels": [1, 2, 4]} | ROWS),
    "reachability": ("reachability", {"nodes": 6, "edges": 8, "levels": [1, 2, 3], "test_levels": [2, 4]} | ROWS),
    "sorting": ("sorting", {"levels": [1, 2, 3, 5], "test_levels": [2, 4, 7]} | ROWS),
    "many values": ("sorting", {"values": 100, "levels": [12]} | ROWS),
    "three_sat": ("three_sat", {"levels": [4, 5]} | ROWS),
}
TWO_ANSWERS = ["parity", "reachability", "three_sat"]


@pytest.fixture(scope="module")
def tasks():
    return {case: make_task(name, **options) for case, (name, options) in CASES.items()}


@pytest.fixture(params=CASES)
def case(request, tasks):
    name, options = CASES[request.param]
    return tasks[request.param], options


# ---------------------------------------------------------------- oracles: from a prompt to the thought, the completion, and the question's integers


S5_LETTERS = {"a": (1, 0, 2, 3, 4), "b": (1, 2, 3, 4, 0), "c": (4, 0, 1, 2, 3), "d": (0, 1, 2, 3, 4)}


def elements(size):
    return sorted(itertools.permutations(range(size)))


def product_of(word, size):
    """Where each point goes, one letter after the other."""
    letters = S5_LETTERS if size == 5 else dict(zip("abcdef", elements(3)))
    points = list(range(size))
    for letter in word:
        points = [letters[letter][point] for point in points]
    return elements(size).index(tuple(points))


def read_mod_add(prompt, options):
    spelled = prompt.removesuffix(" =").split(" + ")
    assert not options.get("digits") or all(re.fullmatch(r"\d \d", text) for text in spelled)
    a, b = (int(text.replace(" ", "")) for text in spelled)
    total = rest = (a + b) % options["modulus"]
    base, digits = options.get("base", 10), []
    length = {10: 2, 3: 4}[base] + options.get("slack", 1)
    for _ in range(length):
        digits.insert(0, rest % base)
        rest //= base
    return digits, f" {total // 10} {total % 10}" if options.get("digits") else f" {total}", [a, b]


def read_mod_add_many(prompt, options):
    numbers = [int(n) for n in prompt.removesuffix(" =").split(" + ")]
    sums = [sum(numbers[:n]) % options["modulus"] for n in range(2, len(numbers) + 1)]
    return sums[:-1], f" {sums[-1]}", numbers


def read_permutations(prompt, options):
    word = prompt.removesuffix(" =").split(" ")
    size = int(options.get("group", "S5")[1])
    products = [product_of(word[:n], size) for n in range(1, len(word) + 1)]
    return products[:-1], f" g{products[-1]}", ["abcdef".index(letter) for letter in word]


def read_parity(prompt, options):
    bits = [int(bit) for bit in prompt.removesuffix(" =").split(" ")]
    return [sum(bits[:n]) % 2 for n in range(1, len(bits))], [" even", " odd"][sum(bits) % 2], bits


def read_pointer_chasing(prompt, options):
    hops, *lines, start = prompt.split("\n")
    written = lines.pop().split() if options.get("offsets") else []
    level, apart = int(hops.removeprefix("k")), options.get("sum_steps")
    shifts = [int(shift.removeprefix("+")) for shift in written if shift != "."] if options.get("offsets") else [0] * level
    copies, once = options.get("copies", 1), lines[: options["nodes"]]
    assert lines == once * copies
    arrows = dict(tuple(map(int, line.split(">"))) for line in once)
    assert sorted(arrows) == sorted(arrows.values()) == list(range(options["nodes"]))
    assert len(shifts) == (-(-level // 2) if apart else level)
    if "pad_to" in options:
        assert len(written) == (-(-options["pad_to"] // 2) if apart else options["pad_to"])
    start = int(start.removesuffix(">"))
    steps, node = [], start
    for shift in shifts:
        steps.append((node + shift) % options["nodes"])
        node = arrows[steps[-1]]
        steps.append(node)
    steps = steps[:level] if apart else steps[1::2]
    return steps[:-1], str(steps[-1]), [start, *(arrows[node] for node in sorted(arrows)), *(shifts if options.get("offsets") else [])]


def read_reachability(prompt, options):
    steps, *lines, question = prompt.split("\n")
    start, end = map(int, question.removesuffix(" ?").split(" to "))
    edges = sorted(tuple(map(int, line.split(">"))) for line in lines)
    assert len(set(edges)) == options["edges"]
    assert all(a != b for a, b in edges)
    assert start != end
    sets, near = [], {start}
    for _ in range(int(steps[1:])):
        assert end not in near, "a shorter way than the level"
        near = near | {b for a, b in edges if a in near}
        sets.append(sum(2**node for node in near))
    return sets[:-1], " yes" if end in near else " no", [start, end, *itertools.chain(*edges)]


def read_sorting(prompt, options):
    numbers = [int(n) for n in prompt.removesuffix(" :").split(" ")]
    return sorted(numbers)[:-1], "".join(f" {n}" for n in sorted(numbers)), numbers


def read_three_sat(prompt, options):
    clauses = [tuple(map(int, clause.split(" "))) for clause in prompt.removesuffix(" ?").split(" ; ")]
    variables = {5: 5, 4: 4}[max(abs(v) for clause in clauses for v in clause)]
    assert len({frozenset(clause) for clause in clauses}) == len(clauses)
    assert all(len({abs(v) for v in clause}) == 3 for clause in clauses)
    holds = [all(any((code >> abs(v) - 1) % 2 == (v > 0) for v in clause) for clause in clauses) for code in range(2**variables)]
    thought, now = [], 0
    for _ in range(2**variables - 1):
        now += not holds[now]
        thought.append(now)
    return thought, " yes" if any(holds) else " no", None


READERS = {name: globals()[f"read_{name}"] for name in TASKS if name != "walk"}  # whose rows have several questions: test_walk.py


def one_step_more(name, row, options):
    """The completion from the last thought and one step; for sums in digits, from the thought alone."""
    prompt, last, words = row["prompt"], row["thoughts"][-1], row["prompt"].split()
    if options.get("digits"):
        return "".join(f" {digit}" for digit in row["thoughts"][1:])
    if name == "mod_add":
        return f" {sum(digit * options.get('base', 10) ** place for place, digit in enumerate(reversed(row['thoughts'])))}"
    if name == "mod_add_many":
        return f" {(last + int(words[-2])) % options['modulus']}"
    if name == "permutations":
        size = int(options.get("group", "S5")[1])
        letter = (S5_LETTERS if size == 5 else dict(zip("abcdef", elements(3))))[words[-2]]
        return f" g{elements(size).index(tuple(letter[point] for point in elements(size)[last]))}"
    if name == "parity":
        return [" even", " odd"][last ^ int(words[-2])]
    if name == "pointer_chasing":
        apart, node = options.get("sum_steps"), last
        if options.get("offsets") and (not apart or row["level"] % 2):
            node = (last + int([word for word in words if word.startswith("+")][-1])) % options["nodes"]
        if apart and row["level"] % 2:
            return str(node)
        return next(word.split(">")[1] for word in words if word.startswith(f"{node}>") and word != f"{node}>")
    if name == "reachability":
        arrows = [tuple(map(int, word.split(">"))) for word in words if ">" in word]
        return " yes" if any(last >> a & 1 and b == int(words[-2]) for a, b in arrows) else " no"
    if name == "sorting":
        left = Counter(map(int, words[:-1])) - Counter(row["thoughts"])
        return "".join(f" {n}" for n in [*row["thoughts"], *left.elements()])
    clauses = [list(map(int, clause.split())) for clause in prompt.removesuffix("?").split(";")]
    return " yes" if all(any((last >> abs(v) - 1) % 2 == (v > 0) for v in clause) for clause in clauses) else " no"


def test_rows_are_what_the_oracle_says(case):
    task, options = case
    for row in [*task.train, *task.test]:
        thoughts, completion, inputs = READERS[task.name](row["prompt"], options)
        assert row["completion"] == completion, row
        assert row["thoughts"] == thoughts, row
        assert row["think_length"] == len(thoughts)
        if inputs is not None:
            assert row["inputs"] == inputs, row
        else:  # the clauses come in any order
            clauses = row["prompt"].removesuffix(" ?").split(" ; ")
            assert sorted(clauses) == sorted(" ".join(map(str, row["inputs"][i : i + 3])) for i in range(0, len(row["inputs"]), 3))
        if thoughts:
            assert one_step_more(task.name, row, options) == completion, row


def test_a_level_is_the_number_of_steps(case):
    task, options = case
    steps = {"mod_add": lambda level: None, "three_sat": lambda level: 2**level - 1}.get(task.name, lambda level: level - 1)
    for rows, levels, size in ((task.train, options.get("levels", [1]), 300), (task.test, options.get("test_levels", options.get("levels", [1])), 150)):
        size = min(size, 270) if task.name == "mod_add" and rows is task.test else size
        assert Counter(rows["level"]) == dict.fromkeys(levels, size)
        assert set(rows["level"][: len(levels)]) == set(levels)
        if task.name != "mod_add":
            assert all(row["think_length"] == steps(row["level"]) for row in rows)
    assert sorted(task.shortcut) == sorted({*options.get("levels", [1]), *options.get("test_levels", [])})
    assert all(task.chance <= accuracy <= 1 or task.name == "sorting" for accuracy in task.shortcut.values())


def test_answers_number_the_completions(case):
    task, _ = case
    seen = defaultdict(set)
    for row in [*task.train, *task.test]:
        seen[row["answer"]].add(row["completion"])
    if task.name == "sorting":  # leading zeros look alike in lists of different lengths
        seen = {(answer, n): {text for text in texts if len(text.split()) == n} for answer, texts in seen.items() for n in map(len, map(str.split, texts))}
    assert all(len(texts) == 1 for texts in seen.values())
    assert len({text for texts in seen.values() for text in texts}) == len(seen)
    if len(seen) == 2:
        assert {text.strip() for text in seen[1]} <= {"odd", "yes"}
    answers = {row["answer"]: row["completion"].strip() for row in task.train}
    if task.name in ("mod_add", "mod_add_many", "pointer_chasing"):
        assert all(answer == int(text.replace(" ", "")) for answer, text in answers.items())


def test_completions_go_on_with_the_prompt(case):
    task, options = case
    words = 2 if options.get("digits") else 1
    for row in [*task.train, *task.test]:
        assert row["completion"].startswith(" ") != (task.name == "pointer_chasing")
        assert row["prompt"] == row["prompt"].strip()
        assert len(row["completion"].split()) == (row["level"] if task.name == "sorting" else words)


@pytest.mark.parametrize(("case_name", "sep"), [("pointers", "\n"), ("offsets", "\n"), ("reachability", "\n"), ("three_sat", " ; ")])
def test_facts_come_in_random_order(case_name, sep, tasks):
    prompts = [prompt.removesuffix(" ?").split(sep) for prompt in tasks[case_name].train["prompt"]]
    facts = [[fact for fact in prompt if sep == " ; " or ">" in fact[:-1]] for prompt in prompts]
    places = [sorted(row).index(row[0]) / (len(row) - 1) for row in facts]
    assert np.mean(places) == pytest.approx(0.5, abs=0.06)
    assert np.std(places) > 0.25


@pytest.mark.parametrize(("prompt", "completion", "thoughts"), [("37 + 58 =", " 95", [0, 9, 5]), ("60 + 43 =", " 3", [0, 0, 3])])
def test_a_sum_by_hand(prompt, completion, thoughts):
    rows = make_task("mod_add").train
    row = next(row for row in rows if row["prompt"] == prompt)
    assert (row["completion"], row["thoughts"], row["think_length"]) == (completion, thoughts, 3)


# ---------------------------------------------------------------- sides, seeds, balance


def asked(rows, options):
    """The questions without the order of facts; of pointers, the start and the map without the hops and the offsets."""
    return {tuple(inputs[: 1 + options["nodes"]] if "edges" not in options and "nodes" in options else inputs) for inputs in rows["inputs"]}


def test_no_question_is_on_both_sides_even_with_another_seed(case):
    task, options = case
    other = make_task(task.name, seed=1, **options)
    assert other.train["prompt"] != task.train["prompt"]
    for test in (task.test,) if task.name == "mod_add" else (task.test, other.test):
        assert not set(test["prompt"]) & set(task.train["prompt"])
        assert not asked(test, options) & asked(task.train, options)


def test_a_quarter_of_the_questions_is_held_back():
    words = np.array(list(itertools.product(range(4), repeat=6)))
    back = held_back(words)
    assert back.mean() == pytest.approx(1 / TEST_SHARE, abs=0.02)
    for place in range(6):  # and no letter tells which
        for letter in range(4):
            assert back[words[:, place] == letter].mean() == pytest.approx(1 / TEST_SHARE, abs=0.05)


def test_rows_are_those_of_name_seed_and_options(case):
    task, options = case
    again = make_task(task.name, **options)
    assert again.train.to_dict() == task.train.to_dict()
    assert again.test.to_dict() == task.test.to_dict()
    assert (again.words, again.shortcut, again.chance) == (task.words, task.shortcut, task.chance)


def test_rows_of_a_level_do_not_depend_on_other_levels():
    alone, among = (make_task("pointer_chasing", nodes=6, levels=levels, **ROWS) for levels in ([3], [1, 3, 4]))
    assert alone.train.to_list() == [row for row in among.train if row["level"] == 3]
    assert alone.test.to_list() == [row for row in among.test if row["level"] == 3]


def test_all_sums_are_asked_once_on_both_sides():
    task = make_task("mod_add", modulus=20)
    everything = sorted(itertools.product(range(20), repeat=2))
    assert sorted(map(tuple, task.train["inputs"])) == sorted(map(tuple, task.test["inputs"])) == everything


def test_some_sums_are_held_out():
    task = make_task("mod_add", modulus=20, held_out=0.25)
    train, test = (sorted(map(tuple, rows["inputs"])) for rows in (task.train, task.test))
    assert (len(train), len(test)) in ((300, 100), (299, 101)), "the other order of the last one comes along"
    assert {pair[::-1] for pair in test} == set(test), "37 + 58 is no other question than 58 + 37"
    assert sorted(train + test) == sorted(itertools.product(range(20), repeat=2))


@pytest.mark.parametrize(("name", "level"), [("mod_add_many", 2), ("sorting", 3)])
def test_the_same_numbers_in_another_order_are_on_the_same_side(name, level):
    task = make_task(name, levels=[level], train_rows=2000, test_rows=300)
    train, test = ({tuple(sorted(numbers)) for numbers in rows["inputs"]} for rows in (task.train, task.test))
    assert not train & test


def test_a_million_sums_are_not_all_asked():
    task = make_task("mod_add", modulus=1000, train_rows=2000, test_rows=500, held_out=0.1)
    train, test = (set(map(tuple, rows["inputs"])) for rows in (task.train, task.test))
    assert (len(train), len(test)) == (2000, 500)
    assert not train & test
    assert np.mean([max(pair) > 500 for pair in train]) == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("name", TWO_ANSWERS)
def test_both_answers_are_equally_frequent(name, tasks):
    for rows in (tasks[name].train, tasks[name].test):
        for level in set(rows["level"]):
            answers = [row["answer"] for row in rows if row["level"] == level]
            assert sum(answers) == len(answers) // 2
    assert tasks[name].chance == 0.5
    odd = make_task(name, **CASES[name][1] | {"train_rows": 101})
    assert Counter(odd.train["level"]) == dict.fromkeys(CASES[name][1]["levels"], 101)


def best_guess(hints, answers):
    """Accuracy of the majority answer of each hint, learned on one half and scored on the other."""
    votes = defaultdict(Counter)
    half = len(hints) // 2
    for hint, answer in zip(hints[:half], answers[:half]):
        votes[hint][answer] += 1
    return np.mean([bool(votes[hint]) and votes[hint].most_common(1)[0][0] == answer for hint, answer in zip(hints[half:], answers[half:])])


def test_matched_questions_are_balanced_from_the_first_rows_on():
    rng = np.random.default_rng(0)
    hints = rng.integers(2, size=(8000, 1))
    answers = (rng.random(8000) < np.array([0.9, 0.2])[hints[:, 0]]).astype(int)
    kept = matched(rng, Questions(hints, hints, answers), hints[:, 0])
    for hint, share in ((0, 0.1), (1, 0.2)):
        of_hint = kept.answers_R[kept.inputs_RC[:, 0] == hint]
        assert of_hint.mean() == 0.5
        assert len(of_hint) == pytest.approx(8000 * share, rel=0.1)
        assert of_hint[:300].mean() == pytest.approx(0.5, abs=0.1)


def test_degrees_and_signs_tell_nothing():
    rows = make_task("reachability", levels=[2, 3], train_rows=4000, test_rows=1).train
    degrees = [tuple(sum(end == ends[side] for end in row["inputs"][2 + side :: 2]) for side in range(2)) for row in rows for ends in [row["inputs"]]]
    assert best_guess(degrees, rows["answer"]) < 0.53
    rows = make_task("three_sat", levels=[4], train_rows=6000, test_rows=1).train
    sided = [sum((row["inputs"].count(v) - row["inputs"].count(-v)) ** 2 for v in range(1, 5)) for row in rows]
    assert best_guess(sided, rows["answer"]) < 0.53


def test_a_level_with_few_questions_is_trained_on_and_not_tested():
    task = make_task("parity", levels=[1, 2, 7], **ROWS)
    assert set(task.test["level"]) == {7}
    assert {row["prompt"] for row in task.train if row["level"] == 2} == {"0 0 =", "0 1 =", "1 0 =", "1 1 ="}
    assert len({row["prompt"] for row in task.train if row["level"] == 7}) < 128


# ---------------------------------------------------------------- shortcuts


def hop(maps, path, shift=0):
    return np.take_along_axis(maps, (path[:, None] + shift) % maps.shape[1], 1)[:, 0]


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 12])
def test_one_hop_accuracy_is_what_the_best_guess_gets(nodes):
    maps = np.random.default_rng(0).permuted(np.tile(np.arange(nodes), (200_000, 1)), axis=1)
    # By symmetry the start is node 0. Seen is where it leads and what leads to it; of the other nodes one is as good as another, and here one answer.
    first, last = maps[:, 0], (maps == 0).argmax(1)
    others = max(nodes - 3, 1)
    path = np.zeros(len(maps), dtype=int)
    for hops in range(1, 14):
        path = hop(maps, path)
        right = 0.0
        for short in (first == 0, (first == last) & (first != 0), first != last):
            at_start, at_first, at_last = ((path == node)[short].sum() for node in (0, first, last))
            elsewhere = short.sum() - ((path == 0) | (path == first) | (path == last))[short].sum()
            right += max(at_start, at_first, at_last, elsewhere / others)
        assert one_hop_accuracy(nodes, hops) == pytest.approx(right / len(maps), abs=0.005), hops


@pytest.mark.parametrize("nodes", [3, 4, 5])
def test_one_hop_accuracy_with_offsets_is_what_the_best_guess_gets(nodes):
    maps = np.array(list(itertools.permutations(range(nodes))))
    for hops in range(1, 5):
        accuracies = []
        # The first hop goes through node 0, by symmetry; where it leads and the other offsets are seen.
        for second, shifts in itertools.product(range(nodes), itertools.product(range(nodes), repeat=hops - 1)):
            seen = maps[maps[:, 0] == second]
            path = np.full(len(seen), second)
            for shift in shifts:
                path = hop(seen, path, shift)
            accuracies.append(np.bincount(path).max() / len(seen))
        floor = one_hop_accuracy(nodes, hops, offsets=True)
        assert floor == pytest.approx(np.mean(accuracies)) if hops <= 3 else 1 / nodes < floor < np.mean(accuracies)


def test_drawn_pointers_are_as_easy_as_said():
    task = make_task("pointer_chasing", nodes=6, levels=[2, 3, 4, 6], train_rows=8000, test_rows=1)
    levels, inputs, answers = (np.array(task.train[column]) for column in ("level", "inputs", "answer"))
    starts, maps = inputs[:, 0], inputs[:, 1:]
    for level, accuracy in task.shortcut.items():
        first, last = hop(maps, starts), hop(maps.argsort(1), starts)
        told = first == last  # a cycle of one or two
        known = np.where(told & (level % 2 == 1), first, starts)
        right = [(np.where(told, known, guess) == answers)[levels == level].mean() for guess in (starts, first, last)]
        assert max(right) == pytest.approx(accuracy, abs=0.012), level


def test_unordered_accuracy_is_what_the_best_guess_gets():
    task = make_task("permutations", levels=range(1, 6), test_levels=[3], **ROWS)
    for length in range(1, 6):
        products = defaultdict(Counter)
        for word in itertools.product("abcd", repeat=length):
            products[tuple(sorted(word))][product_of(word, 5)] += 1
        best = sum(max(of_word.values()) for of_word in products.values()) / 4**length
        assert task.shortcut[length] == pytest.approx(best), length


def test_the_longer_a_word_the_less_its_counts_of_letters_tell():
    shortcuts = [permutations("S5").shortcut(length) for length in (1, 2, 3, 5, 8, 13, 21, 34)]
    assert shortcuts == sorted(shortcuts, reverse=True)
    assert 1 / 60 < shortcuts[-1] < 0.1  # the sign of the product can always be told
    assert permutations("S3").shortcut(34) == 1
    assert unordered_accuracy(np.zeros((1, 3), dtype=int), 20) == pytest.approx(1)  # one element: always right


def test_chance_is_a_random_answer():
    assert make_task("mod_add", modulus=20).chance == make_task("mod_add", modulus=20, digits=True).chance == 1 / 20
    assert make_task("permutations", levels=[3]).chance == 1 / math.factorial(5)
    lists = [len(list(itertools.combinations_with_replacement(range(4), level))) for level in (3, 4)]
    assert make_task("sorting", values=4, levels=[3, 4], **ROWS).chance == pytest.approx(np.mean([1 / n for n in lists]))


# ---------------------------------------------------------------- words


def test_every_word_is_one_token(case):
    task, _ = case
    tokenizer = word_tokenizer(task.words)
    assert len(tokenizer) == len(task.words) + 3
    assert list(task.words) == sorted(set(task.words))
    used = set()
    for row in [*task.train, *task.test]:
        for text in (row["prompt"], row["completion"]):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == " ".join(text.split())
            used |= set(text.split())
    assert used <= set(task.words)


@pytest.mark.parametrize("case_name", ["parity", "pointers", "offsets", "reachability", "three_sat", "mod_add_many", "S3"])
def test_no_word_is_of_another_task(case_name, tasks):
    task = tasks[case_name]
    used = {word for row in [*task.train, *task.test] for text in (row["prompt"], row["completion"]) for word in text.split()}
    assert used == set(task.words)


def test_word_tokenizer_knows_its_special_tokens():
    tokenizer = word_tokenizer(["b", "a", "?", "n't"])
    assert tokenizer.convert_ids_to_tokens(range(7)) == ["<pad>", "<unk>", "<eos>", "b", "a", "?", "n't"]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("a\nzebra  b<eos>")["input_ids"] == [4, 1, 3, 2]
    assert tokenizer.decode([4, 5, 3, 6, 2]) == "a ? b n't <eos>"
    assert tokenizer.decode([4, 5, 2, 0], skip_special_tokens=True) == "a ?"
    padded = tokenizer(["a", "a b"], padding=True)
    assert padded["attention_mask"] == [[1, 0], [1, 1]]


def test_word_tokenizer_refuses_what_it_would_split():
    with pytest.raises(ValueError, match="'a b' is not one word between whitespace"):
        word_tokenizer(["a b"])


# ---------------------------------------------------------------- errors


ERRORS = [
    ("pointer", {}, ["no task 'pointer'", "did you mean 'pointer_chasing'", "three_sat"]),
    ("parity", {"level": [1]}, ["'level'", "did you mean 'levels'"]),
    ("mod_add", {"modulo": 7}, ["'modulo'", "did you mean 'modulus'", "slack"]),
    ("mod_add", {"modulus": 1}, ["modulus=1", "from 2 to 2000"]),
    ("mod_add", {"slack": -1}, ["slack=-1", "of 0 or more"]),
    ("pointer_chasing", {"pad_to": 4}, ["pad_to=4", "offsets=10"]),
    ("pointer_chasing", {"sum_steps": True}, ["sum_steps=True", "offsets=10"]),
    ("pointer_chasing", {"offsets": 10, "pad_to": 4, "levels": [5]}, [r"levels=\[5\]", "from 1 to 4"]),
    ("mod_add", {"digits": 3}, ["digits=3", "True or False"]),
    ("permutations", {"fill": True}, ["fill=True", "give pad_to"]),
    ("permutations", {"fill": 1, "pad_to": 4}, ["fill=1", "True or False"]),
    ("pointer_chasing", {"offsets": 10, "sum_steps": "no"}, ["sum_steps='no'", "True or False"]),
    ("mod_add", {"held_out": 1.0}, ["held_out=1.0", "either side"]),
    ("mod_add", {"held_out": 1e-9}, ["held_out=1e-09", "either side"]),
    ("mod_add", {"levels": [2]}, [r"levels=\[2\]", "from 1 to 1"]),
    ("parity", {"levels": []}, [r"levels=\[\]", "different whole numbers"]),
    ("parity", {"levels": 3}, ["levels=3", "whole numbers of 1 or more"]),
    ("parity", {"levels": [7, 7]}, ["different"]),
    ("parity", {"test_levels": [7.5]}, ["test_levels", "whole numbers"]),
    ("parity", {"test_levels": [7, 3]}, ["Level 3 of parity has 8 questions", "harder test_levels"]),
    ("parity", {"levels": [1, 2]}, ["Level 1 of parity has 2 questions", "harder test_levels"]),
    ("parity", {"train_rows": 0}, ["train_rows=0", "of 1 or more"]),
    ("parity", {"seed": -1}, ["seed=-1", "of 0 or more"]),
    ("permutations", {"group": "S4"}, ["group='S4'", "'S3' or 'S5'"]),
    ("pointer_chasing", {"nodes": "ten"}, ["nodes='ten'", "whole number"]),
    ("pointer_chasing", {"nodes": 3}, ["has 18 questions", "harder test_levels"]),
    ("pointer_chasing", {"copies": 0}, ["copies=0", "of 1 or more"]),
    ("pointer_chasing", {"offsets": True}, ["offsets=True", "from 0 to 10"]),
    ("pointer_chasing", {"nodes": 5, "offsets": 6}, ["offsets=6", "from 0 to 5"]),
    ("walk", {"onward": True}, ["onward has no effect", "together to 2"]),
    ("reachability", {"nodes": 4, "edges": 13}, ["edges=13", "from 1 to 12"]),
    ("reachability", {"nodes": 4, "edges": 6, "levels": [4]}, ["levels=", "from 1 to 3"]),
    ("reachability", {"nodes": 9, "edges": 72, "levels": [1]}, ["too few questions", "Level 1"]),
    ("sorting", {"values": 2}, ["values=2", "of 3 or more"]),
    ("three_sat", {"clauses": 7}, ["clauses=7", "from 8 to 31"]),
    ("three_sat", {"levels": [3]}, ["levels=", "from 4 to 6"]),
]


@pytest.mark.parametrize(("name", "options", "words"), ERRORS, ids=[f"{name}-{'-'.join(map(str, options.items()))}" for name, options, _ in ERRORS])
def test_what_cannot_be_is_refused_in_one_sentence(name, options, words, monkeypatch):
    monkeypatch.setattr("hf_thinktok.tasks.MAX_BATCHES", 10)
    with pytest.raises(ValueError, match=".") as error:
        make_task(name, **options)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    for word in words:
        assert re.search(word, text), f"{word!r} is not in {text!r}"


def test_padded_words_are_the_same_questions_in_prompts_of_one_length():
    options = {"levels": [2, 5], "test_levels": [5], "train_rows": 50, "test_rows": 50, "seed": 3}
    plain, padded = make_task("permutations", **options), make_task("permutations", pad_to=7, **options)
    assert padded.train["answer"] == plain.train["answer"]
    assert padded.train["thoughts"] == plain.train["thoughts"]
    for short, long in zip(plain.train["prompt"], padded.train["prompt"], strict=True):
        assert len(long.split()) == 8
        assert long.replace(" .", "") == short
    assert set(padded.words) - set(plain.words) == {"."}
    with pytest.raises(ValueError, match="levels"):
        make_task("permutations", pad_to=7, levels=[8])


def test_words_filled_up_with_letters_do_not_show_where_they_end():
    options = {"pad_to": 7, "levels": [2, 5, 7], "test_levels": [5, 7], "train_rows": 400, "test_rows": 50, "seed": 3}
    dots, filled = make_task("permutations", **options), make_task("permutations", fill=True, **options)
    for column in ("answer", "thoughts", "inputs", "think_length"):
        assert filled.train[column] == dots.train[column]
    assert "." not in filled.words
    tails = {2: [], 5: []}
    for short, long, level in zip(dots.train["prompt"], filled.train["prompt"], filled.train["level"], strict=True):
        assert long.split()[:level] == short.split()[:level]
        assert len(long.split()) == 8
        if level == 7:
            assert long == short
        else:
            tails[level].append(long.removesuffix(" =").split()[level:])
    for level, words in tails.items():
        shares = np.array([[word[place] == letter for letter in "abcd"] for word in words for place in range(7 - level)]).mean(0)
        assert shares == pytest.approx(0.25, abs=0.05), "all letters alike, the ones that change nothing too"
        assert len(set(map(tuple, words))) > 10


def test_a_sum_that_is_a_step_of_its_own_changes_no_shortcut():
    options = {"nodes": 6, "offsets": 6, "train_rows": 30, "test_rows": 6}
    plain, apart = make_task("pointer_chasing", levels=[1, 2, 3], **options), make_task("pointer_chasing", levels=range(2, 8), sum_steps=True, **options)
    for hops, accuracy in plain.shortcut.items():
        assert apart.shortcut[2 * hops] == apart.shortcut[2 * hops + 1] == accuracy


def test_facts_written_twice_ask_the_same():
    options = {"nodes": 6, "levels": [2, 4], "train_rows": 30, "test_rows": 6}
    once, twice = (make_task("pointer_chasing", copies=copies, **options) for copies in (1, 2))
    assert twice.shortcut == once.shortcut
    for rows in ("train", "test"):
        a, b = getattr(once, rows), getattr(twice, rows)
        assert a["completion"][:] == b["completion"][:]
        assert a["inputs"][:] == b["inputs"][:]
        assert all(len(long.split()) == len(short.split()) + 6 for short, long in zip(a["prompt"][:], b["prompt"][:], strict=True))


def test_an_offset_that_is_always_zero_changes_no_shortcut():
    options = {"nodes": 6, "levels": [2, 3, 4], "train_rows": 30, "test_rows": 6}
    plain, zero, some = (make_task("pointer_chasing", **options, offsets=offsets) for offsets in (0, 1, 2))
    assert zero.shortcut == plain.shortcut
    assert some.shortcut[4] < plain.shortcut[4]
