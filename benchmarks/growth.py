"""Seconds of an epoch for each cell, as cells and genes grow, beside scvi-tools: ``python -m benchmarks.growth``."""

import statistics

from benchmarks.step import epoch

if __name__ == "__main__":
    for data in ("5000x2000", "20000x2000", "80000x2000", "5000x10000", "20000x10000"):
        result = epoch(data)
        seconds = statistics.median(one["seconds"] for one in result["rounds"]["scgen"])
        print(f"  {1e6 * seconds / int(data.split('x')[0]):.1f} microseconds a cell")
