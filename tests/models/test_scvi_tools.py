"""An independent cross-check: scvi-tools' weights copied in by hand give scvi-tools' numbers."""

import numpy as np
import pytest
import torch
from torch.distributions import kl_divergence

import scgen

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed (the extra named peers)")


def copy_mlp(ours, theirs) -> None:
    """Copy a stack of layers; their one-hots are further columns of the weight, ours are rows of a table."""
    for layer, norm, block in zip(ours.layers, ours.norms, theirs, strict=True):
        weight = block[0].weight
        width = layer.linear.weight.shape[1]
        layer.linear.weight.copy_(weight[:, :width])
        layer.linear.bias.copy_(block[0].bias)
        if len(layer.rows):
            layer.rows["0"].copy_(weight[:, width:].T)
        norm.load_state_dict(block[1].state_dict())


def copy_head(ours, theirs) -> None:
    ours.load_state_dict(theirs.state_dict())


def copy_encoder(ours, theirs) -> None:
    copy_mlp(ours.mlp, theirs.encoder.fc_layers)
    copy_head(ours.mean, theirs.mean_encoder)
    copy_head(ours.log_variance, theirs.var_encoder)


def copy_decoder(ours, module, likelihood: str, dispersion: str) -> None:
    copy_mlp(ours.mlp, module.decoder.px_decoder.fc_layers)
    copy_head(ours.scale, module.decoder.px_scale_decoder[0])
    if likelihood == "zinb":
        copy_head(ours.zi_logits, module.decoder.px_dropout_decoder)
    if likelihood != "poisson" and dispersion == "gene-cell":
        copy_head(ours.dispersion.head, module.decoder.px_r_decoder)
    elif likelihood != "poisson":
        ours.dispersion.log_theta.copy_(module.px_r.T if dispersion == "gene-batch" else module.px_r)


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_the_forward_pass_is_theirs(likelihood, dispersion, n_layers, monkeypatch):
    adata = scgen.simulate_cells(n_cells=200, n_genes=40, n_batches=3, seed=0)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    shared = {"gene_likelihood": likelihood, "dispersion": dispersion, "n_layers": n_layers}
    theirs = scvi.model.SCVI(adata, use_observed_lib_size=False, encode_covariates=True, **shared)
    theirs.train(max_epochs=3, enable_progress_bar=False, accelerator="cpu")
    module = theirs.module.double().eval()
    # Their one-hots are cast by .float(), which would leave float64.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    scgen.setup_anndata(adata, batch_key="batch")
    ours = scgen.SCVI(adata, **shared).vae.double().eval()
    with torch.no_grad():
        # Hardly trained, their library is near one count, where ours is bounded; here it is near the totals.
        module.l_encoder.mean_encoder.bias += 7
        copy_encoder(ours.posteriors["z"], module.z_encoder)
        copy_encoder(ours.posteriors["library"], module.l_encoder)
        ours.posteriors["library"].residual = False
        copy_decoder(ours.decoder, module, likelihood, dispersion)
        ours.priors["library"].mean.copy_(module.library_log_means[0])
        ours.priors["library"].variance.copy_(module.library_log_vars[0])

        x = torch.from_numpy(adata.X.toarray()).double()
        batch = torch.from_numpy(adata.obs["_scvi_batch"].to_numpy(np.int64))
        noise = torch.randn(len(x), 10, dtype=torch.float64), torch.randn(len(x), 1, dtype=torch.float64)
        inferred = module.inference(x, batch[:, None])
        z = inferred["qz"].loc + inferred["qz"].scale * noise[0]
        library = inferred["ql"].loc + inferred["ql"].scale * noise[1]
        generated = module.generative(z, library, batch[:, None])
        losses = module.loss({"X": x, "batch": batch[:, None], "labels": batch[:, None] * 0}, {**inferred}, generated)
        their_terms = {
            "log_likelihood": -losses.reconstruction_loss["reconstruction_loss"],
            "z": losses.kl_local["kl_divergence_z"],
            "library": losses.kl_local["kl_divergence_l"],
        }

        none = torch.zeros(len(x), 0)
        totals = x.sum(1, keepdim=True).log()
        from scgen.data.cells import Cells

        cells = Cells(x, totals, batch, batch * 0, none.long(), none, torch.arange(len(x)))
        q = ours.infer(cells)
        draws = {name: q[name].mean + q[name].variance.sqrt() * e for name, e in zip(q, noise, strict=True)}
        our_terms = {name: kl_divergence(q[name], ours.priors[name](cells)) for name in q}
        our_terms["log_likelihood"] = ours.decoder(draws, cells).log_prob(cells.counts)

    for name, term in their_terms.items():
        np.testing.assert_allclose(our_terms[name].numpy(), term.numpy(), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("likelihood", ["zinb", "nb"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-cell"])
def test_parameters_and_correlations_are_theirs(likelihood, dispersion):
    """Both are means over draws, of other random numbers: they agree as far as these go."""
    adata = scgen.simulate_cells(n_cells=150, n_genes=15, n_batches=2, seed=0)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    shared = {"gene_likelihood": likelihood, "dispersion": dispersion, "use_observed_lib_size": True}
    theirs = scvi.model.SCVI(adata, encode_covariates=True, **shared)
    theirs.train(max_epochs=20, enable_progress_bar=False, accelerator="cpu")
    scgen.setup_anndata(adata, batch_key="batch")
    ours = scgen.SCVI(adata, **shared)
    ours.train(1, accelerator="cpu", progress=False)
    module = theirs.module
    with torch.no_grad():
        # Rates that differ between cells by far more than between draws, and by more than the noise about them.
        module.decoder.px_scale_decoder[0].weight *= 5
        module.z_encoder.var_encoder.bias -= 4
        (module.decoder.px_r_decoder.bias if dispersion == "gene-cell" else module.px_r).add_(2)
        copy_encoder(ours.vae.posteriors["z"], module.z_encoder)
        copy_decoder(ours.vae.decoder, module, likelihood, dispersion)

    found = ours.get_likelihood_parameters(n_samples=500, give_mean=True)
    expected = theirs.get_likelihood_parameters(n_samples=500, give_mean=True)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0.1, atol=0.01 * values.mean(), err_msg=name)

    for kind in ("pearson", "spearman"):
        for batch in ("batch_1", ["batch_1", "batch_2"]):
            asked = {"n_samples": 200, "correlation_type": kind}
            expected = theirs.get_feature_correlation_matrix(transform_batch=batch, **asked)
            found = ours.get_feature_correlation_matrix(batch=batch, **asked)
            assert found.index.equals(expected.index)
            np.testing.assert_allclose(found, expected, atol=0.04)
            assert np.abs(expected.to_numpy() - np.eye(15)).max() > 0.25
