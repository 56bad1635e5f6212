"""The output of an operation: a new folder, made beside its place and renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from rankscope.errors import ConfigError, FormatError, RankscopeError
from rankscope.formats.file_io import umask

RECORD_NAME = "rankscope.json"
PARTS_NAME = "modules.json"  # of sentence-transformers: the model and what stands after it, each with its folder
# What goes with a model or an adapter besides weights and configuration.
TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece*", "chat_template*", "*preprocessor_config.json", "processor_config.json",
)  # fmt: skip
WEIGHT_PATTERNS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.index.json",
)
EXCLUDED_PATTERNS = (*WEIGHT_PATTERNS, "README.md", RECORD_NAME, ".*")


@contextmanager
def create_output_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside ``out`` that is renamed to ``out`` at the end; after an error nothing is left.

    Raises:
        ConfigError: ``out`` exists and is not an empty folder.
        FormatError: it cannot be written.
    """
    place = free_output_path(out)
    try:
        with _make_parents(place), _make_neighbour(place, out) as made:
            yield made
            os.chmod(made, 0o777 & ~umask())
            _check_free(place, out)
            if place.exists():
                place.rmdir()
            os.replace(made, place)
    except OSError as error:
        raise FormatError(f"{out}: cannot be written ({error.strerror or error})") from error


@contextmanager
def _make_parents(place: Path) -> Iterator[None]:
    """Make the folders above ``place``; after an error those that were made are removed."""
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # not there, or another process has put something into it
                folder.rmdir()
        raise


@contextmanager
def _make_neighbour(place: Path, out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside ``place``, removed at the end; errors that name it name ``out`` instead."""
    made = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=".tmp"))
    try:
        yield made
    except RankscopeError as error:
        if str(made) not in str(error):
            raise
        raise type(error)(str(error).replace(str(made), str(out))) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def free_output_path(out: str | os.PathLike[str]) -> Path:
    """The absolute path of the output.

    Raises:
        ConfigError: ``out`` exists and is not an empty folder.
        FormatError: the file system does not say what is there.
    """
    place = Path(os.path.realpath(Path(out).expanduser()))
    _check_free(place, out)
    return place


def _check_free(place: Path, out: str | os.PathLike[str]) -> None:
    try:
        taken = place.exists() and not (place.is_dir() and not any(place.iterdir()))
    except OSError as error:
        raise FormatError(f"{out}: cannot be read ({error.strerror or error})") from error
    if taken:
        raise ConfigError(f"{out}: exists already; give a new place for the output, nothing is overwritten")


def copy_files(
    source: Path, folder: Path, patterns: Iterable[str] = ("*",), but: Iterable[str] = EXCLUDED_PATTERNS
) -> None:
    """Copy the files of a folder that match a pattern and none of ``but``; links are followed, folders left out.

    Raises:
        FormatError: a file cannot be read or written.
    """
    patterns, but = tuple(patterns), tuple(but)
    try:
        for path in sorted(source.iterdir()):
            wanted = any(fnmatch(path.name, pattern) for pattern in patterns)
            if wanted and not any(fnmatch(path.name, pattern) for pattern in but) and path.is_file():
                shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise FormatError(f"{error.filename or source}: cannot be copied ({error.strerror or error})") from error


def copy_parts(source: Path, folder: Path) -> None:
    """Copy the folders of the parts that sentence-transformers loads beside the model, such as its pooling.

    Raises:
        FormatError: the list of parts is damaged, or a folder cannot be read or written.
    """
    listing = source / PARTS_NAME
    if not listing.is_file():
        return
    try:
        parts = json.loads(listing.read_text(encoding="utf-8"))
        paths = [str(part["path"]) for part in parts if part["path"]]
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{listing}: is no list of the parts of a sentence-transformers model") from error
    for name in paths:
        part = (source / name).resolve()
        if not part.is_relative_to(source.resolve()) or not part.is_dir():
            raise FormatError(f"{listing}: names the part {name!r}, and there is no such folder beside it")
        try:
            shutil.copytree(part, folder / name)
        except (OSError, shutil.Error) as error:
            raise FormatError(f"{part}: cannot be copied ({error})") from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer that lies beside an adapter, where one does."""
    copy_files(source, folder, TOKENIZER_PATTERNS)
