"""Choose the floating-point precision that a network computes in."""

import torch

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def of(name: str | None, device: torch.device, method: str, training: bool = False) -> torch.dtype:
    """The precision of a name, or by default the fastest one with no visible effect on masks.

    Args:
        name: a key of `NAMES`; None chooses by device, method and purpose.
        device: that the network runs on.
        method: how frames are matched, a key of `videomatch.METHODS`.
        training: chooses float32 on a CUDA device, as gradients leave the range of float16
            unless the loss is scaled.
    """
    if name is not None:
        return NAMES[name]
    if device.type == "cuda":
        return torch.float32 if training else torch.float16
    # bfloat16 only where the CPU has instructions for it: emulating it is slower than float32.
    # Older versions of torch have no `get_capabilities` and get float32.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    native = device.type == "cpu" and (capabilities.get("avx512_bf16")
                                       or capabilities.get("amx_bf16"))
    return torch.bfloat16 if native and method == "memory" else torch.float32
