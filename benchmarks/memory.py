"""Peak memory of a process that trains, beside scvi-tools: ``python -m benchmarks.memory``."""

from benchmarks.pairs import measure

if __name__ == "__main__":
    for n_cells in (20_000, 80_000):
        measure("step", f"{n_cells}x2000", ("epochs=2",), ("epochs=2",), label="2-epochs")
    measure("step", "20000x2000", ("epochs=12",), ("epochs=12",), label="12-epochs")
