"""Shared by all tests: two cores are not to be fought over by small problems."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
