"""What the processes of a mesh do in tests, and how they are started."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # the first optimizer would import it in every process, for a second
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from defence_tools import ensemble as small_ensemble
from redefense.bench.scaling import launch
from redefense.config import Run, StartConfig, ThreatConfig, override, read_run
from redefense.data import Dataset
from redefense.defences import Adversary, Defence
from redefense.defences.adp import ADP
from redefense.defences.at import AdversarialTraining
from redefense.defences.gal import GAL
from redefense.defences.mrboost import MRBoost
from redefense.defences.red import RED
from redefense.defences.trs import TRS
from redefense.defences.vanilla import Vanilla
from redefense.ensembles import Ensemble, Independent
from redefense.errors import DataError, RedefenseError
from redefense.evaluation.cells import Subject
from redefense.evaluation.run import run_suite
from redefense.evaluation.suite import Suite
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.runtime.mesh import Mesh, Tally, arranged
from redefense.runtime.workers import workers
from redefense.train import experiment as run_module
from redefense.train.exchange import spread_over
from redefense.train.experiment import train
from redefense.types import Batch

MESHES = ("2x2", "4x1", "1x4")
STEPS: dict[str, Defence] = {
    "vanilla": Vanilla(),
    "at": AdversarialTraining(variant="independent"),
    "adp": ADP(adversarial_training=True),
    "gal": GAL(),
    "trs-printed": TRS(preset="printed"),
    "trs-released": TRS(preset="released"),
    "red-printed": RED(preset="printed"),
    "red-released": RED(preset="released", adversarial_training=True),
    "red": RED(similarity=10.0, lipschitz=10.0),
    "red-finite": RED(differentiate="finite"),
    "mrboost": MRBoost(),
}


def step_ensemble(dtype: torch.dtype) -> Independent:
    return small_ensemble(4, "digits-cnn").to(dtype)


def share(mesh: Mesh, dtype: torch.dtype) -> Batch:
    """This row's share of a batch of 16."""
    x = torch.rand(16, 1, 4, 4, dtype=torch.float64, generator=stream(5)).to(dtype)
    rows = slice(mesh.row, None, mesh.shape[0])
    return Batch(x[rows], (torch.arange(16) % 10)[rows], torch.arange(16)[rows])


def given(x: Tensor) -> Tensor:
    """Examples that depend on the image alone, so that rounding cannot turn a step around."""
    return (x + 0.03 * (40 * x).sin()).clamp(0, 1)


@contextmanager
def given_examples() -> Iterator[None]:
    craft, search = Adversary.craft, TRS.search
    Adversary.craft = lambda self, victim, x, y, rng, **settings: given(x)  # type: ignore[method-assign]
    TRS.search = lambda self, ensemble, x, y, eps, rng: given(x)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Adversary.craft, TRS.search = craft, search  # type: ignore[method-assign]


def one_step(
    defence: Defence, mesh: Mesh, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of all members after one step, in the first row, and the logged terms."""
    members: Ensemble = step_ensemble(dtype)
    members.train()
    summed: dict[str, Tensor] = {}
    with spread_over(mesh, members):
        for part in defence.loss(members, share(mesh, dtype), stream(0)):
            part.total.backward()
            for name, value in part.terms.items():
                summed[name] = summed.get(name, torch.zeros(())) + value
        own = {p for m in mesh.own(4) for p in members.parameters_of(m)}
        mesh.average([p for p in members.parameters() if p in own])
        terms = Tally(mesh)(summed)
    grads = {n: p.grad for n, p in members.named_parameters() if p in own and p.grad is not None}
    # statistics have moved alike in all processes of a column
    here = tuple(f"members.{m}." for m in mesh.own(4))
    moved = {n: b for n, b in members.named_buffers() if n.startswith(here)}
    return {**grads, **moved}, terms


def steps(folder: Path) -> None:
    """One step of each method on each mesh."""
    dist.init_process_group("gloo")
    for shape in MESHES:
        mesh = arranged(shape, torch.device("cpu"))
        for name, defence in STEPS.items():
            # all methods on the first mesh, or on one that they can be spread over
            if name != "red" and shape != ("2x2" if defence.spreads else "4x1"):
                continue
            for dtype in (torch.float64, torch.float32) if name == "red" else (torch.float64,):
                with given_examples():
                    grads, terms = one_step(defence, mesh, dtype)
                keep(folder / f"{shape}-{name}-{dtype}", mesh, grads, terms)
    grads, terms = one_step(STEPS["red"], mesh, torch.float32)
    keep(folder / f"{MESHES[-1]}-crafted", mesh, grads, terms)
    dist.destroy_process_group()


def keep(path: Path, mesh: Mesh, grads: dict[str, Tensor], terms: dict[str, float]) -> None:
    record = {"terms": terms, "traffic": dict(mesh.traffic)}
    grads = mesh.collect(grads)
    mesh.traffic.clear()
    if mesh.first:
        save_file(grads, path.with_name(path.name + ".safetensors"))
        path.with_name(path.name + ".json").write_text(json.dumps(record))


def tiny(method: str, *changes: str) -> Run:
    """A short run on a few digits, of two optimizer steps an epoch."""
    return override(
        recipe(f"digits-{method}"),
        ["epochs=2", "batch_size=64", "data.images=128", "ensemble.num_members=3",
         "ensemble.width=4", *changes],
    )  # fmt: skip


def runs(folder: Path) -> None:
    """Whole trainings, and what is refused, in a group that exists already."""
    dist.init_process_group("gloo")
    rank, said = dist.get_rank(), {}

    def attempt(name: str, run: Run, mesh: str, *, resume: bool = False) -> None:
        try:
            found = train(run, folder / name, mesh=mesh, quiet=True, resume=resume)
        except RedefenseError as error:
            said[name] = [type(error).__name__, str(error), error.reported]
            return
        x = torch.rand(4, 1, 8, 8, generator=stream(6))
        with torch.no_grad():  # a copy writes its kernels anew
            if not torch.equal(found.member_logits(x), copy.deepcopy(found).member_logits(x)):
                said[name] = ["stale", "answers with kernels of other weights", False]

    few = "defence.adversary.steps=3"
    attempt("rows", tiny("red", few), "2x1")
    attempt("rows-again", tiny("red", few), "2x1")
    attempt("columns", tiny("red", few), "1x2")
    attempt("written", tiny("ps-red", "ensemble.width=16", "ensemble.unit=16", "epochs=1"), "1x2")
    wide = ("ensemble.width=16", "epochs=1")
    attempt("plain", tiny("vanilla", *wide), "2x1")
    begun = StartConfig(path=str(folder / "plain"))
    warm = tiny("ps-red", *wide, "ensemble.unit=16").model_copy(update={"start": begun})
    attempt("warm", warm, "1x2")
    attempt("resumed", read_run(folder / "resumed" / "run.json"), "2x1", resume=True)
    boosted = ("epochs=2", "ensemble.num_members=2", "defence.refit_images=64", few)
    attempt("barre", tiny("barre", *boosted), "2x1")
    attempt("dverge", tiny("dverge"), "2x1")
    attempt("dverge-columns", tiny("dverge"), "1x2")
    attempt("odd", tiny("vanilla", "batch_size=62"), "2x1")
    attempt("many", tiny("vanilla"), "4x1")
    attempt("few", tiny("vanilla", "ensemble.num_members=1"), "1x2")
    attempt("shared", tiny("ps-red", "ensemble.shared=true", "ensemble.width=16"), "1x2")

    def unreadable(spec: str, *, download: bool, progress: bool) -> Dataset:
        raise DataError("no data in the second process")

    if rank == 1:
        vars(run_module)["load_dataset"] = unreadable
    attempt("elsewhere", tiny("vanilla"), "2x1")
    sharded(said)
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def sharded(said: dict[str, list[object]]) -> None:
    from torch.distributed.fsdp import fully_shard

    members = step_ensemble(torch.float32)
    fully_shard(members.member(0))
    try:
        with spread_over(arranged("2x1", torch.device("cpu")), members):
            pass
    except RedefenseError as error:
        said["sharded"] = [type(error).__name__, str(error), error.reported]


def evaluation(store: Path, suite: str) -> None:
    """Two linear networks under a suite, and what is stored of it but for dates and times."""
    rng = stream(7)
    x, y = torch.rand(230, 1, 2, 2, generator=rng), torch.randint(0, 3, (230,), generator=rng)
    members = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2)]
    for p in (p for member in members for p in member.parameters()):
        p.data.normal_(generator=rng)
    with workers() as team:
        subject = Subject(
            Independent(members).eval(), x, y, np.arange(230), "made up", workers=team
        )
        plan = Suite.model_validate_json(suite)
        data = run_suite(subject, plan, ThreatConfig(eps=0.1), store=store).data
        for key in ("date", "commit"):  # somebody may commit in between
            data["provenance"].pop(key)
        for cell in data["cells"]:
            cell.pop("seconds")
        if team.first:
            store.with_suffix(".json").write_text(json.dumps(data))


def work(count: int, what: Callable[[Path], None], folder: Path) -> None:
    """Do one of the functions above in `count` processes; all must succeed."""
    folder.mkdir(parents=True, exist_ok=True)
    assert launch(count, what, folder, timeout=400.0) == [0] * count
