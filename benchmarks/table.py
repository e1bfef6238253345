"""Print what was measured: ``python -m benchmarks.table quality [SET ...]``, ``guards``, or ``speed``, also drawn.

Of each method and comparison, the newest version counts.
"""

import json
import statistics
import sys

import pandas as pd

from benchmarks import guards, pairs, protocol, quality

#: The scores that are shown; `benchmarks/README.md` says what they mean.
SCORES = ("bio", "batch", "total", "fair batch", "fair total", "iLISI", "CiLISI", "PCR within types", "scGraph")


def quality_table(name: str) -> pd.DataFrame:
    """Return a row per method: mean (and spread over seeds) of scores, likelihoods and seconds."""
    runs = [json.loads(path.read_text()) for path in sorted(quality.RESULTS.glob(f"{name}--*.json"))]
    rows = {}
    for method in quality.METHODS:
        mine = [run for run in runs if run["method"] == method]
        if not mine:
            continue
        newest = max(mine, key=lambda run: run["measured"])["version"]
        mine = [run for run in mine if run["version"] == newest]
        scores = [run.get("scores", {}) for run in mine]
        columns = {part: [score.get(part) for score in scores] for part in SCORES}
        columns["test ELBO"] = [run.get("test_elbo") for run in mine]
        columns["marginal"] = [run.get("marginal") for run in mine]
        columns["seconds"] = [run.get("seconds") for run in mine]
        columns["epochs"] = [run.get("epochs") for run in mine]
        rows[f"{method} {newest}"] = {"seeds": len(mine)} | {part: shown(part, v) for part, v in columns.items()}
    table = pd.DataFrame(rows).T
    return table.loc[:, (table != "").any()]


def shown(part: str, values: list) -> str:
    digits = {"test ELBO": 1, "marginal": 1, "seconds": 0, "epochs": 0}.get(part, 3)
    series = pd.Series(values, dtype=float).dropna()
    if series.empty:
        return ""
    spread = f" ± {series.std():.{digits}f}" if len(series) > 1 else ""
    return f"{series.mean():.{digits}f}{spread}"


def speed_table() -> pd.DataFrame:
    """Return a row per figure: medians of both packages, and median and range of the ratio within a round."""
    newest = {}
    results = [json.loads(path.read_text()) for path in pairs.RESULTS.glob("*.json")]
    for result in sorted(results, key=lambda result: result["measured"]):
        newest[result["task"], result["label"], result["data"]] = result
    rows = []
    for result in newest.values():
        ours, theirs = (result["rounds"][package] for package in pairs.PACKAGES)
        for figure in result["ratios"]:
            ratios = [b[figure] / a[figure] for a, b in zip(ours, theirs, strict=True)]
            rows.append(
                {
                    "measured": f"{result['task']} {result['label']}".strip() + f": {figure}",
                    "data": result["data"],
                    "scgen": round(statistics.median(one[figure] for one in ours), 3),
                    "scvi-tools": round(statistics.median(one[figure] for one in theirs), 3),
                    "ratio": round(statistics.median(ratios), 2),
                    "least": round(min(ratios), 2),
                    "most": round(max(ratios), 2),
                    "rounds": len(ratios),
                    "version": result["versions"]["scgen"],
                }
            )
    return pd.DataFrame(rows)


def guards_table() -> pd.DataFrame:
    """Return a row per guard and figure, a column per method: mean and spread over seeds, or pairs of them."""
    newest = {}
    results = [json.loads(path.read_text()) for path in guards.FOLDER.glob("*.json")]
    for result in sorted(results, key=lambda result: result["measured"]):
        newest[result["method"]] = result
    columns = {
        f"{method} {result['version']}": {
            (guard, figure): shown(figure, values)
            for guard, figures in result["guards"].items()
            for figure, values in figures.items()
        }
        for method, result in newest.items()
    }
    return pd.DataFrame(columns).sort_index()


def draw(table: pd.DataFrame, path) -> None:
    """Draw how many times as long, or as much memory, scvi-tools takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = table[~table["measured"].str.contains(": first|: epochs|import and class|imports: peak")].sort_values(
        "ratio"
    )
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.27 * len(table)), layout="constrained")
    range_ = table["ratio"] - table["least"], table["most"] - table["ratio"]
    axes.errorbar(table["ratio"], table["measured"] + ", " + table["data"], xerr=range_, fmt="o", capsize=3)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200], [1, 2, 5, 10, 20, 50, 100, 200])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set(
        xlabel="scvi-tools / scgen: median, and range of the rounds", title="How many times as much scvi-tools takes"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if sys.argv[1:] == ["speed"]:
        found = speed_table()
        print(found.to_string())
        draw(found, pairs.RESULTS.parent / "speed.png")
    elif sys.argv[1:] == ["guards"]:
        print(guards_table().to_string())
    elif sys.argv[1:2] == ["quality"]:
        for one in sys.argv[2:] or protocol.SETS:
            print(f"\n{one}\n{quality_table(one).to_string()}")
    else:
        sys.exit(__doc__)
