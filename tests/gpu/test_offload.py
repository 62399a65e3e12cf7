"""policy.options.offload=all on GPUs: memory really falls, and what comes back is what left, to the bit.

python -m pytest tests/gpu/test_offload.py      # the second test needs two GPUs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu_ranks import on_gpus


def make_model(rank: int, folder: str) -> None:
    from gpu_models import save_model

    save_model(Path(folder))


def round_trip(rank: int, folder: str) -> dict[str, Any]:
    """Two updates, everything away and back, a third update."""
    import torch
    from gpu_models import build
    from policy_fixtures import make_groups, nll_step, pack_for

    from megatron_fec.policy.device import device
    from megatron_fec.policy.offload import Offload, _bytes_of, storages_of

    def allocated() -> int:
        return torch.cuda.memory_allocated() if device().type == "cuda" else 0

    def bits(kind: Any) -> list[torch.Tensor]:
        return [_bytes_of(storage).to("cpu", copy=True) for storage in storages_of(policy, kind)]

    def is_same(kind: Any) -> bool:
        return all(torch.equal(now, then) for now, then in zip(bits(kind), before[kind], strict=True))

    policy = build(folder)
    (batch,) = pack_for(policy, make_groups())
    losses = [nll_step(policy, batch)[0] for _ in range(2)]
    policy.optimizer.zero_grad()
    offload = Offload(policy, "all", policy_samples=False)
    before = {kind: bits(kind) for kind in ("weights", "optimizer")}
    sizes = {
        kind: sum(s.nbytes() for s in storages_of(policy, kind))
        for kind in ("weights", "gradients", "optimizer")
    }
    whole = allocated()
    offload.enter("generate")
    away = allocated()
    offload.enter("logprobs")
    weights_only = allocated()
    offload.enter("train")
    return {
        "sizes": sizes,
        "freed": whole - away,
        "for_logprobs": weights_only - away,
        "back": allocated() - whole,
        "is_pinned": all(memory.is_pinned() for memory in offload._host.values()),
        "same": all(is_same(kind) for kind in before),
        "gradients": all(not part.any() for part in bits("gradients")),
        "losses": [*losses, nll_step(policy, batch)[0]],
    }


def check(seen: dict[str, Any]) -> None:
    assert seen["same"] and seen["gradients"] and seen["is_pinned"]
    assert all(seen["sizes"].values())
    assert seen["freed"] >= sum(seen["sizes"].values())
    assert seen["sizes"]["weights"] <= seen["for_logprobs"] <= 1.1 * seen["sizes"]["weights"]
    assert abs(seen["back"]) <= 0.01 * seen["freed"]
    assert max(seen["losses"][1:]) < seen["losses"][0]


@pytest.mark.gpu
def test_one_gpu(tmp_path: Path) -> None:
    on_gpus(1, make_model, str(tmp_path))
    (seen,) = on_gpus(1, round_trip, str(tmp_path))
    check(seen)


@pytest.mark.gpu(2)
def test_two_gpus_share_the_optimizer(tmp_path: Path) -> None:
    on_gpus(1, make_model, str(tmp_path))
    ranks = on_gpus(2, round_trip, str(tmp_path))
    for seen in ranks:
        check(seen)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert ranks[0]["sizes"]["optimizer"] < 4 * ranks[0]["sizes"]["weights"]  # of 6 times, half
