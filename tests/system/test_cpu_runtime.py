"""plaingpt/system/cpu_runtime.py: memory is kept, and threads do not spin on shared cores."""
import json
import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT

from plaingpt.system import cpu_runtime
from plaingpt.system.cpu_runtime import IdleTeam, Watcher

HAS_SCHEDSTAT = os.path.exists('/proc/self/schedstat')
HAS_OPENMP = 'ATen parallel backend: OpenMP' in torch.__config__.parallel_info()


def printed(program, threads):
    """What a program prints as JSON, in a process of its own with this many OpenMP threads."""
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': str(ROOT)}
    environment.pop('OMP_WAIT_POLICY', None)
    ended = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True,
                           text=True, check=True)
    return json.loads(ended.stdout)


# ---- malloc ----

PAGE_FAULTS = """
import resource, sys, torch
from plaingpt.system import cpu_runtime
if KEEP:
    cpu_runtime.keep_freed_memory()
faults = []
for step in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2 ** 24) for _ in range(2)]
    del tensors
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[8:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="it is a setting of glibc's malloc")
def test_freed_memory_is_used_again_without_new_pages():
    by_default = printed(PAGE_FAULTS.replace('KEEP', 'False'), threads=1)
    assert by_default > 10_000  # pages of 4 KiB; each tensor has 64 MiB
    assert printed(PAGE_FAULTS.replace('KEEP', 'True'), threads=1) < 1_000


# ---- OpenMP ----

SHARE_A_CORE = """
import os, threading, time
from plaingpt.system import cpu_runtime
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

def compute():
    end = time.monotonic() + 1
    while time.monotonic() < end:
        sum(range(10 ** 5))

neighbour = os.fork()
compute()
if neighbour:
    os.waitpid(neighbour, 0)
    print(cpu_runtime.waiting_seconds())
"""


@pytest.mark.skipif(not HAS_SCHEDSTAT, reason='Linux alone counts how long threads wait')
def test_the_time_that_threads_wait_for_a_shared_core_is_counted():
    assert 0.2 < printed(SHARE_A_CORE, threads=1) < 2


def test_without_schedstat_the_waiting_is_unknown(monkeypatch):
    monkeypatch.setattr(os, 'listdir', lambda path: ['0'])
    assert cpu_runtime.waiting_seconds() is None


def teams():
    return [thread for thread in threading.enumerate() if thread.name == 'idle team']


def test_a_team_is_idle_from_when_cores_are_shared_until_they_are_quiet():
    watcher = Watcher()
    try:
        watcher.react(0.02)
        assert len(teams()) == 0
        watcher.react(0.5)
        assert len(teams()) == 1
        watcher.react(0.5)
        watcher.react(0.07)  # neither shared nor quiet
        assert len(teams()) == 1
    finally:
        watcher.react(0.01)
    assert len(teams()) == 0


TIME_OF_CPU = """
import time, torch
from plaingpt.system.cpu_runtime import IdleTeam
x = torch.zeros(2 ** 18)

def cpu_seconds():
    begin = time.process_time()
    for _ in range(100):
        x.add_(1)
        time.sleep(0.004)
    return time.process_time() - begin

cpu_seconds()
spinning = cpu_seconds()
team = IdleTeam()
cpu_seconds()
sleeping = cpu_seconds()
team.end()
print([spinning, sleeping, cpu_seconds()])
"""


@pytest.mark.skipif(not HAS_OPENMP or sys.platform != 'linux' or len(os.sched_getaffinity(0)) < 2,
                    reason='threads spin in libgomp, on more than one core')
def test_with_an_idle_team_threads_sleep_between_loops():
    cores = len(os.sched_getaffinity(0))
    spinning, sleeping, spinning_again = printed(TIME_OF_CPU, threads=cores)
    assert sleeping < 0.5 * spinning
    assert sleeping < 0.5 * spinning_again


def test_an_idle_team_changes_no_bit():
    def gradients():
        torch.manual_seed(0)
        x = torch.randn(512, 256)
        norm = torch.nn.LayerNorm(256)  # whose sums depend on how many threads compute
        norm(x).square().sum().backward()
        return norm.weight.grad

    expected = gradients()
    team = IdleTeam()
    found = gradients()
    team.end()
    assert torch.equal(found, expected)


WATCHERS = """
import threading, torch
from plaingpt.system import devices
for _ in range(2):
    devices.set_up_math(0, torch.device('cpu'))
print([thread.name for thread in threading.enumerate()].count('cpu watcher'))
"""


@pytest.mark.skipif(not (HAS_SCHEDSTAT and HAS_OPENMP), reason='nothing to watch')
@pytest.mark.parametrize('threads, watchers', [(2, 1), (1, 0)])
def test_one_watcher_runs_where_threads_can_spin(threads, watchers):
    assert printed(WATCHERS, threads) == watchers
