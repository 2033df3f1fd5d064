"""What all pictures have in common: the colours of outlines, and names that are names, with two dollars, too."""

import matplotlib

LUNGS = "#00e5ff"
REGION = "#7CFC00"
LESION = "#ff4040"

matplotlib.rcParams["text.parse_math"] = False  # or a name with two dollars would be a formula


def short(name: str) -> str:
    """A name for a picture, where a long one would leave no room for the rest."""
    return name if len(name) <= 28 else f"{name[:27]}\u2026"
