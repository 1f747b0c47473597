"""image-text-to-text: continuations of texts about images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from monoblock.pipelines.base import PipelineInput, is_stream
from monoblock.pipelines.generating import GenerationPipeline, by_row, is_chat

INDICES, PATCHES = "image_patches_indices", "image_patches"


class ImageTextToTextPipeline(GenerationPipeline):
    """Continues texts about images, with the model's processor.

    Inputs: `images=` and `text=` (one of each, or lists of the same length), a text alone, or one or many of
    `{"images": ..., "text": ...}`; images are Pillow images, arrays or paths. Returns a list of
    `{"input_text", "generated_text"}` for each input; `generated_text` begins with the input text unless
    `return_full_text=False`. `return_tensors=True`: `generated_token_ids` instead. By default at most 256 new
    tokens; `generate_kwargs`, `max_new_tokens` and other options go to `generate`, `processor_kwargs` to the processor.
    """

    task = "image-text-to-text"
    settings: ClassVar[dict[str, Any]] = {
        "return_full_text": None,
        "return_tensors": None,
        "clean_up_tokenization_spaces": None,
        "stop_sequence": None,
        "skip_special_tokens": True,
        "generate_kwargs": None,
        "processor_kwargs": None,
    }
    generation_defaults: ClassVar[dict[str, Any]] = {"max_new_tokens": 256}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("'image-text-to-text' needs a processor: pass processor= with a model object")
        if PATCHES not in self.adapter.accepts:
            raise ValueError(f"{self.model.row.name} takes no images: use the task 'text-generation'")

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        """The continuations of these texts about images."""
        if text is None and (isinstance(images, str | Mapping) or is_stream(images)):
            return super().__call__(images, **options)
        if (
            text is None
            and isinstance(images, list | tuple)
            and all(isinstance(i, str | Mapping) for i in images)
        ):
            return super().__call__(list(images), **options)
        if text is None:
            raise ValueError("pass text= together with images=; an empty prompt is ''")
        if images is None:
            return super().__call__(text, **options)
        if isinstance(text, str):
            return super().__call__({"images": images, "text": text}, **options)
        if not isinstance(images, list | tuple) or len(images) != len(text):
            raise ValueError(f"there are {len(text)} texts: pass a list of as many images")
        pairs = [{"images": image, "text": one} for image, one in zip(images, text, strict=True)]
        return [record for records in super().__call__(pairs, **options) for record in records]

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        inner = options["generate_kwargs"] or {}
        if twice := [name for name in inner if name in options]:
            raise ValueError(f"{twice[0]} is given twice: as an argument and in generate_kwargs")
        if unknown := [name for name in inner if name not in self.more]:
            raise TypeError(f"generate_kwargs has {unknown[0]!r}, which generate does not take")
        if options["return_tensors"] is not None and options["return_full_text"] is not None:
            raise ValueError("return_full_text and return_tensors exclude each other: pass one")
        return super().checked(options | inner)

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        if is_chat(item):
            raise TypeError("'image-text-to-text' takes no conversations: its models have no chat template")
        if isinstance(item, Mapping):
            if item.keys() != {"images", "text"}:
                raise ValueError(
                    f"an input is {{'images': ..., 'text': ...}}; got the keys {', '.join(item)}"
                )
            images, text = item["images"], item["text"]
        else:
            images, text = None, item
        if not isinstance(text, str):
            raise TypeError(f"'image-text-to-text' takes strings; got {type(text).__name__}")
        if isinstance(images, list | tuple) and len(images) == 1:
            images = images[0]
        more = options["processor_kwargs"] or {}
        if images is None:
            encoded = self.processor(text=text, **more)
            return [PipelineInput(self.model_inputs(encoded), text)]
        encoded = self.processor(text=[text], images=[images], return_tensors="np", **more)
        inputs = {name: encoded[name][0].tolist() for name in ("input_ids", "attention_mask", INDICES)}
        return [PipelineInput({**inputs, PATCHES: encoded[PATCHES][0]}, text)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        patches = next((row[PATCHES] for row in rows if PATCHES in row), None)
        fills = {"input_ids": self.processor.pad_token_id, "attention_mask": 0}
        if patches is not None:
            fills[INDICES] = -1
            # A text without an image gets an empty array of patches, and no position refers to a patch.
            rows = [{INDICES: [-1] * len(row["input_ids"]), PATCHES: patches[:, :0], **row} for row in rows]
        rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        batch: dict[str, Any] = {
            name: [[fill] * (width - len(row[name])) + list(row[name]) for row in rows]
            for name, fill in fills.items()
        }
        return batch if patches is None else {**batch, PATCHES: [row[PATCHES] for row in rows]}

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        sequences = self.adapter.generate(batch, self.generation(options, len(batch["input_ids"][0]))[0])
        rows = len(batch["input_ids"])
        return {"sequences": by_row(sequences, rows), "prompt": batch["input_ids"]}

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        [row] = rows
        sequences = row.output["sequences"]
        if options["return_tensors"]:
            return [{"input_text": row.info, "generated_token_ids": ids} for ids in sequences]
        how = {
            "skip_special_tokens": options["skip_special_tokens"],
            "clean_up_tokenization_spaces": options["clean_up_tokenization_spaces"],
        }
        read = self.processor.post_process_image_text_to_text
        [prompt, *texts] = read([row.output["prompt"], *sequences], **how)
        # Without an image the decoded sequence includes the prompt, perhaps after a space.
        new = [t[at + len(prompt) :] if 0 <= (at := t.find(prompt)) <= 2 else t for t in texts]
        whole = "" if options["return_full_text"] is False else row.info
        return [{"input_text": row.info, "generated_text": whole + text} for text in new]
