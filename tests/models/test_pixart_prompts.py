"""Flags in a PixArt prompt, and its styles."""
import pytest
from pixstack.models_impl.pixart.prompts import NO_STYLE, STYLES, Prompt, apply_style, parse


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("  a cat on a mat ", Prompt("a cat on a mat")),
        ("", Prompt("")),
        ("a cat --ar 3:4", Prompt("a cat", 0.75)),
        ("a cat --aspect_ratio 16:9", Prompt("a cat", 16 / 9)),
        ("a cat --hw 768:1280", Prompt("a cat", None, (768, 1280))),
        ("a cat --ar 1:2 --hw 500:1000", Prompt("a cat", 0.5, (500, 1000))),
        ("a cat --hw 500:1000 --ar 1:2", Prompt("a cat", 0.5, (500, 1000))),
        ("a cat --ar\t\n 3:4", Prompt("a cat", 0.75)),
        ("a cat--ar 3:4", Prompt("a cat", 0.75)),
        ("a cat --ar 3:4, oil on canvas", Prompt("a cat", 0.75)),
        ("a cat --ar 3:4.", Prompt("a cat", 0.75)),
        ("--ar 3:4", Prompt("", 0.75)),
        ("a cat -ar 3:4 - ar", Prompt("a cat -ar 3:4 - ar")),
        ("a ratio of 3:4", Prompt("a ratio of 3:4")),
    ],
)
def test_a_prompt_is_split_as_the_release_splits_it(prompt, expected):
    assert parse(prompt) == expected


def test_aspect_ratio_counts_before_ar():
    assert parse("a cat --ar 1:2 --aspect_ratio 3:1").ratio == 3.0


def test_of_one_flag_the_first_counts():
    assert parse("a cat --ar 1:2 --ar 3:1 --hw 8:9 --hw 1:2") == Prompt("a cat", 0.5, (8, 9))


@pytest.mark.parametrize(
    "flag",
    ["--ar", "--ar 16/9", "--ar 3", "--ar 3:", "--ar3:4", "--ar=3:4", "--ar 3.5:4", "--ar 3:4.5", "--ar 1:2:3",
     "--ar -1:2", "--ar 0:1", "--ar 1:0", "--ar 3 : 4", "--artistic", "--ar 3:4 --ar 5", "--aspect_ratio 3:4 --ar x"],
)  # fmt: skip
def test_a_ratio_that_cannot_be_read_says_what_to_write(flag):
    with pytest.raises(ValueError, match=r"Write --ar 3:4 \(height:width\)"):
        parse(f"a cat {flag}")


@pytest.mark.parametrize("flag", ["--hw 1024", "--hw 1024x1024", "--hw 0:1024"])
def test_a_size_that_cannot_be_read_says_what_to_write(flag):
    with pytest.raises(ValueError, match=r"has '--hw .* Write --hw 768:1024 \(height:width in pixels\)"):
        parse(f"a cat {flag}")


def test_a_mistake_after_a_good_flag_is_found():
    with pytest.raises(ValueError, match="--hw needs two whole numbers"):
        parse("a cat --ar 3:4 --hw big")


# --- Styles

def test_the_styles_have_the_names_of_the_release():
    assert list(STYLES) == ["(No style)", "Cinematic", "Photographic", "Anime", "Manga", "Digital Art", "Pixel art",
                            "Fantasy art", "Neonpunk", "3D Model"]  # fmt: skip


def test_no_style_changes_nothing():
    assert apply_style(NO_STYLE, "a cat", "dogs") == ("a cat", "dogs")


@pytest.mark.parametrize("name", [name for name in STYLES if name != NO_STYLE])
def test_a_style_keeps_the_words_of_the_user(name):
    positive, negative = apply_style(name, "a {prompt} in {0} braces", "dogs")
    assert positive.count("a {prompt} in {0} braces") == 1
    assert len(positive) > len("a {prompt} in {0} braces") and negative.endswith(", dogs")


def test_a_style_gives_a_negative_where_the_user_has_none():
    negative = apply_style("Anime", "a cat", "")[1]
    assert negative and negative == negative.strip(", ")


def test_an_unknown_style_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="no style 'Baroque'.*Cinematic.*3D Model"):
        apply_style("Baroque", "a cat", "")
