"""Files: what is written is read bit for bit, what is damaged is refused, and a crash leaves the old or the new."""

import builtins
import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch

from scgen import atomic, storage
from scgen.storage import ModelFileError

OLD, NEW = 1.0, 2.0


def save(folder, value=OLD, overwrite=False):
    """Save a "model" whose description and weights both tell which one it is."""
    storage.write(folder, {"value": value}, {"w": torch.full((50,), value), "b": torch.tensor([value])}, overwrite)


def which(folder):
    """Return which model is in a folder, after checking that it is whole."""
    description, tensors = storage.read(folder)
    value = description["value"]
    assert {name: tensor.unique().tolist() for name, tensor in tensors.items()} == {"w": [value], "b": [value]}
    return value


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model")
    return tmp_path / "model"


def weights_of(folder):
    (path,) = folder.glob("weights-*.safetensors")
    return path


def age(folder):
    """Make all files of a folder two days old: what a crash left there is swept a day after."""
    for path in folder.iterdir():
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 2 * 86_400))


def describe(folder, **changes):
    """Change fields of model.json; None takes one out."""
    description = json.loads((folder / "model.json").read_text()) | changes
    (folder / "model.json").write_text(json.dumps({k: v for k, v in description.items() if v is not None}))


def replace_weights(folder, data):
    """Save other bytes in the weights' place as `storage.write` does, so that no checksum tells."""
    with mock.patch.object(safetensors.torch, "save", return_value=data):
        storage.write(folder, {"value": OLD}, {}, overwrite=True)


def test_bits_shapes_and_dtypes_survive(tmp_path):
    exact = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 0.1])
    tensors = {
        "exact": exact,
        "double": exact.double() / 3,
        "bf16": exact.bfloat16(),
        "integers": torch.tensor([2**62, -1]),
        "truth": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "with gradient": torch.nn.Parameter(torch.ones(2)),
    }
    description = {"text": 'ü "quoted" \u2028 \U0001f9ec', "list": [1, 2.5, None], "nested": {"a": {"b": []}}}
    storage.write(tmp_path / "deep" / "model", description, tensors, overwrite=False)
    read, found = storage.read(str(tmp_path / "deep" / "model"))
    assert description.items() <= read.items()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        # Compared as bytes: NaN equals nothing, and -0.0 equals 0.0.
        as_bytes = [t.detach().contiguous().flatten().view(torch.uint8).tolist() for t in (found[name], tensor)]
        assert as_bytes[0] == as_bytes[1]


def test_nothing_is_replaced_unasked(folder):
    with pytest.raises(
        FileExistsError, match=r'already holds a model\. Replace it with save\(".*model", overwrite=True\)'
    ):
        save(folder, NEW)
    assert which(folder) == OLD
    save(folder, NEW, overwrite=True)
    assert which(folder) == NEW


def test_a_file_in_the_folders_place_is_kept(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError):
        save(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_what_is_left_in_the_folder(folder):
    (folder / "notes.txt").write_text("mine")
    left = [f"weights-{'0' * 64}.safetensors", f"weights-{'0' * 64}-{'0' * 16}.safetensors", ".scgen-partial-left"]
    for name in left:
        (folder / name).write_text("left over")
    for value in (NEW, OLD, NEW, NEW):
        save(folder, value, overwrite=True)
    # They may be what another process is writing.
    named = json.loads((folder / "model.json").read_text())["weights"]
    assert {path.name for path in folder.iterdir()} == {"model.json", "notes.txt", named, *left}
    age(folder)
    save(folder, OLD, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"model.json", "notes.txt", weights_of(folder).name}


def test_one_of_two_makes_a_new_model(tmp_path, monkeypatch):
    # The other puts its model there between this one's look and its last step.
    real, folder = os.link, tmp_path / "model"

    def link(source, target):
        monkeypatch.setattr(os, "link", real)
        save(folder, NEW)
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(FileExistsError, match="already holds a model"):
        save(folder, OLD)
    assert which(folder) == NEW
    assert {path.name for path in folder.iterdir()} == {"model.json", weights_of(folder).name}


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    save(tmp_path / "model")
    assert which(tmp_path / "model") == OLD
    with pytest.raises(FileExistsError):
        save(tmp_path / "model")
    assert len(list((tmp_path / "model").iterdir())) == 2


def test_a_load_beside_a_saver_reads_again(folder, monkeypatch):
    # The model is replaced just before its weights are read: they are gone.
    real = Path.read_bytes

    def read_bytes(path):
        if path == weights:
            monkeypatch.setattr(Path, "read_bytes", real)
            save(folder, NEW, overwrite=True)
        return real(path)

    weights = weights_of(folder)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert which(folder) == NEW


def test_an_interrupt_after_the_last_step_keeps_the_model(folder, monkeypatch):
    real = storage._sync_folder

    def interrupted(path):
        real(path)
        if json.loads((folder / "model.json").read_text())["value"] == NEW:
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(folder, NEW, overwrite=True)
    assert which(folder) == NEW


def test_windows_lets_no_file_be_replaced_that_is_read(folder, monkeypatch):
    real, refused = os.replace, []

    def replace(source, target):
        if len(refused) < 3:
            refused.append(target)
            raise PermissionError(13, "Access is denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):
        save(folder, NEW, overwrite=True)
    refused.clear()
    moved = folder / "moved.json"
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        atomic.replace(folder / "model.json", moved)
    assert len(refused) == 3
    assert moved.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs files with holes, and Linux's measure of memory")
def test_fifty_gigabytes_of_nothing_are_not_read(folder):
    os.truncate(weights_of(folder), 50 * 10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelFileError, match=r"truncated or altered .* \(it has 50000000000 bytes, not \d+\)"):
        storage.read(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # KiB


def test_models_that_say_no_size_are_read(folder):
    # As they were written before, under a name without an end of its own.
    description = json.loads((folder / "model.json").read_text())
    name = description["weights"][:72] + ".safetensors"
    weights_of(folder).rename(folder / name)
    description = {"format": 1, "weights": name, "value": OLD}
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    (folder / "model.json").write_text(json.dumps(description | {"sha256": digest}))
    assert which(folder) == OLD
    save(folder, NEW, overwrite=True)
    assert [path.name for path in folder.glob("weights-*")] == [weights_of(folder).name]
    assert which(folder) == NEW


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        save(tmp_path / "model")
    finally:
        assert os.umask(old) == 0o027
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {0o640}


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (self.path, "w")


def safetensors_file(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def truncate(folder):
    weights = weights_of(folder)
    weights.write_bytes(weights.read_bytes()[:-1])


def alter(folder):
    data = bytearray(weights_of(folder).read_bytes())
    data[-1] ^= 1
    weights_of(folder).write_bytes(data)


def elsewhere(name):
    def damage(folder):
        # A file that does exist there, and holds what the name says: only the name gives it away.
        (folder.parent / "outside.safetensors").write_bytes(weights_of(folder).read_bytes())
        describe(folder, weights=name)

    return damage


HUGE = {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
DAMAGED = {
    "truncated": (truncate, ["was truncated or altered"]),
    "altered": (alter, ["was truncated or altered"]),
    "emptied": (lambda f: weights_of(f).write_bytes(b""), ["was truncated or altered"]),
    "no weights": (
        lambda f: weights_of(f).unlink(),
        ["does not exist", "model.json names it", "Copy the whole"],
    ),
    "no description": (
        lambda f: (f / "model.json").unlink(),
        ["model.json does not exist", "found: weights-", "model.save(folder)"],
    ),
    "description cut": (lambda f: os.truncate(f / "model.json", 20), ["model.json is not valid JSON", "damaged"]),
    "description empty": (lambda f: os.truncate(f / "model.json", 0), ["model.json is not valid JSON"]),
    "description binary": (
        lambda f: (f / "model.json").write_bytes(b"\xff\xfe{\x80"),
        ["model.json is not valid JSON"],
    ),
    "description a list": (lambda f: (f / "model.json").write_text("[1]"), ["has format 'list'", "reads format 1"]),
    "description a number": (lambda f: (f / "model.json").write_text("1"), ["has format 'int'", "reads format 1"]),
    "description deep": (lambda f: (f / "model.json").write_text("[" * 10**6), ["not valid JSON"]),
    "description a folder": (
        lambda f: ((f / "model.json").unlink(), (f / "model.json").mkdir()),
        ["model.json does not exist"],
    ),
    "description huge": (lambda f: os.truncate(f / "model.json", 2**29), ["too large for the description"]),
    "other format": (lambda f: describe(f, format=2), ["has format 2", "reads format 1"]),
    "no format": (lambda f: describe(f, format=None), ["has format None", "reads format 1"]),
    "weights unnamed": (lambda f: describe(f, weights=None), ["names None", "not a name that scgen writes"]),
    "weights a number": (lambda f: describe(f, weights=7), ["names 7", "not a name that scgen writes"]),
    "weights above": (
        elsewhere("../outside.safetensors"),
        ["names '../outside.safetensors'", "not a name that scgen writes"],
    ),
    "weights absolute": (elsewhere("/etc/passwd"), ["names '/etc/passwd'", "not a name that scgen writes"]),
    "weights above, hashed": (elsewhere(f"../weights-{'0' * 64}.safetensors"), ["not a name that scgen writes"]),
    "weights, a line more": (elsewhere(f"weights-{'0' * 64}.safetensors\n"), ["not a name that scgen writes"]),
    "a torch file": (lambda f: replace_weights(f, torch_file()), ["not a valid safetensors"]),
    "nothing": (lambda f: replace_weights(f, b""), ["not a valid safetensors"]),
    "a header too long": (lambda f: replace_weights(f, struct.pack("<Q", 2**63)), ["not a valid safetensors"]),
    "huge tensor": (lambda f: replace_weights(f, safetensors_file(HUGE)), ["not a valid safetensors"]),
}


def torch_file():
    file = io.BytesIO()
    torch.save({"w": torch.ones(3)}, file)
    return file.getvalue()


@pytest.mark.parametrize(("damage", "words"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused(folder, damage, words):
    damage(folder)
    with pytest.raises(ModelFileError) as error:
        storage.read(folder)
    for word in [str(folder), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"), [(lambda p: None, "no folder"), (Path.mkdir, "nothing"), (Path.touch, "no folder")]
)
def test_no_model_there(tmp_path, make, words):
    make(tmp_path / "model")
    with pytest.raises(ModelFileError, match=rf"model\.json does not exist \(found: {words}\)\. Give the folder"):
        storage.read(tmp_path / "model")


def test_every_byte_of_the_weights_counts(folder):
    data = weights_of(folder).read_bytes()
    for i in range(len(data)):
        weights_of(folder).write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        with pytest.raises(ModelFileError, match="truncated or altered"):
            storage.read(folder)


def test_a_pickle_is_not_opened(folder, tmp_path):
    payload = pickle.dumps(Payload(str(tmp_path / "executed")))
    replace_weights(folder, payload)
    with pytest.raises(ModelFileError, match="not a valid safetensors"):
        storage.read(folder)
    assert not (tmp_path / "executed").exists()
    pickle.loads(payload)  # the payload does work
    assert (tmp_path / "executed").exists()


class Crash(BaseException):
    """The machine stops."""


def crash_at(monkeypatch, owner, name, call, when):
    """Let the k-th call of a function be the last thing that happens; return a list that is no longer empty then."""
    dead = []
    targets = [(tempfile, "mkstemp"), (os, "fdopen"), (os, "fsync"), (os, "chmod"), (os, "replace"), (Path, "unlink")]
    calls = iter(range(1, 100))

    def watched(original, counted):
        def function(*arguments, **options):
            if dead:  # no cleaning up after death
                raise Crash
            if counted and next(calls) == call:
                dead.append(True)
                if when == "after":
                    original(*arguments, **options)
                raise Crash
            return original(*arguments, **options)

        return function

    for target in targets:
        monkeypatch.setattr(*target, watched(getattr(*target), target == (owner, name)))
    return dead


def torn_writes(monkeypatch, call):
    """Let the k-th file that is written get only the first half of its bytes."""
    files, dead = iter(range(1, 100)), []

    class Torn(io.FileIO):
        def write(self, data):
            dead.append(True)
            super().write(data[: len(data) // 2])
            raise Crash

    real = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda handle, mode: (Torn if next(files) == call else real)(handle, mode))
    return dead


POINTS = {
    f"{when} {name} {call}": (owner, name, call, when)
    for owner, name, calls in (
        (tempfile, "mkstemp", 2),
        (os, "fdopen", 2),
        (os, "fsync", 2),
        (os, "chmod", 2),
        (os, "replace", 2),
        (Path, "unlink", 1),
    )
    for call in range(1, calls + 1)
    for when in ("before", "after")
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("point", [*POINTS, "within write 1", "within write 2"])
@pytest.mark.parametrize("exists", [True, False], ids=["over another", "into nothing"])
def test_a_crash_at_any_point_leaves_a_whole_model(tmp_path, monkeypatch, point, exists):
    folder = tmp_path / "model"
    if exists:
        save(folder, OLD)
    with monkeypatch.context() as patch:
        dead = torn_writes(patch, int(point[-1])) if point not in POINTS else crash_at(patch, *POINTS[point])
        with contextlib.suppress(Crash):
            save(folder, NEW, overwrite=True)
    # Without older weights there is nothing to unlink; any other point must have been reached, or tests nothing.
    assert dead or ("unlink" in point and not exists)
    replaced = point == "after replace 2" or "unlink" in point
    if exists or replaced:
        assert which(folder) == (NEW if replaced else OLD)
    else:
        with pytest.raises(ModelFileError, match=r"model\.json does not exist"):
            storage.read(folder)
    # What the crash left behind neither stops the next save nor stays.
    age(folder)
    save(folder, NEW, overwrite=exists or replaced)
    assert which(folder) == NEW
    assert {path.name for path in folder.iterdir()} == {"model.json", weights_of(folder).name}


def test_an_error_leaves_no_rest(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(folder, NEW, overwrite=True)
    assert which(folder) == OLD
    assert {path.name for path in folder.iterdir()} == {"model.json", weights_of(folder).name}


def test_what_json_cannot_hold_leaves_the_old_model(folder):
    with pytest.raises(TypeError):
        storage.write(folder, {"value": {1, 2}}, {"w": torch.ones(3)}, overwrite=True)
    assert which(folder) == OLD
    assert len(list(folder.iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to start savers fast")
def test_kill_at_any_moment(tmp_path):
    # One process that has torch loaded forks savers and kills them; a fork inside pytest could deadlock on its threads.
    code = """
    import os, random, signal, sys, time
    import torch
    from scgen import storage

    def save(value):
        storage.write(folder, {"value": value}, {"w": torch.full((100_000,), float(value))}, overwrite=True)

    torch.set_num_threads(1)
    folder, seen = sys.argv[1], set()
    save(0)
    started = time.perf_counter()
    save(1)
    seconds = time.perf_counter() - started
    draw = random.Random(0)
    for kill in range(30):
        child = os.fork()
        if child == 0:
            for value in range(1000 * kill, 10**9):
                save(value)
        time.sleep(0.005 + draw.uniform(0, 10) * seconds)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        description, tensors = storage.read(folder)
        assert tensors["w"].unique().tolist() == [description["value"]]
        seen.add(description["value"])
    for name in os.listdir(folder):
        os.utime(os.path.join(folder, name), (0, 0))
    save(-1)
    print(len(seen), len(os.listdir(folder)))
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "model")]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    n_seen, n_files = map(int, run.stdout.split())
    # The kills fell between different saves, whatever the disk's speed, and the next save cleared away what they left.
    assert n_seen > 10
    assert n_files == 2
