"""What an evaluation asks for: dataclasses with the only defaults, a YAML loader, and the rules that need no model.

Settings that mean what they mean in training have the same name (config.py).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from megatron_fec.config import (
    CHOICES,
    ConfigError,
    ModelConfig,
    file_layers,
    known_keys,
    override_layer,
)
from megatron_fec.evaluate import powers_of_two
from megatron_fec.security import refuse_secrets

FILE_NAME = re.compile(r"[\w-]+")


@dataclass(kw_only=True)
class LayoutConfig:
    """What the engine computes with."""

    tensor_parallel: int = 1  # these two: of the native engine
    pipeline_parallel: int = 1
    precision: str = "bf16"  # bf16 | fp32


@dataclass(kw_only=True)
class SamplingConfig:
    """arXiv 2602.09782, table 3: temperature 0.7, top-p 0.8, top-k 20, 256 requests at a time."""

    engine: str = "vllm"  # vllm | native
    tensor_parallel: int = 1  # of vLLM
    gpu_memory_utilization: float = 0.9  # vLLM's share of a GPU; unused on CPU
    max_prompt_tokens: int = 1024  # longer prompts are left out and counted
    max_response_tokens: int = 7168
    temperature: float = 0.7
    top_p: float = 0.8  # 1 is off
    top_k: int = 20  # 0 is off
    responses_per_batch: int = 256  # sampled, scored and written together; what a kill can cost
    seed: int = 0


@dataclass(kw_only=True)
class BenchmarkConfig:
    source: str = MISSING  # as data.train: a file, NAME:SPLIT or NAME:CONFIG:SPLIT of the hub, embedded:countdown:validation
    samples: int = MISSING  # responses a problem: n of mean@n
    pass_at_k: list[int] = field(
        default_factory=list
    )  # each at most samples; empty: 1, 2, 4, ... up to samples
    prompt_column: str = "problem"  # a dot descends into a struct
    answer_column: str = "answer"
    answer_after: str | None = None  # the answer is what follows the last of these in its column
    prompt_style: str = "boxed"  # boxed | chat | plain

    @property
    def ks(self) -> list[int]:
        return list(self.pass_at_k) or powers_of_two(self.samples)


@dataclass(kw_only=True)
class EvaluationConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    output_dir: str = MISSING
    policy: LayoutConfig = field(default_factory=LayoutConfig)
    rollout: SamplingConfig = field(default_factory=SamplingConfig)
    verifier_timeout: float = 10.0  # seconds for one answer
    benchmarks: dict[str, BenchmarkConfig] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)  # which of the benchmarks; empty: all

    @property
    def chosen(self) -> dict[str, BenchmarkConfig]:
        """The benchmarks of this evaluation, in the order of the file."""
        return {name: one for name, one in self.benchmarks.items() if not self.only or name in self.only}

    @property
    def processes(self) -> int:
        """The least number of ranks that it runs on."""
        if self.rollout.engine == "vllm":
            return self.rollout.tensor_parallel
        return self.policy.tensor_parallel * self.policy.pipeline_parallel

    def validate(self) -> None:
        """Raises ConfigError naming setting, value, rule and remedy of the first broken rule."""
        refuse_secrets(self)
        _check_choices(self)
        _check_ranges(self)
        _check_benchmarks(self)


def load_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> EvaluationConfig:
    """The validated settings of a YAML file, which may name another by `base`, and `key=value` overrides."""
    typed = OmegaConf.structured(EvaluationConfig)
    try:
        for layer in [*file_layers(Path(path)), override_layer(list(overrides))]:
            typed = OmegaConf.merge(typed, layer)
        config = OmegaConf.to_object(typed)
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(str(error.full_key), path)) from error
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{error.full_key} is required; set it in {path} or as {error.full_key}=VALUE."
        ) from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        if "ListConfig" in str(error):
            raise ConfigError(
                f"{key} (in {path} or an override) must be a list, such as {key}=[a,b]."
            ) from error
        raise ConfigError(f"{key} in {path}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, EvaluationConfig)
    config.validate()
    return config


def _unknown_key(key: str, path: str | Path) -> str:
    known = known_keys(EvaluationConfig)
    parts = key.split(".")
    if parts[0] == "benchmarks" and len(parts) > 2:  # a setting of one benchmark
        known = [f"benchmarks.{parts[1]}.{item.name}" for item in fields(BenchmarkConfig)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f"Did you mean {near[0]}?" if near else f"The settings are {', '.join(known)}."
    return f"{key} is not a setting of an evaluation (in {path} or an override). {remedy}"


def _check_choices(config: EvaluationConfig) -> None:
    chosen = {"rollout.engine": config.rollout.engine, "policy.precision": config.policy.precision}
    allowed = {"rollout.engine": ("vllm", "native"), "policy.precision": ("bf16", "fp32")}
    for name, benchmark in config.benchmarks.items():
        chosen[f"benchmarks.{name}.prompt_style"] = benchmark.prompt_style
        allowed[f"benchmarks.{name}.prompt_style"] = CHOICES["data.prompt_style"]
    for key, value in chosen.items():
        if value not in allowed[key]:
            raise ConfigError(
                f"{key}={value} must be one of {', '.join(allowed[key])}.{_nearest(value, allowed[key])}"
            )


def _check_ranges(config: EvaluationConfig) -> None:
    policy, rollout = config.policy, config.rollout
    at_least_one = {
        "policy.tensor_parallel": policy.tensor_parallel,
        "policy.pipeline_parallel": policy.pipeline_parallel,
        "rollout.tensor_parallel": rollout.tensor_parallel,
        "rollout.max_prompt_tokens": rollout.max_prompt_tokens,
        "rollout.max_response_tokens": rollout.max_response_tokens,
        "rollout.responses_per_batch": rollout.responses_per_batch,
    }
    rules = [(key, value, value >= 1, "at least 1") for key, value in at_least_one.items()]
    rules += [
        (key, value, math.isfinite(value) and value > 0, "a finite number greater than 0")
        for key, value in (
            ("rollout.temperature", rollout.temperature),
            ("verifier_timeout", config.verifier_timeout),
        )
    ]
    rules += [
        (key, value, 0 < value <= 1, "in (0, 1]")
        for key, value in (
            ("rollout.top_p", rollout.top_p),
            ("rollout.gpu_memory_utilization", rollout.gpu_memory_utilization),
        )
    ]
    rules += [
        ("rollout.top_k", rollout.top_k, rollout.top_k >= 0, "0 (off) or more"),
        ("rollout.seed", rollout.seed, rollout.seed >= 0, "0 or more"),
    ]
    for key, value, is_met, rule in rules:
        if not is_met:
            raise ConfigError(f"{key}={value} must be {rule}.")
    is_native = rollout.engine == "native"
    for key in (
        ["rollout.tensor_parallel"] if is_native else ["policy.tensor_parallel", "policy.pipeline_parallel"]
    ):
        if at_least_one[key] > 1:
            other = "policy" if is_native else "rollout"
            raise ConfigError(
                f"{key}={at_least_one[key]} is not read by rollout.engine={rollout.engine}. "
                f"Set {other}.tensor_parallel instead."
            )


def _check_benchmarks(config: EvaluationConfig) -> None:
    if not config.benchmarks:
        raise ConfigError(
            "benchmarks holds none. Name one, such as benchmarks.mine.source=FILE benchmarks.mine.samples=4."
        )
    for name in config.only:
        if name not in config.benchmarks:
            raise ConfigError(
                f"only={name} must be one of the benchmarks {', '.join(config.benchmarks)}."
                f"{_nearest(name, list(config.benchmarks))}"
            )
    for name, benchmark in config.benchmarks.items():
        if not FILE_NAME.fullmatch(name):
            raise ConfigError(
                f"benchmarks.{name} must be named by letters, digits, _ and -: it becomes a file's name."
            )
        if benchmark.samples < 1:
            raise ConfigError(f"benchmarks.{name}.samples={benchmark.samples} must be at least 1.")
        for k in benchmark.pass_at_k:
            if not 1 <= k <= benchmark.samples:
                raise ConfigError(
                    f"benchmarks.{name}.pass_at_k={benchmark.pass_at_k}: k={k} must be between 1 and "
                    f"benchmarks.{name}.samples={benchmark.samples}. Sample more or lower k."
                )


def _nearest(value: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, allowed, n=1)
    return f" Did you mean {near[0]}?" if near else ""
