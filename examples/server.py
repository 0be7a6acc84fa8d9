# SPDX-License-Identifier: Apache-2.0
"""Serves a model of bytes over HTTP: tokens as they come, many clients in one batch, sessions.

    pip install latte-ext[server]
    python examples/server.py --model build/demo/model.safetensors
    curl -N http://127.0.0.1:8000/generate -d '{"prompt": "import ", "max_new_tokens": 80}'

POST /generate          {"prompt", "max_new_tokens", "temperature", "seed", "session"}, all but the
                        first optional; the answer is a stream of server-sent events: `session` with
                        an identifier to go on with, `tokens` with bytes and text, `done` or `error`
DELETE /sessions/ID     forgets a session
GET /health             how much there is to do

A session is a state of fixed size, whatever was said in it, so the server keeps thousands: as bytes
while idle, within a budget of memory and for so many seconds after their last use. A request that
does not reach its end, because the client went away, leaves its session as it was before.

Too many requests are refused (429, Retry-After) rather than queued without bound. A slow client
holds up nobody: its tokens are generated at the pace of the batch and wait for it, at most
`max_new_tokens` of them. There is no encryption and no login: put a proxy in front.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import json
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from continuous_batching import Request as Job
from continuous_batching import Scheduler
from latte_ext import dequantise, quantise, storage
from latte_ext.nn import LatteConfig, LatteLM, load
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass(frozen=True)
class Limits:
    """What a server of untrusted clients bounds; times in seconds, sizes in bytes."""

    max_batch: int = 16
    max_waiting: int = 32
    max_body: int = 16_384
    max_prompt: int = 2_048
    max_new_tokens: int = 1_024
    body_timeout: float = 10.0
    session_ttl: float = 600.0
    session_bytes: int = 256_000_000
    # None: bit for bit; "float16" or "int8": less memory, rounded once per request.
    idle_format: str | None = None


@dataclass
class Session:
    """The cache of an idle session as bytes, and the last token, which it has not read."""

    cache: bytes
    last: int
    used: float


class Sessions:
    """Idle sessions, the least recently used first; bounded in time and in memory."""

    def __init__(
        self, ttl: float, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ttl, self.max_bytes, self.clock = ttl, max_bytes, clock
        self.nbytes = 0
        self._found: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def put(self, name: str, cache: bytes, last: int) -> None:
        self.drop(name)
        self._found[name] = Session(cache, last, self.clock())
        self.nbytes += len(cache)
        self.expire()

    def get(self, name: str) -> Session | None:
        self.expire()
        return self._found.get(name)

    def drop(self, name: str) -> bool:
        session = self._found.pop(name, None)
        self.nbytes -= len(session.cache) if session else 0
        return session is not None

    def expire(self) -> None:
        """Drop what is too old, and the oldest while all are too large."""
        oldest_kept = self.clock() - self.ttl
        while self._found:
            name, session = next(iter(self._found.items()))
            if session.used > oldest_kept and self.nbytes <= self.max_bytes:
                return
            self.drop(name)


@dataclass(eq=False)
class Ticket:
    """A job in the engine. `news` is set whenever there may be more tokens, or `finished`."""

    job: Job
    news: asyncio.Event = field(default_factory=asyncio.Event)
    finished: bool = False


class Engine:
    """Steps a scheduler on a thread of its own, so that the event loop is always free.

    The scheduler is touched between steps only: new jobs wait in `arrivals` until then.
    """

    def __init__(self, model: LatteLM, limits: Limits) -> None:
        self.limits, self.failed, self.tokens = limits, False, 0
        self.scheduler = Scheduler(model, limits.max_batch)
        self.arrivals: list[Ticket] = []
        self.tickets: list[Ticket] = []
        self._wake = asyncio.Event()

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self.arrivals) + len(self.scheduler.waiting)

    def submit(self, job: Job) -> Ticket | None:
        """None if too many wait already."""
        if self.waiting >= self.limits.max_waiting:
            return None
        ticket = Ticket(job)
        self.arrivals.append(ticket)
        self._wake.set()
        return ticket

    async def run(self) -> None:
        """Serve until cancelled. An error ends all jobs, and is raised."""
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "engine")
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                # Busy without tickets: a client left after the step that would have seen it.
                while self.arrivals or self.tickets or self.scheduler.busy:
                    for ticket in self.arrivals:
                        self.scheduler.submit(ticket.job)
                    self.tickets += self.arrivals
                    self.arrivals = []
                    await loop.run_in_executor(thread, self.scheduler.step)
                    self._deliver()
        except Exception:
            self.failed = True
            raise
        finally:
            for ticket in self.tickets + self.arrivals:
                ticket.finished = True
                ticket.news.set()
            thread.shutdown()

    def _deliver(self) -> None:
        for ticket in self.tickets:
            ticket.finished = ticket.job.complete or ticket.job.cancelled
            ticket.news.set()
        self.tokens += sum(len(ticket.job.tokens) for ticket in self.tickets if ticket.finished)
        self.tickets = [ticket for ticket in self.tickets if not ticket.finished]


class Stream(StreamingResponse):
    """Tokens as server-sent events; its job is cancelled however the response ends."""

    def __init__(self, server: Server, ticket: Ticket, session: str) -> None:
        super().__init__(self._events(), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-store"
        self._server, self._ticket, self._session = server, ticket, session

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self._ticket.job.cancelled = True
            self._server.busy.discard(self._session)

    async def _events(self) -> AsyncIterator[str]:
        ticket, job, sent = self._ticket, self._ticket.job, 0
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        yield _event("session", {"session": self._session})
        finished = False
        while not finished:
            await ticket.news.wait()
            ticket.news.clear()
            # Read first: what is finished gets no more tokens.
            finished = ticket.finished
            tokens = job.tokens[sent:]
            sent += len(tokens)
            if tokens:
                text = decoder.decode(bytes(tokens), final=finished)
                yield _event("tokens", {"tokens": tokens, "text": text})
        if job.complete:
            self._server.keep(self._session, job)
            yield _event("done", {"count": sent})
        else:
            yield _event("error", {"error": "the server stopped"})


class Server:
    """The application's state and its endpoints."""

    def __init__(self, model: LatteLM, limits: Limits) -> None:
        self.limits = limits
        self.engine = Engine(model, limits)
        self.sessions = Sessions(limits.session_ttl, limits.session_bytes)
        self.busy: set[str] = set()

    def app(self) -> Starlette:
        routes = [
            Route("/generate", self.generate, methods=["POST"]),
            Route("/sessions/{name}", self.forget, methods=["DELETE"]),
            Route("/health", self.health),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.engine.run()), asyncio.create_task(self._sweep())]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sweep(self) -> None:
        """Free the memory of old sessions while nobody asks for any."""
        while True:
            await asyncio.sleep(min(self.limits.session_ttl / 4, 60))
            self.sessions.expire()

    async def generate(self, request: Request) -> Response:
        job, name = self._job(await self._body(request))
        if self.engine.failed:
            raise HTTPException(503, "the engine has failed")
        ticket = self.engine.submit(job)
        if ticket is None:
            raise HTTPException(429, "too many requests wait", {"Retry-After": "1"})
        self.busy.add(name)
        return Stream(self, ticket, name)

    async def forget(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name in self.busy:
            raise HTTPException(409, "the session has a request")
        if not self.sessions.drop(name):
            raise HTTPException(404, "no such session, or it has expired")
        return Response(status_code=204)

    async def health(self, request: Request) -> Response:
        status = {
            "status": "failed" if self.engine.failed else "ok",
            "running": self.engine.running,
            "waiting": self.engine.waiting,
            "tokens": self.engine.tokens,
            "cpu_seconds": time.process_time(),
            "sessions": len(self.sessions),
            "session_bytes": self.sessions.nbytes,
        }
        return JSONResponse(status, 503 if self.engine.failed else 200)

    def keep(self, name: str, job: Job) -> None:
        """The session of a job that is complete, for the next one."""
        cache = job.cache
        if self.limits.idle_format is not None:
            cache = quantise(cache, self.limits.idle_format)
        self.sessions.put(name, storage.to_bytes(cache), job.tokens[-1])

    async def _body(self, request: Request) -> dict[str, Any]:
        async def read() -> bytes:
            data = b""
            async for piece in request.stream():
                data += piece
                if len(data) > self.limits.max_body:
                    raise HTTPException(413, f"expected at most {self.limits.max_body} bytes")
            return data

        try:
            body = json.loads(await asyncio.wait_for(read(), self.limits.body_timeout))
        except asyncio.TimeoutError:
            raise HTTPException(408, "the body took too long") from None
        except ClientDisconnect:
            raise HTTPException(400, "the body broke off") from None
        except (ValueError, RecursionError):
            raise HTTPException(400, "expected JSON") from None
        if not isinstance(body, dict):
            raise HTTPException(400, "expected a JSON object")
        return body

    def _job(self, body: dict[str, Any]) -> tuple[Job, str]:
        """The job that a body asks for, and the name of its session."""
        known = ("prompt", "max_new_tokens", "temperature", "seed", "session")
        if unknown := sorted(set(body) - set(known)):
            raise HTTPException(400, f"unknown {unknown}, expected {known}")
        prompt = _field(body, "prompt", str, "", lambda x: True, "a string")
        data = prompt.encode("utf-8", "replace")
        most = self.limits.max_prompt
        if not 1 <= len(data) <= most:
            raise HTTPException(400, f"prompt has {len(data)} bytes, expected 1 to {most}")
        most = self.limits.max_new_tokens
        count = _field(
            body, "max_new_tokens", int, min(128, most), lambda x: 1 <= x <= most, f"1 to {most}"
        )
        temperature = _field(
            body, "temperature", (int, float), 0, lambda x: 0 <= x <= 10, "a number from 0 to 10"
        )
        seed = _field(body, "seed", int, 0, lambda x: 0 <= x < 2**63, "0 to 2^63 - 1")
        name = _field(body, "session", str, None, lambda x: True, "a string")
        generator = torch.Generator().manual_seed(seed) if temperature else None
        if name is None:
            job = Job(torch.tensor(list(data)), count, temperature, generator)
            return job, secrets.token_urlsafe(16)
        if name in self.busy:
            raise HTTPException(409, "the session has a request")
        session = self.sessions.get(name)
        if session is None:
            raise HTTPException(404, "no such session, or it has expired")
        cache = dequantise(storage.from_bytes(session.cache))
        tokens = torch.tensor([session.last, *data])
        return Job(tokens, count, temperature, generator, cache), name


def _event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def _field(
    body: dict[str, Any],
    name: str,
    kind: type | tuple[type, ...],
    default: Any,
    fits: Callable[[Any], bool],
    expected: str,
) -> Any:
    value = body.get(name, default)
    if value is default:
        return value
    if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
        raise HTTPException(400, f"{name} does not fit, expected {expected}")
    return value


def random_model() -> LatteLM:
    """A model that knows nothing."""
    torch.manual_seed(0)
    config = LatteConfig.named(
        "latte-conv-swa++", vocab_size=256, embed_dim=96, num_layers=2, num_heads=8,
        num_latents=16, window=16,
    )  # fmt: skip
    return LatteLM(config).eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    limits = Limits()
    parser.add_argument("--model", type=Path, help="of nn.save, bytes; default: random weights")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any; default: 8000")
    parser.add_argument("--threads", type=int, default=1, help="of the model; default: 1")
    parser.add_argument("--max-batch", type=int, default=limits.max_batch)
    parser.add_argument("--max-waiting", type=int, default=limits.max_waiting)
    parser.add_argument("--max-connections", type=int, default=256, help="more get a 503")
    parser.add_argument("--session-ttl", type=float, default=limits.session_ttl, help="seconds")
    parser.add_argument("--session-bytes", type=int, default=limits.session_bytes)
    parser.add_argument("--idle-format", choices=("float16", "int8"), help="default: exact")
    parser.add_argument("--grace", type=int, default=30, help="seconds for streams at shutdown")
    args = parser.parse_args(argv)
    if args.model is None:
        print("no --model: random weights, as an echo of noise")
    model = load(args.model) if args.model else random_model()
    if model.config.vocab_size != 256:
        parser.error(f"{args.model} has {model.config.vocab_size} tokens, expected 256, bytes")
    torch.set_num_threads(args.threads)
    chosen = {name: getattr(args, name) for name in vars(limits) if hasattr(args, name)}
    config = uvicorn.Config(
        Server(model, Limits(**chosen)).app(),
        limit_concurrency=args.max_connections,
        timeout_graceful_shutdown=args.grace,
        log_level="warning",
        ws="none",
    )
    with socket.create_server((args.host, args.port)) as listener:
        host, port = listener.getsockname()[:2]
        print(f"listening on http://{host}:{port}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
