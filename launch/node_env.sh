# Environment of every process on a node; sourced by the launchers and the Makefile, never executed.
# This is the only place that sets environment variables. A value that a user may have reasons to change is kept.
# shellcheck shell=bash

# launch/train.py sources this file itself when this is missing.
export FEC_NODE_ENV=1
# The package of this repository, also where an environment or a container image holds another copy or none.
PYTHONPATH="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
# vLLM must live in the trainer's process: the weights reach it as tensors, not as files.
export VLLM_ENABLE_V1_MULTIPROCESSING=0
# No report about the machine leaves it.
export VLLM_NO_USAGE_STATS=1
export DO_NOT_TRACK=1
# vLLM writes about 60 lines per process at INFO.
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}"
# The verifier forks after tokenizers has started threads; it would warn each time.
export TOKENIZERS_PARALLELISM=false
# One intra-op thread a process: ranks share the cores, and two threads on busy cores are ten times slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Megatron's tensor and sequence parallelism relies on one hardware queue to order compute and communication.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# vLLM's sleep mode keeps its own memory pool, which expandable segments break: PYTORCH_CUDA_ALLOC_CONF stays unset.

# A GPU that is hidden by an empty CUDA_VISIBLE_DEVICES does not count.
if [[ -z "${CUDA_VISIBLE_DEVICES-all}" ]] || ! { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }; then
  # vLLM compiles its log-prob helper even when eager: half a minute and a C++ compiler for nothing on a CPU.
  export TORCH_COMPILE_DISABLE=1
  # vLLM would pin each rank to cores of its own choice, and all ranks to the same ones.
  export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
  # vLLM's CPU backend warns on every rank that it binds memory to the NUMA node it already is on.
  export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
fi
