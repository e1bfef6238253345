"""The flags of the command ``scgen``, and how their texts are read."""

import argparse
from collections.abc import Callable
from pathlib import Path

#: The names that `SCVI` takes, written here again: to read them there is to load torch, which takes seconds.
CHOICES = {
    "gene_likelihood": ("zinb", "nb", "poisson", "normal"),
    "dispersion": ("gene", "gene-batch", "gene-label", "gene-cell"),
    "posterior": ("normal", "planar", "iaf"),
    "prior": ("normal", "mog", "vamp", "flow"),
}


def add_data_arguments(command: argparse.ArgumentParser, batch_required: bool = False) -> None:
    """Add what says which parts of a file are read: the same for all commands that read one."""
    command.add_argument("input", type=path, metavar="IN.h5ad")
    group = command.add_argument_group("data")
    group.add_argument(
        "--batch-key", required=batch_required, type=name, metavar="COLUMN", help="column of obs with the batches"
    )
    group.add_argument(
        "--labels-key",
        type=name,
        metavar="COLUMN",
        help="column of obs with cell types, to draw, to score, and for gene-label",
    )
    group.add_argument("--layer", type=name, metavar="LAYER", help="layer with the counts (default X)")
    for flag, argument, text in (
        ("--covariate", "categorical_covariate_keys", "further column whose effect is removed; may be repeated"),
        ("--continuous-covariate", "continuous_covariate_keys", "the same, of numbers; may be repeated"),
    ):
        group.add_argument(flag, dest=argument, action="append", type=name, metavar="COLUMN", help=text)
    group.add_argument(
        "--size-factor-key", type=name, metavar="COLUMN", help="column of obs that replaces the library size"
    )
    group.add_argument(
        "--no-counts", dest="counts", action="store_false", help="values are normalised, for --gene-likelihood normal"
    )


def add_model_arguments(group) -> None:
    """Add the settings of `SCVI`; what is not given stays None, which stands for its default."""
    group.add_argument("--tune", action="store_true", help="choose these among scgen.PRESETS, by held-out counts")
    for flag in ("n-latent", "n-hidden", "n-layers", "n-flows", "n-components"):
        group.add_argument(f"--{flag}", type=whole(1), metavar="N")
    group.add_argument("--dropout-rate", type=float, metavar="SHARE")
    for argument, names in CHOICES.items():
        group.add_argument(f"--{argument.replace('_', '-')}", choices=names)
    for flag in ("use-observed-lib-size", "encode-covariates", "library-residual"):
        group.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction)


def add_training_arguments(group) -> None:
    """Add the settings of `SCVI.train`, in the same way."""
    group.add_argument(
        "--max-epochs", type=whole(1, 1_000_000), metavar="N", help="passes over the cells (default by their number)"
    )
    for flag in ("batch-size", "patience", "n-importance-samples", "devices"):
        group.add_argument(f"--{flag}", type=whole(1), metavar="N")
    for flag in ("train-size", "learning-rate", "kl-start"):
        group.add_argument(f"--{flag}", type=float, metavar="X")
    group.add_argument("--early-stopping", action=argparse.BooleanOptionalAction)
    group.add_argument("--accelerator", choices=("auto", "cpu", "gpu"))
    group.add_argument("--precision", choices=("auto", "32", "bf16"))


def path(text: str) -> Path:
    """Return a path; an empty one would be the folder that the shell is in."""
    return Path(name(text))


def name(text: str) -> str:
    """Return a name; an empty one is refused."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("it is empty" if not text else f"{text!r} has a null character")
    return text


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return what reads a whole number from a flag. Seeds are scanpy's too, whose generators take 32 bits."""

    def number(text: str) -> int:
        takes = f"{text!r}; it takes a whole number from {least}" + (f" to {most}" if most else "")
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(takes) from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(takes)
        return value

    return number


def suffix(text: str) -> str:
    """Return what ends the names of results."""
    if not text or "/" in text:
        raise argparse.ArgumentTypeError(f'{text!r}; a name without "/" is needed')
    return text
