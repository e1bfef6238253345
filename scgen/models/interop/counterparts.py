"""What the names of scvi-tools' model are called here: errors that answer them, from one table.

`ARGUMENTS` and `ATTRIBUTES` say what to write instead. `Answering`, the metaclass of what users call, puts the answers
into the errors that Python raises for a name that is not there.
"""

import inspect
import re
from collections.abc import Collection
from contextlib import ContextDecorator
from typing import TYPE_CHECKING

from scgen.arguments import did_you_mean

_CELLS = 'cells come from an AnnData, adata=...; it may be opened with backed="r"'
_DEVICE = 'accelerator="gpu" or "cpu" chooses the device of a training; "auto" takes a GPU where there is one'
_FIXED = "it is fixed and cannot be chosen"
_FOLDER = "each model has a folder of its own"
_FROZEN = "the weights of the reference never change; Query.train fits those of new batches alone"
_IMPORTANCE = 'weights="importance" weighs the n_samples draws of each cell, and has no other settings'
_KL = "kl_start is the weight of the KL divergence at the first step; it reaches 1 halfway through the training"
_LOG = "model.history has a row for each epoch, and on_epoch=... is called with it after each epoch"
_MANAGER = 'there are no managers: adata.uns["scgen"]["setup"] and model.registry say what is read'
_NONE = "there is no counterpart here"
_PLAN = "learning_rate is its lr, and kl_start takes the place of its n_epochs_kl_warmup; the rest is fixed"
_PROGRESS = "progress=False hides the progress line"
_QUERY = "model.query(adata) maps new cells onto a trained model"
_QUIET = "nothing is printed"
_RATE = "learning_rate is the peak of a fixed schedule, which rises for a tenth of the steps and then falls to 0"
_SIZES = "n_cells and n_samples say how much is drawn"
_STOPPING = (
    "early stopping watches the validation ELBO in the second half of the planned epochs; patience is its only setting"
)

#: By function, "" for all: scvi-tools' arguments, and our name for each, or a sentence that says what to do.
ARGUMENTS = {
    "": {
        "data_loader_kwargs": _CELLS,
        "dataloader": _CELLS,
        "datamodule": _CELLS,
        "n_mc_samples_per_pass": "batch_size says how many cells are computed at a time",
        "silent": _QUIET,
        "transform_batch": "batch",
    },
    "SCVI.__init__": {
        "batch_embedding_kwargs": _NONE,
        "batch_representation": 'each batch has a row of weights, as with "one-hot"; there are no embeddings',
        "deeply_inject_covariates": "every hidden layer of the decoder sees batch and covariates",
        "extra_decoder_kwargs": _NONE,
        "extra_encoder_kwargs": _NONE,
        "extra_payload_autotune": "scgen.tune(adata) chooses settings",
        "latent_distribution": 'posterior="normal" and prior="normal" are its "normal"; its "ln" has no counterpart',
        "library_log_means": "the prior of the library is fitted to the training cells of each batch",
        "library_log_vars": "the prior of the library is fitted to the training cells of each batch",
        "log_variational": "the encoders always read log(1 + x)",
        "registry": "a model is made of cells; SCVI.load(folder) loads one without cells",
        "use_batch_norm": "encoders and decoder have batch normalisation",
        "use_layer_norm": "there is no layer normalisation",
        "use_size_factor_key": "setup_anndata(adata, size_factor_key=...) names the column of the size factors",
        "var_activation": _FIXED,
    },
    "Model.train": {
        "benchmark": _FIXED,
        "callbacks": _LOG,
        "check_val_every_n_epoch": "the validation ELBO is computed after every epoch",
        "checkpointing_monitor": "the weights of the best validation ELBO are kept",
        "compile": "the kernels are compiled in any case",
        "compile_kwargs": "the kernels are compiled in any case",
        "datasplitter_kwargs": "train_size is the only setting of the split; the other cells validate",
        "default_root_dir": "nothing is written; model.save(folder) saves the model",
        "early_stopping_min_delta": _STOPPING,
        "early_stopping_mode": _STOPPING,
        "early_stopping_monitor": _STOPPING,
        "early_stopping_patience": "patience",
        "early_stopping_warmup_epochs": _STOPPING,
        "enable_checkpointing": "the weights of the best validation ELBO are kept",
        "enable_model_summary": "print(model) describes the model",
        "enable_progress_bar": "progress",
        "eps": _FIXED,
        "gradient_clip_algorithm": "gradients are no longer than three times their usual length",
        "gradient_clip_val": "gradients are no longer than three times their usual length",
        "learning_rate_monitor": _RATE,
        "load_sparse_tensor": "sparse counts stay sparse",
        "log_every_n_steps": _LOG,
        "log_save_dir": _LOG,
        "logger": _LOG,
        "lr": "learning_rate",
        "lr_factor": _RATE,
        "lr_min": _RATE,
        "lr_patience": _RATE,
        "lr_scheduler_metric": _RATE,
        "lr_threshold": _RATE,
        "max_kl_weight": _KL,
        "min_kl_weight": _KL,
        "n_epochs_kl_warmup": _KL,
        "n_steps_kl_warmup": _KL,
        "num_sanity_val_steps": "the validation ELBO is computed after every epoch",
        "on_step": _LOG,
        "optimizer": "the optimiser is Adam",
        "optimizer_creator": "the optimiser is Adam",
        "plan_config": _PLAN,
        "plan_kwargs": _PLAN,
        "progress_bar_refresh_rate": _PROGRESS,
        "reduce_lr_on_plateau": _RATE,
        "shuffle_set_split": "cells are drawn at random for the split",
        "simple_progress_bar": _PROGRESS,
        "strategy": "a training runs on one device",
        "trainer_config": "its settings are arguments of train: early_stopping, patience, progress, precision",
        "update_only_decoder": _NONE,
        "use_gpu": _DEVICE,
        "validation_size": "train_size is the share of the cells to train on; the others validate",
        "weight_decay": "it is 1e-6; a query needs no other, since its reference stays as it is",
    },
    "Model.get_latent_representation": {
        "mc_samples": "a flow's mean is taken over 100 draws; a Gaussian's needs none",
    },
    "ExpressionModel.get_normalized_expression": {
        "importance_weighting_kwargs": _IMPORTANCE,
        "max_cells": _IMPORTANCE,
        "n_mc_samples": _IMPORTANCE,
        "n_samples_overall": "indices=... chooses the cells, and n_samples is the number of draws for each",
        "truncation": _IMPORTANCE,
    },
    "ExpressionModel.get_feature_correlation_matrix": {
        "rna_size_factor": "it multiplies all values alike, and changes no correlation",
    },
    "ExpressionModel.posterior_predictive_sample": {
        "gene_list": "all genes are drawn, in the order of model.registry.genes; take columns of the result",
    },
    "ExpressionModel.differential_expression": {
        "all_stats": "the table always has the statistics of the counts",
        "batch_size": _SIZES,
        "batchid1": "batch_correction=True averages over all batches; False leaves each cell in its own",
        "batchid2": "batch_correction=True averages over all batches; False leaves each cell in its own",
        "change_fn": _FIXED,
        "cred_interval_lvls": "lfc_mean and lfc_std tell the spread of the fold change",
        "filter_outlier_cells": "idx1=... and idx2=... choose the cells of the groups",
        "importance_weighting_kwargs": "the cells of a group are weighed at random",
        "m1_domain_fn": "delta is the fold change that is of interest",
        "m_permutation": _SIZES,
        "n_samples_overall": _SIZES,
        "pseudocounts": "they are found from the counts, and are in the table",
        "test_mode": "a gene is called for a change in one direction",
        "threshold_counts": "pseudocounts are found from the counts, and are in the table",
        "use_observed_batches": "batch_correction=False leaves each cell in its own batch",
        "use_permutation": _SIZES,
        "weights": "the cells of a group are weighed at random",
    },
    "Model.query": {
        "freeze_batchnorm_decoder": _FROZEN,
        "freeze_batchnorm_encoder": _FROZEN,
        "freeze_classifier": _FROZEN,
        "freeze_decoder_first_layer": _FROZEN,
        "freeze_dropout": _FROZEN,
        "freeze_expression": _FROZEN,
        "inplace": "the new cells stay as they are",
        "inplace_subset_query_vars": "the new cells stay as they are",
        "reference_model": "the reference is the model that is asked: reference.query(adata)",
        "return_reference_var_names": "model.registry.genes are the names of the genes",
        "transfer_batch": _FROZEN,
        "unfrozen": _FROZEN,
    },
    "Model.save": {
        "dir_path": "folder",
        "legacy_mudata_format": _NONE,
        "prefix": _FOLDER,
        "save_anndata": "adata.write_h5ad(path) saves the cells",
        "save_kwargs": _NONE,
    },
    "Model.load": {
        "accelerator": "a model is loaded to the CPU; train(accelerator=...) chooses a device",
        "allowed_classes_names_list": "SCVI.from_scvi_tools(folder, adata) loads a model that scvi-tools saved",
        "backup_url": "nothing is downloaded",
        "device": "a model is loaded to the CPU; train(accelerator=...) chooses a device",
        "dir_path": "folder",
        "prefix": _FOLDER,
    },
    "SCVI.from_scvi_tools": {"dir_path": "folder"},
    "Model.view_anndata_setup": {"hide_state_registries": "the table has only one form"},
}
_OF_MODEL = ("batch_size", "devices", "early_stopping", "early_stopping_patience", "train_size")
ARGUMENTS["Query.train"] = ARGUMENTS["Model.train"] | dict.fromkeys(
    _OF_MODEL, "query.model.train takes all arguments of SCVI.train"
)

#: scvi-tools' methods and attributes, and what to write instead.
ATTRIBUTES = {
    "adata_manager": _MANAGER,
    "convert_legacy_save": "SCVI.from_scvi_tools(folder, adata) loads a model that scvi-tools saved",
    "data_registry": _MANAGER,
    "deregister_manager": _MANAGER,
    "device": "model.vae.device is where the weights are",
    "differential_abundance": _NONE,
    "get_aggregated_posterior": "get_latent_representation(return_dist=True) gives the posterior of each cell",
    "get_anndata_manager": _MANAGER,
    "get_batch_representation": "each batch has a row of weights, and no embedding",
    "get_from_registry": _MANAGER,
    "get_importance_weights": 'get_normalized_expression(weights="importance") uses such weights',
    "get_normalized_function_name": "it is get_normalized_expression",
    "get_setup_arg": "model.registry.setup has the arguments of setup_anndata",
    "get_state_registry": _MANAGER,
    "get_var_names": "model.registry.genes are the names of the genes",
    "history_": "it is model.history, a table",
    "init_params_": "model.arguments are the arguments of the model",
    "is_trained_": "it is model.is_trained",
    "load_query_data": _QUERY,
    "load_registry": "SCVI.load(folder).registry is the registry of a saved model",
    "minified_data_type": _NONE,
    "minify_adata": "a saved model has no cells, and SCVI.load(folder) loads it without them",
    "module": "it is model.vae",
    "prepare_query_anndata": f"{_QUERY}; its genes are found by name, and missing ones need not be added",
    "prepare_query_mudata": f"{_QUERY}; MuData is not read",
    "register_manager": _MANAGER,
    "run_id": _NONE,
    "run_name": _NONE,
    "setup_annbatch": 'setup_anndata takes an AnnData; it may be opened with backed="r"',
    "setup_mudata": "MuData is not read: setup_anndata takes an AnnData",
    "summary_string": "it is str(model)",
    "test_indices": "cells are trained on or validated on; those of model.validation_indices are held out",
    "to_device": "train(accelerator=...) chooses the device of a training",
    "trainer": "model.trainings has the options of each training, and model.history its course",
    "transfer_fields": "every question takes other cells, adata=..., which need not be set up",
    "update_setup_method_args": "call setup_anndata again, and make a new model",
    "view_registry": "view_anndata_setup() returns the setup as a table",
    "view_setup_args": "SCVI.load(folder).registry.setup has the arguments of setup_anndata",
    "view_setup_method_args": "model.registry.setup has the arguments of setup_anndata",
}


class Answering(type):
    """Metaclass of what users call: an argument or attribute of scvi-tools' is answered with what it is called here.

    Names in the class's ``_hidden`` are not listed by `dir`, and so not offered by completion.
    """

    _hidden: Collection[str] = ()

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict):
        super().__init__(name, bases, namespace)
        if not cls.__module__.startswith("scgen."):  # a user's class has its own methods and names
            return
        for key, value in namespace.items():
            if isinstance(value, classmethod):
                setattr(cls, key, classmethod(_Answered(value.__func__)(value.__func__)))
            elif inspect.isfunction(value) and (key == "__init__" or not key.startswith("_")):
                setattr(cls, key, _Answered(value)(value))
        if not TYPE_CHECKING:  # a type checker takes a class with this method to have every attribute
            cls.__getattr__ = lambda self, missing: _refuse(type(self), missing, vars(self).get("model"))
        cls.__dir__ = lambda self: [key for key in object.__dir__(self) if key not in cls._hidden]

    if not TYPE_CHECKING:  # as above

        def __getattr__(cls, missing: str):
            _refuse(cls, missing)

    def __dir__(cls) -> list[str]:
        return [key for key in super().__dir__() if key not in cls._hidden]


def _refuse(cls: type, missing: str, model=None) -> None:
    """Raise the AttributeError for a name that a class, or an object of it that may have a model, does not have."""
    message = f"{cls.__name__} has no attribute {missing!r}"
    told = (
        f"its model has it, .model.{missing}"
        if model is not None and hasattr(model, missing)
        else ATTRIBUTES.get(missing)
    )
    if told is None:
        raise AttributeError(message)
    raise AttributeError(f"{message}: {told}", name=missing, obj=None)  # for which Python suggests no other name


class _Answered(ContextDecorator):
    """Decorator of a function: the TypeError for arguments that it does not take says what to write instead.

    It is the standard library's, so that no function of ours stands between a user's call and what is called, and none
    takes arguments only to pass them on.
    """

    def __init__(self, function):
        self.function = function

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # Within the function itself, the trace would be longer.
        if kind is TypeError and trace.tb_next is None:
            if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
                raise TypeError(_answer(self.function, unknown[1])) from None
            if re.search("positional arguments? but|multiple values", str(error)):
                first = [name for name, of in _taken(self.function).items() if of.kind == of.POSITIONAL_OR_KEYWORD]
                told = f"{error}. By position it takes {', '.join(first) or 'none'}: write the names of all others."
                raise TypeError(told) from None


def _taken(function) -> dict[str, inspect.Parameter]:
    """Return the arguments that a user gives to a function."""
    found = inspect.signature(function).parameters
    return {name: of for name, of in found.items() if name not in ("self", "cls")}


def _answer(function, name: str) -> str:
    """Return the message for an argument that a function does not have."""
    place = function.__qualname__
    call = place.removesuffix(".__init__").rpartition(".")[2]
    own = list(_taken(function))
    told = (ARGUMENTS[""] | ARGUMENTS.get(place, {})).get(name, "")
    if told in own:
        return f"{name} is called {told} here: {call}({told}=...)."
    if " " in told:
        return f"{call}() has no argument {name}: {told}."
    nearest = "" if told else did_you_mean(name, own)
    return f"{call}() has no argument {name}.{nearest} It takes {', '.join(own)}."
