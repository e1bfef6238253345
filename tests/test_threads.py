"""Threads and processes: the same bits beside other trainings, generators that stay as they are, and clear errors."""

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import scgen
from scgen import threads
from scgen.seeding import generator, seeded
from scgen.threads import Crowd, Watch

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("several_threads")


def made(seed: int = 0, **arguments):
    adata = scgen.simulate_cells(n_cells=400, n_genes=60, n_batches=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    return scgen.SCVI(adata, seed=seed, **arguments)


def trained(seed: int = 0, **arguments):
    model = made(seed, **arguments)
    model.train(4, seed=seed, progress=False)
    return model


def asked(model) -> np.ndarray:
    return np.hstack(
        [
            model.get_latent_representation(give_mean=False),
            model.get_elbo(return_mean=False)[:, None],
            model.get_normalized_expression(n_samples=2, return_numpy=True),
        ]
    )


@pytest.fixture(scope="module")
def alone() -> np.ndarray:
    return asked(trained())


def all_generators() -> tuple:
    numpys = str(np.random.get_state())  # noqa: NPY002 - the global one is what is looked at
    return random.getstate(), numpys, torch.get_rng_state().numpy().tobytes()


def test_seeded_gives_what_torchs_own_generator_gives():
    with seeded(3):
        ours = torch.randn(5, generator=generator(CPU))
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    theirs = torch.randn(5)
    torch.random.set_rng_state(state)
    assert torch.equal(ours, theirs)


def test_seeded_blocks_nest_and_go_on_where_they_stopped():
    outer, inner = seeded(1), seeded(2)
    expected = torch.randn(6, generator=torch.Generator().manual_seed(1))
    with outer:
        first = torch.randn(3, generator=generator(CPU))
        with inner:
            torch.randn(50, generator=generator(CPU))
    assert generator(CPU) is None
    with outer:
        second = torch.randn(3, generator=generator(CPU))
    # Torch draws in vectors from 16 numbers on, and one by one below.
    assert torch.equal(torch.cat([first, second]), expected)


def test_two_trainings_at_once_have_the_bits_of_one_alone(alone):
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: asked(trained()), range(3)))
    for answer in answers:
        np.testing.assert_array_equal(answer, alone)


@pytest.mark.parametrize("dispersion", ["gene-batch", "gene-label", "gene-cell"])
def test_the_same_seed_gives_the_same_bits_with_every_dispersion(dispersion):
    adata = scgen.simulate_cells(n_cells=600, n_genes=300, n_batches=3, seed=0)  # large enough for several threads
    scgen.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    found = []
    for _ in range(3):
        model = scgen.SCVI(adata, dispersion=dispersion)
        model.train(2, batch_size=300, progress=False)
        found.append(model.get_latent_representation())
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_a_thread_that_draws_itself_is_not_disturbed(alone):
    def draws() -> list:
        torch.manual_seed(11)
        found = []
        for _ in range(300):
            found.append(torch.randn(2).tolist())
            time.sleep(0.001)
        return found

    state = torch.random.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        drawing = pool.submit(draws)
        answer = asked(trained())
        beside = drawing.result()
    torch.random.set_rng_state(state)
    np.testing.assert_array_equal(answer, alone)
    torch.manual_seed(11)
    assert beside == [torch.randn(2).tolist() for _ in range(300)]


@pytest.mark.parametrize("arguments", [{}, {"prior": "mog", "posterior": "iaf"}, {"prior": "vamp"}], ids=str)
def test_the_global_generators_are_left_alone_by_every_call(arguments, tmp_path):
    import scanpy  # noqa: F401 - something that newer releases import draws from Python's generator, once
    import sklearn.neighbors  # noqa: F401

    before = all_generators()
    model = trained(**arguments)
    adata = model.adata
    calls = [
        lambda: asked(model),
        lambda: model.get_normalized_expression(weights="importance", n_samples=2, return_mean=False),
        lambda: model.get_marginal_ll(n_mc_samples=3),
        lambda: model.get_thinned_ll(n_samples=2),
        lambda: model.get_likelihood_parameters(),
        lambda: model.get_feature_correlation_matrix(),
        lambda: model.posterior_predictive_sample(),
        lambda: model.sample_prior(20),
        lambda: model.differential_expression("cell_type", "type_1"),
        lambda: model.differential_expression("cell_type", "type_1", mode="vanilla"),
        lambda: scgen.posterior_predictive_check(model, n_samples=3),
        lambda: model.save(tmp_path / "model"),
        lambda: scgen.SCVI.load(tmp_path / "model", adata),
        lambda: model.query(adata).typicality(),
        lambda: model.query(adata).transfer_labels("cell_type"),
        lambda: scgen.tune(adata, presets=["nb", "zinb"], max_epochs=1, progress=False),
        lambda: scgen.integrate(adata, "batch", max_epochs=1, progress=False, n_top_genes=30),
        lambda: scgen.check(adata, batch_key="batch"),
    ]
    for number, call in enumerate(calls):
        call()
        assert all_generators() == before, f"call {number} drew from a global generator"


def test_samples_of_normalised_values_leave_the_global_generators_alone():
    adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
    scgen.setup_anndata(adata, batch_key="batch", counts=False)
    before = all_generators()
    model = scgen.SCVI(adata, gene_likelihood="normal")
    model.train(1, progress=False)
    one, two = model.posterior_predictive_sample(n_samples=2)
    assert (one != two).nnz
    assert (model.posterior_predictive_sample(n_samples=2)[1] != two).nnz == 0
    model.sample_prior(10)
    model.get_feature_correlation_matrix()
    assert all_generators() == before


def test_a_model_in_training_is_not_asked_by_another_thread():
    model, started = made(), threading.Event()
    told = []

    class Slow(type(model.vae.decoder)):
        def forward(self, *args):
            started.set()
            time.sleep(0.02)
            return super().forward(*args)

    model.vae.decoder.__class__ = Slow
    training = threading.Thread(target=lambda: model.train(3, progress=False))
    training.start()
    started.wait()
    for call in (
        model.get_elbo,
        lambda: model.train(1, progress=False),
        lambda: model.save("never"),
        lambda: model.query(model.adata),
    ):
        try:
            call()
        except RuntimeError as error:
            told.append(str(error))
    training.join()
    # Before its first training is over, a model is untrained: that may be what is said of it.
    assert len(told) == 4
    assert all("in another thread" in text or "untrained" in text for text in told)
    assert sum("in another thread" in text for text in told) >= 1
    assert not Path("never").exists()
    assert model.get_elbo() < 0


def test_four_threads_ask_one_model():
    model = trained()
    expected = asked(model)
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(lambda _: asked(model), range(8)):
            np.testing.assert_array_equal(answer, expected)


def test_a_copy_of_a_model_has_its_own_lock():
    import copy
    import pickle

    model = trained()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(asked(other), asked(model))
        with model.vae.occupied(training=True), ThreadPoolExecutor(1) as pool:
            assert pool.submit(other.get_elbo).result() < 0


def run(code: str, **environment: str) -> str:
    # Nothing of what the tests' own process was told of threads, but the folder of compiled kernels.
    told = ("OMP", "GOMP", "NUMBA", "SCGEN")
    kept = {name for name in os.environ if name == "NUMBA_CACHE_DIR" or not name.startswith(told)}
    env = {name: os.environ[name] for name in kept}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env | environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


MODEL = """
import numpy as np, scgen
adata = scgen.simulate_cells(n_cells=400, n_genes=100, n_batches=2, seed=0)
scgen.setup_anndata(adata, batch_key="batch")
model = scgen.SCVI(adata)
model.train(2, progress=False)
z = model.get_latent_representation()
"""


def test_four_threads_where_numba_has_its_own_pool():
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    answers = list(pool.map(lambda _: model.get_elbo(), range(8)))
    models = list(pool.map(lambda _: (scgen.SCVI(adata), None)[0], range(3)))
    list(pool.map(lambda m: m.train(2, progress=False), models))
import numba
print(numba.threading_layer(), len(set(answers)), all((m.get_latent_representation() == z).all() for m in models))
"""
    assert run(MODEL + code, NUMBA_THREADING_LAYER="workqueue").split() == ["workqueue", "1", "True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_answers_and_trains():
    code = """
import multiprocessing
def ask(i):
    fresh = scgen.SCVI(adata)
    fresh.train(1, progress=False)
    return float(np.abs(model.get_latent_representation() - z).max()), fresh.get_elbo() < 0
with multiprocessing.get_context("fork").Pool(2) as pool:
    found = pool.map_async(ask, range(3)).get(timeout=120)
print(max(d for d, _ in found) < 1e-4, all(b for _, b in found))
"""
    assert run(MODEL + code).split() == ["True", "True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_forked_after_a_model_was_made_trains():
    code = """
import multiprocessing, scgen
adata = scgen.simulate_cells(n_cells=600, n_genes=200, n_batches=2, seed=0)  # enough for the compiled kernels
scgen.setup_anndata(adata, batch_key="batch")
model = scgen.SCVI(adata)
def train(i):
    model.train(1, progress=False)
    return model.get_elbo() < 0
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(all(pool.map_async(train, range(2)).get(timeout=60)))
"""
    assert run(code).split() == ["True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("training", "expected"), [(False, "answered"), (True, "during a training of the model")])
def test_a_process_forked_while_another_thread_uses_the_model(training, expected):
    code = f"""
import multiprocessing, threading
entered, leave = threading.Event(), threading.Event()
def use():
    with model.vae.occupied(training={training}):
        entered.set()
        leave.wait()
user = threading.Thread(target=use)
user.start()
entered.wait()
def ask(i):
    try:
        return "answered" if model.get_elbo() < 0 else "wrong"
    except RuntimeError as error:
        return str(error)
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.map_async(ask, range(2)).get(timeout=60))
leave.set()
user.join()
print(model.get_elbo() < 0)
"""
    found, ours = run(MODEL + code).splitlines()
    assert found.count(expected) == 2
    assert ours == "True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_forked_within_a_block_leaves_it():
    code = """
import os
from scgen import threads
with model.vae.occupied():
    child = os.fork()
if child == 0:
    print(threads.forked, model.get_elbo() < 0, threads.watch._n_users, flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1], model.get_elbo() < 0, threads.watch._n_users)
"""
    assert run(MODEL + code).splitlines() == ["True True 0", "0 True 0"]


def test_a_question_does_not_wait_for_a_training_that_begins_before_its_turn():
    model = trained()
    asking, go_on, done = threading.Event(), threading.Event(), threading.Event()
    told = []

    def use():  # a question, and then a training of the same thread
        with model.vae.occupied():
            asking.set()
            go_on.wait()
            with model.vae.occupied(training=True):
                done.wait()

    def ask():
        try:
            model.get_elbo()
        except RuntimeError as error:
            told.append(str(error))

    user, other = threading.Thread(target=use), threading.Thread(target=ask)
    user.start()
    asking.wait()
    other.start()
    go_on.set()
    other.join(timeout=30)
    done.set()
    user.join()
    assert "being trained in another thread" in told[0]


def test_joblibs_threads_and_processes_give_the_same_bits():
    code = """
import joblib, torch
def work(seed):
    import scgen
    adata = scgen.simulate_cells(n_cells=400, n_genes=100, n_batches=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, seed=seed)
    model.train(2, seed=seed, progress=False)
    return model.get_latent_representation()
n = torch.get_num_threads()
own = [work(seed) for seed in (0, 1)]
for options in ({"backend": "threading"}, {"backend": "loky", "inner_max_num_threads": n}):
    with joblib.parallel_config(**options):
        found = joblib.Parallel(n_jobs=2)(joblib.delayed(work)(seed) for seed in (0, 1))
    print(all((a == b).all() for a, b in zip(own, found)))
"""
    assert run(MODEL + code).split() == ["True", "True"]


@pytest.mark.parametrize("environment", [{"NUMBA_DISABLE_JIT": "1"}, {"SCGEN_KERNELS": "reference"}], ids=str)
def test_without_compiled_kernels(environment):
    code = """
import scgen
adata = scgen.simulate_cells(n_cells=600, n_genes=200, n_batches=2, seed=0)  # enough for the compiled kernels
scgen.setup_anndata(adata, batch_key="batch")
model = scgen.SCVI(adata)
model.train(1, progress=False)
print(model.get_elbo() < 0)
"""
    assert run(code, **environment).split() == ["True"]


def test_unknown_kernels_are_refused():
    code = """
try:
    exec(MODEL)
except ValueError as error:
    print(error)
"""
    assert "SCGEN_KERNELS='nonsense'" in run(f"MODEL = {MODEL!r}\n{code}", SCGEN_KERNELS="nonsense")


def test_torchs_modes_do_not_matter(alone, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        model = trained()
        np.testing.assert_array_equal(asked(model), alone)
        model.save(tmp_path / "model")
        np.testing.assert_array_equal(asked(scgen.SCVI.load(tmp_path / "model", model.adata)), alone)
        for arguments in ({"prior": "mog", "posterior": "iaf"}, {"prior": "vamp", "posterior": "planar"}):
            asked(trained(**arguments))
            trained(**arguments).sample_prior(10)
    finally:
        torch.set_default_dtype(torch.float32)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model = trained()
            np.testing.assert_array_equal(asked(model), alone)
        model.train(1, progress=False)  # and outside of it


def test_there_may_be_no_console(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    model = made()
    model.train(1, progress=True)
    scgen.tune(model.adata, presets=["nb", "zinb"], max_epochs=1, progress=True)


def test_a_quota_is_read_of_both_versions_of_control_groups(tmp_path):
    cases = {"cpu.max": ("150000 100000", 1.5), "none": ("", float("inf"))}
    for name, (text, expected) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        if text:
            (folder / name).write_text(text)
        assert threads._quota_of(folder) == expected
    (tmp_path / "cpu.max").joinpath("cpu.max").write_text("max 100000")
    assert threads._quota_of(tmp_path / "cpu.max") == float("inf")
    (tmp_path / "none" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "none" / "cpu.cfs_period_us").write_text("100000\n")
    assert threads._quota_of(tmp_path / "none") == 0.5


def test_no_more_threads_than_the_quota_has_processors(monkeypatch):
    for name in threads.NUMBER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for quota, expected in ((1.0, 1), (0.5, 1), (1.9, 1), (2.0, 2), (float("inf"), 2)):
            monkeypatch.setattr(threads, "quota", lambda quota=quota: quota)
            with threads.adapted():
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == 2
        monkeypatch.setattr(threads, "quota", lambda: 1.0)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with threads.adapted():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def tasks() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list threads")
def test_a_crowd_changes_no_bits_and_leaves_nothing_behind(alone):
    libraries = threads._gnu_openmp()
    if not libraries:
        pytest.skip("no GNU OpenMP is loaded")
    before = tasks()
    crowd = Crowd(libraries)
    assert tasks() >= before + len(os.sched_getaffinity(0))
    np.testing.assert_array_equal(asked(trained()), alone)
    crowd.disperse()
    deadline = time.monotonic() + 10
    while tasks() > before + 4 and time.monotonic() < deadline:  # threads end when the system gets round to it
        time.sleep(0.01)
    assert tasks() <= before + 4


def test_a_library_that_cannot_be_opened_stops_nothing(tmp_path):
    (tmp_path / "libgomp.so").write_text("no library")
    Crowd([str(tmp_path / "libgomp.so"), "/nowhere/libgomp.so"]).disperse()


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="root alone can become a user of its own")
def test_no_crowd_where_its_threads_cannot_be_started():
    """GNU OpenMP ends the process where it cannot start a thread."""
    code = """
import os, resource
from scgen import threads
libraries = threads._gnu_openmp()
os.setuid(100_000 + os.getpid())  # of whom no other process is
n = len(os.listdir("/proc/self/task"))
resource.setrlimit(resource.RLIMIT_NPROC, (n + 1, n + 1))
watch = threads.Watch()
watch.begin()
watch._gather()
watch.end()
print(threads._can_start(1), threads._can_start(2), watch._crowd, watch._usable)
"""
    assert run(MODEL + code).split() == ["True", "False", "None", "False"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list what is loaded")
def test_libraries_in_folders_with_spaces_are_found(tmp_path):
    code = f"""
import ctypes, shutil, torch
from scgen import threads
found = threads._gnu_openmp()
folder = {str(tmp_path / "a folder")!r}
for i, path in enumerate(found):
    ctypes.CDLL(shutil.copy(path, f"{{folder}}/libgomp-copy-{{i}}.so"))
copies = [path for path in threads._gnu_openmp() if path.startswith(folder)]
threads.Crowd(copies).disperse()
print(len(copies) == len(found))
"""
    (tmp_path / "a folder").mkdir()
    assert run(code).split() == ["True"]


class Machine:
    """A clock, a share of the processors and interruptions a second, as a test says."""

    def __init__(self, monkeypatch):
        self.now, self.cpu, self.switches = 0.0, 0.0, 0.0
        self.crowds = []
        machine = self

        class Fake:
            def __init__(self, libraries):
                machine.crowds.append(self)
                self.there = True

            def disperse(self):
                self.there = False

        for name in threads.WAITING_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(threads, "Crowd", Fake)
        monkeypatch.setattr(threads, "_gnu_openmp", lambda: ["libgomp.so"])
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(threads.time, "process_time", lambda: self.cpu)
        monkeypatch.setattr(Watch, "_interruptions", staticmethod(lambda: self.switches))
        monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(threads, "_n_processors", lambda: 2)

    def goes_on(self, watch: Watch, seconds: float, share: float, interruptions: float) -> None:
        for _ in range(round(seconds / 0.05)):
            self.now += 0.05
            self.cpu += 0.05 * 2 * share
            self.switches += 0.05 * interruptions
            watch.look()

    @property
    def crowded(self) -> bool:
        return bool(self.crowds) and self.crowds[-1].there


def test_a_crowd_is_there_while_the_machine_is_busy(monkeypatch):
    machine, watch = Machine(monkeypatch), Watch()
    watch.begin()
    machine.goes_on(watch, 5, share=0.97, interruptions=150)  # quiet
    assert not machine.crowds
    machine.goes_on(watch, 5, share=0.5, interruptions=2)  # waits for a disk
    assert not machine.crowds
    machine.goes_on(watch, 0.5, share=0.6, interruptions=200)
    assert machine.crowded
    machine.goes_on(watch, 20, share=0.45, interruptions=6000)
    assert machine.crowded
    machine.goes_on(watch, 1.5, share=0.65, interruptions=15)  # the other process has ended
    assert not machine.crowded
    machine.goes_on(watch, 0.5, share=0.6, interruptions=200)
    assert machine.crowded
    watch.end()
    assert not machine.crowded


@pytest.mark.parametrize("variable", threads.WAITING_VARIABLES)
def test_what_a_user_said_of_waiting_is_left_as_it_is(monkeypatch, variable):
    machine, watch = Machine(monkeypatch), Watch()
    monkeypatch.setenv(variable, "active")
    watch.begin()
    machine.goes_on(watch, 5, share=0.5, interruptions=300)
    assert not machine.crowds
    watch.end()
