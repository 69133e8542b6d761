"""Conventions of model hubs and of other attack libraries."""

from redefense.hub.adapters import to_art, to_foolbox, to_robustbench
from redefense.hub.pretrained import from_pretrained, push_to_hub, save_pretrained

__all__ = [
    "from_pretrained",
    "push_to_hub",
    "save_pretrained",
    "to_art",
    "to_foolbox",
    "to_robustbench",
]
