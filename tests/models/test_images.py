"""SpatialVAE on images whose content was turned and shifted by known amounts, as in the paper."""

import numpy as np
import pytest
from anndata import AnnData

import scgen

SIDE = 10


def blobs(seed: int, n: int) -> tuple[AnnData, np.ndarray, np.ndarray]:
    """Return images of three different blobs, the angles by which they are turned, and their shifts before that."""
    rng = np.random.default_rng(seed)
    theta, shift = rng.uniform(-np.pi / 2, np.pi / 2, n), 0.1 * rng.standard_normal((n, 2))
    half = (SIDE - 1) / 2
    row, column = np.mgrid[:SIDE, :SIDE].reshape(2, -1)
    x, y = (column - half) / half, (half - row) / half  # y points up, so that angles are counter-clockwise
    cos, sin = np.cos(theta)[:, None], np.sin(theta)[:, None]
    before = np.stack([x * cos + y * sin, y * cos - x * sin], -1) - shift[:, None]
    image = np.zeros((n, SIDE**2))
    for height, centre, width in ((1.0, (0.5, 0.0), 0.2), (0.5, (-0.2, 0.45), 0.15), (-0.7, (-0.3, -0.35), 0.2)):
        image += height * np.exp(-np.square(before - centre).sum(-1) / (2 * width**2))
    adata = AnnData((image + 0.05 * rng.standard_normal(image.shape)).astype(np.float32))
    scgen.setup_anndata(adata, counts=False)
    return adata, theta, shift


def trained(adata: AnnData, seed: int, **arguments) -> scgen.SpatialVAE:
    sizes = {"n_latent": 1, "n_hidden": 16, "image_shape": (SIDE, SIDE)}
    model = scgen.SpatialVAE(adata, translate=True, seed=seed, **sizes, **arguments)
    options = {"batch_size": 32, "learning_rate": 2e-2, "seed": seed}
    model.train(24, accelerator="cpu", progress=False, **options)
    return model


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_angles_and_shifts_of_images_are_found(seed):
    adata, theta, shift = blobs(seed, 500)
    model = trained(adata, seed)
    found = model.get_rotation()
    # The orientation at which theta is 0 is the model's choice.
    constant = np.angle(np.exp(1j * (found - theta)).mean())
    a, b = np.sin(found - constant - np.angle(np.exp(1j * theta).mean())), np.sin(theta - theta.mean())
    assert (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()) >= 0.9  # circular correlation
    # Shifts are in this orientation.
    shifts = (model.get_translation() @ [1, 1j]) * np.exp(1j * constant)
    for part, expected in ((shifts.real, shift[:, 0]), (shifts.imag, shift[:, 1])):
        assert np.corrcoef(part, expected)[0, 1] >= 0.85
    fixed = trained(adata, seed, rotate=False)
    held_out = model.validation_indices
    assert model.get_elbo(indices=held_out) > fixed.get_elbo(indices=held_out) + 10


def test_images_are_saved_and_checked(tmp_path):
    adata, _, _ = blobs(0, 60)
    model = scgen.SpatialVAE(adata, image_shape=(SIDE, SIDE), n_hidden=8)
    model.train(1, accelerator="cpu", progress=False)
    model.save(tmp_path / "model")
    again = scgen.SpatialVAE.load(tmp_path / "model", adata)
    assert again.arguments == model.arguments
    assert np.array_equal(again.get_rotation(), model.get_rotation())
    with pytest.raises(ValueError, match=r"image_shape=\(10, 11\) has 110 values, but adata has 100 features"):
        scgen.SpatialVAE(adata, image_shape=(10, 11))
    with pytest.raises(ValueError, match='likelihood="nb" needs counts'):
        scgen.SpatialVAE(adata, image_shape=(SIDE, SIDE), likelihood="nb")
    colours = scgen.SpatialVAE(adata, image_shape=(5, 5, 4), n_hidden=8)
    colours.train(1, accelerator="cpu", progress=False)
    assert colours.vae.decoder.mean.bias.shape == (4,)
    assert colours.get_latent_representation().shape == (60, 10)
