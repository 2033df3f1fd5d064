"""Host to device without waiting."""

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device. A GPU fetches it from page-locked memory while the host goes on: a copy of any other
    memory waits for the GPU.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.contiguous().pin_memory()).to(device, non_blocking=True)


class Download:
    """A device tensor on its way to the host. Asked for a step later, it has arrived, and nobody waits."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = tensor.cpu()

    def get(self) -> torch.Tensor:
        """On the CPU."""
        if self.event is not None:
            self.event.synchronize()
        return self.host
