"""A Megatron checkpoint of a run as a Hugging Face checkpoint, in one process, whatever layout saved it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_fec.config import ConfigError, load_config
from megatron_fec.policy.checkpoint import load_model_only, read_trainer_state
from megatron_fec.policy.checkpoint_files import damage
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.parallel import initialize_parallel
from megatron_fec.policy.step import build_policy
from megatron_fec.policy.weights import export_hf
from megatron_fec.policy_options import FP8
from megatron_fec.preflight import local_model


def convert(checkpoint: Path, output: Path) -> None:
    """Writes `output`; checkpoint is a folder RUN/checkpoints/step_NNNNNN of a finished save."""
    run_dir = checkpoint.resolve().parent.parent
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"{checkpoint} is not RUN/checkpoints/step_NNNNNN of a run: {run_dir} has no config.yaml."
        )
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty. Name a new folder for the Hugging Face checkpoint.")
    config = load_config(run_dir / "config.yaml")
    is_fp8 = config.policy.precision in FP8  # of products alone; checkpoints hold bf16 weights
    one_rank = replace(
        config.policy,
        precision="bf16" if is_fp8 else config.policy.precision,
        tensor_parallel=1,
        pipeline_parallel=1,
        context_parallel=1,
        sequence_parallel=False,
        options={},  # which share experts among ranks, or are of training
    )
    layout = initialize_parallel(one_rank, seed=config.trainer.seed)
    source = local_model(config.model, run_dir, seed=config.trainer.seed)
    hf_config = load_hf_config(str(source))
    if fault := damage(checkpoint):
        raise ConfigError(f"{checkpoint} is damaged: {fault}. Convert another one.")
    read_trainer_state(
        checkpoint, hf_config=hf_config, distributed_optimizer=config.policy.distributed_optimizer
    )
    policy = build_policy(
        str(source),
        replace(one_rank, distributed_optimizer=False),
        config.optimizer,
        layout=layout,
        temperature=config.rollout.temperature,
        total_steps=config.trainer.max_steps,
        vocab_size=hf_config.vocab_size,
    )
    load_model_only(policy, checkpoint)
    export_hf(policy, source, output)
