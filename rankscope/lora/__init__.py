"""LoRA layers: attach to any module tree, merge, switch, detach, save and load in PEFT's layout."""

from rankscope.lora.bank import Bank
from rankscope.lora.loading import load
from rankscope.lora.spec import AdapterSpec

__all__ = ["AdapterSpec", "Bank", "load"]
