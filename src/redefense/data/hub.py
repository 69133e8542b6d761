"""Downloads sets from the Hugging Face hub, at a pinned revision, on request only.

The digests were published by several independent users of the same revisions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from redefense.errors import DataError, need, one_line
from redefense.runtime.files import sha256_of


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSet:
    """A data set on the hub.

    Attributes:
        repo: its name there.
        revision: commit, which never changes.
        files: SHA-256 of each file that is needed.
    """

    repo: str
    revision: str
    files: Mapping[str, str]


HUB: Final[Mapping[str, HubSet]] = MappingProxyType(
    {
        "cifar10": HubSet(
            repo="uoft-cs/cifar10",
            revision="0b2714987fa478483af9968de7c934580d0bb9a2",
            files={
                "plain_text/train-00000-of-00001.parquet": (
                    "8428b53a88a11ac374111006708df51469e315a22ac6d66470afd9c78d2ae883"
                ),
                "plain_text/test-00000-of-00001.parquet": (
                    "841389e6f2d64f28bf17310e430aebac20ec3ba611a3c5e231dc93c645ce84de"
                ),
            },
        ),
        "cifar100": HubSet(
            repo="uoft-cs/cifar100",
            revision="aadb3af77e9048adbea6b47c21a81e47dd092ae5",
            files={
                "cifar100/train-00000-of-00001.parquet": (
                    "694865d6b990e234804f01268586c41e88bcbbb75e20858432c05ad4081aca23"
                ),
                "cifar100/test-00000-of-00001.parquet": (
                    "98776c529bb146a9c791229df74a5cf076be9b43d82dbbd334b6a7788d73dc68"
                ),
            },
        ),
    }
)


def fetch(kind: str, path: Path) -> None:
    """Download a set into the folder `path`, unless it already has other contents.

    Interrupted downloads are resumed; a file with another digest is removed.

    Raises:
        DataError: if the set is not on our list, huggingface_hub is missing, the hub cannot be
            reached or sends something else.
    """
    ours = path / ".cache" / "huggingface"  # metadata of the hub's client
    if path.exists() and not (path.is_dir() and (ours.is_dir() or not any(path.iterdir()))):
        return
    if kind not in HUB:
        raise DataError(f"{kind} cannot be downloaded; choose from {', '.join(HUB)}")
    client = need("huggingface_hub", "--download", extra="hub", error=DataError)
    what = HUB[kind]
    for name, digest in what.files.items():
        try:
            client.hf_hub_download(
                what.repo, name, repo_type="dataset", revision=what.revision, local_dir=path
            )
        except (OSError, ValueError) as error:  # the client's own errors derive from these
            raise DataError(f"{what.repo}: {name}: download failed ({one_line(error)})") from error
        if (found := sha256_of(path / name)) != digest:
            # removed, so that no later call without --download reads it
            (path / name).unlink()
            raise DataError(f"{path / name}: SHA-256 {found}, expected {digest}; removed")
