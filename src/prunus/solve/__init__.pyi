from .frank_wolfe import frank_wolfe as frank_wolfe
from .sweep import sparsegpt as sparsegpt
