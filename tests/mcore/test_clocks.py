"""The clocks of ranks on several machines, whose difference is known here."""

import json

from tests.mcore.clocks_worker import AHEAD
from tests.support import forked_ranks


def test_offsets(tmp_path):
    ended = forked_ranks.run(tmp_path, processes=4, target="tests.mcore.clocks_worker:main")
    assert ended.statuses == [0] * 4, ended
    first, *others = (json.loads(text) for text in ended.out)
    assert others == [{"one machine": {}, "two machines": {}}] * 3
    same = {"seconds": 0.0, "error": 0.0}
    assert first["one machine"] == {str(rank): same for rank in range(4)}
    two = first["two machines"]
    assert two["0"] == two["2"] == same
    assert two["1"] == two["3"]
    assert 0 < two["1"]["error"] < 1
    assert abs(two["1"]["seconds"] - AHEAD) <= two["1"]["error"]
