"""A server's life: draws, overload, deadlines, slow bodies, SIGTERM, the command line."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from redefense.commands import serving as serving_command
from redefense.errors import ConfigError, DataError
from redefense.export.draws import chi_square_p
from redefense.serve.audit.children import options_of
from redefense.serve.audit.client import Client, tensor_request
from redefense.serve.draws import (
    Ensemble,
    Floats,
    canonical,
    fresh,
    per_client,
    per_input,
    pick,
    read_key,
    seeded,
)
from redefense.serve.engine import Engine
from redefense.serve.model import Model
from redefense.serve.process import listen
from redefense.serve.settings import Settings
from serve_tools import SHAPE, make_bundle, pictures, serving

MIXTURE = np.array([0.5, 0.3, 0.2])
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("process") / "toy", mixture=[0.5, 0.3, 0.2])


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return Model(bundle, threads=1)


def images(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).random((count, *SHAPE), dtype=np.float32)


def counts(members: Ensemble) -> Any:
    return np.bincount(members, minlength=3)


def test_every_policy_follows_the_mixture() -> None:
    many, alone = images(20_000), ["a"] * 20_000
    people = [f"client {i}" for i in range(20_000)]
    drawn = {
        "fresh": fresh(MIXTURE)(many, alone),
        "per-input": per_input(MIXTURE, KEY)(many, alone),
        "per-client": per_client(MIXTURE, KEY, epoch=60.0)(many, people),
        "seeded": seeded(MIXTURE, 3)(many, alone),
    }
    for policy, members in drawn.items():
        assert chi_square_p(counts(members), MIXTURE) > 1e-6, policy


def test_numbers_pick_members_at_the_mixtures_borders() -> None:
    quarters = np.array([0.25, 0.75])
    edge = 2**62
    assert pick([0, edge - 1, edge, 2**64 - 1], quarters).tolist() == [0, 0, 1, 1]
    assert pick([0, 2**64 - 1], np.array([0.0, 1.0, 0.0])).tolist() == [1, 1]


def test_per_input_knows_an_image_by_its_8_bit_pixels() -> None:
    draw, few, alone = per_input(MIXTURE, KEY), images(500), ["a"] * 500
    levels = np.rint(few * 255).astype(np.uint8)
    again = (levels / np.float32(255)).astype(np.float32)
    assert draw(few, alone).tolist() == draw(again, ["b"] * 500).tolist()
    other = per_input(MIXTURE, bytes(32))(few, alone)
    assert (draw(few, alone) != other).any()
    # one level of one pixel is another image, and draws anew
    moved = again.copy()
    moved[:, 0, 0, 0] = np.where(levels[:, 0, 0, 0] < 255, again[:, 0, 0, 0] + 1 / 255, 0)
    agree = float((draw(moved, alone) == draw(again, alone)).mean())
    assert abs(agree - (MIXTURE**2).sum()) < 0.12
    assert canonical(few[0]) != canonical(few[0].reshape(1, 2, 8))


def test_per_client_keeps_a_member_for_an_epoch() -> None:
    now = [1000.0]
    draw = per_client(MIXTURE, KEY, epoch=60.0, clock=lambda: now[0])
    people = [f"client {i}" for i in range(400)]
    first = draw(images(400), people)
    assert draw(images(400, seed=1), people).tolist() == first.tolist()
    assert len(set(first.tolist())) == 3
    now[0] += 60.0
    agree = float((draw(images(400), people) == first).mean())
    assert abs(agree - (MIXTURE**2).sum()) < 0.15


def test_keys_are_secret_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others"):
        read_key(path)
    path.chmod(0o600)
    assert read_key(path) == KEY
    assert read_key(None) != read_key(None)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="32 bytes"):
        read_key(path)
    with pytest.raises(DataError, match="missing"):
        read_key(tmp_path / "missing")


def test_served_draws_follow_the_mixture_and_ignore_batch_mates(model: Model) -> None:
    with serving(model, Settings(grace=0.0)) as url, Client(url) as client:
        asked = np.arange(64) % 10
        found = [client.infer(pictures(asked)).output("class_id") for _ in range(60)]
    members = (np.array(found) - asked) % 10
    assert chi_square_p(counts(members.ravel()), MIXTURE) > 1e-6
    pairs = members[:, 0::2] * 3 + members[:, 1::2]
    assert (
        chi_square_p(np.bincount(pairs.ravel(), minlength=9), np.outer(MIXTURE, MIXTURE).ravel())
        > 1e-6
    )


class Gate:
    """A draw that waits until it is opened, and then for some seconds."""

    def __init__(self, seconds: float = 0.0, *, closed: bool = False) -> None:
        self.seconds, self.open = seconds, threading.Event()
        if not closed:
            self.open.set()

    def __call__(self, images: Floats, clients: Sequence[str]) -> Ensemble:
        self.open.wait(30)
        time.sleep(self.seconds)
        return np.zeros(len(images), dtype=np.int64)


Seen = list[tuple[int, dict[str, str], float]]


def at_once(url: str, requests: int, size: int = 1) -> tuple[Seen, list[threading.Thread]]:
    """Requests on their way, and the replies as they come."""
    found: Seen = []

    def ask() -> None:
        with Client(url) as client:
            reply = client.infer(pictures(np.zeros(size, dtype=np.int64)))
            found.append((reply.status, dict(reply.headers), reply.seconds))

    threads = [threading.Thread(target=ask) for _ in range(requests)]
    for thread in threads:
        thread.start()
    return found, threads


def finish(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join()


def test_a_full_queue_answers_429_while_the_members_are_busy(model: Model) -> None:
    settings = Settings(max_batch=2, max_queue=4, deadline=20.0, grace=0.0)
    gate = Gate(closed=True)
    with serving(model, settings, gate) as url:
        replies, threads = at_once(url, 20)
        # at most two images are with the members and four in the queue
        while len(replies) < 14:
            time.sleep(0.01)
        refused = list(replies)
        gate.open.set()
        finish(threads)
    assert {status for status, _, _ in refused} == {429}
    assert all(int(headers["retry-after"]) >= 1 for _, headers, _ in refused)
    assert [status for status, _, _ in replies].count(200) >= 4


def test_a_late_request_is_answered_504_at_its_deadline(model: Model) -> None:
    gate = Gate(closed=True)
    with serving(model, Settings(deadline=0.5, grace=0.0), gate) as url:
        replies, threads = at_once(url, 5)
        finish(threads)
        gate.open.set()
    assert [status for status, _, _ in replies] == [504] * 5
    assert all(0.5 <= seconds < 5.0 for _, _, seconds in replies)


def test_images_that_wait_are_answered_together(model: Model) -> None:
    with serving(model, Settings(max_delay=4.0, max_batch=8, grace=0.0), Gate()) as url:
        started = time.perf_counter()
        finish(at_once(url, 4, size=2)[1])  # a full batch does not wait
        assert time.perf_counter() - started < 3.9
        with Client(url) as client:
            text = client.request("GET", "/metrics").body.decode()
            assert 'redefense_batch_images_bucket{le="4.0"} 0.0' in text
            assert "redefense_images_total 8.0" in text
    with (
        serving(model, Settings(max_delay=0.5, max_batch=8, grace=0.0), Gate()) as url,
        Client(url) as client,
    ):
        assert client.infer(pictures(np.arange(1))).seconds > 0.45


def test_answers_leave_on_a_grid_whoever_is_slow(model: Model) -> None:
    offsets = []
    for turn in range(8):
        engine = Engine(model, Settings(tick=0.1), Gate(0.02 * (turn % 3)))
        engine(pictures(np.arange(1)), ["a"])
        offsets.append(time.monotonic() % 0.1)
    assert np.median(offsets) < 0.03


def test_a_body_that_never_comes_is_given_up(model: Model) -> None:
    settings = Settings(deadline=0.2, grace=0.0)
    with serving(model, settings) as url:
        parts = urlsplit(url)
        with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as slow:
            head = "POST /v2/models/toy/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            slow.sendall(head.encode())
            slow.settimeout(5)
            assert slow.recv(200).startswith(b"HTTP/1.1 408")


def test_the_options_of_a_server_make_its_settings_and_no_more() -> None:
    assert "--epoch" not in options_of(Settings())
    words = options_of(Settings(policy="per-client", epoch=5.0, grace=0.0, scores=True))
    assert words[words.index("--epoch") + 1] == "5.0"
    assert words[words.index("--grace") + 1] == "0.0"
    assert "--scores" in words
    assert "--research" not in words


def test_a_taken_address_is_one_line() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.fixture
def child(bundle: Path, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    log = tmp_path / "log"
    words = ["-m", "redefense", "serve", str(bundle), "--port", "0", "--grace", "0.3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            [sys.executable, *words, "--threads", "1"], stderr=stream, env=environment
        ) as process,
    ):
        while not log.read_bytes().endswith(b"\n"):
            time.sleep(0.02)
        yield process, log
        process.kill()


def test_sigterm_answers_all_that_was_accepted(
    child: tuple["subprocess.Popen[bytes]", Path],
) -> None:
    process, path = child
    url = json.loads(path.read_text())["url"]
    body, headers = tensor_request(pictures(np.arange(4)))
    answered, lost, ready = [], [], []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
            try:
                connection.connect()
            except OSError:
                return  # no longer listening: nothing was accepted
            try:
                connection.request("POST", "/v2/models/toy/infer", body, headers)
                answered.append(connection.getresponse().status)
            except ConnectionResetError:
                lost.append("in the backlog")
            except (http.client.HTTPException, OSError) as error:
                lost.append(repr(error))
            finally:
                connection.close()

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    with Client(url) as client:
        reply = client.request("GET", "/v2/health/ready")
        sent = dict(reply.headers)
        ready.append((reply.status, sent["connection"], sent["retry-after"]))
    assert process.wait(15) == 0
    stop.set()
    for thread in threads:
        thread.join()
    log = [json.loads(line) for line in path.read_text().splitlines()]
    served = [line["status"] for line in log if line.get("route") == "infer"]
    assert ready == [(503, "close", "1")]
    assert set(answered) == {200}
    assert served == answered, f"{len(served)} served, {len(answered)} answered, lost: {lost}"
    assert log[-1]["event"] == "stopped"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--research", "--seed", "1", "--host", "0.0.0.0"], 2, "loopback"),
        (["--research", "--host", "0.0.0.0"], 2, "loopback"),
        (["--seed", "1"], 2, "--research"),
        (["--policy", "sticky"], 2, "sticky"),
        (["--name", "a/b"], 2, "--name"),
        (["--json"], 2, "--audit"),
        (["--key", "secret.key"], 2, "per-input"),
        (["--audit", "--host", "0.0.0.0"], 2, "remove --host"),
        (["--audit", "--port", "8000"], 2, "remove --port"),
        (["--audit", "--name", "mine"], 2, "remove --name"),
        (["--audit", "--policy", "per-input", "--key", "secret.key"], 2, "remove --key"),
        (["--epoch", "60"], 2, "per-client, not fresh"),
        (["--policy", "per-input", "--epoch", "3600"], 2, "per-client, not per-input"),
        (["--max-delay", "0.1", "--max-batch", "1"], 2, "max_batch 1"),
        (["--max-delay", "9"], 2, "below deadline = 5"),
        (["--tick", "5"], 2, "below deadline = 5"),
        (["--audit", "--mode", "averaged"], 2, "secretly"),
    ],
)
def test_the_command_refuses_in_one_line(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    from redefense.cli import main

    monkeypatch.setattr(sys, "argv", ["redefense", "serve", str(bundle), "--quiet", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    error = capsys.readouterr().err
    assert caught.value.code == code
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_missing_package_is_named_with_what_installs_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from redefense.cli import main

    monkeypatch.setattr(serving_command, "PACKAGES", ("no_such_package",))
    monkeypatch.setattr(sys, "argv", ["redefense", "serve", str(bundle)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "pip install -c constraints.txt -e '.[serve]'" in capsys.readouterr().err


def test_the_command_audits_a_server_of_its_own(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from redefense.cli import main
    from redefense.serve.audit import run as audit

    def lazy(*_: Any, **changes: Any) -> audit.Effort:
        return dataclass_of(draws=64, repeats=20, identical=4)

    dataclass_of = audit.Effort
    monkeypatch.setattr(audit, "Effort", lazy)
    words = ["serve", str(bundle), "--audit", "--json", "--quiet", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["redefense", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    shown = json.loads(capsys.readouterr().out)
    assert shown["passed"], shown
    assert caught.value.code in (0, None)
    assert {"check", "passed", "detail"} == set(shown["findings"][0])
