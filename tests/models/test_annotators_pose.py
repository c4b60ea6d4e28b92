"""Poses: what is decoded around MediaPipe's networks, OpenPose's points and their drawing."""

import os
import sys
import zipfile

import numpy
import pytest
import torch
from pixstack.models_impl.annotators import openpose, pose
from recorded_pose import HEIGHT, WIDTH, expected, networks, write

PICTURE = torch.zeros(3, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def person() -> pose.Person:
    (found,) = pose.people(networks(), PICTURE, search=0)
    return found


# --- Against mediapipe's own package, from recorded tensors

def test_the_body_lies_where_mediapipe_puts_it(person):
    theirs = expected("body")
    apart = (person.body[:, :2] - theirs[:, :2]).norm(dim=-1)
    tall = (theirs[:, 1].max() - theirs[:, 1].min()).item()
    assert apart.mean() < 0.005 * tall and apart.max() < 0.02 * tall
    assert (person.body[:, 2] - theirs[:, 2]).abs().max() < 0.05


@pytest.mark.parametrize("part", ["left", "right", "face"])
def test_hands_and_the_face_lie_where_mediapipe_puts_them(person, part):
    ours, theirs = getattr(person, part), expected(part)
    size = (theirs.max(0).values - theirs.min(0).values).max()
    assert (ours[:, :2] - theirs).norm(dim=-1).max() < 0.04 * size
    assert (ours[:, 2] > 0.5).all()


def test_nobody_is_found_where_the_detector_is_not_sure():
    assert pose.people(networks(), PICTURE, confidence=0.99) == []


def test_what_is_not_asked_for_is_not_run():
    parts = {part: network for part, network in networks().items() if part in ("detector", "body")}
    (found,) = pose.people(parts, PICTURE, hands=False, face=False, search=0)
    assert found.left is None and found.right is None and found.face is None


def test_a_person_found_in_two_windows_is_one_person():
    parts = networks()
    box = pose.whole(HEIGHT, WIDTH)
    raw, logits = parts["detector"](torch.zeros(1, 224, 224, 3))
    (points,), (score,) = (found[:1] for found in pose.detect(lambda _: [raw, logits], PICTURE, box, 224,
                                                              pose.POSE_STRIDES, 0.5))
    shifted = points.clone()
    shifted[:2] += 60.0  # its face lies elsewhere, so that suppression keeps it, and its body does not

    def detect(*_):
        return torch.stack([points, shifted]), torch.stack([score, score])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pose, "detect", detect)
        assert len(pose.people(parts, PICTURE, hands=False, face=False)) == 1


def test_a_part_of_a_person_is_no_person_and_a_child_before_an_adult_is_one():
    adult = torch.rand(33, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([100.0, 300.0, 1.0])
    known, inside = pose.Person(0.9, adult), adult * torch.tensor([0.5, 0.5, 1.0]) + torch.tensor([20.0, 120.0, 0.0])
    assert pose._same(known, inside, torch.tensor(0.5), torch.tensor(100.0))
    assert not pose._same(known, inside, torch.tensor(0.85), torch.tensor(100.0))
    beside = inside + torch.tensor([200.0, 0.0, 0.0])
    assert not pose._same(known, beside, torch.tensor(0.5), torch.tensor(100.0))


@pytest.mark.skipif("POSE_MODELS" not in os.environ, reason="POSE_MODELS does not name mediapipe 0.10.21's wheel")
def test_the_networks_themselves_find_an_astronaut_as_mediapipe_does():
    data = pytest.importorskip("skimage.data", reason="the photograph is scikit-image's")
    with zipfile.ZipFile(os.environ["POSE_MODELS"]) as wheel:
        graphs = {part: pose.Graph(wheel.read(f"mediapipe/modules/{file}"), file) for part, file in pose.FILES.items()}
    picture = torch.from_numpy(data.astronaut()).movedim(-1, 0) / 255
    (found,) = pose.people(graphs, picture, search=0)
    theirs = expected("astronaut")
    apart, seen = (found.body[:, :2] - theirs[:, :2]).norm(dim=-1), theirs[:, 2] > 0.5
    assert (apart[seen] < 0.02 * 883).all()  # pixels of the body, most of it below the picture
    assert found.face is not None and found.left is None and found.right is None


# --- Boxes and detectors

def test_a_crop_shows_what_projection_says():
    rows, columns = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    picture = torch.stack([columns, rows, rows * 0])  # every pixel holds its own place
    boxes = torch.tensor([[40.0, 30.0, 20.0, 0.7], [35.0, 28.0, 30.0, -2.0]])
    pixels = pose.crop(picture, boxes, 16)
    places = torch.tensor([[0.0, 0.0], [0.5, 0.25], [15 / 16, 15 / 16]])
    projected = pose.project(places.expand(2, -1, -1), boxes)
    for n in range(2):
        for (i, j), place in zip([(0, 0), (8, 4), (15, 15)], projected[n], strict=True):
            assert torch.allclose(pixels[n, j, i, :2], place, atol=1e-3)


def test_outside_of_the_picture_is_black_or_its_edge():
    box = torch.tensor([[0.0, 0.0, 20.0, 0.0]])
    white = torch.ones(3, 40, 40)
    assert pose.crop(white, box, 8, "zeros")[0, 0, 0].eq(0).all()
    assert pose.crop(white, box, 8, "border")[0, 0, 0].eq(1).all()


def test_a_box_is_turned_until_its_vector_points_up():
    upright = pose.pointed(torch.tensor([[10.0, 50.0]]), torch.tensor([[10.0, 20.0]]), torch.pi / 2)
    assert torch.allclose(upright, torch.tensor([[10.0, 50.0, 60.0, 0.0]]), atol=1e-5)
    lying = pose.pointed(torch.tensor([[10.0, 50.0]]), torch.tensor([[40.0, 50.0]]), torch.pi / 2)
    assert lying[0, 3].item() == pytest.approx(torch.pi / 2)
    (up,) = pose.project(torch.tensor([[[0.5, 0.0]]]), lying)  # the middle of its upper side
    assert torch.allclose(up, torch.tensor([[40.0, 50.0]]), atol=1e-4)


@pytest.mark.parametrize("side, strides, count", [(224, pose.POSE_STRIDES, 2254), (128, pose.FACE_STRIDES, 896)])
def test_there_are_as_many_anchors_as_the_network_has_boxes(side, strides, count):
    centres = pose.anchors(side, strides)
    assert centres.shape == (count, 2) and centres.min() > 0 and centres.max() < 1
    assert centres[:2].flatten().tolist() == pytest.approx([4 / side] * 4) and centres[2, 0] > centres[0, 0]


def test_boxes_that_overlap_become_their_mean_by_score():
    def box(x, score):
        return torch.tensor([[x, 0.0], [x + 10, 10.0], [x, 5.0]]), score

    points, scores = zip(*[box(0.0, 0.9), box(2.0, 0.3), box(50.0, 0.6)], strict=True)
    kept, kept_scores = pose.suppressed(torch.stack(points), torch.tensor(scores))
    assert kept_scores.tolist() == pytest.approx([0.9, 0.6])
    assert kept[0, 0, 0].item() == pytest.approx(0.5) and kept[1, 0, 0] == 50


def test_a_point_is_moved_to_the_mass_of_its_heatmap_only_where_that_is_sure():
    heatmap = torch.full((1, 64, 64, 2), -20.0)
    heatmap[0, 32, 34, 0], heatmap[0, 32, 34, 1] = 5.0, -0.5
    moved = pose.refined(torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]), heatmap)
    assert moved[0, 0].tolist() == pytest.approx([34 / 64, 0.5], abs=1e-4)
    assert moved[0, 1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("height, width, counts", [
    (512, 512, (1, 10, 35)), (1024, 1100, (1, 13, 43)), (720, 1280, (1, 4, 25)), (1280, 720, (1, 4, 25)),
])  # fmt: skip
def test_more_search_looks_into_more_windows(height, width, counts):
    for search, count in enumerate(counts):
        boxes = pose.windows(height, width, search)
        assert len(boxes) == count
        half = boxes[1:, 2] / 2
        assert (boxes[1:, 0] - half > -1e-3).all() and (boxes[1:, 0] + half < width + 1e-3).all()
        assert (boxes[1:, 1] - half > -1e-3).all() and (boxes[1:, 1] + half < height + 1e-3).all()


def test_a_thread_of_a_picture_is_not_searched_in_thousands_of_squares():
    assert len(pose.windows(30_000, 1, 0)) == 1
    with pytest.raises(ValueError, match="1x30000 pixels is too thin: .* 59,999 squares"):
        pose.windows(30_000, 1, 1)


@pytest.mark.parametrize("moved, search, count", [(0.0, 1, 1), (20.0, 1, 0), (20.0, 0, 1)])
def test_what_moves_when_it_is_looked_at_again_is_nobody(moved, search, count, monkeypatch):
    parts, looks = networks(), []
    monkeypatch.setattr(pose, "windows", lambda height, width, search: pose.whole(height, width))

    def restless(x):
        raw, *others = parts["body"](x)
        shift = torch.zeros_like(raw).view(len(raw), -1, 5)
        shift[:, :pose.HEAD, :2] = moved * len(looks)  # of 256 pixels, in the second look
        looks.append(x)
        return [raw + shift.view_as(raw), *others]

    found = pose.people({**parts, "body": restless}, PICTURE, hands=False, face=False, search=search)
    assert len(found) == count and len(looks) == 1 + search


@pytest.mark.skipif("POSE_MODELS" not in os.environ, reason="POSE_MODELS does not name mediapipe 0.10.21's wheel")
@pytest.mark.parametrize("down, across, search", [(1, 2, 1), (1, 2, 2), (2, 1, 1), (2, 2, 1), (2, 2, 2), (3, 3, 2)])
def test_as_many_people_are_found_as_the_picture_shows(down, across, search):
    data = pytest.importorskip("skimage.data", reason="the photograph is scikit-image's")
    with zipfile.ZipFile(os.environ["POSE_MODELS"]) as wheel:
        graphs = {part: pose.Graph(wheel.read(f"mediapipe/modules/{pose.FILES[part]}"), part)
                  for part in ("detector", "body")}
    picture = (torch.from_numpy(data.astronaut()).movedim(-1, 0) / 255).repeat(1, down, across)
    found = pose.people(graphs, picture, hands=False, face=False, search=search)
    assert len(found) == down * across


# --- LiteRT

def test_a_file_that_is_no_network_is_refused_by_name():
    pytest.importorskip("ai_edge_litert")
    with pytest.raises(ValueError, match="hand.tflite is not a tflite network"):
        pose.Graph(b"no network", "hand.tflite")


def test_without_litert_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match="pip install ai-edge-litert"):
        pose.Graph(b"", "hand.tflite")


def test_tflite_files_give_the_person_that_was_recorded(tmp_path, person):
    pytest.importorskip("ai_edge_litert")
    graphs = {}
    for part in pose.FILES:
        write(tmp_path / part, part)
        graphs[part] = pose.Graph((tmp_path / part).read_bytes(), part)
    (found,) = pose.people(graphs, PICTURE, search=0)
    assert torch.allclose(found.body, person.body, atol=1e-3)
    assert torch.allclose(found.left, person.left, atol=1e-3)
    assert torch.allclose(found.face, person.face, atol=1e-3)


# --- OpenPose

def test_the_body_has_openpose_s_points(person):
    (parts,) = openpose.frame([person], HEIGHT, WIDTH)["people"]
    body = numpy.reshape(parts["pose_keypoints_2d"], (18, 3))
    theirs = person.body.numpy()
    for ours, blazepose in ((0, 0), (2, 12), (4, 16), (5, 11), (8, 24), (13, 27), (14, 5), (17, 7)):
        assert body[ours] == pytest.approx(theirs[blazepose], abs=1e-3)
    assert body[1, :2] == pytest.approx(theirs[[11, 12], :2].mean(0), abs=1e-3)  # the neck
    assert len(parts["face_keypoints_2d"]) == 70 * 3
    assert len(parts["hand_left_keypoints_2d"]) == len(parts["hand_right_keypoints_2d"]) == 21 * 3


def test_the_parts_of_the_face_are_where_they_belong(person):
    x, y = openpose.points_of(person, HEIGHT, WIDTH)["face_keypoints_2d"][:, :2].T
    right_eye, left_eye, mouth, jaw, nose = (slice(36, 42), slice(42, 48), slice(48, 68), slice(0, 17), 30)
    assert x[right_eye].max() < x[27] < x[left_eye].min()  # the person's right is on our left
    assert y[right_eye].mean() < y[nose] < y[mouth].mean() < y[8] == y[jaw].max()
    assert x[0] == x.min() and x[16] > x[left_eye].max()
    assert (x[68], y[68]) == (x[right_eye].mean(), y[right_eye].mean())


def test_points_outside_of_the_picture_are_left_out(person):
    cut = openpose.points_of(person, HEIGHT // 2, WIDTH)["pose_keypoints_2d"]
    assert cut[10].tolist() == [0, 0, 0] and cut[0].tolist() == person.body[0].tolist()


def frame_of(points: dict[int, tuple], height=100, width=200, **parts) -> dict:
    body = [0.0] * 54
    for index, point in points.items():
        body[3 * index : 3 * index + 3] = point
    return {"people": [{"pose_keypoints_2d": body, **parts}], "canvas_height": height, "canvas_width": width}


def test_a_limb_is_dimmed_and_its_joints_are_not():
    drawn = openpose.draw(frame_of({2: (50, 50, 1), 3: (150, 50, 1)}), 100, 200)
    assert (drawn[50, 100] * 255).tolist() == [int(255 * 0.6), int(170 * 0.6), 0]
    assert (drawn[50, 50] * 255).tolist() == [255, 170, 0]
    assert (drawn[50, 150] * 255).tolist() == [255, 255, 0]
    assert drawn[54, 100].amax() > 0 and drawn[56, 100].amax() == 0  # four pixels to either side


def test_the_colours_are_openpose_s():
    assert [openpose.colour(i / 18) for i in (0, 1, 2, 9, 17)] == [
        (255, 0, 0), (255, 85, 0), (255, 170, 0), (0, 255, 255), (255, 0, 85)
    ]  # fmt: skip


def test_unsure_points_are_not_drawn():
    assert openpose.draw(frame_of({2: (50, 50, 0.2), 3: (150, 50, 0.2)}), 100, 200).amax() == 0
    assert openpose.draw(frame_of({2: (50, 50, 0.2)}), 100, 200, confidence=0.1).amax() == 1


def test_points_in_parts_of_the_picture_are_drawn_like_those_in_pixels():
    pixels = openpose.draw(frame_of({2: (50, 50, 1), 3: (150, 50, 1)}), 100, 200)
    assert torch.equal(openpose.draw(frame_of({2: (0.25, 0.5, 1), 3: (0.75, 0.5, 1)}), 100, 200), pixels)


STANDING = {i: (50 + 3 * i, 20 + 4 * i, 1) for i in range(18)}
CANVAS = 128, 256  # powers of two, so that fractions of it are exact


def in_fractions(frame: dict) -> dict:
    """A frame with the points of every part as fractions of its canvas."""
    sizes = frame["canvas_width"], frame["canvas_height"], 1
    people = [{name: [v / sizes[i % 3] for i, v in enumerate(values)] for name, values in person.items()}
              for person in frame["people"]]
    return {**frame, "people": people}


@pytest.mark.parametrize("joint, place", [
    (10, (60, 140)),  # an ankle below the picture
    (4, (-3, 40)),  # a wrist to its left
    (7, (340, 40)),  # a hand far to its right
    (0, (60, -90)),  # a head above it
])  # fmt: skip
def test_fractions_of_the_picture_may_lie_outside_of_it(joint, place):
    frame = frame_of({**STANDING, joint: (*place, 1)}, *CANVAS)
    assert torch.equal(openpose.draw(in_fractions(frame), *CANVAS), openpose.draw(frame, *CANVAS))


def test_a_person_beside_the_picture_leaves_the_others_in_fractions():
    inside, outside = (frame_of({i: (x - left, y, c) for i, (x, y, c) in STANDING.items()}, *CANVAS)
                       for left in (0, 150))
    frame = {**inside, "people": inside["people"] + outside["people"]}
    assert torch.equal(openpose.draw(in_fractions(frame), *CANVAS), openpose.draw(frame, *CANVAS))


def test_a_point_that_was_not_seen_does_not_change_the_units():
    frame = in_fractions(frame_of({2: (50, 50, 1), 3: (150, 50, 1)}))
    frame["people"][0]["pose_keypoints_2d"][30:33] = [640.0, 480.0, 0.0]
    assert openpose.draw(frame, 100, 200)[50, 50].amax() == 1


def test_whole_numbers_of_a_few_pixels_are_pixels():
    drawn = openpose.draw(frame_of({2: (2, 2, 1), 3: (3, 2, 1)}), 100, 200)
    assert drawn[2, 2].amax() == 1 and drawn[50:].amax() == 0


def test_another_size_stretches_the_pose():
    drawn = openpose.draw(frame_of({2: (50, 50, 1)}), 300, 400)
    assert drawn.shape == (300, 400, 3) and (drawn[150, 100] * 255).tolist() == [255, 170, 0]


def test_hands_and_faces_are_drawn_where_they_are_asked_for():
    hand = [0.0] * 63
    hand[0:3], hand[3:6] = (20, 20, 1), (60, 20, 1)
    frame = frame_of({}, hand_left_keypoints_2d=hand, face_keypoints_2d=[150.0, 80.0, 1.0] + [0.0] * 207)
    drawn = openpose.draw(frame, 100, 200)
    assert (drawn[20, 20] * 255).tolist() == [0, 0, 255] and (drawn[20, 40] * 255).tolist() == [255, 0, 0]
    assert (drawn[80, 150] * 255).tolist() == [255, 255, 255]
    assert openpose.draw(frame, 100, 200, hands=False, face=False).amax() == 0


def test_json_comes_back_as_the_same_pose(person):
    import json

    frame = openpose.frame([person], HEIGHT, WIDTH)
    assert openpose.read(json.dumps([frame])) == [frame] == openpose.read(json.dumps(frame))


@pytest.mark.parametrize("text, words", [
    ("{", "not valid JSON"),
    ("7", "list of people"),
    ('{"version": 1}', "no list of people"),
    ('{"people": [{"pose_keypoints_2d": [1, 2]}]}', "has 2 values"),
    ('{"people": [{"pose_keypoints_2d": [' + "0, " * 74 + "0]}]}", "25 points.*BODY_25"),
])  # fmt: skip
def test_json_that_is_no_pose_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        openpose.read(text)


TWO = frame_of({2: (50, 50, 1), 3: (150, 50, 1)})
BODY = TWO["people"][0]["pose_keypoints_2d"]


def as_body(values, **entries) -> dict:
    return {**TWO, "people": [{"pose_keypoints_2d": values}], **entries}


@pytest.mark.parametrize("frame", [
    as_body(numpy.array(BODY, numpy.float32)),
    as_body([numpy.float32(v) for v in BODY]),
    as_body([numpy.int64(v) for v in BODY]),
    as_body(torch.tensor(BODY)),
    as_body(numpy.array(BODY).reshape(18, 3)),
    as_body([BODY[i:i + 3] for i in range(0, 54, 3)]),
    as_body([numpy.array(BODY[i:i + 3]) for i in range(0, 54, 3)]),
    as_body([str(v) for v in BODY]),
    as_body(BODY, canvas_width="200", canvas_height="100"),
    as_body(BODY, canvas_width=200.0, canvas_height=numpy.int32(100)),
    as_body(BODY[:-3] + [None, None, None]),
    as_body(BODY[:-3] + [float("nan"), 3.0, 1.0]),
    as_body(BODY[:-3] + [float("inf"), 3.0, 1.0]),
    as_body(BODY[:-3] + [1e30, 3.0, 1.0]),
    as_body(BODY[:-1] + [None]),
    {**TWO, "people": [None, *TWO["people"]]},
    {**TWO, "people": [{**TWO["people"][0], "face_keypoints_2d": None, "hand_left_keypoints_2d": numpy.zeros(0)}]},
    {**TWO, "people": numpy.array(TWO["people"], object)},
], ids=str)  # fmt: skip
def test_a_pose_in_other_kinds_of_numbers_is_drawn_as_in_plain_ones(frame):
    drawn = openpose.draw(TWO, 100, 200)
    assert torch.equal(openpose.draw(frame, 100, 200), drawn)
    (checked,) = openpose.checked(frame)
    assert torch.equal(openpose.draw(checked, 100, 200), drawn) and openpose.checked([checked]) == [checked]
    assert (checked["canvas_height"], checked["canvas_width"]) == (100, 200)


def test_json_may_begin_with_the_mark_of_windows_editors():
    import json

    assert openpose.read("\ufeff" + json.dumps(TWO)) == openpose.read(json.dumps(TWO))


@pytest.mark.parametrize("frame, words", [
    (as_body("none"), "pose_keypoints_2d must be a list .* 'none'"),
    (as_body(7), "pose_keypoints_2d must be a list .* '7'"),
    (as_body(["left", 1, 1] * 18), "pose_keypoints_2d must hold x, y and confidence .*'left'"),
    (as_body([{}, 1, 1] * 18), "pose_keypoints_2d must hold x, y and confidence"),
    (as_body([10**400, 1, 1] * 18), "pose_keypoints_2d must hold x, y and confidence"),
    (as_body(BODY, canvas_width="wide"), "canvas_width='wide' must be a number of pixels"),
    (as_body(BODY, canvas_width=[200]), "canvas_width='.200.' must be a number of pixels"),
    ({"people": [7]}, "no list of people"),
])  # fmt: skip
def test_a_pose_without_numbers_is_refused_by_the_entry(frame, words):
    with pytest.raises(ValueError, match=words):
        openpose.checked(frame)


@pytest.mark.parametrize("side", [None, "", 0, -5, float("nan"), 1e-9])
def test_a_canvas_of_no_size_is_as_one_that_is_not_stated(side):
    (checked,) = openpose.checked(as_body(BODY, canvas_width=side, canvas_height=side))
    assert checked["canvas_width"] == checked["canvas_height"] == 0
    assert torch.equal(openpose.draw(checked, 100, 200), openpose.draw(TWO, 100, 200))


def test_a_frame_of_nobody_is_black():
    assert openpose.draw(openpose.checked({"people": None})[0], 8, 8).amax() == 0
