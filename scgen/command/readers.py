"""Read files of cells in the formats that single-cell tools write, as the command takes them."""

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path

from scgen.arguments import counted, did_you_mean

#: What to do about formats that are not read here, by the end of the file's name.
ELSEWHERE = {
    ".csv": "a text table does not say whether its rows are cells or genes. Read it with scanpy.read_csv(path), "
    "transpose it (.T) if its rows are genes, and save it with .write_h5ad(path)",
    ".h5mu": 'it holds several modalities. Save one of them: mudata.read_h5mu(path)["rna"].write_h5ad(path)',
    ".h5seurat": "it is a Seurat file. Convert it in R: SeuratDisk::Convert(path, dest = 'h5ad')",
    ".rds": "it is an R object. Save it from R: zellkonverter::writeH5AD(object, path)",
}
ELSEWHERE |= {".tsv": ELSEWHERE[".csv"], ".txt": ELSEWHERE[".csv"], ".rdata": ELSEWHERE[".rds"]}
FORMATS = "h5ad, 10x h5, loom, a zarr folder, or a folder with matrix.mtx, barcodes and features"


def read(path: Path):
    """Return the AnnData in a file or folder; the content says which format it has.

    Genes that have the same name, as in 10x files, get a number after their name, except in h5ad and zarr, which are
    read as they are.

    Raises
    ------
    ValueError
        If there is no such file, or it is of no format that can be read.
    """
    if not path.exists():
        beside = path.parent.iterdir() if path.parent.is_dir() else []
        there = sorted(other.name for other in beside if other.suffix in (".h5ad", ".h5", ".loom", ".zarr"))
        raise ValueError(f"{path} is not there" + (f" (beside it: {', '.join(there[:5])})." if there else "."))
    kind = _kind_of_folder(path) if path.is_dir() else _kind_of_file(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Variable names are not unique")
            adata = _READERS[kind](path)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error
    if kind not in ("h5ad", "zarr") and not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()].nunique()
        adata.var_names_make_unique()
        names = counted(twice, "gene name occurs", "gene names occur")
        warnings.warn(f"{path}: {names} more than once; numbers were added to the repeats", stacklevel=2)
    return adata


def read_all(paths: Sequence[Path], batch_key: str | None):
    """Return the cells of one file, or of several, with the genes that all of these have.

    Parameters
    ----------
    paths
        The files. If there are several, the name of the file is added to the name of each of its cells.
    batch_key
        Column of obs. If none of several files has it, it is made: the name of each cell's file.

    Raises
    ------
    ValueError
        If a file cannot be read or is named twice, only some have the column or an X, or they share no gene.
    """
    places = [path.resolve() for path in paths]
    if twice := [str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"a file is named twice: {', '.join(twice)}.")
    cells = [read(path) for path in paths]
    if len(cells) == 1:
        return cells[0]
    import anndata

    names = [_name_of(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    with_column = [name for name, adata in zip(names, cells, strict=True) if batch_key in adata.obs]
    if 0 < len(with_column) < len(cells):
        raise ValueError(
            f'only {", ".join(with_column)} of the {len(cells)} files have the column "{batch_key}"; name a column '
            "that all have, or a new one, which then gets the names of the files."
        )
    for name, adata in zip(names, cells, strict=True):
        if not adata.var_names.is_unique:
            raise ValueError(f"{name} has duplicate gene names, so it cannot be joined with the other files.")
        if (adata.X is None) != (cells[0].X is None):
            raise ValueError(f"X is empty in some of the files, but not in all: {names[0]} and {name} differ.")
    label = None if with_column else batch_key
    if label is not None:
        there = list(set.intersection(*(set(map(str, adata.obs)) for adata in cells)))
        warnings.warn(
            f'no file has the column "{batch_key}": the {len(cells)} files are the batches.'
            f"{did_you_mean(batch_key, there)}",
            stacklevel=2,
        )
    joined = anndata.concat(dict(zip(names, cells, strict=True)), label=label, index_unique="-", merge="same")
    if with_column and joined.obs[batch_key].dtype == object:  # text in one file, numbers in another
        joined.obs[batch_key] = joined.obs[batch_key].astype(str)
    if not joined.n_vars:
        genes = "; ".join(f"{name}: {adata.var_names[0]}, ..." for name, adata in zip(names, cells, strict=True))
        raise ValueError(f"the files have no gene in common. Their genes are named {genes}.")
    most = max(adata.n_vars for adata in cells)
    if joined.n_vars < most:
        warnings.warn(
            f"{counted(joined.n_vars, 'gene is', 'genes are')} in all files; up to "
            f"{counted(most - joined.n_vars, 'other is', 'others are')} left out",
            stacklevel=2,
        )
    return joined


def _name_of(path: Path) -> str:
    """Return the name of a sample: that of its file, or of its folder if the file has one of 10x's standard names."""
    plain = path.name.removesuffix(".gz").removesuffix(path.suffix)
    of_10x = "filtered_feature_bc_matrix", "raw_feature_bc_matrix", "filtered_gene_bc_matrices", "matrix"
    absolute = path.absolute()
    return absolute.parent.name if plain in of_10x and absolute.parent.name else plain


def is_zarr(path: Path) -> bool:
    """Say whether a path is a folder that zarr wrote."""
    return any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs"))


def _kind_of_folder(path: Path) -> str:
    if is_zarr(path):
        return "zarr"
    if _matrices(path):
        return "10x mtx"
    there = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise ValueError(f"{path} is a folder without a matrix.mtx or a zarr store (it has: {there}). Name {FORMATS}.")


def _matrices(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*matrix.mtx"), *folder.glob("*matrix.mtx.gz")])


def _kind_of_file(path: Path) -> str:
    import h5py

    suffix = path.suffix.lower()
    if suffix in ELSEWHERE:
        raise ValueError(f"{path} is not read by this command: {ELSEWHERE[suffix]}.")
    if path.name.removesuffix(".gz").endswith(".mtx"):
        raise ValueError(f"{path} has no names of cells and genes: name its folder, {path.parent}, instead.")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file, or it was cut short. This command reads {FORMATS}.")
    try:
        with h5py.File(path) as file:
            parts = set(file)
            if {"obs", "var"} <= parts:
                return "h5ad"
            if "matrix" in parts:
                return "loom" if isinstance(file["matrix"], h5py.Dataset) else "10x h5"
            if parts and all(isinstance(file[part], h5py.Group) and "barcodes" in file[part] for part in parts):
                return "10x h5"  # of Cell Ranger 2, a group for each genome
    except OSError as error:
        raise ValueError(f"{path} is damaged, or it was cut short: {error}") from error
    for suffix, part in ((".h5mu", "mod"), (".h5seurat", "assays")):
        if part in parts:
            raise ValueError(f"{path} is not read by this command: {ELSEWHERE[suffix]}.")
    raise ValueError(
        f"{path} is an HDF5 file of an unknown kind (it has: {', '.join(sorted(parts)[:5])}). Name {FORMATS}."
    )


def _read_h5ad(path: Path):
    import anndata

    return anndata.read_h5ad(path)


def _read_zarr(path: Path):
    from anndata.io import read_zarr

    return read_zarr(path)


def _read_10x_h5(path: Path):
    import scanpy as sc

    adata = sc.read_10x_h5(path)
    if not adata.n_vars:
        raise ValueError("it holds no gene expression (antibodies or peaks alone are not read)")
    return adata


def _read_10x_mtx(folder: Path):
    import scanpy as sc

    matrices = _matrices(folder)
    if len(matrices) > 1:
        raise ValueError(
            f"it holds several matrices ({', '.join(path.name for path in matrices[:3])}); move each, with its "
            "barcodes and features, to a folder of its own"
        )
    options = {"prefix": matrices[0].name.partition("matrix.mtx")[0], "make_unique": False}
    if matrices[0].suffix == ".mtx" and list(folder.glob("*features.tsv")):  # as STARsolo writes it
        if "compressed" not in inspect.signature(sc.read_10x_mtx).parameters:
            raise ValueError("scanpy reads it from version 1.12 on, or if its three files are compressed: gzip *")
        options["compressed"] = False
    return sc.read_10x_mtx(folder, **options)


def _read_loom(path: Path):
    from anndata.io import read_loom

    try:
        return read_loom(path)
    except ImportError:
        raise ImportError(f"{path} is a loom file, which needs loompy: pip install loompy") from None


_READERS = {
    "h5ad": _read_h5ad,
    "zarr": _read_zarr,
    "10x h5": _read_10x_h5,
    "10x mtx": _read_10x_mtx,
    "loom": _read_loom,
}
