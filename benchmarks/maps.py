"""What latent maps keep of the arrangement in images and in patches of tissue, beside a vector of latents.

    python -m benchmarks.maps images [SEED ...]   # one seed or several (default 0 to 2), a line of JSON for each model
    python -m benchmarks.maps tissue [SEED ...]
    python -m benchmarks.maps table

"images": 2,000 images of 16 x 16 pixels, three different blobs turned by any angle and shifted, with noise; 500 more
are held out. "tissue": ten sections of 40 x 40 spots with the counts of 30 genes, and one more that is held out. Log
rates are sums of Gaussian random fields of four length scales, with weights for each gene. Counts are negative
binomial.

`MatrixNormalVAE` has 8 maps of 3 x 3 values. The vector has the same 72 latents (``n_maps=72, map_size=1``) and the
same networks but for their inner ends. All have the same number of steps. The bound and the importance-weighted
estimate of log p(x), with 100 draws, are of held-out images or patches, in nats each. Moran's I is that of neighbouring
places within the patches, pooled over all patches, the mean over the genes; of counts after normalising each spot and
log1p. "kept" is Moran's I of draws, noise included, divided by that of the held-out data: of the posterior predictive
distribution, and of the prior with the library sizes of the held-out spots. Seconds are those of the training on one
core.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

import scgen
from scgen.models import loaders
from scgen.seeding import seeded

RESULTS = Path(__file__).parent / "results" / "maps"
MODELS = {
    "maps, diagonal": {},
    "maps, full": {"covariance": "full"},
    "maps, rank 1": {"rank": 1},
    "vector": {"n_maps": 72, "map_size": 1},
}
#: By set: arguments of the models and of their training.
SETS = {
    "images": ({"n_hidden": 16, "image_shape": (16, 16)}, {"max_epochs": 45, "batch_size": 64}),
    "tissue": ({"n_hidden": 32}, {"max_epochs": 8, "batch_size": 64}),
}


def images(seed: int, n: int = 2500, side: int = 16) -> tuple[AnnData, AnnData]:
    """Return images to train on and images that are held out."""
    rng = np.random.default_rng(seed)
    theta, shift = rng.uniform(-np.pi, np.pi, n)[:, None], 0.1 * rng.standard_normal((n, 2))
    y, x = np.mgrid[1 : -1 : side * 1j, -1 : 1 : side * 1j].reshape(2, -1)
    turned = np.stack([x * np.cos(theta) + y * np.sin(theta), y * np.cos(theta) - x * np.sin(theta)], -1)
    pixels = 0.1 * rng.standard_normal((n, side**2))
    for height, centre, width in ((1.0, (0.5, 0.0), 0.2), (0.5, (-0.2, 0.45), 0.15), (-0.7, (-0.3, -0.35), 0.2)):
        pixels += height * np.exp(-np.square(turned - shift[:, None] - centre).sum(-1) / (2 * width**2))
    adata = AnnData(pixels.astype(np.float32))
    training, held_out = adata[:2000].copy(), adata[2000:].copy()
    scgen.setup_anndata(training, counts=False)
    return training, held_out


def tissue(seed: int, side: int = 40, n_genes: int = 30) -> tuple[AnnData, AnnData]:
    """Return sections to train on and one that is held out."""
    rng = np.random.default_rng(seed)
    scales = np.repeat([1.0, 2.0, 4.0, 8.0], 2)
    weights, base = 0.5 * rng.standard_normal((len(scales), n_genes)), rng.standard_normal(n_genes)
    frequency = np.fft.fftfreq(2 * side)
    squares = frequency[:, None] ** 2 + frequency**2
    sections = []
    for _ in range(11):
        fields = []
        for scale in scales:  # white noise, smoothed by a Gaussian kernel, scaled to variance 1
            kernel = np.exp(-((2 * np.pi * scale) ** 2) * squares / 2)
            noise = np.fft.fft2(rng.standard_normal((2 * side, 2 * side)))
            fields.append(np.fft.ifft2(kernel * noise).real[:side, :side].ravel() / np.sqrt((kernel**2).mean()))
        rates = np.exp(base + np.stack(fields, 1) @ weights)
        library = np.exp(rng.normal(np.log(300), 0.4, (side**2, 1)))
        mu = library * rates / rates.sum(1, keepdims=True)
        sections.append(rng.poisson(rng.gamma(5.0, mu / 5.0)).astype(np.float32))
    xy = np.stack(np.divmod(np.arange(side**2), side), 1)
    training, held_out = AnnData(np.concatenate(sections[:-1])), AnnData(sections[-1])
    training.obsm["spatial"], held_out.obsm["spatial"] = np.tile(xy, (10, 1)), xy
    training.obs["section"], held_out.obs["section"] = np.repeat([*"0123456789"], side**2), "held out"
    scgen.setup_anndata(training, spatial_key="spatial", section_key="section")
    return training, held_out


def moran(values: torch.Tensor, mask: torch.Tensor, shape: tuple[int, int]) -> float:
    """Return Moran's I of neighbouring places, pooled over the patches: the mean over the features.

    Parameters
    ----------
    values, mask
        (n, J, F) and (n, J): values at the places, and which of them are there.
    shape
        Height and width of the patches.
    """
    there = mask[..., None].double()
    centred = (values.double() - (values * there).sum((0, 1)) / there.sum()) * there
    variance = centred.square().sum((0, 1)) / there.sum()
    x, there = centred.unflatten(1, shape), there.unflatten(1, shape)
    products = (x[:, 1:] * x[:, :-1]).sum((0, 1, 2)) + (x[:, :, 1:] * x[:, :, :-1]).sum((0, 1, 2))
    n_pairs = (there[:, 1:] * there[:, :-1]).sum() + (there[:, :, 1:] * there[:, :, :-1]).sum()
    return float((products / n_pairs / variance).mean())


@torch.inference_mode()
def kept(model: scgen.MatrixNormalVAE, held_out: AnnData, seed: int) -> dict[str, float]:
    """Return Moran's I of the held-out data, and the share of it that draws have."""
    cells = next(iter(loaders.of_question(model, held_out, None, held_out.n_obs)))
    vae, counts = model.vae.eval(), model.arguments.likelihood != "normal"

    def i_of(values: torch.Tensor) -> float:
        if counts:
            values = (300 * values / values.sum(-1, keepdim=True).clamp(min=1)).log1p()
        return moran(values, cells.mask, model.arguments.shape)

    def of_draws(z: torch.Tensor) -> float:
        return i_of(vae.decoder({"z": z}, cells).base_dist.sample().unflatten(-2, cells.mask.shape))

    found = {"data": i_of(cells.features)}
    with seeded(seed):
        posterior = vae.posteriors["z"](cells).rsample(())
        found["posterior"] = of_draws(posterior) / found["data"]
        found["prior"] = of_draws(vae.prior("z", cells).rsample((len(cells),))) / found["data"]
    return found


def measured(what: str, name: str, seed: int, **options) -> dict:
    """Return what one training gives."""
    training, held_out = {"images": images, "tissue": tissue}[what](100 + seed)
    arguments, plan = SETS[what]
    model = scgen.MatrixNormalVAE(training, seed=seed, **arguments | MODELS[name])
    started = time.perf_counter()
    model.train(seed=seed, accelerator="cpu", progress=False, **plan | options)
    seconds = time.perf_counter() - started
    return {
        "set": what,
        "model": name,
        "seed": seed,
        "elbo": model.get_elbo(held_out, seed=seed),
        "marginal": model.get_marginal_ll(
            held_out, indices=np.arange(0, held_out.n_obs, 5), n_mc_samples=100, seed=seed
        ),
        "kl": model.history["kl_z_validation"].iloc[-1],
        "moran": kept(model, held_out, seed),
        "outputs": model.vae.posteriors["z"].encoder.whole[-1].out_features,
        "weights": sum(weight.numel() for weight in model.vae.parameters()),
        "seconds": seconds,
    }


def table() -> None:
    """Print median, smallest and largest value over the seeds."""
    lines = [json.loads(line) for path in sorted(RESULTS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    for what in SETS:
        rows = {}
        for name in MODELS:
            of = [line for line in lines if line["set"] == what and line["model"] == name]
            if of:
                columns = {key: spread([line[key] for line in of], 1) for key in ("elbo", "marginal", "kl", "seconds")}
                shares = {
                    f"kept, {key}": spread([line["moran"][key] for line in of], 3) for key in ("posterior", "prior")
                }
                sizes = {key: of[0][key] for key in ("outputs", "weights")}
                rows[name] = columns | shares | sizes | {"Moran's I": spread([line["moran"]["data"] for line in of], 3)}
        print(f"\n{what}\n{pd.DataFrame.from_dict(rows, orient='index').to_string()}")


def spread(values: list[float], digits: int) -> str:
    """Return median, smallest and largest value as text."""
    return " ".join(f"{value:.{digits}f}" for value in (np.median(values), min(values), max(values)))


def main(what: str, *seeds: str) -> None:
    """Run the set that was asked for, or print the table."""
    if what == "table":
        table()
        return
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{what}.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["model"], line["seed"]) for line in known}
    for seed in map(int, seeds or range(3)):
        for name in MODELS:
            if (name, seed) in done:
                continue
            line = json.dumps(measured(what, name, seed))
            with path.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
