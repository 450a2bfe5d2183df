"""The target model: a transformers causal language model that runs packed batches.

Knows tokens and logits; not drafts.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from basestation.kv_cache.kv_pages import KVPages, KVShape
from basestation.kv_cache.kv_pool import KVPool, SequenceKVCache
from basestation.kv_cache.memory import OutOfMemory, catch_out_of_memory, kv_budget
from basestation.sizes import readable_size
from basestation.target.agreement import ANSWER_TOKENS, prompt_ids
from basestation.target.forward_pass import ForwardPass
from basestation.target.int8_conversion import give_int8_weights, uses_int8
from basestation.target.model_runner import ModelRunner
from basestation.target.packed_linear import pack_linears, packed_dtype
from basestation.target.placement import choose_dtype, choose_placement, describe_placement
from basestation.target.pretrained import read_config, read_model, tokenizer_json, weight_files
from basestation.target.quantized_weights import quantization_method
from basestation.target.ranks import PassRunner, Ranks
from basestation.target.segment import Segment
from basestation.target.tensor_parallel import Share, split
from basestation.target.vocabulary import Vocabulary
from basestation.target.weight_pages import release_weight_pages
from common.error_text import first_line
from common.grammar import GrammarCompiler
from common.grammar_matcher import is_available
from common.hub import model_name
from protocol.errors import SettingsError

logger = logging.getLogger(__name__)

_MIN_CONTEXT = 128
_CPU = torch.device("cpu")


class TargetModel:
    """A loaded target model.

    Attributes:
        name: the last part of its path or hub name.
        vocabulary: see ``Vocabulary``.
        context_length: the model's, or the KV pool's capacity if that is less.
        kv_pool: for the KV caches of its sessions.
        kv_bytes: memory of the pool.
        placement: where it runs and in which data type, by name.
        grammar_compiler: for its vocabulary; None without llguidance or the tokenizer's file.

    Args:
        model: a transformers model, on its PyTorch device.
        vocabulary: see ``Vocabulary``.
        name: see above.
        kv_memory: bytes for the KV pool.
        tokenizer_json: the tokenizer as a ``tokenizer.json``; "" if there is none.
        independent_rows: see ``batch_type``.
        cuda_graphs: capture forward passes where that is faster; takes one page of the pool.
        ranks: that have joined; the model and the KV pool are the share of one of them.

    Raises:
        SettingsError: ``kv_memory`` is not enough for one session, or more than there is.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        name: str,
        kv_memory: int,
        tokenizer_json: str = "",
        independent_rows: bool = False,
        cuda_graphs: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.name = name
        self.vocabulary = vocabulary
        self.torch_device = next(model.parameters()).device
        self.placement = describe_placement(self.torch_device, model.dtype)
        if ranks:
            self.placement["ranks"] = str(ranks.share.ranks)
        shape = kv_shape(model.config, model.dtype, self.torch_device, ranks.share.ranks if ranks else 1)
        kv_pages = _allocated(shape, kv_memory)
        self.kv_bytes = kv_pages.bytes
        runner = ModelRunner(model, vocabulary.size, kv_pages, independent_rows)
        longest = context_length(model.config, (kv_pages.count - 1) * shape.page_size)
        spare_pages = int(cuda_graphs and runner.use_graphs(longest))
        self.kv_pool = KVPool(kv_pages.count - spare_pages, shape.page_size, kv_pages.discard)
        self.context_length = context_length(model.config, self.kv_pool.capacity)
        self._runner: PassRunner = ranks.shared(runner) if ranks else runner
        self.grammar_compiler = (
            GrammarCompiler.of_tokenizer(tokenizer_json, vocabulary.size, vocabulary.stop_ids)
            if tokenizer_json and is_available()
            else None
        )

    @classmethod
    def load(
        cls,
        model: str,
        dtype: str = "auto",
        torch_device: str = "auto",
        kv_memory: str = "auto",
        use_cache: bool = True,
        weights: str = "dtype",
        cuda_graphs: bool = True,
        ranks: Ranks | None = None,
    ) -> "TargetModel":
        """Load a model folder, hub name or ``.gguf`` file.

        Args:
            model: the path or name.
            dtype: of ``DTYPES``, or ``auto``: bfloat16 for int8 weights, else see ``choose_dtype``.
            torch_device: a PyTorch device, or ``auto``: CUDA if available.
            kv_memory: for the KV pool, like ``4GiB``, or ``auto``: of what is then free half, on CUDA nine tenths.
            use_cache: whether a converted ``.gguf`` file and what int8 weights need are kept.
            weights: of the linear layers: ``dtype``, ``int8``, or ``auto``: the faster one.
            cuda_graphs: on CUDA, capture forward passes where that is faster.
            ranks: which join once the share of this one is loaded; None for a single process.

        Raises:
            SettingsError: dtype, device or weights do not exist here, the KV pool is too small, or heads do not divide.
            ModelError: it cannot be found or read, does not fit, or has an unsupported architecture.
        """
        placement, share = choose_placement(torch_device), ranks.share if ranks else Share()
        kv_budget(kv_memory, placement)  # refuse an invalid size before the slow part
        name, config = model_name(model), read_config(model, share.ranks)
        int8 = uses_int8(config, weights, dtype, placement, share.ranks)
        precision = choose_dtype(dtype, placement, int8)
        files = weight_files(model, precision, placement, share.ranks, int8, use_cache)
        loaded, tokenizer, vocabulary = read_model(model, files, precision, _CPU if ranks else placement, int8)
        if int8:
            name = _with_int8_weights(loaded, vocabulary, name, tokenizer, use_cache)
        elif quantization_method(loaded.config) is None:
            place_share(loaded, share, placement)
        kv_bytes, graphs = _kv_bytes(kv_memory, placement, ranks), cuda_graphs and not ranks
        return cls(loaded, vocabulary, name, kv_bytes, tokenizer_json(model, tokenizer), int8, graphs, ranks)

    def new_kv_cache(self) -> SequenceKVCache:
        """An empty KV cache for one session."""
        return SequenceKVCache(self.kv_pool)

    @property
    def gathered(self) -> int:
        """Sequences so far whose pages a pass had to copy into one run."""
        return self._runner.gathered

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run all segments in one forward pass and append their tokens to their KV caches.

        Returns:
            The logits [rows, V], float32, of the last ``num_logits`` tokens of each segment, in order.

        Raises:
            OutOfMemory: the KV pool has too few free pages.
        """
        for segment in segments:
            segment.kv_cache.reserve(segment.kv_cache.length + len(segment.token_ids))
        logits = self._runner.run(ForwardPass.of(segments))
        for segment in segments:
            start = segment.kv_cache.length
            segment.kv_cache.length += len(segment.token_ids)
            if self._runner.window is not None:  # a rollback of this pass goes back to its start at most
                segment.kv_cache.give_back_unseen(start, self._runner.window)
        return logits


def place_share(model: Any, share: Share, placement: torch.device) -> None:
    """Keep a rank's share of a loaded model's weights, where it runs."""
    if share.ranks > 1:
        split(model, share)
    model.to(placement)
    if placement.type == "cpu":
        pack_linears(model)
        release_weight_pages(model)


def _kv_bytes(kv_memory: str, placement: torch.device, ranks: Ranks | None) -> int:
    """Bytes for the KV pool, now that the weights are loaded: with ranks, what each has once all have joined."""
    kv_bytes = kv_budget(kv_memory, placement)
    return ranks.join(placement, kv_bytes) if ranks else kv_bytes


def _with_int8_weights(model: Any, vocabulary: Vocabulary, name: str, tokenizer: Any, use_cache: bool) -> str:
    """Give a loaded model int8 weights, and log how far it then agrees with the original.

    Returns:
        The new name.
    """
    prompts = prompt_ids(tokenizer)
    shape = kv_shape(model.config, packed_dtype(model.dtype), torch.device("cpu"))
    pages = sum(-(-(len(prompt) + ANSWER_TOKENS) // shape.page_size) for prompt in prompts)

    def runner(independent_rows: bool) -> TargetModel:
        return TargetModel(model, vocabulary, name, pages * shape.page_bytes, independent_rows=independent_rows)

    agreement = give_int8_weights(model, runner, prompts, use_cache)
    logger.info("%s-int8 against its original: %s", name, agreement)
    return f"{name}-int8"


def kv_shape(config: Any, dtype: torch.dtype, torch_device: torch.device, ranks: int = 1) -> KVShape:
    """The shape of a model's keys and values, at each of several ranks."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    return KVShape(
        layers=config.num_hidden_layers,
        kv_heads=(getattr(config, "num_key_value_heads", None) or heads) // ranks,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
        torch_device=torch_device,
    )


def page_count(shape: KVShape, kv_memory: int) -> int:
    """Pages of the KV pool that fit into ``kv_memory`` bytes.

    Raises:
        SettingsError: that is not enough for one session.
    """
    least = -(-_MIN_CONTEXT // shape.page_size)
    if kv_memory < least * shape.page_bytes:
        needed = f"{readable_size(least * shape.page_bytes)} or more, for {least * shape.page_size} tokens"
        raise SettingsError("kv-memory", readable_size(kv_memory), needed)
    return kv_memory // shape.page_bytes


def context_length(config: Any, capacity: int) -> int:
    """The model's context length, or the KV pool's capacity if that is less."""
    return min(int(config.get_text_config().max_position_embeddings), capacity)


def _allocated(shape: KVShape, kv_memory: int) -> KVPages:
    """The pages of the KV pool.

    Raises:
        SettingsError: ``kv_memory`` is not enough for one session, or more than there is.
    """
    count = page_count(shape, kv_memory)
    try:
        with catch_out_of_memory():
            return KVPages(shape, count)
    except OutOfMemory as error:
        reason = first_line(error)
        allowed = f"what is free on {shape.torch_device} ({reason})"
        raise SettingsError("kv-memory", readable_size(kv_memory), allowed) from error
