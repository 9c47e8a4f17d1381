"""The benchmarks run and both sides agree; how fast they are is not tested."""

import json

import pytest
import torch
from conftest import draw_frame

from benchmarks import common, live, matching, runtimes, scorer
from media import images


@pytest.mark.slow
def test_both_implementations_agree_and_results_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["matching", "-en", "mobilenet", "-p", "96", "160", "-uf", "1",
                                     "2", "--repeats", "1", "-c", "cpu",
                                     "--json", str(tmp_path / "b.json")])
    assert matching.main() == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["upsample_factor"] for row in rows] == [1, 2]
    for row in rows:
        assert row["largest_difference"] < 1e-4
        assert row["dense"]["seconds"] > 0 and row["toolkit"]["seconds"] > 0
        assert row["grid"] == [side * row["upsample_factor"] for side in row["cells"]]
    assert capsys.readouterr().out.count("mobilenet") == 2


@pytest.mark.parametrize("year", ["2016", "2017"])
def test_both_scorers_agree(year, davis_2017, tmp_path, monkeypatch, capsys):
    (tmp_path / "results/dog").mkdir(parents=True)
    for i in range(6):
        _, mask = draw_frame(max(i - 1, 0), (1, 2))  # a frame late
        images.write_mask(tmp_path / "results/dog" / f"{i:05d}.png", mask)
    monkeypatch.setattr("sys.argv", ["scorer", str(tmp_path / "results"), "-d",
                                     str(davis_2017), "-y", year, "--repeats", "1",
                                     "--json", str(tmp_path / "b.json")])
    assert scorer.main() == 0
    row = json.loads((tmp_path / "b.json").read_text())
    assert row["frames"] == 4 and row["times_faster"] > 0
    assert row["largest_difference"] < 1e-9
    assert "frames per second" in capsys.readouterr().out


def test_peak_memory_is_measured_per_call():
    held = []
    peak = common.peak_memory(lambda: held.append(torch.ones(1 << 24).sum().item()),
                             torch.device("cpu"))
    if peak is None:
        pytest.skip("this system doesn't report peak memory")
    assert 60 << 20 < peak < 90 << 20


@pytest.mark.slow
def test_each_runtime_tracks_a_clip_in_its_own_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtimes, "WARM_UP", 1)
    monkeypatch.setattr(runtimes.measure_runtime, "__defaults__", (1,))
    monkeypatch.setattr("sys.argv", ["runtimes", "--rows", "64", "--threads", "1",
                                     "--frames", "2", "--repeats", "1",
                                     "--json", str(tmp_path / "b.json")])
    assert runtimes.main() == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["runtime"] for row in rows] == list(runtimes.RUNTIMES)
    assert all(row["first"] > row["seconds"] > 0 for row in rows)
    assert [row["precision"] for row in rows[1:]] == ["float32", "float32"]
    assert capsys.readouterr().out.count("pytorch") == 2


def test_a_runtime_that_fails_is_named(tmp_path):
    with pytest.raises(OSError, match="onnxruntime: .*expected an export"):
        runtimes.measure_runtime("onnxruntime", tmp_path, tmp_path / "a.png", tmp_path, 1)


@pytest.mark.slow
def test_a_stream_is_tracked_in_real_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live, "WARM_UP", 2)
    monkeypatch.setattr(live, "SCENE_FRAMES", 10)
    monkeypatch.setattr("sys.argv", ["live", "--rows", "64", "--seconds", "1", "--fps", "20",
                                     "--json", str(tmp_path / "b.json")])
    assert live.main() == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [(row["rows"], row["objects"]) for row in rows] == [(64, 1), (64, 3)]
    for row in rows:
        assert 15 < row["received_per_second"] < 25  # the stream's own rate, on a busy machine too
        assert 0 < row["tracked_per_second"] < 25 and 0 < row["delay"] <= row["delay_95"]
    assert capsys.readouterr().out.count("\n") == 4
