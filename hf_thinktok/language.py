"""Which thought means what: a report on the language that a model has invented for its thoughts.

A thought is a word of that language, its thinking tokens are the letters, and what it is about are the answer, the input and, where a task has steps,
the state after each step. `describe_language` measures; `hf_thinktok.report.language` shows.

Estimators. Entropies and informations are in bits, from relative frequencies ("plug-in"). Such an information is too high where thoughts are many and
questions few: with one thought per question it is the answer's whole entropy, whatever the thoughts say. So each comes with `_shuffled`, the mean of the
same estimate over shuffles that give every question the answer (or the states) of another: what chance alone makes of it. The information between whole
thoughts and answers comes with the correction of Miller (1955), too.

Arrays carry their shape as a suffix: Q questions, L thinking tokens, I ids of an input, D digits of an answer, P pairs of questions, S shuffles,
M different pairs of a thought and an answer, R and C rows and columns of a table.

- Miller 1955, Note on the bias of information estimates, in Quastler, Information Theory in Psychology
- Brighton & Kirby 2006, Understanding linguistic evolution by visualizing the emergence of topographic mappings, Artificial Life 12(2)
- Lazaridou et al. 2018, https://huggingface.co/papers/1804.03984
- Chaabouni et al. 2020, https://huggingface.co/papers/2004.09124
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

INFORMATION_SHUFFLES, SIMILARITY_SHUFFLES = 20, 200
MAX_PAIRS, MAX_THOUGHTS, MAX_SIDE = 2000, 40, 128
ABSENT = "-"
ESTIMATORS = {
    "information": "bits, plug-in: from relative frequencies",
    "shuffled": f"the same estimate, answers or states shuffled over the questions, mean of {INFORMATION_SHUFFLES}: what chance alone gives",
    "information_miller_madow": "plug-in, each entropy plus (distinct values - 1) / (2 questions ln 2); null where a thought and its answer come together "
    "less than twice on average, as it then corrects nothing",
    "topographic_similarity": f"Spearman correlation of distances over pairs of questions; null: mean and 95 % interval of {SIMILARITY_SHUFFLES} shuffles",
}
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def describe_language(
    thoughts_QL: np.ndarray,
    answers_Q: np.ndarray,
    inputs_QI: np.ndarray,
    num_tokens: int,
    *,
    answer_names: Sequence[str] | None = None,
    lengths_Q: np.ndarray | None = None,
    predictions_Q: np.ndarray | None = None,
    states_QL: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures what thoughts say. The report is made of plain numbers, strings, lists and dicts; a figure that is not defined is `None`.

    Args:
        thoughts_QL: ids 0..num_tokens-1, one thought per question.
        answers_Q: the true answers. Non-negative integers are read as numbers mod m (m is the largest + 1) with digits in base `num_tokens`, unless
            `answer_names` says otherwise; all else is categories.
        inputs_QI: the questions, padded alike.
        answer_names: the name of each answer 0..m-1. Names other than "0", "1", ... make the answers categories.
        lengths_Q: thinking tokens of each thought, where they differ; what stands behind them is ignored and counts as one more symbol, "absent".
        predictions_Q: the answers that the model gave; only the accuracies need them.
        states_QL: the true intermediate state at each step of a serial task, to which the thinking token in the same place is compared.
        seed: of the pairs and the shuffles.

    Raises:
        ValueError: shapes that do not belong together, or ids, lengths or answers out of range.
    """
    thoughts_QL, answers_Q, inputs_QI = np.asarray(thoughts_QL), np.asarray(answers_Q), np.asarray(inputs_QI)
    present_QL = _check(thoughts_QL, answers_Q, inputs_QI, num_tokens, answer_names, lengths_Q, predictions_Q, states_QL)
    questions, length = thoughts_QL.shape
    symbols_QL = np.where(present_QL, thoughts_QL.astype(np.int64), num_tokens)
    rng = np.random.default_rng(seed)
    orders_SQ = np.stack([rng.permutation(questions) for _ in range(INFORMATION_SHUFFLES)])

    values, answer_codes_Q = np.unique(answers_Q, return_inverse=True)
    labels = [answer_names[value] for value in values] if answer_names is not None else values.tolist()
    # Codes of the first l letters, l from 0; numbered anew each time, so that long thoughts do not overflow.
    prefixes_Q = [np.zeros(questions, dtype=np.int64)]
    for symbols_Q in symbols_QL.T:
        prefixes_Q.append(np.unique(prefixes_Q[-1] * (num_tokens + 1) + symbols_Q, return_inverse=True)[1])
    thought_codes_Q = prefixes_Q[-1]
    words = [" ".join(map(str, thoughts_QL[q][present_QL[q]].tolist())) or ABSENT for q in np.unique(thought_codes_Q, return_index=True)[1]]
    meanings_2M = np.unique(np.stack([thought_codes_Q, answer_codes_Q]), axis=1)

    told = [_information(prefix_Q, answer_codes_Q) for prefix_Q in prefixes_Q]
    positions = []
    for place, symbols_Q in enumerate(symbols_QL.T):
        absent = float((symbols_Q == num_tokens).mean())
        positions.append(
            {
                "position": place + 1,
                "absent": absent,
                "entropy": _entropy(symbols_Q),
                "max_entropy": math.log2(num_tokens + (absent > 0)),
                "information": _information(symbols_Q, answer_codes_Q),
                "information_shuffled": _shuffled_information(symbols_Q, answer_codes_Q, orders_SQ),
                # Chain rule: I(Z_l; answer | Z_<l) = I(Z_<=l; answer) - I(Z_<l; answer).
                "information_given_before": max(0.0, told[place + 1] - told[place]),
                "information_given_before_shuffled": _shuffled_within(prefixes_Q[place], prefixes_Q[place + 1], answer_codes_Q, orders_SQ) - told[place],
            }
        )

    bias = (meanings_2M.shape[1] + 1 - len(words) - len(values)) / (2 * questions * math.log(2))
    # Where lengths differ, the length says something as well: capacity counts the thoughts of at most L tokens.
    capacity = length * math.log2(num_tokens) if present_QL.all() else math.log2(sum(num_tokens**tokens for tokens in range(length + 1)))
    answer_entropy = _entropy(answer_codes_Q)
    correct_Q = None if predictions_Q is None else np.asarray(predictions_Q) == answers_Q
    digits_QD = _digits(answers_Q, num_tokens, answer_names)
    distances = _distances(answer_codes_Q, digits_QD, answers_Q, len(answer_names or ()), inputs_QI)
    return {
        "questions": questions,
        "num_tokens": num_tokens,
        "length": length,
        "mean_length": float(present_QL.sum(1).mean()),
        "distinct_thoughts": len(words),
        "distinct_answers": len(values),
        "accuracy": None if correct_Q is None else float(correct_Q.mean()),
        "thought_entropy": _entropy(thought_codes_Q),
        "answer_entropy": answer_entropy,
        "capacity": capacity,
        "information": told[-1],
        "information_shuffled": _shuffled_information(thought_codes_Q, answer_codes_Q, orders_SQ),
        "information_miller_madow": told[-1] - bias if questions >= 2 * meanings_2M.shape[1] else None,
        "channel_use": told[-1] / capacity if capacity else None,
        "answer_share": told[-1] / answer_entropy if answer_entropy else None,
        # Both are over what occurs: thoughts per answer, and the share of questions whose thought occurs with several answers.
        "synonyms": meanings_2M.shape[1] / len(values),
        "homonyms": float((np.bincount(meanings_2M[0]) > 1)[thought_codes_Q].mean()),
        "positions": positions,
        "states": None if states_QL is None else _describe_states(symbols_QL, np.asarray(states_QL), present_QL, orders_SQ),
        "positional_disentanglement": None if digits_QD is None else _disentanglement(symbols_QL, digits_QD, orders_SQ),
        "topographic_similarity": _topographic_similarity(symbols_QL, distances, answer_codes_Q, rng),
        "thoughts": _frequent_thoughts(thought_codes_Q, answer_codes_Q, labels, symbols_QL, present_QL, inputs_QI, correct_Q),
        "joint": _joint(thought_codes_Q, answer_codes_Q, words, labels),
        "estimators": ESTIMATORS,
        "seed": seed,
    }


def _check(thoughts_QL, answers_Q, inputs_QI, num_tokens, answer_names, lengths_Q, predictions_Q, states_QL) -> np.ndarray:
    """Which thinking tokens are there `[Q, L]`; an error where the arrays do not fit."""
    if thoughts_QL.ndim != 2 or not len(thoughts_QL):
        raise ValueError(f"thoughts_QL must be [questions, tokens] with at least one question, not {list(thoughts_QL.shape)}.")
    questions, length = thoughts_QL.shape
    right = {"answers_Q": (questions,), "inputs_QI": (questions, inputs_QI.shape[-1]), "lengths_Q": (questions,), "predictions_Q": (questions,)}
    right["states_QL"] = thoughts_QL.shape
    for name, values in zip(right, (answers_Q, inputs_QI, lengths_Q, predictions_Q, states_QL)):
        if values is not None and np.shape(values) != right[name]:
            raise ValueError(f"{name} must be {list(right[name])} for thoughts that are {list(thoughts_QL.shape)}, not {list(np.shape(values))}.")
    lengths_Q = np.full(questions, length) if lengths_Q is None else np.asarray(lengths_Q)
    if lengths_Q.min() < 0 or lengths_Q.max() > length:
        raise ValueError(f"lengths_Q must be within 0..{length}, not {lengths_Q.min()}..{lengths_Q.max()}.")
    present_QL = np.arange(length) < lengths_Q[:, None]
    thinking = thoughts_QL[present_QL]
    if thinking.size and (thinking.min() < 0 or thinking.max() >= num_tokens):
        raise ValueError(f"Thoughts must be ids 0..{num_tokens - 1}; take the id of the first thinking token off, and pass the lengths where they differ.")
    if answer_names is not None and (not np.issubdtype(answers_Q.dtype, np.integer) or answers_Q.min() < 0 or answers_Q.max() >= len(answer_names)):
        raise ValueError(f"With answer_names, answers_Q must be integers 0..{len(answer_names) - 1}.")
    return present_QL


def _entropy(values_Q: np.ndarray) -> float:
    counts = np.unique(values_Q, return_counts=True)[1]
    return max(0.0, float(np.log2(counts.sum()) - (counts * np.log2(counts)).sum() / counts.sum())) if counts.size else 0.0


def _information(first_Q: np.ndarray, second_Q: np.ndarray) -> float:
    """Mutual information of two arrays of non-negative integers."""
    if not first_Q.size:
        return 0.0
    return max(0.0, _entropy(first_Q) + _entropy(second_Q) - _entropy(first_Q * (int(second_Q.max()) + 1) + second_Q))


def _shuffled_information(first_Q: np.ndarray, second_Q: np.ndarray, orders_SQ: np.ndarray) -> float:
    return float(np.mean([_information(first_Q, second_Q[order_Q]) for order_Q in orders_SQ]))


def _shuffled_within(groups_Q: np.ndarray, first_Q: np.ndarray, second_Q: np.ndarray, orders_SQ: np.ndarray) -> float:
    """As `_shuffled_information`, where only what is of one group changes places: so what groups say stays."""
    places_Q = groups_Q.argsort(kind="stable")
    shuffled_Q = second_Q.copy()
    found = []
    for order_Q in orders_SQ:
        shuffled_Q[places_Q] = second_Q[order_Q[groups_Q[order_Q].argsort(kind="stable")]]
        found.append(_information(first_Q, shuffled_Q))
    return float(np.mean(found))


def _digits(answers_Q: np.ndarray, base: int, answer_names: Sequence[str] | None) -> np.ndarray | None:
    """Digits `[Q, D]`, the highest first, as many as the largest answer has; `None` where the answers are no numbers."""
    numerals = answer_names is None or list(answer_names) == [str(value) for value in range(len(answer_names))]
    if base < 2 or not numerals or not np.issubdtype(answers_Q.dtype, np.integer) or answers_Q.min() < 0:
        return None
    digits, rest_Q = [answers_Q.astype(np.int64) % base], answers_Q.astype(np.int64) // base
    while rest_Q.any():
        digits.append(rest_Q % base)
        rest_Q = rest_Q // base
    return np.stack(digits[::-1], 1)


def _describe_states(symbols_QL: np.ndarray, states_QL: np.ndarray, present_QL: np.ndarray, orders_SQ: np.ndarray) -> dict[str, Any]:
    """The dictionary of thinking token -> state, at each position and over all of them, and the information that each token has on each step's state."""
    values, codes = np.unique(states_QL, return_inverse=True)
    labels, codes_QL, places = values.tolist(), codes.reshape(states_QL.shape), range(states_QL.shape[1])
    # What stands behind a thought's end need not be a state.
    reached = lambda place, step: present_QL[:, max(place, step)]
    return {
        "pooled": _dictionary(symbols_QL, codes_QL, present_QL, labels, orders_SQ),
        "by_position": [_dictionary(symbols_QL[:, [i]], codes_QL[:, [i]], present_QL[:, [i]], labels, orders_SQ) for i in places],
        # A language may say a state before or after its step: rows are positions, columns are steps.
        "information_by_step": [[_information(symbols_QL[reached(i, k), i], codes_QL[reached(i, k), k]) for k in places] for i in places],
    }


def _dictionary(symbols_QX: np.ndarray, states_QX: np.ndarray, present_QX: np.ndarray, labels: list, orders_SQ: np.ndarray) -> dict[str, Any]:
    """The best dictionary, each token -> the state it occurs with most, and its purity: the share of tokens that occur with the state it says.

    Purity is that of clusterings (Manning, Raghavan & Schütze 2008, Introduction to Information Retrieval, 16.3); `purity_shuffled` is that of the best
    dictionary once each question has the states of another.
    """
    tokens, states = symbols_QX[present_QX], states_QX[present_QX]
    if not tokens.size:
        figures: dict[str, Any] = dict.fromkeys(("information", "information_shuffled", "purity", "purity_shuffled"))
        return figures | {"entries": [], "joint": {"rows": [], "columns": [], "entries": []}}
    rows, columns = int(tokens.max()) + 1, len(labels)

    def counts_RC(tokens: np.ndarray, states: np.ndarray) -> np.ndarray:
        return np.bincount(tokens * columns + states, minlength=rows * columns).reshape(rows, columns)

    shuffled = []
    for order_Q in orders_SQ:
        both_QX = present_QX & present_QX[order_Q]
        others, states_there = symbols_QX[both_QX], states_QX[order_Q][both_QX]
        if others.size:
            shuffled.append((_information(others, states_there), counts_RC(others, states_there).max(1).sum() / others.size))
    information_shuffled, purity_shuffled = np.mean(shuffled, 0).tolist() if shuffled else (None, None)
    counted = [(token, int(row.argmax()), int(row.max()), int(row.sum())) for token, row in enumerate(counts_RC(tokens, states))]
    return {
        "information": _information(tokens, states),
        "information_shuffled": information_shuffled,
        "purity": sum(count for _, _, count, _ in counted) / tokens.size,
        "purity_shuffled": purity_shuffled,
        "entries": [{"token": token, "state": labels[state], "count": count, "of": total} for token, state, count, total in counted if total],
        "joint": _joint(tokens, states, list(range(rows)), labels),
    }


def _disentanglement(symbols_QL: np.ndarray, digits_QD: np.ndarray, orders_SQ: np.ndarray) -> dict[str, Any] | None:
    """Positional disentanglement (Chaabouni et al. 2020, eq. 1): does a position speak of one digit of the answer only?

    A position's gap is its information on the digit it knows best less that on the second best, over its entropy; positions that never change are left
    out of the mean. Digits are counted from 1, the highest. `None` where the answers have less than two digits that vary.
    """
    varied_D = np.ptp(digits_QD, axis=0) > 0
    entropies_L = np.array([_entropy(symbols_Q) for symbols_Q in symbols_QL.T])
    if varied_D.sum() < 2 or not entropies_L.any():
        return None
    changing = np.flatnonzero(entropies_L)

    def gaps_and_digits(digits_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        informations_LD = np.array([[_information(symbols_QL[:, place], digits_Q) for digits_Q in digits_QD.T] for place in changing])
        best_L2 = np.sort(informations_LD, axis=1)[:, -2:]
        return (best_L2[:, 1] - best_L2[:, 0]) / entropies_L[changing], informations_LD.argmax(1) + 1

    gaps_L, best_digits_L = gaps_and_digits(digits_QD)
    by_position: list[dict[str, Any]] = [{"digit": None, "gap": None} for _ in entropies_L]
    for place, gap, digit in zip(changing, gaps_L.tolist(), best_digits_L.tolist()):
        by_position[place] = {"digit": digit, "gap": gap}
    shuffled = [gaps_and_digits(digits_QD[order_Q])[0].mean() for order_Q in orders_SQ]
    return {"value": float(gaps_L.mean()), "value_shuffled": float(np.mean(shuffled)), "by_position": by_position}


def _distances(answer_codes_Q, digits_QD, answers_Q, num_names: int, inputs_QI) -> dict[str, tuple[Distance, bool]]:
    """Distances of meanings between questions i and j, by name; and whether each says how unlike two answers are, and not only whether they are the same."""
    distances: dict[str, tuple[Distance, bool]] = {"answers, same or not": (lambda i, j: answer_codes_Q[i] != answer_codes_Q[j], False)}
    if digits_QD is not None:
        modulus, numbers_Q = max(int(answers_Q.max()) + 1, num_names), answers_Q.astype(np.int64)

        def circular(i: np.ndarray, j: np.ndarray) -> np.ndarray:
            ahead = (numbers_Q[i] - numbers_Q[j]) % modulus
            return np.minimum(ahead, modulus - ahead)

        distances |= {
            f"answers, circular mod {modulus}": (circular, True),
            "answer digits that differ": (lambda i, j: (digits_QD[i] != digits_QD[j]).sum(1), True),
            "answer digits, |difference|": (lambda i, j: np.abs(digits_QD[i] - digits_QD[j]).sum(1), True),
        }
    return distances | {"input ids that differ": (lambda i, j: (inputs_QI[i] != inputs_QI[j]).sum(1), False)}


def _topographic_similarity(
    symbols_QL: np.ndarray, distances: dict[str, tuple[Distance, bool]], answer_codes_Q: np.ndarray, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Do like meanings have like thoughts? (Brighton & Kirby 2006; Lazaridou et al. 2018)

    Spearman's correlation, over pairs of questions, between the Hamming distance of the thoughts and the distance of the meanings. The null gives each
    question the meaning of another (Mantel 1967, the test for distance matrices), and where a distance says how unlike answers are each answer that of another:
    questions of one answer share a word in the null as well. `p_value` is the share of shuffles that correlate at least as much.
    """
    questions = len(symbols_QL)
    possible = questions * (questions - 1) // 2
    pairs = np.arange(possible) if possible <= MAX_PAIRS else rng.choice(possible, MAX_PAIRS, replace=False)
    # Pair number i(i-1)/2 + j is of the questions j < i.
    i_P = ((1 + np.sqrt(1 + 8.0 * pairs)) // 2).astype(np.int64)
    j_P = pairs - i_P * (i_P - 1) // 2
    thought_ranks_P = _ranks((symbols_QL[i_P] != symbols_QL[j_P]).sum(1))
    orders = [rng.permutation(questions) for _ in range(SIMILARITY_SHUFFLES)]
    examples_A = np.unique(answer_codes_Q, return_index=True)[1]
    renamed = [rng.permutation(examples_A)[answer_codes_Q] for _ in range(SIMILARITY_SHUFFLES)]
    rows = []
    for name, (distance, of_answers) in distances.items():
        value = _correlation(thought_ranks_P, _ranks(distance(i_P, j_P)))
        shuffled = [_correlation(thought_ranks_P, _ranks(distance(order[i_P], order[j_P]))) for order in (renamed if of_answers else orders)]
        null = np.array([v for v in shuffled if v is not None])
        row: dict[str, Any] = {"meaning": name, "value": value, "pairs": len(pairs)} | dict.fromkeys(("null_mean", "null_low", "null_high", "p_value"))
        if value is not None and null.size:
            low, high = np.quantile(null, [0.025, 0.975]).tolist()
            # Less the rounding: a shuffle that changes nothing counts as equal.
            as_much = int((null >= value - 1e-12).sum())
            row |= {"null_mean": float(null.mean()), "null_low": low, "null_high": high, "p_value": (1 + as_much) / (1 + null.size)}
        rows.append(row)
    return rows


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[codes]


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    if not first.size or not np.ptp(first) or not np.ptp(second):
        return None
    first, second = first - first.mean(), second - second.mean()
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


def _frequent_thoughts(thought_codes_Q, answer_codes_Q, labels, symbols_QL, present_QL, inputs_QI, correct_Q) -> list[dict[str, Any]]:
    rows = []
    _, firsts, counts = np.unique(thought_codes_Q, return_index=True, return_counts=True)
    for code in np.argsort(-counts, kind="stable")[:MAX_THOUGHTS]:
        these_Q, example = thought_codes_Q == code, firsts[code]
        by_answer = np.bincount(answer_codes_Q[these_Q])
        order = np.argsort(-by_answer, kind="stable")[: np.count_nonzero(by_answer)]
        rows.append(
            {
                "thought": symbols_QL[example][present_QL[example]].tolist(),
                "count": int(counts[code]),
                "answers": [{"answer": labels[answer], "count": int(by_answer[answer])} for answer in order],
                "accuracy": None if correct_Q is None else float(correct_Q[these_Q].mean()),
                "example_input": inputs_QI[example].tolist(),
            }
        )
    return rows


def _joint(rows_Q: np.ndarray, columns_Q: np.ndarray, row_labels: list, column_labels: list) -> dict[str, Any]:
    """How often rows occur with columns: labels and [row, column, count] entries, of the most frequent, rows in the order of their main column."""
    rows = _most_frequent(rows_Q)
    # Columns among what these rows occur with: the most frequent of all might not meet them.
    columns = np.sort(_most_frequent(columns_Q[np.isin(rows_Q, rows)]))
    counts_RC = np.array([np.bincount(columns_Q[rows_Q == row], minlength=len(column_labels))[columns] for row in rows])
    order = np.lexsort((-counts_RC.max(1), counts_RC.argmax(1)))
    entries = [[int(row), int(column), int(counts_RC[order[row], column])] for row, column in np.argwhere(counts_RC[order])]
    return {"rows": [row_labels[row] for row in rows[order]], "columns": [column_labels[column] for column in columns], "entries": entries}


def _most_frequent(codes_Q: np.ndarray) -> np.ndarray:
    counts = np.bincount(codes_Q)
    return np.argsort(-counts, kind="stable")[: min(MAX_SIDE, np.count_nonzero(counts))]


def single_figures(report: dict[str, Any]) -> dict[str, float]:
    """What of a report is one number, and no setting."""
    return {name: value for name, value in report.items() if isinstance(value, int | float) and name != "seed"}
