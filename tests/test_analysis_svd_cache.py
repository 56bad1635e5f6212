"""Decompositions kept on disk: the same numbers, computed once, and never a damaged one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from makers import normal
from torch import Tensor

from rankscope.analysis import svd_cache as module
from rankscope.analysis.svd_cache import SVDCache
from rankscope.errors import FormatError
from rankscope.formats.file_io import read_tensors, write_tensors
from rankscope.linalg import SVD, dense_svd


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []

    def watched(matrix: Tensor) -> SVD:
        seen.append(tuple(matrix.shape))
        return dense_svd(matrix)

    monkeypatch.setattr(module, "dense_svd", watched)
    return seen


def same(a: SVD, b: SVD) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_computed_once_and_read_after_that(tmp_path: Path, computed: list[tuple[int, ...]]) -> None:
    kept, weights = SVDCache(tmp_path / "kept"), [normal(12, 7), normal(7, 12), normal(12, 7, seed=1).float()]
    first = [kept.svd(weight) for weight in weights]
    again = [SVDCache(tmp_path / "kept").svd(weight) for weight in weights]
    assert computed == [(12, 7), (7, 12), (12, 7)]
    for one, two, weight in zip(first, again, weights, strict=True):
        assert same(one, two)
        assert same(one, dense_svd(weight.double()))
    count, size = kept.disk_usage
    assert (count, size) == (3, sum(file.stat().st_size for file in (tmp_path / "kept").iterdir()))
    assert size > 0


def test_the_content_decides_not_the_layout_or_the_dtype(tmp_path: Path, computed: list[tuple[int, ...]]) -> None:
    kept, weight = SVDCache(tmp_path), normal(6, 6).float()
    for same_numbers in (weight, weight.double(), weight.T.contiguous().T):
        kept.svd(same_numbers)
    assert len(computed) == 1
    kept.svd(weight.T)
    changed = weight.clone()
    changed[5, 5] += 1e-6
    kept.svd(changed)
    kept.svd(weight.reshape(4, 9))
    assert len(computed) == 4


def test_nothing_is_kept_without_a_folder(computed: list[tuple[int, ...]]) -> None:
    kept = SVDCache()
    kept.svd(normal(5, 4))
    kept.svd(normal(5, 4))
    assert len(computed) == 2
    assert kept.disk_usage == (0, 0)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other tensors", "another weight", "folder gone"])
def test_a_damaged_entry_is_written_again(tmp_path: Path, damage: str, computed: list[tuple[int, ...]]) -> None:
    folder = tmp_path / "kept"
    kept, weight = SVDCache(folder), normal(9, 5)
    right = kept.svd(weight)
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(whole[:-8])
    elif damage == "bit":
        entry.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    elif damage == "empty":
        entry.write_bytes(b"")
    elif damage == "other tensors":
        write_tensors(entry, {"U": torch.ones(2)}, {"rankscope": module.VERSION})
    elif damage == "another weight":
        tensors = read_tensors(entry)
        tensors["U"] = tensors["U"][:4].clone()
        sha = module.digest(tensors["U"], tensors["s"], tensors["Vt"])
        write_tensors(entry, tensors, {"rankscope": module.VERSION, "sha256": sha})
    else:
        entry.unlink()
        folder.rmdir()
    assert same(kept.svd(weight), right)
    assert len(computed) == 2
    assert same(kept.svd(weight), right)
    assert len(computed) == 2
    assert [file.name for file in folder.iterdir()] == [entry.name]


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="cannot be written"):
        SVDCache(tmp_path / "file").svd(normal(4, 3))
