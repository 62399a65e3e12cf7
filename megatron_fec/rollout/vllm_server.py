"""vLLM as a rollout server runs it: requests are added and stepped, so that a server can tell how far it is."""

from __future__ import annotations

from typing import Any, Literal

import torch
from vllm import LLM, RequestOutput
from vllm.inputs import TokensPrompt

from megatron_fec.rollout.engine import Sampling
from megatron_fec.rollout.server import Finished, ServerPrompt
from megatron_fec.rollout.vllm_parts import check_environment, llm_arguments, samples_of, sampling_params
from megatron_fec.rollout.vllm_transfer import BACKEND, TransferState


class ServedVllm:
    """A `ServedEngine` (server.py); one thread uses it."""

    def __init__(
        self,
        *,
        model_dir: str,  # config and tokenizer; its weights are not read
        vocab_size: int,
        dtype: Literal["float32", "bfloat16"],
        tensor_parallel: int,
        max_model_len: int,
        gpu_memory_utilization: float,
        is_fp8: bool = False,  # rollout.precision
        bind: str,  # address of the sockets by which weights come
    ) -> None:
        check_environment()
        self._bind = bind
        self.tensor_parallel = tensor_parallel
        self._places: dict[str, int] = {}  # of the requests in the engine: vLLM's id -> the prompt's place
        self._version: int | None = None
        self._llm = LLM(
            distributed_executor_backend="uni" if tensor_parallel == 1 else "mp",
            seed=0,  # every request brings its own
            weight_transfer_config={"backend": BACKEND},
            worker_extension_cls=f"{TransferState.__module__}.{TransferState.__name__}",
            **llm_arguments(
                model_dir,
                vocab_size=vocab_size,
                dtype=dtype,
                tensor_parallel=tensor_parallel,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
                sleeps=False,
                is_fp8=is_fp8,
            ),
        )

    @property
    def is_busy(self) -> bool:
        return self._llm.llm_engine.has_unfinished_requests()

    def close(self) -> None:
        """Ends the workers of tensor parallelism."""
        self._llm.llm_engine.engine_core.shutdown()

    def start(self, prompts: list[ServerPrompt], sampling: Sampling) -> None:
        inputs = [TokensPrompt(prompt_token_ids=prompt.token_ids) for prompt in prompts]
        params = [sampling_params(sampling, prompt.seed) for prompt in prompts]
        ids = self._llm.enqueue(inputs, params, use_tqdm=False) if inputs else []
        # vLLM appends a random part to the id that its output has.
        self._places = {id.split("-")[0]: prompt.place for id, prompt in zip(ids, prompts, strict=True)}

    def step(self) -> list[Finished]:
        assert self._version is not None
        finished = []
        for output in self._llm.llm_engine.step():
            if isinstance(output, RequestOutput) and output.finished and output.request_id in self._places:
                place = self._places.pop(output.request_id)
                finished.append((place, samples_of(output, self._version)))
        return finished

    def abort(self) -> None:
        self._llm.llm_engine.abort_request(list(self._places), internal=False)
        self._places = {}

    def connect(self, init_info: dict[str, Any]) -> None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        self._llm.init_weight_transfer_engine(
            {"init_info": {**init_info, "backend": backend, "bind": self._bind}}
        )

    def begin_update(self) -> None:
        self._version = None
        self._llm.start_weight_update()

    def receive_bucket(self, description: dict[str, Any]) -> str:
        """What was wrong with it, "" when it is loaded."""
        self._llm.update_weights({"update_info": description})
        faults: list[str] = self._llm.collective_rpc("bucket_fault")
        return next((fault for fault in faults if fault), "")

    def end_update(self, version: int) -> list[int]:
        """The checksum of what each worker has loaded."""
        self._llm.finish_weight_update(weight_version=str(version))
        self._llm.reset_prefix_cache()  # cached keys and values belong to the old weights
        self._version = version
        return self._llm.collective_rpc("update_checksum")
