"""What can be wrong with one machine: packages, Python, GPUs, limits and shell variables.

Each check reads, and a pure function beside it judges. Values of variables are shown only for the few that are named
here; none of them can hold a secret.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_fec.doctor_nodes import FAULT, OK, WARNING, Finding, Node

PROJECT = Path(__file__).resolve().parents[1]
LOCKS = tuple(
    PROJECT / "requirements" / name for name in ("base.lock", "rollout-cpu.lock", "mcore19-py312.lock")
)
DISTRIBUTION = "megatron_fec"
MEGABYTE, GIGABYTE = 1e6, 1e9
# Shared memory and open files: (a fault below, a warning below).
SHM_BYTES = (128 * MEGABYTE, 1 * GIGABYTE)
OPEN_FILES = (256, 4096)
GPU_FREE = (0.8, 0.95)  # share of a GPU that is free before the run starts
SHOWN = (  # variables whose values are printed
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "NCCL_ALGO",
    "NCCL_CUMEM_ENABLE",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_IB_GID_INDEX",
    "NCCL_IB_HCA",
    "NCCL_IB_TIMEOUT",
    "NCCL_NET",
    "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
Versions = dict[str, str]


# ------------------------------------------------------------------ packages


def installed_versions() -> Versions:
    """Version of every distribution that Python finds, and of Python; the first on the path counts."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(canonicalize_name(name), distribution.version)
    return versions


def pinned_versions(locks: Iterable[Path]) -> dict[str, set[str]]:
    """Versions in the lock files; torch is in their first line, because its build depends on the machine."""
    tested: dict[str, set[str]] = {}
    for lock in locks:
        for line in lock.read_text().splitlines():
            pinned = re.match(r"([A-Za-z0-9._-]+)==([^\s;#]+)", line) or re.match(
                r"#.*\b(torch) (\d[\d.]*\d)", line
            )
            if pinned:
                tested.setdefault(canonicalize_name(pinned[1]), set()).add(pinned[2])
    return tested


def check_packages(node: Node, found: Versions, locks: Iterable[Path] = ()) -> list[Finding]:
    """Against the ranges that the project declares, and the tested versions; `locks` are to be met exactly."""
    exact = tuple(locks)
    known = [lock for lock in exact or LOCKS if lock.is_file()]
    lost = [str(lock) for lock in exact if lock not in known]
    if lost:
        text = f"--lock {', '.join(lost)} does not exist. Name a file with lines such as omegaconf==2.4.0."
        return [node.finding("packages", FAULT, text)]
    if not known:
        text = "the lock files are not beside the package, so versions were not compared. Install with pip install -e."
        return [*_check_ranges(node, found), node.finding("packages", WARNING, text)]
    return [
        *_check_ranges(node, found),
        judge_packages(node, found, pinned_versions(known), is_exact=bool(exact)),
    ]


def judge_packages(node: Node, found: Versions, tested: Mapping[str, set[str]], *, is_exact: bool) -> Finding:
    other = [
        f"{name} is {found[name]}, tested {' or '.join(sorted(versions))}"
        for name, versions in sorted(tested.items())
        if name in found and _public(found[name]) not in {_public(version) for version in versions}
    ]
    absent = sorted(name for name in tested if name not in found)
    if is_exact:
        other += [f"{name} is not installed, wanted {' or '.join(sorted(tested[name]))}" for name in absent]
    if other:
        remedy = (
            "Install the lock file." if is_exact else "Only the tested set was run: make setup installs it."
        )
        return node.finding("packages", FAULT if is_exact else WARNING, f"{'; '.join(other)}. {remedy}")
    left_out = f"; not installed: {', '.join(absent)}" if absent else ""
    return node.finding("packages", OK, f"{len(tested) - len(absent)} of the tested versions{left_out}")


def _check_ranges(node: Node, found: Versions) -> list[Finding]:
    """A FAULT for each package that the project needs and that is missing or of a version it is not written for."""
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return []  # run from a folder on the path: pyproject.toml was never applied
    declared = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    return judge_ranges(node, found, declared, python=metadata["Requires-Python"] or "")


def judge_ranges(
    node: Node, found: Versions, declared: Iterable[Requirement], *, python: str
) -> list[Finding]:
    faults = []
    if found["python"] not in SpecifierSet(python):
        faults.append(("python", f"Python {found['python']} must be {python}. Use another interpreter."))
    for requirement in declared:
        is_extra = "extra" in str(requirement.marker)
        version = found.get(canonicalize_name(requirement.name))
        if version is None and not is_extra:
            text = f"{requirement.name} is not installed, and {requirement} is needed. Run make setup."
            faults.append(("packages", text))
        if version is not None and not requirement.specifier.contains(
            Version(version).public, prereleases=True
        ):
            name, allowed = requirement.name, requirement.specifier
            faults.append(("packages", f"{name} is {version} and must be {allowed}. Install such a version."))
    return [node.finding(check, FAULT, text) for check, text in faults]


def check_same_packages(node: Node, names: list[str], versions: list[Versions | None]) -> Finding:
    """Against the other nodes: a package must have one version in the whole job. versions: of each node, by rank."""
    own = versions[node.rank]
    assert own is not None
    others = [each for each in versions if each is not None]
    odd = []
    for name in sorted({name for each in others for name in each}):
        counts = Counter(each.get(name, "absent") for each in others)
        usual = max(counts, key=lambda version: (counts[version], version == others[0].get(name, "absent")))
        mine = own.get(name, "absent")
        if mine != usual:
            holder = next(
                n
                for n, each in zip(names, versions, strict=True)
                if each and each.get(name, "absent") == usual
            )
            odd.append(f"{name} is {mine} here and {usual} on {holder}")
    if odd:
        text = f"{'; '.join(odd)}. All nodes must run one set. Use one environment on a shared file system."
        return node.finding("same-packages", FAULT, text)
    return node.finding("same-packages", OK, f"one set of {len(own)} on {len(others)} nodes")


def _public(version: str) -> str:
    """Without the build: torch is 2.13.0 and 2.13.0+cpu alike."""
    return Version(version).public


# ------------------------------------------------------------------ the machine


def check_gpus(node: Node, *, expected: int | None) -> Finding:
    """Number and free memory. expected: processes of this node, which need a GPU each."""
    if not torch.cuda.is_available():
        has_driver = Path("/proc/driver/nvidia/version").exists()
        return judge_no_gpu(node, has_driver=has_driver, hidden=os.environ.get("CUDA_VISIBLE_DEVICES") == "")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    return judge_gpus(node, names, memory, expected=expected)


def judge_no_gpu(node: Node, *, has_driver: bool, hidden: bool) -> Finding:
    if hidden:
        return node.finding("gpus", OK, "none, as CUDA_VISIBLE_DEVICES= says: runs on CPU")
    if has_driver:
        text = (
            f"the node has an NVIDIA driver, and torch {torch.__version__} sees no GPU. The run would go on the CPU. Look "
            "at nvidia-smi, at the container's GPU option, and that torch is a CUDA build."
        )
        return node.finding("gpus", FAULT, text)
    return node.finding("gpus", WARNING, "none: megatron-core runs on CPU through the development adapter")


def judge_gpus(
    node: Node, names: list[str], memory: list[tuple[int, int]], *, expected: int | None
) -> Finding:
    """memory: (free, all) bytes of each."""
    if expected is not None and len(names) < expected:
        text = f"{len(names)} of the GPUS_PER_NODE={expected} are there. Lower it, or leave the node out with --exclude."
        return node.finding("gpus", FAULT, text)
    used = [
        (free / total, f"GPU {number} has {free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free")
        for number, (free, total) in enumerate(memory)
        if free / total < GPU_FREE[1]
    ]
    if used:
        level = FAULT if min(share for share, _ in used) < GPU_FREE[0] else WARNING
        text = f"{'; '.join(text for _, text in used)}. Another process is on it: look at nvidia-smi."
        return node.finding("gpus", level, text)
    least = min(free for free, _ in memory) / GIGABYTE
    return node.finding("gpus", OK, f"{len(names)} x {names[0]}, {least:.1f} GB free or more")


def check_limits(node: Node) -> list[Finding]:
    """Shared memory, which NCCL and vLLM use between processes, and open files."""
    shm = shutil.disk_usage("/dev/shm").free
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [judge_shm(node, shm), judge_open_files(node, files)]


def judge_shm(node: Node, free: float) -> Finding:
    remedy = "Give the container more, such as --shm-size=16g, or remove what is left in it."
    return _least(
        node, "shared-memory", free, SHM_BYTES, f"/dev/shm has {free / GIGABYTE:.2f} GB free", remedy
    )


def judge_open_files(node: Node, files: float) -> Finding:
    files = float("inf") if files == resource.RLIM_INFINITY else files
    return _least(node, "open-files", files, OPEN_FILES, f"ulimit -n is {files:g}", "Raise it before sbatch.")


def _least(
    node: Node, check: str, value: float, limits: tuple[float, float], figure: str, remedy: str
) -> Finding:
    for level, limit in zip((FAULT, WARNING), limits, strict=True):
        if value < limit:
            wanted = f"{limit / GIGABYTE:g} GB" if limit >= MEGABYTE else f"{limit:g}"
            return node.finding(check, level, f"{figure}; it should be at least {wanted}. {remedy}")
    return node.finding(check, OK, figure)


def check_variables(
    node: Node, environment: Mapping[str, str], *, engine: str | None, has_gpu: bool
) -> Finding:
    """The variables that decide how NCCL, Megatron and vLLM work. engine: rollout.engine, None without a config."""
    odd: list[tuple[str, str]] = []
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if re.search(r"expandable_segments\s*:\s*true", environment.get(name, ""), re.IGNORECASE):
            level = FAULT if has_gpu and engine not in (None, "native") else WARNING
            odd.append((level, f"{name} has expandable_segments, which break vLLM's sleep mode. Unset it."))
    if has_gpu and environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "1") != "1":
        odd.append(
            (WARNING, "CUDA_DEVICE_MAX_CONNECTIONS is not 1, on which Megatron's overlap relies. Unset it.")
        )
    for name in ("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
        if environment.get(name, "0") != "0":
            odd.append((WARNING, f"{name} is set, which is slow. Unset it unless the cluster needs it."))
    shown = [f"{name}={environment[name]}" for name in SHOWN if name in environment]
    hidden = sorted(name for name in environment if name.startswith("NCCL_") and name not in SHOWN)
    listed = (
        ", ".join([*shown, *(f"{name} (set)" for name in hidden)]) or "none of NCCL's and Megatron's is set"
    )
    if odd:
        level = FAULT if FAULT in [level for level, _ in odd] else WARNING
        return node.finding("variables", level, f"{' '.join(text for _, text in odd)} Set: {listed}")
    return node.finding("variables", OK, listed)
