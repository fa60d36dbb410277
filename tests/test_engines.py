"""The seam between sampler and trainer: a doctor that must find every sabotage, our vLLM engine
around a fake vllm, and the weights that mend what rounding leaves between the two programs.

The real vLLM does not run here; test_vllm.py asks it, in an environment of its own.
"""

import copy
import importlib.util
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import rollout
import test_parity as parity
import train_grpo
import utils
from conftest import ROOT, png
from test_parity import by_id
from utils import Policy, RunError, UserError

ARGS = rollout.Args(max_new_tokens=8)


def around(thing, name, change):
    """Let `change` stand before a method: it is called with the honest one and the arguments."""
    honest = getattr(thing, name)
    setattr(thing, name, lambda *args, **kwargs: change(honest, *args, **kwargs))


# ---------------------------------------------------------------------------------------------
# The doctor


@pytest.fixture
def pair(tiny):
    """A family and its sampler; biases, which start at 0, get values to disagree about."""
    generator = torch.Generator().manual_seed(0)
    for weight in tiny.model.parameters():
        if not weight.any():
            weight.data.normal_(0, 0.2, generator=generator)
    tiny.engine = rollout.make_engine("hf", tiny.model, tiny.processor, ARGS)
    return tiny


def failed(pair, *ids):
    """The names of the doctor's rows that did not pass."""
    samples = by_id(pair.samples, *ids) if ids else pair.samples
    policy = Policy(pair.model, pair.processor)
    rows = rollout.doctor(pair.engine, policy, samples, pair.processor, ARGS)
    return [name for name, passed, _ in rows if not passed]


@pytest.mark.parametrize("sharded", [False, True])
def test_an_honest_engine_passes_and_no_weight_changes(pair, sharded, one_rank):
    """Weights are negated on the way, shards or what was gathered; all come back to the bit."""
    before = {name: weight.detach().clone() for name, weight in pair.model.named_parameters()}
    policy = Policy(pair.model, pair.processor)
    policy = utils.shard(policy, torch.float32) if sharded else policy
    rows = rollout.consult(pair.engine, policy, pair.samples, pair.processor, ARGS)
    assert len(rows) >= 13 and all(row["passed"] for row in rows)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the root keeps what it gathered; below it lies what will train
    for model in (policy.model, pair.engine.model):
        after = dict(rollout.whole_weights(model))
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


def reads(change):
    """The sampler reads changed prompts, and hands back the unchanged ones."""
    def sabotage(engine):
        def generate(honest, samples, n, *rest):
            try:
                done = honest([change(s, engine.processor.image_token_id) for s in samples], n, *rest)
            except ValueError as error:  # transformers counts placeholders too
                raise RunError(str(error))
            asked = [s for s in samples for _ in range(n)]
            return [replace(d, prompt_ids=s.prompt_ids, images=s.images)
                    for d, s in zip(done, asked)]
        around(engine, "generate", generate)
    return sabotage


def doubled(ids, image):
    return [t for t in ids for _ in range(2 if t == image else 1)]


def in_prefill(name, change):
    """The sampler's model gets another argument with prompts, and the right one with each token."""
    def forward(honest, **given):
        if given["input_ids"].shape[1] > 1:
            given[name] = change(given["attention_mask"])
        return honest(**given)
    return lambda engine: around(engine.model, "forward", forward)


def asks(temperature):
    return lambda engine: around(engine, "generate", lambda honest, samples, n, t, *rest: honest(
        samples, n, temperature(t), *rest))


def remembering(engine):
    """What the vision tower said of a picture outlives a sync, as in an encoder cache."""
    said = {}

    def look(honest, pixels, *args, **kwargs):
        key = pixels.numpy().tobytes()
        said[key] = said.get(key) or honest(pixels, *args, **kwargs)
        return copy.deepcopy(said[key])
    around(engine.model.base_model.visual, "forward", look)


SABOTAGES = {  # what is done to the sampler, a row that must fail, one that must not
    "never synced": (lambda engine: around(engine, "sync", lambda honest, model: None),
                     "changed language weights arrive", "log-probabilities, images"),
    "pictures remembered": (
        remembering, "changed vision weights arrive", "changed language weights arrive"),
    "placeholders doubled": (
        reads(lambda s, image: replace(s, prompt_ids=doubled(s.prompt_ids, image))),
        "weights and prompts", None),
    "pictures swapped": (reads(lambda s, image: replace(s, images=s.images[::-1])),
                         "log-probabilities, images", "log-probabilities, text"),
    "no M-RoPE": (in_prefill("position_ids", lambda mask: (mask.cumsum(1) - 1).clamp(min=0)),
                  "log-probabilities, images", "log-probabilities, text"),
    "padding read": (
        in_prefill("attention_mask", torch.ones_like), "sampler: padding", "trainer: padding"),
    "always colder": (asks(lambda t: 0.7 * t), "log-probabilities, text", "sampler: padding"),
    "deaf to temperature": (asks(lambda t: 1.0 if t else 0), "log-probabilities, text", None),
    "nothing banned": (lambda engine: engine.banned.clear(), "no placeholder sampled", None),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_every_sabotage_is_found(pair, name):
    """By the row that names it, and not by one that would point elsewhere."""
    sabotage, row, innocent = SABOTAGES[name]
    sabotage(pair.engine)
    found = failed(pair)
    assert row in found and innocent not in found


@pytest.mark.parametrize("part", [
    "embed_tokens", "0.self_attn.v_proj", "1.mlp.down_proj", "language_model.norm", "patch_embed",
    "blocks.1.attn.qkv.bias", "merger"])
@pytest.mark.parametrize("kind", ["missed", "spoilt"])
def test_one_wrong_weight_is_found(pair, part, kind):
    """One that never arrives, or 1.5 times too large; the embedding is the head as well."""
    name, weight = next(x for x in pair.engine.model.named_parameters() if part in x[0])

    def sync(honest, model):
        old = weight.detach().clone()
        honest(model)
        weight.data.copy_(old if kind == "missed" else 1.5 * weight)

    around(pair.engine, "sync", sync)
    kind = "vision" if "visual" in name else "language"
    assert f"changed {kind} weights arrive" in failed(pair, "rgb", "grey")


def test_a_data_set_without_images_can_be_checked(qwen):
    qwen.engine = rollout.make_engine("hf", qwen.model, qwen.processor, ARGS)
    assert failed(qwen, "text") == []


def test_the_doctor_names_the_failed_checks(qwen, one_rank, capsys):
    """A table for the eye, then one error that names each failing check."""
    engine = rollout.make_engine("hf", qwen.model, qwen.processor, ARGS)
    engine.sync = lambda model: None
    with pytest.raises(UserError) as error:
        rollout.consult(engine, Policy(qwen.model, qwen.processor), qwen.samples, qwen.processor, ARGS)
    names = ", ".join(f"changed {kind} weights arrive" for kind in ("language", "vision", "last"))
    assert str(error.value).startswith(f"sampler and trainer disagree ({names}): ")
    table = capsys.readouterr().err
    assert table.count("FAILED") == 3 and "ok      image grids" in table


def test_probes_of_every_kind(qwen):
    """With an image, without, with two: taken from the data, made up where the data has none."""
    asked = partial(rollout.probes, processor=qwen.processor, max_prompt_tokens=2048)
    held = by_id(qwen.samples, "rgb", "rgba", "palette", "grey", "cmyk")
    first, second, text = *held[:2], *by_id(qwen.samples, "text")
    *plain, two = asked(held)[4:]
    assert asked(held)[:4] == held[:4] and two.images == first.images + second.images
    assert [s.id for s in plain] == ["rgb without its image", "rgba without its image"]
    assert all(s.images == [] and s.question == "What is it?" for s in plain)
    image, length = qwen.processor.image_token_id, len(two.prompt_ids)
    assert two.prompt_ids.count(image) == (first.prompt_ids + second.prompt_ids).count(image)
    assert two in asked(held, max_prompt_tokens=length)
    assert two not in asked(held, max_prompt_tokens=length - 1)
    assert [s.id for s in asked([text, first])] == ["rgb", "text", "rgb without its image"]
    mixed = asked([replace(first, images=[png("red")]), second])  # a parquet row has bytes
    assert mixed[-1].images == [png("red")] + second.images


# ---------------------------------------------------------------------------------------------
# The vLLM engine


class FakeParams(SimpleNamespace):
    def clone(self):
        return FakeParams(**vars(self))


class FakeLLM:
    """Keeps what it is asked, and answers in vLLM's form what it was told to answer."""

    def __init__(self, model, **options):
        self.options, self.calls = options, []
        caches = ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")
        self.llm_engine = SimpleNamespace(**{c: partial(self.calls.append, c) for c in caches})
        self.sleep = lambda level: self.calls.append(f"sleep {level}")
        self.wake_up = lambda tags: self.calls.append(f"wake up {tags}")

    def collective_rpc(self, function, args):
        assert function is rollout.reload_weights
        self.calls.append("load")
        self.loaded = dict(*args)

    def generate(self, prompts, params, use_tqdm):
        self.prompts, self.params, self.state = prompts, params, torch.get_rng_state()
        n, told = params[0].n, self.told
        # of each step log-probabilities by token, of others than the one that was sampled too
        outputs = [SimpleNamespace(token_ids=tuple(s.completion_ids), logprobs=[
            {0: SimpleNamespace(logprob=9.0), t: SimpleNamespace(logprob=p)}
            for t, p in zip(s.completion_ids, s.sampler_logprobs)]) for s in told]
        return [SimpleNamespace(prompt_token_ids=told[i].prompt_ids, outputs=outputs[i : i + n])
                for i in range(0, len(told), n)]


@pytest.fixture
def served(qwen, monkeypatch):
    """Our vLLM engine around the fake, which is told the answers of an embedded engine."""
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = FakeLLM, FakeParams
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    with mock.patch.dict(os.environ):  # which import_vllm adds to
        args = replace(ARGS, model=str(qwen.path))
        qwen.engine = rollout.make_engine("vllm", None, qwen.processor, args)
        qwen.llm = qwen.engine.llm
        qwen.prompts = by_id(qwen.samples, "two", "text", "rgba")
        yield qwen


def ask(served, samples=None, seed=0):
    samples = samples or served.prompts
    honest = rollout.HFEngine(served.model, served.processor, 64)
    served.llm.told = honest.generate(samples, 8, 1.0, 1.0, 8, 0)
    return served.engine.generate(samples, 8, 1.0, 1.0, 8, seed), served.llm.told


@pytest.mark.parametrize("kind", ["none", "one", "several"])
def test_vllm_answers_as_the_embedded_engine(served, kind, monkeypatch):
    """Text, finish reason, log-probabilities: every field, however a checkpoint gives its EOS."""
    common = Counter(t for s in ask(served)[1] for t in s.completion_ids).most_common(2)
    a, b = (token for token, _ in common)  # which end many answers
    served.model.generation_config.eos_token_id = {"none": None, "one": a, "several": [a, b]}[kind]
    served.processor.tokenizer.eos_token_id = a  # what "none" falls back on
    config = served.model.generation_config
    monkeypatch.setattr(utils, "load_generation_config", lambda path: config)
    served.engine = rollout.VLLMEngine(served.path, served.processor, ARGS)
    served.llm = served.engine.llm
    got, want = ask(served)
    assert got == want and {s.finish_reason for s in got} == {"stop", "length"}


def test_what_vllm_is_asked(served):
    """Text prompts with pictures in order, the plain policy less its placeholders, in one call."""
    ask(served)
    two, text, one = served.llm.prompts
    pictures = two["multi_modal_data"]["image"] + one["multi_modal_data"]["image"]
    want = [utils.open_image(i) for s in served.prompts for i in s.images]
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in want] and len(want) == 3
    assert text == {"prompt": served.prompts[1].prompt_text}
    bans = {served.processor.image_token_id: -100, served.processor.video_token_id: -100}
    asked = {"n": 8, "temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "logit_bias": bans}
    assert all(asked.items() <= vars(params).items() for params in served.llm.params)
    assert served.llm.options["max_model_len"] == 2048 + 8
    assert served.llm.options["logprobs_mode"] == "processed_logprobs"


def test_sleep_and_sync(served):
    """Weights before the cache that depends on them, and nothing said by the old ones after."""
    served.engine.sleep()  # on a CPU vLLM cannot
    served.engine.sync(served.model)
    caches = ["reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"]
    assert served.llm.calls == ["load", *caches]
    served.llm.calls.clear()
    served.engine.sleeps = True
    served.engine.sleep()
    served.engine.sleep()
    with pytest.raises(AssertionError, match="sync it before"):
        ask(served)
    served.engine.sync(served.model)
    assert served.llm.calls == [
        "sleep 1", "wake up ['weights']", "load", *caches, "wake up ['kv_cache']"]
    assert all(torch.equal(w, served.llm.loaded[n]) for n, w in served.model.named_parameters())
    assert ask(served)[0] == ask(served)[0]  # twice after one sync


def test_randomness_depends_on_step_and_rank_or_on_the_prompt(served, monkeypatch):
    states, seeds = [], []
    for rank, step in ((0, "0 1"), (0, "0 1"), (0, "0 2"), (1, "0 1")):
        monkeypatch.setenv("RANK", str(rank))
        ask(served, seed=step)
        states.append(served.llm.state.numpy().tobytes())
    assert states[0] == states[1] and len(set(states)) == 3
    assert not any(hasattr(params, "seed") for params in served.llm.params)
    served.engine.seed_requests = True
    for samples, step in ((served.prompts, 1), (served.prompts[::-1], 1), (served.prompts, 2)):
        ask(served, samples, step)
        seeds.append([params.seed for params in served.llm.params])
    assert seeds[0] == seeds[1][::-1] and len({*seeds[0], *seeds[2]}) == 6


def test_a_prompt_that_vllm_reads_otherwise_ends_the_run(served):
    honest, image = served.llm.generate, served.processor.image_token_id

    def generate(*args, **kwargs):
        for answer in (answers := honest(*args, **kwargs)):
            answer.prompt_token_ids = doubled(answer.prompt_token_ids, image)
        return answers

    served.llm.generate, held = generate, served.prompts[0].prompt_ids.count(image)
    with pytest.raises(RunError, match=f"two as {2 * held} image .* the trainer as {held},"):
        ask(served)


def broken(*args, **kwargs):
    raise RuntimeError("CUDA out of memory\nand 40 lines more")


def test_failures_are_told_in_one_line(served, monkeypatch):
    served.llm.generate = broken
    with pytest.raises(RunError, match="answering .CUDA out of memory.*--vllm_memory.*[^\n]$"):
        ask(served)
    sys.modules["vllm"].LLM = broken
    with pytest.raises(UserError, match="starting .CUDA out of memory.*--engine hf.$"):
        rollout.VLLMEngine(served.path, served.processor, ARGS)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vllm cannot be imported .*--engine hf.$"):
        rollout.VLLMEngine(served.path, served.processor, ARGS)


def test_a_hanging_call_ends_the_process():
    """A quick call leaves no timer behind; a slow one ends the run with a sentence."""
    code = ("import rollout, time\nwith rollout.guarded('waking', 1): pass\ntime.sleep(1.5)\n"
            "print('alive', flush=True)\nwith rollout.guarded('answering', 1): time.sleep(60)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=40)
    assert (done.returncode, done.stdout) == (1, "alive\n")
    assert done.stderr == ("\nrank 0: vLLM did not end answering in 1 s; see --engine_timeout. "
                           "No run folder was written.\n")


# ---------------------------------------------------------------------------------------------
# Weights, choice, seeds


class ParallelLMHead(torch.nn.Linear):
    """Named as vLLM's, which repacks its weight for a kernel."""

    def __init__(self):
        super().__init__(2, 2)
        self.packed = []
        self.quant_method = SimpleNamespace(
            process_weights_after_loading=lambda layer: layer.packed.append(layer.bias.sum().item()))


class Served(torch.nn.Sequential):
    def load_weights(self, weights):
        named = dict(self.named_parameters())
        return {name for name, weight in weights if named[name].data.copy_(weight) is not None}


def test_reloading_misses_no_weight():
    """Inside vLLM's worker: all arrive, the head is packed anew with them, no wrapper stays."""
    model = Served(torch.nn.Linear(2, 2), ParallelLMHead())
    runner = SimpleNamespace(get_model=lambda: model, reload_weights=lambda weights_iterator:
                             model.load_weights(weights_iterator))
    worker = SimpleNamespace(model_runner=runner)
    stream = {name: torch.ones(w.shape) for name, w in model.named_parameters()}
    rollout.reload_weights(worker, iter(stream.items()))
    assert all((w == 1).all() for w in model.parameters()) and model[1].packed == [2.0]
    del stream["0.bias"]
    with pytest.raises(RuntimeError, match="^1 weights .* never came: .'0.bias'.$"):
        rollout.reload_weights(worker, iter(stream.items()))
    with pytest.raises(KeyError):
        rollout.reload_weights(worker, iter({"stranger": torch.ones(1)}.items()))
    assert "load_weights" not in vars(model)


def test_whole_weights_come_one_by_one(qwen, one_rank, monkeypatch):
    """Of a sharded model: a weight is gathered when it is drawn, and none twice."""
    want = {name: w.detach().clone() for name, w in qwen.model.named_parameters()}
    policy, gathered = utils.shard(Policy(qwen.model, qwen.processor), torch.float32), []
    honest = DTensor.full_tensor
    monkeypatch.setattr(DTensor, "full_tensor", lambda w: gathered.append(w) or honest(w))
    seen = []
    for name, weight in rollout.whole_weights(policy.model):
        seen.append(name)
        assert len(gathered) == len(seen) and torch.equal(weight, want[name])
    assert seen == list(want)


@pytest.mark.parametrize("cuda, found, choice", [
    (False, False, "hf"), (False, True, "hf"), (True, False, "hf"), (True, True, "vllm")])
def test_choice_and_seeds(cuda, found, choice, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found and name == "vllm" or None)
    assert rollout.choose_engine("auto") == choice
    assert [rollout.choose_engine(kind) for kind in ("hf", "vllm")] == ["hf", "vllm"]
    assert (rollout.seed_number("0 1", 0), rollout.seed_number(7, "two")) == (0, 0)  # for ever
    seeds = {rollout.seed_number(i) for i in range(1000)}
    assert len(seeds) == 1000 and 2**30 < max(seeds) < 2**31


# ---------------------------------------------------------------------------------------------
# Importance weights


def test_update_weighs_by_trainer_over_sampler(qwen, one_rank):
    """Token by token: a surrogate, weighed by how much likelier the trainer finds it, up to 1.5;
    the divergence is not weighed. And the sums that say how far the two have strayed."""
    args = replace(parity.ARGS, tis_cap=1.5, kl_coef=0.1, temperature=0.7, micro_batch_size=2)
    samples, policy, probe = parity.mixed(qwen), Policy(qwen.model, qwen.processor), parity.Probe(qwen.model)
    old, ref, drawn = (parity.moved_logprobs(policy, samples, qwen.processor, k) for k in (1, 2, 3))
    for s in samples:
        s.sampler_logprobs = drawn[id(s)]
    sums, _, tail = train_grpo.update(policy, probe, samples, old, ref, qwen.processor, args)
    total, gaps, capped = 0.0, [], 0
    for s in samples:
        logprobs, _ = parity.plain_logprobs(qwen.model, qwen.processor, s, 0.7)
        for new, was, first, said in zip(logprobs, old[id(s)], ref[id(s)], s.sampler_logprobs):
            ratio, weight = (new - was).exp(), min(math.exp(was - said), 1.5)
            gain = torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.2) * s.advantage)
            total = total - weight * gain + 0.1 * ((first - new).exp() - 1 - (first - new))
            gaps.append(was - said)
            capped += weight == 1.5
    (total / len(gaps)).backward()
    parity.assert_same_gradients(probe.gradients, parity.gradients(qwen.model))
    assert 0 < capped < len(gaps) and sums["loss"] == pytest.approx(total.item(), rel=1e-4)
    gaps = torch.tensor(gaps)
    want = {"gap": gaps.abs(), "ratio": gaps.exp(), "ratio_squared": gaps.exp() ** 2}
    assert {f"sampler_{k}": sums[f"sampler_{k}"] for k in want} == pytest.approx(
        {f"sampler_{k}": v.sum().item() for k, v in want.items()}, rel=1e-4)
    assert tail == pytest.approx(gaps.abs().quantile(0.99).item(), rel=1e-4)


def test_one_policy_needs_no_weights(qwen, one_rank):
    """Where the sampler says what the trainer says, weighing changes no bit; nor without a cap."""
    policy, probe = Policy(qwen.model, qwen.processor), parity.Probe(qwen.model)
    results, samples = [], parity.mixed(qwen)
    said = train_grpo.logprob_pass(policy, samples, qwen.processor, parity.ARGS)
    for cap, agree in ((0.0, False), (0.0, True), (2.0, True), (2.0, False)):
        for s in samples:
            s.sampler_logprobs = said[id(s)] if agree else [-1.0] * len(s.completion_ids)
        args = replace(parity.ARGS, tis_cap=cap)
        train_grpo.update(policy, probe, samples, None, None, qwen.processor, args)
        results.append(probe.gradients)
    for other in results[1:3]:
        parity.assert_same_gradients(other, results[0], tolerance=0)
    with pytest.raises(AssertionError):
        parity.assert_same_gradients(results[3], results[0])
