"""Seconds of an epoch, beside scvi-tools: ``python -m benchmarks.step``."""

from benchmarks.pairs import measure


def epoch(data: str) -> dict:
    """Return the comparison of default trainings, of four epochs, or of three where one takes long."""
    epochs = ("epochs=4",) if data in ("5000x2000", "20000x2000") else ("epochs=3",)
    return measure("step", data, epochs, epochs)


if __name__ == "__main__":
    epoch("20000x2000")
    measure("step", "20000x2000", ("batch_size=128", "precision=32"), ("batch_size=128",), label="128-float32")
    epoch("20000x10000")
    measure("step", "20000x2000", ("observed=1",), ("observed=1",), label="observed")
