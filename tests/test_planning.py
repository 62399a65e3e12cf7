"""The plan: what it says of memory, time and layouts, what it refuses, and what comes out on paper."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_fec.cli import app
from megatron_fec.config import Config, ConfigError, load_config
from megatron_fec.planning import assumptions
from megatron_fec.planning.command import DOES_NOT_FIT, FITS, find_model, run_plan, stated_nodes
from megatron_fec.planning.gpus import GPUS, find_gpu, gpu_of_device
from megatron_fec.planning.layouts import Layout, all_layouts
from megatron_fec.planning.lengths import response_lengths
from megatron_fec.planning.limits import first_limit, scaling
from megatron_fec.planning.links import Links
from megatron_fec.planning.page import reasons
from megatron_fec.planning.plan import Machine, Model, Plan, lengths_of, make_plan
from megatron_fec.policy.sizes import stage_memory

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QWEN_32B = CONFIGS / "qwen32b_id.yaml"
MIXTURE = CONFIGS / "qwen3_30b_a3b_id.yaml"


def planned(path: Path = QWEN_32B, *overrides: str, nodes: int = 4, gpu: str = "h100-80") -> Plan:
    config = load_config(path, overrides)
    model, _ = find_model(config)
    return make_plan(config, model, machine(nodes, gpu), lengths_of(config))


def machine(nodes: int, gpu: str = "h100-80") -> Machine:
    return Machine(gpu=find_gpu(gpu), nodes=nodes, gpus_per_node=8)


def known(path: Path) -> tuple[Config, Model]:
    config = load_config(path)
    return config, find_model(config)[0]


# ------------------------------------------------------------------ memory


def test_the_policys_bytes_are_those_of_sizes_by_phase_and_offload():
    """Kept in each phase: (weights, gradients, optimizer), by policy.options.offload."""
    everywhere = {
        "sampling": "wgo",
        "refit": "wgo",
        "log-probs": "wgo",
        "training": "wgo",
        "checkpoint": "wgo",
    }
    kept = {
        "none": everywhere,
        "optimizer": everywhere | {"sampling": "wg", "refit": "wg", "log-probs": "wg"},
        "all": {"sampling": "", "refit": "w", "log-probs": "w", "training": "wgo", "checkpoint": "wo"},
    }
    config, model = known(QWEN_32B)
    held = stage_memory(model.hf_config, config.policy, 0, world_size=32)
    sizes = {
        "w": ("weights", held.weights),
        "g": ("gradients", held.gradients),
        "o": ("optimizer", held.optimizer),
    }
    for offload, phases in kept.items():
        memory = planned(QWEN_32B, f"policy.options.offload={offload}").memory
        for phase, letters in phases.items():
            expected = {sizes[letter][0]: sizes[letter][1] for letter in letters}
            policy_parts = ("weights", "gradients", "optimizer")
            assert {n: b for n, b in memory.phases[phase].items() if n in policy_parts} == expected


def test_options_change_the_bytes_that_they_are_about():
    def part(name: str, *overrides: str, phase: str = "training") -> float:
        return planned(QWEN_32B, *overrides).memory.phases[phase].get(name, 0.0)

    optimizer = part("optimizer")
    assert part("optimizer", "policy.options.optimizer_on_host=0.75") == pytest.approx(optimizer / 4)
    bf16_moments = part("optimizer", "policy.options.optimizer_precision=bf16_moments")
    assert bf16_moments == pytest.approx(optimizer * 8 / 12)
    fp8 = "policy.precision=fp8_blockwise"
    weights = part("weights")
    assert part("weights", fp8) == 2 * weights
    ends = 2 * 152064 * 5120  # embedding and head, which stay in bf16, on engines of 4 ranks
    assert part("engine weights", "rollout.precision=fp8", phase="sampling") == pytest.approx(
        (part("engine weights", phase="sampling") + 2 * ends / 4) / 2
    )
    assert part("logits", "policy.logits_chunk_tokens=1024") == pytest.approx(part("logits") / 8)
    assert part("activations", "policy.options.recompute=full") < part("activations") / 5


def test_a_stage_holds_the_micro_batches_of_1f1b():
    """The first of four stages holds four micro-batches of a quarter of the layers: as much as one stage alone."""
    one = planned(QWEN_32B, nodes=4).memory.phases["training"]["activations"]
    four = planned(QWEN_32B, "policy.pipeline_parallel=4", nodes=4).memory.phases["training"]["activations"]
    assert four == pytest.approx(one, rel=0.02)


def test_more_ranks_than_heads_of_keys_hold_copies_of_the_cache():
    """Eight heads of keys: TP 8 halves a GPU's bytes of a token, TP 40 would not."""
    _, model = known(QWEN_32B)
    tokens = [model.shape.cache_bytes(2, ranks=ranks) for ranks in (1, 4, 8, 40)]
    assert tokens == [262144, 65536, 32768, 32768]


def test_what_does_not_fit_names_phase_and_excess():
    plan = planned(QWEN_32B, "policy.options.offload=none", "policy.tensor_parallel=4")
    assert not plan.fits
    [first, *_] = plan.obstacles
    total = plan.memory.total("sampling") / 1e9
    assert first.startswith(f"sampling takes {total:.1f} GB of 80, {total - 80:.1f} GB too much")
    assert "most of it" in first


def test_an_engine_without_room_for_a_sequence_does_not_fit():
    plan = planned(QWEN_32B, "rollout.gpu_memory_utilization=0.24")
    assert any("the KV cache of an engine holds" in obstacle for obstacle in plan.obstacles)


# ------------------------------------------------------------------ time


def test_lengths_have_the_mean_that_was_asked_for():
    lengths = response_lengths(prompt=200.0, mean=1792.0, longest=7168.0)
    width = lengths.longest / 4096
    mean = sum(lengths.share_longer((i + 0.5) * width) * width for i in range(4096))
    assert mean == pytest.approx(1792, rel=1e-3)
    assert lengths.context > lengths.sequence  # a token is likelier to be of a long sequence
    same = response_lengths(prompt=0.0, mean=64.0, longest=64.0)
    assert same.share_longer(63.0) == 1.0
    assert same.context == pytest.approx(64, rel=0.02)


def test_training_takes_what_its_flops_take():
    """By hand: 6 FLOPs a weight and token, 6 q x context a layer and token, at half the peak of 32 GPUs."""
    plan = planned()
    config, model = plan.config, model_of(plan)
    lengths, shape = lengths_of(config), model.shape
    weights = shape.parameters - shape.vocabulary * shape.hidden  # the embedding is looked up
    flops = 6 * weights + 6 * shape.layers * shape.queries * lengths.context
    seconds = 4096 * lengths.sequence * flops / (32 * 989e12 * assumptions.MATMUL["bf16"])
    assert 16 * plan.time.update.products == pytest.approx(seconds, rel=1e-3)
    assert plan.time.mfu(989e12, gpus=32, whole_step=False) < assumptions.MATMUL["bf16"]


def model_of(plan: Plan) -> Model:
    return find_model(plan.config)[0]


def test_recompute_and_a_chunked_head_cost_products():
    plain = planned().time.update.products
    assert planned(QWEN_32B, "policy.options.recompute=full").time.update.products == pytest.approx(
        plain * 4 / 3, rel=0.03
    )
    assert planned(QWEN_32B, "policy.logits_chunk_tokens=1024").time.update.products > plain


def test_the_bubble_shrinks_with_virtual_stages():
    four = planned(QWEN_32B, "policy.pipeline_parallel=4").time.update
    chunks = ["policy.pipeline_parallel=4", "policy.options.virtual_stages=4"]
    assert planned(QWEN_32B, *chunks).time.update.bubble < four.bubble / 2
    assert planned().time.update.bubble == 0.0


def test_collectives_cross_the_slowest_link_of_their_group():
    links = Links(gpu=GPUS["h100-80"], gpus_per_node=8)
    assert links.gather(1e9, 8, 8) == pytest.approx(7 / 8 * 1e9 / (450e9 * assumptions.LINK))
    assert links.gather(1e9, 16, 16) == pytest.approx(15 / 16 * 1e9 / (50e9 * assumptions.LINK))
    assert links.all_reduce(1e9, 8, 8) == 2 * links.gather(1e9, 8, 8)
    overlapped = planned(QWEN_32B, "policy.options.overlap=true").time
    assert overlapped.reduction == pytest.approx(planned().time.reduction * assumptions.OVERLAPPED)


def test_decoding_is_slower_on_less_bandwidth_and_with_longer_responses():
    assert planned(gpu="h200").time.sampling.decode < planned().time.sampling.decode
    config, model = known(QWEN_32B)
    seconds = [
        make_plan(config, model, machine(4), lengths_of(config, mean)).time.sampling.total
        for mean in (500, 1000, 4000)
    ]
    assert seconds == sorted(seconds)


def test_a_mixture_reads_the_experts_that_were_chosen():
    """Few sequences touch few experts; many touch all."""
    from megatron_fec.planning.sampling_time import _weights_read

    shape = known(MIXTURE)[1].shape
    dense = shape.parameters - shape.vocabulary * shape.hidden
    assert _weights_read(shape, 1) < 0.15 * dense
    assert _weights_read(shape, 1000) == pytest.approx(dense, rel=0.01)


def test_engines_of_their_own_are_paid_for_and_sample_ahead():
    servers = ["rollout.engine=servers", "rollout.max_lag=1", "rollout.seed_per_request=true"]
    plan = planned(QWEN_32B, *servers, "policy.options.offload=none")
    assert plan.time.gpus == 64
    rest = sum(plan.time.parts.values()) - plan.time.parts["rollout"]
    assert plan.time.total == max(rest, plan.time.parts["rollout"])
    assert "KV cache" not in plan.memory.phases["training"]
    assert plan.memory.phases["sampling"]["KV cache"] == 0.0


# ------------------------------------------------------------------ layouts and scale


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    config, model = known(QWEN_32B)
    return all_layouts(config, model, machine(4), lengths_of(config))


def test_layouts_are_ranked_and_the_others_have_reasons(layouts: list[Layout]):
    fitting = [layout for layout in layouts if not layout.reason]
    seconds = [layout.plan.time.total for layout in fitting if layout.plan]
    assert len(seconds) > 20 and seconds == sorted(seconds)
    assert layouts[: len(fitting)] == fitting
    for layout in layouts[len(fitting) :]:
        assert ("GB too much" in layout.reason) == (layout.kind == "memory")
    kinds = {layout.kind for layout in layouts}
    assert kinds == {"", "divide", "memory"}
    assert "TP8 PP1 CP1 none" in {layout.name for layout in fitting}


def test_reasons_are_grouped_with_the_nearest_miss(layouts: list[Layout]):
    lines = reasons([layout for layout in layouts if layout.reason])
    assert sum(int(line.split()[0]) for line in lines) == len([x for x in layouts if x.reason])
    misses = [
        x.plan.fullest_bytes - 80e9
        for x in layouts
        if x.plan and x.plan.memory.fullest == "training" and x.reason
    ]
    [training] = [line for line in lines if "memory, training" in line]
    assert training.endswith(f"by {min(misses) / 1e9:.1f} GB")
    assert any("must divide the N processes of this run" in line for line in lines)


def test_a_thousand_nodes_on_paper_name_what_limits():
    config, model = known(QWEN_32B)
    rows = scaling(config, model, machine(1024), lengths_of(config))
    able = [row for row in rows if row.seconds]
    assert [row.nodes for row in able] == [2**n for n in range(1, 9)]
    assert rows[0].limit.startswith("training takes")
    assert "256 sequences" in rows[-1].limit and "do not feed 512 data-parallel ranks" in rows[-1].limit
    assert first_limit(rows).startswith("from ") and "First limit: decode" in first_limit(rows)
    speedups = [row.speedup for row in able if row.speedup]
    assert speedups[0] == 1.0 and speedups == sorted(speedups)


def test_the_first_limit_is_starvation_where_all_else_scales():
    config, model = known(QWEN_32B)
    config = replace(config, algorithm=replace(config.algorithm, prompts_per_update=1))
    rows = scaling(config, model, machine(1), lengths_of(config))
    assert rows[-1].nodes == 16
    assert "1" in first_limit(rows[-1:]) and first_limit(rows[-1:]).startswith(
        "first limit, at 16 nodes: an update's 8"
    )


# ------------------------------------------------------------------ the command


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments])
    return result.exit_code, result.output


def test_the_output_is_short_plain_and_whole():
    code, text = command(str(QWEN_32B))
    lines = text.splitlines()
    assert code == FITS
    assert len(lines) < 100 and text.isascii() and "\x1b" not in text
    for heading in (
        "memory of the fullest GPU",
        "time of a step",
        "verdict: fits",
        "layouts: ",
        "what limits: ",
    ):
        assert any(line.startswith(heading) for line in lines), heading
    assert "on 4 nodes x 8 h100-80: TP8 PP1 CP1 none, DP 4, bf16" in text
    assert all(line == line.rstrip() or "  " in line for line in lines)


def test_exit_code_1_says_why():
    code, text = command(str(QWEN_32B), "--nodes", "1")
    assert code == DOES_NOT_FIT
    assert "verdict: DOES NOT FIT" in text and "GB too much" in text
    code, text = command(str(QWEN_32B), "--nodes", "1000")
    assert code == DOES_NOT_FIT
    assert "256 sequences must feed the 1000 data-parallel ranks" in text


def test_every_layout_has_its_line_with_all():
    _, text = command(str(QWEN_32B), "--all")
    assert re.search(r"^  TP1 PP1 CP1 none: .* GB too much", text, re.MULTILINE)
    assert "TP8 PP16 CP8 full: policy.tensor_parallel=8 x" in text


def test_price_and_nodes_are_the_users():
    _, text = command(str(QWEN_32B), "--price", "1.5", "--nodes", "8", "--gpu", "h200")
    assert "at $1.5 a GPU hour" in text and "on 8 nodes x 8 h200" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gpu", "h100"],
            "--gpu h100 is not a GPU that the planner knows: h100-80, h200, b200. Did you mean h100-80?",
        ),
        (["--gpu", "mi300x"], "--gpu mi300x is not a GPU that the planner knows: h100-80, h200, b200."),
        (
            ["policy.precision=mxfp8"],
            "policy.precision=mxfp8 needs a GPU of compute capability 10.0 (B200), and this one has 9.0.",
        ),
        (["--nodes", "0"], "--nodes 0 must be at least 1."),
        (["--gpus-per-node", "0"], "--gpus-per-node 0 must be at least 1."),
        (["--price", "0"], "--price 0 must be greater than 0"),
        (
            ["--response-tokens", "9000"],
            "--response-tokens 9000 must be from 1 to rollout.max_response_tokens=7168.",
        ),
        (["policy.tensor_parallel=3"], "= 3 must divide the 32 processes of this run. Start a multiple of 3"),
        (
            ["policy.tensor_parallel=16"],
            "policy.tensor_parallel=16 must divide the checkpoint's num_attention_heads=40.",
        ),
        (["policy.pipeline_parallel=32"], "= 256 must divide the 32 processes"),
        (
            ["rollout.max_prompt_tokens=130000", "policy.micro_batch_tokens=140000"],
            "= 137168 must not exceed the checkpoint's max_position_embeddings=131072. Lower one of them.",
        ),
        (
            ["rollout.tensor_parallel=3"],
            "rollout.tensor_parallel=3 must divide the checkpoint's num_attention_heads=40.",
        ),
        (["policy.tensr_parallel=4"], "policy.tensr_parallel is not a setting"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(arguments: list[str], message: str):
    code, text = command(str(QWEN_32B), *arguments)
    assert code == 2
    assert text.startswith("error: ") and message in text
    assert len(text.splitlines()) == 1


def test_an_unknown_model_without_network_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_fec.dry_run.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"model\.path=some/model is not in reach .* Give a folder with config\.json"
    ):
        run_plan(QWEN_32B, ["model.path=some/model"])


def test_a_missing_file_is_an_error():
    with pytest.raises(ConfigError, match=r"--config configs/none\.yaml does not exist"):
        run_plan(Path("configs/none.yaml"), [])


def test_nodes_come_from_the_file(tmp_path: Path):
    assert stated_nodes(QWEN_32B) == 4
    other = tmp_path / "other.yaml"
    other.write_text("# a file without the line\nnodes: 3\n")
    assert stated_nodes(other) == 1


def test_gpus_are_found_by_the_name_that_cuda_gives():
    assert gpu_of_device("NVIDIA H200") is GPUS["h200"]
    assert gpu_of_device("NVIDIA A100-SXM4-80GB") is None
    assert {gpu.name for gpu in GPUS.values()} == set(GPUS)
