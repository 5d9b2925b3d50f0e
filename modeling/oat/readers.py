"""Eye-tracking datasets -> trials: the two formats of the paper, and JSON lines for your own data."""

import json
from pathlib import Path
from typing import Any

import torch

from .layout import check_boxes, grid_boxes, object_of_box
from .trials import Trial


#: grid of the book covers of the STI dataset
AMAZON_GRID = (6, 14)

#: first letters of `Question` -> rows, columns, height and width of a cell on a screen of 1680 x 1050 whose lower edge the shelf
#: stands on
SHELVES = {"Q1": (2, 11, 449, 152), "Q2": (3, 9, 295, 186), "Q3": (3, 9, 305, 186)}
SHELF_SCREEN = (1680, 1050)


def read_amazon(annotations: str | Path, image_dir: str | Path, boxes: str | Path | None = None) -> list[Trial]:
    """Read the STI dataset of book covers (`Amazon.json`), with the scanpaths of six people per image.

    Args:
        annotations: the JSON file: image name -> `fixations` (person -> points), `ground_truth` (a box), `size`.
        image_dir: folder of the images.
        boxes: JSON file, image name -> boxes of its covers. The paper's are not published; the cells of a grid of 6 x 14 over the
            image if not given.

    Raises:
        ValueError: if an entry is incomplete or its image is not there; the message says which.
    """
    entries = _json(annotations)
    given = None if boxes is None else _json(boxes)
    trials = []
    for name, entry in entries.items():
        try:
            width, height = entry["size"]["width"], entry["size"]["height"]
            if given is None:
                image_boxes, grid = grid_boxes(*AMAZON_GRID, height, width), AMAZON_GRID
            else:
                image_boxes, grid = check_boxes(given[name], height, width), None
            truth = entry["ground_truth"][0]
            target_index = object_of_box([truth[key] for key in ("xmin", "ymin", "xmax", "ymax")], image_boxes)
            fields = {"image_id": name, "image": _image(image_dir, name), "grid": grid}
            for fixations in entry["fixations"].values():
                if fixations:
                    trials.append(Trial.from_fixations(fixations, image_boxes, target_index=target_index, **fields))
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{annotations}: the entry of {name} has no {error}.") from error
        except ValueError as error:
            raise ValueError(f"{annotations}, {name}: {error}") from error
    return trials


def read_shelves(table: str | Path, image_dir: str | Path) -> list[Trial]:
    """Read the authors' shelves, a table (CSV or Excel) with a row for each fixation.

    Columns: `ID` (trial), `Question` (layout, and name of its image), `T_Package` (target, counted from 1), `Choice` (the object
    that is looked at, counted from 1), `X` and `Y` (pixels).

    Raises:
        ValueError: if a column is missing, a layout is unknown or an object is none of the shelf; the message says which.
        ImportError: if pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("Reading tables needs pandas: `pip install 'hf_attn[train]'`.") from error
    is_excel = Path(table).suffix.lower() in (".xls", ".xlsx")
    rows = pandas.read_excel(table) if is_excel else pandas.read_csv(table)
    missing = [name for name in ("ID", "Question", "T_Package", "Choice", "X", "Y") if name not in rows]
    if missing:
        raise ValueError(f"{table} has no column {', '.join(missing)}; it has {', '.join(map(str, rows.columns))}.")
    trials = []
    for identifier, fixations in rows.groupby("ID", sort=False):
        question = str(fixations["Question"].iloc[0])
        if question[:2] not in SHELVES:
            raise ValueError(
                f"{table}, trial {identifier}: unknown layout {question!r}; available: {', '.join(SHELVES)}."
            )
        *grid, height, width = SHELVES[question[:2]]
        trial = {
            "image_id": question,
            "image": _image(image_dir, f"{question}.png"),
            "boxes": shelf_boxes(*grid, height, width),
            "grid": tuple(grid),
            "target_index": int(fixations["T_Package"].iloc[0]) - 1,
            "scanpath": [int(choice) - 1 for choice in fixations["Choice"]],
            "points": fixations[["X", "Y"]].to_numpy(dtype=float),
        }
        try:
            trials.append(Trial(**trial))
        except ValueError as error:
            raise ValueError(f"{table}, trial {identifier}: {error}") from error
    return trials


def shelf_boxes(rows: int, columns: int, height: int, width: int) -> torch.Tensor:
    """Boxes of a shelf on the screen, row by row."""
    top = SHELF_SCREEN[1] - rows * height
    corners = [(column * width, top + row * height) for row in range(rows) for column in range(columns)]
    return torch.tensor([(x, y, x + width, y + height) for x, y in corners])


def read_trials(file: str | Path) -> list[Trial]:
    """Read your own trials from JSON lines, one trial per line.

    Keys: `image` (path, from the folder of the file), `boxes` or `grid` with `size` (`[width, height]`), `target_index`, and
    `fixations` (points in pixels) or `scanpath` (objects).

    Raises:
        ValueError: if a line is not such an object; the message states its number.
    """
    trials = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            trials.append(_trial(json.loads(line), Path(file).parent))
        except KeyError as error:
            raise ValueError(f"{file}, line {number}: there is no {error}.") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    return trials


def _trial(entry: dict[str, Any], folder: Path) -> Trial:
    grid = None if entry.get("grid") is None else tuple(entry["grid"])
    if "boxes" in entry:
        boxes = torch.as_tensor(entry["boxes"])
    elif grid is not None:
        width, height = entry["size"]
        boxes = grid_boxes(*grid, height, width)
    else:
        raise KeyError("boxes")
    fields = {
        "image_id": entry["image"],
        "image": _image(folder, entry["image"]),
        "target_index": entry["target_index"],
        "grid": grid,
    }
    if "fixations" in entry:
        return Trial.from_fixations(entry["fixations"], boxes, **fields)
    return Trial(boxes=boxes, scanpath=entry["scanpath"], **fields)


def _image(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"There is no image {path}.")
    return path


def _json(file: str | Path) -> Any:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
