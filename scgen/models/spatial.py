"""SpatialVAE: niches of tissue, whatever their orientation on the slide (Bepler et al. 2019)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scgen.analysis import inference
from scgen.arguments import check_choice, check_flag, check_number, check_seed, check_whole, set_fields
from scgen.data.grids import ImageStore, check_image_shape, pixel_places
from scgen.data.loader import Store
from scgen.data.neighbourhoods import Neighbourhoods, NeighbourStore
from scgen.data.registry import Registry
from scgen.models.tissue import LIKELIHOODS, TissueModel, check_likelihood, registry_of
from scgen.modules.niches import (
    UNIT_OF_TRANSLATION,
    EquivariantAngle,
    FreeAngle,
    InvariantEncoder,
    NicheDecoder,
    NicheEncoder,
    NichePosterior,
    Niches,
    UniformAngle,
    WideAngle,
)
from scgen.modules.priors import StandardNormalPrior
from scgen.modules.vae import VAE

#: KL divergence of an angle, in nats, below which it hardly depends on the niche. An equivariant angle has at least
#: 1.11 nats, because its standard deviation is at most half a radian.
LITTLE = {"equivariant": 1.2, "wrapped-normal": 0.1, "normal": 0.1}


@dataclass(frozen=True)
class Arguments:
    """The settings of `SpatialVAE`, whose documentation describes each; all are checked."""

    n_latent: int
    n_hidden: int
    n_neighbors: int
    radius: float | None
    likelihood: str
    rotate: bool
    translate: bool
    angle: str
    image_shape: tuple[int, ...] | None
    seed: int

    def __post_init__(self):
        plain = {name: check_whole(name, getattr(self, name), 1, 10_000) for name in ("n_latent", "n_hidden")}
        plain["n_neighbors"] = check_whole("n_neighbors", self.n_neighbors, 1)
        if self.radius is not None:
            plain["radius"] = check_number("radius", self.radius, "a distance, a number above 0", above=0)
        plain["likelihood"] = check_choice("likelihood", self.likelihood, LIKELIHOODS)
        plain |= {name: check_flag(name, getattr(self, name)) for name in ("rotate", "translate")}
        plain["angle"] = check_choice("angle", self.angle, ("equivariant", "wrapped-normal", "normal"))
        plain["image_shape"] = check_image_shape(self.image_shape)
        plain["seed"] = check_seed(self.seed)
        set_fields(self, plain)


class SpatialVAE(TissueModel):
    """Embed niches: a cell with its neighbours in tissue, whose orientation on the slide means nothing.

    A niche has a state z, a rotation theta and, if asked for, a translation. The values at each place of the
    neighbourhood are decoded from z and from the place, turned back by theta. z therefore describes which cells are
    where, but not how the niche lies on the slide. Batches, such as sections, are inputs of the decoder alone. Niches
    of any batch can therefore be embedded; to ask for bounds of a new batch, map its cells by `query`.

    Neighbours are looked for among the cells of the AnnData that a method is given. Pass whole sections, and choose
    cells by ``indices``. Bounds and likelihoods are those of all cells of a niche, in nats per niche, and depend on the
    number of neighbours. Niches overlap, so that validation cells are neighbours of training cells. In `train`,
    ``batch_size`` is a number of niches. In all other methods, it is a number of cells with their neighbours counted.

    Parameters
    ----------
    adata
        Cells with positions, set up by ``scgen.setup_anndata(adata, spatial_key="spatial", ...)``. The values are
        counts or, with ``counts=False``, any others. Every value is decoded for every neighbour, so a few hundred genes
        are many; see ``use_rep``.
    use_rep
        Key of ``adata.obsm`` with the values to use instead, such as the principal components or the latent
        representation of a trained `SCVI`: an array, a sparse matrix or a DataFrame of numbers, (n_obs, F). Genes are
        then not read. Other AnnData need the same key with the same number of columns. Columns of a DataFrame are
        matched by name.
    n_latent
        Number of values of z.
    n_hidden
        Width of the encoders' layers; those of the decoder are twice as wide.
    n_neighbors
        Number of nearest cells that belong to the niche, with all that are as near as the last of them.
    radius
        If given, the niche is all cells within this distance, in the unit of the coordinates.
    likelihood
        Distribution of the values: "nb", "zinb", "poisson", or "normal" for values that are not counts. None is "nb"
        for counts and "normal" for others, such as those of ``use_rep``.
    rotate, translate
        Whether niches have a rotation and a translation.
    angle
        How theta is inferred. "equivariant" is an angle that turns with the niche by construction, and z does not
        change if the niche turns. z then reads the first two harmonics of the arrangement alone: around a ring, ABAB...
        and AABB... look the same. "wrapped-normal" and "normal" are as in the paper: a network may return any angle,
        and z is inferred from the niche as it lies. In training, such a network often stops using the angle.
    image_shape
        If given, each observation is an image instead of a cell with its neighbours: (height, width), or (height,
        width, channels). Its features are the pixels, row by row, with the channels of a pixel together. Positions are
        not needed, and ``n_neighbors`` and ``radius`` have no effect. Half the longer side is the radius of the
        neighbourhood, and angles are counter-clockwise for a viewer of the image.
    seed
        Seed of the initial weights.

    Raises
    ------
    ValueError
        If ``adata`` was not set up with positions, or with size factors or covariates, which this model does not use.
        If a section has too few cells or several batches, or an argument is out of range. If ``adata.obsm`` has no
        ``use_rep``, or it holds other values than finite numbers.

    References
    ----------
    Bepler et al. (2019), Explicitly disentangling image content from translation and rotation with spatial-VAE.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_tissue(n_sections=1, n_rows=5, counts=False, seed=0)
    >>> scgen.setup_anndata(adata, spatial_key="spatial", batch_key="section", counts=False)
    >>> model = scgen.SpatialVAE(adata, n_latent=4)
    >>> model.train(max_epochs=2, progress=False)
    >>> adata.obsm["X_niche"] = model.get_latent_representation()
    >>> adata.obs["niche_rotation"] = model.get_rotation()
    >>> adata.obsm["X_niche"].shape
    (475, 4)

    For data with many genes, use the latent representation of an `SCVI` that was trained on the same cells:

    >>> adata = scgen.simulate_tissue(n_sections=1, n_rows=5, n_genes=50, seed=0)
    >>> scgen.setup_anndata(adata, spatial_key="spatial")
    >>> cells = scgen.SCVI(adata)
    >>> cells.train(max_epochs=2, progress=False)
    >>> adata.obsm["X_scgen"] = cells.get_latent_representation()
    >>> scgen.SpatialVAE(adata, use_rep="X_scgen")
    SpatialVAE model of 475 cells x 10 columns of adata.obsm["X_scgen"]; arguments: likelihood='normal'; training: none
    """

    Arguments, Cells = Arguments, Niches

    def __init__(
        self,
        adata: AnnData,
        *,
        use_rep: str | None = None,
        n_latent: int = 10,
        n_hidden: int = 64,
        n_neighbors: int = 18,
        radius: float | None = None,
        likelihood: str | None = None,
        rotate: bool = True,
        translate: bool = False,
        angle: str = "equivariant",
        image_shape: tuple[int, ...] | None = None,
        seed: int = 0,
    ):
        registry = registry_of("SpatialVAE", adata, image_shape, use_rep)
        if likelihood is None:
            likelihood = "nb" if registry.setup.counts and image_shape is None else "normal"
        sizes = n_latent, n_hidden, n_neighbors, radius
        super().__init__(adata, registry, Arguments(*sizes, likelihood, rotate, translate, angle, image_shape, seed))
        self.sources(adata)  # raises where a section has too few cells

    @staticmethod
    def build(registry: Registry, arguments: Arguments) -> VAE:
        """Return the module for these arguments."""
        a, n_features, counts = arguments, len(registry.genes), registry.setup.counts
        check_likelihood(a.likelihood, registry.setup, a.image_shape)
        check_image_shape(a.image_shape, n_features)
        if a.image_shape is not None:
            n_features //= a.image_shape[0] * a.image_shape[1]
        read = a.n_hidden, counts
        posteriors, priors, angle, of_z = {}, {}, None, NicheEncoder
        if a.rotate and a.angle == "equivariant":
            angle, of_z = EquivariantAngle(n_features, *read), InvariantEncoder
            posteriors["rotation"] = angle
        elif a.rotate:
            posteriors["rotation"] = FreeAngle(n_features, *read, wrapped=a.angle == "wrapped-normal")
        if a.rotate:
            priors["rotation"] = WideAngle() if a.angle == "normal" else UniformAngle()
        posteriors["z"] = NichePosterior(of_z(n_features, 2 * a.n_latent, *read))
        priors["z"] = StandardNormalPrior(a.n_latent)
        if a.translate:
            posteriors["translation"] = NichePosterior(NicheEncoder(n_features, 4, *read, angle))
            priors["translation"] = StandardNormalPrior(2)
        decoder = NicheDecoder(a.likelihood, a.n_latent, n_features, 2 * a.n_hidden, len(registry.batches))
        return VAE(posteriors, priors, decoder)

    def sources(self, adata: AnnData) -> dict[str, Store | Tensor]:
        """Return features, offsets and mask of the cells' neighbourhoods, or of the pixels: see `Model.sources`."""
        a, store = self.arguments, self.registry.store(adata)
        if a.image_shape is not None:
            images = ImageStore(store, a.image_shape)
            offsets = torch.from_numpy(pixel_places(a.image_shape)).expand(*images.shape[:2], 2)
            return {"features": images, "offsets": offsets, "mask": torch.tensor(True).expand(images.shape[:2])}
        near = Neighbourhoods.of(*self._places_of(adata), n_neighbors=a.n_neighbors, radius=a.radius)
        self._check_unchanged(adata, near.offsets)
        features = NeighbourStore(store, near.index)
        return {"features": features, "offsets": torch.from_numpy(near.offsets), "mask": torch.from_numpy(near.mask)}

    def _after_training(self) -> None:
        """Warn if the KL divergence of the validation cells' angle is about the least possible: see `LITTLE`."""
        kl = self.history.get("kl_rotation_validation", pd.Series(dtype=float)).get(self.trainings[-1]["kept_epoch"])
        if kl is not None and kl < LITTLE[self.arguments.angle]:
            free = "" if self.arguments.angle == "equivariant" else ' angle="equivariant" finds them more often.'
            warnings.warn(
                f"the KL divergence of the angle is {kl:.2f} nats, about the least possible: the niches have no "
                f"orientation, or the model did not find it.{free}",
                stacklevel=4,  # the call of the user
            )

    def get_rotation(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        return_dist: bool = False,
        batch_size: int = 4096,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the rotation theta of each niche, in radians counter-clockwise, above -pi and up to pi.

        Only differences of angles between niches of one kind have a meaning: each kind has an orientation of its own
        at which theta is 0. On images, whose y-axis points down, theta is clockwise.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_latent_representation`.
        return_dist
            Whether to return the mean and the standard deviation of q.

        Returns
        -------
        (n,) float32: the means of q(theta); two such arrays with ``return_dist``. The standard deviation is the
        circular one, sqrt(-2 log R) with R the length of the mean of (cos theta, sin theta), in radians. For
        ``angle="normal"`` it is the usual one.

        Raises
        ------
        ValueError
            If the model has no rotation, or as `get_latent_representation`.

        Examples
        --------
        >>> adata.obs["niche_rotation"] = model.get_rotation()  # doctest: +SKIP
        """
        self._require_latent("rotation", "rotate")
        loader = self._loader(adata, indices, batch_size, flags={"return_dist": return_dist}, any_batch=True)
        mean, variance = inference.latent(self.vae, loader, "rotation")
        theta = np.pi - np.remainder(np.pi - mean[:, 0], np.float32(2 * np.pi))
        return (theta, np.sqrt(variance[:, 0])) if return_dist else theta

    def get_translation(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        return_dist: bool = False,
        batch_size: int = 4096,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return where the content of each niche lies after it was turned back by theta, in radii of the neighbourhood.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_latent_representation`.
        return_dist
            Whether to return the mean and the standard deviation of q.

        Returns
        -------
        (n, 2) float32: the means of q; two such arrays with ``return_dist``. The prior has a standard deviation of 0.1.

        Raises
        ------
        ValueError
            If the model has no translation, or as `get_latent_representation`.

        Examples
        --------
        >>> adata.obsm["niche_translation"] = model.get_translation()  # doctest: +SKIP
        """
        self._require_latent("translation", "translate")
        loader = self._loader(adata, indices, batch_size, flags={"return_dist": return_dist}, any_batch=True)
        mean, variance = inference.latent(self.vae, loader, "translation")
        where = -UNIT_OF_TRANSLATION * mean
        return (where, UNIT_OF_TRANSLATION * np.sqrt(variance)) if return_dist else where

    def _require_latent(self, name: str, argument: str) -> None:
        if name not in self.vae.posteriors:
            raise ValueError(f"this model has no {name}: make one with SpatialVAE(adata, {argument}=True).")
