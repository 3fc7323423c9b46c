"""`python -m benchmarks tune`, interpreted: the fastest configuration stays in place."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tuning
from cot2align.kernels import triton_sinkhorn, triton_streamed


@pytest.mark.skipif(not triton_sinkhorn.INTERPRETED, reason="set TRITON_INTERPRET=1")
def test_the_table_names_what_was_fastest(monkeypatch):
    tried = []

    def fastest(candidates, use, run, device, repeats, what):
        use(candidate := list(candidates)[-1])
        tried.append(what)
        return candidate, 1.0

    for module, name in ((triton_sinkhorn, "SIMILARITY"), (triton_sinkhorn, "PRODUCTS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    monkeypatch.setattr(triton_sinkhorn, "TILES", triton_sinkhorn.TILES)
    monkeypatch.setattr(triton_streamed, "TILES", dict(triton_streamed.TILES))
    monkeypatch.setattr(tuning, "fastest", fastest)
    block = triton_sinkhorn.Block(64, 64, 16, 4, 2)
    text = tuning.table(1, device="cpu", blocks=[block], size=130)
    assert f"SIMILARITY[torch.float16] = {block}  # 1.000 ms" in text
    assert triton_sinkhorn.SIMILARITY[torch.float32] == block
    assert triton_sinkhorn.TILES[0].warps == 16
    loss, iterations, *_ = tuning.problems(2, 9, 12, 16, torch.float32, "cpu")(3)
    assert iterations.tolist() == [3, 3]
    assert (loss > 0).all()
    assert len(tried) == 6 + len(triton_sinkhorn.TILES) + sum(
        c <= 1040 for c in triton_streamed.TILES
    )


def test_a_configuration_that_does_not_compile_is_left_out(capsys):
    used = []

    def run():
        if used[-1] == 2:
            raise RuntimeError("out of resources")

    best, ms = tuning.fastest([2, 1], used.append, run, "cpu", 3, "tiles")
    assert best == 1
    assert ms < 1e3
    assert used == [2, 1, 1]
    assert "tiles: 2: out of resources" in capsys.readouterr().out
