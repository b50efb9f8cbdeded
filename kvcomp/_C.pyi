# The compiled extension. An op's entry point takes a backend number and then the arguments of the
# op's schema; `kvcomp.ops` binds it and has its types.
from typing import Any

class Backend:
    check: int
    cpu: int
    cuda: int

head_sizes: tuple[int, ...]
unlike_sizes: tuple[tuple[int, int], ...]  # of K and V

def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def cuda_driver_suffices() -> bool: ...
def __getattr__(name: str) -> Any: ...
