"""Published architectures that come with the package, so that a plan needs neither network nor cache.

models/NAME.json holds the fields of the checkpoint's config.json that decide its sizes.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("models")
# Hub name -> parameters as published: `total_size` / 2 of the bf16 checkpoint's model.safetensors.index.json.
PUBLISHED = {
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
}


def shipped_config(name: str) -> Path | None:
    """The file of a hub name that is known here, else None."""
    return FOLDER / f"{name.rsplit('/', 1)[-1]}.json" if name in PUBLISHED else None
