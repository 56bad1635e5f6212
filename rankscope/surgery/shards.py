"""Writes a checkpoint again, shard by shard under the same names, with some of its tensors changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rankscope.errors import FormatError
from rankscope.formats.checkpoint import INDEX_SUFFIX, checkpoint_file
from rankscope.formats.file_io import TensorFile, read_json, write_json
from rankscope.formats.pickle_file import PickledFile, open_tensors
from rankscope.formats.quantized import QUANTIZATION_METADATA
from rankscope.formats.streaming import LazyTensor, write_streamed


class Shards:
    """The files of a checkpoint that ``Checkpoint`` has opened and checked.

    Attributes:
        index: the content of the index, if the checkpoint has one.
        name: the name that the one file, or the index without its suffix, is written under.
        files: each file of weights by the name that it is written under; pickles become safetensors.

    Raises:
        FormatError: two shards would be written under one name.
    """

    def __init__(self, path: Path) -> None:
        source = checkpoint_file(path)
        self.index: dict[str, Any] | None = None
        self.name = _safetensors_name(source.name.removesuffix(INDEX_SUFFIX))
        self.files: dict[str, TensorFile | PickledFile] = {}
        if source.name.endswith(INDEX_SUFFIX):
            self.index = read_json(source)
            for shard in sorted(set(self.index["weight_map"].values())):
                name = _safetensors_name(shard)
                if name in self.files:
                    raise FormatError(f"{source}: two of its shards would both be written as {name}; rename one")
                self.files[name] = open_tensors(source.parent / shard)
        else:
            self.files = {self.name: open_tensors(source)}

    def write(
        self,
        folder: Path,
        changed: Mapping[str, LazyTensor],
        added: Mapping[str, LazyTensor],
        tags: Mapping[str, str],
        removed: Collection[str] = (),
    ) -> None:
        """Write every file, one tensor in memory at a time.

        Args:
            folder: where the files are written.
            changed: tensors that replace the stored ones of the same names.
            added: new tensors, which are written to the last file.
            tags: metadata that is added to that of the files.
            removed: stored tensors that are left out.

        Raises:
            FormatError: a file cannot be read or written.
        """
        weight_map: dict[str, str] = {}
        total = 0
        for number, (name, file) in enumerate(self.files.items(), 1):
            tensors = {key: changed.get(key) or _lazy_tensor(file, key) for key in file.infos if key not in removed}
            if number == len(self.files):
                tensors |= added
            write_streamed(folder / name, tensors, {**_plain_metadata(file.metadata), **tags})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.size for tensor in tensors.values())
        if self.index is not None:
            known = self.index.get("metadata")
            metadata = {**(known if isinstance(known, dict) else {}), "total_size": total}
            index = {**self.index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / (self.name + INDEX_SUFFIX), index)


def _plain_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a file without that of its quantised weights, which are written as plain ones."""
    return {key: value for key, value in metadata.items() if key != QUANTIZATION_METADATA}


def _lazy_tensor(file: TensorFile | PickledFile, key: str) -> LazyTensor:
    return LazyTensor(file.infos[key], lambda: file.read(key))


def _safetensors_name(name: str) -> str:
    """The name under which transformers looks for a file of weights in safetensors."""
    path = Path(name)
    if path.suffix == ".safetensors":
        return str(path)
    return str(path.with_name(path.stem.replace("pytorch_model", "model") + ".safetensors"))
