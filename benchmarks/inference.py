"""Seconds of each question to a trained model, beside scvi-tools: ``python -m benchmarks.inference``."""

from benchmarks.pairs import measure

if __name__ == "__main__":
    measure("questions", "80000x2000")
