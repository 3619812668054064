from tenuto_server.errors import MAX_TEXT
from tenuto_server.refused import MAX_LISTED, RefusedVersions


def _listed(refused: RefusedVersions, name: str = "p") -> list[tuple[int, str]]:
    return [(found.version, found.message) for found in refused.to_wire(name)]


def test_a_version_is_refused_in_the_form_that_it_had():
    refused = RefusedVersions()
    refused.add("p", 2, "form", "why")
    assert refused.holds("p", 2, "form")
    assert not refused.holds("p", 2, "other form")
    assert not refused.holds("p", 3, "form") and not refused.holds("q", 2, "form")
    refused.add("p", 2, "other form", "other reason")
    assert _listed(refused) == [(2, "other reason")]
    refused.discard("p", 2)
    refused.discard("q", 1)
    assert _listed(refused) == []


def test_the_newest_are_listed_in_ascending_order_and_no_more_than_fit():
    refused = RefusedVersions()
    for version in range(40, 0, -1):
        refused.add("p", version, None, f"reason {version}")
    assert _listed(refused) == [(v, f"reason {v}") for v in range(41 - MAX_LISTED, 41)]
    assert _listed(refused, "q") == []


def test_what_left_the_repository_is_forgotten():
    refused = RefusedVersions()
    for name, version in (("p", 1), ("p", 2), ("q", 1)):
        refused.add(name, version, None, "why")
    refused.keep_only({"p": [2, 3], "r": [1]})
    assert _listed(refused) == [(2, "why")] and _listed(refused, "q") == []


def test_every_message_can_be_sent():
    refused = RefusedVersions()
    refused.add("p", 1, None, "key '\ud800'" + "x" * 2 * MAX_TEXT)
    [found] = refused.to_wire("p")
    assert found.message.startswith("key '?'x") and found.message.endswith("x…") and len(found.message) == MAX_TEXT + 1
    assert type(found).FromString(found.SerializeToString()) == found
