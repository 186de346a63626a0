"""Speed of ghost_project: every backend against plain PyTorch."""

from common import bench

test_ghost_project = bench("ghost_project")
