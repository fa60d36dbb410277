"""vLLM's CUDA build on a machine without CUDA: rollout.VLLMEngine, and what of vLLM it talks to, for real.

    LD_LIBRARY_PATH=lib python tests/fake_cuda.py folder data.jsonl checkpoint ...

Real are VLLMEngine, vLLM's LLM and its configuration, how prompts are expanded, how requests fan out and what becomes
of answers, how weights are loaded and reloaded, and the states of Model Runner V2's sampler. Not real are the platform,
which claims an H100 while tensors stay on the CPU, and the engine's core, which never runs its model: it answers with
two tokens that a request's seed tells. `lib` holds any library under the name libcuda.so.1, of which nothing is ever
called. Prints what test_cuda.py looks at as one JSON document. It is a process of its own: no other test may meet a
platform that lies.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

folder = Path(sys.argv[1])  # for whatever is written
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_CACHE_ROOT": str(folder / "cache"),
               "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.setdlopenflags(os.RTLD_LAZY)  # the driver's functions are looked for when they are called

import numpy as np
import torch
from vllm import platforms
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability

for name, told in {"get_device_capability": DeviceCapability(9, 0), "get_device_name": "NVIDIA H100 80GB HBM3",
                   "get_device_total_memory": 79 * 2**30, "num_compute_units": 132, "device_count": 1,
                   "log_warnings": None}.items():  # what it would ask the driver
    setattr(NonNvmlCudaPlatform, name, staticmethod(lambda *_, told=told, **__: told))
platforms._current_platform = NonNvmlCudaPlatform()  # before anything of vLLM's takes it over by name

import policy
import rollout
import utils
from data import banned_ids, load_samples

rollout.import_vllm()

from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import (
    ensure_model_parallel_initialized, init_distributed_environment, model_parallel_is_initialized)
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models import registry
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.outputs import LogprobsLists
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample import states


class HostTensor:
    """In the place of a tensor that host and GPU both see."""

    def __init__(self, size, dtype):
        self.np = torch.zeros(size, dtype=dtype).numpy()

    def copy_to_uva(self):
        """There is nowhere to copy to."""


class FakeCore:
    """The engine's core: the model's weights and its sampler's states, but no forward pass."""

    def __init__(self, config):
        self.engine_core = self.model_executor = self  # as LLMEngine asks for them within one process
        config.load_config.device, config.device_config.device = "cpu", torch.device("cpu")
        self.config, self.calls, self.asked, self.waiting = config, [], [], []
        self.states = states.SamplingStates(1024, config.model_config.get_vocab_size())
        self.runner = GPUModelRunner.__new__(GPUModelRunner)  # whose constructor wants a device
        self.runner.model, self.runner.load_config = load(config, config.model_config.model), config.load_config
        self.runner.vllm_config, self.runner.model_config = config, config.model_config
        self.runner.encoder_cache = None

    def get_supported_tasks(self):
        return ("generate",)

    def shutdown(self):
        self.calls.append("shutdown")

    def dp_engines_running(self):
        return False

    def abort_requests(self, names):
        assert not names

    def add_request(self, request):
        row = len(self.asked)
        self.states.add_request(row, request.sampling_params)
        self.asked.append(request)
        self.waiting.append((request.request_id, int(self.states.seeds.np[row])))

    def get_output(self):
        outputs = []
        for name, seed in self.waiting:
            table = np.array(answer(seed))[:, None]
            logprobs = LogprobsLists(table, np.full(table.shape, -0.5, np.float32), np.ones(len(table), np.int64))
            outputs.append(EngineCoreOutput(name, answer(seed), logprobs, finish_reason=FinishReason.LENGTH))
        self.waiting = []
        return EngineCoreOutputs(outputs=outputs)

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        self.calls.append(method.__name__)
        return [method(SimpleNamespace(model_runner=self.runner), *args, **(kwargs or {}))]

    def sleep(self, level, mode):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake_up {' '.join(tags)}")

    def reset_prefix_cache(self, *_):
        self.calls.append("reset_prefix_cache")
        return True

    def reset_mm_cache(self):
        self.calls.append("reset_mm_cache")

    def reset_encoder_cache(self):
        self.calls.append("reset_encoder_cache")


states.UvaBackedTensor = HostTensor
EngineCoreClient.make_client = staticmethod(lambda vllm_config, **_: FakeCore(vllm_config))
registry._run_in_subprocess = lambda act: act()  # where it is safe from CUDA, seconds later
torch.accelerator.max_memory_allocated = lambda *_: 0


def answer(seed):
    return [20 + seed % 60, 20 + seed // 60 % 60]


def load(config, path):
    """A checkpoint's weights, as vLLM loads them."""
    config.model_config.model = str(path)
    config.compilation_config.static_forward_context.clear()  # where two layers of one name may not meet
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, local_rank=0, backend="gloo")  # the group that is there
            ensure_model_parallel_initialized(1, 1)
        return get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)


def start(path):
    """The engine as a stage starts it where there is a GPU, and its core."""
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        engine = rollout.VLLMEngine(path, policy.load_processor(path), rollout.Args(engine_timeout=100))
    return engine, engine.llm.llm_engine.engine_core


# ---------------------------------------------------------------------------------------------
# What is looked at


def prompts(engine, core, samples):
    """What arrives at the core of each prompt, asked for two answers, and what comes back."""
    done = engine.generate(samples, 2, 0.7, 0.9, 8, "0 1")
    rows = []
    for i, s in enumerate(samples):
        request, *_ = core.asked[2 * i : 2 * i + 2]
        params, pixels = request.sampling_params, []
        for image, feature in zip(s.images, request.mm_features or []):
            if feature.data is None:  # an image that was sent before
                continue
            pixels.append(same_bits(feature.data.get_data()["pixel_values"], policy.image_inputs(
                engine.processor, image)["pixel_values"].bfloat16()))
        seed = rollout.seed_number("0 1", s.id)
        rows.append({"id": s.id, "tokens": list(request.prompt_token_ids) == s.prompt_ids,
                     "pixels": pixels, "answers": [d.completion_ids == answer(seed + k) and d.id == s.id
                                                   for k, d in enumerate(done[2 * i : 2 * i + 2])],
                     "banned": sorted(params.logit_bias) == sorted(banned_ids(engine.processor)),
                     "asked": [params.temperature, params.top_p, params.top_k, params.repetition_penalty,
                               params.max_tokens], "ends": params.all_stop_token_ids == {*engine.eos}})
    return rows


def seeds(engine, core, samples):
    """The seeds that the sampler holds of three answers to each prompt, by what was another than in "one"."""
    found = {"wanted": [rollout.seed_number("0 1", s.id) + k for s in samples for k in range(3)]}
    seeded = engine.SamplingParams
    for name, seed, state in (
            ("one", "0 1", 1), ("again", "0 1", 2), ("another --seed", "1 1", 1), ("another step", "0 2", 1),
            ("unseeded", "0 1", 1), ("unseeded, another --seed", "1 1", 1),
            ("unseeded, another state of numpy", "0 1", 2)):
        engine.SamplingParams = (lambda seed=None, **more: seeded(**more)) if "unseeded" in name else seeded
        np.random.seed(state)
        torch.manual_seed(0 if "unseeded" in name else state)
        core.asked.clear()
        engine.generate(samples, 3, 1.0, 1.0, 8, seed)
        found[name] = core.states.seeds.np[: len(core.asked)].tolist()
    engine.SamplingParams = seeded
    return found


def reload(engine, core, path, place, lora=0):
    """Two syncs, with other weights each: what of the sampler is not as a fresh load of them has it."""
    model, trainer = core.runner.model, policy.load_model(path)
    policy.freeze(trainer, False, False, True)
    if lora:
        policy.add_lora(trainer, lora, 2 * lora, seed=0)
    trainer = policy.shard(policy.Policy(trainer, engine.processor), torch.bfloat16)
    places = {name: (id(w), w.data_ptr()) for name, w in model.named_parameters()}
    buffers = {name: (b.data_ptr(), b.clone()) for name, b in model.named_buffers()}
    found = {"parameters": len(places), "calls": [], "unlike": [], "moved": [], "stale": [],
             "buffers": len(buffers), "other buffers": []}
    for turn in range(2):
        stale = {name: w.detach().clone() for name, w in model.named_parameters()}
        torch.manual_seed(turn)
        with torch.no_grad():
            for weight in trainer.parameters():
                weight.normal_()
        core.calls.clear()
        engine.sleep()
        engine.sync(trainer.model)
        found["calls"].append([*core.calls])
        trainer.export(place / str(turn), torch.float32)  # vLLM rounds what it reads
        fresh = dict(load(core.config, place / str(turn)).named_parameters())
        for name, weight in model.named_parameters():
            wrong = {"unlike": not same_bits(weight, fresh.pop(name)), "stale": same_bits(weight, stale[name]),
                     "moved": (id(weight), weight.data_ptr()) != places[name]}
            for what in (what for what, is_so in wrong.items() if is_so):
                found[what].append(name)
        found["unlike"] += fresh
        found["other buffers"] += [name for name, b in model.named_buffers()
                             if b.data_ptr() != buffers[name][0] or not same_bits(b, buffers[name][1])]
    found["withheld"] = withheld(engine, trainer.model)
    return found


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def withheld(engine, model):
    """What a sync says in which a weight never comes, by its name."""
    said, whole = {}, rollout.whole_weights
    for end in ("patch_embed.proj.weight", "layers.1.mlp.down_proj.weight", "embed_tokens.weight", "lm_head.weight"):
        lost = [name for name, _ in model.named_parameters() if name.endswith(end)]
        if not lost:  # a head that is tied has no weight of its own
            continue
        rollout.whole_weights = lambda *values: (pair for pair in whole(*values) if pair[0] not in lost)
        try:
            engine.sync(model)
            said[end] = ""
        except utils.RunError as error:
            said[end] = str(error)
    rollout.whole_weights = whole
    return said


def main(data, *paths):
    utils.start_ranks()
    found = {}
    for path in map(Path, paths):
        engine, core = start(path)
        samples = load_samples(data, engine.processor, 2048)
        row = found[path.name] = {"runner V2": core.config.use_v2_model_runner}
        row["prompts"] = prompts(engine, core, samples)
        if len(found) == 1:
            row["seeds"] = seeds(engine, core, samples[:3])
            row["reload with low ranks"] = reload(engine, core, path, folder / "low", 4)
        row["reload"] = reload(engine, core, path, folder / path.name)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[2:])
