"""Tier 1 and 2: how a policy comes from files to shards, what offload and LoRA change, and what they must not."""

import json
import os
import re
import shutil
import sys
from functools import partial
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import doctor
import policy
import rollout
import train_grpo
import utils
from conftest import answered, branching, build_model, build_processor, fresh
from policy import add_lora, freeze, load_model, LowRank, Policy, shard, twin, whole, whole_weights
from runs import at_call, ROOT, run, splits, timeless, TINY

LOW = torch.bfloat16
HEADS = {"heads": (16, 2), "head_dim": 32}  # of Qwen2.5-VL-3B, each a quarter as wide


def gradients(trained, samples, args=train_grpo.Args(tis_cap=0.0, max_grad_norm=1e9)):
    """Those of an update, by name and in one piece."""
    seen = {}

    class Keep:
        def step(self):
            seen.update({name: whole(p.grad).clone() for name, p in trained.named_parameters() if p.grad is not None})

        def zero_grad(self):
            trained.zero_grad()

    train_grpo.update(trained, Keep(), samples, None, None, args)
    return seen


def apart(some, others):
    """The largest difference of two dictionaries of tensors, beside the largest value."""
    assert some.keys() == others.keys() and some
    most = max(x.abs().max() for x in others.values())
    return max((some[n].float() - others[n].float()).abs().max() for n in some) / most


@pytest.fixture
def real(tiny_paths, data_path):
    """A Qwen2.5-VL with the real layout of heads, its language trainable, and answers."""
    tiny = fresh(tiny_paths["qwen2_5_vl"], data_path)
    tiny.model = build_model("qwen2_5_vl", tiny.processor, **HEADS)
    freeze(tiny.model, False, False, True)
    tiny.done = answered(tiny.samples, tiny.processor)
    return tiny


# ---------------------------------------------------------------------------------------------
# From files to the host


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("said", ["bfloat16", "float32"])
def test_weights_come_as_the_files_have_them(tmp_path, stored, said):
    """Whatever config.json calls them; buffers stay float32."""
    folder = shutil.copytree(ROOT / "toy_model", tmp_path / "model")
    weights = load_model(folder).state_dict()
    model = load_model(folder, stored)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    utils.write_json(folder / "config.json", config | {"dtype": said})
    got = load_model(folder)
    assert {w.dtype for w in got.parameters()} == {stored}
    assert {b.dtype for b in got.buffers() if b.is_floating_point()} == {torch.float32}
    assert all(torch.equal(w, weights[n].to(stored)) for n, w in got.state_dict().items())


def host_bytes():
    """What this process holds by itself, without pages of files: RssAnon."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_ranks_share_the_files_pages(tmp_path):
    """64 MB of weights as the files have them cost a rank next to nothing; in another dtype all of it."""
    folder = shutil.copytree(ROOT / "toy_model", tmp_path / "model")
    model = load_model(folder, LOW)
    model.resize_token_embeddings(2**18)  # x 96 x 2 bytes
    model.save_pretrained(folder)
    held = []
    for dtype in (None, torch.float32):
        before = host_bytes()
        model = load_model(folder, dtype)
        held.append(host_bytes() - before)
    size = sum(w.nbytes for w in model.parameters())
    assert held[0] < size / 8 < size / 2 < held[1], (held, size)


# ---------------------------------------------------------------------------------------------
# From the host to shards


@pytest.mark.parametrize("offload", [False, True])
def test_what_trains_is_float32_and_the_rest_in_the_compute_dtype(real, one_rank, offload):
    real.model = twin(real.model, LOW)  # as a hub's checkpoint comes
    exact = {n: w.detach().clone() for n, w in real.model.named_parameters()}
    sharded = shard(Policy(real.model, real.processor), LOW, offload)
    for name, weight in sharded.model.named_parameters():
        assert isinstance(weight, DTensor)
        assert weight.dtype == (torch.float32 if weight.requires_grad else LOW), name
        assert torch.equal(weight.full_tensor(), exact[name].to(weight.dtype)), name
    trained = {w.requires_grad for w in sharded.model.parameters()}
    assert trained == {True, False}


def test_no_pass_leaves_weights_gathered(real, one_rank):
    """A reference's, or a rehearsal's, would take the memory that the sampler wakes up into."""
    sharded = shard(Policy(real.model, real.processor), LOW)
    with torch.no_grad():
        sharded(sharded.batch(real.done), 1.0)
    assert all(isinstance(w, DTensor) for w in sharded.parameters())
    gradients(sharded, real.done)
    assert all(isinstance(w, DTensor) for w in sharded.parameters())


def float32_bytes(weights):
    return sum(w.nbytes for w in weights if w.dtype == torch.float32)


def test_a_layer_at_a_time(one_rank, monkeypatch):
    """No more than one group is unsharded in float32 at any moment, and the host's weights go as they are taken."""
    processor = build_processor("qwen2_5_vl")
    model = twin(build_model("qwen2_5_vl", processor, num_hidden_layers=12), LOW)
    freeze(model, False, False, True)
    model_bytes, most = sum(4 * p.numel() for p in model.parameters()), []
    wrap = policy.fully_shard

    def watch(module, **options):  # what float32 there is beside shards when a group is wrapped
        most.append(float32_bytes(w for w in model.parameters() if not isinstance(w, DTensor)))
        return wrap(module, **options)

    monkeypatch.setattr(policy, "fully_shard", watch)
    shard(Policy(model, processor), LOW)
    decoder = model.get_decoder()
    layer = float32_bytes(decoder.layers[0].parameters())
    assert len(most) == 13 and max(most[:-1]) == layer < model_bytes / 13
    assert most[-1] == float32_bytes([decoder.norm.weight, model.get_output_embeddings().weight])  # the root's


def test_a_twin_shares_no_weight_with_what_trains(real, one_rank):
    """A reference's host memory is the policy's until one of the two is sharded."""
    reference = twin(real.model).requires_grad_(False)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(reference.parameters(), real.model.parameters()))
    assert reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    sharded = shard(Policy(reference, real.processor), torch.float32)  # one rank: nothing is wrapped
    trained = shard(Policy(real.model, real.processor), torch.float32)
    before = {n: w.clone() for n, w in sharded.named_parameters()}
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(1)
    assert all(torch.equal(w, before[n]) for n, w in sharded.named_parameters())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (LOW, 0.0)])
def test_offload_changes_no_gradient(real, one_rank, dtype, bound):
    """Shards that wait on the host compute the same; in float32 they are compared with what is not sharded."""
    found = [gradients(shard(branching(twin(real.model), real.processor), dtype, offload), real.done)
             for offload in (False, True)]
    assert apart(*found) <= bound


# ---------------------------------------------------------------------------------------------
# LoRA


def with_lora(real, rank=4, alpha=8.0):
    """The model with updates that are not 0, and the plain model that they amount to."""
    model = twin(real.model)
    count = add_lora(model, rank, alpha, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LowRank):
                layer.lora_b.copy_(0.1 * torch.randn(layer.lora_b.shape, generator=generator))
    plain = twin(real.model, torch.float32)
    plain.load_state_dict(dict(whole_weights(model)), strict=False)
    return model, plain, count


def test_lora_by_hand():
    """W = (1 2), A = (3 1), B = 2, alpha / rank = 8: y = (1 2) x + 8 * 2 * (3 1) x, merged (49 18)."""
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.__class__, layer.scale = LowRank, 8.0
    layer.weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
    layer.lora_a, layer.lora_b = (torch.nn.Parameter(torch.tensor(x)) for x in ([[3.0, 1.0]], [[2.0]]))
    x = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    assert layer(x).tolist() == [[31.0], [60.5]]  # 49 - 18, and 24.5 + 36
    assert layer.merged().tolist() == [[49.0, 18.0]]


def test_lora_at_its_start_is_the_plain_model(real, one_rank):
    model = twin(real.model)
    count = add_lora(model, 4, 8.0, seed=0)
    named = dict(model.named_parameters())
    trained = [n for n, w in named.items() if w.requires_grad]
    # 7 linear layers in each of 2 decoder layers, an A and a B each; 512 wide, 64 a key-value head's, 64 in the MLP
    assert len(trained) == 28 and all(".lora_" in n and "language_model.layers" in n for n in trained)
    sizes = [(512, 512), (512, 64), (512, 64), (512, 512), (512, 64), (512, 64), (64, 512)]
    assert count == sum(2 * 4 * (a + b) for a, b in sizes) == sum(named[n].numel() for n in trained)
    again = twin(real.model)
    add_lora(again, 4, 8.0, seed=0)
    other = twin(real.model)
    add_lora(other, 4, 8.0, seed=1)
    first = trained[0]
    assert torch.equal(named[first], dict(again.named_parameters())[first])
    assert not torch.equal(named[first], dict(other.named_parameters())[first])
    plain = dict(real.model.named_parameters())
    merged = dict(whole_weights(model))
    assert merged.keys() == plain.keys() and all(torch.equal(merged[n], plain[n]) for n in plain)


def test_lora_computes_what_its_merged_weights_do(real, one_rank):
    model, plain, _ = with_lora(real)
    moved = max((a - b).abs().max() for a, b in zip(plain.parameters(), real.model.parameters()))
    assert moved > 0.01
    with torch.no_grad():
        got, want = (Policy(m, real.processor) for m in (model, plain))
        got, want = (p(p.batch(real.done), 1.0)[0] for p in (got, want))
    assert (got - want).abs().max() < 1e-4 < want.abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sharing", [False, True])
def test_lora_gradients_are_those_of_the_dense_reference(real, one_rank, sharing, checkpointing):
    """With W + scale B A in place of W: dB = scale dW A^T, dA = scale B^T dW."""
    model, plain, _ = with_lora(real)
    for weight in plain.parameters():
        weight.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable()
    make = branching if sharing else Policy
    dense = gradients(make(plain, real.processor).train(), real.done)
    got = gradients(make(model, real.processor).train(), real.done)
    want = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            grad = dense[f"model.{name}.weight"]
            want[f"model.{name}.lora_a"] = layer.scale * layer.lora_b.T @ grad
            want[f"model.{name}.lora_b"] = layer.scale * grad @ layer.lora_a.T
    assert apart(got, want) < 1e-5 and len(want) == 28


def test_lora_in_bf16_through_shards(real, one_rank):
    """The frozen base rests in bf16, A and B are float32 masters, and gradients point where float32's do."""
    model, _, _ = with_lora(real)
    exact = gradients(Policy(twin(model), real.processor), real.done)
    sharded = shard(branching(model, real.processor), LOW, offload=True).train()
    for name, weight in sharded.named_parameters():
        assert weight.dtype == (torch.float32 if ".lora_" in name else LOW)
    low = gradients(sharded, real.done)
    pairs = [torch.cat([g[n].flatten().float() for n in sorted(exact)]) for g in (low, exact)]
    assert torch.nn.functional.cosine_similarity(*pairs, dim=0) > 0.99
    merged = dict(whole_weights(sharded.model))
    layer = next(n for n, m in model.named_modules() if isinstance(m, LowRank))
    assert merged[f"{layer}.weight"].dtype == torch.float32  # what is added is not rounded before the sum


def test_everyone_else_sees_a_plain_model(real, one_rank, tmp_path):
    """A checkpoint, the embedded sampler, and what vLLM would be sent."""
    model, plain, _ = with_lora(real)
    lora = Policy(model, real.processor)
    lora.export(tmp_path, torch.float32)
    saved = load_model(tmp_path).state_dict()
    want = plain.state_dict()
    assert saved.keys() == want.keys() and all(torch.equal(saved[n], want[n]) for n in want)
    engine = rollout.make_engine("hf", real.model, real.processor, rollout.Args())
    engine.sync(model)
    said = engine.generate(real.samples, 2, 1.0, 1.0, 8, "lora")
    engine.sync(plain)
    again = engine.generate(real.samples, 2, 1.0, 1.0, 8, "lora")
    assert [s.completion_ids for s in again] == [s.completion_ids for s in said]
    with torch.no_grad():
        table, _ = lora(lora.batch(said), 1.0)
    off = [abs(x - y) for row, s in zip(table.tolist(), said) for x, y in zip(row, s.sampler_logprobs)]
    assert max(off) < 1e-3


# ---------------------------------------------------------------------------------------------
# Runs


def die(*_):
    os._exit(9)


@pytest.mark.parametrize("trainer, words, ranks", [
    ("train_grpo", "--lora_rank 4 --lora_alpha 8", 1),
    pytest.param("train_grpo", "--lora_rank 4 --offload --dtype bfloat16 --gradient_checkpointing --kl_coef 0.01 "
                 "--train_connector", 2, marks=pytest.mark.slow),
    pytest.param("train_sft", "--lora_rank 4 --offload", 1, marks=pytest.mark.slow)])
def test_a_run_with_updates_or_offload_goes_on_bit_for_bit(data, tmp_path, trainer, words, ranks):
    """Killed in its third step; its checkpoints are plain models, and what the two runs end with is the same."""
    tiny = TINY if trainer == "train_grpo" else "--batch_size 4 --save_every 1".split()
    words = [f"{trainer}.py", *tiny, *splits(data)[:2], "--validation_data=", "--test_data=", "--max_steps", 4,
             "--lr", 1e-3, *words.split()]
    calm, out = tmp_path / "calm", tmp_path / "run"
    run(*words, "--out", calm, ranks=ranks)
    run(*words, "--out", out, ranks=ranks, code=9, fault=partial(at_call, 3, f"{trainer}.update", die))
    _, log = run(*words, "--out", out, ranks=ranks)
    assert "Continuing after step 2" in log
    assert timeless(out / "metrics.jsonl") == timeless(calm / "metrics.jsonl")
    last = "checkpoints/step_000004/model.safetensors"
    assert (out / last).read_bytes() == (calm / last).read_bytes()
    assert not [name for name in load_file(out / last) if "lora" in name]
    base, moved = (load_model(folder).state_dict() for folder in (ROOT / "toy_model", (out / last).parent))
    assert base.keys() == moved.keys()
    changed = {n for n in base if not torch.equal(base[n].to(moved[n].dtype), moved[n])}
    part = "language_model.layers.|merger" if "connector" in str(words) else "language_model.layers."
    assert changed and all(re.search(part, n) for n in changed)


def test_the_sampler_starts_and_sleeps_before_the_device_is_taken(data, tmp_path, one_rank, monkeypatch):
    """vLLM refuses to start where it finds less memory than its share; and it wakes up for the rehearsal."""
    calls, make, wrap, look = [], rollout.make_engine, policy.shard, doctor.rehearse

    def engine(*values):
        made = make(*values)
        for name in ("sync", "sleep"):
            act = getattr(made, name)
            setattr(made, name, lambda *v, name=name, act=act: calls.append(name) or act(*v))
        calls.append("start")
        return made

    monkeypatch.setattr(rollout, "make_engine", engine)
    monkeypatch.setattr(policy, "shard", lambda made, *v: calls.append(
        "policy" if any(p.requires_grad for p in made.parameters()) else "reference") or wrap(made, *v))
    monkeypatch.setattr(doctor, "rehearse", lambda *v: calls.append("rehearse") or look(*v))
    monkeypatch.setattr(utils, "begin_run", mock.Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        train_grpo.main(train_grpo.Args(
            train_data=str(data / "train.jsonl"), validation_data="", test_data="", batch_size=4, mini_batch_size=4,
            kl_coef=0.1, out=str(tmp_path / "run")))
    assert calls == ["start", "sleep", "reference", "policy", "sync", "rehearse"]  # a reference in float32 is a waste


@pytest.mark.parametrize("script", ["train_grpo.py", "train_sft.py"])
def test_lora_without_a_language_is_refused(data, tmp_path, script):
    _, log = run(script, *splits(data), "--batch_size", 4, *(TINY[2:4] if "grpo" in script else ()), "--lora_rank", 4,
                 "--no-train_language", "--train_connector", "--out", tmp_path / "run", code=2)
    assert "--lora_rank 4 is for the language model: give --train_language" in log and "Traceback" not in log
