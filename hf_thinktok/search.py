"""Better candidates than the policy's own: one thought of each group is the best of many for the text that follows.

Nobody supervises the thought: the candidates are the policy's own samples and random thoughts, and the speaker's likelihood chooses. Where the gate ends
thoughts (`stop: learned`) a candidate is worth what its best beginning is, after the price of its tokens.

Shape suffixes as in tree.py; P candidates, E places where one may end.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .distributed import autocast
from .exploration import Coverage, candidate_thoughts, coverage_share, ever, scheduled
from .head import HeadInputs
from .models import evaluating
from .rewards import masked_sum
from .rollout import Rollout, Sampling
from .tokens import ThinkingVocabulary


class Explorer:
    """The thoughts to learn from: the policy's, and where asked for a better one in each group, or the data's own.

    Args:
        trainer: a `ThinkTokTrainer`, for its options and its passes over a tree.
    """

    def __init__(self, trainer):
        self.trainer, self.args, self.vocabulary = trainer, trainer.args, trainer.vocabulary
        num_tokens, length, device = self.vocabulary.num_tokens, self.args.max_think_length, trainer.accelerator.device
        by_place = self.args.coverage_of == "token"
        self.coverage = Coverage(num_tokens, length, self.args.coverage_decay, device, by_place) if ever(self.args.coverage_coef) else None

    def __call__(
        self, model, inputs: dict[str, Tensor], labels_BT: Tensor, rollout: Rollout, generator: torch.Generator, sampling: Sampling, step: int
    ) -> Rollout:
        """A batch's rollout with what exploration adds to it; `step` is the schedules' clock."""
        args, first = self.args, self.vocabulary.first_id
        if rollout.forks_BK.shape[1] == 0:
            return rollout
        if args.supply_thoughts:
            given_BL, length = inputs["thoughts"], rollout.thoughts_BKGL.shape[-1]
            given_BL = torch.nn.functional.pad(given_BL, (0, max(length - given_BL.shape[1], 0)))[:, :length].clamp(min=0)
            rollout = replace(_with_first(rollout, first + given_BL[:, None], rollout.forks_BK >= 0), supplied=True)
        rollout = self._search(model, inputs, labels_BT, rollout, generator, sampling, step)
        if self.coverage is not None:
            codes = self.coverage.codes(rollout.thoughts_BKGL - first, rollout.lengths_BKG)
            there_BKG = (rollout.forks_BK >= 0)[..., None].expand_as(rollout.lengths_BKG)
            self.coverage.update(codes, there_BKG, self.trainer.accelerator.reduce, 1 / self.trainer.current_gradient_accumulation_steps)
            rollout = replace(rollout, rarity_BKG=self.coverage.rarity(codes))
        return rollout

    def _search(
        self, model, inputs: dict[str, Tensor], labels_BT: Tensor, rollout: Rollout, generator: torch.Generator, sampling: Sampling, step: int
    ) -> Rollout:
        args, trainer, ends_early = self.args, self.trainer, self.args.stop == "learned"
        num_candidates = round(scheduled(args.search, step))
        coefficient, price = scheduled(args.coverage_coef, step), scheduled(args.think_cost, step)
        if num_candidates == 0:
            return rollout

        def bonus(choices_BKPL: Tensor, lengths_BKP: Tensor, logps_BKP: Tensor) -> Tensor:
            if self.coverage is None:
                return torch.zeros_like(logps_BKP)
            return coefficient * coverage_share(args.coverage_where, logps_BKP) * self.coverage.rarity(self.coverage.codes(choices_BKPL, lengths_BKP))

        def value(candidates: Rollout) -> Tensor:
            with evaluating(model):
                tree = trainer._tree(inputs, candidates)
                scores = trainer._score(model, tree, inputs["input_ids"], tree.judging_labels(labels_BT), candidates)
            return scores.prefix_logps_BKGP[..., 1:] if ends_early else masked_sum(scores.logps_BKGH, scores.mask_BKH[:, :, None])[..., None]

        def sample(count: int) -> Rollout:
            return trainer._sample(model, inputs, rollout.forks_BK, generator, sampling, count)

        among = partial(
            candidate_thoughts,
            num_candidates=num_candidates,
            random_part=args.search_random,
            changes=args.search_changes,
            num_tokens=self.vocabulary.num_tokens,
            length=rollout.thoughts_BKGL.shape[-1],
            generator=generator,
        )
        with autocast(trainer.accelerator):
            if args.blind and args.lookahead == 1:
                targets_BK = trainer._tree(inputs, rollout).judged(labels_BT)[1][..., 0]
                split, vocabulary = args.policies == "split", self.vocabulary
                return best_shared_thoughts(model, split, rollout, targets_BK, among, vocabulary, bonus, price, ends_early, generator)
            return best_own_thoughts(sample, value, rollout, among, self.vocabulary, bonus, price)


def best(told_BKPE: Tensor, price: float, bonus) -> Tensor:
    """The best candidate of each fork, `[B, K]`.

    Args:
        told_BKPE: log-likelihood of the judged text where a candidate ends.
        price: of each token, nats; of no effect where a candidate has one end.
        bonus: gives more `[B, K, P]` for how well each tells the judged text.
    """
    price_E = price * torch.arange(1, told_BKPE.shape[-1] + 1, device=told_BKPE.device)
    worth_BKP, ends_BKP = (told_BKPE - price_E).max(-1)
    return (worth_BKP + bonus(told_BKPE.gather(-1, ends_BKP[..., None])[..., 0])).argmax(-1)


@torch.no_grad()
def best_shared_thoughts(
    model, split: bool, rollout: Rollout, targets_BK: Tensor, among, vocabulary: ThinkingVocabulary, bonus, price: float, ends_early: bool, generator
) -> Rollout:
    """Under `blind` a thought is worth the same to every text that goes on alike, so all forks of the batch share their candidates.

    One pass of the speaker over P short rows scores every candidate for every fork.

    Args:
        targets_BK: the judged token of each fork, negative where there is none.
        among: gives the candidates, as `candidate_thoughts` does from the policy's own.
        bonus: gives the coverage bonus `[B, K, P]` of choices `[B, K, P, L]` from 0, their lengths, and how well they tell the judged text.
        price: of each thinking token, nats, where one `ends_early`: after any of its tokens.
    """
    there_BK = rollout.forks_BK >= 0
    there_BK = there_BK | ~there_BK.any()  # where no fork is there the speaker's pass is made all the same, as on other ranks
    sampled_ML = (rollout.thoughts_BKGL - vocabulary.first_id)[there_BK].flatten(0, -2)

    def own(count: int) -> Tensor:
        return sampled_ML[torch.randint(len(sampled_ML), (count,), generator=generator, device=sampled_ML.device)]

    candidates_PL = among(own)
    lengths_BK = rollout.lengths_BKG[:, :, 0].clamp(min=1).where(there_BK, candidates_PL.shape[1])
    ends_BKE = lengths_BK[..., None]
    if ends_early:
        ends_BKE = torch.arange(1, candidates_PL.shape[1] + 1, device=lengths_BK.device).expand(*lengths_BK.shape, -1)
    first = int(ends_BKE.min())  # where all are of full length, the last token's prediction is all that is needed
    nodes_Pl = torch.arange(candidates_PL.numel(), device=lengths_BK.device).view(candidates_PL.shape)[:, first - 1 :]
    targets_U, asked_BK = targets_BK.clamp(min=0).unique(return_inverse=True)
    head = HeadInputs(nodes_Pl.flatten(), targets_U.repeat(nodes_Pl.numel(), 1))
    with evaluating(model):
        out = model(input_ids=vocabulary.first_id + candidates_PL, use_cache=False, speaks=split, head=head)
    told_PlU = out.target_logps_M.view(*nodes_Pl.shape, -1)
    told_BKPE = told_PlU[:, ends_BKE - first, asked_BK[..., None]].permute(1, 2, 0, 3)
    places = *targets_BK.shape, len(candidates_PL)
    among_them = best(told_BKPE, price, partial(bonus, candidates_PL.expand(*places, -1), lengths_BK[..., None].expand(places)))
    return _with_first(rollout, vocabulary.first_id + candidates_PL[among_them], targets_BK >= 0)


@torch.no_grad()
def best_own_thoughts(sample, value, rollout: Rollout, among, vocabulary: ThinkingVocabulary, bonus, price: float) -> Rollout:
    """Best of n at every fork by itself; every thought that exists where there are no more than n.

    Args:
        sample: gives a rollout with so many thoughts at each fork.
        value: gives the log-likelihood `[B, K, P, E]` of the judged text after each thought of a rollout, wherever it may end.
        among, bonus, price: as in `best_shared_thoughts`, for `[B, K, P, L]`.
    """

    def own(count: int) -> Tensor:
        return sample(count).thoughts_BKGL - vocabulary.first_id

    choices_BKPL = among(own, places=tuple(rollout.forks_BK.shape))
    thoughts_BKPL = vocabulary.first_id + choices_BKPL
    lengths_BKP = rollout.lengths_BKG[:, :, :1].expand(thoughts_BKPL.shape[:-1])
    logps_BKPL = torch.zeros(thoughts_BKPL.shape, device=lengths_BKP.device)
    candidates = replace(rollout, thoughts_BKGL=thoughts_BKPL, lengths_BKG=lengths_BKP, logps_BKGL=logps_BKPL, markovian=0)  # the best is to be seen whole
    best_BK = best(value(candidates), price, partial(bonus, choices_BKPL, lengths_BKP))
    best_BK1L = best_BK[..., None, None].expand(-1, -1, 1, choices_BKPL.shape[-1])
    return _with_first(rollout, thoughts_BKPL.gather(2, best_BK1L)[:, :, 0], rollout.forks_BK >= 0)


def _with_first(rollout: Rollout, thought_BKL: Tensor, valid_BK: Tensor) -> Rollout:
    """The rollout with the first thought of each group replaced."""
    first_BKL = torch.where(valid_BK[..., None], thought_BKL, rollout.thoughts_BKGL[:, :, 0])
    return replace(rollout, thoughts_BKGL=torch.cat([first_BKL[:, :, None], rollout.thoughts_BKGL[:, :, 1:]], 2), chosen=True)
