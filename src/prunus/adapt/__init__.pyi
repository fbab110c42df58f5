from . import subsets as subsets
from .adapt import adapt as adapt
from .biases import add_biases as add_biases
from .fused import compiled_forward as compiled_forward
from .subsets import ADAPTERS as ADAPTERS
from .subsets import find_subset as find_subset
