"""A build by many machines, as pipelines of datatrove: its executors (local, Slurm, Ray) run the tasks, each a part.

Three pipelines, one after the other, over directories that all machines see; then `andromeda data build` with the same
spec, corpus and directory, which joins the parts, packs and mixes. It gives, byte for byte, what it gives alone:

    begin("spec.yaml", "corpus", "build")
    SlurmPipelineExecutor([Read("spec.yaml", "corpus", "build")], tasks=500, ...)       parts of the texts, cleaned
    SlurmPipelineExecutor([Compare("spec.yaml", "corpus", "build")], tasks=1, ...)      duplicates, the vocabulary
    SlurmPipelineExecutor([Tokenise("spec.yaml", "corpus", "build")], tasks=500, ...)   parts of the tokens
    andromeda data build spec.yaml build --corpus corpus

Nothing flows from step to step within a task, since what follows one needs the whole of it.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from andromeda.data.build import TEXT_PARTS, TOKEN_PARTS, WORK, alone, compare, compared
from andromeda.data.build import begin as begin_build
from andromeda.data.encode import Work as Lines
from andromeda.data.encode import encoded_part
from andromeda.data.part import Part
from andromeda.data.parts import Done, write_tokens
from andromeda.data.sift import Sift, sift
from andromeda.data.sift import Work as Items
from andromeda.data.spec import Spec, read_spec
from andromeda.data.texts import Batch
from andromeda.data.workers import Workers
from andromeda.errors import AndromedaError

try:
    from datatrove.data import DocumentsPipeline
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise AndromedaError("pipelines of datatrove need a package; pip install 'andromeda-lm[datatrove]'") from error


def begin(spec: str, corpus: str, out: str) -> None:
    """Makes `out` the directory of this build: before the first pipeline, on one machine, which reads all files once.

    Raises:
        AndromedaError: a source cannot be read, or `out` holds something else.
    """
    begin_build(read_spec(spec), Path(corpus), Path(out), 1, _in_silence)


class _Step(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """
    Args:
        spec, corpus, out: as of `andromeda data build`.
    """

    type = "ANDROMEDA"

    def __init__(self, spec: str, corpus: str, out: str) -> None:
        super().__init__()
        self._spec_path, self._corpus, self._out = spec, corpus, out

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """
        Raises:
            AndromedaError: what `andromeda data build` would say.
        """
        if data is not None:
            raise AndromedaError(f"{self.name}: must be the first step of its pipeline; drop what stands before it")
        spec, out = read_spec(self._spec_path), Path(self._out)
        if not (out / "build.key").is_file():
            raise AndromedaError(f"{out}: is no build that was begun; call andromeda.data.datatrove_steps.begin before")
        with self.track_time("task"):
            self.part(spec, Path(self._corpus), out, Part(rank, world_size))
        return data

    @abstractmethod
    def part(self, spec: Spec, corpus: Path, out: Path, part: Part, /) -> None:
        """What a task does."""

    def counted(self, _: str, documents: int, num_bytes: int) -> None:
        self.stat_update("documents", value=documents, unit="batch")
        self.stat_update("bytes", value=num_bytes, unit="batch")


class Read(_Step):
    """Records to cleaned documents without evaluation texts, and their signatures."""

    name = "Read"

    def part(self, spec: Spec, corpus: Path, out: Path, part: Part, /) -> None:
        evaluations = spec.decontaminate.read(corpus) if spec.decontaminate else None
        function = Sift({source.name: source for source in spec.sources}, evaluations, spec.near)
        with Workers[Items, Batch](function, 1) as workers:
            for source in spec.sources:
                folder = out / TEXT_PARTS / source.name / part.name
                sift(source, corpus, folder, workers, self.counted, part=part)


class Compare(_Step):
    """Duplicates among all documents, and the vocabulary: one task."""

    name = "Compare"

    def part(self, spec: Spec, corpus: Path, out: Path, part: Part, /) -> None:
        if part.count > 1:
            raise AndromedaError("Compare: compares all with all, so it is one task; give the executor tasks=1")
        job = begin_build(spec, corpus, out, 1, self.counted)
        with alone(out):
            compare(job)


class Tokenise(_Step):
    """Documents that stay to their ids."""

    name = "Tokenise"

    def part(self, spec: Spec, _: Path, out: Path, part: Part, /) -> None:
        if not ((out / WORK / "texts").is_dir() and (out / "tokenizer").is_dir()):
            raise AndromedaError(f"{out}: holds no texts to tokenise; run the pipelines of Read and Compare before")
        found = compared(spec, out)
        with Workers[Lines, Done](found.encode, 1) as workers:
            for source in spec.sources:
                folder = out / TOKEN_PARTS / source.name / part.name
                if not folder.is_dir():
                    texts = found.texts[source.name]
                    write_tokens(encoded_part(source, texts, found.across, part, workers), folder)


def _in_silence(*_: object) -> None:
    """Nobody watches."""
