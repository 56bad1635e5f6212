"""The table of file formats: how each is recognised, opened and written. A new format is one file and one row here.

Readers and writers are imported when they are used: help texts name the formats, and load neither torch nor scipy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankscope.errors import FormatError, RankscopeError
from rankscope.formats.names import strip_wrappers
from rankscope.formats.peft_keys import CONFIG_NAME, OLD_WEIGHTS_NAME, PEFT_PREFIX, WEIGHTS_NAME, parse_key
from rankscope.formats.study_layout import ADAPTER_FOLDER, RUN_NAME, UPDATES_NAME

if TYPE_CHECKING:
    from rankscope.formats.abstract_store import Store
    from rankscope.formats.adapter_file import FileStore
    from rankscope.formats.file_io import TensorFile
    from rankscope.formats.layouts import AdapterContents, LayerFactors
    from rankscope.formats.opening import Opening
    from rankscope.formats.pickle_file import PickledFile

    OpenTensors = TensorFile | PickledFile


MLX_WEIGHTS_NAME = "adapters.safetensors"


class NoBaseError(FormatError):
    """Full weights, whose update is not known without their base."""


@dataclass(frozen=True)
class FormatWriter:
    """How layers are written in a format.

    ``arrange`` makes the contents from the layers, the base as it was given, and the paths of the base's modules.
    ``file_name`` is that of the one file in an output folder, with ``{}`` for the folder's name; None for a format
    that is a folder of one model and holds layers of every kind, as PEFT's does.
    """

    arrange: Callable[[Sequence[LayerFactors], str | os.PathLike[str] | None, Sequence[str]], AdapterContents]
    file_name: str | None = None


@dataclass(frozen=True)
class FileFormat:
    """One format.

    Attributes:
        kind: the ``Store.kind`` of its sources, and its name in ``convert --to``.
        title: what ``inspect`` calls a source of it.
        open: makes the store of a path; the tensors are None where the path alone identifies the format.
        tools: tools that write it, as help texts name them; none for formats that are no adapter's.
        paths: where in a folder it lies; the first that exists identifies the format.
        matches: whether a file of tensors is of this format, by its keys and metadata.
        is_part: whether a file that was given by its own path belongs to a folder of this format.
        writer: how ``convert`` writes it; None where it is only read.
    """

    kind: str
    title: str
    open: Callable[[Path, OpenTensors | None, Opening], Store]
    tools: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    matches: Callable[[OpenTensors], bool] | None = None
    is_part: Callable[[Path], bool] | None = None
    writer: FormatWriter | None = None


def _open_peft(path: Path, _: OpenTensors | None, opening: Opening) -> Store:
    """Open a PEFT adapter. Where no base was given, the base that its configuration names is used if it is on disk."""
    from rankscope.formats.file_io import read_json

    folder = path.parent
    config = read_json(folder / CONFIG_NAME)
    if "peft_type" not in config and (folder / MLX_WEIGHTS_NAME).is_file():  # mlx-lm's configuration has this name too
        return _open_mlx(folder / MLX_WEIGHTS_NAME, None, opening)
    named = config.get("base_model_name_or_path")
    own = Path(named).expanduser() if isinstance(named, str) and named else None
    ours = (folder.parent / RUN_NAME).is_file()  # the study of a run says which base it has
    if opening.base_path is not None or own is None or ours or not _is_folder(own):
        return _make_peft_store(folder, config, opening)
    try:
        store = _make_peft_store(folder, config, replace(opening, base=own))
        store.notes.append(f"its base was found where its configuration says: {own}")
    except RankscopeError as error:
        store = _make_peft_store(folder, config, opening)
        store.notes.append(f"its base, {own}, could not be used ({error})")
    return store


def _make_peft_store(folder: Path, config: Mapping[str, Any], opening: Opening) -> Store:
    from rankscope.formats.peft_config import peft_type
    from rankscope.formats.peft_lora import PeftStore
    from rankscope.formats.peft_methods import PeftMethodStore

    if peft_type(folder / CONFIG_NAME, config) == "LORA":
        return PeftStore(folder, opening.base_path, opening.device, opening.initial_path)
    return PeftMethodStore(folder, opening.base_path, opening.device)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _is_peft_file(file: Path) -> bool:
    return file.name in (WEIGHTS_NAME, OLD_WEIGHTS_NAME, CONFIG_NAME) and (file.parent / CONFIG_NAME).exists()


def _arrange_peft(
    layers: Sequence[LayerFactors], base: str | os.PathLike[str] | None, paths: Sequence[str]
) -> AdapterContents:
    from rankscope.formats.layouts import to_peft

    # A pipeline's folder has one folder for each component.
    part = None if base is None else os.path.join(base, layers[0].component)
    named = part if part is not None and os.path.isdir(part) else base
    return to_peft(layers, None if named is None else str(named).rstrip(os.sep), paths)


def _open_updates(path: Path, tensors: OpenTensors | None, opening: Opening) -> Store:
    from rankscope.formats.checkpoint_store import UpdateStore

    return UpdateStore(path if tensors is None else tensors.path, opening.base_path, opening.device)


def _match_updates(tensors: OpenTensors) -> bool:
    from rankscope.formats.checkpoint_store import is_updates

    return is_updates(tensors)


def _open_kohya(path: Path, tensors: OpenTensors | None, opening: Opening) -> Store:
    from rankscope.formats.kohya import KohyaStore

    return open_adapter_file(KohyaStore, path, tensors, opening)


def _match_kohya(tensors: OpenTensors) -> bool:
    from rankscope.formats.kohya import is_kohya

    return is_kohya(_bare_keys(tensors))


def _bare_keys(tensors: OpenTensors) -> list[str]:
    """Keys without what torch's wrappers put into them."""
    return [strip_wrappers(key) for key in tensors.infos]


def _arrange_kohya(layers: Sequence[LayerFactors], _: object, __: object) -> AdapterContents:
    from rankscope.formats.layouts import to_kohya

    return to_kohya(layers)


def _open_diffusers(path: Path, tensors: OpenTensors | None, opening: Opening) -> Store:
    from rankscope.formats.diffusers import DiffusersStore

    return open_adapter_file(DiffusersStore, path, tensors, opening)


def _match_diffusers(tensors: OpenTensors) -> bool:
    from rankscope.formats.diffusers import is_diffusers

    return is_diffusers(_bare_keys(tensors), tensors.metadata)


def _arrange_diffusers(layers: Sequence[LayerFactors], _: object, __: object) -> AdapterContents:
    from rankscope.formats.layouts import to_diffusers

    return to_diffusers(layers)


def _open_loralib(path: Path, tensors: OpenTensors | None, opening: Opening) -> Store:
    from rankscope.formats.loralib import LoralibStore

    return open_adapter_file(LoralibStore, path, tensors, opening)


def _match_loralib(tensors: OpenTensors) -> bool:
    from rankscope.formats.loralib import is_loralib

    return is_loralib(_bare_keys(tensors))


def _open_mlx(path: Path, tensors: OpenTensors | None, opening: Opening) -> Store:
    from rankscope.formats.mlx import MlxStore
    from rankscope.formats.pickle_file import open_tensors

    if tensors is not None:
        return open_adapter_file(MlxStore, path, tensors, opening)
    tensors = open_tensors(path)
    row = format_of(tensors)  # mlx-lm calls fully tuned weights by the same name
    return row.open(path.parent if row.kind == "mlx" else path, tensors, opening)


def _match_mlx(tensors: OpenTensors) -> bool:
    from rankscope.formats.mlx import is_mlx

    return is_mlx(_bare_keys(tensors))


def _open_torchtune(path: Path, tensors: OpenTensors | None, opening: Opening) -> Store:
    from rankscope.formats.torchtune import TorchtuneStore

    return open_adapter_file(TorchtuneStore, path, tensors, opening)


def _match_torchtune(tensors: OpenTensors) -> bool:
    from rankscope.formats.torchtune import is_torchtune

    return is_torchtune(_bare_keys(tensors))


def _open_xlabs(path: Path, tensors: OpenTensors | None, opening: Opening) -> Store:
    from rankscope.formats.xlabs import XLabsStore

    return open_adapter_file(XLabsStore, path, tensors, opening)


def _match_xlabs(tensors: OpenTensors) -> bool:
    from rankscope.formats.xlabs import is_xlabs

    return is_xlabs(_bare_keys(tensors))


def open_adapter_file(store: type[FileStore], path: Path, tensors: OpenTensors | None, opening: Opening) -> Store:
    """The ``open`` of a format that is one file, with ``store`` given.

    Raises:
        FormatError: the file is damaged, or nothing in it can be read.
    """
    if tensors is None:
        raise FormatError(f"{path}: is not a file of tensors")
    return store(path, tensors, opening.base_path, opening.device, opening.alpha)


def _open_checkpoint(path: Path, tensors: OpenTensors | None, opening: Opening) -> Store:
    if tensors is not None:
        keys = _bare_keys(tensors)
        if any(parse_key(key) for key in keys) and opening.alpha is not None:
            return _open_diffusers(path, tensors, opening)  # PEFT's names, and α is given
        if any(key.startswith(PEFT_PREFIX) or parse_key(key) for key in keys):
            raise FormatError(
                f"{tensors.path}: holds the factors of an adapter, but not its scale; name it {WEIGHTS_NAME} and put "
                f"its {CONFIG_NAME} beside it, or give α (--alpha)"
            )
        _check_foreign(tensors.path, keys)
    if opening.base_path is None:
        raise NoBaseError(f"{path}: holds full weights; say with --base which model they were tuned from")
    from rankscope.formats.checkpoint_store import CheckpointStore

    return CheckpointStore(path, opening.base_path, opening.device)


def _check_foreign(path: Path, keys: Sequence[str]) -> None:
    """Refuse a file most of whose tensors are called after a method of adapters, in names that no reader knows."""
    named = [key for key in keys if _ADAPTER_WORD.search(key)]
    if 2 * len(named) > len(keys):
        raise FormatError(
            f"{path}: is an adapter by the names of its tensors ({named[0]}), in a layout that is not read; load it "
            "with the tool that made it and save it as PEFT, kohya or diffusers do"
        )


_ADAPTER_WORD = re.compile(r"lora|loha|lokr|hada_|adapter|dora_", re.IGNORECASE)

FORMATS: tuple[FileFormat, ...] = (
    FileFormat(
        "peft",
        "PEFT adapter",
        _open_peft,
        tools=("PEFT",),
        paths=(CONFIG_NAME, f"{ADAPTER_FOLDER}/{CONFIG_NAME}"),
        is_part=_is_peft_file,
        writer=FormatWriter(_arrange_peft),
    ),
    FileFormat(
        "update",
        "updates written by rankscope",
        _open_updates,
        paths=(UPDATES_NAME,),
        matches=_match_updates,
    ),
    FileFormat(
        "kohya",
        "kohya or LyCORIS file",
        _open_kohya,
        tools=("kohya", "LyCORIS"),
        matches=_match_kohya,
        writer=FormatWriter(_arrange_kohya, "{}.safetensors"),
    ),
    FileFormat(
        "diffusers",
        "diffusers file",
        _open_diffusers,
        tools=("diffusers",),
        matches=_match_diffusers,
        writer=FormatWriter(_arrange_diffusers, "pytorch_lora_weights.safetensors"),
    ),
    FileFormat(
        "loralib",
        "loralib file",
        _open_loralib,
        tools=("loralib",),
        matches=_match_loralib,
    ),
    FileFormat(
        "mlx",
        "mlx-lm adapter",
        _open_mlx,
        tools=("mlx-lm",),
        paths=(MLX_WEIGHTS_NAME,),
        matches=_match_mlx,
    ),
    FileFormat(
        "torchtune",
        "torchtune adapter",
        _open_torchtune,
        tools=("torchtune",),
        matches=_match_torchtune,
    ),
    FileFormat(
        "xlabs",
        "XLabs FLUX file",
        _open_xlabs,
        tools=("XLabs",),
        matches=_match_xlabs,
    ),
)
CHECKPOINT = FileFormat("checkpoint", "full weights", _open_checkpoint)
"""The format of a file of tensors that no other format matches."""


def all_formats() -> tuple[FileFormat, ...]:
    """Every format, in the order in which they are tried."""
    return (*FORMATS, CHECKPOINT)


def format_of(tensors: OpenTensors) -> FileFormat:
    """The format of a file of tensors by its contents; full weights where no other matches."""
    return next((row for row in FORMATS if row.matches is not None and row.matches(tensors)), CHECKPOINT)


def format_title(kind: str) -> str:
    """What a source of this kind is called."""
    return next((row.title for row in all_formats() if row.kind == kind), kind)


def writers() -> dict[str, FormatWriter]:
    """The formats that can be written, by kind."""
    return {row.kind: row.writer for row in all_formats() if row.writer is not None}


def adapter_tools() -> list[str]:
    """Tools whose adapters are read, as help texts name them."""
    return [tool for row in all_formats() for tool in row.tools]
