"""Shared prefix and frozen vision features: the fast paths against the plain one.

The plain path, `collate`, is held against transformers itself in test_parity.py; here `pack` is held
against `collate`, on random pictures, sizes, group sizes and lengths, in three families.
"""

import copy
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

import bench
import conftest
import rollout
import train_grpo
import train_sft
from conftest import answered, branching, png, sampler
from data import make_sample
from decode import PromptCache
from policy import collate, freeze, Policy
from siblings import pack, rectangles, row, RowAttention, Sharing
from test_parity import ARGS, assert_same_gradients, by_id, gradients, mixed, plain_logprobs, Probe


def random_groups(tiny, folder, seed):
    """Samples of 5 prompts with 0 to 2 random pictures, each answered 1 to 5 times, 1 to 12 tokens, shuffled."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    samples = []
    for i in range(5):
        images = []
        for k in range(rng.choice([0, 1, 1, 2])):
            size = (rng.randint(20, 150), rng.randint(20, 150))
            images.append(f"{seed}_{i}_{k}.png")
            Image.effect_noise(size, 90).convert("RGB").save(folder / images[-1])
        row = {"id": str(i), "question": "<image>" * len(images) + "Why? " * rng.randint(1, 9), "answer": "1",
               "images": images}
        prompt = make_sample(row, folder, "here", tiny.processor)
        for _ in range(rng.randint(1, 5)):
            ids = [rng.randrange(10, len(tiny.processor.tokenizer)) for _ in range(rng.randint(1, 12))]
            samples.append(replace(prompt, completion_ids=ids, sampler_logprobs=[-1.0] * len(ids),
                                   finish_reason="stop", advantage=rng.choice([-1.0, 0.5, 2.0])))
    rng.shuffle(samples)
    return samples


def results(policy, batch, model, temperature=0.7):
    """Log-probabilities, entropies and the gradient of a random weighing of the former."""
    logprobs, entropies = policy(batch, temperature)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    (weights.to(logprobs) * logprobs).sum().backward()
    found = gradients(model)
    model.zero_grad()
    return logprobs.detach(), entropies, found


@pytest.mark.parametrize("seed, checkpointing", [
    pytest.param(seed, on, marks=pytest.mark.slow if seed % 2 != on else ()) for seed in range(4) for on in (False, True)])
def test_the_packed_row_equals_rows(tiny, tmp_path, seed, checkpointing):
    """Log-probabilities within 2e-5, gradients within 1e-4 of the largest, of every part."""
    samples = random_groups(tiny, tmp_path, seed)
    policy = branching(tiny.model, tiny.processor)
    assert policy.sharing.can_branch
    if checkpointing:
        tiny.model.gradient_checkpointing_enable()
        tiny.model.train()
    plain = results(policy, collate(samples, tiny.processor), tiny.model)
    packed = results(policy, pack(samples, policy.sharing, tiny.model), tiny.model)
    torch.testing.assert_close(packed[0], plain[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(packed[1], plain[1], rtol=0, atol=2e-5)
    assert_same_gradients(packed[2], plain[2], 1e-4)
    assert any("visual" in name for name in packed[2]) or not any(s.images for s in samples)


def test_flex_attention_sees_the_same(tiny, tmp_path):
    """The form for CUDA, uncompiled on a CPU, where it has no backward."""
    samples = random_groups(tiny, tmp_path, 9)
    policy = branching(tiny.model, tiny.processor)
    with torch.no_grad():
        plain = policy(collate(samples, tiny.processor), 1.0)[0]
        batch = pack(samples, policy.sharing, tiny.model, flex=True)
        assert batch["inputs"]["branches"].block_mask is not None
        torch.testing.assert_close(policy(batch, 1.0)[0], plain, rtol=0, atol=1e-5)


def test_the_rectangles_and_the_block_mask_are_one_relation(qwen, tmp_path):
    """Who sees whom, token by token, worked out from what a completion is: its prompt and itself so far."""
    samples = random_groups(qwen, tmp_path, 3)
    sharing = Sharing(qwen.model, qwen.processor)
    batch = pack(samples, sharing, qwen.model, flex=True)["inputs"]
    names = list(dict.fromkeys(s.id for s in samples))
    prompts = {s.id: s.prompt_ids for s in samples}
    row = [(name, None, k) for name in names for k in range(len(prompts[name]))]
    row += [(s.id, i, k) for i, s in enumerate(samples) for k in range(len(s.completion_ids))]
    assert batch["input_ids"][0].tolist() == [
        prompts[name][k] if i is None else samples[i].completion_ids[k] for name, i, k in row]
    want = torch.tensor([[a == x and j in (None, i) and (k >= m if i == j else True)
                          for x, j, m in row] for a, i, k in row])
    sees = batch["branches"].block_mask.mask_mod
    places = torch.arange(len(row))
    assert torch.equal(sees(0, 0, places[:, None], places), want)


@pytest.mark.parametrize("flex", [False, True])
def test_a_completion_is_blind_to_its_siblings(qwen, flex):
    """The packed row as an ordinary causal one, which is what a lost mask makes of it, is not blind."""
    first, *others = [replace(qwen.samples[0], completion_ids=ids) for ids in ([9, 11, 12], [13, 14], [15])]
    policy = branching(qwen.model, qwen.processor)

    def of_the_last(*siblings, lost=False):
        batch = pack([*siblings, first], policy.sharing, qwen.model, flex=flex)
        if lost:
            del batch["inputs"]["branches"]
        with torch.no_grad():
            return policy(batch, 1.0)[0][-1, :3]

    alone = of_the_last()
    torch.testing.assert_close(of_the_last(*others), alone, rtol=0, atol=1e-5)
    assert (of_the_last(*others, lost=True) - alone).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_no_further_from_float64_than_the_plain_path(tiny, tmp_path, dtype):
    """Rounding is another one, and not a larger one: at most 1.5 times the plain path's own error."""
    exact = Policy(copy.deepcopy(tiny.model).double(), tiny.processor)
    for weight in tiny.model.parameters():  # and no buffer
        weight.data = weight.data.to(dtype)
    rounded = branching(tiny.model, tiny.processor)
    errors = {"plain": [], "packed": []}
    for seed in range(3):
        samples = random_groups(tiny, tmp_path, seed)
        truth = results(exact, collate(samples, tiny.processor), exact.model)
        for name, batch in (("plain", collate(samples, tiny.processor)),
                            ("packed", pack(samples, rounded.sharing, tiny.model))):
            logprobs, _, gradient = results(rounded, batch, rounded.model)
            off = sum((g.double() - truth[2][n]).square().sum() for n, g in gradient.items()).sqrt()
            errors[name].append((off.item(), (logprobs - truth[0]).square().sum().sqrt().item()))
    for plain, packed in zip(*(map(sum, zip(*errors[name])) for name in ("plain", "packed"))):
        assert 0 < packed < 1.5 * plain


def test_a_family_without_known_positions_goes_the_plain_way(qwen, monkeypatch, capsys):
    monkeypatch.delattr(type(qwen.model.base_model), "get_rope_index")
    policy = branching(qwen.model, qwen.processor)
    assert not policy.sharing.can_branch and "as with --plain" in capsys.readouterr().err
    batch = policy.batch(mixed(qwen))
    assert len(batch["inputs"]["input_ids"]) == 5


def test_pack_refuses_a_model_that_would_not_see_the_branches(qwen):
    sharing = Sharing(qwen.model, qwen.processor)
    sharing.can_branch = False
    with pytest.raises(AssertionError, match="cannot branch a prompt"):
        pack(mixed(qwen), sharing, qwen.model)


def test_where_the_file_is_not_here_nothing_is_shared(qwen, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert rollout.share(qwen.model, qwen.processor) is None
    assert capsys.readouterr().err == "siblings.py is not here: each answer is computed with its own copy of its prompt.\n"


def test_two_prompts_with_one_id_are_refused(qwen):
    policy = branching(qwen.model, qwen.processor)
    other = replace(qwen.samples[1], id=qwen.samples[0].id)
    with pytest.raises(AssertionError, match="two prompts have the id"):
        pack(answered([qwen.samples[0], other], qwen.processor), policy.sharing, qwen.model)


@pytest.mark.parametrize("budget", [1, 100, 8192])
def test_an_update_is_the_same_either_way(tiny, one_rank, tmp_path, budget):
    """Gradient, sums and norm, with an old and a reference policy, whatever the micro-batches."""
    samples = random_groups(tiny, tmp_path, 5)
    args = replace(ARGS, kl_coef=0.1, micro_batch_tokens=budget)
    found = []
    for shared in (False, True):
        policy, probe = (branching if shared else Policy)(tiny.model, tiny.processor), Probe(tiny.model)
        old = {k: [x - 0.1 for x in row] for k, row in train_grpo.logprob_pass(policy, samples, args).items()}
        ref = {k: [x + 0.2 for x in row] for k, row in old.items()}
        found.append((train_grpo.update(policy, probe, samples, old, ref, args), probe.gradients))
    ((plain, norm, tail), want), ((sums, packed_norm, packed_tail), got) = found
    assert_same_gradients(got, want, 1e-4)
    assert sums == pytest.approx(plain, rel=1e-3)
    assert (packed_norm, packed_tail) == pytest.approx((norm, tail), rel=1e-3)


def test_sft_packs_rows_too(qwen, one_rank, tmp_path):
    """Prompts that differ, so nothing is shared, in one row without padding; the step is that of padded rows."""
    samples = list({s.id: s for s in random_groups(qwen, tmp_path, 3)}.values())
    assert len({s.length() for s in samples}) > 3
    found = []
    for policy in (branching(copy.deepcopy(qwen.model), qwen.processor),
                   Policy(copy.deepcopy(qwen.model), qwen.processor)):
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        sums, norm = train_sft.update(policy, optimizer, samples, train_sft.Args(max_grad_norm=1e9))
        found.append((sums, norm, [p.detach() for p in policy.parameters()]))
        if policy.sharing:
            assert policy.batch(samples)["inputs"]["input_ids"].shape == (1, sum(s.length() for s in samples))
    (packed, packed_norm, weights), (plain, norm, others) = found
    assert packed["loss"] == pytest.approx(plain["loss"], rel=1e-5) and packed_norm == pytest.approx(norm, rel=1e-3)
    assert max((a - b).abs().max() for a, b in zip(weights, others)) < 1e-4 * norm


LAYOUTS = {"3B": ((16, 2), 8), "7B": ((28, 4), 8), "2B": ((12, 2), 8), "no groups": ((4, 4), 16),
           "one key head": ((4, 1), 16), "heads of 128": ((4, 2), 128)}


# one answer or three, by turns; both with -m slow
@pytest.mark.parametrize("heads, head_dim, n", [
    pytest.param(*layout, n, id=f"{name}-{n}", marks=pytest.mark.slow if (n == 3) != (i % 2 == 0) else ())
    for i, (name, layout) in enumerate(LAYOUTS.items()) for n in (1, 3)])
def test_real_head_layouts_and_batches_of_one_prompt(qwen, heads, head_dim, n):
    """Sampler, rows, packed row and flex against the model's own forward, in float64: of three prompts two and a
    last one, a prompt alone with pictures, one without; gradients too.

    The story: `rollout.py --limit 1`, or a last batch of one prompt, was a traceback about strides on every
    published head layout. The toy's heads all have keys of their own, and the tests' models had one key head.
    """
    model = conftest.build_model("qwen2_5_vl", qwen.processor, heads, head_dim).double().eval()
    engine = sampler(copy.deepcopy(model), qwen.processor, 2 * n)
    policy = branching(copy.deepcopy(model), qwen.processor)
    assert engine.sharing.can_branch and policy.sharing.can_branch
    two, text, image = by_id(qwen.samples, "two", "text", "rgba")
    for prompts in ([two, text, image], [two], [text]):
        done = engine.generate(prompts, n, 1.0, 1.0, 6, 0)
        want = [plain_logprobs(model, qwen.processor, s, 1.0)[0].detach() for s in done]
        for s, truth in zip(done, want, strict=True):
            assert s.sampler_logprobs == pytest.approx(truth.tolist(), abs=1e-4)
        plain = collate(done, qwen.processor)
        packed, flex = (pack(done, policy.sharing, policy.model, flex=flex) for flex in (False, True))
        with torch.no_grad():
            for batch in (plain, packed, flex):
                for row, truth in zip(policy(batch, 1.0)[0], want):
                    torch.testing.assert_close(row[: len(truth)], truth.to(row), rtol=0, atol=1e-4)
        found = [results(policy, batch, policy.model)[2] for batch in (packed, plain)]
        assert_same_gradients(*found)


# ---------------------------------------------------------------------------------------------
# Dead groups


def test_what_teaches_nothing_costs_no_pass(qwen, one_rank):
    """Samples without an advantage count in the divisor and nowhere else; a divergence needs them all."""
    samples = mixed(qwen)
    for s in samples[:3]:
        s.advantage = 0.0
    policy, probe = branching(qwen.model, qwen.processor), Probe(qwen.model)
    rows = []
    policy.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0]["mask"])))
    sums, _, _ = train_grpo.update(policy, probe, samples, None, None, ARGS)
    skipped = probe.gradients
    assert rows == [2]
    assert sums["update_tokens"] == sum(len(s.completion_ids) for s in samples[3:])
    assert sums["divisor"] == sum(len(s.completion_ids) for s in samples)
    monkey = replace(ARGS, kl_coef=1e-30)  # so small that the gradient is the same
    ref = train_grpo.logprob_pass(policy, samples, monkey)
    rows.clear()
    sums, _, _ = train_grpo.update(policy, probe, samples, None, ref, monkey)
    assert rows == [5] and sums["update_tokens"] == sums["divisor"]
    assert_same_gradients(skipped, probe.gradients)


# ---------------------------------------------------------------------------------------------
# Image features


def count_towers(model):
    """Count the calls of the vision tower."""
    calls = []
    model.base_model.visual.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_features_are_computed_once_and_change_nothing(tiny, tmp_path):
    samples = random_groups(tiny, tmp_path, 7)
    pictures = {i for s in samples for i in s.images}
    freeze(tiny.model, False, False, True)
    plain = Policy(tiny.model, tiny.processor)
    want = results(plain, plain.batch(samples), tiny.model)
    sharing = Sharing(tiny.model, tiny.processor)
    calls = count_towers(tiny.model)
    for shared in (True, False, True):
        sharing.can_branch = shared
        policy = Policy(tiny.model, tiny.processor, sharing)
        got = results(policy, policy.batch(samples), tiny.model)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-5)
        assert_same_gradients(got[2], want[2], 1e-4)
    assert len(calls) == len(pictures) > 2
    engine = sampler(tiny.model, tiny.processor, 8, sharing)
    prompts = [replace(s, completion_ids=[]) for s in {s.id: s for s in samples}.values()]
    said = engine.generate(prompts, 2, 1.0, 1.0, 8, 0)
    assert len(calls) == len(pictures)  # the sampler's are the same features
    without = sampler(tiny.model, tiny.processor, 8).generate(prompts, 2, 1.0, 1.0, 8, 0)
    assert [s.completion_ids for s in said] == [s.completion_ids for s in without]


def test_features_do_not_depend_on_the_batch(qwen):
    """Bit for bit, so that a run that goes on from a checkpoint sees what the first one saw."""
    freeze(qwen.model, False, False, True)
    samples = [s for s in qwen.samples if s.images]
    together, alone = (Sharing(qwen.model, qwen.processor).vision for _ in range(2))
    images = [i for s in samples for i in s.images]
    features = together.features(qwen.model.base_model, images).pooler_output
    for image, want in zip(images, features, strict=True):
        assert torch.equal(alone.features(qwen.model.base_model, [image]).pooler_output[0], want)


def test_the_cache_keeps_its_bound(qwen):
    freeze(qwen.model, False, False, True)
    base, images = qwen.model.base_model, [png(colour) for colour in ("red", "white", "blue")]
    cache = Sharing(qwen.model, qwen.processor).vision
    each = cache.computed(base, images[0])[1][0].nbytes
    assert each == cache.held == 4 * 128 * 4  # 4 tokens, 128 wide, float32
    cache.limit = 2 * each
    for i in (1, 0, 2):
        cache.computed(base, images[i])
    assert [*cache.kept] == [images[0], images[2]]  # the one unasked for longest went
    assert cache.held == 2 * each
    cache.limit = 1  # room for nothing: every answer is still right
    found = cache.features(base, images).pooler_output
    assert len(found) == 3 and cache.held == 0 and not cache.kept


@pytest.mark.parametrize("parts", [(True, False, True), (False, True, True)])
def test_no_cache_where_vision_or_connector_train(tiny, parts):
    freeze(tiny.model, *parts)
    assert Sharing(tiny.model, tiny.processor).vision is None
    freeze(tiny.model, False, False, True)
    assert Sharing(tiny.model, tiny.processor, 0).vision is None
    assert Sharing(tiny.model, tiny.processor).vision is not None


# ---------------------------------------------------------------------------------------------
# The head


@pytest.mark.parametrize("tokens", [256, pytest.param(1024, marks=pytest.mark.slow)])
def test_the_head_never_holds_all_logits(qwen, monkeypatch, tokens):
    """With a vocabulary of 150,000, the peak is that of one chunk, however many tokens there are."""
    monkeypatch.setattr("policy.HEAD_NUMBERS", 32 * 150_000)
    head = torch.nn.Linear(128, 150_000, bias=False)
    monkeypatch.setattr(qwen.model, "get_output_embeddings", lambda: head)
    policy = Policy(qwen.model, qwen.processor)
    samples = [replace(qwen.samples[-1], completion_ids=[9] * 64) for _ in range(tokens // 64)]
    batch = policy.batch(samples)
    policy(batch, 1.0)[0].sum().backward()  # the gradient of the head, which stays, is there now
    peak = bench.peak_bytes(lambda: policy(batch, 1.0)[0].sum().backward())
    chunk = 4 * 32 * 150_000
    # logits, softmax, its gradient; the head's, so far and of this chunk
    assert 2 * chunk < peak < 7 * chunk + 8 * head.weight.numel() < 4 * 256 * 150_000 * 2


# ---------------------------------------------------------------------------------------------
# The sampler's cache


def test_siblings_share_their_prompts_cache(tiny):
    """The same answers as with the library's cache and a copy of the prompt for each: prompts of unequal length,
    rows that end at different times, and more tokens than the cache had room for at first."""
    engine = sampler(tiny.model, tiny.processor, 64)
    engine.eos = torch.arange(10, 16)  # more ways to end
    assert engine.decoder
    shared = engine.generate(tiny.samples, 3, 1.0, 1.0, 80, 0)
    engine.decoder = None
    apart = engine.generate(tiny.samples, 3, 1.0, 1.0, 80, 0)
    lengths = {len(s.completion_ids) for s in apart}
    assert len(lengths) > 5 and max(lengths) > 64
    same = [a.completion_ids == b.completion_ids for a, b in zip(shared, apart)]
    assert sum(same) >= len(same) - 1  # in 80 tokens, rounding may flip one
    for a, b, equal in zip(shared, apart, same):
        if equal:
            assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=1e-4)


@pytest.mark.parametrize("skip", [[1, 0], [0], [0, 2, 0]])
@pytest.mark.parametrize("h", [1, 2])
def test_siblings_by_hand(skip, h):
    """Prompts, some padded on the left by `skip`, with two answers each; `h` key heads, each for two query heads;
    then one row retires."""
    torch.manual_seed(0)
    P = len(skip)
    layer = type("Layer", (), {"keys": torch.randn(P, h, 3, 4), "values": torch.randn(P, h, 3, 4)})
    cache = type("Cache", (), {"layers": [layer]})
    siblings = PromptCache(cache, (torch.arange(3) >= torch.tensor(skip)[:, None]).long(), 2)
    owners, own = [p for p in range(P) for _ in range(2)], [[] for _ in range(2 * P)]
    for step in range(40):
        if step == 20:
            rows = [r for r in range(2 * P) if r != 1]
            siblings.reorder_cache(torch.tensor(rows))
            owners, own = [owners[r] for r in rows], [own[r] for r in rows]
        R = len(owners)
        query, key, value = torch.randn(R, 2 * h, 4), torch.randn(R, h, 4), torch.randn(R, h, 4)
        siblings.length += 1
        got = siblings.attend(0, query, key, value, 0.5)
        assert got.shape == (R, 2 * h * 4)
        for r, owner in enumerate(owners):
            own[r].append((key[r], value[r]))
            for head in range(2 * h):
                seen = [torch.cat([prompt[owner, head // 2, skip[owner]:],
                                   torch.stack([pair[i][head // 2] for pair in own[r]])])
                        for i, prompt in enumerate((layer.keys, layer.values))]
                want = (0.5 * seen[0] @ query[r, head]).softmax(-1) @ seen[1]
                torch.testing.assert_close(got[r].view(-1, 4)[head], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_over_a_row_is_one_softmax(padded):
    """Each token against a softmax over what it may see, written out; the gradient against finite differences.

    Prompts of 5 tokens, or of 3 and 5; the first has two answers, of 4 and 1 tokens, the second one of 2.
    """
    torch.manual_seed(0)
    P, L, n, C, h, D = shape = (2, 5, 2, 4, 2, 8)
    lengths, answers = [3 if padded else 5, 5], {(0, 0): 4, (0, 1): 1, (1, 0): 2}
    places = [(p, None, i) for p in range(P) for i in range(lengths[p])]
    places += [(p, j, i) for (p, j), length in answers.items() for i in range(length)]
    slots = torch.tensor([p * L + i if j is None else P * L + (p * n + j) * C + i for p, j, i in places])
    q, k, v = (torch.randn(1, h, len(places), D, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    bias = torch.zeros(P, 1, 1, L, dtype=torch.float64)
    bias[0, ..., lengths[0]:] = -torch.inf
    bias = bias if padded else None
    parts = shape[:4], slots, sum(lengths), bias, 0.3
    got = RowAttention.apply(q, k, v, *parts)
    assert got.shape == (1, len(places), h, D)
    for a, (p, j, i) in enumerate(places):
        seen = [b for b, (p2, j2, i2) in enumerate(places)
                if p2 == p and ((j2 == j and i2 <= i) or (j2 is None and j is not None))]
        weights = (0.3 * k[0, :, seen] @ q[0, :, a, :, None]).softmax(1)  # (h, keys, 1)
        torch.testing.assert_close(got[0, a], (weights * v[0, :, seen]).sum(1))
    assert torch.autograd.gradcheck(lambda *x: RowAttention.apply(*x, *parts), (q, k, v))


def test_a_row_is_laid_on_rectangles_and_back():
    """Two prompts of 2 and 1 tokens and one answer of 2 to the second; what no token fills is 0."""
    x = torch.arange(1.0, 6).view(1, 5, 1, 1)
    slots = torch.tensor([0, 1, 2, 6, 7])  # P, L, n, C are 2, 2, 1, 2
    prompts, rest = rectangles(x, (2, 2, 1, 2), slots)
    assert prompts.shape == rest.shape == (2, 1, 2, 1)
    assert prompts.flatten(1).tolist() == [[1, 2], [3, 0]] and rest.flatten(1).tolist() == [[0, 0], [4, 5]]
    assert torch.equal(row(prompts, rest, slots, 3), x)
