"""Facts about the device a tensor is on, read at the first launch and kept."""

import torch

# Under the interpreter there is no device; tiles are then chosen as for this one.
_INTERPRETED_ARCH = 90
_INTERPRETED_SMS = 4


_facts: dict[int, tuple[int, int]] = {}  # torch.compile cannot see into lru_cache


def _cuda_facts(index: int) -> tuple[int, int]:
    if index not in _facts:
        properties = torch.cuda.get_device_properties(index)
        arch = 10 * properties.major + properties.minor
        _facts[index] = (arch, properties.multi_processor_count)
    return _facts[index]


def device_arch(device: torch.device) -> int:
    """Compute capability as a number: 80, 89, 90, ..."""
    return _cuda_facts(device.index or 0)[0] if device.type == "cuda" else _INTERPRETED_ARCH


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors."""
    return _cuda_facts(device.index or 0)[1] if device.type == "cuda" else _INTERPRETED_SMS


def input_precision(dtype: torch.dtype) -> str:
    """How fp32 products are made: IEEE, or TF32 if torch's own switch allows it."""
    # Not allow_tf32, which raises once anybody has set this newer form of the switch.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and dtype == torch.float32 else "ieee"
