"""MatrixNormalVAE on spots and images: what its answers depend on, what it refuses, and that it is saved whole."""

import numpy as np
import pytest
from anndata import AnnData

import scgen

SIDE, N_GENES = 16, 6


def section(rng: np.random.Generator, xy: np.ndarray) -> np.ndarray:
    """Draw counts whose means change smoothly over the section."""
    waves = np.sin(xy @ rng.normal(0, 0.5, (2, N_GENES)) + rng.uniform(0, 6, N_GENES))
    return rng.poisson(8 * np.exp(waves)).astype(np.float32) + 1


def tissue(n_sections: int = 2, **changed) -> AnnData:
    rng = np.random.default_rng(0)
    xy = np.stack(np.divmod(np.arange(SIDE**2), SIDE)[::-1], 1).astype(float)
    adata = AnnData(np.concatenate([section(rng, xy) for _ in range(n_sections)]))
    adata.obs["section"] = np.repeat([f"section_{i + 1}" for i in range(n_sections)], SIDE**2)
    adata.obsm["spatial"] = np.tile(xy, (n_sections, 1))
    scgen.setup_anndata(adata, **{"batch_key": "section", "spatial_key": "spatial"} | changed)
    return adata


@pytest.fixture(scope="module")
def spots() -> AnnData:
    return tissue()


@pytest.fixture(scope="module")
def trained(spots) -> scgen.MatrixNormalVAE:
    model = scgen.MatrixNormalVAE(spots, n_maps=3, patch_size=5, n_hidden=16, covariance="full")
    model.train(8, batch_size=64, accelerator="cpu", progress=False)
    return model


def test_maps_are_those_of_the_spots(trained, spots):
    maps = trained.get_latent_representation()
    assert maps.shape == (spots.n_obs, 3 * 3 * 3)
    assert trained.history["elbo_validation"].iloc[-1] > trained.history["elbo_validation"].iloc[0]
    rows = [300, 3, 70]
    np.testing.assert_allclose(trained.get_latent_representation(indices=rows), maps[rows], rtol=1e-4, atol=1e-5)
    mean, variance = trained.get_latent_representation(return_dist=True)
    assert np.array_equal(mean, maps)
    assert (variance > 0).all()
    assert trained.active_units()["active"].any()
    assert trained.get_marginal_ll(n_mc_samples=30) > trained.get_elbo()
    assert str(trained).startswith("MatrixNormalVAE model of 512 cells x 6 genes")
    assert "nats per patch" in str(trained)


def test_unit_origin_and_order_of_the_spots_mean_nothing(trained, spots):
    order = np.random.default_rng(1).permutation(spots.n_obs)
    other = spots[order].copy()
    other.obsm["spatial"] = 137.0 * other.obsm["spatial"] + [500, -20]
    maps = trained.get_latent_representation()
    np.testing.assert_allclose(trained.get_latent_representation(other), maps[order], rtol=1e-4, atol=1e-5)


def test_spots_of_the_patch_count_and_no_others(trained, spots):
    before = trained.get_latent_representation()
    other = spots.copy()
    here = 7 * SIDE + 7
    other.X[here] += 20
    changed = np.abs(trained.get_latent_representation(other) - before).max(1) > 1e-6
    near = (np.abs(spots.obsm["spatial"] - spots.obsm["spatial"][here]) <= 2).all(1)
    assert np.array_equal(changed, near & (spots.obs["section"] == "section_1").to_numpy())


@pytest.mark.parametrize(("train_size", "n_training"), [(0.9, 461), (0.25, 128)])
def test_the_default_training_has_3000_minibatches(spots, train_size, n_training):
    def stop(row):
        raise KeyboardInterrupt  # ends the training

    model = scgen.MatrixNormalVAE(spots, n_maps=1, n_hidden=2, patch_size=3)
    model.train(batch_size=10, train_size=train_size, accelerator="cpu", progress=False, on_epoch=stop)
    assert len(model.train_indices) == n_training
    n_steps = model.trainings[-1]["max_epochs"] * n_training / 10
    assert n_steps == pytest.approx(3000, rel=0.05)


def test_neighbours_with_large_row_numbers_are_told_apart(spots):
    model = scgen.MatrixNormalVAE(spots, n_hidden=4)
    model._own_places = np.array([[300_000, 300_001]])
    with pytest.raises(ValueError, match="the positions of the model's cells have changed"):
        model._check_unchanged(spots, np.array([[300_000, 300_002]]))


def test_it_is_saved_and_loaded(trained, spots, tmp_path):
    trained.save(tmp_path / "model")
    again = scgen.MatrixNormalVAE.load(tmp_path / "model", spots)
    assert again.arguments == trained.arguments
    assert np.array_equal(again.get_latent_representation(), trained.get_latent_representation())
    assert again.get_elbo() == trained.get_elbo()


def test_a_training_is_repeated_to_the_last_bit(spots):
    maps = []
    for _ in range(2):
        model = scgen.MatrixNormalVAE(spots, n_maps=2, n_hidden=8, patch_size=5, seed=3)
        model.train(2, seed=5, accelerator="cpu", progress=False)
        maps.append(model.get_latent_representation())
    assert np.array_equal(*maps)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
@pytest.mark.parametrize(("covariance", "rank"), [("diagonal", 1), ("independent", None)])
def test_every_likelihood(spots, likelihood, covariance, rank):
    sizes = {"n_maps": 2, "n_hidden": 8, "patch_size": 5}
    model = scgen.MatrixNormalVAE(spots, likelihood=likelihood, covariance=covariance, rank=rank, **sizes)
    model.train(3, batch_size=64, accelerator="cpu", progress=False)
    assert model.history["elbo_train"].iloc[-1] > model.history["elbo_train"].iloc[0]


def test_hexagonal_spots_in_pixels():
    adata = tissue(counts=False)
    row, column = adata.obsm["spatial"].T
    adata.obsm["spatial"] = np.rint(55 * np.column_stack([column + row % 2 / 2, row * 0.75**0.5])).astype(int)
    with pytest.raises(ValueError, match=r'not on a square lattice.*They lie on the other lattice: pass grid="hex"'):
        scgen.MatrixNormalVAE(adata)
    model = scgen.MatrixNormalVAE(adata, grid="hex", n_maps=2, n_hidden=8)
    model.train(1, accelerator="cpu", progress=False)
    before = model.get_latent_representation()
    other, here = adata.copy(), 7 * SIDE + 7
    other.X[here] += 20
    changed = np.abs(model.get_latent_representation(other) - before).max(1) > 1e-6
    distance = np.linalg.norm(adata.obsm["spatial"] - adata.obsm["spatial"][here], axis=1)
    same = (adata.obs["section"] == "section_1").to_numpy()
    assert changed[same & (distance < 2.55 * 55)].all()  # all within three steps, of which those at corners are 3 away
    assert not changed[~same | (distance > 3.05 * 55)].any()
    assert changed.sum() == 37


def images(n: int = 120, shape: tuple[int, ...] = (8, 10)) -> AnnData:
    """Return images of a bright spot whose place differs, with some noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: shape[0], : shape[1]]
    place = rng.uniform(2, 6, (n, 2))
    pixels = np.exp(-((y - place[:, :1, None]) ** 2 + (x - place[:, 1:, None]) ** 2) / 4)
    if len(shape) == 3:
        pixels = pixels[..., None] * [1.0, 0.0, -1.0]
    adata = AnnData((pixels + 0.1 * rng.standard_normal(pixels.shape)).reshape(n, -1).astype(np.float32))
    scgen.setup_anndata(adata, counts=False)
    return adata


@pytest.mark.parametrize("shape", [(8, 10), (8, 10, 3)])
def test_images(shape, tmp_path):
    adata = images(200, shape)
    model = scgen.MatrixNormalVAE(adata, image_shape=shape, n_maps=2, n_hidden=16, rank=len(shape) - 1)
    model.train(60, batch_size=60, accelerator="cpu", progress=False)
    assert model.get_latent_representation().shape == (200, 18)
    # The noise has a standard deviation of 0.1, and the pixels around a mean image one of 0.3.
    decoder = model.vae.decoder
    assert (decoder.unit * decoder.log_scale.exp()).max() < 0.16
    model.save(tmp_path / "model")
    again = scgen.MatrixNormalVAE.load(tmp_path / "model", adata)
    assert again.arguments == model.arguments
    assert again.get_elbo() == model.get_elbo()


def test_what_does_not_fit_is_said(spots, trained):
    plain = tissue(spatial_key=None)
    with pytest.raises(ValueError, match=r"without positions, which MatrixNormalVAE needs.*scgen\.setup_anndata"):
        scgen.MatrixNormalVAE(plain)
    with pytest.raises(ValueError, match=r"image_shape=\(28, 28\) has 784 values, but adata has 6 features"):
        scgen.MatrixNormalVAE(plain, image_shape=(28, 28))
    with pytest.raises(ValueError, match='likelihood="nb" is for spots'):
        scgen.MatrixNormalVAE(plain, image_shape=(2, 3), map_size=2, likelihood="nb")
    with pytest.raises(ValueError, match="map_size=9; a map cannot be larger than the patch or image, 7"):
        scgen.MatrixNormalVAE(spots, map_size=9)
    with pytest.raises(ValueError, match='likelihood="nb" needs counts'):
        scgen.MatrixNormalVAE(images(), image_shape=(8, 10), likelihood="nb")
    with pytest.raises(ValueError, match="rank=4; it takes a whole number from 1 to 3"):
        scgen.MatrixNormalVAE(spots, rank=4)
    places = spots.obsm["spatial"].copy()
    try:
        spots.obsm["spatial"][:] = places[::-1] + 0.01 * np.arange(2)
        spots.obsm["spatial"][0] += [0, 500]
        with pytest.raises(ValueError, match="the positions of the model's cells have changed"):
            trained.get_latent_representation()
    finally:
        spots.obsm["spatial"][:] = places
    with pytest.warns(UserWarning, match="adata is a view") as warned:
        trained.get_latent_representation(spots[:200])
    assert warned[0].filename == __file__  # the call of the user
