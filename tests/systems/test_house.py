"""The figures of the package are counted."""

import house


def test_files_and_circles_are_counted():
    ran = {house.inside(path) for path in house.executed(house.pruned())}
    assert {"prune.py", "layers.py", "masks.py"} < ran
    assert not any(path.startswith(("run/", "recipe/", "jobs/", "language/", "vision/")) for path in ran)
    assert house.imported(house.MODULES["prunus.prune"]) >= {"prunus.masks", "prunus.layers"}
    assert all(len(circle) > 1 for circle in house.circles())
