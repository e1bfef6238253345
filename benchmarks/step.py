"""Seconds of an epoch, beside scvi-tools: ``python -m benchmarks.step``."""

from benchmarks.pairs import measure

if __name__ == "__main__":
    measure("step", "20000x2000")
    measure("step", "20000x2000", ("batch_size=128", "precision=32"), ("batch_size=128",), label="128-float32")
    measure("step", "20000x2000", ("observed=1",), ("observed=1",), label="observed")
    measure("step", "20000x10000", ("epochs=3",), ("epochs=3",))
