"""Runs under torchrun and megatron-fec, stopped by the signals that Slurm and shells send, then finished and compared."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from run_fixtures import DEADLINE, SMALL, assert_same_weights, rows_of, started, train

from megatron_fec.rollout.engine import vllm_is_available
from megatron_fec.stop import DONE

pytestmark = pytest.mark.slow

ENDLESS = SMALL | {  # until a signal comes
    "rollout.engine": "vllm" if vllm_is_available() else "native",
    "rollout.tensor_parallel": 2,
    "optimizer.lr_schedule": "constant",
    "algorithm.schedule.total_steps": 9000,
    "trainer.max_steps": 9000,
    "trainer.keep_checkpoints": 2,
    "trainer.async_save": True,  # a stop waits for it
}


def wait_for(child: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not happened():
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def blocks_the_signal(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigBlk:")).split()[1]
    return bool(int(mask, 16) & 1 << signal.SIGUSR1 - 1)


def num_rows(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def stopped(
    run_dir: Path,
    *,
    after_rows: int,
    send: Callable[[subprocess.Popen[str]], None],
    launcher: str,
    prefix: str = "",
) -> tuple[int, str]:
    """(exit code, output) of an endless run that is sent a signal when it has so many rows."""
    with started(run_dir, ENDLESS, 2, launcher, prefix=prefix) as child:
        wait_for(child, lambda: num_rows(run_dir) >= after_rows)
        send(child)
        text, _ = child.communicate(timeout=DEADLINE)
        return child.returncode, text


def saved_steps(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*")), default=0)


def to_every_process_twice(child: subprocess.Popen[str]) -> None:
    """As srun does: to torchrun, the ranks, their verifier workers and Megatron's helpers."""
    everyone = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    assert len(everyone) >= 5
    for process in everyone * 2:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1)


def test_a_signal_during_the_imports_waits_for_the_first_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    one = ENDLESS | {"rollout.engine": "native", "rollout.tensor_parallel": 1, "policy.tensor_parallel": 1}
    with started(run_dir, one) as child:
        wait_for(child, lambda: blocks_the_signal(psutil.Process(child.pid)))
        child.terminate()
        text, _ = child.communicate(timeout=DEADLINE)
    assert child.returncode == 0, text
    assert "stopped by SIGTERM after 0 of 9000 steps: nothing is lost" in text
    assert num_rows(run_dir) == saved_steps(run_dir) == 0


def test_a_run_stopped_by_what_clusters_send_is_the_undisturbed_one(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shield = 'trap "" USR1'  # torchrun has no handler, and dies of it
    code, text = stopped(
        run_dir, after_rows=1, send=to_every_process_twice, launcher="torchrun", prefix=shield
    )
    first = saved_steps(run_dir)
    assert code == 0 and 1 <= first == num_rows(run_dir), text
    assert f"stopped by SIGUSR1 after {first} of 9000 steps: nothing is lost" in text
    assert "Traceback" not in text and "verifier" not in text, text  # no helper died of it

    code, text = stopped(
        run_dir, after_rows=first + 2, send=subprocess.Popen.terminate, launcher="megatron-fec"
    )
    second = saved_steps(run_dir)
    assert code == 128 + signal.SIGTERM and first + 2 <= second == num_rows(run_dir), text
    assert f"stopped by SIGTERM after {second} of 9000 steps: nothing is lost" in text
    assert "Traceback" not in text and "verifier" not in text, text

    finite = ENDLESS | {"trainer.max_steps": second + 2}
    assert not (run_dir / DONE).exists()
    train(run_dir, finite, processes=2)
    assert (run_dir / DONE).read_text() == f"{second + 2}\n"
    undisturbed = train(tmp_path / "undisturbed", finite | {"trainer.async_save": False}, processes=2)
    assert rows_of(run_dir) == rows_of(undisturbed)
    assert_same_weights(run_dir / "hf", undisturbed / "hf")
