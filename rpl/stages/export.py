"""Stage `export`: the hand-over files of the novel pass. What they hold is in `rpl.export`."""

from __future__ import annotations

from rpl import __version__, export
from rpl.categories import categories_from_json
from rpl.stage import Context

COPIED = (
    ("embeddings", "category_embeddings.pt"),
    ("embeddings", "category_embeddings.npy"),
    ("embeddings", "prompts.safetensors"),
    ("embeddings", "model.pth.tar"),
    ("sourced", "sourced.parquet"),
)


def run(ctx: Context) -> None:
    categories_file = ctx.local(ctx.inputs["crops"][0], "categories.json")
    categories = categories_from_json(categories_file.read_bytes())
    pictures = export.kept_pictures(ctx.input_file("sourced", "sourced.parquet"))
    keys = {picture.key for picture in pictures}
    images = ctx.scratch / "images.tar"
    sizes = export.collect_images(ctx.input_files("downloads", "images.tar"), keys, images)

    embedded = ctx.inputs["embeddings"][0].facts
    info = {
        "description": "Web pictures of novel categories, sourced by learned prompts; one whole-image box each.",
        "version": __version__,
        "encoder": embedded["encoder"],
        "prompts_digest": embedded["prompts_digest"],
    }
    for edge, name in COPIED:
        for path in ctx.input_files(edge, name):  # class-specific prompts have no model.pth.tar
            ctx.add(path, name)
    ctx.add(categories_file, "categories.json")
    ctx.add(images)
    ctx.write("sourced_novel.json", export.json_bytes(export.coco(categories, pictures, sizes, info)))
    reference = export.coco_reference(categories, pictures, sizes)
    ctx.write("sourced_novel_reference.json", export.json_bytes(reference))
    ctx.rows = len(pictures)
    ctx.facts = {
        "images": len(keys),
        "annotations": len(pictures),
        "categories": len({picture.category for picture in pictures}),
    }
