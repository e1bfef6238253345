"""MatrixNormalVAE: patches of tissue or images as latent maps, which keep where things are (Wang et al. 2017)."""

from dataclasses import dataclass

import torch
from anndata import AnnData
from torch import Tensor

from scgen.arguments import check_choice, check_seed, check_whole, set_fields
from scgen.data.grids import GRIDS, ImageStore, Patches, check_image_shape, check_patch_size
from scgen.data.loader import Store
from scgen.data.neighbourhoods import NeighbourStore
from scgen.data.registry import Registry
from scgen.models.tissue import LIKELIHOODS, TissueModel, check_likelihood, registry_of
from scgen.modules.maps import COVARIANCES, MapDecoder, MapPosterior, halvings
from scgen.modules.places import Places
from scgen.modules.priors import StandardNormalPrior
from scgen.modules.vae import VAE


@dataclass(frozen=True)
class Arguments:
    """The settings of `MatrixNormalVAE`, whose documentation describes each; all are checked."""

    n_maps: int
    map_size: int
    n_hidden: int
    patch_size: int
    grid: str
    image_shape: tuple[int, ...] | None
    covariance: str
    rank: int | None
    likelihood: str
    seed: int

    def __post_init__(self):
        plain = {name: check_whole(name, getattr(self, name), 1, 10_000) for name in ("n_maps", "n_hidden")}
        plain["patch_size"] = check_patch_size(self.patch_size)
        plain["grid"] = check_choice("grid", self.grid, tuple(GRIDS))
        plain["image_shape"] = check_image_shape(self.image_shape)
        plain["map_size"] = check_whole("map_size", self.map_size, 1)
        side = plain["patch_size"] if self.image_shape is None else min(plain["image_shape"][:2])
        if plain["map_size"] > side:
            raise ValueError(f"map_size={plain['map_size']}; a map cannot be larger than the patch or image, {side}.")
        plain["covariance"] = check_choice("covariance", self.covariance, COVARIANCES)
        if self.rank is not None:
            plain["rank"] = check_whole("rank", self.rank, 1, plain["map_size"])
        plain["likelihood"] = check_choice("likelihood", self.likelihood, LIKELIHOODS)
        plain["seed"] = check_seed(self.seed)
        set_fields(self, plain)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the patches or images."""
        return (self.patch_size, self.patch_size) if self.image_shape is None else self.image_shape[:2]


class MatrixNormalVAE(TissueModel):
    """Embed patches of a grid of spots, or images, as small maps instead of a vector.

    A patch is a spot with the spots around it on the lattice. Its latents are ``n_maps`` maps of ``map_size`` x
    ``map_size`` values, which a convolutional network decodes into the values at each place. Each map has a
    matrix-variate normal posterior: its covariance is the Kronecker product of a covariance of the rows and one of the
    columns. Batches, such as sections, are inputs of the decoder. Places of the patch without a spot are left out of
    the likelihood.

    The maps keep the orientation of the tissue on the slide. Use `SpatialVAE` if it has no meaning.

    Spots are looked for among those of the AnnData that a method is given. Pass whole sections, and choose spots by
    ``indices``. Bounds and likelihoods are those of all spots of a patch, in nats per patch. Patches overlap, so that
    validation spots are in patches of training spots.

    Parameters
    ----------
    adata
        Spots or bins with positions, set up by ``scgen.setup_anndata(adata, spatial_key="spatial", ...)``, or images.
        The values are counts or, with ``counts=False``, any others. Every value is decoded at every place, so a few
        hundred genes are many; see ``use_rep``.
    use_rep
        Key of ``adata.obsm`` with the values to use instead, as in `SpatialVAE`.
    n_maps, map_size
        Number of maps, and their side. The embedding has ``n_maps * map_size**2`` values. With ``map_size=1``, the
        model is a VAE with a vector of latents.
    n_hidden
        Number of channels of the networks' layers.
    patch_size
        Side of the patches, an odd number of spots.
    grid
        Lattice of the spots: "square", such as bins, or "hex", such as Visium's. Positions may be in any unit, such as
        pixels. Spacing and angle of each section's lattice are found from the positions. Rows of a patch run along
        the direction of the lattice that is nearest to the x-axis. On a hexagonal lattice, a patch is all spots within
        ``(patch_size - 1) / 2`` steps.
    image_shape
        If given, each observation is an image, and its features are the pixels, row by row: (height, width), or
        (height, width, channels) with the channels of a pixel together. Positions are then not needed, and
        ``patch_size`` and ``grid`` have no effect.
    covariance
        Posterior covariance of a map's rows and columns: "diagonal" or "full" matrices. "independent" gives each value
        a variance of its own instead.
    rank
        Rank of the posterior mean of a map, which makes the encoder smaller: 1 is the paper's low-rank variant. None
        allows any mean.
    likelihood
        Distribution of the values: "nb", "zinb", "poisson", or "normal" for values that are not counts and for images.
        None is "nb" for spots with counts and "normal" otherwise.
    seed
        Seed of the initial weights.

    Raises
    ------
    ValueError
        If ``adata`` was not set up with positions, or with size factors or covariates, which this model does not use.
        If the spots are not on the lattice, images have another number of pixels, or an argument is out of range.

    References
    ----------
    Wang, Yuan and Ji (2017), Spatial variational auto-encoding via matrix-variate normal distributions.

    Examples
    --------
    Bins of 10 genes' counts on a square grid:

    >>> import numpy as np, scgen
    >>> from anndata import AnnData
    >>> rng = np.random.default_rng(0)
    >>> adata = AnnData(rng.poisson(2.0, (400, 10)).astype("float32"))
    >>> adata.obsm["spatial"] = np.stack(np.divmod(np.arange(400), 20), axis=1)
    >>> scgen.setup_anndata(adata, spatial_key="spatial")
    >>> model = scgen.MatrixNormalVAE(adata, n_maps=4, map_size=3, patch_size=5)
    >>> model.train(max_epochs=2, progress=False)
    >>> adata.obsm["X_niche_map"] = model.get_latent_representation()
    >>> adata.obsm["X_niche_map"].shape
    (400, 36)
    >>> maps = adata.obsm["X_niche_map"].reshape(-1, 4, 3, 3)  # spots, n_maps, rows, columns
    """

    Arguments, Cells = Arguments, Places
    _unit, _batch_size = "patch", 128

    def __init__(
        self,
        adata: AnnData,
        *,
        use_rep: str | None = None,
        n_maps: int = 8,
        map_size: int = 3,
        n_hidden: int = 64,
        patch_size: int = 7,
        grid: str = "square",
        image_shape: tuple[int, ...] | None = None,
        covariance: str = "diagonal",
        rank: int | None = None,
        likelihood: str | None = None,
        seed: int = 0,
    ):
        registry = registry_of("MatrixNormalVAE", adata, image_shape, use_rep)
        if likelihood is None:
            likelihood = "nb" if registry.setup.counts and image_shape is None else "normal"
        sizes, posterior = (n_maps, map_size, n_hidden, patch_size, grid, image_shape), (covariance, rank)
        super().__init__(adata, registry, Arguments(*sizes, *posterior, likelihood, seed))
        self.sources(adata)  # raises if the spots are not on the lattice

    @staticmethod
    def build(registry: Registry, arguments: Arguments) -> VAE:
        """Return the module for these arguments."""
        a, counts = arguments, registry.setup.counts
        check_likelihood(a.likelihood, registry.setup, a.image_shape)
        check_image_shape(a.image_shape, len(registry.genes))
        sizes, maps = halvings(a.shape, a.map_size), (a.n_maps, a.map_size)
        n_features = len(registry.genes) if a.image_shape is None else len(registry.genes) // (a.shape[0] * a.shape[1])
        posterior = MapPosterior(sizes, n_features, *maps, a.covariance, a.rank, a.n_hidden, counts)
        decoder = MapDecoder(a.likelihood, sizes, *maps, n_features, a.n_hidden, len(registry.batches))
        return VAE({"z": posterior}, {"z": StandardNormalPrior(a.n_maps * a.map_size**2)}, decoder)

    def sources(self, adata: AnnData) -> dict[str, Store | Tensor]:
        """Return features and mask of the spots' patches, or the pixels of the images: see `Model.sources`."""
        a, store = self.arguments, self.registry.store(adata)
        if a.image_shape is not None:
            images = ImageStore(store, a.image_shape)
            return {"features": images, "mask": torch.tensor(True).expand(images.shape[:2])}
        patches = Patches.of(*self._places_of(adata), size=a.patch_size, grid=a.grid)
        self._check_unchanged(adata, patches.index)
        return {"features": NeighbourStore(store, patches.index), "mask": torch.from_numpy(patches.mask)}
