"""The CPU kernels use torch's own threads, as many as torch would, and start none of their own."""

import os
import subprocess
import sys

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
