"""Configuration: typed dataclasses, and the YAML files and command lines that fill them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "norm_cast": ("last", "first"),
    "norm_order": ("pre", "post", "sandwich", "res_post"),
    "bias": ("all", "qkv", "except_qkv", "attention", "mlp", "none"),
    "activation": ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh"),
    "qk_norm_width": ("head", "all"),
    "positions": ("none", "learned"),
}


@dataclass
class TransformerConfig:
    """Options of the backbone.

    Attributes:
        vocab_size: rows of the word embedding; 0 for towers, which have none.
        hidden_size: h.
        num_layers: layers that exist; 0 for convolutional networks, which only have mixins.
        num_layers_run: layers that run (CogAgent's EVA2-CLIP-L stores 24 and runs 23); None for all.
        num_heads: n.
        num_kv_heads: g, a divisor of n; None for n.
        head_size: d; None for h / n.
        inner_hidden_size: of the MLP; None for 4 h.
        causal: whether tokens see only what comes before.
        norm: `layernorm` or `rmsnorm`.
        norm_eps: added to the variance.
        norm_cast: RMSNorm in low precision: multiply by the weight in fp32 and cast `last` (CogVLM), or cast `first`
            and multiply after (HF LLaMA).
        norm_order: `pre`; `post`: LN(x + f(x)); `sandwich`: x + LN(f(LN(x))); `res_post`: x + LN(f(x)) (EVA2-CLIP-E).
        final_norm: a norm after the last layer.
        embedding_norm: a norm before the first layer.
        bias: of Linears: `all`, `qkv` only, all `except_qkv`, `attention` (qkv and dense), `mlp`, or `none`.
        activation: of the MLP.
        gated_mlp: act(gate(x)) * up(x) instead of act(up(x)).
        qk_norm: RMSNorm over q and k.
        qk_norm_width: it runs over each `head` alone, or over `all` heads together (InternViT).
        layer_scale: initial value of a learned scale on what each sublayer adds; None for no such scale.
        positions: `learned` table or `none` (rotary is a mixin).
        max_positions: rows of the learned table; also the longest sequence a release was made for.
        tied_head: use the word embedding as output projection when no mixin replaces `final_forward`.
        embedding_scale: factor on word embeddings.
        init_std: of Linears and embeddings in a fresh model.
        checkpoint_activations: recompute layers in the backward pass instead of keeping their activations.
    """

    model_class: ClassVar[Any] = None

    vocab_size: int = 0
    hidden_size: int = 64
    num_layers: int = 2
    num_layers_run: int | None = None
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_size: int | None = None
    inner_hidden_size: int | None = None
    causal: bool = True
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_cast: str = "last"
    norm_order: str = "pre"
    final_norm: bool = True
    embedding_norm: bool = False
    bias: str = "all"
    activation: str = "gelu"
    gated_mlp: bool = False
    qk_norm: bool = False
    qk_norm_width: str = "head"
    layer_scale: float | None = None
    positions: str = "none"
    max_positions: int = 0
    tied_head: bool = True
    embedding_scale: float = 1.0
    init_std: float = 0.02
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{name}.{key} is {getattr(self, key)!r}; choose one of {', '.join(choices)}.")
        for key in ("hidden_size", "num_heads", "inner_size", "kv_heads", "head_width"):
            if getattr(self, key) < 1:
                raise ValueError(f"{name}.{key} is {getattr(self, key)}; it must be at least 1.")
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"{name}: hidden_size {self.hidden_size} does not divide into {self.num_heads} heads. "
                f"Change num_heads, or set head_size."
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"{name}: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}.")
        if self.num_layers < 0:
            raise ValueError(f"{name}.num_layers is {self.num_layers}; it must be at least 0.")
        if not min(1, self.num_layers) <= self.layers_run <= self.num_layers:
            raise ValueError(
                f"{name}: num_layers_run {self.num_layers_run} is not within num_layers {self.num_layers}."
            )
        if self.positions == "learned" and self.max_positions < 1:
            raise ValueError(f"{name}: positions 'learned' needs max_positions, the rows of the table.")

    @property
    def inner_size(self) -> int:
        """Width of the MLP."""
        return self.inner_hidden_size or 4 * self.hidden_size

    @property
    def head_width(self) -> int:
        """d."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """g."""
        return self.num_kv_heads or self.num_heads

    @property
    def layers_run(self) -> int:
        """Layers that run."""
        return self.num_layers if self.num_layers_run is None else self.num_layers_run

    def build(self, **options: Any) -> Any:
        """The model this configures (`BaseModel` itself for a plain backbone); options as of `BaseModel`."""
        return self.model_class(self, **options)


@dataclass
class VisionTowerConfig(TransformerConfig):
    """What every tower has. Towers that pool name further choices of `output` in `outputs`.

    Attributes:
        image_size: side of the pictures.
        patch_size: side of a patch.
        in_channels: colour channels.
        cls_token: a learned token before the patches.
        patch_bias: whether the patch convolution has a bias.
        crop: leave out what lies beyond the last whole patch, where image_size is no multiple of patch_size.
        output: what comes out: `patches` [m, patches, h], or `tokens`, which has the cls token as well.
        output_norm: patches and tokens go through the final norm, if there is one. False keeps its weights unused.
            Pooled outputs go through it always.
        stem_channels, stem_depth: early convolutions (see `PatchEmbeddingMixin`); the released towers have none.
    """

    outputs: ClassVar[tuple[str, ...]] = ("patches", "tokens")

    causal: bool = False
    norm_eps: float = 1e-6
    final_norm: bool = False
    positions: str = "learned"
    image_size: int = 224
    patch_size: int = 14
    in_channels: int = 3
    cls_token: bool = True
    patch_bias: bool = True
    crop: bool = False
    output: str = "patches"
    output_norm: bool = True
    stem_channels: list[int] = field(default_factory=list)
    stem_depth: int = 0

    def __post_init__(self) -> None:
        if self.output not in self.outputs:
            choices = ", ".join(self.outputs)
            raise ValueError(f"{type(self).__name__}.output is {self.output!r}; choose one of {choices}.")
        if self.image_size % self.patch_size and not self.crop:
            raise ValueError(f"image_size {self.image_size} does not divide into patches of {self.patch_size}.")
        self.max_positions = self.grid**2 + self.cls_token
        super().__post_init__()

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def num_features(self) -> int:
        """N: features of one picture; 1 where they are pooled into one vector."""
        return {"patches": self.grid**2, "tokens": self.max_positions}.get(self.output, 1)

    @property
    def feature_size(self) -> int:
        """c: width of the features."""
        return self.hidden_size


@dataclass
class ChatConfig:
    """A question and how it is answered.

    Attributes:
        prompt: the question.
        image: a picture, several, or none; relative to the configuration file.
        template: name of the prompt template; null for the processor's.
        max_new_tokens: the answer ends after so many tokens.
        temperature: 0 takes the likeliest token each time; above 0 draws, sharper below 1.
        top_k: draw from the likeliest so many.
        top_p: draw from the smallest set of likeliest tokens with this probability.
        output: folder for pictures with the answer's boxes drawn; relative to where the command runs.
        interactive: after the answer, read further questions about the same pictures from the standard input, one a
            line, up to an empty line or its end.
    """

    prompt: str | None = None
    image: str | list[str] | None = None
    template: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    output: str = "annotated"
    interactive: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"chat.max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"chat.temperature is {self.temperature}; it must be 0 (the likeliest token) or above.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("chat.top_k and chat.top_p need chat.temperature above 0; at 0 nothing is drawn.")

    @property
    def images(self) -> list[str]:
        """The pictures as a list."""
        if self.image is None:
            return []
        return [self.image] if isinstance(self.image, str) else list(self.image)


@dataclass
class MixinConfig:
    """A mixin to add after a model is built.

    Attributes:
        class_path: module and class, such as `mixformer.mixins.LoRAMixin`.
        init_args: its options.
        layers: layers it is limited to; null for all.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None

    def build(self, where: str = "mixins") -> Any:
        """The mixin.

        Args:
            where: where the configuration names it, for errors.

        Raises:
            ValueError: no such class, or options that it does not have.
            TypeError: a class that is no mixin.
        """
        from mixformer.mixin import BaseMixin

        cls = import_class(self.class_path, f"{where}.class_path")
        if not issubclass(cls, BaseMixin):
            raise TypeError(f"{where}.class_path: {self.class_path} is no mixin. Name a subclass of BaseMixin.")
        return make(cls, self.init_args, f"{where}.init_args")


@dataclass
class Settings:
    """What a configuration file and the command line say, checked.

    Attributes:
        model: sizes and options of the model.
        model_class: the class it configures.
        mixins: mixins to add, in this order, after the model is built; None takes the model's own one out.
        weights: folder of a checkpoint.
        processor: folder of `processor.yaml` and the tokenizer; None for the checkpoint's.
        tokenizer: file or folder of a tokenizer, where the processor's folder has none.
        device: where the model runs.
        dtype: of its parameters; None for the checkpoint's, or float32 for a fresh model.
        quantise: kinds of weights by selector, or one for all Linears, as of `from_pretrained`; None for none.
        seed: of initial weights and of draws.
        chat: the question.
        sections: the sections of the other jobs, by name.
        given: the keys that were set, nested, defaults left out.
        file: the configuration file.
        left_out: mixins that the file names and an override sets to null: not added, and taken out of a checkpoint that
            has them.
    """

    model: TransformerConfig
    model_class: Any
    mixins: dict[str, MixinConfig | None] = field(default_factory=dict)
    weights: Path | None = None
    processor: Path | None = None
    tokenizer: Path | None = None
    device: str = "cpu"
    dtype: str | None = None
    quantise: str | dict[str, str | None] | None = None
    seed: int = 0
    chat: ChatConfig = field(default_factory=ChatConfig)
    sections: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    left_out: set[str] = field(default_factory=set)

    @property
    def train(self) -> Any:
        """The `train:` section."""
        return self.sections.get("train")

    @property
    def evaluate(self) -> Any:
        """The `evaluate:` section."""
        return self.sections.get("evaluate")

    def torch_dtype(self) -> Any:
        """`dtype` as torch's, or None."""
        import torch

        return None if self.dtype is None else getattr(torch, self.dtype)

    def load_processor(self) -> Any:
        """The processor of `processor`, or else of a language model's `weights`; None if neither is set."""
        from mixformer.data.processor import load_processor

        folder = self.processor or (self.weights if self.model.vocab_size else None)
        return None if folder is None else load_processor(folder, tokenizer=self.tokenizer)

    def build_model(self, device: str | None = None) -> Any:
        """A fresh model of these settings with its mixins, weights from `seed`.

        Args:
            device: instead of the settings' own; `meta` allocates nothing.
        """
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        model = self.model_class(
            self.model, device=device or self.device, dtype=self.torch_dtype(), generator=generator
        )
        self.apply_mixins(model)
        return model

    def load_model(self, device: str | None = None) -> Any:
        """The model of `weights`, with the mixins of these settings; a fresh one if there are no weights.

        Args:
            device: instead of the settings' own.

        In foreign formats, which lack some constants, the keys that `model:` sets count.

        Raises:
            ValueError: a checkpoint of another model class, or of other sizes than `model:` says.
        """
        if self.weights is None:
            return self.build_model(device)
        import torch

        from mixformer.checkpoint import from_pretrained, recognise

        set_keys = self.given.get("model") or {}
        own = recognise(self.weights) == "own"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # what is added to the checkpoint begins with it
            model = from_pretrained(
                self.weights, dtype=self.torch_dtype(), device=device or self.device, mixins=self._known_classes(),
                overrides=None if own else _set_values(set_keys, self.model), quantise=self.quantise,
            )
        if not isinstance(model, self.model_class):
            raise ValueError(
                f"weights: {self.weights} holds a {type(model).__name__}, not a {self.model_class.__name__}. Run "
                f"python -m {type(model).__module__}, or name another folder."
            )
        _compare(set_keys, self.model, model.config, "model", self.weights)
        self.apply_mixins(model)
        return model

    def _known_classes(self) -> dict[str, type]:
        """The model's class and those that `mixins:` names, which a checkpoint may therefore ask for."""
        paths = {name: mixin.class_path for name, mixin in self.mixins.items() if mixin is not None}
        classes = [import_class(path, f"mixins.{name}.class_path") for name, path in paths.items()]
        return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in (self.model_class, *classes)}

    def apply_mixins(self, model: Any) -> None:
        """Add and remove what `mixins:` says, in its order. What a checkpoint already brought so is left as it is."""
        for path, mixin in self.mixins.items():
            try:
                self._apply(model, path, mixin)
            except (ValueError, TypeError) as error:
                text = str(error)
                text = text if text.startswith("mixins.") else f"mixins.{path}: {text}"
                raise ValueError(f"{self.file}: {text}" if self.file else text) from error

    def _apply(self, model: Any, path: str, mixin: MixinConfig | None) -> None:
        outer, _, name = path.rpartition("/")
        owner = dict(model.nested_models()).get(outer) if outer else model
        present = owner is not None and name in owner.mixins
        if mixin is None:
            missed = path not in self.left_out and (self.weights is None or not self._composes(path))
            if present or missed:
                model.del_mixin(path)
            return
        made = mixin.build(f"mixins.{path}")
        if present and self.weights is not None:
            old = model.get_mixin(path)
            if type(old) is type(made) and old.options == made.options:
                return
        model.add_mixin(path, made, layers=mixin.layers)

    def _composes(self, path: str) -> bool:
        """Whether a fresh model has this mixin, so that a checkpoint without it agrees with removing it."""
        try:
            self.model_class(self.model, device="meta").get_mixin(path)
        except ValueError:
            return False
        return True


SECTIONS = {"train": "TrainSection", "evaluate": "EvaluateSection"}
RUN_OPTIONS = ("checkpoint_activations",)
DTYPES = ("float32", "bfloat16", "float16", "float64")
_PLAIN: dict[str, tuple[Any, Any, str]] = {
    "model_class": (str | None, None, "module:class that `model` configures, for commands that are told no class."),
    "weights": (str | None, None, "folder of a checkpoint, relative to the configuration file."),
    "processor": (str | None, None, "folder of processor.yaml and the tokenizer; null for that of the weights."),
    "tokenizer": (str | None, None, "file or folder of a tokenizer, where the processor's folder has none."),
    "device": (str, "cpu", "where the model runs: cpu, cuda, mps."),
    "dtype": (str | None, None, f"of the parameters, one of {', '.join(DTYPES)}; null for the checkpoint's."),
    "quantise": (
        dict[str, str | None] | str | None, None,
        "int8 or int4 for the weights of all Linears, or {selector: kind}, such as {language: int4, image: int8}.",
    ),
    "seed": (int, 0, "of initial weights and of draws."),
}
_KEYS = ("model", *_PLAIN, "mixins", "chat", *SECTIONS)


def read_settings(
    model_class: Any = None, file: str | Path | None = None, overrides: Sequence[str] = (),
    sections: Sequence[str] = ("train", "evaluate"),
) -> Settings:
    """Read a configuration file, apply overrides, check every key and type.

    Args:
        model_class: the class that `model:` configures; None takes the file's `model_class`.
        file: YAML; None for the defaults.
        overrides: `--section.key value` arguments, over what the file says.
        sections: which of the sections of training and evaluation to make; classes that the others name are not
            imported.

    Raises:
        ValueError: no such file, no YAML, a key that nothing has (the nearest right one is named), a value of the
            wrong type, sizes that do not fit.
    """
    values = {} if file is None else _read_yaml(Path(file))
    if file is not None:
        values = _resolve_paths(values, Path(file).parent)
    source = "defaults" if file is None else str(file)
    values, overrides = _into_lists(values, overrides)
    given = _with_overrides(values, overrides)
    if model_class is None:
        named = given.get("model_class")
        if not isinstance(named, str):
            raise ValueError(f"{source}: name the class to build, as in model_class: models.cogagent:CogAgent.")
        model_class = import_class(named, f"{source}: model_class")
    elif given.get("model_class") is not None:
        named = import_class(given["model_class"], f"{source}: model_class")
        if named is not model_class:
            raise ValueError(
                f"{source}: model_class is {given['model_class']}, but this command runs {model_class.__name__}. Run "
                f"python -m {named.__module__} instead."
            )
    try:
        _check_sections(model_class, values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error
    try:
        _check_sections(model_class, _with_overrides({}, overrides))
    except (ValueError, TypeError) as error:
        raise ValueError(f"command line: {error}") from error
    return _typed(model_class, values, given, overrides, None if file is None else Path(file), source, sections)


def make(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """Call a class with checked options. Nested dataclasses are mappings, or `class_path` and `init_args`.

    Args:
        cls: a dataclass or any class with annotated options.
        values: {option: value}.
        where: what the options are, for errors.

    Raises:
        ValueError: an unknown option, a missing one, or one of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected the options of {cls.__name__} as keys, got {values!r}.")
    check_keys(cls, values, where)
    hints, made = _hints(cls), {}
    for name, value in values.items():
        if isinstance(value, Mapping) and set(value) - {"init_args"} == {"class_path"}:
            inner = import_class(value["class_path"], f"{where}.{name}.class_path")
            value = make(inner, value.get("init_args") or {}, f"{where}.{name}")
            expected = _dataclass_of(hints.get(name))
            if expected is not None and not isinstance(value, expected):
                raise ValueError(f"{where}.{name}: {type(value).__name__} is no {expected.__name__}.")
            made[name] = value
        elif isinstance(value, Mapping) and (expected := _dataclass_of(hints.get(name))) is not None:
            made[name] = make(expected, value, f"{where}.{name}")
    plain = {name: value for name, value in values.items() if name not in made}
    parser = _parser()
    parser.add_class_arguments(cls, "options", skip=set(made), fail_untyped=False)
    try:
        typed = parser.parse_object({"options": plain})
        options = {name: value for name, value in typed.options.as_dict().items() if name in plain} if plain else {}
    except _parser_errors() as error:
        raise ValueError(_say(error, "options", where)) from error
    try:
        return cls(**options, **made)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def import_class(path: str, where: str) -> Any:
    """The class at `module:Class` or `module.Class`.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(path, str) or not re.fullmatch(r"[\w.]+[:.]\w+", path):
        raise ValueError(f"{where}: {path!r} is no class path. Write module.Class, as in mixformer.mixins.LoRAMixin.")
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{where}: {path} cannot be imported: {error}.") from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        from mixformer.hooks import did_you_mean

        known = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(f"{where}: {module_name} has no class '{name}'.{did_you_mean(name, known)}")
    return found


def check_keys(cls: Any, values: Mapping[str, Any], where: str) -> None:
    """Check that every key is an option of a class, nested dataclasses included.

    Raises:
        ValueError: an unknown key; the nearest right one is named.
    """
    known, hints = options_of(cls), _hints(cls)
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}.{key}: unknown key of {cls.__name__}.{_nearest(str(key), cls, known, where)}")
        item: Any = _dataclass_of(next(iter(get_args(hints.get(key))), None)) if isinstance(value, list) else None
        for place, part in enumerate(value if item is not None else ()):
            if not isinstance(part, Mapping):
                raise ValueError(f"{where}.{key}[{place}]: expected the keys of {item.__name__}, got {part!r}.")
            check_keys(item, part, f"{where}.{key}[{place}]")
        nested = _dataclass_of(hints.get(key))
        if nested is None or isinstance(value, nested):
            continue
        if isinstance(value, Mapping):
            if not {"class_path", "init_args"} & set(value):
                check_keys(nested, value, f"{where}.{key}")
        elif value is not None or type(None) not in get_args(hints[key]):
            raise ValueError(f"{where}.{key}: expected the keys of {nested.__name__}, got {value!r}.")


def options_of(cls: Any) -> list[str]:
    """Names of the options of a class, those that its subclasses pass on included."""
    if dataclasses.is_dataclass(cls):
        return [item.name for item in dataclasses.fields(cls) if item.init]
    names = []
    for parent in inspect.getmro(cls):
        init = vars(parent).get("__init__")
        if init is None:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        names += [item.name for item in parameters if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)]
        if all(item.kind != item.VAR_KEYWORD for item in parameters):
            break
    return names


def _hints(cls: Any) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for owner in reversed(inspect.getmro(cls)):
        source = owner if dataclasses.is_dataclass(cls) else vars(owner).get("__init__")
        if inspect.isfunction(source) or dataclasses.is_dataclass(source):
            hints.update(get_type_hints(source))
    return hints


def _dataclass_of(hint: Any) -> Any:
    """The dataclass that a type hint names, alone or beside None."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((item for item in options if isinstance(item, type) and dataclasses.is_dataclass(item)), None)


def _nearest(key: str, cls: Any, known: Sequence[str], where: str) -> str:
    from mixformer.hooks import did_you_mean

    deeper = [path for path in _leaves(cls) if path.split(".")[-1] == key]
    near = f" Did you mean '{where}.{deeper[0]}'?" if deeper else did_you_mean(key, known)
    return near or f" It has: {', '.join(known)}."


def _leaves(cls: Any) -> Iterator[str]:
    for name, hint in _hints(cls).items():
        nested = _dataclass_of(hint)
        yield name
        if nested is not None:
            yield from (f"{name}.{path}" for path in _leaves(nested))


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}. Name a configuration file.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no sections; expected keys such as {', '.join(_KEYS)}.")
    return values


def _resolve_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the file's paths relative to where it lies."""
    values = dict(values)
    for name in ("weights", "processor", "tokenizer"):
        if isinstance(values.get(name), str):
            values[name] = str(folder / values[name])
    chat = values.get("chat")
    if isinstance(chat, dict) and chat.get("image") is not None:
        images = chat["image"]
        found = [str(folder / x) for x in images] if isinstance(images, list) else str(folder / str(images))
        values["chat"] = {**chat, "image": found}
    return values


def _with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values with `--a.b value` arguments put in."""
    merged = _copied(values)
    for path, text in split_overrides(overrides):
        place = merged
        for part in path[:-1]:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[path[-1]] = text if path[0] == "chat" else _parsed(text)
    return merged


def _into_lists(values: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Put what overrides say of the entries of lists, as `--train.stages.0.loop.steps 5`, into the file's; the others.

    Raises:
        ValueError: a list has no such entry.
    """
    values, others = _copied(values), []
    for path, text in split_overrides(overrides):
        place: Any = values
        in_list = False
        for depth, part in enumerate(path[:-1]):
            if isinstance(place, list):
                place, in_list = _entry(place, part, ".".join(path[:depth])), True
            elif isinstance(place, dict) and (in_list or part in place):
                place[part] = {} if place.get(part) is None else place[part]
                place = place[part]
            else:
                break
        if isinstance(place, list):
            place[place.index(_entry(place, path[-1], ".".join(path[:-1])))] = _parsed(text)
        elif in_list and isinstance(place, dict):
            place[path[-1]] = _parsed(text)
        else:
            others.append(f"--{'.'.join(path)}={text}")
    return values, others


def _entry(entries: list[Any], part: str, where: str) -> Any:
    """The entry of a list that has this number, from 0, or this name."""
    named = [entry for entry in entries if isinstance(entry, dict) and entry.get("name") == part]
    if named or (part.isdecimal() and int(part) < len(entries)):
        return named[0] if named else entries[int(part)]
    names = [str(entry.get("name")) for entry in entries if isinstance(entry, dict) and "name" in entry]
    raise ValueError(
        f"command line: {where} has no entry '{part}'. It has {len(entries)}, numbered from 0"
        f"{', named ' + ', '.join(names) if names else ''}."
    )


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def split_overrides(overrides: Sequence[str]) -> list[tuple[list[str], str]]:
    """[(["model", "hidden_size"], "64"), ...] of `--model.hidden_size 64` or `--model.hidden_size=64` arguments.

    Raises:
        ValueError: an argument that is no `--key value`.
    """
    found, rest = [], list(overrides)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise ValueError(
                f"command line: {argument!r} was not expected. Override settings with --section.key value."
            )
        if not equals:
            if not rest:
                raise ValueError(f"command line: {name} needs a value, as in {name} VALUE.")
            text = rest.pop(0)
        parts = name[2:].split(".")
        if parts[0] == "mixins" and len(parts) > 2:
            parts = _mixin_parts(parts)
        found.append((parts, text))
    return found


def _parsed(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _mixin_parts(parts: list[str]) -> list[str]:
    """Keep a path such as image.tower/lora, whose dots are no levels, in one piece."""
    slash = max((place for place, part in enumerate(parts) if "/" in part), default=1)
    return ["mixins", ".".join(parts[1 : slash + 1]), *parts[slash + 1 :]]


def _check_sections(model_class: Any, values: Mapping[str, Any]) -> None:
    from mixformer.hooks import did_you_mean

    classes = {"model": model_class.Config, "chat": ChatConfig, **_section_classes()}
    for key, value in values.items():
        if key not in _KEYS:
            inside = [f"{name}.{path}" for name, cls in classes.items() for path in _leaves(cls)]
            deeper = [path for path in inside if path.split(".")[-1] == key]
            near = f" Did you mean '{deeper[0]}'?" if deeper else did_you_mean(str(key), _KEYS)
            near = near or f" The sections are: {', '.join(_KEYS)}."
            raise ValueError(f"{key}: unknown section.{near}")
        if value is None and key != "mixins":
            continue
        if key in classes:
            if not isinstance(value, Mapping):
                raise ValueError(f"{key}: expected the keys of {classes[key].__name__}, got {value!r}.")
            check_keys(classes[key], value, key)
        if key == "mixins":
            if not isinstance(value, Mapping):
                raise ValueError(f"mixins: expected names with a class_path each, got {value!r}.")
            for name, mixin in value.items():
                if mixin is not None and not isinstance(mixin, Mapping):
                    raise ValueError(f"mixins.{name}: expected class_path, init_args and layers, got {mixin!r}.")
                check_keys(MixinConfig, mixin or {}, f"mixins.{name}")


def _section_classes() -> dict[str, Any]:
    """The dataclasses of the sections that `mixformer.train` owns."""
    training = importlib.import_module("mixformer.train")
    return {key: getattr(training, name) for key, name in SECTIONS.items() if hasattr(training, name)}


def _typed(
    model_class: Any, values: dict[str, Any], given: dict[str, Any], overrides: Sequence[str], file: Path | None,
    source: str, wanted: Sequence[str],
) -> Settings:
    typed = [key for key in wanted if key in _section_classes()]
    parser = settings_parser(model_class, typed)
    others = ("mixins", *(key for key in SECTIONS if key not in typed))
    kept = {key: value for key, value in values.items() if value is not None and key not in others}
    chosen = _chosen(model_class.Config, given.get("model") or {}, f"{source}: model")
    if chosen:
        kept["model"] = {key: value for key, value in (kept.get("model") or {}).items() if key not in chosen}
    arguments = []
    for path, text in split_overrides(overrides):
        if path[0] not in others and not (path[0] == "model" and path[1] in chosen):
            arguments.append(f"--{'.'.join(path)}={text}")
    source_now = source
    try:
        namespace = parser.parse_object(kept)
        source_now = "command line"
        namespace = parser.parse_args(arguments, namespace=namespace)
        source_now = source
        made = parser.instantiate(namespace)
        made.model = dataclasses.replace(made.model, **chosen)
    except _parser_errors() as error:
        raise ValueError(f"{source_now}: {_say(error)}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error
    if made.dtype is not None and made.dtype not in DTYPES:
        raise ValueError(f"{source}: dtype is {made.dtype!r}; choose one of {', '.join(DTYPES)}.")
    _check_device(made.device, source)
    if made.quantise and made.weights is None:
        raise ValueError(f"{source}: quantise is for the weights of a checkpoint, and there are no `weights`.")
    mixins = {
        str(name): None if mixin is None else _mixin_config(mixin, f"{source}: mixins.{name}")
        for name, mixin in (given.get("mixins") or {}).items()
    }
    left_out = {name for name, mixin in mixins.items() if mixin is None and (values.get("mixins") or {}).get(name)}
    sections = {key: getattr(made, key) for key in typed}
    sections.update({key: given[key] for key in wanted if key not in typed and key in given})
    folders = ("weights", "processor", "tokenizer")
    paths = {name: None if getattr(made, name) is None else Path(getattr(made, name)) for name in folders}
    return Settings(
        model=made.model, model_class=model_class, mixins=mixins, **paths,
        device=made.device, dtype=made.dtype, quantise=made.quantise, seed=made.seed, chat=made.chat,
        sections=sections, given=given, file=file, left_out=left_out,
    )


def _chosen(cls: Any, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parts of a model whose class the configuration names, with that class's defaults, not the usual part's."""
    named = {key: value for key, value in values.items() if isinstance(value, Mapping) and "class_path" in value}
    for key, value in named.items():
        if set(value) - {"class_path", "init_args"}:
            raise ValueError(f"{where}.{key}: beside class_path, write options under init_args, got {list(value)}.")
    made: dict[str, Any] = {}
    for key, value in named.items():
        expected = _dataclass_of(_hints(cls)[key])
        part = import_class(value["class_path"], f"{where}.{key}.class_path")
        if expected is None or not issubclass(part, expected):
            kind = "options" if expected is None else expected.__name__
            raise ValueError(f"{where}.{key}: {part.__name__} is no {kind}, which {cls.__name__} has there.")
        made[key] = make(part, value.get("init_args") or {}, f"{where}.{key}")
    return made


def _check_device(device: str, source: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"{source}: device is {device!r}; write cpu, cuda, cuda:1, mps or meta.") from error
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"{source}: device is {device!r}, which this installation of torch does not find. Take cpu.")


def _mixin_config(values: Mapping[str, Any], where: str) -> MixinConfig:
    path, options, layers = values.get("class_path"), values.get("init_args"), values.get("layers")
    if path is None:
        raise ValueError(f"{where}: class_path is missing. Name the mixin's class, as in mixformer.mixins.LoRAMixin.")
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"{where}.init_args: expected the mixin's options as keys, got {options!r}.")
    numbers = isinstance(layers, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in layers)
    if layers is not None and not numbers:
        raise ValueError(f"{where}.layers: expected a list of layer indices such as [0, 4, 8], got {layers!r}.")
    return MixinConfig(path, dict(options or {}), layers)


def settings_parser(model_class: Any, sections: Sequence[str] = tuple(SECTIONS)) -> Any:
    """The parser of the typed sections; it also prints help.

    Args:
        model_class: the class that `model` configures.
        sections: those of training and evaluation that it takes.
    """
    parser = _parser(add_help=False)
    for name, (kind, default, text) in _PLAIN.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_class_arguments(ChatConfig, "chat")
    parser.add_class_arguments(model_class.Config, "model")
    for key, cls in _section_classes().items():
        if key in sections:
            parser.add_class_arguments(cls, key)
    return parser


def _parser(**options: Any) -> Any:
    from jsonargparse import ArgumentParser

    return ArgumentParser(exit_on_error=False, **options)


def _parser_errors() -> tuple[type[Exception], ...]:
    from argparse import ArgumentError

    return (ArgumentError,)


def _say(error: Exception, name: str = "", where: str = "") -> str:
    """The parser's message on one line, with the place in the file in front."""
    text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split()))
    if name:
        text = re.sub(rf"\b{name}\.(?=\w+$)", "", text)
    refused = re.search(r"class_path '([\w.]+)': Option '(\w+)' is not accepted$", text)
    if refused is not None:
        from mixformer.hooks import did_you_mean

        text += f".{did_you_mean(refused[2], options_of(import_class(refused[1], where)))}"
    match = re.fullmatch(r'Parser key "([^"]+)": (.*)', text)
    if match is None:
        return f"{where}: {text}" if where else text
    key = match[1].replace(name, where, 1) if name and match[1].startswith(name) else match[1]
    return f"{key}: {match[2]}"


def _set_values(given: Mapping[str, Any], wanted: Any) -> dict[str, Any]:
    """The typed values of the keys that were set, nested as they are; options of a run are left out."""
    return {
        key: _set_values(_options(inner), getattr(wanted, key)) if isinstance(inner, Mapping) else getattr(wanted, key)
        for key, inner in given.items() if key not in RUN_OPTIONS
    }


def _options(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a nested section, which may name its class as well."""
    return given.get("init_args") or {} if "class_path" in given else given


def _compare(given: Mapping[str, Any], wanted: Any, found: Any, where: str, folder: Path) -> None:
    """Check the keys that `model:` sets against a checkpoint's configuration; options of a run are put into it.

    Raises:
        ValueError: they differ.
    """
    for key, inner in given.items():
        ours, theirs = getattr(wanted, key), getattr(found, key, None)
        if isinstance(inner, Mapping) and dataclasses.is_dataclass(theirs) and type(ours) is type(theirs):
            _compare(_options(inner), ours, theirs, f"{where}.{key}", folder)
        elif key in RUN_OPTIONS:
            setattr(found, key, ours)
        elif ours != theirs:
            raise ValueError(
                f"{where}.{key} is {ours!r}, but the checkpoint {folder} has {theirs!r}. Leave the key out, or take "
                f"other weights."
            )
