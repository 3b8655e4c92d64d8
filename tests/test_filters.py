"""What a sampled protein must be: without repeats, unlike known ones."""

from __future__ import annotations

import pytest

from src.evaluation.filters import REPEATED, TOO_CLOSE, Filters, has_repeats
from src.proteins.relatives import nearest_identities


def test_repeats_are_those_of_the_description(random_proteins):
    plain = random_proteins(1, 100, 100)[0]
    assert not has_repeats(plain)
    assert not has_repeats(plain + "QQQQQQ")  # 6 %
    assert has_repeats(plain + "GSGSGSGSGSGSGSGS")  # 14 %
    filters = Filters(drop_repeats=True)
    assert filters.reason(plain) is None
    assert filters.reason("GS" * 20) == REPEATED
    assert Filters().reason("GS" * 20) is None


def test_identity_is_that_of_the_nearest_search(random_proteins):
    known = random_proteins(30, 80, 120, seed=1)
    queries = [known[3][10:60] + "W" * 10, known[7], *random_proteins(3, 50, 60, seed=9)]
    identity = nearest_identities(queries, known)["identity"]
    assert identity[0] > 0.8
    assert identity[1] == 1
    for level in (0.3, 0.9, 1.0):
        filters = Filters(max_identity=level, against=known)
        found = [filters.reason(query) for query in queries]
        assert found == [TOO_CLOSE if value > level else None for value in identity]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_identity": 0.5}, "--max_identity and --against go together"),
        ({"against": ["MKT"]}, "--max_identity and --against go together"),
        ({"max_identity": 1.5, "against": ["MKT"]}, "--max_identity must be in"),
    ],
)
def test_bad_settings_name_the_flag(options, message):
    with pytest.raises(ValueError, match=message):
        Filters(**options)
