"""Every number of the model of cost that is not in a data sheet, a checkpoint or a configuration.

None was measured by this project. docs/planning.md says where each comes from and which way it errs.
"""

from __future__ import annotations

# Share of the peak that the products of a layer reach, with all that runs between them. Megatron-LM's README reports an
# MFU of 41 to 47 % on H100 for dense models, communication included; a product in FP8 loses more of its peak to the
# work around it, and experts work on few tokens each.
MATMUL = {"bf16": 0.50, "fp8": 0.35, "fp32": 0.60}
EXPERTS = 0.60  # of that, for products of experts
DECODE_BANDWIDTH = 0.65  # share of the memory bandwidth that a decoding engine reaches
LINK = 0.75  # share of a link's bandwidth that a collective reaches
OVERLAPPED = 0.20  # share of a collective's time that is left where it overlaps with products

# Responses. Lengths are taken as exponential, cut at rollout.max_response_tokens; their mean is --response-tokens.
MEAN_RESPONSE = 0.25  # of rollout.max_response_tokens
MEAN_PROMPT = 0.20  # of rollout.max_prompt_tokens

# Engine.
ENGINE_SEQUENCES = 1024  # vLLM's max_num_seqs on GPUs of 70 GiB and more
DECODE_OVERHEAD = 2e-3  # seconds of a decode step beside reading memory: scheduling, sampling, launches
ALL_REDUCE_LATENCY = 15e-6  # seconds of a small all-reduce inside a node; two a layer while decoding
NETWORK_LATENCY = 60e-6  # between nodes
ENGINE_WORKSPACE = 3e9  # bytes of vLLM beside weights and cache: CUDA graphs, activations of a prefill
SLEEPING_ENGINE = 1.5e9  # bytes that stay on the GPU while it sleeps

# Memory.
CONTEXT = 2.5e9  # bytes of CUDA's context, cuBLAS's workspaces and NCCL's buffers
FRAGMENTATION = 0.05  # of what a phase allocates and frees: activations, logits, buffers
REFIT_BUCKETS = 2  # largest tensors in flight during a refit

# Disk and host.
DISK_PER_NODE = 2e9  # bytes/s that a node writes to the shared file system ...
DISK = 20e9  # ... and the whole system at most
HOST_MEMORY = 40e9  # bytes/s of host memory for each GPU: Adam on the host is bound by it
TENSOR_OVERHEAD = 3e-4  # seconds of a refit for each tensor: names, handles, launches
HOURS_OF_STEPS = 400  # steps of the cost that is reported
