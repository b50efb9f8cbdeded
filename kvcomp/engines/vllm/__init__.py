"""kvcomp inside vLLM: an attention backend that vLLM loads as a plugin.

vLLM calls `register` once in each of its processes (entry point `vllm.general_plugins`). A server
runs a method only if it was started with one:

    vllm serve MODEL --additional-config '{"kvcomp": {"method": "delta", "budget": 1024}}'

Without the `kvcomp` key vLLM gets its own classes back, so installing kvcomp changes no server.

    settings.py     what the server was asked for, and what it cannot do
    start.py        the same, before the server starts
    step.py         one decode step of a method over a block table; knows nothing of vLLM
    pages.py        a layer's cache as K and V
    prompts.py      prompts and pieces of prompts, through vLLM's own kernel
    placing.py      which layers a method runs
    cpu.py          the backend for CPUs
    cuda.py         the backend for NVIDIA GPUs, which has never been run on one
    sink_window.py  the first and the newest tokens of a request
    lazy.py         LazyEviction, whose layers move what stays
    blocks.py       blocks that leave a running request
"""

from __future__ import annotations

VERSIONS = ">=0.32,<0.33"  # the hooks that are used move with every minor release
BACKENDS = {  # by device; the member of vLLM's list of backends, and what it then names
    "cpu": ("CPU_ATTN", "kvcomp.engines.vllm.cpu.KvcompCPUBackend"),
    "cuda": ("CUSTOM", "kvcomp.engines.vllm.cuda.KvcompBackend"),
}


def register() -> None:
    """The plugin: put kvcomp's backend in the place of vLLM's own for CPUs, beside those for GPUs.

    Where that cannot be, vLLM stays as it is, and a server that asks for a method does not start.
    """
    from vllm.platforms import current_platform

    from kvcomp.engines.vllm.start import guard, prepare_gpu

    reason = obstacle()
    if reason is not None:
        return guard(current_platform, reason)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    member, name = BACKENDS[device() or ""]
    register_backend(AttentionBackendEnum[member], name)
    if device() == "cuda":
        return guard(current_platform, None, prepare_gpu)
    from kvcomp.engines.vllm import blocks

    guard(current_platform, None)
    blocks.register()


def device() -> str | None:
    """That which vLLM serves on, where kvcomp has a backend for it."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "cpu"
    return "cuda" if current_platform.is_cuda() else None


def obstacle() -> str | None:
    """Why the vLLM that is installed here cannot run a method; None where it can."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version
    from vllm import __version__
    from vllm.platforms import current_platform

    if Version(Version(__version__).base_version) not in SpecifierSet(VERSIONS):
        return f"kvcomp.engines.vllm: expected vLLM {VERSIONS}, got {__version__}"
    if device() is None:
        named = getattr(current_platform, "device_name", None) or "no device that it knows"
        return (
            "kvcomp.engines.vllm: the backends are for vLLM on CPUs and NVIDIA GPUs, and this vLLM"
            f" serves on {named}"
        )
    return None


def check() -> None:
    """Load vLLM's plugins as a server does, and raise if kvcomp's backend is not in place.

    vLLM only logs a plugin that cannot be imported, and then serves with dense attention.

    Raises:
        RuntimeError: no vLLM, another version, a device that has no backend of kvcomp, a plugin
            that is not installed, or one that `VLLM_PLUGINS` leaves out.
    """
    try:
        from vllm.plugins import load_general_plugins
    except ImportError as error:
        raise RuntimeError(
            f"kvcomp.engines.vllm: vLLM {VERSIONS} is not installed here ({error})"
        ) from error
    if (reason := obstacle()) is not None:
        raise RuntimeError(reason)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    member, name = BACKENDS[device() or ""]
    backend = AttentionBackendEnum[member]
    if not backend.is_overridden() or backend.get_path() != name:
        raise RuntimeError(
            "kvcomp.engines.vllm: vLLM did not load the plugin: install kvcomp into the environment"
            " of vLLM, and name kvcomp in VLLM_PLUGINS where that is set"
        )
