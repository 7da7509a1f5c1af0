"""Strings -> features: the same ids as open_clip, and nothing that depends on padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, _clean_canonicalize, _clean_lower, _clean_whitespace
from torch import Tensor

from pmgaft.clip import text as text_module
from pmgaft.clip.ensembles import ensembles, named_templates
from pmgaft.clip.loading import Clip
from pmgaft.clip.open_clip_text import TextTower, convert_tokenizer
from pmgaft.clip.text import TextEncoder, Tokenizer, check_labels, clean_text, fill, label_features
from pmgaft.errors import LabelsError, ModelError

THEIRS = SimpleTokenizer(context_length=77)
OURS = convert_tokenizer(THEIRS, 77)
SHORT = convert_tokenizer(THEIRS, 16)

ODD_TEXTS = [
    "",
    " ",
    "a photo of a cat.",
    "A PHOTO of a Cat!!",
    "it's we're they've I'm you'll he'd SHE'S it'S don't 'tis",
    "  many\t\n  spaces  ",
    "1234567890 3.14 1,000 ½ ² ④ 三",
    "naïve café Ångström ÅNGSTRÖM İstanbul ΣΊΣΥΦΟΣ ſharp straße STRASSE",
    "猫の写真 고양이 кошка قطة חתול แมว बिल्ली",
    "🐈 👩‍👩‍👧‍👦 🇩🇪 ☃️ 👍🏽",
    "&lt;b&gt; &amp;amp; &eacute; &#39;s &#x1F600; AT&T R&D",
    "&amp;amp;amp; <b> &amp;amp;lt;i&amp;gt;",
    "donâ€™t â€œquoteâ€\x9d schÃ¶n",
    "“curly” ‘quotes’ — dashes… ﬁ ligature",
    "zero\u200bwidth non\u00a0breaking soft\u00adhyphen \ufeffbom \u2028line",
    "e\u0301 combining \u0301\u0302 alone",
    "control \x00\x07\x1b[31m\x1c\x85 characters",
    "under_score hyphen-ated a/b c\\d #tag @you $5 50% ^_^ (x) [y] {z}",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 Ｆｕｌｌｗｉｄｔｈ ⅣⅫ",
    "\ud83d broken surrogate".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_get_the_ids_that_open_clip_gives(text: str) -> None:
    assert OURS.ids([text])[0] == [THEIRS.sot_token_id, *THEIRS.encode(text), THEIRS.eot_token_id]


# Characters known to Unicode 14: what came later, the two regular expression engines may class differently.
@given(st.text(st.characters(exclude_categories=["Cn", "Cs", "Co"]), max_size=25))
@settings(max_examples=200, deadline=None)
def test_any_text_gets_the_ids_that_open_clip_gives(text: str) -> None:
    expected = [THEIRS.sot_token_id, *THEIRS.encode(text), THEIRS.eot_token_id]
    if len(expected) <= 77:
        assert OURS.ids([text])[0] == expected


@given(st.text(alphabet=[chr(code) for code in range(32, 127)], max_size=60))
@settings(max_examples=200, deadline=None)
def test_plain_text_may_skip_the_costly_part_of_cleaning(text: str) -> None:
    assert clean_text(text) == _clean_lower(text)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_cleaning_is_open_clips(text: str) -> None:
    assert clean_text(text, "lower") == _clean_lower(text)
    assert clean_text(text, "whitespace") == _clean_whitespace(text)
    assert clean_text(text, "canonicalize") == _clean_canonicalize(text)


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
@pytest.mark.parametrize("text", ["IT'S we'RE a Cat", "under_score, x-y."])
def test_a_tokenizer_that_keeps_case_or_drops_punctuation_is_converted_too(clean: str, text: str) -> None:
    theirs = SimpleTokenizer(clean=clean)
    ours = convert_tokenizer(theirs, 77)
    assert ours.ids([text])[0][1:-1] == theirs.encode(text)


def test_ids_are_padded_with_zeros_as_in_open_clip() -> None:
    texts = ["cat", "a photo of a very small cat"]
    ours = OURS(texts)
    assert ours.dtype == torch.int64
    assert ours.shape[1] == len(THEIRS.encode(texts[1])) + 2
    assert torch.equal(torch.nn.functional.pad(ours, (0, 77 - ours.shape[1])), THEIRS(texts))


@pytest.mark.parametrize("text", ["<end_of_text> cat", "<start_of_text>", "a<END_OF_TEXT>b"])
def test_the_name_of_a_special_token_is_ordinary_text(text: str) -> None:
    row = OURS.ids([text])[0]
    assert row.count(THEIRS.sot_token_id) == row.count(THEIRS.eot_token_id) == 1


def test_a_text_that_is_too_long_is_refused_not_cut() -> None:
    tokenizer = convert_tokenizer(THEIRS, 6)
    assert len(tokenizer.ids(["one two three four"])[0]) == 6
    with pytest.raises(LabelsError, match="has 7 tokens; the model reads at most 6") as caught:
        tokenizer(["one", "one two three four five"])
    assert caught.value.code == "label_too_long"


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path: Path) -> None:
    OURS.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json", 77)
    short = ODD_TEXTS[2:12]
    assert again.ids(short) == OURS.ids(short)
    assert (again.pad_id, again.cleaning) == (OURS.pad_id, "lower")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"pmgaft": {"cleaning": "lower"}}', "\udcff"])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json", 77)


def test_a_tokenizer_with_an_unknown_cleaning_is_refused(tmp_path: Path) -> None:
    OURS.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pmgaft"]["cleaning"] = "scrub"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="scrub"):
        Tokenizer.load(tmp_path / "tokenizer.json", 77)


def test_a_hugging_face_tokenizer_keeps_its_padding_and_its_case(tmp_path: Path) -> None:
    vocabulary = {"[PAD]": 5, "[UNK]": 1, "Cat": 2, "cat": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend, 4, "whitespace", pad_id=5)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json", 4)
    assert again(["Cat", "cat  dog"]).tolist() == [[2, 5], [3, 1]]


def test_unknown_kinds_of_tokenizers_are_refused() -> None:
    with pytest.raises(ModelError, match="not supported"):
        convert_tokenizer(SimpleTokenizer(reduction_mask="simple"), 77)


# --- towers


def built(**text_cfg: Any) -> Any:
    """An open_clip model with the given text tower; custom_text puts it into a module of its own."""
    custom = text_cfg.pop("custom_text", False)
    torch.manual_seed(0)
    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 2, "vocab_size": 49408, **text_cfg}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return kind(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()


TOWERS: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "CustomTextCLIP": {"custom_text": True},
    "eos": {"custom_text": True, "pool_type": "eos", "eos_id": 49407},
    "projection with bias": {"custom_text": True, "proj_bias": True},
    "no projection": {"custom_text": True, "proj_type": "none", "width": 8},
    "no causal mask": {"no_causal_mask": True},
    "last token": {"custom_text": True, "pool_type": "last"},
    "class token": {"custom_text": True, "embed_cls": True},
}
TEXTS = ["cat", "a photo of a cat.", "an ugly photo of two cats"]


@pytest.mark.parametrize("tower", list(TOWERS), ids=str)
def test_features_are_open_clips_at_full_length(tower: str) -> None:
    model = built(**TOWERS[tower])
    tokens = THEIRS(TEXTS, context_length=16)
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
        features = TextTower(model)(tokens)
    assert torch.allclose(features, expected, atol=1e-6)
    assert torch.allclose(features.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("tower", list(TOWERS), ids=str)
def test_texts_get_open_clips_features_whatever_the_length_they_are_run_at(tower: str) -> None:
    model = built(**TOWERS[tower])
    text_tower = TextTower(model)
    encoder = TextEncoder(SHORT, text_tower, text_tower.causal)
    with torch.no_grad():
        expected = model.encode_text(THEIRS(TEXTS, context_length=16), normalize=True)
    assert torch.allclose(encoder.encode(TEXTS), expected, atol=1e-6)
    assert torch.allclose(encoder.encode(TEXTS, batch_size=1), expected, atol=1e-6)


def test_only_towers_that_do_not_see_the_padding_are_cropped() -> None:
    causal = {name for name, options in TOWERS.items() if TextTower(built(**options)).causal}
    assert causal == {"CLIP", "CustomTextCLIP", "eos", "projection with bias", "no projection"}


def test_the_text_tower_shares_the_models_weights_and_nothing_of_its_image_tower(tiny_clip: Clip) -> None:
    held = {parameter.data_ptr() for parameter in tiny_clip.text_tower.parameters()}
    assert held <= {parameter.data_ptr() for parameter in tiny_clip.open_clip_model.parameters()}
    assert held.isdisjoint(parameter.data_ptr() for parameter in tiny_clip.image.parameters())


def test_the_order_of_texts_is_kept_and_batches_hold_like_lengths() -> None:
    seen: list[tuple[int, int]] = []

    def tower(tokens: Tensor) -> Tensor:
        seen.append((tokens.shape[0], tokens.shape[1]))
        return tokens[:, 1:2].float()

    texts = ["one two three", "cat", "one two", "dog", "a b c d e"]
    features = TextEncoder(OURS, tower, causal=True).encode(texts, batch_size=2)
    assert features[:, 0].tolist() == [row[1] for row in OURS.ids(texts)]
    assert seen == [(2, 3), (2, 5), (1, 7)]


def test_there_must_be_a_text() -> None:
    with pytest.raises(LabelsError) as caught:
        TextEncoder(OURS, lambda tokens: tokens, causal=True).encode([])
    assert caught.value.code == "labels_empty"


# --- templates and labels


@pytest.mark.parametrize(
    ("template", "text"), [("a {}.", "a cat."), ("{}", "cat"), ("{} {{}}".replace("{{}}", "x"), "cat x")]
)
def test_a_template_is_filled(template: str, text: str) -> None:
    assert fill(template, "cat") == text


@pytest.mark.parametrize("label", ["{}", "{0.__class__}", "%s", "a}b{"])
def test_braces_in_a_label_are_plain_text(label: str) -> None:
    assert fill("a photo of {}.", label) == f"a photo of {label}."


@pytest.mark.parametrize(
    "template", ["", "a photo", "{} and {}", "{0}", "{name}", "{}{", "}{}", "{0.__class__}{}", "{{}}"]
)
def test_a_template_has_exactly_one_pair_of_braces(template: str) -> None:
    with pytest.raises(LabelsError) as caught:
        fill(template, "cat")
    assert (caught.value.code, caught.value.field) == ("template_invalid", "templates")


def test_a_labels_feature_is_the_unit_mean_over_its_templates() -> None:
    table = {"a cat": [1.0, 0.0], "the cat": [0.0, 1.0], "a dog": [0.6, 0.8], "the dog": [0.6, 0.8]}
    features = label_features(lambda texts: torch.tensor([table[t] for t in texts]), ["cat", "dog"], ["a {}", "the {}"])
    assert torch.allclose(features, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))


def test_the_ensembles_are_open_clips() -> None:
    assert list(named_templates("imagenet")) == [fill("{}") for fill in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert list(named_templates("simple")) == [fill("{}") for fill in open_clip.SIMPLE_IMAGENET_TEMPLATES]


def test_every_template_of_an_ensemble_can_be_filled() -> None:
    assert [len(templates) for templates in ensembles().values()] == [80, 7]
    assert all(fill(template, "cat") for templates in ensembles().values() for template in templates)


def test_an_unknown_ensemble_is_answered_with_those_there_are() -> None:
    with pytest.raises(LabelsError, match="no template ensemble 'imagnet'; there are imagenet, simple") as caught:
        named_templates("imagnet")
    assert (caught.value.code, caught.value.field) == ("template_invalid", "templates")


def test_at_least_one_template_is_needed(tiny_clip: Clip) -> None:
    with pytest.raises(LabelsError):
        label_features(tiny_clip.text.encode, ["cat"], [])


@pytest.mark.parametrize(
    ("labels", "code"),
    [
        (None, "labels_missing"),
        ("cat,dog", "labels_missing"),
        ({"cat": 1}, "labels_missing"),
        ([], "labels_empty"),
        (["cat", 3], "label_not_string"),
        (["cat", None], "label_not_string"),
        (["cat", ["dog"]], "label_not_string"),
        (["cat", ""], "label_empty"),
        (["cat", " \t\n"], "label_empty"),
        (["cat", "\u200b" * 0 + "\x00"], "label_empty"),
        (["cat", "dog", "cat"], "labels_duplicate"),
        (["cat", "  CAT "], "labels_duplicate"),
        (["AT&T", "AT&amp;T"], "labels_duplicate"),
        (["cat", "x" * 101], "label_too_long"),
        ([f"label {i}" for i in range(11)], "labels_too_many"),
    ],
)
def test_each_wrong_list_of_labels_has_its_own_code(labels: object, code: str) -> None:
    with pytest.raises(LabelsError) as caught:
        check_labels(labels, most=10, longest=100)
    assert (caught.value.code, caught.value.field) == (code, "labels")
    assert len(caught.value.message) < 150


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text("aA &;\u0130\t", max_size=5), min_size=1, max_size=4))
@example(["a a", "a  a"])
@example(["a", " a"])
@example(["a", "a "])
@example(["lt&lt", "lt<"])
@example(["e\u0301", "\u00e9"])
@example(["a", "A"])
@example(["a" * 6])
def test_a_long_lists_quick_look_lets_nothing_pass_that_the_slow_one_refuses(labels: list[str]) -> None:
    def outcome() -> str:
        try:
            check_labels(labels, most=10, longest=5)
        except LabelsError as error:
            return error.code
        return "ok"

    quick = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "_plainly_good", lambda labels, longest: False)
        assert outcome() == quick


def test_the_offending_label_is_named_with_its_position() -> None:
    with pytest.raises(LabelsError, match="labels 2 and 4 are the same, 'dog'"):
        check_labels(["cat", "dog", "toaster", "dog"], most=10, longest=100)


@pytest.mark.parametrize("labels", [["cat"], ("cat", "dog"), ["{}", "{0}"], ["猫", "🐈"]])
def test_a_good_list_passes(labels: object) -> None:
    check_labels(labels, most=10, longest=100)
