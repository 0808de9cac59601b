"""ThoughtTree: a text row and its thoughts as one tree of tokens.

The trunk is a row of ordinary text. At each of K forks grow G branches: a thought of up to L tokens, then the lookahead, the real tokens that
judge it. One sentence is the attention mask: *a node sees its ancestors and itself*. It is evaluated as a predicate on small per-node tables
(document, trunk position, branch, depth), never stored as parent pointers, so any part of the mask can be made for any nodes.

Whatever the variant, the ancestors of a node, in the order of their positions, are an ordinary row of tokens at positions 0, 1, 2, ...
The replicated path and the tests rest on that invariant.

Variants are edits of the predicate:

- **Packing**: a node sees its own document only.
- **blind**: the branch reads its thought again, at positions from 0 and without the text (*reading* nodes), and only these predict. That
  the thought nodes themselves are hidden from them is on purpose: their keys and values were computed from the text.
- **memory: persistent**: the first thought of each fork stays in the text; whatever comes later in the document sees it, as in
  ordinary generation. With `none` a thought is forgotten once a real token follows.
- **markovian**: the last branches of each fork see of their own thought its latest token alone, which therefore has to stand for all of it. Their
  ancestors are a row with a gap: the one exception to the invariant, and only the packed tree can run it.

Shape suffixes: B rows, T trunk tokens, K forks, G thoughts per fork, L thinking tokens, H judged real tokens, W nodes per branch,
S = T + K*G*W nodes, Q query nodes, C key nodes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TRUNK = -1

# Thoughts of a row that are drawn at a time: as many as keep a large GPU busy. Keys and values of more would be at hand for nothing.
MOST_BRANCHES = 512


@dataclass(frozen=True)
class Branching:
    """The fixed numbers and variants of a tree."""

    num_generations: int
    max_length: int
    lookahead: int
    blind: bool = False
    persistent: bool = False
    markovian: int = 0

    @property
    def num_reading(self) -> int:
        """Nodes after the thought: the lookahead (one judged token needs none), and under `blind` the thought read again."""
        return self.lookahead - 1 + (self.max_length if self.blind else 0)

    @property
    def width(self) -> int:
        return self.max_length + self.num_reading

    def forks_at_once(self, num_forks: int) -> int:
        """At so many forks of a row thoughts are drawn at a time: one after the other where they stay in the text, else in parts of about equal size."""
        if self.persistent:
            return 1
        parts = -(-num_forks * self.num_generations // MOST_BRANCHES)
        return -(-num_forks // max(parts, 1))

    def num_decoded(self, trunk_length: int, num_forks: int) -> int:
        """Nodes of a row that a rollout has at hand at most: the text, and of the thoughts drawn at a time all tokens but the last, which nothing is drawn
        from."""
        return trunk_length + self.forks_at_once(num_forks) * self.num_generations * (self.max_length - 1)


def before(values_BT: Tensor, places_BKH: Tensor) -> Tensor:
    """What stands at the token before each place: its prediction of it. Before the first token, which nothing judges, that one's own."""
    return values_BT.gather(1, (places_BKH - 1).clamp(min=0).flatten(1)).view_as(places_BKH)


def document_ends(documents_BT: Tensor) -> Tensor:
    """Which tokens are the last of their document, `[B, T]` bool."""
    return torch.cat([documents_BT[:, 1:] != documents_BT[:, :-1], documents_BT.new_ones(len(documents_BT), 1, dtype=torch.bool)], 1)


def next_labels(labels_BT: Tensor, documents_BT: Tensor) -> Tensor:
    """The label of the token after each one, `[B, T]`; -100 at a document's end and in padding."""
    return torch.where(document_ends(documents_BT) | (documents_BT < 0), -100, labels_BT.roll(-1, 1))


def document_positions(documents_BT: Tensor) -> Tensor:
    """How many tokens of its document are before each token, `[B, T]`."""
    time_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    starts_BT = document_ends(documents_BT).roll(1, 1)
    return time_T - torch.where(starts_BT, time_T, 0).cummax(1).values


def document_lengths(documents_BT: Tensor) -> Tensor:
    """How many tokens each token's document has, `[B, T]`."""
    time_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    end_BT = torch.where(document_ends(documents_BT), time_T, documents_BT.shape[1]).flip(1).cummin(1).values.flip(1)
    return end_BT - time_T + document_positions(documents_BT) + 1


class ThoughtTree:
    """Layout of a batch of rows with thoughts. Pure tensors: it knows no model.

    Nodes are the T trunk tokens, then the branches in the order `[K, G, W]`, where W is L thought nodes and then the reading nodes.

    Args:
        documents_BT: which document each trunk token belongs to; -1 is padding. Documents are contiguous.
        forks_BK: trunk positions after which the model may think, ascending; -1 for a fork that is not there.
        branching: G, L, H and the variants.
        lengths_BKG: thinking tokens of each thought, 0 to L; `None` means L.
    """

    def __init__(self, documents_BT: Tensor, forks_BK: Tensor, branching: Branching, lengths_BKG: Tensor | None = None):
        device = documents_BT.device
        batch, trunk_length = documents_BT.shape
        num_forks, shape = forks_BK.shape[1], branching
        groups, length, width = shape.num_generations, shape.max_length, shape.width
        self.branching, self.documents_BT, self.forks_BK = branching, documents_BT, forks_BK
        self.trunk_length, self.num_forks = trunk_length, num_forks
        self.num_nodes = trunk_length + num_forks * groups * width
        if lengths_BKG is None:
            lengths_BKG = torch.full((batch, num_forks, groups), length, device=device)
        self.fork_valid_BK = forks_BK >= 0
        self.lengths_BKG = lengths_BKG * self.fork_valid_BK[:, :, None]
        fork_BK1 = forks_BK.clamp(min=0)
        time_T = torch.arange(trunk_length, device=device)

        # Positions count the tokens before a node in its own row: earlier ones of its document, and thoughts that stayed in the text.
        trunk_positions_BT = document_positions(documents_BT)
        if shape.persistent:
            start_BT = time_T - trunk_positions_BT
            stayed_BT = torch.zeros_like(documents_BT).scatter_add_(1, fork_BK1, self.lengths_BKG[:, :, 0])
            before_BT = stayed_BT.cumsum(1) - stayed_BT
            trunk_positions_BT = trunk_positions_BT + before_BT - before_BT.gather(1, start_BT)

        # Under `blind` the rereading comes behind the thought, from position 0 on; it covers the thought's length and skips the rest.
        depth_W, blind = torch.arange(1, width + 1, device=device), int(shape.blind)
        thinking_W, reading_W = depth_W <= length, depth_W - length
        rereads_W, ahead_W = ~thinking_W & (reading_W <= blind * length), reading_W - blind * length
        lengths_BKG1, fork_position_BK11 = self.lengths_BKG[..., None], trunk_positions_BT.gather(1, fork_BK1)[:, :, None, None]
        place_BKGW = torch.where(rereads_W, reading_W - 1, lengths_BKG1 - blind + ahead_W)
        positions_BKGW = fork_position_BK11 * (thinking_W | (not shape.blind)) + torch.where(thinking_W, depth_W, place_BKGW)
        alive_BKGW = torch.where(thinking_W, depth_W, torch.where(rereads_W, reading_W, blind)) <= lengths_BKG1

        # A lookahead node holds the true token after its fork, as long as the document goes on.
        ahead_BKW = fork_BK1[:, :, None] + ahead_W
        in_row_BKW = ahead_BKW < trunk_length
        document_BK = documents_BT.gather(1, fork_BK1)
        same_BKW = documents_BT.gather(1, ahead_BKW.clamp(0, trunk_length - 1).flatten(1)).view_as(ahead_BKW) == document_BK[:, :, None]
        looks_ahead_W = ~thinking_W & ~rereads_W
        alive_BKGW = alive_BKGW & (~looks_ahead_W | (in_row_BKW & same_BKW))[:, :, None] & self.fork_valid_BK[:, :, None, None]

        def nodes(trunk_BT: Tensor, branch_BKGW: Tensor) -> Tensor:
            return torch.cat([trunk_BT.expand(batch, trunk_length), branch_BKGW.expand(batch, num_forks, groups, width).flatten(1)], 1)

        none = torch.zeros((), dtype=torch.long, device=device)
        branch_KG = torch.arange(num_forks * groups, device=device).view(1, num_forks, groups, 1)
        stays_KG = (torch.arange(groups, device=device) == 0).view(1, 1, groups, 1) & shape.persistent
        self.position_ids_BS = nodes(trunk_positions_BT, torch.where(alive_BKGW, positions_BKGW, 0))
        # The tables behind the predicate. `anchor` is how far along the trunk a node sees; -1 is not at all.
        self._document_BS = nodes(documents_BT, document_BK[:, :, None, None])
        self._anchor_BS = nodes(time_T, torch.where(thinking_W | (not shape.blind), fork_BK1[:, :, None, None], TRUNK))
        self._branch_BS = nodes(none - 1, branch_KG)
        self._depth_BS = nodes(none, depth_W)
        self._reading_BS = nodes(none.bool(), ~thinking_W & shape.blind)
        self._stays_BS = nodes(none.bool(), stays_KG & thinking_W)
        if shape.markovian:  # the depth from which a node sees its own branch
            markovian_KG = (torch.arange(groups, device=device) >= groups - shape.markovian).view(1, 1, groups, 1)
            self._since_BS = nodes(none, torch.where(thinking_W, depth_W, lengths_BKG1) * markovian_KG)
        self.valid_BS = nodes(documents_BT >= 0, alive_BKGW)
        # Where the token of each node comes from: a trunk position, or for a thought -1 - (its place in [K, G, L]).
        thought_KGW = (branch_KG * length + torch.where(thinking_W, depth_W - 1, (reading_W - 1).clamp(0, length - 1))).expand(1, num_forks, groups, width)
        source_BKGW = torch.where(looks_ahead_W, ahead_BKW.clamp(0, trunk_length - 1)[:, :, None], -1 - thought_KGW)
        self._source_BS = nodes(time_T, source_BKGW)

    def visible(self, queries_BQ: Tensor | None = None, keys_BC: Tensor | None = None) -> Tensor:
        """Who sees whom, `[B, Q, C]` bool: ancestors and itself. `None` means all nodes in order."""

        def table(values_BS: Tensor, nodes: Tensor | None) -> Tensor:
            return values_BS if nodes is None else values_BS.gather(1, nodes)

        def query(values_BS: Tensor) -> Tensor:
            return table(values_BS, queries_BQ)[:, :, None]

        def key(values_BS: Tensor) -> Tensor:
            return table(values_BS, keys_BC)[:, None, :]

        index_BS = torch.arange(self.num_nodes, device=self.valid_BS.device).expand_as(self.valid_BS)
        anchor = query(self._anchor_BS)
        in_trunk = (key(self._branch_BS) == TRUNK) & (key(index_BS) <= anchor)
        in_branch = (key(self._branch_BS) == query(self._branch_BS)) & (query(self._branch_BS) != TRUNK) & (key(self._depth_BS) <= query(self._depth_BS))
        in_branch &= key(self._reading_BS) == query(self._reading_BS)
        if self.branching.markovian:
            in_branch &= key(self._depth_BS) >= query(self._since_BS)
        ancestor = in_trunk | in_branch
        if self.branching.persistent:
            # A key in a branch carries its fork's position as its anchor.
            ancestor |= key(self._stays_BS) & (key(self._anchor_BS) < anchor)
        ancestor &= (key(self._document_BS) == query(self._document_BS)) & key(self.valid_BS) & query(self.valid_BS)
        return ancestor | (query(index_BS) == key(index_BS))

    def is_text(self, nodes_Q: Tensor | None = None) -> bool:
        """Whether these nodes are rows of one document each from their begin on, and no thought."""
        if self.num_forks or (nodes_Q is not None and len(nodes_Q) < self.trunk_length):
            return False
        places_T = torch.arange(self.trunk_length, device=self.valid_BS.device)
        return bool(((self.position_ids_BS == places_T) | ~self.valid_BS).all())

    def num_visible(self) -> Tensor:
        """How many nodes each one sees, `[B, S]`: at position p it is p others and itself, but for those of its thought that are hidden from it."""
        hidden_BS = (self._since_BS - 1).clamp(min=0) if self.branching.markovian else 0
        return self.position_ids_BS + 1 - hidden_BS

    def tokens(self, tokens_BT: Tensor, thoughts_BKGL: Tensor) -> Tensor:
        """The token of every node, `[B, S]`."""
        pool = torch.cat([tokens_BT, thoughts_BKGL.flatten(1)], 1)
        source = self._source_BS
        return pool.gather(1, torch.where(source >= 0, source, self.trunk_length - 1 - source))

    def branch_nodes(self, depth: int) -> Tensor:
        """Node indices at one depth (from 1) of every branch, `[K*G]`."""
        return self._branches() + depth - 1

    def _branches(self) -> Tensor:
        """The first node of every branch, `[K*G]`."""
        branches = torch.arange(self.num_forks * self.branching.num_generations, device=self.valid_BS.device)
        return self.trunk_length + branches * self.branching.width

    def nodes_up_to(self, depth: int) -> Tensor:
        """The text and the first so many nodes of every branch, `[Q]`."""
        text_T = torch.arange(self.trunk_length, device=self.valid_BS.device)
        return torch.cat([text_T, (self._branches()[:, None] + torch.arange(depth, device=text_T.device)).flatten()])

    @property
    def thinker_nodes(self) -> Tensor:
        """The nodes that whoever only thinks has to read: the text and the thoughts, `[Q]`."""
        return self.nodes_up_to(self.branching.max_length)

    @property
    def speaker_nodes(self) -> Tensor:
        """The nodes that whoever only speaks reads, and can predict at: all, under `blind` the rereading alone, `[Q]`."""
        if not self.branching.blind:
            return torch.arange(self.num_nodes, device=self.valid_BS.device)
        reading = torch.arange(self.branching.max_length, self.branching.width, device=self.valid_BS.device)
        return (self._branches()[:, None] + reading).flatten()

    def prefixes(self) -> Tensor:
        """The node that ends each thought prefix z_1..z_l, `[B, K, G, L+1]`; l = 0 is the fork itself."""
        groups, length = self.branching.num_generations, self.branching.max_length
        fork_BKG1 = self.forks_BK.clamp(min=0)[:, :, None, None].expand(-1, -1, groups, 1)
        branches_KGL = self._branches().view(1, self.num_forks, groups, 1) + torch.arange(length, device=fork_BKG1.device)
        return torch.cat([fork_BKG1, branches_KGL.expand(len(fork_BKG1), -1, -1, -1)], -1)

    def speakers(self) -> Tensor:
        """The node that would speak if the thought ended after l tokens, `[B, K, G, L+1]`. Under `blind` it is the rereading, and l = 0 does not exist."""
        prefixes = self.prefixes()
        if self.branching.blind:
            prefixes[..., 1:] += self.branching.max_length
        return prefixes

    def predictors(self) -> Tensor:
        """The node that predicts each of the H judged tokens after each thought, `[B, K, G, H]`."""
        first_BKG1 = self.speakers().gather(3, self.lengths_BKG[..., None])
        groups, ahead = self.branching.num_generations, self.branching.lookahead - 1
        lookahead_KGH = self._branches().view(1, self.num_forks, groups, 1) + self.branching.width - ahead + torch.arange(ahead, device=first_BKG1.device)
        return torch.cat([first_BKG1, lookahead_KGH.expand(len(first_BKG1), -1, -1, -1)], -1)

    def judged(self, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The real tokens that judge each fork: trunk positions, and labels, `[B, K, H]` both.

        The label is -100 where the token is not in the row, not in the fork's document, or carries none.
        """
        places_BKH = self.forks_BK.clamp(min=0)[:, :, None] + torch.arange(1, self.branching.lookahead + 1, device=labels_BT.device)
        inside_BKH = places_BKH < self.trunk_length
        places_BKH = places_BKH.clamp(max=self.trunk_length - 1)
        flat = places_BKH.flatten(1)
        document_BK = self.documents_BT.gather(1, self.forks_BK.clamp(min=0))
        same_BKH = self.documents_BT.gather(1, flat).view_as(places_BKH) == document_BK[:, :, None]
        labels_BKH = labels_BT.gather(1, flat).view_as(places_BKH)
        return places_BKH, torch.where(inside_BKH & same_BKH & (labels_BKH >= 0) & self.fork_valid_BK[:, :, None], labels_BKH, -100)

    def judging_labels(self, labels_BT: Tensor) -> Tensor:
        """The labels of tokens that judge a fork, `[B, T]`, -100 elsewhere: what has to be scored where the text itself is of no interest."""
        judges_BT = torch.zeros_like(labels_BT, dtype=torch.bool).scatter_(1, self.judged(labels_BT)[0].flatten(1), True)
        return torch.where(judges_BT, labels_BT, -100)

    def evaluated_labels(self, labels_BT: Tensor) -> Tensor:
        """What an evaluation scores of this tree, `[B, T]`: all of the text, which sees no thoughts; where they stay in it, what judges them."""
        return self.judging_labels(labels_BT) if self.branching.persistent else labels_BT

    def targets(self, labels_BT: Tensor, every_prefix: bool = False) -> Tensor:
        """The true next token of every node, `[B, S]`, -100 where there is none.

        Args:
            every_prefix: also judge the nodes that would speak if the thought ended early.
        """
        targets_BS = torch.full_like(self.position_ids_BS, -100)
        targets_BS[:, : self.trunk_length] = next_labels(labels_BT, self.documents_BT)
        targets_BKH = self.judged(labels_BT)[1]

        def judge(nodes_BKGX: Tensor, targets_BKX: Tensor) -> None:
            # A fork that is not there points at node 0, and a thought of length 0 at its fork: the trunk's own targets stand.
            targets_BKGX = targets_BKX[:, :, None].expand_as(nodes_BKGX)
            kept = torch.where(nodes_BKGX < self.trunk_length, targets_BS.gather(1, nodes_BKGX.flatten(1)).view_as(nodes_BKGX), targets_BKGX)
            targets_BS.scatter_(1, nodes_BKGX.flatten(1), kept.flatten(1))

        if every_prefix:
            judge(self.speakers(), targets_BKH[:, :, :1].expand(-1, -1, self.branching.max_length + 1))
        judge(self.predictors(), targets_BKH)
        return targets_BS

    def paths(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tree as ordinary rows: one for each node that no other sees.

        Returns:
            rows_R: the batch row of each path.
            nodes_RP: the path's nodes in order, -1 behind its end.
            where_BS: for each node, `path * P + place` of one path it lies on (0 for nodes on none).
        """
        visible_BSS = self.visible()
        is_leaf_BS = self.valid_BS & (visible_BSS.sum(1) == 1)
        rows_R, leaves_R = is_leaf_BS.nonzero(as_tuple=True)
        member_RS = visible_BSS[rows_R, leaves_R]
        positions_RS = self.position_ids_BS[rows_R]
        longest = int(torch.where(member_RS, positions_RS + 1, 0).max())
        index_RS = torch.arange(self.num_nodes, device=member_RS.device).expand_as(member_RS)
        nodes_RP = torch.full((len(rows_R), longest + 1), -1, device=member_RS.device)
        nodes_RP.scatter_(1, torch.where(member_RS, positions_RS, longest), torch.where(member_RS, index_RS, -1))
        nodes_RP = nodes_RP[:, :longest]
        place_RS = torch.arange(len(rows_R), device=member_RS.device)[:, None] * longest + positions_RS
        row_RS = rows_R[:, None].expand_as(place_RS)
        where_BS = torch.zeros_like(self.position_ids_BS).scatter_reduce_(0, row_RS, torch.where(member_RS, place_RS, 0), "amax")
        return rows_R, nodes_RP, where_BS
