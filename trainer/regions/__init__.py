"""Where a finding is expected, or was drawn, in an image."""

from shards.sample import TASKS
from trainer.regions.place import PUBLISHED, Expected, Regions, between, finding_regions, has_region, wider
from trainer.rules import Rule, task_findings, without_rule

__all__ = [
    "PUBLISHED",
    "TASKS",
    "Expected",
    "Regions",
    "Rule",
    "between",
    "finding_regions",
    "has_region",
    "task_findings",
    "wider",
    "without_rule",
]
