"""A run means the same on any number of ranks: in float64, ten steps, completion by completion.

In float32 the first step is the same (tests/test_commands.py); later, rounding flips a token sooner
or later, and everything after it. In float64 it does not within ten steps, and a slip in how work is
shared out has nothing to hide behind.
"""

import os
import subprocess
import sys

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

import policy
import rollout
import train_grpo
import utils
from conftest import answered
from policy import freeze, load_model, Policy, shard
from runs import free_port, ROOT, run, splits, timeless, TINY


def in_float64():
    """Of a forked run: all that computes does it so."""
    load, mixed = policy.load_model, policy.MixedPrecisionPolicy
    policy.MixedPrecisionPolicy = lambda **_: mixed(param_dtype=torch.float64, reduce_dtype=torch.float64)
    for module in (policy, rollout):
        module.load_model = lambda path, dtype=None: load(path, torch.float64)
        module.compute_dtype = lambda name: torch.float64
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    # transformers' norm computes in float32 whatever it is given, and so rounds a gradient that several
    # answers send to their prompt by how they were spread over passes
    modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm.forward = lambda self, x: self.weight * (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


TEN = ("--batch_size 8 --mini_batch_size 4 --group_size 4 --micro_batch_tokens 150 --max_new_tokens 60 "
       "--epochs 5 --max_steps 10 --warmup_steps 0 --kl_coef 0.01 --refills 1 --lr 1e-4").split()


FOUR = [*TEN, "--max_steps", "4", "--group_size", "2"]


@pytest.fixture(scope="module", params=[
    pytest.param((FOUR, 4, (1, 2)), id="4 steps, 2 ranks", marks=pytest.mark.slow),
    pytest.param((TEN, 10, (1, 2, 4)), id="10 steps, 2 and 4 ranks", marks=pytest.mark.slow)])
def runs(request, data, tmp_path_factory):
    """Run folders of the same steps, two updates each, on one rank and on several; the last step."""
    words, last, counts = request.param
    folders = [tmp_path_factory.mktemp("float64") / str(ranks) for ranks in counts]
    for folder, ranks in zip(folders, counts):
        run("train_grpo.py", *words, *splits(data), "--out", folder, ranks=ranks, fault=in_float64)
    return folders, last


def test_all_steps_are_those_of_one_rank(runs):
    (one, *others), last = runs
    for other in others:
        names = [path.name for path in sorted((one / "samples").glob("*.jsonl"))]
        assert len(names) == last
        for name in names:
            alone, together = (utils.read_jsonl(folder / "samples" / name) for folder in (one, other))
            key = lambda row: (row["id"], row["completion_text"])  # noqa: E731
            assert sorted(map(key, alone)) == sorted(map(key, together)), name
        assert_same_logs(one, other)


def assert_same_logs(folder, other):
    for name in ("metrics.jsonl", "eval.jsonl"):
        alone, together = (timeless(place / name) for place in (folder, other))
        assert len(alone) == len(together) > 0
        for one, two in zip(alone, together):
            for metric in set(one) - {"sampler_gap", "sampler_gap_clipped", "sampler_gap_p99"}:  # rounding is all they hold
                assert two[metric] == (pytest.approx(one[metric], rel=1e-6, abs=1e-9)
                                       if isinstance(one[metric], float) else one[metric]), metric


def test_the_weights_after_the_last_step_are_those_of_one_rank(runs):
    folders, last = runs
    alone, *others = (load_model(folder / "checkpoints" / f"step_{last:06d}").state_dict() for folder in folders)
    base = load_model(ROOT / "toy_model").state_dict()
    moved = max((alone[k] - base[k]).abs().max() for k in base)
    for weights in others:
        off = max((alone[k] - weights[k]).abs().max() for k in base)
        assert off < 1e-6 < 1e-4 < moved


def test_only_what_trains_has_gradients_and_optimiser_state(qwen, one_rank):
    """A frozen vision tower costs its weights and nothing else."""
    freeze(qwen.model, False, False, True)
    policy = shard(Policy(qwen.model, qwen.processor), torch.float32)
    trained = {p for p in policy.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained, 1e-3)
    seen = {}
    step = optimizer.step
    optimizer.step = lambda: (seen.update({p: p.grad for p in policy.parameters()}), step())
    samples = answered(qwen.samples[:4], qwen.processor)
    train_grpo.update(policy, optimizer, samples, None, None,
                      train_grpo.Args(tis_cap=0.0))
    assert {p for p, g in seen.items() if g is not None} == trained == set(optimizer.state)
    assert 0 < len(trained) < len(seen)


@pytest.mark.slow
def test_two_nodes(data, tmp_path):
    """The README's two-node command: two agents, which meet at an address, one rank each."""
    address = f"127.0.0.1:{free_port()}"
    words = [*TINY, *splits(data), "--epochs", "1"]
    agents = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node),
         "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", address, "--rdzv_id",
         "glassbox", "train_grpo.py", *map(str, words), "--out", str(tmp_path / "nodes")],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
        for node in (0, 1)]
    for agent in agents:
        out, err = agent.communicate(timeout=300)
        assert agent.returncode == 0, err[-3000:]
    run("train_grpo.py", *words, "--out", tmp_path / "ranks", ranks=2)
    together, apart = (timeless(tmp_path / name / "metrics.jsonl") for name in ("ranks", "nodes"))
    assert len(together) == len(apart) == 4
    for metric, value in together[0].items():  # later steps differ by threads, and so by rounding
        assert apart[0][metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric
