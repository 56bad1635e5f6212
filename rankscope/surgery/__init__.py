"""Operations on adapters: resize, extract, merge, unmerge, convert, subtract, average."""

from __future__ import annotations
