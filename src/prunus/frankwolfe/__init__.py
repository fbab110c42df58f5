"""Training that stays in feasible sets (`SFW`), its sets, and the proximal and penalised baselines.

Zimmer, Spiegel, Pokutta: Compression-aware Training of Neural Networks using Frank-Wolfe (2022).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
