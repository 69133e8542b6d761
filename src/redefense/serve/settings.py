"""Settings of a server, validated once."""

import ipaddress
import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from redefense.errors import ConfigError
from redefense.limits import at_least, one_of

Policy = Literal["fresh", "per-input", "per-client"]
"""Draws are never reused, reused per image, or per client within one epoch."""
Mode = Literal["sampled", "averaged", "member"]
"""One member per image, the mixture's mean probability, or always the first member."""

_JSON_BYTES, _BINARY_BYTES = 24, 8  # bytes of a float
_LEAST_BODY, _MOST_JSON = 2**23, 2**26
_POSITIVE: Final = ("max_batch", "max_queue", "max_pixels", "threads")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a bundle is served.

    Attributes:
        policy: `fresh` draws anew for every image of every request. `per-input` draws by a keyed
            hash of the image's 8-bit pixels: sending the same image again gains nothing (changing
            one pixel by one level, however, draws anew). `per-client` draws by a keyed hash of the
            client and the epoch: within an epoch a client meets one member whatever it sends.
        mode: `averaged` and `member` are for comparison; they are not randomized.
        scores: answers also hold the probabilities of all classes, which show who answered.
        research: draws are seeded and answers name the member; for loopback addresses only.
        seed: seed of the draws of a research server.
        grouped: images of a batch that drew the same member are computed together. This is faster,
            but response times reveal whether images share a member; with `per-client` all images of
            a request do.
        max_batch: maximum number of images per batch and per request.
        max_delay: seconds that a batch waits for more images; 0.0: no wait. Useful where images are
            computed together: `grouped`, or a mode without draws.
        max_queue: maximum number of waiting images; more are refused with 429.
        deadline: seconds after which a waiting request is answered with 504.
        max_pixels: maximum pixels of an uploaded image, before it is resized.
        max_body: maximum bytes of a request; None: the size of `max_batch` images, as JSON up to 64
            MiB (parsing blocks other requests), as binary tensor without limit; at least 8 MiB.
        tick: seconds; responses are sent on a time grid of this width, so that times do not reveal
            members of unequal speed. 0.0: at once.
        epoch: seconds for which `per-client` reuses a client's draw; None: an hour.
        client_header: the request header that identifies the client; None: its address. It must be
            set by your proxy: a client that can choose it gets new draws.
        grace: seconds between SIGTERM, when readiness turns false, and the end of listening.
        threads: threads per member; None: one per core.
    """

    policy: Policy = "fresh"
    mode: Mode = "sampled"
    scores: bool = False
    research: bool = False
    seed: int | None = None
    grouped: bool = False
    max_batch: int = 64
    max_delay: float = 0.0
    max_queue: int = 256
    deadline: float = 5.0
    max_pixels: int = 16_000_000
    max_body: int | None = None
    tick: float = 0.0
    epoch: float | None = None
    client_header: str | None = None
    grace: float = 1.0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("policy", Policy), ("mode", Mode)):
            one_of(name, getattr(self, name), get_args(kind))
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None:
                at_least(1, **{name: value})
        for name in ("max_delay", "tick", "grace"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0 seconds, got {getattr(self, name)}")
        for name in ("deadline", "epoch"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be positive, got {value} seconds")
        for name in ("max_delay", "tick"):
            if getattr(self, name) >= self.deadline:
                raise ConfigError(
                    f"{name} must be below deadline = {self.deadline:g} seconds, or every "
                    f"request would exceed it, got {getattr(self, name)}"
                )
        if self.max_delay > 0 and self.max_batch == 1:
            raise ConfigError("max_delay must be 0 with max_batch 1, where no batch is collected")
        if self.grouped and self.max_batch == 1:
            raise ConfigError("grouped needs batches of several images, max_batch is 1")
        if self.max_queue < self.max_batch:
            raise ConfigError(
                f"max_queue must be at least max_batch = {self.max_batch}, got {self.max_queue}"
            )
        if self.max_body is not None and self.max_body < 1:
            raise ConfigError(f"max_body must be at least 1 byte, got {self.max_body}")
        if (self.seed is None) == self.research:
            raise ConfigError("--seed and --research belong together: secret draws have no seed")
        if self.research and self.policy != "fresh":
            raise ConfigError(f"a research server draws afresh, got policy {self.policy}")
        for name in ("client_header", "epoch"):
            if getattr(self, name) is not None and self.policy != "per-client":
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is for the policy per-client, not {self.policy}")
        if self.mode != "sampled" and (self.research or self.grouped or self.policy != "fresh"):
            raise ConfigError(
                f"mode {self.mode} draws nothing: it takes no --policy, --grouped or --research"
            )

    def body_limit(self, pixels: int) -> int:
        """Maximum bytes of a request, for a model whose images have this many values."""
        if self.max_body is not None:
            return self.max_body
        values = self.max_batch * pixels
        as_json = min(values * _JSON_BYTES, _MOST_JSON)
        return max(_LEAST_BODY, as_json, values * _BINARY_BYTES + 2**16)  # and a header


def is_loopback(host: str) -> bool:
    """Whether the address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_address(settings: Settings, host: str) -> None:
    """Check that a research server is reachable from this machine only.

    Raises:
        ConfigError: if other machines can reach the address.
    """
    if settings.research and not is_loopback(host):
        raise ConfigError(
            f"--research shows the drawn member, so it needs a loopback host, got {host}"
        )
