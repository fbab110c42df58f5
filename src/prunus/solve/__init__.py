"""How one layer is pruned: a criterion turns (layer, pattern, count) into new weights and their mask."""

from prunus.solve.frank_wolfe import frank_wolfe
from prunus.solve.solvers import Solver, by_magnitude, by_score, by_wanda, sparsegpt

__all__ = ["Solver", "by_magnitude", "by_score", "by_wanda", "frank_wolfe", "sparsegpt"]
