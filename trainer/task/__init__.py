"""What a label is to training and to figures. One object knows it; nobody else asks which kind of task there is."""

from trainer.task.any_of import AnyOf
from trainer.task.one_of import OneOf
from trainer.task.protocol import Drawn, Groups, Pairs, Point, Scored, Task

__all__ = ["AnyOf", "Drawn", "Groups", "OneOf", "Pairs", "Point", "Scored", "Task"]
