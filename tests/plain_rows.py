"""The oracle of every engine: a plain loop over ordinary rows, through the architecture's own forward and full logits."""

import torch
from models import tiny_model, tiny_tokenizer
from torch import Tensor

from hf_thinktok import add_thinking_tokens
from hf_thinktok.head import HeadInputs, HeadOutputs, attach_head
from hf_thinktok.rollout import Rollout, Sampling, sample_thoughts
from hf_thinktok.tree import Branching, ThoughtTree

T = 24


def thinker(family: str = "llama", attn: str = "sdpa", dtype: torch.dtype = torch.float32, scale: float = 2.0, **changes):
    """A tiny model with so many thinking tokens, their rows like those of real ones, that it starts and stops thinking now and then."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, attn, scale=scale, **changes)
    vocabulary = add_thinking_tokens(model, tokenizer, 160)
    with torch.no_grad():
        for rows in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            rows[vocabulary.ids] = torch.randn(160, rows.shape[1], generator=torch.Generator().manual_seed(1)) * rows[: vocabulary.first_id].std()
    model.to(dtype)
    attach_head(model, vocabulary)
    return model, vocabulary


class Text:
    """Two rows, forks on them (one is not there) and random thoughts of random lengths."""

    def __init__(self, vocabulary, packed: bool, shape: Branching, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.documents_BT = torch.tensor([[0] * 10 + [1] * 9 + [-1] * 5, [0] * 4 + [1] * 20] if packed else [[0] * T, [0] * T])
        self.tokens_BT = torch.randint(vocabulary.num_real, (2, T), generator=generator)
        self.labels_BT = torch.where(self.documents_BT >= 0, self.tokens_BT, -100)
        self.forks_BK = torch.tensor([[3, 9, 14], [0, 16, -1]])
        shape_BKG = (2, 3, shape.num_generations)
        self.lengths_BKG = torch.randint(shape.max_length + 1, shape_BKG, generator=generator)
        self.thoughts_BKGL = vocabulary.first_id + torch.randint(vocabulary.num_tokens, (*shape_BKG, shape.max_length), generator=generator)

    def tree(self) -> ThoughtTree:
        return ThoughtTree(self.documents_BT, self.forks_BK, self.shape, self.lengths_BKG)

    def scores(self, engine, model) -> HeadOutputs:
        """An engine's outputs for all nodes."""
        tree = self.tree()
        targets_M = tree.targets(self.labels_BT).flatten()
        return engine(model, tree, tree.tokens(self.tokens_BT, self.thoughts_BKGL), HeadInputs(torch.arange(len(targets_M)), targets_M, entropy=True))

    def think_logits(self, out: HeadOutputs) -> Tensor:
        """The logits that every thinking token was drawn from, `[B, K, G, L, N]`."""
        tree = self.tree()
        return out.think_logits_MN.view(2, tree.num_nodes, -1)[torch.arange(2)[:, None, None, None], tree.prefixes()[..., :-1]]

    def rows(self):
        """Every document and every branch as an ordinary row: batch row, token ids, their positions, and the tree's nodes, `None` for those of another row.

        A markovian branch is a row for each of its tokens, in which all others of the thought are missing.
        """
        shape = self.shape
        for b, (documents, tokens, forks) in enumerate(zip(self.documents_BT.tolist(), self.tokens_BT.tolist(), self.forks_BK.tolist())):
            for document in {*documents} - {-1}:
                ids, nodes = [], []
                for t in [t for t in range(T) if documents[t] == document]:
                    ids, nodes = [*ids, tokens[t]], [*nodes, t]
                    if t not in forks:
                        continue
                    k = forks.index(t)
                    stays = []
                    for g in range(shape.num_generations):
                        first = T + (k * shape.num_generations + g) * shape.width
                        length = self.lengths_BKG[b, k, g].item()
                        thought = self.thoughts_BKGL[b, k, g, :length].tolist()
                        ahead = [t + h for h in range(1, shape.lookahead) if t + h < T and documents[t + h] == document]
                        thought_nodes = list(range(first, first + length))
                        read_nodes = list(range(first + shape.max_length, first + shape.max_length + length)) if shape.blind else []
                        ahead_nodes = [first + shape.width - shape.lookahead + h for h in range(1, len(ahead) + 1)]
                        ahead_ids = [tokens[place] for place in ahead]
                        unknown = [None] * len(ids)
                        if shape.blind:
                            yield b, ids + thought, range(len(ids) + length), unknown + thought_nodes
                            if length:
                                yield b, thought + ahead_ids, range(length + len(ahead)), read_nodes + ahead_nodes
                        elif g >= shape.num_generations - shape.markovian and length:
                            for i in range(length):
                                follow = ahead_ids if i == length - 1 else []
                                places = [*range(len(ids)), *range(len(ids) + i, len(ids) + i + len(follow) + 1)]
                                yield b, [*ids, thought[i], *follow], places, [*unknown, thought_nodes[i], *ahead_nodes[: len(follow)]]
                        else:
                            yield b, ids + thought + ahead_ids, range(len(ids) + length + len(ahead)), unknown + thought_nodes + ahead_nodes
                        if g == 0 and shape.persistent:
                            stays = thought
                    ids, nodes = ids + stays, nodes + [None] * len(stays)
                yield b, ids, range(len(ids)), nodes

    def check(self, out: HeadOutputs, model, vocabulary, tolerance: float = 1e-4) -> None:
        """Compares scores with a plain loop over `rows`, through the architecture's own forward and full logits."""
        tree = self.tree()
        num_nodes, targets_BS, seen = tree.num_nodes, tree.targets(self.labels_BT), set()
        for b, ids, positions, nodes in self.rows():
            given = {}  # some models take no positions
            if list(positions) != list(range(len(ids))):  # a row with a gap is two rows to transformers, without a mask
                given = {"position_ids": torch.tensor([positions]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            logits_PR = type(model).forward(model, input_ids=torch.tensor([ids]), use_cache=False, **given).logits[0].float()
            here = [(place, node) for place, node in enumerate(nodes) if node is not None]
            if not here:
                continue
            places, nodes = torch.tensor(here).T
            real, think = logits_PR[places, : vocabulary.first_id], logits_PR[places, vocabulary.first_id : vocabulary.guard_id]
            logps, targets, flat = real.log_softmax(-1), targets_BS[b, nodes], b * num_nodes + nodes
            judged = targets >= 0
            target_logps = torch.where(judged, logps.gather(1, targets.clamp(min=0)[:, None])[:, 0], 0.0)
            close(out.target_logps_M[flat], target_logps, tolerance)
            close(out.log_z_real_M[flat], real.logsumexp(-1), tolerance)
            close(out.think_logits_MN[flat], think, tolerance)
            close(out.gate_logit_M[flat], think.logsumexp(-1) - real.logsumexp(-1), tolerance)
            close(out.entropy_M[flat], -(logps.exp() * logps).sum(-1), tolerance)
            assert torch.equal(out.correct_M[flat], judged & (logps.argmax(-1) == targets))
            seen |= {(b, node) for node in nodes.tolist()}
        assert seen == {tuple(place) for place in tree.valid_BS.nonzero().tolist()}


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0.0)


def sample(each, model, vocabulary, text: Text, sampling: Sampling, seed: int = 0) -> Rollout:
    """Thoughts that an engine draws on a text."""
    generator = torch.Generator().manual_seed(seed)
    return sample_thoughts(each, model, text.tokens_BT, text.documents_BT, text.forks_BK, text.shape, sampling, vocabulary, generator)


def thought_mask(text: Text, rollout: Rollout) -> Tensor:
    """Thinking tokens that were thought, `[B, K, G, L]`."""
    return (torch.arange(text.shape.max_length) < rollout.lengths_BKG[..., None]) & (text.forks_BK >= 0)[:, :, None, None]
