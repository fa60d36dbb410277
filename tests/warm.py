"""What the process that is forked (runs.py) has done already: all imports, also those that a run makes late."""

import gc
import importlib

import pytest  # noqa: F401  # for the checks of the exercises
import torch
import torch.distributed.checkpoint._fsspec_filesystem  # noqa: F401

from policy import load_model, load_processor
from runs import ROOT

for stage in ("answers", "doctor", "evaluate", "report", "reward", "rollout", "scoring", "siblings", "toy", "train_grpo", "train_sft"):
    importlib.import_module(stage)
torch.set_num_threads(1)
load_processor(ROOT / "toy_model")
load_model(ROOT / "toy_model")
gc.collect()
gc.freeze()  # a fork that looks for garbage among these would copy the pages they lie on
