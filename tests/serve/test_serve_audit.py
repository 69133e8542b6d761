"""The auditor's kit passes a sound server and catches weak ones, each by the check made for it."""

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redefense.errors import InputError
from redefense.export.runner import sessions
from redefense.serve.audit.chance import independent, separation
from redefense.serve.audit.channels import Replica
from redefense.serve.audit.run import Effort, Finding, run_audit
from redefense.serve.draws import Draw, Ensemble, Floats, draw_by, fresh, seeded
from redefense.serve.model import Model
from redefense.serve.observe import LOG, JsonLines
from redefense.serve.settings import Settings
from serve_tools import make_bundle, serving

EFFORT = Effort(draws=640, repeats=60, identical=6)
FEW = Effort(draws=64, repeats=20, identical=6)
"""Enough for what shows in a few answers: most of an audit is requests."""
FRESH = Settings(grace=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(make_bundle(tmp_path_factory.mktemp("audit") / "toy"), threads=1)


class Lines(logging.Handler):
    """Keeps what a server logs."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.text = ""
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"


@contextlib.contextmanager
def heard() -> Iterator[Lines]:
    lines, level = Lines(), LOG.level
    LOG.addHandler(lines)
    LOG.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        LOG.removeHandler(lines)
        LOG.setLevel(level)


def audited(
    model: Model,
    make_draw: Callable[[], Draw],
    settings: Settings = FRESH,
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    effort: Effort = EFFORT,
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> dict[str, Finding]:
    @contextlib.contextmanager
    def launch() -> Iterator[Replica]:
        with heard() as lines, around(), serving(model, settings, make_draw(), wrap) as url:
            yield Replica(url, lambda: lines.text)

    findings = run_audit(model, settings, launch, effort=effort)
    return {finding.check: finding for finding in findings}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if not finding.passed}


@pytest.mark.parametrize("policy", ["fresh", "per-input", "per-client"])
def test_a_sound_server_passes(model: Model, policy: Any) -> None:
    settings = Settings(policy=policy, grace=0.0)
    found = audited(model, lambda: draw_by(settings, model.mixture, os.urandom(32)), settings)
    assert failed(found) == set(), found
    assert len(found) == 8
    # per-client answers both images of a request by one member
    paired = "pairs of two members" in found["response times do not reveal the member"].detail
    assert paired == (policy != "per-client")


def test_a_seed_at_start_is_caught(model: Model) -> None:
    found = audited(model, lambda: seeded(model.mixture, 7), effort=FEW)
    assert failed(found) == {"replicas draw independently"}


def test_one_draw_per_batch_is_caught(model: Model) -> None:
    def draw(images: Floats, clients: Sequence[str]) -> Ensemble:
        return np.repeat(fresh(model.mixture)(images[:1], clients), len(images))

    assert "images of a batch draw independently" in failed(audited(model, lambda: draw))


def test_a_biased_draw_is_caught(model: Model) -> None:
    def draw(images: Floats, clients: Sequence[str]) -> Ensemble:
        return np.array([byte % 4 % 3 for byte in os.urandom(len(images))])

    many = Effort(draws=640, repeats=20, identical=1)
    assert "draws follow the mixture" in failed(audited(model, lambda: draw, effort=many))


def test_a_draw_by_the_clock_is_caught(model: Model) -> None:
    ticks = itertools.count()  # a clock that moves on every twenty requests

    def draw(images: Floats, clients: Sequence[str]) -> Ensemble:
        return seeded(model.mixture, next(ticks) // 20)(images, clients)

    assert "repeated requests draw independently" in failed(audited(model, lambda: draw))


def test_a_cache_of_answers_is_caught(model: Model) -> None:
    kept: dict[bytes, int] = {}

    def draw(images: Floats, clients: Sequence[str]) -> Ensemble:
        new = fresh(model.mixture)(images, clients)
        pairs = zip(images, new, strict=True)
        return np.array([kept.setdefault(image.tobytes(), int(m)) for image, m in pairs])

    assert "repeated requests draw independently" in failed(audited(model, lambda: draw))


class RecordedDraw:
    """A draw that records its last member, which the leaks below reveal."""

    def __init__(self, model: Model) -> None:
        self.last, self._draw = 0, fresh(model.mixture)

    def __call__(self, images: Floats, clients: Sequence[str]) -> Ensemble:
        members = self._draw(images, clients)
        self.last = int(members[-1])
        return members


def test_a_member_in_a_header_is_caught(model: Model) -> None:
    draw = RecordedDraw(model)

    def wrap(app: ASGIApp) -> ASGIApp:
        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            async def reported(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)["ETag"] = f'"{draw.last * 7919}"'
                await send(message)

            await app(scope, receive, reported)

        return wrapped

    found = audited(model, lambda: draw, wrap=wrap, effort=FEW)
    assert failed(found) == {"headers, metrics and log do not reveal the member"}
    assert "header etag" in found["headers, metrics and log do not reveal the member"].detail


def test_a_member_in_the_log_is_caught(model: Model) -> None:
    inner = RecordedDraw(model)

    def draw(images: Floats, clients: Sequence[str]) -> Ensemble:
        members = inner(images, clients)
        LOG.info({"event": "run", "graph": f"graph-{inner.last}"})
        return members

    found = audited(model, lambda: draw, effort=Effort(draws=64, repeats=20, identical=12))
    assert failed(found) == {"headers, metrics and log do not reveal the member"}
    assert "log varies" in found["headers, metrics and log do not reveal the member"].detail


def test_grouped_images_tell_by_the_time_who_shares_a_member(model: Model) -> None:
    inner = sessions.logits_of

    def slow(session: Any, images: Any) -> Any:
        time.sleep(0.02)  # a run has a price of its own, however many images it holds
        return inner(session, images)

    found = audited(
        model,
        lambda: fresh(model.mixture),
        Settings(grouped=True, grace=0.0),
        effort=Effort(draws=32, repeats=20, identical=2),
        around=lambda: mock.patch.object(sessions, "logits_of", slow),
    )
    assert failed(found) == {"response times do not reveal the member"}, found
    assert "leave --grouped out" in found["response times do not reveal the member"].detail


def test_a_member_that_is_slower_is_caught(model: Model) -> None:
    inner, calls = RecordedDraw(model), itertools.count()

    def draw(images: Floats, clients: Sequence[str]) -> Ensemble:
        members = inner(images, clients)
        # the requests whose time is measured come first
        if len(images) == 1 and next(calls) < 1 + EFFORT.repeats and inner.last == 1:
            time.sleep(0.1)  # longer than a busy machine delays an answer
        return members

    found = audited(model, lambda: draw)
    assert "response times do not reveal the member" in failed(found)


def test_scores_show_who_answered(model: Model) -> None:
    settings = Settings(scores=True, grace=0.0)
    found = audited(model, lambda: fresh(model.mixture), settings, effort=FEW)
    assert "answers reveal hardly more than labels" in failed(found)


def test_kept_draws_that_are_not_kept_are_caught(model: Model) -> None:
    settings = Settings(policy="per-input", grace=0.0)
    found = audited(model, lambda: fresh(model.mixture), settings, effort=FEW)
    assert "repeated requests give equal answers" in failed(found)


def test_what_draws_nothing_is_not_audited(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="secretly"):
        audited(model, lambda: fresh(model.mixture), Settings(mode="averaged"))
    with pytest.raises(InputError, match="two images"):
        audited(model, lambda: fresh(model.mixture), Settings(max_batch=1))
    alone = Model(make_bundle(tmp_path / "one", num_members=1), threads=1)
    with pytest.raises(InputError, match="equally"):
        audited(alone, lambda: fresh(alone.mixture))


def test_tests_of_chance_know_order_from_chance() -> None:
    rng = np.random.default_rng(0)
    mixture = np.array([0.5, 0.3, 0.2])
    drawn = rng.choice(3, size=(3000, 2), p=mixture)
    assert independent([(int(a), int(b)) for a, b in drawn], mixture) > 1e-3
    assert independent([(int(a), int(a)) for a, _ in drawn], mixture) < 1e-9
    fast, slow = rng.random(500), rng.random(500) + 0.3
    assert separation(slow, fast)[0] > 0.6
    assert separation(slow, fast)[1] < 1e-9
    assert separation(fast, fast)[0] == 0.5
