"""The CUDA branches, as far as a CPU can run them: vLLM's CUDA build, and flex attention.

vLLM's parts stand in one process of their own, fake_cuda.py, which says what is real there. Flex attention is compiled
by Dynamo as on CUDA, with a backend that runs the graph as it is; no kernel is seen here.
"""

import copy
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.flex_attention

import conftest
import siblings
import train_grpo
import utils
from conftest import branching, FAMILIES
from doctor import mean_gap, trainer_logprobs
from policy import freeze, Policy, shard
from rollout import HFEngine
from runs import fork, ROOT
from siblings import Sharing
from test_parity import ARGS, mixed
from test_prefix import random_groups


def variant(family, tied, heads=(16, 2)):
    """A random model with the head layout of a published one, its head tied to the embeddings or not; its processor."""
    processor = conftest.build_processor(family)
    model = conftest.build_model(family, processor, heads)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = tied
    return type(model)(model.config), processor


# ---------------------------------------------------------------------------------------------
# vLLM

VARIANTS = {f"{family} {'tied' if tied else 'untied'}": (family, tied) for family in FAMILIES for tied in (True, False)}
PROMPTS = [*conftest.IMAGES, "two", "text"]


def needs_vllm(test):
    """A test for `pytest -m slow`, where it skips without vllm, and for `pytest -m vllm`, where it cannot."""
    return pytest.mark.slow(pytest.mark.vllm(test))


@pytest.fixture(scope="module")
def vllm(data_path, tmp_path_factory, request):
    """What fake_cuda.py tells of each variant."""
    if "vllm" not in {d.metadata["Name"] for d in importlib.metadata.distributions()}:
        leave = pytest.fail if request.config.option.markexpr == "vllm" else pytest.skip
        leave("the vllm of requirements.txt, a CUDA build, is not installed here")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "lib").mkdir()  # the extensions are linked against the driver; any library may bear its name
    (folder / "lib" / "libcuda.so.1").symlink_to(Path(torch.__file__).parent / "lib" / "libc10.so")
    for name, which in VARIANTS.items():
        for part in variant(*which):
            part.save_pretrained(folder / name)
    path = f"{folder / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fake_cuda.py", folder, data_path, *(folder / name for name in VARIANTS)],
        env=os.environ | {"LD_LIBRARY_PATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name, kind", [
    *((name, "reload") for name in VARIANTS), ("qwen2_vl tied", "reload with low ranks")])
@needs_vllm
def test_a_reload_is_a_fresh_load_bit_for_bit(vllm, name, kind):
    """Twice in a row; all stays in its place, where CUDA graphs look for it, and buffers are as they were."""
    found = vllm[name][kind]
    assert found["parameters"] > 40 and found["buffers"] > 0
    assert [found[wrong] for wrong in ("unlike", "stale", "moved", "other buffers")] == [[], [], [], []]


@pytest.mark.parametrize("name", VARIANTS)
@needs_vllm
def test_a_sync_wakes_reloads_and_forgets_in_that_order(vllm, name):
    """Weights first, since they need room; the cache's memory last, when what was gathered for them is free again."""
    assert vllm[name]["reload"]["calls"] == 2 * [[
        "sleep 1", "wake_up weights", "reload_weights", "reset_prefix_cache", "reset_mm_cache",
        "reset_encoder_cache", "wake_up kv_cache"]]


@pytest.mark.parametrize("name", VARIANTS)
@needs_vllm
def test_a_weight_that_never_comes_ends_the_sync(vllm, name):
    said = vllm[name]["reload"]["withheld"]
    assert len(said) == (3 if VARIANTS[name][1] else 4)
    for text in said.values():
        assert "1 weights of the sampler never came" in text


@pytest.mark.parametrize("name", VARIANTS)
@needs_vllm
def test_prompts_arrive_token_for_token(vllm, name):
    """As vLLM's own processor expands them; pictures to the last bit of bfloat16, each prompt with two answers."""
    rows = vllm[name]["prompts"]
    assert vllm[name]["runner V2"] and [row["id"] for row in rows] == PROMPTS
    for row in rows:
        assert row["tokens"] and all(row["pixels"]) and row["answers"] == [True, True], row["id"]
        # temperature, top_p, top_k, penalty, tokens: ours alone, no default of the checkpoint
        assert row["asked"] == [0.7, 0.9, 0, 1.0, 8] and row["banned"] and row["ends"], row["id"]
    assert [len(row["pixels"]) for row in rows] == [1] * 8 + [0, 0]  # those of "two" were sent before


@needs_vllm
def test_the_noise_of_a_request_is_of_seed_step_prompt_and_index_alone(vllm):
    """A token's noise is a function of its request's seed, its position and its id (vllm 0.25.1: gumbel_block_argmax in
    v1/worker/gpu/sample/gumbel.py), and neither of the batch nor of a generator that goes on; so all is in the seed."""
    seeds = vllm["qwen2_vl tied"]["seeds"]
    assert seeds["one"] == seeds["wanted"] and len({*seeds["one"]}) == 9  # three prompts, three answers
    assert seeds["again"] == seeds["one"]  # whatever numpy's and torch's generators hold, as after a resume
    assert not {*seeds["one"]} & {*seeds["another --seed"]} and not {*seeds["one"]} & {*seeds["another step"]}


@needs_vllm
def test_the_noise_of_an_unseeded_request_is_numpys(vllm):
    """Why each request has a seed: vLLM sets numpy's when it starts, so that a resumed run would replay its noise, and
    all values of --seed would share it (SamplingStates in v1/worker/gpu/sample/states.py)."""
    seeds = vllm["qwen2_vl tied"]["seeds"]
    assert seeds["unseeded"] == seeds["unseeded, another --seed"]
    assert seeds["unseeded"] != seeds["unseeded, another state of numpy"]


# ---------------------------------------------------------------------------------------------
# Flex attention

def flex_as_on_cuda(patch=setattr):
    """Packed rows go the way they go on CUDA, by the function that is compiled there; returns a list of its graphs."""
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append([tuple(x.shape) for x in inputs if torch.is_tensor(x)])
        return graph.forward

    torch._dynamo.reset()
    patch(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)  # refuses gradients on a CPU
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=as_it_is)):
        patch(siblings, "flex_attention", siblings.compiled_flex_attention.__wrapped__())
    patch(siblings, "pack", functools.partial(siblings.pack, flex=True))
    return graphs


class Catcher:
    """An optimiser that keeps the gradient of an update, in float32 and as one vector, and changes nothing."""

    def __init__(self, policy):
        self.weights = [p for p in policy.parameters() if p.requires_grad]

    def step(self):
        whole = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in self.weights]
        self.gradient = torch.cat([g.float().flatten() for g in whole])

    def zero_grad(self):
        for weight in self.weights:
            weight.grad = None


def update(model, processor, samples, dtype=torch.float32, checkpointing=False, budget=16384):
    """The gradient of an update of the language model, the loss and the gradient's norm."""
    model = copy.deepcopy(model)
    freeze(model, False, False, True)
    if checkpointing:
        model.gradient_checkpointing_enable()
    policy = shard(branching(model, processor, 64), dtype).train()
    catcher = Catcher(policy)
    sums, norm, _ = train_grpo.update(policy, catcher, samples, None, None, replace(ARGS, micro_batch_tokens=budget))
    return catcher.gradient, sums["loss"], norm


def off(got, want):
    return ((got[0] - want[0]).norm() / want[0].norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flex_attention_has_the_gradient_of_the_rectangles(tiny, one_rank, tmp_path, monkeypatch, checkpointing):
    samples = random_groups(tiny, tmp_path, 5)
    want = update(tiny.model, tiny.processor, samples, budget=500)
    graphs = flex_as_on_cuda(monkeypatch.setattr)
    got = update(tiny.model, tiny.processor, samples, checkpointing=checkpointing, budget=500)
    assert graphs and off(got, want) < 1e-5
    assert got[1:] == pytest.approx(want[1:], rel=1e-5)


@pytest.mark.parametrize("count", [1, None])
@pytest.mark.parametrize("tied", [True, False])
def test_flex_attention_in_bf16_with_fsdp_and_checkpointing(qwen, one_rank, tmp_path, monkeypatch, tied, count):
    """No further from float32 than the rectangles in bf16, on real heads, for one sample and for many; and in float32
    the same."""
    model, processor = variant("qwen2_5_vl", tied)
    samples = random_groups(qwen, tmp_path, 5)[:count]
    want = update(model, processor, samples)
    plain = update(model, processor, samples, torch.bfloat16, True, 500)
    graphs = flex_as_on_cuda(monkeypatch.setattr)
    assert off(update(model, processor, samples), want) < 1e-5
    got = update(model, processor, samples, torch.bfloat16, True, 500)
    assert graphs and 1e-3 < off(got, want) < max(2e-2, 1.2 * off(plain, want))
    assert got[1:] == pytest.approx(want[1:], rel=2e-2)


def with_siblings(tiny):
    return mixed(tiny) + [replace(s, completion_ids=ids, sampler_logprobs=[-1.0] * len(ids), advantage=0.3)
                          for ids in ([9], [10, 11, 12]) for s in mixed(tiny)]


def on_two_ranks(words):
    """What each of two ranks does; the first one writes what they found."""
    utils.start_ranks()
    out, data, path = map(Path, words)
    tiny = conftest.fresh(path, data)
    flex_as_on_cuda()
    got = update(tiny.model, tiny.processor, with_siblings(tiny)[utils.rank() :: 2], torch.bfloat16, True, 500)
    if utils.rank() == 0:
        torch.save(got, out)
    dist.destroy_process_group()


def test_flex_attention_on_two_ranks(qwen, data_path, one_rank, tmp_path):
    codes, _, err = fork(tmp_path / "got.pt", data_path, qwen.path, act=on_two_ranks, ranks=2)
    assert codes == [0, 0], err[-3000:]
    want, plain = (update(qwen.model, qwen.processor, with_siblings(qwen), *how)
                   for how in ((torch.float32, False), (torch.bfloat16, True, 500)))
    got = torch.load(tmp_path / "got.pt")
    assert off(got, want) < max(2e-2, 1.2 * off(plain, want)) and got[2] == pytest.approx(want[2], rel=2e-2)


def test_few_graphs_serve_all_lengths(qwen, tmp_path, monkeypatch):
    """Dynamo gives up compiling after `recompile_limit` graphs, and flex attention uncompiled holds every score."""
    graphs = flex_as_on_cuda(monkeypatch.setattr)
    policy, lengths, counts = branching(qwen.model, qwen.processor), [], []
    for seed in range(8):
        samples = random_groups(qwen, tmp_path, seed)[: 1 + 2 * seed]
        batch = policy.batch(samples)
        lengths.append(batch["inputs"]["input_ids"].shape[1])
        with torch.set_grad_enabled(seed % 3 > 0):
            policy(batch, 1.0)
        counts.append(len(graphs))
    assert len({*lengths}) == 8 and min(lengths) < 128 < max(lengths)  # 128: a block of the mask
    assert 2 <= counts[-1] <= 4 and counts[-1] == counts[4]
    assert counts[-1] < torch._dynamo.config.recompile_limit


# ---------------------------------------------------------------------------------------------
# The embedded sampler, in what GPUs compute in


def test_large_scores_are_not_rounded_to_bf16(qwen):
    """Against a trainer in bf16, a shared prompt cache strays little more than the library's own attention.

    The story: scores in bf16 lie whole nats apart where a key's bias lifts them into the hundreds. The gap was thirteen
    times the library's; it is three times.
    """
    model, processor = variant("qwen2_5_vl", True)
    for layer in model.model.language_model.layers:
        torch.manual_seed(1)
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=30)
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    for weight in model.parameters():  # and no buffer
        weight.data = weight.data.bfloat16()
    gaps = []
    for sharing in (None, Sharing(model, processor, 0)):
        done = HFEngine(model, processor, 64, sharing).generate(qwen.samples, 4, 1.0, 1.0, 32, 0)
        with torch.no_grad():
            theirs = trainer_logprobs(Policy(model, processor), done, processor, 1.0)
        gaps.append(mean_gap(theirs, [s.sampler_logprobs for s in done]))
    plain, shared = gaps
    assert 1e-3 < plain < 2e-2 and shared < 5 * plain
