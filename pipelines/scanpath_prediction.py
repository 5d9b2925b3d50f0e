"""Pipeline `scanpath-prediction`: the order in which a person looks at the objects of an image while searching for one."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Pipeline

from hf_attn.modeling.oat.drawing import draw_scanpath
from hf_attn.modeling.oat.layout import box_centres, check_boxes, grid_boxes, object_of_box
from hf_attn.pipelines.heads import check_head


try:
    from PIL import Image
except ImportError as error:
    raise ImportError("Images are drawn with Pillow: `pip install 'hf_attn[vision]'`.") from error


class ScanpathPredictionPipeline(Pipeline):
    """Predicts scanpaths with a model of `AutoModelForScanpathPrediction` (OAT).

        pipe = pipeline("scanpath-prediction", model="...")
        (scanpath,) = pipe("shelf.png", boxes=boxes, target_index=5)
        scanpaths = pipe("shelf.png", grid=(3, 9), target_index=5, num_scanpaths=100)
        pipe("shelf.png", boxes=boxes, target_index=5, draw=True)[0]["picture"].save("scanpath.png")

    An image is a path, a URL, a Pillow image or an array. Several scenes are a list, dataset or generator of dictionaries with
    `image` and the first four parameters. The result of a scene is a list of dictionaries, a scanpath each:

    - `objects`: the objects in order, as places in `boxes`;
    - `centres`: the centres of their boxes, x and y in pixels;
    - `scores`: the probability of each fixation, given those before it;
    - `score`: the probability of the whole scanpath;
    - `found`: whether it ends at the target;
    - `picture`: on request, the image with boxes, arrows and numbered circles.

    Parameters, for the call or the constructor:

    - **boxes**: `(objects, 4)`, x1, y1, x2, y2 in pixels; as many as the scene has objects, also fewer or more than the model was
      trained with.
    - **grid** (`tuple[int, int]`): rows and columns, if the objects fill a grid. Without boxes they are the cells of a grid over the
      whole image.
    - **target_index** (`int`): the object that is searched for, or
    - **target_box**: a box, which means the object that shares most with it.
    - **num_scanpaths** (`int`, 1): one scanpath is the most likely fixation in each step; several are sampled.
    - **do_sample** (`bool`): sample one scanpath, too.
    - **draw** (`bool`, `False`): draw the scanpath on the image.
    - any other argument of `generate`, such as `temperature` or `max_new_tokens`.
    """

    _load_processor = False
    _load_image_processor = True
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_head(self.model)
        if self.image_processor is None:
            raise ValueError(
                "The model has no image processor. Pass one: "
                "image_processor=OATImageProcessor.from_config(model.config)."
            )
        self.model.eval()

    def __call__(self, inputs, **kwargs):
        """Predict the scanpaths of one or more scenes; see the class."""
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        boxes: Any = None,
        grid: tuple[int, int] | None = None,
        target_index: int | None = None,
        target_box: Any = None,
        num_scanpaths: int | None = None,
        draw: bool | None = None,
        **generate_kwargs,
    ):
        scene = {"boxes": boxes, "grid": grid, "target_index": target_index, "target_box": target_box}
        scene = {name: value for name, value in scene.items() if value is not None}
        if num_scanpaths is not None:
            if num_scanpaths < 1:
                raise ValueError(f"num_scanpaths must be at least 1, got {num_scanpaths}.")
            generate_kwargs["num_return_sequences"] = num_scanpaths
        return scene, generate_kwargs, {} if draw is None else {"draw": draw}

    def preprocess(self, inputs, boxes=None, grid=None, target_index=None, target_box=None) -> dict:
        if isinstance(inputs, Mapping):
            known = {"image", "boxes", "grid", "target_index", "target_box"}
            if "image" not in inputs or set(inputs) - known:
                raise ValueError(
                    f"A scene must be a dictionary with {', '.join(sorted(known))}, got {', '.join(inputs)}."
                )
            boxes, grid = inputs.get("boxes", boxes), inputs.get("grid", grid)
            if "target_index" in inputs or "target_box" in inputs:
                target_index, target_box = inputs.get("target_index"), inputs.get("target_box")
            inputs = inputs["image"]
        pixels = self.image_processor.read_image(inputs)
        if boxes is None:
            if grid is None:
                raise ValueError("Pass the positions of the objects: either boxes, or the rows and columns of a grid.")
            boxes = grid_boxes(*grid, *pixels.shape[1:])
        boxes = check_boxes(boxes, *pixels.shape[1:])
        if (target_index is None) == (target_box is None):
            raise ValueError("Pass the target of the search: either target_index or target_box.")
        if target_index is None:
            target_index = object_of_box(target_box, boxes)
        image = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
        model_inputs = self.image_processor(image, boxes, target_index, grid=grid)
        return {"model_inputs": model_inputs, "boxes": boxes, "target_index": target_index, "image": image}

    def _forward(self, inputs: dict, **generate_kwargs) -> dict:
        generate_kwargs.setdefault("do_sample", generate_kwargs.get("num_return_sequences", 1) > 1)
        generated = self.model.generate(
            **inputs["model_inputs"], **generate_kwargs, return_dict_in_generate=True, output_scores=True
        )
        ids = generated.sequences[:, -len(generated.scores) :]
        probabilities = torch.stack(generated.scores, dim=1).float().softmax(-1)
        scores = probabilities.take_along_dim(ids.unsqueeze(-1), dim=-1).squeeze(-1)
        return {**inputs, "ids": ids, "scores": scores}

    def postprocess(self, outputs: dict, draw: bool = False) -> list[dict]:
        boxes, target_index = outputs["boxes"], outputs["target_index"]
        centres = box_centres(boxes).tolist()
        results = []
        for ids, scores in zip(outputs["ids"].tolist(), outputs["scores"].tolist(), strict=True):
            objects = ids[: ids.index(len(boxes))] if len(boxes) in ids else ids
            result = {
                "objects": objects,
                "centres": [centres[index] for index in objects],
                "scores": scores[: len(objects)],
                # The decision to stop belongs to the scanpath.
                "score": torch.tensor(scores[: len(objects) + 1], dtype=torch.float64).prod().item(),
                "found": bool(objects) and objects[-1] == target_index,
            }
            if draw:
                result["picture"] = draw_scanpath(outputs["image"], boxes, objects, target_index)
            results.append(result)
        return results
