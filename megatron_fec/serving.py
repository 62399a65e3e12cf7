"""The command behind launch/serve.py: checks, builds the engine, says where it is, and serves until it is told to end."""

from __future__ import annotations

import argparse
import ipaddress
import os
import shutil
import signal
import socket
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from megatron_fec.config import Config, ConfigError, load_config
from megatron_fec.hub import hub_model
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.precision_rules import check_rollout_gpu
from megatron_fec.rollout.engine import true_vocab_size, vllm_is_available
from megatron_fec.rollout.engine_folder import EngineAddress, FolderError, key_id, make_key, write_address
from megatron_fec.rollout.server import RolloutServer, ServedEngine
from megatron_fec.tasks.arithmetic import VOCABULARY

EMBEDDED = "embedded"


def main() -> None:
    """Exit codes: 0 it was told to end, 2 a setting is wrong, 1 anything else; whoever started it starts it again."""
    parser = argparse.ArgumentParser(description="One vLLM engine for a trainer with rollout.engine=servers.")
    parser.add_argument("--config", required=True, help="the trainer's YAML file")
    parser.add_argument(
        "--bind", required=True, help="address of the cluster's interface; no other one is served"
    )
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument(
        "--all-interfaces", action="store_true", help="allow --bind 0.0.0.0: every network of this node"
    )
    parser.add_argument("overrides", nargs="*", help="the trainer's settings in the form key=value")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries about themselves, at import
    disable_progress_bar()
    try:
        config = load_config(arguments.config, arguments.overrides)
        address = bind_address(arguments.bind, all_interfaces=arguments.all_interfaces)
        serve(config, address=address, port=arguments.port)
    except (ConfigError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def bind_address(name: str, *, all_interfaces: bool) -> str:
    """The IPv4 address of --bind; every interface at once only where that is asked for."""
    try:
        found = socket.gethostbyname(name)
    except OSError as error:
        raise ConfigError(
            f"--bind {name} is not an address of this node: {error.strerror}. Give one of `hostname -I`."
        ) from error
    if not name or ipaddress.ip_address(found).is_unspecified:
        if not all_interfaces:
            raise ConfigError(
                f"--bind {name or repr(name)} would serve every network that this node has. Give the address of the "
                "cluster's interface, or add --all-interfaces if that is meant."
            )
        return "0.0.0.0"
    return found


def serve(config: Config, *, address: str, port: int) -> None:
    """Returns when the process is told to end."""
    run_dir = Path(config.trainer.run_dir)
    folder = run_dir / "engines"
    key = make_key(folder)
    engine = _engine(config, run_dir, address)
    server = RolloutServer(engine, bind=address, port=port, key=key)
    node = socket.gethostname()
    host = node if address == "0.0.0.0" else address
    name = f"{host}:{port}"
    path = write_address(
        folder,
        EngineAddress(
            name=name,
            host=host,
            port=server.port,
            node=node,
            instance=server.instance,
            key_id=key_id(key),
        ),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    print(f"engine {name} on {node} answers", flush=True)
    try:
        server.run()
    except BaseException as error:
        # vLLM's own shutdown can wait for what is broken.
        print(f"engine {name} on {node} ends: {type(error).__name__}: {error}", file=sys.stderr)
        _exit(1)
    path.unlink(missing_ok=True)
    engine.close()
    _exit(0)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _engine(config: Config, run_dir: Path, address: str) -> ServedEngine:
    if not vllm_is_available():
        raise ConfigError(
            "launch/serve.py needs vLLM, which is not installed. Install the extra rollout-cpu or gpu."
        )
    rollout = config.rollout
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    check_rollout_gpu(rollout.precision, config.policy.precision, capability=capability)
    model_dir = _model_dir(config, run_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    # Imported only here: vLLM is an optional extra, and importing it takes seconds.
    from megatron_fec.rollout.vllm_server import ServedVllm

    return ServedVllm(
        model_dir=str(model_dir),
        vocab_size=true_vocab_size(tokenizer),
        dtype="float32" if config.policy.precision == "fp32" else "bfloat16",
        tensor_parallel=rollout.tensor_parallel,
        max_model_len=rollout.max_prompt_tokens + rollout.max_response_tokens,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        is_fp8=rollout.precision == "fp8",
        bind=address,
    )


def _model_dir(config: Config, run_dir: Path) -> Path:
    """Architecture and tokenizer; the weights come from the trainer. Servers may start before it, and together."""
    path = config.model.path
    if path == EMBEDDED:
        target = run_dir / "model"
        if not target.is_dir():
            writing = run_dir / f".writing_model_{socket.gethostname()}_{os.getpid()}"
            save_tiny_model(writing, VOCABULARY, seed=config.trainer.seed)
            with suppress(OSError):  # another one was first, with the same bytes
                writing.rename(target)
            shutil.rmtree(writing, ignore_errors=True)
        return target
    if Path(path).is_dir():
        return Path(path)
    return hub_model(path)
