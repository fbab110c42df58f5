"""What the server of tests/processes.py has imported before it forks: what a command and a rank import."""

import gc
import pkgutil
from importlib import import_module

import prunus
from tests.conftest import set_up

ALL = (
    "accelerate",
    "matplotlib.pyplot",
    "pytest",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
)

gc.disable()
for name in ALL:
    import_module(name)
for each in pkgutil.walk_packages(prunus.__path__, "prunus."):
    if each.name != "prunus.train.callback":  # it imports peft, and that what compiles programs
        import_module(each.name)
set_up()
gc.freeze()  # so that no fork's collections look at it, which would copy its pages
gc.enable()
