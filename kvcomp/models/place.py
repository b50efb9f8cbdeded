"""Where fetched models are, and what a model's name stands for."""

from __future__ import annotations

from pathlib import Path

from kvcomp import reasoner, storage
from kvcomp.checks import require_one_of
from kvcomp.models.catalog import MODELS, Artifact


def folder() -> Path:
    """Where models are kept: `models` in KVCOMP_CACHE, else in the user's cache folder."""
    return storage.folder("models")


def known(name: str) -> Artifact:
    """The model of a short name.

    Raises:
        ValueError: there is none.
    """
    require_one_of(MODELS, "kvcomp.models: name", name)
    return MODELS[name]


def installed(name: str) -> bool:
    """Whether `kvcomp get` has put the model in its place."""
    return (folder() / known(name).name / "config.json").is_file()


def path(name: str) -> str:
    """Folder of a fetched model: config, bf16 safetensors and tokenizer; "reasoner" is bundled.

    Raises:
        ValueError: no such name, or the model has not been fetched; the message names the command
            that does.
    """
    if name == "reasoner":
        return reasoner.path()
    if not installed(name):
        accept = " --accept-terms" if MODELS[name].terms else ""
        raise ValueError(f"kvcomp.models: {name} is not here yet: kvcomp get {name}{accept}")
    return str(folder() / name)


def resolve(name: str) -> str:
    """What to load for a name that a user gave: the folder behind a short name, else the name."""
    return path(name) if name == "reasoner" or name in MODELS else name
