"""Speed of ghost_dot_lowrank: every backend against plain PyTorch."""

from common import bench

test_ghost_dot_lowrank = bench("ghost_dot_lowrank")
