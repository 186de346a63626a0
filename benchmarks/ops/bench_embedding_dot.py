"""Speed of embedding_dot: every backend against plain PyTorch."""

from common import bench

test_embedding_dot = bench("embedding_dot")
