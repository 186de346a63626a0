"""Speed of linear_cross_entropy: every backend against plain PyTorch."""

from common import bench

test_linear_cross_entropy = bench("linear_cross_entropy")
