"""What other models need, from their published configurations: for the memory table of `andromeda info`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedModel:
    """The figures of a model that its memory follows from, and where they are published."""

    name: str
    parameters: int
    depth: int
    kv_heads: int
    dim_head: int
    context: int  # tokens it was made for
    claim: int  # how many times less memory Andromeda's specification promises
    source: str

    @property
    def weight_bytes(self) -> int:
        """In bfloat16."""
        return 2 * self.parameters

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Cache bytes one token occupies: a key and a value in every block."""
        return 2 * self.depth * self.kv_heads * self.dim_head * bytes_per_element


GPT3 = "Brown et al. 2020, 'Language Models are Few-Shot Learners', table 2.1"
LLAMA = "Touvron et al. 2023, 'LLaMA: Open and Efficient Foundation Language Models', table 2, and the released shapes"
LLAMA_3_2 = "config.json of meta-llama/Llama-3.2-3B"

# Keys and values: one a head in GPT-3 and LLaMA, one for three heads in Llama-3.2-3B. LLaMA's parameters are counted
# from the shapes: vocabulary 32,000, feed-forward 11,008, 13,824 and 22,016 wide, embedding and output not tied.
PUBLISHED = [
    PublishedModel("GPT-3 175B", 175_000_000_000, 96, 96, 128, 2048, 50, GPT3),
    PublishedModel("LLaMA-7B", 6_738_415_616, 32, 32, 128, 2048, 10, LLAMA),
    PublishedModel("LLaMA-13B", 13_015_864_320, 40, 40, 128, 2048, 10, LLAMA),
    PublishedModel("LLaMA-65B", 65_285_660_672, 80, 64, 128, 2048, 10, LLAMA),
    PublishedModel("Llama-3.2-3B", 3_212_749_824, 28, 8, 128, 131072, 10, LLAMA_3_2),
]
