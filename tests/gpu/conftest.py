"""Skips each test of this folder that lacks its GPUs, and says with which command to run it where they are.

`make test-gpu` runs them all. A test names its devices by the marker gpu(count), 1 unless given.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = torch.cuda.device_count()
    for item in items:
        if HERE not in item.path.parents:
            continue
        marker = item.get_closest_marker("gpu")
        assert marker is not None, f"{item.nodeid} is in tests/gpu and has no marker gpu"
        count = marker.args[0] if marker.args else 1
        if found < count:
            command = f"python -m pytest tests/gpu/{item.path.name} -k '{item.name}'"
            item.add_marker(pytest.mark.skip(reason=f"needs CUDA devices: {count}, has {found}; {command}"))
