"""Save a model as plain JSON and tensors, and make a model of them again."""

import hashlib
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scgen import __version__ as scgen_version
from scgen import storage
from scgen.arguments import check_flag, check_path
from scgen.data.checks import Setup, check_setup, check_types
from scgen.data.registry import Registry
from scgen.models import loaders
from scgen.storage import ModelFileError


def save(model, folder: str | Path, overwrite: bool, query: dict | None = None) -> None:
    """Write ``model`` into ``folder``, with what `load_query` needs if it is the model of a query; see `Model.save`."""
    folder = check_path("folder", folder)
    overwrite = check_flag("overwrite", overwrite)
    description = {
        "class": type(model).__name__,
        "arguments": asdict(model.arguments),
        "registry": asdict(model.registry),
        "versions": {"scgen-vae": scgen_version}
        | {name: metadata.version(name) for name in ("torch", "anndata", "numpy")},
        "history": {"epoch": model.history.index.tolist(), **model.history.to_dict(orient="list")},
        "trainings": model.trainings,
        "data": model.fingerprint,
    }
    if query is not None:
        description["query"] = query
    tensors = {f"vae.{name}": tensor for name, tensor in model.vae.state_dict().items()}
    if model.train_indices is not None:
        tensors["train_indices"] = torch.from_numpy(model.train_indices)
        tensors["validation_indices"] = torch.from_numpy(model.validation_indices)
    storage.write(folder, description, tensors, overwrite)


def load(cls: type, folder: str | Path, adata: AnnData | None):
    """Return the model in ``folder``, and what `save` was given as ``query``; see `Model.load`."""
    folder = check_path("folder", folder)
    if adata is not None:
        check_types(adata, Setup())
    description, tensors = storage.read(folder)
    if description.get("class") != cls.__name__:
        raise ModelFileError(f"{folder} holds a {description.get('class')!r}, not a {cls.__name__}.")
    weights = {name.removeprefix("vae."): tensor for name, tensor in tensors.items() if name.startswith("vae.")}
    try:
        registry = registry_of(description["registry"])
        model = assembled(cls, registry, cls.Arguments(**description["arguments"]), weights)
        history = dict(description["history"])
        model.history = pd.DataFrame(history, index=pd.Index(history.pop("epoch"), name="epoch"))
        model.trainings, model.fingerprint = list(description["trainings"]), description["data"]
        if not isinstance(description["trainings"], list):
            raise ValueError("trainings is not a list")
        if "train_indices" in tensors:
            model.train_indices, model.validation_indices = _split(tensors, model.fingerprint["n_cells"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ModelFileError(f"{folder}/model.json does not describe a model that scgen can build: {error}") from error
    if adata is not None:
        give_cells(model, adata)
    return model, description.get("query")


def digest(model) -> str:
    """Return a hash of a model's weights, by which a query knows its reference."""
    found = hashlib.sha256()
    for name, weight in sorted(model.vae.state_dict().items()):
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        found.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def assembled(cls: type, registry: Registry, arguments, weights: dict[str, torch.Tensor]):
    """Return a model of these parts, without cells; ValueError where weights and arguments disagree."""
    model = cls.__new__(cls)
    # Built without memory first: a description may claim any size, the weights have one.
    with torch.device("meta"):
        model.assemble(registry, arguments)
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in model.vae.state_dict().items()}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"weights and arguments disagree about {', '.join(wrong[:3])}")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("weights are not finite")
    model.vae.load_state_dict(weights, assign=True)
    for codes in model.vae.category_codes():
        if ((codes < 0) | (codes >= torch.tensor(registry.n_categories))).any():
            raise ValueError("codes of categories are out of range")
    model.vae = model.vae.eval().requires_grad_(True)
    return model


def give_cells(model, adata: AnnData) -> None:
    """Make ``adata`` the model's own cells."""
    model.registry.check_new(adata)
    before = model.fingerprint
    loaders.set_cells(model, adata)
    if model.fingerprint != before:  # other cells: the split is not theirs
        model.train_indices = model.validation_indices = None


def _split(tensors: dict[str, torch.Tensor], n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of training and validation, which must be all rows, each once."""
    training, validation = tensors["train_indices"].numpy(), tensors["validation_indices"].numpy()
    both = np.sort(np.concatenate([training, validation]))
    if both.dtype.kind != "i" or len(both) != n_cells or not np.array_equal(both, np.arange(len(both))):
        raise ValueError("training and validation cells are not a split of all cells")
    return training, validation


def registry_of(plain: dict) -> Registry:
    """Return the registry that `asdict` made plain, every part of it checked; older ones knew nothing of queries."""
    setup = {key: tuple(value) if isinstance(value, list) else value for key, value in plain["setup"].items()}
    genes, categories, scaling = plain["genes"], plain["categories"], plain["scaling"]
    strings = [*genes, *(value for values in categories.values() for value in values), *categories, *scaling]
    repeated = any(len(set(values)) < len(values) for values in (genes, *categories.values()))
    missing, known, gene_ids = plain.get("missing", []), plain.get("known", {}), plain.get("gene_ids", {})
    wrong = not all(isinstance(value, str) for value in [*strings, *missing]) or not known.keys() <= categories.keys()
    wrong |= any(len(names) != len(genes) for names in gene_ids.values())
    if not genes or wrong or repeated:
        raise ValueError("genes or categories are not lists of unique names")
    setup = Setup(**setup)
    check_setup(setup)
    if set(categories) != set(setup.categorical.values()) or set(scaling) != set(setup.continuous_covariate_keys):
        raise ValueError("categories or scaling are not those of the columns that were set up")
    return Registry(
        setup,
        list(genes),
        {key: list(values) for key, values in categories.items()},
        {key: (float(mean), float(sd)) for key, (mean, sd) in scaling.items()},
        {key: list(names) for key, names in gene_ids.items()},
        list(missing),
        dict(known),
    )
