"""What `model.name` may be beside a folder and a hub name: a GGUF file, or a model that pip brings."""

from exgrpo_fast.build.pretrained.resolve import cached_folder, fetch_model, model_folder

__all__ = ["cached_folder", "fetch_model", "model_folder"]
