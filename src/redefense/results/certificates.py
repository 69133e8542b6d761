"""Certificates that `redefense certify` stored with a run. Needs no torch."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from redefense.results.records import Stored, read_json, valid
from redefense.runtime.folders import CERTIFICATES, EVALUATION


class Level(BaseModel):
    """Certified accuracies at one L2 radius, in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    radius: float
    single: float
    vote: float
    sigma: float
    draws: int
    confidence: float


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore")

    data: dict[str, object]
    clean: float
    certificates: tuple[Level, ...] = Field(min_length=1)


def certificates_of(suites: Iterable[Stored]) -> list[tuple[str, Level]]:
    """(images, level) of all certificates of the suites' runs.

    Raises:
        DataError: if a file is damaged.
    """
    # once for each run, however many suites it has
    homes = dict.fromkeys(home for stored in suites if (home := _home(stored)) is not None)
    found = []
    for path in (p for home in homes for p in sorted((home / CERTIFICATES).glob("*.json"))):
        document = valid(_Document, read_json(path), f"{path} is not a valid certificate")
        data = document.data
        message = f"{data.get('num_images')} {data.get('split')} images of {data.get('name')}"
        found += [(message, level) for level in document.certificates]
    return found


def _home(stored: Stored) -> Path | None:
    """The run's directory."""
    # a file that was given alone has no run around it
    file = stored.file
    return None if file is None or file.parent.name != EVALUATION else file.parent.parent
