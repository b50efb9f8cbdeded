"""Background: runs work on a side stream of the GPU or in a worker thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

DEPTH = 2  # pieces of work at once; each holds on to its tensors


class Background:
    """A queue of work, done in the order in which it is submitted."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._line: torch.cuda.Stream | ThreadPoolExecutor = (
            torch.cuda.Stream(device) if on_gpu else ThreadPoolExecutor(1, "kvcomp")
        )
        self._under_way: deque[Callable[[], None]] = deque()
        self._latest: Callable[[], bool] | None = None  # whether the latest piece is done

    def __deepcopy__(self, memo: dict) -> Background:
        return self  # a copied cache uses the same line

    def submit(self, work: Callable[[], None], *tensors: Tensor) -> Callable[[], None]:
        """Start `work`, which uses `tensors`. The returned function waits for its end and raises
        its errors.
        """
        wait = self._start(work, tensors)
        self._under_way.append(wait)
        if len(self._under_way) > DEPTH:
            with suppress(Exception):  # its own submitter gets the error
                self._under_way.popleft()()
        return wait

    @property
    def busy(self) -> bool:
        """Whether the latest piece is still running. Asking does not wait."""
        return self._latest is not None and not self._latest()

    def _start(self, work: Callable[[], None], tensors: tuple[Tensor, ...]) -> Callable[[], None]:
        line = self._line
        if isinstance(line, ThreadPoolExecutor):
            future = line.submit(_as_here(work))
            self._latest = future.done
            return future.result
        line.wait_stream(torch.cuda.current_stream(line.device))
        with torch.cuda.stream(line):
            work()
            done = line.record_event()
        self._latest = done.query
        for tensor in tensors:  # keep the memory until the side stream is done
            tensor.record_stream(line)
        return lambda: torch.cuda.current_stream(line.device).wait_event(done)


def _as_here(work: Callable[[], None]) -> Callable[[], None]:
    """`work` with the inference mode of this thread and without gradients."""
    inference = torch.is_inference_mode_enabled()

    def run() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # the first sets the second, too
            work()

    return run
