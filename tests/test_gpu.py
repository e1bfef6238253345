"""The same model on a GPU, where there is one; tests/kernels/test_cuda.py then runs on it as well."""

import importlib.util

import numpy as np
import pytest
import torch

import scgen
from scgen.data.loader import CellLoader
from scgen.data.snapshot import Snapshot
from scgen.data.stores import DeviceStore, MemoryStore, on_device
from scgen.kernels import dispatch, reference
from scgen.training.batches import BatchPenalty
from scgen.training.optimizer import Adam

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_training_on_a_gpu_is_as_good(precision):
    adata = scgen.simulate_cells(n_cells=1000, n_genes=100, n_batches=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    elbos = {}
    for accelerator in ("cpu", "gpu"):
        model = scgen.SCVI(adata)
        model.train(30, accelerator=accelerator, precision="32" if accelerator == "cpu" else precision, progress=False)
        elbos[accelerator] = model.get_elbo()
        assert np.isfinite(model.get_latent_representation()).all()
    assert elbos["gpu"] == pytest.approx(elbos["cpu"], rel=0.01)


def test_a_model_trained_on_a_gpu_loads_without_one(tmp_path):
    adata = scgen.simulate_cells(n_cells=100, n_genes=20, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata)
    model.train(1, accelerator="gpu", progress=False)
    model.save(tmp_path / "model")
    loaded = scgen.SCVI.load(tmp_path / "model", adata)
    assert loaded.vae.device.type == "cpu"
    np.testing.assert_allclose(loaded.get_latent_representation(), model.get_latent_representation(), atol=1e-3)


@pytest.mark.parametrize(("posterior", "prior"), [("iaf", "vamp"), ("planar", "flow"), ("normal", "mog")])
def test_flows_and_learned_priors_on_a_gpu_are_as_good(posterior, prior):
    adata, elbos = simulated(), {}
    for accelerator in ("cpu", "gpu"):
        model = scgen.SCVI(adata, posterior=posterior, prior=prior)
        model.train(20, accelerator=accelerator, precision="32", n_importance_samples=2, progress=False)
        elbos[accelerator] = model.get_elbo()
        assert np.isfinite(model.get_latent_representation()).all()
        assert np.isfinite(model.sample_prior(10).X.toarray()).all()
    assert elbos["gpu"] == pytest.approx(elbos["cpu"], rel=0.01)


def simulated(n_cells=1000, n_genes=100):
    adata = scgen.simulate_cells(n_cells=n_cells, n_genes=n_genes, n_batches=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    return adata


def test_triton_is_there():
    assert importlib.util.find_spec("triton"), "torch's CUDA builds bring Triton along; without it, all below is slow"


@pytest.mark.parametrize("kind", ["poisson", "nb", "zinb"])
def test_the_fused_kernel_is_used_and_repeats(kind, monkeypatch):
    torch.manual_seed(0)
    n, genes = 300, 3000
    parameters = [torch.randn(n, genes), torch.randn(genes), 8 + torch.randn(n, 1), torch.randn(genes)]
    parameters += [torch.randn(n, genes), torch.randn(genes)]
    parameters = [values.cuda().requires_grad_() for values in parameters[: {"poisson": 3, "nb": 4, "zinb": 6}[kind]]]
    counts = torch.poisson(torch.rand(n, genes)).cuda()
    results = []
    for _ in range(3):
        value = dispatch.cells_log_prob(counts, *parameters)
        results.append((value, *torch.autograd.grad(value.sum(), parameters)))
    assert all(torch.equal(one, other) for again in results[1:] for one, other in zip(results[0], again, strict=True))
    wide = [values.detach().double().requires_grad_() for values in parameters]
    value = reference.cells_log_prob(counts.double(), *wide)
    for one, other in zip(results[0], (value, *torch.autograd.grad(value.sum(), wide)), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < 1e-5 * other.abs().max()
    monkeypatch.setenv("SCGEN_KERNELS", "reference")
    assert not torch.equal(dispatch.cells_log_prob(counts, *parameters), results[0][0])


def test_values_fit_and_rows_are_those_of_the_host():
    matrix = simulated().X
    store, host = on_device(MemoryStore(matrix), torch.device("cuda")), MemoryStore(matrix)
    assert isinstance(store, DeviceStore)
    index = np.random.default_rng(0).integers(0, 1000, 200)
    assert torch.equal(store.rows(index).cpu(), host.rows(index))
    assert torch.equal(store.rows(index, as_sparse=True).to_dense().cpu(), host.rows(index))


@pytest.mark.parametrize("arguments", [{}, {"dispersion": "gene-batch"}, {"gene_likelihood": "poisson"}])
def test_training_from_the_device_is_that_from_the_host(monkeypatch, arguments):
    elbos = []
    for place in (on_device, lambda store, device: store):
        monkeypatch.setattr("scgen.models.loaders.on_device", place)
        model = scgen.SCVI(simulated(), **arguments)
        model.train(10, accelerator="gpu", precision="32", progress=False)
        elbos.append(model.history["elbo_validation"].to_numpy())
    np.testing.assert_allclose(*elbos, rtol=1e-4)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"dispersion": "gene-batch"}, {"gene_likelihood": "nb"}])
def test_no_step_waits_for_the_device(arguments, reduced):
    adata = simulated(2000, 600)
    model = scgen.SCVI(adata, **arguments)
    store, snapshot = Snapshot.of(model.registry, adata)
    vae = model.vae.cuda().train()
    cells_loader = CellLoader(
        DeviceStore(store, "cuda"), snapshot.columns, batch_size=256, rng=np.random.default_rng(0), device="cuda"
    )
    optimizer, penalty = Adam(vae), BatchPenalty(2, 8)

    def epoch():
        with vae.reduced_products(reduced):
            for cells in cells_loader:
                elbo = vae(cells)
                (elbo.loss(1.0) + penalty(*elbo.distributions["z"], cells.batch)).backward()
                optimizer.step(1e-3)

    epoch()  # kernels are compiled, and memory is taken
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_adam_is_that_of_torch_on_a_gpu():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3).cuda(), torch.nn.Linear(5, 3).cuda()
    theirs.load_state_dict(ours.state_dict())
    adam, optimizer = Adam(ours), torch.optim.Adam(theirs.parameters(), lr=0.1, eps=0.01, weight_decay=1e-6)
    for _ in range(20):
        x = torch.randn(7, 5, device="cuda")
        ours(x).square().sum().backward()
        adam.step(0.1)
        optimizer.zero_grad()
        theirs(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_value_that_is_not_finite_is_named(monkeypatch):
    model = scgen.SCVI(simulated())
    model.train(1, accelerator="gpu", progress=False)
    row, read = model.train_indices[7], DeviceStore.rows

    def damaged(self, index, as_sparse=False):
        values = read(self, index, as_sparse)
        values[index == row, 5] = torch.nan
        return values

    monkeypatch.setattr(DeviceStore, "rows", damaged)
    with pytest.raises(FloatingPointError, match=rf"Cells: cell_{row + 1}; genes: gene_6\."):
        model.train(1, accelerator="gpu", progress=False)


def test_niches_on_a_gpu_are_as_good():
    adata, elbos = scgen.simulate_tissue(n_sections=2, n_rows=8, counts=False, seed=0), {}
    scgen.setup_anndata(adata, spatial_key="spatial", batch_key="section", counts=False)
    for accelerator in ("cpu", "gpu"):
        model = scgen.SpatialVAE(adata, translate=True)
        model.train(20, accelerator=accelerator, precision="32", progress=False)
        elbos[accelerator] = model.get_elbo()
        assert np.isfinite(model.get_latent_representation()).all()
        assert np.isfinite(model.get_rotation()).all()
        assert np.isfinite(model.get_translation()).all()
    assert elbos["gpu"] == pytest.approx(elbos["cpu"], rel=0.02)
