"""The benchmark suite: what it refuses and writes, and that the README shows what was measured."""

import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import check, measure, report, step, token_maps
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Case
from benchmarks.ways import WAYS, Way
from cot2align import fused_ot_loss
from cot2align.train.new_model import byte_level_bpe

ROOT = Path(__file__).parents[1]
SMALL = Case("small", "main", 3, 9, 12, width=8, teacher_width=6, num_iters=5)
PLAIN = Case("small-plain", "main", 2, 9, 12, width=8, teacher_width=None, num_iters=5)
RAGGED = Case("small-ragged", "main", 3, 30, 40, 8, 6, num_iters=5, ragged=True)
DETACHED = Way(
    lambda case, tensors: fused_ot_loss(**tensors, epsilon=0.1, num_iters=5, grad="detached"),
    "wrong",
)
reads_peaks = pytest.mark.skipif(not measure.PROC.exists(), reason="reads the peak from /proc")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(CASES, "small", SMALL)
    monkeypatch.setitem(CASES, "small-plain", PLAIN)
    monkeypatch.setitem(CASES, "small-ragged", RAGGED)
    for name in ("compile", "pot", "geomloss"):
        monkeypatch.delitem(WAYS, name)


def test_every_way_agrees_with_float64(small, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "small.csv"
    arguments = ["run", "small", "small-plain", "small-ragged", "--no-memory", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--out", str(out)])
    assert main() == 0
    rows = report.read(out)
    assert {row["way"] for row in rows} == {"product", "naive", "bmm", "authors"}
    for row in rows:
        assert row["right"] == "True"
        assert float(row["gradient_error"]) < 1e-5
        assert 0 < float(row["both_ms_p20"]) <= float(row["both_ms_p80"])
    assert "product is" in capsys.readouterr().out
    assert "| 3 x 9x12, K 5 |" in report.table(out)
    assert [path.name for path in report.plots([out], tmp_path)] == ["main.png"]


def test_a_wrong_gradient_gets_no_speed(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(WAYS, "product", DETACHED)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", "small", "--no-memory", "--repeats=1"])
    assert main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "wrong here" in line]
    assert not [line for line in lines if re.search(r"naive.*\d x faster", line)]


def test_no_speed_is_reported_against_another_gradient(small, monkeypatch, tmp_path):
    out = tmp_path / "small.csv"
    arguments = ["run", "small", "--no-memory", "--repeats=1", "--ways", "product", "naive"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--out", str(out)])
    monkeypatch.setitem(WAYS, "naive", DETACHED)
    assert main() == 0
    assert "| other gradient |" in report.table(out)
    assert not re.search(r"\d x \|", report.table(out))


def test_float64_truth_is_the_mean_over_problems():
    tensors = RAGGED.make()
    loss, dx, dp = measure.exact(RAGGED, tensors)
    got = measure.forward_backward(WAYS["naive"], RAGGED, tensors)
    assert max(measure.errors(got, (loss, dx, dp))) < 1e-5


@reads_peaks
@pytest.mark.parametrize("case", ["8x256x256", "4x512x512-unprojected", "ragged"])
def test_peak_memory_stays_with_the_formula(case):
    of, threads = CASES[case], torch.get_num_threads()
    formula = measure.predicted_mib(of, of.make(), threads)
    # Two MiB for what the first call did not load yet: the resident set counts libraries too.
    assert measure.peak_mib(case, "product", "cpu") < 1.05 * formula + 2


@reads_peaks
def test_peak_memory_is_that_of_the_way():
    # The naive tape holds an N x M matrix or two for each of the iterations; the product does not.
    case = "8x256x256"
    matrices = 8 * 256 * 256 * 4 / 2**20
    assert measure.peak_mib(case, "naive", "cpu") > CASES[case].num_iters * matrices


def test_without_proc_there_is_no_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "PROC", tmp_path / "proc")
    assert math.isnan(measure.peak_mib("8x256x256", "product", "cpu"))


def test_limit_of_the_machine():
    if measure.probe() is None:
        pytest.skip("needs a C++ compiler with OpenMP")
    tensors = SMALL.make()
    work = SMALL.work(tensors, 5)
    entries = 3 * 9 * 12
    assert work.sweeps == 2 * 5 * entries
    assert work.matrix == 4 * 9 * 12
    projected = 2 * 2 * 8 * 6 * 3 * 12
    assert work.products == projected + (6 * 8 + 4 * 5) * entries
    one, two = (measure.limit(work._replace(products=x), 1) for x in (1e9, 2e9))
    assert 0 < one.ms < two.ms
    assert 1 < one.fma_gflops < 1000  # of one thread
    assert one.products > 0.9


def test_share_of_the_loss_in_a_step():
    x = torch.randn(512, 256)
    before, loss = torch.nn.Linear(256, 256), torch.nn.Linear(256, 256)

    def run(times):
        y = x
        for _ in range(times):
            y = before(y)
        loss(y).sum().backward()

    often, seldom = (step.share_of_loss(lambda n=n: run(n), loss) for n in (1, 30))
    assert 0 < seldom < 0.3 < often < 1


def test_unknown_names_and_missing_gpus_are_refused():
    def refused(*arguments: str) -> str:
        command = [sys.executable, "-m", "benchmarks", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr.splitlines()[-1]

    assert "unknown case nothing, expected of main" in refused("run", "nothing")
    if not torch.cuda.is_available():
        assert "finds no GPU here" in refused("run", "--device", "cuda")


def test_readme_shows_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    _, _, shown = readme.partition("<!-- benchmarks:begin -->\n")
    shown, _, _ = shown.partition("<!-- benchmarks:end -->")
    assert shown == report.table(ROOT / "benchmarks/results/cpu.csv") + "\n"


def test_results_have_one_schema():
    files = sorted((ROOT / "benchmarks/results").glob("*.csv"))
    files = [path for path in files if path.name != "step.csv"]  # of training steps
    heads = {path.name: next(csv.reader(path.open(newline=""))) for path in files}
    assert len({tuple(head) for head in heads.values()}) == 1, heads


def test_check_spares_a_backend_the_sizes_that_it_does_not_take(monkeypatch, capsys):
    checked = set()

    def record(student, teacher, *tensors, backend, **settings):
        if backend == "native":
            checked.add((student.shape[1], teacher.shape[1]))
        return fused_ot_loss(student, teacher, *tensors, backend=backend, **settings)

    monkeypatch.setattr(check, "SIZES", [(3, 4), (5, 6)])
    monkeypatch.setattr(check, "fused_ot_loss", record)
    monkeypatch.setattr(check, "refusal", lambda *what: "large" if what[2:] == (5, 6) else None)
    try:
        assert check.run("cpu", ["native"], small=False) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert checked == {(3, 4)}
    assert "0 failures" in capsys.readouterr().out


def test_token_maps(monkeypatch, tmp_path, capsys):
    texts = ["def add(first, second): return first + second", "while number < 3: print(number)"]
    for name, pieces in (("student", 270), ("teacher", 280)):
        tokenizer = byte_level_bpe(texts * 3, pieces)
        assert len(tokenizer) == pieces
        tokenizer.save_pretrained(tmp_path / name)
    arguments = [f"--{name}={tmp_path / name}" for name in ("student", "teacher")]
    monkeypatch.setattr(sys, "argv", ["benchmarks.token_maps", *arguments, "--texts=2"])
    token_maps.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("map of 279 tokens to 269, 96% of them equal: ")
    assert lines[1].endswith(
        " student tokens have an equal one, which is not the first teacher id of 0"
    )
    assert lines[2].startswith("2 texts of 256 student tokens: ")
