"""Speed of ghost_norm_sq: every backend against plain PyTorch."""

from common import bench

test_ghost_norm_sq = bench("ghost_norm_sq")
