"""A second model in few lines: what `Model` gives to one of other latents, whose decoder explains something else."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

import scgen
from scgen.arguments import check_seed, check_whole
from scgen.data.cells import Cells
from scgen.data.registry import Registry
from scgen.data.stores import MemoryStore
from scgen.models.base import Model
from scgen.modules.posteriors import GaussianPosterior
from scgen.modules.priors import StandardNormalPrior
from scgen.modules.vae import VAE

#: Nats of twelve standardised values under the best Gaussian that does not see the cell.
BLIND = -0.5 * 12 * (np.log(2 * np.pi) + 1)


@dataclass(frozen=True, kw_only=True)
class PlacedCells(Cells):
    """Cells with twelve values of what is near them, (n, 12) float."""

    near: torch.Tensor


class LinearDecoder(torch.nn.Module):
    """p(y | state, niche): what is near a cell, linear in the latents, each value with a deviation of its own."""

    def __init__(self, n_latent: int, n_values: int):
        super().__init__()
        self.mean = torch.nn.Linear(n_latent, n_values)
        self.log_scale = torch.nn.Parameter(torch.zeros(n_values))

    def target(self, cells):
        return cells.near

    def forward(self, latents, cells):
        mean = self.mean(torch.cat([latents["state"], latents["niche"]], -1))
        return Independent(Normal(mean, self.log_scale.exp(), validate_args=False), 1, validate_args=False)


class Places(Model):
    """Infers a state and a niche from the counts; together they explain what is near a cell."""

    @dataclass(frozen=True)
    class Arguments:
        n_latent: int
        seed: int

        def __post_init__(self):
            check_whole("n_latent", self.n_latent, 1, 100)
            check_seed(self.seed)

    def __init__(self, adata, *, n_latent: int = 3, seed: int = 0):
        super().__init__(adata, Registry.of(adata, labels=False), self.Arguments(n_latent, seed))

    Cells = PlacedCells

    def sources(self, adata):
        return {"near": MemoryStore(adata.obsm["near"])}

    @staticmethod
    def build(registry, arguments):
        d = arguments.n_latent
        q = {name: GaussianPosterior(len(registry.genes), d, 32, 1, 0.0) for name in ("state", "niche")}
        p = {name: StandardNormalPrior(d) for name in q}
        return VAE(q, p, LinearDecoder(2 * d, 12), latent="state")


@pytest.fixture(scope="module")
def placed():
    adata = scgen.simulate_cells(n_cells=600, n_genes=200, n_types=3, seed=0)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 12))  # of the three types, which the counts tell
    values = centres[adata.obs["cell_type"].cat.codes.to_numpy()] + 0.3 * rng.standard_normal((600, 12))
    adata.obsm["near"] = (values - values.mean(0)) / values.std(0)
    scgen.setup_anndata(adata, batch_key="batch")
    model = Places(adata)
    model.train(50, accelerator="cpu", progress=False, kl_start=1.0)
    return model


def test_it_trains_and_answers(placed):
    z = placed.get_latent_representation()
    assert z.shape == (600, 3)
    assert "kl_niche_validation" in placed.history
    assert placed.get_elbo(indices=placed.validation_indices) > BLIND + 2
    assert placed.get_marginal_ll(n_mc_samples=50) > placed.get_elbo()
    assert placed.active_units()["active"].any()
    assert str(placed).startswith("Places model of 600 cells x 200 genes")
    assert not hasattr(placed, "get_normalized_expression")


def test_it_is_saved_and_loaded(placed, tmp_path):
    placed.save(tmp_path / "model")
    again = Places.load(tmp_path / "model", placed.adata)
    assert again.arguments == placed.arguments
    assert np.array_equal(again.get_latent_representation(), placed.get_latent_representation())
    assert again.get_elbo() == placed.get_elbo()
    with pytest.raises(scgen.storage.ModelFileError, match="holds a 'Places', not a SCVI"):
        scgen.SCVI.load(tmp_path / "model")


def test_what_is_not_finite_is_named(placed, monkeypatch):
    model = Places(placed.adata)
    model.train(1, accelerator="cpu", progress=False)
    damaged = model.vae.decoder.mean
    monkeypatch.setattr(damaged, "forward", lambda h: torch.nn.functional.linear(h, damaged.weight) * torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        model.train(1, accelerator="cpu", progress=False)


@pytest.mark.parametrize(
    ("sources", "error", "words"),
    [
        ({"near": torch.zeros(1200, 12)}, ValueError, "'near' has 1200 rows; adata has 600 cells"),
        ({"near": MemoryStore(np.zeros((599, 12)))}, ValueError, "'near' has 599 rows; adata has 600 cells"),
        ({"near": np.zeros((600, 12))}, TypeError, "'near' is a ndarray; it takes a tensor or a store"),
        ({"batch": torch.zeros(600)}, ValueError, "'batch' is not a field that PlacedCells adds to Cells"),
        ({"far": torch.zeros(600)}, ValueError, "'far' is not a field that PlacedCells adds to Cells"),
    ],
    ids=["long", "short", "array", "batch", "unknown"],
)
def test_sources_that_do_not_fit_the_cells_are_refused(placed, monkeypatch, sources, error, words):
    monkeypatch.setattr(Places, "sources", lambda self, adata: sources)
    with pytest.raises(error, match=f"Places.sources: {words}"):
        placed.get_elbo()
