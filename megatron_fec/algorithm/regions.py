"""The four regions E1 to E4 of section 3 of arXiv 2602.09782."""

from __future__ import annotations

from torch import Tensor

REGION_RATIO = 0.3  # the paper looks at ratios closer to 1 than this,
LIKELY, UNLIKELY = 0.7, 0.3  # and calls a token of p > LIKELY high, of p <= UNLIKELY low


def region_masks(probs: Tensor, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """[T] bool by name: E1 to E4. A > 0 and 1 < r < 1.3, or A < 0 and 0.7 < r < 1; with p high, or low."""
    up = (advantages > 0) & (ratio > 1) & (ratio < 1 + REGION_RATIO)
    down = (advantages < 0) & (ratio < 1) & (ratio > 1 - REGION_RATIO)
    high, low = probs > LIKELY, probs <= UNLIKELY
    return {"E1": up & high, "E2": up & low, "E3": down & high, "E4": down & low}
