"""Seconds of an epoch for each cell, as cells and genes grow, beside scvi-tools: ``python -m benchmarks.growth``."""

import statistics

from benchmarks.pairs import measure

if __name__ == "__main__":
    for n_genes in (2000, 10_000):
        for n_cells in (5000, 20_000, 80_000) if n_genes == 2000 else (5000, 20_000):
            result = measure("step", f"{n_cells}x{n_genes}", ("epochs=3",), ("epochs=3",), label="3-epochs")
            seconds = statistics.median(one["seconds"] for one in result["rounds"]["scgen"])
            print(f"  {1e6 * seconds / n_cells:.1f} microseconds a cell")
