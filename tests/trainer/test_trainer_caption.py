"""python -m trainer caption: any vision-language model, what is written is kept, and what comes out is a data set."""
import json

import pytest
import torch
from PIL import Image
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import caption, layouts, loader
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", "describe", "this", "red", "blue", "wall",
         "of", "a", "in", "name"]


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("red_wall", "blue_wall", "sub/third")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), (80 * i, 10, 10)).save(tmp_path / f"set/{name}.png")
    return tmp_path / "set"


class Parrot:
    """Says its prompt and the red of the picture; remembers what it was shown."""

    def __init__(self, stop_after=None):
        self.shown, self.stop_after = [], stop_after

    def __call__(self, pictures, prompts):
        if self.stop_after is not None and len(self.shown) >= self.stop_after:
            raise KeyboardInterrupt
        self.shown += pictures
        return [f"{prompt} {p.getpixel((0, 0))[0]}" for prompt, p in zip(prompts, pictures, strict=True)]


def read(path):
    return layouts.read(path, "auto", Data(path=str(path)))


def captions(path):
    return {i.file.stem: i.texts for i in read(path).train}


def test_pictures_without_a_caption_get_a_text_file(folder):
    (folder / "red_wall.txt").write_text("its own\n")
    model = Parrot()
    assert caption.caption(read(folder), model, "look:") == 2
    assert captions(folder) == {"red_wall": ("its own",), "blue_wall": ("look: 80",), "third": ("look: 160",)}
    assert caption.caption(read(folder), model, "look:") == 0 and len(model.shown) == 2


def test_captions_are_made_anew_where_that_is_asked_for(folder):
    caption.caption(read(folder), Parrot(), "look:")
    assert caption.caption(read(folder), Parrot(), "again:", overwrite=True) == 3
    assert captions(folder)["third"] == ("again: 160",)


def test_prompts_and_answers_are_filled_in(folder):
    (folder / "red_wall.txt").write_text("its own\n")
    caption.caption(read(folder), Parrot(), "{name} in {folder}, {caption}:", "sks, {}", overwrite=True)
    assert captions(folder) == {"red_wall": ("sks, red wall in set, its own: 0",),
                                "blue_wall": ("sks, blue wall in set, : 80",), "third": ("sks, third in sub, : 160",)}


@pytest.mark.parametrize("prompt, answer, part", [("{nam}", "{}", "speaks of {nam}; there are {caption}, {tags}"),
                                                  ("x", "sks", "has no {}")])
def test_templates_that_cannot_work_are_refused(folder, prompt, answer, part):
    with pytest.raises(ValueError, match=part):
        caption.caption(read(folder), Parrot(), prompt, answer)


def test_a_jsonl_keeps_what_the_data_set_said(tmp_path, folder):
    (tmp_path / "hed.png").write_bytes((folder / "red_wall.png").read_bytes())
    lines = [{"file": "set/red_wall.png", "caption": "a wall", "tags": ["brick"], "hed": "hed.png", "class": "wall",
              "height": 16, "width": 24}, {"file": "set/blue_wall.png", "split": "held_out"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = layouts.read(tmp_path / "data.jsonl", "jsonl", Data(conditions=["hed"]))
    out = tmp_path / "new/captions.jsonl"
    assert caption.caption(found, Parrot(), "look:", out=out) == 2
    settings = Data(path=str(out), conditions=["hed"])
    again = loader.read(settings, "", strict=False)
    item, = again.train
    assert (item.captions, item.described, item.tags, item.size) == (("a wall",), ("look: 0",), ("brick",), (16, 24))
    assert item.file.samefile(folder / "red_wall.png") and item.conditions["hed"].samefile(tmp_path / "hed.png")
    assert again.classes == ["wall"] and again.held_out[0].captions == ("look: 80",)


def test_a_stopped_jsonl_goes_on_and_its_half_line_is_made_again(tmp_path, folder):
    out = tmp_path / "captions.jsonl"
    with pytest.raises(KeyboardInterrupt):
        caption.caption(read(folder), Parrot(stop_after=1), "look:", out=out, batch=1)
    with open(out, "a") as file:
        file.write("{\"file\": \"set/re")
    model = Parrot()
    assert caption.caption(read(folder), model, "look:", out=out, batch=1) == 2 and len(model.shown) == 2
    assert len(read(out).train) == 3 == len({i.file.name for i in read(out).train})


def test_a_picture_that_cannot_be_read_stops_no_other(folder):
    (folder / "blue_wall.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"(?s)2 captions were written. 1 pictures have none:.*blue_wall.png"):
        caption.caption(read(folder), Parrot(), "look:", batch=3)
    assert set(captions(folder)) >= {"red_wall", "third"} and captions(folder)["third"] == ("look: 160",)


def tokenizer(path):
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", model_input_names=["input_ids", "attention_mask"],
                                   extra_special_tokens={"image_token": "<image>"})


def llava(path, template=True):
    """A LLaVA that only decodes, with a chat template or without."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes), text_config=text,
                         image_token_index=4)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    chat = "USER: {% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}" \
           "{% endif %}{% endfor %} ASSISTANT:"
    LlavaProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), tokenizer(path), patch_size=8,
                   vision_feature_select_strategy="default", num_additional_image_tokens=1,
                   chat_template=chat if template else None).save_pretrained(path)
    return path


def blip(path):
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "red", "wall", "a", "of"]
    (path / "vocab").mkdir(parents=True)
    (path / "vocab/vocab.txt").write_text("\n".join(words))
    config = BlipConfig(text_config=dict(vocab_size=len(words), bos_token_id=4, eos_token_id=3, sep_token_id=3,
                                         pad_token_id=0, encoder_hidden_size=16, **sizes),
                        vision_config=dict(image_size=16, patch_size=8, **sizes))
    BlipForConditionalGeneration(config).save_pretrained(path)
    words = BertTokenizerFast(str(path / "vocab/vocab.txt"), additional_special_tokens=["[DEC]"])
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), words).save_pretrained(path)
    return path


@pytest.mark.parametrize("make, prompt", [(llava, "describe this"), (lambda p: llava(p, False), "describe this"),
                                          (blip, ""), (blip, "a red")],
                         ids=["chat-template", "image-token", "nothing-asked", "beginning"])
def test_a_model_of_transformers_captions_alone_as_in_a_batch(tmp_path, make, prompt):
    model = caption.Captioner(make(tmp_path / "model"), max_tokens=5)
    pictures = [Image.new("RGB", (30, 20), c) for c in ("red", "blue", "green")]
    together = model(pictures, [prompt] * 3)
    assert together == [model([p], [prompt])[0] for p in pictures]
    begun = prompt if make is blip else ""  # what BLIP is given is how its caption begins, others are asked
    assert all(text.startswith(begun) and len(text.split()) <= 5 + len(begun.split()) for text in together)


@pytest.mark.parametrize("repeats", [True, False])
def test_a_caption_is_the_answer_whether_a_model_repeats_its_prompt_or_not(tmp_path, monkeypatch, repeats):
    model = caption.Captioner(llava(tmp_path / "model"), max_tokens=5)
    answer = torch.tensor([[WORDS.index(word) for word in ("red", "wall", "</s>")]])
    monkeypatch.setattr(model.net, "generate", lambda input_ids, **_: torch.cat([input_ids, answer], 1) if repeats
                        else answer)
    assert model([Image.new("RGB", (30, 20), "red")], ["describe this"]) == ["red wall"]


def test_a_beginning_stays_where_a_model_of_beginnings_has_nothing_to_add(tmp_path):
    model = caption.Captioner(blip(tmp_path / "model"), max_tokens=5)
    with torch.no_grad():
        for name, weight in model.net.named_parameters():
            if name.endswith("predictions.bias"):
                weight[model.tokens.sep_token_id] = 1000.0  # it ends at once
    assert model([Image.new("RGB", (30, 20), "red")] * 2, ["a red", "a wall"]) == ["a red", "a wall"]


def test_prompts_of_other_lengths_do_not_change_an_answer(tmp_path):
    model = caption.Captioner(llava(tmp_path / "model"), max_tokens=5)
    pictures = [Image.new("RGB", (30, 20), "red")] * 2
    short, long = "describe", "describe this red wall in a name"
    assert model(pictures, [short, long]) == [model(pictures[:1], [p])[0] for p in (short, long)]


def test_the_command_writes_what_the_model_says(tmp_path, folder, capsys):
    words = ["caption", str(folder), "--model", str(llava(tmp_path / "model")), "--max-tokens", "5", "--device", "cpu",
             "--answer", "seen: {}"]
    cli.main([*words, "--out", str(tmp_path / "all.jsonl")])
    assert "3 captions written" in capsys.readouterr().out
    assert all(i.captions[0].startswith("seen: ") for i in read(tmp_path / "all.jsonl").train)
    cli.main(words)
    assert captions(folder) == captions(tmp_path / "all.jsonl")


def refusal(*words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["caption", *map(str, words), "--device", "cpu"])
    return str(stopped.value.code)


def test_what_cannot_be_captioned_is_said_before_a_model_is_loaded(tmp_path, folder):
    (tmp_path / "data.jsonl").write_text(json.dumps({"file": "set/red_wall.png"}) + "\n")
    assert "name a new jsonl with --out" in refusal(tmp_path / "data.jsonl", "--model", tmp_path)
    assert "is what is read" in refusal(tmp_path / "data.jsonl", "--model", tmp_path, "--out", tmp_path / "data.jsonl")
    assert "cannot be read as a vision-language model" in refusal(folder, "--model", tmp_path)
    assert "nowhere: there is no such folder" in refusal(folder, "--model", tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none that is known"}))
    assert len(refusal(folder, "--model", tmp_path)) < 400  # transformers lists all of its models
    assert "no such file or folder" in refusal(tmp_path / "gone", "--model", tmp_path)
