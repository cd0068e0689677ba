"""Ranks on this machine: all end well, or the first failure ends the job and is told."""

import random
import socket
import sys
from pathlib import Path

from megatron_mone.common import local_ranks
from megatron_mone.common.local_ranks import free_port, run_ranks


def run(tmp_path, code, ranks=2):
    return run_ranks([sys.executable, "-c", "import os, sys, time\n" + code], ranks, tmp_path)


def test_ranks_know_each_other(tmp_path):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR"
    assert run(tmp_path, f"print(*(os.environ[n] for n in '{names}'.split()))") == 0
    found = [(tmp_path / f"rank-0000{rank}.log").read_text().split() for rank in range(2)]
    assert found == [["0", "0", "2", "2", "127.0.0.1"], ["1", "1", "2", "2", "127.0.0.1"]]


def test_one_failure_ends_the_others(tmp_path, capfd):
    code = """
if os.environ["RANK"] == "1":
    print("this went wrong", file=sys.stderr)
    sys.exit(7)
time.sleep(600)"""
    assert run(tmp_path, code) == 7
    told = capfd.readouterr().err
    assert told == f"rank 1 failed; the end of {tmp_path}/rank-00001.log:\nthis went wrong\n"


def test_an_error_in_one_line_is_all_that_is_told(tmp_path, capfd):
    code = """
print('noise', file=sys.stderr)
if os.environ["RANK"] == "0":
    print('megatron-mone: error: wrong flag', file=sys.stderr)
sys.exit(2)"""
    assert run(tmp_path, code) == 2
    assert capfd.readouterr().err == "megatron-mone: error: wrong flag\n"


def test_rank_0_has_the_terminal(tmp_path, capfd):
    code = """
sys.path.insert(0, os.getcwd())
from megatron_mone.common.local_ranks import terminal
print("rank", os.environ["RANK"], file=terminal(), flush=True)"""
    assert run(tmp_path, code) == 0
    assert capfd.readouterr().err == "rank 0\n"
    assert (tmp_path / "rank-00001.log").read_text() == "rank 1\n"


def test_a_killed_rank_has_a_shells_status(tmp_path):
    assert run(tmp_path, "os.kill(os.getpid(), 9)", ranks=1) == 128 + 9


def test_a_ports_number_is_none_that_the_kernel_gives_to_connections():
    """Those go to whoever connects next, between the choice and the rank that is to listen."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    random.seed(0)
    ports = [free_port() for _ in range(50)]
    random.seed(0)
    assert [free_port() for _ in range(50)] != ports
    assert all(port < first for port in ports)


def test_a_port_that_is_taken_is_not_chosen(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        number = taken.getsockname()[1]
        offers = iter([number - 10_000, 5])
        monkeypatch.setattr(local_ranks.secrets, "randbelow", lambda beyond: next(offers))
        assert free_port() == 10_005
