"""Seconds that the import takes, beside scvi-tools: ``python -m benchmarks.import``."""

from benchmarks.pairs import measure

if __name__ == "__main__":
    measure("imports", "1000x100")
