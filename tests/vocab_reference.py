"""Float64 oracle for the statistics of next-token distributions and their gradients, one row at a time.

Columns without probability are removed first, so that infinities need no care; gradients come from autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabReference:
    """All float64; rows with label -100 have log-probability 0 and gradient 0."""

    logprobs: Tensor  # [T]
    entropy: Tensor  # [T]
    sum_p2: Tensor  # [T]
    baseline: Tensor  # [T] sum of p^2 (ln p + H)
    alignment: (
        Tensor  # [T] inner product of the gradients of log p(label) and of H; 0 where the label is ignored
    )
    logprobs_gradient: Tensor  # [T, V_padded] of sum(grad_logprobs * logprobs)
    entropy_gradient: Tensor  # [T, V_padded] of sum(grad_entropy * entropy), ignored rows 0


def vocab_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    temperature: float = 1.0,
) -> VocabReference:
    """logits: [T, V_padded]; columns from vocab_size on, and columns at -inf, have probability 0."""
    values = torch.zeros(5, len(labels), dtype=torch.float64)
    gradients = torch.zeros(2, *logits.shape, dtype=torch.float64)
    for t, label in enumerate(labels.tolist()):
        columns = torch.nonzero(torch.isfinite(logits[t, :vocab_size])).flatten()
        z = logits[t, columns].double().detach().requires_grad_()
        logp = torch.log_softmax(z / temperature, 0)
        p = logp.exp()
        entropy = -(p * logp).sum()
        values[1, t] = entropy.item()
        values[2, t] = (p**2).sum().item()
        values[3, t] = (p**2 * (logp + entropy)).sum().item()
        if label == -100:
            continue
        (entropy_gradient,) = torch.autograd.grad(entropy, z, retain_graph=True)
        gradients[1, t, columns] = grad_entropy[t].double() * entropy_gradient
        if label not in columns.tolist():
            values[0, t] = -torch.inf  # no gradient is defined; the limit has -p_j in every column
            values[4, t] = -(p * entropy_gradient).sum().item() * temperature
            continue
        logprob = logp[columns.tolist().index(label)]
        values[0, t] = logprob.item()
        (logprob_gradient,) = torch.autograd.grad(logprob, z)
        gradients[0, t, columns] = grad_logprobs[t].double() * logprob_gradient
        values[4, t] = (logprob_gradient * entropy_gradient).sum().item() * temperature**2
    return VocabReference(
        logprobs=values[0],
        entropy=values[1],
        sum_p2=values[2],
        baseline=values[3],
        alignment=values[4],
        logprobs_gradient=gradients[0],
        entropy_gradient=gradients[1],
    )
