"""python -m trainer.regions show | learn: the rules drawn on a radiograph; a rule from one annotated radiograph."""

from shards.errors import run
from trainer.regions.learn import main

if __name__ == "__main__":
    run(main)
