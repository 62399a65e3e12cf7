"""Everything that can be wrong with a run's inputs, found before a weight is loaded; the same on every rank."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_fec.algorithm.strategies import needs_reference
from megatron_fec.config import Config, ConfigError, ModelConfig
from megatron_fec.hub import hub_model
from megatron_fec.policy.checkpoint import TrainerState, read_trainer_state
from megatron_fec.policy.checkpoint_files import find_checkpoints, newest_whole
from megatron_fec.policy.kernels import Installed, check_kernels
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.parallel import check_model_sizes
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.policy_options import options_of_policy
from megatron_fec.precision_rules import check_rollout_gpu
from megatron_fec.rollout.engine import true_vocab_size, vllm_is_available
from megatron_fec.rollout.engine_folder import FolderError, read_addresses, read_key
from megatron_fec.tasks.arithmetic import VOCABULARY
from megatron_fec.tasks.prompts import PromptSet, load_prompts

ENGINES_DIR = "engines"  # in the run folder: where rollout servers leave their addresses
EMBEDDED = "embedded"  # model.path of the small random model that is made on the spot
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them holds the vocabulary
BYTES_PER_PARAMETER = 16  # of a checkpoint: fp32 master weight and two moments, and the weight itself

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run starts from."""

    model_dir: Path
    tokenizer: Any
    train: PromptSet
    validation: PromptSet | None
    checkpoint: Path | None = None  # to resume from
    state: TrainerState | None = None  # of that checkpoint
    damaged: dict[Path, str]  # newer checkpoints, and what is wrong with each


def prepare_inputs(config: Config, *, data_parallel: int) -> Inputs:
    """Loads the small things and checks the large ones; needs torch.distributed, raises ConfigError on all ranks."""
    run_dir = Path(config.trainer.run_dir)
    on_all_ranks(lambda: _check_start(config, run_dir, data_parallel))
    model_dir = on_all_ranks(lambda: local_model(config.model, run_dir, seed=config.trainer.seed))
    inputs = on_all_ranks(lambda: _read_inputs(config, run_dir, model_dir))
    checkpoint, damaged = newest_whole(run_dir / "checkpoints")
    if checkpoint is None:
        return inputs
    state = on_all_ranks(lambda: _trainer_state(config, checkpoint, model_dir))
    return replace(inputs, checkpoint=checkpoint, state=state, damaged=damaged)


def on_all_ranks(work: Callable[[], Result]) -> Result:
    """What work returns. A ConfigError of one rank, such as a disk that one node lacks, is raised on all of them."""
    result: Result | None = None
    own: ConfigError | None = None
    try:
        result = work()
    except ConfigError as error:
        own = error
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, str(own) if own else None)
    for fault in faults:
        if fault is not None:
            raise ConfigError(fault) from own
    return cast(Result, result)


def _check_start(config: Config, run_dir: Path, data_parallel: int) -> None:
    check_kernels(config.policy)
    check_reference(config)
    _check_engine(config)
    check_batch(config, data_parallel)
    check_writable(run_dir, setting="trainer.run_dir")


def _read_inputs(config: Config, run_dir: Path, model_dir: Path) -> Inputs:
    hf_config = load_hf_config(str(model_dir))
    check_model(config, hf_config)
    check_disk(config, run_dir, model_dir)
    check_resume(config, run_dir)
    tokenizer = load_tokenizer(config.model, model_dir, hf_config)
    return Inputs(
        model_dir=model_dir,
        tokenizer=tokenizer,
        train=read_prompts(config, "data.train", config.data.train, tokenizer),
        validation=read_prompts(config, "data.validation", config.data.validation, tokenizer)
        if config.data.validation
        else None,
        damaged={},
    )


def _check_engine(config: Config) -> None:
    if config.rollout.engine == "vllm":
        check_rollout_gpu(
            config.rollout.precision, config.policy.precision, capability=Installed.here().capability
        )
        check_vllm(config.rollout.tensor_parallel)
    if config.rollout.engine == "servers":
        check_servers(Path(config.trainer.run_dir) / ENGINES_DIR)
    if config.trainer.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"trainer.wandb={config.trainer.wandb} needs the wandb package. Install it or set trainer.wandb=off."
        )


def check_reference(config: Config) -> None:
    """A reference policy exchanges the weights in place, which FP8 ones would round twice."""
    if options_of_policy(config.policy).fp8_params and needs_reference(config.algorithm):
        raise ConfigError(
            f"policy.options.fp8_params=true does not go with algorithm.policy_loss={config.algorithm.policy_loss}, whose "
            "reference policy takes the place of the weights. Set fp8_params to false."
        )


def check_vllm(tensor_parallel: int) -> None:
    """vLLM is there, and its engines fill the world."""
    check_vllm_package()
    check_engines(tensor_parallel, world_size=dist.get_world_size())


def check_vllm_package() -> None:
    """vLLM is installed."""
    if not vllm_is_available():
        raise ConfigError(
            "rollout.engine=vllm needs vLLM, which is not installed. Install the extra rollout-cpu or gpu, "
            "or set rollout.engine=native."
        )


def check_engines(tensor_parallel: int, *, world_size: int) -> None:
    """Engines of this size fill the world."""
    if world_size % tensor_parallel:
        raise ConfigError(
            f"rollout.tensor_parallel={tensor_parallel} must divide the {world_size} processes of this run."
        )


def check_servers(folder: Path) -> None:
    """Rollout servers of this job have left their addresses."""
    try:
        found = read_addresses(folder, read_key(folder))
    except FolderError as error:
        raise ConfigError(f"rollout.engine=servers: {error}") from error
    if not found:
        raise ConfigError(
            f"rollout.engine=servers: {folder} names no engine of this job's key. Start one with launch/serve.py, or "
            "use slurm/rollout_and_train.sh, which starts them with the trainer."
        )


def check_batch(config: Config, data_parallel: int) -> None:
    """Every data-parallel rank gets a sequence, and a warm start has demonstrations."""
    sequences = config.algorithm.prompts_per_update * config.rollout.group_size
    if sequences < data_parallel:
        raise ConfigError(
            f"algorithm.prompts_per_update={config.algorithm.prompts_per_update} x rollout.group_size="
            f"{config.rollout.group_size} = {sequences} sequences must feed the {data_parallel} data-parallel ranks. "
            "Raise it, or give more processes to tensor or pipeline parallelism."
        )
    if config.warm_start.steps and config.data.train.split(":")[:2] != ["embedded", "countdown"]:
        raise ConfigError(
            f"warm_start.steps={config.warm_start.steps} needs demonstrations, which only data.train=embedded:countdown "
            "has. Set it to 0 and start from a model that can answer."
        )


def check_writable(folder: Path, *, setting: str) -> None:
    """Makes the folder that a setting names, unless this rank cannot write there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_probe_{dist.get_rank()}"
        probe.write_text("probe")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{setting}={folder} cannot be written: {error.strerror}. Choose a folder of your own."
        ) from error


def local_model(model: ModelConfig, folder: Path, *, seed: int) -> Path:
    """The folder of model.path; a hub name is downloaded, "embedded" is made in `folder`."""
    path = model.path
    if path == EMBEDDED:
        target = folder / "model"
        if dist.get_rank() == 0 and not target.is_dir():
            writing = folder / ".writing_model"
            shutil.rmtree(writing, ignore_errors=True)
            save_tiny_model(writing, VOCABULARY, seed=seed)
            writing.rename(target)
        dist.barrier()
        return target
    if Path(path).is_dir():
        return Path(path)
    return hub_model(path)


def load_tokenizer(model: ModelConfig, model_dir: Path, hf_config: Any) -> Any:
    """The tokenizer of model_dir, with an end and no id beyond the embedding."""
    where = f"model.path={model.path}"
    # Without any of them transformers would make an empty one.
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{where} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there. Copy the model's own."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except Exception as error:  # a broken file raises whatever its parser does
        raise ConfigError(
            f"{where} holds no readable tokenizer: {error!r} Copy the model's own again."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{where}: the tokenizer has no eos_token, so no response would end. Set one.")
    if true_vocab_size(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            f"{where}: the tokenizer has ids up to {true_vocab_size(tokenizer) - 1}, and the checkpoint's vocab_size="
            f"{hf_config.vocab_size} has no embedding for the last of them. Use the tokenizer that belongs to it."
        )
    return tokenizer


def check_model(config: Config, hf_config: Any) -> None:
    """The checkpoint's sizes go into the layout of policy and engine, and the longest sequence into its positions."""
    check_model_sizes(hf_config, config.policy)
    if config.rollout.engine == "native" and options_of_policy(config.policy).tp_overlap:
        raise ConfigError(
            "policy.options.tp_overlap=true does not go with rollout.engine=native: its buffers hold a whole micro-batch, "
            "and a decoded position is one token. Set it to false, or use rollout.engine=vllm."
        )
    if config.rollout.engine in ("vllm", "servers"):
        check_heads(config.rollout.tensor_parallel, hf_config)
    check_length(config.rollout.max_prompt_tokens, config.rollout.max_response_tokens, hf_config)


def check_heads(tensor_parallel: int, hf_config: Any) -> None:
    """vLLM splits the attention heads over the ranks of an engine."""
    if hf_config.num_attention_heads % tensor_parallel:
        raise ConfigError(
            f"rollout.tensor_parallel={tensor_parallel} must divide the checkpoint's "
            f"num_attention_heads={hf_config.num_attention_heads}. Use a divisor."
        )


def check_length(max_prompt_tokens: int, max_response_tokens: int, hf_config: Any) -> None:
    """The longest sequence fits into the checkpoint's positions."""
    longest = max_prompt_tokens + max_response_tokens
    if longest > hf_config.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_prompt_tokens={max_prompt_tokens} + rollout.max_response_tokens="
            f"{max_response_tokens} = {longest} must not exceed the checkpoint's "
            f"max_position_embeddings={hf_config.max_position_embeddings}. Lower one of them."
        )


def check_disk(config: Config, run_dir: Path, model_dir: Path) -> None:
    """The run folder has room for the checkpoints of this model."""
    weights = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    if not weights:
        raise ConfigError(
            f"model.path={config.model.path} holds no *.safetensors file. Convert the checkpoint first."
        )
    parameters = weights / 2  # bf16 files; an fp32 file only makes the estimate safer
    needed = parameters * BYTES_PER_PARAMETER * (config.trainer.keep_checkpoints + 1) + 2 * weights
    # What an earlier start has saved makes room for new checkpoints, but not what it has set aside.
    saved = [path for path in (run_dir / "checkpoints").glob("*") if not path.name.startswith("damaged_")]
    files = [file for path in saved for file in (path, *path.rglob("*")) if file.is_file()]
    held = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(run_dir).free + held
    if free < needed:
        raise ConfigError(
            f"trainer.run_dir={run_dir} has {free / 1e9:.1f} GB free, and {config.trainer.keep_checkpoints + 1} "
            f"checkpoints of this model need {needed / 1e9:.1f} GB. Free some, choose another disk, or lower "
            "trainer.keep_checkpoints."
        )


def check_resume(config: Config, run_dir: Path) -> None:
    """trainer.resume=never starts in a folder without checkpoints."""
    found = find_checkpoints(run_dir / "checkpoints")
    if found and config.trainer.resume == "never":
        raise ConfigError(
            f"trainer.resume=never, but {run_dir / 'checkpoints'} holds {found[-1].name}. "
            "Use another trainer.run_dir, or move that folder away."
        )


def _trainer_state(config: Config, checkpoint: Path, model_dir: Path) -> TrainerState:
    return read_trainer_state(
        checkpoint,
        hf_config=load_hf_config(str(model_dir)),
        distributed_optimizer=config.policy.distributed_optimizer,
    )


def read_prompts(config: Config, setting: str, source: str, tokenizer: Any) -> PromptSet:
    """The prompts of data.train or data.validation."""
    return load_prompts(
        source,
        setting=setting,
        tokenizer=tokenizer,
        prompt_column=config.data.prompt_column,
        answer_column=config.data.answer_column,
        prompt_style=config.data.prompt_style,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
    )
