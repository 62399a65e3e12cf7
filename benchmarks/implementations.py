"""What is compared: ours, and the peers that a user can install, imported from their packages.

An implementation takes (logits [T, V_local], labels [T] int64, group) and returns the log-probabilities [T]
and the entropy, [T] or, where the peer gives only a mean, its sum; None if it has no entropy.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from megatron_fec.vocab_parallel.token_stats import token_stats

Forward = Callable[[Tensor, Tensor, dist.ProcessGroup], tuple[Tensor, Tensor | None]]

OURS = "ours, gradient over the logits"
OURS_COPY = "ours"
OURS_ONE_BLOCK = "ours, one block a rank"  # without the same bits at every TP size
VERL = "verl"
ALIGNER = "NeMo-Aligner"
FP32_COPY = " on an fp32 copy"
INSTALL = ".venv/bin/python -m pip install --no-deps --target .peers -r requirements/benchmark.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    name: str
    forward: Forward
    entropy_rows: Callable[[Tensor], Tensor] | None = None  # [T, V_local] -> [T], if forward returns a sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    implementations: tuple[Implementation, ...]
    missing: tuple[str, ...]  # a line for each peer that cannot be imported here
    versions: dict[str, str]  # of all that is measured, by distribution name


def _ours(*, reuse_logits: bool, second_moments: bool = False) -> Forward:
    def forward(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        stats = token_stats(
            logits, labels, group=group, reuse_logits=reuse_logits, second_moments=second_moments
        )
        return stats.logprobs, stats.entropy

    return forward


def _one_block(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor | None]:
    with mock.patch("megatron_fec.vocab_parallel.shard.BLOCKS", 1):
        return _ours(reuse_logits=True)(logits, labels, group)


def _torch(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The lines that everyone writes first; over several ranks on the logits that megatron-core gathers."""
    if group.size() > 1:
        with _allocation_on(logits.device):
            logits = gather_from_tensor_model_parallel_region(logits)
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, labels[:, None]).squeeze(1), entropy


def _allocation_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """megatron-core's gather allocates on torch.cuda.current_device(), also for CPU tensors."""
    return mock.patch("torch.cuda.current_device", return_value=device)


def _megatron(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, None]:
    return -vocab_parallel_cross_entropy(logits, labels), None


def _megatron_fused(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, None]:
    return -fused_vocab_parallel_cross_entropy(logits, labels, group), None


def _on_fp32_copy(implementation: Implementation) -> Implementation:
    """Given bf16 logits as Megatron's Float16Module hands them on: as an fp32 copy."""

    def forward(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor | None]:
        return implementation.forward(logits.float(), labels, group)

    rows = implementation.entropy_rows
    return replace(
        implementation,
        name=implementation.name + FP32_COPY,
        forward=forward,
        entropy_rows=None if rows is None else lambda logits: rows(logits.float()),
    )


def _import_verl() -> list[Implementation]:
    from verl.utils.megatron.tensor_parallel import (  # pyright: ignore[reportMissingImports] # a peer
        vocab_parallel_entropy,
        vocab_parallel_log_probs_from_logits,
    )

    def forward(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """As in verl's Megatron engine: the clone, because megatron-core overwrites fp32 logits."""
        backup = logits.clone()
        entropy = vocab_parallel_entropy(logits)
        return vocab_parallel_log_probs_from_logits(backup, labels), entropy

    def with_fused(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        backup = logits.clone()
        entropy = vocab_parallel_entropy(logits)
        return -fused_vocab_parallel_cross_entropy(backup, labels, group), entropy

    return [
        Implementation(name=VERL, forward=forward),
        Implementation(name="megatron-core fused + verl's entropy", forward=with_fused),
    ]


def _import_aligner() -> list[Implementation]:
    from nemo_aligner.utils.distributed import (  # pyright: ignore[reportMissingImports] # a peer
        calculate_distributed_entropy,
        from_parallel_logits_to_logprobs,
    )

    def forward(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """As in its PPO actor; labels are shifted already. Its mean entropy omits the last token."""
        logprobs = from_parallel_logits_to_logprobs(
            logits[None], labels[None], higher_stability=True, ignore_last=False
        )
        with _allocation_on(logits.device):
            return logprobs[0], calculate_distributed_entropy(logits[None]) * (len(labels) - 1)

    def entropy_rows(logits: Tensor) -> Tensor:
        with _allocation_on(logits.device):
            return torch.stack([calculate_distributed_entropy(row.expand(1, 2, -1)) for row in logits])

    return [Implementation(name=ALIGNER, forward=forward, entropy_rows=entropy_rows)]


def find_peers() -> Peers:
    """All implementations that can be imported here, ours first."""
    found = [
        Implementation(name=OURS, forward=_ours(reuse_logits=True)),
        Implementation(name=OURS_COPY, forward=_ours(reuse_logits=False)),
        Implementation(name=OURS_ONE_BLOCK, forward=_one_block),
        Implementation(
            name="ours, with second moments", forward=_ours(reuse_logits=True, second_moments=True)
        ),
    ]
    names, missing = ["torch", "megatron-core"], []
    for name, load in {"verl": _import_verl, "nemo-aligner": _import_aligner}.items():
        try:
            found += _quietly(load)
            names.append(name)
        except ImportError as error:
            missing.append(f"{name} is not measured, it cannot be imported here ({error}): {INSTALL}")
    found += [
        Implementation(name="megatron-core, log-prob only", forward=_megatron),
        Implementation(name="megatron-core fused, log-prob only", forward=_megatron_fused),
        Implementation(name="torch, autograd", forward=_torch),
    ]
    versions = {name: importlib.metadata.version(name) for name in names}
    return Peers(implementations=tuple(found), missing=tuple(missing), versions=versions)


def for_dtype(
    implementations: Sequence[Implementation], dtype: torch.dtype, copied: Sequence[str]
) -> list[Implementation]:
    """For bf16 the implementations named in `copied` also on the fp32 copy that their trainers feed them."""
    chosen = []
    for implementation in implementations:
        chosen.append(implementation)
        if dtype != torch.float32 and implementation.name in copied:
            chosen.append(_on_fp32_copy(implementation))
    return chosen


def _quietly(load: Callable[[], list[Implementation]]) -> list[Implementation]:
    """load() without the hundred lines that these packages print about what else is not installed."""
    text = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        warnings.simplefilter("ignore")
        return load()
