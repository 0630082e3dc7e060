"""Whether commands that are killed and called again leave whole files, and come to what they would have come to.

    python benchmarks/kills.py              # 12 kills of each command, 24 minutes on two busy cores; writes results/kills.json
    python benchmarks/kills.py --kills 2 --only repair infect

``infect``, ``zoo build``, ``train``, ``benchmark`` and ``repair`` get SIGKILL again and again, half of the times at any moment,
half while files are written, and half of them with their worker processes. Then each is run to its end and compared with one
that was never killed: weights and pictures bit for bit, cells and figures apart from seconds and memory; of the page of a repair,
which has a date, it is only seen that it is whole. Linux.
"""

import argparse
import csv
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from backdoor_gym.benchmarking import Result
from backdoor_gym.files.tensors import read_tensors
from backdoor_gym.models import digits_family, family
from backdoor_gym.writing import PREFIX, as_json, write_text

RESULT = Path(__file__).parent / "results" / "kills.json"
VERSIONS = ("backdoor-gym", "torch", "numpy", "safetensors", "stable-baselines3", "filelock")
#: Exit codes of what came to its end: a network that cannot be repaired is a result, too.
DONE = (0, 3)
#: What differs between any two runs.
TIMES = ("seconds", "peak_memory")
SMALL = ("--width", "4", "--arch-option", "blocks=2", "--epochs")


@dataclass
class Tally:
    """What was done to a command, and what came of it."""

    kills: int = 0
    while_writing: int = 0
    run_to_the_end: int = 0
    wrong: list[str] = field(default_factory=list)


def quickest(count: int) -> list[str]:
    """The smallest networks of the family."""
    recipes = {seed: digits_family.recipe("digits-train", seed) for seed in range(1000)}
    size = {seed: recipe.width * recipe.blocks for seed, recipe in recipes.items()}
    return [f"digits-train/{seed}" for seed in sorted(size, key=lambda seed: size[seed])[:count]]


def commands(infected: str, clean: str) -> dict[str, list[str]]:
    return {
        "infect": ["infect", *SMALL, "6", "--out", "m.safetensors"],
        "zoo build": ["zoo", "build", *quickest(2), "--jobs", "2"],
        "train": [
            "train", "--infected", infected, "--infected", clean, "--validate", infected, "--steps", "288", "--envs", "2",
            "--warm-epochs", "1", "--jobs", "1", "--out", "p.safetensors",
        ],
        "benchmark": [
            "benchmark", "--infected", f"{infected},{clean}", "--policies", "clp,bnp,random", "--budgets", "own,0.02",
            "--jobs", "2", "--max-steps", "4", "--out", "b",
        ],
        "repair": ["repair", infected, "--out", "r"],
    }  # fmt: skip


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Begin a command in a folder and in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "backdoor_gym.cli", *command, "--quiet"],
        cwd=folder,
        env={**os.environ, family.CACHE_VARIABLE: str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(command: list[str], folder: Path) -> str:
    """Run a command to its end; what went wrong, "" if nothing."""
    process = start(command, folder)
    said = process.communicate()[1].decode(errors="replace").strip()
    # What was killed after its last file was there has nothing left to do.
    ended = process.returncode == 2 and "exists already" in said
    return "" if process.returncode in DONE or ended else f"exit code {process.returncode}: {said[-300:]}"


def wait_for_group(group: int) -> None:
    """Workers end with the process that began them."""
    with suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            time.sleep(0.02)


def writing(folder: Path) -> set[str]:
    """Temporary folders that there are now."""
    with suppress(OSError):  # they come and go
        return {path.name for path in folder.rglob(f"{PREFIX}*")}
    return set()


def watch(process: subprocess.Popen[bytes], folder: Path, until: float, temporaries: int | None = None) -> int:
    """Wait until that time, the end of the process, or so many temporary folders; how many were seen."""
    seen: set[str] = set()
    known = writing(folder)
    while time.monotonic() < until and process.poll() is None:
        seen |= writing(folder) - known
        if temporaries is not None and len(seen) >= temporaries:
            break
        time.sleep(0.0005)
    return len(seen)


def whole_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a run by their names, without locks and what is in temporary folders."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.suffix != ".lock" and PREFIX not in name:
            yield name, path


def contents(path: Path, unfinished: bool = False) -> Any:
    """What is in a file, without what differs between runs; an error where it is not whole."""
    if path.name == "cells.jsonl":
        text = path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1 if unfinished else None].splitlines()  # a line may be half written
        cells = [asdict(Result.from_json(line)) for line in lines]
        return sorted(json.dumps({key: value for key, value in cell.items() if key not in TIMES}) for cell in cells)
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as sheet:
            rows = list(csv.DictReader(sheet))
        return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    if path.suffix == ".json":
        return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key not in TIMES}
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return picture.size, picture.convert("RGBA").tobytes()
    if path.suffix == ".html":
        if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
            raise ValueError("the page has no end")
        return None  # its figures are those of the JSON beside it, and it has a date
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("the table has no end")
        return [line.split("|")[:8] for line in text.splitlines()]  # seconds and memory stand last
    read_tensors(path)  # of networks, policies and checkpoints; it compares the checksum
    return path.read_bytes()


def broken(folder: Path) -> list[str]:
    """Files that are not whole."""
    wrong = []
    for name, path in whole_files(folder):
        try:
            contents(path, unfinished=True)
        except Exception as error:  # whatever is wrong with a file
            wrong.append(f"{name} is not whole ({type(error).__name__}: {error})"[:300])
    return wrong


def lineage(
    command: list[str], root: Path, most: int, seconds: float, files: int, draw: random.Random, tally: Tally
) -> Path:
    """Kill a command up to so many times, one after the other in the same folder, and run it to its end; the folder."""
    folder = root / f"run-{tally.run_to_the_end}"
    folder.mkdir()
    for _ in range(most):
        process = start(command, folder)
        now, while_writing = time.monotonic(), draw.random() < 0.5
        if while_writing:
            watch(process, folder, now + 3 * seconds, draw.randint(1, files))
            time.sleep(draw.uniform(0, 0.01))
        else:
            watch(process, folder, now + draw.uniform(0.2, 1) * seconds)
        killed = process.poll() is None
        with suppress(ProcessLookupError):
            (os.killpg if draw.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
        wait_for_group(process.pid)
        tally.kills += killed
        tally.while_writing += killed and bool(writing(folder))
        tally.wrong += broken(folder)
        if not killed:
            break
    problem = finish(command, folder)
    tally.wrong += [problem] if problem else []
    tally.run_to_the_end += 1
    return folder


def compare(folder: Path, reference: Path) -> list[str]:
    """In what a run that was killed differs from one that was not."""
    wrong = [f"{name} was left" for name in sorted(writing(folder))]
    mine, theirs = dict(whole_files(folder)), dict(whole_files(reference))
    wrong += [f"{name} is in one of them alone" for name in sorted(mine.keys() ^ theirs.keys())]
    for name in sorted(mine.keys() & theirs.keys()):
        if contents(mine[name]) != contents(theirs[name]):
            wrong.append(f"{name} differs")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12, help="of each command, at least")
    parser.add_argument("--only", nargs="+", help="these commands; nothing is recorded")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    draw, tallies, began = random.Random(arguments.seed), dict[str, Tally](), time.monotonic()
    names: dict[str, list[str]] = {}
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        models = [str(root / f"{attack}.safetensors") for attack in ("badnets", "clean")]
        for attack, path in zip(("badnets", "clean"), models, strict=True):
            problem = finish(["infect", *SMALL, "4", "--attack", attack, "--out", path], root)
            if problem:
                raise SystemExit(problem)
        for name, command in commands(*models).items():
            if arguments.only and name not in arguments.only:
                continue
            here, tally = root / name.replace(" ", "-"), Tally()
            reference = here / "reference"
            reference.mkdir(parents=True)
            process, start_time = start(command, reference), time.monotonic()
            files = max(1, watch(process, reference, start_time + 600))
            process.communicate()
            seconds = time.monotonic() - start_time
            if process.returncode not in DONE:
                raise SystemExit(f"{name} itself ends with {process.returncode}")
            while tally.kills < arguments.kills and len(tally.wrong) < 20:
                most = min(draw.randint(1, 4), arguments.kills - tally.kills)
                folder = lineage(command, here, most, seconds, files, draw, tally)
                tally.wrong += compare(folder, reference)
            names[name] = [name for name, _ in whole_files(reference)]
            tallies[name] = tally
            print(
                f"{name}: {tally.kills} kills, {tally.while_writing} of them in a file; {tally.wrong or 'all the same'}",
                flush=True,
            )
    wrong = [f"{name}: {problem}" for name, tally in tallies.items() for problem in tally.wrong]
    if not arguments.only:
        record = {
            "seed": arguments.seed,
            "kills": sum(tally.kills for tally in tallies.values()),
            "minutes": round((time.monotonic() - began) / 60, 1),
            "wrong": wrong,
            "commands": {
                name: {
                    "kills": tally.kills,
                    "kills while a file was written": tally.while_writing,
                    "run to the end and compared": tally.run_to_the_end,
                    "files compared": names[name],
                }
                for name, tally in tallies.items()
            },
            "versions": {name: version(name) for name in VERSIONS} | {"Python": platform.python_version()},
        }
        write_text(RESULT, as_json(record, indent=1) + "\n")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
