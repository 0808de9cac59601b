"""ThoughtTree against a brute-force oracle of explicit parent pointers."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_thinktok.tree import Branching, ThoughtTree


@dataclass
class Row:
    """One row's tree as a dictionary of nodes; nodes that are not there have no entry."""

    parents: dict[int, int | None] = field(default_factory=dict)
    hidden: dict[int, list[int]] = field(default_factory=dict)  # ancestors that a node does not see
    contents: dict[int, tuple] = field(default_factory=dict)
    speakers: dict[tuple, int] = field(default_factory=dict)  # (k, g, l): who speaks if thought g of fork k ends after l tokens
    predictors: dict[tuple, int] = field(default_factory=dict)  # (k, g, h): who predicts the h-th judged token

    def ancestors(self, node: int) -> list[int]:
        """From the root to the node itself."""
        parent = self.parents[node]
        return [*([] if parent is None else self.ancestors(parent)), node]

    def seen(self, node: int) -> list[int]:
        return [each for each in self.ancestors(node) if each not in self.hidden.get(node, [])]


def grow(documents: list[int], forks: list[int], lengths: list[list[int]], shape: Branching) -> Row:
    """Walks along the text; at each fork, along its branches."""
    row, stayed = Row(), {}
    size = shape.max_length * (2 if shape.blind else 1) + shape.lookahead - 1

    def follow(parent: int | None, node: int, content: tuple) -> int:
        row.parents[node], row.contents[node] = parent, content
        return node

    for t, document in enumerate(documents):
        if document < 0:
            continue
        first = t == 0 or documents[t - 1] != document
        follow(None if first else stayed.get(t - 1, t - 1), t, ("text", t))
        for g in range(shape.num_generations if t in forks else 0):
            k = forks.index(t)
            start, length = len(documents) + (k * shape.num_generations + g) * size, lengths[k][g]
            end = row.speakers[k, g, 0] = t
            markovian = g >= shape.num_generations - shape.markovian
            for i in range(length):
                end = follow(end, start + i, ("thought", k, g, i))
                row.hidden[end] = list(range(start, start + i)) * markovian
                row.speakers[k, g, i + 1] = end
            if shape.persistent and g == 0:
                stayed[t] = end
            if shape.blind:
                end = None
                for i in range(length):
                    end = follow(end, start + shape.max_length + i, ("thought", k, g, i))
                    row.speakers[k, g, i + 1] = end
            row.predictors[k, g, 0] = t if end is None else end
            if shape.blind and length == 0:
                continue
            for h in range(1, shape.lookahead):
                if t + h < len(documents) and documents[t + h] == document:
                    end = row.predictors[k, g, h] = follow(end, start + size - shape.lookahead + h, ("text", t + h))
                    row.hidden[end] = list(range(start, start + length - 1)) * markovian
    return row


@dataclass
class Case:
    documents: list[list[int]]
    forks: list[list[int]]
    lengths: list[list[list[int]]]
    shape: Branching
    labels: list[list[int]]

    def tree(self) -> ThoughtTree:
        forks_BK = torch.tensor(self.forks, dtype=torch.long).view(len(self.documents), -1)
        lengths_BKG = torch.tensor(self.lengths, dtype=torch.long).view(*forks_BK.shape, self.shape.num_generations)
        return ThoughtTree(torch.tensor(self.documents), forks_BK, self.shape, lengths_BKG)

    def rows(self) -> list[Row]:
        return [grow(*row, self.shape) for row in zip(self.documents, self.forks, self.lengths)]

    def judged(self, b: int, k: int) -> list[int]:
        """The labels that judge a fork, -100 where there is none."""
        documents, fork = self.documents[b], self.forks[b][k]
        places = [fork + 1 + h for h in range(self.shape.lookahead)]
        return [self.labels[b][t] if fork >= 0 and t < len(documents) and documents[t] == documents[fork] else -100 for t in places]


@st.composite
def cases(draw) -> Case:
    batch, trunk, num_forks = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(0, 3))
    flags = {"blind": draw(st.booleans()), "persistent": draw(st.booleans())}
    groups = draw(st.integers(1, 3))
    markovian = 0 if flags["blind"] else draw(st.integers(0, groups - 1))
    shape = Branching(groups, draw(st.integers(1, 3)), draw(st.integers(1, trunk + 2)), **flags, markovian=markovian)
    documents, forks = [], []
    for b in range(batch):
        real = draw(st.integers(1 if b == 0 else 0, trunk))
        breaks = draw(st.lists(st.booleans(), min_size=real, max_size=real))
        # Ids count up within a row, as a collator's do, but start anywhere: only equality may matter.
        base = draw(st.integers(0, 5))
        ids = [base + sum(breaks[: t + 1]) for t in range(real)]
        documents.append(ids + [-1] * (trunk - real))
        there = sorted(draw(st.sets(st.integers(0, real - 1), max_size=num_forks))) if real and num_forks else []
        forks.append(there + [-1] * (num_forks - len(there)))
    length = st.integers(0, shape.max_length)
    lengths = [[[draw(length) for _ in range(shape.num_generations)] for _ in range(num_forks)] for _ in range(batch)]
    labels = [[100 * b + t if draw(st.booleans()) else -100 for t in range(trunk)] for b in range(batch)]
    return Case(documents, forks, lengths, shape, labels)


def examples(*others: st.SearchStrategy):
    """Runs a test on random trees."""
    return lambda test: settings(deadline=None, max_examples=150)(given(cases(), *others)(test))


@examples()
def test_a_node_sees_its_ancestors_and_itself(case):
    tree = case.tree()
    visible_BSS = tree.visible()
    assert visible_BSS.shape == (len(case.documents), tree.num_nodes, tree.num_nodes)
    for b, row in enumerate(case.rows()):
        assert tree.valid_BS[b].nonzero().flatten().tolist() == sorted(row.parents)
        for node in range(tree.num_nodes):
            seen = sorted(row.seen(node)) if node in row.parents else [node]
            assert visible_BSS[b, node].nonzero().flatten().tolist() == seen


@examples()
def test_positions_count_ancestors(case):
    position_ids_BS = case.tree().position_ids_BS
    assert (position_ids_BS >= 0).all()
    for b, row in enumerate(case.rows()):
        assert {node: position_ids_BS[b, node].item() for node in row.parents} == {node: len(row.ancestors(node)) - 1 for node in row.parents}


@examples()
def test_nodes_that_are_not_there_need_no_longer_position_table(case):
    # Learned positions end somewhere: a lookahead past the end of the text must not ask for a position that no real node has.
    tree = case.tree()
    assert tree.position_ids_BS.max() <= max(torch.where(tree.valid_BS, tree.position_ids_BS, 0).max(), tree.trunk_length - 1)


@examples(st.data())
def test_parts_of_the_mask_are_slices_of_it(case, data):
    tree = case.tree()
    num_queries, num_keys = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    some = lambda size: st.lists(st.integers(0, tree.num_nodes - 1), min_size=size, max_size=size)
    queries_BQ = torch.tensor([data.draw(some(num_queries)) for _ in case.documents])
    keys_BC = torch.tensor([data.draw(some(num_keys)) for _ in case.documents])
    dense_BSS = tree.visible()
    rows_B11 = torch.arange(len(dense_BSS))[:, None, None]
    assert torch.equal(tree.visible(queries_BQ, keys_BC), dense_BSS[rows_B11, queries_BQ[:, :, None], keys_BC[:, None, :]])
    assert torch.equal(tree.visible(queries_BQ), dense_BSS[rows_B11[:, 0], queries_BQ])
    assert torch.equal(tree.visible(None, keys_BC), dense_BSS.mT[rows_B11[:, 0], keys_BC].mT)


@examples()
def test_every_node_holds_its_token(case):
    tree = case.tree()
    batch, trunk = len(case.documents), tree.trunk_length
    tokens_BT = torch.arange(batch * trunk).view(batch, trunk)
    thoughts_BKGL = 1000 + torch.arange(batch * tree.num_forks * case.shape.num_generations * case.shape.max_length)
    thoughts_BKGL = thoughts_BKGL.view(batch, tree.num_forks, case.shape.num_generations, case.shape.max_length)
    tokens_BS = tree.tokens(tokens_BT, thoughts_BKGL)
    assert tokens_BS.shape == (batch, tree.num_nodes)
    for b, row in enumerate(case.rows()):
        expected = {node: (tokens_BT if kind == "text" else thoughts_BKGL)[b][tuple(place)].item() for node, (kind, *place) in row.contents.items()}
        assert {node: tokens_BS[b, node].item() for node in row.contents} == expected


@examples()
def test_who_thinks_speaks_and_predicts(case):
    tree, shape = case.tree(), case.shape
    prefixes, speakers, predictors = tree.prefixes(), tree.speakers(), tree.predictors()
    shape_BKG = (len(case.documents), tree.num_forks, shape.num_generations)
    assert prefixes.shape == speakers.shape == (*shape_BKG, shape.max_length + 1)
    assert predictors.shape == (*shape_BKG, shape.lookahead)
    for nodes in (prefixes, speakers, predictors):  # also for forks that are not there: all of them are gathered
        assert ((nodes >= 0) & (nodes < tree.num_nodes)).all()
    for b, row in enumerate(case.rows()):
        for (k, g, length), speaker in row.speakers.items():
            prefix = case.forks[b][k] if length == 0 else next(n for n, content in sorted(row.contents.items()) if content == ("thought", k, g, length - 1))
            assert prefixes[b, k, g, length] == prefix
            if not (shape.blind and length == 0):
                assert speakers[b, k, g, length] == speaker
        for (k, g, h), predictor in row.predictors.items():
            assert predictors[b, k, g, h] == predictor


@examples()
def test_judged_tokens_are_the_next_of_the_document(case):
    tree, labels_BT = case.tree(), torch.tensor(case.labels)
    places_BKH, targets_BKH = tree.judged(labels_BT)
    assert ((places_BKH >= 0) & (places_BKH < tree.trunk_length)).all()
    for b in range(len(labels_BT)):
        for k in range(tree.num_forks):
            assert targets_BKH[b, k].tolist() == case.judged(b, k)
            assert (targets_BKH[b, k] == labels_BT[b, places_BKH[b, k]])[targets_BKH[b, k] >= 0].all()


@examples(st.booleans())
def test_targets_are_the_true_next_tokens(case, every_prefix):
    tree, labels_BT = case.tree(), torch.tensor(case.labels)
    targets_BS = tree.targets(labels_BT, every_prefix)
    for b, row in enumerate(case.rows()):
        documents = [*case.documents[b], -1]
        trunk = [labels_BT[b, t + 1].item() if documents[t] >= 0 and documents[t] == documents[t + 1] else -100 for t in range(tree.trunk_length)]
        assert targets_BS[b, : tree.trunk_length].tolist() == trunk
        expected = {node: -100 for node in row.parents if node >= tree.trunk_length}
        for (k, g, length), node in row.speakers.items():
            if node in expected and (every_prefix or length == case.lengths[b][k][g]):
                expected[node] = case.judged(b, k)[0]
        for (k, _, h), node in row.predictors.items():
            if node in expected:
                expected[node] = case.judged(b, k)[h]
        assert {node: targets_BS[b, node].item() for node in expected} == expected


@examples()
def test_paths_are_the_leaves_ancestors_in_order(case):
    case.shape = replace(case.shape, markovian=0)
    tree = case.tree()
    rows_R, nodes_RP, where_BS = tree.paths()
    oracles, leaves = case.rows(), set()
    for r, (b, nodes) in enumerate(zip(rows_R.tolist(), nodes_RP.tolist())):
        path = [node for node in nodes if node >= 0]
        assert nodes == path + [-1] * (len(nodes) - len(path))
        assert path == oracles[b].ancestors(path[-1]), f"path {r}"
        leaves.add((b, path[-1]))
    inner = {(b, parent) for b, row in enumerate(oracles) for parent in row.parents.values()}
    assert len(leaves) == len(rows_R)
    assert leaves == {(b, node) for b, row in enumerate(oracles) for node in row.parents} - inner
    assert ((where_BS >= 0) & (where_BS < max(nodes_RP.numel(), 1))).all()
    for b, row in enumerate(oracles):
        for node in row.parents:
            assert nodes_RP.flatten()[where_BS[b, node]] == node
            assert rows_R[where_BS[b, node] // nodes_RP.shape[1]] == b


@examples()
def test_lengths_are_full_unless_given(case):
    case.lengths = [[[case.shape.max_length] * case.shape.num_generations for _ in row] for row in case.forks]
    forks_BK = torch.tensor(case.forks, dtype=torch.long).view(len(case.documents), -1)
    tree = ThoughtTree(torch.tensor(case.documents), forks_BK, case.shape)
    assert torch.equal(tree.visible(), case.tree().visible())
    assert torch.equal(tree.lengths_BKG, case.tree().lengths_BKG)
    assert torch.equal(tree.valid_BS, case.tree().valid_BS)


@examples()
def test_branch_nodes_lie_at_one_depth(case):
    tree, shape = case.tree(), case.shape
    depths = [tree.branch_nodes(depth).tolist() for depth in range(1, shape.width + 1)]
    assert sorted(sum(depths, [])) == list(range(tree.trunk_length, tree.num_nodes))
    for row in case.rows():
        for node, (kind, *place) in row.contents.items():
            if kind == "thought" and (node - tree.trunk_length) % shape.width < shape.max_length:
                k, g, i = place
                assert depths[i][k * shape.num_generations + g] == node


@pytest.mark.parametrize("persistent", [False, True])
def test_without_forks_the_tree_is_the_packed_text(persistent):
    documents_BT = torch.tensor([[4, 4, 4, 7, 7, -1]])
    tree = ThoughtTree(documents_BT, torch.empty(1, 0, dtype=torch.long), Branching(4, 3, 5, persistent=persistent))
    labels_BT = torch.tensor([[10, 11, 12, 13, 14, -100]])
    assert tree.num_nodes == 6
    assert tree.position_ids_BS.tolist() == [[0, 1, 2, 0, 1, *tree.position_ids_BS[0, 5:].tolist()]]
    assert tree.targets(labels_BT, every_prefix=True).tolist() == [[11, 12, -100, 14, -100, -100]]
    assert tree.tokens(labels_BT, torch.empty(1, 0, 4, 3, dtype=torch.long)).tolist() == labels_BT.tolist()
    causal_TT = torch.ones(6, 6, dtype=torch.bool).tril()
    same_TT = (documents_BT[0][:, None] == documents_BT[0]) & (documents_BT[0] >= 0)
    assert torch.equal(tree.visible()[0], (causal_TT & same_TT) | torch.eye(6, dtype=torch.bool))
    assert tree.predictors().shape == (1, 0, 4, 5)
    assert tree.prefixes().shape == tree.speakers().shape == (1, 0, 4, 4)
    assert tree.branch_nodes(1).tolist() == []
    rows_R, nodes_RP, _ = tree.paths()
    assert rows_R.tolist() == [0, 0]
    assert nodes_RP.tolist() == [[0, 1, 2], [3, 4, -1]]


def test_a_persistent_thought_shifts_what_follows_in_its_document():
    documents_BT = torch.tensor([[0, 0, 0, 1, 1]])
    tree = ThoughtTree(documents_BT, torch.tensor([[0, 3]]), Branching(2, 2, 1, persistent=True), torch.tensor([[[2, 1], [1, 2]]]))
    assert tree.position_ids_BS[0, :5].tolist() == [0, 3, 4, 0, 2]
    first, second = tree.branch_nodes(1).tolist()[:2]
    visible_SS = tree.visible()[0]
    assert visible_SS[1, first]
    assert visible_SS[2, first + 1]
    assert not visible_SS[1, second]  # only the first thought of a fork stays
    assert not visible_SS[4, first]  # and only in its own document
