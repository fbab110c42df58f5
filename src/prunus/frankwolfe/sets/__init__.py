"""Feasible sets for constrained training: norm, linear minimisation, diameter, starting point, projection.

`protocol` says what a set is made of, `ball` makes the sets of the papers, `radius` says how large they are. A new set
is a gauge (as in `norms`, `sparse`) or a way of seeing tensors (as in `group`, `spectral`), and one line in
`__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
