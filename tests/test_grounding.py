"""Boxes: reading, writing, measuring, drawing."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from mixformer.data.grounding import (
    Box,
    Point,
    draw_boxes,
    format_boxes,
    intersection_over_union,
    parse_boxes,
    parse_points,
    snap_coordinates,
)


def test_boxes_are_read_in_the_order_of_the_text() -> None:
    text = "A cat [[012,034,560,789;000,000,999,999]] beside\na dog [[1,2,3,4]]."
    assert parse_boxes(text) == [Box(12, 34, 560, 789), Box(0, 0, 999, 999), Box(1, 2, 3, 4)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing here",
        "[1,2,3,4]",
        "[[]]",
        "[[1,2,3]]",
        "[[1,2,3,4,5]]",
        "[[a,2,3,4]]",
        "[[1.5,2,3,4]]",
        "[[-1,2,3,4]]",
        "[[1, 2,3,4]]",
        "[[1,2,3,1000]]",
        "[[500,2,400,4]]",
        "[[1,2,3,4",
        "[[²,2,3,4]]",
    ],
)
def test_pieces_that_are_no_box_are_left_out(text: str) -> None:
    assert parse_boxes(text) == []


def test_a_malformed_piece_does_not_spoil_its_neighbours() -> None:
    assert parse_boxes("[[1,2,3,4;x;7,8;5,6,7,8]]") == [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]


def test_points_are_read_apart_from_boxes() -> None:
    assert parse_points("tap [[012,999;1,2,3,4]]") == [Point(12, 999)]
    assert str(Point(12, 999)) == "[[012,999]]"
    assert Point(500, 250).pixels(640, 480) == (320.0, 120.0)
    assert Point.from_pixels(320, 120, 640, 480) == Point(500, 250)


def test_boxes_are_written_with_three_digits() -> None:
    boxes = [Box(1, 22, 333, 999), Box(0, 0, 0, 0)]
    assert str(boxes[0]) == "[[001,022,333,999]]"
    assert format_boxes(boxes) == "[[001,022,333,999;000,000,000,000]]"
    assert parse_boxes(format_boxes(boxes)) == boxes
    assert format_boxes([]) == ""


def test_pixels_are_thousandths_of_width_and_height() -> None:
    assert Box(100, 250, 500, 750).pixels(1280, 800) == (128.0, 200.0, 640.0, 600.0)


def test_boxes_from_pixels_stay_inside_and_invert_pixels() -> None:
    assert Box.from_pixels(-5, 0, 2000, 800, 1280, 800) == Box(0, 0, 999, 999)
    for box in (Box(0, 1, 998, 999), Box(12, 34, 560, 789)):
        assert Box.from_pixels(*box.pixels(317, 211), 317, 211) == box
    with pytest.raises(ValueError, match="must be positive"):
        Box.from_pixels(0, 0, 1, 1, 0, 10)


@pytest.mark.parametrize("values", [(-1, 0, 1, 1), (0, 0, 1, 1000), (5, 0, 4, 1), (0, 5, 1, 4), (0.5, 0, 1, 1)])
def test_impossible_boxes_are_refused(values: tuple) -> None:
    with pytest.raises(ValueError, match="box"):
        Box(*values)
    with pytest.raises(ValueError, match="point"):
        Point(-1, 0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Box(0, 0, 10, 10), Box(0, 0, 10, 10), 1.0),
        (Box(0, 0, 10, 10), Box(5, 0, 15, 10), 50 / 150),
        (Box(0, 0, 10, 10), Box(10, 0, 20, 10), 0.0),
        (Box(0, 0, 10, 10), Box(20, 20, 30, 30), 0.0),
        (Box(0, 0, 10, 10), Box(2, 2, 4, 7), 10 / 100),
        (Box(5, 5, 5, 5), Box(5, 5, 5, 5), 0.0),
        ((0.0, 0.0, 1.5, 2.0), (0.5, 0.0, 1.5, 2.0), 2 / 3),
    ],
)
def test_overlap_is_shared_area_over_joint_area(first: Box, second: Box, expected: float) -> None:
    assert intersection_over_union(first, second) == pytest.approx(expected)
    assert intersection_over_union(second, first) == pytest.approx(expected)


def test_overlap_needs_four_values() -> None:
    with pytest.raises(ValueError, match="four values"):
        intersection_over_union((0, 0, 1), (0, 0, 1, 1))


@pytest.mark.parametrize("background", ["white", "black", "gray", (213, 0, 90)])
def test_a_drawn_box_shows_on_any_background_and_leaves_its_content(background: str) -> None:
    source = Image.new("RGB", (400, 300), background)
    before = source.tobytes()
    drawn = draw_boxes(source, [Box(250, 250, 750, 750)])
    assert source.tobytes() == before and drawn.size == source.size
    change = np.asarray(ImageChops.difference(drawn, source)).max(axis=2)
    assert change[75:225, 97:100].max() > 100 and change[75:225, 300:303].max() > 100
    assert change[72:75, 100:300].max() > 100 and change[225:229, 100:300].max() > 100
    assert not change[80:220, 105:295].any()


@pytest.mark.parametrize("size", [(400, 300), (40, 30), (9, 200), (3, 3), (1, 1)])
def test_labels_and_frames_stay_inside_pictures_of_any_size(size: tuple[int, int]) -> None:
    boxes = [Box(0, 0, 999, 999), Box(0, 0, 0, 0), Box(999, 999, 999, 999), Box(900, 0, 999, 40)]
    drawn = draw_boxes(Image.new("L", size, 128), boxes, ["a label " * 30, "x", "", "menu"])
    assert drawn.size == size and drawn.mode == "RGB"


def test_a_label_beside_the_border_is_drawn_whole() -> None:
    def label_area(box: Box) -> int:
        plain, named = (draw_boxes(Image.new("RGB", (400, 300)), [box], names) for names in (None, ["menu"]))
        return int(np.asarray(ImageChops.difference(plain, named)).any(axis=2).sum())

    inside = label_area(Box(400, 400, 600, 600))
    for box in (Box(960, 500, 999, 600), Box(0, 500, 50, 600)):
        assert label_area(box) > 0.85 * inside  # less only by pixels of the frame that are the same


def test_labels_must_match_boxes() -> None:
    with pytest.raises(ValueError, match=r"1 label\(s\) for 2 box"):
        draw_boxes(Image.new("RGB", (9, 9)), [Box(0, 0, 1, 1)] * 2, ["one"])


def test_coordinates_snap_to_the_nearest_pixel_edge_and_text_stays() -> None:
    text = "Read [[583,770,756,999]] at 583, or [[5,x]]"
    edges = [round(pixel * 1000 / 224) for pixel in range(224)]
    expected = [min(edges, key=lambda edge: abs(edge - number)) for number in (583, 770, 756, 999, 5)]
    a, b, c, d, e = (f"{number:03d}" for number in expected)
    assert snap_coordinates(text, 224) == f"Read [[{a},{b},{c},{d}]] at 583, or [[{e},x]]"
    assert snap_coordinates(snap_coordinates(text, 224), 224) == snap_coordinates(text, 224)
