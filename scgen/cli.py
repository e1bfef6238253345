"""The command ``scgen``: integrate, check, simulate, convert."""

import argparse
import contextlib
import functools
import inspect
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from scgen.arguments import counted
from scgen.command import flags, h5ad, readers, streams
from scgen.command.parser import parser

#: Errors that are shown as one line, without a traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)
#: What a shell sees: 0 done; 1 the data, a file or a value are at fault; 2 an argument is unknown or missing, or not
#: one of its choices; 129, 130 and 143 ended by SIGHUP, Ctrl-C and SIGTERM; 141 nobody reads on.
OK, FAILED, UNREAD = 0, 1, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. Errors in the input are one line on stderr, without a traceback."""
    streams.open_closed()
    args = parser(COMMANDS).parse_args(argv)
    args.written = []  # named if the command is interrupted or fails
    args.ending = ending = Ending()
    # What the process ignores, as nohup makes it, stays ignored.
    before = {number: signal.getsignal(number) for number in h5ad.ENDING}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, ending)
    try:
        # `integrate` is run for its files and goes on if nobody reads its messages; the others end.
        stdout = streams.Lasting(sys.stdout) if args.run is _integrate else sys.stdout
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(streams.Lasting(sys.stderr)),
        ):
            warnings.showwarning = functools.partial(_one_line, args.command)
            code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        streams.silence(sys.stdout)
        return UNREAD
    except (Exception, SystemExit) as error:
        written = ", ".join(map(str, args.written))
        if ending.number is not None:  # an error may be what the signal led to
            _report_error(f"interrupted; {written or 'nothing'} was written", "")
            raise SystemExit(128 + ending.number) from None
        if not isinstance(error, EXPECTED):
            raise
        message = flags.in_flags(str(error), args.command) or type(error).__name__
        _report_error(message + (f" ({written} was written)" if written else ""))
        return FAILED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report_error(message: str, kind: str = "error: ") -> None:
    """Print one line on stderr, and leave no stream that fails when Python flushes it at its end."""
    with contextlib.suppress(OSError):
        print(f"scgen: {kind}{' '.join(message.split())}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it, or it goes to a full disk
            streams.silence(stream)


class Ending:
    """Handler of the signals that end the command, so that half-written files are deleted.

    Unlike Ctrl-C in a notebook, it also ends training, because nobody can look at an unfinished one.

    Attributes
    ----------
    number
        The signal that came; None before.
    """

    def __init__(self):
        self.number: int | None = None
        self._raised = -math.inf

    def __call__(self, number: int, frame) -> None:
        """Raise SystemExit. Further signals do so again after a second; earlier ones would interrupt the deletion."""
        self.number = number
        if time.monotonic() - self._raised > 1:
            self._raised = time.monotonic()
            sys.exit(128 + number)

    def check(self) -> None:
        """Raise SystemExit if a signal came. Callbacks of compiled libraries swallow what a handler raises."""
        if self.number is not None:
            sys.exit(128 + self.number)


def _integrate(args: argparse.Namespace) -> int:
    report = args.report or args.output.with_name(f"{args.output.stem}_report")
    _check_outputs(args, report)
    _check_tune(args)
    from scgen.workflows import clustering, integration

    adata = readers.read_all(args.input, args.batch_key)
    _check_labels(adata, args.labels_key)
    _check_results(adata, clustering.names_of_results(args.suffix))
    h5ad.try_to_write(adata, args.output)
    _say(f"{', '.join(map(str, args.input))}: {counted(adata.n_obs, 'cell')} x {counted(adata.n_vars, 'gene')}")
    # The options have the names of the arguments. Labels that the model does not read may be missing for some cells.
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
        _say(f"chose {adata.uns['scgen']['integrate']['tuned']} among the presets")
    seconds, n_models = model.history["seconds"].sum(), adata.uns["scgen"]["integrate"]["n_models"]
    first = f", the first of {n_models} models, whose embeddings are joined" if n_models > 1 else ""
    size = f"{counted(len(model.history), 'epoch')} on {counted(model.adata.n_vars, 'gene')}"
    _say(f"trained {size} in {seconds:.0f} s{first}")
    _say("computing neighbours, UMAP and Leiden clusters of the embedding ...")
    clustering.cluster(adata, f"X_{args.suffix}", suffix=args.suffix, resolution=args.resolution, seed=args.seed)
    args.ending.check()
    h5ad.write(adata, args.output, args.overwrite)
    args.written.append(args.output)
    leiden = f"leiden_{args.suffix}"
    clusters = counted(adata.obs[leiden].nunique(), "cluster")
    _say(f"wrote {args.output}: obsm X_{args.suffix} and X_umap_{args.suffix}, obs {leiden} ({clusters})")
    _report(args, adata, model, report)
    return OK


def _check_outputs(args: argparse.Namespace, report: Path) -> None:
    """Refuse, before any work, outputs that could not be written at its end."""
    from scgen.reporting import report as reporting

    for source in args.input:
        if args.output.exists() and source.exists() and args.output.samefile(source):
            raise ValueError(f"{args.output} is the input, which is never overwritten; name another output.")
        for path in (args.output.resolve(), report.resolve()):
            if readers.is_zarr(source) and source.resolve() in (path, *path.parents):
                raise ValueError(f"{path} is inside the input {source}, which is never changed; name another place.")
    h5ad.check_output(args.output, args.overwrite)
    existing = next(folder for folder in (report, *report.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"the folder {report} cannot be written: {existing} is a file, or you may not write to it.")
    if args.output.absolute() in (report.absolute(), *(path.absolute() for path in report.parents)):
        raise ValueError(f"{args.output} would be both the output and the folder of the report; name another --report.")
    names = ("model/model.json", *reporting.SCORES, *reporting.PICTURES)
    there = [name for name in names if (report / name).exists()]
    if there and not args.overwrite:
        raise ValueError(f"{report} holds {there[0]} already; name another --report, or pass --overwrite.")
    if args.output.suffix != ".h5ad":
        _say(f"note: {args.output} does not end in .h5ad, but is written in this format")


def _report(args: argparse.Namespace, adata, model, report: Path) -> None:
    """Write the model, the pictures and, where labels are known, the scores."""
    from scgen.reporting import report as reporting

    try:
        model.save(report / "model", overwrite=args.overwrite)
    except FileExistsError:
        raise FileExistsError(f"{report} was written by another program meanwhile; {args.output} is written") from None
    args.written.append(report / "model")
    for name in reporting.SCORES:
        (report / name).unlink(missing_ok=True)  # of an earlier run
    args.ending.check()
    _say("drawing UMAPs of the cells without and with the integration ...")
    before = reporting.uncorrected(model)
    colours = [key for key in (args.batch_key, args.labels_key, f"leiden_{args.suffix}") if key is not None]
    drawn = reporting.draw(model, adata, before, report, colours, suffix=args.suffix)
    args.written += drawn
    args.ending.check()
    _say(f"wrote {report / 'model'}, {', '.join(map(str, drawn))}")
    if args.labels_key is None:
        _say("no scores, because they need known labels: name their column with --labels-key")
        return
    _say("computing scores ...")
    try:
        logging.disable(logging.WARNING)  # scib-metrics warns about every small label
        keys = {"batch_key": args.batch_key, "labels_key": args.labels_key}
        table = reporting.scores(adata, before, report, suffix=args.suffix, **keys)
        _say(table.to_string(float_format="{:.3f}".format))
    except (ImportError, ValueError) as error:
        _say(f"no scores: {error}")
    finally:
        logging.disable(logging.NOTSET)


def _check(args: argparse.Namespace) -> int:
    from scgen.data.registry import check

    adata = readers.read_all(args.input, args.batch_key)
    table = check(
        adata,
        layer=args.layer,
        batch_key=args.batch_key,
        labels_key=args.labels_key,
        size_factor_key=args.size_factor_key,
        categorical_covariate_keys=args.categorical_covariate_keys,
        continuous_covariate_keys=args.continuous_covariate_keys,
        counts=args.counts,
    )
    for row in table.itertuples():
        print(flags.in_flags(f"{row.level}: {row.finding}. {row.suggestion}", args.command))
    n_errors = int((table["level"] == "error").sum())
    if n_errors:
        print(f"NOT OK: {counted(n_errors, 'error')}; scgen cannot use this file as it is.")
        return FAILED
    sizes = [counted(adata.n_obs, "cell"), counted(adata.n_vars, "gene")]
    if args.batch_key:
        sizes.insert(0, counted(adata.obs[args.batch_key].nunique(), "batch", "batches"))
    what = "raw counts" if args.counts else "values"
    where = "X" if args.layer is None else f'the layer "{args.layer}"'
    print(f"OK: {', '.join(sizes)}, {what} in {where}.")
    return OK


def _simulate(args: argparse.Namespace) -> int:
    h5ad.check_output(args.output, args.overwrite)
    from scgen.data.simulate import simulate_cells

    adata = simulate_cells(args.n_cells, args.n_genes, n_batches=args.n_batches, seed=args.seed)
    h5ad.write(adata, args.output, args.overwrite)
    size = f"{counted(args.n_cells, 'cell')} x {counted(args.n_genes, 'gene')}"
    print(f"wrote {args.output}: {size}, batch_key batch, labels_key cell_type")
    return OK


def _convert(args: argparse.Namespace) -> int:
    from scgen.models.scvi import SCVI

    model = SCVI.from_scvi_tools(args.input, args.data and readers.read(args.data), prefix=args.prefix)
    model.save(args.output, overwrite=args.overwrite)
    print(f"wrote {args.output}: {model!r}")
    return OK


def _say(text: str) -> None:
    print(text, flush=True)


def _check_tune(args: argparse.Namespace) -> None:
    given = [f"--{name.replace('_', '-')}" for name in flags.MODEL if getattr(args, name) is not None]
    if args.tune and given:
        raise ValueError(f"--tune chooses the settings of the model: leave {', '.join(given)} out.")


def _check_labels(adata, labels_key: str | None) -> None:
    from scgen.arguments import nearest

    if labels_key is not None and labels_key not in adata.obs:
        closest = nearest(labels_key, list(adata.obs.columns))
        hint = f" Did you mean --labels-key {closest}?" if closest else ""
        raise ValueError(f'"{labels_key}" is not a column of obs (it has: {", ".join(adata.obs.columns)}).{hint}')


def _check_results(adata, names: Mapping[str, Sequence[str]]) -> None:
    """Refuse to write results over something that IN holds under their names."""
    there = [f'{part}["{name}"]' for part, listed in names.items() for name in listed if name in getattr(adata, part)]
    if there:
        raise ValueError(
            f"the input holds {', '.join(there)}, which the new results would replace in OUT. Pass --suffix NAME to "
            "write the results under other names."
        )


def _one_line(command, message, category, filename, lineno, file=None, line=None) -> None:
    """Show our own warnings as one line each; those of libraries are not for the user of a command."""
    if issubclass(category, UserWarning) and Path(__file__).parent in Path(filename).parents:
        text = flags.in_flags(str(message), command)
        print(f"scgen: warning: {' '.join(text.split())}", file=sys.stderr)


COMMANDS = {"integrate": _integrate, "check": _check, "simulate": _simulate, "convert": _convert}

if __name__ == "__main__":
    sys.exit(main())
