"""A micro-batch with every kind of token, for the tests of losses and additions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from loss_reference import Token
from torch import Tensor

from megatron_fec.algorithm.losses import MARKS
from megatron_fec.algorithm.thresholds import ThresholdLines, clip_bounds
from megatron_fec.types import BlendWeights, ClipBounds, LossInputs, LossOutput, UpdateTokens

F64 = torch.float64
METRICS = (
    "entropy",
    "eps_upper_mean",
    "eps_lower_mean",
    "clip_fraction_upper",
    "clip_fraction_lower",
    "dual_clip_fraction",
    "ratio_moved",
    "log_ratio_abs",
    "approx_kl",
)
LOG_RATIOS = [-25.0, -1.0, -0.3, -0.21, -0.05, 0.0, 0.05, 0.25, 0.35, 0.5, 1.2, 3.0, 25.0]
ADVANTAGES = [0.7, -1.3, 0.0]
LOGPROBS = [-0.02, -0.3, -0.8, -2.5]  # p or q, whichever is larger; jittered
LENGTHS = [31, 40, 9, 62]  # of the sequences 0 to 3; 2 has no response, and what follows is padding
# Options under which the batch has tokens of every kind, and those without a default.
OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {"dual_clip": 3.0},
    "gspo": {"sequence_eps_lower": 0.3, "sequence_eps_upper": 0.3},
    "region": {"region": "E2"},
    "clip_cov": {"clip_cov_share": 0.1, "clip_cov_low": 0.05, "clip_cov_high": 1.5},
    "kl_cov": {"kl_cov_share": 0.1},
    "high_entropy": {"dual_clip": 3.0},
    "archer": {"stat_scope": "batch"},
}


def batch(
    weights: tuple[float, float] = (1.0, 1.0),
    *,
    dtype: torch.dtype = F64,
    log_ratios: list[float] = LOG_RATIOS,
    **settings: Any,
) -> LossInputs:
    """Every log ratio with every advantage and kind of probability, in 5 sequences of uneven length, in mixed order."""
    random = torch.Generator().manual_seed(1)
    grid = torch.cartesian_prod(
        torch.tensor(log_ratios, dtype=F64),
        torch.tensor(ADVANTAGES).double(),
        torch.tensor(LOGPROBS).double(),
    )
    size = len(grid)
    d, advantages, base = grid[torch.randperm(size, generator=random)].unbind(1)
    base = base - 0.1 * torch.rand(size, dtype=F64, generator=random)
    logprobs, old_logprobs = (base + d.clamp(max=0)).to(dtype), (base - d.clamp(min=0)).to(dtype)
    ids = torch.tensor([0, 1, 2, 3, -1]).repeat_interleave(torch.tensor([*LENGTHS, size - sum(LENGTHS)]))
    mask = (torch.arange(size) % 5 != 2) & (ids >= 0) & (ids != 2)

    def noise(scale: float) -> Tensor:
        return (scale * torch.randn(size, dtype=F64, generator=random)).to(dtype)

    inputs = LossInputs(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=old_logprobs,
        advantages=advantages.to(dtype),
        response_mask=mask,
        bounds=clip_bounds(
            logprobs.exp(), BlendWeights(upper=weights[0], lower=weights[1]), lines=ThresholdLines()
        ),
        entropy=(0.05 + 2 * torch.rand(size, dtype=F64, generator=random)).to(dtype).requires_grad_(),
        alignment=noise(0.2),
        rollout_logprobs=old_logprobs + noise(0.5),
        reference_logprobs=logprobs.detach() + noise(0.5),
        entropy_coefs=(0.001 * (2 + ids)).to(dtype),
        sequence_ids=ids,
        update_lengths=torch.tensor([int((mask & (ids == i)).sum()) for i in range(4)]),
        max_response_tokens=50,
        seed=5,
    )
    return dataclasses.replace(inputs, **settings)


def gradient(output: LossOutput, inputs: LossInputs) -> Tensor:
    """[T] with respect to logprobs."""
    return torch.autograd.grad(output.loss_sum, inputs.logprobs, retain_graph=True)[0]


def token_losses(function: Callable[[LossInputs], LossOutput], inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """[T] each token's loss times its share in the aggregation, and [T] the gradient with respect to its logprob."""
    ones = torch.ones_like(inputs.logprobs, requires_grad=True)
    output = function(dataclasses.replace(inputs, weights=ones))
    losses, gradients = torch.autograd.grad(output.loss_sum, [ones, inputs.logprobs])
    return losses, gradients


def tokens_of(inputs: LossInputs) -> list[Token]:
    """For the oracle: each position in Python floats."""
    columns = {
        "lp": inputs.logprobs,
        "old": inputs.old_logprobs,
        "a": inputs.advantages,
        "low": inputs.bounds.eps_lower,
        "up": inputs.bounds.eps_upper,
        "h": inputs.entropy,
        "counts": inputs.response_mask,
        "sequence": inputs.sequence_ids,
        "alignment": inputs.alignment,
        "engine": inputs.rollout_logprobs,
        "anchor": inputs.reference_logprobs,
    }
    lists = [column.tolist() for column in columns.values() if column is not None]
    return [Token(**dict(zip(columns, row, strict=True))) for row in zip(*lists, strict=True)]


def in_response(values: Iterable[float], inputs: LossInputs) -> Tensor:
    """[T] fp64, 0 outside the response."""
    return torch.where(inputs.response_mask, torch.tensor(list(values), dtype=F64), 0.0)


def changed(inputs: LossInputs, function: Any) -> LossInputs:
    """function(name, values) of every floating [T] tensor, the distances of the bounds and int64 ids included."""
    size = len(inputs.logprobs)
    fields = {
        name: function(name, value)
        for name in (item.name for item in dataclasses.fields(inputs))
        if name != "update_lengths"
        and isinstance(value := getattr(inputs, name), Tensor)
        and len(value) == size
    }
    bounds = ClipBounds(
        eps_lower=function("eps_lower", inputs.bounds.eps_lower),
        eps_upper=function("eps_upper", inputs.bounds.eps_upper),
    )
    return dataclasses.replace(inputs, bounds=bounds, **fields)


def tokens_only(inputs: LossInputs, keep: Tensor) -> LossInputs:
    """The tokens of `inputs` that the places `keep` name, as another micro-batch; on the same graph."""
    return changed(inputs, lambda _, values: values[keep])


def leaf(inputs: LossInputs) -> LossInputs:
    """The same with logprobs and entropy on a graph of their own."""
    assert inputs.entropy is not None
    return dataclasses.replace(
        inputs,
        logprobs=inputs.logprobs.detach().clone().requires_grad_(),
        entropy=inputs.entropy.detach().clone().requires_grad_(),
    )


def parts_of(inputs: LossInputs, members: list[list[int]]) -> list[LossInputs]:
    """Micro-batches of whole sequences, as packing makes them."""
    assert inputs.sequence_ids is not None
    return [
        tokens_only(inputs, torch.isin(inputs.sequence_ids, torch.tensor(ids)).nonzero().flatten())
        for ids in members
    ]


def update_tokens(inputs: LossInputs) -> UpdateTokens:
    """The response tokens of an update that is one micro-batch; its sequences must be in the order of their ids."""
    mask = inputs.response_mask
    assert inputs.entropy is not None and inputs.alignment is not None and inputs.sequence_ids is not None
    return UpdateTokens(
        logprobs=inputs.logprobs.detach()[mask],
        old_logprobs=inputs.old_logprobs[mask],
        advantages=inputs.advantages[mask],
        entropy=inputs.entropy.detach()[mask],
        alignment=inputs.alignment[mask],
        bounds=ClipBounds(eps_lower=inputs.bounds.eps_lower[mask], eps_upper=inputs.bounds.eps_upper[mask]),
        sequence_ids=inputs.sequence_ids[mask],
        log_ratio_clamp=inputs.log_ratio_clamp,
        seed=inputs.seed,
    )


def marked(inputs: LossInputs, name: str, **options: Any) -> LossInputs:
    """With the marks of the loss `name` over these inputs as the whole update; as they are where it has none."""
    if name not in MARKS:
        return inputs
    marks = torch.zeros(len(inputs.logprobs))
    marks[inputs.response_mask] = MARKS[name](update_tokens(inputs), **options)
    return dataclasses.replace(inputs, marks=marks)
