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
from plaingpt.system.cpu_runtime import Watcher


def uses_libgomp():
    """Whether torch's threads are those of libgomp."""
    if 'ATen parallel backend: OpenMP' not in torch.__config__.parallel_info():
        return False
    try:
        with open('/proc/self/maps', encoding='utf-8') as file:
            libraries = file.read()
    except FileNotFoundError:
        return False
    return 'libgomp' in libraries and 'libiomp' not in libraries


def has_two_cores():
    return hasattr(os, 'sched_getaffinity') and len(os.sched_getaffinity(0)) > 1


HAS_SCHEDSTAT = bool(cpu_runtime.waiting_seconds())


def printed(program, threads):
    """What a program prints as JSON, in a process of its own with this many OpenMP threads."""
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': str(ROOT)}
    for name in 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'OMP_PROC_BIND', 'LD_PRELOAD':
        environment.pop(name, None)
    ended = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True,
                           text=True, check=True)
    return json.loads(ended.stdout)


# ---- malloc ----

PAGE_FAULTS = """
import ctypes, resource, statistics, torch
from plaingpt.system import cpu_runtime
PR_SET_THP_DISABLE = 41  # huge pages would make faults rare
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
if KEEP:
    cpu_runtime.keep_freed_memory()
faults = []
for step in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2 ** 24) for _ in range(2)]
    del tensors
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# The median, because on a busy machine the kernel may take pages away for a while.
print(statistics.median(faults[7:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="it is a setting of glibc's malloc")
def test_freed_memory_is_used_again_without_new_pages():
    by_default = printed(PAGE_FAULTS.replace('KEEP', 'False'), threads=1)
    kept = printed(PAGE_FAULTS.replace('KEEP', 'True'), threads=1)
    assert by_default > 1_000
    assert kept < by_default / 10


# ---- OpenMP ----

SHARE_A_CORE = """
import os, time
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
    print(cpu_runtime.waiting_seconds()[str(os.getpid())])
"""


@pytest.mark.skipif(not HAS_SCHEDSTAT, reason='Linux alone counts how long threads wait')
def test_the_time_that_a_thread_waits_for_a_shared_core_is_counted():
    assert printed(SHARE_A_CORE, threads=1) > 0.2


def test_without_schedstat_the_waiting_is_unknown(monkeypatch):
    monkeypatch.setattr(os, 'listdir', lambda path: ['0'])
    assert cpu_runtime.waiting_seconds() == {}


def owners_of_teams():
    return [thread for thread in threading.enumerate() if thread.name == 'owner of an idle team']


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='only Linux is watched')
def test_teams_are_idle_from_when_cores_are_shared_until_they_are_quiet():
    watcher = Watcher()
    try:
        watcher.react(0.02)
        assert not owners_of_teams()
        watcher.react(0.5)
        owners = owners_of_teams()
        assert owners
        watcher.react(0.5)
        watcher.react(0.07)  # neither shared nor quiet
        assert owners_of_teams() == owners
    finally:
        watcher.react(0.01)
    assert not owners_of_teams()


TIME_OF_CPU = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import time, torch
from plaingpt.system.cpu_runtime import IdleTeams
torch.set_num_threads(2)
x = torch.zeros(2 ** 18)

def cpu_seconds():
    begin = time.process_time()
    for _ in range(100):
        x.add_(1)
        time.sleep(0.004)
    return time.process_time() - begin

cpu_seconds()
spinning = cpu_seconds()
teams = IdleTeams()
cpu_seconds()
sleeping = min(cpu_seconds() for _ in range(3))
teams.end()
print([spinning, sleeping, cpu_seconds()])
"""


@pytest.mark.skipif(not (uses_libgomp() and has_two_cores()),
                    reason="it is libgomp's threads that spin, on more than one core")
def test_with_idle_teams_threads_sleep_between_loops():
    spinning, sleeping, spinning_again = printed(TIME_OF_CPU, threads=2)
    assert sleeping < 0.6 * spinning
    assert sleeping < 0.6 * spinning_again


GRADIENTS = """
import hashlib, json, torch
from plaingpt.system.cpu_runtime import IdleTeams
torch.set_num_threads(2)

def digest():
    torch.manual_seed(0)
    x = torch.randn(512, 256)
    norm = torch.nn.LayerNorm(256)  # whose sums depend on how many threads compute
    norm(x).square().sum().backward()
    return hashlib.sha256(norm.weight.grad.numpy().tobytes()).hexdigest()

digests = [digest()]
teams = IdleTeams()
digests.append(digest())
teams.end()
torch.set_num_threads(1)
digests.append(digest())
print(json.dumps(digests))
"""


@pytest.mark.skipif(not (uses_libgomp() and has_two_cores()), reason='there is one thread')
def test_idle_teams_change_no_bit_where_another_number_of_threads_would():
    before, beside_idle_teams, of_one_thread = printed(GRADIENTS, threads=2)
    assert beside_idle_teams == before
    assert of_one_thread != before


WATCHERS = """
import threading, torch
from plaingpt.system import devices
torch.set_num_threads(THREADS)
for _ in range(2):
    devices.set_up_math(0, torch.device('cpu'))
print([thread.name for thread in threading.enumerate()].count('cpu watcher'))
"""


@pytest.mark.skipif(not (uses_libgomp() and HAS_SCHEDSTAT), reason='there is nothing to watch')
@pytest.mark.parametrize('threads, watchers', [(2, 1), (1, 0)])
def test_one_watcher_runs_where_threads_can_spin(threads, watchers):
    assert printed(WATCHERS.replace('THREADS', str(threads)), threads) == watchers
