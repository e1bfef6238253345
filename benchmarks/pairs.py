"""Measure scgen beside scvi-tools: each figure in a fresh process, in turns, on a quiet machine.

The files under ``benchmarks/results/speed`` are keyed by what was measured, our commit and the number of cores; what is
there is not measured again. Ratios are of one round, and their median is what counts: the machine's own speed varies
more between rounds than within one.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "speed"
PACKAGES = ("scgen", "scvi-tools")


def busy_share(seconds: float = 1.0) -> float:
    """Return the share of all cores' time that went to work within some seconds."""

    def jiffies():
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    work, total = jiffies()
    time.sleep(seconds)
    later_work, later_total = jiffies()
    return (later_work - work) / max(later_total - total, 1)


def commit() -> str:
    """Return the commit; a result of uncommitted code could not be told from the next one's."""
    command = ["git", "describe", "--always", "--dirty"]
    name = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    if name.endswith("-dirty"):
        sys.exit("there are changes that are not committed: commit them first, so that the result says what it is of.")
    return name


def refuse_if_busy() -> None:
    if (share := busy_share()) > 0.1:
        sys.exit(f"the machine is busy ({share:.0%} of its cores): a figure taken now would be worth nothing.")


def once(package: str, task: str, data: str, options: list[str]) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.tasks", package, task, data]
    done = subprocess.run(command + options, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(
    task: str,
    data: str,
    ours: tuple[str, ...] = (),
    theirs: tuple[str, ...] = (),
    rounds: int = 5,
    label: str = "",
) -> dict:
    """Return the kept result of one comparison, on data as `tasks.cells` names them; measure it if there is none."""
    name = "--".join([task, label or "default", data, commit(), f"{os.cpu_count()}cores"])
    path = RESULTS / f"{name}.json"
    if not path.exists():
        once("scgen", "load", data, [])
        found = {package: [] for package in PACKAGES}
        for _ in range(rounds):
            refuse_if_busy()
            for package, options in zip(PACKAGES, (ours, theirs), strict=True):
                found[package].append(once(package, task, data, list(options)))
        result = {
            "task": task,
            "label": label,
            "data": data,
            "options": {"scgen": ours, "scvi-tools": theirs},
            "measured": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "versions": {"scgen": commit(), "scvi-tools": version("scvi-tools"), "torch": version("torch")},
            "rounds": found,
            "ratios": {
                figure: statistics.median(
                    b[figure] / a[figure] for a, b in zip(found["scgen"], found["scvi-tools"], strict=True)
                )
                for figure in found["scgen"][0]
            },
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(path.read_text())
    show(result)
    return result


def show(result: dict) -> None:
    """Print the medians of both packages and the median ratio."""
    for figure, ratio in result["ratios"].items():
        ours, theirs = (statistics.median(one[figure] for one in result["rounds"][package]) for package in PACKAGES)
        what = f"{result['task']} {result['label']} {result['data']}: {figure}"
        print(f"{what:70s} {ours:9.3f} {theirs:9.3f}   ratio {ratio:.2f}", flush=True)
