"""Seconds of a default training and the embedding, on the real sets, beside scvi-tools'.

``python -m benchmarks.time_to_quality [SET ...]``, where SET@1000 are 1,000 cells of a set. Whether the results are as
good is `benchmarks.quality`'s to say.
"""

import sys
from statistics import geometric_mean

from benchmarks.pairs import measure
from benchmarks.protocol import SETS

if __name__ == "__main__":
    ratios = [measure("whole", name)["ratios"]["seconds"] for name in sys.argv[1:] or SETS]
    print(f"geometric mean {geometric_mean(ratios):.1f}")
