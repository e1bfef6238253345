"""Seconds of an epoch beside other busy processes, and under a quota: ``python -m benchmarks.busy [ROUNDS]``.

4,000 simulated cells x 2,000 genes, the defaults of both packages, each figure from a fresh process, in turns. A busy
process is an endless loop in Python. The quota is one of a control group, which takes root. On a machine of two cores,
a fair share beside one busy process is two thirds of the machine, beside two it is half.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from benchmarks.pairs import PACKAGES, RESULTS, commit, once, refuse_if_busy

DATA = "4000x2000"
#: scvi-tools trains fewer epochs: beside busy processes it takes seconds for each.
EPOCHS = {"scgen": "12", "scvi-tools": "3"}
CONDITIONS = ("quiet", "1 busy process", "2 busy processes", "quota of one core")


@contextmanager
def beside(n: int) -> Iterator[None]:
    """Within the block, let so many processes be busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextmanager
def quota_of_one() -> Iterator[None]:
    """Within the block, let this process and its children have one core's time."""
    own = Path("/proc/self/cgroup").read_text()
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():  # version 2
        home = Path("/sys/fs/cgroup", next(line for line in own.splitlines() if line.startswith("0::"))[3:].lstrip("/"))
        limits = {"cpu.max": "100000 100000"}
    else:
        path = next(line.split(":", 2)[2] for line in own.splitlines() if "cpu" in line.split(":")[1].split(","))
        home = Path("/sys/fs/cgroup/cpu", path.lstrip("/"))
        limits = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}
    group = home / "scgen-quota"
    group.mkdir(exist_ok=True)
    try:
        for name, limit in limits.items():
            (group / name).write_text(limit)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def under(condition: str):
    """Return the context of a condition."""
    return quota_of_one() if condition.startswith("quota") else beside(CONDITIONS.index(condition))


def main(rounds: int) -> None:
    path = RESULTS / f"busy--{DATA}--{commit()}--{os.cpu_count()}cores.json"
    once("scgen", "load", DATA, [])
    found = {condition: {package: [] for package in PACKAGES} for condition in CONDITIONS}
    for _ in range(rounds):
        for condition in CONDITIONS:
            for package in PACKAGES:
                refuse_if_busy()
                with under(condition):
                    found[condition][package].append(once(package, "step", DATA, [f"epochs={EPOCHS[package]}"]))
    versions = {"scgen": commit(), "scvi-tools": version("scvi-tools"), "torch": version("torch")}
    result = {"measured": time.strftime("%Y-%m-%dT%H:%M:%S"), "versions": versions, "rounds": found}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def show(result: dict) -> None:
    """Print a row for each condition: the median of each package, of how many times its quiet time, and their ratio."""
    print(f"{'':20s}" + "".join(f"{package:>24s}" for package in PACKAGES) + f"{'ratio':>10s}")
    seconds = {
        condition: {package: [one["seconds"] for one in rounds] for package, rounds in of.items()}
        for condition, of in result["rounds"].items()
    }
    for condition, of in seconds.items():
        cells = ""
        for package in PACKAGES:
            slower = [now / quiet for now, quiet in zip(of[package], seconds["quiet"][package], strict=True)]
            cells += f"{statistics.median(of[package]):12.3f} s ({statistics.median(slower):4.1f} x)".rjust(24)
        ratio = statistics.median(b / a for a, b in zip(of["scgen"], of["scvi-tools"], strict=True))
        print(f"{condition:20s}{cells}{ratio:10.1f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
