"""
The C libraries beneath torch on a CPU: how malloc keeps memory, and how OpenMP's threads wait.

Neither changes a result by a bit: the same threads compute the same parts of each operation.
"""
import ctypes
import os
import sys
import threading
import time

import torch

# What mallopt(3) sets, by glibc's malloc.h.
M_TRIM_THRESHOLD = -1  # bytes at the end of the heap that go back to the system when they are free
M_TOP_PAD = -2         # bytes by which the heap grows beyond what it needs
M_MMAP_MAX = -4        # how many allocations may lie outside the heap

CHECK_SECONDS = 0.25  # between two looks at whether cores are shared
# Shares of the time that threads wait for a core: two busy programs on two cores 0.5 to 1, a quiet
# machine below 0.02.
SHARED = 0.1
QUIET = 0.04


# ---- malloc ----

def keep_freed_memory():
    """Makes malloc keep freed memory for later tensors; does nothing without glibc.

    A step allocates the tensors that the step before has freed. By default glibc gives the memory
    of large ones back to the system, which then clears each page anew. Where it keeps them, a step
    of the CPU profile takes 12.1 ms instead of 14.3, at the same peak of memory."""
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_TOP_PAD, 2 ** 26)


# ---- OpenMP ----

def start_watching():
    """Starts the Watcher of this process, where OpenMP's threads may spin and Linux can tell."""
    has_openmp = 'ATen parallel backend: OpenMP' in torch.__config__.parallel_info()
    can_spin = has_openmp and torch.get_num_threads() > 1
    is_running = any(isinstance(thread, Watcher) for thread in threading.enumerate())
    if can_spin and not is_running and waiting_seconds() is not None:
        Watcher().start()


def waiting_seconds():
    """Seconds that the threads of this process were ready to run, but had no core; None: unknown.

    Linux's documentation: Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat."""
    total = 0
    try:
        for thread in os.listdir('/proc/self/task'):
            with open(f'/proc/self/task/{thread}/schedstat', encoding='ascii') as file:
                _, nanoseconds, _ = file.read().split()
            total += int(nanoseconds)
    except (FileNotFoundError, ProcessLookupError):  # no Linux, or a thread that has just ended
        return None
    return total / 1e9


class Watcher(threading.Thread):
    """Keeps OpenMP's threads from spinning while other programs need the same cores.

    Between two parallel loops, libgomp's threads spin for some milliseconds before they sleep. On a
    quiet machine nothing is faster: a step of the CPU profile takes 12.4 ms, and 27 if they sleep
    at once. But on a shared core, a spinning thread takes the time of the one that it waits for:
    two such runs on two cores took 135 ms a step and more, and 25 if they sleep at once."""

    def __init__(self):
        super().__init__(name='cpu watcher', daemon=True)
        self.idle_team = None  # an IdleTeam while the cores are shared

    def run(self):
        begin = time.monotonic()
        waited = waiting_seconds()
        while True:
            time.sleep(CHECK_SECONDS)
            now = time.monotonic()
            waited_now = waiting_seconds()
            if waited is not None and waited_now is not None:
                self.react((waited_now - waited) / (now - begin))
            begin = now
            waited = waited_now

    def react(self, share):
        """share: of the last time, in which threads waited for a core; the sum over threads."""
        if self.idle_team is None and share > SHARED:
            self.idle_team = IdleTeam()
        elif self.idle_team is not None and share < QUIET:
            self.idle_team.end()
            self.idle_team = None


class IdleTeam:
    """As many sleeping OpenMP threads as torch uses, which keep the others from spinning.

    libgomp lets threads spin but briefly while it has more of them than there are cores, idle ones
    included (its source: config/linux/wait.h, gomp_managed_threads). It has no call that says so,
    and reads GOMP_SPINCOUNT only once, when torch is imported."""

    def __init__(self):
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sleep, name='idle team', daemon=True)
        self._thread.start()

    def _sleep(self):
        torch.zeros(2 ** 20).add_(1)  # libgomp gives each thread that computes a team of its own
        self._end.wait()

    def end(self):
        self._end.set()
        self._thread.join()
