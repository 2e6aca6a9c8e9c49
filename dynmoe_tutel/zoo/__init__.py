"""DynMoE's vision-language checkpoints (DynMoE-StableLM, -Phi-2, -Qwen) in transformers, without their repository.

Needs the extra [hf]. `load` and `save` read and write the checkpoints, `processor` makes their inputs from images and
text, `convert` makes such a model of one's own Llava.
"""

from .activity import TokenActivity, limit_k
from .loading import load
from .processing import SYSTEM, Processor, expand_image_tokens, processor
from .recipe import convert
from .saving import save

__all__ = [
    "SYSTEM",
    "Processor",
    "TokenActivity",
    "convert",
    "expand_image_tokens",
    "limit_k",
    "load",
    "processor",
    "save",
]
