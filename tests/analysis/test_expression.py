"""Importance-weighted expression, and the forms in which expression is returned."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy import sparse, stats
from torch.utils._python_dispatch import TorchDispatchMode

import scgen


def tiny(likelihood, observed_library) -> scgen.SCVI:
    """Return a model of one latent, and perhaps the library, whose q is far from the posterior; and its cells."""
    adata = scgen.simulate_cells(n_cells=40, n_genes=6, n_batches=2, seed=5)
    adata.X = sparse.csr_matrix(np.minimum(adata.X.toarray(), 6) + np.eye(40, 6, dtype=np.float32))
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(
        adata, n_latent=1, n_hidden=4, gene_likelihood=likelihood, use_observed_lib_size=observed_library, seed=1
    )
    model.train(1, accelerator="cpu", progress=False)
    with torch.no_grad():
        model.vae.decoder.scale.weight.copy_(3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
        posterior = model.vae.posteriors["z"]
        posterior.mean.weight.zero_()
        posterior.mean.bias.fill_(0.8)
        posterior.log_variance.weight.zero_()
        posterior.log_variance.bias.fill_(0.3)
        if not observed_library:
            model.vae.posteriors["library"].log_variance.bias.fill_(0.0)
    return model


def posterior_mean(model, observed_library) -> tuple[np.ndarray, np.ndarray]:
    """Return E[rho | x] and E[l rho | x] of the first eight cells, (8, 6) each, by quadrature over z and log l."""
    adata, decoder = model.adata, {n: v.double().numpy() for n, v in model.vae.decoder.state_dict().items()}
    z = np.linspace(-7, 7, 701)
    batch = adata.obs["batch"].cat.codes.to_numpy()
    means = []
    for x, s in zip(adata.X.toarray()[:8], batch, strict=False):
        h = z[:, None] @ decoder["mlp.layers.0.linear.weight"].T + decoder["mlp.layers.0.linear.bias"]
        h += decoder["mlp.layers.0.rows.0"][s]
        norm = {key: decoder[f"mlp.norms.0.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
        h = (h - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) * norm["weight"] + norm["bias"]
        h = np.maximum(h, 0)
        rho = np.exp(h @ decoder["scale.weight"].T + decoder["scale.bias"])
        rho /= rho.sum(1, keepdims=True)
        log_l = np.array([np.log(x.sum())])
        prior_l = np.zeros(1)
        if not observed_library:
            m, v = (getattr(model.vae.priors["library"], name)[s].item() for name in ("mean", "variance"))
            log_l = np.linspace(m - 7 * v**0.5, m + 7 * v**0.5, 301)
            log_l = log_l[log_l > 0]  # the decoder's libraries are of one count at least
            prior_l = stats.norm.logpdf(log_l, m, v**0.5)
        mu = np.exp(log_l)[:, None, None] * rho
        if "zi_logits.weight" in decoder:
            theta = np.exp(decoder["dispersion.log_theta"])
            pi = 1 / (1 + np.exp(-(h @ decoder["zi_logits.weight"].T + decoder["zi_logits.bias"])))
            pmf = (1 - pi) * stats.nbinom.pmf(x, theta, theta / (theta + mu)) + pi * (x == 0)
            log_p = np.log(np.maximum(pmf, 1e-300)).sum(-1)
        else:
            log_p = stats.poisson.logpmf(x, mu).sum(-1)
        log_p += prior_l[:, None] + stats.norm.logpdf(z)
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        means.append(((p[..., None] * rho).sum((0, 1)), (p[..., None] * mu).sum((0, 1))))
    return tuple(np.array(of) for of in zip(*means, strict=True))


@pytest.mark.parametrize("likelihood", ["poisson", "zinb"])
@pytest.mark.parametrize("observed_library", [True, False])
def test_importance_weights_lead_to_the_posterior_mean(likelihood, observed_library):
    model = tiny(likelihood, observed_library)
    truth = posterior_mean(model, observed_library)

    def error(n_samples, weights, size=1, return_mean=True) -> float:
        found = model.get_normalized_expression(
            indices=range(8),
            library_size=size,
            n_samples=n_samples,
            weights=weights,
            return_mean=return_mean,
            return_numpy=True,
        )
        expected = truth[size == "latent"]
        return np.abs((found if return_mean else found.mean(0)) - expected).mean() / expected.mean()

    for size in (1, "latent"):
        many = error(2000, "importance", size)
        assert many < 0.06
        assert error(50, "importance", size) > 2 * many
        assert error(500, "uniform", size) > 4 * many
    assert error(2000, "importance", return_mean=False) < 0.06


def test_resampled_draws_are_draws(trained):
    """Each of them is one of the draws that q gave this cell; where weights differ, some come repeatedly."""
    ask = {"n_samples": 30, "library_size": "latent", "return_mean": False, "indices": range(20)}
    drawn = trained.get_normalized_expression(weights="importance", **ask)
    given = trained.get_normalized_expression(**ask)  # with the same seed
    same = np.abs(drawn[:, None] / given[None] - 1).max(-1) < 1e-5  # (drawn, given, cells)
    assert (same.sum(1) == 1).all()
    assert (same.sum(0).max(0) > 1).all()


@pytest.mark.parametrize("size", [True, False, 0, -1, float("nan"), float("inf"), "observed", None])
def test_library_sizes_are_positive_numbers(trained, size):
    with pytest.raises(
        (TypeError, ValueError), match=rf"library_size={size!r}; it takes a positive number or \"latent\""
    ):
        trained.get_normalized_expression(library_size=size)


def test_weights_are_named(trained):
    with pytest.raises(ValueError, match="weights='Importance' is unknown"):
        trained.get_normalized_expression(weights="Importance", n_samples=10)
    with pytest.raises(ValueError, match="n_samples=100"):
        trained.get_normalized_expression(weights="importance")


@pytest.fixture
def asked() -> dict:
    return {"batch_size": 50, "gene_list": ["gene_7", "gene_2", "gene_30"], "library_size": 1e4, "batch": "average"}


@pytest.mark.parametrize("draws", [{}, {"n_samples": 3}, {"n_samples": 3, "return_mean": False}])
def test_arrays_are_filled(trained, asked, draws, tmp_path):
    expected = trained.get_normalized_expression(return_numpy=True, **asked, **draws)
    h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr")
    with h5py.File(tmp_path / "file.h5", "w") as file:
        arrays = {
            "numpy": np.full(expected.shape, np.nan, np.float32),
            "double": np.full(expected.shape, np.nan),
            "memmap": np.memmap(tmp_path / "memmap", np.float32, "w+", shape=expected.shape),
            "h5py": file.create_dataset("x", expected.shape, "f4"),
            "zarr": zarr.open_array(tmp_path / "x.zarr", mode="w", shape=expected.shape, dtype="f4"),
        }
        for name, array in arrays.items():
            assert trained.get_normalized_expression(out=array, **asked, **draws) is array
            assert np.array_equal(array[:], expected), name
        assert np.array_equal(np.memmap(tmp_path / "memmap", np.float32, "r", shape=expected.shape), expected)


def test_arrays_that_cannot_be_filled(trained, asked, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file.create_dataset("x", (120, 3), "f4")
    frozen = np.zeros((120, 3), np.float32)
    frozen.flags.writeable = False
    with h5py.File(tmp_path / "file.h5") as file:
        for out, error, words in (
            (np.zeros((120, 30)), ValueError, r"shape \(120, 30\).*\(120, 3\)"),
            (np.zeros((2, 120, 3)), ValueError, r"shape \(120, 3\)"),
            (np.zeros((120, 3), int), ValueError, "int64.*floats"),
            (np.zeros((120, 3), np.float16), ValueError, "float16.*32 bits"),  # its largest number is 65504
            (torch.zeros(120, 3), ValueError, "torch.float32.*numpy.memmap"),
            ([[0.0] * 3] * 120, TypeError, "list"),
            (frozen, ValueError, "opened for writing"),
            (file["x"], ValueError, "opened for writing"),
        ):
            with pytest.raises(error, match=words):
                trained.get_normalized_expression(out=out, **asked)
    kept = np.full((120, 3), 7.0)
    for below, words in ((1.0, "one of them"), (-1.0, "sparse_below=-1.0")):
        with pytest.raises(ValueError, match=words):
            trained.get_normalized_expression(out=kept, sparse_below=below, **asked)
    assert (kept == 7).all()  # what is refused is not written to


def test_small_values_become_zeros(trained, asked):
    dense = trained.get_normalized_expression(return_numpy=True, **asked)
    below = float(np.sort(dense, axis=None)[dense.size // 2])  # one of the values, which stays
    found = trained.get_normalized_expression(sparse_below=below, **asked)
    assert found.format == "csr"
    assert found.nnz == (dense >= below).sum() == dense.size // 2
    assert np.array_equal(found.toarray(), np.where(dense < below, 0, dense))
    draws = {"n_samples": 3, "return_mean": False}
    assert trained.get_normalized_expression(sparse_below=below, return_numpy=True, **asked).format == "csr"
    several = trained.get_normalized_expression(sparse_below=below, **asked, **draws)
    each = trained.get_normalized_expression(**asked, **draws)
    assert len(several) == 3
    for matrix, values in zip(several, each, strict=True):
        assert np.array_equal(matrix.toarray(), np.where(values < below, 0, values))
    for wrong in (0, -1.0, float("nan"), True, "small"):
        with pytest.raises((TypeError, ValueError), match="sparse_below"):
            trained.get_normalized_expression(sparse_below=wrong)


def test_normal_values_are_neither_cut_nor_scaled(cells):
    adata = cells.copy()
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, gene_likelihood="normal", n_latent=2, n_hidden=8)
    model.train(1, accelerator="cpu", progress=False)
    with pytest.raises(ValueError, match="has negative values"):
        model.get_normalized_expression(sparse_below=0.1)
    kept = np.full(adata.shape, 7.0)
    for size in (1e4, "latent"):
        with pytest.raises(ValueError, match=f"has no library size: library_size={size!r}"):
            model.get_normalized_expression(library_size=size, out=kept)
    assert (kept == 7).all()
    weighted = model.get_normalized_expression(weights="importance", n_samples=20, batch="average")
    assert np.isfinite(weighted).all(axis=None)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.n = max(self.n, result.numel())
        return result


class Sink:
    """An array that forgets what is written, but for its sum."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape):
        self.shape, self.total = shape, 0.0

    def __setitem__(self, key, values):
        self.total += values.sum(dtype=float)


@pytest.fixture(scope="module")
def wide():
    adata = scgen.simulate_cells(n_cells=50, n_genes=400, n_batches=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, n_latent=2, n_hidden=8)
    model.train(1, accelerator="cpu", progress=False)
    # The first time, modules are imported and kernels compiled, with much memory.
    for asked in ({"weights": "importance"}, {"library_size": "latent"}, {"sparse_below": 1e6}):
        memory(model, n_samples=2, **asked)
    return model


def memory(model, **asked):
    """Return what 2,000 cells, the same few again and again, in blocks of 40 are answered; and what it took.

    That is the number of elements of the largest tensor, and the peak of NumPy's memory in bytes.
    """
    tracemalloc.start()
    with Largest() as largest:
        answer = model.get_normalized_expression(indices=np.resize(np.arange(50), 2_000), batch_size=40, **asked)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return answer, largest.n, peak


def test_whole_arrays_are_noticed(wide):
    _, largest, peak = memory(wide)
    assert largest >= 2_000 * 400
    assert peak >= 2_000 * 400 * 4


@pytest.mark.parametrize(
    "asked",
    [
        {"n_samples": 2},
        {"batch": "average", "library_size": "latent"},
        {"n_samples": 3, "weights": "importance"},
        {"n_samples": 3, "weights": "importance", "return_mean": False},
    ],
)
def test_no_more_than_a_block_is_held(wide, asked):
    """A block has 16,000 elements, the index of the cells 2,000, a whole draw 800,000."""
    n_draws = 1 if asked.get("return_mean", True) else 3
    sink = Sink((2_000, 400) if n_draws == 1 else (3, 2_000, 400))
    _, largest, peak = memory(wide, out=sink, **asked)
    assert largest <= 2 * 16_000
    assert peak < 1e6
    if "library_size" not in asked:
        assert sink.total == pytest.approx(n_draws * 2_000, rel=1e-3)
    matrices, largest, peak = memory(wide, sparse_below=1e6, **asked)
    assert largest <= 2 * 16_000
    assert peak < 1e6
    for matrix in [matrices] if n_draws == 1 else matrices:
        assert matrix.shape == (2_000, 400)
        assert matrix.nnz == 0
