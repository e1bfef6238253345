"""Peak memory of a process that trains, beside scvi-tools: ``python -m benchmarks.memory``."""

from benchmarks.pairs import measure
from benchmarks.step import epoch

if __name__ == "__main__":
    for data in ("20000x2000", "80000x2000", "20000x10000"):
        epoch(data)
    measure("step", "20000x2000", ("epochs=12",), ("epochs=12",), label="12-epochs")
