"""In which precision a network computes: what fits the device best unless told otherwise."""

import torch

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def of(name: str | None, device: torch.device, method: str, training: bool = False) -> torch.dtype:
    """A precision by its name, or the fastest that changes masks next to nothing.

    Args:
        name: a key of `NAMES`, or None to choose.
        method: how frames are matched, a key of `videomatch.METHODS`.
    """
    if name is not None:
        return NAMES[name]
    if device.type == "cuda":
        return torch.float32 if training else torch.float16
    # asked, since a CPU that has it not imitates it slowly; an older torch can't tell
    able = getattr(torch.cpu, "get_capabilities", dict)()
    native = device.type == "cpu" and (able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.bfloat16 if native and method == "memory" else torch.float32
