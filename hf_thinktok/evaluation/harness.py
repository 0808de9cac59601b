"""lm-evaluation-harness with thoughts: any of its tasks, without them, where the model wants them, or before every token.

    thinktok lm-eval --model thinktok --model_args pretrained=outputs/quickstart,thoughts=own --tasks hellaswag
    lm_eval --model thinktok --model_args pretrained=outputs/quickstart,thoughts=own --tasks recipes/lm_eval/gsm8k_local.yaml

The second is the harness's own command: it has no plug-ins, but a task file may name a function of this module (`as_they_are`), which makes it known.

Shape suffixes as in tree.py; C places of continuations, P lengths of a thought from 0, V real rows.
"""

from collections.abc import Iterator

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers.utils import find_adapter_config_file

from ..engine import Engine, Pass, choose_engine
from ..generation import StopsInText, ThinkingBudget
from ..head import HiddenInputs, attach_head
from ..losses import stopping_logps
from ..models import evaluating
from ..peft import load_whole
from ..rollout import Sampling, sample_thoughts
from ..tokens import NO_CUTS
from ..tree import Branching, ThoughtTree
from .inspection import logits_of
from .thinking import check_evaluable, padded

KINDS = ("none", "own", "always")
# Logits are made for so many numbers at a time: 256 MiB in fp32.
NUMBERS = 2**26


def as_they_are(documents):
    """A task's documents, unchanged: `process_docs: !function hf_thinktok.evaluation.harness.as_they_are` in a task file makes `thinktok` known."""
    return documents


@register_model("thinktok")
class ThinkTokLM(HFLM):
    """The harness's `hf` for a model with thinking tokens. Probabilities are those of real tokens among real tokens, whatever is thought.

    Likelihoods of a continuation: before each of its tokens the model thinks greedily, and forgets the thought once the token follows. Generation: the
    model thinks into its text, as plain `generate` has it, and the task sees the text without thoughts; where nothing is sampled it thinks where that is
    likelier than to speak, which the likeliest id does not say. Where a task samples, the whole distribution is sampled from, whatever `thoughts` and the
    model's own generation config, but for what the task names: transformers' `top_k` of 50 would leave out thinking tokens, of which each is improbable.

    Args:
        thoughts: `none`; `own`, as far as its gate wants them; `always`, thoughts of full length before every token.
        max_think_length: thinking tokens of a thought at most; as trained where not given.
        max_total_think: thinking tokens of a generation at most, which come on top of the task's own limit of tokens, as far as the
            model's context goes.
        think_bias: nats added to thinking logits in a generation.
        kwargs: those of the harness's `hf`.

    Raises:
        ValueError: a model whose thoughts cannot be evaluated so, or an option that has no effect.
    """

    def __init__(
        self,
        pretrained,
        thoughts: str | None = "own",
        max_think_length: int | None = None,
        max_total_think: int | None = None,
        think_bias: float = 0.0,
        **kwargs,
    ):
        thoughts = "none" if thoughts is None else thoughts  # as the harness reads the word
        if thoughts not in KINDS:
            raise ValueError(f"thoughts={thoughts!r} is not known; it is one of {', '.join(KINDS)}.")
        given = {"max_think_length": max_think_length, "max_total_think": max_total_think, "think_bias": think_bias or None}
        if thoughts == "none" and (useless := [name for name, value in given.items() if value is not None]):
            raise ValueError(f"{useless[0]} has no effect with thoughts=none: leave it out.")
        where = {name: kwargs[name] for name in ("revision", "trust_remote_code") if name in kwargs}
        if isinstance(pretrained, str) and find_adapter_config_file(pretrained, revision=where.get("revision")) is not None:
            pretrained, kwargs["tokenizer"] = load_whole(pretrained, kwargs.get("dtype", "auto"), **where)
            pretrained.to(kwargs.get("device") or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        super().__init__(pretrained, **kwargs)
        base, self.vocabulary, length, blind, self.filler, _ = check_evaluable(self.model, max_think_length)
        if thoughts != "none" and self.max_length - length < 2:
            raise ValueError(f"max_think_length={length} leaves no room for text in max_length={self.max_length}: lower it.")
        if thoughts != "none" and not isinstance(self.batch_size, int):
            raise ValueError(f"batch_size={self.batch_size} is found out without thoughts: give a number.")
        if blind:
            raise ValueError("The model was trained with blind=True and cannot read a task's text once it speaks.")
        self.thoughts, self.branching, self.max_total_think = thoughts, Branching(1, length, 1), max_total_think
        bounds = {"none": (0, 0), "own": (0, length), "always": (length, length)}[thoughts]
        self.budget = ThinkingBudget(self.vocabulary, *bounds, max_total_think, think_bias)
        self.engine: Engine | None = None
        self.base = base
        attach_head(base, self.vocabulary)

    def _model_call(self, inps, attn_mask=None, labels=None):
        logits = super()._model_call(inps, attn_mask, labels)[..., : self.vocabulary.guard_id + 1]
        logits[..., self.vocabulary.num_real :] = -torch.inf  # a text may contain the guard, and nothing predicts it
        return logits

    def _model_generate(self, context, max_length: int, stop, **generation_kwargs):
        room = (max_length - context.shape[1]) * self.branching.max_length * (self.thoughts != "none")  # a thought before every token
        more = min(max_length + (room if self.max_total_think is None else self.max_total_think), self.max_length)
        self.budget.by_gate = not generation_kwargs.get("do_sample")
        if self.budget.by_gate:
            generation_kwargs.pop("temperature", None)  # the harness's 0, which transformers warns of
        else:
            generation_kwargs = NO_CUTS | generation_kwargs
        with self._autocast():
            made_BT = self.model.generate(
                input_ids=context,
                max_length=more,
                stopping_criteria=[StopsInText(self.tokenizer, stop, self.vocabulary, context.shape[1])] if stop else None,
                logits_processor=[self.budget],
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **generation_kwargs,
            )
        # Who thinks less than it may has no more text for it.
        text_BT = (~self.vocabulary.is_thought(made_BT[:, context.shape[1] :])).cumsum(1)
        made_BT[:, context.shape[1] :][text_BT > max_length - context.shape[1]] = self.eot_token_id
        return made_BT

    def tok_decode(self, tokens, skip_special_tokens: bool = True):
        if not isinstance(tokens, int):
            tokens = [token for token in tokens if token not in self.vocabulary.ids]  # which not every tokenizer hides
        return super().tok_decode(tokens, skip_special_tokens)

    def _autocast(self):
        return torch.autocast(self.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        if self.thoughts == "none":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        pieces = [(i, *piece) for i, (_, context, continuation) in enumerate(requests) for piece in self._pieces(context, continuation)]
        pieces.sort(key=lambda piece: -len(piece[1]))
        answers = [(0.0, True)] * len(requests)
        size = override_bs or self.batch_size
        for start in tqdm(range(0, len(pieces), size), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests with thoughts"):
            batch = pieces[start : start + size]
            for (i, _, _), (logp, hit) in zip(batch, self._answer([piece[1:] for piece in batch]), strict=True):
                answers[i] = answers[i][0] + logp, answers[i][1] and hit
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _pieces(self, context: list[int], continuation: list[int]) -> Iterator[tuple[list[int], int]]:
        """Rows that leave room for a thought, each with how many tokens at its end are judged: all of the continuation, as long as it may be."""
        row, room = context + continuation, self.max_length - self.branching.max_length + 1
        for start in range(len(context), len(row), room - 1):
            end = min(start + room - 1, len(row))
            yield row[max(0, end - room) : end], end - start

    def _answer(self, requests: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """For each row and its last tokens their log-probability, nats, and whether they are what the model would say first, token by token."""
        rows, places = [row for row, _ in requests], [count for _, count in requests]
        most = max(places)
        tokens_BT, documents_BT = padded([(0, row) for row in rows], 0, self.device)
        forks = [[len(row) - 1 - count + k for k in range(count)] + [-1] * (most - count) for row, count in zip(rows, places, strict=True)]
        forks_BK = torch.tensor(forks, device=self.device)
        if self.engine is None:
            self.engine = choose_engine(self.base, self.vocabulary, self.branching, tokens_BT.shape[1], most, computes_in=self.mixed_precision_dtype)
        sampling, generator = Sampling(top_k=1, filler=self.filler), torch.Generator(self.device)
        with evaluating(self.model), self._autocast():
            rollout = sample_thoughts(self.engine, self.model, tokens_BT, documents_BT, forks_BK, self.branching, sampling, self.vocabulary, generator)
            tree = ThoughtTree(documents_BT, forks_BK, self.branching)
            there_BK = forks_BK >= 0
            nodes_BKP = tree.prefixes()[:, :, 0] + torch.arange(len(rows), device=self.device)[:, None, None] * tree.num_nodes
            nodes_CP = nodes_BKP[there_BK]
            ((hidden_MD,),) = self.engine.run(self.model, tree, tree.tokens(tokens_BT, rollout.thoughts_BKGL), [Pass([HiddenInputs(nodes_CP.flatten())])])
            hidden_CPD = hidden_MD.view(*nodes_CP.shape, -1)
            target_C = tokens_BT.gather(1, forks_BK.clamp(min=0) + 1)[there_BK]
            step = max(1, NUMBERS // (nodes_CP.shape[1] * len(self.base.get_output_embeddings().weight)))
            logps, first = [], []
            for some_CPD, wanted_C in zip(hidden_CPD.split(step), target_C.split(step), strict=True):
                logps_CV, real_C = self._predict(some_CPD), wanted_C.clamp(max=self.vocabulary.num_real - 1)
                logps.append(logps_CV.gather(1, real_C[:, None])[:, 0].masked_fill(wanted_C > real_C, -torch.inf))  # the guard
                first.append(logps_CV.argmax(-1))
        there_BK = there_BK.cpu()
        logps_BK = torch.zeros(there_BK.shape, dtype=torch.float64).masked_scatter(there_BK, torch.cat(logps).cpu().double())
        hits_BK = torch.ones_like(there_BK).masked_scatter(there_BK, (torch.cat(first) == target_C).cpu())
        return list(zip(logps_BK.sum(1).tolist(), hits_BK.all(1).tolist(), strict=True))

    def _predict(self, hidden_CPD: Tensor) -> Tensor:
        """Log-probabilities of the next real token, the length of the thought summed out: `log sum_l w_l p(y | z_1..l)`."""
        logits_CPR = logits_of(self.base, hidden_CPD)
        real_CPV = logits_CPR[..., : self.vocabulary.num_real]
        logps_CPV = real_CPV.log_softmax(-1)
        if self.thoughts == "always":
            return logps_CPV[:, -1]
        think_CPN = logits_CPR[..., self.vocabulary.first_id : self.vocabulary.guard_id]
        gate_CL = (think_CPN.logsumexp(-1) - real_CPV.logsumexp(-1))[:, :-1]
        weights_CP = stopping_logps(gate_CL)
        return (weights_CP[..., None] + logps_CPV).logsumexp(1)
