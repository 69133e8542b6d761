"""AutoAttack: APGD, targeted APGD, FAB and Square, one after the other (Croce & Hein, 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from redefense.attacks.apgd import APGD, APGDT
from redefense.attacks.base import OFFICIAL, RED_RELEASED, TORCHATTACKS, Attack, Best, Presets
from redefense.attacks.fab import FAB
from redefense.attacks.square import OwnDraws, Square
from redefense.limits import at_least
from redefense.rng import ImageStreams
from redefense.threat import Threat
from redefense.types import Images, Labels, Victim, correct


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """Four attacks of different kinds, each on the images that the ones before did not fool.

    Every image gets the best point that any of them found. A preset returns clean images where its
    last query found no success, and is meant for comparison with published numbers only.

    Attributes:
        steps: gradients per run of APGD, APGD-T and FAB.
        queries: of Square.
        early_stop: stop on images that are far from being fooled; Square stops only on those where
            attacks by gradients gained about as much as it did.
        preset: published settings.
    """

    steps: int = 100
    queries: int = 5000
    early_stop: bool = False
    preset: str | None = None

    summary: ClassVar[str] = "APGD, targeted APGD, FAB and Square, each on the remaining images"
    presets: ClassVar[Presets] = {
        TORCHATTACKS: {"steps": 10, "queries": 5000, "early_stop": False},
        OFFICIAL: {"steps": 100, "queries": 5000, "early_stop": False},
        RED_RELEASED: {"steps": 10, "queries": 200, "early_stop": False},
    }

    def check(self) -> None:
        at_least(1, steps=self.steps, queries=self.queries)

    @property
    def least_classes(self) -> int:
        return 2 if self.preset is None else APGDT().least_classes

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        if self.preset is not None:
            return self._published(victim, x, y, threat, rng)
        best = Best.start(x)
        with torch.no_grad():
            # the targeted DLR needs a fourth class: with fewer the plain margin takes its place
            few = victim(x[:1]).shape[1] < APGDT().least_classes
        early = self.early_stop
        for attack in (
            APGD(steps=self.steps, early_stop=early),
            APGDT(
                steps=self.steps,
                loss="targeted_margin" if few else "targeted_dlr",
                early_stop=early,
            ),
            FAB(steps=self.steps, early_stop=early),
            Square(queries=self.queries),
        ):
            rows = (best.correct > 0).nonzero().flatten()
            if len(rows) == 0:
                break
            if early and isinstance(attack, Square):
                draws = OwnDraws(ImageStreams.of(rng, x[rows], y[rows]))
                point = attack.search(
                    victim, x[rows], y[rows], threat, draws, by_gradients=best.value[rows]
                )
            else:
                point = attack.perturb(victim, x[rows], y[rows], threat, rng=rng)
            best.judge(victim, rows, point, y[rows])
        return best.x

    def _published(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, rng: Generator
    ) -> Images:
        square = Square(queries=self.queries, rescale=self.preset != OFFICIAL)
        parts = (
            APGD(preset=self.preset).perturb,
            APGDT(preset=self.preset).perturb,
            FAB(preset=self.preset).perturb,
            square.published,
        )
        x_adv, state = x.clone(), rng.get_state()
        rows = torch.arange(len(x), device=x.device)
        for part in parts:
            rng.set_state(state)  # in the library every part seeds the generator again
            point = part(victim, x[rows], y[rows], threat, rng=rng)
            fooled = ~correct(victim(point), y[rows])
            x_adv[rows[fooled]] = point[fooled]
            rows = rows[~fooled]
            if len(rows) == 0:
                break
        return x_adv
