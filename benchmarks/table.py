"""Print the quality table of a set from the results kept: ``python -m benchmarks.table [SET]``."""

import json
import sys

import pandas as pd

from benchmarks import quality


def table(name: str) -> pd.DataFrame:
    """Return a row per method: mean (and spread over seeds) of scores, test ELBO and seconds, of its newest version."""
    runs = [json.loads(path.read_text()) for path in sorted(quality.RESULTS.glob(f"{name}--*.json"))]
    rows = {}
    for method in quality.METHODS:
        mine = [run for run in runs if run["method"] == method]
        if not mine:
            continue
        newest = max(mine, key=lambda run: run["date"])["version"]
        mine = [run for run in mine if run["version"] == newest]
        columns = {part: [run["scores"][part] for run in mine] for part in ("bio", "batch", "total")}
        columns["iLISI"] = [run["scores"]["iLISI"] for run in mine]
        columns["test ELBO"] = [run["test_elbo"] for run in mine]
        columns["seconds"] = [run["seconds"] for run in mine]
        columns["epochs"] = [run.get("epochs") for run in mine]
        rows[f"{method} {newest}"] = {"seeds": len(mine)} | {part: shown(part, v) for part, v in columns.items()}
    return pd.DataFrame(rows).T


def shown(part: str, values: list) -> str:
    if values[0] is None:
        return ""
    digits = {"test ELBO": 1, "seconds": 0, "epochs": 0}.get(part, 3)
    series = pd.Series(values, dtype=float)
    spread = f" ± {series.std():.{digits}f}" if len(values) > 1 else ""
    return f"{series.mean():.{digits}f}{spread}"


if __name__ == "__main__":
    print(table(sys.argv[1] if len(sys.argv) > 1 else "pbmc_10k_5k_cite").to_string())
