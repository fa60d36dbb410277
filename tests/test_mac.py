"""What a Mac has otherwise, made up on this machine: none of it was seen on a real one."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import siblings
import utils
from conftest import branching
from runs import command, ROOT, run, splits, TINY
from siblings import Sharing
from test_cuda import off, update
from test_prefix import random_groups


@pytest.mark.parametrize("system, held", [("darwin", 2_000_000), ("linux", 2_000_000 * 1024)])
def test_memory_is_counted_in_bytes_there_and_in_kilobytes_here(monkeypatch, system, held):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(utils, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2_000_000))
    monkeypatch.setattr(sys, "platform", system)
    assert utils.peak_memory() == held


def with_mps():
    """Of a forked run: PyTorch names a GPU of Apple's as the accelerator; and the C library is not glibc."""
    mps = torch.device("mps")
    torch._C._get_accelerator = torch.accelerator.current_accelerator = lambda *_: mps
    torch.accelerator.is_available = torch.backends.mps.is_available = lambda: True
    utils.ctypes.CDLL = lambda name: SimpleNamespace()


@pytest.mark.parametrize("more", [
    "", pytest.param("--offload --gradient_checkpointing --dtype bfloat16", marks=pytest.mark.slow)])
def test_apples_gpu_is_left_alone(data, tmp_path, more):
    """By default FSDP2 shards over whatever accelerator there is, and gloo has nothing for this one."""
    words = ["train_grpo.py", *TINY, *splits(data)[:2], "--validation_data=", "--test_data=", *more.split()]
    words += ["--out", tmp_path / "run"]
    run(*words, "--max_steps", 1, ranks=2, fault=with_mps)
    _, log = run(*words, "--max_steps", 2, ranks=2, fault=with_mps)  # and what was saved is read
    assert "on 2 x cpu" in log and "Continuing after step 1" in log


def test_without_flash_attention_each_answer_has_a_prompt_of_its_own(qwen, one_rank, tmp_path, monkeypatch, capsys):
    samples = random_groups(qwen, tmp_path, 5)
    want = update(qwen.model, qwen.processor, samples)
    assert branching(qwen.model, qwen.processor).sharing.can_branch
    monkeypatch.setattr(siblings, "FLASH", "an_operator_that_is_not_there")
    qwen.model.set_attn_implementation("sdpa")
    assert not Sharing(qwen.model, qwen.processor).can_branch
    assert "no flash attention for CPUs" in capsys.readouterr().err
    got = update(qwen.model, qwen.processor, samples)
    assert off(got, want) < 1e-5 and got[1:] == pytest.approx(want[1:], rel=1e-5)


@pytest.mark.slow
def test_a_name_that_leads_nowhere(tmp_path):
    """torchrun looks for itself by the machine's name, and without the README's --local_addr it does so for minutes."""
    (tmp_path / "sitecustomize.py").write_text("import socket\n\nsocket.getfqdn = lambda *_: 'a-mac.invalid'\n")
    words = command("data.py", "toy_data/test.jsonl", "--model", "toy_model", ranks=2)
    words[3:3] = ["--local_addr", "localhost"]  # after python -m torch.distributed.run
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_benchmark_that_needs_linux_says_so(monkeypatch, capsys):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench.py", "data"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "only Linux can" in capsys.readouterr().err
