"""Files that are damaged or lie: one clear error of ours each, never another exception."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from adapters import linear, normal, write_adapter, write_checkpoint
from damage import mutated
from safetensors import safe_open

from rankscope.errors import FormatError, RankscopeError
from rankscope.formats import store as formats

CASES = 400


def container(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by hand; ``length`` lies about the header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


KEY = "base_model.model.q.lora_A.weight"
BROKEN = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "garbage": bytes(range(256)) * 8,
    "text": b"this is not a tensor file at all, but it is long enough to look like one",
    "header longer than the file": container({KEY: entry([1], 0, 4)}, b"\0" * 4, length=10**6),
    "absurd header length": container({}, length=2**63),
    "header is no JSON": container(b"{{{{"),
    "header is no UTF-8": container(b'{"\xff": 1}'),
    "header is a list": container([1, 2]),
    "header nests too deep": container(b'{"a":' * 50_000),
    "offsets beyond the file": container({KEY: entry([4], 0, 16)}, b"\0" * 8),
    "offsets backwards": container({KEY: entry([1], 8, 4)}, b"\0" * 8),
    "negative offsets": container({KEY: entry([1], -4, 0)}, b"\0" * 8),
    "shape larger than its bytes": container({KEY: entry([1000, 1000], 0, 4)}, b"\0" * 4),
    "shape that overflows": container({KEY: entry([2**40, 2**40], 0, 4)}, b"\0" * 4),
    "negative shape": container({KEY: entry([-1, 4], 0, 4)}, b"\0" * 4),
    "overlapping tensors": container({KEY: entry([1], 0, 4), "x": entry([1], 0, 4)}, b"\0" * 4),
    "a hole": container({KEY: entry([1], 4, 8)}, b"\0" * 8),
    "unknown type": container({KEY: entry([1], 0, 4, "F33")}, b"\0" * 4),
    "bytes after the last tensor": container({KEY: entry([1], 0, 4)}, b"\0" * 400),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_broken_files_as_adapter_as_checkpoint_and_as_base(tmp_path, content):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors: "):
        formats.open(folder)
    good = write_checkpoint(tmp_path / "good.safetensors", {"q.weight": normal(3, 3)})
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    for path, base in ((bad, good), (good, bad)):
        with pytest.raises(FormatError, match=r"bad\.safetensors: "):
            formats.open(path, base=base)


def test_truncation_anywhere(tmp_path):
    folder = write_adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"adapter_model\.safetensors: "):
            formats.open(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_directory_where_a_file_is_expected(tmp_path, name):
    folder = write_adapter(tmp_path / "a")
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(FormatError, match=name):
        formats.open(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_link_to_nowhere_or_to_itself(tmp_path, name):
    folder = write_adapter(tmp_path / "a")
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    with pytest.raises(RankscopeError):
        formats.open(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(RankscopeError):
        formats.open(folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "."])
def test_no_permission(tmp_path, name):
    folder = write_adapter(tmp_path / "a")
    (folder / name).chmod(0)
    with pytest.raises(FormatError, match="cannot be read"):
        formats.open(folder)
    (folder / name).chmod(0o700)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_permission_denied_by_the_system(tmp_path, name, monkeypatch):
    """The same for a superuser's test run: the calls that open files answer as the system would."""
    folder = write_adapter(tmp_path / "a")

    def deny(original):
        def call(path, *args, **kwargs):
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *args, **kwargs)

        return call

    monkeypatch.setattr("rankscope.formats.file_io.safe_open", deny(safe_open))
    monkeypatch.setattr(Path, "read_text", deny(Path.read_text))
    with pytest.raises(FormatError, match=rf"{name}: cannot be read \(Permission denied\)"):
        formats.open(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"])
def test_fuzzed_adapters_give_our_error_or_an_answer(tmp_path, name):
    tensors = {**linear("h.2.q"), **linear("h.10.q", seed=1)}
    tensors["base_model.model.h.2.q.lora_magnitude_vector"] = torch.ones(5)
    patterns = {"rank_pattern": {"h.2.q": 2}, "alpha_pattern": {"(h|g).10.q": 4}}
    folder = write_adapter(tmp_path / "a", tensors, use_dora=True, use_rslora=True, **patterns)
    origin = {f"h.{i}.q.weight": normal(5, 7, seed=i) for i in (2, 10)}
    base = write_checkpoint(tmp_path / "base.safetensors", origin)
    if name.endswith(".bin"):
        (folder / "adapter_model.safetensors").unlink()
        torch.save(tensors, folder / name)
    content = (folder / name).read_bytes()
    rng, outcomes = random.Random(name), {"refused": 0, "read": 0}
    for case in range(CASES):
        damaged = tmp_path / f"case-{case}"  # a new file each: the old one is still mapped
        shutil.copytree(folder, damaged)
        (damaged / name).write_bytes(mutated(content, rng))
        outcomes["refused" if refusal(damaged, base) else "read"] += 1
        shutil.rmtree(damaged)
    assert min(outcomes.values()) > CASES // 50, outcomes  # both ends of the contract were exercised


def refusal(folder: Path, base: Path) -> str | None:
    """The one sentence that refuses a store, None where all of it could be read; nothing else may be raised."""
    message = read_all(folder, base)
    if message is not None:
        assert "\n" not in message
        assert str(folder) in message or str(base) in message
    return message


def read_all(folder: Path, base: Path) -> str | None:
    try:
        store = formats.open(folder, base=base)
        store._repr_html_()
        for name in store:
            assert store[name].shape == store.info(name).shape
    except RankscopeError as error:
        return str(error)
    return None


def test_fuzzed_checkpoints(tmp_path):
    content = write_checkpoint(tmp_path / "t.safetensors", {"a.weight": normal(4, 3), "b.weight": normal(3)})
    base = write_checkpoint(tmp_path / "b.safetensors", {"a.weight": normal(4, 3), "b.weight": normal(3)})
    rng, whole = random.Random(1), content.read_bytes()
    for case in range(CASES):
        folder = tmp_path / f"case-{case}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(mutated(whole, rng))
        refusal(folder, base)
        shutil.rmtree(folder)


def test_names_that_would_steer_a_terminal_are_escaped(tmp_path):
    folder = write_adapter(tmp_path / "a", {"base_model.model.a\x1b[31m.lora_A.weight": normal(2, 3)})
    with pytest.raises(FormatError, match=r"layer a\\x1b\[31m: half of the pair"):
        formats.open(folder)
    assert str(RankscopeError("two\nlines")) == r"two\nlines"
