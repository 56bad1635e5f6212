"""Decompositions of pre-trained weights, which every update of them needs: kept on disk where a folder is given."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.file_io import TensorFile, read_tensors, write_tensors
from rankscope.linalg import SVD, dense_svd, working_dtype

VERSION = "rankscope.svd/1"
SUFFIX = ".svd.safetensors"


class SVDCache:
    """Thin SVDs of weights in the working precision; with a folder, each is computed once and read after that.

    An entry is named by the SHA-256 of the weight's numbers and shape, and holds that of its own. One that is damaged
    is computed and written again. The folder may be deleted, or entries of it, at any time.

    Args:
        folder: of the entries; made when the first is written. None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def svd(self, weight: Tensor) -> SVD:
        """The thin SVD of a weight (out, in), on its device: read if it is there, else computed and written.

        Raises:
            FormatError: an entry cannot be written.
        """
        matrix = weight.to(working_dtype(weight.device))
        if self.folder is None:
            return _decompose(matrix)
        path = self.folder / f"{digest(matrix)}{SUFFIX}"
        decomposition = _read(path, matrix)
        if decomposition is None:
            decomposition = _decompose(matrix)
            tensors = decomposition._asdict()
            write_tensors(path, tensors, {"rankscope": VERSION, "sha256": digest(*tensors.values())})
        return SVD(*(part.to(matrix.device) for part in decomposition))

    @property
    def disk_usage(self) -> tuple[int, int]:
        """How many entries the folder holds, and their bytes."""
        entries = list(self.folder.glob(f"*{SUFFIX}")) if self.folder else []
        return len(entries), sum(entry.stat().st_size for entry in entries)


def _decompose(matrix: Tensor) -> SVD:
    """In the layout of what is read from a file: products then round alike."""
    return SVD(*(part.contiguous() for part in dense_svd(matrix)))


def digest(*tensors: Tensor) -> str:
    """SHA-256 of shapes, dtypes and numbers of tensors (any shape)."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        held = tensor.detach().cpu().contiguous()
        hashed.update(f"{tuple(held.shape)} {held.dtype}".encode())
        hashed.update(held.numpy().data)
    return hashed.hexdigest()


def _read(path: Path, matrix: Tensor) -> SVD | None:
    """An entry that is whole; None for one that is missing or damaged."""
    try:
        file = TensorFile(path)
        if file.metadata.get("rankscope") != VERSION or file.infos.keys() != set(SVD._fields):
            return None
        tensors = read_tensors(path)
    except FormatError:
        return None
    entry = SVD(tensors["U"], tensors["s"], tensors["Vt"])
    fits = entry.U.shape[:1] == matrix.shape[:1] and entry.Vt.shape[1:] == matrix.shape[1:]
    return entry if fits and digest(*entry) == file.metadata.get("sha256") else None
