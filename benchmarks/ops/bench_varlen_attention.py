"""Speed of varlen_attention, forward and backward: every backend against torch's attention row by row."""

from common import bench

test_varlen_attention = bench("varlen_attention")
