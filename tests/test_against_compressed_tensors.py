"""octavo runs compressed-tensors' checkpoints, and loses what its runtime loses.

The checkpoints are quantised and saved by compressed-tensors and transformers themselves, which
also run them for comparison: there, activations are rounded to int8 a token, but with scales of
max|x| / 127.5 where octavo's are max|x| / 127. A network of random layers amplifies that, and even
a float8 rounding that falls the other way, into different logits, so runtimes are compared by what
they lose against the original, and logits only where a single quantised layer lies between them,
or where activations stay as they are (W4A16).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo import Transformer, generate, kernels
from octavo.checkpoint import compressed, open_checkpoint
from octavo.config import ModelConfig
from octavo.model.linear import (
    Linear,
    LinearFP8,
    LinearW4A8,
    LinearW4A16,
    LinearW8A8,
    QuantizedLinear,
)
from octavo.schemes import SCHEMES
from tests.checkpoints import (
    hugging_face_fields,
    hugging_face_module,
    hugging_face_state,
    quantization_config,
    quantize_rows,
    quantized_config,
    random_state,
    small_config,
    write_hugging_face,
    write_quantized,
    write_w8a8,
)

LENGTH = 200  # many windows
STATIC_SCALE = 0.05  # of FP8's inputs, which are cut at 448 times this


def tokens(config: ModelConfig, length: int = LENGTH, seed: int = 1) -> Tensor:
    """[length] random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (length,), generator=generator)


def original(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """transformers' model with random weights, not quantised."""
    hf_config = transformers.AutoConfig.for_model(**hugging_face_fields(config))
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    model.load_state_dict(hugging_face_state(random_state(config, seed)), strict=True)
    return model.to(dtype).eval().requires_grad_(False)


def quantize(
    model: Any,
    folder: Path,
    ignore: Sequence[str] = ("lm_head",),
    targets: Sequence[str] = ("Linear",),
    scheme: str = "W8A8",
    **saving: Any,
) -> Path:
    """Quantise `model` in place as llm-compressor does without calibration, and save it."""
    preset = preset_name_to_scheme(scheme, list(targets))
    config = QuantizationConfig(config_groups={"group_0": preset}, ignore=list(ignore))
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            shape = (module.weight_scale.numel(), -1)  # those that share a scale, in a row
            low, high = module.weight.view(shape).aminmax(dim=1)
            scale, _ = calculate_qparams(low, high, preset.weights)
            module.weight_scale.data.copy_(scale.view(module.weight_scale.shape))
            if scheme == "FP8":
                module.input_scale.data.fill_(STATIC_SCALE)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder, **saving)
    compressor.update_config(str(folder))
    return folder


def load_with_transformers(folder: Path, dtype: Any = "auto", **options: Any) -> Any:
    """The checkpoint in compressed-tensors' own runtime; nothing in it may be left over."""
    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval().requires_grad_(False)


def reference_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """[T] ids to [T, vocab] logits in fp32."""
    return model(ids[None], use_cache=False).logits[0].float()


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean over tokens of KL(reference ‖ logits), in nats."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def dequantized(model: Transformer) -> dict[str, Tensor]:
    """Every weight of octavo's model in fp32, by Hugging Face's names."""
    weights = {}
    for name, module in model.named_modules():
        match module:
            case LinearW4A16():
                weight = kernels.unpack_int4(module.weight_packed)
                weight = kernels.dequantize_groups(weight, module.weight_scale)
            case LinearW4A8():
                weight = kernels.dequantize_groups(module.weight, module.weight_scale)
            case LinearW8A8() | LinearFP8():
                assert module.weight is not None
                weight = module.weight.float() * module.weight_scale[:, None]
            case nn.Module(weight=Tensor() as whole):
                weight = whole.float()
            case _:
                continue
        weights[f"{hugging_face_module(name)}.weight"] = weight
    return weights


def quantized_linears(model: Transformer) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def linears(config: ModelConfig, but: Sequence[str] = ("output",)) -> set[str]:
    """Names of all linears, without those that end in one of `but`."""
    return {name for name in config.linear_names() if not name.endswith(tuple(but))}


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


schemes = pytest.mark.parametrize("scheme", SCHEMES)


@schemes
@dtypes
def test_dequantized_weights_are_those_of_compressed_tensors(
    tmp_path: Path, dtype: torch.dtype, scheme: str
) -> None:
    """Scales are stored in the model's dtype."""
    config = quantized_config()
    folder = quantize(original(config, dtype), tmp_path, scheme=scheme)
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].dtype == dtype
    theirs = load_with_transformers(folder, dtype=torch.float32)
    theirs(tokens(config, 1)[None])  # the first pass dequantises
    expected = {n: p for n, p in theirs.state_dict().items() if n.endswith(".weight")}
    octavo = Transformer.from_folder(folder, pack=False)
    assert octavo.config.quantization is not None
    assert octavo.config.quantization.scheme == SCHEMES[scheme]
    ours = dequantized(octavo)
    assert ours.keys() == expected.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=0.0, msg=name)


@schemes
@dtypes
def test_octavo_loses_what_compressed_tensors_loses_in_every_scheme(
    tmp_path: Path, dtype: torch.dtype, scheme: str
) -> None:
    config = quantized_config()
    model = original(config, dtype)
    inputs = [tokens(config, seed=i) for i in range(2)]
    exact = torch.cat([reference_logits(model.float(), ids) for ids in inputs])
    folder = quantize(model.to(dtype), tmp_path, scheme=scheme)
    compressed_model = load_with_transformers(folder, dtype=torch.float32)
    theirs = torch.cat([reference_logits(compressed_model, ids) for ids in inputs])
    octavo = Transformer.from_folder(folder, dtype=torch.float32)
    assert quantized_linears(octavo) == linears(config)
    ours = octavo(torch.cat(inputs), [len(ids) for ids in inputs])
    lost = divergence(exact, theirs)
    assert 1e-5 < lost < 0.1
    assert divergence(exact, ours) == pytest.approx(lost, rel=0.1)
    if scheme == "W4A16":  # nothing is rounded when it runs
        assert (ours - theirs).abs().max() < 1e-4 * exact.std()


@pytest.mark.parametrize("scheme", ["FP8", "FP8_DYNAMIC", "W4A8"])
@pytest.mark.parametrize("linear", ["q_proj", "o_proj", "down_proj"])
def test_logits_agree_where_one_linear_is_in_another_scheme(
    tmp_path: Path, linear: str, scheme: str
) -> None:
    """As the test of one linear in W8A8, below; float8's scales are the same in both runtimes."""
    config = quantized_config((8,), n_layers=1)
    ids = tokens(config)
    model = original(config)
    exact = reference_logits(model, ids)
    folder = quantize(model, tmp_path, targets=[f"re:.*{linear}$"], ignore=[], scheme=scheme)
    theirs = reference_logits(load_with_transformers(folder), ids)
    ours = Transformer.from_folder(folder)(ids, [len(ids)])
    limit = 0.02 if scheme == "W4A8" else 0.002
    assert (ours - theirs).square().mean().sqrt() < limit * exact.std()
    assert divergence(exact, ours) < 1.1 * divergence(exact, theirs)
    assert (ours - exact).abs().max() > 0  # it was quantised at all


@schemes
def test_the_folders_of_these_tests_are_ones_that_transformers_reads(
    tmp_path: Path, scheme: str
) -> None:
    config = quantized_config()
    ids = tokens(config)
    exact = reference_logits(original(config), ids)
    folder = write_quantized(tmp_path, config, scheme, input_scale=STATIC_SCALE)
    theirs = reference_logits(load_with_transformers(folder), ids)
    ours = Transformer.from_folder(folder)(ids, [len(ids)])
    assert divergence(exact, ours) == pytest.approx(divergence(exact, theirs), rel=0.15)


@schemes
def test_the_quantization_config_that_octavo_writes_is_read_by_transformers(
    tmp_path: Path, scheme: str
) -> None:
    ignore = ["lm_head", r"re:.*layers\.1\..*"]
    section = compressed.quantization_config(SCHEMES[scheme], ignore)
    expected = quantization_config(ignore, scheme=scheme)
    assert section | {"version": None} == expected | {"version": None}
    config = quantized_config()
    spared = [name for name in config.linear_names() if name.startswith("layers.1.")]
    spared = ["lm_head", *(hugging_face_module(name) for name in spared)]
    folder = write_quantized(tmp_path, config, scheme, ignore=spared, quantization_config=section)
    load_with_transformers(folder)
    octavo = Transformer.from_folder(folder)
    assert octavo.config.quantization is not None
    assert octavo.config.quantization.scheme == SCHEMES[scheme]
    assert quantized_linears(octavo) == {n for n in linears(config) if "layers.1." not in n}


@schemes
def test_weights_stay_on_their_grid_and_scales_in_fp32_whatever_the_dtype(
    tmp_path: Path, scheme: str
) -> None:
    config = quantized_config()
    folder = write_quantized(tmp_path, config, scheme, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    octavo = Transformer.from_folder(folder, dtype=torch.float16)
    for kind, tensor in octavo.get_submodule("layers.2.feed_forward.w2").state_dict().items():
        on_disk = stored[f"model.layers.2.mlp.down_proj.{kind}"]
        if kind.endswith("_scale"):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor.flatten(), on_disk.float().flatten())
        else:
            assert tensor.dtype == on_disk.dtype
            assert torch.equal(tensor.view(torch.int8), on_disk.view(torch.int8))
    ids = tokens(config, 20)
    assert octavo(ids, [20]).isfinite().all()


@schemes
def test_one_layer_loads_alone(tmp_path: Path, scheme: str) -> None:
    folder = write_quantized(tmp_path, quantized_config(), scheme)
    checkpoint = open_checkpoint(folder)
    everything = checkpoint.load()
    layer = checkpoint.load(prefix="layers.2.")
    assert set(layer) == {name for name in everything if name.startswith("layers.2.")}
    assert all(torch.equal(tensor, everything[name]) for name, tensor in layer.items())
    assert not any(name.endswith("weight_shape") for name in everything)
    assert list(checkpoint.load(prefix="norm.")) == ["norm.weight"]


@schemes
def test_weight_bytes_are_those_that_a_quantised_checkpoint_takes(
    tmp_path: Path, scheme: str
) -> None:
    checkpoint = open_checkpoint(write_quantized(tmp_path, quantized_config(), scheme))
    n_bytes = sum(t.numel() * t.element_size() for t in checkpoint.load().values())
    assert checkpoint.config.weight_bytes(4) == n_bytes


def test_int8_weights_reach_both_ends_of_their_range(tmp_path: Path) -> None:
    """compressed-tensors' weights go down to -128, which is one more than they go up."""
    config = small_config((None,), n_layers=1)
    model = original(config)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight[:, 0] = -weight.abs().amax(1)
    weight[:, 1] = weight.abs().amax(1)
    folder = quantize(model, tmp_path)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[name].min() == -128 and stored[name].max() == 127
    linear = Transformer.from_folder(folder).get_submodule("layers.0.feed_forward.w2")
    # A single 1 among zeros is exact in int8 and takes one column out.
    columns = linear(torch.eye(config.hidden_dim))
    expected = stored[name].float() * stored[f"{name}_scale"]
    torch.testing.assert_close(columns.T, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("windows", [(None,), (None, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("ignore", [["lm_head"], []], ids=["head in float", "head in int8"])
@dtypes
def test_octavo_loses_the_divergence_that_compressed_tensors_loses(
    tmp_path: Path, windows: tuple[int | None, ...], ignore: list[str], dtype: torch.dtype
) -> None:
    config = small_config(windows, dim=128, hidden_dim=256)
    model = original(config, dtype)
    inputs = [tokens(config, seed=i) for i in range(4)]
    exact = torch.cat([reference_logits(model.float(), ids) for ids in inputs])
    folder = quantize(model.to(dtype), tmp_path, ignore)
    compressed = load_with_transformers(folder, dtype=torch.float32)
    theirs = torch.cat([reference_logits(compressed, ids) for ids in inputs])
    octavo = Transformer.from_folder(folder, dtype=torch.float32)
    assert quantized_linears(octavo) == linears(config, ("output",) if ignore else ())
    ours = octavo(torch.cat(inputs), [len(ids) for ids in inputs])
    lost = divergence(exact, theirs)
    assert 1e-5 < lost < 0.1  # int8 costs something, and nothing is broken
    assert divergence(exact, ours) == pytest.approx(lost, rel=0.1)


def test_in_bf16_octavo_loses_no_more_than_compressed_tensors(tmp_path: Path) -> None:
    """Their runtime multiplies dequantised numbers, rounded to bf16 again; octavo the int8 itself.

    That costs them 6 to 9 % over six seeds of these shapes.
    """
    config = small_config(dim=128, hidden_dim=256)
    inputs = [tokens(config, seed=i) for i in range(4)]
    model = original(config, torch.bfloat16)
    exact = torch.cat([reference_logits(model, ids) for ids in inputs])
    folder = quantize(model, tmp_path)
    compressed = load_with_transformers(folder, dtype=torch.bfloat16)
    theirs = torch.cat([reference_logits(compressed, ids) for ids in inputs])
    octavo = Transformer.from_folder(folder)
    assert octavo.dtype == torch.bfloat16
    ours = octavo(torch.cat(inputs), [len(ids) for ids in inputs])
    assert 0.8 < divergence(exact, ours) / divergence(exact, theirs) < 1.02


@pytest.mark.parametrize(
    "linear",
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
def test_logits_agree_where_one_linear_is_quantized(tmp_path: Path, linear: str) -> None:
    """One rounding of activations, nothing behind it that amplifies much: logits can be compared.

    The runtimes differ by half a step in 127 of the activations' scale, so their outputs are
    nearer to each other than either is to the original, and near to it.
    """
    config = small_config((8,), n_layers=1)
    ids = tokens(config)
    model = original(config)
    exact = reference_logits(model, ids)
    folder = quantize(model, tmp_path, targets=[f"re:.*{linear}$"], ignore=[])
    octavo = Transformer.from_folder(folder)
    quantized = {hugging_face_module(name) for name in quantized_linears(octavo)}
    assert {name.rsplit(".", 1)[-1] for name in quantized} == {linear}
    theirs = reference_logits(load_with_transformers(folder), ids)
    ours = octavo(ids, [len(ids)])
    assert (ours - theirs).abs().max() < 0.1 * exact.std()
    assert (ours - theirs).square().mean().sqrt() < 0.02 * exact.std()
    assert divergence(exact, ours) < 1.1 * divergence(exact, theirs)
    assert (ours - exact).abs().max() > 0  # it was quantised at all


@pytest.mark.parametrize(
    ("ignore", "floating"),
    [
        (["lm_head"], ("output",)),
        ([], ()),
        (["re:.*lm_head"], ("output",)),
        (["lm_head", "re:.*down_proj"], ("output", "w2")),
        (["lm_head", r"re:model\.layers\.0\..*"], ("output", "layers.0")),
        (["lm_head", "model.layers.1.self_attn.q_proj"], ("output", "layers.1.attention.wq")),
        (["lm_head", r"re:.*self_attn.*"], ("output", "wq", "wk", "wv", "wo")),
        # A regular expression need not reach the name's end…
        (["lm_head", "re:.*self_attn"], ("output", "wq", "wk", "wv", "wo")),
        # …but it starts at the name's beginning: this one ignores nothing.
        (["lm_head", "re:down_proj"], ("output",)),
    ],
    ids=str,
)
def test_ignored_linears_stay_in_floating_point(
    tmp_path: Path, ignore: list[str], floating: tuple[str, ...]
) -> None:
    """The patterns as a recipe gives them; in the saved config they may be spelled out."""
    config = small_config((None, 8), n_layers=2)
    names = {n for n in config.linear_names() if not is_any(n, floating)}
    ids = tokens(config, 40)
    folder = quantize(original(config), tmp_path, ignore)
    for written in (None, ignore):
        if written is not None:
            values = json.loads((folder / "config.json").read_text())
            values["quantization_config"]["ignore"] = written
            (folder / "config.json").write_text(json.dumps(values))
        octavo = Transformer.from_folder(folder, pack=False)
        assert quantized_linears(octavo) == names
        theirs = load_with_transformers(folder)
        theirs(ids[None])
        expected = theirs.state_dict()
        for name, weight in dequantized(octavo).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=0.0, msg=name)


def is_any(name: str, parts: Sequence[str]) -> bool:
    """Whether a linear's name begins or ends with one of the parts."""
    return any(f"{name}.".startswith(f"{p}.") or f".{name}".endswith(f".{p}") for p in parts)


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        (["re:.*mlp.*"], ("w1", "w2", "w3")),
        (["re:.*q_proj", "re:.*k_proj"], ("wq", "wk")),
        (["model.layers.1.mlp.up_proj", "lm_head"], ("layers.1.feed_forward.w3", "output")),
    ],
    ids=str,
)
def test_targets_choose_the_quantized_linears(
    tmp_path: Path, targets: list[str], parts: tuple[str, ...]
) -> None:
    config = small_config((None, 8), n_layers=2)
    folder = quantize(original(config), tmp_path, ignore=[], targets=targets)
    # compressed-tensors has spelled out all the others in `ignore`; the targets say it alone.
    values = json.loads((folder / "config.json").read_text())
    assert values["quantization_config"]["config_groups"]["group_0"]["targets"] == targets
    values["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(values))
    load_with_transformers(folder)
    octavo = Transformer.from_folder(folder)
    assert quantized_linears(octavo) == {n for n in config.linear_names() if is_any(n, parts)}


@pytest.mark.parametrize("shape", ["[N, 1]", "[N]"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@dtypes
def test_scales_of_each_dtype_and_shape(
    tmp_path: Path, dtype: torch.dtype, scale_dtype: torch.dtype, shape: str
) -> None:
    """Scales are kept in fp32 whatever the weights' dtype, so nothing is lost on the way in."""
    config = small_config()
    state = random_state(config, dtype=dtype)
    folder = write_w8a8(
        tmp_path, config, state, scale_dtype=scale_dtype, flat_scales=shape == "[N]"
    )
    octavo = Transformer.from_folder(folder, pack=False)
    assert octavo.dtype == dtype
    for name in linears(config):
        module = octavo.get_submodule(name)
        assert isinstance(module, LinearW8A8) and module.weight is not None
        weight, scale = quantize_rows(state[f"{name}.weight"], scale_dtype)
        assert torch.equal(module.weight, weight)
        assert module.weight_scale.dtype == torch.float32
        assert torch.equal(module.weight_scale, scale.float().flatten())
    assert isinstance(octavo.output, Linear)


def test_flat_scales_compute_what_columns_of_scales_compute(tmp_path: Path) -> None:
    config = small_config()
    ids = tokens(config)
    flat = write_w8a8(tmp_path / "flat", config, flat_scales=True)
    columns = write_w8a8(tmp_path / "columns", config)
    expected = Transformer.from_folder(columns)(ids, [len(ids)])
    assert torch.equal(Transformer.from_folder(flat)(ids, [len(ids)]), expected)


def test_the_w8a8_folders_of_these_tests_are_ones_that_transformers_reads(tmp_path: Path) -> None:
    config = small_config()
    ids = tokens(config)
    exact = reference_logits(original(config), ids)
    folder = write_w8a8(tmp_path, config)
    theirs = reference_logits(load_with_transformers(folder), ids)
    ours = Transformer.from_folder(folder)(ids, [len(ids)])
    assert divergence(exact, ours) == pytest.approx(divergence(exact, theirs), rel=0.15)


def test_sharded_w8a8_checkpoints(tmp_path: Path) -> None:
    """A weight and its scale may lie in different shards."""
    config = small_config()
    ids = tokens(config)
    model = original(config)
    expected_folder = quantize(original(config), tmp_path / "whole")
    folder = quantize(model, tmp_path / "shards", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    # Move every scale into a shard of its own kind, as a streaming writer may.
    scales: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        tensors = load_file(folder / file)
        scales |= {n: tensors.pop(n) for n in list(tensors) if n.endswith("_scale")}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    save_file(scales, folder / "model-scales.safetensors", metadata={"format": "pt"})
    index |= {name: "model-scales.safetensors" for name in scales}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    expected = Transformer.from_folder(expected_folder)(ids, [len(ids)])
    assert torch.equal(Transformer.from_folder(folder)(ids, [len(ids)]), expected)


def test_w8a8_in_chunks_and_batches_computes_what_one_pass_computes(tmp_path: Path) -> None:
    """Activations are scaled a token, so no token's rounding depends on its neighbours."""
    config = small_config()
    folder = quantize(original(config), tmp_path)
    octavo = Transformer.from_folder(folder)
    ids = tokens(config, 60)
    other = tokens(config, 33, seed=2)
    whole = octavo(ids, [60])
    packed = octavo(torch.cat((other, ids)), [33, 60])
    # Sums in another order may turn a rounding: one step of int8 in some layer, no more.
    assert divergence(whole, packed[33:]) < 1e-4
    cache = octavo.new_cache(60)
    chunks = torch.cat([octavo(chunk, [len(chunk)], [cache]) for chunk in ids.split(7)])
    assert divergence(whole, chunks) < 1e-4


def test_w8a8_answers_follow_the_logits(tmp_path: Path) -> None:
    """Greedy answers are the likeliest tokens of one plain pass over prompt and answer."""
    config = small_config()
    octavo = Transformer.from_folder(quantize(original(config), tmp_path))
    prompt = tokens(config, 12).tolist()
    [answer], _ = generate([prompt], octavo, max_tokens=30, temperature=0, chunk_size=5)
    logits = octavo(torch.tensor(prompt + answer), [42])[11:-1]
    taken = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert (logits.amax(-1) - taken).max() < 0.05


def test_a_model_without_quantization_config_is_not_quantized(tmp_path: Path) -> None:
    config = small_config()
    octavo = Transformer.from_folder(write_hugging_face(tmp_path, config))
    assert octavo.config.quantization is None
    assert quantized_linears(octavo) == set()
