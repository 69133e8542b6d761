"""Benchmarks: bench."""

from typing import Annotated

import typer

from redefense.commands.options import DataSpec, Device, Json, Results, Set, echo, resolve_run, show
from redefense.limits import one_of

Rounds = Annotated[int, typer.Option(min=1, help="Number of timings per measurement.")]
Kind = Annotated[str, typer.Option(help="Kind of ensemble: independent or hyper.")]


def bench_attacks(
    images: Annotated[int, typer.Option(min=1, help="Number of held-out images.")] = 256,
    model: Annotated[
        str, typer.Option(help="Name of a network; by default one for the data.")
    ] = "auto",
    data: DataSpec = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    attack: Annotated[
        list[str] | None, typer.Option(help="Only this attack; may be repeated.")
    ] = None,
    train_images: Annotated[
        int | None, typer.Option(min=1, help="Training images per epoch; all by default.")
    ] = None,
    single: Annotated[
        bool, typer.Option("--single", help="Skip the table of a randomized ensemble.")
    ] = False,
    as_json: Json = False,
    quiet: Results = False,
) -> None:
    """Compare attacks with TorchAttacks: accuracy, passes and seconds."""
    from redefense.bench.attack_tables import tables
    from redefense.bench.attacks import run

    result = run(
        images=images, model=model, data=data, seed=seed, train_images=train_images,
        single=single, names=attack, log=lambda line: echo(line, quiet or as_json),
    )  # fmt: skip
    show(result, tables(result), as_json=as_json)


def bench_inference(
    model: Annotated[str, typer.Option(help="Architecture of the members.")] = "resnet18",
    members: Annotated[int, typer.Option(min=1, help="Number of members.")] = 8,
    ensemble: Kind = "independent",
    rounds: Rounds = 5,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Results = False,
) -> None:
    """Latency of the drawn member and of the average.

    Both are relative to a single member.
    """
    from redefense.bench.inference import run, table

    result = run(
        model=model, num_members=members, ensemble=ensemble, rounds=rounds, device=device,
        log=lambda line: echo(line, quiet),
    )  # fmt: skip
    show(result, table(result), as_json=as_json)


def bench_train(
    model: Annotated[
        list[str] | None, typer.Option(help="Architecture of the members; may be repeated.")
    ] = None,
    members: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of members; may be repeated.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Batch size.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the training adversary.")] = 10,
    rounds: Rounds = 2,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Results = False,
) -> None:
    """Time of a RED step.

    It compares the authors' joint graph, this engine, and the lower bound in FLOPs.
    """
    from redefense.bench.train import run, table

    result = run(
        models=model or ("resnet8", "resnet20"), members=members or (3, 8), batch=batch,
        steps=steps, rounds=rounds, device=device, log=lambda line: echo(line, quiet),
    )  # fmt: skip
    show(result, table(result), as_json=as_json)


def bench_memory(
    model: Annotated[str, typer.Option(help="Architecture of the members.")] = "resnet8",
    members: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of members; may be repeated; by default 1 to 12."),
    ] = None,
    ensemble: Kind = "independent",
    batch: Annotated[int, typer.Option(min=2, help="Batch size.")] = 64,
    differentiate: Annotated[
        str, typer.Option(help="How to differentiate the input gradients: exact or finite.")
    ] = "exact",
    precision: Annotated[str, typer.Option(help="Precision: bf16 or fp32.")] = "bf16",
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Results = False,
) -> None:
    """Peak memory of a RED step by number of members.

    The joint graph is measured, too.
    """
    # before the import of torch, so that a mistake is answered at once
    one_of("--precision", precision, ("bf16", "fp32"))
    from redefense.bench.memory import MEMBERS, run, table

    result = run(
        model=model, members=members or MEMBERS, ensemble=ensemble, batch=batch,
        differentiate=differentiate,
        # checked above; written so that its type is narrowed
        precision="bf16" if precision == "bf16" else "fp32",
        device=device, log=lambda line: echo(line, quiet),
    )  # fmt: skip
    show(result, table(result), as_json=as_json)


def bench_scaling(
    what: Annotated[str, typer.Argument(metavar="RECIPE|RUN.json", help="What to train.")] = (
        "digits-red"
    ),
    changes: Set = None,
    processes: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of processes; may be repeated; by default 1, 2 and 4."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps that are timed.")] = 3,
    as_json: Json = False,
    quiet: Results = False,
) -> None:
    """Train on every mesh of gloo processes.

    It prints the differences from one process, and the bytes that are exchanged.
    """
    settings = resolve_run(what, changes, None, None)
    from redefense.bench.scaling import run, table

    result = run(
        settings=settings, counts=processes or (1, 2, 4), steps=steps,
        log=lambda line: echo(line, quiet),
    )  # fmt: skip
    show(result, table(result), as_json=as_json)
