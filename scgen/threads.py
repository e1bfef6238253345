"""Threads beside other work: how many are used, how they wait for each other, and what a forked process may do.

Threads of an OpenMP pool that wait for the others spin for some milliseconds before they sleep. On a quiet machine this
is the fastest way to wait. Beside another busy process, a thread that spins takes the processor from the one that it
waits for, and training becomes several times slower (benchmarks/NOTES.md). GNU's OpenMP, which torch and numba use on
Linux, hardly spins if it manages more threads than there are processors. So while the machine is busy, a pool of idle
threads is kept beside the others (`Crowd`). The number of threads that compute stays the same, and with it every bit of
a result. Under a quota fewer threads compute, and the last bits may differ.
"""

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None

#: Seconds between two looks at what this process gets of the processors.
WINDOW = 0.1
#: The machine is busy if, twice in a row, the threads of the pool ran for less than this share of the time although
#: they spin, and at least so many times a second had to leave a processor to somebody else. On two quiet cores they ran
#: for .94 and more of the time. Beside one busy process they ran for .5 to .7, and were interrupted some 200 times.
BUSY_SHARE, BUSY_INTERRUPTIONS = 0.85, 20
#: In a crowd the threads sleep while they wait. It is needed no more if they are interrupted less often than this for
#: so many seconds. On two quiet cores they were interrupted 15 times a second, beside one busy process 500 to 7,000.
CALM_INTERRUPTIONS, CALM_SECONDS, LONGEST_CALM = 100, 1.0, 16.0
#: What a user may have said of the waiting and of the number of threads; it is then left as it is.
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
NUMBER_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

#: Whether this process was forked from one that had used its threads.
forked = False


@functools.cache
def quota() -> float:
    """Return how many processors' time the process may use: the least of its control groups' quotas, or infinity."""
    found = float("inf")
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", "cpu" if controllers else "")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            found = min(found, _quota_of(folder))
            if folder == root:
                break
    return found


def _quota_of(folder: Path) -> float:
    """Return the quota that one control group sets, of version 2 or 1."""
    try:
        limit, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return float("inf")
    return int(limit) / int(period) if limit.strip() not in ("max", "-1") else float("inf")


class Crowd:
    """Idle OpenMP threads, more than there are processors, in every GNU OpenMP library that is loaded.

    A thread of Python's opens a parallel region that does nothing; its pool of threads lives as long as it does.
    """

    def __init__(self, libraries: list[str]):
        self._leave, ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._gather, args=(libraries, ready), daemon=True, name="scgen-crowd")
        self._thread.start()
        ready.wait()

    def _gather(self, libraries: list[str], ready: threading.Event) -> None:
        try:
            nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing
            for library in libraries:
                # A library that cannot be opened is left out: its threads then spin, as they would without a crowd.
                with contextlib.suppress(OSError, AttributeError):
                    parallel = ctypes.CDLL(library).GOMP_parallel
                    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                    parallel(nothing, None, _n_processors() + 1, 0)
        finally:
            ready.set()  # the training waits for it, whatever happened
        self._leave.wait()

    def disperse(self) -> None:
        """End the threads."""
        self._leave.set()
        self._thread.join()


def _n_processors() -> int:
    """Return how many processors this process may run on; at least as many as torch uses threads."""
    # OpenMP may bind this very thread to one of them, as with OMP_PROC_BIND.
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(n, min(torch.get_num_threads(), os.cpu_count() or 1))


def _can_start(n: int) -> bool:
    """Say whether so many more threads can be started: where one cannot, OpenMP would end the process."""
    leave, started = threading.Event(), []
    try:
        for _ in range(n):
            thread = threading.Thread(target=leave.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        return False
    finally:
        leave.set()
        for thread in started:
            thread.join()
    return True


class Watch:
    """Looks, between minibatches, at how the threads fare, and keeps a crowd while the machine is busy."""

    def __init__(self):
        self._lock = threading.RLock()
        self._n_users, self._crowd = 0, None
        self._n_threads, self._usable = 1, False

    def begin(self) -> None:
        """Start to look, if nobody has."""
        with self._lock:
            self._n_users += 1
            if self._n_users > 1:
                return
            self._n_threads = min(torch.get_num_threads(), _n_processors())
            said = any(name in os.environ for name in WAITING_VARIABLES)
            self._usable = self._n_threads > 1 and resource is not None and not said
            self._n_busy, self._calm, self._calm_since = 0, CALM_SECONDS, None
            self._restart(time.perf_counter())

    def end(self) -> None:
        """End the crowd, if nobody else looks."""
        with self._lock:
            self._n_users -= 1
            if self._n_users == 0:
                self._disperse()

    def look(self) -> None:
        """Keep or end the crowd as the last tenth of a second says; cheap if it is not over yet."""
        now = time.perf_counter()
        if not self._usable or now - self._since < WINDOW or not self._lock.acquire(blocking=False):
            return
        try:
            seconds = now - self._since
            interruptions = (self._interruptions() - self._n_interruptions) / seconds
            share = (time.process_time() - self._cpu) / seconds / self._n_threads
            if self._crowd is None:
                self._n_busy = self._n_busy + 1 if share < BUSY_SHARE and interruptions >= BUSY_INTERRUPTIONS else 0
                if self._n_busy == 2:
                    self._gather()
            elif interruptions >= CALM_INTERRUPTIONS:
                self._calm_since = None
            elif self._calm_since is None:
                self._calm_since = now
            elif now - self._calm_since >= self._calm:
                self._disperse()
                self._calm = min(2 * self._calm, LONGEST_CALM)  # if it was too early, wait longer next time
            self._restart(time.perf_counter())
        finally:
            self._lock.release()

    def _restart(self, now: float) -> None:
        if self._usable:
            self._since, self._cpu, self._n_interruptions = now, time.process_time(), self._interruptions()

    def _gather(self) -> None:
        libraries = _gnu_openmp()
        self._usable = len(libraries) > 0 and _can_start((_n_processors() + 1) * len(libraries))
        self._crowd, self._calm_since = Crowd(libraries) if self._usable else None, None

    def _disperse(self) -> None:
        if self._crowd is not None:
            self._crowd.disperse()
        self._crowd, self._n_busy = None, 0

    @staticmethod
    def _interruptions() -> int:
        """Return how often threads of this process had to leave a processor to somebody else."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


watch = Watch()


@contextmanager
def adapted() -> Iterator[None]:
    """Within the block, use no more threads than the quota has processors, and let them sleep where it is busy."""
    mark_used()
    n_threads, process, used = torch.get_num_threads(), os.getpid(), watch
    if n_threads > 1 and not any(name in os.environ for name in NUMBER_VARIABLES):
        torch.set_num_threads(max(1, int(min(n_threads, quota()))))
    used.begin()
    try:
        yield
    finally:
        if os.getpid() == process:  # a process that was forked in the block has no threads to give back
            used.end()
            if torch.get_num_threads() != n_threads:
                torch.set_num_threads(n_threads)


def _gnu_openmp() -> list[str]:
    """Return the files of the GNU OpenMP libraries that this process has loaded: torch and numba may have one each."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    # The sixth field of a line is the file's path, which may have spaces.
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if "libgomp" in path.rpartition("/")[2])


def mark_used() -> None:
    """Remember that this process has used its threads: a process that is forked from it must leave them alone."""
    global _used
    _used = True


def _after_fork() -> None:
    """Leave the threads alone: OpenMP's pools do not survive a fork, and a process that asks for them hangs or dies."""
    global forked, watch
    watch = Watch()
    if _used:
        forked = True
        torch.set_num_threads(1)


_used = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
