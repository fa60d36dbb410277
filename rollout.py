"""Stage: response collection. A prompt and its images go in, G sampled completions come out.

Left out of the textbook: beams, repetition penalties, stop strings. A completion that is trained on
must come from the plain policy, so a sampler is a model, a way to pick a token from its logits, and
a reason to stop. Added are two things that textbooks leave out. Randomness belongs to the sample
(its prompt's id and its index), not to the rank or the batch, so that a run means the same on any
number of ranks; and image placeholders are never sampled: a completion has no image behind them.

    python rollout.py --model toy_model --data toy:validation --n 8 --out runs/rollout
    torchrun --standalone --nproc_per_node 8 -- rollout.py --model Qwen/Qwen2.5-VL-3B-Instruct \
        --data data.jsonl --n 8 --max_new_tokens 2048     # without --, torchrun would take --n
"""

import hashlib
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import DynamicCache

import utils
from utils import print0, rank, world_size


@dataclass
class Args:
    model: str = "toy_model"  # folder or hub id of a vision-language model
    data: str = "toy:validation"  # .jsonl or .parquet data set; toy:train, toy:validation, toy:test
    out: str = ""  # run folder; empty: a new one under runs/
    n: int = 8  # completions a prompt
    temperature: float = 1.0  # divides the logits; 0 is greedy
    top_p: float = 1.0  # smallest set of tokens with this probability is sampled from
    max_new_tokens: int = 96  # completions are cut off here, with finish reason "length"
    max_prompt_tokens: int = 2048  # longer prompts, images included, are dropped
    limit: int = 0  # use only the first this many prompts; 0: all
    rewards: str = "accuracy:1.0"  # name:weight or file.py:function:weight, joined by commas
    engine: Literal["auto", "hf"] = "auto"  # sampler; auto picks the embedded one
    rollout_batch_size: int = 256  # completions sampled at one time on a rank
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, else float32
    seed: int = 0  # same seed, same completions


# ---------------------------------------------------------------------------------------------
# One token


def sample_tokens(logits, uniform, temperature, top_p):
    """Pick one token a row by inverting the cumulative distribution.

    logits (B, V); uniform (B,) in [0, 1), one number a row, so that a row's randomness is its own.
    Returns token ids (B,) and their log-probabilities (B,) in nats under the distribution that was
    sampled from: softmax(logits / temperature), cut to the top-p set and renormalised.
    """
    if temperature == 0:
        best = logits.argmax(-1)
        return best, torch.zeros_like(uniform)  # greedy: the whole mass on one token
    probs = (logits.float() / temperature).softmax(-1)  # (B, V)
    ids = None
    if top_p < 1:
        probs, ids = probs.sort(dim=-1, descending=True, stable=True)
        # a token stays while the mass before it is below top_p: the most likely one always stays
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    cumulative = probs.double().cumsum(-1)  # float64: 150,000 float32 additions lose digits
    total = cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, uniform.double()[:, None] * total, right=True)
    # rounding may step past the last token that has any mass
    choice = choice.minimum((probs > 0).long().cumsum(-1).argmax(-1, keepdim=True))
    logprobs = (probs.gather(-1, choice).double() / total).log().float()
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1), logprobs.squeeze(-1)


def uniforms(seed, sample_id, index, count):
    """`count` numbers in [0, 1) that depend on (seed, prompt id, sample index) and nothing else."""
    digest = hashlib.blake2b(f"{seed}|{sample_id}|{index}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# The embedded engine


class HFEngine:
    """Samples with a transformers model of its own: whole weights, no collective in `generate`.

    A prompt is run through the model once; its cache is then branched into n rows. Rows that have
    ended are retired, so that late steps cost what the long rows cost.
    """

    def __init__(self, model, processor, batch_size):
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.banned = utils.banned_ids(processor)
        eos = model.generation_config.eos_token_id
        eos = processor.tokenizer.eos_token_id if eos is None else eos
        self.eos = torch.tensor(eos, device=model.device).reshape(-1)  # some models have several

    @torch.no_grad()
    def sync(self, model):
        """Take over `model`'s weights, sharded or not. COLLECTIVE when they are sharded."""
        mine = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            mine.pop(name).copy_(whole)
        assert not mine, f"sync left {len(mine)} weights of the sampler untouched: {list(mine)[:3]}"

    def sleep(self):
        """Free memory until the next sync: nothing here, only weights are held between calls."""

    @torch.no_grad()
    def generate(self, samples, n, temperature, top_p, max_new_tokens, seed):
        """Return n completed copies of every sample, prompt by prompt, whatever the batches."""
        assert not any(s.completion_ids for s in samples), "these samples are answered already"
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
        cache.batch_repeat_interleave(n)
        logits = logits.repeat_interleave(n, 0)  # (B * n, V)
        attention = attention.repeat_interleave(n, 0)  # (B * n, P)
        positions = positions.repeat_interleave(n, 0)  # (B * n, 1)
        noise = [uniforms(seed, s.id, i, max_new_tokens) for s in samples for i in range(n)]
        noise = torch.stack(noise).to(logits.device)  # (B * n, T)
        tokens = [[] for _ in noise]
        logprobs = [[] for _ in noise]
        alive = torch.arange(len(noise), device=logits.device)  # which row each live row is
        for step in range(max_new_tokens):
            logits[:, self.banned] = float("-inf")
            token, logprob = sample_tokens(logits, noise[alive, step], temperature, top_p)
            for row, t, p in zip(alive.tolist(), token.tolist(), logprob.tolist()):
                tokens[row].append(t)
                logprobs[row].append(p)
            going = ~torch.isin(token, self.eos)
            if step + 1 == max_new_tokens or not going.any():
                break
            if not going.all():
                keep = going.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                alive, token = alive[keep], token[keep]
                attention, positions = attention[keep], positions[keep]
            attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
            logits = self.model(input_ids=token[:, None], attention_mask=attention, use_cache=True,
                                position_ids=positions, past_key_values=cache).logits[:, -1]
            positions = positions + 1
        copies = [s for s in samples for _ in range(n)]
        return [self.finish(s, t, p) for s, t, p in zip(copies, tokens, logprobs)]

    def prefill(self, samples):
        """Run the prompts, padded on the left so that every row's next token is in the last column.

        Returns logits (B, V), the cache, the attention mask (B, P) and the next positions (B, 1).
        """
        batch = utils.collate(samples, self.processor)["inputs"]
        width = batch["input_ids"].shape[1]
        lengths = batch["attention_mask"].sum(1)
        # rows come padded on the right; roll each one to the right end
        index = (torch.arange(width, device=lengths.device) + lengths[:, None]) % width  # (B, P)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in batch:
                batch[name] = batch[name].gather(1, index)
        base = self.model.base_model
        base.rope_deltas = None  # HAZARD: those of the last images would shift this batch
        if "pixel_values" not in batch:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        out = self.model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # M-RoPE gives an image fewer positions than tokens; its models say by how many
        positions = lengths[:, None] + (0 if base.rope_deltas is None else base.rope_deltas)
        return out.logits[:, -1], cache, batch["attention_mask"], positions

    def finish(self, sample, tokens, logprobs):
        """A copy of the prompt with its completion. The text leaves out EOS; the ids keep it."""
        ended = tokens[-1] in self.eos
        text = self.processor.tokenizer.decode(tokens[:-1] if ended else tokens)
        return replace(sample, completion_ids=tokens, completion_text=text, rewards={},
                       finish_reason="stop" if ended else "length", sampler_logprobs=logprobs)


def make_engine(kind, model, processor, args):
    """The sampler a stage asked for: it has `generate`, `sync` and `sleep`, nothing else public.

    `model` belongs to the engine from here on: a trainer passes a copy.
    """
    assert kind in ("auto", "hf"), f"no engine is called {kind}"
    return HFEngine(model, processor, args.rollout_batch_size)


# ---------------------------------------------------------------------------------------------
# The stage


def main(args):
    from reward import load_rewards, score

    started = time.time()
    out, _ = utils.choose_run(args)
    rewards = utils.checked(load_rewards, args.rewards, args.max_new_tokens)
    processor = utils.load_processor(args.model)
    samples = utils.load_samples(utils.data_path(args.data, out), processor, args.max_prompt_tokens)
    samples = samples[: args.limit or None]
    model = utils.load_model(args.model, utils.compute_dtype(args.dtype))
    engine = make_engine(args.engine, model, processor, args)
    utils.begin_run(out, args)

    mine = samples[rank() :: world_size()]
    done = []
    step = max(1, args.rollout_batch_size // args.n)
    for start in tqdm(range(0, len(mine), step), disable=rank() > 0, desc="rollout", unit="batch"):
        done += engine.generate(mine[start : start + step], args.n, args.temperature, args.top_p,
                                args.max_new_tokens, args.seed)
    score(done, rewards)
    done = utils.gather(done)
    place = {s.id: i for i, s in enumerate(samples)}
    done.sort(key=lambda s: place[s.id])  # stable: a prompt's completions keep their order

    scored = [s.reward for s in done if s.reward is not None]
    result = {
        "prompts": len(samples),
        "completions": len(done),
        "reward": sum(scored) / max(1, len(scored)),
        "length": sum(len(s.completion_ids) for s in done) / len(done),
        "truncated": sum(s.finish_reason == "length" for s in done) / len(done),
        "seconds": round(time.time() - started, 1),
        "out": str(out),
    }
    if rank() == 0:
        utils.write_jsonl(out / "samples" / "step_000000.jsonl", [s.record() for s in done])
        utils.write_json(out / "result.json", result)
        for s in done[: args.n]:
            print0(f"[reward {s.reward}] {s.completion_text!r}")
    return result


if __name__ == "__main__":
    utils.run_script(main, Args)
