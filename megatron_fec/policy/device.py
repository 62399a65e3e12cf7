"""The device that Megatron-Core runs on: CUDA, or a development adapter that lets the real megatron-core run on CPU.

megatron-core names "cuda" in literals, compares tensor type strings and keeps CUDA random states. The adapter redirects
exactly these entry points of torch to the CPU; nothing of megatron-core is replaced, no collective is mocked.
Every other line of the project is free of CPU special cases: it asks device() and backend().
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_fec.policy.device_experts import redirect_experts

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange")
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend of device()."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def local_rank() -> int:
    """torchrun's rank on this node, 0 outside torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def release_cached_memory() -> None:
    """Returns the memory of dead tensors to the driver, where another allocator, such as vLLM's, can have it.

    On CPU there is nothing to return, and looking for cycles would take a fifth of a small model's step.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def prepare_device() -> None:
    """Selects this rank's GPU, or installs the CPU adapter. Call once, before any megatron-core object is built."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    elif not getattr(torch.Tensor.type, "is_fec_adapter", False):
        _redirect_tensors()
        _redirect_cuda_namespace()
        _redirect_megatron_rng()
        redirect_experts()


def _redirect_tensors() -> None:
    # `with torch.device(...)` knows the factories by identity, from a table it fills once: fill it with the originals.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    plain_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The optimizer and gradient clipping compare this string with the CUDA names."""
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        return _TYPE_NAMES.get(self.dtype) or plain_type(self)

    type_name.is_fec_adapter = True  # type: ignore[attr-defined]
    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory with device="cuda" read as the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


class _InlineStream:
    """A stream or event of a device that finishes each operation before the next: there is nothing to wait for.

    A class, because other libraries name torch.cuda.Stream in annotations.
    """

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    def record_event(self, *args: Any, **kwargs: Any) -> _InlineStream:
        return self

    wait_stream = wait_event = record = wait = synchronize = _do_nothing


def _redirect_cuda_namespace() -> None:
    cpu = torch.device("cpu")
    # is_available() stays False: libraries beside megatron-core must go on seeing a machine without a GPU.
    replacements: dict[str, Any] = {
        "current_device": lambda: cpu,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "Stream": _InlineStream,
        "current_stream": _InlineStream,
        "default_stream": _InlineStream,
        "stream": lambda *args: contextlib.nullcontext(),
        "Event": _InlineStream,
        "get_device_capability": lambda *args: (0, 0),
        "get_device_properties": lambda *args: SimpleNamespace(major=0, minor=0, multi_processor_count=1),
        "manual_seed": torch.default_generator.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("manual_seed", "get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, replacements[name])


def _redirect_megatron_rng() -> None:
    """megatron-core binds these two names at import, so they are redirected where it holds them."""
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    megatron_random._lazy_init = _nothing
    # It warns that the CPU state moved while it held the "CUDA" state: here they are one.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
