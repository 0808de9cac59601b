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
from .architectures import LogitTransform
from .models import unwrapped
from .rewards import failing, masked_sum
from .rollout import Rollout, Sampling
from .scores import TreeScores
from .tokens import ThinkingVocabulary

# So many at a time, that a language is never new all at once.
MOST = 4
# A token is free if it is said less than this part of the mean, and has ended less than that of the thoughts that are remembered.
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

    It does so before the next step, so that what is evaluated and saved is what was trained.

    Args:
        vocabulary: which ids are thoughts.
        sampling: how they are drawn.
        every: steps from one time to the next.
        seed: of the noise, which is the same on all ranks.
        gather: puts the tensors of all ranks one behind the other.
        num_processes: ranks.
        process: which of them this is.
    """

    def __init__(
        self,
        vocabulary: ThinkingVocabulary,
        sampling: Sampling,
        every: int,
        seed: int,
        gather: Callable[[Tensor], Tensor] = lambda of_rank: of_rank,
        num_processes: int = 1,
        process: int = 0,
    ):
        self.vocabulary, self.sampling, self.every, self.seed = vocabulary, sampling, every, seed
        self.gather, self.num_processes, self.process = gather, num_processes, process
        self.room = REMEMBERED // num_processes
        self.revived = 0
        self.since: dict[str, Tensor] = {}

    def observe(self, rollout: Rollout, scores: TreeScores) -> None:
        """Adds a batch's thoughts, but for those that were put there and not drawn."""
        told_BKG, hidden_BKGD = masked_sum(scores.logps_BKGH, scores.mask_BKH[:, :, None]).detach(), scores.last_hidden_BKGD
        assert hidden_BKGD is not None
        said_BKGL, lengths_BKG = rollout.said_BKGL & scores.valid_BK[:, :, None, None], rollout.lengths_BKG
        said_BKGL[:, :, : rollout.num_chosen] = False
        # What the policy would say and not what was said: by exploration every token is said now and then.
        say_MN = self.sampling.probabilities(scores.think_logps_BKGLN.detach()[said_BKGL].float()).nan_to_num(0.0)
        choices_BKGL = (rollout.thoughts_BKGL - self.vocabulary.first_id).clamp(min=0)
        last_BKG = choices_BKGL.gather(-1, (lengths_BKG - 1).clamp(min=0)[..., None])[..., 0]
        ended_BKG = said_BKGL.any(-1) & told_BKG.isfinite() & hidden_BKGD.isfinite().all(-1)  # a step that is skipped must not be remembered
        new = {"choice_R": last_BKG[ended_BKG], "wrong_R": failing(told_BKG[ended_BKG]), "hidden_RD": hidden_BKGD[ended_BKG]}
        self.since = self.since or self._nothing(hidden_BKGD.device, hidden_BKGD.shape[-1])  # no training has begun
        for name, values in new.items():
            latest = values[-self.room :].to(self.since[name])
            self.since[name] = torch.cat([self.since[name][len(latest) :], latest])
        self.since["said_N"] += say_MN.sum(0)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        rows_ND = thinking_rows(unwrapped(model), self.vocabulary)[-1].rows_ND
        nothing = self._nothing(rows_ND.device, rows_ND.shape[1])
        # A resumed run has what all processes had together, however many they were: each takes its part.
        for name in self.since:
            of_all = self.since[name].to(nothing[name])
            if name != "said_N":
                of_all = torch.cat([*[nothing[name]] * self.num_processes, of_all])[-self.room * self.num_processes :]
                nothing[name] = of_all.chunk(self.num_processes)[self.process]
            elif self.process == 0:
                nothing[name] = of_all
        self.since = nothing

    def _nothing(self, device: torch.device, size: int) -> dict[str, Tensor]:
        """As much room as will be needed, so that all ranks gather alike; no thought chose -1."""
        return {
            "said_N": torch.zeros(self.vocabulary.num_tokens, device=device),
            "choice_R": torch.full((self.room,), -1, device=device),
            "wrong_R": torch.zeros(self.room, device=device),
            "hidden_RD": torch.zeros(self.room, size, device=device),
        }

    def _of_all(self) -> dict[str, Tensor]:
        """What the ranks remember together, on the CPU: there sums have an order, so that all ranks, and the same run again, choose the same."""
        since = {name: self.gather(values[None] if name == "said_N" else values).cpu() for name, values in self.since.items()}
        return since | ({"said_N": since["said_N"].sum(0)} if since else {})

    @torch.no_grad()
    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 0 or state.global_step % self.every:
            return
        base = unwrapped(model)
        reading, choosing = thinking_rows(base, self.vocabulary)
        biases = trained_biases(base, self.vocabulary)
        since = self._of_all()
        self.since = self._nothing(choosing.rows_ND.device, choosing.rows_ND.shape[1])
        parents_P, copies_P = shared_and_free(since["said_N"], since["choice_R"], since["wrong_R"])
        if len(parents_P):
            generator = torch.Generator().manual_seed(self.seed + state.global_step)
            apart_PD, middle_PD = (part.to(choosing.rows_ND.device) for part in apart(since["choice_R"], since["wrong_R"], since["hidden_RD"], parents_P))
            split(reading.rows_ND, choosing.rows_ND, parents_P, copies_P, apart_PD / LogitTransform.from_config(base.config).scale, middle_PD, generator)
            moments = [rows for table in (reading, choosing, *biases) for rows in table.of_optimizer(optimizer)]
            for rows in [*moments, *(bias.rows_ND for bias in biases)]:
                rows[copies_P] = rows[parents_P]  # moments of a row that was hardly trained would let the copy leap
            self.revived += len(parents_P)

    def state_dict(self) -> dict:
        """Of all ranks, which have to ask for it together."""
        return {"revived": self.revived, "since": self._of_all()}

    def load_state_dict(self, state: dict) -> None:
        self.revived, self.since = state["revived"], dict(state["since"])


def shared_and_free(said_N: Tensor, choice_R: Tensor, wrong_R: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens after which the text fails most, `[P]`, and as many that are hardly said.

    Args:
        said_N: how often each is said.
        choice_R: the token that ended a thought; -1 for none.
        wrong_R: how far what followed it failed: 1 - p.
    """
    ended_M, wrong_M = choice_R[choice_R >= 0], wrong_R[choice_R >= 0]
    ended_N, wrong_N = (torch.bincount(ended_M, weights, len(said_N)).to(wrong_R) for weights in (None, wrong_M))
    rate_N, mean = wrong_N / ended_N.clamp(min=1), wrong_N.sum() / ended_N.sum().clamp(min=1)
    usual = ended_N.sum() / (ended_N > 0).sum().clamp(min=1)
    shared_N = (ended_N >= usual.clamp(min=LEAST_SAID)) & (rate_N > (TIMES_THE_MEAN * mean).clamp(min=LEAST_WRONG))
    free_M = ((said_N < RARE * said_N.mean()) & (ended_N < RARE * ended_N.mean())).nonzero()[:, 0]
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


def trained_biases(model, vocabulary: ThinkingVocabulary) -> list[ThinkingRows]:
    """What else a thinking token's logit has of its own: the LM head's bias, where there is one and it is trained."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    return [] if bias is None or not bias.requires_grad else [ThinkingRows(bias, vocabulary.first_id, vocabulary.num_tokens)]
