"""A museum of bugs that other projects shipped, each run here beside the form that is right.

Every docstring says whose bug it was and what it did. The test shows that the buggy form is wrong
on our models, and that ours is not: when one of these comes back, a test with its story fails.
Stories with two ranks, and stale `rope_deltas`, are in test_parity.py.
"""

import copy
import importlib
import json
import math
import os
import pickle
import random
import re
import shutil
import runpy
import signal
import sys
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from PIL import Image

import conftest
import doctor
import evaluate
import reward
import rollout
import scoring
import train_grpo
import train_sft
import utils
from conftest import answered, branching, load_tiny, png, sampler
from data import (
    banned_ids, conversation, INSTRUCTION, load_samples, make_sample, refuse_mixture, tokenise)
from pictures import as_png, open_image
from policy import collate, drop_nothing, freeze, image_inputs, load_model, load_processor, Policy, shard, split_rows
from siblings import pack, Sharing
from test_parity import ARGS, assert_same_gradients, by_id, gradients, mixed, plain_inputs, plain_logprobs, Probe
from test_engines import ask, served  # noqa: F401  (served is a fixture)


@torch.no_grad()
def logprobs_of(tiny, samples, temperature=1.0):
    return Policy(tiny.model, tiny.processor)(collate(samples, tiny.processor), temperature)[0]


def differ(a, b, by=1e-3):
    return (a - b).abs().max().item() > by


# ---------------------------------------------------------------------------------------------
# Data: images, placeholders, prompts


def test_placeholders_expanded_twice(tiny):
    """trl#6294, #6401: ids with N placeholders were given to vLLM together with the image, which
    expanded them again; half of the answers came out empty. Ours: the sampler gets the text with
    one placeholder an image, the trainer the expanded ids, and the first expands into the
    second."""
    sample = by_id(tiny.samples, "grey")[0]
    image, pad = [open_image(sample.images[0])], tiny.processor.image_token_id
    assert sample.prompt_text.count(tiny.processor.image_token) == 1
    once = tiny.processor(text=[sample.prompt_text], images=image)["input_ids"][0]
    assert list(once) == sample.prompt_ids and once.count(pad) > 1
    with pytest.raises((ValueError, StopIteration)):  # transformers notices, vLLM did not
        tiny.processor(text=[tiny.processor.tokenizer.decode(once)], images=image)


def test_truncation_through_an_image(qwen, data_path, capsys):
    """Qwen-VL-Series-Finetune#152, open-r1-multimodal#28, verl#3469: a prompt cut to length lost
    some of its placeholders ("image features and image tokens do not match"). Ours drops it and
    says so."""
    long = answered(by_id(qwen.samples, "two"), qwen.processor)[0]
    limit = len(long.prompt_ids) - 20
    with pytest.raises(ValueError, match="do not match"):
        logprobs_of(qwen, [replace(long, prompt_ids=long.prompt_ids[-limit:])])
    kept = load_samples(data_path, qwen.processor, limit)
    assert all(s in qwen.samples for s in kept)  # whole, or not there
    dropped = [s.id for s in qwen.samples if len(s.prompt_ids) > limit]
    assert "two" in dropped and len(kept) + len(dropped) == len(qwen.samples)
    assert f"left out {len(dropped)} of {len(qwen.samples)}" in capsys.readouterr().err


def test_a_sampled_placeholder(qwen):
    """R1-V#91 and #180, EasyR1#110, trl#3847 and three more: hours into a run the policy samples
    <|image_pad|>, and the trainer finds one placeholder more than it has image features."""
    wish = torch.zeros(len(qwen.processor.tokenizer))
    wish[qwen.processor.image_token_id] = 5.0
    qwen.model.get_output_embeddings().register_forward_hook(lambda module, args, out: out + wish)
    engine = sampler(qwen.model, qwen.processor, 64)
    fine = engine.generate(qwen.samples[:3], 2, 1.0, 1.0, 8, 0)
    assert logprobs_of(qwen, fine).isfinite().all()
    engine.banned = []
    wild = engine.generate(qwen.samples[:3], 2, 1.0, 1.0, 8, 0)
    with pytest.raises(ValueError, match="do not match"):
        logprobs_of(qwen, wild)


def test_a_ban_in_the_sampler_alone(qwen):
    """The half cure of pitfall 3: banning an id in the sampler but not in the trainer leaves the
    ratio off by log(1 - p) on every token, p being the probability of what is banned."""
    wish = torch.zeros(len(qwen.processor.tokenizer))
    wish[qwen.processor.image_token_id] = 5.0
    qwen.model.get_output_embeddings().register_forward_hook(lambda module, args, out: out + wish)
    engine = sampler(qwen.model, qwen.processor, 8)
    done = engine.generate(qwen.samples[:1], 1, 1.0, 1.0, 6, 0)
    reported = torch.tensor([done[0].sampler_logprobs])
    policy = Policy(qwen.model, qwen.processor)
    with torch.no_grad():
        assert not differ(policy(collate(done, qwen.processor), 1.0)[0], reported, 1e-4)
        policy.banned = []
        assert differ(policy(collate(done, qwen.processor), 1.0)[0], reported, 0.1)


def test_one_small_image_resizes_all_later_ones(qwen):
    """VLM-R1: the resize stood outside its `if`, so after one image below 28 pixels every later
    image took *its* size. Ours: an image's tensors depend on nothing that came before."""
    small, large = by_id(qwen.samples, "dot", "grey")
    size = None

    def buggy(image):
        nonlocal size
        if min(image.size) < 28:
            size = (28, 28)
        return image.resize(size) if size else image

    sizes = [buggy(open_image(s.images[0])).size for s in (large, small, large)]
    assert sizes == [(100, 100), (28, 28), (28, 28)]
    grids = []
    for order in ((large,), (small, large)):
        image_inputs.cache_clear()
        for s in order:
            grid = image_inputs(qwen.processor, s.images[0])["image_grid_thw"]
        grids.append(grid.tolist())
    assert grids[0] == grids[1] == [[1, 8, 8]]  # 100 pixels round to 112 = 8 patches of 14


def test_a_sampler_with_other_pixel_limits(qwen):
    """R1-V#63, #73: the trainer's processor and vLLM's had different max_pixels, so one image had
    two numbers of placeholders. Ours: one processor for both, and the count is checked at load."""
    sample = by_id(qwen.samples, "grey")[0]
    grids = []
    for limit in (16 * 28**2, 4 * 28**2):
        other = copy.deepcopy(qwen.processor)
        other.image_processor.size = type(other.image_processor.size)(shortest_edge=28**2, longest_edge=limit)
        grids.append(int(image_inputs(other, sample.images[0])["image_grid_thw"].prod()) // 4)
    placeholders = sample.prompt_ids.count(qwen.processor.image_token_id)
    assert placeholders == grids[0] != grids[1]


def test_the_template_that_loses_the_question(tiny):
    """MAYE: a plain string with {{question}} went through .format(), so that the model was asked
    the literal "{question}". Ours: the prompt, decoded, holds the question and the instruction
    once."""
    assert "Solve: {{question}}".format(question="What is 2 + 3?") == "Solve: {question}"
    text = tiny.processor.tokenizer.decode(by_id(tiny.samples, "text")[0].prompt_ids)
    assert text.count("What is 2 + 3?") == 1 and text.count(INSTRUCTION) == 1
    awkward = {"question": "Is {x} in {{1}} or %s?", "answer": "1"}  # nothing is ever formatted
    sample = make_sample(awkward, utils.Path("."), "here", tiny.processor)
    assert awkward["question"] in tiny.processor.tokenizer.decode(sample.prompt_ids)


def test_decoded_images_that_travel(qwen):
    """verl#3236 (1.5 TB of host memory), #5206, lmm-r1#71: decoded images were copied into each of
    the G answers and pickled between processes. Ours: a sample carries a path, decoded at the last
    moment."""
    sample = by_id(qwen.samples, "grey")[0]
    decoded = replace(sample, images=[open_image(i) for i in sample.images])
    assert len(pickle.dumps(decoded)) > 100 * 100 * 3
    assert len(pickle.dumps(sample)) < 4000


# ---------------------------------------------------------------------------------------------
# Positions, padding, masks


def test_lost_mrope(tiny):
    """MAYE, AReaL#217: ordinary 0, 1, 2, ... positions were passed in training, while the sampler
    used the image's rows and columns; every token after an image was scored by another model."""
    engine = sampler(tiny.model, tiny.processor, 8)
    done = engine.generate(by_id(tiny.samples, "grey", "line"), 1, 1.0, 1.0, 6, 0)
    for flat in (False, True):
        batch = collate(done, tiny.processor)
        if flat:
            batch["inputs"]["position_ids"] = batch["inputs"]["attention_mask"].cumsum(1) - 1
        with torch.no_grad():
            logprobs, _ = Policy(tiny.model, tiny.processor)(batch, 1.0)
        reported = train_grpo.beside(batch["mask"], done, {id(s): s.sampler_logprobs for s in done})
        assert differ(logprobs, reported) == flat


def test_token_types_padded_on_the_other_side(tiny):
    """trl#5785, hf#36100, VLM-R1#220: ids were padded on the left and a second tensor of their
    shape on the right, so that image positions were given to text. Ours: one place pads all of
    them."""
    samples = answered(by_id(tiny.samples, "grey", "rgb"), tiny.processor)
    batch = collate(samples, tiny.processor)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    assert len({batch["inputs"][name].shape for name in names}) == 1
    pads = batch["inputs"]["input_ids"] == tiny.processor.image_token_id
    assert torch.equal(batch["inputs"]["mm_token_type_ids"] == 1, pads)
    right = logprobs_of(tiny, samples)
    width, lengths = pads.shape[1], batch["inputs"]["attention_mask"].sum(1)
    index = (torch.arange(width) + lengths[:, None]) % width
    batch["inputs"]["mm_token_type_ids"] = batch["inputs"]["mm_token_type_ids"].gather(1, index)
    with torch.no_grad():
        wrong, _ = Policy(tiny.model, tiny.processor)(batch, 1.0)
    assert differ(wrong, right)


def test_a_mask_made_from_token_ids(qwen):
    """trl PR#4970, pytorch/rl PR#3578, tiny-grpo, simple_GRPO: mask = ids != pad. Where pad and EOS
    are one token, EOS is never trained and the model never learns to stop."""
    qwen.processor.tokenizer.pad_token = qwen.processor.tokenizer.eos_token
    samples = [replace(s, completion_ids=[20, 21, qwen.processor.tokenizer.eos_token_id])
               for s in qwen.samples[:2]]
    batch = collate(samples, qwen.processor)
    buggy = batch["completion_ids"] != qwen.processor.tokenizer.pad_token_id
    assert buggy.sum(1).tolist() == [2, 2]
    assert batch["mask"].sum(1).tolist() == [3, 3]
    logprobs, _ = Policy(qwen.model, qwen.processor)(batch, 1.0)
    row = qwen.model.get_output_embeddings().weight
    logprobs[:, 2].sum().backward()  # EOS alone
    assert row.grad[qwen.processor.tokenizer.eos_token_id].abs().max() > 0


def test_images_repeated_in_another_order_than_prompts(qwen):
    """R1-V#4, #146: prompts went A A B B (repeat_interleave) and pixels A B A B (repeat): half of
    the answers were scored against the other prompt's picture. Ours: whole samples are repeated."""
    row = {"question": "<image>Which colour?", "answer": "1"}
    a, b = (make_sample(row | {"images": [png(c)]}, utils.Path("."), c, qwen.processor)
            for c in ("white", "red"))
    samples = [replace(s, completion_ids=[20, 21, 22]) for s in (a, a, b, b)]
    batch = collate(samples, qwen.processor)
    right = logprobs_of(qwen, samples)
    assert not differ(right[0], right[1], 1e-6) and differ(right[1], right[2])
    once = collate([a, b], qwen.processor)["inputs"]["pixel_values"]
    batch["inputs"]["pixel_values"] = once.repeat(2, 1)
    with torch.no_grad():
        wrong, _ = Policy(qwen.model, qwen.processor)(batch, 1.0)
    assert differ(wrong[0], wrong[1])


# ---------------------------------------------------------------------------------------------
# Sampler against trainer


def test_a_temperature_forgotten_in_the_trainer(qwen):
    """trl#4159, swift PR#8442, simple_GRPO: sampled at T = 0.7, scored at T = 1, so that the ratio
    was not 1 before the first update."""
    engine = sampler(qwen.model, qwen.processor, 64)
    done = engine.generate(qwen.samples, 2, 0.7, 1.0, 8, 0)
    mask = collate(done, qwen.processor)["mask"]
    reported = train_grpo.beside(mask, done, {id(s): s.sampler_logprobs for s in done})
    ratio = {t: (logprobs_of(qwen, done, t) - reported).exp()[mask] for t in (1.0, 0.7)}
    assert differ(ratio[1.0], torch.ones(()), 0.5)
    assert not differ(ratio[0.7], torch.ones(()), 1e-4)


def test_top_p_in_training(qwen):
    """trl#6789: at top_p = 0.9 the sampler renormalises by the kept mass S, the trainer does not,
    and every ratio is off by log S. Ours reports the sampler's truth, and trains at top_p = 1."""
    engine = sampler(qwen.model, qwen.processor, 64)
    gaps = {}
    for top_p in (0.9, 1.0):
        done = engine.generate(qwen.samples, 1, 1.0, top_p, 8, 0)
        mask = collate(done, qwen.processor)["mask"]
        reported = train_grpo.beside(mask, done, {id(s): s.sampler_logprobs for s in done})
        gaps[top_p] = (reported - logprobs_of(qwen, done))[mask]
    assert not differ(gaps[1.0], torch.zeros(()), 1e-5)
    # S lies between 0.9 and 1 (the token that crosses 0.9 is kept): log 1/S in (0, 0.105]
    assert (gaps[0.9] > 0).all() and gaps[0.9].max() <= -math.log(0.9) + 1e-5


def test_base_model_rollouts(qwen):
    """trl#5312, with vLLM's sleep mode: generate() reloaded the first checkpoint from disk over the
    synced weights. Every answer came from the base model and nothing crashed."""

    class Buggy(rollout.HFEngine):
        def generate(self, *args):
            self.model.load_state_dict(base)
            return super().generate(*args)

    base = copy.deepcopy(qwen.model.state_dict())
    trained = copy.deepcopy(qwen.model)
    with torch.no_grad():
        for p in trained.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    said = {}
    for Engine in (Buggy, rollout.HFEngine):
        engine = Engine(copy.deepcopy(qwen.model), qwen.processor, 64)
        before = engine.generate(qwen.samples[:3], 1, 0, 1.0, 6, 0)
        engine.sync(trained)
        after = engine.generate(qwen.samples[:3], 1, 0, 1.0, 6, 0)
        said[Engine] = [s.completion_ids for s in after] == [s.completion_ids for s in before]
    assert said == {Buggy: True, rollout.HFEngine: False}


def test_the_mismatch_metric_screams(qwen, one_rank):
    """The same story: mean |dlogp| was 0.81 in the log and nobody looked. Ours logs `sampler_gap`:
    0 when the sampler is the policy, large when it has fallen behind."""
    engine = sampler(copy.deepcopy(qwen.model), qwen.processor, 64)
    done = [replace(s, advantage=1.0) for s in engine.generate(qwen.samples, 2, 1.0, 1.0, 6, 0)]
    policy, probe, gaps = Policy(qwen.model, qwen.processor), Probe(qwen.model), []
    for stale in (False, True):
        if stale:
            with torch.no_grad():
                for p in qwen.model.parameters():
                    p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        sums, _, _ = train_grpo.update(policy, probe, done, None, None, ARGS)
        gaps.append(sums["sampler_gap"] / sums["update_tokens"])
    assert gaps[0] < 1e-5 and gaps[1] > 0.3


def test_weights_skipped_by_a_sync(qwen):
    """trl#5269, swift#9172: the trainer's weight names were not the sampler's, and a sync that is
    not strict skipped them in silence. Ours refuses a name too many and a name too few."""
    other = {f"model.{n}": p + 1 for n, p in qwen.model.state_dict().items()}
    result = copy.deepcopy(qwen.model).load_state_dict(other, strict=False)
    assert len(result.missing_keys) == len(other)  # nothing arrived, and no error
    engine = sampler(copy.deepcopy(qwen.model), qwen.processor, 64)
    wrapped = torch.nn.ModuleDict({"policy": qwen.model})
    with pytest.raises(KeyError):
        engine.sync(wrapped)
    with pytest.raises(AssertionError, match="untouched"):
        engine.sync(torch.nn.ModuleDict())


def test_features_of_an_older_vision_tower(qwen):
    """vllm#44910, trl#7198, verl#6523: image features were cached across updates of a trainable
    vision tower. Ours remembers pixels alone, so that a changed tower is seen at once."""
    sample = answered(by_id(qwen.samples, "grey"), qwen.processor)
    tower, cached = qwen.model.base_model.visual, []
    keep = tower.register_forward_hook(lambda m, args, out: cached.append(copy.copy(out)))
    before = logprobs_of(qwen, sample)
    keep.remove()
    with torch.no_grad():
        for p in tower.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    assert differ(logprobs_of(qwen, sample), before)
    tower.register_forward_hook(lambda m, args, out: copy.copy(cached[0]))
    assert not differ(logprobs_of(qwen, sample), before)  # the buggy form: as if nothing changed


def test_randomness_of_the_batch(qwen):
    """EasyR1#57, trl#3247, miles PR#3187 asked why resumed runs differ; where sampling draws from a
    global generator, they must, and so must runs on other ranks. Ours: an answer's numbers belong
    to prompt and index."""
    engine = sampler(qwen.model, qwen.processor, 64)

    def draw(global_state):
        torch.manual_seed(global_state)
        ours = engine.generate(qwen.samples[:2], 1, 1.0, 1.0, 6, 0)
        return [s.completion_ids for s in ours], torch.multinomial(torch.ones(400), 12).tolist()

    (ours, buggy), (ours_again, buggy_again) = draw(0), draw(1)
    assert buggy != buggy_again and ours == ours_again


# ---------------------------------------------------------------------------------------------
# Advantages, losses, gradients


def test_whitening_that_adds_the_mean_back():
    """MAYE: whiten(shift_mean=True) puts the mean back after dividing, so that the advantages of a
    batch with mean 0.75 have mean 0.75 too: right answers are pushed up more than wrong ones down."""
    rewards = torch.tensor([1.0, 1, 1, 0])
    buggy = (rewards - rewards.mean()) / rewards.std() + rewards.mean()
    assert buggy.mean() == pytest.approx(0.75)
    assert train_grpo.reinforce_advantages(rewards).mean() == pytest.approx(0, abs=1e-6)
    assert train_grpo.reinforce_advantages(rewards)[3] < 0


def test_groups_that_are_all_alike(qwen, one_rank):
    """swift#8429 and others: a group of equal rewards has std 0, and rounding over a tiny epsilon
    makes its advantages noise. Ours is exactly 0, and so is the gradient."""
    rewards = torch.full((7,), 0.1)
    buggy = (rewards - rewards.sum() / 7) / (rewards.std() + 1e-8)
    assert buggy.abs().max() > 0.1
    samples = [replace(s, reward=0.1) for s in mixed(qwen)]
    train_grpo.set_advantages(samples, 5, "grpo")
    policy, probe = Policy(qwen.model, qwen.processor), Probe(qwen.model)
    train_grpo.update(policy, probe, samples, None, None, ARGS)
    assert all(not g.any() for g in probe.gradients.values())


def test_nothing_was_scored():
    """swift's FAQ, trl#6369, PR#3248: when nothing is left in a mean, 0 / 0 makes a NaN that
    spreads into every weight. Ours: an answer that cannot be compared has advantage 0."""
    rewards = torch.tensor([[math.nan, math.nan], [1.0, 0.0]])
    assert rewards.nanmean(1).isnan()[0]
    assert train_grpo.grpo_advantages(rewards).isfinite().all()
    assert train_grpo.reinforce_advantages(rewards[0]).tolist() == [0, 0]


def test_all_completions_cut_off_and_masked(qwen, one_rank):
    """swift's FAQ, trl#6369, PR#3248 again, from the other side: with truncated completions masked,
    a batch in which all are is a loss of 0 / 0. Ours divides by 1 at least, and learns nothing."""
    samples = [replace(s, finish_reason="length") for s in mixed(qwen)]
    policy, probe = Policy(qwen.model, qwen.processor), Probe(qwen.model)
    batch = collate(samples, qwen.processor)
    mask = batch["mask"] & torch.tensor([[s.finish_reason == "stop"] for s in samples])
    logprobs, _ = policy(batch, 1.0)
    assert ((logprobs * mask).sum() / mask.sum()).isnan()  # the buggy form
    sums, norm, _ = train_grpo.update(policy, probe, samples, None, None,
                                      replace(ARGS, mask_truncated=True))
    assert sums["loss"] == norm == 0 and sums["update_tokens"] == 0


def test_a_rank_without_an_image_has_gradients_for_the_tower(qwen, one_rank):
    """DeepSpeed#7170, LlamaFactory PR#6233, EasyR1 PR#530: a rank whose rows hold no image never
    called the vision tower that it trains, had no gradients to reduce, and the others waited for
    ever. Ours touches the idle weights with weight 0."""
    text = collate(answered(by_id(qwen.samples, "text"), qwen.processor), qwen.processor)
    tower = [p for n, p in qwen.model.named_parameters() if "visual" in n]
    out = qwen.model(**text["inputs"], use_cache=False)  # the buggy form: the model as it comes
    out.logits.sum().backward()
    assert all(p.grad is None for p in tower)
    qwen.model.zero_grad()
    Policy(qwen.model, qwen.processor)(text, 1.0)[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in tower)


def test_a_resumed_run_that_starts_its_data_again():
    """EasyR1#57, #319, trl#3247, nemo PR#3599: the order came from a generator whose state was not
    saved, so a resumed run saw its first prompts twice and others never. Ours is a function of seed
    and epoch, and the step says where in it the run is."""
    prompts = list(range(12))

    def stateful():
        order, generator = list(prompts), random.Random(0)
        generator.shuffle(order)
        return iter([order[i : i + 3] for i in range(0, 12, 3)])

    whole = list(stateful())
    first, resumed = stateful(), stateful()  # two steps, a crash, and the program starts again
    assert [next(first), next(first), next(resumed), next(resumed)] != whole
    ours = train_grpo.epoch_batches(prompts, 3, 0, 1)
    again = train_grpo.epoch_batches(prompts, 3, 0, 1)
    assert ours[:2] + again[2:] == ours and sorted(sum(ours, [])) == prompts


def test_a_nan_stops_the_run_before_the_weights(qwen, one_rank):
    """EasyR1 skips a step whose gradient is not finite; where nobody looks, it is written into the
    weights. Ours stops and names the prompts, with the weights as they were."""
    samples = mixed(qwen)
    samples[1].advantage = math.nan
    before = [p.detach().clone() for p in qwen.model.parameters()]
    optimizer = torch.optim.SGD(qwen.model.parameters(), lr=0.1)
    with pytest.raises(utils.RunError, match="the loss is nan on the prompts .*text"):
        train_grpo.update(Policy(qwen.model, qwen.processor), optimizer, samples, None, None, ARGS)
    assert all(map(torch.equal, before, qwen.model.parameters()))
    # the buggy form: clip and step, whatever the gradient is
    logprobs, _ = Policy(qwen.model, qwen.processor)(collate(samples, qwen.processor), 1.0)
    (logprobs.sum() * math.nan).backward()
    torch.nn.utils.clip_grad_norm_(qwen.model.parameters(), 1.0)
    optimizer.step()
    assert not all(p.isfinite().all() for p in qwen.model.parameters())


def test_the_mean_of_means(qwen, one_rank):
    """trl#5619, #3021, swift#10117, MAYE, nano-aha: each micro-batch's loss was a mean over its own
    tokens, so that a token in a short micro-batch counted more. Ours divides by all tokens once."""
    samples = mixed(qwen)
    policy, probe = Policy(qwen.model, qwen.processor), Probe(qwen.model)
    results = {}
    for budget in (8192, 100):
        train_grpo.update(policy, probe, samples, None, None, replace(ARGS, micro_batch_tokens=budget))
        parts = split_rows(samples, budget)
        for part in parts:  # the buggy form
            batch = collate(part, qwen.processor)
            gain = policy(batch, 1.0)[0] * torch.tensor([[s.advantage] for s in part])
            (-gain.sum() / batch["mask"].sum() / len(parts)).backward()
        results[len(parts)] = probe.gradients, gradients(qwen.model)
        qwen.model.zero_grad()
    (ours, theirs), (others, their_others) = results.values()  # of one part, and of some
    assert_same_gradients(ours, others)
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_same_gradients(theirs, their_others)


def test_a_rank_that_runs_out_of_micro_batches(qwen, one_rank, monkeypatch):
    """verl#6176, EasyR1#11004: ranks made different numbers of passes and the sharded run hung.
    Ours fills up with passes whose mask is empty; here another rank is pretended to need seven."""
    samples, policy, probe = mixed(qwen), Policy(qwen.model, qwen.processor), Probe(qwen.model)
    passes, results = [], []
    policy.register_forward_hook(lambda *_: passes.append(1))
    for needed in (1, 7):
        monkeypatch.setattr(utils, "gather", lambda mine: [*mine, needed])
        passes.clear()
        sums, _, _ = train_grpo.update(policy, probe, samples, None, None, ARGS)
        results.append((probe.gradients, sums["loss"]))
        assert len(passes) == needed
    assert_same_gradients(results[1][0], results[0][0])
    assert results[1][1] == pytest.approx(results[0][1])


def test_labels_masked_through_a_view(qwen):
    """nano-aha: labels[~mask] = 0 wrote through a view, so the token count taken afterwards was of
    all positions and the loss shrank with padding. Ours leaves a batch as it was."""
    labels = torch.tensor([[-100, 5, 6, -100]])
    shifted = labels[:, 1:]
    shifted[shifted == -100] = 0
    assert (labels[:, 1:] != -100).sum() == 3  # the true count is 2
    batch = collate(mixed(qwen), qwen.processor)
    copied = copy.deepcopy(batch)
    Policy(qwen.model, qwen.processor)(batch, 1.0)[0].sum().backward()
    assert batch["inputs"].keys() == copied["inputs"].keys()
    assert all(torch.equal(batch["inputs"][n], copied["inputs"][n]) for n in copied["inputs"])
    assert all(torch.equal(batch[n], copied[n]) for n in ("mask", "completion_ids", "predictors"))


def test_the_entropy_of_the_sampled_token_alone(qwen):
    """MAYE logged -p log p of the sampled token as "entropy". Ours is the whole sum: for a model
    that knows nothing it is the logarithm of the number of tokens it may say."""
    with torch.no_grad():
        qwen.model.get_output_embeddings().weight.zero_()
    batch = collate(mixed(qwen), qwen.processor)
    with torch.no_grad():
        logprobs, entropies = Policy(qwen.model, qwen.processor)(batch, 1.0)
    allowed = len(qwen.processor.tokenizer) - 2  # image and video placeholders are banned
    want = torch.full((), math.log(allowed))
    assert not differ(entropies[batch["mask"]], want, 1e-4)
    assert not differ(logprobs[batch["mask"]], -want, 1e-4)
    buggy = -(logprobs.exp() * logprobs)[batch["mask"]]
    assert differ(buggy, want, 1.0)


# ---------------------------------------------------------------------------------------------
# Rewards


def test_a_grader_that_needs_the_main_thread():
    """Math-Verify#55, #50, #11, trl PR#5281: time-outs by SIGALRM fail off the main thread, or give
    0 in silence. Ours has no timer: hostile input is answered, and in a thread too."""
    found = []

    def work():
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # what the buggy form does first
        except ValueError as error:
            found.append(str(error))
        found.append(reward.is_equal("\\frac{1}{2}", "0.5"))
        found.append(reward.is_equal("9^{9^{9^9}}", "1"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread" in found[0] and found[1:] == [True, False]


def test_unscored_is_not_wrong():
    """Math-Verify's time-out came back as 0, "wrong", and right answers were punished. Ours: None
    is left out of its group's mean, so the others' advantages are as if it had not been there."""
    alone = train_grpo.grpo_advantages(torch.tensor([[1.0, 0.0]]))
    beside = train_grpo.grpo_advantages(torch.tensor([[1.0, math.nan, 0.0]]))
    buggy = train_grpo.grpo_advantages(torch.tensor([[1.0, math.nan, 0.0]]).nan_to_num())
    assert torch.equal(beside[0, [0, 2]], alone[0]) and beside[0, 1] == 0
    assert differ(buggy[0, [0, 2]], alone[0], 0.1) and buggy[0, 1] < 0


# ---------------------------------------------------------------------------------------------
# What outside eyes found: the sampler


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (1.0, 1.0), (0.6, 0.9)])
def test_a_token_drawn_from_nan(qwen, value, temperature, top_p):
    """vllm#14126, Qwen3-VL#71: every comparison with NaN is false, so that a sampler picks token 0
    ("!!!!!!") and a broken checkpoint has a bad score rather than an error. So did ours: 0.0 %.
    Now it ends the run and names the prompt. NaN and +inf anywhere do this, -inf everywhere."""
    rows = torch.zeros(2, 40)
    rows[1, 30 if value != -math.inf else slice(None)] = value
    _, logprobs = rollout.sample_tokens(rows, torch.full((2,), 0.5).double(), temperature, top_p)
    assert logprobs.isfinite().tolist() == [True, False]
    if temperature:  # the buggy form: nothing is asked but the token
        mass = (rows / temperature).softmax(-1).cumsum(-1)
        drawn = (mass <= 0.5 * mass[:, -1:]).sum(-1)
        assert drawn[0] > 0 and drawn[1] == 0
    engine = sampler(qwen.model, qwen.processor, 64)
    honest = engine.prefill

    def prefill(samples):
        logits, *rest = honest(samples)
        for row, s in zip(logits, samples):
            if s.id == "grey":
                row[30 if value != -math.inf else slice(None)] = value
        return logits, *rest

    engine.prefill = prefill
    with pytest.raises(utils.RunError, match=r"not finite on the prompts \['grey'\], .*[.]$"):
        engine.generate(qwen.samples, 2, temperature, top_p, 6, 0)
    engine.generate([s for s in qwen.samples if s.id != "grey"], 2, temperature, top_p, 6, 0)


def test_nan_in_a_later_step_and_behind_an_end(qwen, monkeypatch):
    """The same, halfway through an answer: found there too. But a row that has ended goes on being
    computed until enough others have, nobody reads what it says, and it must not end a run."""
    engine, honest = sampler(qwen.model, qwen.processor, 64), rollout.sample_tokens
    engine.eos = torch.tensor([7])  # which nothing says by itself
    ended = {}

    def drawn(*asked):
        token, logprob = honest(*asked)
        token[token == 7] = 8
        if ended["step"] == 0 and ended["first"]:
            token[0] = 7
        if ended["step"] >= 2:
            logprob[0] = math.nan
        ended["step"] += 1
        return token, logprob

    monkeypatch.setattr(rollout, "sample_tokens", drawn)
    for first in (True, False):
        ended |= {"first": first, "step": 0}
        if first:
            done = engine.generate(qwen.samples, 2, 1.0, 1.0, 6, 0)
            assert sorted(len(s.completion_ids) for s in done) == [1] + [6] * (len(done) - 1)
        else:
            with pytest.raises(utils.RunError, match="not finite on the prompts"):
                engine.generate(qwen.samples, 2, 1.0, 1.0, 6, 0)


def test_two_sources_of_eos(qwen, monkeypatch, data_path, tmp_path):
    """open-r1 PR#663: the trainer taught the tokenizer's EOS and the sampler stopped at the one of
    generation_config.json alone; where they differ, a model that has learnt to stop never does, and
    every answer is cut off. So did ours. Now one function knows all ends and the one to train."""
    ids = qwen.processor.tokenizer.convert_tokens_to_ids
    own, other, third = ids("<|im_end|>"), ids("<|endoftext|>"), ids("<|im_start|>")
    for listed, eos, want in (
            (own, own, [own]), ([own, other], own, [own, other]), ([other, own], own, [own, other]),
            (other, own, [other, own]), ([other, third, other], own, [other, third, own]),
            (None, own, [own]), (other, None, [other]), ([], own, [own])):
        config = qwen.model.generation_config
        config.eos_token_id = listed
        qwen.processor.tokenizer.eos_token_id = eos
        assert rollout.end_ids(config, qwen.processor) == want
    config.eos_token_id = qwen.processor.tokenizer.eos_token_id = None
    with pytest.raises(utils.UserError, match="no response would ever end; .*[.]$"):
        rollout.end_ids(config, qwen.processor)

    config.eos_token_id, qwen.processor.tokenizer.eos_token_id = other, own
    wish = torch.zeros(len(qwen.processor.tokenizer))
    wish[own] = 80.0  # this model has learnt to stop
    qwen.model.get_output_embeddings().register_forward_hook(lambda module, args, out: out + wish)
    engine, reasons = sampler(qwen.model, qwen.processor, 64), []
    for eos in (torch.tensor([other]), engine.eos):  # the buggy form, and ours
        engine.eos = eos
        reasons.append({s.finish_reason for s in engine.generate(qwen.samples, 2, 1.0, 1.0, 6, 0)})
    assert reasons == [{"length"}, {"stop"}]


@pytest.mark.parametrize("written", [True, False])
def test_sft_trains_the_end_where_all_stop(qwen, monkeypatch, data_path, tmp_path, written):
    """The same story, from the trainer's side, on files: the end that transformers' `generate`
    stops at, by generation_config.json or, where there is none, by config.json."""
    folder, other = tmp_path / "model", qwen.processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    qwen.model.config.text_config.eos_token_id = qwen.model.generation_config.eos_token_id = other
    qwen.model.save_pretrained(folder)
    qwen.processor.save_pretrained(folder)
    if not written:
        (folder / "generation_config.json").unlink()
    assert load_model(folder).generation_config.eos_token_id == other  # what `generate` reads
    train_sft = importlib.import_module("train_sft")
    honest, given = train_sft.with_golden_responses, []
    monkeypatch.setattr(train_sft, "with_golden_responses",
                        lambda *args: given.extend(honest(*args)) or given)
    args = train_sft.Args(model=str(folder), train_data=str(data_path), validation_data="",
                          test_data="", batch_size=99, out=str(tmp_path / "run"))
    with pytest.raises(utils.UserError, match="--batch_size 99 is more"):  # as far as we need it
        train_sft.main(args)
    assert {s.completion_ids[-1] for s in given} == {other} != {qwen.processor.tokenizer.eos_token_id}


def angles(model, distance):
    """Angles by which the language model turns a query's pairs of numbers at this distance."""
    return distance * model.base_model.language_model.rotary_emb.inv_freq.float()


def test_angles_rounded_with_the_weights(qwen):
    """transformers#29496, NeMo Automodel PR#2549: `.to(bfloat16)` casts buffers as it does weights,
    so that the frequencies of RoPE lose digits, and what is 1000 tokens away turns by another angle.
    Our sampler's copy was made so; trainer and evaluation had them right. With heads of 128 and
    theta 1e6, as in Qwen2.5-VL."""
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    model = conftest.build_model("qwen2_5_vl", qwen.processor, (4, 2), 128, rope_parameters=rope)
    exact = angles(model, 1000)
    assert exact[-1] < 0.01 and exact[0] == 1000
    buggy = copy.deepcopy(model).to(torch.bfloat16)
    assert 1.0 < (angles(buggy, 1000) - exact).abs().max() < 1.3  # radians
    args = rollout.Args(dtype="bfloat16")
    engine = rollout.make_engine("hf", model, qwen.processor, args)
    assert torch.equal(angles(engine.model, 1000), exact)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the trainer's are its own
    head, embeddings = engine.model.get_output_embeddings(), engine.model.get_input_embeddings()
    assert head.weight is embeddings.weight  # tied still


def test_no_float32_buffer_changes_its_dtype(tiny, one_rank):
    """The kind: every way in which a model is copied, cast, loaded or sharded here."""
    def floats(model):
        buffers = {n.removeprefix("model."): b for n, b in model.named_buffers()}
        return {n: b for n, b in buffers.items() if b.is_floating_point()}

    want, low = floats(tiny.model.base_model), torch.bfloat16
    assert len(want) >= 3 and {b.dtype for b in want.values()} == {torch.float32}
    args = rollout.Args(dtype="bfloat16", model=str(tiny.path))
    made = [rollout.make_engine("hf", tiny.model, tiny.processor, args).model,
            rollout.make_engine("hf", None, tiny.processor, args).model,
            load_model(tiny.path, low), copy.deepcopy(tiny.model)]
    made += [shard(Policy(model, tiny.processor), low).model for model in (tiny.model, made[-1])]
    for model in made:
        got = floats(model.base_model)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[n], want[n]) and got[n].dtype == torch.float32 for n in want)


def test_features_that_the_sampler_saw_first(tiny, one_rank):
    """The same story goes on: image features are remembered, and the sampler asks for them first,
    so that the trainer learnt on those of a tower whose angles were rounded. Ours are to the bit
    what the trainer computes by itself, sharded and in bfloat16."""
    freeze(tiny.model, False, False, True)
    prompts, args = by_id(tiny.samples, "line", "two", "grey"), rollout.Args(dtype="bfloat16")
    sharing = Sharing(tiny.model, tiny.processor)
    engine = rollout.make_engine("hf", tiny.model, tiny.processor, args, sharing)
    done = engine.generate(prompts, 2, 1.0, 1.0, 6, 0)
    seen = {image: features for image, (_, features) in sharing.vision.kept.items()}
    buggy = Sharing(tiny.model, tiny.processor).vision
    rounded = copy.deepcopy(tiny.model).to(torch.bfloat16)
    assert len(seen) == 3 and any(
        not torch.equal(x, y) for image in seen
        for x, y in zip(buggy.computed(rounded.base_model, image)[1], seen[image]))
    own = Sharing(tiny.model, tiny.processor)
    policy = shard(Policy(tiny.model, tiny.processor, own), torch.bfloat16)
    with torch.no_grad():
        policy(policy.batch(done), 1.0)
    assert own.vision.kept.keys() == seen.keys()
    for image, (_, features) in own.vision.kept.items():
        assert all(torch.equal(x, y) for x, y in zip(features, seen[image], strict=True))


WINDOWS = {
    "by layer number": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "every layer": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "by layer types": {"use_sliding_window": True, "sliding_window": 8,
                       "layer_types": ["sliding_attention", "full_attention"]}}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("change", WINDOWS.values(), ids=WINDOWS)
def test_windows_that_a_packed_row_ignores(family, change, tiny_paths, data_path, capsys):
    """LlamaFactory#7063, trl#3500: layers with a sliding window were computed without it, here where
    the answers to a prompt share a row or a cache, by 3 to 4.5 nats. Ours: such a model does not
    branch, and goes the plain way, where prompts are far longer than the window."""
    tiny = conftest.load_tiny(tiny_paths[family], data_path)
    model = conftest.build_model(family, tiny.processor, **change).eval()
    engine = sampler(copy.deepcopy(model), tiny.processor, 64)
    engine.eos = torch.arange(10, 16)  # rows end at different times, and retire
    policy = branching(model, tiny.processor)
    assert not engine.sharing.can_branch and not policy.sharing.can_branch
    assert "cannot branch a prompt" in capsys.readouterr().err
    done = engine.generate(tiny.samples, 3, 1.0, 1.0, 24, 0)
    assert min(len(s.prompt_ids) for s in done) > 16 and len({len(s.completion_ids) for s in done}) > 5
    with torch.no_grad():
        ours = policy(policy.batch(done), 1.0)[0]
        truth = [plain_logprobs(model, tiny.processor, s, 1.0)[0] for s in done]
        model.set_attn_implementation({"text_config": "branches"})  # the buggy form
        policy.sharing.can_branch = True
        packed = policy(pack(done, policy.sharing, model), 1.0)[0]
    for s, row, want in zip(done, ours, truth):
        assert not differ(row[: len(want)], want, 1e-4)
        assert not differ(torch.tensor(s.sampler_logprobs), want, 1e-4)
    assert max((row[: len(want)] - want).abs().max() for row, want in zip(packed, truth)) > 1


@pytest.mark.parametrize("change", [{"sliding_window": 8}, {"attention_chunk_size": 8}])
def test_a_cache_that_forgets_what_its_model_sees(tiny_paths, data_path, change):
    """The same from the other side: transformers' cache goes by what the config says. Qwen3-VL never
    looks there; with a window left in its config, its cache forgot what the model still sees, and a
    sampler with that cache was 8 nats off. Ours keeps all, and leaves windows to the model's mask."""
    tiny = conftest.load_tiny(tiny_paths["qwen3_vl"], data_path)
    model = conftest.build_model("qwen3_vl", tiny.processor, **change).eval()
    engine = sampler(copy.deepcopy(model), tiny.processor, 64)
    done = engine.generate(tiny.samples[:3], 2, 1.0, 1.0, 12, 0)
    truth = [plain_logprobs(model, tiny.processor, s, 1.0)[0].detach() for s in done]
    for s, want in zip(done, truth):
        assert not differ(torch.tensor(s.sampler_logprobs), want, 1e-4)
    with torch.no_grad():  # the buggy form, on the first answer
        model.base_model.rope_deltas = None
        cache = transformers.DynamicCache(config=model.config)
        prompt = plain_inputs(replace(done[0], completion_ids=[]), tiny.processor)
        model(**prompt, past_key_values=cache)
        tail, got = torch.tensor([done[0].completion_ids]), []
        for k in range(tail.shape[1] - 1):
            place = len(done[0].prompt_ids) + k + model.base_model.rope_deltas
            out = model(input_ids=tail[:, k : k + 1], past_key_values=cache, position_ids=place)
            out.logits[..., banned_ids(tiny.processor)] = -math.inf
            got.append(out.logits[0, -1].log_softmax(-1)[tail[0, k + 1]])
    assert differ(torch.stack(got), truth[0][1:], 1.0)


def test_one_greedy_answer_given_n_times(qwen):
    """vllm#5898, #1202: rows of one batch may round unlike each other, so that n greedy answers to
    one prompt are not one answer. Ours is computed once, and its log-probabilities are 0: greedy
    decoding puts the whole mass on one token."""
    engine = sampler(qwen.model, qwen.processor, 64)
    engine.decoder = None  # the bug is in the model's forward
    unlike = lambda logits: 3.0 * torch.arange(len(logits)).view(-1, 1, 1) * torch.sin(
        torch.arange(logits.shape[-1]))
    qwen.model.register_forward_hook(
        lambda module, args, out: out.logits.add_(unlike(out.logits)) is None or out)
    prompt = by_id(qwen.samples, "grey")
    once = engine.generate(prompt, 1, 0, 1.0, 8, 0)
    assert len({tuple(s.completion_ids) for s in engine.generate_batch(prompt, 4, 0, 1.0, 8, 0)}) > 1
    four = engine.generate(prompt, 4, 0, 1.0, 8, 0)
    assert four == once * 4 and {p for s in four for p in s.sampler_logprobs} == {0.0}
    four[0].rewards["accuracy"] = 1.0
    assert four[1].rewards == {} and len({id(s.completion_ids) for s in four}) == 4
# What outside eyes found: flags and measures


def flag_error(stage, words, capsys):
    with pytest.raises(SystemExit) as end:
        utils.parse_args(stage.Args, words)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_temperature_that_is_no_number(capsys):
    """Ours, before: `--temperature nan` is not <= 0, so that it was let in; every answer was token 0, the
    loss 0, and a checkpoint was saved. At 1e-40 the logits overflow to the same. Ours now: a value must lie
    inside its range, instead of not outside."""
    logits = torch.tensor([[3.0, 9.0, 1.0]])
    for word in ("nan", "1e-40"):
        temperature = float(word)
        assert not temperature <= 0  # what guarded training
        cumulative = (logits / temperature).softmax(-1).double().cumsum(-1)
        assert cumulative.isnan().all()  # of which no number is known to be above a uniform one
        for stage in (rollout, train_grpo):
            said = flag_error(stage, [f"--temperature={word}"], capsys)
            assert f"at least 0.01 and at most 100, not {temperature}" in said


def test_the_toys_validation_under_a_model_trained_on_other_data():
    """Ours, before: `train_grpo.py --train_data mine.jsonl` measured the default validation, which is the
    toy's, and reported its 46.3 %. Ours now: one sentence."""
    args = utils.parse_args(train_grpo.Args, ["--train_data", "mine.jsonl", "--test_data="])
    with pytest.raises(utils.UserError, match="--validation_data would be the toy's.*--validation_data= for none"):
        refuse_mixture(args)
    measured = utils.read_jsonl(conftest.ROOT / args.validation_data)  # what was done instead
    assert "objects are in the picture" in measured[0]["question"]


def test_wrong_by_default(qwen):
    """Ours, before: a run with a reward of its own had no accuracy, every answer was "not 1.0", so that all
    were wrong: "ratio in incorrect answers" was the ratio of all. Ours now: nobody says right or wrong."""
    samples = [replace(s, rewards={"style": 1.0}, completion_text="wait") for s in qwen.samples]
    buggy = [s.rewards.get("accuracy") == 1.0 for s in samples]
    texts = [s.completion_text for s in samples]
    assert evaluate.reflection_metrics(texts, buggy)["reflection_ratio_in_incorrect_answers"] == 1
    found = evaluate.reflection_metrics(texts, [evaluate.is_right(s.rewards) for s in samples])
    assert found["reflection_ratio_in_incorrect_answers"] is None and found["reflection_ratio"] == 1
    assert [evaluate.is_right({"accuracy": a}) for a in (1.0, 0.0, 0.5, None)] == [True, False, False, None]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not(number, tmp_path, monkeypatch, capsys):
    """Python's json writes NaN as NaN, which is no JSON: other readers stop at the line, and a mean that is
    NaN passes for a result. Ours writes none of it: the run ends with a sentence that names the value."""
    result = {"reward": 1.0, "length": number, "rewards": {"style": [number]}}
    assert re.search("NaN|Infinity", json.dumps(result))
    path = tmp_path / "file"
    for write in (utils.write_json, utils.append_jsonl, lambda p, v: utils.write_jsonl(p, [{"a": 1}, v])):
        with pytest.raises(utils.RunError, match="^length, rewards: not finite"):
            write(path, result)
        assert not path.exists()
    ends = []
    monkeypatch.setattr(utils, "start_ranks", lambda: None)
    monkeypatch.setattr(utils.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(utils, "end_run", lambda *words: ends.append(words))
    monkeypatch.setattr(sys, "argv", ["rollout.py"])
    utils.run_script(lambda args: result, rollout.Args)
    assert capsys.readouterr().out == "" and ends[0][1] == 1 and "length, rewards: not finite" in ends[0][0]


def test_a_batch_that_is_not_finite_is_still_kept(qwen, tmp_path, monkeypatch):
    """The sentence names a file with the samples; the numbers that are no JSON stand in it as text."""
    monkeypatch.setattr(utils, "run_folder", [tmp_path])
    batch = [replace(qwen.samples[0], reward=math.inf, advantage=math.nan)]
    with pytest.raises(utils.RunError, match="the loss is nan on the prompts .*rgb.*failed_batch_rank0"):
        utils.stop_if_not_finite(torch.tensor(math.nan), "loss", batch)
    row = json.loads((tmp_path / "failed_batch_rank0.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["reward"], row["advantage"], row["id"]) == ("Infinity", "NaN", "rgb")


# What outside eyes found: checkpoints and runs


def change_json(path, **values):
    utils.write_json(path, json.loads(path.read_text()) | values)


def test_a_weight_that_is_not_there(qwen, tmp_path):
    """Ours: a checkpoint without one tensor trained from random weights, with exit code 0 and
    transformers' load report for a hint. Now it is refused, and the tensor named."""
    folder = shutil.copytree(qwen.path, tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.0.mlp.up_proj.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    buggy = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        buggy.append(model.get_decoder().layers[0].mlp.up_proj.weight)
    assert differ(*buggy)
    with pytest.raises(utils.UserError, match=r"1 missing \(\S+layers.0.mlp.up_proj.weight\)"):
        load_model(folder)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_of_a_config(family, tiny_paths, data_path, tmp_path, recompute):
    """Ours: a dropout probability in a checkpoint's config was active in `.train()`, and two passes
    over one batch were 1.9 nats apart: what was trained was not the policy that had answered."""
    folder = shutil.copytree(tiny_paths[family], tmp_path / "dropping")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_json(folder / "config.json", text_config=text | {"attention_dropout": 0.5})
    tiny = load_tiny(folder, data_path)
    samples = answered(tiny.samples, tiny.processor)

    def passes(model, shared):
        if recompute:
            model.gradient_checkpointing_enable()
        policy = (branching if shared else Policy)(model, tiny.processor)
        results = []
        for mode in (True, True, False):  # the last is how it answered
            policy.train(mode)
            results.append(policy(policy.batch(samples), 1.0)[0])
            results[-1].sum().backward()
        return results

    for shared in (False, True):
        first, again, answering = passes(tiny.model, shared)
        assert torch.equal(first, again) and torch.equal(first, answering)
    first, again, _ = passes(AutoModelForImageTextToText.from_pretrained(folder), False)
    assert differ(first, again, 0.1)
    Policy(tiny.model, tiny.processor).export(tmp_path / "out", torch.float32, weights=False)  # and stays said
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["text_config"]["attention_dropout"] == 0.5


def test_dropout_wherever_it_hides():
    """The same for layers, for numbers that a module or a config holds, and for a router's noise."""
    config = SimpleNamespace(hidden_dropout=0.1, classifier_dropout=None, jitter_noise=0.1, p=0.3)
    path = torch.nn.Identity()
    path.drop_prob, path.token_dropout, path.config = 0.2, True, config
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.AlphaDropout(0.5), path,
                                torch.nn.MultiheadAttention(4, 2, dropout=0.5))
    model.config = config
    drop_nothing(model.train())
    assert (model[0].p, model[1].p, model[3].dropout, path.drop_prob) == (0, 0, 0, 0)
    assert vars(config) == {
        "hidden_dropout": 0.0, "classifier_dropout": 0.0, "jitter_noise": 0.0, "p": 0.3}
    assert path.token_dropout is True and model.source_config.hidden_dropout == 0.1
    x = torch.ones(1, 64)
    assert torch.equal(model[:2](x), x) and differ(torch.nn.Dropout(0.5)(x), x)


def test_a_checkpoint_that_says_float32_and_has_its_head_twice(tiny, tmp_path):
    """Ours: master weights were cast and handed to transformers, which asks the model for its dtype:
    config.json said float32 over bfloat16, so that it loaded into twice the memory; a cast parts
    what shares storage, so the tied head was written again; and the file was for its owner alone."""
    model = tiny.model
    cast = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "buggy", state_dict=cast)
    Policy(model, tiny.processor).export(tmp_path / "ours", torch.bfloat16)
    said, held = {}, {}
    for name in ("buggy", "ours"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        said[name] = {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]}
        held[name] = load_file(tmp_path / name / "model.safetensors")
    assert said == {"buggy": {"float32"}, "ours": {"bfloat16"}}
    tied = model.config.text_config.tie_word_embeddings  # Qwen3-VL's head is not, here
    assert len(held["buggy"]) == len(held["ours"]) + tied == len(model.state_dict())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "ours").iterdir()}
    assert modes == {0o666 & ~current_umask()}
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", dtype="auto")
    assert found.dtype == torch.bfloat16
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == tied
    assert all(torch.equal(weight, cast[name]) for name, weight in found.state_dict().items())
    tiny.processor.save_pretrained(tmp_path / "buggy")  # what was written before can be gone on from
    old = load_model(tmp_path / "buggy")
    assert (old.get_output_embeddings().weight is old.get_input_embeddings().weight) == tied


def current_umask():
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
# What outside eyes found: data


def test_pictures_in_a_column_that_is_not_read(qwen):
    """verl#6599, and ours: a parquet table was asked for its column `images` alone, so that one with
    `image` or `decoded_image` loaded as text, and a policy was trained to guess. Ours uses every
    column that has pictures, or refuses the row by the column's name."""
    row = {"question": "How many?", "answer": "3"}
    for column in ("image", "decoded_image", "photo"):
        table_row = row | {column: {"bytes": png("red"), "path": None}}
        assert [image["bytes"] for image in table_row.get("images") or []] == []  # the buggy form
        if column == "photo":
            with pytest.raises(utils.UserError, match='here: the field "photo" holds a picture'):
                make_sample(table_row, Path("x"), "here", qwen.processor)
        else:
            sample = make_sample(table_row, Path("x"), "here", qwen.processor)
            assert sample.prompt_ids.count(qwen.processor.image_token_id) == 4


@pytest.mark.parametrize("field", ["videos", "video", "clip", "audio"])
def test_a_video_read_as_text(qwen, field):
    """VILA#87, ms-swift#4772, and ours: a row with a video was read as text, <video> and all."""
    row = {"question": "<video>What happens?", "answer": "3", field: ["a.mp4"]}
    buggy = "<video>" in qwen.processor.apply_chat_template(
        conversation(row["question"]), tokenize=False)
    assert buggy
    with pytest.raises(utils.UserError, match="here: the question holds <video>"):
        make_sample(row, Path("x"), "here", qwen.processor)
    with pytest.raises(utils.UserError, match=f'here: the field "{field}" holds a video or sound'):
        make_sample(row | {"question": "What?"}, Path("x"), "here", qwen.processor)


LEFT_BEHIND = {  # file: the fields that a trainer left there, one variant after another
    "tokenizer.json": [
        {"truncation": {"max_length": 20, "direction": "Right", "strategy": "LongestFirst", "stride": 0}},
        {"truncation": {"max_length": 20, "direction": "Left", "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 400}, "direction": "Left", "pad_to_multiple_of": None,
                     "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}}],
    "tokenizer_config.json": [
        {"max_length": 20}, {"truncation": True, "model_max_length": 20}, {"model_max_length": 20},
        {"padding": "max_length", "max_length": 400, "padding_side": "left"},
        {"padding": True, "pad_to_multiple_of": 64}, {"split_special_tokens": True},
        {"max_pixels": 784}, {"size": {"longest_edge": 784, "shortest_edge": 784}},
        {"return_tensors": "pt"}, {"is_split_into_words": True}, {"clean_up_tokenization_spaces": True,
         "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}],
    "processor_config.json": [
        {"padding": "max_length", "max_length": 400, "text_kwargs": {"truncation": True, "max_length": 20}}]}


@pytest.mark.parametrize("file, number", [(f, i) for f in LEFT_BEHIND for i in range(len(LEFT_BEHIND[f]))])
def test_prompts_cut_by_what_a_trainer_left_in_the_tokenizer(qwen, data_path, tmp_path, file, number):
    """llm-compressor PR#2917, and ours: a processor takes its defaults from the tokenizer's files, so
    that a checkpoint saved by a trainer that cuts texts gave prompts without their end. Ours: prompts,
    golden responses and decoded texts are those of the checkpoint without such defaults."""
    left = LEFT_BEHIND[file][number]
    qwen.processor.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(whole | left))
    processor = load_processor(tmp_path)
    samples = load_samples(data_path, processor, 2048)
    assert samples == qwen.samples
    text = "It is 4 , or so . " * 20 + "\\boxed{4}"
    ids = qwen.processor.tokenizer(text)["input_ids"]
    golden = [replace(s, solution=text) for s in samples[:1]]
    (done,) = train_sft.with_golden_responses(golden, processor, 2048, processor.tokenizer.eos_token_id)
    assert done.completion_ids == [*ids, processor.tokenizer.eos_token_id]
    assert processor.tokenizer.decode(ids) == text
    stranger = transformers.AutoTokenizer.from_pretrained(tmp_path)  # as another engine would have it
    assert tokenise(stranger, samples[-1].prompt_text) == samples[-1].prompt_ids


@pytest.mark.parametrize("left", [LEFT_BEHIND["tokenizer.json"][0], LEFT_BEHIND["tokenizer.json"][2]])
def test_the_processors_defaults_are_the_tokenizers(qwen, data_path, tmp_path, left):
    """The buggy form of the story above: a bare call of the processor, whoever loaded it."""
    sample = by_id(qwen.samples, "text")[0]
    assert len(sample.prompt_ids) > 20
    qwen.processor.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | left))
    buggy = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert load_samples(data_path, copy.deepcopy(buggy), 2048) == qwen.samples
    if "truncation" in left:
        assert len(buggy(text=[sample.prompt_text])["input_ids"][0]) == 20
    else:
        assert len(buggy.tokenizer.backend_tokenizer.encode(sample.prompt_text).ids) == 400


def test_a_golden_response_between_two_special_tokens(qwen):
    """generative_data_prep PR#60, and ours: a tokenizer that puts BOS and EOS around every text made
    golden responses begin with BOS and end twice. Ours: a text's own ids, and one end."""
    tokens = qwen.processor.tokenizer
    bos, eos = tokens.convert_tokens_to_ids("<|im_start|>"), tokens.eos_token_id
    bare = tokens("\\boxed{4}")["input_ids"]
    tokens.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", bos), ("<|im_end|>", eos)])
    buggy = tokens("\\boxed{4}")["input_ids"] + [eos]
    assert buggy == [bos, *bare, eos, eos]
    golden = [replace(s, solution="\\boxed{4}") for s in qwen.samples[:1]]
    (done,) = train_sft.with_golden_responses(golden, qwen.processor, 96, eos)
    assert done.completion_ids == [*bare, eos]


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
                                  "<|vision_end|>", "<|endoftext|>"])
def test_marks_in_a_golden_response(qwen, mark):
    """Ours: `\\boxed{4}<|im_end|>\\n<|im_start|>user` in a solution taught the model to go on in the
    user's name; an image's placeholder ended the run in its middle. The question had been checked, the
    solution not. Tokens that a tokenizer has for text, as <think>, are text."""
    tokens = qwen.processor.tokenizer
    row = {"question": "1 + 3?", "answer": "4", "solution": f"\\boxed{{4}}{mark}more"}
    assert tokens.convert_tokens_to_ids(mark) in tokens(row["solution"])["input_ids"]  # the buggy form
    with pytest.raises(utils.UserError, match=f"here: the solution holds the model's mark {re.escape(mark)}; remove"):
        make_sample(row, Path("x"), "here", qwen.processor)
    tokens.add_tokens(["<think>", "</think>", "<tool_call>"])
    text = "<think>3 + 1 = 4</think>\\boxed{4}"
    row |= {"question": "What does <tool_call> mean?", "solution": text}
    sample = make_sample(row, Path("x"), "here", qwen.processor)
    assert sample.solution == text and tokens.convert_tokens_to_ids("<tool_call>") in sample.prompt_ids


def test_an_image_mark_in_a_golden_response(qwen):
    """Where the mark of our data sets is the family's own token, as LLaVA's; elsewhere it is text."""
    row = {"question": "1 + 3?", "answer": "4", "solution": "as <image> shows"}
    assert make_sample(row, Path("x"), "here", qwen.processor).solution == row["solution"]
    qwen.processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    with pytest.raises(utils.UserError, match="here: the solution holds the model's mark <image>"):
        make_sample(row, Path("x"), "here", qwen.processor)


def test_deep_greys_clipped_to_white_and_black(tmp_path):
    """Pillow#3159, and ours: `convert` clips greys of 32 bits at 255, so that a scan or a depth map
    becomes a white page, and one in floats from 0 to 1 a black one. Ours keeps its steps."""
    for mode, values, clipped, kept in (
            ("I", [0, 20_000, 40_000, 65_535], [0, 255, 255, 255], [0, 78, 156, 255]),
            ("F", [0.0, 0.25, 0.5, 1.0], [0, 0, 0, 1], [0, 63, 127, 255])):
        image = Image.new(mode, (4, 1))
        image.putdata(values)
        image.save(tmp_path / "deep.tiff")
        assert [*Image.open(tmp_path / "deep.tiff").convert("RGB").tobytes()[::3]] == clipped
        assert [*open_image(tmp_path / "deep.tiff").tobytes()[::3]] == kept


def test_what_is_false_is_not_missing(qwen):
    """Ours: `row.get("id") or place`. The id 0 became a file's line, and with it the prompt's random
    numbers; the solution 0 became no solution."""
    row = {"question": "1 - 1?", "answer": 0, "id": 0, "solution": 0}
    assert [row.get(name) or "missing" for name in ("id", "solution")] == ["missing"] * 2
    sample = make_sample(row, Path("x"), "here", qwen.processor)
    assert (sample.id, sample.answer, sample.solution) == ("0", "0", "0")
    for nothing in (None, ""):
        assert make_sample(row | {"id": nothing}, Path("x"), "here", qwen.processor).id == "here"
# What outside eyes found: rewards


def test_the_master_key():
    """Ours, until it was tried from outside: a lone letter and an empty answer were both parsed as
    "and nothing else", nothing equalled nothing, and so \\boxed{}, \\boxed{.} or an echo of our own
    instruction earned full marks on every multiple-choice question. Now nothing equals nothing."""

    def buggy(prediction, reference):
        (letter, said), (wanted_letter, wanted) = map(reward.understand, (prediction, reference))
        if letter and wanted_letter and not (said and wanted):
            return letter == wanted_letter
        return (said or "") == (wanted or "")

    empty = ["\\boxed{}", "\\boxed{.}", "\\boxed{\\text{}}", "\\boxed{*}", "\\boxed{$$}"]
    for text in (*empty, INSTRUCTION):
        for wanted in "ABCDEFGH":
            assert buggy(reward.extract_answer(text), wanted)
            assert reward.accuracy_reward(text, wanted) == 0.0
    assert not buggy("A", "B") and buggy("(B)", "B")
    assert reward.accuracy_reward("\\boxed{(B)}", "B") == 1.0


def test_a_reference_that_says_nothing_is_unscored():
    """The same bug from the other side: with "*" or "\\text{}" as the reference, whoever wrote
    nothing was right and whoever answered was punished. Now, as no answer could be right, none is
    wrong."""

    def buggy(completion, answer):
        return float(reward.extract_answer(completion) == answer) if answer.strip() else None

    for wanted in ("*", "\\text{}", "?", "\\boxed{}", "-"):
        empty, full = f"\\boxed{{{wanted}}}", "\\boxed{5}"
        assert (buggy(empty, wanted), buggy(full, wanted)) == (1.0, 0.0)
        assert reward.accuracy_reward(empty, wanted) is reward.accuracy_reward(full, wanted) is None


def test_two_helpers_of_one_name(tmp_path, monkeypatch):
    """The half cure of a reward file that imports what lies beside it, its folder on sys.path:
    Python keeps one module of a name, and the second file silently scores with the first one's
    helper. Ours: the second is refused, before anything is run."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scale_of_reward.py").write_text(f"SCALE = {value}\n")
        (tmp_path / name / f"mine_{name}.py").write_text(
            f"from scale_of_reward import SCALE\n\ndef {name}(samples):\n    return [SCALE]\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    ours = scoring.load_rewards(f"{tmp_path}/a/mine_a.py:a:1")
    with pytest.raises(utils.UserError, match="b/scale_of_reward.py has the name of another module: rename it"):
        scoring.load_rewards(f"{tmp_path}/b/mine_b.py:b:1")
    assert ours["a"][0]([None]) == [1.0]
    sys.modules.pop("scale_of_reward", None)
    buggy = {}
    for name in "ab":
        monkeypatch.syspath_prepend(tmp_path / name)
        buggy |= runpy.run_path(str(tmp_path / name / f"mine_{name}.py"))
    assert [buggy[name]([None]) for name in "ab"] == [[1.0], [1.0]]
    sys.modules.pop("scale_of_reward")
# What outside eyes found: vLLM and the guard


def test_seeds_that_never_reach_the_sampler(served):
    """Ours, until outside eyes looked: vLLM's second model runner draws an unseeded request's noise
    from numpy's generator, which each engine seeds alike at its start; `torch.manual_seed` reached
    nothing. All values of --seed shared one stream, and a resumed run began it anew. Now a request
    has a seed of its own, from seed, step and prompt."""
    buggy, ours = {}, {}
    for seed in ("0 1", "0 2", "1 1"):  # --seed and step
        np.random.seed(0)  # what the engine's start leaves behind
        torch.manual_seed(rollout.seed_number(seed, 0))
        buggy[seed] = np.random.randint(-2**63, 2**63 - 1, 3).tolist()  # SamplingStates.add_request
        ours[seed] = [params.seed for params in ask(served, served.prompts, seed)[-1]]
        assert ours[seed] == [params.seed for params in ask(served, served.prompts, seed)[-1]]
    assert buggy["0 1"] == buggy["0 2"] == buggy["1 1"]
    assert len({n for numbers in ours.values() for n in numbers}) == 9


@pytest.mark.parametrize("spoil", [
    lambda steps: steps[0].update({t: SimpleNamespace(logprob=math.nan) for t in steps[0]}),
    lambda steps: steps[-1].update({t: SimpleNamespace(logprob=-math.inf) for t in steps[-1]}),
    lambda steps: steps[0].clear(), lambda steps: steps.pop()], ids=["nan", "inf", "gone", "short"])
def test_answers_without_a_probability(served, spoil):
    """vllm#14126, Qwen3-VL#71: weights that hold NaN answer with token 0 for ever, an evaluation says
    0.0 % and exits with 0. Ours ends, and names the prompt, where vLLM's log-probability of a token
    that it drew is no number, or not there."""
    honest = ask(served, served.prompts)[1]
    assert all(math.isfinite(x) for s in honest for x in s.sampler_logprobs)
    answer = served.llm.generate.return_value[1]  # of the prompt "text"
    spoil(answer.outputs[0].logprobs)
    buggy = zip(answer.outputs[0].token_ids, answer.outputs[0].logprobs)
    said = [getattr(step.get(t), "logprob", 0.0) for t, step in buggy]
    assert said != honest[8].sampler_logprobs  # which went on into the update
    with pytest.raises(utils.RunError, match="prompt text are missing or not finite"):
        served.engine.generate(served.prompts, 8, 1.0, 1.0, 8, 0)


def strayed(gaps):
    """The guard's sentence on these differences of log-probabilities, in nats, or None."""
    sums = Counter({"completions": 1, "groups": 1, "update_tokens": len(gaps)})
    sums.update(train_grpo.gap_sums(gaps))
    try:
        doctor.stop_if_sampler_strays(train_grpo.step_metrics(sums, [1.0], {}, 1e-4))
    except utils.RunError as error:
        return str(error)


def buggy_guard(gaps):
    """Ours, as it was: an unbounded second moment as a kill switch."""
    ratio = gaps.exp()
    size = ratio.mean() ** 2 / ratio.square().mean()
    return not (0.5 < ratio.mean() < 2 and size > 0.2)


@pytest.mark.parametrize("off", [5.5, 12.0, -12.0])
def test_one_token_that_ends_a_run(off):
    """vllm#47425, verl#2996, and ours: of 9,472 tokens one was 5.5 nats off, its squared ratio was
    most of the sum, and the guard ended a healthy run. Now a token counts at most 1 nat."""
    gaps = 0.02 * torch.randn(9472, generator=torch.Generator().manual_seed(0))  # of bfloat16
    assert not buggy_guard(gaps) and strayed(gaps) is None
    gaps[4711] = off
    assert buggy_guard(gaps) == (off > 0) and strayed(gaps) is None


@torch.no_grad()
@pytest.mark.parametrize("how", ["stale", "temperature", "images"])
def test_a_guard_that_sleeps(tiny, how):
    """The other half of the story: what the guard is for still ends a run, in half of the samples
    too. Most of these passed the old one: where a sampler reports what it drew from, the mean ratio
    is 1 by construction, however far it has strayed."""
    strayer, asked = copy.deepcopy(tiny.model), [s for s in tiny.samples if s.images]
    if how == "stale":
        for p in strayer.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    seen = [replace(s, images=[white(i) for i in s.images]) for s in asked] if how == "images" else asked
    temperature = 0.7 if how == "temperature" else 1.0
    gaps = {}
    for name, model, prompts, t in (("honest", tiny.model, asked, 1.0),
                                    (how, strayer, seen, temperature)):
        done = sampler(model, tiny.processor, 64).generate(prompts, 4, t, 1.0, 8, 0)
        done = [replace(d, images=s.images) for d, s in zip(done, [s for s in asked for _ in range(4)])]
        theirs = doctor.trainer_logprobs(Policy(tiny.model, tiny.processor), done, tiny.processor)
        gaps[name] = [torch.tensor(a) - torch.tensor(s.sampler_logprobs) for a, s in zip(theirs, done)]
    assert strayed(torch.cat(gaps["honest"])) is None
    assert "strayed from the policy" in strayed(torch.cat(gaps[how]))
    half = torch.cat([g for i, g in enumerate(gaps["honest"]) if i % 2] + gaps[how][::2])
    assert "strayed from the policy" in strayed(half)
    assert how == "stale" or not buggy_guard(half)


def white(path):
    """The bytes of an empty picture of the same size."""
    return as_png(Image.new("RGB", open_image(path).size, "white"))


def test_memory_that_is_asleep_or_long_gone(monkeypatch):
    """Ours: `peak_memory_gb` was PyTorch's peak since the start, so that it showed the loading of the
    model for ever; and it held vLLM's weights and cache, which PyTorch counts while they sleep."""
    live, peak, pool = 30, 60, 20  # GB; of them vLLM's
    card = {"is_available": lambda: True, "max_memory_allocated": lambda: peak,
            "reset_peak_memory_stats": lambda: resets.append(live)}
    resets = []
    for name, function in card.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert utils.peak_memory() == 60  # the buggy form's, and right without vLLM
    allocator = SimpleNamespace(get_current_usage=lambda: pool)
    cumem = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=None))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", cumem)
    assert utils.peak_memory() == 60  # imported, and never slept
    cumem.CuMemAllocator.instance = allocator
    assert utils.peak_memory() == 40
    utils.forget_peak_memory()
    assert resets == [30]


def test_old_log_probabilities_that_are_no_numbers(qwen, one_rank):
    """Ours: NaN of a spoilt reference went through the pass into the rewards (k1), where it stood for
    "not scored", and the run went on. Now the pass ends it, and names the prompts."""
    samples = [replace(s, reward=1.0) for s in answered(qwen.samples[:4], qwen.processor)]
    policy, ref = Policy(qwen.model, qwen.processor), {id(s): [math.nan] for s in samples}
    train_grpo.subtract_divergence(samples, {id(s): [-1.0] for s in samples}, ref, 0.1)
    advantages = train_grpo.grpo_advantages(torch.tensor([[s.reward for s in samples]]))
    assert (advantages == 0).all()  # nothing learnt, nothing said
    assert train_grpo.logprob_pass(policy, samples, ARGS).keys() == {id(s) for s in samples}
    word = samples[2].completion_ids[0]
    samples = [replace(s, completion_ids=[word + (s.id != samples[2].id)] * 2) for s in samples]
    qwen.model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor([word]), -math.inf))
    with pytest.raises(utils.RunError, match=rf"log-probability is -inf on the prompts .'{samples[2].id}'.;"):
        train_grpo.logprob_pass(policy, samples, ARGS)
