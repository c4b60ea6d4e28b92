"""Captions as PixArt-alpha cleaned them."""
import warnings

import pytest
from conftest import needed
from pixstack.models_impl.text import captions

CAPTIONS = {  # raw: as the release's T5Embedder.text_preprocessing gives it
    "A small Cactus with a happy face in the Sahara desert.": "a small cactus with a happy face in the sahara desert.",
    "   An ASTRONAUT riding a horse\t\n on the Moon  ": "an astronaut riding a horse on the moon",
    "": "",
    "   ": "",
    "a cat, a dog and a bird": "a cat, a dog and a bird",
    "a red apple; a green pear": "a red apple; a green pear",
    "see https://example.com/gallery/1?x=2 for more": "see ?x=2 for more",
    "buy at http://shop.example.org now": "buy at now",
    "www.example.com a blue car": "a blue car",
    "photo by flickr.com/photos/someone": "photo by",
    "a page on example.io about foxes": "a page on example. io about foxes",
    "www:////stuff a lamp": "stuff a lamp",
    "write to jane.doe@mail.net about the boat": "write to jane. doe about the boat",
    "portrait of <person> in a garden": "portrait of person in a garden",
    "<p>A <b>bold</b> move &mdash; really</p>": "a bold move - really",
    "<a href='https://example.com'>a link</a> to a house": "a link to a house",
    "line one<br/>line two": "line oneline two",
    "1 < 2 and 3 > 2": "1 < 2 and 3 > 2",
    "photo by @some_one of a lake": "photo by of a lake",
    "salt &amp; pepper": "salt pepper",
    "&quot;a sign&quot; on a wall": '"a sign" on a wall',
    "&amp;amp; twice": "twice",
    "caf&eacute; terrace at night": "café terrace at night",
    "%22quoted%22 and%20spaced": '"quoted" and spaced',
    "100%25 cotton": "100% cotton",
    "black+white cat": "black white cat",
    "山水画 a mountain": "a mountain",
    "さくら and サクラ and 벚꽃": "さくら and サクラ and 벚꽃",
    "㈱ company ㎏": "company",
    "a tall — very tall – tower ‒ here": "a tall - very tall - tower - here",
    "wave\u3030dash \u30fc and \uff0d full width": "wave-dash \u30fc and - full width",
    "‘single’ and “double” and «guillemets» `tick´": 'single\' and "double" and "guillemets" "tick',
    '""""SALE"""" today': '"sale" today',
    "'a quoted caption'": "a quoted caption",
    "the cat's whiskers": "the cat's whiskers",
    "server 192.168.0.1 in a rack": "server in a rack",
    "item 3:45   ": "item 3:45",
    "first\\nsecond": "first second",
    "poster #12 and #1234 and #123456": "poster and 1234 and",
    "order 1234567 and year 1984": "order and year 1984",
    "a house, IMG_2034.JPG": "a house",
    "path/to/my_picture.png of a dog": "of a dog",
    "wait... what.. is this": "wait what is this",
    "***AUSVERKAUFT*** #everything [50] {now} (here) a|b a\\b a/b": "ausverkauft everything 50 now here a b a b a b",
    "®brand™ ©2020 ~approx~ ½ cup ¿que? ¡si! 20º §4 • point · dot": "brand 2020 approx cup que? si! 20 4 point dot",
    "stop . go": "stop go",
    "this-is-my-cute-cat-picture": "this is my cute cat picture",
    "this_is_my_cute_cat_picture": "this is my cute cat picture",
    "a well-known state-of-the-art robot": "a well known state of the art robot",
    "model jc6640 chair": "model chair",
    "chair jc6640vc oak": "chair oak",
    "chair 6640vc231 oak": "chair oak",
    "code j2d1a2a here": "code here",
    "a 3D render of r2d2": "a 3d render of",
    "8k photo of a b52 bomber": "8k photo of a b52 bomber",
    "worldwide free shipping on lamps": "on lamps",
    "free shipping mug": "mug",
    "free download free icons": "icons",
    "download a vector": "a vector",
    "click for details, click on image": "",
    "png images of trees, jpg image, eps": "of trees,",
    "see page 12 of the book": "see of the book",
    "wallpaper 1920x1080 of hills": "wallpaper of hills",
    "print 30×40 cm, 2.5x3.5 in, 10х20": "print cm, 2 5 in",
    "title : subtitle": "title: subtitle",
    "one,two.three/four": "one, two. three four",
    "pi is 3.14,really": "pi is 3.14,really",
    "-leading dash and trailing dash-": "leading dash and trailing dash",
    "_under_": "under",
    ": colon first, comma last,": "colon first, comma last",
    ".hidden": "",
    "😀 a smiling face 🎉": "😀 a smiling face 🎉",
    "schÃ¶n und gut": "schã¶n und gut",
    "doesnâ€™t matter": "doesn†t matter",
    "ﬁne ﬂowers": "fine flowers",
    "ＦＵＬＬ width": "full width",
    "zero\u200bwidth and nbsp\xa0space": "zero\u200bwidth and nbsp space",
    "İstanbul at dusk": "i\u0307stanbul at dusk",
    "Москва зимой": "москва зимой",
    "a cat --ar 3:4": "a cat -ar 3:4",
    "(masterpiece:1.3), best quality": "masterpiece:1.3 , best quality",
    "C++ and C# books": "c and c books",
    "$5 & up @ 10%": "$5 up 10%",
    'a sign that says "Hello, World!"': 'a sign that says "hello, world!"',
    "<lora:style:0.8> a castle": "a castle",
    "; (a cat) --- in a box": "a cat - in a box",
    "'`-a lamp": '"-a lamp',
}


@pytest.fixture
def packages():
    needed("all" if not captions.cleaning_needs() else None, "ftfy or beautifulsoup4 is not installed")


def test_captions_come_out_as_the_release_cleans_them(packages):
    assert {raw: captions.clean_caption(raw) for raw in CAPTIONS} == CAPTIONS


def test_captions_come_out_as_diffusers_cleans_them(packages):
    module = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha")
    pipeline = module.PixArtAlphaPipeline

    def cleaned(text):
        return pipeline._clean_caption(pipeline, text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BeautifulSoup's, of texts that look like addresses
        theirs = {raw: cleaned(cleaned(raw)) for raw in CAPTIONS}
    assert {raw: captions.clean_caption(raw) for raw in CAPTIONS} == theirs


def test_what_a_bracket_hid_is_trimmed_as_in_the_release(packages):
    """Where diffusers differs: it left out the strip between the two halves, and keeps the colon."""
    assert captions.clean_caption("(;:a cat") == "a cat"


def test_a_caption_that_looks_like_a_file_raises_no_warning(packages):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert captions.clean_caption("a/b.html") == "a b. html"


@pytest.mark.parametrize("module, package", [("ftfy", "ftfy"), ("BeautifulSoup", "beautifulsoup4")])
def test_a_missing_package_is_named(monkeypatch, module, package):
    monkeypatch.setattr(captions, module, None)
    assert package in captions.cleaning_needs()


@pytest.mark.parametrize("module", ["ftfy", "BeautifulSoup"])
def test_without_a_package_no_rule_is_applied_at_all(monkeypatch, module):
    monkeypatch.setattr(captions, module, None)
    assert captions.clean_caption("  A (red) CAT, free shipping &amp; more ") == "a (red) cat, free shipping &amp; more"


# --- Long texts

SENTENCE = "a photograph of a red house, by the sea "
LONG = {
    "words": SENTENCE * 1000,
    "in quotes": f'"{SENTENCE * 1000}"',
    "file names first": "gallery/picture_one.png " * 600 + SENTENCE * 1000,
    "addresses first": "http://example.com/gallery/one " * 500 + SENTENCE * 1000,
    "markup": f"<p class='caption'>{SENTENCE * 20}</p>" * 50,
    "hyphens that come late": SENTENCE * 500 + "well-known state-of-the-art " * 20 + SENTENCE * 500,
    "hyphens at first only": "a well-known house, " + SENTENCE * 1000,
    "spaces first": " " * 40_000 + "a red  house" + " " * 40_000 + "by the sea",
    "no spaces": "ab" * 20_000,
    "dots": ".a" * 20_000,
    "dots, then a word": ".a" * 20_000 + " house",
    "kana": "さくら" * 10_000,
}
SEEN = 1500  # characters of 300 tokens of English


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_of_a_long_text_the_encoder_sees_what_it_would_see_of_the_whole(packages, text):
    whole = captions._cleaned(captions._cleaned(text))
    assert captions.clean_caption(text)[:SEEN] == whole[:SEEN]


BOMBS = ("a.", "a-", "a@", "<a ", "<", "</", "<!--", "<![", "&#", "x1", "'", "%", "가", "<b>", "http://", "1:00 ",
         "a.co@", "+")  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_of_any_text_a_bounded_part_is_cleaned(packages, bomb, monkeypatch):
    lengths, clean = [], captions._cleaned
    monkeypatch.setattr(captions, "_cleaned", lambda text, *more: lengths.append(len(text)) or clean(text, *more))
    captions.clean_caption(bomb * (10**6 // len(bomb)))
    assert max(lengths) <= captions.MOST + captions.LONGEST_NAME + 1 and len(lengths) <= 6


def test_a_name_of_thousands_of_characters_is_looked_at_once(packages):
    """The release's rule for names of files begins anew at every character of a run without spaces."""
    seen = []

    class Name:
        def match(self, run):
            seen.append(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "FILE_NAME", Name())
        captions._apply(captions.SIGNS, "ab" * 4000 + " house")
    assert seen == ["ab" * 4000, "house"]


def test_few_of_the_signs_behind_the_last_tag_reach_the_markup_s_parser(packages, monkeypatch):
    given, parser = [], captions.BeautifulSoup
    monkeypatch.setattr(captions, "BeautifulSoup", lambda stream, **how: given.append(stream.getvalue()) or parser(
        stream, **how))
    assert captions._without_markup("<b>1</b> " + "<a " * 2000 + "& x") == "1 " + "<a " * 2000 + "& x"
    assert given[0].count("<a ") < captions.TAGS


def test_markup_that_the_parser_rejects_is_no_markup(packages):
    assert captions.clean_caption("<![a cat in a hat") == "<! a cat in a hat"
