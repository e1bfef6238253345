"""Convert models that scvi-tools saved. They have the same weights and give the same numbers."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scgen.arguments import check_path, shown
from scgen.data.categories import names_of
from scgen.data.checks import Setup, check_types
from scgen.data.columns import standard
from scgen.data.genes import identifiers
from scgen.data.registry import Registry
from scgen.models import files, loaders
from scgen.models.interop import pickles
from scgen.modules.networks import MLP
from scgen.modules.vae import VAE
from scgen.storage import ModelFileError, found_in

#: Options of scvi-tools that scgen lacks, each with the one value that is equal to what scgen does.
FIXED = {
    "latent_distribution": "normal",
    "log_variational": True,
    "deeply_inject_covariates": True,
    "batch_representation": "one-hot",
    "use_batch_norm": "both",
    "use_layer_norm": "none",
    "var_activation": None,
    "extra_encoder_kwargs": None,
    "extra_decoder_kwargs": None,
    "batch_embedding_kwargs": None,
    "extra_payload_autotune": False,
    "use_size_factor_key": False,
}
#: Options that both have, with scvi-tools' defaults.
SHARED = {
    "n_latent": 10,
    "n_hidden": 128,
    "n_layers": 1,
    "dropout_rate": 0.1,
    "gene_likelihood": "zinb",
    "dispersion": "gene",
    "use_observed_lib_size": True,
    "encode_covariates": False,
}


def load(cls: type, folder: str | Path, adata: AnnData | None, prefix: str):
    """Return a saved model of scvi-tools as a model of scgen; see `SCVI.from_scvi_tools`."""
    folder = check_path("folder", folder)
    if not isinstance(prefix, str):
        raise TypeError(f"prefix={shown(prefix)}; it takes a string.")
    if adata is not None:
        check_types(adata, Setup())
    path = Path(folder) / f"{prefix}model.pt"
    if not path.is_file():
        raise ModelFileError(
            f"{path} is not there (found: {found_in(folder)}). Give the folder that scvi-tools' model.save(folder) "
            "wrote, and the prefix it was saved with."
        )
    content = pickles.read(path, dropped=("attr_dict", "history_"))
    try:
        attributes, weights = content["attr_dict"], content["model_state_dict"]
        version, name = (attributes["registry_"][key] for key in ("scvi_version", "model_name"))
        if name != "SCVI":
            raise ValueError(f"it is a {name}; only SCVI can be converted")
        if not attributes["is_trained_"]:
            raise ValueError("it was saved untrained")
        arguments = cls.Arguments(**_arguments(attributes["init_params_"]))
        registry = _registry(attributes["registry_"], content["var_names"], arguments.dispersion == "gene-label")
        ours = {name: weight.contiguous() for name, weight in _weights(weights, registry, arguments).items()}
        model = files.assembled(cls, registry, arguments, ours)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ModelFileError(f"{path} cannot be converted: {detail}.") from error
    model.trainings = [{"trained_by": f"scvi-tools {version}"}]
    if adata is not None:
        files.give_cells(model, adata)
        scaling = _standardised(model.vae, adata.obs[list(registry.scaling)].astype(float))
        model.registry = replace(registry, scaling=scaling, gene_ids=identifiers(adata.var.loc[registry.genes]))
        columns = loaders.set_cells(model, adata).columns
        if "library_log_means" not in weights:
            model.vae.priors["library"].fit(columns["library"], columns["batch"])
    return model


def _arguments(saved: dict) -> dict:
    """Return the arguments of scgen that make the same model; ValueError if there are none."""
    given = dict(saved["non_kwargs"])
    for extra in saved["kwargs"].values():
        given |= extra
    for name, value in given.items():
        # None and an empty dictionary are the same there.
        if name in FIXED and (value or None) != (FIXED[name] or None):
            raise ValueError(f"it was made with {name}={value!r}, but scgen has only {name}={FIXED[name]!r}")
        if name not in FIXED and name not in SHARED:
            raise ValueError(f"it was made with {name}={value!r}, which scgen does not know")
    arguments = {name: given.get(name, default) for name, default in SHARED.items()}
    if arguments["gene_likelihood"] == "normal":
        raise ValueError('it has gene_likelihood="normal", for which scvi-tools has a library size and scgen has none')
    return {**arguments, "library_residual": False, "seed": 0}


def _standardised(vae: VAE, values: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Make the first layers read standardised covariates, as others do; return the mean and deviation of each."""
    scaling = {key: standard(values[key].to_numpy()) for key in values}
    mean, sd = np.array(list(scaling.values())).reshape(-1, 2).T
    for part in (part for part in vae.modules() if isinstance(part, MLP) and part.layers[0].slopes is not None):
        first = part.layers[0]
        with torch.no_grad():
            slopes = first.slopes.double()
            first.linear.bias += (torch.from_numpy(mean) @ slopes).float()
            first.slopes.copy_(slopes * torch.from_numpy(sd)[:, None])
    return scaling


def _registry(saved: dict, genes, labels: bool) -> Registry:
    """Return what the model reads of an AnnData, checked as that of a saved model is."""
    arguments, fields = saved["setup_args"], saved["field_registries"]
    keys = {
        name: tuple(arguments.get(name) or ()) for name in ("categorical_covariate_keys", "continuous_covariate_keys")
    }
    names = ("layer", "batch_key", "size_factor_key", *(("labels_key",) if labels else ()))
    setup = Setup(**{name: arguments.get(name) for name in names}, **keys)
    categories = {}
    for field, key in (("batch", setup.batch_key), ("labels", setup.labels_key)):
        if key is not None:
            categories[key] = fields[field]["state_registry"]["categorical_mapping"]
    if setup.categorical_covariate_keys:
        categories |= fields["extra_categorical_covs"]["state_registry"]["mappings"]
    categories = {key: names_of(values) for key, values in categories.items()}
    # They take continuous covariates as they are.
    scaling = dict.fromkeys(setup.continuous_covariate_keys, (0.0, 1.0))
    registry = Registry(setup, [str(gene) for gene in genes], categories, scaling)
    return files.registry_of(asdict(registry))


def _weights(theirs: dict[str, Tensor], registry: Registry, arguments) -> dict[str, Tensor]:
    """Return our weights by name."""
    seen = (registry.n_categories, len(registry.scaling))
    encoded = seen if arguments.encode_covariates else ((), 0)
    bias = theirs["z_encoder.mean_encoder.bias"]
    found = {"priors.z.mean": torch.zeros_like(bias), "priors.z.variance": torch.ones_like(bias)}
    found |= _encoder("posteriors.z", "z_encoder", theirs, encoded)
    found |= _layers("decoder.mlp", "decoder.px_decoder", theirs, *seen)
    found |= _linear("decoder.scale", "decoder.px_scale_decoder.0", theirs)
    if arguments.gene_likelihood == "zinb":
        found |= _linear("decoder.zi_logits", "decoder.px_dropout_decoder", theirs)
    if arguments.gene_likelihood != "poisson":
        if arguments.dispersion == "gene-cell":
            found |= _linear("decoder.dispersion.head", "decoder.px_r_decoder", theirs)
        else:
            found["decoder.dispersion.log_theta"] = theirs["px_r"].t()
    if "library_log_means" in theirs:
        found |= _encoder("posteriors.library", "l_encoder", theirs, encoded)
        found["priors.library.mean"] = theirs["library_log_means"][0]
        found["priors.library.variance"] = theirs["library_log_vars"][0]
    else:  # where the library is observed, it has no prior there; `LibraryPrior.fit` makes one of cells
        found |= {f"priors.library.{name}": bias.new_zeros(len(registry.batches)) for name in ("mean", "variance")}
    return found


def _encoder(to: str, part: str, theirs: dict[str, Tensor], covariates: tuple) -> dict[str, Tensor]:
    return (
        _layers(f"{to}.mlp", f"{part}.encoder", theirs, *covariates)
        | _linear(f"{to}.mean", f"{part}.mean_encoder", theirs)
        | _linear(f"{to}.log_variance", f"{part}.var_encoder", theirs)
    )


def _linear(to: str, part: str, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{to}.{name}": theirs[f"{part}.{name}"] for name in ("weight", "bias")}


def _layers(
    to: str, part: str, theirs: dict[str, Tensor], n_categories: Sequence[int], n_continuous: int
) -> dict[str, Tensor]:
    """Return the weights of an `MLP`.

    Of the columns of a layer's weight, the first are for what comes in, then follow the continuous covariates, in the
    first layer alone, and the one-hots of each category of two values and more, which are rows of tables here.
    """
    found = {}
    used = {i: n for i, n in enumerate(n_categories) if n > 1}
    for layer in itertools.count():
        block, ours = f"{part}.fc_layers.Layer {layer}", f"{to}.layers.{layer}"
        if f"{block}.0.weight" not in theirs:
            return found
        weight = theirs[f"{block}.0.weight"]
        n_slopes = n_continuous if layer == 0 else 0
        n_in = weight.shape[1] - n_slopes - sum(used.values())
        found[f"{ours}.linear.weight"], slopes, *tables = weight.split([n_in, n_slopes, *used.values()], dim=1)
        found[f"{ours}.linear.bias"] = theirs[f"{block}.0.bias"]
        found |= {f"{ours}.rows.{i}": table.T for i, table in zip(used, tables, strict=True)}
        if n_continuous:
            found[f"{ours}.slopes"] = slopes.T if layer == 0 else weight.new_zeros(n_continuous, len(weight))
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            found[f"{to}.norms.{layer}.{name}"] = theirs[f"{block}.1.{name}"]
