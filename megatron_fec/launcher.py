"""The entry of one rank: reads the command line, works, and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable

import torch

from megatron_fec.config import ConfigError, load_config
from megatron_fec.evaluation_config import load_evaluation
from megatron_fec.stop import end_time, listen


def main() -> None:
    """Trains. Exit codes: 0 finished or stopped as asked, 2 a setting is wrong (said once, by rank 0), 1 anything else.

    A finished run has a file DONE in its folder; a stopped one goes on when the same command is given again.
    """
    listen()
    parser = _parser("Train a policy with entropy-controlled GRPO.")
    parser.add_argument(
        "--end-time",
        type=end_time,
        metavar="EPOCH_SECONDS",
        help="save and stop before this time, such as $(($(date +%%s) + 3600))",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what the run would do, and end")
    parser.add_argument(
        "--nodes",
        type=_count,
        default=os.environ.get("SLURM_JOB_NUM_NODES", "1"),
        help="of the dry run (default: those of the Slurm job, or 1)",
    )
    parser.add_argument("--gpus-per-node", type=_count, default=8, help="of the dry run (default 8)")
    _run(parser, _train)


def evaluate_main() -> None:
    """Evaluates; the same exit codes."""
    _run(_parser("Sample benchmarks and report mean@k and pass@k."), _evaluate)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="a YAML file; the project's own are in configs/")
    parser.add_argument("overrides", nargs="*", help="settings in the form key=value")
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], object]) -> None:
    arguments = parser.parse_args()
    be_one_rank()
    try:
        work(arguments)
    except ConfigError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _train(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    # Imported after the configuration is known to be right: megatron-core takes seconds.
    if arguments.dry_run:
        from megatron_fec.dry_run import dry_run_text

        print(dry_run_text(config, nodes=arguments.nodes, gpus_per_node=arguments.gpus_per_node))
        return
    from megatron_fec.job import train

    train(config, end_time=arguments.end_time)


def _evaluate(arguments: argparse.Namespace) -> None:
    config = load_evaluation(arguments.config, arguments.overrides)
    from megatron_fec.evaluation_job import evaluate  # for the same reason

    evaluate(config)


def _free_port() -> int:
    """A port for a world of one; torchrun's ranks bring theirs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def be_one_rank() -> None:
    """Defaults for a run outside torchrun, one thread a rank on CPU, and no chatter of libraries."""
    os.umask(os.umask(0) | 0o002)  # a checkpoint that everyone may write would not be loaded (security.py)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    quiet_libraries()


def quiet_libraries() -> None:
    """Leaves out what libraries say about themselves at import, once a rank; none of it is in the user's hands."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for message in (".*(Apex|apex|Transformer Engine|transformer_engine)", "full scope is deprecated"):
        warnings.filterwarnings("ignore", message=message)
    for name in ("torch._library.triton", "vllm.triton_utils.importing"):
        logging.getLogger(name).setLevel(logging.ERROR)
