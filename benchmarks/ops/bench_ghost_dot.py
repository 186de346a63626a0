"""Speed of ghost_dot: every backend against plain PyTorch."""

from common import bench

test_ghost_dot = bench("ghost_dot")
