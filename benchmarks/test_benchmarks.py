"""`pytest benchmarks`: the main cases under pytest-benchmark, forward + backward of every way.

pytest benchmarks -k '64x128x128 and product' --benchmark-json=mine.json
"""

import pytest

from benchmarks.cases import CASES
from benchmarks.measure import forward_backward
from benchmarks.ways import WAYS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [c.name for c in CASES.values() if c.group == "main"])
def test_forward_backward(benchmark, name, way):
    case = CASES[name]
    if why := WAYS[way].cannot(case, "cpu"):
        pytest.skip(why)
    tensors = case.make()
    benchmark.group = case.name
    benchmark.pedantic(
        forward_backward, (WAYS[way], case, tensors), rounds=5, warmup_rounds=1, iterations=1
    )
