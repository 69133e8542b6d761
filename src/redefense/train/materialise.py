"""Write the members of a PS-RED run out as plain networks."""

from pathlib import Path

from redefense.config import settings_of, to_json
from redefense.ensembles import Independent
from redefense.ensembles.configs import ENSEMBLES, HyperConfig
from redefense.errors import ConfigError
from redefense.runtime.files import write_text
from redefense.train.checkpoint import save
from redefense.train.loading import find_final, load_checkpoint, resolve


def materialise(path: Path, out: Path) -> None:
    """Make `out` a finished run of independent members that compute what those of `path` do.

    Evaluations are not copied: they belong to the run they were made of.

    Raises:
        ConfigError: if the members of `path` are plain already, or `out` is not free.
        CheckpointError: if there is no trained run at `path`.
        WriteError: if `out` cannot be written.
    """
    checkpoint = find_final(path)
    run, kind, _ = resolve(checkpoint.run)
    if not isinstance(kind, HyperConfig):
        raise ConfigError(f"the members of {path} are plain networks already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; choose another --out")
    written = load_checkpoint(checkpoint)
    plain = Independent([written.member(m) for m in range(written.num_members)], written.mixture)
    run = run.model_copy(update={"ensemble": settings_of(ENSEMBLES, kind.plain())})
    write_text(out / "run.json", to_json(run))
    state = {"data": checkpoint.state["data"]}
    save(out / "final", run=run, weights=plain.state_dict(), state=state)
