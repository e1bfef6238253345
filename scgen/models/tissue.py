"""What the models of tissue share: positions of the cells that are asked about, and the defaults of the training."""

import math
import warnings
from collections.abc import Callable, Mapping

import numpy as np
from anndata import AnnData

from scgen.arguments import check_number, check_whole
from scgen.data import positions
from scgen.data.checks import Setup, raise_errors
from scgen.data.loader import CellLoader
from scgen.data.registry import Registry
from scgen.models.base import Model

LIKELIHOODS = ("nb", "zinb", "poisson", "normal")
#: Number of minibatches of a training with the default number of epochs, which is in the range below.
N_STEPS, EPOCHS = 3000, (25, 250)


class TissueModel(Model):
    """Base class of the models that read what is around each cell."""

    _epsilon, _unit, _infers_by_batch, _batch_size = 1e-8, "niche", False, 256
    _own_places: np.ndarray | None = None  # of the model's own cells, when they were first read

    def train(
        self,
        max_epochs: int | None = None,
        *,
        batch_size: int | None = None,
        train_size: float = 0.9,
        early_stopping: bool = True,
        patience: int | None = None,
        learning_rate: float = 1e-2,
        kl_start: float = 0.0,
        n_importance_samples: int = 1,
        accelerator: str = "auto",
        devices: int = 1,
        precision: str = "auto",
        seed: int = 0,
        progress: bool = True,
        on_epoch: Callable[[dict[str, float]], object] | None = None,
    ) -> None:
        """Train the model as `Model.train` does, with other defaults and without its ``batch_penalty``.

        ``batch_size=None`` is 256 for `SpatialVAE` and 128 for `MatrixNormalVAE`, whose patches have more places.
        ``max_epochs=None`` makes as many passes as 3000 minibatches take, between 25 and 250. With ``kl_start=0``, the
        KL divergence has no weight at the first step. All latents can then be used before they have a price. With a
        weight of 1 from the start, `SpatialVAE` loses the angle.

        Warns
        -----
        UserWarning
            If the model has an angle whose KL divergence for the validation cells is about the least possible: nothing
            depends on it.
        """
        batch_size = self._batch_size if batch_size is None else check_whole("batch_size", batch_size, 3)
        if max_epochs is None and self.adata is not None:
            share = check_number("train_size", train_size, "a share above 0 and up to 1", above=0, most=1)
            n = share * self.adata.n_obs if self.train_indices is None else len(self.train_indices)
            n_steps = max(round(n / batch_size), 1)
            max_epochs = min(max(math.ceil(N_STEPS / n_steps), EPOCHS[0]), EPOCHS[1])
        super().train(
            max_epochs,
            batch_size=batch_size,
            train_size=train_size,
            early_stopping=early_stopping,
            patience=patience,
            learning_rate=learning_rate,
            kl_start=kl_start,
            n_importance_samples=n_importance_samples,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            seed=seed,
            progress=progress,
            on_epoch=on_epoch,
        )
        self._after_training()

    def _after_training(self) -> None:
        """Warn of what a training did not find."""

    def _loader(
        self, adata, indices, batch_size: int, seed: int = 0, flags: Mapping | None = None, any_batch: bool = False
    ) -> CellLoader:
        # As many cells at a time as other models compute, neighbours included: memory depends on their number.
        loader = super()._loader(adata, indices, batch_size, seed, flags, any_batch)
        if self.registry.setup.spatial_key is not None:
            _warn_of_view(self.adata if adata is None else adata)
        return loader.over(loader.index, max(loader.batch_size // loader.stores["features"].shape[1], 1))

    def _places_of(self, adata: AnnData) -> tuple[np.ndarray, np.ndarray | None]:
        """Return coordinates and sections of the cells, (N, 2) and (N,) or None. Raise ValueError if they are wrong."""
        setup = self.registry.setup
        raise_errors(list(positions.findings(adata, setup)), type(self).__name__)
        return positions.coordinates_of(adata, setup), positions.sections_of(adata, setup)

    def _check_unchanged(self, adata: AnnData, places: np.ndarray) -> None:
        """Raise ValueError if these are the model's own cells, and lie elsewhere than when they were first read."""
        if adata is not self.adata:
            return
        known = self._own_places
        if known is not None and not (known.shape == places.shape and np.allclose(known, places, rtol=0, atol=1e-4)):
            raise ValueError(
                "the positions of the model's cells have changed since the model was made. Restore them, or pass "
                "adata= with the other positions."
            )
        self._own_places = places


def registry_of(name: str, adata: AnnData, image_shape: tuple[int, ...] | None, use_rep: str | None) -> Registry:
    """Return what a model of this name knows about ``adata``, with positions unless the observations are images."""
    registry = Registry.of(adata, labels=False, places=image_shape is None, use_rep=use_rep)
    setup = registry.setup
    if image_shape is None and setup.spatial_key is None:
        raise ValueError(
            f"this AnnData was set up without positions, which {name} needs. Call "
            'scgen.setup_anndata(adata, spatial_key="spatial", ...) first.'
        )
    if unused := [*setup.numeric.values(), *setup.categorical_covariate_keys]:
        raise ValueError(
            f"{name} uses no size factors and no covariates but the batch, and {', '.join(unused)} would be "
            "ignored. Set the data up without them."
        )
    if image_shape is None:
        _warn_of_view(adata)
    return registry


def check_likelihood(likelihood: str, setup: Setup, image_shape: tuple[int, ...] | None) -> None:
    """Raise ValueError if the values that were set up do not suit the likelihood."""
    if likelihood != "normal" and not setup.counts:
        why, fix = "the data were set up with counts=False", "set the counts up"
        if setup.use_rep is not None:
            why, fix = f'the values are those of use_rep="{setup.use_rep}"', "leave use_rep out"
        raise ValueError(f'likelihood="{likelihood}" needs counts, but {why}. Use likelihood="normal", or {fix}.')
    if likelihood != "normal" and image_shape is not None:
        raise ValueError(f'likelihood="{likelihood}" is for spots with the counts of genes. Use "normal" for images.')


def _warn_of_view(adata: AnnData) -> None:
    """Warn if ``adata`` is a view. Five levels up is the call of the user."""
    if adata.is_view:
        warnings.warn(
            "adata is a view, and neighbours are looked for in it alone. Pass whole sections, and choose cells by "
            "indices=.",
            stacklevel=5,
        )
