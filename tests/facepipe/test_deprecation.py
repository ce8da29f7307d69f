"""Old names of the public interface still work, and say what the new ones are."""

import numpy as np
import pytest

from facepipe.gallery import Contract
from facepipe.nearest.distances import Hits


def test_old_names_warn_and_work() -> None:
    hits = Hits(np.array([[5, 7, 9]], np.int64), np.array([[0.0, 0.2, 0.3]], np.float32))
    with pytest.warns(DeprecationWarning, match=r"Hits\.without is now Hits\.exclude_own"):
        old = hits.without(np.array([7], np.int64), 2)
    assert np.array_equal(old.ids, hits.exclude_own(np.array([7], np.int64), 2).ids)
    with pytest.warns(DeprecationWarning, match=r"Contract\.of is now Contract\.from_models"):
        old_contract = Contract.of("retinaface-mnet025", "dlib-resnet", True)
    assert old_contract == Contract.from_models("retinaface-mnet025", "dlib-resnet", True)
