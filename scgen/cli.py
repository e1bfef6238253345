"""The command ``scgen``: integrate, check, simulate, convert."""

import argparse
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from scgen import __version__

#: What a shell sees: 0 done, 1 the data or a file are at fault, 2 the call is, 130 interrupted, 141 nobody reads on.
OK, FAILED, INTERRUPTED, UNREAD = 0, 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors of the user's are one line on stderr, without a traceback."""
    args = _parser().parse_args(argv)
    warnings.showwarning = _one_line
    # Unlike Ctrl-C in a notebook, it ends the command: there is nobody to look at half a training.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(INTERRUPTED))
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"scgen: error: {message}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scgen", description="Integrate batches of single-cell counts.")
    parser.add_argument("--version", action="version", version=f"scgen {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("integrate", help="train on a file, embed, cluster, draw and score its cells")
    _add_data_arguments(command)
    command.add_argument("-o", "--output", type=_path, required=True, metavar="OUT.h5ad", help="IN with the results")
    command.add_argument(
        "--n-top-genes", type=_whole(1), metavar="N", help="model so many highly variable genes (default all)"
    )
    command.add_argument("--report", type=_path, metavar="DIR", help="pictures, scores and model (default OUT_report)")
    command.add_argument(
        "--max-epochs", type=_whole(1, 1_000_000), metavar="N", help="passes over the cells (default by their number)"
    )
    command.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"))
    command.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0)
    command.add_argument("--overwrite", action="store_true", help="replace OUT, and the model in DIR, if they exist")
    command.add_argument("--quiet", action="store_true", help="no progress line")
    command.set_defaults(run=_integrate)

    command = commands.add_parser("check", help="say what is wrong or doubtful about a file")
    _add_data_arguments(command)
    command.add_argument(
        "--covariate", type=_name, action="append", default=[], metavar="COLUMN", help="may be repeated"
    )
    command.set_defaults(run=_check)

    command = commands.add_parser("simulate", help="write simulated cells with their truth")
    command.add_argument("-o", "--output", type=_path, required=True, metavar="OUT.h5ad")
    command.add_argument("--n-cells", type=_whole(1), default=2000, metavar="N")
    command.add_argument("--n-genes", type=_whole(1), default=500, metavar="N")
    command.add_argument("--n-batches", type=_whole(1), default=3, metavar="N")
    command.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0)
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    command.set_defaults(run=_simulate)

    command = commands.add_parser("convert", help="make a model that scvi-tools saved a model of scgen's")
    command.add_argument("input", type=_path, metavar="SCVI_DIR", help="folder with model.pt; nothing in it is run")
    command.add_argument("-o", "--output", type=_path, required=True, metavar="DIR", help="for SCVI.load")
    command.add_argument("--prefix", default="", help="the prefix that the model was saved with")
    command.add_argument("--data", type=_path, metavar="IN.h5ad", help="cells it was trained on, for its library sizes")
    command.add_argument("--overwrite", action="store_true", help="replace the model in DIR if there is one")
    command.set_defaults(run=_convert)
    return parser


def _add_data_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", type=_path, metavar="IN.h5ad")
    required = command.prog.endswith("integrate")
    command.add_argument(
        "--batch-key", type=_name, required=required, metavar="COLUMN", help="column of obs with the batches"
    )
    command.add_argument(
        "--labels-key", type=_name, metavar="COLUMN", help="column of obs with cell types, to draw and to score"
    )
    command.add_argument("--layer", type=_name, metavar="LAYER", help="layer with the counts (default X)")


def _path(text: str) -> Path:
    """Return a path; an empty one would be the folder that the shell is in."""
    return Path(_name(text))


def _name(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("it is empty" if not text else f"{text!r} has a null character")
    return text


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
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


def _integrate(args: argparse.Namespace) -> int:
    report = args.report or args.output.with_name(f"{args.output.stem}_report")
    _check_output(args.output, args.overwrite)
    existing = next(folder for folder in (report, *report.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"the folder {report} cannot be written: {existing} is a file, or not yours to write to.")
    if args.output.exists() and args.output.samefile(args.input):
        raise ValueError(f"{args.output} is the input, which is never overwritten; name another output.")
    from scgen import integration, reporting

    names = ("model/model.json", reporting.SCORES, *reporting.PICTURES)
    there = [name for name in names if (report / name).exists()]
    if there and not args.overwrite:
        raise ValueError(f"{report} holds {there[0]} already; name another --report, or pass --overwrite.")
    adata = _read(args.input)
    _check_labels(adata, args.labels_key)
    _say(f"{args.input}: {adata.n_obs} cells x {adata.n_vars} genes")
    model = integration.integrate(
        adata,
        args.batch_key,
        layer=args.layer,
        n_top_genes=args.n_top_genes,
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        seed=args.seed,
        progress=not args.quiet,
    )
    seconds = model.history["seconds"].sum()
    _say(f"trained {len(model.history)} epochs on {model.adata.n_vars} genes in {seconds:.0f} s")
    (report / reporting.SCORES).unlink(missing_ok=True)  # of an earlier run
    model.save(report / "model", overwrite=args.overwrite)
    integration.cluster(adata, seed=args.seed)
    _write(adata, args.output)
    n_clusters = adata.obs["leiden_scgen"].nunique()
    _say(f"wrote {args.output}: obsm X_scgen and X_umap_scgen, obs leiden_scgen ({n_clusters} clusters)")
    before = reporting.uncorrected(model)
    colours = [key for key in (args.batch_key, args.labels_key, "leiden_scgen") if key is not None]
    drawn = reporting.draw(model, adata, before, report, colours)
    _say(f"wrote {report / 'model'}, {', '.join(map(str, drawn))}")
    if args.labels_key is None:
        _say("no scores: they compare with known labels; name their column with --labels-key")
        return OK
    try:
        logging.disable(logging.WARNING)  # scib-metrics tells of every small label
        table = reporting.scores(adata, before, report, batch_key=args.batch_key, labels_key=args.labels_key)
        _say(table.to_string(float_format="{:.3f}".format))
    except (ImportError, ValueError) as error:
        _say(f"no scores: {error}")
    return OK


def _check(args: argparse.Namespace) -> int:
    from scgen.data.registry import check

    table = check(
        _read(args.input),
        layer=args.layer,
        batch_key=args.batch_key,
        labels_key=args.labels_key,
        categorical_covariate_keys=args.covariate,
    )
    for row in table.itertuples():
        print(f"{row.level}: {row.finding}. {row.suggestion}")
    if not len(table):
        print("nothing to say: scgen can read this file as it is.")
    return FAILED if (table["level"] == "error").any() else OK


def _simulate(args: argparse.Namespace) -> int:
    _check_output(args.output, args.overwrite)
    from scgen.data.simulate import simulate_cells

    _write(simulate_cells(args.n_cells, args.n_genes, n_batches=args.n_batches, seed=args.seed), args.output)
    print(f"wrote {args.output}: {args.n_cells} cells x {args.n_genes} genes, batch_key batch, labels_key cell_type")
    return OK


def _convert(args: argparse.Namespace) -> int:
    from scgen.models.scvi import SCVI

    model = SCVI.from_scvi_tools(args.input, args.data and _read(args.data), prefix=args.prefix)
    model.save(args.output, overwrite=args.overwrite)
    print(f"wrote {args.output}: {model}")
    return OK


def _read(path: Path):
    if path.is_dir():
        raise ValueError(f"{path} is a folder; an h5ad file is needed.")
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.h5ad"))[:5]) if path.parent.is_dir() else ""
        raise ValueError(f"{path} is not there" + (f" (h5ad files beside it: {there})." if there else "."))
    import anndata
    import h5py

    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is no h5ad file (not HDF5), or was cut short.")
    try:
        return anndata.read_h5ad(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as h5ad: {error}") from error


def _check_labels(adata, labels_key: str | None) -> None:
    from scgen.arguments import nearest

    if labels_key == "leiden_scgen":
        raise ValueError("--labels-key leiden_scgen: this command writes that column; rename the old one first.")
    if labels_key is not None and labels_key not in adata.obs:
        closest = nearest(labels_key, list(adata.obs.columns))
        hint = f" Did you mean --labels-key {closest}?" if closest else ""
        raise ValueError(f'"{labels_key}" is no column of obs (it has: {", ".join(adata.obs.columns)}).{hint}')


def _check_output(path: Path, overwrite: bool) -> None:
    """Refuse, before any work, an output that could not be written at its end."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} is a folder." if path.is_dir() else f"the folder {path.parent} does not exist.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; pass --overwrite to replace it.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"the folder {path.parent} cannot be written to.")


def _write(adata, path: Path) -> None:
    """Write beside the path and move there in one step: it never holds half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        _write_apart(adata, temporary)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_apart(adata, path: Path) -> None:
    """Write in a child process: on a full disk the HDF5 library crashes the process that writes (seen with 1.14)."""
    if not hasattr(os, "fork"):
        adata.write_h5ad(path)
        return
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_write_and_tell, args=(adata, path, sender))
    child.start()
    sender.close()
    child.join()
    if child.exitcode != 0:
        try:
            reason = receiver.recv()
        except EOFError:
            reason = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free in {path.parent}"
        raise OSError(f"the result could not be written: {reason}")


def _write_and_tell(adata, path: Path, sender) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    try:
        adata.write_h5ad(path)
    except Exception as error:
        sender.send(str(error))
        raise


def _say(text: str) -> None:
    """Print; when nobody reads on, go on in silence, for the files are what was asked for."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(message, category, filename, lineno, file=None, line=None) -> None:
    """Show our own warnings as one line each; those of libraries are not for the user of a command."""
    if issubclass(category, UserWarning) and Path(__file__).parent in Path(filename).parents:
        print(f"scgen: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
