"""Acting on adapters: resize, extract, merge, unmerge, subtract, average."""

from __future__ import annotations
