"""Lists the papers that a model card cites: the method and the base model."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A paper on arXiv; `authors` in BibTeX's form."""

    key: str
    title: str
    authors: str
    arxiv: str

    @property
    def year(self) -> int:
        """The year in the arXiv number."""
        return 2000 + int(self.arxiv[:2])

    @property
    def bibtex(self) -> str:
        return (
            f"@misc{{{self.key},\n"
            f"  title         = {{{self.title}}},\n"
            f"  author        = {{{self.authors}}},\n"
            f"  year          = {{{self.year}}},\n"
            f"  eprint        = {{{self.arxiv}}},\n"
            f"  archivePrefix = {{arXiv}},\n"
            f"  url           = {{https://arxiv.org/abs/{self.arxiv}}}\n"
            f"}}"
        )


VIDEO_MLA = Paper(
    "yesiltepe2026videomla",
    "{VideoMLA}: Low-Rank Latent {KV} Cache for Minute-Scale Autoregressive Video Diffusion",
    "Yesiltepe, Hidir and Hu, Jiazhen and Meral, Tuna Han Salih and Akan, Adil Kaan and Oktay, Kaan and "
    "Eldardiry, Hoda and Yanardag, Pinar",
    "2605.30351",
)
# By family; for other families, the card refers to the source's card.
BASE_MODELS = {
    "wan": Paper(
        "wan2025",
        "Wan: Open and Advanced Large-Scale Video Generative Models",
        "{Team Wan}",
        "2503.20314",
    ),
    "anyflow_far": Paper(
        "gu2026anyflow",
        "{AnyFlow}: Any-Step Video Diffusion Model with On-Policy Flow Map Distillation",
        "Gu, Yuchao and Fang, Guian and Jiang, Yuxin and Mao, Weijia and Han, Song and Cai, Han and Shou, Mike Zheng",
        "2605.13724",
    ),
    "skyreels_v2": Paper(
        "chen2025skyreelsv2",
        "{SkyReels-V2}: Infinite-length Film Generative Model",
        "Chen, Guibin and Lin, Dixuan and others",
        "2504.13074",
    ),
}
