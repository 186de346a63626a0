"""Speed of ghost_gram: every backend against plain PyTorch."""

from common import bench

test_ghost_gram = bench("ghost_gram")
