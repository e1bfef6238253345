"""Counts that are not whole: how far they are from it is said, and the call that makes them so."""

import re

import anndata
import numpy as np
import pytest
from scipy import sparse

import scgen


@pytest.fixture
def adata():
    return scgen.simulate_cells(n_cells=60, n_genes=20, n_batches=2, seed=0)


def refusal(adata, **arguments):
    with pytest.raises(ValueError, match=r"not (an )?integer") as refused:
        scgen.setup_anndata(adata, **arguments)
    return str(refused.value)


def run_the_call(message, adata):
    """Run the call that a message names, as a user would."""
    call, layer = re.search(
        r'(?:: |round(?:ed)?: )((?:adata = |adata\.layers).*?), then setup_anndata\(adata, layer="(\w+)"', message
    ).groups()
    names = {"adata": adata, "np": np}
    for line in call.split(", adata.layers"):
        exec(line if line.startswith("adata") else "adata.layers" + line, names)
    scgen.setup_anndata(names["adata"], layer=layer)
    return names["adata"].layers[layer]


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, lambda x: x.toarray()])
def test_counts_won_back_from_log1p(adata, form):
    counts = adata.X.toarray()
    adata.X = form(sparse.csr_matrix(np.expm1(np.log1p(counts))))
    distance = np.abs(np.expm1(np.log1p(counts)) - counts).max()
    assert 0 < distance < 0.05
    message = refusal(adata)
    assert f"all lie within {distance:.2g} of whole numbers. They are counts with rounding errors" in message
    found = run_the_call(message, adata)
    np.testing.assert_array_equal(found.toarray() if sparse.issparse(found) else found, counts)


@pytest.mark.parametrize("form", [sparse.csr_matrix, lambda x: x.toarray()])
def test_log1p_of_counts(adata, form):
    counts = adata.X.toarray()
    adata.X = form(sparse.csr_matrix(np.log1p(counts)))
    message = refusal(adata)
    assert "look like log1p of counts" in message
    found = run_the_call(message, adata)
    np.testing.assert_array_equal(found.toarray() if sparse.issparse(found) else found, counts)


def test_rounding_noise_below_zero(adata):
    adata.X = adata.X.toarray()
    adata.X[adata.X == 0] = -1e-7
    message = refusal(adata)
    assert "all lie within 1e-07 of whole numbers" in message
    assert (run_the_call(message, adata) >= 0).all()


def test_fractions_of_a_correction(adata):
    """As SoupX leaves them: a share of each gene's expected background is taken off."""
    counts = adata.X.toarray()
    corrected = np.clip(counts - 0.1 * counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum(), 0, None)
    farthest = np.abs(corrected - np.rint(corrected)).max()
    adata.X = sparse.csr_matrix(corrected)
    message = refusal(adata)
    assert f"the farthest lies {farthest:.2g} from a whole number" in message
    for word in ("SoupX", "RSEM", "counts before them", "counts=False"):
        assert word in message
    np.testing.assert_array_equal(run_the_call(message, adata).toarray(), np.rint(corrected))


def test_a_layer_and_names_that_are_taken(adata):
    adata.layers["counts"] = adata.X.toarray() + 0.001
    adata.X = None
    message = refusal(adata, layer="counts")
    assert 'adata.layers["rounded_counts"] = np.rint(adata.layers["counts"])' in message
    run_the_call(message, adata)


def test_whole_counts_elsewhere_come_first(adata):
    adata.layers["raw"] = adata.X.copy()
    adata.X = adata.X * 1.001
    assert 'setup_anndata(adata, layer="raw")' in refusal(adata)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_of_a_file(adata, tmp_path, form):
    counts = adata.X.toarray()
    adata.X = form(counts + (counts > 0) * np.float32(0.001))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    found = run_the_call(refusal(backed), backed)
    np.testing.assert_array_equal(found.toarray() if sparse.issparse(found) else found, counts)


def test_one_value_far_off_is_not_rounding(adata):
    adata.X.data[-1] = 2.5
    message = refusal(adata)
    assert "the farthest lies 0.5 from a whole number" in message
    assert "but for rounding" not in message


def test_normalised_values_are_not_to_be_rounded(adata):
    x = adata.X.toarray()
    adata.X = x / x.sum(1, keepdims=True) * 1e4
    assert "rint" not in refusal(adata)


@pytest.mark.parametrize("scale", [1, 0.3])
def test_proportions_are_not_to_be_rounded(scale):
    """They all lie near to 0, which is a whole number."""
    adata = scgen.simulate_cells(n_cells=60, n_genes=400, n_batches=2, seed=0)
    x = np.random.default_rng(0).poisson(5.0, adata.shape)
    adata.X = scale * x / x.sum(1, keepdims=True)
    assert adata.X.max() < 0.05 / 2
    for values in (adata.X, np.log1p(adata.X), adata.X * np.random.default_rng(0).uniform(0.5, 1, (60, 1))):
        adata.X = values
        message = refusal(adata)
        assert "rint" not in message
        assert "but for rounding" not in message


def test_values_of_which_rounding_leaves_little_are_not_to_be_rounded(adata):
    adata.X = np.random.default_rng(0).uniform(0, 1, adata.shape)
    assert "rint" not in refusal(adata)


def test_all_names_for_a_layer_of_counts_are_taken(adata):
    for name in ("counts", "rounded_counts", "rounded_counts_2"):
        adata.layers[name] = adata.X.toarray() + 0.3
    adata.X = adata.X.toarray() * 1.001
    assert 'adata.layers["rounded_counts_3"] = np.rint(adata.X)' in refusal(adata)
