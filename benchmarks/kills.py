"""Does a training survive being killed? Prints one line a kill; exits 1 if any bit is lost.

`kill -9` at random moments of a small BARRE run that saves at every step: within epochs, within
saves, within the refit of the mixture at the end of a stage. After each kill the run goes on; when
it is through, its weights must be those of a run that nothing stopped. Then the same with a disk
that is full (a small tmpfs where we may mount one, else a limit on the size of files), and, with
`--torchrun`, with a process of two that is killed and comes back by `torchrun --max-restarts`.

    python benchmarks/kills.py --kills 20 --seed 0 --torchrun
"""

import argparse
import ctypes
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from redefense.config import Run, override, to_json
from redefense.defences import barre
from redefense.errors import RedefenseError
from redefense.recipes import recipe
from redefense.train import checkpoint, loop, session
from redefense.train.checkpoint import latest
from redefense.train.experiment import train
from redefense.train.loading import load

RUN = override(
    recipe("digits-barre"),
    ["epochs=6", "batch_size=64", "data.images=128", "ensemble.width=4",
     "ensemble.num_members=3", "defence.refit_images=128", "defence.refit_steps=2"],
)  # fmt: skip


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def same_bits(a: Path, b: Path) -> bool:
    found, expected = load(a).state_dict(), load(b).state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


def child(out: Path, told: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """A new process that goes on with the run and notes in `told` what it is doing."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        session.SAVE_INTERVAL = 0.0
        prepare()
        _note_places(told)
        train(RUN, out, resume=True, quiet=True)
        code = 0
    except RedefenseError as error:
        code = error.code
    finally:
        os._exit(code)


def _note_places(told: Path) -> None:
    """Have the process write whether it trains, saves or refits."""
    file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def within(place: str, work: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: object, **settings: object) -> object:
            os.pwrite(file, f"{place:8}".encode(), 0)
            try:
                return work(*args, **settings)
            finally:
                os.pwrite(file, b"training", 0)

        return noted

    os.pwrite(file, b"starting", 0)
    vars(loop)["take_step"] = within("training", loop.take_step)
    vars(checkpoint)["_flush"] = within("saving", checkpoint._flush)
    vars(checkpoint)["_tensors"] = within("saving", checkpoint._tensors)
    type.__setattr__(barre.BARRE, "refit", within("refit", barre.BARRE.refit))


def killed(scratch: Path, whole: Path, seconds: float, kills: int, seed: int) -> bool:
    """`kills` deaths, spread over as many runs as it takes."""
    rng, deaths, runs, sound = random.Random(seed), 0, 0, True
    told = scratch / "told"
    while deaths < kills:
        out = scratch / f"killed-{runs}"
        while not (out / "final").is_dir():
            told.write_text("starting")
            process = child(out, told)
            # the last one of a run is let through
            if deaths < kills:
                time.sleep(rng.uniform(0.0, 0.6 * seconds))
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if os.WIFSIGNALED(status):
                deaths += 1
                kept = latest(out / "checkpoints", lambda line: say(f"    {line}"))
                at = kept.state["position"] if kept is not None else "no checkpoint yet"
                say(f"kill {deaths:2} of run {runs} while {told.read_text().strip()}: {at}")
        alike = same_bits(out, whole)
        say(f"run {runs} went through: {'the same bits' if alike else 'OTHER BITS'}")
        sound, runs = sound and alike, runs + 1
    return sound


def full_disk(scratch: Path, whole: Path) -> bool:
    """A disk that fills up at a save: an error, the checkpoint before, and the same bits after."""
    room = sum(p.stat().st_size for p in (whole / "final").iterdir())
    place, told = scratch / "small", scratch / "told"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    # room for two checkpoints with their optimizer, not for a third
    options = f"size={5 * room}".encode()
    mounted = libc.mount(b"none", str(place).encode(), b"tmpfs", 0, options) == 0

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room // 2, room // 2))

    out = place / "run"
    try:
        process = child(out, told, (lambda: None) if mounted else limited)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        kept = latest(out / "checkpoints", lambda line: say(f"    {line}"))
        how = "tmpfs" if mounted else "limit on files"
        say(f"full disk ({how}): exit {code}, kept {kept.path.name if kept else 'nothing'}")
        if mounted:
            libc.mount(b"none", str(place).encode(), b"tmpfs", 32, b"size=64m")  # remount, larger
        train(RUN, out, resume=True, quiet=True)
        alike = same_bits(out, whole)
    finally:
        if mounted:
            libc.umount2(str(place).encode(), 2)
    say(f"full disk: {'the same bits' if alike else 'OTHER BITS'} once there is room")
    return alike and code == 3


def restarted(scratch: Path, seed: int) -> bool:
    """`torchrun --max-restarts` brings two processes back after one of them was killed."""
    rng, record = random.Random(seed), scratch / "run.json"
    run: Run = override(RUN, ["epochs=30"])
    record.write_text(to_json(run))

    def command(out: Path) -> list[str]:
        return [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", "3", "-m", "redefense", "train", str(record), "--out", str(out),
            "--resume", "--quiet",
        ]  # fmt: skip

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(scratch / "two"), env=environment, capture_output=True, check=True)
    out = scratch / "restarted"
    process = subprocess.Popen(command(out), env=environment, stderr=subprocess.DEVNULL)
    while not (out / "checkpoints").is_dir():
        time.sleep(0.05)
    time.sleep(rng.uniform(0.0, 1.0))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    at = latest(out / "checkpoints", lambda line: say(f"    {line}"))
    code = process.wait(timeout=600)
    alike = code == 0 and same_bits(out, scratch / "two")
    where = at.state["position"] if at is not None else "no checkpoint yet"
    say(
        f"torchrun: one of two killed at {where}, exit {code} after restart, "
        f"{'the same bits' if alike else 'OTHER BITS'}"
    )
    return alike


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", action="store_true", help="kill one of two processes too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        whole, told = scratch / "whole", scratch / "told"
        begun = time.monotonic()
        os.waitpid(child(whole, told), 0)
        seconds = time.monotonic() - begun
        say(f"a run takes {seconds:.1f} s; {os.cpu_count()} cores, torch {torch.__version__}")
        sound = [killed(scratch, whole, seconds, options.kills, options.seed)]
        sound.append(full_disk(scratch, whole))
        if options.torchrun:
            sound.append(restarted(scratch, options.seed))
    say("nothing was lost" if all(sound) else "SOMETHING WAS LOST")
    return 0 if all(sound) else 1


if __name__ == "__main__":
    raise SystemExit(main())
