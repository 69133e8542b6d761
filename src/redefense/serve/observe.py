"""Logs and metrics, which never contain an image, an answer, a client or a member."""

import json
import logging
import time
import traceback
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.samples import Sample

LOG: Final = logging.getLogger("redefense.serve")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class JsonLines(logging.Formatter):
    """One JSON object per line; records of other loggers (uvicorn) become a `message`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        if isinstance(record.msg, dict):
            line |= record.msg
        else:
            line["message"] = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line)


def log_to_stderr(*, quiet: bool) -> None:
    """Structured lines on stderr; with `quiet` warnings and errors only."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("redefense.serve", "uvicorn"):
        logger = logging.getLogger(name)
        # else a handler of the root logger would write each line again, in another form
        logger.handlers, logger.propagate = [handler], False
    LOG.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class Metrics:
    """The metrics of `/metrics`, for this server only.

    No process metrics: CPU seconds would reveal members of unequal speed.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "redefense_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "redefense_request_seconds",
            "From the first byte to the last of the answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.images = Counter(
            "redefense_images", "Images classified, of all members.", registry=self._registry
        )
        self.batches = Histogram(
            "redefense_batch_images",
            "Images per batch, before the draw.",
            buckets=_SIZES,
            registry=self._registry,
        )
        self.updates = Counter(
            "redefense_updates",
            "Bundles read anew on SIGHUP.",
            ["outcome"],
            registry=self._registry,
        )
        self.waiting = Gauge("redefense_queue_images", "Images waiting.", registry=self._registry)

    def batch(self, size: int) -> None:
        self.images.inc(size)
        self.batches.observe(size)

    def inferences(self) -> tuple[int, int]:
        """Inference requests that succeeded and that failed."""
        done = failed = 0
        for sample in _samples(self.requests):
            if sample.name.endswith("_total") and sample.labels["route"] in ("infer", "classify"):
                if sample.labels["status"] == "200":
                    done += int(sample.value)
                else:
                    failed += int(sample.value)
        return done, failed

    def classified(self) -> tuple[int, int]:
        """Numbers of classified images and of batches."""
        values = {sample.name: sample.value for sample in _samples(self.batches)}
        return int(values["redefense_batch_images_sum"]), int(
            values["redefense_batch_images_count"]
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _samples(metric: Counter | Histogram) -> list[Sample]:
    return [sample for family in metric.collect() for sample in family.samples]
