"""Keys and values take memory from the system, and give it back whole."""

import random

import psutil
import pytest
import torch

from basestation.kv_arena import STEP, Arena, Stretch, StretchShape, Workspace
from basestation.memory import Shortage, named_shortage

SHAPE = StretchShape(8, 2, 64, torch.float32, torch.device("cpu"))
MEBIBYTE = 2**20


def new_stretch(arena: Arena, steps: int) -> Stretch:
    stretch = Stretch(arena)
    stretch.reserve(steps * STEP)
    filling = torch.ones(SHAPE.kv_heads, steps * STEP, SHAPE.head_size)
    for layer in range(SHAPE.layers):
        stretch.store(layer, filling, filling, Workspace(0))
    return stretch


def test_stretches_that_came_and_went_leave_no_holes() -> None:
    chance, arena = random.Random(0), Arena(SHAPE, 10**9)  # noqa: S311 - any order will do
    process, stretches = psutil.Process(), list[Stretch]()
    before = process.memory_info().rss
    for _ in range(2000):
        stretches.append(new_stretch(arena, chance.randint(1, 8)))
        if len(stretches) > 40:
            stretches.pop(chance.randrange(40)).release()
    held = sum(one.capacity for one in stretches) * SHAPE.position_bytes
    assert held > 100 * MEBIBYTE
    assert process.memory_info().rss - before < held + 20 * MEBIBYTE


def test_more_than_the_system_has_is_a_shortage() -> None:
    with pytest.raises(Shortage, match="memory"), named_shortage():
        Stretch(Arena(SHAPE, 2**60)).reserve(2**45)


def test_another_failure_of_the_system_is_not_taken_for_one() -> None:
    with pytest.raises(FileNotFoundError), named_shortage():
        raise FileNotFoundError(2, "no such file")
