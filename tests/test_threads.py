"""The CPU kernels run in torch's own threads, as many as torch would use, and start none.

Other Python threads go on meanwhile.
"""

import os
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch

from kvcomp import _C
from kvcomp.ops import OPS

START = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: {cores}])
import torch
from kvcomp import ops

def attend():
    k = torch.zeros(1, 8, 4096, 128)
    ops.decode_attention(torch.zeros(1, 32, 128), k, k, torch.tensor([4096], dtype=torch.int32))

def started(work):
    before = len(os.listdir("/proc/self/task"))
    work()
    return len(os.listdir("/proc/self/task")) - before
"""


def printed(cores, code):
    """What a fresh process on so many cores prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    process = subprocess.run(
        [sys.executable, "-c", START.format(cores=cores) + code],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def test_no_thread_beyond_the_cores_that_a_process_may_use():
    assert printed(1, "print(torch.get_num_threads(), started(attend))") == ["1", "0"]


def test_the_threads_are_those_of_torch():
    code = """
torch.set_num_threads(3)
print(started(attend), started(lambda: torch.zeros(1 << 22).sum()), started(attend))
torch.set_num_threads(1)
print(started(attend))
"""
    assert printed(2, code) == ["2", "0", "0", "0"]


def test_one_thread_in_the_worker_of_a_data_loader():
    code = """
class Attends(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return started(attend), torch.get_num_threads()

print(*next(iter(torch.utils.data.DataLoader(Attends(), batch_size=None, num_workers=1))))
"""
    assert printed(2, code) == ["0", "1"]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


LONG = {  # op -> arguments that keep its kernel busy for some milliseconds
    "kmeans": lambda: (torch.randn(1, 2, 2048, 64), ints(0), ints(2048), 16, 2048, 10),
    "page_scores": lambda: (
        *(torch.zeros(1, 64, 65536), torch.zeros(1, 64), ints(65536), 16, 1, True),
    ),
    "rotate_keys": lambda: (torch.randn(1, 8, 65536, 128), torch.ones(1, 64), torch.ones(1, 64)),
}


@pytest.mark.parametrize("name", LONG)
def test_other_python_threads_go_on_while_a_kernel_runs(name):
    """Python is told never to take the lock from this thread, so it moves on only if we let go."""
    with mock.patch.object(_C, name, wraps=getattr(_C, name)) as native:
        OPS[name].impl("cpu")(*LONG[name]())
    arguments, kernel = native.call_args.args, getattr(_C, name)
    ticks, done = [0], threading.Event()

    def tick():
        while not done.wait(1e-4):
            ticks[0] += 1

    interval = sys.getswitchinterval()
    other = threading.Thread(target=tick)
    other.start()
    try:
        sys.setswitchinterval(1e6)
        before, end = ticks[0], time.monotonic() + 30
        while ticks[0] < before + 3 and time.monotonic() < end:
            kernel(*arguments)
        assert ticks[0] >= before + 3
    finally:
        sys.setswitchinterval(interval)
        done.set()
        other.join()
