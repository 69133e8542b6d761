"""Weights published elsewhere: reads files of tensors without executing code, and maps names.

A file is read by safetensors, or by `torch.load(weights_only=True)`. Tensors are matched by name:
this package's names, or those of the residual networks of most repositories: torchvision's
(`conv1`, `layer1.0.conv2`, `layer2.0.downsample.0`, `fc`) and the ResNet-20s of the repositories of
ADP, GAL, DVERGE and TRS (`shortcut`, `linear`). Tensors of other shapes, and missing ones, are not
changed. If the file stores the normalisation of its images (as advertorch's `normalizer.mean` and
`normalizer.std`, or RobustBench's `mu` and `sigma`), the network takes it over.
"""

import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from redefense.errors import DataError, first_line
from redefense.models.layers import Normalise

State = Mapping[str, Tensor]

WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Keys of the state dict in checkpoints that also hold epochs, optimizers and the like."""

_MEMBER: Final = re.compile(
    r"^(?:module\.)?(?:(?:models|members|nets|ensemble)\.|(?:models?|members?|nets?)_?)(\d+)(?:\.|$)"
)
_PREFIX: Final = re.compile(r"^(?:module|model|net|1)\.")
"""Prefixes of a network's names: DataParallel, wrappers, a preceding normalisation."""

_MEANS, _DEVIATIONS = ("mean", "means", "mu"), ("std", "stds", "sds", "sigma")
"""Last parts of the names under which a normalisation is stored."""

_NAMES: Final = (
    (re.compile(r"^conv1\.(.+)"), r"stem.\1"),
    (re.compile(r"^bn1\.(.+)"), r"stem_bn.\1"),
    (re.compile(r"^layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.(.+)"), r"blocks.\1,\2.shortcut.\3"),
    (re.compile(r"^layer(\d+)\.(\d+)\.(.+)"), r"blocks.\1,\2.\3"),
    (re.compile(r"^(?:fc|linear)\.(.+)"), r"classifier.\1"),
)
_BLOCK: Final = re.compile(r"^blocks\.(\d+),(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Fitted:
    """Result of loading a published state.

    Attributes:
        taken: tensors of the network that were loaded.
        fresh: tensors of the network without a match of equal shape.
        unused: tensors of the state without a match.
        normalised: whether the normalisation of the images was loaded, too.
    """

    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    normalised: bool


def read_states(path: Path) -> list[State]:
    """The networks that a file holds, one or the members of an ensemble in their order.

    Raises:
        DataError: if it cannot be read, would execute code, or holds no network.
    """
    members = _members(_unwrapped(_tensors_of(path)))
    if not members:
        raise DataError(f"{path} holds no tensors by name, so no network can start from it")
    return members


def fit(net: nn.Module, state: State) -> Fitted:
    """Load the matching tensors of a state into a network."""
    own = net.state_dict()
    found = {ours: theirs for theirs, ours in _renamed(state).items()}
    taken = {n: found[n] for n, t in own.items() if n in found and state[found[n]].shape == t.shape}
    # not strict: what is missing is reported as `fresh`
    net.load_state_dict({name: state[theirs] for name, theirs in taken.items()}, strict=False)
    settings = ("normalise.mean", "normalise.std")
    counts = "num_batches_tracked"
    normalisation = _normalise(net, state)
    used = {*taken.values(), *normalisation}
    return Fitted(
        tuple(n for n in taken if n not in settings),
        tuple(n for n in own if n not in taken and n not in settings and counts not in n),
        tuple(n for n in state if n not in used and counts not in n),
        bool(normalisation),
    )


def _normalise(net: nn.Module, state: State) -> tuple[str, ...]:
    """Load a stored normalisation, and return the names of its two tensors, if there is one."""
    layers = [part for part in net.modules() if isinstance(part, Normalise)]
    for name, mean in state.items():
        at, dot, last = name.rpartition(".")
        others = (f"{at}{dot}{other}" for other in _DEVIATIONS) if last in _MEANS else ()
        for other in others:
            std = state.get(other)
            if std is None or len(layers) != 1:
                continue
            size = layers[0].mean.numel()
            # a tensor called mean may be of something else, such as a batch norm
            if mean.numel() == std.numel() == size and bool((std > 0).all()):
                layers[0].mean.copy_(mean.detach().flatten())
                layers[0].std.copy_(std.detach().flatten())
                return name, other
    return ()


def _tensors_of(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, in files that are none
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} is not read: it holds more than tensors, and to open it could run code. Save "
            "the network's state_dict() alone, or as safetensors"
        ) from None
    except Exception as error:  # noqa: BLE001 - torch raises many types for other files
        first = first_line(error) or "?"
        raise DataError(f"cannot read weights from {path}: {first}") from None


def _unwrapped(data: Any) -> Any:
    while isinstance(data, Mapping):
        inner = next((data[name] for name in WRAPPERS if isinstance(data.get(name), Mapping)), None)
        if inner is None:
            break
        data = inner
    return data


def _members(data: Any) -> list[State]:
    """States by member; a single one if the names contain no members."""
    if not isinstance(data, Mapping):
        return []
    flat: dict[str, Tensor] = {}
    for name, value in data.items():
        if isinstance(value, Tensor):
            flat[str(name)] = value
        elif isinstance(value, Mapping):
            flat |= {f"{name}.{k}": t for k, t in value.items() if isinstance(t, Tensor)}
    places = {name: _MEMBER.match(name) for name in flat}
    if not any(places.values()):
        return [_plain(flat)] if flat else []
    members: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        if (place := places[name]) is not None:
            members.setdefault(int(place[1]), {})[name[place.end() :]] = value
    return [_plain(members[m]) for m in sorted(members)]


def _plain(state: State) -> State:
    """Remove the common prefix of all names except those of a preceding normalisation."""
    # wrappers nest, as in module.model.conv1
    while True:
        names = [name for name in state if not _of_normalisation(name)]
        if not names or not all(_PREFIX.match(name) for name in names):
            return state
        state = {_PREFIX.sub("", name, count=1): value for name, value in state.items()}


def _of_normalisation(name: str) -> bool:
    """Whether the tensor may belong to a layer before the network, which has its own prefix."""
    return name.startswith("0.") or name.rpartition(".")[2] in (*_MEANS, *_DEVIATIONS)


def _renamed(state: State) -> dict[str, str]:
    """This package's name of each tensor."""
    found = {}
    for name in state:
        found[name] = next((p.sub(to, name) for p, to in _NAMES if p.match(name)), name)
    blocks = sorted({(int(b[1]), int(b[2])) for n in found.values() if (b := _BLOCK.match(n))})
    for name, ours in found.items():
        if b := _BLOCK.match(ours):
            found[name] = f"blocks.{blocks.index((int(b[1]), int(b[2])))}.{b[3]}"
    return found
