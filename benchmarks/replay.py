"""How many tokens of a dump a replay evaluates a minute, on one core, with three strategies.

    .venv/bin/python benchmarks/replay.py [--tokens N] [--out FILE]

Writes a synthetic step of 8 updates to a temporary folder, replays it, and prints a Markdown report, with --out also to
a file. The clock runs over all of it: reading, checking and sorting the rows, evaluating, the table, JSON and plot.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import torch

from megatron_fec.algorithm.thresholds import ThresholdLines
from megatron_fec.replay import run_replay
from megatron_fec.replay_output import write_replay
from megatron_fec.rollout_dump import DumpSettings, RolloutDump
from megatron_fec.types import BlendWeights, MicroBatch, TokenStats

STRATEGIES = {
    "clip at three points": ["clip@grpo", "clip@dynamic_upper", "clip@dynamic_lower"],
    "three losses": ["clip+truncated_importance", "gspo", "steer"],
}
TARGET = 1_000_000  # tokens a minute
UPDATES, RESPONSE = 8, 500  # of the step; tokens of a response
VOCABULARY = 64
SETTINGS = DumpSettings(
    step=0,
    parts=1,
    group_size=8,
    policy_loss="clip",
    options={},
    schedule="id",
    weights=BlendWeights(upper=0.5, lower=0.0),
    lines=ThresholdLines(),
    aggregation="token_mean",
    log_ratio_clamp=20.0,
    max_response_tokens=RESPONSE,
)


def micro_batch(update: int, tokens: int, generator: torch.Generator) -> tuple[MicroBatch, TokenStats]:
    """One update of responses end to end; log-probs with the statistics of peaked random distributions."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    places = torch.arange(tokens)
    ids = places // RESPONSE + update * (tokens // RESPONSE + 1)
    lengths = torch.bincount(places // RESPONSE)
    logits = 5 * torch.rand(tokens, 1, generator=generator) * randn(tokens, VOCABULARY)
    logp = logits.log_softmax(-1)
    p, token = logp.exp(), torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    entropy, logprobs = -(p * logp).sum(-1), logp.gather(-1, token[:, None])[:, 0]
    surprise = logprobs + entropy
    baseline = (p.square() * (logp + entropy[:, None])).sum(-1)
    old = (logprobs + 0.1 * update * (1 - logprobs.exp()) * randn(tokens)).clamp(max=0)
    batch = MicroBatch(
        tokens=token,
        labels=token,
        position_ids=places % RESPONSE,
        cu_seqlens=torch.tensor([0]),
        max_seqlen=RESPONSE,
        sequence_ids=ids,
        response_mask=torch.ones(tokens, dtype=torch.bool),
        response_starts=places % RESPONSE == 0,
        response_lengths=lengths[places // RESPONSE],
        update_lengths=lengths,
        advantages=randn(len(lengths))[places // RESPONSE],
        rollout_logprobs=(old + 0.01 * randn(tokens)).clamp(max=0),
        old_logprobs=old,
        old_entropy=entropy,
    )
    alignment = baseline - logprobs.exp() * surprise
    stats = TokenStats(
        logprobs=logprobs, entropy=entropy, sum_p2=p.square().sum(-1), baseline=baseline, alignment=alignment
    )
    return batch, stats


def write_step(dumps: Path, tokens: int) -> tuple[float, int]:
    """(seconds in RolloutDump, bytes of the file)."""
    generator = torch.Generator().manual_seed(0)
    seconds = 0.0
    dump = RolloutDump(dumps, part=0, settings=SETTINGS)
    for update in range(UPDATES):
        batch, stats = micro_batch(update, tokens // UPDATES, generator)
        start = time.perf_counter()
        dump.add(update=update, epoch=0, seed=update, micro_batch=batch, stats=stats)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    path = dump.close()
    return seconds + time.perf_counter() - start, path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder)
        write_seconds, size = write_step(dumps, arguments.tokens)
        for name, strategies in STRATEGIES.items():
            start = time.perf_counter()
            replay = run_replay(dumps, strategies)
            write_replay(replay, dumps / "out")
            seconds = time.perf_counter() - start
            rate = replay.tokens / seconds * 60
            verdict = "met" if rate >= TARGET else "MISSED"
            cells = [
                name + ": " + ", ".join(strategies),
                replay.tokens,
                f"{seconds:.1f}",
                f"{rate / 1e6:.1f} million",
            ]
            lines.append("| " + " | ".join(map(str, [*cells, verdict])) + " |")
    report = [
        "# Replay of a dump: tokens a minute on one core\n",
        "| strategies | tokens | seconds | tokens a minute | target of 1 million |",
        "|---|---:|---:|---:|---|",
        *lines,
        "",
        f"Writing the dump took {write_seconds:.1f} s; it has {size / arguments.tokens:.0f} bytes a token.\n",
        f"Machine: {processor()}. torch {torch.__version__}, pyarrow {pa.__version__}. {datetime.date.today()}, "
        f"`python benchmarks/replay.py {' '.join(sys.argv[1:])}`.",
    ]
    print("\n".join(report))
    if arguments.out:
        arguments.out.write_text("\n".join(report) + "\n")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match[1] if match else platform.machine()


if __name__ == "__main__":
    main()
