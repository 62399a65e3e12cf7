"""The benchmark's measuring pieces on a tiny vocabulary; a peer that cannot be imported is skipped."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from implementations import ALIGNER, OURS, OURS_COPY, VERL, Peers, find_peers
from measure import CollectiveCounter, Measurement, extra_bytes
from ranks import run_on_ranks
from report import Run, Setting, markdown, save_plot
from token_stats import on_cpu, workload

TOKENS, VOCABULARY = 16, 512
# Collectives of a call on two ranks, forward and backward; peers' counts as read in their sources.
COLLECTIVES = {
    OURS: (1, 0),
    OURS_COPY: (1, 0),
    "ours, with second moments": (1, 0),
    VERL: (6, 0),
    "megatron-core fused + verl's entropy": (5, 0),
    ALIGNER: (4, 0),
    "megatron-core, log-prob only": (3, 0),
    "megatron-core fused, log-prob only": (2, 0),
    "torch, autograd": (1, 0),
}


@pytest.fixture(scope="module")
def peers() -> Peers:
    return find_peers()


@pytest.fixture(scope="module", params=[1, 2])
def setting(request: pytest.FixtureRequest, peers: Peers) -> Setting:
    work = workload(TOKENS, VOCABULARY, torch.float32)
    with torch._dynamo.config.patch(disable=True):  # compiling is most of the time, and not ours to test
        results = on_cpu(
            list(peers.implementations), work, tensor_parallel=request.param, timed_tokens=8, repeats=1
        )
    return Setting(tensor_parallel=request.param, dtype="fp32", results=results)


def measured(setting: Setting, peers: Peers, name: str) -> Measurement:
    if name not in setting.results:
        pytest.skip("; ".join(peers.missing))
    return setting.results[name]


@pytest.mark.parametrize("name", COLLECTIVES)
def test_agrees_with_the_float64_reference(setting: Setting, peers: Peers, name: str) -> None:
    row = measured(setting, peers, name)
    assert row.logprobs_error < 1e-5
    assert (row.entropy_error is None) == ("log-prob only" in name)
    assert (row.entropy_error or 0.0) < 1e-4  # uncentred sums of the peers lose digits
    assert row.gradient_error < (2**-7 if "fused" in name else 1e-4)  # megatron-core's fused one is bf16
    assert row.is_within_tolerance or not name.startswith("ours")
    assert 0.0 < row.seconds < 1.0


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_of_each_implementation(setting: Setting, peers: Peers, name: str) -> None:
    row = measured(setting, peers, name)
    if setting.tensor_parallel == 2:
        assert row.collectives == COLLECTIVES[name]
        assert row.bytes_per_token[0] >= 12 and row.bytes_per_token[1] == 0
    else:
        assert row.bytes_per_token == (0, 0)


def test_an_error_is_seen(peers: Peers) -> None:
    """A log-probability off by 1e-3, and the gradient that belongs to it, are what is reported."""

    def forward(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup):
        logprobs, entropy = peers.implementations[0].forward(logits, labels, group)
        return logprobs * 1.01 + 1e-3, entropy

    wrong = replace(peers.implementations[0], forward=forward)
    work = workload(TOKENS, VOCABULARY, torch.float32)
    row = on_cpu([wrong], work, tensor_parallel=2, timed_tokens=8, repeats=1)[OURS]
    assert row.logprobs_error > 1e-3 and not row.is_within_tolerance
    assert row.gradient_error > 1e-3


def count_some(rank: int) -> tuple[int, int]:
    alias = dist.all_gather_into_tensor  # as megatron-core keeps it
    with CollectiveCounter() as counter:
        dist.all_reduce(torch.ones(3))
        alias(torch.zeros(10, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
        dist.all_gather([torch.zeros(7), torch.zeros(7)], torch.ones(7))
    return counter.calls, counter.bytes


def test_collective_counter() -> None:
    assert run_on_ranks(2, count_some) == [(3, 3 * 4 + 5 * 8 + 7 * 4)] * 2


def extra_memory(rank: int) -> tuple[int, int]:
    size = 64 << 20
    held: list[torch.Tensor] = []
    kept = extra_bytes(lambda: held.append(torch.ones(size, dtype=torch.uint8)), "cpu")
    passing = extra_bytes(lambda: held.append(torch.ones(2 * size, dtype=torch.uint8)[:1].clone()), "cpu")
    return kept // size, passing // size


def test_extra_memory_counts_what_is_kept_and_what_is_freed_again() -> None:
    assert run_on_ranks(1, extra_memory) == [(1, 2)]


def a_run(peers: Peers) -> Run:
    return Run(
        device="cpu",
        versions=peers.versions,
        missing=peers.missing,
        tokens=TOKENS,
        timed_tokens=8,
        vocabulary=VOCABULARY,
        repeats=1,
        reference_rows=TOKENS - 1,
        copy_bandwidth=None,
    )


def test_table_and_plot(setting: Setting, peers: Peers, tmp_path: Path) -> None:
    text = markdown([setting], a_run(peers))
    for name in setting.results:
        assert f"\n| {name} | " in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(tables)) == 1
    save_plot([setting], a_run(peers), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_targets_are_judged(peers: Peers) -> None:
    good = Measurement(
        seconds=1.0,
        extra_memory=0.05,
        collectives=(1, 0),
        bytes_per_token=(16, 0),
        logprobs_error=1e-6,
        entropy_error=1e-6,
        is_within_tolerance=True,
        gradient_error=1e-7,
    )
    bad = replace(
        good,
        seconds=1.2,
        extra_memory=1.2,
        collectives=(2, 0),
        is_within_tolerance=False,
        gradient_error=1e-5,
    )
    results = {OURS: good, OURS_COPY: good, VERL: replace(good, seconds=2.0)}
    text = markdown([Setting(tensor_parallel=2, dtype="fp32", results=results)], a_run(peers))
    assert "NOT REACHED" not in text and text.count("- pass: ") == 6
    results |= {OURS: bad, OURS_COPY: bad}
    text = markdown([Setting(tensor_parallel=2, dtype="fp32", results=results)], a_run(peers))
    assert "- pass: " not in text and text.count("**NOT REACHED**") == 6


def test_a_missing_peer_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("verl", "nemo_aligner"):
        monkeypatch.setitem(sys.modules, name, None)
        for module in [module for module in sys.modules if module.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
    found = find_peers()
    assert [item.name for item in found.implementations if item.name in (VERL, ALIGNER)] == []
    assert len(found.missing) == 2
    assert all("requirements/benchmark.lock" in line for line in found.missing)
