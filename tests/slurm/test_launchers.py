"""The launchers without Slurm: what they print in a dry run, and what they say to wrong input."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TRAINING = ("train_qwen7b.sh", "train_qwen7b_fp8.sh", "train_qwen32b.sh", "rollout_and_train.sh")
LAUNCHERS = (*TRAINING, "evaluate.sh")
TRUE = "/bin/true"  # in place of Python, where a test looks at the shell's part alone


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """bash slurm/SCRIPT ARGUMENTS, outside of any Slurm job."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(
        ["bash", f"slurm/{script}", *arguments],
        cwd=ROOT,
        env=clean | {"PYTHON": TRUE, "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def dry_run(script: str, *arguments: str, **environment: str) -> dict[str, list[str]]:
    """The words of every srun line of a dry run, by its title."""
    done = launch(script, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    lines = [line.partition(": ") for line in done.stdout.splitlines() if ": srun" in line]
    return {title: shlex.split(words) for title, _, words in lines}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses(script: Path):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""


def test_the_list_of_launchers_is_whole():
    assert {path.name for path in SCRIPTS} == {*LAUNCHERS, "common.sh", "node.sh"}


@pytest.mark.parametrize(
    ("script", "nodes"), [("train_qwen7b.sh", 1), ("train_qwen32b.sh", 4), ("evaluate.sh", 1)]
)
def test_one_task_a_node(script: str, nodes: int):
    for arguments, count in (((), nodes), (("--nodes=3",), 3)):
        steps = dry_run(script, *arguments)
        for words in steps.values():
            assert words[:3] == ["srun", "--label", "--kill-on-bad-exit=1"]
            assert {f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"} <= set(words)
            assert not [word for word in words if word.startswith("--container")]


def test_the_steps_of_a_training_job():
    steps = dry_run("train_qwen7b.sh", "algorithm.schedule.name=od")
    assert list(steps) == ["preflight", "train"]
    node = str(ROOT / "slurm" / "node.sh")
    arguments = [
        "--config",
        "configs/qwen7b_id.yaml",
        "algorithm.schedule.name=od",
        "trainer.run_dir=runs/qwen7b_id",
    ]
    assert steps["preflight"][-8:] == ["bash", node, "run", "launch/doctor.py", *arguments]
    assert steps["train"][-8:] == ["bash", node, "torchrun", "launch/train.py", *arguments]
    assert list(dry_run("train_qwen7b.sh", DOCTOR="off")) == ["train"]


def test_the_steps_of_rollouts_and_training():
    steps = dry_run("rollout_and_train.sh", "--nodes=4", "rollout.tensor_parallel=2", ENGINE_NODES="3")
    assert {"--nodelist=node2,node3,node4", "--nodes=3", "--ntasks=12", "--ntasks-per-node=4"} <= set(
        steps["engines"]
    )
    assert {"--nodelist=node1", "--nodes=1", "--ntasks=1"} <= set(steps["train"])
    for title in ("engines", "train"):
        assert steps[title][-2:] == ["rollout.engine=servers", "rollout.tensor_parallel=2"]


@pytest.mark.parametrize("script", TRAINING)
def test_overrides_keep_their_quoting(script: str):
    override = 'data.prompt_column=a b\'s "$HOME" `id` * \\n'
    for words in dry_run(script, override).values():
        assert override in words


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ((), {}, "runs/qwen7b_id"),
        ((), {"CONFIG": "configs/tiny_cpu.yaml"}, "runs/tiny_cpu"),
        ((), {"RUN_DIR": "runs/with space"}, "runs/with space"),
        (("trainer.run_dir=runs/x", "trainer.run_dir=runs/y"), {"RUN_DIR": "runs/z"}, "runs/y"),
        ((), {"SLURM_ARRAY_TASK_ID": "3"}, "runs/qwen7b_id/seed_3"),
    ],
)
def test_the_run_folder(arguments: tuple[str, ...], environment: dict[str, str], expected: str):
    words = dry_run("train_qwen7b.sh", *arguments, **environment)["train"]
    assert words[-1] == f"trainer.run_dir={expected}"
    assert ("trainer.seed=3" in words) == ("SLURM_ARRAY_TASK_ID" in environment)


def test_settings_from_the_environment():
    words = dry_run(
        "train_qwen7b.sh",
        CONTAINER_IMAGE="registry#fec:1",
        CONTAINER_MOUNTS="/data:/data",
        SRUN_OPTIONS="--mpi=pmix --cpu-bind=none",
        SLURM_CPUS_PER_TASK="64",
    )["train"]
    assert words[7:13] == [
        "--cpus-per-task=64",
        "--container-image=registry#fec:1",
        f"--container-mounts={ROOT}:{ROOT},/data:/data",
        f"--container-workdir={ROOT}",
        "--mpi=pmix",
        "--cpu-bind=none",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINING)
def test_the_dry_run_shows_the_run(script: str):
    done = launch(script, "--dry-run", PYTHON=sys.executable, GPUS_PER_NODE="8")
    assert done.returncode == 0, done.stderr
    for title in ("# rank layout", "# batch arithmetic"):
        assert title in done.stdout
    assert ": srun " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {"CONFIG": "configs/none.yaml"}, "CONFIG=configs/none.yaml does not exist. The project's own are in configs/."),
        (("--nodes=0",), {}, "--nodes=0 must be a whole number from 1."),
        (("--nodes=2-4",), {}, "--nodes=2-4 must be a whole number from 1."),
        ((), {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0 must be a whole number from 1."),
        ((), {"MAX_RESTARTS": "many"}, "MAX_RESTARTS=many must be a whole number from 0."),
        ((), {"DOCTOR": "yes"}, "DOCTOR=yes must be on or off."),
        ((), {"REQUEUE": "0"}, "REQUEUE=0 must be on or off."),
        ((), {"CONTAINER_MOUNTS": "/data:/data"}, "CONTAINER_MOUNTS=/data:/data needs CONTAINER_IMAGE."),
        (("--node=2",), {}, "--node=2 is not an option of slurm/train_qwen7b.sh. Options of sbatch stand before"),
        (("od",), {}, "argument od must have the form key=value, such as trainer.max_steps=4."),
        (("trainer.max_step=4",), {"PYTHON": sys.executable}, "trainer.max_step is not a setting"),
    ],
)  # fmt: skip
def test_wrong_input_gives_one_clear_line(
    arguments: tuple[str, ...], environment: dict[str, str], message: str
):
    done = launch("train_qwen7b.sh", "--dry-run", *arguments, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert "srun" not in done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ENGINE_NODES": "2"}, "ENGINE_NODES=2 of 2 nodes leave none to train on. Take more (sbatch --nodes=N)."),
        ({"ENGINE_GPUS": "3"}, "ENGINE_GPUS=3 must divide the 8 GPUs of a node."),
        ({"ENGINE_RESTARTS": "-1"}, "ENGINE_RESTARTS=-1 must be a whole number from 0."),
    ],
)  # fmt: skip
def test_wrong_engine_settings_give_one_clear_line(environment: dict[str, str], message: str):
    done = launch("rollout_and_train.sh", "--dry-run", **environment)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


@pytest.mark.parametrize("script", LAUNCHERS)
def test_without_slurm_the_way_on_is_named(script: str):
    done = launch(script)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: this is no Slurm job. Submit it (sbatch slurm/{script}), or add --dry-run to see what it would do.\n"
    )


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_is_the_head_of_the_script(script: str):
    done = launch(script, "--help")
    assert done.returncode == 0
    assert f"sbatch slurm/{script}" in done.stdout
    assert "#SBATCH" not in done.stdout


def test_the_cluster_tests_say_what_they_lack(tmp_path: Path):
    """Not root, or a machine without Slurm and apt-get: one line, and nothing fails."""
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    done = subprocess.run(
        [shutil.which("bash") or "", str(ROOT / "tests" / "slurm" / "run.sh")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    missing = (
        "apt-get is not there to install slurm-wlm munge"
        if os.geteuid() == 0
        else "a local Slurm needs root."
    )
    assert done.stdout.startswith(f"test-slurm: SKIPPED, {missing}")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("script", LAUNCHERS)
def test_what_sbatch_is_told(script: str):
    lines = (ROOT / "slurm" / script).read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {"--ntasks-per-node=1", "--exclusive", "--mem=0", "--requeue", "--open-mode=append"} <= options
    assert "--output=%x-%j.out" in options  # a folder that is missing would end the job without a word
    assert bool([option for option in options if option.startswith("--signal=B:USR1@")]) == (
        script in TRAINING
    )
