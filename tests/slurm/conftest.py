"""The cluster of the tests that need one; they are in the files cluster_*.py, which `make test-slurm` names."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest
from cluster import Cluster


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    folder = Path(mkdtemp(prefix="fec"))
    made = Cluster(folder)
    plugin = folder / "container_plugin.so"
    source = Path(__file__).with_name("container_plugin.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(plugin), str(source)], check=True)
    made.control("up", "--nodes", "3", "--gpus", "2", "--spank", str(plugin))
    try:
        yield made
    finally:
        made.control("down")
        if request.session.testsfailed:
            print(f"\nthe cluster's logs and the jobs' output are in {folder}")
        else:
            rmtree(folder)
