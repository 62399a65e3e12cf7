"""Weights that are kept in FP8 (policy.options.fp8_params), as plain bf16 tensors where mbridge reads or writes them.

Gathering and scattering move the bytes of a tensor, and those of an FP8 weight mean nothing without its scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.tensor_parallel import copy_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn import Parameter


@contextmanager
def plain_weights(
    models: Sequence[torch.nn.Module],
    *,
    keep: bool = False,
    is_quantized: Callable[[Tensor], bool] = is_float8tensor,
    dequantize: Callable[[Tensor], Tensor] = dequantize_fp8_tensor,
) -> Iterator[None]:
    """Inside the block the models' FP8 weights are bf16 copies, which take 2 bytes each; elsewhere nothing happens.

    keep: the FP8 weights then take the copies' values, and the copies themselves become the first fp32 weights of the
    optimizer, which else starts from the values that the model was created with, or from values rounded to FP8.
    """
    held = [
        (module, name, weight)
        for model in models
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and is_quantized(weight)
    ]
    copies: list[Parameter] = []
    try:
        for module, name, weight in held:
            copy = Parameter(dequantize(weight.detach()).clone(), requires_grad=weight.requires_grad)
            copy_tensor_model_parallel_attributes(copy, weight)
            module._parameters[name] = copy
            copies.append(copy)
        yield
    finally:
        for module, name, weight in held:
            module._parameters[name] = weight
    if keep:
        for (_, _, weight), copy in zip(held, copies, strict=True):
            _take(weight, copy.detach())


@torch.no_grad()
def _take(weight: Parameter, value: Tensor) -> None:
    weight.copy_(value)  # quantizes
    # Transformer Engine's place for it, read and cleared by megatron-core's distributed optimizer.
    if hasattr(weight, "get_high_precision_init_val"):
        weight._high_precision_init_val = value.cpu()  # type: ignore[attr-defined]
