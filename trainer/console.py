"""The console commands: each runs its module as ``python -m`` does. ``cxr-focus accelerate-config`` prints the path of
the launcher's configuration, for ``accelerate launch --config_file "$(cxr-focus accelerate-config)"``.
"""

import runpy
import sys
import sysconfig
from pathlib import Path

MODULES = {
    "cxr-shards": "shards",
    "cxr-train": "trainer.train",
    "cxr-train-lungs": "trainer.train_lungs",
    "cxr-evaluate": "trainer.evaluate",
    "cxr-predict": "trainer.predict",
    "cxr-report": "trainer.report",
    "cxr-regions": "trainer.regions",
    "cxr-lungs": "trainer.lungs",
    "cxr-export": "trainer.export",
    "cxr-sweep": "trainer.sweep",
}
CONFIG = "accelerate_config.yaml"


def main() -> None:
    """Run the module of the command that this was called as."""
    name = Path(sys.argv[0]).stem
    if name in MODULES:
        runpy.run_module(MODULES[name], run_name="__main__", alter_sys=True)
        return
    if sys.argv[1:] == ["accelerate-config"]:
        print(accelerate_config())
        return
    print(f"usage: cxr-focus accelerate-config\nor one of {', '.join(MODULES)} --help", file=sys.stderr)
    sys.exit(2)


def accelerate_config() -> Path:
    """Of the checkout, or as it was installed."""
    here = Path(__file__).parents[1] / CONFIG
    return here if here.is_file() else Path(sysconfig.get_path("data")) / "share" / "cxr-focus" / CONFIG


if __name__ == "__main__":
    main()
