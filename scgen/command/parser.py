"""The commands of ``scgen``, their arguments and their help."""

import argparse
from collections.abc import Callable, Mapping

from scgen import __version__
from scgen.command.flags import (
    add_data_arguments,
    add_integration_arguments,
    add_model_arguments,
    add_output,
    add_training_arguments,
    path,
    whole,
)


def parser(runs: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """Return the parser of the command line; ``runs`` says by name what each command calls."""
    top = argparse.ArgumentParser(
        prog="scgen",
        description="Integrate batches of single-cell counts.",
        epilog="`scgen COMMAND --help` lists the options of a command.",
    )
    top.add_argument("--version", action="version", version=f"scgen {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, text: str, usage: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            usage=f"scgen {name} {usage} [options]",
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=runs[name], command=command)
        return command

    command = add(
        "integrate",
        "train on the cells of a file, embed, cluster, draw and score them",
        "IN [IN ...] -o OUT.h5ad --batch-key COLUMN",
        "scgen integrate cells.h5ad -o integrated.h5ad --batch-key sample --labels-key cell_type --n-top-genes 2000\n"
        "  scgen integrate day1.h5 day2.h5 -o integrated.h5ad --batch-key sample   # each 10x file is a sample",
    )
    add_data_arguments(command, batch_required=True)
    add_output(command, "h5ad file to write: the cells of IN, all their genes, and the results")
    add_integration_arguments(command)
    group = command.add_argument_group("model", "the arguments of scgen.SCVI; those not given have their defaults")
    add_model_arguments(group)
    group = command.add_argument_group("training", "the arguments of SCVI.train; those not given have their defaults")
    add_training_arguments(group)
    integrate = command

    command = add(
        "check",
        "say what is wrong or doubtful about the cells of a file",
        "IN [IN ...]",
        "scgen check cells.h5ad --batch-key sample --layer counts",
    )
    add_data_arguments(command)
    command.set_defaults(command=integrate)  # its messages name the flags of `integrate`

    command = add(
        "simulate",
        "write simulated cells of known batches and types",
        "-o OUT.h5ad",
        "scgen simulate -o simulated.h5ad --n-cells 3000 --n-batches 4",
    )
    add_output(command, "h5ad file to write")
    for flag, default in (("cells", 2000), ("genes", 500), ("batches", 3)):
        command.add_argument(
            f"--n-{flag}",
            type=whole(1),
            default=default,
            metavar="N",
            help=f"number of {flag} (default {default})",
        )

    command = add(
        "convert",
        "convert a model that scvi-tools saved to one of scgen",
        "SCVI_DIR -o DIR",
        "scgen convert scvi_model/ -o scgen_model/ --data cells.h5ad",
    )
    command.add_argument("input", type=path, metavar="SCVI_DIR", help="folder with model.pt; no code in it is run")
    add_output(command, "folder to write, for scgen.SCVI.load", "DIR")
    command.add_argument("--prefix", default="", help="prefix of the file names in SCVI_DIR (default none)")
    command.add_argument(
        "--data", type=path, metavar="IN", help="the cells that it was trained on, to read their library sizes"
    )
    return top
