"""What the names of scvi-tools' SCVI are answered with."""

import copy
import inspect
import pickle

import pytest

import scgen
from scgen.models.interop import counterparts
from scgen.models.queries import Query

#: By method of scvi-tools' SCVI: our function, and the names of all arguments that theirs takes. They are those that
#: `inspect.signature` gives of version 1.4.2, with those of what it passes arguments on to: its VAE, TrainingPlan,
#: Trainer and get_bayes_factors.
PEER = {
    "__init__": (
        scgen.SCVI.__init__,
        "adata registry n_hidden n_latent n_layers dropout_rate dispersion gene_likelihood use_observed_lib_size "
        "latent_distribution n_input n_batch n_labels n_continuous_cov n_cats_per_cov log_variational "
        "encode_covariates deeply_inject_covariates batch_representation use_batch_norm use_layer_norm "
        "use_size_factor_key extra_payload_autotune library_log_means library_log_vars var_activation "
        "extra_encoder_kwargs extra_decoder_kwargs batch_embedding_kwargs",
    ),
    "setup_anndata": (
        scgen.SCVI.setup_anndata,
        "adata layer batch_key labels_key size_factor_key categorical_covariate_keys continuous_covariate_keys",
    ),
    "train": (
        scgen.SCVI.train,
        "max_epochs accelerator devices train_size validation_size shuffle_set_split load_sparse_tensor batch_size "
        "early_stopping datasplitter_kwargs plan_config plan_kwargs datamodule trainer_config optimizer "
        "optimizer_creator lr update_only_decoder weight_decay eps n_steps_kl_warmup n_epochs_kl_warmup "
        "reduce_lr_on_plateau lr_factor lr_patience lr_threshold lr_scheduler_metric lr_min max_kl_weight "
        "min_kl_weight compile compile_kwargs on_step on_epoch benchmark check_val_every_n_epoch default_root_dir "
        "enable_checkpointing checkpointing_monitor num_sanity_val_steps enable_model_summary early_stopping_monitor "
        "early_stopping_min_delta early_stopping_patience early_stopping_warmup_epochs early_stopping_mode "
        "enable_progress_bar progress_bar_refresh_rate simple_progress_bar logger log_every_n_steps "
        "learning_rate_monitor log_save_dir",
    ),
    "get_latent_representation": (
        scgen.SCVI.get_latent_representation,
        "adata indices give_mean mc_samples batch_size return_dist dataloader",
    ),
    "get_latent_library_size": (
        scgen.SCVI.get_latent_library_size,
        "adata indices give_mean batch_size dataloader",
    ),
    "get_elbo": (
        scgen.SCVI.get_elbo,
        "adata indices batch_size dataloader return_mean data_loader_kwargs",
    ),
    "get_reconstruction_error": (
        scgen.SCVI.get_reconstruction_error,
        "adata indices batch_size dataloader return_mean data_loader_kwargs",
    ),
    "get_marginal_ll": (
        scgen.SCVI.get_marginal_ll,
        "adata indices n_mc_samples batch_size return_mean dataloader data_loader_kwargs",
    ),
    "get_normalized_expression": (
        scgen.SCVI.get_normalized_expression,
        "adata indices transform_batch gene_list library_size n_samples n_samples_overall weights batch_size "
        "return_mean return_numpy silent dataloader data_loader_kwargs",
    ),
    "get_feature_correlation_matrix": (
        scgen.SCVI.get_feature_correlation_matrix,
        "adata indices n_samples batch_size rna_size_factor transform_batch correlation_type silent",
    ),
    "get_likelihood_parameters": (
        scgen.SCVI.get_likelihood_parameters,
        "adata indices n_samples give_mean batch_size dataloader",
    ),
    "posterior_predictive_sample": (
        scgen.SCVI.posterior_predictive_sample,
        "adata indices transform_batch n_samples gene_list batch_size dataloader silent",
    ),
    "differential_expression": (
        scgen.SCVI.differential_expression,
        "adata groupby group1 group2 idx1 idx2 mode delta batch_size all_stats batch_correction batchid1 batchid2 "
        "fdr_target silent weights filter_outlier_cells importance_weighting_kwargs use_observed_batches "
        "n_samples_overall use_permutation m_permutation change_fn m1_domain_fn pseudocounts threshold_counts "
        "test_mode cred_interval_lvls",
    ),
    "save": (
        scgen.SCVI.save,
        "dir_path prefix overwrite save_anndata save_kwargs legacy_mudata_format datamodule",
    ),
    "load": (
        scgen.SCVI.load,
        "dir_path adata accelerator device prefix backup_url datamodule allowed_classes_names_list",
    ),
    "load_query_data": (
        scgen.SCVI.query,
        "adata reference_model registry inplace_subset_query_vars accelerator device unfrozen freeze_dropout "
        "freeze_expression freeze_decoder_first_layer freeze_batchnorm_encoder freeze_batchnorm_decoder "
        "freeze_classifier transfer_batch datamodule",
    ),
    "view_anndata_setup": (scgen.SCVI.view_anndata_setup, "adata hide_state_registries"),
    "prepare_query_anndata": (scgen.SCVI.query, "adata reference_model return_reference_var_names inplace"),
}
#: Left to Python's error: what scvi-tools' SCVI sets by itself, and what belongs to loading, which `query` does not do.
UNANSWERED = {
    "__init__": {"n_input", "n_batch", "n_labels", "n_continuous_cov", "n_cats_per_cov"},
    "train": {"on_epoch"},
    "load_query_data": {"registry", "accelerator", "device"},
}
#: All public attributes of its class and of its instances, and some of its older versions.
PEER_ATTRIBUTES = [
    "adata",
    "adata_manager",
    "convert_legacy_save",
    "data_registry",
    "deregister_manager",
    "device",
    "differential_abundance",
    "differential_expression",
    "get_aggregated_posterior",
    "get_anndata_manager",
    "get_batch_representation",
    "get_elbo",
    "get_feature_correlation_matrix",
    "get_from_registry",
    "get_importance_weights",
    "get_latent_library_size",
    "get_latent_representation",
    "get_likelihood_parameters",
    "get_marginal_ll",
    "get_normalized_expression",
    "get_normalized_function_name",
    "get_reconstruction_error",
    "get_setup_arg",
    "get_state_registry",
    "get_var_names",
    "history",
    "is_trained",
    "load",
    "load_query_data",
    "load_registry",
    "minified_data_type",
    "minify_adata",
    "posterior_predictive_sample",
    "prepare_query_anndata",
    "prepare_query_mudata",
    "register_manager",
    "registry",
    "run_id",
    "run_name",
    "save",
    "setup_anndata",
    "summary_string",
    "test_indices",
    "to_device",
    "train",
    "train_indices",
    "transfer_fields",
    "update_setup_method_args",
    "validation_indices",
    "view_anndata_setup",
    "view_registry",
    "view_setup_args",
    "view_setup_method_args",
    "module",
    "trainer",
    "history_",
    "is_trained_",
    "init_params_",
    "setup_mudata",
]


@pytest.fixture(scope="module")
def model():
    cells = scgen.simulate_cells(n_cells=60, n_genes=10, n_batches=2, seed=1)
    scgen.setup_anndata(cells, batch_key="batch")
    model = scgen.SCVI(cells, n_latent=2, n_hidden=4)
    model.train(1, progress=False)
    return model


def message_for(function, name: str) -> str:
    with pytest.raises(TypeError) as caught:
        function(**{name: None})
    return str(caught.value)


@pytest.mark.parametrize("method", PEER)
def test_every_argument_of_theirs_is_taken_or_answered(method):
    function, names = PEER[method]
    taken = inspect.signature(function).parameters
    for name in set(names.split()) - taken.keys() - UNANSWERED.get(method, set()):
        message = message_for(function, name)
        renamed = message.partition(" is called ")[2].partition(" ")[0]
        assert renamed in taken or f"() has no argument {name}: " in message, message
        assert message.endswith(".")
        assert not message.endswith("..")


@pytest.mark.parametrize("method", PEER)
def test_the_list_is_that_of_scvi_tools(method):
    scvi = pytest.importorskip("scvi")
    from scvi.model.base._differential import DifferentialComputation

    sources = {
        "__init__": [scvi.module.VAE.__init__],
        "train": [scvi.train.TrainingPlan.__init__, scvi.train.Trainer.__init__],
        "differential_expression": [DifferentialComputation.get_bayes_factors],
    }
    theirs = {
        name
        for function in [getattr(scvi.model.SCVI, method), *sources.get(method, [])]
        for name, of in inspect.signature(function).parameters.items()
        if of.kind not in (of.VAR_KEYWORD, of.VAR_POSITIONAL)
    }
    assert theirs - {"self", "cls", "module"} <= set(PEER[method][1].split())
    assert {name for name in dir(scvi.model.SCVI) if not name.startswith("_")} <= set(PEER_ATTRIBUTES)


def test_what_is_renamed_is_told_as_a_call():
    assert (
        message_for(scgen.SCVI.train, "early_stopping_patience")
        == "early_stopping_patience is called patience here: train(patience=...)."
    )
    assert "train(progress=...)" in message_for(scgen.SCVI.train, "enable_progress_bar")
    assert "load(folder=...)" in message_for(scgen.SCVI.load, "dir_path")
    assert "posterior_predictive_sample(batch=...)" in message_for(
        scgen.SCVI.posterior_predictive_sample, "transform_batch"
    )
    assert "learning_rate" in message_for(scgen.SCVI.train, "plan_kwargs")
    assert "learning_rate" in message_for(Query.train, "plan_kwargs")
    assert "query.model.train" in message_for(Query.train, "early_stopping_patience")
    assert 'accelerator="gpu"' in message_for(scgen.SCVI.train, "use_gpu")
    assert 'posterior="normal"' in message_for(scgen.SCVI, "latent_distribution")


def test_a_name_of_neither_is_told_the_nearest():
    message = message_for(scgen.SCVI.train, "epochs")
    assert 'Did you mean "max_epochs"? It takes max_epochs, batch_size,' in message
    assert 'Did you mean "n_hidden"?' in message_for(scgen.SCVI, "n_hiden")


def test_every_answer_is_of_an_argument_that_is_not_taken():
    functions = {of.__qualname__: of for of, _ in PEER.values()}
    functions |= {of.__qualname__: of for of in (Query.train, scgen.SCVI.from_scvi_tools)}
    for place, answers in counterparts.ARGUMENTS.items():
        if place:
            assert not answers.keys() & inspect.signature(functions[place]).parameters.keys(), place
    assert not [name for name in counterparts.ATTRIBUTES if hasattr(scgen.SCVI, name)]


@pytest.mark.parametrize("name", PEER_ATTRIBUTES)
def test_every_attribute_of_theirs_is_there_or_answered(model, name):
    if hasattr(model, name):
        return
    for of in (model, scgen.SCVI):
        with pytest.raises(AttributeError, match=f"^SCVI has no attribute '{name}': .+") as caught:
            getattr(of, name)
        assert caught.value.name == name
        assert not hasattr(of, name)
        assert name not in dir(of)


def test_a_query_tells_what_to_ask_its_model(model):
    query = model.query(model.adata.copy())
    for name in ("get_elbo", "history", "view_anndata_setup"):
        with pytest.raises(
            AttributeError, match=rf"^Query has no attribute '{name}': its model has it, \.model\.{name}$"
        ):
            getattr(query, name)
    with pytest.raises(AttributeError, match="no counterpart"):
        query.differential_abundance  # noqa: B018
    assert copy.copy(query).overlap == query.overlap
    assert copy.deepcopy(query).overlap == query.overlap
    assert pickle.loads(pickle.dumps(query)).overlap == query.overlap


def test_an_attribute_of_neither(model):
    for of in (model, scgen.SCVI, model.query(model.adata.copy()), Query):
        with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
            of.nothing  # noqa: B018


def test_errors_of_what_is_called_are_left_alone(model, monkeypatch):
    def bound(vae, loader, seed):
        return message_for(lr=1)  # in the words of Python's error for a wrong argument of get_elbo

    monkeypatch.setattr(scgen.models.base.inference, "bound", bound)
    with pytest.raises(TypeError, match=r"^message_for\(\) got an unexpected keyword argument 'lr'$"):
        model.get_elbo()


def test_arguments_by_position_are_told(model):
    """scvi-tools takes more of them, and in another order."""
    told = (
        r"2 positional arguments but 3 were given\. By position it takes max_epochs: write the names of all others\.$"
    )
    with pytest.raises(TypeError, match=told):
        model.train(1, "gpu")
    told = r"multiple values for argument 'groupby'\. By position it takes groupby, group1, group2: write"
    with pytest.raises(TypeError, match=told):
        model.differential_expression(model.adata, groupby="batch")
    with pytest.raises(TypeError, match="By position it takes none"):
        model.query(model.adata).typicality(0)
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'folder'$"):
        model.save()


def test_functions_stay_what_they_were(model):
    assert "early_stopping" in inspect.signature(model.train).parameters
    assert "VAR_KEYWORD" not in {of.kind.name for of in inspect.signature(model.train).parameters.values()}
    assert scgen.SCVI.train.__doc__.startswith("Train the model by maximising")
    assert pickle.loads(pickle.dumps(scgen.SCVI.train)) is scgen.SCVI.train
    assert copy.copy(model).get_elbo(model.adata) == model.get_elbo()


def test_subclasses_of_users_are_their_own():
    class Theirs(scgen.SCVI):
        def __getattr__(self, name):
            return 5

        def extra(self, x):
            return x

    model = Theirs.__new__(Theirs)
    assert model.mine == 5
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'y'"):
        model.extra(y=1)
