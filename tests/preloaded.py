"""What the server of tests/processes.py has imported before it forks: what a command and a rank import."""

# ruff: noqa: F401 - imported so that forks need not
import gc
import importlib
import pkgutil

import accelerate
import matplotlib.pyplot
import pytest
import torch.distributed.fsdp
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, OPTForCausalLM

import prunus
from tests.conftest import set_up

for each in pkgutil.walk_packages(prunus.__path__, "prunus."):
    importlib.import_module(each.name)
set_up()
gc.freeze()  # so that no fork's collections look at it, which would copy its pages
