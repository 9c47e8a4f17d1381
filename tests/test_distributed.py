"""Two processes over gloo give the results of one."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_list, write_sequence

import main
from cli import options
from davis import Davis
from training.samples import PairSampler
from videomatch import SHIPPED


def torchrun(*arguments, processes=2, script=ROOT / "main.py"):
    """Run main.py, or a script around it, in single-threaded processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "localhost:0", "--nproc_per_node", str(processes),
         script, *arguments], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def evaluation(tmp_path, model):
    for name, frames in (("ant", 4), ("bee", 8), ("cat", 5)):
        write_sequence(tmp_path / "davis", name, frames)
    write_list(tmp_path / "davis", "2016", "val", ["ant", "bee", "cat"])
    model.save(tmp_path / "vm.pth")
    return lambda name: ["-m", "eval", "-d", str(tmp_path / "davis"), "-c", "cpu", "-o",
                         str(tmp_path / "vm.pth"), "-j", str(tmp_path / name), "-f", "warn"]


@pytest.mark.slow
def test_two_processes_give_the_same_table_as_one(evaluation, tmp_path, capsys):
    assert main.main(evaluation("one")) == 0
    alone, _ = capsys.readouterr().out.split("14 frames in")
    result = torchrun(*evaluation("two"))
    assert result.returncode == 0, result.stderr
    table, speed = result.stdout.split("14 frames in")
    assert table == alone and "in each of 2 processes" in speed
    one, two = ({path.relative_to(tmp_path / name): path.read_bytes()
                 for pattern in ("*/*.png", "*.csv") for path in (tmp_path / name).glob(pattern)}
                for name in ("one", "two"))
    assert one == two and len(one) == 22


@pytest.mark.slow
def test_several_processes_overwrite_an_earlier_run(evaluation, tmp_path):
    size = ["-p", "64", "96"]
    before = torchrun(*evaluation("two"))
    assert before.returncode == 0, before.stderr
    one = torchrun(*evaluation("one"), *size, processes=1)
    two = torchrun(*evaluation("two"), *size, "--overwrite")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    table = one.stdout.split("14 frames in")[0]
    assert two.stdout.split("14 frames in")[0] == table
    assert before.stdout.split("14 frames in")[0] != table


@pytest.mark.parametrize("processes, batch_size, steps", [(1, 2, 9), (2, 2, 5), (4, 1, 5)])
def test_an_epoch_shows_each_frame_once_for_any_number_of_processes(processes, batch_size, steps,
                                                             model, davis_2016, monkeypatch):
    seen = []
    monkeypatch.setattr(main.setup, "load_dataset", lambda _: Davis(davis_2016))
    monkeypatch.setattr(main.setup, "build_model", lambda _: model)
    monkeypatch.setattr(main.distributed, "count", lambda: processes)
    monkeypatch.setattr(main.train, "train", lambda *arguments: seen.append(arguments[3]))
    main.run_train(options.parse(["-b", str(batch_size), "-vs", "0", "-s", "vm.pth"]))
    assert seen[0].iterations == steps  # of 18 frames


@pytest.fixture
def machines():
    """Two network namespaces joined by a virtual cable, which torchrun takes for two machines.

    The words that start a command there, and the address of the first.
    """
    names = [f"vm{os.getpid()}{end}" for end in "ab"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    if not shutil.which("ip") or ip("netns", "add", names[0]).returncode:
        pytest.skip("network namespaces can't be made here")
    try:
        subprocess.run(["ip", "netns", "add", names[1]], check=True)
        subprocess.run(["ip", "link", "add", "cable", "netns", names[0], "type", "veth",
                        "peer", "name", "cable", "netns", names[1]], check=True)
        for i, name in enumerate(names, start=1):
            for words in (["addr", "add", f"10.77.0.{i}/24", "dev", "cable"],
                          ["link", "set", "cable", "up"], ["link", "set", "lo", "up"]):
                subprocess.run(["ip", "-n", name, *words], check=True)
        yield [["ip", "netns", "exec", name] for name in names], "10.77.0.1"
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_two_machines_give_the_same_table_as_one(machines, evaluation, tmp_path, capsys):
    assert main.main(evaluation("one")) == 0
    alone = capsys.readouterr().out.split("frames")[0]
    commands, address = machines
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    jobs = [subprocess.Popen(
        [*command, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
         "--node_rank", str(i), "--nproc_per_node", "1", "--master_addr", address,
         ROOT / "main.py", *evaluation("two")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for i, command in enumerate(commands)]
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert outputs[0][0].split("frames")[0] == alone and not outputs[1][0]


# main.py, which also saves the averaged gradients of every step next to this script.
# oneDNN multiplies one clip by other kernels than two, and where their rounding moves a unit across
# the kink of a ReLU, a gradient jumps; PyTorch's own convolutions take one frame after the other.
KEEP_GRADIENTS = """
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
import torch

from system import distributed
import main

torch.backends.mkldnn.set_flags(False)
average, steps = distributed.average_gradients, []


def average_and_keep(parameters):
    parameters = list(parameters)
    average(parameters)
    steps.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    torch.save(steps, Path(__file__).with_suffix(f".{{distributed.rank()}}"))


distributed.average_gradients = average_and_keep
sys.exit(main.main())
"""


@pytest.mark.slow
def test_a_step_equals_one_process_with_twice_the_batch(davis_2016, tmp_path):
    def train(name, processes, batch_size):
        """Train; returns the losses before each step and the gradients of each process and step."""
        script = tmp_path / f"{name}.py"
        script.write_text(KEEP_GRADIENTS.format(root=str(ROOT)))
        result = torchrun(
            "-m", "train", "-d", davis_2016, "-s", tmp_path / name / "vm.pth", "-c", "cpu",
            "-o", SHIPPED["mobilenet"], "-b", batch_size, "-i", "3", "-r", "1", "-p", "64", "96",
            "-vs", "0.6", "--workers", "0", processes=processes, script=script)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("iteration 2: loss") == 1  # the first process speaks
        history = (tmp_path / name / "vm.jsonl").read_text().splitlines()
        return ([json.loads(line) for line in history],
                [torch.load(script.with_suffix(f".{rank}")) for rank in range(processes)])

    one, [alone] = train("one", 1, "2")
    two, [first, second] = train("two", 2, "1")
    # Only what comes before the first update: Adam divides a gradient by its own size, and so
    # turns rounding errors, which differ between processors, into full steps
    assert (first[0] - alone[0]).norm() < 1e-5 * alone[0].norm()
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-5)
    assert two[0]["held_out_iou"] == one[0]["held_out_iou"]
    # after it, to check that the processes have equal weights
    assert len(first) == 3 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [line["iteration"] for line in two] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_job_with_its_error(evaluation, tmp_path):
    frame = tmp_path / "davis/JPEGImages/480p/cat/00003.jpg"
    frame.write_bytes(frame.read_bytes()[:900])
    result = torchrun(*evaluation("out"))
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("main.py: error:")]
    assert len(errors) == 1 and "cat/00003.jpg" in errors[0]


@pytest.mark.parametrize("count, skip, ranks", [(10, 0, 2), (10, 4, 2), (9, 3, 3), (4, 8, 2)])
def test_processes_split_the_pairs_of_a_single_one(count, skip, ranks):
    alone = list(PairSampler(7, count, skip=skip))
    assert alone == list(PairSampler(7, count))[skip:]
    samplers = [PairSampler(7, count, skip=skip, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sum(map(len, samplers)) == len(alone)
    shares = [list(sampler) for sampler in samplers]
    assert [len(s) for s in samplers] == [len(s) for s in shares]
    assert [shares[i % ranks][i // ranks] for i in range(len(alone))] == alone
