"""Models by their hub name."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from megatron_fec.errors import ConfigError

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def hub_model(path: str) -> Path:
    """The local folder of a model.path that is no folder itself; fetched once."""
    try:
        return Path(snapshot_download(path, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path={path} is neither a folder nor a hub name that can be fetched: {str(error).splitlines()[0]} "
            "Give a folder with config.json and *.safetensors, or check the name and the network."
        ) from error
