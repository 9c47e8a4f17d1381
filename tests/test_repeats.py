"""The same command repeats exactly, with any number of threads and workers."""

import pytest
import torch
from conftest import write_list, write_sequence
from torchvision import models

import main

pytestmark = pytest.mark.slow


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def evaluate(tmp_path, capsys):
    for name, ids in (("ant", (1,)), ("bee", (1, 2))):
        write_sequence(tmp_path / "davis", name, frames=5, ids=ids, value=None)
    write_list(tmp_path / "davis", "2017", "val", ["ant", "bee"])

    def run(name, *more):
        assert main.main(["-m", "eval", "-d", str(tmp_path / "davis"), "-y", "2017", "-c", "cpu",
                          "-j", str(tmp_path / name), *more]) == 0
        masks = {path.relative_to(tmp_path / name): path.read_bytes()
                 for path in (tmp_path / name).rglob("*.png")}
        return capsys.readouterr().out.split("8 frames in")[0], masks

    return run


def test_masks_and_table_repeat_exactly(evaluate):
    first, second = evaluate("first"), evaluate("second")
    assert first == second and len(first[1]) == 10


def test_the_table_does_not_depend_on_the_number_of_threads(evaluate, threads):
    # in bfloat16, where a processor has it, another order of sums shows in the third digit
    threads(1)
    one, _ = evaluate("one", "--precision", "fp32")
    threads(2)
    two, _ = evaluate("two", "--precision", "fp32")
    assert one == two and "bee_2" in one


def test_weights_do_not_depend_on_the_number_of_workers(davis_2016, tmp_path, threads):
    threads(1)
    torch.manual_seed(0)
    torch.save(models.mobilenet_v2().state_dict(), tmp_path / "weights.pth")
    states = []
    for name, workers in (("first", "0"), ("second", "2"), ("third", "2")):
        save = tmp_path / name / "vm.pth"
        assert main.main(["-m", "train", "-d", str(davis_2016), "-s", str(save), "-c", "cpu",
                          "--encoder_weights", str(tmp_path / "weights.pth"), "-b", "2", "-i", "2",
                          "-r", "-1", "-p", "64", "96", "--workers", workers, "--seed", "3"]) == 0
        states.append(torch.load(save.with_suffix(".state"), weights_only=True)["model"])
    for other in states[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in states[0].items())
