"""Base models that transformers loads, from a folder or the hub: tokenizer, weights in float32, identity.

The only module that calls transformers; it is imported when such a model is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankscope.errors import ConfigError
from rankscope.train.config import make_generator
from rankscope.train.task import file_hash

HUB_MODEL_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
NO_LENGTH_LIMIT = 2**31 - 1  # tokenizers without a limit say 1e30, which their own truncation cannot take
PEFT_HEADS = ("classifier", "score")  # what PEFT adds to modules_to_save for the task SEQ_CLS


class PretrainedModel:
    """A model folder (never touches the network) or a hub id.

    Raises:
        ConfigError: transformers is not installed; there is no such model, or it is an adapter, damaged,
            of an unknown architecture, or without a tokenizer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.local = Path(name).is_dir()
        self.transformers = import_transformers()
        if not self.local and (Path(name).exists() or not HUB_MODEL_ID.fullmatch(name)):
            raise ConfigError(f"model {name!r}: neither a folder nor an id of the hub")
        if self.local and (Path(name) / "adapter_config.json").exists():
            raise ConfigError(f"model {name!r}: an adapter, not a whole model; merge it into its base first")
        self.tokenizer = self._load("AutoTokenizer")
        if set(self.tokenizer.get_vocab()) <= set(self.tokenizer.all_special_tokens):
            # transformers 5 makes a tokenizer of special tokens only where a folder has none.
            raise ConfigError(f"model {name!r}: it has no tokenizer; save one beside the weights")

    def _load(self, auto: str, **settings: Any) -> Any:
        """``auto``.from_pretrained: no chatter, no code from the model's folder, global randomness untouched."""
        with silence_transformers(self.transformers), torch.random.fork_rng(devices=[]):
            try:
                return getattr(self.transformers, auto).from_pretrained(
                    self.name, local_files_only=self.local, trust_remote_code=False, **settings
                )
            except Exception as error:  # a bad folder makes transformers raise nearly every class there is
                problem = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split()).rstrip(".")
                raise ConfigError(f"model {self.name!r}: transformers' {auto} cannot load it ({problem})") from error

    def model(self, auto: str, **settings: Any) -> tuple[Any, list[str]]:
        """The model in float32 on the CPU, and the names of the parameters that its files do not hold.

        Those have random values. Weights of another shape (a head for other labels) count as missing.
        """
        model, info = self._load(
            auto,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **{dtype_keyword(self.transformers.__version__): torch.float32},
            **settings,
        )
        missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        model.config.use_cache = False  # a cache of keys and values is for generation
        return model, [name for name, _ in model.named_parameters() if name in missing]

    def label_order(self, labels: list[str]) -> list[str]:
        """These labels in the order of the head in the files, if it is a head for the same labels."""
        stored = [str(label) for _, label in sorted(self._load("AutoConfig").id2label.items())]
        return stored if sorted(stored) == sorted(labels) else labels

    def encode(self, texts: list[str], **settings: Any) -> list[list[int]]:
        """Token ids of each text."""
        with silence_transformers(self.transformers):
            ids: list[list[int]] = self.tokenizer(texts, return_attention_mask=False, **settings)["input_ids"]
            return ids

    def fingerprint(self) -> dict[str, str]:
        """The base's name, without the way to it, and the sha256 of its weight files."""
        if self.local:
            folder = Path(self.name).resolve()
        else:
            path = self.transformers.utils.cached_file(self.name, "config.json", local_files_only=True)
            folder = Path(path).parent
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        hashes = [file_hash(file) for file in files]
        whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        return {"base": folder.name if self.local else self.name, "base_sha256": whole}


def import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f'a model needs transformers ({error}); pip install "rankscope[hf]"') from error


def dtype_keyword(version: str) -> str:
    """What from_pretrained calls the dtype: transformers 4.56 renamed it."""
    major, minor = version.split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (4, 56) else "torch_dtype"


@contextmanager
def silence_transformers(transformers: Any) -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the terminal; afterwards all is as before."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def length_limit(model: Any, tokenizer: Any) -> int:
    """The most tokens that the model has positions for and the tokenizer was made for."""
    limits = [NO_LENGTH_LIMIT, tokenizer.model_max_length]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and positions > 0:
        limits.append(positions - position_offset(model))
    return int(min(limits))


def position_offset(model: nn.Module) -> int:
    """Positions that are never used: RoBERTa and its kin count from the padding index + 1."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def head_modules(model: Any, missing: list[str], where: str) -> tuple[str, ...]:
    """Modules to train in full: those that the checkpoint lacks, and the head that PEFT always trains.

    Raises:
        ConfigError: what the checkpoint lacks belongs to the base itself.
    """
    heads = {largest_missing_module(model, name, set(missing)) for name in missing}
    for head in heads:
        outside = not head.startswith(f"{model.base_model_prefix}.") and head != model.base_model_prefix
        if not outside and not head.endswith(".pooler"):
            raise ConfigError(
                f"model {where!r}: its files lack the weights of {head}; are they damaged or of another model?"
            )
    heads |= {name for name in PEFT_HEADS if isinstance(getattr(model, name, None), nn.Module)}
    inside = {head for head in heads if any(head.startswith(f"{other}.") for other in heads)}
    return tuple(name for name, _ in model.named_modules() if name in heads - inside)


def largest_missing_module(model: nn.Module, parameter: str, missing: set[str]) -> str:
    """The largest module around a missing parameter that has nothing but missing ones."""
    names = [name for name, _ in model.named_parameters()]
    parts = parameter.split(".")
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        if all(name in missing for name in names if name.startswith(f"{module}.")):
            return module
    return parameter


@torch.no_grad()
def initialise_parameters(model: Any, names: list[str], seed: int) -> None:
    """Draw new parameters as transformers would, but from a stream of their own per seed and name.

    Matrices are normal with the model's ``initializer_range``, biases zero, scales of norms one.
    """
    deviation = getattr(model.config, "initializer_range", None) or 0.02
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.ndim > 1:
            parameter.normal_(0.0, deviation, generator=make_generator(seed, "head", name))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def draws_random_numbers(model: Any) -> bool:
    """Whether the model draws random numbers in training: dropout, layers left out, noise on a router.

    Found by a module of that name with a probability above 0, or by such a number in the configuration.
    """
    modules = ((type(m).__name__, getattr(m, "p", getattr(m, "drop_prob", 0))) for m in model.modules())
    numbers = (*modules, *config_entries(model.config.to_dict()))
    return any(
        isinstance(number, int | float) and number > 0 and ("drop" in name.lower() or "jitter" in name)
        for name, number in numbers
    )


def config_entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each entry of a configuration and of those inside it."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from config_entries(value)
        elif not isinstance(value, bool):
            yield name, value


def padding_id(base: PretrainedModel) -> int:
    """The token to pad with; many decoders have none of their own and take the end of text."""
    tokenizer = base.tokenizer
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if token is None:
        raise ConfigError(f"model {base.name!r}: its tokenizer has neither a padding nor an end-of-text token; set one")
    return int(token)


def vocabulary_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def check_tokens(rows: list[list[int]], model: Any, where: str) -> None:
    """Every text has tokens, and the model knows them all."""
    for number, row in enumerate(rows, 1):
        if not row:
            raise ConfigError(f"model {where!r}: its tokenizer makes nothing of text {number}; leave out that row")
    largest = max(max(row) for row in rows)
    if largest >= vocabulary_size(model):
        raise ConfigError(
            f"model {where!r}: its tokenizer gives token {largest}, but it has {vocabulary_size(model)} embeddings"
        )


@torch.no_grad()
def check_causal(model: Any, tokens: Tensor, where: str) -> None:
    """Refuse a model that sees the token it has to predict, tried on ``tokens`` (length,)."""
    pair = tokens[:8].long().repeat(2, 1)
    pair[1, -1] = (pair[1, -1] + 1) % vocabulary_size(model)
    before, after = model.eval()(input_ids=pair).logits[:, 0].float()
    if not torch.allclose(before, after, rtol=0, atol=1e-5 * float(before.abs().max())):
        raise ConfigError(f"model {where!r}: it looks ahead (an encoder?), so it cannot predict the next token")
