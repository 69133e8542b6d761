"""How large a run's ensemble is."""

from pathlib import Path

from redefense.kinds import Kind
from redefense.train.run import Signature, find_final

_SHAPES = {"digits": (10, (1, 8, 8)), "cifar10": (10, (3, 32, 32)), "tiny": (200, (3, 64, 64))}


def count_parameters(what: str, kind: Kind) -> dict[str, int]:
    """Trainable parameters of all members, and of one, of a run directory or a recipe."""
    if Path(what).is_dir():
        signature = Signature.stored(find_final(Path(what)).state)
        num_classes, shape = len(signature.classes), signature.shape
    else:
        family = next((f for f in _SHAPES if what.startswith(f)), "cifar10")
        num_classes, shape = _SHAPES[family]
    ensemble = kind.build(num_classes=num_classes, shape=shape, seed=0)
    per_member = [
        sum(p.numel() for p in ensemble.parameters_of(m)) for m in range(kind.num_members)
    ]
    return {
        "members": kind.num_members,
        "parameters": sum(p.numel() for p in ensemble.parameters()),
        "parameters of a member": per_member[0],
    }
