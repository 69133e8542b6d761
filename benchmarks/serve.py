"""How fast and how steadily a bundle is served: one member, the draw and the average in one run.

python benchmarks/serve.py BUNDLE [--grouped] [--threads N] [--requests N] [--soak N] [--fuzz N]
python benchmarks/serve.py PLAIN INT8 COMPACT    sizes, start-up time and memory of each, no load

Servers are processes of their own and the load comes from this one, so on few cores the load takes
time from the server: compare modes within a run, not runs. Several clients' images share a batch:
one member computes it at once, the draw image by image unless --grouped. A table goes to stderr,
JSON to stdout.
"""

import argparse
import asyncio
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from redefense.errors import DataError
from redefense.export.summary import summary
from redefense.serve.audit.channels import Replica
from redefense.serve.audit.children import child
from redefense.serve.audit.client import Client, tensor_request
from redefense.serve.model import Model
from redefense.serve.settings import Mode, Settings

Figures = dict[str, Any]
MODES: tuple[Mode, ...] = ("member", "sampled", "averaged")
CLIENTS = (1, 8, 64)
ROUNDS = 5


def process_of(server: Replica) -> "subprocess.Popen[bytes]":
    """The process of a server, which `child` has started."""
    assert server.process is not None
    return server.process


def megabytes(server: Replica) -> float | None:
    """Resident memory of a server; None where there is no /proc to read it from.

    Raises:
        DataError: the server has ended.
    """
    # from the kernel: the server's own metrics leave out its process, on purpose
    process = process_of(server)
    if not Path("/proc/self/status").exists():
        return None
    status = Path("/proc") / str(process.pid) / "status"
    # one that ended is still listed until it is waited for, without this line
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    if found is None:
        ended = f"the server has ended (exit code {process.poll()}); its log ends in"
        raise DataError(f"{ended} {server.log().strip()[-500:]}")
    return round(int(found[1]) / 1024, 1)


class Wire:
    """One connection that sends the same prepared request; cheaper than a real client."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, message: bytes) -> int:
        """Status of the answer.

        Raises:
            OSError, EOFError: the connection ended instead.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        if b"connection: close" in head:
            self.close()
        return int(head[9:12])

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def beside(bundles: list[Path], settings: Settings) -> Figures:
    """Bytes on disk, seconds until a server answers and its memory; bundles take turns.

    Disk: `member_bytes` are those of the members, `bundle_bytes` with probes, records and runner.
    """
    seconds: dict[Path, list[float]] = {bundle: [] for bundle in bundles}
    memory: dict[Path, list[float | None]] = {bundle: [] for bundle in bundles}
    for _ in range(ROUNDS):
        for bundle in bundles:
            started = time.perf_counter()
            with child(bundle, replace(settings, grace=0.0)) as server:
                seconds[bundle].append(time.perf_counter() - started)
                memory[bundle].append(megabytes(server))
    figures: Figures = {}
    for bundle in bundles:
        found = summary(bundle)
        known = [value for value in memory[bundle] if value is not None]
        figures[str(bundle)] = {
            "kind": found.kind,
            "precision": found.precision,
            "num_members": found.num_members,
            "member_bytes": found.member_bytes,
            "bundle_bytes": found.total_bytes,
            "start_seconds": round(statistics.median(seconds[bundle]), 2),
            "resident_mb": statistics.median(known) if known else None,
        }
    return figures


def message_of(url: str, images: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    with Client(url) as client:
        path = client.model_path() + "/infer"
    body, headers = tensor_request(images)
    lines = [f"POST {path} HTTP/1.1", "Host: bench", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def closed_loop(url: str, message: bytes, clients: int, requests: int) -> Figures:
    """Every client sends its next request when the last is answered."""
    seconds: list[float] = []
    statuses: Counter[int] = Counter()
    left = requests

    async def one() -> None:
        nonlocal left
        wire = Wire(url)
        while left > 0:
            left -= 1
            started = time.perf_counter()
            statuses[await wire.ask(message)] += 1
            seconds.append(time.perf_counter() - started)
        wire.close()

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    whole = time.perf_counter() - started
    p50, p95, p99 = np.percentile(np.array(seconds) * 1000, [50, 95, 99])
    figures = {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "per_second": requests / whole}
    return {key: round(float(value), 3) for key, value in figures.items()} | {
        "statuses": dict(statuses),
        "slowest_ms": round(1000 * max(seconds), 1),
    }


def latency(bundle: Path, settings: Settings, image: Any, requests: int) -> Figures:
    """Modes take turns, round by round, so that the machine's moods meet all of them."""
    figures: Figures = {"start": {}, "clients": {}}
    with ExitStack() as stack:
        servers: dict[Mode, Replica] = {}
        for mode in MODES:
            started = time.perf_counter()
            # only who draws has anything to group
            own = replace(settings, mode=mode, grouped=settings.grouped and mode == "sampled")
            servers[mode] = stack.enter_context(child(bundle, own))
            ready = round(time.perf_counter() - started, 2)
            figures["start"][mode] = {"seconds": ready, "resident_mb": megabytes(servers[mode])}
        for clients in CLIENTS:
            rounds: dict[Mode, list[Figures]] = {mode: [] for mode in MODES}
            for _ in range(ROUNDS):
                for mode, server in servers.items():
                    message = message_of(server.url, image)
                    loop = closed_loop(server.url, message, clients, requests)
                    rounds[mode].append(asyncio.run(loop))
            figures["clients"][str(clients)] = compared(rounds)
    return figures


def compared(rounds: dict[Mode, list[Figures]]) -> Figures:
    """Medians over rounds, and medians of the ratios within each round."""
    keys = ("p50_ms", "p95_ms", "p99_ms", "per_second")
    table: Figures = {
        mode: {key: statistics.median(row[key] for row in rows) for key in keys}
        for mode, rows in rounds.items()
    }
    for mode in ("sampled", "averaged"):
        table[f"{mode}_over_member"] = {
            key: round(
                statistics.median(
                    row[key] / base[key]
                    for row, base in zip(rounds[mode], rounds["member"], strict=True)
                ),
                3,
            )
            for key in keys
        }
    return table


def soak(bundle: Path, settings: Settings, image: Any, requests: int) -> Figures:
    """Resident memory over many requests."""
    with child(bundle, settings) as server:
        message = message_of(server.url, image)
        memory = [megabytes(server)]
        statuses: Counter[int] = Counter()
        for _ in range(10):
            done = asyncio.run(closed_loop(server.url, message, 16, max(1, requests // 10)))
            statuses.update(done["statuses"])
            memory.append(megabytes(server))
    return {"requests": requests, "statuses": dict(statuses), "resident_mb": memory}


def overload(bundle: Path, settings: Settings, image: Any) -> Figures:
    """Many more clients than the queue takes."""
    tight = replace(settings, max_batch=8, max_queue=16, deadline=1.0)
    with child(bundle, tight) as server:
        message = message_of(server.url, image)
        figures = asyncio.run(closed_loop(server.url, message, 200, 4000))
    return {"clients": 200, "queue": tight.max_queue, "deadline_s": tight.deadline} | figures


def terminated(bundle: Path, settings: Settings, image: Any) -> Figures:
    """SIGTERM in the middle of load: what clients got, what the server says it answered."""
    seen: Counter[str] = Counter()

    async def one(url: str, message: bytes) -> None:
        wire = Wire(url)
        while True:
            try:
                seen[str(await wire.ask(message))] += 1
            except ConnectionRefusedError:
                return
            except (OSError, EOFError):  # reset in the backlog, before it was accepted
                seen["not accepted"] += 1
                wire.close()

    async def loaded(url: str, message: bytes, process: "subprocess.Popen[bytes]") -> None:
        tasks = [asyncio.create_task(one(url, message)) for _ in range(32)]
        await asyncio.sleep(1.0)
        process.terminate()
        await asyncio.gather(*tasks)

    with child(bundle, settings) as server:
        asyncio.run(loaded(server.url, message_of(server.url, image), process_of(server)))
        exit_code = process_of(server).wait()
        lines = [json.loads(line) for line in server.log().splitlines()]
    answered = sum(line.get("route") == "infer" and line["status"] == 200 for line in lines)
    return {"clients_got": dict(seen), "server_answered": answered, "exit_code": exit_code}


def pictures(image: Any) -> list[tuple[bytes, dict[str, str]]]:
    levels = (image[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)
    encoded = []
    for kind in ("png", "jpeg"):
        stream = io.BytesIO()
        Image.fromarray(levels.squeeze()).save(stream, kind)
        encoded.append((stream.getvalue(), {"Content-Type": f"image/{kind}"}))
    return encoded


def fuzz(bundle: Path, settings: Settings, image: Any, bodies: int) -> Figures:
    """Mutated bodies of every kind; none may be answered with 5xx or leave a traceback."""
    rng = random.Random(0)
    statuses: Counter[int] = Counter()
    seeds = [tensor_request(image), tensor_request(image, "json"), *pictures(image)]
    with child(bundle, settings) as server, Client(server.url) as client:
        path = client.model_path()
        for i in range(bodies):
            body, headers = seeds[i % len(seeds)]
            mutant = bytearray(body)
            # headers of tensors and files are short: half of the changes go there
            reach = len(mutant) + 1 if rng.random() < 0.5 else min(len(mutant), 120)
            for _ in range(rng.randint(1, 8)):
                at = rng.randrange(reach)
                mutant[at : at + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
            statuses[client.request("POST", f"{path}/infer", bytes(mutant), headers).status] += 1
        log = server.log()
    return {"statuses": dict(statuses), "defects": log.count('"defect"') + log.count("Traceback")}


def beside_table(figures: Figures) -> str:
    lines = [
        "kind     precision  members  member bytes  bundle bytes  start s  resident MB  bundle"
    ]
    for name, row in figures["bundles"].items():
        memory = "-" if row["resident_mb"] is None else f"{row['resident_mb']:.1f}"
        lines.append(
            f"{row['kind']:<9}{row['precision']:<9}{row['num_members']:>9}"
            f"{row['member_bytes']:>14,}{row['bundle_bytes']:>14,}{row['start_seconds']:>9.2f}"
            f"{memory:>13}  {name}"
        )
    return "\n".join(lines)


def table(figures: Figures) -> str:
    lines = ["clients  mode       p50 ms    p95 ms    p99 ms   images/s"]
    for clients, row in figures["latency"]["clients"].items():
        for name, values in row.items():
            cells = (values[key] for key in ("p50_ms", "p95_ms", "p99_ms", "per_second"))
            lines.append(f"{clients:>7}  {name:<20}" + "  ".join(f"{v:8.3f}" for v in cells))
    rest = {key: value for key, value in figures.items() if key != "latency"}
    rest["start"] = figures["latency"]["start"]
    return "\n".join([*lines, *(f"{key}: {json.dumps(value)}" for key, value in rest.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--requests", type=int, default=400, help="of each mode, load and round")
    parser.add_argument("--soak", type=int, default=100_000, help="requests for the memory")
    parser.add_argument("--fuzz", type=int, default=10_000, help="mutated bodies")
    parser.add_argument("--threads", type=int, help="that a member computes with")
    parser.add_argument("--grouped", action="store_true", help="as in redefense serve")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    chosen = parser.parse_args()
    bundle, *others = chosen.bundles
    if others and chosen.grouped:
        parser.error("--grouped is for the load on one bundle")
    settings = Settings(threads=chosen.threads, grouped=chosen.grouped)
    figures: Figures = {"cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    figures |= {"threads": settings.threads, "grouped": settings.grouped}
    if others:
        figures["bundles"] = beside(chosen.bundles, settings)
    else:
        image = Model(bundle, threads=1).probes()[:1]
        figures["latency"] = latency(bundle, settings, image, chosen.requests)
        figures["overload"] = overload(bundle, settings, image)
        figures["terminated"] = terminated(bundle, settings, image)
        figures["fuzz"] = fuzz(bundle, settings, image, chosen.fuzz)
        figures["soak"] = soak(bundle, settings, image, chosen.soak)
    sys.stderr.write((beside_table(figures) if others else table(figures)) + "\n")
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
