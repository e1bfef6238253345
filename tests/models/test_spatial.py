"""SpatialVAE on simulated tissue: what its answers depend on, what it refuses, and that it is saved whole."""

import numpy as np
import pytest

import scgen


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


def test_an_angle_that_collapses_is_reported(tissue):
    model = scgen.SpatialVAE(tissue, angle="wrapped-normal")
    with pytest.warns(UserWarning, match='the angle holds only .* nats.* angle="equivariant" finds them'):
        model.train(2, kl_start=100.0, accelerator="cpu", progress=False)


def test_an_angle_that_is_not_wrapped(tissue):
    model = scgen.SpatialVAE(tissue, angle="normal")
    model.train(1, accelerator="cpu", progress=False)
    assert model.get_rotation().shape == (tissue.n_obs,)
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
    with pytest.warns(UserWarning, match="adata is a view, and neighbours are looked for in it alone"):
        trained.get_latent_representation(tissue[:500])


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
