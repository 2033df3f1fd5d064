"""Figures that several processes measure, each a part of the rows, gathered on all of them."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator


class Table:
    """Figures of a split's images, or of its pairs, gathered from all processes: each row is written once, by one of
    them.

    Args:
        count: rows.
        widths: columns of each figure. A row may lack any of them.
    """

    def __init__(self, count: int, widths: Mapping[str, int]) -> None:
        self.names = tuple(widths)
        self.widths = {"count": 1} | {
            part: width for name, wide in widths.items() for part, width in ((name, wide), (f"has {name}", 1))
        }
        self.rows = torch.zeros(count, sum(self.widths.values()), dtype=torch.float64)

    def write(
        self,
        index: torch.Tensor,
        own: torch.Tensor,
        figures: Mapping[str, torch.Tensor],
        known: Mapping[str, torch.Tensor],
    ) -> None:
        """Figures [B,width] of rows int64 [B] on the CPU, as far as they are ``own``, bool [B], and whether each has
        them, bool [B] by name.
        """
        device = next(iter(figures.values())).device
        given = (
            {"count": torch.ones(len(index), 1)}
            | dict(figures)
            | {f"has {name}": has[:, None] for name, has in known.items()}
        )
        row = [
            given[name].to(device).float() if name in given else torch.zeros(len(index), width, device=device)
            for name, width in self.widths.items()
        ]
        self.rows[index[own]] += torch.cat(row, 1).cpu().double()[own]

    def gather(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Every figure of all rows, float64 [n,width], NaN where a row lacks it."""
        rows = accelerator.reduce(self.rows.to(accelerator.device), "sum").cpu()
        of = dict(zip(self.widths, rows.split(list(self.widths.values()), 1), strict=True))
        assert (of["count"] == 1).all(), "every row is measured exactly once"
        return {name: torch.where(of[f"has {name}"] > 0, of[name], torch.nan) for name in self.names}

    def nothing(self) -> dict[str, torch.Tensor]:
        """What `gather` gives where nothing was written: NaN."""
        return {name: torch.full((len(self.rows), self.widths[name]), torch.nan).double() for name in self.names}
