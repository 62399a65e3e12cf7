"""tests/gpu on a machine without GPUs: each test is skipped, and says what it needs and how to run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ("-m", "pytest", "tests/gpu", "-rs", "-q", "-p", "no:cacheprovider")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, `make test-gpu` runs them")
def test_every_gpu_test_is_skipped_with_its_command() -> None:
    done = subprocess.run([sys.executable, *ARGUMENTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = re.findall(
        r"needs CUDA devices: (\d), has 0; python -m pytest (tests/gpu/(?:test_\w+\.py)) -k", done.stdout
    )
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert {file for _, file in commands} == files
    assert {count for count, _ in commands} == {"1", "2"}
    assert "passed" not in done.stdout and "failed" not in done.stdout
