"""SVDs of pre-trained weights, which every update of them needs, cached in a folder."""

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
    """Thin SVDs of weights in the working precision; with a folder, each is computed once and read afterwards.

    The name of an entry is the SHA-256 of the weight's numbers and shape; inside is the SHA-256 of the SVD. A damaged
    entry is computed and written again. The folder and its entries may be deleted at any time.

    Args:
        folder: where the entries lie, created with the first one; None caches nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def svd(self, weight: Tensor) -> SVD:
        """The thin SVD of a weight (out, in), on its device: read from the cache, or computed and written there.

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
        """Number of entries, and their bytes."""
        entries = list(self.folder.glob(f"*{SUFFIX}")) if self.folder else []
        return len(entries), sum(entry.stat().st_size for entry in entries)


def _decompose(matrix: Tensor) -> SVD:
    """The thin SVD in the memory layout of one from a file, so that products with it round alike."""
    return SVD(*(part.contiguous() for part in dense_svd(matrix)))


def digest(*tensors: Tensor) -> str:
    """SHA-256 of shapes, dtypes and numbers of tensors (any shape)."""
    sha = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        sha.update(f"{tuple(array.shape)} {array.dtype}".encode())
        sha.update(array.numpy().data)
    return sha.hexdigest()


def _read(path: Path, matrix: Tensor) -> SVD | None:
    """The SVD of an entry; None for one that is missing or damaged."""
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
