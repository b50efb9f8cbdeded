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
    cpu.py          the backend for CPUs
    sink_window.py  the first and the newest tokens of a request
    lazy.py         LazyEviction, whose layers move what stays
    blocks.py       blocks that leave a running request
"""

from __future__ import annotations

VERSIONS = ">=0.32,<0.33"  # the hooks that are used move with every minor release
NAME = "kvcomp.engines.vllm.cpu.KvcompCPUBackend"


def register() -> None:
    """The plugin: put kvcomp's backend in the place of vLLM's own for CPUs.

    Where that cannot be, vLLM stays as it is, and a server that asks for a method does not start.
    """
    from vllm.platforms import current_platform

    from kvcomp.engines.vllm.start import guard

    reason = obstacle()
    guard(current_platform, reason)
    if reason is not None:
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvcomp.engines.vllm import blocks

    register_backend(AttentionBackendEnum.CPU_ATTN, NAME)
    blocks.register()


def obstacle() -> str | None:
    """Why the vLLM that is installed here cannot run a method; None where it can."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version
    from vllm import __version__
    from vllm.platforms import current_platform

    if Version(Version(__version__).base_version) not in SpecifierSet(VERSIONS):
        return f"kvcomp.engines.vllm: expected vLLM {VERSIONS}, got {__version__}"
    if not current_platform.is_cpu():
        return (
            "kvcomp.engines.vllm: the backend is for vLLM on CPUs, and this vLLM serves on"
            f" {current_platform.device_type or 'no device that it knows'}"
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
    if AttentionBackendEnum.CPU_ATTN.get_path() != NAME:
        raise RuntimeError(
            "kvcomp.engines.vllm: vLLM did not load the plugin: install kvcomp into the environment"
            " of vLLM, and name kvcomp in VLLM_PLUGINS where that is set"
        )
