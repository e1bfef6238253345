"""The command ``scgen``: integrate, check, simulate, convert."""

import argparse
import contextlib
import functools
import inspect
import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from scgen import __version__, flags, h5ad

#: What a shell sees: 0 done; 1 the data, a file or a value are at fault; 2 an argument is unknown or missing, or not
#: one of its choices; 129, 130 and 143 ended by SIGHUP, Ctrl-C and SIGTERM; 141 nobody reads on.
OK, FAILED, UNREAD = 0, 1, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors of the user's are one line on stderr, without a traceback."""
    _open_closed_streams()
    args = _parser().parse_args(argv)
    # What the process ignores, as nohup makes it, stays ignored.
    before = {number: signal.getsignal(number) for number in h5ad.ENDING}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, _end)
    try:
        # What `integrate` is for are its files; of the others, somebody is to read the answer.
        stdout = Lasting(sys.stdout) if args.run is _integrate else sys.stdout
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(Lasting(sys.stderr)),
        ):
            warnings.showwarning = _one_line
            code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _silence(sys.stdout)
        return UNREAD
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(OSError):
            print(f"scgen: error: {message}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # nobody reads it, or it goes to a full disk
                _silence(stream)
        return FAILED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame) -> None:
    """End the command on a signal, so that what is half done is cleared away.

    Unlike Ctrl-C in a notebook, it ends training, too: there is nobody to look at half of one.
    """
    for other in h5ad.ENDING:
        signal.signal(other, signal.SIG_IGN)  # a second one would interrupt the clearing
    sys.exit(128 + number)


def _open_closed_streams() -> None:
    """Open the null device for standard streams that were closed at the start.

    Otherwise the next file that is opened would get their number, and what libraries print would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            try:
                os.fstat(number)
            except OSError:
                os.dup2(handle, number)
            setattr(sys, name, os.fdopen(handle, "r" if name == "stdin" else "w", encoding="utf-8"))


class Lasting:
    """A stream that falls silent when it cannot be written to any more, instead of ending the work.

    Its reader or its terminal may have gone, or its disk may be full. Its other methods are those of the stream.
    """

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or be silent from now on."""
        try:
            return self._stream.write(text)
        except OSError:
            _silence(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush, or be silent from now on."""
        try:
            self._stream.flush()
        except OSError:
            _silence(self._stream)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _silence(stream) -> None:
    """Send a stream that cannot be written to the null device, so that Python's last flush does not fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # it has no number, as where this is called from Python
        return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scgen", description="Integrate batches of single-cell counts.")
    parser.add_argument("--version", action="version", version=f"scgen {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("integrate", help="train on a file, embed, cluster, draw and score its cells")
    flags.add_data_arguments(command, batch_required=True)
    command.add_argument(
        "-o", "--output", type=flags.path, required=True, metavar="OUT.h5ad", help="IN with the results"
    )
    command.add_argument(
        "--n-top-genes", type=flags.whole(1), metavar="N", help="model so many highly variable genes (default all)"
    )
    command.add_argument(
        "--report", type=flags.path, metavar="DIR", help="pictures, scores and model (default OUT_report)"
    )
    command.add_argument(
        "--suffix",
        type=flags.suffix,
        default="scgen",
        metavar="NAME",
        help="ends the names of all results (default scgen)",
    )
    command.add_argument("--seed", type=flags.whole(0, 2**32 - 1), default=0)
    command.add_argument("--overwrite", action="store_true", help="replace OUT, and the model in DIR, if they exist")
    command.add_argument("--quiet", action="store_true", help="no progress line")
    flags.add_model_arguments(command.add_argument_group("model", "as the arguments of scgen.SCVI, with its defaults"))
    flags.add_training_arguments(command.add_argument_group("training", "as those of SCVI.train, with its defaults"))
    command.set_defaults(run=_integrate)

    command = commands.add_parser("check", help="say what is wrong or doubtful about a file")
    flags.add_data_arguments(command)
    command.set_defaults(run=_check)

    command = commands.add_parser("simulate", help="write simulated cells with their truth")
    command.add_argument("-o", "--output", type=flags.path, required=True, metavar="OUT.h5ad")
    command.add_argument("--n-cells", type=flags.whole(1), default=2000, metavar="N")
    command.add_argument("--n-genes", type=flags.whole(1), default=500, metavar="N")
    command.add_argument("--n-batches", type=flags.whole(1), default=3, metavar="N")
    command.add_argument("--seed", type=flags.whole(0, 2**32 - 1), default=0)
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    command.set_defaults(run=_simulate)

    command = commands.add_parser("convert", help="make a model that scvi-tools saved a model of scgen's")
    command.add_argument(
        "input", type=flags.path, metavar="SCVI_DIR", help="folder with model.pt; nothing in it is run"
    )
    command.add_argument("-o", "--output", type=flags.path, required=True, metavar="DIR", help="for SCVI.load")
    command.add_argument("--prefix", default="", help="the prefix that the model was saved with")
    command.add_argument(
        "--data", type=flags.path, metavar="IN.h5ad", help="cells it was trained on, for its library sizes"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the model in DIR if there is one")
    command.set_defaults(run=_convert)
    return parser


def _integrate(args: argparse.Namespace) -> int:
    say = functools.partial(print, flush=True)
    report = args.report or args.output.with_name(f"{args.output.stem}_report")
    h5ad.check_output(args.output, args.overwrite)
    existing = next(folder for folder in (report, *report.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"the folder {report} cannot be written: {existing} is a file, or not yours to write to.")
    if args.output.absolute() in (report.absolute(), *(path.absolute() for path in report.parents)):
        raise ValueError(f"{args.output} would be both the output and the folder of the report; name another --report.")
    if args.output.exists() and args.output.samefile(args.input):
        raise ValueError(f"{args.output} is the input, which is never overwritten; name another output.")
    from scgen import integration, reporting

    names = ("model/model.json", *reporting.SCORES, *reporting.PICTURES)
    there = [name for name in names if (report / name).exists()]
    if there and not args.overwrite:
        raise ValueError(f"{report} holds {there[0]} already; name another --report, or pass --overwrite.")
    adata = h5ad.read(args.input)
    _check_labels(adata, args.labels_key)
    _check_results(adata, integration.names_of_results(args.suffix))
    h5ad.try_to_write(adata, args.output)
    say(f"{args.input}: {adata.n_obs} cells x {adata.n_vars} genes")
    # An option of this command is named as the argument that it is of; labels may be missing where none are modelled.
    taken = inspect.signature(integration.integrate).parameters
    options = {name: value for name, value in vars(args).items() if name in taken and name != "labels_key"}
    model = integration.integrate(
        adata,
        args.batch_key,
        adjusted_basis=f"X_{args.suffix}",
        labels_key=args.labels_key if args.dispersion == "gene-label" else None,
        progress=not args.quiet,
        **options,
    )
    if args.tune:
        say(f"chose {adata.uns['scgen']['integrate']['tuned']} among the presets")
    seconds = model.history["seconds"].sum()
    say(f"trained {len(model.history)} epochs on {model.adata.n_vars} genes in {seconds:.0f} s")
    integration.cluster(adata, f"X_{args.suffix}", suffix=args.suffix, seed=args.seed)
    h5ad.write(adata, args.output, args.overwrite)
    try:
        model.save(report / "model", overwrite=args.overwrite)
    except FileExistsError:
        raise FileExistsError(f"{report} was written by another program meanwhile; {args.output} is written") from None
    for name in reporting.SCORES:
        (report / name).unlink(missing_ok=True)  # of an earlier run
    leiden = f"leiden_{args.suffix}"
    n_clusters = adata.obs[leiden].nunique()
    say(f"wrote {args.output}: obsm X_{args.suffix} and X_umap_{args.suffix}, obs {leiden} ({n_clusters} clusters)")
    before = reporting.uncorrected(model)
    colours = [key for key in (args.batch_key, args.labels_key, leiden) if key is not None]
    drawn = reporting.draw(model, adata, before, report, colours, suffix=args.suffix)
    say(f"wrote {report / 'model'}, {', '.join(map(str, drawn))}")
    if args.labels_key is None:
        say("no scores: they compare with known labels; name their column with --labels-key")
        return OK
    try:
        logging.disable(logging.WARNING)  # scib-metrics tells of every small label
        keys = {"batch_key": args.batch_key, "labels_key": args.labels_key}
        table = reporting.scores(adata, before, report, suffix=args.suffix, **keys)
        say(table.to_string(float_format="{:.3f}".format))
    except (ImportError, ValueError) as error:
        say(f"no scores: {error}")
    return OK


def _check(args: argparse.Namespace) -> int:
    from scgen.data.registry import check

    table = check(
        h5ad.read(args.input),
        layer=args.layer,
        batch_key=args.batch_key,
        labels_key=args.labels_key,
        size_factor_key=args.size_factor_key,
        categorical_covariate_keys=args.categorical_covariate_keys,
        continuous_covariate_keys=args.continuous_covariate_keys,
        counts=args.counts,
    )
    for row in table.itertuples():
        print(f"{row.level}: {row.finding}. {row.suggestion}")
    if not len(table):
        print("nothing to say: scgen can read this file as it is.")
    return FAILED if (table["level"] == "error").any() else OK


def _simulate(args: argparse.Namespace) -> int:
    h5ad.check_output(args.output, args.overwrite)
    from scgen.data.simulate import simulate_cells

    adata = simulate_cells(args.n_cells, args.n_genes, n_batches=args.n_batches, seed=args.seed)
    h5ad.write(adata, args.output, args.overwrite)
    print(f"wrote {args.output}: {args.n_cells} cells x {args.n_genes} genes, batch_key batch, labels_key cell_type")
    return OK


def _convert(args: argparse.Namespace) -> int:
    from scgen.models.scvi import SCVI

    model = SCVI.from_scvi_tools(args.input, args.data and h5ad.read(args.data), prefix=args.prefix)
    model.save(args.output, overwrite=args.overwrite)
    print(f"wrote {args.output}: {model}")
    return OK


def _check_labels(adata, labels_key: str | None) -> None:
    from scgen.arguments import nearest

    if labels_key is not None and labels_key not in adata.obs:
        closest = nearest(labels_key, list(adata.obs.columns))
        hint = f" Did you mean --labels-key {closest}?" if closest else ""
        raise ValueError(f'"{labels_key}" is no column of obs (it has: {", ".join(adata.obs.columns)}).{hint}')


def _check_results(adata, names: Mapping[str, Sequence[str]]) -> None:
    """Refuse to write results over something that IN holds under their names."""
    there = [f'{part}["{name}"]' for part, listed in names.items() for name in listed if name in getattr(adata, part)]
    if there:
        raise ValueError(
            f"the input holds {', '.join(there)}, which the new results would replace in OUT. Pass --suffix NAME to "
            "write the results under other names."
        )


def _one_line(message, category, filename, lineno, file=None, line=None) -> None:
    """Show our own warnings as one line each; those of libraries are not for the user of a command."""
    if issubclass(category, UserWarning) and Path(__file__).parent in Path(filename).parents:
        print(f"scgen: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
