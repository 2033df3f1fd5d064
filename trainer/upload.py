"""Host to device without waiting."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from shards.batch import Batch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device. A GPU fetches it from page-locked memory while the host goes on: a copy of any other
    memory waits for the GPU.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.contiguous().pin_memory()).to(device, non_blocking=True)


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, the images of each on the device; those of the next one are on their way meanwhile, on a stream of
    their own. On a CPU just the batches.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    sent: tuple[Batch, Batch, torch.cuda.Event] | None = None  # with the host's own, until its copy has been made

    def arrived(batch: Batch, event: torch.cuda.Event) -> Batch:
        now = torch.cuda.current_stream(device)
        now.wait_event(event)
        batch.image.record_stream(now)  # or its memory could be given away while this stream still reads it
        return batch

    for batch in batches:
        with torch.cuda.stream(stream):
            moved = replace(batch, image=upload(batch.image, device))
            event = torch.cuda.Event()
            event.record(stream)
        before, sent = sent, (moved, batch, event)
        if before is not None:
            yield arrived(before[0], before[2])
    if sent is not None:
        yield arrived(sent[0], sent[2])


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
