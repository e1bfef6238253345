"""Simulate tissue in which the arrangement of cell types differs between niches, but their numbers do not."""

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scgen.arguments import check_flag, check_memory, check_number, check_seed, check_share, check_whole

#: Cells of a motif, and how many of its outer cells each of the three types has.
N_CELLS, N_TYPES, N_EACH = 19, 3, 6
#: Distance between neighbouring motifs of a row, and between rows. Motifs have radius 1.
SPACING, ROW_SPACING = 2.1, 1.82
#: Standard deviation of each coordinate of an outer cell around its place in the motif. With one for the centre, too,
#: more of the cells nearest to it would be of other motifs.
JITTER = 0.25 / np.sqrt(N_CELLS)
NICHES = ("sectors", "mirrored", "bands 1|2|3", "bands 2|1|3", "bands 1|3|2", "mixed")
#: Number of features, and distance between the centroids of two types, if there are no counts.
N_FEATURES, DISTANCE = 10, 4.0


def simulate_tissue(
    n_sections: int = 4,
    n_rows: int = 18,
    *,
    counts: bool = True,
    n_genes: int = 200,
    random_types: float = 0.0,
    mean_library: float = 300.0,
    seed: int = 0,
) -> AnnData:
    """Simulate sections of tissue whose niches have the same cell types, but arrange them differently.

    A section consists of ``n_rows`` x ``n_rows`` motifs. Each motif is a disc of radius 1 with 19 cells: one at the
    centre, of a random type, and six of each of three types around it. The niche of a motif says how its outer cells
    are arranged. The niches therefore differ in what lies beside what, but not in their composition. This holds for the
    18 cells nearest to a centre, nearly all of which are of its motif. Fewer cells are mostly of the middle band.

    ============= =====================================================================================
    niche         arrangement of the outer cells, before the motif is rotated
    ============= =====================================================================================
    "sectors"     types 1, 2 and 3 fill three sectors, counter-clockwise from the positive x-axis
    "mirrored"    the same, clockwise
    "bands 1|2|3" types 1, 2 and 3 fill three bands, in the direction of the x-axis
    "bands 2|1|3" the same, with type 1 in the middle
    "bands 1|3|2" the same, with type 3 in the middle
    "mixed"       the types are permuted at random
    ============= =====================================================================================

    The arrangement of each motif is then rotated counter-clockwise by the motif's own angle. A cell at
    (x, y) from the centre of its motif is where the unrotated arrangement has (x cos a + y sin a, -x sin a + y cos a).

    Parameters
    ----------
    n_sections, n_rows
        Number of sections, and of rows of motifs in each section. Each row has ``n_rows`` motifs.
    counts
        Whether ``X`` holds counts of genes. Otherwise it holds 10 features, normal with variance 1 around the centroid
        of the cell's type. Two centroids are 4 apart.
    n_genes
        Number of genes, if there are counts.
    random_types
        Share of cells that are given a random type in the end. Niches are harder to recognise if it is larger.
    mean_library
        Geometric mean of the library sizes, in counts, if there are counts.
    seed
        Seed of all draws. Global random generators are not used.

    Returns
    -------
    AnnData with the counts (CSR, float32) or the features (float32) in ``X``, and the positions of the cells in
    ``obsm["spatial"]`` (float64). The cells of a motif follow each other, the centre first. ``obs`` has "section",
    "cell_type", "niche", "motif" (a number, unique in the tissue), "angle" (of the motif, in radians, above -pi and up
    to pi) and "is_centre". ``uns["simulation"]`` has the arguments.

    Motif i of a section is centred at (2.1 c, 1.82 r), where r = i // n_rows and c = i % n_rows, with half added to c
    in every second row. Counts are negative binomial. Log fold changes between types have standard deviation 1, and
    theta is log-uniform over [0.5, 10]. The logarithm of the library size is normal around the mean of its section. A
    cell without counts is given one count, in the gene that its type expresses most.

    Raises
    ------
    ValueError
        If a size is not a whole number of at least 1, the seed is negative, or a share or mean is out of range.
    TypeError
        If an argument is not a number, or ``counts`` is not True or False.
    MemoryError
        If the cells and genes do not fit into memory.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_tissue(n_sections=2, n_rows=5, n_genes=50, seed=1)
    >>> adata.shape  # 2 x 5 x 5 x 19 cells
    (950, 50)
    >>> first = adata[adata.obs["motif"] == 0]
    >>> first.obs["niche"].unique().tolist()
    ['bands 1|2|3']
    >>> first[~first.obs["is_centre"]].obs["cell_type"].value_counts().to_dict()
    {'type_1': 6, 'type_2': 6, 'type_3': 6}
    """
    sizes = {"n_sections": n_sections, "n_rows": n_rows, "n_genes": n_genes}
    sizes = {name: check_whole(name, size, 1) for name, size in sizes.items()}
    n_sections, n_rows, n_genes = sizes.values()
    counts, seed = check_flag("counts", counts), check_seed(seed)
    random_types = check_share("random_types", random_types)
    takes = "a positive number of counts, up to a billion"
    mean_library = check_number("mean_library", mean_library, takes, above=0, most=1e9)
    n_motifs = n_sections * n_rows**2
    largest = max(sizes, key=sizes.get)
    n_numbers = N_CELLS * n_motifs * (4 * n_genes if counts else 4 * N_FEATURES)
    check_memory(largest, sizes[largest], 8 * n_numbers, "Simulate fewer sections, rows or genes.")

    rng = np.random.default_rng(seed)
    section = np.repeat(np.arange(n_sections), n_rows**2)
    niche = rng.integers(len(NICHES), size=n_motifs)
    angle = np.pi - rng.uniform(0, 2 * np.pi, n_motifs)
    around = _places(rng, n_motifs)
    cell_type = _arranged(rng, around, niche, angle).ravel()
    random = rng.random(len(cell_type)) < random_types
    cell_type[random] = rng.integers(N_TYPES, size=random.sum())
    of_motif = {"section": section, "niche": niche, "motif": np.arange(n_motifs), "angle": angle}
    obs = pd.DataFrame({name: np.repeat(values, N_CELLS) for name, values in of_motif.items()})
    obs["is_centre"] = np.arange(len(obs)) % N_CELLS == 0
    if counts:
        x = _counts(rng, cell_type, obs["section"].to_numpy(), n_genes, mean_library)
    else:
        centroids = DISTANCE / np.sqrt(2) * np.eye(N_TYPES, N_FEATURES)
        x = (centroids[cell_type] + rng.normal(size=(len(obs), N_FEATURES))).astype(np.float32)

    names = [f"section_{i + 1}" for i in range(n_sections)]
    obs["section"] = pd.Categorical.from_codes(obs["section"], names)
    obs["niche"] = pd.Categorical.from_codes(obs["niche"], NICHES)
    obs["cell_type"] = pd.Categorical.from_codes(cell_type, [f"type_{i + 1}" for i in range(N_TYPES)])
    obs.index = [f"cell_{i + 1}" for i in range(len(obs))]
    what = "gene" if counts else "feature"
    adata = AnnData(x, obs=obs, var=pd.DataFrame(index=[f"{what}_{i + 1}" for i in range(x.shape[1])]))
    adata.obsm["spatial"] = (np.tile(_lattice(n_rows), (n_sections, 1))[:, None] + around).reshape(-1, 2)
    settings = {"counts": counts, "random_types": random_types, "mean_library": mean_library, "seed": seed}
    adata.uns["simulation"] = sizes | settings
    return adata


def _lattice(n_rows: int) -> np.ndarray:
    """Return the centres of the motifs of a section, row by row, (n_rows^2, 2)."""
    row, column = np.divmod(np.arange(n_rows**2), n_rows)
    return np.stack([SPACING * (column + row % 2 / 2), ROW_SPACING * row], axis=1)


def _places(rng: np.random.Generator, n_motifs: int) -> np.ndarray:
    """Return the cells' positions relative to the centres of their motifs, (M, 19, 2).

    They form a sunflower, which fills the disc evenly. Its phase is random, so it says nothing about the motif's angle.
    """
    i = np.arange(N_CELLS)
    golden = np.pi * (3 - np.sqrt(5))
    turns = i * golden + rng.uniform(0, 2 * np.pi, n_motifs)[:, None]
    radii = np.sqrt(i / (N_CELLS - 1))[:, None]
    places = radii * np.stack([np.cos(turns), np.sin(turns)], axis=-1)
    places[:, 1:] += JITTER * rng.normal(size=(n_motifs, N_CELLS - 1, 2))
    return places


def _arranged(rng: np.random.Generator, around: np.ndarray, niche: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Return the codes of the cells' types, (M, 19), for the niche and the angle of each motif, (M,)."""
    x, y = around[:, 1:, 0], around[:, 1:, 1]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, y = x * cos + y * sin, y * cos - x * sin  # before the rotation
    counter_clockwise = np.arctan2(y, x) % (2 * np.pi)
    # The outer cells of each niche in the order in which the types fill them, and the order of the types.
    orders = np.stack([counter_clockwise, -counter_clockwise, x, x, x, rng.random(x.shape)])[niche, np.arange(len(x))]
    types = np.array([(0, 1, 2), (0, 1, 2), (0, 1, 2), (1, 0, 2), (0, 2, 1), (0, 1, 2)])
    rank = orders.argsort(axis=1).argsort(axis=1)
    outer = np.take_along_axis(types[niche], rank // N_EACH, axis=1)
    return np.column_stack([rng.integers(N_TYPES, size=len(outer)), outer])


def _counts(
    rng: np.random.Generator, cell_type: np.ndarray, section: np.ndarray, n_genes: int, mean_library: float
) -> sparse.csr_matrix:
    """Draw negative binomial counts, (N, G). A cell without counts is given one."""
    log_rho = rng.normal(size=n_genes) + rng.normal(size=(N_TYPES, n_genes)) / np.sqrt(2)
    log_rho -= np.logaddexp.reduce(log_rho, axis=1, keepdims=True)
    of_section = np.log(mean_library) + 0.3 * rng.normal(size=section.max() + 1)
    log_library = rng.normal(of_section[section], 0.5)
    theta = np.exp(rng.uniform(np.log(0.5), np.log(10), size=n_genes))
    mu = np.exp(log_rho[cell_type] + log_library[:, None])
    x = rng.poisson(rng.gamma(theta, mu / theta)).astype(np.float32)
    empty = np.flatnonzero(x.sum(1) == 0)
    x[empty, log_rho[cell_type[empty]].argmax(1)] = 1
    return sparse.csr_matrix(x)
