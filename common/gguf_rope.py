"""GGUF files with scaled position embeddings, which transformers loads without the scaling."""

from pathlib import Path

from protocol.errors import ModelError

_REMEDY = "name the model's folder or hub name instead"


def refuse_gguf_rope(path: Path) -> None:
    """Refuse a GGUF file with scaled position embeddings.

    Raises:
        ModelError: names the field or the tensor.
    """
    import gguf  # only for .gguf files

    reader = gguf.GGUFReader(path)
    for name, entry in reader.fields.items():
        if name.endswith(".rope.scaling.type") and (kind := entry.contents()) != "none":
            raise ModelError(f"{str(path)!r} has {name} {kind!r}, which is not read from GGUF; {_REMEDY}")
    for tensor in reader.tensors:
        if tensor.name.startswith(("rope_freqs", "rope_factors")):
            raise ModelError(f"{str(path)!r} has the tensor {tensor.name!r}, which is not read; {_REMEDY}")
