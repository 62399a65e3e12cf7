from pathlib import Path

import pytest

from megatron_fec.config import (
    AT_LEAST_ONE,
    CHOICES,
    NOT_NEGATIVE,
    POSITIVE,
    ConfigError,
    known_keys,
    load_config,
    save_config,
)

MINIMAL = """
model: {path: embedded}
algorithm: {prompts_per_update: 4, schedule: {name: id, total_steps: 6, options: {lower_schedule: text}}}
rollout: {prompts_per_step: 12, group_size: 2, max_prompt_tokens: 10, max_response_tokens: 22}
data: {train: embedded:countdown}
trainer: {run_dir: runs/x, max_steps: 5}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_minimal_file_loads_with_the_defaults(minimal: Path):
    config = load_config(minimal)
    assert config.optimizer.lr == 1e-6
    assert config.algorithm.thresholds.upper == [-0.25, 0.5]
    assert config.updates_per_rollout == 3


def test_overrides_win_and_epochs_multiply_the_updates(minimal: Path):
    config = load_config(
        minimal, ["algorithm.epochs=2", "optimizer.lr=1e-3", "algorithm.thresholds.upper=[0,0.28]"]
    )
    assert config.updates_per_rollout == 6
    assert config.optimizer.lr == 1e-3  # a number, not the string that plain YAML makes of it
    assert config.algorithm.thresholds.upper == [0.0, 0.28]


def test_a_user_must_know_at_most_60_keys():
    keys = known_keys()
    assert len(keys) <= 60
    assert {"model.path", "algorithm.schedule.name", "trainer.resume"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_every_rule_names_a_setting_that_exists():
    assert set(CHOICES) | set(AT_LEAST_ONE) | set(POSITIVE) | set(NOT_NEGATIVE) <= set(known_keys())


@pytest.mark.parametrize("key", AT_LEAST_ONE)
def test_at_least_one(minimal: Path, key: str):
    with pytest.raises(ConfigError, match=f"{key}=0 must be at least 1"):
        load_config(minimal, [f"{key}=0"])


@pytest.mark.parametrize("key", POSITIVE)
def test_positive(minimal: Path, key: str):
    with pytest.raises(ConfigError, match=rf"{key}=0\.0 must be greater than 0"):
        load_config(minimal, [f"{key}=0"])


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_not_negative(minimal: Path, key: str):
    load_config(minimal, [f"{key}=0"])
    with pytest.raises(ConfigError, match=f"{key}=-1.* must be 0 or more"):
        load_config(minimal, [f"{key}=-1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=nan", r"optimizer\.lr=nan must be a finite number"),
        ("rollout.temperature=inf", r"rollout\.temperature=inf must be a finite number"),
        ("algorithm.thresholds.eps_std=-0.2", r"eps_std=-0\.2 must be between 0 and 1"),
        ("optimizer.beta2=1.0", r"optimizer\.beta2=1\.0 must be between 0 and 1"),
        ("data.train=[a", r"override 'data\.train=\[a' has a value that is not YAML"),
    ],
)
def test_values_that_no_run_can_use(minimal: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(minimal, [override])


@pytest.mark.parametrize("key", CHOICES)
def test_choices(minimal: Path, key: str):
    with pytest.raises(ConfigError, match=f"{key}=nonsense must be one of {CHOICES[key][0]}"):
        load_config(minimal, [f"{key}=nonsense"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.engine=vlm"],
            r"rollout\.engine=vlm must be one of vllm, native, servers\. Did you mean vllm\?",
        ),
        (
            ["algorithm.schedule.nmae=id"],
            r"algorithm\.schedule\.nmae is not .* Did you mean algorithm\.schedule\.name\?",
        ),
        (["trainer.learning_rat=1"], "trainer.learning_rat is not a setting"),
        (["optimizer.max_steps=3"], r"optimizer\.max_steps is not a setting .* Did you mean "),
        (["zzz=3"], r"zzz is not a setting .* The sections are .*algorithm.*trainer"),
        (["trainer.max_steps=many"], r"trainer\.max_steps in .*'many'.*[Ii]nteger"),
        (["trainer.max_steps=null"], r"trainer\.max_steps in "),
        (["trainer.max_steps"], "override 'trainer.max_steps' must have the form key=value"),
        (["rollout.gpu_memory_utilization=1.5"], r"rollout\.gpu_memory_utilization=1\.5 must be in \(0, 1\]"),
        (
            ["algorithm.options.dual_clip=1"],
            r"algorithm\.options\.dual_clip=1 must be greater than 1, or null",
        ),
        (
            ["algorithm.thresholds.upper=[0.28]"],
            r"algorithm\.thresholds\.upper=\[0\.28\] must be \[slope, intercept\]",
        ),
        (
            ["algorithm.thresholds.upper=[-0.6,0.5]"],
            r"thresholds\.upper=.* is -0\.1 at p=1; it must stay in \(0, inf\)",
        ),
        (
            ["algorithm.thresholds.lower=[0.5,0.5]"],
            r"thresholds\.lower=.* is 1 at p=1; it must stay in \(0, 1\)",
        ),
        (
            ["algorithm.prompts_per_update=5"],
            r"prompts_per_update=5 must divide .*prompts_per_step=12.* such as (4|6)\.",
        ),
        (["rollout.group_size=1"], r"rollout\.group_size=1 must be at least 2"),
        (
            ["policy.micro_batch_tokens=31"],
            r"micro_batch_tokens=31 must hold the longest sequence, 32 .* at least 32",
        ),
        (["policy.sequence_parallel=true"], r"sequence_parallel=true needs policy\.tensor_parallel > 1"),
        (
            ["policy.context_parallel=3", "policy.micro_batch_tokens=35"],
            r"=35 must hold the longest sequence, 32 .* a multiple of 6 for policy\.context_parallel=3\. Use at least 36",
        ),
        (["algorithm.prompts_per_update=12"], r"schedule\.name=id with one update per rollout does nothing"),
        (["trainer.max_steps=7"], r"schedule\.total_steps=6 must be at least trainer\.max_steps=7"),
        (["algorithm.schedule.options.phase_ratio=1"], r"phase_ratio=1 must be between 0 and 1"),
        (
            ["algorithm.schedule.phase_ratio=0.4"],
            r"phase_ratio is not a setting .*algorithm\.schedule\.options",
        ),
        (
            ["algorithm.schedule.name=did", "algorithm.schedule.options.lower_schedule=txt"],
            r"=txt must be one of text, printed",
        ),
        (
            ["algorithm.schedule.name=od", "algorithm.schedule.options.h_min_ratio=0"],
            r"h_min_ratio=0 must be in \(0, 1\]",
        ),
        (
            ["algorithm.schedule.name=od", "algorithm.schedule.options.entropy_ema=1"],
            r"entropy_ema=1 must be in \[0, 1\)",
        ),
    ],
)
def test_bad_settings_name_setting_value_and_rule(minimal: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(minimal, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["policy.micro_batch_tokens=32"],
        ["policy.context_parallel=2", "policy.micro_batch_tokens=32"],
        ["policy.context_parallel=3", "policy.micro_batch_tokens=36"],
        ["trainer.max_steps=6"],
        ["algorithm.options.dual_clip=null"],
        ["policy.sequence_parallel=true", "policy.tensor_parallel=2"],
        [
            "algorithm.schedule.name=grpo",
            "algorithm.prompts_per_update=12",
        ],
        ["algorithm.prompts_per_update=12", "algorithm.epochs=2"],
        ["algorithm.schedule.name=od"],
    ],
)
def test_settings_beside_the_rules_are_accepted(minimal: Path, overrides: list[str]):
    load_config(minimal, overrides)


def test_a_bare_off_is_not_false(minimal: Path):
    assert load_config(minimal, ["trainer.wandb=off"]).trainer.wandb == "off"


def test_missing_file_names_the_folder_of_examples(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist.*configs/"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [1", "is not readable YAML"),
        (b"\xff\xfe\x00", "is not readable YAML"),
        (b"- 1\n", "must hold a mapping"),
        (
            b"model: {path: x}\n",
            r"algorithm\.schedule\.name is required; set it in .*bad.yaml or as algorithm\.schedule\.name=VALUE",
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: bytes, message: str):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_save_and_load_round_trip(minimal: Path, tmp_path: Path):
    config = load_config(
        minimal, ["algorithm.options.dual_clip=null", "optimizer.lr=3e-7", "data.validation=val.jsonl"]
    )
    saved = tmp_path / "config.yaml"
    save_config(config, saved)
    assert load_config(saved) == config


def test_base_chain_later_files_win(minimal: Path, tmp_path: Path):
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "middle.yaml").write_text("base: ../minimal.yaml\noptimizer: {lr: 1e-4, warmup_steps: 7}\n")
    (folder / "top.yaml").write_text("base: middle.yaml\noptimizer: {lr: 1e-5}\n")
    config = load_config(folder / "top.yaml")
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (1e-5, 7)
    assert config.rollout.prompts_per_step == 12
    assert load_config(minimal).optimizer.warmup_steps == 0


def test_a_missing_base_is_named(tmp_path: Path):
    path = tmp_path / "top.yaml"
    path.write_text("base: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"gone\.yaml does not exist"):
        load_config(path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("recompute=most", "policy.options.recompute=most must be one of none, selective, full."),
        ("virtual_stages=0", "policy.options.virtual_stages=0 must be an integer of at least 1."),
        ("optimizer_on_host=1.5", r"policy.options.optimizer_on_host=1.5 must be in \[0, 1\]."),
        ("overlap=1", "policy.options.overlap=1 must be true or false."),
        ("offload=some", "policy.options.offload=some must be one of none, optimizer, all."),
        (
            "expert_paralel=2",
            "policy.options.expert_paralel is not read by the policy. Did you mean expert_parallel?",
        ),
    ],
)
def test_an_option_of_the_policy_that_is_wrong(minimal: Path, option: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(minimal, [f"policy.options.{option}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{offload: all, fp8_params: true}", r"fp8_params=true.* Use policy\.options\.offload=optimizer"),
        ("{offload: optimizer, optimizer_on_host: 1.0}", r"nothing to move.* Set offload to none, or to all"),
    ],
)
def test_an_offload_that_cannot_be(minimal: Path, options: str, message: str):
    with pytest.raises(ConfigError, match=rf"policy\.options\.offload=.*{message}"):
        load_config(minimal, [f"policy.options={options}"])
