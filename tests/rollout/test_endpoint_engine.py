"""The endpoint engine against a real server on this machine that speaks as vLLM does, or does not."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import exit_code
from http_server import Handler, Server, resets, running_server, stalls

from exgrpo_fast.build import evaluated_model
from exgrpo_fast.cli import arguments as cli_arguments
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.http_client import Endpoint
from exgrpo_fast.core.types import Completion
from exgrpo_fast.rollout.endpoint_engine import EndpointEngine, read_completion
from exgrpo_fast.rollout.engine import EngineLost, Observer, Request, Sampling
from exgrpo_fast.run.display.plain import PlainScreen

KEY = "sk-very-secret-0123"
SAMPLING = Sampling(8, temperature=0.7, top_p=0.9)


def models(*names: str, longest: int | None = 64) -> bytes:
    return json.dumps({"data": [{"id": n, "max_model_len": longest} for n in names]}).encode()


def choice(ids: list[int], finish_reason: str = "stop", **others: Any) -> bytes:
    logprobs = {"token_logprobs": [-0.5 * i for i in range(len(ids))]}
    found = {"token_ids": ids, "logprobs": logprobs, "finish_reason": finish_reason, **others}
    return json.dumps({"choices": [found]}).encode()


def answers(
    complete: Callable[[Handler, int], None], listed: bytes | None = None
) -> Callable[[Handler, int], None]:
    """Lists its models, and does with each completion what `complete` says."""

    def behave(handler: Handler, number: int) -> None:
        if handler.path.endswith("/models"):
            return handler.reply(200, models("tiny") if listed is None else listed)
        complete(handler, number - 1)

    return behave


def echoes(handler: Handler, number: int) -> None:
    """Prompt [i, ...] -> completion [100 + i, 1]; odd ones are cut off."""
    first = handler.server.seen[number + 1]["prompt"][0]
    handler.reply(200, choice([100 + first, 1], "length" if first % 2 else "stop"))


def fails(status: int, times: int = 1000) -> Callable[[Handler, int], None]:
    def complete(handler: Handler, number: int) -> None:
        if number >= times:
            return echoes(handler, number)
        handler.reply(status, handler.headers.get("Authorization", "").encode())

    return complete


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    with running_server(monkeypatch) as made:
        made.behave = answers(echoes)
        yield made


@pytest.fixture
def make(server) -> Callable[..., EndpointEngine]:
    def made(**options: Any) -> EndpointEngine:
        defaults = {"eos_token_ids": [1, 7], "timeout_seconds": 5.0, "backoff_seconds": 0.01}
        return EndpointEngine(server.url, **{**defaults, **options})

    return made


def requests(count: int) -> list[Request]:
    return [Request((i, i + 1), seed=(1 << 63) + i) for i in range(count)]


def test_what_is_sent_and_what_comes_back(server, make, monkeypatch) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)
    engine = make(api_key_env="SERVER_KEY")
    first, second = engine.generate(
        [Request((4, 5, 6), seed=(1 << 63) + 9), Request((3,), seed=2, max_completion_tokens=3)],
        SAMPLING,
    )
    assert first.token_ids.tolist() == [104, 1] and not first.truncated
    assert second.token_ids.tolist() == [103, 1] and second.truncated
    assert (first.token_ids.dtype, first.logprobs.dtype) == (torch.int64, torch.float32)
    assert first.logprobs.tolist() == [0.0, -0.5]
    assert first.weight_spans == ()
    by_prompt = {tuple(sent["prompt"]): sent for sent in server.seen[1:]}
    assert by_prompt[4, 5, 6] == {
        "path": "/v1/completions",
        "model": "tiny",
        "prompt": [4, 5, 6],
        "seed": 9,  # 63 bits
        "max_tokens": 8,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [1, 7],
        "logprobs": 0,
        "return_token_ids": True,
    }
    assert (by_prompt[3,]["max_tokens"], by_prompt[3,]["seed"]) == (3, 2)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    make().generate(requests(1), SAMPLING)
    assert "Authorization" not in server.headers[-1]


def test_order_concurrency_and_the_observer(server, make) -> None:
    def slow(handler: Handler, number: int) -> None:
        deadline = time.monotonic() + 10.0  # until four have arrived, as all may be under way
        while handler.server.most_under_way < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.03 if handler.server.seen[number + 1]["prompt"][0] % 3 == 0 else 0.005)
        echoes(handler, number)

    class Listener(Observer):
        def __init__(self) -> None:
            self.told: dict[int, Completion] = {}
            self.beats = 0

        def finished(self, places, completions) -> None:
            self.told |= dict(zip(places, completions, strict=True))

        def on_poll(self) -> None:
            self.beats += 1

    server.behave, listener = answers(slow), Listener()
    found = make(max_concurrency=4).generate(requests(30), SAMPLING, listener)
    assert [completion.token_ids[0].item() for completion in found] == [100 + i for i in range(30)]
    assert [listener.told[i] for i in range(30)] == found
    assert list(listener.told) != list(range(30))  # as they finish
    assert listener.beats >= 3
    assert server.most_under_way == 4
    assert make().generate([], SAMPLING) == []
    assert make().start(requests(2), SAMPLING).wait()[1].token_ids.tolist() == [101, 1]


@pytest.mark.parametrize(
    "complete",
    [fails(429, 2), fails(503, 2), lambda h, n: resets(h, n) if n == 0 else echoes(h, n)],
    ids=["429", "503", "reset"],
)
def test_what_may_pass_is_tried_again(server, make, complete) -> None:
    server.behave = answers(complete)
    (found,) = make().generate(requests(1), SAMPLING)
    assert found.token_ids.tolist() == [100, 1]
    assert len(server.seen) in (3, 4)


@pytest.mark.parametrize(
    ("complete", "message", "num_sent"),
    [
        (fails(500), "status 500: the server failed", 3),
        (fails(400), "status 400: it does not take token ids", 1),
        (fails(401), "status 401: check the key in SERVER_KEY", 1),
        (stalls, "no answer within 0.3 s", 3),
        (resets, "is the server up", 3),
        (lambda h, n: h.reply(200, b'{"choices": []}'), "it has to be vLLM", 3),
        (lambda h, n: h.reply(200, choice([], "stop")), "hold no token ids", 3),
        (lambda h, n: h.reply(200, choice([5], token_ids=None)), "hold no token ids", 3),
        (lambda h, n: h.reply(200, choice([5], "abort")), "hold no token ids", 3),
        (lambda h, n: h.reply(200, choice([5], token_ids=[5, 6])), "hold no token ids", 3),
        (lambda h, n: h.reply(200, b"[" * 100_000), "hold no token ids", 3),
    ],
)  # fmt: skip
def test_a_lost_server_ends_in_one_line(
    server, make, monkeypatch, caplog, complete, message: str, num_sent: int
) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)
    server.behave = answers(complete)
    # A server that answers late would lose a request that it has not read yet.
    seconds = 0.3 if complete is stalls else 10.0
    engine = make(api_key_env="SERVER_KEY", retries=2, timeout_seconds=seconds)
    with caplog.at_level(logging.DEBUG), pytest.raises(EngineLost) as error:
        engine.generate(requests(1), SAMPLING)
    assert str(error.value).startswith(f"endpoint {server.url}: ") and message in str(error.value)
    assert "\n" not in str(error.value)
    deadline = time.monotonic() + 10.0  # the server may read a request after it was given up
    while len(server.seen) - 1 < num_sent and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(server.seen) - 1 == num_sent
    assert KEY not in f"{caplog.text} {error.value!r} {vars(engine)}"


def test_one_loss_ends_all(server, make) -> None:
    def complete(handler: Handler, number: int) -> None:
        first = handler.server.seen[number + 1]["prompt"][0]
        handler.reply(400) if first == 3 else stalls(handler, number)

    server.behave = answers(complete)
    started = time.monotonic()
    with pytest.raises(EngineLost, match="status 400"):
        make(timeout_seconds=60.0).generate(requests(8), SAMPLING)
    assert time.monotonic() - started < 8.0


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(EngineLost, match="ConnectError: is the server up"):
            EndpointEngine(url, eos_token_ids=[1], retries=0)


@pytest.mark.parametrize(
    ("listed", "model", "message"),
    [
        (models("a", "b"), None, "--endpoint-model: .* serves a, b; name one of them"),
        (models(), None, "--endpoint-model: .* serves none"),
        (models("a"), "b", "--endpoint-model b: .* serves a$"),
        (b"<html>", None, "hold no list of models"),
    ],
)
def test_the_model_is_one_that_is_served(server, make, listed, model, message: str) -> None:
    server.behave = answers(echoes, listed)
    with pytest.raises(UserError, match=message):
        make(model=model, retries=0)


def test_a_model_is_chosen(server, make) -> None:
    server.behave = answers(echoes, models("a", "b", longest=None))
    engine = make(model="b")
    engine.generate([Request(tuple(range(500)), seed=1)], SAMPLING)  # its length is not known
    assert server.seen[-1]["model"] == "b"


def test_what_cannot_fit_is_said_before_it_is_asked(server, make) -> None:
    engine = make()
    engine.generate([Request(tuple(range(56)), seed=1)], SAMPLING)  # 56 + 8 = 64
    with pytest.raises(UserError, match="may take 65 tokens, and the server allows 64"):
        engine.generate([Request(tuple(range(57)), seed=1)], SAMPLING)
    assert len(server.seen) == 2


def test_it_takes_no_weights(make) -> None:
    with pytest.raises(UserError, match="takes no weights; to train, use rollout.engine vllm_serv"):
        make().sync(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "endpoint: the base URL has to look like https://host"),
        ({"api_key_env": "NO_SUCH_KEY"}, "endpoint: no key in the environment variable NO_SUCH"),
    ],
)
def test_settings_that_cannot_work(options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EndpointEngine(**{"base_url": "http://host/v1", "eos_token_ids": [1], **options})


def test_log_probs_and_ids_have_to_match() -> None:
    assert read_completion(choice([5, 6])) is not None
    assert read_completion(choice([5, 6], token_ids=[[5, 6]])) is None
    assert read_completion(choice([5, 6], logprobs=None)) is None
    assert read_completion(choice([5, 6], logprobs={"token_logprobs": [None, -1.0]})) is None


# --- the commands ---------------------------------------------------------------------------------


def run_cli(capsys, *arguments: str) -> tuple[int, str, str]:
    return exit_code(*arguments), *capsys.readouterr()


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "data.jsonl"
    rows = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_eval_by_endpoint_loads_no_weights(
    server, tokenizer, tmp_path, data, capsys, monkeypatch
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # there are no weights to load

    def right_for_2(handler: Handler, number: int) -> None:
        prompt = handler.server.seen[number + 1]["prompt"]
        time.sleep(0.05)
        text = "\\boxed{2}" if prompt == prompts[1] else "\\boxed{-5}"
        handler.reply(200, choice([*tokenizer(text)["input_ids"], 1]))

    prompts = [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": f"What is {i} + 1?"}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for i in range(3)
    ]
    # All that takes any time is told, and not where the result goes.
    monkeypatch.setattr(
        evaluated_model, "make_screen", lambda stream=None: PlainScreen(stream, first_after=0.01)
    )
    server.behave = answers(right_for_2, models("tiny", longest=4096))
    arguments = ("--model", str(tmp_path / "tokenizer"), "--data", data)
    arguments += ("--max-completion-tokens", "64", "--endpoint", server.url, "--device", "cpu")
    code, out, err = run_cli(capsys, "eval", *arguments, "-n", "2", "-k", "1,2")
    assert code == 0, err
    assert "evaluate · " in err
    (result,) = json.loads(out).values()
    assert (result["avg_at_n"], result["questions"], result["truncated"]) == (1 / 3, 3, 0.0)
    sent = server.seen[1:]
    assert sorted(s["prompt"] for s in sent) == sorted(p for p in prompts for _ in range(2))
    assert len({s["seed"] for s in sent}) == 6
    assert sent[0]["stop_token_ids"] == [tokenizer.eos_token_id]
    code, out, err = run_cli(capsys, "sample", *arguments, "--row", "1", "-n", "1")
    assert code == 0 and "reward 1 (ok)" in out and out.startswith("question "), err


def test_a_dead_endpoint_is_one_line(tokenizer, tmp_path, data, capsys, monkeypatch) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(Endpoint, "pause", lambda self, attempt, retry_after: 0.0)
    arguments = ("--model", str(tmp_path / "tokenizer"), "--data", data, "--device", "cpu")
    url = "http://127.0.0.1:9/v1"
    for ended_later, said in (
        (False, f"--endpoint: {url} takes no connection (Connection refused)"),
        (True, f"endpoint {url}: ConnectError"),
    ):
        if ended_later:
            monkeypatch.setattr(cli_arguments, "refuse_unreachable", lambda urls: None)
        code, _, err = run_cli(capsys, "eval", *arguments, "--endpoint", url)
        assert code == 2 and "Traceback" not in err
        assert f"exgrpo-fast: {said}" in err.splitlines()[-1]
    code, _, err = run_cli(capsys, "eval", *arguments, "--endpoint-model", "x")
    assert code == 2 and "--endpoint-model and --endpoint-key-env need --endpoint" in err
