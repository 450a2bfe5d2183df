"""Candidates for a bundle's graph: one converted model, quantized to several formats, each compared with its source."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from export import cuda_graph, graph, quality
from export.quality import Continuation, TeacherForcing
from export.quantize import Precision, WeightFormat, quantize
from export.quiet import quiet_tools
from protocol.bundle import MODEL_NAME, QUALITY_UPLINK_K, Candidate, QualityFigures


@dataclass(frozen=True)
class Built:
    """A candidate's graph in a folder of its own, and how it compares with the source model."""

    weights: WeightFormat
    graph_path: Path
    cache: graph.Cache
    figures: QualityFigures

    @property
    def size(self) -> int:
        """Bytes of the graph and its weights."""
        return sum(path.stat().st_size for path in self.graph_path.parent.iterdir())

    def forcing(self) -> TeacherForcing:
        """The loaded graph."""
        return TeacherForcing(self.graph_path, self.cache)

    def check(self) -> None:
        """Compare the figures with the limits of the precision.

        Raises:
            QualityError: a figure is below its limit, or NaN.
        """
        quality.check(self.figures, quality.LIMITS[self.weights.precision])


class CandidateBuilder:
    """Builds candidates of one converted model.

    Args:
        converted: the graph before quantization.
        folder: for the candidates; need not exist.
        text: continuations by the source model.
        console: for progress.
    """

    def __init__(self, converted: Path, folder: Path, text: Sequence[Continuation], console: Console) -> None:
        self._converted = converted
        self._folder = folder
        self._text = text
        self._console = console

    def build(self, weights: WeightFormat) -> Built:
        """Quantize to a format, and measure its quality; the table is printed.

        Raises:
            ModelError: the graph is for a GPU and has nodes that run on the CPU.
        """
        folder = self._folder / weights.name
        folder.mkdir(parents=True)
        with self._console.status(f"quantizing the weights to {weights.name}"):
            model = _quantized(self._converted, weights)
            cache = graph.Cache.of(model)
            graph.save(model, folder / MODEL_NAME)
        if weights.precision is Precision.FP16:
            self._console.print(cuda_graph.node_table(model))
            cuda_graph.check_kernels(model)
        forcing = TeacherForcing(folder / MODEL_NAME, cache)
        steps = sum(len(one.token_ids) for one in self._text)
        with progress_bar(self._console) as progress:
            task = progress.add_task(f"checking quality of {weights.name}", total=steps)
            figures = quality.measure(forcing, self._text, lambda: progress.advance(task))
        self._console.print(_quality_table(figures, weights))
        return Built(weights, folder / MODEL_NAME, cache, figures)


def progress_bar(console: Console) -> Progress:
    """A progress bar that disappears; none where the console is no terminal."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def candidate_table(candidates: Sequence[Candidate]) -> Table:
    """The comparison of ``--precision auto``."""
    table = Table("weights", "MB", "agreement", "accepted, T = 0", "T = 1", "ms a token", "tokens/s", "")
    for one in candidates:
        table.add_row(
            Text(one.weights),
            f"{one.size / 1e6:.0f}",
            f"{one.argmax_agreement:.3f}",
            f"{one.greedy_acceptance:.3f}",
            f"{one.coupled_acceptance:.3f}",
            f"{one.draft_milliseconds:.1f}",
            f"{one.tokens_per_second:.1f}",
            Text(one.reason or "kept"),
        )
    return table


def _quantized(converted: Path, weights: WeightFormat) -> ModelProto:
    model = graph.load(converted)
    graph.cast_logits(model)
    graph.keep_last_position(model)
    with quiet_tools():
        return quantize(model, weights)


def _quality_table(figures: QualityFigures, weights: WeightFormat) -> Table:
    limits = quality.LIMITS[weights.precision]
    table = Table(f"{weights.name} against the source model", "measured", "minimum")
    for label, name in (("argmax agreement", "argmax_agreement"), ("overlap at temperature 1", "overlap")):
        table.add_row(label, f"{getattr(figures, name):.3f}", f"{getattr(limits, name):.2f}")
    table.add_row(f"acceptance in mode topk, K = {QUALITY_UPLINK_K}", f"{figures.topk_acceptance:.3f}", "")
    table.add_row("acceptance in mode coupled", f"{figures.coupled_acceptance:.3f}", "")
    return table
