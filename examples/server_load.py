# SPDX-License-Identifier: Apache-2.0
"""Load for examples/server.py, which it starts on the loopback interface, and what came of it.

alone      the requests one after another: the tokens that every request has to give
together   the same requests by as many clients at once as the batch has places
crowd      all requests at once, more than may wait: the refused come again after Retry-After
leavers    clients that go away after a few tokens, at once with a second half that stays
sleepers   clients that ask and do not read, at once with a second half that does

    python examples/server_load.py --model build/demo/model.safetensors
    python examples/server_load.py --quick      # few and short requests, no results

Writes server.md and server.json. Fails if a token differs or the server keeps a place occupied.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

SERVER = Path(__file__).with_name("server.py")


@dataclass
class Answer:
    """What a client saw: tokens, seconds to the first and to the last; refusals before them."""

    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    refused: int = 0


@contextmanager
def running_server(options: Sequence[str]) -> Iterator[str]:
    """The address of a server process that lives as long as the block."""
    command = [sys.executable, str(SERVER), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("listening on "):
                    yield line.split()[-1]
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            process.terminate()
    # uvicorn ends by the signal that stopped it, once its streams have ended.
    if process.returncode != -signal.SIGTERM:
        raise SystemExit(f"the server ended with {process.returncode}, expected a clean stop")


async def pieces(response: httpx.Response) -> AsyncIterator[list[int]]:
    """The tokens of each event that has some."""
    response.raise_for_status()
    async for line in response.aiter_lines():
        if line.startswith("data: ") and (tokens := json.loads(line[6:]).get("tokens")):
            yield tokens


async def ask(
    client: httpx.AsyncClient, body: dict[str, Any], *, pause: float = 0, leave: bool = False
) -> Answer:
    """One request, again after Retry-After while it is refused.

    Args:
        pause: seconds before the answer is read.
        leave: go away after the first token.
    """
    answer, started = Answer(), time.perf_counter()
    while True:
        async with client.stream("POST", "/generate", json=body) as response:
            if response.status_code == 429:
                answer.refused += 1
                await asyncio.sleep(float(response.headers["Retry-After"]))
                continue
            await asyncio.sleep(pause)
            async for tokens in pieces(response):
                answer.tokens += tokens
                answer.first = answer.first or time.perf_counter() - started
                if leave:
                    break
        answer.last = time.perf_counter() - started
        return answer


leaver, sleeper = partial(ask, leave=True), partial(ask, pause=1)
Client = Callable[[httpx.AsyncClient, dict[str, Any]], Awaitable[Answer]]


async def clients(
    http: httpx.AsyncClient, bodies: Sequence[dict[str, Any]], kinds: Sequence[Client], count: int
) -> list[Answer]:
    """The requests by `count` clients at once, request n in the manner of kinds[n % len(kinds)]."""
    places = asyncio.Semaphore(count)

    async def one(index: int) -> Answer:
        async with places:
            return await kinds[index % len(kinds)](http, bodies[index])

    return list(await asyncio.gather(*map(one, range(len(bodies)))))


async def idle(http: httpx.AsyncClient) -> dict[str, Any]:
    """What /health says once there is nothing to do."""
    for _ in range(100):
        health: dict[str, Any] = (await http.get("/health")).raise_for_status().json()
        if health["running"] == health["waiting"] == 0:
            return health
        await asyncio.sleep(0.1)
    raise SystemExit(f"the server still has {health}, expected nothing to do")


async def measure(address: str, requests: int, tokens: int, places: int) -> list[dict[str, Any]]:
    """A row per kind of load."""
    bodies = [
        {
            "prompt": f"def function_{index}(" + "argument, " * (index % 7),
            "max_new_tokens": tokens // 2 + index % tokens,
            "temperature": 0.8 * (index % 2),
            "seed": index,
        }
        for index in range(requests)
    ]
    loads: dict[str, tuple[Sequence[Client], int]] = {
        "alone": ([ask], 1),
        "together": ([ask], places),
        "crowd": ([ask], requests),
        "leavers": ([ask, leaver], places),
        "sleepers": ([ask, sleeper], places),
    }
    rows, expected = [], list[list[int]]()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:
        await ask(http, bodies[0])
        for name, (kinds, count) in loads.items():
            before, started = await idle(http), time.perf_counter()
            answers = await clients(http, bodies, kinds, count)
            seconds = time.perf_counter() - started
            after = await idle(http)
            expected = expected or [answer.tokens for answer in answers]
            manners = [kinds[index % len(kinds)] for index in range(requests)]
            read = [index for index in range(requests) if manners[index] is not leaver]
            wrong = sum(answers[index].tokens != expected[index] for index in read)
            if wrong:
                raise SystemExit(f"{name}: {wrong} of {len(read)} answers differ from those alone")
            timed = [answers[index] for index in range(requests) if manners[index] is ask]
            rows.append(
                {
                    "load": name,
                    "clients": count,
                    "requests": requests,
                    "equal": len(read),
                    "refused": sum(answer.refused for answer in answers),
                    "seconds": seconds,
                    "tokens": sum(len(answer.tokens) for answer in answers),
                    "server_tokens": after["tokens"] - before["tokens"],
                    "server_cpu_seconds": after["cpu_seconds"] - before["cpu_seconds"],
                    "first": statistics.median(answer.first for answer in timed),
                    "last": statistics.median(answer.last for answer in timed),
                }
            )
            print(rows[-1], flush=True)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Times and rates as multiples of those of one request at a time."""
    base = rows[0]

    def cost(row: dict[str, Any]) -> float:
        return row["server_cpu_seconds"] / row["server_tokens"]

    lines = [
        "| load | clients at once | requests | answers equal to those alone | refused (429)"
        " | server CPU time per token | tokens per second | first token, median"
        " | whole answer, median |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = (row["tokens"] / row["seconds"]) / (base["tokens"] / base["seconds"])
        cells = [row["load"], row["clients"], row["requests"], row["equal"], row["refused"]]
        cells += [f"{cost(row) / cost(base):.2f} x", f"{rate:.1f} x"]
        cells += [f"{row[name] / base[name]:.1f} x" for name in ("first", "last")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few and short, no results")
    parser.add_argument("--model", type=Path, help="of nn.save, bytes; default: random weights")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, on average")
    parser.add_argument("--places", type=int, default=16, help="of the server's batch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    requests, tokens, places = (
        (12, 8, 2) if args.quick else (args.requests, args.tokens, args.places)
    )
    options = ["--max-batch", str(places), "--max-waiting", str(places)]
    if args.model:
        options += ["--model", str(args.model)]
    with running_server(options) as address:
        rows = asyncio.run(measure(address, requests, tokens, places))
    print(markdown(rows))
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "server.json").write_text(json.dumps(rows, indent=1) + "\n")
        (args.out / "server.md").write_text(markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
