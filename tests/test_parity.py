"""Tier 2: our forward, sampler and update against transformers' plain forward and slow loops.

Three families of tiny random models in float32, on batches that mix one image, two images and none.
The reference never calls our `collate` or `Policy`: each row goes alone, without padding, through
the processor and the whole model, and all logits are kept.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import conftest
import train_grpo
import utils
from conftest import answered, png, sampler
from data import make_sample
from pictures import open_image
from policy import collate, freeze, load_model, Policy, shard
from runs import fork
from siblings import Sharing
from utils import UserError

ARGS = train_grpo.Args(max_grad_norm=math.inf, tis_cap=0.0)


def by_id(samples, *ids):
    return [next(s for s in samples if s.id == i) for i in ids]


def mixed(tiny):
    """Two images, none, one, one very wide: prompts and completions of all lengths."""
    return answered(by_id(tiny.samples, "two", "text", "rgba", "line", "grey"), tiny.processor)


def plain_inputs(sample, processor):
    """One prompt as the processor's documentation says, its completion appended."""
    images = [open_image(i) for i in sample.images] or None
    inputs = processor(text=[sample.prompt_text], images=images, return_tensors="pt")
    tail = torch.tensor([sample.completion_ids], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full_like(tail, value)], 1)
    return inputs


def plain_logprobs(model, processor, sample, temperature):
    """(C,) log-probabilities and (C,) entropies by the whole model on one row, all logits at
    once."""
    model.base_model.rope_deltas = None
    count = len(sample.completion_ids)
    logits = model(**plain_inputs(sample, processor)).logits[0, -count - 1 : -1] / temperature
    ban = torch.zeros(logits.shape[-1])
    ban[[processor.image_token_id, processor.video_token_id]] = -math.inf
    spread = torch.distributions.Categorical(logits=logits + ban)
    # Categorical's own entropy clamps -inf; leave the banned out by hand
    probs = spread.probs
    entropy = -torch.where(probs > 0, probs * probs.clamp(min=1e-45).log(), 0.0).sum(-1)
    return spread.log_prob(torch.tensor(sample.completion_ids)), entropy


def gradients(model):
    """Parameter name to a copy of its gradient."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want, tolerance=1e-5):
    """Alike to `tolerance` of the largest entry, and not all zero."""
    assert got.keys() == want.keys() and want
    largest = max(g.abs().max().item() for g in want.values())
    assert largest > 1e-3
    worst = max((got[n] - want[n]).abs().max().item() for n in want)
    assert worst <= tolerance * max(1, largest), f"gradients differ by {worst} of {largest}"


# ---------------------------------------------------------------------------------------------
# Log-probabilities and their gradient


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropies_and_gradient_equal_the_plain_forward(tiny, temperature):
    samples = mixed(tiny)
    policy = Policy(tiny.model, tiny.processor)
    logprobs, entropies = policy(collate(samples, tiny.processor), temperature)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    (weights * logprobs).sum().backward()
    ours = gradients(tiny.model)
    tiny.model.zero_grad()
    for i, sample in enumerate(samples):
        count = len(sample.completion_ids)
        want, entropy = plain_logprobs(tiny.model, tiny.processor, sample, temperature)
        torch.testing.assert_close(logprobs[i, :count], want, rtol=0, atol=1e-5)
        torch.testing.assert_close(entropies[i, :count], entropy, rtol=0, atol=1e-5)
        assert not logprobs[i, count:].any() and not entropies[i, count:].any()
        (weights[i, :count] * want).sum().backward()
    assert_same_gradients(ours, gradients(tiny.model))
    assert any("visual" in name for name in ours)


def test_the_images_and_their_order_matter(tiny):
    """Parity would hold for a blind model too. This one sees, and tells first from second."""
    pictures = [png(colour) for colour in ("white", "red", "blue")]
    policy = Policy(tiny.model, tiny.processor)
    rows = []
    for a, b in ((0, 1), (1, 0), (0, 2)):
        row = {"question": "<image><image>?", "answer": "1", "images": [pictures[a], pictures[b]]}
        sample = make_sample(row, utils.Path("."), "here", tiny.processor)
        rows.append(answered([sample], tiny.processor)[0])
    with torch.no_grad():
        first, swapped, other = policy(collate(rows, tiny.processor), 1.0)[0]
    assert (first - swapped).abs().max() > 1e-3 and (first - other).abs().max() > 1e-3


def test_chunks_of_the_head_change_nothing(qwen, monkeypatch):
    samples = mixed(qwen)
    results = []
    for chunk in (2048, 3):
        monkeypatch.setattr("policy.HEAD_NUMBERS", chunk * len(qwen.processor.tokenizer))
        qwen.model.zero_grad()
        logprobs, _ = Policy(qwen.model, qwen.processor)(collate(samples, qwen.processor), 1.0)
        logprobs.sum().backward()
        results.append((logprobs, gradients(qwen.model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=5e-6)
    assert_same_gradients(results[1][1], results[0][1])


def test_a_text_batch_after_an_image_batch(tiny):
    """Stale `rope_deltas` (hf#40154): positions of the last images must not shift the next
    batch."""
    text = answered(by_id(tiny.samples, "text"), tiny.processor)
    images = answered(by_id(tiny.samples, "line", "two"), tiny.processor)
    policy = Policy(tiny.model, tiny.processor)
    engine = sampler(tiny.model, tiny.processor, 8)
    with torch.no_grad():
        before, _ = policy(collate(text, tiny.processor), 1.0)
        prompt = by_id(tiny.samples, "text")
        said = engine.generate(prompt, 1, 0, 1.0, 6, 0)[0].completion_ids
        policy(collate(images, tiny.processor), 1.0)
        engine.generate(by_id(tiny.samples, "line", "two"), 2, 1.0, 1.0, 3, 0)
        after, _ = policy(collate(text, tiny.processor), 1.0)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert engine.generate(prompt, 1, 0, 1.0, 6, 0)[0].completion_ids == said


def test_gradient_checkpointing_changes_nothing(tiny):
    batch = collate(mixed(tiny), tiny.processor)
    results = []
    for _ in range(2):
        tiny.model.zero_grad()
        Policy(tiny.model, tiny.processor).train()(batch, 1.0)[0].sum().backward()
        results.append(gradients(tiny.model))
        tiny.model.gradient_checkpointing_enable()
    assert tiny.model.is_gradient_checkpointing
    assert_same_gradients(results[1], results[0])


# ---------------------------------------------------------------------------------------------
# Masks


def test_masks_come_from_lengths(qwen):
    """With pad == eos, as many tokenizers have it, EOS is still trained and padding is still
    not."""
    samples = mixed(qwen)
    eos = qwen.processor.tokenizer.eos_token_id
    ended = [s.completion_ids[-1] == eos for s in samples]
    assert True in ended and False in ended
    policy = Policy(qwen.model, qwen.processor)
    usual, _ = policy(collate(samples, qwen.processor), 1.0)
    qwen.processor.tokenizer.pad_token = qwen.processor.tokenizer.eos_token
    batch = collate(samples, qwen.processor)
    assert (batch["inputs"]["input_ids"][batch["inputs"]["attention_mask"] == 0] == eos).all()
    assert batch["mask"].sum(1).tolist() == [len(s.completion_ids) for s in samples]
    ends = batch["mask"].sum(1, keepdim=True) - 1
    assert (batch["completion_ids"].gather(1, ends) == eos).flatten().tolist() == ended
    logprobs, _ = policy(batch, 1.0)
    torch.testing.assert_close(logprobs, usual, rtol=0, atol=1e-6)
    assert (logprobs.gather(1, ends) < -0.1).all()  # the last token, EOS or not, has its say


def test_padding_has_no_influence(tiny):
    """A row's log-probabilities are the same alone and beside any other row, in any order."""
    samples = mixed(tiny)
    policy = Policy(tiny.model, tiny.processor)
    with torch.no_grad():
        together, _ = policy(collate(samples[::-1], tiny.processor), 1.0)
        for sample, row in zip(samples[::-1], together):
            alone, _ = policy(collate([sample], tiny.processor), 1.0)
            torch.testing.assert_close(row[: alone.shape[1]], alone[0], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# The sampler


def test_a_left_padded_prefill_equals_each_row_alone(tiny):
    engine = sampler(tiny.model, tiny.processor, 8)
    for prompts in (tiny.samples, by_id(tiny.samples, "text")):
        with torch.no_grad():
            logits, _, attention, _ = engine.prefill(prompts)
        assert (attention[:, -1] == 1).all()  # padding is on the left
        for sample, row in zip(prompts, logits):
            tiny.model.base_model.rope_deltas = None
            with torch.no_grad():
                alone = tiny.model(**plain_inputs(sample, tiny.processor)).logits[0, -1]
            torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)


def test_a_batch_of_text_alone(tiny):
    """Without an image the model is given positions by us: prompts of unequal lengths must agree
    with the policy, which pads on the other side and leaves positions to the model."""
    rows = [{"question": q, "answer": "1"} for q in ("Why?", "What is 12 + 34 + 56 + 78 + 90?")]
    prompts = [make_sample(r, utils.Path("."), r["question"], tiny.processor) for r in rows]
    done = sampler(tiny.model, tiny.processor, 8).generate(prompts, 2, 1.0, 1.0, 8, 0)
    with torch.no_grad():
        logprobs, _ = Policy(tiny.model, tiny.processor)(collate(done, tiny.processor), 1.0)
    for sample, row in zip(done, logprobs):
        reported = torch.tensor(sample.sampler_logprobs)
        torch.testing.assert_close(reported, row[: len(reported)], rtol=0, atol=1e-5)


def test_greedy_equals_transformers_generate(tiny):
    """Token for token, with EOS (one of several) reached early by some rows and never by others."""
    model, processor, samples = tiny.model, tiny.processor, tiny.samples
    banned = [processor.image_token_id, processor.video_token_id]
    engine = sampler(model, processor, 8)
    long = [s.completion_ids for s in engine.generate(samples, 1, 0, 1.0, 12, 0)
            if s.finish_reason == "length"]
    eos = [processor.tokenizer.eos_token_id, long[0][3], long[-1][7]]
    model.generation_config.eos_token_id = eos
    done = sampler(model, processor, 4).generate(samples, 1, 0, 1.0, 12, 0)
    for sample in done:
        model.base_model.rope_deltas = None
        inputs = plain_inputs(replace(sample, completion_ids=[]), processor)
        want = model.generate(**inputs, do_sample=False, max_new_tokens=12, suppress_tokens=banned,
                              eos_token_id=eos, pad_token_id=0)[0, len(sample.prompt_ids):].tolist()
        assert sample.completion_ids == want
        stopped = want[-1] in eos
        assert sample.finish_reason == ("stop" if stopped else "length")
        text = processor.tokenizer.decode(want[:-1] if stopped else want)
        assert sample.completion_text == text
    assert {s.finish_reason for s in done} == {"stop", "length"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_reports_the_policys_logprobs(tiny, temperature):
    engine = sampler(tiny.model, tiny.processor, 8)
    done = engine.generate(tiny.samples, 2, temperature, 1.0, 8, 0)
    with torch.no_grad():
        logprobs, _ = Policy(tiny.model, tiny.processor)(collate(done, tiny.processor), temperature)
    for sample, row in zip(done, logprobs):
        count = len(sample.completion_ids)
        assert len(sample.sampler_logprobs) == count
        reported = torch.tensor(sample.sampler_logprobs)
        torch.testing.assert_close(reported, row[:count], rtol=0, atol=3e-5)


def test_completions_do_not_depend_on_the_batch_layout(tiny):
    """Any batch size, any order, any company: the same words, the n answers of a prompt
    different."""
    samples = tiny.samples
    want = {}
    for prompts, size in ((samples, 256), (samples[::-1], 256), (samples, 7), (samples, 1),
                          (samples[3:6], 6)):
        engine = sampler(tiny.model, tiny.processor, size)
        done = engine.generate(prompts, 3, 1.0, 1.0, 10, "seed")
        assert [s.id for s in done] == [s.id for s in prompts for _ in range(3)]
        for i, sample in enumerate(done):
            key = sample.id, i % 3
            assert want.setdefault(key, sample.completion_ids) == sample.completion_ids
    assert len({tuple(ids) for ids in want.values()}) == len(want)
    other = engine.generate(samples, 3, 1.0, 1.0, 10, "other")
    assert all(s.completion_ids != want[s.id, i % 3] for i, s in enumerate(other))


def test_fewer_answers_are_the_first_of_more(qwen):
    """An answer's randomness is its own: n = 1 gives the first of n = 4."""
    engine = sampler(qwen.model, qwen.processor, 64)
    four = engine.generate(qwen.samples, 4, 1.0, 1.0, 6, 0)
    one = engine.generate(qwen.samples, 1, 1.0, 1.0, 6, 0)
    assert [s.completion_ids for s in one] == [s.completion_ids for s in four[::4]]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, 0.9), (0, 1.0)])
def test_placeholders_are_never_sampled(tiny, temperature, top_p):
    """Not even by a model that wants nothing else; the policy gives them no probability either."""
    wish = torch.zeros(len(tiny.processor.tokenizer))
    wish[[tiny.processor.image_token_id, tiny.processor.video_token_id]] = 50.0
    tiny.model.get_output_embeddings().register_forward_hook(lambda module, args, out: out + wish)
    engine = sampler(tiny.model, tiny.processor, 64)
    done = engine.generate(tiny.samples[:4], 2, temperature, top_p, 5, 0)
    assert not {t for s in done for t in s.completion_ids} & set(wish.nonzero().flatten().tolist())
    if temperature and top_p == 1:
        with torch.no_grad():
            logprobs, _ = Policy(tiny.model, tiny.processor)(collate(done, tiny.processor), 1.0)
        reported = torch.tensor([p for s in done for p in s.sampler_logprobs])
        mask = collate(done, tiny.processor)["mask"]
        torch.testing.assert_close(logprobs[mask], reported, rtol=0, atol=1e-4)
        assert logprobs[mask].mean() > -20  # without the ban each would be about -50
    engine.banned = []
    wild = engine.generate(tiny.samples[:1], 2, temperature, top_p, 2, 0)
    assert {t for s in wild for t in s.completion_ids} <= set(wish.nonzero().flatten().tolist())


@pytest.mark.parametrize("part", ["layers.0", "merger", "patch_embed", "embed_tokens"])
def test_sync_takes_over_every_part(tiny, part):
    """After a strong change of the policy the rollout is the changed policy's; before sync it is
    not."""
    model = load_model(tiny.path)
    engine = sampler(tiny.model, tiny.processor, 16)
    prompts = by_id(tiny.samples, "rgba", "two", "line")

    def say(engine):
        done = engine.generate(prompts, 2, 1.0, 1.0, 6, 0)
        return [(s.completion_ids, s.sampler_logprobs) for s in done]

    before = say(engine)
    touched = [p for n, p in model.named_parameters() if part in n]
    assert touched
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in touched:
            p += torch.randn(p.shape, generator=generator) * 0.5
    assert say(engine) == before  # the engine's weights are its own
    engine.sync(model)
    after = say(engine)
    assert after != before
    assert after == say(sampler(model, tiny.processor, 16))


# ---------------------------------------------------------------------------------------------
# What trains


def test_freezing(tiny):
    """Language, connector and vision are disjoint, together the whole model, and named as they
    should."""
    model = tiny.model
    names = {n for n, _ in model.named_parameters()}
    expected = {
        "vision": {n for n in names if n.startswith("model.visual.") and "merger" not in n},
        "connector": {n for n in names if n.startswith("model.visual.") and "merger" in n},
        "language": {n for n in names if n.startswith(("model.language_model.", "lm_head."))},
    }
    assert all(expected.values()) and set.union(*expected.values()) == names
    for flags in range(1, 8):
        wanted = [bool(flags & bit) for bit in (1, 2, 4)]
        count = freeze(model, *wanted)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == set.union(*[e for e, w in zip(expected.values(), wanted) if w])
        assert count == sum(p.numel() for n, p in model.named_parameters() if n in trained)
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(model, False, False, False)


def test_an_update_moves_what_trains_and_nothing_else(tiny, one_rank):
    freeze(tiny.model, False, True, False)
    before = {n: p.detach().clone() for n, p in tiny.model.named_parameters()}
    policy = Policy(tiny.model, tiny.processor)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    train_grpo.update(policy, optimizer, mixed(tiny), None, None, ARGS)
    moved = {n for n, p in tiny.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("merger" in n for n in moved)


# ---------------------------------------------------------------------------------------------
# One gradient step


class Probe:
    """An optimiser that changes nothing and keeps the gradients it was given."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.gradients = gradients(self.model)
        for name, gradient in self.gradients.items():
            if isinstance(gradient, DTensor):
                self.gradients[name] = gradient.full_tensor()

    def zero_grad(self):
        self.model.zero_grad()


def moved_logprobs(policy, samples, processor, shift):
    """Log-probabilities of an older or a reference policy: the present ones plus a little noise."""
    generator = torch.Generator().manual_seed(shift)
    now = train_grpo.logprob_pass(policy, samples, ARGS)
    return {k: [x + 0.8 * torch.randn((), generator=generator).item() for x in row]
            for k, row in now.items()}


LOSSES = ("token", "sequence", "dr_grpo", "gspo", "cispo")


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_update_equals_a_slow_loop_over_tokens(qwen, one_rank, kind, masked):
    """Surrogate plus KL, token by token, one row a forward pass, for every --loss."""
    args = replace(ARGS, loss=kind, kl_coef=0.1, clip_high=0.28, temperature=0.7, micro_batch_tokens=100,
                   mask_truncated=masked, max_new_tokens=12, kl="k2" if masked else "k3")
    samples = mixed(qwen)
    policy, probe = Policy(qwen.model, qwen.processor), Probe(qwen.model)
    old = moved_logprobs(policy, samples, qwen.processor, 1)
    ref = moved_logprobs(policy, samples, qwen.processor, 2)
    sums, _, _ = train_grpo.update(policy, probe, samples, old, ref, args)

    chosen = [s for s in samples if not masked or s.finish_reason == "stop"]
    assert 0 < len(chosen) < len(samples) or not masked
    tokens = sum(len(s.completion_ids) for s in chosen)
    divisor = {"token": tokens, "cispo": tokens, "sequence": len(chosen), "gspo": len(chosen),
               "dr_grpo": 12 * len(chosen)}[kind]
    total, kl, stopped = 0.0, 0.0, [0, 0]
    for s in chosen:
        logprobs, _ = plain_logprobs(qwen.model, qwen.processor, s, 0.7)
        was, reference = torch.tensor(old[id(s)]), torch.tensor(ref[id(s)])
        ratios = (logprobs - was).exp()
        if kind == "gspo":
            ratios = (logprobs - was).mean().exp().expand(len(was))
        loss = 0.0
        for new, ratio, r in zip(logprobs, ratios, (reference - logprobs)):
            gain = ratio * s.advantage
            if kind == "cispo":
                gain = ratio.clamp(0.8, 1.28).detach() * s.advantage * new
            outside = [s.advantage < 0 and ratio < 0.8, s.advantage > 0 and ratio > 1.28]
            if any(outside):
                stopped = [n + out for n, out in zip(stopped, outside)]
                if kind != "cispo":
                    gain = torch.tensor((1.28 if outside[1] else 0.8) * s.advantage)
            estimate = r.square() / 2 if masked else r.exp() - 1 - r
            loss, kl = loss - gain + 0.1 * estimate, kl + estimate.item()
        total = total + (loss / len(was) if kind in ("sequence", "gspo") else loss)
    (total / divisor).backward()
    assert_same_gradients(probe.gradients, gradients(qwen.model))
    assert sums["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert sums["kl"] == pytest.approx(kl, rel=1e-4)
    assert (sums["update_tokens"], sums["divisor"]) == (tokens, divisor)
    assert [sums["clipped_low"], sums["clipped_high"]] == stopped
    assert any(stopped)


def test_a_divergence_in_the_reward_is_not_in_the_loss_too(qwen, one_rank):
    """k1 as a loss would have no gradient on average, and noise; it is logged, and that is all."""
    samples = mixed(qwen)
    policy, probe = Policy(qwen.model, qwen.processor), Probe(qwen.model)
    old = moved_logprobs(policy, samples, qwen.processor, 1)
    ref = moved_logprobs(policy, samples, qwen.processor, 2)
    args = replace(ARGS, kl="k1", kl_coef=0.5)
    got, _, _ = train_grpo.update(policy, probe, samples, old, ref, args)
    with_reference = probe.gradients
    want, _, _ = train_grpo.update(policy, probe, samples, old, None, args)
    assert_same_gradients(with_reference, probe.gradients)
    assert got["loss"] == want["loss"] and got["kl"] != 0


def test_all_truncated_and_masked_is_no_gradient(qwen, one_rank):
    """0 / 0 is NaN in frameworks that divide by what is left; here nothing is left and nothing is
    learnt."""
    samples = [replace(s, finish_reason="length") for s in mixed(qwen)]
    policy, probe = Policy(qwen.model, qwen.processor), Probe(qwen.model)
    args = replace(ARGS, mask_truncated=True)
    sums, norm, tail = train_grpo.update(policy, probe, samples, None, None, args)
    assert (sums["update_tokens"], sums["loss"], norm, tail) == (0, 0, 0, 0)
    assert all(g is None or not g.any() for g in probe.gradients.values())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_gradient_does_not_depend_on_the_micro_batch(qwen, one_rank, size, kind):
    samples = mixed(qwen)
    policy, probe = Policy(qwen.model, qwen.processor), Probe(qwen.model)
    results = []
    for micro_batch in (16, size):
        args = replace(ARGS, micro_batch_tokens=micro_batch, loss=kind, mask_truncated=size == 2)
        sums, norm, _ = train_grpo.update(policy, probe, samples, None, None, args)
        results.append((probe.gradients, sums["loss"], norm))
    assert_same_gradients(results[1][0], results[0][0])
    assert results[1][1:] == pytest.approx(results[0][1:], rel=1e-5)


def test_old_logprobs_of_an_unmoved_policy_change_nothing(qwen, one_rank):
    """One on-policy update may skip the old pass: new.detach() is what that pass would give."""
    samples = mixed(qwen)
    policy, probe = Policy(qwen.model, qwen.processor), Probe(qwen.model)
    train_grpo.update(policy, probe, samples, None, None, ARGS)
    skipped = probe.gradients
    args = replace(ARGS, micro_batch_tokens=100)
    old = train_grpo.logprob_pass(policy, samples, args)
    train_grpo.update(policy, probe, samples, old, None, ARGS)
    assert_same_gradients(probe.gradients, skipped)


# Two ranks. Rank 0 holds three samples and rank 1 two, so that they need unequal numbers of passes;
# "text" is rank 1's, which then has a pass without an image where rank 0 has one.
CASES = {"language": (False, False, True, 8192, "token", False),
         "unequal counts": (False, False, True, 100, "sequence", False),
         "every part": (True, True, True, 1, "gspo", False),
         "shared prefix": (False, False, True, 8192, "token", True),
         "shared prefix, every part": (True, True, True, 1, "gspo", True)}


def rank_gradients(path, data, case):
    vision, connector, language, size, loss, shared = CASES[case]
    tiny = conftest.fresh(path, data)
    samples = mixed(tiny)
    freeze(tiny.model, vision, connector, language)
    sharing = Sharing(tiny.model, tiny.processor)
    sharing.can_branch = shared
    policy = Policy(tiny.model, tiny.processor, sharing)
    if shared:
        tiny.model.gradient_checkpointing_enable()
    if utils.world_size() > 1:
        policy = shard(policy, torch.float32)
    probe = Probe(policy.model)
    args = replace(ARGS, micro_batch_tokens=size, loss=loss, mask_truncated=loss == "gspo")
    if shared:  # siblings, on each rank
        samples += [replace(s, completion_ids=ids, sampler_logprobs=[-1.0] * len(ids), advantage=0.3)
                    for ids in ([9], [10, 11, 12]) for s in mixed(tiny)]
    mine = samples[utils.rank() :: utils.world_size()]
    sums, norm, _ = train_grpo.update(policy, probe, mine, None, None, args)
    return probe.gradients, utils.sum_over_ranks(sums)["loss"], norm


def both_ranks(words):
    """What each of two ranks does; the first one writes what they found."""
    utils.start_ranks()
    out, data, *paths = map(utils.Path, words)
    results = {(p.name, case): rank_gradients(p, data, case) for p in paths for case in CASES}
    if utils.rank() == 0:
        torch.save(results, out)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_ranks(tiny_paths, data_path, tmp_path_factory):
    """Every case on two sharded ranks, in one run."""
    out = tmp_path_factory.mktemp("ranks") / "gradients.pt"
    codes, _, err = fork(out, data_path, *tiny_paths.values(), act=both_ranks, ranks=2)
    assert codes == [0, 0], err[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case, family, two_ranks, tiny_paths, data_path, one_rank):
    path = tiny_paths[family]
    got, loss, norm = two_ranks[path.name, case]
    want, alone_loss, alone_norm = rank_gradients(path, data_path, case)
    assert_same_gradients(got, want)
    assert (loss, norm) == pytest.approx((alone_loss, alone_norm), rel=1e-4)
