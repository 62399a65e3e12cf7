"""The command line of a rollout server: what it refuses before an engine is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from run_fixtures import CONFIG, ROOT

from megatron_fec.config import ConfigError
from megatron_fec.serving import bind_address


@pytest.mark.parametrize("name", ["0.0.0.0", "", "0"])
def test_all_interfaces_only_where_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=r"would serve every network .* or add --all-interfaces"):
        bind_address(name, all_interfaces=False)
    assert bind_address(name, all_interfaces=True) == "0.0.0.0"


def test_an_address_or_a_name() -> None:
    assert bind_address("127.0.0.2", all_interfaces=False) == "127.0.0.2"
    assert bind_address("localhost", all_interfaces=False) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"--bind no\.such\.node is not an address"):
        bind_address("no.such.node", all_interfaces=False)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), "--config", CONFIG, "--port", "6000"]
    done = subprocess.run(
        [*command, "--bind", "0.0.0.0", f"trainer.run_dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --bind 0.0.0.0 would serve every network")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
