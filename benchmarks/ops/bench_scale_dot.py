"""Speed of scale_dot: every backend against plain PyTorch."""

from common import bench

test_scale_dot = bench("scale_dot")
