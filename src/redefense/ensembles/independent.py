"""Ensembles of separate networks."""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeGuard

from torch import Tensor, nn

from redefense.ensembles.base import Ensemble, device_of
from redefense.errors import InputError
from redefense.networks import Function

_OF_ENSEMBLES: Final = ("num_members", "mixture", "logits_of", "member_logits")


class Independent(Ensemble):
    """M separate networks.

    Args:
        members: networks from images in [0, 1] to logits; may differ in architecture.
        mixture: M probabilities, uniform unless given.

    Raises:
        InputError: for members that are not a list of networks.
        ConfigError: without members, or for a mixture that is not M probabilities with sum 1.
    """

    def __init__(
        self, members: Sequence[nn.Module], mixture: Sequence[float] | Tensor | None = None
    ) -> None:
        is_list = isinstance(members, Sequence | nn.ModuleList)
        if not is_list or not all(isinstance(m, nn.Module) for m in members):
            raise _no_networks(members)
        super().__init__(len(members), mixture)
        self.members = nn.ModuleList(members)
        # the members may be on an accelerator already
        self.mixture = self.mixture.to(device_of(self.members))

    def member(self, m: int) -> nn.Module:
        """Member m itself, sharing its weights with the ensemble."""
        return self.members[m]


def as_ensemble(model: object) -> Ensemble:
    """Convert to an ensemble: a network becomes one member, a list independent members.

    An ensemble is returned unchanged; a plain function from images to logits counts as a network.

    Raises:
        InputError: for anything else, and for a network with members that is not an `Ensemble`: as
            one network it would answer at random and its accuracy would be overestimated.
    """
    if isinstance(model, Ensemble):
        return model
    if isinstance(model, nn.ModuleList):
        model = list(model)
    if isinstance(model, nn.Module):
        # a single such name may be a coincidence, as a network's own `mixture`
        found = [name for name in _OF_ENSEMBLES if hasattr(model, name)]
        if len(found) > 1:
            raise InputError(
                f"{type(model).__name__} has {' and '.join(found)} as ensembles do, but does not "
                "derive from redefense.ensembles.Ensemble: derive it from there, or give [model] "
                "if it is one network"
            )
        return Independent([model])
    if _is_function(model):
        return Independent([Function(model)])
    if isinstance(model, Sequence) and model:
        members = [Function(m) if _is_function(m) else m for m in model]
        if all(isinstance(m, nn.Module) for m in members):
            return Independent(members)
    raise _no_networks(model)


def _is_function(model: object) -> TypeGuard[Callable[[Tensor], Any]]:
    # a class is callable, too, but its instance was meant
    return callable(model) and not isinstance(model, nn.Module | type)


def _no_networks(model: object) -> InputError:
    got = type(model).__name__
    if isinstance(model, type):
        got = f"the class {model.__name__}: create an instance of it"
    if isinstance(model, nn.Module):
        got += " where a list was expected: pass a list"
    if isinstance(model, list | tuple):
        odd = (i for i, member in enumerate(model) if not isinstance(member, nn.Module))
        at = next(odd, None)
        got = f"an empty {got}" if at is None else f"{type(model[at]).__name__} as element {at}"
    return InputError(
        f"expected a network (torch.nn.Module), an ensemble or a list of networks, got {got}"
    )
