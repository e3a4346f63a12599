"""Malformed requests, drawn at random from seeds: each is answered, none with 500."""

import asyncio
import json
import random

import httpx
import pytest

PATHS = (
    "/v1/embeddings",
    "/search",
    "/similarity",
    "/v1/models",
    "/v1/models/x",
    "/health",
    "/metrics",
    "/",
    "/\u2028",
    "/%00",
)
FIELDS = ("input", "model", "encoding_format", "dimensions", "query", "k", "first", "second", "user")
TEXTS = ("", "a", "\x00", "\ud800", "日本", "a" * 3000, "\u202e", "{}", "0", "true", "\n" * 50, "%s%n", "<script>")
NUMBERS = (0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), True, False, None)


def draw_value(rng, depth=0):
    """Something that JSON holds, or nearly."""
    kind = rng.randrange(6 if depth < 3 else 2)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind in (2, 3):
        return [draw_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 5, 70)) if depth < 2 else 1)]
    if kind == 4:
        return {rng.choice(FIELDS): draw_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [rng.choice((0, 1, 5, 10**6, -3))] * rng.choice((1, 3, 600))


def draw_body(rng):
    """The bytes of a body."""
    given = {field: draw_value(rng) for field in rng.sample(FIELDS, rng.randrange(1, 5))}
    given = rng.choice((given, given, given, draw_value(rng)))
    body = json.dumps(given, ensure_ascii=rng.random() < 0.7).encode(errors="surrogatepass")
    damage = rng.randrange(8)
    if damage == 0:
        return body[: rng.randrange(len(body) + 1)]
    if damage == 1:
        at = rng.randrange(len(body) + 1)
        return body[:at] + rng.randbytes(rng.randrange(1, 9)) + body[at:]
    if damage == 2:
        return rng.choice((b"[", b'{"input":', b"1", b'"')) * rng.choice((1, 50, 3000))
    if damage == 3:
        return rng.randbytes(rng.randrange(200))
    return body


def draw_request(rng):
    """Method, path, headers and body."""
    kinds = ("application/json",) * 6 + ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "\xff", "")
    headers = {"content-type": rng.choice(kinds)}
    odd = {"authorization": "Bearer \xe9\xff", "accept": "x" * 5000, "accept-encoding": "\x7f", "host": ""}
    headers |= {name: value for name, value in odd.items() if rng.random() < 0.05}
    path = rng.choice((*PATHS[:3], *PATHS[:3], *PATHS))
    raw = [(name, value.encode("latin-1")) for name, value in headers.items()]
    return rng.choice(("POST",) * 8 + ("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH")), path, raw, draw_body(rng)


async def send(place, seeds):
    """The statuses of requests by their seeds, from several clients."""
    queue = iter(seeds)
    found = {}
    async with httpx.AsyncClient(base_url=place, timeout=60) as client:

        async def work():
            for seed in queue:
                method, path, headers, body = draw_request(random.Random(seed))
                found[seed] = (await client.request(method, path, headers=headers, content=body)).status_code

        await asyncio.gather(*(work() for _ in range(8)))
    return found


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_requests_are_refused_and_none_fails(place, count):
    found = asyncio.run(send(place, range(count)))
    assert len(found) == count
    assert not {seed: code for seed, code in found.items() if code >= 500}
    assert {200, 400, 404} <= set(found.values())
    assert httpx.post(f"{place}/v1/embeddings", json={"input": "a man"}).status_code == 200
