"""Two processes over gloo do what one does."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_list, write_sequence
from torchvision import models

import flags
import main
from data.samples import PairSampler
from davis import Davis


def torchrun(*arguments, processes=2):
    """main.py in processes of one thread each."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "localhost:0", "--nproc_per_node", str(processes),
         ROOT / "main.py", *arguments], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def evaluation(tmp_path, model):
    for name, frames in (("ant", 4), ("bee", 8), ("cat", 5)):
        write_sequence(tmp_path / "davis", name, frames)
    write_list(tmp_path / "davis", "2016", "val", ["ant", "bee", "cat"])
    model.save(tmp_path / "vm.pth")
    return lambda name: ["-m", "eval", "-d", str(tmp_path / "davis"), "-c", "cpu", "-o",
                         str(tmp_path / "vm.pth"), "-j", str(tmp_path / name), "-f", "warn"]


def test_evaluation_gives_the_table_of_a_single_process(evaluation, tmp_path, capsys):
    assert main.main(evaluation("one")) == 0
    alone, _ = capsys.readouterr().out.split("14 frames in")
    result = torchrun(*evaluation("two"))
    assert result.returncode == 0, result.stderr
    table, speed = result.stdout.split("14 frames in")
    assert table == alone and "in each of 2 processes" in speed
    one, two = ({path.relative_to(tmp_path / name): path.read_bytes()
                 for pattern in ("*/*.png", "*.csv") for path in (tmp_path / name).glob(pattern)}
                for name in ("one", "two"))
    assert one == two and len(one) == 19


def test_each_process_finetunes_and_overwrites_by_itself(evaluation, tmp_path):
    fits = ["--finetune", "2", "-p", "64", "96"]
    before = torchrun(*evaluation("two"))
    assert before.returncode == 0, before.stderr
    one = torchrun(*evaluation("one"), *fits, processes=1)
    two = torchrun(*evaluation("two"), *fits, "--overwrite")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    table = one.stdout.split("14 frames in")[0]
    assert two.stdout.split("14 frames in")[0] == table
    assert before.stdout.split("14 frames in")[0] != table


@pytest.mark.parametrize("processes, batch_size, steps", [(1, 2, 9), (2, 2, 5), (4, 1, 5)])
def test_a_pass_shows_each_frame_once_whatever_the_processes(processes, batch_size, steps,
                                                             davis_2016, monkeypatch):
    seen = []
    monkeypatch.setattr(main, "data", lambda _: Davis(davis_2016))
    monkeypatch.setattr(main, "build_model", lambda _: None)
    monkeypatch.setattr(main.distributed, "count", lambda: processes)
    monkeypatch.setattr(main.train, "train", lambda *arguments: seen.append(arguments[-1]))
    main.run_train(flags.parse(["-b", str(batch_size), "-vs", "0", "-s", "vm.pth"]))
    assert seen[0].iterations == steps  # of 18 frames


@pytest.fixture
def machines():
    """Two network namespaces joined by a cable: what torchrun sees of two machines.

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


def test_two_machines_give_the_table_of_one(machines, evaluation, tmp_path, capsys):
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


def test_training_equals_that_of_one_process_with_twice_the_batch(davis_2016, tmp_path):
    torch.manual_seed(0)
    torch.save(models.mobilenet_v2().state_dict(), tmp_path / "weights.pth")

    def arguments(name, batch_size):
        return ["-m", "train", "-d", str(davis_2016), "-s", str(tmp_path / name / "vm.pth"),
                "--encoder_weights", str(tmp_path / "weights.pth"), "-b", batch_size, "-i", "3",
                "-r", "2", "-p", "64", "96", "-c", "cpu", "-vs", "0.6", "--workers", "0"]

    assert main.main(arguments("one", "2")) == 0
    result = torchrun(*arguments("two", "1"))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("iteration 2: loss") == 1  # the first process speaks
    one, two = (torch.load(tmp_path / name / "vm.state", weights_only=True)
                for name in ("one", "two"))
    torch.manual_seed(0)
    start = main.build_model(flags.parse(arguments("one", "2")))
    start, one_end, two_end = (
        torch.cat([state[name].flatten() for name, _ in start.named_parameters()])
        for state in (start.state_dict(), one["model"], two["model"]))
    # Adam makes a step of rounding errors too, where there is no gradient to speak of
    assert (two_end - one_end).norm() < 0.1 * (one_end - start).norm()
    assert [line["iteration"] for line in two["history"]] == [0, 2, 3]
    for line, expected in zip(two["history"], one["history"]):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert two["history"][0]["held_out_iou"] == one["history"][0]["held_out_iou"]


def test_a_process_that_fails_ends_the_job_with_its_error(evaluation, tmp_path):
    frame = tmp_path / "davis/JPEGImages/480p/cat/00003.jpg"
    frame.write_bytes(frame.read_bytes()[:900])
    result = torchrun(*evaluation("out"))
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("main.py: error:")]
    assert len(errors) == 1 and "cat/00003.jpg" in errors[0]


@pytest.mark.parametrize("count, skip, ranks", [(10, 0, 2), (10, 4, 2), (9, 3, 3), (4, 8, 2)])
def test_processes_share_the_pairs_of_a_single_one(count, skip, ranks):
    alone = list(PairSampler(7, count, skip=skip))
    assert alone == list(PairSampler(7, count))[skip:]
    samplers = [PairSampler(7, count, skip=skip, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sum(map(len, samplers)) == len(alone)
    shares = [list(sampler) for sampler in samplers]
    assert [len(s) for s in samplers] == [len(s) for s in shares]
    assert [shares[i % ranks][i // ranks] for i in range(len(alone))] == alone
