"""`hf-attn analyze-vit`: which heads of a vision transformer matter, how far they look, and what patterns they have."""

import argparse
from pathlib import Path

from ._command import CommandError, formatter, positive


DEFAULT_MODEL = "outputs/digits_vit"
#: makes the default model, a plain ViT, in a minute
TRAIN_DEFAULT = (
    f"python scripts/run_image_classification.py --model_type vit --num_train_epochs 12 --output_dir {DEFAULT_MODEL}"
)


def add_parser(commands) -> None:
    analyze = commands.add_parser(
        "analyze-vit",
        help="analyse the attention heads of a vision transformer",
        description="Measure which heads of a vision transformer matter, how far they attend and which patterns they "
        "have. Writes tables, figures and one interactive page.",
        epilog=f"The default model comes from: {TRAIN_DEFAULT}",
        formatter_class=formatter,
    )
    analyze.add_argument(
        "model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL, help="folder, Hub id, or timm/NAME (%(default)s)"
    )
    analyze.add_argument(
        "--images",
        metavar="DIR",
        type=Path,
        help="folder of images, or of one folder per class (default: the digits of scikit-learn for a model of "
        "digits, photographs of scikit-image for other models)",
    )
    analyze.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("outputs/vit_report"), help="output folder (%(default)s)"
    )
    analyze.add_argument(
        "--max-images", metavar="N", type=positive, default=64, help="maximum number of images (%(default)s)"
    )
    analyze.add_argument(
        "--batch-size", metavar="N", type=positive, default=4, help="batch size: images per forward pass (%(default)s)"
    )
    analyze.add_argument(
        "--partial-heads",
        metavar="N",
        type=int,
        default=3,
        help="number of the most important heads to analyse in detail (%(default)s)",
    )
    analyze.add_argument(
        "--no-keep-one",
        action="store_true",
        help="skip the runs that keep a single head of a layer, which take half of the time",
    )
    analyze.add_argument(
        "--device", metavar="NAME", default="cpu", help="device to run on, such as cuda (%(default)s)"
    )
    analyze.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..analysis.vit import analyze_vit
    from ..analysis.vit.loading import load_vit, read_images, sample_images
    from ..analysis.vit.results import empty_folder

    if options.model == DEFAULT_MODEL and not Path(DEFAULT_MODEL).exists():
        raise CommandError(
            f"There is no model in {DEFAULT_MODEL}. Name another model, or train the default one: {TRAIN_DEFAULT}"
        )
    # Before the work, not after it.
    empty_folder(options.output)
    try:
        model, processor = load_vit(options.model)
        names = getattr(getattr(model, "config", None), "id2label", None) or {}
        has_classes = "ForImageClassification" in type(model).__name__
        class_names = [str(names[index]) for index in sorted(names)] if has_classes else []
        if options.images is None:
            images, labels = sample_images(class_names, options.max_images)
        else:
            images, labels = read_images(options.images, options.max_images, class_names)
        analysis = analyze_vit(
            model.to(options.device),
            images,
            labels,
            processor=processor,
            batch_size=options.batch_size,
            keep_one=not options.no_keep_one,
            partial_heads=options.partial_heads,
            progress=True,
        )
        page = analysis.report(options.output)
    except ImportError as error:
        raise CommandError(f"{error}. The analysis needs: pip install 'hf_attn[analysis,vision]'") from error
    print(analysis)
    table = analysis.tables()["importance"].nlargest(5, analysis.ranking_metric)
    print(table[["layer", "head", *analysis.metrics[:3]]].to_string(index=False))
    print(f"Open {page} in a browser.")
