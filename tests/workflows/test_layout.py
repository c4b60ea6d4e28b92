"""tools/layout_workflows.py on small graphs; tests/frontend holds the shipped ones to what the browser draws."""

from itertools import combinations

import pytest
from pixstack.tools.layout_workflows import GROUP_TITLE, PADDING, TITLE, Size, arrange

KINDS = ("MarkdownNote", "VAELoader", "PixStack_PixArtLoader", "CLIPTextEncode", "PixStack_PixArtCanvas", "KSampler",
         "VAEDecode", "SaveImage", "PreviewImage", "MarkdownNote")
LINKS = ((3, 4), (3, 6), (4, 6), (5, 6), (6, 7), (2, 7), (7, 8), (5, 9))


def graph(**more) -> dict:
    nodes = [{"id": i, "type": kind, "properties": {}, **more.get(f"n{i}", {})} for i, kind in enumerate(KINDS, 1)]
    return {"nodes": nodes, "links": [[k, a, 0, b, 0, ""] for k, (a, b) in enumerate(LINKS)], "extra": {"ds": {}}}


def arranged(rooms: dict | None = None, **more) -> dict:
    sizes = {i: Size(100, (rooms or {}).get(i, 160)) for i in range(1, len(KINDS) + 1)}
    made = arrange(graph(**more), sizes)
    made["rooms"] = {n["id"]: (*n["pos"], n["size"][0], sizes[n["id"]].room) for n in made["nodes"]}
    return made


def members(made: dict) -> dict[str, list[int]]:
    return {g["title"]: [n["id"] for n in made["nodes"] if inside(made["rooms"][n["id"]], g["bounding"])]
            for g in made["groups"]}


def inside(room, box) -> bool:
    x, y, wide, high = room
    return (box[0] + PADDING <= x and box[1] + GROUP_TITLE <= y - TITLE and x + wide <= box[0] + box[2] - PADDING
            and y - TITLE + high <= box[1] + box[3])


def test_nodes_lie_in_numbered_groups_of_their_class_in_the_order_of_a_graph():
    assert members(arranged()) == {"1 Model": [2, 3], "2 Prompt": [4], "3 Size": [5, 9], "4 Draw": [6],
                                   "5 Result": [7, 8]}


def test_a_property_puts_a_node_into_another_group():
    named = {"properties": {"PixStack group": "Text"}}
    assert members(arranged(n4=named))["5 Text"] == [4]


@pytest.mark.parametrize("rooms", [{}, {6: 900}, {2: 700, 3: 700, 8: 1200}, {1: 1500}])
def test_nothing_overlaps_whatever_room_a_node_needs(rooms):
    made = arranged(rooms)
    for (_, a), (_, b) in combinations(made["rooms"].items(), 2):
        assert a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
    assert sum(map(len, members(made).values())) == 8


def test_the_first_note_is_at_the_top_left_of_the_view_and_all_of_it_is_seen():
    made = arranged()
    (left, top), scale = made["extra"]["ds"]["offset"], made["extra"]["ds"]["scale"]
    assert made["nodes"][0]["pos"] == [0, TITLE] and scale * top == pytest.approx(150, abs=1)
    assert all(scale * (left + x + wide) < 1600 and scale * (top + y - TITLE + high) < 900
               for x, y, wide, high in made["rooms"].values())
    assert all(n["pos"][0] >= 0 and n["pos"][1] >= TITLE for n in made["nodes"])


def test_a_class_without_a_group_is_named():
    with pytest.raises(ValueError, match=r"node 4 is a Unknown, which GROUPS .* does not have"):
        arranged(n4={"type": "Unknown"})
