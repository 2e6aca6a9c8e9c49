"""`load`: a checkpoint of DynMoE's as a model of transformers. It is read once, tensor by tensor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .configuration import read_config
from .conversions import GROUPED, KINDS, conversions
from .layout import Files, check_entries, check_values, common_dtype, expected_entries
from .model import ZooLlava, model_class

ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"  # read by transformers when it loads


def load(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: Any = None,
    image_tower: Any = None,
    *,
    experts: str = GROUPED,
    quantization_config: Any = None,
) -> ZooLlava:
    """The model of the checkpoint in `folder`, in eval mode: DynMoE-StableLM, -Phi-2 or -Qwen.

    Args:
        folder: with config.json and the weights, in one file or in shards, of safetensors or of torch (weights only).
        dtype: of the weights; default the file's. Masks stay fp32.
        device: where to place it: a device, or a `device_map` of transformers ("auto", or a dict); default the CPU.
        image_tower: the CLIP tower's configuration (a `CLIPVisionConfig`, a dict of its keys or a folder), where
            config.json names another tower than OpenAI's CLIP-L.
        experts: "grouped": stacked tensors, which the kernels take; "modules": nn.Linear maps, which quantizers reach.
        quantization_config: of transformers, with experts "modules".

    Raises ValueError that names the key of config.json or of the weights which is missing, extra, misshapen or not
    supported; ImportError where the extra [hf] is not installed.
    """
    folder = Path(folder)
    if experts not in KINDS:
        raise ValueError(f"experts = {experts!r}: allowed are {', '.join(map(repr, KINDS))}")
    if quantization_config is not None and experts == GROUPED:
        raise ValueError("quantization_config: quantizers replace nn.Linear maps: give experts='modules'")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype = {dtype!r}: give a floating-point torch.dtype, or None for the file's")
    family, config = read_config(folder, image_tower)
    cls = model_class(family, experts)
    entries, values = Files(folder).read()
    stored = common_dtype(entries)
    with torch.device("meta"), _default_dtype(stored):
        expected = expected_entries(conversions(family, experts), cls(config), config)
    check_entries(folder, entries, expected)
    check_values(values)
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    model: ZooLlava
    with _one_after_the_other():
        model, info = cls.from_pretrained(
            folder,
            config=config,
            dtype=stored if dtype is None else dtype,
            device_map=device,
            output_loading_info=True,
            **options,
        )
    _check_whole(info)
    other = {key: str(e.dtype).removeprefix("torch.") for key, e in entries.items() if e.dtype != expected[key].dtype}
    model.config.zoo_dtypes = other if dtype is None else {}
    # saved by save_pretrained in transformers' own names: what a Trainer writes it must also resume from
    model._weight_conversions = []
    return model.eval()


@contextlib.contextmanager
def _one_after_the_other() -> Iterator[None]:
    """Have transformers read a tensor when it is needed, not ahead in threads.

    Threads would hold all experts before the first of them are stacked.
    """
    before = os.environ.get(ASYNC)
    os.environ[ASYNC] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ASYNC]
        else:
            os.environ[ASYNC] = before


def _check_whole(info: Any) -> None:
    """ValueError where transformers left weights of the model unset, though the files have them all.

    Its quantizers take one map from a stacked one while they load: of Qwen's c_attn, q_proj alone.
    """
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"quantization_config: this quantizer leaves {missing[0]} and {len(missing) - 1} more unset, since the "
            "checkpoint has them in one tensor with others: keep these maps as they are (modules_to_not_convert or "
            "llm_int8_skip_modules = ['.*[qkv]_proj', 'lm_head']), or quantise the model once it is loaded"
        )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
