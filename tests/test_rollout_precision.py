"""rollout.precision=fp8 reaches vLLM by the name that vLLM has for quantizing bf16 weights as they come."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from policy_fixtures import save_model

from megatron_fec.rollout.engine import vllm_is_available

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not vllm_is_available(), reason="vllm is not installed"),
]


def arguments(folder: Path, *, is_fp8: bool) -> dict[str, Any]:
    from megatron_fec.rollout.vllm_parts import llm_arguments

    return llm_arguments(
        str(save_model(folder, "qwen2")),
        vocab_size=37,
        dtype="bfloat16",
        tensor_parallel=1,
        max_model_len=64,
        gpu_memory_utilization=0.5,
        sleeps=False,
        is_fp8=is_fp8,
    )


@pytest.mark.parametrize("is_fp8", [False, True])
def test_the_argument_of_vllm(tmp_path: Path, is_fp8: bool) -> None:
    assert arguments(tmp_path, is_fp8=is_fp8)["quantization"] == ("fp8_per_tensor" if is_fp8 else None)


def test_vllm_quantizes_linear_layers_online_by_this_name(tmp_path: Path) -> None:
    """And its name fp8 does not any more."""
    from vllm import LLM
    from vllm.config.quantization import resolve_quantization_config
    from vllm.model_executor.layers.quantization import QuantizationMethods
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    name = arguments(tmp_path, is_fp8=True)["quantization"]
    assert name in get_args(QuantizationMethods)
    assert "quantization" in inspect.signature(LLM.__init__).parameters
    assert resolve_quantization_config(name, None) is not None
    with pytest.raises(ValueError, match="no longer supports online"):
        Fp8Config(is_checkpoint_fp8_serialized=False)


def test_every_load_quantizes_anew() -> None:
    """vLLM's reload, by which all our weights come, hands a layer to its quantization once its last weight is there."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.quantization.online.fp8 import Fp8PerTensorOnlineLinearMethod
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    class Halving(QuantizeMethodBase):
        """Keeps half of what was loaded; FP8's own kernel needs a GPU."""

        def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **attributes: Any) -> None:
            layer.weight = torch.nn.Parameter(torch.empty(2, 3), requires_grad=False)

        def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise NotImplementedError

        def process_weights_after_loading(self, layer: Any) -> None:
            layer.weight.data.div_(2)

    layer: Any = torch.nn.Module()
    layer.quant_method = Halving()
    layer.quant_method.create_weights(layer)
    model: Any = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    place = layer.weight.data_ptr()
    for value in (1.0, 3.0):
        initialize_layerwise_reload(model)
        layer.weight.weight_loader(layer.weight, torch.full((2, 3), value))
        finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
        assert torch.equal(layer.weight, torch.full((2, 3), value / 2))
        assert layer.weight.data_ptr() == place  # where captured graphs look for it
    assert issubclass(Fp8PerTensorOnlineLinearMethod, QuantizeMethodBase)
