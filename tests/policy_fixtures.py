"""Tiny checkpoints, a fixed batch, and a policy on any layout of gloo ranks: shared by the tests of the policy floor.

Imports what the megatron-core 0.19 environment has, which is nothing above megatron_fec.rollout.packing.
"""

from __future__ import annotations

import multiprocessing
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ranks import run_on_ranks
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_fec.algorithm.losses import negative_log_likelihood
from megatron_fec.config import AlgorithmConfig, OptimizerConfig, PolicyConfig, ScheduleConfig
from megatron_fec.policy.parallel import ParallelLayout, initialize_parallel
from megatron_fec.policy.step import (
    Policy,
    TokenLoss,
    build_policy,
    compute_logprobs,
    cores,
    reduce_metrics,
    train_update,
)
from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.policy.weights import hf_weights
from megatron_fec.rollout.packing import PackLayout, pack, with_sample_values
from megatron_fec.token_loss import policy_token_loss
from megatron_fec.types import (
    BlendWeights,
    LossOutput,
    MicroBatch,
    Prompt,
    Sample,
    SampleGroup,
    TokenStats,
)

torch.set_num_threads(1)  # before transformers runs in a test: its threads would not survive the fork
WORDS = list(string.digits + string.punctuation)[:35]  # with a space and the end a vocabulary of 37
VOCABULARY = 37
ROWS_WITHOUT_TOKEN = 16  # of the Qwen3 and Llama checkpoints
PROMPTS, GROUP_SIZE = 4, 3
WEIGHTS = BlendWeights(upper=0.6, lower=0.3)  # a step of ID between its two ends
DUAL_CLIP = 1.8  # low enough that some tokens reach it
LONGEST = 16  # max_response_tokens of the loss
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS: dict[str, Any] = {  # of a qwen3_moe checkpoint
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
ROPES = {
    "llama": {"rope_type": "default", "rope_theta": 10000.0},
    "llama_tied": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": LLAMA3_ROPE,
    "llama_linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}

TokenKey = tuple[int, int]  # number of the sample in the batch, position in its sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one update did; tokens are those of this rank, all else is the same on every rank."""

    on_policy: dict[str, float]  # means of compute_logprobs
    metrics: dict[str, float]  # means of train_update
    grad_norm: float
    tokens: dict[
        TokenKey, tuple[float, float, bool]
    ]  # log-prob, entropy, True where the loss has no gradient
    weights: dict[str, Tensor]  # Hugging Face names, after the update


def save_model(folder: Path, kind: str) -> Path:
    """Writes the checkpoint named `kind`: qwen2, tied, qwen3 (norms on queries and keys), qwen3_kv4, qwen3_moe (four
    experts, two a token), or a key of ROPES.

    All but the first two have rows without a token, and all but these and qwen3_kv4 have grouped key-value heads. With
    "_deep" behind the last two kinds of name it has four layers instead of two.
    """
    is_deep, kind = kind.endswith("_deep"), kind.removesuffix("_deep")
    save_tiny_model(folder, WORDS, seed=5, is_tied=kind == "tied")
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY + ROWS_WITHOUT_TOKEN,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4 if is_deep else 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "qwen3_kv4" else 2,
        "head_dim": 24,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "tie_word_embeddings": kind == "llama_tied",
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if kind in ("qwen2", "tied"):
            model = AutoModelForCausalLM.from_pretrained(folder)
        elif kind in ("qwen3", "qwen3_kv4"):
            model = Qwen3ForCausalLM(Qwen3Config(**sizes))
        elif kind == "qwen3_moe":
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **EXPERTS))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=ROPES[kind]))
        # Its row for padding is 0, of which a norm has a huge gradient, and the tests feed every id.
        model.model.embed_tokens.weight.data[VOCABULARY - 1].normal_(0, 0.1)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms of 1 and biases of 0 would hide one that is left out or exchanged
                torch.nn.init.uniform_(parameter, *((0.5, 1.5) if "norm" in name else (-0.3, 0.3)))
    model.save_pretrained(folder)
    return folder


def build(
    model_dir: Path,
    settings: PolicyConfig,
    *,
    layout: ParallelLayout | None = None,
    optimizer: OptimizerConfig | None = None,
    temperature: float = 1.0,
    total_steps: int = 9,
) -> Policy:
    """The policy on the ranks of this process group; a second one gets the first one's layout."""
    return build_policy(
        str(model_dir),
        settings,
        optimizer or OptimizerConfig(lr=1e-2, clip_grad=1e9),
        layout=layout or initialize_parallel(settings, seed=3),
        temperature=temperature,
        total_steps=total_steps,
        vocab_size=VOCABULARY,
    )


def fp32(**settings: Any) -> PolicyConfig:
    """fp32, the plain optimizer and one micro-batch, unless told otherwise."""
    defaults = {"precision": "fp32", "distributed_optimizer": False, "micro_batch_tokens": 512}
    return PolicyConfig(**{**defaults, **settings})


def on_layout(
    model_dir: Path,
    job: Callable[[Policy], Any],
    settings: PolicyConfig | None = None,
    *,
    data_parallel: int = 1,
    **build_arguments: Any,
) -> list[Any]:
    """job(policy) of every rank, in rank order; pipeline stages are the slowest axis, tensor ranks the fastest."""
    chosen = settings or fp32()

    def on_rank(rank: int) -> Any:
        allow_children()
        return job(build(model_dir, chosen, **build_arguments))

    model_ranks = chosen.tensor_parallel * chosen.pipeline_parallel * chosen.context_parallel
    return run_on_ranks(model_ranks * data_parallel, on_rank)


def allow_children() -> None:
    """Lets this rank start the process that saves in the background; a daemon may not."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def make_groups(prompts: int = PROMPTS, group_size: int = GROUP_SIZE) -> list[SampleGroup]:
    """Random token ids; prompts of 2 to 5, responses of 1 to 9."""
    generator = torch.Generator().manual_seed(17)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())

    def sample() -> Sample:
        token_ids = ids(1, 9)
        logprobs = (-5 * torch.rand(len(token_ids), generator=generator)).tolist()
        return Sample(
            token_ids=token_ids, logprobs=tuple(logprobs), text="", is_truncated=False, weight_version=0
        )

    def group(number: int) -> SampleGroup:
        prompt = Prompt(prompt_id=number, text="", token_ids=ids(2, 5), answer="", verifier="")
        return SampleGroup(prompt=prompt, samples=tuple(sample() for _ in range(group_size)))

    return [group(number) for number in range(prompts)]


def advantages(prompts: int = PROMPTS, group_size: int = GROUP_SIZE) -> Tensor:
    """[P, G] of both signs."""
    return torch.randn(prompts, group_size, generator=torch.Generator().manual_seed(4))


def pack_for(
    policy: Policy,
    groups: Sequence[SampleGroup],
    *,
    micro_batch_tokens: int = 512,
    multiple: int = 2,
    prompts_per_update: int | None = None,
    seed: int = 1,
) -> list[list[MicroBatch]]:
    """This rank's micro-batches, [update][micro-batch], with advantages."""
    layout = PackLayout(
        data_parallel_rank=policy.layout.data_parallel_rank,
        data_parallel_size=policy.layout.data_parallel,
        micro_batch_tokens=micro_batch_tokens,
        multiple=multiple,
        context_parallel_rank=policy.layout.context_parallel_rank,
        context_parallel_size=policy.layout.context_parallel,
        micro_batch_multiple=policy.layout.micro_batch_multiple,
    )
    updates = pack(groups, layout=layout, prompts_per_update=prompts_per_update or len(groups), seed=seed)
    return with_sample_values(updates, advantages=advantages(len(groups), len(groups[0].samples)))


def old_logprob_table(model_dir: Path) -> Tensor:
    """[samples, positions] log-probs of a policy that is far enough away for all kinds of clips to happen."""
    table = torch.randn(PROMPTS * GROUP_SIZE, 16, generator=torch.Generator().manual_seed(9)).double() * 0.6
    for (sample, position), (logprob, _) in hf_tokens(model_dir, make_groups(), torch.float64).items():
        table[sample, position] += logprob
    return table.float()


@torch.no_grad()
def hf_tokens(
    model_dir: Path, groups: Sequence[SampleGroup], dtype: torch.dtype, *, temperature: float = 1.0
) -> dict[TokenKey, tuple[float, float]]:
    """(log-prob, entropy) of each response token by transformers, one sequence at a time, over the true vocabulary."""
    # Not the grouped products of a mixture of experts, which have no float64.
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, experts_implementation="eager")
    tokens = {}
    samples = [(group.prompt.token_ids, sample.token_ids) for group in groups for sample in group.samples]
    for number, (prompt, response) in enumerate(samples):
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, :, :VOCABULARY]
        logprobs = torch.log_softmax(logits / temperature, -1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        for position, token in enumerate(response, start=len(prompt) - 1):
            tokens[number, position] = (logprobs[position, token].item(), entropies[position].item())
    return tokens


def off_policy(micro_batch: MicroBatch, table: Tensor) -> MicroBatch:
    """The micro-batch with its old log-probs from old_logprob_table, in any packing."""
    old = table[micro_batch.sequence_ids, micro_batch.position_ids.clamp_max(15)]  # padding: some value
    return replace(micro_batch, old_logprobs=old)


def clip_token_loss(
    stats: TokenStats,
    micro_batch: MicroBatch,
    *,
    weights: BlendWeights = WEIGHTS,
    aggregation: str = "token_mean",
) -> LossOutput:
    """The clipped surrogate with dynamic bounds, as the trainer builds it."""
    schedule = ScheduleConfig(name="id", total_steps=1, options={"lower_schedule": "text"})
    algorithm = AlgorithmConfig(
        schedule=schedule, aggregation=aggregation, options={"dual_clip": DUAL_CLIP}, prompts_per_update=1
    )
    token_loss = policy_token_loss(
        algorithm, weights, max_response_tokens=LONGEST, context_group=None, seed=0
    )
    return token_loss(stats, micro_batch)


def nll_token_loss(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
    """Supervised loss of the response tokens."""
    return negative_log_likelihood(stats.logprobs, stats.entropy, micro_batch.response_mask)


def recorded(token_loss: TokenLoss, tokens: dict[TokenKey, tuple[float, float, bool]]) -> TokenLoss:
    """The same loss, which also writes down each response token that it sees."""

    def with_record(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
        out = token_loss(stats, micro_batch)
        (gradient,) = torch.autograd.grad(out.loss_sum, stats.logprobs, retain_graph=True)
        mask = micro_batch.response_mask
        columns = (
            micro_batch.sequence_ids,
            micro_batch.position_ids,
            stats.logprobs,
            stats.entropy,
            gradient,
        )
        for sample, position, logprob, entropy, slope in zip(
            *(c[mask].tolist() for c in columns), strict=True
        ):
            assert (sample, position) not in tokens
            tokens[sample, position] = (logprob, entropy, slope == 0.0)
        return out

    return with_record


def one_update(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    *,
    old_logprobs: Tensor | None,
    token_loss: TokenLoss = clip_token_loss,
) -> Outcome:
    """compute_logprobs, then one update, off policy where a table of old log-probs is given."""
    filled, sums = compute_logprobs(policy, [micro_batches])
    micro_batches = filled[0] if old_logprobs is None else [off_policy(mb, old_logprobs) for mb in filled[0]]
    tokens: dict[TokenKey, tuple[float, float, bool]] = {}
    policy.scheduler.step(1)
    metric_sums, grad_norm = train_update(policy, micro_batches, recorded(token_loss, tokens))
    return Outcome(
        on_policy=sums.means(),
        metrics=reduce_metrics(metric_sums, policy.layout).means(),
        grad_norm=grad_norm,
        tokens=tokens,
        weights=copied_weights(policy),
    )


def copied_weights(policy: Policy) -> dict[str, Tensor]:
    """The full tensors by Hugging Face name, on every rank."""
    return {name: tensor.clone() for name, tensor in hf_weights(policy)}


def hf_gradients(policy: Policy) -> dict[str, Tensor]:
    """The gradients that the last update left, by Hugging Face name; overwrites the weights. Plain optimizer only."""
    for parameter in (p for core in cores(policy) for p in core.parameters()):
        parameter.data.copy_(parameter.main_grad)  # type: ignore[attr-defined]
    return copied_weights(policy)


def nll_step(policy: Policy, micro_batches: Sequence[MicroBatch]) -> tuple[float, float]:
    """(loss, gradient norm) of one supervised update."""
    policy.scheduler.step(1)
    sums, grad_norm = train_update(policy, micro_batches, nll_token_loss)
    return reduce_metrics(sums, policy.layout).means()["loss"], grad_norm


def assert_same_weights(got: dict[str, Tensor], wanted: dict[str, Tensor], *, atol: float = 0.0) -> None:
    """The same names; bit-equal, or within atol."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=partial("{1}: {0}".format, name))
