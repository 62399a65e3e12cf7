"""The preflight of a job, on every node before the ranks start: it names node and fault, and its exit code stops the job.

srun starts it with one task a node; without Slurm it examines this machine. Nothing here waits without an end.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from megatron_fec.config import Config, ConfigError, load_config
from megatron_fec.doctor_bandwidth import check_bandwidth, check_local_gpus
from megatron_fec.doctor_checks import (
    Versions,
    check_gpus,
    check_limits,
    check_packages,
    check_same_packages,
    check_variables,
    installed_versions,
)
from megatron_fec.doctor_nodes import (
    FAULT,
    OK,
    WARNING,
    Finding,
    Node,
    NodeError,
    Nodes,
    check_clocks,
    check_shared_folder,
    meet,
    this_node,
)
from megatron_fec.launcher import be_one_rank

DEADLINE = 60.0  # seconds for all nodes to arrive and examine themselves
STEP_SECONDS = 15.0  # for each thing that they then do together
Checks = dict[str, Callable[[], Finding | Sequence[Finding]]]


def main() -> None:
    """Exit code 0: no FAULT on any node, 1: at least one."""
    parser = argparse.ArgumentParser(description="Examine the nodes of a job before it starts.")
    parser.add_argument(
        "--config", help="a YAML file; without it only the nodes are examined, not the run's inputs"
    )
    parser.add_argument(
        "--lock", action="append", default=[], help="a lock file whose versions must be there, exactly"
    )
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds for all nodes to arrive")
    parser.add_argument("overrides", nargs="*", help="settings in the form key=value")
    arguments = parser.parse_args()
    code = examine(
        arguments.config, arguments.overrides, locks=map(Path, arguments.lock), deadline=arguments.deadline
    )
    # Not sys.exit: a check that hangs in a file system or in NCCL would keep the interpreter from ending.
    os._exit(code)


def examine(
    config_path: str | Path | None,
    overrides: Sequence[str],
    *,
    locks: Iterable[Path],
    deadline: float,
) -> int:
    """Prints one line for each check of this node, on node 0 a summary too; the exit code is that of the whole job."""
    start = time.monotonic()
    node = this_node()
    be_one_rank()
    doctor = _Doctor(node)
    config = doctor.read_config(config_path, overrides)
    try:
        nodes = meet(node, seconds=deadline)
        nodes.announce("arrival", [node.name, config is not None])
        found = installed_versions()  # before imports that add folders of their own
        doctor.run(_machine_checks(node, config, found, tuple(locks)), end=start + deadline)
        if config is not None:
            doctor.run_input_checks(config, end=start + deadline)
        have_config = doctor.await_all(nodes, config is not None, seconds=start + deadline - time.monotonic())
        if nodes.are_whole:
            doctor.examine_together(nodes, config if all(have_config) else None, found)
        return doctor.verdict(nodes, took=lambda: time.monotonic() - start)
    except NodeError as fault:
        doctor.say(node.finding("rendezvous", FAULT, str(fault)))
        return 1


def _machine_checks(node: Node, config: Config | None, found: Versions, locks: tuple[Path, ...]) -> Checks:
    """What needs neither the run's inputs nor another node."""
    engine = config.rollout.engine if config else None
    return {
        "packages": lambda: check_packages(node, found, locks),
        "gpus": lambda: _check_all_gpus(node),
        "limits": lambda: check_limits(node),
        "variables": lambda: check_variables(
            node, os.environ, engine=engine, has_gpu=torch.cuda.is_available()
        ),
    }


def _check_all_gpus(node: Node) -> list[Finding]:
    """Each GPU, then all of them together, where there is more than one."""
    expected = int(text) if (text := os.environ.get("GPUS_PER_NODE")) else None
    findings = [check_gpus(node, expected=expected)]
    count = min(torch.cuda.device_count(), expected or torch.cuda.device_count())
    if count > 1 and findings[0].level != FAULT:
        findings.append(check_local_gpus(node, processes=count, backend="nccl", seconds=2 * STEP_SECONDS))
    return findings


class _Doctor:
    """The findings of this node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.findings: list[Finding] = []

    def say(self, finding: Finding) -> None:
        self.findings.append(finding)
        print(finding.line(), flush=True)

    def read_config(self, path: str | Path | None, overrides: Sequence[str]) -> Config | None:
        """None without a path, and of a configuration that is wrong or cannot be read on this node."""
        if path is None:
            return None
        try:
            config = load_config(path, list(overrides))
        except ConfigError as error:
            self.say(self.node.finding("config", FAULT, str(error)))
            return None
        self.say(self.node.finding("config", OK, str(path)))
        return config

    def run_input_checks(self, config: Config, *, end: float) -> None:
        """Those of the run's inputs; megatron-core's import is one of them."""
        checks: Checks = {}

        def load() -> Finding:
            start = time.monotonic()
            from megatron_fec.doctor_inputs import (
                input_checks,
            )  # seconds, and the first reading of many files

            checks.update(input_checks(self.node, config))
            return self.node.finding("imports", OK, f"megatron-core in {time.monotonic() - start:.1f} s")

        self.run({"imports": load}, end=end)
        self.run(checks, end=end)

    def run(self, checks: Checks, *, end: float) -> None:
        """All at the same time, in threads: one that hangs is named and left behind."""
        results: dict[str, Sequence[Finding]] = {}
        threads = {
            name: threading.Thread(target=self._store, args=(results, name, check), daemon=True)
            for name, check in checks.items()
        }
        for thread in threads.values():
            thread.start()
        for name, thread in threads.items():
            thread.join(max(0.0, end - time.monotonic()))
            late = f"not done in time: a file system or a device hangs. Look at dmesg of {self.node.name}."
            for finding in results.get(name, [self.node.finding(name, FAULT, late)]):
                self.say(finding)

    def _store(
        self,
        results: dict[str, Sequence[Finding]],
        name: str,
        check: Callable[[], Finding | Sequence[Finding]],
    ) -> None:
        try:
            found = check()
            results[name] = [found] if isinstance(found, Finding) else found
        except (ConfigError, NodeError) as error:
            results[name] = [self.node.finding(name, FAULT, str(error))]
        except Exception as error:  # whatever a library raises about a broken file or device is a finding
            results[name] = [self.node.finding(name, FAULT, f"{type(error).__name__}: {error}")]

    def await_all(self, nodes: Nodes, has_config: bool, *, seconds: float) -> list[bool]:
        """Whether each node has read the configuration; node 0 names those that never came."""
        arrived = nodes.gather("arrival", [self.node.name, has_config], seconds=max(1.0, seconds))
        nodes.names = [said[0] if said else nodes.names[rank] for rank, said in enumerate(arrived)]
        if self.node.rank == 0:
            for rank, said in enumerate(arrived):
                if said is None:
                    self._name_missing(nodes.names[rank], rank)
        return [said is not None and said[1] for said in arrived]

    def _name_missing(self, name: str, rank: int) -> None:
        text = (
            f"node {rank} of {self.node.count} never arrived at {self.node.address}. Look whether it is up and reaches "
            "this address; leave it out with --exclude."
        )
        self.say(Finding(node=name, check="arrival", level=FAULT, text=text))

    def examine_together(self, nodes: Nodes, config: Config | None, found: Versions) -> None:
        """What the nodes find out about each other, one thing after the other; a node that stops is named."""
        steps: list[tuple[str, Callable[[], Finding]]] = [
            ("same-packages", lambda: _same_packages(nodes, found)),
            ("clock", lambda: check_clocks(nodes, seconds=STEP_SECONDS)),
        ]
        if config is not None:
            folder = Path(config.trainer.run_dir).absolute()
            steps.append(("shared-folder", lambda: check_shared_folder(nodes, folder, seconds=STEP_SECONDS)))
        steps.append(("bandwidth", lambda: check_bandwidth(nodes, seconds=STEP_SECONDS)))
        for name, check in steps:
            self.run({name: check}, end=time.monotonic() + 3 * STEP_SECONDS)
            nodes.gather(f"after {name}", True, seconds=STEP_SECONDS)
            if not nodes.are_whole:
                return

    def verdict(self, nodes: Nodes, *, took: Callable[[], float]) -> int:
        """The exit code of the job, the same on every node; node 0 prints the summary."""
        own = [[each.node, each.check, each.level, each.text] for each in self.findings]
        everyone = nodes.gather("findings", own, seconds=STEP_SECONDS)
        found = [
            Finding(node=node, check=check, level=level, text=text)
            for findings in everyone
            for node, check, level, text in findings or []
        ]
        silent = [nodes.names[rank] for rank, findings in enumerate(everyone) if findings is None]
        faults = [each for each in found if each.level == FAULT]
        if self.node.rank == 0:
            warnings = sum(each.level == WARNING for each in found)
            print(
                f"doctor: {self.node.count - len(silent)} of {self.node.count} nodes answered, {len(found)} checks, "
                f"{warnings} with a warning, {len(faults)} with a FAULT, {took():.1f} s",
                flush=True,
            )
            for fault in faults:
                print(f"doctor: {fault.line()}", flush=True)
            for name in sorted(
                set(silent) - {fault.node for fault in faults}
            ):  # the others are named already
                print(f"doctor: {name} stopped answering: look whether it is still up", flush=True)
        nodes.gather(
            "summary", True, seconds=STEP_SECONDS
        )  # srun may end all nodes when one leaves with code 1
        nodes.part(seconds=STEP_SECONDS)
        return 1 if faults or silent else 0


def _same_packages(nodes: Nodes, found: Versions) -> Finding:
    versions = nodes.gather("packages", found, seconds=STEP_SECONDS)
    return check_same_packages(nodes.node, nodes.names, versions)
