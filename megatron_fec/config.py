"""The configuration: dataclasses with the only defaults, a YAML loader, and every rule that needs no model or cluster.

A field without a default is required. Rules that need the checkpoint (heads, layers, vocabulary) are in policy/parallel.py.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from megatron_fec.context_split import sequence_multiple
from megatron_fec.errors import ConfigError as ConfigError
from megatron_fec.policy_options import PRECISIONS, check_policy
from megatron_fec.security import refuse_secrets
from megatron_fec.server_config import check_servers, correct_staleness


@dataclass(kw_only=True)
class ModelConfig:
    path: str = MISSING  # Hugging Face folder or hub name; "embedded" makes a small random Qwen2


@dataclass(kw_only=True)
class PolicyConfig:
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: bool = False
    precision: str = "bf16"  # bf16 | fp32 | fp8_delayed | fp8_tensorwise | fp8_blockwise | mxfp8
    distributed_optimizer: bool = True
    micro_batch_tokens: int = 16384  # of one forward, on all context ranks; a longer sequence is an error
    logits_chunk_tokens: int | None = None  # tokens whose logits may be in memory at one time; null is all
    options: dict[str, Any] = field(default_factory=dict)  # memory, speed, experts, FP8: policy_options.py


@dataclass(kw_only=True)
class OptimizerConfig:
    lr: float = 1e-6
    lr_schedule: str = "constant"  # constant | cosine, to 0 at trainer.max_steps
    warmup_steps: int = 0  # steps (rollouts), not updates
    weight_decay: float = 0.1
    beta2: float = 0.999  # of Adam; how long the size of past gradients is remembered
    clip_grad: float = 1.0


@dataclass(kw_only=True)
class ThresholdsConfig:
    """Two lines over the token's probability, as [slope, intercept], and the distance that they replace; section C.2."""

    eps_std: float = 0.2
    upper: list[float] = field(default_factory=lambda: [-0.25, 0.5])
    lower: list[float] = field(default_factory=lambda: [-0.13, 0.3])


@dataclass(kw_only=True)
class ScheduleConfig:
    name: str = MISSING  # key of algorithm.schedules.SCHEDULES
    total_steps: int = MISSING  # T of the formulas; may exceed trainer.max_steps, never the reverse
    options: dict[str, Any] = field(default_factory=dict)  # id, did, od, target: docs/strategies.md


@dataclass(kw_only=True)
class AlgorithmConfig:
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    thresholds: ThresholdsConfig = field(default_factory=ThresholdsConfig)
    # Keys of POLICY_LOSSES and ADVANTAGES, "+" keys of ADDITIONS and REWARD_SHAPING: clip+entropy_bonus, grpo+overlong.
    policy_loss: str = "clip"
    advantage: str = "grpo"
    options: dict[str, Any] = field(default_factory=dict)  # of these two: docs/strategies.md
    aggregation: str = "token_mean"  # key of algorithm.losses.AGGREGATIONS
    prompts_per_update: int = MISSING  # size of one optimizer step's mini-batch, in prompts
    epochs: int = 1  # passes over one rollout


@dataclass(kw_only=True)
class RolloutConfig:
    engine: str = "vllm"  # vllm | native | servers, which are processes of their own: docs/rollout_servers.md
    tensor_parallel: int = 1
    precision: str = "policy"  # policy, as the policy's weights | fp8, quantized by vLLM
    prompts_per_step: int = MISSING
    group_size: int = 8
    max_refills: int = 0  # batches drawn for prompts whose rewards are all equal (dynamic sampling); 0 is off
    max_prompt_tokens: int = 1024  # longer prompts are filtered and counted
    max_response_tokens: int = 7168
    temperature: float = 1.0  # of sampling, and of every log-prob and entropy of the trainer
    seed_per_request: bool = True  # the same samples in every engine layout; costs decode speed on GPUs
    gpu_memory_utilization: float = 0.5  # vLLM's share of a GPU; unused on CPU
    mismatch_limit: float = 0.05  # largest mean |trainer - engine| log-prob after a refit
    max_lag: int = 0  # 1: the next step is sampled while this one trains, by weights one step older


@dataclass(kw_only=True)
class DataConfig:
    train: str = MISSING  # .jsonl or .parquet file, hub name, embedded:countdown, or reasoning_gym:NAME
    validation: str | None = None
    prompt_column: str = "prompt"  # DAPO-Math-17k's columns; a dot descends into a struct
    answer_column: str = "reward_model.ground_truth"
    prompt_style: str = "boxed"  # boxed | chat | plain
    verifier_timeout: float = 10.0  # seconds for one answer


@dataclass(kw_only=True)
class WarmStartConfig:
    """Supervised steps before reinforcement, for a policy that cannot answer yet."""

    steps: int = 0


@dataclass(kw_only=True)
class TrainerConfig:
    run_dir: str = MISSING
    max_steps: int = MISSING
    seed: int = 0
    resume: str = "auto"  # auto | never
    save_every: int = 0  # steps; 0 saves at the end only
    keep_checkpoints: int = 2
    async_save: bool = False  # training goes on while a checkpoint is written; takes its size in host memory
    eval_every: int = 0  # steps; 0 is off
    eval_samples: int = 8  # responses per validation prompt
    dump_every: int = 0  # steps; the tokens of such a step go to dumps/ for megatron-fec replay; 0 is off
    on_nonfinite: str = "stop"  # stop | skip: an update whose log-probs, loss or gradients are not finite
    wandb: str = "off"  # off | offline | online


@dataclass(kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps that share one rollout."""
        return self.rollout.prompts_per_step // self.algorithm.prompts_per_update * self.algorithm.epochs

    def validate(self) -> None:
        """Raises ConfigError naming setting, value, rule and remedy of the first broken rule."""
        refuse_secrets(self)
        _check_choices(self)
        _check_ranges(self)
        _check_batch(self)
        check_policy(self.policy)
        check_servers(self.rollout, self.policy)
        _check_schedule(self)


# Strategies are not here: algorithm/strategies.py finds them in their dicts.
CHOICES = {
    "policy.precision": PRECISIONS,
    "optimizer.lr_schedule": ("constant", "cosine"),
    "rollout.engine": ("vllm", "native", "servers"),
    "rollout.precision": ("policy", "fp8"),
    "data.prompt_style": ("boxed", "chat", "plain"),
    "trainer.on_nonfinite": ("stop", "skip"),
    "trainer.resume": ("auto", "never"),
    "trainer.wandb": ("off", "offline", "online"),
}
AT_LEAST_ONE = (
    "policy.tensor_parallel",
    "policy.pipeline_parallel",
    "policy.context_parallel",
    "policy.micro_batch_tokens",
    "policy.logits_chunk_tokens",
    "algorithm.schedule.total_steps",
    "algorithm.prompts_per_update",
    "algorithm.epochs",
    "rollout.tensor_parallel",
    "rollout.prompts_per_step",
    "rollout.group_size",
    "rollout.max_prompt_tokens",
    "rollout.max_response_tokens",
    "trainer.max_steps",
    "trainer.keep_checkpoints",
    "trainer.eval_samples",
)
POSITIVE = (
    "optimizer.lr",
    "optimizer.clip_grad",
    "rollout.temperature",
    "rollout.mismatch_limit",
    "data.verifier_timeout",
)
NOT_NEGATIVE = (
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "warm_start.steps",
    "trainer.seed",
    "trainer.save_every",
    "trainer.eval_every",
    "trainer.dump_every",
    "rollout.max_refills",
)
CHOICES_OF_STRATEGY = ("algorithm.schedule.name", "algorithm.policy_loss", "algorithm.advantage")
UNCLIPPED = ("grpo", "static")  # schedules that mean something with one update per rollout


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The validated configuration of a YAML file and `key=value` overrides.

    A file may name another by the key `base` (relative to itself), and then holds only what differs. A layer that
    chooses another strategy drops the settings that a lower layer gave the one before.
    """
    typed = OmegaConf.structured(Config)
    try:
        for layer in [*file_layers(Path(path)), override_layer(overrides)]:
            merged = OmegaConf.merge(typed, layer)
            if any(OmegaConf.select(layer, key) is not None for key in CHOICES_OF_STRATEGY):
                from megatron_fec.algorithm.strategies import drop_unread  # takes torch, and this module

                drop_unread(typed, merged, layer)
            typed = merged
        config = OmegaConf.to_object(typed)
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(str(error.full_key), path)) from error
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{error.full_key} is required; set it in {path} or as {error.full_key}=VALUE."
        ) from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        raise ConfigError(f"{key} in {path}: {str(error).splitlines()[0]}.") from error
    assert isinstance(config, Config)
    if config.trainer.wandb == "False":  # what YAML makes of a bare `off`
        config.trainer.wandb = "off"
    correct_staleness(config.rollout, config.algorithm)
    config.validate()
    return config


def override_layer(overrides: list[str] | tuple[str, ...]) -> DictConfig:
    """All `key=value` overrides as one layer."""
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"override {override!r} must have the form key=value, such as trainer.max_steps=4."
            )
        try:
            OmegaConf.from_dotlist([override])
        except YAMLError as error:
            raise ConfigError(
                f"override {override!r} has a value that is not YAML. Check its brackets."
            ) from error
    return OmegaConf.from_dotlist(list(overrides))


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML, readable by load_config."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """All dotted keys that a user may set."""
    keys = []
    for item in fields(cls):
        default = item.default_factory
        if isinstance(default, type) and is_dataclass(default):
            keys += known_keys(default, f"{prefix}{item.name}.")
        else:
            keys.append(prefix + item.name)
    return keys


def file_layers(path: Path) -> list[DictConfig]:
    """The chain of files from the deepest base to `path`."""
    if not path.is_file():
        raise ConfigError(f"--config {path} does not exist. The project's own are in configs/.")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # yaml, encoding: whatever the parser says, the user must see which file
        raise ConfigError(f"--config {path} is not readable YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"--config {path} must hold a mapping of sections, such as `trainer:`.")
    if "base" not in layer:
        return [layer]
    base = layer.pop("base")
    return [*file_layers(path.parent / str(base)), layer]


def _unknown_key(key: str, path: str | Path) -> str:
    known = known_keys()
    sections = sorted({k.rsplit(".", 1)[0] for k in known})
    near = difflib.get_close_matches(key, known + sections, n=1, cutoff=0.5)
    if not near:  # a right leaf under a wrong section
        near = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    remedy = f"Did you mean {near[0]}?" if near else f"The sections are {', '.join(sections)}."
    return f"{key} is not a setting (in {path} or an override). {remedy}"


def _get(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _check_choices(config: Config) -> None:
    for key, allowed in CHOICES.items():
        value = _get(config, key)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            remedy = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key}={value} must be one of {', '.join(allowed)}.{remedy}")


def _check_ranges(config: Config) -> None:
    for key in known_keys():
        if isinstance(value := _get(config, key), float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} must be a finite number.")
    for keys, rule, is_broken in (
        (AT_LEAST_ONE, "at least 1", lambda v: v < 1),
        (POSITIVE, "greater than 0", lambda v: v <= 0),
        (NOT_NEGATIVE, "0 or more", lambda v: v < 0),
    ):
        for key in keys:
            if (value := _get(config, key)) is not None and is_broken(value):
                raise ConfigError(f"{key}={value} must be {rule}.")
    share = config.rollout.gpu_memory_utilization
    if not 0 < share <= 1:
        raise ConfigError(f"rollout.gpu_memory_utilization={share} must be in (0, 1].")
    for key in ("optimizer.beta2", "algorithm.thresholds.eps_std"):
        if not 0 < _get(config, key) < 1:
            raise ConfigError(f"{key}={_get(config, key)} must be between 0 and 1.")
    lines = config.algorithm.thresholds
    for key, line, limit in (("upper", lines.upper, float("inf")), ("lower", lines.lower, 1.0)):
        if len(line) != 2:
            raise ConfigError(f"algorithm.thresholds.{key}={line} must be [slope, intercept].")
        for p in (0.0, 1.0):
            eps = line[0] * p + line[1]
            if not 0 < eps < limit:
                raise ConfigError(
                    f"algorithm.thresholds.{key}={line} is {eps:g} at p={p:g}; it must stay in (0, {limit:g}). "
                    "Change the slope or the intercept."
                )


def _check_batch(config: Config) -> None:
    prompts, per_update = config.rollout.prompts_per_step, config.algorithm.prompts_per_update
    if prompts % per_update:
        raise ConfigError(
            f"algorithm.prompts_per_update={per_update} must divide rollout.prompts_per_step={prompts}. "
            f"Use a divisor, such as {_nearest_divisor(prompts, per_update)}."
        )
    if config.rollout.group_size < 2:
        raise ConfigError(
            f"rollout.group_size={config.rollout.group_size} must be at least 2: "
            "an advantage compares the responses of one prompt."
        )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    context = config.policy.context_parallel
    multiple = sequence_multiple(context)
    needed = -(-longest // multiple) * multiple
    if config.policy.micro_batch_tokens < needed:
        padding = f", padded to a multiple of {multiple} for policy.context_parallel={context}"
        raise ConfigError(
            f"policy.micro_batch_tokens={config.policy.micro_batch_tokens} must hold the longest sequence, "
            f"{longest} = rollout.max_prompt_tokens + rollout.max_response_tokens{padding if context > 1 else ''}. "
            f"Use at least {needed}."
        )


def _check_schedule(config: Config) -> None:
    if config.trainer.eval_every and config.data.validation is None:
        raise ConfigError(
            f"trainer.eval_every={config.trainer.eval_every} needs data.validation. Name its prompts, or set it to 0."
        )
    schedule = config.algorithm.schedule
    if config.updates_per_rollout == 1 and schedule.name not in UNCLIPPED:
        raise ConfigError(
            f"algorithm.schedule.name={schedule.name} with one update per rollout does nothing: the ratio is then "
            "always 1 and no token is ever clipped. Lower algorithm.prompts_per_update or raise algorithm.epochs."
        )
    if schedule.total_steps < config.trainer.max_steps:
        raise ConfigError(
            f"algorithm.schedule.total_steps={schedule.total_steps} must be at least "
            f"trainer.max_steps={config.trainer.max_steps}: the plan would end before the run."
        )
    # Imported here: it takes torch, and this module.
    from megatron_fec.algorithm.strategies import check_strategies

    check_strategies(
        config.algorithm,
        context_parallel=config.policy.context_parallel,
        max_response_tokens=config.rollout.max_response_tokens,
        updates_per_rollout=config.updates_per_rollout,
    )


def _nearest_divisor(total: int, wanted: int) -> int:
    return min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - wanted))
