"""What a server cannot run stops it, in its first process, before anything is started.

vLLM shows a plugin no configuration. Its platform sees each one before the engine starts, so the
plugin puts its own question behind the platform's. Without it a server on a GPU, or on a vLLM whose
hooks kvcomp does not know, would ignore the key and serve with dense attention.
"""

from __future__ import annotations

import functools
from typing import Any

from kvcomp.engines.vllm.settings import Settings


def guard(platform: Any, obstacle: str | None) -> None:
    """Refuse the configurations that ask for kvcomp and cannot have it; pass on all others.

    Args:
        platform: vLLM's; its `check_and_update_config(vllm_config)` is extended.
        obstacle: why no method can run here; None where one can. The extended hook raises it as a
            RuntimeError, and what `Settings.of` and `Settings.refuse` raise.
    """
    stock = platform.check_and_update_config

    @functools.wraps(stock)
    def check_and_update_config(vllm_config: Any) -> None:
        stock(vllm_config)
        settings = Settings.of(vllm_config)
        if settings is None:
            return
        if obstacle is not None:
            raise RuntimeError(obstacle)
        settings.refuse(vllm_config)

    platform.check_and_update_config = check_and_update_config
