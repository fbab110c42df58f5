from .admm import admm as admm
from .admm import alps as alps
from .frank_wolfe import frank_wolfe as frank_wolfe
from .refit import refit as refit
from .sweep import sparsegpt as sparsegpt
