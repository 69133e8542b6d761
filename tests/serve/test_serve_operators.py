"""What operators ask of a server: index, configuration, statistics, and another bundle."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redefense.serve.audit.client import Client
from redefense.serve.model import Model
from redefense.serve.settings import Settings
from serve_tools import CLASSES, SHAPE, make_bundle, pictures, serving

PATH = "/v2/models/toy"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    model = Model(make_bundle(tmp_path_factory.mktemp("operators") / "toy"), threads=1)
    settings = Settings(scores=True, max_batch=8, max_delay=0.002, grace=0.0)
    with serving(model, settings) as url, Client(url) as opened:
        yield opened


def statistics(client: Client, path: str) -> dict[str, Any]:
    (stats,) = client.request("GET", path).json()["model_stats"]
    return dict(stats)


def test_the_configuration_describes_the_tensors_of_one_image(client: Client) -> None:
    config = client.request("GET", f"{PATH}/config").json()
    assert config["max_batch_size"] == 8
    assert config["dynamic_batching"] == {"max_queue_delay_microseconds": 2000}
    assert config["input"] == [{"name": "images", "data_type": "TYPE_FP32", "dims": list(SHAPE)}]
    outputs = client.request("GET", PATH).json()["outputs"]
    for output, described in zip(outputs, config["output"], strict=True):
        assert output["name"] == described["name"]
        # the batch comes before the dimensions, as they are reshaped
        shape = described.get("reshape", {}).get("shape", described["dims"])
        assert output["shape"] == [-1, *shape]


def test_the_index_lists_the_model_and_only_reads_what_it_knows(client: Client) -> None:
    for body in (b"", b"{}", b'{"ready": true}', b'{"ready": false}'):
        reply = client.request("POST", "/v2/repository/index", body)
        assert reply.json() == [{"name": "toy", "version": "1", "state": "READY", "reason": ""}]
    for body in (b"[]", b"{", b'{"ready": 1}', b'{"ready": null}'):
        assert client.request("POST", "/v2/repository/index", body).status == 400


def test_statistics_count_requests_and_images_and_nothing_of_members(client: Client) -> None:
    before = statistics(client, "/v2/models/stats")
    images = pictures(np.arange(5))
    for _ in range(3):
        assert client.infer(images).status == 200
    assert client.request("POST", f"{PATH}/infer", b"{}").status == 400
    after = statistics(client, f"{PATH}/stats")
    assert after["inference_count"] - before["inference_count"] == 15
    assert after["execution_count"] - before["execution_count"] == 3
    done, failed = (after["inference_stats"][key]["count"] for key in ("success", "fail"))
    assert done - before["inference_stats"]["success"]["count"] == 3
    assert failed - before["inference_stats"]["fail"]["count"] == 1
    # nothing that differs with the member that was drawn: no duration, and no list of members
    assert after.keys() == {
        "name", "version", "inference_count", "execution_count", "inference_stats"
    }  # fmt: skip
    assert all(kind.keys() == {"count"} for kind in after["inference_stats"].values())


@pytest.mark.parametrize("path", ["/v2/models/other/stats", "/v2/models/other/config"])
def test_another_name_is_not_found(client: Client, path: str) -> None:
    assert client.request("GET", path).status == 404


def wait_for(log: Path, event: str) -> dict[str, Any]:
    """The first line of a server's log about this event."""
    limit = time.monotonic() + 30
    while True:
        whole = log.read_text().rpartition("\n")[0].splitlines()
        if found := [line for line in whole if f'"event": "{event}"' in line]:
            return dict(json.loads(found[0]))
        assert time.monotonic() < limit, "\n".join(whole[-20:])
        time.sleep(0.05)


class Asking:
    """Clients that ask a server the same four images again and again, until the block ends.

    Attributes:
        found: status of every answer, and by how much its classes are those of the images shifted.
    """

    def __init__(self, url: str) -> None:
        self.found: list[tuple[int, tuple[int, ...]]] = []
        self._url, self._stop = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(3)]

    def _ask(self) -> None:
        asked = np.arange(4)
        with Client(self._url) as client:
            while not self._stop.is_set():
                reply = client.infer(pictures(asked))
                shift = (np.array(reply.output("class_id")) - asked) % CLASSES
                self.found.append((reply.status, tuple(shift.tolist())))

    def wait(self) -> tuple[int, tuple[int, ...]]:
        """An answer to a question that was asked after this call."""
        seen, limit = len(self.found), time.monotonic() + 30
        while len(self.found) <= seen + len(self._threads):
            assert time.monotonic() < limit, "no answer"
            time.sleep(0.01)
        return self.found[-1]

    def __enter__(self) -> "Asking":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_another_bundle_takes_over_without_a_lost_request(tmp_path: Path) -> None:
    # members of the first answer image k with k, of the second, drawn for one alone, with k + 1
    make_bundle(tmp_path / "one", 1)
    make_bundle(tmp_path / "two", 2, mixture=[0.0, 1.0])
    make_bundle(tmp_path / "broken", 1)
    (tmp_path / "broken" / "members" / "0.onnx").write_bytes(b"changed")
    current, log = tmp_path / "current", tmp_path / "log"

    def point_to(name: str) -> None:
        (tmp_path / "next").symlink_to(name)
        (tmp_path / "next").rename(current)

    point_to("one")
    words = ["-m", "redefense", "serve", str(current), "--name", "toy", "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *words, "--threads", "1", "--grace", "0"],
            stderr=stream, env=environment,
        )  # fmt: skip
    try:
        with Asking(wait_for(log, "listening")["url"]) as asking:
            point_to("broken")
            process.send_signal(signal.SIGHUP)
            assert "0.onnx" in wait_for(log, "update refused")["why"]
            assert asking.wait() == (200, (0, 0, 0, 0))
            point_to("two")
            process.send_signal(signal.SIGHUP)
            wait_for(log, "updated")
            assert asking.wait() == (200, (1, 1, 1, 1))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    # every question was answered, and every batch by one bundle or by the other
    assert set(asking.found) == {(200, (0, 0, 0, 0)), (200, (1, 1, 1, 1))}


def test_a_bundle_with_other_classes_or_images_needs_another_server(tmp_path: Path) -> None:
    from redefense.errors import ConfigError
    from redefense.serve.app import Service
    from redefense.serve.draws import fresh

    model = Model(make_bundle(tmp_path / "toy"), threads=1)
    other = Model(make_bundle(tmp_path / "other"), threads=1)
    service = Service(model, Settings(), fresh(model.mixture))
    with pytest.raises(ConfigError, match="must have the name of the one before, toy, got other"):
        service.use(other, fresh(other.mixture))
    assert service.model is model


def test_onnxruntime_reports_no_member_to_its_makers(tmp_path: Path) -> None:
    # what it is going to report it keeps in a database below the user's folder for caches
    bundle, home = make_bundle(tmp_path / "toy"), tmp_path / "home"
    home.mkdir()
    hidden = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"HOME": str(home)}
    program = (
        "from pathlib import Path\n"
        "from redefense.export import runner\n"
        "from redefense.serve.model import Model\n"
        f"bundle = runner.open_bundle(Path({str(bundle)!r}))\n"
        "session = runner.open_session(bundle.member(0))\n"
        "runner.logits_of(session, bundle.probes()[0])\n"
        f"Model(Path({str(bundle)!r}), threads=1).warm_up((1, 2))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=environment)
    assert list(home.rglob("*")) == []
