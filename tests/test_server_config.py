"""The rules of rollout.engine=servers and rollout.max_lag."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_fec.config import ConfigError, load_config, save_config
from megatron_fec.preflight import check_servers
from megatron_fec.rollout.engine_folder import EngineAddress, key_id, make_key, write_address

TINY = Path(__file__).parents[1] / "configs" / "tiny_cpu.yaml"
SERVERS = "rollout.engine=servers"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([SERVERS, "rollout.max_lag=2"], r"rollout\.max_lag=2 must be 0 or 1"),
        (["rollout.max_lag=-1"], r"rollout\.max_lag=-1 must be 0 or 1"),
        (
            ["rollout.max_lag=1"],
            r"rollout\.max_lag=1 needs rollout\.engine=servers, not vllm.* or set rollout\.max_lag=0",
        ),
        (
            [SERVERS, "rollout.seed_per_request=false"],
            r"rollout\.seed_per_request=false does not go with rollout\.engine=servers.* Set it to true",
        ),
        (
            [SERVERS, "policy.options.offload=all"],
            r"policy\.options\.offload=all does not go with rollout\.engine=servers.* Set it to none",
        ),
    ],
)
def test_broken_rules(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, overrides)


@pytest.mark.parametrize(
    ("lag", "loss", "resolved"),
    [
        (0, "clip", "clip"),
        (1, "clip", "clip+truncated_importance"),
        (1, "clip+entropy_bonus", "clip+entropy_bonus+truncated_importance"),
        (1, "clip+masked_importance", "clip+masked_importance"),
        (1, "clip+truncated_importance", "clip+truncated_importance"),
    ],
)
def test_staleness_is_corrected_unless_the_loss_says_how(
    lag: int, loss: str, resolved: str, tmp_path: Path
) -> None:
    config = load_config(TINY, [SERVERS, f"rollout.max_lag={lag}", f"algorithm.policy_loss={loss}"])
    assert config.algorithm.policy_loss == resolved
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_cap_of_the_weights_can_be_set() -> None:
    settings = [SERVERS, "rollout.max_lag=1", "algorithm.options.importance_cap=1.5"]
    assert load_config(TINY, settings).algorithm.options == {"importance_cap": 1.5}


def test_a_run_without_servers_is_refused_before_a_weight_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.engine=servers: .*key cannot be read"):
        check_servers(tmp_path)
    key = make_key(tmp_path)
    with pytest.raises(
        ConfigError, match=r"names no engine of this job's key. Start one with launch/serve.py"
    ):
        check_servers(tmp_path)
    address = EngineAddress(
        name="10.0.0.1:6000", host="10.0.0.1", port=6000, node="n1", instance="a", key_id=key_id(key)
    )
    write_address(tmp_path, address)
    check_servers(tmp_path)
    os.chmod(tmp_path / "key", 0o644)
    with pytest.raises(ConfigError, match="mode 600"):
        check_servers(tmp_path)
