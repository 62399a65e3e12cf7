"""The floors of the package: a module imports its own floor and lower ones, and heavy packages stay in their place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_fec"
FLOORS = {  # first part of the name below megatron_fec
    "": 0,  # megatron_fec itself: the version
    "types": 0,
    "config": 0,
    "errors": 0,
    "metrics": 0,
    "seeds": 0,
    "security": 0,
    "context_split": 0,
    "server_config": 0,
    "policy_options": 0,
    "precision_rules": 0,
    "algorithm": 0,
    "vocab_parallel": 1,
    "policy": 2,
    "rollout": 3,
    "tasks": 3,
    "trainer": 4,
    "token_loss": 4,
    "collection": 4,
    "strategy_state": 4,
    "step_dump": 4,
    "updates": 4,
    "stop": 4,
    "marks": 4,
    "job": 4,
    "launcher": 4,
    "warm_start": 4,
    "evaluate": 4,
    "evaluation_config": 4,
    "evaluation_files": 4,
    "evaluation_job": 4,
    "evaluation_results": 4,
    "engines": 4,
    "run_log": 4,
    "memory_log": 4,
    "report": 4,
    "study": 4,
    "rollout_dump": 4,
    "dump_reader": 4,
    "replay": 4,
    "replay_output": 4,
    "report_panels": 4,
    "preflight": 4,
    "hub": 4,
    "serving": 4,
    "convert": 4,
    "dry_run": 4,
    "planning": 4,
    "doctor": 4,
    "doctor_checks": 4,
    "doctor_inputs": 4,
    "doctor_nodes": 4,
    "doctor_bandwidth": 4,
    "cli": 5,
}
# Beside the floors: what a part must not import, and who alone may import a package.
FORBIDDEN = {
    "rollout": ("megatron_fec.policy", "megatron_fec.tasks"),
    "tasks": ("megatron_fec.policy", "megatron_fec.rollout", "megatron_fec.vocab_parallel", "torch"),
}
ONLY_IN = {
    "megatron": ("megatron_fec.policy",),
    "mbridge": ("megatron_fec.policy",),
    "transformer_engine": ("megatron_fec.policy",),
    "vllm": tuple(
        f"megatron_fec.rollout.vllm_{name}"
        for name in ("parts", "engine", "cpu_worker", "server", "transfer")
    ),
    "triton": ("megatron_fec.vocab_parallel.triton_kernel",),
}
MAX_LINES = 400
SOURCES = sorted(PACKAGE.rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in (
        "megatron_fec/**/*.py",
        "tests/**/*.py",
        "launch/*",
        "benchmarks/**/*.py",
        "configs/*.yaml",
        "*.md",
    )
    for path in ROOT.glob(pattern)
    if path.is_file() and "__pycache__" not in path.parts
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str) -> Iterator[str]:
    """Names that the source imports at any depth, type-checking blocks left out: those import nothing."""
    tree = ast.parse(source)
    unseen = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the floor; import from megatron_fec"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def part_of(module: str) -> str:
    """The key of FLOORS: `policy` of megatron_fec.policy.step."""
    return [*module.split("."), ""][1]


def floor(module: str) -> int:
    part = part_of(module)
    assert part in FLOORS, f"{module} has no floor: add it to FLOORS (docs: map of the code)"
    return FLOORS[part]


def broken_rules(source: str, module: str) -> list[str]:
    """What the imports of one module break, in words."""
    part = part_of(module)
    broken = []
    for name in imports(source, module):
        if is_inside(name, "megatron_fec") and part_of(name) in FLOORS and floor(name) > floor(module):
            broken.append(f"{module} (floor {floor(module)}) imports {name} (floor {floor(name)})")
        for package in FORBIDDEN.get(part, ()):
            if is_inside(name, package):
                broken.append(f"{module} imports {name}, which {part} must not")
        for package, owners in ONLY_IN.items():
            if is_inside(name, package) and not any(is_inside(module, owner) for owner in owners):
                broken.append(f"{module} imports {name}, which only {' and '.join(owners)} may")
    return broken


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down(path: Path):
    assert floor(module_name(path)) >= 0
    assert broken_rules(path.read_text(), module_name(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_fec.config", "import megatron_fec.policy.step"),
        ("megatron_fec.algorithm.losses", "from megatron_fec import vocab_parallel"),
        ("megatron_fec.algorithm.losses", "def f():\n    from megatron_fec.trainer import fit"),
        ("megatron_fec.rollout.native_engine", "from megatron_fec.policy.weights import stream"),
        ("megatron_fec.rollout.native_engine", "import vllm"),
        ("megatron_fec.tasks.prompts", "import torch.nn as nn"),
        ("megatron_fec.trainer", "from megatron.core import parallel_state"),
        ("megatron_fec.evaluate", "import mbridge"),
        ("megatron_fec.report", "from megatron_fec.cli import app"),
    ],
)
def test_the_check_can_fail(module: str, source: str):
    assert broken_rules(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "megatron_fec.policy.step",
            "import megatron.core\nfrom megatron_fec.vocab_parallel import token_stats",
        ),
        ("megatron_fec.rollout.vllm_engine", "from vllm import LLM"),
        ("megatron_fec.metrics", "import megatron_fec_other"),
        (
            "megatron_fec.types",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_fec.policy import x",
        ),
    ],
)
def test_the_check_accepts_what_is_allowed(module: str, source: str):
    assert broken_rules(source, module) == []


def test_a_module_without_a_floor_is_refused():
    with pytest.raises(AssertionError, match="has no floor"):
        floor("megatron_fec.helpers")


def loaded_by(modules: list[str], heavy: tuple[str, ...]) -> set[str]:
    """Which of the heavy packages a fresh interpreter holds after importing the modules."""
    code = f"import sys, {', '.join(modules)}\nprint(*({set(heavy)} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_floor_0_loads_nothing_heavy():
    modules = [module_name(path) for path in SOURCES if floor(module_name(path)) == 0]
    heavy = ("megatron", "mbridge", "vllm", "transformers", "datasets", "matplotlib", "wandb", "sympy")
    assert loaded_by(modules, heavy) <= {"sympy"}  # torch's own


def test_config_and_types_load_no_torch():
    assert (
        loaded_by(["megatron_fec.config", "megatron_fec.types", "megatron_fec.seeds"], ("torch", "numpy"))
        == set()
    )


def test_another_trainer_needs_nothing_but_torch_for_the_loss():
    modules = ["megatron_fec.algorithm.losses", "megatron_fec.vocab_parallel.token_stats"]
    assert loaded_by(modules, ("omegaconf", "yaml", "transformers", "megatron")) == set()


def test_verifier_processes_load_no_torch():
    modules = ["megatron_fec.tasks.scorers", "megatron_fec.tasks.verifier_worker"]
    assert loaded_by(modules, ("torch", "vllm", "megatron", "transformers")) == set()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_short(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_are_ascii(path: Path):
    lines = path.read_bytes().splitlines()
    assert [number for number, line in enumerate(lines, start=1) if not line.isascii()] == []
