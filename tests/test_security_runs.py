"""Whole runs with secrets in the environment and a trap in the checkpoint: what they write, say and refuse."""

import hashlib
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_fixtures import COMMAND, DEADLINE, outcome

from megatron_fec.policy.checkpoint_files import MANIFEST

pytestmark = pytest.mark.slow

HAS_WANDB = importlib.util.find_spec("wandb") is not None
SECRETS = {
    "WANDB_API_KEY": "5eed" * 10,
    "HF_TOKEN": "hf_GeheimGeheimGeheimGeheimGeheim",
    "AWS_SECRET_ACCESS_KEY": "GeheimAws/Geheim+Geheim",
    "FEC_PLANTED_PASSWORD": "geheim-passwort-4711",
}
RUN = {
    "model.path": "embedded",
    "data.train": "embedded:countdown",
    "data.validation": "embedded:countdown:validation",
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 2,
    "trainer.max_steps": 2,
    "trainer.dump_every": 1,
    "trainer.wandb": "offline" if HAS_WANDB else "off",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, output) of a run that trains to its end, started where new files are writable for everyone."""
    folder = tmp_path_factory.mktemp("planted") / "run"
    umask = os.umask(0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        try:
            code, text = outcome(folder, RUN)
        finally:
            os.umask(umask)
    assert code == 0, text
    return folder, text


def leaks(folder: Path, text: str) -> list[str]:
    """Where a secret stands: a file, or the output."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    places = {str(path.relative_to(folder)): path.read_bytes() for path in files} | {"output": text.encode()}
    return [
        f"{name} in {place}"
        for place, content in places.items()
        for name, value in SECRETS.items()
        if value.encode() in content
    ]


def test_a_run_writes_no_secret(run: tuple[Path, str]) -> None:
    folder, text = run
    assert {"config.yaml", "metrics.jsonl", "report.html", "dumps", "hf"} <= {
        path.name for path in folder.iterdir()
    }
    assert (folder / "wandb").is_dir() == HAS_WANDB
    assert leaks(folder, text) == []


def test_a_run_leaves_nothing_that_everyone_may_write(run: tuple[Path, str]) -> None:
    folder, _ = run
    modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")] if not path.is_symlink()}
    own = {path: mode for path, mode in modes.items() if "wandb" not in path.parts}
    assert [path for path, mode in own.items() if mode & 0o002] == []
    assert any(mode & 0o020 for mode in own.values())  # the group may, as the umask says


def test_a_traceback_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    code, text = outcome(folder, RUN | {"rollout.mismatch_limit": 1e-12}, launcher="megatron-fec")
    assert code == 1
    assert "Traceback" in text and "RunError: step 0: trainer and engine log-probs differ" in text
    assert leaks(folder, text) == []


def test_a_password_in_a_setting_stops_a_run_before_it_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, text = outcome(
        folder, RUN | {"data.train": "https://user:geheim-passwort-4711@example.org/rows.jsonl"}
    )
    assert code == 2
    assert "error: data.train holds a URL with a user's name or password" in text
    assert "geheim" not in text
    assert not folder.exists()


class Trap:
    """Runs a command when it is read through pickle."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


def test_a_checkpoint_that_a_stranger_may_have_written_is_not_read(
    run: tuple[Path, str], tmp_path: Path
) -> None:
    """Neither to go on nor to convert, though the checksums are right; the trap in it does work."""
    folder, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(run[0], folder)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    metadata = checkpoint / ".metadata"
    sums = checkpoint / MANIFEST
    original = hashlib.sha256(metadata.read_bytes()).hexdigest()
    metadata.write_bytes(pickle.dumps(Trap(canary)))
    metadata.chmod(0o666)
    changed = sums.read_text().replace(original, hashlib.sha256(metadata.read_bytes()).hexdigest())
    assert changed != sums.read_text()
    sums.write_text(changed)
    code, text = outcome(folder, RUN | {"trainer.max_steps": 3})
    assert code == 2
    assert f"error: trainer.resume: {metadata} can be written by every user of this machine" in text
    converted = subprocess.run(
        [sys.executable, "-c", COMMAND, "convert", str(checkpoint), str(tmp_path / "hf")],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert converted.returncode == 2
    assert "can be written by every user" in " ".join(converted.stderr.split())
    assert not canary.exists()
    pickle.loads(metadata.read_bytes())
    assert canary.exists()
