"""What happens to rewards before the advantages: shaping by length, and which groups carry a signal.

A shaping is f(rewards [P, G], lengths [P, G], max_response_tokens, *, options) -> [P, G], one row a prompt; lengths are the
tokens of each response, its stop token included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_fec.algorithm.options import AtLeastOne, Positive
from megatron_fec.errors import ConfigError


def overlong(
    rewards: Tensor,
    lengths: Tensor,
    max_response_tokens: int,
    *,
    overlong_buffer: AtLeastOne,
    overlong_penalty: Positive = 1.0,
) -> Tensor:
    """R minus a penalty that rises over the last `overlong_buffer` tokens; DAPO, arXiv 2503.14476, eq. (13).

    With L the longest response allowed: 0 up to L - buffer, then linear, overlong_penalty at L and beyond. In fp32, or
    fp64 for fp64 rewards. DAPO has a buffer of 4096 tokens below 20480.
    """
    if overlong_buffer >= max_response_tokens:
        raise ConfigError(
            f"algorithm.options.overlong_buffer={overlong_buffer} must be less than "
            f"rollout.max_response_tokens={max_response_tokens}: the penalty begins that many tokens before the longest "
            "response. Lower it."
        )
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    excess = (lengths - (max_response_tokens - overlong_buffer)).to(rewards.dtype) / overlong_buffer
    return rewards - overlong_penalty * excess.clamp(0.0, 1.0)


REWARD_SHAPING: dict[str, Callable[..., Tensor]] = {"overlong": overlong}


def select_informative(rewards: Tensor) -> Tensor:
    """[P] bool, True where the rewards [P, G] of a group are not all equal; DAPO, arXiv 2503.14476, section 3.2.

    Takes the verifier's rewards, before any shaping: a group that is all wrong stays so, however its lengths differ.
    """
    return (rewards != rewards[:, :1]).any(1)
