"""Audits a running server: tests from outside whether its draws are secret.

The auditor has the bundle, sends requests like any client, and reads headers, metrics and logs. A
correct server fails a check in one of ten thousand audits.
"""

import ipaddress
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from redefense.errors import InputError
from redefense.export.draws import chi_square_p
from redefense.serve.audit.chance import agreement, independent, separation
from redefense.serve.audit.channels import OUTPUTS, Replica, leaks_in_channels
from redefense.serve.audit.client import Client, Form, Reply
from redefense.serve.audit.probing import Answer, Subjects, answers_in, distinguished, find_subjects
from redefense.serve.draws import Floats
from redefense.serve.model import Model
from redefense.serve.settings import Settings

ALPHA: Final = 1e-6
"""Significance level."""
_LAGS: Final = 16  # replicas may be a few draws apart
_SLOWER: Final = 0.1  # allowed deviation of the fraction of slower answers from 0.5
_SHOWN: Final = 0.2  # allowed increase of the guessing accuracy over labels alone
_FORMS: Final[tuple[Form, ...]] = ("binary", "json", "uint8")


Launch = Callable[[], AbstractContextManager[Replica]]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table."""

    check: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """Size of the audit: images drawn for, and requests of one image or pair."""

    draws: int = 6000
    repeats: int = 600
    identical: int = 40


@dataclass(slots=True)
class _Case:
    """State shared by all checks; `alone` and `pairs` collect (member, seconds) for the timing."""

    subjects: Subjects
    settings: Settings
    effort: Effort
    rng: np.random.Generator
    alone: list[tuple[int, float]] = field(default_factory=list)
    pairs: list[tuple[bool, float]] = field(default_factory=list)
    unexplained: int = 0

    @property
    def mixture(self) -> NDArray[np.float64]:
        return self.subjects.mixture

    def witness(self, n: int, answer: Answer) -> int:
        """A member that may have answered image n; unexplained answers count as the first's."""
        found = self.subjects.witness(n, answer, self.rng)
        self.unexplained += found is None
        return 0 if found is None else found

    def image(self, *numbers: int) -> Floats:
        return self.subjects.images[list(numbers)]

    def infer(self, client: Client, *numbers: int, form: Form = "binary") -> Reply:
        return client.infer(self.image(*numbers), form)

    def visitor(self, url: str, i: int) -> tuple[Client, dict[str, str]]:
        """Client i, by the client header or another loopback address."""
        header = self.settings.client_header
        if header is not None:
            return Client(url), {header: f"client-{i}"}
        source = str(ipaddress.ip_address("127.1.0.1") + i)
        return Client(url, source=source), {}


def run_audit(
    model: Model, settings: Settings, launch: Launch, *, effort: Effort | None = None, seed: int = 0
) -> list[Finding]:
    """Audit a server that each call of `launch` starts.

    Args:
        model: the bundle that the server serves.
        settings: settings of the server.
        launch: starts a replica within a context.
        effort: size of the audit.
        seed: seed of the auditor's choices.

    Raises:
        InputError: nothing is drawn, or draws cannot be observed because the members agree.
    """
    if settings.mode != "sampled" or settings.research:
        raise InputError("an audit needs a server that draws secretly: mode sampled, no research")
    if settings.max_batch < 2:
        raise InputError("an audit asks for two images at a time, got max_batch 1")
    rng = np.random.default_rng(seed)
    case = _Case(find_subjects(model, rng), settings, effort or Effort(), rng)
    with launch() as replica:
        findings = [
            _fingerprint(model, replica),
            *{"fresh": _fresh, "per-input": _per_input, "per-client": _per_client}[settings.policy](
                case, replica.url
            ),
            _channels(case, replica),
        ]
    findings += [_replicas(case, launch), _timing(case)]
    explained = case.unexplained == 0
    seen = f"{case.unexplained} answers that no member gives" if not explained else "all of them"
    return [*findings, Finding("every answer is that of a member", explained, seen)]


def _fingerprint(model: Model, replica: Replica) -> Finding:
    with Client(replica.url) as client:
        reply = client.infer(model.probes()[:1])
        served = [entry["name"] for entry in reply.json()["outputs"]]
    rates = distinguished(model, model.probes(), served)
    guesses = ", ".join(f"{100 * rate:.0f} % from {what}" for what, rate in rates.items())
    detail = f"the member is guessed correctly: {guesses}"
    passed = set(served) <= OUTPUTS and rates["served"] - rates["labels"] <= _SHOWN
    return Finding(
        "answers reveal hardly more than labels", passed, f"{detail}; fields {', '.join(served)}"
    )


def _uniform(case: _Case, members: Sequence[int], what: str) -> Finding:
    counts = np.bincount(members, minlength=len(case.mixture))
    p = chi_square_p(counts, case.mixture)
    share = case.mixture.max()
    # a shift of this size is detected with a probability of about 0.9
    visible = 6.2 * np.sqrt(share * (1 - share) / len(members))
    return Finding(
        "draws follow the mixture",
        p >= ALPHA,
        f"p = {p:.2g}, {len(members)} {what}; a share off by {100 * visible:.1f} points is seen",
    )


def _fresh(case: _Case, url: str) -> list[Finding]:
    with Client(url) as client:
        return [
            _uniform(case, _drawn(case, client), "images"),
            _asked_again(case, client),
            _mates(case, client),
        ]


def _drawn(case: _Case, client: Client) -> list[int]:
    # the images are sorted: the first ones tell members apart best
    best = min(64, len(case.subjects.images))
    size = min(32, case.settings.max_batch)
    members: list[int] = []
    while len(members) < case.effort.draws:
        numbers = case.rng.integers(best, size=size).tolist()
        answers = answers_in(case.infer(client, *numbers))
        members += [case.witness(n, a) for n, a in zip(numbers, answers, strict=True)]
    return members


def _asked_again(case: _Case, client: Client) -> Finding:
    members, answers = [], set()
    for _ in range(case.effort.repeats):
        reply = case.infer(client, 0)
        (answer,) = answers_in(reply)
        answers.add(answer)
        members.append(case.witness(0, answer))
        case.alone.append((members[-1], reply.seconds))
    p = chi_square_p(np.bincount(members, minlength=len(case.mixture)), case.mixture)
    steps = list(itertools.pairwise(members))
    # overlapping pairs are dependent; every second one is used
    serial = min(independent(steps[::2], case.mixture), independent(steps[1::2], case.mixture))
    return Finding(
        "repeated requests draw independently",
        min(p, serial) >= ALPHA,
        f"{len(answers)} answers to one image sent {len(members)} times, "
        f"p = {p:.2g}, each against the one before p = {serial:.2g}",
    )


def _pair(case: _Case, client: Client, *numbers: int) -> tuple[int, int]:
    """The members that answered two images of one request; its time is recorded."""
    reply = case.infer(client, *numbers)
    answered = zip(numbers, answers_in(reply), strict=True)
    first, second = (case.witness(n, answer) for n, answer in answered)
    case.pairs.append((first == second, reply.seconds))
    return first, second


def _mates(case: _Case, client: Client) -> Finding:
    # about ten expected in each of the M x M cells of the test
    repeats = max(case.effort.repeats, 10 * len(case.mixture) ** 2)
    joint = [_pair(case, client, 0, 1) for _ in range(repeats)]
    p = independent(joint, case.mixture)
    detail = f"{len(joint)} requests of two images, p = {p:.2g}"
    return Finding("images of a batch draw independently", p >= ALPHA, detail)


def _per_input(case: _Case, url: str) -> list[Finding]:
    members = []
    with Client(url) as client:
        for n in range(min(len(case.subjects.images), case.effort.draws // 4)):
            reply = case.infer(client, n)
            members.append(case.witness(n, answers_in(reply)[0]))
            case.alone.append((members[-1], reply.seconds))
        joint = [_pair(case, client, n, n + 1) for n in range(0, len(members) - 1, 2)]
        again = _kept(case, client)
    p = independent(joint, case.mixture)
    mates = Finding(
        "images of a batch draw independently", p >= ALPHA, f"{len(joint)} pairs, p = {p:.2g}"
    )
    return [_uniform(case, members, "images"), again, mates]


def _kept(case: _Case, client: Client) -> Finding:
    changed, tried = 0, min(20, case.effort.repeats // 10, len(case.subjects.images) - 1)
    for n in range(tried):
        alone = [answers_in(case.infer(client, n, form=form))[0] for form in _FORMS * 4]
        mates = [answers_in(case.infer(client, n + 1, n))[1] for _ in range(4)]
        changed += len({*alone, *mates}) > 1
    detail = f"{changed} of {tried} images changed their answer over 16 tries in three encodings"
    return Finding("repeated requests give equal answers", changed == 0, detail)


def _per_client(case: _Case, url: str) -> list[Finding]:
    members = []
    for i in range(min(400, case.effort.draws // 4)):
        client, headers = case.visitor(url, i)
        with client:
            client.model_path()  # connects first, so that the measured time excludes it
            reply = client.infer(case.image(0), headers=headers)
        members.append(case.witness(0, answers_in(reply)[0]))
        case.alone.append((members[-1], reply.seconds))
    # an epoch may end during the first attempt, not during both
    constant = _one_member(case, url) or _one_member(case, url)
    again = "one member answers a client" if constant else "a client meets several members"
    return [
        _uniform(case, members, "clients"),
        Finding("repeated requests give equal answers", constant, again),
        Finding(
            "images of a batch draw independently",
            True,
            "one member per client and epoch, by policy",
        ),
    ]


def _one_member(case: _Case, url: str) -> bool:
    """Whether one member could have given all answers to a client."""
    client, headers = case.visitor(url, 0)
    possible = np.ones(len(case.mixture), dtype=bool)
    with client:
        for turn in range(60):
            n = turn % min(20, len(case.subjects.images))
            (answer,) = answers_in(client.infer(case.image(n), _FORMS[turn % 3], headers))
            possible &= (case.subjects.answers[:, n] == answer).all(-1)
    return bool(possible.any())


def _replicas(case: _Case, launch: Launch) -> Finding:
    """Test whether two servers started at once draw independently for equal requests."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        # both at the same time: a seed from the clock would be equal
        replicas = pool.map(lambda _: stack.enter_context(launch()), range(2))
        left, right = (np.array(_sequence(case, replica.url)) for replica in list(replicas))
    per_client = case.settings.policy == "per-client"
    # two servers with one sequence may be some draws apart, since each answered other requests
    lags = range(-_LAGS, _LAGS + 1) if case.settings.policy == "fresh" else range(1)
    chance = float((case.mixture**2).sum())
    found = []
    for lag in lags:
        a, b = left[max(0, lag) :], right[max(0, -lag) :]
        n = min(len(a), len(b))
        matches = int((a[:n] == b[:n]).sum())
        found.append((agreement(matches, n, chance), matches / n))
    p, share = min(found)
    # Bonferroni: the smallest of many p-values is small by chance
    p = min(1.0, p * len(found))
    what = "clients" if per_client else "images"
    return Finding(
        "replicas draw independently",
        p >= ALPHA,
        f"{len(left)} {what}, {100 * share:.0f} % alike where chance makes {100 * chance:.0f} %, "
        f"p = {p:.2g}",
    )


def _sequence(case: _Case, url: str) -> list[int]:
    count = min(case.effort.repeats, 300)
    if case.settings.policy == "per-client":
        members = []
        for i in range(count):
            client, headers = case.visitor(url, i)
            with client:
                (answer,) = answers_in(client.infer(case.image(0), headers=headers))
            members.append(case.witness(0, answer))
        return members
    images = min(count, len(case.subjects.images)) if case.settings.policy == "per-input" else 1
    with Client(url) as client:
        chosen = range(images) if images > 1 else [0] * count
        return [case.witness(n, answers_in(case.infer(client, n))[0]) for n in chosen]


def _timing(case: _Case) -> Finding:
    """Test whether response times depend on the member, or on pairs of equal members."""
    groups = [[s for m, s in case.alone if m == k] for k in range(len(case.mixture))]
    worst, p = 0.5, 1.0
    for k, own in enumerate(groups):
        rest = [s for j, group in enumerate(groups) if j != k for s in group]
        share, chance = separation(np.array(own), np.array(rest))
        if abs(share - 0.5) > abs(worst - 0.5):
            # Bonferroni: the largest deviation among M members was chosen
            worst, p = share, min(1.0, chance * len(groups))
    same = np.array([s for equal, s in case.pairs if equal])
    other = np.array([s for equal, s in case.pairs if not equal])
    pair, pair_p = separation(other, same)
    # both: with thousands of answers a difference of no use to an attacker is significant, too
    by_member, by_pair = (
        abs(share - 0.5) > _SLOWER and chance < ALPHA
        for share, chance in ((worst, p), (pair, pair_p))
    )
    detail = (
        f"{len(case.alone)} answers, the member that differs most is slower in {100 * worst:.0f} %"
    )
    if case.pairs:
        detail += f", pairs of two members in {100 * pair:.0f} % of comparisons"
    if by_pair and case.settings.grouped:
        detail += "; leave --grouped out"
    elif by_pair or by_member:
        detail += f"; try --tick{' with a wider grid' if case.settings.tick else ''}"
    return Finding("response times do not reveal the member", not (by_pair or by_member), detail)


def _channels(case: _Case, replica: Replica) -> Finding:
    wrong = leaks_in_channels(replica, case.image(0), case.effort.identical)
    detail = "; ".join(wrong) or "headers, fields, metrics and log are the same for every member"
    return Finding("headers, metrics and log do not reveal the member", not wrong, detail)
