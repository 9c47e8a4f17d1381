"""The benchmark runs and its two sides agree; how fast they are is not tested."""

import json

import pytest
import torch

import bench


def test_both_sides_agree_and_the_figures_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "-en", "mobilenet", "-p", "96", "160", "-uf", "1",
                                     "2", "--repeats", "1", "-c", "cpu",
                                     "--json", str(tmp_path / "b.json")])
    assert bench.main() == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["upsample_factor"] for row in rows] == [1, 2]
    for row in rows:
        assert row["largest_difference"] < 1e-4
        assert row["dense"]["seconds"] > 0 and row["toolkit"]["seconds"] > 0
        assert row["grid"] == [side * row["upsample_factor"] for side in row["cells"]]
    assert capsys.readouterr().out.count("mobilenet") == 2


def test_memory_is_that_of_the_call():
    held = []
    peak = bench.peak_memory(lambda: held.append(torch.ones(1 << 24).sum().item()),
                             torch.device("cpu"))
    if peak is None:
        pytest.skip("this system doesn't tell its peak memory")
    assert 60 << 20 < peak < 90 << 20
