"""A bundle in memory: one inference session per member, every file checked against its hash."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from redefense.errors import ConfigError, DataError, first_line
from redefense.export import runner
from redefense.export.runner import sessions

Floats = NDArray[np.float32]
INPUT: Final = "images"  # name of the input of every member
_ASKED: Final = 4  # repeated queries of a member when it is loaded
_ROUNDING: Final = 1e-3  # tolerance relative to the largest logit, for differences of kernels
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Model:
    """All members of a bundle, ready to run.

    Args:
        folder: the bundle, or a link to it.
        name: name in the routes; the folder's by default.
        threads: threads per member; None: one per core.
        trust: check of the bundle's manifest, e.g. `export.signing.trust_in`.

    Attributes:
        name: name in the routes of the protocol.
        shape: shape of one image, (1 or 3 channels, H, W).
        mixture: (M,) probabilities.

    Raises:
        ConfigError: the name does not fit into a route.
        DataError: the bundle is damaged, not trusted, or no classifier of pictures.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str | None = None,
        threads: int | None = None,
        trust: runner.Trust | None = None,
    ) -> None:
        if folder.is_symlink():  # resolved once, since the link may change
            folder = folder.resolve()
        try:
            self._bundle = runner.open_bundle(folder, trust)
            self.shape = self._bundle.shape
            self.mixture: NDArray[np.float64] = self._bundle.mixture
            self.classes = tuple(self._bundle.classes)
            self._alone = _by_batch(self._bundle.config)
            self._sessions = [
                _session(self._bundle.member(m), m, threads)
                for m in range(self._bundle.num_members)
            ]
        except runner.BundleError as error:
            message = str(error)
            raise DataError(
                message if message.startswith(f"{folder} ") else f"{folder}: {message}"
            ) from None
        self.name = name if name is not None else _fitting(folder)
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"--name must be letters, digits, dots, _ and -, got {self.name}")
        if self.shape[0] not in (1, 3):
            raise DataError(f"{folder}: images have {self.shape[0]} channels; 1 or 3 are served")
        self._refuse_draws(folder)

    def _refuse_draws(self, folder: Path) -> None:
        """Refuse members that draw random numbers: the draw is among members, not in them."""
        image = np.linspace(0, 1, self.pixels, dtype=np.float32).reshape(1, *self.shape)
        for m in range(self.num_members):
            # deterministic kernels may still differ by rounding between runs, hence a tolerance
            first, *again = (self.logits_of(m, image) for _ in range(_ASKED))
            allowed = _ROUNDING * max(1.0, float(np.abs(first).max()))
            if any(float(np.abs(other - first).max()) > allowed for other in again):
                raise DataError(
                    f"{folder}: member {m} answers the same image in different ways; members that "
                    "draw random numbers are not served: export networks without a random layer"
                )

    @property
    def num_members(self) -> int:
        return len(self._sessions)

    @property
    def pixels(self) -> int:
        """Values of one image."""
        return int(np.prod(self.shape))

    def logits_of(self, m: int, images: Floats) -> Floats:
        """(N, classes) logits of member m for images (N, C, H, W) in [0, 1]."""
        session = self._sessions[m]
        parts = _parts(images) if self._alone else [images]
        return np.concatenate([sessions.logits_of(session, part) for part in parts])

    def classify(
        self, images: Floats, drawn: NDArray[np.int64], *, grouped: bool = False
    ) -> Floats:
        """(N, classes) logits where member drawn[n] answers image n.

        One run per image, whatever was drawn; `grouped` runs the images of a member together, which
        is faster if fewer members were drawn.
        """
        if grouped:
            return sessions.classify(self._sessions, images, drawn)
        pairs = zip(_parts(images), drawn, strict=True)
        return np.concatenate([sessions.logits_of(self._sessions[m], part) for part, m in pairs])

    def check_grouped(self, grouped: bool) -> None:
        """Check that images of one member can be computed together.

        Raises:
            ConfigError: if they cannot.
        """
        if grouped and self._alone:
            raise ConfigError(
                "--grouped: answers of members quantised with --calibration 0 depend on the images "
                "that are computed together"
            )
        if grouped and self.num_members == 1:
            raise ConfigError(
                "--grouped needs at least two members; serve a single one with --mode member"
            )

    def probes(self) -> Floats:
        """The bundle's probe images (64, C, H, W), for measurements."""
        try:
            return self._bundle.probes()[0]
        except runner.BundleError as error:
            raise DataError(f"{self._bundle.path}: {error}") from None

    def warm_up(self, batches: Sequence[int]) -> None:
        """Warm up: run every member at these batch sizes, so that no first answer is slow.

        Raises:
            DataError: a member does not give one finite row of logits per image.
        """
        for m in range(self.num_members):
            for size in batches:
                try:
                    logits = self.logits_of(m, np.full((size, *self.shape), 0.5, dtype=np.float32))
                except Exception as error:  # noqa: BLE001 - onnxruntime's share no narrower class
                    raise DataError(f"member {m} cannot run: {_line(error)}") from None
                if logits.shape != (size, len(self.classes)) or not np.isfinite(logits).all():
                    raise DataError(
                        f"member {m} must give {size} x {len(self.classes)} finite logits, "
                        f"got shape {logits.shape}"
                    )


def _parts(images: Floats) -> list[Floats]:
    """Batches of one."""
    return list(images[:, None])


def _by_batch(config: Mapping[str, Any]) -> bool:
    """Whether members scale activations by the range of a batch, as dynamic quantisation does.

    Answers would then depend on the other images of the same member and reveal which images share
    one.
    """
    how = config.get("quantisation")
    static = isinstance(how, dict) and how.get("method") == "static"
    return config["precision"] == "int8" and not static


def _fitting(folder: Path) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name)[:64]
    return cleaned if _NAME.fullmatch(cleaned) else "model"


def _line(error: Exception) -> str:
    return first_line(error) or type(error).__name__


def _session(content: bytes, m: int, threads: int | None) -> Any:
    import onnxruntime  # after `sessions`, which disables its telemetry

    options = onnxruntime.SessionOptions()
    # errors only: its warnings about graphs would fill the server log
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    # members share the cores: waiting threads must not spin
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime's share no narrower class
        raise DataError(f"onnxruntime cannot load member {m}: {_line(error)}") from None
