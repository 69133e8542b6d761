"""Summary of a bundle: files, sizes, and the accuracy lost by quantisation."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redefense.errors import DataError
from redefense.export import runner


@dataclass(frozen=True, slots=True)
class Summary:
    """Sizes and accuracies of a bundle.

    Attributes:
        bundle: its folder.
        kind: "plain" or "compact".
        precision: "fp32" or "int8".
        num_members: M.
        member_bytes: bytes of all members on disk.
        total_bytes: bytes of the bundle.
        quantisation: the record of `config.json`; None for fp32.
    """

    bundle: str
    kind: str
    precision: str
    num_members: int
    member_bytes: int
    total_bytes: int
    quantisation: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{self.num_members} members, {self.kind}, {self.precision}: {self.member_bytes:,} "
            f"bytes ({self.total_bytes:,} with probes and records)"
        ]
        accuracy = (self.quantisation or {}).get("accuracy")
        if accuracy:
            count = accuracy["num_images"]
            lines.append(f"accuracy on {count} images of the validation split, fp32 -> int8:")
            pairs = zip(accuracy["fp32"], accuracy["int8"], strict=True)
            lines += [
                f"  member {m}: {100 * before:.2f} % -> {100 * after:.2f} %"
                for m, (before, after) in enumerate(pairs)
            ]
        return lines


def summary(path: Path) -> Summary:
    """The summary of a bundle.

    Raises:
        DataError: if there is no bundle at `path`, or its records are damaged.
    """
    try:
        bundle = runner.open_bundle(path)
    except runner.BundleError as error:
        raise DataError(f"{path}: {error}") from None
    config = bundle.config
    compact = config.get("compact") or {}
    weights = {*config["members"], compact.get("template"), compact.get("weights")}
    sizes = {name: int(entry["bytes"]) for name, entry in bundle.files.items()}
    return Summary(
        bundle=str(path),
        kind=config["kind"],
        precision=config["precision"],
        num_members=bundle.num_members,
        member_bytes=sum(size for name, size in sizes.items() if name in weights),
        total_bytes=sum(sizes.values()),
        quantisation=config.get("quantisation"),
    )
