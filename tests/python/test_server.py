# SPDX-License-Identifier: Apache-2.0
"""examples/server.py under load: the tokens of one request at a time, bounds, and what expires."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from helpers import load_example
from latte_ext.nn import LatteConfig, LatteLM

server = load_example("server")

# Far more than a test waits for.
ENDLESS = 1_000_000


def build_model(**sizes: int) -> LatteLM:
    """In float64, where rounding makes no other token."""
    torch.manual_seed(0)
    small = {"embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_latents": 4, "window": 4}
    config = LatteConfig.named("latte-conv-swa++", vocab_size=256, **{**small, **sizes})
    return LatteLM(config, dtype=torch.float64).eval()


@contextmanager
def running(model: LatteLM | None = None, **limits: Any) -> Iterator[httpx.Client]:
    """A client of a server that runs on a thread."""
    app = server.Server(model or build_model(), server.Limits(**limits)).app()
    config = uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=60)
    http = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=address, timeout=60) as client:
                client.stop = lambda: setattr(http, "should_exit", True)  # type: ignore[attr-defined]
                yield client
        finally:
            http.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


def events(response: httpx.Response) -> Generator[tuple[str, dict[str, Any]], None, None]:
    kind = ""
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


def ask(client: httpx.Client, prompt: str, **options: Any) -> tuple[str, list[int], str]:
    """The session, the tokens and the text of an answer that ends well."""
    with client.stream("POST", "/generate", json={"prompt": prompt, **options}) as response:
        assert response.status_code == 200, response.read()
        (first, session), *pieces, (last, done) = events(response)
    tokens = [token for _, data in pieces for token in data["tokens"]]
    assert (first, last, done["count"]) == ("session", "done", len(tokens))
    assert {kind for kind, _ in pieces} == {"tokens"}
    return session["session"], tokens, "".join(data["text"] for _, data in pieces)


def expected(model: LatteLM, data: bytes, count: int, temperature: float, seed: int) -> list[int]:
    """The answer of the model alone."""
    prompt = torch.tensor([list(data)])
    generator = torch.Generator().manual_seed(seed)
    tokens = model.generate(prompt, count, temperature=temperature, generator=generator)
    return tokens[0, len(data) :].tolist()  # type: ignore[no-any-return]


def until(client: httpx.Client, **wanted: int) -> dict[str, Any]:
    """What /health says as soon as it has these numbers."""
    deadline = time.monotonic() + 60
    while True:
        health: dict[str, Any] = client.get("/health").json()
        if all(health[name] == number for name, number in wanted.items()):
            return health
        assert time.monotonic() < deadline, f"{health}, expected {wanted}"
        time.sleep(0.01)


def test_clients_at_once_get_the_tokens_of_one_at_a_time() -> None:
    model = build_model()
    asked = [(f"prompt {n}" * (1 + n % 5), 1 + 7 * n % 23, 0.9 * (n % 2), n) for n in range(12)]
    with running(model, max_batch=4, max_waiting=12) as client:

        def one(request: tuple[str, int, float, int]) -> tuple[str, list[int], str]:
            prompt, count, temperature, seed = request
            return ask(client, prompt, max_new_tokens=count, temperature=temperature, seed=seed)

        with ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(one, asked))
        health = until(client, running=0, waiting=0)
    assert len({session for session, _, _ in answers}) == len(asked)
    for (prompt, *options), (_, tokens, text) in zip(asked, answers, strict=True):
        assert tokens == expected(model, prompt.encode(), *options)
        assert text == bytes(tokens).decode("utf-8", "replace")
    assert health["sessions"] == len(asked)
    assert health["tokens"] == sum(len(tokens) for _, tokens, _ in answers)


def test_a_session_goes_on_where_it_was() -> None:
    model = build_model()
    with running(model) as client:
        name, tokens, _ = ask(client, "It was", max_new_tokens=9)
        same, more, _ = ask(client, "a dark", max_new_tokens=5, session=name)
        assert same == name
        assert more == expected(model, b"It was" + bytes(tokens) + b"a dark", 5, 0.0, 0)
        assert client.delete(f"/sessions/{name}").status_code == 204
        assert client.delete(f"/sessions/{name}").status_code == 404
        response = client.post("/generate", json={"prompt": "x", "session": name})
        assert response.status_code == 404


def test_idle_states_are_smaller_as_integers() -> None:
    sizes, model = {}, build_model(embed_dim=64, num_heads=2, num_latents=16)
    for idle_format in (None, "int8"):
        with running(model, idle_format=idle_format) as client:
            name, _, _ = ask(client, "It was", max_new_tokens=9)
            sizes[idle_format] = client.get("/health").json()["session_bytes"]
            assert len(ask(client, "a dark", max_new_tokens=5, session=name)[1]) == 5
    assert sizes["int8"] < 0.6 * sizes[None]


def test_too_many_are_refused_and_leaving_makes_room() -> None:
    endless = {"prompt": "a", "max_new_tokens": ENDLESS}
    limits = {"max_batch": 1, "max_waiting": 2, "max_new_tokens": ENDLESS}
    with running(**limits) as client:
        streams = [client.stream("POST", "/generate", json=endless) for _ in range(3)]
        responses = [stream.__enter__() for stream in streams]
        until(client, running=1, waiting=2)
        refused = client.post("/generate", json=endless)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        # One that runs and one that waits.
        for stream, response in list(zip(streams, responses, strict=True))[:2]:
            assert response.status_code == 200
            stream.__exit__(None, None, None)
        until(client, running=1, waiting=0)
        streams[2].__exit__(None, None, None)
        until(client, running=0, waiting=0, sessions=0)
        assert len(ask(client, "a", max_new_tokens=3)[1]) == 3


def test_a_session_serves_one_request_and_survives_its_end() -> None:
    with running(max_new_tokens=ENDLESS) as client:
        name, tokens, _ = ask(client, "a", max_new_tokens=3)
        body = {"prompt": "b", "session": name, "max_new_tokens": ENDLESS}
        with client.stream("POST", "/generate", json=body) as response:
            stream = events(response)
            assert next(stream) == ("session", {"session": name})
            assert client.post("/generate", json=body).status_code == 409
            assert client.delete(f"/sessions/{name}").status_code == 409
            stream.close()
        until(client, running=0, sessions=1)
        # As it was before the request that was broken off.
        again = ask(client, "b", session=name, max_new_tokens=4)[1]
        assert again == expected(build_model(), b"a" + bytes(tokens) + b"b", 4, 0.0, 0)


@pytest.mark.parametrize("max_batch", [1, 2])
def test_leaving_just_after_a_step_frees_the_place(max_batch: int) -> None:
    engine = server.Engine(build_model(), server.Limits(max_batch=max_batch))
    jobs = [server.Job(torch.tensor([1]), ENDLESS) for _ in range(2)]
    step = engine.scheduler.step

    def leave_after_it() -> None:
        step()
        for job in jobs:
            job.cancelled = True

    async def serve() -> None:
        task = asyncio.create_task(engine.run())
        tickets = [engine.submit(job) for job in jobs]
        while engine.running or engine.waiting or not all(t.finished for t in tickets):
            await asyncio.sleep(0.001)
        task.cancel()

    engine.scheduler.step = leave_after_it
    asyncio.run(asyncio.wait_for(serve(), 60))
    assert engine.tokens == max_batch


def test_clients_that_do_not_read_hold_up_nobody() -> None:
    body = json.dumps({"prompt": "a", "max_new_tokens": 100}).encode()
    request = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
    with running(max_batch=4) as client:
        address = ("127.0.0.1", client.base_url.port)
        deaf = [socket.create_connection(address) for _ in range(3)]
        for connection in deaf:
            connection.sendall(request % (len(body), body))
        until(client, running=3)
        for _ in range(3):
            assert len(ask(client, "b", max_new_tokens=20)[1]) == 20
        # They are done with and their sessions kept, though they have read nothing.
        until(client, running=0, sessions=6)
        for connection in deaf:
            connection.close()


def test_sessions_expire() -> None:
    now = [0.0]
    sessions = server.Sessions(ttl=10, max_bytes=100, clock=lambda: now[0])
    for name in "abc":
        sessions.put(name, bytes(40), 0)
    assert (len(sessions), sessions.nbytes) == (2, 80)
    assert sessions.get("a") is None
    now[0] = 6
    sessions.put("b", bytes(50), 7)
    assert sessions.nbytes == 90
    now[0] = 12
    assert sessions.get("c") is None
    assert sessions.get("b").last == 7
    assert sessions.nbytes == 50
    sessions.put("d", bytes(101), 0)
    assert (len(sessions), sessions.nbytes) == (0, 0)

    with running(session_ttl=0.2) as client:
        name, _, _ = ask(client, "a", max_new_tokens=1)
        until(client, sessions=0, session_bytes=0)
        response = client.post("/generate", json={"prompt": "b", "session": name})
        assert response.status_code == 404


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "expected JSON"),
        (b"[]", 400, "expected a JSON object"),
        (b"{}", 400, "prompt has 0 bytes, expected 1 to 2048"),
        (json.dumps({"prompt": "a" * 2049}), 400, "prompt has 2049 bytes, expected 1 to 2048"),
        (b'{"prompt": 1}', 400, "prompt does not fit, expected a string"),
        (b'{"prompt": "a", "max_new_tokens": 0}', 400, "max_new_tokens does not fit"),
        (b'{"prompt": "a", "max_new_tokens": true}', 400, "max_new_tokens does not fit"),
        (b'{"prompt": "a", "max_new_tokens": 1025}', 400, "expected 1 to 1024"),
        (b'{"prompt": "a", "temperature": -1}', 400, "temperature does not fit"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature does not fit"),
        (b'{"prompt": "a", "seed": 0.5}', 400, "seed does not fit"),
        (b'{"prompt": "a", "top": 1}', 400, "unknown ['top']"),
        (b'{"prompt": "a", "session": "none"}', 404, "no such session"),
        (b"x" * 16_385, 413, "expected at most 16384 bytes"),
    ],
)
def test_bad_requests(shared: httpx.Client, content: bytes, status: int, message: str) -> None:
    response = shared.post("/generate", content=content)
    assert response.status_code == status
    assert message in response.text


@pytest.fixture(scope="module")
def shared() -> Iterator[httpx.Client]:
    with running(body_timeout=0.3) as client:
        yield client


def test_a_body_that_does_not_come_is_not_waited_for(shared: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", shared.base_url.port)) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        connection.settimeout(60)
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_stop_lets_streams_end() -> None:
    with running(max_batch=1) as client:
        body = {"prompt": "a", "max_new_tokens": 100}
        with client.stream("POST", "/generate", json=body) as response:
            stream = events(response)
            assert [next(stream)[0], next(stream)[0]] == ["session", "tokens"]
            client.stop()  # type: ignore[attr-defined]
            *_, (kind, data) = stream
            assert (kind, data) == ("done", {"count": 100})
        with pytest.raises(httpx.TransportError):  # refused, or reset as it closes
            client.get("/health")


def test_an_error_of_the_model_ends_its_streams() -> None:
    model = build_model()

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    model.step = fail  # type: ignore[assignment]
    with running(model) as client:
        body = {"prompt": "a", "max_new_tokens": 3}
        with client.stream("POST", "/generate", json=body) as response:
            assert [kind for kind, _ in events(response)][-1] == "error"
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert client.post("/generate", json=body).status_code == 503
