"""The networks: sizes, covariates, draws, bounds."""

import dataclasses

import numpy as np
import pytest
import torch

from scgen.data.cells import Cells
from scgen.data.checks import Setup
from scgen.data.loader import CellLoader
from scgen.data.registry import Registry
from scgen.data.stores import MemoryStore
from scgen.models.scvi import SCVI
from scgen.modules.networks import MLP, CovariateLinear, Dropout, SliceBatchNorm
from scgen.modules.priors import LibraryPrior
from scgen.training.start import start_from_data

DEFAULTS = {
    "n_latent": 10,
    "n_hidden": 128,
    "n_layers": 1,
    "dropout_rate": 0.1,
    "gene_likelihood": "zinb",
    "dispersion": "gene",
    "use_observed_lib_size": False,
    "encode_covariates": True,
    "seed": 0,
}


def registry(n_genes: int, n_batches: int = 1, **setup) -> Registry:
    batches = {"batch": [f"b{i}" for i in range(n_batches)]}
    return Registry(Setup(batch_key="batch", **setup), [f"g{i}" for i in range(n_genes)], batches, {})


def some_cells(n: int, n_genes: int, n_batches: int = 1, scale: float = 2.0) -> Cells:
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.poisson(scale, (n, n_genes)).astype(np.float32))
    batch = torch.from_numpy(rng.integers(n_batches, size=n))
    none = torch.zeros(n, 0)
    return Cells(
        counts=counts,
        library=counts.sum(1, keepdim=True).log(),
        batch=batch,
        labels=batch * 0,
        categorical=none.long(),
        continuous=none,
        index=torch.arange(n),
    )


def size(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts():  # of the paper's architecture for CORTEX
    vae = SCVI.build(registry(558), SCVI.Arguments(**DEFAULTS))
    assert size(vae.posteriors["z"]) == 71_424 + 128 + 256 + 2 * 1_290
    assert size(vae.posteriors["library"]) == 71_808 + 2 * 129
    assert size(vae.decoder) == 1_664 + 2 * 71_982 + 558
    assert size(vae) == 292_640


@pytest.mark.parametrize("encode", [True, False])
def test_batches_widen_only_what_sees_them(encode):
    alone, several = (
        SCVI.build(registry(30, n), SCVI.Arguments(**DEFAULTS | {"encode_covariates": encode})) for n in (1, 4)
    )
    added = {name: size(several.posteriors[name]) - size(alone.posteriors[name]) for name in ("z", "library")}
    assert added == ({"z": 4 * 128, "library": 4 * 128} if encode else {"z": 0, "library": 0})
    assert size(several.decoder) - size(alone.decoder) == 4 * 128


@pytest.mark.parametrize(("likelihood", "expected"), [("zinb", True), ("poisson", True), ("normal", False)])
@pytest.mark.parametrize("observed", [True, False])
def test_models_of_counts_have_a_library_observed_or_not(likelihood, expected, observed):
    arguments = DEFAULTS | {"gene_likelihood": likelihood, "use_observed_lib_size": observed}
    assert SCVI.build(registry(5), SCVI.Arguments(**arguments)).has_library is expected


def test_rows_added_are_one_hots_multiplied():
    cells = some_cells(6, 5, n_batches=3)
    categorical = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 0], [1, 1], [2, 0]])
    cells = dataclasses.replace(cells, categorical=categorical, continuous=torch.randn(6, 2))
    layer = CovariateLinear(5, 4, [3, 3, 2], 2)
    x = torch.randn(6, 5)
    one_hots = [
        torch.nn.functional.one_hot(c, n).float()
        for c, n in ((cells.batch, 3), (categorical[:, 0], 3), (categorical[:, 1], 2))
    ]
    joined = torch.cat([x, *one_hots, cells.continuous], dim=1)
    weight = torch.cat([layer.linear.weight.T, *(layer.rows[i] for i in "012"), layer.slopes])
    torch.testing.assert_close(layer(x, cells), joined @ weight + layer.linear.bias)


def test_normalisation_folded_into_a_sparse_first_layer():
    torch.manual_seed(0)
    cells = dataclasses.replace(some_cells(50, 30, 3, scale=0.3), continuous=torch.randn(50, 2))
    mlp = MLP(30, 8, 2, [3], 2)
    for norm in mlp.norms:
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()
    for _ in range(5):
        mlp(cells.counts, cells)  # running statistics
    for _ in range(2):  # the second time with other weights
        mlp.eval()
        x = cells.counts
        for layer, norm in zip(mlp.layers, mlp.norms, strict=True):
            plain = torch.nn.functional.batch_norm(
                layer(x, cells), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
            x = torch.relu(plain)
        asked = cells.counts.to_sparse_csr()
        with torch.inference_mode():
            for _ in range(2):  # the folded layer is made, and then kept
                torch.testing.assert_close(mlp(asked, cells), x)
        assert mlp(asked, cells).requires_grad  # which is not that layer, of which there is no gradient
        with torch.no_grad():
            for weight in mlp.parameters():
                weight.normal_()
        with torch.inference_mode():
            assert not torch.allclose(mlp(asked, cells), mlp.train(False)(asked, cells))


@pytest.mark.parametrize("training", [True, False])
def test_draws_are_normalised_slice_by_slice(training):
    torch.manual_seed(0)
    ours, plain = SliceBatchNorm(4).train(training), torch.nn.BatchNorm1d(4).train(training)
    x = torch.randn(3, 10, 4) * torch.tensor([1.0, 5, 20])[:, None, None]
    torch.testing.assert_close(ours(x), torch.stack([plain(slice_) for slice_ in x]))
    torch.testing.assert_close(ours.running_mean, plain.running_mean)


def test_draws_through_the_model_are_a_loop_over_them():
    vae = SCVI.build(registry(30, 2), SCVI.Arguments(**DEFAULTS)).eval()
    cells = some_cells(8, 30, 2)
    latents = {"z": torch.randn(5, 8, 10), "library": torch.full((5, 8, 1), 4.0)}
    together = vae.decoder(latents, cells).log_prob(cells.counts)
    alone = [vae.decoder({k: v[s] for k, v in latents.items()}, cells).log_prob(cells.counts) for s in range(5)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "normal"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
@pytest.mark.parametrize("extreme", [1.0, 1e4])
def test_no_output_of_a_network_breaks_the_bound(likelihood, dispersion, extreme):
    arguments = DEFAULTS | {"gene_likelihood": likelihood, "dispersion": dispersion}
    vae = SCVI.build(registry(6, 2, labels_key="batch"), SCVI.Arguments(**arguments))
    cells = some_cells(4, 6, 2)
    counts = cells.counts.clone()
    counts[0, 0], counts[1] = 1e6, 1e6  # a library of 6e6 and more
    cells = dataclasses.replace(cells, counts=counts, library=counts.sum(1, keepdim=True).log())
    # Heads that answer +-extreme whatever they are asked.
    signs = torch.Generator().manual_seed(0)
    for name, parameter in vae.named_parameters():
        if extreme > 1 and name.endswith("bias") and "mlp" not in name:
            parameter.data = extreme * (2 * torch.randint(0, 2, parameter.shape, generator=signs).float() - 1)
    torch.manual_seed(0)
    elbo = vae(cells)
    assert elbo.value.isfinite().all()
    elbo.loss().backward()
    gradients = {name: parameter.grad for name, parameter in vae.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert missing == [], "parameters that nothing reaches"
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_library_prior_is_shrunk_to_the_pool():
    rng = np.random.default_rng(0)
    batch = np.repeat([0, 1, 2], [500, 4, 0])
    library = rng.normal(np.array([8.0, 6.0, 0])[batch], 0.5)
    prior = LibraryPrior(3)
    prior.fit(torch.from_numpy(library), torch.from_numpy(batch))
    for b in range(3):
        mine = library[batch == b]
        n, mean, variance = len(mine), mine.mean() if len(mine) else 0, mine.var() if len(mine) else 0
        assert prior.mean[b].item() == pytest.approx((n * mean + 10 * library.mean()) / (n + 10), rel=1e-6)
        assert prior.variance[b].item() == pytest.approx((n * variance + 10 * library.var()) / (n + 10), rel=1e-6)
    assert prior.mean[2].item() == pytest.approx(library.mean(), rel=1e-6)  # a batch without cells


def test_a_layer_more_is_a_layer_more():
    assert len(MLP(5, 8, 3).layers) == 3


def test_what_is_known_from_the_start():
    counts = torch.from_numpy(np.random.default_rng(0).poisson([8, 1, 1, 0], (500, 4)).astype(np.float32))
    vae = SCVI.build(registry(4), SCVI.Arguments(**DEFAULTS))
    none = torch.zeros(500, 0)
    library, batch = counts.sum(1, keepdim=True).log(), torch.zeros(500, dtype=torch.int64)
    columns = {"library": library, "batch": batch, "labels": batch, "categorical": none.long(), "continuous": none}
    start_from_data(vae, CellLoader(MemoryStore(counts.numpy()), columns, np.arange(400)))
    share = (counts / counts.sum(1, keepdim=True)).double()[:400].mean(0)
    np.testing.assert_allclose(vae.decoder.scale.bias.exp().detach(), share + share.mean() * 1e-3, rtol=1e-5)
    assert vae.priors["library"].mean[0].item() == pytest.approx(library[:400].mean().item(), rel=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999999])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    x = torch.ones(1000, 999)  # no multiple of four
    y = Dropout(rate)(x)
    kept = y > 0
    n = x.numel()
    assert abs(kept.sum().item() - n * (1 - rate)) < 5 * (n * rate * (1 - rate)) ** 0.5 + n * 2**-16
    if rate < 0.9:
        assert y.mean().item() == pytest.approx(1, abs=0.01)
        # Neighbours, which share a random number, are independent all the same.
        pairs = (kept.flatten()[:-1] & kept.flatten()[1:]).float().mean().item()
        assert pairs == pytest.approx((1 - rate) ** 2, abs=0.005)
    assert torch.equal(Dropout(rate).eval()(x), x)
