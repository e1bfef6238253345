"""What is loaded when."""

import subprocess
import sys
import textwrap

import pytest


def modules_after(code: str) -> set[str]:
    code = textwrap.dedent(code) + "\nimport sys; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_loads_neither_torch_nor_scanpy():
    loaded = modules_after("import scgen")
    assert not loaded & {"torch", "scanpy", "anndata", "numpy", "pandas"}


def test_training_loads_neither_scanpy_nor_scikit_learn():
    loaded = modules_after(
        """
        import scgen
        adata = scgen.simulate_cells(n_cells=60, n_genes=20)
        scgen.setup_anndata(adata, batch_key="batch")
        model = scgen.SCVI(adata)
        model.train(max_epochs=1, progress=False)
        model.get_latent_representation()
        """
    )
    assert "torch" in loaded
    assert not loaded & {"scanpy", "sklearn", "matplotlib", "lightning"}


def test_names():
    import scgen

    assert set(dir(scgen)) == {*scgen.__all__, "__version__", "plots"}
    assert callable(scgen.integrate)
    import scgen.workflows.integration

    assert callable(scgen.integrate)
    with pytest.raises(AttributeError, match="SCVI"):
        scgen.scvi  # noqa: B018


def test_plots_are_there_and_loaded_when_used():
    assert not modules_after("import scgen; dir(scgen)") & {"scgen.plots", "matplotlib"}
    assert "scgen.plots" in modules_after("import scgen; scgen.plots.volcano")


def test_the_other_scgen_is_noticed(tmp_path):
    # A distribution named scgen, as its metadata on the path says.
    info = tmp_path / "scgen-2.1.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scgen\nVersion: 2.1.1\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import scgen"
    run = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert "'scgen' 2.1.1" in run.stderr
    assert "pip uninstall" in run.stderr
