"""Control the threads: how many are used, how they wait for each other, and what a forked process may do.

The threads of an OpenMP pool wait for each other by spinning for some milliseconds before they sleep. On a quiet
machine this is the fastest way to wait. If another process is busy, a spinning thread takes the processor from the
thread that it waits for, and training becomes several times slower (benchmarks/NOTES.md). GNU OpenMP, which torch and
numba use on Linux, hardly spins if it manages more threads than there are processors. While the machine is busy, a pool
of idle threads is therefore kept beside the others (`Crowd`). The number of threads that compute does not change, so
results are equal to the last bit. Under a quota fewer threads compute, and the last bits may differ.
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

#: Seconds between two measurements of the processor time that this process gets.
WINDOW = 0.1
#: The machine counts as busy if both hold twice in a row: the threads of the pool, which spin, ran for less than this
#: share of the time, and they were interrupted at least this many times a second. On two quiet cores they ran for 0.94
#: of the time or more. Beside one busy process they ran for 0.5 to 0.7 and were interrupted about 200 times.
BUSY_SHARE, BUSY_INTERRUPTIONS = 0.85, 20
#: In a crowd the threads sleep while they wait. The crowd ends if they are interrupted less often per second than this
#: for this many seconds. On two quiet cores they were interrupted 15 times a second, beside one busy process 500 to
#: 7,000 times.
CALM_INTERRUPTIONS, CALM_SECONDS, LONGEST_CALM = 100, 1.0, 16.0
#: If the user has set these variables, the way of waiting and the number of threads are not changed.
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
NUMBER_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

#: Whether this process was forked from one that had used its threads.
forked = False


@functools.cache
def quota() -> float:
    """Return how many processors the process may use: the smallest quota of its control groups, or infinity."""
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
    """Return the quota of one control group, of version 2 or 1."""
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

    A Python thread opens a parallel region that does nothing. The region's pool of threads lives as long as the Python
    thread.
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
                # A library that cannot be opened is skipped; its threads spin, as without a crowd.
                with contextlib.suppress(OSError, AttributeError):
                    parallel = ctypes.CDLL(library).GOMP_parallel
                    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                    parallel(nothing, None, _n_processors() + 1, 0)
        finally:
            ready.set()  # the training waits for this, even after an error
        self._leave.wait()

    def disperse(self) -> None:
        """End the threads."""
        self._leave.set()
        self._thread.join()


def _n_processors() -> int:
    """Return how many processors this process may run on, and at least the number of torch's threads."""
    # OpenMP may have bound this thread to one processor, for example with OMP_PROC_BIND.
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(n, min(torch.get_num_threads(), os.cpu_count() or 1))


def _can_start(n: int) -> bool:
    """Tell whether n more threads can be started. If one cannot, OpenMP would end the process."""
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
    """Measure between minibatches how much the threads run, and keep a crowd while the machine is busy."""

    def __init__(self):
        self._lock = threading.RLock()
        self._n_users, self._crowd = 0, None
        self._n_threads, self._usable = 1, False

    def begin(self) -> None:
        """Start to measure, unless another user has started already."""
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
        """End the crowd, unless there are other users."""
        with self._lock:
            self._n_users -= 1
            if self._n_users == 0:
                self._disperse()

    def look(self) -> None:
        """Every tenth of a second, decide whether to start, keep or end the crowd. Other calls cost nearly nothing."""
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
                self._calm = min(2 * self._calm, LONGEST_CALM)  # if this was too early, wait longer next time
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
        """Return how often the system interrupted threads of this process to run others."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


watch = Watch()


@contextmanager
def adapted() -> Iterator[None]:
    """Context manager: limit the threads to the quota, and let them sleep while the machine is busy."""
    mark_used()
    n_threads, process, used = torch.get_num_threads(), os.getpid(), watch
    if n_threads > 1 and not any(name in os.environ for name in NUMBER_VARIABLES):
        torch.set_num_threads(max(1, int(min(n_threads, quota()))))
    used.begin()
    try:
        yield
    finally:
        if os.getpid() == process:  # a process forked within the block has no threads to end
            used.end()
            if torch.get_num_threads() != n_threads:
                torch.set_num_threads(n_threads)


def _gnu_openmp() -> list[str]:
    """Return the files of the GNU OpenMP libraries in this process. torch and numba may each have loaded one."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    # The sixth field of a line is the path, which may contain spaces.
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if "libgomp" in path.rpartition("/")[2])


def mark_used() -> None:
    """Record that this process has used its threads. A process forked from it must not use them."""
    global _used
    _used = True


def _after_fork() -> None:
    """Use one thread only. OpenMP's pools do not survive a fork: a process that uses them hangs or dies."""
    global forked, watch
    watch = Watch()
    if _used:
        forked = True
        torch.set_num_threads(1)


_used = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
