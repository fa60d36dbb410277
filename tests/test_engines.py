"""The seam between sampler and trainer: a doctor that must find every sabotage, our vLLM engine
around a mock of vllm (test_vllm.py has the real one), and the weights that mend what is left."""

import atexit
import copy
import math
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tokenizers import processors

import doctor
import rollout
import toy
import train_grpo
import train_sft
import utils
from conftest import FAMILIES, build_model, build_processor, examined, sampler
from data import load_samples
from pictures import open_image
from policy import bound_pixels, Policy, load_model, load_processor, shard
from runs import ROOT, fork
from utils import RunError, UserError
import test_parity as parity

ARGS = rollout.Args(max_new_tokens=8)
IMAGE = toy.SPECIAL.index("<|image_pad|>")
ANY = mock.ANY
GROUPS = {train_grpo: {"mini_batch_size": 2, "group_size": 2, "max_new_tokens": 4}, train_sft: {}}


# ---------------------------------------------------------------------------------------------
# The doctor


@pytest.fixture
def dtype():
    """Of what is computed, in a pair."""
    return "float32"


@pytest.fixture
def pair(tiny, dtype, one_rank):
    """A family, its policy and its sampler: with biases, which start at 0, and a wish to say placeholders."""
    generator = torch.Generator().manual_seed(0)
    for weight in [w for w in tiny.model.parameters() if not w.any()]:
        weight.data.normal_(0, 0.2, generator=generator)
    tiny.model.get_output_embeddings().weight.data[IMAGE] *= 8
    sharing = rollout.share(tiny.model, tiny.processor, megabytes=0)  # as doctor.py does
    tiny.args = replace(ARGS, dtype=dtype)
    tiny.engine = rollout.make_engine("hf", tiny.model, tiny.processor, tiny.args, sharing)
    tiny.policy = Policy(tiny.model, tiny.processor)
    if dtype == "bfloat16":  # masters, and a compute dtype, as the stages have them
        tiny.policy = shard(tiny.policy, torch.bfloat16)
    return tiny


@pytest.mark.parametrize("family, case", [
    pytest.param(family, case, marks=pytest.mark.slow if i == k else ()) for k, family in enumerate(FAMILIES)
    for i, case in enumerate(("text alone", "all kinds", "all kinds, sharded"))], indirect=["family"])
def test_an_honest_engine_passes_and_no_weight_changes(pair, case, one_rank):
    """Weights are negated on the way, shards or what was gathered; all come back to the bit."""
    before = {name: weight.detach().clone() for name, weight in pair.model.named_parameters()}
    policy = Policy(pair.model, pair.processor)
    policy = shard(policy, torch.float32) if "sharded" in case else policy
    samples = [s for s in pair.samples if not s.images or "all" in case]
    rows = doctor.consult(pair.engine, policy, samples, pair.processor, ARGS)
    assert len(rows) == (10 if case == "text alone" else 12) and all(row["passed"] for row in rows)
    for model in (policy.model, pair.engine.model):
        after = dict(rollout.whole_weights(model))
        assert len(after) == len(before) and all(torch.equal(after[n], before[n]) for n in before)


def reads(change):
    """The sampler reads changed prompts, and hands back the unchanged ones."""
    def generate(honest, samples, n, *rest):
        try:
            done = honest([change(s) for s in samples], n, *rest)
        except ValueError as error:  # transformers counts placeholders too
            raise RunError(str(error))
        asked = [s for s in samples for _ in range(n)]
        return [replace(d, prompt_ids=s.prompt_ids, images=s.images) for d, s in zip(done, asked)]
    return generate


def prefills(name, change):
    """The sampler's model gets another argument with prompts, and the right one with each token."""
    return lambda honest, **given: honest(**given | (
        {name: change(given["attention_mask"])} if given["input_ids"].shape[1] > 1 else {}))


def spoils(part, factor):
    """After each sync a weight is `factor` times too large; with None it is what it was before."""
    def sync(honest, model):
        mine = next(w for name, w in honest.__self__.model.named_parameters() if part in name)
        old = mine.detach().clone()
        honest(model)
        mine.data.copy_(factor * mine if factor else old)
    return sync


def leaves_open(number):
    """At one sync a weight never comes, and what stands in its place is NaN."""
    def sync(honest, model):
        honest(model)
        sampler = honest.__self__
        sampler.synced = getattr(sampler, "synced", 0) + 1
        if sampler.synced == number:
            next(w for name, w in sampler.model.named_parameters() if "up_proj" in name).data.fill_(math.nan)
    return sync


SMALL = [("blocks.1.attn.qkv.bias", "vision", None)]  # moves answers by 0.07 to 0.15 nats: bfloat16 may do so too
SABOTAGES = {  # method of the sampler, what stands in its place, a row that fails, one that doesn't
    "never synced": ("sync", lambda honest, model: None,
                     "changed language weights arrive", "log-probabilities, images"),
    "NaN": ("sync", leaves_open(2), "changed language weights arrive", "and go again"),
    "doubled": ("generate", reads(lambda s: replace(s, prompt_ids=[
        t for t in s.prompt_ids for _ in range(2 if t == IMAGE else 1)])),
        "weights and prompts", "and go again"),
    "no M-RoPE": ("forward", prefills("position_ids", lambda m: (m.cumsum(1) - 1).clamp(min=0)),
                  "log-probabilities, images", "log-probabilities, text"),
    "padding read": ("forward", prefills("attention_mask", torch.ones_like),
                     "sampler: padding", "trainer: padding"),
    "colder": ("generate", lambda honest, samples, n, t, *rest: honest(samples, n, 0.7 * t, *rest),
               "log-probabilities, text", "sampler: padding"),
    "deaf": ("generate", lambda honest, samples, n, t, *rest: honest(samples, n, t and 1.0, *rest),
             "log-probabilities, text", "sampler: padding"),
    "never greedy": ("generate", lambda honest, samples, n, t, *rest: honest(samples, n, t or 0.5, *rest),
                     "greedy tokens agree", "log-probabilities"),
    "unbanned": ("generate", lambda honest, *rest: honest.__self__.banned.clear() or honest(*rest),
                 "no placeholder sampled", "trainer: padding")} | {
    f"{part} {factor}": ("sync", spoils(part, factor), f"changed {tower} weights arrive", "padding")
    for part, tower, factor in (
        ("embed_tokens", "language", None), ("0.self_attn.v_proj", "language", 1.5),
        ("e_model.norm", "language", 1.5), ("blocks.1.attn.qkv.weight", "vision", None),
        ("patch_embed", "vision", 3), ("merger", "vision", None), *SMALL)}


# each in one family by turns; in all of them, and by turns in bfloat16, with -m slow
CASES = [pytest.param(family, dtype, *how, id=f"{family}-{name}-{dtype}",
                      marks=() if i % 3 == k and dtype == "float32" else pytest.mark.slow)
         for dtype in ("float32", "bfloat16")
         for i, (name, how) in enumerate(SABOTAGES.items()) for k, family in enumerate(FAMILIES)
         if dtype == "float32" or i % 3 == k and not name.startswith(SMALL[0][0])]


@pytest.mark.parametrize("family, dtype, method, change, row, innocent", CASES, indirect=["family"])
def test_every_sabotage_is_found(pair, dtype, method, change, row, innocent):
    """In one sentence, by the row that names it, and not by one that would point elsewhere."""
    thing = pair.engine.model if method == "forward" else pair.engine
    honest = getattr(thing, method)
    setattr(thing, method, lambda *args, **kwargs: change(honest, *args, **kwargs))
    with pytest.raises(UserError, match="^sampler and trainer disagree .*[.]$") as found:
        doctor.consult(pair.engine, pair.policy, pair.samples, pair.processor, pair.args)
    assert row in str(found.value) and innocent not in str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize("family, heads, layers, seeds", [
    (None, None, 4, 20), ("qwen2_vl", (16, 2), 2, 2), ("qwen2_5_vl", (16, 2), 12, 2), ("qwen3_vl", (16, 2), 2, 2)])
def test_honest_pairs_pass_in_bfloat16_whatever_is_drawn(one_rank, family, heads, layers, seeds):
    """In bfloat16 two of seven greedy answers were the same, before near-ties were let be: the run was refused."""
    args = replace(ARGS, max_new_tokens=32, dtype="bfloat16")
    processor = build_processor(family) if family else load_processor(ROOT / "toy_model")
    model = load_model(ROOT / "toy_model")
    if family:
        model = build_model(family, processor, heads, num_hidden_layers=layers)
    engine = rollout.make_engine("hf", model, processor, args, rollout.share(model, processor, 0))
    policy = shard(Policy(model, processor), torch.bfloat16).eval()
    samples = load_samples(ROOT / "toy_data" / "validation.jsonl", processor, 2048)[:64]
    for seed in range(seeds):
        assert not examined(engine, policy, processor, samples, args, seed), seed


def test_probes_of_every_kind(qwen):
    """With an image, without, with two: taken from the data, made up where the data has none."""
    a, b, text = parity.by_id(qwen.samples, "rgb", "grey", "text")
    c, d, two = doctor.probes([a, b], qwen.processor, 2048)[2:]
    assert [(s.question, s.images) for s in (c, d)] == [("What is it?", [])] * 2
    assert two.images == a.images + b.images
    assert two.prompt_ids.count(IMAGE) == (a.prompt_ids + b.prompt_ids).count(IMAGE)
    assert doctor.probes([a, b], qwen.processor, len(two.prompt_ids)) == [a, b, c, d, two]
    assert doctor.probes([text, a, b], qwen.processor, len(two.prompt_ids) - 1) == [a, b, text, c]
    assert doctor.probes([text, a], qwen.processor, 2048) == [a, text, c]


# ---------------------------------------------------------------------------------------------
# The vLLM engine, and what its samples weigh


@pytest.fixture
def served(qwen, monkeypatch):
    """Our vLLM engine around a mock, and three prompts."""
    parameters = type("SamplingParams", (SimpleNamespace,), {"clone": copy.copy})
    qwen.vllm = mock.MagicMock(SamplingParams=parameters)
    qwen.llm = qwen.vllm.LLM.return_value
    qwen.llm.llm_engine.reset_prefix_cache.return_value = True
    monkeypatch.setitem(sys.modules, "vllm", qwen.vllm)
    monkeypatch.setattr(rollout, "load_pretrained", lambda loader, path: qwen.model.generation_config)
    with mock.patch.dict("os.environ"):  # which import_vllm adds to
        args = replace(ARGS, model=str(qwen.path))
        qwen.engine = rollout.make_engine("vllm", None, qwen.processor, args)
        qwen.prompts = parity.by_id(qwen.samples, "two", "text", "rgba")
        yield qwen


def ask(served, prompts, seed=0, extra=()):
    """The embedded engine's answers; ours, when vLLM gives the same; prompts and parameters."""
    honest = sampler(served.model, served.processor, 64)
    want = honest.generate(prompts, 8, 1.0, 1.0, 8, 0)
    outputs = [SimpleNamespace(token_ids=tuple(s.completion_ids), logprobs=[
        {0: SimpleNamespace(logprob=9.0), t: SimpleNamespace(logprob=p)}  # 0: not sampled
        for t, p in zip(s.completion_ids, s.sampler_logprobs)]) for s in want]
    served.llm.generate.return_value = [
        SimpleNamespace(prompt_token_ids=(*extra, *s.prompt_ids), outputs=outputs[8 * i :][:8])
        for i, s in enumerate(prompts)]
    got = served.engine.generate(prompts, 8, 1.0, 1.0, 8, seed)
    return want, got, *served.llm.generate.call_args.args


@pytest.mark.parametrize("kind", ["none", "one", "several"])
def test_vllm_is_asked_and_answers_as_the_embedded_engine(served, kind):
    """Text, finish reason, log-probabilities: every field, however a checkpoint gives its EOS."""
    said = [t for s in ask(served, served.prompts)[0] for t in s.completion_ids]
    a, b = sorted({*said}, key=said.count)[-2:]  # which end many answers
    served.model.generation_config.eos_token_id = {"none": None, "one": a, "several": [a, b]}[kind]
    served.processor.tokenizer.eos_token_id = a  # what "none" falls back on
    served.engine = rollout.VLLMEngine(served.path, served.processor, ARGS)
    want, got, (two, text, one), params = ask(served, served.prompts)
    assert got == want and {s.finish_reason for s in got} == {"stop", "length"}
    seen = [p.tobytes() for asked in (two, one) for p in asked["multi_modal_data"]["image"]]
    assert seen == [open_image(i).tobytes() for s in served.prompts for i in s.images]
    assert text == {"prompt_token_ids": served.prompts[1].prompt_ids}
    assert [p["prompt_token_ids"].count(IMAGE) for p in (two, one)] == [2, 1]  # vLLM expands them
    asked = {"n": 8, "temperature": 1.0, "top_p": 1.0, "max_tokens": 8,
             "stop_token_ids": [a, b] if kind == "several" else [a],
             "logit_bias": {IMAGE: -100, served.processor.video_token_id: -100}}
    assert served.engine.seconds == 3600 and all(asked.items() <= vars(p).items() for p in params)
    assert served.vllm.LLM.call_args.kwargs["logprobs_mode"] == "processed_logprobs"


def test_sleep_and_sync(served, monkeypatch):
    """Weights before the cache that depends on them, and nothing that the old ones computed; what
    PyTorch holds in reserve is given back before vLLM maps either."""
    monkeypatch.setattr(torch.cuda, "empty_cache", served.llm.empty_cache)
    assert [served.engine.sleep() or served.engine.asleep  # on a CPU vLLM cannot; twice is once
            for served.engine.sleeps in (False, True, True)] == [False, True, True]
    with pytest.raises(AssertionError, match="sync it before"):
        ask(served, served.prompts)
    served.engine.sync(served.model)
    done, cached = mock.call, mock.call.llm_engine
    assert served.llm.mock_calls == [
        done.sleep(level=1), done.empty_cache(), done.wake_up(tags=["weights"]),
        done.collective_rpc(rollout.reload_weights, args=mock.ANY), cached.reset_prefix_cache(),
        cached.reset_mm_cache(), cached.reset_encoder_cache(), done.empty_cache(),
        done.wake_up(tags=["kv_cache"])]
    loaded = dict(*served.llm.collective_rpc.call_args.kwargs["args"])
    assert all(torch.equal(w, loaded[name]) for name, w in served.model.named_parameters())
    assert ask(served, served.prompts)[1] == ask(served, served.prompts)[1]  # twice after one sync
    cached = served.llm.llm_engine.reset_prefix_cache
    cached.return_value = False  # vLLM says no more than that
    with pytest.raises(RunError, match="taking over weights .a request still holds keys"):
        served.engine.sync(served.model)


def test_randomness_is_of_seed_step_and_prompt(served):
    """Each request has a seed of its own, whatever the order of the prompts; torch's is let be."""
    before = torch.get_rng_state()
    seeds = [[params.seed for params in ask(served, served.prompts[::order], step)[-1]]
             for order, step in ((1, "0 1"), (-1, "0 1"), (1, "0 2"), (1, "1 1"))]
    assert seeds[0] == seeds[1][::-1] and len({*seeds[0], *seeds[2], *seeds[3]}) == 9
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("setting", [
    lambda rust: rust.enable_truncation(5), lambda rust: rust.enable_padding(length=999),
    lambda rust: setattr(rust, "post_processor", processors.TemplateProcessing(
        single="<|im_end|> $A <|im_end|>", special_tokens=[("<|im_end|>", 2)]))])
def test_no_default_of_the_tokenizer_touches_a_prompt(served, setting):
    """A trainer's truncation and padding stay in tokenizer.json, llama's adds BOS: vLLM gets ids that
    were made without, and its own processor, which makes a text for each image, is to cut nothing."""
    tokenizer = served.engine.processor.tokenizer
    wanted = [asked["prompt_token_ids"] for asked in ask(served, served.prompts)[2]]
    setting(tokenizer.backend_tokenizer)
    encoded = tokenizer.backend_tokenizer.encode(served.prompts[1].prompt_text).ids
    assert encoded != served.prompts[1].prompt_ids == wanted[1]
    assert [asked["prompt_token_ids"] for asked in ask(served, served.prompts)[2]] == wanted
    assert served.vllm.LLM.call_args.kwargs["mm_processor_kwargs"] == {"truncation": False}


@pytest.mark.parametrize("least, most", [(0, 9000), (20_000, 0), (3000, 50_000)])
def test_vllm_bounds_an_images_pixels_too(served, least, most):
    """Its processor is its own: what ours was told, it is told, and nothing where nobody said anything."""
    bound_pixels(served.processor, served.path, least, most)
    args = replace(ARGS, model=str(served.path), min_pixels=least, max_pixels=most)
    rollout.make_engine("vllm", None, served.processor, args)
    size = served.vllm.LLM.call_args.kwargs["mm_processor_kwargs"].pop("size")
    assert size == dict(served.processor.image_processor.size)
    assert (least or size["shortest_edge"], most or size["longest_edge"]) == (*size.values(),)
    assert served.vllm.LLM.call_args.kwargs["mm_processor_kwargs"] == {"truncation": False}


def test_several_greedy_answers_are_asked_for_once(served):
    """vLLM refuses n > 1 at temperature 0: the answer is repeated, each time an object of its own."""
    ask(served, served.prompts[:1])
    served.llm.generate.return_value[0].outputs[1:] = []
    done = served.engine.generate(served.prompts[:1], 3, 0, 1.0, 8, 0)
    assert served.llm.generate.call_args.args[1][0].n == 1
    assert len(done) == 3 and done[0] == done[1] == done[2] and len({*map(id, done)}) == 3
    assert len({id(s.completion_ids) for s in done}) == len({id(s.rewards) for s in done}) == 3


def test_more_pictures_than_vllm_takes_are_refused_by_the_rehearsal(served):
    """Which asks the prompt with most of them, before step 1."""
    prompt = replace(served.prompts[0], images=served.prompts[0].images * 5)
    with pytest.raises(RunError, match="^the prompt two has 10 images, vLLM .* for 8: raise MOST_IMAGES .* hf$"):
        served.engine.generate([served.prompts[1], prompt], 2, 1.0, 1.0, 8, 0)
    with pytest.raises(UserError, match="answering the prompts .*two.* fails .RunError: the prompt two has 10 images"):
        doctor.rehearse(served.engine, [served.prompts[1], prompt], ARGS)
    ask(served, [replace(served.prompts[1], images=[])])


def test_failures_are_told_in_one_line(served, monkeypatch):
    """Other placeholders, no memory for answers or at the start, no vllm at all."""
    held = served.prompts[0].prompt_ids.count(IMAGE)
    with pytest.raises(RunError, match=f"^vLLM .* two as {held + 1} .* trainer as {held}, .*[.]$"):
        ask(served, served.prompts, extra=[IMAGE])
    served.llm.generate.side_effect = RuntimeError("CUDA out of memory\nand 40 more lines")
    with pytest.raises(RunError, match="^vLLM .*answering .CUDA out of memory.* --vllm_memory .*$"):
        ask(served, served.prompts)
    monkeypatch.setattr(served.engine, "SamplingParams", mock.Mock(side_effect=ValueError("n!")))
    with pytest.raises(RunError, match="^vLLM failed while answering .n!."):
        ask(served, served.prompts)
    served.engine.sleeps, served.llm.sleep.side_effect = True, MemoryError()
    with pytest.raises(RunError, match="^vLLM failed while going to sleep .MemoryError."):
        served.engine.sleep()
    served.vllm.LLM.side_effect = RuntimeError("no driver\nand 40 more lines")
    with pytest.raises(UserError, match="^--engine vllm: .* starting .no driver.* --engine hf[.]$"):
        rollout.VLLMEngine(served.path, served.processor, ARGS)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="^--engine vllm: vllm cannot be .* --engine hf[.]$"):
        rollout.import_vllm()


def ends_with_vllm(words):
    sys.modules["vllm"] = mock.MagicMock()
    client = sys.modules["vllm"].LLM.return_value.llm_engine.engine_core
    client.shutdown = lambda: print("vLLM ends", dist.is_initialized())

    def main(args):
        rollout.VLLMEngine(ROOT / "toy_model", load_processor(ROOT / "toy_model"), args)

    atexit.register(lambda: print("a group:", dist.is_initialized()))  # the first to come is the last to be called
    utils.run_script(main, rollout.Args)
    atexit._run_exitfuncs()  # which a fork leaves out


def test_vllm_ends_before_the_group_does():
    """The other way round its end would raise; and a group that nobody ends is a warning of NCCL's."""
    codes, out, err = fork("rollout.py", act=ends_with_vllm)
    assert (codes, out.splitlines()) == ([0], ["null", "vLLM ends True", "a group: False"]), err


def hang(words):
    engine = mock.MagicMock(seconds=0.5, asleep=False)
    rollout.VLLMEngine.sync(engine, torch.nn.Linear(1, 1))
    time.sleep(0.7)
    engine.llm.generate = lambda *args, **kwargs: time.sleep(print("alive", flush=True) or 30)
    rollout.VLLMEngine.generate(engine, [], 1, 1.0, 1.0, 8, 0)


def test_a_hanging_call_ends_the_process():
    """A quick call leaves no timer behind; a slow one ends the run with a sentence."""
    codes, out, err = fork("rollout.py", act=hang)
    assert (codes, out) == ([1], "alive\n") and err.count("\n") == 2
    assert "vLLM did not end answering in 0.5 s; see --engine_timeout." in err


def test_reloading_misses_no_weight():
    """All arrive, the head is packed anew after them, and no wrapper stays when something fails."""
    class Model(torch.nn.Sequential):
        def load_weights(self, weights):
            named = dict(self.named_parameters())
            return {n for n, weight in weights if named[n].data.copy_(weight) is not None}
    packed, worker = [], mock.Mock()
    method = SimpleNamespace(process_weights_after_loading=lambda x: packed.append(x.bias.tolist()))
    head = type("ParallelLMHead", (torch.nn.Linear,), {"quant_method": method})
    net = worker.model_runner.get_model.return_value = Model(torch.nn.Linear(2, 2), head(2, 2))
    worker.model_runner.reload_weights = lambda weights_iterator: net.load_weights(weights_iterator)
    stream = {name: torch.ones(w.shape) for name, w in net.named_parameters()}
    rollout.reload_weights(worker, iter(stream.items()))
    assert all((w == 1).all() for w in net.parameters()) and packed == [[1.0, 1.0]]
    del stream["0.bias"]
    with pytest.raises(RuntimeError, match="^1 weights .* never came: .'0.bias'.$"):
        rollout.reload_weights(worker, iter(stream.items()))
    with pytest.raises(KeyError):
        rollout.reload_weights(worker, iter([("stranger", torch.ones(1))]))
    assert "load_weights" not in vars(net)


def test_whole_weights_come_one_by_one():
    """The next one only when it is asked for: a model is never held twice."""
    drawn, model = [], torch.nn.ParameterDict({name: torch.zeros(1) for name in "abc"})
    listed = model.named_parameters
    model.named_parameters = lambda: (drawn.append(name) or (name, weight) for name, weight in listed())
    assert [drawn[:] for _ in rollout.whole_weights(model)] == [["a"], ["a", "b"], ["a", "b", "c"]]


@pytest.mark.parametrize("cuda, found", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_choice_and_seeds(cuda, found, monkeypatch):
    """vLLM where it can run, unless one is asked for; a seed that stays the same for ever."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found or None)
    want = ["vllm" if cuda and found else "hf", "hf", "vllm"]
    assert [rollout.choose_engine(kind) for kind in ("auto", "hf", "vllm")] == want
    assert [rollout.seed_number(i, "two") for i in ("0 1", 7)] == [1939820100, 280970847]
    assert 2**30 < max(map(rollout.seed_number, range(100))) < 2**31


@pytest.mark.parametrize("trainer", [train_grpo, train_sft])
def test_the_sampler_sleeps_before_a_run_goes_on(qwen, data_path, tmp_path, one_rank, monkeypatch,
                                                 trainer):
    """The optimiser's state is made where a sampler that is awake would leave no room."""
    calls = mock.Mock()
    calls.load.side_effect = InterruptedError
    monkeypatch.setattr(rollout, "make_engine", lambda *_: calls.engine)
    monkeypatch.setattr(doctor, "rehearse", lambda *_: [])
    for name, found in (("choose_run", (tmp_path, True)), ("whole_checkpoint", tmp_path),
                        ("begin_run", None)):
        monkeypatch.setattr(utils, name, mock.Mock(return_value=found))
    monkeypatch.setattr(utils, "load_resume_state", calls.load)
    with pytest.raises(InterruptedError):
        trainer.main(trainer.Args(model=str(qwen.path), train_data=str(data_path), batch_size=2,
                                  validation_data="", test_data="", **GROUPS[trainer]))
    sleep, sync = mock.call.engine.sleep(), mock.call.engine.sync(ANY)
    assert calls.mock_calls == [sleep, sync, sleep, mock.call.load(tmp_path, ANY, ANY)]


@pytest.mark.parametrize("trainer", [train_grpo, train_sft])
def test_memory_is_counted_anew_at_each_step(qwen, data_path, tmp_path, one_rank, monkeypatch,
                                             trainer):
    calls, update = [], trainer.update
    monkeypatch.setattr(utils, "forget_peak_memory", lambda: calls.append("forget"))
    monkeypatch.setattr(trainer, "update", lambda *a: calls.append("update") or update(*a))
    monkeypatch.setattr(utils, "peak_memory", lambda: calls.append("peak") or 1e9)
    for name, found in (("choose_run", (tmp_path, False)), ("begin_run", None),
                        ("save_checkpoint", None)):
        monkeypatch.setattr(utils, name, mock.Mock(return_value=found))
    trainer.main(trainer.Args(model=str(qwen.path), train_data=str(data_path), batch_size=2,
                              max_steps=2, validation_data="", test_data="", **GROUPS[trainer]))
    assert calls == ["forget", "update", "peak"] * 2


def weight_by_hand(gaps, i, cap, kind):
    """Of token i of a completion whose log-ratios, trainer to sampler, are `gaps`."""
    ratio = math.exp(sum(gaps) if kind == "sequence_mask" else gaps[i])
    if not cap:
        return 1.0
    if kind == "token":
        return min(ratio, cap)
    return ratio if ratio <= cap and (kind != "mask" or ratio >= 1 / cap) else 0.0


@pytest.mark.parametrize("cap, kind, strays", [
    (1.5, "token", True), (0.0, "mask", True), (1.5, "token", False), (1.5, "mask", True), (1.5, "mask", False),
    (1.5, "sequence_mask", True)])
def test_update_weighs_the_surrogate_by_trainer_over_sampler(qwen, one_rank, cap, kind, strays):
    """By how much likelier it finds a token, at most `cap`; the divergence alone is not weighed."""
    budget = 1000 if kind == "sequence_mask" else 100  # rows of several lengths beside each other; one or two
    args = replace(parity.ARGS, tis_cap=cap, tis=kind, kl_coef=0.1, temperature=0.7, micro_batch_tokens=budget)
    model, processor, samples = qwen.model, qwen.processor, parity.mixed(qwen)
    policy, probe, total, gaps, masked = Policy(model, processor), parity.Probe(model), 0.0, [], 0
    old, ref, drawn = (parity.moved_logprobs(policy, samples, processor, i) for i in (1, 2, 3))
    for s in samples:
        s.sampler_logprobs = (drawn if strays else old)[id(s)]
    sums, _, tail = train_grpo.update(policy, probe, samples, old, ref, args)
    for s in samples:
        logprobs, _ = parity.plain_logprobs(model, processor, s, 0.7)
        own = [was - said for was, said in zip(old[id(s)], s.sampler_logprobs)]
        for i, (new, was, first) in enumerate(zip(logprobs, old[id(s)], ref[id(s)])):
            ratio, weight = (new - was).exp(), weight_by_hand(own, i, cap, kind)
            gain = torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.2) * s.advantage)
            total = total - weight * gain + 0.1 * ((first - new).exp() - 1 - (first - new))
            masked += weight == 0
        gaps += own
    (total / len(gaps)).backward()
    parity.assert_same_gradients(probe.gradients, parity.gradients(model))
    gaps = torch.tensor(gaps)
    assert 0 < (gaps.exp() > 1.5).sum() < len(gaps) or not strays
    want = [total, gaps.abs().sum(), gaps.exp().sum(), (gaps.exp() ** 2).sum(),
            gaps.abs().quantile(0.99)]
    names = ("loss", "sampler_gap", "sampler_ratio", "sampler_ratio_squared")
    assert [sums[n] for n in names] + [tail] == pytest.approx([w.item() for w in want], rel=1e-4)
    assert sums["tis_masked"] == masked and ("tis_masked" in sums) == (cap > 0)
    assert (0 < masked < len(gaps)) == (strays and cap > 0 and kind != "token")
