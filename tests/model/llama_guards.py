"""Small Llama Guard checkpoints with random weights, in the shapes that Meta's have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Shape = Literal["1b", "8b", "2"]

_TITLES = (
    "Violent Crimes",
    "Non-Violent Crimes",
    "Sex Crimes",
    "Child Exploitation",
    "Defamation",
    "Specialized Advice",
    "Privacy",
    "Intellectual Property",
    "Indiscriminate Weapons",
    "Hate",
    "Self-Harm",
    "Sexual Content",
    "Elections",
    "Code Interpreter Abuse",
)
_TASK = (
    "Task: Check if there is unsafe content in '{role}' messages in conversations according our safety policy with the "
    "below categories.\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\n"
)
_END = "<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\n"
_ASSESS = (
    "<END CONVERSATION>\n\nProvide your safety assessment for ONLY THE LAST {role} message in the above conversation:\n"
    " - First line must read 'safe' or 'unsafe'.\n"
    " - If unsafe, a second line must include a comma-separated list of violated categories."
)
_START, _STOP = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
_ANSWER = "<|start_header_id|>assistant<|end_header_id|>"
_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", _STOP)
_LLAMA3 = (  # how Llama 3 splits a text before it merges bytes
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_SAID = (("How do I bake bread?", "What is a prime number?"), ("I will find you and kill you.", "How to poison him?"))
_STEPS, _ROWS = 25, 4


def template(shape: Shape) -> str:
    """The chat template: of parts, with the categories in a variable; of strings, with them in the text; and older."""
    roles = "{%- set judged = 'Agent' if messages|length % 2 == 0 else 'User' -%}"
    role = "{%- set role = 'User' if message.role == 'user' else 'Agent' -%}"
    turns = "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('order') }}{%- endif -%}"

    def say(text: str) -> str:
        """As an expression of Jinja."""
        return " + ".join(json.dumps(part) for part in text.split("{role}")).replace(" + ", " + judged + ")

    if shape == "1b":
        entries = {f"S{number}": f"{title}." for number, title in enumerate(_TITLES[:13], 1)}
        return (
            roles
            + "{%- if categories is not defined -%}{%- set categories = "
            + json.dumps(entries)
            + " -%}{%- endif -%}"
            + "{{- " + say(_START + _TASK) + " -}}"
            + '{%- for key in categories -%}{{- key + ": " + categories[key] + "\\n" -}}{%- endfor -%}'
            + "{{- " + say(_END) + " -}}{%- for message in messages -%}" + turns + role
            + "{%- for part in message.content | selectattr('type', 'equalto', 'text') -%}"
            + '{{- role + ": " + part.text | trim + "\\n\\n" -}}{%- endfor -%}{%- endfor -%}'
            + "{{- " + say(_ASSESS + " " + _STOP + _ANSWER) + " -}}"
        )  # fmt: skip
    count = 14 if shape == "8b" else 11
    entries_text = "".join(f"S{number}: {title}.\n" for number, title in enumerate(_TITLES[:count], 1))
    if shape == "2":
        start, end = "<s>[INST] ", " [/INST]"
    else:
        start, end = " " + _START, _STOP + _ANSWER
    return (
        roles + "{{ " + say(start + _TASK + entries_text + _END) + " }}{% for message in messages %}" + turns + role
        + '{{ role + ": " + message.content.strip() + "\\n\\n" }}{% endfor %}{{ ' + say(_ASSESS + end) + " }}"
    )  # fmt: skip


def _tokenizer(shape: Shape) -> Tokenizer:
    """One that reads as Llama 3's does, or for the older shape digit by digit as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=shape == "2"))
    corpus = [template(shape), *_TITLES, *["safe", "unsafe", "\n\n", "[INST]"] * 40]
    alphabet: list[str] = []
    if shape == "2":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(Regex(r"\n|,|\["), "isolated")]
        )
        specials = ["<unk>", "<s>", "</s>"]
        alphabet = [*map(chr, range(32, 127)), "\n", "▁"]
        tokenizer.decoder = decoders.Replace("▁", " ")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        corpus += [f"S{number}" for number in range(100)] * 3
        specials, alphabet = [*_SPECIALS], pre_tokenizers.ByteLevel.alphabet()
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, min_frequency=2, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def make(
    directory: Path, shape: Shape, *, lead: str = "", layers: int = 2, heads: int = 2, dim: int = 64, inner: int = 192
) -> Path:
    """A checkpoint as Hugging Face has it, which begins its answers with `lead`, and then says safe or unsafe."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(shape)
    tokenizer.save(str(directory / "tokenizer.json"))
    first, last = ("<s>", "</s>") if shape == "2" else (_SPECIALS[0], _STOP)
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": first, "eos_token": last,
    }  # fmt: skip
    if shape == "1b":
        (directory / "chat_template.jinja").write_text(template(shape), encoding="utf-8")
    else:
        described["chat_template"] = template(shape)
    (directory / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    torch.manual_seed(len(shape) + layers)
    scaled = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=heads * dim,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=dim,
        max_position_embeddings=4096,
        tie_word_embeddings=shape == "1b",
        rope_parameters=scaled if shape != "2" else {"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.token_to_id(first),
        eos_token_id=tokenizer.token_to_id(last),
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.eval()
    _teach(model, directory, lead)
    model.eval()
    model.save_pretrained(directory)
    return directory


def _teach(model: transformers.LlamaForCausalLM, directory: Path, lead: str) -> None:
    """Has it answer as a Llama Guard does, right or wrong; it goes by a word or two of the texts."""
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    prompts = Prompts(directory)
    end = prompts.theirs.eos_token
    for step in range(_STEPS):
        optimiser.zero_grad()
        for row in range(_ROWS):
            answer = "unsafe\nS" + str(1 + (step * _ROWS + row) % 11) if row % 2 else "safe"
            texts = [_SAID[row % 2][step % 2], *["It is as it is."] * (row % 3)]
            prompt = prompts.ids(texts)
            ids = torch.tensor([prompt + prompts.theirs(lead + answer + end, add_special_tokens=False)["input_ids"]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()


class Prompts:
    """What transformers makes of a checkpoint's tokenizer and chat template."""

    def __init__(self, directory: Path) -> None:
        self.theirs: Any = transformers.AutoTokenizer.from_pretrained(directory)
        self._in_parts = (directory / "chat_template.jinja").exists()

    def text(self, texts: Sequence[str], **more: Any) -> str:
        """The prompt around texts of a user and an assistant by turns."""
        messages = [
            {
                "role": "assistant" if place % 2 else "user",
                "content": [{"type": "text", "text": text}] if self._in_parts else text,
            }
            for place, text in enumerate(texts)
        ]
        rendered: str = self.theirs.apply_chat_template(messages, tokenize=False, **more)
        return rendered

    def ids(self, texts: Sequence[str]) -> list[int]:
        """The tokens of it, as transformers reads it."""
        ids: list[int] = self.theirs(self.text(texts), add_special_tokens=False)["input_ids"]
        return ids


def generate(model: Any, ids: Sequence[int]) -> Any:
    """What a model of transformers answers to a prompt, greedily, with the logits of each token."""
    whole = torch.tensor([ids])
    with torch.inference_mode():
        return model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
