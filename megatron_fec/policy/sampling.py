"""Responses of the policy, sampled by the training model itself on its own TP x PP layout, with megatron-core's KV cache.

One uniform number decides one token, by the inverse CDF over the true vocabulary: the choice is the same in every
layout, up to rounding. In all layouts the logits of one position ([N, V]) are gathered over TP, which megatron-core's
inference mode asks for. Sequence and context parallelism are switched off meanwhile: a decoded position cannot be split
over ranks, and each context rank samples on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_fec.policy.device import device
from megatron_fec.policy.parallel import ParallelLayout
from megatron_fec.policy.step import Policy, cores, gather_weights

try:  # megatron-core 0.19 asks this process-wide flag whether it infers, 0.16 looks at the forward's arguments
    from megatron.core.inference.utils import InferenceMode  # type: ignore[attr-defined]

    _inference_mode = InferenceMode.active
except ImportError:
    _inference_mode = nullcontext

CHUNK_TOKENS = 1 << 16  # rows x longest sequence that are decoded together: the size of the KV cache
# What makes a module of megatron-core or Transformer Engine split its activations over tensor or context ranks, and
# the value that stops it.
SPLIT_SWITCHES = {
    "sequence_parallel": False,
    "scatter_to_sequence_parallel": False,
    "reduce_scatter_embeddings": False,
    "cp_group": None,  # of the rotary embedding and of Transformer Engine's attention
}


def sample_responses(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    uniforms: Tensor,
    stop_id: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[list[list[int]], list[list[float]]]:
    """One response for each prompt: its ids, the stop token included, and their log-probs.

    prompts: the same on all TP and PP ranks of a data-parallel rank, which all call this and get the same result;
    nothing is communicated between data-parallel or context ranks, unless they share experts: then all ranks call it.
    uniforms: [N, max_response_tokens] in [0, 1), one for each row and response position.
    Log-probs are at the temperature, over what top_k and top_p (see `truncated`) leave of the true vocabulary.
    Parameters, gradients, the train or eval mode and the global random states are left as they are.
    """
    assert uniforms.shape[0] == len(prompts), (
        f"uniforms of {uniforms.shape[0]} rows for {len(prompts)} prompts"
    )
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"prompt {number} has no token; sampling starts from at least 1. Filter empty prompts."
            )
    draw = partial(_draw, temperature=temperature, top_p=top_p, top_k=top_k)
    responses: list[tuple[list[int], list[float]]] = [([], [])] * len(prompts)
    # Not torch.inference_mode: megatron-core keeps RoPE tables, which training may have to save for its backward.
    with torch.no_grad(), _ready_to_infer(policy):
        for rows in _chunks([len(prompt) for prompt in prompts], uniforms.shape[1]):
            chunk = _decode_chunk(
                policy, [prompts[i] for i in rows], uniforms[rows], stop_id=stop_id, draw=draw
            )
            for i, response in zip(rows, chunk, strict=True):
                responses[i] = response
        while _some_rank_goes_on(policy.layout, is_working=False):
            nothing = torch.zeros(1, 1, dtype=torch.int64, device=device())
            _next_logits(cores(policy), policy.layout, StaticInferenceContext(1, 1), nothing)
    return [ids for ids, _ in responses], [logprobs for _, logprobs in responses]


def _chunks(prompt_lengths: Sequence[int], max_response_tokens: int) -> Iterator[list[int]]:
    """Row numbers of at most CHUNK_TOKENS positions (one row at least), short prompts first.

    Rows of like length together: positions between the shortest and the longest prompt are decoded one by one.
    """
    rows: list[int] = []
    for row in sorted(range(len(prompt_lengths)), key=prompt_lengths.__getitem__):
        if rows and (len(rows) + 1) * (prompt_lengths[row] + max_response_tokens) > CHUNK_TOKENS:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _decode_chunk(
    policy: Policy, prompts: Sequence[Sequence[int]], uniforms: Tensor, *, stop_id: int, draw: Callable
) -> list[tuple[list[int], list[float]]]:
    """(ids, log-probs) of each row; position t is decoded for all rows at once.

    One prefill up to the shortest prompt's end, then one position a step. A row whose prompt goes on takes its next
    token from the prompt; a finished row is carried along until all are.
    """
    models, layout = cores(policy), policy.layout
    uniforms = uniforms.to(device(), torch.float64)
    num_rows, max_response_tokens = uniforms.shape
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device())
    first, total = int(lengths.min()), int(lengths.max()) + max_response_tokens
    tokens = torch.zeros(num_rows, total, dtype=torch.int64, device=device())
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    logprobs = torch.zeros(num_rows, total, dtype=torch.float64, device=device())
    ends = lengths + max_response_tokens
    context = StaticInferenceContext(num_rows, total)
    for t in range(first, total):
        _some_rank_goes_on(layout, is_working=True)
        logits = _next_logits(models, layout, context, tokens[:, context.sequence_len_offset : t])
        column = (t - lengths).clamp(0, max_response_tokens - 1)[:, None]
        drawn = None if logits is None else draw(logits, uniforms.gather(1, column))
        chosen, logprob = _agreed(drawn, num_rows, layout)
        is_response = (t >= lengths) & (t < ends)
        tokens[:, t] = torch.where(is_response, chosen, tokens[:, t])
        logprobs[:, t] = logprob
        ends = torch.where(is_response & (chosen == stop_id), t + 1, ends)
        if int(ends.max()) <= t + 1:
            break
    spans = zip(lengths.tolist(), ends.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
    return [(ids[start:end], values[start:end]) for start, end, ids, values in spans]


def _some_rank_goes_on(layout: ParallelLayout, *, is_working: bool) -> bool:
    """Whether any rank has a token left to decode, where experts are shared; asked before each forward of each rank.

    An expert works for tokens of other ranks too, so a rank that is done goes on with them, on a token of no meaning.
    """
    if layout.expert_group.size() * layout.expert_tensor_group.size() == 1:
        return False
    some = torch.tensor(is_working, dtype=torch.int32, device=device())
    dist.all_reduce(some, op=dist.ReduceOp.MAX)
    return bool(some)


def _next_logits(
    models: Sequence[Any], layout: ParallelLayout, context: StaticInferenceContext, tokens: Tensor
) -> Tensor | None:
    """[N, V] logits after tokens [N, S], which follow those in the KV cache; None off the last stage.

    The hidden states [S, N, hidden] go from stage to stage, once for each chunk of a stage; each layer extends its own
    part of the KV cache.
    """
    num_rows, length = tokens.shape
    stages, stage = layout.pipeline_parallel, dist.get_rank(layout.pipeline_group)
    group, logits = layout.pipeline_group, None
    for number, model in enumerate(models):
        if number or stage:
            config = model.config
            hidden = torch.empty(
                length, num_rows, config.hidden_size, dtype=config.params_dtype, device=device()
            )
            dist.recv(hidden, group=group, group_src=(stage - 1) % stages)
            model.set_input_tensor(hidden)
        output = model(
            input_ids=tokens,
            position_ids=None,  # RoPE takes them from the context
            attention_mask=None,
            inference_context=context,
            runtime_gather_output=True,
        )
        if layout.is_last_stage and number == len(models) - 1:
            logits = output[:, -1, : model.true_vocab_size]
        else:
            dist.send(output.contiguous(), group=group, group_dst=(stage + 1) % stages)
    context.increment_sequence_len_offset(length)
    return logits


def truncated(logits: Tensor, *, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """logits [N, V] with -inf where the token is left out; the same tensor where none is.

    First all but the top_k largest go (0 keeps all), then all but the fewest whose probability, renewed over what was
    left, reaches top_p: vLLM's order (v1/sample/ops/topk_topp_sampler.py). Equal logits share one fate, so that the
    layout cannot decide between them; vLLM breaks such ties by its sorting.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        probs = ordered.softmax(-1)
        above = (
            probs.cumsum(-1) - probs
        )  # the probability of the larger ones: 0 for the first, which always stays
        least = ordered.masked_fill(above >= top_p, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def _draw(
    logits: Tensor, uniforms: Tensor, temperature: float, *, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """logits [N, V], uniforms [N, 1] fp64 -> [N] chosen ids and their log-probs, fp64.

    The id is the first whose cumulated probability exceeds the uniform number, so one of probability 0 is never it.
    """
    logprobs = truncated(logits.double() / temperature, top_p=top_p, top_k=top_k).log_softmax(-1)
    cumulated = logprobs.exp().cumsum(-1)
    chosen = torch.searchsorted(cumulated, uniforms * cumulated[:, -1:], right=True)
    # With logits of NaN there is no choice: the log-prob then tells, and stops at the guard of the engines.
    chosen = chosen.clamp_max(logits.shape[1] - 1)
    return chosen.squeeze(1), logprobs.gather(1, chosen).squeeze(1)


def _agreed(
    drawn: tuple[Tensor, Tensor] | None, num_rows: int, layout: ParallelLayout
) -> tuple[Tensor, Tensor]:
    """The choice and log-probs of the last stage's first tensor rank, on all TP and PP ranks.

    Not left to each rank: sums on a GPU may differ in the last bit, and one other token would spoil every later one.
    """
    both = torch.empty(2, num_rows, dtype=torch.float64, device=device())  # exact for ids
    if drawn is not None:
        both = torch.stack([drawn[0].double(), drawn[1]])
        if layout.tensor_parallel > 1:
            dist.broadcast(both, group=layout.tensor_group, group_src=0)
    if layout.pipeline_parallel > 1:
        dist.broadcast(both, group=layout.pipeline_group, group_src=layout.pipeline_parallel - 1)
    return both[0].long(), both[1]


@contextmanager
def _ready_to_infer(policy: Policy) -> Iterator[None]:
    """Eval mode without sequence and context parallelism; afterwards all is as it was."""
    gather_weights(policy)
    was_training = policy.chunks[0].training
    policy.train(False)
    switched_off = [switch for core in cores(policy) for switch in _switch_off_splits(core)]
    try:
        with _inference_mode():
            yield
    finally:
        for owner, name, value in switched_off:
            setattr(owner, name, value)
        policy.train(was_training)


def _switch_off_splits(model: torch.nn.Module) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value) of the switches that were on.

    megatron-core's set_model_to_sequence_parallel is not used: it remembers modules by the address of a model, also
    after that model is gone.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    found = [
        (owner, name, value)
        for owner in [*configs.values(), *model.modules()]
        for name in SPLIT_SWITCHES
        if (value := getattr(owner, name, None))
    ]
    for owner, name, _ in found:
        setattr(owner, name, SPLIT_SWITCHES[name])
    return found
