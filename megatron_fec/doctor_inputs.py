"""What can be wrong with a run's inputs on one node: preflight's own functions, each with a finding of its own.

The weights of a hub name are not downloaded: the run's first start does that.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers.utils.logging import disable_progress_bar

from megatron_fec.config import Config, ConfigError
from megatron_fec.doctor_nodes import FAULT, OK, WARNING, Finding, Node
from megatron_fec.dry_run import find_hf_config
from megatron_fec.policy.checkpoint import read_trainer_state
from megatron_fec.policy.checkpoint_files import find_checkpoints, read_manifest
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.sizes import parameter_count
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.preflight import (
    EMBEDDED,
    check_disk,
    check_model,
    check_vllm_package,
    load_tokenizer,
    read_prompts,
)
from megatron_fec.tasks.arithmetic import VOCABULARY

WANDB_HOST = "https://api.wandb.ai"


def input_checks(node: Node, config: Config) -> dict[str, Callable[[], Finding]]:
    """By name; each raises ConfigError or returns what it found. They may run at the same time."""
    disable_progress_bar()
    run_dir = Path(config.trainer.run_dir)
    model_dir = _local_model(config, run_dir)
    checks: dict[str, Callable[[], Finding]] = {
        "wandb": lambda: check_wandb(node, config, os.environ),
        "engine": lambda: _check_engine(node, config),
    }
    if model_dir is None:
        return checks | {"model": lambda: _check_hub_model(node, config)}
    hf_config = cache(lambda: load_hf_config(str(model_dir)))
    tokenizer = cache(lambda: load_tokenizer(config.model, model_dir, hf_config()))
    checks["model"] = lambda: _check_model(node, config, hf_config())
    checks["disk"] = lambda: _check_disk(node, config, run_dir, model_dir)
    checks["checkpoint"] = lambda: _check_checkpoint(node, config, run_dir, hf_config())
    for setting, source in {"train": config.data.train, "validation": config.data.validation}.items():
        if source is not None:
            checks[f"data.{setting}"] = _data_check(node, config, setting, source, tokenizer)
    return checks


def _local_model(config: Config, run_dir: Path) -> Path | None:
    """A folder with the checkpoint; None for a hub name of which this node has no copy."""
    path = config.model.path
    if path == EMBEDDED:
        made = run_dir / "model"
        if not made.is_dir():
            made = Path(tempfile.mkdtemp(prefix="doctor_"))
            save_tiny_model(made, VOCABULARY, seed=0)
        return made
    if Path(path).is_dir():
        return Path(path)
    try:
        cached = Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return cached if any(cached.glob("*.safetensors")) else None


def _check_engine(node: Node, config: Config) -> Finding:
    if config.rollout.engine == "vllm":
        check_vllm_package()
    return node.finding("engine", OK, config.rollout.engine)


def _check_hub_model(node: Node, config: Config) -> Finding:
    hf_config, reason = find_hf_config(config)
    if hf_config is None:
        raise ConfigError(reason)
    check_model(config, hf_config)
    size = 2 * parameter_count(hf_config) / 1e9
    return node.finding(
        "model",
        WARNING,
        f"model.path={config.model.path} is not in this node's cache: the start downloads about {size:.1f} GB, on every "
        "node with a cache of its own. Room on disk and the prompts were not checked. Fetch it once to a shared folder.",
    )


def _check_model(node: Node, config: Config, hf_config: Any) -> Finding:
    check_model(config, hf_config)
    return node.finding("model", OK, f"{config.model.path}: {parameter_count(hf_config):,} parameters")


def _check_disk(node: Node, config: Config, run_dir: Path, model_dir: Path) -> Finding:
    run_dir.mkdir(parents=True, exist_ok=True)
    check_disk(config, run_dir, model_dir)
    return node.finding("disk", OK, f"{run_dir} has {shutil.disk_usage(run_dir).free / 1e9:.1f} GB free")


def _check_checkpoint(node: Node, config: Config, run_dir: Path, hf_config: Any) -> Finding:
    found = find_checkpoints(run_dir / "checkpoints")
    if not found:
        return node.finding("checkpoint", OK, "none: the run starts at step 0")
    newest = found[-1]
    if config.trainer.resume == "never":
        raise ConfigError(
            f"trainer.resume=never, but {newest.parent} holds {newest.name}. Use another trainer.run_dir."
        )
    try:  # the checksums are compared by the run itself: that reads all of it
        for name in read_manifest(newest):
            with (newest / name).open("rb") as file:
                file.read(1)
    except (ValueError, FileNotFoundError) as error:
        return node.finding(
            "checkpoint", WARNING, f"{newest} is damaged ({error}): the run looks for an older one"
        )
    state = read_trainer_state(
        newest, hf_config=hf_config, distributed_optimizer=config.policy.distributed_optimizer
    )
    return node.finding("checkpoint", OK, f"{newest} can be read: the run goes on at step {state.step}")


def _data_check(
    node: Node, config: Config, setting: str, source: str, tokenizer: Callable[[], Any]
) -> Callable[[], Finding]:
    def check() -> Finding:
        name = f"data.{setting}"
        prompts = read_prompts(config, name, source, tokenizer())
        left_out = f", {prompts.num_too_long} too long" if prompts.num_too_long else ""
        return node.finding(name, OK, f"{source}: {len(prompts.prompts)} prompts{left_out}")

    return check


def check_wandb(node: Node, config: Config, environment: Mapping[str, str]) -> Finding:
    """The package and the login; only the first node reports to wandb. A key is never shown."""
    mode = config.trainer.wandb
    if mode == "off":
        return node.finding("wandb", OK, "off")
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"trainer.wandb={mode} needs the wandb package. Install it or set trainer.wandb=off."
        )
    if mode == "online" and node.rank == 0:
        host = urlsplit(environment.get("WANDB_BASE_URL", WANDB_HOST)).hostname or ""
        if not environment.get("WANDB_API_KEY") and not _has_login(host):
            return node.finding(
                "wandb",
                FAULT,
                f"trainer.wandb=online, and this node is not logged in to {host}: the run would ask for a key that nobody "
                "types. Run wandb login, or set trainer.wandb=offline.",
            )
    return node.finding("wandb", OK, mode)


def _has_login(host: str) -> bool:
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host) is not None
    return False
