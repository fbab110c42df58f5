"""The figures of the package are counted."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[2] / "scripts" / "house.py"


def test_files_and_circles_are_counted():
    spec = importlib.util.spec_from_file_location("house", FILE)
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    ran = {house.inside(path) for path in house.executed(house.pruned())}
    assert {"prune.py", "layers.py", "masks.py"} < ran
    assert not any(path.startswith("run/") for path in ran)
    assert house.imported(house.MODULES["prunus.prune"]) >= {"prunus.masks", "prunus.layers"}
    assert all(len(circle) > 1 for circle in house.circles())
