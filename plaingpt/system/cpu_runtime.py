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
# Shares of the time that a thread waits for a core: beside busy programs 0.25 and more, on a quiet
# machine below 0.02.
SHARED = 0.1
QUIET = 0.04


# ---- malloc ----

def keep_freed_memory():
    """Makes malloc keep freed memory for later tensors; does nothing without glibc.

    A step allocates the tensors that the step before has freed. By default glibc gives the memory
    of large ones back to the system, which then clears each page anew. Where it keeps them, a step
    of the CPU profile takes 12.1 ms instead of 14.3, and its peak of memory is the same."""
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_TOP_PAD, 2 ** 26)


def release_freed_memory():
    """Gives freed memory that malloc keeps back to the system; does nothing without glibc.

    glibc keeps what lies between allocations that are still in use: 1.6 of 1.9 GB after a GPT of
    355M parameters."""
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'malloc_trim'):
        libc.malloc_trim(0)


# ---- OpenMP ----

def start_watching():
    """Starts the Watcher of this process, where OpenMP's threads may spin and Linux can tell."""
    has_openmp = 'ATen parallel backend: OpenMP' in torch.__config__.parallel_info()
    can_spin = has_openmp and torch.get_num_threads() > 1
    is_running = any(isinstance(thread, Watcher) for thread in threading.enumerate())
    if can_spin and not is_running and waiting_seconds():
        Watcher().start()


def waiting_seconds():
    """{thread: seconds that it was ready to run, but had no core} of this process; {}: unknown.

    Linux's documentation: Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat."""
    seconds = {}
    try:
        for thread in os.listdir('/proc/self/task'):
            with open(f'/proc/self/task/{thread}/schedstat', encoding='ascii') as file:
                _, nanoseconds, _ = file.read().split()
            seconds[thread] = int(nanoseconds) / 1e9
    except OSError:  # no Linux, or a thread that has just ended
        return {}
    return seconds


class Watcher(threading.Thread):
    """Keeps OpenMP's threads from spinning while other programs need the same cores.

    Between two parallel loops, libgomp's threads spin for some milliseconds before they sleep. On a
    quiet machine that is fastest: a step of the CPU profile takes 12.4 ms, and 27 if they sleep at
    once. But on a shared core, a spinning thread takes the time of the one that it waits for: two
    such runs on two cores took 135 ms a step and more, and 25 if they sleep at once."""

    def __init__(self):
        super().__init__(name='cpu watcher', daemon=True)
        self.idle_teams = None  # IdleTeams while the cores are shared

    def run(self):
        begin = time.monotonic()
        waited = waiting_seconds()
        while True:
            time.sleep(CHECK_SECONDS)
            now = time.monotonic()
            waited_now = waiting_seconds()
            in_both = waited.keys() & waited_now.keys()
            if in_both:
                longest = max(waited_now[thread] - waited[thread] for thread in in_both)
                self.react(longest / (now - begin))
            begin = now
            waited = waited_now

    def react(self, share):
        """share: of the last interval that the slowest thread has spent waiting for a core."""
        if self.idle_teams is None and share > SHARED:
            self.idle_teams = IdleTeams()
        elif self.idle_teams is not None and share < QUIET:
            self.idle_teams.end()
            self.idle_teams = None


class IdleTeams:
    """Sleeping OpenMP threads, so many that the computing ones no longer spin.

    libgomp lets threads spin only briefly while it has more of them than there are cores, idle ones
    included (its source: config/linux/wait.h, gomp_managed_threads). It has no call that says so,
    and reads GOMP_SPINCOUNT only once, when torch is imported."""

    def __init__(self):
        self._may_end = threading.Event()
        self._owners = []
        threads = torch.get_num_threads()
        cores = len(os.sched_getaffinity(0))
        # Each team adds threads - 1; its owner is a thread of Python's.
        teams = max(1, cores // max(1, threads - 1))
        for _ in range(teams):
            owner = threading.Thread(target=self._sleep, args=[threads], daemon=True,
                                     name='owner of an idle team')
            owner.start()
            self._owners.append(owner)

    def _sleep(self, threads):
        # libgomp gives each thread that computes a team of its own. torch has a thread compute at
        # least 2**15 elements.
        torch.zeros(threads * 2 ** 16).add_(1)
        self._may_end.wait()

    def end(self):
        self._may_end.set()
        for owner in self._owners:
            owner.join()
