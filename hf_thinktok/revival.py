"""Thinking tokens that are hardly said come back, each as a part of one that stands for too much.

A token that two meanings share is right for one of them at a time, and stays so: a third token says nothing yet, so for neither meaning it is ever the
better choice. A copy of the shared one is as good as that from the start. It is put where the text after the shared one fails, and the shared one stays
where it is right, so the two can part. Growing a codebook by splitting is Linde, Buzo and Gray's (IEEE Transactions on Communications 28(1), 1980);
filling unused entries anew while it is learned is also Jukebox's (https://huggingface.co/papers/2005.00341, "random restarts").

Shape suffixes as in tree.py; N thinking tokens, D hidden size, R thoughts remembered, M thoughts in a row, P parents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import TrainerCallback

from ._compat import trainable_token_rows
from .models import unwrapped
from .rewards import failing, masked_sum
from .rollout import Rollout
from .scores import TreeScores
from .tokens import ThinkingVocabulary

# So many at a time, that a language is never new all at once.
MOST = 4
# A token is free if it is said less than this part of the mean.
RARE = 0.05
# So many thoughts are remembered, of all processes together: the latest, since a language that forms is soon another one.
REMEMBERED = 8192
# One is shared if it is chosen as often as those in use are on average, so many times at least, and what follows it fails so many times as often as on
# average, and so often at least.
LEAST_SAID, TIMES_THE_MEAN, LEAST_WRONG = 16, 2.5, 0.08
# How far apart, in nats, the logits of parent and copy are put one standard deviation from the middle; of the row's length at most this part.
SHARPNESS, LARGEST_PART = 2.0, 0.5
# Noise in what is read, in standard deviations of the row: without it the two would mean the same.
NOISE = 0.1


class Revival(TrainerCallback):
    """Remembers what followed the thinking tokens that ended a thought, and every so many steps splits those that are shared.

    Args:
        vocabulary: which ids are thoughts.
        every: steps from one time to the next.
        seed: of the noise, which is the same on all ranks.
        gather: puts the tensors of all ranks one behind the other.
        num_processes: ranks.
    """

    def __init__(
        self, vocabulary: ThinkingVocabulary, every: int, seed: int, gather: Callable[[Tensor], Tensor] = lambda of_rank: of_rank, num_processes: int = 1
    ):
        self.vocabulary, self.every, self.seed, self.gather, self.room = vocabulary, every, seed, gather, REMEMBERED // num_processes
        self.revived = 0
        self.since: dict[str, Tensor] = {}

    def observe(self, rollout: Rollout, scores: TreeScores) -> None:
        """Adds a batch's thoughts."""
        told_BKG, hidden_BKGD = masked_sum(scores.logps_BKGH, scores.mask_BKH[:, :, None]).detach(), scores.last_hidden_BKGD
        assert hidden_BKGD is not None
        said_BKGL, lengths_BKG = rollout.said_BKGL & scores.valid_BK[:, :, None, None], rollout.lengths_BKG
        choices_BKGL = (rollout.thoughts_BKGL - self.vocabulary.first_id).clamp(min=0)
        last_BKG = choices_BKGL.gather(-1, (lengths_BKG - 1).clamp(min=0)[..., None])[..., 0]
        ended_BKG = said_BKGL.any(-1) & told_BKG.isfinite() & hidden_BKGD.isfinite().all(-1)  # a step that is skipped must not be remembered
        new = {"choice_R": last_BKG[ended_BKG], "wrong_R": failing(told_BKG[ended_BKG]), "hidden_RD": hidden_BKGD[ended_BKG]}
        for name, values in new.items():
            self.since[name] = torch.cat([self.since[name], values.to(self.since[name])])[-self.room :]
        self.since["said_N"] += torch.bincount(choices_BKGL[said_BKGL], minlength=self.vocabulary.num_tokens)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        rows_ND = thinking_rows(unwrapped(model), self.vocabulary)[-1].rows_ND
        empty = self._nothing(rows_ND)
        # A resumed run has some, from the CPU, and of as many processes as there were.
        self.since = {name: torch.cat([nothing, self.since.get(name, nothing).to(nothing)])[-len(nothing) :] for name, nothing in empty.items()}

    def _nothing(self, rows_ND: Tensor) -> dict[str, Tensor]:
        """As much room as will be needed, so that all ranks gather alike; no thought chose -1."""
        device, (count, size) = rows_ND.device, rows_ND.shape
        return {
            "said_N": torch.zeros(count, device=device),
            "choice_R": torch.full((self.room,), -1, device=device),
            "wrong_R": torch.zeros(self.room, device=device),
            "hidden_RD": torch.zeros(self.room, size, device=device),
        }

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step % self.every:
            return
        reading, choosing = thinking_rows(unwrapped(model), self.vocabulary)
        said_N = self.gather(self.since["said_N"][None]).sum(0)
        choice_R, wrong_R, hidden_RD = (self.gather(self.since[name]) for name in ("choice_R", "wrong_R", "hidden_RD"))
        self.since = self._nothing(choosing.rows_ND)
        parents_P, copies_P = shared_and_free(said_N, choice_R, wrong_R)
        if len(parents_P):
            generator = torch.Generator().manual_seed(self.seed + state.global_step)
            split(reading.rows_ND, choosing.rows_ND, parents_P, copies_P, *apart(choice_R, wrong_R, hidden_RD, parents_P), generator)
            for table in (reading, choosing):
                for state_ND in table.of_optimizer(optimizer):
                    state_ND[copies_P] = state_ND[parents_P]  # one of a row that was hardly trained would let the copy leap
            self.revived += len(parents_P)

    def state_dict(self) -> dict:
        return {"revived": self.revived, "since": self.since}

    def load_state_dict(self, state: dict) -> None:
        self.revived, self.since = state["revived"], dict(state["since"])


def shared_and_free(said_N: Tensor, choice_R: Tensor, wrong_R: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens after which the text fails most, `[P]`, and as many that are hardly said.

    Args:
        said_N: how often each was said.
        choice_R: the token that ended a thought; -1 for none.
        wrong_R: how far what followed it failed: 1 - p.
    """
    ended_M, wrong_M = choice_R[choice_R >= 0], wrong_R[choice_R >= 0]
    ended_N, wrong_N = (torch.bincount(ended_M, weights, len(said_N)).to(wrong_R) for weights in (None, wrong_M))
    rate_N, mean = wrong_N / ended_N.clamp(min=1), wrong_N.sum() / ended_N.sum().clamp(min=1)
    usual = ended_N.sum() / (ended_N > 0).sum().clamp(min=1)
    shared_N = (ended_N >= usual.clamp(min=LEAST_SAID)) & (rate_N > (TIMES_THE_MEAN * mean).clamp(min=LEAST_WRONG))
    free_M = (said_N < RARE * said_N.mean()).nonzero()[:, 0]
    count = min(MOST, int(shared_N.sum()), len(free_M))
    return wrong_N.where(shared_N, -1.0).topk(count).indices, free_M[said_N[free_M].argsort()[:count]]


def apart(choice_R: Tensor, wrong_R: Tensor, hidden_RD: Tensor, parents_P: Tensor) -> tuple[Tensor, Tensor]:
    """For each parent the difference of its row and its copy's, and the mean hidden state, where that says nothing, `[P, D]` both: along what tells the mean
    where it fails from that where it is right, `SHARPNESS` nats at one standard deviation."""
    its_PR = (choice_R == parents_P[:, None]).to(hidden_RD)

    def mean(weights_PR: Tensor) -> Tensor:
        return weights_PR @ hidden_RD / weights_PR.sum(-1, keepdim=True).clamp(min=1e-3)

    middle_PD, between_PD = mean(its_PR), mean(its_PR * wrong_R) - mean(its_PR * (1 - wrong_R))
    along_PD = normalize(across(between_PD, middle_PD), dim=-1)
    variance_P1 = (its_PR * (along_PD @ hidden_RD.T).square()).sum(-1, keepdim=True) / its_PR.sum(-1, keepdim=True).clamp(min=1)  # its mean is 0
    return along_PD * SHARPNESS / variance_P1.clamp(min=1e-8).sqrt(), middle_PD


def across(rows_PD: Tensor, middle_PD: Tensor) -> Tensor:
    """Of each row what is orthogonal to the other, so that it is no logit more or less there."""
    middle_PD = normalize(middle_PD, dim=-1)
    return rows_PD - (rows_PD * middle_PD).sum(-1, keepdim=True) * middle_PD


@torch.no_grad()
def split(
    reading_ND: Tensor, choosing_ND: Tensor, parents_P: Tensor, copies_P: Tensor, apart_PD: Tensor, middle_PD: Tensor, generator: torch.Generator
) -> None:
    """Makes copies of parents: read as they are, chosen where they fail.

    Args:
        reading_ND, choosing_ND: the thinking rows of the input and the output embedding, changed in place; one and the same where they are tied.
        apart_PD, middle_PD: as `apart` gives them.
        generator: on the CPU.
    """
    parent_PD = choosing_ND[parents_P].float()
    part_P1 = LARGEST_PART * parent_PD.norm(dim=-1, keepdim=True) / apart_PD.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    half_PD = apart_PD * part_P1.clamp(max=1.0) / 2
    read_PD = reading_ND[parents_P].float()
    noise_PD = across(NOISE * read_PD.std(-1, keepdim=True) * torch.randn(read_PD.shape, generator=generator).to(read_PD), middle_PD)
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
