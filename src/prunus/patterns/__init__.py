"""Where zeros may lie in a matrix (out, in), and the exact mask for a score under each pattern.

    Unstructured("layer")   any `kept` entries of the matrix
    Unstructured("row")     the same number in every output row (the first rows take the remainder)
    NM(n, m)                at most n nonzeros in m consecutive weights along the input dimension: 2:4 keeps 2 of 4.
                            Others count the zeros; for 2:4 that is the same, for 1:4 it is not.
    Block(rows, columns)    whole tiles of rows x columns weights, by the mean score of each
    Rows()                  whole output rows (neurons, filters), by the mean score of each

A new pattern is one frozen dataclass with the methods of `Pattern`. How the largest scores are found is in
`selection.py`; how many entries each layer keeps is an allocation's affair.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
