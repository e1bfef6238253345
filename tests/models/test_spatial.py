"""SpatialVAE on simulated tissue: what its answers depend on, what it refuses, and that it is saved whole."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import integrate, sparse, stats
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

import scgen
from scgen.models import loaders
from scgen.storage import ModelFileError


def set_up(adata, **changed):
    scgen.setup_anndata(adata, **{"batch_key": "section", "spatial_key": "spatial", "counts": False} | changed)
    return adata


@pytest.fixture(scope="module")
def tissue():
    return set_up(scgen.simulate_tissue(2, 7, counts=False, seed=0))


@pytest.fixture(scope="module")
def trained(tissue):
    model = scgen.SpatialVAE(tissue, n_latent=4, translate=True)
    model.train(5, batch_size=128, accelerator="cpu", progress=False)
    return model


@pytest.fixture(scope="module")
def represented():
    """Return counts, set up as such, with five values of each cell in obsm."""
    adata = scgen.simulate_tissue(2, 5, n_genes=20, seed=0)
    rng = np.random.default_rng(0)
    adata.obsm["X_scgen"] = np.log1p(adata.X) @ rng.normal(size=(20, 5)).astype(np.float32) + [0, 10, 0, -5, 0]
    return set_up(adata, counts=True)


@pytest.fixture(scope="module")
def of_representation(represented):
    model = scgen.SpatialVAE(represented, use_rep="X_scgen", n_latent=3)
    model.train(2, accelerator="cpu", progress=False)
    return model


def turned(adata, angles: dict[str, float]):
    """Return the cells with each section turned counter-clockwise, and moved."""
    other = adata.copy()
    for section, angle in angles.items():
        rows = (adata.obs["section"] == section).to_numpy()
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        other.obsm["spatial"][rows] = adata.obsm["spatial"][rows] @ turn + 100 * angle
    return other


def test_sections_may_lie_in_any_orientation(trained, tissue):
    angles = {"section_1": 0.8, "section_2": -2.0}
    other = turned(tissue, angles)
    z = trained.get_latent_representation()
    assert z.shape == (tissue.n_obs, 4)
    np.testing.assert_allclose(trained.get_latent_representation(other), z, rtol=1e-2, atol=1e-2 * z.std())
    turn = np.exp(1j * (trained.get_rotation(other) - trained.get_rotation()))
    expected = np.exp(1j * tissue.obs["section"].map(angles).to_numpy(float))
    assert np.quantile(np.abs(turn - expected), 0.999) < 0.01
    np.testing.assert_allclose(trained.get_translation(other), trained.get_translation(), atol=1e-2)
    assert trained.get_elbo(other) == pytest.approx(trained.get_elbo(), rel=1e-2)


def test_the_setup_is_shown(trained):
    table = trained.view_anndata_setup()
    assert table.loc["spatial_key"].tolist() == ['adata.obsm["spatial"]', "2 sections"]


def test_answers_for_some_cells_are_those_of_all(trained):
    rows = [1500, 3, 700]
    for ask in (trained.get_latent_representation, trained.get_rotation, trained.get_translation):
        np.testing.assert_allclose(ask(indices=rows), ask()[rows], rtol=1e-4, atol=1e-5)
    angles = trained.get_rotation()
    assert (angles > -np.pi).all()
    assert (angles <= np.pi).all()


def test_a_neighbour_counts_but_not_a_cell_of_another_section(trained, tissue):
    before = trained.get_latent_representation()
    other = tissue.copy()
    other.X[0] += 5
    changed = np.abs(trained.get_latent_representation(other) - before).max(1) > 1e-6
    places, section = tissue.obsm["spatial"], tissue.obs["section"].to_numpy()
    far = np.linalg.norm(places - places[0], axis=1) > 3
    assert changed[0]
    assert 10 < changed.sum() < 40
    assert not changed[far | (section != section[0])].any()


@pytest.mark.parametrize(("batch_size", "largest"), [(1000, 1000), (3, 30)])
def test_batch_size_is_that_of_cells_and_not_of_niches(trained, batch_size, largest):
    sizes, rows = [], np.arange(150)
    hook = trained.vae.decoder.register_forward_pre_hook(lambda _, given: sizes.append(given[1].mask.numel()))
    z = trained.get_latent_representation(indices=rows, batch_size=batch_size)
    trained.get_elbo(indices=rows, batch_size=batch_size)
    hook.remove()
    assert max(sizes) <= largest
    assert sum(sizes) >= 19 * 150
    np.testing.assert_allclose(z, trained.get_latent_representation()[rows], rtol=1e-4, atol=1e-5)


def test_it_is_saved_and_loaded(trained, tissue, tmp_path):
    trained.save(tmp_path / "model")
    again = scgen.SpatialVAE.load(tmp_path / "model", tissue)
    assert again.arguments == trained.arguments
    assert np.array_equal(again.get_latent_representation(), trained.get_latent_representation())
    assert np.array_equal(again.get_rotation(), trained.get_rotation())
    assert again.get_elbo() == trained.get_elbo()


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
def test_counts(likelihood):
    adata = set_up(scgen.simulate_tissue(1, 5, n_genes=30, seed=0), counts=True, batch_key=None)
    model = scgen.SpatialVAE(adata, likelihood=likelihood)
    model.train(3, batch_size=64, accelerator="cpu", progress=False)
    assert model.history["elbo_train"].iloc[-1] > model.history["elbo_train"].iloc[0]
    few, many = (model.get_marginal_ll(indices=np.arange(100), n_mc_samples=n) for n in (1, 30))
    assert few < many


def test_values_in_obsm_are_read_as_if_they_were_set_up(of_representation, represented):
    same = AnnData(represented.obsm["X_scgen"], obs=represented.obs, obsm={"spatial": represented.obsm["spatial"]})
    model = scgen.SpatialVAE(set_up(same), n_latent=3)
    assert of_representation.arguments == model.arguments
    model.train(2, accelerator="cpu", progress=False)
    assert np.array_equal(of_representation.get_latent_representation(), model.get_latent_representation())
    assert of_representation.get_elbo() == model.get_elbo()


def test_values_in_obsm_start_at_their_means_and_deviations(represented):
    model = scgen.SpatialVAE(represented, use_rep="X_scgen")
    model.train(1, learning_rate=1e-12, accelerator="cpu", progress=False)
    values, sections = represented.obsm["X_scgen"], represented.obs["section"].to_numpy()
    near = np.zeros((represented.n_obs, 19), int)
    for rows in (np.flatnonzero(sections == section) for section in np.unique(sections)):
        places = represented.obsm["spatial"][rows]
        near[rows] = rows[NearestNeighbors(n_neighbors=19).fit(places).kneighbors(places)[1]]
    values = values[near[model.train_indices]].reshape(-1, values.shape[1])  # with those of the neighbours
    decoder, read = model.vae.decoder, model.vae.posteriors["z"].encoder.features.norm
    unit, scale = decoder.unit, decoder.log_scale.detach().exp()
    np.testing.assert_allclose(unit * decoder.mean.bias.detach(), values.mean(0), rtol=1e-4)
    np.testing.assert_allclose(unit * scale, values.std(0), rtol=1e-4)
    np.testing.assert_allclose(read.running_mean, values.mean(0), atol=0.05)
    np.testing.assert_allclose(read.running_var, values.var(0), rtol=0.05)


@pytest.mark.parametrize("unit", [1000.0, 65536.0])
def test_the_unit_of_values_does_not_matter(represented, unit):
    elbos = []
    for factor in (1.0, unit):
        adata = represented.copy()
        adata.obsm["X_scgen"] = factor * adata.obsm["X_scgen"]
        model = scgen.SpatialVAE(adata, use_rep="X_scgen", n_latent=2)
        model.train(3, accelerator="cpu", progress=False)
        elbos.append(model.get_elbo())
    n_values = 19 * represented.obsm["X_scgen"].shape[1]  # the density of each is divided by the factor
    assert elbos[1] == pytest.approx(elbos[0] - n_values * np.log(unit), abs=0.3)


def test_genes_are_not_needed_beside_values_in_obsm(of_representation, represented, tmp_path):
    z = of_representation.get_latent_representation()
    of_representation.save(tmp_path / "model")
    for form in (np.asarray, pd.DataFrame, sparse.csr_matrix):
        other = AnnData(obs=represented.obs, obsm={"spatial": represented.obsm["spatial"]})
        values = form(represented.obsm["X_scgen"])
        other.obsm["X_scgen"] = values.set_index(other.obs_names) if form is pd.DataFrame else values
        assert np.array_equal(of_representation.get_latent_representation(other), z)
        again = scgen.SpatialVAE.load(tmp_path / "model", other)
        assert np.array_equal(again.get_latent_representation(), z)
        assert np.array_equal(again.validation_indices, of_representation.validation_indices)
    assert repr(of_representation).startswith(
        'SpatialVAE model of 950 cells x 5 columns of adata.obsm["X_scgen"]; batches'
    )
    view = of_representation.view_anndata_setup()
    assert view.index.tolist() == ["values", "cells", "batch_key", "spatial_key"]
    assert view.loc["values"].tolist() == ['adata.obsm["X_scgen"]', "950 cells x 5 columns"]


@pytest.fixture(scope="module")
def new_section(tissue):
    """Return a section of a batch that the model does not know, and the same cells named as those of section_1."""
    new = set_up(scgen.simulate_tissue(1, 5, counts=False, seed=9))
    new.obs["section"] = new.obs["section"].astype(str)
    known = new.copy()
    new.obs["section"] = "section_9"
    return new, known


def test_a_section_of_a_new_batch_is_embedded_as_if_its_batch_were_known(trained, new_section):
    new, known = new_section
    for ask in (trained.get_latent_representation, trained.get_rotation, trained.get_translation):
        assert np.array_equal(ask(new), ask(known))
        assert np.array_equal(ask(new, indices=[5, 3]), ask(known, indices=[5, 3]))
    assert trained.active_units(new).equals(trained.active_units(known))
    for ask in (trained.get_elbo, trained.get_reconstruction_error, trained.get_marginal_ll):
        with pytest.raises(ValueError, match=r"has not seen in training: section_9 .*map them .* model.query\(adata\)"):
            ask(new)
    assert np.isfinite(trained.get_elbo(known))
    lacking = new.copy()
    del lacking.obs["section"]
    with pytest.raises(
        ValueError, match=r'"section" is not a column of adata.obs.*one section: adata.obs\["section"\] ='
    ):
        trained.get_latent_representation(lacking)


def test_sections_of_new_batches_are_not_neighbours(trained, new_section):
    new, known = new_section
    both = anndata.concat([new, known], index_unique="-")
    z = trained.get_latent_representation(both)  # at the same places, but of two sections
    np.testing.assert_allclose(z, np.tile(trained.get_latent_representation(known), (2, 1)), rtol=1e-4, atol=1e-5)


def test_a_query_adds_the_batch_and_trains_nothing_else(trained, tissue, new_section, tmp_path):
    new, _ = new_section
    before = {name: weight.clone() for name, weight in trained.vae.state_dict().items()}
    query = trained.query(new)
    assert "new in section: section_9" in repr(query)
    mean = before["decoder.batch"].mean(0)
    assert query.model.vae.decoder.batch.detach()[2].numpy() == pytest.approx(mean.numpy(), abs=1e-7)
    elbo = query.model.get_elbo()
    query.train(5, accelerator="cpu", progress=False)
    assert query.model.get_elbo() > elbo
    for name, weight in query.model.vae.state_dict().items():
        assert torch.equal(weight[:2] if name == "decoder.batch" else weight, before[name]), name
    assert not torch.equal(query.model.vae.decoder.batch[2], mean)
    assert np.array_equal(query.model.get_elbo(tissue, return_mean=False), trained.get_elbo(return_mean=False))
    assert np.array_equal(query.model.get_rotation(tissue), trained.get_rotation())
    assert np.array_equal(query.get_latent_representation(), trained.get_latent_representation(new))
    assert query.transfer_labels("niche").index.equals(new.obs_names)
    with pytest.raises(ValueError, match="typicality compares the expression of single cells, which SpatialVAE"):
        query.typicality()
    query.save(tmp_path / "query")
    again = trained.load_query(tmp_path / "query", new)
    assert again.model.get_elbo() == query.model.get_elbo()
    trained.save(tmp_path / "model")
    with pytest.raises(ModelFileError, match=r"holds a model, not a query .* Load it with SpatialVAE.load\."):
        trained.load_query(tmp_path / "model", new)


def test_a_query_needs_all_genes(trained, new_section):
    with pytest.raises(ValueError, match=r"lacks 1 of the model's 10 genes. A model without a library size needs all"):
        trained.query(new_section[0][:, 1:].copy())


def test_a_query_of_values_in_obsm_needs_no_genes(of_representation, represented):
    some = represented[represented.obs["section"] == "section_1"]
    new = AnnData(obs=some.obs.assign(section="section_9"), obsm=dict(some.obsm))
    query = of_representation.query(new)
    assert 'columns: 5 of 5 (100%), by adata.obsm["X_scgen"]; new in section: section_9' in repr(query)
    assert np.isfinite(query.model.get_elbo())
    with pytest.raises(ValueError, match=r"layer='counts': the model reads adata.obsm\[\"X_scgen\"\], and no layer"):
        of_representation.query(new, layer="counts")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda obsm: obsm.pop("X_scgen"), r'use_rep="X_scgen" is not in adata.obsm \(it has: spatial\)'),
        (lambda obsm: obsm["X_scgen"].__setitem__((3, 0), np.nan), 'obsm.* 1 NaN or infinite value .*cell "cell_4"'),
        (lambda obsm: obsm.update(X_scgen=obsm["X_scgen"].astype(str)), r"does not hold real numbers.*astype\("),
        (lambda obsm: obsm.update(X_scgen=np.zeros((950, 2, 2))), r"has the shape \(950, 2, 2\)"),
        (lambda obsm: obsm.update(X_scgen=np.zeros((950, 0))), r"has the shape \(950, 0\)|has 0 columns, but"),
    ],
    ids=["missing", "nan", "text", "three axes", "no columns"],
)
def test_values_in_obsm_are_checked(represented, of_representation, damage, words):
    other = represented.copy()
    damage(other.obsm)
    with pytest.raises(ValueError, match=words):
        scgen.SpatialVAE(other, use_rep="X_scgen")
    with pytest.raises(ValueError, match=words):
        of_representation.get_latent_representation(other)


def test_values_in_obsm_that_do_not_fit_are_refused(represented, of_representation):
    with pytest.raises(TypeError, match=r"use_rep=\['X_scgen'\] is a list; it takes one name, a string\.$"):
        scgen.SpatialVAE(represented, use_rep=["X_scgen"])
    with pytest.raises(ValueError, match=r'use_rep="X_scgem" is not in .*Did you mean "X_scgen"'):
        scgen.SpatialVAE(represented, use_rep="X_scgem")
    with pytest.raises(ValueError, match='likelihood="nb" needs counts, but the values are those of use_rep="X_scgen"'):
        scgen.SpatialVAE(represented, use_rep="X_scgen", likelihood="nb")
    other = represented.copy()
    other.obsm["X_scgen"] = other.obsm["X_scgen"][:, :4]
    with pytest.raises(ValueError, match=r'obsm\["X_scgen"\] has 4 columns, but the model was made for 5'):
        of_representation.get_latent_representation(other)
    before = represented.obsm["X_scgen"][7, 2]
    represented.obsm["X_scgen"][7, 2] += 1
    try:
        with pytest.raises(ValueError, match=r'other values in adata.obsm\["X_scgen"\].*Restore them, or make a new'):
            of_representation.get_latent_representation()
    finally:
        represented.obsm["X_scgen"][7, 2] = before


def test_columns_of_a_table_in_obsm_are_matched_by_name(represented):
    adata, names = represented.copy(), list("ABCDE")
    adata.obsm["X_scgen"] = pd.DataFrame(adata.obsm["X_scgen"], adata.obs_names, names)
    model = scgen.SpatialVAE(adata, use_rep="X_scgen", n_latent=3)
    model.train(1, accelerator="cpu", progress=False)
    z, other = model.get_latent_representation(), adata.copy()
    for values in (adata.obsm["X_scgen"][list("CEBAD")], adata.obsm["X_scgen"].to_numpy()):
        other.obsm["X_scgen"] = values
        assert np.array_equal(model.get_latent_representation(other), z)
        assert np.array_equal(model.query(other).get_latent_representation(), z)
    other.obsm["X_scgen"] = adata.obsm["X_scgen"].rename(columns={"B": "F"})
    with pytest.raises(ValueError, match=r"lacks the model's columns B\. Compute it in the same way"):
        model.get_latent_representation(other)


def test_values_of_neighbours_that_change_are_noticed(of_representation, represented):
    places = represented.obsm["spatial"][represented.obs["section"] == "section_1"]
    neighbour = NearestNeighbors(n_neighbors=2).fit(places).kneighbors(places[[100]])[1][0, 1]
    other = represented.copy()
    for adata, words in ((represented, "the model's AnnData has changed"), (other, "1 NaN or infinite value")):
        assert np.isfinite(of_representation.get_latent_representation(adata, indices=[100])).all()
        before = adata.obsm["X_scgen"][neighbour, 2]
        adata.obsm["X_scgen"][neighbour, 2] = before + 1 if adata is represented else np.nan
        try:
            for ask in (of_representation.get_latent_representation, of_representation.get_rotation):
                with pytest.raises(ValueError, match=words):
                    ask(adata, indices=[100])
        finally:
            adata.obsm["X_scgen"][neighbour, 2] = before


def test_an_angle_that_collapses_is_reported(tissue):
    model = scgen.SpatialVAE(tissue, angle="wrapped-normal")
    with pytest.warns(UserWarning, match='the angle is .* nats, about the least.* angle="equivariant" finds them'):
        model.train(2, kl_start=100.0, accelerator="cpu", progress=False)


def test_an_equivariant_angle_is_never_wider_than_half_a_radian(tissue):
    model = scgen.SpatialVAE(tissue)
    with pytest.warns(UserWarning, match=r"the angle is 1.1\d nats, about the least possible"):
        model.train(3, kl_start=1000.0, accelerator="cpu", progress=False)
    _, deviation = model.get_rotation(return_dist=True)
    assert 0.45 < deviation.min() <= deviation.max() <= 0.5
    # KL from the uniform distribution, of a normal with a deviation of 0.5 that is wrapped: by quadrature.
    theta = np.linspace(-np.pi, np.pi, 20001)
    density = sum(stats.norm.pdf(theta + 2 * np.pi * k, scale=0.5) for k in range(-4, 5))
    least = integrate.trapezoid(density * np.log(density * 2 * np.pi), theta)
    assert model.history["kl_rotation_validation"].min() > least - 1e-5


def test_deviations_are_those_of_draws(trained):
    rows = np.arange(0, 1800, 90)
    theta, of_theta = trained.get_rotation(indices=rows, return_dist=True)
    shift, of_shift = trained.get_translation(indices=rows, return_dist=True)
    assert np.array_equal(theta, trained.get_rotation(indices=rows))
    assert np.array_equal(shift, trained.get_translation(indices=rows))
    (cells,) = loaders.of_question(trained, None, rows, len(rows))
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = {name: q.rsample((20_000,)).numpy() for name, q in trained.vae.infer(cells).items()}
    np.testing.assert_allclose(of_theta, stats.circstd(drawn["rotation"][..., 0], axis=0), rtol=0.03)
    off = stats.circmean(drawn["rotation"][..., 0] - theta, np.pi, -np.pi, axis=0)
    np.testing.assert_allclose(off, 0, atol=0.02)
    np.testing.assert_allclose(of_shift, 0.1 * drawn["translation"].std(0), rtol=0.03)
    np.testing.assert_allclose(shift, -0.1 * drawn["translation"].mean(0), atol=0.004)


def test_an_angle_that_is_not_wrapped(tissue):
    model = scgen.SpatialVAE(tissue, angle="normal")
    model.train(1, accelerator="cpu", progress=False)
    theta, deviation = model.get_rotation(return_dist=True)
    assert theta.shape == deviation.shape == (tissue.n_obs,)
    assert model.history["kl_rotation_validation"].item() > 0


def test_without_rotation(tissue):
    model = scgen.SpatialVAE(tissue, rotate=False)
    model.train(1, accelerator="cpu", progress=False)
    with pytest.raises(ValueError, match=r"this model has no rotation: make one with SpatialVAE\(adata, rotate=True\)"):
        model.get_rotation()
    with pytest.raises(ValueError, match=r"this model has no translation: .*translate=True"):
        model.get_translation()


def test_what_is_missing_is_said(tissue):
    plain = set_up(tissue.copy(), spatial_key=None)
    with pytest.raises(ValueError, match=r'without positions.*scgen\.setup_anndata\(adata, spatial_key="spatial"'):
        scgen.SpatialVAE(plain)
    with pytest.raises(ValueError, match="a section has 931 cells, but each cell needs 2000 neighbours"):
        scgen.SpatialVAE(tissue, n_neighbors=2000)
    with pytest.raises(ValueError, match='likelihood="nb" needs counts'):
        scgen.SpatialVAE(tissue, likelihood="nb")


def test_positions_that_change_are_noticed(trained, tissue):
    places = tissue.obsm["spatial"].copy()
    try:
        for damage, words in (
            (lambda a: a.__setitem__(slice(None), a[::-1].copy()), "the positions of the model's cells have changed"),
            (lambda a: a.__setitem__((3, 0), np.nan), "has 1 cell without coordinates"),
        ):
            damage(tissue.obsm["spatial"])
            with pytest.raises(ValueError, match=words):
                trained.get_latent_representation()
            tissue.obsm["spatial"][:] = places
    finally:
        tissue.obsm["spatial"][:] = places


def test_views_are_warned_of_where_they_are_passed(trained, tissue):
    some = tissue[:500]
    asked = (trained.get_latent_representation, trained.get_rotation, trained.get_elbo, scgen.SpatialVAE)
    for ask in asked:
        with pytest.warns(UserWarning, match="adata is a view, and neighbours are looked for in it alone") as caught:
            ask(some)
        assert caught[0].filename == __file__


@pytest.mark.parametrize("unused", ["size_factor_key", "categorical_covariate_keys", "continuous_covariate_keys"])
def test_columns_that_would_be_ignored_are_refused(tissue, unused):
    adata = tissue.copy()
    adata.obs["more"] = np.linspace(1, 2, adata.n_obs)
    set_up(adata, **{unused: "more" if unused == "size_factor_key" else ["more"]})
    with pytest.raises(ValueError, match="no covariates but the batch, and more would be ignored"):
        scgen.SpatialVAE(adata)
    del adata.obsm["spatial"]
    scgen.SCVI(adata, gene_likelihood="normal") if unused != "size_factor_key" else None  # reads no positions


@pytest.mark.parametrize(
    ("damage", "changed", "words"),
    [
        (lambda a: None, {"spatial_key": "spatail"}, 'spatial_key="spatail" is not in adata.obsm.*Did you mean'),
        (lambda a: a.obsm["spatial"].__setitem__((3, 0), np.nan), {}, "has 1 cell without coordinates.*cell_4"),
        (lambda a: a.obsm.update(spatial=a.obsm["spatial"][:, [0, 1, 1]]), {}, r"has the shape \(1862, 3\).*\[:, :2\]"),
        (
            lambda a: a.obsm["spatial"].__setitem__(4, a.obsm["spatial"][5]),
            {},
            "2 cells at the place of another",
        ),
        (lambda a: a.obsm.update(spatial=a.obsm["spatial"].astype(str)), {}, "does not hold numbers"),
        (lambda a: None, {"section_key": "slice"}, 'section_key="slice" is not a column of adata.obs'),
        (lambda a: None, {"spatial_key": None, "section_key": "section"}, "is given, but spatial_key is not"),
        (
            lambda a: None,
            {"batch_key": "cell_type", "section_key": "section"},
            "sections have cells of several batches",
        ),
        (lambda a: a.obs.__setitem__("lists", [[1]] * a.n_obs), {"section_key": "lists"}, "cannot name sections"),
        (lambda a: a.obsm.update(spatial=a.obsm["spatial"] * 1e200), {}, "with coordinates beyond 1e"),
    ],
    ids=["key", "nan", "three columns", "one place", "text", "section", "section alone", "batches", "lists", "huge"],
)
def test_bad_positions_are_refused(tissue, damage, changed, words):
    adata = tissue.copy()
    damage(adata)
    with pytest.raises(ValueError, match=words):
        set_up(adata, **changed)


@pytest.mark.parametrize(("step", "units"), [(1, ""), (2, r" \* \[0.5, 0.75\*\*0.5\]")])
def test_columns_of_the_array_become_distances(step, units):
    row, column = np.divmod(np.arange(30), 6)
    obs = {"array_row": row, "array_col": step * column + (step - 1) * row % 2}  # Visium's columns count half steps
    adata = AnnData(np.ones((30, 2), np.float32), obs=pd.DataFrame(obs, index=[f"spot_{i}" for i in range(30)]))
    text = r'adata.obsm\["spatial"\] = adata.obs\[\["array_col", "array_row"\]\].to_numpy\(float\)'
    with pytest.raises(ValueError, match=text + units + r"\."):
        scgen.setup_anndata(adata, spatial_key="spatial")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_niches_are_found_whatever_their_orientation(seed):
    tissue = scgen.simulate_tissue(n_sections=2, n_rows=14, counts=False, seed=seed)
    tissue = tissue[tissue.obs["niche"].isin(["sectors", "mirrored", "bands 1|2|3", "mixed"])].copy()
    types = pd.get_dummies(tissue.obs["cell_type"], dtype="float32")
    adata = AnnData(types, obs=tissue.obs, obsm={"spatial": tissue.obsm["spatial"]})
    scgen.setup_anndata(adata, spatial_key="spatial", section_key="section", counts=False)
    turned, centre = adata.copy(), adata.obs["is_centre"].to_numpy()
    turned.obsm["spatial"] = adata.obsm["spatial"] @ [[0, 1], [-1, 0]]  # by 90 degrees
    agreement = {}
    for rotate in (True, False):
        model = scgen.SpatialVAE(adata, n_latent=5, rotate=rotate, seed=seed)
        model.train(30, batch_size=64, accelerator="cpu", progress=False, seed=seed)
        z, after = model.get_latent_representation(), model.get_latent_representation(turned)
        found = KMeans(4, n_init=10, random_state=0).fit_predict(z[centre])
        agreement[rotate] = adjusted_rand_score(adata.obs["niche"][centre], found)
        if rotate:
            assert min(np.corrcoef(one, other)[0, 1] for one, other in zip(z.T, after.T, strict=True)) > 0.999
    assert agreement[True] > max(0.7, agreement[False] + 0.1)
