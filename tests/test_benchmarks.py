"""The benchmarks run, both of their ways agree, and a busy machine's ratios are refused."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from polypseg.errors import PolypSegError, UsageError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def load(name: str):
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("near_duplicates", {"frames": 120}),
        ("embedding_distance", {"clusters": 12}),
        ("measures", {"images": 1}),
        ("synthetic_frames", {"frames": 9}),
        ("feed", {"images": 2}),
        ("pretraining_feed", {"images": 1}),
        pytest.param("training_step", {"batch": 2}, marks=pytest.mark.slow),
        pytest.param(
            "on_gpu",
            {"batch": 2, "models": ("RN-NA-NA",), "ways": ("before", "bf16"), "device": "cpu"},
            marks=pytest.mark.slow,
        ),
        pytest.param("inference", {"frames": 2, "segmented": 2}, marks=pytest.mark.slow),
    ],
)
def test_each_benchmark_times_its_ways_in_turn(name, size):
    rows = load(name).rows(repeats=2, **size)
    assert rows and all(len(row.seconds) == len(row.before) == 2 and row.ratio > 0 for row in rows)


def test_ratio_is_of_medians_and_the_first_round_is_not_counted(monkeypatch):
    tool = load("side_by_side")
    clock = iter([0, 50, 50, 100, *(t for k in range(3) for t in (300 + k, 304 + k, 310 + k, 311 + k))])
    monkeypatch.setattr(tool.time, "perf_counter", lambda: next(clock))
    (row,) = tool.side_by_side("job", {"before": lambda: None, "now": lambda: None}, repeats=3)
    assert (row.before, row.seconds, row.ratio) == ((4, 4, 4), (1, 1, 1), 4)


def test_what_is_fast_is_done_several_times_in_a_repeat(monkeypatch):
    tool, calls = load("side_by_side"), []
    clock = iter([0, 0.00501, 0.00501, 0.205, *(t for k in range(2) for t in (k, k + 0.2, k + 0.5, k + 0.6))])
    monkeypatch.setattr(tool.time, "perf_counter", lambda: next(clock))
    (row,) = tool.side_by_side("job", {"before": lambda: calls.append(0), "now": lambda: None}, repeats=2)
    assert (
        len(calls) == 1 + 20 + 20 and row.before == pytest.approx((0.01, 0.01)) and row.seconds[0] == pytest.approx(0.1)
    )


@pytest.mark.slow
def test_stages_are_those_of_each_job():
    found = load("stages").stages(frames=1, repeats=1)
    networks = [stage for stage in found if stage.stage == "network"]
    assert {stage.job for stage in networks} == {"segment a frame", "evaluate a frame"}
    assert all(stage.seconds > 0 for stage in found) and all(stage.gflop > 1 for stage in networks)
    table = load("stages").to_markdown([asdict(s) for s in networks], best={"fp32_gflops": 1e-3})
    assert "| 100% | " in table and "%" in table.splitlines()[2].split("|")[-2]


GROWN = [{"job": "count", "n": 10, "seconds": 1.0, "peak_mb": 100.0, "exponent": None}]

HELD = [{"job": "segment", "way": "ours", "peak_mb": 100.0, "before_mb": 400.0, "ratio": 0.25}]


def test_growth_is_the_power_between_neighboring_sizes():
    growth = load("growth")
    rows = growth.with_exponents([{"n": n, "seconds": n**2 / 50} for n in (5, 10, 40)])
    assert rows[0]["exponent"] is None and [row["exponent"] for row in rows[1:]] == pytest.approx([2, 2])


@pytest.mark.slow
def test_growth_is_measured_of_a_process_of_its_own():
    growth = load("growth")
    job = growth.Job(name="hold", sizes=(1,), prepare=lambda folder, n: ["-c", f"x = b'x' * ({n} * 10**8)"])
    small, large = (growth.measured(job, n) for n in (1, 3))
    assert large["peak_mb"] - small["peak_mb"] == pytest.approx(200e6 / 2**20, rel=0.1) and large["seconds"] > 0
    failing = growth.Job(name="fail", sizes=(1,), prepare=lambda folder, n: ["-c", "raise SystemExit('no frames')"])
    with pytest.raises(PolypSegError, match="fail, 1: no frames"):
        growth.measured(failing, 1)


@pytest.mark.slow
def test_the_most_memory_of_a_way_is_that_of_its_own_process():
    memory = load("peak_memory")
    hold = "x = b'x' * ({} * 10**8)"
    job = memory.Job(
        name="hold", ways=lambda _: {"before": ["-c", hold.format(3)], "now": ["-c", hold.format(1)]}
    )  # fmt: skip
    (row,) = memory.measured(job)
    assert row["before_mb"] - row["peak_mb"] == pytest.approx(200e6 / 2**20, rel=0.1)
    assert row["ratio"] == row["peak_mb"] / row["before_mb"] and row["way"] == "now"


def test_the_ceilings_are_those_of_this_machine(monkeypatch):
    ceilings = load("ceilings")
    monkeypatch.setattr(ceilings, "SIDE", 64)
    monkeypatch.setattr(ceilings, "COPIED", 2**20)
    found = ceilings.ceilings()
    assert all(value > 0 for value in found.values()) and "GFLOP/s in fp32" in ceilings.told(found)


def test_neither_a_busy_machine_nor_restless_repeats_may_be_quoted():
    tool = load("side_by_side")
    steady = tool.Row(job="a", way="b", seconds=(1.0, 1.1, 0.9), before=(2.0, 2.0, 2.1))
    restless = tool.Row(job="c", way="d", seconds=(1.0, 3.0, 9.0), before=(2.0, 2.0, 2.1))
    assert tool.why_not_quotable([steady], 0.05) == []
    assert "other processes used 1.3 cores" in tool.why_not_quotable([steady], 1.3)[0]
    assert "c, d" in tool.why_not_quotable([steady, restless], 0.0)[0]
    assert tool.why_not_quotable([*[steady] * 3, restless], 0.0) == []
    assert tool.why_not_quotable([steady], None)


def test_the_page_shows_the_kept_record():
    docs = FOLDER.parent / "docs"
    record = json.loads((docs / "speed" / "bench.json").read_text())
    grown, held = (json.loads((docs / "speed" / f"{n}.json").read_text())["rows"] for n in ("growth", "peak_memory"))
    bench = load("bench")
    others = bench.other_records(docs / "speed")
    assert (docs / "speed.md").read_text() == bench.render_page(record, grown=grown, held=held, others=others)


def test_other_sittings_have_a_column_for_each_kind_of_machine():
    bench = load("bench")
    row = {"job": "a", "way": "b", "ratio": 2.0, "steady": True, "seconds": [1.0], "before_seconds": [2.0]}
    best = {"threads": 1, "fp32_gflops": 100.0, "bf16_gflops": 200.0, "copy_gb_s": 10.0}
    here = {"processor": "this CPU", "reasons": [], "rows": [row], "ceilings": best}
    there = here | {"processor": "that CPU", "rows": [row | {"ratio": 3.0}], "ceilings": best | {"fp32_gflops": 55.0}}
    text = bench.to_markdown(here, others=[there, here | {"rows": [row | {"ratio": 1.0}]}])
    assert "| job | way | times as fast | earlier | on that CPU | seconds | before |" in text
    assert "| a | b | 2.0 | 1.0 | 3.0 | 1 | 2 |" in text
    assert "that CPU: matrix products at 55 GFLOP/s in fp32" in text


@pytest.mark.parametrize("cores", [0.0, 1.5])
def test_bench_writes_a_table_or_why_there_is_none(tmp_path, monkeypatch, cores):
    bench, tool = load("bench"), load("side_by_side")
    row = tool.Row(job="a job", way="new", seconds=(1.0, 1.0), before=(3.0, 3.0))
    restless = tool.Row(job="another", way="new", seconds=(1.0, 9.0), before=(3.0, 3.0))
    monkeypatch.setattr(bench, "BENCHMARKS", (lambda repeats: [row, row, row, restless],))
    monkeypatch.setattr(tool.Neighbors, "cores", lambda self: cores)
    ceilings = {"threads": 1, "fp32_gflops": 100.0, "copy_gb_s": 10.0}
    monkeypatch.setattr(load("ceilings"), "ceilings", lambda: ceilings)
    step = load("stages").Stage(job="a job", way="bf16", stage="network", seconds=0.02, gflop=1.0)
    monkeypatch.setattr(load("stages"), "stages", lambda repeats, full: [step])
    bench.main(output=tmp_path, repeats=2)
    content, table = json.loads((tmp_path / "bench.json").read_text()), (tmp_path / "bench.md").read_text()
    assert content["quotable"] == (cores == 0.0) and content["rows"][0]["ratio"] == 3
    assert ("| a job | new | 3.0 | 1 | 3 |" in table) == (cores == 0.0)
    assert ("Not to be quoted" in table) == (cores > 0.0)
    assert ("| another | new | repeats differ | | |" in table) == (cores == 0.0)
    assert ("on one thread: matrix products at 100 GFLOP/s in fp32; copies at 10 GB/s." in table) == (cores == 0.0)
    page = tmp_path / "speed.md"
    (tmp_path / "growth.json").write_text(json.dumps({"rows": GROWN}))
    (tmp_path / "peak_memory.json").write_text(json.dumps({"rows": HELD}))
    if cores:
        with pytest.raises(UsageError, match="measure again"):
            bench.main(output=tmp_path, page=page)
    else:
        bench.main(output=tmp_path, page=page)
        assert table in page.read_text() and "medians of 2 repeats" in page.read_text()
        assert "| a job | bf16 | network | 20 | 100% |  |" in page.read_text()
        assert "| segment | ours | 100 | 400 | 0.25 |" in page.read_text()
        before = content["rows"][0] | {"ratio": 2.5}
        (tmp_path / "bench.0123abc.json").write_text(json.dumps(content | {"rows": [before]}))
        bench.main(output=tmp_path, page=page)
        assert "| a job | new | 3.0 | 2.5 | 1 | 3 |" in page.read_text()
        assert "| another | new | repeats differ | | | |" in page.read_text()
