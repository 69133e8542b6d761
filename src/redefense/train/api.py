"""`redefense.train`: from objects or names to a trained run directory."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redefense.config import OptimConfig, Run, ThreatConfig, default_folder, parse_run, settings_of
from redefense.data import DATASETS, Dataset
from redefense.data.given import as_source
from redefense.data.source import materialise, strict
from redefense.defences import DEFENCES, Defence
from redefense.ensembles import Ensemble, Independent
from redefense.ensembles.configs import ENSEMBLES, EnsembleConfig
from redefense.errors import ConfigError, InputError
from redefense.models import MODELS
from redefense.networks import check_values
from redefense.plugins import GIVEN, Registry
from redefense.recipes import RECIPES, recipe
from redefense.threat import Threat, checked_threat
from redefense.train.experiment import train as train_run


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A trained run; `redefense.load` and `redefense.evaluate` accept it.

    Attributes:
        ensemble: in evaluation mode.
        config: all settings of the training; `redefense train` can repeat it.
        path: the run directory.
    """

    ensemble: Ensemble = field(repr=False)  # its networks would fill pages
    config: Run
    path: Path

    def __fspath__(self) -> str:
        return str(self.path)


def train(
    ensemble: Any,
    defence: Any = None,
    data: Any = None,
    *,
    out: str | Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    optim: OptimConfig | Mapping[str, Any] | None = None,
    threat: Threat | None = None,
    seed: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    quiet: bool = False,
) -> TrainedRun:
    """Train an ensemble with a defence, and write a run directory.

    Args:
        ensemble: a recipe's name or a `Run`, which the other arguments change; or the members: a
            model's name, settings such as `{"model": "resnet8", "num_members": 3}`, such as
            `redefense.ensembles.configs.IndependentConfig()`, a network, a list of networks, or an
            `Independent`. Networks are copied, and trained from the weights that they have.
        defence: a name, settings such as `{"name": "red", "similarity": 5.0}`, or a `Defence`.
        data: a specification, a `redefense.data.Dataset`, or ((x_train, y_train),
            (x_test, y_test)); the test images are never read by the training.
        out: the run directory; `runs/RECIPE` by default.
        epochs: passes over the training images; default: those of the recipe or `Run`, else 10.
        batch_size: images of a step; default: that of the recipe or `Run`, else 128.
        optim: an `OptimConfig`, or settings that replace those of the recipe or `Run`, else of
            `OptimConfig`.
        threat: norm and radius against which the run is evaluated; the radius of a defence's own
            adversary is its setting `adversary.eps`.
        seed: seed of all random numbers; default: that of the recipe or `Run`, else 0.
        device: torch device.
        resume: continue an interrupted run.
        quiet: show no progress on stderr.

    Raises:
        ConfigError: for an invalid name, object or setting.
        InputError: for an ensemble that cannot be trained as an object.
        ModelError: if a member does not accept the images, or has not the classes of the data.
        DataError: if the data cannot be read.
        TrainingError: if the loss is not finite or a parameter gets no gradient.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    if threat is not None:
        checked_threat(threat)
    base = _base(ensemble)
    settings: dict[str, Any] = (
        {"ensemble": _members(ensemble), "epochs": 10, "batch_size": 128}
        if base is None
        else base.model_dump(mode="json")
    )
    if defence is not None:
        settings["defence"] = _defence(defence)
    if data is not None:
        settings["data"] = settings.get("data", {}) | {"spec": _data(data)}
    if missing := [key for key in ("defence", "data") if key not in settings]:
        raise ConfigError(f"train needs {' and '.join(missing)}, unless a recipe or a Run has them")
    given = optim.model_dump(mode="json") if isinstance(optim, OptimConfig) else optim
    changed = {
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "optim": None if given is None else settings.get("optim", {}) | dict(given),
        "threat": threat and ThreatConfig.of(threat.norm, threat.eps).model_dump(mode="json"),
    }
    settings |= {key: value for key, value in changed.items() if value is not None}
    run = parse_run(settings)
    path = Path(out) if out is not None else default_folder(run)
    trained = train_run(run, path, device=device, resume=resume, quiet=quiet)
    assert trained.origin is not None
    return TrainedRun(trained, trained.origin.run, path)


def _base(value: Any) -> Run | None:
    if isinstance(value, Run):
        return value
    return recipe(value) if isinstance(value, str) and value in RECIPES else None


def _members(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        if value not in MODELS and not value.startswith("timm:"):
            raise ConfigError(f"{value!r} names neither a recipe nor a model")
        return {"name": "independent", "model": value}
    if isinstance(value, Mapping):
        return {"name": "independent", **value}
    if isinstance(value, EnsembleConfig) and type(value) in ENSEMBLES.values():
        return settings_of(ENSEMBLES, value)
    if isinstance(value, Independent):
        if len(set(value.shares())) > 1:
            raise InputError(
                f"training begins with equal probabilities, got the mixture {value.shares()}: give "
                "the list of networks, and call set_mixture on the trained ensemble"
            )
        nets = [value.member(m) for m in range(value.num_members)]
    elif isinstance(value, Ensemble):
        raise InputError(
            f"a {type(value).__name__} cannot be trained as an object: give its settings, such as "
            "{'name': 'hyper', 'model': 'resnet18', 'num_members': 3}"
        )
    elif isinstance(value, nn.Module):
        nets = [value]
    elif isinstance(value, Sequence) and value and all(isinstance(n, nn.Module) for n in value):
        nets = list(value)
    else:
        raise InputError(
            "the ensemble must be a recipe, a Run, a model's name, settings, a network or a list "
            f"of networks, got {value!r}"
        )
    for net in nets:
        check_values(net)
    if any(isinstance(part, torch.jit.ScriptModule) for net in nets for part in net.modules()):
        raise InputError("a scripted or traced network cannot be trained: pass the network itself")
    # named by content, so that --resume finds equal networks again and refuses others
    name = f"{GIVEN}{weights_digest(nets)}"
    _adopt(MODELS, name, nets, type(nets[0]))
    return {"name": "independent", "model": name, "num_members": len(nets)}


def weights_digest(nets: Sequence[nn.Module], digits: int = 12) -> str:
    """Hash of networks, up to 64 digits: equal for equal layers and weights."""
    digest = hashlib.sha256()
    for net in nets:
        # layers without weights, such as activations, are only in the repr
        digest.update(repr(net).encode())
        for key, value in net.state_dict().items():
            if not isinstance(value, torch.Tensor):  # metadata of quantised layers
                digest.update(f"{key} {value!r}".encode())
                continue
            raw = value.detach().cpu()
            digest.update(f"{key} {raw.dtype} {tuple(raw.shape)}".encode())
            raw = raw.int_repr() if raw.is_quantized else raw
            # numpy does not support every dtype, but it does bytes
            digest.update(raw.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:digits]


def _defence(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping):
        return dict(value)
    cls = value if isinstance(value, type) else type(value)
    if not issubclass(cls, Defence):
        raise ConfigError(f"the defence must be a name, settings or a Defence, got {value!r}")
    # own and added ones have a name already; installed plug-ins are not loaded to find out
    if cls not in (*DEFENCES.own.values(), *DEFENCES.added().values()):
        _adopt(DEFENCES, cls.__name__, cls, cls)
    return settings_of(DEFENCES, value() if isinstance(value, type) else value)


def _data(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Dataset):
        found = value
    else:
        found = materialise(as_source("given", value, strict), lambda count: None)
    name = f"{GIVEN}{found.checksum()[:12]}"
    _adopt(DATASETS, name, lambda: found, Dataset)
    return name


def _adopt(names: Registry[Any], name: str, value: Any, of: type) -> None:
    """Register a given object, so that the record of the run can name it."""
    names.add(name, names.accepted(name, value), {"module": of.__module__})
