"""python bench/table.py: one table of what the benchmarks measured, a row for each of theirs, the latest of each page.

Reads the tables of the pages that the benchmarks wrote, the last section of a page that is written on from run to run,
and writes bench/table.md. It measures nothing.
"""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGES = ("step", "peers", "loop", "reading", "lung_speed", "predict", "start", "compiled", "gpu")
GROWS = ("step", "lung_speed")  # by a section of each run, of which the last ones of a day count


def rows(text: str) -> list[tuple[str, str, str]]:
    """Section, first cell and the others, each with its heading, of every row of every table."""
    section, head, found = "", [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not head:
                head = cells
            elif not set("".join(cells)) <= set("-: "):
                told = [
                    f"{name}: {cell}" if name else cell for name, cell in zip(head[1:], cells[1:], strict=False) if cell
                ]
                found.append((section, f"{head[0]}: {cells[0]}".strip(": "), "; ".join(told)))
        else:
            head = []
    return found


def main() -> None:
    """Read and write."""
    lines = ["# What was measured", "", "Written by `bench/table.py` from the pages beside it, which say how.", ""]
    lines += ["| page | of | row | figures |", "|---|---|---|---|"]
    for page in PAGES:
        path = HERE / f"{page}.md"
        if not path.is_file():
            lines.append(f"| {page} | | not measured here | |")
            continue
        text = path.read_text()
        if page in GROWS:
            sections = re.split(r"(?m)^(?=## )", text)
            day = sections[-1][3:13]
            text = "".join(section for section in sections if section[3:13] == day)
        lines += [f"| [{page}]({page}.md) | {of} | {row} | {cells} |" for of, row, cells in rows(text)]
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
