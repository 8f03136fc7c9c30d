import csv
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.labels import LabelSet, load_label_set, packaged_rows

SMALL = LabelSet("small", ("road", "car"), ((1, 2, 3), (4, 5, 6)), ((7, 0), (300, 1), (9, 0), (255, 255)))
HEAD = "raw_id,train_id,name,color\n"

CAMVID_11 = {  # SegNet-Tutorial's scripts
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
V = 255
CAMVID_32 = """
Sky 128,128,128 0 0 0|Building 128,0,0 1 1 1|Wall 64,192,0 1 1 V|Bridge 0,128,64 V 1 V|Archway 192,0,128 V 1 V
Tunnel 64,0,64 V 1 V|Column_Pole 192,192,128 2 2 2|TrafficCone 0,0,64 V 2 V|Road 128,64,128 3 3 3
LaneMkgsDriv 128,0,192 3 3 V|LaneMkgsNonDriv 192,0,64 3 3 V|RoadShoulder 128,128,192 3 4 V|Sidewalk 0,0,192 4 4 4
ParkingBlock 64,192,128 4 4 V|Tree 128,128,0 5 5 5|VegetationMisc 192,192,0 5 5 V|SignSymbol 192,128,128 6 6 6
Misc_Text 128,128,64 6 6 V|TrafficLight 0,64,64 6 6 V|Fence 64,64,128 7 7 7|Car 64,0,128 8 8 8
SUVPickupTruck 64,128,192 8 8 V|Truck_Bus 192,128,192 8 8 V|Train 192,64,128 V 8 V|OtherMoving 128,64,64 V 8 V
Pedestrian 64,64,0 9 9 9|Child 192,128,64 V 9 V|CartLuggagePram 64,0,192 V 9 V|Animal 64,128,64 V 9 V
Bicyclist 0,128,192 10 10 10|MotorcycleScooter 192,0,192 10 10 V|Void 0,0,0 V V V
"""


def test_encode_maps_raw_ids_to_train_ids() -> None:
    raw = np.array([[7, 300], [9, 255]], np.uint16)
    train = SMALL.encode(raw, "a.png")
    assert train.dtype == np.uint8
    np.testing.assert_array_equal(train, [[0, 1], [0, 255]])


@pytest.mark.parametrize(("raw", "dtype"), [(8, np.uint8), (0, np.uint8), (301, np.int32)])
def test_error_of_an_unknown_raw_id_names_file_id_and_label_set(raw: int, dtype: type) -> None:
    mask = np.full((4, 5), 7, dtype)
    mask[2, 3] = raw
    text = rf"^deep/a\.png holds the label {raw}, .*'small' .* in 1 pixel\(s\) \(it has 7, 9, 255, 300\)$"
    with pytest.raises(UserError, match=text):
        SMALL.encode(mask, Path("deep/a.png"))


def test_error_of_several_unknown_raw_ids_lists_each_with_its_pixels() -> None:
    mask = np.array([[1, 1, 2], [7, 3, 3], [3, 9, 9]], np.uint8)
    with pytest.raises(UserError, match=r"3 labels that .* does not have: 1 in 2 pixel\(s\), 2 in 1 .*, 3 in 3"):
        SMALL.encode(mask, "a.png")
    with pytest.raises(UserError, match=r"100 labels that .* 14 in 1 pixel\(s\) and 95 more \(it has"):
        SMALL.encode(np.arange(10, 110, dtype=np.uint8), "a.png")


@pytest.mark.parametrize("raw", [-1, 65536, 70000])
def test_no_line_is_advised_that_a_label_csv_refuses(tmp_path: Path, raw: int) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("raw_id,train_id,name,color\n0,0,road,#804080\n", "utf-8")
    labels = LabelSet.from_csv(path)
    with pytest.raises(UserError, match=rf"A label is a number 0\.\.65535: if {raw} is the number of an obj") as error:
        labels.encode(np.array([[0, 7, raw]], np.int32), "a.png")
    assert "add" not in str(error.value)


def test_error_of_an_unknown_raw_id_shows_the_line_to_add_to_the_csv(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("raw_id,train_id,name,color\n0,0,road,#804080\n1,1,car,#00008e\n2,255,void,#000000", "utf-8")
    with pytest.raises(
        UserError, match=rf"\(it has 0\.\.2\)\. .* add the line '9,255,void,#000000' to {path} to ignore its"
    ):
        LabelSet.from_csv(path).encode(np.full((2, 2), 9, np.uint8), "a.png")


def test_empty_mask_is_encoded() -> None:
    assert SMALL.encode(np.zeros((0, 5), np.uint8), "a.png").shape == (0, 5)


def test_decode_uses_the_first_raw_id_and_encode_inverts_it() -> None:
    train = np.array([[0, 1, 255]], np.uint8)
    raw = SMALL.decode(train)
    np.testing.assert_array_equal(raw, [[7, 300, 255]])
    np.testing.assert_array_equal(SMALL.encode(raw, ""), train)


def test_decode_returns_8_bits_if_possible_and_keeps_void_without_a_raw_id() -> None:
    labels = load_label_set("synthetic")
    assert labels.decode(np.array([3, 255], np.uint8)).dtype == np.uint8
    np.testing.assert_array_equal(labels.decode(np.array([3, 255], np.uint8)), [3, 255])


def test_label_sets_are_equal_by_value_and_frozen() -> None:
    assert load_label_set("camvid_11") == load_label_set("camvid_11")
    with pytest.raises(AttributeError):
        SMALL.name = "other"


def test_csv_of_a_user(tmp_path: Path) -> None:
    lines = ["\ufeffname,color,train_id,raw_id", "road,#804080,0,7\r", "car, #00008E,1,300", "van,#000001,1,301"]
    text = "\n".join([*lines, "void,#000000,255,0"])
    (tmp_path / "mine.csv").write_text(text, encoding="utf-8")
    labels = LabelSet.from_csv(tmp_path / "mine.csv")
    assert labels.name == "mine"
    assert labels.class_names == ("road", "car")
    assert labels.num_classes == 2
    assert labels.palette == ((128, 64, 128), (0, 0, 142))
    assert labels.raw_to_train == ((7, 0), (300, 1), (301, 1), (0, 255))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raw_id,name,color\n", r"lacks the column\(s\) train_id.*\n.*raw_id,train_id,name,color\n0,0,road"),
        ("", r"lacks the column\(s\) color, name, raw_id, train_id"),
        (HEAD, r"the train ids are \[\]"),
        (HEAD + "0,255,void,#000000\n", r"the train ids are \[\]"),
        (HEAD + "0,0,a,#000000\n1,2,b,#000000\n", r"the train ids are \[0, 2\]; expected 0, 1, 2"),
        (HEAD + "0,0,a,#000000\n0,1,b,#000000\n", "duplicate raw_id 0"),
        (HEAD + "0,0,a,#000000\n1,1,a,#000000\n", r"same name \(a\)"),
        (HEAD + "x,0,a,#000000\n", "line 2: raw_id is 'x'; expected a whole number 0..65535"),
        (HEAD + "-1,0,a,#000000\n", "line 2: raw_id is '-1'"),
        (HEAD + "65536,0,a,#000000\n", "raw_id is '65536'"),
        (HEAD + "0,0,a,#000000\n1,256,b,#000000\n", "line 3: train_id is '256'; expected a whole number 0..255"),
        (HEAD + "0\n", "line 2: train_id is ''"),
        (HEAD + "0,0,,#000000\n", "line 2: the name is empty"),
        (HEAD + "0,0,a,red\n", "line 2: the color is 'red'; expected .* #804080"),
        (HEAD + "0,0,a,#12345\n", "the color is '#12345'"),
        (HEAD + "0,0,a,1234567\n", "the color is '1234567'"),
        (HEAD + "0,0,a,#12345g\n", "the color is '#12345g'"),
        (HEAD + "0,0,a\n", "the color is ''"),
    ],
)
def test_error_names_the_invalid_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(UserError, match=rf"(?s)mine\.csv.*{message}"):
        LabelSet.from_csv(tmp_path / "mine.csv")


def test_missing_csv_shows_an_example(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"(?s)nowhere\.csv.*raw_id,train_id,name,color\n0,0,road,#804080"):
        LabelSet.from_csv(tmp_path / "nowhere.csv")


def test_binary_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"mine\.csv is not UTF-8"):
        LabelSet.from_csv(tmp_path / "mine.csv")


def test_error_of_an_unknown_label_set_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no label set 'camvid'.*camvid_11, camvid_32"):
        load_label_set("camvid")


def test_every_packaged_csv_loads_and_has_no_empty_or_padded_cells() -> None:
    files = [file for file in resources.files("early_fusion_seg.labels").iterdir() if file.name.endswith(".csv")]
    assert {file.name for file in files} >= {"camvid_11.csv", "camvid_32.csv", "synthetic.csv"}
    for file in files:
        load_label_set(file.name.removesuffix(".csv"))
        for row in csv.reader(file.read_text(encoding="utf-8").splitlines()):
            assert all(cell == cell.strip() and cell for cell in row), (file.name, row)


@pytest.mark.parametrize("name", ["camvid_11", "synthetic"])
def test_camvid_11_is_the_table_of_segnet(name: str) -> None:
    labels = load_label_set(name)
    assert dict(zip(labels.class_names, labels.palette, strict=True)) == CAMVID_11
    assert list(labels.class_names) == list(CAMVID_11)
    void = ((11, 255),) if name == "camvid_11" else ()
    assert labels.raw_to_train == (*((i, i) for i in range(11)), *void)


def test_camvid_32_and_its_three_groupings_are_the_published_ones() -> None:
    expected = {}
    for line in CAMVID_32.strip().replace("\n", "|").split("|"):
        name, color, *groups = line.split()
        expected[name] = (tuple(map(int, color.split(","))), *(V if g == "V" else int(g) for g in groups))
    columns = [packaged_rows("camvid_32", column) for column in ("segnet_tutorial", "mathworks", "exact11")]
    found = {rows[0].name: (rows[0].color, *(row.train_id for row in rows)) for rows in zip(*columns, strict=True)}
    assert found == expected


def test_camvid_32_is_alphabetical_and_ignores_only_void() -> None:
    rows = packaged_rows("camvid_32")
    assert [row.raw_id for row in rows] == list(range(32))
    assert [row.name for row in rows] == sorted((row.name for row in rows), key=str.lower)
    assert [row.name for row in rows if row.train_id == 255] == ["Void"]
    assert load_label_set("camvid_32").num_classes == 31


def test_cityscapes_is_the_table_of_cityscapesscripts() -> None:
    from cityscapesscripts.helpers.labels import labels  # the official table

    official = [label for label in labels if label.id >= 0]
    rows = packaged_rows("cityscapes")
    assert [(r.raw_id, r.name, r.color) for r in rows] == [(o.id, o.name, o.color) for o in official]
    assert [r.train_id for r in rows] == [o.trainId if not o.ignoreInEval else 255 for o in official]
    evaluated = {o.trainId: o.name for o in official if not o.ignoreInEval}
    assert load_label_set("cityscapes").class_names == tuple(evaluated[i] for i in range(19))


def test_voc_has_the_palette_of_its_devkit() -> None:
    def color(label: int) -> tuple[int, ...]:  # bit k of a label, three at a time, from the highest bit down
        return tuple(sum((label >> (3 * k + channel) & 1) << (7 - k) for k in range(8)) for channel in range(3))

    rows = packaged_rows("voc2012")
    assert [r.color for r in rows] == [color(r.raw_id) for r in rows]
    assert [r.train_id for r in rows] == [*range(21), 255]
    assert [r.name for r in rows][:5] == ["background", "aeroplane", "bicycle", "bird", "boat"]


@pytest.mark.parametrize(("name", "classes", "ignored"), [
    ("mapillary_v1.2", 65, ["Unlabeled"]),
    ("mapillary_v2.0", 116, ["Person Group", "Vehicle Group", "Car Mount", "Dynamic", "Ego Vehicle", "Ground", "Static",
                             "Unlabeled"]),
    ("coco_panoptic", 133, ["void"]),
    ("coco_stuff", 171, ["street sign", "hat", "shoe", "eye glasses", "plate", "mirror", "window", "desk", "door",
                         "blender", "hair brush", "unlabeled"]),
])  # fmt: skip
def test_train_ids_have_the_order_of_the_raw_ids(name: str, classes: int, ignored: list[str]) -> None:
    rows = packaged_rows(name)
    used = [row for row in rows if row.train_id != 255]
    assert [row.train_id for row in sorted(used, key=lambda row: row.raw_id)] == [*range(classes)]
    assert [row.name for row in rows if row.train_id == 255] == ignored


def test_traffic_lights_of_mapillary_v2_have_the_published_order() -> None:  # often listed alphabetically
    names = {row.raw_id: row.name for row in packaged_rows("mapillary_v2.0")}
    assert [names[i] for i in range(90, 96)] == [
        "Traffic Light - General (Single)", "Traffic Light - Pedestrians", "Traffic Light - General (Upright)",
        "Traffic Light - General (Horizontal)", "Traffic Light - Cyclists", "Traffic Light - Other",
    ]  # fmt: skip


def test_train_ids_as_raw_ids() -> None:
    same = load_label_set("cityscapes").of_train_ids()
    labels = np.array([0, 18, 255])
    assert same.encode(labels, "x").tolist() == same.decode(labels).tolist() == [0, 18, 255]
    with pytest.raises(UserError, match="x holds the label 19"):
        same.encode(np.array([19]), "x")


@pytest.mark.parametrize("name", ["cityscapes", "mapillary_v1.2", "mapillary_v2.0", "coco_stuff", "voc2012"])
def test_decode_and_encode_agree_for_every_class(name: str) -> None:
    label_set = load_label_set(name)
    train_ids = np.arange(label_set.num_classes, dtype=np.uint8)
    assert label_set.encode(label_set.decode(train_ids), "x").tolist() == train_ids.tolist()
    assert label_set.decode(train_ids).dtype == np.uint8
