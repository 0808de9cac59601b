"""The report on a language, on languages whose figures are known: codes, noise, dictionaries, thoughts of different lengths."""

import io
import json
import math
from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from hf_thinktok.language import MAX_SIDE, describe_language
from hf_thinktok.report.language import _draw_joint, draw_language, print_language

CIRCULAR, DIFFER, DIFFERENCE, INPUT = "circular mod", "digits that differ", "|difference|", "input ids"


def describe(thoughts, answers, num_tokens, inputs=None, **options):
    """A report, with inputs that say nothing unless given; it must be JSON without NaN."""
    inputs = np.random.default_rng(9).integers(0, 5, (len(answers), 6)) if inputs is None else inputs
    report = describe_language(np.asarray(thoughts), np.asarray(answers), inputs, num_tokens, **options)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    return report


def similarity(report, meaning):
    (row,) = [row for row in report["topographic_similarity"] if meaning in row["meaning"]]
    return row


def digits(numbers, base, length):
    return np.stack([numbers // base**place % base for place in reversed(range(length))], 1)


def serial_language(questions=4000, length=3, states=6, shared=False, seed=0):
    """States of a serial task, and thoughts that say each by a random name; the names are the same in all positions, or not."""
    rng = np.random.default_rng(seed)
    states_QL = rng.integers(0, states, (questions, length))
    names = [rng.permutation(states)] * length if shared else [rng.permutation(states) for _ in range(length)]
    return np.stack([names[place][states_QL[:, place]] for place in range(length)], 1), states_QL, names


# ---------------------------------------------------------------- thoughts and answers


def test_a_perfect_code_says_every_bit_of_the_answer():
    answers = np.tile(np.arange(64), 10)
    report = describe(digits(answers, 8, 2), answers, 8, predictions_Q=np.where(np.arange(640) < 480, answers, -1))
    for key, value in {"information": 6, "answer_entropy": 6, "thought_entropy": 6, "capacity": 6, "channel_use": 1, "answer_share": 1}.items():
        assert report[key] == pytest.approx(value), key
    assert (report["questions"], report["distinct_thoughts"], report["distinct_answers"]) == (640, 64, 64)
    assert (report["synonyms"], report["homonyms"], report["accuracy"]) == (1, 0, 0.75)
    for position in report["positions"]:
        assert [position[key] for key in ("entropy", "max_entropy", "information", "information_given_before")] == pytest.approx([3] * 4)
    assert similarity(report, DIFFER)["value"] == pytest.approx(1)
    for meaning in (CIRCULAR, DIFFER, DIFFERENCE):
        row = similarity(report, meaning)
        assert row["value"] > 0.3 > row["null_high"] > row["null_mean"] > row["null_low"], row
        assert row["p_value"] == pytest.approx(1 / 201)
    assert similarity(report, INPUT)["null_low"] < similarity(report, INPUT)["value"] < similarity(report, INPUT)["null_high"]
    assert report["positional_disentanglement"]["value"] == pytest.approx(1)
    assert [p["digit"] for p in report["positional_disentanglement"]["by_position"]] == [1, 2]


def test_a_random_code_says_as_much_without_likeness():
    inside = dict.fromkeys((CIRCULAR, DIFFER, DIFFERENCE), 0)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        answers = np.arange(512)
        report = describe(digits(rng.permutation(512), 8, 3), answers, 8, seed=seed)
        assert report["information"] == pytest.approx(9)
        assert report["channel_use"] == pytest.approx(1)
        assert report["positional_disentanglement"]["value"] < 0.1
        for meaning in inside:
            row = similarity(report, meaning)
            assert row["pairs"] == 2000
            assert abs(row["value"]) < 0.1
            inside[meaning] += row["null_low"] <= row["value"] <= row["null_high"]
    assert min(inside.values()) >= 6, inside


def test_a_word_for_each_answer_is_no_likeness_of_answers():
    """Questions of one answer share a word whatever it is, and do so in the null as well."""
    surprising = dict.fromkeys((CIRCULAR, DIFFER, DIFFERENCE), 0)
    for seed in range(8):
        answers = np.tile(np.arange(64), 8)
        report = describe(digits(np.random.default_rng(seed).permutation(512)[:64], 8, 3)[answers], answers, 8, seed=seed)
        assert similarity(report, "answers, same or not")["p_value"] < 0.01
        for meaning in surprising:
            surprising[meaning] += similarity(report, meaning)["p_value"] < 0.05
    assert max(surprising.values()) <= 2, surprising


def test_a_constant_language_says_nothing():
    answers = np.arange(300) % 20
    report = describe(np.full((300, 2), 3), answers, 8)
    for key in ("information", "information_shuffled", "information_miller_madow", "thought_entropy", "channel_use", "answer_share"):
        assert report[key] == pytest.approx(0, abs=1e-12), key
    assert (report["distinct_thoughts"], report["synonyms"], report["homonyms"]) == (1, 1, 1)
    assert all(row["value"] is None for row in report["topographic_similarity"])
    assert report["positional_disentanglement"] is None


@pytest.mark.parametrize(("tokens", "noise"), [(2, 0.1), (8, 0.3), (16, 0.05)])
def test_a_noisy_channel_has_its_closed_form(tokens, noise):
    rng = np.random.default_rng(tokens)
    answers = rng.integers(0, tokens, 40000)
    thoughts = (answers + (rng.random(40000) < noise) * rng.integers(1, tokens, 40000)) % tokens
    entropy_of_noise = -noise * math.log2(noise) - (1 - noise) * math.log2(1 - noise)
    # The second position is not used.
    report = describe(np.stack([thoughts, np.zeros_like(thoughts)], 1), answers, tokens)
    expected = math.log2(tokens) - entropy_of_noise - noise * math.log2(max(1, tokens - 1))
    assert report["information"] == pytest.approx(expected, abs=0.02)
    assert report["answer_share"] == pytest.approx(expected / math.log2(tokens), abs=0.01)
    assert report["channel_use"] == pytest.approx(expected / math.log2(tokens) / 2, abs=0.01)
    assert [p["information"] for p in report["positions"]] == pytest.approx([report["information"], 0])


def test_chance_and_correction_measure_the_bias():
    rng = np.random.default_rng(0)
    thoughts, answers = rng.integers(0, 8, (1000, 1)), rng.integers(0, 8, 1000)
    report = describe(thoughts, answers, 8)
    # Miller's bias of two independent variables of 8 values each.
    expected = 7 * 7 / (2 * 1000 * math.log(2))
    assert report["information_shuffled"] == pytest.approx(expected, rel=0.2)
    assert report["information"] - report["information_miller_madow"] == pytest.approx(expected, rel=0.1)
    assert abs(report["information_miller_madow"]) < 0.015 < report["information"]
    # A thought of its own for each question has all of the answer, and as much by chance.
    report = describe(digits(np.arange(1000), 10, 3), answers, 10)
    assert report["information"] == pytest.approx(report["answer_entropy"]) == pytest.approx(report["information_shuffled"])
    assert report["information_miller_madow"] is None, "nothing corrects a bias of all there is"


def test_what_a_token_says_given_those_before():
    thoughts = digits(np.arange(4000) % 8, 2, 3)
    report = describe(thoughts, thoughts[:, 0] ^ thoughts[:, 1], 2)
    assert [p["information"] for p in report["positions"]] == pytest.approx([0, 0, 0], abs=1e-9)
    assert [p["information_given_before"] for p in report["positions"]] == pytest.approx([0, 1, 0], abs=1e-9)
    assert [p["information_given_before_shuffled"] for p in report["positions"]] == pytest.approx([0, 0, 0], abs=0.003)


def test_positions_add_up():
    rng = np.random.default_rng(0)
    report = describe(rng.integers(0, 4, (500, 3)), rng.integers(0, 5, 500), 4)
    assert sum(p["information_given_before"] for p in report["positions"]) == pytest.approx(report["information"])


def test_chance_of_a_letter_keeps_what_those_before_it_say():
    """Two letters name a pair of answers, so that a third which says nothing adds what its own bias is, and not that of a table without them."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 100, 10_000)
    thoughts = np.concatenate([digits(answers // 2, 10, 2), rng.integers(0, 10, (len(answers), 1))], 1)
    *_, third = describe(thoughts, answers, 10)["positions"]
    assert third["information_given_before"] == pytest.approx(third["information_given_before_shuffled"], rel=0.3)
    # Miller's bias, of ten letters and two answers in each of 50 pairs.
    assert third["information_given_before_shuffled"] == pytest.approx(50 * 9 / (2 * len(answers) * math.log(2)), rel=0.2)


def test_integers_of_any_size_make_the_same_report():
    thoughts, states, _ = serial_language(states=100)
    reports = [describe(*(a.astype(kind) for a in (thoughts, states[:, 0])), 100, states_QL=states.astype(kind)) for kind in (np.uint8, np.int64)]
    assert reports[0] == reports[1]


def test_synonyms_homonyms_and_the_table_of_thoughts():
    thoughts, answers = [[1, 0], [0, 0], [0, 1], [1, 0], [1, 0]], [1, 0, 0, 2, 2]
    inputs = np.arange(10).reshape(5, 2)
    report = describe(thoughts, answers, 2, inputs, answer_names=["a", "b", "c"], predictions_Q=np.array([1, 0, 1, 2, 1]))
    assert report["synonyms"] == pytest.approx(4 / 3)
    assert report["homonyms"] == pytest.approx(3 / 5)
    first, second, third = report["thoughts"]
    answers = [{"answer": "c", "count": 2}, {"answer": "b", "count": 1}]
    assert first == {"thought": [1, 0], "count": 3, "answers": answers, "accuracy": pytest.approx(2 / 3), "example_input": [0, 1]}
    assert second == {"thought": [0, 0], "count": 1, "answers": [{"answer": "a", "count": 1}], "accuracy": 1, "example_input": [2, 3]}
    assert (third["thought"], third["accuracy"]) == ([0, 1], 0)
    entries = [[0, 0, 1], [1, 0, 1], [2, 1, 1], [2, 2, 2]]
    assert report["joint"] == {"rows": ["0 0", "0 1", "1 0"], "columns": ["a", "b", "c"], "entries": entries}


def test_tables_keep_the_most_frequent():
    numbers = np.concatenate([np.arange(300), np.repeat(np.arange(200, 300), 2)])
    report = describe(digits(numbers, 10, 3), 299 - numbers, 10)
    assert [row["count"] for row in report["thoughts"]] == [3] * 40
    joint = report["joint"]
    assert len(joint["rows"]) == MAX_SIDE
    assert {f"{n // 100} {n // 10 % 10} {n % 10}" for n in range(200, 300)} <= set(joint["rows"])
    # Each thought stands for one answer: in the order of the answers, the entries lie on the diagonal.
    assert [entry[:2] for entry in joint["entries"]] == [[place, place] for place in range(MAX_SIDE)]


# ---------------------------------------------------------------- likeness of thoughts and meanings


def loop_ranks(values):
    return [sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values]


def test_topographic_similarity_is_that_of_a_loop_over_all_pairs():
    rng = np.random.default_rng(3)
    thoughts, answers, inputs = rng.integers(0, 3, (25, 4)), rng.integers(0, 27, 25), rng.integers(0, 2, (25, 5))
    answers[0] = 26
    report = describe(thoughts, answers, 3, inputs)
    pairs = list(combinations(range(25), 2))
    distances = {
        "same or not": lambda i, j: int(answers[i] != answers[j]),
        CIRCULAR: lambda i, j: min(abs(answers[i] - answers[j]), 27 - abs(answers[i] - answers[j])),
        DIFFER: lambda i, j: sum(a != b for a, b in zip(np.base_repr(answers[i], 3).zfill(3), np.base_repr(answers[j], 3).zfill(3))),
        DIFFERENCE: lambda i, j: sum(abs(int(a) - int(b)) for a, b in zip(np.base_repr(answers[i], 3).zfill(3), np.base_repr(answers[j], 3).zfill(3))),
        INPUT: lambda i, j: int((inputs[i] != inputs[j]).sum()),
    }
    of_thoughts = loop_ranks([int((thoughts[i] != thoughts[j]).sum()) for i, j in pairs])
    assert len(report["topographic_similarity"]) == len(distances)
    for meaning, distance in distances.items():
        row = similarity(report, meaning)
        assert row["pairs"] == 300
        assert row["value"] == pytest.approx(np.corrcoef(of_thoughts, loop_ranks([distance(i, j) for i, j in pairs]))[0, 1]), meaning


def test_likeness_of_inputs_is_found():
    inputs = np.random.default_rng(0).integers(0, 4, (500, 3))
    report = describe(inputs, np.zeros(500, int), 4, inputs)
    assert similarity(report, INPUT)["value"] == pytest.approx(1)
    assert similarity(report, "same or not")["value"] is None


def test_disentanglement_knows_which_position_speaks_of_which_digit():
    answers = np.tile(np.arange(64), 20)
    swapped = digits(answers, 8, 2)[:, ::-1]
    # The third position says both digits, half of each: no gap. The fourth never changes.
    both = np.stack([*swapped.T, answers // 8 // 4 * 2 + answers % 8 // 4, np.zeros_like(answers)], 1)
    report = describe(both, answers, 8)["positional_disentanglement"]
    assert [p["digit"] for p in report["by_position"]][:2] == [2, 1]
    assert [p["gap"] for p in report["by_position"]] == [pytest.approx(1), pytest.approx(1), pytest.approx(0, abs=1e-9), None]
    assert report["value"] == pytest.approx(2 / 3)
    assert report["value_shuffled"] < 0.02


@pytest.mark.parametrize(("names", "numbers"), [(None, True), ([str(i) for i in range(30)], True), ([f"node {i}" for i in range(30)], False)])
def test_names_say_whether_answers_are_numbers(names, numbers):
    answers = np.arange(200) % 20 + 5
    report = describe(digits(answers, 5, 2), answers, 5, answer_names=names)
    assert (report["positional_disentanglement"] is not None) == numbers
    assert [row["meaning"] for row in report["topographic_similarity"]][1:-1] == (
        [f"answers, circular mod {30 if names else 25}", "answer digits that differ", "answer digits, |difference|"] if numbers else []
    )
    assert report["joint"]["columns"] == (names[5:25] if names else list(range(5, 25)))


def test_answers_need_not_be_numbers():
    answers = np.array(["yes", "no", "no", "yes"] * 50)
    report = describe((answers == "yes")[:, None].astype(np.uint8), answers, 300)
    assert report["information"] == pytest.approx(1)
    assert report["joint"] == {"rows": ["0", "1"], "columns": ["no", "yes"], "entries": [[0, 0, 100], [1, 1, 100]]}
    report = describe(np.zeros((4, 1), int), np.array([-1, -1, 0, 3]), 2)
    assert len(report["topographic_similarity"]) == 2
    assert report["positional_disentanglement"] is None


# ---------------------------------------------------------------- states of a serial task


def test_a_serial_dictionary_is_found():
    thoughts, states, names = serial_language()
    report = describe(thoughts, states[:, -1], 6, states_QL=states)
    for place, dictionary in enumerate(report["states"]["by_position"]):
        assert dictionary["purity"] == 1
        assert 1 / 6 < dictionary["purity_shuffled"] < 0.25
        assert dictionary["information"] == pytest.approx(report["positions"][place]["entropy"])
        assert dictionary["information_shuffled"] < 0.01
        assert {entry["token"]: entry["state"] for entry in dictionary["entries"]} == {int(names[place][state]): state for state in range(6)}
        assert [entry["count"] for entry in dictionary["entries"]] == np.bincount(thoughts[:, place]).tolist()
    # Three dictionaries are not one.
    assert report["states"]["pooled"]["purity"] < 0.9
    thoughts, states, names = serial_language(shared=True)
    pooled = describe(thoughts, states[:, -1], 6, states_QL=states)["states"]["pooled"]
    assert pooled["purity"] == 1
    assert {entry["token"]: entry["state"] for entry in pooled["entries"]} == {int(names[0][state]): state for state in range(6)}
    assert sum(entry["of"] for entry in pooled["entries"]) == thoughts.size


def test_a_noisy_dictionary_counts_what_it_gets_wrong():
    thoughts, states = np.array([[0], [0], [0], [1], [1], [2]]), np.array([[7], [7], [8], [8], [9], [9]])
    dictionary = describe(thoughts, states[:, 0], 3, states_QL=states)["states"]["by_position"][0]
    assert dictionary["purity"] == pytest.approx(4 / 6)
    assert dictionary["entries"] == [{"token": t, "state": s, "count": c, "of": o} for t, s, c, o in ((0, 7, 2, 3), (1, 8, 1, 2), (2, 9, 1, 1))]
    # A token that is always the same says the most frequent state, as it would by chance.
    dictionary = describe(np.zeros((6, 1), int), states[:, 0], 3, states_QL=np.minimum(states, 8))["states"]["pooled"]
    assert dictionary["purity"] == pytest.approx(4 / 6) == pytest.approx(dictionary["purity_shuffled"])


def test_a_language_that_is_late_is_seen():
    thoughts, states, _ = serial_language(shared=True)
    late = np.concatenate([np.zeros((len(thoughts), 1), int), thoughts[:, :-1]], 1)
    by_step = np.array(describe(late, states[:, -1], 6, states_QL=states)["states"]["information_by_step"])
    assert by_step[1, 0] == pytest.approx(math.log2(6), abs=0.01)
    assert by_step[2, 1] == pytest.approx(math.log2(6), abs=0.01)
    by_step[1, 0] = by_step[2, 1] = 0
    assert by_step.max() < 0.02


# ---------------------------------------------------------------- thoughts of different lengths


def test_a_length_can_say_all():
    answers = np.tile(np.arange(4), 100)
    report = describe(np.zeros((400, 3), int), answers, 1, lengths_Q=answers)
    assert report["information"] == pytest.approx(2)
    assert report["capacity"] == pytest.approx(2)
    assert report["channel_use"] == pytest.approx(1)
    assert report["mean_length"] == pytest.approx(1.5)
    assert [p["absent"] for p in report["positions"]] == pytest.approx([0.25, 0.5, 0.75])
    assert [p["max_entropy"] for p in report["positions"]] == pytest.approx([1, 1, 1])
    assert sorted(row["thought"] for row in report["thoughts"]) == [[], [0], [0, 0], [0, 0, 0]]
    assert report["joint"]["rows"] == ["-", "0", "0 0", "0 0 0"]


def test_what_stands_behind_a_thought_does_not_count():
    thoughts, states, names = serial_language()
    lengths = np.random.default_rng(1).integers(1, 3, len(thoughts))
    behind = np.arange(3) >= lengths[:, None]
    reports = [
        describe(np.where(behind, junk, thoughts), states[:, 0], 6, lengths_Q=lengths, states_QL=np.where(behind, junk, states), seed=2) for junk in (-100, 99)
    ]
    assert reports[0] == reports[1]
    first, second, third = reports[0]["states"]["by_position"]
    assert first["purity"] == second["purity"] == 1
    assert second["purity_shuffled"] < 0.25
    assert second["information_shuffled"] < 0.02
    assert sum(entry["of"] for entry in second["entries"]) == (lengths > 1).sum()
    assert {entry["token"]: entry["state"] for entry in second["entries"]} == {int(names[1][state]): state for state in range(6)}
    assert third["entries"] == []
    assert third["purity"] is None
    by_step = reports[0]["states"]["information_by_step"]
    assert by_step[2] == [0, 0, 0]
    long = lengths > 1
    of_long = describe(thoughts[long, :2], states[long, 0], 6, states_QL=states[long, :2])["states"]["information_by_step"]
    assert by_step[0][1] == pytest.approx(of_long[0][1])
    assert by_step[1][:2] == pytest.approx(of_long[1])


# ---------------------------------------------------------------- pictures, tables, errors


def all_reports():
    thoughts, states, _ = serial_language(500, 7, shared=True)
    numbers = np.random.default_rng(0).integers(0, 61, 500)
    names = [f"[node] {i}" for i in range(6)]
    yield "code", describe(digits(numbers, 8, 2), numbers, 8, predictions_Q=numbers)
    yield "constant", describe(np.zeros((50, 2), int), np.zeros(50, int), 4)
    yield "one", describe(np.zeros((1, 1), int), np.zeros(1, int), 1)
    yield "empty", describe(np.zeros((5, 0), int), np.arange(5), 4, states_QL=np.zeros((5, 0), int))
    yield "serial", describe(thoughts, states[:, -1], 6, states_QL=states, answer_names=names)
    yield "unequal", describe(thoughts, states[:, -1], 6, states_QL=states, lengths_Q=np.arange(500) % 7)
    yield "one is longer", describe(thoughts, states[:, -1], 6, states_QL=states, lengths_Q=1 + (np.arange(500) == 7))
    yield "many", describe(np.arange(500)[:, None], np.arange(500), 500)


@pytest.mark.filterwarnings("error")
def test_every_report_can_be_drawn_and_printed(tmp_path):
    for name, report in all_reports():
        draw_language(report, path := tmp_path / "new" / f"{name}.svg")
        # Matplotlib notes each text beside its outlines.
        drawn = path.read_text()
        assert f"{report['questions']:,} questions, {report['distinct_thoughts']:,} thoughts" in drawn
        assert f"I(thought; answer) {report['information']:.2f} bits" in drawn
        console = Console(width=160, record=True, file=io.StringIO())
        print_language(report, console)
        printed = console.export_text()
        assert f"{report['information']:.3f}" in printed
        assert ("[node] 3" in printed) == (name == "serial")
        if report["states"] is not None and report["states"]["pooled"]["purity"] is not None:
            assert f"purity {report['states']['pooled']['purity']:.2f}" in drawn
            assert f"purity {report['states']['pooled']['purity']:.3f}" in printed


def test_the_suffix_is_the_kind_of_picture(tmp_path):
    draw_language(describe([[0], [1]], [0, 1], 2), tmp_path / "language.png")
    assert (tmp_path / "language.png").read_bytes().startswith(b"\x89PNG")


def test_the_heat_map_shows_shares_in_the_order_of_another():
    joint = {"rows": ["x", "y", "not there"], "columns": ["a", "b"], "entries": [[0, 0, 3], [0, 1, 1], [1, 1, 5], [2, 0, 9]]}
    like = {"rows": ["y", "z", "x"], "columns": ["a", "c", "b"]}
    image = _draw_joint(Figure().subplots(), joint, like, "title")
    assert image.get_array().tolist() == [[0, 0, 1], [0, 0, 0], [0.75, 0, 0.25]]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"thoughts_QL": np.zeros(4, int)}, "thoughts_QL"),
        ({"thoughts_QL": np.zeros((0, 2), int), "answers_Q": np.zeros(0)}, "at least one"),
        ({"thoughts_QL": np.full((4, 2), 3)}, r"0\.\.2"),
        ({"thoughts_QL": np.full((4, 2), -1)}, r"0\.\.2"),
        ({"answers_Q": np.zeros(3, int)}, "answers_Q"),
        ({"inputs_QI": np.zeros((3, 2), int)}, "inputs_QI"),
        ({"inputs_QI": np.zeros(4, int)}, "inputs_QI"),
        ({"lengths_Q": np.full(4, 3)}, "lengths_Q"),
        ({"lengths_Q": np.full(4, -1)}, "lengths_Q"),
        ({"predictions_Q": np.zeros(5)}, "predictions_Q"),
        ({"states_QL": np.zeros((4, 3))}, "states_QL"),
        ({"answers_Q": np.full(4, 2), "answer_names": ["a", "b"]}, "answer_names"),
        ({"answers_Q": np.zeros(4), "answer_names": ["a", "b"]}, "answer_names"),
    ],
)
def test_arrays_that_do_not_fit_are_errors(wrong, words):
    arrays = {"thoughts_QL": np.zeros((4, 2), int), "answers_Q": np.zeros(4, int), "inputs_QI": np.zeros((4, 2), int), "num_tokens": 3}
    with pytest.raises(ValueError, match=words):
        describe_language(**arrays | wrong)
