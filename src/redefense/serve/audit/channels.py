"""Side channels that could reveal a member: headers, fields, metrics and log lines.

Identical requests are sent; any difference other than the answer and the time is a leak.
"""

import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from redefense.serve.audit.client import Client
from redefense.serve.draws import Floats

OUTPUTS: Final = {"label", "class_id", "confidence"}
_HEADERS: Final = {
    "cache-control", "connection", "content-length", "content-security-policy", "content-type",
    "date", "referrer-policy", "x-content-type-options",
}  # fmt: skip
_TIMES: Final = {"time", "ms", "seconds", "duration"}
_TELLING: Final = re.compile(r"member|draw|seed", re.IGNORECASE)
_PAUSE: Final = 0.2  # seconds; a line is written after its answer


@dataclass(frozen=True, slots=True)
class Replica:
    """A running server: its URL, its log so far, and its process if we started one."""

    url: str
    log: Callable[[], str]
    process: "subprocess.Popen[bytes] | None" = None


def leaks_in_channels(replica: Replica, image: Floats, requests: int) -> list[str]:
    """Differences between requests for one image (1, C, H, W); empty on a correct server."""
    with Client(replica.url) as client:
        client.infer(image)
        wrong = _headers_and_fields(client, image, requests) + _metrics(client, image, requests)
        time.sleep(_PAUSE)
        # lines of the requests so far have been written by now
        before = len(replica.log())
        for _ in range(requests):
            client.infer(image)
        time.sleep(_PAUSE)
        return wrong + _log(replica.log()[before:], requests)


def _headers_and_fields(client: Client, image: Floats, requests: int) -> list[str]:
    seen: dict[str, set[str]] = {}
    wrong = []
    for _ in range(requests):
        reply = client.infer(image)
        for name, value in reply.headers:
            if name.lower() not in ("date", "content-length"):
                seen.setdefault(name.lower(), set()).add(value)
        answer = reply.json()
        extra = set(answer) - {"model_name", "model_version", "outputs", "id"}
        extra |= {entry["name"] for entry in answer["outputs"]} - OUTPUTS
        wrong += [f"field {name}" for name in sorted(extra)]
    wrong += [f"header {name}" for name in sorted(seen.keys() - _HEADERS)]
    wrong += [f"header {name} varies" for name, values in seen.items() if len(values) > 1]
    if seen.get("cache-control") != {"no-store"}:
        wrong.append("answers may be cached (no Cache-Control: no-store)")
    return sorted(set(wrong))


def _metrics(client: Client, image: Floats, requests: int) -> list[str]:
    def scrape() -> dict[str, float]:
        text = client.request("GET", "/metrics").body.decode()
        rows = [line.rpartition(" ") for line in text.splitlines() if line[:1] not in ("", "#")]
        # metrics of time or the process differ for every request
        timed = re.compile(r"^(process|python)_|seconds|_created")
        return {name: float(value) for name, _, value in rows if not timed.search(name)}

    steps: list[dict[str, float]] = []
    client.infer(image)
    scrape()
    last = scrape()
    for _ in range(requests):
        client.infer(image)
        now = scrape()
        steps.append({name: value - last.get(name, 0.0) for name, value in now.items()})
        last = now
    names = sorted({name for step in steps for name in step})
    wrong = [f"metric {n} varies" for n in names if len({s.get(n, 0.0) for s in steps}) > 1]
    return wrong + [f"metric {name}" for name in names if _TELLING.search(name)]


def _log(text: str, requests: int) -> list[str]:
    lines = Counter(_timeless(line) for line in text.splitlines() if line.strip())
    wrong = [f"log line {line[:80]}" for line in lines if _TELLING.search(line)]
    # identical requests cause identical lines; rare lines reveal something about their request
    wrong += [f"log varies: {line[:80]}" for line, n in lines.items() if n < requests]
    return wrong[:3]


def _timeless(line: str) -> str:
    try:
        value: Any = json.loads(line)
    except ValueError:
        return re.sub(r"\d{4}-\d\d-\d\d\S*|\d\d:\d\d:\d\d\S*|\d+\.\d+", "", line)
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in _TIMES}
    return json.dumps(value, sort_keys=True)
