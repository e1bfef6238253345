"""Wrong values for every argument of every public call: an error that names it, from the door, and nothing changed.

`KINDS` says what each argument takes, and `WRONG` what is wrong with that. A public call, or an argument of one, that
is in neither table fails `test_every_argument_has_a_kind`.
"""

import argparse
import hashlib
import inspect
import traceback
import warnings
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from matplotlib.figure import Figure

import scgen
from scgen import arguments, cli, plots
from scgen.command.parser import parser
from scgen.models.base import Model
from scgen.models.queries import Query
from scgen.workflows import clustering

PACKAGE = Path(scgen.__file__).parent
NAN, INF = float("nan"), float("inf")

NO_TEXT = [3, 1.5, True, b"text", ["text"], (), {}, {"text"}, np.array(["a", "b"]), object(), 3j, NAN, pd.NA]
NO_NUMBER = ["5", "many", "", b"5", [5], (), {}, np.array([5, 6]), pd.Series([5]), 5j, object(), True, np.True_]
NO_NUMBER += [Decimal(5), Fraction(1, 2), np.datetime64("2020"), np.timedelta64(5), pd.NA, torch.tensor(5), AnnData()]
NO_WHOLE = [*NO_NUMBER, 2.5, 5.0, np.float32(2.5), NAN, INF, -INF, -1, np.int64(-5), -(10**30)]
NO_NAMES = [3, 1.5, True, object(), b"text", [3], [None], ["gene_1", 3], [["gene_1"]], np.zeros((2, 2)), NAN]

NO_MAPS = [None, 3, "xy", [], {}, {"a": np.zeros((4, 2)), "b": np.zeros((3, 2))}]
NO_MAPS += [{"a": of} for of in (None, 3, "xy", object(), [[0, 0], [1]], [["x", "y"]] * 4, np.zeros(4))]
NO_MAPS += [{"a": of} for of in (np.zeros((4, 3)), np.zeros((4, 2), bool), np.full((4, 2), NAN))]
NO_MAPS += [{"a": pd.DataFrame([["x", "y"]] * 4)}]
NO_FEATURES = [*NO_MAPS, {3: "z"}, {"a": "nope"}, {"a": ""}, {"a": np.full((120, 2), INF)}, {"a": np.zeros((120, 0))}]
NO_SHAPES = [3, 5.5, True, "5x6", b"5", {}, {5, 6}, np.array([5, 6]), [], (), (30,), (5, 6, 1, 1), (5, 5), (5.0, 6)]
NO_SHAPES += [("5", 6), (0, 30), (-5, -6), (None, 30), (True, 30), (NAN, 6), [[5, 6]], (10**6, 30), object(), pd.NA]
NO_COLOURS = [None, 3, "red", [], {}]
NO_COLOURS += [{"a": of} for of in (3, None, [1] * 4, pd.Series([1]), pd.Series([[1]] * 4))]

#: By kind of argument, what is none.
WRONG = {
    "adata": ["a.h5ad", Path("a.h5ad"), 3, True, np.zeros((3, 3)), pd.DataFrame({"a": [1]}), [], {}, b"", AnnData, NAN],
    "flag": [
        "no",
        "False",
        "True",
        "",
        0,
        1,
        None,
        0.0,
        NAN,
        [True],
        (),
        {},
        np.array([True, False]),
        b"x",
        1j,
        object(),
    ],
    "whole": [*NO_WHOLE, 0, None],
    "optional whole": [*NO_WHOLE, 0],
    "draws": [*NO_WHOLE, 0, None, 10**9],
    "odd": [*NO_WHOLE, 0, None, 1, 4, 10**6],
    "rank": [*NO_WHOLE, 0, 4],
    "optional draws": [*NO_WHOLE, 0, 10**9],
    "epochs": [*NO_WHOLE, 0, 10**9],
    "count": [*NO_WHOLE, None],
    "size": [*NO_WHOLE, 0, None, 10**15],
    "n_hidden": [*NO_WHOLE, 0, None, 10**6],
    "n_flows": [*NO_WHOLE, 0, 3, 10**6],  # for posterior="normal" there is none
    "n_components": [*NO_WHOLE, 0, 10**6],
    "devices": [*NO_WHOLE, 0, None, 2, "auto"],
    "seed": [*NO_WHOLE, None, 2**63, 2**64, 10**400],
    "positive": [*NO_NUMBER, None, 0, -1, NAN, INF, -INF, 1e300, 10**400],
    "optional positive": [*NO_NUMBER, 0, -1, NAN, INF, 10**400],
    "from 0": [*NO_NUMBER, None, -1, -1e-9, NAN, INF, -INF, 10**400],
    "effect": [*NO_NUMBER, None, -1, NAN, INF, -INF, 1e308, 10**400],
    "share": [*NO_NUMBER, None, -0.1, 1.1, NAN, INF, -INF, 1e300],
    "open share": [*NO_NUMBER, None, 0, 1, -0.1, 1.1, NAN, INF],
    "share below 1": [*NO_NUMBER, None, 1, -0.1, 1.1, NAN, INF],
    "train share": [*NO_NUMBER, None, 0, -0.1, 1.1, NAN, INF],
    "library": ["Latent", "", b"latent", None, 0, -1, True, NAN, INF, 1e300, [1], np.array([1, 2]), 1j, object()],
    "optional choice": [*NO_TEXT, "", "Normal ", "auto "],
    "choice": [*NO_TEXT, None, "", "Normal ", "auto ", "GPU"],
    "accelerator": [*NO_TEXT, None, "", "Auto", "tpu", "mps"],
    "rows": ["a", b"ab", 1.5, [0.5], [NAN], ["x"], [[0], [1]], [[0, 1], [2]], np.array([2**64 - 1], np.uint64), [120]],
    "path": [None, 3, 1.5, True, "", b"folder", [], ["a"], {}, "a\0b", NAN, object()],
    "names": [*NO_NAMES, "gene_1", [], ["nope"], np.array("gene_1")],
    "batch": ["nope", "", ["nope"], [], b"batch_1", object(), [None], [["batch_1"]], 1.5, NAN, True, [b"batch_1"]],
    "covariates": ["donor", 3, [("donor", "a")], b"", object(), {"nope": 1}, {3: 1}, {"donor": "z"}, {"donor": []}],
    "column": [*NO_TEXT, "nope", ""],
    "missing column": [*NO_TEXT, None, "nope", ""],
    "kind of column": NO_TEXT,
    "columns": [*NO_NAMES, "donor", ["nope"], [""]],
    "kind of columns": [*NO_NAMES, "donor"],
    "key": [*NO_TEXT, "", "a/b", "/", "a\0b"],
    "required key": [*NO_TEXT, None, "", "a/b", "/", "a\0b"],
    "integrated": [
        None,
        3,
        1.5,
        True,
        b"batch",
        [None],
        [3],
        [],
        "",
        "nope",
        ["batch", "nope"],
        {"nope"},
        object(),
        NAN,
    ],
    "group": [b"type_1", "nope", "", 3, ["nope"], [None], [["type_1"]], object(), NAN, np.zeros((2, 2)), True],
    "out": [
        3,
        "x",
        [],
        np.zeros(3),
        np.zeros((120, 30), int),
        np.zeros((120, 30), np.float16),
        pd.DataFrame({"a": [1]}),
    ],
    "presets": [3, "nb", b"nb", True, [], {}, [None], [3], [["nb"]], ["nope"], {"nb"}, object(), {3: {}}, {"a": 3}],
    "model": [None, 3, "model", b"", [], {}, True, object(), AnnData(), torch.nn.Linear(1, 1), Model, NAN],
    "prefix": [None, 3, 1.5, True, b"p_", [], {}, object(), NAN],
    "maps": NO_MAPS,
    "features": NO_FEATURES,
    "image_shape": NO_SHAPES,
    "colouring": [None, 3, 1.5, b"batch", "", "nope", [], ["batch", "nope"], [None], [3], object(), AnnData(), NAN],
    "optional numbers": [*NO_TEXT, "", "nope", "cell_type"],
    "colours": NO_COLOURS,
    "function": [3, 1.5, True, "print", b"print", [], [print], {}, {"print": print}, np.zeros(2), NAN, AnnData()],
    "table": [None, 3, "table", [], {}, True, np.zeros((2, 2)), pd.DataFrame(), object(), pd.DataFrame({"a": ["x"]})],
    "ax": [3, 1.5, "ax", b"ax", True, [], {}, np.zeros(2), Figure(), object(), NAN, Figure().add_subplot(polar=True)],
    "symbols": [3, "symbol", b"symbol", True, [], ["A"], {}, {"nope": "A"}, {"gene_1": 3}, np.array(["A"]), object()],
    "title": [3, 1.5, True, b"a", "", "nope", [], ["a"], {}, object(), NAN],
    "titles": [*NO_NAMES, "a", ["nope"], ["a", "nope"]],
}
WRONG["optional path"] = [*WRONG["path"][1:], "nowhere/a.png", "a.doc", "saved"]
WRONG["rows"] += [[-121], [2**70], [True] * 3, True, [], (), {}, object(), np.zeros((2, 2), int), [None], 3j, {1, 2}]
WRONG["rows"] += [pd.NA, pd.Series([0.5]), np.array(["a"]), pd.array([True, None]), 120, NAN, np.datetime64("2020")]
WRONG["batch"] += [np.array([["batch_1"]]), AnnData(), pd.NA, 3j]
WRONG["covariates"] += [{"donor": 3}, {"donor": [None]}, {"donor": b"a"}, {"age": "old"}, {"age": NAN}, {"age": True}]
WRONG["covariates"] += [
    {"age": 1e300},
    {"age": []},
    {"age": [1, INF]},
    {"age": 1j},
    {"age": 10**400},
    {"batch": "batch_1"},
]
WRONG["presets"] += [{"a": {"nope": 1}}, {"a": {"n_latent": "3"}}, {"a": {"n_latent": True}}, {"a": {"seed": 1}}]
WRONG["tune"] = [one for one in WRONG["presets"] if one is not True and one is not None] + ["True", 0, 1, NAN, 1.5]

ADATA_KEYS = {"layer": "column", "batch_key": "column", "labels_key": "column", "size_factor_key": "column"}
ADATA_KEYS |= {"categorical_covariate_keys": "columns", "continuous_covariate_keys": "columns", "counts": "flag"}
ADATA_KEYS |= {"spatial_key": "column", "section_key": "column"}
#: What arguments take wherever they are; `CALLS` has what differs.
KINDS = ADATA_KEYS | {
    "adata": "adata",
    "indices": "rows",
    "idx1": "rows",
    "idx2": "rows",
    "seed": "seed",
    "batch_size": "whole",
    "n_samples": "draws",
    "n_mc_samples": "draws",
    "n_cells": "whole",
    "n": "size",
    "max_epochs": "epochs",
    "patience": "optional whole",
    "n_importance_samples": "size",
    "devices": "devices",
    "n_top_genes": "optional whole",
    "n_models": "whole",
    "n_neighbors": "whole",
    "n_labels": "count",
    "max_categories": "count",
    "n_latent": "n_hidden",
    "n_hidden": "n_hidden",
    "n_layers": "n_hidden",
    "n_flows": "n_flows",
    "n_components": "n_components",
    "dropout_rate": "share below 1",
    "learning_rate": "positive",
    "kl_start": "from 0",
    "batch_penalty": "from 0",
    "train_size": "train share",
    "held_out": "open share",
    "fdr_target": "open share",
    "threshold": "from 0",
    "delta": "from 0",
    "resolution": "from 0",
    "min_overlap": "share",
    "unknown_below": "share",
    "sparse_below": "optional positive",
    "library_size": "library",
    "accelerator": "accelerator",
    "batch": "batch",
    "transform_batch": "batch",
    "covariates": "covariates",
    "gene_list": "names",
    "folder": "path",
    "groupby": "column",
    "group1": "group",
    "group2": "group",
    "key_added": "key",
    "adjusted_basis": "required key",
    "key": "integrated",
    "out": "out",
    "presets": "presets",
    "tune": "tune",
    "model": "model",
    "prefix": "prefix",
    "maps": "maps",
    "on_epoch": "function",
    "colours": "colours",
    "table": "table",
    "save": "optional path",
    "ax": "ax",
    "gene_symbols": "symbols",
    "last_map_only": "titles",
    "split_by": "title",
    "check": "table",
}
FLAGS = ("progress", "overwrite", "early_stopping", "give_mean", "return_dist", "return_mean", "return_ess")
FLAGS += ("return_numpy", "batch_correction", "use_observed_lib_size", "encode_covariates", "library_residual")
CHOICES = ("precision", "mode", "weights", "correlation_type", "gene_likelihood", "dispersion", "posterior", "prior")
KINDS |= dict.fromkeys(FLAGS, "flag") | dict.fromkeys(CHOICES, "choice")

#: Settings of SCVI and of its training: None stands for the default where another call passes them on.
PASSED_ON = [name for of in (scgen.SCVI, scgen.SCVI.train) for name in inspect.signature(of).parameters]
ALONE = ("self", "adata", "seed", "progress", "max_epochs", "on_epoch")
PASSED_ON = {name: KINDS[name] for name in PASSED_ON if name not in ALONE}
WRONG |= {f"{kind} or None": [one for one in WRONG[kind] if one is not None] for kind in PASSED_ON.values()}


def placed(given: dict) -> dict:
    """Return the arguments with positions, where a section is named."""
    return {"spatial_key": "places"} | given if "section_key" in given else given


#: Every public call, by name: how it is called rightly, and the arguments that are of another kind than elsewhere.
CALLS = {
    "setup_anndata": (lambda on, **given: scgen.setup_anndata(**{"adata": on.new} | placed(given)), {}),
    "check": (
        lambda on, **given: scgen.check(**{"adata": on.new} | placed(given)),
        # Of names that are not there, its table tells.
        dict.fromkeys(("layer", "batch_key", "labels_key", "size_factor_key"), "kind of column")
        | dict.fromkeys(("spatial_key", "section_key"), "kind of column")
        | dict.fromkeys(("categorical_covariate_keys", "continuous_covariate_keys"), "kind of columns"),
    ),
    "simulate_cells": (
        lambda on, **given: scgen.simulate_cells(**{"n_cells": 20, "n_genes": 10} | given),
        dict.fromkeys(("n_cells", "n_genes", "n_batches", "n_types", "n_latent"), "size")
        | {"batch_effect": "effect", "type_effect": "effect", "zero_inflation": "share below 1"}
        | {"mean_library": "positive"},
    ),
    "simulate_tissue": (
        lambda on, **given: scgen.simulate_tissue(**{"n_sections": 1, "n_rows": 2, "n_genes": 10} | given),
        dict.fromkeys(("n_sections", "n_rows", "n_genes"), "size")
        | {"random_types": "share", "mean_library": "positive"},
    ),
    "neighborhood_features": (
        lambda on, **given: scgen.neighborhood_features(
            **{"adata": on.cells, "method": "composition" if "labels_key" in given else "mean", "spatial_key": "places"}
            | given
        ),
        {"method": "choice", "use_rep": "column", "spatial_key": "missing column", "section_key": "column"}
        | {"radius": "optional positive"},
    ),
    "score_niches": (
        lambda on, **given: scgen.score_niches(
            **{"adata": on.cells, "labels_key": "cell_type", "features": {"a": "z"}, "section_key": "batch"} | given
        ),
        {"labels_key": "missing column", "section_key": "missing column", "features": "features"},
    ),
    "integrate": (
        lambda on, **given: scgen.integrate(**{"adata": on.new, "key": "batch", "max_epochs": 1} | given),
        {name: f"{kind} or None" for name, kind in PASSED_ON.items()} | {"batch_size": "optional whole"},
    ),
    "tune": (lambda on, **given: scgen.tune(**{"adata": on.cells} | given), {}),
    "posterior_predictive_check": (
        lambda on, **given: scgen.posterior_predictive_check(**{"model": on.model} | given),
        {},
    ),
    "clustering.cluster": (
        lambda on, **given: clustering.cluster(**{"adata": on.cells, "basis": "z"} | given),
        {"basis": "column", "suffix": "required key"},
    ),
    "SCVI": (lambda on, **given: scgen.SCVI(**{"adata": on.cells} | given), {}),
    "SCVI.load": (lambda on, **given: scgen.SCVI.load(**{"folder": "saved"} | given), {}),
    "SCVI.from_scvi_tools": (
        lambda on, **given: scgen.SCVI.from_scvi_tools(**{"folder": "theirs"} | given),
        {},
    ),
    "SCVI.train": (
        lambda on, **given: on.model.train(**{"max_epochs": 1} | given),
        {"batch_size": "optional whole"},
    ),
    "SCVI.differential_expression": (
        lambda on, **given: on.model.differential_expression(
            **({} if {"idx1", "idx2"} & given.keys() else {"groupby": "cell_type"})
            | ({"idx1": [0]} if "idx2" in given else {})
            | given
        ),
        {},
    ),
    "SCVI.get_likelihood_parameters": (
        lambda on, **given: on.model.get_likelihood_parameters(**given),
        {"n_samples": "optional draws"},
    ),
    "SCVI.query": (lambda on, **given: on.model.query(**{"adata": on.new} | given), {}),
    "SCVI.setup_anndata": (lambda on, **given: scgen.SCVI.setup_anndata(**{"adata": on.new} | placed(given)), {}),
    "SpatialVAE": (
        lambda on, **given: scgen.SpatialVAE(**{"adata": on.tissue} | given),
        {"use_rep": "column", "likelihood": "optional choice", "radius": "optional positive", "angle": "choice"}
        | {"rotate": "flag", "translate": "flag", "image_shape": "image_shape"},
    ),
    "SpatialVAE.train": (
        lambda on, **given: on.niches.train(**{"max_epochs": 1} | given),
        {"batch_size": "optional whole"},
    ),
    "MatrixNormalVAE": (
        lambda on, **given: scgen.MatrixNormalVAE(**{"adata": on.spots} | given),
        {
            "use_rep": "column",
            "likelihood": "optional choice",
            "n_maps": "size",
            "map_size": "size",
            "patch_size": "odd",
            "rank": "rank",
        }
        | {"grid": "choice", "covariance": "choice", "image_shape": "image_shape"},
    ),
    "SpatialVAE.get_rotation": (lambda on, **given: on.niches.get_rotation(**given), {}),
    "SpatialVAE.get_translation": (lambda on, **given: on.niches.get_translation(**given), {}),
    "SCVI.load_query": (
        lambda on, **given: on.model.load_query(**{"folder": "query", "adata": on.other} | given),
        {},
    ),
    "Query.save": (lambda on, **given: on.query.save(**{"folder": "new"} | given), {}),
    "Query.train": (lambda on, **given: on.query.train(**{"max_epochs": 1} | given), {}),
    "Query.transfer_labels": (
        lambda on, **given: on.query.transfer_labels(**{"labels_key": "cell_type"} | given),
        {},
    ),
    "Query.typicality": (lambda on, **given: on.query.typicality(**given), {}),
    "plots.scatters": (
        lambda on, **given: plots.scatters(
            **{"save": "a.png", "maps": {"a": np.zeros((4, 2))}, "colours": {"a": pd.Series([1] * 4)}} | given
        ),
        {},
    ),
    "plots.history": (lambda on, **given: plots.history(**{"save": "a.png", "model": on.model} | given), {}),
    "plots.scores": (
        lambda on, **given: plots.scores(**{"save": "a.png", "table": pd.DataFrame({"scgen": [0.5]})} | given),
        {},
    ),
    "plots.volcano": (lambda on, **given: plots.volcano(**{"save": "a.png", "table": on.table} | given), {}),
    "plots.tissue": (
        lambda on, **given: plots.tissue(
            **{"save": "a.png", "adata": on.cells, "color": "cell_type", "spatial_key": "places"} | given
        ),
        {"color": "colouring", "spatial_key": "missing column", "rotation_key": "optional numbers", "y_down": "flag"},
    ),
    "plots.posterior_predictive": (
        lambda on, **given: plots.posterior_predictive(**{"save": "a.png", "check": on.check} | given),
        {},
    ),
}
#: Questions, which need nothing.
QUESTIONS = (
    *("get_latent_representation", "get_latent_library_size", "get_elbo", "get_reconstruction_error"),
    *("get_marginal_ll", "get_thinned_ll", "active_units", "get_normalized_expression", "get_cluster_probs"),
    *("get_feature_correlation_matrix", "posterior_predictive_sample", "sample_prior", "save"),
    "view_anndata_setup",
)


def asked(name: str, on: SimpleNamespace, **given):
    model = on.mixture if name == "get_cluster_probs" else on.model
    return getattr(model, name)(**({"folder": "new"} if name == "save" else {}) | given)


CALLS |= {f"SCVI.{name}": (partial(asked, name), {}) for name in QUESTIONS}
#: What is public and takes nothing of a user's: data, and what calls return.
OTHERS = {"PRESETS", "PosteriorPredictiveCheck", "Tuning", "Query.get_latent_representation"}


def function_of(call: str):
    *of, name = call.split(".")
    homes = {
        "plots": plots,
        "clustering": clustering,
        "SCVI": scgen.SCVI,
        "Query": Query,
        "SpatialVAE": scgen.SpatialVAE,
        "MatrixNormalVAE": scgen.MatrixNormalVAE,
    }
    return getattr(homes[of[0]] if of else scgen, name)


def kinds_of(call: str) -> dict[str, str]:
    """Return the kind of each argument of a call."""
    names = [name for name in inspect.signature(function_of(call)).parameters if name not in ("self", "cls")]
    return {name: CALLS[call][1].get(name) or KINDS[name] for name in names}


ARGUMENTS = [(call, name) for call in CALLS for name in kinds_of(call)]


def test_every_argument_has_a_kind():
    public = set(scgen.__all__)
    for prefix, home in (("SCVI", scgen.SCVI), ("Query", Query), ("plots", plots)):
        names = [name for name in dir(home) if not name.startswith("_")]
        public |= {f"{prefix}.{name}" for name in names if inspect.isroutine(getattr(home, name))}
    # What is as in SCVI is tried there, and the training of all models of tissue in SpatialVAE.
    own = {"SpatialVAE": {*vars(scgen.SpatialVAE), "train"}, "MatrixNormalVAE": {*vars(scgen.MatrixNormalVAE)}}
    for home, names in own.items():
        public |= {f"{home}.{name}" for name in names & {*dir(getattr(scgen, home))} if name[0] != "_"}
    known = {call for call in CALLS if not call.startswith("clustering.")}
    public -= {"plots.check_names", "plots.check_whole", "plots.shown", "plots.label_points"}  # of other modules
    assert public == known | OTHERS
    for call in CALLS:
        parameters = inspect.signature(function_of(call)).parameters.values()
        assert not [one for one in parameters if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL)], call
        assert set(CALLS[call][1]) <= set(kinds_of(call)), call
    assert sum(len(WRONG[kinds_of(call)[name]]) for call, name in ARGUMENTS) > 4000


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    """Cells and models to call with, and a folder for files, which is the current one."""
    cells = scgen.simulate_cells(n_cells=120, n_genes=30, n_batches=2, n_types=2, seed=1)
    cells.obs["donor"], cells.obs["age"] = ["a", "b", "c"] * 40, np.linspace(20, 80, 120)
    cells.layers["more"] = cells.X.copy()
    cells.obsm["places"] = np.random.default_rng(0).uniform(size=(120, 2))
    new = cells.copy()
    covariates = {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    scgen.setup_anndata(cells, batch_key="batch", labels_key="cell_type", **covariates)
    on = SimpleNamespace(cells=cells, new=new, tissue=new.copy())
    scgen.setup_anndata(on.tissue, batch_key="batch", spatial_key="places")
    on.spots = on.tissue.copy()
    on.spots.obsm["places"] = np.stack(np.divmod(np.arange(120.0), 12), axis=1)
    for name, prior in (("model", "normal"), ("mixture", "mog")):
        model = scgen.SCVI(cells, n_latent=3, n_hidden=8, prior=prior, n_components=2 if prior == "mog" else None)
        model.train(max_epochs=1, accelerator="cpu", progress=False)
        setattr(on, name, model)
    on.niches = scgen.SpatialVAE(on.tissue, n_latent=3, n_hidden=8, n_neighbors=3, translate=True)
    on.niches.train(max_epochs=1, accelerator="cpu", progress=False)
    other = new[:60].copy()
    other.obs["batch"] = "other"
    on.query, on.other = on.model.query(other), other
    on.table = on.model.differential_expression("cell_type", n_samples=10, n_cells=10)
    on.check = scgen.posterior_predictive_check(on.model, n_samples=2)
    cells.obsm["z"] = on.model.get_latent_representation()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("files"))
        on.model.save("saved")
        on.query.save("query")
        cells.write_h5ad("cells.h5ad")
        yield on


def of_cells(adata: AnnData) -> list:
    arrays = [adata.X.data, adata.X.indices, adata.X.indptr, *adata.obsm.values()]
    arrays += [matrix.data for matrix in adata.layers.values() if hasattr(matrix, "indptr")]
    tables = [(list(table.index), table.to_dict("list")) for table in (adata.obs, adata.var)]
    keys = [list(of) for of in (adata.obsm, adata.obsp, adata.varm, adata.layers)]
    return [np.asarray(array).tobytes() for array in arrays] + [repr((tables, keys, adata.uns))]


def of_model(model: Model) -> list:
    weights = [weight.detach().numpy().tobytes() for weight in model.vae.state_dict().values()]
    rows = [np.asarray(rows).tobytes() for rows in (model.train_indices, model.validation_indices)]
    return [*weights, *rows, repr((model.trainings, model.history.to_dict("list"), model.arguments, model.registry))]


def everything(on: SimpleNamespace) -> bytes:
    """Return a hash of all that a wrong call must leave as it is: cells, models, files and global generators."""
    parts = [
        *of_cells(on.cells),
        *of_cells(on.new),
        *of_cells(on.tissue),
        *of_cells(on.spots),
        *of_cells(on.query.model.adata),
    ]
    for model in (on.model, on.mixture, on.query.model, on.niches):
        parts += of_model(model)
    parts += [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sorted(Path().rglob("*"))]
    _, state, position, *_ = np.random.get_state()  # noqa: NPY002
    parts += [torch.get_rng_state().numpy().tobytes(), state.tobytes(), f"{position} {torch.get_default_dtype()}"]
    return hashlib.sha256(b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)).digest()


@pytest.fixture(scope="module")
def before(on):
    return everything(on)


def complaint(error: BaseException | None, name: str, value) -> str | None:
    """Return what is wrong with the error for a wrong value; None where it is as it should be."""
    if error is None:
        return "accepted in silence"
    message, last = str(error), Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    # What numpy, torch or pandas say is of their arguments.
    if not isinstance(error, TypeError | ValueError | MemoryError) or PACKAGE not in last.parents:
        return f"from {last.name}: {type(error).__name__}: {message}"
    if name not in message or len(message) > 1500:
        return f"does not name it: {message}"
    is_short = value is None or (isinstance(value, bool | int | float) and not abs(value) > 10**18)
    if is_short and name not in ("adata", "indices", "idx1", "idx2") and str(value) not in message:
        return f"does not tell the value: {message}"
    return None


@pytest.mark.parametrize(("call", "name"), ARGUMENTS, ids=["-".join(argument) for argument in ARGUMENTS])
def test_wrong_values_are_refused_by_name(on, before, call, name):
    complaints = {}
    for i, value in enumerate(WRONG[kinds_of(call)[name]]):
        error = None
        try:
            CALLS[call][0](on, **{name: value})
        except Exception as raised:
            error = raised
        told = complaint(error, name, value)
        if told is None and everything(on) != before:
            told = "something was changed"
        if told is not None:
            complaints[f"{i}: {arguments.shown(value)}"] = told
    assert not complaints


#: What takes more memory than there is, where there is little.
LARGE = {
    "simulate_cells": {"n_cells": 1000},
    "simulate_tissue": {"n_rows": 100},
    "posterior_predictive_check": {"n_samples": 1000},
    "SCVI": {"n_hidden": 3000},
    "SCVI.train": {"n_importance_samples": 1000},
    "SpatialVAE.train": {"batch_size": 30},
    "SCVI.sample_prior": {"n": 10_000},
    "SCVI.posterior_predictive_sample": {"n_samples": 1000},
    "SCVI.get_likelihood_parameters": {"n_samples": 1000},
    "SCVI.get_feature_correlation_matrix": {"n_samples": 1000},
    "SCVI.differential_expression": {"n_samples": 100_000},
    "SCVI.get_normalized_expression": {"n_samples": 1000, "return_mean": False},
    "Query.transfer_labels": {"n_neighbors": 1000},
    "MatrixNormalVAE": {"patch_size": 101},
}


@pytest.mark.parametrize("call", LARGE)
def test_what_memory_does_not_hold_is_said_before_it_is_tried(on, before, monkeypatch, call):
    monkeypatch.setattr(arguments, "_memory", lambda: 1e5)
    name, value = next(iter(LARGE[call].items()))
    with pytest.raises(
        MemoryError, match=rf"^{name}={value} needs about [0-9.e+-]+ GB of memory, but this machine has"
    ):
        CALLS[call][0](on, **LARGE[call])
    assert everything(on) == before


def test_memory_for_draws_that_are_weighed(on, monkeypatch):
    monkeypatch.setattr(arguments, "_memory", lambda: 1e5)
    with pytest.raises(MemoryError, match="n_samples=1000"):
        on.model.get_normalized_expression(n_samples=1000, weights="importance")


def numpys(given: dict) -> dict:
    """Return the same as NumPy's scalars, of the smallest types."""
    types = {bool: np.bool_, int: np.int8, float: np.float64, str: np.str_}
    return {name: types[type(value)](value) for name, value in given.items()}


def test_numpys_scalars_are_taken_as_pythons(on):
    settings = {"n_latent": 3, "n_hidden": 8, "n_layers": 1, "dropout_rate": 0.25, "gene_likelihood": "nb", "seed": 1}
    settings |= {"use_observed_lib_size": False, "prior": "mog", "n_components": 2}
    options = {"max_epochs": 2, "batch_size": 64, "train_size": 0.75, "early_stopping": False, "patience": 1, "seed": 2}
    options |= {"learning_rate": 0.015625, "kl_start": 2.0, "batch_penalty": 5.0, "n_importance_samples": 2}
    options |= {"progress": False, "devices": 1}
    found = []
    for form in (dict, numpys):
        model = scgen.SCVI(on.cells, **form(settings))
        model.train(**form(options | {"accelerator": "cpu"}))
        model.save("numpys", **form({"overwrite": True}))
        loaded = scgen.SCVI.load("numpys", on.cells)
        assert (loaded.arguments, loaded.trainings) == (model.arguments, model.trainings)
        rows = np.uint8([1, 119])
        few = form({"n_samples": 3, "batch_size": 100, "seed": 3})
        query = loaded.query(on.new, **form({"min_overlap": 0.5}))
        found.append(
            [
                model.arguments,
                model.trainings,
                loaded.get_latent_representation(**form({"give_mean": False, "batch_size": 7, "seed": 3})),
                loaded.get_elbo(**form({"return_mean": True, "batch_size": 100})),
                loaded.get_marginal_ll(**form({"n_mc_samples": 3})),
                loaded.get_thinned_ll(**few, **form({"held_out": 0.5})),
                loaded.get_normalized_expression(**few, **form({"library_size": 100, "weights": "importance"})),
                loaded.get_normalized_expression(**form({"n_samples": 100, "return_mean": False}), indices=rows),
                loaded.get_feature_correlation_matrix(**few),
                loaded.get_likelihood_parameters(**few, gene_list=np.array(["gene_2"]))["mean"],
                loaded.get_cluster_probs(**few),
                loaded.differential_expression("cell_type", **form({"n_samples": 100, "n_cells": 50, "delta": 0.5})),
                loaded.posterior_predictive_sample(**few)[-1].toarray(),
                loaded.sample_prior(**form({"n": 100, "seed": 5, "batch": "batch_1"})).X.toarray(),
                scgen.posterior_predictive_check(loaded, **form({"n_samples": 127})).genes,
                query.transfer_labels(**form({"labels_key": "cell_type", "n_neighbors": 9, "unknown_below": 0.5})),
                query.typicality(**form({"seed": 1})),
                scgen.simulate_cells(**form({"n_cells": 100, "n_genes": 100, "seed": 1})).X.toarray(),
            ]
        )
    for ours, theirs in zip(*found, strict=True):
        assert repr(ours) == repr(theirs)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


#: By flag of the command: wrong values, each an argument of the shell; None for a flag that takes no value.
WRONG_WHOLE = ["x", "", "1.5", "-1", "1e3", "nan", "inf", "0x10", " ", "True", "1,000", "1" * 30]
WRONG_FILE = ["", "nowhere.h5ad", "saved", "notes.txt", "nowhere/cells.h5ad"]
WRONG_OUT = ["", "saved", "nowhere/out.h5ad", "cells.h5ad", "notes.txt/out.h5ad"]
WRONG_NUMBER = ["x", "", "nan", "inf", "-1", "1,5", " "]
WRONG_COLUMNS = {
    "--covariate": ["", "nope", "batch"],
    "--continuous-covariate": ["", "nope", "donor"],
    "--size-factor-key": ["", "nope", "donor"],
    "--no-counts": None,
}
WRONG_FLAGS = {
    "integrate": WRONG_COLUMNS
    | {key: [*WRONG_WHOLE, "0"] for key in ("--n-latent", "--n-hidden", "--n-layers", "--n-components")}
    | {"--n-flows": [*WRONG_WHOLE, "0", "3"]}
    | {key: [*WRONG_WHOLE[:-1], "0"] for key in ("--batch-size", "--patience", "--n-importance-samples")}
    | {key: ["", "nope"] for key in ("--gene-likelihood", "--dispersion", "--posterior", "--prior", "--precision")}
    | {key: [*WRONG_NUMBER, "1.5"] for key in ("--dropout-rate", "--train-size")}
    | dict.fromkeys(("--learning-rate", "--kl-start", "--batch-penalty"), WRONG_NUMBER)
    | dict.fromkeys(("--tune", "--no-use-observed-lib-size", "--no-encode-covariates", "--no-library-residual"))
    | {"--no-early-stopping": None, "--devices": [*WRONG_WHOLE, "0", "2"], "--suffix": ["", "a/b"]}
    | {
        "input": WRONG_FILE,
        "--output": WRONG_OUT,
        "--batch-key": ["", "nope", "Batch"],
        "--labels-key": ["", "nope", "leiden_scgen"],
        "--layer": ["", "nope"],
        "--n-top-genes": [*WRONG_WHOLE[:-1], "0"],
        "--n-models": [*WRONG_WHOLE, "0"],
        "--report": ["", "notes.txt", "notes.txt/report"],
        "--max-epochs": [*WRONG_WHOLE, "0"],
        "--accelerator": ["", "tpu", "CPU", "mps"],
        "--seed": [*WRONG_WHOLE, str(2**32)],
        "--overwrite": None,
        "--quiet": None,
        "--resolution": WRONG_NUMBER,
    },
    "check": WRONG_COLUMNS
    | {
        "input": WRONG_FILE,
        "--batch-key": ["", "nope"],
        "--labels-key": ["", "nope"],
        "--layer": ["", "nope"],
    },
    "simulate": {
        "--output": WRONG_OUT,
        "--n-cells": [*WRONG_WHOLE, "0"],
        "--n-genes": [*WRONG_WHOLE, "0"],
        "--n-batches": [*WRONG_WHOLE, "0"],
        "--seed": [*WRONG_WHOLE, str(2**32)],
        "--overwrite": None,
    },
    "convert": {
        "input": ["", "nowhere", "saved", "notes.txt"],
        "--output": [""],
        "--prefix": ["nope"],
        "--data": WRONG_FILE,
        "--overwrite": None,
    },
}
#: How each command is called rightly.
RIGHT = {
    "integrate": {"input": "cells.h5ad", "--output": "out.h5ad", "--batch-key": "batch", "--max-epochs": "1"},
    "check": {"input": "cells.h5ad", "--batch-key": "batch"},
    "simulate": {"--output": "out.h5ad", "--n-cells": "20", "--n-genes": "10"},
    "convert": {"input": "theirs", "--output": "out"},
}


def test_every_flag_has_wrong_values():
    commands = next(one for one in parser(cli.COMMANDS)._actions if isinstance(one, argparse._SubParsersAction)).choices
    assert commands.keys() == WRONG_FLAGS.keys()
    for name, command in commands.items():
        flags = {(one.option_strings or [one.dest])[-1] for one in command._actions} - {"--help"}
        assert flags == WRONG_FLAGS[name].keys(), name


@pytest.mark.parametrize("command", RIGHT)
def test_wrong_flags_are_refused_by_name(on, capsys, monkeypatch, command):
    Path("notes.txt").write_text("notes")
    before, complaints = everything(on), {}
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)  # restored after the test
    for flag, values in WRONG_FLAGS[command].items():
        for value in values or []:
            given = RIGHT[command] | {flag: value}
            line = [part for name, text in given.items() for part in ([text] if name == "input" else [name, text])]
            try:
                code = cli.main([command, *line])
            except SystemExit as error:
                code = error.code
            out, told = capsys.readouterr()
            # `check` ends with whether scgen can read the file; what is wrong stands above.
            last = out if command == "check" and out else told.strip().rpartition("\n")[2]
            shown = {"convert": "SCVI_DIR"}.get(command, "IN") if flag == "input" else flag
            names = [shown, value.split("/")[0]]
            if code not in (1, 2) or "Traceback" in told or not any(name and name in last for name in names):
                complaints[f"{flag} {value!r}"] = f"{code}: {last}"
            elif everything(on) != before:
                complaints[f"{flag} {value!r}"] = "something was changed"
    assert not complaints


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble])
def test_numbers_of_all_of_numpys_kinds_are_taken(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert arguments.check_number("x", kind(0.5), "a number", least=0, below=1) == 0.5
        with pytest.raises(ValueError, match="x="):
            arguments.check_number("x", kind(np.inf), "a number")
        with pytest.raises(ValueError, match="x="):
            arguments.check_number("x", kind(1), "a number", below=1)
