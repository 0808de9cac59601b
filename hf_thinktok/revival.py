"""Thinking tokens that are hardly said come back, each as a part of one that stands for too much.

A token that two meanings share is right for one of them at a time, and stays so: a third token says nothing yet, so for neither meaning it is ever the
better choice. A copy of the shared one is as good as that from the start. It is put where the text after the shared one fails, and the shared one stays
where it is right, so the two can part. Growing a codebook by splitting is Linde, Buzo and Gray's (IEEE Transactions on Communications 28(1), 1980);
filling unused entries anew while it is learned is also Jukebox's (https://huggingface.co/papers/2005.00341, "random restarts").

Shape suffixes as in tree.py; N thinking tokens, D hidden size, M thoughts in a row, P parents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TrainerCallback

from ._compat import trainable_token_rows
from .models import unwrapped
from .rewards import masked_sum
from .rollout import Rollout
from .scores import TreeScores
from .tokens import ThinkingVocabulary

# So many at a time, that a language is never new all at once.
MOST = 8
# A token is free if it is said less than this part of the mean.
RARE = 0.05
# One is shared if what follows it fails so many times as often as on average, and so often at least, in so many thoughts or more.
TIMES_THE_MEAN, LEAST_WRONG, LEAST_SAID = 1.5, 0.08, 16
# How far apart, in nats, the logits of parent and copy are put as far from the middle as hidden states are on average; of the row's length at most this part.
SHARPNESS, LARGEST_PART = 2.0, 0.5
# Noise in what is read, in standard deviations of the row: without it the two would mean the same.
NOISE = 0.1


class Revival(TrainerCallback):
    """Counts what follows each thinking token that ends a thought, and every so many steps splits those that are shared.

    Args:
        vocabulary: which ids are thoughts.
        every: steps from one time to the next.
        seed: of the noise, which is the same on all ranks.
        total: sums a tensor over ranks.
    """

    def __init__(self, vocabulary: ThinkingVocabulary, every: int, seed: int, total: Callable[[Tensor], Tensor] = lambda sums: sums):
        self.vocabulary, self.every, self.seed, self.total = vocabulary, every, seed, total
        self.revived = 0
        self.sums: dict[str, Tensor] = {}

    def observe(self, rollout: Rollout, scores: TreeScores) -> None:
        """Adds a batch's thoughts."""
        told_BKG, hidden_BKGD = masked_sum(scores.logps_BKGH, scores.mask_BKH[:, :, None]).detach(), scores.last_hidden_BKGD
        assert hidden_BKGD is not None
        said_BKGL, lengths_BKG = rollout.said_BKGL & scores.valid_BK[:, :, None, None], rollout.lengths_BKG
        choices_BKGL = (rollout.thoughts_BKGL - self.vocabulary.first_id).clamp(min=0)
        last_BKG = choices_BKGL.gather(-1, (lengths_BKG - 1).clamp(min=0)[..., None])[..., 0]
        ended_BKG = said_BKGL.any(-1) & told_BKG.isfinite() & hidden_BKGD.isfinite().all(-1)  # a step that is skipped must not be remembered
        last_M, hidden_MD, wrong_M = last_BKG[ended_BKG], hidden_BKGD[ended_BKG], -torch.expm1(told_BKG[ended_BKG])
        counted = {"ended_N": torch.ones_like(wrong_M), "wrong_N": wrong_M, "hidden_ND": hidden_MD, "hidden_wrong_ND": hidden_MD * wrong_M[:, None]}
        counted["square_N"] = hidden_MD.square().sum(-1)
        for name, values in counted.items():
            self.sums[name].index_add_(0, last_M, values)
        self.sums["said_N"] += torch.bincount(choices_BKGL[said_BKGL], minlength=self.vocabulary.num_tokens)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        rows_ND = thinking_rows(unwrapped(model), self.vocabulary)[-1].rows_ND
        shapes = dict.fromkeys(("said_N", "ended_N", "wrong_N", "square_N"), rows_ND.shape[:1]) | dict.fromkeys(("hidden_ND", "hidden_wrong_ND"), rows_ND.shape)
        empty = {name: torch.zeros(shape, device=rows_ND.device) for name, shape in shapes.items()}
        self.sums = {name: self.sums.get(name, zeros).to(zeros) for name, zeros in empty.items()}  # a resumed run has some, from the CPU

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step % self.every:
            return
        sums = {name: self.total(values) for name, values in self.sums.items()}
        self.sums = {name: torch.zeros_like(values) for name, values in self.sums.items()}
        parents_P, copies_P = shared_and_free(sums["said_N"], sums["ended_N"], sums["wrong_N"])
        if len(parents_P):
            reading, choosing = thinking_rows(unwrapped(model), self.vocabulary)
            generator = torch.Generator().manual_seed(self.seed + state.global_step)
            split(reading.rows_ND, choosing.rows_ND, parents_P, copies_P, apart(sums, parents_P), generator)
            for table in (reading, choosing):
                for state_ND in table.of_optimizer(optimizer):
                    state_ND[copies_P] = state_ND[parents_P]  # one of a row that was hardly trained would let the copy leap
            self.revived += len(parents_P)

    def state_dict(self) -> dict:
        return {"revived": self.revived, "sums": self.sums}

    def load_state_dict(self, state: dict) -> None:
        self.revived, self.sums = state["revived"], dict(state["sums"])


def shared_and_free(said_N: Tensor, ended_N: Tensor, wrong_N: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens after which the text fails most, `[P]`, and as many that are hardly said.

    Args:
        said_N: how often each was said.
        ended_N: how often each ended a thought.
        wrong_N: of these, how often what followed failed: the sum of 1 - p.
    """
    rate_N, mean = wrong_N / ended_N.clamp(min=1), wrong_N.sum() / ended_N.sum().clamp(min=1)
    shared_N = (ended_N >= LEAST_SAID) & (rate_N > (TIMES_THE_MEAN * mean).clamp(min=LEAST_WRONG))
    free_M = (said_N < RARE * said_N.mean()).nonzero()[:, 0]
    count = min(MOST, int(shared_N.sum()), len(free_M))
    return wrong_N.where(shared_N, -1.0).topk(count).indices, free_M[said_N[free_M].argsort()[:count]]


def apart(sums: dict[str, Tensor], parents_P: Tensor) -> Tensor:
    """For each parent the difference of its row and its copy's, `[P, D]`: along what tells the hidden states where it fails from those where it is right,
    `SHARPNESS` nats at their standard deviation, and none at their mean."""
    ended_P1, wrong_P1 = sums["ended_N"][parents_P, None], sums["wrong_N"][parents_P, None]
    all_PD, wrong_PD = sums["hidden_ND"][parents_P], sums["hidden_wrong_ND"][parents_P]
    mean_PD = all_PD / ended_P1.clamp(min=1)
    between_PD = wrong_PD / wrong_P1.clamp(min=1e-3) - (all_PD - wrong_PD) / (ended_P1 - wrong_P1).clamp(min=1e-3)
    length_P1 = mean_PD.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    across_PD = between_PD - (between_PD * mean_PD).sum(-1, keepdim=True) / length_P1**2 * mean_PD
    spread_P1 = (sums["square_N"][parents_P, None] / ended_P1.clamp(min=1) - length_P1**2).clamp(min=1e-8).sqrt()
    return across_PD / across_PD.norm(dim=-1, keepdim=True).clamp(min=1e-12) * (SHARPNESS / spread_P1)


@torch.no_grad()
def split(reading_ND: Tensor, choosing_ND: Tensor, parents_P: Tensor, copies_P: Tensor, apart_PD: Tensor, generator: torch.Generator) -> None:
    """Makes copies of parents: read as they are, chosen where they fail.

    Args:
        reading_ND, choosing_ND: the thinking rows of the input and the output embedding, changed in place; one and the same where they are tied.
        apart_PD: as `apart` gives it.
        generator: on the CPU.
    """
    parent_PD = choosing_ND[parents_P].float()
    part_P1 = LARGEST_PART * parent_PD.norm(dim=-1, keepdim=True) / apart_PD.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    half_PD = apart_PD * part_P1.clamp(max=1.0) / 2
    read_PD = reading_ND[parents_P].float()
    noise_PD = NOISE * read_PD.std(-1, keepdim=True) * torch.randn(read_PD.shape, generator=generator).to(read_PD)
    reading_ND[copies_P] = (read_PD + noise_PD).to(reading_ND)
    tied = reading_ND.data_ptr() == choosing_ND.data_ptr()
    choosing_ND[copies_P] = (parent_PD + half_PD + (noise_PD if tied else 0.0)).to(choosing_ND)
    choosing_ND[parents_P] = (parent_PD - half_PD).to(choosing_ND)


@dataclass
class ThinkingRows:
    """The rows of a trained parameter that belong to thinking tokens.

    Attributes:
        parameter: an embedding, or the rows that PEFT keeps beside it.
        first: the row of the first thinking token.
        count: N.
    """

    parameter: Tensor
    first: int
    count: int

    @property
    def rows_ND(self) -> Tensor:
        return self.parameter[self.first : self.first + self.count]

    def of_optimizer(self, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
        """The same rows of what the optimizer remembers of each number (moments), where it keeps that as it is."""
        kept = {} if optimizer is None else optimizer.state.get(self.parameter, {})
        alike = [value for value in kept.values() if isinstance(value, Tensor) and value.shape == self.parameter.shape and value.is_floating_point()]
        return [value[self.first : self.first + self.count] for value in alike]


def thinking_rows(model, vocabulary: ThinkingVocabulary) -> tuple[ThinkingRows, ThinkingRows]:
    """What thoughts are read with and chosen by, as it is trained; one parameter twice where embeddings are tied."""
    found = []
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight, trained = trainable_token_rows(layer)
        found.append(ThinkingRows(weight, vocabulary.first_id, vocabulary.num_tokens) if trained is None else ThinkingRows(trained, 0, vocabulary.num_tokens))
    return found[0], found[1]
