"""One training job from its configuration to a trained Hugging Face checkpoint; every rank runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from transformers.utils.logging import disable_progress_bar

from megatron_fec.algorithm.schedules import build_schedule
from megatron_fec.algorithm.strategies import needs_reference
from megatron_fec.collection import Collector
from megatron_fec.config import Config, OptimizerConfig, save_config
from megatron_fec.engines import native_engine, server_engine, vllm_engine
from megatron_fec.memory_log import PeakMemory
from megatron_fec.planning.first_step import FirstStep, no_note
from megatron_fec.policy.checkpoint import TrainerState
from megatron_fec.policy.checkpoint_files import set_aside
from megatron_fec.policy.device import device, release_cached_memory
from megatron_fec.policy.kernels import kernel_lines
from megatron_fec.policy.layer_spec import uses_transformer_engine
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.offload import Offload
from megatron_fec.policy.parallel import ParallelLayout, initialize_parallel
from megatron_fec.policy.reference import ReferencePolicy
from megatron_fec.policy.step import Policy, build_policy
from megatron_fec.policy.weights import export_hf
from megatron_fec.policy_options import options_of_policy
from megatron_fec.precision_rules import token_multiple
from megatron_fec.preflight import ENGINES_DIR, Inputs, on_all_ranks, prepare_inputs
from megatron_fec.report import write_report
from megatron_fec.rollout.engine import Engine, true_vocab_size
from megatron_fec.rollout.packing import PackLayout
from megatron_fec.run_log import RunLog
from megatron_fec.step_dump import StepDumps
from megatron_fec.stop import Stop, StopRequested, is_done, mark_done
from megatron_fec.strategy_state import StrategyState
from megatron_fec.tasks.arithmetic import demonstrations
from megatron_fec.tasks.verifier import Verifier
from megatron_fec.trainer import Trainer
from megatron_fec.updates import Updates
from megatron_fec.warm_start import BATCH_SIZE, LEARNING_RATE, Demonstration, run_warm_start

WARM_DIR = "warm_start"  # in the run folder: the checkpoint after the supervised steps


def train(config: Config, *, end_time: float | None = None) -> None:
    """Checks, builds, trains, and leaves hf/, report.html and DONE in the run folder, unless the run is told to stop."""
    disable_progress_bar()  # transformers' own, one a rank for every file
    layout = initialize_parallel(config.policy, seed=config.trainer.seed)
    inputs = prepare_inputs(config, data_parallel=layout.data_parallel)
    run_dir = Path(config.trainer.run_dir)
    step = inputs.state.step if inputs.state else None
    if is_done(run_dir, step=step, max_steps=config.trainer.max_steps):
        if dist.get_rank() == 0:
            print(f"{run_dir} is finished at step {step}. Raise trainer.max_steps to train on.", flush=True)
        return
    log = RunLog(
        run_dir,
        total_steps=config.trainer.max_steps,
        is_main=dist.get_rank() == 0,
        wandb_mode=config.trainer.wandb,
        config_text=OmegaConf.to_yaml(OmegaConf.structured(config)),
    )
    log.note(_headline(config, inputs, layout))
    try:
        _train_and_export(config, inputs, layout, log, Stop(end_time))
    except StopRequested as request:
        log.note(f"stopped by {request}: nothing is lost, the same command goes on from there")
    dist.barrier()


def _train_and_export(
    config: Config, inputs: Inputs, layout: ParallelLayout, log: RunLog, stop: Stop
) -> None:
    run_dir = Path(config.trainer.run_dir)
    try:
        trainer = _build_trainer(config, inputs, layout, log, stop)
        with closing(trainer.collector.verifier):
            _resume(trainer, inputs)
            if dist.get_rank() == 0:  # not before: a refused resume leaves the run's own
                save_config(config, run_dir / "config.yaml")
            trainer.fit()
            export_hf(trainer.policy, inputs.model_dir, run_dir / "hf")
    finally:
        log.finish()
    if dist.get_rank() == 0:
        write_report([run_dir], run_dir / "report.html")
        mark_done(run_dir, step=trainer.state.step)
    log.note(f"report      {run_dir / 'report.html'}")
    log.note(f"checkpoint  {run_dir / 'hf'}  (Hugging Face)")


def _build_trainer(
    config: Config, inputs: Inputs, layout: ParallelLayout, log: RunLog, stop: Stop
) -> Trainer:
    if config.warm_start.steps and (inputs.checkpoint is None or needs_reference(config.algorithm)):
        inputs = replace(inputs, model_dir=_warm_started(config, inputs, layout, log, stop))
    policy = _policy(config, inputs, config.optimizer, layout, total_steps=config.trainer.max_steps)
    log.note("\n".join(kernel_lines(config.policy, policy.bridge.config, policy.optimizer)))
    state = TrainerState(step=0, consumed_samples=0, weight_version=0, schedule={})
    samples_itself = config.rollout.engine == "native"
    offload = Offload(policy, options_of_policy(config.policy).offload, policy_samples=samples_itself)
    # An engine takes its share of the memory that is free when it starts; and a rank may have no host memory for it.
    on_all_ranks(lambda: offload.enter("generate"))
    engine = _engine(config, inputs, policy, log)
    offload.enter("train")  # a checkpoint may follow
    return Trainer(
        config=config,
        policy=policy,
        offload=offload,
        memory=PeakMemory(engine.asleep_bytes),
        collector=Collector(
            engine=engine,
            verifier=Verifier(workers=1, timeout=config.data.verifier_timeout),
            settings=config.rollout,
        ),
        schedule=build_schedule(config.algorithm.schedule),
        strategy_state=StrategyState(
            config.algorithm, max_response_tokens=config.rollout.max_response_tokens
        ),
        train_prompts=inputs.train.prompts,
        validation_prompts=inputs.validation.prompts if inputs.validation else (),
        updates=Updates(
            config=config, policy=policy, dumps=StepDumps(config=config, layout=layout), note=log.note
        ),
        log=log,
        stop=stop,
        pack_layout=_pack_layout(config, layout),
        state=state,
        # Before a checkpoint is loaded: the policy still has the weights of model.path, or of the warm start.
        reference=ReferencePolicy(policy) if needs_reference(config.algorithm) else None,
        beside_plan=_beside_plan(config, inputs),
    )


def _beside_plan(config: Config, inputs: Inputs) -> Callable[[Mapping[str, float]], str | None]:
    """What sets the first step beside its plan; nothing on CPU, of which the planner knows nothing."""
    if device().type != "cuda":
        return no_note
    return FirstStep(
        config=config,
        hf_config=load_hf_config(str(inputs.model_dir)),
        device_name=torch.cuda.get_device_name(),
        world_size=dist.get_world_size(),
        gpus_per_node=int(os.environ["LOCAL_WORLD_SIZE"]),  # torchrun's
        layers="transformer_engine" if uses_transformer_engine() else "local",
    )


def _resume(trainer: Trainer, inputs: Inputs) -> None:
    """From the newest whole checkpoint, if there is one."""
    if inputs.checkpoint is not None and inputs.state is not None:
        trainer.load_state_dict(inputs.checkpoint, inputs.state)
        set_aside(inputs.damaged)
        for damaged, fault in inputs.damaged.items():
            trainer.log.note(
                f"warning: {damaged} is damaged, {fault}; it is called damaged_{damaged.name} now"
            )
        trainer.log.note(f"resumed from {inputs.checkpoint}")
        if trainer.config.rollout.max_lag:
            trainer.log.note(
                f"rollout.max_lag=1: step {inputs.state.step} is sampled anew by the current weights, with lag 0; "
                "what the stopped run had sampled ahead by older weights was not saved"
            )
    # A row that was put off was never written, or will be written again.
    trainer.log.truncate_to(trainer.state.step - bool(trainer.state.unwritten))


def _policy(
    config: Config, inputs: Inputs, optimizer: OptimizerConfig, layout: ParallelLayout, *, total_steps: int
) -> Policy:
    return build_policy(
        str(inputs.model_dir),
        config.policy,
        optimizer,
        layout=layout,
        temperature=config.rollout.temperature,
        total_steps=total_steps,
        vocab_size=true_vocab_size(inputs.tokenizer),
    )


def _engine(config: Config, inputs: Inputs, policy: Policy, log: RunLog) -> Engine:
    rollout = config.rollout
    if rollout.engine == "native":
        return native_engine(policy, inputs.tokenizer)
    if rollout.engine == "servers":
        folder = Path(config.trainer.run_dir) / ENGINES_DIR
        return server_engine(folder, inputs.model_dir, inputs.tokenizer, say=log.note)
    return vllm_engine(
        inputs.model_dir,
        inputs.tokenizer,
        precision=config.policy.precision,
        tensor_parallel=rollout.tensor_parallel,
        max_model_len=rollout.max_prompt_tokens + rollout.max_response_tokens,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        seed_per_request=rollout.seed_per_request,
        is_fp8=rollout.precision == "fp8",
    )


def _pack_layout(config: Config, layout: ParallelLayout) -> PackLayout:
    return PackLayout(
        data_parallel_rank=layout.data_parallel_rank,
        data_parallel_size=layout.data_parallel,
        micro_batch_tokens=config.policy.micro_batch_tokens,
        multiple=token_multiple(config.policy),
        context_parallel_rank=layout.context_parallel_rank,
        context_parallel_size=layout.context_parallel,
        micro_batch_multiple=layout.micro_batch_multiple,
        is_full_length=options_of_policy(config.policy).tp_overlap,  # its buffers have one size
    )


def _warm_started(config: Config, inputs: Inputs, layout: ParallelLayout, log: RunLog, stop: Stop) -> Path:
    """The checkpoint after the supervised steps, made unless an earlier start of this run has made it."""
    target = Path(config.trainer.run_dir) / WARM_DIR
    settings = config.warm_start
    made_with = json.dumps([asdict(settings), config.model.path, config.data.train, config.trainer.seed])
    marker = target / "made_with.json"
    if marker.is_file() and marker.read_text() == made_with:
        return target
    # Its own optimizer: a higher rate, decayed to 0, and no state that reinforcement would inherit.
    optimizer = replace(
        config.optimizer,
        lr=LEARNING_RATE,
        lr_schedule="cosine",
        warmup_steps=settings.steps // 10,
        weight_decay=0.0,
    )
    policy = _policy(config, inputs, optimizer, layout, total_steps=settings.steps)
    run_warm_start(
        policy,
        _demonstrations(config, inputs),
        settings,
        layout=_pack_layout(config, layout),
        note=log.note,
        before_step=stop.check,
    )
    export_hf(policy, inputs.model_dir, target)
    if dist.get_rank() == 0:
        marker.write_text(made_with)
    del policy
    release_cached_memory()
    return target


def _demonstrations(config: Config, inputs: Inputs) -> list[Demonstration]:
    pairs = demonstrations(config.warm_start.steps * BATCH_SIZE, config.trainer.seed)
    prompts = inputs.tokenizer([prompt for prompt, _ in pairs], add_special_tokens=False)["input_ids"]
    responses = inputs.tokenizer([response for _, response in pairs], add_special_tokens=False)["input_ids"]
    end = inputs.tokenizer.eos_token_id
    return [(prompt, [*response, end]) for prompt, response in zip(prompts, responses, strict=True)]


def _headline(config: Config, inputs: Inputs, layout: ParallelLayout) -> str:
    policy, prompts = config.policy, inputs.train
    left_out = f", {prompts.num_too_long} too long" if prompts.num_too_long else ""
    lines = [
        f"{config.model.path} on {device().type}: TP {policy.tensor_parallel} x PP {policy.pipeline_parallel} "
        f"x CP {layout.context_parallel} x DP {layout.data_parallel}, rollouts by {config.rollout.engine}, "
        f"schedule {config.algorithm.schedule.name}",
        f"{len(prompts.prompts)} prompts{left_out}; a step is {config.rollout.prompts_per_step} x "
        f"{config.rollout.group_size} responses in {config.updates_per_rollout} updates",
    ]
    if device().type == "cpu":
        lines.append("no GPU: megatron-core runs on CPU through the development adapter")
    return "\n".join(lines)
