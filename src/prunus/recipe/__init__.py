"""What a run is asked to do: typed recipes of every task, read from YAML, checked before any work.

    Recipe              model, device, precision, compile, prune, retrain, soup, out, save: the same for every task
    LanguageRecipe      and dtype, streaming, calibrate, shrink, reconstruct, evaluate
    ClassifierRecipe    and images, seed, train, during, recalibrate, corruptions, ...: what has the key `images`
    EncoderRecipe       the same of texts: what has the key `texts`

A recipe is a plain YAML mapping; every key is a field of a section. Sections that tasks share are one class. Its
defaults are those of language models; a class `Classifier...` made of it says which are others, and what more there is.

Unknown keys, impossible patterns, sparsities outside [0, 1) and missing files are refused with the key, the value and
the mend.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
