"""The flags of the command ``scgen``, and how their texts are read."""

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path

#: The names that `SCVI` takes. They are repeated here, because importing them would load torch, which takes seconds.
CHOICES = {
    "gene_likelihood": ("zinb", "nb", "poisson", "normal"),
    "dispersion": ("gene", "gene-batch", "gene-label", "gene-cell"),
    "posterior": ("normal", "planar", "iaf"),
    "prior": ("normal", "mog", "vamp", "flow"),
}


def add_data_arguments(command: argparse.ArgumentParser, batch_required: bool = False) -> None:
    """Add the arguments that say which parts of a file are read; all commands that read cells have them."""
    command.add_argument(
        "input",
        type=path,
        nargs="+",
        metavar="IN",
        help="file of cells: h5ad, 10x h5, loom, a zarr folder, or a folder with 10x's matrix.mtx; several files are "
        "joined, with the genes and columns that all of them have",
    )
    group = command.add_argument_group("data")
    group.add_argument(
        "--batch-key",
        required=batch_required,
        type=name,
        metavar="COLUMN",
        help="column of obs with the batches; if none of several files has it, each file is a batch",
    )
    group.add_argument(
        "--labels-key",
        type=name,
        metavar="COLUMN",
        help="column of obs with cell types, for figures and scores; the model reads it for --dispersion gene-label",
    )
    group.add_argument("--layer", type=name, metavar="LAYER", help="layer with the raw counts (default: X)")
    for flag, argument, text in (
        ("--covariate", "categorical_covariate_keys", "further column whose effect is removed; may be repeated"),
        ("--continuous-covariate", "continuous_covariate_keys", "the same for a column of numbers; may be repeated"),
    ):
        group.add_argument(flag, dest=argument, action="append", type=name, metavar="COLUMN", help=text)
    group.add_argument(
        "--size-factor-key", type=name, metavar="COLUMN", help="column of obs that replaces the library size"
    )
    group.add_argument(
        "--no-counts",
        dest="counts",
        action="store_false",
        help="the values are not counts, for --gene-likelihood normal",
    )


def add_output(command: argparse.ArgumentParser, text: str, metavar: str = "OUT.h5ad") -> None:
    """Add the output, and the other arguments of every command that writes."""
    command.add_argument("-o", "--output", type=path, required=True, metavar=metavar, help=text)
    command.add_argument("--overwrite", action="store_true", help="replace what is there already")
    if metavar == "OUT.h5ad":
        command.add_argument(
            # scanpy, which makes the clusters, takes seeds of 32 bits.
            "--seed",
            type=whole(0, 2**32 - 1),
            default=0,
            metavar="N",
            help="seed of all random numbers (default 0)",
        )


def add_integration_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``integrate`` alone: the genes, the clusters, the report."""
    command.add_argument(
        "--n-top-genes", type=whole(1), metavar="N", help="model only the N most variable genes (default: all genes)"
    )
    command.add_argument(
        "--n-models",
        type=whole(1),
        default=1,
        metavar="N",
        help="models to train; their embeddings are joined, so that the seed matters less (default 1)",
    )
    command.add_argument(
        "--resolution",
        type=resolution,
        default=1.0,
        metavar="X",
        help="resolution of the Leiden clusters; a larger value gives more clusters (default 1)",
    )
    command.add_argument(
        "--report", type=path, metavar="DIR", help="folder of the pictures, scores and model (default: OUT_report)"
    )
    command.add_argument(
        "--suffix",
        type=suffix,
        default="scgen",
        metavar="NAME",
        help="end of the names of the results (default: scgen)",
    )
    command.add_argument("--quiet", action="store_true", help="show no progress line")


#: What the settings of `SCVI` and `SCVI.train` do; a test holds the defaults against those of the functions.
MODEL = {
    "n_latent": "dimensions of the embedding (default 10)",
    "n_hidden": "units of each hidden layer (default 128)",
    "n_layers": "hidden layers of encoder and decoder (default 1)",
    "n_flows": "steps of the flow of --posterior (default: 8 planar or 4 iaf)",
    "n_components": "components of the mixture of --prior (default: 20 mog or 50 vamp)",
    "dropout_rate": "share of the hidden units that are dropped in training (default 0.1)",
    "gene_likelihood": "distribution of the counts (default zinb)",
    "dispersion": "what the dispersion depends on (default gene)",
    "posterior": "distribution of the embedding given a cell (default normal)",
    "prior": "distribution of the embedding over all cells (default vamp)",
    "use_observed_lib_size": "take a cell's total as its library size, instead of inferring it (default no)",
    "encode_covariates": "let the encoder see the batch and the covariates (default yes)",
    "library_residual": "infer the library size as a correction of the cell's total (default yes)",
}
TRAINING = {
    "max_epochs": "passes over the training cells (default: 25 to 50, by the number of cells)",
    "batch_size": "cells in a minibatch (default: by the number of cells)",
    "train_size": "share of the cells to train on; the others validate (default 0.9)",
    "early_stopping": "stop when the validation bound no longer rises (default yes)",
    "patience": "epochs to wait for a higher validation bound (default: a quarter of --max-epochs)",
    "learning_rate": "highest learning rate (default 0.02)",
    "kl_start": "weight of the KL divergence at the start; it is 1 in the second half (default 1.0)",
    "batch_penalty": "weight of a penalty on batch differences within components of --prior (default 20.0)",
    "n_importance_samples": "draws of the importance-weighted bound; 1 trains on the ELBO (default 1)",
    "accelerator": "where to compute (default auto)",
    "devices": "number of devices (default 1)",
    "precision": "precision of matrix products in training (default auto)",
}


def add_model_arguments(group) -> None:
    """Add the settings of `SCVI`. One that is not given is None, which means its default."""
    group.add_argument(
        "--tune", action="store_true", help="choose these settings among scgen.PRESETS, by held-out counts"
    )
    for argument in ("n_latent", "n_hidden", "n_layers", "n_flows", "n_components"):
        _add(group, argument, type=whole(1), metavar="N")
    _add(group, "dropout_rate", type=float, metavar="SHARE")
    for argument, names in CHOICES.items():
        _add(group, argument, choices=names)
    for argument in ("use_observed_lib_size", "encode_covariates", "library_residual"):
        _add(group, argument, action=argparse.BooleanOptionalAction)


def add_training_arguments(group) -> None:
    """Add the settings of `SCVI.train`, in the same way."""
    _add(group, "max_epochs", type=whole(1, 1_000_000), metavar="N")
    for argument in ("batch_size", "patience", "n_importance_samples", "devices"):
        _add(group, argument, type=whole(1), metavar="N")
    for argument in ("train_size", "learning_rate", "kl_start", "batch_penalty"):
        _add(group, argument, type=float, metavar="X")
    _add(group, "early_stopping", action=argparse.BooleanOptionalAction)
    _add(group, "accelerator", choices=("auto", "cpu", "gpu"))
    _add(group, "precision", choices=("auto", "32", "bf16"))


def _add(group, argument: str, **how) -> None:
    group.add_argument(f"--{argument.replace('_', '-')}", help=(MODEL | TRAINING)[argument], **how)


def in_flags(message: str, command: argparse.ArgumentParser) -> str:
    """Return a message of the package with the arguments of its functions as the flags of a command.

    Examples
    --------
    >>> command = argparse.ArgumentParser()
    >>> add_data_arguments(command)
    >>> in_flags('layer="raw" is not a layer. Did you mean setup_anndata(adata, layer="counts")?', command)
    '--layer raw is not a layer. Did you mean --layer counts?'
    """
    options = {action.dest: action.option_strings for action in command._actions if action.option_strings}

    def flag(found: re.Match) -> str:
        argument, value = found["argument"], (found["value"] or "").strip("[]'\"")
        if argument not in options:
            return found[0]
        if value in ("True", "False"):
            switch = [one for one in options[argument] if one.startswith("--no-") == (value == "False")]
            return switch[0] if switch else found[0]
        return f"{options[argument][-1]} {shlex.quote(value) if ' ' in value else value}".strip()

    value = r"""\["[^"\]]*"\]|"[^"]*"|'[^']*'|\.{3}|[-+\w.]*[-+\w]"""
    # Not within a path or a name that a user chose.
    argument = rf"(?<![\w/.-])(?P<argument>[a-z_]+)=(?P<value>{value})(?![/\w])"
    # A call in which all arguments are named is replaced by these arguments.
    call = rf"(?:[\w.]+\.)?(?:setup_anndata|integrate|SCVI|train)\((?:adata|\.\.\.|, )*(?P<named>{argument})\)"
    message = re.sub(call, lambda found: found["named"], message)
    message = re.sub(argument, flag, message)
    # Elsewhere, a word that is also an argument may be anything: the name of a column, or part of a path.
    names = "|".join(options)
    message = re.sub(rf"(?<=\b[Ll]eave )(?P<argument>{names})(?P<value>)(?= out\b)", flag, message)
    names = "|".join(name for name in options if "_" in name) or "-"
    first = rf"^(?P<start>(?:\w+: )?)(?P<argument>{names})(?P<value>)(?=[: ])"
    return re.sub(first, lambda found: found["start"] + flag(found), message)


def path(text: str) -> Path:
    """Return a path; an empty one would be the folder that the shell is in."""
    return Path(name(text))


def name(text: str) -> str:
    """Return a name; an empty one is refused."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("it is empty" if not text else f"{text!r} has a null character")
    return text


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a function that reads a whole number from a flag."""

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


def resolution(text: str) -> float:
    """Return a number from 0, within float32."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 3e38:
        raise argparse.ArgumentTypeError(f"{text!r}; it takes a number from 0")
    return value


def suffix(text: str) -> str:
    """Return the end of the names of results; it must not be empty or contain "/"."""
    if not text or "/" in text:
        raise argparse.ArgumentTypeError(f'{text!r}; it takes a name without "/"')
    return text
